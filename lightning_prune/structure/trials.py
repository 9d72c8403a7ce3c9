"""Sizes that the user's Python code writes down, found out by trial.

In the graph, ``x.view(b, self.h, 64)`` and ``x.view(b, x.shape[1] // 64, 64)`` look alike. Which it is shows when units leave a copy of the
model and its real Python code runs: the output equals the masked model's, or equals it once integer attributes of the modules concerned
have followed, or the size is fixed and the units stay.
"""

import copy
import dataclasses
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.errors import ModelError
from lightning_prune.structure.calls import Call
from lightning_prune.structure.groups import Structure
from lightning_prune.structure.removal import removal_steps
from lightning_prune.structure.tracing.labels import Size
from lightning_prune.structure.tracing.program import lines_of, reads_training

log = logging.getLogger(__name__)

_FOREIGN = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, NotImplementedError)
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 5e-2}
_SMALL = 1_000_000  # parameters up to which trials cost next to nothing


@dataclasses.dataclass(frozen=True)
class _Failure:
    """How real Python fails to compute what the masked model does.

    Attributes:
        reason: In words.
        forward: The line of the innermost ``forward`` of the user's on the way to the error; empty if there was none.
        line: The line where the error came up, perhaps in a function that ``forward`` calls.
    """

    reason: str
    forward: str = ""
    line: str = ""


