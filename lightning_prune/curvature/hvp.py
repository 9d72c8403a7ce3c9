"""Products of a loss's Hessian with a vector, without the Hessian.

The loss is a sum over chunks, ``L = sum_k L_k``, so gradient and products are sums, too, and only one chunk's graph is alive at a time:

- exact, Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 6(1), 1994: ``H v`` is the gradient of ``<v, grad L>`` with
  ``v`` held fixed; one forward, one backward with a graph, one backward through that;
- by central differences of gradients, ``[grad L(w + e v) - grad L(w - e v)] / 2e`` with ``e = c |w| / |v|``: two forward and backward passes of
  ordinary memory, for operations without a second derivative. With smooth activations the error is about 1e-3 of the product in float32 and 1e-8
  in float64. ReLU has kinks, at which the gradient jumps: a step that crosses none is as good, but in a deep network every step crosses some, and
  there the differences are no approximation of the exact product, which ignores kinks (ResNet-18: 1.5 times as large an error as the product).

``losses`` is called once per pass and yields the loss of one chunk after the other, each with a fresh graph; it must give the same function every
time. Sums are float64.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd

from lightning_prune.errors import ModelError

Losses = Callable[[], Iterable[Tensor]]
Reduce = Callable[[Tensor], Tensor]
Method = Literal["exact", "finite_difference"]

_STEP = {torch.float64: 1e-6}  # c above, else 1e-4: where rounding and truncation, and kinks crossed, are in balance
_NOISY = (_DropoutNd, nn.RNNBase, nn.MultiheadAttention)  # what is random in training mode and the same otherwise
_DIFFERENCES = "Give hvp='finite_difference', which needs first derivatives only, or use another operation."
_NO_DERIVATIVE = re.compile(r"derivative for '?(?:aten::)?(\w+?)(?:_backward)?'? is not implemented")


class OnceDifferentiable(ModelError):
    """An operation of a loss has no second derivative."""


@contextlib.contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Let the losses of a model have a second derivative, and one worth having, inside the block.

    Attention runs as plain products and recurrent layers without cuDNN, since their fused kernels can be differentiated only once; dropout is off,
    since a gradient and its derivative must be of one function; autocast is off and a model of half precision is cast to float32, since gradients
    of a nearly flat softmax underflow. Everything is put back. Kernels are a setting of the process: one thread at a time may be inside.

    Args:
        model: The model, in the mode it shall be scored in.
    """
    tensors = [*model.parameters(), *model.buffers()]
    halves = [(t, t.data) for t in tensors if t.is_floating_point() and t.element_size() < 4]
    noisy = [m for m in model.modules() if m.training and isinstance(m, _NOISY)]
    devices = {t.device.type for t in tensors} | {"cpu"}
    cudnn = torch.backends.cudnn.enabled
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        try:
            torch.backends.cudnn.enabled = cudnn and not any(isinstance(m, nn.RNNBase) for m in model.modules())
            for tensor, data in halves:
                tensor.data = data.float()
            for module in noisy:
                module.training = False
            yield
        finally:
            torch.backends.cudnn.enabled = cudnn
            for tensor, data in halves:
                tensor.data = data
            for module in noisy:
                module.training = True


def gradient(losses: Losses, weights: Sequence[Tensor], reduce: Reduce | None = None) -> list[Tensor]:
    """Return the gradient of the sum of the losses.

    Args:
        losses: Yields one scalar per chunk.
        weights: What to differentiate by; those that the losses do not depend on get zeros.
        reduce: Averages a flat vector over processes that hold different chunks; called once.

    Returns:
        One tensor per weight, of its shape, float64.
    """

    def slope(loss: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)

    return _total(losses, weights, slope, reduce)


def hessian_product(
    losses: Losses, weights: Sequence[Tensor], vector: Sequence[Tensor], reduce: Reduce | None = None
) -> list[Tensor]:
    """Return the product of the Hessian of the sum of the losses, restricted to ``weights``, with a vector; exact.

    Args:
        losses: Yields one scalar per chunk, computed inside :func:`twice_differentiable`.
        weights: What to differentiate by.
        vector: One tensor per weight, of its shape.
        reduce: Averages a flat vector over processes that hold different chunks; called once.

    Returns:
        One tensor per weight, of its shape, float64.

    Raises:
        ModelError: If an operation of the model has no second derivative; names it.
    """
    fixed = [v.to(w.dtype) for v, w in zip(vector, weights, strict=True)]

    def product(loss: Tensor) -> Sequence[Tensor]:
        first = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True, materialize_grads=True)
        pairs = [(g, v) for g, v in zip(first, fixed, strict=True) if g.requires_grad]  # the rest is constant
        if not pairs:
            return [torch.zeros_like(w) for w in weights]
        gradients, vectors = zip(*pairs, strict=True)
        with second_derivative(gradients, _DIFFERENCES):
            return torch.autograd.grad(gradients, weights, vectors, allow_unused=True, materialize_grads=True)

    return _total(losses, weights, product, reduce)


