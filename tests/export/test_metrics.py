import math

import numpy as np
import pytest
import torch
from lightning_prune.export.metrics import TaskMetric
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.errors import OptionError

SCORES = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], np.float32)
LABELS = torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    "metric", ["accuracy", MulticlassAccuracy(2, average="micro"), lambda: MulticlassAccuracy(2, average="micro")]
)
def test_every_model_has_a_state_of_its_own(metric):
    task = TaskMetric(metric)
    task.update("dense", SCORES, LABELS)
    task.update("compact", SCORES[:, ::-1], LABELS)
    task.update("dense", SCORES, torch.tensor([0, 1, 0]))
    assert task.values() == pytest.approx({"dense": 5 / 6, "compact": 1 / 3})
    assert task.higher_is_better is True
    assert task.drop(0.9, 0.7) == pytest.approx(0.2)


def test_a_given_metric_is_neither_changed_nor_started_from():
    given = MulticlassAccuracy(2, average="micro")
    given.update(torch.from_numpy(SCORES[:, ::-1].copy()), LABELS)
    before = given.compute()
    task = TaskMetric(given)
    task.update("compact", SCORES, LABELS)
    assert task.values()["compact"] == pytest.approx(2 / 3)
    assert given.compute() == before


def test_lower_is_better_turns_the_drop():
    task = TaskMetric("mse")
    task.update("compact", SCORES[:, 0], torch.zeros(3))
    assert task.values()["compact"] == pytest.approx(float((SCORES[:, 0] ** 2).mean()))
    assert task.drop(0.1, 0.3) == pytest.approx(0.2)
    assert task.drop(0.1, math.nan) == math.inf


def test_unusable_metrics_are_refused():
    with pytest.raises(OptionError, match=r"There is no metric 'acuracy'. Did you mean 'accuracy'\?"):
        TaskMetric("acuracy")
    with pytest.raises(OptionError, match="got int"):
        TaskMetric(3)
    with pytest.raises(OptionError, match=r"metric\(\) returned float"):
        TaskMetric(lambda: 0.5).update("a", SCORES, LABELS)
    with pytest.raises(OptionError, match="needs targets"):
        TaskMetric("accuracy").update("a", SCORES, None)
    with pytest.raises(OptionError, match=r"does not take outputs \[3, 2\] with targets \[2\]"):
        TaskMetric("accuracy").update("a", SCORES, LABELS[:2])
    task = TaskMetric(lambda: MulticlassAccuracy(2, average=None))
    task.update("a", SCORES, LABELS)
    with pytest.raises(OptionError, match="one number per model"):
        task.values()
    with pytest.raises(OptionError, match=r"needed|a torchmetrics.Metric"):
        TaskMetric(lambda: MetricCollection([MeanSquaredError()])).update("a", SCORES, LABELS)
