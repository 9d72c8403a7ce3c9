"""The methods, one paper each. ``__all__`` is the export list: recipes take methods from here and nowhere else."""

from lightning_prune.methods.grasp import GraSP
from lightning_prune.methods.greg import GReg
from lightning_prune.methods.gsm import GSM
from lightning_prune.methods.increg import IncReg
from lightning_prune.methods.kfe import KFE
from lightning_prune.methods.loss_model import LossModel
from lightning_prune.methods.low_rank import LowRank
from lightning_prune.methods.magnitude import Magnitude
from lightning_prune.methods.mpo import MPO
from lightning_prune.methods.optimal_brain import OptimalBrain
from lightning_prune.methods.pfp import PFP
from lightning_prune.methods.random import Random
from lightning_prune.methods.sipp import SiPP
from lightning_prune.methods.snip import SNIP
from lightning_prune.methods.spp import SPP
from lightning_prune.methods.synflow import SynFlow
from lightning_prune.methods.trp import TRP

__all__ = [
    "GSM",
    "KFE",
    "MPO",
    "PFP",
    "SNIP",
    "SPP",
    "TRP",
    "GReg",
    "GraSP",
    "IncReg",
    "LossModel",
    "LowRank",
    "Magnitude",
    "OptimalBrain",
    "Random",
    "SiPP",
    "SynFlow",
]
