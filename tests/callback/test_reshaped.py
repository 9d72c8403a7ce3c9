"""Channels removed in a fit: parameters stay the same objects, and what belongs to their old shapes goes."""

import logging

import torch
from cuts import both, inputs, keep, outputs
from lit import LitNet, loader, trainer

from lightning_prune.callback import Compression
from lightning_prune.checkpoint import load_from_checkpoint
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.plan import Plan


class HalfChannels(Compression):
    """Keeps every second channel of the first convolution and every second hidden unit."""

    def claim(self, model):
        return {"net.0", "net.3", "net.8", "net.10"}

    def decide(self, task, scores):
        net = task.model.net
        first, hidden = keep(16, *range(0, 16, 2)), keep(32, *range(0, 32, 2))
        into = keep(net[8].in_features)
        steps = [outputs("net.0", net[0], first), outputs("net.1", net[1], first), inputs("net.3", net[3], first)]
        return Plan((*steps, both("net.8", net[8], hidden, into), inputs("net.10", net[10], hidden)))


def test_optimizer_states_of_the_dense_checkpoint_are_dropped(tmp_path, caplog):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(LitNet(optimizer="Adam"), loader())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    model = LitNet(optimizer="Adam")
    small = trainer(tmp_path, callbacks=[HalfChannels()], max_epochs=2)
    with caplog.at_level(logging.WARNING, "lightning_prune"):
        small.fit(model, loader(), ckpt_path=tmp_path / "dense.ckpt")
    assert "optimizer states of the checkpoint belong to the dense model" in caplog.text
    held = {p for group in small.optimizers[0].param_groups for p in group["params"]}
    assert held == set(model.parameters())
    assert all(small.optimizers[0].state[p]["exp_avg"].shape == p.shape for p in held)


def test_parameters_that_the_user_leaves_out_of_the_optimizer_may_shrink(tmp_path):
    class Head(LitNet):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[10].parameters(), lr=0.1)

    model = Head()
    run = trainer(tmp_path, callbacks=[HalfChannels()], max_epochs=1)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "small.ckpt")
    assert plan_of(load_from_checkpoint(Head, tmp_path / "small.ckpt")) == plan_of(model)
    assert model.net[0].out_channels == 8
