import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.errors import ModelError, OptionError
from lightning_prune.flops import FlopCountAnalysis, count_flops
from lightning_prune.structure.calls import Call, as_calls, signature
from lightning_prune.structure.operators import einsum_multiply_adds
from tests.networks import NETWORKS, Attention, TwoInputs, conv_bn, resnet18
from tests.structure.test_preserve import dice, photograph, trained

ESTIMATES = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "adaptive_avg_pool2d"}


class Does(nn.Module):
    """Calls a function on its inputs and on parameters of given shapes."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.weights)


def torch_counts(model: nn.Module, example: Any) -> float:
    """Multiply-adds of matrix products and convolutions by torch's own counter, which looks below ``torch.jit``."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")
            with (
                torch.no_grad(),
                sdpa_kernel(SDPBackend.MATH),
                torch.backends.mkldnn.flags(enabled=False),
                FlopCounterMode(display=False) as counter,
            ):
                as_calls(example)[0].run(model.eval())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", NETWORKS)
def test_products_and_convolutions_equal_torchs_own_counter(name):
    model, example = NETWORKS[name]()
    count = count_flops(model, example)
    estimates = sum(flops for operator, flops in count.by_operator.items() if operator in ESTIMATES)
    assert count.total - estimates == torch_counts(model, example) > 0
    assert count.uncounted == {}


def test_resnet18_equals_torchs_own_counter_on_the_meta_device():
    count = count_flops(resnet18(1000), torch.randn(2, 3, 64, 64))
    with torch.device("meta"):
        expected = torch_counts(resnet18(1000), torch.randn(2, 3, 64, 64))
    assert count.by_operator["conv"] + count.by_operator["linear"] == expected == 297_115_648
    assert count.total == 297_930_752  # with the norms and the pooling that fvcore adds


@pytest.mark.parametrize("name", ["resnet18", "conv_bn", "conv1d", "conv3d"])
def test_where_fvcore_misses_nothing_the_count_is_fvcores(name):
    model, x = NETWORKS[name]()
    bare = FlopCountAnalysis(model.eval(), x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    count = count_flops(model, x)
    assert count.total == bare.total()
    assert count.by_module == {name: flops for name, flops in bare.by_module().items() if name in count.by_module}
    assert count.by_operator == {name: flops for name, flops in bare.by_operator().items() if flops}


def test_one_multiply_add_is_one_flop():
    assert count_flops(nn.Linear(1, 1), torch.zeros(1, 1)).total == 1
    assert count_flops(nn.Linear(5, 7), torch.zeros(3, 5)).total == 3 * 5 * 7
    assert count_flops(nn.Conv2d(4, 6, 3, groups=2), torch.zeros(2, 4, 5, 5)).total == 2 * 6 * 9 * 2 * 9


STEP = {"LSTM": 4, "GRU": 3, "RNN": 1}


@pytest.mark.parametrize("kind", STEP)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrent_layers_in_closed_form(kind, layers, both, batch_first):
    n, t, f, h = 2, 7, 3, 5
    model = getattr(nn, kind)(f, h, layers, bidirectional=both, batch_first=batch_first)
    x = torch.zeros((n, t, f) if batch_first else (t, n, f))
    ways = 1 + both
    widths = [f] + [ways * h] * (layers - 1)
    expected = sum(n * t * ways * STEP[kind] * h * (width + h) for width in widths)
    assert count_flops(model, x).total == expected


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projected_lstm_in_closed_form():
    n, t, f, h, p = 2, 7, 3, 5, 4
    count = count_flops(nn.LSTM(f, h, proj_size=p, bias=False), torch.zeros(t, n, f))
    assert count.by_operator == {"lstm": n * t * (4 * h * (f + p) + h * p)}


@pytest.mark.parametrize("kind", STEP)
def test_packed_sequences_count_their_real_steps(kind):
    layer = getattr(nn, kind)(3, 5)
    model = Does(lambda x: layer(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 4])))[0].data)
    model.layer = layer
    assert count_flops(model, torch.zeros(7, 2, 3)).total == (7 + 4) * STEP[kind] * 5 * (3 + 5)


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
def test_recurrent_cells_in_closed_form(cell):
    assert count_flops(getattr(nn, cell)(3, 5), torch.zeros(2, 3)).total == 2 * STEP[cell[:-4]] * 5 * (3 + 5)


