"""How one tensor shrinks, as data."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from lightning_prune.errors import PlanError
from lightning_prune.structure.steps.mask import pack_bits, unpack_bits


@dataclasses.dataclass(frozen=True)
class Cut:
    """How one tensor shrinks.

    Attributes:
        shape: Its shape before.
        keep: By axis, which slices stay: bits as :func:`~lightning_prune.structure.steps.mask.pack_bits` writes them, 1 = kept. Other axes
            stay whole.
        grid: Bits over the first two axes together, for the weight ``[N, C / g, *k]`` of a grouped convolution whose groups lose different
            inputs: each row that stays keeps equally many columns. Axis 1 is then not in ``keep``. None where axes shrink independently.
        zero: Axes, out of ``keep``, whose removed slices are zero in the masked model: the side where the removed channels come from.

    Raises:
        PlanError: If this is no way to cut a tensor of that shape.
    """

    shape: tuple[int, ...]
    keep: Mapping[int, str]
    grid: str | None = None
    zero: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "keep", dict(sorted(self.keep.items())))
        object.__setattr__(self, "zero", tuple(self.zero))
        axes = range(len(self.shape))
        if not all(type(size) is int and size > 0 for size in self.shape):
            raise PlanError(f"A tensor of shape {list(self.shape)} cannot be cut: sizes are integers above 0.")
        if not all(type(axis) is int and axis in axes for axis in self.keep):
            raise PlanError(f"A tensor of shape {list(self.shape)} cannot be cut along axes {list(self.keep)}.")
        if len(set(self.zero)) != len(self.zero) or not all(type(a) is int and a in self.keep for a in self.zero):
            raise PlanError(f"Axes held at zero, {list(self.zero)}, must be among those cut, {list(self.keep)}.")
        if self.grid is not None and (len(self.shape) < 2 or 1 in self.keep):
            raise PlanError(
                f"A grid cuts axis 1, which a tensor {list(self.shape)} cut along {list(self.keep)} rules out."
            )
        if 0 in self.after:
            raise PlanError(f"A cut of shape {list(self.shape)} would leave nothing: {list(self.after)}.")

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        keep: Mapping[int, Tensor],
        *,
        grid: Tensor | None = None,
        zero: tuple[int, ...] = (),
    ) -> Self:
        """Make a cut from boolean masks.

        Args:
            shape: Shape of the tensor.
            keep: By axis, True where a slice stays, ``[shape[axis]]``.
            grid: True where an entry of the first two axes stays, ``[shape[0], shape[1]]``.
            zero: Axes whose removed slices are zero in the masked model.
        """
        bits = {axis: pack_bits(mask) for axis, mask in keep.items()}
        return cls(shape, bits, None if grid is None else pack_bits(grid), zero)

    def kept(self, axis: int) -> Tensor:
        """Which slices along ``axis`` stay, ``[shape[axis]]``, boolean; for a cut with a grid not axis 1."""
        size = self.shape[axis]
        return unpack_bits(self.keep[axis], size) if axis in self.keep else torch.ones(size, dtype=torch.bool)

    @property
    def inputs(self) -> Tensor:
        """Which columns of which row stay along axis 1: boolean, ``[1, shape[1]]``, with a grid ``[shape[0], shape[1]]``."""
        if self.grid is None:
            return self.kept(1).unsqueeze(0)
        return unpack_bits(self.grid, self.shape[0] * self.shape[1]).view(self.shape[:2])

    @functools.cached_property
    def after(self) -> tuple[int, ...]:
        """Shape after the cut."""
        sizes = list(self.shape)
        for axis in self.keep:
            sizes[axis] = int(self.kept(axis).sum())
        if self.grid is not None:
            counts = sorted(set(self.inputs[self.kept(0)].sum(1).tolist()))
            if len(counts) != 1:
                raise PlanError(
                    f"The rows of a grid over {list(self.shape)} keep {counts} columns; it must be one number."
                )
            sizes[1] = counts[0]
        return tuple(sizes)

    def zero_mask(self) -> Tensor | None:
        """Where the masked model may differ from zero: boolean, broadcasts to ``[*shape]``; None if it may everywhere."""
        masks = [self.kept(axis).view([-1 if a == axis else 1 for a in range(len(self.shape))]) for axis in self.zero]
        return functools.reduce(torch.logical_and, masks) if masks else None

    def select(self, tensor: Tensor) -> Tensor:
        """Return what stays.

        Args:
            tensor: ``[*shape]``, any dtype, device and memory format.

        Returns:
            A new tensor, ``[*after]``, dense, in the memory format of ``tensor``.
        """
        small, axes = tensor, list(self.keep)
        if self.grid is not None:
            rows = self.kept(0).nonzero()
            columns = self.inputs[rows.squeeze(1)].nonzero()[:, 1].view(len(rows), -1)
            small = tensor[rows.to(tensor.device), columns.to(tensor.device)]
            axes = [axis for axis in axes if axis != 0]
        for axis in axes:
            small = small.index_select(axis, self.kept(axis).nonzero().squeeze(1).to(tensor.device))
        return small.clone(memory_format=memory_format(tensor))

    def to_dict(self) -> dict[str, Any]:
        """Return the cut in JSON types."""
        keep = {str(axis): bits for axis, bits in self.keep.items()}
        return {"shape": list(self.shape), "keep": keep, "grid": self.grid, "zero": list(self.zero)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build the cut from what :meth:`to_dict` returned, or from a file that nobody vouches for.

        Raises:
            PlanError: If it is none.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != known:
            raise PlanError(f"A cut has {', '.join(sorted(known))}; the plan gives {', '.join(sorted(fields))}.")
        axes = {str(axis): axis for axis in range(len(fields["shape"]))}
        unknown = set(fields["keep"]) - set(axes)
        if unknown:
            raise PlanError(f"A tensor of shape {fields['shape']} cannot be cut along axes {sorted(unknown)}.")
        keep = {axes[axis]: bits for axis, bits in fields["keep"].items()}
        return cls(tuple(fields["shape"]), keep, fields["grid"], tuple(fields["zero"]))


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Return the format in which ``tensor`` lies densely, strides of axes of size 1 included; contiguous if in none."""
    forms = {4: torch.channels_last, 5: torch.channels_last_3d}
    plain, last = (
        torch.empty(tensor.shape, device="meta", memory_format=form).stride()
        for form in (torch.contiguous_format, forms.get(tensor.ndim, torch.contiguous_format))
    )
    return forms[tensor.ndim] if tensor.stride() == last != plain else torch.contiguous_format
