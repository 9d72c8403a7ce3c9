"""One operation in the graph: what a rule may ask of it and tell about it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from lightning_prune.structure.tracing.labels import Absorbed, Labels, Size, Term
from lightning_prune.structure.tracing.values import Field, Value, core

_PARAMETRIZED = ".parametrizations."  # in the names of modules that compute a tensor of the layer before it


@dataclasses.dataclass(frozen=True)
class Site:
    """An operation in the graph of a call.

    Attributes:
        labels: Collects the ties.
        node: Its node.
        target: The operation.
        owner: Name of the innermost module whose code runs it.
        where: File and line of that code.
        code: The line.
        model: The model.
        training: Whether the graph is of train mode.
        computing: Names of the modules whose code runs it and makes its operands, the innermost ones; its own first.
    """

    labels: Labels
    node: fx.Node
    target: torch._ops.OpOverload
    owner: str
    where: str
    code: str
    model: nn.Module
    training: bool
    computing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the operation, with the line that calls it."""
        return f"{self.target._schema.name.removeprefix('aten::')} ({self.place})"

    @property
    def place(self) -> str:
        """The line that calls the operation; the module where no line of the user's does."""
        module = f"module {self.owner!r}" if self.owner else "the model itself"
        return f"{self.where} `{self.code}`" if self.where else module

    @property
    def module(self) -> nn.Module:
        """The innermost module whose code runs the operation."""
        return self.model.get_submodule(self.owner)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        example = self.node.meta["val"]
        return tuple((example[0] if isinstance(example, tuple | list) else example).shape)

    def outputs(self) -> Any:
        """Return values without fields in the form of the operation's outputs."""
        example = self.node.meta.get("val")
        if isinstance(example, Tensor):
            return Value(tuple(example.shape))
        if isinstance(example, tuple | list):
            return tuple(Value(tuple(t.shape)) if isinstance(t, Tensor) else t for t in example)
        return example

    def freeze(self, field: Field, reason: str) -> None:
        """Let the labels of a field never leave; a parametrization that is in the way is named with the remedy."""
        remedies = list(filter(None, map(self._remedy, self.computing)))
        if remedies and _PARAMETRIZED in f".{self.owner}":
            reason = remedies[0]
        self.labels.freeze(field.labels, "; ".join(dict.fromkeys([reason, *remedies])))

    def _remedy(self, owner: str) -> str:
        """Return how a tensor is computed, and how that ends, if ``owner`` is part of a parametrization."""
        layer, inside, rest = f".{owner}".partition(_PARAMETRIZED)
        if not inside:
            return ""
        layer, tensor = layer.strip("."), rest.split(".")[0]
        kinds = self.model.get_submodule(f"{layer}.parametrizations.{tensor}".strip("."))
        named = ", ".join(type(kind).__name__.strip("_") for kind in kinds.children())
        whole = f"the {tensor} of " + (repr(layer) if layer else "the model itself")
        return (
            f"{whole} is computed as a whole by a parametrization ({named}): "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor!r}) makes it a plain parameter"
        )

    def freeze_all(self, value: Value | None, reason: str) -> None:
        """Let no label of a value leave."""
        for field in value.fields if value is not None else ():
            self.freeze(field, reason)

    def ignore(self, value: Any) -> None:
        """Note that the operation reads nothing of ``value`` but what no removal changes: its type, its device."""
        for field in value.fields if isinstance(value, Value) else ():
            self.labels.touch(field.labels)

    def cost(self, factor: int, axes: Sequence[Tensor], divisor: int = 1) -> None:
        """Note multiply-adds that follow the number of kept labels; counted in eval mode only."""
        if axes and not self.training:
            vectors = tuple(core(axis).flatten().numpy() for axis in axes)
            self.labels.terms.append(Term(factor, vectors, divisor))

    def sized(self, before: int, field: Field | Tensor, axis: int, attribute: str | None = None) -> None:
        """Note a number in the code of this module that must follow when labels along ``axis`` leave.

        Args:
            before: The number in the dense model.
            field: The labels it counts.
            axis: The axis of them that it counts.
            attribute: The attribute of the module that holds it; None if that is not known.
        """
        tensor = field.labels if isinstance(field, Field) else field
        if isinstance(before, int) and before > 0:
            rows = core(tensor).movedim(axis, 0)
            if rows.shape[0] != tensor.shape[axis]:
                rows = rows.expand(tensor.shape[axis], *rows.shape[1:])
            found = np.ascontiguousarray(rows.reshape(rows.shape[0], -1).numpy())
            self.labels.sizes.append(Size(self.owner, attribute, before, found, self.node.name, self.place))

    def absorb(self, weight: Value, bias: Value | None, at: float) -> bool:
        """Let the bias take up channels that are the constant ``at``; return whether it can: it belongs to this weight ``[out, in, ...]`` alone."""
        if weight.source is None or bias is None or bias.source is None:
            return False
        if weight.source.rpartition(".")[0] != bias.source.rpartition(".")[0] or bias.shape != weight.shape[:1]:
            return False
        if len(self.labels.biases.get(bias.source, ())) != 1:
            return False
        if weight.source in self.labels.absorbed and self.labels.absorbed[weight.source].value != at:
            return False
        self.labels.absorbed[weight.source] = Absorbed(weight.source, bias.source, at)
        return True
