"""Chunks to score with: which samples are taken, how they are cut, which data cannot be cut, and losses that cannot be had alone."""

import collections
import copy

import pytest
import torch
from lit import LitNet, loader, trainer
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_prune.callback import compress
from lightning_prune.callback.batches import balanced_chunks, losses_of, plain_chunks, scoring
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.methods.grasp import GraSP
from lightning_prune.methods.loss_model import LossModel
from lightning_prune.methods.snip import SNIP
from lightning_prune.probe import Probe


def probe(data, model=None):
    return Probe.of_data(model or nn.Linear(2, 2), data, None)


def stream(*labels):
    """Batches whose inputs are the numbers of the samples."""
    numbers = iter(range(100))
    return [(torch.tensor([[next(numbers)] for _ in part], dtype=torch.float32), torch.tensor(part)) for part in labels]


def numbers(chunks):
    return [chunk[0].flatten().int().tolist() for chunk in chunks]


def second(batch):
    return batch[1]


def test_the_first_samples_of_every_class_are_sorted_by_class_and_cut_in_two():
    data = stream([2, 0, 0, 0, 1, 2], [2, 1, 1, 0, 2, 0])
    chunks = balanced_chunks(probe(data), second, 2)
    assert numbers(chunks) == [[1, 2, 4], [7, 0, 5]]
    assert [chunk[1].tolist() for chunk in chunks] == [[0, 0, 1], [1, 2, 2]]


def test_no_chunk_is_larger_than_a_batch():
    data = stream(*[[0, 1, 2]] * 4)
    assert numbers(balanced_chunks(probe(data), second, 4)) == [[0, 3, 6], [9, 1, 4], [7, 10, 2], [5, 8, 11]]


def test_reading_ends_when_all_classes_are_full_and_goes_to_the_end_where_their_number_is_unknown():
    def read(**options):
        seen = []

        def batches():
            for batch in stream([0, 1], [1, 0], [1, 1], [0, 0]):
                seen.append(batch)
                yield batch

        balanced_chunks(probe(batches()), second, 2, **options)
        return len(seen)

    assert read(num_classes=2) == 2
    assert read() == 4


def test_dicts_keep_their_shape_and_what_is_no_sample_stays():
    Pair = collections.namedtuple("Pair", ["x", "scale"])
    data = [{"pair": Pair(torch.arange(4.0), 2.5), "label": torch.tensor([0, 1, 0, 1]), "note": None}]
    found = balanced_chunks(probe(data), lambda batch: batch["label"], 1)
    assert [chunk["pair"].x.tolist() for chunk in found] == [[0.0], [1.0]]
    assert found[0]["pair"].scale == 2.5
    assert found[0]["note"] is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(["a", "b"], torch.tensor([0, 1]))], "holds a str"),
        ([(torch.zeros(3, 1), torch.tensor([0, 1]))], r"batch of 2 samples holds a tensor \[3, 1\]"),
        ([(torch.zeros(2, 1), torch.tensor([0.0, 1.0]))], r"gives \[2\] torch.float32"),
        ([(torch.zeros(2, 1), torch.eye(2).long())], r"gives \[2, 2\] torch.int64"),
        ([(torch.zeros(2, 1), torch.tensor([0, -100]))], "Label -100 is no class"),
        ([(torch.zeros(2, 1), torch.tensor([0, 1])), (torch.zeros(2, 3), torch.tensor([0, 1]))], "do not fit into one"),
        ([(torch.zeros(2, 1), torch.tensor([0, 0])), (torch.zeros(2, 1), torch.tensor([1, 0]))], "class 1 has 1"),
    ],
)
def test_data_that_cannot_be_balanced_is_named(data, message):
    with pytest.raises(ModelError, match=message):
        balanced_chunks(probe(data), second, 2)


def test_reading_leaves_the_order_of_training_as_it_would_have_been():
    from torch.utils.data import DataLoader

    generator = torch.Generator().manual_seed(3)
    data = DataLoader(loader(32).dataset, batch_size=8, shuffle=True, generator=generator)
    before = generator.get_state(), torch.get_rng_state()
    balanced_chunks(probe(data, nn.Linear(64, 2)), second, 1, 4)
    plain_chunks(probe(data, nn.Linear(64, 2)), 2)
    assert torch.equal(before[0], generator.get_state())


def test_halves_become_float32_and_inference_tensors_can_be_trained_through():
    with torch.inference_mode():
        values = torch.ones(2, 2)
    half, frozen, integer = plain_chunks(probe([(torch.ones(2).half(), values, torch.ones(2).long())]), 1)[0]
    assert half.dtype == torch.float32
    assert integer.dtype == torch.int64
    weight = torch.ones(2, 2, requires_grad=True)
    (frozen * weight).sum().backward()
    assert torch.equal(weight.grad, values)


