"""Jobs of the contract run in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def run_jobs(tmp_path_factory):
    """Return a function that runs a list of jobs, forked from one process that has imported everything, and gives their exit codes and all that
    they printed."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:

        def run(jobs: list[dict[str, Any]]) -> tuple[list[int], str]:
            path = tmp_path_factory.mktemp("jobs") / "jobs.json"
            path.write_text(json.dumps(jobs))
            print(path, file=worker.stdin, flush=True)
            codes = json.loads(worker.stdout.readline())
            return codes, path.with_suffix(".text").read_text()

        yield run
        worker.stdin.close()