def test_attention_in_closed_form():
    n, h, length, source, e, ev = 2, 3, 5, 7, 4, 6
    q, k, v = torch.zeros(n, h, length, e), torch.zeros(n, h, source, e), torch.zeros(n, h, source, ev)
    count = count_flops(Does(F.scaled_dot_product_attention), (q, k, v))
    assert count.by_operator == {"scaled_dot_product_attention": n * h * length * source * (e + ev)}


def test_grouped_query_attention_counts_the_heads_of_the_queries():
    q, k = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
    model = Does(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    assert count_flops(model, (q, k, k)).total == 2 * 4 * 5 * 7 * (8 + 8)


@pytest.mark.parametrize("weights", [False, True])
def test_multihead_attention_is_the_same_with_and_without_its_fast_path(weights):
    n, t, e = 2, 5, 8
    attention = nn.MultiheadAttention(e, 2, batch_first=True)
    model = Does(lambda x: attention(x, x, x, need_weights=weights))
    model.attention = attention
    assert torch.backends.mha.get_fastpath_enabled()
    assert count_flops(model, torch.zeros(n, t, e)).total == n * t * 4 * e * e + 2 * n * t * t * e
    assert torch.backends.mha.get_fastpath_enabled()


def test_padded_transformer_is_counted_without_nested_tensors():
    model, x = NETWORKS["transformer"]()
    plain = count_flops(model, x)
    padded = count_flops(model, {"src": x, "src_key_padding_mask": torch.arange(5)[None].expand(2, 5) > 2})
    assert padded.total == plain.total
    assert padded.uncounted == {}


EINSUMS = [
    ("ij,jk->ik", (3, 4), (4, 5)),
    ("ij,jk", (3, 4), (4, 5)),
    ("ij, kj -> ik", (2, 3), (4, 3)),
    ("bij,bjk->bik", (2, 3, 4), (2, 4, 5)),
    ("...ij,jk->...ik", (7, 2, 3, 4), (4, 5)),
    ("...ij,...jk", (2, 3, 4), (1, 4, 5)),
    ("bhqd,bhkd->bhqk", (2, 3, 4, 5), (2, 3, 6, 5)),
    ("ij,jk,kl->il", (2, 4), (4, 5), (5, 6)),
    ("ab,cd,bc,de->ae", (2, 3), (4, 5), (3, 4), (5, 6)),
    ("ijk,jl,km->ilm", (2, 3, 4), (3, 5), (4, 6)),
    ("ij,ij->", (3, 4), (3, 4)),
    ("ij,jk->i", (3, 4), (4, 5)),
    ("a...,a...->...", (3, 2), (3, 2)),
    ("i,j->ij", (3,), (4,)),
    ("ij,jk->ik", (3, 1), (4, 5)),  # spread over the summed index: torch sums the other operand first
    ("ii,i->i", (3, 3), (3,)),
    ("zy,yx", (12345, 3), (3, 7)),  # fvcore rounds to four digits
]


@pytest.mark.parametrize("case", EINSUMS, ids=str)
def test_einsum_equals_torchs_own_counter(case):
    equation, first, *others = case
    model, x = Does(lambda *operands: torch.einsum(equation, *operands), *others), torch.randn(first)
    count = count_flops(model, x)
    assert count.total == torch_counts(model, x)
    assert count.uncounted == {}


@pytest.mark.parametrize("path", [None, [0, 1, 0, 1], [1, 2, 0, 1], [2, 0, 1, 0], [0, 2, 0, 1]])
def test_einsum_follows_the_path_that_torch_is_given(path):
    equation, shapes = "ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)]
    with FlopCounterMode(display=False) as counter:
        torch._VF.einsum(equation, [torch.zeros(s) for s in shapes], path=path)
    assert einsum_multiply_adds(equation, shapes, path) == counter.get_total_flops() / 2


def test_a_chain_over_a_bond_of_size_one_is_not_free():
    assert einsum_multiply_adds("ij,jk->ik", [(3, 1), (1, 5)]) == 15


PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    "matmul spread over batches": (torch.matmul, (3, 4), ((2, 6, 4, 5),)),
    "matrix times vector": (torch.matmul, (2, 3, 4), ((4,),)),
    "vector times matrix": (torch.matmul, (4,), ((4, 5),)),
    "dot": (torch.dot, (4,), ((4,),)),
    "mv": (torch.mv, (3, 4), ((4,),)),
    "mm into out": (lambda x, w: torch.mm(x, w, out=torch.empty(3, 5)), (3, 4), ((4, 5),)),
    "addmm": (lambda x, w: torch.addmm(torch.zeros(5), x, w), (3, 4), ((4, 5),)),
    "baddbmm": (lambda x, w: torch.baddbmm(torch.zeros(1), x, w), (2, 3, 4), ((2, 4, 5),)),
    "addbmm": (lambda x, w: torch.addbmm(torch.zeros(3, 5), x, w), (2, 3, 4), ((2, 4, 5),)),
    "addmv": (lambda x, w: torch.addmv(torch.zeros(3), x, w), (3, 4), ((4,),)),
    "inner": (torch.inner, (2, 3, 4), ((5, 4),)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, ([1, 2], [0, 1])), (3, 4, 5), ((4, 5, 6),)),
    "bare linear": (F.linear, (2, 3, 4), ((5, 4), (5,))),
    "linear to a scalar": (F.linear, (3, 4), ((4,),)),
    "bare convolution": (F.conv2d, (2, 3, 6, 6), ((4, 3, 3, 3),)),
    "same padding": (lambda x, w: F.conv1d(x, w, padding="same", groups=2), (2, 4, 9), ((6, 2, 3),)),
    "unbatched convolution": (F.conv2d, (3, 6, 6), ((4, 3, 3, 3),)),
    "transposed convolution": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2, groups=3),
        (2, 6, 4, 4),
        ((6, 5, 3, 3),),
    ),
    "under vmap": (lambda x, w: torch.vmap(lambda row: row @ w)(x), (3, 4), ((4, 5),)),
}
# Torch's counter knows products of matrices only, not those with vectors, and no addbmm.
UNKNOWN_TO_TORCH = {"dot": 4, "mv": 12, "addmv": 12, "matrix times vector": 24, "linear to a scalar": 12, "addbmm": 120}


