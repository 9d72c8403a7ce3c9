"""Truncation, projection and nuclear sub-gradient against full SVD, autograd and their defining properties."""

import math

import pytest
import torch

from lightning_prune.errors import ModelError, OptionError
from lightning_prune.structure import spectrum as module
from lightning_prune.structure.alignment import alignment_unit
from lightning_prune.structure.spectrum import (
    lost_energy,
    polar,
    project,
    rank_for_energy,
    round_rank,
    spectrum,
    truncate,
)

SHAPES = [(1, 12, 30), (1, 30, 12), (1, 9, 9), (3, 5, 8), (2, 8, 5), (1, 1, 7), (1, 7, 1)]
EXACT = 1e-10  # of the squared norm; float64 leaves about 1e-14


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(values, p, q, seed=0):
    """Make one matrix with given singular values; the seeded singular vectors come from QR."""
    n = len(values)
    left = torch.linalg.qr(random(p, n, seed=seed)).Q
    right = torch.linalg.qr(random(q, n, seed=seed + 1)).Q
    return ((left * torch.tensor(values, dtype=torch.float64)) @ right.T)[None]


@pytest.fixture
def no_svd(monkeypatch):
    def fail(wide):
        raise AssertionError("full SVD was called")

    monkeypatch.setattr(module, "_svd", fail)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 300, 310), (1, 310, 301)], ids=str)
