"""Surgery proves itself: the right plan passes, a wrong one is refused by the layer's name and leaves no trace."""

import copy
import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from cuts import both, chain, cut_chain, inputs, keep, outputs, plan_of_steps
from torch import nn

from lightning_prune.errors import ModelError, PlanError
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.steps import Cut, Factorize, KeepChannels, MaskWeight, OpenHeads
from lightning_prune.structure.surgery import compact, compact_, mask_

FIRST, SECOND = keep(6, 1, 4), keep(5, 0)
X = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def snapshot(model):
    """Everything that must be the same after an error: objects, storages, values, sizes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: (id(t), t.data_ptr(), t.tolist(), t.grad) for name, t in tensors.items()},
        {name: id(m) for name, m in model.named_modules()},
        repr(model),
    )


def test_mask_zeroes_the_slices_of_a_plan_and_nothing_else():
    model, before = chain(), chain()
    before.load_state_dict(model.state_dict())
    model[0].weight.data[1, 0, 0, 0] = torch.inf
    mask_(model, cut_chain(model, FIRST, SECOND))
    changed = {
        "0.weight": [1, 4],
        "0.bias": [1, 4],
        "1.weight": [1, 4],
        "1.bias": [1, 4],
        "3.weight": [0],
        "3.bias": [0],
    }
    for name, tensor in before.state_dict().items():
        if name in changed:
            tensor[changed[name]] = 0
        assert torch.equal(model.state_dict()[name], tensor)
    assert not plan_of(model)


def test_mask_gives_ranks_and_entries_too():
    model = chain()
    entries = torch.rand(3, 80) < 0.5
    mask_(model, Plan((Factorize.of("3", model[3], "channel", 2), MaskWeight.of("6", "weight", entries))))
    assert torch.linalg.matrix_rank(model[3].weight.detach().flatten(1)) == 2
    assert torch.equal(model[6].weight != 0, entries)


def test_compact_leaves_the_model_alone_and_shares_nothing_with_it():
    model = chain()
    before = snapshot(model)
    small = compact(model, cut_chain(model, FIRST, SECOND), as_calls(X))
    assert snapshot(model) == before
    kept = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert not kept & {t.untyped_storage().data_ptr() for t in small.state_dict().values()}
    assert plan_of(small)


def test_compact_copies_what_the_plan_does_not_change():
    model = nn.Sequential(nn.Linear(3, 2, dtype=torch.float64), chain())
    plan = Plan((MaskWeight.of("1.6", "weight", keep(240, 3).view(3, 80)),))
    small = compact(model, plan)
    with torch.no_grad():
        small[0].weight.zero_()
    assert model[0].weight.all()


def wrong_channels(model):
    steps = list(cut_chain(model, FIRST, SECOND).steps)
    steps[2] = both("3", model[3], SECOND, keep(6, 0, 4))  # of the inputs other ones than the layers before lose
    return steps


def wrong_sizes(model):
    steps = list(cut_chain(model, FIRST, SECOND).steps)
    steps[2] = both("3", model[3], SECOND, keep(6, 1))
    return steps


def wrong_last(model):
    return [outputs("3", model[3], keep(5, 0)), inputs("6", model[6], keep(80, *range(64, 80)))]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wrong_channels, r"failed at '6': compact and masked model differ by .* allowed 1e-09\. Exclude this layer"),
        (wrong_sizes, r"failed at '3': in eval mode the compact model does not run, RuntimeError"),
        (wrong_last, r"failed at '6': compact and masked"),
    ],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_wrong_plan_is_refused_by_name_and_leaves_no_trace(make, message, gradients):
    model = chain()
    if gradients:
        model(X).sum().backward()
    plan = plan_of_steps(model, make(model))
    before = snapshot(model)
    with pytest.raises(ModelError, match=message):
        compact_(model, plan, as_calls(X))
    assert snapshot(model) == before
    assert not plan_of(model)
    model(X).sum().backward()


@pytest.mark.parametrize(("padding", "exact"), [(0, True), (1, False)])
def test_a_constant_beside_zero_padding_cannot_be_absorbed(padding, exact):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 5, 3, padding=padding)).double()
    kept, x = keep(4, 1), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plan = plan_of_steps(model, [outputs("0", model[0], kept), inputs("2", model[2], kept, value=0.5)])
    if exact:
        compact_(model, plan, as_calls(x))
    else:
        with pytest.raises(ModelError, match="failed at '2'"):
            compact_(model, plan, as_calls(x))


def test_a_plan_for_another_model_fails_half_way_and_leaves_no_trace():
    model = chain()
    plan = Plan((*cut_chain(model, FIRST, SECOND).steps, inputs("6", nn.Linear(81, 3), keep(81, 0))))
    before = snapshot(model)
    for change in (mask_, compact_):
        with pytest.raises(PlanError, match="cuts 'weight' of module '6'"):
            change(model, plan)
        assert snapshot(model) == before


def test_several_stages_in_one_go_need_no_proof_or_are_told_so():
    model = chain()
    small = compact(model, cut_chain(model, FIRST, SECOND), as_calls(X))
    plan = plan_of(small).then(cut_chain(small, keep(4, 0), keep(4, 1)))
    assert compact(model, plan)[3].weight.shape == (3, 3, 3, 3)
    with pytest.raises(PlanError, match=r"The plan holds 2 stages.*one after the other"):
        compact(model, plan, as_calls(X))


class Attentive(nn.Module):
    """Attention by torch's own modules; ``[N, T, 8]``."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 4, dim_feedforward=12, batch_first=True, dropout=0.3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)

    def forward(self, x):
        x = self.encoder(x)
        return x + self.attention(x, x, x)[0]


