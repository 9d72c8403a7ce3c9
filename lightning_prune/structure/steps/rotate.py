"""Directions of a layer's inputs and outputs left out."""

import base64
import dataclasses
import functools
import math
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.errors import ModelError, PlanError
from lightning_prune.structure.layers import layer_from
from lightning_prune.structure.rotated import (
    FACTORS,
    Directions,
    Form,
    Rotated,
    Specs,
    build_rotated,
    describe_factors,
    factors_of,
    project,
    rotate,
    rotated_specs,
)
from lightning_prune.structure.steps.base import Step, swap

_ORTHONORMAL = 1e-4  # largest entry of (Q^T Q - 1) z for normal z: far above what a basis computed in float32 has


@dataclasses.dataclass(frozen=True)
class Rotate(Step):
    """Keep some directions of the inputs and outputs of a convolution or linear layer (:mod:`lightning_prune.structure.rotated`).

    Attributes:
        module: Dotted name of the layer, plain or rotated already.
        before: Description of its factors by name; of a plain layer only ``core``.
        inputs: Directions of the core's inputs that stay; None for all.
        outputs: Likewise of its outputs.
        separable: Channels of a depthwise core; None for a full one.
        augmented: Whether the bias of a Linear is rotated with its inputs.
        basis_in: The directions, orthonormal columns ``[inputs of the core (+ 1), inputs]``, row-major float64, little-endian, base64. Empty where
            all stay, and in a plan that a model carries.
        basis_out: Likewise ``[outputs of the core, outputs]``.
        weights_in: What an error in each direction counts where the core is made separable, ``[inputs]``, likewise; empty for 1.
        weights_out: Likewise ``[outputs]``.

    Raises:
        PlanError: If the layer has no such form, or the bases do not fit it.
    """

    action: ClassVar[str] = "rotate"
    replaces: ClassVar[bool] = True
    before: Specs
    inputs: int | None
    outputs: int | None
    separable: int | None = None
    augmented: bool = False
    basis_in: str = ""
    basis_out: str = ""
    weights_in: str = ""
    weights_out: str = ""

    def __post_init__(self) -> None:
        unknown = set(self.before) - set(FACTORS)
        if unknown or "core" not in self.before:
            raise PlanError(
                f"Module {self.module!r}: the factors of a layer are {', '.join(FACTORS)}, got {', '.join(self.before)}."
            )
        object.__setattr__(self, "before", {name: dict(self.before[name]) for name in FACTORS if name in self.before})
        counts = (self.inputs, self.outputs, self.separable)
        if not all(count is None or type(count) is int for count in counts) or type(self.augmented) is not bool:
            raise PlanError(
                f"Module {self.module!r}: numbers of directions are integers or None, got {counts!r}, {self.augmented!r}."
            )
        try:
            for spec in (*self.before.values(), *rotated_specs(self.before, self.form).values()):
                layer_from(spec, device="meta")
        except ModelError as error:
            raise PlanError(f"Module {self.module!r}: {error}") from error
        for name in ("basis_in", "basis_out"):
            basis = self._unpacked(name)
            if basis is not None and not _is_orthonormal(basis):
                raise PlanError(f"Module {self.module!r}: the columns of {name} are not orthonormal.")
        for name in ("weights_in", "weights_out"):
            weights = self._unpacked(name)
            if weights is not None and bool((weights < 0).any()):
                raise PlanError(f"Module {self.module!r}: {name} holds negative numbers.")

    @classmethod
    def of(cls, module: str, layer: nn.Module, directions: Directions) -> Self:
        """Make the step for ``layer``, plain or rotated, which ``module`` names.

        Args:
            module: Dotted name.
            layer: The layer as it is.
            directions: Those that stay.
        """
        values = (directions.inputs, directions.outputs, directions.weights_in, directions.weights_out)
        form = dataclasses.astuple(directions.form)
        return cls(module, describe_factors(layer), *form, *("" if v is None else _pack(v) for v in values))

    @property
    def form(self) -> Form:
        """How many directions stay."""
        return Form(self.inputs, self.outputs, self.separable, self.augmented)

    @functools.cached_property
    def directions(self) -> Directions:
        """The directions that stay.

        Raises:
            PlanError: If the step does not hold them any more.
        """
        found = {name: self._unpacked(name) for name in ("basis_in", "basis_out", "weights_in", "weights_out")}
        gone = [
            name
            for name, count in (("basis_in", self.inputs), ("basis_out", self.outputs))
            if count and found[name] is None
        ]
        if gone:
            raise PlanError(
                f"The plan keeps directions of {self.module!r} but not which ({', '.join(gone)}): it was taken from a model that has left the "
                "others out already. Give such a plan to build, not to compact."
            )
        return Directions(
            found["basis_in"],
            found["basis_out"],
            self.separable,
            self.augmented,
            found["weights_in"],
            found["weights_out"],
        )

    def find(self, model: nn.Module) -> nn.Module:
        """Return the layer.

        Raises:
            PlanError: If the module is not the layer that the plan was made for.
        """
        layer = super().find(model)
        try:
            found = describe_factors(layer)
        except ModelError as error:
            raise PlanError(f"Module {self.module!r} cannot be rotated: {error}") from error
        for name in FACTORS:
            if found.get(name) != self.before.get(name):
                raise PlanError(
                    f"Module {self.module!r} has as its {name} {found.get(name)!r}; the plan was made for {self.before.get(name)!r}."
                )
        return layer

    def build(self, model: nn.Module) -> None:
        """Put the rotated layer in the place of the layer, values undefined."""
        model.set_submodule(self.module, build_rotated(self.find(model), self.form))

    def emulate(self, model: nn.Module) -> None:
        """Project the weight of the core onto the directions that stay."""
        layer = self.find(model)
        core = factors_of(layer)["core"]
        weight, bias = project(layer, self.directions)
        for parameter, values in ((core.weight, weight), (core.bias, bias)):
            if parameter is not None and values is not None:
                swap(parameter, torch.empty_like(parameter.data).copy_(values))

    def apply(self, model: nn.Module) -> None:
        """Put the factors of the projected layer in its place."""
        model.set_submodule(self.module, rotate(self.find(model), self.directions))

    def settled(self) -> Self:
        """Return the step without bases and weights."""
        return dataclasses.replace(self, basis_in="", basis_out="", weights_in="", weights_out="")

    def undo(self, model: nn.Module) -> None:
        """Put a layer as it was before, values undefined, in the place of the rotated one."""
        small = model.get_submodule(self.module)
        old = factors_of(small)["core"].weight
        factors = {
            name: layer_from(spec, device=old.device, dtype=old.dtype).requires_grad_(old.requires_grad)
            for name, spec in self.before.items()
        }
        layer = factors["core"] if set(factors) == {"core"} else Rotated(factors)
        model.set_submodule(self.module, layer.train(small.training))

    def facts(self) -> dict[str, float]:
        """Return how many directions and terms stay, of those that are left out."""
        counts = {"inputs": self.inputs, "outputs": self.outputs, "terms": self.separable}
        return {name: count for name, count in counts.items() if count is not None}

    def removed(self) -> int:
        """Return how many weights fewer the factors have."""
        before, after = (
            sum(layer_from(spec, device="meta").weight.numel() for spec in specs.values())
            for specs in (self.before, rotated_specs(self.before, self.form))
        )
        return before - after

    def summary(self) -> dict[str, Any]:
        """Return the table row: the layer, its factors, their share of its parameters."""
        layers = [
            [layer_from(spec, device="meta") for spec in specs.values()]
            for specs in (self.before, rotated_specs(self.before, self.form))
        ]
        before, after = (sum(p.numel() for layer in side for p in layer.parameters()) for side in layers)
        shapes = [" + ".join("x".join(map(str, layer.weight.shape)) for layer in side) for side in layers]
        kept = ", ".join(f"{count} {name}" for name, count in self.facts().items())
        return {
            "action": f"{self.action}, {kept}",
            "before": f"{self.before['core']['type']} {shapes[0]}",
            "after": shapes[1],
            "kept": after / before,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the step in JSON types; values that it does not hold are missing."""
        fields = super().to_dict()
        held = {
            key: value
            for key, value in fields.items()
            if value or key not in ("basis_in", "basis_out", "weights_in", "weights_out")
        }
        return held | {"before": {name: dict(spec) for name, spec in self.before.items()}}

    def _unpacked(self, name: str) -> Tensor | None:
        """Read a basis or weights, which must have the right number of entries, all finite."""
        text: str = getattr(self, name)
        if not text:
            return None
        side = "inputs" if name.endswith("_in") else "outputs"
        count = getattr(self, side)
        core = self.before["core"]
        whole = core["in"] + self.augmented if side == "inputs" else core["out"]
        shape = (whole, count or whole) if name.startswith("basis") else (count or whole,)
        if (count is None and len(shape) == 2) or len(text) != 4 * -(-8 * math.prod(shape) // 3):
            raise PlanError(f"Module {self.module!r}: {name} does not hold {list(shape)} numbers.")
        values = torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), "<f8").astype(np.float64)).view(
            shape
        )
        if not bool(values.isfinite().all()):
            raise PlanError(f"Module {self.module!r}: {name} holds numbers that are not finite.")
        return values


def _pack(values: Tensor) -> str:
    return base64.b64encode(values.detach().cpu().double().contiguous().numpy().astype("<f8").tobytes()).decode()


def _is_orthonormal(basis: Tensor) -> bool:
    """Tell by a few random vectors, which is much cheaper than the Gram matrix."""
    probe = torch.randn(basis.shape[1], 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return bool(((basis.T @ (basis @ probe) - probe).abs() < _ORTHONORMAL).all())
