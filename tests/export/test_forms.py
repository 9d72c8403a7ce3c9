import copy
import json
import math
import re

import lightning_prune.export.forms as forms_module
import numpy as np
import pytest
import torch
from lightning_prune.export import export_onnx, open_session, read_onnx, validate_onnx, variants
from lightning_prune.export.forms import Settings, rows, titles
from lightning_prune.export.latency import time_round
from lightning_prune.export.variants import forms_of, merge
from optimized import optimized_numbers
from torch import nn
from torch.nn import functional

from lightning_prune.cli import main
from lightning_prune.errors import ExportError, OptionError, RecipeError, RuntimeMissingError
from lightning_prune.flops import count_flops
from lightning_prune.recipe import checks
from lightning_prune.structure.calls import Call
from lightning_prune.structure.factorized import factorize
from lightning_prune.structure.mpo import build_mpo
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.rotated import Directions, rotate
from lightning_prune.structure.steps import Factorize, Rotate
from lightning_prune.structure.steps.tensorize import Tensorize
from lightning_prune.structure.surgery import compact
from lightning_prune.structure.tensor_train import Form, draw, modes_for

CONVOLUTIONS = {
    "conv1d": lambda: nn.Conv1d(6, 10, 3, stride=2, padding=2, dilation=2, padding_mode="circular"),
    "conv2d": lambda: nn.Conv2d(6, 10, (3, 2), stride=(2, 1), padding="valid", dilation=(1, 2)),
    "same": lambda: nn.Conv2d(6, 10, (4, 3), padding="same", padding_mode="reflect"),
    "pointwise": lambda: nn.Conv2d(6, 10, 1, stride=2, padding=1),
    "conv3d": lambda: nn.Conv3d(6, 10, (3, 1, 2), stride=(1, 2, 1), padding=(1, 0, 1)),
}
DENSE = {"linear": lambda: nn.Linear(6, 10), **CONVOLUTIONS}


def tensorized(layer, cores=2, bond=3):
    kernel = math.prod(getattr(layer, "kernel_size", (0,)))
    form = Form(*modes_for(*layer.weight.shape[:2], cores), (bond,) * (cores - (not kernel)), kernel)
    small = build_mpo(layer, form.with_bonds(form.bonds))
    small.fill(draw(small.form, 0.1, seed=0), layer.bias)
    return small


def columns(size, count):
    return torch.linalg.qr(torch.randn(size, count, dtype=torch.float64))[0]


REPLACED = {
    "two cores": tensorized,
    "three cores": lambda layer: tensorized(layer, 3, 2),
    "channel": lambda layer: factorize(layer, "linear" if isinstance(layer, nn.Linear) else "channel", 3),
    "rotated": lambda layer: rotate(layer, Directions(columns(6, 4), columns(10, 5))),
    "inputs": lambda layer: rotate(layer, Directions(columns(6, 4))),
}
OTHERS = {
    "one core": lambda: tensorized(nn.Linear(6, 10), 1),
    "spatial": lambda: factorize(CONVOLUTIONS["conv2d"](), "spatial", 3),
    "spatial same": lambda: factorize(CONVOLUTIONS["same"](), "spatial", 3),
    "grouped": lambda: factorize(nn.Conv2d(6, 10, (3, 2), 2, 1, groups=2), "channel", 2),
    "grouped spatial": lambda: factorize(nn.Conv2d(6, 10, (3, 2), 2, 1, groups=2), "spatial", 2),
    "separable": lambda: rotate(nn.Conv2d(6, 10, 3, 2, 1), Directions(columns(6, 4), columns(10, 5), separable=3)),
    "augmented": lambda: rotate(nn.Linear(6, 10), Directions(columns(7, 4), columns(10, 5), augmented=True)),
}
CASES = {
    f"{how} {what}": lambda m=make, r=replace: r(m())
    for what, make in DENSE.items()
    for how, replace in REPLACED.items()
}


def example(layer, batch, dtype=torch.float32):
    parts = [getattr(part, "kernel_size", None) for part in layer.modules()]
    size = next((size for size in parts if size is not None), ())
    return torch.randn(batch, 6, *[9] * len(size), dtype=dtype)


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)


