"""Gradient and exact curvature of a classifier against a bare loop of one backward pass for the loss and one per class; run with ``-m benchmark -s``.

The bare loop gives no curvature: it sums over samples before anything is squared. Paired: both take turns on the same batch in one run, forward pass
included, in processor time on one thread, which other work on the machine disturbs least. Ours does one backward pass per direction to the outputs
of the layers, and the weights of all classes in one batched product. The worst case are layers with more positions than twice the classes and few
multiplications per weight and sample, as of tokens: squaring costs as much as multiplying there, and the bound is wider.
"""

import statistics
import time

import pytest
import torch
from networks import resnet18
from torch import nn
from torch.nn import functional as F

from lightning_prune.curvature.diagonal import GaussNewton, exact_cotangents
from lightning_prune.curvature.products import recorded

CLASSES, ROUNDS = 10, 3


def mlp():
    """784-300-100-10 with tanh, as in the paper."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.Tanh(), nn.Linear(300, 100), nn.Tanh(), nn.Linear(100, CLASSES)
    )


def vgg11():
    """VGG-11 for 32 pixels without normalization, as in the paper."""
    layers, inputs = [], 3
    for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)] if width else [nn.MaxPool2d(2)]
        inputs = width or inputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, CLASSES))


def transformer():
    """Four blocks of attention over 64 tokens."""
    block = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(block, 4, enable_nested_tensor=False), Mean(), nn.Linear(128, CLASSES))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


CASES = {
    "MLP 784-300-100-10, batch 1000": (mlp, (1000, 1, 28, 28), 1.3),
    "VGG-11, 32 pixels, batch 16": (vgg11, (16, 3, 32, 32), 1.3),
    "ResNet-18, 64 pixels, batch 16": (lambda: resnet18(CLASSES), (16, 3, 64, 64), 1.3),
    "Transformer, 64 tokens, batch 32": (transformer, (32, 64, 128), 1.6),
}


def ours(model, weights, method, x, y):
    with recorded(weights) as products:
        outputs = model(x)
    loss = F.cross_entropy(outputs, y)
    method.diagonal(products, outputs, exact_cotangents(loss, outputs))
    torch.autograd.grad(loss, list(weights.values()))


def bare(model, weights, x, y):
    outputs = model(x)
    logs = outputs.log_softmax(1)
    scalars = [F.cross_entropy(outputs, y), *(logs.exp().detach().sqrt() * logs).mean(0)]
    for scalar in scalars:
        torch.autograd.grad(scalar, list(weights.values()), retain_graph=True)


def seconds(work, *arguments):
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


@pytest.mark.benchmark
@pytest.mark.parametrize("name", CASES)
def test_exact_curvature_costs_hardly_more_than_a_bare_loop(name, record_property):
    torch.set_num_threads(1)  # the fixture puts it back
    build, shape, bound = CASES[name]
    model, x, y = build().eval(), torch.randn(shape), torch.arange(shape[0]) % CLASSES
    weights = {key: p for key, p in model.named_parameters() if p.ndim >= 2}
    method = GaussNewton(weights, torch.Generator().manual_seed(0))
    first = seconds(ours, model, weights, method, x, y)  # where the samples lie is found once
    bare(model, weights, x, y)
    pairs = [(seconds(ours, model, weights, method, x, y), seconds(bare, model, weights, x, y)) for _ in range(ROUNDS)]
    mine, loop = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    record_property("ratio", ratio)
    assert not method.estimated
    print(
        f"{name}: curvature {mine:.3f} s (first batch {first:.3f} s), bare loop {loop:.3f} s, median of paired ratios {ratio:.2f}"
    )
    assert ratio <= bound
