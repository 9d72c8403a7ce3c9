"""Structured probabilistic pruning: channels are left out of more and more training steps, until they are left out of all.

Wang, Zhang, Wang and Hu, "Structured Probabilistic Pruning for Convolutional Neural Network Acceleration", BMVC 2018 (arXiv:1709.06994). Every
channel has a probability ``p``, 0 at the start. In each step it is absent with probability ``p``, as one draw decides for all that belongs to it;
after the step its weights are what they were before. Every ``t`` steps the channels of a layer are ranked by the L1 norm of their weights, and::

    p <- clip(p + Delta(rank), 0, 1)

with the punishment function ``Delta`` of IncReg (:func:`lightning_prune.methods.increg.punishment`), ``A`` for the smallest and 0 at the rank ``n``
of the channels that must still leave: no more than ``n`` can. One that comes to ``p = 1`` has left for good. When all have, the others' probabilities
are dropped, and the network trains on.

Known from the authors' code (the history of github.com/MingSun-Tse/Caffe_IncReg), whose group is a column of the weight matrix and not a
channel. Different here: ranks are averaged over the updates, and ``Delta`` is at least ``-A``. As the code has it, with the ranks of the moment and
an unbounded negative branch, a few noisy ranks throw a probability back to 0 that took many updates to grow, and a layer may never reach its
target; ``official=True`` keeps that. After ``max_updates`` those leave that are next by ``p``, so that the target is met exactly in either case.
"""

import logging
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.callback.checks import check_choice, check_integer
from lightning_prune.callback.growth import Growth
from lightning_prune.callback.ratios import Ratios
from lightning_prune.errors import OptionError, TrainerError
from lightning_prune.methods.increg import GROWING, punishment, steepness_for, updates_needed
from lightning_prune.structure.groups import Structure
from lightning_prune.structure.select import Pattern

log = logging.getLogger(__name__)


def grown(p: Tensor, ranks: Tensor, missing: Tensor, live: Tensor, strength: float, clip: float | None = 1.0) -> Tensor:
    """Return the probabilities of units after one update.

    Args:
        p: Probabilities, ``[units]``, float64; units with 1 have left.
        ranks: Place of each unit among those of its layer that have not left, ``[units]``, from 0; the first ones leave.
        missing: How many of its layer still have to leave, ``[units]``; where it is 0, nothing changes.
        live: How many of its layer have not left, ``[units]``.
        strength: Largest change ``A``.
        clip: The smallest is ``-clip * A``; None leaves it unbounded.

    Returns:
        ``[units]``, in [0, 1].
    """
    delta = punishment(ranks.to(p.dtype), missing.to(p.dtype), live.to(p.dtype), strength, clip=clip)
    found = (p + delta).clamp(0, 1)
    return found.where((p < 1) & (found < 1 - 1e-9), 1.0)  # n steps of A / n make 1, whatever the rounding


def absent(p: NDArray[np.float64], seed: int, layer: str, step: int) -> NDArray[np.bool_]:
    """Draw which units of a layer are absent from a training step.

    Args:
        p: Probabilities, ``[units]``.
        seed: With ``layer`` and ``step`` all that the draw depends on; at least 0.
        layer: Name of the layer.
        step: Number of the step.

    Returns:
        ``[units]``, boolean.
    """
    drawn: NDArray[np.bool_] = np.random.default_rng((seed, zlib.crc32(layer.encode()), step)).random(len(p)) < p
    return drawn


