"""GraSP: the authors' numbers, dense Hessians in float64, the identities that the scores obey, and what users get wrong."""

import logging
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lit import LitNet, loader, trainer
from torch import multiprocessing, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, embedding_bag, mse_loss

from lightning_prune import compress
from lightning_prune.callback import Task
from lightning_prune.curvature import hessian_gradient
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.methods.grasp import GraSP, flow_scores, loss_kind, official_masks, redraw, tempered
from lightning_prune.probe import Probe
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.steps import MaskWeight

REFERENCE = Path(__file__).parent.parent / "reference" / "grasp_bn_train_T200.npz"
EXACT = 1e-11  # float64: products of some hundred terms in another order


def error(found, expected):
    """The largest difference, as a share of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def joined(scores):
    return torch.cat([score.flatten() for score in (scores.values() if isinstance(scores, dict) else scores)])


def mlp(norm=False, bias=True):
    layers = [nn.Linear(5, 8, bias=bias), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Linear(8, 6)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(6, 4, bias=bias)).double()


def chunk(count=20):
    return torch.randn(count, 5, dtype=torch.float64), torch.randint(0, 4, (count,))


def names_of(model):
    return [name for name, p in model.named_parameters() if p.ndim >= 2]


def scores_of(model, chunks, temperature=1.0, scale=1.0):
    """Our scores of a model in the mode it is in, by name."""
    names = names_of(model)
    weights = [model.get_parameter(name) for name in names]
    products = hessian_gradient(lambda: (scale * cross_entropy(model(x) / temperature, y) for x, y in chunks), weights)
    return dict(zip(names, flow_scores(weights, products), strict=True))


def derivatives(model, chunks, names, temperature=1.0):
    """Gradient and Hessian of the summed loss by the named parameters, as a vector and a matrix, by torch's own double loop."""
    sizes = [model.get_parameter(name).numel() for name in names]
    flat = torch.cat([model.get_parameter(name).detach().flatten() for name in names])

    def loss(vector):
        parts = zip(names, vector.split(sizes), strict=True)
        named = {name: part.view_as(model.get_parameter(name)) for name, part in parts}
        return sum(cross_entropy(functional_call(model, named, (x,)) / temperature, y) for x, y in chunks)

    gradient = torch.autograd.functional.jacobian(loss, flat)
    return flat, gradient, torch.autograd.functional.hessian(loss, flat)


def squared_gradient(model, chunks, names, removed, step):
    """The squared norm of the gradient after ``step`` times the weights in ``removed`` has been taken off."""
    moved = {name: (model.get_parameter(name) * (1 - step * removed[name])).detach().requires_grad_() for name in names}
    loss = sum(cross_entropy(functional_call(model, moved, (x,)), y) for x, y in chunks)
    return sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(moved.values())))


# What the scores are


@pytest.mark.parametrize("norm", [False, True])
def test_scores_equal_those_with_the_dense_hessian(norm):
    model, chunks = mlp(norm), [chunk(), chunk(14)]
    flat, gradient, hessian = derivatives(model, chunks, names_of(model), temperature=3.0)
    assert error(joined(scores_of(model, chunks, temperature=3.0)), flat * (hessian @ gradient)) < EXACT


def test_scores_are_the_slope_of_the_squared_gradient_against_removal():
    model, chunks = mlp(norm=True), [chunk()]
    scores = scores_of(model, chunks)
    step = 1e-5
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        removed = {name: torch.rand(s.shape, generator=generator).lt(0.3).double() for name, s in scores.items()}
        ahead, behind = (squared_gradient(model, chunks, list(scores), removed, sign * step) for sign in (1, -1))
        predicted = -2 * sum(float((scores[name] * removed[name]).sum()) for name in scores)
        assert (ahead - behind) / (2 * step) == pytest.approx(predicted, rel=1e-5)


def test_scores_of_a_normalized_filter_sum_to_minus_its_squared_gradient_and_in_eval_mode_do_not():
    model, chunks = mlp(norm=True), [chunk(), chunk()]
    model[1].eps = 1e-12
    _, gradient, _ = derivatives(model, chunks, ["0.weight"])
    expected = -gradient.view(8, 5).square().sum(1)
    assert error(scores_of(model, chunks)["0.weight"].sum(1), expected) < 1e-8
    assert error(scores_of(model.eval(), chunks)["0.weight"].sum(1), expected) > 1e-2


