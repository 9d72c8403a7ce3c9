"""Removal of channels by budget: bounds, patterns, alignment, stages in the coordinates of the dense model, errors."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from networks import BasicBlock
from torch import nn

from lightning_prune import LowRank, Magnitude, Random, compress, count_flops
from lightning_prune.errors import BudgetError, ModelError, OptionError
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.steps import KeepChannels

X = torch.zeros(2, 3, 12, 12)
COSTS = {
    "flops": lambda model: count_flops(model, X).total,
    "params": lambda model: sum(p.numel() for p in model.parameters()),
}


class ResNet(nn.Module):
    """Three blocks; the first one shares its channels with the stem, the second one projects, the third one does not."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.layer1, self.layer2, self.layer3 = BasicBlock(8, 8, 1), BasicBlock(8, 16, 2), BasicBlock(16, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.layer3(self.layer2(self.layer1(torch.relu(self.conv1(x))))).mean((2, 3)))


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return ResNet().eval()


def rows(plan):
    """Which output channels of which layers stay, by name, where some leave."""
    cuts = {s.module: s.tensors["weight"] for s in plan.steps if isinstance(s, KeepChannels) and "weight" in s.tensors}
    return {name: cut.kept(0) for name, cut in cuts.items() if len(cut.shape) > 1 and 0 in cut.keep}


def writers(model):
    """Widths of all convolutions: of this network all channels can leave but those of the output layer."""
    return {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


# Bounds -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("scope", ["global", "uniform"])
def test_ladders_never_exceed_come_close_and_are_nested(resnet, name, scope):
    dense = COSTS[name](resnet)
    kept = {layer: torch.ones(width, dtype=torch.bool) for layer, width in writers(resnet).items()}
    before = dense
    for share in (0.9, 0.7, 0.5, 0.3, 0.15):
        small, plan = compress(resnet, Magnitude(structured=True, **{name: share}, align=1, scope=scope), X)
        cost = COSTS[name](small)
        assert cost <= share * dense
        assert cost > (share - 0.12) * dense  # one channel of the group with the most layers
        assert cost < before
        for layer, stays in rows(plan).items():
            assert not (stays & ~kept[layer]).any()  # what has left at a larger budget stays away
            kept[layer] = stays
        before = cost


@pytest.mark.parametrize("method", [Magnitude, Random])
@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.5, 0.8])
def test_sparsity_is_the_share_of_the_channels_that_leave(resnet, method, sparsity):
    small, _ = compress(resnet, method(structured=True, sparsity=sparsity, align=1), X)
    dense, left = sum(writers(resnet).values()), sum(writers(small).values())
    bound = (1 - Fraction(str(sparsity))) * dense
    assert bound - 3 < left <= bound  # at most one unit more than asked for: a channel that three layers write


def test_an_absolute_bound_is_a_count_for_the_example_inputs(resnet):
    dense = COSTS["flops"](resnet)
    small, _ = compress(resnet, Magnitude(structured=True, flops=int(0.6 * dense), align=1), X)
    assert 0.5 * dense < COSTS["flops"](small) <= int(0.6 * dense)


def chain(*widths):
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 3))


def widths(model):
    return [m.out_features for m in model.modules() if isinstance(m, nn.Linear)][:-1]


def test_uniform_takes_the_same_share_of_every_group_and_global_does_not():
    torch.manual_seed(1)
    model = chain(6, 32, 16, 48)
    with torch.no_grad():
        model[2][0].weight[:40] = 0  # of 48: most of the third layer is worthless
    uniform, _ = compress(model, Magnitude(structured=True, sparsity=0.5, align=1, scope="uniform"), torch.zeros(2, 6))
    assert widths(uniform) == [16, 8, 24]
    free, _ = compress(model, Magnitude(structured=True, sparsity=0.5, align=1), torch.zeros(2, 6))
    assert widths(free)[2] < 16 < widths(free)[0]


@pytest.mark.parametrize("align", [1, 2, 4, 8, 16])
def test_channels_kept_are_multiples_of_align(align):
    small, _ = compress(chain(6, 64, 48, 80), Magnitude(structured=True, params=0.5, align=align), torch.zeros(2, 6))
    assert all(width % align == 0 for width in widths(small))
    assert widths(small) != [64, 48, 80]


def test_min_channels_stay_in_every_group():
    model = chain(6, 32, 16, 48)
    small, _ = compress(model, Magnitude(structured=True, sparsity=0.75, align=1, min_channels=7), torch.zeros(2, 6))
    assert min(widths(small)) >= 7
    assert sum(widths(small)) == math.floor(0.25 * 96)
    with pytest.raises(BudgetError, match=r"21 is the least.*Bound by '\d\.0' \(7 of \d+ units\)"):
        compress(model, Magnitude(structured=True, sparsity=0.9, align=1, min_channels=7), torch.zeros(2, 6))


