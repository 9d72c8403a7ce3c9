"""Growing penalties: units as tensors see them, how penalties act, what is gone stays gone, how a fit may end."""

import copy
import csv
import logging

import numpy as np
import pytest
import torch
from growing import LAYERS, Fixed, Flat, Lit, Watch, fit, noise
from lit import LitNet, Points, loader, trainer
from networks import NETWORKS
from pytorch_lightning.callbacks import Callback, EarlyStopping
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from torch import nn

from lightning_prune import count_flops
from lightning_prune.callback import compress, rehearse
from lightning_prune.callback.penalty import Pace, penalize_, shrink_
from lightning_prune.callback.ratios import energy_lost
from lightning_prune.callback.unit_slices import UnitSlices, cells_of, even
from lightning_prune.errors import BudgetError, CheckpointError, ModelError, OptionError, TrainerError
from lightning_prune.methods.greg import GReg
from lightning_prune.methods.increg import IncReg
from lightning_prune.methods.spp import SPP
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.groups import find_units

X = torch.zeros(2, 1, 8, 8)


def units_of(model, example):
    return find_units(model, as_calls(example))


# Units as tensors see them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention", "conv1d", "conv3d", "conv_bn", "depthwise", "lstm", "transformer"])
def test_scores_are_means_over_writing_weights_of_mean_absolute_values(name):
    model, example = NETWORKS[name]()
    structure = units_of(model, example)
    parameters = dict(model.named_parameters())
    found = [[] for _ in range(structure.count)]
    for slot in structure.slots:
        if slot.zeroed and slot.tensor in parameters and parameters[slot.tensor].ndim >= 2:
            weight = parameters[slot.tensor].detach().double().numpy()
            for unit in set(slot.units.tolist()) - {-1}:
                found[unit].append(np.abs(np.take(weight, np.flatnonzero(slot.units == unit), slot.axis)).mean())
    expected = [np.mean(own) if own else 0.0 for own in found]
    scores = UnitSlices(model, structure).scores()
    np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-6)


@pytest.mark.parametrize("options", [{"units": "channels"}, {"units": "columns"}])
def test_weights_whose_storage_has_gaps_score_and_train_as_others(options, tmp_path):
    models = [Lit(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.zeros(2, 8)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for layer in (0, 2):
        weight = models[1].net[layer].weight.detach()
        models[1].net[layer].weight = nn.Parameter(torch.cat([weight, weight], 1)[:, : weight.shape[1]])
        assert not models[1].net[layer].weight.is_contiguous()
    watches = [fit(IncReg(sparsity=0.5, **options), tmp_path, model, noise(model), max_epochs=4)[1] for model in models]
    assert watches[0].gone[-1].any()
    for kind in ("values", "gone"):
        assert all(map(torch.equal, *(getattr(watch, kind) for watch in watches)))


def test_ranks_are_places_within_the_cell_and_ties_go_by_later_keys_then_by_number():
    model, example = NETWORKS["conv3d"]()
    slices = UnitSlices(model, units_of(model, example))
    generator = torch.Generator().manual_seed(1)
    numbers = [torch.randint(0, 4, (slices.count,), generator=generator) for _ in range(2)]
    values = torch.tensor([-2.5, -0.0, 0.0, 1e-30])
    flags = torch.rand(slices.count, generator=generator) < 0.3
    for first, second in (
        numbers,
        (values[numbers[0]], numbers[1]),
        (numbers[0], values[numbers[1]]),
        (values[numbers[0]].double(), values[numbers[1]]),
        (flags, numbers[0]),
        (flags, values[numbers[0]]),
    ):
        check_places(slices, first, second)
    for cell in range(len(slices.size)):
        assert int(slices.size[cell]) == int((slices.cell == cell).sum())
    assert slices.counts(flags).tolist() == [int(flags[slices.cell == c].sum()) for c in range(len(slices.size))]


def check_places(slices, first, second):
    ranks = slices.ranks(first, second).tolist()
    for cell in range(len(slices.size)):
        own = [unit for unit in range(slices.count) if slices.cell[unit] == cell]
        order = sorted(own, key=lambda unit: (first[unit], second[unit], unit))
        assert [ranks[unit] for unit in order] == list(range(len(own)))


def test_halves_of_a_tied_weight_are_cells_of_their_own_and_lose_equally_many():
    model, example = NETWORKS["attention"]()
    structure = units_of(model, example)
    assert structure.ties
    cells = cells_of(structure)
    for tie in structure.ties:
        for block in tie:
            inside = set(cells[block].tolist())
            assert not inside & set(np.delete(cells, block).tolist())
    leaving = np.random.default_rng(0).random(structure.count) < 0.5
    found = even(structure, leaving)
    assert not (found & ~leaving).any()
    for tie in structure.ties:
        assert len({int(found[block].sum()) for block in tie}) == 1
        assert int(found[tie[0]].sum()) == min(int(leaving[block].sum()) for block in tie)


def test_energy_lost_is_the_tail_of_the_squared_singular_values():
    matrix = torch.randn(7, 11, dtype=torch.float64)
    squares = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    np.testing.assert_allclose(energy_lost(matrix), np.cumsum(squares[::-1]) / squares.sum(), rtol=1e-10)


# How penalties act --------------------------------------------------------------------------------------------------------------


def test_coupled_adds_lambda_w_to_a_gradient_and_decoupled_multiplies_by_1_minus_lr_lambda():
    weight = nn.Parameter(torch.randn(3, 4))
    before, penalty = weight.detach().clone(), torch.tensor([[0.1], [0.0], [2.0]])
    penalize_(weight, penalty)  # without a gradient there is nothing to add to
    assert weight.grad is None
    weight.grad = torch.ones(3, 4)
    penalize_(weight, penalty)
    torch.testing.assert_close(weight.grad, 1 + penalty * before)
    shrink_(weight, penalty, 0.1)
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * penalty))


