"""Recipes: reading, overriding, checking, running, and going on after a stop."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from networks import resnet18
from torch import nn

from lightning_prune import compress
from lightning_prune import recipe as recipes
from lightning_prune.checkpoint import load_from_checkpoint, plan_in, read_checkpoint
from lightning_prune.errors import LightningPruneError, OptionError, RecipeError
from lightning_prune.recipe import checks, objects, runner
from lightning_prune.recipe.document import interpolate, override, parse_yaml
from lightning_prune.recipe.folder import CHECKPOINT_KEY, Folder, RandomState
from lightning_prune.recipe.schema import parse

REPOSITORY = Path(__file__).resolve().parent.parent

# Shuffles with the global generator and drops out: whatever a resume forgets to restore shows in the weights.
TINY = """
import os, signal
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    def __init__(self, width: int = 16, dropout: float = 0.3, lr: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(2, 1, 6, 6)
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                                  nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Dropout(dropout), nn.Flatten())
        self.head = nn.Linear(36 * width, 2)
    def forward(self, x):
        return self.head(self.body(x))
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def on_train_batch_start(self, batch, batch_idx):
        if os.environ.get("KILL_AT") == f"{self.lr_of_stage()}:{self.current_epoch}:{batch_idx}":
            os.kill(os.getpid(), signal.SIGKILL)
    def lr_of_stage(self):
        return self.hparams.lr
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9)

class NotLit:
    pass

class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size = batch_size
    def _set(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, 1, 6, 6, generator=generator)
        return TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())
    def train_dataloader(self):
        return DataLoader(self._set(), self.batch_size, shuffle=True)
    def test_dataloader(self):
        return DataLoader(self._set(), self.batch_size)
"""


def content(**changes):
    document = {
        "seed": 1,
        "model": "tinylit.Net",
        "data": "tinylit.Data",
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
        "stages": [
            {"name": "dense", "fit": {"max_epochs": 3}},
            {
                "name": "trp",
                "init_args": {"lr": 0.01},
                "fit": {"max_epochs": 3},
                "methods": [{"TRP": {"params": 0.9, "every_n_steps": 3, "align": 1}}],
            },
        ],
        "export": None,
    }
    return {**document, **changes}


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    (folder / "tinylit.py").write_text(TINY)
    return folder


@pytest.fixture(autouse=True)
def _here(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))


@pytest.fixture(scope="session")
def whole(home, tmp_path_factory):
    """The run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    here = Path.cwd()
    os.chdir(home)
    try:
        return runner.run(parse(content()), folder)
    finally:
        os.chdir(here)


def same_weights(one, other):
    first, second = (read_checkpoint(path)["state_dict"] for path in (one, other))
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# Reading --------------------------------------------------------------------------------------------------------------


