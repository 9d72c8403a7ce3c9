"""What a method is given to decide on: the model, what it costs, where it came from, and a probe."""

import dataclasses
from collections.abc import Sequence
from typing import Self

from torch import nn

from lightning_prune.flops import FlopCount, count_flops
from lightning_prune.probe import Probe
from lightning_prune.structure.calls import Call, signature
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.plan import Origin, Plan


@dataclasses.dataclass(frozen=True)
class Task:
    """A model to be compressed.

    Attributes:
        model: The model as it stands, earlier stages applied.
        calls: What stands for the model when it is traced and counted.
        cost: Multiply-adds of the model as it stands, by module, with the shapes that its layers see.
        plan: The steps that the model already carries.
        origin: The dense model; budgets and shares refer to it.
        probe: Data, where a method needs any.
        progress: How far a gradual schedule has come, 0 to 1; 1 for a method that acts at once.
    """

    model: nn.Module
    calls: tuple[Call, ...]
    cost: FlopCount
    plan: Plan
    origin: Origin
    probe: Probe
    progress: float = 1.0

    @classmethod
    def of(cls, model: nn.Module, probe: Probe, calls: Sequence[Call] = (), progress: float = 1.0) -> Self:
        """Count the model and describe it.

        Args:
            model: The model, dense or carrying a plan.
            probe: Its probe.
            calls: What to count; by default what the probe finds.
            progress: How far a gradual schedule has come.
        """
        calls = tuple(calls) or probe.example_calls()
        with probe.quiet():
            cost = count_flops(model, calls)
        plan = plan_of(model)
        return cls(
            model, calls, cost, plan, plan.origin or Origin.of(model, cost.total, signature(calls)), probe, progress
        )

    @property
    def params(self) -> int:
        """Number of parameters of the model as it stands, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())
