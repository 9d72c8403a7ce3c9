"""A recipe as text and as nested dicts and lists: reading, overriding by dotted path, interpolating ``${variables.NAME}``.

The YAML loader is the safe one and stricter: a tag that names a Python object is an error before anything is built, and so is a key that
stands twice in one mapping.
"""

import copy
import importlib.resources
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.errors import RecipeError
from lightning_prune.recipe.words import did_you_mean

_VARIABLE = re.compile(r"\$\{([^{}]*)\}")
# YAML 1.1, which PyYAML follows, takes 1e-3 for text; here it is a number, as in YAML 1.2.
_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Safe, JSON types only, no key twice, exponents without a point are numbers."""


_TYPES = ("null", "bool", "int", "float", "str", "seq", "map", "merge", "value")
_Loader.yaml_constructors = {
    tag: build
    for tag, build in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _TYPES
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] in _TYPES]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool):
            raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML without running anything that it names.

    Args:
        text: The YAML.
        where: What it is called in messages.

    Returns:
        Dicts, lists, texts, numbers, booleans and None.

    Raises:
        RecipeError: If it is not YAML, carries a tag such as ``!!python/object``, or has a key twice.
    """
    try:
        content = yaml.load(text, Loader=_Loader)
        json.dumps(content)  # an anchor inside itself
        return content
    except yaml.constructor.ConstructorError as error:
        problem = str(error.problem)
        if "could not determine a constructor" in problem:
            tag = problem.rpartition("tag ")[2].strip("'\"")
            raise RecipeError(
                f"{where}{_place(error)}: the YAML tag {tag!r} is not allowed and nothing was executed. Write plain values."
            ) from error
        raise RecipeError(f"{where}{_place(error)}: {problem}. Correct the YAML.") from error
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{where}{_place(error)} is not YAML: {problem}. Correct that line.") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where} is not YAML that can be read: {error}.") from error


def find_recipe(name: str) -> tuple[str, str]:
    """Read a recipe by path or, if there is no such file, by the name of a shipped one.

    Args:
        name: A path, or a name such as ``digits-trp.yaml``; the suffix may be missing.

    Returns:
        The text, and what to call it in messages.

    Raises:
        RecipeError: If there is none, it is a folder, or it cannot be read.
    """
    path = Path(name)
    if path.is_dir():
        raise RecipeError(
            f"Recipe {name!r} is a folder. Give a YAML file, or the name of one of: {', '.join(shipped())}."
        )
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8"), f"Recipe {name!r}"
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"Recipe {name!r} cannot be read: {reason}. Give a YAML file.") from error
    names = shipped()
    wanted = name if name.endswith(".yaml") else f"{name}.yaml"
    if wanted in names:
        return (importlib.resources.files("lightning_prune.recipes") / wanted).read_text(
            encoding="utf-8"
        ), f"Recipe {wanted!r}"
    raise RecipeError(
        f"Recipe {name!r}: there is no such file, and no shipped recipe of that name. {did_you_mean(wanted, names)}"
    )


def shipped() -> list[str]:
    """Return the names of the recipes that come with the package; those with the settings of papers are in ``paper/``, last."""
    top = importlib.resources.files("lightning_prune.recipes")
    found = {"": top, "paper/": top / "paper"}
    return [
        f"{at}{name}"
        for at, folder in found.items()
        for name in sorted(e.name for e in folder.iterdir())
        if name.endswith(".yaml")
    ]


def override(document: Any, path: str, value: Any) -> Any:
    """Return the document with the value at a dotted path replaced; mappings on the way are made where they are missing.

    Args:
        document: Dicts and lists.
        path: Keys and, in lists, numbers from 0: ``stages.1.methods.0.TRP.flops``.
        value: What to put there.

    Raises:
        RecipeError: If the path leads through a plain value or past the end of a list.
    """
    changed = copy.deepcopy(document)
    here, keys = changed, path.split(".")
    if not all(keys):
        raise RecipeError(f"--{path}: a dotted path has a name between its points, e.g. --trainer.accelerator gpu.")
    for depth, key in enumerate(keys):
        last, done = depth == len(keys) - 1, ".".join(keys[:depth]) or "the recipe"
        if isinstance(here, list):
            at = _index(here, key, path, done)
            if last:
                here[at] = value
            else:
                here[at] = here = {} if here[at] is None else here[at]
        elif isinstance(here, dict):
            if last:
                here[key] = value
            else:
                following = here.get(key)
                here[key] = here = {} if following is None else following
        else:
            raise RecipeError(f"--{path}: {done} is {here!r}, which has no part {key!r}.")
    return changed


def interpolate(document: Mapping[str, Any]) -> dict[str, Any]:
    """Replace every ``${variables.NAME}`` by the variable; one that is the whole value keeps its type.

    Args:
        document: The recipe; ``variables`` holds plain values.

    Raises:
        RecipeError: If a reference is to something else, or to no variable.
    """
    variables = document.get("variables") or {}
    if not isinstance(variables, Mapping):
        raise RecipeError(f"variables is a mapping of names to values, got {variables!r}.")

    def look_up(reference: str) -> Any:
        scope, _, name = reference.partition(".")
        if scope != "variables" or not name:
            raise RecipeError(f"${{{reference}}}: only ${{variables.NAME}} can be referred to.")
        if name not in variables:
            raise RecipeError(
                f"${{{reference}}}: there is no variable {name!r}. {did_you_mean(name, map(str, variables))}"
            )
        return variables[name]

    def fill(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: fill(item) for key, item in value.items()}
        if isinstance(value, list):
            return [fill(item) for item in value]
        if not isinstance(value, str):
            return value
        whole = _VARIABLE.fullmatch(value)
        return copy.deepcopy(look_up(whole[1])) if whole else _VARIABLE.sub(lambda match: str(look_up(match[1])), value)

    if any(_VARIABLE.search(text) for text in _texts(variables)):
        raise RecipeError("A variable cannot refer to another variable. Write its value.")
    return {key: item if key == "variables" else fill(item) for key, item in document.items()}


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping | list):
        return [text for item in (value.values() if isinstance(value, Mapping) else value) for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def _index(here: list[Any], key: str, path: str, done: str) -> int:
    if not key.isdecimal() or int(key) >= len(here):
        allowed = f"give a number from 0 to {len(here) - 1}" if here else "it is empty"
        raise RecipeError(f"--{path}: {done} is a list of {len(here)}; got {key!r}, {allowed}.")
    return int(key)


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark is not None else ""
