"""Rules for operations on elements: what meets in one element leaves together."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from lightning_prune.structure.tracing.site import Site
from lightning_prune.structure.tracing.values import Field, Value, core

_ARITHMETIC = {
    "mul",
    "multiply",
    "div",
    "divide",
    "true_divide",
    "add",
    "sub",
    "rsub",
    "pow",
    "floor_divide",
    "remainder",
}
_COMMON = (-1, 0, 0.5, 1, 2)  # numbers that stand in code as they are
_PRODUCTS = {"mul", "multiply", "logical_and", "bitwise_and"}
_QUOTIENTS = {"div", "divide", "true_divide"}


def pointwise(site: Site, *args: Any, **kwargs: Any) -> Value:
    """Unite the labels of all operands, aligned from the right; the size of an axis that one operand fixes is fixed for all."""
    operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Value)]
    operands += [v for a in args if isinstance(a, tuple | list) for v in a if isinstance(v, Value)]
    product = _kind(site) in _PRODUCTS
    if _kind(site) in _ARITHMETIC and any(isinstance(a, int | float) and a not in _COMMON for a in args):
        site.labels.written = True  # the number may be made of a size, as in x / math.sqrt(x.shape[1])
    return combine(site, operands, lambda ats: _evaluate(site, args, kwargs, operands, ats), product=product)


def combine(
    site: Site, operands: list[Value], at: Any, shape: tuple[int, ...] | None = None, product: bool = False
) -> Value:
    """Unite the fields of operands of broadcastable shapes.

    Args:
        site: The operation.
        operands: Its tensors.
        at: Computes what an element holds whose slice has left, from what each operand holds there (None if unknown or not leaving).
        shape: Shape of the result, by default that of the operation.
        product: Whether one operand that is zero makes the result zero.
    """
    shape = site.shape if shape is None else shape
    groups: list[list[tuple[int, Field]]] = []
    for index, value in enumerate(operands):
        for own in value.fields:
            field = Field(_aligned(own.labels, shape), own.at, own.weights)
            if not field.axes:  # one slice spread over an axis that the other operand has in full
                site.freeze(field, f"a single channel is spread over many by {site.name}")
                continue
            met = [g for g in groups if any(set(f.axes) & set(field.axes) for _, f in g)]
            merged = [(index, field), *(item for g in met for item in g)]
            groups = [g for g in groups if not any(g is m for m in met)] + [merged]
    fields = [_united(site, operands, group, at, shape, product) for group in groups]
    fill = None
    if operands and all(v.fill is not None for v in operands):
        fill = _finite(at([v.fill for v in operands]))
    return Value(shape, tuple(fields), fill, None, all(v.weights for v in operands))


def _united(
    site: Site, operands: list[Value], group: list[tuple[int, Field]], at: Any, shape: tuple[int, ...], product: bool
) -> Field:
    """Make one field of those that meet: one of each operand, or several along different axes."""
    weights = all(v.weights for v in operands)
    widest = max((field for _, field in group), key=lambda f: (len(f.axes), product and f.at == 0))
    one = product and widest.at == 0  # it is enough that one factor is zero, and another may not be: w / |w| * scale
    for _, field in group:
        if field is not widest:
            site.labels.unite(field.labels, widest.labels, alike=weights and not one)
        if not weights:
            site.labels.produce(field)
    axes = {axis for _, field in group for axis in field.axes}
    for value in operands:
        _meet(site, value, widest, axes, len(shape))
    ats: list[float | None] = [value.fill for value in operands]
    for index in {index for index, _ in group}:
        own = {field.at for i, field in group if i == index}
        ats[index] = own.pop() if len(own) == 1 else None
    found = 0.0 if one and weights else at(ats)
    if found != _finite(found) and not weights:
        site.freeze(widest, f"{site.name} would make it infinite when masked")
    if axes != set(widest.axes):
        site.freeze(widest, f"{site.name} mixes slices along several axes")
        for _, field in group:
            site.freeze(field, f"{site.name} mixes slices along several axes")
    return Field(widest.labels, _finite(found), weights)


def _finite(at: float | None) -> float | None:
    return at if at is not None and math.isfinite(at) else None


def _meet(site: Site, value: Value, field: Field, axes: set[int], rank: int) -> None:
    """See what an operand without labels along ``axes`` means for ``field``: its size there is fixed, or written in the code."""
    for axis in axes:
        own = axis - rank + len(value.shape)
        if own < 0 or value.shape[own] <= 1 or value.along(own) is not None:
            continue
        if value.fill is not None:
            site.sized(value.shape[own], field, axis)
        else:
            site.freeze(field, f"{site.name} meets a tensor of fixed size there")


def _aligned(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Lay labels out in ``shape``, aligned from the right."""
    labels = core(labels)
    sizes = tuple(labels.shape)[max(0, labels.ndim - len(shape)) :]
    return labels.reshape((1,) * (len(shape) - len(sizes)) + sizes).expand(shape)


