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

    One step says all that happens to the layer in a stage: it reads fewer channels, the stream loses some, outputs of its own leave. A layer
    that reads all of its stream is torch's own, otherwise it is a drop-in (:mod:`lightning_prune.structure.gathered`), in whose index the
    channels are renumbered as the stream shrinks.

    Attributes:
        stream: Number of channels of the stream, before and after.
        reads: Which of them the layer reads, before and after, as bits.
        keep: Of the inputs before, ``[inputs]``, as bits: those whose weights stay as they are. The masked model holds the others at zero.

    Raises:
        PlanError: If these do not fit each other or the cut of the weight.
    """

    action: ClassVar[str] = "gather"
    stream: tuple[int, int] = dataclasses.field(kw_only=True)
    reads: tuple[str, str] = dataclasses.field(kw_only=True)
    keep: str = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("stream", "reads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if [type(size) for size in self.stream] != [int, int] or min(self.stream) < 1 or len(self.reads) != 2:
            raise PlanError(
                f"Module {self.module!r}: a stream goes from one number of channels to another, got {self.stream!r} and {self.reads!r}."
            )
        counts = [int(self.mask(after).sum()) for after in (False, True)]
        cut = self.tensors.get("weight")
        inputs = counts[:1] * 2 if cut is None else [cut.shape[1], cut.after[1]] if len(cut.shape) > 1 else []
        whole = bool(self.kept.all())
        if counts != inputs or 0 in counts or (cut is None and not whole):
            raise PlanError(
                f"Module {self.module!r} reads {counts[0]} and then {counts[1]} channels; its weight does not fit that."
            )

    @classmethod
    def of(cls, step: KeepChannels, before: Tensor, after: Tensor, keep: Tensor) -> Self:
        """Let the layer of ``step`` gather, too.

        Args:
            step: What else happens to the layer; its cut of the weight leaves as many inputs as are read after.
            before: Which channels of the stream the layer reads, ``[stream]``, boolean.
            after: Likewise of the stream that stays.
            keep: Of the inputs before, those whose weights stay as they are, ``[inputs]``, boolean.
        """
        stream, reads = (len(before), len(after)), (pack_bits(before), pack_bits(after))
        return cls(
            step.module, step.tensors, step.attributes, step.absorb, stream=stream, reads=reads, keep=pack_bits(keep)
        )

    def mask(self, after: bool) -> Tensor:
        """Which channels of the stream the layer reads, ``[stream]``, boolean, on the CPU."""
        return unpack_bits(self.reads[after], self.stream[after])

    @property
    def kept(self) -> Tensor:
        """``keep`` as a mask, ``[inputs]``, boolean, on the CPU."""
        return unpack_bits(self.keep, int(self.mask(after=False).sum()))

    def _find(self, model: nn.Module, after: bool) -> nn.Module:
        module, reads = super()._find(model, after), self.mask(after)
        if not may_gather(module):
            raise PlanError(
                f"Module {self.module!r} is a {type(module).__name__}; the plan was made for another layer."
            )
        on_meta = isinstance(module, Gathered) and module.index.is_meta
        if not on_meta and not torch.equal(reads_of(module), reads):
            raise PlanError(
                f"Module {self.module!r} reads other channels than the {int(reads.sum())} of {len(reads)} that the plan was made for."
            )
        return module

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what the masked model holds at zero: also the weights for channels that the layer does not read any more."""
        yield from super().held()
        if not self.kept.all():
            yield "weight", self.kept.view(1, -1, *[1] * (len(self.tensors["weight"].shape) - 2))

    def build(self, model: nn.Module) -> None:
        """Give the layer its sizes, and the index its values."""
        super().build(model)
        self._put(model, after=True)

    def apply(self, model: nn.Module) -> None:
        """Zero the weights for channels that are not read any more, cut, and write the index."""
        self.emulate(model)  # what such a channel holds is nothing to absorb
        super().apply(model)
        self._put(model, after=True)

    def undo(self, model: nn.Module) -> None:
        """Give the layer its sizes from before, values undefined, and the index its values."""
        super().undo(model)
        self._put(model, after=False)

    def _put(self, model: nn.Module, after: bool) -> None:
        model.set_submodule(self.module, reading(model.get_submodule(self.module), self.mask(after)))

    def summary(self) -> dict[str, Any]:
        """Return the table row: the shapes, and how many channels of how many are read."""
        row = super().summary() if self.tensors else {"action": self.action, "before": "", "after": "", "kept": 1.0}
        for after, key in enumerate(("before", "after")):
            mask = self.mask(bool(after))
            row[key] = f"{row[key]} reads {int(mask.sum())} of {len(mask)}".strip()
        return row