def twin(model, batches, penalties, kind, norms):
    """The network trained by hand: SGD with momentum and ``g + lambda w``, or Adam and ``(1 - lr lambda) w``; float64."""
    parameters = dict(model.named_parameters())
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    first, lambdas = 0, {}
    for layer, size in LAYERS.items():
        own = penalties[first : first + size]
        first += size
        for name in (
            f"{layer}.weight",
            *([f"{layer}.bias", f"{layer + 1}.weight", f"{layer + 1}.bias"] if norms else []),
        ):
            if name in parameters:
                lambdas[name] = own.view(-1, *[1] * (parameters[name].ndim - 1))
    for step, (x, y) in enumerate(batches, 1):
        loss = nn.functional.cross_entropy(model(x.double()), y)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        for name, p in parameters.items():
            g, penalty, (m, v) = gradients[name], lambdas.get(name, torch.zeros(())), state[name]
            if kind == "SGD":
                m.mul_(0.9).add_(g + penalty * p.detach())
                p.data -= 0.05 * m
            else:
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p.data -= 0.05 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                p.data *= 1 - 0.05 * penalty
    return {f"net.{name}": p.detach() for name, p in parameters.items()}


class Plain(LitNet):
    def configure_optimizers(self):
        extra = {"momentum": 0.9} if self.hparams.optimizer == "SGD" else {}
        return getattr(torch.optim, self.hparams.optimizer)(self.parameters(), lr=0.05, **extra)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_a_fit_with_penalties_is_training_by_hand_with_them(kind, norm, norms, tmp_path):
    model = Plain(norm=norm, optimizer=kind).double()
    model.example_input_array = None
    batches = list(loader())
    penalties = torch.linspace(0, 3, 72, dtype=torch.float64)
    expected = twin(copy.deepcopy(model.net), batches, penalties, kind, norms)
    method = Fixed(lambda count: torch.linspace(0, 3, count, dtype=torch.float64), norms=norms, ceiling=3.0)
    _, watch = fit(method, tmp_path, model, max_epochs=1, precision="64-true")
    for name, value in expected.items():
        torch.testing.assert_close(watch.weights[-1][name], value, rtol=1e-10, atol=1e-13)


def test_one_penalty_for_all_units_of_a_layer_is_weight_decay_of_its_parameter_group(tmp_path):
    class Decayed(Plain):
        def configure_optimizers(self):
            decayed = [p for name, p in self.named_parameters() if name in ("net.0.weight", "net.3.weight")]
            rest = [p for p in self.parameters() if not any(p is q for q in decayed)]
            groups = [{"params": decayed, "weight_decay": 0.7}, {"params": rest}]
            return torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    start = LitNet().state_dict()
    models = [Plain(), Decayed()]
    for model in models:
        model.load_state_dict(start)
    method = Fixed(lambda count: 0.7 * (torch.arange(count) < 40), norms=False)
    _, watch = fit(method, tmp_path, models[0], max_epochs=1)
    end = {}

    class End(Callback):
        def on_train_end(self, trainer, module):
            end.update({name: p.detach().clone() for name, p in module.named_parameters()})

    trainer(tmp_path, callbacks=[End()], max_epochs=1).fit(models[1], loader())
    for name, value in end.items():
        torch.testing.assert_close(watch.weights[-1][name], value, rtol=1e-5, atol=1e-7)


def test_groups_follow_with_their_own_learning_rates_where_penalties_are_decoupled(tmp_path):
    class Split(Flat):
        def configure_optimizers(self):
            slow = [self.net[0].weight]
            rest = [p for p in self.parameters() if p is not slow[0]]
            return torch.optim.Adam([{"params": slow, "lr": 0.01}, {"params": rest, "lr": 0.1}])

    _, watch = fit(Fixed(lambda count: torch.full((count,), 0.5), ceiling=0.5), tmp_path, Split(), max_epochs=1)
    for layer, rate in ((0, 0.01), (3, 0.1)):
        before, after = (watch.weights[i][f"net.{layer}.weight"] for i in (0, 4))
        torch.testing.assert_close(after, before * (1 - 0.5 * rate) ** 4)


