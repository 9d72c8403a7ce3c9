"""The digits and the network that the shipped recipes train."""

import importlib.util

import pytest
import pytorch_lightning as pl
import torch

from lightning_prune.demo import DigitsData, DigitsNet
from lightning_prune.errors import OptionError


@pytest.fixture(scope="module")
def data():
    found = DigitsData(batch_size=64)
    found.setup("fit")
    return found


def images(loader):
    return torch.cat([batch[0] for batch in loader])


def test_the_three_parts_are_the_1797_digits_each_once(data):
    from sklearn.datasets import load_digits

    parts = [data._splits[name].tensors for name in ("train", "val", "test")]
    assert [len(part[1]) for part in parts] == [1257, 180, 360]
    counts = torch.bincount(torch.cat([part[1] for part in parts]))
    assert counts.tolist() == torch.bincount(torch.from_numpy(load_digits().target).long()).tolist()
    every = torch.cat([part[0] for part in parts])
    assert len(torch.unique(every.flatten(1), dim=0)) == len({image.tobytes() for image in load_digits().images})


def test_images_are_standardised_by_the_training_part(data):
    train = data._splits["train"].tensors[0]
    assert train.shape[1:] == (1, 16, 16)
    assert abs(float(train.double().mean())) < 1e-4
    assert abs(float(train.double().std()) - 1) < 1e-4


def test_the_split_is_fixed_by_the_seed_alone(data):
    torch.rand(7)
    again, other = DigitsData(), DigitsData(seed=1)
    for found in (again, other):
        found.setup("test")
    assert torch.equal(images(again.test_dataloader()), images(data.test_dataloader()))
    assert not torch.equal(images(other.test_dataloader()), images(data.test_dataloader()))


def test_the_order_depends_on_seed_and_epoch_only(data):
    loader = data.train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        torch.rand(3)
        orders.append(images(loader))
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    assert len(orders[0]) == 19 * 64


def test_two_ranks_share_the_training_images_without_overlap(data):
    class Trainer:
        world_size = 2

        def __init__(self, rank):
            self.global_rank = rank

    found = []
    for rank in (0, 1):
        data.trainer = Trainer(rank)
        found.append(set(iter(data.train_dataloader().sampler)))
    data.trainer = None
    assert not found[0] & found[1]
    assert len(found[0] | found[1]) == 1256


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*treespec, LeafSpec")
def test_a_short_fit_learns_and_logs(tmp_path, data):
    torch.manual_seed(0)
    model = DigitsNet(width=16, lr=0.1)
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
    )
    trainer.fit(model, datamodule=data)
    validated = float(trainer.callback_metrics["val_accuracy"])
    accuracy = trainer.test(model, datamodule=data, verbose=False)[0]["test_accuracy"]
    correct = sum(int((model.eval()(x).argmax(1) == y).sum()) for x, y in data.test_dataloader())
    assert accuracy == pytest.approx(correct / 360)
    assert accuracy > 0.5
    assert 0.5 < validated <= 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DigitsData(batch_size=1), "batch_size.*got 1"),
        (lambda: DigitsData(size=4), "size.*got 4"),
        (lambda: DigitsNet(width=0), "width.*got 0"),
        (lambda: DigitsNet(dropout=1.0), "dropout.*got 1.0"),
        (lambda: DigitsNet(lr=-1.0), "lr.*got -1.0"),
        (lambda: DigitsNet(optimizer="adagrad"), "optimizer.*'adagrad'"),
    ],
)
def test_values_out_of_range_are_told(build, message):
    with pytest.raises(OptionError, match=message):
        build()


def test_a_missing_scikit_learn_names_the_extra(monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "sklearn" else original(name, *a))
    with pytest.raises(OptionError, match=r"scikit-learn.*lightning-prune\[demo\]"):
        DigitsData().setup("fit")
