"""What every test gets: one thread, because two threads of a tiny network mostly wait for each other, and the same random numbers."""

import os
import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed the global generators."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
