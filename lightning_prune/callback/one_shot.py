"""Compression without a Trainer."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_prune.callback.compression import Compression
from lightning_prune.callback.task import Task
from lightning_prune.errors import OptionError
from lightning_prune.probe import Probe
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.surgery import compact_

M = TypeVar("M", bound=nn.Module)


def compress(
    model: M,
    method: Compression,
    example_inputs: Any,
    data: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> tuple[M, Plan]:
    """Return a smaller copy of a model and the plan that it carries.

    Args:
        model: Any module; left as it is.
        method: A method that acts at once, such as ``LowRank(flops=0.5)``.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of ``model``, on its device.
        data: Batches, for methods that need data and for the statistics of batch normalization.
        loss: ``loss(model, batch)``, a scalar, for methods that need one. Without it the first entry of a batch is the input.

    Returns:
        The smaller model and its plan, earlier stages included.

    Raises:
        OptionError: If the method lives from training.
        ModelError: If the model cannot be run, or nothing would change.
        BudgetError: If the budget cannot be met.
    """
    if method.gradual:
        raise OptionError(
            f"{type(method).__name__} acts while a model trains. Put it into Trainer(callbacks=[...]) and fit."
        )
    small = copy.deepcopy(model)
    task = Task.of(small, Probe.of_data(small, data, loss), as_calls(example_inputs))
    method.claim(small)
    if method.met(task) is None:
        plan = method.decided(task, method.score(task))
        compact_(small, plan, task.calls)
        if data is not None:
            task.probe.recalibrate(method.recalibrate_bn)
    return small, plan_of(small)
