"""The picture of a comparison: a metric against what it costs, with the Pareto front, as PNG bytes drawn without a display."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from lightning_prune.export.pictures import DENSE, INK, QUIET
from lightning_prune.export.quiet import quiet

# Okabe and Ito's colours, which colour-blind readers tell apart, without black and yellow; then the markers change.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_FRONT = "Pareto front"
_MARKERS = ("o", "s", "^", "D")


@dataclasses.dataclass(frozen=True)
class Point:
    """One model over several seeds.

    Attributes:
        label: Its name.
        x: Mean of what it costs.
        y: Mean of its metric.
        x_std: Standard deviation of the cost; None draws no bar.
        y_std: Standard deviation of the metric, likewise.
    """

    label: str
    x: float
    y: float
    x_std: float | None = None
    y_std: float | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """One axis of costs.

    Attributes:
        cost: What is drawn to the right, with its unit.
        points: The models; the one called as :func:`draw_pareto` is told is drawn as a star.
    """

    cost: str
    points: Sequence[Point]


def pareto_front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """Return which points no other point beats: none is as cheap and as good, and better in one of both.

    Args:
        points: Cost and metric of each.
        higher_is_better: Direction of the metric; a lower cost is always better.

    Returns:
        Indices by rising cost; of equal points the first.
    """
    sign = -1 if higher_is_better else 1
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1], i)):
        if not front or sign * points[index][1] < sign * points[front[-1]][1]:
            front.append(index)
    return front


def draw_pareto(panels: Sequence[Panel], metric: str, higher_is_better: bool | None, dense: str) -> bytes:
    """Draw the panels side by side.

    Args:
        panels: One per kind of cost.
        metric: Name of the metric.
        higher_is_better: Its direction; None draws no front.
        dense: Label of the dense model.

    Returns:
        A PNG file, the same bytes for the same figures.
    """
    labels = list(dict.fromkeys(point.label for panel in panels for point in panel.points if point.label != dense))
    styles = {label: _style(number) for number, label in enumerate(labels)} | {dense: (DENSE, "*")}
    with quiet():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.4 * len(panels), 4.6), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
            _paint(axes, panel, styles, higher_is_better)
        figure.axes[0].set_ylabel(_plain(metric), color=INK)
        shown = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
        handles = {label: handle for handle, label in sorted(shown, key=lambda pair: pair[1] == _FRONT)}
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, labelcolor=INK
        )
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=160, metadata={"Software": None})
    return stream.getvalue()


def _paint(axes: Any, panel: Panel, styles: dict[str, tuple[str, str]], higher_is_better: bool | None) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(DENSE)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(color=QUIET, linewidth=0.6)
    axes.set_axisbelow(True)
    if higher_is_better is not None and panel.points:
        front = [panel.points[i] for i in pareto_front([(p.x, p.y) for p in panel.points], higher_is_better)]
        costs = [*(point.x for point in front), max(point.x for point in panel.points)]
        best = [*(point.y for point in front), front[-1].y]  # what can be had at that cost or below
        style = {"color": INK, "linewidth": 1, "linestyle": "--", "label": _FRONT, "zorder": 1}
        axes.plot(costs, best, drawstyle="steps-post", **style)
    for point in panel.points:
        color, marker = styles[point.label]
        size = 15 if marker == "*" else 8
        bars = {"xerr": point.x_std or None, "yerr": point.y_std or None}
        axes.errorbar(
            point.x, point.y, **bars, fmt=marker, ms=size, color=color, capsize=3, label=_plain(point.label), zorder=2
        )
    axes.set_xlabel(panel.cost, color=INK)
    axes.margins(0.12)


def _style(number: int) -> tuple[str, str]:
    return COLORS[number % len(COLORS)], _MARKERS[number // len(COLORS) % len(_MARKERS)]


def _plain(text: str) -> str:
    """Return text that matplotlib does not take for a formula, nor for a line without an entry in the legend."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped
