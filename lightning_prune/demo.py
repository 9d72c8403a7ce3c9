"""Scikit-learn's handwritten digits, at rest and moving, and networks for them: what the shipped recipes train on without a download.

The digits (1,797 grey images of 8x8 pixels, UCI ML hand-written digits) come with scikit-learn. They are enlarged so that a convolution
has something to do, or move through short clips; the networks are far wider than they need, so that smaller ones are measurably faster.

Data layout: images ``[batch, 1, size, size]`` or clips ``[batch, 1, frames, size, size]``, float32, standardised by the training part; targets
``[batch]``, int64, 0 to 9 or 0 to 19.
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
        name = type(self).__name__
        if batch_size < 2:
            raise OptionError(f"{name}: batch_size is a whole number of at least 2, got {batch_size}.")
        if size < 8:
            raise OptionError(f"{name}: size is at least 8, the digits' own number of pixels, got {size}.")
        self.batch_size, self.size, self.seed = batch_size, size, seed
        self._splits: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        """Read, split, enlarge (or move) and standardise the images, once; the result is the same on every rank.

        Raises:
            OptionError: If scikit-learn is not installed.
        """
        if self._splits:
            return
        pixels, targets = _digits()
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(pixels), generator=generator)
        rows = dict(zip(("test", "val", "train"), order.tensor_split([_NUM_TEST, _NUM_TEST + _NUM_VAL]), strict=True))
        parts = {name: self._examples(pixels[row], targets[row], generator) for name, row in rows.items()}
        deviation, mean = torch.std_mean(parts["train"][0])
        self._splits = {name: TensorDataset((x - mean) / deviation, y) for name, (x, y) in parts.items()}

    def _examples(self, pixels: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets made of digits ``[digits, 1, 8, 8]``; what is drawn comes from ``generator``."""
        return F.interpolate(pixels, size=(self.size, self.size), mode="bilinear", align_corners=False), targets

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


class MovingDigitsData(DigitsData):
    """Clips of the digits: each moves one column per frame, once to the right and once to the left; the split is that of :class:`DigitsData`.

    A target is the digit, plus 10 where it moves to the left. Column and row at the start are drawn, and what leaves on one side comes back on
    the other, so that no single frame tells anything about the direction; and since the second clip is the first one backwards, all
    frames without their order do not, either.

    Args:
        batch_size: Clips per batch, at least 2 (BatchNorm needs two). Defaults to 64.
        frames: Frames per clip, at least 2. Defaults to 8.
        size: Height and width of a frame, in which the 8x8 pixels move, at least 8. Defaults to 16.
        seed: Fixes the split, the starts and, with the epoch, the order. Defaults to 0.

    Raises:
        OptionError: If a value is out of range.
    """

    def __init__(self, batch_size: int = 64, frames: int = 8, size: int = 16, seed: int = 0) -> None:
        super().__init__(batch_size, size, seed)
        if frames < 2:
            raise OptionError(f"MovingDigitsData: frames is a whole number of at least 2, got {frames}.")
        self.frames = frames

    def _examples(self, pixels: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return clips ``[2 * digits, 1, frames, size, size]``, those to the right first, and their targets."""
        count, free = len(pixels), self.size - pixels.shape[-1]
        canvas = F.pad(pixels[:, 0], (0, free, 0, free))
        down = torch.randint(free + 1, (count, 1, 1, 1), generator=generator)
        right = (
            torch.randint(self.size, (count, 1, 1, 1), generator=generator) + torch.arange(self.frames)[:, None, None]
        )
        row = (torch.arange(self.size)[:, None] - down) % self.size
        column = (torch.arange(self.size) - right) % self.size
        clips = canvas[torch.arange(count)[:, None, None, None], row, column].unsqueeze(1)
        return torch.cat([clips, clips.flip(2)]), torch.cat([targets, targets + NUM_CLASSES])


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

    num_classes = NUM_CLASSES
    _layers: tuple[type[nn.Module], ...] = nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d

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
                raise OptionError(f"{type(self).__name__}: {name} is {allowed}, got {value!r}.")
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(2, 1, size, size)
        conv, norm, pool, mean = self._layers

        def block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
            return conv(inputs, outputs, 3, padding=1, bias=False), norm(outputs), nn.ReLU()

        self.features = nn.Sequential(
            *block(1, width),
            pool(2),
            *block(width, 2 * width),
            *block(2 * width, 2 * width),
            mean(1),
            nn.Flatten(),
            nn.Dropout(dropout),
        )
        self.classifier = nn.Linear(2 * width, self.num_classes)
        self.val_accuracy = MulticlassAccuracy(self.num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(self.num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, ``[batch, classes]``, of images ``[batch, 1, size, size]`` or clips ``[batch, 1, frames, size, size]``."""
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


class MovingDigitsNet(DigitsNet):
    """Three 3x3x3 convolutions with BatchNorm and ReLU, the clip halved along time, height and width after the first, then one linear layer.

    Args:
        width: Channels of the first convolution; the other two have twice as many. Defaults to 24.
        dropout: Share of the last features dropped in training, in [0, 1). Defaults to 0.
        lr: Largest learning rate, > 0; it falls to 0 along a cosine over the fit. Defaults to 0.05.
        optimizer: ``"sgd"`` or ``"adamw"``. Defaults to ``"sgd"``.
        momentum: Of SGD, in [0, 1). Defaults to 0.9.
        weight_decay: Of SGD, at least 0. Defaults to 5e-4.
        frames: Frames per clip, as in :class:`MovingDigitsData`. Defaults to 8.
        size: Height and width of a frame, likewise. Defaults to 16.

    Raises:
        OptionError: If a value is out of range.
    """

    num_classes = 2 * NUM_CLASSES
    _layers = nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d

    def __init__(
        self,
        width: int = 24,
        dropout: float = 0.0,
        lr: float = 0.05,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        frames: int = 8,
        size: int = 16,
    ) -> None:
        super().__init__(width, dropout, lr, optimizer, momentum, weight_decay, size)
        self.example_input_array = torch.zeros(2, 1, frames, size, size)


def _digits() -> tuple[Tensor, Tensor]:
    """Return the images, ``[1797, 1, 8, 8]``, float32, 0 to 16, and the targets, ``[1797]``, int64."""
    if importlib.util.find_spec("sklearn") is None:
        raise OptionError("DigitsData needs scikit-learn, which is not installed: pip install 'lightning-prune[demo]'.")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    return images, torch.from_numpy(digits.target).long()
