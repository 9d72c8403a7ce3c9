"""Units and groups: what can leave a model, and together with what.

A *unit* is the smallest set of slices of parameters and buffers that can leave together: a channel with its filter, its normalization and
the next layer's column; a head; a hidden unit with its gates. A *group* is all units that have slices of the same tensors. A *count tie*
demands that equally many units of several blocks leave, whichever they are.
"""

import dataclasses
import functools
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.structure.attention import MultiheadAttention, open_heads
from lightning_prune.structure.calls import Call
from lightning_prune.structure.costs import Polynomial, Term
from lightning_prune.structure.preserve import preserved
from lightning_prune.structure.tracing.interpreter import export_all, follow
from lightning_prune.structure.tracing.labels import Absorbed, Labels, Size
from lightning_prune.structure.tracing.program import Program

_CONSTANT = "no weight writes it that could be held at zero, a buffer of the model does"


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where units lie on a tensor.

    Attributes:
        tensor: Name of the parameter or buffer in the model.
        axis: The axis that shrinks.
        units: Unit per index of the axis, ``[size]``, or ``[rows, columns]`` where the rows keep different columns; -1 never leaves.
        zeroed: Whether the masked model holds the slices of units that have left at zero.
    """

    tensor: str
    axis: int
    units: np.ndarray
    zeroed: bool

    def along(self, values: Any, ndim: int) -> Any:
        """Shape values that lie as ``units`` do, an array or a tensor, so that they broadcast over a tensor of ``ndim`` axes."""
        if self.units.ndim == 2:
            return values.reshape(*values.shape, *[1] * (ndim - 2))
        return values.reshape([-1 if axis == self.axis else 1 for axis in range(ndim)])

    def others(self, ndim: int) -> tuple[int, ...]:
        """Return the axes of a tensor of ``ndim`` axes along which the unit does not change."""
        own = (0, 1) if self.units.ndim == 2 else (self.axis,)
        return tuple(axis for axis in range(ndim) if axis not in own)

    def sums(self, values: Tensor, count: int) -> NDArray[np.float64]:
        """Return the sum over the slice of every unit, ``[count]``, float64; 0 for units that have none here.

        Args:
            values: Of the tensor's shape, float64.
            count: Number of all units.
        """
        others, units = self.others(values.ndim), self.units.reshape(-1)
        flat = (values.sum(others) if others else values).cpu().numpy().reshape(-1)
        return np.bincount(units[units >= 0], flat[units >= 0], minlength=count).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that have slices of the same tensors; which layers gather them makes no difference.

    Attributes:
        name: Name of the first layer that writes these channels.
        units: Their numbers, ascending.
        width: Channels per unit in the layers that write them.
        slots: Indices of the slots that hold their slices.
    """

    name: str
    units: np.ndarray
    width: int
    slots: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Structure:
    """All units of a model.

    Attributes:
        count: Number of units.
        slots: Where they lie; also slots without any unit.
        groups: The groups, in the order of the model.
        reasons: Why slices of a tensor along an axis never leave, by tensor and axis; only where something stays.
        ties: Blocks of units of which equally many must leave.
        sizes: Numbers in modules and in the user's code that follow when units leave; their labels are units.
        terms: The multiply-adds that depend on units.
        absorbed: Layers whose bias takes up constant channels, by name of the weight.
        shapes: Shape of every parameter and buffer of the model.
        parameters: Names of the parameters, tied ones under their first name.
        opened: Attention modules that must be opened before their heads can leave.
        written: Whether the model's code works with sizes as numbers, which may stem from any shape.
        gathers: The unit of every channel of the stream from which a layer gathers its inputs, ``[stream]``, by name of the layer.
        mixed: Units over which an operation sums without a weight, such as a norm of all channels.
    """

    count: int
    slots: tuple[Slot, ...]
    groups: tuple[Group, ...]
    reasons: Mapping[tuple[str, int], str]
    ties: tuple[tuple[np.ndarray, ...], ...]
    sizes: tuple[Size, ...]
    terms: tuple[Term, ...]
    absorbed: Mapping[str, Absorbed]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: frozenset[str]
    opened: tuple[str, ...]
    written: bool
    gathers: Mapping[str, np.ndarray]
    mixed: np.ndarray

    @functools.cached_property
    def flops(self) -> Polynomial:
        """The multiply-adds that depend on units, as a function of the units that stay."""
        return Polynomial(self.terms)

    @functools.cached_property
    def params(self) -> Polynomial:
        """The number of elements of parameters that have units, as a function of the units that stay."""
        terms = []
        for name, slots in self.by_tensor.items():
            if name in self.parameters:
                shrinking = {slot.axis for slot in slots}
                rest = int(np.prod([size for axis, size in enumerate(self.shapes[name]) if axis not in shrinking]))
                terms.append((rest, tuple(s.units if s.units.ndim == 1 else s.units[0] for s in slots), 1))
        return Polynomial(terms)

    @functools.cached_property
    def by_tensor(self) -> dict[str, list[Slot]]:
        """The slots that hold units, by tensor."""
        found: dict[str, list[Slot]] = {}
        for slot in self.slots:
            if (slot.units >= 0).any():
                found.setdefault(slot.tensor, []).append(slot)
        return found

    def gathered(self, slot: Slot) -> bool:
        """Tell whether ``slot`` is that of the inputs which a layer gathers: it can do without any of them."""
        return slot.axis == 1 and slot.tensor.rpartition(".")[0] in self.gathers

    def writers(self, group: Group) -> set[str]:
        """Return the names of the layers whose weights write the channels of ``group``; of all that hold them if none does."""
        own = [self.slots[index] for index in group.slots]
        written = [s.tensor for s in own if s.zeroed and len(self.shapes[s.tensor]) >= 2] or [s.tensor for s in own]
        return {name.rpartition(".")[0] for name in written}

    def without(self, units: np.ndarray, reason: str) -> "Structure":
        """Return the structure in which ``units``, and whatever is tied to them by count, never leave, for ``reason``."""
        return self.without_units(units, reason)[0]

    def without_units(self, units: np.ndarray, reason: str) -> tuple["Structure", np.ndarray]:
        """Do what :meth:`without` does; return also which of the units are gone, ``[units]``, boolean."""
        bad = np.zeros(self.count + 1, bool)
        bad[units] = True
        while True:
            before = int(bad.sum())
            for tie in self.ties:
                blocked = any(bad[block].any() for block in tie)
                for block in tie if blocked else ():
                    bad[block] = True
            if int(bad.sum()) == before:
                break
        bad[-1] = False
        renumber = np.where(bad[:-1], -1, np.cumsum(~bad[:-1]) - 1)
        renumber = np.append(renumber, -1)
        slots, reasons = [], dict(self.reasons)
        for slot in self.slots:
            moved = renumber[slot.units]
            if (moved != slot.units).any() and bad[slot.units].any():
                reasons.setdefault((slot.tensor, slot.axis), reason)
            slots.append(dataclasses.replace(slot, units=moved))
        ties = tuple(tuple(renumber[b] for b in tie) for tie in self.ties if (renumber[np.concatenate(tie)] >= 0).any())
        groups = [dataclasses.replace(g, units=moved[moved >= 0]) for g in self.groups for moved in [renumber[g.units]]]
        rest = dataclasses.replace(
            self,
            count=int((~bad[:-1]).sum()),
            slots=tuple(slots),
            groups=tuple(group for group in groups if len(group.units)),
            reasons=reasons,
            ties=ties,
            sizes=tuple(dataclasses.replace(s, labels=renumber[s.labels]) for s in self.sizes),
            gathers={layer: renumber[stream] for layer, stream in self.gathers.items()},
            mixed=_some(renumber[self.mixed]),
            terms=tuple((f, tuple(renumber[a] for a in axes), d) for f, axes, d in self.terms),
        )
        return rest, bad[:-1]


