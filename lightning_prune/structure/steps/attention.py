"""Torch's multi-head attention opened, so that its heads can go."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import nn

from lightning_prune.errors import ModelError, PlanError
from lightning_prune.structure.attention import MultiheadAttention, close_heads, open_heads
from lightning_prune.structure.steps.base import Step

_SIZES = ("embed_dim", "num_heads", "kdim", "vdim")
_FLAGS = ("batch_first", "bias", "bias_kv", "add_zero_attn")


@dataclasses.dataclass(frozen=True)
class OpenHeads(Step):
    """Put a drop-in from which heads can be removed in the place of an ``nn.MultiheadAttention``; no value changes.

    Names, order and objects of the parameters stay. That heads go is said by the :class:`~lightning_prune.structure.steps.channels.KeepChannels`
    steps that follow.

    Attributes:
        module: Dotted name of the attention.
        before: Its sizes ``embed_dim``, ``num_heads``, ``kdim`` and ``vdim``, and whether it has ``batch_first``, ``bias``, ``bias_kv`` and
            ``add_zero_attn``.

    Raises:
        PlanError: If ``before`` is not such a description.
    """

    action: ClassVar[str] = "open heads"
    before: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", dict(self.before))
        sizes, flags = ([self.before.get(key) for key in keys] for keys in (_SIZES, _FLAGS))
        if (
            set(self.before) != {*_SIZES, *_FLAGS}
            or {type(size) for size in sizes} != {int}
            or {type(f) for f in flags} != {bool}
        ):
            raise PlanError(
                f"Module {self.module!r}: an attention is described by the integers {', '.join(_SIZES)} and the flags {', '.join(_FLAGS)}, "
                f"got {self.before!r}."
            )

    @classmethod
    def of(cls, module: str, attention: nn.MultiheadAttention) -> Self:
        """Make the step for ``attention``, which ``module`` names."""
        return cls(module, _describe(attention))

    def find(self, model: nn.Module) -> nn.MultiheadAttention:
        """Return torch's module.

        Raises:
            PlanError: If the module is not the one that the plan was made for.
        """
        module = super().find(model)
        if type(module) is not nn.MultiheadAttention:
            raise PlanError(
                f"Module {self.module!r} is a {type(module).__name__}; the plan was made for torch's MultiheadAttention."
            )
        found = _describe(module)
        for key, expected in self.before.items():
            if found[key] != expected:
                raise PlanError(f"Module {self.module!r} has {key} {found[key]!r}; the plan was made for {expected!r}.")
        return module

    def build(self, model: nn.Module) -> None:
        """Put the drop-in in the place of torch's module.

        Raises:
            PlanError: If the module is another one, or has no drop-in.
        """
        try:
            model.set_submodule(self.module, open_heads(self.find(model)))
        except ModelError as error:
            raise PlanError(f"Module {self.module!r}: {error}") from error

    def emulate(self, model: nn.Module) -> None:
        """Check that the module is there; its values stay."""
        self.find(model)

    def apply(self, model: nn.Module) -> None:
        """Put the drop-in in the place of torch's module."""
        self.build(model)

    def undo(self, model: nn.Module) -> None:
        """Put torch's module back."""
        module = super().find(model)
        if not isinstance(module, MultiheadAttention):
            raise PlanError(f"Module {self.module!r} is a {type(module).__name__}; its heads are not open.")
        model.set_submodule(self.module, close_heads(module))

    def facts(self) -> dict[str, float]:
        """Return nothing: no value changes."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Return the table row: the number of heads, all of which stay."""
        text = f"{self.before['num_heads']} heads"
        return {"action": self.action, "before": text, "after": text, "kept": 1.0}

    def to_dict(self) -> dict[str, Any]:
        """Return the step in JSON types."""
        return super().to_dict() | {"before": dict(self.before)}


def _describe(attention: nn.MultiheadAttention) -> dict[str, Any]:
    sizes: dict[str, Any] = {key: getattr(attention, key) for key in _SIZES}
    flags = {
        "batch_first": attention.batch_first,
        "bias": attention.in_proj_bias is not None,
        "bias_kv": attention.bias_k is not None,
        "add_zero_attn": attention.add_zero_attn,
    }
    return sizes | flags
