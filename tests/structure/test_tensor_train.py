"""Tensor trains of weights: decomposition, errors, sizes, costs, and what is drawn from scratch."""

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_prune.errors import ModelError, OptionError
from lightning_prune.structure.tensor_train import (
    Form,
    balance,
    contract,
    cut_values,
    draw,
    entropies,
    entropy,
    factors,
    fold,
    modes_for,
    tt_svd,
    tt_svd_within,
    unfold,
    useful_bonds,
)

SIZES = (6, 5, 8, 4)


@pytest.fixture
def tensor():
    return torch.randn(SIZES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def tails(tensor, bonds):
    """Squares beyond each bond in the unfoldings of the tensor itself, by numpy."""
    found = []
    for k, bond in enumerate(bonds, 1):
        matrix = tensor.numpy().reshape(math.prod(tensor.shape[:k]), -1)
        found.append(float((np.linalg.svd(matrix, compute_uv=False)[bond:] ** 2).sum()))
    return found


@pytest.mark.parametrize("bonds", [(6, 20, 4), (3, 7, 2), (1, 1, 1), (6, 12, 4), (2, 10, 3)])
def test_the_squared_error_is_the_sum_of_what_was_discarded_and_lies_between_both_bounds(tensor, bonds):
    train = tt_svd(tensor, bonds)
    error = float((tensor - contract(train.cores)).square().sum())
    assert sum(train.discarded) == pytest.approx(error, rel=1e-10, abs=1e-20)
    least, most = max(tails(tensor, bonds)), sum(tails(tensor, bonds))
    assert least * (1 - 1e-12) - 1e-20 <= error <= most * (1 + 1e-12) + 1e-20
    assert train.bonds == bonds


def test_all_cores_but_the_last_are_orthonormal(tensor):
    for core in tt_svd(tensor, (3, 7, 2)).cores[:-1]:
        matrix = core.flatten(0, 1)
        torch.testing.assert_close(
            matrix.T @ matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype), rtol=0, atol=1e-12
        )


def test_a_tensor_whose_small_directions_matter_keeps_orthonormal_cores():
    """The Gram matrix loses them: singular values from 1 to 1e-9."""
    left, right = (torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q for _ in range(2))
    tensor = (left * torch.logspace(0, -9, 12, dtype=torch.float64)) @ right
    train = tt_svd(tensor, (11,))
    assert (train.cores[0][0].T @ train.cores[0][0] - torch.eye(11)).abs().max() < 1e-6
    assert (tensor - contract(train.cores)).norm() == pytest.approx(1e-9, rel=1e-3)


def test_the_error_falls_with_every_bond(tensor):
    errors = [sum(tt_svd(tensor, useful_bonds(SIZES, bond)).discarded) for bond in range(1, 31)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-20


@pytest.mark.parametrize("error", [0.0, 1e-7, 0.1, 0.5, 0.9])
def test_an_error_is_kept_and_what_one_cut_leaves_the_next_one_uses(tensor, error):
    train = tt_svd_within(tensor, error)
    share = float((tensor - contract(train.cores)).norm() / tensor.norm())
    assert share <= error + 1e-12
    even = (
        error * float(tensor.norm()) / math.sqrt(3)
    )  # of what is left, not of an even share, each cut takes as much as it may
    rest, spent, left = tensor.reshape(1, -1), 0.0, 3
    for core in train.cores[:-1]:
        values = torch.linalg.svdvals(rest.reshape(core.shape[0] * core.shape[1], -1)).square()
        allowed = (3 * even**2 - spent) / left
        if core.shape[2] > 1:
            assert values[core.shape[2] - 1 :].sum() > allowed - 1e-12
        spent, left = spent + float(values[core.shape[2] :].sum()), left - 1
        rest = core.flatten(0, 1).T @ rest.reshape(core.shape[0] * core.shape[1], -1)


def test_equal_norms_leave_the_product(tensor):
    cores = tt_svd(tensor, (3, 7, 2)).cores
    even = balance(cores)
    norms = [float(core.norm()) for core in even]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-12)
    torch.testing.assert_close(contract(even), contract(cores), rtol=0, atol=1e-12)
    assert not contract(balance(tt_svd(torch.zeros(4, 5), (2,)).cores)).any()


