"""A layer with directions left out against the dense layer with the projected weight, for every form; costs against torch's own counter."""

import base64
import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from convolutions import EVEN, MODES, example
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.errors import ModelError, PlanError
from lightning_prune.flops import count_flops
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.groups import find_units
from lightning_prune.structure.masks import Masks
from lightning_prune.structure.obstacles import obstacles
from lightning_prune.structure.plan import Origin, Plan
from lightning_prune.structure.removal import removal_steps
from lightning_prune.structure.rotated import (
    Directions,
    Form,
    Rotated,
    build_rotated,
    calls_of,
    cost,
    factors_of,
    forms_of,
    rotate,
)
from lightning_prune.structure.steps import Rotate, read_step
from lightning_prune.structure.surgery import compact, mask_

CONVS = [
    (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    (nn.Conv1d, {"kernel_size": 4, "dilation": 2, "padding": "same"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "stride": 2}),
    (nn.Conv2d, {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2), "dilation": (2, 1)}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "valid", "dilation": 2}),
    (nn.Conv2d, {"kernel_size": 1, "stride": 2}),
    (nn.Conv2d, {"kernel_size": 1, "stride": (1, 2), "padding": 1}),
    (nn.Conv2d, {"kernel_size": (1, 5), "padding": (0, 2)}),
    (nn.Conv3d, {"kernel_size": (3, 1, 2), "stride": (1, 2, 1), "padding": (1, 0, 1)}),
    (nn.Conv3d, {"kernel_size": 1, "stride": 2, "padding": 1}),
]
KEPT = [(4, 6), (4, None), (None, 6), (2, 3), (3, None), (None, 1), (1, 5)]


def conv(cls=nn.Conv2d, mode="zeros", bias=True, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return cls(4, 6, padding_mode=mode, bias=bias, dtype=dtype, **options)


def linear(bias=True):
    torch.manual_seed(0)
    return nn.Linear(4, 6, bias=bias, dtype=torch.float64)


def basis(size, count, seed=0):
    """Orthonormal columns that are no coordinate axes."""
    if count is None:
        return None
    generator = torch.Generator().manual_seed(1000 * seed + size)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0][:, :count]


def directions(layer, inputs, outputs, seed=0, **options):
    out, inner = factors_of(layer)["core"].weight.shape[:2]
    return Directions(
        basis(inner + options.get("augmented", False), inputs, seed), basis(out, outputs, seed + 1), **options
    )


def projected(weight, kept):
    """Twin: both projections as full matrices, one tap after the other."""
    left, right = (
        torch.eye(size).double() if q is None else q @ q.T
        for q, size in zip((kept.outputs, kept.inputs), weight.shape, strict=False)
    )
    taps = weight.detach().double().flatten(2) if weight.ndim > 2 else weight.detach().double()[:, :, None]
    return torch.stack([left @ tap @ right for tap in taps.unbind(2)], 2).view(weight.shape)


def twin_of(layer, kept):
    """The dense layer with the projected weight."""
    twin = copy.deepcopy(layer)
    twin.weight.data = projected(layer.weight, kept).to(layer.weight)
    return twin


def params_of(module):
    return sum(p.numel() for p in module.parameters())


# Values -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("cls", "options"), CONVS, ids=str)
def test_rotated_equals_the_projected_convolution(cls, options, mode, dtype, tolerance):
    layer = conv(cls, mode, dtype=dtype, **options)
    x = example(layer)
    for inputs, outputs in KEPT:
        kept = directions(layer, inputs, outputs)
        small = rotate(layer, kept)
        torch.testing.assert_close(small(x), twin_of(layer, kept)(x), rtol=0, atol=tolerance)
        whole = inputs in (4, None) and outputs in (6, None)
        assert torch.allclose(small(x), layer(x), rtol=0, atol=tolerance) == whole


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), KEPT)
def test_rotated_equals_the_projected_linear_over_tokens(inputs, outputs, bias):
    layer = linear(bias)
    kept, x = directions(layer, inputs, outputs), example(layer)
    torch.testing.assert_close(rotate(layer, kept)(x), twin_of(layer, kept)(x), rtol=0, atol=1e-12)


