"""Ask everything of a recipe that can be known before a file is written or a weight trained."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune._lightning import package_of
from lightning_prune.callback import rehearse
from lightning_prune.errors import LightningPruneError, RecipeError
from lightning_prune.recipe import objects
from lightning_prune.recipe.schema import Recipe, Stage
from lightning_prune.recipe.words import one_line

# Arguments of the Trainer that running a recipe decides.
RESERVED = ("callbacks", "logger", "plugins", "default_root_dir", "enable_checkpointing", "fast_dev_run", "barebones")
# Arguments of export_onnx and validate_onnx that are not figures of the recipe.
EXPORT_SKIP = ("model", "path", "example_inputs", "provenance")
VALIDATE_SKIP = ("path", "reference", "dataloader", "model", "metric", "latency", "extra", "progress")


def check(recipe: Recipe) -> None:
    """Import every class, construct every object once, and check the gates.

    Args:
        recipe: A recipe whose keys are right.

    Raises:
        RecipeError: If something in it cannot work; names key, value and remedy.
        RuntimeMissingError: If it exports or validates and the libraries for it are not installed.
    """
    model = objects.model_class(recipe.model.class_path)
    objects.data_class(recipe.data.class_path)
    for number, stage in enumerate(recipe.stages):
        objects.module(recipe.model, "model", stage.init_args)
        methods(stage, number)
        trainer(
            model,
            trainer_arguments(recipe, stage, number),
            f"stages.{number}.fit",
            logger=False,
            enable_checkpointing=False,
        )
    objects.module(recipe.data, "data")
    _rehearse(recipe)
    if recipe.export is not None:
        _check_export(recipe.export)
    if recipe.validate is not None:
        _check_validate(recipe.validate, recipe.dense)


def _rehearse(recipe: Recipe) -> None:
    """Have the methods that act on the dense model look at one: which layers they would take, whether their budget can be met.

    Stages that start from a compressed model are not asked, because its structure is known only then; nor budgets of a model without
    ``example_input_array``, whose inputs are.
    """
    compressed: set[str] = set()
    for number, stage in enumerate(recipe.stages):
        found = methods(stage, number)
        if found and stage.start not in compressed:
            try:
                rehearse(objects.module(recipe.model, "model", stage.init_args), found)
            except LightningPruneError as error:
                raise RecipeError(f"stages.{number}.methods: {error}") from error
        if found or stage.start in compressed:
            compressed.add(stage.name)


def methods(stage: Stage, number: int) -> list[Any]:
    """Construct the methods of stage ``number``, counted from 0.

    Raises:
        RecipeError: If a method or argument is not allowed.
    """
    return [
        objects.method(name, args, f"stages.{number}.methods.{place}")
        for place, (name, args) in enumerate(stage.methods)
    ]


def trainer_arguments(recipe: Recipe, stage: Stage, number: int) -> dict[str, Any]:
    """Return the arguments that the recipe gives the Trainer of a stage.

    Raises:
        RecipeError: If one of them is unknown, reserved or of the wrong type.
    """
    package = package_of(objects.model_class(recipe.model.class_path))
    found: dict[str, Any] = {}
    for arguments, where in ((recipe.trainer, "trainer"), (stage.fit, f"stages.{number}.fit")):
        for key in RESERVED:
            if key in arguments:
                raise RecipeError(f"{where}.{key} cannot be set in a recipe: running it decides. Leave it out.")
        found |= objects.checked(package.Trainer, arguments, where, RESERVED)
    return found


def trainer(model: Any, arguments: Mapping[str, Any], where: str, **others: Any) -> Any:
    """Construct the Trainer of the package that the model belongs to.

    Args:
        model: A LightningModule or its class.
        arguments: Of the recipe.
        where: Their key, for messages.
        **others: Arguments that running the recipe decides.

    Raises:
        RecipeError: If the Trainer refuses them on this machine.
    """
    package = package_of(model)
    refusals = (
        package.utilities.exceptions.MisconfigurationException,
        ImportError,
        RuntimeError,
        TypeError,
        ValueError,
    )
    try:
        return package.Trainer(**arguments, **others)
    except refusals as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise RecipeError(f"{where}: Trainer({given}) is not possible here: {one_line(error)}") from error


def latency_settings(arguments: Mapping[str, Any]) -> Any:
    """Return the LatencySettings of the key ``validate``, or None.

    Raises:
        RecipeError: If one of them is unknown, of the wrong type or out of range.
    """
    from lightning_prune.export import LatencySettings

    given = arguments.get("latency")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise RecipeError(f"validate.latency is a mapping such as {{runs: 200}}, got {given!r}.")
    values = dict(given)
    if isinstance(values.get("batch_sizes"), list):
        values["batch_sizes"] = tuple(values["batch_sizes"])
    return objects.construct(LatencySettings, values, "validate.latency")


def validate_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``validate_onnx`` that the key ``validate`` stands for.

    Raises:
        RecipeError: If one of them is unknown or of the wrong type.
    """
    from lightning_prune.export import validate_onnx

    plain = {key: value for key, value in arguments.items() if key not in ("metric", "latency")}
    found = objects.checked(validate_onnx, plain, "validate", VALIDATE_SKIP)
    if arguments.get("metric") is not None:
        found["metric"] = objects.metric(arguments["metric"], "validate.metric")
    return found | {"latency": latency_settings(arguments)}


