"""Removal of filters by the Fisher information: C-OBD, C-OBS, Kron-OBD and Kron-OBS, the baselines of EigenDamage.

LeCun, Denker and Solla, "Optimal Brain Damage", NIPS 1989, rank weights by how much the loss rises without them if the Hessian is diagonal;
Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS 1992, let the weights that stay make up for it. Wang,
Grosse, Fidler and Zhang, "EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis", ICML 2019 (arXiv:1905.05934), take both to filters,
with the Fisher information ``F`` in place of the Hessian, and ``F = S (x) A`` (K-FAC), ``A`` of what a kernel covers and ``S`` of the gradients of
the outputs. ``w_i`` is row ``i`` of the weight: all that writes output ``i``, its bias included.

- C-OBD: weights do not interact, ``sum_j w_ij^2 F_ij,ij``, with the exact diagonal of ``F``.
- C-OBS: the sum over single weights, ``sum_j w_ij^2 / ([S^-1]_ii [A^-1]_jj)``, and of their updates.
- Kron-OBD: ``S_ii w_i A w_i^T``, the damage of a row as a whole.
- Kron-OBS: ``w_i A w_i^T / [S^-1]_ii``, what remains of it if the other rows change by ``-S^-1 e_i w_i / [S^-1]_ii``.

A unit is whatever leaves together (:mod:`lightning_prune.structure.groups`): its score is the sum over all rows that write it, layer by layer. The
paper's factor of 1/2 is left out, as in its code.

Where we differ from the authors' code, unless ``official=True``: ``w_i A w_i^T`` is the quadratic form of the paper, where the code squares first,
``sum_jk w_ij^2 A_jk``; Kron-OBS updates jointly for all rows ``P`` that leave a layer, ``-S^-1[:,P] (S^-1[P,P])^-1 W_P``, where the code sums what
each alone would ask for; damping is relative to the mean eigenvalue, where the code adds 1e-10, so that dead directions dominate. In a gradual run
rows that are masked are no variables any more: updates leave them at zero. C-OBD counts weights only; the others count biases, too.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.callback.channel_layers import owners_of_weights
from lightning_prune.callback.channels import ChannelPruning, ChannelRemoval, UnitScores, channel_removal
from lightning_prune.callback.checks import check_choice
from lightning_prune.callback.fisher import Fisher, check_fisher
from lightning_prune.callback.task import Task
from lightning_prune.curvature.kronecker import Kronecker
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.structure.groups import Structure
from lightning_prune.structure.layers import DenseLayer, is_plain
from lightning_prune.structure.masks import cut_masks
from lightning_prune.structure.readers import called_modules
from lightning_prune.structure.removal import removed_units
from lightning_prune.structure.select import Pattern
from lightning_prune.structure.steps import AddToWeight, Step

log = logging.getLogger(__name__)
Rule = Literal["c-obd", "c-obs", "kron-obd", "kron-obs"]
_ZERO, _DAMPING = 1e-15, 1e-10  # of the authors: eigenvalues that count as 0, and what is added to all
_NOTHING = 1e-12  # the importance of a layer below which there is no Fisher information to go by


# Formulas -------------------------------------------------------------------------------------------------------------------------


def inverse(factor: Tensor, damping: float, official: bool = False) -> Tensor:
    """Return the inverse of a factor, damped.

    Args:
        factor: Symmetric, eigenvalues at least 0 but for rounding, ``[n, n]``, float64.
        damping: Share of the mean eigenvalue that is added to all, positive.
        official: Add 1e-10 instead, eigenvalues up to 1e-15 counting as 0.

    Raises:
        ModelError: If the factor is too far from definite for so little damping.
    """
    if official:
        values, vectors = torch.linalg.eigh(factor)
        damped: Tensor = torch.where(values > _ZERO, values, 0.0) + _DAMPING
        return torch.einsum("ik,k,jk->ij", vectors, 1 / damped, vectors)
    mean = factor.diagonal().mean().clamp_min(1e-30)  # of no curvature at all: any multiple of the identity will do
    root, failed = torch.linalg.cholesky_ex(factor + damping * mean * torch.eye(len(factor)).to(factor))
    if bool(failed):
        raise ModelError(f"its curvature cannot be inverted with damping={damping!r}. Give more.")
    found: Tensor = torch.cholesky_inverse(root)
    return found


def c_obd(weight: Tensor, fisher: Tensor, official: bool = False) -> Tensor:
    """Return how much the loss rises without single rows if weights do not interact, ``[rows]``.

    Args:
        weight: Rows first.
        fisher: Diagonal of the Fisher information, of the same shape, at least 0.
        official: Add 1e-10 to it.
    """
    return (weight.square() * (fisher + _DAMPING * official)).flatten(1).sum(1)


def c_obs(weight: Tensor, inputs_inverse: Tensor, outputs_inverse: Tensor) -> Tensor:
    """Return the sum over the weights of every row of what the loss rises by without one if all others make up for it, ``[rows]``.

    Args:
        weight: ``[rows, columns]``.
        inputs_inverse: ``A^-1``, ``[columns, columns]``.
        outputs_inverse: ``S^-1``, ``[rows, rows]``.
    """
    return (weight.square() / inputs_inverse.diagonal()).sum(1) / outputs_inverse.diagonal()


def c_obs_update(weight: Tensor, inputs_inverse: Tensor, outputs_inverse: Tensor, leaving: Tensor) -> Tensor:
    """Return what is added to a weight when all weights of some rows leave: the sum over them, ``[rows, columns]``; not yet 0 on these rows.

    Args:
        weight: ``[rows, columns]``.
        inputs_inverse: ``A^-1``, ``[columns, columns]``.
        outputs_inverse: ``S^-1``, ``[rows, rows]``.
        leaving: Which rows, ``[rows]``, boolean.
    """
    pull = weight[leaving] / (outputs_inverse.diagonal()[leaving].unsqueeze(1) * inputs_inverse.diagonal())
    return -outputs_inverse[:, leaving] @ pull @ inputs_inverse


def kron_obd(weight: Tensor, inputs: Tensor, outputs: Tensor, official: bool = False) -> Tensor:
    """Return how much the loss rises without single rows, ``S_ii w_i A w_i^T``, ``[rows]``.

    Args:
        weight: ``[rows, columns]``.
        inputs: ``A``, ``[columns, columns]``.
        outputs: ``S``, ``[rows, rows]``.
        official: Square first: ``sum_jk w_ij^2 A_jk``, which may be negative.
    """
    return _energies(weight, inputs, official) * outputs.diagonal()


def kron_obs(weight: Tensor, inputs: Tensor, outputs_inverse: Tensor, official: bool = False) -> Tensor:
    """Return how much the loss rises without single rows if all others make up for it, ``w_i A w_i^T / [S^-1]_ii``, ``[rows]``.

    Args:
        weight: ``[rows, columns]``.
        inputs: ``A``, ``[columns, columns]``.
        outputs_inverse: ``S^-1``, ``[rows, rows]``.
        official: As for :func:`kron_obd`.
    """
    return _energies(weight, inputs, official) / outputs_inverse.diagonal()


def kron_obs_update(weight: Tensor, outputs_inverse: Tensor, leaving: Tensor, official: bool = False) -> Tensor:
    """Return what is added to a weight when some rows leave, ``[rows, columns]``: what raises the loss least.

    Args:
        weight: ``[rows, columns]``.
        outputs_inverse: ``S^-1``, ``[rows, rows]``.
        leaving: Which rows, ``[rows]``, boolean.
        official: Sum up what each row alone asks for; with several the sum is not yet 0 on them.
    """
    among = outputs_inverse[leaving][:, leaving]
    pull = weight[leaving] / among.diagonal().unsqueeze(1) if official else torch.linalg.solve(among, weight[leaving])
    return -outputs_inverse[:, leaving] @ pull


def _energies(weight: Tensor, inputs: Tensor, official: bool) -> Tensor:
    return (weight.square() @ inputs).sum(1) if official else (weight @ inputs * weight).sum(1)


# The method -----------------------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """The rows of a group of a layer that are not masked, and their curvature.

    Attributes:
        rows: Their indices in the layer, ``[n]``.
        weight: Rows of the weight, the bias, if any, in the last column, float64, ``[n, columns]``.
        inputs: ``A``, ``[columns, columns]``.
        outputs: ``S`` of these rows, ``[n, n]``.
    """

    rows: Tensor
    weight: Tensor
    inputs: Tensor
    outputs: Tensor


def _blocks(layer: DenseLayer, factors: Kronecker, stays: Tensor) -> Iterator[_Block]:
    """Yield the groups of a layer.

    Args:
        layer: The layer.
        factors: Its factors, of all that a kernel covers, with the homogeneous coordinate of a bias.
        stays: Rows that are not masked, ``[rows]``, boolean.
    """
    wide = layer.weight.detach().to(factors.inputs).flatten(1)
    if layer.bias is not None:
        wide = torch.cat([wide, layer.bias.detach().to(wide).unsqueeze(1)], 1)
    size = len(wide) // len(factors.outputs)
    for group, (inputs, outputs) in enumerate(zip(factors.inputs, factors.outputs, strict=True)):
        own = stays[group * size : (group + 1) * size].nonzero().flatten().to(wide.device)
        if len(own):
            yield _Block(group * size + own, wide[group * size + own], inputs, outputs[own][:, own])


def _unlike(model: nn.Module, structure: Structure, called: Collection[str]) -> tuple[NDArray[np.int64], str] | None:
    """Return units that something else than a plain linear layer or convolution writes, and the reason why they stay; None if there are none."""
    owners, alone = owners_of_weights(model), np.ones(structure.count, bool)
    for tensor, slots in structure.by_tensor.items():
        name, _, parameter = tensor.rpartition(".")
        layer = model.get_submodule(name)
        for slot in slots if len(structure.shapes[tensor]) > 1 else ():
            units = np.unique(slot.units[slot.units >= 0])
            if not slot.zeroed:
                continue
            if not (is_plain(layer) and parameter == "weight" and slot.units.ndim == 1 and slot.axis == 0):
                return units, f"{tensor!r} writes them, which is no weight of a plain linear layer or convolution"
            if len(owners.get(tensor, ())) > 1:
                return units, f"the weight of {name!r}, which writes them, is tied"
            if name not in called:
                return units, f"the weight of {name!r}, which writes them, is read past its forward"
            alone[units] = False
    return (np.flatnonzero(alone), "no linear layer or convolution writes them") if alone.any() else None


@dataclasses.dataclass(frozen=True)
class _Scores(UnitScores):
    """Scores, with the factors that updates need, by name of the layer."""

    factors: Mapping[str, Kronecker]


@dataclasses.dataclass(frozen=True)
class SurgeonRemoval(ChannelRemoval):
    """Channels leave, and the weights that stay may make up for them.

    Attributes:
        brain: The method.
    """

    brain: "OptimalBrain"

    def look(self, task: Task) -> Structure:
        """Return the units of the model; those stay that something else than plain linear layers and convolutions writes."""
        structure, called = super().look(task), called_modules(task.model, task.calls)
        while structure.count and (unlike := _unlike(task.model, structure, called)):
            structure = structure.without(*unlike)
        return structure

    def score(self, task: Task, found: Structure, pending: Sequence[Step], share: float | None) -> UnitScores:
        """Score the units; every rank comes to the same."""
        scores = super().score(task, found, pending, share)
        factors, self.brain.factors = self.brain.factors, {}  # large: let go of as soon as the updates are known
        return _Scores(scores.structure, scores.values, scores.gone, factors)

    def steps(self, task: Task, scores: UnitScores, share: float | None) -> tuple[Step, ...]:
        """Return the steps that change the weights that stay, and those that remove channels."""
        steps = super().steps(task, scores, share)
        if share is None or not isinstance(scores, _Scores):
            return steps
        leaving = removed_units(scores.structure, steps) & ~scores.gone
        masks, updates = cut_masks(task.model, task.plan), []
        for name, factors in scores.factors.items():
            layer, units = task.model.get_submodule(name), rows_of(scores.structure, name)
            assert is_plain(layer)
            assert units is not None
            flags = [torch.from_numpy(np.append(own, False)[units]) for own in (leaving, ~scores.gone)]
            if flags[0].any():
                change = self.brain.update(name, layer, factors, flags[0], flags[1] | torch.from_numpy(units < 0))
                held = {key: own * masks[f"{name}.{key}"] for key, own in change.items() if f"{name}.{key}" in masks}
                updates += [AddToWeight.of(name, key, own) for key, own in (change | held).items()]
        return (*updates, *steps)


def rows_of(structure: Structure, layer: str) -> NDArray[np.int64] | None:
    """Return the unit of every row of the weight of a layer, ``[rows]``, -1 for rows that never leave; None if none can."""
    slots = structure.by_tensor.get(f"{layer}.weight", ())
    return next((slot.units for slot in slots if slot.axis == 0 and slot.units.ndim == 1), None)


class OptimalBrain(ChannelPruning):
    """Remove the channels without which the loss rises least, by the Fisher information of the rows that write them.

    Give exactly one of ``flops``, ``params``, ``sparsity``. C-OBS and Kron-OBS change the weights that stay so that they make up for those that
    leave; with ``until_epoch`` they do so at every step.

    Args:
        rule: ``"c-obd"``, ``"c-obs"``, ``"kron-obd"`` or ``"kron-obs"``, as said above.
        flops: Bound on the multiply-adds of the model: share of the dense one (float) or a count for the example inputs (int).
        params: Bound on its parameters, likewise.
        sparsity: Share of the channels that leave, in [0, 1); or such shares by name or glob of a group.
        official: Whether to do as the authors' code does, as said above; ``damping`` is then theirs.
        damping: Share of the mean eigenvalue of a factor that is added before it is inverted, positive; only of C-OBS and Kron-OBS.
        fisher: ``"sampled"``: labels are drawn from what the model predicts. ``"empirical"``: those of the data.
        distribution: What labels are drawn from: ``"categorical"``, ``"bernoulli"``, ``"gaussian"``, or ``"auto"``, which reads it off the loss; or a
            function, or its dotted name: ``sample(outputs, generator)`` returns the gradients of ``-log p(label)`` at the outputs.
        logits_module: Name of the submodule whose output the loss is computed from, called once per step; None: the outermost that the step calls.
        loss_fn: Function, or its dotted name: ``loss_fn(module, batch)`` returns the scalar loss, in place of that of ``training_step``.
        calibration_batches: Batches that the Fisher information is taken from.
        align: Channels kept are multiples of it; 1 switches that off.
        seed: Of the labels that are drawn.
        include: Layers whose channels may leave: names, globs or module types; None takes all.
        exclude: Layers whose channels stay, likewise.
        until_epoch: Epoch at whose start a gradual run has reached its target, in cubic steps from the first epoch on; None: at the start of the fit.
        every_n_epochs: Epochs between the steps of a gradual run.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        rule: Rule = "kron-obd",
        flops: float | int | None = None,
        params: float | int | None = None,
        sparsity: float | dict[str, float] | None = None,
        official: bool = False,
        damping: float = 1e-3,
        fisher: Literal["sampled", "empirical"] = "sampled",
        distribution: str | Callable[[Tensor, torch.Generator], Tensor] = "auto",
        logits_module: str | None = None,
        loss_fn: str | Callable[[Any, Any], Tensor] | None = None,
        calibration_batches: int = 16,
        align: int = 16,
        seed: int = 0,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] | None = None,
        until_epoch: int | None = None,
        every_n_epochs: int = 1,
        recalibrate_bn: int = 8,
    ) -> None:
        super().__init__(
            flops=flops,
            params=params,
            sparsity=sparsity,
            align=align,
            include=include,
            exclude=exclude,
            until_epoch=until_epoch,
            every_n_epochs=every_n_epochs,
            recalibrate_bn=recalibrate_bn,
        )
        self.rule, self.official, self.damping, self.fisher = rule, official, damping, fisher
        self.distribution, self.logits_module, self.loss_fn = distribution, logits_module, loss_fn
        self.calibration_batches, self.seed = calibration_batches, seed
        check_choice(self, "rule", ("c-obd", "c-obs", "kron-obd", "kron-obs"))
        check_choice(self, "official", (False, True))
        if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < math.inf:
            raise OptionError(
                f"OptimalBrain(damping={damping!r}): give a positive number, a share of the mean eigenvalue."
            )
        check_fisher(self)
        self.removal = SurgeonRemoval(**vars(channel_removal(self, self.score_units, self.scope)), brain=self)
        self.reset()

    def reset(self) -> None:
        """Forget the fit before this one."""
        super().reset()
        self.factors: dict[str, Kronecker] = {}

    def rehearse(self, task: Task) -> None:
        """Check patterns, target, the module of the outputs and dotted names.

        Raises:
            OptionError: If a pattern matches no layer, or there is no such module or function.
            BudgetError: If the target cannot be met.
            ModelError: If nothing can leave; says why for every layer.
        """
        super().rehearse(task)
        Fisher.of(self, task.model)

    def score_units(self, task: Task, structure: Structure, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the sum over the rows that write every unit of their importance.

        Raises:
            ModelError: If the model cannot be run for a loss, its outputs are not known, or something is not finite.
        """
        plain = {name: layer for name, layer in task.model.named_modules() if is_plain(layer)}
        units = {name: own for name in plain if (own := rows_of(structure, name)) is not None}
        layers = {name: plain[name] for name in units}
        stays = {name: torch.from_numpy(np.append(kept, True)[own]) for name, own in units.items()}
        rows, total = self._rows(task, layers, stays), np.zeros(structure.count)
        for name, found in rows.items():
            if not bool(found.isfinite().all()):
                raise ModelError(f"OptimalBrain: the weights of {name!r} are not finite. Look for a diverged training.")
            here = units[name] >= 0
            total += np.bincount(units[name][here], found.cpu().numpy()[here], minlength=structure.count)
        blind = [name for name in layers if name not in rows or float(rows[name].sum()) <= _NOTHING]
        if blind:
            log.warning(
                "OptimalBrain: the loss does not depend on %s as far as the Fisher information tells (the importances of all layers sum to %.3g), so "
                "that the channels written there are the first to leave. Take fisher='empirical' or more calibration_batches if the model is next to "
                "certain of what it predicts; otherwise leave these layers out by exclude=.",
                ", ".join(map(repr, blind)),
                total.sum(),
            )
        return total

    def _rows(self, task: Task, layers: Mapping[str, DenseLayer], stays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the importance of every row, ``[rows]``, 0 of masked ones, by name of the layer; keep the factors that updates need."""
        information = Fisher.of(self, task.model)
        if self.rule == "c-obd":
            moments = information.moments(task, layers, dict.fromkeys(layers))
            weights = {name: layers[name].weight.detach().to(own) for name, own in moments.items()}
            wide = {name: w.reshape(*w.shape[:2], -1).mT for name, w in weights.items()}
            return {name: c_obd(wide[name], own, self.official) * stays[name].to(own) for name, own in moments.items()}
        factors, found = information.factors(task, layers, patches=True, homogeneous=True), {}
        for name, own in factors.items():
            found[name] = own.inputs.new_zeros(len(layers[name].weight))
            with self._named(name):
                for block in _blocks(layers[name], own, stays[name]):
                    found[name][block.rows] = self._importances(block)
        if self.rule.endswith("obs"):
            self.factors = factors
        return found

    def _importances(self, block: _Block) -> Tensor:
        if self.rule == "kron-obd":
            return kron_obd(block.weight, block.inputs, block.outputs, self.official)
        inverses = self._inverse(block.outputs)
        if self.rule == "kron-obs":
            return kron_obs(block.weight, block.inputs, inverses, self.official)
        return c_obs(block.weight, self._inverse(block.inputs), inverses)

    def update(
        self, name: str, layer: DenseLayer, factors: Kronecker, leaving: Tensor, stays: Tensor
    ) -> dict[str, Tensor]:
        """Return what is added to the parameters of a layer when rows leave, by name, 0 in rows that are masked.

        Args:
            name: Its name.
            layer: The layer.
            factors: Its factors.
            leaving: Rows that leave, ``[rows]``, boolean.
            stays: Rows that have not left before, likewise.

        Raises:
            ModelError: If a factor cannot be inverted.
        """
        columns = factors.inputs.shape[-1]
        total = factors.inputs.new_zeros(len(layer.weight), columns)
        with self._named(name):
            for block in _blocks(layer, factors, stays):
                own, outputs = leaving.to(block.rows.device)[block.rows], self._inverse(block.outputs)
                if self.rule == "c-obs":
                    change = c_obs_update(block.weight, self._inverse(block.inputs), outputs, own)
                else:
                    change = kron_obs_update(block.weight, outputs, own, self.official)
                total[block.rows] = change
        size = layer.weight[0].numel()
        found = {"weight": total[:, :size].view(layer.weight.shape).to(layer.weight)}
        return found if size == columns else found | {"bias": total[:, -1].to(layer.weight)}

    def _inverse(self, factor: Tensor) -> Tensor:
        return inverse(factor, self.damping, self.official)

    @contextlib.contextmanager
    def _named(self, layer: str) -> Iterator[None]:
        try:
            yield
        except ModelError as error:
            raise ModelError(f"OptimalBrain: layer {layer!r}: {error}") from error
