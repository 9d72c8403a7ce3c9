"""The paper's smaller network, FC2 on MNIST (Gao et al. 2020): matrix product operators from scratch beside the dense run, and from trained weights
beside low rank at equal parameters. Run with ``-m benchmark -s`` and ``MNIST=``, a numpy file with ``x_train``, ``y_train``, ``x_test``, ``y_test``.
"""

import copy
import math
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

from lightning_prune import MPO, LowRank, compress, count_flops

EPOCHS, SEEDS, BATCH = 10, (0, 1, 2), 100
RATE, TUNING, CLIP = (
    0.8,
    0.2,
    0.5,
)  # the authors' rate; products of cores have steep places, so gradients are clipped, in all runs alike
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
    trainer(folder, max_epochs=EPOCHS, gradient_clip_val=CLIP, callbacks=list(methods)).fit(
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

    def note(row, model, own, before=math.nan):
        found = accuracy(model, digits)
        flops = count_flops(model, model.example_input_array).total
        cells.setdefault(row, []).append((found, found - own, before, params(model), flops))

    for seed in SEEDS:
        torch.manual_seed(seed)
        new = FC2(RATE)
        dense = fit(copy.deepcopy(new), digits, seed, tmp_path)
        own = accuracy(dense, digits)
        note("dense", dense, own)
        scratch = fit(copy.deepcopy(new), digits, seed, tmp_path, MPO(bond=BONDS, modes=MODES, mode="scratch"))
        note("MPO from scratch, bonds 16 and 4", scratch, own)
        tunings = {
            "dense, trained on": [],
            "MPO, bonds 16 and 4": [MPO(bond=BONDS, modes=MODES)],
            "MPO, two cores": [MPO(params=params(scratch))],
            "LowRank": [LowRank(params=params(scratch), align=1)],
        }
        for row, methods in tunings.items():
            tuned = copy.deepcopy(dense)
            tuned.lr = TUNING
            before = [accuracy(compress(dense, method, dense.example_input_array)[0], digits) for method in methods]
            note(row, fit(tuned, digits, seed, tmp_path, *methods), own, *before)
    for row, found in cells.items():
        columns = list(zip(*found, strict=True))[:3]
        shares = ["-" if math.isnan(c[0]) else f"{statistics.mean(c):.2f} ± {statistics.stdev(c):.2f}" for c in columns]
        print(f"| {row} | {' | '.join(shares)} | {found[0][3]:,} | {found[0][4]:,} |")
    record_property("cells", cells)
    assert statistics.mean(change for _, change, *_ in cells["MPO from scratch, bonds 16 and 4"]) >= -0.5
