"""Model compression for PyTorch Lightning: from a dense LightningModule to a physically smaller one and a validated ONNX file.

The public names are imported when they are first used, so ``import lightning_prune`` loads neither torch nor Lightning.
"""

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Compression": "lightning_prune.callback",
    "compress": "lightning_prune.callback",
    "count_flops": "lightning_prune.flops",
    "load_from_checkpoint": "lightning_prune.checkpoint",
    "explain": "lightning_prune.explanation",
    "GSM": "lightning_prune.methods",
    "GReg": "lightning_prune.methods",
    "GraSP": "lightning_prune.methods",
    "IncReg": "lightning_prune.methods",
    "KFE": "lightning_prune.methods",
    "LossModel": "lightning_prune.methods",
    "LowRank": "lightning_prune.methods",
    "MPO": "lightning_prune.methods",
    "Magnitude": "lightning_prune.methods",
    "OptimalBrain": "lightning_prune.methods",
    "PFP": "lightning_prune.methods",
    "Plan": "lightning_prune.structure.plan",
    "Random": "lightning_prune.methods",
    "SNIP": "lightning_prune.methods",
    "SPP": "lightning_prune.methods",
    "SiPP": "lightning_prune.methods",
    "SynFlow": "lightning_prune.methods",
    "TRP": "lightning_prune.methods",
}
__all__ = list(_HOME)

# In a checkout, `export/` and `recipes/` stand beside this package; an installed wheel holds them inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "export" / "__init__.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
