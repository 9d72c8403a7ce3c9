"""Units as tensors see them: where they are written, how large that is, and how they rank among their like."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.structure.groups import Slot, Structure


class Slices(Protocol):
    """Where units lie on a parameter."""

    @property
    def parameter(self) -> Tensor:
        """The parameter."""

    def along(self, values: Tensor) -> Tensor:
        """Shape values of units, ``[units + 1]``, the last for what is of no unit, so that they broadcast over the parameter."""


@dataclasses.dataclass(frozen=True)
class UnitSlice:
    """The slices of a parameter that write units.

    Attributes:
        parameter: The parameter.
        axis: The axis along which units lie.
        unit: Unit of every slice, ``[size]``, the number of all units for slices that never leave.
        here: Units with slices here, ``[n]``.
        places: Their slices, ``[n, width]``, ``size`` where a unit has fewer than others.
        share: What a slice counts in the score of its unit, ``[n]``.
    """

    parameter: Tensor
    axis: int
    unit: Tensor
    here: Tensor
    places: Tensor
    share: Tensor

    @classmethod
    def of(cls, parameter: Tensor, slot: Slot, times: NDArray[np.int64]) -> Self:
        """Describe a slot.

        Args:
            parameter: The parameter that the slot is of.
            slot: Where units lie on it.
            times: In how many weights every unit is written, ``[units]``.
        """
        count, device = len(times), parameter.device
        unit = np.where(slot.units < 0, count, slot.units)
        here, widths = np.unique(unit[unit < count], return_counts=True)
        order = np.argsort(unit, kind="stable")[: widths.sum()]
        places = np.full((here.size, widths.max()), unit.size)
        places[np.arange(widths.max()) < widths[:, None]] = order
        share = 1.0 / (widths * np.maximum(times[here], 1))
        tensors = (torch.from_numpy(array).to(device) for array in (unit, here, places, share.astype(np.float32)))
        return cls(parameter, slot.axis, *tensors)

    def along(self, values: Tensor) -> Tensor:
        """Shape values of units, ``[units + 1]``, the last for slices that never leave, so that they broadcast over the parameter."""
        shape = [-1 if axis == self.axis else 1 for axis in range(self.parameter.ndim)]
        return values[self.unit].to(self.parameter.dtype).view(shape)

    def sizes(self, absolute: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the share of this weight in the scores of the units that it writes, ``[n]``: the mean of a slice of its absolute values."""
        others = [axis for axis in range(absolute.ndim) if axis != self.axis]
        means = absolute.mean(others, dtype=dtype)
        return nn.functional.pad(means, (0, 1))[self.places].sum(1) * self.share


