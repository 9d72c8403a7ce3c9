"""MPO: which layers, which bonds, within which bound; what the paper counts; weight decay; squeezing."""

import copy
import logging
import math

import pytest
import torch
from lit import LitNet, loader, trainer
from torch import nn

from lightning_prune import MPO, compress, count_flops, load_from_checkpoint
from lightning_prune.budget.bonds import forms_within, ladder, price
from lightning_prune.callback.core_decay import CoreDecay
from lightning_prune.callback.one_shot import end_of
from lightning_prune.errors import BudgetError, ModelError, OptionError, PlanError
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.mpo import MPOConv, MPOLinear, build_mpo
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.steps import Tensorize
from lightning_prune.structure.surgery import mask_
from lightning_prune.structure.tensor_train import Form, contract, cut_values, draw, fold, tt_svd, unfold


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 64, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(576, 97),
        nn.ReLU(),
        nn.Linear(97, 10),
    )


X = torch.zeros(2, 3, 12, 12)


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def correlated(rows: int, columns: int) -> nn.Linear:
    """A layer whose spectrum falls, unlike that of random weights."""
    layer = nn.Linear(columns, rows).double()
    side = math.isqrt(rows), math.isqrt(columns)
    with torch.no_grad():
        layer.weight.zero_()
        for k in range(side[0] * side[1]):
            a, b = (
                torch.randn(side, dtype=torch.float64),
                torch.randn(rows // side[0], columns // side[1], dtype=torch.float64),
            )
            layer.weight += torch.kron(a, b) * 0.5**k
    return layer


# Budgets --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "share"), [("params", 0.7), ("params", 0.3), ("params", 0.1), ("flops", 0.6), ("flops", 0.4)]
)
@pytest.mark.parametrize("cores", [2, 3])
def test_a_bound_is_never_exceeded_and_met_closely(what, share, cores):
    model = network()
    small, plan = compress(model, MPO(**{what: share}, cores=cores), X)
    have = {"flops": lambda m: count_flops(m, X).total, "params": params}[what]
    assert have(small) <= share * have(model)
    if what == "params":
        assert have(small) > (share - 0.03) * have(model)
    assert plan.origin.params == params(model)


@pytest.mark.parametrize("what", ["params", "flops"])
def test_nothing_that_loses_less_fits_into_what_is_left_of_the_budget(what):
    model = network()
    small, plan = compress(model, MPO(**{what: 0.4}), X)
    counts = [count_flops(m, X).total if what == "flops" else params(m) for m in (model, small)]
    shapes = count_flops(model, X).shapes
    for step in plan.steps:
        layer = model.get_submodule(step.module)
        forms = forms_within(step.form, cut_values(fold(layer.weight.detach(), step.form)))
        costs = [price(layer, form, shapes[step.module], what) for form, _ in forms]
        choices = ladder(forms, costs, price(layer, None, shapes[step.module], what))
        here = next(k for k, choice in enumerate(choices) if choice.size == step.form)
        assert choices[here + 1].cost - choices[here].cost > int(0.4 * counts[0]) - counts[1]


def test_flops_are_priced_as_they_are_counted():
    for shape in ((2, 3, 12, 12), (64, 3, 12, 12)):
        x = torch.zeros(shape)
        dense = count_flops(network(), x)
        small, plan = compress(network(), MPO(flops=0.5), x)
        priced = dense.total
        for step in plan.steps:
            layer, seen = network().get_submodule(step.module), dense.shapes[step.module]
            priced += price(layer, step.form, seen, "flops") - price(layer, None, seen, "flops")
        assert priced == count_flops(small, x).total


def test_an_error_holds_for_every_layer_and_what_grows_stays_dense():
    torch.manual_seed(0)
    model = nn.Sequential(correlated(64, 100), nn.ReLU(), nn.Linear(64, 36).double())
    small, plan = compress(model, MPO(error=0.1), torch.zeros(1, 100, dtype=torch.float64))
    (step,) = plan.steps
    weight = small[0].dense_weight().detach()
    lost = float((weight - model[0].weight.detach()).norm() / model[0].weight.detach().norm())
    assert 0.04 < lost <= 0.1  # one bond less would lose twice as much
    assert "would take" in plan.left_alone["2"]
    assert step.bonds[0] < 8


def test_a_bound_that_cannot_be_met_names_layers_and_the_least():
    with pytest.raises(BudgetError, match=r"is the least that can be reached.*Bound by '3'"):
        compress(network(), MPO(flops=0.01), X)


