"""Exactly as many weights leave as asked for, the lowest first, ties in order, whatever the scope."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.budget.weights import count_to_remove, select_weights
from lightning_prune.errors import BudgetError

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 3, 2)}


def problem(seed, values=1000):
    """Scores with ties, some entries gone."""
    rng = np.random.default_rng(seed)
    scores = {k: torch.from_numpy(rng.integers(0, values, s).astype(np.float64)) for k, s in SHAPES.items()}
    kept = {k: torch.from_numpy(rng.random(s) > 0.2) for k, s in SHAPES.items()}
    return scores, kept


def flat(tensors):
    return np.concatenate([t.numpy().reshape(-1) for t in tensors.values()])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([3, 1000]), st.floats(0, 1))
def test_global_removes_what_a_stable_sort_puts_first(seed, values, share):
    scores, kept = problem(seed, values)
    gone = int((~flat(kept)).sum())
    count = gone + round(share * (29 - gone))
    order = np.argsort(np.where(flat(kept), flat(scores), -1.0), kind="stable")
    expected = np.ones(29, bool)
    expected[order[:count]] = False
    assert (flat(select_weights(scores, kept, count)) == expected).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from(["global", "uniform", "erk"]), st.integers(0, 2))
def test_every_scope_removes_the_exact_number_of_the_lowest_of_each_tensor(seed, share, scope, least):
    scores, kept = problem(seed, 3)
    gone = int((~flat(kept)).sum())
    most = sum(t.numel() - min(least, int(kept[k].sum())) for k, t in scores.items())
    count = gone + round(share * max(0, most - gone))
    found = select_weights(scores, kept, count, scope, min_kept=least)
    assert (~flat(found)).sum() == count
    for name, stays in found.items():
        assert not (stays & ~kept[name]).any()
        assert int(stays.sum()) >= min(least, int(kept[name].sum()))
        values = torch.where(kept[name], scores[name], -torch.ones(()).double())
        if stays.any() and (~stays).any():
            assert values[~stays].max() <= values[stays].min()


def test_uniform_takes_the_same_share_of_every_tensor_and_erk_less_of_small_ones():
    scores = {"big": torch.rand(40, 50), "small": torch.rand(10, 4)}
    kept = {k: torch.ones_like(s, dtype=torch.bool) for k, s in scores.items()}
    uniform = select_weights(scores, kept, 1530, "uniform")
    assert [int((~m).sum()) for m in uniform.values()] == [1500, 30]
    erk = select_weights(scores, kept, 1530, "erk")
    # densities in proportion to 90 / 2000 and 14 / 40, the small tensor's no more than 1: 510 stay
    factor = 510 / (90 + 14)
    assert factor * 14 / 40 > 1
    assert [int(m.sum()) for m in erk.values()] == [470, 40]


def test_densities_of_another_method_are_taken_over():
    scores = {"a": torch.rand(10, 10), "b": torch.rand(10, 10)}
    kept = {k: torch.ones_like(s, dtype=torch.bool) for k, s in scores.items()}
    same = select_weights(scores, kept, 110, densities={"a": 0.7, "b": 0.2})
    assert [int(m.sum()) for m in same.values()] == [70, 20]
    halved = select_weights(scores, kept, 155, densities={"a": 0.7, "b": 0.2})
    assert [int(m.sum()) for m in halved.values()] == [35, 10]


def test_what_must_stay_and_what_must_go_cannot_both_be_had():
    scores, kept = problem(0)
    with pytest.raises(BudgetError, match=r"29 of 29 weights shall go, but min_kept=1 lets at most 26"):
        select_weights(scores, kept, 29, min_kept=1)


@pytest.mark.parametrize(("sparsity", "entries", "count"), [(0.29, 100, 29), (0.9, 714, 643), (0.1, 30, 3), (0, 9, 0)])
def test_counts_are_those_of_the_decimal_number_as_written(sparsity, entries, count):
    assert count_to_remove(sparsity, entries) == count
    assert math.isclose(count, sparsity * entries, abs_tol=0.5)
