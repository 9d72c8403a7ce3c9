"""Rules for operations that move elements: they are run on the labels themselves."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.structure.tracing.elementwise import combine
from lightning_prune.structure.tracing.site import Site
from lightning_prune.structure.tracing.values import Field, Value, core, tidy


def literal(site: Site, value: Value, *args: Any, **kwargs: Any) -> Any:
    """Run the operation on the labels of every field."""
    return moved(site, value, lambda labels: _run(site, labels, args, kwargs))


def moved(site: Site, value: Value, move: Any) -> Any:
    """Return what ``move`` makes of the labels of every field of ``value``; one value, or one per output."""
    example = site.node.meta["val"]
    if isinstance(example, tuple | list):
        parts: list[list[Field]] = [[] for _ in example]
        for field in value.fields:
            for own, labels in zip(parts, move(field.labels), strict=True):
                own.append(_checked(site, labels, field))
        return tuple(
            Value(tuple(t.shape), _apart(site, own), value.fill, None, value.weights)
            for t, own in zip(example, parts, strict=True)
        )
    fields = [_checked(site, move(field.labels), field) for field in value.fields]
    return Value(tuple(example.shape), _apart(site, fields), value.fill, None, value.weights)


def _run(site: Site, labels: Tensor, args: Any, kwargs: Any) -> Any:
    name = site.target._schema.name.removeprefix("aten::")
    if name in ("view", "_unsafe_view", "reshape"):
        return labels.reshape(args[0])
    return site.target(labels, *args, **kwargs)


def _checked(site: Site, labels: Tensor, field: Field) -> Field:
    labels = tidy(labels)
    found = Field(labels, field.at, field.weights)
    if not found.axes and field.axes:
        site.freeze(found, f"a single channel is picked by {site.name}")
    return found


def _apart(site: Site, fields: Sequence[Field]) -> tuple[Field, ...]:
    """Return the fields that have axes; of two that have come to lie along one axis, that with fewer labels stays whole."""
    found: list[Field] = []
    for field in sorted(fields, key=lambda f: -torch.unique(core(f.labels)).numel()):
        if any(set(field.axes) & set(other.axes) for other in found):
            site.freeze(field, f"{site.name} lays it and other channels along one axis")
        elif field.axes:
            found.append(field)
    return tuple(found)


def view(site: Site, value: Value, size: Sequence[int], *_: Any) -> Value:
    """Reshape the labels; sizes that the user's code writes down must follow when labels leave."""
    if not isinstance(size, tuple | list):  # view(dtype)
        return value
    found: Value = moved(site, value, lambda labels: labels.reshape(tuple(size)))
    _note_sizes(site, found, size)
    for field in found.fields:
        site.labels.grid(field)
    return found


def unflatten(site: Site, value: Value, dim: int, sizes: Sequence[int]) -> Value:
    """Reshape one axis."""
    found: Value = moved(site, value, lambda labels: labels.reshape(site.shape))
    dim %= len(value.shape)
    written = [-1] * dim + list(sizes) + [-1] * (len(value.shape) - dim - 1)
    _note_sizes(site, found, written)
    for field in found.fields:
        site.labels.grid(field)
    return found


def reshaped(site: Site, value: Value, *_: Any, **__: Any) -> Value:
    """Reshape the labels as the output is shaped; the operation reads all sizes from its input."""
    found: Value = moved(site, value, lambda labels: labels.reshape(site.shape))
    for field in found.fields:
        site.labels.grid(field)
    return found


def expand(site: Site, value: Value, size: Sequence[int], *_: Any, **__: Any) -> Value:
    """Expand the labels; sizes that the user's code writes down must follow."""
    found: Value = moved(site, value, lambda labels: labels.expand(tuple(size)))
    _note_sizes(site, found, size)
    return found


def expand_as(site: Site, value: Value, other: Value) -> Value:
    """Expand to the shape of another tensor: where that shrinks, nothing is written down."""
    shape = Value(other.shape, tuple(dataclasses.replace(f, weights=False) for f in other.fields))
    return combine(site, [value, shape], lambda ats: ats[0])


def view_as(site: Site, value: Value, other: Value) -> Value:
    """Reshape to the shape of another tensor."""
    return expand_as(site, reshaped(site, value), other)


