"""Kronecker factors and second moments against the authors' numbers, and against loops over samples in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.curvature.eigenbasis import Eigenbasis, directions
from lightning_prune.curvature.kronecker import Factors

REFERENCE = Path(__file__).parents[1] / "reference"
SAMPLES = 4


def layers_of(model):
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def classes(z):
    return F.cross_entropy(z, torch.arange(len(z)) % z.shape[1], reduction="sum")


def gradients_of(z):
    """Return the gradients of the loss of every sample, at fixed labels."""
    return torch.autograd.grad(classes(z), z, retain_graph=True)[0].double()


def added(collector, model, *batches):
    for x in batches:
        with collector.watching():
            z = model(x)
        collector.backward(z, gradients_of(z))
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
    numbers, model, factors = authors(kind)
    batches, samples = numbers["sampled_y"].shape
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
                scales[key] * directions(factor)[0], values, rtol=1e-4, atol=1e-5 * float(values.max())
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
            np.testing.assert_allclose(damage.sum(axis), theirs, rtol=1e-3, atol=1e-6 * theirs.max())