@dataclasses.dataclass(frozen=True)
class _Subject:
    """A model on trial.

    Attributes:
        model: A copy of the model in eval mode, its weights moved a little.
        calls: The calls that stand for it.
        shapes_in_training: The shapes of what it returns in train mode, where its own code looks at the mode; None if it does not, or does not run.
        small: Whether trials cost next to nothing.
    """

    model: nn.Module
    calls: Sequence[Call]
    shapes_in_training: list[torch.Size] | None
    small: bool

    @classmethod
    def of(cls, model: nn.Module, calls: Sequence[Call]) -> "_Subject":
        """Copy the model and prepare the copy."""
        subject = cls(_copied(model).eval(), calls, None, sum(p.numel() for p in model.parameters()) < _SMALL)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            _shake(subject.model)
            if not reads_training(model):
                return subject
            try:
                shapes = [t.shape for t in subject.outputs(subject.copy().train())]
            except _FOREIGN as error:
                log.debug("Sizes are not tried in train mode, in which the model fails: %s", error)
                return subject
        return dataclasses.replace(subject, shapes_in_training=shapes)

    def copy(self) -> nn.Module:
        """Return a copy to take steps on. It shares the storages of its parameters, which steps swap and never write to."""
        return _copied(self.model, [p for p in self.model.parameters() if type(p) is nn.Parameter])

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Return the tensors that a copy returns."""
        return [t for call in self.calls for t in _tensors(call.run(model))]


def try_sizes(model: nn.Module, calls: Sequence[Call], structure: Structure) -> Structure:
    """Find out which sizes in the user's code follow when units leave.

    Args:
        model: The model; left as it is. Copies of it are run.
        calls: The calls that stand for it.
        structure: Its units.

    Returns:
        The structure with the attributes that must follow; units whose size is fixed by the code never leave, and the reason names the line.
    """
    families = _families(structure)
    small = sum(p.numel() for p in model.parameters()) < _SMALL
    if not structure.count or not (families or structure.written or small):
        return structure
    everything, subject = np.arange(structure.count), _Subject.of(model, calls)
    for followed in _candidates(subject, structure, structure.sizes):
        if _failure(subject, followed, everything) is None:
            return followed
    result = _by_family(subject, structure, families)
    if _failure(subject, result, np.arange(result.count)) is None:
        return result
    return _by_group(subject, result)


def _by_family(subject: _Subject, structure: Structure, families: Sequence[Sequence[Size]]) -> Structure:
    """Try the units behind lines of code that write sizes alone; refuse those of which none can leave."""
    followed, refused = list(structure.sizes), []
    for sizes in families:
        found = _alone(subject, structure, sizes)
        if isinstance(found, _Failure):
            refused.append((sizes, found))
        else:
            followed += found
    result = dataclasses.replace(structure, sizes=tuple(followed))
    for sizes, failure in refused:
        result = _refuse(result, sizes, failure)
    return result


def _by_group(subject: _Subject, structure: Structure) -> Structure:
    """Admit groups as long as real Python follows: code may compute one size from the shape of another tensor.

    Layers of one name but for its numbers are tried together; where the first and the last of them fail alone at the line at which all fail
    together, none is admitted.
    """
    admitted: list[np.ndarray] = []
    refused: list[tuple[np.ndarray, str]] = []

    def failure(units: Sequence[np.ndarray]) -> _Failure | None:
        return _failure(subject, structure, np.concatenate([*admitted, *units]))

    def admit(units: Sequence[np.ndarray]) -> None:
        together = failure(units)
        if together is None:
            admitted.extend(units)
        elif len(units) == 1 or (len(units) > 2 and failure(units[:1]) == failure(units[-1:]) == together):
            refused.extend((own, together.reason) for own in units)
        else:
            admit(units[: len(units) // 2])
            admit(units[len(units) // 2 :])

    alike: dict[str, list[np.ndarray]] = {}
    for group in structure.groups:
        alike.setdefault(re.sub(r"\d+", "#", group.name), []).append(group.units)
    for units in alike.values():
        admit(units)
    result, kept = structure, np.arange(structure.count)
    for own, reason in refused:
        now = np.flatnonzero(np.isin(kept, own))
        result, gone = result.without_units(now, f"{reason} when its size changes")
        kept = kept[~gone]
    return result


def _refuse(structure: Structure, sizes: Sequence[Size], failure: _Failure) -> Structure:
    """Let the units behind ``sizes`` stay; a function that a line of theirs calls is named instead if it is what fails."""
    wheres = {size.where for size in sizes}
    where = failure.line if failure.forward in wheres else sizes[0].where
    labels = [s.labels for s in structure.sizes if s.where in wheres and _fixes(s)]
    units = np.unique(np.concatenate([own.reshape(-1) for own in labels])) if labels else np.zeros(0, np.int64)
    return structure.without(units[units >= 0], f"its size is fixed by the code at {where}")


def _fixes(size: Size) -> bool:
    """Tell whether a number changes when units leave: some row of it is a single unit."""
    return size.attribute is None and bool(
        (size.labels.min(1) == size.labels.max(1)).any() and (size.labels >= 0).any()
    )


def _families(structure: Structure) -> list[list[Size]]:
    """Gather the sizes that may fix units: those of the same line of code together, and lines about the same units."""
    lines: dict[str, list[Size]] = {}
    for size in structure.sizes:
        if _fixes(size):
            lines.setdefault(size.where, []).append(size)
    families: list[tuple[np.ndarray, list[Size]]] = []
    for sizes in lines.values():
        touched = np.zeros(structure.count + 1, bool)
        touched[np.concatenate([size.labels.reshape(-1) for size in sizes])] = True
        touched[-1] = False
        met = [known for known in families if (known[0] & touched).any()]
        families = [known for known in families if not (known[0] & touched).any()]
        joined = [size for _, own in met for size in own] + sizes
        families.append((np.logical_or.reduce([touched, *(mask for mask, _ in met)]), joined))
    return [sizes for _, sizes in families]


def _alone(subject: _Subject, structure: Structure, sizes: Sequence[Size]) -> tuple[Size, ...] | _Failure:
    """Try the units behind some sizes alone; return the attributes that follow, or how it fails without any if the sizes are fixed."""
    units = np.unique(np.concatenate([size.labels.reshape(-1) for size in sizes]))
    units = units[units >= 0]
    touched = np.zeros(structure.count + 1, bool)
    touched[units] = True
    related = [s for s in structure.sizes if touched[s.labels].any()]
    failures = []
    for found in _candidates(subject, structure, related):
        failure = _failure(subject, found, units)
        if failure is None:
            return found.sizes[len(structure.sizes) :]
        failures.append(failure)
    return failures[0]


def _candidates(subject: _Subject, structure: Structure, sizes: Sequence[Size]) -> Iterator[Structure]:
    """Yield the structure as it is, then with attributes that may follow ``sizes``: those of the module, then of those around it, too.

    Where several attributes of the module hold the same number, say as many heads as a head has channels, they follow together, then one alone.
    """
    yield structure
    own, first, second = (_with_attributes(subject, structure, sizes, 1, place) for place in (None, 0, 1))
    ambiguous = own is not None and first is not None and len(first.sizes) < len(own.sizes)
    around = _with_attributes(subject, structure, sizes, 2, None)
    yield from filter(None, (own, *((first, second) if ambiguous else ()), around))


def _with_attributes(
    subject: _Subject, structure: Structure, sizes: Sequence[Size], reach: int, place: int | None
) -> Structure | None:
    """Let attributes of the modules concerned follow sizes: those that hold the very number; None if there are none in reach.

    Args:
        subject: The model.
        structure: Its units.
        sizes: What attributes may follow.
        reach: How far they are looked for: in the module (1), and in those around it, too (2).
        place: Which attribute of several in one module with the same number; None for all.
    """
    added: list[Size] = []
    for size in sizes:
        if _fixes(size):
            for name in _modules_in_reach(size.module, reach):
                held = _numbers(subject.model.get_submodule(name), size.before)
                held = held if place is None or len(held) < 2 else held[place : place + 1]
                added += [dataclasses.replace(size, module=name, attribute=attribute) for attribute in held]
    for _, own in itertools.groupby(sizes, key=lambda s: s.node):
        parts = list(own)
        for name in _modules_in_reach(parts[0].module, reach):
            for attribute in _lists(subject.model.get_submodule(name), [size.before for size in parts]):
                added += [
                    dataclasses.replace(s, module=name, attribute=attribute, index=i) for i, s in enumerate(parts)
                ]
    return dataclasses.replace(structure, sizes=(*structure.sizes, *added)) if added else None


def _modules_in_reach(name: str, reach: int) -> list[str]:
    parts = name.split(".") if name else []
    return [name] if reach == 1 else [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def _numbers(module: nn.Module, number: int) -> list[str]:
    return [key for key, value in vars(module).items() if type(value) is int and value == number]


def _lists(module: nn.Module, numbers: Sequence[int]) -> list[str]:
    return [
        key
        for key, value in vars(module).items()
        if isinstance(value, list | tuple) and all(type(v) is int for v in value) and list(value) == list(numbers)
    ]


def _failure(subject: _Subject, structure: Structure, units: np.ndarray) -> _Failure | None:
    """Return how real Python fails to compute what the masked model does when some of ``units`` have left; None if it does not."""
    if not len(units):
        return None
    for kept in _draws(structure, units, subject.small):
        failure = None if kept.all() else _trial(subject, structure, kept)
        if failure is not None:
            return failure
    return None


def _draws(structure: Structure, units: np.ndarray, thorough: bool) -> Iterator[np.ndarray]:
    """Yield sets of units that stay; with small numbers a size in the code may fit some of them by chance.

    The units of a group that lie on different sides of a size, before a cut and behind it, are cells. Of every two cells one loses units
    while the other loses none, and the other way round: the bits of its number decide for a cell. A model that is costly to run has the
    first bit tried alone.
    """
    cells = _cells(structure)
    chosen = np.zeros(structure.count, bool)
    chosen[units] = True
    among = np.array([bool(chosen[cell].any()) for cell in cells])
    numbers = np.cumsum(among) - 1
    bits = [0, *range(max(1, int(numbers[-1]).bit_length()))] if thorough else [0]
    for trial, bit in enumerate(bits):
        share = 0.5 if trial % 2 == 0 else 1.0  # about half, or all but one
        for side in (0, 1):
            losing = among & ((numbers >> bit) % 2 == side)
            yield _draw(structure, units, cells, share * losing, losing, np.random.default_rng(trial))
    for seed in range(4 if thorough else 2):
        yield draw(structure, units, seed=seed)


def _cells(structure: Structure) -> list[np.ndarray]:
    """Return the units of every group, apart where a size counts some of them."""
    cell_of = np.zeros(structure.count, np.int64)
    for index, group in enumerate(structure.groups):
        cell_of[group.units] = index
    for size in filter(_fixes, structure.sizes):
        inside = np.zeros(structure.count, bool)
        inside[size.labels[size.labels >= 0]] = True
        cell_of = np.unique(2 * cell_of + inside, return_inverse=True)[1]
    return [np.flatnonzero(cell_of == cell) for cell in range(cell_of.max() + 1)]


def _trial(subject: _Subject, structure: Structure, kept: np.ndarray) -> _Failure | None:
    trial = subject.copy()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            steps = removal_steps(trial, structure, kept)
            for step in steps:
                step.emulate(trial)
            expected = [t.clone() for t in subject.outputs(trial)]
            for step in steps:
                step.apply(trial)
            found = subject.outputs(trial)
            if len(expected) != len(found) or not all(map(_close, expected, found)):
                return _Failure("the code computes something else, without an error,")
            shapes = subject.shapes_in_training
            if shapes is not None and shapes != [t.shape for t in subject.outputs(trial.train())]:
                return _Failure("the code in train mode returns other shapes")
    except _FOREIGN as error:
        forward, line = lines_of(error)
        reason = f"the code at {line} fails" if line else f"the code fails ({type(error).__name__})"
        return _Failure(reason, forward, line)
    return None


def _copied(model: nn.Module, shared: Sequence[nn.Parameter] = ()) -> nn.Module:
    """Return a copy; the storages of ``shared`` parameters stand behind both.

    Raises:
        ModelError: If a module keeps a tensor that is computed, which torch does not copy.
    """
    try:
        return copy.deepcopy(model, {id(p): nn.Parameter(p.data, p.requires_grad) for p in shared})
    except RuntimeError as error:
        computed = [
            f"{name!r} holds {key!r}"
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, Tensor) and not value.is_leaf
        ]
        if not computed:
            raise
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {', '.join(computed)}, tensors that are computed and carry gradients. Detach them; "
            "torch.nn.utils.weight_norm is undone by remove_weight_norm, and torch.nn.utils.parametrizations.weight_norm can be copied."
        ) from error


def _close(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    if not expected.is_floating_point():
        return bool((expected == found).all())
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    gap = float((expected.double() - found.double()).abs().max()) if expected.numel() else 0.0
    return gap <= _TOLERANCE.get(expected.dtype, 1e-3) * max(scale, 1e-30)


def _shake(model: nn.Module) -> None:
    """Move the weights a little: a branch that starts with a scale of zero would hide what goes wrong in it."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel():
            values = parameter.detach().nan_to_num(0.0, 0.0, 0.0)  # a diverged model has the same structure
            spread = float(values.float().std(correction=0)) or 0.1
            noise = torch.randn(parameter.shape, generator=generator) * 0.1 * spread
            parameter.data = values + noise.to(parameter.device, parameter.dtype)