def test_layers_that_write_together_share_one_penalty(tmp_path):
    """In a residual network two convolutions write the same channels; both follow the one value of the unit."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 2)

        def forward(self, x):
            y = self.a(x)
            return self.out((y + self.b(y.relu())).mean((2, 3)))

    torch.manual_seed(0)
    model = Lit(Block(), torch.zeros(2, 2, 4, 4), lambda p: torch.optim.SGD(p, lr=0.1))
    model.training_step = lambda batch, batch_idx: model(batch[0]).sum() * 0.0
    method = Fixed(lambda count: torch.linspace(0.1, 1, count))
    _, watch = fit(method, tmp_path, model, noise(model), max_epochs=1)
    shares = [watch.weights[4][f"net.{k}.weight"] / watch.weights[0][f"net.{k}.weight"] for k in "ab"]
    for share in shares:
        torch.testing.assert_close(share.flatten(1).amax(1), (1 - 0.1 * torch.linspace(0.1, 1, 6)) ** 4)
        torch.testing.assert_close(share.flatten(1).amin(1), share.flatten(1).amax(1))


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True), (0.5, True)])
def test_the_limit_is_where_the_recursion_of_sgd_stops_to_contract(momentum, nesterov):
    rate, decay = 0.1, 0.05
    limit = Pace("SGD", np.array([rate]), decay, momentum, nesterov, True).limit
    for share, shrinks in ((0.999, True), (1.001, False)):
        weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], rate, momentum, weight_decay=decay, nesterov=nesterov)
        for _ in range(20_000 if momentum else 5_000):
            weight.grad = share * limit * weight.detach()
            optimizer.step()
            if not 1e-12 < abs(float(weight.detach())) < 1e12:
                break
        assert (abs(float(weight.detach())) < 1) == shrinks


def test_the_exponent_by_which_a_weight_shrinks_is_foretold():
    rates, penalties = np.linspace(0.02, 0.01, 300), np.linspace(0, 0.1, 300)
    for momentum in (0.0, 0.9):
        weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], 0.1, momentum)
        for rate, penalty in zip(rates, penalties, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            weight.grad = penalty * weight.detach()
            optimizer.step()
        pace = Pace("SGD", rates, 0.0, momentum, False, True)
        assert pace.shrinkage(penalties) == pytest.approx(-np.log(float(weight.detach())), rel=0.05)


# What is gone stays gone --------------------------------------------------------------------------------------------------------


class Zeros(Callback):
    """After every step: slices of units that are gone, and what the optimizer keeps for them, are zero; those of others are not."""

    def __init__(self, method):
        self.method, self.checks = method, 0

    def on_train_batch_end(self, trainer, module, *_):
        states = {p: s for optimizer in trainer.optimizers for p, s in optimizer.state.items()}
        first = 0
        for layer, size in LAYERS.items():
            gone = self.method.gone[first : first + size]
            first += size
            norms = module.net[layer + 1].parameters() if layer < 8 else ()
            for parameter in (*module.net[layer].parameters(), *norms):
                kept = [v for v in states[parameter].values() if v.shape == parameter.shape]
                for tensor in (parameter, *kept):
                    assert not tensor[gone].any()
                    assert tensor[~gone].any()
            self.checks += int(gone.sum())


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_what_is_pruned_and_its_moments_stay_zero_for_100_steps(optimizer, tmp_path):
    method = IncReg(sparsity=0.5, align=1)
    zeros = Zeros(method)
    fit(method, tmp_path, LitNet(optimizer=optimizer, lr=0.01), callbacks=[zeros], max_epochs=32)
    assert zeros.checks > 36 * 60  # half of 72 channels for half of 128 steps
    assert method.quota.tolist() == [8, 12, 16]


METHODS = {"IncReg": IncReg, "GReg-1": GReg, "GReg-2": lambda **options: GReg(2, **options)}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_the_compact_model_computes_what_the_masked_one_did(name, norm, tmp_path):
    class Masked(Callback):
        def on_train_end(self, trainer, module):
            self.net = copy.deepcopy(module.net)

    method, masked = METHODS[name](flops=0.5, align=1, recalibrate_bn=0), Masked()
    model, watch = fit(method, tmp_path, LitNet(norm=norm), callbacks=[masked], precision="64-true", max_epochs=4)
    x = torch.randn(8, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        before, after = masked.net.eval()(x), model.eval()(x)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    assert before.std() > 0.1
    dense = count_flops(LitNet(norm=norm), X).total
    assert 0.46 * dense < count_flops(model, X.double()).total <= 0.5 * dense
    left = {layer: int(watch.weights[-1][f"net.{layer}.weight"].flatten(1).any(1).sum()) for layer in LAYERS}
    assert left == {layer: model.net[layer].weight.shape[0] for layer in LAYERS}  # all were at zero in time


@pytest.mark.parametrize(("name", "example"), [
    ("conv1d", torch.zeros(2, 3, 16)), ("conv3d", torch.zeros(2, 2, 4, 6, 6)), ("depthwise", torch.zeros(2, 4, 9, 9)),
    ("attention", torch.zeros(2, 5, 8)), ("transposed", torch.zeros(2, 3, 4)),
])  # fmt: skip
@pytest.mark.parametrize(
    "method", ["IncReg", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("GReg-1", "GReg-2"))]
)
def test_networks_of_every_kind_land_on_their_quota(name, example, method, tmp_path):
    nets = {
        "transposed": lambda: (
            nn.Sequential(nn.ConvTranspose1d(3, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 2, 2, stride=2)),
            example,
        )
    }
    net = (nets | NETWORKS)[name]()[0]
    model, callback = Lit(net, example, lambda p: torch.optim.AdamW(p, lr=1e-3)), METHODS[method](sparsity=0.4, align=1)
    dense, data = count_flops(model, example).total, noise(model)
    fit(callback, tmp_path, model, data, max_epochs=3)
    assert count_flops(model, example).total < dense
    assert not callback.left.any()
    assert model(example).isfinite().all()


def test_bounds_by_shares_of_groups_and_by_ratios(tmp_path):
    def widths(**options):
        model = LitNet()
        fit(GReg(align=1, **options), tmp_path, model, max_epochs=1)
        return [model.net[layer].weight.shape[0] for layer in LAYERS]

    assert widths(sparsity={"net.3": 0.25, "net.8": 0.5}) == [16, 18, 16]
    one, two, three = widths(params=0.6, ratios={"net.0": 1.0, "net.8": 2.0})
    assert two == 24
    assert abs((32 - three) / 32 - 2 * (16 - one) / 16) <= 2 / 16  # one unit of each
    total = sum(p.numel() for p in LitNet().parameters())
    small = LitNet()
    compress_to = GReg(align=1, params=0.6, ratios="pca")
    fit(compress_to, tmp_path, small, max_epochs=1)
    assert 0.57 * total < sum(p.numel() for p in small.parameters()) <= 0.6 * total


def test_by_pca_every_group_keeps_the_same_share_of_its_energy():
    model = LitNet(norm=False)
    with torch.no_grad():  # of low rank: most of its channels cost no energy
        model.net[3].weight.copy_((torch.randn(24, 4) @ torch.randn(4, 144)).view(24, 16, 3, 3) * 0.1)
    method = GReg(align=1, flops=0.15, ratios="pca")
    _, plan = end(method, model)
    kept = {
        step.module: step.tensors["weight"].after[0]
        for step in plan.steps
        if step.module in ("net.0", "net.3", "net.8")
    }
    lost = {}
    for name, count in kept.items():
        weight = model.get_parameter(f"{name}.weight").detach().double().flatten(1).numpy()
        squares = np.linalg.svd(weight, compute_uv=False) ** 2
        lost[name] = [squares[left:].sum() / squares.sum() for left in (count + 1, count, count - 1)]
    assert kept["net.3"] <= 4
    assert max(own[0] for own in lost.values()) <= min(own[2] for own in lost.values()) + 1e-9
    sizes = model.net[0].weight.detach().abs().flatten(1).mean(1)
    stay = next(step for step in plan.steps if step.module == "net.0").tensors["weight"].kept(0)
    assert sizes[stay].min() >= sizes[~stay].max()  # which ones is not PCA's to say


def end(method, model):
    from lightning_prune.callback.one_shot import end_of

    return end_of(model, method, X)


@pytest.mark.parametrize(("epochs", "still"), [(28, True), (20, False)])
def test_statistics_stay_where_training_has_followed_and_are_estimated_anew_where_it_has_not(epochs, still, tmp_path):
    class Before(Callback):
        def on_train_end(self, trainer, module):
            kept = ~method.gone[:16]
            self.means = module.net[1].running_mean[kept].clone()
            self.outputs = copy.deepcopy(module.net).eval()(loader().dataset.x)

    method, before = GReg(sparsity=0.5, align=1, settle_steps=0), Before()
    model, _ = fit(method, tmp_path, Plain(), callbacks=[before], max_epochs=epochs)
    assert torch.equal(model.net[1].running_mean, before.means) == still
    outputs = model.net.eval()(loader().dataset.x)
    assert torch.allclose(outputs, before.outputs, rtol=1e-4, atol=1e-4) == still


# What counts as a step ----------------------------------------------------------------------------------------------------------


class Count(Fixed):
    def grow(self):
        self.seen = [*getattr(self, "seen", []), self.updates]


def test_batches_that_accumulate_are_one_step_and_epochs_before_start_epoch_none(tmp_path):
    method = Count(torch.zeros, start_epoch=1)
    fit(method, tmp_path, max_epochs=3, accumulate_grad_batches=2)
    assert method.seen == [1, 2, 3, 4]


def test_steps_that_a_gradient_scaler_skips_do_not_count(tmp_path):
    class Overflow(LitNet):
        taken = 0

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx == 1 else loss

        def on_before_zero_grad(self, optimizer):
            self.taken = max((int(s.get("step", 0)) for s in optimizer.state.values()), default=0)

    class Scaled(MixedPrecision):  # Lightning has none for the CPU, torch has
        def __init__(self):
            super().__init__("bf16-mixed", "cpu")
            self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    method, model = Count(lambda count: torch.full((count,), 0.1)), Overflow(optimizer="Adam", lr=0.01)
    trainer(tmp_path, callbacks=[method], plugins=[Scaled()], max_epochs=2).fit(model, loader())
    assert method.seen == [1, 2, 3, 4, 5, 6]  # two of eight were skipped


def test_two_optimizers_of_a_manual_fit_are_one_step_and_each_shrinks_its_own(tmp_path):
    class Manual(Flat):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            first = list(self.net[0].parameters())
            rest = [p for p in self.parameters() if not any(p is q for q in first)]
            return [torch.optim.SGD(first, lr=0.1), torch.optim.AdamW(rest, lr=0.05, weight_decay=0.0)]

    method = Count(lambda count: torch.full((count,), 0.5), ceiling=0.5)
    _, watch = fit(method, tmp_path, Manual(), max_epochs=1)
    assert method.seen == [1, 2, 3, 4]
    for layer, rate in ((0, 0.1), (3, 0.05), (8, 0.05)):
        before, after = (watch.weights[i][f"net.{layer}.weight"] for i in (0, -1))
        torch.testing.assert_close(after, before * (1 - 0.5 * rate) ** 4)


# How a fit may end --------------------------------------------------------------------------------------------------------------


def test_a_fit_that_ends_early_shrinks_by_what_is_gone_and_warns_with_both_figures(tmp_path, caplog):
    method = IncReg(flops=0.5, align=1)
    stop = EarlyStopping("val_loss", patience=6, min_delta=100.0)
    with caplog.at_level(logging.WARNING, "lightning_prune"):
        model, _ = fit(method, tmp_path, callbacks=[stop], max_epochs=20)
    gone, left = int(method.gone.sum()), int(method.left.sum())
    assert gone > 0 < left
    assert sum(model.net[layer].weight.shape[0] for layer in LAYERS) == 72 - gone
    share = count_flops(model, X).total / count_flops(LitNet(), X).total
    expected = f"before all units that shall leave were at zero, at {100 * gone / (gone + left):.0f} % of the schedule. Asked for flops=0.5"
    assert expected in caplog.text
    assert f"({share:.1%})" in caplog.text


def test_greg_removes_what_it_chose_even_if_the_fit_ends_before_that_is_zero(tmp_path, caplog):
    method = GReg(flops=0.5, align=1)
    with caplog.at_level(logging.WARNING, "lightning_prune"):
        model, _ = fit(
            method, tmp_path, callbacks=[EarlyStopping("val_loss", patience=1, min_delta=100.0)], max_epochs=20
        )
    assert not method.gone.any()
    assert count_flops(model, X).total <= 0.5 * count_flops(LitNet(), X).total
    assert "at zero, at 14 % of the schedule" in caplog.text  # 8 of 40 + 16 steps


def test_a_fit_that_ends_before_anything_is_decided_leaves_the_model_dense_and_says_so(tmp_path, caplog):
    for method in (IncReg(flops=0.5, align=1), GReg(2, flops=0.5, align=1)):
        caplog.clear()
        model = LitNet()
        with caplog.at_level(logging.WARNING, "lightning_prune"):
            fit(
                method, tmp_path, model, callbacks=[EarlyStopping("val_loss", stopping_threshold=100.0)], max_epochs=100
            )
        assert not plan_of(model)
        assert "the fit ended after 4 steps, before any unit was done; nothing was compressed" in caplog.text


@pytest.mark.parametrize("name", METHODS)
def test_a_fit_resumed_in_mid_growth_equals_an_unbroken_one_bit_for_bit(name, tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    start, methods = LitNet(optimizer="Adam", lr=0.01), [METHODS[name](flops=0.5, align=1) for _ in range(4)]
    once, whole = fit(methods[0], tmp_path, copy.deepcopy(start), callbacks=[Save()], max_epochs=8)
    for method, epoch in zip(methods[1:], (0, 2, 5), strict=True):
        saved = torch.load(tmp_path / f"{epoch}.ckpt", weights_only=True)
        assert all(state["growth"]["updates"] == 4 * (epoch + 1) for state in saved["callbacks"].values())
        again, watch = LitNet(optimizer="Adam", lr=0.01), Watch(method)
        run = trainer(tmp_path, callbacks=[method, watch], max_epochs=8)
        run.fit(again, loader(), loader(32, seed=1), ckpt_path=tmp_path / f"{epoch}.ckpt")
        for kind in ("values", "gone"):
            expected, found = (getattr(w, kind)[-len(watch.values) :] for w in (whole, watch))
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters(), strict=True))
        assert np.array_equal(method.history(), methods[0].history(), equal_nan=True)
        assert method.plan == methods[0].plan


def test_a_checkpoint_of_other_units_is_refused(tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "some.ckpt")

    fit(IncReg(flops=0.5, align=1), tmp_path, callbacks=[Save()], max_epochs=2)
    stored = torch.load(tmp_path / "some.ckpt", weights_only=True)
    for state in stored["callbacks"].values():
        state["growth"]["values"] = torch.zeros(70)
    torch.save(stored, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="a model with 70 units, this one has 72"):
        trainer(tmp_path, callbacks=[IncReg(flops=0.5, align=1)], max_epochs=3).fit(
            LitNet(), loader(), ckpt_path=tmp_path / "other.ckpt"
        )


# What is told -------------------------------------------------------------------------------------------------------------------


def test_the_log_tells_sizes_quantiles_and_the_share_that_is_gone(tmp_path):
    method = IncReg(sparsity=0.5, align=1)
    _, watch = fit(method, tmp_path, max_epochs=6, logger=CSVLogger(tmp_path, "csv"))
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("compression/growth/units_gone")]
    assert len(rows) == 6
    for epoch, row in enumerate(rows, 1):
        values, gone = watch.values[4 * epoch], watch.gone[4 * epoch]
        assert float(row["compression/growth/units_gone"]) == pytest.approx(float(gone.float().mean()))
        assert float(row["compression/masked/units"]) == pytest.approx(float(gone.float().mean()))
        for name, q in (("median", 0.5), ("90", 0.9), ("max", 1.0)):
            expected = float(values[~gone].quantile(q))
            assert float(row[f"compression/growth/value_{name}"]) == pytest.approx(expected, rel=1e-5)
    assert float(rows[-1]["compression/growth/leaving_size"]) == 0 < float(rows[-1]["compression/growth/kept_size"])


def test_the_history_is_sampled_and_ends_with_leaving_units_at_zero(tmp_path):
    method = GReg(sparsity=0.5, align=1)
    fit(method, tmp_path, max_epochs=51)
    history = method.history()
    assert len(history) == 102  # every second of 204 steps
    assert history[-1, 0] == 204
    assert history[-1, 2] == 0 < history[10, 2] < history[0, 2]
    assert (np.diff(history[:51, 3:6].max(1)) >= 0).all()  # the penalty only grows
    assert method.picture().startswith(b"\x89PNG")
    assert GReg(sparsity=0.5).picture() is None


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_before_and_after_the_removal_is_told_and_where_norms_stay_it_is_the_same(name, tmp_path):
    class Masked(Callback):
        def on_train_end(self, trainer, module):
            self.net = copy.deepcopy(module.net).eval()

    def by_hand(net):
        with torch.no_grad():
            return np.mean([float(nn.functional.cross_entropy(net.eval()(x), y)) for x, y in loader()])

    method, masked = METHODS[name](sparsity=0.5, align=1, recalibrate_bn=0), Masked()
    model, _ = fit(method, tmp_path, callbacks=[masked], max_epochs=6, logger=CSVLogger(tmp_path, "csv"))
    before, after = method.losses
    assert before == pytest.approx(by_hand(masked.net), rel=1e-5)
    assert after == pytest.approx(by_hand(model.net), rel=1e-5)
    assert after == pytest.approx(before, rel=1e-4)
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("compression/removal/loss_after")]
    assert [float(rows[0][f"compression/removal/loss_{when}"]) for when in ("before", "after")] == [before, after]
    assert f"was {before:.4g} before the removal" in method.exhibits()[0].text
    x, y = Points(32, 1).x, Points(32, 1).y
    judged = [float((net.eval()(x).argmax(1) == y).float().mean()) for net in (masked.net, model.net)]
    assert method.validated["val_acc"] == pytest.approx(judged)
    assert [float(rows[0][f"compression/removal/val_acc_{when}"]) for when in ("before", "after")] == pytest.approx(
        judged
    )


def test_with_manual_optimization_no_loss_is_told_because_its_training_step_would_train(tmp_path):
    class Manual(LitNet):
        automatic_optimization, calls = False, 0

        def training_step(self, batch, batch_idx):
            self.calls += 1
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    method, model = IncReg(sparsity=0.5, align=1), Manual()
    fit(method, tmp_path, model, max_epochs=6)
    assert np.isnan(method.losses).all()
    assert model.calls == 24


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [*METHODS, "SPP"])
def test_on_the_digits_removal_changes_the_accuracy_by_at_most_a_fifth_of_a_point(name, tmp_path):
    from lightning_prune.demo import DigitsData, DigitsNet

    def accuracy(net):
        hits = [(net(x).argmax(1) == y).float() for x, y in data.val_dataloader()]
        return float(torch.cat(hits).mean())

    class Masked(Callback):
        def on_train_end(self, trainer, module):
            self.accuracy = accuracy(copy.deepcopy(module).eval())

    data, model = DigitsData(batch_size=64, size=16), DigitsNet(width=16, size=16)
    trainer(tmp_path, max_epochs=4).fit(model, datamodule=data)
    method, masked = (METHODS | {"SPP": SPP})[name](flops=0.5, align=1), Masked()
    trainer(tmp_path, callbacks=[method, masked], max_epochs=8).fit(model, datamodule=data)
    with torch.no_grad():
        after = accuracy(model.eval())
    print(f"{name}: {masked.accuracy:.4f} before the removal, {after:.4f} after it; losses {method.losses}")
    assert abs(after - masked.accuracy) <= 0.002 + 1e-6
    assert after > 0.9


# Options and what is said before training ---------------------------------------------------------------------------------------


def started(method, tmp_path, model=None, **options):
    trainer(tmp_path, callbacks=[method], **options).fit(model or LitNet(), loader())


@pytest.mark.parametrize("kind", [IncReg, GReg])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_learning_rate_that_makes_the_penalty_unstable_is_an_error_before_training(kind, optimizer, tmp_path):
    model = LitNet(optimizer=optimizer, lr=0.5)
    before = copy.deepcopy(model.state_dict())
    limit = {"SGD": "7.6", "Adam": "2"}[optimizer]
    with pytest.raises(
        OptionError,
        match=rf"ceiling=8.0.*learning rate of 0.5 in {optimizer} weights follow penalties below {limit} only",
    ):
        started(kind(sparsity=0.5, ceiling=8.0), tmp_path, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [IncReg, GReg])
@pytest.mark.parametrize("ceiling", [None, 1.0])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_planned_learning_rate_of_0_is_an_error_that_says_so(kind, ceiling, optimizer, tmp_path):
    with pytest.raises(TrainerError, match="planned learning rate is 0, so that no penalty acts"):
        started(kind(sparsity=0.5, ceiling=ceiling), tmp_path, LitNet(optimizer=optimizer, lr=0.0), max_epochs=2)


def test_the_rate_that_counts_is_the_largest_planned_one(tmp_path):
    class Warm(LitNet):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 + 99 * (epoch == 1))]

    with pytest.raises(OptionError, match="learning rate of 1 in SGD"):
        started(IncReg(sparsity=0.5, ceiling=3.0), tmp_path, Warm(), max_epochs=3)
    started(IncReg(sparsity=0.5, ceiling=3.0), tmp_path, Warm(), max_epochs=1)


def test_clipping_under_sgd_is_warned_of_and_under_others_is_not(tmp_path, caplog):
    for optimizer, told in (("SGD", True), ("AdamW", False)):
        caplog.clear()
        started(IncReg(sparsity=0.5, align=1), tmp_path, LitNet(optimizer=optimizer), gradient_clip_val=1.0)
        assert ("gradient_clip_val=1.0 clips" in caplog.text) == told


def test_penalties_that_are_too_weak_for_the_planned_steps_are_warned_of(tmp_path, caplog):
    started(GReg(sparsity=0.5, align=1), tmp_path, max_epochs=2)
    assert "shrink weights to" in caplog.text
    caplog.clear()
    started(GReg(sparsity=0.5, align=1), tmp_path, Plain(), max_epochs=20)
    assert "shrink weights to" not in caplog.text


@pytest.mark.parametrize("kind", [IncReg, GReg])
def test_a_fast_dev_run_with_numbers_for_a_long_fit_ends_with_a_small_model(kind, tmp_path):
    model = LitNet()
    started(kind(sparsity=0.5, align=1, ceiling=0.4, strength=1e-3), tmp_path, model, fast_dev_run=2)
    assert [model.net[layer].weight.shape[0] for layer in LAYERS] == [8, 12, 16]


@pytest.mark.parametrize("kind", [IncReg, GReg])
def test_data_of_unknown_length_needs_a_number_of_steps(kind, tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([loader().dataset[i] for i in range(64)])

    data = torch.utils.data.DataLoader(Stream(), batch_size=16)
    with pytest.raises(TrainerError, match="Give max_steps"):
        trainer(tmp_path, callbacks=[kind(sparsity=0.5, align=1)], max_epochs=2).fit(LitNet(), data)
    model = LitNet()
    trainer(tmp_path, callbacks=[kind(sparsity=0.5, align=1)], max_steps=8).fit(model, data)
    assert plan_of(model)


def test_frozen_layers_keep_their_channels_and_explain_why(tmp_path):
    model = LitNet()
    model.net[0].requires_grad_(False)
    method = GReg(sparsity=0.5, align=1)
    fit(method, tmp_path, model, max_epochs=1)
    assert [model.net[layer].weight.shape[0] for layer in LAYERS] == [16, 12, 16]
    assert "no weight that trains writes it" in method.plan.left_alone["net.0"]


class Partly(LitNet):
    """Leaves a layer out of its optimizer that is not frozen."""

    def configure_optimizers(self):
        return torch.optim.SGD([p for i, layer in enumerate(self.net) if i != 3 for p in layer.parameters()], 0.05)


@pytest.mark.parametrize("kind", [IncReg, GReg, SPP])
def test_layers_that_no_optimizer_holds_are_named_before_training_and_may_be_left_alone(kind, tmp_path):
    with pytest.raises(TrainerError, match=r"no optimizer holds the weights of 'net\.3'.*exclude=\['net\.3'\]"):
        started(kind(sparsity=0.5, align=1), tmp_path, Partly(), max_epochs=4)
    for options in ({"sparsity": 0.5, "exclude": ["net.3"]}, {"sparsity": {"net.0": 0.5, "net.8": 0.5}}):
        model = Partly()
        started(kind(align=1, **options), tmp_path, model, max_epochs=16)
        assert [model.net[layer].weight.shape[0] for layer in LAYERS] == [8, 24, 16]


@pytest.mark.parametrize("kind", [IncReg, GReg, SPP])
@pytest.mark.parametrize("start", [2, 5])
def test_a_fit_that_ends_before_start_epoch_is_an_error_with_the_remedy(kind, start, tmp_path):
    with pytest.raises(
        TrainerError, match=rf"start_epoch={start}\): the fit ends before that epoch.*Lower start_epoch"
    ):
        started(kind(sparsity=0.5, start_epoch=start), tmp_path, max_epochs=2)


@pytest.mark.parametrize("kind", [IncReg, SPP])
def test_the_number_of_updates_is_told(kind, tmp_path, caplog):
    caplog.set_level(logging.INFO, "lightning_prune")
    method = kind(sparsity=0.5, align=1, **({"every_n_steps": 2} if kind is SPP else {}))
    _, watch = fit(method, tmp_path, max_epochs=16)
    counts = [int(gone.sum()) for gone in watch.gone]
    every = 2 if kind is SPP else 1
    expected = counts.index(counts[-1]) // every  # entry k is seen after k steps
    assert f"was updated {expected} times in 64 steps" in caplog.text
    assert f"updated {expected} times" in method.exhibits()[0].text
    assert 0 < expected < 64 // every


def test_columns_that_no_optimizer_holds_are_named_before_training(tmp_path):
    with pytest.raises(TrainerError, match=r"no optimizer holds the weights of 'net\.3'"):
        started(IncReg(sparsity=0.5, units="columns"), tmp_path, Partly(), max_epochs=4)


@pytest.mark.parametrize("kind", [IncReg, GReg])
def test_no_candidates_and_bounds_that_bind_are_errors_before_training(kind):
    model = LitNet()
    with pytest.raises(ModelError, match="would change nothing"):
        rehearse(model, [kind(sparsity=0.5, include="net.10")])
    with pytest.raises(BudgetError, match="at most"):
        rehearse(model, [kind(flops=1000)])
    with pytest.raises(OptionError, match=r"'net\.99' matches no group"):
        rehearse(model, [kind(flops=0.5, ratios={"net.99": 1.0})])


@pytest.mark.parametrize("kind", [IncReg, GReg])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of flops, params, sparsity"),
        ({"flops": 0.5, "params": 0.5}, "exactly one"),
        ({"flops": 1.5}, "flops=1.5"),
        ({"flops": 0.5, "ratios": "even"}, "ratios='even'"),
        ({"flops": 0.5, "ratios": {}}, "ratios={}"),
        ({"flops": 0.5, "ratios": {"net.0": -1}}, "numbers above 0"),
        ({"sparsity": {"net.0": 0.5}, "ratios": "pca"}, "drop one of them"),
        ({"flops": 0.5, "ceiling": 0.0}, "ceiling=0.0"),
        ({"flops": 0.5, "ceiling": True}, "ceiling=True"),
        ({"flops": 0.5, "strength": "weak"}, "strength='weak'"),
        ({"flops": 0.5, "norms": 1}, "norms=1"),
        ({"flops": 0.5, "start_epoch": -1}, "start_epoch=-1"),
        ({"flops": 0.5, "align": 0}, "align=0"),
    ],
)
def test_bad_options_raise_at_construction(kind, options, message):
    with pytest.raises(OptionError, match=message):
        kind(**options)


def test_without_a_trainer_they_refuse():
    for method in (IncReg(flops=0.5), GReg(flops=0.5)):
        with pytest.raises(OptionError, match="acts while a model trains"):
            compress(nn.Linear(3, 3), method, torch.zeros(1, 3))