def test_a_python_tag_is_refused_and_not_executed(tmp_path):
    marker = tmp_path / "marker"
    text = f"description: !!python/object/apply:os.mkdir ['{marker}']"
    yaml.unsafe_load(text)
    assert marker.exists(), "the planted tag must work where it is allowed"
    marker.rmdir()
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"line 1.*python/object.*nothing was executed"):
        recipes.load(str(tmp_path / "r.yaml"))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmodel: a.B\nseed: 2", "line 3: the key 'seed' stands twice"),
        ("trainer: {devices: 1, devices: 2}", "line 1: the key 'devices' stands twice"),
        ("stages: [", "is not YAML"),
        ("a: &x [*x]", "line 1: .*recursive"),
        ("- 1", "holds list, not keys"),
        ("", "holds NoneType"),
        ("a: !!binary aGk=", "tag .*binary"),
    ],
)
def test_broken_yaml_is_told_with_its_line(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        recipes.load(str(tmp_path / "r.yaml"))


def test_yaml_values_are_json_types_and_exponents_are_numbers():
    found = parse_yaml("{a: 1e-3, b: 1, c: 2024-01-02, d: null, e: .5, f: 1.5e+2, g: true, h: e3}", "text")
    assert found == {"a": 1e-3, "b": 1, "c": "2024-01-02", "d": None, "e": 0.5, "f": 150.0, "g": True, "h": "e3"}
    assert json.loads(json.dumps(found)) == found


def test_a_file_wins_over_a_shipped_recipe_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes.load("digits-trp.yaml").seed == recipes.load("digits-trp").seed == 0
    (tmp_path / "digits-trp.yaml").write_text(yaml.safe_dump(content(seed=77)))
    assert recipes.load("digits-trp.yaml").seed == 77


def test_every_shipped_recipe_can_run_and_says_its_four_facts():
    names = recipes.shipped()
    assert {f"digits-{name}.yaml" for name in ("lowrank", "magnitude", "random", "trp")} <= set(names)
    assert {f"paper/{path.name}" for path in PAPERS} == {name for name in names if "/" in name}
    for name in (name for name in names if "/" not in name):
        recipe = recipes.load(name)
        checks.check(recipe)
        assert recipe.dense is not None
        assert parse(recipe.to_dict()) == recipe == parse(yaml.safe_load(recipe.to_yaml()))
        assert_four_facts(REPOSITORY / "recipes" / name)


def assert_four_facts(path):
    header = path.read_text().splitlines()[:4]
    for line, fact in zip(header, ("Run time", "Hardware", "Versions", "Accuracy"), strict=True):
        assert line.startswith(f"# {fact}: ")
        assert len(line) > len(f"# {fact}: ") + 5


PAPERS = sorted((REPOSITORY / "recipes" / "paper").glob("*.yaml"))


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_recipes_of_papers_ask_for_model_and_data_and_are_right_otherwise(path):
    assert_four_facts(path)
    with pytest.raises(RecipeError, match=r"the key 'model' is missing.*--model"):
        recipes.load(f"paper/{path.name}")
    given = [("model", "lightning_prune.demo.DigitsNet"), ("data", "lightning_prune.demo.DigitsData")]
    recipe = recipes.load(str(path), given)
    assert recipe.dense is not None
    for number, stage in enumerate(recipe.stages):
        assert len(checks.methods(stage, number)) == len(stage.methods)


def test_the_recipe_for_resnet18_takes_three_tenths_of_the_filters_that_the_paper_would():
    (path,) = (path for path in PAPERS if path.stem == "magnitude-resnet18")
    given = [("model", "lightning_prune.demo.DigitsNet"), ("data", "lightning_prune.demo.DigitsData")]
    (method,) = checks.methods(recipes.load(str(path), given).stages[1], 1)
    dense = resnet18(width=16)
    small, _ = compress(dense, method, torch.zeros(1, 3, 32, 32))
    widths = {
        name: (m.out_channels, small.get_submodule(name).out_channels)
        for name, m in dense.named_modules()
        if isinstance(m, nn.Conv2d)
    }
    changed = {name: after / before for name, (before, after) in widths.items() if after != before}
    assert changed == {f"layer{i}.1.conv1": pytest.approx(0.7, abs=0.04) for i in (1, 2, 3)}
    assert (
        sum(after for _, after in widths.values()) == sum(before for before, _ in widths.values()) - 34
    )  # of 112: 0.3, up


# Overrides and variables -----------------------------------------------------------------------------------------------


def assign(document, path, value):
    """The textbook twin of ``override``: walk and assign."""
    *way, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    for key in way:
        document = document[key]
    document[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 5),
        ("stages.1.methods.0.TRP.params", 0.4),
        ("stages.0.fit.max_epochs", 9),
        ("trainer.accelerator", "gpu"),
    ],
)
def test_override_equals_plain_assignment_and_leaves_its_argument(path, value):
    expected, before = content(), content()
    assign(expected, path, value)
    assert override(before, path, value) == expected
    assert before == content()


def test_override_makes_missing_mappings_and_refuses_dead_ends():
    assert override({"a": None}, "a.b.c", 1) == {"a": {"b": {"c": 1}}}
    for path, message in (
        ("stages.2.name", "list of 2.*0 to 1"),
        ("seed.x", "seed is 1"),
        ("a..b", "between its points"),
    ):
        with pytest.raises(RecipeError, match=message):
            override(content(), path, 0)


def test_overrides_reach_arguments_of_a_bare_class_path(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content()))
    recipe = recipes.load(str(tmp_path / "r.yaml"), [("model.init_args.width", "4"), ("seed", "3")])
    assert (recipe.model.init_args, recipe.seed) == ({"width": 4}, 3)
    other = recipes.load(str(tmp_path / "r.yaml"), [("model.init_args.width", "4"), ("model", "pkg.Other")])
    assert (other.model.class_path, other.model.init_args) == ("pkg.Other", {})


