"""Rules for operations that sum products of two tensors: linear layers, matrix products, einsum, embeddings."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_prune.structure.tracing.elementwise import combine
from lightning_prune.structure.tracing.site import Site
from lightning_prune.structure.tracing.values import Field, Value, core, tidy

Operand = tuple[Value, str]  # a tensor and a letter for each of its axes, as in einsum


def contract(site: Site, operands: Sequence[Operand], out: str, bias: Value | None = None) -> Value:
    """Sum the product of two tensors over the letters that ``out`` does not have.

    Labels along summed letters are tied between the operands, labels along kept letters go to the output. A field along both is tied
    along the summed letters first: whole rows leave.
    """
    sizes = {letter: s for value, letters in operands for letter, s in zip(letters, value.shape, strict=True) if s > 1}
    shape = tuple(sizes.get(letter, 1) for letter in out)
    summed = {letter for letter in sizes if letter not in out}
    _tie_summed(site, operands, summed, bias)
    views = [_laid_out(_rows(site, value, letters, summed), letters, out) for value, letters in operands]
    result = combine(site, views, lambda ats: 0.0 if 0.0 in ats else None, shape, product=True)
    result = dataclasses.replace(result, fill=None)
    _price(site, operands, sizes)
    if bias is not None:
        result = combine(site, [result, bias], added, shape)
    return result


def added(ats: Sequence[float | None]) -> float | None:
    """Return what a sum is where each part is ``ats``."""
    return None if None in ats else float(sum(at for at in ats if at is not None))


def _rows(site: Site, value: Value, letters: str, summed: set[str]) -> Value:
    """Tie every field along summed and kept letters along the summed ones; drop fields along summed letters only."""
    fields = []
    for field in value.fields:
        inner = tuple(axis for axis in field.axes if letters[axis] in summed)
        if len(inner) < len(field.axes):
            fields.append(site.labels.merge(field, inner) if inner else field)
    return dataclasses.replace(value, fields=tuple(fields))


def _tie_summed(site: Site, operands: Sequence[Operand], summed: set[str], bias: Value | None) -> None:
    """Tie the labels that both operands have along summed letters only."""
    (a, a_letters), (b, b_letters) = operands
    mine = [f for f in a.fields if {a_letters[axis] for axis in f.axes} <= summed]
    theirs = [f for f in b.fields if {b_letters[axis] for axis in f.axes} <= summed]
    for own in mine:
        field, letters = own, [a_letters[axis] for axis in own.axes]
        partners = [f for f in theirs if {b_letters[axis] for axis in f.axes} & set(letters)]
        theirs = [f for f in theirs if not any(f is p for p in partners)]
        if not partners:
            site.freeze(field, f"{site.name} sums over it with a tensor of fixed size")
            continue
        first, *others = partners
        if {b_letters[axis] for axis in first.axes} != set(letters):  # one axis here, several there: whole rows leave
            shared = next(letter for letter in letters if letter in {b_letters[axis] for axis in first.axes})
            field = site.labels.merge(field, tuple(x for x in field.axes if a_letters[x] != shared))
            first = site.labels.merge(first, tuple(x for x in first.axes if b_letters[x] != shared))
            letters = [shared]
        for other in others:
            site.freeze(other, f"{site.name} sums over it together with another axis")
        site.labels.unite(_line(field, a_letters, letters), _line(first, b_letters, letters))
        _exact_sum(site, (field, a), (first, b), bias)
    for field in theirs:
        site.freeze(field, f"{site.name} sums over it with a tensor of fixed size")


def _line(field: Field, letters: str, order: Sequence[str]) -> Tensor:
    axes = [letters.index(letter) for letter in order]
    rest = [axis for axis in range(field.labels.ndim) if axis not in axes]
    return core(field.labels).permute(*rest, *axes).flatten()


def _exact_sum(site: Site, one: tuple[Field, Value], two: tuple[Field, Value], bias: Value | None) -> None:
    """See that the sum stays as it is when summands leave: zero times anything is zero, other constants go to a bias."""
    if one[0].weights and two[0].weights:
        site.labels.produce(one[0])
    elif one[0].weights or two[0].weights:
        (data, _), (_, weight) = (two, one) if one[0].weights else (one, two)
        field = two[0] if weight is two[1] else one[0]
        take_up(site, data, weight if field.axes == (1,) else dataclasses.replace(weight, source=None), bias)
    elif 0.0 not in (one[0].at, two[0].at):
        site.freeze(one[0], f"its channels are not zero when masked, and {site.name} sums over them")
    else:
        site.labels.mix(one[0])
        site.labels.mix(two[0])


def take_up(site: Site, data: Field, weight: Value, bias: Value | None, padded: bool = False) -> None:
    """Sum over channels that are ``data.at`` when they have left; refuse where that is not exact.

    Args:
        site: The operation.
        data: The channels that are summed over.
        weight: What they are multiplied by.
        bias: What is added.
        padded: Whether zeros stand beside the channels at the border.
    """
    known = site.labels.taken.setdefault(weight.source, data.at) if weight.source else data.at
    if data.at is None:
        site.freeze(data, f"its channels are not constant when masked, and {site.name} sums over them")
    elif known != data.at:
        site.freeze(data, f"{site.name} uses one weight for channels of different constants")
    elif data.at and padded:
        site.freeze(data, f"its channels are {data.at:.3g} when masked, and {site.name} pads them with zeros")
    elif data.at and not site.absorb(weight, bias, data.at):
        site.freeze(
            data, f"its channels are {data.at:.3g} when masked, and {site.name} has no bias of its own to take that up"
        )


def _laid_out(value: Value, letters: str, out: str) -> Value:
    """Give a tensor the axes of the output; letters that it lacks have one element."""
    shape = tuple(value.shape[letters.index(letter)] if letter in letters else 1 for letter in out)
    here = [letter for letter in out if letter in letters]
    fields = []
    for field in value.fields:
        labels = core(field.labels)
        order = [letters.index(letter) for letter in here]
        rest = [axis for axis in range(len(letters)) if axis not in order]
        labels = labels.permute(*rest, *order)[(0,) * len(rest)]
        view = [labels.shape[here.index(letter)] if letter in here else 1 for letter in out]
        fields.append(Field(labels.reshape(view).expand(shape), field.at, field.weights))
    return Value(shape, tuple(fields), None, None, value.weights)


def _price(site: Site, operands: Sequence[Operand], sizes: dict[str, int]) -> None:
    """Note the multiply-adds: the product of the sizes of all letters; a field along several letters counts them together."""
    factor, axes, done = 1, [], set()
    for letter, size in sizes.items():
        if letter in done:
            continue
        found = [(f, ls) for v, ls in operands if letter in ls and (f := v.along(ls.index(letter))) is not None]
        done.add(letter)
        if found:
            field, letters = max(found, key=lambda item: len(item[0].axes))
            done |= {letters[axis] for axis in field.axes}
            axes.append(field.labels)
        else:
            factor *= size
    site.cost(factor, axes)


def linear(site: Site, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """``x @ weight.T + bias``."""
    letters = _letters(len(x.shape))
    if len(weight.shape) == 1:
        return contract(site, [(x, letters), (weight, letters[-1])], letters[:-1], bias)
    return contract(site, [(x, letters), (weight, "Z" + letters[-1])], letters[:-1] + "Z", bias)


def matmul(site: Site, a: Value, b: Value) -> Value:
    """Matrix product with broadcast leading axes."""
    batch = _letters(max(len(a.shape), len(b.shape), 2) - 2)
    first = _batch(batch, a) + ("YK" if len(a.shape) > 1 else "K")
    second = _batch(batch, b) + ("KZ" if len(b.shape) > 1 else "K")
    out = batch + ("Y" if len(a.shape) > 1 else "") + ("Z" if len(b.shape) > 1 else "")
    return contract(site, [(a, first), (b, second)], out)


def _batch(batch: str, value: Value) -> str:
    own = max(len(value.shape) - 2, 0)
    return batch[len(batch) - own :]


def added_product(site: Site, bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    """``beta * bias + alpha * a @ b``."""
    first, second = ("BYK", "BKZ") if len(a.shape) == 3 else ("YK", "KZ")
    if beta != 1:
        bias = dataclasses.replace(bias, fields=tuple(_scaled(f) for f in bias.fields), fill=None, source=None)
    return contract(site, [(a, first), (b, second)], first[:-1] + "Z", bias)


def _scaled(field: Field) -> Field:
    return field if field.at == 0 else dataclasses.replace(field, at=None)


def einsum(site: Site, equation: str, operands: Sequence[Value], *_: Any, **__: Any) -> Value:
    """Einsum of one or two tensors without repeated letters in a term; others are not followed."""
    terms, arrow, out = equation.replace(" ", "").partition("->")
    parts = terms.split(",")
    plain = arrow and "." not in equation and all(len(set(part)) == len(part) for part in parts)
    if not plain or len(operands) > 2:
        for value in operands:
            site.freeze_all(value, f"it goes through {site.name}, an einsum that is not followed")
        return Value(site.shape)
    given = list(zip(operands, parts, strict=True))
    return contract(site, given if len(given) == 2 else [*given, (Value((1,), (), 1.0), "#")], out)


def _letters(count: int) -> str:
    return "abcdefghijklmnop"[:count]


def embedding(site: Site, weight: Value, indices: Value, *_: Any, **__: Any) -> Value:
    """Rows of a table; entries never leave, columns may."""
    for field in weight.fields:
        if 0 in field.axes:
            site.freeze(field, "it is an entry of a table that is looked up")
    shape = site.shape
    fields = []
    for field in weight.beside([0]):
        site.labels.produce(field)
        fields.append(Field(core(field.labels).reshape((1,) * (len(shape) - 1) + (-1,)).expand(shape), field.at, False))
    return Value(shape, tuple(fields))


def attention(
    site: Site, query: Value, key: Value, value: Value, mask: Value | None = None, *_: Any, **named: Any
) -> Value:
    """Scaled dot-product attention: whole heads leave, the query's, key's and value's together."""
    rank = len(query.shape)
    parts = [_heads(site, query), _heads(site, key), _heads(site, value, wide=True)]
    groups = query.shape[-3] // key.shape[-3] if rank > 2 and named.get("enable_gqa") else 1
    if groups > 1:
        parts[1:] = [_repeated(part, groups) for part in parts[1:]]
    shape = site.shape
    views = [
        Value(
            (*shape[:-1], 1),
            tuple(Field(f.labels[..., :1, :1].expand(*shape[:-1], 1), f.at, f.weights) for f in part.fields),
        )
        for part in parts
    ]
    views[0:2] = [Value(v.shape, tuple(dataclasses.replace(f, at=None) for f in v.fields)) for v in views[0:2]]
    if mask is not None:
        for field in mask.fields:
            if set(field.axes) & {len(mask.shape) - 1, len(mask.shape) - 2}:
                site.freeze(field, f"it is a position in {site.name}")
        beside = mask.beside([-1, -2])
        views.append(
            Value((*mask.shape[:-2], 1, 1), tuple(Field(f.labels[..., :1, :1], None, f.weights) for f in beside))
        )
    joined = combine(site, views, lambda ats: ats[2], (*shape[:-1], 1))
    fields = [Field(f.labels.expand(shape), f.at, f.weights) for f in joined.fields]
    wide = None
    if value.along(rank - 3) is None:  # what the heads share may get narrower; the heads themselves then stay
        wide = next(
            (Field(core(f.labels).expand(shape), f.at, f.weights) for f in value.fields if f.axes == (rank - 1,)), None
        )
    heads = next((f for f in joined.fields if f.axes == (rank - 3,)), None)
    _price_attention(site, query, key, value, heads, wide)
    return Value(shape, tuple(fields) if wide is None else (*fields, wide))


