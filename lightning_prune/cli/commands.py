"""What the commands do. Torch, Lightning and ONNX are imported by the commands that need them."""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_prune.cli.parser import PROGRAM
from lightning_prune.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_prune.structure.plan import Plan

PASSED, GATE_MISSED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
Overrides = Sequence[tuple[str, str]]


def run(options: Any, overrides: Overrides) -> int:
    """Run a recipe, or go on with a run that was stopped; return the exit code."""
    from lightning_prune import recipe as recipes

    if options.recipe is None and options.resume is None:
        raise OptionError(f"run needs a recipe: a YAML file, or one of {', '.join(recipes.shipped())}.")
    if options.resume is not None and options.output is not None:
        raise OptionError(f"--resume {options.resume} writes into that folder; drop --output.")
    if options.recipe is None and overrides:
        raise OptionError(f"--{overrides[0][0]}: a resumed run keeps its recipe. Drop the option, or start a new run.")
    recipe = recipes.load(options.recipe, overrides) if options.recipe is not None else None
    folder = Path(options.resume or options.output or _free_folder(str(options.recipe)))
    try:
        outcome = recipes.resume(folder, recipe) if options.resume else recipes.run(recipe, folder)
    except KeyboardInterrupt:
        hint = f" Go on with: {PROGRAM} run --resume {folder}" if (folder / "state.json").is_file() else ""
        sys.stderr.write(f"\nInterrupted.{hint}\n")
        return INTERRUPTED
    if outcome.report is None:
        _last_line(outcome.folder)
        return PASSED
    return _tell(outcome.report, outcome.page)


def export(options: Any, overrides: Overrides) -> int:
    """Write the model of a checkpoint as an ONNX file; return the exit code."""
    from lightning_prune.checkpoint import plan_in, read_checkpoint
    from lightning_prune.export import export_onnx
    from lightning_prune.export.forms import Settings
    from lightning_prune.recipe import runner

    chosen = {name: options[name] for name in ("form", "provider", "batch_size", "threads")}
    Settings(**chosen)
    specs = _class_specs(options, overrides)
    if not options.dense and plan_in(read_checkpoint(options.checkpoint)["state_dict"]) is None:
        raise CheckpointError(
            f"Checkpoint {options.checkpoint!r} carries no plan: its model is dense. Export it with --dense."
        )
    model = _load(specs["model"], options.checkpoint)
    example = None
    if "data" in specs:
        example = runner.first_inputs(runner.evaluation_loader(_data(specs["data"])))
    elif getattr(model, "example_input_array", None) is None:
        raise OptionError(
            f"{type(model).__name__} has no example_input_array. Give --data pkg.mod.DataModule for example inputs."
        )
    written = export_onnx(model, options.output, example, opset=options.opset, **chosen)
    told = "".join(f", {name} as {form}" for name, form in written.forms.items())
    _console().print(
        f"{written.parameters:,} parameters, {written.numbers:,} numbers in the file, {written.bytes:,} bytes, "
        f"opset {written.opset}{told}",
        highlight=False,
    )
    _last_line(written.path)
    return PASSED


def validate(options: Any, overrides: Overrides) -> int:
    """Validate an ONNX file and write the report; return the exit code."""
    from lightning_prune.export import LatencySettings, validate_onnx
    from lightning_prune.export.onnxfile import existing
    from lightning_prune.recipe import document, objects, runner

    for path in filter(None, (options.onnx, options.reference)):
        existing(path)
    specs = _class_specs(options, overrides)
    if (options.model is None) != (options.checkpoint is None):
        raise OptionError(
            "--model and --checkpoint belong together: the class and the file with its weights. Give both or none."
        )
    model = _load(specs["model"], options.checkpoint) if "model" in specs else None
    name = (
        document.parse_yaml(options.metric, "--metric")
        if options.metric
        else "accuracy"
        if options.max_drop is not None
        else None
    )
    metric = objects.metric(name, "--metric") if name is not None else None
    latency = LatencySettings(batch_sizes=_batch_sizes(options.batch_sizes))
    output = Path(options.output)
    _check_folder(output)
    report = validate_onnx(
        options.onnx,
        options.reference,
        dataloader=runner.evaluation_loader(_data(specs["data"])),
        model=model,
        metric=metric,
        provider=options.provider,
        require_gpu=options.require_gpu,
        max_drop=options.max_drop,
        min_speedup=options.min_speedup,
        latency=latency,
        progress=sys.stderr.isatty(),
    )
    return _tell(report, report.save(output))


