"""What a removal of channels shall reach, in the coordinates of the dense model: multiply-adds, parameters or channels."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_prune.budget import resolve_bound
from lightning_prune.callback.task import Task
from lightning_prune.errors import OptionError
from lightning_prune.structure.costs import Polynomial
from lightning_prune.structure.groups import Slot, Structure
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.steps import KeepChannels

Bounded = Literal["flops", "params", "sparsity"]


@dataclasses.dataclass(frozen=True)
class Budget:
    """A target for one model.

    Attributes:
        cost: Cost of the model as a function of the units that stay, ``[units]``, boolean.
        have: Cost as the model stands.
        dense: Cost of the dense model.
        bound: What the cost may be at most.
    """

    cost: Callable[[NDArray[np.bool_]], int]
    have: int
    dense: int
    bound: int

    def on_the_way(self, share: float) -> int:
        """Return the bound after ``share``, in [0, 1], of the way from what the model costs now; below that cost unless ``share`` is 0."""
        return self.bound + math.floor((1 - share) * max(0, self.have - self.bound))


@dataclasses.dataclass(frozen=True)
class ChannelTarget:
    """A bound as a user gives it.

    Attributes:
        name: What is bounded.
        value: For ``flops`` and ``params`` a share of the dense model (float) or a count (int); for ``sparsity`` the share of channels that leave.
        by_group: For ``sparsity`` instead: the share that leaves of the groups that a glob matches; others stay whole.
    """

    name: Bounded
    value: float | int
    by_group: Mapping[str, float] | None = None

    @classmethod
    def of(cls, method: str, flops: object, params: object, sparsity: object = ...) -> "ChannelTarget":
        """Check the options of a method; one without ``sparsity`` leaves that out.

        Raises:
            OptionError: If not exactly one is given, or it is no bound.
        """
        options: dict[Bounded, object] = {"flops": flops, "params": params, "sparsity": sparsity}
        options = {name: value for name, value in options.items() if value is not ...}
        given = {name: value for name, value in options.items() if value is not None}
        if len(given) != 1:
            raise OptionError(f"{method} needs exactly one of {', '.join(options)}; got {given or 'none'}.")
        ((name, value),) = given.items()
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "sparsity" and isinstance(value, Mapping):
            wrong = {key: share for key, share in value.items() if not isinstance(key, str) or not _is_share(share)}
            if wrong or not value:
                raise OptionError(
                    f"{method}(sparsity={value!r}): give shares in [0, 1) by name or glob of a group, at least one, e.g. {{'layer1.*': 0.3}}."
                )
            return cls(name, 0.0, dict(value))
        if name == "sparsity":
            if not number or not 0 <= value < 1:  # type: ignore[operator]
                raise OptionError(
                    f"{method}(sparsity={value!r}): give a float in [0, 1), the share of channels that leave."
                )
        elif not number or not (0 < value <= 1 if isinstance(value, float) else value >= 1):  # type: ignore[operator]
            raise OptionError(
                f"{method}({name}={value!r}): give a float in (0, 1], a share of the dense model, or an int of at least 1, a count."
            )
        return cls(name, value)  # type: ignore[arg-type]

    def kept_by_group(self, share: float) -> dict[str, float] | None:
        """Return the share of channels that groups keep after ``share`` of the way, by glob; None where one bound holds for all."""
        if self.by_group is None:
            return None
        return {name: float(1 - Fraction(repr(float(gone))) * Fraction(share)) for name, gone in self.by_group.items()}

    def met(self, task: Task) -> str | None:
        """Return in words why a bound on multiply-adds or parameters is met already, or None."""
        if self.name == "sparsity" or not task.plan:
            return None
        have, dense = self.counts(task)
        bound = resolve_bound(self.value, dense, self.name)
        return None if have > bound else f"the model has {have:,} {self.name}, at most {bound:,} are asked for"

    def met_by(self, task: Task, structure: Structure) -> str | None:
        """Return in words why a sparsity is reached already, or None."""
        budget = self.budget(task, structure)
        if (
            self.name != "sparsity"
            or self.by_group is not None
            or not task.plan
            or budget.have > budget.bound
            or not budget.dense
        ):
            return None
        return f"{budget.dense - budget.have:,} of {budget.dense:,} channels have left, sparsity={self.value} are asked for"

    def budget(self, task: Task, structure: Structure) -> Budget:
        """Return the budget of a model.

        Args:
            task: The model, what it costs and where it came from.
            structure: Its units. A sparsity counts the channels of the layers in which some can leave, of the dense model.

        Raises:
            OptionError: If a count exceeds that of the dense model.
        """
        everything = np.ones(structure.count, bool)
        if self.name == "sparsity":
            slots = _counted(structure)
            channels = Polynomial([(1, (slot.units,), 1) for slot in slots])
            have = channels(everything)
            dense = have + _gone_before(task.plan, {slot.tensor.rpartition(".")[0] for slot in slots})
            return Budget(channels, have, dense, math.floor((1 - Fraction(repr(float(self.value)))) * dense))
        polynomial = structure.flops if self.name == "flops" else structure.params
        have, dense = self.counts(task)
        rest = have - polynomial(everything)
        return Budget(lambda kept: rest + polynomial(kept), have, dense, resolve_bound(self.value, dense, self.name))

    def counts(self, task: Task) -> tuple[int, int]:
        """Return cost now and cost of the dense model."""
        if self.name == "flops":
            return task.cost.total, task.origin.flops
        return task.params, task.origin.params


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _counted(structure: Structure) -> list[Slot]:
    """Return where the channels that can leave are written: rows of weights."""
    return [
        slot
        for slot in structure.slots
        if slot.zeroed and slot.units.ndim == 1 and len(structure.shapes[slot.tensor]) >= 2 and (slot.units >= 0).any()
    ]


def _gone_before(plan: Plan, layers: set[str]) -> int:
    """Return how many channels the steps of earlier stages have taken from ``layers``, or from what these were factorized from."""
    gone = 0
    for step in plan.steps:
        if isinstance(step, KeepChannels) and any(f"{layer}.".startswith(f"{step.module}.") for layer in layers):
            for cut in step.tensors.values():
                gone += sum(cut.shape[axis] - cut.after[axis] for axis in cut.zero) if len(cut.shape) >= 2 else 0
    return gone