@pytest.mark.parametrize("name", PRODUCTS)
def test_variants_of_products_equal_torchs_own_counter(name):
    function, first, others = PRODUCTS[name]
    model, x = Does(function, *others), torch.randn(first)
    count = count_flops(model, x)
    assert count.total == (UNKNOWN_TO_TORCH.get(name) or torch_counts(model, x)) > 0
    assert count.uncounted == {}


def test_norms_are_priced_alike_in_any_number_of_dimensions():
    assert count_flops(nn.LayerNorm(3), torch.zeros(1, 2, 1, 1, 2, 3)).total == 5 * 12
    assert count_flops(nn.LayerNorm(3, elementwise_affine=False), torch.zeros(3)).total == 4 * 3
    assert count_flops(nn.RMSNorm(3), torch.zeros(2, 3)).total == 5 * 6


@torch.library.custom_op("lightning_prune_tests::product", mutates_args=())
def product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        return (x @ w) ** 2


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        return x * w.sum() / 2


REPORTED: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], str]] = {
    "custom operator": (product, ((4, 4),), "lightning_prune_tests::product"),
    "bilinear": (lambda x, w: F.bilinear(x, x, w), ((2, 4, 4),), "bilinear"),
    "distances": (torch.cdist, ((5, 4),), "cdist"),
    "matrix function": (lambda x, w: x @ torch.linalg.matrix_exp(w), ((4, 4),), "linalg_matrix_exp"),
    "chain": (lambda x, a, b: torch.linalg.multi_dot([x, a, b]), ((4, 5), (5, 6)), "linalg_multi_dot"),
    "transform": (lambda x: torch.fft.rfft(x).abs(), (), "fft_rfft"),
    "autograd function": (Squared.apply, ((4, 4),), "Squared"),
}


