"""Base of the methods that mask: at the start of a fit, or step by step while it trains, until what is masked leaves.

What can leave, channels or single weights, is the matter of a :class:`Removal`; when it leaves, of :class:`Masking`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import nn

from lightning_prune.callback.checks import check_choice, check_integer
from lightning_prune.callback.compression import Compression
from lightning_prune.callback.ranks import agree
from lightning_prune.callback.task import Task
from lightning_prune.errors import OptionError
from lightning_prune.structure.masks import Masks
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.select import Pattern
from lightning_prune.structure.steps import Step

Schedule = Literal["cubic", "linear"]


class Removal(Protocol):
    """What can leave a model, and how one chooses: channels or single weights.

    ``found`` is what :meth:`look` returns, ``scores`` what :meth:`score` returns; nobody else looks inside. ``pending`` are the steps that
    are decided but not taken: what they remove is masked.
    """

    def claim(self, model: nn.Module) -> set[str]:
        """Return the names of the layers that may change."""

    def met(self, task: Task) -> str | None:
        """Return why the target is already met, in words, or None."""

    def look(self, task: Task) -> Any:
        """Find what can leave."""

    def fits(self, found: Any, model: nn.Module) -> bool:
        """Tell whether ``found`` still describes the model."""

    def check(self, task: Task, found: Any) -> None:
        """Raise if the target cannot be met, or nothing can leave."""

    def score(self, task: Task, found: Any, pending: Sequence[Step], share: float | None) -> Any:
        """Look at model and data; called on every rank.

        Args:
            task: The model, ``pending`` masked in it.
            found: What can leave.
            pending: What is masked.
            share: How much of the way to the target shall have been gone, in (0, 1]; None: nothing more will leave.
        """

    def steps(self, task: Task, scores: Any, share: float | None) -> tuple[Step, ...]:
        """Return the steps that remove what has to leave, what is masked included; called on rank 0."""

    def plan(self, task: Task, scores: Any, steps: tuple[Step, ...]) -> Plan:
        """Return the steps to take now, and the layers left alone with their reasons; called on rank 0."""

    def facts(self, task: Task, found: Any, pending: Sequence[Step]) -> dict[str, float]:
        """Return what to log while ``pending`` is masked."""


class Masking(Compression):
    """Remove at the start of a fit, or gradually: mask step by step, and shrink when the fit has ended.

    Args:
        include: Layers to take: names, globs or module types; None takes all that can be.
        exclude: Layers to leave alone, likewise.
        start_epoch: First epoch in which a gradual run masks.
        until_epoch: Epoch at whose start a gradual run has reached its target; None removes at the start of the fit.
        every_n_epochs: Epochs between the steps of a gradual run.
        schedule: How the target is approached: ``"cubic"`` (fast first; Zhu and Gupta 2017, arXiv:1710.01878) or ``"linear"``.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Attributes:
        removal: What leaves. Subclasses set it in their constructors.
    """

    removal: Removal

    def __init__(
        self,
        *,
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
            recalibrate_bn=recalibrate_bn,
        )
        self.every_n_epochs, self.schedule = every_n_epochs, schedule
        self.gradual = until_epoch is not None
        check_integer(self, "every_n_epochs", 1)
        check_choice(self, "schedule", ("cubic", "linear"))
        if until_epoch is None and start_epoch:
            raise OptionError(
                f"{type(self).__name__}(start_epoch={start_epoch}): until_epoch is missing; without it the model changes at once."
            )
        Masking.reset(self)

    def reset(self) -> None:
        """Forget the fit before this one; ``plan`` stays."""
        super().reset()
        self._pending = Plan()
        self._reached = 0.0
        self._masks: Masks | None = None
        self._task: Task | None = None
        self._found: Any = None

    # The plan -------------------------------------------------------------------------------------------------------------------

    def claim(self, model: nn.Module) -> set[str]:
        """Return the names of the layers that may change."""
        return self.removal.claim(model)

    def met(self, task: Task) -> str | None:
        """Return why the target is already met, in words, or None; what has been masked leaves in any case."""
        if self._pending:
            return None
        return super().met(task) or self.removal.met(task)

    def rehearse(self, task: Task) -> None:
        """Check patterns and target on the model as it stands.

        Raises:
            OptionError: If a pattern matches no layer.
            BudgetError: If the target cannot be met.
            ModelError: If nothing can leave; says why for every layer.
        """
        if self.met(task) is None:
            self.removal.check(task, self.removal.look(task))

    def score(self, task: Task) -> Any:
        """Score what can leave; at the end of a gradual run only tell what is masked."""
        found = self._found
        if found is None or not self.removal.fits(found, task.model):
            found = self.removal.look(task)
        return self.removal.score(task, found, self._pending.steps, None if self._pending else 1.0)

    def decide(self, task: Task, scores: Any) -> Plan:
        """Choose what leaves; after a gradual run, what is masked.

        Raises:
            BudgetError: If the target cannot be met.
        """
        return self.removal.plan(task, scores, self.removal.steps(task, scores, None if self._pending else 1.0))

    # Gradually ------------------------------------------------------------------------------------------------------------------

    def begin(self, task: Task) -> None:
        """Find what can leave and see that the target can be met; on resume, hold again what had been masked."""
        self._task, self._found = task, self.removal.look(task)
        if self._pending:
            self._masks = Masks.pending(
                task.model, self._pending.steps
            )  # the weights of a checkpoint are held already, to the bit
        else:
            self.removal.check(task, self._found)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Look again if a callback after this one has changed the model."""
        super().on_fit_start(trainer, pl_module)
        if self._task is not None and not self.removal.fits(self._found, pl_module):
            self.begin(Task.of(pl_module, self._task.probe, self._task.calls))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Mask more where the schedule says so."""
        super().on_train_epoch_start(trainer, pl_module)
        due = self.due(trainer.current_epoch)
        if not self._acts(trainer) or self._task is None or due <= self._reached:
            return
        task, share = self._task, due if self.schedule == "linear" else 1 - (1 - due) ** 3
        scores = self.removal.score(task, self._found, self._pending.steps, share)
        chosen = agree(trainer, lambda: Plan(self.removal.steps(task, scores, share), {}, task.origin))
        for step in chosen.steps:
            if step.once:
                step.emulate(pl_module)
        steps = tuple(step.settled() if step.once else step for step in chosen.steps)
        self._pending, self._reached = dataclasses.replace(chosen, steps=steps), due
        self._hold(pl_module)

    def due(self, epoch: int) -> float:
        """Return how far the schedule has come in ``epoch``: equal steps from ``start_epoch`` on, the last one before ``until_epoch``."""
        if self.until_epoch is None or epoch >= self.until_epoch:
            return 1.0
        steps = -(-(self.until_epoch - self.start_epoch) // self.every_n_epochs)
        return max(0.0, ((epoch - self.start_epoch) // self.every_n_epochs + 1) / steps)

    def progress(self) -> float:
        """Return how far the schedule has come: the share of its steps that have been taken."""
        return self._reached if self.gradual else 1.0

    def _hold(self, module: nn.Module) -> None:
        """Hold what the steps so far will remove at zero from now on."""
        self._masks = Masks.pending(module, self._pending.steps)
        self._masks.apply_()

    def _owners(self, trainer: Any, module: Any) -> list[torch.optim.Optimizer]:
        """Return all optimizers, those that hold weights first: scales and shifts of normalization may be with another one."""
        own = super()._owners(trainer, module)
        return own + [optimizer for optimizer in trainer.optimizers if optimizer not in own]

    def on_stepped(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Hold what is masked, and what the optimizer keeps for it, at zero."""
        if self._masks is not None:
            self._masks.apply_(optimizer)

    def _shrink(self, trainer: Any, module: Any, task: Task) -> None:
        super()._shrink(trainer, module, task)
        self._pending, self._masks = Plan(), None

    def facts(self, module: nn.Module) -> dict[str, float]:
        """Return how much is masked."""
        return {} if self._task is None else self.removal.facts(self._task, self._found, self._pending.steps)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs; also what has been masked so far."""
        return super().state_dict() | {"pending": self._pending.to_json(), "reached": self._reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint.

        Raises:
            CheckpointError: If this callback was configured otherwise when the checkpoint was written.
        """
        super().load_state_dict(state)
        if not self._done:
            self._pending, self._reached = Plan.from_json(state["pending"]), float(state["reached"])

    def release(self) -> None:
        """Let go of the model."""
        super().release()
        self._masks, self._task, self._found = None, None, None
