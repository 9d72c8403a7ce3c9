"""From the structure of a model to one row per layer and one per group."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import nn

from lightning_prune.explanation.kinds import in_words, kinds_of, width_of
from lightning_prune.explanation.members import Layer, owner_of
from lightning_prune.structure.groups import Slot, Structure

UNUSED = "not used in what was traced: left alone"
Part = tuple[int | None, int]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WRITTEN: tuple[tuple[tuple[type[nn.Module], ...], int], ...] = (
    ((nn.Embedding, nn.EmbeddingBag, *_TRANSPOSED), 1),
    ((nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d), 0),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer that holds parameters.

    Attributes:
        layer: Its name; ``""`` is the model itself.
        type: Its type.
        units: What its units are, in words: ``"64 channels"``, ``"12 heads of 64"``.
        removable: How many of its units can leave.
        writes: How many rows of its weights write channels of which group, ``(group, rows)``; those of group None never leave.
        reads: How many columns read channels of which group, where some of them can leave.
        shrinks_with: The other layers of the groups that it writes; of those that it reads where it writes none.
        reason: Why channels that it writes stay, all or some; empty where all can leave.
        follows: Attributes that follow when units leave, those of other modules with the module's name.
        flops: Its multiply-adds, without those of layers inside it.
        params: Number of its parameters, tied ones where they have their first name.
        flops_after: The same after the dry run, if there was one.
        params_after: Likewise.
        change: What the method would do to it; empty where nothing is said of it.
    """

    layer: str
    type: str
    units: str
    removable: int
    writes: tuple[Part, ...]
    reads: tuple[Part, ...]
    shrinks_with: tuple[str, ...]
    reason: str
    follows: tuple[str, ...]
    flops: int
    params: int
    flops_after: int | None = None
    params_after: int | None = None
    change: str = ""

    @property
    def candidate(self) -> bool:
        """Whether any of its own units can leave."""
        return self.removable > 0

    @property
    def groups(self) -> tuple[int, ...]:
        """The groups that it writes."""
        return tuple(group for group, _ in self.writes if group is not None)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The groups that it reads."""
        return tuple(group for group, _ in self.reads if group is not None)


@dataclasses.dataclass(frozen=True)
class GroupRow:
    """Units that have slices of the same layers.

    Attributes:
        group: Its number.
        name: The first layer that writes it.
        units: Number of its units.
        width: Channels per unit.
        layers: The layers that shrink when a unit leaves.
        tied: Groups of which equally many units must leave.
        follows: Attributes that follow, as ``module.attribute``.
    """

    group: int
    name: str
    units: int
    width: int
    layers: tuple[str, ...]
    tied: tuple[int, ...]
    follows: tuple[str, ...]


class Rows:
    """Reads the structure of a model layer by layer.

    Args:
        model: The model.
        structure: Its units.
        layers: The layers that hold its parameters.
    """

    def __init__(self, model: nn.Module, structure: Structure, layers: Sequence[Layer]) -> None:
        self.structure, self.layers = structure, layers
        self._holders: dict[str, list[str]] = {}  # layers by tensor, more than one where it is tied
        for layer in layers:
            for tensor in layer.tensors:
                self._holders.setdefault(tensor, []).append(layer.name)
        self._of_layer: dict[str, list[Slot]] = {}
        for slot in structure.slots:
            for name in self._holders.get(slot.tensor, ()):
                self._of_layer.setdefault(name, []).append(slot)
        self._group_of = np.full(structure.count + 1, -1)
        for index, group in enumerate(structure.groups):
            self._group_of[group.units] = index
        self.kinds = kinds_of(model, structure)
        self.members = [self._members(group.slots) for group in structure.groups]

    def _members(self, slots: Iterable[int]) -> tuple[str, ...]:
        tensors = (self.structure.slots[index].tensor for index in slots)
        return tuple(
            dict.fromkeys(name for tensor in tensors for name in self._holders.get(tensor, [owner_of(tensor)]))
        )

    def groups(self) -> tuple[GroupRow, ...]:
        """Return the groups in the order of the model."""
        tied: dict[int, set[int]] = {}
        for tie in self.structure.ties:
            together = {int(g) for g in self._group_of[np.concatenate(tie)] if g >= 0}
            for group in together:
                tied[group] = tied.get(group, set()) | together
        return tuple(
            GroupRow(
                index,
                group.name,
                len(group.units),
                group.width,
                self.members[index],
                tuple(sorted(tied.get(index, {index}) - {index})),
                tuple(f.seen_from("") for f in self.kinds[index].followers),
            )
            for index, group in enumerate(self.structure.groups)
        )

    def row(self, layer: Layer, flops: int) -> Row:
        """Return the row of a layer.

        Args:
            layer: The layer.
            flops: Its own multiply-adds.
        """
        slots = self._of_layer.get(layer.name, [])
        own = _own(layer.module, slots, self.structure.shapes)
        kinds, fixed = self._written(own)
        writes: list[Part] = [(group, units * width) for group, (units, width) in kinds.items()]
        if fixed or not kinds:
            fixed = fixed if kinds else width_of(layer.module, len(own[0].units) if own else 1, layer.params)
            writes.append((None, fixed))
        reads = self._read(slots, {slot.axis for slot in own})
        followers = dict.fromkeys(f.seen_from(layer.name) for group in kinds for f in self.kinds[group].followers)
        concerned = list(kinds) or [group for group, _ in reads if group is not None]
        with_whom = dict.fromkeys(name for group in concerned for name in self.members[group] if name != layer.name)
        named = [(self.kinds[group], units, width) for group, (units, width) in kinds.items()]
        return Row(
            layer=layer.name,
            type=layer.type,
            units=in_words(layer.module, named, fixed),
            removable=sum(units for units, _ in kinds.values()),
            writes=tuple(writes),
            reads=reads,
            shrinks_with=tuple(with_whom),
            reason=self._reason(layer, own, bool(kinds)),
            follows=tuple(followers),
            flops=flops,
            params=layer.params,
        )

    def _written(self, own: Sequence[Slot]) -> tuple[dict[int, tuple[int, int]], int]:
        """Return units and channels per unit of the groups that a layer writes, and how many of its channels are no units."""
        widths: dict[int, int] = {}
        units: dict[int, set[int]] = {}
        for slot in own:
            for group, members in self._by_group(slot.units).items():
                width = len(members) // len(set(members.tolist()))
                widths[group] = min(width, widths.get(group, width))
                units[group] = units.get(group, set()) | set(members.tolist())
        fixed = max((int((slot.units < 0).sum()) for slot in own), default=0)
        return {group: (len(units[group]), widths[group]) for group in sorted(units)}, fixed

    def _by_group(self, units: np.ndarray) -> dict[int, np.ndarray]:
        flat = units[units >= 0]
        groups = self._group_of[flat]
        return {int(group): flat[groups == group] for group in np.unique(groups)}

    def _read(self, slots: Sequence[Slot], written: set[int]) -> tuple[Part, ...]:
        parts: dict[int | None, int] = {}
        for slot in slots:
            if slot.axis in written or not (slot.units >= 0).any():
                continue
            units = slot.units if slot.units.ndim == 1 else np.unique(slot.units, axis=0).reshape(-1)
            found: dict[int | None, int] = {g: len(m) for g, m in self._by_group(units).items()}
            for group, count in (found | {None: int((units < 0).sum())}).items():
                parts[group] = max(count, parts.get(group, 0))
        return tuple((group, count) for group, count in sorted(parts.items(), key=_frozen_last) if count)

    def _reason(self, layer: Layer, own: Sequence[Slot], some: bool) -> str:
        if not own:
            single = all(size == 1 for tensor in layer.tensors for size in self.structure.shapes[tensor])
            return "it holds no more than one channel" if single else UNUSED
        stays = [(s.tensor, s.axis) for s in own if (s.units < 0).any()]
        reasons = dict.fromkeys(self.structure.reasons[place] for place in stays if place in self.structure.reasons)
        return "; ".join(reasons) or ("" if some else "it has a single channel")


def _frozen_last(part: Part) -> tuple[bool, int]:
    return part[0] is None, part[0] or 0


def _own(module: nn.Module, slots: Sequence[Slot], shapes: Mapping[str, tuple[int, ...]]) -> list[Slot]:
    """Return the slots along which a layer writes its channels, those that hold units where there are any.

    Where the type says which axis that is, tied weights do not confuse: what an embedding writes is what the decoder reads.
    """
    axis = next((axis for types, axis in _WRITTEN if isinstance(module, types)), None)
    if axis is None:
        written = [slot for slot in slots if slot.zeroed]
    else:
        written = [slot for slot in slots if slot.axis == (axis if len(shapes[slot.tensor]) > 1 else 0)]
    candidates = written or list(slots)
    return [slot for slot in candidates if (slot.units >= 0).any()] or written or candidates[:1]
