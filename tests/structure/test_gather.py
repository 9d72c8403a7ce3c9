"""Layers that gather the channels which they read from a shared stream: compared with slices by hand, alone and over several stages."""

import copy
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from lightning_prune.export import export_onnx
from torch import nn

from lightning_prune import Magnitude, compress, count_flops, load_from_checkpoint
from lightning_prune.checkpoint import rebuild
from lightning_prune.errors import ModelError, OptionError, PlanError
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.gathered import GatheredConv2d, GatheredLinear, reads_of
from lightning_prune.structure.gathering import gather_pays, gather_steps, readers_of_streams, why_not_gathered
from lightning_prune.structure.groups import find_units
from lightning_prune.structure.masks import Masks, cut_masks
from lightning_prune.structure.plan import Origin, Plan, Stage
from lightning_prune.structure.removal import removal_steps, removed_units
from lightning_prune.structure.steps import GatherInputs, MaskWeight
from lightning_prune.structure.surgery import compact, compact_, mask_
from lightning_prune.structure.trials import draw, try_sizes
from tests.structure.grammar import build, networks
from tests.structure.units import Net, at, cut, cut_at_random, layer, outputs, structure_of, units

IMAGE = torch.randn(3, 3, 6, 6, dtype=torch.float64)


class Residual(nn.Module):
    """A stream of 12 channels that two blocks, a second branch and the head read."""

    def __init__(self, width=12, activation=F.relu):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.a, self.a_back = nn.Conv2d(width, 5, 3, padding=1), nn.Conv2d(5, width, 1)
        self.b, self.b_back = nn.Conv2d(width, 7, 3, padding=1, bias=False), nn.Conv2d(7, width, 1)
        self.head = nn.Linear(width, 4)
        self.activation = activation

    def forward(self, x):
        x = self.activation(self.norm(self.stem(x)))
        x = x + self.a_back(F.relu(self.a(x)))
        x = x + self.b_back(F.relu(self.b(x)))
        return self.head(x.mean((2, 3)))


READERS = ("a", "b", "head")


