import pytest
import torch
from lightning_prune.export.batches import read_batches, split

from lightning_prune.errors import ExportError

X, Z, Y = torch.ones(2, 3), torch.zeros(2, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("batch", "names", "target"),
    [
        (X, ["x"], None),
        ((X, Y), ["x"], Y),
        ([X, Y], ["x"], Y),
        ((X,), ["x"], None),
        ((X, Z, Y), ["x", "z"], Y),
        (((X, Z), Y), ["x", "z"], Y),
        ((X, Z), ["x", "z"], None),
        (({"z": Z, "x": X}, Y), ["x", "z"], Y),
        ({"x": X, "z": Z, "label": Y}, ["x", "z"], Y),
        ({"x": X, "anything": Y}, ["x"], Y),
        ({"x": X, "index": Z, "target": Y}, ["x"], Y),
        ({"x": X}, ["x"], None),
    ],
)
def test_batches_are_read_as_inputs_and_target(batch, names, target):
    found = split(batch, names)
    values = {"x": X, "z": Z}
    assert list(found.feeds) == names
    assert all(found.feeds[name] is values[name] for name in names)
    assert found.target is target


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ("text", "is a str"),
        ({"image": X, "y": Y}, "a dict with 'image', 'y'; the file has the inputs x"),
        ((X, Z, Y, Y), "a tuple of Tensor, Tensor, Tensor, Tensor"),
        ({"x": X, "a": Y, "b": Y}, "which is the target"),
    ],
)
def test_other_batches_are_described(batch, words):
    with pytest.raises(ExportError, match=words):
        split(batch, ["x"])


def test_limit_and_empty_loader():
    assert len(list(read_batches([X, X, X], ["x"], 2))) == 2
    with pytest.raises(ExportError, match="gives no batch"):
        list(read_batches([], ["x"], None))
