"""Every exported method under the Trainers that users have: precision, accumulation, clipping, averaging, loaders, loggers."""

import copy
import gc
import logging
import weakref
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lit import LitNet, Points, loader, trainer
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from toys import KINDS, UNPLANNED, kind_of, make

from lightning_prune import LowRank, load_from_checkpoint
from lightning_prune.errors import ModelError, TrainerError
from lightning_prune.structure.carrier import NAME, plan_of
from lightning_prune.structure.factorized import Factorized
from lightning_prune.structure.masks import cut_masks
from lightning_prune.structure.mpo import MPO
from lightning_prune.structure.rotated import Rotated
from lightning_prune.structure.steps import KeepChannels, MaskWeight
from lightning_prune.structure.unrolled import Unrolled

REPLACED = {
    "factorize": Factorized,
    "rotate": Rotated,
    "mpo": MPO,
    "unroll": Unrolled,
}  # what stands in the place of a layer, by action

pytestmark = pytest.mark.parametrize("name", KINDS)


def fit(model, method, folder, *, data=None, callbacks=(), before=(), val=False, **options):
    run = trainer(folder, callbacks=[*before, method, *callbacks], **options)
    run.fit(model, loader() if data is None else data, loader(32, seed=1) if val else None)
    return run


def assert_compressed(model):
    plan = plan_of(model)
    assert plan.steps
    masks = cut_masks(model, plan)  # units may have left after the masks
    assert masks.keys() == {step.key for step in plan.steps if isinstance(step, MaskWeight)}
    for key, mask in masks.items():
        assert not model.get_parameter(key)[~mask].any()
    for step in plan.steps:
        if isinstance(step, MaskWeight):
            continue
        if isinstance(step, KeepChannels):
            tensors = model.get_submodule(step.module).state_dict()  # of a layer factorized since they are others
            held = {
                name: (tuple(tensors[name].shape), cut.after) for name, cut in step.tensors.items() if name in tensors
            }
            assert all(shape == after for shape, after in held.values())
        else:
            assert isinstance(model.get_submodule(step.module), REPLACED[step.action])
    assert all(p.isfinite().all() for p in model.parameters())


class Steps(Callback):
    """Counts how often an optimizer steps and keeps the learning rates."""

    def __init__(self):
        self.rates = []

    def on_train_batch_end(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true", "16-mixed"])
def test_precision(name, precision, tmp_path):
    double = precision == "64-true"
    model = LitNet(optimizer="Adam", lr=0.01)
    data = DataLoader(Points(), batch_size=16)
    warned = precision == "16-mixed"  # Lightning says that it takes bf16 on a CPU
    with pytest.warns(UserWarning, match="fp16 is not supported on CPU") if warned else _nothing():
        run = trainer(tmp_path, callbacks=[make(name)], precision=precision)
    run.fit(model, data)
    assert_compressed(model)
    kinds = {p.dtype for p in model.parameters()}
    assert kinds == {torch.float64 if double else torch.bfloat16 if precision == "bf16-true" else torch.float32}


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_accumulation_clipping_and_schedulers_go_on_as_without_us(name, algorithm, tmp_path):
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "gradient_clip_algorithm": algorithm}
    plain, ours = Steps(), Steps()
    trainer(tmp_path, callbacks=[plain], **options).fit(LitNet(), loader())
    model = LitNet()
    fit(model, make(name), tmp_path, callbacks=[ours], **options)
    assert ours.rates == plain.rates
    assert_compressed(model)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", [EMAWeightAveraging, StochasticWeightAveraging])
def test_averaged_weights_have_the_same_structure_and_end_up_in_the_module(name, kind, first, tmp_path):
    averager = (
        EMAWeightAveraging(decay=0.5)
        if kind is EMAWeightAveraging
        else StochasticWeightAveraging(0.01, swa_epoch_start=1)
    )
    seen = {}

    class Watch(Callback):
        def on_train_end(self, _trainer, module):  # after the averager's: it is listed last
            average = averager._average_model
            average = getattr(average, "module", average)
            seen["average"] = {k: v.clone() for k, v in average.state_dict().items() if k != f"{NAME}._extra_state"}
            seen["module"] = {k: v.clone() for k, v in module.state_dict().items() if k != f"{NAME}._extra_state"}

    model = LitNet(norm=False)
    place = {"before": [averager]} if first else {"callbacks": [averager]}
    place["callbacks"] = [*place.get("callbacks", []), Watch()]
    fit(model, make(name), tmp_path, max_epochs=3, **place)
    assert_compressed(model)
    assert seen["average"].keys() == seen["module"].keys()
    assert all(torch.equal(value, seen["module"][key]) for key, value in seen["average"].items())


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning"
)  # torch.compile's own imports
def test_compiled_modules_are_refused_with_the_remedy(name, tmp_path):
    with pytest.raises(TrainerError, match="compile it after"):
        fit(torch.compile(LitNet()), make(name), tmp_path)
    inner = LitNet()
    inner.net = torch.compile(inner.net)
    with pytest.raises(TrainerError, match="compile it after"):
        fit(inner, make(name), tmp_path)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning"
)  # torch.compile's own imports
def test_modules_compiled_in_place_are_refused_too(name, tmp_path):
    model = LitNet()
    model.net.compile()
    with pytest.raises(TrainerError, match=r"'net'.*compile it after"):
        fit(model, make(name), tmp_path)