def _note_sizes(site: Site, value: Value, written: Sequence[int]) -> None:
    site.labels.written |= any(isinstance(size, int) and size > 1 for size in written[1:])
    for field in value.fields:
        for axis in field.axes:
            offset = axis - len(value.shape) + len(written)
            if 0 <= offset < len(written) and isinstance(written[offset], int) and written[offset] > 0:
                site.sized(written[offset], field, axis)


def squeeze(site: Site, value: Value, *dims: Any) -> Value:
    """Drop axes of one element; where the code does not say which, a labelled axis keeps two."""
    for field in value.fields if not dims else ():
        for axis in field.axes:
            few = field.labels.narrow(axis, 0, 2)
            site.labels.freeze(few, f"{site.name} would drop the axis if only one channel were left")
    return reshaped(site, value)


def pad(site: Site, value: Value, pads: Sequence[int], mode: str = "constant", fill: float | None = None) -> Value:
    """Pad: new elements never leave; along other axes than those of the labels the labels go on."""
    rank = len(value.shape)
    padded = {rank - 1 - i // 2 for i, amount in enumerate(pads) if amount}
    fields = []
    for field in value.fields:
        inside = padded & set(field.axes)
        goes_on = field.at == (fill or 0.0) or mode != "constant" or inside == padded
        at = field.at if goes_on else None
        if inside and mode != "constant":
            site.freeze(field, f"it is mirrored by {site.name}")
            continue
        labels = field.labels
        for axis in padded - set(field.axes):
            labels = labels.narrow(axis, 0, 1).expand(
                [site.shape[axis] if a == axis else s for a, s in enumerate(labels.shape)]
            )
        amounts = [a if rank - 1 - i // 2 in inside else 0 for i, a in enumerate(pads)]
        if inside:
            labels = tidy(F.pad(labels, amounts, value=0))
            for axis in inside:
                site.sized(site.shape[axis], labels, axis)
        fields.append(Field(labels.expand(site.shape), at, False))
    return Value(site.shape, tuple(fields))


def channel_shuffle(site: Site, value: Value, groups: int) -> Value:
    """Do as ``view``, ``transpose`` and ``flatten`` would."""
    size = value.shape[1]

    def move(labels: Tensor) -> Tensor:
        grid = labels.reshape(labels.shape[0], groups, size // groups, *labels.shape[2:])
        own = Field(tidy(grid))
        site.labels.grid(own)
        if 1 in own.axes:
            known = isinstance(site.module, nn.ChannelShuffle) and site.module.groups == groups
            site.sized(groups, own, 1, "groups" if known else None)
        return grid.transpose(1, 2).reshape(labels.shape)

    return moved(site, value, move)  # type: ignore[no-any-return]


def repeat_interleave(site: Site, value: Value, repeats: Any, dim: int | None = None, **_: Any) -> Value:
    """Repeat slices as often as a number says."""
    if not isinstance(repeats, int) or dim is None:
        for field in value.fields:
            site.freeze(field, f"it is repeated by {site.name}")
        return Value(site.shape)
    return moved(site, value, lambda labels: labels.repeat_interleave(repeats, dim))  # type: ignore[no-any-return]


def pixel_shuffle(site: Site, value: Value, *args: Any) -> Value:
    """Run the operation on the labels; what is spread over places of one channel leaves together."""
    found: Value = literal(site, value, *args)
    rank = len(site.shape)
    fields = [site.labels.merge(f, tuple(a for a in f.axes if a >= rank - 2)) for f in found.fields]
    for field in fields:
        if not field.axes:
            site.freeze(field, f"its channels become places of a single one in {site.name}")
    return dataclasses.replace(found, fields=tuple(field for field in fields if field.axes))


RULES: dict[str, Any] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), view),
    **dict.fromkeys(("flatten", "ravel", "unsqueeze"), reshaped),
    **dict.fromkeys(("view_as", "reshape_as"), view_as),
    "squeeze": squeeze,
    **dict.fromkeys(
        (
            "permute",
            "transpose",
            "t",
            "swapaxes",
            "swapdims",
            "movedim",
            "moveaxis",
            "numpy_T",
            "mT",
            "adjoint",
            "matrix_H",
            "flip",
            "repeat",
            "tile",
        ),
        literal,
    ),
    "unflatten": unflatten,
    "expand": expand,
    "expand_as": expand_as,
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    "channel_shuffle": channel_shuffle,
    "repeat_interleave": repeat_interleave,
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), pixel_shuffle),
}
