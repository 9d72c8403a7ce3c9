"""Sensitivity: how much a loss or a metric suffers when a share of one layer leaves, layer by layer.

Every curve belongs to one weight tensor, of which the smallest entries are zero, or to one group of channels that leave together
(:mod:`lightning_prune.structure.groups`), of which those with the smallest weights are; all others stay whole, and nothing is trained again. As in
Han, Pool, Tran and Dally, "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015 (arXiv:1506.02626, figure 6), and for
channels in Li et al. 2017 (arXiv:1608.08710, figure 2).
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from lightning_prune.budget.weights import select_weights
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.files import whole_file
from lightning_prune.measure.evaluation import Evaluation, Loss, Metric, check_share, finite, weights_of
from lightning_prune.measure.picture import draw_map
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.groups import Group, Structure, find_units
from lightning_prune.structure.masks import Masks, masked
from lightning_prune.structure.preserve import preserved
from lightning_prune.structure.removal import removal_steps
from lightning_prune.structure.select import Pattern, select
from lightning_prune.structure.trials import try_sizes

Units = Literal["weights", "channels"]
Removal = Callable[[float], contextlib.AbstractContextManager[None]]
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One layer.

    Attributes:
        name: Of the layer, or of the first layer that writes a group of channels.
        size: How many weights or channels it has.
        values: The loss or metric at every share.
    """

    name: str
    size: int
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """How much every layer matters.

    Attributes:
        curves: One per layer, in the order of the model.
        shares: Shares removed.
        units: What is removed: ``"weights"`` or ``"channels"``.
        dense: The loss or metric of the whole model.
        measure: What it is: ``"loss"``, or the name of the metric.
        higher_is_better: Whether more of it is better.
        samples: How many samples it rests on.
    """

    curves: tuple[Curve, ...]
    shares: tuple[float, ...]
    units: Units
    dense: float
    measure: str
    higher_is_better: bool
    samples: int

    @property
    def title(self) -> str:
        """What was asked, in one line."""
        return f"{self.measure} when a share of the {self.units} of one layer leaves; {self.dense:.5g} with all, {self.samples:,} samples"

    def __str__(self) -> str:
        stream = io.StringIO()
        Console(file=stream, width=200, color_system=None).print(self.table())
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def table(self) -> Table:
        """Return a row per layer and a column per share as a table for a rich console."""
        table = Table(title=escape(self.title), title_justify="left")
        table.add_column("layer", overflow="fold")
        for heading in (self.units, *(f"-{share:.4g}" for share in self.shares)):
            table.add_column(heading, justify="right", no_wrap=True)
        for curve in self.curves:
            table.add_row(escape(curve.name), f"{curve.size:,}", *(f"{value:.4g}" for value in curve.values))
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types; None stands for what is not finite."""
        curves = [dataclasses.asdict(c) | {"values": [finite(value) for value in c.values]} for c in self.curves]
        rest = {name: getattr(self, name) for name in ("units", "measure", "higher_is_better", "samples")}
        return {**rest, "dense": finite(self.dense), "shares": list(self.shares), "curves": curves}

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Draw a map of layers and shares, the change of the value as colour.

        Args:
            path: The PNG file.

        Raises:
            RuntimeMissingError: If matplotlib is not installed.
            OptionError: If the file cannot be written.
        """
        png = draw_map(self)
        with whole_file(path) as beside:
            beside.write_bytes(png)


