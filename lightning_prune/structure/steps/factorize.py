"""A layer replaced by two thinner ones."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lightning_prune.errors import ModelError, PlanError
from lightning_prune.structure.factorized import Kind, build_factorized, factorize, groups_of, matrix_of, weight_of
from lightning_prune.structure.layers import DenseLayer, describe, is_plain, layer_from
from lightning_prune.structure.spectrum import project
from lightning_prune.structure.steps.base import Step, swap


class Replacement(Step):
    """A step that puts another module in the place of a dense layer, which ``before`` describes."""

    before: Mapping[str, Any]

    def find(self, model: nn.Module) -> DenseLayer:
        """Return the dense layer.

        Raises:
            PlanError: If the module is not the layer that the plan was made for.
        """
        layer = super().find(model)
        if not is_plain(layer):
            raise PlanError(
                f"Module {self.module!r} is a {type(layer).__name__}; the plan was made for a {self.before['type']}."
            )
        found = describe(layer)
        for key, expected in self.before.items():
            if found.get(key) != expected:
                raise PlanError(
                    f"Module {self.module!r} has {key} {found.get(key)!r}; the plan was made for {expected!r}."
                )
        return layer

    def undo(self, model: nn.Module) -> None:
        """Put a dense layer, values undefined, in the place of what replaced it."""
        small = model.get_submodule(self.module)
        old = next(small.parameters())
        trained = any(p.requires_grad for p in small.parameters())
        layer = layer_from(self.before, device=old.device, dtype=old.dtype).requires_grad_(trained)
        model.set_submodule(self.module, layer.train(small.training))

    def to_dict(self) -> dict[str, Any]:
        """Return the step in JSON types."""
        return super().to_dict() | {"before": dict(self.before)}


@dataclasses.dataclass(frozen=True)
class Factorize(Replacement):
    """Replace a convolution or linear layer by two thinner ones in a row.

    Attributes:
        module: Dotted name of the layer.
        kind: ``"channel"``, ``"spatial"`` or ``"linear"`` (:mod:`lightning_prune.structure.factorized`).
        rank: Width between the two, per group of a grouped convolution.
        before: Description of the dense layer (:func:`lightning_prune.structure.layers.describe`).
    """

    action: ClassVar[str] = "factorize"
    replaces: ClassVar[bool] = True
    kind: Kind
    rank: int
    before: Mapping[str, Any]

    @classmethod
    def of(cls, module: str, layer: nn.Module, kind: Kind, rank: int) -> Self:
        """Make the step for ``layer``, which ``module`` names."""
        return cls(module, kind, rank, describe(layer))

    def build(self, model: nn.Module) -> None:
        """Put the factorized layer in the place of the dense one, values undefined."""
        model.set_submodule(self.module, build_factorized(self.find(model), self.kind, self.rank))

    def emulate(self, model: nn.Module) -> None:
        """Truncate the weight of the dense layer to the rank."""
        layer = self.find(model)
        matrix = matrix_of(layer.weight.detach(), self.kind, groups_of(layer))
        truncated = weight_of(project(matrix, self.rank), self.kind, layer.weight.shape)
        swap(layer.weight, torch.empty_like(layer.weight.data).copy_(truncated))

    def apply(self, model: nn.Module) -> None:
        """Put the factors of the truncated weight in the place of the dense layer."""
        model.set_submodule(self.module, factorize(self.find(model), self.kind, self.rank))

    def facts(self) -> dict[str, float]:
        """Return the rank."""
        return {"rank": self.rank}

    def removed(self) -> int:
        """Return how many weights fewer the two factors have."""
        layer = layer_from(self.before, device="meta")
        small = build_factorized(layer, self.kind, self.rank)
        return layer.weight.numel() - small.first.weight.numel() - small.second.weight.numel()

    def summary(self) -> dict[str, Any]:
        """Return the table row: the layer, its two factors, their share of the dense parameters."""
        layer = layer_from(self.before, device="meta")
        small = build_factorized(layer, self.kind, self.rank)
        before, after = (sum(p.numel() for p in module.parameters()) for module in (layer, small))
        shapes = ["x".join(map(str, part.weight.shape)) for part in (layer, small.first, small.second)]
        return {
            "action": f"{self.kind}, rank {self.rank}",
            "before": f"{self.before['type']} {shapes[0]}",
            "after": f"{shapes[1]} + {shapes[2]}",
            "kept": after / before,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build the step, checking that the layer has such a form and rank."""
        step = cls(**fields)
        if type(step.rank) is not int:
            raise PlanError(f"Module {step.module!r}: the rank {step.rank!r} is no integer.")
        try:
            step.summary()
        except ModelError as error:
            raise PlanError(f"Module {step.module!r}: {error}") from error
        return step
