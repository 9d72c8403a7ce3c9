"""Columns of weights as units: where they lie, how penalties act on them, that the target is met and dead filters leave."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from growing import Fixed, Lit, Watch, fit, noise
from lit import LitNet, loader, trainer
from pytorch_lightning.callbacks import Callback
from torch import nn

from lightning_prune import explain, load_from_checkpoint
from lightning_prune.callback import Task, rehearse
from lightning_prune.errors import BudgetError, ModelError, OptionError
from lightning_prune.methods.increg import IncReg
from lightning_prune.methods.magnitude import Magnitude
from lightning_prune.probe import Probe
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.steps import MaskWeight

LAYERS = {  # by name: a layer whose channels nothing else reads, and its input
    "Linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 5), (2, 3, 9)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, (2, 3)), (2, 3, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, (3, 1, 2)), (2, 2, 4, 3, 3)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 4, 3), (2, 3, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, (2, 3), groups=2), (2, 4, 3, 3)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 2, 2, 2)),
}


def columns(layer):
    """Return the index of every column of a layer's weight, written out: one input at one tap, in the order of the weight."""
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    swapped = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    outputs, inputs = (weight.shape[1], weight.shape[0]) if swapped else (weight.shape[0], weight.shape[1])
    per_group = (inputs if not swapped else inputs // groups, outputs // groups if not swapped else outputs)
    found = []
    for group, i in itertools.product(range(groups), range(per_group[0])):
        for tap in itertools.product(*(range(size) for size in weight.shape[2:])):
            out = slice(None) if swapped else slice(group * per_group[1], (group + 1) * per_group[1])
            found.append((group * per_group[0] + i, out, *tap) if swapped else (out, i, *tap))
    return found


def test_explain_answers_with_the_end_of_the_schedule_of_the_weights_as_they_are():
    model, method = LitNet(), IncReg(sparsity=0.6, units="columns")
    before = copy.deepcopy(model.state_dict())
    answer = explain(model, method=method)
    masks = {step.key: step.mask for step in answer.plan.steps if isinstance(step, MaskWeight)}
    found = method.removal.look(task_of(model))
    assert [*masks] == [*found.tensors]
    for key, mask in masks.items():
        sizes = model.get_parameter(key).detach().abs().mean(0).flatten()
        left = mask.flatten(1).any(0)
        assert torch.equal(left, mask.flatten(1).all(0))
        assert sizes[left].min() > sizes[~left].max()
        assert abs(int((~left).sum()) - 0.6 * left.numel()) < 1
    assert sum(int((~mask).sum()) for mask in masks.values()) >= 0.6 * found.entries
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def task_of(model):
    return Task.of(model, Probe.of_data(model, None, None), as_calls(model.example_input_array))


class Quiet(Lit):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 0.0


def alone(name, seed=0, kind=Lit, rate=0.1):
    torch.manual_seed(seed)
    make, shape = LAYERS[name]
    return kind(nn.Sequential(make()), torch.randn(*shape), lambda p: torch.optim.SGD(p, rate))


@pytest.mark.parametrize("name", LAYERS)
def test_a_column_is_one_input_at_one_tap_and_its_score_the_mean_of_its_absolute_values(name, tmp_path):
    model = alone(name)
    removal = IncReg(sparsity=0.5, units="columns").removal
    found = removal.look(task_of(model))
    weight = model.net[0].weight.detach()
    expected = [float(weight[index].double().abs().mean()) for index in columns(model.net[0])]
    assert found.count == len(expected) == math.prod(weight.shape) / weight[columns(model.net[0])[0]].numel()
    np.testing.assert_allclose(removal.slices(model, found).scores().numpy(), expected, rtol=1e-6)
    matrix = removal.read(model, found, 0)
    assert len(matrix) == min(matrix.shape)
    for column, index in zip(matrix if len(matrix) == found.count else matrix.T, columns(model.net[0]), strict=True):
        assert torch.equal(column, weight[index].flatten())


@pytest.mark.parametrize("name", LAYERS)
def test_every_column_shrinks_by_its_own_penalty_and_the_bias_by_none(name, tmp_path):
    model = alone(name, kind=Quiet)
    method = Fixed(lambda count: torch.linspace(0, 1, count), units="columns")
    _, watch = fit(method, tmp_path, model, noise(model), max_epochs=1)
    before, after = (watch.weights[step]["net.0.weight"] for step in (0, -1))
    steps, own = len(watch.weights) - 1, columns(model.net[0])
    for penalty, index in zip(np.linspace(0, 1, len(own)), own, strict=True):
        torch.testing.assert_close(after[index], before[index] * (1 - 0.1 * penalty) ** steps)
    assert torch.equal(watch.weights[0]["net.0.bias"], watch.weights[-1]["net.0.bias"])


@pytest.mark.parametrize("name", LAYERS)
def test_the_smallest_columns_leave_as_many_as_the_share_says_and_never_come_back(name, tmp_path):
    model = alone(name, rate=1e-9)
    before, own = model.net[0].weight.detach().clone(), columns(model.net[0])
    method = IncReg(sparsity=0.4, units="columns")
    _, watch = fit(method, tmp_path, model, noise(model), max_epochs=8)
    order = sorted(range(len(own)), key=lambda place: float(before[own[place]].abs().sum()))
    gone = set(order[: math.ceil(0.4 * len(own))])
    after = model.net[0].weight
    assert {place for place, index in enumerate(own) if not after[index].any()} == gone
    counts = [int(gone.sum()) for gone in watch.gone]
    assert counts == sorted(counts)
    assert counts[-1] == len(gone)
    mask = next(step for step in method.plan.steps if step.action == "mask").mask
    assert {place for place, index in enumerate(own) if not mask[index].any()} == gone
    assert int((~mask).sum()) == sum(before[own[place]].numel() for place in gone)


def shares(model, layers=(0, 3, 8, 10)):
    """Return the share of columns at zero of every layer of the tests' network."""
    found = {}
    for layer in layers:
        weight = model.net[layer].weight
        found[layer] = float((weight == 0).all(0).double().mean())
    return found


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_every_layer_gives_the_same_share_of_its_columns_and_what_is_gone_stays_at_zero(optimizer, tmp_path):
    class Zeros(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            first = 0
            for layer in (0, 3, 8, 10):
                weight = module.net[layer].weight
                flat = weight.flatten(2) if weight.ndim > 2 else weight[..., None]
                gone = method.gone[first : first + flat.shape[1] * flat.shape[2]].view(flat.shape[1:])
                first += gone.numel()
                states = [v for v in trainer.optimizers[0].state[weight].values() if v.shape == weight.shape]
                assert states
                for tensor in (weight, *states):
                    assert not tensor.reshape(flat.shape)[:, gone].any()
                    assert not gone.any() or tensor.reshape(flat.shape)[:, ~gone].any()

    model = LitNet(optimizer=optimizer, lr=0.01)
    method = IncReg(sparsity=0.5, units="columns")
    fit(method, tmp_path, model, callbacks=[Zeros()], max_epochs=12)
    assert not method.left.any()
    for size, quota in zip((9, 144, 384, 32), method.quota.tolist(), strict=True):
        assert abs(quota - size / 2) <= 1
    dense = LitNet()
    sizes = [dense.net[layer].weight.shape[0] for layer in (0, 3, 8, 10)]
    weights = sum(dense.net[layer].weight.numel() for layer in (0, 3, 8, 10))
    left = sum(count * size for count, size in zip(method.quota.tolist(), sizes, strict=True))
    assert 0.5 * weights <= left < 0.5 * weights + max(sizes)


def test_shares_by_layer_hold_and_other_layers_stay_whole(tmp_path):
    method = IncReg(sparsity={"net.3": 0.25, "net.8": 0.3}, units="columns")
    model, _ = fit(method, tmp_path, max_epochs=6)
    assert method.quota.tolist() == [0, 36, math.ceil(0.3 * 384), 0]
    assert shares(model, (0, 10)) == {0: 0.0, 10: 0.0}


def test_by_pca_every_layer_loses_the_same_energy_and_by_numbers_shares_in_proportion():
    model = LitNet()
    with torch.no_grad():
        model.net[3].weight[:, 1:] = model.net[3].weight[:, :1]  # of rank 9, where 24 were possible
    task = task_of(model)

    def left(ratios):
        removal = IncReg(sparsity=0.5, units="columns", ratios=ratios).removal
        found = removal.look(task)
        leaving = removal.leaving(task, found)
        return [int(leaving[group.units].sum()) for group in removal.groups(found)]

    counts = left("pca")
    lost = []
    for layer, count in zip((0, 3, 8, 10), counts, strict=True):
        matrix = model.net[layer].weight.detach().double().flatten(1).numpy()
        squares = np.linalg.svd(matrix, compute_uv=False)[::-1] ** 2
        tails = np.array([0, *np.cumsum(squares)]) / squares.sum()
        places = np.array([count, count + 1]) / matrix.shape[1] * squares.size
        lost.append(np.interp(places, np.arange(tails.size), tails))
    assert max(low for low, _ in lost) <= min(high for _, high in lost) + 1e-9
    assert counts[1] >= 144 * 15 // 24 > counts[2] * 144 / 384
    first, second = left({"net.3": 1.0, "net.8": 0.5})
    assert first / 144 == pytest.approx(2 * second / 384, abs=1 / 72)
    assert 24 * first + 32 * second >= 0.5 * (24 * 144 + 32 * 384) > 24 * first + 32 * second - 32


# Filters that nobody reads ------------------------------------------------------------------------------------------------------


def network(dimensions, norm):
    """Two convolutions and a classifier in one to three dimensions; two input channels of the second have small weights."""
    torch.manual_seed(3)
    conv, pool = getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"AdaptiveAvgPool{dimensions}d")(1)
    norms = [getattr(nn, f"BatchNorm{dimensions}d")(6)] if norm else []
    net = nn.Sequential(
        conv(2, 6, 2), *norms, nn.ReLU(), conv(6, 5, 2, padding=1), nn.ReLU(), pool, nn.Flatten(), nn.Linear(5, 3)
    )
    with torch.no_grad():
        net[2 + norm].weight[:, [1, 4]] *= 1e-2
    return net


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_filter_leaves_whose_channel_has_lost_all_columns_and_no_other_and_the_outputs_stay(
    dimensions, norm, tmp_path
):
    class Masked(Callback):
        def on_train_end(self, trainer, module):
            self.net = copy.deepcopy(module.net)

    model = Lit(network(dimensions, norm), torch.randn(2, 2, *[5] * dimensions), lambda p: torch.optim.SGD(p, 1e-3))
    second = f"net.{2 + norm}"
    method, masked = IncReg(sparsity={second: 0.4}, units="columns", recalibrate_bn=0), Masked()
    taps = 2**dimensions
    fit(method, tmp_path, model.double(), noise_of(model), callbacks=[masked], max_epochs=16, precision="64-true")
    assert method.quota.tolist()[1] == math.ceil(0.4 * 6 * taps) >= 2 * taps
    whole = [c for c in range(6) if masked.net[2 + norm].weight[:, c].any()]
    assert whole == [0, 2, 3, 5]
    assert model.net[0].weight.shape[0] == model.net[2 + norm].weight.shape[1] == 4
    assert model.net[2 + norm].weight.shape[0] == 5
    x = torch.randn(4, 2, *[5] * dimensions, dtype=torch.float64)
    torch.testing.assert_close(model.net.eval()(x), masked.net.eval()(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(model.net[0].weight, masked.net[0].weight[whole])


def noise_of(model):
    model.example_input_array = model.example_input_array.double()
    return noise(model)


def test_a_channel_with_a_single_column_left_keeps_its_filter(tmp_path):
    model = Lit(network(3, False), torch.randn(2, 2, 5, 5, 5), lambda p: torch.optim.SGD(p, 1e-9))
    with torch.no_grad():
        model.net[2].weight[:, 4, 1, 1, 1] = 1.0  # the last tap in depth
    fit(IncReg(sparsity={"net.2": 15 / 48}, units="columns"), tmp_path, model, noise(model), max_epochs=8)
    assert model.net[0].weight.shape[0] == 5


def test_what_leaves_with_filters_beside_the_target_is_told_where_any_does(caplog):
    for options, told in (({}, True), ({"include": "net.0"}, False)):
        caplog.clear()
        model = LitNet()
        names = [name for name, p in model.named_parameters() if p.ndim > 1]
        answer = explain(model, method=IncReg(sparsity=0.6, units="columns", **options))
        masks = {step.key: step.mask for step in answer.plan.steps if isinstance(step, MaskWeight)}
        if told:
            hidden = masks["net.10.weight"].any(0)  # what the classifier still reads
            lost = int(masks["net.8.weight"][~hidden].sum())
            left = sum(int(masks[name].sum()) for name in names) - lost
            whole = sum(model.get_parameter(name).numel() for name in names)
            assert f"with them {lost} weights beside the masked ones; {left} of {whole} stay" in caplog.text
        assert ("beside the masked ones" in caplog.text) == told


# A fit --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [1, 3])
def test_columns_of_depth_1_train_step_by_step_as_those_of_two_dimensions(dimensions, tmp_path):
    def net(d):
        conv, kernel = getattr(nn, f"Conv{d}d"), (*[1] * (d - 1), 3)
        pool = getattr(nn, f"AdaptiveAvgPool{d}d")(1)
        return nn.Sequential(conv(2, 8, kernel), nn.ReLU(), conv(8, 6, kernel), pool, nn.Flatten(), nn.Linear(6, 3))

    watches, start = [], net(2).state_dict()
    for d in (2, dimensions):
        model = Lit(net(d), torch.zeros(2, 2, *[1] * (d - 1), 9)).double()
        model.net.load_state_dict({name: t.view(model.net.state_dict()[name].shape) for name, t in start.items()})
        method = IncReg(sparsity=0.5, units="columns")
        watches.append(fit(method, tmp_path, model, noise_of(model), max_epochs=4, precision="64-true")[1])
    assert watches[0].gone[-1].any()
    for step in range(17):
        for kind in ("values", "gone"):
            torch.testing.assert_close(*(getattr(watch, kind)[step] for watch in watches), rtol=1e-9, atol=1e-9)
        for name, weight in watches[0].weights[step].items():
            torch.testing.assert_close(watches[1].weights[step][name].view(weight.shape), weight, rtol=1e-8, atol=1e-10)


def test_a_fit_resumed_in_mid_growth_equals_an_unbroken_one_bit_for_bit_and_its_checkpoint_loads(tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    start, options = LitNet(optimizer="Adam", lr=0.01), {"sparsity": 0.6, "units": "columns"}
    once, whole = fit(IncReg(**options), tmp_path, copy.deepcopy(start), callbacks=[Save()], max_epochs=6)
    for epoch in (0, 2, 4):
        method, again = IncReg(**options), LitNet(optimizer="Adam", lr=0.01)
        watch = Watch(method)
        run = trainer(tmp_path, callbacks=[method, watch], max_epochs=6)
        run.fit(again, loader(), loader(32, seed=1), ckpt_path=tmp_path / f"{epoch}.ckpt")
        for kind in ("values", "gone"):
            expected, found = (getattr(w, kind)[-len(watch.values) :] for w in (whole, watch))
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters(), strict=True))
    run.save_checkpoint(tmp_path / "small.ckpt")
    loaded = load_from_checkpoint(LitNet, tmp_path / "small.ckpt")
    x = loader().dataset.x[:4]
    assert torch.equal(loaded.eval()(x), again.eval()(x))


def test_a_second_fit_with_a_target_that_is_met_fine_tunes(tmp_path):
    model, _ = fit(IncReg(sparsity=0.5, units="columns"), tmp_path, max_epochs=4)
    zeros = {name: p == 0 for name, p in model.named_parameters()}
    for again in (
        IncReg(sparsity=0.4, units="columns"),
        IncReg(sparsity={"net.8": 0.3}, units="columns"),
        IncReg(sparsity=0.0, units="columns"),
    ):
        trainer(tmp_path, callbacks=[again], max_epochs=1).fit(model, loader())
        assert all(torch.equal(p == 0, zeros[name]) for name, p in model.named_parameters() if p.ndim > 1)
    further = IncReg(sparsity=0.7, units="columns")
    trainer(tmp_path, callbacks=[further], max_epochs=4).fit(model, loader())
    dense = LitNet()
    layers = [name for name, p in dense.named_parameters() if p.ndim > 1]
    left = sum(int((model.get_parameter(name) != 0).sum()) for name in layers)
    whole = sum(dense.get_parameter(name).numel() for name in layers)
    assert left <= 0.3 * whole


def test_weights_masked_before_stay_masked(tmp_path):
    model = LitNet()
    trainer(tmp_path, callbacks=[Magnitude(sparsity=0.5)], max_epochs=1).fit(model, loader())
    before = {name: p == 0 for name, p in model.named_parameters() if p.ndim > 1}
    method = IncReg(sparsity=0.6, units="columns")
    _, watch = fit(method, tmp_path, model, max_epochs=4)
    assert all((watch.weights[-1][name] == 0)[zero].all() for name, zero in before.items())
    assert sum(int((p == 0).sum()) for p in watch.weights[-1].values() if p.ndim > 1) >= 0.6 * sum(
        zero.numel() for zero in before.values()
    )


# Options ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [{"flops": 0.5}, {"params": 0.5}])
def test_bounds_that_masked_columns_cannot_keep_are_refused_and_the_remedy_named(bound):
    name = next(iter(bound))
    with pytest.raises(OptionError, match=rf"units='columns', {name}=0.5.* Give sparsity=.*units='channels'"):
        IncReg(units="columns", **bound)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": "rows", "sparsity": 0.5}, "units='rows'"),
        ({"units": "columns"}, "exactly one of flops, params, sparsity"),
        ({"units": "columns", "sparsity": 1.0}, r"sparsity=1.0"),
        ({"units": "columns", "sparsity": {"net.0": 2}}, "shares in"),
        ({"units": "columns", "sparsity": 0.5, "min_channels": 0}, "min_channels=0"),
        ({"units": "columns", "sparsity": {"net.0": 0.5}, "ratios": "pca"}, "drop one of them"),
    ],
)
def test_bad_options_raise_at_construction(options, message):
    with pytest.raises(OptionError, match=message):
        IncReg(**options)


