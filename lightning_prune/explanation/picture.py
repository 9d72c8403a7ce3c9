"""The picture of an explanation as PNG bytes, drawn without a display: layers from top to bottom, a colour per group."""

import colorsys
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightning_prune.explanation.rows import Part, Row
from lightning_prune.export.optional import need
from lightning_prune.export.quiet import quiet

if TYPE_CHECKING:
    from lightning_prune.explanation.answer import Explanation

Color = tuple[float, float, float]
Rectangle = tuple[float, float, float, float, Color]  # left, top, width, height

_INK, _FRAME, _GREY = "#2b3340", "#8a94a6", (0.85, 0.87, 0.91)
_GOLDEN = 0.618034  # steps of the golden ratio around the circle: neighbours differ, no hue comes back soon
_ROW, _LETTER, _BARS, _EDGE = 0.21, 0.059, 4.4, 0.55  # inches: a row, a letter of a label, all bars, above and below
_LONGEST = 60  # letters of a label


def draw(explanation: "Explanation") -> bytes:
    """Draw a bar per layer, in the order of the model.

    The thick part of a bar is what the layer writes, the thin part below what it reads, both as shares of its channels. Coloured channels can
    leave, those of one group have one colour; grey ones stay. After a dry run a line marks the share of the parameters kept.

    Args:
        explanation: The explanation.

    Returns:
        A PNG file, the same bytes for the same explanation.

    Raises:
        RuntimeMissingError: If matplotlib is not installed.
    """
    need("matplotlib", "Drawing the picture of an explanation")
    with quiet():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        names = [_clear(row.layer or "(the model itself)", keep_end=True) for row in explanation.rows]
        remarks = [_clear(_remark(row)) for row in explanation.rows]
        left, right = (0.3 + _LETTER * max([8, *map(len, texts)]) for texts in (names, remarks))
        width, height = left + _BARS + right, 2 * _EDGE + _ROW * max(1, len(names))
        figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(figure)
        place = (left / width, _EDGE / height, _BARS / width, 1 - 2 * _EDGE / height)
        axes = figure.add_axes(place, xlim=(0, 100), ylim=(len(names) - 0.4, -0.6))
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FRAME)
        axes.tick_params(colors=_INK, labelsize=7)
        axes.set_yticks(range(len(names)), names)
        _bars(axes, explanation.rows)
        line = _kept(axes, explanation.rows) if explanation.method else ""
        for row, remark in enumerate(remarks):
            axes.text(101.5, row, remark, va="center", fontsize=7, color=_INK)
        legend = f"channels, %; thick: written, thin: read; a colour and number per group, grey: stays{line}"
        figure.text(0.1 / width, 0.14 / height, legend, fontsize=8, color=_INK)
        title = "\n".join(textwrap.wrap(explanation.title, int(width / _LETTER)))
        figure.text(0.1 / width, 1 - 0.1 / height, title.replace("$", r"\$"), va="top", fontsize=8, color=_INK)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return stream.getvalue()


def color_of(group: int) -> Color:
    """Return the colour of a group; hue and brightness change from one to the next."""
    saturation, value = ((0.75, 0.72), (0.5, 0.85), (0.9, 0.6))[group % 3]
    return colorsys.hsv_to_rgb((0.57 + group * _GOLDEN) % 1.0, saturation, value)


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    from matplotlib.collections import PolyCollection

    found: list[Rectangle] = []
    for place, row in enumerate(rows):
        found += _bar(row.reads, place + 0.24, 0.16)
        for (group, _), bar in zip(row.writes, written := list(_bar(row.writes, place - 0.38, 0.56)), strict=True):
            x, _, width, _, color = bar
            if group is not None and width > 4:
                ink = "white" if 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2] < 0.6 else _INK
                axes.text(x + width / 2, place - 0.1, str(group), ha="center", va="center", fontsize=6, color=ink)
        found += written
    corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h, _ in found]
    colors = [color for *_, color in found]
    axes.add_collection(PolyCollection(corners, facecolors=colors, edgecolors="white", linewidths=0.4), autolim=False)


def _bar(parts: Sequence[Part], top: float, height: float) -> Iterator[Rectangle]:
    """Yield the channels of each group side by side, as percentages of all."""
    total, left = max(1, sum(count for _, count in parts)), 0.0
    for group, count in parts:
        yield left, top, 100 * count / total, height, _GREY if group is None else color_of(group)
        left += 100 * count / total


def _kept(axes: Any, rows: Sequence[Row]) -> str:
    """Mark the share of its parameters that each layer keeps; return what the legend says of it."""
    kept = [100 * (row.params_after or 0) / max(1, row.params) for row in rows]
    places = range(len(rows))
    axes.vlines(kept, [p - 0.46 for p in places], [p + 0.26 for p in places], _INK, linewidth=1.6)
    return "; line: parameters kept"


def _remark(row: Row) -> str:
    """Say what the units are and why they stay, without the line of code, which is too long here."""
    reason = re.sub(r" `[^`]*`", "", row.reason)
    if row.candidate and reason:
        return f"{row.units}, {row.removable} can leave: {reason}"
    return f"{row.units}: {reason}" if reason else row.units


def _clear(text: str, keep_end: bool = False) -> str:
    """Return text of bounded length that matplotlib does not take for a formula."""
    if len(text) > _LONGEST:
        text = f"...{text[3 - _LONGEST :]}" if keep_end else f"{text[: _LONGEST - 3]}..."
    return text.replace("$", r"\$")
