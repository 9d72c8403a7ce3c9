"""From a torch model to an ONNX file that is shown to be right: export, validation and the report. Alone knows ONNX.

The names are imported when they are first used: importing this package needs neither onnx nor onnxruntime.
"""

import importlib
from typing import Any

_HOME = {
    "ExportedFile": "lightning_prune.export.onnx",
    "LatencySettings": "lightning_prune.export.latency",
    "OnnxFile": "lightning_prune.export.onnxfile",
    "Report": "lightning_prune.export.report",
    "export_onnx": "lightning_prune.export.onnx",
    "open_session": "lightning_prune.export.runtime",
    "read_onnx": "lightning_prune.export.onnxfile",
    "validate_onnx": "lightning_prune.export.validate",
}
__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
