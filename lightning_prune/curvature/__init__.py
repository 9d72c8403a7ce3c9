"""Second derivatives of a loss, and the Fisher information of a model and its Kronecker factors; knows torch and nothing of Lightning."""

from lightning_prune.curvature.eigenbasis import Eigenbasis, directions
from lightning_prune.curvature.hvp import gradient, hessian_gradient, hessian_product, twice_differentiable
from lightning_prune.curvature.kronecker import Factors, Kronecker, SecondMoments
from lightning_prune.curvature.labels import empirical_gradients, sampled_gradients

__all__ = [
    "Eigenbasis",
    "Factors",
    "Kronecker",
    "SecondMoments",
    "directions",
    "empirical_gradients",
    "gradient",
    "hessian_gradient",
    "hessian_product",
    "sampled_gradients",
    "twice_differentiable",
]
