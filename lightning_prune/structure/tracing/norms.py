"""Rules for normalization, pooling and reductions."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_prune.structure.tracing.elementwise import combine, pointwise
from lightning_prune.structure.tracing.site import Site
from lightning_prune.structure.tracing.values import Field, Value, core, tidy, varying


def batch_norm(
    site: Site, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, var: Value | None, *_: Any
) -> Value:
    """Normalize every channel by itself; the masked model holds scale, shift and, without a scale, the mean at zero."""
    return _by_channel(site, x, [weight, bias, mean, var], 1 if weight is None else 2)


def instance_norm(
    site: Site, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, var: Value | None, *_: Any
) -> Value:
    """Normalize every channel of every example by itself."""
    return _by_channel(site, x, [weight, bias, mean, var], 4 if weight is None else 5)


def _by_channel(site: Site, x: Value, parts: Sequence[Value | None], price: int) -> Value:
    for field in x.fields:
        if 1 not in field.axes:
            site.freeze(field, f"{site.name} normalizes over it")
    channels = x.along(1)
    if channels is None:
        for part in parts:
            site.freeze_all(part, f"{site.name} normalizes channels whose number is fixed")
        return Value(x.shape)
    channels = site.labels.merge(channels, tuple(a for a in channels.axes if a != 1))
    line = core(channels.labels).flatten()
    site.labels.produce(channels)
    for index, part in enumerate(parts):
        if part is not None and part.fill is not None and not part.fields:
            site.sized(len(line), line, 0)
        for field in part.fields if part is not None else ():
            site.labels.unite(line, core(field.labels).flatten())
            if index < 2:
                site.labels.produce(field)
            elif index == 2 and parts[0] is None:
                site.labels.produced.update(core(field.labels).flatten().tolist())
    fixed = math.prod(size for axis, size in enumerate(x.shape) if axis != 1)
    site.cost(fixed * price, [line])
    if isinstance(site.module, nn.modules.batchnorm._NormBase) and all(part is None for part in parts):
        site.sized(len(line), line, 0, "num_features")
    at = _left(parts[0], parts[1]) if parts[0] is not None else 0.0 if channels.at == 0 else None
    return Value(x.shape, (Field(channels.labels, at, False),))


def _left(scale: Value, shift: Value | None) -> float | None:
    """Return what is left of a channel behind a norm whose scale the masked model holds at zero: the shift."""
    if any(field.at != 0 for field in scale.fields):
        return None
    shifts = [field.at for field in shift.fields] if shift is not None else [0.0]
    return shifts[0] if len(shifts) == 1 else None


def layer_norm(
    site: Site, x: Value, normalized: Sequence[int], weight: Value | None = None, bias: Value | None = None, *_: Any
) -> Value:
    """Normalize over the last axes: channels under the norm never leave, rows along other axes may."""
    axes = tuple(range(len(x.shape) - len(normalized), len(x.shape)))
    why = f"{site.name} normalizes over it"
    for part in (weight, bias):
        site.freeze_all(part if isinstance(part, Value) else None, why)
    found = _over(site, x, axes, why, at=None)
    price = math.prod(x.shape) * (4 if weight is None else 5)
    counted = math.prod(x.shape[axis] for field in found.fields for axis in field.axes)
    site.cost(price // counted, [field.labels for field in found.fields])
    return found


def rms_norm(site: Site, x: Value, normalized: Sequence[int], weight: Value | None = None, *_: Any) -> Value:
    """Normalize over the last axes by the root of the mean square."""
    return layer_norm(site, x, normalized, weight)


def group_norm(
    site: Site, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, *_: Any
) -> Value:
    """Normalize groups of channels: whole groups leave."""
    why = f"{site.name} normalizes over it"
    for field in x.fields:
        if 1 not in field.axes:
            site.freeze(field, why)
    channels = x.along(1)
    if channels is None or groups == 1:
        for value in (x, weight, bias):
            site.freeze_all(value, why)
        return Value(x.shape)
    channels = site.labels.merge(channels, tuple(a for a in channels.axes if a != 1))
    line = core(channels.labels).flatten()
    rows = line.reshape(groups, -1)
    site.labels.unite(rows, rows[:, :1].expand_as(rows))
    site.labels.produce(channels)
    for part in (weight, bias):
        for field in part.fields if isinstance(part, Value) else ():
            site.labels.unite(line, core(field.labels).flatten())
            site.labels.produce(field)
    known = isinstance(site.module, nn.GroupNorm) and site.module.num_groups == groups
    site.sized(groups, rows[:, :1], 0, "num_groups" if known else None)
    if known and weight is None:
        site.sized(len(line), line, 0, "num_channels")
    fixed = math.prod(size for axis, size in enumerate(x.shape) if axis != 1)
    site.cost(fixed * (4 if weight is None else 5), [line])
    at = _left(weight, bias) if weight is not None else 0.0 if channels.at is not None else None
    return Value(x.shape, (Field(channels.labels, at, False),))


def _over(site: Site, x: Value, axes: Sequence[int], why: str, at: Any, keep: bool = True) -> Value:
    """Go over ``axes`` as a whole: labels along them alone never leave, rows along others may."""
    fields = []
    axes = tuple(axis % max(1, len(x.shape)) for axis in axes)
    for field in x.fields:
        inner = tuple(a for a in field.axes if a in axes)
        if inner and len(inner) == len(field.axes):
            site.freeze(field, why)
            continue
        whole = site.labels.merge(field, inner) if inner else field
        labels = whole.labels
        if not keep:
            for axis in sorted(axes, reverse=True):
                labels = labels.select(axis, 0)
        fields.append(Field(labels, at(whole.at) if at is not None else None, whole.weights))
    shape = x.shape if keep else tuple(s for a, s in enumerate(x.shape) if a not in axes)
    return Value(shape, tuple(fields), None, None, x.weights)


def softmax(site: Site, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    """Normalize along ``dim``."""
    return _over(site, x, (dim,), f"{site.name} normalizes over it", at=None)


def cumulate(site: Site, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    """Run along ``dim``."""
    zero = site.target._schema.name in ("aten::cumsum", "aten::cumprod")
    return _over(site, x, (dim,), f"{site.name} runs along it", at=lambda at: 0.0 if at == 0 and zero else None)


def reduction(site: Site, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Reduce over some axes; sums and norms of what is zero when masked are exact, all others need every channel."""
    kind = site.target._schema.name.removeprefix("aten::")
    if any(isinstance(other, Value) for other in (*args, *kwargs.values())):
        return pointwise(site, x, *args, **kwargs)  # the larger one of two
    dims = _dims(site, x, args, kwargs)
    sums = kind in ("sum", "nansum") or (kind in ("linalg_vector_norm", "norm") and _order(site, args, kwargs) > 0)
    constant = {
        "sum": _zero,
        "nansum": _zero,
        "linalg_vector_norm": _zero,
        "norm": _zero,
        "var": _spread,
        "std": _spread,
    }
    at = constant.get(kind, _same if kind in ("mean", "amax", "amin", "max", "min", "median") else lambda _: None)
    kept = []
    for field in x.fields:
        if sums and field.at == 0 and set(field.axes) <= set(dims):
            site.labels.produce(field)
            site.labels.mix(field)
        else:
            kept.append(field)
    rest = dataclasses.replace(x, fields=tuple(kept))
    found = _over(site, rest, dims, f"{site.name} goes over it", at=at)
    example = site.node.meta["val"]
    outputs = tuple(example) if isinstance(example, tuple | list) else (example,)
    results = [_reduced(found, dims, tuple(t.shape)) for t in outputs]
    results[1:] = [_inconstant(value) for value in results[1:]]  # indices
    return tuple(results) if isinstance(example, tuple | list) else results[0]