def _heads(site: Site, part: Value, wide: bool = False) -> Value:
    """Keep the labels of whole heads; positions stay, and the width of a head that its scale depends on."""
    rank = len(part.shape)
    by_head = any(rank - 3 in field.axes for field in part.fields)
    fields = []
    for field in part.fields:
        if rank - 2 in field.axes:
            site.freeze(field, f"it is a position in {site.name}")
        elif field.axes != (rank - 1,):
            fields.append(site.labels.merge(field, (rank - 1,)) if rank - 1 in field.axes else field)
        elif not wide or by_head:
            site.freeze(field, f"it is part of every head in {site.name}")
    return dataclasses.replace(part, fields=tuple(fields))


def _repeated(part: Value, groups: int) -> Value:
    fields = tuple(Field(tidy(f.labels.repeat_interleave(groups, -3)), f.at, f.weights) for f in part.fields)
    return Value((*part.shape[:-3], part.shape[-3] * groups, *part.shape[-2:]), fields)


def _price_attention(
    site: Site, query: Value, key: Value, value: Value, heads: Field | None, wide: Field | None
) -> None:
    scores = math.prod(query.shape[:-1]) * key.shape[-2]
    if wide is not None:
        site.cost(scores, [wide.labels])
    elif heads is not None:
        site.cost(scores // query.shape[-3] * (query.shape[-1] + value.shape[-1]), [heads.labels])


def weight_norm(site: Site, direction: Value, length: Value, dim: int = 0) -> Value:
    """``length * direction / |direction|``: the length alone is held at zero, a direction of zeros would give 0 / 0."""
    why = f"{site.name} takes the norm over it"
    for field in direction.fields:
        if field.axes != (dim % len(direction.shape),):
            site.freeze(field, why)
    own = direction.along(dim)
    scale = length.along(dim) if len(length.shape) == len(direction.shape) else None
    if own is None or scale is None:
        site.freeze_all(direction, why)
        site.freeze_all(length, why)
        return Value(site.shape, (), None, None, True)
    site.labels.unite(core(own.labels).flatten(), core(scale.labels).flatten())
    site.labels.produce(scale)
    return Value(site.shape, (Field(own.labels, 0.0, False),), None, None, True)


RULES: dict[str, Any] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), added_product),
    "einsum": einsum,
    "embedding": embedding,
    "scaled_dot_product_attention": attention,
    "_weight_norm": weight_norm,
}
