"""The grammar draws networks that run, in every idiom that it lists, and that a failing test can quote."""

import collections

import pytest
import torch
from hypothesis import Phase, find, given, seed, settings
from torch.utils._pytree import tree_leaves

from tests.structure import grammar
from tests.structure.grammar import KINDS, LOSES, Network, block, build, loses, networks, shape_after, through, walk

COUNT = 200
EXPORTED = 20
GENERATE = settings(max_examples=COUNT, database=None, deadline=None, phases=[Phase.generate])


@pytest.fixture(scope="module")
def drawn() -> list[Network]:
    """Return networks of a fixed seed, twice as many as are run."""
    found: list[Network] = []

    @seed(0)
    @settings(GENERATE, max_examples=2 * COUNT)
    @given(networks())
    def collect(network: Network) -> None:
        found.append(network)

    collect()
    return found


def run(network: Network, train: bool = False) -> list[torch.Tensor]:
    """Build a network and return its outputs."""
    model, inputs = build(network)
    return tree_leaves(model.train(train)(*inputs))


@seed(0)
@GENERATE
@given(networks())
def test_drawn_networks_run_in_both_modes(network):
    assert 3 <= len(network.blocks) <= 7
    model, inputs = build(network)
    assert not model.training
    for train in (False, True):
        outputs = tree_leaves(model.train(train)(*inputs))
        assert len(outputs) == 1 + (network.outputs in ("tuple", "dict") or (network.outputs == "auxiliary" and train))
        assert outputs[0].shape == (grammar.BATCH, grammar.CLASSES)
        assert all(y.dtype == torch.float64 and y.isfinite().all() for y in outputs)
    sum(y.sum() for y in outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_inputs_matter_in_almost_every_network(drawn):
    dead = 0  # the few are those whose narrow layers of rectifiers are all negative
    for network in drawn[:COUNT]:
        model, inputs = build(network)
        outputs = tree_leaves(model(*(x.requires_grad_() for x in inputs)))
        dead += any(g.abs().max() < 1e-9 for g in torch.autograd.grad(outputs[0].square().sum(), inputs))
    assert dead <= 0.02 * COUNT


def test_tracked_shape_is_the_shape_of_the_tensor(drawn):
    for network in drawn[:COUNT]:
        blocks, shape = build(network)[0].blocks, network.stem_shape()
        x = torch.randn(shape.sizes(), dtype=torch.float64)
        for described, module in zip(network.blocks, blocks, strict=True):
            with torch.no_grad():
                x, shape = module(x), shape_after(described, shape)
            assert x.shape == shape.sizes(), described
            assert 4 <= shape.channels <= grammar.MOST
            assert 2 <= shape.size <= 16


def test_equal_descriptions_give_equal_networks_and_leave_the_global_generator_alone(drawn):
    for network in drawn[::16]:
        state = torch.get_rng_state()
        model, inputs = build(network)
        assert torch.equal(state, torch.get_rng_state())
        again, inputs_again = build(eval(repr(network), vars(grammar)))
        assert all(map(torch.equal, inputs, inputs_again))
        assert list(again.state_dict()) == list(model.state_dict())
        assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
        assert all(map(torch.equal, run(network), run(network)))


def test_descriptions_are_data(drawn):
    assert all(eval(repr(network), vars(grammar)) == network for network in drawn)
    assert len(set(drawn)) > 0.9 * len(drawn)  # frozen, and no copies of one another


def test_every_kind_is_drawn(drawn):
    count = collections.Counter(one.kind for network in drawn for one in walk(network.blocks))
    assert set(count) == set(KINDS)
    assert {len(network.blocks) for network in drawn} == {3, 4, 5, 6, 7}
    for option, choices in {"outputs": grammar.OUTPUTS, "second": grammar.SECOND}.items():
        assert {getattr(network, option) for network in drawn} == set(choices)
    assert {(network.stream, through(network.blocks, network.stem_shape()).stream) for network in drawn} == {
        (one, other) for one in grammar.HEADS for other in grammar.HEADS
    }


def test_no_weight_is_drawn_zero(drawn):
    for network in drawn[:COUNT]:
        model, _ = build(network)
        assert all((p != 0).all() for p in model.parameters())
        norms = [m for m in model.modules() if getattr(m, "running_var", None) is not None]
        assert all((m.running_mean != 0).all() and (m.running_var >= 0.5).all() for m in norms)


@pytest.mark.filterwarnings(
    "ignore:The tensor attributes .* were assigned during export:UserWarning"
)  # torch's own RNN
def test_exporter_takes_drawn_networks(drawn):
    for i, network in enumerate([one for one in drawn if len(one.blocks) <= 4][:EXPORTED]):  # short ones, to save time
        model, inputs = build(network)
        program = torch.export.export(model.train(i % 2 == 1), inputs, strict=False)
        with torch.no_grad():
            for x, y in zip(tree_leaves(program.module()(*inputs)), run(network, train=i % 2 == 1), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_table_of_losses_names_every_kind(drawn):
    assert set(LOSES) == set(KINDS)
    assert sum(map(loses, drawn)) > 0.75 * len(drawn)
    assert not loses(Network("image", 6, 4, (block("Conv", width=4, kernel=3, norm="none", act="relu"),)))
    hidden = block("BasicBlock", hidden=4, norm="batch", act="relu", last="none")
    assert loses(Network("image", 6, 4, (block("Residual", act="none", body=(hidden,)),)))
    assert not loses(Network("image", 6, 4, (block("BasicBlock", hidden=4, norm="batch", act="exp", last="none"),)))


def test_failing_networks_shrink_to_the_block_that_fails():
    strategy = networks(fewest=1, most=3)
    options = settings(max_examples=COUNT, database=None, deadline=None, derandomize=True)
    smallest = find(strategy, lambda network: any(one.kind == "ConvNeXt" for one in network.blocks), settings=options)
    assert smallest == Network("image", 6, 4, (block("ConvNeXt", hidden=6, act="relu"),))