def cut_heads(model, name, kept):
    attention = model.get_submodule(name)
    width = kept.repeat_interleave(2)
    rows = Cut.of((24, 8), {0: width.repeat(3)}, zero=(0,))
    bias = Cut.of((24,), {0: width.repeat(3)}, zero=(0,))
    heads = KeepChannels(name, {"in_proj_weight": rows, "in_proj_bias": bias}, {"num_heads": (4, int(kept.sum()))})
    return [OpenHeads.of(name, attention), heads, inputs(f"{name}.out_proj", attention.out_proj, width)]


def test_heads_leave_torchs_attention():
    model = Attentive().double().eval()
    steps = cut_heads(model, "encoder.layers.1.self_attn", keep(4, 2)) + cut_heads(model, "attention", keep(4, 0, 1))
    hidden, layer = keep(12, 3, 5), model.encoder.layers[0]
    steps += [
        outputs("encoder.layers.0.linear1", layer.linear1, hidden),
        inputs("encoder.layers.0.linear2", layer.linear2, hidden),
    ]
    plan = plan_of_steps(model, steps)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    small = compact(model, plan, as_calls(x))
    assert [name for name, _ in small.named_parameters()] == [name for name, _ in model.named_parameters()]
    fresh = Attentive().double().eval()
    plan.build(fresh)
    fresh.load_state_dict({key: value for key, value in small.state_dict().items() if "plan" not in key})
    mask_(model, plan)
    with torch.no_grad():  # where torch takes its fused kernels
        torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)
        assert torch.equal(fresh(x), small(x))
    shapes = [p.shape for p in model.parameters()]
    for step in reversed(plan.steps):
        step.undo(small)
    assert [p.shape for p in small.parameters()] == shapes
    assert type(small.attention) is nn.MultiheadAttention
    small(x)


def test_the_check_runs_the_fused_kernels_that_users_will_run(monkeypatch):
    fused, calls = torch._transformer_encoder_layer_fwd, []
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fused(*args))
    model, hidden = Attentive().eval(), keep(12, 3, 5)
    steps = []
    for i, layer in enumerate(model.encoder.layers):
        steps.append(outputs(f"encoder.layers.{i}.linear1", layer.linear1, hidden))
        steps.append(inputs(f"encoder.layers.{i}.linear2", layer.linear2, hidden))
    compact_(model, plan_of_steps(model, steps), as_calls(torch.randn(2, 5, 8)))
    assert len(calls) == 4  # two layers, masked and compact


def test_an_attention_of_other_sizes_is_refused():
    step = OpenHeads.of("0", nn.MultiheadAttention(8, 4))
    with pytest.raises(PlanError, match="has num_heads 2; the plan was made for 4"):
        step.build(nn.Sequential(nn.MultiheadAttention(8, 2)))
    with pytest.raises(PlanError, match="is a Linear; the plan was made for torch's MultiheadAttention"):
        step.build(nn.Sequential(nn.Linear(8, 2)))
    with pytest.raises(PlanError, match="an attention is described by"):
        OpenHeads.from_dict({"module": "0", "before": step.before | {"num_heads": "4"}})
    with pytest.raises(PlanError, match="its heads are not open"):
        step.undo(nn.Sequential(nn.MultiheadAttention(8, 4)))


