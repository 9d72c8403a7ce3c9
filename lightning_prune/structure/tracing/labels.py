"""The labels of a model: who leaves with whom, who never leaves and why.

Every axis of every parameter and buffer gets a label per index. Following the graph ties labels together (two slices leave together),
freezes them (with the reason), or ties counts (of several blocks, equally many leave). What is left are the units.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_prune.structure.tracing.values import FIXED, Field, Value, core, varying


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where labels lie on a parameter or buffer.

    Attributes:
        tensor: Its name in the model.
        axis: The axis that shrinks.
        labels: Per index of the axis, ``[size]``; or per element of the first two axes, ``[rows, columns]``, where rows keep different columns.
    """

    tensor: str
    axis: int
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Size:
    """A number that must follow when units leave: an attribute of a module, or an integer in the user's code.

    Attributes:
        module: Name of the module whose code holds it.
        attribute: Name of the attribute that is known to hold it, ``None`` if that is to be found out.
        before: The number in the dense model.
        labels: ``[before, ...]``: it follows the number of rows that keep an element.
        node: Name of the operation in the graph.
        where: File and line of the user's code, and the line itself.
        index: Its place, where the attribute is a list of numbers.
    """

    module: str
    attribute: str | None
    before: int
    labels: np.ndarray
    node: str
    where: str
    index: int | None = None

    def after(self, kept: np.ndarray) -> int:
        """Return the number when only labels with ``kept`` true stay."""
        rows = kept[self.labels].reshape(len(self.labels), -1).any(axis=1)
        return int(rows.sum())


@dataclasses.dataclass(frozen=True)
class Term:
    """A part of the model's multiply-adds: ``factor`` times the number of kept labels of each axis, divided by ``divisor``."""

    factor: int
    axes: tuple[np.ndarray, ...]
    divisor: int = 1


@dataclasses.dataclass(frozen=True)
class Absorbed:
    """A convolution or linear layer whose removed input channels are a constant in the masked model, taken up by its bias."""

    weight: str
    bias: str
    value: float


