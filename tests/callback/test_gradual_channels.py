"""Channels that are masked step by step while a model trains, and leave when the fit has ended."""

import copy
import csv
import itertools
import logging

import pytest
import torch
from lit import LitNet, body, loader, trainer
from pytorch_lightning.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from lightning_prune import TRP, LowRank, Magnitude, Random, count_flops, load_from_checkpoint
from lightning_prune.callback import rehearse
from lightning_prune.errors import BudgetError, ModelError, TrainerError
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.surgery import mask_

X = torch.zeros(2, 1, 8, 8)
LAYERS = {0: 16, 3: 24, 8: 32}  # of the tests' network: channels that can leave
CHANNELS = 72


def fit(model, callbacks, folder, **options):
    run = trainer(folder, callbacks=callbacks, **options)
    run.fit(model, loader(), loader(32, seed=1))
    return run


def alive(model):
    """Which channels of the tests' network are not all zero in what writes them, by layer."""
    return {layer: model.net[layer].weight.flatten(1).any(1) for layer in LAYERS}


class Watch(Callback):
    """Notes which channels are alive after the first and the last batch of every epoch, and the dense-shaped model at the end."""

    def __init__(self):
        self.epochs = []
        self.masked = None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx in (0, trainer.num_training_batches - 1):
            self.epochs.append(alive(module))

    def on_train_end(self, trainer, module):
        self.masked = copy.deepcopy(module.net)


def width(kept):
    return sum(int(stays.sum()) for stays in kept.values())


@pytest.mark.parametrize(
    ("schedule", "expected"), [("linear", [64, 57, 50, 43, 36, 36]), ("cubic", [54, 43, 38, 36, 36, 36])]
)
def test_five_steps_to_one_half_end_at_one_half(schedule, expected, tmp_path):
    """Of 72 channels, 36 + floor((1 - share) * 36) stay: shares 1/5, 2/5, ... and 1 - (1 - 1/5)^3, ..."""
    watch, method = Watch(), Magnitude(structured=True, sparsity=0.5, align=1, until_epoch=5, schedule=schedule)
    model = LitNet()
    fit(model, [method, watch], tmp_path, max_epochs=6)
    first, last = watch.epochs[::2], watch.epochs[1::2]
    assert [width(kept) for kept in first] == [width(kept) for kept in last] == expected
    for before, after in itertools.pairwise(first):
        assert all(not (after[layer] & ~before[layer]).any() for layer in LAYERS)  # what has left stays away
    assert [model.net[layer].weight.shape[0] for layer in LAYERS] == [int(k.sum()) for k in last[-1].values()]


@pytest.mark.parametrize("method", [Magnitude, Random])
@pytest.mark.parametrize("name", ["flops", "params"])
def test_a_gradual_run_ends_as_close_to_the_bound_as_one_at_the_start(method, name, tmp_path):
    gradual, at_once = LitNet(), LitNet()
    fit(gradual, [method(structured=True, **{name: 0.5}, align=1, until_epoch=3)], tmp_path, max_epochs=3)
    fit(at_once, [method(structured=True, **{name: 0.5}, align=1)], tmp_path, max_epochs=1)
    measure = {"flops": lambda m: count_flops(m, X).total, "params": lambda m: sum(p.numel() for p in m.parameters())}[
        name
    ]
    dense = measure(LitNet())
    for model in (gradual, at_once):
        assert 0.47 * dense < measure(model) <= 0.5 * dense


@pytest.mark.parametrize(
    ("options", "epochs", "expected"),
    [
        ({"until_epoch": 4, "every_n_epochs": 2}, 5, [54, 54, 36, 36, 36]),
        ({"start_epoch": 2, "until_epoch": 4}, 5, [72, 72, 54, 36, 36]),
        ({"until_epoch": 0}, 2, [36, 36]),
        ({"start_epoch": 1, "until_epoch": 2, "every_n_epochs": 5}, 3, [72, 36, 36]),
        ({"until_epoch": 3, "every_n_epochs": 2}, 4, [54, 54, 36, 36]),
    ],
)
def test_steps_fall_where_start_until_and_every_n_epochs_say(options, epochs, expected, tmp_path):
    watch = Watch()
    fit(
        LitNet(),
        [Magnitude(structured=True, sparsity=0.5, align=1, schedule="linear", **options), watch],
        tmp_path,
        max_epochs=epochs,
    )
    assert [width(kept) for kept in watch.epochs[1::2]] == expected


