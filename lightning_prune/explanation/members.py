"""Who holds which parameters, and what part of a model's cost is whose."""

import dataclasses
from collections.abc import Iterable, Mapping

from torch import nn
from torch.nn.utils import parametrize


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module that holds parameters itself; those of its parametrizations count as its own.

    Attributes:
        name: Its name in the model; ``""`` is the model itself.
        module: The module.
        tensors: Its parameters, tied ones under their first name in the model.
        params: Number of their elements; a tied parameter counts where it has its first name.
    """

    name: str
    module: nn.Module
    tensors: tuple[str, ...]
    params: int

    @property
    def type(self) -> str:
        """The type of the module, without what a parametrization made of it."""
        if parametrize.is_parametrized(self.module):
            return parametrize.type_before_parametrizations(self.module).__name__
        return type(self.module).__name__


def layers_of(model: nn.Module) -> list[Layer]:
    """Return every module that holds parameters, in the order of the model.

    Args:
        model: Any module; a submodule that several parents share stands under its first name.
    """
    first = {id(p): name for name, p in model.named_parameters()}
    held: dict[str, list[str]] = {}
    params: dict[str, int] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owner, known = owner_of(f"{name}.{key}".lstrip(".")), first[id(parameter)]
            held.setdefault(owner, []).append(known)
            params[owner] = params.get(owner, 0) + (parameter.numel() if owner_of(known) == owner else 0)
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return [
        Layer(name, model.get_submodule(name), tuple(dict.fromkeys(held[name])), params[name])
        for name in sorted(held, key=lambda name: places[name])
    ]


def owner_of(tensor: str) -> str:
    """Return the name of the module that a parameter or buffer belongs to; one inside a parametrization belongs to the parametrized module.

    >>> owner_of("block.conv.parametrizations.weight.original0")
    'block.conv'
    """
    return f".{tensor.rpartition('.')[0]}".partition(".parametrizations.")[0].lstrip(".")


def own_flops(by_module: Mapping[str, int], names: Iterable[str]) -> dict[str, int]:
    """Return the multiply-adds of every layer without those of the layers inside it.

    Args:
        by_module: Multiply-adds by module, children included.
        names: The layers.

    Returns:
        Multiply-adds by layer. What happens in modules without parameters counts for the layer around them, if there is one.
    """
    own = {name: by_module.get(name, 0) for name in names}
    for name in own:
        around = nearest(name.rpartition(".")[0], own) if name else None
        if around is not None:
            own[around] -= by_module.get(name, 0)
    return {name: max(0, flops) for name, flops in own.items()}


def own_params(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Return the number of elements of the parameters at or below every layer without those of the layers inside it, tied ones once.

    Args:
        model: The model, possibly with other modules in the place of some layers.
        names: The layers.
    """
    own = dict.fromkeys(names, 0)
    for tensor, parameter in model.named_parameters():
        around = nearest(owner_of(tensor), own)
        if around is not None:
            own[around] += parameter.numel()
    return own


def nearest(name: str, layers: Mapping[str, object]) -> str | None:
    """Return the innermost of ``layers`` that is the module ``name`` or stands around it; None if none does."""
    while name and name not in layers:
        name = name.rpartition(".")[0]
    return name if name in layers else None
