"""GraSP: before training, remove the weights whose removal hurts the flow of gradients least.

Wang, Zhang and Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020 (arXiv:2002.07376). To first order,
removing weight ``q`` changes the squared norm of the gradient ``g`` by ``-2 w_q (H g)_q`` (eq. 6-8), where gradient and Hessian ``H`` of the loss
are those of the prunable weights alone. The paper removes the largest ``-w * Hg``; here the score to keep by is ``w * Hg``. The logits are divided by
a temperature of 200, at which the ranking hardly depends on it. The loss is a sum over chunks, batch normalization sees the chunk.

Unlike the authors' code: exactly round(sparsity * n) weights leave and ties are broken by position (``rule="official"`` keeps every score up to the
k-th largest, hence removes k - 1 or fewer, with k rounded down); masked weights do not move any more while training; the linear layers are
scored as they are, not drawn anew (``reinit_head="xavier_linear"`` is theirs, ``"xavier_last"`` their ImageNet script's). ``absolute=True`` removes
the smallest ``|w * Hg|`` instead, which Frankle, Dziugaite, Roy and Carbin, "Pruning Neural Networks at Initialization: Why Are We Missing the
Mark?", ICLR 2021 (arXiv:2009.08576) compare. As they found, much of what the method gives is the share that it keeps of every layer.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prune.budget.weights import Scope
from lightning_prune.callback.batches import balanced_chunks, function_of, labels_of, losses_of, plain_chunks, scoring
from lightning_prune.callback.checks import check_choice, check_integer, named_module
from lightning_prune.callback.masking import Schedule
from lightning_prune.callback.task import Task
from lightning_prune.callback.weights import WeightPruning, check_scores
from lightning_prune.curvature.hvp import Method, hessian_gradient, operations_by_depth
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.structure.select import Pattern

log = logging.getLogger(__name__)

_REGRESSION = ("MseLoss", "SmoothL1Loss", "HuberLoss", "Abs")
_CLASSIFICATION = ("NllLoss", "LogSoftmax", "Softmax", "Logsumexp", "BinaryCrossEntropy", "Sigmoid", "LogSigmoid")
_LAYER = ("Addmm", "Mm", "Bmm", "Convolution")


def flow_scores(weights: Sequence[Tensor], hessian_gradients: Sequence[Tensor], absolute: bool = False) -> list[Tensor]:
    """Return ``w * Hg``: what the squared gradient norm loses, to first order and halved, when the weight is removed.

    Args:
        weights: Prunable weights.
        hessian_gradients: The product of Hessian and gradient, in the same shapes, float64.
        absolute: Return the size of the change whatever its sign.

    Returns:
        One tensor per weight, float64; higher = keep.
    """
    scores = [hg * w.detach() for w, hg in zip(weights, hessian_gradients, strict=True)]
    return [s.abs() for s in scores] if absolute else scores


def official_masks(scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Return which weights stay by the rule of the authors' code: all whose ``-score`` is at most the k-th largest.

    Args:
        scores: By name, higher = keep.
        kept: By name, boolean; weights that are gone already count among the k.
        sparsity: Share to remove; k is its share of all weights, rounded down in the authors' floating point.

    Returns:
        By name, boolean: n - k + 1 are True, more where scores tie with the k-th.
    """
    removal = torch.cat([(-scores[name]).masked_fill(~kept[name], torch.inf).flatten() for name in scores])
    k = int(len(removal) * (1 - (1 - sparsity)))
    threshold = removal.kthvalue(len(removal) - k + 1).values if k else torch.inf
    return {name: kept[name] & (-scores[name] <= threshold) for name in scores}


@contextlib.contextmanager
def tempered(module: nn.Module, temperature: float) -> Iterator[None]:
    """Divide what a module returns by ``temperature`` inside the block.

    Raises:
        ModelError: If it was not called inside, or returned no tensor.
    """
    called = False

    def hook(_module: nn.Module, _args: Any, output: Any) -> Tensor:
        nonlocal called
        called = True
        if not isinstance(output, Tensor):
            raise ModelError(
                f"logits_module is a {type(module).__name__} that returns a {type(output).__name__}. Name the module that returns the logits alone."
            )
        return output / temperature

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not called:
        raise ModelError(
            f"logits_module is a {type(module).__name__} that the loss does not call. Name the module that returns the logits."
        )


def loss_kind(loss: Tensor) -> Literal["classification", "regression"] | None:
    """Return which kind of loss a scalar is, by the operation nearest to it in its graph that tells; None if none before the last layer does.

    At equal depth classification wins: of a sum of both, the logits are what the temperature is for.
    """
    for names in operations_by_depth([loss]):
        if any(name.startswith(_CLASSIFICATION) for name in names):
            return "classification"
        if any(name.startswith(_REGRESSION) for name in names):
            return "regression"
        if any(name.startswith(_LAYER) for name in names):
            return None
    return None


