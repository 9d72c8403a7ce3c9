"""Random units with ties, and a naive twin of their removal: loops over units, sets and exact fractions."""

import math
from fractions import Fraction

import numpy as np

from lightning_prune.budget.units import UnitGroup, choose_units
from lightning_prune.errors import BudgetError
from lightning_prune.structure.alignment import alignment_unit

EXACT = math.lcm(*range(1, 17))  # means of up to 16 multiples of it are integers: equal means are equal in float64


def random_case(seed, tied=True):
    """Groups of several widths, scores with many equal ones, ties that overlap, and a cost that every unit adds to."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 40, rng.integers(1, 7))
    parts = np.split(rng.permutation(sizes.sum() + 3), np.cumsum(sizes))  # three units belong to no group
    groups = [
        UnitGroup(f"layer{index}", part, int(rng.choice([1, 1, 1, 2, 3, 4, 8])), bool(rng.random() < 0.85))
        for index, part in enumerate(parts[:-1])
    ]
    scores = rng.integers(0, 12, sizes.sum() + 3) * float(EXACT)
    for group in groups:
        if not group.candidate:
            scores[group.units] = math.nan
    ties = [random_tie(rng, groups) for _ in range(rng.integers(0, 4))] if tied else []
    return groups, scores, ties, random_cost(rng, groups)


def random_tie(rng, groups):
    kind = rng.integers(4)
    if kind == 0:  # parts of one group
        units = groups[rng.integers(len(groups))].units
        blocks = int(rng.integers(1, 4))
        return np.split(units[: len(units) // blocks * blocks], blocks)
    chosen = [groups[index].units for index in rng.choice(len(groups), min(len(groups), 1 + int(kind)), replace=False)]
    if kind == 3:  # halves of a mixture of groups
        units = rng.permutation(np.concatenate(chosen))
        return [units[: len(units) // 2], units[len(units) // 2 : len(units) // 2 * 2]]
    length = min(map(len, chosen))  # layers, whole or in part
    return [rng.permutation(units)[:length] for units in chosen]


def random_cost(rng, groups):
    linear, joint = rng.integers(1, 9, len(groups)), rng.integers(0, 5, (len(groups), len(groups)))

    def cost(kept):
        counts = np.array([kept[group.units].sum() for group in groups])
        return int(linear @ counts + counts @ joint @ counts) + 7

    return cost


def ladder(groups, scores, cost, **options):
    """Every plan there is, the whole model first: ask for one less than the last cost until that cannot be met."""
    plans = [choose_units(groups, scores, cost, 10**9, **options)]
    while True:
        try:
            plans.append(choose_units(groups, scores, cost, cost(plans[-1]) - 1, **options))
        except BudgetError:
            return plans


def channels(groups, kept):
    return [int(kept[group.units].sum()) * group.width for group in groups]


def twin_composites(ties, scores):
    by_score = [len({u for block in tie for u in block}) == sum(map(len, tie)) for tie in ties]
    while True:
        classes = {unit: {unit} for unit in range(len(scores))}
        for tie, free in zip(ties, by_score, strict=True):
            blocks = [sorted(block, key=lambda u: (scores[u], u)) if free else list(block) for block in tie]
            for column in zip(*blocks, strict=True):
                united = set().union(*(classes[unit] for unit in column))
                classes |= dict.fromkeys(united, united)
        chained = [
            free and any(len(classes[u] & set(block.tolist())) > 1 for block in tie for u in block)
            for tie, free in zip(ties, by_score, strict=True)
        ]
        if not any(chained):
            return {frozenset(members) for members in classes.values()}
        by_score = [free and not chain for free, chain in zip(by_score, chained, strict=True)]


def twin_stops(count, parts, align, min_channels):
    """How many of a pool's composites may be gone; parts: (channels of the whole, taken by each, has a floor)."""
    while True:
        units = [alignment_unit(align, whole) for whole, _, _ in parts]
        aligned = [
            gone
            for gone in range(1, count + 1)
            if all((whole - gone * taken) % unit == 0 for (whole, taken, _), unit in zip(parts, units, strict=True))
            and all(whole > gone * taken for whole, taken, floored in parts if floored)
        ]
        if aligned or align == 1:
            return [
                gone
                for gone in aligned
                if all(w - gone * taken >= min_channels for w, taken, floored in parts if floored)
            ]
        align //= 2


def twin_blocks(groups, scores, ties, align, min_channels, scope):
    """The sets of units that leave, one after the other."""
    home = {int(unit): group.name for group in groups if group.candidate for unit in group.units}
    named = {group.name: group for group in groups}
    pools = {}
    for composite in twin_composites(ties, [s if u in home else math.inf for u, s in enumerate(scores.tolist())]):
        if composite <= home.keys():
            pools.setdefault(tuple(sorted(home[unit] for unit in composite)), []).append(composite)
    many = {name for name in named if sum(name in kind for kind in pools) > 1}
    blocks = []
    for kind, composites in pools.items():
        mean = {members: sum(Fraction(scores[u]) for u in members) / len(members) for members in composites}
        composites.sort(key=lambda members: (mean[members], min(members)))
        taken = {name: kind.count(name) * named[name].width for name in kind}
        wholes = {name: len(composites) * taken[name] if name in many else named[name].channels for name in taken}
        parts = [(wholes[name], taken[name], name not in many) for name in taken]
        stops = twin_stops(len(composites), parts, align, min_channels)
        for start, stop in zip([0, *stops], stops, strict=False):
            score = sum(mean[members] for members in composites[start:stop]) / (stop - start)
            key = score if scope == "global" else Fraction(stop, len(composites))
            blocks.append((key, min(map(min, composites)), stop, kind, set().union(*composites[start:stop])))
    left, full, order = {name: named[name].channels for name in many}, set(), []
    for *_, kind, units in sorted(blocks, key=lambda block: block[:3]):
        after = {
            name: left[name] - named[name].width * sum(home[u] == name for u in units) for name in many & set(kind)
        }
        floors = {name: max(min_channels, alignment_unit(align, named[name].channels)) for name in after}
        if kind in full or any(after[name] < floors[name] for name in after):
            full.add(kind)
        else:
            left |= after
            order.append(sorted(units))
    return order


def channels_kept(groups):
    """Make the cost that a sparsity bounds: the number of channels that candidates keep.

    >>> group = UnitGroup("conv", np.array([0, 2]), width=4)
    >>> channels_kept([group])(np.array([True, True, False]))
    4
    """
    candidates = [group for group in groups if group.candidate]
    units = np.concatenate([np.empty(0, np.int64), *(group.units for group in candidates)])
    widths = np.concatenate([np.empty(0, np.int64), *(np.full(group.units.size, group.width) for group in candidates)])
    return lambda kept: int(widths @ kept[units])
