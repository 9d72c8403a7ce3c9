"""OBD and OBS of filters: against whole Fisher matrices by loops; updates as minima of quadratic forms; gradually; what is left alone."""

import itertools
import logging

import lit
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import BasicBlock, LSTMClassifier
from torch import nn

from lightning_prune import Magnitude, OptimalBrain, compress
from lightning_prune.callback.fisher import Fisher
from lightning_prune.callback.task import Task
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.methods.optimal_brain import inverse
from lightning_prune.probe import Probe
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.steps import AddToWeight, KeepChannels

RULES = ["c-obd", "c-obs", "kron-obd", "kron-obs"]
EPS = 0.05


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def network(groups=1):
    torch.manual_seed(3)
    layers = [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 6, (3, 2), groups=groups), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3)).double()


def batches(count=2):
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(4, 2, 7, 7, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (4,), generator=generator),
        )
        for _ in range(count)
    ]


def brain(rule, official=False, **options):
    return OptimalBrain(
        rule=rule, official=official, damping=EPS, fisher="empirical", align=1, **({"sparsity": 0.4} | options)
    )


def scores(model, method, data):
    task = Task.of(model, Probe.of_data(model, data, loss_of), as_calls(data[0][0]))
    found = method.removal.look(task)
    return task, found, method.removal.score(task, found, (), 1.0)


def seen(model, name, data):
    """Of every sample what a convolution reads, by position, and the gradients there."""
    layer, place = model.get_submodule(name), int(name)
    for x, y in ((x, y) for xs, ys in data for x, y in zip(xs, ys, strict=True)):
        a = model[:place](x[None]).detach()
        out = layer(a).detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model[place + 1 :](out), y[None]), out)
        a = F.pad(a, [p for p in reversed(layer.padding) for _ in (0, 1)])[0].numpy()
        patches = []
        for row, column in np.ndindex(*out.shape[2:]):
            r, c = row * layer.stride[0], column * layer.stride[1]
            patches.append(a[:, r : r + layer.kernel_size[0], c : c + layer.kernel_size[1]])
        yield patches, g[0].flatten(1).T.numpy()


def blocks(model, name, data):
    """Weight with bias, A and S of every group of a convolution, by loops."""
    layer, samples = model.get_submodule(name), list(seen(model, name, data))
    weight = np.column_stack([layer.weight.detach().flatten(1).numpy(), layer.bias.detach().numpy()])
    size, width = len(weight) // layer.groups, layer.weight.shape[1]
    for group in range(layer.groups):
        rows, columns = slice(group * size, (group + 1) * size), slice(group * width, (group + 1) * width)
        a = s = positions = 0
        for patch, g in (pair for sample in samples for pair in zip(*sample, strict=True)):
            vector = np.append(patch[columns].ravel(), 1.0)
            a, s, positions = a + np.outer(vector, vector), s + np.outer(g[rows], g[rows]), positions + 1
        yield rows, weight[rows], a / positions, s / len(samples)


def damped(factor, official):
    if official:
        values, vectors = np.linalg.eigh(factor)
        return vectors @ np.diag(np.where(values > 1e-15, values, 0) + 1e-10) @ vectors.T
    return factor + EPS * np.trace(factor) / len(factor) * np.eye(len(factor))


def diagonal(model, name, data):
    """Mean square of the gradients of single samples, by autograd."""
    weight = model.get_submodule(name).weight
    squares = [
        torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), weight)[0].square()
        for xs, ys in data
        for x, y in zip(xs, ys, strict=True)
    ]
    return torch.stack(squares).mean(0)


