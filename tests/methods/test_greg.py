"""GReg: the course of the penalty, what is chosen when, and how sizes follow, against closed forms."""

import logging
import math

import numpy as np
import pytest
import torch
from growing import LAYERS, Flat, Lit, chosen, fit, noise
from lit import LitNet
from torch import nn

from lightning_prune.errors import OptionError, TrainerError
from lightning_prune.methods.greg import GReg


def units(found):
    """Return numbers of units, 0 to 71, of places by layer."""
    firsts = {0: 0, 3: 16, 8: 40}
    return sorted(firsts[layer] + place for layer, places in found.items() for place in places)


# The penalty --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_after_k_gains_the_penalty_is_k_times_strength_on_the_chosen_and_0_on_others(every, tmp_path):
    method = GReg(strength=0.1, ceiling=0.35, every_n_steps=every, settle_steps=5, sparsity=0.5, align=1)
    _, watch = fit(method, tmp_path, max_epochs=6)
    gone = units(chosen(watch.weights[0], {0: 8, 3: 12, 8: 16}))
    growing = 4 * every
    for step, values in enumerate(watch.values):
        if step < growing + 5:
            expected = np.zeros(72)
            expected[gone] = min(0.1 * (step // every), 0.35)
            np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6)
            assert not watch.gone[step].any()
        else:
            assert watch.gone[step].nonzero().flatten().tolist() == gone
            assert not values[~watch.gone[step]].any()
    assert len(watch.values) > growing + 5


def test_order_2_raises_all_to_the_pick_ceiling_chooses_then_and_goes_on_from_there(tmp_path):
    class Decayed(LitNet):
        def configure_optimizers(self):
            groups = [{"params": list(self.net[0].parameters()), "weight_decay": 0.02}]
            groups += [{"params": [p for layer in self.net[1:] for p in layer.parameters()], "weight_decay": 0.01}]
            return torch.optim.SGD(groups, lr=0.05)

    options = {"strength": 0.1, "ceiling": 0.35, "pick_ceiling": 0.03, "settle_steps": 2}
    method = GReg(2, **options, sparsity=0.5, align=1)
    _, watch = fit(method, tmp_path, Decayed(), max_epochs=4)
    for step, expected in enumerate((0.0, 0.01, 0.02)):
        np.testing.assert_allclose(watch.values[step].numpy(), expected, rtol=1e-6)
    gone = units(chosen(watch.weights[3], {0: 8, 3: 12, 8: 16}))  # chosen by the sizes of then
    for step, expected in enumerate((0.03, 0.13, 0.23, 0.33, 0.35, 0.35), 3):
        np.testing.assert_allclose(watch.values[step][gone].numpy(), expected, rtol=1e-6)
        others = np.delete(watch.values[step].numpy(), gone)
        np.testing.assert_allclose(others, -0.01, rtol=1e-6)  # the smaller weight decay
    assert watch.gone[9].nonzero().flatten().tolist() == gone
    assert not watch.gone[8].any()
    assert not watch.values[9][~watch.gone[9]].any()


@pytest.mark.parametrize(("order", "needed"), [(1, "90,000"), (2, "94,500")])
def test_the_numbers_of_the_paper_take_as_many_steps_as_in_the_paper(order, needed, tmp_path):
    """50,000 and 40,000 on ImageNet; of order 2 first 5,000 to choose, then 49,500."""
    method = GReg(order, strength=1e-4, ceiling=1.0, every_n_steps=5, settle_steps=40_000, sparsity=0.5, align=1)
    with pytest.raises(TrainerError, match=f"GReg needs at least {needed} optimizer steps .* the Trainer plans 8"):
        fit(method, tmp_path)


@pytest.mark.parametrize("order", [1, 2])
def test_exactly_the_needed_steps_are_enough(order, tmp_path):
    options = {"strength": 0.1, "ceiling": 0.35, "settle_steps": 3, "sparsity": 0.5, "align": 1}
    with pytest.raises(TrainerError) as caught:
        fit(GReg(order, **options), tmp_path, max_steps=2)
    needed = int(str(caught.value).split("at least ")[1].split()[0])
    method = GReg(order, **options)
    _, watch = fit(method, tmp_path, max_steps=needed, max_epochs=100)
    assert int(watch.gone[-1].sum()) == 36
    assert not watch.gone[-2].any()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("epochs", [1, 5, 40])
def test_by_default_growth_takes_half_of_the_steps_and_settling_a_fifth(order, epochs, tmp_path):
    method = GReg(order, sparsity=0.5, align=1)
    _, watch = fit(method, tmp_path, Flat(), max_epochs=epochs)
    highest = [float(values.max()) for values in watch.values]
    ceiling = 0.2 * 0.1 / 0.05  # 0.2 (1 - momentum) / lr
    full = next(step for step, value in enumerate(highest) if value == pytest.approx(ceiling))
    dropped = next(step for step, gone in enumerate(watch.gone) if gone.any())
    assert full == pytest.approx(2 * epochs, abs=1)
    assert dropped - full == int(0.2 * 4 * epochs)
    if order == 2:
        assert highest[round(0.2 * epochs)] == pytest.approx(ceiling / 100) or epochs < 40


# Sizes --------------------------------------------------------------------------------------------------------------------------


class Decaying(Flat):
    """No gradient but that of weight decay and penalties."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def configure_optimizers(self):
        return getattr(torch.optim, self.kind)(self.parameters(), lr=0.1, weight_decay=0.03)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_without_a_task_sizes_are_products_of_1_minus_lr_times_penalty_and_decay(kind, order, tmp_path):
    method = GReg(order, strength=0.2, ceiling=1.0, settle_steps=8, sparsity=0.5, align=1, start_epoch=1)
    _, watch = fit(method, tmp_path, Decaying(kind), max_epochs=8)
    factor = torch.ones(72)
    for step in range(12):
        penalty = watch.values[step] if step >= 4 else torch.zeros(72)
        decay = 1 - 0.1 * (penalty + 0.03) if kind == "SGD" else (1 - 0.1 * 0.03) * (1 - 0.1 * penalty)
        factor = factor * decay
        sizes = torch.cat([watch.weights[step + 1][f"net.{k}.weight"].abs().flatten(1).mean(1) for k in LAYERS])
        first = torch.cat([watch.weights[0][f"net.{k}.weight"].abs().flatten(1).mean(1) for k in LAYERS])
        torch.testing.assert_close(sizes, first * factor, rtol=1e-5, atol=0)
    if order == 2 and kind == "SGD":
        kept = ~method.chosen
        picked = next(step for step, values in enumerate(watch.values) if (values < 0).any())
        before, after = (
            torch.cat([watch.weights[i][f"net.{k}.weight"].flatten(1).norm(dim=1) for k in LAYERS])
            for i in (picked, picked + 2)
        )
        torch.testing.assert_close(after[kept], before[kept])  # -gamma undoes the weight decay


class Quadratic(Lit):
    """Every unit of the first layer is pulled back to where it was with a curvature of its own."""

    def __init__(self, curvature, sizes):
        net = nn.Sequential(nn.Linear(4, len(sizes), bias=False), nn.ReLU(), nn.Linear(len(sizes), 2, bias=False))
        super().__init__(net, torch.zeros(2, 4), lambda p: torch.optim.SGD(p, lr=0.1))
        self.net[0].weight.data = torch.tensor(sizes)[:, None] * torch.tensor([1.0, -1.0, 1.0, -1.0])
        self.start, self.curvature = self.net[0].weight.detach().clone(), torch.tensor(curvature)[:, None]

    def training_step(self, batch, batch_idx):
        return 0.5 * (self.curvature * (self.net[0].weight - self.start).square()).sum() + 0 * self(batch[0]).sum()


def test_under_a_common_penalty_order_2_chooses_by_curvature_times_size_and_order_1_by_size(tmp_path):
    curvature, sizes = [0.05, 4.0, 0.1, 2.0, 3.0, 0.02], [1.0, 0.4, 0.9, 0.5, 0.6, 0.8]
    for order, expected in ((1, {1, 3, 4}), (2, {0, 2, 5})):
        model = Quadratic(curvature, sizes)
        method = GReg(
            order,
            strength=0.5,
            ceiling=8.0,
            pick_ceiling=3.0 if order == 2 else None,
            settle_steps=0,
            sparsity=0.5,
            align=1,
        )
        _, watch = fit(method, tmp_path, model, noise(model), max_epochs=50)
        assert set(watch.gone[-1].nonzero().flatten().tolist()) == expected
        if order == 2:
            picked = next(step for step, values in enumerate(watch.values) if len(values.unique()) > 1)
            sizes_then = watch.weights[picked - 1]["net.0.weight"].abs().mean(1)
            h, penalty = torch.tensor(curvature), 3.0
            settled = h * torch.tensor(sizes) / (h + penalty)
            assert sizes_then.argsort().tolist()[:3] == settled.argsort().tolist()[:3]


def test_trained_to_the_end_kept_channels_are_a_thousand_times_larger_than_chosen_ones(tmp_path):
    class Constant(LitNet):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    for order in (1, 2):
        method = GReg(order, sparsity=0.5, align=1)
        _, watch = fit(method, tmp_path, Constant(), max_epochs=60)
        last = next(step for step, gone in enumerate(watch.gone) if gone.any())
        sizes = torch.cat([watch.weights[last - 1][f"net.{k}.weight"].abs().flatten(1).mean(1) for k in LAYERS])
        for own in (slice(16), slice(16, 40), slice(40, 72)):
            chosen_here = method.chosen[own]
            assert sizes[own][~chosen_here].mean() > 1000 * sizes[own][chosen_here].mean()


def test_with_norms_removal_costs_nothing_and_without_batch_normalization_hides_small_filters(tmp_path):
    """The outputs before and after the channels are zeroed, at the end of growth; the largest change over that of the outputs themselves."""

    class Constant(LitNet):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    costs = {}
    for norms in (True, False):
        torch.manual_seed(0)
        method = GReg(sparsity=0.5, align=1, norms=norms)
        seen = {}
        drop = method.drop

        def watched(chosen, drop=drop, seen=seen, method=method):
            model, x = seen["model"], torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            state = {name: value.clone() for name, value in model.net.state_dict().items()}
            with torch.no_grad():
                seen["before"] = model.net(x)
                drop(chosen)
                model.net.load_state_dict(
                    {k: v if "running" in k else model.net.state_dict()[k] for k, v in state.items()}
                )
                seen["after"] = model.net(x)

        method.drop = watched
        seen["model"] = model = Constant()
        fit(method, tmp_path, model, max_epochs=60)
        costs[norms] = float((seen["after"] - seen["before"]).norm() / seen["before"].norm())
    assert costs[True] < 0.01
    assert costs[False] > 0.1


# Options ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 3}, "order=3"),
        ({"order": True}, "order=True"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"settle_steps": -1}, "settle_steps=-1"),
        ({"settle_steps": 1.5}, "settle_steps=1.5"),
        ({"pick_ceiling": 0.1}, "belongs to order=2"),
        ({"order": 2, "pick_ceiling": 1.0, "ceiling": 0.5}, "lies below ceiling"),
        ({"order": 2, "pick_ceiling": math.inf}, "pick_ceiling=inf"),
    ],
)
def test_bad_options_raise_at_construction(options, message):
    with pytest.raises(OptionError, match=message):
        GReg(sparsity=0.5, **options)


def test_a_pick_ceiling_above_the_derived_ceiling_is_an_error_before_training(tmp_path):
    with pytest.raises(OptionError, match=r"pick_ceiling=0.5\): give less than the ceiling of 0.4"):
        fit(GReg(2, pick_ceiling=0.5, sparsity=0.5, align=1), tmp_path)


def test_what_was_derived_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning_prune"):
        fit(GReg(sparsity=0.5, align=1), tmp_path, max_epochs=5)
    assert (
        "GReg: the penalty gains 0.04 every 1 steps up to 0.4; channels are pruned after 14 of 20 steps." in caplog.text
    )


def test_options_build_the_same_callback_again():
    method = GReg(2, strength=1e-4, ceiling=1.0, every_n_steps=5, settle_steps=10, pick_ceiling=0.01, flops=0.5)
    assert GReg(**method.options()).options() == method.options()
