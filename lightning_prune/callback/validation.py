"""What a model's own validation says of it, asked in the middle of a fit: the means of what ``validation_step`` logs."""

import logging
import math
from collections import defaultdict
from typing import Any

import torch
import torchmetrics
from torch import Tensor

from lightning_prune.errors import ModelError
from lightning_prune.probe import FOREIGN, Probe

log = logging.getLogger(__name__)
BATCHES = 64  # at most so many are looked at


@torch.no_grad()
def validation_figures(trainer: Any, module: Any, probe: Probe) -> dict[str, float]:
    """Return what ``validation_step`` logs over the first batches of the validation data, in eval mode, by name; the model is left as it was.

    Args:
        trainer: The Trainer.
        module: The module.
        probe: Its probe, which brings batches to the device and takes ranks together.

    Returns:
        Means over batches, and over ranks; of metrics what they compute. Nothing where there is no validation, or it cannot be run here.
    """
    data = trainer.val_dataloaders
    if data is None or isinstance(data, list | tuple | dict) or not hasattr(module, "validation_step"):
        return {}
    found: defaultdict[str, list[float]] = defaultdict(list)
    metrics: dict[str, torchmetrics.Metric] = {}

    def note(name: str, value: Any, *_: Any, **__: Any) -> None:
        if isinstance(value, torchmetrics.Metric):
            metrics[name] = value
        elif isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
            found[name].append(float(value))

    def note_all(values: Any, *_: Any, **__: Any) -> None:
        for name, value in values.items():
            note(name, value)

    own = probe.on(data)
    try:
        with own.quiet(mode="eval"):
            vars(module).update(log=note, log_dict=note_all)
            for index, batch in enumerate(own.batches(BATCHES, "Validating")):
                module.validation_step(batch, index)
            figures = {name: sum(values) / len(values) for name, values in found.items()}
            figures |= {name: float(metric.compute()) for name, metric in metrics.items()}
    except (*FOREIGN, ModelError) as error:
        log.debug("What validation says is not told, it cannot be run here: %s", error)
        return {}
    names = sorted(name for name, value in figures.items() if math.isfinite(value))
    means = own.mean(torch.tensor([figures[name] for name in names], dtype=torch.float64, device=module.device))
    return dict(zip(names, means.tolist(), strict=True))
