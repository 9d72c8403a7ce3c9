"""Weight decay on layers that are products of cores: one ``n``-th on each of ``n``, so that the product shrinks as a dense weight would.

What SGD, Adam and others add to the gradient is lessened there, before clipping, which takes its part of that; where decay is a factor of its own
(AdamW), the cores are grown back after the step, which scales the step itself by less than the learning rate times the decay. How other optimizers
than torch's own decay is not known; they are left alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lightning_prune.structure.mpo import MPO

_COUPLED = tuple(
    getattr(torch.optim, name)
    for name in ("SGD", "ASGD", "Adadelta", "Adagrad", "RMSprop", "Adam", "Adamax", "NAdam", "RAdam")
)
_DECOUPLED = (torch.optim.AdamW, torch.optim.Adafactor, torch.optim.Muon)  # and those whose groups say so


class CoreDecay:
    """Balances the decay of all cores of a model.

    Args:
        model: The model, its layers being what they stay.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [[core for core in m.cores if core.requires_grad] for m in model.modules() if isinstance(m, MPO)]
        self._counts = {core: len(cores) for cores in layers for core in cores}

    def is_clipped(self, optimizer: torch.optim.Optimizer) -> bool:
        """Tell whether clipping gradients would clip what :meth:`lessen` does."""
        return any(not _is_decoupled(optimizer, group) for _, _, group in self._decayed(optimizer))

    @torch.no_grad()
    def lessen(self, optimizer: torch.optim.Optimizer) -> None:
        """Take from the gradients what an optimizer will add to them beyond one ``n``-th."""
        for core, count, group in self._decayed(optimizer):
            if core.grad is not None and not _is_decoupled(optimizer, group):
                surplus = (1 - 1 / count) * group["weight_decay"]
                core.grad.sub_(core.detach(), alpha=-surplus if group.get("maximize") else surplus)

    @torch.no_grad()
    def give_back(self, optimizer: torch.optim.Optimizer) -> None:
        """Grow cores by what decay of its own has taken from them beyond one ``n``-th, after a step."""
        for core, count, group in self._decayed(optimizer):
            if core.grad is not None and _is_decoupled(optimizer, group):
                decay = float(group["lr"]) * group["weight_decay"]
                if decay < 1:  # else nothing is left to grow
                    core.mul_((1 - decay / count) / (1 - decay))

    def _decayed(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, int, dict[str, Any]]]:
        """Yield the cores that an optimizer decays, how many of their layer train, and their group."""
        known = self._counts and isinstance(optimizer, _COUPLED + _DECOUPLED)
        for group in optimizer.param_groups if known else ():
            if group.get("weight_decay"):
                yield from ((p, self._counts[p], group) for p in group["params"] if p in self._counts)


def _is_decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay")) or isinstance(optimizer, _DECOUPLED)
