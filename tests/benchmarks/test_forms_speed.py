"""Exact forms of layers on onnxruntime's CPU provider, each beside the dense layer in turn; run with ``-m benchmark -s``.

A matrix product operator of two cores, 64 x 64 each, at bond 8 for a 4096 x 4096 Linear has to run at least 5 times as fast as the dense layer at
batch 1, from a file as small as its parameters. Two thin layers and a rotated one are shown beside it.
"""

import pytest
import torch
from lightning_prune.export import export_onnx, open_session, read_onnx
from lightning_prune.export.latency import speedup, time_round
from optimized import optimized_numbers
from torch import nn

from lightning_prune.structure.factorized import factorize
from lightning_prune.structure.mpo import build_mpo
from lightning_prune.structure.rotated import Directions, rotate
from lightning_prune.structure.tensor_train import Form, draw

SIZE, BOND = 4096, 8


def mpo(dense):
    form = Form((64, 64), (64, 64), (BOND,))
    small = build_mpo(dense, form)
    small.fill(draw(form, 1 / SIZE, seed=0), dense.bias)
    return small


def rotated(dense):
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE // 8))[0]
    return rotate(dense, Directions(basis, basis))


KINDS = {"mpo": mpo, "low rank": lambda dense: factorize(dense, "linear", SIZE // 8), "rotated": rotated}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The dense layer and its file."""
    torch.manual_seed(0)
    dense = nn.Linear(SIZE, SIZE)
    path = tmp_path_factory.mktemp("dense") / "dense.onnx"
    return dense, export_onnx(nn.Sequential(dense), path, torch.randn(1, SIZE))


@pytest.mark.benchmark
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fastest_form_beside_the_dense_layer(kind, batch, reference, tmp_path, record_property):
    dense, dense_file = reference
    example = torch.randn(1, SIZE)
    small = nn.Sequential(KINDS[kind](dense))
    files = {
        "dense": dense_file,
        "small": export_onnx(small, tmp_path / "small.onnx", example, form="fastest", provider="cpu", batch_size=batch),
    }
    x = torch.randn(batch, SIZE).numpy()
    runs = {name: open_session(file.path, "cpu").bind({"input": x}) for name, file in files.items()}
    rounds = [time_round(runs, warmup=5, runs=50 if batch == 1 else 11) for _ in range(3)]
    found = speedup([times["dense"] for times in rounds], [times["small"] for times in rounds])
    entry = read_onnx(files["small"].path).metadata["forms"]["layers"]["0"]
    record_property("speedup", found)
    record_property("forms", entry)
    told = ", ".join(f"{name} {cost['ms']:.3f}" for name, cost in entry["forms"].items())
    print(
        f"{kind}, batch {batch}: {entry['form']}, {found['median']:.1f} times dense ({found['low']:.1f} to {found['high']:.1f}), "
        f"{files['small'].bytes:,} for {files['dense'].bytes:,} bytes; ms {told}"
    )
    numbers = entry["forms"][entry["form"]]["numbers"]
    assert numbers <= sum(parameter.numel() for parameter in small.parameters())
    assert files["small"].numbers == optimized_numbers(files["small"].path, tmp_path / "loaded.onnx") == numbers
    assert files["small"].bytes <= 4 * numbers + 8192
    assert found["low"] > 1
    if kind == "mpo" and batch == 1:
        assert found["low"] >= 5
