"""Tiny networks and their files, exported once per session."""

from pathlib import Path

import pytest
import torch
from lightning_prune.export import ExportedFile, export_onnx
from torch import Tensor, nn


class TwoHeads(nn.Module):
    """A convolution, a BatchNorm with statistics of its own, and two outputs of one shape."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.first = nn.Linear(width, 4)
        self.second = nn.Linear(width, 4)
        nn.init.uniform_(self.norm.running_mean, -1, 1)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.norm(self.conv(x)).relu().mean((2, 3))
        return {"logits": self.first(features), "value": self.second(features)}


def make_two_heads(width: int = 6, seed: int = 0) -> TwoHeads:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TwoHeads(width)


@pytest.fixture(scope="session")
def two_heads() -> TwoHeads:
    return make_two_heads()


@pytest.fixture(scope="session")
def exported(two_heads: TwoHeads, tmp_path_factory: pytest.TempPathFactory) -> ExportedFile:
    return export_onnx(two_heads, tmp_path_factory.mktemp("onnx") / "small.onnx", torch.randn(1, 3, 8, 8))


@pytest.fixture(scope="session")
def dense_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(
        make_two_heads(24, seed=1), tmp_path_factory.mktemp("onnx") / "dense.onnx", torch.randn(1, 3, 8, 8)
    ).path


@pytest.fixture(scope="session")
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 4, (size,), generator=generator))
        for size in (6, 6, 3)
    ]
