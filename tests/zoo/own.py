"""Networks of our own, for what the published ones do not have: transposed convolutions, recurrence, tied weights, shared key and value heads."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """Two levels down, transposed convolutions up, skips by concatenation (Ronneberger et al. 2015); ``[N, 3, H, W]`` to ``[N, 4, H, W]``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1 = self._double(3, width)
        self.down2 = self._double(width, 2 * width)
        self.bottom = self._double(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge2 = self._double(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge1 = self._double(2 * width, width)
        self.head = nn.Conv2d(width, 4, 1)

    @staticmethod
    def _double(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.bottom(F.max_pool2d(second, 2))
        x = self.merge2(torch.cat([second, self.up2(x)], 1))
        x = self.merge1(torch.cat([first, self.up1(x)], 1))
        return self.head(x)  # type: ignore[no-any-return]


class EncoderClassifier(nn.Module):
    """Embedding with positions, ``nn.TransformerEncoder``, mean over the sequence; ``[N, 12]`` of 50 tokens to ``[N, 5]``."""

    def __init__(self, features: int = 48, heads: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, features)
        self.positions = nn.Parameter(torch.zeros(12, features))
        layer = nn.TransformerEncoderLayer(features, heads, 96, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(features, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.positions).mean(1))  # type: ignore[no-any-return]


class RecurrentClassifier(nn.Module):
    """Embedding, a recurrent network of two layers, a linear layer on the last step; ``[N, 12]`` of 50 tokens to ``[N, 5]``."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], bidirectional: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.rnn = kind(24, 32, num_layers=2, bidirectional=bidirectional, batch_first=True)
        self.head = nn.Linear(64 if bidirectional else 32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0][:, -1])  # type: ignore[no-any-return]


class TiedLanguageModel(nn.Module):
    """A causal language model whose output layer is its embedding (Press and Wolf 2017); ``[N, 12]`` of 50 tokens to ``[N, 12, 50]``."""

    def __init__(self, features: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, features)
        self.rnn = nn.GRU(features, 48, batch_first=True)
        self.fc1 = nn.Linear(48, 64)
        self.fc2 = nn.Linear(64, features)
        self.decoder = nn.Linear(features, 50, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.rnn(self.embedding(tokens))[0]
        return self.decoder(self.fc2(torch.tanh(self.fc1(x))))  # type: ignore[no-any-return]


class ChannelsLast(nn.Module):
    """Linear layers on ``[N, H, W, C]`` between depthwise convolutions on ``[N, C, H, W]``, joined by permutations; no norm over channels."""

    def __init__(self, features: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, features, 4, stride=4)
        self.spatial = nn.ModuleList(nn.Conv2d(features, features, 3, padding=1, groups=features) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(features) for _ in range(3))
        self.expand = nn.ModuleList(nn.Linear(features, 4 * features) for _ in range(3))
        self.project = nn.ModuleList(nn.Linear(4 * features, features) for _ in range(3))
        self.head = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)  # [N, H, W, C]
        for spatial, norm, expand, project in zip(self.spatial, self.norms, self.expand, self.project, strict=True):
            mixed = norm(spatial(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
            x = x + project(F.gelu(expand(mixed)))
        return self.head(x.mean((1, 2)))  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202); ``[N, T, features]``."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(features, hidden, bias=False)
        self.up = nn.Linear(features, hidden, bias=False)
        self.down = nn.Linear(hidden, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class GroupedQueryAttention(nn.Module):
    """Causal attention where several query heads share one head of keys and values (arXiv:2305.13245), with rotated positions; ``[N, T, F]``."""

    def __init__(self, features: int, heads: int, kv_heads: int, head_size: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, head_size
        self.q = nn.Linear(features, heads * head_size, bias=False)
        self.k = nn.Linear(features, kv_heads * head_size, bias=False)
        self.v = nn.Linear(features, kv_heads * head_size, bias=False)
        self.out = nn.Linear(heads * head_size, features, bias=False)
        self.register_buffer("frequencies", 0.01 ** torch.linspace(0, 1, head_size // 2), persistent=False)

    def _rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2], device=x.device)[:, None] * self.frequencies  # [T, head_size / 2]
        real, imaginary = x.chunk(2, -1)
        sine, cosine = angles.sin(), angles.cos()
        return torch.cat([real * cosine - imaginary * sine, real * sine + imaginary * cosine], -1)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _ = x.shape
        q = self.q(x).view(batch, steps, self.heads, self.head_size).transpose(1, 2)
        k = self.k(x).view(batch, steps, self.kv_heads, self.head_size).transpose(1, 2)
        v = self.v(x).view(batch, steps, self.kv_heads, self.head_size).transpose(1, 2)
        k = self._rotated(k).repeat_interleave(self.heads // self.kv_heads, 1)
        v = v.repeat_interleave(self.heads // self.kv_heads, 1)
        scores = self._rotated(q) @ k.transpose(-1, -2) / math.sqrt(self.head_size)
        future = torch.ones(steps, steps, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, steps, -1))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A small language model of the Llama family: RMS norms, grouped-query attention, gated MLPs; ``[N, 12]`` to ``[N, 12, 50]``."""

    def __init__(self, features: int = 48, depth: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, features)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.RMSNorm(features),
                    "attn": GroupedQueryAttention(features, heads=12, kv_heads=4, head_size=8),
                    "norm2": nn.RMSNorm(features),
                    "mlp": GatedMLP(features, 128),
                }
            )
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(features)
        self.head = nn.Linear(features, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["attn"](block["norm1"](x))
            x = x + block["mlp"](block["norm2"](x))
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def conv1d() -> nn.Sequential:
    """Return convolutions over time, some dilated, some grouped, and a linear layer over channels and time; ``[N, 4, 64]``."""
    return nn.Sequential(
        *(nn.Conv1d(4, 32, 7, stride=2, padding=3, bias=False), nn.BatchNorm1d(32), nn.ReLU()),
        *(nn.Conv1d(32, 48, 3, padding=2, dilation=2), nn.GELU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(48, 48, 3, padding=1, groups=4, bias=False), nn.BatchNorm1d(48), nn.LeakyReLU(0.1)),
        *(nn.Conv1d(48, 32, 3), nn.ELU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(32 * 7, 5)),
    )