def test_values_equal_those_of_a_full_svd(shape):
    matrix = random(*shape)
    found = spectrum(matrix)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(matrix), rtol=1e-9, atol=1e-9)
    identity = torch.eye(min(shape[1:]), dtype=torch.float64).expand(shape[0], -1, -1)
    torch.testing.assert_close(found.vectors.mT @ found.vectors, identity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squared_error_of_the_projection_equals_the_discarded_squares(shape):
    matrix = random(*shape)
    squares = torch.linalg.svdvals(matrix).square()
    norm = matrix.square().sum()
    for rank in range(1, min(shape[1:]) + 1):
        error = (matrix - project(matrix, rank)).square().sum(dim=(1, 2))
        torch.testing.assert_close(error, squares[:, rank:].sum(1), rtol=0, atol=EXACT * float(norm))
        torch.testing.assert_close(truncate(matrix, rank).discarded, error, rtol=0, atol=EXACT * float(norm))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_projection_equals_the_truncated_svd(shape):
    matrix = random(*shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    for rank in range(1, min(shape[1:]) + 1):
        twin = (left[:, :, :rank] * values[:, None, :rank]) @ right[:, :rank]
        torch.testing.assert_close(project(matrix, rank), twin, rtol=0, atol=1e-11)
        torch.testing.assert_close(truncate(matrix, rank).product(), twin, rtol=0, atol=1e-11)
        first, second = truncate(matrix, rank).factors()
        torch.testing.assert_close(first @ second, twin, rtol=0, atol=1e-11)
        torch.testing.assert_close(first.square().sum(1), second.square().sum(2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("energy", [0.005, 0.02, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_projection_by_energy_stays_within_the_energy_and_has_the_rank(shape, energy):
    matrix = random(*shape)
    known = spectrum(matrix, energy)
    rank = rank_for_energy(known.values, energy)
    near = project(matrix, rank, known)
    lost = (matrix - near).square().sum(dim=(1, 2)) / matrix.square().sum(dim=(1, 2))
    assert bool((lost <= energy + 1e-12).all())
    assert torch.linalg.matrix_rank(near).tolist() == [rank] * shape[0]


def test_projection_is_idempotent_and_the_full_rank_leaves_the_bits():
    matrix = random(2, 10, 14)
    once = project(matrix, 4)
    torch.testing.assert_close(project(once, 4), once, rtol=0, atol=1e-12)
    assert torch.equal(project(matrix, 10), matrix)


def test_rank_rule_is_met_and_maximal_by_naive_sums():
    for seed in range(20):
        values = random(2, 7, seed=seed).abs().sort(dim=1, descending=True).values
        for energy in (0.0, 1e-6, 0.005, 0.02, 0.1, 0.5, 0.99):

            def meets(rank, values=values, energy=energy):
                return all(
                    math.fsum(s * s for s in row[rank:]) <= energy * math.fsum(s * s for s in row)
                    for row in values.tolist()
                )

            rank = rank_for_energy(values, energy)
            assert meets(rank)
            assert rank == 1 or not meets(rank - 1)


def test_rank_is_the_largest_that_any_group_needs():
    values = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    assert rank_for_energy(values, 0.01) == 3
    assert lost_energy(values).tolist() == pytest.approx([2 / 3, 1 / 3, 0.0, 0.0])


def test_rank_of_zeros_is_one_and_they_stay_zero():
    zeros = torch.zeros(2, 4, 6)
    assert rank_for_energy(spectrum(zeros).values, 0.02) == 1
    assert torch.equal(project(zeros, 1), zeros)
    assert torch.equal(polar(zeros, 4), zeros)
    mixed = torch.cat([zeros[:1], random(1, 4, 6).float()])
    torch.testing.assert_close(polar(mixed, 2)[1], polar(mixed[1:], 2)[0])
    assert rank_for_energy(spectrum(mixed).values, 0.02) == rank_for_energy(spectrum(mixed[1:]).values, 0.02)


@pytest.mark.parametrize("energy", [True, -0.1, 1.0, math.nan, "0.02", None])
def test_energy_out_of_range_is_named(energy):
    with pytest.raises(OptionError, match=r"energy: must be a number in \[0, 1\)"):
        rank_for_energy(torch.ones(1, 3), energy)


def test_polar_has_the_pairing_and_the_norm_of_a_sub_gradient():
    matrix = random(2, 12, 20)
    for rank in (1, 5, 12):
        near, direction = project(matrix, rank), polar(matrix, rank)
        pairing = (direction * near).sum(dim=(1, 2))
        torch.testing.assert_close(pairing, torch.linalg.svdvals(near).sum(1), rtol=1e-10, atol=0)
        torch.testing.assert_close(torch.linalg.matrix_norm(direction, 2), torch.ones(2).double(), rtol=0, atol=1e-9)


def test_polar_satisfies_the_sub_gradient_inequality_for_1000_matrices():
    matrix = random(1, 8, 11)
    near, direction = project(matrix, 3), polar(matrix, 3)
    scales = torch.logspace(-3, 1, 1000, dtype=torch.float64)[:, None, None]
    others = near + scales * random(1000, 8, 11, seed=5)
    norms = torch.linalg.svdvals(others).sum(1)
    below = torch.linalg.svdvals(near).sum() + (direction * (others - near)).sum(dim=(1, 2))
    assert bool((norms >= below - 1e-10).all())
    wrong = near.sign()  # the inequality must be able to fail
    assert bool((norms < torch.linalg.svdvals(near).sum() + (wrong * (others - near)).sum(dim=(1, 2))).any())


@pytest.mark.parametrize("shape", [(1, 6, 9), (1, 9, 6)], ids=str)
def test_polar_at_full_rank_equals_autograd_of_the_nuclear_norm(shape):
    matrix = random(*shape).requires_grad_()
    torch.linalg.svdvals(matrix).sum().backward()
    torch.testing.assert_close(polar(matrix, 6), matrix.grad, rtol=0, atol=1e-10)
    assert not polar(matrix, 6).requires_grad


def test_step_along_the_full_rank_polar_lowers_every_singular_value_by_the_step():
    matrix = with_values([5.0, 3.0, 3.0, 1.0, 0.5], 7, 9)
    step = 0.1
    after = torch.linalg.svdvals(matrix - step * polar(matrix, 5))[0, :5]
    torch.testing.assert_close(after, torch.tensor([4.9, 2.9, 2.9, 0.9, 0.4], dtype=torch.float64), rtol=0, atol=1e-10)


def test_rank_never_rises_while_the_steps_stay_under_the_bound_of_theorem_2():
    energy, steps = 0.05, 20
    weight = random(1, 16, 24)
    rank = rank_for_energy(spectrum(weight).values, energy)
    generator = torch.Generator().manual_seed(1)
    for _ in range(15):
        weight = near = project(weight, rank)
        largest = 0.0
        for _ in range(steps):
            move = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            move *= 0.8 * math.sqrt(energy) / steps * near.norm() / move.norm()
            largest = max(largest, float(move.norm()))
            weight = weight + move
        assert largest < math.sqrt(energy) / steps * float(weight.norm()), "the bound of the theorem must hold here"
        next_rank = rank_for_energy(spectrum(weight).values, energy)
        assert next_rank <= rank
        rank = next_rank


def test_small_singular_values_are_right_down_to_1e_8():
    wanted = torch.logspace(0, -8, 9, dtype=torch.float64)
    matrix = with_values(wanted.tolist(), 9, 40)
    torch.testing.assert_close(spectrum(matrix).values[0, :8], wanted[:8], rtol=2e-2, atol=0)
    exact = spectrum(matrix, energy=1e-15).values[0]
    torch.testing.assert_close(exact, wanted, rtol=1e-6, atol=0)
    assert rank_for_energy(exact[None], 1e-15) == 8  # loses 1e-16; at 7 it would lose 1.01e-14
    assert rank_for_energy(exact[None], 2e-14) == 7


@pytest.mark.parametrize("rank", [2, 5, 8, 9])
def test_truncation_is_sharp_on_an_ill_conditioned_spectrum(rank):
    values = [10.0**-i for i in range(9)]
    matrix = with_values(values, 12, 30)
    cut = truncate(matrix, rank)
    identity = torch.eye(rank, dtype=torch.float64)[None]
    torch.testing.assert_close(cut.left.mT @ cut.left, identity, rtol=0, atol=1e-9)
    torch.testing.assert_close(cut.right @ cut.right.mT, identity, rtol=0, atol=1e-9)
    torch.testing.assert_close(polar(matrix, rank), cut.left @ cut.right, rtol=0, atol=1e-6)
    lost = sum(s * s for s in values[rank:])
    assert float((matrix - project(matrix, rank)).square().sum()) == pytest.approx(lost, rel=1e-2, abs=1e-17)
    assert float((matrix - cut.product()).square().sum()) == pytest.approx(lost, rel=1e-2, abs=1e-17)


def test_projection_is_right_below_what_the_gram_matrix_can_see():
    matrix = with_values([1.0, 1e-9, 1e-10], 20, 30)
    for side in (matrix, matrix.mT):
        error = (side - project(side, 2)).double().norm()
        assert float(error) == pytest.approx(1e-10, rel=1e-3)


def test_ordinary_spectra_never_need_the_full_svd(no_svd):
    matrix = random(1, 20, 60)
    known = spectrum(matrix, 0.005)
    rank = rank_for_energy(known.values, 0.005)
    project(matrix, rank, known), polar(matrix, rank, known), truncate(matrix, rank, known)


def test_spectrum_of_an_eigensolver_that_fails_comes_from_the_full_svd(monkeypatch):
    def fail(gram):
        raise module.LinAlgError("did not converge")

    matrix = random(1, 6, 9)
    twin = project(matrix, 3)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    torch.testing.assert_close(spectrum(matrix).values, torch.linalg.svdvals(matrix))
    torch.testing.assert_close(project(matrix, 3), twin)
    torch.testing.assert_close(project(matrix.mT, 3), twin.mT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_cast_up_before_anything_is_computed(dtype):
    matrix = random(1, 8, 10).to(dtype)
    assert spectrum(matrix).values.dtype is torch.float64
    torch.testing.assert_close(spectrum(matrix).values, torch.linalg.svdvals(matrix.double()))
    tolerance = (
        2e-6 if dtype == torch.float32 else 1e-2
    )  # of the result's own type; computed in half it would be far off
    torch.testing.assert_close(
        project(matrix, 3), project(matrix.double(), 3).to(dtype), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(polar(matrix, 3), polar(matrix.double(), 3).to(dtype), rtol=tolerance, atol=tolerance)


def test_autocast_does_not_lower_the_precision():
    matrix = random(1, 8, 10).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = project(matrix, 3), polar(matrix, 3), spectrum(matrix).values
    outside = project(matrix, 3), polar(matrix, 3), spectrum(matrix).values
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_results_are_the_same_bits_every_time():
    matrix = random(1, 40, 90).float()
    first, second = ((project(matrix, 7), polar(matrix, 7), spectrum(matrix).values) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    matrix = random(1, 4, 6)
    matrix[0, 1, 2] = bad
    for energy in (None, 1e-15):
        with pytest.raises(ModelError, match="not finite"):
            spectrum(matrix, energy)


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("function", [truncate, project, polar])
def test_rank_out_of_range_is_refused(function, rank):
    with pytest.raises(ModelError, match="take 1 to 4"):
        function(random(1, 4, 6), rank)


def test_matrix_without_groups_is_refused():
    with pytest.raises(ModelError, match=r"\[groups, p, q\]"):
        spectrum(random(4, 6))


def test_rounded_ranks_are_the_next_multiple_that_is_useful():
    for limit in range(1, 70):
        for multiple in (1, 2, 6, 8, 32):
            unit = alignment_unit(multiple, limit)
            assert unit == multiple or (limit < 2 * multiple and unit & (unit - 1) == 0 and 2 * unit <= max(limit, 2))
            for rank in range(1, limit + 1):
                rounded = round_rank(rank, multiple, limit)
                assert rounded % unit == 0
                assert 1 <= rounded <= limit
                assert rank <= rounded < rank + unit or rounded + unit > limit
            assert round_rank(limit, 1, limit) == limit


@pytest.mark.parametrize("align", [0, -8, True, 2.0, "8"])
def test_alignment_out_of_range_is_named(align):
    with pytest.raises(OptionError, match="align: must be an integer of at least 1"):
        round_rank(3, align, 10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_computes_what_the_cpu_computes():
    matrix = random(2, 40, 90)
    for function in (project, polar):
        torch.testing.assert_close(function(matrix.cuda(), 7).cpu(), function(matrix, 7), rtol=0, atol=1e-9)
    torch.testing.assert_close(spectrum(matrix.cuda()).values.cpu(), spectrum(matrix).values, rtol=1e-9, atol=0)
