"""Layers whose weight is a matrix product operator (:mod:`lightning_prune.structure.tensor_train`).

A layer contracts its cores with the input from the first core on, from the last on, or multiplies them to the dense weight first. What is
cheapest for the rows or pixels at hand is taken by a rule (:meth:`lightning_prune.structure.tensor_train.Form.way`), not by a clock, so that the
same layer computes the same way everywhere. An exported graph holds one way for every batch, and never the dense weight.

Core ``k`` is stored as the matrix ``[J_k D_k, D_{k-1} I_k]`` that maps the ``k``-th input mode with the bond before it to the ``k``-th output
mode with the bond after it: nothing is transposed on the way. The core of a kernel is ``[D_n, K]``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.errors import ModelError
from lightning_prune.structure.layers import DenseLayer, describe, is_plain
from lightning_prune.structure.tensor_train import Form, Way, contract, entropies, fold, unfold

Training: TypeAlias = Literal["auto", "factorized", "reconstruct"]
WAYS: dict[Training, tuple[Way, ...]] = {
    "auto": ("left", "right", "dense"),
    "factorized": ("left", "right"),
    "reconstruct": ("dense",),
}


class MPO(nn.Module):
    """Base of both layers.

    Args:
        like: The dense layer; gives sizes, bias, device, type, training flag and ``requires_grad``, no values.
        form: Modes and bonds.
        train: How to contract while training: ``"auto"`` by the rule, ``"factorized"`` core by core, ``"reconstruct"`` by the dense weight.

    Attributes:
        cores: One parameter per site.
        bias: That of the dense layer, or None.

    Raises:
        ModelError: If the form is not one for this layer.
    """

    bias: Tensor | None

    def __init__(self, like: DenseLayer, form: Form, train: Training = "auto") -> None:
        super().__init__()
        check_form(like, form)
        self.form, self.train_by, self.weight_shape = form, train, tuple(like.weight.shape)
        ends = (1, *form.bonds, 1)
        pairs = enumerate(zip(form.outputs, form.inputs, strict=True))
        shapes = [(j * ends[k + 1], ends[k] * i) for k, (j, i) in pairs]
        shapes += [(form.bonds[-1], form.kernel)] if form.kernel else []
        self.cores = nn.ParameterList([like.weight.new_empty(shape) for shape in shapes])
        self.cores.requires_grad_(like.weight.requires_grad)
        bias = None if like.bias is None else nn.Parameter(torch.empty_like(like.bias), like.bias.requires_grad)
        self.register_parameter("bias", bias)
        self.train(like.training)

    def extra_repr(self) -> str:
        """Return modes and bonds."""
        modes = " ".join(f"{j}x{i}" for j, i in zip(self.form.outputs, self.form.inputs, strict=True))
        return f"{list(self.weight_shape)}, modes={modes}, bonds={list(self.form.bonds)}"

    @torch.no_grad()
    def fill(self, cores: Sequence[Tensor], bias: Tensor | None) -> None:
        """Take values.

        Args:
            cores: ``[D_{k-1}, J_k I_k, D_k]``, ``[D_n, K, 1]`` for the kernel.
            bias: ``[N]``, or None.
        """
        for grid, values, j in zip(self.grids(), cores, self.form.outputs, strict=False):
            grid.copy_(values.reshape(values.shape[0], j, -1, values.shape[2]).permute(1, 3, 0, 2))
        if self.form.kernel:
            self.cores[-1].copy_(cores[-1][:, :, 0])
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def grids(self) -> list[Tensor]:
        """Return the cores as ``[J_k, D_k, D_{k-1}, I_k]``, without that of a kernel."""
        ends, pairs = (1, *self.form.bonds, 1), zip(self.form.outputs, self.form.inputs, strict=True)
        sizes = ((j, ends[k + 1], ends[k], i) for k, (j, i) in enumerate(pairs))
        return [core.view(size) for core, size in zip(self.cores, sizes, strict=False)]

    def entropies(self) -> list[float]:
        """Return the entanglement entropy of every cut of the weight that the cores stand for."""
        return entropies(sites_of(list(self.cores), self.form))

    def dense_weight(self) -> Tensor:
        """Return the weight ``[N, C, *kernel]`` that the cores stand for.

        The last product has rows of the weight as its rows, only in another order: of the large result, whole rows are copied.
        """
        *first, last = self.grids()
        j, _, bond, _ = last.shape
        right = last.permute(0, 2, 3, 1)  # [J, D, I, D']
        right = (right @ self.cores[-1] if self.form.kernel else right).reshape(j, bond, -1)  # [J, D, I K]
        if first:
            left: Tensor = first[0].permute(0, 3, 1, 2)[..., 0]  # [J, I, D]
            for core in first[1:]:
                left = torch.einsum("aid,jedk->ajike", left, core).flatten(2, 3).flatten(0, 1)
            joined = torch.bmm(left.reshape(1, -1, bond).expand(j, -1, -1), right)  # [J_n, J I, I_n K]
            right = joined.reshape(j, left.shape[0], -1).transpose(0, 1)
        weight: Tensor = right.reshape(self.form.rows, self.form.columns, -1)
        return weight[: self.weight_shape[0], : self.weight_shape[1]].reshape(self.weight_shape)

    def way(self, outer: int, inner: int | None = None) -> Way:
        """Return how this layer contracts for so many output and input positions; a graph that is exported serves all of them."""
        if torch.compiler.is_exporting():
            return self.form.way(allowed=WAYS["factorized"])
        return self.form.way(outer, inner, WAYS[self.train_by if self.training else "auto"])

    def _left(self, z: Tensor, pixels: int = 1) -> Tensor:
        """Contract ``[B, I, P]`` from the first core on to ``[B J_1 ... J_{n-1}, J_n D_n, P]``."""
        rest = self.form.columns * pixels
        for core, inner in zip(self.cores, self.form.inputs, strict=False):
            rest //= inner
            z = _product(core, z, rest)
        return z

    def _right(self, z: Tensor, pixels: int = 1) -> Tensor:
        """Contract ``[B, I, D_n, P]`` from the last core on to ``[B, J_1, J_2 ... J_n P]``."""
        rest = pixels
        for grid in self.grids()[::-1]:
            out, right, left, inner = grid.shape
            matrix = grid.permute(2, 0, 3, 1).reshape(left * out, inner * right)
            z = _product(matrix, z, rest)
            rest *= out
        return z


class MPOLinear(MPO):
    """A linear layer, ``[..., C]`` to ``[..., N]``; arguments as for :class:`MPO`."""

    def __init__(self, like: nn.Linear, form: Form, train: Training = "auto") -> None:
        super().__init__(like, form, train)
        self.in_features, self.out_features = like.in_features, like.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b``.

        Raises:
            ModelError: If ``x`` has another width.
        """
        if x.shape[-1] != self.in_features:
            raise ModelError(f"This layer takes inputs of width {self.in_features}; got {list(x.shape)}.")
        rows = math.prod(x.shape[:-1])
        way = self.way(rows)
        if way == "dense":
            return F.linear(x, self.dense_weight(), self.bias)
        z = F.pad(x, (0, self.form.columns - self.in_features)) if self.form.columns > self.in_features else x
        z = self._left(z) if way == "left" else self._right(z)
        z = z.reshape(*x.shape[:-1], self.form.rows)
        z = z[..., : self.out_features] if self.form.rows > self.out_features else z
        if self.bias is None:
            return z
        bias = self.bias.to(z.dtype)
        return z + (bias.reshape(z.shape) if rows == 1 else bias)  # of one shape, whose gradient is no sum over rows


