"""KFE: importances, the authors' own numbers, budgets, gradual runs and later stages."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lit import LitNet, loader, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import KFE, PFP, Magnitude, compress, count_flops, explain, load_from_checkpoint
from lightning_prune.curvature.kronecker import Factors, Kronecker
from lightning_prune.errors import BudgetError, ModelError, OptionError
from lightning_prune.methods.kfe import core_of, eigenbasis, importances, ranked
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.rotated import Directions, Rotated, cost, factors_of, rotate
from lightning_prune.structure.steps import Rotate
from lightning_prune.structure.surgery import compact

REFERENCE = Path(__file__).parents[1] / "reference"


def ce(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def spd(size, generator, rank=None):
    root = torch.randn(size, rank or 2 * size, generator=generator, dtype=torch.float64)
    return (root @ root.T / size)[None]


def layer_and_factors(seed=0, taps=9):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 4, taps, generator=generator, dtype=torch.float64)
    return weight, Kronecker(spd(4, generator), spd(5, generator))


# Importances -------------------------------------------------------------------------------------------------------------------


def test_half_an_importance_is_what_the_quadratic_form_of_k_fac_loses_with_the_direction():
    weight, factors = layer_and_factors()
    basis = eigenbasis(factors)
    core = core_of(weight, basis.outputs[0], basis.inputs[0])
    inputs, outputs = importances(core, basis.diagonal())
    fisher = torch.einsum("op,rs,ij->oripsj", factors.outputs[0], torch.eye(9, dtype=torch.float64), factors.inputs[0])
    for direction, expected in [("out", outputs), ("in", inputs)]:
        for index, found in enumerate(expected):
            only = torch.zeros_like(core)
            if direction == "out":
                only[index] = core[index]
            else:
                only[:, :, index] = core[:, :, index]
            change = torch.einsum("op,prq,iq->ori", basis.outputs[0], only, basis.inputs[0])
            loss = torch.einsum("ori,oripsj,psj->", change, fisher, change)
            torch.testing.assert_close(found, loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inputs.sum(), outputs.sum())


def test_the_core_gives_the_weight_back_and_keeps_its_norm():
    weight, factors = layer_and_factors()
    basis = eigenbasis(factors)
    core = core_of(weight, basis.outputs[0], basis.inputs[0])
    back = torch.einsum("op,prq,iq->oir", basis.outputs[0], core, basis.inputs[0])
    torch.testing.assert_close(back, weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(core.norm(), weight.norm())


def test_importances_do_not_depend_on_the_coordinates_of_the_inputs():
    weight, factors = layer_and_factors()
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    turned = torch.einsum("oir,ji->ojr", weight, turn)
    other = Kronecker(turn @ factors.inputs @ turn.T, factors.outputs)
    found = []
    for values, own in ((weight, factors), (turned, other)):
        basis = eigenbasis(own)
        found.append(importances(core_of(values, basis.outputs[0], basis.inputs[0]), basis.diagonal()))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one.sort().values, two.sort().values, rtol=1e-10, atol=1e-12)
    channels = [
        (values.square() * own.inputs[0].diagonal()[:, None]).sum((0, 2))
        for values, own in ((weight, factors), (turned, other))
    ]
    assert not torch.allclose(*(c.sort().values for c in channels), rtol=1e-2)  # as those of channels do


def test_the_loss_of_a_quadratic_model_rises_by_half_of_what_leaves():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 6, generator=generator, dtype=torch.float64) @ torch.randn(
        6, 6, generator=generator, dtype=torch.float64
    )
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Identity()).double()
    data = [(x, net(x).detach())]  # no residual: the weights are the minimum
    loss = lambda m, b: F.mse_loss(m(b[0]), b[1], reduction="none").sum(1).mean() / 2  # noqa: E731
    small, plan = compress(net, KFE(params=22, align=1, calibration_batches=1), x[:2], data, loss)
    (step,) = plan.steps
    covariance = x.T @ x / len(x)
    basis = torch.linalg.eigh(covariance).eigenvectors
    assert {step.inputs, step.outputs} - {None}
    change = net[0].weight - sum_of(small[0])
    expected = torch.einsum("oi,ij,oj->", change, covariance, change) / 2
    torch.testing.assert_close(loss(small, data[0]).detach(), expected.detach(), rtol=1e-8, atol=1e-12)
    assert expected > 0
    if step.inputs:  # what left is spanned by eigenvectors of the inputs' covariance
        inside = (change @ basis).square().sum(0)
        assert int((inside > 1e-9 * inside.max()).sum()) == 6 - step.inputs


def sum_of(rotated):
    """Return the weight that the factors of a linear layer multiply to."""
    product = torch.eye(rotated[0].weight.shape[1], dtype=torch.float64)
    for factor in rotated:
        product = factor.weight @ product
    return product


def test_a_direction_that_the_data_do_not_have_leaves_first_and_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    span = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q[:, :7]
    x = torch.randn(64, 7, generator=generator, dtype=torch.float64) @ span.T
    y = torch.randint(0, 3, (64,), generator=generator)
    net = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    dense = sum(p.numel() for p in net.parameters())
    small, plan = compress(net, KFE(params=dense - 100, align=1, include="0"), x[:2], [(x, y)], ce)
    assert [(s.inputs, s.outputs) for s in plan.steps] == [(7, None)]
    torch.testing.assert_close(small(x), net(x), rtol=1e-10, atol=1e-10)


# The authors' code -------------------------------------------------------------------------------------------------------------


def authors(kind):
    data = np.load(REFERENCE / f"kfe_{kind}.npz")
    if kind.startswith("cnn"):
        layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        layers += [nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
        layers += [nn.Conv2d(12, 12, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)]
    else:
        layers = [nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)]
    net = nn.Sequential()
    net.add_module("feature", nn.Sequential(*layers))
    net.load_state_dict({key[2:]: torch.from_numpy(data[key]) for key in data.files if key.startswith("w/")})
    return net.eval(), data, json.loads(str(data["meta"]))


def batches_of(data):
    """Return the authors' batches, and what gives the gradients at the labels that they drew, batch by batch."""
    labels = itertools.cycle(torch.from_numpy(data["sampled_y"]))

    def drawn(outputs, generator):
        return outputs.softmax(1) - F.one_hot(next(labels), outputs.shape[1])

    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in zip(data["x"], data["y"], strict=True)], drawn


