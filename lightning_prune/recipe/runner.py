"""Run a recipe: stage by stage, export, validate; and go on where a run was stopped.

Every stage is one ``Trainer.fit`` of the Lightning package that the model belongs to, with the methods as callbacks. It starts from the file that
an earlier stage left, never from an object in memory, so a resumed run and an uninterrupted one do the same.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_prune._lightning import PACKAGES, package_of
from lightning_prune.checkpoint import load_from_checkpoint
from lightning_prune.errors import RecipeError
from lightning_prune.files import write_text
from lightning_prune.recipe import checks, objects
from lightning_prune.recipe.folder import Folder, Provenance, RandomState, checkpoint_io
from lightning_prune.recipe.schema import SCRATCH, Recipe, Stage
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.plan import Plan

if TYPE_CHECKING:
    from lightning_prune.export import Report

log = logging.getLogger(__name__)

_FOLDER_VARIABLE = (
    "LIGHTNING_PRUNE_RUN_FOLDER"  # tells the processes that a distributed Trainer launches where the first one writes
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run left.

    Attributes:
        folder: The output folder.
        plan: What was done to the model.
        report: The validation; None if the recipe has none.
        page: The report as a file to open; None likewise.
    """

    folder: Path
    plan: Plan
    report: "Report | None" = None
    page: Path | None = None


def run(recipe: Recipe, folder: str | os.PathLike[str]) -> Outcome:
    """Run a recipe from its beginning.

    Args:
        recipe: What to do.
        folder: Where to write; missing or empty.

    Returns:
        What the run left; a missed gate is told by ``report.passed``.

    Raises:
        LightningPruneError: If the recipe, the model or the folder does not allow it; nothing is written unless training began.
    """
    with modest_noise():
        checks.check(recipe)
        if not _is_first_process():
            return _run(Folder.reopen(Path(os.environ[_FOLDER_VARIABLE]), recipe))
        return _run(Folder.create(Path(folder).absolute(), recipe))


def resume(
    folder: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    callbacks: Sequence[Any] = (),
    progress: bool | None = None,
) -> Outcome:
    """Go on after the last finished stage, or after the last finished epoch of the stage that was stopped.

    Args:
        folder: Output folder of the stopped run.
        recipe: Expected to be the one of that run; None takes that one.
        callbacks: Look on in every stage, behind the methods.
        progress: Whether the validation shows bars; None shows them on a terminal.

    Returns:
        What the run left.

    Raises:
        LightningPruneError: As :func:`run`, and if the folder belongs to another recipe.
    """
    with modest_noise():
        opened = Folder.reopen(Path(folder).absolute(), recipe)
        checks.check(opened.recipe)
        return _run(opened, callbacks, progress)


def _run(folder: Folder, callbacks: Sequence[Any] = (), progress: bool | None = None) -> Outcome:
    recipe = folder.recipe
    os.environ[_FOLDER_VARIABLE] = str(folder.path)
    try:
        for number, stage in enumerate(recipe.stages):
            if stage.name not in folder.done:
                _fit(folder, stage, number, callbacks)
    finally:
        if _is_first_process():
            os.environ.pop(_FOLDER_VARIABLE, None)
    small = _load(folder, recipe.stages[-1])
    if recipe.export is None or not _is_first_process():
        return Outcome(folder.path, plan_of(small))
    return _export_and_validate(folder, small, sys.stderr.isatty() if progress is None else progress)


def _fit(folder: Folder, stage: Stage, number: int, callbacks: Sequence[Any]) -> None:
    """Run one stage and leave its result under ``stages/``."""
    recipe, methods = folder.recipe, checks.methods(stage, number)
    package = package_of(objects.model_class(recipe.model.class_path))
    package.seed_everything(recipe.seed, workers=True, verbose=False)
    model = _start(folder, stage)
    data = objects.module(recipe.data, "data")
    unfinished = folder.unfinished(stage.name)
    keep = package.callbacks.ModelCheckpoint(
        unfinished.parent, unfinished.stem, save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False
    )
    trainer = checks.trainer(
        model,
        {"enable_model_summary": False, **checks.trainer_arguments(recipe, stage, number)},  # it is in the folder
        f"stages.{number}.fit",
        callbacks=[*methods, RandomState(), Provenance(recipe, stage.name), *callbacks, keep],
        logger=package.loggers.CSVLogger(folder.path, name="logs", version=folder.log_name(stage.name)),
        plugins=[checkpoint_io(package)],
        default_root_dir=folder.path,
    )
    log.info("Stage %s (%d of %d)", stage.name, number + 1, len(recipe.stages))
    with _interruptible():
        trainer.fit(model, datamodule=data, ckpt_path=str(unfinished) if unfinished.is_file() else None)
    trainer.save_checkpoint(folder.result(stage.name), weights_only=False)
    if trainer.is_global_zero:
        write_text(folder.path / "stages" / f"{stage.name}.txt", _summary(package, model))
        folder.exhibit(stage.name, [exhibit for method in methods for exhibit in method.exhibits()])
        folder.finish(stage.name)


def _start(folder: Folder, stage: Stage) -> Any:
    """Return the model that a stage starts from: fresh, or as an earlier stage left it."""
    recipe = folder.recipe
    if stage.start == SCRATCH:
        return objects.module(recipe.model, "model", stage.init_args)
    return _load(folder, next(s for s in recipe.stages if s.name == stage.start), stage)


