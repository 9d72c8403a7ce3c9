"""Prunability: closed forms of small models, the two answers on a curve that is not monotone, and nothing left behind."""

import copy
import json
import math

import pytest
import torch
from lit import LitNet, loader
from matplotlib import image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.errors import ModelError, OptionError
from lightning_prune.measure import Point, Prunability, prunability
from lightning_prune.methods.magnitude import lamp
from tests.structure.test_preserve import dice, photograph, trained


class Line(nn.Module):
    """``y = w x`` on inputs of unit variance, so that removing weight i costs ``w_i^2 - 2 w_i v_i`` against targets ``v x``."""

    def __init__(self, weights):
        super().__init__()
        self.layer = nn.Linear(len(weights), 1, bias=False)
        self.layer.weight.data = torch.tensor([weights])

    def forward(self, x):
        return self.layer(x)


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def identity_data(weights, noise=0.0):
    """Inputs ``sqrt(n) e_i``: the mean square of ``(w - v) x`` is then ``|w - v|^2`` exactly."""
    n = len(weights)
    x = math.sqrt(n) * torch.eye(n)
    return [(x, x @ torch.tensor(weights)[:, None] + noise)]


WEIGHTS = [3.0, -0.1, 0.2, 1.0, 0.3, -2.0, 0.4, 0.5]


def test_a_linear_model_has_the_closed_form():
    data = identity_data(
        WEIGHTS, noise=1.0
    )  # the loss is 1 + sum of squares of what left, +- 2/sqrt(n) w: noise is the same for all
    grid = [i / 8 for i in range(9)]
    found = prunability(Line(WEIGHTS), data, mse, beta=0.3, grid=grid)
    n = len(WEIGHTS)
    order = sorted(range(n), key=lambda i: abs(WEIGHTS[i]))
    for point in found.points:
        gone = order[: round((1 - point.kept) * n)]
        errors = [1.0 + (math.sqrt(n) * WEIGHTS[i] if i in gone else 0.0) for i in range(n)]
        assert point.loss == pytest.approx(sum(e * e for e in errors) / n, rel=1e-5)
        assert point.within == (point.loss <= found.bound)
        assert point.removed == len(gone)
    assert found.dense == pytest.approx(1.0, rel=1e-5)
    assert found.bound == pytest.approx(1.3, rel=1e-5)


def test_the_answer_at_a_loss_of_zero_is_set_by_abs_tol():
    data, grid = identity_data(WEIGHTS), [i / 8 for i in range(9)]
    assert prunability(Line(WEIGHTS), data, mse, beta=10.0, grid=grid).value == 1.0
    squares = sorted(w * w for w in WEIGHTS)
    for removed in range(9):
        tolerance = sum(squares[:removed]) + 1e-4
        assert prunability(Line(WEIGHTS), data, mse, abs_tol=tolerance, grid=grid).value == 1 - removed / 8


def test_the_two_answers_differ_on_a_curve_that_comes_back():
    weights, target = [1.0, -1.01, 5.0], [0.0, 0.0, 5.0]
    x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # the first two cancel: losing one hurts, losing both does not
    data = [(x, x @ torch.tensor(target)[:, None])]
    found = prunability(Line(weights), data, mse, beta=0.0, abs_tol=1e-3, grid=[1, 2 / 3, 1 / 3, 0])
    assert [point.within for point in found.points] == [True, False, True, False]
    assert (found.first_crossing, found.smallest_feasible) == (1.0, 1 / 3)
    assert found.value == 1.0
    other = prunability(
        Line(weights), data, mse, beta=0.0, abs_tol=1e-3, grid=[1, 2 / 3, 1 / 3, 0], mode="smallest_feasible"
    )
    assert other.value == 1 / 3


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_weights_that_are_zero_can_leave(share):
    n = 8
    weights = [float(i + 1) if i >= share * n else 0.0 for i in range(n)]
    found = prunability(Line(weights), identity_data(weights), mse, beta=0.0, grid=[i / 8 for i in range(9)])
    assert found.value == found.smallest_feasible == 1 - share


