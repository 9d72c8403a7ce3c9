"""What is known of a tensor in the graph: its shape, and for every axis that can shrink a field of labels.

A field is an integer tensor of the value's own shape: each element holds the label of the slice that it belongs to. Axes along which the
labels do not change are *expanded* (stride 0), so a field costs as much memory as the axes that it follows, and shape operations can be
run on it literally.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

FIXED = 0  # the label of what can never leave


@dataclasses.dataclass(frozen=True, eq=False)
class Field:
    """Labels along one or more axes of a tensor.

    Attributes:
        labels: ``[*shape]``, int64, expanded along the axes where they do not change.
        at: The value that an element holds in the masked model when its slice has left; None if it is not one known constant.
        weights: Whether the tensor is made of parameters and constants alone.
    """

    labels: Tensor
    at: float | None = 0.0
    weights: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes along which the labels change."""
        return varying(self.labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor in the graph.

    Attributes:
        shape: Its shape in the dense model.
        fields: Its labels; fields lie along different axes. An axis without a field has a size that nothing changes.
        fill: The number that every element holds, if it was created that way (``zeros``, ``full``).
        source: Name of the parameter or buffer that it is, if it is one.
        weights: Whether it is made of parameters, buffers and constants alone.
    """

    shape: tuple[int, ...]
    fields: tuple[Field, ...] = ()
    fill: float | None = None
    source: str | None = None
    weights: bool = False

    def along(self, axis: int) -> Field | None:
        """Return the field whose labels change along ``axis``, or None."""
        axis %= max(1, len(self.shape))
        return next((field for field in self.fields if axis in field.axes), None)

    def beside(self, axes: Iterable[int]) -> list[Field]:
        """Return the fields whose labels do not change along any of ``axes``."""
        chosen = {axis % len(self.shape) for axis in axes}
        return [field for field in self.fields if not chosen & set(field.axes)]


def varying(labels: Tensor) -> tuple[int, ...]:
    """Return the axes along which ``labels`` may change."""
    return tuple(
        axis
        for axis, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True))
        if stride and size > 1
    )


def core(labels: Tensor) -> Tensor:
    """Return ``labels`` with one element along every axis where they do not change; same rank."""
    for axis, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1 and not stride:
            labels = labels.narrow(axis, 0, 1)
    return labels


def spread(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Expand ``labels`` to ``shape``; missing leading axes are added, axes of size one are expanded."""
    return labels.expand(tuple(shape))


def tidy(labels: Tensor) -> Tensor:
    """Return the same labels, expanded along every axis where they do not change in fact."""
    shape = labels.shape
    if math.prod(shape) == 0:
        return labels
    labels = core(labels)
    for axis, size in enumerate(labels.shape):
        if size > 1:
            first = labels.narrow(axis, 0, 1)
            if bool((labels == first).all()):
                labels = first
    return labels.expand(shape)


def line(labels: Tensor, axis: int) -> Tensor:
    """Lay a vector of labels along ``axis`` of a tensor of the rank and shape of ``labels``; helper for one-axis fields."""
    return core(labels).movedim(axis, 0).flatten()


def vector(labels: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """Lay ``labels``, a vector, along ``axis`` of a tensor of ``shape``."""
    view = [1] * len(shape)
    view[axis] = labels.numel()
    return labels.reshape(view).expand(tuple(shape))


def fixed(shape: Sequence[int]) -> Tensor:
    """Return labels of ``shape`` that say: never leaves."""
    return torch.full((1,) * len(shape), FIXED, dtype=torch.int64).expand(tuple(shape))
