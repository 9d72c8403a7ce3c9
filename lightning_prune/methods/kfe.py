"""Structured pruning in the Kronecker-factored eigenbasis (EigenDamage): directions of inputs and outputs leave instead of channels.

Wang, Grosse, Fidler and Zhang, "EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis", ICML 2019 (arXiv:1905.05934). The Fisher
information of a layer is approximated by ``S (x) I (x) A``, with ``A`` of the inputs and ``S`` of the gradients of the outputs (K-FAC; for
convolutions the factor of channels, taps being independent). In the eigenbases of both the weight is the core ``W* = Q_S^T W Q_A``, tap by tap, and
the damage of removing an entry is ``W*^2 D``, ``D`` being the Fisher information there: the product of eigenvalues (K-FAC), or the second moment of
the gradients of single samples (EKFAC: George, Laurent, Bouthillier, Ballas and Vincent, NeurIPS 2018, arXiv:1806.03884). Rows and columns with the
least sum leave. What stays is a smaller core between two rotations, 1x1 convolutions (:mod:`lightning_prune.structure.rotated`); neighbours see the
shapes that they saw.

Unlike the authors' code: the bound is on what the model really costs with the cheapest form of every layer (inputs only, outputs only, both; two
factors where the kernel is one), in parameters *and* multiply-adds; EKFAC is the default; the bias stays out of the factors, on the last layer,
exact with any padding; a side of which next to nothing would stay keeps its best direction, not that of least curvature; linear layers can be
rotated again; the separable form works. ``official=True`` is theirs: K-FAC, three factors or none, as soon as they take no more parameters, the
bias of linear layers as one more input.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_prune.callback.channel_target import ChannelTarget
from lightning_prune.callback.checks import check_choice, check_integer, check_probability
from lightning_prune.callback.directions import DirectionRemoval, RankedDirections, Site
from lightning_prune.callback.fisher import Fisher, check_fisher
from lightning_prune.callback.masking import Masking
from lightning_prune.callback.task import Task
from lightning_prune.curvature.eigenbasis import Eigenbasis, directions
from lightning_prune.curvature.kronecker import Kronecker
from lightning_prune.errors import ModelError
from lightning_prune.structure.layers import DenseLayer
from lightning_prune.structure.select import Pattern

log = logging.getLogger(__name__)
_NOTHING = 1e-12  # total below which a network is too sure of itself to have Fisher information to go by
_TIES = 1e-10  # share of the mean Fisher information that every direction has at least, so that none leaves for nothing


def core_of(weight: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """Return a weight in other bases: ``Q_S^T W Q_A``, tap by tap, ``[directions out, taps, directions in]``, float64.

    Args:
        weight: ``[c_o, c_i, *taps]``.
        outputs: Orthonormal columns ``Q_S``, ``[c_o, directions]``.
        inputs: Orthonormal columns ``Q_A``, ``[c_i, directions]``.
    """
    wide = weight.detach().to(outputs.device, torch.float64)
    return torch.einsum("op,oir,iq->prq", outputs, wide.reshape(*wide.shape[:2], -1), inputs)


def importances(core: Tensor, fisher: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much the loss rises, twice over, if single directions leave: of the inputs and of the outputs.

    ``imp_out[p] = sum_{q,r} W*[p,r,q]^2 D[p,r,q]``, ``imp_in[q]`` likewise (section 4 of the paper, whose factor of 1/2 its code leaves out, too).

    Args:
        core: ``W*``, ``[outputs, taps, inputs]``.
        fisher: ``D``, broadcasts to it, at least 0.
    """
    damage = core.square() * fisher
    return damage.sum((0, 1)), damage.sum((1, 2))