@pytest.mark.parametrize("kind", ["cnn_nobias_true", "mlp_bias_true"])
def test_at_the_authors_threshold_kept_directions_parameters_and_outputs_are_theirs(kind):
    net, data, meta = authors(kind)
    batches, drawn = batches_of(data)
    layers = {name: net.get_submodule(name) for name in meta["layers"]}
    factors = Factors(layers, homogeneous=True)
    for x, _ in batches:
        with factors.watching():
            outputs = net(x)
        factors.backward(outputs, drawn(outputs.detach(), None))
    own = {}
    for name, found in factors.factors().items():
        basis = eigenbasis(found)
        own[name] = ranked(layers[name], basis, basis.diagonal())
    scores = (
        torch.cat([side for found in own.values() for side in (found.input_scores, found.output_scores)]).sort().values
    )
    threshold = scores[int(meta["ratio"] * len(scores))]
    steps = []
    for name, found in own.items():
        inputs, outputs = (int((side > threshold).sum()) for side in (found.input_scores, found.output_scores))
        core = data[f"{name}/core_pruned_shape"]
        assert (outputs, inputs) == (core[0], core[-1])
        homogeneous = isinstance(layers[name], nn.Linear)
        directions = Directions(found.inputs[:, :inputs], found.outputs[:, :outputs], augmented=homogeneous)
        price = cost(layers[name], directions.form, ())
        assert data[f"{name}/replaced"] == (price.params <= sum(p.numel() for p in layers[name].parameters()))
        if data[f"{name}/replaced"]:
            steps.append(Rotate.of(name, layers[name], directions))
    small = compact(net, Plan(tuple(steps)), as_calls(batches[0][0]))
    assert sum(p.numel() for p in small.parameters()) == int(data["params_after"])
    x = torch.from_numpy(data["x"]).flatten(0, 1)
    np.testing.assert_allclose(net(x).detach(), data["out_dense"], atol=1e-5)
    np.testing.assert_allclose(small(x).detach(), data["out_pruned"], atol=1e-5)


