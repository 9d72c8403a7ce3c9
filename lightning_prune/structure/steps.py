"""The steps of a plan: one change of one module each, as data that can be explained, built, applied and undone."""

import base64
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_prune.errors import ModelError, PlanError
from lightning_prune.structure.factorized import Kind, build_factorized, factorize, groups_of, matrix_of, weight_of
from lightning_prune.structure.layers import DenseLayer, describe, is_plain, layer_from
from lightning_prune.structure.spectrum import project


@dataclasses.dataclass(frozen=True)
class Step:
    """One change of one module. Subclasses say which.

    Attributes:
        module: Dotted name of the module in the model as the steps before left it.
    """

    action: ClassVar[str]
    module: str

    def build(self, model: nn.Module) -> None:
        """Give ``model`` the shapes of this step, in place; values of new parameters are undefined.

        Raises:
            PlanError: If the module is missing or is not the one that the step was made for.
        """
        raise NotImplementedError

    def emulate(self, model: nn.Module) -> None:
        """Give the weights of ``model`` the values that this step stands for, shapes kept, in place."""
        raise NotImplementedError

    def apply(self, model: nn.Module) -> None:
        """Turn values into smaller values: what :meth:`emulate` computes, in the shapes of :meth:`build`, in place."""
        raise NotImplementedError

    def undo(self, model: nn.Module) -> None:
        """Give ``model`` the shapes from before this step again, in place; values of new parameters are undefined."""
        raise NotImplementedError

    def summary(self) -> dict[str, Any]:
        """Return the table row of this step: ``action``, ``before``, ``after``, ``kept`` (share of the module's weights)."""
        raise NotImplementedError

    def facts(self) -> dict[str, float]:
        """Return what loggers are told of this step beside the share kept, by name."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return the step in JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"action": self.action, **fields}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build the step from what :meth:`to_dict` returned."""
        return cls(**fields)

    def find(self, model: nn.Module) -> nn.Module:
        """Return the module that this step names.

        Raises:
            PlanError: If there is none, or it is the model itself.
        """
        if not self.module:
            raise PlanError(
                "A plan cannot change the model itself, only modules inside it. Wrap the layer in a module."
            )
        try:
            return model.get_submodule(self.module)
        except AttributeError as error:
            raise PlanError(
                f"The plan changes module {self.module!r}, which {type(model).__name__} does not have."
            ) from error


