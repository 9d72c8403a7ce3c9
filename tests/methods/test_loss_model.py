"""Loss modelling: its formulas on a quadratic loss, whole runs against a twin in float64 that loops over samples, what a user may do wrong."""

import itertools
import multiprocessing

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lit import LitNet, loader, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.callback import Task, compress
from lightning_prune.curvature.diagonal import GaussNewton, exact_cotangents
from lightning_prune.curvature.products import recorded
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.methods import loss_model
from lightning_prune.methods.loss_model import LossModel, keep_scores, removals
from lightning_prune.probe import Probe
from lightning_prune.structure.calls import as_calls


def net(norm=False):
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Tanh(), nn.AvgPool2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 4))


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(model, batches, steps=60):
    model.double().train()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batches[step % len(batches)]).backward()
        optimizer.step()
    return model


def batches_of(sizes=(8, 8, 3), seed=0):
    points = next(iter(loader(sum(sizes), sum(sizes), seed)))
    return list(zip(points[0].double().split(sizes), points[1].split(sizes), strict=True))


BATCHES = batches_of()


@pytest.fixture
def model():
    return trained(net(), BATCHES)


def weights_of(model):
    return {name: p for name, p in model.named_parameters() if p.ndim >= 2}


def chosen(method, model, data=BATCHES, loss=loss_of, count=None, mean=None):
    """Return which weights stay, by the method alone: no Trainer, no removal of dead units."""
    probe = Probe.of_data(model, data, loss)
    if mean is not None:
        probe.mean = mean
    task = Task.of(model, probe, as_calls(data[0][0][:2]))
    weights = weights_of(model)
    kept = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    return method.choose_weights(task, weights, kept, round(method.sparsity * total) if count is None else count)


def removed(kept):
    return sum(int((~mask).sum()) for mask in kept.values())


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


def by_hand(model, order, sparsity, steps, locality=0.0):
    """Loop over rounds and samples; the curvature as p (1 - p) products of the Jacobian of the logits."""
    model.eval()
    weights = list(weights_of(model).values())
    original = [w.detach().clone() for w in weights]
    entries = sum(w.numel() for w in weights)
    stays = torch.ones(entries, dtype=torch.bool)
    samples = [(x[n : n + 1], y[n : n + 1]) for x, y in BATCHES for n in range(len(x))]
    for i in range(1, steps + 1):
        with torch.no_grad():
            for w, value, mask in zip(weights, original, stays.split([w.numel() for w in weights]), strict=True):
                w.copy_(value * mask.view_as(w))
        g, diagonal = torch.zeros(entries).double(), torch.zeros(entries).double()
        for x, y in samples:
            z = model(x)
            loss = F.cross_entropy(z, y)
            g += torch.cat([t.flatten() for t in torch.autograd.grad(loss, weights, retain_graph=True)]) / len(samples)
            rows = [torch.autograd.grad(value, weights, retain_graph=True) for value in z[0]]
            jacobian = torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])
            p = z[0].softmax(0).detach()
            diagonal += ((p[:, None] * jacobian.square()).sum(0) - (p @ jacobian).square()) / len(samples)
        w = torch.cat([t.detach().flatten() for t in weights])
        change = {"lm": -g * w, "obd": diagonal * w**2 / 2, "qm": -g * w + diagonal * w**2 / 2}[order]
        score = (change.abs() + locality * w**2 / 2).masked_fill(~stays, -torch.inf)
        kappa = 1 - (1 - sparsity) ** (i / steps)
        stays = torch.ones(entries, dtype=torch.bool)
        stays[score.argsort(stable=True)[: round(kappa * entries)]] = False
    with torch.no_grad():
        for w, value in zip(weights, original, strict=True):
            w.copy_(value)
    return stays


@pytest.mark.parametrize("order", ["lm", "qm", "obd"])
@pytest.mark.parametrize(("steps", "locality"), [(1, 0.0), (4, 0.0), (4, 0.01)])
def test_a_run_equals_rounds_of_loops_over_single_samples(model, order, steps, locality):
    method = LossModel(0.75, order, steps, locality=locality, logits_module="")
    kept = chosen(method, model)
    assert torch.equal(flat(kept), by_hand(model, order, 0.75, steps, locality))