def test_incoming_and_outgoing_scores_of_a_hidden_unit_differ_by_their_squared_gradients():
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)).double()
    chunks = [chunk()]
    removal = {name: -score for name, score in scores_of(model, chunks).items()}
    _, gradient, _ = derivatives(model, chunks, ["0.weight", "2.weight"])
    into, out = gradient[:40].view(8, 5), gradient[40:].view(4, 8)
    left = removal["0.weight"].sum(1) - into.square().sum(1)
    right = removal["2.weight"].sum(0) - out.square().sum(0)
    assert error(left, right) < EXACT
    assert error(removal["0.weight"].sum(1), removal["2.weight"].sum(0)) > 1e-2  # not conserved


def test_a_factor_of_the_loss_and_the_number_of_chunks_enter_squared():
    model, (x, y) = mlp(), chunk(20)
    whole = joined(scores_of(model, [(x, y)]))
    assert error(joined(scores_of(model, [(x, y)], scale=7.0)), 49 * whole) < EXACT
    quarters = list(zip(x.chunk(4), y.chunk(4), strict=True))
    assert error(joined(scores_of(model, quarters)), 16 * whole) < EXACT


def ranks(values):
    return values.argsort().argsort().double()


def test_scores_times_the_squared_temperature_converge_and_their_ranking_with_them():
    model, chunks = mlp(), [chunk(60)]
    scores = {t: joined(scores_of(model, chunks, temperature=float(t))) * t**2 for t in (1, 200, 10_000, 100_000)}
    assert error(scores[10_000], scores[100_000]) < 1e-3
    limit = ranks(scores[100_000])
    agreement = {t: float(torch.corrcoef(torch.stack([ranks(s), limit]))[0, 1]) for t, s in scores.items()}
    assert agreement[200] > 0.999
    assert agreement[1] < 0.99


def test_gradients_of_biases_and_norms_do_not_enter():
    model, chunks = mlp(norm=True), [chunk()]
    names = names_of(model)
    others = [name for name, _ in model.named_parameters() if name not in names]
    flat, gradient, hessian = derivatives(model, chunks, [*names, *others])
    with_all = (flat * (hessian @ gradient))[: sum(model.get_parameter(name).numel() for name in names)]
    assert error(joined(scores_of(model, chunks)), with_all) > 1e-2


def test_permuting_hidden_units_permutes_the_scores():
    model, chunks = mlp(norm=True), [chunk()]
    before = scores_of(model, chunks)
    order = torch.randperm(8)
    with torch.no_grad():
        for tensor in (*model[0].parameters(), *model[1].parameters()):
            tensor.copy_(tensor[order])
        model[3].weight.copy_(model[3].weight[:, order])
    after = scores_of(model, chunks)
    assert error(after["0.weight"], before["0.weight"][order]) < EXACT
    assert error(after["3.weight"], before["3.weight"][:, order]) < EXACT
    assert error(after["5.weight"], before["5.weight"]) < EXACT


def test_a_weight_of_zero_and_the_weights_of_a_dead_unit_score_zero():
    model, chunks = mlp(), [chunk()]
    with torch.no_grad():
        model[0].weight[0, 1] = 0
        model[0].bias[3] = -100.0  # the ReLU behind it never opens
    scores = scores_of(model, chunks)
    assert scores["0.weight"][0, 1] == 0
    assert not scores["0.weight"][3].any()
    assert not scores["3.weight"][:, 3].any()
    assert scores["0.weight"][0, 0] != 0


# The authors' numbers