def test_a_bond_larger_than_useful_is_lowered_and_said(caplog):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with caplog.at_level(logging.WARNING, "lightning_prune"):
        _, plan = compress(model, MPO(bond={"0": 30, "2": 6}, modes={"2": [[2, 4, 8], [2, 4, 8]]}), torch.zeros(1, 64))
    assert [tuple(step.bonds) for step in plan.steps] == [(30,), (4, 6)]
    assert [r.getMessage() for r in caplog.records if "larger" in r.getMessage()] == [
        "MPO: bonds of 6 between all cores of layer '2' are larger than useful; lowered to 4/6."
    ]


# The paper's counts ---------------------------------------------------------------------------------------------------------

FC2 = {"modes": {"0": [[4, 4, 4, 4], [4, 7, 7, 4]], "2": [[1, 1, 10, 1], [4, 4, 4, 4]]}}
LENET = {
    "modes": {
        "0": [[2, 5, 6, 2], [2, 10, 10, 2]],
        "2": [[2, 3, 7, 2], [2, 5, 6, 2]],
        "4": [[1, 5, 2, 1], [2, 3, 7, 2]],
    },
    "bond": {"0": 4, "2": 4, "4": 2},
}


def weights(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "bias" not in name)


@pytest.mark.parametrize(("bond", "expected"), [(2, 1 / 198), (16, 0.077)])
def test_fc2_has_the_parameters_of_the_paper(bond, expected):
    """rho of Table I: weights after, by weights before; D=2 leaves 1024 of 203,264."""
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    small, _ = compress(model, MPO(bond={"0": bond, "2": 4}, mode="scratch", **FC2), torch.zeros(1, 784))
    assert weights(small) / weights(model) == pytest.approx(expected, rel=0.01)
    if bond == 2:
        small, _ = compress(model, MPO(bond={"0": 2, "2": 4}, mode="scratch", **FC2), torch.zeros(1, 784))
        assert weights(small) == 1024


def test_the_linear_layers_of_lenet5_have_the_parameters_of_the_paper():
    model = nn.Sequential(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
    small, _ = compress(model, MPO(mode="scratch", **LENET), torch.zeros(1, 400))
    assert weights(small) / weights(model) == pytest.approx(0.0485, abs=5e-5)


def test_the_densenet_rows_of_the_paper_that_fit_and_the_one_that_does_not():
    """40(16,12,12): .129. With its last convolution as well the paper says .497 and the same formula .79."""
    head = Form((1, 5, 2, 1), (4, 4, 7, 4), (4, 4, 4))
    head = head.with_bonds(head.bonds)
    assert head.params / (448 * 10) == pytest.approx(0.129, abs=1e-3)


# The classifiers of the paper's table (Gao et al. 2020): input modes, bond, and the share of their parameters as printed.
CLASSIFIERS = {
    "ResNet": ((4, 4, 4, 4), 3, 0.11),
    "DenseNet 40-12": ((4, 4, 7, 4), 4, 0.129),
    "DenseNet 40-24": ((4, 5, 11, 4), 4, 0.089),
    "DenseNet 100-12": ((4, 7, 7, 6), 4, 0.070),
    "DenseNet 100-24": ((5, 8, 12, 5), 4, 0.044),
}


@pytest.mark.parametrize("row", CLASSIFIERS)
def test_the_shares_of_the_papers_classifiers_come_out(row):
    inputs, bond, share = CLASSIFIERS[row]
    model = nn.Sequential(nn.Linear(math.prod(inputs), 10, bias=False))
    small, _ = compress(
        model,
        MPO(bond=bond, modes={"0": [[1, 5, 2, 1], list(inputs)]}, mode="scratch"),
        torch.zeros(1, math.prod(inputs)),
    )
    assert params(small) / params(model) == pytest.approx(share, abs=2.5e-3 if row == "ResNet" else 6e-4)


def test_two_rows_of_the_papers_table_do_not_come_out():
    # ResNet's .11 is the classifier's alone: with the two maps of 16,384 squared it names, also as convolutions of 256 channels, far less is left.
    unit = Form((4,) * 7, (4,) * 7, (4,) * 6).params
    classifier = Form((1, 5, 2, 1), (4, 4, 4, 4), (3, 3, 3)).params
    assert (2 * unit + classifier) / (2 * 256 * 256 * 9 + 2560) < 0.01
    # DenseNet's last convolution, 440 to 12 channels, and the classifier: .497 printed, .794 counted, .624 with bonds no larger than useful
    form = Form((2, 4, 4, 3, 4, 2), (4, 5, 8, 11, 4, 4), (20,) * 5)
    classifier = Form((1, 5, 2, 1), (4, 4, 7, 4), (4,) * 3).params
    dense = 440 * 12 * 9 + 4480
    assert (form.params + classifier) / dense == pytest.approx(0.794, abs=1e-3)
    assert (form.with_bonds(form.bonds).params + classifier) / dense == pytest.approx(0.624, abs=1e-3)


# What happens to layers -----------------------------------------------------------------------------------------------------


def test_kinds_of_layers_and_reasons():
    small, plan = compress(network(), MPO(bond=2), X)
    assert {step.module for step in plan.steps} == {"0", "3", "7", "9"}
    assert isinstance(small[3], MPOConv)
    assert isinstance(small[7], MPOLinear)
    assert plan.left_alone == {"2": "it is a convolution in groups"}


def test_tied_parametrized_and_adapted_weights_stay():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer, self.lora_A = nn.Linear(64, 64), nn.Linear(64, 2, bias=False)

        def forward(self, x):
            return self.base_layer(x) + self.lora_A(x).sum()

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
            self.d, self.e = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), Adapted()
            self.unused = nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.e(self.d(self.c(self.b(self.a(x)))))

    _, plan = compress(Tied(), MPO(bond=4), torch.zeros(2, 64))
    assert [step.module for step in plan.steps] == ["c"]
    for name, reason in {"a": "tied", "d": "parametrized", "e.base_layer": "adapter", "unused": "not called"}.items():
        assert reason in plan.left_alone[name]