def test_a_kronecker_product_and_the_identity_have_bond_one():
    a, b, c = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3), (4, 2), (3, 5)))
    form = Form((2, 4, 3), (3, 2, 5), (1, 1))
    weight = torch.kron(torch.kron(a, b), c)
    assert tt_svd_within(fold(weight, form), 1e-9).bonds == (1, 1)
    square = Form((2, 3, 4), (2, 3, 4), (1, 1))
    assert tt_svd_within(fold(torch.eye(24), square), 1e-9).bonds == (1, 1)


def test_entries_are_products_of_the_cores():
    """The definition, entry by entry: W[(j1 j2), (i1 i2)] = w1[j1, i1] w2[j2, i2]."""
    form = Form((2, 3), (4, 2), (5,))
    train = tt_svd(fold(torch.randn(6, 8, dtype=torch.float64), form), (5,))
    weight = unfold(contract(train.cores), form, (6, 8))
    first, last = train.cores[0].reshape(2, 4, 5), train.cores[1].reshape(5, 3, 2)
    for j1, j2, i1, i2 in itertools.product(range(2), range(3), range(4), range(2)):
        assert weight[3 * j1 + j2, 2 * i1 + i2] == pytest.approx(float(first[j1, i1] @ last[:, j2, i2]), abs=1e-12)


def test_folding_fills_up_with_zeros_and_comes_back():
    form = Form((2, 4), (3, 3), (1, 1), 6)
    weight = torch.randn(7, 8, 2, 3)
    tensor = fold(weight, form)
    assert tensor.shape == (6, 12, 6)
    assert torch.equal(unfold(tensor, form, weight.shape), weight)
    whole = unfold(tensor, form, (8, 9, 2, 3))
    assert not whole[7:].any()
    assert not whole[:, 8:].any()


def test_entropy_lies_between_nothing_and_the_logarithm_of_the_bond(tensor):
    assert entropy(torch.tensor([3.0])) == 0
    assert entropy(torch.ones(8)) == pytest.approx(math.log(8))
    assert entropy(torch.tensor([3.0, 4.0])) == pytest.approx(-0.36 * math.log(0.36) - 0.64 * math.log(0.64))
    assert entropy(torch.zeros(3)) == 0
    train = tt_svd(tensor, (3, 7, 2))
    for gauge in (train.cores, balance(train.cores)):
        found = [entropy(values) for values in cut_values(contract(gauge))]
        assert found == pytest.approx([entropy(values) for values in cut_values(contract(train.cores))], abs=1e-9)
        assert all(0 <= s <= math.log(bond) + 1e-9 for s, bond in zip(found, train.bonds, strict=True))
        assert entropies(gauge) == pytest.approx(found, abs=1e-9)


def test_entropies_are_those_of_the_product_in_any_gauge():
    form = Form((3, 2, 4), (2, 5, 3), (6, 12, 9), 9)  # the second bond is larger than the right side of it lets count
    cores = draw(form, 1.0, seed=0)
    expected = [entropy(values) for values in cut_values(contract(cores))]
    assert entropies(cores) == pytest.approx(expected, abs=1e-9)
    mix = torch.randn(12, 12, dtype=torch.float64)
    cores[1], cores[2] = cores[1] @ mix, torch.einsum("ab,bpc->apc", mix.inverse(), cores[2])
    assert entropies(cores) == pytest.approx(expected, abs=1e-9)
    assert entropies([torch.zeros(1, 4, 2), torch.zeros(2, 5, 1)]) == [0.0]


@pytest.mark.parametrize("kernel", [0, 9])
def test_parameters_and_multiply_adds_are_what_single_contractions_cost(kernel):
    form = Form((3, 4, 2), (2, 5, 3), (4, 6, 7)[: 3 if kernel else 2], kernel)
    ends = (1, *form.bonds, 1)
    shapes = [(ends[k], size, ends[k + 1]) for k, size in enumerate(form.sizes)]
    assert form.params == sum(math.prod(shape) for shape in shapes)
    outer, inner = 5, 11
    last = ends[3]
    left = inner * (4 * 3 * 30 + 4 * 6 * 20 * 3 * 3 + 6 * last * 6 * 12) + outer * 24 * last * kernel
    right = outer * (30 * last * kernel + last * 6 * 6 * 10 + 6 * 4 * 20 * 2 * 2 + 4 * 6 * 8)
    dense = outer * 24 * 30 * max(kernel, 1) + 6 * 20 * 4 * 6
    dense += 6 * 6 * last * kernel + 24 * 30 * max(kernel, 1) * 6
    assert form.multiply_adds(outer, inner) == {"left": left, "right": right, "dense": dense}


