"""Kronecker factors and second moments against the authors' numbers, and against loops over samples in float64."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Twice, image
from torch import nn
from torch.nn import functional as F

from lightning_prune.curvature import kronecker
from lightning_prune.curvature.eigenbasis import Eigenbasis, directions
from lightning_prune.curvature.kronecker import Factors, SecondMoments
from lightning_prune.errors import ModelError
from lightning_prune.structure.gathered import reading

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


def tensors(found):
    """Return all factors or second moments of all layers."""
    return [t for value in found.values() for t in ([value] if torch.is_tensor(value) else vars(value).values())]


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
        held = {
            key: torch.from_numpy(numbers[f"feature.{name}/{key}"]).double() for key in ("Q_A", "Q_S", "lam_A", "lam_S")
        }
        their_basis = Eigenbasis(held["Q_A"][None], held["Q_S"][None], held["lam_A"][None], held["lam_S"][None])
        ours = (basis_of(found), len(numbers["x"]) ** 2, 1e-5)  # their eigenvectors are of single precision
        for basis, scale, tolerance in (ours, (their_basis, 1, 1e-6)):
            core = torch.einsum("op,oi...,iq->p...q", basis.outputs[0], weight, basis.inputs[0])
            core = core.view(len(core), -1, core.shape[-1])
            damage = (core.square() * basis.diagonal()).sum(1) * scale
            for axis, key in ((1, "imp_out"), (0, "imp_in")):
                theirs = numbers[f"feature.{name}/{key}"]
                np.testing.assert_allclose(damage.sum(axis), theirs, rtol=0, atol=tolerance * theirs.max())


class OneRow(nn.Module):
    """The samples lie along the second axis."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.inner(x.unsqueeze(0)).tanh()).squeeze(0)


class TokensFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.inner(x.transpose(0, 1)).tanh().mean(0))


class Folded(nn.Module):
    """Columns of the image, folded into the axis of samples as images of their own; samples stand first or last in it."""

    def __init__(self, samples_first):
        super().__init__()
        self.samples_first = samples_first
        self.conv, self.head = nn.Conv1d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x):  # [samples, channels, height, width]
        x = x.permute(0, 3, 1, 2) if self.samples_first else x.permute(3, 0, 1, 2)
        y = self.conv(x.flatten(0, 1)).tanh().mean(2).unflatten(0, x.shape[:2])
        return self.head(y.mean(1 if self.samples_first else 0))


PICTURES = torch.randn(SAMPLES, 3, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TOKENS = torch.randn(
    SAMPLES, 8, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64
)  # twice as many as samples
VOLUMES = PICTURES.unsqueeze(2).expand(-1, -1, 3, -1, -1) * torch.arange(1, 4).view(3, 1, 1)
NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)), TOKENS[:, 0]),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(40, 4)), TOKENS),
    "tokens first": (TokensFirst, TOKENS),
    "folded, samples first": (lambda: Folded(True), PICTURES),
    "folded, samples last": (lambda: Folded(False), PICTURES),
    "one row": (OneRow, TOKENS[:, 0]),
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


def test_the_channel_factor_is_the_mean_of_the_blocks_of_single_taps():
    model, _, x = network("dilated")
    layers = {"0": model[0]}
    channel, patched = (added(Factors(layers, patches=p), model, x).factors()["0"].inputs for p in (False, True))
    blocks = patched.view(3, 6, 3, 6).diagonal(dim1=1, dim2=3)
    torch.testing.assert_close(channel[0], blocks.mean(-1))
    for factor in (channel, patched):
        torch.testing.assert_close(factor, factor.mT, rtol=0, atol=0)
        assert torch.linalg.eigvalsh(factor).min() > -1e-12 * factor.norm()


def fisher(model, layer, x):
    """Return the mean outer product of the gradients of single samples, ``[out * in * K, out * in * K]``."""
    rows = []
    for n in range(len(x)):
        loss = F.cross_entropy(model(x[n : n + 1]), torch.tensor([n % 4]))
        rows.append(torch.autograd.grad(loss, layer.weight)[0].flatten())
    rows = torch.stack(rows)
    return rows.mT @ rows / len(x)


def kfac(factor, taps):
    """Return ``S (x) A (x) I_K``, in the order of a flattened weight."""
    return torch.kron(factor.outputs[0], torch.kron(factor.inputs[0], torch.eye(taps).double()))


