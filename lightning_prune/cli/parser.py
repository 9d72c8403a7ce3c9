"""The words of the command line: commands, options, examples, and how mistakes in them are told."""

import re
from collections.abc import Sequence
from typing import Any, NoReturn

import jsonargparse

import lightning_prune
from lightning_prune.errors import OptionError
from lightning_prune.recipe.words import did_you_mean

PROGRAM = "lightning-prune"
# What commands that take keys of a recipe keep for themselves, and which of it takes no value.
_OWN = {"run": ("--output", "--resume", "--help"), "compare": ("--output", "--seeds", "--keep-going", "--help")}
_FLAGS = ("--help", "--keep-going")
_CLASS_OPTION = re.compile(r"--(model|data)\.")

_EXAMPLES = {
    "": """examples:
  lightning-prune run digits-trp.yaml
  lightning-prune run recipe.yaml --model pkg.mod.LitNet --data pkg.mod.DataModule --stages.1.methods.0.TRP.flops 0.4
  lightning-prune run --resume runs/digits-trp
  lightning-prune export small.ckpt --model pkg.mod.LitNet --output small.onnx
  lightning-prune validate small.onnx --reference dense.onnx --data pkg.mod.DataModule --max-drop 0.01 --min-speedup 1.5
  lightning-prune inspect small.ckpt
  lightning-prune compare digits-trp.yaml digits-lowrank.yaml --seeds 0,1,2
  lightning-prune prunability dense.ckpt --model pkg.mod.LitNet --data pkg.mod.DataModule
  lightning-prune sensitivity dense.ckpt --model pkg.mod.LitNet --data pkg.mod.DataModule --metric accuracy --picture layers.png""",
    "run": """Every key of the recipe can be set: --seed 3, --trainer.accelerator gpu, --stages.1.fit.max_epochs 5, --model pkg.mod.LitNet.

examples:
  lightning-prune run digits-trp.yaml
  lightning-prune run recipe.yaml --stages.1.methods.0.TRP.flops 0.4 --output runs/narrow
  lightning-prune run --resume runs/narrow""",
    "export": """Arguments of the classes: --model.init_args.width 64, --data.init_args.batch_size 32.

examples:
  lightning-prune export small.ckpt --model pkg.mod.LitNet --output small.onnx
  lightning-prune export dense.ckpt --model pkg.mod.LitNet --output dense.onnx --dense
  lightning-prune export small.ckpt --model pkg.mod.LitNet --output small.onnx --form fastest --provider cpu --batch-size 16""",
    "validate": """Arguments of the classes: --model.init_args.width 64, --data.init_args.batch_size 32.

examples:
  lightning-prune validate small.onnx --reference dense.onnx --data pkg.mod.DataModule --metric accuracy --max-drop 0.01
  lightning-prune validate small.onnx --data pkg.mod.DataModule --model pkg.mod.LitNet --checkpoint small.ckpt
  lightning-prune validate small.onnx --reference dense.onnx --data pkg.mod.DataModule --require-gpu --min-speedup 1.5""",
    "inspect": """examples:
  lightning-prune inspect small.ckpt
  lightning-prune inspect small.onnx --json""",
    "compare": """The dense model and, for every budget, a random control are always in the table. The recipes share model, data, metric and
the stages up to the dense model, which is trained once per seed. Their gates are left out.
Every key can be set, for all recipes at once: --trainer.accelerator gpu, --data.init_args.batch_size 32.
Stopped, it goes on where it was: start it again with the same --output.

examples:
  lightning-prune compare digits-trp.yaml digits-lowrank.yaml
  lightning-prune compare digits-trp.yaml digits-lowrank.yaml --seeds 0,1,2,3,4 --output runs/digits --keep-going
  lightning-prune compare mine.yaml --seeds 2 --model pkg.mod.LitNet --data pkg.mod.DataModule""",
    "prunability": """The loss is that of the model's training_step on the training data, in evaluation mode. Use data without augmentation.
Arguments of the classes: --model.init_args.width 64, --data.init_args.batch_size 32.

examples:
  lightning-prune prunability dense.ckpt --model pkg.mod.LitNet --data pkg.mod.DataModule
  lightning-prune prunability dense.ckpt --model pkg.mod.LitNet --data pkg.mod.DataModule --beta 0.05 --abs-tol 0.001 --picture curve.png
  lightning-prune prunability dense.ckpt --model pkg.mod.LitNet --data pkg.mod.DataModule --criterion random --batches 20 --json""",
    "sensitivity": """The data are those of the test loader, or of the validation loader where there is none.
Arguments of the classes: --model.init_args.width 64, --data.init_args.batch_size 32.

examples:
  lightning-prune sensitivity dense.ckpt --model pkg.mod.LitNet --data pkg.mod.DataModule
  lightning-prune sensitivity dense.ckpt --model pkg.mod.LitNet --data pkg.mod.DataModule --metric accuracy --picture layers.png
  lightning-prune sensitivity dense.ckpt --model pkg.mod.LitNet --data pkg.mod.DataModule --units channels --shares 0.25,0.5,0.75 --json""",
}


