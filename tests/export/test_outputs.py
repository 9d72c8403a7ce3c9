import copy

import numpy as np
import pytest
import torch
from lightning_prune.export.inputs import read_inputs
from lightning_prune.export.outputs import Comparison, agreement, as_arrays, rounding
from torch import nn

from lightning_prune.errors import ExportError

rng = np.random.default_rng(0)
SCORES = rng.normal(size=(50, 5)).astype(np.float32)


def judge(reference, found, metric_gap=0.0, tolerance=1e-5):
    comparison = Comparison(tolerance)
    comparison.add({"y": reference}, {"y": found})
    return comparison.records(metric_gap)[0]


def test_difference_is_relative_to_the_largest_value_over_all_batches():
    comparison = Comparison(1e-5)
    comparison.add({"y": np.array([[1.0, 2.0]])}, {"y": np.array([[1.0, 2.5]])})
    comparison.add({"y": np.array([[-10.0, 0.0]])}, {"y": np.array([[-10.0, 0.1]])})
    record = comparison.records()[0]
    assert record.absolute == 0.5
    assert record.relative == pytest.approx(0.05)
    assert record.shape == (1, 2)


@pytest.mark.parametrize(("gap", "verdict"), [(1e-6, "rounding noise"), (1e-4, "suspicious"), (1e-2, "wrong")])
def test_three_verdicts_by_size(gap, verdict):
    found = SCORES.copy()
    found[0] -= gap * np.abs(SCORES).max()  # all scores of one row alike: no decision changes
    assert judge(SCORES, found).verdict == verdict


def test_changed_decisions_or_metric_make_a_suspicious_difference_wrong():
    reference = np.array([[1.0, 0.9999]] * 100 + [[50.0, 0.0]], dtype=np.float32)
    found = reference + np.array([[0.0, 2e-4]], dtype=np.float32)
    assert judge(reference, found).agreement == pytest.approx(1 / 101)
    assert judge(reference, found, tolerance=1e-6).verdict == "wrong"
    shifted = reference - np.float32(5e-3)
    assert judge(reference, shifted).verdict == "suspicious"
    assert judge(reference, shifted, metric_gap=0.01).verdict == "wrong"


def test_values_that_are_not_finite_are_wrong():
    for bad in (np.nan, np.inf):
        found = SCORES.copy()
        found[3, 1] = bad
        record = judge(SCORES, found)
        assert (record.verdict, record.non_finite) == ("wrong", 1)


def test_values_of_torch_that_are_not_finite_are_not_laid_at_the_door_of_the_file():
    broken = SCORES.copy()
    broken[3, :2] = np.nan, np.inf
    for found in (broken, SCORES):
        record = judge(broken, found)
        assert record.verdict == "wrong"
        assert "2 values of torch's own are not finite; its training may have diverged" in record.explain()


def test_swapped_names_order_and_shapes_are_wrong():
    a, b = SCORES, SCORES + 1
    comparison = Comparison(1e-5)
    comparison.add({"a": a, "b": b}, {"b": b, "a": a})
    assert [record.verdict for record in comparison.records()] == ["wrong", "wrong"]
    assert "has 'b' in its place" in comparison.records()[0].explain()
    comparison = Comparison(1e-5)
    comparison.add({"a": a, "b": b}, {"x": b, "y": a})
    assert all(record.verdict == "wrong" for record in comparison.records())
    assert "its shape is [50, 4], expected [50, 5]" in judge(SCORES, SCORES[:, :4]).explain()
    with pytest.raises(ExportError, match="has 1 outputs"):
        Comparison(1e-5).add({"a": a, "b": b}, {"a": a})


def test_integer_outputs_must_be_equal():
    labels = np.arange(2000)
    assert judge(labels, labels).verdict == "rounding noise"
    assert judge(labels, np.where(labels == 7, 8, labels)).verdict == "suspicious"
    assert judge(labels, labels[::-1]).verdict == "wrong"


def test_agreement_counts_equal_argmax_along_the_class_axis():
    pixels = rng.normal(size=(2, 3, 4, 4))
    other = rng.normal(size=(2, 3, 4, 4))
    equal = sum(
        pixels[n, :, i, j].argmax() == other[n, :, i, j].argmax() for n in range(2) for i in range(4) for j in range(4)
    )
    assert agreement(pixels, other) == (equal, 32)
    assert agreement(SCORES[:, :1], SCORES[:, :1]) == (0, 0)


def test_rounding_is_measured_against_float64_and_allowed_tenfold():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)).eval()
    x = torch.randn(16, 64)
    inputs = read_inputs(net, x)
    with torch.no_grad():
        single = net(x)
        double = copy.deepcopy(net).double()(x.double())
    expected = float((single - double).abs().max() / double.abs().max())
    noise = rounding(net, inputs, {"output": single.numpy()})
    assert noise["output"] == pytest.approx(expected, rel=1e-6)
    comparison = Comparison(1e-9)
    comparison.allow(noise)
    comparison.add({"output": single.numpy()}, as_arrays({"output": single}))
    assert comparison.records()[0].allowed == pytest.approx(10 * expected)


def test_more_than_half_the_digits_is_not_taken_for_rounding():
    net = nn.Linear(3, 3)
    x = torch.ones(2, 3)
    noise = rounding(net, read_inputs(net, x), {"output": net(x).detach().numpy() + 1})
    assert noise["output"] == pytest.approx(torch.finfo(torch.float32).eps ** 0.5 / 10)


def test_bfloat16_becomes_float32():
    assert as_arrays({"y": torch.ones(2, dtype=torch.bfloat16)})["y"].dtype == np.float32
