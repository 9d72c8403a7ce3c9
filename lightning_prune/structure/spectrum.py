"""Spectra and truncations of weight matrices, the linear algebra below LowRank and TRP.

Xu et al., "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", IJCAI 2020 (arXiv:2004.14566): the energy
rule (eq. 5) and the sub-gradient of the nuclear norm (eq. 6). Unlike the authors' code: the share that may be lost
is an argument, and the spectrum comes from the Gram matrix.

Layout: a batch of matrices ``[groups, p, q]``, one per group of a convolution; singular values ``[groups, n]`` with
``n = min(p, q)``, descending. All groups share one rank, the largest that any of them needs.

Values and directions are computed in float64, whatever came; products with known directions in the type of the matrix,
at least float32. The Gram matrix squares the condition: relative to the largest singular value, its vectors span the
right subspace down to 1e-7, and carry over to the other side down to 1e-3; what asks for more is done by a full SVD.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # there, but not in its __all__

from lightning_prune.errors import ModelError, OptionError
from lightning_prune.structure.alignment import alignment_unit

_SPANNED = 1e-7  # relative to s_1: eigenvectors of the Gram matrix err by about eps * (s_1 / s_k)^2
_CARRIED = 1e-3  # V_k = W^T U_k / s_k is orthonormal to the same eps * (s_1 / s_k)^2, here 1e-10
_BLOCKED = 256  # from this size on, half of a symmetric product is worth leaving out
_EXACT_ENERGY = 1e-10  # eigenvalues of the Gram matrix err by about n * eps = 1e-13 of the largest: fit to judge this
_NULL = 1e-14  # singular values below this share of the largest are rounding: no direction belongs to them


class Spectrum(NamedTuple):
    """Singular values of a batch of matrices and the singular vectors of one side.

    Attributes:
        values: Singular values, float64 ``[groups, n]``, descending.
        vectors: Orthonormal columns, float64 ``[groups, p, n]`` if ``on_left``, else ``[groups, q, n]``.
        on_left: Whether ``vectors`` are the left ones; the smaller side is the one computed.
    """

    values: Tensor
    vectors: Tensor
    on_left: bool


class Truncation(NamedTuple):
    """The ``rank`` leading singular triples of a batch of matrices, all float64.

    Attributes:
        left: ``U_k``, orthonormal columns, ``[groups, p, rank]``.
        values: ``s_k``, descending, ``[groups, rank]``.
        right: ``V_k^T``, orthonormal rows, ``[groups, rank, q]``.
        discarded: Sum of the squares of the singular values left out, ``[groups]``: the squared Frobenius error.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    discarded: Tensor

    def product(self) -> Tensor:
        """Return ``U_k diag(s_k) V_k^T``, float64 ``[groups, p, q]``; :func:`project` is the faster way there."""
        return (self.left * self.values[:, None, :]) @ self.right

    def polar(self) -> Tensor:
        """Return ``U_k V_k^T`` without null directions, float64 ``[groups, p, q]``; :func:`polar` is the faster way."""
        alive = self.values > _NULL * self.values[:, :1]
        return (self.left * alive[:, None, :]) @ self.right

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``U_k sqrt(s_k)``, ``[groups, p, rank]``, and ``sqrt(s_k) V_k^T``, ``[groups, rank, q]``."""
        root = self.values.sqrt()
        return self.left * root[:, None, :], root[:, :, None] * self.right


@torch.no_grad()
def spectrum(matrix: Tensor, energy: float | None = None) -> Spectrum:
    """Decompose a batch of matrices by the eigenvectors of their float64 Gram matrices.

    Args:
        matrix: ``[groups, p, q]``, floating point of any precision, on any device.
        energy: Share of the squares that the caller will judge (:func:`rank_for_energy`); one too small for the Gram
            matrix, and an eigensolver that does not converge, bring the full SVD.

    Returns:
        Singular values and the vectors of the smaller side, on the device of ``matrix``. The same bits come for the
        same bits on the same machine; other devices round differently: in a distributed run one rank decides.

    Raises:
        ModelError: If ``matrix`` is not three-dimensional or holds values that are not finite.

    Cost, float64: up to ``p q min(p, q)`` multiply-adds for the Gram matrix, about ``5 min(p, q)^3`` for its vectors. The
    gain over an SVD is 3 to 5 times for the oblong matrices of the channel form and small for square ones.
    """
    wide = _float64(matrix)
    if energy is not None and energy < _EXACT_ENERGY:
        return _spectrum_by_svd(wide)
    on_left = wide.shape[1] <= wide.shape[2]
    gram = _gram(wide if on_left else wide.mT)
    _check_finite(gram.diagonal(dim1=1, dim2=2), wide.shape)
    try:
        squares, vectors = torch.linalg.eigh(gram)  # reads the lower triangle
    except LinAlgError:
        return _spectrum_by_svd(wide)
    return Spectrum(squares.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1), on_left)


def lost_energy(values: Tensor) -> Tensor:
    """Tell which share of the squares is lost at every rank.

    Args:
        values: Singular values, descending, ``[groups, n]``.

    Returns:
        ``sum_{j>k} s_j^2 / sum_j s_j^2`` for ``k = 1..n``, largest over the groups, float64 ``[n]``; zeros lose nothing.
    """
    squares = values.double().square()
    tails = squares.flip(-1).cumsum(-1).flip(-1)  # tails[:, k] = sum of squares from index k on, smallest first
    after = torch.cat([tails[:, 1:], torch.zeros_like(tails[:, :1])], dim=1)
    total = tails[:, :1]
    return torch.where(total > 0, after / total, 0.0).amax(0)


def rank_for_energy(values: Tensor, energy: float) -> int:
    """Find the smallest rank that loses at most a share ``energy`` of the squares in every group.

    Args:
        values: Singular values, descending, ``[groups, n]``.
        energy: Share that may be lost, in [0, 1); ``e`` of the paper: 0.02 on CIFAR, 0.005 on ImageNet.

    Returns:
        The smallest ``k >= 1`` with ``sum_{j>k} s_j^2 <= energy * sum_j s_j^2``, largest over the groups; 1 for zeros.

    Raises:
        OptionError: If ``energy`` is no number in [0, 1).

    >>> [rank_for_energy(torch.tensor([[3.0, 1.0, 0.0]]), energy) for energy in (0.1, 0.05)]
    [1, 2]
    """
    if isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 <= energy < 1:
        allowed = "a number in [0, 1), the share of the squared singular values that may be lost"
        raise OptionError(f"energy: must be {allowed}, got {energy!r}. To keep 98 % write 0.02.")
    return int((lost_energy(values) > energy).sum()) + 1


@torch.no_grad()
def truncate(matrix: Tensor, rank: int, known: Spectrum | None = None) -> Truncation:
    """Compute the leading singular triples.

    Args:
        matrix: ``[groups, p, q]``, floating point of any precision, on any device.
        rank: Number of triples, in 1..min(p, q).
        known: The result of :func:`spectrum` for the same ``matrix``, if it is there already.

    Returns:
        ``rank`` triples per group, float64.

    Raises:
        ModelError: If ``rank`` is out of range, or as :func:`spectrum`.
    """
    _check_rank(matrix, rank)
    wide = _float64(matrix)
    values, vectors, on_left = known or spectrum(wide)
    if not _holds(values, rank, _CARRIED):
        left, values, right = _svd(wide)
        left, right = left[:, :, :rank], right[:, :rank]
    elif on_left:
        left = vectors[:, :, :rank]
        right = (left.mT @ wide) / values[:, :rank, None]
    else:
        right = vectors[:, :, :rank].mT
        left = (wide @ right.mT) / values[:, None, :rank]
    return Truncation(left, values[:, :rank], right, values[:, rank:].square().sum(1))


@torch.no_grad()
def project(matrix: Tensor, rank: int, known: Spectrum | None = None) -> Tensor:
    """Project onto the matrices of at most ``rank``: ``U_k U_k^T W``, the nearest in the Frobenius norm.

    Args:
        matrix: ``[groups, p, q]``, floating point of any precision, on any device.
        rank: Rank of the result, in 1..min(p, q); the full rank changes nothing.
        known: The result of :func:`spectrum` for the same ``matrix``, if it is there already.

    Returns:
        ``[groups, p, q]``, dtype and device of ``matrix``, detached. Rounding to half precision restores full rank.

    Raises:
        ModelError: As :func:`truncate`.
    """
    _check_rank(matrix, rank)
    values, vectors, on_left = known or spectrum(matrix)
    if not _holds(values, rank, _SPANNED):
        values, vectors, on_left = _spectrum_by_svd(_float64(matrix))
    wide = _at_least_float32(matrix)
    rows = wide if on_left else wide.mT
    kept, dropped = vectors[:, :, :rank].to(wide), vectors[:, :, rank:].to(wide)
    few = kept.shape[2] <= dropped.shape[2]  # the thinner of the two costs less
    with torch.autocast(wide.device.type, enabled=False):
        near = kept @ (kept.mT @ rows) if few else rows - dropped @ (dropped.mT @ rows)
    return (near if on_left else near.mT).to(matrix)


@torch.no_grad()
def polar(matrix: Tensor, rank: int, known: Spectrum | None = None) -> Tensor:
    """Compute ``U_k V_k^T``, a sub-gradient of the nuclear norm (the sum of the singular values) at the truncation.

    At full rank it is the gradient at ``matrix`` itself: a step ``W - h U V^T`` lowers every singular value by ``h``.
    Directions whose singular value is zero are left out: pushing along them would raise the norm.

    Args:
        matrix: ``[groups, p, q]``, floating point of any precision, on any device.
        rank: ``k``, in 1..min(p, q).
        known: The result of :func:`spectrum` for the same ``matrix``, if it is there already.

    Returns:
        ``[groups, p, q]``, spectral norm 1 (0 for a matrix of zeros), dtype and device of ``matrix``, detached.

    Raises:
        ModelError: As :func:`truncate`.
    """
    _check_rank(matrix, rank)
    wide = _float64(matrix)
    values, vectors, on_left = known or spectrum(wide)
    if not _holds(values, rank, _CARRIED):
        return truncate(wide, rank, known).polar().to(matrix)
    kept = vectors[:, :, :rank]
    wide = _at_least_float32(matrix)
    whiten = ((kept / values[:, None, :rank]) @ kept.mT).to(wide)  # U_k diag(1/s_k) U_k^T
    with torch.autocast(wide.device.type, enabled=False):
        return (whiten @ wide if on_left else wide @ whiten).to(matrix)


def round_rank(rank: int, multiple: int, limit: int) -> int:
    """Round a rank up to a step that the hardware likes, so that no energy rule is broken by rounding.

    Args:
        rank: At least 1.
        multiple: What ranks should be a multiple of, at least 1; 1 switches rounding off.
        limit: Largest useful rank, at least 1.

    Returns:
        The next multiple of :func:`~lightning_prune.structure.alignment.alignment_unit` at or above ``rank`` or, if that exceeds ``limit``, the
        last one at or below it.

    Raises:
        OptionError: If ``multiple`` is no integer of at least 1.

    >>> round_rank(9, 8, 64), round_rank(9, 8, 15), round_rank(60, 8, 63), round_rank(9, 1, 64)
    (16, 12, 56, 9)
    """
    unit = alignment_unit(multiple, limit)
    return min(-(-rank // unit), limit // unit) * unit


def _float64(matrix: Tensor) -> Tensor:
    if matrix.ndim != 3:
        raise ModelError(f"A batch of matrices [groups, p, q] is needed, got shape {list(matrix.shape)}.")
    device = "cpu" if matrix.device.type == "mps" else matrix.device  # Apple's GPUs have no float64
    return matrix.detach().to(device=device, dtype=torch.float64)


def _at_least_float32(matrix: Tensor) -> Tensor:
    """The type to multiply in where directions are known: float64 adds nothing to a result that is rounded to float32."""
    return matrix.detach() if matrix.dtype == torch.float64 else matrix.detach().float()


def _check_rank(matrix: Tensor, rank: int) -> None:
    p, q = matrix.shape[-2:]
    if not 1 <= rank <= min(p, q):
        raise ModelError(f"A matrix of {p} x {q} has no truncation of rank {rank}: take 1 to {min(p, q)}.")


def _check_finite(values: Tensor, shape: torch.Size) -> None:
    if not bool(values.isfinite().all()):
        reason = f"A weight matrix of shape {list(shape)} holds values that are not finite: it has no singular values."
        raise ModelError(f"{reason} Lower the learning rate or start from a sound checkpoint.")


def _holds(values: Tensor, rank: int, share: float) -> bool:
    """Tell whether the last singular value kept is large enough, in every group, for what is derived from it."""
    return bool(((values[:, rank - 1] >= share * values[:, 0]) & (values[:, 0] > 0)).all())


def _gram(rows: Tensor) -> Tensor:
    """Lower triangle of ``rows @ rows^T``, by quarters where that is worth it: 10/16 of the multiply-adds."""
    size = rows.shape[1]
    if size < _BLOCKED:
        return rows @ rows.mT
    gram = rows.new_zeros(rows.shape[0], size, size)
    quarter = -(-size // 4)
    for start in range(0, size, quarter):
        end = min(start + quarter, size)
        gram[:, start:end, :end] = rows[:, start:end] @ rows[:, :end].mT
    return gram


def _svd(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_finite(wide, wide.shape)
    try:
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
    except LinAlgError:  # LAPACK's solver is sturdier than the Jacobi one of CUDA
        left, values, right = (part.to(wide.device) for part in torch.linalg.svd(wide.cpu(), full_matrices=False))
    return left, values, right


def _spectrum_by_svd(wide: Tensor) -> Spectrum:
    left, values, right = _svd(wide)
    return Spectrum(values, left, True) if wide.shape[1] <= wide.shape[2] else Spectrum(values, right.mT, False)
