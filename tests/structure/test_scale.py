"""Inputs weighted anew: by hand, and as data."""

import json

import pytest
import torch
from torch import nn

from lightning_prune.errors import PlanError
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.groups import find_units
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.removal import removal_steps
from lightning_prune.structure.steps import ScaleInputs, read_step
from lightning_prune.structure.surgery import compact


@pytest.mark.parametrize("groups", [1, 2])
def test_a_scaled_input_is_as_good_as_a_scaled_weight(groups):
    conv = nn.Conv2d(6, 4, 3, groups=groups).double()
    model, x = nn.Sequential(conv), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    factors = torch.tensor([1, 2.5, 1, 1, 0.25, 1]).double().view(1, -1, 1, 1)
    expected, before = model(x * factors), conv.weight
    values = before.detach().clone()
    ScaleInputs("0", {4: 0.25, 1: 2.5}).apply(model)
    assert torch.allclose(model(x), expected, atol=1e-12)
    assert conv.weight is before
    assert torch.equal(values[:, 0], conv.weight[:, 0])


def test_compact_multiplies_once_and_proves_it():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    calls = as_calls(torch.randn(5, 3, dtype=torch.float64))
    structure = find_units(model, calls)
    kept = torch.tensor([True, False, True, True]).numpy()
    steps = (ScaleInputs("2", {0: 3.0, 2: 0.5}), *removal_steps(model, structure, kept))
    small = compact(model, Plan(steps), calls)
    factors = torch.tensor([3.0, 0.5, 1.0]).double()
    assert torch.allclose(small[2].weight, model[2].weight[:, [0, 2, 3]] * factors, atol=0)
    assert torch.allclose(compact(model, Plan(steps))[2].weight, small[2].weight, atol=0)


def test_the_step_is_data():
    step = ScaleInputs("layer", {2: 0.5, 0: 1.5})
    again = read_step(json.loads(json.dumps(step.to_dict())))
    assert again == step
    assert step.summary()["after"] == "x 0.5 to 1.5"
    assert step.once


@pytest.mark.parametrize(
    ("gains", "match"),
    [({0: float("nan")}, "by nan"), ({-1: 1.0}, "input -1"), ({"a": 1.0}, "input 'a'"), ({0: "2"}, "by '2'")],
)
def test_factors_that_are_none_are_refused(gains, match):
    with pytest.raises(PlanError, match=match):
        ScaleInputs("layer", gains)


def test_a_layer_without_such_inputs_is_refused():
    with pytest.raises(PlanError, match="up to 4; it has 4"):
        ScaleInputs("0", {4: 2.0}).build(nn.Sequential(nn.Linear(4, 2)))
    with pytest.raises(PlanError, match="which is a ReLU"):
        ScaleInputs("0", {0: 2.0}).build(nn.Sequential(nn.ReLU()))
