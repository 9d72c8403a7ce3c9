"""Shares of outputs: twins by autograd of one term at a time, what sums to 1, invariances, batches, and what is refused."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import conv1d, conv2d, conv3d, linear, pad

from lightning_prune.errors import ModelError
from lightning_prune.measure import contributions
from lightning_prune.measure.contributions import NEGLIGIBLE, Collector, unit_shares, weight_shares

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (7, 6)),
    "tokens": (lambda: nn.Linear(6, 5, bias=False), (3, 4, 2, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2), (3, 3, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 5, (3, 2), stride=(1, 2), padding=1), (3, 4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=(0, 1, 0)), (2, 2, 3, 3, 3)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding="same", groups=4), (2, 4, 5, 5)),
    "reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
    "circular": (lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"), (2, 3, 6)),
    "pointwise": (lambda: nn.Conv2d(5, 6, 1, stride=2), (9, 5, 4, 4)),
}


def make(name, signed=True):
    build, shape = LAYERS[name]
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    return layer, x if signed else x.relu()


def output(layer, weight, x):
    """Return what a layer of another weight would give without bias, ``[samples, outputs, positions]``."""
    if isinstance(layer, nn.Linear):
        return linear(x, weight).flatten(1, -2).transpose(1, 2) if x.ndim > 2 else linear(x, weight)[:, :, None]
    if layer.padding_mode != "zeros":
        x = pad(x, [p for p in reversed(layer.padding) for _ in range(2)], layer.padding_mode)
    run = {1: conv1d, 2: conv2d, 3: conv3d}[len(layer.kernel_size)]
    padding = layer.padding if layer.padding_mode == "zeros" else 0
    return run(x, weight, None, layer.stride, padding, layer.dilation, layer.groups).flatten(2)


def halves(layer, x):
    """Yield weights and inputs, neither negative, that add up to the layer's."""
    weight = layer.weight.detach()
    yield from itertools.product((weight.relu(), (-weight).relu()), (x.relu(), (-x).relu()))


def share(part, whole, least=0.0):
    return torch.where(whole > least, part / whole, 0)