class Reference(nn.Module):
    """The network of the reference file."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x))).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE) as file:
        return {key.removeprefix("bn_train_T200/"): torch.from_numpy(file[key]) for key in file if key != "layers"}


def reference_task(reference, dtype=torch.float32):
    model = Reference()
    model.load_state_dict({k.removeprefix("state/"): v for k, v in reference.items() if k.startswith("state/")})
    chunks = [(reference[f"chunk{i}/x"].to(dtype), reference[f"chunk{i}/y"]) for i in (0, 1)]
    return task_of(model.to(dtype), chunks)


def task_of(model, data, loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]), **probe):
    found = Probe.of_data(model, data, loss)
    if probe:
        found = Probe(model, data, lambda batch, _index: loss(model, batch), **probe)
    return Task.of(model, found, as_calls(data[0][0]))


def everything(task):
    names = [name for name, p in task.model.named_parameters() if p.ndim >= 2]
    weights = {name: task.model.get_parameter(name) for name in names}
    return weights, {name: torch.ones(w.shape, dtype=torch.bool) for name, w in weights.items()}


def score(task, **options):
    """The scores of the callback, by name."""
    return GraSP(sparsity=0.5, **options).score_weights(task, *everything(task))


@pytest.mark.parametrize(
    ("dtype", "key", "tolerance"),
    [(torch.float64, "score_f64", 1e-6), (torch.float32, "score_f64", 1e-6), (torch.float32, "score_raw", 1e-6)],
)
@pytest.mark.parametrize("mode", [True, False])
def test_scores_agree_with_the_authors(reference, dtype, key, tolerance, mode):
    task = reference_task(reference, dtype)
    task.model.train(mode)  # batch statistics are used either way
    scores = score(task, logits_module="fc2")
    theirs = {name: -reference[f"{key}/{name.removesuffix('.weight')}"].double() for name in scores}
    largest = max(float(t.abs().max()) for t in theirs.values())
    assert max(float((scores[name] - theirs[name]).abs().max()) for name in scores) <= tolerance * largest


def test_masks_of_the_official_rule_equal_the_authors(reference):
    task = reference_task(reference)
    weights, kept = everything(task)
    for sparsity in reference["ratios"].tolist():
        method = GraSP(sparsity=sparsity, rule="official", logits_module="fc2")
        masks = method.choose_weights(task, weights, kept, 0)
        for name, mask in masks.items():
            assert torch.equal(mask, reference[f"mask_{sparsity}/{name.removesuffix('.weight')}"].bool()), sparsity


def test_the_exact_rule_removes_one_more_than_the_official_one_and_the_same_others(reference):
    task = reference_task(reference)
    weights, kept = everything(task)
    exact = joined(GraSP(sparsity=0.9, logits_module="fc2").choose_weights(task, weights, kept, 642))
    official = joined(
        GraSP(sparsity=0.9, logits_module="fc2", rule="official").choose_weights(task, weights, kept, 642)
    )
    assert int((~exact).sum()) == 642
    assert int((~official).sum()) == 641
    assert bool((official | ~exact).all())


def test_the_official_rule_keeps_ties_and_does_not_bring_back_what_is_gone():
    scores = {"a": torch.tensor([0.0, -3.0, 0.0, 2.0]), "b": torch.tensor([0.0, -1.0, 9.0, 9.0])}
    kept = {"a": torch.tensor([True] * 4), "b": torch.tensor([True, True, True, False])}
    flat = lambda sparsity: joined(official_masks(scores, kept, sparsity)).int().tolist()  # noqa: E731
    assert flat(0.0) == [1, 1, 1, 1, 1, 1, 1, 0]
    assert flat(0.4) == [1, 0, 1, 1, 1, 1, 1, 0]  # k = 3: b[3], a[1], and b[1] is the threshold, which stays
    assert flat(0.5) == [1, 0, 1, 1, 1, 0, 1, 0]  # k = 4: the threshold is 0
    assert flat(0.75) == [1, 0, 1, 1, 1, 0, 1, 0]  # k = 6: it is the last of three ties, all of which stay


# What the callback adds: temperature, chunks, precision, and an untouched model


def by_hand(model, chunks, temperature):
    twin = LitNet()
    twin.load_state_dict(model.state_dict())
    return joined(scores_of(twin.train(), chunks, temperature))


def fit(model, method, data=None, **options):
    options = {"max_steps": 0, "max_epochs": 1, **options}
    trainer("unused", callbacks=[method], **options).fit(model, data or loader(32, 16))
    return method


class Scores(GraSP):
    """Keeps its scores."""

    def score_weights(self, task, weights, kept):
        self.found = super().score_weights(task, weights, kept)
        return self.found


def test_in_a_fit_the_logits_are_divided_and_the_training_step_gives_the_loss():
    model = LitNet()
    expected = by_hand(model, list(loader(32, 16)), 200.0)
    found = fit(model, Scores(sparsity=0.5, logits_module="net.10", calibration_batches=2)).found
    assert error(joined(found), expected) < 1e-5


def divided_loss(module, batch, temperature):
    return cross_entropy(module(batch[0]) / temperature, batch[1])


@pytest.mark.parametrize("loss_fn", [divided_loss, f"{__name__}.divided_loss"])
def test_a_loss_of_its_own_is_given_the_temperature(loss_fn, reference):
    task = reference_task(reference)
    found = score(task, loss_fn=loss_fn, temperature=50.0)
    assert error(joined(found), joined(score(task, logits_module="fc2", temperature=50.0))) < 1e-6
    assert error(joined(found) * 16, joined(score(task, logits_module="fc2"))) > 1e-4


def test_without_a_place_for_the_temperature_it_is_1_and_a_message_says_so_once(caplog, reference):
    task = reference_task(reference)
    method = GraSP(sparsity=0.5)
    with caplog.at_level(logging.INFO):
        found = [joined(method.score_weights(task, *everything(task))) for _ in range(2)]
    said = [record.message for record in caplog.records if "temperature 1" in record.message]
    assert len(said) == 1
    assert "logits_module=" in said[0]
    caplog.clear()
    assert torch.equal(found[0], joined(score(task, temperature=1.0)))
    assert not caplog.records
    assert torch.equal(found[0], found[1])


def test_the_output_of_a_module_is_divided_inside_the_block_alone():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    with tempered(layer, 4.0):
        assert torch.equal(4 * layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("precision", ["half", "dropout", "frozen norm"])
def test_scoring_leaves_a_model_in_any_state_bit_for_bit(precision):
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
    model.eval() if precision == "half" else model.train()
    dtype = torch.bfloat16 if precision == "half" else torch.float32
    model.to(dtype)
    if precision == "frozen norm":
        model[1].eval()
    model[0].bias.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    task = task_of(model, [(x.to(dtype), y) for x, y in (chunk(), chunk())])

    def state():
        tensors = [*model.parameters(), *model.buffers()]
        values = [t.detach().clone() for t in tensors], [t.data_ptr() for t in tensors], [t.dtype for t in tensors]
        flags = [t.requires_grad for t in tensors], [m.training for m in model.modules()]
        return *values, *flags, model[4].weight.grad.clone(), torch.get_rng_state()

    before = state()
    for options in ({"reinit_head": "xavier_linear"}, {"hvp": "finite_difference"}):
        scores = score(task, logits_module="4", **options)
        assert all(s.isfinite().all() for s in scores.values())
    for old, new in zip(before, state(), strict=True):
        pairs = zip(old, new, strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_a_frozen_norm_keeps_its_running_statistics_and_others_use_those_of_the_chunk():
    model, data = mlp(norm=True).train(), [chunk()]
    model[1].running_mean.normal_()
    task = task_of(model, data)
    assert error(joined(score(task, temperature=1.0)), joined(scores_of(model, data))) < EXACT
    model[1].eval()
    frozen = joined(score(task, temperature=1.0))
    assert error(frozen, joined(scores_of(model, data))) < EXACT
    assert error(frozen, joined(scores_of(model.train(), data))) > 1e-2


def test_noise_in_the_users_code_is_the_same_in_all_passes():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.second(nn.functional.dropout(self.first(x).tanh(), 0.5, self.training))

    task = task_of(Noisy().double(), [chunk()])
    scores = joined(score(task, temperature=1.0))
    assert torch.equal(scores, joined(score(task, temperature=1.0)))
    assert error(joined(score(task, temperature=1.0, hvp="finite_difference")), scores) < 1e-4


def test_a_model_of_half_precision_is_masked_as_its_float32_copy():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)).bfloat16()
    twin = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    twin.load_state_dict(model.state_dict())
    x, y = torch.randn(20, 5).bfloat16(), torch.randint(0, 4, (20,))
    half, single = (
        score(task_of(model, [(x, y)]), temperature=1.0),
        score(task_of(twin, [(x.float(), y)]), temperature=1.0),
    )
    assert all(torch.equal(half[name], single[name]) for name in half)


def test_finite_differences_choose_almost_the_same_weights(reference):
    task = reference_task(reference)
    weights, kept = everything(task)
    masks = [
        joined(GraSP(sparsity=0.8, logits_module="fc2", hvp=hvp).choose_weights(task, weights, kept, 571))
        for hvp in ("exact", "finite_difference")
    ]
    assert [int((~mask).sum()) for mask in masks] == [571, 571]
    assert int((masks[0] != masks[1]).sum()) <= 0.01 * 714


def test_the_absolute_variant_removes_what_changes_the_flow_least(reference):
    task = reference_task(reference)
    plain, absolute = (joined(score(task, logits_module="fc2", absolute=a)) for a in (False, True))
    assert torch.equal(plain.abs(), absolute)
    assert float(plain.min()) < 0


def test_linear_layers_are_drawn_anew_for_scoring_by_xavier_and_a_fixed_seed():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Linear(400, 300), nn.Linear(300, 200))
    before = [p.detach().clone() for p in model.parameters()]
    kept = {p: torch.ones_like(p, dtype=torch.bool) for p in model.parameters() if p.ndim >= 2}
    kept[model[1].weight][0] = False
    redraw(model, kept, last=True)
    changed = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert changed == [False, False, False, False, True, False]
    redraw(model, kept)
    drawn = [model[1].weight.detach(), model[2].weight.detach()]
    assert not drawn[0][0].any()
    assert float(drawn[0][1:].std()) == pytest.approx((2 / 700) ** 0.5, rel=0.02)
    assert float(drawn[1].std()) == pytest.approx((2 / 500) ** 0.5, rel=0.02)
    redraw(model, kept)
    assert torch.equal(drawn[1], model[2].weight)


@pytest.mark.parametrize(("choice", "redrawn"), [("xavier_linear", ["fc1", "fc2"]), ("xavier_last", ["fc2"])])
def test_scores_after_a_redraw_are_those_of_a_model_with_the_new_weights(reference, choice, redrawn):
    task, twin = reference_task(reference), reference_task(reference)
    layers = {twin.model.get_submodule(name).weight: torch.ones(1, dtype=torch.bool) for name in redrawn}
    redraw(twin.model, layers)
    found = score(task, logits_module="fc2", reinit_head=choice)
    assert torch.equal(joined(found), joined(score(twin, logits_module="fc2")))
    assert error(joined(found), joined(score(task, logits_module="fc2"))) > 1e-3


def test_two_runs_give_identical_masks_of_exactly_the_share_and_none_at_zero():
    data = [(x.float(), y) for x, y in (chunk(), chunk())]
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))
    loss = lambda model, batch: cross_entropy(model(batch[0]), batch[1])  # noqa: E731

    def masks(sparsity):
        method = GraSP(sparsity=sparsity, logits_module="4", remove_dead=False)
        _, plan = compress(model, method, data[0][0], data=data, loss=loss)
        return {step.key: step.mask for step in plan.steps if isinstance(step, MaskWeight)}

    first, second = masks(0.7), masks(0.7)
    assert {key: mask.tolist() for key, mask in first.items()} == {key: m.tolist() for key, m in second.items()}
    assert sum(int((~mask).sum()) for mask in first.values()) == round(0.7 * 72)
    assert masks(0.0) == {}


def test_classes_are_balanced_where_labels_are_known(monkeypatch):
    model = LitNet()
    data = loader(64, 16)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    chosen = torch.cat([(y == label).nonzero().flatten()[:5] for label in range(4)])
    chunks = [(x[part], y[part]) for part in chosen.split(10)]
    expected = by_hand(model, chunks, 200.0)
    method = Scores(sparsity=0.5, logits_module="net.10", targets=1, samples_per_class=5)
    assert error(joined(fit(model, method, loader(64, 16)).found), expected) < 1e-5


# Two processes


def rank_scores(rank, folder, model, data):
    """Score one rank's share of the chunks and save what came out and how many collectives it took."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sizes = []

    def mean(tensor):
        sizes.append(tensor.numel())
        dist.all_reduce(tensor)
        return tensor / 2

    task = task_of(model, data[rank], reduce=lambda tensor, _how: mean(tensor))
    scores = score(task, temperature=5.0, logits_module="5", calibration_batches=9)
    torch.save((scores, sizes), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_on_the_union_with_exactly_two_collectives(tmp_path):
    model, chunks = mlp(), [chunk(), chunk(9), chunk(14)]
    shares = [chunks[:2], chunks[2:]]  # of unequal number
    ranks = [
        multiprocessing.get_context("fork").Process(target=rank_scores, args=(r, tmp_path, model, shares))
        for r in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    alone = score(task_of(model, chunks), temperature=5.0, logits_module="5", calibration_batches=9)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first[1] == second[1] == [sum(s.numel() for s in alone.values())] * 2
    assert error(4 * joined(first[0]), joined(alone)) < EXACT  # means, not sums, of gradient and product
    assert all(torch.equal(first[0][name], second[0][name]) for name in alone)
    for sparsity in (0.3, 0.9):
        k = [joined(scores).argsort()[: round(sparsity * 112)].sort().values for scores in (first[0], alone)]
        assert torch.equal(*k)


# What users get wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"samples_per_class": 0}, "samples_per_class=0"),
        ({"calibration_batches": 0}, "calibration_batches=0"),
        ({"num_classes": 1, "targets": 1}, "num_classes=1"),
        ({"num_classes": 10}, "needs targets"),
        ({"reinit_head": "xavier"}, "reinit_head='xavier'"),
        ({"hvp": "fast"}, "hvp='fast'"),
        ({"absolute": 1}, "absolute=1"),
        ({"rule": "theirs"}, "rule='theirs'"),
        ({"logits_module": 3}, "logits_module=3"),
        ({"logits_module": "head", "loss_fn": divided_loss}, "not both"),
        ({"loss_fn": 3}, "loss_fn=3"),
        ({"targets": 0.5}, "targets=0.5"),
        ({"rule": "official", "until_epoch": 3}, "leave out until_epoch"),
        ({"rule": "official", "scope": "uniform"}, "leave out"),
    ],
)
def test_bad_options_are_refused_when_given(options, message):
    with pytest.raises(OptionError, match=message):
        GraSP(**{"sparsity": 0.5, **options})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"logits_module": "head"}, OptionError, "logits_module='head'.*named_modules"),
        ({"loss_fn": "no.such.function"}, OptionError, "loss_fn='no.such.function'"),
        ({"loss_fn": "torch.pi"}, OptionError, "is a float"),
        ({"loss_fn": lambda *_: None}, ModelError, "returned no scalar"),
        ({"targets": 2}, ModelError, "targets=2.*tuple without such an entry"),
        ({"targets": "label"}, ModelError, "targets='label'"),
        ({"targets": 0}, ModelError, "Labels must be a tensor of integers"),
        ({"targets": 1, "num_classes": 3}, ModelError, "Label 3 is no class"),
        ({"targets": 1, "num_classes": 6}, ModelError, "class 4 has 0, class 5 has 0"),
        ({"targets": 1, "samples_per_class": 500}, ModelError, "class 0 has .*class 3 has"),
    ],
)
def test_what_the_model_or_the_data_do_not_have_is_named(options, kind, message):
    data = [(torch.randn(12, 5), torch.arange(12) % 4) for _ in range(4)]
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    with pytest.raises(kind, match=message):
        score(task_of(model, data), **options)


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.head = nn.Linear(5, 6), nn.Linear(6, 1)

    def forward(self, x):
        return self.head(self.gate(x).sigmoid() * self.gate(x).softmax(1))


