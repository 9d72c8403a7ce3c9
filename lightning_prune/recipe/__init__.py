"""Recipes: dense to validated ONNX file as one YAML document.

:func:`load` reads and checks one without importing torch; :func:`run` and :func:`resume` are imported when they are first used.
"""

import importlib
from typing import Any

from lightning_prune.recipe.document import shipped
from lightning_prune.recipe.schema import Recipe, load

_HOME = {
    "Outcome": "lightning_prune.recipe.runner",
    "resume": "lightning_prune.recipe.runner",
    "run": "lightning_prune.recipe.runner",
}
__all__ = ["Outcome", "Recipe", "load", "resume", "run", "shipped"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
