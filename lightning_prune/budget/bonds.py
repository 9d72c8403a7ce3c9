"""Ladders of bonds: the forms that a layer may take as a matrix product operator, what each loses and what it costs."""

from collections.abc import Sequence

from torch import Tensor

from lightning_prune.budget.ranks import Choice
from lightning_prune.structure.factorized import Shapes, positions
from lightning_prune.structure.layers import DenseLayer
from lightning_prune.structure.spectrum import lost_energy
from lightning_prune.structure.tensor_train import Form, useful_bonds

_NO_LOSS = 1e-12  # relative energy that a float64 Gram matrix cannot tell from zero


def price(layer: DenseLayer, form: Form | None, shapes: Shapes, what: str) -> int:
    """Return what a layer costs.

    Args:
        layer: The dense layer.
        form: The form that it would take; None for the dense one.
        shapes: Shapes of input and output of every call, batch included.
        what: ``"params"``, bias included, or ``"flops"``, of the way that the layer contracts by for those shapes.
    """
    if what == "params":
        bias = 0 if layer.bias is None else layer.bias.numel()
        return bias + (layer.weight.numel() if form is None else form.params)
    total = 0
    for inputs, outputs in shapes:
        inner, outer = positions(layer, inputs), positions(layer, outputs)
        total += (
            layer.weight.numel() * outer if form is None else form.multiply_adds(outer, inner)[form.way(outer, inner)]
        )
    return total


def forms_within(form: Form, values: Sequence[Tensor]) -> list[tuple[Form, float]]:
    """List the forms of a layer whose bonds follow from one threshold, common to its cuts, on the energy that each may lose.

    Args:
        form: Modes.
        values: Singular values of every cut, ``[n]`` each, descending.

    Returns:
        Forms with ascending bonds, and the share of the squares that each may lose at most: the sum over the cuts, exact for one cut.
    """
    losses = [[loss if loss > _NO_LOSS else 0.0 for loss in lost_energy(v[None]).tolist()] for v in values]
    found: dict[tuple[int, ...], float] = {}
    for threshold in sorted({loss for cut in losses for loss in cut}, reverse=True):
        at = [next(k for k, loss in enumerate(cut) if loss <= threshold) for cut in losses]
        bonds = useful_bonds(form.sizes, [index + 1 for index in at])
        found[bonds] = sum(cut[bond - 1] for cut, bond in zip(losses, bonds, strict=True))
    return [(form.with_bonds(bonds), loss) for bonds, loss in found.items()]


def ladder(forms: Sequence[tuple[Form, float]], costs: Sequence[int], dense: int) -> list[Choice]:
    """Return the forms that are cheaper than all that lose less, then the dense layer; sizes are positions in ``forms``."""
    found = [Choice(None, 0.0, dense)]
    for k in reversed(range(len(forms))):
        if costs[k] < found[-1].cost:
            found.append(Choice(k, forms[k][1], costs[k]))
    return found[::-1]