@pytest.mark.parametrize("name", REPORTED)
def test_an_operation_that_may_hold_products_is_a_warning_naming_it(name):
    function, shapes, operator = REPORTED[name]
    with pytest.warns(UserWarning, match=rf"FLOPs of Does leave out .*{operator} \(2x\)"):
        count = count_flops(Does(lambda x, *w: (function(x, *w), function(x + 1, *w)), *shapes), torch.randn(3, 4))
    assert count.uncounted == {operator: 2}
    assert f"not counted: {operator} (2x)" in str(count)


def test_a_parameter_in_an_unknown_operation_is_reported_also_behind_views_and_masks():
    operation = lambda x, w: torch.renorm((w * (w > 0)).T.contiguous(), 2, 0, 1.0).sum() * x  # noqa: E731
    with pytest.warns(UserWarning, match="renorm"):
        assert count_flops(Does(operation, (4, 4)), torch.randn(2, 4)).uncounted == {"renorm": 1}
    assert count_flops(Does(lambda x: torch.renorm(x.T.contiguous(), 2, 0, 1.0)), torch.randn(2, 4)).uncounted == {}


FREE: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "scale and shift": (lambda x, a, b: torch.addcmul(b, x, a), ((4,), (4,))),
    "choice": (lambda x, w: torch.where(x > 0, x * w, w), ((4,),)),
    "slopes": (F.prelu, ((4,),)),
    "token": (lambda x, w: torch.cat([w.expand(3, -1), x], 1), ((1, 4),)),
    "table": (lambda x, w: F.embedding(x.long().abs() % 2, w), ((2, 3),)),
    "softmax of a parameter": (lambda x, w: x * w.softmax(0).cumsum(0), ((4,),)),
    "activations": (lambda x: F.gelu(F.silu(F.hardswish(x))).softmax(-1).sort().values, ()),
    "pooling and resampling": (lambda x: F.interpolate(F.max_pool1d(x[None], 2), 8, mode="linear"), ()),
    "element-wise autograd function": (Halved.apply, ((4,),)),
}


@pytest.mark.parametrize("name", FREE)
def test_element_wise_operations_and_moves_of_parameters_are_silently_free(name):
    function, shapes = FREE[name]
    count = count_flops(Does(function, *shapes), torch.randn(3, 4))  # a warning would be an error
    assert (count.total, count.uncounted) == (0, {})


@pytest.mark.parametrize("name", NETWORKS)
def test_modules_sum_up(name):
    model, example = NETWORKS[name]()
    count = count_flops(model, example)
    assert count.by_module[""] == count.total == sum(count.by_operator.values())
    assert set(count.by_module) == {name for name, _ in model.named_modules()}
    for parent, module in model.named_modules():
        if type(module) in (nn.Sequential, nn.ModuleList):
            names = [f"{parent}.{child}".strip(".") for child, _ in module.named_children()]
            assert count.by_module[parent] == sum(count.by_module[child] for child in names)


def test_a_shared_module_counts_every_time_under_its_first_name():
    shared = nn.Linear(3, 3)
    count = count_flops(nn.Sequential(shared, nn.ReLU(), shared), torch.zeros(2, 3))
    assert count.by_module == {"": 36, "0": 36, "1": 0}
    assert count.shapes == {"0": (((2, 3), (2, 3)), ((2, 3), (2, 3)))}


def test_shapes_price_every_convolution_and_linear_layer():
    model, x = NETWORKS["resnet18"]()
    count = count_flops(model, x)
    for name, calls in count.shapes.items():
        layer = model.get_submodule(name)
        positions = sum(torch.Size(out).numel() for _, out in calls) // layer.weight.shape[0]
        assert count.by_module[name] == positions * layer.weight.numel()
        assert all(given[1] == layer.weight.shape[1] for given, _ in calls)
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(count.shapes) == sorted(layers)
    assert count.shapes["conv1"] == (((2, 3, 32, 32), (2, 8, 16, 16)),)


def test_shapes_of_layers_called_by_keyword_are_seen():
    layer = nn.Linear(3, 4)
    model = Does(lambda x: layer(input=x))
    model.layer = layer
    assert count_flops(model, torch.zeros(2, 3)).shapes == {"layer": (((2, 3), (2, 4)),)}