class Zeros(Callback):
    """After every step: masked slices and all that the optimizer keeps for them are zero, what is alive is not."""

    def __init__(self, method):
        self.method, self.checks = method, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        states = {p: s for optimizer in trainer.optimizers for p, s in optimizer.state.items()}
        for layer, norm in ((0, 1), (3, 4)):
            stays = alive(module)[layer]
            for parameter in [*module.net[layer].parameters(), *module.net[norm].parameters()]:
                kept = [
                    v for v in states[parameter].values() if isinstance(v, torch.Tensor) and v.shape == parameter.shape
                ]
                assert kept
                for tensor in (parameter, *kept):
                    assert not tensor[~stays].any()
                    assert tensor[stays].any()
            self.checks += int((~stays).sum())


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_masked_slices_and_their_moments_are_zero_after_every_step(optimizer, tmp_path):
    method = Magnitude(structured=True, sparsity=0.5, align=1, until_epoch=3)
    zeros = Zeros(method)
    fit(LitNet(optimizer=optimizer, lr=0.01), [method, zeros], tmp_path, max_epochs=4)
    assert zeros.checks > 50


def test_masks_hold_where_another_optimizer_has_the_normalization(tmp_path):
    class Split(LitNet):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            norms = [*self.net[1].parameters(), *self.net[4].parameters()]
            rest = [p for p in self.parameters() if not any(p is q for q in norms)]
            return [torch.optim.SGD(rest, lr=0.05, momentum=0.9), torch.optim.Adam(norms, lr=0.01)]

    method = Magnitude(structured=True, sparsity=0.5, align=1, until_epoch=2)
    zeros = Zeros(method)
    fit(Split(), [method, zeros], tmp_path, max_epochs=3)
    assert zeros.checks > 50


@pytest.mark.parametrize("norm", [True, False])
def test_the_compact_model_computes_what_the_masked_one_did(norm, tmp_path):
    torch.manual_seed(0)
    watch = Watch()
    model = LitNet(norm=norm)
    method = Magnitude(structured=True, flops=0.5, align=1, until_epoch=2, recalibrate_bn=0)
    fit(model, [method, watch], tmp_path, max_epochs=3, precision="64-true")
    x = torch.randn(8, 1, 8, 8, dtype=torch.float64)
    masked, small = watch.masked.eval()(x), model.eval()(x)
    assert count_flops(model, X.double()).total <= 0.5 * count_flops(LitNet(norm=norm), X).total
    torch.testing.assert_close(small, masked, rtol=1e-9, atol=1e-9)
    assert masked.std() > 0.1


@pytest.mark.parametrize("target", [{"flops": 0.5}, {"params": 0.5}, {"sparsity": 0.5}])
def test_the_log_tells_what_is_masked_and_what_the_budget_counts(target, tmp_path):
    watch = Watch()
    method = Magnitude(structured=True, align=1, until_epoch=2, **target)
    fit(LitNet(), [method, watch], tmp_path, max_epochs=2, logger=CSVLogger(tmp_path, "csv"))
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("compression/masked/units")]
    assert len(rows) == 2
    (name,) = target
    for row, kept in zip(rows, watch.epochs[1::2], strict=True):
        assert float(row["compression/masked/units"]) == pytest.approx(1 - width(kept) / CHANNELS)
        one, two, three = (int(stays.sum()) for stays in kept.values())
        small = body()
        small[0], small[1] = nn.Conv2d(1, one, 3, padding=1, bias=False), nn.BatchNorm2d(one)
        small[3], small[4] = nn.Conv2d(one, two, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(two)
        small[8], small[10] = nn.Linear(two * 16, three), nn.Linear(three, 4)
        if name == "sparsity":
            assert float(row["compression/masked/sparsity"]) == pytest.approx(1 - width(kept) / CHANNELS)
        elif name == "flops":
            share = count_flops(small, X).total / count_flops(body(), X).total
            assert float(row["compression/masked/flops_share"]) == pytest.approx(share)
        else:
            share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in body().parameters())
            assert float(row["compression/masked/params_share"]) == pytest.approx(share)


