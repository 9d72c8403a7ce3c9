"""The task metric: a torchmetrics metric, a function that makes one, or a short name."""

import difflib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, R2Score
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MultilabelAccuracy,
)

from lightning_prune.errors import OptionError

MetricLike = Metric | Callable[[], Metric] | str

_NAMES: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda classes: MulticlassAccuracy(classes, average="micro"),
    "top5_accuracy": lambda classes: MulticlassAccuracy(classes, average="micro", top_k=min(5, classes)),
    "f1": lambda classes: MulticlassF1Score(classes, average="macro"),
    "auroc": MulticlassAUROC,
    "calibration_error": MulticlassCalibrationError,
    "multilabel_accuracy": MultilabelAccuracy,
    "mse": lambda classes: MeanSquaredError(),
    "mae": lambda classes: MeanAbsoluteError(),
    "r2": lambda classes: R2Score(),
}


class TaskMetric:
    """One kind of metric, with a state of its own for every model.

    Args:
        metric: A metric, which is copied and reset; a function without arguments that returns one; or one of the names
            ``accuracy top5_accuracy f1 auroc calibration_error multilabel_accuracy mse mae r2``, the number of classes
            read off the output.

    Raises:
        OptionError: If it is none of these.
    """

    def __init__(self, metric: MetricLike) -> None:
        if isinstance(metric, str) and metric not in _NAMES:
            close = difflib.get_close_matches(metric, _NAMES, 1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Names are {', '.join(_NAMES)}."
            raise OptionError(f"There is no metric {metric!r}. {hint} Or give a torchmetrics.Metric.")
        if not isinstance(metric, Metric | str) and not callable(metric):
            raise OptionError(
                f"metric is a torchmetrics.Metric, a function that makes one, or a name ({', '.join(_NAMES)}); "
                f"got {type(metric).__name__}."
            )
        self._metric = metric
        self._states: dict[str, Metric] = {}

    @property
    def name(self) -> str:
        """The short name, or the class of the metric."""
        if isinstance(self._metric, str):
            return self._metric
        known = self._metric if isinstance(self._metric, Metric) else next(iter(self._states.values()), self._metric)
        return type(known).__name__ if isinstance(known, Metric) else getattr(known, "__name__", "metric")

    @property
    def higher_is_better(self) -> bool | None:
        """As torchmetrics says; None if it does not, or before the first update."""
        return next((state.higher_is_better for state in self._states.values()), None)

    def update(self, owner: str, output: np.ndarray[Any, Any], target: Any) -> None:
        """Add one batch to the state of one model.

        Args:
            owner: Name of the model.
            output: Its first output.
            target: The batch's target.

        Raises:
            OptionError: If the metric does not take such outputs and targets.
        """
        if target is None:
            raise OptionError(
                "A metric needs targets, but the batches hold only inputs. Give (inputs, target), or no metric."
            )
        predicted = torch.from_numpy(np.ascontiguousarray(output))
        if owner not in self._states:
            self._states[owner] = self._make(predicted)
        try:
            self._states[owner].update(predicted, target.detach().cpu() if isinstance(target, torch.Tensor) else target)
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            shape = list(target.shape) if isinstance(target, torch.Tensor) else type(target).__name__
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise OptionError(
                f"The metric {self.name} does not take outputs {list(output.shape)} with targets {shape}: {reason}"
            ) from error

    def values(self) -> dict[str, float]:
        """Return the metric of every model; one that is not finite is returned as such.

        Raises:
            OptionError: If the metric is not a single number.
        """
        results = {owner: state.compute() for owner, state in self._states.items()}
        for result in results.values():
            if not isinstance(result, torch.Tensor | float | int) or (
                isinstance(result, torch.Tensor) and result.numel() != 1
            ):
                raise OptionError(
                    f"The metric {self.name} must give one number per model. Choose an average, or one metric."
                )
        return {owner: float(result) for owner, result in results.items()}

    def drop(self, reference: float, found: float) -> float:
        """Return by how much ``found`` is worse than ``reference``: absolute, negative if it is better."""
        if math.isnan(found) or math.isnan(reference):
            return math.inf
        if self.higher_is_better is None:
            return abs(reference - found)
        return reference - found if self.higher_is_better else found - reference

    def _make(self, output: torch.Tensor) -> Metric:
        if isinstance(self._metric, str):
            return _NAMES[self._metric](output.shape[1] if output.ndim > 1 else 2)
        made = self._metric.clone() if isinstance(self._metric, Metric) else self._metric()
        if not isinstance(made, Metric):
            raise OptionError(f"metric() returned {type(made).__name__}; a torchmetrics.Metric is needed.")
        made = made.cpu()
        made.reset()
        return made
