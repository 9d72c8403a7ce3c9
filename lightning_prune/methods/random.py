"""Removal of weights or channels at random.

A control, not a method: Mittal, Bhardwaj, Khapra and Ravindran, "Recovering from Random Pruning", WACV 2018 (arXiv:1801.10447), and many
since found that after fine-tuning a score is often hardly better than chance. Report it beside every other method. With the densities of
another method, layer by layer, it is the shuffle ablation (Frankle, Dziugaite, Roy and Carbin, ICLR 2021, arXiv:2009.08576; Su et al.,
NeurIPS 2020, arXiv:2009.11094): what of a method is more than how many weights it leaves in each layer.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.budget.weights import select_weights
from lightning_prune.callback.channels import channel_removal
from lightning_prune.callback.checks import check_choice, check_integer
from lightning_prune.callback.masking import Masking, Schedule
from lightning_prune.callback.task import Task
from lightning_prune.callback.weights import weight_removal
from lightning_prune.checkpoint import read_checkpoint
from lightning_prune.errors import OptionError
from lightning_prune.structure.carrier import plan_in
from lightning_prune.structure.groups import Structure
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.select import Pattern
from lightning_prune.structure.steps import MaskWeight


def draw_scores(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return independent numbers in [0, 1) for every weight, by name, float64, drawn by ``seed`` in the order of the names given."""
    generator = np.random.default_rng(seed)
    return {name: torch.from_numpy(generator.random(tuple(weight.shape))) for name, weight in weights.items()}


def densities_of(plan: Plan) -> dict[str, float]:
    """Return the share of weights that the masks of a plan leave in each layer, by name of the layer."""
    masks: dict[str, Tensor] = {}
    for step in plan.steps:
        if isinstance(step, MaskWeight):
            masks[step.module] = masks[step.module] & step.mask if step.module in masks else step.mask
    return {layer: float(mask.double().mean()) for layer, mask in masks.items()}


def density_per_weight(densities: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Return the share that stays of every weight, by full name: that of its layer, or of the first glob that matches the layer; else 1.

    Raises:
        OptionError: If an entry of ``densities`` matches no layer.
    """
    layers = {name: name.rpartition(".")[0] for name in names}
    for pattern in densities:
        if not any(layer == pattern or fnmatch.fnmatchcase(layer, pattern) for layer in layers.values()):
            raise OptionError(
                f"Random(densities=...): {pattern!r} matches no layer with prunable weights. There are {', '.join(sorted(set(layers.values())))}."
            )
    found = {}
    for name, layer in layers.items():
        matching = (share for pattern, share in densities.items() if fnmatch.fnmatchcase(layer, pattern))
        found[name] = densities.get(layer, next(matching, 1.0))
    return found


class Random(Masking):
    """Remove weights, or channels, at random: the control that every other score must beat.

    Single weights: give ``sparsity``. Channels: exactly one of ``flops``, ``params``, ``sparsity``.

    Args:
        structured: True removes whole channels, False single weights.
        seed: Of the draw; the same seed on the same model removes the same.
        densities: In what proportion weights stay in the layers, by name or glob (1 where none matches); or a checkpoint of another method, whose
            shares are taken: the shuffle ablation. ``sparsity`` says how many leave in all. Only of single weights.
        flops: Bound on the multiply-adds of the model: share of the dense one (float) or a count for the example inputs (int); only of channels.
        params: Bound on its parameters, likewise.
        sparsity: Share of the weights or channels that leave, in [0, 1); of channels also such shares by name or glob of a group.
        align: Channels kept are multiples of it; 1 switches that off.
        min_channels: At least so many channels of a group stay.
        scope: ``"global"``: one draw over the whole model. ``"uniform"``: the same share of every tensor or group leaves. Of single weights also
            ``"erk"``: Erdos-Renyi-kernel densities.
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
        seed: int = 0,
        densities: dict[str, float] | str | None = None,
        flops: float | int | None = None,
        params: float | int | None = None,
        sparsity: float | dict[str, float] | None = None,
        align: int = 16,
        min_channels: int = 1,
        scope: Literal["global", "uniform", "erk"] = "global",
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
        self.structured, self.seed, self.densities = structured, seed, densities
        self.flops, self.params, self.sparsity = flops, params, sparsity
        self.align, self.min_channels, self.scope = align, min_channels, scope
        self.min_kept, self.remove_dead = min_kept, remove_dead
        check_choice(self, "structured", (False, True))
        check_integer(self, "seed", 0)
        if densities is not None:
            self._check_densities(densities)
        if structured:
            self.removal = channel_removal(self, self.score_units, scope)
        else:
            check_choice(self, "scope", ("global", "uniform", "erk"))
            self.removal = weight_removal(self, self.choose_weights, sparsity)

    def _check_densities(self, densities: object) -> None:
        shares = isinstance(densities, Mapping) and bool(densities)
        right = shares and all(
            isinstance(s, int | float) and not isinstance(s, bool) and 0 <= s <= 1
            for s in densities.values()  # type: ignore[attr-defined]
        )
        if not right and not isinstance(densities, str):
            raise OptionError(
                f"Random(densities={densities!r}): give shares in [0, 1] by name or glob of a layer, {{'conv1': 0.3}}, or the path of a checkpoint."
            )
        if self.structured or self.scope != "global":
            raise OptionError(
                "Random(densities=...): they say themselves where single weights leave; drop structured= and scope=."
            )

    def choose_weights(
        self, task: Task, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor], count: int
    ) -> Mapping[str, Tensor]:
        """Return which entries stay, drawn by ``seed``."""
        densities = self.densities
        if isinstance(densities, str):
            plan = plan_in(read_checkpoint(densities)["state_dict"])
            densities = densities_of(plan) if plan is not None else {}
            if not densities:
                raise OptionError(f"Random(densities={self.densities!r}): this checkpoint masks no weights.")
        shares = None if densities is None else density_per_weight(densities, list(weights))
        return select_weights(draw_scores(weights, self.seed), kept, count, self.scope, self.min_kept, shares)

    def score_units(self, task: Task, structure: Structure, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return a number in [0, 1) per unit, drawn by ``seed``."""
        return np.random.default_rng(self.seed).random(structure.count)
