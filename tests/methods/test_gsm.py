"""GSM: the update against a naive twin and a closed recursion, the forecast against what a fit does, the cut."""

import copy
import logging
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lit import LitNet, loader, trainer
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.callback import compress
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.methods.gsm import ENOUGH, GSM, decay_per_step, mask_gradients_, mean_loss, passive_entries
from lightning_prune.methods.synflow import SynFlow
from lightning_prune.probe import Probe


class LitSGD(LitNet):
    """The tests' network under SGD as GSM wants it, with a scheduler where one is set."""

    schedule = None

    def __init__(self, lr=0.05, momentum=0.9, decay=1e-2, nesterov=False, kind="SGD", norm=False):
        super().__init__(norm=norm)
        self.settings = {"lr": lr, "momentum": momentum, "weight_decay": decay, "nesterov": nesterov}
        self.kind = kind

    def configure_optimizers(self):
        if self.kind != "SGD":
            return getattr(torch.optim, self.kind)(self.parameters(), lr=1e-3, weight_decay=1e-2)
        optimizer = torch.optim.SGD(self.parameters(), **self.settings)
        return (
            optimizer if self.schedule is None else {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}
        )


class End(Callback):
    """Keeps the weights before the cut, and the learning rate of every step."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, module, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self, trainer, module):
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.momentum = trainer.optimizers[0].state_dict()["state"]


def fit(method, tmp_path, model, end=None, **options):
    trainer(tmp_path, callbacks=[*([method] if method else []), *([end] if end else [])], **options).fit(
        model, loader()
    )
    return model


def kernels(model):
    return {name: p for name, p in model.named_parameters() if p.ndim in (2, 4)}


def twin(model, batches, ratio, lr, momentum, decay):
    """The paper's update, written out: every step, one list of all |w g|, its Q-th largest, Z and w by hand."""
    parameters = dict(model.named_parameters())
    z = {name: torch.zeros_like(p) for name, p in parameters.items()}
    total = sum(p.numel() for p in kernels(model).values())
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x.double()), y)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        values = np.concatenate([(p * gradients[n]).detach().abs().numpy().ravel() for n, p in kernels(model).items()])
        limit = np.sort(values)[::-1][total - round((1 - ratio) * total) - 1]
        for name, p in parameters.items():
            active = (p * gradients[name]).abs() >= limit if p.ndim > 1 else torch.ones_like(p)
            z[name] = momentum * z[name] + decay * p.detach() + active * gradients[name]
            p.data -= lr * z[name]
    return {name: p.detach() for name, p in parameters.items()}


# The update ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_a_fit_is_the_papers_formula_written_out(ratio, tmp_path):
    model, end = LitSGD().double(), End()
    model.example_input_array = None
    expected = twin(copy.deepcopy(model.net), [b for _ in range(3) for b in loader_batches(_)], ratio, 0.05, 0.9, 1e-2)
    fit(GSM(ratio=ratio, remove_dead=False), tmp_path, model, end, max_epochs=3, precision="64-true")
    for name, value in expected.items():
        torch.testing.assert_close(end.weights[f"net.{name}"], value, rtol=1e-9, atol=1e-12)


def loader_batches(epoch):
    data = loader()
    data.sampler.set_epoch(epoch)
    return list(data)


def test_passive_entries_are_those_below_the_qth_largest_of_all_tensors():
    weights, gradients = ([torch.randn(4, 5), torch.randn(3, 2, 3, 3), torch.randn(7)] for _ in range(2))
    values = torch.cat([(w * g).abs().flatten() for w, g in zip(weights, gradients, strict=True)])
    for active in (1, 13, 80, 81):
        passive = torch.cat([p.flatten() for p in passive_entries(weights, gradients, active)])
        assert int((~passive).sum()) == active  # no ties here
        assert set(values.topk(active).indices.tolist()) == set((~passive).nonzero().flatten().tolist())


def test_ties_at_the_threshold_are_active():
    (passive,) = passive_entries([torch.ones(6)], [torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0, 0.0])], 2)
    assert passive.tolist() == [False, False, False, False, True, True]


def test_all_are_active_if_fewer_than_q_have_a_product_above_zero():
    (passive,) = passive_entries([torch.ones(4)], [torch.tensor([1.0, 0.0, 0.0, 0.0])], 2)
    assert not passive.any()


def test_a_gradient_that_is_not_finite_is_not_hidden():
    for bad in (math.nan, math.inf):
        weight = nn.Parameter(torch.ones(4))
        weight.grad = torch.tensor([bad, 3.0, 2.0, 1.0])
        mask_gradients_([weight], 1)
        assert not weight.grad[0].isfinite()