def test_variables_keep_their_type_alone_and_become_text_inside_text():
    document = {
        "variables": {"w": 3, "m": {"a": 1}},
        "x": ["${variables.w}", "n${variables.w}"],
        "y": {"z": "${variables.m}"},
    }
    assert interpolate(document) == {"variables": document["variables"], "x": [3, "n3"], "y": {"z": {"a": 1}}}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"variables": {"width": 1}, "x": "${variables.widht}"}, "no variable 'widht'. Did you mean 'width'"),
        ({"x": "${env.HOME}"}, "only .*variables.NAME"),
        ({"variables": {"a": "${variables.b}", "b": 1}}, "cannot refer"),
    ],
)
def test_a_reference_to_nothing_is_an_error(document, message):
    with pytest.raises(RecipeError, match=message):
        interpolate(document)


# Checks before anything runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sed", 1, "unknown key 'sed'. Did you mean 'seed'"),
        ("seed", -1, "seed is a whole number"),
        ("seed", True, "seed is a whole number"),
        ("stages", [], "at least one stage"),
        ("stages.0.nmae", "x", "unknown key 'stages.0.nmae'. Did you mean 'name'"),
        ("stages.1.name", "dense", "name of an earlier stage"),
        ("stages.1.name", "../x", "letters, digits"),
        ("stages.1.from", "dens", "no earlier stage 'dens'. Did you mean 'dense'"),
        ("stages.1.methods.0", {"TPR": {}}, "no method 'TPR'. Did you mean 'TRP'"),
        ("stages.1.methods.0", {"os.system": {}}, "no method 'os.system'"),
        ("stages.1.methods.0.TRP.parms", 0.5, "'stages.1.methods.0.TRP.parms'. Did you mean 'params'"),
        ("stages.1.methods.0.TRP.every_n_steps", "often", "every_n_steps is int; got 'often'"),
        ("stages.1.methods.0.TRP.params", 1.5, "stages.1.methods.0.TRP: .*1.5"),
        ("stages.1.fit.max_epoch", 1, "Did you mean 'max_epochs'"),
        ("trainer.callbacks", [], "trainer.callbacks cannot be set"),
        ("trainer.precision", "17", "trainer.precision is .*got '17'"),
        ("trainer.accelerator", "abacus", "Trainer.accelerator='abacus'.* is not possible"),
        ("model", "tinylit.NotLit", "no LightningModule"),
        ("model", "tinylit.Nett", "no class 'Nett'. Did you mean 'Net'"),
        ("model", "tinylitt.Net", "no module 'tinylitt'. Did you mean 'tinylit'"),
        ("model", "tinylit.Net()", "name such as pkg.mod.Class"),
        ("model", {"class_path": "tinylit.Net", "init_args": {"widht": 3}}, "Did you mean 'width'"),
        ("model", {"class_path": "tinylit.Net", "init_args": {"width": "wide"}}, "width is int; got 'wide'"),
        ("model", {"class_path": "tinylit.Net", "init_args": {"width": -1}}, "Net.width=-1.* failed"),
        ("data", "tinylit.Net", "no LightningDataModule"),
        ("stages.1.init_args.lrr", 1, "Did you mean 'lr'"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(tmp_path, path, value, message):
    with pytest.raises(RecipeError, match=message):
        runner.run(parse(override(content(), path, value)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("validate", "message"),
    [
        ({"max_drop": 0.1}, "needs a metric"),
        ({"metric": "acuracy"}, "no metric 'acuracy'. Did you mean 'accuracy'"),
        ({"metric": {"Accuracy": {"task": "binarry"}}}, "Accuracy.task='binarry'.* is not possible"),
        ({"min_speedup": 0}, "above 0"),
        ({"min_speedup": "fast"}, "min_speedup is .*'fast'"),
        ({"latency": {"runns": 3}}, "Did you mean 'runs'"),
        ({"latency": {"runs": 0}}, "at least 1"),
        ({"providr": "cpu"}, "Did you mean 'provider'"),
        ({"model": "x"}, "unknown key 'validate.model'"),
    ],
)
def test_gates_and_metrics_are_checked_before_training(tmp_path, validate, message):
    with pytest.raises(RecipeError, match=message):
        runner.run(parse(content(export={}, validate=validate)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal shows without CUDA")
@pytest.mark.parametrize(
    ("key", "blocks"),
    [
        ("validate.require_gpu", {"export": {}, "validate": {"require_gpu": True}}),
        ("export.provider", {"export": {"form": "fastest", "provider": "cuda"}}),
    ],
)
def test_a_missing_gpu_is_told_before_training(key, blocks, tmp_path):
    with pytest.raises(LightningPruneError, match=rf"{key}: A GPU is required"):
        runner.run(parse(content(**blocks)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_gate_without_a_dense_stage_is_refused():
    stages = [content()["stages"][1]]
    with pytest.raises(RecipeError, match="Add a stage without methods"):
        checks.check(parse(content(stages=stages, export={}, validate={"min_speedup": 1.1})))


def test_metrics_are_short_names_or_torchmetrics_classes():
    from torchmetrics.classification import BinaryF1Score

    assert objects.metric("accuracy", "metric") == "accuracy"
    found = objects.metric({"f1_score": {"task": "binary", "threshold": 0.25}}, "metric")
    if not isinstance(found, BinaryF1Score):
        found = objects.metric({"F1Score": {"task": "binary", "threshold": 0.25}}, "metric")
    assert isinstance(found, BinaryF1Score)
    assert found.threshold == 0.25


def test_plain_values_reach_their_target_unchanged():
    def target(share: float | int | None = None, many: float = 0.0, path: Path | None = None) -> None: ...

    found = objects.checked(target, {"share": 1000, "path": "a/b"}, "here")
    assert type(found["share"]) is int
    assert found == {"share": 1000, "path": Path("a/b")}


def test_the_reference_is_the_last_stage_before_the_first_method():
    stages = [{"name": name} for name in ("a", "b")]
    method = [{"LowRank": {"rank": 1}}]
    recipe = parse(content(stages=[*stages, {"name": "c", "methods": method}, {"name": "d"}]))
    assert recipe.dense is not None
    assert recipe.dense.name == "b"
    assert [stage.name for stage in recipe.lineage] == ["a", "b", "c", "d"]
    alone = parse(content(stages=[*stages, {"name": "c", "from": "scratch", "methods": method}]))
    assert alone.dense is not None
    assert alone.dense.name == "b"  # beside it, not on its way
    assert [stage.name for stage in alone.lineage] == ["c"]
    branch = parse(content(stages=[*stages, {"name": "c", "from": "a", "methods": method}]))
    assert branch.dense is not None
    assert branch.dense.name == "a"


# Running and going on ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_plan_recipe_summary_and_log(whole, home):
    folder = whole.folder
    checkpoint = read_checkpoint(folder / "stages" / "trp.ckpt")
    assert plan_in(checkpoint["state_dict"]) == whole.plan
    assert len(whole.plan) > 0
    assert checkpoint[CHECKPOINT_KEY]["recipe"] == parse(content()).to_dict()
    assert parse(yaml.safe_load((folder / "recipe.yaml").read_text())) == parse(content())
    assert "body.3" in (folder / "stages" / "trp.txt").read_text()
    assert (folder / "logs" / "trp" / "metrics.csv").is_file()
    assert not (folder / "checkpoints").exists()
    net = objects.model_class("tinylit.Net")
    small = load_from_checkpoint(net, folder / "stages" / "trp.ckpt")
    dense = load_from_checkpoint(net, folder / "stages" / "dense.ckpt", require_plan=False)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (small, dense)]
    assert sizes[0] <= 0.9 * sizes[1]
    assert (small.hparams.lr, dense.hparams.lr) == (0.01, 0.05)


class Stop(Exception):
    """What a test throws into a run."""


def test_what_a_method_has_to_show_stands_in_the_report_of_a_run_that_was_stopped_behind_it(
    home, tmp_path, monkeypatch
):
    stages = [
        {"name": "dense", "fit": {"max_epochs": 1}},
        {"name": "pfp", "fit": {"max_epochs": 1}, "methods": [{"PFP": {"params": 0.8, "align": 1}}]},
        {"name": "last", "fit": {"max_epochs": 1}},
    ]
    recipe = parse(content(stages=stages, export={}, validate={"provider": "cpu", "latency": {"runs": 3, "rounds": 2}}))
    real = Folder.finish

    def stop(folder, stage):
        real(folder, stage)
        if stage == "pfp":
            raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        recipes.run(recipe, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    report = recipes.resume(tmp_path / "run").report
    (exhibit,) = report.exhibits
    assert exhibit["title"] == "PFP, deterministic: what is guaranteed"
    assert [row["layer"] for row in exhibit["rows"]] == ["head"]
    assert "<td>head</td>" in (tmp_path / "run" / "report" / "report.html").read_text()


def stop_at(monkeypatch, stage, epoch):
    """Throw after the checkpoint of an epoch is written, before the next one begins."""

    def stop(self, trainer, module):
        lr = {"dense": 0.05, "trp": 0.01}[stage]
        if trainer.current_epoch == epoch and module.hparams.lr == lr:
            raise Stop

    monkeypatch.setattr(RandomState, "on_train_epoch_start", stop)


@pytest.mark.parametrize(("stage", "epoch"), [("dense", 0), ("dense", 2), ("trp", 0), ("trp", 2)])
def test_a_run_stopped_in_a_stage_ends_as_the_uninterrupted_one(whole, tmp_path, monkeypatch, stage, epoch):
    with monkeypatch.context() as patch:
        stop_at(patch, stage, epoch)
        with pytest.raises(Stop):
            runner.run(parse(content()), tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / stage / "last.ckpt"
    assert last.is_file() == (epoch > 0)
    outcome = runner.resume(tmp_path / "run")
    assert outcome.plan == whole.plan
    for name in ("dense", "trp"):
        same_weights(tmp_path / "run" / "stages" / f"{name}.ckpt", whole.folder / "stages" / f"{name}.ckpt")


@pytest.mark.parametrize("stage", ["dense", "trp"])
def test_a_run_stopped_before_a_finished_stage_is_noted_ends_as_the_uninterrupted_one(
    whole, tmp_path, monkeypatch, stage
):
    def stop(self, name, finish=Folder.finish):
        if name == stage:
            raise Stop
        finish(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "finish", stop)
        with pytest.raises(Stop):
            runner.run(parse(content()), tmp_path / "run")
    outcome = runner.resume(tmp_path / "run", parse(content()))
    assert outcome.plan == whole.plan
    same_weights(tmp_path / "run" / "stages" / "trp.ckpt", whole.folder / "stages" / "trp.ckpt")


def test_a_killed_process_leaves_a_folder_that_resumes_to_the_same_weights(whole, home, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content()))
    process = subprocess.run(
        [sys.executable, "-m", "lightning_prune", "run", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "run")],
        cwd=home,
        env={**os.environ, "KILL_AT": "0.01:1:2", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "run" / "state.json").read_text())["done"] == ["dense"]
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "trp" / "last.ckpt")["epoch"] == 0
    runner.resume(tmp_path / "run")
    same_weights(tmp_path / "run" / "stages" / "trp.ckpt", whole.folder / "stages" / "trp.ckpt")


def test_another_recipe_does_not_resume_and_nothing_changes(whole):
    before = (whole.folder / "state.json").read_text()
    changed = override(content(), "stages.1.methods.0.TRP.params", 0.5)
    with pytest.raises(RecipeError, match=r"stages.1.methods.0.TRP.params was 0.9 and is now 0.5"):
        runner.resume(whole.folder, parse(changed))
    assert (whole.folder / "state.json").read_text() == before


def test_a_folder_in_use_or_without_a_run_is_refused(whole, tmp_path):
    with pytest.raises(OptionError, match=r"not empty.*--resume"):
        runner.run(parse(content()), whole.folder)
    with pytest.raises(OptionError, match="no folder of a run"):
        runner.resume(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(OptionError, match="broken"):
        runner.resume(tmp_path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    import pytorch_lightning as pl

    from lightning_prune.recipe.folder import checkpoint_io

    plugin, path = checkpoint_io(pl), tmp_path / "x.ckpt"
    plugin.save_checkpoint({"a": torch.zeros(3)}, path)
    before = path.read_bytes()

    def full(data, target):
        Path(target).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OptionError, match=r"Cannot write.*x.ckpt.*disk full"):
        plugin.save_checkpoint({"a": torch.ones(3)}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("stages.1.methods.0.TRP.flops", "0.0001"), r"stages\.1\.methods: flops: at most .* asked for"),
        (("stages.1.methods.0.TRP.include", "nosuch"), r"stages\.1\.methods: include='nosuch' matches no layer"),
        (("stages.1.methods", "[{TRP: {flops: 0.5}}, {LowRank: {flops: 0.5}}]"), "would both compress layer"),
        (("export.opset", "99"), r"opset is a whole number from 17 to"),
    ],
)
def test_what_can_be_known_before_training_is_refused_before_training(change, message, tmp_path):
    recipe = recipes.load("digits-trp.yaml", [change])
    with pytest.raises(OptionError, match=message):
        recipes.run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