def test_padding_a_network_with_units_of_zero_weight_divides_its_prunability():
    small = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))
    wide = nn.Sequential(nn.Linear(4, 18, bias=False), nn.ReLU(), nn.Linear(18, 3, bias=False))
    for index, rows in ((0, True), (2, False)):
        wide[index].weight.data.zero_()
        (wide[index].weight.data[:6] if rows else wide[index].weight.data[:, :6]).copy_(small[index].weight.data)
    x = torch.randn(16, 4)
    data = [(x, small(x).detach() + 0.1)]
    narrow = prunability(small, data, mse, grid=[i / 42 for i in range(43)])
    padded = prunability(wide, data, mse, grid=[i / 126 for i in range(127)])
    assert narrow.dense == pytest.approx(padded.dense)
    assert padded.value * 126 == pytest.approx(narrow.value * 42)


def losses():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(32, 6)
    return model, [(x, model(x).detach() + 0.3 * torch.randn(32, 3))]


def test_the_answer_falls_with_beta_and_an_infinite_one_gives_the_smallest_share():
    model, data = losses()
    for mode in ("first_crossing", "smallest_feasible"):
        values = [
            prunability(model, data, mse, beta=beta, mode=mode).value for beta in (0.0, 0.05, 0.2, 1.0, 5.0, math.inf)
        ]
        assert values == sorted(values, reverse=True)
        assert values[-1] == 0.0
    assert prunability(model, data, mse, beta=math.inf, grid=[0.3, 0.1]).value == 0.1


def test_permuting_hidden_units_changes_nothing():
    model, data = losses()
    order = torch.randperm(16)
    permuted = copy.deepcopy(model)
    permuted[0].weight.data, permuted[0].bias.data = model[0].weight.data[order], model[0].bias.data[order]
    permuted[2].weight.data = model[2].weight.data[:, order]
    one, two = (prunability(m, data, mse) for m in (model, permuted))
    assert one.value == two.value
    assert [p.loss for p in one.points] == pytest.approx([p.loss for p in two.points], rel=1e-5)


def test_batches_of_unequal_size_count_by_samples():
    model, [(x, y)] = losses()
    whole = prunability(model, [(x, y)], mse, grid=[0.5])
    parts = prunability(model, [(x[:5], y[:5]), (x[5:], y[5:])], mse, grid=[0.5])
    assert (whole.samples, parts.samples) == (32, 32)
    assert [p.loss for p in whole.points] == pytest.approx([p.loss for p in parts.points], rel=1e-5)


def test_every_pass_sees_the_same_samples_of_a_shuffled_loader():
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + 0.1 * torch.randn(6), y

    model, [(x, y)] = losses()
    data = DataLoader(Noisy(x, y), 4, shuffle=True)
    whole = prunability(model, data, lambda m, b: b[0].mean() + 10, grid=[0.9, 0.5, 0.0], batches=2)  # only of the data
    assert whole.samples == 8
    assert len({point.loss for point in whole.points}) == 1


def test_a_negative_loss_is_loosened_not_tightened():
    found = prunability(Line(WEIGHTS), identity_data(WEIGHTS), lambda m, b: mse(m, b) - 10, beta=0.5, grid=[0.0])
    assert found.bound == pytest.approx(-5.0)
    assert found.points[0].within


def test_a_loss_that_is_not_finite_is_not_within_the_bound():
    def loss(model, batch):
        return mse(model, batch) + 1 + (math.nan if (model.layer.weight == 0).any() else 0.0)

    found = prunability(Line(WEIGHTS), identity_data(WEIGHTS), loss, beta=100, grid=[0.5])
    assert found.value == 1.0
    assert found.to_dict()["points"][1]["loss"] is None
    with pytest.raises(ModelError, match="diverged"):
        prunability(Line([math.nan, 1.0]), identity_data([1.0, 1.0]), mse)


