"""Tiny LightningModules and data that the tests of callbacks share."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Images ``[1, 8, 8]`` with four classes that a small network can tell apart; the same for the same seed."""

    def __init__(self, count: int = 64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.randint(0, 4, (count,), generator=generator)
        noise = torch.randn(count, 1, 8, 8, generator=generator)
        rows = torch.arange(8)[None, None, :, None]
        self.x = noise * 0.3 + torch.where(rows // 2 == self.y[:, None, None, None], 1.0, 0.0)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class EpochSampler(Sampler[int]):
    """An order that depends on seed and epoch only; Lightning calls ``set_epoch``."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        return iter(torch.randperm(self.count, generator=generator).tolist())


def loader(count: int = 64, batch_size: int = 16, seed: int = 0) -> DataLoader[Any]:
    """Return a loader over :class:`Points` in the order of :class:`EpochSampler`."""
    return DataLoader(Points(count, seed), batch_size=batch_size, sampler=EpochSampler(count, seed))


def body(norm: bool = True, dropout: float = 0.0) -> nn.Sequential:
    """Return a network with two convolutions and a linear layer, wide enough that low ranks are cheaper."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=not norm),
        nn.BatchNorm2d(16) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, stride=2, bias=not norm),
        nn.BatchNorm2d(24) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(24 * 16, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    )


class LitMixin:
    """Everything but the base class, so that both Lightning packages get the same module."""

    def __init__(
        self, norm: bool = True, dropout: float = 0.0, optimizer: str = "SGD", lr: float = 0.05, example: bool = True
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # type: ignore[attr-defined]
        self.net = body(norm, dropout)
        if example:
            self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])  # type: ignore[operator]
        self.log("train_loss", loss)  # type: ignore[attr-defined]
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])  # type: ignore[operator]
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))  # type: ignore[attr-defined]
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())  # type: ignore[attr-defined]

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])  # type: ignore[operator,no-any-return]

    def configure_optimizers(self) -> Any:
        hp = self.hparams  # type: ignore[attr-defined]
        extra = {"momentum": 0.9} if hp.optimizer == "SGD" else {}
        optimizer = getattr(torch.optim, hp.optimizer)(self.parameters(), lr=hp.lr, **extra)  # type: ignore[attr-defined]
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class LitNet(LitMixin, pl.LightningModule):
    """The module of ``pytorch_lightning``."""


def trainer(folder: Any, package: Any = pl, **options: Any) -> Any:
    """Return a quiet Trainer on one CPU that writes below ``folder``."""
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    quiet |= {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "default_root_dir": str(folder),
        "log_every_n_steps": 1,
    }
    return package.Trainer(**(quiet | options))