@pytest.mark.parametrize("where", [{}, {"logits_module": "head"}])
@pytest.mark.parametrize("loss", [mse_loss, nn.functional.l1_loss, nn.functional.huber_loss])
def test_a_temperature_for_regression_is_refused_and_1_is_not(where, loss):
    data = [(torch.randn(12, 5), torch.randn(12, 1))]
    task = task_of(Regression(), data, lambda model, batch: 0.5 * loss(model(batch[0]), batch[1]))
    with pytest.raises(ModelError, match=r"temperature=200.0.*regression.*temperature=1"):
        score(task, **where)
    assert joined(score(task, temperature=1.0, **where)).any()
    assert joined(score(task, loss_fn=lambda model, batch, t: loss(model(batch[0]) / t, batch[1]))).any()


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: (z - y).square().mean(),
        lambda z, y: nn.functional.gaussian_nll_loss(z, y, torch.ones(12, 1)),
        nn.functional.poisson_nll_loss,
    ],
    ids=["by hand", "gaussian", "poisson"],
)
def test_a_temperature_for_a_loss_of_unknown_kind_is_one_warning(loss, caplog):
    data = [(torch.randn(12, 5), torch.rand(12, 1))] * 2
    task = task_of(Regression(), data, lambda model, batch: loss(model(batch[0]), batch[1]))

    def told(method):
        caplog.clear()
        for _ in range(2):
            method.score_weights(task, *everything(task))
        return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    (line,) = told(GraSP(sparsity=0.5, logits_module="head"))
    assert line.startswith("GraSP(temperature=200.0): whether the loss of Regression is one of")
    assert "regression needs temperature=1" in line
    assert not told(GraSP(sparsity=0.5, logits_module="head", temperature=1.0))
    assert not told(GraSP(sparsity=0.5))  # where it is not applied


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (lambda z: cross_entropy(z, torch.tensor([0, 1])) + 0.1 * z.abs().sum(), "classification"),
        (lambda z: nn.functional.binary_cross_entropy_with_logits(z, torch.ones(2, 3)), "classification"),
        (lambda z: mse_loss(z.softmax(1), torch.ones(2, 3)), "regression"),
        (lambda z: z.logsumexp(1).mean(), "classification"),
        (lambda z: z.prod(), None),
        (lambda z: cross_entropy(z, torch.tensor([0, 1])) + mse_loss(z, torch.ones(2, 3)), "classification"),
        (lambda z: mse_loss(z, torch.ones(2, 3)) + cross_entropy(z, torch.tensor([0, 1])), "classification"),
        (
            lambda z: ((z.sigmoid() @ torch.ones(3, 1)) - 1).square().mean(),
            None,
        ),  # what is in the network tells nothing
    ],
)
def test_the_operation_nearest_to_the_loss_tells_its_kind(loss, kind):
    assert loss_kind(loss(torch.randn(2, 3, requires_grad=True))) == kind


