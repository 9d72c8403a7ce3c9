"""SiPP: the authors' numbers, the allocation against its conditions of optimality, sampling without bias, and what is left alone or refused."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lit import LitNet, loader, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_prune import compress
from lightning_prune.callback import Task
from lightning_prune.errors import ModelError, OptionError, PlanError
from lightning_prune.measure.contributions import weight_shares
from lightning_prune.methods.sipp import (
    SiPP,
    allocate,
    by_sign,
    difficulty,
    draws_for,
    error_bound,
    expected_distinct,
    kept_of_rows,
    reweighting,
)
from lightning_prune.probe import Probe
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.steps import MaskWeight
from lightning_prune.structure.surgery import compact

REFERENCE = Path(__file__).parents[1] / "reference" / "sipp_det_mlp.npz"


def loss_of(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def masks_of(plan):
    return {step.key: step.mask for step in plan.steps if isinstance(step, MaskWeight)}


def task_of(model, data, loss=loss_of):
    return Task.of(model, Probe.of_data(model, data, loss), as_calls(data[0] if loss is None else data[0][0]))


def weights_of(model):
    return {name: p for name, p in model.named_parameters() if p.ndim >= 2}


@pytest.fixture(scope="module")
def authors():
    """What the authors' code made of a network: the network, its data in batches, and the numbers."""
    with np.load(REFERENCE) as file:
        numbers = {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind != "U"}
    net = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    net.load_state_dict({key[4:]: value for key, value in numbers.items() if key.startswith("w/")})
    batches = list(zip(numbers["x"].split(16), numbers["y"].split(16), strict=True))
    return net, batches, numbers


