import itertools
import math

import numpy as np
import pytest
from lightning_prune.export.latency import LatencySettings, median_interval, speedup, summarize, time_round

from lightning_prune.errors import OptionError


class FakeClock:
    """Nanoseconds that advance only when a fake session works."""

    def __init__(self):
        self.now = 0
        self.calls = []

    def __call__(self):
        return self.now

    def session(self, name, durations):
        series = itertools.cycle(durations)

        def work():
            self.calls.append(name)
            self.now += next(series)

        return work


def test_functions_take_turns_after_warm_up_and_times_are_theirs():
    clock = FakeClock()
    functions = {
        "dense": clock.session("dense", [4_000_000]),
        "compact": clock.session("compact", [1_000_000, 2_000_000]),
    }
    times = time_round(functions, warmup=2, runs=4, clock=clock)
    assert clock.calls[:4] == ["dense", "compact"] * 2
    assert clock.calls[4:] == ["dense", "compact", "compact", "dense"] * 2
    np.testing.assert_allclose(times["dense"], 4.0)
    np.testing.assert_allclose(times["compact"], [1.0, 2.0, 1.0, 2.0])


def test_summary_equals_numpy_percentiles():
    values = np.random.default_rng(0).lognormal(size=(3, 50))
    found = summarize(list(values))
    flat = values.ravel()
    for key, share in {"p50": 50, "p90": 90, "p99": 99}.items():
        assert found[key] == pytest.approx(np.percentile(flat, share), rel=1e-12)
    assert found["iqr"] == pytest.approx(np.percentile(flat, 75) - np.percentile(flat, 25), rel=1e-12)
    assert found["rounds"] == pytest.approx(np.median(values, axis=1))
    assert found["runs"] == 150
    assert len(found["quantiles"]) == 101


def test_speedup_is_the_median_of_pairs_not_the_ratio_of_medians():
    dense = [np.array([1.0, 2.0, 9.0])]
    compact = [np.array([1.0, 1.0, 1.0 / 9])]
    assert speedup(dense, compact)["median"] == 2.0
    assert speedup([np.array([1.0, 2.0, 9.0])], [np.array([9.0, 2.0, 3.0])])["median"] == 1.0


def test_a_difference_below_five_percent_is_not_claimed():
    rng = np.random.default_rng(1)
    base = [1 + 0.001 * rng.random(200) for _ in range(3)]
    for factor, words in {
        1.04: "no difference",
        0.97: "no difference",
        1.2: "1.20 times as fast",
        0.5: "slower",
    }.items():
        assert words in speedup([factor * values for values in base], base)["verdict"]


def test_rounds_that_disagree_widen_the_interval():
    ones = np.ones(200)
    found = speedup([1.5 * ones, 1.5 * ones, 0.9 * ones], [ones] * 3)
    assert found["low"] == pytest.approx(0.9)
    assert "no difference" in found["verdict"]


def test_interval_of_the_median_covers_it_in_95_of_100_samples():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(1000):
        low, high = median_interval(rng.exponential(size=60))
        covered += low <= math.log(2) <= high
    assert 0.93 <= covered / 1000 <= 0.985  # order statistics are discrete: at least the nominal share, not much more
    assert median_interval(np.array([3.0, 1.0, 2.0])) == (1.0, 3.0)


@pytest.mark.parametrize(
    "wrong", [{"runs": 0}, {"warmup": -1}, {"rounds": 1.5}, {"threads": 0}, {"batch_sizes": ()}, {"batch_sizes": (0,)}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(OptionError, match=rf"latency\.{next(iter(wrong))}"):
        LatencySettings(**wrong)
