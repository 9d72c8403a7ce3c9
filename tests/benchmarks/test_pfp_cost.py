"""Shares of all channels of ResNet-18 at 64 pixels: time over a forward pass of the same batch; run with ``-m benchmark -s``."""

import statistics
import time

import pytest
import torch
from networks import resnet18
from torch import nn

from lightning_prune.measure.contributions import Collector, unit_shares

ROUNDS, SAMPLES = 5, 64


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Two threads that wait for each other on a busy machine would be all that is timed."""
    torch.set_num_threads(1)


@pytest.mark.benchmark
@torch.no_grad()
def test_the_shares_of_all_channels_cost_at_most_15_forward_passes():
    torch.manual_seed(0)
    model, x = resnet18().train(), torch.randn(SAMPLES, 3, 64, 64)
    model(x)  # statistics of batch normalization
    model.eval()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    start = {name: torch.zeros(m.weight.shape[1]) for name, m in layers.items()}
    units = {name: torch.arange(len(zeros)) for name, zeros in start.items()}

    def score():
        measure = lambda name, layer, inputs: unit_shares(layer, inputs, units[name], len(units[name]))  # noqa: E731
        collector = Collector(model, start, measure)
        with collector.watching():
            model(x)
        assert all(shares.any() for shares in collector.largest.values())

    score()
    pairs = [(seconds(score), seconds(model, x)) for _ in range(ROUNDS)]
    ratio = statistics.median(ours / forward for ours, forward in pairs)
    ours, forward = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"shares {ours:.2f} s, forward pass {forward:.2f} s, median of paired ratios {ratio:.1f}")
    assert ratio <= 15