def test_quantized_layers_stay():
    quantized = type("Linear", (nn.Linear,), {"__module__": "torch.ao.nn.quantized.dynamic.modules.linear"})
    with pytest.raises(ModelError, match="Linear is quantized"):
        compress(nn.Sequential(nn.Linear(64, 64), quantized(64, 64)), MPO(bond=4, include="1"), torch.zeros(2, 64))


@pytest.mark.parametrize("mode", ["pretrained", "scratch"])
def test_the_compact_model_computes_what_the_plan_stands_for(mode):
    torch.manual_seed(3)
    model = network().double().eval()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    small, plan = compress(model, MPO(params=0.3, mode=mode), x)
    mask_(model, plan)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-11)


def test_a_plan_builds_its_shapes_and_undoes_them():
    small, plan = compress(network(), MPO(params=0.3, auxiliary_only=True, cores=3), X)
    fresh = network()
    Plan.from_json(plan.to_json()).build(fresh)
    fresh.load_state_dict(
        {key: value for key, value in small.state_dict().items() if "extra_state" not in key}, strict=True
    )
    torch.testing.assert_close(fresh(X), small(X))
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in small.parameters()]
    for step in reversed(plan.steps):
        step.undo(fresh)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in network().parameters()]
    assert all(p.requires_grad for p in fresh.parameters())


def test_a_broken_step_of_a_file_is_refused():
    step = compress(network(), MPO(bond=2, include="7"), X)[1].steps[0].to_dict()
    for change in (
        {"bonds": [0]},
        {"bonds": [10**6]},
        {"outputs": [2, 3]},
        {"train": "no"},
        {"seed": "1"},
        {"inputs": [1.0, 576]},
    ):
        with pytest.raises(PlanError, match="'7'"):
            Tensorize(**{key: value for key, value in (step | change).items() if key != "action"})


def test_from_scratch_the_variance_is_that_of_the_weights_and_the_seed_decides():
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    draws = [compress(model, MPO(bond=8, mode="scratch", seed=seed), torch.zeros(1, 256))[0] for seed in (0, 0, 1)]
    found = [[layer.dense_weight() for layer in (draw[0], draw[2])] for draw in draws]
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][0], found[0][1])
    variances = [float(w.detach().var() / model[0].weight.detach().var()) for pair in found for w in pair]
    assert sum(variances) / len(variances) == pytest.approx(1, rel=0.1)
    with torch.no_grad():
        model[0].weight.zero_()
    with pytest.raises(ModelError, match="0: all its weights are zero"):
        compress(model[:2], MPO(bond=8), torch.zeros(1, 256))
    zero = compress(model, MPO(bond=8, mode="scratch"), torch.zeros(1, 256))[0][0]
    assert float(zero.dense_weight().detach().var()) == pytest.approx(2 / 512, rel=0.2)
    assert not zero.bias.any()