def test_the_factors_are_plain_and_hold_bias_and_stride_where_they_are_exact():
    layer = conv(kernel_size=3, stride=2, padding=1, dilation=2, mode="reflect")
    small = rotate(layer, directions(layer, 2, 3))
    assert [(name, type(m), tuple(m.weight.shape)) for name, m in small.named_children()] == [
        ("rotate_in", nn.Conv2d, (2, 4, 1, 1)),
        ("core", nn.Conv2d, (3, 2, 3, 3)),
        ("rotate_out", nn.Conv2d, (6, 3, 1, 1)),
    ]
    assert [m.bias is None for m in small] == [True, True, False]
    assert [(m.stride, m.padding, m.dilation, m.padding_mode) for m in small] == [
        ((1, 1), (0, 0), (1, 1), "zeros"),
        ((2, 2), (1, 1), (2, 2), "reflect"),
        ((1, 1), (0, 0), (1, 1), "zeros"),
    ]
    assert torch.equal(small.rotate_out.bias, layer.bias)
    pointwise = conv(kernel_size=1, stride=2)
    assert [m.stride for m in rotate(pointwise, directions(pointwise, 2, 3))] == [(2, 2), (1, 1), (1, 1)]
    assert [m.stride for m in rotate(pointwise, directions(pointwise, None, 3))] == [(2, 2), (1, 1)]


@pytest.mark.parametrize("outputs", [None, 6, 3])
def test_an_augmented_linear_rotates_its_bias_with_the_inputs_as_the_authors_do(outputs):
    layer = linear()
    kept, x = directions(layer, 3, outputs, augmented=True), example(layer)
    small = rotate(layer, kept)
    homogeneous = projected(torch.cat([layer.weight, layer.bias[:, None]], 1), kept)
    expected = torch.cat([x, torch.ones(*x.shape[:-1], 1)], -1) @ homogeneous.T
    torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-12)
    r_out = outputs or 6
    assert params_of(small) == (4 + 1) * 3 + 3 * r_out + (r_out * 6 if outputs else 0)
    model = nn.Sequential(layer)
    mask_(model, Plan((Rotate.of("0", layer, kept),)))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_dtype_training_flag_and_requires_grad_are_kept_and_nothing_is_shared():
    layer = conv(kernel_size=3, dtype=torch.bfloat16).eval()
    layer.weight.requires_grad_(False)
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    for small in (build_rotated(layer, Form(2, 3)), rotate(layer, directions(layer, 2, 3))):
        assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
        assert not any(module.training for module in small.modules())
        assert {name: p.requires_grad for name, p in small.named_parameters()} == {
            "rotate_in.weight": False,
            "core.weight": False,
            "rotate_out.weight": False,
            "rotate_out.bias": True,
        }
        small.rotate_out.bias.data.zero_()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert {p.device.type for p in build_rotated(nn.Conv2d(4, 6, 3, device="meta"), Form(2)).parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("layer", "form", "message"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), Form(2, 3), "in 2 groups has no rotated form"),
        (nn.Conv2d(4, 6, 3), Form(5), "keep 5 inputs: take 1 to 4"),
        (nn.Conv2d(4, 6, 3), Form(None, 0), "keep 0 outputs: take 1 to 6"),
        (nn.Conv2d(4, 6, 3), Form(), "give at least one number"),
        (nn.Linear(4, 6, bias=False), Form(3, augmented=True), "cannot be augmented"),
        (nn.Linear(4, 6), Form(None, 3, augmented=True), "cannot be augmented"),
        (nn.Conv2d(4, 6, 3), Form(3, augmented=True), "cannot be augmented"),
        (nn.Linear(4, 6), Form(separable=2), "nothing to separate"),
        (nn.Conv2d(4, 6, 3), Form(2, 3, separable=7), "keep 7 terms: take 1 to 6"),
        (nn.ConvTranspose2d(4, 6, 3), Form(2), "ConvTranspose2d has no rotated form"),
    ],
)
def test_impossible_forms_are_refused_with_what_is_allowed(layer, form, message):
    with pytest.raises(ModelError, match=message):
        build_rotated(layer, form)


