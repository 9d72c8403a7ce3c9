"""What the model's own validation says: means of what it logs, metrics computed, nothing left behind."""

import pytest
import pytorch_lightning as pl
import torch
from lit import LitNet, Points, loader, trainer
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.callback.validation import validation_figures
from lightning_prune.probe import Probe


class Judged(LitNet):
    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(4, average="micro")

    def validation_step(self, batch, index):
        z = self(batch[0])
        self.accuracy.update(z, batch[1])
        self.log("loss", F.cross_entropy(z, batch[1]))
        self.log_dict({"accuracy": self.accuracy, "constant": 3})


class Ask(pl.Callback):
    """Asks at the start of the last epoch."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            before = {key: value.clone() for key, value in module.state_dict().items()}
            self.found = validation_figures(trainer, module, Probe.of_trainer(trainer, module))
            assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
            module.eval()
            with torch.no_grad():
                z = module(Points(32, 1).x)
            module.train()
            y = Points(32, 1).y
            self.expected = {"loss": float(F.cross_entropy(z, y)), "accuracy": float((z.argmax(1) == y).float().mean())}
            self.state = {
                name: m.metric_state for name, m in module.named_modules() if isinstance(m, MulticlassAccuracy)
            }


def test_figures_are_the_means_of_what_validation_logs_and_nothing_changes(tmp_path):
    model, ask = Judged(), Ask()
    trainer(tmp_path, max_epochs=2, callbacks=[ask]).fit(model, loader(), loader(32, 16, seed=1))
    assert ask.found == pytest.approx(ask.expected | {"constant": 3.0}, rel=1e-5)


def test_without_validation_or_where_it_fails_nothing_is_told(tmp_path):
    class Broken(LitNet):
        def validation_step(self, batch, index):
            if self.trainer.training:
                raise RuntimeError("not now")

    for model, val in ((LitNet(), None), (Broken(), loader(32))):
        ask = Ask()
        ask.on_train_epoch_start = lambda t, m, ask=ask: setattr(
            ask, "found", validation_figures(t, m, Probe.of_trainer(t, m))
        )
        trainer(tmp_path, max_epochs=1, callbacks=[ask]).fit(model, loader(), val)
        assert ask.found == {}