def redraw(model: nn.Module, kept: Mapping[nn.Parameter, Tensor], last: bool = False, seed: int = 0) -> None:
    """Give linear layers new weights, Xavier-normal by ``seed``; the old storage is left as it was and can be put back.

    Args:
        model: The model.
        kept: By weight which entries are not removed, boolean; layers with other weights are passed over.
        last: Only the last of them.
        seed: Of the draw.
    """
    linear = dict.fromkeys(m.weight for m in model.modules() if isinstance(m, nn.Linear))
    weights = [weight for weight in kept if weight in linear]
    generator = torch.Generator().manual_seed(seed)
    for weight in weights[-1 if last else 0 :]:
        drawn = nn.init.xavier_normal_(torch.empty(weight.shape), generator=generator)
        weight.data = drawn.to(weight) * kept[weight]


class GraSP(WeightPruning):
    """Remove single weights at the start, such that the gradient keeps flowing.

    Give ``logits_module`` or ``loss_fn``: without them the temperature cannot be applied and is 1.

    Args:
        sparsity: Share of the prunable weights that leave, in [0, 1).
        temperature: What logits are divided by; at least 50 for the paper's ranking, 1 for regression.
        samples_per_class: Samples of every class to score with, if ``targets`` are given.
        reinit_head: ``"none"``: linear layers are scored as they are. ``"xavier_linear"``: with weights drawn anew for scoring only, as the
            authors do. ``"xavier_last"``: only the last one so.
        hvp: ``"exact"``: by double backward. ``"finite_difference"``: by first derivatives, for operations that have no second; a good approximation
            with smooth activations only, in deep networks of ReLU about half of what stays is other weights.
        absolute: Remove weights that change the flow least, in either direction, rather than those whose removal increases it most.
        rule: ``"exact"``: exactly the share leaves. ``"official"``: the authors' threshold; at the start of the fit and globally only.
        logits_module: Name of the submodule whose output is the logits of a softmax or sigmoid.
        loss_fn: Function, or its dotted name: ``loss_fn(module, batch, temperature)`` returns the scalar loss to score by instead of that of
            the training step.
        targets: Where the labels of a batch are, for classes to be balanced: position, key, function, or its dotted name. None takes
            batches as they come.
        num_classes: Classes to wait for; None reads the data once to its end.
        calibration_batches: Batches to score with without ``targets``.
        scope: ``"global"``: scores compete over all layers. ``"uniform"``: the same share of every layer. ``"erk"``: shares by its shape.
        min_kept: At least so many weights of every layer stay.
        remove_dead: Remove channels that no weight reaches or leaves.
        include: Layers to prune: names, globs or module types; None takes all that can be.
        exclude: Layers to leave alone, likewise.
        start_epoch: First epoch in which a gradual run prunes.
        until_epoch: Epoch at whose start a gradual run has reached its target; None prunes at the start of the fit, as the paper does.
        every_n_epochs: Epochs between the steps of a gradual run.
        schedule: How the target is approached: ``"cubic"`` or ``"linear"``.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(  # noqa: PLR0913 - half are the shared ones
        self,
        *,
        sparsity: float,
        temperature: float = 200.0,
        samples_per_class: int = 10,
        reinit_head: Literal["none", "xavier_linear", "xavier_last"] = "none",
        hvp: Method = "exact",
        absolute: bool = False,
        rule: Literal["exact", "official"] = "exact",
        logits_module: str | None = None,
        loss_fn: str | Callable[[Any, Any, float], Tensor] | None = None,
        targets: int | str | Callable[[Any], Tensor] | None = None,
        num_classes: int | None = None,
        calibration_batches: int = 8,
        scope: Scope = "global",
        min_kept: int = 0,
        remove_dead: bool = True,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] | None = None,
        start_epoch: int = 0,
        until_epoch: int | None = None,
        every_n_epochs: int = 1,
        schedule: Schedule = "cubic",
        recalibrate_bn: int = 8,
    ) -> None:
        super().__init__(
            sparsity=sparsity,
            scope=scope,
            min_kept=min_kept,
            remove_dead=remove_dead,
            include=include,
            exclude=exclude,
            start_epoch=start_epoch,
            until_epoch=until_epoch,
            every_n_epochs=every_n_epochs,
            schedule=schedule,
            recalibrate_bn=recalibrate_bn,
        )
        self.temperature, self.samples_per_class, self.reinit_head = temperature, samples_per_class, reinit_head
        self.hvp, self.absolute, self.rule = hvp, absolute, rule
        self.logits_module, self.loss_fn = logits_module, loss_fn
        self.targets, self.num_classes, self.calibration_batches = targets, num_classes, calibration_batches
        self._told = self._warned = False
        self._check()

    def _check(self) -> None:
        number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        if not number or not 0 < self.temperature < math.inf:
            raise OptionError(f"GraSP(temperature={self.temperature!r}): give a number above 0; the paper has 200.")
        check_integer(self, "samples_per_class", 1)
        check_integer(self, "calibration_batches", 1)
        if self.num_classes is not None:
            check_integer(self, "num_classes", 2)
        check_choice(self, "reinit_head", ("none", "xavier_linear", "xavier_last"))
        check_choice(self, "hvp", ("exact", "finite_difference"))
        check_choice(self, "absolute", (False, True))
        check_choice(self, "rule", ("exact", "official"))
        if self.logits_module is not None and self.loss_fn is not None:
            raise OptionError("GraSP: give logits_module or loss_fn, not both; loss_fn applies the temperature itself.")
        if not isinstance(self.logits_module, str | None):
            raise OptionError(f"GraSP(logits_module={self.logits_module!r}): give the name of a submodule.")
        for option, allowed in (("loss_fn", str), ("targets", int | str)):
            value = getattr(self, option)
            if isinstance(value, bool) or not (value is None or callable(value) or isinstance(value, allowed)):
                raise OptionError(f"GraSP({option}={value!r}): give a function or its dotted name.")
        if self.num_classes is not None and self.targets is None:
            raise OptionError(
                "GraSP(num_classes=...) needs targets: where the labels of a batch are, such as 1 or 'label'."
            )
        if self.rule == "official" and (self.until_epoch is not None or self.scope != "global" or self.min_kept):
            raise OptionError(
                "GraSP(rule='official') is one threshold for all weights at the start of the fit: leave out until_epoch, scope and min_kept."
            )

    def rehearse(self, task: Task) -> None:
        """Raise what can be known before training.

        Raises:
            OptionError: If a pattern or name matches nothing.
        """
        super().rehearse(task)
        self._logits(task.model)

    def score_weights(
        self, task: Task, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return ``w * Hg`` of every weight, averaged over ranks in two collectives.

        Raises:
            ModelError: If a class lacks samples, the loss has no temperature, or an operation has no second derivative.
        """
        own = list(weights.values())
        with scoring(task.probe), self._tempered(task):
            if self.targets is None:
                chunks = plain_chunks(task.probe, self.calibration_batches)
            else:
                labels = labels_of(self, "targets")
                chunks = balanced_chunks(task.probe, labels, self.samples_per_class, self.num_classes)
            if self.reinit_head != "none":
                by_weight = {weight: kept[name] for name, weight in weights.items()}
                redraw(task.model, by_weight, last=self.reinit_head == "xavier_last")
            losses = losses_of(task.probe, chunks, lambda chunk, index: self._loss(task, chunk, index))
            products = hessian_gradient(losses, own, self.hvp, task.probe.mean)
            return dict(zip(weights, flow_scores(own, products, self.absolute), strict=True))

    def choose_weights(
        self, task: Task, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor], count: int
    ) -> Mapping[str, Tensor]:
        """Return which weights stay; under ``rule="official"`` one more than ``count`` asks for, or several."""
        if self.rule == "exact":
            return super().choose_weights(task, weights, kept, count)
        scores = check_scores("GraSP", self.score_weights(task, weights, kept), kept)
        return official_masks(scores, kept, self.sparsity)

    def _loss(self, task: Task, chunk: Any, index: int) -> Tensor | None:
        if self.loss_fn is not None:
            own = function_of(self, "loss_fn")(task.model, chunk, self.temperature)
            if not isinstance(own, Tensor) or own.numel() != 1:
                raise ModelError(f"GraSP(loss_fn={self.loss_fn!r}) returned no scalar: {type(own).__name__}.")
            return own
        loss = task.probe.loss_if_any(chunk, index)
        if loss is not None and self.temperature != 1:
            self._check_kind(loss, type(task.model).__name__)
        return loss

    def _check_kind(self, loss: Tensor, model: str) -> None:
        """Refuse a loss of regression; warn once where a temperature is applied and the kind is not known."""
        kind = loss_kind(loss)
        if kind == "regression":
            raise ModelError(
                f"GraSP(temperature={self.temperature}): the loss of {model} is one of regression, whose outputs are no logits. Give temperature=1, "
                "or loss_fn= with a temperature of its own."
            )
        if kind is None and self.logits_module is not None and not self._warned:
            self._warned = True
            log.warning(
                "GraSP(temperature=%s): whether the loss of %s is one of classification cannot be told. The temperature assumes that %r returns the "
                "logits of a softmax or sigmoid; regression needs temperature=1.",
                self.temperature,
                model,
                self.logits_module,
            )

    def _tempered(self, task: Task) -> contextlib.AbstractContextManager[None]:
        logits = self._logits(task.model)
        if logits is not None and self.temperature != 1:
            return tempered(logits, self.temperature)
        if self.temperature != 1 and self.loss_fn is None and not self._told:
            self._told = True
            log.info(
                "GraSP: scoring at temperature 1, not %s: which output the logits are is not known. Name it by logits_module=, or give loss_fn=.",
                self.temperature,
            )
        return contextlib.nullcontext()

    def _logits(self, model: nn.Module) -> nn.Module | None:
        return None if self.logits_module is None else named_module(self, "logits_module", model)