def net(**options):
    model = Residual(**options)
    for tensor in (model.norm.weight, model.norm.bias, model.norm.running_mean, model.norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return model.double().eval()


def only(size, *indices):
    """Return a mask of ``size`` entries that is True at ``indices``."""
    return torch.zeros(size, dtype=torch.bool).index_fill(0, torch.tensor(indices, dtype=torch.int64), True)


KEPT = {"a": only(12, 0, 2, 3, 7, 8), "b": only(12, 2, 3, 4, 9, 11), "head": only(12, 1, 3, 5, 6, 7, 8, 9)}


def plan_for(model, steps):
    return Plan(tuple(steps), {}, Origin.of(model, 10**6), (Stage("Hand", {}),))


def gathering(model, kept=KEPT):
    return plan_for(model, gather_steps(model, kept))


def gathered(model, kept=KEPT):
    return compact(model, gathering(model, kept), as_calls(IMAGE))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


LAYERS = {
    "linear": (nn.Linear(6, 4), torch.randn(5, 6)),
    "tokens, no bias": (nn.Linear(6, 4, bias=False), torch.randn(2, 5, 6)),
    "conv1d": (nn.Conv1d(6, 4, 3, stride=2), torch.randn(2, 6, 9)),
    "conv2d": (nn.Conv2d(6, 4, (3, 1), padding=(1, 0), bias=False), torch.randn(2, 6, 5, 4)),
    "conv2d, same, circular": (nn.Conv2d(6, 4, 3, padding="same", padding_mode="circular"), torch.randn(2, 6, 5, 4)),
    "conv2d without a batch": (nn.Conv2d(6, 4, 3, dilation=2), torch.randn(6, 7, 7)),
    "conv3d": (nn.Conv3d(6, 4, 2), torch.randn(2, 6, 3, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_gathers_is_the_sliced_layer_on_the_sliced_input(name):
    dense, x = (copy.deepcopy(item).double() for item in LAYERS[name])
    kept = [0, 3, 4]
    small = compact(
        nn.Sequential(dense), plan_for(nn.Sequential(dense), gather_steps(nn.Sequential(dense), {"0": only(6, *kept)}))
    )
    channels = -1 if isinstance(dense, nn.Linear) else 1 - dense.weight.ndim
    twin = copy.deepcopy(dense)
    twin.weight = nn.Parameter(dense.weight[:, kept])
    close(small(x), twin(x.movedim(channels, 0)[kept].movedim(0, channels)))
    assert torch.equal(small[0].weight, dense.weight[:, kept])
    assert small[0].index.tolist() == kept
    inputs = "in_features" if isinstance(dense, nn.Linear) else "in_channels"
    assert (getattr(small[0], inputs), getattr(dense, inputs)) == (3, 6)
    assert repr(small[0]).endswith("reads 3 of 6)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_that_belongs_to_the_layer_stays(dtype):
    model = net().to(dtype=dtype, memory_format=torch.channels_last)
    model.a.weight.requires_grad_(False)
    parameters, seen = dict(model.named_parameters()), []
    handle = model.a.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    compact_(model, gathering(model))
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert type(model.a) is GatheredConv2d
    assert type(model.head) is GatheredLinear
    assert (model.a.weight.dtype, model.a.index.dtype, model.a.weight.requires_grad) == (dtype, torch.int64, False)
    assert model.a.weight.stride() == torch.empty_like(model.a.weight, memory_format=torch.channels_last).stride()
    assert set(model.state_dict()) - set(net().state_dict()) >= {"a.index", "b.index", "head.index"}
    model(IMAGE.to(dtype)).sum().backward()
    assert seen == [5]  # what the layer computes with, not the stream
    handle.remove()
    model(IMAGE.to(dtype))
    assert seen == [5]
    assert model.b.weight.grad.shape == (7, 5, 3, 3)


def test_a_residual_network_computes_what_zeroed_columns_do():
    model = net()
    small, dense = gathered(model), copy.deepcopy(model)
    with torch.no_grad():
        for name, kept in KEPT.items():
            for column in range(12):
                if not kept[column]:
                    dense.get_submodule(name).weight[:, column] = 0
    close(small(IMAGE), dense(IMAGE))
    mask_(model, gathering(model))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), dense.parameters(), strict=True))
    assert count_flops(small, IMAGE).by_module["a"] * 12 == count_flops(dense, IMAGE).by_module["a"] * 5
    assert count_flops(small, IMAGE).uncounted == {}


def test_a_stream_of_another_width_is_refused():
    small = gathered(net())
    with pytest.raises(ModelError, match="stream of 12 channels"):
        small.a(torch.zeros(1, 13, 6, 6, dtype=torch.float64))


def test_gathering_twice_is_gathering_what_both_keep():
    model = net()
    twice = gathered(gathered(model), {"a": only(5, 1, 4), "head": only(7, 0, 1, 2, 3, 4, 6)})
    once = gathered(model, KEPT | {"a": only(12, 2, 8), "head": only(12, 1, 3, 5, 6, 7, 9)})
    assert gather_steps(once, {"b": only(5, 0, 1, 2, 3, 4)}) == ()
    assert [step.module for step in plan_of(twice).steps] == ["a", "b", "head", "a", "head"]
    states = [{key: value for key, value in m.state_dict().items() if "plan" not in key} for m in (once, twice)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0] | states[1])


def test_units_of_the_stream_have_columns_where_they_are_read():
    parts = {"first": nn.Conv2d(3, 4, 1), "a": nn.Conv2d(4, 2, 1), "b": nn.Conv2d(4, 2, 1)}
    model = Net(lambda s, x: torch.cat([s.a(s.first(x)), s.b(s.first(x))], 1), **parts)
    small = gathered(model.double(), {"a": only(4, 0, 2), "b": only(4, 1, 2)})
    structure = structure_of(small, IMAGE)
    first = [layer("first", channel) for channel in range(4)]
    columns = [at("a.weight", 1, 0), at("b.weight", 1, 0), at("a.weight", 1, 1) | at("b.weight", 1, 1), set()]
    assert units(structure) == {frozenset(own | read) for own, read in zip(first, columns, strict=True)}
    assert len(structure.groups) == 1  # by who reads them they would be four, of which none could lose its only unit


def test_later_stages_shrink_the_stream_and_the_layers():
    small = gathered(net())
    structure = structure_of(small, IMAGE)
    assert structure.count == structure_of(net(), IMAGE).count == 12 + 5 + 7
    assert {axis for name, axis in structure.reasons if name in ("a.weight", "b.weight")} == {2, 3}  # sizes of kernels
    for seed in range(6):
        kept = draw(structure, np.arange(structure.count), seed=seed)
        cut(small, structure, kept, IMAGE)
        assert (removed_units(structure, removal_steps(small, structure, kept)) == ~kept).all()


def test_units_may_be_held_in_a_network_that_gathers():
    small = gathered(net())
    structure = structure_of(small, IMAGE).without(np.array([0, 2, 13]), "the test holds it")
    assert structure.count == 21
    cut_at_random(small, structure, IMAGE)


def leave(model, *channels):
    """Return which units stay when ``channels`` of the stream leave, and the structure."""
    structure = structure_of(model, IMAGE)
    stem = next(slot.units for slot in structure.slots if (slot.tensor, slot.axis) == ("stem.weight", 0))
    kept = np.ones(structure.count, bool)
    kept[stem[list(channels)]] = False
    return structure, kept


def without(model, *channels):
    structure, kept = leave(model, *channels)
    return compact(model, plan_for(model, removal_steps(model, structure, kept)), as_calls(IMAGE))


def test_the_index_is_renumbered_as_the_stream_shrinks():
    small = without(gathered(net()), 0, 1, 3, 10)  # 2 4 5 6 7 8 9 11 stay
    assert small.a.index.tolist() == [0, 4, 5]
    assert small.b.index.tolist() == [0, 1, 6, 7]
    assert small.head.index.tolist() == [2, 3, 4, 5, 6]
    assert (small.a.stream, small.a.in_channels) == (8, 3)
    smaller = without(small, 0, 1)
    assert [smaller.get_submodule(name).index.tolist() for name in READERS] == [[2, 3], [4, 5], [0, 1, 2, 3, 4]]


def test_a_layer_that_reads_all_that_is_left_is_an_ordinary_one_again():
    small = without(gathered(net()), 1, 4, 5, 6, 9, 10, 11)  # a reads 0, 2, 3, 7, 8
    assert type(small.a) is nn.Conv2d
    assert "a.index" not in small.state_dict()
    assert type(small.b) is GatheredConv2d
    fresh = net()
    plan_of(small).build(fresh)
    assert type(fresh.a) is nn.Conv2d
    assert gathered(small, {"a": only(5, 1)}).a.index.tolist() == [1]


@pytest.mark.parametrize("read", [(4,), (4, 9)])
def test_a_layer_that_loses_all_that_it_reads_is_left_with_a_zero(read):
    small = gathered(net(), {"b": only(12, *read)})
    structure, kept = leave(small, 4, 9)
    smaller = cut(small, structure, kept, IMAGE)
    with pytest.raises(OptionError, match="none of its inputs"):
        gather_steps(small, {"b": only(len(read), 0)}, removal_steps(small, structure, kept))
    assert smaller.b.index.tolist() == [0]
    assert smaller.b.weight.shape == (7, 1, 3, 3)
    assert not smaller.b.weight.any()


def test_one_stage_gathers_and_removes_as_two_stages_do():
    model = net()
    structure = structure_of(model, IMAGE)
    for seed in range(4):
        kept = draw(structure, np.arange(structure.count), seed=seed)
        steps = removal_steps(model, structure, kept)
        joint = plan_for(model, gather_steps(model, KEPT, steps))
        assert (removed_units(structure, joint.steps) == ~kept).all()  # what is gathered away has not left
        assert len(joint) == len(steps) + len(set(READERS) - {step.module for step in steps})
        small = compact(model, joint, as_calls(IMAGE))
        first = gathered(model)
        later = structure_of(first, IMAGE)
        stays = ~removed_units(later, steps)  # by the layers that write, which the gathering leaves as they are
        second = compact(first, plan_for(first, removal_steps(first, later, stays)), as_calls(IMAGE))
        for key, value in second.state_dict().items():
            assert "plan" in key or torch.equal(value, small.state_dict()[key]), key
        held = copy.deepcopy(model)
        Masks.pending(held, joint.steps).apply_()
        close(held(IMAGE), small(IMAGE))


@pytest.mark.parametrize("drop", ["read by none", "read"])
def test_a_constant_of_the_stream_is_absorbed_where_it_is_read(drop):
    model = Net(
        lambda s, x: s.a(torch.sigmoid(s.first(x))) + s.b(torch.sigmoid(s.first(x))),
        first=nn.Linear(3, 5),
        a=nn.Linear(5, 4),
        b=nn.Linear(5, 4),
    )
    x = torch.randn(7, 3, dtype=torch.float64)
    structure = structure_of(model, x)
    kept = np.ones(5, bool)
    kept[next(s.units for s in structure.slots if s.tensor == "first.weight" and s.axis == 0)[[1, 3]]] = False
    reads = only(5, 0, 2) if drop == "read by none" else only(5, 0, 1, 2)
    plan = plan_for(model, gather_steps(model, {"a": reads}, removal_steps(model, structure, kept)))
    hidden = torch.sigmoid(model.first(x))
    hidden[:, [1, 3]] = 0.5
    for calls in ((), as_calls(x)):  # without them the model is not masked before it is cut
        small = compact(model, plan, calls)
        close(small(x), F.linear(hidden, model.a.weight * reads, model.a.bias) + model.b(hidden))
        assert small.a.index.tolist() == [0, 1]


def test_a_layer_that_is_called_twice_ties_both_streams():
    parts = {"first": nn.Linear(3, 4), "other": nn.Linear(3, 4), "a": nn.Linear(4, 2), "o": nn.Linear(4, 2)}
    model = Net(lambda s, x: s.a(s.first(x)) + s.a(s.other(x)) + s.o(s.first(x)), **parts).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    small = gathered_on(model, {"a": only(4, 1, 3)}, x)
    structure = structure_of(small, x)
    assert structure.count == 4
    cut_at_random(small, structure, x)


def gathered_on(model, kept, x):
    return compact(model, gathering(model, kept), as_calls(x))


def test_the_index_of_others_is_not_touched():
    class Picks(nn.Linear):
        def __init__(self):
            super().__init__(2, 3)
            self.register_buffer("index", torch.tensor([0, 2]))

        def forward(self, x):
            return super().forward(x.index_select(-1, self.index))

    model = Net(lambda s, x: s.a(s.first(x)), first=nn.Linear(3, 4), a=Picks())
    structure = structure_of(model, torch.randn(5, 3))
    assert structure.count == 0
    assert "index_select" in structure.reasons["first.weight", 0]


def test_a_stream_that_is_an_input_stays():
    model = Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)).double()
    small = gathered(model, {"a": only(3, 0, 2)})
    structure = structure_of(small, IMAGE)
    assert structure.count == 4
    cut_at_random(small, structure, IMAGE)


