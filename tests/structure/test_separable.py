"""Sums of rank-one terms: found again where there are some, the loss never rises, weights move the error."""

import math

import pytest
import torch

from lightning_prune.errors import ModelError
from lightning_prune.structure.separable import separate


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def summed(shape, rank, seed=0):
    """A kernel of that rank, term by term."""
    factors = [normal(n, rank, seed=seed + i) for i, n in enumerate((*shape[:2], math.prod(shape[2:])))]
    terms = [torch.einsum("o,i,k->oik", *(f[:, m] for f in factors)) for m in range(rank)]
    return torch.stack(terms).sum(0).view(shape)


def residual(kernel, fit, weights_out=1.0, weights_in=1.0):
    """Twin of the weighted loss, entry by entry."""
    weights = torch.as_tensor(weights_out).view(-1, 1, 1) * torch.as_tensor(weights_in).view(1, -1, 1)
    flat = kernel.double().flatten(2)
    return float((weights * (flat - fit.product()).square()).sum() / (weights * flat.square()).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((6, 5, 3, 3), 1), ((6, 5, 3, 3), 3), ((8, 8, 9), 8), ((9, 12, 2, 3, 2), 9), ((12, 12, 2), 12)],
)
def test_a_kernel_that_is_a_sum_of_terms_is_found_again(shape, rank, seed):
    kernel = summed(shape, rank, 10 * seed)
    fit = separate(kernel, rank)
    torch.testing.assert_close(fit.product().view(shape), kernel, rtol=0, atol=1e-9)
    assert [f.shape for f in (fit.outputs, fit.inputs, fit.taps)] == [
        (n, rank) for n in (*shape[:2], math.prod(shape[2:]))
    ]


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("rank", [1, 4, 8, 12])
def test_the_loss_never_rises_for_at_least_fifty_sweeps_or_until_rounding(rank, scale):
    kernel = scale * normal(8, 7, 3, 3)
    fit = separate(kernel, rank)
    assert all(later <= sooner for sooner, later in zip(fit.losses, fit.losses[1:], strict=False))
    stuck = len(fit.losses) > 1 and fit.losses[-2] - fit.losses[-1] <= 1e-15
    assert len(fit.losses) >= 50 or stuck
    assert fit.losses[-1] == pytest.approx(residual(kernel, fit), rel=1e-9)


def test_a_matrix_per_tap_of_rank_one_is_the_truncated_svd():
    kernel = normal(7, 5, 1)
    kept = torch.linalg.svdvals(kernel[:, :, 0])
    assert separate(kernel, 2).losses[-1] == pytest.approx(
        float(kept[2:].square().sum() / kept.square().sum()), rel=1e-6
    )


def test_noise_costs_no_more_than_it_holds():
    kernel, noise = summed((10, 9, 3, 3), 6), normal(10, 9, 3, 3, seed=5)
    fit = separate(kernel + 1e-3 * noise, 6)
    assert (fit.product().view_as(kernel) - kernel).norm() < 1e-3 * noise.norm()


def test_more_terms_and_more_sweeps_fit_better():
    kernel = normal(8, 8, 3, 3)
    losses = [separate(kernel, rank).losses[-1] for rank in (1, 2, 4, 8, 16)]
    assert losses == sorted(losses, reverse=True)
    assert separate(kernel, 4, sweeps=60).losses[-1] < separate(kernel, 4, sweeps=2).losses[-1]


def test_weights_are_what_an_error_counts():
    kernel = normal(6, 5, 3, 3)
    out, inner = 10.0 ** torch.arange(6).double() / 100, torch.tensor([0.0, 1, 2, 3, 1e6]).double()
    plain, weighted = separate(kernel, 4), separate(kernel, 4, out, inner)
    assert weighted.losses[-1] == pytest.approx(residual(kernel, weighted, out, inner), rel=1e-6)
    assert residual(kernel, weighted, out, inner) < 0.5 * residual(kernel, plain, out, inner)
    assert residual(kernel, plain) < residual(kernel, weighted)
    assert weighted.product().isfinite().all()
    exact = summed((6, 5, 3, 3), 3)
    torch.testing.assert_close(separate(exact, 3, out, inner + 1).product().view_as(exact), exact, rtol=0, atol=1e-8)


def test_the_same_seed_gives_the_same_bits_and_draws_no_global_number():
    kernel, state = normal(6, 5, 3, 3), torch.get_rng_state()
    one, two, other = separate(kernel, 3), separate(kernel, 3), separate(kernel, 3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.product(), two.product())
    assert not torch.equal(one.outputs, other.outputs)


def test_the_factors_of_a_term_share_its_norm():
    fit = separate(normal(6, 5, 3, 3), 4)
    norms = torch.stack([factor.norm(dim=0) for factor in (fit.outputs, fit.inputs, fit.taps)])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


def test_zeros_and_constants_are_fitted_exactly_and_what_is_not_finite_is_refused():
    for kernel in (torch.zeros(4, 3, 3, 3), torch.ones(4, 3, 3, 3)):
        torch.testing.assert_close(separate(kernel, 3).product().view_as(kernel), kernel.double(), rtol=0, atol=1e-12)
    with pytest.raises(ModelError, match="not finite"):
        separate(torch.full((2, 2, 3), torch.inf), 1)
