"""A convolution written as one linear map over its flattened input."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import nn

from lightning_prune.errors import ModelError, PlanError
from lightning_prune.structure.layers import Conv, describe, layer_from
from lightning_prune.structure.steps.factorize import Replacement
from lightning_prune.structure.unrolled import build_unrolled, unroll, unrolled_shapes


@dataclasses.dataclass(frozen=True)
class Unroll(Replacement):
    """Write a convolution as a linear map for inputs of one size (:mod:`lightning_prune.structure.unrolled`), its submodule ``linear``.

    The function stays, so that :meth:`emulate` does what :meth:`apply` does; what becomes of the linear map is for a later step to say.

    Attributes:
        module: Dotted name of the convolution.
        before: Its description (:func:`lightning_prune.structure.layers.describe`).
        extent: Size of its input, without batch and channels.

    Raises:
        PlanError: If the convolution takes no such input.
    """

    action: ClassVar[str] = "unroll"
    before: Mapping[str, Any]
    extent: Sequence[int]

    def __post_init__(self) -> None:
        layer = layer_from(self.before, device="meta")
        if isinstance(layer, nn.Linear) or not all(type(size) is int and size >= 1 for size in self.extent):
            raise PlanError(
                f"Module {self.module!r}: a {self.before['type']} is not unrolled for maps of {self.extent!r}."
            )
        try:
            unrolled_shapes(layer, self.extent)
        except ModelError as error:
            raise PlanError(f"Module {self.module!r}: {error}") from error

    @classmethod
    def of(cls, module: str, layer: Conv, extent: Sequence[int]) -> Self:
        """Make the step for ``layer``, which ``module`` names."""
        return cls(module, describe(layer), list(extent))

    def build(self, model: nn.Module) -> None:
        """Put the linear map in the place of the convolution, values undefined."""
        model.set_submodule(self.module, build_unrolled(self.find(model), self.extent))  # type: ignore[arg-type]

    def emulate(self, model: nn.Module) -> None:
        """Do what :meth:`apply` does."""
        self.apply(model)

    def apply(self, model: nn.Module) -> None:
        """Put the linear map in the place of the convolution."""
        model.set_submodule(self.module, unroll(self.find(model), self.extent))  # type: ignore[arg-type]

    def facts(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Return the table row: the convolution and the linear map; nothing has left by that."""
        layer: Any = layer_from(self.before, device="meta")
        made: Any = build_unrolled(layer, self.extent)
        return {
            "action": f"unrolled for {'x'.join(map(str, made.inputs))}",
            "before": f"{self.before['type']} {'x'.join(map(str, layer.weight.shape))}",
            "after": f"Linear {'x'.join(map(str, made.linear.weight.shape))}",
            "kept": 1.0,
        }
