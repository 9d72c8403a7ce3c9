"""SynFlow: scores against a naive twin and closed forms, conservation, exact counts, and models that are no stack of convolutions."""

import copy
import math

import pytest
import torch
from lit import LitNet, body
from torch import nn

from lightning_prune.budget.weights import select_weights
from lightning_prune.callback import compress
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.methods.synflow import (
    SynFlow,
    choose_by_flow,
    counts_by_round,
    flow_scores,
    make_positive_,
    ones,
    total_flow,
)
from lightning_prune.structure.calls import Call
from tests.structure.test_preserve import dice, photograph, trained


def weights_of(model):
    return {name: p for name, p in model.named_parameters() if p.ndim >= 2}


def everything(weights):
    return {name: torch.ones(w.shape, dtype=torch.bool) for name, w in weights.items()}


def scores_of(model, *args):
    """Return R and the scores of a copy, made positive."""
    model = copy.deepcopy(model).eval()
    make_positive_(model)
    flow = total_flow(model, [Call("", ones(args))])
    return float(flow.detach()), flow_scores(flow, weights_of(model))


def masks_of(method, model, example):
    plan = compress(model, method, example)[1]
    return {step.key: step.mask for step in plan.steps if step.action == "mask"}


def official(model, shape, density, rounds):
    """The authors' loop in float64: absolute state dict, one all-ones image, shares rho^(i / rounds), the lowest by value."""
    model = copy.deepcopy(model).double().eval()
    model.load_state_dict({key: value.abs() for key, value in model.state_dict().items()})
    weights = weights_of(model)
    values = {name: w.detach().clone() for name, w in weights.items()}
    masks = {name: torch.ones_like(w) for name, w in weights.items()}
    for i in range(1, rounds + 1):
        for name, w in weights.items():
            w.data = values[name] * masks[name]
        model.zero_grad()
        model(torch.ones(1, *shape).double()).sum().backward()
        scores = {name: (w.grad * w).abs().detach() for name, w in weights.items()}
        flat = torch.cat([s.flatten() for s in scores.values()])
        removed = flat.numel() - round(flat.numel() * density ** (i / rounds))
        limit = flat.sort().values[removed - 1] if removed else -1.0
        masks = {name: (s > limit).double() for name, s in scores.items()}
    return {name: mask.bool() for name, mask in masks.items()}


# Scores -------------------------------------------------------------------------------------------------------------------------


def test_scores_of_two_layers_are_the_closed_form():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    first, second = (layer.weight.detach().double().abs() for layer in (model[0], model[2]))
    flow, scores = scores_of(model, torch.randn(1, 3))
    torch.testing.assert_close(scores["0.weight"], second.sum(0)[:, None] * first, rtol=1e-14, atol=0)
    torch.testing.assert_close(scores["2.weight"], second * first.sum(1)[None, :], rtol=1e-14, atol=0)
    assert flow == pytest.approx(float((second @ first).sum()), rel=1e-14)


def test_every_layer_conserves_the_flow_without_biases_and_normalization():
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3, groups=1, bias=False), nn.LeakyReLU(),
        nn.Flatten(), nn.Linear(16, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False),
    )  # fmt: skip
    flow, scores = scores_of(model, torch.randn(2, 2, 10, 10))
    assert len(scores) == 4
    for score in scores.values():
        assert float(score.sum()) == pytest.approx(flow, rel=1e-12)


def test_every_hidden_unit_conserves_the_flow_through_it():
    model = nn.Sequential(nn.Linear(3, 7, bias=False), nn.ReLU(), nn.Linear(7, 5, bias=False))
    _, scores = scores_of(model, torch.randn(4, 3))
    torch.testing.assert_close(scores["0.weight"].sum(1), scores["2.weight"].sum(0), rtol=1e-12, atol=0)


def test_biases_break_conservation_in_the_layers_before_them():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    flow, scores = scores_of(model, torch.randn(1, 3))
    first, second = (layer.weight.detach().double().abs() for layer in (model[0], model[2]))
    through = flow - float(model[2].bias.detach().double().abs().sum())  # the last bias bypasses every weight
    assert float(scores["2.weight"].sum()) == pytest.approx(through, rel=1e-12)
    assert float(scores["0.weight"].sum()) == pytest.approx(float((second @ first).sum()), rel=1e-12)


def test_running_statistics_and_scales_are_absolute_too():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    norm = model[1]
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    scale = norm.weight.detach().double().abs() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.detach().double().abs() - scale * norm.running_mean.double().abs()
    first, second = (model[i].weight.detach().double().abs() for i in (0, 2))
    flow, _ = scores_of(model, torch.randn(1, 3))
    assert flow == pytest.approx(float((second @ (scale * first.sum(1) + shift)).sum()), rel=1e-12)


