"""Layers whose weight is a matrix product operator."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from lightning_prune.errors import ModelError
from lightning_prune.flops import count_flops
from lightning_prune.structure.layers import DenseLayer
from lightning_prune.structure.mpo import WAYS, build_mpo, tensor_of, weight_from
from lightning_prune.structure.tensor_train import Form, balance, modes_for, tt_svd, useful_bonds

LAYERS = {
    "linear": lambda: (nn.Linear(12, 20), torch.randn(3, 12)),
    "filled up": lambda: (nn.Linear(13, 7), torch.randn(2, 5, 13)),
    "vector": lambda: (nn.Linear(6, 4, bias=False), torch.randn(6)),
    "stride": lambda: (nn.Conv2d(5, 12, 3, stride=2, padding=1), torch.randn(2, 5, 9, 7)),
    "circular": lambda: (
        nn.Conv2d(12, 7, (3, 2), padding="same", dilation=2, padding_mode="circular"),
        torch.randn(2, 12, 9, 8),
    ),
    "reflect": lambda: (
        nn.Conv2d(4, 6, 3, stride=(1, 2), padding=(2, 1), padding_mode="reflect"),
        torch.randn(2, 4, 5, 6),
    ),
    "valid": lambda: (nn.Conv2d(4, 6, (1, 3), padding="valid"), torch.randn(1, 4, 5, 6)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 4, padding=2, bias=False), torch.randn(2, 4, 11)),
    "conv3d": lambda: (nn.Conv3d(4, 6, 2, stride=(1, 2, 1), padding=(0, 1, 1)), torch.randn(2, 4, 5, 6, 7)),
    "unbatched": lambda: (nn.Conv2d(6, 8, 1), torch.randn(6, 4, 4)),
}


def form_of(layer: DenseLayer, count: int, bonds=None) -> Form:
    outputs, inputs, *kernel = layer.weight.shape
    positions = math.prod(kernel) if kernel else 0
    form = Form(*modes_for(outputs, inputs, count), (1,) * (count - 1 + bool(kernel)), positions)
    return form.with_bonds(useful_bonds(form.sizes, bonds))


def converted(layer: DenseLayer, count: int = 2, bonds=None, train="auto"):
    form = form_of(layer, count, bonds)
    small = build_mpo(layer, form, train)
    small.fill(balance(tt_svd(tensor_of(layer, form), form.bonds).cores), layer.bias)
    return small


def by_each_way(layer, x, monkeypatch):
    for way in WAYS["auto"]:
        monkeypatch.setattr(layer, "way", lambda *_, way=way: way, raising=False)
        yield way, layer(x)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_at_full_bonds_every_way_computes_what_the_dense_layer_does(name, count, monkeypatch):
    torch.manual_seed(0)
    layer, x = LAYERS[name]()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        layer, x = layer.to(dtype), x.to(dtype)
        for _, y in by_each_way(converted(layer, count), x, monkeypatch):
            torch.testing.assert_close(y, layer(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", LAYERS)
def test_truncated_every_way_computes_with_the_truncated_weight_and_the_same_gradients(name, monkeypatch):
    torch.manual_seed(1)
    layer, x = LAYERS[name]()
    layer, x = layer.double(), x.double().requires_grad_()
    small = converted(layer, 2, 3)
    form = form_of(layer, 2, 3)
    weight = weight_from(tt_svd(tensor_of(layer, form), form.bonds).cores, form, layer.weight.shape)
    torch.testing.assert_close(small.dense_weight(), weight, rtol=0, atol=1e-12)
    with torch.no_grad():
        layer.weight.copy_(weight)
    found = []
    for _, y in by_each_way(small, x, monkeypatch):
        torch.testing.assert_close(y, layer(x), rtol=0, atol=1e-12)
        found.append(torch.autograd.grad(y.square().sum(), [x, *small.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[0][0], torch.autograd.grad(layer(x).square().sum(), x)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["filled up", "stride"])
def test_gradients_are_those_of_finite_differences(name, monkeypatch):
    layer, x = LAYERS[name]()
    small, x = converted(layer.double(), 3, 2), x.double()[:1]
    names = [name for name, _ in small.named_parameters()]

    def function(*values):
        return torch.func.functional_call(small, dict(zip(names, values, strict=True)), x)

    for way in WAYS["auto"]:
        monkeypatch.setattr(small, "way", lambda *_, way=way: way, raising=False)
        assert torch.autograd.gradcheck(function, tuple(small.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("count", [2, 3])
def test_what_is_counted_is_what_the_form_says(name, count, monkeypatch):
    layer, x = LAYERS[name]()
    small = converted(layer, count, 2)
    y = small(x)
    positions = [
        t.numel() // t.shape[-1] if isinstance(layer, nn.Linear) else t.numel() // t.shape[-len(layer.kernel_size) - 1]
        for t in (y, x)
    ]
    model = nn.Sequential(small)
    assert sum(p.numel() for p in small.cores) == small.form.params
    for way, _ in by_each_way(small, x, monkeypatch):
        expected = small.form.multiply_adds(*positions)[way]
        if way == "dense":  # what was filled up is cut off before it multiplies
            filled = small.form.rows * small.form.columns - math.prod(small.weight_shape[:2])
            expected -= filled * max(1, small.form.kernel) * positions[0]
        assert count_flops(model, x).total == expected


def test_training_contracts_as_told():
    layer = nn.Linear(64, 64)
    assert converted(layer, train="reconstruct").way(1) == "dense"
    assert converted(layer, bonds=64, train="factorized").way(4096) == "left"
    assert converted(layer, train="reconstruct", bonds=2).eval().way(1) == "left"


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(64, 64), (64,)), (nn.Conv2d(16, 16, 3), (16, 5, 5))], ids=["linear", "convolution"]
)
def test_one_compiled_graph_serves_batches_that_are_contracted_in_different_ways(layer, shape):
    small = converted(layer, bonds=4).eval()
    positions = (9, 25) if small.form.kernel else (1, 1)
    assert len({small.way(batch * positions[0], batch * positions[1]) for batch in (1, 2, 3, 64)}) == 2
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    for batch in (1, 2, 3, 64):
        x = torch.randn(batch, *shape)
        torch.testing.assert_close(compiled(x), small(x))


@pytest.mark.parametrize(
    ("layer", "shape", "match"),
    [
        (nn.Linear(16, 9), (3, 32), r"width 16; got \[3, 32\]"),
        (nn.Conv2d(4, 9, 3), (3, 8, 5, 5), r"4 channels and 2 axes; got \[3, 8, 5, 5\]"),
        (nn.Conv2d(4, 9, 3), (8, 5, 5), r"4 channels and 2 axes; got \[1, 8, 5, 5\]"),
        (nn.Conv1d(4, 9, 3), (2, 2, 4, 5), r"4 channels and 1 axes"),
    ],
)
def test_inputs_of_another_size_are_refused_also_where_they_could_be_cut_into_more_rows(layer, shape, match):
    with pytest.raises(ModelError, match=match):
        converted(layer)(torch.zeros(shape))


def test_flags_types_and_sizes_are_those_of_the_dense_layer():
    layer = nn.Conv2d(4, 6, 3, bias=False).bfloat16().eval().requires_grad_(False)
    small = build_mpo(layer, form_of(layer, 2, 2))
    assert not small.training
    assert {(p.dtype, p.requires_grad) for p in small.parameters()} == {(torch.bfloat16, False)}
    assert (small.in_channels, small.out_channels, small.bias) == (4, 6, None)
    assert build_mpo(nn.Linear(5, 7, device="meta"), form_of(nn.Linear(5, 7), 2)).cores[0].is_meta


def test_it_survives_copies_files_and_states():
    layer, x = LAYERS["stride"]()
    small = converted(layer, 2, 4)
    fresh = build_mpo(layer, small.form)
    fresh.load_state_dict(small.state_dict())
    buffer = io.BytesIO()
    torch.save(small, buffer)
    others = [
        fresh,
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False),
    ]
    for other in others:
        assert torch.equal(other(x), small(x))
    assert set(small.state_dict()) == {"cores.0", "cores.1", "cores.2", "bias"}


@pytest.mark.parametrize("name", ["filled up", "circular"])
def test_an_exported_graph_holds_no_dense_weight_and_takes_any_batch(name):
    layer, x = LAYERS[name]()
    small = converted(layer, 2, 2).eval()
    x = torch.cat([x, x])
    program = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    found = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    fixed = [value for value in found if all(isinstance(size, int) for size in value.shape)]
    assert 0 < max(value.numel() for value in fixed) < layer.weight.numel()
    for batch in (2, 5, 300):
        y = torch.cat([x] * 150)[:batch]
        torch.testing.assert_close(program.module()(y), small(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "stride"])
def test_mixed_precision_gives_the_type_that_the_dense_layer_gives(name, monkeypatch):
    layer, x = LAYERS[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _, y in by_each_way(converted(layer), x, monkeypatch):
            torch.testing.assert_close(y, layer(x), rtol=0.05, atol=0.05)


def test_wrong_forms_are_refused():
    with pytest.raises(ModelError, match="12 outputs and 5 inputs"):
        build_mpo(nn.Linear(5, 12), Form((2, 5), (2, 3), (1,)))
    with pytest.raises(ModelError, match="9 positions"):
        build_mpo(nn.Conv2d(4, 4, 3), Form((2, 2), (2, 2), (1, 1), 4))
    with pytest.raises(ModelError, match="one group"):
        build_mpo(nn.Conv2d(4, 4, 3, groups=2), Form((2, 2), (2, 2), (1, 1), 9))
    for kind in (nn.Bilinear(2, 2, 2), nn.ConvTranspose2d(2, 2, 2)):
        with pytest.raises(ModelError, match="no form"):
            build_mpo(kind, Form((2,), (2,), ()))