class Choosy(nn.Module):
    """Takes what it is told to take."""

    def __init__(self, whole=False, targets=False):
        super().__init__()
        self.body, self.whole, self.targets = chain(), whole, targets

    def forward(self, x):
        if self.whole and len(x) != 9:
            raise AssertionError("made for batches of nine")
        if self.targets and self.training:
            raise ValueError("In training mode, targets should be passed")
        return self.body(x)


def prefixed(plan):
    return Plan(tuple(dataclasses.replace(step, module=f"body.{step.module}") for step in plan.steps))


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        ({}, [(4, False), (4, True)] * 2),
        ({"whole": True}, [(4, False)] + [(9, False), (9, True)] * 2),
        ({"targets": True}, [(4, False), (4, True), (4, False)]),
    ],
)
def test_the_check_runs_few_samples_in_both_modes_where_the_model_allows_it(options, runs):
    model = Choosy(**options)
    plan, seen = prefixed(cut_chain(model.body, FIRST, SECOND)), []
    model.register_forward_pre_hook(lambda module, args: seen.append((len(args[0]), module.training)))
    compact_(model, plan, as_calls(torch.randn(9, 3, 4, 4, dtype=torch.float64)))
    assert seen == runs
    assert plan_of(model)


class Dropping(nn.Module):
    def __init__(self, functional):
        super().__init__()
        self.body, self.functional, self.drop = chain(), functional, nn.Dropout(0.5)

    def forward(self, x):
        x = self.body[:3](x)
        x = F.dropout(x, 0.5, self.training) if self.functional else self.drop(x)
        return self.body[3:](x)


@pytest.mark.parametrize("functional", [False, True])
def test_dropout_over_removed_channels_is_no_difference(functional):
    model = Dropping(functional)
    state = torch.get_rng_state()
    compact_(model, prefixed(cut_chain(model.body, FIRST, SECOND)), as_calls(X))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.drop.training is True
    assert not model.body.training


def test_a_difference_in_train_mode_alone_is_found():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = chain()

        def forward(self, x):
            x = self.body[:3](x)
            return self.body[3:](x + self.training)  # the removed channels are not zero any more

    model = Moody()
    with pytest.raises(ModelError, match=r"failed at 'body\.3'|failed at 'body\.6'"):
        compact_(model, prefixed(cut_chain(model.body, FIRST, SECOND)), as_calls(X))


def test_infinite_outputs_in_the_same_places_are_no_difference():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = chain()

        def forward(self, x):
            y = self.body(x)
            y = torch.cat([y[:, :2], y[:, 2:].masked_fill(y[:, 2:] > -9, -torch.inf), y[:, :1] * torch.nan], 1)
            return {"scores": y, "best": y.argmax(1), "nothing": y[:0]}

    model = Masked()
    compact_(model, prefixed(cut_chain(model.body, FIRST, SECOND)), as_calls(X))
    assert plan_of(model)


def test_a_layer_that_reads_a_size_in_its_code_is_named():
    class Baked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.width = chain(), 6

        def forward(self, x):
            return self.body[3:](self.body[:3](x).view(-1, self.width, 4, 4))

    model = Baked()
    with pytest.raises(
        ModelError, match=r"failed at 'Baked': in eval mode the compact model does not run.*depends on a size"
    ):
        compact_(model, prefixed(cut_chain(model.body, FIRST, SECOND)), as_calls(X))


def test_equal_singular_values_do_not_let_two_ways_of_truncating_disagree():
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).double()
    nn.init.eye_(model[0].weight)
    compact_(
        model, Plan((Factorize.of("0", model[0], "linear", 4),)), as_calls(torch.randn(4, 16, dtype=torch.float64))
    )
    assert plan_of(model)


def test_what_is_skipped_is_logged(caplog):
    model = Choosy(targets=True)
    with caplog.at_level(logging.DEBUG, "lightning_prune"):
        compact_(model, prefixed(cut_chain(model.body, FIRST, SECOND)), as_calls(X))
    assert "skips train mode, in which the masked model fails: In training mode, targets" in caplog.text


def test_deep_copies_of_the_compact_model_are_whole():
    model = chain()
    compact_(model, cut_chain(model, FIRST, SECOND), as_calls(X))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    assert plan_of(twin) == plan_of(model)


def test_a_model_that_returns_nan_alone_is_not_taken_for_proven():
    model = chain()
    plan = cut_chain(model, keep(6, 1), keep(5, 2))
    nn.init.constant_(model[3].bias, float("nan"))
    with pytest.raises(ModelError, match=r"returns no finite number.*'3\.bias'.*diverged training"):
        compact(model, plan, as_calls(torch.randn(2, 3, 4, 4, dtype=torch.float64)))