def _inconstant(value: Value) -> Value:
    return dataclasses.replace(value, fields=tuple(dataclasses.replace(f, at=None) for f in value.fields), fill=None)


def _order(site: Site, args: Sequence[Any], kwargs: dict[str, Any]) -> float:
    """Return the order of a norm; norms of order 0 or less see the channels that are zero."""
    given = dict(zip([a.name for a in site.target._schema.arguments][1:], args, strict=False)) | kwargs
    order = given.get("ord", given.get("p", 2))
    return 2.0 if order is None else float(order)


def _zero(at: float | None) -> float | None:
    return 0.0 if at == 0 else None


def _spread(at: float | None) -> float | None:
    return None if at is None else 0.0


def _same(at: float | None) -> float | None:
    return at


def _dims(site: Site, x: Value, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, ...]:
    schema = [a.name for a in site.target._schema.arguments]
    given = dict(zip(schema[1:], args, strict=False)) | kwargs
    dim = given.get("dim")
    rank = len(x.shape)
    if dim is None or dim == []:
        return tuple(range(rank))
    return tuple(d % max(rank, 1) for d in ([dim] if isinstance(dim, int) else dim))


def _reduced(x: Value, dims: Sequence[int], shape: tuple[int, ...]) -> Value:
    fields = []
    for field in x.fields:
        labels = field.labels
        for axis in sorted(dims, reverse=True):
            labels = labels.narrow(axis, 0, 1) if len(shape) == labels.ndim else labels.select(axis, 0)
        fields.append(Field(labels.reshape(shape), field.at, field.weights))
    return Value(shape, tuple(fields), None, None, x.weights)