@dataclasses.dataclass(frozen=True)
class MaskWeight(Step):
    """Hold some entries of one parameter at zero.

    Attributes:
        module: Dotted name of the module that owns the parameter.
        parameter: Its name there.
        shape: Its shape.
        bits: One bit per entry, row-major, 1 = kept, packed eight to a byte, base64.
    """

    action: ClassVar[str] = "mask"
    parameter: str
    shape: tuple[int, ...]
    bits: str

    @classmethod
    def of(cls, module: str, parameter: str, mask: Tensor) -> Self:
        """Make the step from a boolean mask.

        Args:
            module: Dotted name of the owning module.
            parameter: Name of the parameter there.
            mask: True where the entry is kept, ``[*parameter.shape]``, boolean.
        """
        flat = mask.detach().cpu().flatten().to(torch.uint8)
        flat = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)]).view(-1, 8)
        packed = (flat << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
        return cls(module, parameter, tuple(mask.shape), base64.b64encode(packed.numpy().tobytes()).decode())

    @functools.cached_property
    def mask(self) -> Tensor:
        """The mask, ``[*shape]``, boolean, on the CPU."""
        packed = torch.frombuffer(bytearray(base64.b64decode(self.bits, validate=True)), dtype=torch.uint8)
        flat = (packed[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1
        return flat.flatten()[: math.prod(self.shape)].view(self.shape).bool()

    @property
    def key(self) -> str:
        """Full name of the parameter."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    def find(self, model: nn.Module) -> nn.Module:
        """Return the owning module; a mask may also lie on a parameter of the model itself.

        Raises:
            PlanError: If it has no such parameter of this shape.
        """
        module = super().find(model) if self.module else model
        parameter = dict(module.named_parameters(recurse=False)).get(self.parameter)
        if parameter is None or tuple(parameter.shape) != self.shape:
            found = "no such parameter" if parameter is None else f"shape {list(parameter.shape)}"
            raise PlanError(f"The plan masks {self.key!r} of shape {list(self.shape)}; the model has {found} there.")
        return module

    def build(self, model: nn.Module) -> None:
        """Check that the parameter is there; a mask changes no shape."""
        self.find(model)

    def emulate(self, model: nn.Module) -> None:
        """Zero the entries that the mask removes."""
        parameter = getattr(self.find(model), self.parameter)
        with torch.no_grad():
            parameter.mul_(self.mask.to(parameter.device))

    def apply(self, model: nn.Module) -> None:
        """Zero the entries that the mask removes."""
        self.emulate(model)

    def undo(self, model: nn.Module) -> None:
        """Do nothing: a mask changes no shape."""

    def facts(self) -> dict[str, float]:
        """Return the share of entries that are held at zero."""
        return {"sparsity": 1 - float(self.mask.double().mean())}

    def summary(self) -> dict[str, Any]:
        """Return the table row: shape before, number of entries kept."""
        kept = int(self.mask.sum())
        shape = "x".join(map(str, self.shape))
        row = {"action": f"mask {self.parameter}", "before": shape, "after": f"{kept:,} kept"}
        return row | {"kept": kept / max(1, self.mask.numel())}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build the step, checking that there is a bit for every entry."""
        step = cls(fields["module"], fields["parameter"], tuple(fields["shape"]), fields["bits"])
        if len(base64.b64decode(step.bits, validate=True)) != -(-math.prod(step.shape) // 8):
            raise PlanError(f"The mask of {step.key!r} does not fit its shape {list(step.shape)}.")
        return step


@dataclasses.dataclass(frozen=True)
class Factorize(Step):
    """Replace a convolution or linear layer by two thinner ones in a row.

    Attributes:
        module: Dotted name of the layer.
        kind: ``"channel"``, ``"spatial"`` or ``"linear"`` (:mod:`lightning_prune.structure.factorized`).
        rank: Width between the two, per group of a grouped convolution.
        before: Description of the dense layer (:func:`lightning_prune.structure.layers.describe`).
    """

    action: ClassVar[str] = "factorize"
    kind: Kind
    rank: int
    before: Mapping[str, Any]

    @classmethod
    def of(cls, module: str, layer: nn.Module, kind: Kind, rank: int) -> Self:
        """Make the step for ``layer``, which ``module`` names."""
        return cls(module, kind, rank, describe(layer))

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

    def build(self, model: nn.Module) -> None:
        """Put the factorized layer in the place of the dense one, values undefined."""
        model.set_submodule(self.module, build_factorized(self.find(model), self.kind, self.rank))

    def emulate(self, model: nn.Module) -> None:
        """Truncate the weight of the dense layer to the rank."""
        layer = self.find(model)
        matrix = matrix_of(layer.weight.detach(), self.kind, groups_of(layer))
        with torch.no_grad():
            layer.weight.copy_(weight_of(project(matrix, self.rank), self.kind, layer.weight.shape))

    def apply(self, model: nn.Module) -> None:
        """Put the factors of the truncated weight in the place of the dense layer."""
        model.set_submodule(self.module, factorize(self.find(model), self.kind, self.rank))

    def undo(self, model: nn.Module) -> None:
        """Put a dense layer, values undefined, in the place of the factorized one."""
        small = model.get_submodule(self.module)
        old = next(small.parameters())
        layer = layer_from(self.before, device=old.device, dtype=old.dtype).requires_grad_(old.requires_grad)
        model.set_submodule(self.module, layer.train(small.training))

    def facts(self) -> dict[str, float]:
        """Return the rank."""
        return {"rank": self.rank}

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

    def to_dict(self) -> dict[str, Any]:
        """Return the step in JSON types."""
        return super().to_dict() | {"before": dict(self.before)}

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


STEPS: dict[str, type[Step]] = {kind.action: kind for kind in (MaskWeight, Factorize)}


def read_step(item: Mapping[str, Any]) -> Step:
    """Read a step from the JSON types of a plan, which may come from a file that nobody vouches for.

    Args:
        item: What :meth:`Step.to_dict` returned.

    Raises:
        PlanError: If it is of an unknown kind, or broken.
    """
    fields = dict(item)
    action = fields.pop("action")
    if action not in STEPS:
        raise PlanError(
            f"The plan holds a step {action!r}; known are {', '.join(sorted(STEPS))}. Upgrade lightning-prune."
        )
    if not isinstance(fields["module"], str):
        raise PlanError(f"The plan names a module {fields['module']!r}; names are text.")
    return STEPS[action].from_dict(fields)