def test_logits_that_the_loss_does_not_use_are_an_error():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    task = task_of(model, [(torch.randn(12, 5), torch.arange(12) % 4)])
    model.add_module("unused", nn.Identity())
    model.forward = lambda x: model[2](model[1](model[0](x)))
    with pytest.raises(ModelError, match="does not call"):
        score(task, logits_module="unused")


def test_logits_that_are_no_tensor_are_an_error():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Pair(5, 4)

        def forward(self, x):
            return self.head(x)[0]

    model = Net()
    with pytest.raises(ModelError, match="Pair that returns a tuple"), tempered(model.head, 2.0):
        model(torch.randn(12, 5))


def test_a_model_without_prunable_weights_is_an_error():
    class Lit(LitNet):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.AdaptiveAvgPool1d(4))

    with pytest.raises(ModelError, match="GraSP would change nothing"):
        fit(Lit(), GraSP(sparsity=0.5))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(7, 5)), nn.Linear(5, 4)

    def forward(self, tokens):
        return self.head(embedding_bag(tokens, self.table))


def test_an_operation_without_second_derivative_is_named_and_differences_work():
    task = task_of(Bag(), [(torch.randint(0, 7, (12, 3)), torch.arange(12) % 4)])
    with pytest.raises(ModelError, match=r"embedding_bag.*hvp='finite_difference'"):
        score(task, logits_module="head")
    assert joined(score(task, logits_module="head", hvp="finite_difference")).any()


