"""Second derivatives of a loss; knows torch and nothing of Lightning."""

from lightning_prune.curvature.hvp import gradient, hessian_gradient, hessian_product, twice_differentiable

__all__ = ["gradient", "hessian_gradient", "hessian_product", "twice_differentiable"]
