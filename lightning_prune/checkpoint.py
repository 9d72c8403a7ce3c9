"""Compact models in files: tensors and a plan, never a pickled module.

A checkpoint of a compact model is an ordinary Lightning checkpoint (or a bare state dict) whose ``state_dict`` carries the plan. To load it, the
class is constructed dense, the plan gives it its shapes, and the weights are loaded strictly.
"""

import inspect
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune._lightning import is_lightning_module
from lightning_prune.errors import CheckpointError, ModelError, PlanError
from lightning_prune.structure.carrier import KEY, NAME, attach, plan_in, plan_of
from lightning_prune.structure.plan import Plan

M = TypeVar("M", bound=nn.Module)


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint without running anything that stands in it.

    Args:
        path: A Lightning checkpoint, with or without optimizer states, or a saved state dict.
        map_location: As for ``torch.load``.

    Returns:
        A Lightning checkpoint; a bare state dict is put under ``"state_dict"``.

    Raises:
        CheckpointError: If the file is missing, a folder, truncated, no checkpoint, or holds pickled code.
    """
    file = Path(path)
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "missing"
        raise CheckpointError(f"Checkpoint {str(file)!r} is {kind}. Give the path of a .ckpt file.")
    try:
        data = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        what = re.search(r"(Unsupported (?:global|class)|GLOBAL|Trying to (?:load|call|instantiate)).*", str(error))
        if what is None:
            raise CheckpointError(
                f"Checkpoint {str(file)!r} is truncated or no checkpoint. Give a file that Trainer or torch.save wrote."
            ) from error
        raise CheckpointError(
            f"Checkpoint {str(file)!r} holds pickled code, which is never run: {what.group().rstrip('.')}. "
            "Save it again with plain types and tensors."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise CheckpointError(
            f"Checkpoint {str(file)!r} is truncated or no checkpoint: {reason}. Save or copy it again."
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"Checkpoint {str(file)!r} holds {type(data).__name__}, not a dict of tensors.")
    if "state_dict" not in data and all(isinstance(value, Tensor) for value in data.values()):
        data = {"state_dict": data}
    if not isinstance(data.get("state_dict"), dict):
        raise CheckpointError(
            f"Checkpoint {str(file)!r} has no 'state_dict'. Give a Lightning checkpoint or a saved state dict."
        )
    return data


def load_from_checkpoint(
    cls: type[M], path: str | os.PathLike[str], map_location: Any = "cpu", require_plan: bool = True, **kwargs: Any
) -> M:
    """Construct ``cls``, give it the structure of the checkpoint, and load the weights strictly.

    Works for checkpoints of our callbacks, for weights-only files, for saved state dicts, and for checkpoints that a later Trainer saved without
    our callback.

    Args:
        cls: The LightningModule (or Module) class, dense.
        path: The checkpoint.
        map_location: Where the weights go, as for ``torch.load``.
        require_plan: Whether a checkpoint of a dense model is an error.
        **kwargs: Arguments of ``cls``; they go before those that ``save_hyperparameters`` put into the checkpoint.

    Returns:
        The model, in train mode as constructed.

    Raises:
        CheckpointError: If the file cannot be read, carries no plan, or its weights do not fit ``cls``.
        ModelError: If ``cls`` cannot be constructed from the arguments at hand.
        PlanError: If the plan is for another model; the message names the first module that differs.
    """
    checkpoint = read_checkpoint(path, map_location)
    try:
        plan = plan_in(checkpoint["state_dict"])
    except PlanError as error:
        raise PlanError(f"Checkpoint {str(path)!r}: {error} Save it again.") from error
    if plan is None and require_plan:
        raise CheckpointError(
            f"Checkpoint {str(path)!r} carries no plan: its model is dense. Load it with {cls.__name__}.load_from_checkpoint, "
            "or pass require_plan=False."
        )
    model = _construct(cls, checkpoint, path, kwargs)
    if is_lightning_module(model):
        model.configure_model()  # type: ignore[operator]
        model.on_load_checkpoint(checkpoint)  # type: ignore[operator]
    rebuild(model, plan)
    try:
        model.load_state_dict(checkpoint["state_dict"], strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise CheckpointError(
            f"Checkpoint {str(path)!r} does not fit {cls.__name__}: {' '.join(lines)[:400]}"
        ) from error
    device = torch.device(map_location) if isinstance(map_location, str | torch.device) else None
    return model if device is None else model.to(device)


def rebuild(model: nn.Module, plan: Plan | None) -> None:
    """Give ``model`` the structure of ``plan``, whatever structure it has now; values of new parameters are undefined.

    Args:
        model: Dense, or carrying a plan.
        plan: The structure to build; None or empty means dense.

    Raises:
        PlanError: If the plan is for another model.
    """
    wanted, here = plan or Plan(), plan_of(model)
    common = _common(here, wanted)
    for step in reversed(here.steps[common:]):
        step.undo(model)
    if common:
        for step in wanted.steps[common:]:
            step.build(model)
    else:
        if here:
            attach(model, Plan())
        wanted.build(model)
    attach(model, wanted)


def _common(one: Plan, other: Plan) -> int:
    """Return how many first steps both plans share."""
    pairs = zip(one.steps, other.steps, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _construct(cls: type[M], checkpoint: Mapping[str, Any], path: Any, kwargs: Mapping[str, Any]) -> M:
    """Call ``cls`` with the arguments of the checkpoint that it knows; names of code in the file are never followed."""
    saved = {
        key: value for key, value in dict(checkpoint.get("hyper_parameters") or {}).items() if not key.startswith("_")
    }
    name = checkpoint.get("hparams_name")
    if saved and name not in (None, "kwargs"):
        saved = {name: saved}
    known = inspect.signature(cls.__init__).parameters
    if not any(p.kind == p.VAR_KEYWORD for p in known.values()):
        saved = {key: value for key, value in saved.items() if key in known}
    arguments = saved | dict(kwargs)
    named = [key for key, value in arguments.items() if isinstance(value, dict) and "class_path" in value]
    if named:
        raise ModelError(
            f"Checkpoint {str(path)!r} names code for {cls.__name__}({named[0]}=...), which is never run. Pass {named[0]}= yourself."
        )
    try:
        return cls(**arguments)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OSError) as error:
        raise ModelError(
            f"{cls.__name__} cannot be constructed from {str(path)!r}: {error}. Pass its arguments, or call save_hyperparameters() in it."
        ) from error


__all__ = ["KEY", "NAME", "PlanError", "load_from_checkpoint", "plan_in", "read_checkpoint", "rebuild"]