class _Parser(jsonargparse.ArgumentParser):
    """Tells its errors in one line, with the nearest option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what argparse would print.

        Raises:
            OptionError: Always.
        """
        text = " ".join(str(message).split())
        unknown = re.search(r"(?:[Uu]nrecognized arguments:|does not accept option)\s*'?(-{0,2}[^\s'=]+)", text)
        if unknown is not None:
            options = [
                option for action in self._actions for option in action.option_strings if option.startswith("--")
            ]
            word = unknown[1] if unknown[1].startswith("-") else f"--{unknown[1]}"
            hint = did_you_mean(word, options) if word.startswith("--") else f"See {PROGRAM} --help."
            raise OptionError(f"There is no option or argument {unknown[1]!r} here. {hint}") from ex
        missing = re.search(r"arguments are required: (.+)", text)
        if missing is not None:
            raise OptionError(f"Missing: {re.sub(r'[a-z]+[.]', '', missing[1])}. See {PROGRAM} COMMAND --help.") from ex
        if "was not provided" in text and "command" in text:
            raise OptionError(
                f"A command is missing: run, export, validate, inspect, compare, prunability or sensitivity. See {PROGRAM} --help."
            ) from ex
        wrong = re.search(r"Parser key \"(\w+)\": Expected an? <class '(\w+)'>. Got value: (.*)", text)
        if wrong is not None:
            name, kind, got = wrong.groups()
            kind = {"int": "a whole number", "float": "a number"}.get(kind, kind)
            raise OptionError(f"--{name.replace('_', '-')} is {kind}; got {got!r}.") from ex
        raise OptionError(f"{text.rstrip('.')}. See {PROGRAM} --help.") from ex


def build_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _command(
        "Make a Lightning model physically smaller and prove it: dense, compact, ONNX, validated.", "", prog=PROGRAM
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"{PROGRAM} {lightning_prune.__version__}",
        help="Show the version and exit.",
    )
    commands = parser.add_subcommands(required=True, dest="command", title="commands", metavar="COMMAND")

    run = _command("Run a recipe: train, compress, export, validate.", "run")
    run.add_argument(
        "recipe", nargs="?", type=str, help="YAML file, or the name of a shipped recipe such as digits-trp.yaml"
    )
    run.add_argument("--output", type=str, help="folder to write into, missing or empty (default: runs/NAME)")
    run.add_argument("--resume", type=str, metavar="FOLDER", help="go on with the run in this folder")
    commands.add_subcommand("run", run, help="run a recipe, or go on with one")

    export = _command("Write the model of a checkpoint as one ONNX file.", "export")
    export.add_argument("checkpoint", type=str, metavar="CKPT", help="checkpoint of a compact model")
    export.add_argument("--model", type=str, required=True, help="class path of the LightningModule, pkg.mod.LitNet")
    export.add_argument("--output", type=str, required=True, help="ONNX file to write")
    export.add_argument(
        "--data", type=str, help="LightningDataModule that gives example inputs (default: example_input_array)"
    )
    export.add_argument("--dense", action="store_true", help="the checkpoint holds a dense model, without a plan")
    export.add_argument("--opset", type=int, help="version of the ONNX operator set (default: the exporter's)")
    export.add_argument(
        "--form",
        type=str,
        default="auto",
        help="form of layers in factors: auto (fewest multiply-adds), smallest, or fastest, which measures (default: auto)",
    )
    export.add_argument(
        "--provider",
        type=str,
        default="auto",
        help="where fastest measures: auto (CUDA where it loads), cpu, or cuda and nowhere else (default: auto)",
    )
    export.add_argument("--batch-size", type=int, help="at which batch fastest measures (default: 1)")
    export.add_argument("--threads", type=int, help="with how many threads (default: physical cores)")
    commands.add_subcommand("export", export, help="checkpoint to ONNX file")

    validate = _command("Run an ONNX file beside the dense one and beside torch, and write a report.", "validate")
    validate.add_argument("onnx", type=str, metavar="ONNX", help="the compact file")
    validate.add_argument(
        "--data", type=str, required=True, help="class path of the LightningDataModule; its test loader, else val"
    )
    validate.add_argument("--reference", type=str, help="the dense ONNX file")
    validate.add_argument("--model", type=str, help="class path of the LightningModule, to compare with torch")
    validate.add_argument("--checkpoint", type=str, help="checkpoint of the compact model, together with --model")
    validate.add_argument(
        "--metric", type=str, help="e.g. accuracy, mse, or 'F1Score: {task: binary}' (with --max-drop: accuracy)"
    )
    validate.add_argument(
        "--max-drop", type=float, help="gate: by how much the metric may fall below the dense model's"
    )
    validate.add_argument("--min-speedup", type=float, help="gate: least speed-up over the dense file")
    validate.add_argument("--require-gpu", action="store_true", help="fail unless CUDA ran it")
    validate.add_argument("--provider", type=str, default="auto", help="auto, cpu or cuda (default: auto)")
    validate.add_argument("--batch-sizes", type=str, default="1", help="batch sizes to time, e.g. 1,16 (default: 1)")
    validate.add_argument("--output", type=str, default="report", help="folder of the report (default: report)")
    commands.add_subcommand("validate", validate, help="ONNX file against dense and torch: a report")

    inspect = _command("Show what was removed, layer by layer.", "inspect")
    inspect.add_argument("file", type=str, metavar="CKPT|ONNX", help="checkpoint or ONNX file of a compact model")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    commands.add_subcommand("inspect", inspect, help="what was removed, layer by layer")

    compare = _command("Run several recipes under several seeds: one table, one picture.", "compare")
    compare.add_argument(
        "recipes", nargs="+", type=str, metavar="RECIPE", help="YAML files, or names of shipped recipes"
    )
    compare.add_argument(
        "--seeds", type=str, default="3", help="seeds with commas, 0,1,2, or how many from 0 on (default: 3)"
    )
    compare.add_argument("--output", type=str, help="folder to write into or to go on in (default: runs/compare)")
    compare.add_argument("--keep-going", action="store_true", help="note a cell that fails and run the next one")
    commands.add_subcommand("compare", compare, help="several recipes over several seeds: a table and a picture")
    _add_questions(commands)
    return parser