def test_the_plan_rebuilds_the_shapes_and_a_file_the_values(tmp_path):
    small = without(gathered(net()), 0, 1, 3, 10)
    fresh = net()
    Plan.from_json(plan_of(small).to_json()).build(fresh)
    assert [reads_of(fresh.get_submodule(n)).tolist() for n in READERS] == [
        reads_of(small.get_submodule(n)).tolist() for n in READERS
    ]
    torch.save(small.state_dict(), tmp_path / "small.pt")
    loaded = load_from_checkpoint(Residual, tmp_path / "small.pt").double().eval()
    torch.testing.assert_close(loaded(IMAGE), small(IMAGE), rtol=1e-5, atol=1e-5)  # loaded into float32
    copied = copy.deepcopy(small)
    assert torch.equal(copied(IMAGE), small(IMAGE))
    assert copied.a.index.data_ptr() != small.a.index.data_ptr()
    meta = Residual().to("meta")
    plan_of(small).build(meta)
    meta.load_state_dict({k: v for k, v in small.state_dict().items() if "plan" not in k}, assign=True)
    close(meta.eval()(IMAGE), small(IMAGE))


def test_stages_are_undone_one_by_one():
    model = net()
    first = gathered(model)
    second = without(first, 0, 1, 3, 10)
    model_again, first_again = copy.deepcopy(second), copy.deepcopy(second)
    rebuild(first_again, plan_of(first))
    first_again.load_state_dict(first.state_dict())
    assert torch.equal(first_again(IMAGE), first(IMAGE))
    assert first_again.a.index.tolist() == first.a.index.tolist()
    rebuild(model_again, None)
    model_again.load_state_dict(model.state_dict())
    assert torch.equal(model_again(IMAGE), model(IMAGE))
    assert type(model_again.a) is nn.Conv2d
    assert not hasattr(model_again.a, "stream")


