"""Plans that remove channels, written by hand: what the tracer would find, without a tracer."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_prune.structure.plan import Origin, Plan, Stage
from lightning_prune.structure.steps import Cut, KeepChannels


def keep(size: int, *removed: int) -> Tensor:
    """Return a mask of ``size`` entries that is False at ``removed``."""
    mask = torch.ones(size, dtype=torch.bool)
    mask[list(removed)] = False
    return mask


def outputs(name: str, layer: nn.Module, mask: Tensor) -> KeepChannels:
    """Return the step that keeps the outputs ``mask`` of a layer or norm: axis 0 of all that it holds, zero in the masked model but for buffers."""
    held = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    zero = {key: (0,) for key, _ in layer.named_parameters(recurse=False)}
    tensors = {key: Cut.of(tuple(t.shape), {0: mask}, zero=zero.get(key, ())) for key, t in held.items() if t.ndim}
    return KeepChannels(name, tensors, resized(layer, out_features=mask, out_channels=mask, num_features=mask))


def inputs(name: str, layer: nn.Module, mask: Tensor, **absorb: float) -> KeepChannels:
    """Return the step that keeps the inputs ``mask`` of a layer; ``value=0.5`` is the constant that the others hold."""
    cut = Cut.of(tuple(layer.weight.shape), {1: mask})
    constant = {"weight": "weight", "bias": "bias", **absorb} if absorb else None
    return KeepChannels(name, {"weight": cut}, resized(layer, in_features=mask, in_channels=mask), constant)


def both(name: str, layer: nn.Module, out: Tensor, into: Tensor) -> KeepChannels:
    """Return the step that keeps the outputs ``out`` and the inputs ``into`` of a layer with a bias."""
    weight = Cut.of(tuple(layer.weight.shape), {0: out, 1: into}, zero=(0,))
    bias = Cut.of(tuple(layer.bias.shape), {0: out}, zero=(0,))
    sizes = resized(layer, out_features=out, out_channels=out, in_features=into, in_channels=into)
    return KeepChannels(name, {"weight": weight, "bias": bias}, sizes)


def resized(layer: nn.Module, **masks: Tensor) -> dict[str, tuple[int, int]]:
    """Return the attributes that change with the masks, those that the layer has."""
    return {key: (len(mask), int(mask.sum())) for key, mask in masks.items() if key in vars(layer)}


def plan_of_steps(model: nn.Module, steps: Iterable[KeepChannels], method: str = "Hand") -> Plan:
    """Return a plan of one stage for ``model``."""
    return Plan(tuple(steps), {}, Origin.of(model, 1), (Stage(method, {}),))


def chain() -> nn.Sequential:
    """Return convolution, norm, convolution and linear layer with random statistics, float64, in eval mode; ``[N, 3, 4, 4]`` to ``[N, 3]``."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 16, 3),
    )
    for tensor in [*model[1].parameters(), model[1].running_mean, model[1].running_var]:
        nn.init.uniform_(tensor, 0.5, 1.5)
    return model.double().eval()


def cut_chain(model: nn.Sequential, first: Tensor, second: Tensor) -> Plan:
    """Return the plan that keeps ``first`` of the outputs of the first and ``second`` of the outputs of the second convolution of :func:`chain`."""
    taps = second.repeat_interleave(model[6].in_features // len(second))
    steps = [
        outputs("0", model[0], first),
        outputs("1", model[1], first),
        both("3", model[3], second, first),
        inputs("6", model[6], taps),
    ]
    return plan_of_steps(model, steps)
