"""Inputs of a layer weighted anew: what makes up for inputs that a random draw has left out."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_prune.errors import PlanError
from lightning_prune.structure.steps.base import Values, swap

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclasses.dataclass(frozen=True)
class ScaleInputs(Values):
    """Multiply the weights with which a linear layer or convolution reads some of its inputs; no shape changes.

    Attributes:
        module: Dotted name of the layer; its weight is ``[outputs, inputs / groups, *taps]``.
        gains: Factor, by index of the input, all groups counted through.

    Raises:
        PlanError: If a factor is not finite, or an index no index.
    """

    action: ClassVar[str] = "scale inputs"
    gains: Mapping[int, float]

    def __post_init__(self) -> None:
        for index, gain in self.gains.items():
            if type(index) is not int or index < 0 or type(gain) not in (int, float) or not math.isfinite(gain):
                raise PlanError(f"Module {self.module!r} cannot multiply input {index!r} by {gain!r}.")
        object.__setattr__(self, "gains", {index: float(gain) for index, gain in sorted(self.gains.items())})

    def find(self, model: nn.Module) -> nn.Module:
        """Return the layer.

        Raises:
            PlanError: If it is of another kind, or has no such inputs.
        """
        module = super().find(model)
        if not isinstance(module, _LAYERS):
            raise PlanError(f"The plan scales inputs of {self.module!r}, which is a {type(module).__name__}.")
        inputs = module.weight.shape[1] * getattr(module, "groups", 1)
        if self.gains and max(self.gains) >= inputs:
            raise PlanError(f"The plan scales inputs of {self.module!r} up to {max(self.gains)}; it has {inputs}.")
        return module

    def emulate(self, model: nn.Module) -> None:
        """Multiply; a second time multiplies again."""
        module = self.find(model)
        weight, groups = _weight(module), getattr(module, "groups", 1)
        gains = torch.ones(groups, 1, weight.shape[1], dtype=torch.float64)
        gains.view(-1)[list(self.gains)] = torch.tensor(list(self.gains.values()), dtype=torch.float64)
        rows = gains.expand(groups, len(weight) // groups, -1).reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
        swap(weight, (weight.data.double() * rows.to(weight.device)).to(weight.dtype))

    def summary(self) -> dict[str, Any]:
        """Return the table row: the range of the factors."""
        factors = f"x {min(self.gains.values()):.3g} to {max(self.gains.values()):.3g}" if self.gains else ""
        return {"action": self.action, "before": f"{len(self.gains)} inputs", "after": factors, "kept": 1.0}

    def to_dict(self) -> dict[str, Any]:
        """Return the step in JSON types."""
        return super().to_dict() | {"gains": [[index, gain] for index, gain in self.gains.items()]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build the step from what :meth:`to_dict` returned."""
        return cls(fields["module"], dict(fields["gains"]))


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None  # the kinds of layers that find() lets pass have one
    return weight
