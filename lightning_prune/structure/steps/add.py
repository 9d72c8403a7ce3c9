"""A parameter changed once: what makes up, in the weights that stay, for those that leave."""

import base64
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.errors import PlanError
from lightning_prune.structure.steps.base import Values, settle, swap


@dataclasses.dataclass(frozen=True)
class AddToWeight(Values):
    """Add a tensor to a parameter; no shape changes.

    Attributes:
        module: Dotted name of the module that owns the parameter.
        parameter: Its name there.
        shape: Its shape.
        values: What is added, row-major, float64 or float32, little-endian, base64; empty in a plan that a model carries.
    """

    action: ClassVar[str] = "update weight"
    parameter: str
    shape: tuple[int, ...]
    values: str = ""

    @classmethod
    def of(cls, module: str, parameter: str, change: Tensor) -> Self:
        """Make the step.

        Args:
            module: Dotted name of the owning module.
            parameter: Name of the parameter there.
            change: What is added, in the shape of the parameter; kept as float64 if it is that, otherwise as float32.
        """
        wide = change.detach().cpu()
        array = wide.numpy().astype("<f8") if wide.dtype == torch.float64 else wide.float().numpy().astype("<f4")
        return cls(module, parameter, tuple(change.shape), base64.b64encode(array.tobytes()).decode())

    @property
    def once(self) -> bool:
        """Whether there is anything to add."""
        return bool(self.values)

    @property
    def change(self) -> Tensor:
        """What is added, ``[*shape]``, float64, on the CPU; zeros once it has been."""
        if not self.values:
            return torch.zeros(self.shape, dtype=torch.float64)
        data = base64.b64decode(self.values)
        kind = "<f8" if len(data) == 8 * math.prod(self.shape) else "<f4"
        return torch.from_numpy(np.frombuffer(data, kind).astype(np.float64)).view(self.shape)

    def find(self, model: nn.Module) -> nn.Module:
        """Return the owning module.

        Raises:
            PlanError: If it has no such parameter of this shape.
        """
        module = super().find(model)
        parameter = dict(module.named_parameters(recurse=False)).get(self.parameter)
        if parameter is None or tuple(parameter.shape) != self.shape:
            found = "no such parameter" if parameter is None else f"shape {list(parameter.shape)}"
            raise PlanError(
                f"The plan changes {self.parameter!r} of {self.module!r}, of shape {list(self.shape)}; the model has {found} there."
            )
        return module

    def emulate(self, model: nn.Module) -> None:
        """Add; a second time adds again."""
        module = self.find(model)
        parameter = getattr(module, self.parameter)
        swap(parameter, (parameter.data.to("cpu", torch.float64) + self.change).to(parameter))
        settle(module)

    def settled(self) -> Self:
        """Return the step without values."""
        return dataclasses.replace(self, values="")

    def summary(self) -> dict[str, Any]:
        """Return the table row: the shape, which stays."""
        shape = "x".join(map(str, self.shape))
        return {"action": f"update {self.parameter}", "before": shape, "after": shape, "kept": 1.0}

    def to_dict(self) -> dict[str, Any]:
        """Return the step in JSON types."""
        return {key: value for key, value in super().to_dict().items() if key != "values" or value}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build the step, checking that there is a finite number for every entry.

        Raises:
            PlanError: Otherwise.
        """
        step = cls(fields["module"], fields["parameter"], tuple(fields["shape"]), fields.get("values", ""))
        size, count = len(base64.b64decode(step.values, validate=True)), math.prod(step.shape)
        if step.values and (size not in (4 * count, 8 * count) or not bool(step.change.isfinite().all())):
            raise PlanError(
                f"The change of {step.parameter!r} of {step.module!r} is no finite number for each entry of its shape {list(step.shape)}."
            )
        return step
