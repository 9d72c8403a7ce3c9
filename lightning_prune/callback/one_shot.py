"""Compression without a Trainer, and what can be known before there is one."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_prune.callback.checks import check_claims, check_model
from lightning_prune.callback.compression import Compression
from lightning_prune.callback.task import Task
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.probe import Probe
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.surgery import compact

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
    check_model(model)
    if not isinstance(method, Compression):
        raise OptionError(f"compress: method={method!r}. Give a method with its budget, such as LowRank(flops=0.5).")
    if method.gradual:
        raise OptionError(
            f"{type(method).__name__} acts while a model trains. Put it into Trainer(callbacks=[...]) and fit."
        )
    return end_of(model, method, example_inputs, data, loss)


def end_of(
    model: M,
    method: Compression,
    example_inputs: Any,
    data: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> tuple[M, Plan]:
    """Return what a method makes of a model in the end, judged by the weights as they are: of a gradual one, the end of its schedule.

    Args:
        model: Any module; left as it is.
        method: Any method.
        example_inputs: As for :func:`compress`.
        data: Likewise.
        loss: Likewise.

    Returns:
        The smaller model and its plan, earlier stages included.

    Raises:
        ModelError: If the model cannot be run, or nothing would change.
        BudgetError: If the budget cannot be met.
    """
    task = Task.of(model, Probe.of_data(model, data, loss), as_calls(example_inputs))
    method.claim(model)
    done = method.met(task) is not None
    plan = Plan() if done else method.decided(task, method.score(task))
    try:
        small = compact(model, plan, task.calls)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {error}. Remove what stands in the way, such as torch.nn.utils.weight_norm of the old kind."
        ) from error
    if data is not None and not done:
        Probe.of_data(small, data, loss).recalibrate(method.recalibrate_bn)
    return small, plan_of(small)


def rehearse(model: nn.Module, methods: Sequence[Compression]) -> None:
    """Have callbacks look at a model that they shall compress, before anything is trained; the model is left as it is.

    Args:
        model: The dense model. Budgets are checked only if it has an ``example_input_array`` that it runs on.
        methods: The callbacks of one fit.

    Raises:
        OptionError: If a pattern matches no layer, or a count exceeds what the model has.
        TrainerError: If two callbacks would compress the same layer.
        BudgetError: If a budget cannot be met.
    """
    claims: dict[str, Compression] = {}
    for method in methods:
        check_claims(method, method.claim(model), claims)
    if getattr(model, "example_input_array", None) is None:
        return
    task = Task.of(model, Probe.of_data(model, None, None))
    for method in methods:
        method.rehearse(task)
