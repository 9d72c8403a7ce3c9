"""Prunability and sensitivity from the command line: the numbers of the functions, one line for every mistake, files whole or absent."""

import json
import re
import sys

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.cli import main
from lightning_prune.cli.commands import NamedMetric
from lightning_prune.measure import prunability, sensitivity
from lightning_prune.methods.magnitude import lamp

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
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)

class Data(pl.LightningDataModule):
    def __init__(self, count: int = 32):
        super().__init__()
        self.count = count
    def loader(self, seed):
        x = torch.randn(self.count, 16, generator=torch.Generator().manual_seed(seed))
        return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8, shuffle=seed == 0)
    def train_dataloader(self):
        return self.loader(0)
    def test_dataloader(self):
        return self.loader(1)

class Untrained(pl.LightningDataModule):
    def test_dataloader(self):
        return Data().test_dataloader()
"""
CLASSES = "--model measured.Net --data measured.Data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a module and the checkpoint of a trained model."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "measured.py").write_text(LIT)
    sys.path.insert(0, str(folder))
    try:
        import measured

        pl.seed_everything(0, verbose=False)
        model = measured.Net()
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            max_epochs=30, accelerator="cpu", enable_model_summary=False, log_every_n_steps=1, **options
        )
        trainer.fit(model, measured.Data())
        trainer.save_checkpoint(folder / "dense.ckpt")
        yield folder
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("measured", None)


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def loaded(here):
    import measured

    return measured.Net.load_from_checkpoint(here / "dense.ckpt"), measured.Data()


def answer(words, capsys):
    assert main(words.split()) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("", {}),
        (
            "--beta 0.5 --abs-tol 0.01 --mode smallest_feasible",
            {"beta": 0.5, "abs_tol": 0.01, "mode": "smallest_feasible"},
        ),
        ("--criterion random --grid 0.5,0.1", {"criterion": "random", "grid": [0.5, 0.1]}),
        ("--criterion lamp --exclude second", {"criterion": lamp, "exclude": "second"}),
    ],
)
def test_prunability_is_that_of_the_function_on_the_training_data(words, options, here, capsys):
    found = answer(f"prunability dense.ckpt {CLASSES} {words} --json", capsys)
    model, data = loaded(here)
    expected = prunability(model, data.train_dataloader(), **options).to_dict()
    assert found.keys() == expected.keys()
    assert [p["loss"] for p in found["points"]] == pytest.approx([p["loss"] for p in expected["points"]], rel=1e-5)
    assert found["value"] == expected["value"]
    assert (found["samples"], found["criterion"]) == (32, expected["criterion"])


@pytest.mark.parametrize("units", ["weights", "channels"])
def test_sensitivity_is_that_of_the_function_on_the_test_data(units, here, capsys):
    found = answer(f"sensitivity dense.ckpt {CLASSES} --units {units} --shares 0.25,0.75 --json", capsys)
    model, data = loaded(here)
    expected = sensitivity(model, data.test_dataloader(), units=units, shares=[0.25, 0.75]).to_dict()
    assert [curve["name"] for curve in found["curves"]] == (["first", "second"] if units == "weights" else ["first"])
    for one, two in zip(found["curves"], expected["curves"], strict=True):
        assert one["values"] == pytest.approx(two["values"], rel=1e-5)


@pytest.mark.parametrize("words", ["accuracy", "Accuracy: {task: multiclass, num_classes: 3}"])
def test_a_metric_is_read_like_in_the_validation(words, here, capsys):
    assert main([*f"sensitivity dense.ckpt {CLASSES} --shares 0.9 --json --metric".split(), words]) == 0
    found = json.loads(capsys.readouterr().out)
    model, data = loaded(here)
    expected = sensitivity(model, data.test_dataloader(), metric=MulticlassAccuracy(3, average="micro"), shares=[0.9])
    assert found["dense"] == pytest.approx(expected.dense)
    assert [c["values"] for c in found["curves"]] == [pytest.approx(list(c.values)) for c in expected.curves]
    assert found["higher_is_better"] is True


def test_a_metric_where_less_is_better_says_so():
    found = sensitivity(
        nn.Linear(3, 1), [(torch.zeros(2, 3), torch.ones(2, 1))], metric=NamedMetric("mse"), shares=[0.5]
    )
    assert (found.measure, found.higher_is_better) == ("mse", False)


def test_arguments_of_the_classes_and_batches_are_taken(here, capsys):
    found = answer(f"prunability dense.ckpt {CLASSES} --data.init_args.count 24 --batches 2 --grid 0.5 --json", capsys)
    assert found["samples"] == 16
    found = answer(f"prunability dense.ckpt {CLASSES} --data.init_args.count 24 --grid 0.5 --json", capsys)
    assert found["samples"] == 24


@pytest.mark.parametrize("command", ["prunability", "sensitivity"])
def test_a_table_and_a_picture(command, here, tmp_path, capsys):
    assert main([*f"{command} dense.ckpt {CLASSES} --picture".split(), str(tmp_path / "new" / "p.png")]) == 0
    out = capsys.readouterr().out
    assert "first" in out
    assert out.splitlines()[-1] == str(tmp_path / "new" / "p.png")
    assert (tmp_path / "new" / "p.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["p.png"]


@pytest.mark.parametrize("command", ["prunability", "sensitivity"])
def test_help_has_examples(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"examples:\n  lightning-prune {command} " in capsys.readouterr().out


MISTAKES = {
    "no data": ("prunability dense.ckpt --model measured.Net", "Missing: data"),
    "missing checkpoint": (f"prunability no.ckpt {CLASSES}", "'no.ckpt' is missing"),
    "unknown option": (f"prunability dense.ckpt {CLASSES} --bta 1", "'--bta'.*Did you mean '--beta'"),
    "beta of wrong type": (f"prunability dense.ckpt {CLASSES} --beta much", "--beta is a number; got 'much'"),
    "beta out of range": (f"prunability dense.ckpt {CLASSES} --beta -1", "beta=-1.0: give a number of at least 0"),
    "unknown mode": (f"prunability dense.ckpt {CLASSES} --mode last", "mode='last'"),
    "unknown criterion": (f"prunability dense.ckpt {CLASSES} --criterion size", "criterion='size'"),
    "grid of words": (f"prunability dense.ckpt {CLASSES} --grid a,b", "--grid are numbers.*'a,b'"),
    "grid out of range": (f"prunability dense.ckpt {CLASSES} --grid 2", "grid=2.0"),
    "batches": (f"prunability dense.ckpt {CLASSES} --batches 0", "batches=0"),
    "no layer": (f"prunability dense.ckpt {CLASSES} --include frist", "'frist' matches no layer.*'first'"),
    "no training data": ("prunability dense.ckpt --model measured.Net --data measured.Untrained", "no train_dataloader"),
    "picture over a folder": (f"prunability dense.ckpt {CLASSES} --picture .", "name of a PNG file"),
    "picture of another kind": (f"sensitivity dense.ckpt {CLASSES} --picture p.pdf", "name of a PNG file.*'p.pdf'"),
    "picture not writable": (f"sensitivity dense.ckpt {CLASSES} --picture /proc/no/p.png", "Cannot write '/proc/no"),
    "unknown units": (f"sensitivity dense.ckpt {CLASSES} --units filters", "units='filters'"),
    "share out of range": (f"sensitivity dense.ckpt {CLASSES} --shares 0.5,-1", "shares=-1.0"),
    "unknown metric": (f"sensitivity dense.ckpt {CLASSES} --metric acuracy", "Did you mean 'accuracy'"),
    "checkpoint of another width": (f"sensitivity dense.ckpt {CLASSES} --model.init_args.width 8", "first"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_exit_code_2_and_nothing_written(here, capfd, name):
    words, message = MISTAKES[name]
    before = {path for path in here.rglob("*") if "__pycache__" not in path.parts}
    assert main(words.split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("lightning-prune: ")
    assert re.search(message, err), err
    assert {path for path in here.rglob("*") if "__pycache__" not in path.parts} == before
