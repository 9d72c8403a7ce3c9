"""What one fit gives: the model gets smaller, trains on, is saved, and comes back from the file."""

import copy
import logging

import pytest
import torch
from lit import LitNet, Points, loader, trainer
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from toys import make

from lightning_prune import TRP, LowRank, compress, count_flops, load_from_checkpoint
from lightning_prune.errors import BudgetError, CheckpointError, ModelError, OptionError, PlanError, TrainerError
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.factorized import Factorized

METHODS = {"LowRank": lambda: LowRank(flops=0.5, align=1), "TRP": lambda: TRP(flops=0.5, align=1, every_n_steps=2)}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]()


def fit(model, callback, folder, **options):
    run = trainer(folder, callbacks=[callback], **options)
    run.fit(model, loader(), loader(32, seed=1))
    return run


def test_after_a_fit_the_model_is_smaller_and_within_the_budget(method, tmp_path):
    model = LitNet()
    dense = count_flops(model, model.example_input_array).total
    fit(model, method, tmp_path)
    small = count_flops(model, model.example_input_array).total
    assert small <= 0.5 * dense
    assert small > 0.4 * dense  # as closely as the units allow
    assert plan_of(model).origin.flops == dense
    assert any(isinstance(m, Factorized) for m in model.modules())
    assert method.plan.steps == plan_of(model).steps


def test_the_small_model_trains(tmp_path):
    model = LitNet()
    run = trainer(tmp_path, callbacks=[LowRank(flops=0.5, align=1)], max_epochs=1)
    seen = {}

    class Watch(type(run.callbacks[0]).__mro__[-2]):
        def on_train_start(self, _trainer, module):
            seen.update({name: p.detach().clone() for name, p in module.named_parameters()})

    run.callbacks.append(Watch())
    run.fit(model, loader())
    assert set(seen) == {name for name, _ in model.named_parameters()}
    assert all(not torch.equal(seen[name], p) for name, p in model.named_parameters())


def test_checkpoint_of_the_small_model_loads_without_the_callback(method, tmp_path):
    model = LitNet()
    fit(model, method, tmp_path).save_checkpoint(tmp_path / "small.ckpt")
    again = load_from_checkpoint(LitNet, tmp_path / "small.ckpt").eval()
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(again(x), model.eval()(x))
    assert plan_of(again) == plan_of(model)


def test_checkpoint_after_a_gradual_fit_holds_no_optimizer_state(tmp_path):
    fit(LitNet(), METHODS["TRP"](), tmp_path).save_checkpoint(tmp_path / "small.ckpt")
    assert torch.load(tmp_path / "small.ckpt", weights_only=True)["optimizer_states"] == []


def test_weights_only_file_and_bare_state_dict_load(tmp_path):
    model = LitNet()
    run = fit(model, METHODS["LowRank"](), tmp_path)
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    x = torch.randn(3, 1, 8, 8)
    for name in ("weights.ckpt", "bare.pt"):
        assert torch.equal(load_from_checkpoint(LitNet, tmp_path / name).eval()(x), model.eval()(x))