def test_sensitivities_are_the_authors(authors):
    net, batches, numbers = authors
    found, positions = SiPP(sparsity=0.5, official=True).sensitivities(task_of(net, batches), weights_of(net))
    for name, shares in found.items():
        layer = f"f.{name.removesuffix('.weight')}"
        torch.testing.assert_close(shares, numbers[f"{layer}/sens_weight"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(shares.amax(0), numbers[f"{layer}/sens_in"], rtol=1e-6, atol=1e-6)
        assert positions[name] == int(numbers[f"{layer}/num_patches"])


def test_the_allocation_to_rows_and_signs_is_the_authors(authors):
    net, batches, numbers = authors
    allocated = {name: numbers[f"f.{name[0]}/allocation_plus_minus"] for name in weights_of(net)}
    removed = sum(w.numel() for w in weights_of(net).values()) - sum(int(a.sum()) for a in allocated.values())
    task, weights = task_of(net, batches), weights_of(net)
    kept = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    stay = SiPP(sparsity=0.5).choose_weights(task, weights, kept, removed)  # before gradients are asked for
    for name, expected in allocated.items():
        assert torch.equal(kept_of_rows(stay[name], weights[name]), expected)


def test_the_weights_that_stay_are_the_authors(authors):
    net, batches, numbers = authors
    final = {name: numbers[f"f.{name[0]}/weight_final"] != 0 for name in weights_of(net)}
    sparsity = 1 - sum(int(mask.sum()) for mask in final.values()) / sum(mask.numel() for mask in final.values())
    method = SiPP(sparsity=sparsity, official=True, remove_dead=False)
    small, plan = compress(net, method, batches[0][0], data=batches, loss=loss_of)
    for name, mask in masks_of(plan).items():
        assert torch.equal(mask, final[name])
    torch.testing.assert_close(small(numbers["x"]), numbers["out_pruned"], rtol=1e-5, atol=1e-5)
    plain = compress(net, SiPP(sparsity=sparsity), batches[0][0], data=batches)[1]
    assert not torch.equal(masks_of(plain)["0.weight"], final["0.weight"])  # the gradients matter here


def net():
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(24, 5)).double()


def batches(*counts):
    return [(torch.randn(n, 1, 6, 6, dtype=torch.float64), torch.randint(0, 5, (n,))) for n in counts]


def test_the_lowest_means_over_positions_leave_exactly_as_many_as_asked_for():
    model, data = net(), batches(3, 2)
    x = torch.cat([x for x, _ in data])
    with torch.no_grad():
        shares = {
            name: weight_shares(model[int(name[0])], model[: int(name[0])](x), "mean") for name in weights_of(model)
        }
    plan = compress(model, SiPP(sparsity=0.6, remove_dead=False), data[0][0], data=data)[1]
    masks = masks_of(plan)
    flat, kept = (torch.cat([part[name].flatten() for name in shares]) for part in (shares, masks))
    assert int((~kept).sum()) == round(0.6 * flat.numel())
    assert float(flat[kept].min()) >= float(flat[~kept].max())


def test_what_is_left_out_is_within_the_shares_left_out_on_the_calibration_data():
    layer, x = nn.Linear(40, 8, bias=False).double(), torch.randn(30, 40, dtype=torch.float64)
    shares = weight_shares(layer, x)
    small = compress(nn.Sequential(layer), SiPP(sparsity=0.7), x, data=[x])[0][0]
    gone = (small.weight == 0) * shares
    both = x.abs() @ layer.weight.detach().abs().T  # the sums of both signs of weights and inputs
    assert ((small(x) - layer(x)).abs() <= gone.sum(1) * both + 1e-12).all()


class Odd(nn.Module):
    """Holds weights of which no layer's inputs tell what they are multiplied by."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight
        self.attention, self.lstm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LSTM(8, 8, batch_first=True)
        self.plain, self.never = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = self.attention(x, x, x)[0] + self.lstm(x)[0]
        return self.head(torch.relu(self.plain(x)))


def test_weights_whose_inputs_are_not_seen_are_left_alone_with_the_reason():
    tokens = torch.randint(0, 7, (3, 5))
    plan = compress(Odd(), SiPP(sparsity=0.5), tokens, data=[tokens])[1]
    assert set(masks_of(plan)) == {"plain.weight"}
    assert int(masks_of(plan)["plain.weight"].sum()) == 32
    reasons = {"head": "tied", "attention": "cannot be seen", "lstm": "cannot be seen", "never": "not called"}
    for name, reason in reasons.items():
        assert reason in plan.left_alone[name]


def test_a_model_of_nothing_else_is_an_error_that_says_why():
    x = torch.randn(2, 3, 4)
    with pytest.raises(ModelError, match=r"change nothing. the model: what its weights .* of LSTM"):
        compress(nn.LSTM(4, 4), SiPP(sparsity=0.5), x, data=[x])


def test_a_layer_that_the_calibration_data_does_not_reach_is_an_error_with_the_remedy():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.one(x) if bool(x.sum() < 0) else self.one(x) + self.other(x)

    with pytest.raises(ModelError, match=r"'other'.*exclude="):
        compress(Branch(), SiPP(sparsity=0.5), torch.ones(2, 3), data=[-torch.ones(2, 3)])


def test_weights_of_a_dead_layer_leave_first_and_one_sample_is_data_enough():
    model, x = net(), batches(1)[0][0]
    model[0].bias.data.fill_(-100.0)  # behind it everything is zero
    plan = compress(model, SiPP(sparsity=216 / 372, remove_dead=False), x, data=[x])[1]
    assert set(masks_of(plan)) == {"2.weight"}
    assert not masks_of(plan)["2.weight"].any()


def test_sampling_keeps_nothing_that_is_dead_before_what_is_not():
    model, x = net(), batches(4)[0][0]
    model[0].bias.data.fill_(-100.0)
    weights = weights_of(model)
    kept = {name: torch.ones(w.shape, dtype=torch.bool) for name, w in weights.items()}
    factors = SiPP(sparsity=0.7, mode="random").choose_weights(task_of(model, [x], None), weights, kept, 260)
    assert not factors["2.weight"].any()
    assert all(f.isfinite().all() and (f >= 0).all() for f in factors.values())
    assert sum(int((f == 0).sum()) for f in factors.values()) == 260


def test_activations_that_are_not_finite_are_refused_by_the_name_of_the_layer():
    model, x = net(), batches(2)[0][0]
    model[0].bias.data[1] = float("inf")
    with pytest.raises(ModelError, match=r"'2'.*not finite"):
        compress(model, SiPP(sparsity=0.5), x, data=[x])


def test_official_without_a_loss_is_refused():
    x = batches(2)[0][0]
    with pytest.raises(ModelError, match="outside of a fit none is known: give loss="):
        compress(net(), SiPP(sparsity=0.5, official=True), x, data=[x])


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1.0},
        {"delta": 0.0},
        {"delta": 1},
        {"delta": "1e-3"},
        {"mode": "best"},
        {"calibration_batches": 0},
        {"seed": -1},
        {"official": True, "mode": "random"},
        {"official": "yes"},
    ],
)
def test_bad_options_are_refused_when_given(options):
    with pytest.raises(OptionError, match=r"SiPP\("):
        SiPP(**({"sparsity": 0.5} | options))


def rows(count=6, entries=40, seed=0):
    """Return sensitivities of rows of very different sums, and as many entries of some as are not 0."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(count, entries, generator=generator, dtype=torch.float64) ** 4
    shares *= torch.rand(count, entries, generator=generator) < torch.linspace(0.2, 1, count)[:, None]
    return shares / shares.amax(1, keepdim=True)


def slope(draws, difficulties):
    draws = draws.clone().requires_grad_()
    return -torch.autograd.grad(error_bound(draws, difficulties).sum(), draws)[0]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_rows_between_their_bounds_gain_equally_by_another_draw(share):
    shares, weight = rows(), torch.logspace(-2, 1, 6, dtype=torch.float64)
    hard, most = difficulty(shares.sum(1), 9, 3, 1e-3), (shares > 0).sum(1).double()
    budget = share * float(most.sum())
    draws = allocate(hard, most, weight, budget)
    assert float(draws.sum()) == pytest.approx(budget)
    gains, inside = weight * slope(draws, hard), draws < most - 1e-9
    assert inside.any()
    torch.testing.assert_close(gains[inside], gains[inside].mean().expand(int(inside.sum())), rtol=1e-9, atol=0)
    assert (gains[~inside] >= gains[inside].mean() * (1 - 1e-9)).all()


def test_no_other_split_of_the_budget_has_a_lower_bound():
    hard, most, weight = torch.tensor([3.0, 40.0, 0.5]).double(), torch.tensor([30, 12, 20]), torch.tensor([1, 0.5, 2])
    best = (weight * error_bound(allocate(hard, most, weight, 25), hard)).sum()
    grid = torch.cartesian_prod(torch.arange(0.05, 25, 0.05), torch.arange(0.05, 12.01, 0.05)).double()
    third = 25 - grid.sum(1)
    split = torch.cat([grid, third[:, None]], 1)[(third > 0) & (third <= 20)]
    least = (weight * error_bound(split, hard)).sum(1).min()
    assert float(best) <= float(least)
    assert float(least - best) <= 1e-4 * float(best)


def test_rows_without_sensitivities_get_no_draws_and_a_budget_for_all_is_all():
    hard, most = torch.tensor([0.0, 2.0, 1.0]), torch.tensor([5, 5, 3])
    assert allocate(hard, most, torch.ones(3), 4)[0] == 0
    assert allocate(hard, most, torch.ones(3), 8).tolist() == [0, 5, 3]


def test_the_fewest_draws_are_found_that_meet_so_many_entries_on_average():
    p = rows() / rows().sum(1, keepdim=True)
    support = (p > 0).sum(1).double()
    distinct, most = 0.6 * support, torch.full((6,), 10**6)
    draws = draws_for(p, distinct, most)
    assert (expected_distinct(p, draws) >= distinct).all()
    assert (expected_distinct(p, draws - 1) < distinct).all()
    several = torch.stack([expected_distinct(p, torch.full((6,), m)) for m in (0, 1, 2, 10, 100, 10**16)])
    assert (several.diff(dim=0) >= 0).all()
    torch.testing.assert_close(several[[0, 1]], torch.tensor([[0.0], [1.0]]).double().expand(2, 6))
    torch.testing.assert_close(several[-1], support, rtol=1e-6, atol=0)
    met = torch.multinomial(p[3].expand(4000, -1), 10, replacement=True, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([len(set(draw)) for draw in met.tolist()]).double()
    assert abs(float(counts.mean() - several[3, 3])) <= 4 * float(counts.std()) / 4000**0.5


def sampled_errors(layer, x, probabilities, draws, times=2000):
    """Return the outputs of rows sampled over and over minus the outputs, ``[times, samples, rows]``; draws by row and sign."""
    generator, weight = torch.Generator().manual_seed(0), layer.weight.detach()
    outputs = []
    for _ in range(times):
        estimate = torch.zeros_like(weight)
        for sign in range(2):
            for row in range(len(weight)):
                drawn = torch.multinomial(probabilities[sign, row], draws, replacement=True, generator=generator)
                own = (weight[row] > 0) == (sign == 0)
                estimate[row] += weight[row] * own * reweighting(drawn, probabilities[sign, row])
        outputs.append((estimate - weight) @ x.T)
    return torch.stack(outputs).transpose(1, 2)


def skewed(signed=True):
    torch.manual_seed(3)
    layer, x = nn.Linear(16, 2, bias=False).double(), torch.randn(12, 16, dtype=torch.float64)
    layer.weight.data *= torch.logspace(-1.5, 0.5, 16)
    x = x if signed else x.abs()
    shares = by_sign(weight_shares(layer, x), layer.weight.detach())
    return layer, x, shares / shares.sum(2, keepdim=True)


def test_sampled_rows_are_unbiased():
    layer, x, p = skewed()
    errors = sampled_errors(layer, x, p, 12)
    assert (errors.mean(0).abs() <= 4 * errors.std(0) / len(errors) ** 0.5 + 1e-12).all()
    assert errors.std(0).min() > 1e-3


@pytest.mark.parametrize("error", [0.5, 0.25])
@pytest.mark.parametrize("signed", [False, True])
def test_the_bound_holds_on_the_calibration_data_as_often_as_promised(signed, error):
    torch.manual_seed(4)
    layer, x = nn.Linear(12, 2, bias=False).double(), torch.randn(10, 12, dtype=torch.float64)
    x = x if signed else x.abs()
    layer.weight.data = layer.weight.data if signed else layer.weight.data.abs()
    shares, delta = by_sign(weight_shares(layer, x), layer.weight.detach()), 0.05
    triples = 2 * len(x) * 2 * (1 + signed)  # halves of x, rows, and signs
    sums = float(shares.sum(2).max())  # a row with a lower one draws more often than it needs to
    draws = math.ceil((6 + 2 * error) * sums * math.log(2 * triples / delta) / (3 * error**2))
    shares = torch.where(shares.sum(2, keepdim=True) > 0, shares, 1.0)  # any will do for a sign that has no weights
    probabilities = shares / shares.sum(2, keepdim=True)
    errors = sampled_errors(layer, x, probabilities, draws)
    both = x.abs() @ layer.weight.detach().abs().T
    failed = (errors.abs() > error * both).flatten(1).any(1).double().mean()
    assert float(failed) <= delta
    assert errors.std(0).max() > 0


def test_sampling_by_sensitivity_errs_less_at_most_than_by_chance():
    layer, x, p = skewed(signed=False)
    uniform = (p > 0) / (p > 0).sum(2, keepdim=True)
    mine, theirs = (sampled_errors(layer, x, own, 12).abs().amax((1, 2)) for own in (p, uniform.double()))
    gap = theirs.mean() - mine.mean()
    assert gap >= 4 * (mine.var() + theirs.var()).sqrt() / len(mine) ** 0.5


@pytest.mark.parametrize("mode", ["random", "hybrid"])
def test_sampling_leaves_exactly_as_many_and_reweights_what_stays(mode):
    model, data = net(), batches(6, 6)
    method = SiPP(sparsity=0.6, mode=mode, delta=0.5, remove_dead=False)
    task, weights = task_of(model, data), weights_of(model)
    kept = {name: torch.ones(w.shape, dtype=torch.bool) for name, w in weights.items()}
    factors = method.choose_weights(task, weights, kept, 223)
    assert sum(int((f == 0).sum()) for f in factors.values()) == 223
    again = method.choose_weights(task, weights, kept, 223)
    assert all(torch.equal(factors[name], again[name]) for name in factors)
    small, plan = compress(model, method, data[0][0], data=data)
    assert all(step.gains == "" for step in plan.steps)
    for name, weight in weights.items():
        expected = weight.detach() * factors[name].float()
        torch.testing.assert_close(small.get_parameter(name).detach(), expected, rtol=1e-12, atol=0)
    moved = torch.cat([f[(f != 0) & (f != 1)] for f in factors.values()])
    assert len(moved) if mode == "random" else True


def test_the_hybrid_ranks_where_the_bound_of_sampling_is_worse():
    model, data = net(), batches(6, 6)
    weights = weights_of(model)
    kept = {name: torch.ones(w.shape, dtype=torch.bool) for name, w in weights.items()}
    sure = SiPP(sparsity=0.6, mode="hybrid", delta=1e-16).choose_weights(task_of(model, data), weights, kept, 223)
    assert all(((f == 0) | (f == 1)).all() for f in sure.values())


def test_sampled_weights_keep_the_outputs_on_average_and_differ_by_seed():
    torch.manual_seed(5)
    layer, x = nn.Linear(30, 4).double(), torch.randn(20, 30, dtype=torch.float64)
    model = nn.Sequential(layer)
    task, weights, kept = task_of(model, [x], None), weights_of(model), {"0.weight": torch.ones(4, 30).bool()}
    methods = [SiPP(sparsity=0.5, mode="random", seed=seed) for seed in range(60)]
    factors = torch.stack([method.choose_weights(task, weights, kept, 60)["0.weight"] for method in methods])
    stack = factors * layer.weight.detach()
    assert ((stack != 0).sum((1, 2)) == 60).all()
    errors = (stack - layer.weight.detach()) @ x.T
    assert (
        errors.mean(0).abs().mean() <= 0.25 * errors.abs().mean()
    )  # the number of draws is found, so only nearly unbiased
    assert stack.std(0).max() > 0.01


def test_gradual_sampling_reweights_once_and_ends_at_the_share(tmp_path):
    torch.manual_seed(0)
    model = LitNet(norm=True)
    method = SiPP(sparsity=0.6, mode="random", until_epoch=2, calibration_batches=2, remove_dead=False)
    before = {name: w.detach().clone() for name, w in weights_of(model).items()}
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    trainer(tmp_path, callbacks=[method], max_epochs=3).fit(model, loader())
    masks = masks_of(method.plan)
    assert sum(int((~m).sum()) for m in masks.values()) == round(0.6 * sum(w.numel() for w in before.values()))
    ratio = torch.cat([(model.get_parameter(n).detach() / before[n])[mask] for n, mask in masks.items()])
    assert float((ratio - 1).abs().max()) > 0.1
    assert 0.7 < float(ratio.median()) < 4


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_fit_does_not_reweight_again(tmp_path):
    def fitted(**options):
        method = SiPP(sparsity=0.5, mode="random", until_epoch=2, calibration_batches=1, remove_dead=False)
        torch.manual_seed(0)
        model = LitNet()
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        run = trainer(tmp_path, callbacks=[method, saver], max_epochs=3, enable_checkpointing=True)
        run.fit(model, loader(), **options)
        return model

    whole = fitted()
    resumed = fitted(ckpt_path=tmp_path / "epoch=0.ckpt")
    for name, value in whole.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed.state_dict()[name])


class Given(SiPP):
    """Multiplies weights by factors of the test's own."""

    def choose_weights(self, task, weights, kept, count):
        factors = {name: torch.ones_like(weight) for name, weight in weights.items()}
        factors["0.weight"][0] = 0  # the first unit is a constant of its bias
        factors["2.weight"][0] = torch.tensor([3.0, 0, 0])  # and what reads it alone, re-weighted, another one
        return factors


def test_constants_behind_reweighted_weights_are_absorbed_exactly():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    model[0].bias.data[0] = model[2].bias.data[0] = model[2].weight.data[0, 0] = 1.0
    x = torch.randn(20, 4, dtype=torch.float64)
    small = compress(model, Given(sparsity=6 / 27), x, data=[x])[0]
    assert [tuple(small[i].weight.shape) for i in (0, 2, 4)] == [(2, 4), (2, 2), (2, 2)]
    first = model[0](x)
    first[:, 0] = 1
    second = model[2](first.relu())
    second[:, 0] = 3 * 1 * 1 + 1
    torch.testing.assert_close(small(x), model[4](second.relu()), rtol=1e-9, atol=1e-9)


def test_gains_are_taken_once_and_not_carried():
    layer = nn.Sequential(nn.Linear(3, 2)).double()
    mask, gains = torch.tensor([[1, 0, 1], [1, 1, 0]]).bool(), torch.tensor([[2.0, 9, 1], [0.5, 3, 9]])
    step = MaskWeight.of("0", "weight", mask, gains)
    expected = layer[0].weight.detach() * gains * mask
    for calls in ((), as_calls(torch.randn(4, 3, dtype=torch.float64))):
        small = compact(layer, Plan((step,)), calls)
        torch.testing.assert_close(small[0].weight.detach(), expected)
        assert plan_of(small).steps == (MaskWeight.of("0", "weight", mask),)
    assert Plan.from_json(Plan((step,)).to_json()).steps == (step,)
    broken = dataclasses.replace(step, gains=step.gains[:-8])
    with pytest.raises(PlanError, match="gains"):
        Plan.from_json(Plan((broken,)).to_json())


def test_what_really_leaves_and_is_weighed_anew_gives_the_dense_output_on_average():
    """Over 400 seeds, by compress(): draws end by a rule of their own there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 4)).double()
    x = torch.randn(32, 6, dtype=torch.float64)
    hidden = model[:2](x[:3]).detach()
    found = []
    for seed in range(400):
        method = SiPP(sparsity=0.6, mode="random", seed=seed, include=["2"], remove_dead=False, calibration_batches=1)
        small, _ = compress(model, method, x[:3], [x])
        found.append(hidden @ small[2].weight.detach().T)
    outputs = torch.stack(found)
    error = outputs.std(0) / len(outputs) ** 0.5
    assert ((outputs.mean(0) - hidden @ model[2].weight.detach().T).abs() <= 4 * error).all()
