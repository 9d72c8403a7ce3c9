"""Layers on one stream that each read only some of its channels: which may, and the steps that let them.

A channel of a residual stream can leave only when no reader needs it. Short of that every reader can drop the channels that *it* does not need
(:mod:`lightning_prune.structure.gathered`), while the stream keeps them.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_prune.errors import ModelError, OptionError
from lightning_prune.structure.dropin import why_not_called
from lightning_prune.structure.gathered import may_gather, reads_of
from lightning_prune.structure.groups import Group, Slot, Structure
from lightning_prune.structure.obstacles import obstacles_around
from lightning_prune.structure.removal import static_sizes
from lightning_prune.structure.steps import Cut, GatherInputs, KeepChannels, Step, pack_bits


@dataclasses.dataclass(frozen=True)
class Stream:
    """Units that two or more layers read.

    Attributes:
        group: The units.
        readers: Where they lie on the inputs of the layers that may gather, by name of the layer: axis 1 of the weight.
    """

    group: Group
    readers: Mapping[str, Slot]


def readers_of_streams(model: nn.Module, structure: Structure) -> tuple[Stream, ...]:
    """Return the groups of units that two or more linear layers or convolutions read, and who may gather.

    Args:
        model: The model.
        structure: Its units.

    Returns:
        In the order of the groups. Readers that may not gather count, but are not listed (:func:`why_not_gathered`).
    """
    refused, found = why_not_gathered(model), []
    for group in structure.groups:
        readers = {}
        for slot in (structure.slots[index] for index in group.slots):
            layer, _, key = slot.tensor.rpartition(".")
            if (
                (key, slot.axis, slot.units.ndim) == ("weight", 1, 1)
                and not slot.zeroed
                and len(structure.shapes[slot.tensor]) > 1
            ):
                readers[layer] = slot
        if len(readers) > 1:
            found.append(Stream(group, {name: slot for name, slot in readers.items() if name not in refused}))
    return tuple(found)


def why_not_gathered(model: nn.Module) -> dict[str, str]:
    """Return why modules cannot gather their inputs, as phrases without full stop, by name; those that can are not in it."""
    around, found = obstacles_around(model), {}
    for name, module in model.named_modules(remove_duplicate=False):
        reason = _why_not(module) or around.get(name)
        if reason is None and not name:
            reason = "it is the model itself: wrap it in a module"
        if reason is not None:
            found[name] = reason
    shared = {id(model.get_submodule(name)): reason for name, reason in found.items()}
    named = model.named_modules(remove_duplicate=False)
    return found | {name: shared[id(module)] for name, module in named if id(module) in shared}


def _why_not(layer: nn.Module) -> str | None:
    if parametrize.is_parametrized(layer):
        return "its parameters are parametrized (weight_norm, spectral_norm, ...): remove the parametrization first"
    if not may_gather(layer):
        return f"only Linear and Conv1d, 2d, 3d without groups gather, and this is a {type(layer).__name__}"
    if type(layer._parameters.get("weight")) is not nn.Parameter:
        return "its weight is no plain parameter"
    if set(layer._parameters) - {"weight", "bias"} or set(layer._buffers) - {"index"} or layer._modules:
        return "it carries further parameters, buffers or modules (an adapter, a mask)"
    return why_not_called(layer)


def gather_steps(model: nn.Module, kept: Mapping[str, Tensor], steps: Iterable[Step] = ()) -> tuple[Step, ...]:
    """Return the steps that let layers gather, and those of the same stage that remove units, as one.

    Everything is said in the numbering of the model as it is: the masks, and the steps as
    :func:`~lightning_prune.structure.removal.removal_steps` returns them. A layer that is named in both has one step for both.

    Args:
        model: The model; only looked at.
        kept: Which of its present inputs a layer goes on to read, by its name: ``[inputs]``, boolean. A layer that keeps all is passed over.
        steps: What else happens in this stage.

    Returns:
        ``steps``, of which those of gathering layers are replaced, then the steps of layers that only gather.

    Raises:
        ModelError: If a layer cannot gather; says why.
        OptionError: If a mask is none of the layer's inputs, or nothing would be left of them.
    """
    refused, found = why_not_gathered(model), list(steps)
    for name, mask in kept.items():
        if name in refused or name not in dict(model.named_modules()):
            raise ModelError(
                f"Module {name!r} cannot gather its inputs: {refused.get(name, 'there is no such module')}."
            )
        place = next((i for i, s in enumerate(found) if s.module == name and isinstance(s, KeepChannels)), len(found))
        step = found[place] if place < len(found) else KeepChannels(name, {})
        gathering = _gathering(model.get_submodule(name), step, mask.cpu())
        if not mask.all():
            found[place : place + 1] = [gathering]
    return tuple(found)


def _gathering(layer: nn.Module, step: Any, mask: Tensor) -> GatherInputs:
    """Let the layer that ``step`` changes read only the inputs ``mask``, besides."""
    weight = tuple(layer.get_parameter("weight").shape)
    if mask.dtype != torch.bool or tuple(mask.shape) != weight[1:2]:
        raise OptionError(
            f"The inputs that {step.module!r} keeps are given as {weight[1]} booleans, got shape {list(mask.shape)} of {mask.dtype}."
        )
    cut = step.tensors.get("weight", Cut(weight, {}))
    stays = cut.kept(1)
    if isinstance(step, GatherInputs):
        before, after, keep = step.mask(after=False), step.mask(after=True), step.kept & mask
    else:  # what a layer that does not gather loses, its stream loses
        before, keep = reads_of(layer), mask
        after = torch.ones(int(stays.sum()), dtype=torch.bool) if before.all() else before.clone()
    after[after.nonzero().flatten()] = keep[stays]
    if not after.any():
        raise OptionError(f"Module {step.module!r} would read none of its inputs that stay. Keep one at least.")
    cut = dataclasses.replace(cut, keep={**cut.keep, 1: pack_bits(stays & keep)})
    shapes = {name: own.after for name, own in step.tensors.items()} | {"weight": cut.after}
    step = KeepChannels(
        step.module, {**step.tensors, "weight": cut}, step.attributes | static_sizes(layer, shapes, {}), step.absorb
    )
    return GatherInputs.of(step, before, after, keep)


def gather_pays(layer: nn.Module, kept: int, of: int | None = None) -> bool:
    """Tell whether a layer that gathers its inputs is likely to be faster than the dense one.

    Kernels work on blocks of 16 channels, so that fewer of these must be left; and what a gathered value costs must be worth the multiply-adds
    that it saves: 64 of a convolution, which gathers whole planes, 512 of a linear layer, which gathers single numbers.

    Measured with onnxruntime 1.31 and torch 2.13, one thread of an x86 processor with AVX-512, float32, the stream out of a 1x1 convolution
    that is timed with it, batch 1 and 16: 3x3 convolutions of 64 to 256 channels at 8x8 to 32x32 run at 1.2, 1.7 and 2.7 times the
    dense speed with 3/4, 1/2 and 1/4 of the channels; of 32 channels at 0.95, 1.5 and 2.1; with 15/16 at 1.0. 1x1 convolutions at 1.0 with 3/4
    where they narrow, at 1.1 to 1.5 with 1/2. Linear layers of 64 features below 1 with any share, of 256 at 0.9 with 1/2 and 1.15 with 1/4.

    Args:
        layer: A layer that may gather.
        kept: How many inputs it goes on to read.
        of: How many it would read otherwise; None: those that it has.
    """
    outputs, inputs, *taps = layer.get_parameter("weight").shape
    inputs = inputs if of is None else of
    saved = (inputs - kept) * outputs * math.prod(taps) / kept
    return -(-kept // 16) < -(-inputs // 16) and saved >= (512 if isinstance(layer, nn.Linear) else 64)