def draw(structure: Structure, units: np.ndarray, share: float = 0.5, seed: int = 0) -> np.ndarray:
    """Return which units stay when about a share of ``units`` leaves at random, unevenly, count ties respected.

    Args:
        structure: All units.
        units: Numbers of those that may leave.
        share: How many of them leave.
        seed: Of the draw.

    Returns:
        ``[units]``, boolean; every group keeps at least one unit.
    """
    random = np.random.default_rng(seed)
    groups = len(structure.groups)
    chance = random.uniform(0, 2 * share, groups) * random.integers(0, 3, groups).clip(max=1)
    least = random.integers(0, 2, groups).astype(bool)
    return _draw(structure, units, [group.units for group in structure.groups], chance, least, random)


def _draw(
    structure: Structure,
    units: np.ndarray,
    cells: Sequence[np.ndarray],
    chance: np.ndarray,
    least: np.ndarray,
    random: np.random.Generator,
) -> np.ndarray:
    """Return which units stay.

    Args:
        structure: All units.
        units: Numbers of those that may leave.
        cells: All units, in parts that keep one unit each.
        chance: Of each part, how probable it is that a unit leaves, ``[cells]``.
        least: Whether each part loses one unit at least, if it has two, ``[cells]``, boolean.
        random: Draws.
    """
    together = _together(structure)
    allowed = np.zeros(structure.count, bool)
    allowed[units] = True
    blocked = np.zeros(structure.count, bool)
    np.logical_or.at(blocked, together, ~allowed)
    allowed &= ~blocked[together]
    cell_of = np.zeros(structure.count, np.int64)
    for index, cell in enumerate(cells):
        cell_of[cell] = index
    leaves = (random.uniform(size=structure.count) < chance[cell_of])[together] & allowed
    for cell, one in zip(cells, least, strict=True):
        own = together[cell]
        if one and not leaves[cell].any() and allowed[cell].any():
            leaves[np.isin(together, random.choice(own[allowed[cell]], 1))] = True
    for cell in cells:
        if leaves[cell].all():
            leaves[np.isin(together, random.choice(together[cell], 1))] = False
    kept: np.ndarray = ~leaves
    return kept


def _together(structure: Structure) -> np.ndarray:
    """Return a number per unit: units with the same number leave together, blocks of count ties matched by position."""
    parent = np.arange(structure.count)
    edges = [np.stack([np.broadcast_to(tie[0], np.shape(b)), b]) for tie in structure.ties for b in tie[1:]]
    pairs = np.concatenate([e.reshape(2, -1) for e in edges], axis=1) if edges else np.zeros((2, 0), np.int64)
    while pairs.shape[1]:
        a, b = parent[pairs[0]], parent[pairs[1]]
        apart = a != b
        pairs, a, b = pairs[:, apart], a[apart], b[apart]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not (parent[parent] == parent).all():
            parent = parent[parent]
    return parent


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(vars(value))
