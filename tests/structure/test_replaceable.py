"""Which layers may be replaced: what patterns know them by, once they were replaced, too, and why others stay."""

import pytest
import torch
from torch import nn

from lightning_prune.errors import OptionError
from lightning_prune.structure.factorized import factorize
from lightning_prune.structure.replaceable import replaceable
from lightning_prune.structure.rotated import Directions, Rotated, rotate
from lightning_prune.structure.steps import Tensorize
from lightning_prune.structure.tensor_train import Form


def network() -> nn.Sequential:
    """Return a low-rank convolution, a rotated one, a plain, a depthwise, a transposed one and two linear layers, the first of cores."""
    model = nn.Sequential(
        factorize(nn.Conv2d(8, 8, 3), "channel", 2),
        rotate(nn.Conv2d(8, 8, 3), Directions(torch.eye(8, dtype=torch.float64)[:, :3])),
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 8, 3),
        nn.Linear(16, 16),
        nn.Linear(16, 4),
    )
    Tensorize.of("5", model[5], Form((4, 4), (4, 4), (2,), 0)).apply(model)
    return model


def test_plain_layers_are_found_and_others_have_a_reason():
    found, alone = replaceable(network(), None, None)
    assert list(found) == ["2", "6"]
    assert {name for name, why in alone.items() if why == "it is made of factors already"} == {"0", "1", "5"}
    assert "depthwise" in alone["3"]
    assert "transposed" in alone["4"]
    assert not any("." in name for name in alone)  # parts are no layers of their own


def test_kinds_that_may_be_replaced_again_are_found_and_an_obstacle_of_the_caller_is_a_reason():
    found, alone = replaceable(
        network(), None, None, lambda name, _: "it is the last" if name == "6" else None, (Rotated,)
    )
    assert list(found) == ["1", "2"]
    assert alone["6"] == "it is the last"


def test_patterns_know_a_replaced_layer_by_its_name_and_the_type_of_its_parts():
    assert replaceable(network(), "0", None)[1] == {"0": "it is made of factors already"}
    found, alone = replaceable(network(), nn.Conv2d, None)
    assert list(found) == ["2"]
    assert {"0", "1"} <= set(alone)
    assert list(replaceable(network(), None, ["2", "Conv2d"])[0]) == ["6"]
    with pytest.raises(OptionError, match="matches no layer"):
        replaceable(network(), "nowhere", None)


def test_a_layer_that_is_the_model_itself_stays():
    assert replaceable(nn.Linear(3, 3), None, None) == ({}, {"": "it is the model itself, not a layer inside it"})
