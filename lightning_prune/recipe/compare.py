"""Run several recipes under several seeds and put what they reach side by side.

Every cell (a recipe under a seed) is an ordinary run in a folder of its own, so a comparison that was stopped goes on inside the cell that was
stopped. The dense model of a seed is trained once; every cell of that seed starts from a copy of it, which makes the comparison paired.

Layout of the folder: ``cells/LABEL/seed-N/`` per cell, the folder of a run with its figures in ``cell.json``; ``compare.json``, there from the
start and complete after every cell; ``compare.md``, ``compare.html`` and ``pareto.png`` at the end. What a cell prints goes to its ``output.txt``.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_prune._lightning import package_of
from lightning_prune.errors import ExportError, LightningPruneError, OptionError
from lightning_prune.files import whole_file, write_text
from lightning_prune.recipe import compare_page, objects, runner
from lightning_prune.recipe.bar import Bar
from lightning_prune.recipe.before import Snapshot, has_moment, metric_before
from lightning_prune.recipe.folder import Folder
from lightning_prune.recipe.results import Cell, Comparison, cell_name
from lightning_prune.recipe.schema import Recipe
from lightning_prune.recipe.trials import Trial, check, dense_stages, trials
from lightning_prune.recipe.words import one_line

log = logging.getLogger(__name__)

_FIGURES = "cell.json"
_ENDS = (".ckpt", ".txt")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a comparison runs.

    Attributes:
        seeds: The seeds of every recipe.
        keep_going: Whether a cell that fails is noted and the next one runs, instead of stopping there.
        command: The command line, for the report.
        progress: Whether to show a bar over the cells on the error stream.
    """

    seeds: Sequence[int] = (0, 1, 2)
    keep_going: bool = False
    command: str = ""
    progress: bool = False


def compare(recipes: Sequence[tuple[str, Recipe]], folder: Path, settings: Settings) -> tuple[Comparison, Path]:
    """Run every recipe under every seed, except for cells that are finished in the folder already, and report.

    Args:
        recipes: The name that each was given by, and the recipe.
        folder: Where to write: missing, empty, or that of a comparison of the same recipes.
        settings: Seeds, and what to do when a cell fails.

    Returns:
        What was found, and the report as a file to open.

    Raises:
        LightningPruneError: If the recipes cannot be compared or the folder is in use, before anything is trained; or if a cell fails, with its
            name.
    """
    rows, notes = trials(recipes)
    with runner.modest_noise():
        check(rows, settings.seeds[0])
    folder = folder.absolute()
    _check_folder(folder, rows, settings.seeds)
    found = _empty(rows, notes, settings)
    compare_page.save_data(found, folder)
    pairs = [(row, seed) for seed in settings.seeds for row in rows]
    with Bar(len(pairs), settings.progress) as bar:
        for number, (row, seed) in enumerate(pairs, 1):
            log.info("Cell %d of %d: %s", number, len(pairs), cell_name(row.label, seed))
            bar.begin(cell_name(row.label, seed))
            found.cells.append(_cell(folder, row, rows[0], seed, bar, settings.keep_going))
            compare_page.save_data(found, folder)
            bar.advance()
    return found, compare_page.save(found, folder)


def cell_folder(folder: Path, label: str, seed: int) -> Path:
    """Return where the run of a cell stands."""
    return folder / "cells" / label / f"seed-{seed}"


def _empty(rows: Sequence[Trial], notes: Sequence[str], settings: Settings) -> Comparison:
    silent = [row.label for row in rows if row.kind != "dense" and not has_moment(row.recipe)]
    gradual = [
        f"{label} has no figure before fine-tuning: it compresses while it trains, and nothing fine-tunes it afterwards."
        for label in silent
    ]
    return Comparison(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=settings.command,
        seeds=list(settings.seeds),
        trials=[{"label": row.label, "kind": row.kind, "recipe": row.recipe.to_dict()} for row in rows],
        notes=[*notes, *gradual],
    )


