"""Diagonals of the curvature against loops over single samples in float64, and against Hessians of autograd."""

import math

import pytest
import torch
from networks import Twice, image
from torch import nn
from torch.nn import functional as F

from lightning_prune.curvature.diagonal import (
    GaussNewton,
    exact_cotangents,
    hutchinson_diagonal,
    sampled_cotangents,
    summed_squares,
)
from lightning_prune.curvature.products import recorded
from lightning_prune.errors import ModelError

SAMPLES = 6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights_of(model):
    return {name: p for name, p in model.named_parameters() if p.ndim >= 2}


def diagonal(model, x, loss, cotangents=None, weights=None, seed=0):
    """Return what GaussNewton finds, and which weights it only estimated."""
    weights = weights or weights_of(model)
    with recorded(weights) as products:
        outputs = model(x)
    us = exact_cotangents(loss(outputs), outputs) if cotangents is None else cotangents(loss(outputs), outputs)
    method = GaussNewton(weights, generator(seed))
    return method.diagonal(products, outputs, us), method.estimated


def naive(model, x, loss, samples, sample=lambda x, n: x[n : n + 1]):
    """Loop over samples: the Jacobian of its outputs, the Hessian of the loss at all outputs by autograd, cut to the sample."""
    weights = weights_of(model)
    with torch.no_grad():
        z = model(x)
    hessian = torch.autograd.functional.hessian(loss, z).reshape(z.numel(), z.numel())
    width = z[0].numel()
    found = {name: torch.zeros_like(p) for name, p in weights.items()}
    for n in range(samples):
        block = hessian[n * width : (n + 1) * width, n * width : (n + 1) * width]
        out = model(sample(x, n)).reshape(-1)
        rows = [torch.autograd.grad(o, list(weights.values()), retain_graph=True, allow_unused=True) for o in out]
        for k, (name, p) in enumerate(weights.items()):
            jacobian = torch.stack([torch.zeros_like(p) if row[k] is None else row[k] for row in rows]).flatten(1)
            found[name] += torch.einsum("ck,cd,dk->k", jacobian, block, jacobian).view_as(p)
    return found


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12 * float(value.abs().max()))