def test_values_that_cannot_be_rotated_are_refused():
    layer = conv(kernel_size=3)
    with pytest.raises(ModelError, match="does not fit"):
        rotate(layer, Directions(basis(5, 2)))
    layer.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        rotate(layer, directions(layer, 2, None))
    with pytest.raises(ModelError, match="load its weights first"):
        rotate(nn.Linear(4, 6, device="meta"), Directions(basis(4, 2)))


# Several rounds -----------------------------------------------------------------------------------------------------------------

ROUNDS = [
    ((4, 6), (2, 3)),
    ((3, 5), (2, None)),
    ((3, None), (2, 3)),
    ((3, None), (None, 3)),
    ((None, 5), (2, 3)),
    ((None, 5), (2, None)),
]


@pytest.mark.parametrize(("first", "second"), ROUNDS)
@pytest.mark.parametrize(
    "layer",
    [
        conv(kernel_size=3, stride=2, padding=1, mode="circular"),
        conv(nn.Conv1d, kernel_size=1, stride=2, padding=1),
        conv(nn.Conv2d, kernel_size=3, bias=False),
        linear(),
    ],
    ids=str,
)
def test_two_rounds_are_the_nested_product_in_at_most_three_factors(layer, first, second):
    x = example(layer)
    once = rotate(layer, directions(layer, *first))
    with torch.no_grad():  # trained in between: no longer orthogonal
        for p in once.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=p.dtype), alpha=0.1)
    kept = directions(once, *second, seed=5)
    twice = rotate(once, kept)

    nested = copy.deepcopy(once)
    nested.core.weight.data = projected(once.core.weight, kept)
    torch.testing.assert_close(twice(x), nested(x), rtol=0, atol=1e-12)
    sides = {name for name, *counts in zip(("rotate_in", "rotate_out"), first, second, strict=True) if any(counts)}
    assert {name for name, _ in twice.named_children()} == {"core", *sides}
    r_in, r_out = (new or old or all_ for new, old, all_ in zip(second, first, (4, 6), strict=True))
    assert twice.core.weight.shape[:2] == (r_out, r_in)
    if second[0] and first[0]:
        expected = kept.inputs.T @ once.rotate_in.weight.detach().flatten(1)
        torch.testing.assert_close(twice.rotate_in.weight.flatten(1), expected, rtol=0, atol=1e-12)


def test_a_rotated_bias_is_rotated_on_in_the_second_round():
    layer = linear()
    once = rotate(layer, directions(layer, 4, 5, augmented=True))
    kept, x = directions(once, 2, 3), example(layer)
    twice = rotate(once, kept)
    nested = copy.deepcopy(once)
    nested.core.weight.data = projected(once.core.weight, kept)
    torch.testing.assert_close(twice(x), nested(x), rtol=0, atol=1e-12)
    assert params_of(twice) == (4 + 1) * 2 + 2 * 3 + 3 * 6


def test_rotations_that_were_frozen_stay_frozen_in_the_second_round():
    layer = conv(kernel_size=3)
    once = rotate(layer, directions(layer, 3, None))
    once.rotate_in.requires_grad_(False)
    twice = rotate(once, directions(once, 2, 3))
    assert {name: p.requires_grad for name, p in twice.named_parameters()} == {
        "rotate_in.weight": False,
        "core.weight": True,
        "rotate_out.weight": True,
        "rotate_out.bias": True,
    }


# Costs --------------------------------------------------------------------------------------------------------------------------


