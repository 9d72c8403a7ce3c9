"""Pictures of a report as PNG bytes, drawn without a display: trade-off, latency distribution, share kept per layer."""

import functools
import io
from collections.abc import Callable
from typing import Any

from lightning_prune.export.quiet import quiet
from lightning_prune.export.report import Report

DENSE, COMPACT, QUIET, INK = "#8a94a6", "#0f7b6c", "#d9dee7", "#2b3340"
_COLORS = {"dense": DENSE, "compact": COMPACT}
_LAYERS = 40  # more bars than that cannot be read


def draw(report: Report) -> dict[str, bytes]:
    """Draw what the report has figures for.

    Args:
        report: The report.

    Returns:
        PNG files by title, in order.
    """
    pictures: dict[str, bytes] = {}
    metrics = [model for model in ("dense", "compact") if report.models.get(model, {}).get("metric") is not None]
    if metrics and report.latency:
        title = f"{(report.metric or {}).get('name', 'metric')} against latency"
        pictures[title] = _figure(lambda axes: _tradeoff(axes, report, metrics), (6.4, 4.0))
    for entry in report.latency:
        paint = functools.partial(_distribution, entry=entry)
        pictures[f"Latency distribution, batch {entry['batch']}"] = _figure(paint, (6.4, 4.0))
    kept = [row for row in report.layers if row["kept"] is not None]
    if kept:
        height = 1.2 + 0.26 * min(len(kept), _LAYERS)
        pictures["Share of parameters kept per layer"] = _figure(lambda axes: _shares(axes, kept), (6.4, height))
    return pictures


def _figure(paint: Callable[[Any], None], size: tuple[float, float]) -> bytes:
    with quiet():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(DENSE)
        axes.tick_params(colors=INK, labelsize=9)
        paint(axes)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(INK)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=160, metadata={"Software": None})
    return stream.getvalue()


def _tradeoff(axes: Any, report: Report, models: list[str]) -> None:
    """One point per model at the first batch size, bars from the median to the 90th percentile."""
    entry = report.latency[0]
    points = [(m, entry[m]["p50"], entry[m]["p90"], float(report.models[m]["metric"])) for m in models if entry.get(m)]
    for model, p50, p90, metric in points:
        axes.errorbar(p50, metric, xerr=[[0], [max(0.0, p90 - p50)]], fmt="o", ms=9, capsize=3, color=_COLORS[model])
        axes.annotate(
            model, (p50, metric), xytext=(0, 10), textcoords="offset points", ha="center", color=_COLORS[model]
        )
    if len(points) == 2:
        axes.annotate(
            "",
            (points[1][1], points[1][3]),
            (points[0][1], points[0][3]),
            arrowprops={"arrowstyle": "->", "color": DENSE, "shrinkA": 10, "shrinkB": 10, "linestyle": ":"},
        )
    axes.set_xlim(left=0)
    axes.margins(y=0.4)
    axes.set_xlabel(f"latency p50 (bar: to p90), ms, batch {entry['batch']}")
    axes.set_ylabel((report.metric or {}).get("name", "metric"))
    axes.grid(color=QUIET, linewidth=0.6)


def _distribution(axes: Any, entry: dict[str, Any]) -> None:
    """Share of runs that took at most so long; the axis ends shortly behind the slowest 99th percentile."""
    present = [model for model in ("dense", "compact") if entry.get(model)]
    for model in present:
        axes.plot(entry[model]["quantiles"], range(101), color=_COLORS[model], linewidth=2, label=model)
        for key in ("p50", "p90", "p99"):
            axes.plot(entry[model][key], int(key[1:]), "o", ms=4, color=_COLORS[model])
    axes.set_xscale("log")
    axes.set_xlim(right=1.3 * max(entry[model]["p99"] for model in present))
    axes.set_ylim(0, 102)
    axes.set_xlabel("latency, ms, logarithmic (points: p50, p90, p99)")
    axes.set_ylabel("share of runs, %")
    axes.grid(color=QUIET, linewidth=0.6)
    axes.legend(frameon=False, loc="lower right", labelcolor=INK)


def _shares(axes: Any, rows: list[dict[str, Any]]) -> None:
    """One bar per layer, the least kept ones if there are too many."""
    shown = rows if len(rows) <= _LAYERS else sorted(rows, key=lambda row: row["kept"])[:_LAYERS]
    names = [_short(row["layer"]) for row in shown]
    shares = [100 * float(row["kept"]) for row in shown]
    places = range(len(shown))
    axes.barh(places, [max(100.0, *shares)] * len(shown), color=QUIET, height=0.7)
    axes.barh(places, shares, color=COMPACT, height=0.7)
    for place, share in zip(places, shares, strict=True):
        axes.annotate(
            f"{share:.0f}",
            (share, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02 * max(100.0, *shares))
    axes.set_xlabel(
        "parameters kept, %" + ("" if len(shown) == len(rows) else f" (the {_LAYERS} least of {len(rows)})")
    )


def _short(name: str) -> str:
    escaped = name.replace("$", r"\$")
    return escaped if len(escaped) <= 32 else "..." + escaped[-29:]