def test_of_all_diagonals_in_the_eigenbasis_the_second_moments_come_nearest_and_keep_the_trace():
    torch.manual_seed(3)
    model = image(nn.Conv2d(3, 4, 3, stride=2, padding=1), channels=4).double()
    layers = {"0": model[0]}
    exact, factor = fisher(model, model[0], PICTURES), added(Factors(layers), model, PICTURES).factors()["0"]
    basis = basis_of(factor)
    moments = added(SecondMoments(layers, {"0": basis}), model, PICTURES).moments()["0"]
    columns = torch.kron(basis.outputs[0].contiguous(), torch.kron(basis.inputs[0].contiguous(), torch.eye(9).double()))
    error = lambda diagonal: (exact - columns * diagonal.mT.flatten() @ columns.mT).norm()  # noqa: E731
    spectral = basis.diagonal().expand_as(moments)
    torch.testing.assert_close(error(spectral), (exact - kfac(factor, 9)).norm())
    assert error(moments) < 0.99 * error(spectral)
    torch.testing.assert_close((columns.mT @ exact @ columns).diagonal(), moments.mT.flatten())
    torch.testing.assert_close(moments.sum(), exact.trace())
    for entry in range(0, moments.numel(), 7):
        for step in (-1e-3, 1e-3):
            other = moments.clone()
            other.view(-1)[entry] += step * moments.max()
            assert error(other) > error(moments)


def test_of_a_single_sample_the_factors_of_a_linear_layer_are_the_exact_fisher_information():
    model, _, x = network("linear")
    factor = added(Factors({"0": model[0]}), model, x[:1]).factors()["0"]
    same(kfac(factor, 1), fisher(model, model[0], x[:1]))


def test_processes_that_reduce_their_halves_have_the_factors_of_the_union():
    model, _, x = network("grouped")
    layers = layers_of(model)
    whole = added(Factors(layers), model, x).factors()
    bases = {name: basis_of(factor) for name, factor in whole.items()}
    for build, read in (
        (lambda: Factors(layers), Factors.factors),
        (lambda: SecondMoments(layers, bases), SecondMoments.moments),
    ):
        one, other = added(build(), model, x[:1]), added(build(), model, x[1:], first=1)
        flats = []
        other.reduce(lambda flat, flats=flats: (flats.append(flat.clone()), flat)[1])
        one.reduce(lambda flat, flats=flats: flat + flats[0])
        assert one.samples == len(x)
        for mine, theirs in zip(tensors(read(one)), tensors(read(added(build(), model, x))), strict=True):
            same(mine, theirs)


@pytest.mark.parametrize(
    "name", ["circular", "tokens", "tokens first", "called twice", "one row", "folded, samples first"]
)
def test_chunks_change_nothing(name, monkeypatch):
    model, _, x = network(name)
    layers, bases = layers_of(model), {}

    def found():
        factors = [added(Factors(layers, patches=p), model, x).factors() for p in (True, False)]
        bases.update({key: bases.get(key, basis_of(factor)) for key, factor in factors[-1].items()})
        moments = added(SecondMoments(layers, bases), model, x).moments()
        return [t for f in factors for t in tensors(f)] + tensors(moments)

    whole = found()
    monkeypatch.setattr(kronecker, "CHUNK", 1)
    for one, other in zip(found(), whole, strict=True):
        same(one, other)


def test_a_constant_input_is_part_of_the_factor_where_there_is_a_bias():
    model, _, x = network("conv")
    layers = layers_of(model)
    patched = added(Factors(layers, patches=True, homogeneous=True), model, x).factors()
    plain = added(Factors(layers, patches=True), model, x).factors()
    means = []
    hook = model[0].register_forward_hook(lambda layer, args, _: means.append(unfolded(layer, args[0]).mean(-1)))
    model(x)
    hook.remove()
    same(patched["0"].inputs[:, :-1, :-1], plain["0"].inputs)
    same(patched["0"].inputs[0, -1, :-1], means[0][0].T.flatten())
    assert patched["0"].inputs[0, -1, -1] == 1
    assert added(Factors(layers, homogeneous=True), model, x).factors()["0"].inputs.shape == (1, 3, 3)
    bare, _, x = network("linear")
    widths = {
        name: f.inputs.shape[1]
        for name, f in added(Factors(layers_of(bare), homogeneous=True), bare, x).factors().items()
    }
    assert widths == {"0": 7, "2": 5}  # the last layer has no bias


def test_second_moments_in_a_homogeneous_basis_are_those_of_weight_and_bias():
    model, _, x = network("linear")
    layers = {"0": model[0]}
    factor = added(Factors(layers, homogeneous=True), model, x).factors()["0"]
    basis = basis_of(factor)
    found = added(SecondMoments(layers, {"0": basis}), model, x).moments()["0"]
    expected = torch.zeros(5, 7).double()
    for n in range(len(x)):
        loss = F.cross_entropy(model(x[n : n + 1]), torch.tensor([n % 4]))
        weight, bias = torch.autograd.grad(loss, [model[0].weight, model[0].bias])
        joined = torch.cat([weight, bias.unsqueeze(1)], 1)
        expected += (basis.outputs[0].mT @ joined @ basis.inputs[0]).square() / len(x)
    same(found[:, 0], expected)


def test_second_moments_in_some_directions_are_those_of_the_whole_basis_there():
    model, _, x = network("conv")
    layers = {"0": model[0]}
    basis = basis_of(added(Factors(layers), model, x).factors()["0"])
    some = Eigenbasis(
        basis.inputs[:, :, 1:], basis.outputs[:, :, 3:], basis.input_values[:, 1:], basis.output_values[:, 3:]
    )
    whole, part = (added(SecondMoments(layers, {"0": b}), model, x).moments()["0"] for b in (basis, some))
    same(part, whole[3:, :, 1:])


