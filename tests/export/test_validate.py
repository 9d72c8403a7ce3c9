import copy
import json
import re

import numpy as np
import onnx
import pytest
import torch
from lightning_prune.export import LatencySettings, Report, export_onnx, validate_onnx
from onnx import numpy_helper
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_prune.errors import ExportError, OptionError, RuntimeMissingError

FAST = LatencySettings(batch_sizes=(1, 4), warmup=1, runs=20, rounds=2)


def validate(path, reference=None, **options):
    return validate_onnx(path, reference, **{"latency": FAST, "progress": False, "provider": "cpu", **options})


def changed(exported, tmp_path, change):
    """Write a copy of the file with a planted mistake; its metadata stays."""
    proto = onnx.load(exported.path)
    change(proto)
    path = tmp_path / "planted.onnx"
    onnx.save(proto, path)
    return path


def change_weight(proto):
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "first.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[1, 2] += 0.05
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def swap_names(proto):
    names = {"logits": "value", "value": "logits"}
    for node in proto.graph.node:
        for index, name in enumerate(node.output):
            node.output[index] = names.get(name, name)


def swap_order(proto):
    first, second = (copy.deepcopy(value) for value in proto.graph.output)
    del proto.graph.output[:]
    proto.graph.output.extend([second, first])


def not_a_number(proto):
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "first.bias")
    tensor.CopyFrom(numpy_helper.from_array(np.full(4, np.nan, np.float32), tensor.name))


@pytest.fixture(scope="module")
def report(exported, dense_path, two_heads, batches):
    return validate(
        exported.path,
        dense_path,
        dataloader=batches,
        model=two_heads,
        metric="accuracy",
        max_drop=1.0,
        min_speedup=1e-3,
        extra={"recipe": "seed: 1"},
    )


def test_a_right_file_passes_and_its_figures_are_recomputed(report, exported, two_heads, batches):
    assert report.passed
    assert report.failures == []
    twin = copy.deepcopy(two_heads).eval()
    with torch.no_grad():
        scores = torch.cat([twin(x)["logits"] for x, _ in batches])
    accuracy = multiclass_accuracy(scores, torch.cat([y for _, y in batches]), 4, average="micro")
    assert report.models["torch"]["metric"] == pytest.approx(float(accuracy))
    assert report.models["compact"]["metric"] == pytest.approx(float(accuracy))
    assert [record["verdict"] for record in report.outputs] == ["rounding noise"] * 2
    assert report.data["examples"] == 15
    assert report.data["batches"] == 3
    assert report.models["compact"]["bytes"] == exported.path.stat().st_size
    assert report.models["compact"]["parameters"] < report.models["dense"]["parameters"]
    assert report.provider["ran"] == "CPUExecutionProvider"
    assert "CPUExecutionProvider ran" in report.notes[0]
    assert [gate["passed"] for gate in report.gates] == [True, True]
    assert report.metric["drop"] == pytest.approx(report.models["dense"]["metric"] - float(accuracy))


def test_latency_is_measured_per_batch_size_and_model(report):
    assert [entry["batch"] for entry in report.latency] == [1, 4]
    for entry in report.latency:
        for name in ("dense", "compact"):
            assert entry[name]["runs"] == 40
            assert 0 < entry[name]["p50"] <= entry[name]["p90"] <= entry[name]["p99"]
        assert entry["speedup"]["low"] <= entry["speedup"]["median"] <= entry["speedup"]["high"]


def test_validation_leaves_the_model_bit_identical(exported, two_heads, batches):
    net = copy.deepcopy(two_heads).train()
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    validate(exported.path, dataloader=batches, model=net)
    assert net.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_weight, "output 'logits' is (wrong|suspicious)"),
        (swap_names, "output 'logits' is wrong"),
        (swap_order, "output 'logits' is wrong: the file has 'value' in its place"),
        (not_a_number, "output 'logits' is wrong: 60 values are not finite"),
    ],
)
def test_a_planted_mistake_is_caught(exported, two_heads, batches, tmp_path, change, reason):
    path = changed(exported, tmp_path, change)
    found = validate(path, dataloader=batches, model=two_heads, latency=LatencySettings(runs=1, rounds=1))
    assert not found.passed
    assert re.search(reason, " ".join(found.failures))
    blind = validate(path, dataloader=batches, latency=LatencySettings(runs=1, rounds=1))
    assert "the file was changed after its export" in " ".join(blind.failures)