def test_the_dense_model_is_left_as_it_is():
    model = net()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    gathered(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == kinds


def test_masks_of_earlier_stages_lose_the_columns():
    model = net()
    mask = torch.rand(5, 12, 3, 3) < 0.5
    compact_(model, plan_for(model, [MaskWeight.of("a", "weight", mask)]))
    compact_(model, gathering(model))
    assert torch.equal(cut_masks(model, plan_of(model))["a.weight"], mask[:, KEPT["a"]])


def test_a_plan_says_what_is_read():
    row = gathering(net()).rows()[0]
    assert row == {
        "layer": "a",
        "action": "gather",
        "before": "5x12x3x3 reads 12 of 12",
        "after": "5x5x3x3 reads 5 of 12",
        "kept": 5 / 12,
        "reason": "",
    }
    small = gathered(net(), {"b": KEPT["b"]})
    structure, kept = leave(small, 0, 1)
    rows = {row["layer"]: row for row in plan_for(small, removal_steps(small, structure, kept)).rows()}
    assert (rows["b"]["before"], rows["b"]["after"], rows["b"]["kept"]) == ("reads 5 of 12", "reads 5 of 10", 1.0)


def put(name, value):
    return lambda step: step.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("stream", [12, 12.0]), "one number of channels to another"),
        (put("stream", [12, -1]), "one number of channels to another"),
        (put("stream", [12]), "one number of channels to another"),
        (put("stream", 12), "broken"),
        (put("stream", [10**15, 12]), "bytes"),
        (put("reads", ["//A="]), "one number of channels to another"),
        (put("reads", ["//A=", "//A="]), "does not fit"),
        (put("reads", ["//A=", "AAA="]), "does not fit"),
        (put("reads", ["//A=", "//"]), "base64"),
        (put("reads", ["//A=", 5]), "broken"),
        (put("keep", "AA=="), "bytes"),
        (put("keep", None), "broken"),
        (put("tensors", {}), "does not fit"),
        (put("more", 1), "broken"),
        (lambda step: step.pop("keep"), "broken"),
    ],
)
def test_a_damaged_step_is_refused(change, message):
    data = json.loads(gathering(net()).to_json())
    assert Plan.from_json(json.dumps(data)) == gathering(net())
    change(data["steps"][0])
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(data))