def naive_units(layer, x, units, count):
    """Share of a unit: the output with all other columns zeroed over the whole output."""
    groups = getattr(layer, "groups", 1)
    by_row = units.view(groups, -1).repeat_interleave(len(layer.weight) // groups, 0)
    found = torch.zeros(count, dtype=torch.float64)
    for weight, a in halves(layer, x):
        whole = output(layer, weight, a)
        for unit in range(count):
            own = (by_row == unit).view(*by_row.shape, *[1] * (weight.ndim - 2))
            found[unit] = max(found[unit], share(output(layer, weight * own, a), whole).max())
    return found


def naive_weights(layer, x, least=0.0, mean=False):
    """Share of a weight: the output with all other weights zeroed over the whole output."""
    found = torch.zeros_like(layer.weight)
    for weight, a in halves(layer, x):
        whole = output(layer, weight, a)
        for index in (weight > 0).nonzero().tolist():
            alone = torch.zeros_like(weight)
            alone[tuple(index)] = weight[tuple(index)]
            parts = share(output(layer, alone, a), whole, least)[:, index[0]]
            best = (parts.mean(1) if mean else parts).max()
            found[tuple(index)] = max(found[tuple(index)], best)
    return found.detach()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_share_of_a_channel_is_that_of_the_output_without_the_others(name, signed):
    layer, x = make(name, signed)
    channels = x.shape[1 if name not in ("linear", "tokens") else -1]
    units = torch.arange(channels)
    torch.testing.assert_close(unit_shares(layer, x, units, channels), naive_units(layer, x, units, channels))


@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped", "depthwise"])
def test_channels_of_one_unit_add_up_and_those_of_none_stay_in_the_whole(name):
    layer, x = make(name)
    channels = x.shape[1]
    units = torch.tensor([1, -1, 1, 3, 0, 1][:channels])  # unit 2 is not read, the others are of sizes 1 and 3
    expected = naive_units(layer, x, units, 4)
    torch.testing.assert_close(unit_shares(layer, x, units, 4), expected)
    groups = getattr(layer, "groups", 1)
    entries = units.view(groups, -1).repeat_interleave(len(layer.weight) // groups, 0)
    assert torch.equal(unit_shares(layer, x, entries, 4), unit_shares(layer, x, units, 4))


@pytest.mark.parametrize("name", LAYERS)
def test_the_share_of_a_weight_is_that_of_the_output_without_the_others(name):
    layer, x = make(name)
    torch.testing.assert_close(weight_shares(layer, x), naive_weights(layer, x))
    torch.testing.assert_close(weight_shares(layer, x, "mean"), naive_weights(layer, x, mean=True))


@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped"])
def test_max_tap_is_the_largest_share_of_a_weight_in_each_channel(name):
    layer, x = make(name)
    x[0] *= 1e-8  # sums of this sample count only where the threshold is forgotten
    weights = naive_weights(layer, x, NEGLIGIBLE).view(*layer.weight.shape[:2], -1).amax(2)
    groups, rows = getattr(layer, "groups", 1), len(layer.weight)
    expected = weights.view(groups, rows // groups, -1).amax(1).flatten()
    found = unit_shares(layer, x, torch.arange(x.shape[1]), x.shape[1], "max_tap")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped", "pointwise"])
def test_chunks_of_units_and_of_positions_change_nothing(name, monkeypatch):
    layer, x = make(name)
    units = torch.arange(x.shape[1])
    whole = unit_shares(layer, x, units, len(units)), weight_shares(layer, x)
    monkeypatch.setattr(contributions, "CHUNK", 8)
    monkeypatch.setattr(contributions, "POSITIONS", 3)
    torch.testing.assert_close((unit_shares(layer, x, units, len(units)), weight_shares(layer, x)), whole)


@pytest.mark.parametrize("shape", [(8, 64, 6, 6), (8, 64, 2, 2), (70, 64, 1, 1)])
@pytest.mark.parametrize("signed", [False, True])
def test_a_batch_gives_bit_for_bit_the_maximum_over_its_samples(shape, signed):
    layer, x = nn.Conv2d(64, 48, 3, padding=1), torch.randn(shape)  # float32, wide enough for blocked products
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.relu()) if signed else x.relu()
    units = torch.arange(64)
    for measure in (lambda x: unit_shares(layer, x, units, 64), lambda x: weight_shares(layer, x, "mean")):
        assert torch.equal(measure(x), torch.stack([measure(sample[None]) for sample in x]).amax(0))


@pytest.mark.parametrize("name", LAYERS)
def test_shares_are_between_0_and_1_sum_to_1_at_least_and_have_no_scale(name):
    layer, x = make(name)
    channels = x.shape[1 if name not in ("linear", "tokens") else -1]
    shares = unit_shares(layer, x, units := torch.arange(channels), channels)
    assert shares.min() >= 0
    assert shares.max() <= 1
    assert shares.sum() >= 1 - 1e-12
    torch.testing.assert_close(unit_shares(layer, x * 1e-30, units, channels), shares)
    layer.weight.data *= torch.logspace(-20, 3, len(layer.weight)).view(-1, *[1] * (layer.weight.ndim - 1))
    torch.testing.assert_close(unit_shares(layer, x, units, channels), shares)


def test_permuted_channels_permute_shares_and_more_samples_never_lower_them():
    layer, x = make("conv2d")
    order, units = torch.tensor([2, 0, 3, 1]), torch.arange(4)
    shares = unit_shares(layer, x, units, 4)
    torch.testing.assert_close(unit_shares(layer, x, order.argsort(), 4), shares[order])
    assert (unit_shares(layer, x[:2], units, 4) <= shares).all()
    assert torch.equal(unit_shares(layer, torch.cat([x, x]), units, 4), shares)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype):
    layer, x = nn.Linear(6, 5, dtype=dtype), torch.randn(7, 6, dtype=dtype)
    found = unit_shares(layer, x, torch.arange(6), 6)
    assert found.dtype == torch.float32
    assert torch.equal(found, unit_shares(layer.float(), x.float(), torch.arange(6), 6))


@pytest.mark.parametrize("contribution", ["channel_sum", "max_tap"])
def test_without_units_or_samples_there_are_no_shares(contribution):
    for layer, x in (make("linear"), make("conv2d")):
        channels = x.shape[1]
        assert not unit_shares(layer, x, torch.full((channels,), -1), 2, contribution).any()
        assert not unit_shares(layer, x[:0], torch.arange(channels), channels, contribution).any()
        assert not weight_shares(layer, x[:0]).any()


def test_a_layer_without_weights_has_no_shares():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    assert not unit_shares(layer, torch.rand(4, 3), torch.arange(3), 3).any()
    assert not weight_shares(layer, torch.rand(4, 3)).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_refused_by_name_of_the_layer(value):
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.ones(4, 3)
    x[2, 1] = value
    collector = Collector(model, {"0": torch.zeros(3)}, lambda _, layer, x: unit_shares(layer, x, torch.arange(3), 3))
    with pytest.raises(ModelError, match=r"'0'.*not finite"), collector.watching():
        model(x)
    assert not model[0]._forward_hooks


def test_a_collector_takes_all_calls_of_a_layer_together_and_counts_them():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.never = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 2)

        def forward(self, x):
            return self.conv(input=self.conv(x)[:, :, 1:])

    model, batches = Twice().double(), [torch.randn(n, 2, 4, 4, dtype=torch.float64) for n in (3, 1)]
    measure = lambda _, layer, x: weight_shares(layer, x)  # noqa: E731
    start = {name: torch.zeros_like(model.get_submodule(name).weight) for name in ("conv", "never")}
    collector = Collector(model, start, measure)
    with collector.watching(), torch.no_grad():
        for x in batches:
            model(x)
    with torch.no_grad():
        calls = [call for x in batches for call in (x, model.conv(x)[:, :, 1:])]
    torch.testing.assert_close(
        collector.largest["conv"], torch.stack([weight_shares(model.conv, x) for x in calls]).amax(0)
    )
    assert collector.seen["conv"] == contributions.Seen(8, 16, 2, (3 + 1) * 2 * (16 + 12))
    assert collector.seen["never"].samples == 0
    assert not collector.largest["never"].any()
    assert not collector.largest["conv"].requires_grad
