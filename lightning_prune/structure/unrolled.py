"""A convolution written as one linear map, from all values of its input to all of its output, as small networks on tiny maps may have it.

The map ignores that the weights of a convolution are shared: a matrix product operator of it (Gao et al. 2020, arXiv:1904.06194, who flatten the
channels last; here they come first) is no convolution any more, and it takes inputs of one size only.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ModelError
from lightning_prune.structure.layers import Conv, DenseLayer, describe, layer_from

LARGEST = 2**28  # entries of the matrix of a linear map: 1 GiB in float32
_CHUNK = 2**22  # entries of unit images that are convolved at once


class Unrolled(nn.Module):
    """A linear map over flattened maps, ``[..., C, *extent]`` to ``[..., N, *extent]``; one batch axis or none.

    Args:
        linear: The map, a Linear or what has taken its place.
        inputs: ``(C, *extent)`` of the input.
        outputs: ``(N, *extent)`` of the output.
    """

    def __init__(self, linear: nn.Module, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        super().__init__()
        self.linear, self.inputs, self.outputs = linear, tuple(inputs), tuple(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of ``x``.

        Raises:
            ModelError: If ``x`` has another size than the map was made for.
        """
        if tuple(x.shape[-len(self.inputs) :]) != self.inputs:
            raise ModelError(
                f"This layer was unrolled for inputs of {list(self.inputs)} and got {list(x.shape)}. Do not unroll layers that see several sizes."
            )
        y: Tensor = self.linear(x.flatten(-len(self.inputs)))
        return y.reshape(*y.shape[:-1], *self.outputs)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{list(self.inputs)} to {list(self.outputs)}"


def unrolled_shapes(layer: Conv, extent: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return ``(C, *extent)`` and ``(N, *extent)`` of input and output of a convolution for inputs of an extent.

    Raises:
        ModelError: If the kernel does not fit, or the matrix would be too large.
    """
    inputs = (layer.in_channels, *extent)
    if len(inputs) != len(layer.kernel_size) + 1:
        raise ModelError(f"A {layer} takes maps of {len(layer.kernel_size)} axes, not {list(extent)}.")
    try:
        outputs = tuple(layer_from(describe(layer), device="meta")(torch.empty(inputs, device="meta")).shape)
    except RuntimeError as error:
        raise ModelError(f"A {layer} takes no maps of {list(extent)}: {error}") from error
    if math.prod(inputs) * math.prod(outputs) > LARGEST:
        raise ModelError(
            f"unrolled it would be a matrix of {math.prod(outputs):,} x {math.prod(inputs):,}; {LARGEST:,} entries are the most"
        )
    return inputs, outputs


def extents_of(layer: DenseLayer, calls: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[int, ...]]:
    """Return the different sizes of maps, without batch and channels, that calls give a convolution, of shapes ``(input, output)``."""
    axes = layer.weight.ndim - 2
    return sorted({tuple(inputs[len(inputs) - axes :]) for inputs, _ in calls})


def why_not_unrolled(layer: nn.Module, calls: Sequence[tuple[Sequence[int], Sequence[int]]]) -> str | None:
    """Say why a convolution with such calls cannot be unrolled, or None."""
    extents = extents_of(layer, calls)  # type: ignore[arg-type]
    if len(extents) > 1:
        return f"it is called with maps of {' and '.join('x'.join(map(str, e)) for e in extents)}, and unrolled it would take one size"
    try:
        unrolled_shapes(layer, extents[0])  # type: ignore[arg-type]
    except ModelError as error:
        return str(error)
    return None


def build_unrolled(layer: Conv, extent: Sequence[int]) -> Unrolled:
    """Build the unrolled form of a convolution, values undefined; device, type, flags are the convolution's.

    Raises:
        ModelError: As :func:`unrolled_shapes`.
    """
    inputs, outputs = unrolled_shapes(layer, extent)
    weight, bias = layer.weight, layer.bias
    linear = nn.Linear(
        math.prod(inputs), math.prod(outputs), bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    linear.weight.requires_grad_(weight.requires_grad)
    if bias is not None:
        linear.bias.requires_grad_(bias.requires_grad)
    return Unrolled(linear, inputs, outputs).train(layer.training)


@torch.no_grad()
def unroll(layer: Conv, extent: Sequence[int]) -> Unrolled:
    """Write a convolution as a linear map for inputs of an extent: the same function, in every type.

    Raises:
        ModelError: As :func:`unrolled_shapes`.
    """
    made = build_unrolled(layer, extent)
    linear: Any = made.linear
    size, weight = math.prod(made.inputs), layer.weight.double()
    values = {"weight": weight}
    if layer.bias is not None:
        values["bias"] = torch.zeros_like(layer.bias, dtype=torch.float64)
        linear.bias.copy_(layer.bias[:, None].expand(-1, math.prod(made.outputs[1:])).flatten())
    for some in torch.split(torch.arange(size, device=weight.device), max(1, _CHUNK // size)):
        images = torch.nn.functional.one_hot(some, size).double().view(-1, *made.inputs)
        linear.weight[:, some] = torch.func.functional_call(layer, values, (images,)).flatten(1).T.to(linear.weight)
    return made
