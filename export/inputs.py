"""What goes into a model and comes out of it, as flat lists of named tensors: the names that stand in the ONNX file.

An input is named after its argument of ``forward``; tensors inside tuples, lists and dicts append ``_<index or key>``.
An output is named ``output`` (one tensor), ``output_<index>`` (a sequence) or after its key (a dict). Nothing depends
on the names of operators, so the file of a compressed model has the names of the dense one.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ExportError
from lightning_prune.structure.calls import as_calls

BATCH = "batch"
_TRACED_BATCH = 2  # torch.export takes a dimension of size 1 for a constant


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments of one call of a model's ``forward``.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments, in the order of the signature.
        arguments: All of them by name of the parameter, in the order of the signature.
        batch: Size of dimension 0 of the first tensor that has dimensions; None if there is none.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: dict[str, Any]
    batch: int | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their name in the ONNX file, in its order."""
        return dict(item for name, value in self.arguments.items() for item in _leaves(value, name))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """Return the same call with ``change`` applied to every tensor."""

        def changed(value: Any) -> Any:
            return _map(value, change)

        args, kwargs, arguments = changed(self.args), changed(self.kwargs), changed(self.arguments)
        return dataclasses.replace(self, args=args, kwargs=kwargs, arguments=arguments)

    def is_batched(self, tensor: Tensor) -> bool:
        """Whether dimension 0 of ``tensor`` is taken for the batch: it has the batch's size."""
        return self.batch is not None and tensor.ndim > 0 and tensor.shape[0] == self.batch

    def resized(self, batch: int) -> "Inputs":
        """Return the same call with ``batch`` examples: rows are repeated cyclically, or dropped."""
        if self.batch is None:
            return self
        rows = torch.arange(batch) % self.batch
        changed = self.map(lambda tensor: tensor[rows.to(tensor.device)] if self.is_batched(tensor) else tensor)
        return dataclasses.replace(changed, batch=batch)

    def dynamic_shapes(self) -> dict[str, Any]:
        """Return ``dynamic_shapes`` for ``torch.export``: dimension 0 of every batched tensor is named ``batch``."""
        dimension = torch.export.Dim(BATCH)
        return {
            name: _map(value, lambda tensor: {0: dimension} if self.is_batched(tensor) else None, other=None)
            for name, value in self.arguments.items()
        }


def read_inputs(model: nn.Module, example: Any) -> Inputs:
    """Bind example inputs to the arguments of ``model.forward``.

    Args:
        model: The model.
        example: A tensor, a tuple of positional arguments, a dict of keyword arguments or a ``Call`` of the model
            itself; None takes the model's ``example_input_array``.

    Returns:
        The call.

    Raises:
        ExportError: If there is no example, it holds no tensor or no row, does not fit ``forward``, or calls a
            submodule.
    """
    kind = type(model).__name__
    example = getattr(model, "example_input_array", None) if example is None else example
    if example is None:
        raise ExportError(
            f"{kind} needs example inputs: give example_inputs, or set self.example_input_array in the model."
        )
    calls = as_calls(example)
    if len(calls) > 1 or calls[0].module:
        names = ", ".join(repr(call.module) for call in calls)
        raise ExportError(
            f"{kind} is exported through its forward, but the example inputs call {names}. "
            "Export each submodule by itself, or write a forward that calls them."
        )
    call = calls[0]
    try:
        bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise ExportError(f"The example inputs do not fit {kind}.forward: {error}.") from error
    inputs = _bound(bound, kind)
    tensors = inputs.tensors
    if not tensors:
        raise ExportError(f"The example inputs of {kind} hold no tensor. Give at least one.")
    if any(tensor.numel() == 0 for tensor in tensors.values()):
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise ExportError(f"The example inputs of {kind} are empty: {shapes}. Give at least one example.")
    sizes = [tensor.shape[0] for tensor in tensors.values() if tensor.ndim]
    return dataclasses.replace(inputs, batch=sizes[0] if sizes else None)


def widened(inputs: Inputs) -> Inputs:
    """Return inputs whose batch ``torch.export`` keeps symbolic: a single example is repeated."""
    return inputs.resized(_TRACED_BATCH) if inputs.batch == 1 else inputs


def read_outputs(value: Any, taken: Mapping[str, Any], kind: str) -> dict[str, Tensor]:
    """Name the tensors that a model returned.

    Args:
        value: What ``forward`` returned.
        taken: Names of the inputs, which no output may have; an output of that name gets the suffix ``_out``.
        kind: Name of the model's class, for messages.

    Returns:
        The tensors by name, in order.

    Raises:
        ExportError: If something else than tensors and nested tuples, lists and dicts of them came back.
    """
    if isinstance(value, Mapping):
        pairs = [item for key, entry in value.items() for item in _leaves(entry, str(key), strict=kind)]
    else:
        pairs = _leaves(value, "output", strict=kind)
    if not pairs:
        raise ExportError(f"{kind}.forward returns no tensor.")
    named: dict[str, Tensor] = {}
    for name, tensor in pairs:
        free = name
        while free in taken or free in named:
            free += "_out"
        named[free] = tensor
    return named


def _bound(bound: inspect.BoundArguments, owner: str) -> Inputs:
    """Keep a call as it was bound; a dict in the last place goes by keyword, else the exporter takes it for keywords."""
    kinds = {name: bound.signature.parameters[name].kind for name in bound.arguments}
    if inspect.Parameter.VAR_KEYWORD in kinds.values():
        given = ", ".join(map(repr, next(reversed(bound.arguments.values()))))
        raise ExportError(f"{owner}.forward takes {given} through **kwargs, which has no names to export. Name them.")
    arguments = dict(bound.arguments)
    by_name = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    if bound.args and isinstance(bound.args[-1], Mapping) and set(kinds.values()) <= by_name:
        return Inputs((), arguments, arguments)
    return Inputs(bound.args, bound.kwargs, arguments)


def _leaves(value: Any, name: str, strict: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in _leaves(item, f"{name}_{key}", strict)]
    if isinstance(value, tuple | list):
        return [pair for index, item in enumerate(value) for pair in _leaves(item, f"{name}_{index}", strict)]
    if strict and value is not None:
        raise ExportError(
            f"{strict}.forward returns {type(value).__name__} ({name}). "
            "Return tensors, or tuples, lists and dicts of tensors."
        )
    return []


_KEEP = object()


def _map(value: Any, change: Callable[[Tensor], Any], other: Any = _KEEP) -> Any:
    """Apply ``change`` to every tensor of a nested structure; anything else becomes ``other`` where that is given."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map(item, change, other) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, change, other) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_map(item, change, other) for item in value)
    return value if other is _KEEP else other


def read_tensors(value: Any) -> list[Tensor]:
    """Return the tensors of a nested structure in order."""
    return [tensor for _, tensor in _leaves(value, "")]
