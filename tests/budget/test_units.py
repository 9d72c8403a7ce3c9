"""Units that stay under a bound: equal to a naive twin, counts by hand, and what holds for random groups, ties and widths."""

import itertools
import math

import numpy as np
import pytest
from unit_twin import channels, channels_kept, ladder, random_case, twin_blocks

from lightning_prune.budget.ties import composite_units
from lightning_prune.budget.units import UnitGroup, choose_units
from lightning_prune.errors import BudgetError, ModelError, OptionError


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("align", [1, 4, 8])
@pytest.mark.parametrize("seed", range(12))
def test_plans_equal_those_of_a_naive_twin_whatever_the_bound(seed, align, scope):
    groups, scores, ties, cost = random_case(seed)
    least = 1 + seed % 3
    options = {"ties": ties, "align": align, "min_channels": least, "scope": scope}
    plans = [np.ones(scores.size, dtype=bool)]
    for units in twin_blocks(groups, scores, ties, align, least, scope):
        plans.append(plans[-1].copy())
        plans[-1][units] = False
    assert choose_units(groups, scores, cost, cost(plans[0]), **options).all()
    for before, after in [*itertools.pairwise(plans)][:: -max(1, len(plans) // 6)]:  # the smallest plan among them
        for bound in (cost(after), cost(before) - 1):  # every block adds to the cost: one fewer would not do
            assert choose_units(groups, scores, cost, bound, **options).tolist() == after.tolist()
    with pytest.raises(BudgetError, match=f"{cost(plans[-1]):,} is the least"):
        choose_units(groups, scores, cost, cost(plans[-1]) - 1, **options)


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("seed", range(100, 112))
def test_the_bound_is_never_exceeded_and_plans_are_nested(seed, scope):
    groups, scores, ties, cost = random_case(seed)
    last = np.ones(scores.size, dtype=bool)
    for bound in np.linspace(cost(last), 0, 20).astype(int).tolist():
        try:
            kept = choose_units(groups, scores, cost, bound, ties=ties, scope=scope)
        except BudgetError:
            kept = np.zeros_like(last)  # no lower bound can be met either
        else:
            assert cost(kept) <= bound
        assert not (kept & ~last).any()
        last = kept


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("seed", range(200, 212))
def test_ties_stay_balanced_floors_hold_and_what_cannot_leave_stays(seed, align):
    groups, scores, ties, cost = random_case(seed)
    free = np.zeros(scores.size, dtype=bool)
    for group in groups:
        free[group.units] = group.candidate
    for kept in ladder(groups, scores, cost, ties=ties, align=align, min_channels=3):
        for tie in ties:
            assert len({int(kept[block].sum()) for block in tie}) == 1
        for group, left in zip(groups, channels(groups, kept), strict=True):
            assert left == group.channels or left >= 3
        assert kept[~free].all()


@pytest.mark.parametrize("align", [4, 8, 12])
@pytest.mark.parametrize("seed", range(300, 306))
def test_channels_left_run_through_the_multiples_of_the_alignment(seed, align):
    groups, scores, _, cost = random_case(seed, tied=False)
    plans = [channels(groups, kept) for kept in ladder(groups, scores, cost, align=align)]
    for group, counts in zip(groups, zip(*plans, strict=True), strict=True):
        step = math.lcm(align, group.width)
        if not group.candidate:
            assert set(counts) == {group.channels}
        elif group.channels > max(step, 2 * align - 1):  # wide enough for `align` itself
            assert set(counts) == {group.channels, *range(step, group.channels, step)}


@pytest.mark.parametrize(
    ("units", "width", "align", "counts"),
    [
        (32, 1, 8, [32, 24, 16, 8]),
        (20, 1, 8, [20, 16, 8]),  # the first block takes what is over
        (15, 1, 8, [15, 12, 8, 4]),  # narrow: a smaller power of two
        (3, 1, 8, [3, 2, 1]),
        (1, 1, 8, [1]),
        (30, 1, 12, [30, 24, 12]),
        (4, 64, 8, [256, 192, 128, 64]),  # heads: one is aligned
        (10, 4, 8, [40, 32, 24, 16, 8]),
        (9, 4, 8, [36, 32, 24, 16, 8]),
        (7, 3, 8, [21, 12]),  # 24 would be the first aligned count
        (3, 5, 8, [15, 10]),
        (5, 1, 1, [5, 4, 3, 2, 1]),
    ],
)
def test_a_group_leaves_in_blocks_after_which_its_channels_are_aligned(units, width, align, counts):
    group = UnitGroup("layer", np.arange(units), width)
    plans = ladder([group], np.arange(units, 0, -1.0), channels_kept([group]), align=align)
    assert [channels([group], kept)[0] for kept in plans] == counts
    for kept in plans:
        assert kept[: kept.sum()].all()  # the highest scores


def test_min_channels_stay_on_top_of_alignment():
    group = UnitGroup("layer", np.arange(32), 1)
    for least, smallest in [(1, 8), (8, 8), (9, 16), (17, 24), (25, 32), (99, 32)]:
        plans = ladder([group], np.arange(32.0), channels_kept([group]), min_channels=least)
        assert channels([group], plans[-1]) == [smallest]


@pytest.mark.parametrize("seed", range(400, 410))
def test_the_order_of_groups_and_of_their_units_does_not_matter(seed):
    groups, scores, ties, cost = random_case(seed)
    rng = np.random.default_rng(seed)
    others = [
        UnitGroup(
            groups[index].name, rng.permutation(groups[index].units), groups[index].width, groups[index].candidate
        )
        for index in rng.permutation(len(groups))
    ]
    one = ladder(groups, scores, cost, ties=ties)
    other = ladder(others, scores, cost, ties=ties)
    assert [plan.tolist() for plan in one] == [plan.tolist() for plan in other]


def test_global_order_follows_scores_and_uniform_order_the_share_gone():
    groups = [UnitGroup("strong", np.arange(8), 1), UnitGroup("weak", np.arange(8, 24), 1)]
    scores = np.concatenate([np.full(8, 2.0), np.full(16, 1.0)])
    cost = channels_kept(groups)
    together = choose_units(groups, scores, cost, 12, align=4)
    assert channels(groups, together) == [8, 4]
    alike = choose_units(groups, scores, cost, 12, align=4, scope="uniform")
    assert channels(groups, alike) == [4, 8]


def test_blocks_of_equal_scores_leave_in_order_although_their_means_differ_in_the_last_bit():
    assert (0.1 + 0.1 + 0.1) / 3 > 0.1
    group = UnitGroup("layer", np.arange(15), 1)
    plans = ladder([group], np.full(15, 0.1), channels_kept([group]), align=4)
    assert [np.flatnonzero(plan).tolist() for plan in plans] == [list(range(start, 15)) for start in (0, 3, 7, 11)]


def test_equal_scores_leave_from_the_smallest_id_and_group_by_group():
    groups = [UnitGroup("b", np.arange(4, 8), 1), UnitGroup("a", np.arange(4), 1)]
    for bound in range(7, 4, -1):
        kept = choose_units(groups, np.full(8, 0.1), channels_kept(groups), bound, align=1)
        assert kept.tolist() == [False] * (8 - bound) + [True] * bound


def test_a_group_shared_by_two_pools_keeps_its_floor_and_the_others_go_on():
    groups = [UnitGroup("a", np.arange(8), 1), UnitGroup("b", np.arange(8, 12), 1)]
    ties = [[np.arange(4), np.arange(8, 12)]]  # half of `a` goes with `b`, the other half alone
    scores = np.concatenate([np.full(4, 2.0), np.full(4, 1.0), np.full(4, 2.0)])
    plans = ladder(groups, scores, channels_kept(groups), ties=ties, align=1, min_channels=2)
    assert [channels(groups, plan) for plan in plans] == [[8, 4], [7, 4], [6, 4], [5, 4], [4, 4], [3, 3], [2, 2]]


def test_shares_shrink_the_groups_they_name_and_no_others():
    groups = [
        UnitGroup(name, np.arange(32) + 32 * index, 1) for index, name in enumerate(["net.a", "net.b", "head", "net.c"])
    ]
    scores = np.random.default_rng(0).random(128)
    kept = choose_units(groups, scores, channels_kept(groups), None, scope={"net.*": 0.5, "net.b": 0.8, "net.c": 1.0})
    assert channels(groups, kept) == [16, 24, 32, 32]  # 0.8 of 32 is 25.6, rounded down to a multiple of 8
    hundred = [UnitGroup("conv", np.arange(100), 1)]
    assert choose_units(hundred, np.arange(100.0), np.count_nonzero, None, align=1, scope={"*": 0.29}).sum() == 29
    for group in groups[:2]:
        assert scores[group.units][kept[group.units]].min() > scores[group.units][~kept[group.units]].max()


def test_groups_that_shrink_together_end_at_the_smaller_share():
    groups = [UnitGroup("a", np.arange(16), 1), UnitGroup("b", np.arange(16, 32), 1)]
    tie = [groups[0].units, groups[1].units]
    kept = choose_units(
        groups, np.arange(32.0), channels_kept(groups), None, ties=[tie], align=1, scope={"a": 0.9, "b": 0.5}
    )
    assert channels(groups, kept) == [8, 8]
    with pytest.raises(
        BudgetError, match=r"group 'a' is to keep at most 8 of its 16 channels, but 16 is the least.*shrink together"
    ):
        choose_units(groups, np.arange(32.0), channels_kept(groups), None, ties=[tie], scope={"a": 0.5})


@pytest.mark.parametrize("tied", [False, True])
def test_a_hundred_thousand_units_meet_the_bound_within_one_block(tied):
    rng = np.random.default_rng(0)
    parts = np.array_split(rng.permutation(100_000), 300)
    groups = [UnitGroup(f"layer{index}", part, 1) for index, part in enumerate(parts)]
    ties = [[part[:166], part[166:332]] for part in parts[::3]] * tied
    ties += [[one[:200], other[:200]] for one, other in zip(parts[1::3], parts[2::3], strict=True)] * tied
    owner = np.empty(100_000, dtype=np.int64)
    for index, part in enumerate(parts):
        owner[part] = index

    def cost(kept):
        counts = np.bincount(owner[kept], minlength=300)
        return int(counts[:-1] @ counts[1:])

    dense = cost(np.ones(100_000, dtype=bool))
    scores = rng.random(100_000)
    last = np.zeros(100_000, dtype=bool)
    for share in (0.25, 0.5):
        kept = choose_units(groups, scores, cost, int(share * dense), ties=ties)
        assert (share - 0.001) * dense < cost(kept) <= share * dense
        assert not (last & ~kept).any()
        assert all(len({int(kept[block].sum()) for block in tie}) == 1 for tie in ties)
        last = kept


def test_a_bound_that_cannot_be_met_names_the_groups_that_bind_and_the_minimum():
    sizes = [16, 160, 32, 64, 128, 48, 96]
    ends = np.cumsum([0, *sizes])
    groups = [
        UnitGroup(f"layer{size}", np.arange(end - size, end), 1) for size, end in zip(sizes, ends[1:], strict=True)
    ]
    groups[1] = UnitGroup("head", groups[1].units, 1, candidate=False)

    def cost(kept):
        return int(kept.sum()) * 10

    assert cost(choose_units(groups, np.arange(544.0), cost, 2560, min_channels=16)) == 2560
    with pytest.raises(BudgetError) as caught:
        choose_units(groups, np.arange(544.0), cost, 2559, min_channels=16, name="params")
    message = str(caught.value)
    assert message.startswith(
        "params: at most 2,559 asked for, but 2,560 is the least that can be reached (0.4706 of the 5,440"
    )
    assert "'layer16' (16 of 16 units), 'layer32' (16 of 32 units)" in message
    assert "and 1 more, each at its smallest. Raise params" in message
    with pytest.raises(BudgetError, match=r"sparsity: at most 5 channels asked for, but 96 .*Lower sparsity"):
        choose_units(groups, np.arange(544.0), channels_kept(groups), 5, min_channels=16, name="sparsity")


def test_where_nothing_can_leave_only_the_whole_model_is_within_reach():
    groups = [UnitGroup("head", np.arange(10), 1, candidate=False)]
    assert choose_units(groups, np.zeros(10), np.count_nonzero, 10).all()
    with pytest.raises(BudgetError, match="no group at all"):
        choose_units(groups, np.zeros(10), np.count_nonzero, 9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_raise_and_name_the_group(value):
    groups = [UnitGroup("fine", np.arange(4), 1), UnitGroup("broken", np.arange(4, 8), 1)]
    scores = np.array([0, 0, 0, 0, 0, value, value, 0])
    with pytest.raises(ModelError, match=r"'broken': the scores of 2 of its 4 units are not finite"):
        choose_units(groups, scores, np.count_nonzero, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"align": 0}, "align: must be"),
        ({"align": True}, "align: must be"),
        ({"min_channels": 0}, "min_channels: must be an integer of at least 1, got 0"),
        ({"scope": "local"}, "scope: must be 'global', 'uniform' or shares"),
        ({"scope": {}}, "scope: must be 'global', 'uniform' or shares"),
        ({"scope": {"conv1": 0.5}}, "scope: takes either a bound or shares by name, got flops=4"),
        ({"bound": None}, "scope: takes either a bound or shares by name, got flops=None"),
        ({"bound": None, "scope": {"conv": 0.5}}, "'conv' matches no group that can shrink. Among these are: 'conv1'"),
        ({"bound": None, "scope": {"head": 0.5}}, "'head' matches no group that can shrink"),
        ({"bound": None, "scope": {"conv1": 0}}, r"'conv1' must keep a share of its channels in \(0, 1\], got 0"),
        ({"bound": None, "scope": {"conv1": True}}, r"in \(0, 1\], got True"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    groups = [UnitGroup("conv1", np.arange(4), 1), UnitGroup("head", np.arange(4, 8), 1, candidate=False)]
    with pytest.raises(OptionError, match=message):
        choose_units(groups, np.zeros(8), np.count_nonzero, **{"bound": 4, **options})


def test_a_unit_in_two_groups_and_blocks_of_two_lengths_are_refused():
    groups = [UnitGroup("a", np.arange(4), 1), UnitGroup("b", np.arange(3, 6), 1)]
    with pytest.raises(ValueError, match="one group"):
        choose_units(groups, np.zeros(6), np.count_nonzero, 6)
    with pytest.raises(ValueError, match="same shape"):
        composite_units([[np.arange(2), np.arange(3)]], np.zeros(4))