def test_a_deep_network_overflows_float32_but_not_float64():
    layers = [nn.Linear(64, 64, bias=False) for _ in range(40)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=4.0)
    model, example = nn.Sequential(*layers), torch.zeros(1, 64)
    masks = masks_of(SynFlow(0.5, rounds=2, remove_dead=False), model, example)
    assert sum(int((~m).sum()) for m in masks.values()) == 40 * 64 * 64 // 2
    with pytest.raises(ModelError, match="not finite"):
        compress(model, SynFlow(0.5, rounds=2, dtype="float32"), example)


# Rounds -------------------------------------------------------------------------------------------------------------------------


def test_counts_follow_the_geometric_schedule_and_end_at_the_target():
    counts = counts_by_round(1000, 900, 100)
    assert counts[-1] == 900
    assert counts == [1000 - round(1000 * 0.1 ** (i / 100)) for i in range(1, 101)]
    assert counts_by_round(7, 0, 3) == [0, 0, 0]
    assert counts_by_round(7, 7, 3) == [7, 7, 7]


@pytest.mark.parametrize("rounds", [1, 7, 100])
def test_masks_equal_those_of_the_authors_loop(rounds):
    model = body().eval()
    for norm in (model[1], model[4]):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), nn.init.normal_(norm.weight)
    found = masks_of(SynFlow(0.95, rounds=rounds, remove_dead=False), model, torch.randn(2, 1, 8, 8))
    expected = official(model, (1, 8, 8), 1 - 0.95, rounds)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


def test_many_rounds_keep_layers_alive_that_one_round_empties():
    model = nn.Sequential(
        nn.Linear(4, 512, bias=False),
        nn.ReLU(),
        nn.Linear(512, 512, bias=False),
        nn.ReLU(),
        nn.Linear(512, 1, bias=False),
    )
    sparsity = 1 - 16 / sum(w.numel() for w in weights_of(model).values())

    def path(rounds):
        weights, there = weights_of(model), everything(weights_of(model))
        copied = copy.deepcopy(model)
        make_positive_(copied)
        counts = counts_by_round(
            sum(w.numel() for w in weights.values()), round(sparsity * sum(w.numel() for w in weights.values())), rounds
        )
        kept = choose_by_flow(
            copied, [Call("", (torch.ones(1, 4).double(),))], weights_of(copied), there, counts, select_weights
        )
        alive = copy.deepcopy(model)
        for name, weight in weights_of(alive).items():
            weight.data = weight.data.abs() * kept[name]
        return float(alive(torch.ones(1, 4)).detach())

    assert path(1) == 0.0
    assert path(100) > 0.0


def test_entries_removed_before_stay_removed_and_count():
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    weights = weights_of(model)
    kept = everything(weights)
    best = (scores_of(model, torch.zeros(1, 6))[1]["0.weight"]).argmax()
    kept["0.weight"].view(-1)[best] = False
    make_positive_(model)
    found = choose_by_flow(
        model, [Call("", (torch.ones(1, 6).double(),))], weights_of(model), kept, [10, 40], select_weights
    )
    assert not found["0.weight"].view(-1)[best]
    assert sum(int((~mask).sum()) for mask in found.values()) == 40


# The callback -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.3, 0.9, 0.99])
def test_counts_are_exact(sparsity):
    model = body(norm=False)
    masks = masks_of(SynFlow(sparsity, rounds=5, remove_dead=False), model, torch.zeros(2, 1, 8, 8))
    total = sum(w.numel() for w in weights_of(model).values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * total)


def test_the_answer_does_not_depend_on_signs_data_or_batch_size():
    model = body(norm=False)
    flipped = copy.deepcopy(model)
    for parameter in flipped.parameters():
        parameter.data *= torch.where(torch.rand(parameter.shape) < 0.5, -1.0, 1.0)
    first = masks_of(SynFlow(0.8, rounds=5, remove_dead=False), model, torch.zeros(1, 1, 8, 8))
    other = masks_of(SynFlow(0.8, rounds=5, remove_dead=False), flipped, torch.randn(3, 1, 8, 8))
    assert all(torch.equal(first[name], other[name]) for name in first)


def test_the_model_and_all_generators_are_left_bit_identical():
    model = trained()
    before, state = photograph(model), dice()
    compress(model, SynFlow(0.5, rounds=3), torch.zeros(2, 3, 8, 8))
    assert photograph(model) == before
    assert dice() == state