@pytest.mark.parametrize(
    ("outputs", "inputs", "bond", "share"),
    [
        ((4, 4, 4, 4), (4, 7, 7, 4), 4, 0.48),
        ((4, 4, 4, 4), (4, 7, 7, 4), 8, 1.74),
        ((4, 4, 4, 4), (4, 7, 7, 4), 16, 6.6),
        ((16, 16, 16), (16, 16, 16), 8, 0.31),
        ((16, 16, 16), (16, 16, 16), 16, 1.1),
    ],
)
def test_few_parameters_are_not_few_multiply_adds(outputs, inputs, bond, share):
    form = Form(outputs, inputs, (1,) * (len(inputs) - 1))
    form = form.with_bonds(useful_bonds(form.sizes, bond))
    costs = form.multiply_adds()
    assert min(costs["left"], costs["right"]) / (form.rows * form.columns) == pytest.approx(share, rel=0.05)


def test_the_way_follows_batch_and_what_is_allowed():
    form = Form((32, 32), (32, 32), (16,))
    assert form.way(1) == "left"
    assert form.way(256) == "dense"
    assert form.way(256, allowed=("left", "right")) == "left"
    assert Form((4, 2), (16, 24), (8,)).way(1) == "right"


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [
        (784, 2, (28, 28)),
        (4096, 3, (16, 16, 16)),
        (120, 2, (10, 12)),
        (1, 3, (1, 1, 1)),
        (4, 4, (1, 1, 2, 2)),
        (7, 2, (2, 4)),  # filled up to 8
        (97, 2, (7, 14)),  # to 98
        (30, 1, (30,)),
    ],
)
def test_factors_are_as_equal_as_possible(size, count, expected):
    assert factors(size, count) == expected


def test_any_size_is_filled_up_by_few():
    for size, count in itertools.product(range(1, 300), (2, 3, 4)):
        found = factors(size, count)
        assert size <= math.prod(found) <= size * 1.1 + 2 * (count - 1)
        assert found[-1] <= 2 * math.prod(found) ** (1 / count) + 1e-9
        if count == 2 and math.prod(found) == size:
            assert found[0] == max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)


def test_sites_are_of_like_size():
    assert modes_for(32, 384, 2) == ((8, 4), (16, 24))


def test_bonds_are_lowered_to_what_is_of_use():
    assert useful_bonds((4, 4, 9)) == (4, 9)
    assert useful_bonds((4, 9, 3), (100, 100)) == (4, 3)
    assert useful_bonds((16, 16, 16, 16), (1, 100, 100)) == (
        1,
        16,
        16,
    )  # after a bond of 1 a site of 16 cannot fill more


@pytest.mark.parametrize(
    "form", [Form((4, 4), (4, 7), (5,)), Form((4, 4, 4, 4), (4, 7, 7, 4), (4, 8, 4)), Form((4, 8), (8, 8), (6, 5), 9)]
)
def test_a_weight_drawn_from_scratch_has_the_variance_asked_for(form):
    found = [contract(draw(form, 0.02, seed)).square().mean() for seed in range(60)]
    assert float(torch.stack(found).mean()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(draw(form, 0.02, 3)[0], draw(form, 0.02, 3)[0])


def test_what_cannot_be_is_said():
    with pytest.raises(ModelError, match=r"at most \[4, 9\] are of use"):
        tt_svd(torch.zeros(4, 4, 9), (5, 9))
    with pytest.raises(ModelError, match="bond between each two neighbours, 1 here"):
        Form((2, 2), (2, 2), ())
    with pytest.raises(ModelError, match="at least 1"):
        Form((2, 0), (2, 2), (1,))
    with pytest.raises(OptionError, match=r"error=1\.0"):
        tt_svd_within(torch.ones(4, 4), 1.0)
    with pytest.raises(ModelError, match="not finite"):
        tt_svd(torch.full((4, 4), torch.nan), (2,))
