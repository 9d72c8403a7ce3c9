"""Single weights that leave: exact counts in coordinates of the dense model, masks that hold, dead units that go for good."""

import itertools

import pytest
import torch
from lit import LitNet, loader, trainer
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.nn.utils import parametrizations

from lightning_prune import LowRank, Magnitude, Random, compress, load_from_checkpoint
from lightning_prune.callback import rehearse
from lightning_prune.errors import BudgetError, ModelError, OptionError
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.masks import Masks, cut_masks
from lightning_prune.structure.prunable import prunable_layers

X = torch.randn(2, 1, 8, 8)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


class Net(LitNet):
    def __init__(self, optimizer="sgd"):
        super().__init__()
        self.kind = optimizer

    def configure_optimizers(self):
        return OPTIMIZERS[self.kind](self.parameters())


def weights_of(model):
    return {name: m.weight for name, m in prunable_layers(model).items()}


def zeros(model):
    return sum(int((w == 0).sum()) for w in weights_of(model).values())


def entries(model):
    return sum(w.numel() for w in weights_of(model).values())


def fit(model, callbacks, folder, ckpt_path=None, **options):
    run = trainer(folder, callbacks=callbacks, **options)
    run.fit(model, loader(), loader(32, seed=1), ckpt_path=ckpt_path)
    return run


class Watch(Callback):
    """Notes how many weights are zero after every optimizer step, and how far optimizer states at these places are from zero."""

    def __init__(self):
        self.counts, self.states = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.counts.append(zeros(module))
        masks = cut_masks(module, plan_of(module))
        for optimizer in trainer.optimizers:
            for name, mask in masks.items():
                for value in optimizer.state[module.get_parameter(name)].values():
                    if value.shape == mask.shape:
                        self.states.append(float(value[~mask].abs().max()) if (~mask).any() else 0.0)


