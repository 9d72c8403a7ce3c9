"""A layer in other coordinates of its inputs and outputs, of which some are left out: forms, values, costs.

Wang, Grosse, Fidler and Zhang, "EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis", ICML 2019 (arXiv:1905.05934). For a weight
``W [N, C, *k]`` and orthonormal bases ``Q_in [C, r_in]``, ``Q_out [N, r_out]`` of the directions that stay, the layer with the weight
``P_out W P_in``, ``P = Q Q^T`` at every tap, computes what three thinner ones compute, up to rounding:

- ``rotate_in``, pointwise: ``Q_in^T``;
- ``core``: ``Q_out^T W Q_in`` with the kernel, stride, padding and dilation of the dense layer;
- ``rotate_out``, pointwise: ``Q_out``.

Where all inputs or all outputs stay, ``rotate_in`` or ``rotate_out`` is missing. A rotated layer can be rotated again: the new bases lie in the
coordinates of its core and are multiplied into its outer factors, which by then need not be orthogonal, so there are never more than three.

Unlike the authors' code the bias of the dense layer sits on the last factor, which is exact with every padding; a pointwise convolution applies its
stride and padding in its first factor. Their bias, a further input that is always 1, is there for Linear (``augmented``).

With ``separable`` the core is a depthwise convolution of that many channels, the sum of rank-one terms nearest to it
(:mod:`lightning_prune.structure.separable`), whose other factors are multiplied into the outer ones.
"""

import dataclasses
import functools
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.errors import ModelError
from lightning_prune.structure.factorized import Cost, Shapes, positions
from lightning_prune.structure.layers import DenseLayer, describe, is_plain, layer_from
from lightning_prune.structure.separable import Separable, separate

Side: TypeAlias = Literal["inputs", "outputs", "both"]
FACTORS = ("rotate_in", "core", "rotate_out")
Specs: TypeAlias = Mapping[str, Mapping[str, Any]]  # by factor, in the order of FACTORS: descriptions of plain layers


class Rotated(nn.Sequential):
    """A dense layer as two or three thinner plain layers in a row.

    Args:
        factors: ``core``, and ``rotate_in``, ``rotate_out`` or both.
    """

    core: DenseLayer

    def __init__(self, factors: Mapping[str, nn.Module]) -> None:
        super().__init__(OrderedDict((name, factors[name]) for name in FACTORS if name in factors))


@dataclasses.dataclass(frozen=True)
class Form:
    """How much of a layer stays.

    Attributes:
        inputs: Directions of the inputs that stay; None for all, and no rotation of its own.
        outputs: Directions of the outputs that stay, likewise.
        separable: Channels of a depthwise core; None for a full one.
        augmented: Whether the bias of a Linear counts as a further input, always 1, and is rotated with them.
    """

    inputs: int | None = None
    outputs: int | None = None
    separable: int | None = None
    augmented: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Directions:
    """The directions of a layer that stay.

    Attributes:
        inputs: Orthonormal columns, ``[inputs of the core, r_in]``, with ``augmented`` one row more, the last, for the bias; None for all.
        outputs: Orthonormal columns, ``[outputs of the core, r_out]``; None for all.
        separable: Channels of a depthwise core; None for a full one.
        augmented: Whether the bias of a Linear is rotated with the inputs.
        weights_in: What an error in each direction counts where the core is made separable, ``[r_in]``; None for 1.
        weights_out: Likewise, ``[r_out]``.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    separable: int | None = None
    augmented: bool = False
    weights_in: Tensor | None = None
    weights_out: Tensor | None = None

    @property
    def form(self) -> Form:
        """How many there are."""
        inputs, outputs = (None if basis is None else basis.shape[1] for basis in (self.inputs, self.outputs))
        return Form(inputs, outputs, self.separable, self.augmented)


def factors_of(layer: nn.Module) -> dict[str, DenseLayer]:
    """Return the factors of a layer by name: those of a rotated one, or a plain layer as the only one, ``core``.

    Raises:
        ModelError: If ``layer`` is neither, or a factor is no plain layer.
    """
    factors = dict(layer.named_children()) if isinstance(layer, Rotated) else {"core": layer}
    if "core" not in factors or not all(is_plain(factor) for factor in factors.values()):
        raise ModelError(f"A layer of type {type(layer).__name__} has no rotated form.")
    return factors  # type: ignore[return-value]


def describe_factors(layer: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe the factors of a plain or rotated layer, by name, in JSON types.

    Raises:
        ModelError: As :func:`factors_of`.
    """
    return {name: describe(factor) for name, factor in factors_of(layer).items()}


