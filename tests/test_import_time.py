"""What is not imported before it is needed; the times themselves are in ``benchmarks/test_startup.py``."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "pytorch_lightning", "lightning", "torchmetrics", "onnx", "onnxruntime", "matplotlib", "sklearn")


@pytest.mark.parametrize(
    "code",
    [
        "import lightning_prune",
        "import lightning_prune.export",
        "from lightning_prune.cli import main; main(['--help'])",
        "from lightning_prune.cli import main; main(['run', '--help'])",
        "from lightning_prune.cli import main; main(['--version'])",
        "from lightning_prune.cli import main; main(['run', 'nothing.yaml'])",
        "from lightning_prune.recipe import load; load('digits-trp')",
    ],
)
def test_nothing_heavy_is_imported_by(code):
    check = f"import sys; print('LOADED', [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_a_public_name_imports_what_it_needs():
    code = "import lightning_prune, sys; lightning_prune.Plan; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
