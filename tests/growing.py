"""Fits, networks and a method with fixed penalties that the tests of growing penalties share."""

import numpy as np
import pytorch_lightning as pl
import torch
from lit import LitNet, loader, trainer
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.callback.penalty import Penalty

LAYERS = {0: 16, 3: 24, 8: 32}  # of the tests' network: channels that can leave


class Fixed(Penalty):
    """Penalties that never change: by number of the unit, as a function of their count."""

    def __init__(self, penalties, sparsity=0.5, **options):
        super().__init__(sparsity=sparsity, align=1, **options)
        self.penalties = penalties

    def start(self):
        self.values = self.penalties(self.slices.count).to(self.values)

    def grow(self):
        pass


class Watch(Callback):
    """Notes, before every batch, penalties, what is gone and the weights; stands behind the method in the list."""

    def __init__(self, method):
        self.method, self.values, self.gone, self.weights = method, [], [], []

    def on_train_batch_start(self, trainer, module, *_):
        self.values.append(self.method.values.clone())
        self.gone.append(self.method.gone.clone())
        self.weights.append({name: p.detach().clone() for name, p in module.named_parameters()})

    def on_train_end(self, trainer, module):
        self.on_train_batch_start(trainer, module)


def fit(method, folder, model=None, data=None, callbacks=(), **options):
    """Fit and return the model and what a :class:`Watch` saw."""
    model, watch = LitNet() if model is None else model, Watch(method)
    run = trainer(folder, callbacks=[method, watch, *callbacks], **options)
    run.fit(
        model, loader() if data is None else data, **({"val_dataloaders": loader(32, seed=1)} if data is None else {})
    )
    return model, watch


def chosen(weights, quota):
    """Return, written out, which filters are the smallest: by layer, the places of as many as ``quota`` says."""
    return {
        layer: set(np.argsort(weights[f"net.{layer}.weight"].abs().flatten(1).mean(1).numpy(), kind="stable")[:count])
        for layer, count in quota.items()
    }


class Flat(LitNet):
    """The tests' network where the task has no gradient."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 0.0


class Lit(pl.LightningModule):
    """Any network and any optimizer, regression on noise."""

    def __init__(self, net, example, optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)):
        super().__init__()
        self.net, self.example_input_array, self.optimizer = net, example, optimizer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]).flatten(1), batch[1])

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def noise(model, count=32, batch_size=8, seed=0):
    """Return a loader of random inputs and targets that fit a :class:`Lit`."""
    generator = torch.Generator().manual_seed(seed)
    example = model.example_input_array
    x = torch.randn(count, *example.shape[1:], generator=generator, dtype=example.dtype)
    with torch.no_grad():
        outputs = model.eval()(example).flatten(1).shape[1]
    model.train()
    return DataLoader(
        TensorDataset(x, torch.randn(count, outputs, generator=generator, dtype=example.dtype)), batch_size
    )
