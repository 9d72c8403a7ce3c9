"""Cuts and bits as data: what a file may say, and what is refused before anything is built."""

import json

import pytest
import torch
from cuts import chain, cut_chain, keep
from torch import nn

from lightning_prune.errors import PlanError
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.steps import Cut, KeepChannels, pack_bits, unpack_bits

FIRST, SECOND = keep(6, 1, 4), keep(5, 0)


@pytest.mark.parametrize(("shape", "last"), [((4, 1, 3, 3), True), ((4, 3, 1, 1), True), ((4, 3, 1, 1), False)])
def test_the_memory_format_stays_where_strides_are_ambiguous(shape, last):
    form = torch.channels_last if last else torch.contiguous_format
    weight = torch.empty(shape).contiguous(memory_format=form).clone(memory_format=form)
    small = Cut.of(shape, {0: keep(4, 1)}).select(weight)
    assert small.stride() == torch.empty(small.shape, memory_format=form).stride()


def edit(*path):
    """Return a function that puts a value at ``path`` of a step."""

    def put(value):
        def change(step):
            for key in path[:-1]:
                step = step[key]
            step[path[-1]] = value

        return change

    return put


CUT = ("tensors", "weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(*CUT, "shape")([5, 6000, 3, 3]), "takes 750 bytes"),
        (edit(*CUT, "shape")([10**18, 6, 3, 3]), "bytes"),
        (edit(*CUT, "shape")([5, 6.0, 3, 3]), "sizes are integers"),
        (edit(*CUT, "shape")([5, 6, 0, 3]), "sizes are integers above 0"),
        (edit(*CUT, "shape")("abc"), "cannot be cut"),
        (edit(*CUT, "shape")(7), "broken"),
        (edit(*CUT, "keep")({"4": "AA=="}), "cannot be cut along axes"),
        (edit(*CUT, "keep")({"-1": "AA=="}), "cannot be cut along axes"),
        (edit(*CUT, "keep")(["0"]), "broken"),
        (edit(*CUT, "keep", "0")("AA=="), "leave nothing"),
        (edit(*CUT, "keep", "0")("?"), "base64"),
        (edit(*CUT, "keep", "0")(5), "broken"),
        (edit(*CUT, "grid")("/////w=="), "rules out"),
        (edit(*CUT, "zero")([2]), "must be among those cut"),
        (edit(*CUT, "zero")([0, 0]), "must be among those cut"),
        (edit(*CUT, "more")(1), "A cut has"),
        (edit("tensors")([]), "broken"),
        (edit("attributes", "in_channels")([6, "4"]), "an integer or several"),
        (edit("attributes", "in_channels")([6, True]), "an integer or several"),
        (edit("attributes", "in_channels")([6, [4]]), "from one size to another"),
        (edit("attributes", "in_channels")([6]), "from one size to another"),
        (edit("absorb")({"weight": "weight"}), "'weight', 'bias' and 'value'"),
        (edit("absorb")({"weight": "bias", "bias": "bias", "value": 1}), "loses no inputs"),
        (edit("absorb")({"weight": "weight", "bias": "bias", "value": float("nan")}), "constant nan"),
        (edit("absorb")({"weight": "weight", "bias": "bias", "value": 10**400}), "cannot absorb"),
        (edit("code")("import os"), "broken"),
    ],
)
def test_a_damaged_step_is_refused(change, message):
    model = chain()
    data = json.loads(cut_chain(model, FIRST, SECOND).to_json())
    change(data["steps"][2])
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(data))


def test_a_grid_with_rows_of_different_length_is_refused():
    uneven = torch.tensor([[True, True], [True, False]])
    with pytest.raises(PlanError, match=r"keep \[1, 2\] columns"):
        Cut.of((2, 2), {}, grid=uneven)
    assert Cut.of((2, 2), {0: keep(2, 0)}, grid=uneven).after == (1, 1)  # the row that leaves does not count


@pytest.mark.parametrize("name", ["training", "_version", "__class__", "forward", "dump_patches"])
def test_an_attribute_that_is_no_size_of_the_module_is_not_set(name):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(PlanError, match="the model has"):
        KeepChannels("0", {}, {name: (1, 0)}).build(model)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1001])
def test_bits_round_trip(count):
    mask = torch.rand(count) < 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), count), mask)
    with pytest.raises(PlanError, match="bytes"):
        unpack_bits(pack_bits(mask), count + 8)
