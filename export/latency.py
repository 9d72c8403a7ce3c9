"""Latency of several functions, interleaved in one process, with an honest statement about their ratio.

Per round (a fresh session each) the functions are warmed up and then timed in turn, the order alternating, so that
whatever else the machine does hits all of them alike. The speed-up is the median of the paired ratios. Its interval is
the distribution-free one (order statistics, 95 %) over medians of blocks of consecutive pairs, widened to the medians
of the rounds: neighbouring runs are not independent. A difference below 5 % is not claimed.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_prune.errors import OptionError

CLAIM = 0.05
_BLOCK = 10
_Z95 = 1.959964

Runs = Mapping[str, Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class LatencySettings:
    """How latency is measured.

    Attributes:
        batch_sizes: Batch sizes to measure; a file with a fixed batch is measured at that.
        warmup: Runs before timing, per function and round.
        runs: Timed runs per function and round.
        rounds: Rounds, each with sessions of its own.
        threads: Threads inside an operator; None takes the number of physical cores.
    """

    batch_sizes: tuple[int, ...] = (1,)
    warmup: int = 20
    runs: int = 200
    rounds: int = 3
    threads: int | None = None

    def __post_init__(self) -> None:
        least = {"warmup": 0, "runs": 1, "rounds": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < lowest:
                raise OptionError(f"latency.{name} is a whole number of at least {lowest}; got {value!r}.")
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise OptionError(f"latency.threads is a whole number of at least 1, or None; got {self.threads!r}.")
        if not self.batch_sizes or any(type(size) is not int or size < 1 for size in self.batch_sizes):
            raise OptionError(f"latency.batch_sizes are whole numbers of at least 1; got {self.batch_sizes!r}.")


def time_round(
    functions: Runs, warmup: int, runs: int, clock: Callable[[], int] = time.perf_counter_ns
) -> dict[str, np.ndarray[Any, Any]]:
    """Time functions in turn.

    Args:
        functions: What to call, by name.
        warmup: Calls of each before timing.
        runs: Timed calls of each.
        clock: Nanoseconds, monotonic.

    Returns:
        Milliseconds by name, ``[runs]``; entry ``i`` of all of them belongs together.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[int]] = {name: [] for name in functions}
    order = list(functions.items())
    for _ in range(runs):
        for name, function in order:
            start = clock()
            function()
            times[name].append(clock() - start)
        order.reverse()
    return {name: np.asarray(values, dtype=np.float64) / 1e6 for name, values in times.items()}


def summarize(rounds: Sequence[np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Describe the latency of one function.

    Args:
        rounds: Milliseconds, ``[runs]`` per round.

    Returns:
        In JSON types, milliseconds: ``p50 p90 p99 iqr mean``, ``runs``, the ``p50`` of every round, and 101
        ``quantiles``.
    """
    times = np.concatenate(list(rounds))
    quantiles = np.percentile(times, np.arange(101))
    return {
        "p50": float(quantiles[50]),
        "p90": float(quantiles[90]),
        "p99": float(quantiles[99]),
        "iqr": float(quantiles[75] - quantiles[25]),
        "mean": float(times.mean()),
        "runs": int(times.size),
        "rounds": [float(np.median(values)) for values in rounds],
        "quantiles": [float(value) for value in quantiles],
    }


def speedup(reference: Sequence[np.ndarray[Any, Any]], compact: Sequence[np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Compare two functions that were timed in turn.

    Args:
        reference: Milliseconds of the dense model, ``[runs]`` per round.
        compact: Milliseconds of the compact model, likewise.

    Returns:
        In JSON types: ``median`` of reference / compact over the pairs, its 95 % interval ``low``, ``high``, the
        median of every round, and the ``verdict`` in words.
    """
    ratios = [first / second for first, second in zip(reference, compact, strict=True)]
    medians = [float(np.median(values)) for values in ratios]
    low, high = median_interval(np.concatenate([_block_medians(values) for values in ratios]))
    low, high = min(low, *medians), max(high, *medians)
    median = float(np.median(np.concatenate(ratios)))
    return {"median": median, "low": low, "high": high, "rounds": medians, "verdict": _verdict(median, low, high)}


def median_interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the distribution-free 95 % interval of a median (order statistics); of fewer than 6 values, their range.

    Args:
        values: Independent values, ``[n]``.
    """
    ordered, count = np.sort(values), len(values)
    rank = max(0, math.floor(count / 2 - _Z95 * math.sqrt(count) / 2))
    return float(ordered[rank]), float(ordered[count - 1 - rank])


def _block_medians(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    blocks = np.array_split(values, max(1, len(values) // _BLOCK))
    return np.asarray([np.median(block) for block in blocks])


def _verdict(median: float, low: float, high: float) -> str:
    if low > 1 + CLAIM:
        return f"{median:.2f} times as fast"
    if high < 1 - CLAIM:
        return f"slower, {median:.2f} of the speed"
    return "no difference that can be claimed"