class MPOConv(MPO):
    """A convolution in one to three dimensions, ``[B, C, ...]`` to ``[B, N, ...]``; arguments as for :class:`MPO`.

    From the last core on: one kernel, the same for all input channels, makes ``D_n`` maps of each; the chain maps those to the outputs, pixel by
    pixel. From the first core on: the chain makes ``D_n`` maps for each output of the pixels of the input, then comes the kernel.
    """

    def __init__(self, like: nn.Conv1d | nn.Conv2d | nn.Conv3d, form: Form, train: Training = "auto") -> None:
        super().__init__(like, form, train)
        self.in_channels, self.out_channels, self.kernel_size = like.in_channels, like.out_channels, like.kernel_size
        self.stride, self.padding, self.dilation = like.stride, like.padding, like.dilation
        self.padding_mode = like.padding_mode
        self._reversed_padding_repeated_twice = like._reversed_padding_repeated_twice

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x`` with ``W``, plus ``b``.

        Raises:
            ModelError: If ``x`` has other channels or axes.
        """
        axes = len(self.kernel_size)
        if x.ndim == axes + 1:
            return self.forward(x[None])[0]
        if x.ndim != axes + 2 or x.shape[1] != self.in_channels:
            raise ModelError(
                f"This layer takes maps of {self.in_channels} channels and {axes} axes; got {list(x.shape)}."
            )
        inner = math.prod(x.shape[2:])
        way = self.way(x.shape[0] * self._pixels(x.shape[2:]), x.shape[0] * inner)
        if way == "dense":
            return self._convolve(x, self.dense_weight(), self.bias)
        extra = self.form.columns - self.in_channels
        z = F.pad(x, (0, 0) * axes + (0, extra)) if extra else x
        kernel = self.cores[-1].reshape(-1, 1, *self.kernel_size)
        if way == "left":
            z = self._convolve_each(self._left(z, inner), kernel.transpose(0, 1), self.form.rows, x.shape[2:])
        else:
            z = self._convolve_each(z, kernel, self.form.columns, x.shape[2:])
            z = self._right(z, math.prod(z.shape[2:])).reshape(-1, self.form.rows, *z.shape[2:])
        z = z.reshape(-1, self.form.rows, *z.shape[2:])
        z = z[:, : self.out_channels] if self.form.rows > self.out_channels else z
        return z if self.bias is None else z + self.bias.to(z.dtype).reshape(-1, *[1] * axes)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """Convolve with the stride, padding and dilation of the dense layer."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = (
                F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode),
                (0,) * len(self.kernel_size),
            )
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        return convolve(x, weight, bias, self.stride, padding, self.dilation, groups)  # type: ignore[no-any-return]

    def _convolve_each(self, z: Tensor, kernel: Tensor, count: int, extent: Sequence[int]) -> Tensor:
        """Convolve each of ``count`` groups of maps ``z``, ``[B, count, D, P]`` in any shape, with the same kernel.

        Groups are the faster way by up to four times: few channels in large batches are filled up to many. In a graph they would repeat the kernel.
        """
        each = kernel.shape[1]
        if torch.compiler.is_exporting():
            return self._convolve(z.reshape(-1, each, *extent), kernel)
        kernel = kernel.repeat(count, *[1] * (kernel.ndim - 1))
        return self._convolve(z.reshape(-1, count * each, *extent), kernel, groups=count)

    def _pixels(self, extent: Sequence[int]) -> int:
        """Return the number of pixels of the output for an input of ``extent``."""
        padding = self._reversed_padding_repeated_twice[::-1]
        count = 1
        for axis, size in enumerate(extent):
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
            count *= (size + padding[2 * axis] + padding[2 * axis + 1] - reach - 1) // self.stride[axis] + 1
        return count


