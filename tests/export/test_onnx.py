import copy
import dataclasses
import errno
import json
import os
import signal
from pathlib import Path

import lightning_prune.export.onnx as export_module
import onnx
import pytest
import pytorch_lightning
import torch
from lightning_prune.export import export_onnx, open_session, read_onnx
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.errors import ExportError, OptionError
from lightning_prune.structure.carrier import attach
from lightning_prune.structure.plan import Origin, Plan
from lightning_prune.structure.steps import Factorize
from tests.export.conftest import make_two_heads

TOLERANCE = 1e-5


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: Tensor, *, offset: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids) + offset[:, None]
        mask = torch.full((5, 5), float("-inf")).triu(1)
        x = self.attend(x, x, x, attn_mask=mask, need_weights=False)[0]
        return functional.linear(x, self.embed.weight), x.mean(1)


class Product(nn.Module):
    """A weight written as a product: torch holds ``2 n r`` numbers, the exporter folds them to ``n * n``."""

    def __init__(self, n: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(n, rank))
        self.b = nn.Parameter(torch.randn(rank, n))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.a @ self.b)


def near(found: object, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    assert float((torch.as_tensor(found) - expected).abs().max()) <= TOLERANCE * scale


@pytest.mark.parametrize("batch", [1, 7])
def test_conv_batchnorm_linear_equal_torch_at_unseen_batches(two_heads, exported, batch):
    x = torch.randn(batch, 3, 8, 8)
    found = open_session(exported.path, "cpu").run({"x": x.numpy()})
    with torch.no_grad():
        expected = copy.deepcopy(two_heads).eval()(x)
    assert list(found) == ["logits", "value"]
    for name, value in expected.items():
        near(found[name], value)
    assert exported.difference <= TOLERANCE


def test_lstm_equals_torch_from_one_example(tmp_path):
    net = Recurrent().eval()
    path = export_onnx(net, tmp_path / "lstm.onnx", torch.randn(1, 6, 5)).path
    for batch in (1, 7):
        x = torch.randn(batch, 6, 5)
        with torch.no_grad():
            near(open_session(path, "cpu").run({"x": x.numpy()})["output"], net(x))


def test_attention_with_keyword_inputs_and_tied_weights_equals_torch(tmp_path):
    net = Attention().eval()
    call = {"ids": torch.randint(0, 11, (1, 5)), "offset": torch.randn(1, 8)}
    written = export_onnx(net, tmp_path / "attention.onnx", call)
    assert written.inputs == ("ids", "offset")
    assert written.outputs == ("output_0", "output_1")
    ports = read_onnx(written.path).inputs
    assert [port.shape for port in ports] == [("batch", 5), ("batch", 8)]
    call = {"ids": torch.randint(0, 11, (7, 5)), "offset": torch.randn(7, 8)}
    found = open_session(written.path, "cpu").run({name: value.numpy() for name, value in call.items()})
    with torch.no_grad():
        for value, expected in zip(found.values(), net(**call), strict=True):
            near(value, expected)


def test_batch_dimension_is_named_and_can_be_fixed(exported, two_heads, tmp_path):
    read = read_onnx(exported.path)
    assert read.inputs[0].shape == ("batch", 3, 8, 8)
    assert [port.shape for port in read.outputs] == [("batch", 4), ("batch", 4)]
    fixed = export_onnx(two_heads, tmp_path / "fixed.onnx", torch.randn(1, 3, 8, 8), dynamic_batch=False)
    assert read_onnx(fixed.path).inputs[0].shape == (1, 3, 8, 8)
    with pytest.raises(ExportError, match=r"input x float32 \[1, 3, 8, 8\]; the data gives float32 \[2, 3, 8, 8\]"):
        open_session(fixed.path, "cpu").run({"x": torch.zeros(2, 3, 8, 8).numpy()})


def test_model_is_left_bit_identical(tmp_path):
    net = make_two_heads().train()
    net.first.eval()
    fired = []
    net.conv.register_forward_hook(lambda *_: fired.append(1))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    hooks = dict(net.conv._forward_hooks)
    random = torch.get_rng_state()
    export_onnx(net, tmp_path / "net.onnx", torch.ones(2, 3, 8, 8))
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in net.modules()] == modes
    assert dict(net.conv._forward_hooks) == hooks
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_same_model_gives_the_same_bytes_without_paths(two_heads, exported, tmp_path, capfd):
    again = export_onnx(two_heads, tmp_path / "again.onnx", torch.randn(1, 3, 8, 8)).path.read_bytes()
    assert again == exported.path.read_bytes()
    for text in (Path(__file__).parent, Path(torch.__file__).parent, tmp_path):
        assert str(text).encode() not in again
    proto = onnx.load_from_string(again)
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert not proto.graph.metadata_props
    out, err = capfd.readouterr()
    assert out == err == ""


