"""CSV, TensorBoard and wandb are told the same of every exported method, and it is what the plan and the model say."""

import csv
import io
import json
import logging
import re
import struct
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lit import LitNet, loader, trainer
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import nn
from toys import NAMES, make

from lightning_prune.callback import loggers
from lightning_prune.flops import count_flops
from lightning_prune.methods import LowRank
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.factorized import Factorized
from lightning_prune.structure.mpo import MPO
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.rotated import Rotated
from lightning_prune.structure.steps import KeepChannels, MaskWeight
from lightning_prune.structure.steps.cut import Cut
from lightning_prune.structure.unrolled import Unrolled, unroll

PLACE = "compression/"


def merged(points):
    """Scalars by step and name; of two for one step the later counts."""
    table = {}
    for step, name, value in points:
        table.setdefault(int(step), {})[name] = float(value)
    return table


def read_csv(folder):
    with (folder / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    scalars = merged((r["step"], k, v) for r in rows for k, v in r.items() if k.startswith(PLACE) and v != "")
    with (folder / "compression_layers.csv").open() as stream:
        return SimpleNamespace(scalars=scalars, table=list(csv.DictReader(stream)), pictures=[])


def read_markdown(text):
    rows = [
        [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.split("\n")
    ]
    assert all(cell == "---" for cell in rows[1])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    scalars = merged(
        (p.step, tag, p.value) for tag in tags["scalars"] if tag.startswith(PLACE) for p in events.Scalars(tag)
    )
    text = events.Tensors("compression/layers/text_summary")[-1].tensor_proto.string_val[0].decode()
    pictures = [
        p.encoded_image_string for tag in tags["images"] for p in events.Images(tag) if tag == "compression/kept"
    ]
    return SimpleNamespace(
        scalars=scalars, table=read_markdown(text), pictures=[_pixels(io.BytesIO(p)) for p in pictures]
    )


def _records(path):
    """Read the log of an offline run: blocks of 32 KiB of records, each crc, length, kind and protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(part)
            part = b""
            yield record


def read_wandb(folder):
    (log,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 20  # wandb's own process writes the end a little later
    while not any(record.WhichOneof("record_type") == "exit" for record in _records(log)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    points = []
    for record in _records(log):
        items = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
        step = items.get("trainer/global_step")
        facts = {name: json.loads(text) for name, text in items.items() if name.startswith(PLACE)}
        points += [(step, name, value) for name, value in facts.items() if isinstance(value, int | float)]
    points = [
        p for p in points if not p[1].startswith(("compression/layers/", "compression/kept/w", "compression/kept/h"))
    ]
    points = [p for p in points if p[1] != "compression/kept/count"]
    media = log.parent / "files" / "media"
    (path,) = (media / "table" / "compression").glob("layers*.json")
    table = json.loads(path.read_text())
    pictures = [_pixels(path) for path in (media / "images" / "compression").glob("kept*.png")]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return SimpleNamespace(scalars=merged(points), table=rows, pictures=pictures)


def _pixels(source):
    return np.asarray(Image.open(source).convert("RGB")).astype(int)


@pytest.fixture(scope="module", params=NAMES)
def told(request, tmp_path_factory):
    """One fit with all loggers at once; what was told, read back from their files."""
    import wandb

    folder = tmp_path_factory.mktemp("loggers")
    env = {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "DISABLE_GIT": "true"}
    env |= {name: str(folder / name) for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(f"WANDB_{name}", value)
        torch.manual_seed(0)
        model, method = LitNet(), make(request.param)
        taking = [CSVLogger(folder, "csv"), TensorBoardLogger(folder, "tb"), WandbLogger(save_dir=folder, offline=True)]
        run = trainer(folder, callbacks=[method], logger=taking)
        run.fit(model, loader(), loader(16, seed=1))
        wandb.finish()
    found = {
        "csv": read_csv(folder / "csv" / "version_0"),
        "tensorboard": read_tensorboard(folder / "tb" / "version_0"),
        "wandb": read_wandb(folder),
    }
    return SimpleNamespace(model=model, method=method, last=run.global_step, found=found)


def test_scalars_are_the_same_in_every_logger(told):
    expected = told.found["csv"].scalars
    assert told.found["wandb"].scalars == expected
    rounded = {step: {k: float(np.float32(v)) for k, v in row.items()} for step, row in expected.items()}
    assert told.found["tensorboard"].scalars == rounded  # its files hold float32


def test_scalars_are_what_the_model_says(told):
    dense, model = LitNet(), told.model
    flops = [count_flops(m, m.example_input_array).total for m in (dense, model)]
    params = [sum(p.numel() for p in m.parameters()) for m in (dense, model)]
    expected = {"flops": flops[1], "params": params[1]}
    expected |= {"flops_share": flops[1] / flops[0], "params_share": params[1] / params[0]}
    for name, module in model.net.named_children():
        before = dense.net.get_submodule(name)
        if isinstance(module, Unrolled):
            expected[f"kept/net.{name}"] = 1.0  # the map holds every weight
            name, module, before = f"{name}.linear", module.linear, unroll(before, module.inputs[1:]).linear  # noqa: PLW2901
        sizes = [sum(t.numel() for t in m.state_dict().values() if t.ndim) for m in (module, before)]
        if isinstance(module, Factorized):
            expected[f"kept/net.{name}"] = sizes[0] / sizes[1]
            expected[f"rank/net.{name}"] = module.second.weight.shape[1]
        elif isinstance(module, Rotated):
            expected[f"kept/net.{name}"] = sizes[0] / sizes[1]
            parts = dict(module.named_children())
            terms = (
                getattr(module.core, "groups", 1) > 1
            )  # the factors of a depthwise core show these, not the directions
            if "rotate_in" in parts:
                expected[f"{'terms' if terms else 'inputs'}/net.{name}"] = len(parts["rotate_in"].weight)
            if "rotate_out" in parts and not terms:
                expected[f"outputs/net.{name}"] = parts["rotate_out"].weight.shape[1]
        elif isinstance(module, MPO):
            expected[f"kept/net.{name}"] = sizes[0] / sizes[1]
            expected[f"bond/net.{name}"] = max(module.form.bonds)
        elif isinstance(module, nn.Conv2d | nn.Linear) and (module.weight == 0).any():
            alive = int((module.weight != 0).sum())
            expected[f"kept/net.{name}"] = alive / before.weight.numel()  # of the dense layer's
            expected[f"sparsity/net.{name}"] = 1 - alive / module.weight.numel()  # of those still there
        elif sizes[0] != sizes[1]:  # of the tensors that channels have left, not of those that stay whole
            pairs = zip(module.state_dict().values(), before.state_dict().values(), strict=True)
            cut = [(new.numel(), old.numel()) for new, old in pairs if new.shape != old.shape]
            expected[f"kept/net.{name}"] = sum(new for new, _ in cut) / sum(old for _, old in cut)
    found = told.found["csv"].scalars
    assert len(found) > 1  # over steps, not only at the end
    assert max(found) == told.last == 8
    assert {key.removeprefix(PLACE) for key in found[told.last]} >= expected.keys()
    assert {key: found[told.last][PLACE + key] for key in expected} == pytest.approx(expected, rel=1e-12)


def test_tables_are_the_plan_in_every_logger(told):
    rows = plan_of(told.model).rows()
    assert {row["layer"] for row in rows} >= {step.module for step in told.method.plan.steps}
    expected = [{key: "" if cell is None else str(cell) for key, cell in row.items()} for row in rows]
    for name, found in told.found.items():
        assert found.table == expected, name


def test_pictures_show_the_share_kept_of_every_changed_layer(told):
    (first,), (second,) = told.found["tensorboard"].pictures, told.found["wandb"].pictures
    assert np.array_equal(first, second)
    bar, rest = (np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for colour in (loggers._BAR, loggers._REST))
    filled, empty = ((first == colour).all(2) for colour in (bar, rest))
    starts = [y for y in range(1, len(first)) if filled[y].any() and not filled[y - 1].any()]
    kept = [row["kept"] for row in plan_of(told.model).rows() if row["kept"] is not None]
    shares = []
    for y in starts:
        left, right = np.flatnonzero(filled[y + 1])[[0, -1]]
        shares.append((right - left + 1) / (max([right, *np.flatnonzero(empty[y + 1])]) - left + 1))
    assert shares == pytest.approx(kept, abs=0.01)  # a pixel is 0.2 %


def test_no_figure_is_left_with_pyplot(told):
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


@pytest.mark.parametrize("name", NAMES)
def test_without_matplotlib_there_is_no_picture_and_one_line_says_so(name, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    taking = [TensorBoardLogger(tmp_path, "one"), TensorBoardLogger(tmp_path, "two")]
    with caplog.at_level(logging.INFO, "lightning_prune"):
        trainer(tmp_path, callbacks=[make(name)], logger=taking).fit(LitNet(), loader())
    assert [r.levelname for r in caplog.records if "matplotlib" in r.getMessage()] == ["INFO"]
    found = [read_tensorboard(tmp_path / folder / "version_0") for folder in ("one", "two")]
    assert not found[0].pictures
    assert found[0].table
    assert (found[0].scalars, found[0].table) == (found[1].scalars, found[1].table)


class Plain(Logger):
    """Takes scalars; has neither ``experiment`` nor a folder."""

    name = version = "plain"

    def __init__(self):
        super().__init__()
        self.seen = []

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.seen += [name for name in metrics if name.startswith(PLACE)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", [True, False])
def test_only_rank_0_tells_and_a_plain_logger_will_do(name, first, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SingleDeviceStrategy, "is_global_zero", property(lambda self: first))
    logger, model = Plain(), LitNet()
    trainer(tmp_path, callbacks=[make(name)], logger=logger).fit(model, loader())
    assert plan_of(model).steps
    assert bool(logger.seen) == first
    assert (plan_of(model).steps[0].module in capsys.readouterr().out) == first


@pytest.mark.parametrize("name", NAMES)
def test_fast_dev_run_writes_no_files(name, tmp_path):
    run = trainer(tmp_path, callbacks=[make(name)], logger=CSVLogger(tmp_path, "csv"), fast_dev_run=2)
    run.fit(LitNet(), loader())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_two_callbacks_in_one_trainer_share_one_whole_table(tmp_path):
    methods = [LowRank(rank=2, align=1, include=[layer]) for layer in ("net.3", "net.8")]
    model = LitNet()
    taking = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
    trainer(tmp_path, callbacks=methods, logger=taking).fit(model, loader())
    for found in (read_csv(tmp_path / "csv" / "version_0"), read_tensorboard(tmp_path / "tb" / "version_0")):
        assert [row["layer"] for row in found.table if row["kept"]] == ["net.3", "net.8"]
        final = found.scalars[max(found.scalars)]
        assert (final["compression/rank/net.3"], final["compression/rank/net.8"]) == (2, 2)
        assert final["compression/params"] == sum(p.numel() for p in model.parameters())


def test_two_masks_of_one_layer_are_told_apart():
    halves, quarters = torch.tensor([True, False]), torch.tensor([True, False, False, False])
    plan = Plan((MaskWeight.of("net.0", "weight", halves), MaskWeight.of("net.0", "bias", quarters)))
    facts = {"kept/net.0": 0.5, "sparsity/net.0": 0.5, "kept/net.0.bias": 0.25, "sparsity/net.0.bias": 0.75}
    assert loggers.layer_facts(plan) == facts


def test_a_unit_that_leaves_after_a_mask_counts_once():
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    rows = Cut.of((3, 2), {0: torch.tensor([True, False, True])})
    plan = Plan((MaskWeight.of("net.0", "weight", mask), KeepChannels("net.0", {"weight": rows})))
    assert loggers.layer_facts(plan) == {"kept/net.0": 3 / 6, "sparsity/net.0": 1 / 4}


def test_a_reason_with_bars_and_line_ends_stays_in_its_cell():
    texts = []
    logger = SimpleNamespace(experiment=SimpleNamespace(add_text=lambda *arguments: texts.append(arguments[1])))
    run = SimpleNamespace(
        is_global_zero=True,
        barebones=False,
        fast_dev_run=False,
        loggers=[logger],
        lightning_module=nn.Module(),
        global_step=3,
    )
    mask = MaskWeight.of("first", "weight", torch.tensor([True, False]))
    loggers.tell_table(run, Plan((mask,), {"last": "a | b\nc"}), "title")
    assert [(row["layer"], row["reason"]) for row in read_markdown(texts[0])] == [("first", ""), ("last", "a | b c")]


def test_a_picture_of_many_layers_shows_the_least_kept_and_of_none_is_not_drawn():
    rows = [{"layer": f"layer${index}", "kept": index / 60} for index in range(60)]
    axes = loggers.draw_kept(rows).axes[0]
    widths = [patch.get_width() for patch in axes.containers[1]]
    assert widths == pytest.approx([100 * index / 60 for index in range(40)])
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == [r"layer\$0", r"layer\$1"]
    assert axes.get_xlabel() == "weights kept, % (the 40 least of 60)"
    assert loggers.draw_kept([{"layer": "alone", "kept": None}]) is None
