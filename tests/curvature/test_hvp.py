"""Hessian-vector products: against dense Hessians, against each other, and what they leave behind."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.functional import cross_entropy, ctc_loss, scaled_dot_product_attention

from lightning_prune.curvature import gradient, hessian_gradient, hessian_product, twice_differentiable
from lightning_prune.curvature.hvp import difference_product
from lightning_prune.errors import ModelError

EXACT = 1e-12  # float64: sums of a few hundred terms in another order


def mlp(dtype=torch.float64):
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)


def weights_of(model):
    return [p for p in model.parameters() if p.ndim >= 2]


def losses_over(model, chunks):
    return lambda: (cross_entropy(model(x), y) for x, y in chunks)


def data(count=12, dtype=torch.float64):
    return torch.randn(count, 5, dtype=dtype), torch.randint(0, 3, (count,))


def dense_hessian(model, names, loss):
    """The Hessian of ``loss(output)`` by the named parameters as one matrix, by torch's own double loop."""
    shapes = {name: model.get_parameter(name).shape for name in names}
    flat = torch.cat([model.get_parameter(name).detach().flatten() for name in names])

    def of_flat(vector):
        parts = vector.split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shapes[name]) for name, part in zip(names, parts, strict=True)}
        return loss(lambda x: functional_call(model, named, (x,)))

    return torch.autograd.functional.hessian(of_flat, flat)


def joined(tensors):
    return torch.cat([t.flatten() for t in tensors])


def assert_close(found, expected, tolerance):
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_products_equal_those_with_the_dense_hessian():
    model, (x, y) = mlp(), data()
    names = [name for name, p in model.named_parameters() if p.ndim >= 2]
    hessian = dense_hessian(model, names, lambda run: cross_entropy(run(x), y))
    losses, weights = losses_over(model, [(x, y)]), weights_of(model)
    vector = [torch.randn_like(w) for w in weights]
    assert_close(joined(hessian_product(losses, weights, vector)), hessian @ joined(vector), EXACT)
    slope = joined(gradient(losses, weights))
    assert_close(joined(hessian_gradient(losses, weights)), hessian @ slope, EXACT)


def test_the_product_with_the_gradient_of_one_chunk_is_the_gradient_of_half_its_square():
    model, chunk = mlp(), data()
    weights = weights_of(model)
    first = torch.autograd.grad(cross_entropy(model(chunk[0]), chunk[1]), weights, create_graph=True)
    half_square = sum(g.square().sum() for g in first) / 2
    expected = torch.autograd.grad(half_square, weights)
    assert_close(joined(hessian_gradient(losses_over(model, [chunk]), weights)), joined(expected), EXACT)


def test_chunks_change_nothing_but_the_factor_of_their_number():
    model, (x, y) = mlp(), data(12)
    weights = weights_of(model)
    whole = joined(hessian_gradient(losses_over(model, [(x, y)]), weights))
    chunks = list(zip(x.chunk(4), y.chunk(4), strict=True))
    assert_close(joined(hessian_gradient(losses_over(model, chunks), weights)), 4**2 * whole, EXACT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 3e-3)])
def test_differences_of_gradients_come_close_and_leave_the_weights_bit_for_bit(dtype, tolerance):
    model, chunk = mlp(dtype), data(dtype=dtype)
    weights = weights_of(model)
    before = [(w.data_ptr(), w._version, w.detach().clone()) for w in weights]
    losses = losses_over(model, [chunk])
    exact = joined(hessian_gradient(losses, weights))
    assert_close(joined(hessian_gradient(losses, weights, "finite_difference")), exact, tolerance)
    for weight, (address, version, value) in zip(weights, before, strict=True):
        assert (weight.data_ptr(), weight._version) == (address, version)
        assert torch.equal(weight, value)


def test_the_error_of_differences_is_quadratic_in_the_step():
    model, chunk = mlp(), data()
    model[3] = nn.Tanh()
    weights, losses = weights_of(model), losses_over(model, [chunk])
    vector = [torch.randn_like(w) for w in weights]
    exact = joined(hessian_product(losses, weights, vector))
    errors = [float((joined(difference_product(losses, weights, vector, step=c)) - exact).norm()) for c in (4e-3, 2e-3)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)