def pooling(site: Site, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Work on places: every channel by itself."""
    kind = site.target._schema.name.removeprefix("aten::")
    spatial = _spatial(kind)
    axes = tuple(range(len(x.shape) - spatial, len(x.shape)))
    given = dict(zip([a.name for a in site.target._schema.arguments][1:], args, strict=False)) | kwargs
    padding = given.get("padding", 0)
    padded = "avg_pool" in kind and any(padding if isinstance(padding, tuple | list) else [padding])
    padded |= given.get("divisor_override") is not None
    fields = []
    for field in x.fields:
        if set(field.axes) <= set(axes):
            site.freeze(field, f"it is a place in {site.name}")
            continue
        whole = site.labels.merge(field, tuple(a for a in field.axes if a in axes))
        labels = whole.labels
        for place in axes:
            labels = labels.narrow(place, 0, 1)
        at = whole.at if whole.at == 0 or not padded else None
        fields.append((labels, at))
    example = site.node.meta["val"]
    outputs = tuple(example) if isinstance(example, tuple | list) else (example,)
    values = [
        Value(tuple(t.shape), tuple(Field(labels.expand(tuple(t.shape)), at, False) for labels, at in fields))
        for t in outputs
    ]
    values[1:] = [_inconstant(value) for value in values[1:]]  # indices
    if kind in _PRICED and fields:
        into = math.prod(x.shape) if kind == "adaptive_avg_pool2d" else math.prod(values[0].shape) * _PRICED[kind]
        counted = math.prod(labels.shape[a] for labels, _ in fields for a in varying(labels))
        site.cost(into // counted, [labels for labels, _ in fields])
    return tuple(values) if isinstance(example, tuple | list) else values[0]


_PRICED = {
    "adaptive_avg_pool2d": 1,
    "upsample_nearest2d": 1,
    "upsample_bilinear2d": 4,
    "grid_sampler": 4,
    "grid_sampler_2d": 4,
}


def _spatial(kind: str) -> int:
    for dims in (1, 2, 3):
        if f"{dims}d" in kind:
            return dims
    return {"upsample_linear1d": 1, "grid_sampler": 2}.get(kind, 2)


def glu(site: Site, x: Value, dim: int = -1) -> Value:
    """``a * sigmoid(b)`` of two halves: their channels leave in pairs."""
    dim %= len(x.shape)
    half = x.shape[dim] // 2
    parts = []
    for start in (0, half):
        fields = tuple(Field(tidy(f.labels.narrow(dim, start, half)), f.at, f.weights) for f in x.fields)
        parts.append(Value(site.shape, tuple(f for f in fields if f.axes)))
    channels = x.along(dim)
    if channels is not None and channels.axes == (dim,) and half > 1:
        site.labels.tie(*torch.split(core(channels.labels).flatten(), half))
    elif channels is not None:
        site.freeze(channels, f"{site.name} halves it")
    return combine(site, parts, lambda ats: 0.0 if ats[0] == 0 else None)


RULES: dict[str, Any] = {
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"), batch_norm),
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), softmax),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp"), cumulate),
    **dict.fromkeys(
        (
            "sum",
            "mean",
            "amax",
            "amin",
            "max",
            "min",
            "median",
            "var",
            "std",
            "var_mean",
            "std_mean",
            "norm",
            "linalg_vector_norm",
            "logsumexp",
            "prod",
            "any",
            "all",
            "argmax",
            "argmin",
            "nansum",
            "nanmean",
            "mode",
            "aminmax",
        ),
        reduction,
    ),
    **dict.fromkeys(
        (
            "max_pool1d",
            "max_pool2d",
            "max_pool3d",
            "max_pool2d_with_indices",
            "avg_pool1d",
            "avg_pool2d",
            "avg_pool3d",
            "adaptive_avg_pool1d",
            "adaptive_avg_pool2d",
            "adaptive_avg_pool3d",
            "adaptive_max_pool1d",
            "adaptive_max_pool2d",
            "adaptive_max_pool3d",
            "upsample_nearest1d",
            "upsample_nearest2d",
            "upsample_nearest3d",
            "upsample_linear1d",
            "upsample_bilinear2d",
            "upsample_bicubic2d",
            "upsample_trilinear3d",
            "_upsample_bilinear2d_aa",
            "upsample_nearest_exact2d",
        ),
        pooling,
    ),
    "glu": glu,
}