# How a fit may end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["max_epochs", "early stopping", "max_steps"])
def test_a_fit_that_ends_early_shrinks_by_what_is_masked_and_warns_with_both_figures(how, tmp_path, caplog):
    watch, method = (
        Watch(),
        Magnitude(structured=True, flops=0.3, align=1, until_epoch=8, every_n_epochs=2, schedule="linear"),
    )
    options = {
        "max_epochs": {"max_epochs": 3},
        "early stopping": {"max_epochs": 9},
        "max_steps": {"max_steps": 11, "max_epochs": 9},
    }[how]
    stop = [EarlyStopping("val_loss", patience=3, min_delta=100.0)] if how == "early stopping" else []
    model, dense = LitNet(), count_flops(LitNet(), X).total
    with caplog.at_level(logging.WARNING, "lightning_prune"):
        fit(model, [method, watch, *stop], tmp_path, **options)
    assert [model.net[layer].weight.shape[0] for layer in LAYERS] == [int(k.sum()) for k in watch.epochs[-1].values()]
    share = count_flops(model, X).total / dense
    assert 0.6 < share <= 0.65  # two of four steps from 1 to 0.3
    assert "at 50 % of the schedule. Asked for flops=0.3" in caplog.text
    assert f"({share:.1%})" in caplog.text
    assert method.plan.stages[0].options["progress"] == 0.5


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need")
def test_after_ctrl_c_the_masked_model_and_its_checkpoint_stay_and_a_resume_goes_on(tmp_path):
    class Impatient(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 10:
                raise KeyboardInterrupt

    def method():
        return Magnitude(structured=True, sparsity=0.5, align=1, until_epoch=4)

    model, saver = LitNet(), ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)
    with pytest.raises(SystemExit):
        fit(model, [method(), Impatient(), saver], tmp_path, max_epochs=6, enable_checkpointing=True)
    interrupted = alive(model)
    assert not plan_of(model)
    assert width(interrupted) < CHANNELS
    resumed, watch = LitNet(), Watch()
    run = trainer(tmp_path, callbacks=[method(), watch], max_epochs=6)
    run.fit(resumed, loader(), loader(32, seed=1), ckpt_path=tmp_path / "kept" / "epoch=1.ckpt")
    assert width(watch.epochs[0]) == width(interrupted)  # epoch 2 again
    assert sum(resumed.net[layer].weight.shape[0] for layer in LAYERS) == 36


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need")
def test_the_best_checkpoint_of_a_gradual_fit_is_dense_again_and_the_last_one_compact(tmp_path):
    model, method = LitNet(), Magnitude(structured=True, sparsity=0.5, align=1, until_epoch=2)
    saver = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    run = fit(model, [method, saver], tmp_path, max_epochs=3, enable_checkpointing=True)
    run.save_checkpoint(tmp_path / "small.ckpt")
    plan = plan_of(model)
    run.test(model, loader(32, seed=1), ckpt_path="best", verbose=False, weights_only=True)
    assert not plan_of(model)
    assert [model.net[layer].weight.shape[0] for layer in LAYERS] == list(LAYERS.values())
    assert model.net[0].out_channels == model.net[1].num_features == model.net[3].in_channels == 16
    again = load_from_checkpoint(LitNet, tmp_path / "small.ckpt")
    assert plan_of(again) == plan
    run.test(model, loader(32, seed=1), ckpt_path=tmp_path / "small.ckpt", verbose=False, weights_only=True)
    assert plan_of(model) == plan


