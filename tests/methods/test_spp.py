"""SPP: probabilities against a naive twin and closed forms, masks against their rate, absent channels against a step without them."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from lit import LitNet, loader, trainer
from networks import resnet18
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.plugins import Precision
from torch import nn

from lightning_prune.errors import OptionError, TrainerError
from lightning_prune.methods.spp import SPP, Absence, absent, grown
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.groups import find_units
from lightning_prune.structure.trials import try_sizes

# Probabilities ------------------------------------------------------------------------------------------------------------------


def update(p, keys, leave, strength=0.05, clip=1.0):
    """Update one layer, of which ``leave`` channels leave."""
    gone = p == 1
    ranks = keys.double().masked_fill(gone, math.inf).argsort(stable=True).argsort()
    missing, live = (torch.tensor(n).expand(len(p)) for n in (leave - int(gone.sum()), int((~gone).sum())))
    return grown(p, ranks, missing, live, strength, clip)


def simulate(counts, leave, noise, averaged=True, clip=1.0, limit=300):
    """Update many layers side by side, with scores that noise blurs, until all that shall have left.

    Returns updates, how many left and how many of these are the smallest, ``[layers]`` each.
    """
    draw = np.random.default_rng(0)
    true = torch.from_numpy(draw.random((len(counts), max(counts))) + 0.1)
    true[torch.arange(max(counts)) >= torch.tensor(counts)[:, None]] = math.inf
    leave, p = torch.tensor(leave)[:, None], torch.zeros_like(true)
    means, updates = torch.zeros_like(true), torch.zeros(len(counts), dtype=torch.int64)
    for step in range(1, limit + 1):
        gone, padding = p == 1, true.isinf()
        scores = true * (1 + noise * torch.from_numpy(draw.standard_normal(true.shape)))
        means += (places(scores.masked_fill(gone, -math.inf).masked_fill(padding, math.inf)) - means) / step
        ranks = places((means if averaged else scores).masked_fill(gone, math.inf).masked_fill(padding, math.inf))
        missing, live = leave - gone.sum(1, keepdim=True), (~gone & ~padding).sum(1, keepdim=True)
        updates += missing[:, 0] > 0
        p = grown(p, ranks, missing.expand(p.shape), live.expand(p.shape), 0.05, clip)
        assert bool(((p == 1).sum(1, keepdim=True) <= leave).all())
    smallest = places(true) < leave
    return updates, (p == 1).sum(1), ((p == 1) & smallest).sum(1)


def places(keys):
    """Return the rank of every entry in its row."""
    return keys.argsort(dim=1, stable=True).argsort(dim=1)


def twin(p, keys, leave, strength):
    """One update, channel by channel, in plain Python."""
    live = [i for i in range(len(p)) if p[i] < 1]
    missing = leave - (len(p) - len(live))
    alpha = math.log(8) / missing
    found = list(p)
    for rank, i in enumerate(sorted(live, key=lambda i: (keys[i], i))):
        if rank <= 2 * missing / 3:
            delta = strength * math.exp(-alpha * rank)
        else:
            delta = strength / 2 - strength * math.exp(-alpha * (4 * missing / 3 - rank))
        found[i] = min(1.0, max(0.0, p[i] + max(delta, -strength)))
    return found


def test_an_update_is_the_formula_written_out():
    draw = np.random.default_rng(0)
    for count, leave in ((5, 1), (8, 7), (64, 32), (33, 4)):
        p = torch.zeros(count, dtype=torch.float64)
        while int((p == 1).sum()) < leave:
            keys = torch.from_numpy(draw.integers(0, 6, count) + np.arange(count) // 2)  # with ties
            expected = twin(p.tolist(), keys.tolist(), leave, 0.07)
            p = update(p, keys, leave, 0.07)
            assert p.tolist() == pytest.approx(expected, abs=1e-9)
        assert torch.equal(update(p, keys, leave, 0.07), p)  # all have left: nothing changes any more


@pytest.mark.parametrize("strength", [0.05, 0.1, 0.3, 1 / 7])
def test_the_smallest_channel_leaves_after_one_over_a_updates_and_never_turns_back(strength):
    p, keys, seen = torch.zeros(16, dtype=torch.float64), torch.arange(16.0), [0.0]
    while p[0] < 1:
        p = update(p, keys, 8, strength)
        seen.append(float(p[0]))
    assert seen == sorted(seen)
    assert len(seen) - 1 == math.ceil(round(1 / strength, 9))


def test_channels_beyond_the_rank_that_leaves_never_gain():
    p = update(torch.full((32,), 0.5, dtype=torch.float64), torch.arange(32), 9)
    assert (p[:9] > 0.5).all()
    assert float(p[9]) == pytest.approx(0.5, abs=1e-15)
    assert (p[10:] < 0.5).all()
    assert p.min() >= 0.45


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_a_hundred_noisy_runs_land_on_the_target_and_never_above(noise):
    draw = np.random.default_rng(7)
    counts = draw.integers(4, 129, 100).tolist()
    leave = [int(draw.integers(1, count)) for count in counts]
    updates, gone, smallest = simulate(counts, leave, noise)
    assert gone.tolist() == leave
    share = float(smallest.sum() / gone.sum())
    print(
        f"noise {noise}: {updates.min()} to {updates.max()} updates, median {updates.median()}, {share:.1%} the smallest"
    )
    assert updates.min() >= 20
    assert updates.max() < 200
    assert share > (0.999 if noise == 0 else 0.97)


def test_without_averages_and_clip_noise_stalls_what_ends_without_noise():
    layers = [64] * 20, [32] * 20
    official = {"averaged": False, "clip": None}
    for options in ({}, official):
        updates, gone, _ = simulate(*layers, 0.0, **options)
        assert updates.unique().tolist() == [99]  # the figure of an independent simulation
        assert gone.unique().tolist() == [32]
    for noise in (0.1, 0.3):
        assert bool((simulate(*layers, noise, limit=1000, **official)[1] < 32).all())
        updates, gone, _ = simulate(*layers, noise)
        assert gone.unique().tolist() == [32]
        assert updates.max() < 150


# Masks --------------------------------------------------------------------------------------------------------------------------


def test_channels_are_absent_as_often_as_their_probability_says():
    p, steps = np.array([0.0, 1e-3, 0.25, 0.5, 0.9, 1.0]), 20000
    rate = np.mean([absent(p, 3, "net.0", step) for step in range(steps)], 0)
    assert (abs(rate - p) <= 4 * np.sqrt(p * (1 - p) / steps)).all()


def test_draws_of_channels_groups_steps_and_seeds_are_independent():
    keys = ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a", 2))
    table = 2.0 * np.array([absent(np.full(400, 0.5), *key) for key in keys]) - 1
    shared = table @ table.T / 400 - np.eye(len(keys))
    assert abs(shared).max() < 4 / 400**0.5


@pytest.mark.exhaustive
def test_another_process_draws_the_same():
    code = (
        "import numpy as np; from lightning_prune.methods.spp import absent; np.random.seed(77); "
        "print([absent(np.linspace(0, 1, 40), 5, g, s).tolist() for g in 'abc' for s in (0, 10**9)])"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    p = np.linspace(0, 1, 40)
    assert other.strip() == str([absent(p, 5, g, s).tolist() for g in "abc" for s in (0, 10**9)])


# Absence ------------------------------------------------------------------------------------------------------------------------


def absence_of(model, *inputs):
    calls = as_calls(inputs)
    structure = try_sizes(model, calls, find_units(model, calls))
    return Absence(model, structure), structure


def snapshot(model, optimizer):
    found = {name: value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        found |= {f"{name}:{key}": v.clone() for key, v in state.items() if torch.is_tensor(v) and v.ndim}
    return found


def network():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_leaves_absent_channels_bit_for_bit_and_moves_the_others(kind):
    torch.manual_seed(0)
    model = network().double()
    absence, structure = absence_of(model, torch.randn(2, 1, 6, 6).double())
    optimizer = OPTIMIZERS[kind](model.parameters())
    x, y = torch.randn(7, 1, 6, 6).double(), torch.randint(0, 5, (7,))
    away = np.zeros(structure.count, bool)
    for step in range(4):
        before = snapshot(model, optimizer)
        away[:] = np.random.default_rng(step).random(structure.count) < 0.4
        absence.begin(away)
        nn.functional.cross_entropy(model(x), y).backward()
        absence.on_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        absence.end(optimizer)
        after, moved = snapshot(model, optimizer), 0
        for name, values in after.items():
            tensor, old = name.partition(":")[0], before.get(name, torch.zeros_like(values))
            same = torch.zeros(values.shape, dtype=torch.bool)
            for slot in structure.by_tensor.get(tensor, ()):
                if slot.zeroed or "running" in tensor:
                    same |= torch.from_numpy(slot.along(np.append(away, False)[slot.units], values.ndim))
            assert torch.equal(values[same], old[same]), name
            moved += int((values[~same] != old[~same]).sum())
        assert moved > 0
    assert not absence.under_way


def test_the_step_is_that_of_the_network_without_the_channels():
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)).double()
    small = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 16, 3)).double()
    stay = torch.tensor([0, 3])
    columns = (stay[:, None] * 16 + torch.arange(16)).flatten()
    state = {
        name: v[stay] if v.ndim and name != "4.bias" else v
        for name, v in whole.state_dict().items()
        if name != "4.weight"
    }
    small.load_state_dict(state | {"4.weight": whole[4].weight[:, columns]})
    absence, structure = absence_of(whole, torch.randn(2, 1, 6, 6).double())
    rows = next(slot.units for slot in structure.by_tensor["0.weight"] if slot.axis == 0)
    absence.begin(np.isin(np.arange(structure.count), rows[[1, 2]]))
    x, y = torch.randn(5, 1, 6, 6).double(), torch.randint(0, 3, (5,))
    results = []
    for model in (whole, small):
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if model is whole:
            absence.on_gradients(optimizer)
        optimizer.step()
        results.append(float(loss.detach()))
    absence.end()
    assert results[0] == pytest.approx(results[1], rel=1e-12)
    for name, value in small.state_dict().items():
        mine = whole.state_dict()[name]
        mine = mine[:, columns] if name == "4.weight" else mine[stay] if mine.ndim and name != "4.bias" else mine
        torch.testing.assert_close(mine, value, rtol=1e-12, atol=1e-12)


def test_the_mean_output_is_the_share_of_steps_in_which_a_unit_is_there():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)).double()
    absence, structure = absence_of(model, torch.randn(2, 3).double())
    x, p = torch.randn(6, 3).double(), torch.tensor([0.0, 0.2, 0.5, 0.9]).double()
    units = next(slot.units for slot in structure.by_tensor["0.weight"] if slot.axis == 0)
    inner, steps, total = model[0](x).detach(), 4000, 0.0
    expected = (inner * (1 - p)) @ model[1].weight.detach().T
    for step in range(steps):
        away = np.zeros(structure.count, bool)
        away[units] = absent(p.numpy(), 0, "0", step)
        absence.begin(away)
        with torch.no_grad():
            total = total + model(x)
        absence.end()
    spread = ((inner**2 * p * (1 - p)) @ (model[1].weight.detach().T ** 2) / steps).sqrt()
    assert bool(((total / steps - expected).abs() <= 4 * spread).all())


def test_absence_of_nothing_changes_nothing():
    model = resnet18(10, 8)
    absence, structure = absence_of(model, torch.randn(2, 3, 32, 32))
    versions = {name: (value.clone(), value._version) for name, value in model.state_dict().items()}
    absence.begin(np.zeros(structure.count, bool))
    assert not absence.under_way
    absence.end()
    assert all(torch.equal(v, versions[n][0]) and v._version == versions[n][1] for n, v in model.state_dict().items())


def test_all_slices_of_a_unit_are_absent_together():
    torch.manual_seed(0)
    model = resnet18(10, 8).double().eval()
    absence, structure = absence_of(model, torch.randn(2, 3, 32, 32).double())
    away = np.random.default_rng(0).random(structure.count) < 0.5
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias)
            module.register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out))
    absence.begin(away)
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32).double())
    absence.end()
    for name, output in seen.items():
        slot = structure.by_tensor[f"{name}.weight"][0]
        silent = (output == 0).all((0, 2, 3)) if output.shape[2] > 1 else (output == 0).all(0).flatten()
        assert silent.tolist() == away[slot.units].tolist(), name


# The fit ------------------------------------------------------------------------------------------------------------------------


def fit(method, tmp_path, model=None, **options):
    torch.manual_seed(0)
    model = model or LitNet()
    trainer(tmp_path, **({"callbacks": [method], "max_epochs": 10} | options)).fit(model, loader())
    return model


def test_a_fit_lands_on_the_bound_and_removes_what_was_at_zero(tmp_path):
    class End(Callback):
        def on_train_end(self, trainer, module):
            self.masked = copy.deepcopy(module.net).eval()
            self.gone, self.values = method.gone.clone(), method.values.clone()

    method, end = SPP(sparsity=0.5, align=1, recalibrate_bn=0), End()
    model = fit(method, tmp_path, LitNet().double(), callbacks=[method, end], precision="64-true")
    assert [model.net[i].weight.shape[0] for i in (0, 3, 8)] == [8, 12, 16]
    assert set(end.values.tolist()) == {0.0, 1.0}
    assert torch.equal(end.values == 1, end.gone)
    x = loader().dataset.x.double()
    torch.testing.assert_close(model.eval()(x), end.masked(x), rtol=1e-9, atol=1e-9)


class Absences(Callback):
    """Stands behind SPP: of every batch what is absent in it, and all weights, buffers and moments before and after."""

    def __init__(self, method):
        self.method, self.records = method, []

    def on_train_start(self, trainer, module):
        self.last = snapshot(module, trainer.optimizers[0])

    def on_train_batch_start(self, trainer, module, *_):
        names = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        self.away = [(names[id(tensor)], axis, index) for tensor, axis, index, _ in self.method._absence._away]
        self.steps = trainer.global_step

    def on_train_batch_end(self, trainer, module, *_):
        now = snapshot(module, trainer.optimizers[0])
        self.records.append((self.steps, self.away, self.last, now))
        self.last = now


@pytest.mark.parametrize(("kind", "options"), [("SGD", {}), ("AdamW", {"accumulate_grad_batches": 2})])
def test_what_is_absent_from_a_step_is_the_same_after_it_to_the_bit(kind, options, tmp_path):
    class Undecided(SPP):
        def drop(self, units):
            """Prune nothing: what is pruned in a step is at zero after it."""

    method = Undecided(sparsity=0.5, align=1)
    look, seen, draws = Absences(method), 0, {}
    fit(method, tmp_path, LitNet(optimizer=kind), callbacks=[method, look], **options)
    for step, away, before, after in look.records:
        drawn = [(name, index.tolist()) for name, _, index in away]
        assert draws.setdefault(step, drawn) == drawn  # one draw for all batches of a step
        for name, axis, index in away:
            for key in (key for key in after if key == name or key.startswith(f"{name}:")):
                old = before.get(key, torch.zeros_like(after[key]))
                assert torch.equal(after[key].index_select(axis, index), old.index_select(axis, index))
                seen += 1
    assert seen > 100
    assert len({str(drawn) for drawn in draws.values()}) > 5


def test_before_the_first_update_a_fit_is_one_without_spp_to_the_bit(tmp_path):
    class Early(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 7:
                ends.append(snapshot(module, trainer.optimizers[0]))

    ends = []
    for methods in ([], [SPP(sparsity=0.5, align=1, every_n_steps=8, max_updates=1)]):
        fit(None, tmp_path, callbacks=[*methods, Early()], max_epochs=2)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_validation_and_checkpoints_see_the_stored_weights(tmp_path):
    class Look(Callback):
        looks = 0

        def on_validation_batch_start(self, trainer, module, *_):
            if trainer.sanity_checking:
                return
            assert not method._absence.under_way
            live = method.slices.scores()[~method.gone]
            assert bool((live > 0).all())
            self.looks += 1

        def on_save_checkpoint(self, trainer, module, checkpoint):
            assert all(torch.equal(v, module.state_dict()[n]) for n, v in checkpoint["state_dict"].items())
            if method.steps < 40:
                self.on_validation_batch_start(trainer, module)

    method, look = SPP(sparsity=0.5, align=1), Look()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    model = LitNet()
    trainer(
        tmp_path, callbacks=[saver, method, look], max_epochs=10, val_check_interval=1, enable_checkpointing=True
    ).fit(model, loader(), loader())
    assert look.looks > 100


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["training_step", "optimizer_step"])
def test_an_error_within_a_step_loses_nothing(error, place, tmp_path):
    class Broken(LitNet):
        def stop(self, where):
            if where == place and method.steps == 12:
                assert method._absence.under_way
                raise error("stop")

        def training_step(self, batch, index):
            self.stop("training_step")
            return super().training_step(batch, index)

        def on_before_zero_grad(self, optimizer):
            self.stop("optimizer_step")

    method, model = SPP(sparsity=0.5, align=1), Broken()
    look = Absences(method)
    with pytest.raises((error, SystemExit)):
        fit(method, tmp_path, model, callbacks=[method, look])
    assert method._absence is None
    assert all(torch.equal(p, look.last[name]) for name, p in model.named_parameters())


def test_a_module_that_skips_the_rest_of_an_epoch_keeps_its_weights(tmp_path):
    class Leaving(LitNet):
        def on_train_batch_start(self, batch, index):
            if method.steps >= 12:
                assert method._absence.under_way
                return -1

    class Ends(Callback):
        def on_train_epoch_end(self, trainer, module):
            assert not method._absence.under_way

    method = SPP(sparsity=0.5, align=1)
    fit(method, tmp_path, Leaving(), callbacks=[method, Ends()])
    assert method.steps == 12


class Skipping(Precision):
    """Does not step in every third batch, as a gradient scaler that met an overflow."""

    count = 0

    def optimizer_step(self, optimizer, model, closure, **options):
        result = closure()
        self._after_closure(model, optimizer)
        self.count += 1
        if self.count % 3:
            optimizer.step(**options)
        return result


def test_what_a_layer_draws_does_not_depend_on_which_other_layers_take_part(tmp_path):
    class Even(SPP):
        def start(self):
            self.drawn = []
            self.values.fill_(0.5)
            self._note_chances()
            begin = self._absence.begin
            self._absence.begin = lambda away: (self._note(away), begin(away))

        def _note(self, away):
            self.drawn.append({group.name: away[group.units] for group in self._found.groups})

        def grow(self):
            pass

    drawn = {}
    for name, options in {"all": {}, "some": {"exclude": ["net.0"]}, "seed": {"seed": 1}}.items():
        fit(method := Even(sparsity=0.5, align=1, every_n_steps=1, max_updates=2, **options), tmp_path, max_epochs=2)
        drawn[name] = method.drawn
    assert [*drawn["some"][0]] == ["net.3", "net.8"]
    for one, other, third in zip(*drawn.values(), strict=True):
        for layer in other:
            assert (one[layer] == other[layer]).all()
            assert 0 < other[layer].sum() < other[layer].size
            assert (one[layer] != third[layer]).any()


def test_a_skipped_step_counts_for_nothing_and_loses_nothing(tmp_path):
    method = SPP(sparsity=0.5, align=1, every_n_steps=1, max_updates=20, strength=0.2)
    look = Absences(method)
    fit(method, tmp_path, callbacks=[method, look], plugins=[Skipping()])
    assert method.updates == 40 - 40 // 3
    skipped = look.records[2::3]
    assert sum(bool(away) for _, away, *_ in skipped) > 3
    for _, away, before, after in skipped:
        moving = [name for name in after if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
        assert all(torch.equal(v, before[name]) for name, v in after.items() if name not in moving)
        for name, axis, index in away:
            assert torch.equal(after[name].index_select(axis, index), before[name].index_select(axis, index))


@pytest.mark.parametrize("stop", [12, 28])
def test_a_resumed_fit_is_the_uninterrupted_one_to_the_bit(stop, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "part.ckpt")

    ends = []
    for seed, resume in ((1, None), (2, tmp_path / "part.ckpt")):
        torch.manual_seed(seed)
        model = LitNet(optimizer="AdamW")
        callbacks = [SPP(sparsity=0.5, align=1), *([] if resume else [Save()])]
        trainer(tmp_path, callbacks=callbacks, max_epochs=10).fit(model, loader(), ckpt_path=resume)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items() if torch.is_tensor(value))


def test_the_official_form_lands_on_the_target_too(tmp_path):
    model = fit(SPP(sparsity=0.5, align=1, official=True, strength=0.2, max_updates=30), tmp_path)
    assert [model.net[i].weight.shape[0] for i in (0, 3, 8)] == [8, 12, 16]


def test_clips_of_one_frame_are_images_step_by_step(tmp_path):
    class Clips(LitNet):
        def __init__(self):
            super().__init__()
            flat = copy.deepcopy(self.net)
            self.net = nn.Sequential(
                *[
                    nn.Conv3d(m.in_channels, m.out_channels, (1, 3, 3), (1, *m.stride), (0, 1, 1), bias=False)
                    if isinstance(m, nn.Conv2d)
                    else nn.BatchNorm3d(m.num_features)
                    if isinstance(m, nn.BatchNorm2d)
                    else m
                    for m in flat
                ]
            )
            self.example_input_array = torch.zeros(2, 1, 1, 8, 8)

        def training_step(self, batch, index):
            return super().training_step((batch[0][:, :, None], batch[1]), index)

    start, found = LitNet().double(), []
    for model in (copy.deepcopy(start), Clips().double()):
        model.load_state_dict({n: v.view(model.state_dict()[n].shape) for n, v in start.state_dict().items()})
        method = SPP(sparsity=0.5, align=1)
        fit(method, tmp_path, model, precision="64-true")
        found.append((dict(model.named_parameters()), torch.from_numpy(method.history())))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name].view(value.shape), value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1][1], found[0][1])


# Options ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of flops, params, sparsity"),
        ({"flops": 0.5, "strength": 0}, "strength=0"),
        ({"flops": 0.5, "strength": 1.5}, "strength=1.5"),
        ({"flops": 0.5, "strength": "big"}, "strength='big'"),
        ({"flops": 0.5, "every_n_steps": 0}, "every_n_steps"),
        ({"flops": 0.5, "max_updates": 0}, "max_updates"),
        ({"flops": 0.5, "official": 1.5}, "official"),
        ({"flops": 0.5, "seed": -1}, "seed"),
    ],
)
def test_bad_options_raise_at_construction(options, message):
    with pytest.raises(OptionError, match=message):
        SPP(**options)


def test_too_few_planned_steps_are_told_before_training_with_the_number(tmp_path):
    model, method = LitNet(), SPP(sparsity=0.5, align=1, strength=0.2, every_n_steps=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainerError, match=r"SPP needs at least \d+ optimizer steps.*plans 40") as caught:
        fit(method, tmp_path, model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    needed = int(str(caught.value).partition("at least ")[2].split()[0].replace(",", ""))
    assert needed % 3 == 0
    method = SPP(sparsity=0.5, align=1, strength=0.2, every_n_steps=3)
    fit(method, tmp_path, LitNet(), max_steps=needed, max_epochs=-1)
    assert method.plan.steps


def test_a_fit_without_a_planned_end_needs_a_pace_and_keeps_to_it(tmp_path):
    model, endless = LitNet(), {"max_epochs": -1, "max_time": {"seconds": 20}}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainerError, match=r"no planned number of steps.*Give max_steps, or every_n_steps"):
        fit(SPP(sparsity=0.5, align=1), tmp_path, model, **endless)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            trainer.should_stop = method.over

    method = SPP(sparsity=0.5, align=1, every_n_steps=2)
    run = trainer(tmp_path, callbacks=[method, Stop()], **endless)
    run.fit(model, loader())
    assert run.global_step <= 2 * method.numbers["max_updates"]
    assert [model.net[layer].weight.shape[0] for layer in (0, 3, 8)] == [8, 12, 16]


def test_options_build_the_same_callback_again():
    method = SPP(flops=0.5, strength=0.1, official=True, ratios={"net.*": 1.0}, seed=3)
    assert SPP(**method.options()).options() == method.options()
