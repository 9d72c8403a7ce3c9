"""The methods, one paper each. ``__all__`` is the export list: recipes take methods from here and nowhere else."""

from lightning_prune.methods.low_rank import LowRank
from lightning_prune.methods.magnitude import Magnitude
from lightning_prune.methods.random import Random
from lightning_prune.methods.trp import TRP

__all__ = ["TRP", "LowRank", "Magnitude", "Random"]