def test_a_finished_gradual_run_resumes_as_a_no_op_and_another_bound_goes_on_from_there(tmp_path):
    model = LitNet()
    fit(model, [Magnitude(structured=True, flops=0.6, align=1, until_epoch=2)], tmp_path).save_checkpoint(
        tmp_path / "small.ckpt"
    )
    same, further = LitNet(), LitNet()
    for other, bound in ((same, 0.6), (further, 0.3)):
        run = trainer(
            tmp_path, callbacks=[Magnitude(structured=True, flops=bound, align=1, until_epoch=4)], max_epochs=5
        )
        run.fit(other, loader(), ckpt_path=tmp_path / "small.ckpt")
    dense = count_flops(LitNet(), X).total
    assert plan_of(same).steps == plan_of(model).steps
    assert 0.25 * dense < count_flops(further, X).total <= 0.3 * dense


def test_a_dense_checkpoint_from_after_the_schedule_is_masked_at_once(tmp_path):
    run = trainer(tmp_path, max_epochs=4)
    run.fit(LitNet(), loader())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    model, watch = LitNet(), Watch()
    later = trainer(
        tmp_path, callbacks=[Magnitude(structured=True, sparsity=0.5, align=1, until_epoch=3), watch], max_epochs=6
    )
    later.fit(model, loader(), ckpt_path=tmp_path / "dense.ckpt")
    assert [width(kept) for kept in watch.epochs] == [36] * 4


# Before training --------------------------------------------------------------------------------------------------------


class NoStep(Callback):
    def on_train_batch_start(self, *_):
        raise AssertionError("trained before the error")


def test_what_cannot_be_met_is_said_before_anything_is_trained(tmp_path):
    with pytest.raises(BudgetError, match=r"is the least that can be reached.*Bound by 'net\."):
        fit(LitNet(), [Magnitude(structured=True, flops=0.001, until_epoch=2), NoStep()], tmp_path)
    with pytest.raises(ModelError, match=r"would change nothing.*net\.10: it is an output"):
        fit(LitNet(), [Magnitude(structured=True, sparsity=0.5, include="net.10", until_epoch=2), NoStep()], tmp_path)


@pytest.mark.parametrize("until_epoch", [None, 2])
def test_a_rehearsal_tells_what_a_fit_would_refuse(until_epoch):
    with pytest.raises(BudgetError, match="Bound by"):
        rehearse(LitNet(), [Magnitude(structured=True, sparsity=0.99, until_epoch=until_epoch)])
    with pytest.raises(ModelError, match="would change nothing"):
        rehearse(LitNet(), [Magnitude(structured=True, sparsity=0.5, include="net.10", until_epoch=until_epoch)])
    rehearse(LitNet(), [Magnitude(structured=True, sparsity=0.5, until_epoch=until_epoch)])


# With other callbacks and other stages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "other", [lambda: LowRank(rank=4, align=1, include="net.8"), lambda: TRP(energy=0.3, align=1, include="net.8")]
)
def test_a_layer_that_reads_the_channels_may_be_factorized_in_the_same_fit(other, first, tmp_path):
    method = Magnitude(structured=True, sparsity=0.5, align=1, until_epoch=2, include=["net.0", "net.3"])
    model = LitNet()
    run = fit(model, [method, other()] if first else [other(), method], tmp_path)
    assert model.net[0].out_channels + model.net[3].out_channels == 20
    assert type(model.net[8]).__name__ == "Factorized"
    run.save_checkpoint(tmp_path / "both.ckpt")
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(load_from_checkpoint(LitNet, tmp_path / "both.ckpt").eval()(x), model.eval()(x))


def test_channels_that_are_masked_leave_even_if_another_callback_meets_the_bound(tmp_path):
    method = Magnitude(structured=True, flops=0.9, align=1, until_epoch=1, include="net.8")
    model = LitNet()
    fit(model, [TRP(flops=0.6, align=1, include="net.3"), method], tmp_path)
    assert model.net[8].weight.any(1).all()
    assert model.net[8].out_features < 32