def test_official_under_the_authors_number_of_parameters_gives_their_network():
    net, data, meta = authors("cnn_nobias_true")
    batches, drawn = batches_of(data)
    options = {"limit": meta["prune_ratio_limit"], "distribution": drawn, "recalibrate_bn": 0}
    method = KFE(params=int(data["params_after"]), official=True, align=1, **options)
    small, plan = compress(net, method, batches[0][0], batches, ce)
    assert {step.module for step in plan.steps} == set(meta["replaced"])
    assert sum(p.numel() for p in small.parameters()) == int(data["params_after"])
    x = torch.from_numpy(data["x"]).flatten(0, 1)
    np.testing.assert_allclose(small(x).detach(), data["out_pruned"], atol=1e-5)


# Budgets -----------------------------------------------------------------------------------------------------------------------


def wide():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3, groups=4),
        nn.Conv2d(48, 24, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 4),
    ).eval()


X = torch.zeros(2, 1, 8, 8)


def price(model, what):
    return count_flops(model, X).total if what == "flops" else sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("what", ["flops", "params"])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
@pytest.mark.parametrize("options", [{}, {"scaling": "kfac"}, {"separable": "frobenius"}], ids=str)
def test_a_bound_is_never_exceeded_and_met_closely_and_no_layer_gets_dearer(what, share, options):
    net = wide()
    small, plan = compress(net, KFE(**{what: share}, align=1, recalibrate_bn=0, **options), X, list(loader(32)), ce)
    assert price(small, what) <= share * price(net, what)
    if not options.get("separable"):  # its sizes are far apart
        assert price(small, what) > (share - 0.03) * price(net, what)
    before, after = (count_flops(m, X).by_module for m in (net, small))
    for step in plan.steps:
        pair = [sum(p.numel() for p in m.get_submodule(step.module).parameters()) for m in (small, net)]
        assert pair[0] < pair[1]
        assert after[step.module] < before[step.module]
        assert len(small.get_submodule(step.module)) <= (2 if step.module in ("6", "10") else 3)
    assert "groups" in plan.left_alone["5"]


def test_nothing_leaves_under_the_whole_budget_and_what_stays_is_nested_under_smaller_ones():
    net, data = wide(), list(loader(32))
    with pytest.raises(ModelError, match=r"would change nothing.*as it is"):
        compress(net, KFE(flops=1.0), X, data, ce)
    kept = []
    for share in (0.9, 0.7, 0.5, 0.35):
        _, plan = compress(net, KFE(flops=share, align=1, include=["0", "3"]), X, data, ce)
        sizes = {step.module: (step.inputs or 99, step.outputs or 99) for step in plan.steps}
        kept.append([min(sizes.get("3", (99, 99)))])
    assert kept == sorted(kept, reverse=True)


def test_a_bound_that_cannot_be_met_names_the_layers_and_numbers_that_stay_are_aligned():
    with pytest.raises(BudgetError, match=r"'3' \(.* in.*out"):
        compress(wide(), KFE(flops=0.01), X, list(loader(32)), ce)
    _, plan = compress(wide(), KFE(flops=0.4, align=8), X, list(loader(32)), ce)
    assert all(
        n is None or n % 8 == 0 for step in plan.steps if step.module != "10" for n in (step.inputs, step.outputs)
    )


def test_the_same_seed_draws_the_same_labels_and_the_model_is_left_as_it_was():
    net, data = wide(), list(loader(32))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = [compress(net, KFE(flops=0.5, align=1, seed=seed), X, data, ce)[0].state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    assert not all(key in found[2] and torch.equal(value, found[2][key]) for key, value in found[0].items())
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())


