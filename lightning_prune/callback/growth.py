"""Base of the methods that let training decide which channels leave: what counts against a unit grows, step by step, until it is at zero.

How many units leave every cell of the model (:class:`~lightning_prune.callback.unit_slices.UnitSlices`) is fixed before training, by a budget; which
ones, the fit decides. All slices of a unit share one value, a penalty or a probability. The model keeps its shapes while it trains: units that are
pruned are masked, with what the optimizer keeps for them, and leave when the fit has ended. Schedules count the steps that the optimizer has
really taken: not batches that accumulate, nor steps that a gradient scaler skips.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.callback import loggers
from lightning_prune.callback.channels import ChannelRemoval, channel_removal
from lightning_prune.callback.checks import check_choice, check_integer
from lightning_prune.callback.columns import ColumnRemoval, column_removal
from lightning_prune.callback.course import Course
from lightning_prune.callback.exhibit import Exhibit
from lightning_prune.callback.masking import Masking
from lightning_prune.callback.ratios import Ratios, check_names, check_ratios, ratio_of, scores_by_ratio
from lightning_prune.callback.task import Task
from lightning_prune.callback.unit_slices import Cells, UnitSlices, even, frozen_units
from lightning_prune.callback.validation import validation_figures
from lightning_prune.errors import CheckpointError, ModelError, TrainerError
from lightning_prune.measure.picture import draw_growth
from lightning_prune.probe import FOREIGN
from lightning_prune.structure.groups import Group, Structure
from lightning_prune.structure.masks import Masks
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.removal import removal_steps
from lightning_prune.structure.select import Pattern
from lightning_prune.structure.steps import Step

log = logging.getLogger(__name__)

MEASURED = 8  # batches on which the loss is taken before and after the removal
FOLLOWED = 50  # steps after which running statistics have followed a change: 0.9 to the power of 50 is 0.5 %
POINTS = 200  # of the history, at most about so many

_FROZEN = "no weight that trains writes it, so that nothing could shrink it"
_UNNAMED = "ratios names no share for it"


@dataclasses.dataclass(frozen=True)
class GrowthRemoval(ChannelRemoval):
    """Channels leave that training has brought to zero.

    Attributes:
        ratios: How the shares of the groups that leave relate to each other.
    """

    ratios: Ratios = "uniform"

    def look(self, task: Task) -> Structure:
        """Return the units of the model; those stay that training cannot bring to zero, or for which ``ratios`` has no share.

        Raises:
            OptionError: If a pattern of ``ratios`` matches no group.
            ModelError: If the model cannot be traced.
        """
        found = super().look(task)
        found = found.without(frozen_units(found, dict(task.model.named_parameters())), _FROZEN)
        if isinstance(self.ratios, Mapping):
            check_names(self.method, self.ratios, [group.name for group in found.groups])
            unnamed = [group.units for group in found.groups if not ratio_of(self.ratios, group.name)]
            found = found.without(np.concatenate([np.empty(0, np.int64), *unnamed]), _UNNAMED)
        return found

    def leaving(self, task: Task, found: Structure) -> NDArray[np.bool_]:
        """Return which units would leave now, ``[units]``, boolean; how many of each cell is what the fit will keep to.

        Raises:
            BudgetError: If the budget cannot be met.
        """
        return ~self._choose(task, self.score(task, found, (), 1.0), 1.0)

    def slices(self, model: nn.Module, found: Structure) -> UnitSlices:
        """Return the units as tensors see them."""
        return UnitSlices(model, found)

    def groups(self, found: Structure) -> Sequence[Group]:
        """Return the groups that give units."""
        return found.groups

    def read(self, model: nn.Module, found: Structure, index: int) -> Tensor:
        """Return what the units of a group read in the weights that write them, ``[units, features]``, float64.

        Args:
            model: The model.
            found: Its units.
            index: The place of the group among :meth:`groups`.
        """
        group = found.groups[index]
        parameters, parts = dict(model.named_parameters()), []
        for slot in (found.slots[place] for place in group.slots):
            weight = parameters.get(slot.tensor)
            if slot.zeroed and slot.units.ndim == 1 and weight is not None and weight.ndim >= 2:
                rows = [np.flatnonzero(slot.units == unit) for unit in group.units]
                flat = weight.detach().double().movedim(slot.axis, 0).flatten(1)
                parts.append(torch.stack([flat[torch.from_numpy(own)].flatten() for own in rows]))
        return torch.cat(parts, 1)

    def pruned(self, model: nn.Module, found: Structure, units: NDArray[np.bool_]) -> tuple[Step, ...]:
        """Return the steps that remove some units, ``[units]``, fewer where equally many of several blocks must leave."""
        return removal_steps(model, found, ~even(found, units))


Units = Literal["channels", "columns"]


class Growth(Masking):
    """Let units shrink while the model trains, mask them when they are done, and remove them when the fit has ended.

    Give exactly one of ``flops``, ``params``, ``sparsity``.

    Args:
        units: What leaves: channels, or columns of weights (:mod:`lightning_prune.callback.columns`), of which ``sparsity`` alone can say how many.
        flops: Bound on the multiply-adds of the model: share of the dense one (float) or a count for the example inputs (int).
        params: Bound on its parameters, likewise.
        sparsity: Share of the channels that leave, in [0, 1), of the dense model's; or such shares by name or glob of a group.
        ratios: What the groups give for one bound: ``"uniform"``, the same share of each; ``"pca"``, as much as leaves every group
            the same share of the energy of its weights' principal components; or shares relative to each other by name or glob, scaled
            together until the bound is met, groups that none matches staying whole.
        align: Channels kept are multiples of it; 1 switches that off.
        min_channels: At least so many channels of a group stay.
        include: Layers whose channels may leave: names, globs or module types; None takes all.
        exclude: Layers whose channels stay, likewise.
        start_epoch: First epoch that counts.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards, unless the model has trained for 50 steps or
            more since all units that leave were at zero; 0 leaves them.

    Attributes:
        grown: What grows, in a word for pictures.
        slices: The units as tensors see them, during a fit.
        values: What has grown against every unit, ``[units]``; a penalty or a probability.
        gone: Units that have been pruned, ``[units]``, boolean.
        quota: How many units of every cell shall leave, ``[cells]``.
        left: How many still have to, ``[cells]``.
        over: Whether none has to leave any more.
        updates: Optimizer steps that have counted.
        numbers: What was derived from the planned steps before training, by name.
        losses: The loss before and after the removal, in eval mode on eight training batches; NaN where the training step cannot be run so.
        validated: What ``validation_step`` logs, before and after the removal, by name; nothing where it cannot be run.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    grown = "penalty"
    removal: GrowthRemoval | ColumnRemoval
    slices: Cells
    values: Tensor
    gone: Tensor
    quota: Tensor
    left: Tensor

    def __init__(
        self,
        *,
        units: Units = "channels",
        flops: float | int | None = None,
        params: float | int | None = None,
        sparsity: float | dict[str, float] | None = None,
        ratios: Ratios = "uniform",
        align: int = 16,
        min_channels: int = 1,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] | None = None,
        start_epoch: int = 0,
        recalibrate_bn: int = 8,
    ) -> None:
        super().__init__(include=include, exclude=exclude, recalibrate_bn=recalibrate_bn)
        self.flops, self.params, self.sparsity, self.ratios = flops, params, sparsity, ratios
        self.units = units
        self.align, self.min_channels, self.start_epoch = align, min_channels, start_epoch
        self.gradual = True
        check_integer(self, "start_epoch", 0)
        check_choice(self, "units", ("channels", "columns"))
        check_ratios(type(self).__name__, ratios, sparsity)
        self.scope = "uniform" if ratios == "uniform" and not isinstance(sparsity, Mapping) else "global"
        if units == "columns":
            self.removal = column_removal(self, self.score_units)
        else:
            self.removal = GrowthRemoval(**vars(channel_removal(self, self.score_units, self.scope)), ratios=ratios)
        Growth.reset(self)

    def reset(self) -> None:
        """Forget the fit before this one; ``plan`` stays."""
        super().reset()
        for name in ("values", "gone", "quota", "left"):
            self.__dict__.pop(name, None)
        self.updates, self.numbers, self.over = 0, dict[str, float](), False
        self._begun, self._seen, self._stride, self._dropped = False, 0, 1, 0
        self.losses = math.nan, math.nan
        self.validated: dict[str, tuple[float, float]] = {}
        self._saved: dict[str, Any] | None = None
        self._history: list[Tensor] = []
        self._first: Tensor | None = None
        self._debugging = False

    # What a method answers ------------------------------------------------------------------------------------------------------

    def prepare(self, trainer: Any, module: Any, steps: int | None) -> None:
        """Derive ``numbers`` before a new fit trains, and raise what can be known.

        Args:
            trainer: The Trainer, its optimizers and schedulers set up.
            module: Its module.
            steps: Optimizer steps that will count; None where the fit has no planned end.
        """
        raise NotImplementedError

    def start(self) -> None:
        """Act before the first step that counts."""

    def grow(self) -> Tensor | None:
        """Update ``values`` after an optimizer step, the ``updates``-th, and drop what is done; return the scores if it took them."""
        raise NotImplementedError

    def likely(self) -> Tensor:
        """Return which units will leave as it stands, ``[units]``, boolean; the history tells them from the others."""
        return self.gone | self.lowest(self.slices.scores())

    def rounds(self) -> int:
        """Return how many times ``values`` were updated until all that leaves was at zero, or until now."""
        return self._dropped if self.over else self.updates

    # For methods ----------------------------------------------------------------------------------------------------------------

    def lowest(self, *keys: Tensor) -> Tensor:
        """Return of every cell the units of the smallest keys among those not gone, as many as still have to leave, ``[units]``, boolean."""
        ranks = self.slices.ranks(self.gone, *keys)
        return ~self.gone & (ranks < self.left[self.slices.cell])

    def drop(self, units: Tensor) -> None:
        """Prune units for good; what has grown against the others of a cell that has given all it shall stops to act.

        Args:
            units: ``[units]``, boolean.
        """
        self.gone, self._dropped = self.gone | units, self.updates
        self._count()
        self.values = self.values.masked_fill(~self.gone & (self.left == 0)[self.slices.cell], 0)
        self._hold_gone()

    def _count(self) -> None:
        self.left = self.quota - self.slices.counts(self.gone)
        self.over = not bool(self.left.any())

    def check_finite(self, scores: Tensor) -> None:
        """See that the weights are finite; waits for the device.

        Raises:
            ModelError: If a score is not.
        """
        if not bool(scores.isfinite().all()):
            raise ModelError(
                f"{type(self).__name__}: weights are not finite after {self.steps:,} steps. Look for a diverged training."
            )

    def score_units(self, task: Task, found: Any, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Score the units by the size of the weights that write them, and so that shares by ``ratios`` come out of one ranking."""
        sizes = self.removal.slices(task.model, found).scores()
        self.check_finite(sizes)
        groups = self.removal.groups(found)
        return scores_by_ratio(
            sizes.double().cpu().numpy(),
            groups,
            self.ratios,
            lambda index: self.removal.read(task.model, found, index),
        )

    # The fit --------------------------------------------------------------------------------------------------------------------

    def due(self, epoch: int) -> float:
        """Return 0: nothing is masked by epochs."""
        return 0.0

    def begin(self, task: Task) -> None:
        """Find the units and see that the target can be met; on resume, take up what has grown.

        Raises:
            CheckpointError: If the checkpoint was written for other units.
        """
        super().begin(task)
        self.slices = self.removal.slices(task.model, self._found)
        if self._saved is not None:
            self._take_up(self._saved)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Fix how many units of every cell will leave, and derive the numbers of the fit, unless a checkpoint had them.

        Raises:
            BudgetError: If the budget cannot be met.
            OptionError: If the options do not fit the planned steps.
            TrainerError: If the Trainer plans too few, or no optimizer holds a weight that would have to shrink.
        """
        if self._done or self._task is None:
            return
        self.slices = self.removal.slices(pl_module, self._found)  # the precision of the Trainer may be another
        if self._saved is not None:
            return
        count, device = self.slices.count, self.slices.cell.device
        self.values = torch.zeros(count, dtype=self.slices.dtype, device=device)
        self.gone = torch.zeros(count, dtype=torch.bool, device=device)
        leaving = torch.from_numpy(self.removal.leaving(self._task, self._found)).to(device)
        quota = self.slices.counts(leaving)
        if trainer.world_size > 1:
            quota = trainer.strategy.broadcast(quota.cpu(), src=0).to(device)
        self.quota, self.left, self._seen = quota, quota, self.steps
        self._check_held(trainer, pl_module)
        course = Course.of(trainer)
        steps = None if course is None else sum(epoch >= self.start_epoch for epoch, *_ in course)
        self._stride = max(1, -(-(steps or 10_000) // POINTS))
        self._debugging = bool(trainer.fast_dev_run)
        if steps == 0 and self.start_epoch and not self._debugging:
            raise TrainerError(
                f"{type(self).__name__}(start_epoch={self.start_epoch}): the fit ends before that epoch, so that nothing would grow. Lower "
                "start_epoch, or train for more epochs."
            )
        self.prepare(trainer, pl_module, steps)

    def _check_held(self, trainer: Any, module: Any) -> None:
        """Raise if no optimizer holds a weight that writes units which may leave.

        Raises:
            TrainerError: Names the layers.
        """
        held = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        leaves = nn.functional.pad((self.quota > 0)[self.slices.cell], (0, 1))
        left_out = {
            own.parameter for own in self.slices.weights if own.parameter not in held and own.along(leaves).any()
        }
        if left_out:
            names = sorted({name.rpartition(".")[0] for name, p in module.named_parameters() if p in left_out})
            raise TrainerError(
                f"{type(self).__name__}: no optimizer holds the weights of {', '.join(map(repr, names))}, so that nothing could shrink what leaves "
                f"there. Give their parameters to the optimizer, or leave these layers alone: exclude={names}."
            )

    def _needs(self, steps: int | None, needed: int) -> None:
        """Raise if fewer steps are planned than are needed, but in a ``fast_dev_run``.

        Raises:
            TrainerError: With the number.
        """
        if steps is not None and steps < needed and not self._debugging:
            raise TrainerError(
                f"{type(self).__name__} needs at least {needed:,} optimizer steps to bring the target's units to zero, the Trainer plans {steps:,}"
                f"{f' from start_epoch={self.start_epoch} on' if self.start_epoch else ''}. Train longer (max_epochs, max_steps), or "
                "leave the numbers out that set the pace: they are then derived from the planned steps."
            )

    def on_step_begin(self, trainer: Any, module: Any) -> None:
        """Let the method act before the first step that counts."""
        if not self._begun:
            self._begun, self._first = True, self.slices.scores()
            self.start()

    @torch.no_grad()
    def on_stepped(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Let values grow after the step of the first optimizer; hold what is pruned, and what the optimizer keeps for it, at zero."""
        counts = self._begun and self._acts(trainer) and self.steps != self._seen
        if counts:
            self._seen, self.updates = self.steps, self.updates + 1
            scores = self.grow()
        super().on_stepped(trainer, module, optimizer)
        if counts and self.updates % self._stride == 0:
            self._history.append(self._point(self.slices.scores() if scores is None else scores))

    def _hold_gone(self) -> None:
        self._masks = Masks.of(self.slices.masks(self.gone))
        self._masks.apply_()

    def settled(self) -> Tensor:
        """Return the units that leave if the fit ends now, ``[units]``, boolean."""
        return self.gone

    def _plan_for(self, module: nn.Module, units: Tensor) -> Plan:
        """Return the steps that remove some units."""
        return Plan(self.removal.pruned(module, self._found, units.cpu().numpy()))

    def _close(self, trainer: Any, pl_module: Any) -> None:
        if self._begun:
            log.info(
                "%s: the %s was updated %d times in %d steps.",
                type(self).__name__,
                self.grown,
                self.rounds(),
                self.updates,
            )
            self._pending = self._plan_for(pl_module, self.settled())
            if not self._pending:
                log.warning(
                    "%s: the fit ended after %d steps, before any unit was done; nothing was compressed, the model is as dense as before.",
                    type(self).__name__,
                    self.updates,
                )
                return
        super()._close(trainer, pl_module)

    def _shrink(self, trainer: Any, module: Any, task: Task) -> None:
        """Shrink, and tell what that does to the loss and to what validation says, such as the accuracy."""
        before = self._loss(module, task), validation_figures(trainer, module, task.probe)
        super()._shrink(trainer, module, task)
        after = self._loss(module, task), validation_figures(trainer, module, task.probe)
        self.losses = before[0], after[0]
        self.validated = {name: (value, after[1][name]) for name, value in before[1].items() if name in after[1]}
        finite = {"loss": self.losses} if all(map(math.isfinite, self.losses)) else {}
        changes = self.validated | finite
        loggers.tell_scalars(
            trainer,
            {
                f"removal/{name}_{when}": value
                for name, pair in changes.items()
                for when, value in zip(("before", "after"), pair, strict=True)
            },
        )
        for name, pair in changes.items():
            log.info("%s: %s was %.4g before the removal and is %.4g after it.", type(self).__name__, name, *pair)

    @torch.no_grad()
    def _loss(self, module: Any, task: Task) -> float:
        """Return the loss of the training step in eval mode, the mean over a few batches and all ranks; NaN where it cannot be run here."""
        losses = [torch.tensor(math.nan)]
        try:
            with task.probe.quiet(mode="eval"):
                batches = enumerate(task.probe.batches(MEASURED, "Measuring") if module.automatic_optimization else ())
                losses = [
                    loss for i, batch in batches if (loss := task.probe.loss_if_any(batch, i)) is not None
                ] or losses
        except FOREIGN as error:
            log.debug(
                "What the removal does to the loss is not told, the training step cannot be run in eval mode: %s", error
            )
        return float(
            task.probe.mean(torch.stack([loss.float().reshape(()) for loss in losses]).mean().to(module.device))
        )

    def _batches_for_norms(self) -> int:
        """Return 0 if training has followed since all were at zero: then removal changes nothing, not even statistics."""
        return 0 if self.progress() == 1 and self.updates >= self._dropped + FOLLOWED else self.recalibrate_bn

    def progress(self) -> float:
        """Return the share of the units that shall leave which are gone."""
        return float(self.gone.sum()) / max(1.0, float(self.quota.sum()))

    def _end(self) -> str:
        return "all units that shall leave were at zero"

    # How far it has come --------------------------------------------------------------------------------------------------------

    def _point(self, scores: Tensor) -> Tensor:
        """Return an entry of the history, ``[6]``, as :data:`_FACTS` names it.

        What is left of kept and of leaving units, as a share of their sizes before; of the values of units that are not gone the median, the
        90th percentile and the largest; the share of units that are gone.
        """
        assert self._first is not None
        scores, leaving = scores.masked_fill(self.gone, 0), self.likely()
        left = [(scores * own).sum() / (self._first * own).sum() for own in (~leaving, leaving)]
        values = self.values.masked_fill(self.gone, math.nan)
        quantiles = values.nanquantile(values.new_tensor([0.5, 0.9, 1.0])).nan_to_num(0.0)
        return torch.stack([*left, *quantiles, self.gone.to(scores.dtype).mean()])

    def facts(self, module: nn.Module) -> dict[str, float]:
        """Return quantiles of what has grown, the share of units at zero, and what is left of kept and of leaving units."""
        if not self._begun:
            return {}
        self._pending = self._plan_for(module, self.gone)
        told = dict(zip(_FACTS, self._point(self.slices.scores()).tolist(), strict=True))
        return super().facts(module) | {f"growth/{name}": value for name, value in told.items()}

    def history(self) -> NDArray[np.float64]:
        """Return how the fit went, ``[points, 7]``: the step, then what :data:`_FACTS` names."""
        rows = torch.stack(self._history).double().cpu().numpy() if self._history else np.empty((0, len(_FACTS)))
        steps = self._stride * np.arange(1, len(rows) + 1)
        return np.column_stack([steps, rows])

    def picture(self) -> bytes | None:
        """Return a picture of the history as PNG; None before there is one.

        Raises:
            RuntimeMissingError: If matplotlib is not installed.
        """
        history = self.history()
        return draw_growth(history, self.grown, f"{type(self).__name__}: {self._asked()}") if len(history) else None

    def exhibits(self) -> Sequence[Exhibit]:
        """Return the picture of the history."""
        picture = self.picture()
        text = (
            f"What is left of the weights of units that stay and of units that leave, as a share of their sizes at the start, over {self.updates:,} "
            f"optimizer steps, and the {self.grown} that grew, which was updated {self.rounds():,} times."
        )
        if all(map(math.isfinite, self.losses)):
            text += " The loss of the first training batches, in eval mode, was {:.4g} before the removal and {:.4g} after it.".format(
                *self.losses
            )
        for name, pair in self.validated.items():
            text += " In validation {} was {:.4g} before and {:.4g} after it.".format(name, *pair)
        return () if picture is None else (Exhibit(f"{type(self).__name__}: growth", text, picture=picture),)

    # State ----------------------------------------------------------------------------------------------------------------------

    def growth_state(self) -> dict[str, Any]:
        """Return what a resume needs of a growth under way; tensors may lie anywhere."""
        return {
            "values": self.values,
            "gone": self.gone,
            "quota": self.quota,
            "begun": self._begun,
            "updates": self.updates,
            "numbers": self.numbers,
            "first": self._first,
            "dropped": self._dropped,
            "stride": self._stride,
            "history": torch.stack(self._history) if self._history else None,
        }

    def take_up(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`growth_state` returned; tensors lie where the model does."""
        self.values, self.gone, self.quota = state["values"], state["gone"], state["quota"]
        self._count()
        self._begun, self.updates, self.numbers = state["begun"], state["updates"], dict(state["numbers"])
        self._first, self._stride, self._dropped = state["first"], state["stride"], state["dropped"]
        self._history = [] if state["history"] is None else list(state["history"])

    def _take_up(self, saved: dict[str, Any]) -> None:
        if saved["values"].numel() != self.slices.count:
            raise CheckpointError(
                f"{type(self).__name__}: the checkpoint is of a model with {saved['values'].numel():,} units, this one has "
                f"{self.slices.count:,}. Resume with the model and the callbacks that wrote it."
            )
        device = self.slices.cell.device
        self.take_up({k: v.to(device) if isinstance(v, Tensor) else v for k, v in saved.items()})
        self._seen = self.steps
        self._hold_gone()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs; of a growth under way its values, and what is gone."""
        if self._done or self._task is None or not hasattr(self, "values"):
            return super().state_dict() | {"growth": None}
        self._pending = self._plan_for(self._task.model, self.gone)
        own = {k: v.detach().cpu().clone() if isinstance(v, Tensor) else v for k, v in self.growth_state().items()}
        return super().state_dict() | {"growth": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint.

        Raises:
            CheckpointError: If this callback was configured otherwise when the checkpoint was written.
        """
        super().load_state_dict(state)
        self._saved = state["growth"]

    def release(self) -> None:
        """Let go of the model."""
        super().release()
        self.__dict__.pop("slices", None)


_FACTS = ("kept_size", "leaving_size", "value_median", "value_90", "value_max", "units_gone")