class Manual(LitNet):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_a_module_that_optimizes_manually_needs_a_loss_of_its_own():
    with pytest.raises(ModelError, match=r"optimizes manually.*loss_fn="):
        fit(Manual(), GraSP(sparsity=0.5))
    model = Manual()
    fit(model, GraSP(sparsity=0.5, loss_fn=divided_loss))
    assert sum(int((p == 0).sum()) for p in model.parameters()) > 0


def test_data_without_a_batch_is_an_error():
    task = task_of(nn.Linear(5, 4), [(torch.randn(12, 5), torch.arange(12) % 4)])
    task.probe.data = []
    for options in ({}, {"targets": 1}):
        with pytest.raises(ModelError, match="data"):
            score(task, **options)


def test_a_loss_that_overflows_is_an_error():
    data = [(torch.full((12, 5), 1e30), torch.arange(12) % 4)]
    task = task_of(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)), data)
    with pytest.raises(ModelError, match="not finite"):
        GraSP(sparsity=0.5, temperature=1.0).choose_weights(task, *everything(task), 5)


def test_a_fit_trains_on_with_masked_weights_at_zero():
    pl.seed_everything(0, verbose=False)
    model = LitNet()
    fit(model, GraSP(sparsity=0.8, logits_module="net.10", remove_dead=False), max_steps=-1, max_epochs=2)
    weights = [p for p in model.parameters() if p.ndim >= 2]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert zeros == round(0.8 * total)
