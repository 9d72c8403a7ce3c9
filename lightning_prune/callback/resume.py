"""What a resume needs beyond weights: the state of all random generators, and learning rates of optimizers that start anew.

Everything is of types that ``torch.load(weights_only=True)`` reads.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the states of all generators, in types that ``weights_only=True`` loads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [state.cpu() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(internal), following],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put all generators back to what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))


def rates_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """Return the learning rates of all parameter groups, laid out as in the states of the optimizers."""
    return [{"param_groups": [{"lr": float(group["lr"])} for group in o.param_groups]} for o in optimizers]


def keep_rates(optimizers: Sequence[torch.optim.Optimizer], states: Sequence[Mapping[str, Any]]) -> None:
    """Give fresh optimizers the learning rates of a checkpoint whose states they cannot take.

    Args:
        optimizers: The optimizers of the compact model.
        states: Their states in the checkpoint of the dense one; others than as many are left.
    """
    for optimizer, state in zip(optimizers, states, strict=False):
        if len(state["param_groups"]) == len(optimizer.param_groups):
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                group["lr"] = saved["lr"]
