"""Agreement between ranks: rank 0 decides, the others are told, and every rank checks that it has what rank 0 has."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_prune import errors
from lightning_prune.errors import LightningPruneError, TrainerError
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.plan import Plan


def agree(trainer: Any, decide: Callable[[], Plan]) -> Plan:
    """Decide on rank 0 and tell the other ranks; an error there is raised on every rank.

    Args:
        trainer: The Trainer, its process group alive where there are several ranks.
        decide: Returns the plan; called on rank 0 only.

    Raises:
        LightningPruneError: What ``decide`` raised.
    """
    if trainer.world_size == 1:
        return decide()
    answer: tuple[str, str] | None = None
    if trainer.is_global_zero:
        try:
            answer = ("", decide().to_json())
        except LightningPruneError as error:
            answer = (type(error).__name__, str(error))
    kind, text = trainer.strategy.broadcast(answer, src=0)
    if kind:
        raise getattr(errors, kind)(text)
    return Plan.from_json(text)


def check_alike(trainer: Any, module: nn.Module, options: Sequence[str] = ()) -> None:
    """Check that every rank holds the same plan, the same shapes and the same options.

    Args:
        trainer: The Trainer, its process group alive where there are several ranks.
        module: The model.
        options: What else must be alike, as text.

    Raises:
        TrainerError: On every rank, if one differs.
    """
    if trainer.world_size == 1:
        return
    tensors = [*module.named_parameters(), *module.named_buffers()]
    structure = plan_of(module).digest + repr([(name, tuple(t.shape), t.dtype) for name, t in tensors])
    for what, text, remedy in (
        ("structure", structure, "Every rank must construct the same model."),
        (
            "set of compressing callbacks or options",
            repr(list(options)),
            "Configure the callbacks alike on every rank.",
        ),
    ):
        digest = hashlib.sha256(text.encode()).digest()
        mine = torch.tensor(list(digest), dtype=torch.int64, device=trainer.strategy.root_device)
        everyone = trainer.strategy.all_gather(mine)
        wrong = [rank for rank, row in enumerate(everyone) if not torch.equal(row, everyone[0])]
        if wrong:
            raise TrainerError(f"Rank {wrong[0]} holds another {what} than rank 0. {remedy}")


def spread(module: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0."""
    for tensor in [*module.parameters(), *module.buffers()]:
        torch.distributed.broadcast(tensor.data, src=0)
