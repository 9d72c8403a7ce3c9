"""Ranks from one bound: never exceeded, used up, and as good as the best of all combinations."""

import itertools
import math

import pytest
import torch

from lightning_prune.budget import Choice, allocate, rank_choices, resolve_bound
from lightning_prune.errors import BudgetError, OptionError
from lightning_prune.structure.spectrum import rank_for_energy


def ladders_of(seed, layers=3, align=1):
    """Random spectra and prices per rank of a few layers; the last useful rank costs less than the dense layer."""
    generator = torch.Generator().manual_seed(seed)
    spectra, ladders = {}, {}
    for index in range(layers):
        full = int(torch.randint(2, 7, (), generator=generator)) * align
        price = int(torch.randint(3, 30, (), generator=generator))
        values = torch.rand(2, full, generator=generator).square().sort(dim=1, descending=True).values
        name = f"layer{index}"
        spectra[name] = values
        ladders[name] = rank_choices(values, lambda rank, p=price: rank * p, price * full - 1, full - 1, align)
    return spectra, ladders


def cost_of(ladders, chosen):
    return sum(choice.cost for name, ladder in ladders.items() for choice in ladder if choice.size == chosen[name])


def loss_of(ladders, chosen):
    return max(choice.loss for name, ladder in ladders.items() for choice in ladder if choice.size == chosen[name])