def flops_of(module, x):
    """Torch's own counter, which counts a multiply-add as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops() // 2


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize(("cls", "options"), [*CONVS, (None, {})], ids=str)
def test_costs_equal_torchs_counter(cls, options):
    layer = linear() if cls is None else conv(cls, **options)
    x = example(layer)
    shapes = [(x.shape, layer(x).shape)] * 2
    for inputs, outputs in [(None, None), *KEPT]:
        form = Form(inputs, outputs)
        small = layer if form == Form() else build_rotated(layer, form)
        assert cost(layer, form, shapes) == (params_of(small), 2 * flops_of(small, x))
        if isinstance(small, Rotated):
            again = build_rotated(small, Form(1, 1))
            assert cost(small, Form(), shapes) == (params_of(small), 2 * flops_of(small, x))
            assert cost(small, Form(1, 1), shapes) == (params_of(again), 2 * flops_of(again, x))
    if "kernel_size" in options and layer.weight[0, 0].numel() > 1:
        form = Form(2, 3, separable=2)
        small = build_rotated(layer, form)
        assert cost(layer, form, shapes) == (params_of(small), 2 * flops_of(small, x))


def test_cost_of_an_augmented_linear_is_the_authors():
    layer = linear()
    x = example(layer)
    form = Form(3, 2, augmented=True)
    small = build_rotated(layer, form)
    assert cost(layer, form, [(x.shape, layer(x).shape)]) == (5 * 3 + 3 * 2 + 2 * 6, flops_of(small, x))


@pytest.mark.parametrize(
    ("kernel", "stride", "by_params", "by_flops"),
    [
        (3, 1, 0.895, 0.895),
        (3, 2, 0.895, 0.760),
        (5, 1, 0.961, 0.961),
        (7, 2, 0.980, 0.950),
        (1, 1, 0.414, 0.414),
        (1, 2, 0.414, 0.414),  # 0.193 if the first rotation ran at the resolution of the input
        (None, 1, 0.414, 0.414),
    ],
)
def test_three_factors_break_even_where_the_formulas_say(kernel, stride, by_params, by_flops):
    width = 1000
    layer = nn.Conv2d(width, width, kernel or 1, stride, padding=(kernel or 1) // 2, bias=False, device="meta")
    shapes = [((1, width, 8, 8), (1, width, 8 // stride, 8 // stride))]
    if kernel is None:
        layer, shapes = nn.Linear(width, width, bias=False, device="meta"), [((5, width), (5, width))]
    dense = cost(layer, Form(), shapes)
    prices = [cost(layer, Form(r, r), shapes) for r in range(1, width + 1)]
    assert sum(p.params < dense.params for p in prices) / width == pytest.approx(by_params, abs=1.5e-3)
    assert sum(p.flops < dense.flops for p in prices) / width == pytest.approx(by_flops, abs=1.5e-3)


@pytest.mark.parametrize(
    "layer", [nn.Linear(9, 8), nn.Conv1d(9, 8, 1), nn.Conv2d(9, 8, 3, padding=1)], ids=["linear", "1x1", "3x3"]
)
@pytest.mark.parametrize("before", [None, Form(7), Form(None, 6)], ids=str)
def test_directions_may_leave_on_sides_that_keep_a_kernel_of_one_at_two_factors(layer, before):
    once, pointwise = build_rotated(layer, before) if before else layer, layer.weight[0, 0].numel() == 1
    new = {"inputs": Form(5), "outputs": Form(None, 5), "both": Form(5, 5)}
    factors = {side: len(factors_of(build_rotated(once, form))) for side, form in new.items()}
    assert forms_of(once) == tuple(side for side, count in factors.items() if count <= (2 if pointwise else 3))


def test_calls_of_a_rotated_layer_are_those_of_its_first_and_last_factor():
    layer = conv(kernel_size=3, stride=2)
    x = example(layer)
    for model in (nn.Sequential(layer), nn.Sequential(rotate(layer, directions(layer, 2, 3)))):
        counted = count_flops(model, x)
        shapes = calls_of("0", model[0], counted.shapes)
        assert list(shapes) == [(x.shape, layer(x).shape)]
        assert cost(model[0], Form(), shapes) == (params_of(model), counted.total)
    assert list(calls_of("1", model[0], {})) == []


# The step -----------------------------------------------------------------------------------------------------------------------


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(96, 5),
    ).to(dtype)


def plan_for(model, seed=0, **options):
    kept = {
        "0": directions(model[0], None, 5, seed),
        "3": directions(model[3], 4, 3, seed, **options),
        "5": directions(model[5], 7, None, seed),
    }
    steps = tuple(Rotate.of(name, model.get_submodule(name), d) for name, d in kept.items())
    return Plan(steps, {}, Origin.of(model, 1))


X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_compact_is_what_mask_computes(dtype, tolerance):
    model, masked = network(dtype), network(dtype)
    plan = plan_for(model)
    small = compact(model, plan, as_calls(X.to(dtype)))
    mask_(masked, plan)
    for layer in (small, masked):
        layer.eval()
    torch.testing.assert_close(small(X.to(dtype)), masked(X.to(dtype)), rtol=0, atol=tolerance)
    assert [type(small[i]) for i in (0, 3, 5)] == [Rotated] * 3
    assert not torch.allclose(model.eval()(X.to(dtype)), small(X.to(dtype)), atol=1e-3)


def test_emulation_projects_the_weight_swaps_it_and_leaves_the_bias_alone():
    model = network()
    weight, old = model[3].weight, model[3].weight.detach()
    before, bias = old.clone(), model[3].bias.detach().clone()
    step = plan_for(model).steps[1]
    step.emulate(model)
    assert model[3].weight is weight
    torch.testing.assert_close(weight.detach(), projected(before, step.directions), rtol=0, atol=1e-14)
    assert torch.equal(old, before)
    assert torch.equal(model[3].bias, bias)
    once = weight.detach().clone()
    step.emulate(model)
    torch.testing.assert_close(weight.detach(), once, rtol=0, atol=1e-14)


def test_a_plan_of_two_stages_builds_what_a_strict_load_fills():
    model = network()
    calls = as_calls(X)
    small = compact(
        compact(model, plan_for(model), calls),
        Plan(
            (),
        ),
        calls,
    )
    later = {"0": (None, 2), "3": (2, 2), "5": (3, None)}
    steps = tuple(
        Rotate.of(n, small.get_submodule(n), directions(small.get_submodule(n), *k, 9)) for n, k in later.items()
    )
    tiny = compact(small, Plan(steps, {}, Origin.of(model, 1)), calls)
    plan = Plan.from_json(tiny.lightning_prune_plan.plan.to_json())
    assert len(plan) == 6
    assert not any(step.basis_in or step.basis_out for step in plan.steps)

    fresh = network()
    plan.build(fresh)
    fresh.load_state_dict({k: v for k, v in tiny.state_dict().items() if "plan" not in k}, strict=True)
    assert torch.equal(fresh.eval()(X), tiny.eval()(X))
    assert [name for name, _ in fresh[3].named_children()] == ["rotate_in", "core", "rotate_out"]


def test_undo_gives_the_shapes_of_every_round_back():
    model = network()
    plan = plan_for(model)
    for step in plan.steps:
        step.apply(model)
    once = {name: p.shape for name, p in model.named_parameters()}
    second = Rotate.of("3", model[3], directions(model[3], 2, 2))
    second.apply(model)
    second.undo(model)
    assert {name: p.shape for name, p in model.named_parameters()} == once
    for step in reversed(plan.steps):
        step.undo(model)
    assert str(model) == str(network())
    assert {p.dtype for p in model[3].parameters()} == {torch.float64}


@pytest.mark.parametrize("augmented", [False, True])
def test_the_step_is_data_and_forgets_its_values_once_they_are_taken(augmented):
    layer = linear()
    weights = {"weights_in": torch.rand(3).double()} if not augmented else {}
    step = Rotate.of("layer", layer, directions(layer, 3, 2, augmented=augmented, **weights))
    again = read_step(json.loads(json.dumps(step.to_dict(), sort_keys=True)))
    assert again == step
    assert torch.equal(again.directions.inputs, basis(4 + augmented, 3))
    assert torch.equal(again.directions.outputs, basis(6, 2, 1))
    bare = read_step(json.loads(json.dumps(step.settled().to_dict())))
    assert bare == dataclasses.replace(step, basis_in="", basis_out="", weights_in="", weights_out="")
    assert (bare.summary(), bare.facts()) == (step.summary(), {"inputs": 3, "outputs": 2})
    model = nn.ModuleDict({"layer": layer})
    for use in (bare.emulate, bare.apply, lambda model: Masks.pending(model, [bare])):
        with pytest.raises(PlanError, match=r"not which \(basis_in, basis_out\)"):
            use(model)
    bare.build(model)
    assert isinstance(model["layer"], Rotated)


def test_the_table_row_tells_shapes_and_share():
    layer = conv(kernel_size=3)
    row = Rotate.of("0", layer, directions(layer, 2, 3)).summary()
    assert row["action"] == "rotate, 2 inputs, 3 outputs"
    assert row["before"] == "Conv2d 6x4x3x3"
    assert row["after"] == "2x4x1x1 + 3x2x3x3 + 6x3x1x1"
    assert row["kept"] == pytest.approx((8 + 54 + 18 + 6) / (216 + 6))


def packed(values):
    return base64.b64encode(torch.as_tensor(values).double().numpy().tobytes()).decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(inputs=10**12), "take 1 to 8"),
        (lambda s: s.update(inputs=2.5), "integers or None"),
        (lambda s: s.update(inputs=True), "integers or None"),
        (lambda s: s.update(augmented=1), "integers or None"),
        (lambda s: s.update(augmented=True), "cannot be augmented"),
        (lambda s: s.update(separable=10**12), "terms: take 1 to"),
        (lambda s: s.update(inputs=3), r"basis_in does not hold \[8, 3\] numbers"),
        (lambda s: s.update(inputs=None), "basis_in does not hold"),
        (lambda s: s.update(basis_in="?" * len(s["basis_in"])), "broken"),
        (lambda s: s.update(basis_in=packed(torch.full((8, 4), torch.nan))), "not finite"),
        (lambda s: s.update(basis_out=packed(torch.ones(6, 3))), "not orthonormal"),
        (lambda s: s.update(weights_in=packed(-torch.ones(4))), "negative"),
        (lambda s: s.update(weights_in=packed(torch.ones(5))), r"weights_in does not hold \[4\]"),
        (lambda s: s.update(extra=1), "broken"),
        (lambda s: s["before"].update(more={}), "factors of a layer are"),
        (lambda s: s["before"].pop("core"), "factors of a layer are"),
        (lambda s: s["before"].update(core=3), "broken"),
        (lambda s: s["before"]["core"].update(type="os.system"), "Conv2d"),
        (lambda s: s["before"]["core"].update(groups=2), "2 groups"),
        (lambda s: s["before"]["core"].update({"in": "8"}), "broken"),
    ],
)
def test_a_damaged_step_is_refused(change, message):
    data = json.loads(plan_for(network()).to_json())
    change(data["steps"][1])
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(data))


def test_a_step_for_another_layer_is_refused_by_name():
    plan = plan_for(network())
    other = network()
    other[3].stride = (1, 1)
    with pytest.raises(PlanError, match=r"Module '3' has as its core .*'stride': \[1, 1\]"):
        plan.steps[1].build(other)
    with pytest.raises(PlanError, match="Module '1' cannot be rotated: A layer of type BatchNorm2d"):
        dataclasses.replace(plan.steps[1], module="1").build(other)
    small = rotate(other[3], directions(other[3], 4, 3))
    later = Rotate.of("3", small, directions(small, 2, 2))
    with pytest.raises(PlanError, match="as its rotate_in None"):
        later.apply(other)


def test_a_factor_is_no_layer_of_its_own_to_others_and_the_tracer_sees_plain_layers():
    model = compact(network(), plan_for(network()))
    reasons = obstacles(model)
    assert {name for name, reason in reasons.items() if reason == "it is a factor already"} == {
        f"{i}.{name}"
        for i, keys in ((0, "core rotate_out"), (3, "rotate_in core rotate_out"), (5, "rotate_in core"))
        for name in keys.split()
    }


def test_channels_of_a_rotated_network_leave_and_it_is_rotated_again():
    model = compact(network(), plan_for(network()))
    structure = find_units(model, as_calls(X))
    kept = np.ones(structure.count, bool)
    for tensor in ("0.core.weight", "0.rotate_out.weight", "3.rotate_in.weight", "3.core.weight"):
        (slot,) = (slot for slot in structure.by_tensor[tensor] if slot.axis == 0)
        kept[slot.units[0]] = False
    small = compact(model, Plan(removal_steps(model, structure, kept)), as_calls(X))
    assert [m.weight.shape[:2] for m in (*small[0], *small[3])] == [(4, 3), (7, 4), (3, 7), (2, 3), (6, 2)]
    again = Rotate.of("3", small[3], directions(small[3], 2, 1))
    assert compact(small, Plan((again,)), as_calls(X))[3].core.weight.shape[:2] == (1, 2)


# Holding ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 5), (4, None), (None, 6), (2, None)])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("make", [lambda: conv(kernel_size=3), linear])
def test_a_layer_in_training_stays_on_its_directions(make, rounds, inputs, outputs):
    model = nn.Sequential(make())
    if rounds == 2:
        model[0] = rotate(model[0], directions(model[0], 4, 6))
    kept = directions(model[0], inputs, outputs, seed=3)
    masks = Masks.pending(model, [Rotate.of("0", model[0], kept)])
    assert len(masks) == 1
    weight = factors_of(model[0])["core"].weight
    expected = projected(weight, kept)
    masks.apply_()
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-13)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    moved = weight.detach().clone()
    for seed in range(3):
        x = torch.randn(2, 4, 8, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        masks.apply_(optimizer)
        torch.testing.assert_close(weight.detach(), projected(weight, kept), rtol=0, atol=1e-13)
    assert not torch.allclose(weight, moved, atol=1e-2)


def test_half_precision_is_projected_in_float32_also_under_autocast():
    model = nn.Sequential(conv(kernel_size=3, dtype=torch.bfloat16))
    kept = directions(model[0], 2, 3)
    expected = projected(model[0].weight, kept).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        Masks.pending(model, [Rotate.of("0", model[0], kept)]).apply_()
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=2**-8, atol=1e-6)
    single = nn.Sequential(conv(kernel_size=3, dtype=torch.float32))
    expected = projected(single[0].weight, kept).float()
    with torch.autocast("cpu", torch.bfloat16):
        Masks.pending(single, [Rotate.of("0", single[0], kept)]).apply_()
    torch.testing.assert_close(single[0].weight.detach(), expected, rtol=0, atol=1e-6)


def test_an_augmented_layer_in_training_stays_on_its_directions_with_its_bias():
    model = nn.Sequential(linear())
    kept = directions(model[0], 2, 3, augmented=True)
    masks = Masks.pending(model, [Rotate.of("0", model[0], kept)])
    expected = projected(torch.cat([model[0].weight, model[0].bias[:, None]], 1), kept)
    masks.apply_()
    found = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


# Separable ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize(("inputs", "outputs"), [(3, 4), (None, 4), (3, None), (None, None)])
def test_a_separable_core_is_a_depthwise_convolution_and_computes_what_it_stands_for(inputs, outputs, mode):
    layer = conv(kernel_size=3, stride=2, padding=1, dilation=2, mode=mode)
    kept = directions(layer, inputs, outputs, separable=3)
    model = nn.Sequential(layer)
    plan, x = Plan((Rotate.of("0", layer, kept),)), example(layer)
    small = compact(model, plan, as_calls(x))
    mask_(model, plan)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)
    core = small[0].core
    assert (core.groups, core.in_channels, core.out_channels, core.stride, core.dilation) == (3, 3, 3, (2, 2), (2, 2))
    assert core.padding_mode == mode
    assert params_of(small) == 4 * 3 + 3 * 9 + 3 * 6 + 6
    assert torch.linalg.matrix_rank(layer.weight.detach().flatten(1)) == 3


def test_weights_move_the_error_of_a_separable_core_to_directions_that_do_not_count():
    layer = conv(kernel_size=3)
    errors = []
    for weights in (None, torch.tensor([100.0, 1, 1, 1]).double()):
        kept = directions(layer, 4, 6, separable=3, weights_in=weights)
        model = nn.Sequential(copy.deepcopy(layer))
        mask_(model, Plan((Rotate.of("0", layer, kept),)))
        errors.append(((model[0].weight - layer.weight).detach().flatten(2).transpose(1, 2) @ kept.inputs[:, 0]).norm())
    assert errors[1] < 0.5 * errors[0]


def test_a_separable_layer_is_not_rotated_again():
    layer = conv(kernel_size=3)
    small = rotate(layer, directions(layer, 3, 4, separable=3))
    with pytest.raises(ModelError, match="in 3 groups"):
        build_rotated(small, Form(2))
