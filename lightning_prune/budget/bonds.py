"""Bonds under a bound: the forms that a layer may take as a matrix product operator, what each loses and what it costs.

Two ways lead below a bound. At once: every layer offers a ladder of forms to :func:`~lightning_prune.budget.ranks.allocate`. Step by step, while
the model trains: :func:`squeeze` lowers one bond at a time, where least is lost, and never raises one (Liu et al., "Enabling Lightweight
Fine-tuning for Pre-trained Language Model Compression based on Matrix Product Operators", ACL 2021, arXiv:2106.02205).
"""

import heapq
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lightning_prune.budget.ranks import Choice, allocate
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
    return _forms_within(form, _losses(values))


def _forms_within(form: Form, losses: Sequence[Sequence[float]]) -> list[tuple[Form, float]]:
    found: dict[tuple[int, ...], float] = {}
    for threshold in sorted({loss for cut in losses for loss in cut}, reverse=True):
        at = [next(k for k, loss in enumerate(cut) if loss <= threshold) for cut in losses]
        bonds = useful_bonds(form.sizes, [index + 1 for index in at])
        found[bonds] = _lost(losses, bonds)
    return [(form.with_bonds(bonds), loss) for bonds, loss in found.items()]


def ladder(forms: Sequence[tuple[Form, float]], costs: Sequence[int], dense: int) -> list[Choice]:
    """Return the forms that are cheaper than all that lose less, then the dense layer."""
    found = [Choice(None, 0.0, dense)]
    for k in reversed(range(len(forms))):
        if costs[k] < found[-1].cost:
            found.append(Choice(forms[k][0], forms[k][1], costs[k]))
    return found[::-1]


def squeeze(
    forms: Mapping[str, Form],
    values: Mapping[str, Sequence[Tensor]],
    costs: Mapping[str, Callable[[Form | None], int]],
    bonds: Mapping[str, Sequence[int]],
    bound: int,
    *,
    fixed: int = 0,
    name: str = "params",
) -> dict[str, Form]:
    """Lower bonds by single moves, as few as a bound asks for.

    A move lowers one bond of one layer by one, and its others to what is then useful; or it gives a dense layer the form with the largest bonds of
    its ladder that pay. Of the moves that make their layer cheaper, the one after which its layer loses least is taken, then the next.

    Args:
        forms: Modes by layer.
        values: Singular values of every cut, ``[n]`` each, descending; more layers may be there.
        costs: What a layer costs in a form; for None, dense.
        bonds: Where to start: useful bonds of the layers that have a form; the others are dense.
        bound: What the total may cost at most.
        fixed: Cost of everything that is not in ``forms``.
        name: What is bounded, for the message.

    Returns:
        The forms of the layers that are not dense in the end: no bond has grown, and no layer has become dense again.

    Raises:
        BudgetError: If no move is left and the total is above the bound; names the layers that bind.
    """
    losses = {layer: _losses(values[layer]) for layer in forms}
    now = {layer: form.with_bonds(bonds[layer]) if layer in bonds else None for layer, form in forms.items()}
    spent = {layer: costs[layer](form) for layer, form in now.items()}
    total = fixed + sum(spent.values())
    moves: list[tuple[float, str, int, Form]] = []  # of every layer the best: loss, layer, cost, form
    moved = list(forms)
    while total > bound:
        for layer in moved:
            here = now[layer]
            offered = (
                _forms_within(forms[layer], losses[layer])[::-1] if here is None else _lowered(here, losses[layer])
            )
            priced = ((loss, layer, costs[layer](form), form) for form, loss in offered)
            if best := next((move for move in priced if move[2] < spent[layer]), None):
                heapq.heappush(moves, best)
        if not moves:
            least = {layer: Choice(form, 0.0, spent[layer]) for layer, form in now.items()}
            ends = {layer: (least[layer], Choice(None, 0.0, cost(None))) for layer, cost in costs.items()}
            allocate(ends, bound, fixed=fixed, name=name)  # raises: the least is more than the bound
        _, layer, cost, now[layer] = heapq.heappop(moves)
        total += cost - spent[layer]
        spent[layer], moved = cost, [layer]
    return {layer: form for layer, form in now.items() if form is not None}


def _lowered(form: Form, losses: Sequence[Sequence[float]]) -> list[tuple[Form, float]]:
    """List the forms with one bond lowered by one and what they lose, the least first."""
    lower = [(*form.bonds[:k], bond - 1, *form.bonds[k + 1 :]) for k, bond in enumerate(form.bonds) if bond > 1]
    found = [form.with_bonds(bonds) for bonds in lower]
    return sorted(((f, _lost(losses, f.bonds)) for f in found), key=lambda offer: offer[1])


def _losses(values: Sequence[Tensor]) -> list[list[float]]:
    """Return the share of the squares that is lost at every bond of every cut."""
    return [[loss if loss > _NO_LOSS else 0.0 for loss in lost_energy(v[None]).tolist()] for v in values]


def _lost(losses: Sequence[Sequence[float]], bonds: Sequence[int]) -> float:
    """Return what a layer loses at most: the sum over its cuts."""
    return sum(cut[bond - 1] for cut, bond in zip(losses, bonds, strict=True))
