"""What growing penalties add to a training step of ResNet-18, 64 pixels, batch 64; run with ``-m benchmark -s``.

IncReg looks at all weights in every step; GReg only adds its penalty. The steps that are measured lie in the middle of growth.
"""

import pytest
from test_step_overhead import OPTIMIZERS, Lit, share

from lightning_prune.methods.greg import GReg
from lightning_prune.methods.increg import IncReg


@pytest.mark.benchmark
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("kind", [IncReg, GReg])
def test_growing_penalties_add_at_most_three_percent(kind, optimizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Lit, "configure_optimizers", lambda self: OPTIMIZERS[optimizer](self.parameters()))
    own, rest = share(kind(flops=0.5), tmp_path, monkeypatch)
    print(f"{kind.__name__}, {optimizer}: {own * 1e3:.1f} ms per step of {rest:.3f} s: {own / rest:.2%}")
    assert own / rest <= 0.03
