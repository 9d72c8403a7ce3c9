"""Scikit-learn's handwritten digits, and a network for them: what the shipped recipes train on without a download.

The digits (1,797 grey images of 8x8 pixels, UCI ML hand-written digits) come with scikit-learn. They are enlarged so that a convolution
has something to do; the network is far wider than they need, so that a smaller one is measurably faster.

Data layout: images ``[batch, 1, size, size]``, float32, standardised by the training images; targets ``[batch]``, int64, 0 to 9.
"""

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.errors import OptionError

if TYPE_CHECKING or importlib.util.find_spec("pytorch_lightning") is not None:
    import pytorch_lightning as pl
else:
    import lightning.pytorch as pl

NUM_CLASSES = 10
_NUM_TEST = 360
_NUM_VAL = 180


class DigitsData(pl.LightningDataModule):
    """The digits, split into 1,257 images for training, 180 for validation and 360 for testing.

    The order of the training images is a function of seed and epoch alone, so a fit that is resumed between two epochs sees what the
    uninterrupted one would have seen.

    Args:
        batch_size: Images per batch, at least 2 (BatchNorm needs two). Defaults to 64.
        size: Height and width to which the 8x8 pixels are enlarged, bilinearly, at least 8. Defaults to 16.
        seed: Fixes the split and, with the epoch, the order. Defaults to 0.

    Raises:
        OptionError: If a value is out of range.
    """

    def __init__(self, batch_size: int = 64, size: int = 16, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 2:
            raise OptionError(f"DigitsData: batch_size is a whole number of at least 2, got {batch_size}.")
        if size < 8:
            raise OptionError(f"DigitsData: size is at least 8, the digits' own number of pixels, got {size}.")
        self.batch_size, self.size, self.seed = batch_size, size, seed
        self._splits: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        """Read, enlarge, split and standardise the images, once; the result is the same on every rank.

        Raises:
            OptionError: If scikit-learn is not installed.
        """
        if self._splits:
            return
        pixels, targets = _digits()
        images = F.interpolate(pixels, size=(self.size, self.size), mode="bilinear", align_corners=False)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        parts = dict(zip(("test", "val", "train"), order.tensor_split([_NUM_TEST, _NUM_TEST + _NUM_VAL]), strict=True))
        deviation, mean = torch.std_mean(images[parts["train"]])
        images = (images - mean) / deviation
        self._splits = {name: TensorDataset(images[rows], targets[rows]) for name, rows in parts.items()}

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training images in an order that seed and epoch decide; a last incomplete batch is left out."""
        ranks = 1 if self.trainer is None else self.trainer.world_size
        rank = 0 if self.trainer is None else self.trainer.global_rank
        data = self._splits["train"]
        # With one rank too: Lightning tells this sampler the epoch, and its permutation depends on nothing else.
        order: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(
            data, ranks, rank, seed=self.seed, drop_last=True
        )
        return DataLoader(data, self.batch_size, sampler=order, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation images in fixed order."""
        return DataLoader(self._splits["val"], self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test images in fixed order."""
        return DataLoader(self._splits["test"], self.batch_size)


class DigitsNet(pl.LightningModule):
    """Three 3x3 convolutions with BatchNorm and ReLU, the image halved after the first, then one linear layer.

    Args:
        width: Channels of the first convolution; the other two have twice as many. Defaults to 64.
        dropout: Share of the last features dropped in training, in [0, 1). Defaults to 0.
        lr: Largest learning rate, > 0; it falls to 0 along a cosine over the fit. Defaults to 0.05.
        optimizer: ``"sgd"`` or ``"adamw"``. Defaults to ``"sgd"``.
        momentum: Of SGD, in [0, 1). Defaults to 0.9.
        weight_decay: Of SGD, at least 0. Defaults to 5e-4.
        size: Height and width of the images, as in :class:`DigitsData`. Defaults to 16.

    Raises:
        OptionError: If a value is out of range.
    """

    def __init__(
        self,
        width: int = 64,
        dropout: float = 0.0,
        lr: float = 0.05,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        size: int = 16,
    ) -> None:
        super().__init__()
        for name, value, good, allowed in (
            ("width", width, width >= 1, "a whole number of at least 1"),
            ("dropout", dropout, 0 <= dropout < 1, "in [0, 1)"),
            ("lr", lr, lr > 0, "above 0"),
            ("momentum", momentum, 0 <= momentum < 1, "in [0, 1)"),
            ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
            ("optimizer", optimizer, optimizer in ("sgd", "adamw"), "'sgd' or 'adamw'"),
        ):
            if not good:
                raise OptionError(f"DigitsNet: {name} is {allowed}, got {value!r}.")
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(2, 1, size, size)
        self.features = nn.Sequential(
            *_block(1, width),
            nn.MaxPool2d(2),
            *_block(width, 2 * width),
            *_block(2 * width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
        )
        self.classifier = nn.Linear(2 * width, NUM_CLASSES)
        self.val_accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")
        self.test_accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, ``[batch, 10]``, of images ``[batch, 1, size, size]``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a batch of images and targets, a scalar."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val_accuracy``, the share of validation images named rightly."""
        self.val_accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.val_accuracy, prog_bar=True, on_step=False, on_epoch=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test_accuracy``, the share of test images named rightly."""
        self.test_accuracy(self(batch[0]), batch[1])
        self.log("test_accuracy", self.test_accuracy, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and a learning rate that falls step by step along a cosine."""
        rate = self.hparams["lr"]
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(
                self.parameters(), rate, momentum=self.hparams["momentum"], weight_decay=self.hparams["weight_decay"]
            )
            if self.hparams["optimizer"] == "sgd"
            else torch.optim.AdamW(self.parameters(), rate)
        )
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def _digits() -> tuple[Tensor, Tensor]:
    """Return the images, ``[1797, 1, 8, 8]``, float32, 0 to 16, and the targets, ``[1797]``, int64."""
    if importlib.util.find_spec("sklearn") is None:
        raise OptionError("DigitsData needs scikit-learn, which is not installed: pip install 'lightning-prune[demo]'.")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    return images, torch.from_numpy(digits.target).long()
