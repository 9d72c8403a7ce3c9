"""Random: the seed and nothing else decides."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import Random, compress
from lightning_prune.errors import OptionError
from lightning_prune.structure.calls import as_calls
from lightning_prune.structure.groups import find_units

X = torch.zeros(2, 6)


def network():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def kept(seed, model=None, **options):
    """Which rows of each layer stay."""
    plan = compress(
        model or network(), Random(structured=True, **({"sparsity": 0.4, "align": 1, "seed": seed} | options)), X
    )[1]
    return {s.module: s.tensors["weight"].kept(0).tolist() for s in plan.steps if 0 in s.tensors["weight"].keep}


def test_the_same_seed_removes_the_same_units_whatever_the_weights():
    torch.manual_seed(0)
    one = kept(5)
    torch.manual_seed(1)
    assert kept(5) == one
    torch.rand(17)  # other draws from the generators of the program do not count
    assert kept(5) == one


def test_another_seed_removes_others():
    assert len({str(kept(seed)) for seed in range(8)}) == 8


def test_the_program_s_random_numbers_are_not_used_up():
    model = network()
    state = torch.get_rng_state()
    kept(0, model)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_unit_is_as_likely_to_be_among_the_lowest():
    structure = find_units(network(), as_calls(X))
    everything, seeds = np.ones(structure.count, bool), 600
    lowest = np.zeros(structure.count)
    for seed in range(seeds):
        scores = Random(structured=True, sparsity=0.4, seed=seed).score_units(None, structure, everything)  # type: ignore[arg-type]
        lowest[np.argsort(scores)[:8]] += 1
    deviation = (0.4 * 0.6 / seeds) ** 0.5
    assert structure.count == 20
    assert np.abs(lowest / seeds - 0.4).max() < 4.5 * deviation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, r"Random\(seed=-1\): give an integer of at least 0"),
        ({"seed": 1.5}, r"Random\(seed=1\.5\)"),
        ({"structured": False}, r"Random\(flops=0\.5\): single weights leave by sparsity"),
        ({"structured": 1}, r"Random\(structured=1\): give False or True"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options, message):
    with pytest.raises(OptionError, match=message):
        Random(**{"structured": True, "flops": 0.5, **options})