def test_every_pass_sees_the_same_noise_and_another_one_in_each_chunk():
    losses = losses_of(probe([]), [1, 2], lambda chunk, index: torch.rand(3, requires_grad=True).sum() * chunk + index)
    first, again = [float(v.detach()) for v in losses()], [float(v.detach()) for v in losses()]
    assert first == again
    assert first[0] != (first[1] - 1) / 2


def test_a_model_in_eval_mode_is_scored_as_it_trains_and_frozen_norms_stay_frozen():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)))

    def inside():
        with scoring(probe([], model)):
            return [m.training for m in (model, model[1], model[2][0], model[2][1])]

    model[1].eval()
    assert inside() == [True, False, True, False]
    model.eval()
    assert inside() == [True, True, True, False]
    assert not any(m.training for m in model.modules())


STEPS = {
    "rate": lambda module: module.optimizers().param_groups[0]["lr"],
    "schedule": lambda module: module.lr_schedulers().get_last_lr(),
    "optimizer": lambda module: module.trainer.optimizers[0],
}


def score_in_fit(method, step, dtype=torch.float32):
    """Fit a module whose training step is ``step(module, batch)``, until the weights are masked."""

    class Module(LitNet):
        def training_step(self, batch, batch_idx):
            return step(self, batch)

    run = trainer("unused", callbacks=[method], max_steps=0, max_epochs=1)
    run.fit(Module(norm=False).to(dtype), loader(32, 16))


def loss_of(module, batch):
    return cross_entropy(module(batch[0]), batch[1])


METHODS = [
    GraSP(sparsity=0.5),
    SNIP(sparsity=0.5, calibration_batches=2),
    LossModel(0.5, steps=1),
    LossModel(0.5, "qm", 1, logits_module="net"),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=["grasp", "snip", "lm", "qm"])


@every_method
@pytest.mark.parametrize("use", STEPS)
def test_a_step_that_uses_the_optimizer_is_told_that_there_is_none_before_the_fit(method, use):
    def step(module, batch):
        STEPS[use](module)
        return loss_of(module, batch)

    told = r"Module cannot be run .*(Attribute|Index|Type)Error: .*no optimizers.*LearningRateMonitor.*loss_fn=.*loss=\.\.\."
    with pytest.raises(ModelError, match=told):
        score_in_fit(copy.deepcopy(method), step)


@every_method
def test_a_step_that_casts_to_half_precision_itself_is_told_that_scores_are_of_float32(method):
    with pytest.raises(ModelError, match=r"RuntimeError: .*in float32.*cast inputs to the type of the weights"):
        score_in_fit(
            copy.deepcopy(method),
            lambda module, batch: cross_entropy(module(batch[0].bfloat16()).float(), batch[1]),
            torch.bfloat16,
        )
    score_in_fit(
        copy.deepcopy(method),
        lambda module, batch: cross_entropy(module(batch[0].to(module.net[0].weight.dtype)).float(), batch[1]),
        torch.bfloat16,
    )


def test_what_we_say_and_a_lack_of_memory_go_through_as_they_are():
    for error in (OptionError("ours"), torch.OutOfMemoryError("CUDA out of memory")):

        def loss(chunk, index, error=error):
            raise error

        with pytest.raises(type(error)) as found:
            list(losses_of(probe([]), [1], loss)())
        assert found.value is error


def masks_of(method, data, loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    if isinstance(method, LossModel):
        method = LossModel(0.5, method.order, 2, logits_module=method.logits_module and "2", remove_dead=False)
    else:
        method = type(method)(sparsity=0.5, calibration_batches=3, remove_dead=False)
    small, _ = compress(model, method, data[0][0], data, loss)
    return torch.cat([(p == 0).flatten() for p in small.parameters()])


@every_method
def test_a_batch_without_a_loss_is_skipped_and_all_of_them_without_one_are_an_error(method):
    torch.manual_seed(1)
    first, skipped, last = ((torch.randn(n, 5).double(), torch.randint(0, 4, (n,))) for n in (12, 40, 7))

    def loss(model, batch):
        return None if len(batch[0]) == 40 else loss_of(model, batch)

    found = masks_of(method, [first, skipped, last], loss)
    assert torch.equal(found, masks_of(method, [first, last], loss_of))
    assert not torch.equal(found, masks_of(method, [first], loss_of))  # reading goes on after it
    with pytest.raises(ModelError, match=r"Sequential gave no loss on any.*returns None skips.*calibration_batches="):
        masks_of(method, [skipped], loss)
    with pytest.raises(ModelError, match=r"Module gave no loss on any"):
        score_in_fit(copy.deepcopy(method), lambda module, batch: None)


@every_method
@pytest.mark.parametrize("how", ["detached", "no_grad"])
def test_a_loss_without_a_gradient_is_told(method, how):
    def step(module, batch):
        with torch.set_grad_enabled(how == "detached"):
            loss = loss_of(module, batch)
        return loss.detach()

    with pytest.raises(ModelError, match=r"(no gradient: it is detached|that weights were used for)"):
        score_in_fit(copy.deepcopy(method), step)