def test_metadata_round_trip_holds_plan_and_provenance(tmp_path):
    dense = nn.Linear(6, 6)
    step = Factorize.of("layer", dense, "linear", 2)
    plan = Plan((step,), {"head": "output layer"}, Origin((("layer.weight", (6, 6)),), 42, 36))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = Net()
    attach(model, plan)
    written = export_onnx(model, tmp_path / "net.onnx", torch.randn(1, 6), provenance={"recipe": "a: <b>"})
    read = read_onnx(written.path)
    assert read.plan == plan
    assert read.plan.digest == plan.digest
    assert read.metadata["provenance"]["recipe"] == "a: <b>"
    assert read.metadata["provenance"]["torch"] == torch.__version__
    assert read.unchanged is True
    custom = open_session(written.path, "cpu").inner.get_modelmeta().custom_metadata_map
    assert json.loads(custom["lightning_prune"]) == read.metadata
    assert written.numbers == written.parameters == 6 * 2 + 2 * 6 + 6


def test_lightning_module_is_exported_through_forward(tmp_path):
    class Lit(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.example_input_array = torch.zeros(1, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    written = export_onnx(Lit(), tmp_path / "lit.onnx")
    assert written.inputs == ("x",)


@pytest.mark.parametrize(("n", "rank"), [(24, 2), (64, 8)])
def test_weights_multiplied_by_the_exporter_are_refused(n, rank, tmp_path):
    path = tmp_path / "product.onnx"
    with pytest.raises(ExportError, match=rf"{n * n:,} numbers for the model's {2 * n * rank:,}.*comes from a x b"):
        export_onnx(Product(n, rank), path, torch.randn(2, n))
    assert not list(tmp_path.iterdir())


def test_activations_through_the_factors_are_accepted(tmp_path):
    net = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False))
    written = export_onnx(net, tmp_path / "chain.onnx", torch.randn(2, 64))
    assert written.numbers == written.parameters == 2 * 64 * 8
    assert written.bytes < 2 * 4 * written.parameters


def test_a_weight_used_twice_is_stored_once(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))  # three dimensions: the exporter transposes the weight per use

    written = export_onnx(Twice(), tmp_path / "twice.onnx", torch.randn(2, 3, 16))
    assert written.numbers == written.parameters


@pytest.mark.parametrize("form", ["auto", "fastest"])
def test_a_model_that_diverged_is_told_from_a_file_that_differs(tmp_path, form):
    net = make_two_heads()
    with torch.no_grad():
        net.first.bias[1] = float("nan")
        net.second.weight[:3] = float("inf")
    words = "TwoHeads returns values that are not finite for the example inputs: 2 of 8 in output 'logits', 6 of 8 in output 'value'. .*diverged"
    with pytest.raises(ExportError, match=words):
        export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 3, 8, 8), form=form)
    assert not list(tmp_path.iterdir())


def test_opset_is_read_back(two_heads, tmp_path):
    x = torch.randn(1, 3, 8, 8)
    assert export_onnx(two_heads, tmp_path / "a.onnx", x, opset=18).opset == 18
    with pytest.raises(ExportError, match="Opset 17 was asked for, but the exporter could only write opset 18"):
        export_onnx(two_heads, tmp_path / "b.onnx", x, opset=17)
    with pytest.raises(OptionError, match=r"opset is a whole number from 17 to \d+, such as 18, or None; got '18'"):
        export_onnx(two_heads, tmp_path / "b.onnx", x, opset="18")  # type: ignore[arg-type]
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return 2 * x


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.rand_like(x)


def test_untraceable_forward_names_its_line(tmp_path, capfd):
    with pytest.raises(ExportError, match=r"Branch cannot be exported.*test_onnx\.py, line \d+: if x\.sum\(\) > 0:"):
        export_onnx(Branch(), tmp_path / "branch.onnx", torch.ones(2, 3))
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_a_random_forward_is_caught_by_running_the_file(tmp_path):
    with pytest.raises(ExportError, match="differs from torch on the example inputs: output 'output' is wrong"):
        export_onnx(Noisy(), tmp_path / "noisy.onnx", torch.ones(2, 3))
    assert not list(tmp_path.iterdir())


