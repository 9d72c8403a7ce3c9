"""The probe: what it answers, and that the model never knows it was asked."""

import copy

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from lit import LitNet, Points, loader
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune.errors import ModelError
from lightning_prune.probe import Probe


class Metered(LitNet):
    """Keeps a metric and draws random numbers in its training step."""

    def __init__(self, **options):
        super().__init__(dropout=0.5, **options)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=4)

    def training_step(self, batch, batch_idx):
        logits = self(batch[0] + 0.01 * torch.randn_like(batch[0]))
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        return nn.functional.cross_entropy(logits, batch[1])


def probe(model, data=None):
    return Probe(model, loader() if data is None else data, model.training_step)


def portrait(model):
    """Return everything of a model that a question might change."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    hooks = {
        (name, key): len(m.__dict__[key])
        for name, m in model.named_modules()
        for key in m.__dict__
        if key.endswith("_hooks")
    }
    metrics = {
        k: copy.deepcopy(v)
        for m in model.modules()
        if isinstance(m, torchmetrics.Metric)
        for k, v in m.metric_state.items()
    }
    return tensors, grads, modes, hooks, metrics, torch.get_rng_state(), set(model.__dict__)


def assert_same(before, after):
    for one, other in zip(before, after, strict=True):
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            for key, value in one.items():
                assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        else:
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("training", [True, False])
def test_losses_gradients_and_example_calls_leave_no_trace(training):
    model = Metered(example=False).train(training)
    model.net[0].weight.grad = torch.ones_like(model.net[0].weight)
    asked = probe(model)
    before = portrait(model)
    assert asked.example_calls()[0].module == ""
    with asked.quiet():
        for index, batch in enumerate(asked.batches(2)):
            asked.loss(batch, index).backward()
    assert_same(before, portrait(model))


def test_no_trace_is_left_when_the_step_raises():
    class Broken(Metered):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("mid step")

    model = Broken(example=False)
    before = portrait(model)
    with pytest.raises(RuntimeError, match="mid step"):
        probe(model).example_calls()
    assert_same(before, portrait(model))


def test_training_sees_the_order_of_data_that_it_would_have_seen():
    generator = torch.Generator().manual_seed(5)
    data = DataLoader(Points(), batch_size=16, shuffle=True, generator=generator)
    expected = generator.get_state()
    asked = probe(Metered(), data)
    with asked.quiet():
        assert len(list(asked.batches(3))) == 3
    assert torch.equal(generator.get_state(), expected)


def test_recalibration_is_the_mean_over_batches_and_changes_nothing_else():
    model = LitNet(dropout=0.3)
    asked = probe(model)
    before = portrait(model)
    assert asked.recalibrate(4) == 2
    after = portrait(model)
    batches = [batch[0] for batch in DataLoader(Points(), batch_size=16, sampler=loader().sampler)]
    outputs = [model.net[0](x) for x in batches]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    var = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(model.net[1].running_mean, mean.detach())
    torch.testing.assert_close(model.net[1].running_var, var.detach())
    changed = {name for name, value in before[0].items() if not torch.equal(value, after[0][name])}
    assert changed == {
        f"net.{n}.{key}" for n in (1, 4) for key in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert_same(before[1:], after[1:])  # gradients, modes, hooks, metrics, random state, attributes
    assert model.net[1].momentum == 0.1


def test_frozen_normalization_keeps_its_statistics():
    model = LitNet().train()
    model.net[1].eval()
    kept = model.net[1].running_mean.clone()
    assert probe(model).recalibrate(2) == 1
    assert torch.equal(model.net[1].running_mean, kept)


def test_example_calls_are_the_outermost_modules_that_hold_parameters():
    class Parts(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Sequential(nn.Linear(64, 8), nn.ReLU()), nn.Linear(8, 4)
            self.loss = nn.CrossEntropyLoss()

        def training_step(self, batch, batch_idx):
            return self.loss(self.b(self.a(batch[0].flatten(1))), batch[1])

    calls = probe(Parts()).example_calls()
    assert [call.module for call in calls] == ["a", "b"]
    assert calls[1].args[0].shape == (16, 8)


def test_questions_without_an_answer_say_what_to_set():
    model = LitNet(example=False)
    model.automatic_optimization = False
    with pytest.raises(ModelError, match=r"manual optimization.*example_input_array"):
        probe(model).example_calls()
    with pytest.raises(ModelError, match="needs data"):
        next(Probe.of_data(LitNet(), None, None).batches(1))
    nothing = Probe(LitNet(), loader(), lambda batch, index: None)
    with pytest.raises(ModelError, match="scalar loss; the training step returned NoneType"):
        nothing.loss(None)