# Patterns ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "layer1.conv1"}, {"layer1.conv1"}),
        ({"include": "layer*.conv1"}, {"layer1.conv1", "layer2.conv1", "layer3.conv1"}),
        ({"include": ["layer2", "layer3"]}, {"layer2.conv1", "layer2.conv2", "layer2.downsample.0", "layer3.conv1", "layer3.conv2"}),
        ({"include": ["layer2", "layer3.conv1"]}, {"layer2.conv1", "layer3.conv1"}),  # layer3.conv2 writes what layer2 does
        ({"include": nn.Conv2d, "exclude": ["conv1", "layer[23].conv2"]}, {"layer1.conv1", "layer2.conv1", "layer3.conv1"}),
        ({"include": ["Conv2d"], "exclude": ["layer2", "*.conv2"]}, {"layer1.conv1", "layer3.conv1"}),
    ],
)  # fmt: skip
def test_only_groups_all_of_whose_writers_are_selected_lose_channels(resnet, options, expected):
    _, plan = compress(resnet, Random(structured=True, sparsity=0.5, align=1, scope="uniform", **options), X)
    assert rows(plan).keys() == expected


def test_what_is_held_by_a_layer_that_is_not_selected_says_so(resnet):
    with pytest.raises(ModelError, match=r"layer2\.conv2: they leave only with those of 'layer2\.downsample\.0'"):
        compress(resnet, Magnitude(structured=True, sparsity=0.5, include="layer2.conv2"), X)


def test_a_pattern_that_matches_nothing_is_refused(resnet):
    with pytest.raises(OptionError, match=r"include='layer9' matches no layer.*Did you mean"):
        compress(resnet, Magnitude(structured=True, sparsity=0.5, include="layer9"), X)


