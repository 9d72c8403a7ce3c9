"""Plans: data that survives a file, builds shapes without values, and knows its model."""

import io
import json

import pytest
import torch
from torch import nn

from lightning_prune.errors import PlanError
from lightning_prune.structure.carrier import KEY, attach, plan_in, plan_of
from lightning_prune.structure.plan import Origin, Plan, Stage
from lightning_prune.structure.steps import Factorize, MaskWeight


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4 * 4, 10))


def plan_for(model: nn.Module) -> Plan:
    mask = torch.arange(10 * 256).reshape(10, 256) % 3 == 0
    steps = (Factorize.of("0", model[0], "channel", 4), MaskWeight.of("3", "weight", mask))
    return Plan(
        steps, {"1": "has no weights"}, Origin.of(model, 1000, [{"module": ""}]), (Stage("LowRank", {"rank": 4}),)
    )


def test_json_round_trip_keeps_everything():
    plan = plan_for(network())
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.digest == plan.digest
    assert torch.equal(again.steps[1].mask, plan.steps[1].mask)
    assert again.origin == plan.origin
    assert again.stages == plan.stages


def test_plans_that_differ_in_one_bit_of_a_mask_are_different():
    model = network()
    mask = torch.ones(10, 256, dtype=torch.bool)
    other = mask.clone()
    other[9, 255] = False
    one, two = (Plan((MaskWeight.of("3", "weight", m),), {}, Origin.of(model, 1)) for m in (mask, other))
    assert one != two
    assert one.digest != two.digest


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 101])
def test_mask_bits_round_trip_for_sizes_that_are_no_multiple_of_eight(count):
    mask = torch.rand(count) < 0.5
    assert torch.equal(MaskWeight.of("m", "weight", mask).mask, mask)


def test_carrier_survives_a_weights_only_file():
    model = network()
    plan = plan_for(model)
    plan.build(model)
    attach(model, plan)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert plan_in(state) == plan


def test_build_needs_no_values_and_is_followed_by_a_strict_load():
    dense = network()
    plan = plan_for(dense)
    plan.build(dense)
    attach(dense, plan)
    for p in dense.parameters():
        nn.init.normal_(p)
    fresh = network()
    plan.build(fresh)
    attach(fresh, plan)
    fresh.load_state_dict(dense.state_dict(), strict=True)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(fresh(x), dense(x))


def test_build_draws_no_random_number():
    model = network()
    plan = plan_for(model)
    before = torch.get_rng_state()
    plan.build(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_undo_gives_the_dense_shapes_back():
    model = network()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    plan = plan_for(model)
    plan.build(model)
    for step in reversed(plan.steps):
        step.undo(model)
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


def test_stages_compose_in_order_and_newer_masks_replace_older_ones():
    model = network()
    old = torch.ones(10, 256, dtype=torch.bool)
    first = Plan((MaskWeight.of("3", "weight", old),), {"0": "not asked"}, Origin.of(model, 7))
    second = Plan(
        (Factorize.of("0", model[0], "channel", 4), MaskWeight.of("3", "weight", ~old)), {}, Origin.of(model, 9)
    )
    both = first.then(second)
    assert [step.action for step in both.steps] == ["factorize", "mask"]
    assert not both.steps[1].mask.any()
    assert both.origin.flops == 7
    assert both.left_alone == {}


def test_another_model_is_an_error_that_names_the_first_module_that_differs():
    plan = plan_for(network())
    other = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4 * 4, 12))
    with pytest.raises(
        PlanError, match=r"module '3': parameter '3\.weight' has shape \[12, 256\], expected \[10, 256\]"
    ):
        plan.build(other)
    longer = nn.Sequential(*network(), nn.Linear(10, 2))
    with pytest.raises(PlanError, match=r"module '4': only this model has parameter '4\.weight'"):
        plan.build(longer)


def test_a_layer_with_another_stride_is_named_although_its_parameters_fit():
    plan = plan_for(network())
    other = network()
    other[0].stride = (2, 2)
    with pytest.raises(PlanError, match=r"Module '0' has stride \[2, 2\]; the plan was made for \[1, 1\]"):
        plan.build(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d["steps"][0].update(action="run"), "holds a step 'run'"),
        (lambda d: d["steps"][0].update(rank=10**9), "rank"),
        (lambda d: d["steps"][0].update(rank=-1), "rank"),
        (lambda d: d["steps"][0].update(rank=2.5), "no integer"),
        (lambda d: d["steps"][0].update(module=3), "names are text"),
        (lambda d: d["steps"][0]["before"].update(type="os.system"), "Conv2d"),
        (lambda d: d["steps"][1].update(shape=[10, 999]), "does not fit its shape"),
        (lambda d: d["steps"][1].update(bits="?"), "broken"),
        (lambda d: d.pop("steps"), "broken"),
    ],
)
def test_a_damaged_plan_is_refused(change, message):
    data = json.loads(plan_for(network()).to_json())
    change(data)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(data))


def test_extra_state_that_is_no_plan_is_refused():
    with pytest.raises(PlanError, match="vector of bytes"):
        plan_in({KEY: {"code": 1}})
    with pytest.raises(PlanError, match="broken"):
        plan_in({KEY: torch.tensor(list(b"not json"), dtype=torch.uint8)})


def test_the_table_names_layers_shares_and_reasons():
    plan = plan_for(network())
    rows = {row["layer"]: row for row in plan.rows()}
    dense = 16 * 27 + 16
    assert rows["0"]["kept"] == pytest.approx((4 * 27 + 16 * 4 + 16) / dense)
    assert rows["0"]["after"] == "4x3x3x3 + 16x4x1x1"
    assert rows["3"]["kept"] == pytest.approx(854 / 2560)
    assert rows["1"]["reason"] == "has no weights"
    assert "has no weights" in str(plan)


def test_a_model_without_a_carrier_has_an_empty_plan():
    assert not plan_of(network())
    assert plan_of(network()) == Plan()
