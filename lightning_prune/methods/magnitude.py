"""Removal of the smallest weights, or of the channels whose weights are smallest.

Single weights: the smallest absolute values go. Over all tensors, as Han, Pool, Tran and Dally 2015 (arXiv:1506.02626) did by layer; the same
share of each; with densities by the Erdos-Renyi-kernel rule (Evci et al. 2020, arXiv:1911.11134); or by LAMP (Lee, Park, Mo, Ahn and Shin, ICLR
2021, arXiv:2010.07611), which divides the square of a weight by the sum of the squares of all weights of its tensor that are not smaller.
The authors of LAMP compute counts per layer and prune by them; a global ranking of the scores is the same.

Channels: Li, Kadav, Durdanovic, Samet and Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017 (arXiv:1608.08710) rank the filters of a layer by
the sum of their absolute weights. Here a unit is whatever leaves together (:mod:`lightning_prune.structure.groups`), so its score is the
mean of the norms of all its slices of weights, those that write the channel and those that read it; scores of a group are divided by their
mean, so that groups of different scale can compete under one budget. The paper prunes every layer by a share of its own: ``scope="uniform"``.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.budget.weights import select_weights
from lightning_prune.callback.channels import channel_removal
from lightning_prune.callback.checks import check_choice
from lightning_prune.callback.masking import Masking, Schedule
from lightning_prune.callback.task import Task
from lightning_prune.callback.weights import check_scores, weight_removal
from lightning_prune.errors import ModelError
from lightning_prune.structure.groups import Slot, Structure
from lightning_prune.structure.select import Pattern

Normalization = Literal["mean", "max", "none"]


def slice_norms(
    weight: Tensor, slots: Sequence[Slot], kept: NDArray[np.bool_], norm: int
) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Return the norm of every unit's slice of a weight, along each of its axes that have units.

    Args:
        weight: The weight, any shape.
        slots: Which units lie along which axis of it.
        kept: Units that count, ``[units]``, boolean; slices of others are as good as zero.
        norm: 1 or 2.

    Returns:
        Per slot the norms, ``[units]``, float64, and whether the unit has a slice there, ``[units]``, boolean.
    """
    powers = weight.detach().double().abs() ** norm
    for slot in slots:
        stays = torch.from_numpy(np.append(kept, True)[slot.units]).to(weight.device)
        powers *= slot.along(stays, weight.ndim)
    found = []
    for slot in slots:
        here = np.bincount(slot.units[slot.units >= 0], minlength=len(kept)) > 0
        found.append((slot.sums(powers, len(kept)) ** (1.0 / norm), here))
    return found