def test_a_layer_that_gathers_has_the_factors_of_what_it_reads():
    model, _, x = network("linear")
    reads = torch.tensor([True, False, True, True, False, True])
    small = copy.deepcopy(model[0])
    small.weight = nn.Parameter(small.weight[:, reads].detach())
    gathering = nn.Sequential(reading(small, reads), *model[1:])
    plain = nn.Sequential(small, *model[1:])
    found, expected = (
        added(Factors(layers_of(m)), m, y).factors()["0"] for m, y in ((gathering, x), (plain, x[:, reads]))
    )
    same(found.inputs, expected.inputs)
    same(found.outputs, expected.outputs)


def test_frozen_layers_have_factors_and_in_place_changes_of_their_inputs_come_too_late():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x):
            x = x.clone()
            y = self.first(x)
            x.mul_(100)
            return self.head(y.tanh_())

    model, x = Changing().double(), TOKENS[:, 0]
    plain = nn.Sequential(model.first, nn.Tanh(), model.head)
    names = dict(zip(("0", "2"), ("first", "head"), strict=True))
    expected = added(Factors(layers_of(plain)), plain, x).factors()
    squares = added(SecondMoments(layers_of(plain), dict.fromkeys(("0", "2"))), plain, x).moments()
    model.requires_grad_(False)
    found = added(Factors(layers_of(model)), model, x).factors()
    moments = added(SecondMoments(layers_of(model), dict.fromkeys(found)), model, x).moments()
    for theirs, name in names.items():
        same(found[name].inputs, expected[theirs].inputs)
        same(found[name].outputs, expected[theirs].outputs)
        same(moments[name], squares[theirs])


def test_memory_format_changes_nothing():
    model, _, x = network("grouped")
    layers = layers_of(model)
    whole = added(Factors(layers), model, x).factors()
    bases = {name: basis_of(factor) for name, factor in whole.items()}
    moments = added(SecondMoments(layers, bases), model, x).moments()
    last = x.contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    found = added(Factors(layers), model, last).factors(), added(SecondMoments(layers, bases), model, last).moments()
    for one, other in zip(found, (whole, moments), strict=True):
        for mine, theirs in zip(tensors(one), tensors(other), strict=True):
            same(mine, theirs)


def test_an_image_without_an_axis_of_samples_is_one_sample():
    layer, x = nn.Conv2d(3, 4, 3, padding=1).double(), PICTURES[0]
    found = []
    for image_or_batch in (x, x[None]):
        factors = Factors({"": layer})
        with factors.watching():
            z = layer(image_or_batch).mean((-2, -1)).view(1, 4)
        factors.backward(z, torch.arange(4.0).view(1, 4))
        found.append(tensors(factors.factors()))
    for one, other in zip(*found, strict=True):
        same(one, other)


def test_layers_that_no_gradient_can_reach_are_left_out():
    model, _, x = network("linear")
    factors = Factors(layers_of(model))
    with factors.watching():
        with torch.no_grad():
            y = model[0](x)
        z = model[2](y.tanh())
    factors.backward(z, torch.ones_like(z))
    assert factors.factors().keys() == {"2"}


def test_the_model_is_left_as_it_was():
    model, _, x = network("norm and in place")
    before = copy.deepcopy(model.state_dict())
    added(Factors(layers_of(model)), model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_half_precision_and_autocast_sum_up_in_single_precision():
    model, _, x = network("conv")
    exact = added(Factors(layers_of(model)), model, x).factors()["0"]
    half = copy.deepcopy(model).bfloat16()
    single = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        cast = added(Factors(layers_of(single)), single, x.float()).factors()["0"]
    for found, input_error in (
        (cast, 1e-6),
        (added(Factors(layers_of(half)), half, x.bfloat16()).factors()["0"], 1e-2),
    ):
        assert (found.inputs - exact.inputs).norm() < input_error * exact.inputs.norm()
        assert (found.outputs - exact.outputs).norm() < 3e-2 * exact.outputs.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_the_name_of_the_layer(bad):
    model, _, x = network("linear")
    x = x.clone()
    x[1, 2] = bad
    with pytest.raises(ModelError, match="layer '0' is not finite"):
        added(Factors(layers_of(model)), model, x).factors()
    with pytest.raises(ModelError, match="layer '0' is not finite"):
        added(SecondMoments(layers_of(model), {"0": None, "2": None}), model, x).moments()


def test_samples_that_do_not_lie_along_one_axis_are_refused_by_the_name_of_the_layer():
    model, _, x = network("linear")

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model[0]

        def forward(self, x):
            return self.inner(x.mT @ x)[:4]  # features by features

    with pytest.raises(ModelError, match=r"Layer 'inner' .* 4 samples"):
        added(SecondMoments({"inner": model[0]}, {"inner": None}), Mixed(), x)
