"""Validate a compact ONNX file: the same data through torch, the dense and the compact file, side by side.

The outputs of the compact file are judged against torch (:mod:`lightning_prune.export.outputs`), its metric and its
latency against the dense file. Without a torch model the outputs cannot be judged; then the file must be, byte for byte
of its graph, what was exported.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_prune.export.latency import LatencySettings
from lightning_prune.export.metrics import MetricLike, TaskMetric
from lightning_prune.export.onnxfile import OnnxFile, read_onnx
from lightning_prune.export.outputs import Comparison
from lightning_prune.export.passes import Seen, measure, run_data
from lightning_prune.export.report import Report
from lightning_prune.export.runtime import Provider, Session, open_session
from lightning_prune.export.verdict import Asked, judge
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from lightning_prune.errors import ExportError, OptionError


def validate_onnx(
    path: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None = None,
    *,
    dataloader: Iterable[Any],
    model: nn.Module | None = None,
    metric: MetricLike | None = None,
    provider: Provider = "auto",
    require_gpu: bool = False,
    max_drop: float | None = None,
    min_speedup: float | None = None,
    latency: LatencySettings | None = None,
    tolerance: float = 1e-5,
    limit_batches: int | None = None,
    progress: bool = True,
    exhibits: Sequence[Mapping[str, Any]] = (),
    extra: Mapping[str, Any] | None = None,
) -> Report:
    """Run a compact ONNX file beside the dense one and beside torch, on the same data and machine.

    Args:
        path: The compact file.
        reference: The dense file; without it nothing is compared with dense.
        dataloader: Batches ``inputs``, ``(inputs, target)`` or dicts with the names of the inputs.
        model: The compact torch model, which the outputs are judged against; left bit-identical. None judges no
            outputs.
        metric: A torchmetrics metric, a function that makes one, or a name such as ``"accuracy"``; needs targets, and
            reads the first output.
        provider: ``"auto"`` takes CUDA where it loads, ``"cuda"`` the same, ``"cpu"`` never tries.
        require_gpu: Whether anything but CUDA is an error.
        max_drop: Gate: by how much the metric may be worse than that of the dense file, absolute.
        min_speedup: Gate: least median of the paired latency ratios, at every batch size measured.
        latency: Batch sizes, runs and rounds; None takes the defaults of :class:`LatencySettings`.
        tolerance: Difference to torch, relative to the output's largest value, that is always taken for rounding.
        limit_batches: Number of batches; None takes all.
        progress: Whether to show bars on the error stream.
        exhibits: What methods have to show, for the report: ``title``, ``text``, ``rows``, ``picture`` (PNG in base64, or None) each.
        extra: Recipe and provenance for the report.

    Returns:
        The report; ``passed`` is False if the outputs are not those of torch, are not finite, or a gate is missed.

    Raises:
        ExportError: If a file cannot be read or run, or the data do not fit it.
        OptionError: If an argument is out of range, or a gate lacks what it compares with.
        RuntimeMissingError: If there is no usable onnxruntime, or no CUDA where it is required.
    """
    _check_options(reference, metric, max_drop, min_speedup, tolerance, limit_batches)
    settings = latency or LatencySettings()
    files = {"compact": read_onnx(path)} | ({"dense": read_onnx(reference)} if reference is not None else {})
    _check_same_inputs(files)

    def sessions() -> dict[str, Session]:
        return {
            name: open_session(file.path, provider, require_gpu=require_gpu, threads=settings.threads)
            for name, file in reversed(files.items())
        }

    opened = sessions()
    seen = Seen(Comparison(tolerance), TaskMetric(metric) if metric is not None else None)
    with _bars(progress) as bars:
        run_data(opened, model, dataloader, seen, bars, limit_batches)
        measured = measure(sessions, seen.first, files["compact"], settings, bars)
    asked = Asked(provider, require_gpu, max_drop, min_speedup, tuple(exhibits), dict(extra or {}))
    return judge(files, opened["compact"], seen, measured, model, asked)


def _check_options(
    reference: object,
    metric: object,
    max_drop: float | None,
    min_speedup: float | None,
    tolerance: float,
    limit: int | None,
) -> None:
    gates = {"max_drop": max_drop, "min_speedup": min_speedup}
    for name, value in gates.items():
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        ):
            raise OptionError(f"{name} is a finite number or None; got {value!r}.")
        if value is not None and reference is None:
            raise OptionError(f"{name} compares with the dense model. Give reference, the dense ONNX file.")
    if max_drop is not None and metric is None:
        raise OptionError("max_drop needs a metric, e.g. metric='accuracy'.")
    if min_speedup is not None and min_speedup <= 0:
        raise OptionError(f"min_speedup is above 0; got {min_speedup!r}. 1.5 asks for 1.5 times the dense speed.")
    if not isinstance(tolerance, int | float) or not 0 < tolerance < 1:
        raise OptionError(f"tolerance lies between 0 and 1; got {tolerance!r}.")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise OptionError(f"limit_batches is a whole number of at least 1, or None; got {limit!r}.")


def _check_same_inputs(files: Mapping[str, OnnxFile]) -> None:
    compact, dense = files["compact"], files.get("dense", files["compact"])
    described = [[(port.name, port.dtype, port.shape[1:]) for port in file.inputs] for file in (dense, compact)]
    if described[0] != described[1]:
        texts = ["; ".join(map(str, file.inputs)) for file in (dense, compact)]
        raise ExportError(
            f"{str(compact.path)!r} has the inputs {texts[1]}, the reference {str(dense.path)!r} has {texts[0]}. "
            "Compare files of the same model."
        )


def _bars(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show, transient=True)
