"""Units and columns under one bound: against a search over all thresholds, on a residual network."""

import itertools

import numpy as np
import pytest
import torch
from networks import BasicBlock
from torch import nn

from lightning_prune import count_flops
from lightning_prune.callback.channel_target import ChannelTarget
from lightning_prune.callback.streams import choose_columns, columns_in, stream_readers
from lightning_prune.callback.task import Task
from lightning_prune.errors import BudgetError
from lightning_prune.probe import Probe
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.gathering import gather_steps
from lightning_prune.structure.groups import find_units
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.removal import removal_steps
from lightning_prune.structure.surgery import compact

X = torch.randn(2, 3, 6, 6, dtype=torch.float64)
COSTS = {"flops": lambda m: count_flops(m, X).total, "params": lambda m: sum(p.numel() for p in m.parameters())}


@pytest.fixture
def task():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        BasicBlock(8, 8, 1),
        BasicBlock(8, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return Task.of(model.double().eval(), Probe.of_data(model, None, None), as_calls(X))


def scored(structure, readers):
    """Random scores of columns; a unit has the highest of its columns, others a score of their own."""
    random = np.random.default_rng(0)
    columns = {reader.layer: random.random(structure.count) for reader in readers}
    values = random.random(structure.count)
    for unit in range(structure.count):
        own = [columns[r.layer][unit] for r in readers if unit in r.units]
        values[unit] = max(own, default=values[unit])
    return values, columns


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("share", [0.8, 0.55, 0.3])
def test_the_bound_is_met_by_the_highest_threshold_that_meets_it(task, name, share):
    structure = find_units(task.model, task.calls)
    readers = stream_readers(task, structure, name)
    assert [reader.layer for reader in readers] == ["1.conv1", "2.conv1", "5"]
    values, columns = scored(structure, readers)
    target = ChannelTarget.of("test", **{"flops": None, "params": None, "sparsity": None, name: share})
    budget = target.budget(task, structure)
    stays, reads = choose_columns(
        structure, readers, values, columns, budget, budget.bound, lambda *_: True, align=1, min_channels=1, name=name
    )
    masks = {}
    for reader in readers:
        flags = reads.get(reader.layer, np.ones(structure.count, bool)) | ~stays
        masks[reader.layer] = torch.from_numpy(np.append(flags, True)[reader.inputs])
    steps = gather_steps(task.model, masks, removal_steps(task.model, structure, stays))
    small = compact(task.model, Plan(steps), task.calls)
    cost = COSTS[name](small)
    assert cost <= share * COSTS[name](task.model)
    saved = sum(r.saving(stays, reads[r.layer]) for r in readers if r.layer in reads)
    assert budget.cost(stays) - saved == cost  # what it costs is what it was said to cost
    gone = [values[~stays].max(initial=0.0)] + [
        columns[r.layer][r.units][~reads[r.layer][r.units]].max() for r in readers if r.layer in reads
    ]
    for unit, group in itertools.product(range(structure.count), structure.groups):
        if unit in group.units and stays[unit] and stays[group.units].sum() > 1:
            assert values[unit] >= max(gone) - 1e-12 or values[unit] >= values[group.units][stays[group.units]].max()
    assert columns_in(structure, steps).keys() == reads.keys()
    for layer, flags in columns_in(structure, steps).items():
        assert np.array_equal(flags | ~stays, reads[layer] | ~stays)


def test_layers_for_which_it_does_not_pay_read_everything(task):
    structure = find_units(task.model, task.calls)
    readers = stream_readers(task, structure, "flops")
    values, columns = scored(structure, readers)
    budget = ChannelTarget.of("test", 0.5, None).budget(task, structure)
    only = lambda layer, read, there: layer == "2.conv1" and read <= there // 2  # noqa: E731
    stays, reads = choose_columns(
        structure, readers, values, columns, budget, budget.bound, only, align=1, min_channels=1, name="flops"
    )
    assert reads.keys() <= {"2.conv1"}
    saved = sum(r.saving(stays, reads[r.layer]) for r in readers if r.layer in reads)
    assert budget.cost(stays) - saved <= budget.bound


def test_no_columns_leave_for_a_share_of_channels(task):
    assert stream_readers(task, find_units(task.model, task.calls), "sparsity") == []


def test_a_bound_that_cannot_be_met_is_an_error(task):
    structure = find_units(task.model, task.calls)
    readers = stream_readers(task, structure, "flops")
    values, columns = scored(structure, readers)
    budget = ChannelTarget.of("test", 0.01, None).budget(task, structure)
    with pytest.raises(BudgetError, match="flops: at most"):
        choose_columns(
            structure,
            readers,
            values,
            columns,
            budget,
            budget.bound,
            lambda *_: True,
            align=1,
            min_channels=1,
            name="flops",
        )
