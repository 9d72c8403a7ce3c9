"""Single entries of a parameter held at zero, and the bits that say which."""

import base64
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.errors import PlanError
from lightning_prune.structure.steps.base import Step, settle, swap


@dataclasses.dataclass(frozen=True)
class MaskWeight(Step):
    """Hold some entries of one parameter at zero.

    Attributes:
        module: Dotted name of the module that owns the parameter.
        parameter: Its name there.
        shape: Its shape.
        bits: One bit per entry, row-major, 1 = kept, packed eight to a byte, base64.
        gains: What the kept entries are multiplied by, once, float32, little-endian, base64; empty for 1, and in a plan that a model carries.
    """

    action: ClassVar[str] = "mask"
    parameter: str
    shape: tuple[int, ...]
    bits: str
    gains: str = ""

    @classmethod
    def of(cls, module: str, parameter: str, mask: Tensor, gains: Tensor | None = None) -> Self:
        """Make the step from a boolean mask.

        Args:
            module: Dotted name of the owning module.
            parameter: Name of the parameter there.
            mask: True where the entry is kept, ``[*parameter.shape]``, boolean.
            gains: What entries are multiplied by, same shape; those of removed ones do not count.
        """
        own = torch.ones(0) if gains is None else gains.detach().cpu()[mask.cpu()].float()
        changed = own if bool((own != 1).any()) else own[:0]
        text = base64.b64encode(changed.numpy().astype("<f4").tobytes()).decode()
        return cls(module, parameter, tuple(mask.shape), pack_bits(mask), text)

    @functools.cached_property
    def mask(self) -> Tensor:
        """The mask, ``[*shape]``, boolean, on the CPU."""
        return unpack_bits(self.bits, math.prod(self.shape)).view(self.shape)

    @property
    def once(self) -> bool:
        """Whether entries are multiplied: when the mask is taken, and not again."""
        return bool(self.gains)

    @property
    def factors(self) -> Tensor | None:
        """What entries are multiplied by, ``[*shape]``, float32, on the CPU, 0 for removed ones; None for 1."""
        if not self.gains:
            return None
        values = torch.from_numpy(np.frombuffer(base64.b64decode(self.gains), "<f4").astype(np.float32))
        return torch.zeros(self.shape).masked_scatter_(self.mask, values)

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
        """Zero the entries that the mask removes, and multiply the others by their gains."""
        module = self.find(model)
        parameter, factors = getattr(module, self.parameter), self.factors
        values = parameter.data.clone()
        if factors is not None:
            values *= factors.to(values)
        swap(parameter, values.masked_fill_(~self.mask.to(parameter.device), 0))
        settle(module)

    def apply(self, model: nn.Module) -> None:
        """Do what :meth:`emulate` does."""
        self.emulate(model)

    def settled(self) -> Self:
        """Return the step without gains."""
        return dataclasses.replace(self, gains="")

    def to_dict(self) -> dict[str, Any]:
        """Return the step in JSON types."""
        return {key: value for key, value in super().to_dict().items() if key != "gains" or value}

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
        step = cls(
            fields["module"], fields["parameter"], tuple(fields["shape"]), fields["bits"], fields.get("gains", "")
        )
        if len(base64.b64decode(step.bits, validate=True)) != -(-math.prod(step.shape) // 8):
            raise PlanError(f"The mask of {step.key!r} does not fit its shape {list(step.shape)}.")
        gains = np.frombuffer(base64.b64decode(step.gains, validate=True), np.uint8)
        if gains.size and (gains.size != 4 * int(step.mask.sum()) or not np.isfinite(gains.view("<f4")).all()):
            raise PlanError(f"The gains of {step.key!r} are no finite number for each of its entries that stay.")
        return step


def pack_bits(mask: Tensor) -> str:
    """Write a mask as text.

    Args:
        mask: Any shape, boolean.

    Returns:
        One bit per entry, row-major, first entry highest, packed eight to a byte, base64.
    """
    return base64.b64encode(np.packbits(mask.detach().cpu().numpy().reshape(-1)).tobytes()).decode()


def unpack_bits(bits: str, count: int) -> Tensor:
    """Read what :func:`pack_bits` wrote.

    Args:
        bits: The text.
        count: Number of entries.

    Returns:
        The mask, ``[count]``, boolean, on the CPU.

    Raises:
        PlanError: If the text holds another number of bytes, or is not base64.
    """
    try:
        packed = np.frombuffer(base64.b64decode(bits, validate=True), dtype=np.uint8)
    except ValueError as error:
        raise PlanError(f"The bits of a mask are base64: {error}.") from error
    if packed.size != -(-count // 8):
        raise PlanError(f"A mask of {count} entries takes {-(-count // 8)} bytes, got {packed.size}.")
    return torch.from_numpy(np.unpackbits(packed, count=count).view(np.bool_))