# In a fit ----------------------------------------------------------------------------------------------------------------------


def test_a_gradual_run_keeps_nested_directions_and_ends_within_the_bound(tmp_path):
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            values = torch.linalg.svdvals(module.net[8].weight.detach().double())
            seen.append(int((values > 1e-5 * values[0]).sum()))

    model = LitNet(optimizer="Adam", lr=0.01)
    dense = count_flops(model, model.example_input_array).total
    run = trainer(tmp_path, max_epochs=4, callbacks=[KFE(flops=0.4, align=1, until_epoch=3), Watch()])
    run.fit(model, loader())
    assert count_flops(model, model.example_input_array).total <= 0.4 * dense
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > seen[-1]
    assert any(isinstance(m, Rotated) for m in model.modules())


@pytest.mark.parametrize(
    "first", [Magnitude(structured=True, flops=0.7, align=4), PFP(flops=0.7, align=4)], ids=["Magnitude", "PFP"]
)
def test_a_stage_after_channels_have_left_replays_from_one_checkpoint(first, tmp_path):
    model = LitNet()
    trainer(tmp_path, max_epochs=1, callbacks=[first]).fit(model, loader())
    run = trainer(tmp_path, max_epochs=1, callbacks=[KFE(flops=0.45, align=4)])
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "small.ckpt")
    again = load_from_checkpoint(LitNet, tmp_path / "small.ckpt")
    assert len({step.action for step in plan_of(again).steps}) >= 2
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(again.eval()(x), model.eval()(x))


def test_later_rounds_turn_the_cores_and_never_make_more_than_three_factors(tmp_path):
    model = LitNet()
    for number, share in enumerate((0.7, 0.5, 0.35)):
        trainer(tmp_path / str(number), max_epochs=1, callbacks=[KFE(flops=share, align=1)]).fit(model, loader())
        dense = plan_of(model).origin.flops
        assert count_flops(model, model.example_input_array).total <= share * dense
    rotated = [m for m in model.modules() if isinstance(m, Rotated)]
    assert rotated
    assert all(len(m) <= 3 and all(isinstance(part, nn.Conv2d | nn.Linear) for part in m) for m in rotated)
    modules = [step.module for step in plan_of(model).steps]
    assert len(modules) > len(set(modules))  # some layer was turned more than once


@pytest.mark.parametrize("side", [0, 1], ids=["inputs", "outputs"])
def test_a_linear_layer_whose_directions_have_left_on_one_side_keeps_those_of_the_other_even_if_they_are_dead(side):
    torch.manual_seed(0)
    layer, some = nn.Linear(64, 64), torch.eye(64)[:, :48]
    once = rotate(layer, Directions(*((some, None) if side == 0 else (None, some))))
    model = nn.Sequential(nn.Flatten(), once, nn.ReLU(), nn.Linear(64, 4))
    data = list(loader(32))
    if side == 0:
        nn.init.zeros_(model[3].weight[:, 8:])
    else:
        data = [(x * (torch.arange(8) < 1), y) for x, y in data]
    for share in (0.9, 0.6, 0.3):
        small, plan = compress(model, KFE(flops=share, align=1, include="1"), X, data, ce)
        assert [(step.inputs is None, step.outputs is None) for step in plan.steps] == [(side == 1, side == 0)]
        assert list(factors_of(small[1])) == list(factors_of(once))