def twin(rule, official, model, name, data):
    """Importances of the rows of a convolution, from the whole matrix S (x) A."""
    if rule == "c-obd":
        weight = model.get_submodule(name).weight.detach()
        return (weight**2 * (diagonal(model, name, data) + 1e-10 * official)).sum((1, 2, 3)).numpy()
    found = []
    for _, w, a, s in blocks(model, name, data):
        whole, size = np.kron(s, a), w.shape[1]
        for i in range(len(w)):
            own = np.arange(i * size, (i + 1) * size)
            change = np.zeros(w.size)
            change[own] = -w[i]
            if rule == "c-obs":
                back = np.linalg.inv(np.kron(damped(s, official), damped(a, official)))
                found.append(sum(w[i, j] ** 2 / back[q, q] for j, q in enumerate(own)))
            elif official:
                squared = sum(w[i, j] ** 2 * a[j, k] for j in range(size) for k in range(size))
                found.append(
                    squared * s[i, i] if rule == "kron-obd" else squared / np.linalg.inv(damped(s, True))[i, i]
                )
            elif rule == "kron-obd":
                found.append(change @ whole @ change)
            else:  # the least over all changes of the other rows
                whole, others = np.kron(damped(s, False), a), np.setdiff1d(np.arange(w.size), own)
                change[others] = (
                    -np.linalg.pinv(whole[np.ix_(others, others)]) @ whole[np.ix_(others, own)] @ change[own]
                )
                found.append(change @ whole @ change)
    return np.array(found)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_importances_are_those_of_the_whole_fisher_matrix(rule, official, groups):
    model, data = network(groups), batches()
    _, found, own = scores(model, brain(rule, official), data)
    expected = np.zeros(found.count)
    for name in ("0", "2"):  # of a grouped convolution whole groups leave, with what they read
        np.add.at(expected, found.by_tensor[f"{name}.weight"][0].units, twin(rule, official, model, name, data))
    np.testing.assert_allclose(own.values, expected, rtol=1e-6)
    assert found.count == (10 if groups == 1 else 2)


def changed(w, a, s, gone, rule, official):
    """A weight after the update: by single weights or rows, or as the minimum of the quadratic form over what stays."""
    w = w.copy()
    if rule == "c-obs":
        back, before = np.linalg.inv(np.kron(damped(s, official), damped(a, official))), w.ravel().copy()
        for i in np.flatnonzero(gone):
            for q in range(i * w.shape[1], (i + 1) * w.shape[1]):
                w -= (before[q] / back[q, q] * back[:, q]).reshape(w.shape)
    elif official:
        back, before = np.linalg.inv(damped(s, True)), w.copy()
        for i in np.flatnonzero(gone):
            w -= np.outer(back[:, i], before[i]) / back[i, i]
    else:  # d/dW_K of tr(dW^T S dW A) is zero where S_KK dW_K = S_KP W_P
        d = damped(s, False)
        w[~gone] += np.linalg.solve(d[~gone][:, ~gone], d[~gone][:, gone] @ w[gone])
        w[gone] = 0
    return w


SURGEONS = [(rule, official) for rule in ("c-obs", "kron-obs") for official in (False, True)]


@pytest.mark.parametrize(("rule", "official"), SURGEONS)
def test_what_stays_makes_up_for_what_leaves(rule, official):
    model, data = network(), batches()
    small, plan = compress(
        model, brain(rule, official, sparsity={"0": 0.5, "2": 0.34}), data[0][0], data=data, loss=loss_of
    )
    cuts = {step.module: step for step in plan.steps if isinstance(step, KeepChannels)}
    columns = np.ones(2, bool)
    for name in ("0", "2"):
        kept = cuts[name].tensors["weight"].kept(0).numpy()
        assert (~kept).sum() > 1
        ((_, w, a, s),) = blocks(model, name, data)
        expected, layer = changed(w, a, s, ~kept, rule, official)[kept], small.get_submodule(name)
        weight = expected[:, :-1].reshape(len(expected), len(columns), *layer.kernel_size)[:, columns]
        np.testing.assert_allclose(layer.weight.detach(), weight, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(layer.bias.detach(), expected[:, -1], rtol=1e-6, atol=1e-9)
        columns = kept
    assert not any(
        step.once or step.to_dict().get("values") for step in plan.steps
    )  # the model carries no weights twice


@pytest.mark.parametrize(("rule", "official"), SURGEONS)
def test_groups_and_masked_rows_have_updates_of_their_own(rule, official):
    model, data = network(groups=2), batches()
    method = brain(rule, official)
    task, found, _ = scores(model, method, data)
    method.removal.score_units(task, found, np.ones(found.count, bool))
    stays, leaving = torch.tensor([0, 1, 1, 1, 1, 1]).bool(), torch.tensor([0, 1, 0, 0, 0, 1]).bool()
    change = method.update("2", model[2], method.factors["2"], leaving, stays)
    expected = np.zeros((6, 13))
    for rows, w, a, s in blocks(model, "2", data):
        here, gone = stays[rows].numpy(), leaving[rows].numpy()
        own = np.flatnonzero(here)
        expected[rows.start + own] = changed(w[own], a, s[own][:, own], gone[own], rule, official) - w[own]
    np.testing.assert_allclose(change["weight"].flatten(1), expected[:, :-1], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(change["bias"], expected[:, -1], rtol=1e-6, atol=1e-9)
    assert not change["weight"][0].any()


def test_a_channel_that_others_can_stand_in_for_leaves_without_a_trace_and_several_only_jointly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 1)).double()
    nn.init.ones_(model[1].weight)  # the output is the sum of the rows: what one says any other can say
    x = torch.randn(64, 5, dtype=torch.float64)
    data, dense = [(x, torch.randn(64, 1, dtype=torch.float64))], model(x).detach()
    error = {}
    for name, options in {
        "joint": {},
        "single": {"official": True},
        "one": {"official": True, "sparsity": 0.16},
        "obd": {"rule": "kron-obd"},
    }.items():
        method = OptimalBrain(
            **({"rule": "kron-obs", "sparsity": 0.5, "damping": 1e-8, "align": 1, "fisher": "empirical"} | options)
        )
        small, _ = compress(
            model, method, x, data=data, loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1])
        )
        error[name] = float((small(x).detach() - dense).norm() / dense.norm())
    assert error["joint"] < 1e-6
    assert error["one"] < 1e-6
    assert min(error["single"], error["obd"]) > 0.05


