"""SNIP: the derivative by a factor on every weight, a conservation law, and what leaves."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_prune import compress
from lightning_prune.callback import Task
from lightning_prune.errors import OptionError
from lightning_prune.methods.snip import SNIP
from lightning_prune.probe import Probe
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.steps import MaskWeight

EXACT = 1e-12  # float64: sums of a few dozen terms in another order


def net(norm=False):
    middle = nn.BatchNorm1d(8) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(5, 8, bias=False), middle, nn.ReLU(), nn.Linear(8, 4, bias=False)).double()


def batches(*counts):
    return [(torch.randn(n, 5, dtype=torch.float64), torch.randint(0, 4, (n,))) for n in counts]


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def score(model, data, mean=lambda tensor: tensor, **options):
    probe = Probe(model, data, lambda batch, _: loss(model, batch), reduce=lambda tensor, _how: mean(tensor))
    weights = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    kept = {name: torch.ones(w.shape, dtype=torch.bool) for name, w in weights.items()}
    task = Task.of(model, probe, as_calls(data[0][0]))
    return SNIP(sparsity=0.5, **options).score_weights(task, weights, kept)


@pytest.mark.parametrize("norm", [False, True])
def test_scores_are_the_absolute_derivative_by_a_factor_of_one_on_every_weight(norm):
    model, data = net(norm), batches(20, 12)
    factors = {n: torch.ones_like(p, requires_grad=True) for n, p in model.named_parameters() if p.ndim >= 2}
    masked = {name: factor * model.get_parameter(name).detach() for name, factor in factors.items()}
    total = sum(cross_entropy(functional_call(model, masked, (x,)), y) for x, y in data)  # the sum before the absolute
    slopes = torch.autograd.grad(total, list(factors.values()))
    scores = score(model.eval() if norm else model, data, calibration_batches=2)  # batch statistics all the same
    for name, slope in zip(factors, slopes, strict=True):
        torch.testing.assert_close(scores[name], slope.abs(), rtol=EXACT, atol=EXACT)


def test_one_batch_is_looked_at_by_default():
    model, data = net(), batches(20, 12)
    assert torch.equal(score(model, data)["0.weight"], score(model, data[:1])["0.weight"])
    assert not torch.equal(score(model, data)["0.weight"], score(model, data, calibration_batches=2)["0.weight"])


def test_signed_sensitivities_into_and_out_of_a_unit_are_equal():
    model, data = net(), batches(1)  # of one sample: the signs of a unit's sensitivities are in scores and weights
    slopes = torch.autograd.grad(loss(model, data[0]), [model[0].weight, model[3].weight])
    scores = score(model, data)
    into = (scores["0.weight"] * (slopes[0] * model[0].weight).sign()).sum(1)
    out = (scores["3.weight"] * (slopes[1] * model[3].weight).sign()).sum(0)
    torch.testing.assert_close(into, out, rtol=1e-10, atol=EXACT)
    assert float(into.detach().abs().max()) > 1e-3


def test_for_a_loss_linear_in_the_weight_the_score_is_the_change_by_its_removal():
    layer = nn.Linear(3, 1, bias=False).double()
    data = [(torch.randn(7, 3, dtype=torch.float64), torch.zeros(7, dtype=torch.long))]
    probe = Probe(layer, data, lambda batch, _: layer(batch[0]).sum())
    task = Task.of(layer, probe, as_calls(data[0][0]))
    found = SNIP(sparsity=0.5).score_weights(task, {"weight": layer.weight}, {})["weight"]
    changes = (layer.weight[0] * data[0][0].sum(0)).abs()
    torch.testing.assert_close(found[0], changes.detach(), rtol=EXACT, atol=EXACT)


def test_one_collective_averages_the_gradient_before_the_absolute_value():
    model, (first, second) = net(), batches(20, 20)
    other = torch.autograd.grad(loss(model, second), list(model.parameters()))
    sizes = []

    def mean(flat):
        sizes.append(len(flat))
        return (flat + torch.cat([g.flatten() for g in other])) / 2  # what a second process would have

    found = score(model, [first], mean)
    whole = score(model, [tuple(torch.cat(pair) for pair in zip(first, second, strict=True))])
    assert sizes == [72]
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-10, atol=EXACT)


def test_exactly_the_share_leaves_and_it_is_the_lowest_scored():
    torch.manual_seed(1)
    model, data = net(), batches(20)
    scores = score(model, data)
    small, plan = compress(model, SNIP(sparsity=0.6, remove_dead=False), data[0][0], data=data, loss=loss)
    masks = {step.key: step.mask for step in plan.steps if isinstance(step, MaskWeight)}
    flat, kept = (torch.cat([part[name].flatten() for name in scores]) for part in (scores, masks))
    assert int((~kept).sum()) == round(0.6 * 72)
    assert float(flat[kept].min()) > float(flat[~kept].max())
    assert not small[0].weight[~masks["0.weight"]].any()


@pytest.mark.parametrize("options", [{"sparsity": 1}, {"sparsity": 0.5, "calibration_batches": 0}])
def test_bad_options_are_refused_when_given(options):
    with pytest.raises(OptionError, match=r"SNIP\("):
        SNIP(**options)
