"""Chunks of data to score with, and their losses, the same ones in every pass.

A chunk is what one graph is built for at a time: a batch as the loader gives it, or a share of so many samples of every class.
"""

import contextlib
import math
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_prune.curvature.hvp import Losses, twice_differentiable
from lightning_prune.errors import LightningPruneError, ModelError, OptionError
from lightning_prune.probe import FOREIGN, Probe

Labels = Callable[[Any], Any]
Loss = Callable[[Any, int], Tensor | None]

_OWN_LOSS = "Give a loss of its own: loss_fn= where the method has it, or lightning_prune.compress(..., loss=...)."
_IN_MANUAL = "Scoring runs its training_step before the fit, where there is nothing to step yet."
_AT_START = (
    "Scoring runs the training_step in float32 and, without until_epoch= where the method has it, before the fit: no optimizers or schedulers exist "
    "yet. Leave them out of the step (LearningRateMonitor logs the rate) and cast inputs to the type of the weights."
)


@contextlib.contextmanager
def scoring(probe: Probe) -> Iterator[None]:
    """Have the model as it trains, but without noise, in float32 at least and twice differentiable; leave it as it was.

    Normalization uses the statistics of the chunk, except where the user froze it (in eval mode while the model is in training mode).
    """
    with probe.quiet(mode=None if probe.model.training else "train"), twice_differentiable(probe.model):
        yield


def plain_chunks(probe: Probe, count: int) -> list[Any]:
    """Return the first ``count`` batches, called inside :func:`scoring`.

    Raises:
        ModelError: If there is no data.
    """
    chunks = [tree_map(_usable, batch) for batch in probe.batches(count, "Reading batches to score with")]
    if not chunks:
        raise ModelError("There is no batch to score with: the data is empty. Give a training dataloader with batches.")
    return chunks


def balanced_chunks(probe: Probe, labels_of: Labels, per_class: int, num_classes: int | None = None) -> list[Any]:
    """Return the first ``per_class`` samples of every class, called inside :func:`scoring`.

    They are sorted by class and cut into two chunks, or as many more as it takes for none to be larger than a batch of the data: every chunk has
    some of the classes only, as in the code of GraSP's authors, which matters for the statistics of batch normalization.

    Args:
        probe: Where batches come from: tensors whose first dimension is that of the labels, in tuples, lists and dicts.
        labels_of: Returns the labels of a batch, integer, ``[samples]``.
        per_class: Samples of each class, at least 1.
        num_classes: Reading ends as soon as there are enough of classes 0 to ``num_classes - 1``; None reads the data to its end and takes the
            classes that occur.

    Raises:
        ModelError: If a class has too few samples, or batches or labels are of another kind.
    """
    counts = Counter[int](dict.fromkeys(range(num_classes or 0), 0))
    pieces, labels, largest = [], [], 1
    for batch in probe.batches(sys.maxsize, f"Collecting {per_class} samples per class"):
        found = _checked(labels_of(batch), num_classes)
        index = []
        for place, label in enumerate(found.tolist()):
            if counts[label] < per_class:
                counts[label] += 1
                index.append(place)
        if index:
            pieces.append(_taken(batch, torch.tensor(index, device=found.device), len(found)))
            labels.append(found[index])
        largest = max(largest, len(found))
        if num_classes and all(count == per_class for count in counts.values()):
            break
    short = {label: count for label, count in sorted(counts.items()) if count < per_class}
    if short or not counts:
        shown = ", ".join(f"class {label} has {count}" for label, count in list(short.items())[:5])
        raise ModelError(
            f"samples_per_class={per_class}, but {shown or 'there is no data'}{', ...' if len(short) > 5 else ''}. Ask for fewer samples, "
            "give data with all classes, or leave out targets= to score with batches as they come."
        )
    whole, order = _joined(pieces), torch.cat(labels).argsort(stable=True)
    parts = order.tensor_split(min(len(order), max(2, math.ceil(len(order) / largest))))
    return [tree_map(_usable, _taken(whole, part, len(order))) for part in parts]


def losses_of(probe: Probe, chunks: Sequence[Any], loss: Loss) -> Losses:
    """Return what yields the losses of chunks that have one, with the same random numbers in every pass; raises if none has.

    Args:
        probe: Of the model.
        chunks: What to yield the losses of.
        loss: ``loss(chunk, index)``, a scalar with its graph, or None for a chunk to skip.
    """

    def losses() -> Iterator[Tensor]:
        count = 0
        for index, chunk in enumerate(chunks):
            torch.manual_seed(index)  # what noise the user's code makes is one function of the weights in all passes
            found = loss_alone(probe, loss, chunk, index)
            if found is not None:
                count += 1
                yield found
                del found  # and its graph, before the next one is built
        if not count:
            raise no_loss(probe)

    return losses