def test_half_precision_products_do_not_underflow():
    weight, gradient = torch.full((3,), 1e-4).half(), torch.tensor([1e-5, 2e-5, 3e-5]).half()
    (passive,) = passive_entries([weight], [gradient], 1)
    assert passive.tolist() == [True, True, False]


def test_tensors_without_a_gradient_count_as_passive():
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    first.grad = torch.tensor([1.0, 2.0, 3.0])
    mask_gradients_([first, second], 2)
    assert first.grad.tolist() == [0.0, 2.0, 3.0]
    assert second.grad is None


def test_a_passive_weight_follows_the_closed_recursion_and_an_active_one_does_not(tmp_path):
    rate, beta, eta, steps = 0.1, 0.9, 0.02, 16

    class Line(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1, bias=False, dtype=torch.float64)
            self.layer.weight.data = torch.tensor([[1.0, 0.5]], dtype=torch.float64)

        def training_step(self, batch, index):
            return (self.layer(batch[0]) - 3).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), rate, beta, weight_decay=eta)

    data = DataLoader(TensorDataset(torch.tensor([[1.0, 0.01]], dtype=torch.float64).repeat(steps, 1)), 1)
    found = []
    for method in (GSM(sparsity=0.5, remove_dead=False), None):
        model, end = Line(), End()
        callbacks = [end] if method is None else [method, end]
        trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(model, data)
        found.append(end.weights["layer.weight"][0])
    step = np.array([[beta, eta], [-rate * beta, 1 - rate * eta]])  # (v, w) after, from (v, w) before
    expected = (np.linalg.matrix_power(step, steps) @ [0.0, 0.5])[1]
    assert float(found[0][1]) == pytest.approx(expected, rel=1e-12)
    assert float(found[1][1]) != pytest.approx(expected, rel=1e-3)  # plain SGD moves it


@pytest.mark.parametrize(
    ("rate", "beta", "eta", "steps"), [(5e-3, 0.98, 1e-4, 276e3), (5e-3, 0.9, 1e-4, 1381e3), (1e-2, 0.99, 5e-4, 13.1e3)]
)
def test_steps_to_a_thousandth_are_those_of_the_slow_eigenvalue(rate, beta, eta, steps):
    slow = max(np.linalg.eigvals([[beta, eta], [-rate * beta, 1 - rate * eta]]).real)
    needed = ENOUGH / decay_per_step(rate, eta, beta)
    assert needed == pytest.approx(-ENOUGH / math.log(slow), rel=0.06)
    assert needed == pytest.approx(steps, rel=0.06)


@pytest.mark.parametrize("nesterov", [False, True])
def test_ratio_1_is_sgd_bit_for_bit(nesterov, tmp_path):
    plain, ours = End(), End()
    start = LitSGD(nesterov=nesterov)
    fit(None, tmp_path, copy.deepcopy(start), plain)
    fit(GSM(ratio=1), tmp_path, copy.deepcopy(start), ours)
    assert all(torch.equal(value, ours.weights[name]) for name, value in plain.weights.items())


def test_with_every_weight_active_gradients_stay_bit_for_bit():
    weights = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    before = [weight.grad.clone() for weight in weights]
    mask_gradients_(weights, 17)
    assert all(torch.equal(weight.grad, gradient) for weight, gradient in zip(weights, before, strict=True))
    mask_gradients_(weights, 16)
    assert sum(int((weight.grad == 0).sum()) for weight in weights) == 1


