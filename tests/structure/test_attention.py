"""The drop-in against torch's own module, over a grid of the options; heads cut by hand against heads masked in torch's."""

import copy
import inspect
import itertools
import pickle
import re

import pytest
import torch
from torch import nn
from torch.ao.nn import quantizable
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_map

from lightning_prune.errors import ModelError
from lightning_prune.flops import count_flops
from lightning_prune.structure.attention import MultiheadAttention, close_heads, open_heads

TOLERANCE = 1e-12  # float64: the same sums, in another order at most
NESTED = "ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"
EMBED, HEADS, BATCH, LENGTH, SOURCE = 12, 4, 2, 3, 5
WIDTH = EMBED // HEADS
KINDS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "bias": False},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim and vdim": {"kdim": 5, "vdim": 7, "add_bias_kv": True},
    "vdim": {"vdim": 7},
}
LAYOUTS = {"batch first": True, "length first": False, "no batch": None}
SHARING = ("self", "key is value", "query is value", "three")
BLOCKED = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"}


def torch_mha(kind="plain", **options):
    """Return torch's module in float64, no parameter zero."""
    mha = nn.MultiheadAttention(EMBED, HEADS, **{"dtype": torch.float64, **KINDS[kind], **options})
    for parameter in mha.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mha


def sharings(kind):
    """Name what may be the same tensor; key and value may not when they are of different widths."""
    return ("three", "query is value") if "vdim" in KINDS[kind] else SHARING


def tensors(mha, layout, sharing):
    """Return query, key and value as ``layout`` and ``sharing`` say."""
    lengths = [SOURCE if sharing in ("self", "query is value") else LENGTH, SOURCE, SOURCE]

    def draw(length, width):
        shape = {True: (BATCH, length), False: (length, BATCH), None: (length,)}[LAYOUTS[layout]]
        return torch.randn(*shape, width, dtype=mha.out_proj.weight.dtype, requires_grad=True)

    q, k, v = (draw(n, width) for n, width in zip(lengths, (EMBED, mha.kdim, mha.vdim), strict=True))
    if sharing == "self":
        return q, q, q
    if sharing == "query is value":
        return (q, k, q) if mha.vdim == EMBED else (q, k, v)
    return (q, k, k) if sharing == "key is value" else (q, k, v)


def masks(query, layout, length, source=SOURCE):
    """Yield the keyword arguments that mask: every kind of one mask with every kind of the other."""
    batch = () if LAYOUTS[layout] is None else (BATCH,)
    sizes = {"two": (length, source), "three": (HEADS * (BATCH if batch else 1), length, source)}
    attention = {"none": None}
    for name, size in sizes.items():
        hidden = torch.rand(size) < 0.4
        hidden[..., 0] = False  # every query sees something: a row without would be NaN on both sides
        attention |= {f"{name} bool": hidden, f"{name} float": torch.randn(size, dtype=query.dtype)}
    padding = torch.zeros(*batch, source, dtype=torch.bool)
    padding[..., -1] = True
    added = torch.randn(*batch, source, dtype=query.dtype)
    for attn_mask, key_padding_mask in itertools.product(attention.values(), (None, padding, added)):
        yield {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        if attn_mask is not None and attn_mask.dtype == torch.bool and attn_mask.dim() == 2:
            yield {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": True}


def results(mha, inputs, options):
    """Return output, weights and the gradients of all inputs and parameters, by name."""
    output, weights = mha(*inputs, **options)
    wanted = {f"input {i}": x for i, x in enumerate(inputs)} | dict(mha.named_parameters())
    loss = output.pow(2).sum() + (0 if weights is None else weights.pow(3).sum())
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {"output": output, "weights": weights} | dict(zip(wanted, gradients, strict=True))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] is None} == {name for name in expected if expected[name] is None}
    for name, tensor in expected.items():
        if tensor is not None:
            gap = (found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1)
            assert gap <= TOLERANCE, (name, gap)


def block_rows(mha, heads):
    """Return the indices of the kept heads' rows within one block, and within the three blocks."""
    rows = torch.cat([torch.arange(head * WIDTH, (head + 1) * WIDTH) for head in heads])
    return rows, torch.cat([rows + block * EMBED for block in range(3)])


