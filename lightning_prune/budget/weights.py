"""Which single weights leave: exactly as many as asked for, the lowest scores first."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from lightning_prune.errors import BudgetError

Scope = Literal["global", "uniform", "erk"]


def count_to_remove(sparsity: float, entries: int) -> int:
    """Return how many of ``entries`` a sparsity removes, to the nearest integer; the decimal number counts as it is written.

    >>> count_to_remove(0.9, 714)
    643
    """
    return round(Fraction(repr(float(sparsity))) * entries)


def select_weights(
    scores: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    count: int,
    scope: Scope = "global",
    min_kept: int = 0,
    densities: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Return which entries stay, boolean, on the CPU.

    Exactly ``count`` entries are removed. Those that are gone already come first, then the lowest scores; among equal ones those that stand
    first, tensor by tensor in the order of ``scores``, row-major.

    Args:
        scores: Score per entry, by name, any shapes; higher = keep.
        kept: True where an entry has not been removed before, same shapes, boolean.
        count: How many entries are removed in all.
        scope: ``"global"``: one ranking. ``"uniform"``: the same share of every tensor. ``"erk"``: densities in proportion to the sum of a
            tensor's sizes over their product (Evci et al. 2020, arXiv:1911.11134, Erdos-Renyi-kernel), at most 1.
        min_kept: So many entries of every tensor stay at least, those with the highest scores.
        densities: Instead of a scope: shares that stay, by name, in proportion.

    Raises:
        BudgetError: If ``min_kept`` leaves too few that could be removed.

    >>> scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([1.0, 5.0])}
    >>> everything = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    >>> {name: mask.int().tolist() for name, mask in select_weights(scores, everything, 2).items()}
    {'a': [1, 0, 1], 'b': [0, 1]}
    """
    ranked = {name: _ranked(score, kept[name], min_kept) for name, score in scores.items()}
    free = sum(int((values < math.inf).sum()) for values in ranked.values())
    if count > free:
        total = sum(values.numel() for values in ranked.values())
        raise BudgetError(
            f"{count:,} of {total:,} weights shall go, but min_kept={min_kept} lets at most {free:,} of them. Lower the sparsity or min_kept."
        )
    if scope == "global" and densities is None:
        stays = _all_but_lowest(torch.cat([values.reshape(-1) for values in ranked.values()]), count)
        parts = torch.split(stays, [values.numel() for values in ranked.values()])
        return {name: part.view(scores[name].shape) for name, part in zip(ranked, parts, strict=True)}
    shares = [_density(name, score, scope, densities) for name, score in scores.items()]
    least = [int((values == -math.inf).sum()) for values in ranked.values()]
    most = [int((values < math.inf).sum()) for values in ranked.values()]
    quotas = _quotas([values.numel() for values in ranked.values()], shares, least, most, count)
    return {
        name: _all_but_lowest(values.reshape(-1), quota).view(values.shape)
        for (name, values), quota in zip(ranked.items(), quotas, strict=True)
    }


def _ranked(score: Tensor, kept: Tensor, min_kept: int) -> Tensor:
    """Return the scores in float64 on the CPU, the same on every machine: -inf where an entry is gone, inf where it must stay."""
    values = score.detach().cpu().double().masked_fill(~kept.cpu(), -math.inf)
    if min_kept > 0:
        flat = values.reshape(-1)
        best = flat.topk(min(min_kept, flat.numel())).indices
        flat[best[flat[best] > -math.inf]] = math.inf
        values = flat.view(score.shape)
    return values


def _all_but_lowest(values: Tensor, count: int) -> Tensor:
    """Return False for the ``count`` lowest of a flat tensor, of equal ones the first."""
    if count == 0:
        return torch.ones_like(values, dtype=torch.bool)
    threshold = values.kthvalue(count).values
    below, equal = values < threshold, values == threshold
    missing = count - int(below.sum())
    return ~(below | (equal & (equal.cumsum(0) <= missing)))


def _density(name: str, score: Tensor, scope: Scope, densities: Mapping[str, float] | None) -> float:
    if densities is not None:
        return densities[name]
    return sum(score.shape) / score.numel() if scope == "erk" else 1.0


def _quotas(
    sizes: Sequence[int], shares: Sequence[float], least: Sequence[int], most: Sequence[int], count: int
) -> list[int]:
    """Return how many entries leave of each tensor: densities in proportion to ``shares``, within bounds, ``count`` in all.

    The common factor is found by bisection; what rounding down leaves over goes to the largest remainders.
    """

    def removed(factor: float) -> list[float]:
        wanted = (size * (1 - min(1.0, factor * share)) for size, share in zip(sizes, shares, strict=True))
        return [min(max(w, low), high) for w, low, high in zip(wanted, least, most, strict=True)]

    low, high = 0.0, 1.0 / min((share for share in shares if share > 0), default=1.0)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(removed(middle)) > count else (low, middle)
    exact = removed(low)
    quotas = [math.floor(value + 1e-9) for value in exact]
    order = sorted(range(len(sizes)), key=lambda i: (quotas[i] - exact[i], i))
    while (rest := count - sum(quotas)) != 0:
        step = 1 if rest > 0 else -1
        for i in order if rest > 0 else reversed(order):
            if rest != 0 and (quotas[i] < most[i] if step > 0 else quotas[i] > least[i]):
                quotas[i] += step
                rest -= step
    return quotas
