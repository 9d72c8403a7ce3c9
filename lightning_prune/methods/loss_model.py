"""Removal of weights of a trained network by a local model of the loss, in many small steps.

Laurent, Ballas, George, Ballas and Vincent, "Revisiting Loss Modelling for Unstructured Pruning", 2020 (arXiv:2006.12279). Setting weight
``w`` to zero changes the loss by about ``-g w + 1/2 G w^2``, with the gradient ``g`` and the diagonal ``G`` of the generalized Gauss-Newton
matrix at the weights as they are, those removed so far being zero. The loss model is ``|-g w + 1/2 G w^2|`` (``qm``), its linear part
(``lm``) or, after LeCun, Denker and Solla, "Optimal Brain Damage", NIPS 1989, its quadratic part (``obd``). A step must be short for the
model to hold: ``locality / 2 w^2`` is added, and the target is approached in ``steps`` rounds, scored anew in each; weights that stay are not
changed in between.

Unlike the authors' code: curvature is exact sample by sample for tokens, grouped convolutions, any padding and layers called several times;
it is that of the loss that is trained, whichever it is; batches are weighted by their samples; sums are float64. The geometric schedule is that
of their code, which ends at the target; the one printed in Algorithm 1 does not.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.budget.weights import Scope, select_weights
from lightning_prune.callback.batches import loss_alone, no_loss
from lightning_prune.callback.checks import check_choice, check_integer, named_module
from lightning_prune.callback.task import Task
from lightning_prune.callback.weights import WeightPruning, check_scores
from lightning_prune.curvature.diagonal import (
    GaussNewton,
    exact_cotangents,
    hutchinson_diagonal,
    sampled_cotangents,
)
from lightning_prune.curvature.hvp import twice_differentiable
from lightning_prune.curvature.products import recorded
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.structure.masks import masked
from lightning_prune.structure.select import Pattern

Order = Literal["lm", "qm", "obd"]
Curvature = Literal["auto", "ggn", "fisher", "hutchinson"]
Schedule = Literal["geometric", "linear"]

_MANY = 100  # outputs of a sample from which on labels are drawn


def keep_scores(weight: Tensor, gradient: Tensor | float, curvature: Tensor | float, locality: float = 0.0) -> Tensor:
    """Return how much the modelled loss changes if single weights leave, plus the penalty on the length of the step; higher = keep.

    ``qm`` is this; ``lm`` without curvature, ``obd`` without gradient.

    Args:
        weight: Weights, any shape.
        gradient: Mean gradient of the loss, same shape, signed.
        curvature: Diagonal of the mean curvature of the loss, same shape.
        locality: Factor of the penalty, at least 0; large ones rank by magnitude.
    """
    w = weight.detach().double()
    half_square = w.square() / 2
    return (curvature * half_square - gradient * w).abs() + locality * half_square


def removals(entries: int, before: int, target: int, steps: int, schedule: Schedule = "geometric") -> list[int]:
    """Return how many weights have left after every step, the last being the target.

    Args:
        entries: Number of weights.
        before: How many have left already.
        target: How many shall have left in the end.
        steps: Number of steps.
        schedule: ``"geometric"``: every step leaves the same share of what is there; from none, ``kappa_i = 1 - (1 - kappa)^(i / steps)``.
            ``"linear"``: every step removes the same number.

    >>> removals(100, 0, 75, 2), removals(100, 0, 75, 3, "linear")
    ([50, 75], [25, 50, 75])
    """
    stay, end = entries - before, entries - target
    shares = [step / steps for step in range(1, steps)]
    if schedule == "linear" or not stay:
        counts = [before + (target - before) * share for share in shares]
    else:
        counts = [entries - stay * (end / stay) ** share for share in shares]
    return [*map(round, counts), target]


class LossModel(WeightPruning):
    """Remove weights of a trained network by a model of the loss, at the start of the fit that fine-tunes it.

    ``order="lm"`` needs the loss of ``training_step`` only. ``"qm"`` and ``"obd"`` need its curvature, too: sample by sample with
    ``logits_module``, or with ``curvature="hutchinson"`` from the loss alone, with more noise. The model is scored in evaluation mode. Each of the
    ``steps`` rounds reads ``calibration_batches`` batches; shuffled data give others every time.

    Args:
        sparsity: Share of the weights that leaves, in [0, 1), of the dense model's prunable ones.
        order: ``"lm"``: linear model of the loss. ``"qm"``: quadratic. ``"obd"``: its quadratic part alone, right at a minimum.
        steps: Rounds of scoring and removing; the authors have 1, 14 and 140, and more is better.
        step_schedule: From round to round the same share of what is there leaves (``"geometric"``) or the same number (``"linear"``).
        locality: Penalty on the length of a step, at least 0; the authors have 0 and 1e-5 to 1e2. Large ones rank by magnitude.
        curvature: ``"ggn"``: the generalized Gauss-Newton matrix, exact, a backward pass per output and batch. ``"fisher"``: labels drawn from what
            the model predicts, ``draws`` passes. ``"auto"``: exact up to 100 outputs, drawn from there on. ``"hutchinson"``: the Hessian of the
            loss from random vectors, twice ``draws`` passes.
        logits_module: Name of the submodule whose output the loss is computed from, called once per step; ``""`` is the model itself. Softmax,
            sigmoid, squared error or another: the curvature is taken from the loss.
        calibration_batches: Batches read in every round; the authors have 1000 samples.
        draws: Labels per sample of ``"fisher"``, random vectors per batch of ``"hutchinson"``.
        seed: Of these draws.
        scope: ``"global"``: one ranking over all tensors. ``"uniform"``: the same share of every tensor. ``"erk"``: Erdos-Renyi-kernel densities.
        min_kept: At least so many weights of every tensor stay.
        remove_dead: Whether units that die of it are cut off.
        include: Layers to take: names, globs or module types; None takes all.
        exclude: Layers to leave alone, likewise.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Raises:
        OptionError: If an argument is of the wrong type or out of range, or curvature is asked for without a way to it.
    """

    def __init__(
        self,
        sparsity: float,
        order: Order = "lm",
        steps: int = 14,
        step_schedule: Schedule = "geometric",
        locality: float = 0.0,
        curvature: Curvature = "auto",
        logits_module: str | None = None,
        calibration_batches: int = 10,
        draws: int = 8,
        seed: int = 0,
        scope: Scope = "global",
        min_kept: int = 0,
        remove_dead: bool = True,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] | None = None,
        recalibrate_bn: int = 8,
    ) -> None:
        super().__init__(
            sparsity=sparsity,
            scope=scope,
            min_kept=min_kept,
            remove_dead=remove_dead,
            include=include,
            exclude=exclude,
            recalibrate_bn=recalibrate_bn,
        )
        self.order, self.rounds, self.step_schedule, self.locality = order, steps, step_schedule, locality
        self.curvature, self.logits_module = curvature, logits_module
        self.calibration_batches, self.draws, self.seed = calibration_batches, draws, seed
        check_choice(self, "order", ("lm", "qm", "obd"))
        check_choice(self, "step_schedule", ("geometric", "linear"))
        check_choice(self, "curvature", ("auto", "ggn", "fisher", "hutchinson"))
        for name in ("calibration_batches", "draws"):
            check_integer(self, name, 1)
        check_integer(self, "seed", 0)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise OptionError(f"LossModel(steps={steps!r}): give an integer of at least 1.")
        if isinstance(locality, bool) or not isinstance(locality, int | float) or not 0 <= locality < float("inf"):
            raise OptionError(f"LossModel(locality={locality!r}): give a number of at least 0.")
        if not isinstance(logits_module, str | None):
            raise OptionError(f"LossModel(logits_module={logits_module!r}): give the name of a submodule.")
        if self.by_sample and logits_module is None:
            raise OptionError(
                f"LossModel(order={order!r}, curvature={curvature!r}): the curvature sample by sample needs the outputs that the loss is computed "
                "from. Name the submodule that returns them by logits_module=, or take curvature='hutchinson' or order='lm', which need the "
                "loss alone."
            )

    @property
    def by_sample(self) -> bool:
        """Whether the curvature is taken sample by sample, from the outputs of the model."""
        return self.order != "lm" and self.curvature != "hutchinson"

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments in JSON types; ``steps`` are those of this method, not of the optimizer."""
        return super().options() | {"steps": self.rounds}

    def rehearse(self, task: Task) -> None:
        """Check patterns, target and the name of the module of the logits.

        Raises:
            OptionError: If a pattern matches no layer, or there is no such module.
            BudgetError: If the target cannot be met.
        """
        super().rehearse(task)
        self._outputs_module(task.model)

    def choose_weights(
        self, task: Task, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor], count: int
    ) -> Mapping[str, Tensor]:
        """Choose which entries stay, in rounds: score at the weights that are left, remove those with the lowest scores.

        Raises:
            ModelError: If there is no data, a score is not finite, or the curvature cannot be had as asked; says what can be done.
        """
        before = sum(int((~mask).sum()) for mask in kept.values())
        entries = sum(mask.numel() for mask in kept.values())
        targets = list(dict.fromkeys(removals(entries, before, count, self.rounds, self.step_schedule)))
        device = next(iter(weights.values())).device
        generator = torch.Generator(device).manual_seed(self.seed)
        newton = GaussNewton(weights, generator)
        with task.probe.quiet(mode="eval"), twice_differentiable(task.model):
            for number, target in enumerate(targets, 1):
                title = f"Loss model, round {number} of {len(targets)}"
                with masked(weights, kept):
                    means = self._means(task, newton, generator, title)
                    gradients, curvatures = means.get("gradient", {}), means.get("curvature", {})
                    scores = {
                        name: keep_scores(w, gradients.get(name, 0.0), curvatures.get(name, 0.0), self.locality)
                        for name, w in weights.items()
                    }
                kept = select_weights(check_scores("LossModel", scores, kept), kept, target, self.scope, self.min_kept)
        return kept

    def _means(
        self, task: Task, newton: GaussNewton, generator: torch.Generator, title: str
    ) -> dict[str, dict[str, Tensor]]:
        """Return what the order needs of ``"gradient"`` and ``"curvature"``, by name: means over the samples of all ranks, one collective."""
        weights = newton.weights
        kinds = {"lm": ["gradient"], "obd": ["curvature"], "qm": ["gradient", "curvature"]}[self.order]
        sizes = [w.numel() for w in weights.values()] * len(kinds)
        total = torch.zeros(sum(sizes) + 1, dtype=torch.float64, device=next(iter(weights.values())).device)
        seen = 0
        for seen, batch in enumerate(task.probe.batches(self.calibration_batches, title), 1):
            looked = self._look(task, batch, seen - 1, newton, generator)
            if looked is None:
                continue
            samples, found = looked
            flat = torch.cat([found[kind][name].double().flatten() for kind in kinds for name in weights])
            total[:-1] += samples * flat
            total[-1] += samples
        total = task.probe.mean(total)
        if not total[-1]:
            raise (
                no_loss(task.probe)
                if seen
                else ModelError(
                    "LossModel: there is no batch to score with. Give a training dataloader, or data=, with batches."
                )
            )
        parts = iter(torch.split(total[:-1] / total[-1], sizes))
        return {kind: {name: next(parts).view_as(w) for name, w in weights.items()} for kind in kinds}

    def _look(
        self, task: Task, batch: Any, index: int, newton: GaussNewton, generator: torch.Generator
    ) -> tuple[int, dict[str, dict[str, Tensor]]] | None:
        """Return how many samples a batch has, and gradient and curvature of its loss, those that the order needs; None if it is skipped."""
        weights, found = newton.weights, {}
        with self._outputs(task.model) as outputs, recorded(weights if self.by_sample else {}) as products:
            loss = loss_alone(task.probe, task.probe.loss_if_any, batch, index)
        if loss is None:
            return None
        if self.by_sample:
            z = self._only(outputs)
            found["curvature"] = newton.diagonal(products, z, self._cotangents(loss, z, generator))
        elif self.order != "lm":
            found["curvature"] = hutchinson_diagonal(loss, weights, self.draws, generator)
        if self.order != "obd":
            gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
            found["gradient"] = dict(zip(weights, gradients, strict=True))
        return len(outputs[0]) if self.by_sample else _samples(batch), found

    def _cotangents(self, loss: Tensor, outputs: Tensor, generator: torch.Generator) -> Tensor:
        exact = self.curvature == "ggn" or (self.curvature == "auto" and outputs[0].numel() <= _MANY)
        return exact_cotangents(loss, outputs) if exact else sampled_cotangents(loss, outputs, self.draws, generator)

    @contextlib.contextmanager
    def _outputs(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Collect what the module of the logits returns while the block runs; what follows works on a copy, so may change it in place."""
        found: list[Tensor] = []
        if not self.by_sample:
            yield found
            return

        def note(_module: nn.Module, _args: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor) or not output.ndim or not output.requires_grad:
                raise ModelError(
                    f"LossModel(logits_module={self.logits_module!r}) returns a {type(output).__name__}, not a tensor with one entry per sample that "
                    "weights were used for. Name the module that returns the logits alone."
                )
            found.append(output)
            return output.clone()

        handle = self._outputs_module(model).register_forward_hook(note)
        try:
            yield found
        finally:
            handle.remove()

    def _outputs_module(self, model: nn.Module) -> nn.Module:
        return model if self.logits_module is None else named_module(self, "logits_module", model)

    def _only(self, outputs: list[Tensor]) -> Tensor:
        if len(outputs) != 1:
            raise ModelError(
                f"LossModel(logits_module={self.logits_module!r}) is called {len(outputs)} times in a training step, where once is needed. Name the "
                "module whose output the loss is computed from, or take curvature='hutchinson'."
            )
        return outputs[0]


def _samples(batch: Any) -> int:
    """Return the size of the first axis of the first tensor in a batch."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 1)
