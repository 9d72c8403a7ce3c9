"""The model right after its compression, before fine-tuning: kept while a run goes by it, measured when the run has ended.

A method that acts at the start of a fit leaves such a model when the fit begins. One that compresses gradually leaves it when its fit has ended;
only a later stage fine-tunes it, and without one there is no such moment.
"""

from pathlib import Path
from typing import Any

import torch

from lightning_prune._lightning import Callback
from lightning_prune.callback import Compression
from lightning_prune.files import whole_file
from lightning_prune.recipe import checks, objects, runner
from lightning_prune.recipe.controls import methods_of
from lightning_prune.recipe.folder import Provenance
from lightning_prune.recipe.schema import Recipe, Stage


class Snapshot(Callback):
    """Keeps the weights and the plan that a fit begins with, where a method has acted at its start.

    Args:
        folder: Output folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Write them, once per stage; a stage that goes on after a stop has done so before it was stopped."""
        acted = any(isinstance(callback, Compression) and not callback.gradual for callback in trainer.callbacks)
        path = snapshot_path(self.folder, running_stage(trainer))
        if acted and trainer.ckpt_path is None:
            with whole_file(path) as beside:
                torch.save({"state_dict": pl_module.state_dict()}, beside)


def running_stage(trainer: Any) -> str:
    """Return the name of the stage that a Trainer of a run fits."""
    return str(next(callback.entry["stage"] for callback in trainer.callbacks if isinstance(callback, Provenance)))


def snapshot_path(folder: Path, stage: str) -> Path:
    """Return where the model that a stage began with stands."""
    return folder / "stages" / f"{stage}.start.ckpt"


def last_compression(recipe: Recipe) -> tuple[Stage, bool]:
    """Return the last stage with methods on the way to the result, and whether its model gets smaller when its fit has ended."""
    found = [(stage, method.gradual) for stage, _, method in methods_of(recipe)]
    stage = found[-1][0]
    return stage, any(gradual for owner, gradual in found if owner is stage)


def has_moment(recipe: Recipe) -> bool:
    """Return whether a compressed model exists that is fine-tuned afterwards."""
    stage, gradual = last_compression(recipe)
    return not (gradual and stage is recipe.stages[-1])


def metric_before(folder: Path, recipe: Recipe) -> float | None:
    """Measure the model between its last compression and its fine-tuning.

    Args:
        folder: Output folder of the finished run, with snapshots.
        recipe: What ran there; it names a metric.

    Returns:
        The metric; None where there is no such model.

    Raises:
        LightningPruneError: If the model cannot be loaded or run, or the metric does not take its outputs.
    """
    if not has_moment(recipe):
        return None
    stage, gradual = last_compression(recipe)
    path = folder / "stages" / f"{stage.name}.ckpt" if gradual else snapshot_path(folder, stage.name)
    return evaluate(runner.load_model(recipe, path, stage), recipe)


def evaluate(model: Any, recipe: Recipe) -> float:
    """Measure a model in torch, on the CPU, on the data of the validation.

    Args:
        model: The model; left as it is.
        recipe: Names data, metric and the number of batches.

    Returns:
        The metric of its first output.

    Raises:
        ExportError: If the data do not fit the model, or it fails on them.
        OptionError: If the metric does not take its outputs, or is not one number.
    """
    from lightning_prune.export.batches import read_batches
    from lightning_prune.export.inputs import read_inputs, read_outputs
    from lightning_prune.export.metrics import TaskMetric
    from lightning_prune.export.outputs import as_arrays
    from lightning_prune.export.twin import cpu_twin, run

    given = recipe.validate or {}
    metric = TaskMetric(objects.metric(given.get("metric"), "validate.metric"))
    limit = checks.validate_arguments(given).get("limit_batches")
    twin = cpu_twin(model)
    names = list(read_inputs(model, runner.example_inputs(model, recipe)).tensors)
    loader = runner.evaluation_loader(objects.module(recipe.data, "data"))
    for batch in read_batches(loader, names, limit):
        inputs = read_inputs(twin, batch.example).map(lambda tensor: tensor.detach().cpu())
        outputs = as_arrays(read_outputs(run(twin, inputs), inputs.tensors, type(twin).__name__))
        metric.update("torch", next(iter(outputs.values())), batch.target)
    return metric.values()["torch"]
