"""From the units that stay to the steps of a plan."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.structure.gathered import reads_of
from lightning_prune.structure.groups import Slot, Structure
from lightning_prune.structure.steps import Cut, GatherInputs, KeepChannels, OpenHeads, Step, pack_bits, unpack_bits
from lightning_prune.structure.tracing.labels import Size

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHTED = (nn.Linear, nn.Embedding, nn.PReLU, *_CONVOLUTIONS, *_TRANSPOSED)
_PER_CHANNEL = (nn.modules.batchnorm._NormBase,)


def removal_steps(model: nn.Module, structure: Structure, kept: np.ndarray) -> tuple[Step, ...]:
    """Return the steps that leave only the units of ``kept``.

    Args:
        model: The model that the structure is of.
        structure: Its units.
        kept: Whether each unit stays, ``[units]``, boolean.

    Returns:
        One step per module that changes, in the order of the model; attention modules are opened first.
    """
    stays = np.append(kept, True)
    cuts: dict[str, dict[str, Cut]] = {}
    for tensor, slots in structure.by_tensor.items():
        if not all(stays[slot.units].all() for slot in slots):
            owner, _, name = tensor.rpartition(".")
            cuts.setdefault(owner, {})[name] = _cut(structure, slots, stays)
    shapes = {f"{owner}.{name}".lstrip("."): cut.after for owner, own in cuts.items() for name, cut in own.items()}
    numbers = _numbers(model, structure.sizes, stays)
    steps: list[Step] = []
    first = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    for name, module in model.named_modules():
        if name in structure.opened and _touched(name, cuts):
            steps.append(OpenHeads.of(name, module))
        counted = numbers.get(name, {})
        attributes = static_sizes(module, _own_shapes(name, module, shapes, first), counted) | counted
        own = _channel_steps(structure, name, cuts.get(name, {}), attributes) if name in cuts or attributes else []
        stream = torch.from_numpy(stays[structure.gathers.get(name, np.zeros(0, np.int64))])
        steps += own if stream.all() else [_renumbered(name, module, own, stream)]
    return tuple(steps)


def _channel_steps(
    structure: Structure, module: str, cuts: Mapping[str, Cut], attributes: Mapping[str, tuple[Any, Any]]
) -> list[KeepChannels]:
    """Return the step of one module; a step takes up one constant, so that further weights with theirs have steps of their own."""
    rest, steps = dict(cuts), []
    for name, cut in cuts.items():
        absorbed = structure.absorbed.get(f"{module}.{name}".lstrip("."))
        if absorbed is not None and 1 in cut.keep:
            bias = absorbed.bias.rpartition(".")[2]
            taken = {"weight": name, "bias": bias, "value": absorbed.value}
            steps.append(KeepChannels(module, {key: rest.pop(key) for key in (name, bias) if key in rest}, {}, taken))
    if len(steps) == 1:
        only = steps.pop()
        return [KeepChannels(module, dict(cuts), attributes, only.absorb)]
    return [*steps, KeepChannels(module, rest, attributes)]


def _renumbered(module: str, layer: Any, own: Sequence[KeepChannels], stream: Tensor) -> GatherInputs:
    """Return the step of a layer that gathers its channels from a stream of which only ``stream`` stays.

    If it loses all that it reads, it goes on to read the first that stays, with weights of zero.
    """
    only, before = next(iter(own), KeepChannels(module, {})), reads_of(layer)
    after, keep = before[stream], torch.ones(int(before.sum()), dtype=torch.bool)
    if not after.any():
        after[0], keep[0] = True, False
        whole = {"weight": Cut(tuple(layer.weight.shape), {})}  # a single input is none that a cut could take
        only = dataclasses.replace(only, tensors=whole | dict(only.tensors))
    return GatherInputs.of(only, before, after, keep)


def _touched(name: str, cuts: Iterable[str]) -> bool:
    return any(owner == name or owner.startswith(f"{name}.") for owner in cuts)


def _cut(structure: Structure, slots: Sequence[Slot], stays: np.ndarray) -> Cut:
    keep, zero, grid = {}, [], None
    for slot in slots:
        kept = torch.from_numpy(stays[slot.units])
        if structure.gathered(slot) and not kept.any():
            kept[0] = True
        if slot.units.ndim == 2:
            grid = pack_bits(kept)
        elif not kept.all():
            keep[slot.axis] = pack_bits(kept)
            if slot.zeroed:
                zero.append(slot.axis)
    return Cut(structure.shapes[slots[0].tensor], keep, grid, tuple(zero))


def _own_shapes(
    name: str, module: nn.Module, shapes: Mapping[str, tuple[int, ...]], first: Mapping[int, str]
) -> dict[str, tuple[int, ...]]:
    """Return the new shapes of the module's own tensors, tied ones under the name that they have here."""
    own = {}
    for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        full = first.get(id(tensor), f"{name}.{key}".lstrip("."))
        if full in shapes:
            own[key] = shapes[full]
    if nn.utils.parametrize.is_parametrized(module):
        for key, computed in module.parametrizations.items():  # type: ignore[union-attr,operator]
            for part, tensor in computed.named_parameters():
                full = f"{name}.parametrizations.{key}.{part}".lstrip(".")
                if full in shapes and tensor.shape == getattr(module, key).shape:
                    own[key] = shapes[full]
    return own


