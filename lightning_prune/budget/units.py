"""From the scores of units to the units that stay under a bound.

The blocks of all groups are put into one order that does not depend on the bound (:mod:`lightning_prune.budget.order`). Removal follows it
and stops at the first block that suffices. So the bound is never exceeded, at most one aligned block more than needed leaves, and plans
are nested: a lower bound keeps a subset.
"""

import bisect
import difflib
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_prune.budget.order import Order, UnitGroup, removal_order
from lightning_prune.budget.ties import Tie
from lightning_prune.errors import BudgetError, ModelError, OptionError
from lightning_prune.structure.alignment import alignment_unit

__all__ = ["Scope", "Tie", "UnitGroup", "choose_units"]

Kept = NDArray[np.bool_]
Scope = Literal["global", "uniform"] | Mapping[str, float]
_NAMED = 5  # binding groups that an error names


def choose_units(
    groups: Sequence[UnitGroup],
    scores: NDArray[np.float64],
    cost: Callable[[Kept], int],
    bound: int | None,
    *,
    ties: Sequence[Tie] = (),
    align: int = 8,
    min_channels: int = 1,
    scope: Scope = "global",
    name: str = "flops",
) -> Kept:
    """Choose the units that stay.

    Args:
        groups: Groups of units. Units of none stay.
        scores: Score of every unit, higher = keep, ``[units]``; not read where a group is no candidate.
        cost: Total cost of the model when the units stay that a bool ``[units]`` names; removing units never raises it.
            Called about ``log2`` of the number of blocks times.
        bound: What the total may cost at most. None if ``scope`` gives shares, and only then.
        ties: Blocks of unit ids of which equally many must leave. Partners of units that cannot leave stay, too.
        align: Channels kept of a group that loses any are a multiple of it; details and exceptions in
            :func:`lightning_prune.budget.order.removal_order`.
        min_channels: At least so many channels of a group stay, and at least one aligned block.
        scope: ``"global"``: the lowest mean score of a block goes first. ``"uniform"``: the same share of every pool goes.
            Or the shares of their channels that groups keep at most, by glob over the names of candidates, the last that
            matches holding; other groups stay whole. Groups that shrink together may end below their share.
        name: What is bounded, for messages: ``"flops"``, ``"params"`` or ``"sparsity"``.

    Returns:
        Whether a unit stays, bool ``[units]``. All stay if the bound is met already. The order of ``groups`` and of the
        units inside them does not matter.

    Raises:
        BudgetError: If the bound or a share cannot be met; names the groups that bind. Also if nothing can leave at all:
            callers that know why say so before.
        ModelError: If a score of a candidate is not finite.
        OptionError: If ``align``, ``min_channels`` or ``scope`` is no such thing, or not exactly one of ``bound`` and shares
            is given.
    """
    scores = np.asarray(scores, dtype=np.float64)
    _check(groups, scores, align, min_channels)
    shares = _shares(groups, scope)
    if (bound is None) != (shares is not None):
        raise OptionError(f"scope: takes either a bound or shares by name, got {name}={bound!r} and scope={scope!r}.")
    if shares is not None:
        groups = [replace(group, candidate=index in shares) for index, group in enumerate(groups)]
    order = removal_order(groups, scores, ties, align=align, min_channels=min_channels, by_share=scope == "uniform")
    if bound is None:
        return _within_shares(groups, order, shares or {})
    return _within_bound(groups, order, cost, bound, name)


