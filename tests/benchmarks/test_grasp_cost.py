"""GraSP on ResNet-18 at 64 pixels: time over a bare loop, and memory over training; run with ``-m benchmark -s``.

The bare loop is the two phases on the same chunks and nothing else, timed in turn with ours. Memory is what torch allocates at most, model included,
beside two training steps with momentum on a batch of the size of a chunk.
"""

import statistics
import time

import pytest
import torch
from memory import peak
from networks import resnet18
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_prune.callback import Task
from lightning_prune.methods.grasp import GraSP
from lightning_prune.probe import Probe
from lightning_prune.structure.calls import as_calls

TEMPERATURE, ROUNDS, SAMPLES = 200.0, 5, 25


def chunks(count=2):
    return [(torch.randn(SAMPLES, 3, 64, 64), torch.randint(0, 10, (SAMPLES,))) for _ in range(count)]


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def prunable(model):
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {f"{name}.weight": m.weight for name, m in layers.items()}


def bare(model, data):
    """Return ``w * Hg`` by the shortest loop that does it."""
    weights = list(prunable(model).values())
    total = [torch.zeros_like(w) for w in weights]
    for x, y in data:
        gradients = torch.autograd.grad(cross_entropy(model(x) / TEMPERATURE, y), weights)
        torch._foreach_add_(total, gradients)
    product = [torch.zeros_like(w) for w in weights]
    for x, y in data:
        gradients = torch.autograd.grad(cross_entropy(model(x) / TEMPERATURE, y), weights, create_graph=True)
        torch._foreach_add_(product, torch.autograd.grad(gradients, weights, total))
    return [w.detach() * p for w, p in zip(weights, product, strict=True)]


def ours(task, weights, kept):
    method = GraSP(sparsity=0.9, temperature=TEMPERATURE, logits_module="fc", calibration_batches=len(task.probe.data))
    return list(method.score_weights(task, weights, kept).values())


def asked(model, data):
    weights = prunable(model)
    kept = {name: torch.ones(w.shape, dtype=torch.bool) for name, w in weights.items()}
    return Task.of(model, Probe.of_data(model, data, loss), as_calls(data[0][0])), weights, kept


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Two threads that wait for each other on a busy machine would be all that is timed."""
    torch.set_num_threads(1)


@pytest.mark.benchmark
def test_scoring_costs_at_most_1_15_times_a_bare_loop_of_double_backward():
    torch.manual_seed(0)
    model, data = resnet18().train(), chunks()
    question = asked(model, data)
    for mine, theirs in zip(ours(*question), bare(model, data), strict=True):  # the same numbers; also warms up
        torch.testing.assert_close(mine, theirs.double(), rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    pairs = [(seconds(ours, *question), seconds(bare, model, data)) for _ in range(ROUNDS)]
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"GraSP {mine:.2f} s, bare loop {theirs:.2f} s, median of paired ratios {ratio:.3f}")
    assert ratio <= 1.15


@pytest.mark.benchmark
def test_scoring_needs_at_most_the_memory_of_three_training_steps():
    def train():
        model, (batch,) = resnet18().train(), chunks(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()

    training, scoring = peak(train), peak(lambda: ours(*asked(resnet18(), chunks())))
    print(f"training {training / 1e6:.0f} MB, scoring {scoring / 1e6:.0f} MB: {scoring / training:.2f} times")
    assert scoring <= 3 * training