def _numbers(model: nn.Module, sizes: Sequence[Size], stays: np.ndarray) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Return the attributes that follow the number of units that stay: before and after, by module and name."""
    found: dict[str, dict[str, tuple[Any, Any]]] = {}
    for size in sizes:
        after = size.after(stays)
        if size.attribute is None or after == size.before:
            continue
        own = found.setdefault(size.module, {})
        if size.index is None:
            own[size.attribute] = (size.before, after)
        else:
            before = list(getattr(model.get_submodule(size.module), size.attribute))
            changed = own.get(size.attribute, (before, before))[1].copy()
            changed[size.index] = after
            own[size.attribute] = (before, changed)
    return found


def static_sizes(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], counted: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[Any, Any]]:
    """Return the attributes of torch's own modules that say what their tensors' shapes say: before and after.

    Args:
        module: The module, as it is.
        shapes: New shapes of its tensors, by name; those that are missing stay.
        counted: Attributes that were counted otherwise, the number of groups of a convolution: before and after.
    """
    if not shapes:
        return {}
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    after = {name: tuple(t.shape) for name, t in tensors} | dict(shapes)
    if isinstance(module, _WEIGHTED) and "weight" not in after:
        return {}
    groups = counted["groups"][1] if "groups" in counted else getattr(module, "groups", 1)
    found = {key: value for key, value in _sizes_of(module, after, groups).items() if getattr(module, key) != value}
    return {key: (_plain(getattr(module, key)), _plain(value)) for key, value in found.items()}


def _sizes_of(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], groups: int) -> dict[str, Any]:
    weight = shapes.get("weight", ())
    if isinstance(module, nn.Linear):
        return {"in_features": weight[1], "out_features": weight[0]}
    if isinstance(module, _TRANSPOSED):
        return {"in_channels": weight[0], "out_channels": weight[1] * groups}
    if isinstance(module, _CONVOLUTIONS):
        return {"in_channels": weight[1] * groups, "out_channels": weight[0]}
    if isinstance(module, _PER_CHANNEL):
        sizes = [shapes[name][0] for name in ("weight", "running_mean") if name in shapes]
        return {"num_features": sizes[0]} if sizes else {}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": weight[0]} if weight else {}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": weight} if weight else {}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight[0]}
    if isinstance(module, nn.RNNBase):
        return {"input_size": shapes["weight_ih_l0"][1], "hidden_size": shapes["weight_hh_l0"][1]}
    return _heads(module, shapes) if isinstance(module, nn.MultiheadAttention) else {}


def _heads(module: nn.MultiheadAttention, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    inner = shapes["in_proj_weight"][0] // 3 if "in_proj_weight" in shapes else shapes["v_proj_weight"][0]
    return {"num_heads": inner // module.head_dim}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def removed_units(structure: Structure, steps: Iterable[Step]) -> np.ndarray:
    """Return which units ``steps``, made by :func:`removal_steps`, take away, ``[units]``, boolean."""
    gone = np.zeros(structure.count, bool)
    cuts = {
        step.key(name): cut for step in steps if isinstance(step, KeepChannels) for name, cut in step.tensors.items()
    }
    for slot in structure.slots:
        cut = cuts.get(slot.tensor)
        if cut is not None and slot.zeroed and slot.axis in cut.keep:
            kept = unpack_bits(cut.keep[slot.axis], len(slot.units)).numpy()
            gone[slot.units[~kept & (slot.units >= 0)]] = True
    return gone


def left_alone(structure: Structure, layers: Iterable[str]) -> dict[str, str]:
    """Return why none of the channels that a layer writes can leave, by name; layers of which some can are not in it.

    Args:
        structure: All units.
        layers: Names of layers that hold weights.
    """
    owned: dict[str, list[Slot]] = {}
    for slot in structure.slots:
        owned.setdefault(slot.tensor.rpartition(".")[0], []).append(slot)
    found = {}
    for name in layers:
        slots = owned.get(name, [])
        written = [slot for slot in slots if slot.zeroed] or slots
        if not slots:
            found[name] = "it is not used in what was traced"
        elif not any((slot.units >= 0).any() for slot in written):
            found[name] = structure.reasons.get((written[0].tensor, written[0].axis), "it has a single channel")
    return dict(sorted(found.items()))
