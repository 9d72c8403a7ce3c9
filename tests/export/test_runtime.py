import importlib.metadata
import os
import sys
import types

import lightning_prune.export.runtime as runtime_module
import numpy as np
import pytest
import torch
from lightning_prune.export import open_session, read_onnx
from lightning_prune.export.machine import describe_machine, physical_cores
from lightning_prune.export.optional import need
from lightning_prune.export.quiet import native_errors
from lightning_prune.export.runtime import CPU, CUDA, load_onnxruntime

from lightning_prune.errors import ExportError, OptionError, RuntimeMissingError

X = {"x": np.zeros((2, 3, 8, 8), np.float32)}
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


def test_cpu_session_says_what_runs_and_how(exported):
    session = open_session(exported.path, "cpu", threads=1)
    assert session.provider == CPU
    assert session.settings["intra_op_threads"] == 1
    assert session.settings["inter_op_threads"] == 1
    assert session.settings["optimization"] == "all"
    assert open_session(exported.path, "cpu").settings["intra_op_threads"] == physical_cores()
    assert session.bind(X)()[0].shape == (2, 4)


@no_cuda
def test_cuda_that_cannot_load_is_told_without_noise(exported, capfd):
    session = open_session(exported.path, "cuda")
    assert session.provider == CPU
    if CUDA in load_onnxruntime().get_available_providers():
        assert session.complaint
    assert capfd.readouterr() == ("", "")


@no_cuda
def test_a_required_gpu_is_refused_with_the_provider_that_ran(exported):
    with pytest.raises(
        RuntimeMissingError, match=r"A GPU is required, but CPUExecutionProvider is what ran .*small\.onnx"
    ):
        open_session(exported.path, require_gpu=True)
    with pytest.raises(OptionError, match="contradict each other"):
        open_session(exported.path, "cpu", require_gpu=True)
    with pytest.raises(OptionError, match=r"provider is 'auto', 'cpu' or 'cuda'; got 'gpu'"):
        open_session(exported.path, "gpu")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_session_keeps_values_on_the_device_and_equals_the_cpu(exported):
    gpu = open_session(exported.path, require_gpu=True)
    assert gpu.provider == CUDA
    assert gpu.settings["io_binding"] is True
    x = {"x": np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)}
    for name, value in open_session(exported.path, "cpu").run(x).items():
        np.testing.assert_allclose(gpu.run(x)[name], value, rtol=1e-4, atol=1e-5)
    gpu.bind(x)()


@pytest.mark.parametrize("keep", [0, 1, 40, 0.5, 0.99])
def test_truncated_file_is_one_line(exported, tmp_path, keep):
    data = exported.path.read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    for action in (read_onnx, lambda path: open_session(path, "cpu")):
        with pytest.raises(ExportError, match=r"cut\.onnx") as caught:
            action(path)
        assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_one_line(tmp_path):
    with pytest.raises(ExportError, match=r"There is no ONNX file .*none\.onnx"):
        open_session(tmp_path / "none.onnx")
    with pytest.raises(ExportError, match="is a folder"):
        read_onnx(tmp_path)
    text = tmp_path / "text.onnx"
    text.write_text("this is no model")
    with pytest.raises(ExportError, match=r"text\.onnx"):
        read_onnx(text)


def test_wrong_inputs_are_named_with_what_is_wanted(exported):
    session = open_session(exported.path, "cpu")
    wanted = r"x float32 \[batch, 3, 8, 8\]; the data gives "
    for feeds, words in (
        ({"image": X["x"]}, wanted + "image"),
        ({"x": X["x"].astype(np.float64)}, wanted + r"float64 \[2, 3, 8, 8\]"),
        ({"x": X["x"][:, :2]}, wanted + r"float32 \[2, 2, 8, 8\]"),
        ({"x": X["x"][0]}, wanted + r"float32 \[3, 8, 8\]"),
    ):
        with pytest.raises(ExportError, match=words):
            session.run(feeds)


def test_missing_doubled_and_broken_runtimes_name_the_extras(monkeypatch):
    def installed(*names):
        found = [types.SimpleNamespace(metadata={"Name": name}) for name in names]
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)

    installed("onnxruntime", "onnxruntime-gpu")
    with pytest.raises(RuntimeMissingError, match=r"are both installed.*pip uninstall -y onnxruntime onnxruntime-gpu"):
        load_onnxruntime()
    installed("onnxruntime-gpu")
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    with pytest.raises(RuntimeMissingError, match=r"installed but empty.*pip uninstall -y onnxruntime-gpu"):
        load_onnxruntime()
    installed()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        RuntimeMissingError, match=r"lightning-prune\[onnxruntime-gpu\].*lightning-prune\[onnxruntime\]"
    ):
        load_onnxruntime()
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(RuntimeMissingError, match=r"Exporting to ONNX needs onnx.*lightning-prune\[onnxruntime-gpu\]"):
        need("onnx", "Exporting to ONNX")


def test_native_errors_are_caught_and_the_stream_is_given_back(capfd):
    with native_errors() as lines:
        os.write(2, b"from native code\n")
    os.write(2, b"after\n")
    assert lines == ["from native code"]
    assert capfd.readouterr().err == "after\n"


def test_machine_names_processor_cores_and_versions(monkeypatch, tmp_path):
    machine = describe_machine()
    assert machine["cpu"]
    assert machine["versions"]["torch"] == torch.__version__
    info = tmp_path / "cpuinfo"
    threads = [f"processor\t: {i}\nmodel name\t: Test 9000\nphysical id\t: 0\ncore id\t: {i // 2}\n" for i in range(4)]
    info.write_text("\n".join(threads))
    monkeypatch.setattr("lightning_prune.export.machine._CPUINFO", info)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert physical_cores() == 2  # two threads of core 0, one of core 1
    assert describe_machine()["cpu"] == "Test 9000"


def test_onnxruntimes_words_are_cut_to_the_reason():
    line = "2026-01-01 [E:onnxruntime:Default, provider.cc:1] x : FAIL : Failed to load library /a/b.so with error: libc.so.9: gone"
    assert runtime_module._first_complaint(["noise", line]) == "libc.so.9: gone"