class Absence:
    """Channels that are absent from one training step: zero in it, and afterwards what they were before.

    All that writes a unit is zero, the scale and shift of its normalization too, and neither these nor its running statistics change: no gradient,
    weight decay or momentum moves them.

    Args:
        model: The model.
        structure: Its units.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        tensors: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        found = [(tensors[name], slot) for name, slots in structure.by_tensor.items() for slot in slots]
        self._slots = [
            (tensor, slot)
            for tensor, slot in found
            if slot.units.ndim == 1
            and tensor.is_floating_point()
            and (slot.zeroed or not isinstance(tensor, nn.Parameter))
        ]
        self._away: list[tuple[Tensor, int, Tensor, Tensor]] = []
        self._moments: list[tuple[torch.optim.Optimizer, Tensor, int, Tensor, dict[str, Tensor]]] = []

    @property
    def under_way(self) -> bool:
        """Whether a step is under way."""
        return bool(self._away)

    def begin(self, units: NDArray[np.bool_]) -> None:
        """Zero what writes the units.

        Args:
            units: Which are absent, ``[units]``, boolean.
        """
        self.end()
        away, zeroed = np.append(units, False), []
        for tensor, slot in self._slots:
            index = torch.from_numpy(np.flatnonzero(away[slot.units])).to(tensor.device)
            if len(index):
                self._away.append((tensor, slot.axis, index, tensor.data.index_select(slot.axis, index)))
                zeroed += [self._away[-1]] if slot.zeroed else []
        for tensor, axis, index, _ in zeroed:  # only now: two slots of a tensor overlap
            tensor.data.index_fill_(axis, index, 0)

    def on_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero the gradients of absent units, and remember the moments that an optimizer is about to change."""
        held = _held(optimizer)
        for tensor, axis, index, _ in self._away:
            if tensor in held and tensor.grad is not None:
                tensor.grad.index_fill_(axis, index, 0)
                before = {key: moment.index_select(axis, index) for key, moment in _moments(optimizer, tensor)}
                self._moments.append((optimizer, tensor, axis, index, before))

    def end(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put back what was there: weights, moments and running statistics.

        Args:
            optimizer: Only its parameters, and the running statistics; by default all that is still away.
        """
        for owner, parameter, axis, index, before in self._moments:
            for key, moment in _moments(owner, parameter):
                if key in before:
                    moment.index_copy_(axis, index, before[key])
                else:  # this step was the first
                    moment.index_fill_(axis, index, 0)
        held, rest = None if optimizer is None else _held(optimizer), []
        for entry in self._away:
            tensor, axis, index, values = entry
            if held is None or tensor in held or not isinstance(tensor, nn.Parameter):
                tensor.data.index_copy_(axis, index, values)
            else:
                rest.append(entry)
        self._away, self._moments = rest, []


def _held(optimizer: torch.optim.Optimizer) -> set[Tensor]:
    return {p for group in optimizer.param_groups for p in group["params"]}


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[tuple[str, Tensor]]:
    """Return what an optimizer keeps for every entry of a parameter, by name."""
    kept = optimizer.state.get(parameter, {}).items()
    return [(key, value) for key, value in kept if isinstance(value, Tensor) and value.shape == parameter.shape]


STRENGTH = 0.05  # of the authors
_LAST = 0.75  # share of the planned steps after which, by default, the rest leaves; then the network trains on without what has left


class SPP(Growth):
    """Leave channels out of more and more training steps, until as many as shall leave are left out of all; remove them when the fit has ended.

    Start from a trained model. Give exactly one of ``flops``, ``params``, ``sparsity``. Validation sees the weights without the draws of a step.

    Args:
        flops: Bound on the multiply-adds of the model: share of the dense one (float) or a count for the example inputs (int).
        params: Bound on its parameters, likewise.
        sparsity: Share of the channels that leave, in [0, 1), of the dense model's; or such shares by name or glob of a group.
        strength: Largest change ``A`` of a probability per update, in (0, 1]; None: the authors' 0.05, or as much as it takes to be done after half
            of the planned steps.
        every_n_steps: Optimizer steps between two updates, 180 in the paper; None: so that all is done after half of the planned steps if ranks
            do not change.
        max_updates: Updates after which the units leave that are next by probability, then by size, however far they are; None: twice as many
            as it takes if ranks do not change, or as fit into three quarters of the planned steps.
        official: Whether ranks are those of the moment and the change has no lower bound, as in the authors' code; with noise it may stall.
        seed: Of the draws, at least 0.
        ratios: What the groups give for one bound: ``"uniform"``, the same share of each; ``"pca"``, as much as leaves every group
            the same share of the energy of its weights' principal components; or shares relative to each other by name or glob.
        align: Channels kept are multiples of it; 1 switches that off.
        min_channels: At least so many channels of a group stay.
        include: Layers whose channels may leave: names, globs or module types; None takes all.
        exclude: Layers whose channels stay, likewise.
        start_epoch: First epoch that counts.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Attributes:
        ranks: The sum over all updates of the rank of every unit, ``[units]``; averages, times the number of updates.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    ranks: Tensor

    def __init__(
        self,
        flops: float | int | None = None,
        params: float | int | None = None,
        sparsity: float | dict[str, float] | None = None,
        strength: float | None = None,
        every_n_steps: int | None = None,
        max_updates: int | None = None,
        official: bool = False,
        seed: int = 0,
        ratios: Ratios = "uniform",
        align: int = 16,
        min_channels: int = 1,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] | None = None,
        start_epoch: int = 0,
        recalibrate_bn: int = 8,
    ) -> None:
        super().__init__(
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
        self.strength, self.every_n_steps, self.max_updates = strength, every_n_steps, max_updates
        self.official, self.seed = official, seed
        if strength is not None and not (type(strength) in (int, float) and 0 < strength <= 1):
            raise OptionError(
                f"SPP(strength={strength!r}): give a number in (0, 1], the largest change of a probability."
            )
        for option in ("every_n_steps", "max_updates"):
            if getattr(self, option) is not None:
                check_integer(self, option, 1)
        check_choice(self, "official", (False, True))
        check_integer(self, "seed", 0)
        self.reset()

    def reset(self) -> None:
        """Forget the fit before this one."""
        super().reset()
        self._absence: Absence | None = None
        self._chances: list[tuple[str, NDArray[np.int64], NDArray[np.float64]]] = []

    # Probabilities --------------------------------------------------------------------------------------------------------------

    def prepare(self, trainer: Any, module: Any, steps: int | None) -> None:
        """Derive pace and strength from the planned steps.

        Raises:
            TrainerError: If the Trainer plans fewer steps than ``every_n_steps * max_updates``, or none from which the pace could be derived.
        """
        if self.every_n_steps is None and steps is None:
            raise TrainerError(
                "SPP: the fit has no planned number of steps from which every_n_steps could be derived. Give max_steps, or every_n_steps; "
                "strength and max_updates, too, set the pace."
            )
        size, quota, clip = self.slices.size, self.quota, None if self.official else 1.0
        strength = self.strength or STRENGTH
        needed = updates_needed(size, quota, 1 / strength, "exponential", clip)
        if self.strength is None and steps is not None:
            half = max(1, int(GROWING * steps) // (self.every_n_steps or 1))
            if needed > half:
                strength = 1 / steepness_for(size, quota, half, "exponential", clip)
                needed = updates_needed(size, quota, 1 / strength, "exponential", clip)
        every = self.every_n_steps or max(1, int(GROWING * (steps or 0)) // needed)
        most = self.max_updates or int(min(2 * needed, max(needed, _LAST * (steps or math.inf) // every)))
        self._needs(steps, every * most)
        self.numbers = {"strength": strength, "every_n_steps": every, "max_updates": most}
        log.info(
            "SPP: probabilities change by up to %.3g every %d steps; all has left after %d to %d of %s steps.",
            strength,
            every,
            every * min(needed, most),
            every * most,
            steps,
        )
        self.values = self.values.double()
        self.ranks = torch.zeros_like(self.slices.cell)

    def grow(self) -> None:
        """Every so many steps, update the probabilities; drop what came to 1, and after the last update the next ones."""
        count, rest = divmod(self.updates, int(self.numbers["every_n_steps"]))
        if rest or not bool(self.left.any()):
            return
        scores = self.slices.scores()
        self.check_finite(scores)
        self.ranks += self.slices.ranks(scores.masked_fill(self.gone, -1.0))
        place = self.slices.ranks(self.gone, scores if self.official else self.ranks)
        missing, live = (counts[self.slices.cell] for counts in (self.left, self.slices.size - self.quota + self.left))
        self.values = grown(self.values, place, missing, live, self.numbers["strength"], None if self.official else 1.0)
        gone = self.likely() if count >= self.numbers["max_updates"] else self.values == 1
        if not torch.equal(gone, self.gone):
            self.values = self.values.masked_fill(gone, 1.0)
            self.drop(gone)
        self._note_chances()

    def rounds(self) -> int:
        """Return how many times probabilities were updated."""
        return super().rounds() // int(self.numbers.get("every_n_steps", 1))

    def likely(self) -> Tensor:
        """Return which units will leave as it stands, ``[units]``, boolean."""
        return self.gone | self.lowest(-self.values, self.slices.scores())

    # Draws ----------------------------------------------------------------------------------------------------------------------

    def _note_chances(self) -> None:
        """Note name, units and probabilities of every group with something to draw."""
        p = self.values.masked_fill(self.gone, 0).cpu().numpy()
        groups = self.removal.groups(self._found)
        self._chances = [(group.name, group.units, p[group.units]) for group in groups if p[group.units].any()]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Stand ready to draw.

        Raises:
            BudgetError: If the budget cannot be met.
            TrainerError: If the Trainer plans too few steps.
            CheckpointError: If the checkpoint was written for other units.
        """
        super().on_train_start(trainer, pl_module)
        if hasattr(self, "slices"):
            self._absence = Absence(pl_module, self._found)
            self._note_chances()

    def on_step_begin(self, trainer: Any, module: Any) -> None:
        """Draw which units are absent; the same for all batches of an optimizer step."""
        super().on_step_begin(trainer, module)
        if self._absence is not None and self._chances:
            away = np.zeros(self.slices.count, bool)
            for name, units, p in self._chances:
                away[units] = absent(p, self.seed, name, self.steps)
            self._absence.begin(away)

    def on_gradients(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Give absent units no gradient."""
        if self._absence is not None:
            self._absence.on_gradients(optimizer)

    def on_stepped(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Put back what was absent, before anything looks at the weights."""
        if self._absence is not None:
            self._absence.end(optimizer)
        super().on_stepped(trainer, module, optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Put back what was absent where no step came: between accumulated batches, or where a gradient scaler skipped it."""
        self._put_back()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Put back what was absent if the module has skipped the rest of the epoch."""
        self._put_back()
        super().on_train_epoch_end(trainer, pl_module)

    def _put_back(self) -> None:
        if self._absence is not None:
            self._absence.end()

    def release(self) -> None:
        """Put back what is absent if something went wrong in a step, and let go of the model."""
        self._put_back()
        self._absence, self._chances = None, []
        super().release()

    # State ----------------------------------------------------------------------------------------------------------------------

    def growth_state(self) -> dict[str, Any]:
        """Return what a resume needs of a growth under way: also the sums of ranks."""
        return super().growth_state() | {"ranks": self.ranks}

    def take_up(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`growth_state` returned."""
        super().take_up(state)
        self.ranks = state["ranks"]
