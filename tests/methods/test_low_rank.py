"""LowRank: which layers, which ranks, within which bound."""

import pytest
import torch
from torch import nn

from lightning_prune import LowRank, compress, count_flops
from lightning_prune.errors import BudgetError, OptionError
from lightning_prune.structure.factorized import Factorized


def grouped() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.Conv2d(32, 64, 3, padding=1, groups=2, padding_mode="circular"),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 16, 2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    )


X = torch.zeros(2, 3, 12, 12)


@pytest.mark.parametrize("what", ["flops", "params"])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.6])
@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_a_bound_is_never_exceeded_and_met_closely(what, share, scheme):
    model = grouped()
    small, plan = compress(model, LowRank(**{what: share}, scheme=scheme, align=1), X)
    have = {"flops": lambda m: count_flops(m, X).total, "params": lambda m: sum(p.numel() for p in m.parameters())}[
        what
    ]
    assert have(small) <= share * have(model)
    assert have(small) > (share - 0.08) * have(model)
    assert plan.origin.params == sum(p.numel() for p in model.parameters())


def test_an_absolute_bound_counts_for_the_example_as_given():
    model = grouped()
    dense = count_flops(model, X).total
    small, _ = compress(model, LowRank(flops=int(0.8 * dense), align=1), X)
    assert 0.7 * dense < count_flops(small, X).total <= int(0.8 * dense)


def test_what_cannot_be_factorized_is_listed_with_the_reason():
    _, plan = compress(grouped(), LowRank(flops=0.7, align=1), X)
    assert "depthwise" in plan.left_alone["2"]
    assert "transposed" in plan.left_alone["5"]
    assert {step.module for step in plan.steps} <= {"0", "3", "8", "10"}


def test_the_compact_model_computes_what_the_truncated_one_does():
    torch.manual_seed(3)
    model = grouped().double().eval()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    small, plan = compress(model, LowRank(flops=0.7, align=1), x)
    for step in plan.steps:
        step.emulate(model)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)


def test_rank_and_energy_refer_to_each_layer():
    small, plan = compress(grouped(), LowRank(rank=8, include=["0", "8"]), X)
    assert {step.module: step.rank for step in plan.steps} == {"0": 8, "8": 8}
    assert isinstance(small[0], Factorized)
    lossy, _ = compress(grouped(), LowRank(energy=0.5, align=1), X)
    careful, _ = compress(grouped(), LowRank(energy=0.3, align=1), X)
    assert count_flops(lossy, X).total < count_flops(careful, X).total


def test_align_rounds_ranks_to_multiples():
    _, plan = compress(grouped(), LowRank(flops=0.75, align=8), X)
    units = {
        "0": 4,
        "3": 8,
        "8": 8,
        "10": 2,
    }  # narrow layers, whose useful ranks end below 16, take a smaller power of two
    assert all(step.rank % units[step.module] == 0 for step in plan.steps)


def test_include_and_exclude_take_names_globs_and_types():
    def chosen(**options):
        return {step.module for step in compress(grouped(), LowRank(rank=2, align=1, **options), X)[1].steps}

    assert chosen(include="8") == {"8"}
    assert chosen(include=nn.Linear) == chosen(include="Linear") == {"8", "10"}
    assert chosen(exclude=[nn.Linear]) == {"0", "3"}
    assert chosen(include="1*") == {"10"}


def test_tied_and_parametrized_weights_stay():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
            self.d = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x))))

    _, plan = compress(Tied(), LowRank(rank=4, align=1), torch.zeros(2, 64))
    assert [step.module for step in plan.steps] == ["c"]
    assert "tied" in plan.left_alone["a"]
    assert "parametrized" in plan.left_alone["d"]


def test_layers_that_the_example_never_reaches_stay():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.used(x)

    _, plan = compress(Branch(), LowRank(rank=4, align=1), torch.zeros(2, 64))
    assert [step.module for step in plan.steps] == ["used"]
    assert "not called" in plan.left_alone["unused"]


def test_a_layer_of_zeros_stays_since_its_factors_could_not_learn():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    nn.init.zeros_(model[2].weight)
    _, plan = compress(model, LowRank(rank=2, align=1), torch.zeros(1, 32))
    assert [step.module for step in plan.steps] == ["0"]
    assert plan.left_alone["2"].startswith("all its weights are zero")


def test_a_bound_that_cannot_be_met_names_layers_and_the_least():
    with pytest.raises(BudgetError, match=r"is the least that can be reached.*Bound by '"):
        compress(grouped(), LowRank(flops=0.01), X)


def test_a_count_above_the_dense_model_is_refused():
    with pytest.raises(OptionError, match="flops"):
        compress(grouped(), LowRank(flops=10**12), X)