def eigenbasis(factors: Kronecker, inputs: Tensor | None = None, outputs: Tensor | None = None) -> Eigenbasis:
    """Return the eigenbasis of a layer.

    Args:
        factors: Its Kronecker factors.
        inputs: Orthonormal columns that span what is left of the inputs, ``[c_i, directions]``; None: all.
        outputs: Of the outputs, likewise.
    """
    input_values, own_inputs = directions(factors.inputs, None if inputs is None else inputs.unsqueeze(0))
    output_values, own_outputs = directions(factors.outputs, None if outputs is None else outputs.unsqueeze(0))
    return Eigenbasis(own_inputs, own_outputs, input_values, output_values)


def ranked(layer: DenseLayer, basis: Eigenbasis, fisher: Tensor) -> RankedDirections:
    """Return the directions of a layer, those to keep first.

    Args:
        layer: The layer, without groups.
        basis: Its eigenbasis.
        fisher: ``D``, broadcasts to the core.

    Raises:
        ModelError: If weights are not finite.
    """
    weight = layer.weight
    if basis.inputs.shape[1] > weight.shape[1] and layer.bias is not None:  # the homogeneous coordinate
        weight = torch.cat([weight, layer.bias.unsqueeze(1)], 1)
    core = core_of(weight, basis.outputs[0], basis.inputs[0])
    if not bool(core.isfinite().all()):
        raise ModelError("its weights are not finite. Look for a diverged training.")
    scores = importances(core, fisher.to(core))
    inputs, outputs = (side.argsort(descending=True, stable=True) for side in scores)
    return RankedDirections(
        basis.inputs[0][:, inputs],
        basis.outputs[0][:, outputs],
        scores[0][inputs],
        scores[1][outputs],
        basis.input_values[0][inputs],
        basis.output_values[0][outputs],
    )


