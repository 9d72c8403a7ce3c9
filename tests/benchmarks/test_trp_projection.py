"""TRP's projection against one by torch's SVD, on the 3x3 convolutions of a ResNet-18; run with ``-m benchmark``.

Both choose the rank by energy and return the projected matrices. Paired: the two take turns in one run, on one thread.
"""

import statistics
import time

import pytest
import torch

from lightning_prune.structure.factorized import matrix_of
from lightning_prune.structure.spectrum import project, rank_for_energy, spectrum

ENERGY = 0.02
ROUNDS = 5
STAGES = ((64, 64, 4), (64, 128, 1), (128, 128, 3), (128, 256, 1), (256, 256, 3), (256, 512, 1), (512, 512, 3))


def weights():
    """Weights with a decaying spectrum, as trained ones have: noise plus a dominant part of low rank."""
    generator = torch.Generator().manual_seed(0)
    for inner, out, count in STAGES:
        for _ in range(count):
            noise = torch.randn(out, inner * 9, generator=generator)
            strong = torch.randn(out, out // 4, generator=generator) @ torch.randn(
                out // 4, inner * 9, generator=generator
            )
            yield (noise + strong).mul_((inner * 9) ** -0.5).reshape(out, inner, 3, 3)


def by_gram(matrices):
    for matrix in matrices:
        known = spectrum(matrix, ENERGY)
        project(matrix, rank_for_energy(known.values, ENERGY), known)


def by_svd(matrices):
    for matrix in matrices:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        rank = rank_for_energy(values, ENERGY)
        (left[:, :, :rank] * values[:, None, :rank]) @ right[:, :rank]


def seconds(function, matrices):
    start = time.perf_counter()
    function(matrices)
    return time.perf_counter() - start


@pytest.mark.benchmark
def test_projection_of_resnet18_is_three_times_faster_than_by_svd(record_property):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrices = [matrix_of(weight, "channel") for weight in weights()]
        seconds(by_gram, matrices)  # warm up the allocator and the linear algebra library
        pairs = [(seconds(by_gram, matrices), seconds(by_svd, matrices)) for _ in range(ROUNDS)]
    finally:
        torch.set_num_threads(threads)
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(svd / gram for gram, svd in pairs)
    record_property("projection_seconds", ours)
    record_property("svd_seconds", theirs)
    record_property("ratio", ratio)
    print(f"projection {ours:.3f} s, SVD {theirs:.3f} s, median of paired ratios {ratio:.1f}")
    assert ratio >= 3