def check_form(layer: nn.Module, form: Form) -> None:
    """Check that a layer can take a form.

    Raises:
        ModelError: If the layer is neither a plain Linear nor a plain convolution without groups, or the sizes do not match.
    """
    if not is_plain(layer) or getattr(layer, "groups", 1) != 1:
        raise ModelError(
            f"A {layer} has no form as a matrix product operator; plain linear layers and convolutions of one group have."
        )
    outputs, inputs = layer.weight.shape[:2]
    positions = positions_of(describe(layer))
    if form.rows < outputs or form.columns < inputs or form.kernel != positions:
        raise ModelError(
            f"A weight of {list(layer.weight.shape)} has no {form!r}: the modes must multiply to {outputs} outputs and {inputs} inputs or more "
            f"(the rest is filled up with zeros), and the kernel has {positions} positions."
        )


def build_mpo(layer: nn.Module, form: Form, train: Training = "auto") -> MPOLinear | MPOConv:
    """Build the layer that takes the place of a dense one, values uninitialised.

    Raises:
        ModelError: As :func:`check_form`.
    """
    check_form(layer, form)
    return MPOLinear(layer, form, train) if isinstance(layer, nn.Linear) else MPOConv(layer, form, train)  # type: ignore[arg-type]


def positions_of(spec: Mapping[str, Any]) -> int:
    """Return the positions of the kernel of a described layer, 0 for a linear one."""
    return math.prod(spec["kernel"]) if "kernel" in spec else 0


def tensor_of(layer: DenseLayer, form: Form) -> Tensor:
    """Return the weight of a dense layer as the tensor that is decomposed, with one axis per site, detached."""
    return fold(layer.weight.detach(), form)


def weight_from(cores: Sequence[Tensor], form: Form, shape: Sequence[int]) -> Tensor:
    """Return the weight ``[N, C, *kernel]`` of cores ``[D_{k-1}, J_k I_k, D_k]``."""
    return unfold(contract(cores), form, shape)


def sites_of(cores: Sequence[Tensor], form: Form) -> list[Tensor]:
    """Return stored cores as ``[D_{k-1}, J_k I_k, D_k]``, the inverse of :meth:`MPO.fill`; float64, detached."""
    ends, found = (1, *form.bonds, 1), []
    for k, (j, i) in enumerate(zip(form.outputs, form.inputs, strict=True)):
        grid = cores[k].detach().double().view(j, ends[k + 1], ends[k], i)
        found.append(grid.permute(2, 0, 3, 1).reshape(ends[k], j * i, ends[k + 1]))
    return [*found, cores[-1].detach().double()[:, :, None]] if form.kernel else found


def _product(matrix: Tensor, z: Tensor, rest: int) -> Tensor:
    """Multiply ``[r, c]`` with ``z``, ``[m, c, rest]`` in any shape; the result is ``[m, r, rest]`` likewise."""
    inner = matrix.shape[1]
    if rest == 1:
        return torch.mm(z.reshape(-1, inner), matrix.t())
    if torch.compiler.is_exporting():
        return matrix @ z.reshape(-1, inner, rest)  # the runtime spreads the matrix, and any batch will do
    if z.numel() == inner * rest:
        return torch.mm(matrix, z.reshape(inner, rest))
    z = z.reshape(-1, inner, rest)
    return torch.bmm(matrix.expand(z.shape[0], -1, -1), z)
