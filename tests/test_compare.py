"""Comparisons: which recipes can be compared, what runs and what does not run again, mean and spread, the picture, the command."""

import base64
import dataclasses
import io
import json
import logging
import os
import re
import shutil
import sys
import types
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from lightning_prune.export.pareto import COLORS, Panel, Point, draw_pareto, pareto_front

from lightning_prune import compress, methods
from lightning_prune import recipe as recipes
from lightning_prune.checkpoint import load_from_checkpoint, plan_in, read_checkpoint
from lightning_prune.cli import main
from lightning_prune.cli.parser import split_overrides
from lightning_prune.errors import BudgetError, OptionError, RecipeError
from lightning_prune.methods import LowRank
from lightning_prune.recipe import objects, runner
from lightning_prune.recipe.bar import Bar
from lightning_prune.recipe.before import evaluate, has_moment
from lightning_prune.recipe.compare import Settings, compare
from lightning_prune.recipe.compare_page import html, markdown, picture
from lightning_prune.recipe.document import override
from lightning_prune.recipe.folder import RandomState
from lightning_prune.recipe.results import Cell, Comparison, Spread
from lightning_prune.recipe.schema import parse
from lightning_prune.recipe.trials import check, read_seeds, trials

LIT = """
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    def __init__(self, width: int = 12, lr: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(2, 10)
        self.first, self.drop, self.second = nn.Linear(10, width), nn.Dropout(0.2), nn.Linear(width, 3)
    def forward(self, x):
        return self.second(self.drop(self.first(x).relu()))
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9)

class Other(Net):
    pass

class Data(pl.LightningDataModule):
    def __init__(self, rows: int = 48):
        super().__init__()
        self.rows = rows
    def _set(self):
        x = torch.randn(self.rows, 10, generator=torch.Generator().manual_seed(0))
        return TensorDataset(x, x[:, :3].argmax(1))
    def train_dataloader(self):
        return DataLoader(self._set(), 8, shuffle=True)
    def test_dataloader(self):
        return DataLoader(self._set(), 16)
"""


def content(method=None, **changes):
    document = {
        "model": "complit.Net",
        "data": "complit.Data",
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
        "stages": [
            {"name": "dense", "fit": {"max_epochs": 1}},
            {
                "name": "small",
                "init_args": {"lr": 0.02},
                "fit": {"max_epochs": 2},
                "methods": [method or {"LowRank": {"params": 0.8, "align": 1}}],
            },
        ],
        "validate": {
            "metric": "accuracy",
            "provider": "cpu",
            "max_drop": 0.0,
            "min_speedup": 99,
            "latency": {"runs": 3, "rounds": 1, "warmup": 1},
        },
    }
    return {**document, **changes}


