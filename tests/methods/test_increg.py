"""IncReg: the punishment against closed forms, landing on the target under noise, ranks and penalties against a twin written out."""

import copy
import math

import numpy as np
import pytest
import torch
from growing import LAYERS, Lit, chosen, fit, noise
from lit import LitNet, loader, trainer
from pytorch_lightning.callbacks import Callback
from torch import nn

from lightning_prune.callback.unit_slices import UnitSlices
from lightning_prune.errors import ModelError, OptionError, TrainerError
from lightning_prune.methods.increg import IncReg, punishment, steepness_for, updates_needed

A, U = 0.3, 0.25


def delta(rank, left, live=64, **options):
    values = (torch.as_tensor(value, dtype=torch.float64) for value in (rank, left, live))
    return punishment(*values, A, **options)


# The punishment -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 32, 500])
def test_delta_is_a_at_0_and_0_at_n_falls_strictly_and_is_symmetric_about_the_point_where_its_branches_meet(n):
    turn = 2 * n / 3  # -ln(u) / alpha with alpha = ln(2 / u) / n and u = 1/4
    assert delta(0, n) == A
    assert abs(float(delta(n, n))) < 1e-12
    assert float(delta(turn, n)) == pytest.approx(U * A, abs=1e-12)
    ranks = torch.linspace(0, 4 * n, 4001, dtype=torch.float64)
    values = delta(ranks, n, clip=None)
    assert (values.diff() < 0).all()
    offset = torch.linspace(0, turn, 100, dtype=torch.float64)
    above, below = delta(turn - offset, n, clip=None), delta(turn + offset, n, clip=None)
    torch.testing.assert_close(above - U * A, U * A - below, rtol=0, atol=1e-12)
    slope = -math.log(2 / U) / n * U * A
    for side in (-1e-6 * n, 1e-6 * n):
        assert (float(delta(turn + side, n)) - U * A) / side == pytest.approx(slope, rel=1e-5)
    assert float(delta(2 * n, n, clip=None)) == pytest.approx(-3.5 * A, rel=1e-12)
    assert float(delta(4 * n, n, clip=None)) == pytest.approx(-255.5 * A, rel=1e-12)


def test_the_clip_bounds_the_negative_branch_alone():
    ranks = torch.arange(64.0, dtype=torch.float64)
    free = delta(ranks, 10, clip=None)
    assert free.min() < -2 * A
    for clip in (0.5, 1.0, 2.0):
        torch.testing.assert_close(delta(ranks, 10, clip=clip), free.clamp(min=-clip * A), rtol=0, atol=0)


def test_the_linear_shape_falls_from_a_through_0_at_n_to_minus_a_at_the_last_rank():
    expected = [A * (1 - r / 4) if r <= 4 else -A * (r - 4) / (9 - 4) for r in range(10)]
    found = delta(torch.arange(10.0, dtype=torch.float64), 4, 10, shape="linear")
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)
    assert delta(3, 3, 4, shape="linear") == 0  # there is no rank above n


def test_nothing_is_punished_where_nothing_has_to_leave_and_layers_do_not_mix():
    ranks, left = torch.tensor([0.0, 5.0, 0.0, 1.0]).double(), torch.tensor([0, 0, 2, 2])
    found = punishment(ranks, left, torch.tensor([8, 8, 8, 8]), A)
    assert found[:2].tolist() == [0.0, 0.0]
    assert found[2:].tolist() == [A, float(delta(1, 2))]


# Landing on the target ----------------------------------------------------------------------------------------------------------


class Layers:
    """Cells of random sizes whose scores are noisy; what :class:`UnitSlices` is to a method, without a network."""

    def __init__(self, seed, spread, cells=100):
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(4, 65, (cells,), generator=generator)
        self.size, self.cell = sizes, torch.arange(cells).repeat_interleave(sizes)
        self.count, self.dtype, self.spread = int(sizes.sum()), torch.float32, spread
        self.true = torch.rand(self.count, generator=generator) + 0.1
        self.ratio = torch.rand(cells, generator=generator) * 0.9
        self.noise = torch.Generator().manual_seed(seed + 1)
        self._place = torch.arange(self.count) - (sizes.cumsum(0) - sizes)[self.cell]

    def scores(self):
        return self.true * (1 + self.spread * torch.randn(self.count, generator=self.noise))

    def masks(self, gone):
        return []

    ranks, counts = UnitSlices.ranks, UnitSlices.counts


