"""Rules for operations that join tensors, cut them into pieces or pick from them: places written in the code follow what leaves before them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.structure.gathered import index_called
from lightning_prune.structure.tracing.elementwise import combine
from lightning_prune.structure.tracing.shapes import literal, moved
from lightning_prune.structure.tracing.site import Site
from lightning_prune.structure.tracing.values import Field, Value, core, fixed, tidy


def cat(site: Site, values: Sequence[Value], dim: int = 0) -> Value:
    """Lay labels end to end along ``dim``; unite them along the others."""
    values = [v for v in values if v.shape != (0,)]
    shape = site.shape
    dim %= len(shape)
    fields: list[Field] = []
    along = [next((f for f in v.fields if dim in f.axes), None) for v in values]
    if any(along):
        ats = {f.at for f in along if f is not None}
        at = ats.pop() if len(ats) == 1 else 0.0
        for f in along:
            if f is not None and f.at != at:
                site.freeze(f, f"{site.name} joins channels that are zero when masked with such that are not")
        axes = {axis for f in along if f is not None for axis in f.axes}
        parts = []
        for f, v in zip(along, values, strict=True):
            labels = fixed(v.shape) if f is None else f.labels
            own = [size if axis in axes else 1 for axis, size in enumerate(v.shape)]
            for axis in range(len(shape)):
                if axis not in axes:
                    labels = labels.narrow(axis, 0, 1)
            parts.append(labels.expand(own))
        weights = all(v.weights for v in values)
        if not weights:
            for f in along:
                if f is not None:
                    site.labels.produce(f)
        fields.append(Field(tidy(torch.cat(parts, dim).expand(shape)), at, weights))
        if len(axes) > 1:
            site.labels.grid(fields[-1])
    rest = []
    for v in values:
        beside = tuple(Field(_at_one(f.labels, dim), f.at, f.weights) for f in v.fields if dim not in f.axes)
        rest.append(Value((*v.shape[:dim], 1, *v.shape[dim + 1 :]), beside, v.fill, None, v.weights))
    one = combine(site, rest, _agreed, (*shape[:dim], 1, *shape[dim + 1 :]))
    fields += [Field(f.labels.expand(shape), f.at, f.weights) for f in one.fields]
    fill = values[0].fill if values and len({v.fill for v in values}) == 1 else None
    return Value(shape, tuple(fields), fill, None, all(v.weights for v in values))


def _agreed(ats: Sequence[float | None]) -> float | None:
    return ats[0] if len(set(ats)) == 1 else None


def _at_one(labels: Tensor, dim: int) -> Tensor:
    return labels.narrow(dim, 0, 1)


def stack(site: Site, values: Sequence[Value], dim: int = 0) -> Value:
    """Unite the labels of what is stacked."""
    shape = site.shape
    dim %= len(shape)
    flat = (*shape[:dim], *shape[dim + 1 :])
    one = combine(site, list(values), _agreed, flat)
    fields = tuple(Field(f.labels.unsqueeze(dim).expand(shape), f.at, f.weights) for f in one.fields)
    return Value(shape, fields, one.fill, None, one.weights)


def split(site: Site, value: Value, sizes: Any, dim: int = 0) -> Any:
    """Cut along ``dim``; equal parts lose equally many, and sizes that the code writes down must follow."""
    found = literal(site, value, sizes, dim)
    field = value.along(dim)
    dim %= len(value.shape)
    site.labels.written |= dim > 0
    if field is None:
        return found
    widths = [part.shape[dim] for part in found]
    _tie_parts(site, found, dim, widths)
    for part, width in zip(found, widths, strict=True):
        own = part.along(dim)
        if own is not None:
            site.sized(width, own, dim)
    return found


def chunk(site: Site, value: Value, chunks: Any, dim: int = 0) -> Any:
    """Cut into equal parts, sized at run time; they lose equally many."""
    if not isinstance(chunks, int):  # the places of the cuts
        return split(site, value, chunks, dim)
    found = literal(site, value, chunks, dim)
    dim %= len(value.shape)
    field = value.along(dim)
    if field is None:
        return found
    widths = [part.shape[dim] for part in found]
    if len(set(widths)) != 1:
        site.freeze(field, f"{site.name} cuts it into unequal parts")
    elif field.axes == (dim,):
        _tie_parts(site, found, dim, widths)
    else:
        site.labels.written = True
        for part, width in zip(found, widths, strict=True):
            own = part.along(dim)
            if own is not None:
                site.sized(width, own, dim)
    return found


def _tie_parts(site: Site, parts: Sequence[Value], dim: int, widths: Sequence[int]) -> None:
    own = [part.along(dim) for part in parts]
    if len(set(widths)) == 1 and all(f is not None and f.axes == (dim,) for f in own):
        site.labels.tie(*(core(f.labels).flatten() for f in own if f is not None))


def slice_(
    site: Site, value: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    """Cut a piece out; where it starts and ends must follow when labels before it leave."""
    places = (*(slice(None),) * (dim % len(value.shape)), slice(start, end, step))
    found: Value = moved(site, value, lambda labels: labels[places])
    field = value.along(dim)
    dim %= len(value.shape)
    size = value.shape[dim]
    first = 0 if start is None else max(0, start + size if start < 0 else start)
    last = size if end is None else min(size, end + size if end < 0 else end)
    if (first, last, step) == (0, size, 1):
        return found
    site.labels.written |= dim > 0
    if field is None:
        return found
    if step != 1:
        site.freeze(field, f"every {step}th channel is picked by {site.name}")
        return found
    for bound, given in ((first, start), (last, end)):
        if 0 < bound < size:
            _note_bound(site, field, dim, bound, from_end=given is not None and given < 0)
    return found


def _note_bound(site: Site, field: Field, dim: int, bound: int, from_end: bool) -> None:
    """Let the place where a piece starts or ends follow what leaves before it, or behind it if it is counted from the end."""
    size = field.labels.shape[dim]
    if from_end:
        site.sized(size - bound, field.labels.narrow(dim, bound, size - bound), dim)
    else:
        site.sized(bound, field.labels.narrow(dim, 0, bound), dim)
    part = bound if size % bound == 0 else size - bound if size % (size - bound) == 0 else 0
    if part and field.axes == (dim,):
        site.labels.tie(*torch.split(core(field.labels).flatten(), part))


def select(site: Site, value: Value, dim: int, place: int) -> Value:
    """Pick one slice; what leaves before it would move its place."""
    found: Value = literal(site, value, dim, place)
    field = value.along(dim)
    dim %= len(value.shape)
    if field is not None:
        site.labels.written |= dim > 0
        size = value.shape[dim]
        before = field.labels.narrow(dim, 0, place) if place >= 0 else field.labels.narrow(dim, size + place, -place)
        if field.axes == (dim,):
            site.labels.freeze(before, f"a channel beside it is picked by its number in {site.name}")
        elif before.shape[dim]:
            site.sized(before.shape[dim], before, dim)
    return found


def unbind(site: Site, value: Value, dim: int = 0) -> Any:
    """Take all slices along ``dim`` apart; their number is fixed by the code behind."""
    found = literal(site, value, dim)
    field = value.along(dim)
    if field is not None:
        site.labels.written |= dim % len(value.shape) > 0
        site.sized(value.shape[dim], field, dim % len(value.shape))
    return found


def narrow(site: Site, value: Value, dim: int, start: int, length: int) -> Value:
    """Cut a piece out, as ``slice`` does."""
    start = start + value.shape[dim] if start < 0 else start
    return slice_(site, value, dim, start, start + length)


def roll(site: Site, value: Value, shifts: Any, dims: Any = ()) -> Value:
    """Roll; labels along a rolled axis cannot leave, for the shift counts them."""
    rolled = {dim % len(value.shape) for dim in ([dims] if isinstance(dims, int) else dims)} or set(
        range(len(value.shape))
    )
    for field in value.fields:
        if rolled & set(field.axes):
            site.freeze(field, f"it is rolled by {site.name}")
    return Value(value.shape, tuple(value.beside(rolled)), value.fill, None, value.weights)


def index(site: Site, value: Value, indices: Sequence[Any]) -> Value:
    """Pick by tensors of indices: labels along other axes stay, those along the picked axes cannot leave."""
    picked = [axis for axis, i in enumerate(indices) if i is not None]
    for i in indices:
        site.freeze_all(i, f"it is an index in {site.name}")
    kept = []
    for field in value.fields:
        inner = tuple(a for a in picked if a in field.axes)
        rest = site.labels.merge(field, inner) if inner else field
        if not rest.axes:
            site.freeze(field, f"it is picked by index in {site.name}")
        else:
            zeros = [None if i is None else torch.zeros(i.shape, dtype=torch.int64) for i in indices]
            kept.append(
                Field(
                    tidy(rest.labels[tuple(slice(None) if z is None else z for z in zeros)].reshape(site.shape)),
                    field.at,
                    field.weights,
                )
            )
    return Value(site.shape, tuple(kept), value.fill, None, value.weights)


def index_select(site: Site, value: Value, dim: int, indices: Value) -> Value:
    """Pick along one axis by a tensor of indices."""
    own = index_called(site.model, indices.source)
    if own is not None:
        return _gathered(site, value, dim % len(value.shape), own.cpu(), str(indices.source).rpartition(".")[0])
    places: list[Any] = [None] * len(value.shape)
    places[dim % len(value.shape)] = indices
    return index(site, value, places)


def _gathered(site: Site, value: Value, dim: int, chosen: Tensor, layer: str) -> Value:
    """Let a layer of ours gather its channels: they keep their labels, and its index is renumbered when the stream loses some."""
    stream, fields = fixed((value.shape[dim],)).contiguous(), []
    for field in value.fields:
        labels = core(field.labels)
        if dim in field.axes:
            others = tuple(axis for axis in field.axes if axis != dim)
            labels = core(site.labels.merge(field, others).labels if others else field.labels)
            stream, labels = labels.flatten(), labels.index_select(dim, chosen)
        fields.append(dataclasses.replace(field, labels=labels.expand(site.shape)))
    site.labels.gather(layer, stream)
    several = tuple(
        field for field in fields if field.axes
    )  # a single channel is one of many in the stream, and may leave that
    return Value(site.shape, several, value.fill, None, value.weights)


RULES: dict[str, Any] = {
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    "stack": stack,
    **dict.fromkeys(("split", "split_with_sizes"), split),
    **dict.fromkeys(("chunk", "tensor_split"), chunk),
    "slice": slice_,
    "narrow": narrow,
    "select": select,
    "unbind": unbind,
    "roll": roll,
    "index": index,
    "index_select": index_select,
}