def test_another_model_than_the_one_planned_for_is_refused():
    plan = gathering(net())
    again = Plan(plan.steps[:1])
    small = gathered(net())
    with pytest.raises(PlanError, match=r"expected shape \[5, 12, 3, 3\]"):
        compact(small, again)
    structure, kept = leave(small, 0, 1)
    later = Plan(removal_steps(small, structure, kept))
    other = gathered(net(), KEPT | {"a": only(12, 0, 2, 3, 7, 9)})
    with pytest.raises(PlanError, match="reads other channels than the 5 of 12"):
        later.build(other)

    class Own(nn.Conv2d):
        pass

    model = net()
    model.a = Own(12, 5, 3).double()
    with pytest.raises(PlanError, match="'a' is a Own"):
        again.build(model)


def test_what_cannot_gather_says_why():
    class Own(nn.Linear):
        pass

    model = net()
    model.tied, model.tie = nn.Linear(4, 4), nn.Linear(4, 4)
    model.tie.weight = model.tied.weight
    model.grouped, model.own = nn.Conv2d(4, 4, 1, groups=2), Own(4, 4)
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model.again = model.head
    model.stack = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model.replaced = nn.Linear(4, 4)
    model.replaced.forward = lambda x: x
    found = why_not_gathered(model)
    expected = {
        "tied": "tied.weight = tie.weight",
        "tie": "tied.weight = tie.weight",
        "grouped": "without groups",
        "own": "this is a Own",
        "normed": "remove the parametrization",
        "head": "several names: head, again",
        "again": "several names: head, again",
        "stack.linear1": "reads its weight",
        "stack.self_attn.out_proj": "NonDynamicallyQuantizableLinear",
        "replaced": "forward was replaced",
        "": "Residual",
    }
    assert all(reason in found[name] for name, reason in expected.items())
    assert not {"a", "b", "a_back"} & set(found)
    assert "wrap it" in why_not_gathered(nn.Linear(3, 2))[""]
    for name in ("tied", "nowhere"):
        with pytest.raises(ModelError, match=f"'{name}' cannot gather its inputs: "):
            gather_steps(model, {name: only(4, 1)})