def bounds_of(ladders):
    least = sum(ladder[0].cost for ladder in ladders.values())
    dense = sum(ladder[-1].cost for ladder in ladders.values())
    return range(least, dense + 1, max(1, (dense - least) // 15))


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("seed", range(8))
def test_bound_is_never_exceeded_and_no_unit_more_would_fit(seed, align):
    _, ladders = ladders_of(seed, align=align)
    for bound in bounds_of(ladders):
        chosen = allocate(ladders, bound + 17, fixed=17)
        total = cost_of(ladders, chosen)
        assert total <= bound
        for name, ladder in ladders.items():
            sizes = [choice.size for choice in ladder]
            index = sizes.index(chosen[name])
            if index + 1 < len(ladder):
                assert total - ladder[index].cost + ladder[index + 1].cost > bound


@pytest.mark.parametrize("seed", range(8))
def test_largest_loss_equals_the_best_of_all_combinations(seed):
    _, ladders = ladders_of(seed)
    for bound in bounds_of(ladders):
        best = min(
            max(choice.loss for choice in combination)
            for combination in itertools.product(*ladders.values())
            if sum(choice.cost for choice in combination) <= bound
        )
        assert loss_of(ladders, allocate(ladders, bound)) == best


@pytest.mark.parametrize("seed", range(8))
def test_largest_loss_never_rises_with_the_bound(seed):
    _, ladders = ladders_of(seed)
    losses = [loss_of(ladders, allocate(ladders, bound)) for bound in bounds_of(ladders)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("seed", range(4))
def test_layers_have_at_least_the_rank_of_the_common_threshold(seed):
    spectra, ladders = ladders_of(seed)
    for bound in bounds_of(ladders):
        chosen = allocate(ladders, bound)
        threshold = loss_of(ladders, chosen)
        for name, size in chosen.items():
            wanted = rank_for_energy(spectra[name], min(threshold, 0.999999))
            assert size is None or size >= wanted


def test_what_is_left_buys_the_most_energy_per_cost_first():
    ladders = {
        "worst": (Choice(1, 0.5, 10), Choice(2, 0.4, 40), Choice(None, 0.0, 90)),
        "dear": (Choice(1, 0.3, 10), Choice(2, 0.1, 20), Choice(None, 0.0, 30)),
        "cheap": (Choice(1, 0.3, 10), Choice(2, 0.2, 12), Choice(None, 0.0, 30)),
    }
    # Threshold 0.5 costs 30; raising `worst` takes 30 more. Of 11 left, `cheap` gives 0.1 for 2, `dear` 0.2 for 10.
    assert allocate(ladders, 41) == {"worst": 1, "dear": 1, "cheap": 2}
    assert allocate(ladders, 42) == {"worst": 1, "dear": 2, "cheap": 2}


def test_the_dense_bound_keeps_everything_that_costs_a_loss_and_factorizes_what_is_free():
    exact = torch.tensor([[3.0, 2.0, 0.0, 0.0, 0.0, 0.0]])
    lossy = torch.tensor([[3.0, 2.0, 2.0, 1.0, 1.0, 1.0]])
    ladders = {
        name: rank_choices(values, lambda rank: 10 * rank, 50, 4) for name, values in [("a", exact), ("b", lossy)]
    }
    assert allocate(ladders, 100) == {"a": 2, "b": None}


def test_ladder_holds_the_aligned_ranks_that_are_cheaper_then_the_dense_layer():
    values = torch.linspace(1, 0.1, 30)[None]
    ladder = rank_choices(values, lambda rank: 3 * rank, 70, 25, align=8)
    assert [choice.size for choice in ladder] == [8, 16, None]
    assert [choice.cost for choice in ladder] == [24, 48, 70]
    squares = values[0].double().square().tolist()
    assert ladder[0].loss == pytest.approx(math.fsum(squares[8:]) / math.fsum(squares), rel=1e-12)
    assert ladder[-1].loss == 0
    assert [choice.size for choice in rank_choices(values, lambda rank: 3 * rank, 50, 25, align=8)] == [8, 16, None]
    assert [choice.size for choice in rank_choices(values, lambda rank: 3 * rank, 48, 25, align=8)] == [8, None]
    assert [choice.size for choice in rank_choices(values, lambda rank: rank, 70, 0, align=8)] == [None]


def test_noise_of_the_gram_matrix_counts_as_no_loss():
    values = torch.tensor([[1.0, 0.5, 1e-8, 1e-8]], dtype=torch.float64)
    assert [choice.size for choice in rank_choices(values, lambda rank: rank, 9, 4)] == [1, 2, None]


def test_bound_that_cannot_be_met_names_the_layers_that_bind_and_the_minimum():
    ladders = {
        f"net.{index}": (Choice(8, 0.5, 100 * index), Choice(None, 0.0, 1000 * index)) for index in range(1, 8)
    } | {"head": (Choice(None, 0.0, 5000),)}
    least = 5000 + 2800 + 200
    assert allocate(ladders, least, fixed=200)["net.7"] == 8
    with pytest.raises(BudgetError) as caught:
        allocate(ladders, least - 1, fixed=200, name="params")
    message = str(caught.value)
    assert message.startswith("params: at most 7,999 asked for, but 8,000 is the least")
    assert "'head' (dense: 5,000), 'net.7' (8: 700), 'net.6' (8: 600), 'net.5' (8: 500), 'net.4' (8: 400)" in message
    assert "and 3 more" in message
    assert "200 outside" in message


def test_model_without_layers_to_choose_meets_its_cost_and_no_less():
    assert allocate({}, 10, fixed=10) == {}
    with pytest.raises(BudgetError, match="no layer at all"):
        allocate({}, 9, fixed=10)


@pytest.mark.parametrize(
    ("value", "bound"), [(0.5, 500), (1.0, 1000), (0.29, 290), (0.0005, 0), (1, 1), (1000, 1000), (0.9999, 999)]
)
def test_bounds_are_shares_or_counts_and_rounded_down(value, bound):
    assert resolve_bound(value, 1000, "flops") == bound


@pytest.mark.parametrize("value", [True, False, 0, 0.0, -1, -0.5, 1.5, 1001, math.nan, math.inf, "0.5", None])
def test_bounds_out_of_range_are_named(value):
    with pytest.raises(OptionError, match=r"params: must be a float in \(0, 1\].*1 to 1,000"):
        resolve_bound(value, 1000, "params")
