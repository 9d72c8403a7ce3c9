"""Make a model smaller as a plan says: exactly, or not at all.

``compact`` proves itself. The model in its old shapes, with the values that the plan stands for, and the model in its new shapes are run on
the same inputs, in eval and in train mode; a difference beyond rounding is an error that names the first layer where it shows.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_prune.errors import ModelError
from lightning_prune.structure.calls import Call
from lightning_prune.structure.carrier import attach, plan_of
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.preserve import preserved

Mode = Literal["eval", "train"]
MODES: tuple[Mode, ...] = get_args(Mode)

log = logging.getLogger(__name__)

# Largest difference that rounding explains, as a share of the largest value of the same tensor. Two factors reorder the sums of one
# layer; normalization in train mode divides by a deviation that carries the error of the layers before it.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 5e-2}


def compact(model: nn.Module, plan: Plan, calls: Sequence[Call] = ()) -> nn.Module:
    """Return a smaller copy of ``model``; the model itself is left as it is.

    Args:
        model: The model that ``plan`` was decided for.
        plan: The steps to take, beyond those that the model already carries.
        calls: Calls to prove the result with; without them nothing is run.

    Raises:
        PlanError: If the plan is for another model.
        ModelError: If the smaller model does not compute what the plan stands for.
    """
    small = copy.deepcopy(model)
    compact_(small, plan, calls)
    return small


def compact_(model: nn.Module, plan: Plan, calls: Sequence[Call] = ()) -> None:
    """Make ``model`` smaller in place; see :func:`compact`. The model carries the plan afterwards."""
    for step in plan.steps:
        step.find(model)
    layers = [step.module for step in plan.steps]
    for step in plan.steps:
        step.emulate(model)
    before = [_outputs(model, calls, layers, mode) for mode in MODES]
    for step in plan.steps:
        step.apply(model)
    after = [_outputs(model, calls, layers, mode) for mode in MODES]
    for expected, found in zip(before, after, strict=True):
        _compare(expected, found)
    attach(model, plan_of(model).then(plan))


def _outputs(model: nn.Module, calls: Sequence[Call], layers: Sequence[str], mode: Mode) -> dict[str, list[Tensor]]:
    """Run ``calls`` on perturbed inputs; return the tensors that each of ``layers``, and at last the model, gave."""
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        return lambda _module, _args, output: seen.setdefault(name, []).extend(
            t.detach().clone() for t in _tensors(output)
        )

    with preserved(model, mode=mode), torch.no_grad():
        for name in layers:
            model.get_submodule(name).register_forward_hook(watch(name))
        torch.manual_seed(0)
        perturbed = [Call(call.module, _perturb(call.args), _perturb(dict(call.kwargs))) for call in calls]
        try:
            results = [call.run(model) for call in perturbed]
        except ValueError as error:
            if mode == "train" and "more than 1 value per channel" in str(error):
                log.debug("The self-check skips train mode: batch normalization needs more than one value per channel.")
                return {}
            raise
        seen["the output of the model"] = [t.detach() for result in results for t in _tensors(result)]
    return seen


def _compare(expected: dict[str, list[Tensor]], found: dict[str, list[Tensor]]) -> None:
    for name, tensors in expected.items():
        for old, new in zip(tensors, found[name], strict=True):
            scale = max(float(old.abs().max()), torch.finfo(old.dtype).tiny) if old.numel() else 1.0
            gap = float((old.double() - new.double()).abs().max()) / scale if old.numel() else 0.0
            if old.shape != new.shape or not gap <= TOLERANCE.get(old.dtype, 1e-3):
                raise ModelError(
                    f"The self-check failed at {name!r}: compact and masked model differ by {gap:.1e} of the largest value, allowed "
                    f"{TOLERANCE.get(old.dtype, 1e-3):.0e}. Exclude this layer and report it; the change was not exact."
                )


def _perturb(value: Any) -> Any:
    """Move floating tensors by a tenth of their spread, within their range; everything else stays."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
        noise = 0.1 * value.std(correction=0) * torch.randn_like(value)
        return (value + noise).clamp(value.min(), value.max())
    if isinstance(value, dict):
        return {key: _perturb(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_perturb(item) for item in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating tensors in nested outputs."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
