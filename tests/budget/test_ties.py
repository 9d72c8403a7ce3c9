"""Ties as composite units: balanced whatever happens, by score where that is possible."""

import math

import numpy as np
import pytest
from unit_twin import channels, channels_kept, ladder, twin_composites

from lightning_prune.budget.ties import composite_units
from lightning_prune.budget.units import UnitGroup


def test_the_lowest_scores_of_every_block_leave_together():
    blocks = [np.array([0, 1, 2]), np.array([3, 4, 5])]
    labels = composite_units([blocks], np.array([5.0, 1.0, 3.0, 2.0, 8.0, 4.0]))
    assert labels.tolist() == [0, 1, 2, 1, 0, 2]  # 1-3, 2-5, 0-4


def test_composite_units_leave_by_the_mean_of_their_scores():
    group = UnitGroup("lstm", np.arange(4), 1)
    alone = UnitGroup("conv", np.arange(4, 6), 1)
    scores = np.array([0.0, 9.0, 4.0, 10.0, 3.0, 1.0])  # 0-2: 2.0 on average, 1-3: 9.5
    ties = [[np.array([0, 1]), np.array([2, 3])]]
    plans = ladder([group, alone], scores, channels_kept([group, alone]), ties=ties, align=1)
    assert [np.flatnonzero(~plan).tolist() for plan in plans] == [[], [5], [0, 2, 5]]


def test_layers_with_one_tie_shrink_alike_and_stay_aligned_each():
    layers = [UnitGroup(f"layer{index}", np.arange(32) + 32 * index, 1) for index in range(3)]
    scores = np.random.default_rng(0).random(96)
    plans = ladder(layers, scores, channels_kept(layers), ties=[[layer.units for layer in layers]])
    assert [channels(layers, plan) for plan in plans] == [[32] * 3, [24] * 3, [16] * 3, [8] * 3]
    for layer in layers:  # which units go is free in each of them
        ranked = layer.units[np.argsort(scores[layer.units])]
        assert [plan[ranked].tolist() for plan in plans] == [
            [False] * gone + [True] * (32 - gone) for gone in (0, 8, 16, 24)
        ]


@pytest.mark.parametrize("seed", range(10))
def test_nested_ties_agree_by_position_instead_of_chaining_by_score(seed):
    scores = np.random.default_rng(seed).random(32)
    halves = np.split(np.arange(32), 2)
    ties = [halves, np.split(halves[0], 2), np.split(halves[1], 2)]
    labels = composite_units(ties, scores)
    assert labels.tolist() == [unit % 8 for unit in range(32)]


def test_a_unit_that_stands_twice_in_a_tie_is_matched_by_position():
    scores = np.array([3.0, 2.0, 1.0, 0.0])
    assert composite_units([[np.array([0, 1]), np.array([1, 2])]], scores).tolist() == [0, 0, 0, 3]
    assert composite_units([[np.array([0, 0]), np.array([1, 2])]], scores).tolist() == [0, 0, 0, 3]
    assert composite_units([[np.array([0, 1]), np.array([2, 3])]], scores).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("seed", range(40))
def test_composite_units_take_equally_many_places_of_every_block(seed):
    rng = np.random.default_rng(seed)
    scores = rng.random(60)
    ties = []
    for _ in range(rng.integers(1, 5)):
        blocks, length = rng.integers(1, 5), rng.integers(1, 7)
        ties.append(list(rng.choice(60, (blocks, length), replace=bool(rng.random() < 0.3))))
    labels = composite_units(ties, scores)
    assert {frozenset(np.flatnonzero(labels == label).tolist()) for label in labels} == twin_composites(ties, scores)
    for label in np.unique(labels):
        assert np.flatnonzero(labels == label)[0] == label
        for tie in ties:
            assert len({int((labels[block] == label).sum()) for block in tie}) == 1


def test_partners_of_units_that_cannot_leave_are_the_best_and_stay():
    groups = [UnitGroup("free", np.arange(6), 1), UnitGroup("frozen", np.array([6]), 1, candidate=False)]
    tie = [np.array([0, 1, 2]), np.array([3, 6, 4])]
    scores = np.array([1.0, 3.0, 2.0, 5.0, 4.0, 9.0, math.nan])
    plans = ladder(groups, scores, channels_kept(groups), ties=[tie], align=1)
    assert [np.flatnonzero(~plan).tolist() for plan in plans] == [[], [0, 4], [0, 2, 3, 4], [0, 2, 3, 4, 5]]
    assert composite_units([tie], np.where(np.isnan(scores), math.inf, scores)).tolist() == [0, 1, 2, 2, 0, 5, 1]