class Cells:
    """Units that compete, by the cells that they compete in. Everything works on whole tensors; nothing loops over units or waits for a device.

    Args:
        cell: Cell of every unit, ``[units]``, numbered from 0.
        weights: The slices of weights, those of two axes or more.
        others: The slices of biases, and of scales and shifts of normalization.

    Attributes:
        count: Number of units.
        cell: Cell of every unit, ``[units]``.
        size: Units of every cell, ``[cells]``.
        weights: As given.
        others: As given.
        dtype: Of scores.
    """

    def __init__(self, cell: NDArray[np.int64], weights: Sequence[Slices], others: Sequence[Slices] = ()) -> None:
        self.count, self.weights, self.others = cell.size, weights, others
        kinds = [own.parameter.dtype for own in weights]
        self.dtype = torch.float64 if torch.float64 in kinds else torch.float32
        device = next((own.parameter.device for own in weights), torch.device("cpu"))
        self.cell = torch.from_numpy(cell).to(device)
        self.size = torch.from_numpy(np.bincount(cell)).to(device)
        first = self.size.cumsum(0) - self.size
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._place = torch.arange(self.count, device=device) - first[self.cell.sort().values]

    def absolute(self, weight: Tensor) -> Tensor:
        """Return the absolute values of one of the weights, in memory that the next call overwrites.

        With a sum they are three times as fast as a norm; with new memory for every weight, which a system hands out zeroed, they would not be.
        """
        key = weight.dtype, weight.device
        if key not in self._scratch:
            own = [s.parameter for s in self.weights if (s.parameter.dtype, s.parameter.device) == key]
            self._scratch[key] = weight.detach().new_empty(max(parameter.numel() for parameter in own))
        strides = torch.empty_like(weight, device="meta").stride()  # those of the weight unless its storage has gaps
        return torch.abs(weight.detach(), out=self._scratch[key][: weight.numel()].as_strided(weight.size(), strides))

    def scores(self) -> Tensor:
        """Return the mean absolute value of what makes up a unit, ``[units]``."""
        raise NotImplementedError

    def ranks(self, *keys: Tensor) -> Tensor:
        """Return the place of every unit among those of its cell, ``[units]``, from 0.

        Args:
            keys: ``[units]``, ascending, flags, whole numbers from 0 to 2 ** 42, or floating; a later one decides between equals, and at last the
                number of the unit.
        """
        first, bits, rest = self.cell, 20, [*keys]
        while (
            rest and (found := _as_whole(rest[0])) is not None and bits + found[1] < 64
        ):  # what fits is sorted at once
            first, bits = (first << found[1]) + found[0], bits + found[1]
            rest.pop(0)
        order = first.argsort(stable=True) if not rest else torch.arange(self.count, device=self.cell.device)
        for key in (*reversed(rest), first) if rest else ():
            order = order[key[order].argsort(stable=True)]
        return torch.empty_like(order).scatter_(0, order, self._place)

    def counts(self, flags: Tensor) -> Tensor:
        """Return how many units of every cell are flagged, ``[cells]``."""
        return torch.zeros_like(self.size).index_add_(0, self.cell, flags.to(self.size.dtype))

    def masks(self, gone: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the tensors that hold units which are gone, each with a mask that is False there, on the CPU."""
        raise NotImplementedError


def _as_whole(key: Tensor) -> tuple[Tensor, int] | None:
    """Return whole numbers from 0 in the order of a key, and how many bits these take; None if there are none."""
    if key.dtype == torch.bool:
        return key.long(), 1
    if key.dtype == torch.int64:
        return key, 42
    if key.dtype == torch.float32:
        bits = (
            (key + 0.0).view(torch.int32).long()
        )  # of positive numbers in their order, of negative ones in the reverse; one zero, not two
        return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2**31, 32
    return None


class UnitSlices(Cells):
    """The channels of a model by the tensors that write them.

    A *cell* is units of one group, and of one block of every count tie: however many leave each cell, the tensors stay rectangular
    if only these numbers are kept.

    Args:
        model: The model.
        structure: Its units.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        slots = [slot for own in structure.by_tensor.values() for slot in own if slot.zeroed and slot.units.ndim == 1]
        times = np.zeros(structure.count, np.int64)
        for slot in slots:
            if tensors[slot.tensor].ndim >= 2:
                times[np.unique(slot.units[slot.units >= 0])] += 1
        found = [UnitSlice.of(p, s, times) for s in slots for p in [tensors[s.tensor]] if isinstance(p, nn.Parameter)]
        self._own = [own for own in found if own.parameter.ndim >= 2]
        self._held = [(tensors[slot.tensor], slot) for slot in slots]
        super().__init__(cells_of(structure), self._own, [own for own in found if own.parameter.ndim < 2])

    def scores(self) -> Tensor:
        """Return the mean over the weights that write a unit of the mean absolute value there, ``[units]``."""
        total = torch.zeros(self.count, dtype=self.dtype, device=self.cell.device)
        for own in self._own:
            total.index_add_(
                0, own.here, own.sizes(self.absolute(own.parameter), self.dtype)
            )  # no unit stands twice in ``here``: nothing to reorder
        return total

    def masks(self, gone: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the tensors that write units which are gone, each with a mask that is False there, on the CPU."""
        stays = np.append(~gone.cpu().numpy(), True)
        found = ((tensor, slot, torch.from_numpy(stays[slot.units])) for tensor, slot in self._held)
        return [(tensor, slot.along(mask, tensor.ndim)) for tensor, slot, mask in found if not bool(mask.all())]


def cells_of(structure: Structure) -> NDArray[np.int64]:
    """Return the cell of every unit, ``[units]``: its group, and its block in every count tie."""
    keys = np.zeros((structure.count, 1 + len(structure.ties)), np.int64)
    for number, group in enumerate(structure.groups):
        keys[group.units, 0] = number
    for column, tie in enumerate(structure.ties, 1):
        for number, block in enumerate(tie, 1):
            keys[block[block >= 0], column] = number
    found: NDArray[np.int64] = np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)
    return found


def even(structure: Structure, leaving: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which of some units may leave when equally many of tied blocks must, ``[units]``, boolean."""
    leaving, before = leaving.copy(), -1
    while before != (before := int(leaving.sum())):
        for tie in structure.ties:
            blocks = [block[block >= 0] for block in tie]
            least = min(int(leaving[block].sum()) for block in blocks)
            for block in blocks:
                leaving[block[leaving[block]][least:]] = False
    return leaving


def frozen_units(structure: Structure, parameters: Mapping[str, nn.Parameter]) -> NDArray[np.int64]:
    """Return the units that no weight writes, or one that does not train: no penalty would shrink them."""
    written, frozen = np.zeros(structure.count, bool), np.zeros(structure.count, bool)
    for name, slots in structure.by_tensor.items():
        for slot in slots:
            if slot.zeroed and name in parameters and parameters[name].ndim >= 2:
                written[slot.units[slot.units >= 0]] = True
                if not parameters[name].requires_grad:
                    frozen[slot.units[slot.units >= 0]] = True
    found: NDArray[np.int64] = np.flatnonzero(frozen | ~written)
    return found
