"""Gradients at labels of the model and of the data: against Hessians of autograd, closed forms and the gradients of single samples."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.curvature.kronecker import Factors
from lightning_prune.curvature.labels import empirical_gradients, likelihood_of, sampled_gradients
from lightning_prune.errors import ModelError

N, C = 6, 4
SOFTMAX = torch.tensor([1.0, 2, 3, 4])
LABELS = torch.tensor([0, 1, 2, 3, -100, 1])
MASK = torch.tensor([1.0, 0, 1, 1, 0, 1])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def yes_and_no(z):
    return (torch.arange(z.numel()).view_as(z) % 3 == 0).to(z)


def outputs_of(shape, dtype=torch.float64, scale=1.0):
    z = torch.randn(shape, generator=generator(5), dtype=torch.float64) * scale
    return z.to(dtype).requires_grad_()


def labels_like(z):
    return torch.arange(z[:, 0].numel()).view_as(z[:, 0]) % z.shape[1]


CASES = {  # the distribution, the shape of the outputs, the loss
    "mean": ("categorical", (N, C), lambda z: F.cross_entropy(z, labels_like(z))),
    "sum": ("categorical", (N, C), lambda z: F.cross_entropy(z, labels_like(z), reduction="sum")),
    "two classes": ("categorical", (N, 2), lambda z: F.cross_entropy(z, labels_like(z))),
    "class weights": ("categorical", (N, C), lambda z: F.cross_entropy(z, labels_like(z), weight=SOFTMAX.to(z))),
    "smoothed": ("categorical", (N, C), lambda z: F.cross_entropy(z, labels_like(z), label_smoothing=0.1)),
    "ignored": ("categorical", (N, C), lambda z: F.cross_entropy(z, LABELS)),
    "nll": ("categorical", (N, C), lambda z: F.nll_loss(z.log_softmax(1), labels_like(z))),
    "pixels": ("categorical", (N, C, 2, 3), lambda z: F.cross_entropy(z, labels_like(z))),
    "tokens": ("categorical", (N, 3, C), lambda z: F.cross_entropy(z.flatten(0, 1), torch.arange(3 * N) % C)),
    "sigmoids": ("bernoulli", (N, C), lambda z: F.binary_cross_entropy_with_logits(z, yes_and_no(z))),
    "one sigmoid": ("bernoulli", (N,), lambda z: F.binary_cross_entropy_with_logits(z, yes_and_no(z))),
    "shares": ("bernoulli", (N, 1), lambda z: F.binary_cross_entropy(z.sigmoid(), yes_and_no(z))),
    "positive weight": (
        "bernoulli",
        (N, C),
        lambda z: F.binary_cross_entropy_with_logits(z, yes_and_no(z), pos_weight=SOFTMAX.to(z)),
    ),
    "masked": (
        "bernoulli",
        (N, 2),
        lambda z: (F.binary_cross_entropy_with_logits(z, yes_and_no(z), reduction="none").mean(1) * MASK.to(z)).sum(),
    ),
    "squared error": ("gaussian", (N, C), lambda z: F.mse_loss(z, torch.ones_like(z))),
    "squares by hand": ("gaussian", (N, 2, 3), lambda z: 0.5 * ((z - 1) ** 2 * MASK.to(z).view(-1, 1, 1)).mean()),
}


@pytest.mark.parametrize("name", CASES)
def test_squares_of_gradients_at_drawn_labels_are_the_hessian_of_the_loss_over_the_mean_weight(name):
    distribution, shape, loss = CASES[name]
    z = outputs_of(shape)
    likelihood = likelihood_of(loss(z), z)
    assert likelihood.distribution == distribution
    hessian = torch.autograd.functional.hessian(loss, z.detach()).reshape(z.numel(), z.numel())
    counted = likelihood.weight[likelihood.weight > 0]
    source, value, draws = generator(), loss(z), 4000
    gradients = likelihood.draw(z, draws, source) * likelihood.relative().sqrt()
    assert torch.equal(
        sampled_gradients(value, z, generator()), likelihood.draw(z, 1, generator())[0] * likelihood.relative().sqrt()
    )
    flat = gradients.flatten(1)
    for n in range(len(z)):
        part = slice(n * z[0].numel(), (n + 1) * z[0].numel())
        products = flat[:, part, None] * flat[:, None, part]
        expected = hessian[part, part] / counted.mean()
        error = products.std(0) / math.sqrt(draws)
        assert (products.mean(0) - expected).abs().le(5 * error + 1e-12).all()
        assert bool(expected.any()) == bool(products.any())


@pytest.mark.parametrize("name", CASES)
def test_multiples_of_a_loss_give_the_same(name):
    _, shape, loss = CASES[name]
    z = outputs_of(shape)
    one, other = (sampled_gradients(factor * loss(z), z, generator()) for factor in (1, 7))
    torch.testing.assert_close(one, other)


def test_a_mean_a_sum_and_a_mean_of_all_samples_but_those_ignored_give_plain_gradients():
    z = outputs_of((N, C))
    for loss in (CASES["mean"], CASES["sum"], CASES["ignored"]):
        found = sampled_gradients(loss[2](z), z, generator())
        likelihood = likelihood_of(loss[2](z), z)
        plain = likelihood.draw(z, 1, generator())[0]
        kept = torch.ones(N, dtype=torch.bool) if loss is not CASES["ignored"] else LABELS >= 0
        torch.testing.assert_close(found[kept], plain[kept])
        assert not found[~kept].any()
        drawn = z.softmax(1) - plain
        assert ((drawn.round() - drawn).abs() < 1e-12).all()
        assert (drawn.sum(1) - 1).abs().max() < 1e-12


def test_the_output_factor_of_softmax_is_the_mean_of_diag_p_minus_p_p():
    torch.manual_seed(0)
    layer, x = nn.Linear(5, C).double(), torch.randn(N, 5, dtype=torch.float64)
    source, found = generator(1), []
    for _ in range(1000):
        factors = Factors({"": layer})
        with factors.watching():
            z = layer(x)
        factors.backward(z, sampled_gradients(F.cross_entropy(z, LABELS.clamp_min(0)), z, source))
        found.append(factors.factors()[""].outputs[0])
    draws, p = torch.stack(found), layer(x).detach().softmax(1)
    expected = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    assert (draws.mean(0) - expected).abs().le(4 * draws.std(0) / math.sqrt(len(draws))).all()


def test_draws_follow_the_seed_and_nothing_else():
    z = outputs_of((N, C))
    loss = CASES["mean"][2]
    one = sampled_gradients(loss(z), z, generator(1))
    torch.manual_seed(9)
    assert torch.equal(one, sampled_gradients(loss(z), z, generator(1)))
    assert not torch.equal(one, sampled_gradients(loss(z), z, generator(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_the_distribution_is_found_out_in_low_precision(name, dtype):
    distribution, shape, loss = CASES[name]
    z, exact = outputs_of(shape, dtype), outputs_of(shape)
    likelihood = likelihood_of(loss(z.float()), z)
    assert likelihood.distribution == distribution
    expected = likelihood_of(loss(exact), exact).relative()
    assert (likelihood.relative() - expected).abs().max() < (1e-3 if dtype == torch.float32 else 0.1)


def test_terms_that_are_saturated_count_as_the_others_unless_they_are_ignored():
    z, labels = outputs_of((200, C), torch.float32, scale=12.0), torch.arange(200) % C  # most are sure, and wrong
    labels[::10] = -100
    value = F.cross_entropy(z, labels)
    expected = (labels >= 0).double().unsqueeze(1)
    torch.testing.assert_close(likelihood_of(value, z).relative(), expected, rtol=1e-2, atol=0)
    gradients = (z.detach().double().softmax(1) - F.one_hot(labels.clamp_min(0), C)) * expected
    torch.testing.assert_close(empirical_gradients(value, z), gradients, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", ["mean", "sigmoids"])
@pytest.mark.parametrize("logit", [8.0, 12.0, 16.0, 20.0])
def test_of_an_overconfident_model_the_distribution_is_found_out_and_hardly_any_gradient_is_left(name, logit):
    distribution, shape, loss = CASES[name]
    z = outputs_of(shape, torch.float32).detach()
    target = F.one_hot(labels_like(z), C) if name == "mean" else yes_and_no(z)
    z = (z + logit * (2 * target - 1)).requires_grad_()  # sure, and right
    assert likelihood_of(loss(z), z).distribution == distribution
    assert sampled_gradients(loss(z), z, generator()).square().mean() < 0.01


RELATIVE = {"class weights": SOFTMAX[torch.arange(N) % C], "ignored": (LABELS >= 0).double(), "mean": torch.ones(N)}


@pytest.mark.parametrize("name", RELATIVE)
def test_empirical_gradients_are_those_of_single_samples_times_the_root_of_their_relative_weight(name):
    z, weight = outputs_of((N, C)), RELATIVE[name].double()
    weight = weight / weight[weight > 0].mean()
    labels = LABELS.clamp_min(0) if name == "ignored" else labels_like(z)
    expected = (z.detach().softmax(1) - F.one_hot(labels, C)) * weight.sqrt().unsqueeze(1)
    torch.testing.assert_close(empirical_gradients(CASES[name][2](z), z), expected)


@pytest.mark.parametrize("name", ["sigmoids", "one sigmoid", "squared error", "pixels"])
def test_empirical_gradients_of_a_mean_are_those_of_the_sum(name):
    _, shape, loss = CASES[name]
    z = outputs_of(shape)
    terms = z.numel() / (2 if name == "squared error" else C if name == "pixels" else 1)
    (expected,) = torch.autograd.grad(loss(z) * terms, z)
    torch.testing.assert_close(empirical_gradients(loss(z), z), expected)


def other_loss(z):
    return (1 + z.square().sum(1)).sqrt().mean()


def test_of_another_loss_the_reduction_must_be_said():
    z = outputs_of((N, C))
    (gradient,) = torch.autograd.grad(other_loss(z), z)
    torch.testing.assert_close(empirical_gradients(other_loss(z), z, "mean"), N * gradient)
    torch.testing.assert_close(empirical_gradients(other_loss(z), z, "sum"), gradient)
    for loss in (other_loss, lambda z: z.abs().mean()):
        with pytest.raises(ModelError, match="Say whether it is the 'mean'"):
            empirical_gradients(loss(z), z)


def test_of_another_loss_the_distribution_must_be_said_and_what_it_ignores_counts_nothing():
    z = outputs_of((N, C))
    with pytest.raises(ModelError, match=r"no softmax cross-entropy.*Name the distribution"):
        sampled_gradients(other_loss(z), z, generator())
    with pytest.raises(ModelError, match="no softmax cross-entropy"):
        sampled_gradients(
            (z.exp() - z).mean(), z, generator()
        )  # Poisson: its curvature, too, is that of single entries
    with pytest.raises(ModelError, match="no softmax cross-entropy"):
        sampled_gradients((3 * z.square() + z * z.roll(1, 1)).mean(), z, generator())  # quadratic, but outputs meet
    for distribution in ("categorical", "bernoulli", "gaussian"):
        found = sampled_gradients(other_loss(z[:4]), z, generator(), distribution)
        assert found[:4].any(1).all()
        assert not found[4:].any()


def test_a_loss_that_is_flat_has_gradients_of_zero_and_one_that_is_only_linear_is_another_loss():
    z = (1000 * F.one_hot(labels_like(outputs_of((N, C))), C)).float().requires_grad_()
    value = CASES["mean"][2](z)
    assert not sampled_gradients(value, z, generator()).any()
    assert not empirical_gradients(value, z).any()
    z = outputs_of((N, C))
    for loss in (lambda z: z.mean(), lambda z: z.abs().mean()):
        with pytest.raises(ModelError, match="no softmax cross-entropy"):
            sampled_gradients(loss(z), z, generator())


def test_a_function_may_draw():
    z = outputs_of((N, C))
    drawn = lambda outputs, source: outputs + torch.randn(outputs.shape, generator=source, dtype=outputs.dtype)  # noqa: E731
    found = sampled_gradients(other_loss(z), z, generator(3), drawn)
    assert torch.equal(found, drawn(z.detach(), generator(3)))
    assert not found.requires_grad
    for wrong, match in ((lambda o, s: o[:2], r"got \(2, 4\)"), (lambda o, s: None, "got NoneType")):
        with pytest.raises(ModelError, match=match):
            sampled_gradients(other_loss(z), z, generator(), wrong)
    with pytest.raises(ModelError, match="not finite"):
        sampled_gradients(other_loss(z), z, generator(), lambda o, s: o / 0)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


BAD = {
    "samples that meet": (lambda z: (z @ z.T).square().mean(), (N, C), "Samples of a batch meet"),
    "softmax over samples": (lambda z: F.cross_entropy(z, torch.tensor(1)), (N,), "Samples of a batch meet"),
    "no axis of samples": (lambda z: z**2, (), "without an axis of samples"),
    "another tensor": (lambda z: torch.zeros(3, requires_grad=True).sum(), (N, C), "does not depend on the outputs"),
    "not finite": (lambda z: z.sum() / 0, (N, C), "not finite"),
    "no second derivative": (lambda z: Once.apply(z).square().mean(), (N, C), "Double backward is not implemented"),
}


def test_a_name_helps_where_a_loss_can_be_differentiated_only_once():
    z = outputs_of((N, C))
    value = Once.apply(z).square().mean()
    found = sampled_gradients(value, z, generator(), "categorical")
    torch.testing.assert_close(found, sampled_gradients(CASES["mean"][2](z), z, generator()))
    (gradient,) = torch.autograd.grad(Once.apply(z).square().mean(), z)
    torch.testing.assert_close(empirical_gradients(value, z, "mean"), N * gradient)
    with pytest.raises(ModelError, match="Samples of a batch meet"):
        empirical_gradients((z @ z.T).square().mean(), z, "mean")
    with pytest.raises(ModelError, match="Samples of a batch meet"):
        sampled_gradients((z @ z.T).square().mean(), z, generator(), "categorical")


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_gradients_sample_by_sample_is_refused(name):
    loss, shape, match = BAD[name]
    z = outputs_of(shape)
    with pytest.raises(ModelError, match=match):
        sampled_gradients(loss(z), z, generator())
    with pytest.raises(ModelError, match=match):
        empirical_gradients(loss(z), z)


def test_a_softmax_that_is_certain_and_wrong_is_known_by_its_slope():
    z = torch.zeros(6, 3)
    z[:, 0] = 300.0
    z.requires_grad_()
    labels = torch.tensor([0, 1, 2, 0, 1, 0])
    for reduction in ("mean", "sum"):
        found = likelihood_of(F.cross_entropy(z, labels, reduction=reduction), z)
        assert (found.distribution, found.axis) == ("categorical", 1)
        torch.testing.assert_close(found.relative().flatten(), torch.ones(6, dtype=torch.float64))
    with pytest.raises(ModelError, match="cannot be told"):
        likelihood_of((z - 1).abs().mean(), z)


@pytest.mark.parametrize("loss", [F.smooth_l1_loss, F.huber_loss])
def test_a_loss_that_is_quadratic_only_near_zero_is_not_gaussian(loss):
    z = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert likelihood_of(loss(z, z.detach() + 0.1), z).distribution == "gaussian"  # where it is
    with pytest.raises(ModelError, match="cannot be told"):
        likelihood_of(loss(z, z.detach() + torch.linspace(-3, 3, 32).view(16, 2)), z)