def _evaluate(site: Site, args: Any, kwargs: Any, operands: list[Value], ats: list[float | None]) -> float | None:
    """Compute one element whose slice has left, by running the operation on numbers."""
    kind = _kind(site)
    if kind in _PRODUCTS and 0.0 in ats:
        return 0.0
    if kind in _QUOTIENTS and len(ats) > 1 and ats[0] == 0.0 and ats[1] != 0.0:
        return 0.0
    if kind == "addcmul" and ats[0] == 0.0 and 0.0 in ats[1:]:
        return 0.0
    if kind == "masked_fill" and ats[0] is not None and len(args) > 2 and args[2] == ats[0]:
        return ats[0]
    if kind == "where" and len(ats) > 2 and ats[1] is not None and ats[1] == ats[2]:
        return ats[1]
    if kind == "rrelu" and ats[0] == 0.0:
        return 0.0
    if any(at is None for at in ats) or not operands or torch.Tag.nondeterministic_seeded in site.target.tags:
        return None
    numbers = iter(ats)

    def number(item: Any) -> Any:
        if isinstance(item, Value):
            return torch.tensor(next(numbers), dtype=torch.float64)
        if isinstance(item, tuple | list):
            return [number(part) for part in item]
        return item

    plain = {
        key: item
        for key, item in kwargs.items()
        if key not in ("dtype", "device", "layout", "memory_format", "pin_memory")
    }
    try:
        name = site.target._schema.name.removeprefix("aten::")
        packet = getattr(torch.ops.aten, name.rstrip("_") if name.rstrip("_") in dir(torch.ops.aten) else name)
        with torch.no_grad():
            return float(packet(*[number(a) for a in args], **{k: number(v) for k, v in plain.items()}))
    except (RuntimeError, TypeError, ValueError):
        return None


def _kind(site: Site) -> str:
    return site.target._schema.name.removeprefix("aten::").rstrip("_")


def same(site: Site, value: Any, *others: Any, **named: Any) -> Any:
    """Pass on labels and numbers: copies, casts."""
    for other in (*others, *named.values()):
        site.ignore(other)  # gives its type
    example = site.node.meta.get("val")
    if not isinstance(value, Value) or not isinstance(example, Tensor):
        site.ignore(value)
        return site.outputs()
    if example.is_floating_point():
        return Value(value.shape, value.fields, value.fill, value.source, value.weights)
    fields = tuple(dataclasses.replace(f, at=_whole(f.at)) for f in value.fields)
    return Value(value.shape, fields, _whole(value.fill), None, value.weights)


def _whole(at: float | None) -> float | None:
    return at if at is not None and at == int(at) else None


def dropout(site: Site, value: Value, *_: Any, **__: Any) -> Value:
    """Pass on labels; a constant other than zero does not stay one in train mode."""
    fields = tuple(Field(f.labels, f.at if f.at == 0 or not site.training else None, False) for f in value.fields)
    return Value(value.shape, fields)


def prelu(site: Site, value: Value, weight: Value) -> Value:
    """Unite the slopes with the channels, which are the second axis."""
    if math.prod(weight.shape) > 1:
        view = [1] * len(value.shape)
        view[1] = weight.shape[0]
        lines = tuple(Field(core(f.labels).reshape(view).expand(view), f.at, f.weights) for f in weight.fields)
        weight = Value(tuple(view), lines, None, weight.source, True)
    return combine(site, [value, weight], lambda ats: 0.0 if ats[0] == 0 else None)


def copy_into(site: Site, value: Value, source: Any, *_: Any, **__: Any) -> Value:
    """Unite what is overwritten with what is written."""
    if not isinstance(source, Value):
        return pointwise(site, value)
    found = combine(site, [value, source], lambda ats: ats[1])
    return found


def created(site: Site, *args: Any, **kwargs: Any) -> Value:
    """Return a tensor of one number; its sizes may be written in the user's code."""
    name = site.target._schema.name.removeprefix("aten::")
    fill: float | None = None
    if "zeros" in name:
        fill = 0.0
    elif "ones" in name:
        fill = 1.0
    elif "full" in name or name == "scalar_tensor":
        number = kwargs.get("fill_value", args[-1] if args else None)
        fill = float(number) if isinstance(number, int | float) and not isinstance(number, bool) else None
    for given in args:
        site.ignore(given)
    if name.endswith("_like") and isinstance(args[0], Value):
        fields = tuple(Field(f.labels, fill, False) for f in args[0].fields)
        return Value(args[0].shape, fields, None if fields else fill)
    return Value(site.shape, (), fill)


RULES: dict[str, Any] = {
    **dict.fromkeys(
        (
            "clone",
            "contiguous",
            "alias",
            "detach",
            "detach_",
            "to",
            "_to_copy",
            "type_as",
            "lift_fresh",
            "lift_fresh_copy",
            "positive",
            "requires_grad_",
            "_assert_tensor_metadata",
        ),
        same,
    ),
    **dict.fromkeys(
        ("dropout", "dropout_", "feature_dropout", "alpha_dropout", "native_dropout", "feature_alpha_dropout"), dropout
    ),
    **dict.fromkeys(
        (
            "zeros",
            "ones",
            "full",
            "new_zeros",
            "new_ones",
            "new_full",
            "zeros_like",
            "ones_like",
            "full_like",
            "scalar_tensor",
            "arange",
            "empty",
            "new_empty",
            "empty_like",
            "rand",
            "randn",
            "rand_like",
            "randn_like",
            "linspace",
            "eye",
        ),
        created,
    ),
    "prelu": prelu,
    "copy_": copy_into,
    "fill_": pointwise,
    "zero_": pointwise,
    **dict.fromkeys(
        (
            "relu6",
            "hardswish",
            "silu",
            "mish",
            "selu",
            "celu",
            "rrelu",
            "softsign",
            "log_sigmoid",
            "hardshrink",
            "threshold",
        ),
        pointwise,
    ),
}