def picked(name, layers):
    """Return the method on some layers only, with a target that does not depend on the others."""
    own = {"energy": 0.5, "flops": None} if name in ("LowRank", "TRP") else {}
    return make(name, include=layers, **own)


def test_two_callbacks_on_different_layers_compose(name, tmp_path):
    model = LitNet()
    trainer(tmp_path, callbacks=[picked(name, "net.3"), LowRank(rank=2, align=1, include="net.8")]).fit(model, loader())
    follows = {"net.4"}  # the normalization of net.3, where channels leave
    changed = {
        step.module.removesuffix(".first").removesuffix(".linear") for step in plan_of(model).steps
    }  # of net.8, factorized before inputs left, and of net.3, unrolled before its matrix became cores
    assert changed - follows == {"net.3", "net.8"}
    assert_compressed(model)


def test_two_callbacks_on_the_same_layer_are_refused_by_name(name, tmp_path):
    callbacks = [LowRank(rank=2, align=1, include="net.3"), picked(name, ["net.3", "net.8"])]
    with pytest.raises(TrainerError, match=rf"{kind_of(name)} and LowRank would both compress layer 'net\.3'"):
        trainer(tmp_path, callbacks=callbacks).fit(LitNet(), loader())


def test_frozen_layers_stay_frozen(name, tmp_path):
    model = LitNet()
    model.net[0].requires_grad_(False)
    fit(model, make(name), tmp_path)
    assert not any(p.requires_grad for p in model.net[0].parameters())
    assert all(p.requires_grad for p in model.net[8].parameters())


def test_manual_optimization_with_two_optimizers(name, tmp_path):
    class Manual(LitNet):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            head = list(self.net[8].parameters()) + list(self.net[10].parameters())
            rest = [p for p in self.parameters() if not any(p is q for q in head)]
            return [torch.optim.SGD(rest, lr=0.05), torch.optim.Adam(head, lr=0.01)]

    model = Manual()
    if kind_of(name) in (
        "GraSP",
        "KFE",
        "LossModel",
        "OptimalBrain",
        "SNIP",
    ):  # they score by the loss, which this step does not return
        with pytest.raises(
            ModelError, match=r"optimizes manually.*Give a loss of its own|was only asked a question.*loss"
        ):
            fit(model, make(name), tmp_path)
        return
    fit(model, make(name), tmp_path)
    assert_compressed(model)


@pytest.mark.parametrize("how", ["early stopping", "max_steps", "max_time"])
def test_a_fit_that_ends_early_is_compressed_all_the_same(name, how, tmp_path):
    model = LitNet()
    options = {
        "early stopping": {"callbacks": [EarlyStopping("val_loss", patience=1, stopping_threshold=100.0)], "val": True},
        "max_steps": {"max_steps": 3},
        "max_time": {"max_time": {"seconds": 1}, "max_epochs": 1000},
    }[how]
    fit(model, make(name, **(UNPLANNED.get(kind_of(name), {}) if how == "max_time" else {})), tmp_path, **options)
    assert_compressed(model)


def test_validate_test_and_predict_before_and_after(name, tmp_path):
    model = LitNet()
    run = trainer(tmp_path, callbacks=[make(name)], max_epochs=1)
    data = loader(32, seed=1)
    for _ in range(2):
        assert run.validate(model, data, verbose=False)
        assert run.test(model, data, verbose=False)
        assert run.predict(model, data)[0].shape == (16, 4)
        run.fit(model, loader())
    assert_compressed(model)


@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided"
)
def test_best_checkpoint_after_compression_is_loaded_or_said_to_be_dense(name, tmp_path, caplog):
    model = LitNet()
    saver = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    with caplog.at_level(logging.WARNING, "lightning_prune"):
        run = fit(model, make(name), tmp_path, callbacks=[saver], val=True, enable_checkpointing=True)
        gradual = "the compact model is not among its candidates" in caplog.text
        plan = plan_of(model)
        run.save_checkpoint(tmp_path / "small.ckpt")
        assert run.test(model, loader(32, seed=1), ckpt_path="best", verbose=False, weights_only=True)
    stored = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(stored[key], value) for key, value in model.state_dict().items())
    assert gradual == ("are dense again" in caplog.text)
    again = trainer(tmp_path, callbacks=[make(name)])
    assert again.test(model, loader(32, seed=1), ckpt_path=tmp_path / "small.ckpt", verbose=False, weights_only=True)
    assert plan_of(model) == plan
    saved = torch.load(tmp_path / "small.ckpt", weights_only=True)
    shapes = {tuple(p.shape) for p in load_from_checkpoint(LitNet, tmp_path / "small.ckpt").parameters()}
    for state in saved["optimizer_states"]:
        kept = [
            v for entry in state["state"].values() for v in entry.values() if isinstance(v, torch.Tensor) and v.ndim
        ]
        assert {tuple(v.shape) for v in kept} <= shapes


