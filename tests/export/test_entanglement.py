"""Entropies of cuts in files and checkpoints, against the singular values of the dense weight, unfolded by hand."""

import json
import math

import numpy as np
import pytest
import torch
from lightning_prune.export import export_onnx, read_onnx
from lightning_prune.export.entanglement import entropies_of, entropy_rows
from torch import nn

from lightning_prune.cli import main
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.steps import Factorize, Tensorize
from lightning_prune.structure.surgery import compact
from lightning_prune.structure.tensor_train import Form


def entropy(matrix):
    shares = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    shares = shares[shares > 1e-12 * shares.sum()] / shares.sum()
    return -sum(share * math.log(share) for share in shares)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with a convolution and a linear layer of cores, whose weights have moved since; its checkpoint and its file."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 12), nn.Linear(12, 8), nn.Linear(8, 8))
    steps = (
        Tensorize.of("0", net[0], Form((4,), (3,), (5,), 9)),
        Tensorize.of("2", net[2], Form((2, 3, 2), (2, 2, 4), (3, 2))),
        Tensorize.of("3", net[3], Form((8,), (12,), ())),
        Factorize.of("4", net[4], "linear", 2),
    )
    small = compact(net, Plan(steps))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    folder = tmp_path_factory.mktemp("entropies")
    torch.save(small.state_dict(), folder / "net.ckpt")
    export_onnx(small, folder / "net.onnx", torch.randn(2, 3, 4, 4))
    return small, folder


@pytest.fixture(scope="module")
def expected(trained):
    conv, linear = trained[0][0].dense_weight().detach(), trained[0][2].dense_weight().detach()
    grid = linear.reshape(2, 3, 2, 2, 2, 4).permute(0, 3, 1, 4, 2, 5)  # outputs and inputs of a site side by side
    cuts = [grid.reshape(2 * 2, -1), grid.reshape(2 * 2 * 3 * 2, -1)]
    return {"0": [entropy(conv.reshape(4 * 3, 9))], "2": [entropy(cut) for cut in cuts]}


@pytest.mark.parametrize("name", ["net.ckpt", "net.onnx"])
def test_inspect_shows_the_entropy_of_every_cut_as_the_weights_have_it_now(trained, expected, capfd, name):
    path = trained[1] / name
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["entropies"]
    assert list(found) == ["0", "2"]
    for layer, values in expected.items():
        assert found[layer] == pytest.approx(values, abs=2e-6)
    assert main(["inspect", str(path)]) == 0
    lines = [
        line.replace("│", " ").split()
        for line in capfd.readouterr().out.partition("Entanglement entropy")[2].splitlines()
    ]
    cuts = [("0", 1, 5, expected["0"][0]), ("2", 1, 3, expected["2"][0]), ("2", 2, 2, expected["2"][1])]
    for layer, cut, bond, value in cuts:
        assert [layer, str(cut), str(bond), f"{value:.4g}", f"{math.log(bond):.4g}"] in lines


def test_a_file_without_such_layers_says_nothing_of_them(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8))
    written = export_onnx(
        compact(net, Plan((Factorize.of("0", net[0], "linear", 2),))), tmp_path / "a.onnx", torch.randn(1, 8)
    )
    assert "entropies" not in read_onnx(written.path).metadata


def test_equal_singular_values_reach_the_limit_and_one_alone_has_no_entropy():
    net = nn.Sequential(nn.Linear(4, 4, bias=False))
    for bond, value in (4, math.log(4)), (1, 0.0):
        step = Tensorize.of("0", net[0], Form((2, 2), (2, 2), (bond,)))
        small = compact(net, Plan((step,)))
        core = torch.eye(4)[:, :bond]
        small[0].fill([core[None], core.T[:, :, None]], None)
        (row,) = entropy_rows(entropies_of(small.named_modules()), Plan((step,)))
        assert row == {
            "layer": "0",
            "cut": 1,
            "bond": bond,
            "entropy": pytest.approx(value, abs=1e-6),
            "limit": math.log(bond),
        }


def test_a_checkpoint_that_diverged_is_shown_and_a_broken_one_is_one_line(trained, tmp_path, capfd):
    state = trained[0].state_dict()
    torch.save(state | {"2.cores.1": torch.full_like(state["2.cores.1"], math.nan)}, tmp_path / "nan.ckpt")
    assert main(["inspect", str(tmp_path / "nan.ckpt"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["entropies"]["2"] == [None, None]
    assert main(["inspect", str(tmp_path / "nan.ckpt")]) == 0
    assert capfd.readouterr().out.count("not finite") == 2
    del state["2.cores.1"]
    torch.save(state, tmp_path / "less.ckpt")
    assert main(["inspect", str(tmp_path / "less.ckpt")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "makes '2' a matrix product operator" in line
    assert "cores.1" in line
