"""What a weight is multiplied with while a model runs: every call of a linear or convolution function, with its inputs.

Inside :func:`recorded` the functions of ``torch.nn.functional`` note each call that one of the given weights takes part in. They are what linear,
convolution and attention layers call, so padding modes, layers that are called several times, tied weights and a user's own ``F.linear``
come out alike. Each such product is a sum over positions of an outer product (:meth:`Product.sides`), and so is the gradient of its weight.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a kernel moves over its input: the arguments of a convolution, one value per axis of space."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool

    @property
    def pads(self) -> list[int]:
        """The padding as :func:`torch.nn.functional.pad` takes it."""
        return [side for pair in reversed(self.padding) for side in pair]


@dataclasses.dataclass(frozen=True)
class Product:
    """One call of a linear or convolution function.

    Attributes:
        name: Name of the weight.
        rows: Which rows of the weight took part, as start and stop; attention uses thirds of one weight.
        x: The input, detached: ``[..., in]`` of a linear function, ``[batch, channels, *space]`` of a convolution.
        shape: Shape of the output.
        edge: Where the gradient of the output arrives; valid also if the output is changed in place later.
        kernel: Sizes of the kernel; empty for a linear function.
        geometry: How it moves; None for a linear function.
    """

    name: str
    rows: tuple[int, int]
    x: Tensor
    shape: torch.Size
    edge: GradientEdge
    kernel: tuple[int, ...]
    geometry: Geometry | None

    @property
    def lead(self) -> tuple[int, ...]:
        """Axes that are no features: all but the last of a linear function, the first of a convolution."""
        return tuple(self.shape[:-1]) if self.geometry is None else (self.shape[0],)

    def layouts(self, samples: int) -> list[int]:
        """Return where the axis of samples may lie: how many entries of the flattened lead axes stand before it, likely ones first."""
        found = []
        for axis, size in enumerate(self.lead):
            if size % samples == 0:
                before = math.prod(self.lead[:axis])
                found += [
                    before,
                    before * (size // samples),
                ]  # samples vary slower, or faster, than what they share the axis with
        return list(dict.fromkeys(found))

    def sides(self, gradients: Tensor, before: int, samples: int) -> tuple[Tensor, Tensor]:
        """Return the two factors whose product over positions is the gradient of the weight.

        Args:
            gradients: Gradients of the output, ``[cotangents, *shape]``.
            before: The layout, one of :meth:`layouts`.
            samples: Number of samples.

        Returns:
            ``[cotangents, samples, groups, rows of the weight, positions]`` and ``[cotangents, samples, groups, columns, positions]``; one
            of the two does not depend on the cotangent and has 1 there.
        """
        x, geometry = self.x.unsqueeze(0), self.geometry
        if geometry is None:
            sides = [side.reshape(len(side), -1, 1, side.shape[-1], 1) for side in (gradients, x)]
        elif geometry.transposed:
            sides = [_grouped(x, geometry.groups), patches(gradients, self.kernel, geometry, self.x.shape[2:])]
        else:
            sides = [_grouped(gradients, geometry.groups), patches(x, self.kernel, geometry, self.shape[2:])]
        rows, columns = (_by_sample(side, before, samples) for side in sides)
        return rows, columns


def _by_sample(side: Tensor, before: int, samples: int) -> Tensor:
    """Bring ``[cotangents, lead, groups, features, positions]`` to ``[cotangents, samples, groups, features, all positions]``."""
    cotangents, lead, groups, features, _ = side.shape
    split = side.reshape(cotangents, before, samples, lead // (before * samples), *side.shape[2:])
    return split.permute(0, 2, 4, 5, 1, 3, 6).reshape(cotangents, samples, groups, features, -1)


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """Bring ``[cotangents, batch, channels, *space]`` to ``[cotangents, batch, groups, channels of a group, positions]``."""
    return tensor.reshape(*tensor.shape[:2], groups, tensor.shape[2] // groups, -1)


def patches(tensor: Tensor, kernel: Sequence[int], geometry: Geometry, places: Sequence[int]) -> Tensor:
    """Return what the kernel covers at each of ``places`` positions, ``[cotangents, batch, groups, channels of a group * kernel, positions]``."""
    axes = len(kernel)
    found = F.pad(tensor.flatten(0, 1), geometry.pads)
    for axis in range(axes):
        reach = geometry.dilation[axis] * (kernel[axis] - 1) + 1
        windows = found.unfold(2 + axis, reach, geometry.stride[axis])
        found = windows[..., :: geometry.dilation[axis]].narrow(2 + axis, 0, places[axis])
    space, inside = list(range(2, 2 + axes)), list(range(2 + axes, 2 + 2 * axes))
    return found.permute(0, 1, *inside, *space).reshape(
        *tensor.shape[:2], geometry.groups, tensor.shape[2] // geometry.groups * math.prod(kernel), -1
    )


@contextlib.contextmanager
def recorded(weights: Mapping[str, Tensor]) -> Iterator[list[Product]]:
    """Record the products that weights take part in while the block runs.

    The functions are replaced for the whole process, so one thread at a time may do this.

    Args:
        weights: Parameters by name; nothing is replaced if there are none.

    Yields:
        A list that grows with every call. What uses a weight in another way, such as a recurrent layer, leaves no trace there.
    """
    names = {id(weight): name for name, weight in weights.items()}
    products: list[Product] = []

    def noting(function: Callable[..., Tensor], geometry: Callable[..., Geometry | None]) -> Callable[..., Tensor]:
        def run(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            output = function(input, weight, *args, **kwargs)
            owner = weight if id(weight) in names or weight._base is None else weight._base
            name, rows = names.get(id(owner)), _rows(weight, owner)
            if name is not None and rows is not None and output.requires_grad:
                edge, kernel = get_gradient_edge(output), tuple(weight.shape[2:])
                single = bool(kernel) and input.ndim == weight.ndim - 1  # a convolution without an axis of samples
                x, shape = input.detach(), output.shape
                if single:
                    x, shape = x.unsqueeze(0), torch.Size((1, *shape))
                products.append(Product(name, rows, x, shape, edge, kernel, geometry(kernel, *args, **kwargs)))
            return output

        return run

    table: dict[str, Callable[..., Geometry | None]] = {"linear": lambda *_, **__: None}
    table |= {f"conv{n}d": convolution for n in (1, 2, 3)} | {f"conv_transpose{n}d": _transposed for n in (1, 2, 3)}
    before = {key: getattr(F, key) for key in table} if weights else {}
    try:
        for key, function in before.items():
            setattr(F, key, noting(function, table[key]))
        yield products
    finally:
        for key, function in before.items():
            setattr(F, key, function)


def _rows(weight: Tensor, owner: Tensor) -> tuple[int, int] | None:
    """Return which rows of a parameter a tensor consists of, or None if it is something else."""
    if weight is owner:
        return 0, len(owner)
    if not weight.is_contiguous() or weight.shape[1:] != owner.shape[1:]:
        return None
    start = (weight.storage_offset() - owner.storage_offset()) // max(1, owner[0].numel())
    return start, start + len(weight)


def convolution(
    kernel: tuple[int, ...],
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Geometry:
    """Return the geometry of a convolution with these arguments, those of :func:`torch.nn.functional.conv2d` behind the weight."""
    steps, gaps = _each(stride, kernel), _each(dilation, kernel)
    if isinstance(padding, str):
        total = [gap * (size - 1) if padding == "same" else 0 for gap, size in zip(gaps, kernel, strict=True)]
        sides = tuple((all_ // 2, all_ - all_ // 2) for all_ in total)
    else:
        sides = tuple((side, side) for side in _each(padding, kernel))
    return Geometry(steps, sides, gaps, groups, False)


def _transposed(
    kernel: tuple[int, ...],
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Geometry:
    sides = tuple((side, side) for side in _each(padding, kernel))
    return Geometry(_each(stride, kernel), sides, _each(dilation, kernel), groups, True)


def _each(value: int | Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(kernel) if len(values) == 1 else values