def test_facts_and_rows_tell_the_bond_and_multiply_adds():
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    _, plan = compress(model, MPO(bond=16, include="0", modes={"0": FC2["modes"]["0"]}), torch.zeros(1, 784))
    (step,) = plan.steps
    facts, (row, *_) = step.facts(), plan.rows()
    assert facts["bond"] == 16
    assert row["kept"] == pytest.approx(0.077, abs=0.002)
    assert "662% of the multiply-adds" in row["after"]


def test_a_second_stage_leaves_cores_alone_and_knows_the_names():
    small, _ = compress(network(), MPO(bond=2, include="7"), X)
    again, plan = compress(small, MPO(bond=3, include=["7", "9"]), X)
    assert [step.module for step in plan.steps] == ["7", "9"]
    assert again[7].form.bonds == (2,)
    assert not any("7" in name for name in plan.left_alone)


def test_an_unrolled_convolution_becomes_cores_of_its_linear_map():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU()).double().eval()
    x = torch.randn(7, 16, 8, 8, dtype=torch.float64)
    columns = [model[0](image) - model[0].bias[:, None, None] for image in torch.eye(1024).double().view(-1, 16, 8, 8)]
    matrix = torch.stack([column.flatten() for column in columns], 1).detach()
    modes = {"0": [[8, 6, 8], [8, 16, 8]]}
    small, plan = compress(model, MPO(bond=3, modes=modes, unroll="0"), x[:1])
    assert [(step.module, step.action) for step in plan.steps] == [("0", "unroll"), ("0.linear", "mpo")]
    form = Form((8, 6, 8), (8, 16, 8), (3, 3))
    cores = tt_svd(fold(matrix, form), form.bonds).cores
    expected = x.flatten(1) @ unfold(contract(cores), form, matrix.shape).T + model[0].bias.repeat_interleave(16)
    torch.testing.assert_close(small(x), expected.view(7, 24, 4, 4).relu(), rtol=0, atol=1e-10)
    assert params(small) == form.params + 24 * 16


@pytest.mark.parametrize(("what", "share"), [("params", 0.6), ("flops", 0.7)])
def test_a_budget_prices_an_unrolled_convolution_beside_the_convolution_itself(what, share):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval()
    x = torch.zeros(5, 32, 2, 2)
    small, plan = compress(model, MPO(**{what: share}, unroll="Conv2d", cores=3, mode="scratch"), x)
    assert plan.steps[0].action == "unroll"
    cost = {"params": params, "flops": lambda m: count_flops(m, x).total}[what]
    assert 0 < cost(small) <= share * cost(model)


def test_the_papers_convolution_as_a_linear_map_has_its_count():
    model = nn.Sequential(nn.Conv2d(512, 512, 3, padding=1, bias=False))
    modes = {"0": [[2, 8, 8, 8, 2], [2, 8, 8, 8, 2]]}
    small, _ = compress(model, MPO(bond=4, modes=modes, unroll="0", mode="scratch"), torch.zeros(1, 512, 2, 2))
    assert params(small) == 2 * 2 * 4 + 3 * (4 * 8 * 8 * 4) + 4 * 2 * 2  # 3,104 where the dense map has 2048^2


def small_maps():
    return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Flatten())


def test_what_cannot_be_unrolled_is_left_alone_with_the_reason_or_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(64, 64)

        def forward(self, x):
            return self.head(self.conv(self.conv(x)[:, :, ::2]).mean((2, 3)).repeat(1, 8))

    _, plan = compress(Twice(), MPO(bond=2, unroll="conv"), torch.zeros(1, 8, 6, 4))
    assert plan.left_alone["conv"].startswith("it is called with maps of 3x4 and 6x4")
    with pytest.raises(OptionError, match=r"'conv', which include= or exclude= leaves out"):
        compress(Twice(), MPO(bond=2, unroll="conv", exclude="conv"), torch.zeros(1, 8, 6, 4))
    small, _ = compress(small_maps(), MPO(bond=2, cores=3, unroll="0", include="0"), torch.zeros(1, 16, 4, 4))
    small, plan = compress(small, MPO(bond=2, cores=3, unroll=["0", "2"], include="2"), torch.zeros(1, 16, 4, 4))
    assert [step.module for step in plan.steps][-2:] == ["2", "2.linear"]
    with pytest.raises(OptionError, match="unroll='nine' matches no layer"):
        compress(small, MPO(bond=1, unroll="nine"), torch.zeros(1, 16, 4, 4))
    with pytest.raises(OptionError, match=r"unroll='fc' matches no layer.*'conv'"):
        compress(Twice(), MPO(bond=2, unroll="fc"), torch.zeros(1, 8, 6, 4))


