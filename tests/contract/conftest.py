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
    """Return a function that runs a list of jobs in one process that forks, and gives their exit codes and all that they printed."""

    def run(jobs: list[dict[str, Any]]) -> tuple[list[int], str]:
        path = tmp_path_factory.mktemp("jobs") / "jobs.json"
        path.write_text(json.dumps(jobs))
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("worker.py")), str(path)],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(path.with_suffix(".codes").read_text()), done.stdout + done.stderr

    return run
