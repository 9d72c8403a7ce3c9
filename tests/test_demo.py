"""The digits, at rest and moving, and the networks that the shipped recipes train."""

import importlib.util

import pytest
import pytorch_lightning as pl
import torch

from lightning_prune.demo import DigitsData, DigitsNet, MovingDigitsData, MovingDigitsNet
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


@pytest.fixture(scope="module")
def clips():
    found = MovingDigitsData()
    found.setup("fit")
    return found


def test_each_digit_moves_one_column_per_frame_to_the_right_and_backwards_to_the_left(clips):
    for name, count in (("train", 1257), ("val", 180), ("test", 360)):
        moving, targets = clips._splits[name].tensors
        assert moving.shape == (2 * count, 1, 8, 16, 16)
        right, left = moving.split(count)
        assert torch.equal(right[:, :, 1:], right[:, :, :-1].roll(1, -1))
        assert torch.equal(left, right.flip(2))
        assert targets.tolist() == [*targets[:count].tolist(), *(targets[:count] + 10).tolist()]


def test_clips_hold_the_digits_of_the_same_split(data, clips):
    for name in ("train", "val", "test"):
        digits, moving = data._splits[name].tensors, clips._splits[name].tensors
        count = len(digits[1])
        assert torch.equal(moving[1][:count], digits[1])
        ink = [(x[:count].double() - x.min()).flatten(1).sum(1) for x in (digits[0], moving[0])]
        assert float(torch.corrcoef(torch.stack(ink))[0, 1]) > 0.9999  # as much of it in both, whatever the scale


def test_where_a_digit_is_in_one_frame_tells_nothing_about_the_direction(clips):
    moving, _ = clips._splits["train"].tensors
    ink = (moving[:1257, 0] - moving.min()).double().sum(2)  # [clips, frames, columns]
    angles = 2j * torch.pi * torch.arange(16) / 16
    centres = (ink * torch.exp(angles)).sum(-1)
    lengths = (centres / centres.abs()).mean(0).abs()  # 0 where all columns are equally likely
    assert float(lengths.max()) < 3 / 1257**0.5


@pytest.mark.parametrize(
    ("net", "split", "epochs", "least"), [(DigitsNet, "data", 4, 0.5), (MovingDigitsNet, "clips", 2, 0.2)]
)
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*treespec, LeafSpec")
def test_a_short_fit_learns_and_logs(net, split, epochs, least, tmp_path, request):
    data = request.getfixturevalue(split)
    torch.manual_seed(0)
    model = net(width=16 if net is DigitsNet else 8, lr=0.1)
    trainer = pl.Trainer(
        max_epochs=epochs,
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
    assert accuracy == pytest.approx(correct / len(data._splits["test"]))
    assert accuracy > least
    assert least < validated <= 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DigitsData(batch_size=1), "batch_size.*got 1"),
        (lambda: DigitsData(size=4), "size.*got 4"),
        (lambda: DigitsNet(width=0), "width.*got 0"),
        (lambda: DigitsNet(dropout=1.0), "dropout.*got 1.0"),
        (lambda: DigitsNet(lr=-1.0), "lr.*got -1.0"),
        (lambda: DigitsNet(optimizer="adagrad"), "optimizer.*'adagrad'"),
        (lambda: MovingDigitsData(frames=1), "MovingDigitsData: frames.*got 1"),
        (lambda: MovingDigitsData(size=4), "MovingDigitsData: size.*got 4"),
        (lambda: MovingDigitsNet(width=0), "MovingDigitsNet: width.*got 0"),
    ],
)
def test_values_out_of_range_are_told(build, message):
    with pytest.raises(OptionError, match=message):
        build()


def test_the_network_for_clips_is_built_again_from_its_hyperparameters():
    model = MovingDigitsNet(width=4, frames=5, size=12, momentum=0.5)
    again = MovingDigitsNet(**model.hparams)
    assert dict(again.hparams) == dict(model.hparams)
    assert again.example_input_array.shape == (2, 1, 5, 12, 12)
    assert again(again.example_input_array).shape == (2, 20)


def test_a_missing_scikit_learn_names_the_extra(monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "sklearn" else original(name, *a))
    with pytest.raises(OptionError, match=r"scikit-learn.*lightning-prune\[demo\]"):
        DigitsData().setup("fit")
