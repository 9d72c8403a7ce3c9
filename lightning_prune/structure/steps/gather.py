"""A layer that shares its stream with others reads only some of the channels."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_prune.errors import PlanError
from lightning_prune.structure.gathered import Gathered, may_gather, reading, reads_of
from lightning_prune.structure.steps.channels import KeepChannels
from lightning_prune.structure.steps.mask import pack_bits, unpack_bits


@dataclasses.dataclass(frozen=True)
class GatherInputs(KeepChannels):
    """Let a convolution or linear layer gather the channels that it reads from a stream that others read, too.

    One step says all that happens to the layer in a stage: it reads fewer channels, the stream loses some, its own outputs leave. A layer that
    reads all of its stream is torch's own; otherwise it is a drop-in (:mod:`lightning_prune.structure.gathered`). All masks are bits over
    the stream as it is before the step.

    Attributes:
        size: Channels of the stream.
        before: Those that the layer reads.
        reads: Those of ``before`` that it goes on to read; its weights for the others are zero in the masked model.
        stream: Those that stay in the stream. The index is renumbered accordingly.

    Raises:
        PlanError: If the masks do not fit each other or the cut of the weight.
    """

    action: ClassVar[str] = "gather"
    size: int = dataclasses.field(kw_only=True)
    before: str = dataclasses.field(kw_only=True)
    reads: str = dataclasses.field(kw_only=True)
    stream: str = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.size) is not int or self.size < 1:
            raise PlanError(f"Module {self.module!r}: a stream has an integer number of channels, got {self.size!r}.")
        before, reads, stream = self.masks
        columns = (reads & stream)[before]
        cut = self.tensors.get("weight")
        expected = columns.new_ones(len(columns)) if cut is None or len(cut.shape) < 2 else cut.inputs[0]
        if (reads & ~before).any() or not columns.any() or not torch.equal(columns, expected):
            raise PlanError(
                f"Module {self.module!r} reads {int(before.sum())} of {self.size} channels and is to keep {int(columns.sum())}, which its weight "
                f"with {int(expected.sum())} of {len(expected)} inputs left does not fit."
            )

    @classmethod
    def of(cls, step: KeepChannels, before: Tensor, reads: Tensor, stream: Tensor) -> Self:
        """Let the layer of ``step`` gather, too; masks over the stream before, ``[size]``, boolean."""
        bits = {"before": pack_bits(before), "reads": pack_bits(reads), "stream": pack_bits(stream)}
        return cls(step.module, step.tensors, step.attributes, step.absorb, size=len(before), **bits)

    @property
    def masks(self) -> tuple[Tensor, Tensor, Tensor]:
        """``before``, ``reads`` and ``stream``, ``[size]`` each, boolean, on the CPU."""
        before, reads, stream = (unpack_bits(bits, self.size) for bits in (self.before, self.reads, self.stream))
        return before, reads, stream

    def _find(self, model: nn.Module, after: bool) -> nn.Module:
        module = super()._find(model, after)
        before, reads, stream = self.masks
        expected = reads[stream] if after else before
        if not may_gather(module) or isinstance(module, Gathered) == bool(expected.all()):
            raise PlanError(
                f"Module {self.module!r} is a {type(module).__name__}; the plan was made for another layer."
            )
        known = not isinstance(module, Gathered) or not module.index.is_meta
        if known and not torch.equal(reads_of(module), expected):
            raise PlanError(
                f"Module {self.module!r} does not read the {int(expected.sum())} of {len(expected)} channels that the plan was made for."
            )
        return module

    def _put(self, model: nn.Module, reads: Tensor) -> None:
        layer: Any = model.get_submodule(self.module)
        model.set_submodule(self.module, reading(layer, reads))

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what the masked model holds at zero: also the weights for channels that the layer does not read any more."""
        yield from super().held()
        before, reads, _ = self.masks
        cut = self.tensors.get("weight")
        if cut is not None and not reads[before].all():
            yield "weight", reads[before].view(1, -1, *[1] * (len(cut.shape) - 2))

    def build(self, model: nn.Module) -> None:
        """Give the layer its sizes, and the index its values."""
        super().build(model)
        _, reads, stream = self.masks
        self._put(model, reads[stream])

    def apply(self, model: nn.Module) -> None:
        """Zero the weights for channels that are not read any more, cut, and renumber what is read."""
        self.emulate(model)  # a constant that such a channel holds is nothing to absorb
        super().apply(model)
        _, reads, stream = self.masks
        self._put(model, reads[stream])

    def undo(self, model: nn.Module) -> None:
        """Give the layer its sizes from before, values undefined, and the index its values."""
        super().undo(model)
        self._put(model, self.masks[0])

    def summary(self) -> dict[str, Any]:
        """Return the table row: the shapes, and how many channels of how many are read."""
        before, reads, stream = self.masks
        row = {"before": "", "after": "", "kept": 1.0} | (
            super().summary() if self.tensors else {"action": self.action}
        )
        for key, mask in (("before", before), ("after", reads[stream])):
            row[key] = f"{row[key]} reads {int(mask.sum())} of {len(mask)}".strip()
        return row