def cut(mha, heads):
    """Return a drop-in of a copy of ``mha`` with only these heads: slices taken by hand."""
    small = open_heads(copy.deepcopy(mha))
    rows, packed = block_rows(mha, heads)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if name in BLOCKED:
                parameter.data = parameter[packed if name.startswith("in_proj") else rows].clone()
            elif name in ("bias_k", "bias_v", "out_proj.weight"):
                parameter.data = parameter[..., rows].clone()
    small.num_heads = len(heads)
    small.out_proj.in_features = len(rows)
    return small


def masked(mha, heads):
    """Return a copy of torch's module in which the values of the other heads are zero."""
    copied = copy.deepcopy(mha)
    gone, _ = block_rows(mha, [head for head in range(HEADS) if head not in heads])
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if name in ("in_proj_weight", "in_proj_bias"):
                parameter[gone + 2 * EMBED] = 0
            elif name == "v_proj_weight":
                parameter[gone] = 0
            elif name == "bias_v":
                parameter[..., gone] = 0
    return copied


@pytest.fixture
def no_kernels(monkeypatch):
    """Make torch's fused inference kernels fail, so that a test proves that they were not called."""

    def refuse(*_args):
        raise NotImplementedError("a fused kernel was called")

    def block():
        for kernel in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"):
            monkeypatch.setattr(torch, kernel, refuse)

    return block


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_weights_and_gradients_equal_torchs(kind, layout):
    mha = torch_mha(kind, batch_first=bool(LAYOUTS[layout]))
    drop_in, averaged = open_heads(mha), itertools.cycle((True, False))
    for sharing in sharings(kind):
        inputs = tensors(mha, layout, sharing)
        length = inputs[0].shape[0 if LAYOUTS[layout] is not True else 1]
        every = masks(inputs[0], layout, length)
        for options in every if sharing in ("self", "three") else itertools.islice(every, 5):
            for needed in ({"need_weights": False}, {"average_attn_weights": next(averaged)}):
                given = options | needed
                assert_same(results(drop_in, inputs, given), results(mha, inputs, given))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_eval_mode_without_gradients_equals_torchs_and_never_takes_its_kernel(
    no_kernels, need_weights, batch_first, mode
):
    mha = torch_mha(batch_first=batch_first).eval()
    drop_in = open_heads(mha)
    x = torch.randn(SOURCE, SOURCE, EMBED, dtype=torch.float64)
    padding = torch.arange(SOURCE) >= torch.tensor([SOURCE, 2, 4, 1, 3])[:, None]
    with mode():
        expected = [mha(x, x, x, mask, need_weights) for mask in (None, padding)]
        no_kernels()
        found = [drop_in(x, x, x, mask, need_weights) for mask in (None, padding)]
        if batch_first:
            with pytest.raises(NotImplementedError, match="fused"):
                mha(x, x, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_draws_what_torch_draws(layout, need_weights):
    mha = torch_mha("bias_kv", batch_first=bool(LAYOUTS[layout]), dropout=0.5)
    inputs = tensors(mha, layout, "self")
    found = []
    for module in (open_heads(mha), mha):
        torch.manual_seed(3)
        found.append(results(module, inputs, {"need_weights": need_weights}))
    assert_same(*found)
    assert not torch.equal(open_heads(mha).eval()(*inputs)[0], found[0]["output"])


@pytest.mark.parametrize("need_weights", [True, False])
def test_queries_that_see_nothing_give_what_torch_gives(need_weights):
    mha = torch_mha()
    inputs = tensors(mha, "length first", "self")
    mask = torch.eye(SOURCE, dtype=torch.bool)
    mask[1] = True
    found, expected = (module(*inputs, attn_mask=mask, need_weights=need_weights) for module in (open_heads(mha), mha))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast_gives_the_types_that_torch_gives(need_weights):
    mha = torch_mha(dtype=torch.float32)
    inputs = tensors(mha, "length first", "key is value")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (module(*inputs, need_weights=need_weights) for module in (open_heads(mha), mha))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)  # bfloat16 has 8 bits


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_output_can_be_viewed_flat(need_weights, batch_first):
    drop_in = open_heads(torch_mha(batch_first=batch_first))
    x = torch.randn(BATCH, SOURCE, EMBED, dtype=torch.float64)
    assert drop_in(x, x, x, need_weights=need_weights)[0].is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_cut_heads_equal_heads_whose_values_are_masked(kind, layout):
    mha = torch_mha(kind, batch_first=bool(LAYOUTS[layout]))
    for heads in ([0, 2, 3], [1, 2], [3]):
        small, large = cut(mha, heads), masked(mha, heads)
        for sharing in sharings(kind):
            inputs = tensors(mha, layout, sharing)
            torch.testing.assert_close(
                small(*inputs, need_weights=False), large(*inputs, need_weights=False), rtol=0, atol=TOLERANCE
            )
            found, weights = small(*inputs, average_attn_weights=False)
            expected, all_weights = large(*inputs, average_attn_weights=False)
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(weights, all_weights[..., heads, :, :], rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(small(*inputs)[1], weights.mean(-3), rtol=0, atol=TOLERANCE)


def test_masks_per_head_are_those_of_the_heads_that_are_left():
    mha = torch_mha(batch_first=True)
    inputs = tensors(mha, "batch first", "three")
    mask = torch.randn(BATCH, HEADS, LENGTH, SOURCE, dtype=torch.float64)
    expected, _ = masked(mha, [0, 3])(*inputs, attn_mask=mask.flatten(0, 1))
    small = cut(mha, [0, 3])
    torch.testing.assert_close(
        small(*inputs, attn_mask=mask[:, [0, 3]].flatten(0, 1))[0], expected, rtol=0, atol=TOLERANCE
    )
    with pytest.raises(ModelError, match=re.escape("has shape [8, 3, 5], expected [3, 5] or,") + ".*Heads that were"):
        small(*inputs, attn_mask=mask.flatten(0, 1))


def encoder_layer(**options):
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64} | options
    return nn.TransformerEncoderLayer(EMBED, HEADS, 16, **options)