# Bad input ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of flops, params"),
        ({"flops": 0.5, "params": 0.5}, "exactly one"),
        ({"flops": 1.5}, r"flops=1.5"),
        ({"flops": 0.5, "scaling": "diagonal"}, "'ekfac' or 'kfac'"),
        ({"flops": 0.5, "fisher": "true"}, "'sampled' or 'empirical'"),
        ({"flops": 0.5, "limit": 1.0}, "limit=1.0"),
        ({"flops": 0.5, "separable": "both"}, "separable='both'"),
        ({"flops": 0.5, "distribution": "poisson"}, "distribution='poisson'"),
        ({"flops": 0.5, "loss_fn": 3}, "loss_fn=3"),
        ({"flops": 0.5, "logits_module": 3}, "logits_module=3"),
        ({"flops": 0.5, "calibration_batches": 0}, "calibration_batches=0"),
        ({"flops": 0.5, "official": 1}, "official=1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        KFE(**options)


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
def test_a_model_that_is_certain_warns_with_the_total_and_keeps_what_the_budget_allows(labels, caplog):
    net, data = wide(), list(loader(32))
    with torch.no_grad():
        net[-1].bias += torch.tensor([2000.0, 0, 0, 0])
    data = [(x, torch.zeros_like(y)) for x, y in data]
    small, _ = compress(net, KFE(flops=0.6, align=1, fisher=labels), X, data, ce)
    assert "the Fisher information of all directions sums to 0: the model is next to certain" in caplog.text
    assert ("fisher='empirical'" in caplog.text) == (labels == "sampled")
    assert 0.57 * price(net, "flops") < price(small, "flops") <= 0.6 * price(net, "flops")


def test_directions_that_the_data_do_not_have_leave_only_as_far_as_the_budget_asks():
    net, data = wide(), list(loader(32))
    data = [(torch.zeros_like(x), y) for x, y in data]
    small, _ = compress(net, KFE(flops=0.8, align=1), X, data, ce)
    assert 0.77 * price(net, "flops") < price(small, "flops")


def test_a_loss_that_is_no_scalar_and_a_dry_run_without_a_loss_say_so():
    data = list(loader(32))
    vector = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")  # noqa: E731
    with pytest.raises(ModelError, match=r"loss_fn= must return the scalar loss.*shape \[16\]"):
        compress(wide(), KFE(flops=0.5, loss_fn=vector), X, data)
    with pytest.raises(ModelError, match=r"outside of a fit none is known: give loss="):
        explain(LitNet(), X, KFE(flops=0.5), data=data)
    with pytest.raises(ModelError, match="the data is empty"):
        compress(wide(), KFE(flops=0.5), X, [], ce)
    with pytest.raises(ModelError, match=r"KFE: The loss is no softmax.*distribution=.*fisher='empirical'"):
        compress(wide(), KFE(flops=0.5), X, data, lambda m, b: F.l1_loss(m(b[0]), F.one_hot(b[1], 4).float()))


def test_losses_in_which_samples_meet_and_weights_that_are_not_finite_are_refused():
    def contrast(model, batch):
        z = F.normalize(model(batch[0]), dim=1)
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))

    with pytest.raises(ModelError, match="Samples of a batch meet in the loss"):
        compress(wide(), KFE(flops=0.5), X, list(loader(32)), contrast)
    broken = wide()
    with torch.no_grad():
        broken[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match="finite"):
        compress(broken, KFE(flops=0.5), X, list(loader(32)), ce)
    with pytest.raises(ModelError, match="needs data"):
        compress(wide(), KFE(flops=0.5), X)


class TiedAndAttentive(pl.LightningModule):
    """Two layers of one weight, an attention's projections, and a head."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.middle, self.head = nn.Linear(16, 64), nn.Linear(64, 3)
        self.example_input_array = torch.zeros(2, 5, 16)

    def forward(self, x):
        x = self.two(F.relu(self.one(x)))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(F.relu(self.middle(x))).mean(1)

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_tied_weights_and_the_projections_of_attention_are_listed_as_left_alone(tmp_path):
    model, generator = TiedAndAttentive(), torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(32, 5, 16, generator=generator), torch.randint(0, 3, (32,), generator=generator))
    trainer(tmp_path, max_epochs=1, callbacks=[KFE(flops=0.85, align=1)]).fit(model, DataLoader(data, 8))
    plan = plan_of(model)
    assert {step.module for step in plan.steps} <= {"middle", "head"}
    assert "shared" in plan.left_alone["one"] or "tied" in plan.left_alone["one"]
    assert any(name.startswith("attention") for name in plan.left_alone)