class Labels:
    """Labels of all tensors of a model, and all ties between them."""

    def __init__(self) -> None:
        self.count = 1  # label 0 is FIXED
        self.slots: list[Slot] = []
        self.sizes: list[Size] = []
        self.terms: list[Term] = []
        self.absorbed: dict[str, Absorbed] = {}
        self.ties: list[tuple[np.ndarray, ...]] = []
        self.grids: list[np.ndarray] = []
        self.produced: set[int] = set()
        self.used: set[str] = set()
        self.thinned: set[str] = set()
        self.written = False
        self.grouped: dict[str, np.ndarray] = {}
        self.gathers: dict[str, np.ndarray] = {}
        self.taken: dict[str, float | None] = {}
        self._values: dict[str, Value] = {}
        self.biases: dict[str, set[tuple[str, ...]]] = {}
        self.mixed: list[np.ndarray] = []
        self.touched: list[np.ndarray] = []
        self._edges: list[np.ndarray] = []  # not yet solved
        self._alike: list[np.ndarray] = []
        self._replaced: list[tuple[np.ndarray, Tensor]] = []
        self._parent = np.zeros(0, np.int64)
        self._frozen: list[tuple[np.ndarray, str]] = []

    def tensor(self, name: str, shape: tuple[int, ...], parameter: bool) -> Value:
        """Return the value of a parameter or buffer, with labels of its own along every axis of more than one index."""
        self.used.add(name)
        if name not in self._values:
            fields = []
            for axis, size in enumerate(shape):
                if size > 1:
                    own = torch.arange(self.count, self.count + size)
                    self.count += size
                    self.slots.append(Slot(name, axis, own.numpy()))
                    view = [1] * len(shape)
                    view[axis] = size
                    fields.append(Field(own.view(view).expand(shape), 0.0 if parameter else None, True))
            self._values[name] = Value(shape, tuple(fields), None, name, True)
        return self._values[name]

    def replace(self, name: str, axis: int, labels: Tensor) -> None:
        """Let the rows of a tensor have labels of their own along ``axis``: ``labels`` is ``[rows, columns]``."""
        known = next((s for s in self.slots if s.tensor == name and s.axis == axis), None)
        if known is not None and known.labels.ndim == 2:
            self.unite(torch.from_numpy(known.labels), labels)
            return
        if known is not None:
            self._replaced.append((known.labels, labels))
        self.slots = [s for s in self.slots if s is not known] + [Slot(name, axis, labels.numpy())]

    def unite(self, a: Tensor, b: Tensor, alike: bool = False) -> None:
        """Tie labels element by element; the shapes broadcast.

        Args:
            a: Labels.
            b: Labels.
            alike: Whether the masked model holds slices of both at zero or of none: they are added to each other before data meets them.
        """
        self.touch(a)
        self.touch(b)
        for axis in range(-1, -1 - min(a.ndim, b.ndim), -1):  # an axis along which neither changes needs one element
            if a.shape[axis] == b.shape[axis] and not a.stride(axis) and not b.stride(axis):
                a, b = a.narrow(axis, 0, 1), b.narrow(axis, 0, 1)
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        pairs = torch.stack([a.reshape(-1), b.reshape(-1)]).numpy()
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.shape[1] > 64:
            keys = np.unique(pairs[0] * np.int64(self.count + 1) + pairs[1])
            pairs = np.stack([keys // (self.count + 1), keys % (self.count + 1)])
        self._edges.append(pairs)
        if alike:
            self._alike.append(pairs)

    def touch(self, labels: Tensor) -> None:
        """Note that a rule has seen to ``labels``; labels of an operand that no rule sees to would be lost."""
        self.touched.append(core(labels).flatten().numpy())

    def merge(self, field: Field, axes: tuple[int, ...]) -> Field:
        """Tie the labels along ``axes`` to each other; return the field, which does not change along them any more."""
        labels = core(field.labels)
        first = labels
        for axis in axes:
            first = first.narrow(axis, 0, 1)
        if first.shape != labels.shape:
            self.unite(labels, first)
        return dataclasses.replace(field, labels=first.expand(field.labels.shape))

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Let labels never leave."""
        self.touch(labels)
        self._frozen.append((np.unique(core(labels).numpy()), reason))

    def produce(self, field: Field) -> None:
        """Note that parameters write to the channels of ``field``: the masked model holds their slices at zero, where that makes a constant."""
        self.touch(field.labels)
        if field.weights and field.at is not None:
            self.produced.update(core(field.labels).flatten().tolist())

    def gather(self, layer: str, stream: Tensor) -> None:
        """Note the stream that a layer gathers its channels from, ``[stream]``; one that is called again gathers the same channels."""
        self.touch(stream)
        known = self.gathers.setdefault(layer, stream.numpy())
        self.unite(torch.from_numpy(known), stream)

    def mix(self, field: Field) -> None:
        """Note that an operation sums over the channels of ``field`` without a weight: what they are matters to others."""
        self.mixed.append(core(field.labels).flatten().numpy())

    def tie(self, *blocks: Tensor) -> None:
        """Let equally many labels of each block leave; blocks are vectors of one length."""
        for block in blocks:
            self.touch(block)
        if len(blocks) > 1:
            self.ties.append(tuple(core(block).flatten().numpy() for block in blocks))

    def grid(self, field: Field) -> None:
        """Note a field along several axes: what leaves must leave whole rows or whole columns."""
        if len(varying(field.labels)) > 1:
            self.grids.append(core(field.labels).squeeze().numpy())

    def solve(self) -> np.ndarray:
        """Return the smallest label that each label is tied to, ``[count]``."""
        parent = np.concatenate([self._parent, np.arange(len(self._parent), self.count)])
        self._parent, self._edges = joined(parent, self._edges), []
        return self._parent

    def zeroed(self) -> np.ndarray:
        """Return of which labels the masked model holds the slices at zero, ``[count]``, boolean."""
        held = np.zeros(self.count, bool)
        held[list(self.produced)] = True
        alike = joined(np.arange(self.count), self._alike)
        return np.isin(alike, alike[held])

    def reasons(self, roots: np.ndarray) -> dict[int, str]:
        """Return why a root never leaves, by root; those that may leave are not in it."""
        found = {int(roots[FIXED]): "its size is fixed by an input, an output or another operand"}
        for labels, reason in self._frozen:
            for root in np.unique(roots[labels]).tolist():
                if found.get(root, "its size is fixed").startswith("its size is fixed"):
                    found[root] = reason
        return found

    def settle(self) -> np.ndarray:
        """Tie what the grids demand, whole rows or whole columns, whichever leaves more units; return the roots."""
        self._freeze_conflicts()
        for grid in self.grids:
            self._settle(grid)
        return self.solve()

    def _freeze_conflicts(self) -> None:
        """Freeze what two uses of one tensor ask different things of."""
        zeroed = self.zeroed()
        columns = {slot.tensor: slot.labels for slot in self.slots if slot.axis == 1}
        for weight, absorbed in self.absorbed.items():
            if weight in columns and zeroed[columns[weight]].any():
                reason = f"{weight} would have to take up its constant {absorbed.value:.3g}, and writes channels with the same slices"
                self.freeze(torch.from_numpy(columns[weight]), reason)
        tied = [pairs.reshape(-1) for pairs in self._edges] + [labels for labels, _ in self._frozen]
        seen = np.concatenate(tied) if tied else np.zeros(0, np.int64)
        for before, labels in self._replaced:
            if np.isin(before, seen).any():
                self.freeze(labels, "the weight of a grouped convolution is used in another way, too")

    def _settle(self, grid: np.ndarray) -> None:
        roots = self.solve()
        frozen = np.unique(roots[np.concatenate([np.zeros(1, np.int64), *(labels for labels, _ in self._frozen)])])
        classes = roots[grid]
        options = []
        for axis in range(grid.ndim):
            others = tuple(a for a in range(grid.ndim) if a != axis)
            first = classes
            for other in others:
                first = first.take([0], axis=other)
            if (classes == first).all():
                return  # every slice along this axis leaves as a whole already
            options.append(first)
        best = max(options, key=lambda first: _free_classes(classes, first, frozen))
        self.unite(torch.from_numpy(classes), torch.from_numpy(np.ascontiguousarray(best)))


def joined(parent: np.ndarray, edges: Sequence[np.ndarray]) -> np.ndarray:
    """Return the smallest number that each is connected to.

    Args:
        parent: The smallest that each is known to be connected to, ``[count]``.
        edges: Further connections, ``[2, n]`` each.
    """
    parent = parent.copy()
    pairs = np.concatenate(edges, axis=1) if len(edges) else np.zeros((2, 0), np.int64)
    while pairs.shape[1]:
        a, b = parent[pairs[0]], parent[pairs[1]]
        apart = a != b
        pairs, a, b = pairs[:, apart], a[apart], b[apart]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not (parent[parent] == parent).all():
            parent = parent[parent]
    return parent


def _free_classes(classes: np.ndarray, first: np.ndarray, frozen: np.ndarray) -> int:
    """Count the classes that could still leave if every slice of a grid were tied to its ``first`` element."""
    pairs = np.stack([classes.reshape(-1), np.broadcast_to(first, classes.shape).reshape(-1)])
    names, inverse = np.unique(pairs, return_inverse=True)
    parent = joined(np.arange(len(names)), [inverse.reshape(pairs.shape)])
    bad = set(parent[np.isin(names, frozen)].tolist())
    return len(set(parent.tolist()) - bad)
