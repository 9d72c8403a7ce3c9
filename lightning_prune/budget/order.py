"""One order of removal over all units, cut into aligned blocks.

Units that leave together or in equal numbers are one composite unit, with the mean of their scores
(:mod:`lightning_prune.budget.ties`). Composite units that take equally many units of the same groups form a *pool*; mostly a pool is a
group, or the groups that a tie connects one to one. A pool is cut, lowest score first, into blocks after each of which the channels left
of its groups are a multiple of the alignment. The first block takes what is over. Blocks of all pools are merged by one key.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_prune.budget.ties import Tie, composite_units
from lightning_prune.structure.alignment import alignment_unit


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units that are slices of the same axes of the same tensors.

    Attributes:
        name: What messages call it and globs match.
        units: Ids, int64 ``[n]``; a unit belongs to one group at most.
        width: Channels per unit on the axis that alignment is about, at least 1.
        candidate: Whether its units may leave.
    """

    name: str
    units: NDArray[np.int64]
    width: int
    candidate: bool = True

    @property
    def channels(self) -> int:
        """Channels of all its units."""
        return int(self.units.size) * self.width


class Order(NamedTuple):
    """Blocks of units in the order of their removal.

    Attributes:
        place: Number of the block that takes a unit, int64 ``[units]``; ``length`` for units that always stay.
        length: Number of blocks.
    """

    place: NDArray[np.int64]
    length: int

    def channels_taken(self, group: UnitGroup) -> NDArray[np.int64]:
        """Return how many channels of a group every block takes, int64 ``[length]``."""
        return np.bincount(self.place[group.units], minlength=self.length + 1)[: self.length] * group.width


class _Pool(NamedTuple):
    """Composite units that take equally many units of the same groups, lowest score first.

    Attributes:
        units: int64 ``[n, m]``, a row per composite unit.
        scores: float64 ``[n]``, ascending.
        taken: Channels that one composite unit takes, by index of the group.
    """

    units: NDArray[np.int64]
    scores: NDArray[np.float64]
    taken: dict[int, int]


def removal_order(
    groups: Sequence[UnitGroup],
    scores: NDArray[np.float64],
    ties: Sequence[Tie],
    *,
    align: int,
    min_channels: int,
    by_share: bool,
) -> Order:
    """Put everything that may leave into one order.

    Args:
        groups: Groups of units. Units of none stay.
        scores: Score of every unit, higher = keep, float64 ``[units]``; finite for candidates.
        ties: Blocks of unit ids of which equally many must leave.
        align: What the channels left of a group are a multiple of after each block that takes some, by
            :func:`lightning_prune.structure.alignment.alignment_unit`; half of it, a quarter, ... where no number of units
            fits. If a group belongs to several pools, this holds for its part in each of them.
        min_channels: At least so many channels of a group, and at least one aligned block, are in no block.
        by_share: Order blocks by the share of their pool that is gone with them; else by the mean score of their units.

    Raises:
        OptionError: If ``align`` is no integer of at least 1.
    """
    pools = _pools(groups, scores, ties)
    pooled = np.bincount([index for pool in pools for index in pool.taken], minlength=len(groups))
    alone = {index: groups[index].channels for index in np.flatnonzero(pooled == 1).tolist()}
    ends = [_ends(pool, alone, align, min_channels) for pool in pools]
    keys = [
        end / len(pool.units) if by_share else _means(pool.scores, end) for pool, end in zip(pools, ends, strict=True)
    ]
    sizes = np.concatenate([np.empty(0, np.int64), *(np.diff(end, prepend=0) for end in ends)])
    owner = np.repeat(np.arange(len(pools)), [end.size for end in ends])
    merged = np.lexsort((owner, np.concatenate([np.empty(0), *keys])))  # stable: a pool's own blocks stay in order
    floors = {
        index: max(min_channels, alignment_unit(align, groups[index].channels))
        for index in np.flatnonzero(pooled > 1).tolist()
    }
    alive = _above_floors(groups, pools, owner[merged], sizes[merged], floors)
    length = int(alive.sum())
    numbers = np.empty_like(merged)
    numbers[merged] = np.where(alive, np.cumsum(alive) - 1, length)
    takers = np.split(np.repeat(numbers, sizes), np.cumsum([end.max(initial=0) for end in ends], dtype=np.int64))
    place = np.full(scores.size, length)
    for pool, taker in zip(pools, takers, strict=False):  # what np.split has left over is empty
        place[pool.units[: taker.size]] = taker[:, None]
    return Order(place, length)