def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss | None = None,
    *,
    metric: Metric | None = None,
    units: Units = "weights",
    shares: Sequence[float] = SHARES,
    batches: int | None = None,
    example: Any = None,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    recalibrate_bn: int = 0,
) -> Sensitivity:
    """Tell for every layer what becomes of the loss when a share of it leaves; the model is left bit-identical.

    Args:
        model: A trained model; it runs in evaluation mode.
        data: Batches, as often as asked for: a loader or a list. Every pass sees the same.
        loss: ``loss(model, batch)``, a scalar, the mean over the samples of a batch; None takes the model's ``training_step``.
        metric: Instead of the loss, such as a metric of torchmetrics; batches are then inputs and a target, the target last.
        units: ``"weights"``: the smallest weights of a tensor. ``"channels"``: the channels, heads or hidden units of a group with the least
            norm of weights; one of them stays in any case.
        shares: Shares to remove, in [0, 1].
        batches: How many batches to look at; None takes all.
        example: For channels: example inputs to trace; None takes the ``example_input_array``, or what the first batch shows.
        include: Layers to ask about: names, globs or module types; None takes all.
        exclude: Layers to leave out, likewise.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from for every value.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
        ModelError: If the model cannot be run or traced, or has nothing that could leave.
    """
    if units not in ("weights", "channels"):
        raise OptionError(f"units={units!r}: give 'weights' or 'channels'.")
    wanted = tuple(check_share("shares", share) for share in shares)
    evaluation = Evaluation(model, data, loss, metric, batches)
    layers = (
        _weights(model, include, exclude)
        if units == "weights"
        else _channels(model, evaluation, example, include, exclude)
    )
    dense = evaluation.value()
    curves = []
    for name, size, remove in layers:
        values = []
        for share in wanted:
            with evaluation.probe.quiet(), remove(share):
                evaluation.probe.recalibrate(recalibrate_bn)
                values.append(evaluation.value())
        curves.append(Curve(name, size, tuple(values)))
    better = False if metric is None else getattr(evaluation.metric, "higher_is_better", None) is not False
    measure = "loss" if metric is None else getattr(metric, "name", None) or type(metric).__name__
    return Sensitivity(tuple(curves), wanted, units, dense, measure, better, evaluation.samples)


def _weights(model: nn.Module, include: Any, exclude: Any) -> Iterator[tuple[str, int, Removal]]:
    """Yield every weight tensor with its size and a context in which a share of it is zero."""
    for name, weight in weights_of(model, include, exclude).items():
        yield name.removesuffix(".weight"), weight.numel(), _smallest(name, weight)


def _smallest(name: str, weight: Tensor) -> Removal:
    def remove(share: float) -> contextlib.AbstractContextManager[None]:
        scores = {name: weight.detach().abs()}
        everything = {name: torch.ones_like(weight, dtype=torch.bool)}
        return masked({name: weight}, select_weights(scores, everything, round(share * weight.numel())))

    return remove


def _channels(
    model: nn.Module, evaluation: Evaluation, example: Any, include: Any, exclude: Any
) -> Iterator[tuple[str, int, Removal]]:
    """Yield every group of channels with its size and a context in which a share of them is zero."""
    calls = evaluation.probe.example_calls() if example is None else as_calls(example)
    structure = try_sizes(model, calls, find_units(model, calls))
    chosen = set(select({name: module for name, module in model.named_modules() if name}, include, exclude))
    groups = [group for group in structure.groups if structure.writers(group) & chosen]
    if not groups:
        raise ModelError(f"No channel of the selected layers of {type(model).__name__} can leave; explain() says why.")
    norms = unit_norms(model, structure)
    for group in groups:
        yield group.name, len(group.units), _least(model, structure, group, norms)


def _least(model: nn.Module, structure: Structure, group: Group, norms: NDArray[np.float64]) -> Removal:
    @contextlib.contextmanager
    def remove(share: float) -> Iterator[None]:
        kept = np.ones(structure.count, bool)
        for block in leaving_together(structure, group):
            count = min(round(share * len(block)), len(block) - 1)
            kept[block[np.argsort(norms[block], kind="stable")[:count]]] = False
        with preserved(model, parameters=True):
            Masks.pending(model, removal_steps(model, structure, kept)).apply_()
            yield

    return remove


def leaving_together(structure: Structure, group: Group) -> list[NDArray[np.int64]]:
    """Return blocks of units of which the same share must leave: the group, or all blocks of the ties that its units are in."""
    tied = [tie for tie in structure.ties if any(np.isin(block, group.units).any() for block in tie)]
    blocks = {tuple(np.unique(block[block >= 0]).tolist()) for tie in tied for block in tie}  # a label per channel
    free = set(group.units.tolist()) - {unit for block in blocks for unit in block}
    return [np.array(block) for block in sorted({*blocks, tuple(sorted(free))}) if block]


def unit_norms(model: nn.Module, structure: Structure) -> NDArray[np.float64]:
    """Return the norm of all weights of every unit, ``[units]``; biases and normalizations do not count."""
    parameters, total = dict(model.named_parameters()), np.zeros(structure.count)
    for name, slots in structure.by_tensor.items():
        if name not in parameters or parameters[name].ndim < 2:
            continue
        squares = parameters[name].detach().double().square()
        for slot in slots:
            total += slot.sums(squares, structure.count)
    return np.sqrt(total)