class Gradients(Callback):
    """Records the gradients that the optimizer gets; stands behind GSM, or before it."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append({name: p.grad.clone() for name, p in module.named_parameters()})


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}])
def test_one_dimensional_parameters_keep_their_gradients_and_q_kernels_theirs(options, tmp_path):
    before, after, model = Gradients(), Gradients(), LitSGD(norm=True)
    total = sum(p.numel() for p in kernels(model).values())
    names = set(kernels(model))
    trainer(tmp_path, callbacks=[before, GSM(sparsity=0.9, remove_dead=False), after], **options).fit(model, loader())
    for old, new in zip(before.seen, after.seen, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old if name not in names)
        assert all(torch.equal(new[name], old[name] * (new[name] != 0)) for name in names)
        moved = sum(int((new[name] != 0).sum()) for name in names)
        assert moved <= total - round(0.9 * total)
        assert moved > 0.9 * (total - round(0.9 * total))  # some of the active ones have a gradient of zero


def test_clipping_sees_the_masked_gradient(tmp_path):
    class Clipped(LitSGD):
        norms = ()

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            norm = torch.stack([p.grad.norm() for p in self.parameters()]).norm()
            zeros = sum(int((p.grad == 0).sum()) for p in kernels(self).values())
            self.norms = (*self.norms, (float(norm), zeros))
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")

    model = Clipped()
    total = sum(p.numel() for p in kernels(model).values())
    fit(GSM(sparsity=0.9, remove_dead=False), tmp_path, model, max_epochs=1)
    assert all(zeros >= round(0.9 * total) for _, zeros in model.norms)


def test_start_epoch_leaves_the_gradients_before_it_alone(tmp_path):
    after, model = Gradients(), LitSGD()
    names = list(kernels(model))
    trainer(tmp_path, callbacks=[GSM(sparsity=0.99, start_epoch=1, remove_dead=False), after]).fit(model, loader())
    zeros = [sum(int((step[name] == 0).sum()) for name in names) for step in after.seen]
    assert max(zeros[:4]) < 0.9 * max(zeros) <= min(zeros[4:])


def test_layers_that_are_excluded_train_as_ever(tmp_path):
    before, after = Gradients(), Gradients()
    trainer(
        tmp_path, callbacks=[before, GSM(sparsity=0.9, remove_dead=False, exclude="net.8"), after], max_epochs=1
    ).fit(LitSGD(), loader())
    for old, new in zip(before.seen, after.seen, strict=True):
        assert torch.equal(old["net.8.weight"], new["net.8.weight"])
        assert not torch.equal(old["net.3.weight"], new["net.3.weight"])


# The cut ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"sparsity": 0.9}, {"ratio": 0.1}, {"ratio": 1 / 60}])
def test_the_cut_keeps_exactly_the_largest(options, tmp_path):
    model, end, method = LitSGD(), End(), GSM(**options, remove_dead=False)
    fit(method, tmp_path, model, end)
    names = list(kernels(model))
    trained = torch.cat([end.weights[name].flatten() for name in names])
    left = torch.cat([p.detach().flatten() for p in kernels(model).values()])
    stay = trained.numel() - round(options.get("sparsity", 1 - options.get("ratio", 0)) * trained.numel())
    assert int((left != 0).sum()) == stay
    assert set(left.nonzero().flatten().tolist()) == set(trained.abs().topk(stay).indices.tolist())
    assert torch.equal(left[left != 0], trained[left != 0])
    assert method.plan.stages[-1].options["ratio"] == options.get("ratio")


def test_units_that_die_of_the_cut_leave(tmp_path):
    model, end, method = LitSGD(), End(), GSM(sparsity=0.97)
    fit(method, tmp_path, model, end)
    assert sum(p.numel() for p in model.parameters()) < sum(w.numel() for w in end.weights.values())
    cut = LitSGD()
    cut.load_state_dict(end.weights)
    masks = {step.key: step.mask for step in method.plan.steps if step.action == "mask"}
    for name, parameter in kernels(cut).items():
        parameter.data *= masks[name]
    x = loader().dataset.x
    torch.testing.assert_close(model.eval()(x), cut.eval()(x), rtol=1e-4, atol=1e-5)


def test_nothing_is_held_at_zero_while_training(tmp_path):
    model, end = LitSGD(), End()
    fit(GSM(sparsity=0.9, remove_dead=False), tmp_path, model, end)
    assert all(bool((end.weights[name] != 0).all()) for name in kernels(LitSGD()))


def test_the_loss_of_the_cut_vanishes_as_the_forecast_grows(tmp_path):
    class Facts(Callback):
        def on_train_epoch_end(self, trainer, module):
            self.told = trainer.callbacks[0].facts(module)

    costs, small, forecasts = [], [], []
    for epochs in (4, 16, 64):
        torch.manual_seed(0)
        method, facts = GSM(sparsity=0.9, remove_dead=False, calibration_batches=4), Facts()
        model = LitSGD(lr=0.05, momentum=0.95, decay=0.02)
        trainer(tmp_path, callbacks=[method, facts], max_epochs=epochs).fit(model, loader())
        costs.append(facts.told["gsm/loss_after_cut"] - facts.told["gsm/loss"])
        small.append(facts.told["gsm/small_share"])
        forecasts.append(method.forecast)
        loss = nn.functional.cross_entropy(model(loader().dataset.x), loader().dataset.y)
        assert facts.told["gsm/loss_after_cut"] == pytest.approx(
            float(loss.detach()), rel=1e-4
        )  # what it told is what the cut did
    assert forecasts == sorted(forecasts)
    assert small == sorted(small)
    assert costs[2] < 0.05 * costs[0]


def test_weights_that_an_earlier_stage_removed_count(tmp_path):
    model = LitSGD()
    model, _ = compress(
        model,
        SynFlow(0.5, rounds=2, remove_dead=False),
        model.example_input_array,
    )
    fit(GSM(sparsity=0.9, remove_dead=False), tmp_path, model)
    values = torch.cat([p.detach().flatten() for p in kernels(model).values()])
    assert int((values == 0).sum()) == round(0.9 * values.numel())


# The forecast -------------------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "constant": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
    "steps": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3], 0.1),
    "every second epoch": lambda o: {"scheduler": torch.optim.lr_scheduler.ExponentialLR(o, 0.5), "frequency": 2},
    "by step": lambda o: {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(o, 20), "interval": "step"},
    "every third step": lambda o: {"scheduler": torch.optim.lr_scheduler.ExponentialLR(o, 0.9), "interval": "step", "frequency": 3},
    "one cycle without momentum": lambda o: {
        "scheduler": torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=20, cycle_momentum=False), "interval": "step"
    },
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_forecast_is_the_sum_over_the_rates_that_the_fit_then_has(name, options, tmp_path):
    class Rates(End):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.used = [*getattr(self, "used", []), optimizer.param_groups[0]["lr"]]

    method, end = GSM(sparsity=0.5), Rates()
    model = LitSGD()
    model.schedule = SCHEDULES[name]
    fit(method, tmp_path, model, end, max_epochs=5, **options)
    assert method.forecast == pytest.approx(sum(end.used) * 1e-2 / (1 - 0.9), rel=1e-9)


def test_the_forecast_counts_from_start_epoch_on(tmp_path):
    method = GSM(sparsity=0.5, start_epoch=3)
    fit(method, tmp_path, LitSGD(), max_epochs=5)
    assert method.forecast == pytest.approx(2 * 4 * 0.05 * 1e-2 / 0.1, rel=1e-9)


def test_looking_ahead_leaves_optimizer_and_scheduler_alone(tmp_path):
    class Module(LitSGD):
        def rate(self, epoch):  # a scheduler that holds the module
            return 0.5**epoch

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)]

    start, ends = Module(), []
    for method in (None, GSM(ratio=1.0), GSM(sparsity=0.5, calibration_batches=0)):
        end = End()
        fit(method, tmp_path, copy.deepcopy(start), end, max_epochs=3)
        ends.append(end.rates)
    assert ends[0] == ends[1] == ends[2]


def test_a_module_whose_method_is_the_schedule_is_not_copied(tmp_path):
    class Module(LitSGD):
        def rate(self, epoch):
            return 0.5**epoch

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)]

        def __deepcopy__(self, memo):
            raise TypeError("this module cannot be copied")

    method = GSM(sparsity=0.5, remove_dead=False)
    fit(method, tmp_path, Module(), max_epochs=3)
    assert method.forecast == pytest.approx(4 * (1 + 0.5 + 0.25) * 0.05 * 1e-2 / 0.1)


def warnings_of(caplog, tmp_path, model, method=None, **options):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lightning_prune"):
        fit(method or GSM(sparsity=0.5), tmp_path, model, **options)
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("GSM: ")]


def test_too_few_steps_are_a_warning_and_enough_are_none(caplog, tmp_path):
    (line,) = warnings_of(caplog, tmp_path, LitSGD())
    assert "S, the sum of lr * weight_decay / (1 - momentum), is 0.04 and should be at least 6.9" in line
    assert "Train 173 times as long" in line
    assert not warnings_of(caplog, tmp_path, LitSGD(lr=0.5, decay=0.2))


def test_no_weight_decay_and_adam_are_warnings(caplog, tmp_path):
    assert "weight_decay is 0" in warnings_of(caplog, tmp_path, LitSGD(decay=0.0))[0]
    for kind in ("Adam", "AdamW"):
        (line,) = warnings_of(caplog, tmp_path, LitSGD(kind=kind))
        assert f"trained by {kind}" in line


def test_weight_decay_may_be_off_for_parameters_that_stay(caplog, tmp_path):
    class Groups(LitSGD):
        def configure_optimizers(self):
            plain = [p for p in self.parameters() if p.ndim == 1]
            groups = [{"params": list(kernels(self).values())}, {"params": plain, "weight_decay": 0.0}]
            return torch.optim.SGD(groups, **self.settings)

    assert not warnings_of(caplog, tmp_path, Groups(lr=0.5, decay=0.2))


def test_a_fit_without_an_end_has_no_forecast(caplog, tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    method = GSM(sparsity=0.5)
    trainer(tmp_path, callbacks=[method, Stop()], max_epochs=-1).fit(LitSGD(), loader())
    assert method.forecast is None


def test_a_resumed_fit_equals_an_unbroken_one_and_keeps_the_forecast(caplog, tmp_path):
    start, whole, rest = LitSGD(), End(), End()
    methods = [GSM(sparsity=0.9, remove_dead=False) for _ in range(3)]
    once = fit(methods[0], tmp_path, copy.deepcopy(start), whole, max_epochs=4)

    class Save(Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    fit(methods[1], tmp_path, copy.deepcopy(start), Save(), max_epochs=4)
    caplog.clear()
    again = LitSGD()
    trainer(tmp_path, callbacks=[methods[2], rest], max_epochs=4).fit(again, loader(), ckpt_path=tmp_path / "1.ckpt")
    assert all(torch.equal(value, rest.weights[name]) for name, value in whole.weights.items())
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters(), strict=True))
    assert methods[2].forecast == methods[0].forecast
    assert methods[2].plan == methods[0].plan
    assert not [r for r in caplog.records if "passive weights only shrink" in r.getMessage()]


def test_facts_are_logged_and_asking_leaves_training_as_it_was(tmp_path):
    start, ends = LitSGD(), [End(), End()]
    for end, batches in zip(ends, (0, 3), strict=True):
        fit(GSM(sparsity=0.9, remove_dead=False, calibration_batches=batches), tmp_path, copy.deepcopy(start), end)
    assert all(torch.equal(value, ends[1].weights[name]) for name, value in ends[0].weights.items())
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(GSM(sparsity=0.9, remove_dead=False), tmp_path, start, logger=logger)
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert all(f"compression/gsm/{fact}" in text for fact in ("small_share", "forecast", "loss", "loss_after_cut"))


@pytest.mark.parametrize("batches", [0, 1])
def test_a_diverged_training_is_told_by_a_warning_and_by_the_cut(batches, caplog, tmp_path):
    class Diverged(LitSGD):
        def on_train_batch_end(self, *_):
            with torch.no_grad():
                self.net[0].weight[0, 0, 0, 0] = math.nan

    method = GSM(sparsity=0.5, calibration_batches=batches)
    with pytest.raises(ModelError, match=r"GSM: scores of 'net.0.weight' are not finite.*diverged"):
        warnings_of(caplog, tmp_path, Diverged(), method)
    told = [r.getMessage() for r in caplog.records if "the loss after the cut cannot be told" in r.getMessage()]
    assert len(told) == batches
    assert all("'net.0.weight' are not finite" in line for line in told)


def test_the_loss_that_is_told_leaves_out_skipped_batches_and_needs_one():
    model = nn.Linear(3, 1)
    data = [torch.full((1, 3), value) for value in (1.0, 2.0, 3.0)]
    probe = Probe.of_data(model, data, lambda model, batch: None if batch[0, 0] == 2 else model(batch).sum())
    assert mean_loss(probe, 3) == pytest.approx(float(model(data[1]).detach()))  # linear: the mean of the outer two
    assert mean_loss(probe, 2) == pytest.approx(float(model(data[0]).detach()))
    with pytest.raises(ModelError, match="gave no loss"):
        mean_loss(Probe.of_data(model, data, lambda model, batch: None), 3)


# Options ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"sparsity=None, ratio=None\): give one"),
        ({"sparsity": 0.5, "ratio": 0.5}, "give one"),
        ({"ratio": 0.0}, "ratio=0.0"),
        ({"ratio": 60}, "60 times give ratio=0.01667"),
        ({"ratio": "many"}, "ratio='many'"),
        ({"ratio": True}, "ratio=True"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": 0.5, "start_epoch": -1}, "start_epoch"),
        ({"sparsity": 0.5, "calibration_batches": -1}, "calibration_batches"),
    ],
)
def test_bad_options_raise_at_construction(options, message):
    with pytest.raises(OptionError, match=message):
        GSM(**options)


def test_options_build_the_same_callback_again():
    for method in (GSM(sparsity=0.9), GSM(ratio=0.1, start_epoch=2)):
        assert GSM(**method.options()).options() == method.options()
        assert GSM(**method.options()).sparsity == method.sparsity == 0.9


def test_without_a_trainer_it_refuses():
    with pytest.raises(OptionError, match="acts while a model trains"):
        compress(nn.Linear(3, 3), GSM(sparsity=0.5), torch.zeros(1, 3))
