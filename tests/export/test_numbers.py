import pytest
from lightning_prune.export.numbers import Stored, check_numbers
from torch import nn

from lightning_prune.errors import ExportError


def stored(name, numbers, *sources):
    return Stored(name, (numbers,), numbers, frozenset(sources))


def test_transposed_copies_and_constants_of_forward_are_allowed():
    net = nn.Linear(40, 40)
    check_numbers(
        [
            stored("weight", 1600, "weight"),
            stored("val_1", 1600, "weight"),
            stored("bias", 40, "bias"),
            stored("mask", 10**6),
        ],
        net,
    )


def test_growth_from_one_weight_is_refused_beyond_the_allowance():
    net = nn.Linear(40, 40)  # 1,640 numbers: 5 % are 82
    check_numbers([stored("val_1", 1722, "weight")], net)
    with pytest.raises(ExportError, match=r"1,723 numbers for the model's 1,640.*'val_1' \[1723\] comes from weight"):
        check_numbers([stored("val_1", 1723, "weight")], net)


def test_nothing_made_from_factorized_layers_may_grow():
    net = nn.ModuleDict({"a": nn.Linear(100, 100), "b": nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 5))})
    grown = [stored("val_1", 25, "b.0.weight", "b.1.weight"), stored("a.weight", 10000, "a.weight")]
    check_numbers(grown, net)
    with pytest.raises(ExportError, match=r"comes from b\.0\.weight x b\.1\.weight"):
        check_numbers([grown[1], stored("val_1", 21, "b.0.weight", "b.1.weight")], net, ["b"])
