"""What every test gets: the same random numbers at its start."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed the global generators."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
