"""A fit that is killed at any step and resumed from its last epoch-boundary checkpoint ends bit for bit as the uninterrupted one."""

import copy
import json
import random
from pathlib import Path

import pytest
import torch
from lit import LitNet, loader, trainer
from toys import KINDS, NAMES, make

from lightning_prune import load_from_checkpoint

EPOCHS = 4
SETTINGS = {
    "SGD": {"net": {"optimizer": "SGD", "dropout": 0.3}},
    "Adam": {"net": {"optimizer": "Adam", "dropout": 0.3, "lr": 0.01}},
    "half-epoch validation": {"net": {"optimizer": "SGD", "dropout": 0.3}, "val_check_interval": 0.5},
}


def last_boundary(folder: Path, steps: int) -> Path | None:
    """Return the newest checkpoint written at the end of an epoch of that many optimizer steps."""
    by_step = {int(path.stem.partition("step=")[2].partition("-")[0]): path for path in folder.glob("*.ckpt")}
    whole = [step for step in by_step if step % steps == 0]
    return by_step[max(whole)] if whole else None


def metrics(folder: Path) -> dict[tuple[int, str], str]:
    """Return what was logged, the last word on every step."""
    told = {}
    for line in (folder / "lines.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        told.update({(step, name): value for name, value in row.items()})
    return told


def assert_same(one, other):
    assert one["plan"] == other["plan"]
    flat = [torch.utils._pytree.tree_flatten((r["weights"], r["optimizers"]))[0] for r in (one, other)]
    assert len(flat[0]) == len(flat[1])
    for a, b in zip(*flat, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def check(run_jobs, folder: Path, method: str, setting: dict, kills: list[int], count: int) -> None:
    options = {"method": method, "accumulate_grad_batches": 2, "epochs": EPOCHS, "count": count, **setting}
    jobs = [{"call": "fit", "with": {"folder": str(folder / "through"), "out": str(folder / "through.pt"), **options}}]
    jobs += [{"call": "fit", "with": {"folder": str(folder / f"{k}"), "kill_at": k, **options}} for k in kills]
    for name in ("through", *map(str, kills)):
        (folder / name).mkdir()
    codes, text = run_jobs(jobs)
    assert codes[0] == 0, text
    assert codes[1:] == [-9] * len(kills), text
    resumed = []
    for k in kills:
        start = last_boundary(folder / f"{k}", count // 32)  # batches of 16, accumulation 2
        resume = {"resume": None if start is None else str(start), "out": str(folder / f"{k}.pt")}
        resumed.append({"call": "fit", "with": {"folder": str(folder / f"{k}"), **resume, **options}})
    codes, text = run_jobs(resumed)
    assert codes == [0] * len(kills), text
    expected = torch.load(folder / "through.pt", weights_only=True)
    for k in kills:
        assert_same(torch.load(folder / f"{k}.pt", weights_only=True), expected)
        assert metrics(folder / f"{k}") == metrics(folder / "through")


def cases():
    """Return every kind of method with Adam, those that act while the model trains in every setting; the rest is left to the exhaustive run."""
    for kind in KINDS:
        (method,) = kind.values
        for setting in SETTINGS:
            rare = setting != "Adam" and not make(method).gradual
            yield pytest.param(method, setting, marks=[*kind.marks, *([pytest.mark.exhaustive] if rare else [])])


@pytest.mark.parametrize(("method", "setting"), [*cases()])
def test_killed_and_resumed_equals_uninterrupted(run_jobs, tmp_path, method, setting):
    check(run_jobs, tmp_path, method, SETTINGS[setting], [1, 2, 5], count=64)  # 2 steps per epoch


@pytest.mark.exhaustive
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", NAMES)
def test_killed_at_20_random_steps_and_resumed_equals_uninterrupted(run_jobs, tmp_path, method, setting):
    check(run_jobs, tmp_path, method, SETTINGS[setting], sorted(random.Random(7).sample(range(1, 40), 20)), count=320)


@pytest.mark.parametrize("method", NAMES)
def test_a_model_takes_the_state_that_it_its_copy_and_its_file_give(method, tmp_path):
    model = LitNet()
    run = trainer(tmp_path, callbacks=[make(method)])
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "small.ckpt")
    read = load_from_checkpoint(LitNet, tmp_path / "small.ckpt")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for giver in (model, copy.deepcopy(model), read):
        for taker in (model, copy.deepcopy(model), read):
            taker.load_state_dict(giver.state_dict())
            assert all(torch.equal(value, state[key]) for key, value in taker.state_dict().items())