def find_units(model: nn.Module, calls: Sequence[Call]) -> Structure:
    """Find all units of a model.

    Args:
        model: The model; left as it is. Nothing is computed: it is traced with fake tensors.
        calls: The calls that stand for it.

    Raises:
        ModelError: If it cannot be traced.
    """
    with preserved(model):
        opened = _open_all(model)
        programs = export_all(model, calls)
        return _units(model, programs, opened)


def _open_all(model: nn.Module) -> tuple[str, ...]:
    names = [name for name, module in model.named_modules() if type(module) is nn.MultiheadAttention and name]
    for name in names:
        model.set_submodule(name, open_heads(model.get_submodule(name)))  # type: ignore[arg-type]
    return tuple(names)


def _units(model: nn.Module, programs: Sequence[Program], opened: tuple[str, ...]) -> Structure:
    """Follow the labels; grouped convolutions of which no whole group can leave are followed again as getting thinner."""
    thinned: frozenset[str] = frozenset()
    while True:
        labels = follow(model, programs, thinned)
        roots = labels.settle()
        reasons = labels.reasons(roots)
        stuck = {name for name, rows in labels.grouped.items() if name not in thinned and _stuck(roots[rows], reasons)}
        if not stuck:
            return _structure(model, labels, roots, reasons, opened)
        thinned |= stuck


def _stuck(rows: np.ndarray, reasons: Mapping[int, str]) -> bool:
    """Tell whether fewer than two of the groups of a convolution could leave one by one."""
    return len(set(rows.tolist()) - set(reasons)) < 2


