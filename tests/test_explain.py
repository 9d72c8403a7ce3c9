"""Explanations: every layer is told of, in words that fit what a removal really does; a dry run does what ``compress`` does."""

import copy
import functools
import inspect
import io
import json
import sys

import matplotlib.image
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

import lightning_prune
from lightning_prune.callback import compress
from lightning_prune.errors import BudgetError, ModelError, OptionError, RuntimeMissingError
from lightning_prune.explanation import Explanation, Row, explain
from lightning_prune.explanation.kinds import Follower, Kind, in_words
from lightning_prune.explanation.members import own_flops
from lightning_prune.explanation.picture import color_of
from lightning_prune.flops import count_flops
from lightning_prune.methods import TRP, LowRank, Magnitude
from lightning_prune.structure.calls import Call, as_calls
from lightning_prune.structure.groups import find_units
from lightning_prune.structure.removal import removal_steps
from lightning_prune.structure.steps import KeepChannels
from lightning_prune.structure.trials import draw, try_sizes
from tests.networks import NETWORKS, conv_bn
from tests.structure.test_preserve import dice, photograph, trained


@functools.cache
def network(name):
    torch.manual_seed(0)
    return NETWORKS[name]()


@functools.cache
def explained(name):
    return explain(*network(name))


def by_layer(explanation):
    return {row.layer: row for row in explanation.rows}


def told(model, example, layer):
    return by_layer(explain(model, example))[layer]


# Every network ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_that_holds_parameters_has_a_row_and_every_parameter_counts_once(name):
    model, example = network(name)
    rows = explained(name).rows
    assert [row.layer for row in rows] == [n for n, m in model.named_modules() if list(m.parameters(recurse=False))]
    assert [row.params for row in rows] == [
        sum(p.numel() for p in model.get_submodule(row.layer).parameters(recurse=False)) for row in rows
    ]
    assert sum(row.flops for row in rows) <= explained(name).flops == count_flops(model, example).total


@pytest.mark.parametrize("name", NETWORKS)
def test_a_row_that_keeps_anything_says_why(name):
    for row in explained(name).rows:
        stays = any(group is None for group, _ in row.writes)
        assert bool(row.reason) == stays
        assert row.candidate == bool(row.groups) == (row.removable > 0)
        assert sum(channels for _, channels in row.writes) > 0


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "two_inputs"])
def test_groups_shrink_the_layers_that_a_real_removal_shrinks(name):
    model, example = network(name)
    calls = as_calls(example)
    structure = try_sizes(model, calls, find_units(model, calls))
    found = explained(name)
    assert [g.units for g in found.groups] == [len(g.units) for g in structure.groups]
    seen = set()
    for seed in range(6):
        kept = draw(structure, np.arange(structure.count), seed=seed)
        gone = {i for i, group in enumerate(structure.groups) if not kept[group.units].all()}
        steps = [step for step in removal_steps(model, structure, kept) if isinstance(step, KeepChannels)]
        assert {s.module for s in steps if s.tensors} == {layer for i in gone for layer in found.groups[i].layers}
        attributes = {f"{step.module}.{name}".lstrip(".") for step in steps for name in step.attributes}
        assert {name for i in gone for name in found.groups[i].follows} <= attributes
        seen |= gone
    assert seen == set(range(len(structure.groups)))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_dict_survives_json(name):
    found = explained(name).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert len(found["rows"]) == len(explained(name).rows)


@pytest.mark.parametrize("method", [None, LowRank(rank=2, align=1), Magnitude(structured=True, flops=0.7, align=1)])
def test_the_model_and_all_generators_are_left_bit_identical(method):
    model = trained()
    before, state = photograph(model), dice()
    explain(model, torch.randn(2, 3, 8, 8, generator=torch.Generator()), method)
    assert photograph(model) == before
    assert dice() == state


# What rows say ------------------------------------------------------------------------------------------------------------------


def test_a_residual_group_names_all_its_members():
    row = by_layer(explained("resnet18"))["conv1"]
    first = ["bn1", *(f"layer1.{i}.{part}" for i in (0, 1) for part in ("conv1", "conv2", "bn2"))]
    assert set(row.shrinks_with) == {*first, "layer2.0.conv1", "layer2.0.downsample.0"}
    assert (row.units, row.removable, row.candidate, row.reason) == ("8 channels", 8, True, "")
    reader = by_layer(explained("resnet18"))["fc"]
    assert (reader.units, reader.candidate, reader.reason) == ("10 outputs", False, "it is an output of the model")
    assert "layer4.1.conv2" in reader.shrinks_with
    assert reader.inputs == by_layer(explained("resnet18"))["layer4.1.conv2"].groups