def test_checkpoint_of_a_later_trainer_without_our_callback_keeps_the_plan(tmp_path):
    model = LitNet()
    fit(model, METHODS["LowRank"](), tmp_path)
    later = trainer(tmp_path, max_epochs=1)
    later.fit(model, loader())
    later.save_checkpoint(tmp_path / "later.ckpt")
    again = load_from_checkpoint(LitNet, tmp_path / "later.ckpt")
    assert plan_of(again) == plan_of(model)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_resume_builds_the_structure_before_weights_and_optimizer(tmp_path):
    model = LitNet()
    fit(model, METHODS["LowRank"](), tmp_path, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    resumed = LitNet()
    run = trainer(tmp_path, callbacks=[METHODS["LowRank"]()], max_epochs=2)
    run.fit(resumed, loader(), ckpt_path=tmp_path / "one.ckpt")
    assert plan_of(resumed).steps == plan_of(model).steps
    assert run.current_epoch == 2
    assert run.optimizers[0].state  # momentum of the small shapes was restored and went on
    held = {p for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == set(resumed.parameters())


def test_dense_checkpoint_as_starting_point_drops_its_optimizer_state_and_says_so(tmp_path, caplog):
    dense = LitNet()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(dense, loader())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    model = LitNet()
    with caplog.at_level(logging.WARNING, "lightning_prune"):
        trainer(tmp_path, callbacks=[METHODS["LowRank"]()], max_epochs=2).fit(
            model, loader(), ckpt_path=tmp_path / "dense.ckpt"
        )
    assert "optimizer states of the checkpoint belong to the dense model" in caplog.text
    assert plan_of(model)


def test_plans_of_two_stages_compose_and_replay_from_one_checkpoint(tmp_path):
    model = LitNet()
    fit(model, LowRank(rank=6, align=1, include="net.3"), tmp_path, max_epochs=1)
    fit(model, TRP(energy=0.5, align=1, include="net.8"), tmp_path, max_epochs=1).save_checkpoint(tmp_path / "two.ckpt")
    again = load_from_checkpoint(LitNet, tmp_path / "two.ckpt").eval()
    assert [step.module for step in plan_of(again).steps] == ["net.3", "net.8"]
    assert [stage.method for stage in plan_of(again).stages] == ["LowRank", "TRP"]
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(again(x), model.eval()(x))


def test_second_fit_is_a_logged_no_op_that_fine_tunes(method, tmp_path, caplog):
    model = LitNet()
    fit(model, method, tmp_path, max_epochs=1)
    plan = plan_of(model)
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.INFO, "lightning_prune"):
        fit(model, method, tmp_path, max_epochs=1)
    assert "nothing to do" in caplog.text
    assert plan_of(model) == plan
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_nothing_is_left_on_trainer_and_module(method, tmp_path):
    model = LitNet()
    untouched = LitNet()
    before = set(trainer(tmp_path).strategy.__dict__), set(untouched.__dict__)
    hooks = {
        name: len(getattr(module, name))
        for module in untouched.modules()
        for name in module.__dict__
        if name.endswith("_hooks")
    }
    run = fit(model, method, tmp_path)
    assert "setup" not in run.strategy.__dict__
    assert "on_load_checkpoint" not in model.__dict__
    assert not {"log", "log_dict"} & set(model.__dict__)
    assert set(model.__dict__) - before[1] <= {"_trainer", "_fabric"}
    assert all(not getattr(m, name) for m in model.modules() for name in hooks if name != "_backward_hooks")


def test_two_callbacks_on_different_layers_compose(tmp_path):
    model = LitNet()
    callbacks = [LowRank(rank=6, align=1, include="net.3"), TRP(energy=0.5, align=1, include="net.8")]
    trainer(tmp_path, callbacks=callbacks).fit(model, loader())
    assert [step.module for step in plan_of(model).steps] == ["net.3", "net.8"]


def test_two_callbacks_on_the_same_layer_are_refused_by_name(tmp_path):
    callbacks = [LowRank(rank=6, include="net.3"), TRP(energy=0.5)]
    with pytest.raises(TrainerError, match=r"TRP and LowRank would both compress layer 'net\.3'"):
        trainer(tmp_path, callbacks=callbacks).fit(LitNet(), loader())


def test_parameters_captured_before_compression_are_refused(tmp_path):
    class Early(LitNet):
        def __init__(self):
            super().__init__()
            self.early = [*self.parameters()]

        def configure_optimizers(self):
            return torch.optim.SGD(self.early, lr=0.1)

    with pytest.raises(TrainerError, match="not in the model any more"):
        fit(Early(), METHODS["LowRank"](), tmp_path)


def test_new_parameters_that_no_optimizer_holds_are_refused(tmp_path):
    class Partly(LitNet):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[10].parameters(), lr=0.1)

    with pytest.raises(TrainerError, match=r"trainable but in no optimizer"):
        fit(Partly(), METHODS["LowRank"](), tmp_path)


def test_frozen_layers_stay_frozen(tmp_path):
    model = LitNet()
    model.net[3].requires_grad_(False)
    fit(model, LowRank(rank=6, align=1, include="net.3"), tmp_path)
    assert isinstance(model.net[3], Factorized)
    assert not any(p.requires_grad for p in model.net[3].parameters())


