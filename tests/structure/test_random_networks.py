"""Random networks lose random units exactly, or not at all.

Networks come from :mod:`tests.structure.grammar`. Of each, uneven random sets of units leave, several times; the network without them is
compared with the one in which they are masked, and with what was foretold of its cost. Nothing here looks at how the engine works.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_prune.flops import count_flops
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.groups import Structure, find_units
from lightning_prune.structure.plan import Origin, Plan
from lightning_prune.structure.removal import removal_steps
from lightning_prune.structure.trials import draw, try_sizes
from tests.structure.grammar import Network, build, loses, networks

COUNT = 300
EXHAUSTIVE = 3_000
SHARES = (0.4, 0.8)  # of the units that leave; one draw each
EXACT = 1e-9  # of the largest value
RUN = settings(
    max_examples=COUNT, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


def run(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [y.clone() for y in tree_leaves(model(*inputs))]


def gap(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Largest difference as a share of the largest value of the same output."""
    assert [y.shape for y in expected] == [y.shape for y in found]
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(expected, found, strict=True))


def cost(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[int, int]:
    return count_flops(model, inputs).total, sum(p.numel() for p in model.parameters())


def foretold(structure: Structure, dense: tuple[int, int], kept: np.ndarray) -> tuple[int, int]:
    """What the structure says: the dense cost, less that of all units, and that of those which stay."""
    everything = np.ones(structure.count, bool)
    parts = zip(dense, (structure.flops, structure.params), strict=True)
    return tuple(total - known(everything) + known(kept) for total, known in parts)


def check(network: Network) -> bool:
    """Remove random units of ``network`` and judge the result; return whether it has units that can leave."""
    model, inputs = build(network)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    calls = as_calls(inputs)
    structure = try_sizes(model, calls, find_units(model, calls))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())  # asking changes nothing
    dense = cost(model, inputs)
    for number, share in enumerate(SHARES if structure.count else ()):
        kept = draw(structure, np.arange(structure.count), share, seed=network.seed + number)
        check_removal(network, model, inputs, structure, kept, dense)
    return structure.count > 0


def check_removal(network, model, inputs, structure, kept, dense) -> None:
    steps = removal_steps(model, structure, kept)
    assert bool(steps) == (not kept.all())
    small = copy.deepcopy(model)
    for step in steps:
        step.emulate(small)
    masked = run(small, inputs)
    in_training = run(copy.deepcopy(small).train(), inputs)
    for step in steps:
        step.apply(small)
    found = run(small, inputs)
    assert gap(masked, found) < EXACT
    assert cost(small, inputs) == foretold(structure, dense, kept)
    plan = Plan.from_json(Plan(steps, origin=Origin.of(model, dense[0])).to_json())
    fresh, _ = build(network)
    plan.build(fresh)
    fresh.load_state_dict(small.state_dict(), strict=True)
    assert all(map(torch.equal, found, run(fresh, inputs)))
    assert repr(fresh) == repr(small)
    outputs = tree_leaves(small.train()(*inputs))
    assert gap(in_training, [y.detach() for y in outputs]) < EXACT
    sum(y.sum() for y in outputs).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


@pytest.fixture(scope="module")
def judged() -> list[tuple[Network, bool]]:
    """Networks of the first test, and whether they lose units."""
    return []


@RUN
@given(
    network=networks(fewest=2, most=4)
)  # the time goes into torch.export, by the operation; longer ones are left to the exhaustive run
def test_random_networks_are_cut_exactly_or_refused(judged, network):
    judged.append((network, check(network)))


def test_most_random_networks_lose_units(judged):
    if len(judged) < COUNT:
        pytest.skip("counts the networks of the test above")
    assert sum(lost for _, lost in judged) >= 0.7 * len(judged)


def test_networks_with_channels_of_their_own_lose_units(judged):
    if len(judged) < COUNT:
        pytest.skip("looks at the networks of the test above")
    assert [network for network, lost in judged if loses(network) and not lost] == []


@pytest.mark.exhaustive
@seed(2024)
@settings(RUN, max_examples=EXHAUSTIVE, derandomize=False)
@given(network=networks())
def test_many_more_random_networks_are_cut_exactly_or_refused(network):
    assert check(network) or not loses(network)