def test_hidden_units_of_an_lstm_are_not_counted_by_gates():
    rows = by_layer(explained("lstm"))
    assert (rows["lstm"].units, rows["lstm"].removable) == ("20 hidden units", 20)  # 2 layers, 2 directions, 5 each
    assert rows["embedding"].units == "6 features"
    groups = {group.group: group for group in explained("lstm").groups}
    for group in rows["lstm"].groups:
        assert set(groups[group].tied) == set(rows["lstm"].groups) - {group}
    assert groups[rows["embedding"].groups[0]].layers == ("embedding", "lstm")


def test_heads_and_hidden_units_of_a_transformer():
    rows = by_layer(explained("transformer"))
    assert (rows["layers.0.self_attn"].units, rows["layers.0.self_attn"].follows) == ("2 heads of 4", ("num_heads",))
    assert rows["layers.0.self_attn"].shrinks_with == ("layers.0.self_attn.out_proj",)
    assert (rows["layers.1.linear1"].units, rows["layers.1.linear1"].removable) == ("16 hidden units", 16)
    norm = rows["layers.0.norm1"]
    assert (norm.units, norm.removable, norm.groups, norm.inputs) == ("8 features", 0, (), ())
    assert "layer_norm" in norm.reason
    assert "normalizes over it" in norm.reason


def test_heads_are_told_by_the_users_own_attribute():
    row = by_layer(explained("attention"))["qkv"]
    assert (row.units, row.follows) == ("2 heads of 4", ("heads",))
    assert by_layer(explained("attention"))["gate"].units == "16 hidden units"  # 32 rows, two for each


class Heads(nn.Module):
    """Attention whose number of heads no attribute holds."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_units_without_a_number_of_heads_are_not_called_heads():
    row = told(Heads(), torch.randn(2, 5, 8), "k")
    assert (row.units, row.removable, row.follows) == ("2 units of 4 channels", 2, ())
    assert set(row.shrinks_with) == {"q", "v", "out"}


def test_groups_of_normalizations_and_grouped_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1))
    rows = by_layer(explain(model, torch.randn(2, 3, 6, 6)))
    assert rows["1"].units == rows["0"].units == "2 groups of 4 channels"
    assert (rows["1"].follows, rows["0"].follows) == (("num_groups",), ("1.num_groups",))
    grouped = by_layer(explained("depthwise"))
    assert (grouped["1"].units, grouped["3"].units) == ("2 groups of 4 channels", "2 groups of 6 channels")
    assert (grouped["1"].follows, grouped["3"].follows) == (("3.groups",), ("groups",))


def test_words_of_odd_units():
    one, wide = Kind(None, 1, 1, ()), Kind(None, 64, 1, ())
    shared = Kind("heads", 64, 4, (Follower("a", "num_heads", 4), Follower("a", "num_kv_heads", 1)))
    assert in_words(nn.Conv2d(2, 4, 1), [(one, 1, 1)], 0) == "1 channel"
    assert in_words(nn.Linear(4, 768), [(wide, 12, 64)], 0) == "12 units of 64 channels"
    assert in_words(nn.Linear(4, 2304), [(shared, 2, 768)], 0) == "2 groups of 4 heads of 64"
    assert in_words(nn.Conv2d(2, 9, 1), [(one, 2, 1), (one, 3, 4)], 5) == "7 channels + 3 units of 4 channels"
    assert [Follower("", name, 1).counts_heads for name in ("n_head", "num_heads", "all_head_size")] == [
        True,
        True,
        False,
    ]


class Parts(nn.Module):
    """The first three channels are an output, the others are not; then channels join a fixed input."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(11), nn.Conv2d(11, 2, 1)

    def forward(self, x):
        y = self.conv(x)
        return {"first": y[:, :3], "last": self.last(self.norm(torch.cat([x, y], 1)))}


def test_rows_that_can_lose_some_units_say_both():
    rows = by_layer(explain(Parts(), torch.randn(2, 3, 4, 4)))
    assert (rows["conv"].units, rows["conv"].removable) == ("8 channels", 5)
    assert sorted(rows["conv"].writes, key=str) == [(0, 5), (None, 3)]
    assert rows["conv"].reason == "it is an output of the model"
    assert (rows["norm"].units, rows["norm"].removable, rows["norm"].candidate) == ("11 channels", 5, True)
    assert rows["last"].reads == ((0, 5), (None, 6))


class Baked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 2)

    def forward(self, x):
        y = self.conv(x)
        y = y.view(len(x), 8, 16)  # [baked]
        return self.fc(y.mean(-1))


def test_a_size_in_the_code_is_named_by_file_line_and_text():
    lines, start = inspect.getsourcelines(Baked.forward)
    line = start + next(i for i, text in enumerate(lines) if "[baked]" in text)
    found = explain(Baked(), torch.randn(2, 3, 4, 4))
    row = by_layer(found)["conv"]
    assert not row.candidate
    assert f"test_explain.py:{line} `y = y.view(len(x), 8, 16)  # [baked]`" in row.reason
    assert "# [baked]" in " ".join(str(found).split())  # not taken for markup