def simulate(spread, averaged=True, most=1000, **options):
    """Run IncReg on 100 layers; return it and the update in which each layer was done."""
    method = IncReg(sparsity=0.5, **options)
    method.slices = slices = Layers(7, spread)
    method.quota = method.left = (slices.ratio * slices.size).ceil().long()
    method.values, method.gone = torch.zeros(slices.count), torch.zeros(slices.count, dtype=torch.bool)
    method.numbers = {"strength": 0.05, "ceiling": 1.0, "last": math.inf}
    method.start()
    done = torch.zeros(len(slices.size), dtype=torch.long)
    while bool(method.left.any()) and method.updates < most:
        method.updates += 1
        method.grow() if averaged else grow_at_once(method)
        assert (method.left >= 0).all()
        assert (method.values >= 0).all()
        done[(method.left == 0) & (done == 0)] = method.updates
    return method, done


def grow_at_once(method):
    """One update with the ranks of the moment in place of their mean."""
    method.ranks.zero_()
    method.grow()


@pytest.mark.parametrize("options", [{}, {"delta_clip": None}, {"shape": "linear"}])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.3])
def test_100_layers_never_lose_more_than_their_share_and_in_the_end_exactly_that(spread, options):
    method, done = simulate(spread, **options)
    assert not method.left.any()
    assert torch.equal(method.slices.counts(method.gone), method.quota)
    print(f"noise {spread:.0%}, {options}: {done.float().mean():.0f} updates in the mean, {int(done.max())} at most")
    if spread == 0:
        expected = method.slices.ranks(method.slices.true) < method.quota[method.slices.cell]
        assert torch.equal(method.gone, expected)
        cells = (method.slices.size, method.quota, 20.0, method.shape, method.delta_clip)
        assert updates_needed(*cells) == pytest.approx(int(done.max()), abs=2)


def test_averaged_ranks_find_the_smallest_better_than_ranks_of_the_moment():
    def overlap(method):
        smallest = method.slices.ranks(method.slices.true) < method.quota[method.slices.cell]
        return float((method.gone & smallest).sum() / method.quota.sum())

    averaged, momentary = (overlap(simulate(0.3, averaged)[0]) for averaged in (True, False))
    assert averaged > 0.95
    assert averaged > momentary + 0.02


def test_the_paper_toy_takes_98_updates():
    """64 groups, half of them leave, 20 updates from 0 to the ceiling: 97 to 99 without noise, by the specification's own port."""
    needed = updates_needed(torch.tensor([64]), torch.tensor([32]), 20.0, "exponential", None)
    assert needed in (97, 98, 99)


@pytest.mark.parametrize("shape", ["exponential", "linear"])
def test_the_pace_that_is_derived_is_done_in_time_and_hardly_earlier(shape):
    cells = torch.tensor([64, 10, 7]), torch.tensor([32, 9, 0])
    for updates in (1, 2, 5, 30, 400, 3000):
        steepness = steepness_for(*cells, updates, shape, 1.0)
        needed = updates_needed(*cells, steepness, shape, 1.0)
        assert needed <= updates
        assert needed >= 0.9 * updates - 2


# A fit --------------------------------------------------------------------------------------------------------------------------