@pytest.mark.parametrize("make", [*CASES.values(), *OTHERS.values()], ids=[*CASES, *OTHERS])
def test_every_form_computes_the_same_at_the_cost_that_it_names(make):
    layer = seeded(make)
    assert len(forms_of(layer)) == (5 if hasattr(layer, "cores") else 2 ** (len(layer) - 1))
    for dtype, tolerance in {torch.float32: 1e-5, torch.float64: 1e-12}.items():
        cast = copy.deepcopy(layer).to(dtype)
        for batch in (1, 7):
            x = example(layer, batch, dtype)
            expected = cast(x)
            for form in forms_of(cast):
                built = form.build()
                torch.testing.assert_close(built(x), expected, rtol=0, atol=tolerance * float(expected.abs().max()))
                assert sum(parameter.numel() for parameter in built.parameters()) == form.numbers
    for form in forms_of(layer):
        assert count_flops(form.build(), Call("", (x.float(),), {})).total == form.flops(x.shape), form.name


def test_merging_multiplies_the_weights_of_each_group_as_a_loop_does():
    first, second = nn.Conv1d(4, 6, 3, groups=2, bias=False), nn.Conv1d(6, 8, 1, groups=2)
    found, weight = merge(first, second).weight, torch.zeros(8, 2, 3)
    for out in range(8):
        group = out // 4
        for middle in range(3):
            weight[out] += second.weight[out, middle, 0] * first.weight[3 * group + middle]
    torch.testing.assert_close(found, weight)


class Mixed(nn.Module):
    """Every kind of layer in a row; one of them under two names, one that nobody calls, one with a hook."""

    def __init__(self):
        super().__init__()
        self.conv = tensorized(nn.Conv2d(6, 6, 3, padding=1))
        self.thin = factorize(nn.Conv2d(6, 6, 3, padding=1), "spatial", 2)
        self.turned = rotate(nn.Conv2d(6, 6, 3, padding=1), Directions(columns(6, 4), columns(6, 4)))
        self.flat = tensorized(nn.Linear(36, 36), 3)
        self.twin = self.flat
        self.idle = factorize(nn.Linear(4, 4), "linear", 1)
        self.hooked = factorize(nn.Linear(36, 36), "linear", 2)
        self.hooked.register_forward_hook(lambda _module, _args, output: output.relu())

    def forward(self, x):
        x = self.turned(self.thin(input=self.conv(x).relu()).relu())
        return self.hooked(self.twin(self.flat(x.flatten(1)).relu()))


@pytest.fixture
def mixed():
    return seeded(Mixed)


def fixed_clock(monkeypatch, pick):
    """Every form takes 10 ms, the one picked 1 ms; nothing runs."""

    def timed(functions, _warmup, runs, _clock=None):
        best = pick(list(functions))
        return {name: np.full(runs, 1.0 if name == best else 10.0) for name in functions}

    monkeypatch.setattr(forms_module, "time_round", timed)


@pytest.mark.parametrize("position", range(5))
def test_the_file_holds_the_form_that_the_clock_says_and_computes_what_torch_does(
    position, mixed, monkeypatch, tmp_path
):
    fixed_clock(monkeypatch, lambda names: names[position % len(names)])
    nothing = {"provider": "none", "threads": 1}
    monkeypatch.setattr(
        forms_module, "_sessions", lambda forms, *_: ({form.name: lambda: None for form in forms}, nothing)
    )
    state = {name: value.clone() for name, value in mixed.state_dict().items()}
    x = torch.randn(1, 6, 3, 2)
    written = export_onnx(mixed, tmp_path / "net.onnx", x, form="fastest")
    assert set(written.forms) == {"conv", "thin", "turned", "flat"}
    record = read_onnx(written.path).metadata["forms"]["layers"]
    plain = sum(parameter.numel() for parameter in mixed.hooked.parameters())
    for name, form in written.forms.items():
        ordered = sorted(forms_of(getattr(mixed, name)), key=lambda form: form.numbers)
        assert form == ordered[position % len(ordered)].name
        assert record[name]["forms"][form]["ms"] == 1.0
    told = sum(record[name]["forms"][form]["numbers"] for name, form in written.forms.items())
    assert written.numbers == told + plain
    session = open_session(written.path, "cpu")
    for batch in (1, 7):
        x = torch.randn(batch, 6, 3, 2)
        expected = mixed(x)
        found = torch.from_numpy(session.run({"x": x.numpy()})["output"])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert mixed.flat is mixed.twin
    assert list(mixed.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in mixed.state_dict().items())