def test_weights_are_put_back_when_the_loss_of_a_difference_raises():
    model, (x, y) = mlp(), data()
    weights, before = weights_of(model), [w.detach().clone() for w in weights_of(model)]

    def losses():
        if not torch.equal(weights[0], before[0]):
            raise RuntimeError("away from the centre")
        yield cross_entropy(model(x), y)

    with pytest.raises(RuntimeError, match="away from the centre"):
        hessian_gradient(losses, weights, "finite_difference")
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_weights_that_the_loss_ignores_or_is_linear_in_have_products_of_zero():
    used, unused = torch.ones(3, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    vector = [torch.ones(3, 2), torch.ones(2, 2)]
    for loss in (used.sum, lambda: used.square().sum()):
        found = hessian_product(lambda loss=loss: [loss()], [used, unused], vector)
        assert not found[1].any()
    assert not hessian_product(lambda: [used.sum()], [used, unused], vector)[0].any()
    assert not joined(gradient(lambda: [], [used, unused])).any()
    zero = [torch.zeros(3, 2), torch.zeros(2, 2)]
    assert not joined(difference_product(lambda: [used.square().sum()], [used, unused], zero)).any()


def test_both_collectives_carry_all_weights_and_act_on_gradient_and_product():
    model, chunk = mlp(), data()
    weights, seen = weights_of(model), []

    def thrice(flat):
        seen.append(flat.clone())
        return 3 * flat

    losses = losses_over(model, [chunk])
    found = joined(hessian_gradient(losses, weights, reduce=thrice))
    assert [len(flat) for flat in seen] == [sum(w.numel() for w in weights)] * 2
    assert torch.equal(seen[0], joined(gradient(losses, weights)))
    assert_close(found, 9 * joined(hessian_gradient(losses, weights)), EXACT)


class Attention(nn.Module):
    """Torch's fused attention on its own; ``[N, 5]``."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(5, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).view(1, 1, len(x), 12).chunk(3, -1)
        return self.head(scaled_dot_product_attention(q, k, v)[0, 0])


class Encoder(nn.Module):
    """A transformer layer with dropout, whose attention gives no weights; ``[N, 5]``."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 10, dropout=0.5, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(self.stem(x)[None])[0])


class Recurrent(nn.Module):
    """An LSTM of two layers with dropout between them; ``[N, 5]``."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 6, 2, dropout=0.5, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lstm(x[..., None])[0][:, -1])


@pytest.mark.parametrize("build", [Attention, Encoder, Recurrent])
def test_attention_and_recurrence_have_second_derivatives_inside_the_context(build):
    model, chunk = build().double().train(), data()
    weights, losses = weights_of(model), losses_over(model, [chunk])
    with twice_differentiable(model):
        exact = joined(hessian_gradient(losses, weights))
        close = joined(hessian_gradient(losses, weights, "finite_difference"))
        again = joined(hessian_gradient(losses, weights))
    assert torch.equal(exact, again)  # no dropout
    assert_close(close, exact, 1e-4)


def test_noise_is_off_inside_the_context_and_back_after_it_and_norms_keep_their_mode():
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), Encoder(), nn.AlphaDropout(0.3))
    model[3].layer.norm1.eval()
    before = [m.training for m in model.modules()]
    with twice_differentiable(model):
        inside = {name: m.training for name, m in model.named_modules()}
        assert not any(inside[name] for name in ("2", "4", "3.layer.self_attn", "3.layer.dropout", "3.layer.norm1"))
        assert inside["1"]
        assert inside["3.layer"]
    assert [m.training for m in model.modules()] == before


class Once(torch.autograd.Function):
    """A square whose backward forgets its graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def attention_loss(w):
    return scaled_dot_product_attention(w, w, w).square().sum()


def bag_loss(w):
    return nn.functional.embedding_bag(torch.arange(4).view(2, 2), w[0, 0]).square().sum()


def alignment_loss(w):
    sizes = torch.tensor([8]), torch.tensor([2])
    return ctc_loss(w[0, 0][:, None].log_softmax(-1), torch.tensor([[1, 2]]), *sizes)


@pytest.mark.parametrize(
    ("loss", "operation"),
    [
        (attention_loss, "scaled_dot_product_flash_attention"),
        (bag_loss, "embedding_bag"),
        (alignment_loss, "ctc_loss"),
        (lambda w: Once.apply(w).square().sum(), "@once_differentiable"),
    ],
)
def test_an_operation_without_second_derivative_is_named_and_differences_do_without(loss, operation):
    weight = torch.randn(1, 1, 8, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ModelError, match=rf"not implemented for .*{operation}.*hvp='finite_difference'"):
        hessian_gradient(lambda: [loss(weight)], [weight])
    close = joined(hessian_gradient(lambda: [loss(weight)], [weight], "finite_difference"))
    assert close.isfinite().all()
    assert close.any()


def test_errors_of_the_users_own_code_are_passed_on():
    weight = torch.randn(3, requires_grad=True)
    loss = (weight.square() * 2).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        hessian_gradient(lambda: [loss], [weight])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_half_precision_is_differentiated_in_float32(dtype):
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    twin = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    twin.load_state_dict(model.state_dict())
    chunk = data(dtype=torch.float32)
    halves = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    before = [(t.data_ptr(), t.detach().clone()) for t in halves]
    with twice_differentiable(model):
        found = hessian_gradient(losses_over(model, [chunk]), weights_of(model))
    expected = hessian_gradient(losses_over(twin, [chunk]), weights_of(twin))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for tensor, (address, value) in zip(halves, before, strict=True):
        assert tensor.data_ptr() == address
        assert tensor.dtype == value.dtype
        assert torch.equal(tensor, value)


def test_autocast_gradient_mode_and_cudnn_are_as_needed_inside_and_put_back_after_an_error():
    seen = {}

    def inside(model):
        with twice_differentiable(model):
            seen.update(autocast=torch.is_autocast_enabled("cpu"), grad=torch.is_grad_enabled())
            seen.update(cudnn=torch.backends.cudnn.enabled)
            raise KeyError

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        with pytest.raises(KeyError):
            inside(Recurrent())
        assert seen == {"autocast": False, "grad": True, "cudnn": False}
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
    assert torch.backends.cudnn.enabled
    with pytest.raises(KeyError):
        inside(mlp())
    assert seen["cudnn"]
