"""Who reads the channels of units: by hand on small networks."""

import numpy as np
import pytest
import torch
from networks import BasicBlock, LSTMClassifier
from torch import nn

from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.groups import find_units
from lightning_prune.structure.readers import called_modules, find_readers


def readers_of(model, x):
    calls = as_calls(x)
    structure = find_units(model.eval(), calls)
    found, unknown = find_readers(model, structure, called_modules(model, calls))
    return structure, {reader.layer: reader.units for reader in found}, unknown


def writes(structure, layer):
    """The units of the rows of a layer's weight."""
    return next(slot.units for slot in structure.by_tensor[f"{layer}.weight"] if slot.axis == 0)


def test_every_layer_on_a_stream_reads_the_units_that_its_writers_write():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), BasicBlock(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    )
    structure, readers, unknown = readers_of(model, torch.zeros(1, 3, 5, 5))
    stream = writes(structure, "0")
    assert readers.keys() == {"1.conv1", "1.conv2", "4"}
    assert np.array_equal(readers["1.conv1"], stream)
    assert np.array_equal(readers["4"], stream)
    assert np.array_equal(readers["1.conv2"], writes(structure, "1.conv1"))
    assert not unknown


def test_behind_flatten_several_inputs_are_of_one_unit():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(3 * 4, 2))
    structure, readers, _ = readers_of(model, torch.zeros(1, 1, 4, 4))
    assert np.array_equal(readers["2"], writes(structure, "0").repeat(4))


def test_a_depthwise_convolution_goes_with_its_channels_and_reads_none():
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1))
    structure, readers, unknown = readers_of(model, torch.zeros(1, 2, 5, 5))
    assert readers.keys() == {"2"}
    assert np.array_equal(readers["2"], writes(structure, "0"))
    assert not unknown


def test_units_are_told_that_something_reads_whose_inputs_are_not_seen():
    structure, readers, unknown = readers_of(LSTMClassifier(), torch.zeros(2, 3, dtype=torch.int64))
    assert "lstm" not in readers
    embedded = next(slot.units for slot in structure.by_tensor["embedding.weight"])
    (reason,) = [why for why, units in unknown.items() if np.isin(embedded, units).all()]
    assert reason == "'lstm', a LSTM, whose inputs cannot be seen, reads it"


class Named(nn.Conv2d):
    """A convolution under another name."""


class Own(nn.Conv2d):
    """One with code of its own."""

    def forward(self, x):
        return super().forward(x * x)


@pytest.mark.parametrize("kind", [Named, Own])
def test_a_subclass_is_a_reader_as_long_as_it_computes_what_its_base_does(kind):
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), kind(6, 3, 1))
    _, readers, unknown = readers_of(model, torch.zeros(1, 2, 4, 4))
    assert ("2" in readers) == (kind is Named)
    assert bool(unknown) == (kind is Own)


class Functional(nn.Module):
    """The second layer's weight is used without calling the layer, or the layers share a weight."""

    def __init__(self, tied):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.tied = tied
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = self.second(x) if self.tied else nn.functional.linear(x, self.second.weight)
        return self.third(torch.relu(x))


@pytest.mark.parametrize(("tied", "why"), [(True, "shares its weight"), (False, "whose inputs cannot be seen")])
def test_layers_that_are_not_called_or_share_their_weight_cannot_be_watched(tied, why):
    _, readers, unknown = readers_of(Functional(tied), torch.zeros(1, 4))
    assert "second" not in readers
    assert not unknown if not readers and tied else any(why in reason for reason in unknown)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert {"", "0", "1", "2"} <= set(called_modules(model, as_calls(torch.randn(5, 3))))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
