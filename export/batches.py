"""Batches of a data loader as inputs of a model and of ONNX files, with their targets.

Understood are ``inputs``, ``(inputs, target)``, ``(input, input, ..., target)`` and a dict with the names of the
inputs and one more entry, or one called ``target``, ``targets``, ``label``, ``labels`` or ``y``.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning_prune.export.inputs import read_tensors
from torch import Tensor

from lightning_prune.errors import ExportError

_TARGETS = ("target", "targets", "label", "labels", "y")


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        example: What the model is called with: a tensor, a tuple of positional or a dict of keyword arguments.
        feeds: The tensors in it by the name of the file's input.
        target: What the metric compares with; None if the batch holds only inputs.
    """

    example: Any
    feeds: dict[str, Tensor]
    target: Any


def read_batches(loader: Iterable[Any], names: Sequence[str], limit: int | None) -> Iterator[Batch]:
    """Split the batches of a loader.

    Args:
        loader: The data.
        names: Names of the file's inputs, in order.
        limit: Number of batches to read; None reads all.

    Yields:
        The batches.

    Raises:
        ExportError: If a batch does not fit the inputs, or there is none.
    """
    count = 0
    for batch in loader:
        if limit is not None and count >= limit:
            break
        yield split(batch, names)
        count += 1
    if not count:
        raise ExportError("The data loader gives no batch. Check its dataset, batch_size and limit_batches.")


def split(batch: Any, names: Sequence[str]) -> Batch:
    """Split one batch into inputs and target.

    Args:
        batch: What the loader gave.
        names: Names of the file's inputs, in order.

    Raises:
        ExportError: If it does not hold these inputs.
    """
    if isinstance(batch, Mapping) and set(names) <= set(batch):
        example = {name: batch[name] for name in names}
        return Batch(example, example, _target(batch, names))
    if isinstance(batch, Tensor) and len(names) == 1:
        return Batch(batch, {names[0]: batch}, None)
    if isinstance(batch, tuple | list):
        for example, target in _readings(tuple(batch)):
            feeds = _feeds(example, names)
            if feeds is not None:
                return Batch(example, feeds, target)
    raise ExportError(
        f"A batch of the data loader is {_describe(batch)}; the file has the inputs {', '.join(names)}. "
        "Give (inputs, target), or a dict with these names and 'target'."
    )


def _readings(batch: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    """The ways to read a tuple: its last item is the target, or there is none."""
    if len(batch) == 2:
        yield batch
    if len(batch) > 1:
        yield batch[:-1], batch[-1]
    yield batch, None


def _feeds(example: Any, names: Sequence[str]) -> dict[str, Tensor] | None:
    """Match the tensors of ``example`` with ``names``: a dict by name, anything else by position."""
    if isinstance(example, Mapping) and set(example) >= set(names):
        return {name: example[name] for name in names} if len(example) == len(names) else None
    tensors = read_tensors(example)
    return dict(zip(names, tensors, strict=True)) if len(tensors) == len(names) else None


def _target(batch: Mapping[str, Any], names: Sequence[str]) -> Any:
    others = [key for key in batch if key not in names]
    known = [key for key in others if key in _TARGETS]
    if len(known) == 1 or len(others) == 1:
        return batch[(known or others)[0]]
    if not others:
        return None
    raise ExportError(
        f"A batch holds {', '.join(map(repr, others))} beside the inputs; which is the target? "
        f"Call one of them {', '.join(map(repr, _TARGETS))}."
    )


def _describe(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor {list(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a dict with {', '.join(map(repr, batch)) or 'no entry'}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {', '.join(type(item).__name__ for item in batch) or 'nothing'}"
    return f"a {type(batch).__name__}"
