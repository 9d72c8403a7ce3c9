"""Sensitivity: every value is that of a model in which by hand just that share of just that layer was removed."""

import copy
import json
import math

import pytest
import torch
from lit import LitNet, loader
from matplotlib import image
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.callback import compress
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.explanation import explain
from lightning_prune.measure import Curve, Sensitivity, sensitivity
from lightning_prune.methods import Magnitude
from tests.networks import NETWORKS
from tests.structure.test_preserve import dice, photograph

LAYERS = ["net.0", "net.3", "net.8", "net.10"]


def points():
    data = loader().dataset
    return [(data.x[:40], data.y[:40]), (data.x[40:], data.y[40:])]


def cross_entropy(model):
    model.eval()
    return float(nn.functional.cross_entropy(model(loader().dataset.x), loader().dataset.y).detach())


def test_every_value_is_that_of_a_model_cut_by_hand():
    model = LitNet()
    found = sensitivity(model, loader(), shares=[0.25, 0.5, 1.0])
    assert [curve.name for curve in found.curves] == LAYERS
    assert found.dense == pytest.approx(cross_entropy(copy.deepcopy(model)), rel=1e-5)
    for curve in found.curves:
        for share, value in zip(found.shares, curve.values, strict=True):
            cut = copy.deepcopy(model)
            weight = cut.get_submodule(curve.name).weight.data
            assert curve.size == weight.numel()
            weight.view(-1)[weight.abs().flatten().argsort()[: round(share * weight.numel())]] = 0
            assert value == pytest.approx(cross_entropy(cut), rel=1e-5)


def test_a_metric_takes_the_place_of_the_loss():
    model, metric = LitNet(), MulticlassAccuracy(4, average="micro")
    metric.update(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long))
    found = sensitivity(model, points(), metric=metric, shares=[1.0], include="net.10")
    assert (found.measure, found.higher_is_better, found.samples) == ("MulticlassAccuracy", True, 64)
    data = loader().dataset
    with torch.no_grad():
        right = model.eval()(data.x).argmax(1) == data.y
    assert found.dense == pytest.approx(float(right.float().mean()))
    assert found.curves[0].values == pytest.approx([float((data.y == model.net[10].bias.argmax()).float().mean())])
    assert float(metric.compute()) == 1.0  # the caller's own state is left alone


def test_zero_shares_change_nothing_and_the_model_is_left_bit_identical():
    model = LitNet()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before, state = photograph(model), dice()
    for units in ("weights", "channels"):
        found = sensitivity(model, loader(), units=units, shares=[0.0, 0.6], recalibrate_bn=0)
        assert all(curve.values[0] == found.dense for curve in found.curves)
        sensitivity(model, loader(), units=units, shares=[0.6], recalibrate_bn=1)
    assert photograph(model) == before
    assert dice() == state


def test_channels_are_those_that_a_real_removal_would_take():
    model = LitNet(norm=True)
    found = sensitivity(model, loader(), units="channels", shares=[0.5])
    assert [(curve.name, curve.size) for curve in found.curves] == [("net.0", 16), ("net.3", 24), ("net.8", 32)]
    for curve in found.curves:
        method = Magnitude(
            structured=True, sparsity={curve.name: 0.5}, norm=2, normalize="none", align=1, recalibrate_bn=0
        )
        small, _ = compress(model, method, model.example_input_array)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        if (
            curve.name == "net.8"
        ):  # one writer and one reader: the sum of squares and the mean of norms may rank otherwise
            reads = model.net[10].weight.detach().square().sum(0)
            order = (model.net[8].weight.detach().square().sum(1) + reads).argsort()
            cut = copy.deepcopy(model)
            cut.net[8].weight.data[order[:16]] = 0
            cut.net[8].bias.data[order[:16]] = 0
            assert curve.values[0] == pytest.approx(cross_entropy(cut), rel=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "transformer", "lstm", "attention"])
def test_channels_of_all_kinds_of_layers_are_asked_about(name):
    torch.manual_seed(0)
    model, example = NETWORKS[name]()
    batch = example if isinstance(example, tuple) else (example,)
    loss = lambda m, b: sum(t.square().mean() for t in m(*b) if isinstance(t, torch.Tensor))  # noqa: E731
    before = photograph(model)
    found = sensitivity(model, [batch], loss, units="channels", shares=[0.5, 1.0], example=example)
    assert [c.size for c in found.curves] == [g.units for g in explain(model, example).groups]
    assert all(math.isfinite(value) for curve in found.curves for value in curve.values)
    assert any(curve.values[1] != found.dense for curve in found.curves)
    assert photograph(model) == before


def test_only_selected_layers_are_asked_about():
    for units in ("weights", "channels"):
        found = sensitivity(LitNet(), loader(), units=units, shares=[0.5], include=["net.0", "net.8"], exclude="net.8")
        assert [curve.name for curve in found.curves] == ["net.0"]


def test_the_answer_is_a_table_json_and_a_picture(tmp_path):
    found = sensitivity(LitNet(), loader(), shares=[0.5, 0.9])
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
    text = str(found)
    assert all(name in text for name in LAYERS)
    assert f"{found.curves[2].values[1]:.4g}" in text
    found.picture(tmp_path / "a.png")
    found.picture(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert image.imread(tmp_path / "a.png").std() > 0.05
    odd = Sensitivity((Curve("a$b$" * 30, 3, (math.nan, 1.0)),), (0.1, 0.2), "weights", 1.0, "loss", False, 1)
    odd.picture(tmp_path / "c.png")
    assert odd.to_dict()["curves"][0]["values"] == [None, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": "filters"}, "units='filters'"),
        ({"shares": [1.1]}, "shares=1.1"),
        ({"batches": 1.5}, "batches=1.5"),
        ({"include": "nothing"}, "include='nothing'"),
        ({"loss": lambda m, b: m(b[0]).mean(), "metric": MulticlassAccuracy(4)}, "not both"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(OptionError, match=message):
        sensitivity(LitNet(), loader(), **options)


def test_what_cannot_be_asked_is_one_clear_error():
    with pytest.raises(OptionError, match="batches of inputs and a target"):
        sensitivity(LitNet(), [torch.zeros(2, 1, 8, 8)], metric=MulticlassAccuracy(4))
    with pytest.raises(ModelError, match="No channel of the selected layers"):
        sensitivity(LitNet(), loader(), units="channels", include="net.10")
    with pytest.raises(ModelError, match="cannot be run outside of a fit"):
        sensitivity(LitNet(), [(torch.zeros(2, 3), torch.zeros(2))])
