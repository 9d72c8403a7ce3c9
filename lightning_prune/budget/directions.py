"""Ladders of layers whose input and output directions can leave: how many stay on either side, what is lost, what it costs."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_prune.budget.ranks import Choice
from lightning_prune.structure.alignment import alignment_unit


class Kept(NamedTuple):
    """How many directions of a layer stay.

    Attributes:
        inputs: Of its inputs; None: they are left as they are.
        outputs: Of its outputs, likewise.
    """

    inputs: int | None
    outputs: int | None

    def __str__(self) -> str:
        return f"{self.inputs or 'all'} in, {self.outputs or 'all'} out"


Price = Callable[[Kept], int | None]


def direction_choices(
    inputs: Tensor, outputs: Tensor, price: Price, dense: int, sides: Sequence[str], limit: float, align: int = 1
) -> tuple[Choice, ...]:
    """Make the ladder of one layer from one threshold on the scores of both sides.

    Args:
        inputs: Scores of the directions of its inputs, descending, at least 0, ``[n_in]``.
        outputs: Of its outputs, ``[n_out]``.
        price: Cost of a form; None if that form is not cheaper than the layer is in every respect.
        dense: Cost of the layer as it is.
        sides: Forms on offer, of ``"inputs"``, ``"outputs"`` and ``"both"``. The cheapest is taken at every threshold, and loses on its sides only.
        limit: Share of the directions of a side that may leave at most, in (0, 1); one always stays.
        align: Numbers that stay are multiples of it, by :func:`lightning_prune.structure.alignment.alignment_unit`.

    Returns:
        Forms, cost rising and loss falling, then the layer as it is. The loss is the largest score that leaves.
    """
    ladders = [_counts(side, limit, align) for side in (inputs.tolist(), outputs.tolist())]
    found: list[Choice] = []
    for threshold in sorted({0.0, *inputs.tolist(), *outputs.tolist()}):
        left, right = (ladder(threshold) for ladder in ladders)
        offers = []
        for kept in _forms(sides, left[0], right[0], len(inputs), len(outputs)):
            cost = price(kept)
            if cost is not None and cost < dense:
                loss = max(left[1] if kept.inputs is not None else 0.0, right[1] if kept.outputs is not None else 0.0)
                offers.append(Choice(kept, loss, cost))
        if offers:
            found.append(min(offers, key=lambda choice: (choice.cost, choice.loss)))
    best: list[Choice] = []
    for choice in sorted(found, key=lambda choice: (choice.cost, choice.loss)):
        if not best or (choice.loss < best[-1].loss and choice.cost > best[-1].cost):
            best.append(choice)
    return (*best, Choice(None, 0.0, dense))


def _forms(sides: Sequence[str], inputs: int, outputs: int, most_in: int, most_out: int) -> Iterator[Kept]:
    if "inputs" in sides and inputs < most_in:
        yield Kept(inputs, None)
    if "outputs" in sides and outputs < most_out:
        yield Kept(None, outputs)
    if "both" in sides and (inputs < most_in or outputs < most_out):
        yield Kept(inputs, outputs)


def _counts(scores: Sequence[float], limit: float, align: int) -> Callable[[float], tuple[int, float]]:
    """Return a function from a threshold to how many directions stay, and the largest score that leaves."""
    total = len(scores)
    least = max(1, total - math.floor(total * limit))
    unit = alignment_unit(align, total)

    def counted(threshold: float) -> tuple[int, float]:
        above = sum(score > threshold for score in scores)
        stays = min(total, -(-max(least, above) // unit) * unit)
        return stays, scores[stays] if stays < total else 0.0

    return counted