TRP = {"TRP": {"params": 0.8, "every_n_steps": 3, "align": 1}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a module, on the path."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "complit.py").write_text(LIT)
    (folder / "low.yaml").write_text(yaml.safe_dump(content()))
    (folder / "trp.yaml").write_text(yaml.safe_dump(content(TRP)))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _here(home, monkeypatch):
    monkeypatch.chdir(home)


@pytest.fixture(scope="module")
def made(home, tmp_path_factory):
    """A comparison of one recipe under two seeds, run by the command line; nothing in it may be changed."""
    folder = tmp_path_factory.mktemp("made") / "out"
    here = Path.cwd()
    os.chdir(home)
    try:
        assert main(["compare", "low.yaml", "--seeds", "2", "--output", str(folder)]) == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def copied(made, tmp_path):
    """A copy of it that may be changed."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def data(folder):
    return json.loads((folder / "compare.json").read_text())


def forbid(monkeypatch, error=None, only=""):
    """Have every run, or those in folders named ``only``, raise; return the list of folders that ran."""
    ran = []

    def resume(folder, *args, real=runner.resume, **kwargs):
        ran.append(str(folder))
        if only in str(folder):
            raise error or AssertionError("nothing may run here")
        return real(folder, *args, **kwargs)

    monkeypatch.setattr(runner, "resume", resume)
    return ran


# Seeds ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", (0, 1, 2)), ("1", (0,)), ("0,1,2", (0, 1, 2)), ("7, 3", (7, 3)), ("7,", (7,))]
)
def test_seeds_are_a_count_or_a_list(text, seeds):
    assert read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["0", "", ",", "-1", "1.5", "a,b", "1,,2", "1,1", "1,4294967296", "²"])
def test_anything_else_is_no_seeds(text):
    with pytest.raises(OptionError, match=r"--seeds .*got"):
        read_seeds(text)


# What can be compared ---------------------------------------------------------------------------------------------------


def changed(path, value, document=None):
    return override(document or content(TRP), path, value)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (changed("model", "complit.Other"), "model is 'complit.Net' in the first and 'complit.Other' in the second"),
        (changed("data", {"class_path": "complit.Data", "init_args": {"rows": 32}}), "data.init_args.rows is not set"),
        (changed("validate.metric", "f1"), "validate.metric is 'accuracy' in the first and 'f1' in"),
        (changed("validate.latency.runs", 4), "validate.latency.runs is 3 in the first and 4"),
        (changed("export", {"opset": 20}), "export.opset is not set in the first and 20"),
        (changed("stages.0.fit.max_epochs", 2), r"dense stages\.0\.trainer\.max_epochs is 1 in the first and 2"),
        (changed("stages.0.init_args", {"lr": 0.1}), r"dense stages\.0\.init_args\.lr is not set in the first and 0.1"),
        (
            changed("stages", [{"name": "a"}, *content(TRP)["stages"]]),
            "dense stages.0.trainer.max_epochs is 1 .* not set",
        ),
    ],
)
def test_recipes_on_different_ground_are_refused_with_the_first_difference(document, message):
    with pytest.raises(OptionError, match=f"low and other cannot be compared: {message}"):
        trials([("low", parse(content())), ("other", parse(document))])


def test_what_comes_after_the_dense_model_and_how_it_is_written_may_differ():
    document = content(TRP, description="another", variables={"a": 1}, seed=5)
    document["trainer"] = {"accelerator": "cpu", "enable_progress_bar": False}
    document["stages"][0] |= {"name": "first", "fit": {"max_epochs": 1, "log_every_n_steps": 1}}
    document["stages"][1] |= {"init_args": {"lr": 0.5}, "fit": {"max_epochs": 7}}
    document["validate"] |= {"max_drop": 0.5, "min_speedup": None, "tolerance": 1e-3}
    one, two = ("low", parse(content())), ("x/other.yml", parse(document))
    rows, _ = trials([one, two])
    assert [(row.label, row.kind) for row in rows] == [
        ("dense", "dense"),
        ("low", "recipe"),
        ("other", "recipe"),
        ("random-params-0.8", "control"),
    ]
    assert trials([two, one])[0][0] == rows[0], "the dense model is the same row, whichever recipe comes first"
    for row in rows:
        assert not {"max_drop", "min_speedup"} & set(row.recipe.validate)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"export": None}, "low: compare needs a metric"),
        ({"validate": {}}, "low: compare needs a metric"),
        ({"stages": content()["stages"][1:]}, "low: compare needs a dense stage"),
        ({"stages": content()["stages"][:1]}, "low: compare needs a dense stage and one with methods"),
    ],
)
def test_a_recipe_that_lacks_what_is_compared_is_refused(change, message):
    with pytest.raises(OptionError, match=message):
        trials([("low.yaml", parse(content(**change)))])


def test_the_same_recipe_twice_is_refused_and_equal_names_are_told_apart():
    with pytest.raises(OptionError, match="low and low-2 are the same"):
        trials([("low.yaml", parse(content())), ("a/low.yaml", parse(content(seed=4)))])
    rows, _ = trials([("dense.yaml", parse(content())), ("a/dense.yaml", parse(content(TRP)))])
    assert [row.label for row in rows] == ["dense", "dense-2", "dense-3", "random-params-0.8"]


def test_several_processes_are_refused():
    rows, _ = trials([("low", parse(content(trainer={"accelerator": "cpu", "devices": 2})))])
    with pytest.raises(OptionError, match=r"dense: stage 'dense' would train in 2 processes.*--trainer\.devices 1"):
        check(rows, 0)


def test_a_mistake_in_a_recipe_names_the_recipe():
    rows, _ = trials([("low", parse(content())), ("mean", parse(content({"LowRank": {"params": 0.01}})))])
    with pytest.raises(RecipeError, match=r"mean: stages\.1\.methods: "):
        check(rows, 0)


# Controls ---------------------------------------------------------------------------------------------------------------


def controls(*methods_given):
    rows, notes = trials([(f"r{n}", parse(content(method))) for n, method in enumerate(methods_given)])
    return {row.label: row.recipe.stages[1].methods for row in rows if row.kind == "control"}, notes


def test_every_budget_has_one_control_and_only_one():
    found, notes = controls(
        {"LowRank": {"params": 0.8}},
        {"TRP": {"params": 0.8}},
        {"LowRank": {"flops": 0.8, "include": ["first"]}},
        {"TRP": {"params": 300}},
        {"Random": {"params": 300, "structured": True, "seed": 9}},
        {
            "Magnitude": {
                "flops": 0.7,
                "structured": True,
                "norm": 1,
                "align": 2,
                "until_epoch": 1,
                "exclude": ["second"],
            }
        },
        {"TRP": {"params": 0.7, "align": 2, "start_epoch": 1}},
    )
    assert found == {
        "random-params-0.8": (("Random", {"params": 0.8, "structured": True}),),
        "random-flops-0.8": (("Random", {"flops": 0.8, "structured": True, "include": ["first"]}),),
        "random-flops-0.7": (
            ("Random", {"flops": 0.7, "structured": True, "align": 2, "until_epoch": 1, "exclude": ["second"]}),
        ),
        "random-params-0.7": (("Random", {"params": 0.7, "structured": True}),),
    }
    assert notes == ()


def test_a_recipe_without_a_budget_has_no_control_and_a_note_says_so():
    found, notes = controls({"LowRank": {"energy": 0.1}})
    assert found == {}
    assert notes == ("r0 has no budget (flops, params or sparsity): it has no Random control.",)


def test_single_weights_have_a_control_of_their_own():
    found, notes = controls(
        {"Magnitude": {"sparsity": 0.8, "scope": "erk", "until_epoch": 1}},
        {"Magnitude": {"sparsity": 0.8, "structured": True, "align": 2}},
        {"Magnitude": {"sparsity": 0.9}},
        {"Random": {"sparsity": 0.9}},
    )
    assert found == {
        "random-weights-sparsity-0.8": (("Random", {"sparsity": 0.8, "structured": False, "scope": "erk", "until_epoch": 1}),),
        "random-channels-sparsity-0.8": (("Random", {"sparsity": 0.8, "structured": True, "align": 2}),),
    }  # fmt: skip
    assert notes == ()


def test_several_stages_are_compared_at_the_last_budget_and_randomized_at_their_own():
    last = {"name": "smaller", "methods": [{"LowRank": {"params": 0.6}}, {"LowRank": {"rank": 2, "include": "second"}}]}
    rows, _ = trials([("two", parse(content(stages=[*content()["stages"], last])))])
    control = rows[-1]
    assert control.label == "random-params-0.6"
    given = [[dict(arguments) for _, arguments in stage.methods] for stage in control.seeded(7).stages]
    base = {"structured": True, "seed": 7}
    assert given == [[], [{"params": 0.8, **base}], [{"params": 0.6, **base}]]
    assert control.seeded(7).seed == 7
    assert rows[1].seeded(7).stages == rows[1].recipe.stages, "only controls draw by the seed of the cell"


def test_an_install_without_the_control_is_told(monkeypatch):
    monkeypatch.setattr(methods, "__all__", [name for name in methods.__all__ if name != "Random"])
    with pytest.raises(OptionError, match=r"always has the control 'Random'.*not among the methods \(.*TRP.*LowRank"):
        trials([("low", parse(content()))])


# Mean and spread --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.25], [0.9, 0.91, 0.95, 0.4], [3.0, 3.0, 3.0]])
def test_the_spread_is_the_sample_standard_deviation(values):
    found = Spread.of([None, *values])
    assert found.count == len(values)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    if len(values) == 1:
        assert found.std is None
    else:
        assert found.std == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert Spread.of([None]) is None


def test_a_spread_is_written_with_its_form_and_left_out_where_there_is_none():
    assert Spread(-0.5, 0.25, 2).text("+.2f") == "-0.50 ± 0.25"
    assert Spread(0.5, 0.25, 2).text("+.2f") == "+0.50 ± 0.25"
    assert Spread(0.439, 0.001, 2).text(".1f", 100, " %") == "43.9 ± 0.1 %"
    assert Spread(3, 0.0, 2).text(",.0f") == Spread(3, None, 1).text(",.0f") == "3"


def pace(p50, speedup, batch=1):
    return {"batch": batch, "p50": p50, "speedup": speedup}


def invented(**changes):
    """A comparison of three seeds in which one cell failed; ``small`` is better on average than in any pair."""
    machine = {"cpu": "a <b>|", "versions": {"torch": "2"}}
    accuracy = {"metric_name": "accuracy", "higher_is_better": True, "machine": machine}
    cells = []
    for seed, (dense, small) in enumerate([(0.90, 0.86), (0.70, None), (0.96, 0.95)]):
        figures = {"flops": 1000.0, "params": 100, "latency": [pace(2.0 + seed, 1.0), pace(9.0, 1.0, 16)]}
        cells.append(Cell("dense", seed, f"cells/dense/seed-{seed}", metric=dense, **figures, **accuracy))
        if small is None:
            cells.append(Cell("small", seed, "cells/small/seed-1", failure="out | of <memory>"))
            continue
        figures = {"flops": 400.0 + 10 * seed, "params": 50, "latency": [pace(1.0, 2.0 + seed), pace(3.0, 3.0, 16)]}
        cells.append(
            Cell("small", seed, f"cells/small/seed-{seed}", metric=small, before=small / 2, **figures, **accuracy)
        )
    rows = [{"label": name, "kind": kind, "recipe": {}} for name, kind in (("dense", "dense"), ("small", "recipe"))]
    found = Comparison("2000-01-01", "lightning-prune compare 'a<b>.yaml'", [0, 1, 2], rows, cells, ["A <note>."])
    return dataclasses.replace(found, **changes)


def test_summaries_equal_numpy_over_the_seeds_that_finished():
    dense, small = invented().summaries()
    assert (dense.seeds, small.seeds) == (3, 2)

    def same(found, values):
        assert (found.mean, found.std, found.count) == (
            pytest.approx(np.mean(values), rel=1e-12),
            pytest.approx(np.std(values, ddof=1), rel=1e-12),
            len(values),
        )

    same(dense.metric, [0.90, 0.70, 0.96])
    same(small.metric, [0.86, 0.95])
    same(small.before, [0.43, 0.475])
    same(small.change, [0.86 - 0.90, 0.95 - 0.96])  # in pairs: the means alone would say that it gained
    same(small.flops, [400, 420])
    same(small.flops_share, [0.40, 0.42])
    same(small.latency[1]["speedup"], [2, 4])
    same(small.latency[1]["share"], [1 / 2, 1 / 4])
    same(dense.latency[1]["p50"], [2, 3, 4])
    same(small.latency[16]["p50"], [3, 3])
    assert dense.before is None


def test_the_table_holds_mean_spread_shares_and_how_many_seeds():
    head, (dense, small) = invented().table_rows()
    assert head == (
        ["", "accuracy", "change", "before fine-tuning", "FLOPs", "parameters", "latency, batch 1", "latency, batch 16", "seeds"]
    )  # fmt: skip
    assert dense == ["dense", "0.8533 ± 0.1361", "-", "-", "1,000", "100", "3.000 ms", "9.000 ms", "3"]
    assert small == [
        "small",
        "0.9050 ± 0.0636",
        "-0.0250 ± 0.0212",
        "0.4525 ± 0.0318",
        "410 ± 14 (41.0 ± 1.4 %)",
        "50 (50.0 %)",
        "1.000 ms (3.00 ± 1.41x)",
        "3.000 ms (3.00x)",
        "2 of 3",
    ]
    assert invented().table_rows(full=False)[1][1][4:7] == ["41.0 ± 1.4 %", "50.0 %", "3.00 ± 1.41x"]


def test_a_recipe_whose_cells_all_failed_says_so_in_its_row():
    found = invented(cells=[Cell("dense", 0, "f", failure="a"), Cell("small", 0, "f", failure="b")], seeds=[0])
    assert found.table_rows()[1] == [[name, "failed", "-", "-", "-", "-", "0 of 1"] for name in ("dense", "small")]
    assert found.failures == ["dense, seed 0: a", "small, seed 0: b"]
    assert html(found, picture(found))


def test_different_machines_are_told():
    assert not any("different machines" in text for text in invented().remarks)
    cells = invented().cells
    cells[0] = dataclasses.replace(cells[0], machine={"cpu": "another"})
    assert any("different machines" in text for text in invented(cells=cells).remarks)


def test_documents_escape_what_comes_from_elsewhere_and_load_nothing():
    found = invented()
    png = picture(found)
    page, text = html(found, png), markdown(found)
    assert "out | of &lt;memory&gt;" in page
    assert "<memory>" not in page
    assert "<note>" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert base64.b64decode(re.search(r"base64,([^\"]+)", page)[1]) == png
    assert "- FAILED: small, seed 1: out \\| of &lt;memory&gt;" in text
    assert "| torch 2 |" in text.replace("| versions | ", "| ")
    rows = [line for line in text.splitlines() if line.startswith("| small |")]
    assert [len(re.split(r"(?<!\\)\|", row)) for row in rows] == [11]


# The picture ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("higher", [True, False])
def test_the_front_is_what_no_other_point_beats(higher):
    generator = np.random.default_rng(0)
    for _ in range(200):
        points = [tuple(map(float, pair)) for pair in generator.integers(0, 6, (generator.integers(1, 9), 2))]

        def beats(a, b):
            better = a[1] > b[1] if higher else a[1] < b[1]
            return (a[0] <= b[0] and better) or (a[0] < b[0] and a[1] == b[1])

        expected = {point for point in points if not any(beats(other, point) for other in points)}
        front = pareto_front(points, higher)
        assert [points[i] for i in front] == sorted(expected), "each once, by rising cost"
        assert all(i == points.index(points[i]) for i in front)


def pixels(png, color):
    image = matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(image - wanted).max(-1) < 0.01).sum())


def panels(count, **changes):
    points = [Point("dense", 100, 0.9, None, 0.01)]
    points += [Point(f"r{n}", 40 + 5 * n, 0.8 + 0.02 * n, 1.0, 0.01) for n in range(count)]
    points[-1] = dataclasses.replace(points[-1], **changes)
    return [Panel("FLOPs", points)]


def test_the_picture_is_a_function_of_its_figures():
    first = draw_pareto(panels(3), "accuracy", True, "dense")
    assert first == draw_pareto(panels(3), "accuracy", True, "dense")
    others = [
        draw_pareto(panels(3, y=0.5), "accuracy", True, "dense"),
        draw_pareto(panels(3, x_std=9.0), "accuracy", True, "dense"),
        draw_pareto(panels(3), "accuracy", False, "dense"),
        draw_pareto(panels(3), "accuracy", None, "dense"),
    ]
    assert len({first, *others}) == 5


@pytest.mark.parametrize("count", [1, 6])
def test_every_recipe_has_a_colour_of_its_own(count):
    png = draw_pareto(panels(count), "accuracy", True, "dense")
    assert [pixels(png, color) > 100 for color in COLORS] == [n < count for n in range(len(COLORS))]


def test_names_that_mean_something_to_the_drawing_library_are_drawn_as_they_are():
    named = [Panel("cost", [Point("dense", 1, 1), Point("_a$b$", 2, 2), Point("$", 3, 3)])]
    assert draw_pareto(named, "a_$x$_metric", True, "dense")


# Running ----------------------------------------------------------------------------------------------------------------


def test_a_comparison_leaves_every_cell_a_table_and_a_picture(made):
    content_ = data(made)
    names = [(cell["trial"], cell["seed"]) for cell in content_["cells"]]
    assert names == [(name, seed) for seed in (0, 1) for name in ("dense", "low", "random-params-0.8")]
    assert content_["command"] == f"lightning-prune compare low.yaml --seeds 0,1 --output {made}"
    dense, low, control = content_["rows"]
    assert dense["params"]["mean"] == 10 * 12 + 12 + 12 * 3 + 3
    assert low["params"]["mean"] <= 0.8 * dense["params"]["mean"]
    assert control["params"]["mean"] <= 0.8 * dense["params"]["mean"]
    assert dense["flops"]["mean"] == 10 * 12 + 12 * 3
    assert (dense["before"], low["before"]["count"]) == (None, 2)
    for cell in content_["cells"]:
        report = json.loads((made / cell["folder"] / "report" / "report.json").read_text())
        assert cell["metric"] == report["models"]["compact"]["metric"]
        assert cell["machine"]["versions"]["torch"]
        if cell["trial"] == "dense":
            assert not list((made / cell["folder"]).rglob("*.start.ckpt"))
            assert cell["latency"][0]["speedup"] == 1
        else:
            assert cell["latency"][0]["speedup"] == report["latency"][0]["speedup"]["median"]
            twin = next(c for c in content_["cells"] if (c["trial"], c["seed"]) == ("dense", cell["seed"]))
            assert report["models"]["dense"]["metric"] == twin["metric"], "paired: the same dense model"
            files = [made / twin["folder"] / "small.onnx", made / cell["folder"] / "dense.onnx"]
            assert files[0].read_bytes() == files[1].read_bytes()
            assert [log.name for log in (made / cell["folder"] / "logs").iterdir()] == ["small"], (
                "trained once per seed"
            )
    text = (made / "compare.md").read_text()
    assert "lightning-prune compare low.yaml --seeds 0,1" in text
    assert "| versions | " in text
    assert (made / "compare.html").read_text().count("base64,") == 1
    assert (made / "pareto.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["low", "random-params-0.8"])
def test_a_cell_ends_as_a_run_of_its_recipe_with_that_seed(made, tmp_path, name):
    recipe = next(row for row in trials([("low.yaml", recipes.load("low.yaml"))])[0] if row.label == name).seeded(1)
    outcome = runner.run(dataclasses.replace(recipe, export=None, validate=None), tmp_path / "alone")
    alone = read_checkpoint(outcome.folder / "stages" / "small.ckpt")["state_dict"]
    cell = read_checkpoint(made / "cells" / name / "seed-1" / "stages" / "small.ckpt")["state_dict"]
    assert list(alone) == list(cell)
    assert all(torch.equal(alone[key], cell[key]) for key in alone)
    other = read_checkpoint(made / "cells" / name / "seed-0" / "stages" / "small.ckpt")["state_dict"]
    bias = next(key for key in cell if key.endswith("second.bias"))
    assert not torch.equal(cell[bias], other[bias])
    if name != "low":
        assert outcome.plan.stages[-1].options["seed"] == 1


def accuracy_by_hand(model):
    x = torch.randn(48, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == x[:, :3].argmax(1)).float().mean())


def test_before_fine_tuning_is_the_dense_model_compressed_and_not_yet_trained(made):
    net = objects.model_class("complit.Net")
    changes = []
    for seed in (0, 1):
        path = made / "cells" / "low" / f"seed-{seed}"
        dense = load_from_checkpoint(net, path / "stages" / "dense.ckpt", require_plan=False)
        small, _ = compress(dense, LowRank(params=0.8, align=1), dense.example_input_array)
        cell = json.loads((path / "cell.json").read_text())
        assert cell["before"] == pytest.approx(accuracy_by_hand(small), abs=1e-6)
        tuned = load_from_checkpoint(net, path / "stages" / "small.ckpt")
        assert cell["metric"] == pytest.approx(accuracy_by_hand(tuned), abs=1e-6)
        assert evaluate(tuned, recipes.load("low.yaml")) == cell["metric"]
        changes.append(cell["metric"] - cell["before"])
    assert any(changes), "fine-tuning must change the metric here, or this shows nothing"


@pytest.mark.parametrize(
    ("method", "then", "moment"), [(None, 0, True), (TRP, 0, False), (TRP, 1, True)], ids=["start", "gradual", "later"]
)
def test_a_gradual_method_has_a_moment_before_fine_tuning_only_if_a_stage_follows(method, then, moment):
    recipe = parse(content(method, stages=[*content(method)["stages"], *[{"name": "tune"}] * then]))
    assert has_moment(recipe) is moment


# Going on ---------------------------------------------------------------------------------------------------------------


def test_a_finished_comparison_runs_nothing_again(copied, monkeypatch, capsys):
    forbid(monkeypatch)
    before = data(copied)
    assert main(["compare", "low.yaml", "--seeds", "2", "--output", str(copied)]) == 0
    assert data(copied)["cells"] == before["cells"]
    assert data(copied)["rows"] == before["rows"]
    assert capsys.readouterr().out.splitlines()[-1] == str(copied / "compare.html")


class Stop(Exception):
    """What a test throws into a run."""


def test_a_stopped_comparison_goes_on_inside_the_cell_and_ends_as_the_uninterrupted_one(copied, monkeypatch):
    before = data(copied)
    target = copied / "cells" / "low" / "seed-1"
    shutil.rmtree(target)
    given, settings = [("low.yaml", recipes.load("low.yaml"))], Settings((0, 1))

    def stop(self, trainer, module):
        if trainer.current_epoch == 1:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(RandomState, "on_train_epoch_start", stop, raising=False)
        with pytest.raises(Stop):
            compare(given, copied, settings)
    assert (target / "checkpoints" / "small" / "last.ckpt").is_file()
    snapshot = (target / "stages" / "small.start.ckpt").read_bytes()
    ran = forbid(monkeypatch, only="nothing")
    compare(given, copied, settings)
    assert ran == [str(target)]
    assert (target / "stages" / "small.start.ckpt").read_bytes() == snapshot, (
        "the model before fine-tuning, not a later one"
    )
    for old, new in zip(before["cells"], data(copied)["cells"], strict=True):
        assert [old[key] for key in ("trial", "seed", "metric", "before", "params")] == [
            new[key] for key in ("trial", "seed", "metric", "before", "params")
        ]


def test_a_cell_that_trained_but_was_not_measured_is_measured_only(copied, monkeypatch):
    target = copied / "cells" / "low" / "seed-0"
    figures = json.loads((target / "cell.json").read_text())
    (target / "cell.json").write_text("{")
    weights = (target / "stages" / "small.ckpt").read_bytes()
    monkeypatch.setattr(runner, "_fit", lambda *_: pytest.fail("nothing may train"))
    compare([("low.yaml", recipes.load("low.yaml"))], copied, Settings((0, 1)))
    again = json.loads((target / "cell.json").read_text())
    assert (again["metric"], again["before"]) == (figures["metric"], figures["before"])
    assert (target / "stages" / "small.ckpt").read_bytes() == weights


def test_a_new_seed_or_recipe_adds_cells_and_keeps_those_that_are_there(copied, monkeypatch):
    ran = forbid(monkeypatch, BudgetError("not now"))
    given = [("low.yaml", recipes.load("low.yaml")), ("trp.yaml", recipes.load("trp.yaml"))]
    found, _ = compare(given, copied, Settings((1, 2), keep_going=True))
    names = [Path(path).relative_to(copied / "cells") for path in ran]
    assert list(map(str, names)) == ["trp/seed-1", "dense/seed-2"]
    assert [cell.failure is None for cell in found.cells] == [True, True, False, True] + [False] * 4
    assert [text.partition(": ")[0] for text in found.notes] == ["trp has no figure before fine-tuning"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--stages.1.fit.max_epochs 5",
            "seed-0.* was started with another recipe: stages.1.fit.max_epochs was 2 and is",
        ),
        ("--model.init_args.width 9", "seed-0.* was started with another recipe: stages.0.init_args"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused_and_nothing_changes(copied, capfd, words, message):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    assert main(["compare", "low.yaml", "--seeds", "2", "--output", str(copied), *words.split()]) == 2
    assert re.search(message, capfd.readouterr().err)
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


# Cells that fail --------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(copied, monkeypatch):
    """A finished comparison but for one cell, which fails."""
    shutil.rmtree(copied / "cells" / "low" / "seed-1")
    forbid(monkeypatch, BudgetError("two layers\nbind"), only="low/seed-1")
    return copied


def test_a_failing_cell_stops_the_comparison_with_its_name(broken, capfd):
    assert main(["compare", "low.yaml", "--seeds", "2", "--output", str(broken)]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("lightning-prune: Cell low, seed 1: two layers bind Finished cells are kept: ")
    assert f"--output {broken}" in line
    assert len(data(broken)["cells"]) == 4


def test_with_keep_going_it_is_marked_and_the_others_stand(broken, monkeypatch, capfd):
    forbid(monkeypatch, ZeroDivisionError("in\ntraining"), only="low/seed-1")
    assert main(["compare", "low.yaml", "--seeds", "2", "--output", str(broken), "--keep-going"]) == 1
    out = capfd.readouterr().out
    assert "FAILED low, seed 1: ZeroDivisionError: in training" in out
    assert "1 of 2" in out
    found = data(broken)
    assert [cell["failure"] for cell in found["cells"]] == [None] * 4 + ["ZeroDivisionError: in training", None]
    assert found["rows"][1]["metric"]["count"] == 1
    assert "low, seed 1: ZeroDivisionError: in training" in (broken / "compare.html").read_text()
    assert not (broken / "cells" / "low" / "seed-1" / "cell.json").exists(), "it is tried again next time"


def test_an_error_of_the_training_code_keeps_its_traceback_and_gets_the_name_of_the_cell(broken, monkeypatch):
    forbid(monkeypatch, ZeroDivisionError("in training"), only="low/seed-1")
    with pytest.raises(ZeroDivisionError) as raised:
        main(["compare", "low.yaml", "--seeds", "2", "--output", str(broken)])
    assert raised.value.__notes__[0].startswith("This happened in cell low, seed 1.")


def test_without_a_dense_model_its_cells_fail_and_say_why(home, tmp_path, monkeypatch):
    forbid(monkeypatch, BudgetError("no"))
    assert main(["compare", "low.yaml", "--seeds", "1", "--output", str(tmp_path / "o"), "--keep-going"]) == 1
    reasons = [cell["failure"] for cell in data(tmp_path / "o")["cells"]]
    assert reasons == ["no"] + ["Its dense model was not trained: that cell failed."] * 2
    assert (tmp_path / "o" / "compare.html").is_file()


def test_outputs_that_are_not_those_of_torch_fail_the_cell(copied, monkeypatch):
    (copied / "cells" / "low" / "seed-1" / "cell.json").unlink()

    report = types.SimpleNamespace(passed=False, failures=["output 0 differs"])
    monkeypatch.setattr(runner, "resume", lambda *_, **__: types.SimpleNamespace(report=report))
    found, _ = compare([("low.yaml", recipes.load("low.yaml"))], copied, Settings((0, 1), keep_going=True))
    assert found.failures == ["low, seed 1: The validation failed: output 0 differs."]


# The command ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Missing: recipes"),
        ("lo.yaml", "no such file"),
        ("low.yaml --seed 3", "--seed belongs to one run; a comparison takes --seeds"),
        ("low.yaml --seeds none", "--seeds is a count of at least 1.*got 'none'"),
        ("low.yaml --sede 3", "unknown key 'sede'"),
        ("low.yaml low.yaml", "low and low-2 are the same"),
        ("low.yaml other.yaml", "cannot be compared: data.init_args.rows is not set in the first and 32 in the second"),
        ("low.yaml --output low.yaml", "'.*low.yaml' is a file"),
        ("low.yaml --output .", "not empty and holds no comparison"),
        ("low.yaml --validate.metric acuracy", "dense: .*'acuracy'. Did you mean 'accuracy'"),
        ("low.yaml --stages.1.methods.0.LowRank.params 0.01", "low: stages.1.methods: "),
    ],
)
def test_a_mistake_is_one_line_exit_code_2_and_nothing_written(home, capfd, words, message):
    document = changed("data", {"class_path": "complit.Data", "init_args": {"rows": 32}})
    (home / "other.yaml").write_text(yaml.safe_dump(document))
    before = {path for path in home.rglob("*") if "__pycache__" not in path.parts}
    assert main(["compare", *words.split()]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    assert re.search(message, err), err
    assert {path for path in home.rglob("*") if "__pycache__" not in path.parts} == before


def test_ctrl_c_tells_how_to_go_on(tmp_path, monkeypatch, capfd):
    forbid(monkeypatch, KeyboardInterrupt())
    words = ["compare", "low.yaml", "--seeds", "7,", "--output", str(tmp_path / "o"), "--model.init_args.width", "8"]
    assert main(words) == 130
    last = capfd.readouterr().err.splitlines()[-1]
    command = f"lightning-prune compare low.yaml --seeds 7, --model.init_args.width 8 --output {tmp_path / 'o'}"
    assert last == f"Interrupted. Go on with: {command}"
    assert split_overrides(command.split()[2:], "compare")[1] == [("model.init_args.width", "8")]
    assert [trial["recipe"]["model"]["init_args"] for trial in data(tmp_path / "o")["trials"][1:]] == [{"width": 8}] * 2


def test_own_options_are_split_from_keys_of_the_recipes():
    words = ["a", "--seeds", "0,1", "--keep-going", "b", "--output=o", "--trainer.devices", "1", "--seeds=2"]
    kept, overrides = split_overrides(words, "compare")
    assert kept == ["a", "--seeds", "0,1", "--keep-going", "b", "--output=o", "--seeds=2"]
    assert overrides == [("trainer.devices", "1")]


def test_help_says_what_is_always_there_and_how_to_go_on(capsys):
    assert main(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    for part in ("examples:\n  lightning-prune compare ", "--keep-going", "--seeds", "random control", "same --output"):
        assert part in text
    assert main(["--help"]) == 0
    assert "compare" in capsys.readouterr().out


def test_log_lines_go_above_the_bar_and_back_to_their_stream():
    stream, logger = io.StringIO(), logging.getLogger("lightning_prune")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        with Bar(2, show=True) as bar:
            bar.begin("[a], seed 0")
            bar.tell("stage x, epoch 1 of 2")
            assert handler.stream is sys.stderr
            bar.advance()
            assert bar._bars.tasks[0].completed == 1
        assert handler.stream is stream
        with Bar(2, show=False):
            assert handler.stream is stream
    finally:
        logger.removeHandler(handler)


def test_what_a_cell_prints_is_in_its_folder(made):
    assert "LowRank: " in (made / "cells" / "low" / "seed-0" / "output.txt").read_text()
    assert plan_in(read_checkpoint(made / "cells" / "low" / "seed-0" / "stages" / "small.start.ckpt")["state_dict"])
