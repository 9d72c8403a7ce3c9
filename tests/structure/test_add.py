"""Parameters changed once: by hand, as data, before channels leave."""

import json

import pytest
import torch
from torch import nn

from lightning_prune.errors import PlanError
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.groups import find_units
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.removal import removal_steps
from lightning_prune.structure.steps import AddToWeight, read_step
from lightning_prune.structure.surgery import compact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_sum_is_that_of_the_tensors_and_the_old_values_stay(dtype):
    model = nn.Sequential(nn.Conv2d(2, 3, 3)).to(dtype)
    weight, change = model[0].weight, torch.randn(3, 2, 3, 3, dtype=dtype)
    before = weight.data
    expected = before + change
    AddToWeight.of("0", "weight", change).apply(model)
    assert model[0].weight is weight
    assert torch.equal(weight, expected)
    assert not torch.equal(before, expected)


def test_compact_adds_once_and_proves_it():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    calls = as_calls(torch.randn(5, 3, dtype=torch.float64))
    kept = torch.tensor([True, False, True, True])
    weight, bias = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    steps = (AddToWeight.of("0", "weight", weight), AddToWeight.of("0", "bias", bias))
    plan = Plan((*steps, *removal_steps(model, find_units(model, calls), kept.numpy())))
    for small in (compact(model, plan, calls), compact(model, plan)):
        assert torch.equal(small[0].weight, (model[0].weight + weight)[kept])
        assert torch.equal(small[0].bias, (model[0].bias + bias)[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_is_data_which_a_model_does_not_carry_once_it_is_taken(dtype):
    change = torch.randn(4, 3, dtype=dtype)
    step = AddToWeight.of("layer", "weight", change)
    again = read_step(json.loads(json.dumps(step.to_dict())))
    assert again == step
    assert again.once
    assert torch.equal(again.change, change.double())
    settled = read_step(json.loads(json.dumps(step.settled().to_dict())))
    assert "values" not in settled.to_dict()
    assert not settled.once
    assert not settled.change.any()
    assert settled.summary() == {"action": "update weight", "before": "4x3", "after": "4x3", "kept": 1.0}


def test_broken_changes_and_other_models_are_refused():
    fields = AddToWeight.of("0", "weight", torch.zeros(2, 4)).to_dict()
    with pytest.raises(PlanError, match="no finite number for each entry"):
        read_step(fields | {"shape": [2, 5]})
    with pytest.raises(PlanError, match="no finite number for each entry"):
        read_step(AddToWeight.of("0", "weight", torch.full((2, 4), float("nan"))).to_dict())
    step = AddToWeight.of("0", "weight", torch.zeros(2, 4))
    with pytest.raises(PlanError, match=r"shape \[2, 4\]; the model has shape \[2, 3\]"):
        step.build(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(PlanError, match="no such parameter"):
        step.build(nn.Sequential(nn.ReLU()))