def test_batchnorm_left_in_training_mode_is_caught(two_heads, batches, tmp_path):
    class Training(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(two_heads)

        def forward(self, x):
            norm = self.net.norm
            y = nn.functional.batch_norm(self.net.conv(x), None, None, norm.weight, norm.bias, training=True)
            y = y.relu().mean((2, 3))
            return {"logits": self.net.first(y), "value": self.net.second(y)}

    path = export_onnx(Training(), tmp_path / "training.onnx", torch.randn(2, 3, 8, 8)).path
    found = validate(path, dataloader=batches, model=two_heads, latency=LatencySettings(runs=1, rounds=1))
    assert not found.passed
    assert found.failures[0].startswith("output 'logits' is wrong: largest difference")


def test_missed_gates_fail_and_are_kept_with_their_figures(exported, dense_path, two_heads, batches):
    twin = copy.deepcopy(two_heads).eval()
    with torch.no_grad():
        labels = [(x, 3 - twin(x)["logits"].argmax(1)) for x, _ in batches]  # the compact file is right on none or few
    found = validate(
        exported.path, dense_path, dataloader=labels, model=two_heads, metric="accuracy", max_drop=-1.0, min_speedup=1e6
    )
    assert not found.passed
    assert [(gate["name"], gate["limit"], gate["passed"]) for gate in found.gates] == [
        ("max_drop", -1.0, False),
        ("min_speedup", 1e6, False),
    ]
    worst = min(entry["speedup"]["median"] for entry in found.latency)
    assert found.gates[1]["value"] == worst
    assert f"gate min_speedup 1000000.0 is missed: measured {worst:.4g}" in found.failures


def test_metric_gate_compares_with_the_dense_file(exported, dense_path, batches, two_heads):
    with torch.no_grad():
        dense_labels = [
            (x, torch.from_numpy(output).argmax(1)) for x, output in ((x, _run(dense_path, x)) for x, _ in batches)
        ]  # dense is right on all
    found = validate(
        exported.path,
        dense_path,
        dataloader=dense_labels,
        metric="accuracy",
        max_drop=0.0,
        latency=LatencySettings(runs=1),
    )
    assert found.models["dense"]["metric"] == 1.0
    assert found.metric["drop"] == pytest.approx(1 - found.data["agreement"])
    assert found.passed is (found.data["agreement"] == 1.0)
    assert not found.passed


def _run(path, x):
    from lightning_prune.export import open_session

    return open_session(path, "cpu").run({"x": x.numpy()})["logits"]


def test_gates_without_what_they_compare_with_are_refused(exported, dense_path, batches):
    for options, words in (
        ({"max_drop": 0.1, "metric": "accuracy"}, "max_drop compares with the dense model"),
        ({"min_speedup": 1.5}, "min_speedup compares with the dense model"),
        ({"reference": dense_path, "max_drop": 0.1}, "max_drop needs a metric"),
        ({"reference": dense_path, "min_speedup": 0}, "min_speedup is above 0"),
        ({"reference": dense_path, "max_drop": "0.1", "metric": "accuracy"}, "max_drop is a finite number"),
        ({"tolerance": 0}, "tolerance lies between 0 and 1"),
        ({"limit_batches": 0}, "limit_batches is a whole number"),
        ({"metric": "acc"}, "There is no metric 'acc'"),
    ):
        with pytest.raises(OptionError, match=words):
            validate(exported.path, dataloader=batches, **options)


def test_other_data_and_other_files_are_one_line(exported, batches, tmp_path, two_heads):
    with pytest.raises(ExportError, match=r"the data gives float64"):
        validate(exported.path, dataloader=[(x.double(), y) for x, y in batches])
    with pytest.raises(ExportError, match="gives no batch"):
        validate(exported.path, dataloader=[])
    other = export_onnx(nn.Linear(3, 4), tmp_path / "other.onnx", torch.randn(1, 3)).path
    with pytest.raises(ExportError, match=r"has the inputs x float32 .*the reference .* has input float32"):
        validate(exported.path, other, dataloader=batches)
    with pytest.raises(ExportError, match="The file has 2 outputs"):
        validate(exported.path, dataloader=batches, model=_FirstOnly(two_heads))


class _FirstOnly(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)["logits"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_required_gpu_is_refused_here(exported, batches):
    with pytest.raises(RuntimeMissingError, match="CPUExecutionProvider is what ran"):
        validate(exported.path, dataloader=batches, provider="auto", require_gpu=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_validation_runs_on_cuda_where_it_is_required(exported, batches, two_heads):
    found = validate(exported.path, dataloader=batches, model=two_heads, provider="cuda", require_gpu=True)
    assert found.provider["ran"] == "CUDAExecutionProvider"
    assert found.passed


def test_a_file_of_a_fixed_batch_is_measured_at_that(two_heads, batches, tmp_path):
    path = export_onnx(two_heads, tmp_path / "fixed.onnx", torch.randn(6, 3, 8, 8), dynamic_batch=False).path
    found = validate(path, dataloader=batches, limit_batches=2, model=two_heads)
    assert [entry["batch"] for entry in found.latency] == [6]
    assert found.passed
    with pytest.raises(ExportError, match=r"\[6, 3, 8, 8\]; the data gives float32 \[3, 3, 8, 8\]"):
        validate(path, dataloader=batches, model=two_heads)


def test_dict_batches_and_limit(exported, batches, two_heads):
    data = [{"x": x, "label": y, "index": torch.arange(len(y))} for x, y in batches]
    found = validate(exported.path, dataloader=data, model=two_heads, metric="accuracy", limit_batches=1)
    assert found.data["batches"] == 1
    assert found.passed


def test_report_is_json_and_comes_back(report, tmp_path):
    report.save(tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text)["extra"]["recipe"] == "seed: 1"
    assert Report.load(tmp_path).to_json() == report.to_json()