def _structure(
    model: nn.Module, labels: Labels, roots: np.ndarray, reasons: Mapping[int, str], opened: tuple[str, ...]
) -> Structure:
    free = np.zeros(labels.count, bool)  # by root: has a slice of a tensor, and nothing holds it
    for own in labels.slots:
        free[roots[own.labels]] = True
    free[list(reasons)] = False
    names, unit = np.unique(roots[free[roots]], return_inverse=True)
    units = np.full(labels.count, -1)
    units[free[roots]] = unit
    zeroed = labels.zeroed()
    order = {name: i for i, (name, _) in enumerate([*model.named_parameters(), *model.named_buffers()])}
    slots = [
        Slot(slot.tensor, slot.axis, units[slot.labels], slot.labels.ndim == 1 and bool(zeroed[slot.labels].any()))
        for slot in sorted(labels.slots, key=lambda s: (order.get(s.tensor, len(order)), s.axis))
    ]
    why = {}
    for slot, own in zip(
        slots, sorted(labels.slots, key=lambda s: (order.get(s.tensor, len(order)), s.axis)), strict=True
    ):
        if (slot.units < 0).any():
            why[slot.tensor, slot.axis] = reasons[int(roots[own.labels[slot.units < 0].flat[0]])]
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    ties = tuple(
        blocks
        for tie in labels.ties
        if (blocks := tuple(units[b] for b in tie)) and (np.concatenate(blocks) >= 0).any()
    )
    found = Structure(
        count=len(names),
        slots=tuple(slots),
        groups=_groups(len(names), slots, labels.gathers),
        reasons=why,
        ties=ties,
        sizes=tuple(
            dataclasses.replace(s, labels=units[s.labels]) for s in labels.sizes if (units[s.labels] >= 0).any()
        ),
        terms=tuple((t.factor, tuple(units[a] for a in t.axes), t.divisor) for t in labels.terms),
        absorbed=dict(labels.absorbed),
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        parameters=frozenset(name for name, _ in model.named_parameters()),
        written=labels.written,
        gathers={layer: units[stream] for layer, stream in labels.gathers.items()},
        mixed=_some(units[np.concatenate([*labels.mixed, np.zeros(0, np.int64)])]),
        opened=tuple(n for n in opened if isinstance(model.get_submodule(n), MultiheadAttention)),
    )
    half = [block[block >= 0] for tie in ties if (np.concatenate(tie) < 0).any() for block in tie]
    if half:
        found = found.without(np.concatenate(half), "equally many of some that cannot leave must leave")
    unwritten = np.ones(found.count, bool)
    for slot in found.slots:
        if slot.zeroed:
            unwritten[slot.units[slot.units >= 0]] = False
    return found.without(np.flatnonzero(unwritten), _CONSTANT) if unwritten.any() else found


def _some(units: np.ndarray) -> np.ndarray:
    """Return the numbers that are those of units, ascending, each once."""
    found: np.ndarray = np.unique(units[units >= 0])
    return found


def _groups(count: int, slots: Sequence[Slot], gathers: Container[str]) -> tuple[Group, ...]:
    """Sort units by the slots that they have slices in."""
    keys = np.random.default_rng(0).integers(1, 2**62, len(slots), dtype=np.int64)
    signature = np.zeros(count, np.int64)
    width = np.full(count, np.iinfo(np.int64).max)
    home = np.full(count, len(slots))
    for index, slot in enumerate(slots):
        members, times = np.unique(slot.units[slot.units >= 0], return_counts=True)
        if slot.axis == 1 and slot.tensor.rpartition(".")[0] in gathers:
            continue
        if slot.units.ndim == 1:
            signature[members] += keys[index] * times
            width[members] = np.minimum(width[members], times)
        else:
            signature[members] += keys[index]
        if slot.zeroed and slot.units.ndim == 1:
            home[members] = np.minimum(home[members], index)
    _, group_of = np.unique(signature, return_inverse=True)
    own: list[list[int]] = [[] for _ in range(group_of.max(initial=-1) + 1)]
    for index, slot in enumerate(slots):
        for group in np.unique(group_of[np.unique(slot.units[slot.units >= 0])]).tolist():
            own[group].append(index)
    order = np.argsort(group_of, kind="stable")
    groups = []
    for units, indices in (
        zip(np.split(order, np.cumsum(np.bincount(group_of))[:-1]), own, strict=True) if count else ()
    ):
        first = int(home[units[0]])
        writer = slots[first if first < len(slots) else indices[0]]
        groups.append(
            Group(writer.tensor.rpartition(".")[0] or writer.tensor, units, int(width[units[0]]), tuple(indices))
        )
    return tuple(sorted(groups, key=lambda g: (g.slots[0], int(g.units[0]))))
