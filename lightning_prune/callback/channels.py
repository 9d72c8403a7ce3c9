"""Base of the methods that remove channels: from scores of units to a plan, at the start of a fit or step by step while it trains."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from lightning_prune.budget import resolve_bound
from lightning_prune.budget.units import Scope, UnitGroup, choose_units
from lightning_prune.callback.checks import check_integer
from lightning_prune.callback.compression import Compression
from lightning_prune.callback.ranks import agree
from lightning_prune.callback.task import Task
from lightning_prune.errors import OptionError
from lightning_prune.structure.costs import Polynomial
from lightning_prune.structure.groups import Slot, Structure, find_units
from lightning_prune.structure.masks import Masks
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.removal import left_alone, removal_steps, removed_units
from lightning_prune.structure.select import Pattern, select
from lightning_prune.structure.trials import try_sizes

log = logging.getLogger(__name__)

Schedule = Literal["cubic", "linear"]


class ChannelPruning(Compression):
    """Remove channels, heads and hidden units by a score of units.

    Give exactly one of ``flops``, ``params``, ``sparsity``. Without ``until_epoch`` the model shrinks at the start of the fit; with it,
    units are masked step by step from ``start_epoch`` on, and the model shrinks when the fit has ended.

    Args:
        flops: Bound on the multiply-adds of the model: share of the dense one (float) or a count for the example inputs (int).
        params: Bound on its parameters, likewise.
        sparsity: Share of the channels that leave, in [0, 1); of the dense model's, over all layers that write channels that can leave.
        align: Channels kept are multiples of it; 1 switches that off.
        min_channels: At least so many channels of a group stay.
        scope: ``"global"``: scores compete over all groups. ``"uniform"``: the same share of every group leaves.
        include: Layers whose channels may leave: names, globs or module types; None takes all.
        exclude: Layers whose channels stay, likewise.
        start_epoch: First epoch in which a gradual run masks.
        until_epoch: Epoch at whose start a gradual run has reached its target; None shrinks at the start of the fit.
        every_n_epochs: Epochs between the steps of a gradual run.
        schedule: How the target is approached: ``"cubic"`` (fast first; Zhu and Gupta 2017, arXiv:1710.01878) or ``"linear"``.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        *,
        flops: float | int | None = None,
        params: float | int | None = None,
        sparsity: float | None = None,
        align: int = 8,
        min_channels: int = 1,
        scope: Literal["global", "uniform"] = "global",
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] | None = None,
        start_epoch: int = 0,
        until_epoch: int | None = None,
        every_n_epochs: int = 1,
        schedule: Schedule = "cubic",
        recalibrate_bn: int = 8,
    ) -> None:
        super().__init__(
            include=include,
            exclude=exclude,
            start_epoch=start_epoch,
            until_epoch=until_epoch,
            recalibrate_bn=recalibrate_bn,
        )
        self.flops, self.params, self.sparsity = flops, params, sparsity
        self.align, self.min_channels, self.scope = align, min_channels, scope
        self.every_n_epochs, self.schedule = every_n_epochs, schedule
        self.gradual = until_epoch is not None
        self._check_target()
        for name, least in (("align", 1), ("min_channels", 1), ("every_n_epochs", 1)):
            check_integer(self, name, least)
        for name, allowed in (("scope", ("global", "uniform")), ("schedule", ("cubic", "linear"))):
            if getattr(self, name) not in allowed:
                raise OptionError(
                    f"{type(self).__name__}({name}={getattr(self, name)!r}): give {' or '.join(map(repr, allowed))}."
                )
        ChannelPruning.reset(self)

    def _check_target(self) -> None:
        method = type(self).__name__
        given = {name: getattr(self, name) for name in ("flops", "params", "sparsity")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise OptionError(f"{method} needs exactly one of flops, params, sparsity; got {given or 'none'}.")
        name, value = next(iter(given.items()))
        share = isinstance(value, float) and 0 < value <= 1
        count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if name == "sparsity" and not (
            isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value < 1
        ):
            raise OptionError(
                f"{method}(sparsity={value!r}): give a float in [0, 1), the share of channels that leave."
            )
        if name != "sparsity" and not share and not count:
            raise OptionError(
                f"{method}({name}={value!r}): give a float in (0, 1], a share of the dense model, or an int of at least 1, a count."
            )

    def reset(self) -> None:
        """Forget the fit before this one; ``plan`` stays."""
        super().reset()
        self._pending = Plan()
        self._masks: Masks | None = None
        self._task: Task | None = None
        self._structure: Structure | None = None

    # What a method answers ------------------------------------------------------------------------------------------------------

    def score_units(self, task: Task, structure: Structure) -> np.ndarray:
        """Return the score of every unit, higher = keep, ``[units]``, finite."""
        raise NotImplementedError

    # The plan -------------------------------------------------------------------------------------------------------------------

    def claim(self, model: nn.Module) -> set[str]:
        """Return the names of the layers that hold weights and are selected."""
        layers = {name: m for name, m in model.named_modules() if name and _holds_weights(m)}
        return set(select(layers, self.include, self.exclude)) if layers else set()

    def met(self, task: Task) -> str | None:
        """Return why the target is already met, in words, or None."""
        reason = super().met(task)
        name = self._bounded
        if reason is not None or name == "sparsity" or not task.plan:
            return reason
        have, dense = _counts(task)[name]
        bound = resolve_bound(getattr(self, name), dense, name)
        return None if have > bound else f"the model has {have:,} {name}, at most {bound:,} are asked for"

    def rehearse(self, task: Task) -> None:
        """Check patterns and budget on the model as it stands.

        Raises:
            OptionError: If a pattern matches no layer.
            BudgetError: If the budget cannot be met.
        """
        self.claim(task.model)
        if self.met(task) is None and self._bounded != "sparsity":
            name = self._bounded
            resolve_bound(getattr(self, name), _counts(task)[name][1], name)

    def decide(self, task: Task, scores: Any) -> Plan:
        """Choose the units that leave.

        Raises:
            BudgetError: If the budget cannot be met; names the groups that bind.
            ModelError: If nothing can leave; says why for every layer.
        """
        structure = self._structure or self.find_structure(task)
        kept = self.choose(task, structure, removed_units(structure, self._pending.steps))
        alone = left_alone(structure, self.claim(task.model))
        if kept.all() and structure.count:
            alone |= dict.fromkeys(sorted(self.claim(task.model) - set(alone)), "the budget is met with it whole")
        return Plan(removal_steps(task.model, structure, kept), alone)

    def find_structure(self, task: Task) -> Structure:
        """Return the units of the model, with those of layers that are not selected held.

        Raises:
            ModelError: If the model cannot be traced.
        """
        structure = try_sizes(task.model, task.calls, find_units(task.model, task.calls))
        claimed = self.claim(task.model)
        held = [group.units for group in structure.groups if not structure.writers(group) <= claimed]
        return structure.without(np.concatenate(held), "include and exclude leave it out") if held else structure

    def choose(self, task: Task, structure: Structure, gone: np.ndarray | None = None) -> np.ndarray:
        """Return which units stay under the budget as far as the schedule has come.

        Args:
            task: The model and what it costs.
            structure: Its units.
            gone: Units that have left in an earlier step of the schedule and stay away, boolean.

        Returns:
            ``[units]``, boolean.
        """
        if not structure.count:
            return np.zeros(0, bool)
        scores = np.asarray(self.score_units(task, structure), np.float64)
        if gone is not None and gone.any():
            scores = np.where(gone, scores.min() - 1.0, scores)
        groups = [UnitGroup(g.name, g.units, g.width) for g in structure.groups]
        cost, have, bound = self._budget(task, structure)
        bound += round((1 - self._share(task.progress)) * max(0, have - bound))
        scope: Scope = self.scope
        return choose_units(
            groups,
            scores,
            cost,
            bound,
            ties=structure.ties,
            align=self.align,
            min_channels=self.min_channels,
            scope=scope,
            name=self._bounded,
        )

    @property
    def _bounded(self) -> Literal["flops", "params", "sparsity"]:
        return "flops" if self.flops is not None else "params" if self.params is not None else "sparsity"

    def _share(self, progress: float) -> float:
        """Return how much of the way to the target a schedule has gone."""
        return progress if self.schedule == "linear" else 1 - (1 - progress) ** 3

    def _budget(self, task: Task, structure: Structure) -> tuple[Any, int, int]:
        """Return the cost of the model as a function of the units that stay, its cost now, and the bound."""
        name = self._bounded
        everything = np.ones(structure.count, bool)
        if name == "sparsity":
            channels = Polynomial([(1, (slot.units,), 1) for slot in _counted(structure)])
            have = channels(everything)
            dense = have + _gone_before(task, structure)
            return channels, have, math.floor((1 - Fraction(repr(self.sparsity))) * dense)
        polynomial = structure.flops if name == "flops" else structure.params
        have, dense = _counts(task)[name]
        rest = have - polynomial(everything)
        return lambda kept: rest + polynomial(kept), have, resolve_bound(getattr(self, name), dense, name)

    # Gradually ------------------------------------------------------------------------------------------------------------------

    def begin(self, task: Task) -> None:
        """Find the units; on resume, hold again what had been masked."""
        self._task, self._structure = task, self.find_structure(task)
        if self._pending:
            self._hold(task.model)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Mask more units where the schedule says so."""
        super().on_train_epoch_start(trainer, pl_module)
        epoch = trainer.current_epoch
        if not self._acts(trainer) or self._task is None or self._structure is None or self.until_epoch is None:
            return
        due = (epoch - self.start_epoch) % self.every_n_epochs == 0 or epoch == self.until_epoch
        if not due or epoch > self.until_epoch:
            return
        steps = max(1, -(-(self.until_epoch - self.start_epoch) // self.every_n_epochs))
        taken = min(steps, (epoch - self.start_epoch) // self.every_n_epochs + 1)
        task = dataclasses.replace(self._task, progress=1.0 if epoch == self.until_epoch else taken / steps)
        structure = self._structure
        gone = removed_units(structure, self._pending.steps)
        self._pending = agree(
            trainer,
            lambda: Plan(removal_steps(pl_module, structure, self.choose(task, structure, gone)), {}, task.origin, ()),
        )
        self._hold(pl_module)

    def _hold(self, module: nn.Module) -> None:
        """Hold what the steps so far will remove at zero from now on."""
        self._masks = Masks.pending(module, self._pending.steps)
        self._masks.apply_()

    def on_stepped(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Hold masked slices, and what the optimizer keeps for them, at zero."""
        if self._masks is not None:
            self._masks.apply_(optimizer)

    def facts(self, module: nn.Module) -> dict[str, float]:
        """Return the share of the channels that is masked, and what the budget would count."""
        if self._task is None or self._structure is None:
            return {}
        kept = ~removed_units(self._structure, self._pending.steps)
        cost, have, _ = self._budget(self._task, self._structure)
        return {
            "units masked": 1 - float(kept.mean()) if len(kept) else 0.0,
            f"{self._bounded} kept": cost(kept) / max(1, have),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs; also what has been masked so far."""
        return super().state_dict() | {"pending": self._pending.to_json()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint.

        Raises:
            CheckpointError: If this callback was configured otherwise when the checkpoint was written.
        """
        super().load_state_dict(state)
        self._pending = Plan.from_json(state["pending"])

    def release(self) -> None:
        """Let go of the model."""
        super().release()
        self._masks, self._task, self._structure = None, None, None


def check_structured(method: str, structured: object) -> None:
    """Check that whole channels are asked for.

    Raises:
        OptionError: Otherwise: single weights are not offered.
    """
    if structured is not True:
        raise OptionError(f"{method}(structured={structured!r}): only structured=True, whole channels, is offered.")


def _counts(task: Task) -> dict[str, tuple[int, int]]:
    """Return cost now and cost of the dense model, by what is bounded."""
    return {"flops": (task.cost.total, task.origin.flops), "params": (task.params, task.origin.params)}


def _holds_weights(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


def _counted(structure: Structure) -> list[Slot]:
    """Return where the channels that can leave are written: rows of weights."""
    return [s for s in structure.slots if s.zeroed and len(structure.shapes[s.tensor]) >= 2 and (s.units >= 0).any()]


def _gone_before(task: Task, structure: Structure) -> int:
    """Return how many channels earlier stages have taken from the layers that are counted."""
    dense = dict(task.origin.parameters)
    gone = 0
    for slot in _counted(structure):
        before = dense.get(slot.tensor, ())
        if len(before) == len(structure.shapes[slot.tensor]):
            gone += before[slot.axis] - structure.shapes[slot.tensor][slot.axis]
    return gone