def test_a_layer_whose_forward_is_called_past_it_is_found_out():
    model = Net(lambda s, x: s.b.forward(s.a(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)).double()
    with pytest.raises(ModelError, match=r"self-check failed.*does not run"):
        gathered(model, {"b": only(4, 1, 2)})
    assert type(model.b) is nn.Conv2d


def test_masks_that_are_none_are_refused():
    model = net()
    for mask in (only(11, 1), only(12, 1).long(), only(12, 1)[None]):
        with pytest.raises(OptionError, match="12 booleans"):
            gather_steps(model, {"a": mask})
    with pytest.raises(OptionError, match="none of its inputs"):
        gather_steps(model, {"a": only(12)})
    structure, kept = leave(model, 1, 4)
    with pytest.raises(OptionError, match="none of its inputs"):
        gather_steps(model, {"a": only(12, 1, 4)}, removal_steps(model, structure, kept))


def test_streams_are_what_two_layers_read():
    model = net()
    structure = find_units(model, as_calls(IMAGE))
    (found,) = readers_of_streams(model, structure)
    assert found.group.name == "stem"
    assert list(found.readers) == ["a", "b", "head"]
    assert all(slot.tensor == f"{name}.weight" and slot.axis == 1 for name, slot in found.readers.items())
    model.a.forward = model.a.forward
    (found,) = readers_of_streams(model, structure)
    assert list(found.readers) == ["b", "head"]  # two read it besides, whether they may gather or not


@pytest.mark.filterwarnings("ignore")
def test_onnx_gathers_at_every_batch_size(tmp_path):
    small = without(gathered(net()), 0, 1, 3).float()
    export_onnx(small, tmp_path / "small.onnx", example_inputs=IMAGE.float())
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        x = torch.randn(batch, 3, 6, 6)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), small(x), rtol=1e-4, atol=1e-5)
    operations = [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]
    assert operations.count("Gather") == 3


def test_a_later_stage_keeps_its_budget():
    model = net()
    dense = count_flops(model, IMAGE).total
    plan = Plan(gather_steps(model, KEPT), {}, Origin.of(model, dense), (Stage("Hand", {}),))
    small = compact(model, plan)
    for bound in (0.6, 0.3, 0.15):
        smaller, _ = compress(small, Magnitude(structured=True, flops=bound, align=1), IMAGE)
        assert count_flops(smaller, IMAGE).total <= bound * dense


def test_compilers_follow():
    small = gathered(net())
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    close(compiled(IMAGE), small(IMAGE))


