"""Slices of tensors removed for good: channels, heads, hidden units.

A :class:`~lightning_prune.structure.steps.cut.Cut` says how one tensor shrinks, a :class:`KeepChannels` step what that makes of a module: its
parameters and buffers, and the sizes it keeps as attributes. Who must shrink with whom is not known here: a plan holds a step for each module,
and the steps fit together.

Parameters stay the same objects. Ties, hooks, order, ``requires_grad``, dtype, device and memory format are what they were.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_prune.errors import PlanError
from lightning_prune.structure.steps.base import Step, settle, swap
from lightning_prune.structure.steps.cut import Cut, memory_format

Size = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class KeepChannels(Step):
    """Remove slices of the parameters and buffers of one module.

    Attributes:
        module: Dotted name of the module; ``""`` is the model itself.
        tensors: How its own parameters and buffers shrink, by their names inside it. A tied parameter is listed once in a plan, under the
            first of its names.
        attributes: Sizes that the module keeps as plain attributes, by name: before and after, each an integer or several.
        absorb: The removed inputs of ``tensors[absorb["weight"]]``, its axis 1, are the constant ``absorb["value"]`` in the masked
            model, and no zero padding stands beside them: what they add moves into the parameter ``absorb["bias"]``. None if that
            constant is zero.

    Raises:
        PlanError: If it is no such step.
    """

    action: ClassVar[str] = "channels"
    tensors: Mapping[str, Cut]
    attributes: Mapping[str, tuple[Size, Size]] = dataclasses.field(default_factory=dict)
    absorb: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        sizes = {
            name: tuple(_size(self.module, name, value) for value in pair) for name, pair in self.attributes.items()
        }
        if not all(len(pair) == 2 and type(pair[0]) is type(pair[1]) for pair in sizes.values()):
            raise PlanError(
                f"Attributes of {self.module!r} go from one size to another, got {dict(self.attributes)!r}."
            )
        object.__setattr__(self, "attributes", sizes)
        object.__setattr__(self, "tensors", dict(self.tensors))
        if self.absorb is not None:
            self._check_absorb(self.absorb)
            object.__setattr__(self, "absorb", {**self.absorb, "value": float(self.absorb["value"])})

    def _check_absorb(self, absorb: Mapping[str, Any]) -> None:
        if set(absorb) != {"weight", "bias", "value"} or {type(absorb[key]) for key in ("weight", "bias")} != {str}:
            raise PlanError(
                f"What {self.module!r} absorbs is given by 'weight', 'bias' and 'value', got {dict(absorb)!r}."
            )
        if type(absorb["value"]) not in (int, float) or not abs(absorb["value"]) <= sys.float_info.max:
            raise PlanError(f"Module {self.module!r} cannot absorb the constant {absorb['value']!r}.")
        cut = self.tensors.get(absorb["weight"])
        if cut is None or (1 not in cut.keep and cut.grid is None):
            raise PlanError(f"Module {self.module!r} loses no inputs of {absorb['weight']!r} that it could absorb.")

    def key(self, name: str) -> str:
        """Full name of the tensor that is called ``name`` inside the module."""
        return f"{self.module}.{name}" if self.module else name

    def find(self, model: nn.Module) -> nn.Module:
        """Return the module; the model itself may be one.

        Raises:
            PlanError: If its tensors or attributes are not those that the plan was made for.
        """
        module = self._find(model, after=False)
        if self.absorb is not None:
            name, expected = self.absorb["bias"], [self.tensors[self.absorb["weight"]].shape[0]]
            bias = module._parameters.get(name)
            if bias is None or list(bias.shape) != expected:
                found = "no such parameter" if bias is None else f"shape {list(bias.shape)}"
                raise PlanError(
                    f"The plan moves constants into {name!r} of module {self.module!r}, expected shape {expected}; the model has {found}."
                )
        return module

    def _find(self, model: nn.Module, after: bool) -> nn.Module:
        module = super().find(model) if self.module else model
        where = f"module {self.module!r}" if self.module else "the model itself"
        for name, cut in self.tensors.items():
            tensor, expected = _tensor(module, name), list(cut.after if after else cut.shape)
            if tensor is None or list(tensor.shape) != expected:
                found = "no such tensor" if tensor is None else f"shape {list(tensor.shape)}"
                raise PlanError(f"The plan cuts {name!r} of {where}, expected shape {expected}; the model has {found}.")
        for name, pair in self.attributes.items():
            value = vars(module).get(name)
            if _plain(value) != pair[after]:
                raise PlanError(
                    f"The plan changes {name!r} of {where}, expected {pair[after]}; the model has {value!r}."
                )
        return module

    def build(self, model: nn.Module) -> None:
        """Give tensors and attributes their sizes; values that no state dict brings are cut, others are undefined."""
        module = self.find(model)
        for name, cut in self.tensors.items():
            tensor = _held(module, name)
            persistent = name not in module._non_persistent_buffers_set
            swap(tensor, _empty(tensor, cut.after) if persistent else cut.select(tensor.data))
        self._set(module, after=True)

    def emulate(self, model: nn.Module) -> None:
        """Zero the slices where the removed channels come from."""
        module = self.find(model)
        for name, mask in self.held():
            tensor = _held(module, name)
            swap(tensor, tensor.data.clone().masked_fill_(~mask.to(tensor.device), 0))
        settle(module)

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of which the masked model holds slices at zero, and where they may differ from it: boolean, broadcasts."""
        for name, cut in self.tensors.items():
            mask = cut.zero_mask()
            if mask is not None:
                yield name, mask

    def apply(self, model: nn.Module) -> None:
        """Move constants into the bias, then cut."""
        module = self.find(model)
        if self.absorb is not None:
            bias = _held(module, self.absorb["bias"])
            swap(bias, bias.data + self._constants(module, **self.absorb).to(bias.dtype))
        for name, cut in self.tensors.items():
            tensor = _held(module, name)
            swap(tensor, cut.select(tensor.data))
        self._set(module, after=True)

    def _constants(self, module: nn.Module, weight: str, bias: str, value: float) -> Tensor:
        """What the removed inputs add to each entry of ``bias``, ``[shape[0]]``, float64."""
        values, stays = _held(module, weight).data, self.tensors[weight].inputs
        stays = stays.view(*stays.shape, *[1] * (values.ndim - 2)).to(values.device)
        return value * values.masked_fill(stays, 0).flatten(1).sum(1, dtype=torch.float64)

    def undo(self, model: nn.Module) -> None:
        """Give tensors and attributes their sizes from before; values are undefined.

        Raises:
            PlanError: If the module is not as this step left it, or a buffer was cut that no state dict brings back.
        """
        module = self._find(model, after=True)
        lost = sorted(set(self.tensors) & module._non_persistent_buffers_set)
        if lost:
            raise PlanError(
                f"Module {self.module!r} cannot get its old shapes again: values of its buffer {lost[0]!r}, which is not part of the state "
                "dict, are gone. Construct the model anew."
            )
        for name, cut in self.tensors.items():
            tensor = _held(module, name)
            swap(tensor, _empty(tensor, cut.shape))
        self._set(module, after=False)

    def _set(self, module: nn.Module, after: bool) -> None:
        for name, pair in self.attributes.items():
            old, new = getattr(module, name), pair[after]
            setattr(module, name, type(old)(new) if isinstance(new, tuple) else new)
        settle(module)

    def facts(self) -> dict[str, float]:
        """Return nothing: the share kept says it all."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Return the table row: shapes of the largest tensor, or the sizes where no tensor is cut; the share of the cut tensors kept."""
        row: dict[str, Any] = {"action": self.action}
        if not self.tensors:
            texts = [", ".join(f"{name} {pair[i]}" for name, pair in self.attributes.items()) for i in (0, 1)]
            return row | {"before": texts[0], "after": texts[1], "kept": 1.0}
        largest = max(self.tensors.values(), key=lambda cut: math.prod(cut.shape))
        before, after = (sum(map(math.prod, shapes)) for shapes in zip(*self._shapes(), strict=True))
        shapes = ["x".join(map(str, shape)) for shape in (largest.shape, largest.after)]
        return row | {"before": shapes[0], "after": shapes[1], "kept": after / before}

    def _shapes(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [(cut.shape, cut.after) for cut in self.tensors.values()]

    def to_dict(self) -> dict[str, Any]:
        """Return the step in JSON types."""
        sizes = {
            name: [list(size) if isinstance(size, tuple) else size for size in pair]
            for name, pair in self.attributes.items()
        }
        tensors = {name: cut.to_dict() for name, cut in self.tensors.items()}
        absorb = None if self.absorb is None else dict(self.absorb)
        return super().to_dict() | {"tensors": tensors, "attributes": sizes, "absorb": absorb}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build the step from what :meth:`to_dict` returned, or from a file that nobody vouches for.

        Raises:
            PlanError: If it is none.
        """
        try:
            tensors = {name: Cut.from_dict(cut) for name, cut in fields["tensors"].items()}
            attributes = {name: tuple(pair) for name, pair in fields["attributes"].items()}
            return cls(**{**fields, "tensors": tensors, "attributes": attributes})
        except PlanError as error:
            raise PlanError(f"Module {fields['module']!r}: {error}") from error


def _empty(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format(tensor))


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    return module._parameters.get(name, module._buffers.get(name))


def _held(module: nn.Module, name: str) -> Tensor:
    tensor = _tensor(module, name)
    assert tensor is not None  # find() has looked
    return tensor


def _plain(value: Any) -> Any:
    """Return a size as the plan holds it; None if ``value`` is not one."""
    if isinstance(value, tuple | list) and all(type(item) is int for item in value):
        return tuple(value)
    return value if type(value) is int else None


def _size(module: str, name: str, value: Any) -> Size:
    size: Size | None = _plain(value)
    if size is None:
        raise PlanError(f"Attribute {name!r} of module {module!r} is an integer or several, got {value!r}.")
    return size