def test_of_a_quadratic_loss_the_change_is_exact():
    layer = nn.Linear(5, 3).double()
    x, y = torch.randn(20, 5).double(), torch.randn(20, 3).double()
    loss = lambda: F.mse_loss(layer(x), y)  # noqa: E731
    weights = {"weight": layer.weight}
    with recorded(weights) as products:
        outputs = layer(x)
    value = F.mse_loss(outputs, y)
    curvature = GaussNewton(weights, torch.Generator()).diagonal(products, outputs, exact_cotangents(value, outputs))
    (gradient,) = torch.autograd.grad(loss(), layer.weight)
    scores = keep_scores(layer.weight, gradient, curvature["weight"])
    for index in range(layer.weight.numel()):
        with torch.no_grad():
            before = layer.weight.view(-1)[index].item()
            layer.weight.view(-1)[index] = 0
            change = float(loss() - value)
            layer.weight.view(-1)[index] = before
        assert scores.view(-1)[index] == pytest.approx(abs(change), rel=1e-9)


def test_scores_without_curvature_are_linear_and_without_gradient_quadratic():
    w, g, diagonal = torch.tensor([2.0, -1.0]), torch.tensor([3.0, 3.0]), torch.tensor([5.0, 7.0])
    assert keep_scores(w, g, 0.0).tolist() == [6.0, 3.0]
    assert keep_scores(w, 0.0, diagonal).tolist() == [10.0, 3.5]
    assert keep_scores(w, g, diagonal, 4.0).tolist() == [
        4.0 + 8.0,
        6.5 + 2.0,
    ]  # the penalty stands outside of the absolute value


@pytest.mark.parametrize("schedule", ["geometric", "linear"])
@pytest.mark.parametrize(("entries", "target", "steps"), [(714, 643, 14), (10, 9, 140), (1000, 1, 3), (7, 7, 2)])
def test_schedules_rise_and_end_at_the_target(schedule, entries, target, steps):
    counts = removals(entries, 0, target, steps, schedule)
    kappa = target / entries
    assert counts == sorted(counts)
    assert (len(counts), counts[-1]) == (steps, target)
    for i, count in enumerate(counts[:-1], 1):
        share = kappa * i / steps if schedule == "linear" else 1 - (1 - kappa) ** (i / steps)
        assert count == pytest.approx(share * entries, abs=0.5 + 1e-9)


def test_a_later_stage_goes_on_from_what_has_left():
    assert removals(100, 50, 75, 2) == [round(100 - 50 * 0.5**0.5), 75]
    assert removals(100, 50, 75, 2, "linear") == [62, 75]


@pytest.mark.parametrize("order", ["lm", "qm", "obd"])
def test_a_large_locality_removes_the_smallest_weights(model, order):
    method = LossModel(0.5, order, 5, locality=1e9, logits_module="")
    size = flat(weights_of(model)).detach().abs()
    threshold = size.sort().values[round(0.5 * len(size))]
    assert torch.equal(flat(chosen(method, model)), size >= threshold)


def test_one_step_and_many_differ_and_both_remove_the_exact_number(model):
    one, many = (chosen(LossModel(0.8, "qm", steps, logits_module=""), model) for steps in (1, 14))
    entries = sum(w.numel() for w in weights_of(model).values())
    assert removed(one) == removed(many) == round(0.8 * entries)
    assert not torch.equal(flat(one), flat(many))


class Watched(LossModel):
    """Notes what each round sees."""

    def _means(self, task, newton, generator, title):
        self.seen = [*getattr(self, "seen", []), {n: w.detach().clone() for n, w in newton.weights.items()}]
        self.titles = [*getattr(self, "titles", []), title]
        self.modes = {m.training for m in task.model.modules()}
        return super()._means(task, newton, generator, title)


def test_rounds_are_nested_and_leave_what_stays_as_it_was(model):
    method = Watched(0.9, steps=6)
    kept = flat(chosen(method, model))
    whole = flat(weights_of(model)).detach()
    states = [*map(flat, method.seen), torch.where(kept, whole, 0)]
    assert torch.equal(states[0], whole)
    for before, after in itertools.pairwise(states):
        assert ((after == before) | (after == 0)).all()
        assert (after == 0).sum() > (before == 0).sum()


def test_every_round_says_how_many_there_are(model):
    method = Watched(0.9, steps=140)
    chosen(method, model)
    assert method.titles[4] == f"Loss model, round 5 of {len(method.titles)}"
    assert 20 < len(method.titles) <= 140  # rounds that would remove nothing are skipped


@pytest.mark.parametrize(
    "options", [{}, {"order": "qm", "logits_module": "7"}, {"order": "obd", "curvature": "hutchinson"}]
)
def test_the_model_is_scored_in_evaluation_mode_and_left_bit_identical(options):
    model = trained(net(norm=True), BATCHES).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    method = Watched(0.5, steps=3, **options)
    chosen(method, model)
    assert method.modes == {False}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))


