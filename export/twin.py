"""A copy of a model to run and to trace: on the CPU, in eval mode. The model itself is left bit-identical."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from lightning_prune.export.inputs import Inputs
from torch import Tensor, nn

from lightning_prune.errors import ExportError
from lightning_prune.structure.carrier import attach
from lightning_prune.structure.plan import Plan


def cpu_twin(model: nn.Module) -> nn.Module:
    """Copy ``model`` to the CPU in eval mode, without the plan that it may carry.

    Args:
        model: Any module, on any device, in any mode.

    Returns:
        The copy; it shares no tensor with ``model``.

    Raises:
        ExportError: If the model cannot be copied.
    """
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ExportError(
            f"{type(model).__name__} cannot be copied: {str(error).splitlines()[0]} "
            "Keep results of earlier forward calls out of the module's attributes."
        ) from error
    attach(twin, Plan())
    return twin.cpu().eval().requires_grad_(False)


@contextlib.contextmanager
def untouched_rng() -> Iterator[None]:
    """Restore torch's CPU random state when the block ends."""
    with torch.random.fork_rng(devices=[]):
        yield


def run(twin: nn.Module, inputs: Inputs) -> Any:
    """Call ``twin`` without gradients on the CPU; torch's random state stands afterwards as before.

    Args:
        twin: What :func:`cpu_twin` returned.
        inputs: The call, its tensors on the CPU.

    Returns:
        What ``forward`` returned.

    Raises:
        ExportError: If the call fails.
    """
    try:
        with torch.no_grad(), untouched_rng():
            return twin(*inputs.args, **inputs.kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError) as error:
        shapes = {name: list(tensor.shape) for name, tensor in inputs.tensors.items()}
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExportError(f"{type(twin).__name__}.forward fails on inputs of shapes {shapes}: {reason}") from error


def double_twin(twin: nn.Module) -> nn.Module | None:
    """Copy ``twin`` to float64, the yardstick for what rounding alone does; None where nothing in it is a float."""
    if not any(tensor.is_floating_point() for tensor in (*twin.parameters(), *twin.buffers())):
        return None
    return copy.deepcopy(twin).double()


def as_double(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float64 if it holds floats."""
    return tensor.double() if tensor.is_floating_point() else tensor
