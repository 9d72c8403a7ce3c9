"""From one bound on a model's cost to the size of every layer.

Every layer offers a ladder of choices, from small and lossy to the dense layer itself. One threshold on the loss,
common to all layers, picks from every ladder the cheapest choice that does not exceed it; the lowest threshold whose
total stays under the bound is taken, and what is left of the bound then buys single steps, the most loss avoided per
cost first. The bound is never exceeded, and in the end no step that avoids any loss fits any more.

For ranks the loss is the relative lost energy of :func:`lightning_prune.structure.spectrum.lost_energy`; other
methods bring ladders of their own.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_prune.errors import BudgetError
from lightning_prune.structure.alignment import alignment_unit
from lightning_prune.structure.spectrum import lost_energy

_NO_LOSS = 1e-12  # relative energy that a float64 Gram matrix cannot tell from zero
_NAMED = 5  # binding layers that an error names


@dataclasses.dataclass(frozen=True)
class Choice:
    """One size of one layer.

    Attributes:
        size: What the method makes of it: a rank, numbers of directions. ``None`` is the dense layer.
        loss: What is lost against the dense layer, at least 0, comparable between layers; for ranks a share of the
            energy, no unit.
        cost: Multiply-adds or parameters, whichever is bounded.
    """

    size: Any
    loss: float
    cost: int


def rank_choices(
    values: Tensor, cost: Callable[[int], int], dense: int, limit: int, align: int = 1
) -> tuple[Choice, ...]:
    """Make the ladder of one layer whose rank is to be chosen.

    Args:
        values: Singular values, descending, ``[groups, n]``.
        cost: Cost of the factorized layer at a rank, rising with it.
        dense: Cost of the dense layer.
        limit: Largest useful rank, below which the factorized layer is cheaper in every respect; 0 if there is none.
        align: Ranks offered are multiples of it, by :func:`lightning_prune.structure.alignment.alignment_unit`.

    Returns:
        Ranks, ascending, whose cost is below ``dense``, then the dense layer. Ranks above the first that loses
        nothing are not offered.

    Raises:
        OptionError: If ``align`` is no integer of at least 1.
    """
    unit = alignment_unit(align, limit)
    losses = [loss if loss > _NO_LOSS else 0.0 for loss in lost_energy(values).tolist()]
    choices = []
    for rank in range(unit, min(limit, len(losses)) + 1, unit):
        choice = Choice(rank, losses[rank - 1], cost(rank))
        if choice.cost >= dense:
            break
        choices.append(choice)
        if choice.loss == 0:
            break
    return (*choices, Choice(None, 0.0, dense))


def allocate(
    ladders: Mapping[str, Sequence[Choice]], bound: int, *, fixed: int = 0, name: str = "flops"
) -> dict[str, Any]:
    """Choose a size for every layer so that the total cost stays within a bound.

    Args:
        ladders: Choices by layer, cost strictly rising and loss never rising.
        bound: What the total may cost at most.
        fixed: Cost of everything that has no ladder.
        name: What is bounded, for the message.

    Returns:
        The chosen size by layer. The total never exceeds the bound, the largest loss is the smallest possible under it
        (so it never rises with the bound), and no single step up any ladder that avoids loss would still fit.

    Raises:
        BudgetError: If even the smallest choices cost more than ``bound``; names the layers that bind.
    """
    room = bound - fixed
    if not ladders and room >= 0:
        return {}
    if sum(ladder[0].cost for ladder in ladders.values()) > room:
        raise _cannot_be_met(ladders, bound, fixed, name)
    thresholds = sorted({choice.loss for ladder in ladders.values() for choice in ladder})
    tightest = bisect.bisect_left(thresholds, True, key=lambda loss: _total(ladders, _at(ladders, loss)) <= room)
    chosen = _at(ladders, thresholds[tightest])  # the last threshold always fits: it picks the first choices
    _spend(ladders, chosen, room)
    return {layer: ladders[layer][index].size for layer, index in chosen.items()}


def _at(ladders: Mapping[str, Sequence[Choice]], threshold: float) -> dict[str, int]:
    """Index of the cheapest choice of every layer that loses no more than the threshold."""
    return {
        layer: next(index for index, choice in enumerate(ladder) if choice.loss <= threshold)
        for layer, ladder in ladders.items()
    }


def _total(ladders: Mapping[str, Sequence[Choice]], chosen: Mapping[str, int]) -> int:
    return sum(ladders[layer][index].cost for layer, index in chosen.items())


def _spend(ladders: Mapping[str, Sequence[Choice]], chosen: dict[str, int], room: int) -> None:
    """Take single steps up the ladders while one fits, the most loss avoided per cost first; changes ``chosen``."""
    left = room - _total(ladders, chosen)
    while True:
        steps = []
        for layer, index in chosen.items():
            here, *above = ladders[layer][index : index + 2]
            if above and above[0].cost - here.cost <= left and here.loss > above[0].loss:
                steps.append(((here.loss - above[0].loss) / (above[0].cost - here.cost), layer))
        if not steps:
            return
        _, layer = max(steps, key=lambda step: step[0])
        left -= ladders[layer][chosen[layer] + 1].cost - ladders[layer][chosen[layer]].cost
        chosen[layer] += 1


def _cannot_be_met(ladders: Mapping[str, Sequence[Choice]], bound: int, fixed: int, name: str) -> BudgetError:
    least = fixed + sum(ladder[0].cost for ladder in ladders.values())
    dense = fixed + sum(ladder[-1].cost for ladder in ladders.values())
    binding = sorted(ladders.items(), key=lambda item: -item[1][0].cost)
    shown = [
        f"{layer!r} ({'dense' if ladder[0].size is None else ladder[0].size}: {ladder[0].cost:,})"
        for layer, ladder in binding[:_NAMED]
    ]
    others = f" and {len(binding) - _NAMED} more" if len(binding) > _NAMED else ""
    share = math.ceil(least / dense * 1e4) / 1e4
    return BudgetError(
        f"{name}: at most {bound:,} asked for, but {least:,} is the least that can be reached ({share} of the "
        f"{dense:,} that the model has now). Bound by {', '.join(shown) or 'no layer at all'}{others}, each at its smallest, and {fixed:,} "
        f"outside of the layers chosen, factorized ones among it. Raise {name}, lower align where there is one, or include more layers."
    )
