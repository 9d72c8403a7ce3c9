"""Kronecker factors and second moments of ResNet-18 at 32 pixels against plain passes; run with ``-m benchmark -s``.

Paired: both take turns on the same batch in one run, in processor time on one thread, which other work on the machine disturbs least. The plain
pass is forward and backward with the gradients of all parameters; ours take the gradients of outputs alone, so they can be the cheaper ones.
"""

import statistics
import time

import pytest
import torch
from memory import peak
from networks import resnet18
from torch import nn
from torch.nn import functional as F

from lightning_prune.curvature.eigenbasis import Eigenbasis, directions
from lightning_prune.curvature.kronecker import CHUNK, Factors, SecondMoments
from lightning_prune.curvature.labels import sampled_gradients

ROUNDS, SAMPLES = 5, 64


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Two threads that wait for each other on a busy machine would be all that is timed."""
    torch.set_num_threads(1)


def stem_for_small_images(model):
    """Replace the stem, which takes 32 pixels down to 8, by one that keeps them, as CIFAR's networks have it."""
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


MODELS = {"stem of ImageNet": (resnet18, SAMPLES), "stem of CIFAR": (lambda: stem_for_small_images(resnet18()), 8)}


def asked(name):
    torch.manual_seed(0)
    build, samples = MODELS[name]
    model = build().eval()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return model, layers, torch.randn(samples, 3, 32, 32), torch.randint(0, 10, (samples,))


def plain(model, x, y):
    torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def collected(collector, model, x, y):
    with collector.watching():
        z = model(x)
        loss = F.cross_entropy(z, y)
    collector.backward(z, sampled_gradients(loss, z, torch.Generator().manual_seed(0)))


def bases_of(factors):
    found = {}
    for name, factor in factors.factors().items():
        (values_a, columns_a), (values_s, columns_s) = directions(factor.inputs), directions(factor.outputs)
        found[name] = Eigenbasis(columns_a, columns_s, values_a, values_s)
    return found


def seconds(work, *arguments):
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


def ratio(ours, model, x, y):
    collected(ours, model, x, y)
    plain(model, x, y)
    pairs = [(seconds(collected, ours, model, x, y), seconds(plain, model, x, y)) for _ in range(ROUNDS)]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return statistics.median(one / other for one, other in pairs), mine, theirs


@pytest.mark.benchmark
@pytest.mark.parametrize("name", MODELS)
def test_a_pass_with_factors_costs_at_most_one_and_a_half_plain_ones(name):
    model, layers, x, y = asked(name)
    found, mine, theirs = ratio(Factors(layers), model, x, y)
    print(f"{name}: with factors {mine:.3f} s, plain {theirs:.3f} s, median of paired ratios {found:.2f}")
    assert found <= 1.5


@pytest.mark.benchmark
@pytest.mark.parametrize("name", MODELS)
def test_a_pass_with_second_moments_costs_at_most_two_and_a_half_plain_ones(name):
    model, layers, x, y = asked(name)
    factors = made(layers, model, x, y)
    found, mine, theirs = ratio(SecondMoments(layers, bases_of(factors)), model, x, y)
    print(f"{name}: with second moments {mine:.3f} s, plain {theirs:.3f} s, median of paired ratios {found:.2f}")
    assert found <= 2.5


@pytest.mark.benchmark
def test_all_eigenbases_take_less_than_two_seconds():
    model, layers, x, y = asked("stem of ImageNet")
    factors = made(layers, model, x, y)
    spent = statistics.median(seconds(bases_of, factors) for _ in range(3))
    print(f"eigenbases of {len(layers)} layers: {spent:.2f} s of one core")
    assert spent <= 2


@pytest.mark.benchmark
@pytest.mark.parametrize("name", MODELS)
def test_a_pass_with_factors_needs_the_memory_of_a_plain_one_and_the_factors(name):
    model, layers, x, y = asked(name)
    sums = sum(f.inputs.nbytes + f.outputs.nbytes for f in made(layers, model, x, y).factors().values())
    bare, own = peak(lambda: plain(model, x, y)), peak(lambda: made(layers, model, x, y))
    moments = SecondMoments(layers, bases_of(made(layers, model, x, y)))
    second = peak(lambda: collected(moments, model, x, y))
    print(
        f"{name}: plain {bare / 1e6:.0f} MB, with factors {own / 1e6:.0f} MB, {sums / 1e6:.0f} MB of them; second moments {second / 1e6:.0f} MB"
    )
    assert own <= bare + sums + 8 * CHUNK


def made(layers, model, x, y):
    factors = Factors(layers)
    collected(factors, model, x, y)
    return factors
