"""Global Sparse Momentum SGD: training that lets all but the most useful weights decay to zero, so that the final cut costs nothing.

Ding, Ding, Zhou, Guo, Han and Liu, "Global Sparse Momentum SGD for Pruning Very Deep Neural Networks", NeurIPS 2019 (arXiv:1909.12778). In every
step the ``Q`` weights with the largest ``t = |w * dL/dw|`` over the whole network are active, the others passive::

    z <- beta z + eta w + B * dL/dw,    w <- w - alpha z,    B = [t >= the Q-th largest]

Active weights train as ever, passive ones only decay by weight decay ``eta``, which momentum ``beta`` makes ``1 / (1 - beta)`` times as fast; which
are which is chosen anew in every step. At the end all but the ``Q`` largest weights are cut off; there is nothing to fine-tune, since they are nearly
zero. Here the gradient is multiplied by ``B`` and the user's own optimizer does the rest; momentum is not masked, so a weight that turns passive
still feels the gradients that it had.

Whether passive weights reach zero in time is known before training: they shrink by ``exp(-S)``, ``S`` the sum over steps of
``alpha eta / (1 - beta)`` (:func:`decay_per_step`). Below ln 1000 that is a warning.

Unlike the authors' code, which takes every kernel of 2 or 4 axes: weights are those of linear layers, convolutions, attention and recurrent layers,
whatever their axes, and not of embeddings. ``Q`` is the number of weights that the cut keeps, so that the two agree. A gradient that is not
finite is never hidden: where one is not a number, all weights are active. Several optimizers each rank the weights they hold.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.budget.weights import count_to_remove, select_weights
from lightning_prune.callback.batches import no_loss
from lightning_prune.callback.checks import check_integer
from lightning_prune.callback.course import Course, rates_to_come
from lightning_prune.callback.task import Task
from lightning_prune.callback.weights import WeightPruning, check_scores
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.probe import FOREIGN, Probe
from lightning_prune.structure.masks import masked
from lightning_prune.structure.select import Pattern

log = logging.getLogger(__name__)

ENOUGH = math.log(1e3)  # S at which passive weights have shrunk to a thousandth
SMALL = 1e-3  # share of the largest weight below which one counts as zero


def passive_entries(weights: Sequence[Tensor], gradients: Sequence[Tensor], active: int) -> list[Tensor]:
    """Return which entries are passive: ``|w * g|`` below the ``active``-th largest of all.

    Ties at the threshold are active, so at least ``active`` entries are, and all of them if fewer have a ``|w * g|`` above zero.

    Args:
        weights: Any shapes.
        gradients: Of the same shapes.
        active: How many entries shall be active.

    Returns:
        Boolean, the shapes of the weights.
    """
    products = [(_wide(w.detach()) * _wide(g)).abs() for w, g in zip(weights, gradients, strict=True)]
    flat = torch.cat([product.reshape(-1) for product in products]) if products else torch.zeros(0)
    if active >= flat.numel():
        return [torch.zeros_like(product, dtype=torch.bool) for product in products]
    # as fast as kthvalue, which has no deterministic form on CUDA
    threshold = flat.topk(active, sorted=False).values.min() if active > 0 else math.inf
    return [product < threshold for product in products]


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least: products of half precision underflow."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@torch.no_grad()
def mask_gradients_(weights: Sequence[Tensor], active: int) -> None:
    """Zero the gradients of passive entries, in place; tensors without a gradient are passive as they are.

    Args:
        weights: Parameters, their gradients averaged and unscaled.
        active: How many of all their entries shall be active.
    """
    pairs = [(weight, weight.grad) for weight in weights if weight.grad is not None]
    passive = passive_entries([weight for weight, _ in pairs], [gradient for _, gradient in pairs], active)
    for (_, gradient), entries in zip(pairs, passive, strict=True):
        gradient.masked_fill_(entries, 0)


def decay_per_step(rate: float, decay: float, momentum: float, dampening: float = 0.0) -> float:
    """Return by which exponent a passive weight shrinks in a step: ``alpha eta (1 - dampening) / (1 - beta)``, to first order in ``alpha eta``.

    That is the slow one of the two rates of ``v <- beta v + eta w, w <- w - alpha v``.

    Args:
        rate: Learning rate alpha.
        decay: Weight decay eta, coupled (added to the gradient).
        momentum: beta, in [0, 1).
        dampening: As in :class:`torch.optim.SGD`.
    """
    return rate * decay * (1 - dampening) / (1 - momentum)


class GSM(WeightPruning):
    """Train so that all but a share of the weights decay to zero, and cut those off when the fit has ended.

    Needs SGD with momentum and weight decay; start from a trained model. Give exactly one of ``sparsity`` and ``ratio``. Nothing is held at zero
    while the model trains.

    Args:
        sparsity: Share of the weights that leaves, in [0, 1), of the dense model's.
        ratio: The share that stays instead, in (0, 1], as ``nonzero_ratio`` in the authors' code; a compression of 60 times is 1/60. With 1 the
            fit is plain SGD.
        min_kept: At least so many weights of every tensor stay in the final cut.
        remove_dead: Whether channels whose weights are all gone leave the model.
        calibration_batches: Batches on which to tell, after every epoch, what the loss would be after the cut; 0 leaves that out.
        include: Layers whose weights may leave: names, globs or module types; None takes all.
        exclude: Layers whose weights stay and train as ever, likewise.
        start_epoch: First epoch in which weights are passive.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from after channels have left; 0 leaves them.

    Attributes:
        forecast: ``S`` of the planned steps, least of all parameter groups with weights to prune; None where the steps are not known.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        ratio: float | None = None,
        min_kept: int = 0,
        remove_dead: bool = True,
        calibration_batches: int = 1,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] | None = None,
        start_epoch: int = 0,
        recalibrate_bn: int = 8,
    ) -> None:
        super().__init__(
            sparsity=_share_removed(sparsity, ratio),
            min_kept=min_kept,
            remove_dead=remove_dead,
            include=include,
            exclude=exclude,
            recalibrate_bn=recalibrate_bn,
        )
        self.ratio, self.calibration_batches, self.start_epoch = ratio, calibration_batches, start_epoch
        self.gradual = True
        check_integer(self, "calibration_batches", 0)
        check_integer(self, "start_epoch", 0)
        self.reset()

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments in JSON types, as they were given."""
        return super().options() | ({} if self.ratio is None else {"sparsity": None})

    def reset(self) -> None:
        """Forget the fit before this one."""
        super().reset()
        self.forecast: float | None = None
        self._told_why_no_loss = False

    def due(self, epoch: int) -> float:
        """Return 0: nothing is masked before the fit has ended."""
        return 0.0

    def progress(self) -> float:
        """Return 1: there is no schedule that an early end could cut short."""
        return 1.0

    def score_weights(
        self, task: Task, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the magnitudes, at the end of the fit."""
        return {name: weight.detach().abs() for name, weight in weights.items()}

    def on_gradients(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Zero the gradients of passive weights."""
        held = {p for group in optimizer.param_groups for p in group["params"]}
        weights = [weight for weight in self._found.tensors.values() if weight in held]
        mask_gradients_(weights, self._active(weights))

    def _active(self, weights: Sequence[Tensor]) -> int:
        """Return how many entries the cut keeps, or of some of the tensors their part of that."""
        everything = sum(weight.numel() for weight in self._found.tensors.values())
        stay: int = self._found.entries - count_to_remove(self.sparsity, self._found.entries)
        here = sum(weight.numel() for weight in weights)
        return stay if here == everything else round(stay * here / everything)

    # Will they reach zero in time? ----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Forecast how far passive weights will decay, and warn if that is not to zero."""
        if self._done or self._found is None or self.steps:
            return
        weights = set(self._found.tensors.values())
        forecasts = []
        for optimizer in trainer.optimizers:
            groups = [i for i, group in enumerate(optimizer.param_groups) if weights & set(group["params"])]
            if groups and not isinstance(optimizer, torch.optim.SGD):
                log.warning(
                    "GSM: the weights are trained by %s, where passive weights do not decay as they do under SGD with momentum: coupled weight decay "
                    "is normalized away, decoupled weight decay is not sped up by momentum. Use torch.optim.SGD(momentum=0.98, weight_decay=...).",
                    type(optimizer).__name__,
                )
            elif groups:
                self._warn_without_decay(optimizer, groups)
                forecasts += self._forecasts(trainer, pl_module, optimizer, groups)
        self.forecast = min(forecasts, default=None)
        if self.forecast is not None and 0 < self.forecast < ENOUGH:
            log.warning(
                "GSM: in the planned steps passive weights only shrink to %.2g of what they are: S, the sum of lr * weight_decay / (1 - momentum), "
                "is %.3g and should be at least %.1f, or the final cut will cost accuracy. Train %.3g times as long, or raise momentum (the paper "
                "has 0.98 and 0.99), lr or weight_decay.",
                math.exp(-self.forecast),
                self.forecast,
                ENOUGH,
                ENOUGH / self.forecast,
            )

    def _warn_without_decay(self, optimizer: torch.optim.Optimizer, groups: Sequence[int]) -> None:
        if any(optimizer.param_groups[i]["weight_decay"] == 0 for i in groups):
            log.warning(
                "GSM: weight_decay is 0 for weights that shall leave, so passive ones never decay and the final cut will cost accuracy. Give "
                "torch.optim.SGD a weight_decay, 1e-4 or 5e-4 in the paper."
            )

    def _forecasts(
        self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer, groups: Sequence[int]
    ) -> list[float]:
        """Return S of some parameter groups over the steps that the Trainer plans; nothing where it has no plan."""
        course = Course.of(trainer)
        if course is None:
            return []
        sums = [0.0] * len(groups)
        try:
            for epoch, options in rates_to_come(trainer, module, optimizer, course):
                for place, group in enumerate(groups if epoch >= self.start_epoch else ()):
                    sums[place] += decay_per_step(*(float(options[group][name]) for name in _RATES))
        except FOREIGN as error:
            log.warning(
                "GSM: whether passive weights reach zero in time cannot be foretold, a learning-rate scheduler cannot be run ahead (%s: %s).",
                type(error).__name__,
                error,
            )
            return []
        return sums

    # How far it has come --------------------------------------------------------------------------------------------------------

    def facts(self, module: nn.Module) -> dict[str, float]:
        """Return the share of weights that are nearly zero, the forecast, and the loss now and after the cut."""
        if self._found is None:
            return {}
        sizes = [weight.detach().abs() for weight in self._found.tensors.values()]
        largest = max(float(size.max()) for size in sizes)
        small = sum(int((size < SMALL * largest).sum()) for size in sizes) / sum(size.numel() for size in sizes)
        told = {"gsm/small_share": small}
        if self.forecast is not None:
            told["gsm/forecast"] = self.forecast
        return told | self._losses()

    def _losses(self) -> dict[str, float]:
        task = self._task
        if not self.calibration_batches or task is None or not getattr(task.model, "automatic_optimization", True):
            return {}
        weights, kept = dict(self._found.tensors), self._found.kept
        count = count_to_remove(self.sparsity, self._found.entries) - self._found.gone
        try:
            scores = check_scores("GSM", self.score_weights(task, weights, kept), kept)
            stays = select_weights(scores, kept, count, min_kept=self.min_kept)
            before = mean_loss(task.probe, self.calibration_batches)
            with masked(weights, stays):
                after = mean_loss(task.probe, self.calibration_batches)
        except (ModelError, *FOREIGN) as error:
            if not self._told_why_no_loss:
                log.warning(
                    "GSM: the loss after the cut cannot be told (%s). calibration_batches=0 leaves it out.", error
                )
            self._told_why_no_loss = True
            return {}
        return {"gsm/loss": before, "gsm/loss_after_cut": after}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, and the forecast; what is active is chosen anew in every step."""
        return super().state_dict() | {"forecast": self.forecast}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint.

        Raises:
            CheckpointError: If this callback was configured otherwise when the checkpoint was written.
        """
        super().load_state_dict(state)
        self.forecast = state["forecast"]


_RATES = ("lr", "weight_decay", "momentum", "dampening")


def mean_loss(probe: Probe, count: int) -> float:
    """Return the mean over ``count`` batches of the loss in evaluation mode, less those skipped; the model is left bit-identical.

    Raises:
        ModelError: If none has a loss.
    """
    with probe.quiet(mode="eval"), torch.no_grad():
        found = [probe.loss_if_any(batch, i) for i, batch in enumerate(probe.batches(count, "Looking at the loss"))]
    losses = [float(loss) for loss in found if loss is not None]
    if not losses:
        raise no_loss(probe)
    return sum(losses) / len(losses)


def _share_removed(sparsity: float | None, ratio: float | None) -> float:
    """Return ``sparsity``, or what a ratio leaves of it.

    Raises:
        OptionError: If both or neither are given, or the ratio is out of range.
    """
    if (sparsity is None) == (ratio is None):
        raise OptionError(
            f"GSM(sparsity={sparsity!r}, ratio={ratio!r}): give one of them, the share of weights that leaves or the share that stays."
        )
    if ratio is None:
        return sparsity  # type: ignore[return-value]
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        hint = f" For a compression of {ratio:g} times give ratio={1 / ratio:.4g}." if _is_factor(ratio) else ""
        raise OptionError(f"GSM(ratio={ratio!r}): give a number in (0, 1], the share of weights that stays.{hint}")
    return float(1 - Fraction(repr(float(ratio))))


def _is_factor(ratio: object) -> bool:
    return isinstance(ratio, int | float) and not isinstance(ratio, bool) and ratio > 1
