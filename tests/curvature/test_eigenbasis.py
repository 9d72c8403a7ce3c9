"""Eigenbases: what must hold of them whatever signs and directions the eigenvectors have."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.curvature.eigenbasis import Eigenbasis, directions
from lightning_prune.curvature.kronecker import SecondMoments


def symmetric(*shape, values=None):
    columns = torch.linalg.qr(torch.randn(*shape, shape[-1], dtype=torch.float64))[0]
    values = torch.rand(*shape, dtype=torch.float64) if values is None else torch.as_tensor(values).double()
    return (columns * values.unsqueeze(-2)) @ columns.mT


@pytest.mark.parametrize("shape", [(5,), (3, 4)])
def test_directions_are_orthonormal_ascend_and_give_the_factor_back(shape):
    matrix = symmetric(*shape)
    values, columns = directions(matrix)
    identity = torch.eye(shape[-1]).double().expand_as(matrix)
    torch.testing.assert_close(columns.mT @ columns, identity)
    torch.testing.assert_close((columns * values.unsqueeze(-2)) @ columns.mT, matrix)
    assert (values.diff(dim=-1) >= 0).all()


def test_what_rounding_makes_negative_is_zero_and_single_precision_is_taken():
    vector = torch.randn(6)
    values, columns = directions(torch.outer(vector, vector))
    assert values.dtype == columns.dtype == torch.float64
    assert values.min() == 0
    torch.testing.assert_close(values[-1], vector.double().square().sum(), rtol=1e-6, atol=0)


def test_inside_a_subspace_they_are_those_of_the_projected_factor():
    matrix, span = symmetric(6), torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64))[0]
    values, columns = directions(matrix, span)
    torch.testing.assert_close(columns.mT @ columns, torch.eye(3).double())
    torch.testing.assert_close(span @ (span.mT @ columns), columns)
    torch.testing.assert_close(columns.mT @ matrix @ columns, values.diag())
    whole, all_columns = directions(matrix)
    top, top_columns = directions(matrix, all_columns[:, 3:])
    torch.testing.assert_close(top, whole[3:])
    torch.testing.assert_close((top_columns.mT @ all_columns[:, 3:]).abs(), torch.eye(3).double())


def test_the_diagonal_is_the_product_of_the_eigenvalues_in_the_order_of_the_weight():
    inputs, outputs = symmetric(2, 3), symmetric(2, 4)
    (a, columns_a), (s, columns_s) = directions(inputs), directions(outputs)
    basis = Eigenbasis(columns_a, columns_s, a, s)
    for group in range(2):
        columns = torch.kron(columns_s[group].contiguous(), columns_a[group].contiguous())
        expected = (columns.mT @ torch.kron(outputs[group], inputs[group]) @ columns).diagonal()
        torch.testing.assert_close(basis.diagonal()[4 * group : 4 * group + 4].flatten(), expected)


def test_damage_does_not_depend_on_signs_nor_its_sum_over_an_eigenspace_on_directions_in_it():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3).double(), torch.randn(7, 4, dtype=torch.float64)
    (a, columns_a), (s, columns_s) = directions(symmetric(4, values=[1, 2, 2, 2])), directions(symmetric(3))
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    turned = torch.cat([-columns_a[:, :1], columns_a[:, 1:] @ turn], 1)

    def damage(columns, signs):
        basis = Eigenbasis(columns[None], (columns_s * signs)[None], a[None], s[None])
        seen = SecondMoments({"": layer}, {"": basis})
        with seen.watching():
            z = layer(x)
        seen.backward(z, z.detach().softmax(1) - F.one_hot(torch.arange(7) % 3, 3))
        core = basis.outputs[0].mT @ layer.weight.detach() @ basis.inputs[0]
        return core.square() * basis.diagonal()[:, 0], seen.moments()[""][:, 0]

    (kfac, ekfac), (kfac_turned, ekfac_turned) = (
        damage(columns_a, torch.ones(3)),
        damage(turned, torch.tensor([1, -1, -1])),
    )
    torch.testing.assert_close(kfac[:, 0], kfac_turned[:, 0])
    for one, other in ((kfac, kfac_turned), (ekfac, ekfac_turned)):
        torch.testing.assert_close(one[:, 1:].sum(1), other[:, 1:].sum(1))
        assert (one[:, 1:] - other[:, 1:]).abs().max() > 1e-3 * one.abs().max()