def difference_product(
    losses: Losses,
    weights: Sequence[Tensor],
    vector: Sequence[Tensor],
    reduce: Reduce | None = None,
    step: float | None = None,
) -> list[Tensor]:
    """Return the product of the Hessian with a vector by central differences of gradients; the weights are put back bit for bit.

    Args:
        losses: Yields one scalar per chunk.
        weights: What to differentiate by.
        vector: One tensor per weight, of its shape.
        reduce: Averages a flat vector over processes that hold different chunks; called once.
        step: Length of the step to either side, as a share of the length of the weights; by default 1e-4, in float64 1e-6.

    Returns:
        One tensor per weight, of its shape, float64; zeros for a vector of zeros.
    """
    share = _STEP.get(weights[0].dtype, 1e-4) if step is None else step
    size = share * (_norm([w.detach() for w in weights]) or 1.0) / (_norm(vector) or 1.0)
    centre = [w.data for w in weights]
    ends = []
    try:
        for sign in (1, -1):
            for weight, data, v in zip(weights, centre, vector, strict=True):
                weight.data = (data + sign * size * v).to(data.dtype)
            ends.append(_flat(gradient(losses, weights)))
    finally:
        for weight, data in zip(weights, centre, strict=True):
            weight.data = data
    flat = (ends[0] - ends[1]) / (2 * size)
    return _shaped(flat if reduce is None else reduce(flat), weights)


def hessian_gradient(
    losses: Losses,
    weights: Sequence[Tensor],
    method: Method = "exact",
    reduce: Reduce | None = None,
) -> list[Tensor]:
    """Return the product of the Hessian with the gradient, both restricted to ``weights``.

    Args:
        losses: Yields one scalar per chunk; called once for the gradient and once (by differences: twice) for the product.
        weights: What to differentiate by.
        method: ``"exact"`` or ``"finite_difference"``.
        reduce: Averages a flat vector over processes that hold different chunks; called exactly twice, on gradient and on product.

    Returns:
        One tensor per weight, of its shape, float64.

    Raises:
        ModelError: If an operation of the model has no second derivative; names it.
    """
    product = hessian_product if method == "exact" else difference_product
    slope = [g.to(w.dtype) for g, w in zip(gradient(losses, weights, reduce), weights, strict=True)]
    return product(losses, weights, slope, reduce)


def operations(tensors: Iterable[Tensor]) -> Iterator[str]:
    """Yield the names of the operations in the graph of some tensors, those nearest to them first."""
    return itertools.chain.from_iterable(operations_by_depth(tensors))


def operations_by_depth(tensors: Iterable[Tensor]) -> Iterator[list[str]]:
    """Yield the names of the operations in the graph of some tensors that are so many steps away from them, each once, at its shortest way."""
    nodes = list(dict.fromkeys(t.grad_fn for t in tensors if t.grad_fn is not None))
    seen = set(nodes)
    while nodes:
        yield [node.name() for node in nodes]
        before = (before for node in nodes for before, _ in node.next_functions)
        nodes = list(dict.fromkeys(node for node in before if node is not None and node not in seen))
        seen.update(nodes)


@contextlib.contextmanager
def second_derivative(gradients: Sequence[Tensor], remedy: str) -> Iterator[None]:
    """Differentiate ``gradients`` inside the block; say which operation has no second derivative, and the way out.

    Args:
        gradients: With their graphs.
        remedy: What to do then, a sentence.

    Raises:
        OnceDifferentiable: If an operation has none; names it.
    """
    once = "a torch.autograd.Function marked @once_differentiable"
    if "torch::autograd::Error" in operations(gradients):  # such a node has no way on, so autograd takes it for zero
        raise _not_twice(once, remedy)
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        missing = _NO_DERIVATIVE.search(str(error))
        if missing is None:
            raise
        raise _not_twice(missing[1].lstrip("_"), remedy) from error


def _not_twice(operation: str, remedy: str) -> OnceDifferentiable:
    return OnceDifferentiable(
        f"Double backward is not implemented for {operation}, which the loss of this model uses. {remedy}"
    )


def _total(
    losses: Losses, weights: Sequence[Tensor], derivative: Callable[[Tensor], Sequence[Tensor]], reduce: Reduce | None
) -> list[Tensor]:
    """Sum up the derivatives of all losses in one flat vector, reduce it, and return it in the shapes of the weights."""
    flat = torch.empty(sum(w.numel() for w in weights), dtype=torch.float64, device=weights[0].device)
    parts, first = _shaped(flat, weights), True
    for loss in losses():
        for part, found in zip(parts, derivative(loss), strict=True):
            part.copy_(found) if first else part.add_(found)  # zeros to add to would be one more pass over memory
        first = False
        del loss  # and its graph, before the next one is built
    if first:
        flat.zero_()
    return _shaped(flat if reduce is None else reduce(flat), weights)


def _shaped(flat: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [w.numel() for w in weights])
    return [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(float(t.double().norm()) for t in tensors))
