"""Methods for the contract: every exported one with usual options, and a masking one of the tests' own."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune import methods
from lightning_prune.callback import Compression, Task
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.select import select
from lightning_prune.structure.steps import MaskWeight


class ToyMask(Compression):
    """Holds the smallest weights of every convolution and linear layer at zero, chosen at the start."""

    def __init__(self, sparsity: float = 0.5, include: Any = None, exclude: Any = None) -> None:
        super().__init__(include=include, exclude=exclude)
        self.sparsity = sparsity

    def claim(self, model: nn.Module) -> set[str]:
        layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        return set(select(layers, self.include, self.exclude))

    def decide(self, task: Task, scores: Any) -> Plan:
        steps = []
        for name in sorted(self.claim(task.model)):
            weight = task.model.get_submodule(name).weight.detach()
            order = weight.abs().flatten().argsort(stable=True)
            mask = torch.ones(weight.numel(), dtype=torch.bool)
            mask[order[: int(self.sparsity * weight.numel())]] = False
            steps.append(MaskWeight.of(name, "weight", mask.view_as(weight)))
        return Plan(tuple(steps))


USUAL = {"structured": True, "flops": 0.5, "align": 1, "every_n_steps": 3, "nuclear": 3e-3}
USUAL |= {"fisher": "empirical"}  # drawn labels are others if the samples come in another order, as with several ranks
GRADUALLY = {"until_epoch": 3}  # masks at the start of epochs 0, 1 and 2
WEIGHTS = {"structured": False, "flops": None, "sparsity": 0.5}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "IncReg-columns": ("IncReg", {"units": "columns", "flops": None, "sparsity": 0.5}),
    "KFE-gradually": ("KFE", GRADUALLY),
    "KFE-official": ("KFE", {"official": True, "flops": 0.8}),
    "KFE-separable": ("KFE", {"separable": True}),
    "MPO-unrolled": ("MPO", {"unroll": "net.3", "cores": 3, "bond": 5, "flops": None}),
    "MPO-squeezing": ("MPO", {"dimension_squeezing": True} | GRADUALLY),
    "Magnitude-gradually": ("Magnitude", GRADUALLY),
    "Magnitude-weights": ("Magnitude", WEIGHTS),
    "Magnitude-weights-gradually": ("Magnitude", WEIGHTS | GRADUALLY),
    "OptimalBrain-gradually": ("OptimalBrain", {"rule": "kron-obs"} | GRADUALLY),
    "PFP-gradually": ("PFP", GRADUALLY),
    "PFP-random-gradually": ("PFP", {"mode": "random"} | GRADUALLY),
    "Random-weights": ("Random", WEIGHTS),
}
# What those that derive their pace from the planned steps are given where a fit ends after a few of many, or nobody knows their number.
UNPLANNED: dict[str, dict[str, Any]] = {
    "GReg": {"strength": 100.0, "settle_steps": 0},
    "IncReg": {"strength": 100.0},
    "SPP": {"strength": 1.0, "every_n_steps": 1, "max_updates": 1},
}
NAMES = [*methods.__all__, *VARIANTS, "ToyMask"]


def kind_of(name: str) -> str:
    """Return the class name of a method or of a variant of one."""
    return VARIANTS[name][0] if name in VARIANTS else name


def make(name: str, **options: Any) -> Compression:
    """Return a method with options that suit the tests' network, those of ``USUAL`` where it takes them."""
    if name in VARIANTS:
        return make(kind_of(name), **(VARIANTS[name][1] | options))
    kind = ToyMask if name == "ToyMask" else getattr(methods, name)
    known = inspect.signature(kind.__init__).parameters
    usual = {key: value for key, value in USUAL.items() if key in known and (key != "every_n_steps" or name == "TRP")}
    if "flops" not in known and "sparsity" in known:
        usual["sparsity"] = 0.5
    return kind(**(usual | options))  # type: ignore[no-any-return]


HOOKS = ("on_step_begin", "on_gradients", "on_stepped")


def _kinds() -> list[Any]:
    """Return all names; those after the first of a kind, the same base, what leaves, when and how, are left to the exhaustive run."""
    found, known = [], set()
    for name in NAMES:
        method = make(name)
        bases, hooks = type(method).__mro__, [getattr(type(method), hook) for hook in HOOKS]
        leaves = type(getattr(method, "removal", None))
        kind = (bases[bases.index(Compression) - 1], leaves, method.gradual, *hooks)
        found.append(pytest.param(name, marks=[pytest.mark.exhaustive] if kind in known else []))
        known.add(kind)
    return found


KINDS = _kinds()  # for promises that the base of a method keeps, whatever it scores by