@pytest.fixture
def wide():
    """A chain that multiplies more than the dense weight, though it has fewer numbers; and one that does not."""
    return seeded(
        lambda: nn.Sequential(tensorized(nn.Linear(16, 16), 2, 6), nn.ReLU(), tensorized(nn.Linear(16, 16), 2, 2))
    )


@pytest.mark.parametrize(("wish", "forms"), [("auto", ("dense", "left")), ("smallest", ("left", "left"))])
def test_auto_multiplies_least_smallest_stores_least_and_both_repeat_their_bytes(wish, forms, wide, tmp_path):
    files = [export_onnx(wide, tmp_path / name, torch.randn(1, 16), form=wish) for name in ("a.onnx", "b.onnx")]
    assert files[0].path.read_bytes() == files[1].path.read_bytes()
    assert tuple(files[0].forms.values()) == forms
    sizes = {"dense": 16 * 16, "left": 2 * 4 * 4 * 6}
    assert files[0].numbers == sizes[forms[0]] + 2 * 4 * 4 * 2 + 2 * 16
    multiply_adds = {"dense": 16 * 16, "left": 2 * 4 * 4 * 6 * 4}
    assert files[0].flops == multiply_adds[forms[0]] + 2 * 4 * 4 * 2 * 4
    assert files[0].parameters == sum(parameter.numel() for parameter in wide.parameters())


@pytest.mark.parametrize("wish", ["auto", "smallest"])
def test_more_numbers_than_parameters_are_told_where_forms_are_why(wish, wide, caplog, tmp_path):
    written = export_onnx(wide, tmp_path / "net.onnx", torch.randn(1, 16), form=wish)
    parameters = 2 * 4 * 4 * 6 + 2 * 4 * 4 * 2 + 2 * 16
    words = f"stores {parameters + 16 * 16 - 2 * 4 * 4 * 6} numbers for the {parameters} parameters of its model"
    told = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_prune")]
    if wish == "smallest":
        assert (told, written.numbers) == ([], parameters)
        return
    (line,) = told
    assert caplog.records[0].levelname == "WARNING"
    assert "\n" not in line
    assert words in line
    assert "form='auto' (fewest multiply-adds) exports 1 of 2 layers in a larger form, 1 of them dense." in line
    assert "give form='smallest'" in line


@pytest.mark.parametrize(("speed", "chosen"), [(1.04, "small"), (1.2, "large"), (0.5, "small")])
def test_a_larger_form_must_be_faster_by_more_than_five_percent(speed, chosen, monkeypatch):
    times = {"small": 1.0, "large": 1 / speed}
    monkeypatch.setattr(
        forms_module, "time_round", lambda functions, _, runs: {name: np.full(runs, times[name]) for name in functions}
    )
    best, told = forms_module._fastest(dict.fromkeys(times, lambda: None))
    assert best == chosen
    assert told == pytest.approx(times)


def test_forms_take_turns_and_hopeless_ones_drop_out(monkeypatch):
    calls, now = [], [0]

    def work(name, milliseconds):
        def function():
            calls.append(name)
            now[0] += int(1e6 * milliseconds)

        return function

    monkeypatch.setattr(
        forms_module, "time_round", lambda functions, warmup, runs: time_round(functions, warmup, runs, lambda: now[0])
    )
    found = forms_module._fastest({name: work(name, ms) for name, ms in {"a": 9.0, "b": 1.5, "c": 1.0}.items()})
    assert found == ("c", {"a": 9.0, "b": 1.5, "c": 1.0})
    assert calls.count("a") == 5
    assert calls.count("b") == calls.count("c") == 5 + 80  # 200 ms at 2.5 ms a turn