class Still(LitNet):
    """The tests' network, hardly trained."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-9)


def test_with_sizes_that_do_not_change_the_smallest_of_every_layer_leave(tmp_path):
    method = IncReg(sparsity=0.5, align=1, ceiling=1.0, strength=0.3)
    _, watch = fit(method, tmp_path, Still(), max_epochs=16)
    smallest = chosen(watch.weights[0], {0: 8, 3: 12, 8: 16})
    steps = {step.module: step for step in method.plan.steps}
    for layer, gone in smallest.items():
        kept = steps[f"net.{layer}"].tensors["weight"].kept(0)
        assert set((~kept).nonzero().flatten().tolist()) == gone


def twin(weights, quota, strength, ceiling):
    """The rule written out for one layer, without tensors: norms of every step in, penalties and what is gone after it out."""
    size = len(weights[0])
    sums, values, gone = [0] * size, [0.0] * size, set()
    for norms in weights:
        order = sorted(range(size), key=lambda g: (-1.0 if g in gone else norms[g], g))
        for rank, g in enumerate(order):
            sums[g] += rank
        left = quota - len(gone)
        live = sorted((g for g in range(size) if g not in gone), key=lambda g: (sums[g], g))
        if left:
            alpha = math.log(8) / left
            for rank, g in enumerate(live):
                turn = math.log(4) / alpha
                change = math.exp(-alpha * rank) if rank <= turn else 0.5 - math.exp(-alpha * (2 * turn - rank))
                values[g] = max(values[g] + strength * max(change, -1.0), 0.0)
            gone |= {g for g in live if values[g] >= ceiling}
            if len(gone) == quota:
                values = [value if g in gone else 0.0 for g, value in enumerate(values)]
        yield list(values), set(gone)


def test_penalties_of_a_fit_are_those_of_the_rule_written_out(tmp_path):
    """Real training: norms move, ranks change, units are pruned in the middle of it."""
    method = IncReg(sparsity=0.5, align=1, ceiling=0.4, strength=0.05)
    model = LitNet().double()
    model.example_input_array = model.example_input_array.double()
    _, watch = fit(method, tmp_path, model, max_epochs=12, precision="64-true")
    first = 0
    for layer, size in LAYERS.items():
        own = slice(first, first + size)
        first += size
        norms = [w[f"net.{layer}.weight"].abs().flatten(1).mean(1).tolist() for w in watch.weights[1:]]
        for step, (values, gone) in enumerate(twin(norms, size // 2, 0.05, 0.4), 1):
            assert set(watch.gone[step][own].nonzero().flatten().tolist()) == gone
            np.testing.assert_allclose(watch.values[step][own].numpy(), values, rtol=1e-9, atol=1e-12)
        assert len(gone) == size // 2


def test_a_unit_has_one_penalty_and_the_others_of_a_layer_that_is_done_have_none(tmp_path):
    method = IncReg(sparsity={"net.0": 0.5, "net.8": 0.2}, align=1)
    _, watch = fit(method, tmp_path, max_epochs=6)
    assert (watch.values[10][16:40] == 0).all()  # net.3 is not to shrink
    assert (watch.values[-1][~watch.gone[-1]] == 0).all()
    assert int(watch.gone[-1].sum()) == 8 + math.ceil(0.2 * 32)


def network(dimensions):
    """The same small network of one, two or three dimensions; kernels are 1 along the added axes."""
    conv, norm = getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"BatchNorm{dimensions}d")
    kernel = (*[1] * (dimensions - 1), 3)
    pool = getattr(nn, f"AdaptiveAvgPool{dimensions}d")(1)
    return nn.Sequential(
        conv(2, 8, kernel), norm(8), nn.ReLU(), conv(8, 6, kernel, bias=False), norm(6), nn.ReLU(), pool, nn.Flatten(), nn.Linear(6, 3)
    )  # fmt: skip


@pytest.mark.parametrize("dimensions", [1, 3])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_convolutions_of_depth_1_train_step_by_step_as_those_of_two_dimensions(dimensions, optimizer, tmp_path):
    make = {"SGD": lambda p: torch.optim.SGD(p, 0.05, 0.9), "AdamW": lambda p: torch.optim.AdamW(p, 0.01)}[optimizer]
    shape = {1: (9,), 2: (1, 9), 3: (1, 1, 9)}
    flat, watches = network(2).state_dict(), []
    for d in (2, dimensions):
        model = Lit(network(d), torch.zeros(2, 2, *shape[d]), make)
        model.net.load_state_dict({name: t.view(model.net.state_dict()[name].shape) for name, t in flat.items()})
        model = model.double()
        model.example_input_array = model.example_input_array.double()
        method = IncReg(flops=0.5, align=1)
        watches.append(fit(method, tmp_path, model, noise(model), max_epochs=6, precision="64-true")[1])
    assert watches[0].gone[-1].any()
    for step in range(25):
        for kind in ("values", "gone"):
            torch.testing.assert_close(*(getattr(watch, kind)[step] for watch in watches), rtol=1e-9, atol=1e-9)
        for name, weight in watches[0].weights[step].items():
            torch.testing.assert_close(watches[1].weights[step][name].view(weight.shape), weight, rtol=1e-8, atol=1e-10)


# The planned steps --------------------------------------------------------------------------------------------------------------


def test_too_few_planned_steps_are_an_error_that_names_how_many_are_enough(tmp_path):
    options = {"sparsity": 0.5, "align": 1, "ceiling": 1.0, "strength": 0.2}
    before = copy.deepcopy((model := Still()).state_dict())
    with pytest.raises(
        TrainerError, match=r"IncReg needs at least \d+ optimizer steps .* the Trainer plans 8\."
    ) as caught:
        fit(IncReg(**options), tmp_path, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    needed = int(str(caught.value).split("at least ")[1].split()[0])
    method = IncReg(**options)
    _, watch = fit(method, tmp_path, model, max_steps=needed, max_epochs=100)
    assert method.updates == needed
    assert not method.left.any()
    assert watch.gone[-2].sum() < watch.gone[-1].sum() == 36  # not a step too many


def test_by_default_all_is_pruned_after_half_of_the_steps_whatever_their_number(tmp_path):
    for epochs in (1, 3, 20):
        method = IncReg(sparsity=0.5, align=1)
        _, watch = fit(method, tmp_path, Still(), max_epochs=epochs)
        done = next(step for step, gone in enumerate(watch.gone) if int(gone.sum()) == 36)
        assert 0.35 * 4 * epochs <= done <= max(1, 0.5 * 4 * epochs)


def test_what_noise_has_kept_from_the_ceiling_is_pruned_after_nine_tenths_of_the_steps(tmp_path):
    class Noisy(Callback):
        """Small penalties: ranks of the moment, in a new order each step, let hardly anything grow."""

        def on_train_batch_start(self, trainer, module, *_):
            method.ranks = torch.randint(0, 10**6, (72,))
            method._next = 0

    method = IncReg(sparsity=0.5, align=1, ceiling=1.0, strength=0.1, delta_clip=None)
    _, watch = fit(method, tmp_path, Still(), callbacks=[Noisy()], max_steps=120, max_epochs=100)
    assert int(watch.gone[107].sum()) < 36
    assert int(watch.gone[108].sum()) == 36
    assert not method.left.any()


def test_weights_that_are_not_finite_are_an_error(tmp_path):
    class Diverged(LitNet):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 3:
                with torch.no_grad():
                    self.net[0].weight[0, 0, 0, 0] = math.nan

    with pytest.raises(ModelError, match=r"IncReg: weights are not finite after \d+ steps"):
        trainer(tmp_path, callbacks=[IncReg(sparsity=0.5, align=1)], max_epochs=4).fit(Diverged(), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"shape": "cubic"}, "shape='cubic'"), ({"delta_clip": -1}, "delta_clip=-1"), ({"strength": 0}, "strength=0")],
)
def test_bad_options_raise_at_construction(options, message):
    with pytest.raises(OptionError, match=message):
        IncReg(sparsity=0.5, **options)


def test_options_build_the_same_callback_again():
    method = IncReg(strength=1e-3, ceiling=2.0, shape="linear", delta_clip=None, flops=0.5, ratios={"net.*": 1.0})
    assert IncReg(**method.options()).options() == method.options()
