"""Patterns that leave nothing are told apart from patterns that match nothing."""

import pytest
import torch
from torch import nn

from lightning_prune import LowRank, Magnitude, compress
from lightning_prune.errors import OptionError
from lightning_prune.structure.select import select
from tests.networks import conv_bn

LAYERS = {"a": nn.Linear(2, 2), "b": nn.Conv2d(2, 2, 1)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "*"}, r"exclude='\*': of 2 layers that could be compressed, none is left"),
        ({"exclude": ["a", nn.Conv2d]}, "none is left"),
        ({"include": "a", "exclude": "Linear"}, "include='a' and exclude='Linear': .* none is left"),
        ({"exclude": "c*"}, r"exclude='c\*' matches no layer"),
    ],
)
def test_patterns_that_leave_nothing_and_patterns_that_match_nothing_are_two_errors(options, message):
    with pytest.raises(OptionError, match=message):
        select(LAYERS, **options)


def test_a_model_without_layers_is_no_mistake_of_a_pattern():
    assert select({}) == {}


@pytest.mark.parametrize(
    "method", [LowRank(flops=0.5, exclude="*"), Magnitude(structured=True, flops=0.5, exclude="*")]
)
def test_a_method_that_may_touch_nothing_says_so(method):
    with pytest.raises(OptionError, match="none is left"):
        compress(conv_bn(), method, torch.randn(2, 3, 8, 8))