def opened(module):
    """Return a copy of ``module`` with every attention replaced."""
    copied = copy.deepcopy(module)
    for name, child in list(copied.named_modules()):
        if type(child) is nn.MultiheadAttention:
            copied.set_submodule(name, open_heads(child))
    return copied


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layer_equals_torchs_and_never_takes_its_kernel(no_kernels, batch_first, norm_first, training, mode):
    layer = encoder_layer(norm_first=norm_first, batch_first=batch_first).train(training)
    x = torch.randn(SOURCE, SOURCE, EMBED, dtype=torch.float64)
    padding, hidden = torch.eye(SOURCE, dtype=torch.bool), torch.ones(SOURCE, SOURCE, dtype=torch.bool).triu(1)
    calls = [{}, {"src_key_padding_mask": padding}, {"src_mask": hidden, "is_causal": True}]
    with mode():
        expected = [layer(x, **options) for options in calls]
        no_kernels()
        found = [opened(layer)(x, **options) for options in calls]
        if not training and batch_first and mode is not torch.enable_grad:
            with pytest.raises(NotImplementedError, match="fused"):
                layer(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.filterwarnings(NESTED)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_encoder_that_turns_padding_into_nested_tensors_equals_torchs(no_kernels, mode):
    encoder = nn.TransformerEncoder(encoder_layer(), 2, norm=nn.LayerNorm(EMBED, dtype=torch.float64)).eval()
    assert encoder.use_nested_tensor
    x = torch.randn(3, SOURCE, EMBED, dtype=torch.float64)
    padding = torch.arange(SOURCE) >= torch.tensor([2, 4, 1])[:, None]  # nobody is SOURCE long: padded back by torch
    bare = nn.TransformerEncoder(encoder_layer(), 2).eval()
    with mode():
        expected = [module(x, src_key_padding_mask=padding) for module in (encoder, bare)]
        no_kernels()
        found = [opened(module)(x, src_key_padding_mask=padding) for module in (encoder, bare)]
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert not found[1][0, 2:].any()  # what only the nested path leaves behind


@pytest.mark.filterwarnings(NESTED)
def test_encoder_with_an_odd_number_of_heads_left_equals_the_masked_one():
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    large, small = copy.deepcopy(encoder), copy.deepcopy(encoder)
    for i, heads in enumerate(([0, 1, 3], [2])):
        large.layers[i].self_attn = masked(encoder.layers[i].self_attn, heads)
        small.layers[i].self_attn = cut(encoder.layers[i].self_attn, heads)
    x = torch.randn(2, SOURCE, EMBED, dtype=torch.float64)
    padding = torch.arange(SOURCE) >= torch.tensor([SOURCE, 2])[:, None]
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            for options in ({}, {"src_key_padding_mask": padding}):
                torch.testing.assert_close(small(x, **options), large(x, **options), rtol=0, atol=TOLERANCE)


def test_encoder_made_of_opened_layers_runs_without_nested_tensors():
    layer = opened(encoder_layer())
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
        encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, SOURCE, EMBED, dtype=torch.float64)
    torch.testing.assert_close(encoder(x), layer.eval()(layer(x)), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_decoder_layer_equals_torchs(batch_first, norm_first):
    options = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first, "dtype": torch.float64}
    layer = nn.TransformerDecoderLayer(EMBED, HEADS, 16, **options)
    target, memory = torch.randn(3, 3, EMBED, dtype=torch.float64), torch.randn(3, 3, EMBED, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    for training, mode in itertools.product((True, False), (torch.enable_grad, torch.no_grad, torch.inference_mode)):
        with mode():
            found, expected = (
                module.train(training)(target, memory, tgt_mask=causal, tgt_is_causal=True)
                for module in (opened(layer), layer)
            )
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_constructor_parameters_and_attributes_are_torchs(kind):
    options = KINDS[kind] | {"batch_first": True, "dropout": 0.25}
    torch.manual_seed(1)
    mha = nn.MultiheadAttention(EMBED, HEADS, **options)
    torch.manual_seed(1)
    drop_in = MultiheadAttention(EMBED, HEADS, **options)
    assert [name for name, _ in drop_in.named_parameters()] == [name for name, _ in mha.named_parameters()]
    assert list(drop_in.state_dict()) == list(mha.state_dict())
    for module in (drop_in, open_heads(mha)):
        assert_same(module.state_dict(), mha.state_dict())
        assert vars(module).keys() == vars(mha).keys()
        different = {k for k, v in vars(mha).items() if isinstance(v, int | float) and vars(module)[k] != v}
        assert different == ({"_qkv_same_embed_dim"} if mha._qkv_same_embed_dim else set())
    ours, theirs = (inspect.signature(cls.forward).parameters for cls in (MultiheadAttention, nn.MultiheadAttention))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]
    torch.manual_seed(1)
    drop_in._reset_parameters()
    torch.manual_seed(1)
    mha._reset_parameters()
    assert_same(drop_in.state_dict(), mha.state_dict())


