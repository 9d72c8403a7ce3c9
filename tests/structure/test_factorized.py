"""Two thin layers against one dense layer with the truncated weight, for every form; costs against torch's own counter."""

import itertools

import pytest
import torch
from convolutions import EVEN, MODES, SIZE, example
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.errors import ModelError
from lightning_prune.structure.factorized import (
    Factorized,
    break_even_rank,
    build_factorized,
    cost,
    dense_cost,
    factorize,
    groups_of,
    kind_for,
    matrix_of,
    rank_limit,
    weight_of,
)

CONVS = [
    (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    (nn.Conv1d, {"kernel_size": 4, "dilation": 2, "padding": "same"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    (nn.Conv2d, {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2), "dilation": (2, 1)}),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (1, 3), "padding": (2, 1), "dilation": (1, 2)}),
    (nn.Conv2d, {"kernel_size": (2, 4), "dilation": (3, 1), "padding": "same"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "valid", "stride": 2}),
    (nn.Conv2d, {"kernel_size": 1, "stride": 2}),
    (nn.Conv2d, {"kernel_size": (1, 5), "padding": (0, 2)}),
    (nn.Conv3d, {"kernel_size": (3, 1, 2), "stride": (1, 2, 1), "padding": (1, 0, 1)}),
    (nn.Conv3d, {"kernel_size": 2, "padding": "same"}),
]


