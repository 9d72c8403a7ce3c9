"""What loggers and the screen are told: the same facts, whatever the logger."""

import csv
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lightning_prune.callback.task import Task
from lightning_prune.files import write_text
from lightning_prune.structure.plan import Plan

if TYPE_CHECKING:
    from lightning_prune.callback.compression import Compression

log = logging.getLogger(__name__)


def tell_scalars(trainer: Any, facts: Mapping[str, float]) -> None:
    """Log scalars under ``compression/`` to every logger of the Trainer, on rank 0."""
    if facts and trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"compression/{name}": value for name, value in facts.items()}, step=trainer.global_step
            )


def cost_facts(task: Task) -> dict[str, float]:
    """Return multiply-adds and parameters of a model, in all and as share of the dense one."""
    return {
        "flops": task.cost.total,
        "params": task.params,
        "flops_share": task.cost.total / max(1, task.origin.flops),
        "params_share": task.params / max(1, task.origin.params),
    }


def layer_facts(plan: Plan) -> dict[str, float]:
    """Return per changed layer the share kept and what else its step says."""
    facts: dict[str, float] = {}
    for step in plan.steps:
        facts[f"kept/{step.module}"] = step.summary()["kept"]
        facts |= {f"{name}/{step.module}": value for name, value in step.facts().items()}
    return facts


def tell_table(trainer: Any, plan: Plan, title: str) -> None:
    """Give the table of a plan to every logger that takes tables, to a CSV file beside the metrics otherwise, and to the screen."""
    if not trainer.is_global_zero or trainer.barebones:
        return
    rows = plan.rows()
    columns = list(rows[0])
    cells = [["" if row[column] is None else row[column] for column in columns] for row in rows]
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            text = [[str(cell) for cell in row] for row in cells]
            logger.log_table("compression/layers", columns=columns, data=text, step=trainer.global_step)
        elif hasattr(getattr(logger, "experiment", None), "add_text"):
            head = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
            lines = [f"| {' | '.join(map(str, row))} |" for row in cells]
            logger.experiment.add_text("compression/layers", "\n".join(head + lines), trainer.global_step)
        elif getattr(logger, "log_dir", None):
            stream = io.StringIO()
            csv.writer(stream, lineterminator="\n").writerows([columns, *cells])
            write_text(Path(logger.log_dir) / "compression_layers.csv", stream.getvalue())
    Console().print(plan.table(title))


def describe(callback: "Compression", task: Task) -> str:
    """Return one line: the method and what is left of the dense model."""
    facts = cost_facts(task)
    return (
        f"{type(callback).__name__}: FLOPs {task.origin.flops:,} -> {task.cost.total:,} ({facts['flops_share']:.1%}), "
        f"parameters {task.origin.params:,} -> {task.params:,} ({facts['params_share']:.1%})"
    )


def warn_of_early_checkpoints(trainer: Any) -> None:
    """Say it if a ModelCheckpoint calls an epoch from before the model was made smaller its best."""
    for callback in trainer.checkpoint_callbacks:
        best = getattr(callback, "best_model_path", "")
        if best and getattr(callback, "monitor", None) is not None and trainer.is_global_zero:
            log.warning(
                "ModelCheckpoint's best, %s, was saved while the model still had its dense shapes; the compact model is not among its candidates. "
                "`trainer.save_checkpoint` writes the compact one.",
                best,
            )