class Odd(nn.Module):
    """Bare parameters, a tied weight, a parametrized layer, layers that are never called."""

    def __init__(self):
        super().__init__()
        self.table, self.shift = nn.Embedding(11, 6), nn.Parameter(torch.randn(1, 7, 6))
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
        self.decoder = nn.Linear(6, 11, bias=False)
        self.decoder.weight = self.table.weight
        self.block = nn.ModuleDict({"temperature": nn.ParameterList([nn.Parameter(torch.ones(1))])})
        self.other = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))

    def forward(self, tokens, x):
        return self.decoder((self.table(tokens) + self.shift + self.inner(x)) * self.block["temperature"][0])


ODD = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, 7, 4)


def test_layers_that_the_trace_never_uses_are_left_alone():
    model = nn.ModuleDict({"used": nn.Linear(3, 4), "unused": nn.Linear(3, 4)})
    row = told(model, Call("used", (torch.randn(2, 3),)), "unused")
    assert (row.candidate, row.units, row.flops) == (False, "4 outputs", 0)
    assert row.reason == "not used in what was traced: left alone"
    rows = by_layer(explain(Odd(), ODD))
    assert rows["other.0"].reason == rows["other.1"].reason == row.reason


def test_bare_tied_and_parametrized_parameters():
    model = Odd()
    rows = by_layer(explain(model, ODD))
    assert list(rows) == ["", "table", "inner", "decoder", "block.temperature", "other.0", "other.1"]
    assert sum(row.params for row in rows.values()) == sum(p.numel() for p in model.parameters())
    assert (rows["decoder"].params, rows["decoder"].units, rows["decoder"].candidate) == (0, "11 outputs", False)
    assert (rows[""].params, rows[""].removable) == (42, 6)
    assert (rows["inner"].type, rows["inner"].params) == ("Linear", 36)
    assert {"decoder", "table", "inner", ""} == {*rows["table"].shrinks_with, "table"}
    assert rows["block.temperature"].reason == "it holds no more than one channel"


def test_own_flops_leave_out_layers_inside():
    counts = {"": 100, "a": 70, "a.b": 50, "a.b.c": 20, "d": 10}
    assert own_flops(counts, ["", "a", "a.b.c", "d"]) == {"": 20, "a": 50, "a.b.c": 20, "d": 10}
    row = by_layer(explained("conv_bn"))["0"]
    assert row.flops == 2 * 8 * 64 * 27  # examples, filters, places, taps


def test_the_example_input_array_stands_for_a_missing_example():
    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.body, self.example_input_array = conv_bn(), torch.randn(2, 3, 8, 8)

        def forward(self, x):
            return self.body(x)

    found = explain(Lit())
    assert [row.units for row in found.rows] == [row.units for row in explained("conv_bn").rows]
    assert found.inputs[0]["args"] == [{"dtype": "float32", "shape": [2, 3, 8, 8]}]
    with pytest.raises(ModelError, match="example_input_array"):
        explain(conv_bn())


def test_the_public_name_is_the_function():
    assert lightning_prune.explain is explain


# The dry run --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("conv_bn", LowRank(flops=0.6, align=1)),
        ("conv_bn", Magnitude(structured=True, flops=0.5, align=1)),
        ("transformer", Magnitude(structured=True, params=0.6, align=1)),
    ],
)
def test_a_dry_run_tells_what_compress_does(name, method):
    model, example = network(name)
    found = explain(model, example, method)
    small, plan = compress(model, method, example)
    assert found.plan == plan
    assert found.flops_after == count_flops(small, example).total < found.flops
    assert found.params_after == sum(p.numel() for p in small.parameters()) < found.params
    assert sum(row.params_after for row in found.rows) == found.params_after
    for row in found.rows:
        if any(step.module == row.layer for step in plan.steps):
            assert row.params_after < row.params
            assert "->" in row.change
        else:
            assert row.params_after == row.params
            assert row.change == (f"left alone: {plan.left_alone[row.layer]}" if row.layer in plan.left_alone else "")
    assert [row.units for row in found.rows] == [row.units for row in explained(name).rows]
    document = found.to_dict()
    assert json.loads(json.dumps(document))["plan"] == {"digest": plan.digest, "steps": plan.rows()}
    assert f"{found.flops:,} -> {found.flops_after:,}" in str(found)


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_a_dry_run_of_a_gradual_method_tells_the_end_of_its_schedule(schedule):
    model, example = network("conv_bn")
    before = copy.deepcopy(model.state_dict())
    gradual = Magnitude(structured=True, flops=0.5, align=1, start_epoch=1, until_epoch=4, schedule=schedule)
    found, at_once = (
        explain(model, example, gradual),
        explain(model, example, Magnitude(structured=True, flops=0.5, align=1)),
    )
    assert found.plan.steps == at_once.plan.steps
    assert (found.flops_after, found.params_after) == (at_once.flops_after, at_once.params_after)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(OptionError, match="acts while a model trains"):
        compress(model, gradual, example)  # what has not been trained for is not made


