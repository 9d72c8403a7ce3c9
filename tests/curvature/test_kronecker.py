"""Kronecker factors and second moments against the authors' numbers, and against loops over samples in float64."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.curvature.eigenbasis import Eigenbasis, directions
from lightning_prune.curvature.kronecker import Factors, SecondMoments

REFERENCE = Path(__file__).parents[1] / "reference"
SAMPLES = 4


def layers_of(model):
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def added(collector, model, *batches, first=0):
    """Add batches, whose labels are 0, 1, 2, 3, 0, ..."""
    for x in batches:
        with collector.watching():
            z = model(x)
        labels = torch.arange(first, first + len(z)) % z.shape[1]
        collector.backward(z, z.detach().softmax(1) - F.one_hot(labels, z.shape[1]))
        first += len(z)
    return collector


def basis_of(factors):
    (values_a, columns_a), (values_s, columns_s) = directions(factors.inputs), directions(factors.outputs)
    return Eigenbasis(columns_a, columns_s, values_a, values_s)


def authors(kind):
    """Return the authors' numbers, their network, and the factors that we find in it."""
    numbers = np.load(REFERENCE / f"kfe_{kind}_true.npz")
    if kind == "mlp_bias":
        model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))
    else:
        stages = [
            nn.Conv2d(3, 8, 3, 1, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, 2, 1, bias=False),
        ]
        stages += [nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, bias=False), nn.ReLU()]
        model = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    state = {key.removeprefix("w/feature."): torch.from_numpy(numbers[key]) for key in numbers if key.startswith("w/")}
    model.load_state_dict(state)
    model.eval()
    names = [name.removeprefix("feature.") for name in json.loads(str(numbers["meta"]))["layers"]]
    factors = Factors({name: model[int(name)] for name in names}, homogeneous=True)
    for x, y in zip(torch.from_numpy(numbers["x"]), torch.from_numpy(numbers["sampled_y"]), strict=True):
        with factors.watching():
            z = model(x)
        factors.backward(z, z.detach().softmax(1) - F.one_hot(y, 5))
    return numbers, model, factors


@pytest.mark.parametrize("kind", ["cnn_nobias", "mlp_bias"])
def test_factors_and_eigenvalues_are_those_of_the_authors_code(kind):
    numbers, _, factors = authors(kind)
    batches = len(numbers["sampled_y"])
    positions = {"0": 64, "3": 16, "6": 4} if kind == "cnn_nobias" else {"0": 1, "2": 1}
    for name, found in factors.factors().items():
        scales = {
            "A": batches / positions[name],
            "S": batches * positions[name],
        }  # theirs are sums over batches, and T moves
        for key, factor in (("A", found.inputs[0]), ("S", found.outputs[0])):
            theirs = torch.from_numpy(numbers[f"feature.{name}/{key}_sum"]).double()
            assert (scales[key] * factor - theirs).norm() <= 2e-6 * theirs.norm()
            values = torch.from_numpy(numbers[f"feature.{name}/lam_{key}"]).double()
            torch.testing.assert_close(
                scales[key] * directions(factor)[0], values, rtol=0, atol=2e-6 * float(values.max())
            )


@pytest.mark.parametrize("kind", ["cnn_nobias", "mlp_bias"])
def test_damage_in_the_eigenbasis_is_that_of_the_authors_code(kind):
    numbers, model, factors = authors(kind)
    for name, found in factors.factors().items():
        layer = model[int(name)]
        weight = layer.weight.detach().double().flatten(2) if layer.weight.ndim > 2 else layer.weight.detach().double()
        if kind == "mlp_bias":
            weight = torch.cat([weight, layer.bias.detach().double().unsqueeze(1)], 1)
        basis = basis_of(found)
        core = torch.einsum("op,oi...,iq->p...q", basis.outputs[0], weight, basis.inputs[0])
        core = core.view(len(core), -1, core.shape[-1])
        damage = (core.square() * basis.diagonal()).sum(1) * len(numbers["x"]) ** 2
        for axis, key in ((1, "imp_out"), (0, "imp_in")):
            theirs = numbers[f"feature.{name}/{key}"]
            np.testing.assert_allclose(
                damage.sum(axis), theirs, rtol=0, atol=1e-5 * theirs.max()
            )  # their eigenvectors are of single precision


