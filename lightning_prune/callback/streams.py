"""Layers that read one stream, each with a choice of its own: units and columns under one bound.

A *column* is a unit as one layer reads it. Where several layers read the same units, a column can leave its layer while the unit stays for the
others (:mod:`lightning_prune.structure.gathering`); a unit leaves when no reader needs it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_prune.budget.units import UnitGroup, choose_units
from lightning_prune.callback.channel_target import Bounded, Budget
from lightning_prune.callback.task import Task
from lightning_prune.structure.gathering import readers_of_streams
from lightning_prune.structure.groups import Structure
from lightning_prune.structure.steps import GatherInputs, Step

Flags = NDArray[np.bool_]
Columns = Mapping[
    str, Flags
]  # by layer, whether it goes on to read a unit, ``[units]``; True where a layer does not read it


@dataclasses.dataclass(frozen=True)
class StreamReader:
    """A layer that may read fewer units than there are.

    Attributes:
        layer: Its name.
        units: The units that it may drop, ascending.
        inputs: Unit of every input, ``[inputs]``; -1 stays.
        outputs: Unit of every output, ``[outputs]``; -1 stays.
        cost: Of one input of one output.
    """

    layer: str
    units: NDArray[np.int64]
    inputs: NDArray[np.int64]
    outputs: NDArray[np.int64]
    cost: int

    @property
    def width(self) -> int:
        """Inputs per unit."""
        return int(np.isin(self.inputs, self.units).sum()) // len(self.units)

    def read(self, stays: Flags, columns: Flags) -> tuple[int, int]:
        """Return how many inputs there are when units leave, and how many of them are read.

        Args:
            stays: ``[units]``, boolean.
            columns: Whether the layer reads a unit, ``[units]``, boolean.
        """
        here = np.append(stays, True)[self.inputs]
        return int(here.sum()), int((here & np.append(columns, True)[self.inputs]).sum())

    def saving(self, stays: Flags, columns: Flags) -> int:
        """Return what it costs less than if it read all units that stay."""
        there, read = self.read(stays, columns)
        return self.cost * int(np.append(stays, True)[self.outputs].sum()) * (there - read)


def stream_readers(task: Task, structure: Structure, bounded: Bounded) -> list[StreamReader]:
    """Return the layers that may gather, a layer once per stream that it reads.

    Args:
        task: The model and what it costs.
        structure: Its units.
        bounded: ``"flops"`` or ``"params"``; no column leaves for a share of channels.
    """
    found = []
    for stream in readers_of_streams(task.model, structure) if bounded != "sparsity" else ():
        for name, slot in stream.readers.items():
            weight = structure.shapes[slot.tensor]
            rows = next((s.units for s in structure.by_tensor[slot.tensor] if s.axis == 0), np.full(weight[0], -1))
            taps = int(np.prod(weight[2:]))
            cost = taps if bounded == "params" else task.cost.by_module[name] // (weight[0] * weight[1])
            units = np.intersect1d(stream.group.units, slot.units)
            found.append(StreamReader(name, units, slot.units, rows, cost))
    return found


def choose_columns(
    structure: Structure,
    readers: Sequence[StreamReader],
    values: NDArray[np.float64],
    columns: Mapping[str, NDArray[np.float64]],
    budget: Budget,
    bound: int,
    pays: Callable[[str, int, int], bool],
    **options: Any,
) -> tuple[Flags, dict[str, Flags]]:
    """Choose units and columns under one bound, in the way of :func:`~lightning_prune.budget.units.choose_units`.

    Args:
        structure: The units.
        readers: The layers that may gather.
        values: Score of every unit, higher = keep, at least as high as those of its columns, ``[units]``.
        columns: Scores of the columns of each layer, ``[units]``.
        budget: What the model costs without columns.
        bound: What it may cost at most.
        pays: ``pays(layer, read, of)``: whether a layer shall gather ``read`` of the inputs that there are; else it reads all.
        options: ``align``, ``min_channels`` and ``name`` of ``choose_units``.

    Returns:
        Which units stay, ``[units]``, boolean, and by layer, for those that gather, which it reads, likewise.

    Raises:
        BudgetError: If the bound cannot be met.
    """
    while True:
        stays, own = _choose(structure, readers, values, columns, budget, bound, options)
        reading = [(r, c, *r.read(stays, c)) for r, c in zip(readers, own, strict=True)]
        useless = [r for r, _, there, read in reading if read < there and not (read and pays(r.layer, read, there))]
        if not useless:
            break
        readers = [reader for reader in readers if reader not in useless]
    found: dict[str, Flags] = {}
    for reader, flags, there, read in reading:
        if read < there:
            found[reader.layer] = flags & found.get(reader.layer, np.ones(structure.count, bool))
    return stays, found


def _choose(
    structure: Structure,
    readers: Sequence[StreamReader],
    values: NDArray[np.float64],
    columns: Mapping[str, NDArray[np.float64]],
    budget: Budget,
    bound: int,
    options: Mapping[str, Any],
) -> tuple[Flags, list[Flags]]:
    """Choose once; columns are numbered after the units."""
    ends = structure.count + np.cumsum([0, *(len(reader.units) for reader in readers)])
    numbers = [np.arange(start, end) for start, end in itertools.pairwise(ends.tolist())]

    def split(kept: Flags) -> tuple[Flags, list[Flags]]:
        own = [np.ones(structure.count, bool) for _ in readers]
        for flags, reader, ids in zip(own, readers, numbers, strict=True):
            flags[reader.units] = kept[ids]
        return kept[: structure.count], own

    def cost(kept: Flags) -> int:
        stays, own = split(kept)
        return budget.cost(stays) - sum(r.saving(stays, flags) for r, flags in zip(readers, own, strict=True))

    units = [UnitGroup(group.name, group.units, group.width) for group in structure.groups]
    inputs = [UnitGroup(f"inputs of {r.layer}", ids, r.width) for r, ids in zip(readers, numbers, strict=True)]
    scores = np.concatenate([values, *(columns[reader.layer][reader.units] for reader in readers)])
    return split(choose_units([*units, *inputs], scores, cost, bound, ties=structure.ties, **options))


def columns_in(structure: Structure, steps: Iterable[Step]) -> dict[str, Flags]:
    """Return which units the layers that ``steps`` let gather go on to read, ``[units]``, boolean, by layer."""
    found = {}
    for step in steps:
        if isinstance(step, GatherInputs):
            slot = next(s for s in structure.by_tensor[step.key("weight")] if s.axis == 1)
            flags = np.ones(structure.count + 1, bool)
            flags[slot.units[~step.kept.numpy()]] = False
            found[step.module] = flags[:-1]
    return found