def test_excluding_one_of_two_layers_with_a_tied_weight_holds_both():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12)
            self.d = nn.Linear(12, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.d(torch.relu(self.c(self.a(x) + self.b(x))))

    everything = rows(
        compress(Tied(), Magnitude(structured=True, sparsity=0.4, align=1, scope="uniform"), torch.zeros(2, 8))[1]
    )
    assert everything.keys() == {"a", "c"}
    _, plan = compress(Tied(), Magnitude(structured=True, sparsity=0.4, align=1, exclude="b"), torch.zeros(2, 8))
    assert rows(plan).keys() == {"c"}
    assert "'b', which is not selected" in plan.left_alone["a"]


def test_layers_with_a_parametrized_weight_are_named_as_the_user_names_them():
    model = chain(6, 16, 16)
    nn.utils.parametrizations.weight_norm(model[0][0])
    method = Magnitude(structured=True, sparsity=0.5, align=1, include=["0.0", "1.0"])
    assert method.claim(model) == {"0.0", "1.0"}
    small, _ = compress(model, method, torch.zeros(2, 6))
    assert widths(small) != [16, 16]


class Bare(nn.Module):
    """Its first layer is a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 6))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.relu(nn.functional.linear(x, self.weight)))


def test_parameters_of_the_model_itself_lose_channels_too():
    small, _ = compress(Bare(), Magnitude(structured=True, sparsity=0.5, align=1), torch.zeros(2, 6))
    assert small.weight.shape == (8, 6)
    assert small.head.in_features == 8


# Stages -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COSTS)
def test_shares_of_a_second_stage_are_of_the_dense_model(resnet, name):
    dense = COSTS[name](resnet)
    first, _ = compress(resnet, Magnitude(structured=True, **{name: 0.7}, align=1), X)
    second, plan = compress(first, Magnitude(structured=True, **{name: 0.4}, align=1), X)
    assert 0.3 * dense < COSTS[name](second) <= 0.4 * dense
    assert plan.origin.flops == COSTS["flops"](resnet)
    assert [stage.method for stage in plan.stages] == ["Magnitude", "Magnitude"]


@pytest.mark.parametrize("between", [False, True])
def test_a_sparsity_of_a_second_stage_counts_the_channels_of_the_dense_model(between):
    model, x = chain(40, 40, 40), torch.zeros(2, 40)
    once, _ = compress(model, Random(structured=True, sparsity=0.5, align=1), x)
    small, _ = compress(model, Random(structured=True, sparsity=0.2, align=1), x)
    assert sum(widths(small)) == 64
    if between:  # a factorized layer still counts the channels that it has lost before
        small, _ = compress(small, LowRank(rank=4, align=1, include="1.0"), x)
    twice, _ = compress(
        small, Random(structured=True, sparsity=0.5, align=1, exclude="*.first" if between else None), x
    )
    left = [twice[0][0].out_features, twice[1][0].second.out_features if between else twice[1][0].out_features]
    assert sum(left) == sum(widths(once)) == 40


@pytest.mark.parametrize("options", [{"flops": 0.5}, {"params": 0.5}, {"sparsity": 0.5}])
def test_a_target_already_met_is_a_no_op(options):
    x = torch.zeros(2, 6)
    small, plan = compress(chain(6, 32, 16, 48), Magnitude(structured=True, align=1, **options), x)
    (name,) = options
    looser = Magnitude(structured=True, align=1, **{name: 0.3 if name == "sparsity" else 0.6})
    for method in (Magnitude(structured=True, align=1, **options), Random(structured=True, align=1, **options), looser):
        same, again = compress(small, method, x)
        assert again.steps == plan_of(small).steps == plan.steps
        assert widths(same) == widths(small)


# Errors -----------------------------------------------------------------------------------------------------------------


def test_a_budget_that_cannot_be_met_names_the_groups_that_bind(resnet):
    with pytest.raises(
        BudgetError, match=r"is the least that can be reached.*Bound by 'layer2\.conv1' \(8 of 16 units\)"
    ):
        compress(resnet, Magnitude(structured=True, flops=0.01), X)
    with pytest.raises(BudgetError, match=r"Bound by 'layer1\.conv1' \(\d of 8 units\), each at its smallest"):
        compress(resnet, Magnitude(structured=True, flops=0.5, include="layer1.conv1"), X)


class Stuck(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


@pytest.mark.parametrize("options", [{"flops": 0.5}, {"params": 0.5}, {"sparsity": 0.5}])
def test_where_nothing_can_leave_the_error_says_why_for_every_layer(options):
    with pytest.raises(ModelError, match="would change nothing") as caught:
        compress(Stuck(), Magnitude(structured=True, **options), torch.zeros(2, 6))
    reasons = dict(part.split(": ", 1) for part in str(caught.value).partition("nothing. ")[2].split("; "))
    assert reasons.keys() == {"first", "second"}
    assert "norm" in reasons["first"]
    assert "output" in reasons["second"]


def test_layers_that_the_example_never_reaches_are_left_alone_and_not_counted():
    model = chain(6, 16)
    model.add_module("unused", nn.Linear(8, 8))
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    small, plan = compress(model, Magnitude(structured=True, sparsity=0.5, align=1), torch.zeros(2, 6))
    assert rows(plan).keys() == {"0.0"}
    assert small[0][0].out_features == 8
    assert "not used" in plan.left_alone["unused"]


def test_a_dense_model_within_its_bound_is_an_error_and_says_so():
    with pytest.raises(ModelError, match=r"would change nothing.*the budget is met with it whole"):
        compress(chain(6, 32), Magnitude(structured=True, flops=1.0), torch.zeros(2, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"exactly one of flops, params, sparsity; got none"),
        (
            {"flops": 0.5, "params": 0.5},
            r"exactly one of flops, params, sparsity; got \{'flops': 0\.5, 'params': 0\.5\}",
        ),
        ({"flops": 1.5}, r"flops=1\.5\): give a float in \(0, 1\]"),
        ({"flops": 0.0}, r"flops=0\.0\)"),
        ({"flops": 0}, r"flops=0\)"),
        ({"flops": True}, r"flops=True\)"),
        ({"params": "half"}, r"params='half'\)"),
        ({"params": -5}, r"params=-5\)"),
        ({"sparsity": 1.0}, r"sparsity=1\.0\): give a float in \[0, 1\)"),
        ({"sparsity": -0.1}, r"sparsity=-0\.1\)"),
        ({"sparsity": 50}, r"sparsity=50\)"),
        ({"sparsity": float("nan")}, r"sparsity=nan\)"),
        ({"sparsity": "0.5"}, r"sparsity='0\.5'\)"),
        ({"flops": 0.5, "align": 0}, r"align=0\): give an integer of at least 1"),
        ({"flops": 0.5, "align": 2.0}, r"align=2\.0\)"),
        ({"flops": 0.5, "min_channels": 0}, r"min_channels=0\)"),
        ({"flops": 0.5, "every_n_epochs": 0}, r"every_n_epochs=0\)"),
        ({"flops": 0.5, "scope": "local"}, r"scope='local'\): give 'global' or 'uniform'"),
        ({"flops": 0.5, "scope": ["global"]}, r"scope=\['global'\]\)"),
        ({"flops": 0.5, "schedule": "sudden"}, r"schedule='sudden'\): give 'cubic' or 'linear'"),
        ({"flops": 0.5, "start_epoch": -1}, r"start_epoch=-1\)"),
        ({"flops": 0.5, "start_epoch": 3, "until_epoch": 2}, r"until_epoch=2\): give an integer of at least 3"),
        ({"flops": 0.5, "recalibrate_bn": -1}, r"recalibrate_bn=-1\)"),
    ],
)
@pytest.mark.parametrize("method", [Magnitude, Random])
def test_options_out_of_range_are_refused_at_once(method, options, message):
    with pytest.raises(OptionError, match=f"{method.__name__}.*{message}"):
        method(**{"structured": True} | options)


def test_a_count_above_that_of_the_dense_model_is_refused(resnet):
    with pytest.raises(OptionError, match=r"flops.*the dense model's own count"):
        compress(resnet, Magnitude(structured=True, flops=10**12), X)


@pytest.mark.parametrize("method", [Magnitude, Random])
def test_without_a_trainer_a_gradual_run_is_refused(resnet, method):
    with pytest.raises(OptionError, match="acts while a model trains"):
        compress(resnet, method(structured=True, flops=0.5, until_epoch=3), X)