def _check_export(arguments: Mapping[str, Any]) -> None:
    from lightning_prune.export import export_onnx
    from lightning_prune.export.forms import Settings
    from lightning_prune.export.onnx import check_opset
    from lightning_prune.export.optional import need
    from lightning_prune.export.runtime import load_onnxruntime

    found = objects.checked(export_onnx, arguments, "export", EXPORT_SKIP)
    settings = Settings(
        **{name: found[name] for name in ("form", "provider", "batch_size", "threads") if name in found}
    )
    if settings.form == "fastest":
        load_onnxruntime()
        if settings.provider == "cuda":
            _check_gpu("export.provider", "cuda")
    need("onnxscript", "Exporting to ONNX")
    check_opset(arguments.get("opset"))


def _check_validate(arguments: Mapping[str, Any], dense: Stage | None) -> None:
    from lightning_prune.export.optional import need
    from lightning_prune.export.runtime import load_onnxruntime

    found = validate_arguments(arguments)
    for gate in ("max_drop", "min_speedup"):
        if found.get(gate) is not None and dense is None:
            raise RecipeError(
                f"validate.{gate} compares with a dense model. Add a stage without methods before the others."
            )
    if found.get("max_drop") is not None and "metric" not in found:
        raise RecipeError("validate.max_drop needs a metric. Add e.g. validate.metric: accuracy.")
    if found.get("min_speedup") is not None and not found["min_speedup"] > 0:
        raise RecipeError(
            f"validate.min_speedup is above 0, got {found['min_speedup']!r}. 1.5 asks for 1.5 times the dense speed."
        )
    if not 0 < found.get("tolerance", 1e-5) < 1:
        raise RecipeError(f"validate.tolerance lies between 0 and 1, got {found['tolerance']!r}.")
    if (limit := found.get("limit_batches")) is not None and limit < 1:
        raise RecipeError(f"validate.limit_batches is at least 1, or null; got {limit!r}.")
    load_onnxruntime()
    need("matplotlib", "Drawing the pictures of a report")
    if found.get("require_gpu"):
        _check_gpu("validate.require_gpu", found.get("provider", "auto"))


def _check_gpu(key: str, provider: Any) -> None:
    """Run a file of one weight as the validation or export will run its files: what onnxruntime lists as available need not load."""
    from lightning_prune.export import export_onnx, open_session

    with tempfile.TemporaryDirectory() as folder:
        written = export_onnx(nn.Linear(1, 1), Path(folder) / "probe.onnx", torch.zeros(2, 1))
        try:
            open_session(written.path, provider, require_gpu=True)
        except LightningPruneError as error:
            raise RecipeError(f"{key}: {str(error).replace(str(written.path), 'a file of one weight')}") from error
