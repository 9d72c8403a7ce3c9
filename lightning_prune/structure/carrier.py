"""How a model keeps its plan: a submodule without parameters that carries it as extra state.

The extra state travels with ``state_dict``, so weights-only files, checkpoints of Trainers that know nothing of us, averaged copies
and ``deepcopy`` keep the plan. It is the plan's JSON as a ``uint8`` tensor: every entry of the state dict stays a tensor, and
``torch.load(weights_only=True)`` reads it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import PlanError
from lightning_prune.structure.plan import Plan

NAME = "lightning_prune_plan"
KEY = f"{NAME}._extra_state"


class PlanCarrier(nn.Module):
    """Holds a plan, without parameters and buffers. In a ``Sequential``, the only place that calls it, it passes its input on.

    Args:
        plan: The plan that the model was built by.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def forward(self, x: Any) -> Any:
        """Return ``x``."""
        return x

    def get_extra_state(self) -> Tensor:
        """Return the plan as ``[bytes]`` of type ``uint8``."""
        return torch.frombuffer(bytearray(self.plan.to_json().encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the plan of a state dict whose steps this model already has; masks may differ.

        Raises:
            PlanError: If the state dict belongs to a model that was changed otherwise.
        """
        plan = decode(state)
        if _shapes(plan) != _shapes(self.plan):
            raise PlanError(
                "The state dict belongs to a model that was compressed otherwise. Load it with load_from_checkpoint."
            )
        self.plan = plan

    def extra_repr(self) -> str:
        """Return the number of steps."""
        return f"{len(self.plan)} steps"


def decode(state: Any) -> Plan:
    """Read the plan from the extra state of a carrier.

    Args:
        state: ``[bytes]`` of type ``uint8``.

    Raises:
        PlanError: If it is anything else.
    """
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.ndim != 1:
        raise PlanError(
            f"The entry {KEY!r} of a state dict is a vector of bytes; this one holds {type(state).__name__}."
        )
    try:
        return Plan.from_json(bytes(state.cpu().numpy()).decode())
    except UnicodeDecodeError as error:
        raise PlanError(f"The entry {KEY!r} of the state dict is not text.") from error


def plan_in(state_dict: Mapping[str, Any]) -> Plan | None:
    """Return the plan that a state dict carries, or None.

    Raises:
        PlanError: If it is broken.
    """
    return decode(state_dict[KEY]) if KEY in state_dict else None


def plan_of(model: nn.Module) -> Plan:
    """Return the plan that ``model`` was built by; empty for a dense model."""
    carrier = getattr(model, NAME, None)
    return carrier.plan if isinstance(carrier, PlanCarrier) else Plan()


def attach(model: nn.Module, plan: Plan) -> None:
    """Let ``model`` carry ``plan``, in place of the one it may have; an empty plan removes the carrier."""
    if hasattr(model, NAME):
        delattr(model, NAME)
    if plan.steps:
        model.add_module(NAME, PlanCarrier(plan))


def _shapes(plan: Plan) -> list[dict[str, Any]]:
    return [{key: value for key, value in step.to_dict().items() if key != "bits"} for step in plan.steps]