def test_layers_of_one_shape_are_measured_once_on_the_provider_asked_for(monkeypatch, tmp_path):
    net = seeded(lambda: nn.Sequential(*(tensorized(nn.Linear(16, 16), 2, 2) for _ in range(2))))
    seen = []

    def timed(functions, _warmup, runs):
        seen.append(list(functions))
        for function in functions.values():
            function()
        return {name: np.full(runs, 1.0 if name == "right, transposed" else 10.0) for name in functions}

    monkeypatch.setattr(forms_module, "time_round", timed)
    written = export_onnx(
        net, tmp_path / "net.onnx", torch.randn(1, 16), form="fastest", provider="cpu", batch_size=3, threads=1
    )
    assert len(seen) == 2  # a first sight and a race
    assert len(seen[0]) == 5
    assert written.forms == dict.fromkeys("01", "right, transposed")
    record = read_onnx(written.path).metadata["forms"]
    assert {key: record[key] for key in ("asked", "why", "provider", "batch", "threads")} == {
        "asked": "fastest",
        "why": "measured",
        "provider": "CPUExecutionProvider",
        "batch": 3,
        "threads": 1,
    }
    with pytest.raises(OptionError, match="batch_size=3: the batch of this file is fixed at 1"):
        export_onnx(net, tmp_path / "b.onnx", torch.randn(1, 16), form="fastest", batch_size=3, dynamic_batch=False)


def test_cuda_asked_for_by_name_is_measured_or_refused(monkeypatch, tmp_path):
    net = seeded(lambda: nn.Sequential(factorize(nn.Linear(16, 16), "linear", 2)))
    monkeypatch.setattr(forms_module, "open_session", lambda path, _provider, **kw: open_session(path, "cpu", **kw))
    monkeypatch.setattr(
        forms_module, "time_round", lambda functions, _, runs: dict.fromkeys(functions, np.full(runs, 1.0))
    )
    words = "provider='cuda', but CPUExecutionProvider is what ran: this .*provider='auto' or 'cpu'"
    with pytest.raises(RuntimeMissingError, match=words):
        export_onnx(net, tmp_path / "net.onnx", torch.randn(1, 16), form="fastest", provider="cuda")
    assert not list(tmp_path.iterdir())
    export_onnx(net, tmp_path / "net.onnx", torch.randn(1, 16), form="fastest")
    assert read_onnx(tmp_path / "net.onnx").metadata["forms"]["provider"] == "CPUExecutionProvider"


def test_no_dense_weight_is_rebuilt_in_the_file_or_by_the_runtime(tmp_path):
    net = seeded(lambda: nn.Sequential(tensorized(nn.Linear(1024, 1024), 2, 8)))
    written = export_onnx(net, tmp_path / "net.onnx", torch.randn(1, 1024))
    assert written.numbers == 2 * 32 * 32 * 8 + 1024
    assert written.bytes < 4 * written.numbers + 8192
    assert optimized_numbers(written.path, tmp_path / "loaded.onnx") == written.numbers


def test_a_form_that_multiplies_its_cores_is_refused(monkeypatch, wide, tmp_path):
    class Rebuilt(nn.Module):
        def __init__(self, layer, *_):
            super().__init__()
            self.cores, self.dense_weight = layer.cores, layer.dense_weight

        def forward(self, x):
            return functional.linear(x, self.dense_weight())

    monkeypatch.setattr(variants, "_contracted", Rebuilt)
    with pytest.raises(ExportError, match="the exporter multiplied weights"):
        export_onnx(wide[:1].append(wide[2]), tmp_path / "net.onnx", torch.randn(1, 16), form="smallest")


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A file with a plan of all three kinds, and the model."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    steps = (
        Factorize.of("0", net[0], "linear", 12),
        Rotate.of("1", net[1], Directions(columns(16, 4), None)),
        Tensorize.of("2", net[2], Form((4, 4), (4, 4), (2,))),
    )
    small = compact(net, Plan(steps))
    path = tmp_path_factory.mktemp("forms") / "net.onnx"
    return small, export_onnx(small, path, torch.randn(1, 16))