def loss_alone(probe: Probe, loss: Loss, chunk: Any, index: int) -> Tensor | None:
    """Return ``loss(chunk, index)``, a scalar with its graph, or None for a chunk to skip.

    Raises:
        ModelError: If the user's code cannot be run for a loss alone, at the start of a fit, or gives one without a graph; says why that may be
            and what to give instead.
    """
    try:
        value = loss(chunk, index)
    except FOREIGN as error:
        if isinstance(error, LightningPruneError | torch.OutOfMemoryError):
            raise
        manual = not getattr(probe.model, "automatic_optimization", True)
        raise ModelError(
            f"{type(probe.model).__name__} {'optimizes manually and ' if manual else ''}cannot be run for a loss alone "
            f"({type(error).__name__}: {' '.join(str(error).split())}). {_IN_MANUAL if manual else _AT_START} {_OWN_LOSS}"
        ) from error
    if value is not None and not value.requires_grad:
        raise ModelError(
            f"The loss of {type(probe.model).__name__} has no gradient: it is detached, computed under torch.no_grad(), or uses no weight. "
            f"Return it with its graph. {_OWN_LOSS}"
        )
    return value


def no_loss(probe: Probe) -> ModelError:
    """Return the error for a model whose step gave no loss on any batch that it was scored with."""
    if not probe.knows_loss:
        return ModelError(
            f"A loss is needed to score {type(probe.model).__name__}, and outside of a fit none is known: give loss=, a function of model and batch "
            "that returns a scalar, to compress or explain."
        )
    if not getattr(probe.model, "automatic_optimization", True):
        return ModelError(
            f"{type(probe.model).__name__} optimizes manually and its training_step returns no loss. {_OWN_LOSS}"
        )
    return ModelError(
        f"{type(probe.model).__name__} gave no loss on any of the batches to score with; a training step that returns None skips its batch. "
        f"Give more calibration_batches=. {_OWN_LOSS}"
    )


def labels_of(owner: object, option: str) -> Labels:
    """Return a function from a batch to its labels.

    Args:
        owner: The method.
        option: The option that holds a position in the batch, a key of it, the dotted name of a function, or a function.
    """
    value = getattr(owner, option)
    if isinstance(value, int) or (isinstance(value, str) and "." not in value):
        return lambda batch: _entry(batch, value, f"{type(owner).__name__}({option}={value!r})")
    return function_of(owner, option)


def function_of(owner: object, option: str) -> Callable[..., Any]:
    """Return the function that an option holds or names.

    Raises:
        OptionError: If there is none of that name.
    """
    value = getattr(owner, option)
    try:
        found = pkgutil.resolve_name(value) if isinstance(value, str) else value
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(
            f"{type(owner).__name__}({option}={value!r}): {error}. Give the dotted name of a function that can be imported."
        ) from error
    if not callable(found):
        raise OptionError(f"{type(owner).__name__}({option}={value!r}) is a {type(found).__name__}. Give a function.")
    return found  # type: ignore[no-any-return]


def _entry(batch: Any, key: int | str, what: str) -> Any:
    try:
        return batch[key]
    except (LookupError, TypeError) as error:
        raise ModelError(f"{what}: the batch is a {type(batch).__name__} without such an entry ({error}).") from error


def _checked(labels: Any, num_classes: int | None) -> Tensor:
    integer = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if not integer or labels.ndim != 1:
        got = f"{list(labels.shape)} {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ModelError(
            f"Labels must be a tensor of integers, one per sample; targets= gives {got}. Give the dotted name of a function from a batch to "
            "such labels, or leave out targets= to score with batches as they come."
        )
    outside = [label for label in labels.tolist() if label < 0 or (num_classes and label >= num_classes)]
    if outside:
        raise ModelError(
            f"Label {outside[0]} is no class: classes go from 0 to {num_classes or 'the last'}, exclusive."
        )
    return labels  # type: ignore[no-any-return]


def _taken(batch: Any, index: Tensor, count: int) -> Any:
    """Return the samples at ``index`` of a batch of ``count``."""

    def taken(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == count:
            return value[index.to(value.device)]
        if value is None or isinstance(value, bool | int | float):
            return value
        got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ModelError(
            f"A batch of {count} samples holds {got}, from which single samples cannot be taken. Classes can be balanced in batches of tensors, "
            "samples first, in tuples, lists and dicts; else leave out targets= and balance in the dataloader."
        )

    return tree_map(taken, batch)


def _joined(pieces: Iterable[Any]) -> Any:
    """Concatenate batches."""
    try:
        return tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *pieces)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"Samples of different batches do not fit into one: {error}. Leave out targets= to score with batches as they come."
        ) from error


def _usable(value: Any) -> Any:
    """Return a tensor that gradients in float32 can be taken through; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.clone() if value.is_inference() else value
    return value.float() if value.is_floating_point() and value.element_size() < 4 else value