class Twice(nn.Module):
    """One linear layer called twice, one convolution called at two sizes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.linear = nn.Linear(5, 5)
        self.into, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x):
        x = self.conv(F.avg_pool2d(self.conv(x).tanh(), 2)).tanh().mean((2, 3))
        return self.head(self.linear(self.linear(self.into(x)).tanh()).tanh())


class TokensFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.inner(x.transpose(0, 1)).tanh().mean(0))


def image(*layers, channels=8):
    return nn.Sequential(*layers, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


PICTURES = torch.randn(SAMPLES, 3, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TOKENS = torch.randn(
    SAMPLES, 8, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64
)  # twice as many as samples
VOLUMES = PICTURES.unsqueeze(2).expand(-1, -1, 3, -1, -1) * torch.arange(1, 4).view(3, 1, 1)
NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)), TOKENS[:, 0]),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(40, 4)), TOKENS),
    "tokens first": (TokensFirst, TOKENS),
    "conv": (lambda: image(nn.Conv2d(3, 8, 3, stride=2, padding=1)), PICTURES),
    "dilated": (lambda: image(nn.Conv2d(3, 8, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 3))), PICTURES),
    "one tap": (lambda: image(nn.Conv2d(3, 8, 1, stride=2)), PICTURES),
    "grouped": (lambda: image(nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Conv2d(6, 8, (3, 2), padding=1, groups=2)), PICTURES),
    "depthwise": (lambda: image(nn.Conv2d(3, 6, 3, groups=3, bias=False), channels=6), PICTURES),
    "same": (lambda: image(nn.Conv2d(3, 8, (3, 4), padding="same")), PICTURES),
    "circular": (lambda: image(nn.Conv2d(3, 8, 3, padding=(2, 1), padding_mode="circular")), PICTURES),
    "reflecting": (lambda: image(nn.Conv2d(3, 8, (2, 3), padding="same", padding_mode="reflect")), PICTURES),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(8, 6, 3, padding=2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)), TOKENS),
    "three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, (2, 3, 3), padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 4)),
        VOLUMES,
    ),
    "norm and in place": (
        lambda: image(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3), nn.ReLU(inplace=True)),
        PICTURES,
    ),
    "called twice": (Twice, PICTURES),
}  # fmt: skip


def unfolded(layer, x):
    """Return what the taps of a layer read, ``[groups, taps, inputs of a group, positions]``: outputs of depthwise layers with one tap each."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).mT[None, None]
    moves = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    one = type(layer)(x.shape[1], x.shape[1], *moves, groups=x.shape[1], bias=False, padding_mode=layer.padding_mode)
    found = []
    for tap in torch.eye(one.weight[0].numel(), dtype=x.dtype):
        one.weight = nn.Parameter(tap.view(1, 1, *layer.kernel_size).repeat(x.shape[1], *[1] * (x.ndim - 1)))
        found.append(by_group(one(x).detach(), layer.groups))
    return torch.stack(found, 1)


def by_group(tensor, groups):
    """Bring ``[samples, channels, *places]`` to ``[groups, channels of a group, positions]``."""
    return tensor.transpose(0, 1).reshape(groups, tensor.shape[1] // groups, -1)


def naive(model, batch):
    """Return of every layer, sample by sample: the inputs of all calls, the gradients of their outputs, and the gradient of the weight."""
    layers = layers_of(model)
    found = {name: [] for name in layers}
    for n in range(len(batch)):
        calls = {name: [] for name in layers}
        hooks = [
            layer.register_forward_hook(
                lambda layer, args, output, calls=calls[name]: calls.append((args[0].detach(), output))
            )
            for name, layer in layers.items()
        ]
        loss = F.cross_entropy(model(batch[n : n + 1]), torch.tensor([n % 4]))
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            gradients = torch.autograd.grad(loss, [output for _, output in calls[name]], retain_graph=True)
            if isinstance(layer, nn.Linear):
                gradients = [g.reshape(-1, g.shape[-1]) for g in gradients]
            found[name].append(
                (
                    torch.cat([unfolded(layer, x) for x, _ in calls[name]], -1),
                    torch.cat([by_group(g, getattr(layer, "groups", 1)) for g in gradients], -1),
                    torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].unsqueeze(-1).flatten(2),
                )
            )
    return found


def network(name):
    build, x = NETWORKS[name]
    model = build().double().eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    if name == "norm and in place":  # what follows in place must not reach the naive twin's gradients
        twin = copy.deepcopy(model)
        for relu in (m for m in twin.modules() if isinstance(m, nn.ReLU)):
            relu.inplace = False
        return model, twin, x
    return model, model, x


def same(found, expected):
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("name", NETWORKS)
def test_factors_and_second_moments_equal_a_loop_over_samples(name):
    model, twin, x = network(name)
    factors = added(Factors(layers_of(model)), model, x[:3], x[3:]).factors()
    patched = added(Factors(layers_of(model), patches=True), model, x).factors()
    bases = {key: basis_of(factor) for key, factor in factors.items()}
    moments = added(SecondMoments(layers_of(model), bases), model, x[:3], x[3:]).moments()
    plain = added(SecondMoments(layers_of(model), dict.fromkeys(factors)), model, x).moments()
    expected = naive(twin, x)
    assert factors.keys() == expected.keys()
    for key, samples in expected.items():
        inputs, gradients = (torch.cat(parts, -1) for parts in list(zip(*samples, strict=True))[:2])
        weights = torch.stack([weight for *_, weight in samples])
        groups, taps, width, positions = inputs.shape
        alike = inputs.transpose(1, 2).flatten(2)
        same(factors[key].inputs, alike @ alike.mT / (positions * taps))
        together = inputs.transpose(1, 2).flatten(1, 2)
        same(patched[key].inputs, together @ together.mT / positions)
        same(factors[key].outputs, gradients @ gradients.mT / len(samples))
        same(plain[key], weights.square().mean(0).mT)
        grouped = weights.view(len(samples), groups, -1, width, taps)
        rotated = torch.einsum("gop,ngoir,giq->ngprq", bases[key].outputs, grouped, bases[key].inputs)
        same(moments[key], rotated.square().mean(0).flatten(0, 1))
