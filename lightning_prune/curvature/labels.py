"""Gradients of the loss of every sample at the outputs of a model: at labels that the model itself draws, or at those of the data.

The Fisher information of a model is that of its own predictive distribution: labels are drawn from it, and the gradient of ``-log p(label)`` at
the outputs ``z`` is ``softmax(z) - onehot(label)`` for classes, ``sigmoid(z) - label`` for yes and no, and normal noise of variance 1 for squared
error. Which of them a loss stands for is read off its curvature at ``z``, by products with a few vectors: a term of weight ``w`` has
``w (diag(p) - p p^T)``, ``w p (1 - p)``, or ``w`` for ``w (z - y)^2 / 2``.

Normalization. The loss of a batch is a weighted sum of terms, one per label: of a sample, of a pixel, of an output. The weights, such as
1 / samples of a mean, class weights, ignored labels and masks, are read off likewise, and the gradient of a term is multiplied by the root of its
*relative* weight, 1 on average over the terms that count. So squares of gradients add up as the loss weights them, while a mean, a sum and any
multiple of a loss give the same: of a plain mean over N samples it is N times the gradient. The loss of a sample is the sum over its terms.

A loss in which samples meet, such as a contrastive one, has no gradients sample by sample.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.curvature.hvp import OnceDifferentiable, second_derivative
from lightning_prune.errors import ModelError

Distribution = Literal["auto", "categorical", "bernoulli", "gaussian"]
Sample = Callable[[Tensor, torch.Generator], Tensor]
Unit = Callable[[Tensor], Tensor]
Reduction = Literal["auto", "mean", "sum"]

_REMEDY = "Name the distribution of the labels, or give a function that draws them, or take the labels of the data (the empirical Fisher)."


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """What labels are drawn from, given outputs.

    Attributes:
        distribution: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        axis: Where the classes of a categorical one lie.
        weight: Weight of every term in the loss of the batch; broadcasts over the outputs, float64, not negative.
    """

    distribution: str
    axis: int
    weight: Tensor

    def draw(self, outputs: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        """Return the gradients of ``-log p(label)`` at labels that are drawn.

        Args:
            outputs: ``[samples, ...]``.
            draws: Labels per term.
            generator: Source of randomness, on the device of the outputs.

        Returns:
            ``[draws, *outputs.shape]``, float64; weights are not applied.
        """
        z = outputs.detach().double()
        if self.distribution == "categorical":
            share = z.softmax(self.axis).movedim(self.axis, -1)
            labels = torch.multinomial(share.reshape(-1, share.shape[-1]), draws, replacement=True, generator=generator)
            drawn = F.one_hot(labels.T.reshape(draws, *share.shape[:-1]), share.shape[-1])
            return (share - drawn).movedim(-1, self.axis + 1)
        z = z.expand(draws, *z.shape)
        if self.distribution == "bernoulli":
            return z.sigmoid() - torch.bernoulli(z.sigmoid(), generator=generator)
        return torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)

    def relative(self) -> Tensor:
        """Return the weights over their mean, terms without weight apart."""
        counted = self.weight[self.weight > 0]
        return self.weight / counted.mean() if len(counted) else self.weight


def sampled_gradients(
    loss: Tensor,
    outputs: Tensor,
    generator: torch.Generator,
    distribution: Distribution | Sample = "auto",
    remedy: str = _REMEDY,
) -> Tensor:
    """Return the gradients of the loss of every sample at labels that the model draws, one per term.

    Args:
        loss: The loss of the batch, a scalar, with a graph from the outputs, which is kept. Where it is flat, as where softmax is
            saturated, the gradients are 0.
        outputs: What the loss takes, logits or predictions: ``[samples, ...]``; classes lie along axis 1 or the last.
        generator: Source of randomness, on the device of the outputs. The same seed draws the same labels.
        distribution: What the labels are drawn from; ``"auto"`` finds it out. If one is named that the loss does not have, terms that the
            loss depends on count alike. A function ``sample(outputs, generator)`` returns the gradients itself.
        remedy: What to do if it cannot be found out, a sentence.

    Returns:
        ``outputs.shape``, float64; see the module for their scale.

    Raises:
        ModelError: If the distribution cannot be found out, samples meet in the loss, or something is not finite or of another shape.
    """
    if callable(distribution):
        found = distribution(outputs.detach(), generator)
        if not isinstance(found, Tensor) or found.shape != outputs.shape:
            raise ModelError(
                f"The function that samples must return one gradient for every entry of the outputs (shape {tuple(outputs.shape)}), "
                f"got {tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__}."
            )
        return check_finite(found.detach().double())
    likelihood = likelihood_of(loss, outputs, distribution, remedy)
    return likelihood.draw(outputs, 1, generator).squeeze(0) * likelihood.relative().sqrt()


def empirical_gradients(loss: Tensor, outputs: Tensor, reduction: Reduction = "auto") -> Tensor:
    """Return the gradients of the loss of every sample at the labels of the data.

    Args:
        loss: The loss of the batch, a scalar, with a graph from the outputs, which is kept.
        outputs: What the loss takes: ``[samples, ...]``.
        reduction: Whether the loss is a ``"mean"`` over samples or a ``"sum"``; ``"auto"`` reads the weights of terms off the loss, which must
            then be softmax or sigmoid cross-entropy or squared error.

    Returns:
        ``outputs.shape``, float64; see the module for their scale.

    Raises:
        ModelError: If the weights cannot be read off the loss, samples meet in it, or something is not finite.
    """
    gradient = output_gradient(loss, outputs)
    slope = check_finite(gradient.detach().double())
    if reduction != "auto":
        with contextlib.suppress(OnceDifferentiable), second_derivative([gradient], ""):
            check_apart(gradient, outputs)
        return slope * (len(outputs) if reduction == "mean" else 1)
    remedy = "Say whether it is the 'mean' over the samples or their 'sum' (reduction)."
    likelihood = likelihood_of(loss, outputs, remedy=remedy)
    return slope / likelihood.weight.where(likelihood.weight > 0, 1) * likelihood.relative().sqrt()


def likelihood_of(
    loss: Tensor, outputs: Tensor, distribution: Distribution = "auto", remedy: str = _REMEDY
) -> Likelihood:
    """Find out of which distribution's labels a loss is the negative logarithm.

    Args:
        loss: A scalar with a graph from the outputs, which is kept.
        outputs: ``[samples, ...]``.
        distribution: The one it must be; the weights of a loss that is another one are 1 for all terms that it depends on.
        remedy: What to do if it is none of those known, a sentence.

    Raises:
        ModelError: If it is none, samples meet in the loss, or it is not finite.
    """
    gradient = output_gradient(loss, outputs)
    try:
        with second_derivative([gradient], remedy):
            for found in _fitting(gradient, outputs):
                if distribution in ("auto", found.distribution):
                    return found
            check_apart(gradient, outputs)
    except OnceDifferentiable:
        if distribution == "auto":
            raise
    if distribution == "auto":
        raise ModelError(
            f"The loss is no softmax cross-entropy, no sigmoid cross-entropy and no squared error of the outputs (shape {tuple(outputs.shape)}), "
            f"so it cannot be told what labels are drawn from. {remedy}"
        )
    axis = min(1, outputs.ndim - 1)
    used = check_finite(gradient.detach()).ne(0)
    weight = used.any(axis, keepdim=True) if distribution == "categorical" else used
    return Likelihood(distribution, axis, weight.double())


def _fitting(gradient: Tensor, outputs: Tensor) -> Iterator[Likelihood]:
    """Yield what has the curvature of a loss. Weights are fitted to its product with one vector, and must give that with another."""
    z, fixed, rounding = outputs.detach().double(), torch.Generator().manual_seed(0), torch.finfo(outputs.dtype).eps
    signs = torch.randint(0, 2, (2, *z.shape), generator=fixed) * 2 - 1
    first, second = (signs * (1 + torch.rand(signs.shape, generator=fixed))).to(z)
    curved, other = (check_finite(along(gradient, outputs, v).double()) for v in (first, second))
    axes = [a for a in dict.fromkeys((1, outputs.ndim - 1)) if 0 < a < outputs.ndim and outputs.shape[a] > 1]
    if gradient.detach().any() and not curved.any():  # such as the absolute error, or a softmax that is certain
        yield from _certain(gradient.detach().double(), z, axes)
        return
    like = max(1e-3, 4 * rounding)  # up to here, relative to the largest, curvatures agree
    least = min(1e3 * rounding, 1e-2)  # below it, as of a saturated term, rounding is all that is left

    def fitted(distribution: str, axis: int, unit: Unit, *more: tuple[Tensor, Tensor]) -> Iterator[Likelihood]:
        over = (axis,) if distribution == "categorical" else ()
        expected = unit(first)
        norm = _total(expected.square(), over)
        weight = _total(curved * expected, over).clamp_min(0) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        sure, counted = norm > least**2, weight > 0
        known = bool((sure & counted).any())
        typical = weight[sure & counted if known else counted].median().nan_to_num()
        floor = 16 * min(rounding, torch.finfo(torch.float32).eps) * (float(typical) if known else 1.0)
        if all(_near(found, wanted, like, floor) for found, wanted in ((weight * unit(second), other), *more)):
            used = _total(gradient.detach().square(), over) > 0
            if distribution == "gaussian" and bool((used & ~counted).any()):
                return  # terms with a slope but no curvature, as of a Huber loss
            yield Likelihood(distribution, axis, weight.where(sure, used * typical))

    for axis in axes:
        yield from fitted("categorical", axis, functools.partial(_softmax_product, z.softmax(axis), axis))
    third = along(along(gradient, outputs, first, create_graph=True), outputs, second).double()
    share = z.sigmoid()
    if third.abs().max() <= like / 100 * curved.abs().max():
        yield from fitted("gaussian", 0, lambda v: v)
    slope = second * curved * (1 - 2 * share), third
    yield from fitted("bernoulli", 0, lambda v: share * (1 - share) * v, slope)


def _certain(slope: Tensor, z: Tensor, axes: Sequence[int]) -> Iterator[Likelihood]:
    """Yield the softmax whose cross-entropy has this slope, which is all that is left of it where one class has all of the probability."""
    for axis in axes:
        label = F.one_hot(slope.argmin(axis), z.shape[axis]).movedim(-1, axis)
        weight = -(slope * label).sum(axis, keepdim=True)
        if _near(slope, weight * (z.softmax(axis) - label), 1e-6, 0.0):
            yield Likelihood("categorical", axis, weight.where(weight > 0, weight[weight > 0].median()))


def _softmax_product(share: Tensor, axis: int, v: Tensor) -> Tensor:
    return share * (v - (share * v).sum(axis, keepdim=True))


def _total(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    return values.sum(axes, keepdim=True) if axes else values


def _near(values: Tensor, expected: Tensor, share: float, floor: float) -> bool:
    return bool((values - expected).abs().max() <= share * expected.abs().max() + floor)


def output_gradient(loss: Tensor, outputs: Tensor) -> Tensor:
    """Return the gradient of a loss at the outputs, with its graph.

    Raises:
        ModelError: If the loss does not depend on them, is not finite, or they have no axis of samples.
    """
    gradient: Tensor | None
    check_finite(loss)
    if outputs.ndim == 0:
        raise ModelError("The outputs whose curvature is asked for are a single number, without an axis of samples.")
    (gradient,) = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ModelError(
            f"The loss does not depend on the outputs (shape {tuple(outputs.shape)}) whose curvature is asked for. "
            "Name the module that gives the logits."
        )
    return gradient


def along(values: Tensor, outputs: Tensor, vector: Tensor, create_graph: bool = False) -> Tensor:
    """Return the gradient at the outputs of ``values`` summed with a vector: of a gradient, the product of the Hessian with the vector."""
    if not values.requires_grad:  # such as the gradient of a loss that is linear in its outputs
        return torch.zeros_like(outputs)
    (product,) = torch.autograd.grad(
        values, outputs, vector.to(values), retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(outputs) if product is None else product


def check_apart(gradient: Tensor, outputs: Tensor, remedy: str = "") -> None:
    """Check that samples do not meet in a loss: moving the outputs of the first half must not change the gradients of the others.

    Args:
        gradient: Of the loss at the outputs, with its graph.
        outputs: ``[samples, ...]``.
        remedy: What to do then, a sentence.

    Raises:
        ModelError: If they do.
    """
    half = len(outputs) // 2
    direction = torch.zeros_like(outputs)
    direction[:half] = 1 + torch.rand(outputs[:half].shape, generator=torch.Generator().manual_seed(0)).to(outputs)
    if half and along(gradient, outputs, direction)[half:].abs().max() > 0:
        raise ModelError(
            f"Samples of a batch meet in the loss, as in a contrastive one; it has no curvature sample by sample. {remedy}".rstrip()
        )


def check_finite(values: Tensor) -> Tensor:
    """Return the values.

    Raises:
        ModelError: If one is not finite.
    """
    if not bool(values.isfinite().all()):
        raise ModelError(
            "The loss of a batch, its logits or their curvature are not finite. Look for a diverged training, a loss that overflows, or batches "
            "with nothing to average over."
        )
    return values
