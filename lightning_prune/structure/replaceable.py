"""Layers that a module of fewer weights may take the place of, as users name them, and why others stay as they are."""

from collections.abc import Callable, Sequence

from torch import nn

from lightning_prune.structure.factorized import Factorized
from lightning_prune.structure.layers import is_plain
from lightning_prune.structure.mpo import MPO
from lightning_prune.structure.obstacles import obstacles
from lightning_prune.structure.rotated import Rotated
from lightning_prune.structure.select import Pattern, select
from lightning_prune.structure.unrolled import Unrolled

ZERO = "all its weights are zero, and so would be all factors and their gradients"


def replaceable(
    model: nn.Module,
    include: Pattern | Sequence[Pattern] | None,
    exclude: Pattern | Sequence[Pattern] | None,
    obstacle: Callable[[str, nn.Module], str | None] = lambda name, layer: None,
    again: tuple[type[nn.Module], ...] = (),
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Find the layers that may be replaced and the reasons why others cannot.

    Args:
        model: The model, in which earlier stages may have replaced layers.
        include: Patterns of layers to take, None for all. A layer that was replaced is still known by its name, and by the type of its parts.
        exclude: Patterns of layers to leave out without a word.
        obstacle: Says what else keeps a layer from being replaced, or None.
        again: Kinds of replaced layers that may be replaced again.

    Returns:
        Plain linear layers and convolutions, and layers of the kinds of ``again``, by name; and the reason by name of every layer that was
        chosen but stays.

    Raises:
        OptionError: If a pattern matches no layer.
    """
    made = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Factorized | Rotated | MPO | Unrolled)
    }
    inside = {
        f"{name}.{part}".lstrip(".") for name, module in made.items() for part, _ in module.named_modules() if part
    }
    reasons, modules = obstacles(model), dict(model.named_modules())
    known = {
        name: _kind(module)
        for name, module in modules.items()
        if name in made or (name not in inside and (is_plain(module) or name in reasons))
    }
    found: dict[str, nn.Module] = {}
    alone: dict[str, str] = {}
    for name in select(known, include, exclude) if known else ():
        module = modules[name]
        if not name:
            alone[name] = "it is the model itself, not a layer inside it"
        elif name in made and not isinstance(module, again):
            alone[name] = "it is made of factors already"
        elif (reason := reasons.get(name) or obstacle(name, module)) is not None:
            alone[name] = reason
        else:
            found[name] = module
    return found, alone


def _kind(module: nn.Module) -> nn.Module:
    """Return what patterns take a module for."""
    return module.second if isinstance(module, Factorized) else module.core if isinstance(module, Rotated) else module
