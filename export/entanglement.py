"""Entanglement entropies of the layers whose weights are matrix product operators, as the weights are now: in a model, in a state dict, as a table.

An entropy near its limit ``ln D`` says that a cut uses all of its bond ``D``; one near 0 that a bond of 1 would nearly do.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_prune.errors import CheckpointError
from lightning_prune.structure.layers import layer_from
from lightning_prune.structure.mpo import MPO, build_mpo
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.steps import Tensorize

Entropies = dict[str, list[float | None]]
"""One value per cut, by layer; None where the cores are not finite."""


def entropies_of(modules: Iterable[tuple[str, nn.Module]]) -> Entropies:
    """Return the entropies of all cuts of the layers that have any.

    Args:
        modules: Named modules, such as those of a model.
    """
    return {name: _rounded(layer) for name, layer in modules if isinstance(layer, MPO) and layer.form.bonds}


def entropies_in(state: Mapping[str, Any], plan: Plan) -> Entropies:
    """Return the same from a state dict.

    Args:
        state: Tensors by name.
        plan: The plan that it carries.

    Raises:
        CheckpointError: If it does not hold the cores that the plan names.
    """
    return entropies_of((step.module, _loaded(step, state)) for step in _steps(plan).values())


def entropy_rows(entropies: Entropies, plan: Plan) -> list[dict[str, Any]]:
    """Return the entropies as a table, a row per cut: ``layer``, ``cut``, ``bond``, ``entropy`` and ``limit``, the ``ln`` of the bond.

    The bonds are those of the plan; None, and no limit, of a layer that it does not name.
    """
    bonds = {name: step.form.bonds for name, step in _steps(plan).items()}
    return [
        {"layer": name, "cut": cut, "bond": bond, "entropy": entropy, "limit": bond and math.log(bond)}
        for name, values in entropies.items()
        for cut, (entropy, bond) in enumerate(zip(values, bonds.get(name, [None] * len(values)), strict=True), 1)
    ]


def _steps(plan: Plan) -> dict[str, Tensorize]:
    return {step.module: step for step in plan.steps if isinstance(step, Tensorize)}


def _loaded(step: Tensorize, state: Mapping[str, Any]) -> nn.Module:
    layer = build_mpo(layer_from(step.before, device="meta"), step.form)
    inside = f"{step.module}."
    try:
        layer.load_state_dict(
            {k.removeprefix(inside): v for k, v in state.items() if k.startswith(inside)}, assign=True
        )
    except RuntimeError as error:
        raise CheckpointError(
            f"The checkpoint's plan makes {step.module!r} a matrix product operator, but its cores are not those that it holds: "
            f"{' '.join(str(error).split())} Save the model again."
        ) from error
    return layer


def _rounded(layer: MPO) -> list[float | None]:
    if not all(core.isfinite().all() for core in layer.cores):
        return [None] * len(layer.form.bonds)
    return [max(0.0, round(entropy, 6)) for entropy in layer.entropies()]
