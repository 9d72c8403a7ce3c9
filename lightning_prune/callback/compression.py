"""The base callback: drives a method through a fit.

A method either acts *at the start*, in the window before optimizers exist, or *gradually*: it works on the dense shapes while training
(masks, penalties, projections), and the model gets smaller when the fit has ended. Either way the method answers two questions, and this class
does the rest:

- :meth:`Compression.score` looks at model and data; every rank answers, so it may reduce over ranks.
- :meth:`Compression.decide` turns scores into a plan; rank 0 answers, the others are told.
"""

import inspect
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_prune._lightning import Callback
from lightning_prune.callback import loggers
from lightning_prune.callback.checks import (
    check_claims,
    check_compiled,
    check_integer,
    check_optimizers,
    check_strategy,
    nothing_to_change,
)
from lightning_prune.callback.exhibit import Exhibit
from lightning_prune.callback.ranks import agree, check_alike
from lightning_prune.callback.resume import keep_rates, random_state, rates_of, set_random_state
from lightning_prune.callback.task import Task
from lightning_prune.callback.window import Restore, Window, refresh_averages
from lightning_prune.errors import CheckpointError
from lightning_prune.probe import Probe
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.masks import Masks
from lightning_prune.structure.plan import Origin, Plan, Stage
from lightning_prune.structure.select import Pattern
from lightning_prune.structure.surgery import compact_

log = logging.getLogger(__name__)


