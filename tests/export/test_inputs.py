import pytest
import torch
from lightning_prune.export.inputs import read_inputs, read_outputs, widened
from torch import nn

from lightning_prune.errors import ExportError
from lightning_prune.structure.calls import Call


class Net(nn.Module):
    def forward(self, x, options=None, *, extra=None):
        return x


X = torch.arange(6.0).view(2, 3)


def test_names_follow_arguments_and_nesting_in_order_of_the_signature():
    inputs = read_inputs(Net(), {"extra": {"a": X, "b": [X, 7]}, "x": X})
    assert list(inputs.tensors) == ["x", "extra_a", "extra_b_0"]
    assert list(read_inputs(Net(), (X, (X, X))).tensors) == ["x", "options_0", "options_1"]


def test_a_single_example_is_repeated_and_other_tensors_are_kept():
    inputs = widened(read_inputs(Net(), (X[:1], torch.ones(4))))
    assert torch.equal(inputs.tensors["x"], X[[0, 0]])
    assert inputs.tensors["options"].shape == (4,)
    assert torch.equal(read_inputs(Net(), X).resized(5).tensors["x"], X[[0, 1, 0, 1, 0]])


def test_only_tensors_with_the_batch_size_are_dynamic():
    shapes = read_inputs(Net(), (X, torch.ones(4))).dynamic_shapes()
    assert shapes["options"] is None
    assert shapes["x"][0].__name__ == "batch"


def test_calls_of_submodules_are_refused():
    with pytest.raises(ExportError, match="exported through its forward, but the example inputs call 'encoder'"):
        read_inputs(Net(), Call("encoder", (X,)))


def test_outputs_are_named_by_structure_and_never_as_an_input():
    names = read_outputs({"logits": X, "x": (X, X), "none": None}, {"x_1": X}, "Net")
    assert list(names) == ["logits", "x_0", "x_1_out"]
    assert list(read_outputs(X, {}, "Net")) == ["output"]
    assert list(read_outputs((X, [X]), {}, "Net")) == ["output_0", "output_1_0"]
    with pytest.raises(ExportError, match=r"Net\.forward returns int \(output_1\)"):
        read_outputs((X, 3), {}, "Net")
