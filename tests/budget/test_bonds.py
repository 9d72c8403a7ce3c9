"""Forms on offer for a matrix product operator: one threshold, no form that is both dearer and worse; bonds lowered one by one."""

import functools
import itertools

import pytest
import torch
from torch import nn

from lightning_prune.budget.bonds import forms_within, ladder, price, squeeze
from lightning_prune.errors import BudgetError
from lightning_prune.structure.tensor_train import Form, cut_values, useful_bonds


def test_forms_follow_one_threshold_on_what_every_cut_may_lose():
    form = Form((4, 4, 4), (4, 4, 4), (1, 1))
    values = cut_values(torch.randn(form.sizes, dtype=torch.float64))
    forms = forms_within(form, values)
    assert [f.bonds for f, _ in forms] == sorted(f.bonds for f, _ in forms)
    assert [loss for _, loss in forms] == sorted((loss for _, loss in forms), reverse=True)
    assert forms[-1][0].bonds == (16, 16)
    for found, loss in forms:
        tails = [float((v[bond:] ** 2).sum() / (v**2).sum()) for v, bond in zip(values, found.bonds, strict=True)]
        assert loss == pytest.approx(sum(tails), abs=1e-12)
        assert max(tails) <= min(
            float((v[bond - 1 :] ** 2).sum() / (v**2).sum()) for v, bond in zip(values, found.bonds, strict=True)
        )


def test_forms_that_cost_more_and_lose_more_are_not_offered():
    forms = [(Form((2, 2), (2, 2), (bond,)), loss) for bond, loss in ((1, 0.9), (2, 0.5), (3, 0.2), (4, 0.0))]
    found = ladder(forms, [10, 40, 30, 60], dense=50)
    assert [(choice.size, choice.loss, choice.cost) for choice in found] == [
        (forms[0][0], 0.9, 10),
        (forms[2][0], 0.2, 30),
        (None, 0.0, 50),
    ]


# Squeezing ------------------------------------------------------------------------------------------------------------------

LAYERS = {  # modes, layer, the shapes that it sees
    "conv": (Form((4, 4), (4, 4), (1, 1), 9), nn.Conv2d(16, 16, 3, padding=1), [((1, 16, 3, 3), (1, 16, 3, 3))]),
    "three": (Form((4, 3, 2), (2, 3, 4), (1, 1)), nn.Linear(24, 24), [((2, 24), (2, 24))]),
    "two": (Form((8, 4), (4, 7), (1,)), nn.Linear(28, 32), [((1, 28), (1, 32))]),
}
FORMS = {name: form for name, (form, _, _) in LAYERS.items()}


def offered(what: str, seed: int = 0):
    """Singular values of random tensors whose slices fade, and the costs of the layers."""
    draw, values = torch.Generator().manual_seed(seed), {}
    for name, form in FORMS.items():
        tensor = torch.randn(form.sizes, dtype=torch.float64, generator=draw)
        for axis, size in enumerate(form.sizes):
            tensor *= (0.7 ** torch.arange(size)).view(-1, *(1,) * (len(form.sizes) - axis - 1))
        values[name] = cut_values(tensor)
    costs = {
        name: functools.partial(price, layer, shapes=shapes, what=what) for name, (_, layer, shapes) in LAYERS.items()
    }
    return values, costs


def total(costs, bonds) -> int:
    return sum(cost(FORMS[name].with_bonds(bonds[name]) if name in bonds else None) for name, cost in costs.items())


def lost(values, bonds) -> float:
    return sum(float((v[bond:] ** 2).sum() / (v**2).sum()) for v, bond in zip(values, bonds, strict=True))


def legal(values, costs, bonds):
    """Every single move: layer, its bonds afterwards, what it loses then; those that make nothing cheaper left out."""
    found = []
    for name, form in FORMS.items():
        if name in bonds:
            here = [list(bonds[name]) for _ in bonds[name]]
            for k, lowered in enumerate(here):
                lowered[k] -= 1
            after = [useful_bonds(form.sizes, lowered) for lowered in here if min(lowered) > 0]
        else:
            after = [f.bonds for f, _ in forms_within(form, values[name])]
            after = [max(b for b in after if costs[name](form.with_bonds(b)) < costs[name](None))]
        found += [
            (lost(values[name], b), name, b) for b in after if total(costs, bonds | {name: b}) < total(costs, bonds)
        ]
    return found


def walk(values, costs, what):
    """Every state from dense to the least, by moves made one at a time."""
    states = [{}]
    while legal(values, costs, states[-1]):
        forms = squeeze(FORMS, values, costs, states[-1], total(costs, states[-1]) - 1, name=what)
        states.append({name: form.bonds for name, form in forms.items()})
    return states


@pytest.mark.parametrize("what", ["params", "flops"])
@pytest.mark.parametrize("seed", range(3))
def test_every_move_is_the_one_that_leaves_its_layer_with_the_least_loss(what, seed):
    values, costs = offered(what, seed)
    states = walk(values, costs, what)
    assert len(states) > 15
    for before, after in itertools.pairwise(states):
        moves = legal(values, costs, before)
        (taken,) = [loss for loss, name, bonds in moves if before | {name: bonds} == after]
        assert taken == pytest.approx(min(move[0] for move in moves), abs=1e-12)


@pytest.mark.parametrize("what", ["params", "flops"])
def test_a_bound_is_met_and_not_by_one_move_less_wherever_bonds_start(what):
    values, costs = offered(what)
    states = walk(values, costs, what)
    sums = [total(costs, state) for state in states]
    for start, bound in [(0, sums[0]), (0, sums[5]), (0, sums[-1]), (4, sums[9] + 1), (7, sums[3]), (12, sums[-1])]:
        forms = squeeze(FORMS, values, costs, states[start], bound - 10, fixed=-10, name=what)
        needed = max(start, next(k for k, cost in enumerate(sums) if cost <= bound))
        assert {name: form.bonds for name, form in forms.items()} == states[needed]


def test_bonds_never_grow_under_falling_bounds_although_the_weights_change():
    bonds = {}
    _, costs = offered("flops")
    dense = total(costs, {})
    for round_, share in enumerate((0.95, 0.8, 0.8, 0.85, 0.6, 0.5)):
        values, _ = offered("flops", seed=round_)
        before, forms = bonds, squeeze(FORMS, values, costs, bonds, round(share * dense), name="flops")
        bonds = {name: form.bonds for name, form in forms.items()}
        assert all(new <= old for name in before for new, old in zip(bonds[name], before[name], strict=True))
        assert total(costs, bonds) <= share * dense or share == 0.85
    assert len(bonds) > 1


def test_a_bound_below_all_moves_names_the_layers_that_bind():
    values, costs = offered("params")
    least = total(costs, walk(values, costs, "params")[-1])
    with pytest.raises(
        BudgetError, match=rf"params: at most {least - 1} asked for, but {least} is .* by 'two' \(bonds 1:"
    ):
        squeeze(FORMS, values, costs, {}, least - 1)
