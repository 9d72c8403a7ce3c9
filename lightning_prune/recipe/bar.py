"""A progress bar over the cells of a comparison, with stage and epoch of the cell that runs."""

import contextlib
import logging
import sys
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_prune._lightning import Callback
from lightning_prune.recipe.before import running_stage

_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


class Bar:
    """Shows how many cells are finished; while it stands, our log lines appear above it.

    Args:
        total: Number of cells.
        show: Whether to show anything.
    """

    def __init__(self, total: int, show: bool) -> None:
        self._show = show
        self._bars = Progress(*_COLUMNS, console=Console(stderr=True), disable=not show, transient=True)
        self._task = self._bars.add_task("", total=total)
        self._cell = ""
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._bars)
        if self._show:
            for handler in logging.getLogger("lightning_prune").handlers:
                if isinstance(handler, logging.StreamHandler):
                    before = handler.setStream(sys.stderr)  # the bar has put its own stream there
                    self._stack.callback(handler.setStream, before or handler.stream)
        return self

    def __exit__(self, *reason: object) -> None:
        self._stack.close()

    def begin(self, cell: str) -> None:
        """Name the cell that runs now."""
        self._cell = cell
        self._bars.update(self._task, description=escape(cell))

    def tell(self, text: str) -> None:
        """Say what the cell is at."""
        self._bars.update(self._task, description=escape(f"{self._cell}: {text}"))

    def advance(self) -> None:
        """Count a finished cell."""
        self._bars.advance(self._task)

    def callback(self) -> "Pulse":
        """Return a callback that tells the epochs of a fit."""
        return Pulse(self)


class Pulse(Callback):
    """Tells stage and epoch.

    Args:
        bar: Where to.
    """

    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self._bar = bar

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell which epoch begins."""
        last = f" of {trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        self._bar.tell(f"stage {running_stage(trainer)}, epoch {trainer.current_epoch + 1}{last}")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell that the stage is done; export and validation have their turn after the last one."""
        self._bar.tell(f"stage {running_stage(trainer)} done")