def test_opening_shares_parameters_hooks_and_everything_else():
    mha = torch_mha(dtype=torch.bfloat16).eval()
    mha.in_proj_weight.requires_grad_(False)
    mha.note = ["kept"]
    calls = []
    handle = mha.register_forward_hook(lambda module, _args, _output: calls.append(module))
    drop_in = open_heads(mha)
    for (name, ours), theirs in zip(drop_in.named_parameters(), mha.parameters(), strict=True):
        assert ours is theirs, name
    assert drop_in.out_proj is mha.out_proj
    assert drop_in.note is mha.note
    assert not drop_in.training
    x = torch.randn(2, 3, EMBED, dtype=torch.bfloat16)
    drop_in(x, x, x)
    assert calls == [drop_in]
    handle.remove()
    drop_in(x, x, x)
    assert calls == [drop_in]
    drop_in.in_proj_bias = None
    assert mha.in_proj_bias is not None


@pytest.mark.parametrize("kind", KINDS)
def test_closing_undoes_opening(kind):
    mha = torch_mha(kind, batch_first=True)
    closed = close_heads(open_heads(mha))
    assert type(closed) is nn.MultiheadAttention
    assert list(map(id, closed.parameters())) == list(map(id, mha.parameters()))
    scalars = {k: v for k, v in vars(mha).items() if isinstance(v, int | float)}
    assert {key: vars(closed)[key] for key in scalars} == scalars
    inputs = tensors(mha, "batch first", "three")
    assert_same(results(closed, inputs, {}), results(mha, inputs, {}))


@pytest.mark.parametrize("kind", KINDS)
def test_closing_after_heads_are_gone_gives_torchs_sizes_and_leaves_the_drop_in_alone(kind):
    mha = torch_mha(kind)
    small = cut(mha, [1, 2, 3])
    small.out_proj.weight.requires_grad_(False)
    before = {name: (id(parameter), parameter.clone()) for name, parameter in small.named_parameters()}
    closed = close_heads(small)
    closed.load_state_dict(mha.state_dict(), strict=True)
    assert [p.requires_grad for p in closed.parameters()] == [name != "out_proj.weight" for name in before]
    inputs = tensors(mha, "length first", "three")
    torch.testing.assert_close(closed(*inputs), mha(*inputs), rtol=0, atol=TOLERANCE)
    assert (small.num_heads, small.out_proj.in_features, closed.out_proj.in_features) == (3, 9, 12)
    for name, parameter in small.named_parameters():
        assert id(parameter) == before[name][0], name
        assert torch.equal(parameter, before[name][1]) or name == "out_proj.bias", name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("kind", ["plain", "kdim and vdim"])
