"""GReg: a penalty that grows on channels chosen beforehand until they are at zero, which gives the others time to take over.

Wang, Qin, Zhang and Fu, "Neural Pruning via Growing Regularization", ICLR 2021 (arXiv:2012.09243). GReg-1 chooses the channels with the smallest
weights at the start. GReg-2 first lets one small penalty grow on all channels and chooses then: under it weights move to ``(H + lambda I)^-1 H w``,
so those hold their size that the curvature ``H`` holds, and sizes tell what they could not before. From there both do the same: every
``every_n_steps`` steps the penalty of the chosen channels gains ``strength`` until it is ``ceiling``; after ``settle_steps`` more they are pruned.
The others of GReg-2 meanwhile have the penalty ``-gamma``, which undoes their weight decay so that they can grow back.

Unlike the authors' code: channels are what leaves together, and the score of one is the mean over the layers that write it of the mean absolute
weight; biases and normalization are penalized, too (:mod:`lightning_prune.callback.penalty`); ``gamma`` is the weight decay, as in the paper, not
1e-4 (the smallest one, where parameter groups differ); no early end by the ratio of sizes. As in their code, and unlike the paper, what
leaves is what was chosen, not what is smallest at the end.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_prune.callback.checks import check_choice, check_integer
from lightning_prune.callback.penalty import Penalty, check_positive
from lightning_prune.callback.ratios import Ratios
from lightning_prune.errors import OptionError, TrainerError
from lightning_prune.structure.select import Pattern

log = logging.getLogger(__name__)

GROWING, SETTLING = (
    0.5,
    0.2,
)  # shares of the planned steps, by default; in the rest the model trains on without the channels
PICKING = 0.1  # share of the growing steps of order 2 in which one penalty grows on all, and a tenth of the pace at which it does


class GReg(Penalty):
    """Let a penalty grow on chosen channels until they are at zero, while the model trains.

    Give exactly one of ``flops``, ``params``, ``sparsity``; start from a trained model. By default the penalty grows for half of the planned
    steps and stays for a fifth; then the channels are pruned, the model trains on without them, and it gets smaller when the fit has ended.

    Args:
        order: 1: channels are chosen at the start, 2: after a small penalty has grown on all.
        strength: What the penalty gains each time; None derives it from the planned steps. 1e-4 in the paper.
        ceiling: The penalty at which growth ends; None derives it from the learning rate, as large as is sure to be stable. 1.0 at a learning rate of
            1e-3 in the paper.
        every_n_steps: Optimizer steps from one gain to the next; 5 and 10 in the paper.
        settle_steps: Steps from the end of growth until the channels are pruned; None derives it from the planned steps. 40,000 and 10,000 in
            the paper.
        pick_ceiling: Only of order 2: the penalty on all at which channels are chosen; None takes a hundredth of ``ceiling``, as in the paper. It
            gains a tenth of ``strength`` each time, or what a tenth of the growing steps leaves.
        norms: Whether biases, and scales and shifts of normalization, are penalized with the filters of their channels.
        flops: Bound on the multiply-adds of the model: share of the dense one (float) or a count for the example inputs (int).
        params: Bound on its parameters, likewise.
        sparsity: Share of the channels that leave, in [0, 1), of the dense model's; or such shares by name or glob of a group.
        ratios: What the groups give for one bound: ``"uniform"``, the same share of each; ``"pca"``, as much as leaves every group
            the same share of the energy of its weights' principal components; or shares relative to each other by name or glob.
        align: Channels kept are multiples of it; 1 switches that off.
        min_channels: At least so many channels of a group stay.
        include: Layers whose channels may leave: names, globs or module types; None takes all.
        exclude: Layers whose channels stay, likewise.
        start_epoch: First epoch in which penalties grow.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards, unless the model has trained for 50 steps or
            more without the channels; 0 leaves them.

    Attributes:
        chosen: The channels that will leave, ``[units]``, boolean; None until they are chosen.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        order: Literal[1, 2] = 1,
        strength: float | None = None,
        ceiling: float | None = None,
        every_n_steps: int = 1,
        settle_steps: int | None = None,
        pick_ceiling: float | None = None,
        norms: bool = True,
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
        self.order, self.strength, self.every_n_steps = order, strength, every_n_steps
        self.settle_steps, self.pick_ceiling = settle_steps, pick_ceiling
        check_choice(self, "order", (1, 2))
        check_integer(self, "every_n_steps", 1)
        check_positive(self, "strength")
        check_positive(self, "pick_ceiling")
        if settle_steps is not None:
            check_integer(self, "settle_steps", 0)
        if pick_ceiling is not None and (order == 1 or (ceiling is not None and pick_ceiling >= ceiling)):
            raise OptionError(
                f"GReg(order={order}, pick_ceiling={pick_ceiling}, ceiling={ceiling}): it belongs to order=2, and lies below ceiling."
            )
        self.reset()

    def reset(self) -> None:
        """Forget the fit before this one."""
        super().reset()
        self.chosen: Tensor | None = None
        self._penalty = 0.0  # of the chosen, or of all until they are
        self._full: int | None = None  # the update after which growth was over

    def prepare(self, trainer: Any, module: Any, steps: int | None) -> None:
        """Choose what was not given, and see that the planned steps are enough.

        Raises:
            OptionError: If a penalty as large as ``ceiling`` would make weights grow.
            TrainerError: If the Trainer plans too few steps, or none from which a number could be derived.
        """
        super().prepare(trainer, module, steps)
        if steps is None and (self.strength is None or self.settle_steps is None):
            raise TrainerError(
                "GReg: the fit has no planned number of steps from which strength and settle_steps could be derived. Give max_steps, or both."
            )
        ceiling, half = self.numbers["ceiling"], max(1, int(GROWING * (steps or 0)))
        every = self.every_n_steps if self.strength else min(self.every_n_steps, half)
        planned = half // every  # times that a penalty gains
        picked = (self.pick_ceiling or ceiling / 100) if self.order == 2 else 0.0
        if picked >= ceiling:
            raise OptionError(
                f"GReg(pick_ceiling={self.pick_ceiling}): give less than the ceiling of {ceiling:.3g}, or leave it out."
            )
        picking = max(1, round(PICKING * planned)) if self.order == 2 else 0
        pick_strength = PICKING * self.strength if self.strength else picked / max(1, picking)
        strength = self.strength or (ceiling - picked) / max(1, planned - picking)
        settle = self.settle_steps if self.settle_steps is not None else int(SETTLING * (steps or 0))
        times = math.ceil(picked / pick_strength - 1e-6) if picked else 0
        growing = every * (times + math.ceil((ceiling - picked) / strength - 1e-6))
        self._needs(steps, growing + settle)
        decays = [pace.decay for pace in self.paces] if self.order == 2 else [0.0]
        self.numbers |= {
            "strength": strength,
            "settle": settle,
            "needed": growing + settle,
            "every": every,
            "regrow": min(decays),
        }
        self.numbers |= {"pick_strength": pick_strength, "pick_ceiling": picked}
        gains = np.minimum(strength * (np.arange(1, growing + 1) // every), ceiling)
        self._forecast(np.concatenate([gains, np.full(settle, ceiling)]))
        log.info(
            "GReg: the penalty gains %.3g every %d steps up to %.3g; channels are pruned after %d of %s steps.",
            strength,
            every,
            ceiling,
            growing + settle,
            steps,
        )

    def start(self) -> None:
        """Choose what leaves, of order 1."""
        if self.order == 1:
            self._choose()

    def _choose(self) -> None:
        scores = self.slices.scores()
        self.check_finite(scores)
        self.chosen = self.lowest(scores)
        self._set(self._penalty)

    def _set(self, penalty: float) -> None:
        self._penalty = penalty
        if self.chosen is None:
            self.values.fill_(penalty)
        else:
            kept = torch.full_like(self.values, -self.numbers["regrow"])
            self.values = kept.masked_fill(self.chosen, penalty)

    def grow(self) -> None:
        """Let the penalty gain, choose when it is time, and prune when all has settled."""
        if self._penalty < self.numbers["ceiling"] and self.updates % self.numbers["every"] == 0:
            self._gain()
        if self._full is not None and self.updates == self._full + self.numbers["settle"] and self.chosen is not None:
            self.check_finite(self.slices.scores())
            self.drop(self.chosen)

    def _gain(self) -> None:
        n = self.numbers
        picking = self.chosen is None
        gain, end = (n["pick_strength"], n["pick_ceiling"]) if picking else (n["strength"], n["ceiling"])
        over = self._penalty + gain >= end * (1 - 1e-6)
        self._set(end if over else self._penalty + gain)
        if over and picking:
            self._choose()
        elif over:
            self._full = self.updates

    def rounds(self) -> int:
        """Return how many times the penalty gained."""
        return int((self.updates if self._full is None else self._full) // self.numbers.get("every", 1))

    def likely(self) -> Tensor:
        """Return what was chosen, ``[units]``, boolean; before, what would be."""
        return super().likely() if self.chosen is None else self.chosen

    def settled(self) -> Tensor:
        """Return what was chosen, ``[units]``, boolean: that is what leaves, however far the penalty has come."""
        return self.gone if self.chosen is None else self.chosen

    def progress(self) -> float:
        """Return how far growth has come."""
        return 1.0 if bool(self.gone.any()) else min(0.999, self.updates / self.numbers["needed"])

    def growth_state(self) -> dict[str, Any]:
        """Return what a resume needs: also what was chosen."""
        own = {"chosen": self.chosen, "penalty": self._penalty, "full": self._full}
        return super().growth_state() | own

    def take_up(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`growth_state` returned."""
        super().take_up(state)
        self.chosen, self._penalty, self._full = state["chosen"], state["penalty"], state["full"]
