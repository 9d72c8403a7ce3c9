"""The steps of a plan: one change of one module each, as data that can be explained, built, applied and undone."""

from collections.abc import Mapping
from typing import Any

from lightning_prune.errors import PlanError
from lightning_prune.structure.steps.absorb import AbsorbConstants
from lightning_prune.structure.steps.add import AddToWeight
from lightning_prune.structure.steps.attention import OpenHeads
from lightning_prune.structure.steps.base import Step
from lightning_prune.structure.steps.channels import KeepChannels
from lightning_prune.structure.steps.cut import Cut
from lightning_prune.structure.steps.factorize import Factorize
from lightning_prune.structure.steps.gather import GatherInputs
from lightning_prune.structure.steps.mask import MaskWeight, pack_bits, unpack_bits
from lightning_prune.structure.steps.rotate import Rotate
from lightning_prune.structure.steps.scale import ScaleInputs
from lightning_prune.structure.steps.tensorize import Tensorize
from lightning_prune.structure.steps.unroll import Unroll

STEPS: dict[str, type[Step]] = {
    kind.action: kind
    for kind in (
        MaskWeight,
        AddToWeight,
        AbsorbConstants,
        ScaleInputs,
        Factorize,
        Rotate,
        Unroll,
        Tensorize,
        KeepChannels,
        GatherInputs,
        OpenHeads,
    )
}


def read_step(item: Mapping[str, Any]) -> Step:
    """Read a step from the JSON types of a plan, which may come from a file that nobody vouches for.

    Args:
        item: What :meth:`Step.to_dict` returned.

    Raises:
        PlanError: If it is of an unknown kind, or broken.
    """
    fields = dict(item)
    action = fields.pop("action")
    if action not in STEPS:
        raise PlanError(
            f"The plan holds a step {action!r}; known are {', '.join(sorted(STEPS))}. Upgrade lightning-prune."
        )
    if not isinstance(fields["module"], str):
        raise PlanError(f"The plan names a module {fields['module']!r}; names are text.")
    return STEPS[action].from_dict(fields)


__all__ = [
    "STEPS",
    "AbsorbConstants",
    "AddToWeight",
    "Cut",
    "Factorize",
    "GatherInputs",
    "KeepChannels",
    "MaskWeight",
    "OpenHeads",
    "Rotate",
    "ScaleInputs",
    "Step",
    "Tensorize",
    "Unroll",
    "pack_bits",
    "read_step",
    "unpack_bits",
]
