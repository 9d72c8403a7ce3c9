"""A convolution as a linear map over its flattened input: the same function, for one size."""

import copy

import pytest
import torch
from convolutions import EVEN, MODES
from torch import nn

from lightning_prune.errors import ModelError, PlanError
from lightning_prune.structure.plan import Origin, Plan
from lightning_prune.structure.steps import Unroll, read_step
from lightning_prune.structure.surgery import compact
from lightning_prune.structure.unrolled import build_unrolled, unroll, unrolled_shapes, why_not_unrolled

LAYERS = [
    (nn.Conv1d, {"kernel_size": 4, "dilation": 2, "padding": "same"}, (9,)),
    (nn.Conv2d, {"kernel_size": 3, "stride": (1, 2), "padding": (2, 1)}, (4, 5)),
    (nn.Conv2d, {"kernel_size": (2, 3), "groups": 2, "bias": False}, (4, 5)),
    (nn.Conv2d, {"kernel_size": 5, "padding": "valid"}, (5, 5)),
    (nn.Conv3d, {"kernel_size": 2, "stride": 2, "padding": 1}, (3, 4, 2)),
]


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("cls", "options", "extent"), LAYERS)
def test_the_linear_map_computes_the_convolution_and_its_gradients(cls, options, extent, mode):
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        layer = cls(4, 6, padding_mode=mode, dtype=dtype, **options).eval()
        made = unroll(layer, extent)
        assert not made.training
        for shape in ((3, 4, *extent), (4, *extent)):
            x = torch.randn(shape, dtype=dtype)
            grads = []
            for module in (layer, made):
                leaf = x.clone().requires_grad_()
                y = module(leaf)
                (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
                grads.append((y.detach(), leaf.grad))
            torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=tolerance)


def test_the_matrix_of_a_kernel_as_large_as_its_map_is_the_kernel():
    layer = nn.Conv2d(16, 120, 5)
    linear = unroll(layer, (5, 5)).linear
    torch.testing.assert_close(linear.weight, layer.weight.flatten(1), rtol=0, atol=0)
    torch.testing.assert_close(linear.bias, layer.bias, rtol=0, atol=0)


def test_flags_types_and_devices_are_those_of_the_convolution():
    layer = nn.Conv2d(2, 3, 3).bfloat16().requires_grad_(False)
    layer.bias.requires_grad_(True)
    for made in (build_unrolled(layer, (4, 4)), unroll(layer, (4, 4))):
        assert {name: (p.dtype, p.requires_grad) for name, p in made.named_parameters()} == {
            "linear.weight": (torch.bfloat16, False),
            "linear.bias": (torch.bfloat16, True),
        }
    assert build_unrolled(nn.Conv2d(2, 3, 3, device="meta"), (4, 4)).linear.weight.is_meta


def test_another_size_too_large_a_matrix_and_several_sizes_are_refused():
    layer = nn.Conv2d(3, 8, 3, padding=1)
    with pytest.raises(ModelError, match=r"unrolled for inputs of \[3, 6, 6\] and got \[2, 3, 6, 7\]"):
        unroll(layer, (6, 6))(torch.zeros(2, 3, 6, 7))
    with pytest.raises(ModelError, match=r"524,288 x 196,608"):
        unrolled_shapes(layer, (256, 256))
    with pytest.raises(ModelError, match="takes no maps"):
        unrolled_shapes(nn.Conv2d(3, 8, 5), (4, 4))
    with pytest.raises(ModelError, match="2 axes"):
        unrolled_shapes(layer, (4,))
    calls = [((1, 3, 4, 4), (1, 8, 4, 4)), ((1, 3, 5, 4), (1, 8, 5, 4))]
    assert why_not_unrolled(layer, calls).startswith("it is called with maps of 4x4 and 5x4")
    assert why_not_unrolled(layer, calls[:1]) is None


def test_the_step_is_data_that_is_built_taken_and_undone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()).eval()
    step = Unroll.of("0", model[0], (5, 6))
    assert read_step(step.to_dict()) == step
    plan = Plan((step,), origin=Origin.of(model, 0))
    small = compact(model, plan)
    x = torch.randn(2, 3, 5, 6)
    torch.testing.assert_close(small(x), model(x))
    again = copy.deepcopy(model)
    plan.build(again)
    state = small.state_dict()
    again.load_state_dict({key: value for key, value in state.items() if "plan" not in key})
    torch.testing.assert_close(again(x), model(x))
    step.undo(again)
    assert repr(again[0]) == repr(model[0])
    assert step.summary()["after"] == "Linear 16x90"


@pytest.mark.parametrize("broken", [{"extent": [2, 2]}, {"extent": [0, 5]}, {"extent": "55"}, {"extent": [5]}])
def test_a_broken_step_is_refused(broken):
    fields = Unroll.of("0", nn.Conv2d(3, 4, 3), (5, 5)).to_dict()
    with pytest.raises(PlanError, match="'0'"):
        read_step(fields | broken)
