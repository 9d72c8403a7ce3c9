"""Multiply-adds of single operations in a graph that ``torch.jit`` traced, and which operations are free.

Inputs and outputs of an operation are ``torch._C.Value`` in the order of torch's schema; their types hold the shapes seen while tracing.
One multiply-add counts 1. The handles cover what fvcore lacks or gets wrong and are given to it by :mod:`lightning_prune.flops`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

Handle = Callable[[list[Any], list[Any]], "int | Counter[str]"]
Label = str | int

_IN_GRAPHS = re.compile(
    r"^prim::(PythonOp|CallFunction|CallMethod|If|Loop)"
)  # of all prim:: kinds, those that can hold operations
_PRODUCTS = re.compile(  # names of operations that hold matrix products; those with a handle never come this far
    r"mm(_|$)|mv_?$|matmul|dot|conv|linear|linalg_|attention|transformer|cdist|cov$|corrcoef|lstm|gru_|rnn|einsum|fft|bilinear|trilinear"
    r"|cholesky|inverse|solve|lstsq|svd|(^|_)(qr|lu|det|logdet|slogdet|eigh?)(_|$)|matrix_(exp|power)|chain_matmul|multi_dot"
)
_MOVES = re.compile(  # may hold parameters (embeddings, weight norm, ...) and yet multiply nothing that is counted
    r"_?(embedding(_bag|_renorm_)?|index\w*|gather|take\w*|\w*scatter\w*|repeat\w*|tile|\w*pad\w*|roll|rot90|flip\w*|tri[lu]"
    r"|cat|concat\w*|\w*stack|\w*sort|topk|cum\w+|one_hot|meshgrid|pixel_\w+|im2col|col2im|\w*chunk|\w*split\w*|\w+_like|new_\w+|\w+_copy"
    r"|\w*dropout_?|\w*shape_as_tensor|sum|mean|std\w*|var\w*|prod|norm\w*|linalg_\w*norm|linalg_cross|cross|all|any|arg\w+|[an]?a?m(ax|in)"
    r"|aminmax|logsumexp|median|quantile|weight_norm\w*|\w*softmax|prelu\w*|glu|\w*pool\dd\w*|upsample_\w+|grid_sampler\w*|outer|ger|kron"
    r"|cosine_similarity|pairwise_distance|dist|zero_?|fill_?|normal_?|uniform_?|bernoulli_?|fft_\w*(freq|shift)|numel|channel_shuffle|constant_pad_nd)"
)


def shape(value: Any) -> tuple[int, ...]:
    """Return the shape that a tensor had while the graph was traced."""
    return tuple(value.type().sizes())


def all_shapes_known(values: Iterable[Any]) -> bool:
    """Tell whether every tensor among ``values``, lists of tensors opened, has a shape."""
    tensors = [item for value in values for item in (_items(value) or [value]) if item.type().kind() == "TensorType"]
    return all(value.isCompleteTensor() for value in tensors)


def einsum_multiply_adds(equation: str, shapes: Sequence[Sequence[int]], path: Sequence[int] | None = None) -> int:
    """Count an einsum the way torch runs it: operands are contracted in pairs, each pair by one batched matrix product.

    An index that only one operand of a pair has and that nobody needs later is summed first, at no cost; a pair without a common summed
    index is an element-wise product and free.

    Args:
        equation: As given to ``torch.einsum``, with or without ``->`` and ``...``.
        shapes: Shape of each operand.
        path: Pairs of positions in the list of operands, one pair after the other; a result goes to the end of the list. By default from
            left to right.

    >>> einsum_multiply_adds("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)])
    120
    """
    left, _, right = equation.replace(" ", "").partition("->")
    terms = [_labels(term, len(s)) for term, s in zip(left.split(","), shapes, strict=True)]
    sizes: dict[Label, int] = {}
    for term, given in zip(terms, shapes, strict=True):
        for label, size in zip(term, given, strict=True):
            sizes[label] = max(sizes.get(label, 1), size) if size else 0
    times = Counter(label for term in terms for label in term)
    if "->" in equation:
        ellipsis = [label for label in sizes if isinstance(label, int)] if "..." in right else []
        output = {*right.replace("...", ""), *ellipsis}
    else:
        output = {label for label in sizes if isinstance(label, int) or times[label] == 1}
    # An index of size 1 that another operand has in full is spread over it: this operand does not have it.
    operands = [
        {label for label, size in zip(term, given, strict=True) if size == sizes[label]}
        for term, given in zip(terms, shapes, strict=True)
    ]
    total = 0
    while len(operands) > 1:
        first, second = sorted(path[:2]) if path else (0, 1)
        path = path[2:] if path else None
        b, a = operands.pop(second), operands.pop(first)
        needed = output.union(*operands)
        if (a & b) - needed:
            total += math.prod(sizes[label] for label in (a & b) | ((a | b) & needed))
        operands.insert(len(operands) if path is not None else 0, (a | b) & needed)
    return total


def _labels(term: str, dims: int) -> list[Label]:
    """Spell out a term of an einsum; the dimensions of an ellipsis are numbered from its right end, -1 first."""
    before, dots, after = term.partition("...")
    return [*before, *(range(len(before) + len(after) - dims, 0) if dots else ()), *after]


def _product(inner: int) -> Handle:
    """Every element of the output sums over the last dimension of input ``inner``."""
    return lambda inputs, outputs: math.prod(shape(outputs[0])) * (shape(inputs[inner]) or (1,))[-1]


def _addbmm(inputs: list[Any], outputs: list[Any]) -> int:
    batch, _, inner = shape(inputs[1])  # sums over the batch too
    return math.prod(shape(outputs[0])) * batch * inner


def _tensordot(inputs: list[Any], outputs: list[Any]) -> int:
    # |A| |B| = |output| K^2 with K elements summed over
    size, other, out = (math.prod(shape(v)) for v in (inputs[0], inputs[1], outputs[0]))
    return out * math.isqrt(size * other // out) if out else 0


def _einsum(inputs: list[Any], _outputs: list[Any]) -> int:
    path = [int(value.toIValue()) for value in _items(inputs[2])] if len(inputs) > 2 else []
    return einsum_multiply_adds(inputs[0].toIValue(), [shape(v) for v in _items(inputs[1])], path or None)


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    query, key, value = (shape(v) for v in inputs[:3])  # [..., L, E], [..., S, E], [..., S, Ev]
    return math.prod(shape(outputs[0])[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(inputs: list[Any], _outputs: list[Any]) -> int:
    """Every step of every sequence goes once through every weight matrix; also packed, bidirectional, stacked and projected."""
    weights = [
        shape(v) for v in [_items(v) for v in inputs if _items(v)][-1]
    ]  # after the states, which are a list in an LSTM
    steps = math.prod(shape(inputs[0])[:-1])  # [T, N, F], or packed [sum of lengths, F]
    return steps * sum(math.prod(s) for s in weights if len(s) == 2)


def _convolution_by_mode(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Price a convolution with ``padding="same"`` or ``"valid"``: every output element takes one filter."""
    return Counter({"conv": math.prod(shape(outputs[0])) * math.prod(shape(inputs[1])[1:])})


def _norm(affine: int) -> Handle:
    """Price normalization by the rough figure of fvcore, for any number of dimensions."""
    return lambda inputs, _: math.prod(shape(inputs[0])) * (5 if inputs[affine].isCompleteTensor() else 4)


HANDLES: dict[str, Handle] = {
    **{f"aten::{name}": _product(0) for name in ("matmul", "mm", "bmm", "linear", "mv", "dot", "vdot", "inner")},
    **{f"aten::{name}": _product(1) for name in ("addmm", "addmv", "baddbmm")},
    "aten::addmm_": _product(1),
    "aten::baddbmm_": _product(1),
    "aten::addbmm": _addbmm,
    "aten::tensordot": _tensordot,
    "aten::einsum": _einsum,
    "aten::scaled_dot_product_attention": _attention,
    **{f"aten::{name}": _recurrent for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    "aten::_convolution_mode": _convolution_by_mode,
    "aten::layer_norm": _norm(2),
    "aten::rms_norm": _norm(2),
    "aten::group_norm": _norm(2),
    "aten::instance_norm": _norm(1),
}


class FreeOperators:
    """Tells the operations without a handle that cost nothing from those that may matter.

    Free are views, moves of data, element-wise operations and reductions, whatever they hold, and everything else that neither is a matrix
    product by name nor holds a weight. Operations from outside torch are free only if they are tagged element-wise.

    Args:
        num_inputs: So many inputs of the graph are data, those after them weights.
        counted: Kinds of operations that have a handle.
    """

    def __init__(self, num_inputs: int, counted: Iterable[str]) -> None:
        self._num_inputs = num_inputs
        self._counted = frozenset(counted)
        self._weights: dict[str, bool] = {}

    def is_free(self, node: Any, weights: bool = True) -> bool:
        """Tell whether a node of the graph costs nothing.

        Args:
            node: The ``torch._C.Node``.
            weights: Whether inputs of the node can be followed to the weights of the graph.
        """
        kind = node.kind()
        if _IN_GRAPHS.match(kind):
            inner = list(_inner_nodes(node))
            return bool(inner) and all(n.kind() not in self._counted and self.is_free(n, weights=False) for n in inner)
        if kind.startswith("prim::"):
            return True
        space, name = kind.split("::")
        if _is_elementwise_or_view(space, name):
            return True
        if space != "aten":
            return False
        if _MOVES.fullmatch(name):
            return True
        if _PRODUCTS.search(name):
            return False
        return not (weights and any(self._is_weight(v) for value in node.inputs() for v in (_items(value) or [value])))

    def _is_weight(self, value: Any, depth: int = 0) -> bool:
        """Tell whether a value is a weight, or made of weights alone by views and element-wise operations."""
        name = value.debugName()
        if name not in self._weights:
            self._weights[name] = self._comes_from_weights(value, depth)
        return self._weights[name]

    def _comes_from_weights(self, value: Any, depth: int) -> bool:
        node = value.node()
        if node.kind() == "prim::Param":
            return bool(value.offset() >= self._num_inputs)
        space, _, operator = node.kind().partition("::")
        if depth > 50 or not (space == "prim" or _is_elementwise_or_view(space, operator)):
            return False
        sources = [
            v
            for v in node.inputs()
            if v.type().kind() in {"TensorType", "ListType"} and v.node().kind() != "prim::Constant"
        ]
        return bool(sources) and all(self._is_weight(v, depth + 1) for v in sources)


def _items(value: Any) -> list[Any]:
    """Return the elements of a list made in the graph; empty for anything else."""
    return list(value.node().inputs()) if value.node().kind() == "prim::ListConstruct" else []


def _inner_nodes(node: Any) -> Iterator[Any]:
    """Yield the nodes of the graphs inside an autograd function or a scripted branch; those of scripted functions are out of sight."""
    if node.hasAttribute("Subgraph"):
        yield from node.g("Subgraph").nodes()
    for block in node.blocks():
        yield from block.nodes()


def _is_elementwise_or_view(space: str, name: str) -> bool:
    """Read torch's own tags and schemas: an operation on elements, or one that returns a view of its input."""
    packet = getattr(getattr(torch.ops, space), name, None)
    if packet is None:  # Python scalars: aten::Int, aten::ScalarImplicit
        return space == "aten"
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return any(
        torch.Tag.pointwise in op.tags
        or any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
        for op in overloads
    )
