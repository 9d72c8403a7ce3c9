"""Magnitude: the scores against loops over slices written out by hand, and which channels leave."""

import math

import numpy as np
import pytest
import torch
from networks import NETWORKS
from torch import nn

from lightning_prune import Magnitude, compress
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.methods.magnitude import normalized, unit_norms
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.groups import find_units
from lightning_prune.structure.steps import KeepChannels

TOLERANCE = 1e-12  # float64: sums of at most a few hundred terms in another order


class Residual(nn.Module):
    """``stem`` and ``second`` write the same six channels, ``first`` four of its own; ``[N, 2, 5, 5]``."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.first = nn.Conv2d(6, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, 1, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.second(torch.relu(self.norm(self.first(x))))
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    """Embedding of four, an LSTM of five hidden units, a linear layer on the last step; ``[N, T]`` of token numbers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


def residual_slices(model):
    """Per group the slices of every unit, as lists of numbers: what writes it and what reads it."""
    m = {name: p.tolist() for name, p in model.named_parameters()}
    flat = lambda nested: [v for part in nested for v in flat(part)] if isinstance(nested, list) else [nested]  # noqa: E731
    column = lambda weight, c: flat([row[c] for row in weight])  # noqa: E731
    shared = [
        [
            flat(m["stem.weight"][c]),
            flat(m["second.weight"][c]),
            column(m["first.weight"], c),
            column(m["head.weight"], c),
        ]
        for c in range(6)
    ]
    inner = [[flat(m["first.weight"][c]), column(m["second.weight"], c)] for c in range(4)]
    return {"stem": shared, "first": inner}


def recurrent_slices(model):
    m = {name: p.tolist() for name, p in model.named_parameters()}
    gates = lambda weight, j: [v for gate in range(4) for v in weight[5 * gate + j]]  # noqa: E731
    column = lambda weight, c: [row[c] for row in weight]  # noqa: E731
    ih, hh = m["lstm.weight_ih_l0"], m["lstm.weight_hh_l0"]
    hidden = [[gates(ih, j), gates(hh, j), column(hh, j), column(m["head.weight"], j)] for j in range(5)]
    inputs = [[column(m["embedding.weight"], j), column(ih, j)] for j in range(4)]
    return {"embedding": inputs, "lstm": hidden}


CASES = {
    "residual": (Residual, torch.randn(2, 2, 5, 5), residual_slices),
    "LSTM": (Recurrent, torch.randint(0, 7, (2, 6)), recurrent_slices),
}


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_scores_equal_a_loop_over_the_slices_of_every_unit(case, norm):
    build, x, slices = CASES[case]
    torch.manual_seed(1)
    model = build()
    structure = find_units(model, as_calls(x))
    scores = unit_norms(model, structure, norm)
    expected = slices(model)
    assert {group.name: len(group.units) for group in structure.groups} == {k: len(v) for k, v in expected.items()}
    for group in structure.groups:
        for score, own in zip(scores[group.units], expected[group.name], strict=True):
            norms = [math.fsum(abs(v) ** norm for v in part) ** (1 / norm) for part in own]
            assert score == pytest.approx(math.fsum(norms) / len(norms), rel=TOLERANCE)


def test_scores_of_a_masked_model_are_those_of_the_smaller_one():
    torch.manual_seed(2)
    model, x = Residual().eval(), torch.randn(2, 2, 5, 5)
    structure = find_units(model, as_calls(x))
    small, plan = compress(model, Magnitude(structured=True, sparsity=0.5, align=1), x)
    gone = np.zeros(structure.count, bool)
    cuts = {step.key(name): cut for step in plan.steps for name, cut in step.tensors.items()}
    for name, group in zip(("stem.weight", "first.weight"), structure.groups, strict=True):
        gone[group.units] = ~cuts[name].kept(0).numpy()
    masked = unit_norms(model, structure, 2, ~gone)
    smaller = unit_norms(small, find_units(small, as_calls(x)), 2)
    np.testing.assert_allclose(masked[~gone], smaller, rtol=TOLERANCE)
    assert not np.allclose(unit_norms(model, structure, 2)[~gone], smaller)


def test_normalization_divides_by_mean_or_largest_of_the_group():
    scores = np.array([1.0, 3.0, 0.0, 0.0, 10.0])
    groups = [np.array([0, 1, 4]), np.array([2, 3])]
    assert normalized(scores, groups, "none").tolist() == [1, 3, 0, 0, 10]
    assert normalized(scores, groups, "max").tolist() == [0.1, 0.3, 0, 0, 1]
    np.testing.assert_allclose(normalized(scores, groups, "mean"), scores / (14 / 3))


def chain(*rows):
    """Two layers whose first one has the given rows, read alike by the second."""
    first, second = nn.Linear(len(rows[0]), len(rows), bias=False), nn.Linear(len(rows), 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor(rows))
        second.weight.fill_(1.0)
    return nn.Sequential(first, nn.ReLU(), second)


