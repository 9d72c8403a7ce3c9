"""What our callbacks add to a training step of ResNet-18, 64 pixels, batch 64; run with ``-m benchmark -s``.

A fit of 22 steps in which every hook of the callback is timed; the rest of the step is what it is compared with, in the same run. Times are CPU
times, since others may use the machine. Projections fall
on steps 0 and 20, so the share of TRP is that of one projection over 20 steps, plus what its other hooks take. Masks are held after every step.
"""

import statistics
import time

import pytest
import pytorch_lightning as pl
import torch
from lit import trainer
from networks import resnet18
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import TRP, Magnitude
from lightning_prune.callback import Compression

HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_stepped")
STEPS = 22


class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = resnet18(10)
        self.example_input_array = torch.zeros(1, 3, 64, 64)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Bare(Compression):
    """A gradual method that does nothing: what remains is the base callback's own work."""

    gradual = True

    def claim(self, model):
        return set()


class Clock(pl.Callback):
    """Times whole steps."""

    def __init__(self):
        self.starts = []

    def on_train_batch_start(self, *_):
        self.starts.append(time.process_time())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx + 1 == STEPS


def timed(callback):
    """Have every hook of ``callback`` note its seconds in ``callback.spent``, one entry per call."""
    callback.spent = {name: [] for name in HOOKS}

    def clocked(hook, note):
        def run(*args, **kwargs):
            start = time.process_time()
            hook(*args, **kwargs)
            note.append(time.process_time() - start)

        return run

    for name in HOOKS:
        setattr(callback, name, clocked(getattr(callback, name), callback.spent[name]))
    return callback


def share(callback, folder, monkeypatch, planned=1, average=statistics.mean):
    """Return seconds that the callback takes per step and seconds of the rest of a step, of a fit planned for so many epochs of 22 steps."""
    monkeypatch.setattr(Compression, "_close", lambda *_: None)  # the end of the fit is no step
    clock = Clock()
    data = TensorDataset(torch.randn(64 * STEPS, 3, 64, 64), torch.randint(0, 10, (64 * STEPS,)))
    trainer(folder, callbacks=[clock, timed(callback)], max_epochs=planned).fit(Lit(), DataLoader(data, batch_size=64))
    steps = [later - earlier for earlier, later in zip(clock.starts, clock.starts[1:], strict=False)]
    own = [
        sum(times)
        for times in zip(*(callback.spent[name][: len(steps)] for name in HOOKS if callback.spent[name]), strict=False)
    ]
    rest = statistics.median(step - mine for step, mine in zip(steps, own, strict=False))
    window = own[1:21]  # the second projection with the steps that it serves
    return average(window), rest


@pytest.mark.benchmark
def test_the_bare_callback_adds_at_most_one_percent(tmp_path, monkeypatch):
    own, rest = share(Bare(), tmp_path, monkeypatch)
    print(f"bare callback: {own * 1e6:.0f} us per step of {rest:.3f} s: {own / rest:.4%}")
    assert own / rest <= 0.01


@pytest.mark.benchmark
@pytest.mark.parametrize(("nuclear", "limit"), [(0.0, 0.05), (3e-4, 0.10)])  # the penalty also acts in every step
def test_trp_every_20_steps_adds_at_most(nuclear, limit, tmp_path, monkeypatch):
    method = TRP(energy=0.02, every_n_steps=20, nuclear=nuclear)
    own, rest = share(method, tmp_path, monkeypatch)
    print(f"TRP, nuclear={nuclear}: {own * 1e3:.1f} ms per step of {rest:.3f} s: {own / rest:.2%}")
    for name, times in method.spent.items():
        print(f"  {name}: largest {max(times, default=0):.4f} s, median {statistics.median(times or [0]):.6f} s")
    assert own / rest <= limit


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4),
}  # those of Adam keep two moments, SGD one


@pytest.mark.benchmark
@pytest.mark.parametrize(("optimizer", "limit"), [("SGD", 0.02), ("Adam", 0.03)])
def test_masks_of_channels_add_at_most(optimizer, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(Lit, "configure_optimizers", lambda self: OPTIMIZERS[optimizer](self.parameters()))
    method = Magnitude(structured=True, flops=0.5, until_epoch=0)
    own, rest = share(method, tmp_path, monkeypatch)
    print(f"masks of half the FLOPs, {optimizer}: {own * 1e3:.1f} ms per step of {rest:.3f} s: {own / rest:.2%}")
    assert own / rest <= limit


@pytest.mark.benchmark
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_masks_of_single_weights_add_at_most(optimizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Lit, "configure_optimizers", lambda self: OPTIMIZERS[optimizer](self.parameters()))
    method = Magnitude(sparsity=0.9, until_epoch=0)
    own, rest = share(method, tmp_path, monkeypatch)
    print(f"masks of 90 % of the weights, {optimizer}: {own * 1e3:.1f} ms per step of {rest:.3f} s: {own / rest:.2%}")
    assert own / rest <= 0.03
