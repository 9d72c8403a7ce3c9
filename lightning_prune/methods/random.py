"""Removal of channels at random.

A control, not a method: Mittal, Bhardwaj, Khapra and Ravindran, "Recovering from Random Pruning", WACV 2018 (arXiv:1801.10447), and many
since found that after fine-tuning a score is often hardly better than chance. Report it beside every other method.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_prune.callback.channels import ChannelPruning, Schedule, check_choice
from lightning_prune.callback.checks import check_integer
from lightning_prune.callback.task import Task
from lightning_prune.structure.groups import Structure
from lightning_prune.structure.select import Pattern


class Random(ChannelPruning):
    """Remove channels, heads and hidden units at random: the control that every other score must beat.

    Give exactly one of ``flops``, ``params``, ``sparsity``.

    Args:
        structured: Whole channels; single weights are not offered yet.
        seed: Of the draw; the same seed on the same model gives the same units.
        flops: Bound on the multiply-adds of the model: share of the dense one (float) or a count for the example inputs (int).
        params: Bound on its parameters, likewise.
        sparsity: Share of the channels that leave, in [0, 1), or such shares by name or glob of a group.
        align: Channels kept are multiples of it; 1 switches that off.
        min_channels: At least so many channels of a group stay.
        scope: ``"global"``: scores compete over all groups. ``"uniform"``: the same share of every group leaves.
        include: Layers whose channels may leave: names, globs or module types; None takes all.
        exclude: Layers whose channels stay, likewise.
        start_epoch: First epoch in which a gradual run masks.
        until_epoch: Epoch at whose start a gradual run has reached its target; None shrinks at the start of the fit.
        every_n_epochs: Epochs between the steps of a gradual run.
        schedule: How the target is approached: ``"cubic"`` or ``"linear"``.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        structured: bool = True,
        seed: int = 0,
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
            flops=flops,
            params=params,
            sparsity=sparsity,
            align=align,
            min_channels=min_channels,
            scope=scope,
            include=include,
            exclude=exclude,
            start_epoch=start_epoch,
            until_epoch=until_epoch,
            every_n_epochs=every_n_epochs,
            schedule=schedule,
            recalibrate_bn=recalibrate_bn,
        )
        self.structured, self.seed = structured, seed
        check_choice(self, "structured", (True,))
        check_integer(self, "seed", 0)

    def score_units(self, task: Task, structure: Structure, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return a number in [0, 1) per unit, drawn by ``seed``."""
        return np.random.default_rng(self.seed).random(structure.count)
