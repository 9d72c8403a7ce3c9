"""Two thin layers in place of a dense one: forms, shapes, values, costs.

Forms ("kinds"), for a weight ``[N, C / g, *k]`` in ``g`` groups, at rank ``r`` per group; all exact, so the two
layers compute what the dense layer with the truncated weight computes, up to rounding:

- ``"channel"`` (Zhang et al. 2016, "NC" of TRP): matrix ``[g, N/g, C/g * prod k]``. First a convolution ``C -> g r``
  with the kernel, stride, padding and dilation of the dense one, then a 1x1 one ``g r -> N`` with the bias.
- ``"spatial"`` (Jaderberg et al. 2014, "VH" of TRP), Conv2d only: matrix ``[g, C/g * kh, N/g * kw]``. First
  ``kh x 1``, ``C -> g r``, with stride, padding and dilation of the height, then ``1 x kw``, ``g r -> N``, with
  those of the width and the bias. Padding, of any mode and also uneven (``"same"`` with even kernels), works per
  axis, and the first convolution has no bias, so that zeros stay zeros.
- ``"linear"``: matrix ``[1, N, C]``. Two Linears, the bias on the second.

Both convolutions have ``g`` groups. Neither normalization nor activation comes between the two.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.errors import ModelError
from lightning_prune.structure.layers import DenseLayer, describe, is_plain, layer_from
from lightning_prune.structure.spectrum import truncate

Kind: TypeAlias = Literal["channel", "spatial", "linear"]
Shapes: TypeAlias = Sequence[tuple[Sequence[int], Sequence[int]]]  # per call: shapes of input and output, with batch


class Cost(NamedTuple):
    """What a layer costs.

    Attributes:
        params: Parameters, bias included.
        flops: Multiply-adds in all calls together, bias left out, as fvcore counts.
    """

    params: int
    flops: int


class Factorized(nn.Sequential):
    """A dense layer as two thin ones, ``first`` and ``second``, plain layers of the same type.

    Args:
        first: Takes the input; its outputs are ``groups * rank``.
        second: Gives the output and holds the bias.
    """

    first: DenseLayer
    second: DenseLayer

    def __init__(self, first: DenseLayer, second: DenseLayer) -> None:
        super().__init__()
        self.first = first
        self.second = second


def kind_for(layer: nn.Module, scheme: str) -> Kind:
    """Choose the form for a layer: the scheme where there are two ways to cut it, the only one elsewhere.

    Args:
        layer: A plain Linear, Conv1d, Conv2d or Conv3d.
        scheme: ``"channel"`` or ``"spatial"``.

    Returns:
        ``"linear"`` for Linear; ``"spatial"`` for a Conv2d under that scheme whose kernel extends along both axes;
        else ``"channel"``: a kernel with a single axis of length above 1, or none, has nothing to be cut apart, and
        for Conv3d no spatial form is defined.
    """
    if isinstance(layer, nn.Linear):
        return "linear"
    both = isinstance(layer, nn.Conv2d) and min(layer.kernel_size) > 1
    return "spatial" if scheme == "spatial" and both else "channel"


def groups_of(layer: DenseLayer) -> int:
    """Number of matrices in the weight: the groups of a convolution, 1 for a Linear."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def matrix_of(weight: Tensor, kind: Kind, groups: int = 1) -> Tensor:
    """Arrange a weight as the matrices that its form truncates.

    Args:
        weight: ``[N, C / groups, *k]``; ``[N, C]`` for ``"linear"``.
        kind: The form.
        groups: Groups of the convolution.

    Returns:
        ``[groups, N/g, C/g * prod k]`` for channel and linear, ``[groups, C/g * kh, N/g * kw]`` for spatial. A view
        where the layout allows one, always connected to ``weight`` for autograd.
    """
    if kind != "spatial":
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    out, inner, height, width = weight.shape
    split = weight.reshape(groups, out // groups, inner, height, width)
    return split.permute(0, 2, 3, 1, 4).reshape(groups, inner * height, out // groups * width)


def weight_of(matrix: Tensor, kind: Kind, shape: Sequence[int]) -> Tensor:
    """Arrange matrices as a weight again; the inverse of :func:`matrix_of`.

    Args:
        matrix: As :func:`matrix_of` returns.
        kind: The form.
        shape: Shape of the weight, ``[N, C / groups, *k]``.

    Returns:
        The weight, contiguous.
    """
    if kind != "spatial":
        return matrix.reshape(tuple(shape))
    out, inner, height, width = shape
    groups = matrix.shape[0]
    split = matrix.reshape(groups, inner, height, out // groups, width)
    return split.permute(0, 3, 1, 2, 4).reshape(out, inner, height, width)


def rank_limit(layer: DenseLayer, kind: Kind) -> int:
    """Full rank of the layer's matrices in that form, per group."""
    return min(matrix_of(torch.empty_like(layer.weight, device="meta"), kind, groups_of(layer)).shape[1:])


def build_factorized(layer: nn.Module, kind: Kind, rank: int) -> Factorized:
    """Build the factorized form of a dense layer: shapes only, values uninitialised, no random number drawn.

    Args:
        layer: A plain Linear, Conv1d, Conv2d or Conv3d; also on the meta device.
        kind: The form.
        rank: Per group, from 1 to the full rank.

    Returns:
        Two layers of the dtype, device, training flag and ``requires_grad`` of the dense one.

    Raises:
        ModelError: If the layer has no such form, or no such rank.
    """
    dense = _checked(layer, kind, rank)
    first, second = (
        layer_from(spec, device=dense.weight.device, dtype=dense.weight.dtype) for spec in _specs(dense, kind, rank)
    )
    first.weight.requires_grad_(dense.weight.requires_grad)
    second.weight.requires_grad_(dense.weight.requires_grad)
    if dense.bias is not None and second.bias is not None:
        second.bias.requires_grad_(dense.bias.requires_grad)
    return Factorized(first, second).train(dense.training)


@torch.no_grad()
def factorize(layer: nn.Module, kind: Kind, rank: int) -> Factorized:
    """Factorize a dense layer by truncating the singular value decomposition of its matrices, in float64.

    Args:
        layer: A plain Linear, Conv1d, Conv2d or Conv3d; left as it is.
        kind: The form.
        rank: Per group, from 1 to the full rank.

    Returns:
        New layers that share no memory with ``layer``; the singular values are split evenly, ``sqrt(s)`` to each.

    Raises:
        ModelError: As :func:`build_factorized`; if the weights are on the meta device or not finite.
    """
    dense, small = _checked(layer, kind, rank), build_factorized(layer, kind, rank)
    if dense.weight.is_meta:
        raise ModelError(f"A {dense} on the meta device holds no values to factorize: load its weights first.")
    weight, groups = dense.weight, groups_of(dense)
    left, right = truncate(matrix_of(weight, kind, groups), rank).factors()
    first, second = right, left
    if kind == "spatial":
        out, inner, height, width = weight.shape
        first = left.reshape(groups, inner, height, rank).permute(0, 3, 1, 2)  # [g, r, C/g, kh]
        second = right.reshape(groups, rank, out // groups, width).permute(0, 2, 1, 3)  # [g, N/g, r, kw]
    small.first.weight.copy_(first.reshape(small.first.weight.shape))
    small.second.weight.copy_(second.reshape(small.second.weight.shape))
    if dense.bias is not None and small.second.bias is not None:
        small.second.bias.copy_(dense.bias)
    return small


def dense_cost(layer: DenseLayer, shapes: Shapes) -> Cost:
    """Cost of the dense layer.

    Args:
        layer: A plain Linear, Conv1d, Conv2d or Conv3d.
        shapes: Shapes of input and output of every call, batch included.

    Returns:
        Parameters and multiply-adds.
    """
    weight = layer.weight.numel()
    per_position = sum(positions(layer, output) for _, output in shapes)
    return Cost(weight + _bias(layer), weight * per_position)


def cost(layer: DenseLayer, kind: Kind, rank: int, shapes: Shapes) -> Cost:
    """Cost of the factorized form of a dense layer, without building it.

    Args:
        layer: A plain Linear, Conv1d, Conv2d or Conv3d.
        kind: The form.
        rank: Per group.
        shapes: Shapes of input and output of every call of the dense layer, batch included.

    Returns:
        Parameters and multiply-adds. In the spatial form the first convolution gives a map of the output's height
        and the input's width.
    """
    first, second = _factor_sizes(layer, kind)
    flops = 0
    for inputs, outputs in shapes:
        after = positions(layer, outputs)
        middle = after // outputs[-1] * inputs[-1] if kind == "spatial" else after
        flops += first * middle + second * after
    return Cost(rank * (first + second) + _bias(layer), rank * flops)


def break_even_rank(layer: DenseLayer, kind: Kind, shapes: Shapes) -> int:
    """Find the largest rank at which the factorized form has fewer parameters and multiply-adds than the dense layer.

    Args:
        layer: A plain Linear, Conv1d, Conv2d or Conv3d.
        kind: The form.
        shapes: Shapes of input and output of every call of the dense layer, batch included.

    Returns:
        The rank per group, at most the full one; 0 where no rank is cheaper, also for a layer that is never called.
    """
    dense, unit = dense_cost(layer, shapes), cost(layer, kind, 1, shapes)
    if dense.flops == 0:
        return 0
    by_params = (dense.params - _bias(layer) - 1) // (unit.params - _bias(layer))
    return min(by_params, (dense.flops - 1) // unit.flops, rank_limit(layer, kind))


def positions(layer: DenseLayer, shape: Sequence[int]) -> int:
    """Count the places of a map: batch times spatial extent, or the rows of a Linear. At each of the output a weight is applied.

    Args:
        layer: A plain Linear, Conv1d, Conv2d or Conv3d.
        shape: Of its input or output, with or without a batch.
    """
    if isinstance(layer, nn.Linear):
        return math.prod(shape[:-1])
    extent = len(layer.kernel_size)
    batch = shape[0] if len(shape) == extent + 2 else 1
    return batch * math.prod(shape[-extent:])


def _checked(layer: nn.Module, kind: Kind, rank: int) -> DenseLayer:
    if not is_plain(layer):
        raise ModelError(f"A layer of type {type(layer).__name__} has no factorized form.")
    if (kind == "linear") != isinstance(layer, nn.Linear) or (kind == "spatial" and not isinstance(layer, nn.Conv2d)):
        allowed = "linear" if isinstance(layer, nn.Linear) else "channel"
        raise ModelError(
            f"A {type(layer).__name__} has no {kind!r} form: take {allowed!r} ('spatial' is for Conv2d only)."
        )
    limit = rank_limit(layer, kind)
    if not 1 <= rank <= limit:
        raise ModelError(f"A {layer} has no {kind!r} form of rank {rank}: take 1 to {limit}.")
    return layer


def _specs(layer: DenseLayer, kind: Kind, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Describe the two layers."""
    dense = describe(layer)
    inner = groups_of(layer) * rank
    first, second = dense | {"out": inner, "bias": False}, dense | {"in": inner}
    if kind == "channel":
        one, zero = [1] * len(dense["kernel"]), [0] * len(dense["kernel"])
        second |= {"kernel": one, "stride": one, "padding": zero, "dilation": one, "padding_mode": "zeros"}
    elif kind == "spatial":
        for spec, off in ((first, 1), (second, 0)):  # the axis that is not this convolution's
            for key, neutral in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
                if not isinstance(spec[key], str):
                    spec[key] = [neutral if axis == off else size for axis, size in enumerate(spec[key])]
    return first, second


def _factor_sizes(layer: DenseLayer, kind: Kind) -> tuple[int, int]:
    """Weights of the two layers per unit of rank, all groups together."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if kind == "spatial":
        return layer.in_channels * layer.kernel_size[0], layer.out_channels * layer.kernel_size[1]
    return layer.in_channels * math.prod(layer.kernel_size), layer.out_channels


def _bias(layer: DenseLayer) -> int:
    return 0 if layer.bias is None else layer.bias.numel()