def test_many_steps_follow_the_loss_more_closely_than_one(model):
    def error(steps):
        method = Watched(0.6, "qm", steps, logits_module="")
        kept = chosen(method, model)
        states = [*method.seen, {n: torch.where(kept[n], w.detach(), 0) for n, w in weights_of(model).items()}]
        whole = {name: w.detach().clone() for name, w in weights_of(model).items()}
        total = 0.0
        for before, after in itertools.pairwise(states):
            changes = [set_to(model, state) for state in (before, after)]
            set_to(model, before)
            g, diagonal = gradient_and_curvature(model)
            step = flat(before) - flat(after)
            modelled = (-g * step + diagonal * step**2 / 2).sum()
            total += abs(float(modelled) - (changes[1] - changes[0]))
        set_to(model, whole)
        return total

    assert error(12) < 0.5 * error(1)


def set_to(model, values):
    """Set the weights and return the loss."""
    with torch.no_grad():
        for name, w in weights_of(model).items():
            w.copy_(values[name])
        return float(loss_of(model, [torch.cat(parts) for parts in zip(*BATCHES, strict=True)]))


def gradient_and_curvature(model):
    x, y = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    weights = weights_of(model)
    with recorded(weights) as products:
        z = model(x)
    loss = F.cross_entropy(z, y)
    diagonal = GaussNewton(weights, torch.Generator()).diagonal(products, z, exact_cotangents(loss, z))
    g = torch.autograd.grad(loss, list(weights.values()))
    return torch.cat([t.flatten() for t in g]), flat(diagonal)


def test_from_a_hundred_outputs_on_labels_are_drawn(monkeypatch):
    used = []
    for name in ("exact_cotangents", "sampled_cotangents"):
        function = getattr(loss_model, name)
        monkeypatch.setattr(
            loss_model, name, lambda *args, name=name, function=function: (used.append(name), function(*args))[1]
        )
    for classes in (100, 101):
        data = [(torch.randn(5, 3), torch.arange(5))]
        chosen(LossModel(0.5, "obd", 1, logits_module=""), nn.Sequential(nn.Linear(3, classes)), data)
    assert used == ["exact_cotangents", "sampled_cotangents"]


@pytest.mark.parametrize("curvature", ["fisher", "hutchinson"])
def test_many_draws_come_near_the_exact_choice_and_follow_the_seed(model, curvature):
    options = {"logits_module": ""} if curvature == "fisher" else {}
    exact = flat(chosen(LossModel(0.5, "obd", 1, logits_module=""), model))
    many = [
        flat(chosen(LossModel(0.5, "obd", 1, curvature=curvature, draws=300, seed=s, **options), model))
        for s in (0, 0, 1)
    ]
    assert torch.equal(many[0], many[1])
    assert not torch.equal(many[0], many[2])
    assert (many[0] == exact).double().mean() > 0.85


def test_a_shuffled_loader_gives_other_samples_in_every_round(model):
    points = [torch.cat(parts) for parts in zip(*BATCHES, strict=True)]
    firsts = []

    def loss(model, batch):
        firsts.append(tuple(batch[1].tolist()) + tuple(batch[0][:, 0, 0, 0].tolist()))
        return loss_of(model, batch)

    method = LossModel(0.5, steps=4, calibration_batches=1)
    data = DataLoader(TensorDataset(*points), batch_size=4, shuffle=True)
    task = Task.of(model, Probe.of_data(model, data, loss), as_calls(points[0][:2]))
    weights = weights_of(model)
    method.choose_weights(task, weights, {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}, 50)
    assert len(set(firsts)) == 4


