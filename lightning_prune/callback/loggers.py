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
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.masks import cut_mask, cut_masks
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.steps import MaskWeight, Step

if TYPE_CHECKING:
    from lightning_prune.callback.compression import Compression

log = logging.getLogger(__name__)

_BAR, _REST = "#0f7b6c", "#d9dee7"
_MOST_BARS = 40  # more cannot be read


def tell_scalars(trainer: Any, facts: Mapping[str, float]) -> None:
    """Log scalars under ``compression/`` to every logger of the Trainer, on rank 0."""
    if facts and trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"compression/{name}": value for name, value in facts.items()}, step=trainer.global_step
            )


def cost_facts(task: Task) -> dict[str, float]:
    """Return multiply-adds and parameters of a model, in all and as share of the dense one; where weights are masked, how many of them are not."""
    facts = {
        "flops": task.cost.total,
        "params": task.params,
        "flops_share": task.cost.total / max(1, task.origin.flops),
        "params_share": task.params / max(1, task.origin.params),
    }
    masked = sum(int((~mask).sum()) for mask in cut_masks(task.model, task.plan).values())
    unmasked = task.params - masked
    return facts | ({"unmasked": unmasked, "unmasked_share": unmasked / max(1, task.origin.params)} if masked else {})


def layer_facts(plan: Plan) -> dict[str, float]:
    """Return per changed layer the share kept and what else its step says; of a mask what later cuts of the layer have left of it."""
    facts: dict[str, float] = {}
    masked: set[str] = set()
    for place, step in enumerate(plan.steps):
        name = _name(step)
        if isinstance(step, MaskWeight):
            mask = cut_mask(step, plan.steps[place + 1 :])
            kept = int(mask.sum()) / max(1, step.mask.numel())
            step_facts = MaskWeight.of(step.module, step.parameter, mask).facts()
            masked.add(name)
        else:
            kept = 1.0 if name in masked else step.summary()["kept"]
            step_facts = step.facts()
        facts[f"kept/{name}"] = facts.get(f"kept/{name}", 1.0) * kept
        facts |= {f"{fact}/{name}": value for fact, value in step_facts.items()}
    return facts


def _name(step: Step) -> str:
    """Name the layer, or the parameter where a layer has several to tell of."""
    return (
        step.key if isinstance(step, MaskWeight) and step.parameter != "weight" else step.module or "the model itself"
    )


def tell_table(trainer: Any, plan: Plan, title: str) -> None:
    """Give the table of the whole model, and a picture where one is taken, to every logger; the table of ``plan`` to the screen.

    The whole model's, because several callbacks of one fit share a logger, and each may only tell the place once.

    Args:
        trainer: The Trainer; nothing is told but on rank 0.
        plan: What one callback did.
        title: Stands above the table on the screen.
    """
    if not trainer.is_global_zero or trainer.barebones or not plan:
        return
    Console().print(plan.table(title))
    whole = plan_of(trainer.lightning_module) or plan
    rows = whole.rows()
    for logger in trainer.loggers:
        _give_table(logger, rows, trainer.global_step)
    takers = [give for give in map(_picture_taker, trainer.loggers) if give is not None]
    figure = draw_kept(rows) if takers and not trainer.fast_dev_run else None
    if figure is not None:
        for give in takers:
            give(figure, trainer.global_step)


def _give_table(logger: Any, rows: list[dict[str, Any]], step: int) -> None:
    """To a logger that takes tables or text as such, otherwise to a CSV file beside its metrics."""
    columns = list(rows[0])
    cells = [["" if row[column] is None else row[column] for column in columns] for row in rows]
    if hasattr(logger, "log_table"):
        text = [[str(cell) for cell in row] for row in cells]
        logger.log_table("compression/layers", columns=columns, data=text, step=step)
    elif hasattr(getattr(logger, "experiment", None), "add_text"):
        head = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        lines = [f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in cells]
        logger.experiment.add_text("compression/layers", "\n".join(head + lines), step)
    elif getattr(logger, "log_dir", None):
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([columns, *cells])
        write_text(Path(logger.log_dir) / "compression_layers.csv", stream.getvalue())


def _escaped(cell: Any) -> str:
    """Keep a cell of a Markdown table on its line and in its column."""
    return " ".join(str(cell).split()).replace("|", r"\|")


def _picture_taker(logger: Any) -> Any:
    """Return a function of figure and step that gives a picture to ``logger``, or None if it takes none."""
    if hasattr(logger, "log_image"):
        return lambda figure, step: logger.log_image("compression/kept", [figure], step=step)
    if hasattr(getattr(logger, "experiment", None), "add_figure"):
        return lambda figure, step: logger.experiment.add_figure("compression/kept", figure, step, close=False)
    return None


def draw_kept(rows: list[dict[str, Any]]) -> Any:
    """Draw the share kept per layer as bars, the least kept layers if there are too many.

    Args:
        rows: The rows of a plan (:meth:`lightning_prune.structure.plan.Plan.rows`).

    Returns:
        A matplotlib Figure that no global state knows of; None without matplotlib, or without a changed layer.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info(
            "matplotlib is not installed, so loggers get no picture of the layers. To have it: pip install matplotlib."
        )
        return None
    changed = [row for row in rows if row["kept"] is not None]
    if not changed:
        return None
    shown = changed if len(changed) <= _MOST_BARS else sorted(changed, key=lambda row: row["kept"])[:_MOST_BARS]
    shares = [100 * float(row["kept"]) for row in shown]
    widest, places = max(100.0, *shares), range(len(shown))
    figure = Figure(figsize=(6.4, 1.2 + 0.26 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(places, [widest] * len(shown), color=_REST, height=0.7)
    axes.bar_label(axes.barh(places, shares, color=_BAR, height=0.7), fmt="%.0f", padding=3, fontsize=8)
    axes.set_yticks(places, [row["layer"].replace("$", r"\$") for row in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, widest)
    axes.set_xlabel(
        "weights kept, %" + (f" (the {len(shown)} least of {len(changed)})" if len(shown) < len(changed) else "")
    )
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it would move the axes a little in every drawing, and loggers draw one each
    return figure


def describe(callback: "Compression", task: Task) -> str:
    """Return one line: the method and what is left of the dense model."""
    facts = cost_facts(task)
    unmasked = (
        f", of which {facts['unmasked']:,} ({facts['unmasked_share']:.1%}) are not masked"
        if "unmasked" in facts
        else ""
    )
    return (
        f"{type(callback).__name__}: FLOPs {task.origin.flops:,} -> {task.cost.total:,} ({facts['flops_share']:.1%}), "
        f"parameters {task.origin.params:,} -> {task.params:,} ({facts['params_share']:.1%}){unmasked}"
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