# Training -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("SGD", {"momentum": 0.9}),
        ("SGD", {"maximize": True}),
        ("AdamW", {}),
        ("RMSprop", {}),
    ],
)
def test_decay_counts_one_nth_on_the_cores(kind, options, tmp_path):
    """Beside the same fit without the callback, the decay divided by hand."""

    class Net(LitNet):
        cores_decay = 0.1

        def configure_optimizers(self):
            cores = {p for name, p in self.named_parameters() if "cores" in name}
            rest = [p for p in self.parameters() if p not in cores]
            groups = [{"params": list(cores), "weight_decay": self.cores_decay}, {"params": rest}]
            return getattr(torch.optim, kind)(groups, lr=1e-3, weight_decay=0.1, **options)

    found = []
    for share in (1, 1 / 2):
        torch.manual_seed(0)
        model = Net(norm=False).double()
        model.cores_decay = 0.1 * share
        method = MPO(bond=3, include="net.8")
        if share != 1:
            model = compress(model, method, torch.zeros(2, 1, 8, 8, dtype=torch.float64))[0]
        run = trainer(tmp_path, callbacks=[method] if share == 1 else [], precision="64-true", max_epochs=1)
        run.fit(model, loader())
        found.append(model.net[8].dense_weight())
    torch.testing.assert_close(*found, rtol=1e-4 if kind == "AdamW" else 1e-10, atol=1e-6 if kind == "AdamW" else 1e-12)


@pytest.mark.parametrize(
    ("kind", "lr"), [("AdamW", 1e-2), ("AdamW", 1.0), ("Adafactor", 1e-2), ("Muon", 1e-2), ("SGD", 1e-2)]
)
def test_without_a_gradient_of_the_loss_the_weight_decays_as_a_dense_one(kind, lr):
    torch.manual_seed(0)
    layer = build_mpo(nn.Linear(64, 64, bias=False), Form((4, 4, 4), (4, 4, 4), (3, 3))).double()
    layer.fill(draw(layer.form, 1.0, seed=0), None)
    optimizer = getattr(torch.optim, kind)(layer.parameters(), lr=lr, weight_decay=0.3 if lr < 1 else 1.0)
    decay, before = CoreDecay(layer), layer.dense_weight().detach().clone()
    for core in layer.cores:
        core.grad = torch.zeros_like(core)
    decay.lessen(optimizer)
    optimizer.step()
    decay.give_back(optimizer)
    share = 1 - lr * (0.3 if lr < 1 else 1.0)
    torch.testing.assert_close(layer.dense_weight().detach(), share * before, rtol=3 * (1 - share) ** 2, atol=1e-12)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_two_callbacks_and_two_optimizers_balance_every_core_once(kind, tmp_path):
    class Still(LitNet):
        def __init__(self):
            super().__init__(norm=False)
            self.automatic_optimization = False

        def training_step(self, batch, index):
            for optimizer in self.optimizers():
                optimizer.zero_grad(set_to_none=False)
            self.manual_backward(0 * self(batch[0]).sum())
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            own = [p for name, p in self.named_parameters() if "net.8" in name]
            rest = [p for name, p in self.named_parameters() if "net.8" not in name]
            return [getattr(torch.optim, kind)(part, lr=0.1, weight_decay=0.1) for part in (own, rest)]

    torch.manual_seed(0)
    model = Still()
    methods = [MPO(bond=3, include="net.8"), MPO(bond=2, include="net.10")]
    before = [compress(model, method, torch.zeros(2, 1, 8, 8))[0] for method in methods]
    run = trainer(tmp_path, callbacks=methods, max_epochs=1)
    run.fit(model, loader())
    for name, old in zip(("net.8", "net.10"), before, strict=True):
        steps = run.global_step // 2
        norms = [float(m.get_submodule(name).dense_weight().detach().norm()) for m in (model, old)]
        assert norms[0] / norms[1] == pytest.approx(0.99**steps, rel=1e-3)