def rotated_specs(before: Specs, form: Form) -> dict[str, dict[str, Any]]:
    """Describe the factors that a layer becomes.

    Args:
        before: Description of its factors as they are.
        form: How much of the core stays.

    Raises:
        ModelError: If the layer has no such form; says what is allowed.
    """
    _check(before, form)
    (first, *_), (*_, last), core = before.values(), before.values(), before["core"]
    tapless = _is_pointwise(core)
    neutral = _neutral(core)
    pointwise = {**core, **neutral, "bias": False}
    inner, outer = (form.separable or kept or core[key] for kept, key in ((form.inputs, "in"), (form.outputs, "out")))
    after: dict[str, dict[str, Any]] = {}
    if form.separable or form.inputs or "rotate_in" in before:
        homogeneous = form.augmented or ("rotate_in" in before and first["bias"])
        after["rotate_in"] = pointwise | {"in": first["in"], "out": inner, "bias": homogeneous}
    after["core"] = (pointwise if tapless else {**core, "bias": False}) | {"in": inner, "out": outer}
    if form.separable or form.outputs or "rotate_out" in before:
        after["rotate_out"] = pointwise | {"in": outer, "out": last["out"]}
    if form.separable:
        after["core"]["groups"] = form.separable
    if tapless:
        next(iter(after.values())).update({key: first[key] for key in neutral})
    if last["bias"] and not form.augmented:
        next(reversed(after.values()))["bias"] = True
    return after


def build_rotated(layer: nn.Module, form: Form) -> Rotated:
    """Build the rotated form of a layer: shapes only, values uninitialised, no random number drawn.

    Args:
        layer: A plain Linear, Conv1d, Conv2d or Conv3d, or a rotated layer; also on the meta device.
        form: How much of it stays.

    Returns:
        Layers of the dtype, device, training flag and ``requires_grad`` of the layer; new rotations train if its core does.

    Raises:
        ModelError: If the layer has no such form.
    """
    old = factors_of(layer)
    core, bias = old["core"], next((factor.bias for factor in old.values() if factor.bias is not None), None)
    new = {
        name: layer_from(spec, device=core.weight.device, dtype=core.weight.dtype)
        for name, spec in rotated_specs(describe_factors(layer), form).items()
    }
    for name, factor in new.items():
        factor.weight.requires_grad_(old.get(name, core).weight.requires_grad)
        if factor.bias is not None and bias is not None:
            factor.bias.requires_grad_(bias.requires_grad)
    return Rotated(new).train(layer.training)


@torch.no_grad()
def rotate(layer: nn.Module, directions: Directions) -> Rotated:
    """Leave directions of a layer out: what :func:`project` computes, in fewer values.

    Args:
        layer: A plain Linear, Conv1d, Conv2d or Conv3d, or a rotated layer; left as it is.
        directions: Those that stay.

    Returns:
        New layers that share no memory with ``layer``, computed in float64 and rounded once.

    Raises:
        ModelError: As :func:`build_rotated`; if the weights are on the meta device or not finite, or a basis does not fit them.
    """
    small = build_rotated(layer, directions.form)
    old, new = factors_of(layer), factors_of(small)
    core, left, right = _core(layer, directions), directions.outputs, directions.inputs
    if directions.separable:
        terms = _terms(core, directions)
        core, left, right = terms.taps.T, _product(left, terms.outputs), _product(right, terms.inputs)
    values = {"core": core}
    if "rotate_in" in new:
        inward = _homogeneous(old["rotate_in"]) if "rotate_in" in old else None
        values["rotate_in"] = _product(None if right is None else right.T, inward)
    if "rotate_out" in new:
        outward = _wide(old["rotate_out"].weight).flatten(1) if "rotate_out" in old else None
        values["rotate_out"] = _product(outward, left)
    for name, factor in new.items():
        inputs = factor.weight[0].numel()
        factor.weight.copy_(values[name].flatten(1)[:, :inputs].reshape(factor.weight.shape))
        if name == "rotate_in" and factor.bias is not None:
            factor.bias.copy_(values[name][:, -1])
    last, small_last = list(old.values())[-1], list(new.values())[-1]
    if last.bias is not None and small_last.bias is not None:
        small_last.bias.copy_(last.bias)
    return small


