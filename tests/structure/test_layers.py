"""Descriptions of layers: JSON and back."""

import json

import pytest
import torch
from torch import nn

from lightning_prune.errors import ModelError, PlanError
from lightning_prune.structure.layers import describe, layer_from

LAYERS = [
    nn.Linear(3, 4),
    nn.Linear(3, 4, bias=False),
    nn.Conv1d(4, 6, 3, stride=2, groups=2),
    nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(1, 2), padding_mode="circular"),
    nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), bias=False),
    nn.Conv3d(4, 6, 2, padding=1, padding_mode="replicate"),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layer_comes_back_from_its_json(layer):
    spec = json.loads(json.dumps(describe(layer)))
    state = torch.get_rng_state()
    again = layer_from(spec, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again) is type(layer)
    assert str(again) == str(layer)
    assert {key: (value.shape, value.dtype) for key, value in again.state_dict().items()} == {
        key: (value.shape, torch.float64) for key, value in layer.state_dict().items()
    }
    assert describe(again) == spec
    assert layer_from(spec, device="meta").weight.is_meta


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose1d(2, 2, 2), nn.LazyLinear(3), nn.ReLU()], ids=lambda m: type(m).__name__
)
def test_other_layers_have_no_description(layer):
    with pytest.raises(ModelError, match=f"type {type(layer).__name__} cannot be described"):
        describe(layer)


@pytest.mark.parametrize(
    "change",
    [{"type": "LSTM"}, {"type": None}, {"extra": 1}, {"in": "many"}, {"groups": 3}, {"kernel": 3}, {"padding": "some"}],
    ids=str,
)
def test_damaged_descriptions_are_refused(change):
    with pytest.raises(PlanError, match="plan is damaged"):
        layer_from(describe(nn.Conv2d(4, 6, 3)) | change)


def test_incomplete_description_is_refused():
    with pytest.raises(PlanError, match="plan is damaged"):
        layer_from({"type": "Linear", "in": 3})
