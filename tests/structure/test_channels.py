"""Channels removed: the tensors are those that loops over indices give, and everything else about them stays."""

import copy

import pytest
import torch
from cuts import both, chain, cut_chain, inputs, keep, outputs, plan_of_steps
from torch import nn

from lightning_prune.checkpoint import rebuild
from lightning_prune.errors import PlanError
from lightning_prune.structure.carrier import attach, plan_of
from lightning_prune.structure.masks import Masks
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.steps import Cut, Factorize, KeepChannels, MaskWeight, OpenHeads
from lightning_prune.structure.surgery import compact, compact_, mask_

FIRST, SECOND = keep(6, 1, 4), keep(5, 0)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_network_cut_by_hand_written_loops():
    model = chain()
    small = copy.deepcopy(model)
    compact_(small, cut_chain(model, FIRST, SECOND))
    rows, columns = [0, 2, 3, 5], [1, 2, 3, 4]
    for i, out in enumerate(rows):
        assert torch.equal(small[0].weight[i], model[0].weight[out])
        for norm in ("weight", "bias", "running_mean", "running_var"):
            assert getattr(small[1], norm)[i] == getattr(model[1], norm)[out]
        for j, after in enumerate(columns):
            assert torch.equal(small[3].weight[j, i], model[3].weight[after, out])
    for j, after in enumerate(columns):
        assert small[3].bias[j] == model[3].bias[after]
        for tap in range(16):
            assert torch.equal(small[6].weight[:, 16 * j + tap], model[6].weight[:, 16 * after + tap])
    assert [tuple(p.shape) for p in small.parameters()][4:] == [(4, 4, 3, 3), (4,), (3, 64), (3,)]
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels) == (4, 4, 4)
    assert (small[3].out_channels, small[6].in_features, small[6].out_features) == (4, 64, 3)
    assert small[1].num_batches_tracked == model[1].num_batches_tracked


@pytest.mark.parametrize("train", [False, True])
def test_the_compact_network_computes_what_the_masked_one_does(train):
    model = chain().train(train)
    plan = cut_chain(model, FIRST, SECOND)
    small = compact(model, plan)
    mask_(model, plan)
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    close(small(x), model(x))


def test_groups_of_a_convolution_may_keep_different_inputs():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 2, 1)).double()
    before, rows = keep(8, 1, 3, 4, 6), keep(6, 1, 5)  # group 0 keeps its inputs 0 and 2, group 1 its inputs 1 and 3
    grid = torch.stack([before[:4]] * 3 + [before[4:]] * 3)
    weight = Cut.of((6, 4, 3, 3), {0: rows}, grid=grid, zero=(0,))
    bias = Cut.of((6,), {0: rows}, zero=(0,))
    sizes = {"in_channels": (8, 4), "out_channels": (6, 4)}
    grouped = KeepChannels("2", {"weight": weight, "bias": bias}, sizes)
    plan = plan_of_steps(model, [outputs("0", model[0], before), grouped, inputs("3", model[3], rows)])
    small = compact(model, plan)
    for i, (row, columns) in enumerate([(0, [0, 2]), (2, [0, 2]), (3, [1, 3]), (4, [1, 3])]):
        for j, column in enumerate(columns):
            assert torch.equal(small[2].weight[i, j], model[2].weight[row, column])
    mask_(model, plan)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    close(small(x), model(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def cut_lstm(model, kept):
    """``kept`` by layer and direction."""
    tensors = {}
    for layer in (0, 1):
        into = None if layer == 0 else torch.cat(kept[0])
        for direction, suffix in enumerate(("", "_reverse")):
            units = kept[layer][direction]
            gates = units.repeat(4)
            end = f"l{layer}{suffix}"
            lstm = model.lstm
            columns = {} if into is None else {1: into}
            shape = tuple(getattr(lstm, f"weight_ih_{end}").shape)
            tensors[f"weight_ih_{end}"] = Cut.of(shape, {0: gates} | columns, zero=(0,))
            tensors[f"weight_hh_{end}"] = Cut.of((20, 5), {0: gates, 1: units}, zero=(0,))
            tensors[f"bias_ih_{end}"] = tensors[f"bias_hh_{end}"] = Cut.of((20,), {0: gates}, zero=(0,))
    step = KeepChannels("lstm", tensors, {"hidden_size": (5, 3)})
    return plan_of_steps(model, [step, inputs("head", model.head, torch.cat(kept[1]))])


def test_hidden_units_of_an_lstm_leave_with_their_four_gates():
    model = Recurrent().double()
    kept = [[keep(5, 0, 1), keep(5, 2, 4)], [keep(5, 0, 3), keep(5, 1, 2)]]
    plan = cut_lstm(model, kept)
    small = compact(model, plan)
    for gate in range(4):
        for i, unit in enumerate([2, 3, 4]):
            assert torch.equal(small.lstm.weight_ih_l0[3 * gate + i], model.lstm.weight_ih_l0[5 * gate + unit])
    mask_(model, plan)
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    close(small(x), model(x))
    assert not model.lstm(x)[0][..., [0, 3, 6, 7]].any()
    fresh = Recurrent().double()
    plan.build(fresh)
    fresh.load_state_dict({key: value for key, value in small.state_dict().items() if "plan" not in key})
    assert torch.equal(fresh(x), small(x))


@pytest.mark.parametrize("kind", ["conv", "linear", "grid"])
def test_constants_behind_an_activation_move_into_the_bias(kind):
    if kind == "linear":
        model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 5)).double()
        x = torch.randn(6, 3, dtype=torch.float64)
    else:
        last = nn.Conv2d(4, 6, 2, groups=2 if kind == "grid" else 1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), last).double()
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    kept = keep(4, 0, 3)
    step = inputs("2", model[2], kept, value=0.5) if kind != "grid" else None
    if step is None:
        grid = torch.stack([kept[:2]] * 3 + [kept[2:]] * 3)
        absorb = {"weight": "weight", "bias": "bias", "value": 0.5}
        step = KeepChannels("2", {"weight": Cut.of((6, 2, 2, 2), {}, grid=grid)}, {"in_channels": (4, 2)}, absorb)
    plan = plan_of_steps(model, [outputs("0", model[0], kept), step])
    small = compact(model, plan)
    mask_(model, plan)
    close(small(x), model(x))
    assert not torch.equal(small[2].bias, model[2].bias)