class Compression(Callback):
    """Base of every method.

    Args:
        include: Layers to compress: names, globs or module types; None takes all that can be.
        exclude: Layers to leave alone, likewise.
        start_epoch: First epoch in which a gradual method acts.
        until_epoch: Epoch at whose start a gradual schedule has reached its target; None means at once.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from after shapes have changed; 0 leaves them.

    Attributes:
        gradual: Whether the method acts while training and the model gets smaller after the fit.
        plan: What this callback did; empty until it has.
    """

    gradual: bool = False

    def __init__(
        self,
        *,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] | None = None,
        start_epoch: int = 0,
        until_epoch: int | None = None,
        recalibrate_bn: int = 8,
    ) -> None:
        super().__init__()
        self.include, self.exclude = include, exclude
        self.start_epoch, self.until_epoch = start_epoch, until_epoch
        self.recalibrate_bn = recalibrate_bn
        check_integer(self, "start_epoch", 0)
        check_integer(self, "recalibrate_bn", 0)
        if until_epoch is not None:
            check_integer(self, "until_epoch", start_epoch)
        self.plan = Plan()
        Compression.reset(self)

    def reset(self) -> None:
        """Forget the fit before this one; ``plan`` stays."""
        self.steps = 0
        self._position = 0.0  # epochs trained so far, by batches
        self._acted = False
        self._origin: Origin | None = None
        self._claimed: frozenset[str] = frozenset()
        self._done = False
        self._random: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None
        self._rates: list[dict[str, Any]] = []
        self._schedulers: list[dict[str, Any]] = []
        self._handles: list[Any] = []
        self._created: list[nn.Parameter] = []
        self._result: Task | None = None

    # What a method answers ------------------------------------------------------------------------------------------------------

    def claim(self, model: nn.Module) -> set[str]:
        """Return the names of the layers that this method may change; two callbacks may not claim the same one."""
        raise NotImplementedError

    def score(self, task: Task) -> Any:
        """Look at model and data; called on every rank. The result goes to :meth:`decide`."""

    def decide(self, task: Task, scores: Any) -> Plan:
        """Return the steps to take and the layers left alone with their reasons. An empty plan means that nothing is left to do."""
        raise NotImplementedError

    def met(self, task: Task) -> str | None:
        """Return why the target is already met, in words, or None."""
        stage = self.stage()
        return f"the plan already holds {stage.method} with the same options" if stage in task.plan.stages else None

    def rehearse(self, task: Task) -> None:
        """Raise what can be known before training: patterns that match nothing, budgets that cannot be met."""
        self.claim(task.model)

    def begin(self, task: Task) -> None:
        """Prepare a gradual method, in the window; also on resume."""

    def on_step_begin(self, trainer: Any, module: Any) -> None:
        """Act on the weights before the first batch of an optimizer step; ``self.steps`` steps have been taken."""

    def on_gradients(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Act on unscaled gradients before they are clipped and ``optimizer`` steps."""

    def on_stepped(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Act on the weights after ``optimizer`` has stepped; a step that a gradient scaler skipped does not count."""

    def facts(self, module: nn.Module) -> dict[str, float]:
        """Return scalars to log under ``compression/`` during a gradual fit."""
        return {}

    def exhibits(self) -> Sequence[Exhibit]:
        """Return what there is to show of the fit that has ended."""
        return ()

    # Identity and state ---------------------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments in JSON types."""
        values = {
            name: getattr(self, name) for name in inspect.signature(type(self).__init__).parameters if name != "self"
        }
        return json.loads(json.dumps(values, default=lambda value: getattr(value, "__name__", None) or repr(value)))  # type: ignore[no-any-return]

    def stage(self) -> Stage:
        """Return the entry of this callback in a plan: which method, with which options."""
        return Stage(type(self).__name__, self.options())

    def identity(self) -> str:
        """Return method and options as text; ranks compare it."""
        return f"{type(self).__name__}{json.dumps(self.options())}"

    @property
    def state_key(self) -> str:
        """Distinguishes two callbacks of one kind on different layers."""
        options = self.options()
        return f"{type(self).__qualname__}{json.dumps({key: options[key] for key in ('include', 'exclude') if key in options})}"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs: options, steps taken, the plan so far, the state of the random generators."""
        return {
            "options": json.dumps(self.options()),
            "steps": self.steps,
            "position": self._position,
            "acted": self._acted,
            "done": self._done,
            "plan": Plan(self.plan.steps, self.plan.left_alone, self._origin, self.plan.stages).to_json(),
            "random": random_state(),
            "rates": self._rates if self._done else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint.

        Raises:
            CheckpointError: If this callback was configured otherwise when the checkpoint was written.
        """
        before, now = json.loads(state["options"]), self.options()
        changed = [key for key in now if before.get(key) != now[key]]
        if changed and not state["done"]:
            raise CheckpointError(
                f"The checkpoint was written in the middle of {type(self).__name__}({changed[0]}={before.get(changed[0])!r}); this callback has "
                f"{changed[0]}={now[changed[0]]!r}. Resume with the same options, or start from the weights without ckpt_path."
            )
        plan = Plan.from_json(state["plan"])
        self.plan, self._origin = plan, plan.origin
        self._position, self._acted = float(state["position"]), bool(state["acted"])
        self.steps, self._done, self._random = int(state["steps"]), bool(state["done"]), state["random"]
        self._rates = list(state["rates"])

    # The fit --------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stand ready for a checkpoint and, in a fit, for the window.

        Raises:
            TrainerError: If the strategy cannot follow a change of structure, or the module is compiled.
        """
        Restore.arm(trainer, pl_module)
        if stage == "fit":
            check_strategy(trainer)
            check_compiled(pl_module)
            self.reset()
            Window.join(trainer, self)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the state of the schedulers of a gradual fit that has ended; the optimizers' would not fit the compact model."""
        if self._schedulers and not checkpoint.get("lr_schedulers"):
            checkpoint["lr_schedulers"] = self._schedulers

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Remember the checkpoint until the window: if shapes change there, its optimizer states are dropped."""
        self._resumed = checkpoint

    def stake(self, trainer: Any, module: Any) -> None:
        """Claim layers for this fit.

        Raises:
            TrainerError: If a callback before this one has claimed the same layer.
        """
        self._claimed = frozenset(self.claim(module))
        others = trainer.callbacks[: trainer.callbacks.index(self)]
        before = {name: cb for cb in others if isinstance(cb, Compression) for name in cb._claimed}
        check_claims(self, self._claimed, before)

    def act(self, trainer: Any, module: Any) -> bool:
        """Compress in the window, or prepare to do so gradually; return whether the structure changed."""
        Restore.disarm(module)
        resumed, self._resumed = self._resumed, None
        task = Task.of(module, Probe.of_trainer(trainer, module))
        self._origin = self._origin or task.origin
        reason = self.met(task)
        if reason is not None:
            log.info("%s: nothing to do, %s. This fit fine-tunes.", type(self).__name__, reason)
            self._done, self._result = True, task
            if not self.plan or any(step not in task.plan.steps for step in self.plan.steps):
                self.plan = task.plan
            return False
        self._done = False
        if self.gradual:
            self.begin(task)
            return False
        before = {p: p.shape for p in module.parameters()}
        self._shrink(trainer, module, task)
        self._created = [p for p in module.parameters() if p not in before]
        changed = any(before.get(p) != p.shape for p in module.parameters())
        if resumed is not None and changed and resumed.get("optimizer_states"):
            log.warning(
                "%s: the optimizer states of the checkpoint belong to the dense model and are dropped; learning rates are kept.",
                type(self).__name__,
            )
            self._rates, resumed["optimizer_states"] = resumed["optimizer_states"], []
        return True

    def _shrink(self, trainer: Any, module: Any, task: Task) -> None:
        """Decide, change the model, prove it, recalibrate, and tell."""
        scores = self.score(task)
        plan = agree(trainer, lambda: self.decided(task, scores))
        compact_(module, plan, task.calls)
        check_alike(trainer, module)
        if any(step.action != "mask" or step.once for step in plan.steps):
            task.probe.recalibrate(self._batches_for_norms(), task.calls)
        self.plan, self._done = plan.settled(), True
        self._result = Task.of(module, task.probe, task.calls)

    def _batches_for_norms(self) -> int:
        return self.recalibrate_bn

    def decided(self, task: Task, scores: Any) -> Plan:
        """Return the plan with its origin and stage.

        Raises:
            ModelError: If the plan is empty.
        """
        plan = self.decide(task, scores)
        if not plan.steps:
            raise nothing_to_change(type(self).__name__, plan.left_alone)
        stage = self.stage()
        if task.progress < 1:
            stage = Stage(stage.method, {**stage.options, "progress": task.progress})
        return Plan(plan.steps, plan.left_alone, task.origin, (stage,))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the optimizers, let masks hold from now on, log where we start.

        Raises:
            TrainerError: If an optimizer holds parameters that are not in the model, or lacks those that compression created.
        """
        check_optimizers(trainer, pl_module, type(self).__name__, self._created)
        keep_rates(trainer.optimizers, self._rates)
        self._rates = []
        masks = Masks(pl_module, plan_of(pl_module))
        masks.apply_()  # they may have trained without a callback that holds them
        owners = self._owners(trainer, pl_module)

        def stepped(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            if optimizer is owners[0]:
                self.steps += 1
            masks.apply_(optimizer)
            if optimizer in owners:
                self.on_stepped(trainer, pl_module, optimizer)

        self._handles = [optimizer.register_step_post_hook(stepped) for optimizer in trainer.optimizers]
        if self._result is not None:
            loggers.tell_scalars(trainer, loggers.cost_facts(self._result))

    def _owners(self, trainer: Any, module: Any) -> list[torch.optim.Optimizer]:
        """Return the optimizers that hold claimed parameters; all of them where none does."""
        claimed = {p for name in self._claimed for p in _parameters(module, name)} | set(self._created)
        holds = [o for o in trainer.optimizers if any(p in claimed for g in o.param_groups for p in g["params"])]
        return holds or list(trainer.optimizers)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the random generators back where the checkpoint left them."""
        if self._random is not None:
            set_random_state(self._random)
            self._random = None
            if trainer.fit_loop.is_resuming or trainer.fit_loop.epoch_loop.restarting:
                iter(
                    trainer.fit_loop._data_fetcher
                )  # draws the seeds of loaders; Lightning does so in every epoch but a resumed one

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Let a gradual method act on the weights before an optimizer step begins."""
        self._position = _position(trainer, batch_idx)
        if self._acts(trainer):
            self._acted = True
            self.on_step_begin(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note how far the fit has come."""
        self._position = _position(trainer, batch_idx + 1)

    def _acts(self, trainer: Any) -> bool:
        return self.gradual and not self._done and trainer.current_epoch >= self.start_epoch

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Let a gradual method act on the gradients."""
        if self._acts(trainer):
            self.on_gradients(trainer, pl_module, optimizer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log how far a gradual method has come."""
        if self.gradual and not self._done:
            loggers.tell_scalars(trainer, self.facts(pl_module))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Shrink what was compressed gradually; drop optimizer states that no longer fit."""
        if self.gradual and not self._done:
            self._close(trainer, pl_module)
        if self._result is not None:
            loggers.tell_scalars(trainer, loggers.cost_facts(self._result) | loggers.layer_facts(self.plan))
            loggers.tell_table(trainer, self.plan, loggers.describe(self, self._result))
        self._release(trainer, pl_module)

    def _close(self, trainer: Any, pl_module: Any) -> None:
        """Shrink after a gradual fit."""
        if not self._acted:
            log.warning(
                "%s: the fit ended without a step from start_epoch=%d on; nothing was compressed, the model is as dense as before.",
                type(self).__name__,
                self.start_epoch,
            )
            return
        device = next(pl_module.parameters()).device
        pl_module.to(trainer.strategy.root_device)
        task = Task.of(pl_module, Probe.of_trainer(trainer, pl_module), progress=self.progress())
        reason = self.met(task)
        if reason is not None:
            log.info("%s: nothing to do, %s.", type(self).__name__, reason)
            pl_module.to(device)
            return
        self._shrink(trainer, pl_module, task)
        refresh_averages(trainer, pl_module)
        if task.progress < 1 and self._result is not None:
            log.warning(
                "%s: the fit ended before %s, at %.0f %% of the schedule. Asked for %s; %s.",
                type(self).__name__,
                self._end(),
                100 * task.progress,
                self._asked(),
                loggers.describe(self, self._result),
            )
        pl_module.to(device)
        self._rates = rates_of(trainer.optimizers)
        self._schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        trainer.strategy.optimizers = []
        trainer.strategy.lr_scheduler_configs = []
        loggers.warn_of_early_checkpoints(trainer)

    def _end(self) -> str:
        return f"until_epoch={self.until_epoch}"

    def _asked(self) -> str:
        bounds = {name: getattr(self, name, None) for name in ("flops", "params", "sparsity")}
        return ", ".join(f"{name}={value}" for name, value in bounds.items() if value is not None) or "its target"

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave nothing on Trainer and module."""
        self._release(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave nothing on Trainer and module; after Ctrl-C the model stays as it is."""
        self._release(trainer, pl_module)
        if isinstance(exception, KeyboardInterrupt) and self.gradual and not self._done and self.steps:
            log.warning("%s: interrupted; the model keeps its dense shapes. Fit again to go on.", type(self).__name__)

    def _release(self, trainer: Any, module: Any) -> None:
        Window.close(trainer)
        Restore.disarm(module)
        for handle in self._handles:
            handle.remove()
        self._handles, self._created, self._resumed = [], [], None
        self.release()

    def release(self) -> None:
        """Let go of modules and tensors of the fit that has ended."""
        self._result = None

    def progress(self) -> float:
        """Return how far the schedule has come: 0 at ``start_epoch``, 1 from ``until_epoch`` on, by batches in between."""
        if self.until_epoch is None or self.until_epoch <= self.start_epoch:
            return 1.0
        return min(1.0, max(0.0, (self._position - self.start_epoch) / (self.until_epoch - self.start_epoch)))


def _position(trainer: Any, batches: int) -> float:
    """Return how many epochs have been trained when ``batches`` of the current one have."""
    total = trainer.num_training_batches
    return float(trainer.current_epoch) + (batches / total if isinstance(total, int) and total else 0.0)


def _parameters(module: nn.Module, name: str) -> list[nn.Parameter]:
    try:
        return list(module.get_submodule(name).parameters())
    except AttributeError:
        return []
