"""A kernel as a sum of rank-one terms: inputs times taps times outputs, by alternating least squares.

Wang, Grosse, Fidler and Zhang, "EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis", ICML 2019 (arXiv:1905.05934):
``W[p, q, k] ~ sum_m U[p, m] V[q, m] Z[k, m]`` is a pointwise, a depthwise and a pointwise convolution. Unlike the authors' code, the start is seeded
and, for a rank up to the numbers of inputs and outputs, one of two is the algebraic solution, which is exact for a kernel that is such a sum; an
update that could be singular stays near the last one, so that the loss never rises.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_prune.errors import ModelError

_STAY = (
    1e-12  # weight of staying near the last factor, as a share of the mean curvature: keeps singular updates defined
)
_EXACT = 1e-27  # squared residual, as a share of the kernel's square, that is rounding
_WEIGHT = (
    1e-12  # smallest weight, as a share of the largest: a direction that does not count must not be divided by zero
)


@dataclasses.dataclass(frozen=True)
class Separable:
    """The terms of a kernel, float64.

    Attributes:
        outputs: ``U``, ``[outputs, rank]``.
        inputs: ``V``, ``[inputs, rank]``.
        taps: ``Z``, ``[taps, rank]``.
        losses: Squared residual after each sweep, as a share of the square of the kernel, both weighted.
    """

    outputs: Tensor
    inputs: Tensor
    taps: Tensor
    losses: tuple[float, ...] = ()

    def product(self) -> Tensor:
        """Return the kernel that the terms sum to, ``[outputs, inputs, taps]``."""
        return (self.outputs @ self._columns().T).view(len(self.outputs), len(self.inputs), len(self.taps))

    def _columns(self) -> Tensor:
        """Return each term without its output, ``[inputs * taps, rank]``."""
        return (self.inputs[:, None] * self.taps).flatten(0, 1)


@torch.no_grad()
def separate(
    kernel: Tensor,
    rank: int,
    weights_out: Tensor | None = None,
    weights_in: Tensor | None = None,
    *,
    sweeps: int = 300,
    seed: int = 0,
) -> Separable:
    """Fit a sum of ``rank`` terms to a kernel. The same bits come for the same bits on the same machine.

    Args:
        kernel: ``[outputs, inputs, *taps]``, floating point of any precision.
        rank: Number of terms, at least 1.
        weights_out: What the square of an error in an output counts, ``[outputs]``, not negative; None for 1.
        weights_in: Likewise per input, ``[inputs]``; the two multiply.
        sweeps: Most of them. Both starts get 50; the better one goes on until a sweep lowers the loss by less than 1e-5 of it.
        seed: Of the random start.

    Returns:
        The terms, on the device of ``kernel``; the three factors of a term have the same norm in the weighted kernel.

    Raises:
        ModelError: If ``kernel`` holds values that are not finite.
    """
    target = kernel.detach().double().flatten(2)
    if not bool(target.isfinite().all()):
        raise ModelError(
            f"A kernel of shape {list(kernel.shape)} holds values that are not finite: it cannot be fitted."
        )
    root_out, root_in = (_root(w, n).to(target) for w, n in zip((weights_out, weights_in), target.shape, strict=False))
    scaled = target * root_out[:, None, None] * root_in[:, None]
    size = scaled.norm().clamp_min(torch.finfo(torch.float64).tiny)
    scaled = scaled / size
    fits = [_descend(scaled, start, min(50, sweeps)) for start in _starts(scaled, rank, seed)]
    best = min(fits, key=lambda fit: fit.losses[-1])
    best = _descend(scaled, best, sweeps - len(best.losses), falls=1e-5)
    third = size ** (1 / 3)
    return Separable(
        third * best.outputs / root_out[:, None], third * best.inputs / root_in[:, None], third * best.taps, best.losses
    )


def _root(weights: Tensor | None, count: int) -> Tensor:
    if weights is None:
        return torch.ones(count)
    wide = weights.detach().double()
    return wide.clamp_min(_WEIGHT * float(wide.max())).sqrt() if bool((wide > 0).any()) else torch.ones(count)


def _starts(kernel: Tensor, rank: int, seed: int) -> Iterator[Separable]:
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs, taps = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in kernel.shape)
    yield Separable(outputs.to(kernel), inputs.to(kernel), taps.to(kernel))
    if rank <= min(kernel.shape[:2]):
        mixed = torch.randn(kernel.shape[2], 2, generator=generator, dtype=torch.float64).to(kernel)
        yield _diagonalized(kernel, rank, mixed)


def _diagonalized(kernel: Tensor, rank: int, mixed: Tensor) -> Separable:
    """Read the terms off the eigenvectors that two mixtures of the taps have in common (Leurgans, Ross and Abel 1993)."""
    left = torch.linalg.svd(kernel.flatten(1), full_matrices=False)[0][:, :rank]
    right = torch.linalg.svd(kernel.transpose(0, 1).flatten(1), full_matrices=False)[0][:, :rank]
    one, two = torch.einsum("oik,op,iq,kn->npq", kernel, left, right, mixed)
    values, vectors = torch.linalg.eig(one @ torch.linalg.pinv(two))
    outputs = left @ torch.where(values.imag >= 0, vectors.real, vectors.imag)  # a conjugate pair spans a real plane
    terms = (torch.linalg.pinv(outputs) @ kernel.flatten(1)).view(rank, *kernel.shape[1:])
    u, s, vh = torch.linalg.svd(terms, full_matrices=False)
    return Separable(outputs, (u[:, :, 0] * s[:, :1]).T.contiguous(), vh[:, 0].T.contiguous())


def _descend(kernel: Tensor, terms: Separable, sweeps: int, falls: float = 0.0) -> Separable:
    """Sweep over the three factors until a sweep lowers the loss by less than a share ``falls`` of it."""
    flat, losses = kernel.flatten(1), list(terms.losses)
    outputs, inputs, taps, columns = terms.outputs, terms.inputs, terms.taps, terms._columns()
    for _ in range(sweeps):
        if (losses and losses[-1] < _EXACT) or (len(losses) > 1 and losses[-2] - losses[-1] < falls * losses[-1]):
            break
        new_out = _solve(flat @ columns, outputs, inputs, taps)
        part = (flat.T @ new_out).view(*kernel.shape[1:], -1)
        new_in = _solve((part * taps).sum(1), inputs, new_out, taps)
        new_taps = _solve((part * new_in[:, None]).sum(0), taps, new_out, new_in)
        made = _balanced(new_out, new_in, new_taps)
        loss = float((flat - made.outputs @ made._columns().T).square().sum())
        if losses and loss > losses[-1]:  # by rounding: there is nothing left to gain
            break
        outputs, inputs, taps, columns = made.outputs, made.inputs, made.taps, made._columns()
        losses.append(loss)
    return Separable(outputs, inputs, taps, tuple(losses))


def _solve(right: Tensor, last: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """Least squares for one factor, the others given, held to its last value by a hair."""
    gram = (one.T @ one) * (two.T @ two)
    hair = _STAY * gram.diagonal().mean() + torch.finfo(torch.float32).tiny
    held = gram + hair * torch.eye(len(gram)).to(gram)
    found: Tensor = torch.linalg.solve(held, right + hair * last, left=False)
    return found


def _balanced(*factors: Tensor) -> Separable:
    norms = torch.stack([factor.norm(dim=0) for factor in factors]).clamp_min(torch.finfo(torch.float64).tiny)
    outputs, inputs, taps = (
        factor * (norms.log().mean(0).exp() / norm) for factor, norm in zip(factors, norms, strict=True)
    )
    return Separable(outputs, inputs, taps)
