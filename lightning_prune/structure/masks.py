"""Masks that hold: entries of parameters kept at zero while a model trains."""

import torch
from torch import Tensor, nn

from lightning_prune.structure.plan import Plan
from lightning_prune.structure.steps import MaskWeight


class Masks:
    """The masks of a plan, on the devices of the model's parameters.

    Args:
        model: The model that carries the plan.
        plan: Its :class:`~lightning_prune.structure.plan.MaskWeight` steps are taken; others do not matter here. A mask of a layer
            that a later step replaced is gone with the layer.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        steps = [step for step in plan.steps if isinstance(step, MaskWeight) and step.key in parameters]
        self.parameters = [parameters[step.key] for step in steps]
        self.masks = [step.mask.to(p.device, p.dtype) for step, p in zip(steps, self.parameters, strict=True)]

    def __len__(self) -> int:
        return len(self.masks)

    @torch.no_grad()
    def apply_(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Zero the masked entries of the parameters and of whatever state of the same shape ``optimizer`` keeps for them.

        Momentum and second moments of a masked entry would otherwise push it off zero again in the next step.
        """
        if not self.masks:
            return
        torch._foreach_mul_([p.data for p in self.parameters], self.masks)
        state: list[Tensor] = []
        masks: list[Tensor] = []
        for parameter, mask in zip(self.parameters, self.masks, strict=True):
            kept = optimizer.state.get(parameter, {}) if optimizer is not None else {}
            tensors = [
                v for v in kept.values() if isinstance(v, Tensor) and v.shape == mask.shape and v.is_floating_point()
            ]
            state += tensors
            masks += [mask.to(tensor.dtype) for tensor in tensors]
        if state:
            torch._foreach_mul_(state, masks)
