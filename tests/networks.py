"""Small networks in plain torch that many tests share: one of every kind that counting, tracing and factorizing must get right.

:data:`NETWORKS` lists them by name; each entry makes a fresh network and example inputs for it, batch of two.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes; ``[N, C, H, W]``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()  # empty: the shortcut is the input itself
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return two blocks, the first of which changes the shape."""
    return nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))


class Twice(nn.Module):
    """One linear layer called twice, one convolution called at two sizes; ``[N, 3, H, W]`` to ``[N, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.linear = nn.Linear(5, 5)
        self.into, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.avg_pool2d(self.conv(x).tanh(), 2)).tanh().mean((2, 3))
        return self.head(self.linear(self.linear(self.into(x)).tanh()).tanh())


def image(*layers: nn.Module, channels: int = 8) -> nn.Sequential:
    """Return layers of maps with a classifier of four behind them."""
    return nn.Sequential(*layers, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


class ResNet18(nn.Module):
    """ResNet-18 of He et al. 2015 (arXiv:1512.03385) with torchvision's names; ``[N, 3, H, W]`` to ``[N, num_classes]``."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = stage(width, width, stride=1)
        self.layer2 = stage(width, 2 * width, stride=2)
        self.layer3 = stage(2 * width, 4 * width, stride=2)
        self.layer4 = stage(4 * width, 8 * width, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def resnet18(num_classes: int = 10, width: int = 64) -> ResNet18:
    """Return a ResNet-18 whose first stage has ``width`` channels; 64 is the original."""
    return ResNet18(num_classes, width)


def conv_bn(num_classes: int = 5) -> nn.Sequential:
    """Return two convolutions with batch normalization and a linear layer; ``[N, 3, 8, 8]``."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, num_classes),
    )


def depthwise() -> nn.Sequential:
    """Return depthwise, pointwise, grouped, dilated, ``same``-padded and transposed convolutions; ``[N, 4, 9, 9]``."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=4),
        nn.Conv2d(8, 8, 1),
        nn.ReLU6(),
        nn.Conv2d(8, 12, (3, 1), stride=2, dilation=2, padding=(2, 0), groups=2),
        nn.Conv2d(12, 6, 5, padding="same", padding_mode="circular"),
        nn.Conv2d(6, 6, 3, padding="same"),
        nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1, groups=2),
    )


class LSTMClassifier(nn.Module):
    """Embedding, a bidirectional LSTM of two layers, a linear layer on the last step; ``[N, T]`` of token numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])  # type: ignore[no-any-return]


class Attention(nn.Module):
    """One block of self-attention by ``scaled_dot_product_attention`` and a gated MLP; ``[N, T, 8]``."""

    def __init__(self, features: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * features, bias=False)
        self.out = nn.Linear(features, features)
        self.gate = nn.Linear(features, 4 * features)
        self.down = nn.Linear(2 * features, features)
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.scale * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        a, b = self.gate(x).chunk(2, -1)
        return x + self.down(a * F.silu(b))  # type: ignore[no-any-return]


def transformer() -> nn.TransformerEncoder:
    """Return an encoder of two layers whose fast path torch takes in evaluation; ``[N, T, 8]``."""
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def conv1d() -> nn.Sequential:
    """Return a small network of one-dimensional convolutions; ``[N, 3, 16]``."""
    return nn.Sequential(
        nn.Conv1d(3, 6, 5, stride=2, padding=2), nn.GELU(), nn.Conv1d(6, 8, 3), nn.Flatten(), nn.Linear(48, 4)
    )


def conv3d() -> nn.Sequential:
    """Return a small network of three-dimensional convolutions; ``[N, 2, 4, 6, 6]``."""
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.Conv3d(4, 6, (1, 3, 3), bias=False),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )


class TwoInputs(nn.Module):
    """Takes ``image`` ``[N, 3, 8, 8]`` and ``label`` ``[N, 4]`` by keyword and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 4)

    def forward(self, *, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        features = self.conv(image).mean((2, 3))
        return {"features": features, "scores": self.fc(features) @ label.T}


#: Name to a function that returns a fresh network and example inputs, as ``count_flops`` and Lightning read them.
NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet18": lambda: (resnet18(width=8), torch.randn(2, 3, 32, 32)),
    "conv_bn": lambda: (conv_bn(), torch.randn(2, 3, 8, 8)),
    "depthwise": lambda: (depthwise(), torch.randn(2, 4, 9, 9)),
    "lstm": lambda: (LSTMClassifier(), torch.randint(0, 11, (2, 7))),
    "attention": lambda: (Attention(), torch.randn(2, 5, 8)),
    "transformer": lambda: (transformer(), torch.randn(2, 5, 8)),
    "conv1d": lambda: (conv1d(), torch.randn(2, 3, 16)),
    "conv3d": lambda: (conv3d(), torch.randn(2, 2, 4, 6, 6)),
    "two_inputs": lambda: (TwoInputs(), {"image": torch.randn(2, 3, 8, 8), "label": torch.randn(2, 4)}),
}
