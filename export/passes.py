"""One pass of the data through torch, the dense and the compact file; then their latency, timed in turn."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import numpy as np
from lightning_prune.export.batches import Batch, read_batches
from lightning_prune.export.inputs import read_inputs, read_outputs
from lightning_prune.export.latency import LatencySettings, speedup, summarize, time_round
from lightning_prune.export.metrics import TaskMetric
from lightning_prune.export.onnxfile import OnnxFile
from lightning_prune.export.outputs import Arrays, Comparison, agreement, as_arrays, non_finite, rounding
from lightning_prune.export.runtime import Session
from lightning_prune.export.twin import cpu_twin, run
from rich.progress import Progress, TaskID
from torch import nn


@dataclasses.dataclass
class Seen:
    """What one pass over the data gave.

    Attributes:
        comparison: Differences of the compact file to torch.
        metric: The task metric of every model; None if none was asked for.
        first: Inputs of the first batch.
        batches: Number of batches.
        examples: Number of examples.
        agreed: Number of equal decisions of dense and compact.
        decisions: Number of decisions that were compared.
        non_finite: Number of outputs that are not finite, by model.
    """

    comparison: Comparison
    metric: TaskMetric | None
    first: Arrays = dataclasses.field(default_factory=dict)
    batches: int = 0
    examples: int = 0
    agreed: int = 0
    decisions: int = 0
    non_finite: dict[str, int] = dataclasses.field(default_factory=dict)


def run_data(
    sessions: Mapping[str, Session],
    model: nn.Module | None,
    loader: Iterable[Any],
    seen: Seen,
    bars: Progress,
    limit: int | None,
) -> None:
    """Run every batch through all models and collect in ``seen`` what they give.

    Args:
        sessions: ``compact`` and, with a reference, ``dense``.
        model: The torch model; None leaves it out.
        loader: The data.
        seen: Filled.
        bars: Shows the progress.
        limit: Number of batches; None takes all.

    Raises:
        ExportError: If the data do not fit the files or the model.
        OptionError: If the metric does not take the outputs or targets.
    """
    names = [port.name for port in sessions["compact"].inputs]
    twin = cpu_twin(model) if model is not None else None
    task = bars.add_task("validating batches", total=_length(loader, limit))
    for batch in read_batches(loader, names, limit):
        feeds = as_arrays(batch.feeds)
        results = {name: session.run(feeds) for name, session in sessions.items()}
        if twin is not None:
            results["torch"] = _compare(twin, batch, results["compact"], seen)
        for name, arrays in results.items():
            first = next(iter(arrays.values()))
            seen.non_finite[name] = seen.non_finite.get(name, 0) + sum(map(non_finite, arrays.values()))
            if seen.metric is not None:
                seen.metric.update(name, first, batch.target)
        if "dense" in results:
            pair = (next(iter(results[name].values())) for name in ("dense", "compact"))
            equal, decisions = agreement(*pair)
            seen.agreed, seen.decisions = seen.agreed + equal, seen.decisions + decisions
        seen.first = seen.first or feeds
        seen.batches, seen.examples = seen.batches + 1, seen.examples + _rows(feeds)
        bars.advance(task)


def _compare(twin: nn.Module, batch: Batch, found: Arrays, seen: Seen) -> Arrays:
    inputs = read_inputs(twin, batch.example).map(lambda tensor: tensor.detach().cpu())
    expected = as_arrays(read_outputs(run(twin, inputs), inputs.tensors, type(twin).__name__))
    seen.comparison.add(expected, found)
    if not seen.batches:
        seen.comparison.allow(rounding(twin, inputs, expected))
    return expected


def measure(
    sessions: Callable[[], dict[str, Session]], first: Arrays, file: OnnxFile, settings: LatencySettings, bars: Progress
) -> list[dict[str, Any]]:
    """Time dense and compact in turn; every round opens sessions of its own.

    Args:
        sessions: Opens them.
        first: Inputs of the first batch, whose rows are repeated to the batch sizes.
        file: The compact file; a batch size that it fixes is the only one measured.
        settings: Batch sizes, runs, rounds.
        bars: Shows the progress.

    Returns:
        Per batch size ``batch``, the latency of each model and their ``speedup``, in JSON types.
    """
    fixed = [port.shape[0] for port in file.inputs if port.shape and isinstance(port.shape[0], int)]
    free = any(port.shape and not isinstance(port.shape[0], int) for port in file.inputs)
    sizes = list(settings.batch_sizes) if free else [int(fixed[0]) if fixed else 1]
    task: TaskID = bars.add_task("measuring latency", total=len(sizes) * settings.rounds)
    times: dict[int, dict[str, list[np.ndarray[Any, Any]]]] = {size: {} for size in sizes}
    for _ in range(settings.rounds):
        opened = sessions()
        for size in sizes:
            feeds = {port.name: _resized(first[port.name], port.shape, size) for port in file.inputs}
            bound = {name: session.bind(feeds) for name, session in opened.items()}
            for name, values in time_round(bound, settings.warmup, settings.runs).items():
                times[size].setdefault(name, []).append(values)
            bars.advance(task)
    return [
        {
            "batch": size,
            **{name: summarize(rounds) for name, rounds in by_name.items()},
            "speedup": speedup(by_name["dense"], by_name["compact"]) if "dense" in by_name else None,
        }
        for size, by_name in times.items()
    ]


def _resized(array: np.ndarray[Any, Any], shape: tuple[Any, ...], size: int) -> np.ndarray[Any, Any]:
    return array if not shape or isinstance(shape[0], int) else array[np.arange(size) % len(array)]


def _rows(feeds: Arrays) -> int:
    return next((array.shape[0] for array in feeds.values() if array.ndim), 1)


def _length(loader: Iterable[Any], limit: int | None) -> int | None:
    length = len(loader) if isinstance(loader, Sized) else None
    return length if limit is None else min(limit, length if length is not None else limit)