def test_a_channel_of_a_residual_stream_counts_the_rows_of_all_layers_that_write_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), BasicBlock(6, 6, 1), nn.Flatten(), nn.Linear(6 * 16, 4))
    model = model.double().eval()
    data = [(torch.randn(8, 3, 4, 4, dtype=torch.float64), torch.arange(8) % 4)]
    values, inverses = {}, {}
    for rule in RULES:
        task, found, own = scores(model, brain(rule), data)
        stream = found.by_tensor["0.weight"][0].units
        assert (stream == found.by_tensor["1.conv2.weight"][0].units).all()
        values[rule] = own.values[stream]
    layers = {name: model.get_submodule(name) for name in ("0", "1.conv2")}
    factors = Fisher.of(brain("kron-obd"), task.model).factors(task, layers, patches=True, homogeneous=True)
    expected = dict.fromkeys(RULES, 0)
    for name, layer in layers.items():
        w, a, s = layer.weight.detach().flatten(1), factors[name].inputs[0], factors[name].outputs[0]
        w = w if layer.bias is None else torch.cat([w, layer.bias.detach()[:, None]], 1)
        inverses = {"a": torch.from_numpy(np.linalg.inv(damped(a.numpy(), False))).diagonal()}
        inverses["s"] = torch.from_numpy(np.linalg.inv(damped(s.numpy(), False))).diagonal()
        energies = torch.einsum("ij,jk,ik->i", w, a, w)
        expected["kron-obd"] += energies * s.diagonal()
        expected["kron-obs"] += energies / inverses["s"]
        expected["c-obs"] += (w**2 / inverses["a"]).sum(1) / inverses["s"]
        expected["c-obd"] += (layer.weight.detach() ** 2 * diagonal(model, name, data)).sum((1, 2, 3))
    for rule, own in expected.items():
        np.testing.assert_allclose(values[rule], own, rtol=1e-8, err_msg=rule)


def test_entries_that_a_stage_before_has_masked_stay_at_zero():
    torch.manual_seed(0)
    model, data = lit.body().eval(), [next(iter(lit.loader()))]
    sparse, _ = compress(model, Magnitude(sparsity=0.5, remove_dead=False), data[0][0])
    small, plan = compress(sparse, brain("kron-obs"), data[0][0], data=data, loss=loss_of)
    assert any(isinstance(step, AddToWeight) for step in plan.steps)
    share = float((small[8].weight == 0).float().mean())
    assert small[8].weight.shape[0] < 32
    assert share > 0.3


