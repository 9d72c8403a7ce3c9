"""Layers that read some channels of a stream: drop-ins for :class:`torch.nn.Linear` and the convolutions.

In a residual network several layers read one stream, and each may do with other channels of it. The stream keeps its width; a drop-in picks
its channels by ``index_select`` and is then the ordinary layer, with that many inputs::

    index [inputs], integer, ascending    weight [outputs, inputs, *taps]    bias [outputs]

The channels are picked before the layer is called, outside of its ``forward``: hooks see what the layer computes with, as they do with any other
layer, and whoever looks at inputs through them (the statistics of a method, a count of operations) finds the columns of the weight.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_prune.errors import ModelError
from lightning_prune.structure.dropin import twin


class Gathered(nn.Module):
    """What the drop-ins have in common; each is made by :func:`reading`.

    Attributes:
        index: The channels that the layer reads, ascending, ``[inputs]``, int64; a buffer that the state dict holds.
        stream: Number of channels of what it is called with.
        axis: Where these lie.
    """

    axis: ClassVar[int]
    index: Tensor
    stream: int

    def __call__(self, input: Tensor) -> Any:
        """Call the layer with its channels of ``input``.

        Args:
            input: The stream, ``[..., stream, *positions]``.

        Raises:
            ModelError: If it has another number of channels.
        """
        if input.shape[self.axis] != self.stream:
            raise ModelError(
                f"{type(self).__name__} gathers from a stream of {self.stream} channels, got a tensor of shape {list(input.shape)}."
            )
        return super().__call__(input.index_select(self.axis, self.index))

    def extra_repr(self) -> str:
        """Return the layer's sizes, and what it reads."""
        return f"{super().extra_repr()}, reads {len(self.index)} of {self.stream}"


class GatheredLinear(Gathered, nn.Linear):
    """A :class:`torch.nn.Linear` that reads some features."""

    axis = -1


class GatheredConv1d(Gathered, nn.Conv1d):
    """A :class:`torch.nn.Conv1d` that reads some channels."""

    axis = -2


class GatheredConv2d(Gathered, nn.Conv2d):
    """A :class:`torch.nn.Conv2d` that reads some channels."""

    axis = -3


class GatheredConv3d(Gathered, nn.Conv3d):
    """A :class:`torch.nn.Conv3d` that reads some channels."""

    axis = -4


DROP_INS: dict[type[nn.Module], type[Gathered]] = {
    nn.Linear: GatheredLinear,
    nn.Conv1d: GatheredConv1d,
    nn.Conv2d: GatheredConv2d,
    nn.Conv3d: GatheredConv3d,
}


def may_gather(layer: nn.Module) -> bool:
    """Tell whether ``layer`` is exactly a Linear or a convolution without groups, or gathers already."""
    return type(layer) in (*DROP_INS, *DROP_INS.values()) and getattr(layer, "groups", 1) == 1


def reads_of(layer: nn.Module) -> Tensor:
    """Return which channels of its stream a layer reads: ``[stream]``, boolean, on the CPU; all of them if it does not gather."""
    if not isinstance(layer, Gathered):
        return torch.ones(layer.get_parameter("weight").shape[1], dtype=torch.bool)
    return torch.zeros(layer.stream, dtype=torch.bool).index_fill(0, layer.index.cpu(), True)


def reading(layer: nn.Module, reads: Tensor) -> nn.Module:
    """Return the layer that reads some channels of a stream; the weight must have as many columns.

    Args:
        layer: A layer that may gather. Left as it is.
        reads: Which channels, ``[stream]``, boolean.

    Returns:
        A twin that shares everything with ``layer``, hooks and their handles included: a drop-in, or torch's own layer if it reads all.
    """
    plain = next(kind for kind in DROP_INS if isinstance(layer, kind))
    made: Any = twin(layer, plain if reads.all() else DROP_INS[plain])
    if reads.all():
        made._buffers.pop("index", None)
        vars(made).pop("stream", None)
    else:
        made.register_buffer("index", reads.nonzero().flatten().to(layer.get_parameter("weight").device))
        made.stream = len(reads)
    return made  # type: ignore[no-any-return]


def index_called(model: nn.Module, name: str | None) -> Tensor | None:
    """Return the channels that a drop-in reads if ``name`` is that of its index and it has values; None otherwise."""
    owner, _, key = (name or "").rpartition(".")
    module = model.get_submodule(owner) if key == "index" else None
    return module.index if isinstance(module, Gathered) and not module.index.is_meta else None
