"""How far two sets of outputs are apart, and whether that is rounding noise, suspicious or wrong.

A difference is judged relative to the largest value of the output, not element by element: next to zero every float
differs by much. What rounding may do is measured, not guessed: torch's own float32 outputs against the same model in
float64, times ten; never less than the tolerance. A real fault sits far above it, and moves decisions (the argmax over
the classes).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from lightning_prune.export.inputs import Inputs, read_outputs
from lightning_prune.export.twin import as_double, double_twin, run
from torch import Tensor, nn

from lightning_prune.errors import ExportError

Verdict = Literal["rounding noise", "suspicious", "wrong"]
Arrays = dict[str, np.ndarray[Any, Any]]

_NOISE_FACTOR = 10.0
_SUSPICIOUS_FACTOR = 100.0
_AGREEMENT = 0.999


@dataclasses.dataclass(frozen=True)
class OutputDifference:
    """One output of a file beside the same output of its reference.

    Attributes:
        name: Name in the reference.
        dtype: Its element type.
        shape: Shape in the first batch.
        absolute: Largest absolute difference.
        relative: ``absolute`` over the largest absolute value of the reference; of integers and truth values, the
            share that differs.
        allowed: Largest ``relative`` that rounding explains.
        agreement: Share of equal argmax over the classes; None where there are none to choose from.
        non_finite: Number of values of the file that are infinite or not a number.
        verdict: The judgement.
        reason: Why, where the numbers alone do not say it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    allowed: float
    agreement: float | None
    non_finite: int
    verdict: Verdict
    reason: str = ""

    def explain(self) -> str:
        """Return one sentence."""
        if self.reason:
            return f"output {self.name!r} is {self.verdict}: {self.reason}"
        agreement = "" if self.agreement is None else f", argmax agrees on {self.agreement:.2%}"
        return (
            f"output {self.name!r} is {self.verdict}: largest difference {self.absolute:.3g}, "
            f"{self.relative:.3g} of its largest value (rounding explains {self.allowed:.3g}){agreement}"
        )


@dataclasses.dataclass
class _Tally:
    dtype: str
    shape: tuple[int, ...]
    absolute: float = 0.0
    scale: float = 0.0
    unequal: int = 0
    count: int = 0
    agreed: int = 0
    decisions: int = 0
    non_finite: int = 0
    broken: int = 0  # values of the reference that are not finite
    reason: str = ""


class Comparison:
    """Collects differences batch by batch.

    Args:
        tolerance: Relative difference that is always taken for rounding.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self._noise: dict[str, float] = {}
        self._tallies: dict[str, _Tally] = {}

    def add(self, reference: Arrays, found: Arrays) -> None:
        """Compare one batch.

        Outputs are matched by name where both sides have the same names, and by position otherwise.

        Args:
            reference: Expected outputs by name.
            found: The outputs of the file by name, in its order.

        Raises:
            ExportError: If the numbers of outputs differ.
        """
        if len(reference) != len(found):
            raise ExportError(
                f"The file has {len(found)} outputs ({', '.join(found)}), the reference {len(reference)} "
                f"({', '.join(reference)}). Compare files of the same model."
            )
        by_name = set(reference) == set(found)
        for (name, expected), (position, other) in zip(reference.items(), found.items(), strict=True):
            tally = self._tallies.setdefault(name, _Tally(str(expected.dtype), expected.shape))
            if by_name and name != position:
                tally.reason = f"the file has {position!r} in its place"
            _count(tally, expected, found[name] if by_name else other)

    def allow(self, noise: Mapping[str, float]) -> None:
        """Take note of how large torch's own rounding is, relative, by output."""
        for name, value in noise.items():
            self._noise[name] = max(value, self._noise.get(name, 0.0))

    def records(self, metric_gap: float = 0.0) -> list[OutputDifference]:
        """Judge every output.

        Args:
            metric_gap: How far the task metric of the file is from the reference's, absolute.
        """
        return [self._record(name, tally, metric_gap) for name, tally in self._tallies.items()]

    def _record(self, name: str, tally: _Tally, metric_gap: float) -> OutputDifference:
        exact = np.dtype(tally.dtype).kind != "f"
        allowed = 0.0 if exact else max(self.tolerance, _NOISE_FACTOR * self._noise.get(name, 0.0))
        relative = tally.unequal / max(1, tally.count) if exact else tally.absolute / (tally.scale or 1.0)
        agreement = tally.agreed / tally.decisions if tally.decisions else None
        reason = f"{tally.non_finite} values are not finite" if tally.non_finite else tally.reason
        if tally.broken:
            reason = f"{tally.broken} values of torch's own are not finite; its training may have diverged"
        verdict: Verdict = "wrong"
        if not reason and relative <= allowed:
            verdict = "rounding noise"
        elif not reason and (agreement is None or agreement >= _AGREEMENT) and metric_gap <= 1 - _AGREEMENT:
            near = 1 - _AGREEMENT if exact else _SUSPICIOUS_FACTOR * allowed
            verdict = "suspicious" if relative <= near else "wrong"
        return OutputDifference(
            name,
            tally.dtype,
            tally.shape,
            tally.absolute,
            relative,
            allowed,
            agreement,
            tally.non_finite,
            verdict,
            reason,
        )


