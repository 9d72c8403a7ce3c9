"""Base of the methods that remove channels: from scores of units to a plan."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_prune.budget.units import UnitGroup, choose_units
from lightning_prune.callback.channel_layers import hold_unselected, owners_of_weights, still_fits, why_left_alone
from lightning_prune.callback.channel_target import ChannelTarget
from lightning_prune.callback.checks import check_choice, check_integer, nothing_to_change
from lightning_prune.callback.masking import Masking, Schedule
from lightning_prune.callback.task import Task
from lightning_prune.errors import OptionError
from lightning_prune.structure.groups import Structure, find_units
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.removal import removal_steps, removed_units
from lightning_prune.structure.select import Pattern, select
from lightning_prune.structure.steps import Step
from lightning_prune.structure.trials import try_sizes

Scope = Literal["global", "uniform"]
ScoreUnits = Callable[[Task, Structure, NDArray[np.bool_]], NDArray[np.float64]]


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

    @classmethod
    def of(cls, structure: Structure, values: NDArray[np.float64], gone: NDArray[np.bool_]) -> "UnitScores":
        """Return scores with which blocks of units that are masked already are the first to leave."""
        low = values[~gone].min(initial=0.0)
        return cls(structure, np.where(gone, low - max(1.0, abs(low)), values), gone)

    @classmethod
    def none(cls, structure: Structure) -> "UnitScores":
        """Return scores that prefer no unit."""
        return cls(structure, np.zeros(structure.count), np.zeros(structure.count, bool))


@dataclasses.dataclass(frozen=True)
class ChannelRemoval:
    """Channels, heads and hidden units leave, the lowest scores first, until a budget is met.

    Attributes:
        method: Name of the method, for messages.
        score_units: Scores all units; see :meth:`ChannelPruning.score_units`.
        target: What the removal shall reach.
        align: Channels kept are multiples of it.
        min_channels: At least so many channels of a group stay.
        scope: Whether scores compete over all groups.
        include: Layers whose channels may leave.
        exclude: Layers whose channels stay.
    """

    method: str
    score_units: ScoreUnits
    target: ChannelTarget
    align: int
    min_channels: int
    scope: Scope
    include: Pattern | Sequence[Pattern] | None
    exclude: Pattern | Sequence[Pattern] | None

    def claim(self, model: nn.Module) -> set[str]:
        """Return the names of the layers that hold weights and are selected; ``""`` if the model itself holds some and all are taken."""
        owners = {name for names in owners_of_weights(model).values() for name in names}
        layers = {name: module for name, module in model.named_modules() if name and name in owners}
        chosen = set(select(layers, self.include, self.exclude)) if layers else set()
        return chosen | (owners & {""} if self.include is None else set())

    def met(self, task: Task) -> str | None:
        """Return why the target is already met, in words, or None."""
        reason = self.target.met(task)
        if reason is None and self.target.name == "sparsity" and task.plan:
            return self.target.met_by(task, self.look(task))
        return reason

    def look(self, task: Task) -> Structure:
        """Return the units of the model; those that a layer writes which is not selected stay.

        Raises:
            ModelError: If the model cannot be traced.
        """
        structure = try_sizes(task.model, task.calls, find_units(task.model, task.calls))
        selected = self.include is not None or self.exclude is not None
        return hold_unselected(task.model, structure, self.claim(task.model), selected)

    def fits(self, found: Structure, model: nn.Module) -> bool:
        """Tell whether the model still has the tensors that the units were found in."""
        return still_fits(found, model)

    def check(self, task: Task, found: Structure) -> None:
        """Raise if the budget cannot be met, or nothing can leave.

        Raises:
            BudgetError: Names the groups that bind.
            ModelError: Says why for every layer.
        """
        scores = UnitScores.none(found)
        plan = self.plan(task, scores, self.steps(task, scores, 1.0))
        if not plan.steps:
            raise nothing_to_change(self.method, plan.left_alone)

    def score(self, task: Task, found: Structure, pending: Sequence[Step], share: float | None) -> UnitScores:
        """Score the units; blocks of masked ones are the first to leave."""
        gone = removed_units(found, pending)
        if share is None or not found.count:
            return UnitScores(found, np.zeros(found.count), gone)
        return UnitScores.of(found, np.asarray(self.score_units(task, found, ~gone), np.float64), gone)

    def steps(self, task: Task, scores: UnitScores, share: float | None) -> tuple[Step, ...]:
        """Return the steps that remove what has to leave, masked units included.

        Raises:
            BudgetError: If the budget cannot be met; names the groups that bind.
        """
        kept = ~scores.gone if share is None else self._choose(task, scores, share)
        return removal_steps(task.model, scores.structure, kept)

    def plan(self, task: Task, scores: UnitScores, steps: tuple[Step, ...]) -> Plan:
        """Return the steps, and the layers of which no channel leaves with the reason."""
        structure, layers = scores.structure, self.claim(task.model)
        alone = why_left_alone(task.model, structure, layers)
        if not steps and structure.count:
            alone |= dict.fromkeys(sorted(layers - set(alone)), "the budget is met with it whole")
        changed = {step.module for step in steps}  # inputs leave of a layer whose own channels stay
        return Plan(steps, {name: reason for name, reason in alone.items() if name not in changed})

    def _choose(self, task: Task, scores: UnitScores, share: float) -> NDArray[np.bool_]:
        """Return which units stay, ``[units]``, boolean; masked ones never do."""
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

    def facts(self, task: Task, found: Structure, pending: Sequence[Step]) -> dict[str, float]:
        """Return the share of the units that is masked, and what the model would cost without them, as a share of the dense one."""
        if not found.count:
            return {}
        gone = removed_units(found, pending)
        budget = self.target.budget(task, found)
        share = budget.cost(~gone) / max(1, budget.dense)
        told = (
            {"masked/sparsity": 1 - share}
            if self.target.name == "sparsity"
            else {f"masked/{self.target.name}_share": share}
        )
        return {"masked/units": float(gone.mean())} | told


class ChannelPruning(Masking):
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
        align: int = 16,
        min_channels: int = 1,
        scope: Scope = "global",
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
            every_n_epochs=every_n_epochs,
            schedule=schedule,
            recalibrate_bn=recalibrate_bn,
        )
        self.flops, self.params, self.sparsity = flops, params, sparsity
        self.align, self.min_channels, self.scope = align, min_channels, scope
        self.removal = channel_removal(self, self.score_units, scope)

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


class _Options(Protocol):
    """The options of a method that removes channels."""

    flops: float | int | None
    params: float | int | None
    sparsity: float | dict[str, float] | None
    align: int
    min_channels: int
    include: Pattern | Sequence[Pattern] | None
    exclude: Pattern | Sequence[Pattern] | None


def channel_removal(method: _Options, score_units: ScoreUnits, scope: object) -> ChannelRemoval:
    """Check the options of a method and return the removal that they describe.

    Args:
        method: The method.
        score_units: Scores its units.
        scope: ``"global"`` or ``"uniform"``.

    Raises:
        OptionError: If one is of the wrong type or out of range.
    """
    name = type(method).__name__
    target = ChannelTarget.of(name, method.flops, method.params, method.sparsity)
    for option in ("align", "min_channels"):
        check_integer(method, option, 1)
    check_choice(method, "scope", ("global", "uniform"))
    chosen: Scope = "uniform" if scope == "uniform" else "global"
    if target.by_group is not None and chosen != "global":
        raise OptionError(f"{name}(scope={scope!r}): shares by group say themselves where channels leave; drop it.")
    return ChannelRemoval(
        name, score_units, target, method.align, method.min_channels, chosen, method.include, method.exclude
    )
