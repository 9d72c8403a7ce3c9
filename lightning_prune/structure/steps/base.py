"""What every step of a plan answers, and the one way in which steps change tensors: the values are swapped, never written over."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_prune.errors import PlanError


@dataclasses.dataclass(frozen=True)
class Step:
    """One change of one module. Subclasses say which.

    Whatever a step does to a tensor that stays, it swaps the storage and leaves the old one as it was (:func:`swap`). Who holds the old
    tensors can go back, and a model that shares them with another does not change the other.

    Attributes:
        module: Dotted name of the module in the model as the steps before left it.
    """

    action: ClassVar[str]
    replaces: ClassVar[bool] = False  # whether a module of fewer weights takes the place of the one named
    module: str

    @property
    def once(self) -> bool:
        """Whether the step changes weights that nothing holds afterwards: a gradual run takes it when it is decided, and not again at the end."""
        return False

    def build(self, model: nn.Module) -> None:
        """Give ``model`` the shapes of this step, in place; values of new parameters are undefined.

        Raises:
            PlanError: If the module is missing or is not the one that the step was made for.
        """
        raise NotImplementedError

    def emulate(self, model: nn.Module) -> None:
        """Give the weights of ``model`` the values that this step stands for, shapes kept, in place."""
        raise NotImplementedError

    def apply(self, model: nn.Module) -> None:
        """Turn values into smaller values: what :meth:`emulate` computes, in the shapes of :meth:`build`, in place."""
        raise NotImplementedError

    def settled(self) -> Self:
        """Return what a model carries of this step once its values are taken: without what acts on values only, and only once."""
        return self

    def undo(self, model: nn.Module) -> None:
        """Give ``model`` the shapes from before this step again, in place; values of new parameters are undefined."""
        raise NotImplementedError

    def removed(self) -> int:
        """Return how many weights, biases aside, a module that is replaced (``replaces``) has more than what takes its place."""
        return 0

    def summary(self) -> dict[str, Any]:
        """Return the table row of this step: ``action``, ``before``, ``after``, ``kept`` (share of the module's weights)."""
        raise NotImplementedError

    def facts(self) -> dict[str, float]:
        """Return what loggers are told of this step beside the share kept, by name."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return the step in JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"action": self.action, **fields}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build the step from what :meth:`to_dict` returned."""
        return cls(**fields)

    def find(self, model: nn.Module) -> nn.Module:
        """Return the module that this step names.

        Raises:
            PlanError: If there is none, or it is the model itself.
        """
        if not self.module:
            raise PlanError(
                "A plan cannot change the model itself, only modules inside it. Wrap the layer in a module."
            )
        try:
            return model.get_submodule(self.module)
        except AttributeError as error:
            raise PlanError(
                f"The plan changes module {self.module!r}, which {type(model).__name__} does not have."
            ) from error


class Values(Step):
    """A step that changes values once and no shape. Subclasses say which by :meth:`Step.emulate`."""

    @property
    def once(self) -> bool:
        """True."""
        return True

    def build(self, model: nn.Module) -> None:
        """Check that the module is there; no shape changes."""
        self.find(model)

    def apply(self, model: nn.Module) -> None:
        """Do what :meth:`emulate` does."""
        self.emulate(model)

    def undo(self, model: nn.Module) -> None:
        """Do nothing: no shape has changed."""

    def facts(self) -> dict[str, float]:
        """Return nothing."""
        return {}


def swap(tensor: Tensor, values: Tensor) -> None:
    """Give ``tensor``, the same object, other values and perhaps another shape; its old storage stays as it was.

    Args:
        tensor: A parameter or buffer. If the shape changes, its gradient is dropped.
        values: Its new values, same dtype and device; not copied.
    """
    if values.shape != tensor.shape:
        tensor.grad = None
        # A graph or hook that is still held keeps the old shape alive in autograd, which forgets it only when the dtype changes.
        other = torch.float32 if tensor.dtype == torch.float16 else torch.float16
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.data = tensor.data.new_empty(0, dtype=other)
    tensor.data = values


def settle(module: nn.Module) -> None:
    """Let ``module`` take notice that tensors of its own have other storages: recurrent layers keep theirs in one piece for cuDNN."""
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()