def test_a_gradual_run_masks_updates_and_shrinks_to_what_was_trained(tmp_path):
    torch.manual_seed(0)
    widths, held = [], []

    class Watch(lit.pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            zero = module.net[0].weight.flatten(1).eq(0).all(1)
            held.append(zero & module.net[0].bias.eq(0))
            widths.append(int(held[-1].sum()))

    model, method = lit.LitNet(norm=False), brain("kron-obs", flops=0.5, sparsity=None, until_epoch=3)
    lit.trainer(tmp_path, max_epochs=3, callbacks=[method, Watch()]).fit(model, lit.loader())
    assert widths == sorted(widths)
    assert all(bool((after | ~before).all()) for before, after in itertools.pairwise(held))
    assert 0 < widths[-1] == 16 - model.net[0].out_channels
    assert not method.factors


def test_what_other_layers_write_stays_and_says_why():
    data = [(torch.randint(0, 11, (4, 7)), torch.arange(4) % 3)]
    with pytest.raises(
        ModelError, match=r"lstm: .*'lstm\.weight_ih_l0' writes them.*no weight of a plain linear layer"
    ):
        compress(LSTMClassifier(), brain("kron-obd"), data[0][0], data=data, loss=loss_of)
    shared = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    shared[4].weight = shared[2].weight
    x = torch.randn(4, 4)
    with pytest.raises(ModelError, match="'2', which writes them, is tied"):
        compress(shared, brain("kron-obd"), x, data=[(x, torch.arange(4) % 3)], loss=loss_of)


@pytest.mark.parametrize("rule", RULES)
def test_a_model_that_is_certain_is_told_and_one_that_has_diverged_refused(rule, caplog):
    model, data = network(), batches()
    with torch.no_grad():
        model[5].weight.zero_()
    with caplog.at_level(logging.WARNING):
        small, _ = compress(model, brain(rule), data[0][0], data=data, loss=loss_of)
    assert "the loss does not depend on '0', '2'" in caplog.text
    assert all(p.isfinite().all() for p in small.parameters())
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        compress(model, brain(rule), data[0][0], data=data, loss=loss_of)


def test_a_factor_that_cannot_be_inverted_asks_for_more_damping():
    broken = torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64))
    with pytest.raises(ModelError, match=r"damping=0.001\. Give more"):
        inverse(broken, 1e-3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rule": "obd"}, "rule='obd'"),
        ({"official": 1}, "official=1"),
        ({"damping": 0}, "damping=0"),
        ({"damping": float("nan")}, "damping=nan"),
        ({"damping": "1"}, "damping='1'"),
        ({"fisher": "true"}, "fisher='true'"),
        ({"distribution": "poisson"}, "distribution='poisson'"),
        ({"logits_module": 3}, "logits_module=3"),
        ({"loss_fn": 3}, "loss_fn=3"),
        ({"calibration_batches": 0}, "calibration_batches=0"),
        ({"seed": -1}, "seed=-1"),
        ({"flops": 0.5, "params": 0.5}, "flops"),
    ],
)
def test_arguments_out_of_range_are_refused(options, match):
    with pytest.raises(OptionError, match=match):
        OptimalBrain(**({"flops": 0.5} | options))


@pytest.mark.parametrize("rule", RULES)
def test_hidden_units_of_linear_layers_leave_by_every_rule(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    data = [(torch.randn(8, 6), torch.arange(8) % 3) for _ in range(2)]
    small, _ = compress(model, OptimalBrain(rule, flops=0.5, align=1), data[0][0], data=data, loss=loss_of)
    assert small[0].out_features == small[2].in_features == 8
    if rule == "c-obd":  # the scores are sums of squared weights times squared gradients of samples, by a loop
        squares = torch.zeros(16, 6)
        for x, _ in data:
            for sample in x:
                share = model(sample[None]).softmax(1).detach()
                for label, p in enumerate(share[0]):  # the exact expectation over what is drawn
                    loss = F.cross_entropy(model(sample[None]), torch.tensor([label]))
                    squares += p * torch.autograd.grad(loss, model[0].weight)[0].square() / 16
        expected = (model[0].weight.detach().square() * squares).sum(1)
        many = OptimalBrain(rule, flops=0.5, align=1, calibration_batches=400)
        task = Task.of(model, Probe.of_data(model, data * 200, loss_of), as_calls(data[0][0]))
        found = many.removal.look(task)
        scores = many.removal.score(task, found, (), 1.0)
        units = found.by_tensor["0.weight"][0].units
        torch.testing.assert_close(torch.from_numpy(scores.values[units]).float(), expected, rtol=0.1, atol=1e-3)
