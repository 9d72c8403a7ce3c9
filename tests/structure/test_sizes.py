"""Sizes in the user's Python: they follow, or the units stay and the reason names the line; attributes of torch's modules stay true."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from lightning_prune.errors import ModelError
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.groups import find_units
from lightning_prune.structure.removal import left_alone, removal_steps
from lightning_prune.structure.trials import draw
from tests.structure.units import Net, by_number, cut, cut_at_random, structure_of, units

IMAGE, TOKENS = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 3)


def without(structure, *slices):
    """Return which units stay when those go that hold one of ``slices``."""
    return np.array([not set(slices) & one for one in by_number(structure)])


class Heads(nn.Module):
    """``style`` says how the sizes are written."""

    def __init__(self, style):
        super().__init__()
        self.style, self.h, self.d = style, 3, 2
        self.qkv, self.out = nn.Linear(3, 18), nn.Linear(6, 3)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.style == "attribute":
            q, k, v = (t.view(b, n, self.h, 2).transpose(1, 2) for t in (q, k, v))
        elif self.style == "divided":
            q, k, v = (t.view(b, n, self.h, t.shape[-1] // self.h).transpose(1, 2) for t in (q, k, v))
        elif self.style == "free":
            q, k, v = (t.view(b, n, -1, self.d).transpose(1, 2) for t in (q, k, v))
        else:
            q, k, v = (t.view(b, n, 3, 2).transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_number_of_heads_that_equals_the_width_of_a_head_follows_alone():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.d, self.h = 3, 3
            self.v, self.out = nn.Linear(3, 9), nn.Linear(9, 3)

        def forward(self, x):
            b, n, _ = x.shape
            y = self.v(x).view(b, n, self.h, self.d).transpose(1, 2)
            return self.out(F.scaled_dot_product_attention(y, y, y).transpose(1, 2).flatten(2))

    model = Square()
    structure = structure_of(model, TOKENS)
    assert structure.count == 3
    small = cut(model, structure, without(structure, ("out.weight", 1, 3)), TOKENS)
    assert (small.h, small.d) == (2, 3)
    cut_at_random(model, structure, TOKENS)


@pytest.mark.parametrize("style", ["attribute", "divided"])
def test_a_number_of_heads_in_an_attribute_follows(style):
    model = Heads(style)
    structure = structure_of(model, TOKENS)
    assert structure.count == 3
    small = cut(model, structure, without(structure, ("out.weight", 1, 2)), TOKENS)
    assert (small.h, small.d, small.qkv.out_features, small.out.in_features) == (2, 2, 12, 4)
    step = next(s for s in removal_steps(model, structure, without(structure, ("out.weight", 1, 2))) if s.module == "")
    assert step.attributes == {"h": (3, 2)}  # the plan records it
    cut_at_random(model, structure, TOKENS)


def test_a_size_that_python_reads_from_the_shape_needs_nothing():
    model = Heads("free")
    structure = structure_of(model, TOKENS)
    assert structure.count == 3
    small = cut(model, structure, without(structure, ("out.weight", 1, 0)), TOKENS)
    assert (small.h, small.d) == (3, 2)


def test_a_literal_fixes_its_units_and_the_reason_names_the_line():
    structure = structure_of(Heads("literal"), TOKENS)
    assert structure.count == 0
    line = "`q, k, v = (t.view(b, n, 3, 2).transpose(1, 2) for t in (q, k, v))`"
    for slot in (("qkv.weight", 0), ("out.weight", 1)):
        assert structure.reasons[slot].startswith("its size is fixed by the code at test_sizes.py:")
        assert structure.reasons[slot].endswith(line)
    assert left_alone(structure, ["qkv"])["qkv"].endswith(line)


def apart(y):
    """Fold heads out of features, in a function that ``forward`` calls."""
    return y.view(y.shape[0], y.shape[1], 3, 2)


def six():
    return torch.ones(6, dtype=torch.float64)


def weighted(y):
    return y * six()


@pytest.mark.parametrize(
    ("forward", "line"),
    [
        (lambda s, x: s.b(apart(s.a(x)).relu().flatten(2)), "return y.view(y.shape[0], y.shape[1], 3, 2)"),
        (lambda s, x: s.b(weighted(s.a(x))), "return y * six()"),
    ],
)
def test_a_size_written_in_a_function_that_forward_calls_is_named_by_the_line_in_that_function(forward, line):
    structure = structure_of(Net(forward, a=nn.Linear(3, 6), b=nn.Linear(6, 2)), TOKENS)
    assert structure.count == 0
    reason = structure.reasons["a.weight", 0]
    assert reason.startswith("its size is fixed by the code at test_sizes.py:")
    assert reason.endswith(f"`{line}`")


def test_a_size_whose_failure_shows_in_another_module_is_named_by_the_line_that_writes_it():
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x)

    def forward(s, x):
        y = s.a(x)
        first, rest = y[..., :2], y[..., 2:]
        return s.b(first) + s.tail(rest)

    structure = structure_of(Net(forward, a=nn.Linear(3, 5), b=nn.Linear(2, 2), tail=Tail()), TOKENS)
    reason = structure.reasons["a.weight", 0]
    assert "self.fc(x)" not in reason
    assert "first, rest = " in reason or "s.tail(rest)" in reason


def test_operations_of_the_model_itself_are_called_so():
    structure = structure_of(nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2)), TOKENS)
    assert structure.reasons["0.weight", 0] == "softmax (module '1') normalizes over it"
    bare = structure_of(nn.MultiheadAttention(6, 3, batch_first=True), *[torch.randn(2, 5, 6)] * 3)
    assert all("module ''" not in reason for reason in bare.reasons.values())
    assert any("(the model itself)" in reason for reason in bare.reasons.values())


def test_what_goes_through_vmap_stays():
    model = Net(
        lambda s, x: s.c(torch.vmap(lambda row: s.b(row.view(5, 6)).relu())(s.a(x))),
        a=nn.Linear(3, 6),
        b=nn.Linear(6, 4),
        c=nn.Linear(4, 2),
    )
    structure = structure_of(model, TOKENS)
    assert "which is not known" in structure.reasons["a.weight", 0]
    cut_at_random(model, structure, TOKENS)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_parametrization_that_keeps_channels_is_named_with_the_remedy(name):
    norm = getattr(parametrizations, name)
    remedy = "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') makes it a plain parameter"
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), norm(nn.Conv2d(4, 4, 1)), nn.ReLU(), nn.Conv2d(4, 2, 1))
    reason = "; ".join(structure_of(model, IMAGE).reasons.values())
    assert "the weight of '2' is computed as a whole by a parametrization" in reason
    assert name.replace("_", "") in reason.lower()
    assert remedy in reason
    nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    assert structure_of(model, IMAGE).count == 8


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_model_that_cannot_be_copied_is_an_error_that_names_the_layer_and_the_remedy():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    with pytest.raises(ModelError, match=r"Sequential cannot be copied.*'0' holds.*'weight'.*remove_weight_norm"):
        structure_of(model, TOKENS)


def test_a_parametrization_that_is_not_in_the_way_is_not_named():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.LayerNorm(4), nn.Linear(4, 2))
    reasons = structure_of(model, TOKENS).reasons
    assert "layer_norm (module '1') normalizes over it" in reasons.values()
    assert "parametrization" not in reasons["1.weight", 0]


class Cut(nn.Module):
    def __init__(self, style):
        super().__init__()
        self.style, self.k, self.sizes = style, 2, [2, 3]
        self.enter = nn.Linear(3, 5)
        self.left, self.right = nn.Linear(2, 2), nn.Linear(3, 2)

    def forward(self, x):
        x = self.enter(x)
        if self.style == "slices":
            a, b = x[..., : self.k], x[..., self.k :]
        elif self.style == "list":
            a, b = x.split(self.sizes, dim=-1)
        elif self.style == "half":
            a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        else:
            a, b = x[..., :2], x[..., 2:]
        return self.left(a) + self.right(b)


def test_an_uneven_split_kept_in_a_list_follows():
    model = Cut("list")
    structure = structure_of(model, TOKENS)
    small = cut(model, structure, without(structure, ("enter.weight", 0, 1), ("enter.weight", 0, 4)), TOKENS)
    assert small.sizes == [1, 2]
    assert (small.left.in_features, small.right.in_features) == (1, 2)
    cut_at_random(model, structure, TOKENS)


def test_the_end_of_a_slice_kept_in_an_attribute_follows():
    model = Cut("slices")
    structure = structure_of(model, TOKENS)
    assert structure.count == 5
    assert cut(model, structure, without(structure, ("enter.weight", 0, 1)), TOKENS).k == 1
    assert cut(model, structure, without(structure, ("enter.weight", 0, 3)), TOKENS).k == 2
    cut_at_random(model, structure, TOKENS)


@pytest.mark.parametrize("style", ["half", "literal"])
def test_units_never_leave_where_python_would_cut_at_another_place(style):
    model = Cut(style)
    structure = structure_of(model, TOKENS)
    assert not any(("enter.weight", 0, i) in one for one in units(structure) for i in range(2))
    cut_at_random(model, structure, TOKENS)


def test_a_slice_from_the_end_counts_from_the_end():
    model = Net(
        lambda s, x: s.b(s.a(x)[..., -s.k :]) + s.c(s.a(x)),
        a=nn.Linear(3, 6),
        b=nn.Linear(2, 2),
        c=nn.Linear(6, 2),
        k=2,
    )
    structure = structure_of(model, TOKENS)
    assert structure.count == 6
    assert (
        cut(model, structure, without(structure, ("a.weight", 0, 0), ("a.weight", 0, 2), ("a.weight", 0, 5)), TOKENS).k
        == 1
    )


def test_code_of_train_mode_is_tried_too():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            y = self.a(x)
            return (self.b(y), self.c(y.view(-1, 4))) if self.training else self.b(y)

    structure = structure_of(Model(), TOKENS)
    assert structure.count == 0
    assert "self.c(y.view(-1, 4))" in structure.reasons["a.weight", 0]


def test_a_model_that_cannot_be_traced_is_one_readable_error_with_the_users_line():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x):
            if x.sum() > 0:
                x = x + 1
            return self.a(x)

    with pytest.raises(
        ModelError, match=r"Model cannot be traced at test_sizes\.py:\d+ `if x\.sum\(\) > 0:`: \w+: "
    ) as info:
        find_units(Model(), as_calls(TOKENS))
    assert "\n" not in str(info.value)
    assert "no branch on values of tensors" in str(info.value)


def everything():
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 6),
            "linear": nn.Linear(6, 6),
            "conv": nn.Conv1d(6, 6, 1),
            "grouped": nn.Conv1d(6, 6, 1, groups=3),
            "batch": nn.BatchNorm1d(6),
            "instance": nn.InstanceNorm1d(6, affine=True),
            "group": nn.GroupNorm(3, 6),
            "prelu": nn.PReLU(6),
            "up": nn.ConvTranspose1d(6, 6, 1),
            "rnn": nn.GRU(6, 6, batch_first=True),
            "mha": nn.MultiheadAttention(6, 3, batch_first=True),
            "head": nn.Linear(6, 2),
        }
    )


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = everything()

    def forward(self, ids):
        m = self.m
        x = m["conv"](m["linear"](m["embedding"](ids)).mT)
        x = m["prelu"](m["group"](m["instance"](m["batch"](m["grouped"](x)))))
        x = m["rnn"](m["up"](x).mT)[0]
        return m["head"](m["mha"](x, x, x, need_weights=False)[0])


def test_sizes_that_modules_of_torch_keep_stay_true():
    model, ids = Everything(), torch.arange(5)[None].repeat(2, 1)
    structure = structure_of(model, ids)
    first = {
        ("m.linear.weight", 0, 1),
        ("m.conv.weight", 0, 0),
        ("m.up.weight", 1, 4),
        ("m.rnn.weight_hh_l0", 1, 2),
        ("m.embedding.weight", 1, 5),
        ("m.mha.out_proj.weight", 1, 0),
    }
    kept = without(structure, *first, ("m.mha.out_proj.weight", 0, 3))
    m = cut(model, structure, kept, ids).m
    sizes = {
        "embedding": {"num_embeddings": 5, "embedding_dim": 5},
        "linear": {"in_features": 5, "out_features": 5},
        "conv": {"in_channels": 5, "out_channels": 4, "groups": 1},
        "grouped": {"in_channels": 4, "out_channels": 4, "groups": 2},
        "batch": {"num_features": 4},
        "instance": {"num_features": 4},
        "group": {"num_groups": 2, "num_channels": 4},
        "prelu": {"num_parameters": 4},
        "up": {"in_channels": 4, "out_channels": 5},
        "rnn": {"input_size": 5, "hidden_size": 5},
        "mha": {"num_heads": 2, "head_dim": 2},
        "head": {"in_features": 5, "out_features": 2},
    }
    assert {name: {key: getattr(m[name], key) for key in own} for name, own in sizes.items()} == sizes
    cut_at_random(model, structure, ids)


def test_a_constant_behind_an_activation_goes_to_the_bias_of_its_own_weight():
    linear = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    structure = structure_of(linear, TOKENS)
    assert [(one.bias, one.value) for one in structure.absorbed.values()] == [("2.bias", 0.5)]
    cut_at_random(linear, structure, TOKENS)
    bare = Net(
        lambda s, x: F.linear(torch.sigmoid(s.a(x)), s.w, s.b),
        a=nn.Linear(3, 4),
        w=nn.Parameter(torch.randn(2, 4)),
        b=nn.Parameter(torch.randn(2)),
    )
    structure = structure_of(bare, TOKENS)
    assert structure.count == 4
    cut_at_random(bare, structure, TOKENS)


def test_two_weights_of_one_module_take_up_a_constant_each():
    def forward(s, x):
        return F.linear(torch.sigmoid(F.linear(torch.sigmoid(s.a(x)), s.w, s.b)), s.v, s.c)

    sizes = {"w": (5, 4), "b": (5,), "v": (2, 5), "c": (2,)}
    model = Net(forward, a=nn.Linear(3, 4), **{name: nn.Parameter(torch.randn(size)) for name, size in sizes.items()})
    structure = structure_of(model, TOKENS)
    assert structure.count == 9
    cut_at_random(model, structure, TOKENS)


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (
            nn.Conv2d(4, 2, 3, padding=1),
            "its channels are 0.5 when masked, and conv2d (module '2') pads them with zeros",
        ),
        (nn.Conv2d(4, 2, 1, bias=False), "has no bias of its own to take that up"),
        (nn.Conv2d(4, 4, 1, groups=2), "are not zero when masked, and conv2d (module '2') sums over them in groups"),
    ],
)
def test_a_constant_that_cannot_go_anywhere_keeps_its_channels(last, reason):
    structure = structure_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), last), IMAGE)
    assert structure.count == 0
    assert reason in structure.reasons["0.weight", 0]


def test_draws_keep_at_least_one_unit_of_every_group_and_respect_ties():
    model = nn.Sequential(nn.Linear(3, 6), nn.GLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    structure = structure_of(model, TOKENS)
    for seed in range(20):
        kept = draw(structure, np.arange(structure.count), 0.9, seed)
        assert all(kept[group.units].any() for group in structure.groups)
        assert all(len({int(kept[block].sum()) for block in tie}) == 1 for tie in structure.ties)
    only = structure.groups[0].units
    assert draw(structure, only, 0.9)[np.setdiff1d(np.arange(structure.count), only)].all()


def test_slots_of_units_that_never_leave_say_so():
    structure = structure_of(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), TOKENS)
    assert structure.count == 0
    assert structure.reasons["0.weight", 0] == "layer_norm (module '1') normalizes over it"
    assert structure.reasons["0.weight", 1] == "linear (module '0') sums over it with a tensor of fixed size"