def rounding(twin: nn.Module, inputs: Inputs, outputs: Arrays) -> dict[str, float]:
    """Measure how far rounding alone moves the outputs of a model: against the same model in float64.

    Args:
        twin: The model on the CPU.
        inputs: One batch.
        outputs: Its outputs for that batch.

    Returns:
        Largest difference relative to the largest value, by output; empty where the model does not run in float64. What
        costs more than half of the type's digits is no rounding (a random number, say) and is cut off there.
    """
    exact = double_twin(twin)
    if exact is None:
        return {}
    try:
        precise = as_arrays(read_outputs(run(exact, inputs.map(as_double)), inputs.tensors, type(twin).__name__))
    except ExportError:
        return {}  # forward names float32 itself
    comparison = Comparison(0.0)
    comparison.add(precise, outputs)
    coarsest = max(torch.finfo(tensor.dtype).eps for tensor in _floats(twin))
    half_the_digits = coarsest**0.5 / _NOISE_FACTOR
    return {
        record.name: min(record.relative, half_the_digits)
        for record in comparison.records()
        if np.isfinite(record.relative)
    }


def _floats(twin: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*twin.parameters(), *twin.buffers()) if tensor.is_floating_point()]


def as_arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    """Turn tensors into NumPy arrays; bfloat16, which NumPy lacks, becomes float32."""
    return {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()
        for name, tensor in tensors.items()
    }


def non_finite(array: np.ndarray[Any, Any]) -> int:
    """Count the values that are infinite or not a number."""
    return int(array.size - np.isfinite(array).sum()) if array.dtype.kind == "f" else 0


def agreement(reference: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Count equal decisions of two outputs.

    Args:
        reference: Scores, ``[N, C]``, ``[N, T, C]`` or ``[N, C, H, W, ...]``.
        found: The same of the other model.

    Returns:
        Number of equal argmax over the ``C`` classes, and number of decisions; 0 where there is no axis of classes.
    """
    axis = 1 if reference.ndim >= 4 else -1
    if reference.dtype.kind != "f" or reference.ndim < 2 or reference.shape[axis] < 2 or reference.shape != found.shape:
        return 0, 0
    equal = reference.argmax(axis) == found.argmax(axis)
    return int(equal.sum()), equal.size


def _count(tally: _Tally, expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> None:
    if expected.shape != found.shape:
        tally.reason = f"its shape is {list(found.shape)}, expected {list(expected.shape)}"
        return
    if expected.dtype.kind == "f":
        tally.non_finite += non_finite(found)
        if broken := non_finite(expected):
            tally.broken += broken
            return
        with np.errstate(invalid="ignore", over="ignore"):
            gap = np.abs(found.astype(np.float64) - expected.astype(np.float64))
        tally.absolute = max(tally.absolute, float(np.nanmax(gap, initial=0.0)))
        tally.scale = max(tally.scale, float(np.abs(expected).max(initial=0)))
    tally.unequal += int((expected != found).sum())
    tally.count += expected.size
    agreed, decisions = agreement(expected, found)
    tally.agreed += agreed
    tally.decisions += decisions