def conv(cls, groups=1, mode="zeros", bias=True, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return cls(4, 6, groups=groups, padding_mode=mode, bias=bias, dtype=dtype, **options)


def kinds_of(layer):
    if isinstance(layer, nn.Linear):
        return ("linear",)
    return ("channel", "spatial") if isinstance(layer, nn.Conv2d) else ("channel",)


def truncated(layer, kind, rank):
    """Twin: truncate the weight by torch's SVD, one group after the other, and put it into a copy of the dense layer."""
    twin = type(layer)(**constructor(layer))
    groups = getattr(layer, "groups", 1)
    blocks = []
    for block in layer.weight.detach().double().chunk(groups):
        out, inner, *kernel = block.shape
        matrix = block.reshape(out, -1)
        if kind == "spatial":
            matrix = block.permute(1, 2, 0, 3).reshape(inner * kernel[0], out * kernel[1])
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        near = (left[:, :rank] * values[:rank]) @ right[:rank]
        if kind == "spatial":
            near = near.reshape(inner, kernel[0], out, kernel[1]).permute(2, 0, 1, 3)
        blocks.append(near.reshape(block.shape))
    twin.load_state_dict({**layer.state_dict(), "weight": torch.cat(blocks)})
    return twin


def constructor(layer):
    if isinstance(layer, nn.Linear):
        names = {"in_features": layer.in_features, "out_features": layer.out_features}
    else:
        keys = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        names = {key: getattr(layer, key) for key in keys}
    return names | {"bias": layer.bias is not None, "dtype": layer.weight.dtype}


def assert_equal_to_truncated(layer, tolerance):
    x = example(layer)
    for kind in kinds_of(layer):
        limit = rank_limit(layer, kind)
        for rank in {1, max(1, limit // 2), limit}:
            small, twin = factorize(layer, kind, rank), truncated(layer, kind, rank)
            torch.testing.assert_close(small(x), twin(x), rtol=0, atol=tolerance)
            assert small.first.weight.shape[0] == rank * groups_of(layer)


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("cls", "options"), CONVS, ids=str)
def test_factorized_equals_the_truncated_convolution(cls, options, mode):
    assert_equal_to_truncated(conv(cls, mode=mode, **options), 1e-12)


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("cls", "options"), CONVS, ids=str)
def test_factorized_equals_the_truncated_grouped_convolution(cls, options, bias):
    assert_equal_to_truncated(conv(cls, groups=2, bias=bias, **options), 1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inner", "out"), [(7, 4), (4, 7), (5, 1)])
def test_factorized_equals_the_truncated_linear(inner, out, bias):
    torch.manual_seed(0)
    assert_equal_to_truncated(nn.Linear(inner, out, bias=bias, dtype=torch.float64), 1e-12)


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize(("cls", "options"), CONVS, ids=str)
def test_factorized_equals_the_truncated_convolution_in_float32(cls, options):
    assert_equal_to_truncated(conv(cls, groups=2, dtype=torch.float32, **options), 1e-5)


def test_factorized_equals_truncated_at_depthwise_multiplier_and_without_batch():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 12, 3, groups=3, padding=1, dtype=torch.float64)
    x = torch.randn(3, 6, 7, dtype=torch.float64)
    for kind in ("channel", "spatial"):
        torch.testing.assert_close(factorize(layer, kind, 2)(x), truncated(layer, kind, 2)(x), rtol=0, atol=1e-12)


def test_full_rank_computes_what_the_dense_layer_computes():
    layer = conv(nn.Conv2d, groups=2, kernel_size=3, padding=1, mode="reflect")
    for kind in ("channel", "spatial"):
        x = example(layer)
        torch.testing.assert_close(factorize(layer, kind, rank_limit(layer, kind))(x), layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("cls", "kernel"), [(nn.Conv1d, 3), (nn.Conv2d, (2, 3)), (nn.Conv3d, (1, 2, 3))])
def test_weight_of_inverts_matrix_of(cls, kernel, groups):
    layer = conv(cls, groups=groups, kernel_size=kernel)
    for kind in kinds_of(layer):
        matrix = matrix_of(layer.weight, kind, groups)
        assert matrix.shape[0] == groups
        assert rank_limit(layer, kind) == min(matrix.shape[1:])
        assert torch.equal(weight_of(matrix, kind, layer.weight.shape), layer.weight)


def test_factors_of_equal_norm_keep_the_bias_and_leave_the_layer_alone():
    layer = conv(nn.Conv2d, kernel_size=3)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    small = factorize(layer, "channel", 3)
    torch.testing.assert_close(small.first.weight.norm(), small.second.weight.norm())
    assert small.first.bias is None
    assert torch.equal(small.second.bias, layer.bias)
    with torch.no_grad():
        small.second.bias.zero_()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_factorized_is_two_plain_layers_with_a_strict_state_dict():
    layer = conv(nn.Conv2d, kernel_size=3)
    small = factorize(layer, "spatial", 2)
    assert isinstance(small, Factorized)
    assert {name: type(child) for name, child in small.named_children()} == {"first": nn.Conv2d, "second": nn.Conv2d}
    assert list(small.state_dict()) == ["first.weight", "second.weight", "second.bias"]
    fresh = build_factorized(layer, "spatial", 2)
    fresh.load_state_dict(small.state_dict(), strict=True)
    x = example(layer)
    assert torch.equal(fresh(x), small(x))


@pytest.mark.parametrize("make", [build_factorized, factorize])
def test_dtype_training_flag_and_requires_grad_are_kept(make):
    layer = conv(nn.Conv2d, kernel_size=3, dtype=torch.bfloat16).eval()
    layer.weight.requires_grad_(False)
    small = make(layer, "channel", 2)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in small.modules())
    assert {name: p.requires_grad for name, p in small.named_parameters()} == {
        "first.weight": False,
        "second.weight": False,
        "second.bias": True,
    }


def test_building_draws_no_random_number_and_works_on_meta():
    state = torch.get_rng_state()
    layer = nn.Conv2d(4, 6, 3, device="meta")
    small = build_factorized(layer, "channel", 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.device.type for p in small.parameters()} == {"meta"}
    with pytest.raises(ModelError, match="load its weights first"):
        factorize(layer, "channel", 2)