def compare(options: Any, overrides: Overrides) -> int:
    """Run several recipes under several seeds and report; return the exit code."""
    from lightning_prune import recipe as recipes
    from lightning_prune.recipe import compare as comparing
    from lightning_prune.recipe.trials import read_seeds

    if any(path == "seed" for path, _ in overrides):
        raise OptionError("--seed belongs to one run; a comparison takes --seeds, such as --seeds 0,1,2.")
    seeds = read_seeds(options.seeds)
    given = [(name, recipes.load(name, overrides)) for name in options.recipes]
    folder = Path(options.output or _free_folder("compare"))
    words = [PROGRAM, "compare", *options.recipes, "--seeds", ",".join(map(str, seeds)) + "," * (len(seeds) == 1)]
    words += [word for path, value in overrides for word in (f"--{path}", value)]
    words += ["--output", str(folder), *(["--keep-going"] if options.keep_going else [])]
    settings = comparing.Settings(seeds, options.keep_going, shlex.join(words), sys.stderr.isatty())
    try:
        found, page = comparing.compare(given, folder, settings)
    except KeyboardInterrupt:
        hint = f" Go on with: {settings.command}" if (folder / "compare.json").is_file() else ""
        sys.stderr.write(f"\nInterrupted.{hint}\n")
        return INTERRUPTED
    _console(width=160).print(found.table())
    _last_line(page)
    return GATE_MISSED if found.failures else PASSED


def inspect(options: Any, overrides: Overrides) -> int:
    """Show the plan in a checkpoint or an ONNX file; return the exit code."""
    path = Path(options.file)
    facts, plan = _onnx_facts(path) if path.suffix == ".onnx" else _checkpoint_facts(path)
    if plan is None:
        raise CheckpointError(
            f"{str(path)!r} carries no plan: its model is dense, or another tool wrote it. There is nothing to show."
        )
    origin = plan.origin
    dense = {"parameters": origin.params, "flops": origin.flops} if origin is not None else {}
    if options.json:
        text = json.dumps(
            {"file": str(path), **facts, "dense": dense, "plan": plan.digest, "layers": plan.rows()}, indent=1
        )
        sys.stdout.write(text + "\n")
        return PASSED
    console = _console()
    console.print(plan.table(title=str(path)))
    share = f" of {dense['parameters']:,} ({facts['parameters'] / dense['parameters']:.1%})" if dense else ""
    stored = f", {facts['numbers']:,} numbers in the file" if "numbers" in facts else ""
    console.print(f"{facts['parameters']:,} parameters{share}{stored}, {len(plan.steps)} changes", highlight=False)
    if facts.get("forms"):
        console.print(_form_table(facts["forms"]))
    if facts["entropies"]:
        console.print(_entropy_table(facts["entropies"], plan))
    return PASSED


def prunability(options: Any, overrides: Overrides) -> int:
    """Measure how few weights keep the training loss; return the exit code."""
    from lightning_prune import measure

    _check_picture(options.picture)
    given = {name: options[name] for name in ("beta", "abs_tol", "mode", "batches")}
    if options.grid is not None:
        given["grid"] = _numbers(options.grid, "--grid")
    if options.criterion == "lamp":
        from lightning_prune.methods.magnitude import lamp

        given["criterion"] = lamp
    else:
        given["criterion"] = options.criterion
    specs = _class_specs(options, overrides)
    model, loader = _load(specs["model"], options.checkpoint), _training_loader(_data(specs["data"]))
    return _answer(measure.prunability(model, loader, **given, **_selection(options)), options)


