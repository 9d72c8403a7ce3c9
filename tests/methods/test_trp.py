"""TRP: when it touches the weights, what its penalty does, and that training to low rank costs nothing at the end."""

import math

import pytest
import torch
from lit import LitNet, loader, trainer
from pytorch_lightning.callbacks import Callback
from torch import nn

from lightning_prune import TRP
from lightning_prune.methods.low_rank import Candidate
from lightning_prune.methods.trp import project_
from lightning_prune.structure.factorized import matrix_of
from lightning_prune.structure.spectrum import spectrum
from lightning_prune.structure.steps import Factorize

LAYERS = ("net.0", "net.3", "net.8", "net.10")


def numerical_rank(weight):
    return int(torch.linalg.matrix_rank(weight.detach().flatten(1).double(), rtol=1e-5))


class Watch(Callback):
    """Records, before every forward pass, the rank of a layer's weight; stands behind TRP in the list."""

    def __init__(self, layer="net.8"):
        self.layer, self.ranks, self.weights = layer, [], []

    def on_train_batch_start(self, trainer, module, *_):
        weight = module.get_submodule(self.layer).weight
        self.ranks.append(numerical_rank(weight))
        self.weights.append(weight.detach().clone())


def fit(method, tmp_path, watch, model=None, **options):
    model = model or LitNet(norm=False)
    trainer(tmp_path, callbacks=[method, watch], **options).fit(model, loader())
    return model


def test_weights_are_projected_in_steps_0_m_2m_and_no_other(tmp_path):
    watch = Watch()
    fit(TRP(energy=0.3, every_n_steps=3, include="net.8", align=1), tmp_path, watch, max_epochs=2)
    low = [rank < 32 for rank in watch.ranks]
    assert low == [step % 3 == 0 for step in range(8)]


def test_accumulation_counts_optimizer_steps_not_batches(tmp_path):
    watch = Watch()
    fit(
        TRP(energy=0.3, every_n_steps=2, include="net.8", align=1),
        tmp_path,
        watch,
        max_epochs=2,
        accumulate_grad_batches=2,
    )
    # 8 batches are 4 steps: projected before step 0 and step 2; within a step the weights stay
    assert [rank < 32 for rank in watch.ranks] == [True, True, False, False, True, True, False, False]


def test_start_epoch_leaves_the_epochs_before_alone(tmp_path):
    watch = Watch()
    fit(TRP(energy=0.3, every_n_steps=1, include="net.8", align=1, start_epoch=1), tmp_path, watch, max_epochs=2)
    assert [rank < 32 for rank in watch.ranks] == [False] * 4 + [True] * 4


def test_projection_is_the_truncated_svd_and_its_direction_that_of_the_nuclear_norm():
    layer = nn.Conv2d(6, 10, 3).double()
    before = layer.weight.detach().clone()
    candidate = Candidate(layer, "channel")
    direction = project_(candidate, 4, spectrum(candidate.matrix()))
    u, s, vh = torch.linalg.svd(before.flatten(1))
    expected = (u[:, :4] * s[:4]) @ vh[:4]
    torch.testing.assert_close(layer.weight.detach().flatten(1), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(direction.flatten(1), u[:, :4] @ vh[:4], rtol=0, atol=1e-10)


def nuclear_step(optimizer, tmp_path, nuclear_every="step", steps=2):
    """Return the weight before each batch of a fit whose task gradient is zero, and the learning rate."""

    class Flat(LitNet):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0.0

    watch = Watch()
    model = Flat(norm=False, optimizer=optimizer, lr=0.1).double()
    method = TRP(energy=0.2, nuclear=0.01, nuclear_every=nuclear_every, every_n_steps=100, include="net.8", align=1)
    fit(method, tmp_path, watch, model, precision="64-true", max_steps=steps + 1)
    return watch.weights


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_one_step_lowers_every_singular_value_by_rate_times_strength(optimizer, tmp_path):
    before, after = nuclear_step(optimizer, tmp_path)[:2]
    decay = 1 - 0.1 * 0.01 if optimizer == "AdamW" else 1.0  # AdamW's own weight decay, 0.01 by default
    s = [torch.linalg.svdvals(w) for w in (before, after)]
    kept = s[0] > 1e-6
    torch.testing.assert_close(s[1][kept], s[0][kept] * decay - 0.1 * 0.01, rtol=0, atol=1e-9)


def test_penalty_acts_in_every_step_or_only_after_projections(tmp_path):
    every = nuclear_step("Adam", tmp_path)
    rare = nuclear_step("Adam", tmp_path, nuclear_every="projection")
    assert not torch.equal(every[1], every[2])
    assert not torch.equal(rare[0], rare[1])
    assert torch.equal(rare[1], rare[2])


def test_rank_never_rises_while_the_gradients_stay_below_the_bound_of_theorem_2(tmp_path):
    class Log(Watch):
        def __init__(self, method):
            super().__init__()
            self.method, self.seen, self.moves = method, [], []

        def on_train_batch_start(self, trainer, module, *_):
            weight = module.net[8].weight.detach()
            self.seen.append(self.method.ranks["net.8"])
            if self.weights:
                self.moves.append(float((weight - self.weights[-1]).norm()))
            self.weights.append(weight.clone())

    method = TRP(energy=0.05, every_n_steps=2, include="net.8", align=1)
    log = Log(method)
    fit(method, tmp_path, log, LitNet(norm=False, lr=1e-3), max_epochs=4)
    norm = float(log.weights[-1].norm())
    assert max(log.moves[0::2]) < math.sqrt(0.05) / 2 * norm  # the premise, measured
    assert all(later <= earlier for earlier, later in zip(log.seen, log.seen[1:], strict=False))
    assert log.seen[-1] < 32


def test_the_final_factorization_meets_the_energy_rule_and_is_maximal(tmp_path):
    class End(Callback):
        def on_train_end(self, trainer, module):
            self.weights = {name: module.get_submodule(name).weight.detach().clone() for name in LAYERS}

    method, end = TRP(energy=0.4, every_n_steps=2, align=1), End()
    model = LitNet(norm=False)
    trainer(tmp_path, callbacks=[method, end]).fit(model, loader())
    assert method.plan.steps
    for step in method.plan.steps:
        assert isinstance(step, Factorize)
        s = torch.linalg.svdvals(matrix_of(end.weights[step.module], step.kind)[0].double()).square()
        lost = s.flip(0).cumsum(0).flip(0) / s.sum()  # share lost at rank k is lost[k]
        assert lost[step.rank] <= 0.4 < lost[step.rank - 1]


def test_layers_that_do_not_pay_are_left_alone_with_the_reason(tmp_path):
    class Mixed(LitNet):
        def __init__(self):
            super().__init__(norm=False, lr=1e-4)
            with torch.no_grad():
                self.net[8].weight.copy_(
                    torch.ones(32, 1) @ torch.randn(1, 384)
                )  # of rank 1; the others are of full rank

    method = TRP(energy=0.01, every_n_steps=100, align=1)
    fit(method, tmp_path, Watch(), Mixed(), max_epochs=1)
    assert [step.module for step in method.plan.steps] == ["net.8"]
    assert "is not cheaper than dense" in method.plan.left_alone["net.3"]