@pytest.mark.parametrize(
    ("layer", "kind", "rank", "message"),
    [
        (nn.Linear(3, 4), "channel", 1, "take 'linear'"),
        (nn.Conv2d(3, 4, 3), "linear", 1, "take 'channel'"),
        (nn.Conv3d(3, 4, 3), "spatial", 1, "'spatial' is for Conv2d only"),
        (nn.Conv1d(3, 4, 3), "spatial", 1, "'spatial' is for Conv2d only"),
        (nn.Linear(3, 4), "linear", 4, "take 1 to 3"),
        (nn.Linear(3, 4), "linear", 0, "take 1 to 3"),
        (nn.ConvTranspose2d(3, 4, 3), "channel", 1, "ConvTranspose2d has no factorized form"),
    ],
)
def test_impossible_forms_are_refused_with_what_is_allowed(layer, kind, rank, message):
    for make in (build_factorized, factorize):
        with pytest.raises(ModelError, match=message):
            make(layer, kind, rank)


def test_scheme_is_used_only_where_the_kernel_has_two_axes():
    assert kind_for(nn.Conv2d(3, 4, 3), "spatial") == "spatial"
    assert kind_for(nn.Conv2d(3, 4, 3), "channel") == "channel"
    assert kind_for(nn.Linear(3, 4), "spatial") == "linear"
    for layer in (nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, (1, 3)), nn.Conv1d(3, 4, 3), nn.Conv3d(3, 4, 3)):
        assert kind_for(layer, "spatial") == "channel"


def flops_of(module, x):
    """Torch's own counter, which counts a multiply-add as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops() // 2


def params_of(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("cls", "options"), CONVS, ids=str)
def test_costs_of_convolutions_equal_torchs_counter(cls, options, groups):
    layer = conv(cls, groups=groups, **options)
    x = example(layer, batch=3)
    shapes = [(x.shape, layer(x).shape)]
    assert dense_cost(layer, shapes) == (params_of(layer), flops_of(layer, x))
    for kind, rank in itertools.product(kinds_of(layer), (1, 2)):
        small = factorize(layer, kind, rank)
        assert cost(layer, kind, rank, shapes) == (params_of(small), flops_of(small, x))


def test_costs_of_linears_and_of_several_calls_equal_torchs_counter():
    layer = nn.Linear(7, 4)
    inputs = [torch.randn(3, 5, 7), torch.randn(2, 7), torch.randn(7)]
    shapes = [(x.shape, layer(x).shape) for x in inputs]
    small = factorize(layer, "linear", 2)
    assert dense_cost(layer, shapes) == (params_of(layer), sum(flops_of(layer, x) for x in inputs))
    assert cost(layer, "linear", 2, shapes) == (params_of(small), sum(flops_of(small, x) for x in inputs))


def test_cost_of_a_convolution_without_batch_is_that_of_a_batch_of_one():
    layer = nn.Conv2d(4, 6, 3)
    x = torch.randn(4, 8, 8)
    assert cost(layer, "spatial", 2, [(x.shape, layer(x).shape)]) == cost(
        layer, "spatial", 2, [(x[None].shape, layer(x[None]).shape)]
    )


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("cls", "options"), CONVS, ids=str)
def test_break_even_rank_is_the_last_that_is_cheaper_in_both(cls, options, groups):
    torch.manual_seed(0)
    layer = cls(8, 12, groups=groups, **options)
    x = torch.randn(1, 8, *SIZE[cls])
    shapes = [(x.shape, layer(x).shape)]
    dense = dense_cost(layer, shapes)
    for kind in kinds_of(layer):
        found = break_even_rank(layer, kind, shapes)
        cheaper = []
        for rank in range(1, rank_limit(layer, kind) + 1):
            price = cost(layer, kind, rank, shapes)
            cheaper.append(price.params < dense.params and price.flops < dense.flops)
        assert found == sum(cheaper)
        assert cheaper == [True] * found + [False] * (len(cheaper) - found)


def test_layers_that_gain_nothing_or_are_never_called_have_no_break_even_rank():
    assert break_even_rank(nn.Linear(50, 50), "linear", []) == 0
    assert break_even_rank(nn.Linear(50, 1), "linear", [((2, 50), (2, 1))]) == 0
    depthwise = nn.Conv2d(6, 6, 3, groups=6)
    assert break_even_rank(depthwise, "channel", [((1, 6, 8, 8), (1, 6, 6, 6))]) == 0
