"""What may stand in a recipe, as frozen data, and the checks that need nothing but the text.

::

    description: one line              model: pkg.LitNet, or {class_path: pkg.LitNet, init_args: {width: 64}}
    seed: 0                            data: likewise, a LightningDataModule
    variables: {width: 64}             trainer: arguments of the Trainer in every stage
    stages:                            one fit after the other
      - name: dense
        from: scratch                  or an earlier stage; by default the stage before
        fit: {max_epochs: 8}           arguments of the Trainer in this stage, over those of `trainer`
        init_args: {lr: 0.01}          arguments of the model in this stage, over those of `model`
        methods: [{TRP: {flops: 0.5}}] names from `lightning_prune.methods`
    export: {form: fastest}            arguments of export_onnx; null: no export and no validation
    validate: {metric: accuracy}       arguments of validate_onnx; null: no validation

Whatever can be written in the file can be set by its dotted path on the command line.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lightning_prune.errors import RecipeError
from lightning_prune.recipe import document as documents
from lightning_prune.recipe.words import did_you_mean

SCRATCH = "scratch"
_KEYS = ("description", "seed", "variables", "model", "data", "trainer", "stages", "export", "validate")
_STAGE_KEYS = ("name", "from", "fit", "init_args", "methods")
_CLASS_KEYS = ("class_path", "init_args")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class ClassSpec:
    """A class and the arguments to construct it with.

    Attributes:
        class_path: ``package.module.Class``.
        init_args: Keyword arguments.
    """

    class_path: str
    init_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One fit.

    Attributes:
        name: Names its checkpoint.
        start: The stage whose result it starts from, or ``"scratch"``.
        fit: Trainer arguments beyond the common ones.
        init_args: Arguments of the model beyond the common ones.
        methods: Names and arguments of the methods.
    """

    name: str
    start: str
    fit: Mapping[str, Any]
    init_args: Mapping[str, Any]
    methods: tuple[tuple[str, Mapping[str, Any]], ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A resolved recipe: overrides applied, variables filled in, keys checked.

    Attributes:
        description: One line.
        seed: Of every random generator, per stage.
        variables: As written.
        model: The LightningModule.
        data: The LightningDataModule.
        trainer: Trainer arguments of every stage.
        stages: One or more.
        export: Arguments of ``export_onnx``; None exports nothing.
        validate: Arguments of ``validate_onnx``; None validates nothing.
    """

    description: str
    seed: int
    variables: Mapping[str, Any]
    model: ClassSpec
    data: ClassSpec
    trainer: Mapping[str, Any]
    stages: tuple[Stage, ...]
    export: Mapping[str, Any] | None
    validate: Mapping[str, Any] | None

    @property
    def dense(self) -> Stage | None:
        """The stage whose model is the reference: the last one on the way to the result with no method in or before it.

        Where the result is compressed from scratch, any such stage beside it; None if there is none.
        """
        candidates = self.lineage[:-1] or self.stages[:-1]
        free = [stage for stage in candidates if not any(earlier.methods for earlier in self.lineage_of(stage))]
        return free[-1] if free else None

    @property
    def lineage(self) -> tuple[Stage, ...]:
        """The stages that lead to the last one, first to last."""
        return self.lineage_of(self.stages[-1])

    def lineage_of(self, stage: Stage) -> tuple[Stage, ...]:
        """Return the stages that lead to one, itself included, first to last."""
        by_name = {stage.name: stage for stage in self.stages}
        line = [stage]
        while line[0].start != SCRATCH:
            line.insert(0, by_name[line[0].start])
        return tuple(line)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe in JSON types, in the form that :func:`parse` reads."""
        stages = [
            {
                "name": stage.name,
                "from": stage.start,
                "fit": dict(stage.fit),
                "init_args": dict(stage.init_args),
                "methods": [{name: dict(arguments)} for name, arguments in stage.methods],
            }
            for stage in self.stages
        ]
        return dataclasses.asdict(self) | {"stages": stages}

    def to_yaml(self) -> str:
        """Return the recipe as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)


def load(name: str, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe, apply overrides, and check every key that needs no class to be imported.

    Args:
        name: Path of a YAML file, or name of a shipped recipe.
        overrides: Dotted paths and their values as YAML text, in order.

    Returns:
        The recipe, resolved.

    Raises:
        RecipeError: If it cannot be read, or a key or value is not allowed; names key, value and remedy.
    """
    text, where = documents.find_recipe(name)
    content = documents.parse_yaml(text, where)
    if not isinstance(content, dict):
        raise RecipeError(f"{where} holds {type(content).__name__}, not keys with values. Keys are {', '.join(_KEYS)}.")
    content = apply_overrides(content, overrides)
    try:
        return parse(documents.interpolate(content))
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def apply_overrides(content: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the document with values from the command line.

    Args:
        content: The document; ``model`` and ``data`` that are bare class paths are spelled out first, so their arguments can be set.
        overrides: Dotted paths and YAML text.

    Raises:
        RecipeError: If a path leads nowhere or a value is not YAML.
    """
    changed = {key: _spelled_out(value) if key in ("model", "data") else value for key, value in content.items()}
    for path, text in overrides:
        value = documents.parse_yaml(text, f"--{path}")
        changed = documents.override(changed, path, _spelled_out(value) if path in ("model", "data") else value)
    return changed


def parse(content: Mapping[str, Any]) -> Recipe:
    """Check the keys and plain values of a document and return it as a recipe.

    Args:
        content: The document, interpolated.

    Raises:
        RecipeError: If a key is unknown or missing, or a value is of the wrong type.
    """
    _check_keys(content, _KEYS, "")
    for key in ("model", "stages"):
        if content.get(key) is None:
            raise RecipeError(f"the key {key!r} is missing. Add it, or give --{key} on the command line.")
    if content.get("data") is None:
        raise RecipeError(
            "the key 'data' is missing. Give the class path of a LightningDataModule, also as --data pkg.mod.DataModule."
        )
    seed = content.get("seed", 0)
    if type(seed) is not int or not 0 <= seed <= _MAX_SEED:
        raise RecipeError(f"seed is a whole number from 0 to {_MAX_SEED}, got {seed!r}.")
    description = content.get("description") or ""
    if not isinstance(description, str):
        raise RecipeError(f"description is text, got {description!r}.")
    export = _optional(content, "export")
    return Recipe(
        description=description,
        seed=seed,
        variables=_arguments(content.get("variables"), "variables"),
        model=class_spec(content["model"], "model"),
        data=class_spec(content["data"], "data"),
        trainer=_arguments(content.get("trainer"), "trainer"),
        stages=_stages(content["stages"]),
        export=export,
        validate=_optional(content, "validate") if export is not None else None,
    )


def class_spec(value: Any, where: str) -> ClassSpec:
    """Read ``pkg.mod.Class`` or ``{class_path: ..., init_args: {...}}``.

    Args:
        value: What stands in the document.
        where: Its key.

    Raises:
        RecipeError: If it is neither.
    """
    spelled = _spelled_out(value)
    if not isinstance(spelled, Mapping):
        raise RecipeError(f"{where} is a class path such as pkg.mod.Class, or class_path and init_args; got {value!r}.")
    _check_keys(spelled, _CLASS_KEYS, f"{where}.")
    path = spelled.get("class_path")
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")) or "." not in path:
        raise RecipeError(f"{where}.class_path is a name such as pkg.mod.Class, got {path!r}.")
    return ClassSpec(path, _arguments(spelled.get("init_args"), f"{where}.init_args"))


def _stages(value: Any) -> tuple[Stage, ...]:
    if not isinstance(value, list) or not value:
        raise RecipeError(f"stages is a list of at least one stage, each with a name; got {value!r}.")
    stages: list[Stage] = []
    for number, content in enumerate(value):
        stage = _stage(content, f"stages.{number}", [before.name for before in stages])
        if stage.name in {before.name for before in stages}:
            raise RecipeError(f"stages.{number}.name: {stage.name!r} is the name of an earlier stage. Names differ.")
        stages.append(stage)
    return tuple(stages)


def _stage(content: Any, where: str, earlier: Sequence[str]) -> Stage:
    if not isinstance(content, Mapping):
        raise RecipeError(f"{where} holds the keys {', '.join(_STAGE_KEYS)}; got {content!r}.")
    _check_keys(content, _STAGE_KEYS, f"{where}.")
    name = content.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == SCRATCH:
        raise RecipeError(f"{where}.name is made of letters, digits, '-' and '_' and is not {SCRATCH!r}; got {name!r}.")
    start = content.get("from") or (earlier[-1] if earlier else SCRATCH)
    if start not in (SCRATCH, *earlier):
        raise RecipeError(
            f"{where}.from: there is no earlier stage {start!r}. {did_you_mean(str(start), [SCRATCH, *earlier])}"
        )
    methods = content.get("methods") or []
    if not isinstance(methods, list):
        raise RecipeError(f"{where}.methods is a list such as [TRP: {{flops: 0.5}}], got {methods!r}.")
    return Stage(
        name=name,
        start=start,
        fit=_arguments(content.get("fit"), f"{where}.fit"),
        init_args=_arguments(content.get("init_args"), f"{where}.init_args"),
        methods=tuple(_method(method, f"{where}.methods.{number}") for number, method in enumerate(methods)),
    )


def _method(value: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise RecipeError(f"{where} is one method with its arguments, such as TRP: {{flops: 0.5}}; got {value!r}.")
    name, arguments = next(iter(value.items()))
    return str(name), _arguments(arguments, f"{where}.{name}")


def _optional(content: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    if key in content and content[key] is None:
        return None
    return _arguments(content.get(key), key)


def _arguments(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise RecipeError(f"{where} is a mapping of names to values, got {value!r}.")
    return dict(value)


def _check_keys(content: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in content:
        if key not in allowed:
            raise RecipeError(f"unknown key {where + str(key)!r}. {did_you_mean(str(key), allowed)}")


def _spelled_out(value: Any) -> Any:
    return {"class_path": value, "init_args": {}} if isinstance(value, str) else value