def test_counts_of_several_calls_are_added_under_the_names_of_the_model():
    model = nn.ModuleDict(
        {"encoder": nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "heads": nn.ModuleList([nn.Linear(4, 2)])}
    )
    x, z = torch.zeros(5, 3), torch.zeros(7, 4)
    count = count_flops(model, [Call("encoder", (x,)), Call("heads.0", (z,)), Call("heads.0", (z,))])
    encoder, head = 5 * 3 * 4, 2 * 7 * 4 * 2
    expected = {
        "": encoder + head,
        "encoder": encoder,
        "encoder.0": encoder,
        "encoder.1": 0,
        "heads": head,
        "heads.0": head,
    }
    assert count.by_module == expected
    assert count.total == encoder + head
    assert count.by_operator == {"linear": encoder + head}
    assert count.shapes["heads.0"] == (((7, 4), (7, 2)),) * 2
    assert [call["module"] for call in count.inputs] == ["encoder", "heads.0", "heads.0"]


def test_inputs_and_convention_can_be_read_off_the_result():
    count = count_flops(TwoInputs(), {"image": torch.zeros(2, 3, 8, 8), "label": torch.zeros(2, 4)})
    assert count.inputs[0]["kwargs"]["image"] == {"dtype": "float32", "shape": [2, 3, 8, 8]}
    table = str(count)
    assert "One multiply-add is one FLOP" in table
    assert [line.split() for line in table.splitlines()[1:4]] == [
        ["(model)", "7,824", "100.0%"],
        ["conv", "7,776", "99.4%"],
        ["fc", "32", "0.4%"],
    ]


