"""A layer whose weight becomes a matrix product operator."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_prune.errors import ModelError, PlanError
from lightning_prune.structure.layers import DenseLayer, describe, layer_from
from lightning_prune.structure.mpo import (
    WAYS,
    MPOConv,
    MPOLinear,
    Training,
    build_mpo,
    positions_of,
    tensor_of,
    weight_from,
)
from lightning_prune.structure.steps.base import swap
from lightning_prune.structure.steps.factorize import Replacement
from lightning_prune.structure.tensor_train import Form, balance, draw, tt_svd, useful_bonds


@dataclasses.dataclass(frozen=True)
class Tensorize(Replacement):
    """Replace a convolution or linear layer by a matrix product operator (:mod:`lightning_prune.structure.tensor_train`).

    Attributes:
        module: Dotted name of the layer.
        before: Description of the dense layer (:func:`lightning_prune.structure.layers.describe`).
        outputs: Output modes; what they multiply to beyond the layer's outputs is filled up with zeros.
        inputs: Input modes, likewise.
        bonds: Bonds between the cores.
        train: How the layer contracts while it trains.
        auxiliary: Whether only the smaller cores train and the largest is frozen.
        seed: Of a draw of all cores, with the variance of the weight that they replace, the bias zero; None decomposes that weight.

    Raises:
        PlanError: If the layer has no such form.
    """

    action: ClassVar[str] = "mpo"
    replaces: ClassVar[bool] = True
    before: Mapping[str, Any]
    outputs: Sequence[int]
    inputs: Sequence[int]
    bonds: Sequence[int]
    train: Training = "auto"
    auxiliary: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        right = self.train in WAYS and type(self.auxiliary) is bool and (self.seed is None or type(self.seed) is int)
        if not right:
            raise PlanError(
                f"Module {self.module!r}: {self.train!r}, {self.auxiliary!r}, {self.seed!r} are no settings of an MPO layer."
            )
        try:
            build_mpo(layer_from(self.before, device="meta"), self.form)
        except (ModelError, KeyError) as error:
            raise PlanError(f"Module {self.module!r}: {error}") from error
        if useful_bonds(self.form.sizes, self.bonds) != self.form.bonds:
            raise PlanError(f"Module {self.module!r}: bonds of {list(self.bonds)} are larger than useful.")

    @classmethod
    def of(cls, module: str, layer: nn.Module, form: Form, **settings: Any) -> Self:
        """Make the step for ``layer``, which ``module`` names; further attributes by name."""
        return cls(module, describe(layer), list(form.outputs), list(form.inputs), list(form.bonds), **settings)

    @property
    def form(self) -> Form:
        """Modes and bonds."""
        return Form(tuple(self.outputs), tuple(self.inputs), tuple(self.bonds), positions_of(self.before))

    def cores(self, layer: DenseLayer) -> list[Tensor]:
        """Return the values of the cores, float64 ``[D_{k-1}, J_k I_k, D_k]``, of equal norm."""
        if self.seed is None:
            try:
                return balance(tt_svd(tensor_of(layer, self.form), self.form.bonds).cores)
            except ModelError as error:
                raise ModelError(f"Layer {self.module!r}: {error}") from error
        variance = float(layer.weight.detach().double().square().mean())
        glorot = 2 / (layer.weight.shape[0] + layer.weight[0].numel())  # for a layer that starts as zero
        return draw(self.form, variance or glorot, self.seed)

    def build(self, model: nn.Module) -> None:
        """Put the cores in the place of the dense layer, values undefined."""
        model.set_submodule(self.module, self._built(self.find(model)))

    def emulate(self, model: nn.Module) -> None:
        """Give the dense layer the weight that the cores stand for."""
        layer = self.find(model)
        weight = weight_from(self.cores(layer), self.form, layer.weight.shape)
        swap(layer.weight, torch.empty_like(layer.weight.data).copy_(weight))
        if self.seed is not None and layer.bias is not None:
            swap(layer.bias, torch.zeros_like(layer.bias.data))

    def apply(self, model: nn.Module) -> None:
        """Put the cores in the place of the dense layer."""
        layer = self.find(model)
        small = self._built(layer)
        bias = layer.bias if self.seed is None or layer.bias is None else torch.zeros_like(layer.bias)
        small.fill(self.cores(layer), bias)
        model.set_submodule(self.module, small)

    def _built(self, layer: DenseLayer) -> MPOLinear | MPOConv:
        small = build_mpo(layer, self.form, self.train)
        if self.auxiliary:
            max(small.cores, key=torch.Tensor.numel).requires_grad_(False)
        return small

    def facts(self) -> dict[str, float]:
        """Return the largest bond."""
        return {"bond": max(self.bonds, default=1)}

    def removed(self) -> int:
        """Return how many weights fewer the cores have."""
        return layer_from(self.before, device="meta").weight.numel() - self.form.params

    def summary(self) -> dict[str, Any]:
        """Return the table row: modes, bonds, share of the parameters, and multiply-adds per row or pixel beside the dense ones."""
        layer, form = layer_from(self.before, device="meta"), self.form
        bias = 0 if layer.bias is None else layer.bias.numel()
        costs = form.multiply_adds()
        share = min(costs["left"], costs["right"]) / layer.weight.numel()
        modes = " ".join(f"{j}x{i}" for j, i in zip(form.outputs, form.inputs, strict=True))
        return {
            "action": f"MPO, bonds {'/'.join(map(str, form.bonds)) or 'none'}",
            "before": f"{self.before['type']} {'x'.join(map(str, layer.weight.shape))}",
            "after": f"cores {modes}{f' {form.kernel}' if form.kernel else ''}; {share:.0%} of the multiply-adds core by core",
            "kept": (form.params + bias) / (layer.weight.numel() + bias),
        }
