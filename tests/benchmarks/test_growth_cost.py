"""What growth adds to a training step of ResNet-18, 64 pixels, batch 64; run with ``-m benchmark -s``.

The steps that are measured lie in the middle of growth: half of what shall leave has left and is held at zero, the rest is penalized, or absent
from every other step. IncReg looks at all weights in every step; GReg only adds its penalty; SPP takes units out of a step and puts them back.
Where new memory is slow, as on small virtual machines, set MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ to a large number: else what is measured
is the system that hands out pages. Medians over 20 steps: the points of the history, one in eleven steps of this fit, are left out.
"""

import statistics

import pytest
import torch
from test_step_overhead import OPTIMIZERS, Lit, share

from lightning_prune.methods.greg import GReg
from lightning_prune.methods.increg import IncReg
from lightning_prune.methods.spp import SPP

KINDS = {
    "IncReg": lambda: IncReg(flops=0.5),
    "IncReg-columns": lambda: IncReg(sparsity=0.5, units="columns"),
    "GReg": lambda: GReg(flops=0.5),
    "SPP": lambda: SPP(flops=0.5),
}


def half_way(method):
    """Return the method such that its growth starts where half of what shall leave has left."""
    start = method.start

    def begin():
        start()
        chosen = method.lowest(method.slices.scores())
        first = chosen.cumsum(0) % 2 == 1
        method.drop(chosen & first)
        if isinstance(method, SPP):
            method.values = torch.where(chosen & ~first, 0.5, method.values)
            method._note_chances()

    method.start = begin
    return method


@pytest.mark.benchmark
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", KINDS)
def test_growth_adds_at_most_three_percent(name, optimizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Lit, "configure_optimizers", lambda self: OPTIMIZERS[optimizer](self.parameters()))
    method = half_way(KINDS[name]())
    own, rest = share(method, tmp_path, monkeypatch, planned=100, average=statistics.median)
    gone = float(method.gone.sum() / method.quota.sum())
    print(f"{name}, {optimizer}, {gone:.0%} gone: {own * 1e3:.1f} ms per step of {rest:.3f} s: {own / rest:.2%}")
    assert 0.4 < gone < 0.7
    assert own / rest <= 0.03
