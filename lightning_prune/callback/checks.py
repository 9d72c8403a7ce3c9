"""What a fit refuses, with the reason and the remedy."""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_prune.errors import ModelError, OptionError, TrainerError

# Names of strategies whose processes or shards cannot follow a change of structure, with the reason.
REFUSED = {
    "FSDPStrategy": "shards parameters before their new shapes are known",
    "ModelParallelStrategy": "shards parameters before their new shapes are known",
    "DeepSpeedStrategy": "owns parameters and optimizer itself",
    "XLAStrategy": "forks processes that cannot hand the changed structure back",
    "XLAFSDPStrategy": "forks processes that cannot hand the changed structure back",
}


def check_compiled(module: nn.Module) -> None:
    """Refuse modules wrapped by ``torch.compile``, whole or in part.

    Raises:
        TrainerError: With the remedy.
    """
    wrapped = [
        name
        for name, m in module.named_modules()
        if type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None
    ]
    if wrapped or getattr(module, "_compiler_ctx", None) is not None:
        what = f"Submodule {wrapped[0]!r} of {type(module).__name__}" if any(wrapped) else type(module).__name__
        raise TrainerError(
            f"{what} is compiled by torch.compile, whose code knows the dense shapes. Compress it first, compile it after the fit."
        )


def check_model(model: object) -> None:
    """Refuse what is no module in Python: other objects, scripted and compiled modules.

    Raises:
        OptionError: If it is no module, or a scripted one.
        TrainerError: If it is compiled.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model={model!r} is a {type(model).__name__}. Give a torch.nn.Module, constructed.")
    if isinstance(model, torch.jit.ScriptModule):
        raise OptionError(
            f"The model is scripted ({type(model).__name__}). Compress the Python module, script it afterwards."
        )
    check_compiled(model)


def check_strategy(trainer: Any) -> None:
    """Refuse strategies that cannot follow a change of structure.

    Raises:
        TrainerError: With the reason and the remedy.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    reason = REFUSED.get(name)
    launcher = type(strategy.launcher).__name__ if strategy.launcher is not None else ""
    if reason is None and "MultiProcessing" in launcher:
        reason = "starts its processes by spawn or fork; the changed structure would be lost with them"
    if reason is not None:
        raise TrainerError(
            f"Trainer(strategy=...) is {name}, which {reason}. Use strategy='ddp' (one script per process) or one device, "
            "or compress before the fit with lightning_prune.compress."
        )


def check_optimizers(trainer: Any, module: nn.Module, method: str, created: Sequence[nn.Parameter]) -> None:
    """Check that optimizers and model hold the same parameters after a structural change.

    Args:
        trainer: The Trainer, its optimizers set up.
        module: The module.
        method: Name of the callback, for the message.
        created: Parameters that it made. Others may be left out of every optimizer, as the user likes.

    Raises:
        TrainerError: If an optimizer holds parameters that are not in the model, or lacks those that compression created.
    """
    held = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    stale = held - set(module.parameters())
    if stale:
        raise TrainerError(
            f"configure_optimizers gave {len(stale)} parameters that are not in the model any more; they would train instead of the "
            "compressed ones. Read self.parameters() inside configure_optimizers, not in __init__."
        )
    names = {p: name for name, p in module.named_parameters()}
    missing = [names[p] for p in created if p.requires_grad and p not in held]
    if missing and held:
        raise TrainerError(
            f"Parameter {missing[0]!r}, made by {method}, is trainable but in no optimizer. Give self.parameters() "
            "to the optimizer, or freeze the layer before the fit."
        )


def check_claims(method: object, names: Iterable[str], claims: MutableMapping[str, Any]) -> None:
    """Check that nobody has claimed the same layer, and enter the claims.

    Args:
        method: The callback that claims.
        names: The layers it would change.
        claims: Who has claimed what, by layer; added to.

    Raises:
        TrainerError: If a layer is claimed twice; names it.
    """
    for name in sorted(names):
        if name in claims:
            raise TrainerError(
                f"{type(method).__name__} and {type(claims[name]).__name__} would both compress layer {name!r}. Give each its own layers with "
                "include= and exclude=, or compress in two fits."
            )
        claims[name] = method


def check_integer(owner: object, name: str, minimum: int) -> None:
    """Check that an argument is an integer of at least ``minimum``.

    Raises:
        OptionError: Otherwise.
    """
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise OptionError(f"{type(owner).__name__}({name}={value!r}): give an integer of at least {minimum}.")


def check_choice(owner: object, name: str, allowed: Sequence[object]) -> None:
    """Check that an argument is one of those that are offered, of the same type.

    Raises:
        OptionError: Otherwise.
    """
    value = getattr(owner, name)
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise OptionError(f"{type(owner).__name__}({name}={value!r}): give {' or '.join(map(repr, allowed))}.")


def check_probability(owner: object, name: str) -> None:
    """Check that an argument is a number in (0, 1).

    Raises:
        OptionError: Otherwise.
    """
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise OptionError(f"{type(owner).__name__}({name}={value!r}): give a number in (0, 1), a probability.")


def named_module(owner: object, option: str, model: nn.Module) -> nn.Module:
    """Return the submodule that an option names; ``""`` is the model itself.

    Raises:
        OptionError: If there is none of that name.
    """
    name = getattr(owner, option)
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise OptionError(
            f"{type(owner).__name__}({option}={name!r}): {error}. Give a name from named_modules()."
        ) from error


def nothing_to_change(method: str, left_alone: Mapping[str, str]) -> ModelError:
    """Return the error for a compression that would change nothing, with the reasons."""
    reasons = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in left_alone.items())
    return ModelError(f"{method} would change nothing. {reasons or 'The model has no layer that it could compress.'}")
