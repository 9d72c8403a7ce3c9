"""The one place that knows there are two Lightning packages, ``pytorch_lightning`` and ``lightning.pytorch``.

They are separate copies of the same code: a callback of either runs in the Trainer of the other, but LightningCLI accepts only
callbacks that are subclasses of its own, and modules do not cross. :class:`Callback` therefore inherits from each package that is
installed, and everything else is reached through the Trainer or the module at hand.
"""

import importlib
import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_prune.errors import ModelError

PACKAGES = ("pytorch_lightning", "lightning.pytorch")


def _installed() -> list[ModuleType]:
    found = [name for name in PACKAGES if _is_installed(name)]
    if not found:
        raise ModuleNotFoundError("lightning_prune needs pytorch-lightning or lightning: pip install pytorch-lightning")
    return [importlib.import_module(name) for name in found]


def _is_installed(name: str) -> bool:
    """The parent alone does not count: a project may keep its own code in a folder ``lightning``."""
    parent = name.partition(".")[0]
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(name) is not None


if TYPE_CHECKING:
    from pytorch_lightning import Callback as Callback  # noqa: PLC0414 - re-exported, mypy wants it said
else:
    Callback = type("Callback", tuple(package.Callback for package in _installed()), {"__module__": __name__})
    Callback.__doc__ = "Base of our callbacks: a Callback of every installed Lightning package."


def package_of(module: Any) -> ModuleType:
    """Return the Lightning package whose Trainer fits a LightningModule.

    Args:
        module: A LightningModule or a class of them.

    Raises:
        ModelError: If it is no LightningModule.
    """
    kind = module if isinstance(module, type) else type(module)
    for package in _installed():
        if issubclass(kind, package.LightningModule):
            return package
    raise ModelError(
        f"{kind.__module__}.{kind.__qualname__} is no LightningModule. Give a class that inherits from one."
    )


def is_lightning_module(module: Any) -> bool:
    """Return whether ``module`` (or the class) is a LightningModule of either package."""
    kind = module if isinstance(module, type) else type(module)
    return any(issubclass(kind, package.LightningModule) for package in _installed())
