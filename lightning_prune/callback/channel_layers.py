"""Layers as users name them, and the units of a model: who writes which, which may leave, and why others stay."""

import dataclasses
from collections.abc import Set

import numpy as np
from torch import nn

from lightning_prune.structure.groups import Structure
from lightning_prune.structure.removal import left_alone

_TIED = "as many of its channels must leave as of a layer that include and exclude leave out"


def owners_of_weights(model: nn.Module) -> dict[str, set[str]]:
    """Return the layers that hold each weight of two or more axes, by its first name: several where it is tied.

    The parts of a parametrized weight belong to the layer that it is a weight of; ``""`` is the model itself.
    """
    first = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    found: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        layer = name.partition("parametrizations.")[0].rstrip(".")
        for parameter in module.parameters(recurse=False):
            if parameter.ndim >= 2:
                found.setdefault(first[id(parameter)], set()).add(layer)
    return found


def hold_unselected(model: nn.Module, structure: Structure, layers: Set[str], selected: bool) -> Structure:
    """Return the structure in which the units stay that a layer writes which is not selected.

    Args:
        model: The model.
        structure: Its units.
        layers: The layers that are selected.
        selected: Whether the user selects at all; then units that no weight writes stay, too.
    """
    owners = owners_of_weights(model)
    reasons: dict[tuple[str, int], str] = {}
    held = []
    for group in structure.groups:
        slots = [structure.slots[index] for index in group.slots]
        writers = {name for slot in slots if slot.zeroed for name in owners.get(slot.tensor, ())}
        outside = sorted(writers - layers)
        if outside or (selected and not writers):
            held.append(group.units)
            reason = f"they leave only with those of {outside[0]!r}, which is not selected" if outside else _TIED
            reasons |= {(slot.tensor, slot.axis): reason for slot in slots}
    if not held:
        return structure
    rest = structure.without(np.concatenate(held), _TIED)
    told = {key: reasons.get(key, why) if why == _TIED else why for key, why in rest.reasons.items()}
    return dataclasses.replace(rest, reasons=told)


def why_left_alone(model: nn.Module, structure: Structure, layers: Set[str]) -> dict[str, str]:
    """Return why none of the channels of a layer can leave, by name of the layer; of tied weights and parts the reason of the first."""
    owners = owners_of_weights(model)
    holders = {tensor.rpartition(".")[0]: names & layers for tensor, names in owners.items() if names & layers}
    reasons = left_alone(structure, holders)
    return {name: reasons[holder] for holder in reversed(reasons) for name in sorted(holders[holder])}


def still_fits(structure: Structure, model: nn.Module) -> bool:
    """Tell whether the model has the tensors that the structure was found in."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return dict(structure.shapes) == {name: tuple(tensor.shape) for name, tensor in tensors}