def _pools(groups: Sequence[UnitGroup], scores: NDArray[np.float64], ties: Sequence[Tie]) -> list[_Pool]:
    """Sort the composite units that can leave into pools; pools come by their smallest unit."""
    owner = np.full(scores.size, -1)
    for index, group in enumerate(groups):
        if group.candidate:
            owner[group.units] = index
    labels = composite_units(ties, np.where(owner < 0, np.inf, scores))
    stays = np.zeros(scores.size, dtype=bool)
    stays[labels[owner < 0]] = True
    units = np.flatnonzero(~stays[labels])
    firsts, sizes = np.unique(labels[units], return_counts=True)
    sums = np.bincount(labels[units], scores[units], scores.size)[firsts]
    units = units[np.lexsort((units, owner[units], labels[units]))]
    starts = np.cumsum(sizes) - sizes
    pools = []
    for size in np.unique(sizes):
        alike = sizes == size
        rows = units[starts[alike][:, None] + np.arange(size)]  # [composites, size], sorted by group
        means = sums[alike] / size
        kinds, kind = np.unique(owner[rows], axis=0, return_inverse=True)
        kind = kind.ravel()  # NumPy 2.0 alone gives it a second axis
        ranked = np.split(np.lexsort((firsts[alike], means, kind)), np.cumsum(np.bincount(kind))[:-1])
        for owners, rank in zip(kinds, ranked, strict=True):
            indices, counts = np.unique(owners, return_counts=True)
            taken = {
                index: count * groups[index].width
                for index, count in zip(indices.tolist(), counts.tolist(), strict=True)
            }
            pools.append(_Pool(rows[rank], means[rank], taken))
    return sorted(pools, key=lambda pool: int(pool.units.min()))


def _ends(pool: _Pool, alone: dict[int, int], align: int, min_channels: int) -> NDArray[np.int64]:
    """Find how many composite units of a pool may be gone when a block ends, int64 ``[blocks]``, ascending.

    Args:
        pool: The pool.
        alone: Channels of the groups that belong to no other pool, by index. Of others the part in this pool is aligned
            and may go entirely; :func:`_above_floors` sees to the rest.
        align: As in :func:`removal_order`.
        min_channels: As in :func:`removal_order`.
    """
    count = len(pool.units)
    wholes = [alone.get(index, count * taken) for index, taken in pool.taken.items()]
    least = np.array([[index in alone] for index in pool.taken])
    left = np.array(wholes)[:, None] - np.outer(list(pool.taken.values()), np.arange(1, count + 1))  # [groups, count]
    while True:
        units = np.array([[alignment_unit(align, whole)] for whole in wholes])
        aligned = ((left % units == 0) & (left >= least * units)).all(axis=0)
        if aligned.any() or align == 1:
            return 1 + np.flatnonzero(aligned & (left >= least * min_channels).all(axis=0))
        align //= 2


def _means(scores: NDArray[np.float64], ends: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean score of every block, never falling: the mean of equal scores may differ from them in the last bit."""
    if not ends.size:
        return np.empty(0)
    sums = np.add.reduceat(scores[: ends[-1]], np.concatenate([[0], ends[:-1]]))
    return np.maximum.accumulate(sums / np.diff(ends, prepend=0))


def _above_floors(
    groups: Sequence[UnitGroup],
    pools: Sequence[_Pool],
    owner: NDArray[np.int64],
    sizes: NDArray[np.int64],
    floors: dict[int, int],
) -> NDArray[np.bool_]:
    """Drop the blocks that would take a group below its floor, and what comes after them in the same pool.

    Args:
        groups: All groups.
        pools: All pools.
        owner: The pool of every block in the order of removal, int64 ``[blocks]``.
        sizes: Composite units of every block, int64 ``[blocks]``.
        floors: Channels that stay at least, by index of the groups that belong to several pools; no block takes another
            group below its floor.

    Returns:
        Whether a block stays in the order, bool ``[blocks]``.
    """
    alive = np.ones(owner.size, dtype=bool)
    left = {index: groups[index].channels for index in floors}
    sharing = np.array([any(index in floors for index in pool.taken) for pool in pools], dtype=bool)
    for block in np.flatnonzero(sharing[owner]).tolist():
        pool, size = int(owner[block]), int(sizes[block])
        after = {index: left[index] - size * taken for index, taken in pools[pool].taken.items() if index in floors}
        if all(channels >= floors[index] for index, channels in after.items()):
            left |= after
        else:  # nor will later blocks of the pool fit: only its first one may be smaller
            alive[block] = False
    return alive