def _load(folder: Folder, result: Stage, stage: Stage | None = None) -> Any:
    """Load the result of a stage, with the model's arguments of that stage or of another one."""
    return load_model(folder.recipe, folder.result(result.name), stage or result)


def load_model(recipe: Recipe, path: Path, stage: Stage) -> Any:
    """Load a checkpoint of a run.

    Args:
        recipe: Names the model.
        path: The checkpoint, of a dense or a compact model.
        stage: Whose arguments the model gets.

    Raises:
        LightningPruneError: If it cannot be read or belongs to another model.
    """
    cls = objects.model_class(recipe.model.class_path)
    arguments = {**recipe.model.init_args, **stage.init_args}
    values = objects.checked(cls, arguments, "model.init_args")
    return load_from_checkpoint(cls, path, require_plan=False, **values)


def _export_and_validate(folder: Folder, small: Any, progress: bool) -> Outcome:
    from lightning_prune.export import export_onnx, validate_onnx

    recipe, plan = folder.recipe, plan_of(small)
    options = {**(recipe.export or {})}
    provenance = {"recipe": recipe.to_dict()}
    files = {"small": folder.path / "small.onnx"}
    example = example_inputs(small, recipe)
    if recipe.dense is not None:
        files["dense"] = folder.path / "dense.onnx"
        if not files["dense"].is_file():  # whole, if it is there, and never another one in this folder
            export_onnx(_load(folder, recipe.dense), files["dense"], example, provenance=provenance, **options)
    export_onnx(small, files["small"], example, provenance=provenance, **options)
    if recipe.validate is None:
        return Outcome(folder.path, plan)
    loader = evaluation_loader(objects.module(recipe.data, "data"))
    arguments = checks.validate_arguments(recipe.validate)
    report = validate_onnx(
        files["small"],
        files.get("dense"),
        dataloader=loader,
        model=small,
        exhibits=folder.exhibits(),
        extra={"recipe": recipe.to_dict()},
        progress=progress,
        **arguments,
    )
    return Outcome(folder.path, plan, report, report.save(folder.path / "report"))


def example_inputs(model: Any, recipe: Recipe) -> Any:
    """Return None where the model has ``example_input_array``, the inputs of the first batch of the data otherwise."""
    if getattr(model, "example_input_array", None) is not None:
        return None
    return first_inputs(evaluation_loader(objects.module(recipe.data, "data")))


def first_inputs(loader: Any) -> Any:
    """Return the inputs of the first batch of ``loader``: a batch ``(inputs, target)`` without its target.

    Raises:
        RecipeError: If there is no batch.
    """
    for batch in loader:
        if isinstance(batch, tuple | list) and len(batch) > 1:
            inputs = tuple(batch[:-1])
            return inputs[0] if len(inputs) == 1 else inputs
        return batch
    raise RecipeError("data: the loader gives no batch. Check its dataset and batch_size.")


def evaluation_loader(data: Any) -> Any:
    """Prepare a data module and return its test loader or, where it defines none, its validation loader.

    Args:
        data: A LightningDataModule.

    Raises:
        RecipeError: If it defines neither, or several loaders.
    """
    for stage, name in (("test", "test_dataloader"), ("validate", "val_dataloader")):
        if not _defines(data, name):
            continue
        with modest_noise():
            data.prepare_data()
            data.setup(stage)
            loader = getattr(data, name)()
        if isinstance(loader, list | tuple) and len(loader) == 1:
            loader = loader[0]
        if isinstance(loader, list | tuple | dict):
            raise RecipeError(
                f"data: {name} of {type(data).__name__} gives {len(loader)} loaders; validation needs one."
            )
        return loader
    raise RecipeError(
        f"data: {type(data).__name__} has neither test_dataloader nor val_dataloader. Define one for the validation."
    )


def _defines(data: Any, name: str) -> bool:
    own = [base for base in type(data).__mro__ if not base.__module__.startswith(PACKAGES)]
    return any(name in vars(base) for base in own)


def _summary(package: Any, model: Any) -> str:
    """Return every layer with its parameters, and the plan."""
    plan = plan_of(model)
    example, model.example_input_array = getattr(model, "example_input_array", None), None  # sizes only, nothing is run
    try:
        text = str(package.utilities.model_summary.ModelSummary(model, max_depth=-1))
    finally:
        model.example_input_array = example
    return f"{text}\n\n{plan}\n" if plan else f"{text}\n"


def _is_first_process() -> bool:
    """Whether this is not one of the processes that a distributed Trainer launched."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C through as KeyboardInterrupt; Lightning turns it into an exit and switches the signal off."""
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from error


@contextlib.contextmanager
def modest_noise() -> Iterator[None]:
    """Keep Lightning's lines on hardware and its tips away; warnings about model and training stay."""
    names = (
        "pytorch_lightning.utilities.rank_zero",
        "lightning.pytorch.utilities.rank_zero",
        "lightning_fabric",
        "lightning.fabric",
    )
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    try:
        for logger in levels:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # so it is on resume
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*")  # Lightning 2.6 under torch 2.13
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
