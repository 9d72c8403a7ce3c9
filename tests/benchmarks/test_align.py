"""Latency over the multiple that kept channels are rounded to, at the same budget; run with ``-m benchmark -s``.

The default of ``align`` stands on this. Every width is cut to half the multiply-adds by the same scores and timed beside the dense network in
one process, in turn. On a machine with CUDA the same is done on its provider.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_prune.export import export_onnx
from lightning_prune.export.latency import speedup, time_round
from lightning_prune.export.runtime import open_session
from networks import resnet18
from torch import nn

from lightning_prune import Magnitude, compress, count_flops

ALIGN = (1, 4, 8, 16, 32)
PROVIDERS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Inverted(nn.Module):
    """The block of MobileNetV2: widen, filter every channel by itself, narrow."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        hidden = 6 * inputs
        self.keeps = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x):
        return x + self.body(x) if self.keeps else self.body(x)


def mobilenet():
    """Return the widths and strides of MobileNetV2 (arXiv:1801.04381), table 2, one block fewer per stage."""
    layers, inputs = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()], 32
    for outputs, blocks, stride in ((24, 1, 2), (32, 2, 2), (64, 3, 2), (96, 2, 1), (160, 2, 2)):
        for block in range(blocks):
            layers.append(Inverted(inputs, outputs, stride if block == 0 else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


NETWORKS = {"ResNet-18, 128 px": (resnet18, 128), "MobileNetV2-like, 160 px": (mobilenet, 160)}


@pytest.mark.benchmark
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore")
def test_speed_over_align(name, provider, tmp_path):
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    model, example = make().eval(), torch.randn(1, 3, size, size)
    dense = count_flops(model, example).total
    shares = {"dense": 1.0}
    export_onnx(model, tmp_path / "dense.onnx", example_inputs=example)
    for align in ALIGN:
        small, _ = compress(model, Magnitude(structured=True, flops=0.5, align=align), example)
        shares[str(align)] = count_flops(small, example).total / dense
        export_onnx(small, tmp_path / f"{align}.onnx", example_inputs=example)
    found = {batch: ratios(tmp_path, list(shares), provider, size, batch) for batch in (1, 16)}
    print(f"\n{name}, {provider}: speed beside dense, median of paired runs")
    for align in ALIGN:
        row = "  ".join(f"batch {batch}: {found[batch][str(align)]:.2f}" for batch in found)
        print(f"  align {align:2d}  FLOPs {shares[str(align)]:.3f}  {row}")
    assert all(share <= 0.5 for key, share in shares.items() if key != "dense")
    assert all(math.isfinite(ratio) for ratios in found.values() for ratio in ratios.values())


def ratios(folder: Path, keys: list[str], provider: str, size: int, batch: int) -> dict[str, float]:
    """Return the paired speed-up of every file over the dense one."""
    sessions = {key: open_session(folder / f"{key}.onnx", provider) for key in keys}
    values = np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)
    runs = {key: session.bind({session.inputs[0].name: values}) for key, session in sessions.items()}
    times = time_round(runs, warmup=5, runs=40)
    return {key: speedup([times["dense"]], [times[key]])["median"] for key in keys if key != "dense"}