@pytest.mark.parametrize("where", ["setup", "configure_model"])
def test_layers_built_late(name, where, tmp_path):
    class Late(LitNet):
        def __init__(self):
            super().__init__()
            self.late, self.net = self.net, None

    def build(self, *_, **__):
        if self.net is None:
            self.net, self.late = self.late, None

    setattr(Late, where, build)
    model = Late()
    fit(model, make(name), tmp_path)
    assert_compressed(model)


def test_two_networks_and_no_forward_and_no_example(name, tmp_path):
    class Two(LitNet):
        def __init__(self):
            super().__init__(example=False)
            self.other = copy.deepcopy(self.net)

        def forward(self, x):
            raise RuntimeError("training_step never calls forward")

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch["x"]) + self.other(batch["x"]), batch["y"])

    model = Two()
    points = [{"x": x, "y": y} for x, y in Points()]
    data: Any = DataLoader(points, batch_size=16)
    if kind_of(name) in ("KFE", "OptimalBrain"):  # there is no module whose output the loss is computed from
        with pytest.raises(ModelError, match=r"depends on more than the output of the last.*logits_module="):
            fit(model, make(name), tmp_path, data=data)
        return
    fit(model, make(name), tmp_path, data=data)
    assert_compressed(model)
    assert {call["module"] for call in plan_of(model).origin.inputs} == {"net", "other"}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(list(Points()))


def several():
    return {"a": DataLoader(Points(), batch_size=8), "b": DataLoader(Points(32), batch_size=8)}


def test_iterable_data(name, tmp_path):
    model = LitNet(example=False)
    fit(model, make(name, **UNPLANNED.get(kind_of(name), {})), tmp_path, data=DataLoader(Stream(), batch_size=16))
    assert_compressed(model)


def test_several_loaders(name, tmp_path):
    class Several(LitNet):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)

    model = Several(example=False)
    if kind_of(name) in (
        "KFE",
        "OptimalBrain",
    ):  # it takes the gradients of samples at the outputs, of which there are two
        with pytest.raises(ModelError, match=r"calls 2 modules.*logits_module=.*loss_fn="):
            fit(model, make(name), tmp_path, data=several())
        return
    fit(model, make(name), tmp_path, data=several())
    assert_compressed(model)


def test_loader_with_workers(name, tmp_path):
    model = LitNet(example=False)
    data = DataLoader(Points(), batch_size=16, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    fit(model, make(name), tmp_path, data=data)
    assert_compressed(model)


def test_ctrl_c_keeps_the_model_and_its_checkpoint(name, tmp_path):
    class Impatient(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 6:
                raise KeyboardInterrupt

    model = LitNet()
    saver = ModelCheckpoint(tmp_path / "kept", save_last=True)
    with pytest.raises(SystemExit):
        fit(model, make(name), tmp_path, callbacks=[Impatient(), saver], enable_checkpointing=True)
    state = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == model.state_dict().keys()
    assert all(state[key].shape == value.shape for key, value in model.state_dict().items())


@pytest.mark.parametrize("how", ["fast_dev_run", "barebones", "rich", "tqdm", "no validation loader"])
@pytest.mark.filterwarnings("ignore:You are trying to `self.log...? but")
def test_ways_to_run(name, how, tmp_path, capsys):
    bars = {"rich": [RichProgressBar()], "tqdm": [TQDMProgressBar()]}
    options = {"fast_dev_run": {"fast_dev_run": 2}, "barebones": {"barebones": True}}.get(how, {})
    if how in bars:
        options |= {"enable_progress_bar": True}
    if how == "barebones":
        quiet = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": str(tmp_path)}
        run = pl.Trainer(callbacks=[make(name)], **quiet, **options)
        run.fit(model := LitNet(), loader())
    else:
        model = LitNet()
        fit(model, make(name), tmp_path, callbacks=bars.get(how, []), **options)
    assert_compressed(model)


def test_nothing_is_kept_alive_after_the_fit(name, tmp_path):
    model = LitNet()
    old = [weakref.ref(m) for m in model.net if isinstance(m, nn.Conv2d | nn.Linear)]
    weights = [weakref.ref(p) for p in model.parameters()]
    method = make(name)
    run = fit(model, method, tmp_path)
    replaced = {step.module.removesuffix(".linear") for step in plan_of(model).steps if step.action in REPLACED}
    alive = set(model.modules())
    del run
    gc.collect()
    for ref in old:
        assert ref() is None or ref() in alive
    assert sum(ref() is None for ref in old) == len(replaced)
    assert sum(ref() is not None for ref in weights) <= len(list(model.parameters()))


def test_a_deep_copy_keeps_the_plan_and_computes_the_same(name, tmp_path):
    model = LitNet()
    fit(model, make(name), tmp_path)
    twin = copy.deepcopy(model)
    assert plan_of(twin) == plan_of(model)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_manual_optimization_without_example_inputs_is_refused_with_the_remedy(name, tmp_path):
    model = LitNet(example=False)
    model.automatic_optimization = False
    with pytest.raises(ModelError, match="example_input_array"):
        fit(model, make(name), tmp_path)