STAGES = {
    "channels, low rank": [lambda: Magnitude(structured=True, flops=0.7, align=1), lambda: LowRank(flops=0.5, align=1)],
    "low rank, channels": [lambda: LowRank(flops=0.7, align=1), lambda: Magnitude(structured=True, flops=0.4, align=1)],
    "channels, channels": [lambda: Random(structured=True, flops=0.7), lambda: Magnitude(structured=True, flops=0.4, align=1, until_epoch=2)],
    "gradual channels, low rank": [lambda: Magnitude(structured=True, params=0.7, align=1, until_epoch=2), lambda: LowRank(params=0.4, align=1)],
}  # fmt: skip


@pytest.mark.parametrize("case", STAGES)
def test_two_stages_replay_from_one_checkpoint_bit_for_bit(case, tmp_path):
    model = LitNet()
    for stage in STAGES[case]:
        run = fit(model, [stage()], tmp_path)
    run.save_checkpoint(tmp_path / "two.ckpt")
    again = load_from_checkpoint(LitNet, tmp_path / "two.ckpt").eval()
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(again(x), model.eval()(x))
    assert plan_of(again) == plan_of(model)
    assert len(plan_of(again).stages) == 2
    asked = STAGES[case][1]()
    if asked.flops is not None:
        assert count_flops(again, X).total <= asked.flops * count_flops(LitNet(), X).total
    else:
        assert sum(p.numel() for p in again.parameters()) <= asked.params * sum(
            p.numel() for p in LitNet().parameters()
        )


def test_after_an_averaged_gradual_fit_masked_channels_leave_with_the_average(tmp_path):
    model = LitNet(norm=False)
    run = fit(
        model,
        [Magnitude(structured=True, sparsity=0.5, align=1, until_epoch=2), EMAWeightAveraging(decay=0.5)],
        tmp_path,
        max_epochs=3,
    )
    assert sum(model.net[layer].weight.shape[0] for layer in LAYERS) == 36
    run.save_checkpoint(tmp_path / "small.ckpt")
    again = load_from_checkpoint(LitNet, tmp_path / "small.ckpt", norm=False)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


class LitAttention(LitNet):
    """A transformer over the rows of the image."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 4, dim_feedforward=16, dropout=0.0, batch_first=True)
        self.net = nn.Sequential(nn.Flatten(1, 2), nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(64, 4))


@pytest.mark.filterwarnings("ignore:.*enable_nested_tensor is True")
def test_heads_are_masked_step_by_step_and_leave(tmp_path):
    model = LitAttention()
    run = fit(model, [Magnitude(structured=True, sparsity=0.5, align=1, until_epoch=2, scope="uniform")], tmp_path)
    layer = model.net[1].layers[0]
    assert layer.self_attn.num_heads == 2
    assert layer.linear1.out_features == 8
    run.save_checkpoint(tmp_path / "small.ckpt")
    again = load_from_checkpoint(LitAttention, tmp_path / "small.ckpt").eval()
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(again(x), model.eval()(x))


def test_the_masked_model_of_the_fit_is_the_one_that_the_plan_stands_for(tmp_path):
    class Frozen(LitNet):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[10].parameters(), lr=0.1)

    model, watch = Frozen(), Watch()
    before = copy.deepcopy(model)
    method = Magnitude(structured=True, sparsity=0.5, align=1, until_epoch=1)
    fit(model, [method, watch], tmp_path, max_epochs=1)
    mask_(before, method.plan)
    for (name, value), wanted in zip(watch.masked[:10].named_parameters(), before.net[:10].parameters(), strict=True):
        assert torch.equal(value, wanted), name


def test_two_callbacks_may_not_take_the_same_layer(tmp_path):
    with pytest.raises(TrainerError, match=r"Random and Magnitude would both compress layer 'net\.8'"):
        fit(
            LitNet(),
            [
                Magnitude(structured=True, flops=0.8, include="net.8"),
                Random(structured=True, flops=0.8, exclude="net.3"),
            ],
            tmp_path,
        )


def test_the_state_of_a_run_that_has_ended_holds_no_masks(tmp_path):
    method = Magnitude(structured=True, sparsity=0.5, align=1, until_epoch=1)
    fit(LitNet(), [method], tmp_path)
    assert not Plan.from_json(method.state_dict()["pending"])
