"""Two schemas without which torchvision cannot be imported beside a torch that was built without CUDA.

PyPI has torchvision only as built for CUDA. Its compiled operators cannot be loaded without CUDA's libraries, and ``import torchvision``
then fails on the first of them, and with it ``import pytorch_lightning``, because torchmetrics imports torchvision where it is installed.
With the schemas defined everything works but these operators themselves.
"""

import contextlib
import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a schema lives as long as its library


def define_schemas() -> None:
    """Define what ``import torchvision`` needs, unless its own operators can be loaded or it is not installed."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    with contextlib.suppress(OSError):
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
