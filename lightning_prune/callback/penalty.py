"""Base of the methods whose values are penalties: ``(lambda_u / 2) |w_u|^2`` is added to the loss for every unit ``u``, ``lambda_u`` growing.

Under SGD the penalty is coupled, as the papers have it: ``lambda w`` is added to the gradient before it is clipped, and momentum takes it up. Under
any other optimizer it is decoupled: ``w <- (1 - lr lambda) w`` after the step, because adaptive steps would divide its strength away.

What is penalized is what writes a unit: its filters, and with ``norms`` also its bias and the scale and shift of its normalization. Weights that read
the unit are not: once nothing is written, nothing is read. Without ``norms``, as in the papers, batch normalization would scale ever smaller
filters up again, so that removal changes the model (a filter at 1/100 of its size still gives 95 % of its output at unit variance). Of columns of
weights, which no normalization follows, the weights are penalized and nothing else.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.callback.course import Course, rates_to_come
from lightning_prune.callback.growth import Growth, Units
from lightning_prune.callback.ratios import Ratios
from lightning_prune.callback.unit_slices import Slices
from lightning_prune.errors import OptionError, TrainerError
from lightning_prune.probe import FOREIGN
from lightning_prune.structure.select import Pattern

log = logging.getLogger(__name__)

ENOUGH = math.log(100)  # exponent by which weights should shrink before they are pruned
STEADY = 0.2  # of what a penalty takes from a weight in a step, momentum included, at most so much is sure not to disturb training


@dataclasses.dataclass(frozen=True)
class Pace:
    """How fast a parameter group follows its penalty.

    Attributes:
        optimizer: Name of the optimizer, for messages.
        rates: Planned learning rates of the steps that count, ``[steps]``; that of the first step where there is no plan.
        decay: Weight decay that acts beside the penalty.
        momentum: Momentum that takes the penalty up; 0 where it is decoupled.
        nesterov: Whether that is Nesterov's.
        coupled: Whether the penalty is part of the gradient.
    """

    optimizer: str
    rates: NDArray[np.float64]
    decay: float
    momentum: float
    nesterov: bool
    coupled: bool

    @property
    def rate(self) -> float:
        """The largest learning rate."""
        return float(self.rates.max())

    @property
    def limit(self) -> float:
        """The penalty beyond which a weight grows instead of shrinking, or changes its sign in every step where it is decoupled.

        Of ``v <- mu v + lambda w, w <- w - lr v`` an eigenvalue leaves the unit circle at ``lr lambda = 2 (1 + mu)``; with Nesterov's momentum at
        ``2 (1 + mu) / (1 + 2 mu)``.
        """
        if not self.coupled:
            return 1.0 / self.rate if self.rate else math.inf
        bound = 2 * (1 + self.momentum) / (1 + 2 * self.momentum * self.nesterov)
        return bound / self.rate - self.decay if self.rate else math.inf

    @property
    def steady(self) -> float:
        """The penalty that takes :data:`STEADY` of a weight in a step."""
        return STEADY * (1 - self.momentum) / self.rate if self.rate else math.inf

    def shrinkage(self, penalties: NDArray[np.floating[Any]]) -> float:
        """Return by which exponent the penalties of the first steps, ``[steps]``, shrink a weight that has no other gradient.

        To first order in ``lr lambda``: the sum of ``lr lambda / (1 - mu)``.
        """
        known = min(len(self.rates), len(penalties)) if len(self.rates) > 1 else len(penalties)
        return float((self.rates[:known] * penalties[:known]).sum() / (1 - self.momentum))


def penalize_(weight: Tensor, penalty: Tensor) -> None:
    """Add a penalty to the gradient of a parameter that has one, in place: ``g <- g + lambda w``.

    Args:
        weight: Any shape.
        penalty: lambda, broadcasts to it.
    """
    if weight.grad is not None:
        weight.grad.addcmul_(weight.detach(), penalty)


def shrink_(weight: Tensor, penalty: Tensor, rate: float | Tensor) -> None:
    """Let a parameter follow a penalty for one step, in place: ``w <- (1 - lr lambda) w``.

    Args:
        weight: Any shape.
        penalty: lambda, broadcasts to it.
        rate: lr.
    """
    weight.detach().mul_(1 - penalty * rate)


class Penalty(Growth):
    """Let penalties grow on units until these are zero.

    Args:
        ceiling: The largest penalty; None derives it from the learning rate, as large as is sure to be stable: ``lr * ceiling = 0.2 (1 - momentum)``.
        norms: Whether biases, and scales and shifts of normalization, are penalized with the filters of their units.
        units: What leaves.
        flops: Bound on the multiply-adds of the model; see :class:`~lightning_prune.callback.growth.Growth`, as for all that follow.
        params: Bound on its parameters.
        sparsity: Share of the channels that leave.
        ratios: What the groups give for one bound.
        align: Channels kept are multiples of it.
        min_channels: At least so many channels of a group stay.
        include: Layers whose channels may leave.
        exclude: Layers whose channels stay.
        start_epoch: First epoch that counts.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards.

    Attributes:
        paces: How fast the parameter groups that hold penalized weights follow.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        *,
        ceiling: float | None = None,
        norms: bool = True,
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
        super().__init__(
            units=units,
            flops=flops,
            params=params,
            sparsity=sparsity,
            ratios=ratios,
            align=align,
            min_channels=min_channels,
            include=include,
            exclude=exclude,
            start_epoch=start_epoch,
            recalibrate_bn=recalibrate_bn,
        )
        self.ceiling, self.norms = ceiling, norms
        self.paces: list[Pace] = []
        check_positive(self, "ceiling")
        if not isinstance(norms, bool):
            raise OptionError(f"{type(self).__name__}(norms={norms!r}): give true or false.")

    def prepare(self, trainer: Any, module: Any, steps: int | None) -> None:
        """Choose the ceiling, or check the one that was given against the planned learning rates.

        Raises:
            OptionError: If a penalty as large as ``ceiling`` would make weights grow.
            TrainerError: If the planned learning rate is 0.
        """
        self.paces = [pace for optimizer in trainer.optimizers for pace in self._paces(trainer, module, optimizer)]
        steady = min(pace.steady for pace in self.paces)
        if math.isinf(steady) and (self.ceiling is None or any(len(pace.rates) > 1 for pace in self.paces)):
            raise TrainerError(
                f"{type(self).__name__}: the planned learning rate is 0, so that no penalty acts. Raise it, or look at its schedule."
            )
        ceiling = steady if self.ceiling is None else float(self.ceiling)
        tightest = min(self.paces, key=lambda pace: pace.limit)
        if ceiling >= tightest.limit:
            raise OptionError(
                f"{type(self).__name__}(ceiling={self.ceiling}): with the planned learning rate of {tightest.rate:g} in {tightest.optimizer} weights "
                f"follow penalties below {tightest.limit:.4g} only, beyond it they grow instead of shrinking. Lower ceiling to "
                f"{steady:.3g} or less, leave it out, or lower the learning rate."
            )
        if ceiling > steady:
            log.warning(
                "%s(ceiling=%g) takes %.0f %% of a weight per step, momentum included; beyond %.0f %% training may suffer; %.3g is safe.",
                type(self).__name__,
                ceiling,
                100 * STEADY * ceiling / steady,
                100 * STEADY,
                steady,
            )
        if trainer.gradient_clip_val and any(pace.coupled for pace in self.paces):
            log.warning(
                "%s: under SGD the penalty is part of the gradient that gradient_clip_val=%s clips, so that a small bound weakens it. "
                "Raise the bound, or use AdamW, where penalties act beside the gradient.",
                type(self).__name__,
                trainer.gradient_clip_val,
            )
        self.numbers["ceiling"] = ceiling

    def _paces(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> list[Pace]:
        weights = {own.parameter for own in self.slices.weights}
        own = [i for i, group in enumerate(optimizer.param_groups) if weights & set(group["params"])]
        if not own:
            return []
        rates: list[list[float]] = []
        course = Course.of(trainer)
        try:
            for epoch, groups in rates_to_come(trainer, module, optimizer, course) if course is not None else ():
                rates += [[float(groups[i]["lr"]) for i in own]] if epoch >= self.start_epoch else []
        except FOREIGN as error:
            log.warning(
                "%s: learning rates cannot be foretold, a scheduler cannot be run ahead (%s: %s); those of the first step are taken.",
                type(self).__name__,
                type(error).__name__,
                error,
            )
            rates = []
        groups = [optimizer.param_groups[i] for i in own]
        planned = np.array(rates or [[float(group["lr"]) for group in groups]])
        coupled, name = isinstance(optimizer, torch.optim.SGD), type(optimizer).__name__
        found = []
        for column, group in zip(planned.T, groups, strict=True):
            momentum = (float(group["momentum"]), bool(group["nesterov"])) if coupled else (0.0, False)
            found.append(Pace(name, column, float(group.get("weight_decay", 0.0)), *momentum, coupled))
        return found

    def _forecast(self, penalties: NDArray[np.floating[Any]]) -> None:
        """Warn if the penalties of the steps until a unit is pruned, ``[steps]``, do not bring it to zero."""
        shrinkage = min(pace.shrinkage(penalties) for pace in self.paces)
        if shrinkage < ENOUGH:
            log.warning(
                "%s: penalties alone shrink weights to %.2g of what they are until they are pruned, so that pruning may cost accuracy; "
                "%.2g or less is safe. Train longer, or with a learning rate that falls later.",
                type(self).__name__,
                math.exp(-shrinkage),
                math.exp(-ENOUGH),
            )

    @torch.no_grad()
    def on_gradients(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Add penalties to the gradients of SGD."""
        if isinstance(optimizer, torch.optim.SGD):
            for own, penalty, _ in self._penalized(optimizer):
                penalize_(own.parameter, penalty)

    @torch.no_grad()
    def on_stepped(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Let weights shrink after the step of any other optimizer; then go on as any growth does."""
        if not isinstance(optimizer, torch.optim.SGD) and self._begun and self._acts(trainer):
            for own, penalty, group in self._penalized(optimizer):
                shrink_(own.parameter, penalty, group["lr"])
        super().on_stepped(trainer, module, optimizer)

    def _penalized(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Slices, Tensor, dict[str, Any]]]:
        """Yield what an optimizer holds that is penalized, the penalty, shaped to broadcast, and its parameter group."""
        if self.over:
            return
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        values = nn.functional.pad(self.values, (0, 1))
        growing = values.clamp(min=0)  # regrowth is for filters alone
        for owns, penalty in ((self.slices.weights, values), (self.slices.others if self.norms else (), growing)):
            for own in owns:
                if own.parameter in groups and own.parameter.requires_grad:
                    yield own, own.along(penalty), groups[own.parameter]


def check_positive(owner: object, name: str) -> None:
    """Check that an argument is None or a finite number above 0.

    Raises:
        OptionError: Otherwise.
    """
    value = getattr(owner, name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < math.inf):
        raise OptionError(f"{type(owner).__name__}({name}={value!r}): give a number above 0, or leave it out.")