class Keywords(nn.Module):
    def forward(self, x: Tensor, **others: Tensor) -> Tensor:
        return x + others["a"]


class Nested(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, object]:
        return {"p": {"q": 2 * batch["x"]}, "r": [batch["y"] + 1, None]}


class Echo(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 2 * x


class Table(nn.Module):
    """Gathers a small table into a large one, as relative positions do: it grows, but nothing was factorized."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9))
        self.register_buffer("index", torch.randint(0, 9, (100,)))
        self.layer = nn.Linear(100, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.table[self.index])


def test_inputs_and_outputs_of_any_structure(tmp_path):
    x = torch.randn(1, 3)
    with pytest.raises(ExportError, match=r"Keywords\.forward takes 'a' through \*\*kwargs"):
        export_onnx(Keywords(), tmp_path / "keywords.onnx", {"x": x, "a": x})
    nested = export_onnx(Nested(), tmp_path / "nested.onnx", ({"x": x, "y": x},))
    assert (nested.inputs, nested.outputs) == (("batch_x", "batch_y"), ("p_q", "r_0"))
    assert export_onnx(Table(), tmp_path / "table.onnx", torch.randn(1, 100)).difference <= TOLERANCE
    with pytest.raises(ExportError, match="returns one of its inputs unchanged"):
        export_onnx(Echo(), tmp_path / "echo.onnx", x)


def test_bfloat16_is_written_and_the_missing_check_is_told(tmp_path, caplog):
    written = export_onnx(nn.Linear(3, 4).bfloat16(), tmp_path / "half.onnx", torch.randn(1, 3).bfloat16())
    assert written.difference is None
    assert "were not compared with torch" in caplog.text


def test_unusable_examples_are_refused_by_name(two_heads, tmp_path):
    path = tmp_path / "net.onnx"
    for example, words in {
        "missing": (None, "needs example inputs"),
        "text": ("abc", "hold no tensor"),
        "empty": (torch.zeros(0, 3, 8, 8), "are empty"),
        "many": ((torch.zeros(1), torch.zeros(1)), "do not fit TwoHeads.forward"),
        "channels": (torch.zeros(1, 2, 8, 8), r"fails on inputs of shapes \{'x': \[2, 2, 8, 8\]\}"),
    }.values():
        with pytest.raises(ExportError, match=words):
            export_onnx(two_heads, path, example)
    with pytest.raises(OptionError, match="provenance holds JSON types only"):
        export_onnx(two_heads, path, torch.zeros(1, 3, 8, 8), provenance={"a": object()})
    assert not path.exists()


def test_weights_beyond_one_file_stand_beside_it(monkeypatch, tmp_path):
    monkeypatch.setattr(export_module, "ONE_FILE_BYTES", 1000)
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    written = export_onnx(net, tmp_path / "big.onnx", torch.randn(1, 32))
    data = next(tmp_path.glob("big-*.data"))
    assert written.bytes == written.path.stat().st_size + data.stat().st_size
    assert data.stat().st_size >= 32 * 32 * 4
    x = torch.randn(3, 32)
    with torch.no_grad():
        near(open_session(written.path, "cpu").run({"input": x.numpy()})["output"], net(x))
    data.unlink()
    with pytest.raises(ExportError, match="which is missing"):
        read_onnx(written.path)


def test_a_kill_while_writing_keeps_the_old_file(two_heads, exported, monkeypatch, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(exported.path.read_bytes())
    before = path.read_bytes()
    monkeypatch.setattr(export_module, "_check", lambda beside: os.kill(os.getpid(), signal.SIGKILL))
    graph = export_module.Graph(onnx.load(exported.path), ())
    child = os.fork()
    if child == 0:
        with export_module._written(graph, {"version": 1}, path) as beside:
            export_module._check(beside)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == before


def test_a_full_disk_is_one_line_and_leaves_nothing(exported, monkeypatch, tmp_path):
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    graph = export_module.Graph(onnx.load(exported.path), ())
    with (
        pytest.raises(OptionError, match="No space left on device"),
        export_module._written(graph, {"version": 1}, tmp_path / "net.onnx"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_the_record_agrees_with_the_file(exported, two_heads):
    read = read_onnx(exported.path)
    fields = dataclasses.asdict(exported)
    assert fields["bytes"] == exported.path.stat().st_size
    assert fields["parameters"] == sum(parameter.numel() for parameter in two_heads.parameters())
    assert fields["numbers"] == read.numbers
    assert fields["dynamic_batch"] is True
