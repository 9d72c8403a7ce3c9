"""IncReg: penalties that grow on the channels that rank low, and fall on those that rank high, until as many as asked for are at zero.

Wang, Zhang, Wang, Yu and Hu, "Structured Pruning for Efficient ConvNets via Incremental Regularization" (arXiv:1804.09461). After every
optimizer step the groups of a layer are ranked by the L1 norms of their weights, the ranks are averaged over all steps so far, and by its place
among the groups that are not pruned yet each penalty moves::

    lambda_g <- max(lambda_g + Delta(r_g), 0)

:func:`punishment` is ``Delta``: ``A`` for the smallest group, 0 for the first that shall stay, negative above. A group whose penalty reaches the
ceiling is pruned for good. Since nothing at or above place ``n``, the number that still has to go, is ever punished, a layer lands exactly on
its target.

Unlike the authors' code: groups are channels with all that leaves with them, unless ``units`` asks for columns as theirs are; the negative branch is
clipped at ``-A`` by default, since it falls exponentially and would wipe out in one step what has grown; a ceiling is what it says (theirs is
multiplied by 2.45 at the start); running means count the steps of this fit; biases and normalization are penalized, too
(:mod:`lightning_prune.callback.penalty`). What has not reached the ceiling when nine tenths of the planned steps are over is pruned then, in
the order of the penalties.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_prune.callback.checks import check_choice
from lightning_prune.callback.growth import Units
from lightning_prune.callback.penalty import Penalty, check_positive
from lightning_prune.callback.ratios import Ratios
from lightning_prune.errors import TrainerError
from lightning_prune.structure.select import Pattern

log = logging.getLogger(__name__)

Shape = Literal["exponential", "linear"]
GROWING = 0.5  # share of the planned steps after which, by default, all is pruned
LAST = 0.9  # and that after which what is left is finished
_U = 0.25  # the paper's u: the branches of Delta meet at u A
_FINE = 1000.0  # updates that a penalty takes to its ceiling, in a simulation


def punishment(
    rank: Tensor, left: Tensor, live: Tensor, strength: float, shape: Shape = "exponential", clip: float | None = 1.0
) -> Tensor:
    """Return by how much penalties change: ``Delta(r)``, from A at ``r = 0`` through 0 at ``r = n``.

    ``"exponential"`` is center-symmetric about ``(N1, u A)``, ``N1 = -ln(u) / alpha``, ``alpha = ln(2 / u) / n``, ``u = 1/4``: ``A exp(-alpha r)``
    up to ``N1``, ``2 u A - A exp(-alpha (2 N1 - r))`` beyond. ``"linear"`` is ``A (1 - r / n)`` up to ``n`` and falls to ``-A`` at the last rank.

    Args:
        rank: r, the place among what is not pruned, from 0; any shape, floating.
        left: n, how many of these still have to go; broadcasts. Where it is 0 nothing changes.
        live: How many are not pruned; broadcasts; only read by ``"linear"``.
        strength: A.
        shape: One of the two.
        clip: No change is below ``-clip * A``; None sets no bound.

    Returns:
        Of the shape of ``rank``.
    """
    left, live = left.to(rank.dtype), live.to(rank.dtype)
    n = left.clamp(min=1)
    if shape == "linear":
        change = torch.where(rank <= n, 1 - rank / n, (n - rank) / (live - 1 - n).clamp(min=1))
    else:
        alpha, turn = math.log(2 / _U) / n, math.log(1 / _U) / math.log(2 / _U) * n
        change = torch.where(rank <= turn, (-alpha * rank).exp(), 2 * _U - (-alpha * (2 * turn - rank)).exp())
    change = change if clip is None else change.clamp(min=-clip)
    return torch.where(left > 0, strength * change, 0.0)


def updates_needed(size: Tensor, quota: Tensor, steepness: float, shape: Shape, clip: float | None) -> int:
    """Return after how many updates all cells have pruned what they shall if ranks never change.

    Args:
        size: Units of every cell, ``[cells]``.
        quota: How many of them leave, ``[cells]``.
        steepness: The penalty at which one is pruned over A. Beyond :data:`_FINE` the number is scaled, not counted.
        shape: Of the punishment.
        clip: Of the punishment.
    """
    if steepness > _FINE:
        return math.ceil(updates_needed(size, quota, _FINE, shape, clip) * steepness / _FINE)
    cells = torch.stack([size, quota]).cpu().T.unique(dim=0)  # type: ignore[no-untyped-call]
    size, quota = cells[:, :1], cells[:, 1:]
    unit = torch.arange(int(quota.max()))  # others are never punished
    values = torch.zeros(len(cells), len(unit), dtype=torch.float64)
    gone, updates = unit >= quota, 0
    while not bool(gone.all()):
        pruned = (gone & (unit < quota)).sum(1, keepdim=True)  # the smallest went first
        change = punishment((unit - pruned).double(), quota - pruned, size - pruned, 1.0, shape, clip)
        values = (values + change).clamp(min=0)
        gone, updates = gone | (values >= steepness), updates + 1
    return updates


def steepness_for(size: Tensor, quota: Tensor, updates: int, shape: Shape, clip: float | None) -> float:
    """Return a ceiling over A, nearly the largest, with which so many updates are enough if ranks never change.

    Args:
        size: Units of every cell, ``[cells]``.
        quota: How many of them leave, ``[cells]``.
        updates: At least 1.
        shape: Of the punishment.
        clip: Of the punishment.
    """
    steepness = _FINE / 4 * updates / updates_needed(size, quota, _FINE / 4, shape, clip)
    while updates_needed(size, quota, steepness, shape, clip) > updates:
        steepness *= 0.97
    return steepness


class IncReg(Penalty):
    """Let penalties grow on channels that rank low until as many as asked for are at zero, while the model trains.

    Give exactly one of ``flops``, ``params``, ``sparsity``; start from a trained model. By default all is pruned after half of the planned
    steps; in the other half the model trains on without the pruned channels, and it gets smaller when the fit has ended.

    Args:
        strength: A, what the penalty of the lowest rank gains per step; None derives it from the planned steps. 2.5e-4, half of the weight decay,
            in the paper.
        ceiling: The penalty at which a channel is pruned; None derives it from the learning rate, as large as is sure to be stable. 2.5 at a learning
            rate of 5e-4 in the paper.
        shape: ``"exponential"`` or ``"linear"``: how the change falls with the rank.
        delta_clip: No penalty falls by more than ``delta_clip * strength`` per step; None as in the authors' code.
        norms: Whether biases, and scales and shifts of normalization, are penalized with the filters of their channels.
        units: ``"channels"`` leave with all that writes and reads them; ``"columns"``, the paper's own groups, are the weights of all outputs of a
            layer for one input, at one position of a convolution's kernel. They stay as masked weights, but for channels of which all columns
            have left, and have no bound but ``sparsity``.
        flops: Bound on the multiply-adds of the model: share of the dense one (float) or a count for the example inputs (int).
        params: Bound on its parameters, likewise.
        sparsity: Share of the channels that leave, in [0, 1), of the dense model's, or of the weights, in whole columns; or such shares by name or
            glob of a group, for columns of a layer.
        ratios: What the groups give for one bound: ``"uniform"``, the same share of each; ``"pca"``, as much as leaves every group
            the same share of the energy of its weights' principal components; or shares relative to each other by name or glob.
        align: Channels kept are multiples of it; 1 switches that off. Columns are not aligned.
        min_channels: At least so many channels of a group stay, or columns of a layer.
        include: Layers whose channels may leave: names, globs or module types; None takes all.
        exclude: Layers whose channels stay, likewise.
        start_epoch: First epoch in which penalties grow.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards, unless the model has trained for 50 steps or
            more without the channels; 0 leaves them.

    Attributes:
        ranks: The sum over all updates of the rank of every unit, ``[units]``; averages, times the number of updates.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        strength: float | None = None,
        ceiling: float | None = None,
        shape: Shape = "exponential",
        delta_clip: float | None = 1.0,
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
            ceiling=ceiling,
            norms=norms,
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
        self.strength, self.shape, self.delta_clip = strength, shape, delta_clip
        check_positive(self, "strength")
        check_positive(self, "delta_clip")
        check_choice(self, "shape", ("exponential", "linear"))

    def prepare(self, trainer: Any, module: Any, steps: int | None) -> None:
        """Choose ceiling and strength, and see that the planned steps are enough.

        Raises:
            OptionError: If a penalty as large as ``ceiling`` would make weights grow.
            TrainerError: If the Trainer plans too few steps, or none from which ``strength`` could be derived.
        """
        super().prepare(trainer, module, steps)
        if self.strength is None and steps is None:
            raise TrainerError(
                "IncReg: the fit has no planned number of steps from which strength could be derived. Give max_steps, or strength."
            )
        ceiling, cells, how = self.numbers["ceiling"], (self.slices.size, self.quota), (self.shape, self.delta_clip)
        growing = max(1, int(GROWING * (steps or 0)))
        strength = self.strength or ceiling / steepness_for(*cells, growing, *how)
        needed = updates_needed(*cells, ceiling / strength, *how)
        self._needs(steps, needed)
        self.numbers |= {
            "strength": strength,
            "last": min(steps, max(needed, int(LAST * steps))) if steps else math.inf,
        }
        self._forecast(np.arange(1, min(needed, math.ceil(ceiling / strength)) + 1.0) * strength)  # of the lowest rank
        log.info(
            "IncReg: penalties grow by up to %.3g per step to %.3g; all is pruned after %d steps at the earliest, of %s.",
            strength,
            ceiling,
            needed,
            steps,
        )

    def start(self) -> None:
        """Start the averages."""
        self.ranks = torch.zeros_like(self.slices.cell)
        self._next = 0  # the update in which a penalty can be at the ceiling

    def grow(self) -> Tensor | None:
        """Rank, average, punish, and prune what has reached the ceiling."""
        if self.over:
            return None
        slices, strength = self.slices, self.numbers["strength"]
        scores = slices.scores()
        self.ranks += slices.ranks(scores.masked_fill(self.gone, -1.0))  # whole numbers: equal averages are equal
        place = slices.ranks(self.gone, self.ranks).to(scores.dtype)
        left, live = (counts[slices.cell] for counts in (self.left, slices.size - self.quota + self.left))
        change = punishment(place, left, live, strength, self.shape, self.delta_clip)
        self.values = torch.where(self.gone, self.values, (self.values + change).clamp(min=0))
        if self.updates >= min(self._next, self.numbers["last"]):
            self._prune(scores)
        return scores

    def _prune(self, scores: Tensor) -> None:
        """Prune what has reached the ceiling, or all that is left if it is time, and tell when to look again; waits for the device."""
        self.check_finite(scores)
        done = ~self.gone & (self.values >= self.numbers["ceiling"])
        if self.updates >= self.numbers["last"]:
            done |= self.lowest(-self.values, self.ranks)
        if bool(done.any()):
            self.drop(done)
        steps = (self.numbers["ceiling"] - float(self.values.masked_fill(self.gone, 0).max())) / self.numbers[
            "strength"
        ]
        self._next = self.updates + max(1, math.floor(steps * (1 - 1e-3)))

    def likely(self) -> Tensor:
        """Return which channels will leave if their averaged ranks stay as they are, ``[units]``, boolean."""
        return self.gone | self.lowest(self.ranks)

    def growth_state(self) -> dict[str, Any]:
        """Return what a resume needs: also the sums of ranks."""
        own = {"ranks": self.ranks, "next": self._next} if self._begun else {}
        return super().growth_state() | own

    def take_up(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`growth_state` returned."""
        super().take_up(state)
        if self._begun:
            self.ranks, self._next = state["ranks"], state["next"]
