"""Why a layer cannot be replaced by another module: whatever still needs the dense weight, or would be lost with it.

Some of it shows on the layer (:func:`obstacle`), some only in the model around it (:func:`obstacles`). A parent that
reads ``self.fc.weight`` instead of calling ``self.fc`` is found in the bytecode of its methods; names that are put
together at run time are not seen there, and end as an ``AttributeError`` in the self-check after the change.

Hooks are not moved: they belong to whoever registered them, may read the weight, and hold handles that a copy would not
know.
"""

import dis
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from types import CodeType

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_prune.structure.factorized import Factorized
from lightning_prune.structure.layers import LAYERS, is_plain
from lightning_prune.structure.mpo import MPO
from lightning_prune.structure.rotated import Rotated

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = {"weight", "bias", "in_features", "out_features", "in_channels", "out_channels"}  # what a factorized layer lacks
_OWN |= {"kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"}
_BEFORE_TRAINING = re.compile("init|reset|load")  # methods that are over once the weights are there


def obstacle(layer: nn.Module) -> str | None:
    """Say why a layer cannot be factorized, as far as the layer itself shows it.

    Args:
        layer: Any module.

    Returns:
        The reason, as a phrase without subject or full stop, or ``None`` if nothing stands in the way.
    """
    name = type(layer).__name__
    if parametrize.is_parametrized(layer):
        return "its parameters are parametrized (weight_norm, spectral_norm, ...): remove the parametrization first"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy and has no shape yet: run one batch through the model first"
    if "quantized" in type(layer).__module__:
        return f"{name} is quantized"
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return "transposed convolutions are not factorized"
    if not is_plain(layer):
        base = next((base for base in LAYERS.values() if isinstance(layer, base)), None)
        return f"{name} is not factorized" if base is None else f"{name} extends {base.__name__} with code of its own"
    if layer._parameters.get("weight") is None:
        return "its weight is computed by a hook (weight_norm, spectral_norm, pruning mask): make it permanent first"
    if set(layer._parameters) - {"weight", "bias"} or layer._buffers or layer._modules:
        return "it carries further parameters, buffers or modules (an adapter, a mask)"
    return _obstacle_of_weight(layer) or _obstacle_of_calls(layer)


def obstacles(model: nn.Module) -> dict[str, str]:
    """List every module of a model whose weights cannot be factorized, with the reason.

    Args:
        model: The model; only looked at.

    Returns:
        Reason by module name, in the order of ``named_modules``, for every Linear and convolution, every module that
        holds a parameter of two or more dimensions itself, and every lazy or quantized one, that cannot be factorized.
    """
    around, found = obstacles_around(model), {}
    cores = {id(module.cores) for module in model.modules() if isinstance(module, MPO)}
    for name, module in model.named_modules():
        reason = "they are factors already" if id(module) in cores else obstacle(module) or around.get(name)
        if reason is not None and (_holds_weights(module) or isinstance(module, tuple(LAYERS.values()))):
            found[name] = reason
    return found


def obstacles_around(model: nn.Module) -> dict[str, str]:
    """List the modules that something around them needs as they are, with the reason; of a shared one only its first name."""
    return _shared(model) | _read_by_others(model) | _wrapped(model)


def _obstacle_of_weight(layer: nn.Module) -> str | None:
    weight = layer.weight
    if type(weight) is not nn.Parameter or (layer.bias is not None and type(layer.bias) is not nn.Parameter):
        return f"its weight is a {type(weight).__name__}, not a plain tensor (sharded, quantized)"
    if weight.dtype not in _DTYPES:
        return f"its weight is of type {str(weight.dtype).removeprefix('torch.')}"
    if weight.is_meta:
        return "its weight is on the meta device and has no values"
    if weight.numel() == 0:
        return "its weight is empty"
    if getattr(layer, "groups", 1) > 1 and layer.groups == layer.in_channels == layer.out_channels:
        return "depthwise: the matrix of every group has one row"
    return None


def _obstacle_of_calls(layer: nn.Module) -> str | None:
    if "forward" in vars(layer):
        return "its forward was replaced on this instance"
    if any(getattr(layer, hooks) for hooks in _HOOKS):
        return "it has hooks, which would be lost: remove them first (handle.remove())"
    return None


def _holds_weights(module: nn.Module) -> bool:
    if "quantized" in type(module).__module__ or isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return True
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


def _shared(model: nn.Module) -> dict[str, str]:
    """Find modules with two names, and parameters with two names."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    owners: dict[nn.Parameter, list[str]] = defaultdict(list)
    for module, (first, *_) in names.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners[parameter].append(f"{first}.{key}".removeprefix("."))
    found = {}
    for module, all_names in names.items():
        tied = [owners[p] for p in module._parameters.values() if p is not None and len(owners[p]) > 1]
        if tied:
            found[all_names[0]] = f"its parameters are tied: {' = '.join(tied[0])}"
        elif len(all_names) > 1:
            found[all_names[0]] = f"it is used under several names: {', '.join(all_names)}"
    return found


def _read_by_others(model: nn.Module) -> dict[str, str]:
    """Find modules whose own attributes a method of another module reads, past their forward."""
    found: dict[str, str] = {}
    known: dict[type, list[tuple[str, str, str]]] = {}
    for name, module in model.named_modules():
        cls = type(module)
        if cls not in known:
            known[cls] = _reads(cls)
        for path, attribute, method in known[cls]:
            reason = f"{cls.__name__}.{method} reads its {attribute} instead of calling it"
            found.setdefault(f"{name}.{path}".removeprefix("."), reason)
    return found


def _reads(cls: type) -> list[tuple[str, str, str]]:
    """List ``(path, attribute, method)`` for every ``x.path.attribute`` in a class's methods, attribute in ``_OWN``."""
    found = []
    for base in cls.__mro__:
        for method, member in vars(base).items() if base not in (nn.Module, object) else ():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if isinstance(code, CodeType) and not _BEFORE_TRAINING.search(method):
                found += [(path, attribute, method) for path, attribute in _chains(code)]
    return found


def _chains(code: CodeType) -> Iterator[tuple[str, str]]:
    if _OWN & set(code.co_names):
        path: list[str] = []
        for instruction in dis.get_instructions(code):
            if instruction.opname == "EXTENDED_ARG":
                continue
            if instruction.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                path = []
                continue
            if path and instruction.argval in _OWN:
                yield ".".join(path), instruction.argval
            path.append(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _chains(constant)


def _wrapped(model: nn.Module) -> dict[str, str]:
    """Find layers that are factors already, and layers inside of adapters, whose code reads and changes the weight."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Factorized | Rotated):
            reasons = dict.fromkeys(module._modules, "it is a factor already")
            found |= {f"{name}.{child}".removeprefix("."): reason for child, reason in reasons.items()}
        if any(key.startswith("lora_") for key in [*module._modules, *module._parameters]):
            reason = f"it is wrapped by the adapter {type(module).__name__}: merge the adapter first"
            found |= {f"{name}.{below}".strip("."): reason for below, _ in module.named_modules()}
    return found
