"""Eigenvectors of Kronecker factors: the basis in which the curvature of a layer is nearly diagonal.

George, Laurent, Bouthillier, Ballas and Vincent, "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis", NeurIPS 2018
(arXiv:1806.03884). Eigenvalues ascend, so index 0 is the direction of least curvature. Eigenvectors have no sign, and those of equal eigenvalues no
direction of their own: what is computed with them must not depend on either, and processes that shall agree share one copy.
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Eigenbasis:
    """Orthonormal directions at both sides of a layer, float64; ``groups`` is 1 but for grouped convolutions.

    Attributes:
        inputs: Directions of the inputs, ``Q_A``, in columns, ``[groups, in, r]``, ``r`` being ``in`` or less.
        outputs: Directions of the outputs, ``Q_S``, in columns, ``[groups, out, s]``.
        input_values: The eigenvalues of the inputs, ascending, not negative, ``[groups, r]``.
        output_values: Those of the outputs, ``[groups, s]``.
    """

    inputs: Tensor
    outputs: Tensor
    input_values: Tensor
    output_values: Tensor

    def diagonal(self) -> Tensor:
        """Return the diagonal of K-FAC's curvature in this basis, ``[groups * s, 1, r]``: the same for all taps of a kernel."""
        return (self.output_values.unsqueeze(2) * self.input_values.unsqueeze(1)).flatten(0, 1).unsqueeze(1)


def directions(matrix: Tensor, within: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues and eigenvectors of a factor, of all of it or inside a subspace.

    Args:
        matrix: Symmetric, ``[..., n, n]``. Eigenvalues that rounding made negative count as 0.
        within: Orthonormal columns ``Q`` that span the subspace, ``[..., n, r]``; the eigenvectors are then ``Q U`` with those ``U`` of ``Q^T A Q``.

    Returns:
        Eigenvalues ``[..., r]``, ascending, and eigenvectors in columns, ``[..., n, r]``, float64, where the matrix lies; computed on the CPU
        if its device has no double precision.
    """
    exact = matrix.cpu() if matrix.device.type == "mps" else matrix
    exact = exact.double()
    columns = None if within is None else within.to(exact)
    values, vectors = torch.linalg.eigh(exact if columns is None else columns.mT @ exact @ columns)
    return values.clamp_min(0), vectors if columns is None else columns @ vectors