def kept(plan, layer):
    step = next(s for s in plan.steps if s.module == layer)
    return step.tensors["weight"].kept(0).nonzero().flatten().tolist()


def test_the_norm_decides_between_one_large_and_many_small_weights():
    model = chain([1.0, 0.0, 0.0, 0.0], [0.4, 0.4, 0.4, 0.4], [5.0, 5.0, 5.0, 5.0])  # L1 1 and 1.6, L2 1 and 0.8
    x = torch.randn(3, 4)
    assert kept(compress(model, Magnitude(structured=True, norm=1, sparsity=0.3, align=1), x)[1], "0") == [1, 2]
    assert kept(compress(model, Magnitude(structured=True, norm=2, sparsity=0.3, align=1), x)[1], "0") == [0, 2]


def test_normalized_scores_do_not_depend_on_the_scale_of_a_group_and_plain_ones_do():
    def share(scale, normalize):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        with torch.no_grad():
            model[0].weight.mul_(scale)  # of the first group alone
            model[2].weight.zero_()  # shared by both
        plan = compress(
            model, Magnitude(structured=True, sparsity=0.5, align=1, normalize=normalize), torch.randn(2, 8)
        )[1]
        return [step.tensors["weight"].to_dict() for step in plan.steps if isinstance(step, KeepChannels)]

    assert share(1.0, "mean") == share(1e-3, "mean")
    assert share(1.0, "max") == share(1e-3, "max")
    assert share(1.0, "none") != share(1e-3, "none")


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("normalize", ["mean", "max", "none"])
def test_planted_zero_channels_leave_first_and_the_outputs_stay(norm, normalize):
    torch.manual_seed(4)
    model, x = Residual().double().eval(), torch.randn(4, 2, 5, 5, dtype=torch.float64)
    dead, none = [1, 4], [2]
    with torch.no_grad():
        for weight in (model.stem.weight, model.second.weight):
            weight[dead] = 0
        for tensor in (model.first.weight, model.first.bias, model.norm.weight, model.norm.bias):
            tensor[none] = 0
    sparsity = 5 / 16  # channels that layers write: 6 and 6 for the residual, 4; of these 2, 2 and 1 are dead
    small, plan = compress(
        model, Magnitude(structured=True, norm=norm, normalize=normalize, sparsity=sparsity, align=1), x
    )
    assert kept(plan, "stem") == kept(plan, "second") == [0, 2, 3, 5]
    assert kept(plan, "first") == [0, 1, 3]
    torch.testing.assert_close(small(x), model(x), rtol=TOLERANCE, atol=TOLERANCE)


def test_weights_that_are_not_finite_are_named():
    model = Residual()
    model.first.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"weights of '(stem|first)' are not finite"):
        compress(model, Magnitude(structured=True, sparsity=0.3), torch.randn(2, 2, 5, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structured": None}, r"Magnitude\(structured=None\): give False or True"),
        ({"structured": False}, r"Magnitude\(flops=0.5\): single weights leave by sparsity"),
        ({"norm": 3}, r"Magnitude\(norm=3\): give 1 or 2"),
        ({"norm": True}, r"Magnitude\(norm=True\): give 1 or 2"),
        ({"norm": "2"}, r"Magnitude\(norm='2'\): give 1 or 2"),
        ({"normalize": "median"}, r"normalize='median'\): give 'mean' or 'max' or 'none'"),
        ({"normalize": None}, r"normalize=None"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options, message):
    with pytest.raises(OptionError, match=message):
        Magnitude(**{"structured": True, "flops": 0.5, **options})


def test_shares_by_glob_shrink_the_groups_they_name_and_no_others():
    network, example = NETWORKS["resnet18"]()
    small, _ = compress(
        network, Magnitude(structured=True, sparsity={"layer1.*": 0.5, "layer2.0.conv1": 0.25}, align=1), example
    )
    widths = {
        name: (m.out_channels, small.get_submodule(name).out_channels)
        for name, m in network.named_modules()
        if isinstance(m, torch.nn.Conv2d)
    }
    assert {name for name, (before, after) in widths.items() if before != after} == {
        "layer1.0.conv1",
        "layer1.1.conv1",
        "layer2.0.conv1",
    }
    before, after = widths["layer1.0.conv1"]
    assert after == before // 2
    before, after = widths["layer2.0.conv1"]
    assert after == before * 3 // 4


@pytest.mark.parametrize("shares", [{}, {"conv": 1.0}, {"conv": True}, {3: 0.5}])
def test_wrong_shares_by_glob_are_refused(shares):
    with pytest.raises(OptionError, match=r"give shares in \[0, 1\) by name or glob"):
        Magnitude(structured=True, sparsity=shares)


def test_shares_by_glob_exclude_a_scope():
    with pytest.raises(OptionError, match="drop it"):
        Magnitude(structured=True, sparsity={"conv": 0.5}, scope="uniform")
