"""Forms on offer for a matrix product operator: one threshold, no form that is both dearer and worse."""

import pytest
import torch

from lightning_prune.budget.bonds import forms_within, ladder
from lightning_prune.structure.tensor_train import Form, cut_values


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
        (0, 0.9, 10),
        (2, 0.2, 30),
        (None, 0.0, 50),
    ]