class KFE(Masking):
    """Remove directions of the Kronecker-factored eigenbasis of layers, at the start of the fit or gradually.

    Give exactly one of ``flops``, ``params``. Convolutions and linear layers become two or three thinner ones; grouped convolutions are left alone.

    Args:
        flops: Bound on the multiply-adds of the model: share of the dense one (float) or a count for the example inputs (int).
        params: Bound on its parameters, likewise.
        scaling: Fisher information of a weight in the eigenbasis: ``"ekfac"``, exact, a second pass over the data, or ``"kfac"``, a product of
            eigenvalues.
        fisher: ``"sampled"``: labels are drawn from what the model predicts. ``"empirical"``: those of the data.
        distribution: What labels are drawn from: ``"categorical"``, ``"bernoulli"``, ``"gaussian"``, or ``"auto"``, which reads it off the loss; or a
            function, or its dotted name: ``sample(outputs, generator)`` returns the gradients of ``-log p(label)`` at the outputs.
        logits_module: Name of the submodule whose output the loss is computed from, called once per step; None: the outermost that the step calls.
        loss_fn: Function, or its dotted name: ``loss_fn(module, batch)`` returns the scalar loss, in place of that of ``training_step``.
        calibration_batches: Batches that the Fisher information is taken from.
        limit: Share of the directions of one side of a layer that may leave at most, in (0, 1).
        separable: Whether what stays of a convolution becomes depthwise, and what the fit minimizes: ``"frobenius"``, the error of the weight, or
            ``"curvature"``, that error weighed by K-FAC; True is ``"curvature"``.
        official: Whether to do as the authors do, as said above; ``scaling`` is then ``"kfac"``.
        align: Directions kept are multiples of it, where a side is narrow of a smaller power of two; 1 switches that off.
        seed: Of the labels that are drawn.
        include: Layers to take: names, globs or module types; None takes all that can be.
        exclude: Layers to leave alone, likewise.
        until_epoch: Epoch at whose start a gradual run has reached its target, in cubic steps from the first epoch on; None: at the start of the fit.
        every_n_epochs: Epochs between the steps of a gradual run.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        flops: float | int | None = None,
        params: float | int | None = None,
        scaling: Literal["ekfac", "kfac"] = "ekfac",
        fisher: Literal["sampled", "empirical"] = "sampled",
        distribution: str | Callable[[Tensor, torch.Generator], Tensor] = "auto",
        logits_module: str | None = None,
        loss_fn: str | Callable[[Any, Any], Tensor] | None = None,
        calibration_batches: int = 16,
        limit: float = 0.95,
        separable: bool | Literal["frobenius", "curvature"] = False,
        official: bool = False,
        align: int = 16,
        seed: int = 0,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] | None = None,
        until_epoch: int | None = None,
        every_n_epochs: int = 1,
        recalibrate_bn: int = 8,
    ) -> None:
        super().__init__(
            include=include,
            exclude=exclude,
            until_epoch=until_epoch,
            every_n_epochs=every_n_epochs,
            recalibrate_bn=recalibrate_bn,
        )
        self.flops, self.params, self.scaling, self.fisher = flops, params, scaling, fisher
        self.distribution, self.logits_module, self.loss_fn = distribution, logits_module, loss_fn
        self.calibration_batches, self.limit, self.align, self.seed = calibration_batches, limit, align, seed
        self.separable, self.official = separable, official
        check_choice(self, "scaling", ("ekfac", "kfac"))
        check_choice(self, "separable", (False, True, "frobenius", "curvature"))
        check_choice(self, "official", (False, True))
        check_probability(self, "limit")
        check_integer(self, "align", 1)
        check_fisher(self)
        target = ChannelTarget.of("KFE", flops, params)
        form: Literal[False, "frobenius", "curvature"] = "curvature" if separable is True else separable
        self.removal = DirectionRemoval(
            "KFE", self.score_directions, target, align, limit, form, official, include, exclude
        )

    def rehearse(self, task: Task) -> None:
        """Check patterns, budget and what options name.

        Raises:
            OptionError: If a pattern matches no layer, or there is no such module or function.
            BudgetError: If the target cannot be met.
            ModelError: If nothing can leave; says why for every layer.
        """
        super().rehearse(task)
        Fisher.of(self, task.model)

    def score_directions(self, task: Task, sites: Mapping[str, Site]) -> Mapping[str, RankedDirections]:
        """Return the directions of the layers in their eigenbases, with their importances.

        Raises:
            ModelError: If the model cannot be run for a loss, its outputs are not known, or something is not finite.
        """
        information, layers = Fisher.of(self, task.model), {name: site.layer for name, site in sites.items()}
        factors = information.factors(task, layers, homogeneous=self.official)
        bases = {
            name: _shared(task, eigenbasis(own, sites[name].inputs, sites[name].outputs))
            for name, own in factors.items()
        }
        if self.scaling == "ekfac" and not self.official:
            fisher = information.moments(task, {name: layers[name] for name in bases}, bases)
        else:
            fisher = {name: basis.diagonal() for name, basis in bases.items()}
        total = sum(float(own.sum()) for own in fisher.values())
        entries = sum(own.numel() for own in fisher.values())
        if total <= _NOTHING:
            log.warning(
                "KFE: the Fisher information of all directions sums to %.3g: the model is next to certain of what it is asked, so that little can be "
                "said of what may leave, and directions leave by the size of their weights. Take %sa model trained less long.",
                total,
                "more calibration_batches, or " if self.fisher == "empirical" else "fisher='empirical', or ",
            )
        # Of directions without information, those with the smallest weights leave first.
        ground = _TIES * total / max(1, entries) or 1.0
        found = {}
        for name, basis in bases.items():
            try:
                found[name] = ranked(layers[name], basis, fisher[name] + ground)
            except ModelError as error:
                raise ModelError(f"KFE: layer {name!r} cannot be scored: {error}") from error
        return found


def _shared(task: Task, basis: Eigenbasis) -> Eigenbasis:
    """Return the basis of rank 0: signs, and directions of equal eigenvalues, differ between machines."""
    parts = (basis.inputs, basis.outputs, basis.input_values, basis.output_values)
    flat = task.probe.first(torch.cat([part.flatten() for part in parts]))
    pieces = torch.split(flat, [part.numel() for part in parts])
    return Eigenbasis(*(piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)))
