"""Ladders of directions against all forms tried one by one."""

import itertools

import pytest
import torch

from lightning_prune.budget.directions import Kept, direction_choices
from lightning_prune.budget.ranks import Choice, allocate


def price(kept: Kept) -> int:
    """Cost of a 3x3 convolution 12 -> 8 with rotations where directions leave."""
    inputs, outputs = kept.inputs or 12, kept.outputs or 8
    rotations = (12 * inputs if kept.inputs else 0) + (8 * outputs if kept.outputs else 0)
    return 9 * inputs * outputs + rotations


def ladder(seed=0, sides=("inputs", "outputs", "both"), limit=0.95, align=1, price=price):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(n, generator=generator, dtype=torch.float64).sort(descending=True).values for n in (12, 8)]
    return scores, direction_choices(*scores, price, 9 * 12 * 8, sides, limit, align)


def forms(scores, sides, threshold):
    """Return what each form would keep and lose at a threshold."""
    counts = [max(1, int((side > threshold).sum())) for side in scores]
    lost = [float(side[count]) if count < len(side) else 0.0 for side, count in zip(scores, counts, strict=True)]
    every = {
        "inputs": (Kept(counts[0], None), lost[0]),
        "outputs": (Kept(None, counts[1]), lost[1]),
        "both": (Kept(*counts), max(lost)),
    }
    return [every[side] for side in sides]


@pytest.mark.parametrize("sides", [("inputs",), ("outputs",), ("both",), ("inputs", "outputs", "both")])
@pytest.mark.parametrize("seed", range(3))
def test_no_form_at_any_threshold_is_cheaper_at_no_more_loss(seed, sides):
    scores, choices = ladder(seed, sides)
    for threshold in torch.cat(scores).tolist():
        cheapest = min((price(kept) for kept, _ in forms(scores, sides, threshold)), default=None)
        offered = min(choice.cost for choice in choices if choice.loss <= threshold)
        assert offered <= min(cheapest, 9 * 12 * 8)


def test_cost_rises_and_loss_falls_up_to_the_dense_layer():
    choices = ladder()[1]
    for low, high in itertools.pairwise(choices):
        assert low.cost < high.cost
        assert low.loss > high.loss
    assert choices[-1] == Choice(None, 0.0, 9 * 12 * 8)


def test_the_loss_is_the_largest_score_that_leaves():
    scores, choices = ladder()
    for choice in choices[:-1]:
        lost = [side[n:] for side, n in zip(scores, choice.size, strict=True) if n is not None]
        assert choice.loss == max(float(side.max()) if len(side) else 0.0 for side in lost)


def test_at_most_the_limit_leaves_of_either_side_and_one_stays():
    for limit, least in ((0.5, (6, 4)), (0.95, (1, 1)), (0.75, (3, 2))):
        sizes = [choice.size for choice in ladder(limit=limit)[1][:-1]]
        assert all(n is None or n >= bound for size in sizes for n, bound in zip(size, least, strict=True))
        assert {size.inputs for size in sizes} & {least[0]}


def test_numbers_that_stay_are_aligned():
    for choice in ladder(align=4)[1][:-1]:
        assert all(n is None or n % 4 == 0 for n in choice.size)


def test_a_form_that_is_dearer_than_the_layer_is_not_offered():
    assert ladder(price=lambda kept: None)[1] == (Choice(None, 0.0, 864),)
    assert all(choice.cost < 864 for choice in ladder()[1][:-1])


def test_directions_without_score_leave_first_and_for_nothing():
    scores = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([2.0, 0.0])
    choices = direction_choices(
        *scores, lambda kept: 10 * ((kept.inputs or 4) + (kept.outputs or 2)), 100, ["both"], 0.95
    )
    assert choices[-2] == Choice(Kept(2, 1), 0.0, 30)
    assert allocate({"layer": choices}, 60) == {"layer": Kept(2, 1)}