def test_clipped_balancing_is_said(tmp_path, caplog):
    class Decaying(LitNet):
        def configure_optimizers(self):
            return getattr(torch.optim, self.hparams.optimizer)(self.parameters(), lr=0.01, weight_decay=0.1)

    for kind, count in (("SGD", 1), ("AdamW", 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lightning_prune"):
            trainer(tmp_path, callbacks=[MPO(bond=2)], max_epochs=1, gradient_clip_val=0.1).fit(
                Decaying(optimizer=kind), loader()
            )
        assert sum("gradient_clip_val" in r.getMessage() for r in caplog.records) == count


def test_decay_of_an_optimizer_that_is_not_torchs_is_left_alone():
    class Own(torch.optim.Optimizer):
        def step(self, closure=None):
            pass

    layer = build_mpo(nn.Linear(16, 16, bias=False), Form((4, 4), (4, 4), (2,)))
    layer.fill(draw(layer.form, 1.0, seed=0), None)
    before = copy.deepcopy(layer)
    for core in layer.cores:
        core.grad = torch.zeros_like(core)
    decay, optimizer = CoreDecay(layer), Own(layer.parameters(), {"lr": 0.1, "weight_decay": 0.5})
    decay.lessen(optimizer)
    decay.give_back(optimizer)
    for core, old in zip(layer.cores, before.cores, strict=True):
        assert torch.equal(core, old)
        assert not core.grad.any()


def test_auxiliary_cores_alone_train_and_stay_so_after_a_file(tmp_path):
    torch.manual_seed(0)
    model = LitNet()
    method = MPO(bond=3, include="net.8", auxiliary_only=True)
    before = compress(model, method, torch.zeros(2, 1, 8, 8))[0].net[8]
    run = trainer(tmp_path, callbacks=[method])
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "small.ckpt")
    for layer in (model.net[8], load_from_checkpoint(LitNet, tmp_path / "small.ckpt").net[8]):
        sizes = [core.numel() for core in layer.cores]
        assert [core.requires_grad for core in layer.cores] == [size < max(sizes) for size in sizes]
        same = [torch.equal(core, old) for core, old in zip(layer.cores, before.cores, strict=True)]
        assert same == [size == max(sizes) for size in sizes]


def test_bonds_are_squeezed_while_training_and_the_bound_holds_in_the_end(tmp_path):
    torch.manual_seed(0)
    model, costs = LitNet(), []
    dense, layers = (
        params(model),
        {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)},
    )

    class Watched(MPO):
        def on_step_begin(self, trainer, module):
            super().on_step_begin(trainer, module)
            forms = self._forms({name: self._sites[name] for name in self._bonds})
            if self._squeezed_at != self.steps:
                return
            for name, bonds in self._bonds.items():
                values = cut_values(fold(layers[name].weight.detach(), forms[name]))
                beyond = [float(v[bond:].norm() / v.norm()) for v, bond in zip(values, bonds, strict=True)]
                assert max(beyond) < 1e-6
                forms[name] = forms[name].with_bonds(bonds)
            costs.append(sum(price(layer, forms.get(name), (), "params") for name, layer in layers.items()))

    method = Watched(params=0.3, dimension_squeezing=True, until_epoch=2, every_n_steps=2)
    trainer(tmp_path, callbacks=[method], max_epochs=3).fit(model, loader())
    assert len(costs) == 6
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 3
    assert 0.25 * dense < params(model) <= 0.3 * dense
    assert {step.action for step in plan_of(model).steps} == {"mpo"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bound", [{"flops": 0.35}, {"params": 0.3}])
def test_bonds_never_grow_fall_by_no_move_too_many_and_no_layer_becomes_dense_again(bound, seed, tmp_path):
    states = [{}]

    class Watched(MPO):
        def cost(self, bonds):
            """What the model costs in those bonds."""
            forms, total = self._forms(self._sites), self.dense
            for name, layer_bonds in bonds.items():
                site, form = self._sites[name], forms[name].with_bonds(layer_bonds)
                total += price(site.dense, form, site.calls, what) - price(site.dense, None, site.calls, what)
            return total

        def _squeeze(self, progress):
            super()._squeeze(progress)
            self.dense = {"params": self._task.params, "flops": self._task.cost.total}[what]
            limit = int(share * self.dense)
            limit += round((1 - progress) * (self.dense - limit))
            old, new = states[-1], {name: tuple(bonds) for name, bonds in self._bonds.items()}
            assert old.keys() <= new.keys()
            assert all(b <= a for name in old for b, a in zip(new[name], old[name], strict=True))
            assert self.cost(new) <= limit
            before_last = [{name: new[name] for name in new if name != left} for left in new.keys() - old.keys()]
            for name, bonds in new.items():
                raised = [(*bonds[:k], bond + 1, *bonds[k + 1 :]) for k, bond in enumerate(bonds)]
                before_last += [new | {name: b} for b in raised]
            assert new == old or any(self.cost(bonds) > limit for bonds in before_last)
            states.append(new)

    ((what, share),) = bound.items()
    torch.manual_seed(seed)
    model = LitNet()
    method = Watched(**bound, dimension_squeezing=True, until_epoch=3, every_n_steps=1, recalibrate_bn=0)
    trainer(tmp_path, callbacks=[method], max_epochs=4).fit(model, loader())
    assert len({str(state) for state in states}) > 4
    assert {step.module: tuple(step.bonds) for step in plan_of(model).steps} == states[-1]


def test_outside_of_a_fit_squeezing_starts_from_dense_whatever_was_fitted_before(tmp_path):
    torch.manual_seed(0)
    fresh, used = (MPO(params=0.5, dimension_squeezing=True, until_epoch=1, every_n_steps=1) for _ in range(2))
    trainer(tmp_path, callbacks=[used], max_epochs=1).fit(LitNet(), loader())
    used._bonds = {name: [1] * len(bonds) for name, bonds in used._bonds.items()}
    model = LitNet()
    plans = [end_of(model, method, torch.zeros(2, 1, 8, 8))[1] for method in (fresh, used)]
    assert plans[0].steps == plans[1].steps
    assert max(max(step.bonds) for step in plans[0].steps) > 1


# What is refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "exactly one of params, flops, error, bond"),
        ({"params": 0.5, "bond": 3}, "exactly one"),
        ({"params": 1.5}, "params=1.5"),
        ({"error": 1.0}, "error=1.0"),
        ({"bond": 0}, "bond=0"),
        ({"bond": {}}, r"bond=\{\}"),
        ({"bond": {"fc": 2.5}}, "bond="),
        ({"bond": {0: 3}}, "bond="),
        ({"bond": 2, "modes": [[4, 4], [8, 8]]}, "by name or glob"),
        ({"bond": 2, "modes": "x"}, "by name or glob"),
        ({"bond": 2, "modes": {0: [[2], [2]]}}, "by name or glob"),
        ({"bond": 2, "mode": "scratch", "auxiliary_only": True}, "drawn at random"),
        ({"error": 0.1, "mode": "scratch"}, "trained weights lose"),
        ({"bond": 2, "cores": 1}, "cores=1"),
        ({"bond": 2, "mode": "trained"}, "mode='trained'"),
        ({"bond": 2, "train": "fast"}, "train='fast'"),
        ({"bond": 2, "modes": {"fc": [[2, 2], [2]]}}, "as many of each"),
        ({"bond": 2, "dimension_squeezing": True}, "towards a budget"),
        ({"params": 0.5, "until_epoch": 3}, "for dimension_squeezing"),
        ({"params": 0.5, "until_epoch": 3, "dimension_squeezing": True, "unroll": "conv"}, "unroll="),
    ],
)
def test_wrong_options_are_refused_at_once(options, match):
    with pytest.raises(OptionError, match=match):
        MPO(**options)


def test_modes_that_do_not_fit_and_names_that_match_nothing_are_told():
    with pytest.raises(OptionError, match=r"those of '7' multiply to 96 outputs and 576 inputs; the layer has 97"):
        compress(network(), MPO(bond=2, modes={"7": [[12, 8], [24, 24]]}), X)
    with pytest.raises(OptionError, match=r"those of '7' multiply to 1,000,000,000,000 outputs"):
        compress(network(), MPO(bond=2, modes={"7": [[10**6, 10**6], [24, 24]]}), X)
    with pytest.raises(OptionError, match=r"modes=.*'nine' matches no layer"):
        compress(network(), MPO(bond=2, modes={"nine": [[2], [2]]}), X)
    with pytest.raises(OptionError, match=r"bond=.*'nine' matches no layer"):
        compress(network(), MPO(bond={"nine": 2}), X)