class Saver(Callback):
    """Writes a checkpoint at the end of epoch 20."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 20:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("scope", ["global", "uniform", "erk", "lamp"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.987])
def test_exactly_the_share_asked_for_leaves(scope, sparsity):
    model = LitNet()
    small, plan = compress(model, Magnitude(sparsity=sparsity, scope=scope, remove_dead=False), X)
    assert zeros(small) == round(sparsity * entries(model))
    assert {step.action for step in plan.steps} == {"mask"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masked_weights_and_their_moments_stay_exactly_zero_for_a_hundred_steps_and_after_resume(optimizer, tmp_path):
    method, watch = Magnitude(sparsity=0.7, remove_dead=False), Watch()
    model = Net(optimizer)
    run = fit(model, [method, watch, Saver(tmp_path / "after20.ckpt")], tmp_path, max_epochs=25)
    expected = round(0.7 * entries(model))
    assert run.global_step >= 100
    assert set(watch.counts) == {expected}
    assert max(watch.states) == 0
    again, later = Net(optimizer), Watch()
    resumed = [Magnitude(sparsity=0.7, remove_dead=False), later]
    fit(again, resumed, tmp_path, ckpt_path=str(tmp_path / "after20.ckpt"), max_epochs=25)
    assert later.counts
    assert set(later.counts) == {expected}
    assert max(later.states) == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("schedule", ["linear", "cubic"])
def test_a_schedule_in_five_steps_ends_at_exactly_the_target_and_masks_are_nested(schedule, tmp_path):
    watch, model = Watch(), LitNet()
    dense = entries(model)
    method = Magnitude(sparsity=0.9, until_epoch=5, schedule=schedule, remove_dead=False)
    fit(model, [method, watch], tmp_path, max_epochs=6)
    per_epoch = len(watch.counts) // 6
    counts = watch.counts[::per_epoch]
    shares = [(e + 1) / 5 if schedule == "linear" else 1 - (1 - (e + 1) / 5) ** 3 for e in range(5)]
    assert counts == [*(round(round(0.9 * dense) * share) for share in shares), round(0.9 * dense)]
    assert all(a <= b for a, b in itertools.pairwise(watch.counts))
    assert zeros(model) == round(0.9 * dense)


def test_targets_refer_to_the_dense_model_across_stages(tmp_path):
    model = LitNet()
    dense = entries(model)
    channels, _ = compress(model, Magnitude(structured=True, params=0.6, align=1), X)
    gone = dense - entries(channels)
    assert 0 < gone < 0.9 * dense
    small, plan = compress(channels, Magnitude(sparsity=0.9, remove_dead=False), X)
    assert zeros(small) + gone == round(0.9 * dense)
    more, _ = compress(small, Magnitude(sparsity=0.95, remove_dead=False), X)
    assert zeros(more) + gone == round(0.95 * dense)
    assert all((more.get_parameter(f"{k}.weight")[w == 0] == 0).all() for k, w in weights_of(small).items())
    same, plan = compress(small, Random(sparsity=0.9), X)
    assert plan == plan_of(small)
    assert zeros(same) == zeros(small)


def test_dead_units_leave_and_the_checkpoint_replays(tmp_path):
    model = LitNet()
    run = fit(model, [Magnitude(sparsity=0.97)], tmp_path)
    assert entries(model) < entries(LitNet())
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in LitNet().parameters())
    masks = cut_masks(model, plan_of(model))
    assert all((model.get_parameter(k)[~m] == 0).all() for k, m in masks.items())
    run.save_checkpoint(tmp_path / "small.ckpt")
    again = load_from_checkpoint(LitNet, tmp_path / "small.ckpt")
    assert torch.equal(again.eval()(X), model.eval()(X))
    assert not any("orig" in key or "mask" in key for key in again.state_dict())


def test_dead_units_leave_after_a_gradual_fit_without_a_change_of_outputs(tmp_path):
    class Before(Callback):
        def on_train_end(self, trainer, module):
            self.outputs = module.eval()(X).detach()

    model, before = LitNet(), Before()
    fit(model, [Magnitude(sparsity=0.97, until_epoch=2, recalibrate_bn=0), before], tmp_path, max_epochs=3)
    assert entries(model) < entries(LitNet())
    torch.testing.assert_close(model.eval()(X), before.outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
def test_dead_units_change_nothing_of_a_trained_network_in_either_mode(sparsity, tmp_path):
    """Also after batch normalization has got the statistics of the masked network; a dead unit is another constant with those of the dense one."""
    model = LitNet()
    fit(model, [], tmp_path, max_epochs=4)

    def loss(network, batch):
        return nn.functional.cross_entropy(network(batch[0]), batch[1])

    method = {"sparsity": sparsity, "scope": "uniform"}
    masked, _ = compress(model, Magnitude(**method, remove_dead=False), X, data=loader(), loss=loss)
    small, _ = compress(model, Magnitude(**method), X, data=loader(), loss=loss)
    assert entries(small) < entries(masked)
    x = torch.randn(8, 1, 8, 8)
    for mode in (False, True):
        torch.testing.assert_close(small.train(mode)(x), masked.train(mode)(x), rtol=1e-4, atol=1e-4)


def test_stages_of_weights_and_factors_compose():
    model = LitNet()
    factors, _ = compress(model, LowRank(flops=0.7, align=1), X)
    small, plan = compress(factors, Magnitude(sparsity=0.5, remove_dead=False), X)
    gone = entries(model) - entries(factors)
    assert gone > 0
    assert zeros(small) + gone == round(0.5 * entries(model))
    plan.build(LitNet())


def test_frozen_and_computed_weights_and_embeddings_are_left_alone_with_reasons():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.frozen, self.normed = nn.Linear(8, 8), parametrizations.weight_norm(nn.Linear(8, 8))
            self.tied, self.plain = nn.Linear(8, 8), nn.Linear(8, 8)
            self.frozen.weight.requires_grad_(False)
            self.tied.weight = self.plain.weight

        def forward(self, x):
            return self.tied(self.plain(self.normed(self.frozen(self.embedding(x)))))

    _, plan = compress(Mixed(), Magnitude(sparsity=0.5, remove_dead=False), torch.arange(4).view(2, 2))
    assert [(step.module, int(step.mask.sum())) for step in plan.steps] == [("tied", 32)]
    assert plan.left_alone["frozen"] == "it is frozen"
    assert "remove_parametrizations" in plan.left_alone["normed"]


def test_what_cannot_be_is_refused_at_once():
    for value in (1.0, -0.1, "half", True, None, {"net.0": 0.5}):
        with pytest.raises(OptionError, match="sparsity="):
            Magnitude(sparsity=value)
    for options in ({"scope": "local"}, {"min_kept": -1}, {"remove_dead": 1}, {"flops": 0.5}):
        with pytest.raises(OptionError):
            Magnitude(**{"sparsity": 0.5, **options})
    with pytest.raises(BudgetError, match="min_kept=41"):
        compress(LitNet(), Magnitude(sparsity=0.99, min_kept=41), X)
    with pytest.raises(ModelError, match="complex numbers"):
        compress(
            nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)),
            Magnitude(sparsity=0.5),
            torch.zeros(2, 4, dtype=torch.complex64),
        )
    with pytest.raises(ModelError, match="no layer that it could compress"):
        compress(nn.Sequential(nn.BatchNorm2d(1), nn.ReLU()), Magnitude(sparsity=0.5), X)
    with pytest.raises(OptionError, match="matches no layer"):
        rehearse(LitNet(), [Magnitude(sparsity=0.5, include="head")])
    broken = LitNet()
    with torch.no_grad():
        broken.net[0].weight[0] = float("nan")
    with pytest.raises(ModelError, match=r"scores of 'net.0.weight' are not finite"):
        compress(broken, Magnitude(sparsity=0.5), X)


def test_a_share_of_zero_is_a_no_op_that_says_so(caplog):
    model = LitNet()
    with caplog.at_level("INFO"):
        small, plan = compress(model, Magnitude(sparsity=0.0), X)
    assert zeros(small) == 0
    assert not plan.steps


def test_the_same_mask_of_two_stages_is_held_once():
    model, _ = compress(LitNet(), Magnitude(sparsity=0.5, remove_dead=False), X)
    more, plan = compress(model, Magnitude(sparsity=0.8, remove_dead=False), X)
    assert len(Masks(more, plan)) == len(weights_of(more))


def test_random_weights_follow_the_seed_and_the_densities_of_another_method(tmp_path):
    one, two, three = (compress(LitNet(), Random(sparsity=0.6, seed=s, remove_dead=False), X)[1] for s in (1, 1, 2))
    assert one.steps == two.steps != three.steps
    _, plan = compress(LitNet(), Magnitude(sparsity=0.6, remove_dead=False), X)
    wanted = {step.module: int(step.mask.sum()) for step in plan.steps}
    model = LitNet()
    fit(model, [Magnitude(sparsity=0.6, remove_dead=False)], tmp_path).save_checkpoint(tmp_path / "other.ckpt")
    wanted = {name.removesuffix(".weight"): int(m.sum()) for name, m in cut_masks(model, plan_of(model)).items()}
    _, shuffled = compress(LitNet(), Random(sparsity=0.6, densities=str(tmp_path / "other.ckpt"), remove_dead=False), X)
    assert {step.module: int(step.mask.sum()) for step in shuffled.steps} == pytest.approx(wanted, abs=1)
    with pytest.raises(OptionError, match=r"'nowhere' matches no layer"):
        compress(LitNet(), Random(sparsity=0.6, densities={"nowhere": 0.5}), X)
    with pytest.raises(OptionError, match="densities"):
        Random(sparsity=0.6, densities={"net.0": 2})


def test_a_tensor_that_loses_all_its_weights_is_named(caplog):
    compress(LitNet(), Magnitude(sparsity=0.97), X)
    assert "leaves no weight of 'net.8.weight'" in caplog.text
    caplog.clear()
    compress(LitNet(), Magnitude(sparsity=0.9, min_kept=1), X)
    assert "leaves no weight" not in caplog.text