def rank_masks(rank, folder, model, data):
    """Choose by one rank's share of the batches; save the masks and the sizes of the collectives."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sizes = []

    def mean(tensor):
        sizes.append(len(tensor))
        dist.all_reduce(tensor)
        return tensor / 2

    masks = chosen(LossModel(0.75, steps=4), model, data[rank], mean=mean)
    torch.save((flat(masks), sizes), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_meet_once_per_round_and_equal_one_process_on_all_samples(model, tmp_path):
    """Processes, not threads: which kernels attention may use is a setting of the whole process, and put back in the order of entry."""
    fork, shares = multiprocessing.get_context("fork"), [BATCHES[:1], BATCHES[1:]]
    ranks = [fork.Process(target=rank_masks, args=(rank, tmp_path, model, shares)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    one = flat(chosen(LossModel(0.75, steps=4), model))
    for rank in (0, 1):
        masks, sizes = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(masks, one)
        assert sizes == [len(one) + 1] * 4


def test_gradient_and_curvature_travel_together(model):
    shapes = []
    mean = lambda tensor: (shapes.append(len(tensor)), tensor)[1]  # noqa: E731
    chosen(LossModel(0.5, "qm", 3, logits_module=""), model, mean=mean)
    assert shapes == [2 * len(flat(weights_of(model))) + 1] * 3


@pytest.mark.parametrize("options", [{}, {"order": "qm", "logits_module": "net"}])
def test_a_fit_fine_tunes_what_is_left_at_the_exact_sparsity(tmp_path, options):
    model = LitNet()
    method = LossModel(0.9, steps=3, calibration_batches=2, remove_dead=False, **options)
    options = method.options()
    trainer(tmp_path, callbacks=[method], max_epochs=1).fit(model, loader())
    weights = weights_of(model)
    assert (flat(weights) == 0).sum() == round(0.9 * len(flat(weights)))
    assert method.options() == options
    assert options["steps"] == 3


def test_sigmoids_and_squared_errors_need_no_further_word():
    class Regression(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 2)
            self.example_input_array = torch.zeros(1, 4)

        def forward(self, x):
            return self.net(x).relu_()  # in place, behind what is captured

        def training_step(self, batch, _):
            return F.mse_loss(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    data = DataLoader(TensorDataset(torch.randn(12, 4), torch.rand(12, 2)), batch_size=6)
    model = Regression()
    run = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.callbacks.append(LossModel(0.5, "obd", 2, logits_module="net", remove_dead=False))
    run.fit(model, data)
    assert (model.net.weight == 0).sum() == 4


BAD = [
    ({"order": "mp"}, "order"),
    ({"steps": 0}, "steps=0"),
    ({"steps": True}, "steps=True"),
    ({"locality": -1.0}, "locality=-1.0"),
    ({"locality": float("nan")}, "locality=nan"),
    ({"step_schedule": "cubic"}, "step_schedule"),
    ({"curvature": "kfac"}, "curvature"),
    ({"draws": 0}, "draws"),
    ({"calibration_batches": 0}, "calibration_batches"),
    ({"logits_module": 3}, "logits_module=3"),
    ({"sparsity": 1.0}, "sparsity=1.0"),
    ({"order": "qm"}, "logits_module=, or take curvature='hutchinson'"),
    ({"order": "obd", "curvature": "fisher"}, "logits_module="),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_bad_options_are_told_at_construction(options, words):
    with pytest.raises(OptionError, match=words):
        LossModel(**({"sparsity": 0.5} | options))


def test_a_module_that_does_not_exist_is_told(model):
    with pytest.raises(OptionError, match=r"logits_module='head'.*named_modules"):
        compress(model, LossModel(0.5, "qm", logits_module="head"), BATCHES[0][0], BATCHES, loss_of)


def test_logits_that_are_not_called_once_are_told(model):
    twice = lambda model, batch: loss_of(model, batch) + loss_of(model, batch)  # noqa: E731
    with pytest.raises(ModelError, match="called 2 times"):
        chosen(LossModel(0.5, "qm", logits_module="7"), model, loss=twice)


def test_logits_that_no_weight_has_touched_are_told(model):
    method = LossModel(0.5, "qm", logits_module="0")
    with pytest.raises(ModelError, match="not a tensor with one entry per sample"):
        chosen(method, nn.Sequential(nn.Identity(), model))


def test_no_data_is_told(model):
    with pytest.raises(ModelError, match="no batch to score with"):
        compress(model, LossModel(0.5), BATCHES[0][0], [], loss_of)


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
@pytest.mark.parametrize("order", ["qm", "obd"])
@pytest.mark.parametrize(
    "broken",
    [
        lambda model, batch: loss_of(model, batch) * float("nan"),
        lambda model, batch: loss_of(model, batch) + float("inf"),
        lambda model, batch: F.cross_entropy(model(batch[0] * float("nan")), batch[1]),
        lambda model, batch: F.cross_entropy(model(batch[0]), torch.full_like(batch[1], -100)),
    ],
    ids=["nan", "inf", "logits", "nothing to average"],
)
def test_a_loss_that_is_not_finite_is_told(model, broken, order, curvature):
    with pytest.raises(ModelError, match="loss of a batch, its logits or their curvature are not finite"):
        chosen(LossModel(0.5, order, 1, logits_module="7", curvature=curvature), model, loss=broken)


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_classes_that_are_masked_by_an_infinite_logit_are_allowed(curvature):
    class Masked(nn.Linear):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.tensor([False, False, True]), -torch.inf)

    head = Masked(5, 3)
    data = [(torch.randn(6, 5), torch.tensor([0, 1, 1, 0, 1, 0]))]
    method = LossModel(0.4, "qm", 1, logits_module="0", curvature=curvature)
    assert not chosen(method, nn.Sequential(head), data)["0.weight"][2].any()
