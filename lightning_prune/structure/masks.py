"""Masks that hold: entries, slices and directions of parameters kept at zero while a model trains."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from lightning_prune.structure.plan import Plan
from lightning_prune.structure.rotated import Directions, factors_of
from lightning_prune.structure.steps import KeepChannels, MaskWeight, Rotate, Step


class Masks:
    """Masks of a model, on the devices of its parameters.

    Args:
        model: The model that carries the plan.
        plan: Its :class:`~lightning_prune.structure.steps.MaskWeight` steps are taken; :class:`~lightning_prune.structure.steps.KeepChannels` steps
            after them cut the masks, too. A mask of a layer that a later step replaced is gone with the layer.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        tensors = _tensors(model)
        self._set((tensors[key], mask) for key, mask in cut_masks(model, plan).items())

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> Self:
        """Return masks of tensors, each with a boolean one that broadcasts to it: False where it is held at zero."""
        masks = cls.__new__(cls)
        masks._set(pairs)
        return masks

    @classmethod
    def pending(cls, model: nn.Module, steps: Sequence[Step]) -> Self:
        """Return the masks of steps that are decided but not applied: what they will remove is held at zero until then.

        Args:
            model: The model in the shapes from before ``steps``.
            steps: Of :class:`~lightning_prune.structure.steps.MaskWeight` the entries, of :class:`~lightning_prune.structure.steps.KeepChannels` the
                slices where the removed channels come from, of :class:`~lightning_prune.structure.steps.Rotate` the directions; others are
                passed over.

        Raises:
            PlanError: If a step does not hold the directions that stay any more, or its layer is another one.
        """
        tensors = _tensors(model)
        pairs = [(step.key, step.mask) for step in steps if isinstance(step, MaskWeight)]
        for step in steps:
            if isinstance(step, KeepChannels):
                pairs += [(step.key(name), mask) for name, mask in step.held()]
        masks = cls.of((tensors[key], mask) for key, mask in pairs)
        masks.directions = [_OnDirections.of(s.find(model), s.directions) for s in steps if isinstance(s, Rotate)]
        return masks

    def _set(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.slices: list[tuple[Tensor, int, Tensor]] = []  # whole slices along one axis: cheap
        self.entries: list[tuple[Tensor, Tensor]] = []
        self.directions: list[_OnDirections] = []
        for parameter, mask in _merged(pairs):
            axes = [axis for axis, size in enumerate(mask.shape) if size > 1]
            if len(axes) == 1 and mask.shape != parameter.shape:
                gone = (~mask.flatten()).nonzero().flatten().to(parameter.device)
                self.slices.append((parameter, axes[0], gone))
            else:
                self.entries.append((parameter, mask.to(parameter.device, parameter.dtype)))

    def __len__(self) -> int:
        return len(self.slices) + len(self.entries) + len(self.directions)

    @torch.no_grad()
    def apply_(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Zero the masked entries of the parameters and of whatever state of the same shape ``optimizer`` keeps for them.

        Momentum and second moments of a masked entry would otherwise push it off zero again in the next step. Weights that lose directions are
        projected, their states are not: second moments belong to entries, of which none is zero for good.
        """
        for parameter, axis, gone in self.slices:
            for tensor in (parameter.data, *_state(optimizer, parameter)):
                tensor.index_fill_(axis, gone, 0)
        if self.entries:
            pairs = [(p.data, mask) for p, mask in self.entries]
            pairs += [(t, mask.to(t.dtype)) for p, mask in self.entries for t in _state(optimizer, p)]
            torch._foreach_mul_([tensor for tensor, _ in pairs], [mask for _, mask in pairs])
        for held in self.directions:
            held.apply_()


class _OnDirections(NamedTuple):
    """The weight of a layer, held on the directions that stay.

    Attributes:
        weight: Of its core, ``[N, C, *k]``.
        bias: Likewise, where it is rotated with the inputs.
        sides: By axis of the weight, bases of what stays or, if that is thinner, of what leaves; whether it leaves.
    """

    weight: Tensor
    bias: Tensor | None
    sides: Mapping[int, tuple[Tensor, bool]]

    @classmethod
    def of(cls, layer: nn.Module, directions: Directions) -> Self:
        """Hold ``layer``, plain or rotated."""
        core = factors_of(layer)["core"]
        computes = torch.promote_types(core.weight.dtype, torch.float32)
        sides = {}
        for axis, basis in enumerate((directions.outputs, directions.inputs)):
            if basis is not None and basis.shape[0] > (kept := basis.shape[1]):
                leaves = 2 * kept > basis.shape[0]
                thin = torch.linalg.qr(basis, mode="complete")[0][:, kept:] if leaves else basis
                sides[axis] = thin.to(core.weight.device, computes), leaves
        return cls(core.weight, core.bias if directions.augmented else None, sides)

    def apply_(self) -> None:
        """Project the weight, in its own type or, if that is a half one, in float32."""
        weight = self.weight.data if self.bias is None else torch.cat([self.weight.data, self.bias.data[:, None]], 1)
        with torch.autocast(weight.device.type, enabled=False):
            for axis, (basis, leaves) in self.sides.items():
                rows = weight.to(basis.dtype).movedim(axis, 0)
                part = (basis @ (basis.mT @ rows.flatten(1))).view(rows.shape)
                weight = (rows - part if leaves else part).movedim(0, axis)
        self.weight.data.copy_(weight[:, : self.weight.shape[1]])
        if self.bias is not None:
            self.bias.data.copy_(weight[:, -1])


def cut_masks(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Return the masks of a plan in the shapes that its later steps have left, boolean, on the CPU, by name of the parameter."""
    tensors = _tensors(model)
    found: dict[str, Tensor] = {}
    for place, step in enumerate(plan.steps):
        if isinstance(step, MaskWeight) and step.key in tensors:
            own = tensors[step.key]
            mask = cut_mask(step, plan.steps[place + 1 :], lambda key, own=own: tensors.get(key) is own)  # type: ignore[misc]
            found[step.key] = found[step.key] & mask if step.key in found else mask
    return found


def _merged(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Take the masks of one parameter together: several stages may have masked it."""
    found: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}
    for parameter, mask in pairs:
        key = id(parameter), mask.shape
        found[key] = (parameter, found[key][1] & mask if key in found else mask)
    return list(found.values())


@contextlib.contextmanager
def masked(weights: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Iterator[None]:
    """Zero entries inside the block and put their values back bit for bit afterwards.

    Args:
        weights: Parameters by name.
        kept: True where the entry stays, same shapes, boolean; parameters that are missing stay whole.
    """
    before = {name: weights[name].detach().clone() for name in kept}
    try:
        with torch.no_grad():
            for name, mask in kept.items():
                weights[name].data.masked_fill_(~mask.to(weights[name].device), 0)
        yield
    finally:
        with torch.no_grad():
            for name, values in before.items():
                weights[name].data.copy_(values)


def _state(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> list[Tensor]:
    """Return what an optimizer keeps for every entry of a parameter: momentum, second moments, averages."""
    kept = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    return [v for v in kept.values() if isinstance(v, Tensor) and v.shape == parameter.shape and v.is_floating_point()]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}


def cut_mask(step: MaskWeight, later: Sequence[Step], is_its: Callable[[str], bool] | None = None) -> Tensor:
    """Return a mask in the shape that the steps after it leave of its parameter.

    Args:
        step: The mask.
        later: The steps after it.
        is_its: Tells whether a full name is one of the parameter's, of which a tied one has several; by default the step's own alone.
    """
    is_its = is_its or step.key.__eq__
    mask = step.mask
    for cutting in later:
        if isinstance(cutting, KeepChannels):
            for name, cut in cutting.tensors.items():
                if is_its(cutting.key(name)):
                    mask = cut.select(mask)
    return mask