@torch.no_grad()
def project(layer: nn.Module, directions: Directions) -> tuple[Tensor, Tensor | None]:
    """Project the core of a layer onto the directions that stay: what the rotated layer computes, in the old shapes.

    Args:
        layer: A plain Linear, Conv1d, Conv2d or Conv3d, or a rotated layer; left as it is.
        directions: Those that stay.

    Returns:
        Values for the weight of the core, and for its bias where that is rotated, too; computed in float64 and rounded once.

    Raises:
        ModelError: As :func:`rotate`.
    """
    rotated_specs(describe_factors(layer), directions.form)
    core = _core(layer, directions)
    if directions.separable:
        core = _terms(core, directions).product().view(core.shape)
    if directions.inputs is not None:
        core = torch.einsum("oq...,iq->oi...", core, directions.inputs.to(core))
    if directions.outputs is not None:
        core = torch.einsum("pi...,op->oi...", core, directions.outputs.to(core))
    weight = factors_of(layer)["core"].weight
    core = core.to(weight)
    return (core[:, :-1], core[:, -1]) if directions.augmented else (core, None)


def cost(layer: nn.Module, form: Form, shapes: Shapes) -> Cost:
    """Cost of a layer in a form, without building it; of ``Form()`` that of the layer as it is.

    Args:
        layer: A plain Linear, Conv1d, Conv2d or Conv3d, or a rotated layer.
        form: How much of it stays.
        shapes: Shapes of input and output of every call of the layer, batch included.

    Returns:
        Parameters and multiply-adds. A convolution that reads its inputs through a rotation computes that one at the resolution of its input.

    Raises:
        ModelError: If the layer has no such form.
    """
    before, core = describe_factors(layer), factors_of(layer)["core"]
    specs = before if form == Form() else rotated_specs(before, form)
    sizes = {
        name: spec["out"] * spec["in"] // spec.get("groups", 1) * math.prod(spec.get("kernel", ()))
        for name, spec in specs.items()
    }
    biases = sum(spec["out"] for spec in specs.values() if spec["bias"])
    late, early = sum(sizes.values()), 0
    if "rotate_in" in sizes and not _is_pointwise(specs["core"]):
        early = sizes["rotate_in"]
    flops = sum(early * positions(core, given) + (late - early) * positions(core, output) for given, output in shapes)
    return Cost(late + biases, flops)


def forms_of(layer: nn.Module) -> tuple[Side, ...]:
    """Return of which sides directions may leave a layer: with a kernel of one, so that there are never more than two factors.

    Args:
        layer: A plain Linear, Conv1d, Conv2d or Conv3d, or a rotated layer.

    Raises:
        ModelError: If the layer has no rotated form.
    """
    before = describe_factors(layer)
    if not _is_pointwise(before["core"]):
        return ("inputs", "outputs", "both")
    other: dict[Side, str] = {"inputs": "rotate_out", "outputs": "rotate_in"}
    return tuple(side for side, factor in other.items() if factor not in before)


def calls_of(name: str, layer: nn.Module, shapes: Mapping[str, Shapes]) -> Shapes:
    """Return the shapes of input and output of every call of a plain or rotated layer.

    Args:
        name: Its dotted name.
        layer: The layer.
        shapes: Likewise by name of a plain layer, as :func:`lightning_prune.count_flops` finds them; empty for a layer that is never called.
    """
    if not isinstance(layer, Rotated):
        return shapes.get(name, ())
    seen = [shapes.get(f"{name}.{factor}".removeprefix("."), ()) for factor in factors_of(layer)]
    return [(given, output) for (given, _), (_, output) in zip(seen[0], seen[-1], strict=True)]


