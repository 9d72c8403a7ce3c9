"""The one moment of a fit when shapes may change, and the undoing of what we put on Trainer and module to get there.

Lightning fires no hook between the restore of a checkpoint and the creation of optimizers and wrappers. A :class:`Window` stands on the
instance attribute ``trainer.strategy.setup``, which is called just there; it removes itself, lets every compressing callback act in the
order of the callback list, and calls the original. A :class:`Restore` stands on ``pl_module.on_load_checkpoint``, the last hook before weights
are loaded, and gives the module the structure of the checkpoint. Both are instance attributes, taken away when they have fired and
at the latest in ``teardown``.
"""

import logging
import types
from typing import Any, Protocol

from lightning_prune.callback.ranks import check_alike, spread
from lightning_prune.checkpoint import rebuild
from lightning_prune.structure.carrier import plan_in, plan_of

log = logging.getLogger(__name__)


class Actor(Protocol):
    """What a compressing callback does in the window."""

    def identity(self) -> str:
        """Return method and options as text."""

    def stake(self, trainer: Any, module: Any) -> None:
        """Claim layers, before any callback has changed one; raise if another has claimed the same."""

    def act(self, trainer: Any, module: Any) -> bool:
        """Change the module; return whether its parameters are others now."""


class Window:
    """Runs the compressing callbacks of a Trainer between restore and ``strategy.setup``.

    Args:
        trainer: The Trainer whose strategy is about to be set up.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.callbacks: list[Actor] = []
        self._original = trainer.strategy.setup
        trainer.strategy.setup = self

    @classmethod
    def join(cls, trainer: Any, callback: Actor) -> None:
        """Have ``callback`` act in the window."""
        window = trainer.strategy.__dict__.get("setup")
        if not isinstance(window, cls):
            window = cls(trainer)
        window.callbacks.append(callback)

    @staticmethod
    def close(trainer: Any) -> None:
        """Take the window away if it never opened."""
        if isinstance(trainer.strategy.__dict__.get("setup"), Window):
            del trainer.strategy.__dict__["setup"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Act, then do what ``strategy.setup`` does."""
        self.close(self.trainer)
        trainer, module = self.trainer, self.trainer.lightning_module
        module.to(trainer.strategy.root_device)
        if trainer.world_size > 1:
            check_alike(trainer, module, [callback.identity() for callback in self.callbacks])
            spread(module)
        trainer.fit_loop.setup_data()
        for callback in self.callbacks:
            callback.stake(trainer, module)
        changed = [callback.act(trainer, module) for callback in self.callbacks]
        if any(changed):
            refresh_averages(trainer, module)
        return self._original(*args, **kwargs)


class Restore:
    """Gives a module the structure of a checkpoint, just before its weights are loaded.

    Args:
        trainer: The Trainer that loads.
        module: Its LightningModule.
    """

    def __init__(self, trainer: Any, module: Any) -> None:
        self.trainer = trainer
        self.module = module
        self._original = module.on_load_checkpoint

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Give a copy of the module its own hook back: averaging callbacks copy the module while we stand ready."""
        module = memo.get(id(self.module))
        return self._original if module is None else types.MethodType(type(module).on_load_checkpoint, module)

    @classmethod
    def arm(cls, trainer: Any, module: Any) -> None:
        """Stand ready on ``module``, once however many callbacks ask."""
        if not isinstance(module.__dict__.get("on_load_checkpoint"), cls):
            module.__dict__["on_load_checkpoint"] = cls(trainer, module)

    @staticmethod
    def disarm(module: Any) -> None:
        """Take it away."""
        if isinstance(module.__dict__.get("on_load_checkpoint"), Restore):
            del module.__dict__["on_load_checkpoint"]

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Do what the module's own hook does, then build the structure of the checkpoint."""
        self.disarm(self.module)
        self._original(checkpoint)
        before = plan_of(self.module)
        wanted = plan_in(checkpoint["state_dict"])
        rebuild(self.module, wanted)
        if before and not wanted:
            log.warning(
                "This checkpoint was saved before the model was made smaller: %d compressed modules are dense again. "
                "`trainer.save_checkpoint` after the fit writes the compact model.",
                len(before),
            )
        if self.trainer.state.fn == "fit" and plan_of(self.module) != before:
            refresh_averages(self.trainer, self.module)


def refresh_averages(trainer: Any, module: Any) -> None:
    """Let weight-averaging callbacks copy the module again, now that its structure is another."""
    for callback in trainer.callbacks:
        names = {kind.__name__ for kind in type(callback).__mro__}
        if names & {"WeightAveraging", "StochasticWeightAveraging"}:
            callback.setup(trainer, module, "fit")
