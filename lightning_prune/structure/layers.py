"""Dense layers as data: the JSON form from which a plan builds a layer of the same shape.

Layout; the padding may also be ``"same"`` or ``"valid"``, and a Linear has only ``type``, ``in``, ``out``, ``bias``::

    {"type": "Conv2d", "in": 3, "out": 8, "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1],
     "groups": 1, "padding_mode": "zeros", "bias": true}
"""

from collections.abc import Mapping
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import nn

from lightning_prune.errors import ModelError, PlanError

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
DenseLayer: TypeAlias = nn.Linear | Conv

LAYERS: dict[str, type[DenseLayer]] = {
    "Linear": nn.Linear,
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
}
_LINEAR_KEYS = {"type", "in", "out", "bias"}
_CONV_KEYS = _LINEAR_KEYS | {"kernel", "stride", "padding", "dilation", "groups", "padding_mode"}


def is_plain(layer: nn.Module) -> TypeGuard[DenseLayer]:
    """Tell whether ``layer`` is exactly a Linear or a Conv1d, 2d or 3d: a subclass may compute something else."""
    return type(layer) in LAYERS.values()


def describe(layer: nn.Module) -> dict[str, Any]:
    """Describe a dense layer in JSON types; :func:`layer_from` is the inverse up to values, dtype and device.

    Args:
        layer: A plain Linear, Conv1d, Conv2d or Conv3d.

    Returns:
        The description, as in the module's docstring.

    Raises:
        ModelError: If ``layer`` is of another type.
    """
    if not is_plain(layer):
        raise ModelError(
            f"A layer of type {type(layer).__name__} cannot be described; allowed are {', '.join(LAYERS)} themselves, "
            "not subclasses."
        )
    if isinstance(layer, nn.Linear):
        return {"type": "Linear", "in": layer.in_features, "out": layer.out_features, "bias": layer.bias is not None}
    return {
        "type": type(layer).__name__,
        "in": layer.in_channels,
        "out": layer.out_channels,
        "kernel": list(layer.kernel_size),
        "stride": list(layer.stride),
        "padding": layer.padding if isinstance(layer.padding, str) else list(layer.padding),
        "dilation": list(layer.dilation),
        "groups": layer.groups,
        "padding_mode": layer.padding_mode,
        "bias": layer.bias is not None,
    }


def layer_from(
    spec: Mapping[str, Any], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> DenseLayer:
    """Build a layer of the described shape, its values uninitialised; no random number is drawn.

    Args:
        spec: A description made by :func:`describe`.
        device: Where the parameters shall live.
        dtype: Their type.

    Returns:
        The layer, in training mode, parameters not filled in.

    Raises:
        PlanError: If ``spec`` is not such a description.
    """
    kind = spec.get("type")
    keys = _LINEAR_KEYS if kind == "Linear" else _CONV_KEYS
    if kind not in LAYERS or set(spec) != keys:
        raise PlanError(
            f"A description of a layer needs 'type' ({', '.join(LAYERS)}) and {', '.join(sorted(keys - {'type'}))}, "
            f"got {dict(spec)!r}. The plan is damaged or was written by another version."
        )
    try:
        layer = _on_meta(spec, dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(f"No layer can be built from {dict(spec)!r}: {error}. The plan is damaged.") from error
    return layer.to_empty(device=device)


def _on_meta(spec: Mapping[str, Any], dtype: torch.dtype) -> DenseLayer:
    if spec["type"] == "Linear":
        return nn.Linear(spec["in"], spec["out"], bias=spec["bias"], device="meta", dtype=dtype)
    conv: Any = LAYERS[spec["type"]]
    padding = spec["padding"] if isinstance(spec["padding"], str) else tuple(spec["padding"])
    layer: Conv = conv(
        spec["in"],
        spec["out"],
        tuple(spec["kernel"]),
        stride=tuple(spec["stride"]),
        padding=padding,
        dilation=tuple(spec["dilation"]),
        groups=spec["groups"],
        padding_mode=spec["padding_mode"],
        bias=spec["bias"],
        device="meta",
        dtype=dtype,
    )
    return layer
