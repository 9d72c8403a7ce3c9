"""Pictures as PNG bytes, drawn without a display; the same bytes for the same answer."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_prune.errors import RuntimeMissingError

if TYPE_CHECKING:
    from lightning_prune.measure.prunability import Prunability
    from lightning_prune.measure.sensitivity import Sensitivity

_INK, _LINE, _BOUND, _GREY = "#2b3340", "#0f7b6c", "#b3432b", "#d9dee7"
_LONGEST = 48  # letters of the name of a layer


def draw_curve(found: "Prunability") -> bytes:
    """Draw the loss against the share of weights kept, the bound, and where the curve meets it.

    Raises:
        RuntimeMissingError: If matplotlib is not installed.
    """
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    points = [point for point in found.points if np.isfinite(point.loss)]
    axes.plot([100 * p.kept for p in points], [p.loss for p in points], color=_LINE, marker="o", markersize=3.5)
    if np.isfinite(found.bound):
        axes.axhline(found.bound, color=_BOUND, linewidth=1, linestyle="--")
        axes.annotate(f"bound {found.bound:.4g}", (100, found.bound), color=_BOUND, fontsize=8, va="bottom")
    for kept, style in ((found.first_crossing, "-"), (found.smallest_feasible, ":")):
        axes.axvline(100 * kept, color=_INK, linewidth=1, linestyle=style)
    axes.set_xlim(102, -2)
    axes.set_xlabel("weights kept, %  (line: first crossing, dots: smallest feasible)")
    axes.set_ylabel("loss")
    axes.set_title(_clear(found.title, 200), fontsize=8, loc="left")
    return _png(figure)


def draw_map(found: "Sensitivity") -> bytes:
    """Draw layers from top to bottom, shares removed from left to right, and the change of the value as colour.

    Raises:
        RuntimeMissingError: If matplotlib is not installed.
    """
    names = [_clear(curve.name, _LONGEST) for curve in found.curves]
    figure = _figure(3.2 + 0.55 * len(found.shares) + 0.06 * max(map(len, names)), 1.6 + 0.24 * len(names))
    axes = figure.add_subplot()
    changes = np.ma.masked_invalid(np.array([curve.values for curve in found.curves]) - found.dense)
    largest = float(np.abs(changes).max()) if changes.count() else 0.0
    from matplotlib import colormaps

    colors = colormaps["RdBu" if found.higher_is_better else "RdBu_r"].with_extremes(bad=_GREY)  # red is worse
    image = axes.imshow(changes, cmap=colors, vmin=-largest or -1, vmax=largest or 1, aspect="auto")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xticks(range(len(found.shares)), [f"{100 * share:g}" for share in found.shares], fontsize=7)
    axes.set_xlabel(f"{found.units} removed, %")
    axes.set_title(_clear(found.title, 200), fontsize=8, loc="left", wrap=True)
    figure.colorbar(image, label=f"change of the {found.measure}")
    return _png(figure)


def draw_growth(history: NDArray[np.float64], what: str, title: str) -> bytes:
    """Draw what training made of the units that leave and of those that stay, and what grew against them, over the optimizer's steps.

    Args:
        history: ``[points, 7]``: step; size of kept and of leaving units as a share of what it was; median, 90th percentile and largest of what grew,
            over the units not yet pruned; share of all units that are pruned.
        what: What grew.
        title: Of the picture.

    Raises:
        RuntimeMissingError: If matplotlib is not installed.
    """
    figure = _figure(6.4, 5.2)
    sizes, grown = figure.subplots(2, 1, sharex=True)
    steps, kept, leaving, *quantiles, gone = history.T
    seen = leaving > 0  # zero has no place on a logarithmic axis
    sizes.semilogy(steps, kept, color=_LINE, label="kept")
    sizes.semilogy(steps[seen], leaving[seen], color=_BOUND, label="leaving")
    sizes.set_ylabel("mean size, 1 before")
    for values, style, label in zip(quantiles, (":", "--", "-"), ("median", "90 %", "largest"), strict=True):
        grown.plot(steps, values, color=_INK, linewidth=1, linestyle=style, label=label)
    grown.set_ylabel(what)
    grown.set_xlabel("optimizer steps")
    share = grown.twinx()
    share.plot(steps, 100 * gone, color=_BOUND)
    share.set_ylabel("units at zero, %", color=_BOUND)
    share.set_ylim(0)
    for axes in (sizes, grown):
        axes.legend(fontsize=8)
    sizes.set_title(_clear(title, 200), fontsize=8, loc="left")
    return _png(figure)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeMissingError(
            f"Drawing a picture needs matplotlib, which is not installed ({error.name} is missing). Run: pip install matplotlib, "
            "or leave the picture out."
        ) from error
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return stream.getvalue()


def _clear(text: str, longest: int) -> str:
    """Return text of bounded length, its end if need be, that matplotlib does not take for a formula."""
    return (text if len(text) <= longest else f"...{text[3 - longest :]}").replace("$", r"\$")
