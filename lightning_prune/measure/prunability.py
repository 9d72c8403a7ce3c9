"""Prunability: the smallest share of the weights with which a model keeps its training loss. A diagnostic, not a pruner.

Kuhn, Lyle, Gomez, Rothfuss and Gal, "Robustness to Pruning Predicts Generalization in Deep Neural Networks", 2021 (arXiv:2103.06002)::

    P_beta = min {rho : L(model with the share rho of its weights) <= (1 + beta) L(model)}

with one-shot pruning by global magnitude, without retraining; the lower, the simpler the function that training found. A random order is a
control. No code of the authors is known; which shares they tried, and whether biases count, is not either. Here the weights are those of linear
layers, convolutions, attention and recurrent layers.

The loss need not rise monotonically as weights leave, so there are two answers: ``first_crossing``, the last share before the bound is first
exceeded, and ``smallest_feasible``, the smallest of all tried. ``abs_tol`` is added to the bound, because near a loss of zero a relative bound means
nothing; a negative loss is loosened by its absolute value.

Magnitudes change when layers of a ReLU or normalized network are rescaled though the function does not: compare models that were trained alike.
"""

import dataclasses
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from lightning_prune.budget.weights import select_weights
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.files import whole_file
from lightning_prune.measure.evaluation import Evaluation, Loss, check_share, finite, weights_of
from lightning_prune.measure.picture import draw_curve
from lightning_prune.structure.masks import masked
from lightning_prune.structure.select import Pattern

Mode = Literal["first_crossing", "smallest_feasible"]
Criterion = Literal["magnitude", "random"] | Callable[[Tensor], Tensor]
GRID = (*(i / 20 for i in range(20, 1, -1)), 0.075, 0.05, 0.025, 0.01, 0.005, 0.0)


@dataclasses.dataclass(frozen=True)
class Point:
    """One share that was tried.

    Attributes:
        kept: Share of the weights that stayed, in [0, 1].
        removed: How many were zero.
        loss: The loss with them.
        within: Whether it is within the bound.
    """

    kept: float
    removed: int
    loss: float
    within: bool


@dataclasses.dataclass(frozen=True)
class Prunability:
    """How few weights keep the loss.

    Attributes:
        points: The curve, from all weights down.
        beta: By which share of itself the loss may rise.
        abs_tol: And by how much besides.
        bound: What it may come to.
        mode: Which of the two answers ``value`` is.
        criterion: Name of the order in which weights leave.
        weights: How many weights there are.
        samples: How many samples the loss rests on.
    """

    points: tuple[Point, ...]
    beta: float
    abs_tol: float
    bound: float
    mode: Mode
    criterion: str
    weights: int
    samples: int

    @property
    def dense(self) -> float:
        """The loss with all weights."""
        return self.points[0].loss

    @property
    def first_crossing(self) -> float:
        """The last share before the bound is first exceeded."""
        kept = self.points[0].kept
        for point in self.points:
            if not point.within:
                break
            kept = point.kept
        return kept

    @property
    def smallest_feasible(self) -> float:
        """The smallest share of all tried that is within the bound."""
        return min(point.kept for point in self.points if point.within)

    @property
    def value(self) -> float:
        """P_beta, by ``mode``."""
        return self.first_crossing if self.mode == "first_crossing" else self.smallest_feasible

    @property
    def title(self) -> str:
        """The answer in one line."""
        return (
            f"P_{self.beta:g} = {self.value:.4g} of {self.weights:,} weights by {self.criterion} "
            f"(first crossing {self.first_crossing:.4g}, smallest feasible {self.smallest_feasible:.4g}); "
            f"loss {self.dense:.5g}, bound {self.bound:.5g}, {self.samples:,} samples"
        )

    def __str__(self) -> str:
        stream = io.StringIO()
        Console(file=stream, width=100, color_system=None).print(self.table())
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def table(self) -> Table:
        """Return the curve as a table for a rich console."""
        table = Table("kept", "removed", "loss", "within", title=escape(self.title), title_justify="left")
        for p in self.points:
            table.add_row(f"{p.kept:.2%}", f"{p.removed:,}", f"{p.loss:.5g}", "yes" if p.within else "no")
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types; None stands for what is not finite."""
        points = [dataclasses.asdict(point) | {"loss": finite(point.loss)} for point in self.points]
        numbers = {name: finite(getattr(self, name)) for name in ("beta", "abs_tol", "bound", "dense")}
        answers = {name: getattr(self, name) for name in ("value", "first_crossing", "smallest_feasible")}
        rest = {name: getattr(self, name) for name in ("mode", "criterion", "weights", "samples")}
        return {**answers, **numbers, **rest, "points": points}

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Draw the curve.

        Args:
            path: The PNG file.

        Raises:
            RuntimeMissingError: If matplotlib is not installed.
            OptionError: If the file cannot be written.
        """
        png = draw_curve(self)
        with whole_file(path) as beside:
            beside.write_bytes(png)


