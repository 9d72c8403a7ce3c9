"""Units of which all incoming or all outgoing weights are masked leave, and no output changes: compared with the masked network itself."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.dead import bury, dead_units
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.steps import AbsorbConstants
from lightning_prune.structure.surgery import compact
from tests.structure.units import structure_of

IMAGE = torch.randn(3, 2, 6, 6, dtype=torch.float64)


class Residual(nn.Module):
    """Convolutions of every kind of padding around a shortcut, norms whose shifts make constants."""

    def __init__(self, padding=1, bias=True, activation=F.relu):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 6, 1, bias=bias), nn.BatchNorm2d(6)
        self.back = nn.Conv2d(6, 8, 3, padding=padding, bias=bias)
        self.head = nn.Linear(8, 4)
        self.activation, self.padding = activation, padding

    def forward(self, x):
        x = self.activation(self.norm(self.first(x)))
        y = self.back(self.activation(self.inner_norm(self.inner(x))))
        x = x + (y if self.padding else F.pad(y, (1, 1, 1, 1)))
        return self.head(x.mean((2, 3)))


def randomized(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_()
                module.weight.uniform_(0.5, 1.5)
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)
    return model.double().eval()


def masked(model, gone):
    """Zero slices of weights, given by name, axis and indices; return the masks."""
    masks = {}
    with torch.no_grad():
        for name, axis, indices in gone:
            weight = model.get_parameter(name)
            mask = masks.setdefault(name, torch.ones(weight.shape, dtype=torch.bool))
            mask.index_fill_(axis, torch.tensor(indices), False)
            weight.mul_(mask)
    return masks


def settle(model, x=IMAGE):
    """Give batch normalization the statistics of the masked model."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def outputs(model, *inputs):
    """What a model returns in eval and in train mode."""
    return [copy.deepcopy(model).train(mode)(x) for mode in (False, True) for x in inputs]


def buried(model, gone, x=IMAGE, settled=False):
    """Bury, check that nothing changes in either mode, return steps and the smaller model."""
    masks = masked(model, gone)
    if settled:
        settle(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = torch.randn_like(x)
    expected = outputs(model, x, other)
    steps = bury(model, as_calls(x), masks)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    small = compact(model, Plan(steps), as_calls(x))
    for found, wanted in zip(outputs(small, x, other), expected, strict=True):
        assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    return steps, small


def test_units_that_nobody_reads_leave_whatever_they_compute():
    _, small = buried(randomized(Residual()), [("back.weight", 1, [0, 2, 5])])
    assert small.inner.out_channels == small.back.in_channels == 3


def test_units_that_nobody_writes_leave_if_their_constant_is_zero_beside_padding():
    model = randomized(Residual())
    with torch.no_grad():  # what relu(norm(bias)) is, made negative for the first two and positive for the third
        model.inner_norm.bias[:3] = torch.tensor([-9.0, -9.0, 9.0])
    _, small = buried(model, [("inner.weight", 0, [0, 1, 2])])
    assert small.inner.out_channels == 4  # the third is a constant that the zeros beside it do not continue


@pytest.mark.parametrize("activation", [F.relu, torch.sigmoid, F.gelu])
def test_constants_move_into_the_bias_where_no_zeros_are_padded(activation):
    model = randomized(Residual(padding=0, activation=activation))
    steps, small = buried(model, [("inner.weight", 0, [1, 2, 4])], settled=True)
    assert small.inner.out_channels == 3
    assert any(isinstance(step, AbsorbConstants) for step in steps)


def test_constants_that_are_others_in_train_mode_keep_their_units():
    """With the statistics of the dense model, what batch normalization makes of a constant depends on the mode."""
    model = randomized(Residual(padding=0, activation=torch.sigmoid))
    assert bury(model, as_calls(IMAGE), masked(model, [("inner.weight", 0, [1, 2])])) == ()


def test_without_a_bias_to_take_them_up_constants_keep_their_units():
    model = randomized(Residual(padding=0, bias=False, activation=torch.sigmoid))
    masks = masked(model, [("inner.weight", 0, [1, 2])])
    assert bury(model, as_calls(IMAGE), masks) == ()


def test_death_spreads_forwards_and_backwards():
    """Of a chain of four layers, what only feeds dead units dies, and what is only fed by them."""
    chain = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
    ).double()
    everything = [("0.weight", 0, [0, 1]), ("2.weight", 1, [4, 5])]
    with torch.no_grad():
        chain[2].weight[:2, 2:] = 0  # only fed by the two that nobody writes
        chain[2].weight[2:, :2] = 0
    masks = masked(chain, everything)
    masks["2.weight"] &= chain[2].weight != 0
    x = torch.randn(5, 4, dtype=torch.float64)
    wanted = chain(x)
    structure = structure_of(copy.deepcopy(chain), x)
    written, read = dead_units(structure, {k: m.numpy() for k, m in masks.items()})
    assert (int(written.sum()), int(read.sum())) == (4, 2)
    small = compact(chain, Plan(bury(chain, as_calls(x), masks)), as_calls(x))
    assert [small[i].out_features for i in (0, 2, 4)] == [2, 4, 6]
    assert (small(x) - wanted).abs().max() <= 1e-12


class ReadBeside(nn.Module):
    """Something reads the units without any weight; a bias far larger than what it makes of them would hide that."""

    def __init__(self, form):
        super().__init__()
        self.first, self.second, self.form = nn.Linear(4, 8), nn.Linear(8, 3), form
        nn.init.constant_(self.second.bias, 1e6)

    def forward(self, x):
        return self.form(torch.tanh(self.first(x)), self.second)


FORMS = {
    "sum": lambda h, read: read(h) + h.sum(-1, keepdim=True),
    "normalize": lambda h, read: read(F.normalize(h, dim=-1)),
    "length": lambda h, read: read(h / h.norm(dim=-1, keepdim=True)),
    "sum of sizes": lambda h, read: read(h / h.abs().sum(-1, keepdim=True)),
    "product": lambda h, read: read(h) * (h @ h.transpose(-1, -2)).sum(),
}


@pytest.mark.parametrize("form", FORMS)
def test_units_that_are_read_without_a_weight_stay(form):
    model = ReadBeside(FORMS[form]).float()
    x = torch.randn(5, 4)
    assert structure_of(copy.deepcopy(model), x).count == 8
    masks = masked(model, [("second.weight", 1, [0, 3])])
    assert bury(model, as_calls(x), masks) == ()


def test_one_unit_of_a_layer_that_died_altogether_stays():
    model = randomized(Residual())
    _, small = buried(model, [("back.weight", 1, list(range(6)))])
    assert small.inner.out_channels == 1


def test_heads_that_nobody_reads_leave():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(x + self.attention(x, x, x, need_weights=False)[0])

    model = Attends().double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    _, small = buried(model, [("attention.out_proj.weight", 1, [2, 3, 6, 7])], x)
    assert small.attention.num_heads == 2


def test_without_an_empty_row_or_column_nothing_is_traced(monkeypatch):
    monkeypatch.setattr("lightning_prune.structure.dead.find_units", lambda *_: pytest.fail("traced"))
    model = randomized(Residual())
    mask = torch.ones(6, 8, 1, 1, dtype=torch.bool)
    mask[np.arange(6), np.arange(6)] = False
    assert bury(model, as_calls(IMAGE), {"inner.weight": mask}) == ()
