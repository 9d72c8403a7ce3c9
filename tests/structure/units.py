"""Units as sets, for tests that state by hand which slices leave together."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.flops import count_flops
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.groups import Structure, find_units
from lightning_prune.structure.plan import Origin, Plan
from lightning_prune.structure.removal import removal_steps
from lightning_prune.structure.trials import draw, try_sizes

Unit = frozenset[
    tuple[str, int, int]
]  # tensor, axis, index; of a weight whose rows keep different columns (tensor, row, column)


class Net(nn.Module):
    """A network of one expression: members by name, and what ``forward`` does with them."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.run = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def structure_of(model: nn.Module, *inputs: Tensor) -> Structure:
    """Find and try the units of ``model``, made float64 and set to evaluation mode."""
    model.double().eval()
    calls = as_calls(in_double(inputs))
    return try_sizes(model, calls, find_units(model, calls))


def in_double(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def units(structure: Structure) -> set[Unit]:
    """Return every unit as the set of its slices."""
    found: list[set[tuple[str, int, int]]] = [set() for _ in range(structure.count)]
    for slot in structure.slots:
        for place, unit in np.ndenumerate(slot.units):
            if unit >= 0:
                found[unit].add((slot.tensor, slot.axis, *place) if len(place) == 1 else (slot.tensor, *place))
    assert len(set(map(frozenset, found))) == structure.count
    return set(map(frozenset, found))


def at(name: str, axis: int, *indices: int) -> set[tuple[str, int, int]]:
    """Return slices of one tensor along one axis."""
    return {(name, axis, index) for index in indices}


def layer(name: str, *indices: int, bias: bool = True) -> set[tuple[str, int, int]]:
    """Return the filters ``indices`` of a layer with their biases."""
    return at(f"{name}.weight", 0, *indices) | (at(f"{name}.bias", 0, *indices) if bias else set())


def tied(structure: Structure) -> list[list[set[Unit]]]:
    """Return every count tie as blocks of units."""
    names = dict(enumerate(by_number(structure)))
    return [[{names[unit] for unit in block.tolist()} for block in tie] for tie in structure.ties]


def by_number(structure: Structure) -> list[Unit]:
    found: list[set[tuple[str, int, int]]] = [set() for _ in range(structure.count)]
    for slot in structure.slots:
        for place, unit in np.ndenumerate(slot.units):
            if unit >= 0:
                found[unit].add((slot.tensor, slot.axis, *place) if len(place) == 1 else (slot.tensor, *place))
    return list(map(frozenset, found))


def cut(model: nn.Module, structure: Structure, kept: np.ndarray, *inputs: Tensor) -> nn.Module:
    """Return ``model`` without the units that do not stay, after comparing it with the masked model in both modes, and its costs."""
    inputs, small = in_double(inputs), copy.deepcopy(model)
    steps = removal_steps(model, structure, kept)
    for step in steps:
        step.emulate(small)
    expected, dense = [outputs(copy.deepcopy(small).train(mode), inputs) for mode in (False, True)], model
    for step in steps:
        step.apply(small)
    for mode, values in zip((False, True), expected, strict=True):
        for one, other in zip(values, outputs(copy.deepcopy(small).train(mode), inputs), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)
    whole = np.ones(structure.count, bool)
    flops = count_flops(dense, inputs).total - structure.flops(whole) + structure.flops(kept)
    assert count_flops(small, inputs).total == flops
    size = [sum(p.numel() for p in one.parameters()) for one in (dense, small)]
    assert size[1] == size[0] - structure.params(whole) + structure.params(kept)
    assert Plan.from_json(Plan(steps, origin=Origin.of(dense, 1)).to_json()).steps == steps
    return small


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [y.clone() for y in tree_leaves(model(*inputs))]


def cut_at_random(model: nn.Module, structure: Structure, *inputs: Tensor) -> None:
    """Cut several random sets of units, and judge each."""
    for seed in range(4):
        cut(model, structure, draw(structure, np.arange(structure.count), seed=seed), *inputs)