def test_without_example_inputs_the_batch_is_used(tmp_path):
    model = LitNet(example=False)
    fit(model, METHODS["LowRank"](), tmp_path)
    signature = plan_of(model).origin.inputs
    assert signature[0]["args"] == [{"dtype": "float32", "shape": [16, 1, 8, 8]}]


def test_training_step_that_never_calls_forward_is_counted_by_the_submodules_it_calls(tmp_path):
    class Direct(LitNet):
        def forward(self, x):
            raise RuntimeError("never called")

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    model = Direct(example=False)
    run = trainer(tmp_path, callbacks=[METHODS["LowRank"]()])
    run.fit(model, loader())
    assert [call["module"] for call in plan_of(model).origin.inputs] == ["net"]


def test_ctrl_c_leaves_the_dense_model_as_it_is(tmp_path):
    class Impatient(LitNet):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 3:
                raise KeyboardInterrupt

    model = Impatient()
    with pytest.raises(SystemExit):
        fit(model, METHODS["TRP"](), tmp_path)
    assert not plan_of(model)
    assert isinstance(model.net[3], nn.Conv2d)
    assert "on_load_checkpoint" not in model.__dict__


def test_a_fit_that_ends_before_until_epoch_shrinks_by_what_was_reached_and_warns_with_both_figures(tmp_path, caplog):
    model = LitNet()
    dense = count_flops(model, model.example_input_array).total
    with caplog.at_level(logging.WARNING, "lightning_prune"):
        fit(model, TRP(flops=0.4, align=1, until_epoch=4), tmp_path, max_epochs=2)
    share = count_flops(model, model.example_input_array).total / dense
    assert 0.4 < share <= 0.7
    assert "flops=0.4" in caplog.text
    assert f"{share:.1%}" in caplog.text


def test_zero_effect_is_an_error_with_the_reasons(tmp_path):
    with pytest.raises(ModelError, match=r"would change nothing.*net\.3: rank 24 is not cheaper than dense"):
        fit(LitNet(), LowRank(rank=100, align=1, include="net.3"), tmp_path)


