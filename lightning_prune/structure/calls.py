"""What is run when a model is traced or counted: calls of the model or of some of its submodules.

A Lightning module usually has one call, its ``forward``. Where ``training_step`` never calls ``forward``, the outermost
submodules that it does call stand for the model, one :class:`Call` each.
"""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

_LONGEST, _WIDEST = 4, 200  # numbers of a list and letters of a value that a description shows


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a submodule.

    Attributes:
        module: Dotted name below the model; ``""`` is the model itself.
        args: Positional arguments: tensors, or nested tuples, lists and dicts of them.
        kwargs: Keyword arguments, likewise.
    """

    module: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, model: nn.Module) -> Any:
        """Call the submodule of ``model`` and return what it returns."""
        return model.get_submodule(self.module)(*self.args, **self.kwargs)


def as_calls(example: Any) -> tuple[Call, ...]:
    """Read example inputs the way Lightning reads ``example_input_array``.

    Args:
        example: A tensor (one argument), a tuple or list (positional arguments), a dict with string keys (keyword arguments),
            a :class:`Call`, or a non-empty sequence of :class:`Call`.

    Returns:
        The calls to run, one or more.
    """
    if isinstance(example, Call):
        return (example,)
    if isinstance(example, Sequence) and example and all(isinstance(item, Call) for item in example):
        return tuple(example)
    if isinstance(example, Mapping):
        return (Call("", kwargs=dict(example)),)
    return (Call("", tuple(example) if isinstance(example, tuple | list) else (example,)),)


def signature(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Describe the inputs of ``calls`` in JSON types: module, and per tensor or array its dtype and shape; other values by ``repr``, cut short."""
    return [
        {"module": call.module, "args": _describe(call.args), "kwargs": _describe(dict(call.kwargs))} for call in calls
    ]


def _describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, Mapping):
        return {str(key): _describe(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        if len(value) > _LONGEST and all(isinstance(item, int | float) for item in value):
            return f"{type(value).__name__} of {len(value)} numbers"
        return [_describe(item) for item in value]
    if hasattr(value, "shape") and hasattr(value, "dtype"):  # of numpy, jax, ...
        kind = f"{type(value).__module__}.{type(value).__name__}"
        return {"type": kind, "dtype": str(value.dtype), "shape": list(value.shape)}
    return textwrap.shorten(repr(value), _WIDEST, placeholder=" ...")