def test_a_tied_parameter_is_cut_once_and_stays_tied():
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)).double()
    model[1].weight = model[0].weight
    kept = keep(6, 2, 5)
    cut = Cut.of((7, 6), {1: kept}, zero=(1,))
    steps = [
        KeepChannels("0", {"weight": cut}, {"embedding_dim": (6, 4)}),
        KeepChannels("1", {}, {"in_features": (6, 4)}),
    ]
    plan = plan_of_steps(model, steps)
    small = compact(model, plan)
    mask_(model, plan)
    tokens = torch.arange(7)[None]
    close(small(tokens), model(tokens))
    assert small[0].weight is small[1].weight
    assert small[0].weight.shape == (7, 4)
    assert plan.rows()[1] | {"kept": 1.0, "before": "in_features 6", "after": "in_features 4"} == plan.rows()[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_stay_the_same_objects_with_all_their_properties(dtype):
    model = chain().to(dtype=dtype, memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    model[0].weight.note = "the user's"
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.ones_like(p)
    compact_(model, cut_chain(model, FIRST, SECOND))
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert all(p.dtype == dtype and type(p) is nn.Parameter for p in parameters)
    assert [p.requires_grad for p in parameters] == [False] + [True] * 7
    assert model[0].weight.note == "the user's"
    assert [p.grad is None for p in parameters] == [True] * 7 + [False]  # the last bias keeps its shape
    for layer in (model[0], model[3]):
        assert layer.weight.stride() == torch.empty_like(layer.weight, memory_format=torch.channels_last).stride()


def test_hooks_stay_and_a_graph_from_before_does_not_spoil_the_gradient():
    model, seen = chain(), []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].weight.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    held = model(x).sum()
    compact_(model, cut_chain(model, FIRST, SECOND))
    seen.clear()
    model(x).sum().backward()
    assert seen == ["forward", (4, 3, 3, 3), "accumulated"]
    assert model[0].weight.grad.shape == (4, 3, 3, 3)
    assert held.requires_grad


def test_attributes_keep_their_type():
    model = nn.Module()
    model.register_parameter("scale", nn.Parameter(torch.ones(8)))
    model.parts, model.sizes, model.width = [3, 5], torch.Size([8]), 8
    mask = keep(8, 0, 7)
    sizes = {"parts": ([3, 5], [2, 4]), "sizes": ([8], [6]), "width": (8, 6)}
    plan = plan_of_steps(model, [KeepChannels("", {"scale": Cut.of((8,), {0: mask})}, sizes)])
    Plan.from_json(plan.to_json()).build(model)
    assert (model.parts, model.sizes, model.width, len(model.scale)) == ([2, 4], torch.Size([6]), 6, 6)
    assert (type(model.parts), type(model.sizes)) == (list, torch.Size)
    plan.steps[0].undo(model)
    assert (model.parts, model.sizes, model.width, len(model.scale)) == ([3, 5], torch.Size([8]), 8, 8)


def test_buffers_that_no_state_dict_brings_are_cut_by_build():
    model = nn.Module()
    model.register_buffer("table", torch.arange(12.0).view(3, 4), persistent=False)
    step = KeepChannels("", {"table": Cut.of((3, 4), {1: keep(4, 0)})})
    step.build(model)
    assert torch.equal(model.table, torch.arange(12.0).view(3, 4)[:, 1:])
    with pytest.raises(PlanError, match=r"values of its buffer 'table'.*Construct the model anew"):
        step.undo(model)


def stages(model):
    """Channels, channels again on the same modules, then ranks."""
    small = copy.deepcopy(model)
    plan = Plan()
    for first, second in ((FIRST, SECOND), (keep(4, 3), keep(4, 0, 2))):
        stage = cut_chain(small, first, second)
        compact_(small, stage)
        plan = plan.then(stage)
    last = Plan((Factorize.of("3", small[3], "channel", 1),))
    compact_(small, last)
    return small, plan.then(last)


def test_two_stages_of_channels_and_one_of_ranks_build_and_load():
    small, plan = stages(chain())
    assert plan_of(small) == plan
    fresh = chain()
    plan.build(fresh)
    attach(fresh, plan)
    fresh.load_state_dict(small.state_dict(), strict=True)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(fresh(x), small(x))
    assert (fresh[0].out_channels, fresh[3].first.in_channels, fresh[3].second.out_channels) == (3, 3, 2)


def test_undo_in_reverse_order_gives_shapes_and_sizes_back():
    model = chain()
    small, plan = stages(model)
    rebuild(small, None)
    assert [p.shape for p in small.parameters()] == [p.shape for p in model.parameters()]
    assert [repr(m) for m in small] == [repr(m) for m in model]
    rebuild(small, plan)
    assert small[6].in_features == 32


def test_json_round_trip():
    mha = nn.MultiheadAttention(8, 2)
    _, plan = stages(chain())
    absorb = {"weight": "weight", "bias": "bias", "value": 1}
    grid = KeepChannels("9", {"weight": Cut.of((2, 2), {}, grid=torch.eye(2).bool())}, {}, absorb)
    plan = Plan((*plan.steps, OpenHeads.of("a", mha), grid), {}, plan.origin, plan.stages)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.steps == plan.steps


def test_the_row_tells_the_largest_tensor_and_the_share_of_all():
    row = plan_of_steps(chain(), [both("3", chain()[3], SECOND, FIRST)]).rows()[0]
    assert row["action"] == "channels"
    assert (row["before"], row["after"]) == ("5x6x3x3", "4x4x3x3")
    assert row["kept"] == (4 * 4 * 9 + 4) / (5 * 6 * 9 + 5)


def test_models_that_differ_in_which_channels_they_keep_do_not_take_each_others_weights():
    one, other = (compact(chain(), cut_chain(chain(), first, SECOND)) for first in (FIRST, keep(6, 0, 1)))
    with pytest.raises(PlanError, match="compressed otherwise"):
        one.load_state_dict(other.state_dict())


def test_masks_of_an_earlier_stage_are_cut_with_their_parameter():
    model = chain()
    entries = torch.rand(6, 3, 3, 3) < 0.5
    plan = Plan((MaskWeight.of("0", "weight", entries),)).then(cut_chain(model, FIRST, SECOND))
    compact_(model, plan)
    nn.init.ones_(model[0].weight)
    Masks(model, plan_of(model)).apply_()
    assert torch.equal(model[0].weight, entries[FIRST].double())


def test_pending_masks_hold_slices_and_their_momentum_at_zero():
    model = chain().train()
    plan = cut_chain(model, FIRST, SECOND)
    masks = Masks.pending(model, plan.steps)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    for _ in range(2):
        model(torch.randn(4, 3, 4, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        masks.apply_(optimizer)
    masked = copy.deepcopy(model)
    mask_(masked, plan)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), masked.parameters(), strict=True))
    state = optimizer.state[model[0].weight]
    assert not state["exp_avg"][[1, 4]].any()
    assert state["exp_avg_sq"][FIRST].all()
    assert model[6].weight.all()  # who only takes the removed channels in keeps its weights


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda m: m[3].register_parameter("weight", nn.Parameter(torch.ones(5, 6, 1, 1))),
            r"cuts 'weight' of module '3'",
        ),
        (lambda m: m[3].register_parameter("bias", None), r"cuts 'bias' of module '3'.*no such tensor"),
        (lambda m: setattr(m[3], "in_channels", 7), r"'in_channels' of module '3', expected 6; the model has 7"),
        (lambda m: m.__delitem__(6), "module '6', which Sequential does not have"),
    ],
)
def test_another_model_is_refused_by_name(spoil, message):
    model = chain()
    plan = Plan(cut_chain(model, FIRST, SECOND).steps)
    spoil(model)
    with pytest.raises(PlanError, match=message):
        plan.build(model)