def test_targets_out_of_reach_names_of_nothing_and_no_candidates_are_errors_before_training():
    model = LitNet()
    with pytest.raises(BudgetError, match=r"sparsity=0.99\): at most .* Lower sparsity or min_channels"):
        rehearse(model, [IncReg(sparsity=0.99, units="columns", min_channels=8)])
    with pytest.raises(OptionError, match=r"'net\.99' matches no group"):
        rehearse(model, [IncReg(sparsity=0.5, units="columns", ratios={"net.99": 1.0})])
    with pytest.raises(OptionError, match=r"'net\.99' matches no group"):
        rehearse(model, [IncReg(sparsity={"net.99": 0.5}, units="columns")])
    with pytest.raises(ModelError, match="would change nothing"):
        rehearse(model, [IncReg(sparsity={"net.8": 0.0}, units="columns")])


def test_layers_without_columns_of_their_own_are_left_alone_and_say_why():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 1, 1), nn.Conv2d(1, 2, 1))
    net[0].requires_grad_(False)
    model = Lit(net, torch.zeros(2, 3, 5, 5))
    found = IncReg(sparsity=0.5, units="columns").removal.look(task_of(model))
    assert [*found.layouts] == ["net.2.weight"]
    for name, reason in (("net.0", "frozen"), ("net.1", "depthwise"), ("net.3", "single column")):
        assert reason in found.alone[name]