def unit_norms(
    model: nn.Module, structure: Structure, norm: int, kept: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Return the mean over its slices of weights of each unit's norm, ``[units]``; biases and normalizations do not count.

    Args:
        model: The model.
        structure: Its units.
        norm: 1 or 2.
        kept: Units that have not been masked, ``[units]``, boolean; by default all. The norms of these are those of the model without the others.
    """
    kept = np.ones(structure.count, bool) if kept is None else kept
    parameters = dict(model.named_parameters())
    total, times = np.zeros(structure.count), np.zeros(structure.count)
    for name, slots in structure.by_tensor.items():
        if name in parameters and parameters[name].ndim >= 2:
            for norms, here in slice_norms(parameters[name], slots, kept, norm):
                total += norms
                times += here
    return total / np.maximum(times, 1)


def normalized(
    scores: NDArray[np.float64], groups: Sequence[NDArray[np.int64]], by: Normalization
) -> NDArray[np.float64]:
    """Divide the scores of every group by their mean or their largest; a group of zeros stays.

    Args:
        scores: ``[units]``.
        groups: Units of each group.
        by: ``"mean"``, ``"max"`` or ``"none"``.
    """
    found = scores.copy()
    for units in groups if by != "none" else ():
        scale = scores[units].mean() if by == "mean" else scores[units].max(initial=0.0)
        found[units] = scores[units] / (scale or 1.0)
    return found


@torch.no_grad()
def lamp(weight: Tensor) -> Tensor:
    """Return the LAMP scores of a tensor: the square of each weight over the sum of the squares of those that are not smaller.

    The largest weight scores 1, so that a global ranking leaves at least one weight of every tensor.

    Args:
        weight: Any shape.

    Returns:
        Scores in (0, 1], same shape, float64; among equal weights the first has the lowest, as if it were the smallest.
    """
    squares = weight.detach().double().square().reshape(-1)
    order = squares.argsort(stable=True)
    ascending = squares[order]
    rest = ascending.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = torch.where(rest > 0, ascending / rest, torch.zeros_like(rest))
    return scores.view(weight.shape)


class Magnitude(Masking):
    """Remove the smallest weights; or the channels, heads and hidden units with the smallest weights.

    Single weights: give ``sparsity``. Channels: exactly one of ``flops``, ``params``, ``sparsity``.

    Args:
        structured: True removes whole channels, False single weights.
        norm: 1 or 2: the norm of a slice of weights; only of channels.
        normalize: ``"mean"`` or ``"max"``: scores are divided by the mean or the largest of their group; ``"none"`` compares them as they are;
            only of channels.
        flops: Bound on the multiply-adds of the model: share of the dense one (float) or a count for the example inputs (int); only of channels.
        params: Bound on its parameters, likewise.
        sparsity: Share of the weights or channels that leave, in [0, 1); of channels also such shares by name or glob of a group.
        align: Channels kept are multiples of it; 1 switches that off.
        min_channels: At least so many channels of a group stay.
        scope: ``"global"``: scores compete over the whole model. ``"uniform"``: the same share of every tensor or group leaves. Of single weights
            also ``"erk"``: Erdos-Renyi-kernel densities, and ``"lamp"``: one ranking of LAMP scores.
        min_kept: At least so many weights of every tensor stay; only of single weights.
        remove_dead: Whether units that die of masked weights are cut off; only of single weights.
        include: Layers to take: names, globs or module types; None takes all.
        exclude: Layers to leave alone, likewise.
        start_epoch: First epoch in which a gradual run masks.
        until_epoch: Epoch at whose start a gradual run has reached its target; None removes at the start of the fit.
        every_n_epochs: Epochs between the steps of a gradual run.
        schedule: How the target is approached: ``"cubic"`` or ``"linear"``.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        structured: bool = False,
        norm: Literal[1, 2] = 2,
        normalize: Normalization = "mean",
        flops: float | int | None = None,
        params: float | int | None = None,
        sparsity: float | dict[str, float] | None = None,
        align: int = 16,
        min_channels: int = 1,
        scope: Literal["global", "uniform", "erk", "lamp"] = "global",
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
            include=include,
            exclude=exclude,
            start_epoch=start_epoch,
            until_epoch=until_epoch,
            every_n_epochs=every_n_epochs,
            schedule=schedule,
            recalibrate_bn=recalibrate_bn,
        )
        self.structured, self.norm, self.normalize = structured, norm, normalize
        self.flops, self.params, self.sparsity = flops, params, sparsity
        self.align, self.min_channels, self.scope = align, min_channels, scope
        self.min_kept, self.remove_dead = min_kept, remove_dead
        check_choice(self, "structured", (False, True))
        check_choice(self, "norm", (1, 2))
        check_choice(self, "normalize", ("mean", "max", "none"))
        if structured:
            self.removal = channel_removal(self, self.score_units, scope)
        else:
            check_choice(self, "scope", ("global", "uniform", "erk", "lamp"))
            self.removal = weight_removal(self, self.choose_weights, sparsity)

    def choose_weights(
        self, task: Task, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor], count: int
    ) -> Mapping[str, Tensor]:
        """Return which entries stay: all but the ``count`` smallest, in the order that ``scope`` says."""
        score = lamp if self.scope == "lamp" else (lambda weight: weight.detach().double().abs())
        scores = check_scores("Magnitude", {name: score(weight) for name, weight in weights.items()}, kept)
        return select_weights(scores, kept, count, "global" if self.scope == "lamp" else self.scope, self.min_kept)

    def score_units(self, task: Task, structure: Structure, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the normalized mean norm of every unit's weights, as if masked units had left.

        Raises:
            ModelError: If weights are not finite; names the group.
        """
        scores = unit_norms(task.model, structure, self.norm, kept)
        for group in structure.groups:
            if not np.isfinite(scores[group.units]).all():
                raise ModelError(
                    f"Magnitude: the weights of {group.name!r} are not finite. Look for a diverged training."
                )
        groups = [group.units[kept[group.units]] for group in structure.groups]
        return normalized(scores, [units for units in groups if units.size], self.normalize)