def test_a_lightning_module_is_asked_by_its_training_step_and_left_bit_identical():
    model, data = LitNet(), loader()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before, state = photograph(model), dice()
    found = prunability(model, data, grid=[0.5, 0.1])
    assert photograph(model) == before
    assert dice() == state
    model.eval()
    expected = nn.functional.cross_entropy(model(data.dataset.x), data.dataset.y)
    assert found.dense == pytest.approx(float(expected.detach()), rel=1e-5)
    assert found.samples == 64


def test_any_module_is_left_bit_identical_also_with_recalibration_and_errors():
    model = trained()
    before, state = photograph(model), dice()
    data = [(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)] * 2
    loss = lambda m, b: m(b[0]).square().mean()  # noqa: E731
    prunability(model, data, loss, grid=[0.5], recalibrate_bn=2)

    def breaks(m, b):
        if any((p == 0).float().mean() > 0.4 for p in m.parameters()):
            raise RuntimeError("too sparse")
        return loss(m, b)

    with pytest.raises(ModelError, match="too sparse"):
        prunability(model, data, breaks, grid=[0.1])
    assert photograph(model) == before
    assert dice() == state


def test_criteria_order_differently_and_functions_are_taken():
    model, data = losses()
    model[0].weight.data *= 100
    by = {
        c if isinstance(c, str) else c.__name__: prunability(model, data, mse, criterion=c, grid=[0.7])
        for c in ("magnitude", "random", lamp)
    }
    assert len({found.points[1].loss for found in by.values()}) == 3
    assert all(found.criterion == name for name, found in by.items())
    seeds = [prunability(model, data, mse, criterion="random", grid=[0.5], seed=s).points[1].loss for s in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_only_selected_weights_leave():
    model, data = losses()
    found = prunability(model, data, mse, grid=[0.0], exclude="0")
    assert found.weights == 48
    expected = mse(lambda x: model[2].bias.expand(32, 3), data[0])
    assert found.points[-1].loss == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_answer_is_a_table_json_and_a_picture(tmp_path):
    model, data = losses()
    found = prunability(model, data, mse)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
    assert found.to_dict()["value"] == found.value
    assert f"P_0.1 = {found.value:.4g} of 144 weights" in " ".join(str(found).split())
    assert str(found).count("%") == len(found.points) == 25
    found.picture(tmp_path / "a.png")
    found.picture(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert image.imread(tmp_path / "a.png").std() > 0.05
    odd = Prunability(
        (Point(1.0, 0, 1.0, True), Point(0.5, 3, math.nan, True)),
        math.inf,
        0.0,
        math.inf,
        "first_crossing",
        "a$b$",
        6,
        1,
    )
    odd.picture(tmp_path / "c.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, "beta=-0.1"),
        ({"beta": math.nan}, "beta=nan"),
        ({"abs_tol": "x"}, "abs_tol='x'"),
        ({"mode": "last"}, "mode='last'"),
        ({"criterion": "size"}, "criterion='size'"),
        ({"grid": [0.5, 1.5]}, "grid=1.5"),
        ({"batches": 0}, "batches=0"),
        ({"include": "nothing"}, "include='nothing'"),
    ],
)
def test_bad_options_raise(options, message):
    model, data = losses()
    with pytest.raises(OptionError, match=message):
        prunability(model, data, mse, **options)


def test_bad_models_and_data_raise():
    model, data = losses()
    with pytest.raises(OptionError, match="has no training_step"):
        prunability(model, data)
    with pytest.raises(OptionError, match="0 samples"):
        prunability(model, [], mse)
    with pytest.raises(OptionError, match="read many times"):
        prunability(model, iter(data), mse)
    with pytest.raises(ModelError, match="no weights that could be pruned"):
        prunability(nn.BatchNorm1d(3), data, mse)
    with pytest.raises(ModelError, match="scalar loss"):
        prunability(model, data, lambda m, b: m(b[0]))
