"""Columns of weights as units: one input of a linear layer, one input channel of a convolution at one position of its kernel.

A column, ``W[:, c, i, j]``, is what one column holds of the matrix that a convolution multiplies with: the weights of all outputs for one input.
Columns at zero are masked weights. A dense kernel computes them all the same, so that they save no multiply-adds. But an input channel of which
all columns have left is read no more, and where nobody reads a channel, the filter that writes it leaves for good
(:mod:`lightning_prune.structure.dead`).
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.budget.units import UnitGroup, choose_units
from lightning_prune.callback.channel_target import ChannelTarget
from lightning_prune.callback.checks import check_integer, nothing_to_change
from lightning_prune.callback.ratios import Ratios, check_names, ratio_of
from lightning_prune.callback.task import Task
from lightning_prune.callback.unit_slices import Cells
from lightning_prune.callback.weights import EntryRemoval, Weights
from lightning_prune.errors import BudgetError, OptionError
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.select import Pattern
from lightning_prune.structure.steps import KeepChannels, MaskWeight, Step

log = logging.getLogger(__name__)

ScoreColumns = Callable[[Task, Any, NDArray[np.bool_]], NDArray[np.float64]]  # as GrowthRemoval's, of Columns


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the columns of a weight lie on it.

    Attributes:
        view: Its shape with the groups of a convolution in front.
        outputs: The axis of ``view`` along which a column lies.
        first: The number of its first column; the others follow.
    """

    view: tuple[int, ...]
    outputs: int
    first: int

    @classmethod
    def of(cls, module: nn.Module, weight: Tensor, first: int) -> Self:
        """Return the layout of a weight that ``module`` owns."""
        groups = module.groups if isinstance(module, nn.modules.conv._ConvNd) else 1
        view = (groups, weight.shape[0] // groups, *weight.shape[1:])
        return cls(view, 2 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1, first)

    @property
    def count(self) -> int:
        """Number of columns."""
        return math.prod(self.view) // self.view[self.outputs]

    @property
    def units(self) -> NDArray[np.int64]:
        """Their numbers, ascending."""
        return np.arange(self.first, self.first + self.count)

    def along(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """Shape values of all units so that those of these columns broadcast over the weight, of ``shape``."""
        short = [1 if axis == self.outputs else size for axis, size in enumerate(self.view)]
        own = values[self.first : self.first + self.count].view(short)
        return own[0] if self.view[0] == 1 else own.expand(self.view).reshape(shape)


@dataclasses.dataclass(frozen=True)
class ColumnSlice:
    """The columns of a parameter.

    Attributes:
        parameter: The parameter.
        layout: How they lie on it.
    """

    parameter: Tensor
    layout: Layout

    def along(self, values: Tensor) -> Tensor:
        """Shape values of units, ``[units + 1]``, so that they broadcast over the parameter."""
        return self.layout.along(values.to(self.parameter.dtype), self.parameter.shape)

    def sizes(self, absolute: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the mean of every column of the absolute values, ``[columns]``."""
        return absolute.reshape(self.layout.view).mean(self.layout.outputs, dtype=dtype).flatten()


class ColumnSlices(Cells):
    """The columns of a model; those of one weight compete.

    Args:
        found: The weights.
    """

    def __init__(self, found: "Columns") -> None:
        self._own = [ColumnSlice(found.tensors[key], layout) for key, layout in found.layouts.items()]
        cell = np.repeat(np.arange(len(self._own)), [own.layout.count for own in self._own])
        super().__init__(cell, self._own)

    def scores(self) -> Tensor:
        """Return the mean absolute value of every column, ``[units]``."""
        return torch.cat([own.sizes(self.absolute(own.parameter), self.dtype) for own in self._own])

    def masks(self, gone: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the weights with columns that are gone, each with a mask that is False there, on the CPU."""
        stays = ~gone.cpu()
        found = ((own.parameter, own.layout.along(stays, own.parameter.shape)) for own in self._own)
        return [(parameter, mask) for parameter, mask in found if not bool(mask.all())]


@dataclasses.dataclass(frozen=True)
class Columns(Weights):
    """Weights whose columns may leave.

    Attributes:
        layouts: How their columns lie, by name of the weight.
    """

    layouts: Mapping[str, Layout] = dataclasses.field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of columns."""
        return sum(layout.count for layout in self.layouts.values())

    def weighs(self) -> NDArray[np.int64]:
        """Return how many entries every column has that are not masked, ``[columns]``."""
        found = (
            self.kept[key].reshape(layout.view).sum(layout.outputs).flatten() for key, layout in self.layouts.items()
        )
        return torch.cat([*found]).cpu().numpy()


@dataclasses.dataclass(frozen=True)
class ColumnRemoval(EntryRemoval):
    """Columns of weights leave.

    Attributes:
        by_layer: The share of its columns that a layer gives, by glob, in place of one sparsity.
        ratios: How the shares of the layers relate to each other.
        min_columns: At least so many columns of every weight stay.
        score_columns: Scores all columns, so that shares come out of one ranking.
    """

    by_layer: Mapping[str, float] | None
    ratios: Ratios
    min_columns: int
    score_columns: ScoreColumns

    def look(self, task: Task) -> Columns:
        """Return the weights and their columns.

        Raises:
            OptionError: If a pattern matches no layer.
            ModelError: If there is none; says why for every layer.
        """
        found, layouts, first = super().look(task), dict[str, Layout](), 0
        for key, weight in found.tensors.items():
            layouts[key] = Layout.of(task.model.get_submodule(key.rpartition(".")[0]), weight, first)
            first += layouts[key].count
        return Columns(**vars(found), layouts=layouts)

    def candidates(self, task: Task) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """Return the weights with columns that can leave, by name, and the layers that are left alone with their reasons."""
        found, alone = super().candidates(task)
        names = {key: key.rpartition(".")[0] for key in found}
        if isinstance(self.ratios, Mapping):
            check_names(self.method, self.ratios, [*names.values()])
        for key, name in names.items():
            layout = Layout.of(task.model.get_submodule(name), found[key], 0)
            reason = None
            if layout.view[0] > 1 and layout.view[3 - layout.outputs] == 1:
                reason = "it is a depthwise convolution: an input has hardly a weight of its own"
            elif layout.count == 1:
                reason = "it has a single column"
            elif isinstance(self.ratios, Mapping) and not ratio_of(self.ratios, name):
                reason = "ratios names no share for it"
            if reason:
                del found[key]
                alone[name] = reason
        return found, alone

    def met(self, task: Task) -> str | None:
        """Return why the target is already met, in words, or None."""
        if self.by_layer is None and self.sparsity == 0:
            return "sparsity=0 removes nothing"
        if not task.plan:
            return None
        found = self.look(task)
        left = found.weighs()[self.leaving(task, found)].sum()
        return None if left else f"{found.removed:,} of {found.entries:,} weights have left, as many as are asked for"

    def check(self, task: Task, found: Columns) -> None:
        """Raise if the target cannot be met, or nothing can leave.

        Raises:
            BudgetError: Names the layers that bind.
            ModelError: If no layer is to give a column.
        """
        if not self.leaving(task, found).any():
            raise nothing_to_change(self.method, dict(found.alone))

    def score(self, task: Task, found: Weights, pending: Sequence[Step], share: float | None) -> Weights:
        """Return what is masked, and the units that die of it; with a share, what would leave now is masked, too."""
        if share is not None and isinstance(found, Columns):
            pending = self.pruned(task.model, found, self.leaving(task, found))
        return super().score(task, found, pending, share)

    def plan(self, task: Task, scores: Weights, steps: tuple[Step, ...]) -> Plan:
        """Return the masks and the removal of filters that nobody reads, and tell what leaves with these beside the target."""
        left = {key: mask.cpu() for key, mask in scores.kept.items()}
        cuts = [
            (step.key(name), cut)
            for step in scores.dead
            if isinstance(step, KeepChannels)
            for name, cut in step.tensors.items()
        ]
        for key, cut in cuts:
            if key in left:
                left[key] = cut.select(left[key])
        before, after = (sum(int(mask.sum()) for mask in masks.values()) for masks in (scores.kept, left))
        if after < before:
            log.warning(
                "%s(units='columns', sparsity=%s): filters that nobody reads any more leave, too, and with them %d weights beside the masked ones; "
                "%d of %d stay. Where a column is a whole input, as in a classifier, each takes a filter along: to keep these, name such "
                "layers in exclude.",
                self.method,
                self.by_layer or self.sparsity,
                before - after,
                after,
                scores.entries,
            )
        return super().plan(task, scores, steps)

    def leaving(self, task: Task, found: Columns) -> NDArray[np.bool_]:
        """Return which columns would leave now, ``[columns]``, boolean; how many of each weight is what the fit will keep to.

        Raises:
            BudgetError: If the target cannot be met.
        """
        sizes, bound = found.weighs(), math.floor((1 - Fraction(repr(self.sparsity))) * found.entries)
        groups = self.groups(found)
        least = sum(np.sort(sizes[group.units])[::-1][: self.min_columns].sum() for group in groups)
        if self.by_layer is None and least > bound:
            raise BudgetError(
                f"{self.method}(sparsity={self.sparsity}): at most {bound:,} of {found.entries:,} weights would stay, but {least:,} do if "
                f"{self.min_columns} of the columns of each of {len(groups)} layers stay. Lower sparsity or min_channels, or include more layers."
            )
        shares = None if self.by_layer is None else {name: 1 - share for name, share in self.by_layer.items()}
        kept = choose_units(
            groups,
            self.score_columns(task, found, sizes > 0),
            lambda stays: int(sizes[stays].sum()),
            bound if shares is None else None,
            align=1,
            min_channels=self.min_columns,
            scope=shares or ("uniform" if self.ratios == "uniform" else "global"),
            name="sparsity",
        )
        return ~kept

    def slices(self, model: nn.Module, found: Columns) -> ColumnSlices:
        """Return the columns as tensors see them."""
        return ColumnSlices(found)

    def groups(self, found: Columns) -> list[UnitGroup]:
        """Return the columns of every weight."""
        return [UnitGroup(key.rpartition(".")[0], layout.units, 1) for key, layout in found.layouts.items()]

    def read(self, model: nn.Module, found: Columns, index: int) -> Tensor:
        """Return the columns of a weight, given by its place among :meth:`groups`: ``[outputs, columns]``, or the reverse if that is fewer rows."""
        key, layout = [*found.layouts.items()][index]
        matrix = found.tensors[key].detach().reshape(layout.view).movedim(layout.outputs, 0).flatten(1)
        return matrix if len(matrix) <= layout.count else matrix.T

    def pruned(self, model: nn.Module, found: Columns, units: NDArray[np.bool_]) -> tuple[Step, ...]:
        """Return the masks without some columns, ``[columns]``."""
        stays, steps = torch.from_numpy(~units), []
        for key, layout in found.layouts.items():
            mask = found.kept[key].cpu() & layout.along(stays, found.kept[key].shape)
            if not bool(stays[layout.units].all()):
                steps.append(MaskWeight.of(key.rpartition(".")[0], key.rpartition(".")[2], mask))
        return tuple(steps)


class _Options(Protocol):
    """The options of a method under which columns leave."""

    flops: float | int | None
    params: float | int | None
    sparsity: float | dict[str, float] | None
    ratios: Ratios
    min_channels: int
    include: Pattern | Sequence[Pattern] | None
    exclude: Pattern | Sequence[Pattern] | None
    recalibrate_bn: int


def column_removal(method: _Options, score_columns: ScoreColumns) -> ColumnRemoval:
    """Check the options of a method and return the removal of columns that they describe.

    Args:
        method: The method.
        score_columns: Scores the columns.

    Raises:
        OptionError: If one is of the wrong type or out of range, or a bound is given that columns cannot keep.
    """
    name = type(method).__name__
    for bound in ("flops", "params"):
        if getattr(method, bound) is not None:
            raise OptionError(
                f"{name}(units='columns', {bound}={getattr(method, bound)!r}): columns at zero are masked weights, which stay in the tensors and are "
                "computed with. Give sparsity=, the share of the weights that leave, or units='channels'."
            )
    target = ChannelTarget.of(name, None, None, method.sparsity)
    check_integer(method, "min_channels", 1)
    return ColumnRemoval(
        method=name,
        sparsity=float(target.value),
        remove_dead=True,
        include=method.include,
        exclude=method.exclude,
        recalibrate_bn=method.recalibrate_bn,
        by_layer=target.by_group,
        ratios=method.ratios,
        min_columns=method.min_channels,
        score_columns=score_columns,
    )