def test_copies_compute_the_same_and_share_nothing(kind, copied):
    small = cut(torch_mha(kind), [0, 3])
    twin = copied(small)
    inputs = tensors(small, "length first", "three")
    torch.testing.assert_close(twin(*inputs), small(*inputs), rtol=0, atol=0)
    assert type(twin) is MultiheadAttention
    assert not twin._qkv_same_embed_dim
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in small.parameters()}


def test_flops_are_those_of_torchs_module_and_fall_with_the_heads():
    mha = torch_mha(dtype=torch.float32, batch_first=True)
    x = torch.randn(BATCH, SOURCE, EMBED)
    for options in ({"need_weights": False}, {"need_weights": True}):
        example = {"query": x, "key": x, "value": x} | options
        dense = count_flops(mha, example).total
        assert count_flops(open_heads(mha), example).total == dense
        assert count_flops(cut(mha, [2]), example).total == dense // HEADS


class SelfAttention(nn.Module):
    """One attention, with a mask and a residual connection."""

    def __init__(self, mha):
        super().__init__()
        self.mha = mha

    def forward(self, x, padding):
        output, weights = self.mha(x, x, x, key_padding_mask=padding)
        return x + output, weights


def traceable(name):
    """Return a module with cut heads, in float32, and example inputs."""
    if name == "attention":
        padding = torch.arange(SOURCE) >= torch.tensor([SOURCE, 2])[:, None]
        mha = torch_mha("bias_kv and zero_attn", batch_first=True, dtype=torch.float32)
        return SelfAttention(cut(mha, [0, 1, 3])), (torch.randn(BATCH, SOURCE, EMBED), padding)
    layer = encoder_layer(dtype=torch.float32)
    layer.self_attn = cut(layer.self_attn, [1, 3])
    return layer, (torch.randn(BATCH, SOURCE, EMBED),)


def batch_of_three(inputs):
    return tuple(torch.cat([x, x[:1]]) for x in inputs)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["attention", "encoder layer"])
def test_torch_export_traces_it_with_a_free_batch(name, training, device):
    module, inputs = traceable(name)
    module.to(device).train(training)
    inputs = tuple(x.to(device) for x in inputs)
    dynamic = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("scaled_dot_product_attention" in target for target in names) == (name == "encoder layer")
    assert not any("native_multi_head" in target or "encoder_layer_fwd" in target for target in names)
    more = batch_of_three(inputs)
    found, expected = program.module()(*more), module(*more)
    if device == "cpu":
        torch.testing.assert_close(found, expected)
    else:
        assert tree_map(lambda x: x.shape, found) == tree_map(lambda x: x.shape, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["attention", "encoder layer"])
