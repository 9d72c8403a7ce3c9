"""From one bound on a model's cost to what stays of every layer: ranks by ladders, units by one order of removal."""

from lightning_prune.budget.bounds import resolve_bound
from lightning_prune.budget.ranks import Choice, allocate, rank_choices

__all__ = ["Choice", "allocate", "rank_choices", "resolve_bound"]