def test_an_impossible_budget_names_the_layers_that_bind(method, tmp_path):
    impossible = type(method)(flops=0.001, align=1)
    with pytest.raises(BudgetError, match=r"Bound by .*net\."):
        fit(LitNet(), impossible, tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        LowRank,
        lambda: LowRank(flops=0.5, energy=0.1),
        lambda: LowRank(flops=1.5),
        lambda: LowRank(energy=1.0),
        lambda: LowRank(rank=0),
        lambda: LowRank(rank=2, scheme="diagonal"),
        lambda: LowRank(rank=2, align=0),
        lambda: LowRank(rank=2, recalibrate_bn=-1),
        lambda: TRP(every_n_steps=0),
        lambda: TRP(nuclear=-1.0),
        lambda: TRP(nuclear_every="never"),
        lambda: TRP(start_epoch=3, until_epoch=2),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(make):
    with pytest.raises(OptionError):
        make()


def test_unknown_layer_suggests_the_right_one(tmp_path):
    with pytest.raises(OptionError, match=r"include='nett\.3' matches no layer.*Did you mean 'net\.3'"):
        fit(LitNet(), LowRank(rank=2, include="nett.3"), tmp_path)


def test_compress_without_a_trainer_returns_a_copy(tmp_path):
    model = LitNet().eval()
    before = copy.deepcopy(model.state_dict())
    batches = DataLoader(Points(), batch_size=16)
    small, plan = compress(model, LowRank(flops=0.5, align=1), torch.zeros(2, 1, 8, 8), data=batches)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert plan == plan_of(small)
    assert count_flops(small, torch.zeros(2, 1, 8, 8)).total <= 0.5 * plan.origin.flops
    with pytest.raises(OptionError, match="acts while a model trains"):
        compress(model, TRP(flops=0.5), torch.zeros(2, 1, 8, 8))


def test_checkpoints_that_cannot_be_loaded_say_why(tmp_path):
    model = LitNet()
    run = fit(model, METHODS["LowRank"](), tmp_path)
    run.save_checkpoint(tmp_path / "small.ckpt")
    with pytest.raises(CheckpointError, match="is missing"):
        load_from_checkpoint(LitNet, tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_from_checkpoint(LitNet, tmp_path)
    whole = (tmp_path / "small.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        load_from_checkpoint(LitNet, tmp_path / "cut.ckpt")
    (tmp_path / "text.ckpt").write_text("x")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_from_checkpoint(LitNet, tmp_path / "text.ckpt")
    torch.save(LitNet().state_dict(), tmp_path / "dense.pt")
    with pytest.raises(CheckpointError, match="carries no plan"):
        load_from_checkpoint(LitNet, tmp_path / "dense.pt")

    class Wider(LitNet):
        def __init__(self, **options):
            super().__init__(**options)
            self.net[10] = nn.Linear(32, 5)

    with pytest.raises(PlanError, match=r"module 'net\.10'"):
        load_from_checkpoint(Wider, tmp_path / "small.ckpt")


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a checkpoint ran')",)


def test_pickled_code_in_a_checkpoint_is_never_run(tmp_path):
    torch.save({"state_dict": LitNet().state_dict(), "extra": Trap()}, tmp_path / "trap.ckpt")
    with pytest.raises(CheckpointError, match="holds pickled code, which is never run"):
        load_from_checkpoint(LitNet, tmp_path / "trap.ckpt")


PICKED = {
    "LowRank": lambda: LowRank(rank=2, align=1, include=["net.3"]),
    "TRP": lambda: TRP(energy=0.5, align=1, include="net.3"),
}


@pytest.mark.parametrize("name", PICKED)
def test_a_second_fit_and_a_resume_know_the_layers_that_are_factorized_already(name, tmp_path):
    model = LitNet()
    fit(model, PICKED[name](), tmp_path, max_epochs=1)
    fit(model, PICKED[name](), tmp_path, max_epochs=1).save_checkpoint(tmp_path / "two.ckpt")
    resumed = LitNet()
    trainer(tmp_path, callbacks=[PICKED[name]()], max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "two.ckpt")
    assert plan_of(resumed).steps == plan_of(model).steps


def test_include_and_exclude_split_the_layers_between_two_callbacks(tmp_path):
    model = LitNet()
    callbacks = [LowRank(rank=2, align=1, include="net.8"), TRP(energy=0.5, align=1, exclude="net.8")]
    trainer(tmp_path, callbacks=callbacks).fit(model, loader())
    assert plan_of(model).steps[0].module == "net.8"
    assert len(plan_of(model)) > 1


class Manual(LitNet):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimization_recalibrates_through_forward(method, tmp_path, caplog):
    model = Manual()
    with caplog.at_level(logging.WARNING, "lightning_prune"):
        fit(model, method, tmp_path)
    assert plan_of(model)
    assert "left as they are" not in caplog.text


def test_a_training_step_that_cannot_be_run_early_leaves_the_statistics_and_says_so(tmp_path, caplog):
    class Rate(LitNet):
        def training_step(self, batch, batch_idx):
            assert self.optimizers().param_groups
            return super().training_step(batch, batch_idx)

    with caplog.at_level(logging.WARNING, "lightning_prune"):
        fit(Rate(), METHODS["LowRank"](), tmp_path)
    assert "statistics of batch normalization are left as they are" in caplog.text


@pytest.mark.parametrize("first", [True, False])
def test_after_an_averaged_gradual_fit_the_checkpoint_is_compact(first, tmp_path):
    model, averager = LitNet(norm=False), EMAWeightAveraging(decay=0.5)
    callbacks = [averager, METHODS["TRP"]()] if first else [METHODS["TRP"](), averager]
    run = trainer(tmp_path, callbacks=callbacks)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "small.ckpt")
    again = load_from_checkpoint(LitNet, tmp_path / "small.ckpt", norm=False)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    run.fit(model, loader())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need")
def test_masks_survive_an_averaged_checkpoint_and_its_resume(tmp_path):
    saver = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)
    one = trainer(
        tmp_path, callbacks=[make("ToyMask"), EMAWeightAveraging(decay=0.5), saver], enable_checkpointing=True
    )
    one.fit(LitNet(norm=False), loader())
    model = LitNet(norm=False)
    two = trainer(tmp_path, callbacks=[make("ToyMask"), EMAWeightAveraging(decay=0.5)])
    two.fit(model, loader(), ckpt_path=tmp_path / "kept" / "epoch=0.ckpt")
    assert len(plan_of(model)) == 4


def test_an_averager_does_not_copy_the_trainer_with_the_module(tmp_path):
    class Once(Points):
        def __deepcopy__(self, memo):
            raise AssertionError("the data was copied")

    data = DataLoader(Once(), batch_size=16)
    trainer(tmp_path, callbacks=[METHODS["LowRank"](), EMAWeightAveraging(decay=0.5)]).fit(LitNet(norm=False), data)


def test_a_fit_that_ends_before_start_epoch_leaves_the_model_and_says_so(tmp_path, caplog):
    model = LitNet()
    with caplog.at_level(logging.WARNING, "lightning_prune"):
        fit(model, TRP(flops=0.5, align=1, start_epoch=5), tmp_path)
    assert not plan_of(model)
    assert "nothing was compressed" in caplog.text


@pytest.mark.parametrize(("epochs", "reached"), [(1, 0.25), (2, 0.5), (3, 0.75)])
def test_the_schedule_counts_the_epochs_that_were_trained(epochs, reached, tmp_path):
    method = TRP(flops=0.4, align=1, until_epoch=4)
    fit(LitNet(), method, tmp_path, max_epochs=epochs)
    assert method.plan.stages[0].options["progress"] == pytest.approx(reached)


def test_a_method_whose_bound_another_has_met_is_a_no_op(tmp_path):
    callbacks = [TRP(flops=0.95, align=1, include="net.3"), LowRank(rank=2, align=1, include="net.8")]
    model = LitNet()
    trainer(tmp_path, callbacks=callbacks).fit(model, loader())
    assert [step.module for step in plan_of(model).steps] == ["net.8"]


def test_masks_of_an_earlier_plan_hold_under_every_optimizer(tmp_path):
    class Two(LitNet):
        def __init__(self):
            super().__init__(norm=False)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [
                torch.optim.SGD(self.net[:8].parameters(), lr=0.05),
                torch.optim.Adam(self.net[8:].parameters(), lr=0.01),
            ]

    model = Two()
    fit(model, make("ToyMask", exclude=None), tmp_path)
    fit(model, TRP(energy=0.5, align=1, include="net.3"), tmp_path)
    for step in plan_of(model).steps:
        if step.action == "mask" and step.module != "net.3":
            assert not model.get_submodule(step.module).weight[~step.mask].any()


def test_learning_rates_of_a_dense_checkpoint_are_kept(tmp_path):
    dense = LitNet()
    run = trainer(tmp_path, max_epochs=2)
    run.fit(dense, loader())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    rates = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(tmp_path, callbacks=[METHODS["LowRank"](), Rates()], max_epochs=3).fit(
        LitNet(), loader(), ckpt_path=tmp_path / "dense.ckpt"
    )
    assert rates[0] == pytest.approx(0.05 * 0.9**2)


def test_learning_rates_go_on_from_the_checkpoint_of_a_compact_model(method, tmp_path):
    fit(LitNet(), method, tmp_path, max_epochs=2).save_checkpoint(tmp_path / "small.ckpt")
    through, rates = [], []

    class Rates(Callback):
        def __init__(self, told):
            self.told = told

        def on_train_batch_end(self, trainer, *_):
            self.told.append(trainer.optimizers[0].param_groups[0]["lr"])

    again = METHODS[type(method).__name__]()
    trainer(tmp_path, callbacks=[again, Rates(rates)], max_epochs=4).fit(
        LitNet(), loader(), ckpt_path=tmp_path / "small.ckpt"
    )
    trainer(tmp_path, callbacks=[Rates(through)], max_epochs=4).fit(LitNet(), loader())
    assert rates == pytest.approx(through[8:])


def test_frozen_weights_are_not_projected(tmp_path):
    model = LitNet()
    model.net[3].requires_grad_(False)
    before = model.net[3].weight.detach().clone()
    method = TRP(energy=0.4, align=1, every_n_steps=1)
    fit(model, method, tmp_path)
    assert torch.equal(model.net[3].weight, before)
    assert "frozen" in method.plan.left_alone["net.3"]


def test_weights_that_are_not_finite_are_named():
    model = LitNet()
    model.net[3].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"Layer 'net\.3'.*not finite"):
        compress(model, LowRank(flops=0.5, align=1), model.example_input_array)
