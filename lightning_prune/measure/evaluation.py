"""What a model is worth on some data: the mean of a loss, or a metric, over the same samples in the same order every time it is asked."""

import copy
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.errors import ModelError, OptionError
from lightning_prune.probe import FOREIGN, Probe, training_loss
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.prunable import prunable_layers, prunable_weights
from lightning_prune.structure.select import Pattern, select

Loss = Callable[[nn.Module, Any], Tensor]


class Metric(Protocol):
    """What is asked of a metric; those of torchmetrics have it."""

    def reset(self) -> None:
        """Forget all batches."""

    def update(self, output: Tensor, target: Any) -> None:
        """Take in a batch: the first output of the model, and the target."""

    def compute(self) -> Any:
        """Return one number for all batches."""


class Evaluation:
    """Tells what a model is worth; asking leaves it bit-identical.

    Args:
        model: The model; it runs in evaluation mode.
        data: Batches, as often as asked for: a loader or a list.
        loss: ``loss(model, batch)``, a scalar, the mean over the samples of a batch; None takes the model's ``training_step``.
        metric: Instead of a loss: takes the first output and the last entry of a batch, whose entries before are the inputs.
        batches: How many batches to look at; None takes all.

    Attributes:
        samples: How many samples the last answer rests on; the first axis of the first tensor of a batch counts them.

    Raises:
        OptionError: If ``batches`` is out of range, or there is neither a loss nor a ``training_step``.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        loss: Loss | None = None,
        metric: Metric | None = None,
        batches: int | None = None,
    ) -> None:
        if loss is not None and metric is not None:
            raise OptionError("Give a loss or a metric, not both.")
        if loss is None and metric is None and not hasattr(model, "training_step"):
            raise OptionError(
                f"{type(model).__name__} has no training_step. Give loss=, a function of model and batch that returns a scalar."
            )
        if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
            raise OptionError(f"batches={batches!r}: give an integer of at least 1, or None for all.")
        self.metric = copy.deepcopy(metric)
        self.probe = Probe.of_data(model, data, training_loss if loss is None else loss)
        self.count = sys.maxsize if batches is None else batches
        self.samples = 0

    def value(self) -> float:
        """Return the mean loss over all samples, or the metric.

        Raises:
            ModelError: If the model or the loss cannot be run.
            OptionError: If there is no data, or no more of it: an iterator gives its batches only once.
        """
        try:
            with self.probe.quiet(mode="eval"), torch.no_grad():
                samples, value = self._mean() if self.metric is None else self._metric(self.metric)
        except FOREIGN as error:
            if isinstance(error, ModelError | OptionError):
                raise
            raise ModelError(
                f"{type(self.probe.model).__name__} cannot be run outside of a fit ({type(error).__name__}: {' '.join(str(error).split())}). "
                "Give loss=, a function of model and batch that returns a scalar."
            ) from error
        if samples == 0 or samples < self.samples:
            raise OptionError(
                f"data: {samples} samples in this pass, {self.samples} before. Give what can be read many times: a DataLoader, or a list of batches."
            )
        self.samples = samples
        return value

    def _mean(self) -> tuple[int, float]:
        samples, total = 0, 0.0
        for index, batch in enumerate(self.probe.batches(self.count)):
            size = batch_size(batch)
            samples += size
            total += size * float(self.probe.loss(batch, index).double())
        return samples, total / max(1, samples)

    def _metric(self, metric: Metric) -> tuple[int, float]:
        samples = 0
        metric.reset()
        for batch in self.probe.batches(self.count):
            if not isinstance(batch, tuple | list) or len(batch) < 2:
                raise OptionError(
                    "A metric needs batches of inputs and a target, the target last. Give a loss instead."
                )
            inputs = batch[0] if len(batch) == 2 else tuple(batch[:-1])
            output = as_calls(inputs)[0].run(self.probe.model)
            metric.update(next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), batch[-1])
            samples += batch_size(batch)
        return samples, float(metric.compute()) if samples else math.nan


def batch_size(batch: Any) -> int:
    """Return the size of the first axis of the first tensor in a batch; 1 if it holds none."""
    tensors = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim > 0)
    return next((tensor.shape[0] for tensor in tensors), 1)


def weights_of(
    model: nn.Module,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
) -> dict[str, nn.Parameter]:
    """Return the weights of linear layers, convolutions, attention and recurrent layers, tied ones once, by full name; frozen ones too.

    Args:
        model: The model.
        include: Layers to take: names, globs or module types; None takes all.
        exclude: Layers to leave alone, likewise.

    Raises:
        OptionError: If a pattern matches no layer.
        ModelError: If there is none.
    """
    found, _ = prunable_weights(model, select(prunable_layers(model), include, exclude), frozen=True)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no weights that could be pruned: no linear layer, convolution, attention or recurrent layer."
        )
    return found


def check_share(name: str, value: object, most: float = 1.0) -> float:
    """Return a share if it is a number in [0, ``most``].

    Raises:
        OptionError: Otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise OptionError(f"{name}={value!r}: give a number in [0, {most:g}].")
    return float(value)


def finite(value: float) -> float | None:
    """Return a number as JSON knows it: None in the place of infinities and what is no number."""
    return value if math.isfinite(value) else None