class Attentive(nn.Module):
    """Attention over tokens, first one to itself and then to the input, in either layout."""

    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.itself = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.other = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.itself(x, x, x)[0].tanh()
        y = self.other(y[:, :2] if self.batch_first else y[:2], x, x)[0]
        return self.head(y.mean(1 if self.batch_first else 0))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """The weight of the decoder is an embedding's: one use of it is no product."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, tokens):
        return F.linear(self.mix(self.embedding(tokens)).tanh().mean(1), self.embedding.weight)


class Folded(nn.Module):
    """Frames are folded into the axis of samples, which stand first or last in it."""

    def __init__(self, samples_first):
        super().__init__()
        self.samples_first = samples_first
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x):  # [samples, frames, height, width]
        n, t = x.shape[:2]
        x = x if self.samples_first else x.transpose(0, 1)
        y = self.conv(x.reshape(n * t, 1, *x.shape[2:])).tanh().mean((2, 3))
        y = y.view(n, t, 4) if self.samples_first else y.view(t, n, 4).transpose(0, 1)
        return self.head(y.tanh().mean(1))


def classes(z):
    return F.cross_entropy(z, torch.arange(len(z)) % z.shape[1])


PICTURES = torch.randn(SAMPLES, 3, 6, 7, generator=generator(1), dtype=torch.float64)
TOKENS = torch.randn(SAMPLES, 4, 8, generator=generator(2), dtype=torch.float64)
NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4)), TOKENS[:, 0]),
    "tokens": (lambda: nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 4)), TOKENS),
    "conv": (lambda: image(nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=2)), PICTURES),
    "grouped": (lambda: image(nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Conv2d(6, 8, (3, 2), groups=2)), PICTURES),
    "depthwise": (lambda: image(nn.Conv2d(3, 6, 3, groups=3, bias=False), channels=6), PICTURES),
    "same": (lambda: image(nn.Conv2d(3, 8, (2, 4), padding="same")), PICTURES),
    "circular": (lambda: image(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")), PICTURES),
    "transposed": (
        lambda: image(
            nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 8, 2, groups=2, dilation=2),
        ),
        PICTURES,
    ),
    "one dimension": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 3), nn.Tanh(), nn.Conv1d(6, 4, 2, stride=2), nn.Flatten(), nn.Linear(12, 4)
        ),
        TOKENS,
    ),
    "norm and in place": (
        lambda: image(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3)),
        PICTURES,
    ),
    "called twice": (Twice, PICTURES),
    "attention": (lambda: Attentive(True), TOKENS),
    "attention, tokens first": (lambda: Attentive(False), TOKENS),
    "frames, samples first": (lambda: Folded(True), PICTURES),
    "frames, samples last": (lambda: Folded(False), PICTURES),
}


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_exact_diagonal_equals_a_loop_over_samples(name):
    build, x = NETWORKS[name]
    model = build().double().eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    found, estimated = diagonal(model, x, classes)
    same(found, naive(model, x, classes, SAMPLES))
    assert not estimated


LOSSES = {
    "weighted": lambda z: F.cross_entropy(z, torch.arange(len(z)) % 4, weight=torch.tensor([1.0, 2, 3, 4]).double()),
    "smoothed": lambda z: F.cross_entropy(z, torch.arange(len(z)) % 4, label_smoothing=0.1),
    "temperature": lambda z: F.cross_entropy(z / 3, torch.arange(len(z)) % 4),
    "ignored": lambda z: F.cross_entropy(z, torch.tensor([0, 1, -100, 3, 2, -100])),
    "sigmoids": lambda z: F.binary_cross_entropy_with_logits(z, (torch.arange(z.numel()).view_as(z) % 2).double()),
    "squared error": lambda z: F.mse_loss(z, torch.ones_like(z)),
    "square root": lambda z: (1 + z.square().sum(1)).sqrt().mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_curvature_is_that_of_the_loss_that_is_trained(name):
    model = NETWORKS["linear"][0]().double()
    same(diagonal(model, TOKENS[:, 0], LOSSES[name])[0], naive(model, TOKENS[:, 0], LOSSES[name], SAMPLES))


def test_half_the_squared_distance_gives_the_squares_of_the_jacobian():
    model = NETWORKS["conv"][0]().double()
    loss = lambda z: 0.5 * (z - 1).square().sum() / SAMPLES  # noqa: E731
    found, _ = diagonal(model, PICTURES, loss)
    expected = {name: torch.zeros_like(p) for name, p in weights_of(model).items()}
    for n in range(SAMPLES):
        for output in model(PICTURES[n : n + 1])[0]:
            for name, gradient in zip(
                expected, torch.autograd.grad(output, list(weights_of(model).values()), retain_graph=True), strict=True
            ):
                expected[name] += gradient.square() / SAMPLES
    same(found, expected)


def test_for_softmax_it_is_the_expected_square_of_the_gradient_at_labels_of_the_model():
    model = NETWORKS["tokens"][0]().double()
    found, _ = diagonal(model, TOKENS, classes)
    expected = {name: torch.zeros_like(p) for name, p in weights_of(model).items()}
    empirical = {name: torch.zeros_like(p) for name, p in weights_of(model).items()}
    for n in range(SAMPLES):
        logs = model(TOKENS[n : n + 1])[0].log_softmax(0)
        for c, value in enumerate(logs):
            gradients = torch.autograd.grad(value, list(weights_of(model).values()), retain_graph=True)
            for name, gradient in zip(expected, gradients, strict=True):
                expected[name] += value.exp().detach() * gradient.square() / SAMPLES
                empirical[name] += (c == n % 4) * gradient.square() / SAMPLES
    same(found, expected)
    assert all((found[name] - empirical[name]).norm() > 0.1 * found[name].norm() for name in found)


def test_a_single_output_of_a_binary_classifier_counts_as_one_class():
    model = nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)).double()
    loss = lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z))  # noqa: E731
    same(diagonal(model, TOKENS[:, 0], loss)[0], naive(model, TOKENS[:, 0], loss, SAMPLES))


def test_softmax_needs_one_direction_less_than_classes():
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert exact_cotangents(classes(z), z).shape == (3, 5, 4)


def test_of_a_loss_that_is_linear_there_is_no_curvature():
    model = NETWORKS["linear"][0]().double()
    found, _ = diagonal(model, TOKENS[:, 0], lambda z: z.mean())
    assert all(not value.any() for value in found.values())


def test_samples_that_meet_in_the_loss_are_refused():
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ModelError, match="Samples of a batch meet"):
        exact_cotangents((z @ z.T).square().mean(), z)


def test_outputs_that_the_loss_does_not_read_are_refused():
    z = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(ModelError, match="does not depend on the outputs"):
        exact_cotangents(torch.zeros(3, requires_grad=True).sum(), z)


@pytest.mark.parametrize(("build", "x"), [(Recurrent, TOKENS[..., :4]), (Tied, torch.arange(18).view(6, 3) % 7)])
def test_what_is_no_product_is_estimated_without_bias_and_told(build, x):
    model = build().double()
    expected = naive(model, x, classes, SAMPLES)
    draws = [diagonal(model, x, classes, seed=seed) for seed in range(300)]
    estimated = draws[0][1]
    assert estimated == ({"lstm.weight_ih_l0", "lstm.weight_hh_l0"} if build is Recurrent else {"embedding.weight"})
    for name in expected:
        within_four_errors(torch.stack([found[name] for found, _ in draws]), expected[name])


def within_four_errors(draws, expected):
    """Check the mean of independent draws, entry by entry and of their sum, which is known to a twentieth of all magnitudes."""
    draws, expected = (
        torch.cat([t.flatten(-expected.ndim), t.sum([*range(-expected.ndim, 0)])[..., None]], -1)
        for t in (draws, expected)
    )
    error = draws.std(0) / math.sqrt(len(draws))
    assert error[-1] < 0.05 * expected[:-1].abs().sum()
    assert (draws.mean(0) - expected).abs().le(4 * error + 1e-12 * expected.abs().max()).all()


LABELS = torch.tensor([0, 1, 2, 3, -100, 1])


@pytest.mark.parametrize("name", ["tokens", "grouped"])
def test_sampled_labels_are_unbiased(name):
    build, x = NETWORKS[name]
    model = build().double()
    loss = lambda z: F.cross_entropy(z, LABELS, weight=torch.tensor([1.0, 2, 3, 4]).double())  # noqa: E731
    source = generator()
    sampled = lambda value, z: sampled_cotangents(value, z, 2, source)  # noqa: E731
    draws = [diagonal(model, x, loss, sampled)[0] for _ in range(400)]
    expected = naive(model, x, loss, SAMPLES)
    for key in expected:
        within_four_errors(torch.stack([found[key] for found in draws]), expected[key])


@pytest.mark.parametrize("axis", [1, -1])
def test_sampled_labels_of_pixels_and_tokens_are_unbiased(axis):
    model = nn.Sequential(nn.Conv1d(4, 3, 3, padding=1)).double()
    loss = lambda z: F.cross_entropy(z.movedim(axis, 1), torch.arange(z.numel() // 3).view(SAMPLES, -1) % 3)  # noqa: E731
    x = TOKENS[:, :, :5]
    net = model if axis == 1 else nn.Sequential(model, Transposed()).double()
    expected = naive(net, x, loss, SAMPLES)
    source = generator()
    draws = [diagonal(net, x, loss, lambda value, z: sampled_cotangents(value, z, 1, source))[0] for _ in range(400)]
    for key in expected:
        within_four_errors(torch.stack([found[key] for found in draws]), expected[key])


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_draws_follow_the_seed():
    z = torch.randn(5, 4, requires_grad=True)
    one, two, other = (sampled_cotangents(classes(z), z, 3, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_labels_are_not_drawn_for_another_loss():
    z = torch.randn(5, 4, requires_grad=True)
    with pytest.raises(ModelError, match=r"no softmax cross-entropy.*curvature='ggn'"):
        sampled_cotangents((1 + z.square().sum(1)).sqrt().mean(), z, 1, generator())


@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (5, 1), (5, 5), (1, 1)])
@pytest.mark.parametrize("positions", [1, 3, 9, 10, 40])
def test_both_forms_of_the_squares_equal_the_definition(rows, columns, positions):
    a = torch.randn(rows, 7, 2, 3, positions, dtype=torch.float64)
    b = torch.randn(columns, 7, 2, 4, positions, dtype=torch.float64)
    expected = torch.einsum("rngal,rngbl->rngab", a.expand(5, -1, -1, -1, -1), b.expand(5, -1, -1, -1, -1))
    scale = 5 if max(rows, columns) == 1 else 1
    torch.testing.assert_close(summed_squares(a, b), expected.square().sum((0, 1)) / scale, rtol=1e-10, atol=1e-10)


def test_memory_is_bounded_by_pieces_that_change_nothing(monkeypatch):
    from lightning_prune.curvature import diagonal as module

    model = Twice().double()
    whole, _ = diagonal(model, PICTURES, classes)
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    monkeypatch.setattr(module, "_STORED", 1)
    same(diagonal(model, PICTURES, classes)[0], whole)


def test_hutchinson_is_the_diagonal_of_the_hessian_in_expectation():
    model = nn.Sequential(nn.Linear(8, 3, bias=False), nn.Tanh(), nn.Linear(3, 4, bias=False)).double()
    weights, x = weights_of(model), TOKENS[:, 0]

    def loss(*values):
        return classes(torch.func.functional_call(model, dict(zip(weights, values, strict=True)), (x,)))

    blocks = torch.autograd.functional.hessian(loss, tuple(weights.values()))
    source = generator()
    draws = [hutchinson_diagonal(classes(model(x)), weights, 12, source) for _ in range(400)]
    for k, (name, p) in enumerate(weights.items()):
        exact = blocks[k][k].reshape(p.numel(), p.numel()).diagonal().view_as(p)
        assert exact.min() < 0 or exact.abs().max() > 0
        within_four_errors(torch.stack([found[name] for found in draws]), exact)


def test_hutchinson_is_exact_without_curvature_between_weights_and_zero_where_a_weight_is_not_used():
    w, other = torch.randn(3, 2, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    found = hutchinson_diagonal((w**3).sum(), {"w": w, "other": other}, 1, generator())
    torch.testing.assert_close(found["w"], 6 * w.detach().double())
    assert not found["other"].any()


def test_functions_of_torch_are_put_back_also_after_an_error():
    before = F.linear, F.conv2d
    with pytest.raises(RuntimeError), recorded({"w": torch.ones(2, 2)}):
        F.linear(torch.ones(2, 3), torch.ones(4, 5))
    assert (F.linear, F.conv2d) == before


def test_what_has_no_second_derivative_is_told_with_a_way_out():
    w = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(ModelError, match=r"Double backward is not implemented for .*'ggn'"):
        hutchinson_diagonal(Once.apply(w).square().sum(), {"w": w}, 1, generator())


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 3 * gradient * ctx.saved_tensors[0] ** 2
