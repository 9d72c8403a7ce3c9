"""ResNet-50 at half its multiply-adds: how long it takes and what memory it needs; run with ``-m benchmark -s``.

The yardstick of the first is torch-pruning, the only other engine that removes channels, in the same run (``pip install --no-deps torch-pruning``).
It takes a ratio of channels, not of FLOPs; a target in FLOPs is reached as in its own benchmark, by steps until a count says that it is. What a
single pruning takes to a ratio that somebody has found before is printed, too: less than ``torch.export`` alone.
"""

import copy
import statistics
import time
from pathlib import Path

import pytest
import torch
from networks import resnet18
from torch import nn

from lightning_prune import Magnitude, count_flops
from lightning_prune.callback import Task
from lightning_prune.probe import Probe
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.surgery import compact

ROUNDS = 5


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != 4 * width:
            conv = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def resnet50():
    """Return a ResNet-50 of He et al. 2015 (arXiv:1512.03385)."""
    layers, inputs = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)).eval()


def ours(model, example, checked=False):
    """Trace, find groups, allocate and compact; return the smaller model and the seconds of it all."""
    task = Task.of(model, Probe.of_data(model, None, None), as_calls(example))  # counting is not part of the claim
    method = Magnitude(structured=True, flops=0.5)
    start = time.perf_counter()
    small = compact(model, method.decided(task, method.score(task)), task.calls if checked else ())
    return small, time.perf_counter() - start


def theirs(model, example, ratio):
    """Prune with torch-pruning; return the model and the seconds."""
    import torch_pruning as tp

    model = copy.deepcopy(model)
    start = time.perf_counter()
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(model, example, importance, pruning_ratio=ratio, ignored_layers=[model[-1]], round_to=8).step()
    return model, time.perf_counter() - start


def theirs_in_steps(model, example, bound):
    """Prune with torch-pruning, five per cent of the channels a step, until its own count of multiply-adds is at most ``bound``."""
    import torch_pruning as tp

    model = copy.deepcopy(model)
    start = time.perf_counter()
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(
        model, example, importance, pruning_ratio=0.9, iterative_steps=18, ignored_layers=[model[-1]], round_to=8
    )
    dense, _ = tp.utils.count_ops_and_params(model, example)
    while tp.utils.count_ops_and_params(model, example)[0] > bound * dense:
        pruner.step()
    return model, time.perf_counter() - start


@pytest.mark.benchmark
@pytest.mark.filterwarnings("ignore")
def test_resnet50_is_cut_to_half_faster_than_by_torch_pruning():
    pytest.importorskip("torch_pruning")
    model, example = resnet50(), torch.randn(1, 3, 224, 224)
    dense = count_flops(model, example).total
    low, high = 0.0, 0.9
    for _ in range(8):
        ratio = (low + high) / 2
        low, high = (
            (low, ratio) if count_flops(theirs(model, example, ratio)[0], example).total < dense / 2 else (ratio, high)
        )
    ours(model, example)  # the first export loads half of torch
    pairs = []
    for _ in range(ROUNDS):
        small, mine = ours(model, example)
        _, checked = ours(model, example, checked=True)
        other, yours = theirs_in_steps(model, example, 0.5)
        _, once = theirs(model, example, high)
        pairs.append((mine, checked, yours, once))
    counts = [count_flops(m, example).total / dense for m in (small, other)]
    mine, checked, yours, once = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(m / y for m, _, y, _ in pairs)
    print(
        f"ResNet-50, 224 px, to {counts[0]:.3f} and {counts[1]:.3f} of the FLOPs: {mine:.2f} s, with self-check {checked:.2f} s; "
        f"torch-pruning {yours:.2f} s; median of paired ratios {ratio:.2f}; torch-pruning to a known ratio {once:.2f} s"
    )
    assert counts[0] <= 0.5
    assert ratio < 1


def peak(reset=False):
    """Return the peak of resident memory in bytes since it was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.benchmark
@pytest.mark.filterwarnings("ignore")
def test_resnet50_needs_less_than_three_times_its_memory():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    ours(resnet18(10).eval(), torch.randn(1, 3, 64, 64))  # imports are not the model's memory
    model, example = resnet50(), torch.randn(1, 3, 224, 224)
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    task = Task.of(model, Probe.of_data(model, None, None), as_calls(example))
    method = Magnitude(structured=True, flops=0.5)
    before = peak(reset=True)
    small = compact(model, method.decided(task, method.score(task)))
    used = size + peak() - before
    print(f"ResNet-50: {size / 2**20:.0f} MiB; peak with it {used / 2**20:.0f} MiB, {used / size:.2f} times")
    assert small is not model
    assert used < 3 * size
