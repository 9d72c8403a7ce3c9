"""SNIP: before training, remove the weights that the loss is least sensitive to.

Lee, Ajanthan and Torr, "SNIP: Single-Shot Network Pruning Based on Connection Sensitivity", ICLR 2019 (arXiv:1810.02340). With a factor ``c`` on
every weight, the sensitivity is ``|dL/dc|`` at ``c = 1``, which is ``|g * w|`` (eq. 4, 5); the paper's division by the sum does not change the order.
The loss is summed over batches before the absolute value is taken; the paper has one batch. Batch normalization sees the batch, as in training.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_prune.budget.weights import Scope
from lightning_prune.callback.batches import losses_of, plain_chunks, scoring
from lightning_prune.callback.checks import check_integer
from lightning_prune.callback.masking import Schedule
from lightning_prune.callback.task import Task
from lightning_prune.callback.weights import WeightPruning
from lightning_prune.curvature.hvp import gradient
from lightning_prune.structure.select import Pattern


def connection_sensitivity(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return ``|g * w|``, one tensor per weight, float64; higher = keep.

    Args:
        weights: Prunable weights.
        gradients: Of the loss, in the same shapes, float64.
    """
    return [(g * w.detach()).abs() for w, g in zip(weights, gradients, strict=True)]


class SNIP(WeightPruning):
    """Remove the single weights that the loss is least sensitive to, at the start.

    Args:
        sparsity: Share of the prunable weights that leave, in [0, 1).
        calibration_batches: Batches whose loss is differentiated; the paper has 1, of 100 or 128 samples.
        scope: ``"global"``: scores compete over all layers. ``"uniform"``: the same share of every layer. ``"erk"``: shares by its shape.
        min_kept: At least so many weights of every layer stay.
        remove_dead: Remove channels that no weight reaches or leaves.
        include: Layers to prune: names, globs or module types; None takes all that can be.
        exclude: Layers to leave alone, likewise.
        start_epoch: First epoch in which a gradual run prunes.
        until_epoch: Epoch at whose start a gradual run has reached its target; None prunes at the start of the fit, as the paper does.
        every_n_epochs: Epochs between the steps of a gradual run.
        schedule: How the target is approached: ``"cubic"`` or ``"linear"``.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        *,
        sparsity: float,
        calibration_batches: int = 1,
        scope: Scope = "global",
        min_kept: int = 0,
        remove_dead: bool = True,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] | None = None,
        start_epoch: int = 0,
        until_epoch: int | None = None,
        every_n_epochs: int = 1,
        schedule: Schedule = "cubic",
        recalibrate_bn: int = 8,
    ) -> None:
        super().__init__(
            sparsity=sparsity,
            scope=scope,
            min_kept=min_kept,
            remove_dead=remove_dead,
            include=include,
            exclude=exclude,
            start_epoch=start_epoch,
            until_epoch=until_epoch,
            every_n_epochs=every_n_epochs,
            schedule=schedule,
            recalibrate_bn=recalibrate_bn,
        )
        self.calibration_batches = calibration_batches
        check_integer(self, "calibration_batches", 1)

    def score_weights(
        self, task: Task, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return ``|g * w|`` of every weight, the gradient averaged over ranks in one collective."""
        own = list(weights.values())
        with scoring(task.probe):
            chunks = plain_chunks(task.probe, self.calibration_batches)
            slope = gradient(losses_of(task.probe, chunks, task.probe.loss_if_any), own, task.probe.mean)
            return dict(zip(weights, connection_sensitivity(own, slope), strict=True))
