"""The machine that figures were measured on."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
from lightning_prune.export.optional import version_of

import lightning_prune

_CPUINFO = Path("/proc/cpuinfo")
_DISTRIBUTIONS = ("torch", "onnx", "onnxruntime-gpu", "onnxruntime", "pytorch-lightning", "lightning", "numpy")


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, system, GPU and versions in JSON types."""
    versions = {name: version_of(name) for name in _DISTRIBUTIONS}
    return {
        "cpu": _cpu_model(),
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {"lightning-prune": lightning_prune.__version__}
        | {name: version for name, version in versions.items() if version},
    }


def physical_cores() -> int:
    """Return the number of physical cores that this process may use; logical ones where the system does not tell."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_core(processor) for processor in _processors() if int(processor.get("processor", -1)) in allowed}
    return len(cores) or len(allowed)


def _core(processor: dict[str, str]) -> tuple[str | None, ...]:
    if "core id" not in processor:
        return (processor["processor"],)
    return processor.get("physical id"), processor["core id"]


def _cpu_model() -> str:
    names = (processor.get("model name") for processor in _processors())
    return next((name for name in names if name), platform.processor() or platform.machine())


def _processors() -> list[dict[str, str]]:
    """Read ``/proc/cpuinfo``: one dict per logical processor; empty where there is none."""
    try:
        text = _CPUINFO.read_text()
    except OSError:
        return []
    blocks = [block.splitlines() for block in text.split("\n\n") if block.strip()]
    pairs = [[line.partition(":")[::2] for line in block if ":" in line] for block in blocks]
    return [{key.strip(): value.strip() for key, value in block} for block in pairs]
