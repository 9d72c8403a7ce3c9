"""Who reads the channels of units: the layers whose outputs are sums over them."""

import collections
import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
from torch import nn

from lightning_prune.structure.calls import Call
from lightning_prune.structure.groups import Structure
from lightning_prune.structure.layers import LAYERS
from lightning_prune.structure.preserve import preserved


@dataclasses.dataclass(frozen=True)
class Reader:
    """A linear layer or convolution that reads units.

    Attributes:
        layer: Its name in the model.
        units: Unit of each input, ``[inputs]``; of a grouped convolution of each entry of the first two axes of its weight,
            ``[outputs, inputs / groups]``; -1 where no unit is read.
    """

    layer: str
    units: np.ndarray


def find_readers(
    model: nn.Module, structure: Structure, called: Collection[str]
) -> tuple[tuple[Reader, ...], dict[str, np.ndarray]]:
    """Find the layers that read units, and the units of which something else reads slices.

    Args:
        model: The model.
        structure: Its units.
        called: Names of the modules that are called as modules (:func:`called_modules`); only there inputs can be seen.

    Returns:
        The readers in the order of the model, and by reason the units of which not all readers are among them.
    """
    readers: list[Reader] = []
    unknown: dict[int, str] = {}
    read = np.zeros(structure.count, bool)
    first = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    times = collections.Counter(first[id(p)] for _, p in model.named_parameters(remove_duplicate=False))
    for tensor, slots in structure.by_tensor.items():
        name, _, parameter = tensor.rpartition(".")
        owner = model.get_submodule(name)
        matrix = tensor in structure.parameters and sum(size > 1 for size in structure.shapes[tensor]) > 1
        for slot in slots if matrix else ():
            own = slot.units[slot.units >= 0]
            if slot.zeroed:
                continue
            if _sums(owner) and parameter == "weight" and name in called and times[tensor] == 1:
                readers.append(Reader(name, slot.units))
                read[own] = True
            else:
                why = "shares its weight" if times[tensor] > 1 else "whose inputs cannot be seen"
                reason = f"{name or 'the model itself'!r}, a {type(owner).__name__}, {why}, reads it"
                unknown |= dict.fromkeys(own.tolist(), reason)
    nothing = "no linear layer or convolution reads it"
    unknown = dict.fromkeys(np.flatnonzero(~read).tolist(), nothing) | unknown
    reasons = {reason: np.array([u for u, why in unknown.items() if why == reason]) for reason in unknown.values()}
    return tuple(readers), reasons


def _sums(layer: nn.Module) -> bool:
    """Tell whether a layer computes what a Linear or a convolution does: a subclass may, if it has no code of its own for that."""
    return any(
        isinstance(layer, kind)
        and type(layer).forward is kind.forward
        and getattr(type(layer), "_conv_forward", None) is getattr(kind, "_conv_forward", None)
        for kind in LAYERS.values()
    )


def called_modules(model: nn.Module, calls: Sequence[Call]) -> Collection[str]:
    """Return the names of the modules that ``calls`` call as modules; the model is run once and left as it is."""
    found: set[str] = set()
    with preserved(model, mode="eval"):
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, name=name: found.add(name))
        for call in calls:
            call.run(model)
    return found