def test_onnx_file_computes_the_same_at_another_batch_size(tmp_path, name):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, inputs = traceable(name)
    module.eval()
    dynamic = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    path = str(tmp_path / "attention.onnx")
    torch.onnx.export(module, inputs, path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    more = batch_of_three(inputs)
    given = {port.name: x.numpy() for port, x in zip(session.get_inputs(), more, strict=True)}
    with torch.no_grad():
        expected = module(*more)
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = tuple(map(torch.from_numpy, session.run(None, given)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Own(nn.MultiheadAttention):
    pass


def changed(change, **options):
    mha = torch_mha(**options)
    change(mha)
    return mha


def pruned(mha):
    prune.random_unstructured(mha, "in_proj_weight", 0.5)


def compiled(mha):
    mha.compile(backend="eager")


@pytest.mark.parametrize(
    ("mha", "message"),
    [
        (lambda: Own(EMBED, HEADS), "class has code of its own"),
        (lambda: quantizable.MultiheadAttention(EMBED, HEADS), "it is quantized or prepared"),
        (lambda: open_heads(torch_mha()), "open already"),
        (lambda: nn.Linear(3, 3), "class has code of its own"),
        (lambda: changed(lambda m: parametrizations.weight_norm(m, "in_proj_weight")), "parametrized"),
        (lambda: changed(lambda m: parametrizations.weight_norm(m.out_proj)), "parametrized"),
        (lambda: changed(pruned), "further modules or buffers"),
        (lambda: changed(lambda m: setattr(m, "forward", len)), "its forward was replaced"),
        (lambda: changed(compiled), "compiled in place"),
        (lambda: changed(lambda m: m.register_load_state_dict_pre_hook(print)), "load_state_dict pre-hook"),
        (lambda: changed(lambda m: setattr(m, "adapter", nn.Linear(2, 2))), "further modules or buffers"),
        (lambda: changed(lambda m: setattr(m, "gate", nn.Parameter(torch.ones(1)))), "further parameter gate"),
        (lambda: changed(lambda m: setattr(m, "out_proj", nn.Bilinear(1, 1, 1))), "out_proj is a Bilinear"),
        (lambda: changed(lambda m: setattr(m, "num_heads", 3)), "3 heads of 3 are not as wide"),
        (
            lambda: changed(lambda m: setattr(m, "out_proj", nn.Linear(EMBED, 4))),
            r"shape \[4, 12\], expected \[12, 12\]",
        ),
        (lambda: changed(lambda m: setattr(m, "bias_v", None), kind="bias_kv"), "no parameter bias_v"),
        (lambda: changed(lambda m: delattr(m, "in_proj_weight")), "no parameter in_proj_weight"),
        (lambda: changed(lambda m: setattr(m, "in_proj_bias", nn.UninitializedParameter())), "UninitializedParameter"),
    ],
)
def test_what_cannot_be_opened_exactly_is_refused(mha, message):
    with pytest.raises(ModelError, match=message):
        open_heads(mha())


def test_only_the_drop_in_is_closed():
    with pytest.raises(ModelError, match="MultiheadAttention that open_heads returned, got a torch"):
        close_heads(torch_mha())


def like(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((like(5, 2, 12),) * 3, {"is_causal": True}, "is_causal=True without attn_mask"),
        ((like(5, 2, 12),) * 3, {"attn_mask": like(1, 5)}, r"shape \[1, 5\], expected \[5, 5\] or, .* \[8, 5, 5\]"),
        ((like(5, 2, 12),) * 3, {"attn_mask": like(2, 5, 5)}, r"shape \[2, 5, 5\], expected \[5, 5\]"),
        ((like(5, 12),) * 3, {"attn_mask": like(1, 5, 5)}, r"shape \[1, 5, 5\], expected \[5, 5\] or, .* \[4, 5, 5\]"),
        ((like(5, 2, 12),) * 3, {"key_padding_mask": like(1, 5)}, r"shape \[1, 5\], expected \[2, 5\]"),
        ((like(5, 12),) * 3, {"key_padding_mask": like(1, 5)}, r"shape \[1, 5\], expected \[5\]"),
        ((like(5, 2, 12),) * 3, {"attn_mask": like(5, 5, dtype=torch.uint8)}, "attn_mask has type torch.uint8"),
        ((like(3, 2, 12), like(5, 1, 12), like(5, 1, 12)), {}, "length, batch, .*one batch size"),
        ((like(3, 2, 12), like(5, 2, 12), like(1, 2, 12)), {}, "key and value of one length"),
        ((like(3, 2, 12), like(5, 12), like(5, 12)), {}, r"3 dimensions, or of 2 .* query \[3, 2, 12\], key \[5, 12\]"),
        ((like(1, 3, 2, 12),) * 3, {}, "3 dimensions, or of 2"),
    ],
)
def test_what_torch_refuses_is_refused(inputs, options, message):
    mha = torch_mha()
    with pytest.raises((AssertionError, RuntimeError)):
        mha(*inputs, **options)
    with pytest.raises(ModelError, match=message):
        open_heads(mha)(*inputs, **options)


@pytest.mark.filterwarnings(NESTED)
def test_nested_tensors_are_refused_where_they_cannot_be_right():
    drop_in = open_heads(torch_mha(batch_first=True))
    x = torch.nested.nested_tensor([torch.randn(2, EMBED), torch.randn(3, EMBED)], dtype=torch.float64)
    jagged = torch.nested.nested_tensor([torch.randn(2, EMBED)], dtype=torch.float64, layout=torch.jagged)
    assert drop_in(x, x, x, need_weights=False)[0].is_nested
    padding = torch.zeros(2, 3, dtype=torch.bool)
    refused = [((x, x, x), {}), ((jagged,) * 3, {"need_weights": False}), ((x, x, x.clone()), {"need_weights": False})]
    refused += [((x, x, x), {"need_weights": False, "key_padding_mask": padding})]
    for inputs, options in refused:
        with pytest.raises(ModelError, match="Pad the sequences"):
            drop_in(*inputs, **options)