def sensitivity(options: Any, overrides: Overrides) -> int:
    """Measure what becomes of the loss or a metric when a share of a layer leaves; return the exit code."""
    from lightning_prune import measure
    from lightning_prune.recipe import document, objects, runner

    _check_picture(options.picture)
    given = {"units": options.units, "batches": options.batches}
    if options.shares is not None:
        given["shares"] = _numbers(options.shares, "--shares")
    if options.metric is not None:
        found = objects.metric(document.parse_yaml(options.metric, "--metric"), "--metric")
        given["metric"] = NamedMetric(found) if isinstance(found, str) else found
    specs = _class_specs(options, overrides)
    model, loader = _load(specs["model"], options.checkpoint), runner.evaluation_loader(_data(specs["data"]))
    return _answer(measure.sensitivity(model, loader, **given, **_selection(options)), options)


class NamedMetric:
    """A metric that the validation knows by a short name, in the words that ``measure`` asks it with.

    Args:
        name: Such as ``"accuracy"``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        from lightning_prune.export.metrics import TaskMetric

        self._kept = TaskMetric(self.name)

    def update(self, output: Any, target: Any) -> None:
        """Take in a batch."""
        self._kept.update("model", output.detach().float().cpu().numpy(), target)

    def compute(self) -> float:
        """Return the metric of all batches."""
        return self._kept.values()["model"]

    @property
    def higher_is_better(self) -> bool | None:
        """As torchmetrics says."""
        return self._kept.higher_is_better


def _answer(found: Any, options: Any) -> int:
    """Show what was measured, as a table or as JSON, and draw it if asked to."""
    if options.picture is not None:
        found.picture(options.picture)
    if options.json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=1) + "\n")
        return PASSED
    _console(width=200).print(found.table())
    if options.picture is not None:
        _last_line(options.picture)
    return PASSED


def _check_picture(path: str | None) -> None:
    """Raise before anything is measured if a picture could not be drawn or written."""
    if path is None:
        return
    from lightning_prune.export.optional import need

    if Path(path).suffix.lower() != ".png" or Path(path).is_dir():
        raise OptionError(f"--picture is the name of a PNG file, such as layers.png; got {path!r}.")
    _check_folder(Path(path).parent, "--picture")
    need("matplotlib", "Drawing a picture")


def _selection(options: Any) -> dict[str, Any]:
    """Return ``--include`` and ``--exclude`` as lists of patterns."""
    names = {name: options[name] for name in ("include", "exclude") if options[name] is not None}
    return {name: [part.strip() for part in text.split(",")] for name, text in names.items()}


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(f"{option} are numbers with commas between, such as 0.5,0.25; got {text!r}.") from error


def _training_loader(data: Any) -> Any:
    """Prepare a data module and return its training loader."""
    from lightning_prune._lightning import PACKAGES
    from lightning_prune.recipe import runner

    if type(data).train_dataloader.__module__.startswith(PACKAGES):
        raise OptionError(f"--data: {type(data).__name__} has no train_dataloader. Define one.")
    with runner.modest_noise():
        data.prepare_data()
        data.setup("fit")
        return data.train_dataloader()


def _form_table(record: Mapping[str, Any]) -> Any:
    """Return the forms of layers in an ONNX file as a table."""
    from rich.markup import escape
    from rich.table import Table

    from lightning_prune.export.forms import explain, rows, titles

    table = Table(title=escape(explain(record)))
    for key, title in titles(rows(record)).items():
        table.add_column(title, justify="right" if key in ("numbers", "flops", "ms") else "left")
    for row in rows(record):
        time = "" if row["ms"] is None else f"{row['ms']:,g}"
        cells = (row["layer"], row["form"], f"{row['numbers']:,}", f"{row['flops']:,}", time, row["others"])
        table.add_row(*map(escape, cells))
    return table


def _entropy_table(entropies: Any, plan: "Plan") -> Any:
    """Return the entropies of the cuts of matrix product operators as a table."""
    from rich.markup import escape
    from rich.table import Table

    from lightning_prune.export.entanglement import entropy_rows
    from lightning_prune.export.markup import show

    table = Table("layer", title="Entanglement entropy")
    for name in ("cut", "bond D", "entropy", "its limit, ln D"):
        table.add_column(name, justify="right")
    for row in entropy_rows(entropies, plan):
        entropy = "not finite" if row["entropy"] is None else show(row["entropy"])
        table.add_row(escape(row["layer"]), show(row["cut"]), show(row["bond"]), entropy, show(row["limit"]))
    return table


def _onnx_facts(path: Path) -> tuple[dict[str, Any], "Plan | None"]:
    from lightning_prune.export import read_onnx

    file = read_onnx(path)
    facts = {
        "kind": "onnx",
        "parameters": file.parameters,
        "numbers": file.numbers,
        "opset": file.opset,
        "bytes": file.bytes,
        "flops_per_example": file.flops,
    }
    return facts | {key: file.metadata.get(key) or {} for key in ("forms", "provenance", "entropies")}, file.plan


def _checkpoint_facts(path: Path) -> tuple[dict[str, Any], "Plan | None"]:
    from lightning_prune.checkpoint import plan_in, read_checkpoint
    from lightning_prune.export.entanglement import entropies_in
    from lightning_prune.recipe.folder import CHECKPOINT_KEY

    checkpoint = read_checkpoint(path)
    state = checkpoint["state_dict"]
    plan = plan_in(state)
    if plan is None:
        return {}, None
    counted = {"parameters": count_parameters(state, plan), "entropies": entropies_in(state, plan)}
    return {"kind": "checkpoint", **counted, "provenance": checkpoint.get(CHECKPOINT_KEY, {})}, plan


def count_parameters(state: Mapping[str, Any], plan: "Plan") -> int:
    """Count the numbers of a state dict that are parameters: those of the dense model and those inside changed layers, tied ones once.

    Args:
        state: Tensors by name.
        plan: The plan that the state dict carries.
    """
    dense = {name for name, _ in plan.origin.parameters} if plan.origin is not None else set()
    inside = tuple(f"{step.module}." for step in plan.steps if step.replaces)
    found = {
        t.data_ptr(): t.numel()
        for name, t in state.items()
        if name in dense or (name.startswith(inside) and t.is_floating_point())
    }
    return sum(found.values())


def _class_specs(options: Any, overrides: Overrides) -> dict[str, Any]:
    """Return the class paths and arguments of ``--model`` and ``--data``."""
    from lightning_prune.recipe import schema

    given = {key: options[key] for key in ("model", "data") if options.get(key) is not None}
    for path, _ in overrides:
        if path.partition(".")[0] not in given:
            raise OptionError(
                f"--{path} sets an argument of a class that is not named. Give --{path.partition('.')[0]} pkg.mod.Class too."
            )
    content: Mapping[str, Any] = schema.apply_overrides(given, overrides)
    return {key: schema.class_spec(value, f"--{key}") for key, value in content.items()}


def _load(spec: Any, checkpoint: str) -> Any:
    from lightning_prune.checkpoint import load_from_checkpoint
    from lightning_prune.recipe import objects

    found = objects.model_class(spec.class_path, "--model")
    arguments = objects.checked(found, spec.init_args, "--model.init_args") if spec.init_args else {}
    return load_from_checkpoint(found, checkpoint, require_plan=False, **arguments).eval()


def _data(spec: Any) -> Any:
    from lightning_prune.recipe import objects

    return objects.construct(objects.data_class(spec.class_path, "--data"), spec.init_args, "--data.init_args")


def _batch_sizes(text: str) -> tuple[int, ...]:
    sizes = [part.strip() for part in text.split(",")]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise OptionError(
            f"--batch-sizes are whole numbers of at least 1 with commas between, such as 1,16; got {text!r}."
        )
    return tuple(map(int, sizes))


def _check_folder(folder: Path, option: str = "--output") -> None:
    """Raise before anything is measured if nothing could be written to ``folder``."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "cannot be written" if there.is_dir() else "is a file"
        raise OptionError(f"Output folder {str(folder)!r}: {str(there)!r} {reason}. Choose another {option}.")


def _free_folder(recipe: str) -> str:
    """Return ``runs/NAME``, or the first of ``runs/NAME-2``, ``-3``, ... that is not there."""
    stem, number = f"runs/{Path(recipe).name.removesuffix('.yaml').removesuffix('.yml')}", 1
    while Path(stem if number == 1 else f"{stem}-{number}").exists():
        number += 1
    return stem if number == 1 else f"{stem}-{number}"


def _tell(report: Any, page: Any) -> int:
    _console().print(report.table())
    _last_line(page)
    return PASSED if report.passed else GATE_MISSED


def _last_line(path: Any) -> None:
    sys.stdout.write(f"{path}\n")


def _console(width: int = 140) -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width)