def _add_questions(commands: Any) -> None:
    """Add the commands that measure a model."""
    prunability = _command(
        "Find the smallest share of its weights with which a model keeps its training loss.", "prunability"
    )
    _measured(prunability)
    prunability.add_argument("--beta", type=float, default=0.1, help="share by which the loss may rise (default: 0.1)")
    prunability.add_argument("--abs-tol", type=float, default=0.0, help="and by how much besides (default: 0)")
    prunability.add_argument(
        "--mode",
        type=str,
        default="first_crossing",
        help="first_crossing or smallest_feasible (default: first_crossing)",
    )
    prunability.add_argument(
        "--criterion", type=str, default="magnitude", help="magnitude, random or lamp (default: magnitude)"
    )
    prunability.add_argument("--grid", type=str, help="shares to keep, e.g. 0.5,0.2,0.1 (default: 25 from 1 down to 0)")
    commands.add_subcommand("prunability", prunability, help="smallest share of weights that keeps the training loss")

    sensitivity = _command(
        "Tell for every layer what becomes of the loss or a metric when a share of it leaves.", "sensitivity"
    )
    _measured(sensitivity)
    sensitivity.add_argument(
        "--metric",
        type=str,
        help="e.g. accuracy, mse, or 'F1Score: {task: binary}' (default: the loss of training_step)",
    )
    sensitivity.add_argument("--units", type=str, default="weights", help="weights or channels (default: weights)")
    sensitivity.add_argument(
        "--shares", type=str, help="shares to remove, e.g. 0.25,0.5 (default: 11 from 0.1 to 0.99)"
    )
    commands.add_subcommand("sensitivity", sensitivity, help="loss or metric against removal, layer by layer")


def _measured(parser: jsonargparse.ArgumentParser) -> None:
    """Add what every question about a model and its data takes."""
    parser.add_argument("checkpoint", type=str, metavar="CKPT", help="checkpoint of a trained model, dense or compact")
    parser.add_argument("--model", type=str, required=True, help="class path of the LightningModule, pkg.mod.LitNet")
    parser.add_argument("--data", type=str, required=True, help="class path of the LightningDataModule")
    parser.add_argument("--batches", type=int, help="how many batches to look at (default: all)")
    parser.add_argument("--include", type=str, help="layers to take, with commas: names, globs or types (default: all)")
    parser.add_argument("--exclude", type=str, help="layers to leave out, likewise")
    parser.add_argument("--picture", type=str, metavar="PNG", help="picture to write")
    parser.add_argument("--json", action="store_true", help="as JSON")


def split_overrides(words: Sequence[str], command: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Take the dotted paths out of the words of a command.

    Args:
        words: What follows the command.
        command: ``run`` and ``compare`` take every option that is not their own for a key of the recipe; others take ``--model.X`` and
            ``--data.X``.

    Returns:
        The words left, and the paths with their values.

    Raises:
        OptionError: If a path has no value.
    """
    kept: list[str] = []
    overrides: list[tuple[str, str]] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=")
        own = name in _OWN.get(command, ())
        if not name.startswith("--") or (own if command in _OWN else not _CLASS_OPTION.match(name)):
            kept.append(word)
            if own and not equals and queue and name not in _FLAGS:
                kept.append(queue.pop(0))
            continue
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise OptionError(f"The option {name} needs a value: {name} VALUE.")
            value = queue.pop(0)
        overrides.append((name.removeprefix("--"), value))
    return kept, overrides


def _command(description: str, command: str, **others: Any) -> _Parser:
    return _Parser(
        description=description,
        epilog=_EXAMPLES[command],
        formatter_class=_Formatter,
        exit_on_error=False,
        allow_abbrev=False,
        **others,
    )


class _Formatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the lines of the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())