def test_a_step_of_one_stage_may_be_of_a_layer_that_gathers_already():
    small = gathered(net())
    structure, kept = leave(small, 0, 1, 3)
    steps = gather_steps(small, {"a": only(5, 0, 1, 4), "b": only(5, 1, 2, 3)}, removal_steps(small, structure, kept))
    found = compact(small, plan_for(small, steps), as_calls(IMAGE))
    assert found.a.index.tolist() == [0, 5]  # 2 and 8 of 2 4 5 6 7 8 9 10 11
    assert found.b.index.tolist() == [1, 6]  # 4 and 9
    assert sum(isinstance(step, GatherInputs) for step in steps) == 3


@pytest.mark.parametrize(
    (
        "layer",
        "faster",
        "slower",
    ),  # numbers of inputs read that were timed as such (tests/benchmarks/test_gather_speed.py)
    [
        (nn.Conv2d(128, 128, 3), (112, 96, 64, 32), (127, 120)),
        (nn.Conv2d(64, 64, 3), (48, 32, 16), (60, 56)),
        (nn.Conv2d(32, 32, 3), (16, 8), (24,)),
        (nn.Conv2d(256, 64, 1), (128, 64), (192, 240)),
        (nn.Conv2d(128, 128, 1), (64, 32), (96,)),
        (nn.Conv2d(64, 256, 1), (48, 32, 16), (60,)),
        (nn.Linear(256, 1024), (128, 64), (192,)),
        (nn.Linear(256, 256), (64,), (128, 192)),
        (nn.Linear(64, 64), (), (48, 32, 16)),
    ],
)
def test_gathering_pays_where_it_was_measured_to(layer, faster, slower):
    assert all(gather_pays(layer, kept) for kept in faster)
    assert not any(gather_pays(layer, kept) for kept in slower)


def gathers_at_random(network):
    """Let every layer of a random network that may gather do so, then shrink the network; and do both in one stage."""
    model, inputs = build(network)
    refused, random = why_not_gathered(model), torch.Generator().manual_seed(network.seed)
    layers = {name: module for name, module in model.named_modules() if name not in refused}
    kept = {name: torch.rand(m.weight.shape[1], generator=random) < 0.7 for name, m in layers.items()}
    for mask in kept.values():
        mask[torch.randint(len(mask), (1,), generator=random)] = True
    small = compact(model, gathering(model, kept), as_calls(inputs))
    dense, later = (try_sizes(m, as_calls(inputs), find_units(m, as_calls(inputs))) for m in (model, small))
    assert later.count >= dense.count
    if later.count and dense.count:
        stays = draw(later, np.arange(later.count), 0.6, seed=network.seed)
        cut(small, later, stays, *inputs)
        rebuilt(network, compact(small, plan_for(model, removal_steps(small, later, stays))), inputs)
        stays = draw(dense, np.arange(dense.count), 0.6, seed=network.seed)
        for slot in dense.slots:
            name, mask = slot.tensor.rpartition(".")[0], torch.from_numpy(stays[slot.units] | (slot.units < 0))
            if slot.axis == 1 and name in kept and not (kept[name] & mask).any():
                kept[name] = mask  # nothing would be left to read
        plan = plan_for(model, gather_steps(model, kept, removal_steps(model, dense, stays)))
        rebuilt(network, compact(model, plan, as_calls(inputs)), inputs)


def rebuilt(network, small, inputs):
    fresh, _ = build(network)
    plan_of(small).build(fresh)
    fresh.load_state_dict({key: value for key, value in small.state_dict().items() if "plan" not in key})
    assert all(map(torch.equal, outputs(fresh, inputs), outputs(small, inputs)))


@settings(max_examples=8, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(network=networks(fewest=2, most=3))
def test_random_networks_gather_and_shrink(network):
    gathers_at_random(network)


@pytest.mark.exhaustive
@settings(max_examples=300, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(network=networks())
def test_many_more_random_networks_gather_and_shrink(network):
    gathers_at_random(network)
