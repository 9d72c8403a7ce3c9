"""Weights of which single entries can leave: those that sum over inputs."""

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize

KINDS = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.MultiheadAttention,
    nn.RNNBase,
)  # not embeddings, which look up, nor norms, which scale


def prunable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear, convolutional, attention and recurrent layers of a model, by name; ``""`` is the model itself."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KINDS)}


def prunable_weights(
    model: nn.Module, layers: Iterable[str], frozen: bool = False
) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """Return the weights of some layers, and why others have none.

    Args:
        model: The model.
        layers: Names of layers, among :func:`prunable_layers`.
        frozen: Whether frozen ones count.

    Returns:
        Parameters of two axes or more by full name, tied ones once, in the order of the model; by name of a layer the reason why it has none:
        it is frozen, or its weight is computed from others.
    """
    chosen = set(layers)
    found: dict[str, nn.Parameter] = {}
    alone: dict[str, str] = {}
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        if name not in chosen:
            continue
        if parametrize.is_parametrized(module):
            alone[name] = (
                "its weight is computed from others (torch.nn.utils.parametrize), which a mask would not hold at zero; "
                "remove_parametrizations makes it a plain one"
            )
            continue
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module._parameters.get("weight") is None:
            alone[name] = (
                "its weight is computed from others, as by torch.nn.utils.weight_norm of the old kind; undo that first"
            )
            continue
        if any(p.is_complex() for p in module.parameters(recurse=False)):
            alone[name] = "its weights are complex numbers"
            continue
        own = {key: p for key, p in module.named_parameters(name, recurse=False) if p.ndim >= 2}
        free = {key: p for key, p in own.items() if p.requires_grad or frozen}
        if not free:
            alone[name] = "it is frozen" if own else "it holds no weight of its own"
        found |= {key: p for key, p in free.items() if p not in seen}
        seen |= set(free.values())
    return found, alone
