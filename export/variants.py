"""The exact forms of the layers that methods put in the place of dense ones: ways to compute them that differ in rounding only.

- two or three thin layers in a row (:mod:`lightning_prune.structure.factorized`, :mod:`lightning_prune.structure.rotated`): as they are,
  or neighbours merged into one layer, up to the dense one;
- a matrix product operator (:mod:`lightning_prune.structure.mpo`): contracted from the first core on (``left``) or from the last
  (``right``), either without transposing anything or (``transposed``) with one product of matrices per core and a transposition after
  each; or the dense weight. Multiplying the cores anew in every call is no form of its own: runtimes do it once, when they load the file.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.structure.factorized import Factorized, dense_cost, positions
from lightning_prune.structure.layers import DenseLayer, describe, is_plain, layer_from
from lightning_prune.structure.mpo import MPO, MPOConv, MPOLinear
from lightning_prune.structure.rotated import Rotated
from lightning_prune.structure.tensor_train import Form, Way

Spec: TypeAlias = Mapping[str, Any]


class Variant(NamedTuple):
    """One form of a layer.

    Attributes:
        name: Such as ``"left"`` or ``"dense"``.
        numbers: Parameters that it stores.
        flops: Multiply-adds for an input of a shape.
        build: Makes the layer; shares what it can with the one it was made from.
    """

    name: str
    numbers: int
    flops: Callable[[Sequence[int]], int]
    build: Callable[[], nn.Module]


def forms_of(layer: nn.Module) -> list[Variant]:
    """Return the forms of a layer, as it is first; none of a layer that has a single one, or hooks.

    Args:
        layer: Any module.
    """
    if any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules()):
        return []
    if type(layer) in (MPOLinear, MPOConv):
        return _contractions(layer)  # type: ignore[arg-type]
    parts = dict(layer.named_children())
    if type(layer) in (Factorized, Rotated) and len(parts) > 1 and all(map(is_plain, parts.values())):
        return _merges(parts)  # type: ignore[arg-type]
    return []


@torch.no_grad()
def merge(first: DenseLayer, second: DenseLayer) -> DenseLayer:
    """Multiply two layers in a row to one, in float64, rounded once.

    Args:
        first: A plain Linear or convolution; a convolution without bias.
        second: Likewise; along each axis one of the two has a kernel of 1 and neither stride nor padding.
    """
    layer = layer_from(merged_spec(describe(first), describe(second)), dtype=first.weight.dtype)
    groups = getattr(layer, "groups", 1)
    one, two = (_blocks(part, groups) for part in (first, second))
    layer.weight.copy_(torch.einsum("gnrq,grcp->gncpq", two, one).reshape(layer.weight.shape))
    if layer.bias is not None:
        bias = torch.zeros_like(layer.bias, dtype=torch.float64) if second.bias is None else second.bias.double()
        layer.bias.copy_(bias if first.bias is None else bias + second.weight.double() @ first.bias.double())
    return layer


def merged_spec(first: Spec, second: Spec) -> dict[str, Any]:
    """Describe the layer that two layers in a row merge to (:func:`merge`)."""
    spec = {**first, "out": second["out"], "bias": first["bias"] or second["bias"]}
    if "kernel" not in first:
        return spec
    for key in ("kernel", "stride", "dilation"):
        spec[key] = [one * two for one, two in zip(first[key], second[key], strict=True)]
    paddings = (first["padding"], second["padding"])
    spec["padding"] = next((p for p in paddings if isinstance(p, str)), None) or list(
        map(sum, zip(*paddings, strict=True))
    )
    spec["padding_mode"] = max(first["padding_mode"], second["padding_mode"], key=lambda mode: mode != "zeros")
    spec["groups"] = first["groups"] if first["groups"] == second["groups"] else 1
    return spec


def _blocks(layer: DenseLayer, groups: int) -> Tensor:
    """Return a weight as ``[groups, N / groups, C / groups, K]``, float64; zeros between groups of its own are filled in."""
    weight = layer.weight.double().flatten(2) if layer.weight.ndim > 2 else layer.weight.double()[..., None]
    own = getattr(layer, "groups", 1)
    blocks = weight.reshape(own, -1, *weight.shape[1:])
    if own == groups:
        return blocks
    full = blocks.new_zeros(own, blocks.shape[1], own, *blocks.shape[2:])
    full[torch.arange(own), :, torch.arange(own)] = blocks
    return full.reshape(1, len(weight), -1, weight.shape[2])


def _merges(parts: Mapping[str, DenseLayer]) -> list[Variant]:
    """List the ways to merge neighbours of a chain: none, some, all."""
    found = []
    for cuts in itertools.product((True, False), repeat=len(parts) - 1):
        runs: list[list[str]] = [[next(iter(parts))]]
        for cut, name in zip(cuts, list(parts)[1:], strict=True):
            runs = [*runs, [name]] if cut else [*runs[:-1], [*runs[-1], name]]
        specs = [functools.reduce(merged_spec, [describe(parts[name]) for name in names]) for names in runs]
        name = "factors" if all(cuts) else "dense" if not any(cuts) else ", ".join(" x ".join(names) for names in runs)
        build = functools.partial(_merged, parts, runs)
        found.append(Variant(name, sum(map(_size, specs)), functools.partial(_chain_flops, specs), build))
    return found


def _merged(parts: Mapping[str, DenseLayer], runs: list[list[str]]) -> nn.Module:
    layers = [functools.reduce(merge, [parts[name] for name in names]) for names in runs]
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def _chain_flops(specs: Sequence[Spec], shape: Sequence[int]) -> int:
    x, total = torch.empty(tuple(shape), device="meta"), 0
    for spec in specs:
        layer = layer_from(spec, device="meta")
        given, x = x, layer(x)
        total += dense_cost(layer, [(given.shape, x.shape)]).flops
    return total


def _size(spec: Spec) -> int:
    return sum(parameter.numel() for parameter in layer_from(spec, device="meta").parameters())


@dataclasses.dataclass(frozen=True)
class _OneWay(Form):
    """Sizes of a matrix product operator that is contracted in one way, whatever it costs."""

    fixed: Way = "left"

    def way(self, outer: int = 1, inner: int | None = None, allowed: Sequence[Way] = ()) -> Way:
        """Return that way."""
        return self.fixed


class _Transposed(MPO):
    """Contracts by one product of matrices per core, and brings the next mode to the front by a transposition."""

    def _left(self, z: Tensor, pixels: int = 1) -> Tensor:
        z = z.reshape(-1, self.form.columns * pixels).T  # [I P, B]
        for core, out in zip(self.cores, self.form.outputs, strict=False):
            z = (core @ z.reshape(core.shape[1], -1)).reshape(out, -1).T
        return z.reshape(self.grids()[-1].shape[1], pixels, -1, self.form.rows).permute(2, 3, 0, 1)

    def _right(self, z: Tensor, pixels: int = 1) -> Tensor:
        grids = self.grids()[::-1]
        z = z.reshape(-1, self.form.columns * grids[0].shape[1], pixels).permute(2, 0, 1)  # [P, B, I D]
        for grid in grids:
            out, right, left, inner = grid.shape
            matrix = grid.permute(3, 1, 0, 2).reshape(inner * right, out * left)
            z = (z.reshape(-1, inner * right) @ matrix).reshape(-1, out, left).transpose(0, 1)
        return z.reshape(self.form.rows, pixels, -1).permute(2, 0, 1)


class _TransposedLinear(_Transposed, MPOLinear):
    pass


class _TransposedConv(_Transposed, MPOConv):
    pass


def _contractions(layer: MPOLinear | MPOConv) -> list[Variant]:
    numbers = sum(parameter.numel() for parameter in layer.parameters())
    spec = dense_spec(layer)
    found = [
        Variant(
            f"{way}, transposed" if transposed else way,
            numbers,
            functools.partial(_mpo_flops, layer.form, spec, way),
            functools.partial(_contracted, layer, way, transposed),
        )
        for transposed in (False, True)
        for way in ("left", "right")
    ]
    return [
        *found,
        Variant("dense", _size(spec), functools.partial(_chain_flops, [spec]), functools.partial(_dense, layer)),
    ]


def _contracted(layer: MPOLinear | MPOConv, way: Way, transposed: bool) -> nn.Module:
    kinds = (_TransposedLinear, _TransposedConv) if transposed else (MPOLinear, MPOConv)
    like: Any = layer_from(dense_spec(layer), device="meta", dtype=layer.cores[0].dtype)
    form = layer.form
    one_way = _OneWay(form.outputs, form.inputs, form.bonds, form.kernel, way)
    small = kinds[isinstance(layer, MPOConv)](like, one_way)
    small.cores, small.bias = layer.cores, layer.bias
    return small


@torch.no_grad()
def _dense(layer: MPOLinear | MPOConv) -> nn.Module:
    dense = layer_from(dense_spec(layer), dtype=layer.cores[0].dtype)
    dense.weight.copy_(copy.deepcopy(layer).double().dense_weight())
    if dense.bias is not None and layer.bias is not None:
        dense.bias.copy_(layer.bias)
    return dense


def dense_spec(layer: MPOLinear | MPOConv) -> dict[str, Any]:
    """Describe the dense layer that a matrix product operator stands for."""
    ends: dict[str, Any] = {"in": layer.weight_shape[1], "out": layer.weight_shape[0], "bias": layer.bias is not None}
    if isinstance(layer, MPOLinear):
        return {"type": "Linear", **ends}
    padding = layer.padding if isinstance(layer.padding, str) else list(layer.padding)
    sizes = {"kernel": list(layer.kernel_size), "stride": list(layer.stride), "dilation": list(layer.dilation)}
    kind = f"Conv{len(layer.kernel_size)}d"
    return {"type": kind, **ends, **sizes, "padding": padding, "groups": 1, "padding_mode": layer.padding_mode}


def _mpo_flops(form: Form, spec: Spec, way: Way, shape: Sequence[int]) -> int:
    dense = layer_from(spec, device="meta")
    output = dense(torch.empty(tuple(shape), device="meta")).shape
    return form.multiply_adds(positions(dense, output), positions(dense, shape))[way]
