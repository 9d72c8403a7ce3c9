"""Constants moved into a bias: inputs of a layer that are the same number for whatever the model is given."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_prune.errors import PlanError
from lightning_prune.structure.steps.base import Values, swap


@dataclasses.dataclass(frozen=True)
class AbsorbConstants(Values):
    """Add to the bias of a linear layer or convolution what constant inputs contribute, and zero the weights that read them.

    Exact where every output sees all taps of the constant inputs, so not beside zero padding.

    Attributes:
        module: Dotted name of the layer; its weight is ``[outputs, inputs, *taps]``.
        constants: The constant, by index of the input.

    Raises:
        PlanError: If a constant is not finite, or an index no index.
    """

    action: ClassVar[str] = "absorb"
    constants: Mapping[int, float]

    def __post_init__(self) -> None:
        for index, value in self.constants.items():
            if type(index) is not int or index < 0 or type(value) not in (int, float) or not math.isfinite(value):
                raise PlanError(f"Module {self.module!r} cannot absorb the constant {value!r} of input {index!r}.")
        object.__setattr__(self, "constants", dict(sorted(self.constants.items())))

    def find(self, model: nn.Module) -> nn.Module:
        """Return the layer.

        Raises:
            PlanError: If it has no such inputs or no bias.
        """
        module = super().find(model)
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None or weight.ndim < 2 or bias is None:
            raise PlanError(f"The plan moves constants into the bias of {self.module!r}, which has no weight and bias.")
        if self.constants and max(self.constants) >= weight.shape[1]:
            raise PlanError(
                f"The plan knows inputs of {self.module!r} up to {max(self.constants)}; it has {weight.shape[1]}."
            )
        return module

    def emulate(self, model: nn.Module) -> None:
        """Add what the constants contribute to the bias, and zero the weights that read them; a second time this changes nothing."""
        module = self.find(model)
        weight, bias = _parameter(module, "weight"), _parameter(module, "bias")
        inputs = torch.tensor(list(self.constants), device=weight.device, dtype=torch.int64)
        values = torch.tensor(list(self.constants.values()), device=weight.device, dtype=torch.float64)
        taps = weight.data.double()[:, inputs].reshape(len(weight), len(inputs), -1).sum(2)
        swap(bias, (bias.data.double() + taps @ values).to(bias.dtype))
        swap(weight, weight.data.clone().index_fill_(1, inputs, 0))

    def summary(self) -> dict[str, Any]:
        """Return the table row."""
        return {"action": self.action, "before": f"{len(self.constants)} constant inputs", "after": "bias", "kept": 1.0}

    def to_dict(self) -> dict[str, Any]:
        """Return the step in JSON types."""
        return super().to_dict() | {"constants": [[index, value] for index, value in self.constants.items()]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build the step from what :meth:`to_dict` returned."""
        return cls(fields["module"], dict(fields["constants"]))


def _parameter(module: nn.Module, name: str) -> Tensor:
    found = module._parameters[name]
    assert found is not None  # find() has looked
    return found
