"""A comparison as Markdown, as one HTML file that loads nothing from elsewhere, and as a picture."""

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lightning_prune.export.markup import STYLE, escaped, flat, listing, pipe, section, show
from lightning_prune.export.pareto import Panel, Point, draw_pareto
from lightning_prune.files import whole_file, write_text
from lightning_prune.recipe.results import Cell, Comparison, Spread, Summary

NAMES = ("compare.json", "compare.md", "compare.html", "pareto.png")
_Tables = Iterator[tuple[str, Sequence[str], list[Sequence[str]]]]


def save(comparison: Comparison, folder: Path) -> Path:
    """Write data, Markdown, picture and page into a folder, each whole or not at all.

    Args:
        comparison: What was found.
        folder: Made if it is missing.

    Returns:
        The HTML file.

    Raises:
        OptionError: If the folder cannot be written.
    """
    save_data(comparison, folder)
    write_text(folder / "compare.md", markdown(comparison))
    png = picture(comparison)
    with whole_file(folder / "pareto.png") as beside:
        beside.write_bytes(png)
    write_text(folder / "compare.html", html(comparison, png))
    return folder / "compare.html"


def save_data(comparison: Comparison, folder: Path) -> None:
    """Write ``compare.json`` alone."""
    write_text(folder / "compare.json", comparison.to_json() + "\n")


def markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown."""
    lines = ["# Comparison", "", f"`{flat(comparison.command)}`", "", comparison.created, ""]
    lines += [f"- FAILED: {flat(text)}" for text in comparison.failures]
    lines += [f"- {flat(text)}" for text in comparison.remarks]
    for title, head, rows in _tables(comparison):
        lines += ["", f"## {title}", "", pipe(head), pipe(["---"] * len(head)), *map(pipe, rows)]
    lines += ["", "![Metric against FLOPs and latency](pareto.png)", "", "## Recipes", ""]
    return "\n".join([*lines, "```json", json.dumps(comparison.trials, indent=1), "```"]) + "\n"


def html(comparison: Comparison, png: bytes) -> str:
    """Return the comparison as one HTML document; every text from elsewhere is escaped."""
    name = escaped(f"{comparison.metric[0]} against FLOPs and latency")
    encoded = base64.b64encode(png).decode()
    first, *others = (section(*table) for table in _tables(comparison))
    parts = [
        "<h1>Comparison</h1>",
        f'<p class="soft">{escaped(comparison.created)} <code>{escaped(comparison.command)}</code></p>',
        listing([f"FAILED {text}" for text in comparison.failures], "bad"),
        listing(comparison.remarks, "soft"),
        first,
        f'<h2>{name}</h2><figure><img alt="{name}" src="data:image/png;base64,{encoded}"></figure>',
        *others,
        f'<h2>Recipes</h2><div class="wide"><pre>{escaped(json.dumps(comparison.trials, indent=1))}</pre></div>',
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def picture(comparison: Comparison) -> bytes:
    """Draw the metric against FLOPs and against latency at the first batch size, both as shares of the dense model's."""
    rows = comparison.summaries()
    size = min((size for row in rows for size in row.latency), default=1)

    def latency(row: Summary) -> Spread | None:
        return row.latency.get(size, {}).get("share")

    panels = [
        _panel("FLOPs, % of the dense model's", rows, lambda row: row.flops_share),
        _panel(f"latency, % of the dense model's, batch {size}", rows, latency),
    ]
    return draw_pareto(panels, *comparison.metric, comparison.trials[0]["label"])


def _panel(cost: str, rows: Sequence[Summary], find: Callable[[Summary], Spread | None]) -> Panel:
    points = []
    for row in rows:
        x, y = find(row), row.metric
        if x is not None and y is not None:
            points.append(Point(row.label, 100 * x.mean, y.mean, 100 * x.std if x.std else None, y.std))
    return Panel(cost, points)


def _tables(comparison: Comparison) -> _Tables:
    """Every table: title, head, rows; both documents show the same."""
    head, rows = comparison.table_rows()
    yield "Recipes over seeds", head, rows
    head = ("cell", comparison.metric[0], "before fine-tuning", "FLOPs", "parameters", "speed-up")
    yield "Cells", (*head, "run"), [_cell_row(cell) for cell in comparison.cells]
    for machine in comparison.machines:
        yield (
            "Machine and versions",
            ("", ""),
            [(key.replace("_", " "), show(value)) for key, value in machine.items()],
        )


def _cell_row(cell: Cell) -> Sequence[str]:
    speedups = ", ".join(f"{entry['speedup']:.2f}x at batch {entry['batch']}" for entry in cell.latency)
    amounts = [f"{value:,.0f}" if value is not None else "" for value in (cell.flops, cell.params)]
    figures = [f"{value:.4f}" if value is not None else "" for value in (cell.metric, cell.before)]
    label = f"{cell.trial}, seed {cell.seed}"
    return (label, "failed" if cell.failure else figures[0], figures[1], *amounts, speedups, cell.folder)
