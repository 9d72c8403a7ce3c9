"""What a Trainer plans: the optimizer steps to come, and the learning rates that they will have."""

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Course:
    """How a fit will go on.

    Attributes:
        steps: Optimizer steps to come.
        batches: Batches of an epoch; inf where that is not known.
        accumulate: Batches of a step; the last step of an epoch takes what is left.
        epoch: Epochs that have been.
    """

    steps: int
    batches: float
    accumulate: int = 1
    epoch: int = 0

    @classmethod
    def of(cls, trainer: Any) -> Self | None:
        """Return the course that a Trainer plans, None where its fit has no end, or its data no known length."""
        total = trainer.estimated_stepping_batches  # -1 where the length is not known and max_steps is not set
        if not math.isfinite(total) or total < 0:
            return None
        steps = int(total) - trainer.global_step
        return cls(steps, trainer.num_training_batches, trainer.accumulate_grad_batches, trainer.current_epoch)

    def __iter__(self) -> Iterator[tuple[int, float, bool]]:
        """Yield for every step its epoch, the number of the batch that completes it, and whether the epoch ends with it."""
        epoch, batch = self.epoch, 0.0
        for _ in range(self.steps):
            batch = min(batch + self.accumulate, self.batches)
            yield epoch, batch, batch == self.batches
            if batch == self.batches:
                epoch, batch = epoch + 1, 0.0


def planned_groups(
    optimizer: torch.optim.Optimizer, schedulers: Sequence[Any], course: Course, keep: Sequence[Any] = ()
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield for every step to come its epoch and the options of all parameter groups; optimizer and schedulers stay as they are.

    Args:
        optimizer: The optimizer.
        schedulers: Lightning's configurations of its learning-rate schedulers, none that waits for a metric.
        course: The steps.
        keep: Objects that schedulers may refer to and that must not be copied, such as the module whose method computes a rate.
    """
    ghost = torch.optim.SGD([{"params": [nn.Parameter(torch.empty(0))]} for _ in optimizer.param_groups], lr=0.1)
    for group, real in zip(ghost.param_groups, optimizer.param_groups, strict=True):
        group.update(copy.deepcopy({key: value for key, value in real.items() if key != "params"}))
    memo = {id(optimizer): ghost} | {id(thing): thing for thing in keep}
    copies = [(c.interval, c.frequency, copy.deepcopy(c.scheduler, dict(memo))) for c in schedulers]
    for epoch, batch, ends in course:
        yield epoch, ghost.param_groups
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the ghost never steps
            for interval, frequency, scheduler in copies:
                if (batch if interval == "step" else epoch + 1 if ends else math.nan) % frequency == 0:
                    scheduler.step()


def rates_to_come(
    trainer: Any, module: Any, optimizer: torch.optim.Optimizer, course: Course
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield what :func:`planned_groups` does for an optimizer of a Trainer; without schedulers where the module steps them itself."""
    configs = [
        config
        for config in trainer.lr_scheduler_configs
        if module.automatic_optimization
        and getattr(config.scheduler, "optimizer", None) is optimizer
        and not config.reduce_on_plateau
    ]
    return planned_groups(optimizer, configs, course, keep=(module, trainer))
