"""The paper's smaller network, FC2 on MNIST (Gao et al. 2020): matrix product operators from scratch beside the dense run, and from trained weights
beside low rank at equal parameters. Run with ``-m benchmark -s`` and ``MNIST=``, a numpy file with ``x_train``, ``y_train``, ``x_test``, ``y_test``.
"""

import copy
import os
import statistics

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lit import trainer
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_prune import MPO, LowRank

EPOCHS, SEEDS, BATCH = 10, (0, 1, 2), 100
MODES = {"fc1": [[4, 4, 4, 4], [4, 7, 7, 4]], "fc2": [[1, 1, 10, 1], [4, 4, 4, 4]]}
BONDS = {"fc1": 16, "fc2": 4}


class FC2(pl.LightningModule):
    """784 to 256 to 10, plain SGD, the rate falling to zero along a cosine."""

    def __init__(self, lr):
        super().__init__()
        self.lr, self.example_input_array = lr, torch.zeros(1, 784)
        self.fc1, self.fc2 = nn.Linear(784, 256), nn.Linear(256, 10)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.fixture(scope="module")
def digits():
    if not (path := os.environ.get("MNIST")):
        pytest.skip("MNIST= names no file")
    with np.load(path, allow_pickle=False) as file:
        images, labels = ({part: file[f"{kind}_{part}"] for part in ("train", "test")} for kind in "xy")
    return {
        part: (torch.from_numpy(x).flatten(1) / 255, torch.from_numpy(labels[part]).long())
        for part, x in images.items()
    }


def fit(model, digits, seed, folder, *methods):
    torch.manual_seed(seed)
    data = TensorDataset(*digits["train"])
    batches = BatchSampler(RandomSampler(data), BATCH, drop_last=True)
    trainer(folder, max_epochs=EPOCHS, callbacks=list(methods)).fit(
        model.train(), DataLoader(data, sampler=batches, batch_size=None)
    )
    return model


def accuracy(model, digits):
    images, labels = digits["test"]
    with torch.no_grad():
        return 100 * float((model.eval()(images).argmax(1) == labels).double().mean())


def params(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.benchmark
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning")
def test_bonds_of_16_from_scratch_are_as_good_as_dense(digits, tmp_path, record_property):
    cells = {}

    def note(row, model):
        cells.setdefault(row, []).append((accuracy(model, digits), params(model)))

    for seed in SEEDS:
        torch.manual_seed(seed)
        new = FC2(0.8)
        dense = fit(copy.deepcopy(new), digits, seed, tmp_path)
        note("dense", dense)
        scratch = fit(copy.deepcopy(new), digits, seed, tmp_path, MPO(bond=BONDS, modes=MODES, mode="scratch"))
        note("MPO from scratch, bonds 16 and 4", scratch)
        tunings = {
            "dense": [],
            "MPO, bonds 16 and 4": [MPO(bond=BONDS, modes=MODES)],
            "MPO, two cores": [MPO(params=params(scratch))],
            "LowRank": [LowRank(params=params(scratch))],
        }
        for row, methods in tunings.items():
            tuned = copy.deepcopy(dense)
            tuned.lr = 0.2
            note(f"{row}, fine-tuned", fit(tuned, digits, seed, tmp_path, *methods))
    for row, found in cells.items():
        shares = [share for share, _ in found]
        print(
            f"| {row} | {statistics.mean(shares):.2f} ± {statistics.stdev(shares):.2f} | {', '.join(f'{n:,}' for _, n in found)} |"
        )
    record_property("cells", cells)
    losses = [a - b for (a, _), (b, _) in zip(cells["dense"], cells["MPO from scratch, bonds 16 and 4"], strict=True)]
    assert statistics.mean(losses) <= 0.5