def prunability(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss | None = None,
    *,
    beta: float = 0.1,
    abs_tol: float = 0.0,
    mode: Mode = "first_crossing",
    criterion: Criterion = "magnitude",
    grid: Sequence[float] = GRID,
    batches: int | None = None,
    seed: int = 0,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    recalibrate_bn: int = 0,
) -> Prunability:
    """Find the smallest share of its weights with which a model keeps its loss; the model is left bit-identical.

    Args:
        model: A trained model; it runs in evaluation mode.
        data: Its training data without augmentation, in batches, as often as asked for: a loader or a list. Every pass sees the same.
        loss: ``loss(model, batch)``, a scalar, the mean over the samples of a batch; None takes the model's ``training_step``.
        beta: By which share of itself the loss may rise, at least 0; 0.1 in the paper.
        abs_tol: And by how much besides, at least 0.
        mode: ``"first_crossing"`` or ``"smallest_feasible"``: what ``value`` is; the answer holds both.
        criterion: ``"magnitude"``, the paper's; ``"random"``; or a function that scores a weight tensor, higher = keep, such as
            :func:`lightning_prune.methods.magnitude.lamp`.
        grid: Shares of the weights to keep, in [0, 1]; all weights are always tried.
        batches: How many batches to look at; None takes all.
        seed: Of a random order.
        include: Layers whose weights may leave: names, globs or module types; None takes all.
        exclude: Layers whose weights stay, likewise.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from at every point; the paper's measure has 0.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
        ModelError: If the model cannot be run, its loss is not finite, or it has no prunable weights.
    """
    _check(beta, abs_tol, mode, criterion)
    shares = sorted({1.0, *(check_share("grid", share) for share in grid)}, reverse=True)
    weights = weights_of(model, include, exclude)
    evaluation = Evaluation(model, data, loss, batches=batches)
    scores = _scores(weights, criterion, seed)
    everything = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    dense = evaluation.value()
    if not math.isfinite(dense):
        raise ModelError(f"The loss of {type(model).__name__} is {dense}. Look for a diverged training.")
    bound = math.inf if math.isinf(beta) else dense + beta * abs(dense) + abs_tol
    points = []
    for share in shares:
        removed = round((1 - share) * total)
        value = dense
        if removed:
            kept = select_weights(scores, everything, removed)
            with evaluation.probe.quiet(), masked(weights, kept):
                evaluation.probe.recalibrate(recalibrate_bn)
                value = evaluation.value()
        points.append(Point(share, removed, value, value <= bound or math.isinf(bound)))
    name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "scores")
    return Prunability(tuple(points), float(beta), float(abs_tol), bound, mode, name, total, evaluation.samples)


def _scores(weights: Mapping[str, Tensor], criterion: Criterion, seed: int) -> dict[str, Tensor]:
    """Return what orders the weights, higher = keep.

    Raises:
        ModelError: If a score is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in weights.items():
        if criterion == "random":
            found[name] = torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        else:
            found[name] = weight.detach().abs() if isinstance(criterion, str) else criterion(weight.detach())
        if not found[name].isfinite().all():
            raise ModelError(f"The scores of {name!r} are not finite. Look for a diverged training.")
    return found


def _check(beta: object, abs_tol: object, mode: object, criterion: object) -> None:
    for name, value in (("beta", beta), ("abs_tol", abs_tol)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise OptionError(f"{name}={value!r}: give a number of at least 0.")
    if mode not in ("first_crossing", "smallest_feasible"):
        raise OptionError(f"mode={mode!r}: give 'first_crossing' or 'smallest_feasible'.")
    if criterion not in ("magnitude", "random") and not callable(criterion):
        raise OptionError(
            f"criterion={criterion!r}: give 'magnitude', 'random' or a function that scores a weight tensor."
        )