def test_surviving_weights_keep_values_and_signs():
    model = LitNet(norm=False)
    small, plan = compress(model, SynFlow(0.7, rounds=4, remove_dead=False), model.example_input_array)
    before, after = dict(model.named_parameters()), dict(small.named_parameters())
    for step in plan.steps:
        torch.testing.assert_close(after[step.key], before[step.key] * step.mask, rtol=0, atol=0)


# Other models -------------------------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = (
            nn.Embedding(11, 6),
            nn.Linear(6, 5, bias=False),
            nn.Linear(5, 3, bias=False),
        )

    def forward(self, tokens):
        return self.head(self.hidden(self.embedding(tokens)).relu())


def test_embeddings_give_ones_so_the_flow_is_that_of_the_layers_behind():
    model = Tokens()
    flow, scores = scores_of(model, torch.randint(0, 11, (2, 4)))
    hidden, head = (layer.weight.detach().double().abs() for layer in (model.hidden, model.head))
    assert flow == pytest.approx(2 * 4 * float((head @ hidden).sum()), rel=1e-12)
    assert float(scores["hidden.weight"].sum()) == pytest.approx(flow, rel=1e-12)
    found = [masks_of(SynFlow(0.5, rounds=2), model, torch.full((1, 4), token)) for token in (0, 10)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_several_inputs_by_name_and_several_outputs_all_count():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(2, 3, bias=False), nn.Linear(4, 3, bias=False)

        def forward(self, a, b, flags=None):
            assert flags is None or flags.dtype == torch.bool
            return {"sum": self.left(a) + self.right(b), "left": (self.left(a), torch.arange(3))}

    model = Two()
    masks = masks_of(
        SynFlow(0.5), model, {"a": torch.zeros(1, 2), "b": torch.zeros(1, 4), "flags": torch.ones(1, dtype=torch.bool)}
    )
    scores = torch.cat([2 * model.left.weight.detach().abs().flatten(), model.right.weight.detach().abs().flatten()])
    expected = torch.ones(18, dtype=torch.bool)
    expected[scores.argsort()[:9]] = False
    assert torch.equal(torch.cat([masks["left.weight"].flatten(), masks["right.weight"].flatten()]), expected)


def test_buffers_of_infinities_keep_their_signs():
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Linear(4, 4, bias=False)
            self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))

        def forward(self, x):
            return (self.query(x) @ x.mT + self.mask).softmax(-1) @ self.query(x)

    flow, scores = scores_of(Causal(), torch.zeros(1, 3, 4))
    assert math.isfinite(flow)
    assert scores["query.weight"].isfinite().all()


def test_recurrent_and_attention_layers_have_a_flow():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.attention = nn.LSTM(4, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            hidden, _ = self.rnn(x)
            return self.head(self.attention(hidden, hidden, hidden, need_weights=False)[0])

    masks = masks_of(SynFlow(0.5, rounds=3, scope="uniform", remove_dead=False), Net(), torch.zeros(2, 3, 4))
    weights = {
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    }
    assert {name for name, mask in masks.items() if int(mask.sum()) == mask.numel() // 2} == weights


def test_a_model_that_ends_in_a_softmax_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Softmax(-1))
    with pytest.raises(ModelError, match=r"softmax.*logits"):
        compress(model, SynFlow(0.5), torch.zeros(1, 4))


def test_a_model_without_gradient_is_refused():
    class Frozen(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    with pytest.raises(ModelError, match="depends on its parameters by a gradient"):
        compress(nn.Sequential(Frozen(4, 4)), SynFlow(0.5), torch.zeros(1, 4))


def test_a_model_that_insists_on_float32_is_refused_with_the_remedy_that_works():
    class Casts(nn.Sequential):
        def forward(self, x):
            return super().forward(x.float())

    model = Casts(nn.Linear(4, 4))
    with pytest.raises(ModelError, match="dtype='float32'"):
        compress(model, SynFlow(0.5), torch.zeros(1, 4))
    assert masks_of(SynFlow(0.5, dtype="float32", remove_dead=False), model, torch.zeros(1, 4))


def test_a_model_that_breaks_under_absolute_values_is_refused_with_its_own_words():
    class Signed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("shift", torch.tensor(-1))

        def forward(self, x):
            if bool((self.layer.weight >= 0).all()):
                raise ValueError("weights must have both signs")
            return self.layer(x)

    with pytest.raises(ModelError, match="weights must have both signs"):
        compress(Signed(), SynFlow(0.5), torch.zeros(1, 4))


@pytest.mark.parametrize(
    "options", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"rounds": 0}, {"rounds": 2.5}, {"dtype": "float16"}]
)
def test_bad_options_raise_at_construction(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        SynFlow(**({"sparsity": 0.5} | options))
