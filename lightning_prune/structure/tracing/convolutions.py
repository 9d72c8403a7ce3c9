"""Rules for convolutions: with groups, either whole groups leave or every group gets thinner."""

import math
from typing import Any

from torch import Tensor, nn

from lightning_prune.structure.tracing.elementwise import combine
from lightning_prune.structure.tracing.products import added, take_up
from lightning_prune.structure.tracing.site import Site
from lightning_prune.structure.tracing.values import Field, Value, core, vector


def convolution(site: Site, x: Value, weight: Value, bias: Value | None = None, *rest: Any, **named: Any) -> Value:
    """Convolution in one, two or three dimensions; weight ``[out, in / groups, *kernel]``."""
    options = dict(zip(("stride", "padding", "dilation", "groups"), rest, strict=False)) | named
    groups = int(options.get("groups", 1))
    padding = options.get("padding", 0)
    padded = padding == "same" or (padding != "valid" and any(_list(padding)))
    channels, rows = _channels(site, x, weight), weight.along(0)
    if groups == 1:
        _sum_over(site, channels, weight, 1, bias, padded)
    elif weight.source in site.labels.thinned:
        _thinner(site, channels, rows, weight, groups)
    else:
        _fewer(site, channels, rows, weight, groups)
    places = math.prod(site.shape) // weight.shape[0] * math.prod(weight.shape[2:])
    axes = [f.labels for f in (rows, channels) if f is not None]
    if groups == 1:
        fixed = math.prod(size for size, f in zip(weight.shape[:2], (rows, channels), strict=True) if f is None)
        site.cost(places * fixed, axes)
    elif weight.source in site.labels.thinned:
        site.cost(places, axes, groups)
    elif rows is not None:
        site.cost(places * weight.shape[1], [rows.labels])
    return _result(site, x, weight, rows, bias)


def transposed_convolution(
    site: Site, x: Value, weight: Value, bias: Value | None = None, *rest: Any, **named: Any
) -> Value:
    """Transposed convolution; weight ``[in, out / groups, *kernel]``; with groups nothing leaves."""
    options = dict(zip(("stride", "padding", "output_padding", "groups", "dilation"), rest, strict=False)) | named
    channels, rows = _channels(site, x, weight), weight.along(1)
    if int(options.get("groups", 1)) != 1:
        for value in (x, weight, bias):
            site.freeze_all(value, f"{site.name} is transposed and has groups")
        return _result(site, x, weight, None, None)
    _sum_over(site, channels, weight, 0, bias, True)
    places = math.prod(x.shape) // weight.shape[0] * math.prod(weight.shape[2:])
    fixed = math.prod(size for size, f in zip(weight.shape[:2], (channels, rows), strict=True) if f is None)
    site.cost(places * fixed, [f.labels for f in (rows, channels) if f is not None])
    return _result(site, x, weight, rows, bias)


def _channels(site: Site, x: Value, weight: Value) -> Field | None:
    """Return the field of the input channels as a vector; places and the size of the kernel stay."""
    axis = len(x.shape) - len(weight.shape) + 1
    for field in weight.fields:
        if {0, 1} <= set(field.axes):
            site.freeze(field, f"it is an element of the weight of {site.name}, and no whole row or column")
        elif max(field.axes) > 1:
            if min(field.axes) <= 1:
                site.labels.merge(field, tuple(a for a in field.axes if a > 1))
            else:
                site.freeze(field, "it is the size of a kernel")
    found = None
    for field in x.fields:
        others = tuple(a for a in field.axes if a != axis)
        if axis in field.axes:
            found = site.labels.merge(field, others) if others else field
        else:
            site.freeze(field, f"it is a place in {site.name}")
    return None if found is None else Field(core(found.labels).flatten(), found.at, found.weights)


def _sum_over(site: Site, channels: Field | None, weight: Value, axis: int, bias: Value | None, padded: bool) -> None:
    columns = weight.along(axis)
    if columns is None or channels is None:
        for field in (channels, columns):
            if field is not None:
                site.freeze(field, f"{site.name} sums over channels whose number is fixed")
        return
    site.labels.unite(channels.labels, _vector(columns, axis))
    take_up(site, channels, weight, bias, padded)


def _fewer(site: Site, channels: Field | None, rows: Field | None, weight: Value, groups: int) -> None:
    """Let whole groups leave: their input channels, filters and biases together."""
    columns = weight.along(1)
    if columns is not None:
        site.freeze(columns, f"{site.name} has {groups} groups, which leave as a whole")
        if weight.source is not None and rows is not None:
            site.labels.grouped[weight.source] = _vector(rows, 0).numpy()
    if channels is None or rows is None:
        for field in (channels, rows):
            if field is not None:
                site.freeze(field, f"{site.name} has groups of channels whose number is fixed")
        return
    filters = _vector(rows, 0).reshape(groups, -1)
    inputs = channels.labels.reshape(groups, -1)
    site.labels.unite(filters, filters[:, :1].expand_as(filters))
    site.labels.unite(inputs, inputs[:, :1].expand_as(inputs))
    site.labels.unite(filters[:, 0], inputs[:, 0])
    known = isinstance(site.module, nn.modules.conv._ConvNd) and site.module.groups == groups
    site.sized(groups, filters[:, :1], 0, "groups" if known else None)


def _thinner(site: Site, channels: Field | None, rows: Field | None, weight: Value, groups: int) -> None:
    """Let every group lose equally many filters, and equally many input channels."""
    site.ignore(weight)  # the labels of its columns are replaced by those of the inputs
    if rows is not None:
        site.labels.tie(*_vector(rows, 0).reshape(groups, -1))
    if channels is None:
        site.freeze_all(weight, f"{site.name} has groups of channels whose number is fixed")
        return
    inputs = channels.labels.reshape(groups, -1)
    site.labels.tie(*inputs)
    grid = inputs.repeat_interleave(weight.shape[0] // groups, 0)
    site.labels.replace(weight.source or "", 1, grid)
    if channels.at != 0:
        site.freeze(channels, f"its channels are not zero when masked, and {site.name} sums over them in groups")


def _vector(field: Field, axis: int) -> Tensor:
    labels = core(field.labels)
    for other in range(labels.ndim):
        labels = labels if other == axis else labels.narrow(other, 0, 1)
    return labels.flatten()


def _result(site: Site, x: Value, weight: Value, rows: Field | None, bias: Value | None) -> Value:
    """Label the output by the rows of the weight, and unite the bias."""
    axis = len(x.shape) - len(weight.shape) + 1
    fields: tuple[Field, ...] = ()
    if rows is not None:
        site.labels.produce(rows)
        line = _vector(rows, next(a for a in rows.axes if a <= 1))
        fields = (Field(vector(line, axis, site.shape), 0.0 if rows.at == 0 else None, False),)
    result = Value(site.shape, fields)
    if bias is None:
        return result
    view = (-1, *(1,) * (len(site.shape) - axis - 1))
    lines = tuple(Field(core(f.labels).reshape(view), f.at, f.weights) for f in bias.fields)
    shape = (bias.shape[0], *view[1:])
    return combine(site, [result, Value(shape, lines, bias.fill, bias.source, bias.weights)], added)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


RULES: dict[str, Any] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), transposed_convolution),
}
