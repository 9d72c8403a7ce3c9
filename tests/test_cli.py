"""The command line: exit codes, one line for every mistake, nothing written."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import lit
import pytest
import torch
import yaml
from torch import nn

from lightning_prune import KFE, MPO, LowRank, cli, compress
from lightning_prune.cli import commands, main
from lightning_prune.cli.commands import count_parameters
from lightning_prune.cli.parser import split_overrides
from lightning_prune.errors import BudgetError, OptionError

REPOSITORY = Path(__file__).resolve().parent.parent

LIT = """
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    def __init__(self, width: int = 16):
        super().__init__()
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(2, 16)
        self.first, self.second = nn.Linear(16, width), nn.Linear(width, 3)
    def forward(self, x):
        return self.second(self.first(x).relu())
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)

class Slow(Net):
    def training_step(self, batch, batch_idx):
        import pathlib, time
        pathlib.Path("training").touch()
        time.sleep(0.05)
        return super().training_step(batch, batch_idx)

class Plain:
    pass

class Data(pl.LightningDataModule):
    def __init__(self, features: int = 16):
        super().__init__()
        self.features = features
    def loader(self):
        x = torch.randn(32, self.features, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8)
    train_dataloader = test_dataloader = loader
"""

STAGES = [
    {"name": "dense", "fit": {"max_epochs": 1}},
    {
        "name": "small",
        "fit": {"max_epochs": 1},
        "methods": [{"LowRank": {"rank": 4, "align": 1, "include": ["first"]}}],
    },
]
QUICK = {"runs": 3, "rounds": 1, "warmup": 1}


def document(**changes):
    recipe = {
        "model": "clilit.Net",
        "data": "clilit.Data",
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
        "stages": STAGES,
        "validate": {"metric": "accuracy", "provider": "cpu", "latency": QUICK},
    }
    return {**recipe, **changes}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with a module, a recipe, the result of running it, and broken files."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "clilit.py").write_text(LIT)
    (folder / "raises.py").write_text("value = missing_name\n")
    (folder / "syntax.py").write_text("x = (\n")
    (folder / "needs.py").write_text("import a_library_that_is_not_there\n")
    (folder / "r.yaml").write_text(yaml.safe_dump(document()))
    (folder / "text.ckpt").write_text("no checkpoint")
    (folder / "text.onnx").write_text("no model")
    (folder / "broken.yaml").write_text("a: [")
    (folder / "tag.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{folder / 'executed'}']")
    here = Path.cwd()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        assert main(["run", "r.yaml", "--output", "run"]) == 0
        whole = (folder / "run" / "stages" / "small.ckpt").read_bytes()
        (folder / "half.ckpt").write_bytes(whole[: len(whole) // 2])
        half = (folder / "run" / "small.onnx").read_bytes()
        (folder / "half.onnx").write_bytes(half[: len(half) // 2])
        torch.save({"state_dict": {}, "model": nn.Linear(1, 1)}, folder / "pickled.ckpt")
        from lightning_prune.export import export_onnx

        export_onnx(nn.Linear(7, 3), folder / "other.onnx", torch.zeros(2, 7))
        yield folder
    finally:
        os.chdir(here)
        sys.path.remove(str(folder))


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


# Each mistake: what is called, and what the one line must say.
MISTAKES = {
    "no command": ("", "command is missing"),
    "unknown command": ("rum r.yaml", "'rum'. Did you mean 'run'"),
    "unknown option": ("inspect run/small.onnx --jsn", "'--jsn'.*Did you mean '--json'"),
    "required option": ("export x.ckpt", "Missing: .*model.*output"),
    "option of wrong type": (
        "export x.ckpt --model a.B --output y.onnx --opset new",
        "--opset is a whole number; got 'new'",
    ),
    "option without value": ("run r.yaml --seed", "--seed needs a value"),
    "no recipe": ("run", "needs a recipe.*digits-trp.yaml"),
    "missing recipe": ("run digits-tpr.yaml", "no such file.*Did you mean 'digits-trp.yaml'"),
    "folder for a recipe": ("run run", "'run' is a folder"),
    "broken yaml": ("run broken.yaml", "not YAML"),
    "python tag": ("run tag.yaml", "os.mkdir.*nothing was executed"),
    "unknown key": ("run r.yaml --sed 3", "unknown key 'sed'. Did you mean 'seed'"),
    "value out of range": ("run r.yaml --stages.1.methods.0.LowRank.rank 0", "rank"),
    "value of wrong type": ("run r.yaml --stages.1.methods.0.LowRank.rank many", "rank is .*'many'"),
    "unknown method": ("run r.yaml --stages.1.methods.0 LowRnk", "'LowRnk'. Did you mean 'LowRank'"),
    "unknown module": ("run r.yaml --model clilti.Net", "'clilti'. Did you mean 'clilit'"),
    "unknown metric": ("run r.yaml --validate.metric acuracy", "'acuracy'. Did you mean 'accuracy'"),
    "not a LightningModule": ("run r.yaml --model clilit.Plain", "clilit.Plain is no LightningModule"),
    "not a DataModule": ("run r.yaml --data clilit.Net", "no LightningDataModule"),
    "module that raises": ("run r.yaml --model raises.Net", "NameError: .*missing_name.*raises.py, line 1"),
    "module with a syntax error": ("run r.yaml --model syntax.Net", "SyntaxError: .*syntax.py, line 1"),
    "module that needs another": ("run r.yaml --model needs.Net", "ModuleNotFoundError: .*a_library_that_is_not_there"),
    "output not empty": ("run r.yaml --output run", "not empty.*--resume"),
    "output is a file": ("run r.yaml --output r.yaml", "'.*r.yaml' is a file"),
    "output not writable": ("run r.yaml --output /proc/nowhere", "Cannot write '/proc/nowhere"),
    "resume of nothing": ("run --resume .", "no folder of a run"),
    "resume with another recipe": ("run r.yaml --resume run --seed 8", "seed was 0 and is now 8"),
    "missing checkpoint": ("inspect nothing.ckpt", "'nothing.ckpt' is missing"),
    "folder for a checkpoint": ("inspect run", "'run' is a folder"),
    "text for a checkpoint": ("inspect text.ckpt", "Checkpoint 'text.ckpt' "),
    "truncated checkpoint": ("export half.ckpt --model clilit.Net --output new.onnx", "'half.ckpt' is truncated"),
    "pickled code": ("export pickled.ckpt --model clilit.Net --output new.onnx", "pickled code, which is never run"),
    "checkpoint without a plan": (
        "export run/stages/dense.ckpt --model clilit.Net --output new.onnx",
        "no plan.*--dense",
    ),
    "plan of another model": (
        "export run/stages/small.ckpt --model clilit.Net --model.init_args.width 8 --output new.onnx",
        "another model.*module 'first'",
    ),
    "model argument of wrong type": (
        "export run/stages/small.ckpt --model clilit.Net --model.init_args.width x --output new.onnx",
        "--model.init_args.width is int; got 'x'",
    ),
    "argument without its class": (
        "validate run/small.onnx --data clilit.Data --model.init_args.width 8",
        "Give --model",
    ),
    "export over a folder": ("export run/stages/small.ckpt --model clilit.Net --output run", "'run': it is a folder"),
    "missing onnx": ("validate nothing.onnx --data clilit.Data", "no ONNX file 'nothing.onnx'"),
    "text for onnx": ("inspect text.onnx", "'text.onnx' is no whole ONNX file|'text.onnx' holds no ONNX"),
    "truncated onnx": ("validate half.onnx --data clilit.Data", "'half.onnx'"),
    "onnx with other inputs": ("validate run/small.onnx --reference other.onnx --data clilit.Data", "other.onnx"),
    "data with other inputs": ("validate run/small.onnx --data clilit.Data --data.init_args.features 5", "5"),
    "onnx without a plan": ("inspect other.onnx", "carries no plan"),
    "checkpoint without model": ("validate run/small.onnx --data clilit.Data --checkpoint a.ckpt", "belong together"),
    "batch sizes": ("validate run/small.onnx --data clilit.Data --batch-sizes 1,x", "such as 1,16; got '1,x'"),
    "report over a file": ("validate run/small.onnx --data clilit.Data --output r.yaml", "is a file"),
    "gate without reference": ("validate run/small.onnx --data clilit.Data --min-speedup 2", "reference"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_exit_code_2_and_nothing_written(here, capfd, name):
    words, message = MISTAKES[name]
    before = files(here)
    assert main(words.split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("lightning-prune: ")
    assert "Traceback" not in err
    assert re.search(message, err), err
    assert files(here) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal shows without CUDA")
def test_require_gpu_without_one_is_exit_code_2(here, capfd):
    assert main(["validate", "run/small.onnx", "--data", "clilit.Data", "--require-gpu", "--output", "no"]) == 2
    assert "GPU is required" in capfd.readouterr().err
    assert not (here / "no").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal shows without CUDA")
def test_fastest_on_cuda_without_one_is_exit_code_2(here, capfd):
    words = "export run/stages/small.ckpt --model clilit.Net --output no.onnx --form fastest --provider cuda"
    assert main(words.split()) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "provider='cuda', but CPUExecutionProvider is what ran" in line
    assert not (here / "no.onnx").exists()


def test_an_impossible_budget_names_the_layers(here, capfd, tmp_path):
    words = ["run", "r.yaml", "--stages.1.methods.0", "LowRank: {params: 0.01}", "--output", str(tmp_path / "run")]
    assert main(words) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "first" in line
    assert not (tmp_path / "run").exists()  # known from the layers' shapes, before anything is trained


def test_run_writes_checkpoints_files_and_a_report_with_the_recipe(made):
    run = made / "run"
    names = {"recipe.yaml", "state.json", "dense.onnx", "small.onnx", "stages/small.ckpt", "report/report.html"}
    assert all((run / name).is_file() for name in names)
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["passed"]
    assert report["extra"]["recipe"]["stages"][1]["methods"] == [{"LowRank": STAGES[1]["methods"][0]["LowRank"]}]
    assert {"torch", "dense", "compact"} <= set(report["models"])


def test_a_missed_gate_is_exit_code_1_and_the_report_is_kept(here, capfd, tmp_path):
    words = "validate run/small.onnx --reference run/dense.onnx --data clilit.Data --min-speedup 1000 --provider cpu --output"
    assert main([*words.split(), str(tmp_path / "report")]) == 1
    out = capfd.readouterr().out
    assert out.splitlines()[-1] == str(tmp_path / "report" / "report.html")
    assert not json.loads((tmp_path / "report" / "report.json").read_text())["passed"]


def test_validate_passes_and_compares_with_torch(here, capfd, tmp_path):
    words = "validate run/small.onnx --reference run/dense.onnx --data clilit.Data --max-drop 1 --provider cpu --model clilit.Net"
    words += f" --checkpoint run/stages/small.ckpt --output {tmp_path / 'report'}"
    assert main(words.split()) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["metric"]["name"] == "accuracy"
    assert report["models"]["torch"]["metric"] == report["models"]["compact"]["metric"]


def test_export_writes_the_model_of_the_checkpoint(here, capfd, tmp_path):
    small, dense = tmp_path / "small.onnx", tmp_path / "dense.onnx"
    words = f"export run/stages/small.ckpt --model clilit.Net --data clilit.Data --opset 20 --output {small}"
    assert main(words.split()) == 0
    out = capfd.readouterr().out
    assert out.splitlines()[-1] == str(small)
    assert out.startswith("195 parameters, 195 numbers in the file, ")
    assert main(f"export run/stages/dense.ckpt --model clilit.Net --dense --output {dense}".split()) == 0
    from lightning_prune.export import open_session

    x = torch.randn(4, 16)
    session = open_session(dense, "cpu")
    state = torch.load(here / "run/stages/dense.ckpt", weights_only=True)["state_dict"]
    hidden = torch.relu(x @ state["first.weight"].T + state["first.bias"])
    expected = hidden @ state["second.weight"].T + state["second.bias"]
    found = next(iter(session.run({session.inputs[0].name: x.numpy()}).values()))
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["run/stages/small.ckpt", "run/small.onnx"])
def test_inspect_counts_what_the_layers_have(here, capfd, name):
    assert main(["inspect", name, "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["dense"]["parameters"] == 16 * 16 + 16 + 16 * 3 + 3
    assert facts["parameters"] == 16 * 4 + 4 * 16 + 16 + 16 * 3 + 3
    assert facts["layers"][0]["layer"] == "first"
    assert main(["inspect", name]) == 0
    assert "195 parameters of 323 (60.4%)" in capfd.readouterr().out


@pytest.mark.parametrize(
    "method",
    [LowRank(flops=0.6, align=1), KFE(flops=0.5, align=1), KFE(flops=0.5, separable=True), MPO(params=0.5)],
    ids=["LowRank", "KFE", "KFE-separable", "MPO"],
)
def test_parameters_are_counted_from_a_file_whatever_replaced_the_layers(method):
    net, data = lit.body(), list(lit.loader(32))
    loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    small, plan = compress(net, method, data[0][0][:2], data, loss)
    assert count_parameters(small.state_dict(), plan) == sum(p.numel() for p in small.parameters())


def test_help_has_examples_and_exits_with_0(capsys):
    for command in ([], ["run"], ["export"], ["validate"], ["inspect"], ["compare"]):
        assert main([*command, "--help"]) == 0
        assert "examples:\n  lightning-prune " in capsys.readouterr().out
    assert main(["--version"]) == 0


def test_overrides_are_split_from_options():
    kept, overrides = split_overrides(
        ["r.yaml", "--output", "o", "--trainer.devices=2", "--seed", "-3", "--resume=x", "--a", "b=c"], "run"
    )
    assert kept == ["r.yaml", "--output", "o", "--resume=x"]
    assert overrides == [("trainer.devices", "2"), ("seed", "-3"), ("a", "b=c")]
    kept, overrides = split_overrides(["x", "--data", "m.D", "--data.init_args.n", "3", "--modle.x", "1"], "validate")
    assert kept == ["x", "--data", "m.D", "--modle.x", "1"]
    assert overrides == [("data.init_args.n", "3")]
    with pytest.raises(OptionError, match="--seed needs a value"):
        split_overrides(["--seed", "--output", "o"], "run")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BudgetError("Two\nlines."), 2),
        (OSError(errno.ENOSPC, "No space left on device", "/x/metrics.csv"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_exit_codes(monkeypatch, capsys, error, code):
    def command(options, overrides):
        raise error

    monkeypatch.setitem(cli._COMMANDS, "inspect", command)
    assert main(["inspect", "x"]) == code
    assert capsys.readouterr().err.strip().count("\n") == 0


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), OSError(errno.EIO, "I/O error")])
def test_mistakes_of_ours_keep_their_traceback(monkeypatch, error):
    def command(options, overrides):
        raise error

    monkeypatch.setitem(cli._COMMANDS, "inspect", command)
    with pytest.raises(type(error)):
        main(["inspect", "x"])


def test_the_default_folder_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commands._free_folder("a/digits-trp.yaml") == "runs/digits-trp"
    (tmp_path / "runs" / "digits-trp").mkdir(parents=True)
    assert commands._free_folder("digits-trp") == "runs/digits-trp-2"


def test_ctrl_c_tells_how_to_go_on(made, tmp_path):
    (tmp_path / "clilit.py").write_text(LIT)
    slow = document(model="clilit.Slow", stages=[{"name": "dense", "fit": {"max_epochs": 500}}], export=None)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(slow))
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_prune", "run", "r.yaml", "--output", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - background jobs inherit it ignored
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "training").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "Interrupted. Go on with: lightning-prune run --resume out"
    assert "Traceback" not in err
