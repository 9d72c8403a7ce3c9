"""Start-up: the import costs at most 50 ms, the help at most 0.5 s, both over an empty interpreter's start or in all."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
IMPORT_SECONDS, HELP_SECONDS, RUNS = 0.05, 0.5, 15


def seconds(*arguments):
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, check=True)
    return time.perf_counter() - start


@pytest.mark.benchmark
def test_the_import_costs_at_most_50_ms():
    pairs = [(seconds("-c", "pass"), seconds("-c", "import lightning_prune")) for _ in range(RUNS)]
    cost = statistics.median(after - before for before, after in pairs)
    assert cost <= IMPORT_SECONDS, f"import lightning_prune costs {1000 * cost:.1f} ms"


@pytest.mark.benchmark
def test_the_help_takes_at_most_half_a_second():
    taken = statistics.median(seconds("-m", "lightning_prune", "--help") for _ in range(RUNS))
    assert taken <= HELP_SECONDS, f"--help takes {1000 * taken:.0f} ms"