def _check(groups: Sequence[UnitGroup], scores: NDArray[np.float64], align: int, min_channels: int) -> None:
    alignment_unit(align, 0)
    if isinstance(min_channels, bool) or not isinstance(min_channels, int) or min_channels < 1:
        raise OptionError(f"min_channels: must be an integer of at least 1, got {min_channels!r}.")
    units = np.concatenate([np.empty(0, np.int64), *(group.units for group in groups)])
    if np.unique(units).size != units.size:
        raise ValueError("groups: a unit belongs to one group, and stands there once")
    for group in groups:
        wrong = int((~np.isfinite(scores[group.units])).sum()) if group.candidate else 0
        if wrong:
            raise ModelError(
                f"Group {group.name!r}: the scores of {wrong} of its {group.units.size} units are not finite. "
                "Lower the learning rate or start from a sound checkpoint."
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_written(share: float) -> Fraction:
    """Return the decimal fraction that a user wrote: 0.29 of 100 is 29, not 28.99..."""
    return Fraction(repr(float(share)))


def _shares(groups: Sequence[UnitGroup], scope: Scope) -> dict[int, float] | None:
    """Read the shares of channels that groups keep at most, by index of the group; None if the scope gives none."""
    if isinstance(scope, str) and scope in ("global", "uniform"):
        return None
    if not isinstance(scope, Mapping) or not scope:
        raise OptionError(f"scope: must be 'global', 'uniform' or shares of channels by name, got {scope!r}.")
    names = {index: group.name for index, group in enumerate(groups) if group.candidate}
    shares: dict[int, float] = {}
    for pattern, share in scope.items():
        if not _is_number(share) or not 0 < share <= 1:
            raise OptionError(
                f"scope: {pattern!r} must keep a share of its channels in (0, 1], got {share!r}. For half of them write 0.5."
            )
        hits = [index for index, name in names.items() if fnmatch.fnmatchcase(name, str(pattern))]
        if not hits:
            close = difflib.get_close_matches(str(pattern), names.values(), n=3, cutoff=0.5)
            known = ", ".join(map(repr, close or [*names.values()][:_NAMED])) or "none"
            raise OptionError(f"scope: {pattern!r} matches no group that can shrink. Among these are: {known}.")
        shares |= dict.fromkeys(hits, float(share))
    return shares


def _within_bound(
    groups: Sequence[UnitGroup], order: Order, cost: Callable[[Kept], int], bound: int, name: str
) -> Kept:
    """Remove the fewest blocks that suffice; ``order.place >= n`` is what stays after ``n`` blocks."""
    smallest = order.place >= order.length
    least = cost(smallest)
    if least > bound:
        raise _cannot_be_met(groups, smallest, bound, least, cost(np.ones_like(smallest)), name)
    steps = range(order.length)  # after all of them the bound is met
    return order.place >= bisect.bisect_left(steps, True, key=lambda step: cost(order.place >= step) <= bound)


def _within_shares(groups: Sequence[UnitGroup], order: Order, shares: Mapping[int, float]) -> Kept:
    """Remove of every group the fewest blocks that suffice for its own share."""
    gone = np.zeros(order.length + 1, dtype=bool)
    for group, share in [(groups[index], share) for index, share in shares.items()]:
        bound = math.floor(_as_written(share) * group.channels)
        taken = order.channels_taken(group)
        left = group.channels - np.concatenate([[0], np.cumsum(taken)])  # after 0, 1, ... blocks
        if left[-1] > bound:
            raise BudgetError(
                f"scope: group {group.name!r} is to keep at most {bound:,} of its {group.channels:,} channels, but "
                f"{left[-1]:,} is the least that can be reached. Raise its share, lower align or min_channels, or give "
                "shares to the groups that shrink together with it as well."
            )
        enough = int(np.argmax(left <= bound))
        gone[:enough] |= taken[:enough] > 0
    return ~gone[order.place]


def _cannot_be_met(
    groups: Sequence[UnitGroup], smallest: Kept, bound: int, least: int, dense: int, name: str
) -> BudgetError:
    counts = {index: int(smallest[group.units].sum()) for index, group in enumerate(groups) if group.candidate}
    binding = sorted(counts, key=lambda index: -counts[index] * groups[index].width)
    shown = [
        f"{groups[index].name!r} ({counts[index]:,} of {groups[index].units.size:,} units)"
        for index in binding[:_NAMED]
    ]
    others = f" and {len(binding) - _NAMED} more" if len(binding) > _NAMED else ""
    share = math.ceil(least / dense * 1e4) / 1e4
    return BudgetError(
        f"{name}: at most {bound:,}{' channels' if name == 'sparsity' else ''} asked for, but {least:,} is the least that "
        f"can be reached ({share} of the {dense:,} that the model has now). Bound by {', '.join(shown) or 'no group at all'}"
        f"{others}, each at its smallest. "
        f"{'Lower' if name == 'sparsity' else 'Raise'} {name}, lower align or min_channels, or include more layers."
    )
