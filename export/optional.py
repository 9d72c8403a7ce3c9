"""Libraries that export needs and training does not, imported with an error that names the extra to install."""

import importlib
import importlib.metadata
from types import ModuleType

from lightning_prune.errors import RuntimeMissingError

EXTRAS = (
    "pip install 'lightning-prune[onnxruntime-gpu]' (or 'lightning-prune[onnxruntime]' on a machine without NVIDIA GPU)"
)


def need(name: str, purpose: str) -> ModuleType:
    """Import ``name`` or say which extra brings it.

    Args:
        name: Module to import, e.g. ``"onnx"``.
        purpose: What it is needed for, as the subject of a sentence: ``"Exporting to ONNX"``.

    Returns:
        The module.

    Raises:
        RuntimeMissingError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise RuntimeMissingError(
            f"{purpose} needs {name}, which is not installed ({error.name} is missing). Run: {EXTRAS}."
        ) from error


def version_of(distribution: str) -> str | None:
    """Return the installed version of ``distribution``, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