def test_a_dry_run_of_a_method_that_trains_to_low_rank_factorizes_the_weights_as_they_are():
    model, example = network("conv_bn")
    found = explain(model, example, TRP(flops=0.6, align=1))
    assert found.flops_after <= 0.6 * found.flops
    assert {step.action for step in found.plan.steps} == {"factorize"}


def test_flops_after_are_those_of_the_layers_of_the_smaller_model():
    found = explain(*network("conv_bn"), Magnitude(structured=True, sparsity=0.5, align=1))
    first, second = (by_layer(found)[name] for name in ("0", "3"))
    kept = first.params_after // 27
    assert first.flops_after == 2 * kept * 64 * 27
    assert second.flops_after == 2 * (second.params_after // (9 * kept + 1)) * 16 * 9 * kept


def test_a_second_stage_tells_its_own_steps_and_a_met_target_none():
    model, example = network("conv_bn")
    once, first = compress(model, Magnitude(structured=True, flops=0.7, align=1), example)
    found = explain(once, example, LowRank(rank=2, align=1))
    assert found.method == "LowRank"
    assert [stage.method for stage in found.plan.stages] == ["LowRank"]
    assert {step.action for step in first.steps} == {"channels"}
    assert {step.action for step in found.plan.steps} == {"factorize"}
    met = explain(once, example, Magnitude(structured=True, flops=0.7, align=1))
    assert not met.plan
    assert (met.flops_after, met.params_after) == (met.flops, met.params)
    assert "already met" in str(met)


def test_what_no_dry_run_can_answer_is_an_error():
    model, example = network("conv_bn")
    with pytest.raises(BudgetError, match="least"):
        explain(model, example, Magnitude(structured=True, flops=0.001, align=1))
    with pytest.raises(OptionError, match="while a model trains"):
        explain(model, example, TRP(energy=0.1))
    with pytest.raises(OptionError, match=r"LowRank\(flops=0.5\)"):
        explain(model, example, LowRank)


# The picture --------------------------------------------------------------------------------------------------------------------


def test_the_picture_is_a_png_and_the_same_bytes_twice(tmp_path):
    for path in ("a.png", "sub/b.png"):
        explained("conv_bn").picture(tmp_path / path)
    first, second = (tmp_path / "a.png").read_bytes(), (tmp_path / "sub" / "b.png").read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert first == second
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == ["a.png", "b.png"]


def fake(layers, method=None):
    """An explanation of so many layers, each writing a group of its own and reading the one before."""
    rows = tuple(
        Row(
            layer=f"stages.{i}" + ".$weird_name.conv$" * (i == 3),
            type="Conv2d",
            units="64 channels",
            removable=64,
            writes=((i, 64), (None, 32)),
            reads=((i - 1, 64),) if i else (),
            shrinks_with=(),
            reason="conv2d (net.py:3 `x = $y$`) has groups" * (i < 5),
            follows=(),
            flops=10,
            params=100,
            params_after=50,
        )
        for i in range(layers)
    )
    return Explanation(rows, (), 10 * layers, 100 * layers, (), method)


@pytest.mark.parametrize("layers", [5, 150])
def test_the_picture_has_a_bar_per_layer_in_the_colour_of_its_group(layers, tmp_path):
    fake(layers, "LowRank").picture(tmp_path / "groups.png")
    pixels = (255 * matplotlib.image.imread(io.BytesIO((tmp_path / "groups.png").read_bytes()))[..., :3]).round()
    assert pixels.shape[0] > 26 * layers  # room to read a line of text
    places = []
    for group in (0, layers // 2, layers - 1):
        color = [round(255 * part) for part in color_of(group)]
        thick = (abs(pixels - color) <= 1).all(-1).sum(1) > 300
        places.append(next(i for i, here in enumerate(thick) if here))
    assert places == sorted(places)
    assert len(set(places)) == 3


def test_no_two_groups_have_one_colour():
    assert len({tuple(round(255 * part) for part in color_of(group)) for group in range(300)}) == 300


def test_without_matplotlib_the_extra_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeMissingError, match=r"lightning-prune\[onnxruntime"):
        explained("conv_bn").picture(tmp_path / "groups.png")
    assert not list(tmp_path.iterdir())