class Output:
    """A result in a class of the user's own."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def test_outputs_in_classes_of_the_users_own_are_found():
    assert count_flops(Does(lambda x, w: {"out": [Output(x @ w), None]}, (4, 5)), torch.zeros(2, 4)).total == 40


def test_arguments_that_are_no_tensors_reach_the_model():
    model = Does(lambda x, times, w: x @ w if times == 2 else x, (4, 5))
    model.forward = lambda x, times: model.function(x, times, *model.weights)
    assert count_flops(model, (torch.zeros(2, 4), 2)).total == 40


@pytest.mark.parametrize("grad", [True, False])
def test_a_count_leaves_everything_bit_identical(grad):
    model = trained()
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    before, state, given = photograph(model), dice(), x.detach().clone()
    with torch.set_grad_enabled(grad):
        count_flops(model, x)
        assert torch.is_grad_enabled() == grad
    assert photograph(model) == before
    assert dice() == state
    assert torch.equal(x, given)
    assert x.grad is None


def test_a_model_that_works_in_place_leaves_the_example_alone():
    x = torch.ones(2, 4)
    count_flops(nn.Sequential(nn.ReLU(inplace=True), Does(lambda x: x.mul_(3))), x)
    assert torch.equal(x, torch.ones(2, 4))


def test_everything_is_put_back_when_the_model_cannot_be_counted():
    model, x = trained(), torch.randn(4, 2, 8, 8)
    before, state = photograph(model), dice()
    with pytest.raises(
        ModelError, match=r"Sequential cannot be run on the example inputs .*\[4, 2, 8, 8\].*RuntimeError"
    ):
        count_flops(model, x)
    assert photograph(model) == before
    assert dice() == state
    assert torch.backends.mha.get_fastpath_enabled()


def test_hooks_of_the_user_run_and_stay():
    model, calls = conv_bn(), []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    count_flops(model, torch.zeros(2, 3, 8, 8))
    assert calls == [1, 1]
    assert list(model[0]._forward_hooks) == [handle.id]


class LitAttention(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def test_a_lightning_module_with_a_trainer_is_counted_without_a_copy(monkeypatch):
    module = LitAttention()
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("copied"))
    x = torch.zeros(2, 5, 8)
    assert count_flops(module, x).total == count_flops(module.net, x).total
    assert module.trainer is not None


class Extra(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None: ...


def test_extra_state_that_is_no_tensor_does_not_matter():
    model = nn.Linear(3, 4)
    model.extra = Extra()
    assert count_flops(model, torch.zeros(2, 3)).total == 24


def test_compiled_models_are_counted_as_written():
    inside = nn.Sequential(nn.Linear(3, 4))
    inside.compile(backend="eager")
    outside = torch.compile(nn.Linear(3, 4), backend="eager")
    compiled = inside._compiled_call_impl
    for model in (inside, outside):
        assert count_flops(model, torch.zeros(2, 3)).total == 24
    assert inside._compiled_call_impl is compiled


def test_under_autocast_the_count_is_the_same():
    model, x = conv_bn(), torch.zeros(2, 3, 8, 8)
    plain = count_flops(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert count_flops(model, x) == plain


def test_a_model_that_torch_jit_cannot_trace_is_an_error_with_the_reason_and_a_remedy():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(3, 4))
    with pytest.raises(
        ModelError, match=r"cannot trace it.*not supported on ScriptModules\. Count it before it is scripted"
    ):
        count_flops(nn.Sequential(scripted), torch.zeros(2, 3))
    with pytest.raises(ModelError, match=r"cannot trace it.*on a real device, not meta"):
        count_flops(conv_bn().to("meta"), torch.zeros(2, 3, 8, 8, device="meta"))


def test_a_model_that_returns_no_tensor_is_an_error():
    with pytest.raises(ModelError, match="returns no tensor"):
        count_flops(Does(lambda x: None), torch.zeros(2))


def test_wrong_examples_are_named():
    with pytest.raises(OptionError, match="example is None"):
        count_flops(nn.Linear(3, 4), None)
    with pytest.raises(OptionError, match=r"Linear has no submodule 'body'; see named_modules\(\)\."):
        count_flops(nn.Linear(3, 4), Call("body", (torch.zeros(2, 3),)))


def test_warnings_of_the_model_come_once_and_those_of_tracing_never():
    def speaks(x: Tensor) -> Tensor:
        warnings.warn("mine", stacklevel=1)
        return x * 2 if x.sum() > 0 else x  # what torch.jit warns about

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        count_flops(Does(speaks), torch.ones(2))
    assert [str(w.message) for w in seen] == ["mine"]


def test_nothing_is_logged(caplog):
    unused = nn.ModuleDict({"a": nn.Linear(3, 4), "unused": nn.Linear(3, 4)})
    model = Does(lambda x: F.gelu(unused["a"](x)))
    model.unused = unused
    assert count_flops(model, torch.zeros(2, 3)).by_module["unused.unused"] == 0
    assert caplog.records == []


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"input": x}, lambda x: Call("", (x,))])
def test_an_array_that_is_no_tensor_is_described_by_type_and_shape(wrap):
    with pytest.raises(ModelError, match=r"'numpy\.ndarray', 'dtype': 'float32', 'shape': \[2, 3\]") as info:
        count_flops(nn.Linear(3, 4), wrap(torch.rand(2, 3).numpy()))
    assert len(str(info.value)) < 500  # and none of its values


def test_long_lists_of_numbers_are_counted_and_short_ones_shown():
    described = signature([Call("", ([1, 2], list(range(999)), "x" * 9999))])[0]["args"]
    assert described[:2] == [["1", "2"], "list of 999 numbers"]
    assert len(described[2]) <= 200


def test_a_batch_of_no_sample_is_an_error_that_says_so():
    with pytest.raises(ModelError, match=r"\[0, 3\].*a batch of no sample"):
        count_flops(nn.Linear(3, 4), torch.rand(0, 3))
    assert count_flops(Does(lambda x, w: torch.cat([x[:, 0], x[:, 1]]) @ w, (3, 4)), torch.rand(2, 2, 3)).total == 48


def test_a_linear_layer_that_returns_nothing_is_counted_all_the_same():
    class Keeps(nn.Linear):
        def forward(self, x):
            self.kept = super().forward(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Keeps(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            self.a(x)
            return self.b(self.a.kept)

    count = count_flops(Model(), torch.rand(5, 3))
    assert count.total == 5 * 3 * 4 + 5 * 4 * 2
    assert count.shapes == {"b": (((5, 4), (5, 2)),)}