def _check(before: Specs, form: Form) -> None:
    core = before["core"]
    if core.get("groups", 1) > 1:
        raise ModelError(
            f"A {core['type']} in {core['groups']} groups has no rotated form: directions would mix the groups. Exclude it."
        )
    if form.inputs is None and form.outputs is None and form.separable is None:
        raise ModelError("A rotated layer keeps some directions of its inputs or outputs: give at least one number.")
    if form.augmented and (set(before) != {"core"} or "kernel" in core or not core["bias"] or form.inputs is None):
        raise ModelError(
            f"A {core['type']} cannot be augmented: only a Linear that has a bias, is not rotated yet and keeps a number of inputs can."
        )
    if form.separable is not None and _is_pointwise(core):
        raise ModelError(f"A {core['type']} without taps has nothing to separate: give separable=None.")
    inner, outer, taps = core["in"] + form.augmented, core["out"], math.prod(core.get("kernel", ()))
    r_in, r_out = form.inputs or inner, form.outputs or outer
    most = min(r_in * r_out, r_in * taps, r_out * taps)
    for name, count, limit in (
        ("inputs", form.inputs, inner),
        ("outputs", form.outputs, outer),
        ("terms", form.separable, most),
    ):
        if count is not None and not 1 <= count <= limit:
            raise ModelError(f"A {core['type']} cannot keep {count} {name}: take 1 to {limit}.")


def _is_pointwise(core: Mapping[str, Any]) -> bool:
    return all(size == 1 for size in core.get("kernel", ()))


def _neutral(core: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what makes a convolution pointwise; a Linear is."""
    axes = len(core.get("kernel", ()))
    one, zero = [1] * axes, [0] * axes
    geometry = {"kernel": one, "stride": one, "padding": zero, "dilation": one, "padding_mode": "zeros"}
    return geometry if axes else {}


def _wide(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return tensor.detach().to(device="cpu" if tensor.device.type == "mps" else tensor.device, dtype=torch.float64)


def _homogeneous(layer: DenseLayer) -> Tensor:
    """The weight of a pointwise layer as a matrix whose last column is the bias, if there is one."""
    matrix = _wide(layer.weight).flatten(1)
    return matrix if layer.bias is None else torch.cat([matrix, _wide(layer.bias)[:, None]], 1)


def _core(layer: nn.Module, directions: Directions) -> Tensor:
    """The core in the coordinates of the directions, ``[r_out, r_in, *k]``, float64."""
    dense = factors_of(layer)["core"]
    if dense.weight.is_meta:
        raise ModelError(f"A {dense} on the meta device holds no values to rotate: load its weights first.")
    core = _homogeneous(dense) if directions.augmented else _wide(dense.weight)
    if not bool(core.isfinite().all()):
        raise ModelError(
            f"A {dense} holds values that are not finite. Lower the learning rate or start from a sound checkpoint."
        )
    for axis, basis in ((1, directions.inputs), (0, directions.outputs)):
        if basis is not None and len(basis) != core.shape[axis]:
            raise ModelError(f"A basis of shape {list(basis.shape)} does not fit a weight of shape {list(core.shape)}.")
    if directions.inputs is not None:
        core = torch.einsum("oi...,iq->oq...", core, directions.inputs.to(core))
    if directions.outputs is not None:
        core = torch.einsum("oi...,op->pi...", core, directions.outputs.to(core))
    return core


def _terms(core: Tensor, directions: Directions) -> Separable:
    assert directions.separable is not None
    return separate(core, directions.separable, directions.weights_out, directions.weights_in)


def _product(left: Tensor | None, right: Tensor | None) -> Tensor:
    """The product of two matrices, float64; None is one that changes nothing."""
    matrices = [_wide(matrix).flatten(1) for matrix in (left, right) if matrix is not None]
    return functools.reduce(lambda one, two: one @ two.to(one), matrices)