def _check_folder(folder: Path, rows: Sequence[Trial], seeds: Sequence[int]) -> None:
    """Refuse a folder that holds something else, or cells of other recipes.

    Raises:
        OptionError: With the first difference.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"Output folder {str(folder)!r} is a file. Give the name of a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "compare.json").is_file():
        raise OptionError(
            f"Output folder {str(folder)!r} is not empty and holds no comparison. Choose another --output."
        )
    for row in rows:
        for seed in seeds:
            path = cell_folder(folder, row.label, seed)
            if (path / "state.json").is_file():
                Folder.reopen(path, row.seeded(seed))


def _cell(folder: Path, row: Trial, dense: Trial, seed: int, bar: Bar, keep_going: bool) -> Cell:
    """Return the record of a cell, from disk or by running it.

    Raises:
        LightningPruneError: If it fails and nothing is to be kept going; other errors of the training code get the cell's name as a note.
    """
    path = cell_folder(folder, row.label, seed)
    known = _finished(path)
    if known is not None:
        return known
    package = package_of(objects.model_class(row.recipe.model.class_path))
    refusals = (LightningPruneError, *objects.USER_ERRORS, package.utilities.exceptions.MisconfigurationException)
    try:
        return _run(folder, row, dense, seed, bar)
    except refusals as error:
        reason = str(error) if isinstance(error, LightningPruneError) else one_line(error)
        if keep_going:
            log.warning("Cell %s failed: %s", cell_name(row.label, seed), reason)
            return Cell(row.label, seed, str(path.relative_to(folder)), failure=" ".join(reason.split()))
        advice = f"Finished cells are kept: start again with --output {folder}, or add --keep-going to go on without this one."
        if isinstance(error, LightningPruneError):
            raise type(error)(f"Cell {cell_name(row.label, seed)}: {error} {advice}") from error
        error.add_note(f"This happened in cell {cell_name(row.label, seed)}. {advice}")
        raise


def _finished(path: Path) -> Cell | None:
    """Read the record of a finished cell; None if it is not finished."""
    if not (path / "state.json").is_file():
        return None
    try:
        return Cell(**json.loads((path / _FIGURES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there, or of another version: it is measured again
        return None


def _run(folder: Path, row: Trial, dense: Trial, seed: int, bar: Bar) -> Cell:
    """Run a cell, or go on with it, and leave its record.

    Raises:
        LightningPruneError: If it fails.
    """
    path, recipe = cell_folder(folder, row.label, seed), row.seeded(seed)
    if not (path / "state.json").is_file():
        source = cell_folder(folder, dense.label, seed) if row is not dense else None
        _prepare(path, recipe, source, [stage.name for stage in dense.recipe.stages])
    with (path / "output.txt").open("a", encoding="utf-8") as output, contextlib.redirect_stdout(output):
        report = runner.resume(path, recipe, callbacks=[Snapshot(path), bar.callback()], progress=False).report
    assert report is not None, "recipes without a validation are refused"
    if not report.passed:
        raise ExportError(f"The validation failed: {'; '.join(report.failures)}.")
    before = metric_before(path, recipe) if row is not dense else None
    compact = report.models["compact"]
    cell = Cell(
        trial=row.label,
        seed=seed,
        folder=str(path.relative_to(folder)),
        metric=float(compact["metric"]),
        before=before,
        flops=compact["flops"],
        params=compact["parameters"],
        latency=[_pace(entry) for entry in report.latency],
        metric_name=(report.metric or {})["name"],
        higher_is_better=(report.metric or {})["higher_is_better"],
        machine=report.machine,
    )
    write_text(path / _FIGURES, json.dumps(dataclasses.asdict(cell), indent=1) + "\n")
    return cell


def _prepare(path: Path, recipe: Recipe, source: Path | None, names: Sequence[str]) -> None:
    """Make the folder of a run; with a source, its dense stages are done already and its dense file is exported.

    Raises:
        LightningPruneError: If they are not finished in the source.
    """
    done: list[str] = []
    if source is not None:
        finished = Folder.reopen(source).done if (source / "state.json").is_file() else []
        if list(names) != finished:
            raise LightningPruneError("Its dense model was not trained: that cell failed.")
        done = [stage.name for stage in dense_stages(recipe)]
        stages = {
            f"stages/{name}{end}": f"stages/{own}{end}" for name, own in zip(names, done, strict=True) for end in _ENDS
        }
        weights = {file.name: file.name for file in source.glob("small-*.data")}  # of a file beyond 2 GB
        exported = {"small.onnx": "dense.onnx"} if (source / "small.onnx").is_file() else {}
        for name, own in (stages | weights | exported).items():
            with whole_file(path / own) as beside:
                shutil.copyfile(source / name, beside)
    write_text(path / "recipe.yaml", recipe.to_yaml())
    Folder(path, recipe, done).save()


def _pace(entry: dict[str, Any]) -> dict[str, Any]:
    """Return batch size, median latency in ms and speed-up; where there is no dense file beside it, it is the dense file."""
    speedup = entry["speedup"]
    interval = {"low": speedup["low"], "high": speedup["high"]} if speedup else {}
    return {
        "batch": entry["batch"],
        "p50": entry["compact"]["p50"],
        "speedup": speedup["median"] if speedup else 1.0,
        **interval,
    }
