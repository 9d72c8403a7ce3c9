"""Make a model smaller as a plan says: exactly, or not at all.

``compact`` proves itself. The model in its old shapes, with the values that the plan stands for, and the model in its new shapes are run on
the same inputs, in eval and in train mode; a difference beyond rounding is an error that names the first layer where it shows
(:mod:`lightning_prune.structure.proof`), and the model is what it was before.

Memory: steps swap the storages of tensors and never write into them, so going back costs no copy. At most twice the parameters are held at once,
the values before and the masked ones; the smaller ones take the place of the masked ones one by one. The copy that ``compact`` returns shares its
parameters with the model until they are cut, so it needs no more than that either, the model included.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.errors import PlanError
from lightning_prune.structure.calls import Call
from lightning_prune.structure.carrier import attach, plan_of
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.proof import Proof
from lightning_prune.structure.steps import KeepChannels, OpenHeads
from lightning_prune.structure.steps.base import settle, swap

M = TypeVar("M", bound=nn.Module)


def compact(model: M, plan: Plan, calls: Sequence[Call] = ()) -> M:
    """Return a smaller copy of ``model``; the model itself is left as it is.

    Args:
        model: The model that ``plan`` was decided for.
        plan: The steps to take, beyond those that the model already carries.
        calls: Calls to prove the result with; without them nothing is run.

    Raises:
        PlanError: If the plan is for another model.
        ModelError: If the smaller model does not compute what the plan stands for.
    """
    shared = {id(p): nn.Parameter(p.data, p.requires_grad) for p in model.parameters() if type(p) is nn.Parameter}
    small = copy.deepcopy(model, dict(shared))
    compact_(small, plan, calls)
    storages = {_storage(p) for p in model.parameters()}
    for module in small.modules():
        for p in module.parameters(recurse=False):
            if _storage(p) in storages:
                p.data = p.data.clone()
        settle(module)
    return small


def compact_(model: nn.Module, plan: Plan, calls: Sequence[Call] = ()) -> None:
    """Make ``model`` smaller in place; see :func:`compact`. The model carries the plan afterwards, and after an error it is what it was."""
    widths = any(isinstance(step, KeepChannels | OpenHeads) for step in plan.steps)
    with _put_back(model, only_on_error=True):
        proof = Proof(calls, [step.module for step in plan.steps], widths)
        if calls:
            with _put_back(model):  # a step may multiply: it is taken once
                mask_(model, plan)
                proof.expect(model)
        for step in plan.steps:
            step.apply(model)
        proof.check(model)
        attach(model, plan_of(model).then(plan.settled()))


def mask_(model: nn.Module, plan: Plan) -> None:
    """Give ``model`` the values that ``plan`` stands for, shapes kept, in place: what :func:`compact` is compared with.

    Removed entries and channels become zero, with their bias and the scale and shift of their normalization; weights that will be
    factorized get their rank. The model does not carry the plan afterwards. After an error it is what it was.

    Args:
        model: The model that ``plan`` was decided for.
        plan: The steps of one stage.

    Raises:
        PlanError: If the plan is for another model, or changes again what it has changed already.
    """
    with _put_back(model, only_on_error=True):
        try:
            for step in plan.steps:
                step.emulate(model)
        except PlanError as error:
            if len(plan.stages) < 2:
                raise
            raise PlanError(
                f"{error} The plan holds {len(plan.stages)} stages, and a later one may change what an earlier one has made smaller. "
                "Take the stages one after the other."
            ) from error


@contextlib.contextmanager
def _put_back(model: nn.Module, only_on_error: bool = False) -> Iterator[None]:
    """Put modules, their attributes and the storages of all tensors back after the block."""
    modules = [(module, dict(vars(module))) for module in model.modules()]
    held: list[dict[str, Any]] = [d for m, _ in modules for d in (m._parameters, m._buffers, m._modules)]
    members = [(entries, dict(entries)) for entries in held]
    tensors = [(t, t.data, t.grad) for group in (model.parameters(), model.buffers()) for t in group]
    done = False
    try:
        yield
        done = only_on_error
    finally:
        if not done:
            for module, attributes in modules:
                vars(module).clear()
                vars(module).update(attributes)
            for entries, saved in members:
                entries.clear()
                entries.update(saved)
            for tensor, data, grad in tensors:
                swap(tensor, data)
                tensor.grad = grad


def _storage(tensor: Tensor) -> int | None:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None
