"""From names and arguments in a recipe to classes and objects, everything checked before anything runs.

Arguments are checked against the signature of what they go to, types by jsonargparse. Classes of the user come from where the user's text says;
methods come only from the export list of :mod:`lightning_prune.methods`, metrics only from torchmetrics.
"""

import argparse
import contextlib
import importlib
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_prune.errors import LightningPruneError, OptionError, RecipeError
from lightning_prune.recipe.schema import ClassSpec
from lightning_prune.recipe.words import did_you_mean, one_line

# What a user's module or constructor may raise; the user's own message is passed on in one line.
USER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
_KEY = "arguments"


def import_class(path: str, where: str) -> type[Any]:
    """Import ``pkg.mod.Class``, the working directory being searched too.

    Args:
        path: Dotted name.
        where: Which key or option names it, for messages.

    Raises:
        RecipeError: If there is no such module or class, or the module fails while it is imported (its own error is told).
    """
    module_name, _, name = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        raise RecipeError(f"{where}: {path!r} is no class path. Give a name such as pkg.mod.Class.")
    with _searching_here():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            missing = str(error.name)
            if module_name != missing and not module_name.startswith(f"{missing}."):
                raise RecipeError(
                    f"{where}: importing {module_name!r} failed: {one_line(error)}. Install it."
                ) from error
            raise RecipeError(f"{where}: there is no module {missing!r}. {_near_module(missing)}") from error
        except USER_ERRORS as error:
            raise RecipeError(
                f"{where}: importing {module_name!r} failed: {one_line(error)}{_line_of(error)}. Correct it."
            ) from error
    found = getattr(module, name, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise RecipeError(f"{where}: module {module_name!r} has no class {name!r}. {did_you_mean(name, classes)}")
    if not isinstance(found, type):
        raise RecipeError(f"{where}: {path!r} is a {type(found).__name__}, not a class. Give the path of a class.")
    return found


def model_class(path: str, where: str = "model") -> type[Any]:
    """Import a LightningModule class.

    Raises:
        RecipeError: If it is none, or as :func:`import_class`.
    """
    from lightning_prune._lightning import is_lightning_module

    found = import_class(path, where)
    if not is_lightning_module(found):
        raise RecipeError(f"{where}: {path} is no LightningModule. Give a class that inherits from one.")
    return found


def data_class(path: str, where: str = "data") -> type[Any]:
    """Import a LightningDataModule class.

    Raises:
        RecipeError: If it is none, or as :func:`import_class`.
    """
    found = import_class(path, where)
    if not any(base.__name__ == "LightningDataModule" for base in found.__mro__[1:]):
        raise RecipeError(f"{where}: {path} is no LightningDataModule. Give a class that inherits from one.")
    return found


def metric(value: Any, where: str) -> Any:
    """Return the task metric that a recipe names.

    Args:
        value: A short name that the validation knows (``"accuracy"``), the name of a torchmetrics class, or ``{name: {arguments}}``; a name in
            snake case stands for the class in camel case.
        where: Its key, for messages.

    Returns:
        The short name, or the torchmetrics metric.

    Raises:
        RecipeError: If there is no such metric, or it does not take the arguments.
    """
    import torchmetrics

    from lightning_prune.export.metrics import TaskMetric

    if isinstance(value, Mapping) and len(value) == 1:
        name, arguments = next(iter(value.items()))
    else:
        name, arguments = value, None
    if not isinstance(name, str) or not isinstance(arguments, Mapping | None):
        raise RecipeError(
            f"{where} is the name of a metric, or its name with arguments: accuracy: {{task: binary}}; got {value!r}."
        )
    if not arguments:
        with contextlib.suppress(OptionError):
            TaskMetric(name)
            return name
    names = {key for key in torchmetrics.__all__ if isinstance(getattr(torchmetrics, key, None), type)}
    camel = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    known = name if name in names else camel
    if known not in names:
        raise RecipeError(
            f"{where}: there is no metric {name!r}. {did_you_mean(name, names | {'accuracy', 'f1', 'mse', 'mae'})}"
        )
    try:
        return getattr(torchmetrics, known)(**(arguments or {}))
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={item!r}" for key, item in (arguments or {}).items())
        raise RecipeError(f"{where}: torchmetrics.{known}({given}) is not possible: {one_line(error)}") from error


def method(name: str, arguments: Mapping[str, Any], where: str) -> Any:
    """Construct a method from our export list.

    Raises:
        RecipeError: If there is no such method, or it does not take the arguments.
    """
    from lightning_prune import methods

    if name not in methods.__all__:
        raise RecipeError(f"{where}: there is no method {name!r}. {did_you_mean(name, methods.__all__)}")
    return construct(getattr(methods, name), arguments, f"{where}.{name}")


def module(spec: ClassSpec, where: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """Construct the model (``where`` is ``"model"``) or the data module that a recipe names."""
    found = model_class(spec.class_path, where) if where == "model" else data_class(spec.class_path, where)
    return construct(found, {**spec.init_args, **(overrides or {})}, f"{where}.init_args")


def construct(target: Callable[..., Any], arguments: Mapping[str, Any], where: str, skip: Collection[str] = ()) -> Any:
    """Check arguments and call ``target`` with them.

    Args:
        target: A class or function.
        arguments: What to call it with.
        where: The key that holds the arguments, for messages.
        skip: Parameters that may not be set there.

    Raises:
        RecipeError: If an argument is unknown, missing, of the wrong type or refused by ``target``.
    """
    values = checked(target, arguments, where, skip)
    try:
        return target(**values)
    except LightningPruneError as error:
        raise RecipeError(f"{where}: {error}") from error
    except USER_ERRORS as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        name = getattr(target, "__name__", "it")
        raise RecipeError(
            f"{where}: {name}({given}) failed: {one_line(error)}{_line_of(error)}. Correct the arguments."
        ) from error


def checked(
    target: Callable[..., Any], arguments: Mapping[str, Any], where: str, skip: Collection[str] = ()
) -> dict[str, Any]:
    """Check arguments against the signature of ``target``.

    Args:
        target: A class or function.
        arguments: Plain values.
        where: The key that holds them, for messages.
        skip: Parameters that may not be set there.

    Returns:
        The arguments, converted to the annotated types where these are not plain (paths, enumerations, nested classes).

    Raises:
        RecipeError: If a name is unknown or missing, or a value is of the wrong type.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add: Any = parser.add_class_arguments if isinstance(target, type) else parser.add_function_arguments
    extra = {"instantiate": False} if isinstance(target, type) else {}
    try:
        add(target, _KEY, fail_untyped=False, skip=set(skip), sub_configs=False, **extra)
    except ValueError as error:
        raise RecipeError(
            f"{where}: the signature of {getattr(target, '__name__', target)} cannot be read: {one_line(error)}"
        ) from error
    names = {action.dest.split(".")[1] for action in parser._actions if action.dest.startswith(f"{_KEY}.")}
    for key in arguments:
        if key not in names:
            raise RecipeError(f"unknown key {f'{where}.{key}'!r}. {did_you_mean(key, names)}")
    if not names:
        return {}
    try:
        parsed = parser.parse_object({_KEY: dict(arguments)})
        instantiate: Any = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.4x
        values = instantiate(parsed)[_KEY]
    except (argparse.ArgumentError, ImportError, TypeError, ValueError) as error:
        raise RecipeError(_explain(str(error), arguments, where)) from error
    plain = bool | int | float | None
    return {key: given if isinstance(given, plain) else values[key] for key, given in arguments.items()}


def _explain(text: str, arguments: Mapping[str, Any], where: str) -> str:
    """Turn jsonargparse's complaint, several lines long, into one sentence."""
    found = re.search(rf"{_KEY}\.([A-Za-z0-9_.]+)", text)
    key = found[1] if found else ""
    name = f"{where}.{key}" if key else where
    if "required" in text or "is not included" in text:
        return f"{where}: the argument {key!r} is missing. Add {name}."
    expected = dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\. Got value|\n|$)", text))
    allowed = " or ".join(_plain_type(kind) for kind in expected)
    if key.partition(".")[0] in arguments and allowed:
        return f"{name} is {allowed}; got {arguments[key.partition('.')[0]]!r}."
    return f"{name}: {' '.join(text.split())}"


def _plain_type(text: str) -> str:
    if (klass := re.fullmatch(r"<class '(.+)'>", text)) is not None:
        return {"NoneType": "null", "str": "text", "dict": "a mapping", "list": "a list"}.get(klass[1], klass[1])
    literal = re.fullmatch(r"typing\.Literal\[(.+)\]", text)
    return f"one of {literal[1]}" if literal is not None else text.replace("typing.", "")


@contextlib.contextmanager
def _searching_here() -> Iterator[None]:
    """Search the working directory for modules, as ``python -m`` does, while the block runs and for what it imports later."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    yield


def _near_module(missing: str) -> str:
    parent, _, last = missing.rpartition(".")
    try:
        paths = importlib.import_module(parent).__path__ if parent else [str(Path.cwd())]
    except (*USER_ERRORS,):
        return "Check the name; modules are searched in the working directory and in installed packages."
    near = [info.name for info in pkgutil.iter_modules(paths)]
    hint = did_you_mean(last, near)
    return (
        hint
        if hint.startswith("Did")
        else "Check the name; modules are searched in the working directory and in installed packages."
    )


def _line_of(error: BaseException) -> str:
    """Return where in the user's code an exception arose."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    own = [frame for frame in frames if Path(frame.filename).name != Path(__file__).name]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