def test_metadata_inspect_and_report_tell_what_was_chosen_and_why(planned, tmp_path, capfd):
    small, written = planned
    assert written.forms == {"0": "dense", "1": "factors", "2": "left"}
    record = read_onnx(written.path).metadata["forms"]
    assert record["layers"]["0"]["forms"]["factors"] == {"numbers": 2 * 12 * 16 + 16, "flops": 2 * 12 * 16, "ms": None}
    assert rows(record)[0]["others"] == "factors 384"
    assert main(["inspect", str(written.path), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["forms"] == record
    assert main(["inspect", str(written.path)]) == 0
    out = capfd.readouterr().out
    assert "Forms of layers: fewest multiply-adds." in out
    parameters, numbers = (2 * 12 + 4 + 4 + 2 * 2) * 16 + 48, (16 + 4 + 4 + 2 * 2) * 16 + 48
    assert f"{parameters} parameters" in " ".join(out.split())
    assert f"{numbers} numbers in the file" in " ".join(out.split())
    settings = forms_module.LatencySettings(warmup=0, runs=1, rounds=1)
    report = validate_onnx(
        written.path, dataloader=[torch.randn(2, 16)], model=small, provider="cpu", latency=settings, progress=False
    )
    assert [row["form"] for row in report.forms] == ["dense", "factors", "left"]
    report.save(tmp_path)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "Forms of the layers" in text
        assert re.search(rf"numbers in the file\W+(td\W+)*{numbers}\b", text)
    assert json.loads((tmp_path / "report.json").read_text())["forms"] == rows(record)


def test_multiply_adds_and_times_say_at_which_batch_they_hold(monkeypatch, tmp_path, capfd):
    net = nn.Sequential(nn.Linear(16, 16))
    small = compact(net, Plan((Factorize.of("0", net[0], "linear", 2),)))
    fixed_clock(monkeypatch, lambda names: names[0])
    timed = {"form": "fastest", "provider": "cpu", "batch_size": 7}
    for wish, expected in (timed, "ms, batch 7"), ({}, "ms"):
        written = export_onnx(small, tmp_path / "net.onnx", torch.randn(4, 16), **wish)
        record = read_onnx(written.path).metadata["forms"]
        assert record["layers"]["0"]["forms"]["factors"]["flops"] == 4 * 2 * 16 * 2
        head = list(titles(rows(record)).values())
        assert head[3:5] == ["multiply-adds, example of batch 4", expected]
        assert main(["inspect", str(written.path)]) == 0
        out = " ".join(capfd.readouterr().out.replace("┃", " ").split())
        assert "example of batch 4" in out
        assert ("batch 7" in out) == bool(wish)
        settings = forms_module.LatencySettings(warmup=0, runs=1, rounds=1)
        data = [torch.randn(2, 16)]
        report = validate_onnx(
            written.path, dataloader=data, model=small, provider="cpu", latency=settings, progress=False
        )
        report.save(tmp_path)
        assert " | ".join(head[:5]) in (tmp_path / "report.md").read_text()
        assert "".join(f"<th>{title}</th>" for title in head) in (tmp_path / "report.html").read_text()
        (row,) = json.loads((tmp_path / "report.json").read_text())["forms"]
        assert (row["flops_batch"], row["ms_batch"]) == (4, 7 if wish else None)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"form": "quickest"}, "form is one of 'auto', 'fastest', 'smallest'; got 'quickest'"),
        ({"form": "fastest", "provider": "tpu"}, "provider is 'auto', 'cpu' or 'cuda'; got 'tpu'"),
        ({"form": "fastest", "batch_size": 0}, "batch_size is a whole number of at least 1, or None; got 0"),
        ({"form": "fastest", "threads": 0}, "threads is a whole number of at least 1"),
        ({"batch_size": 4}, "form='auto' asks no clock"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(wrong, words, wide, tmp_path):
    with pytest.raises(OptionError, match=words):
        Settings(**wrong)
    with pytest.raises(OptionError, match=words):
        export_onnx(wide, tmp_path / "net.onnx", torch.randn(1, 16), **wrong)
    with pytest.raises((OptionError, RecipeError), match=list(wrong)[-1]):
        checks._check_export(wrong)
    assert not list(tmp_path.iterdir())


def test_the_command_line_refuses_an_unknown_form(capfd):
    assert main(["export", "small.ckpt", "--model", "a.B", "--output", "small.onnx", "--form", "quickest"]) == 2
    assert "form is one of 'auto', 'fastest', 'smallest'; got 'quickest'" in capfd.readouterr().err
