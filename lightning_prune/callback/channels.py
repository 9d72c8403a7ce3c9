"""Base of the methods that remove channels: from scores of units to a plan, at the start of a fit or step by step while it trains."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lightning_prune.budget.units import UnitGroup, choose_units
from lightning_prune.callback.channel_layers import hold_unselected, owners_of_weights, still_fits, why_left_alone
from lightning_prune.callback.channel_target import ChannelTarget
from lightning_prune.callback.checks import check_integer
from lightning_prune.callback.compression import Compression
from lightning_prune.callback.ranks import agree
from lightning_prune.callback.task import Task
from lightning_prune.errors import OptionError
from lightning_prune.structure.groups import Structure, find_units
from lightning_prune.structure.masks import Masks
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.removal import removal_steps, removed_units
from lightning_prune.structure.select import Pattern, select
from lightning_prune.structure.trials import try_sizes

Schedule = Literal["cubic", "linear"]


@dataclasses.dataclass(frozen=True)
class UnitScores:
    """What a decision rests on.

    Attributes:
        structure: The units.
        values: Score of every unit, higher = keep, ``[units]``.
        gone: Units that are masked already, ``[units]``, boolean; their scores are not read.
    """

    structure: Structure
    values: NDArray[np.float64]
    gone: NDArray[np.bool_]


class ChannelPruning(Compression):
    """Remove channels, heads and hidden units by a score of units.

    Give exactly one of ``flops``, ``params``, ``sparsity``. Without ``until_epoch`` the model shrinks at the start of the fit; with it,
    units are masked step by step from ``start_epoch`` on, and the model shrinks when the fit has ended.

    Args:
        flops: Bound on the multiply-adds of the model: share of the dense one (float) or a count for the example inputs (int).
        params: Bound on its parameters, likewise.
        sparsity: Share of the channels that leave, in [0, 1), of the dense model's, over all layers that write channels that can leave; or
            such shares by name or glob of a group (:func:`lightning_prune.explain` shows the names).
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
        sparsity: float | dict[str, float] | None = None,
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
        self.target = ChannelTarget.of(type(self).__name__, flops, params, sparsity)
        for name in ("align", "min_channels", "every_n_epochs"):
            check_integer(self, name, 1)
        check_choice(self, "scope", ("global", "uniform"))
        if self.target.by_group is not None and scope != "global":
            raise OptionError(
                f"{type(self).__name__}(scope={scope!r}): shares by group say themselves where channels leave; drop it."
            )
        check_choice(self, "schedule", ("cubic", "linear"))
        if until_epoch is None and start_epoch:
            raise OptionError(
                f"{type(self).__name__}(start_epoch={start_epoch}): until_epoch is missing; without it the model shrinks at once."
            )
        ChannelPruning.reset(self)

    def reset(self) -> None:
        """Forget the fit before this one; ``plan`` stays."""
        super().reset()
        self._pending = Plan()
        self._reached = 0.0
        self._masks: Masks | None = None
        self._task: Task | None = None
        self._structure: Structure | None = None

    # What a method answers ------------------------------------------------------------------------------------------------------

    def score_units(self, task: Task, structure: Structure, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Score the units; called on every rank.

        Args:
            task: The model and its data.
            structure: Its units.
            kept: Units that are not masked, ``[units]``, boolean.

        Returns:
            ``[units]``, higher = keep, finite; what stands for masked units is not read.
        """
        raise NotImplementedError

    # The plan -------------------------------------------------------------------------------------------------------------------

    def claim(self, model: nn.Module) -> set[str]:
        """Return the names of the layers that hold weights and are selected; ``""`` if the model itself holds some and all are taken."""
        owners = {name for names in owners_of_weights(model).values() for name in names}
        layers = {name: module for name, module in model.named_modules() if name and name in owners}
        chosen = set(select(layers, self.include, self.exclude)) if layers else set()
        return chosen | (owners & {""} if self.include is None else set())

    def met(self, task: Task) -> str | None:
        """Return why the target is already met, in words, or None; what has been masked leaves in any case."""
        if self._pending:
            return None
        reason = super().met(task) or self.target.met(task)
        if reason is None and self.target.name == "sparsity" and task.plan:
            return self.target.met_by(task, self.find_structure(task))
        return reason

    def rehearse(self, task: Task) -> None:
        """Check patterns and budget on the model as it stands.

        Raises:
            OptionError: If a pattern matches no layer.
            BudgetError: If the budget cannot be met.
            ModelError: If nothing can leave; says why for every layer.
        """
        if self.met(task) is None:
            structure = self.find_structure(task)
            nothing = np.zeros(structure.count, bool)
            self.decided(task, UnitScores(structure, np.zeros(structure.count), nothing))

    def score(self, task: Task) -> UnitScores:
        """Score the units; at the end of a gradual run only tell which are masked."""
        structure = self._structure
        if structure is None or not still_fits(structure, task.model):
            structure = self.find_structure(task)
        return self._scored(task, structure, read=not self._pending)

    def _scored(self, task: Task, structure: Structure, read: bool = True) -> UnitScores:
        gone = removed_units(structure, self._pending.steps)
        values = np.zeros(structure.count)
        if read and structure.count:
            values = np.asarray(self.score_units(task, structure, ~gone), np.float64)
            low = values[~gone].min(initial=0.0)
            values = np.where(gone, low - max(1.0, abs(low)), values)  # blocks of masked units are the first to leave
        return UnitScores(structure, values, gone)

    def decide(self, task: Task, scores: UnitScores) -> Plan:
        """Choose the units that leave; after a gradual run, those that are masked.

        Raises:
            BudgetError: If the budget cannot be met; names the groups that bind.
        """
        structure, layers = scores.structure, self.claim(task.model)
        kept = ~scores.gone if self._pending else self.choose(task, scores, 1.0)
        steps = removal_steps(task.model, structure, kept)
        alone = why_left_alone(task.model, structure, layers)
        if kept.all() and structure.count:
            alone |= dict.fromkeys(sorted(layers - set(alone)), "the budget is met with it whole")
        changed = {step.module for step in steps}  # inputs leave of a layer whose own channels stay
        return Plan(steps, {name: reason for name, reason in alone.items() if name not in changed})

    def find_structure(self, task: Task) -> Structure:
        """Return the units of the model; those that a layer writes which is not selected stay.

        Raises:
            ModelError: If the model cannot be traced.
        """
        structure = try_sizes(task.model, task.calls, find_units(task.model, task.calls))
        selected = self.include is not None or self.exclude is not None
        return hold_unselected(task.model, structure, self.claim(task.model), selected)

    def choose(self, task: Task, scores: UnitScores, share: float) -> NDArray[np.bool_]:
        """Return which units stay, ``[units]``, boolean; masked ones never do.

        Args:
            task: The model and what it costs.
            scores: The scores of its units.
            share: How much of the way to the target has been gone, in (0, 1].
        """
        structure = scores.structure
        if not structure.count:
            return np.zeros(0, bool)
        budget, shares = self.target.budget(task, structure), self.target.kept_by_group(share)
        kept = choose_units(
            [UnitGroup(group.name, group.units, group.width) for group in structure.groups],
            scores.values,
            budget.cost,
            budget.on_the_way(share) if shares is None else None,
            ties=structure.ties,
            align=self.align,
            min_channels=self.min_channels,
            scope=shares or self.scope,
            name=self.target.name,
        )
        return kept & ~scores.gone

    # Gradually ------------------------------------------------------------------------------------------------------------------

    def begin(self, task: Task) -> None:
        """Find the units and see that the budget can be met; on resume, hold again what had been masked."""
        self._task, self._structure = task, self.find_structure(task)
        if self._pending:
            self._hold(task.model)
        else:
            count = self._structure.count
            self.decided(task, UnitScores(self._structure, np.zeros(count), np.zeros(count, bool)))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Look again if a callback after this one has changed the model."""
        super().on_fit_start(trainer, pl_module)
        if self._task is not None and self._structure is not None and not still_fits(self._structure, pl_module):
            self.begin(Task.of(pl_module, self._task.probe, self._task.calls))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Mask more units where the schedule says so."""
        super().on_train_epoch_start(trainer, pl_module)
        due = self._due(trainer.current_epoch)
        if not self._acts(trainer) or self._task is None or self._structure is None or due <= self._reached:
            return
        task, scores = self._task, self._scored(self._task, self._structure)
        share = due if self.schedule == "linear" else 1 - (1 - due) ** 3
        self._pending = agree(
            trainer,
            lambda: Plan(removal_steps(pl_module, scores.structure, self.choose(task, scores, share)), {}, task.origin),
        )
        self._reached = due
        self._hold(pl_module)

    def _due(self, epoch: int) -> float:
        """Return how far the schedule has come in ``epoch``: equal steps from ``start_epoch`` on, the last one before ``until_epoch``."""
        if self.until_epoch is None or epoch >= self.until_epoch:
            return 1.0
        steps = -(-(self.until_epoch - self.start_epoch) // self.every_n_epochs)
        return max(0.0, ((epoch - self.start_epoch) // self.every_n_epochs + 1) / steps)

    def progress(self) -> float:
        """Return how far the schedule has come: the share of its steps that have been taken."""
        return self._reached if self.gradual else 1.0

    def _hold(self, module: nn.Module) -> None:
        """Hold what the steps so far will remove at zero from now on."""
        self._masks = Masks.pending(module, self._pending.steps)
        self._masks.apply_()

    def _owners(self, trainer: Any, module: Any) -> list[torch.optim.Optimizer]:
        """Return all optimizers, those that hold weights first: scales and shifts of normalization may be with another one."""
        own = super()._owners(trainer, module)
        return own + [optimizer for optimizer in trainer.optimizers if optimizer not in own]

    def on_stepped(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Hold masked slices, and what the optimizer keeps for them, at zero."""
        if self._masks is not None:
            self._masks.apply_(optimizer)

    def _shrink(self, trainer: Any, module: Any, task: Task) -> None:
        super()._shrink(trainer, module, task)
        self._pending, self._masks = Plan(), None

    def facts(self, module: nn.Module) -> dict[str, float]:
        """Return the share of the units that is masked, and what the model would cost without them, as a share of the dense one."""
        if self._task is None or self._structure is None or not self._structure.count:
            return {}
        gone = removed_units(self._structure, self._pending.steps)
        budget = self.target.budget(self._task, self._structure)
        share = budget.cost(~gone) / max(1, budget.dense)
        told = (
            {"masked/sparsity": 1 - share}
            if self.target.name == "sparsity"
            else {f"masked/{self.target.name}_share": share}
        )
        return {"masked/units": float(gone.mean())} | told

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs; also what has been masked so far."""
        return super().state_dict() | {"pending": self._pending.to_json(), "reached": self._reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint.

        Raises:
            CheckpointError: If this callback was configured otherwise when the checkpoint was written.
        """
        super().load_state_dict(state)
        if not self._done:
            self._pending, self._reached = Plan.from_json(state["pending"]), float(state["reached"])

    def release(self) -> None:
        """Let go of the model."""
        super().release()
        self._masks, self._task, self._structure = None, None, None


def check_choice(owner: object, name: str, allowed: Sequence[object]) -> None:
    """Check that an argument is one of those that are offered, of the same type.

    Raises:
        OptionError: Otherwise.
    """
    value = getattr(owner, name)
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise OptionError(f"{type(owner).__name__}({name}={value!r}): give {' or '.join(map(repr, allowed))}.")
