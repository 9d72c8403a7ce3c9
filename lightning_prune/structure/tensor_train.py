"""Weights as matrix product operators (MPO), that is trains of small tensors: sizes, values, errors, costs.

Gao, Cheng, He, Xie, Zhao, Lu and Xiang, "Compressing deep neural networks by matrix product operators", Physical Review Research 2, 023300
(2020, arXiv:1904.06194); Novikov, Podoprikhin, Osokin and Vetrov, "Tensorizing Neural Networks", NIPS 2015 (arXiv:1509.06569); for convolutions
Garipov, Podoprikhin, Novikov and Vetrov (2016, arXiv:1611.03214), the core of the kernel last instead of first: then nothing has to be transposed.

A weight ``[N, C, *kernel]`` is filled up with zero rows and columns to ``[J_1 ... J_n, I_1 ... I_n, K]`` and read as a tensor whose ``k``-th
axis ("site") is the pair ``(J_k, I_k)``, a convolution's kernel of ``K`` positions a last site of its own. Site ``k`` is a core
``[D_{k-1}, J_k I_k, D_k]`` and the weight the product of all over their bonds ``D``. One core is the dense weight; two are a sum of ``D_1`` Kronecker
products, whose rank may well be full. Fewer parameters are not fewer multiply-adds: see :meth:`Form.multiply_adds`.

All decompositions are computed in float64.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_prune.errors import ModelError, OptionError
from lightning_prune.structure.spectrum import rank_for_energy, spectrum, truncate

Way: TypeAlias = Literal["left", "right", "dense"]
"""How a layer contracts its cores with the input: from the first, from the last, or with each other first, to a dense weight."""

MOVED = 128  # multiply-adds that take as long as one element of an intermediate result, written, read and its memory fetched; fitted on a processor
_OBLONG = 2  # a factor may be so many times the ideal one before zero rows are the better way


@dataclasses.dataclass(frozen=True)
class Form:
    """Sizes of a matrix product operator.

    Attributes:
        outputs: ``J_1 ... J_n``; their product is at least the number of outputs.
        inputs: ``I_1 ... I_n``, likewise.
        bonds: ``D_1 ... D_{n-1}``, and ``D_n`` between the last pair and the kernel of a convolution.
        kernel: Positions of the kernel, ``K``; 0 for a linear layer.

    Raises:
        ModelError: If the lengths do not match, or a size is no integer of at least 1.
    """

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    bonds: tuple[int, ...]
    kernel: int = 0
    _costs: dict[Way, tuple[int, int, int]] = dataclasses.field(init=False, repr=False, compare=False)
    _efforts: dict[Way, tuple[int, int, int]] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.outputs or len(self.outputs) != len(self.inputs) or len(self.bonds) != len(self.sizes) - 1:
            raise ModelError(
                f"{self!r}: there must be as many output as input modes, and a bond between each two neighbours, "
                f"{len(self.sizes) - 1} here."
            )
        if any(type(size) is not int or size < 1 for size in (*self.outputs, *self.inputs, *self.bonds)):
            raise ModelError(f"{self!r}: modes and bonds are integers of at least 1.")
        products = self._products()
        object.__setattr__(self, "_costs", products)
        object.__setattr__(self, "_efforts", self._work(products))  # asked in every forward pass

    def __str__(self) -> str:
        return f"bonds {'/'.join(map(str, self.bonds)) or 'none'}"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the sites: ``J_k I_k``, and the kernel of a convolution."""
        pairs = tuple(j * i for j, i in zip(self.outputs, self.inputs, strict=True))
        return (*pairs, self.kernel) if self.kernel else pairs

    @property
    def params(self) -> int:
        """Number of parameters without bias, ``sum_k D_{k-1} J_k I_k D_k``."""
        ends = (1, *self.bonds, 1)
        return sum(ends[k] * size * ends[k + 1] for k, size in enumerate(self.sizes))

    @property
    def rows(self) -> int:
        """Outputs with those that are filled up."""
        return math.prod(self.outputs)

    @property
    def columns(self) -> int:
        """Inputs with those that are filled up."""
        return math.prod(self.inputs)

    def with_bonds(self, bonds: Sequence[int]) -> "Form":
        """Return this form with other bonds, none larger than useful."""
        return dataclasses.replace(self, bonds=useful_bonds(self.sizes, bonds))

    def multiply_adds(self, outer: int = 1, inner: int | None = None) -> dict[Way, int]:
        """Return the multiply-adds of every way to contract.

        Args:
            outer: Output positions in all: rows that a linear layer sees, batch times pixels of the output of a convolution.
            inner: Input positions in all; by default as many.
        """
        inner = outer if inner is None else inner
        return {way: a * inner + b * outer + c for way, (a, b, c) in self._costs.items()}

    def way(self, outer: int = 1, inner: int | None = None, allowed: Sequence[Way] = ("left", "right", "dense")) -> Way:
        """Choose the way to contract, by multiply-adds and elements moved; no clock is asked.

        Args:
            outer: As for :meth:`multiply_adds`.
            inner: Likewise.
            allowed: Ways to choose from; the first of equals is taken.
        """
        inner = outer if inner is None else inner
        best, least = allowed[0], None
        for way in allowed:  # no min(key=): torch.compile traces this with sizes that are not known yet
            a, b, c = self._efforts[way]
            work = a * inner + b * outer + c
            if least is None or work < least:
                best, least = way, work
        return best

    def _products(self) -> dict[Way, tuple[int, int, int]]:
        """Multiply-adds per input position, per output position, and once."""
        ends = (1, *self.bonds, 1)
        left = right = 0
        for k, (j, i) in enumerate(zip(self.outputs, self.inputs, strict=True)):
            here = ends[k] * ends[k + 1] * j * i
            left += here * math.prod(self.outputs[:k]) * math.prod(self.inputs[k + 1 :])
            right += here * math.prod(self.outputs[k + 1 :]) * math.prod(self.inputs[:k])
        spatial = ends[len(self.inputs)] * self.kernel
        weight = self.rows * self.columns * max(self.kernel, 1)
        return {
            "left": (left, self.rows * spatial, 0),
            "right": (0, right + self.columns * spatial, 0),
            "dense": (0, weight, self._joining()),
        }

    def _work(self, products: Mapping[Way, tuple[int, int, int]]) -> dict[Way, tuple[int, int, int]]:
        """What a choice goes by, likewise: multiply-adds, and elements of intermediate results times ``MOVED``."""
        ends = (*self.bonds, 1)
        cuts = range(len(self.bonds))
        left = sum(math.prod(self.outputs[: k + 1]) * ends[k] * math.prod(self.inputs[k + 1 :]) for k in cuts)
        right = sum(math.prod(self.inputs[: k + 1]) * ends[k] * math.prod(self.outputs[k + 1 :]) for k in cuts)
        dense = self.rows * self.columns * max(self.kernel, 1)
        moved: dict[Way, tuple[int, int, int]] = {"left": (left, 0, 0), "right": (0, right, 0), "dense": (0, 0, dense)}
        return {
            way: (a + MOVED * x, b + MOVED * y, c + MOVED * z)
            for (way, (a, b, c)), (x, y, z) in zip(products.items(), moved.values(), strict=True)
        }

    def _joining(self) -> int:
        """Multiply-adds of joining all cores to the dense weight: the pairs but the last, the last with the kernel, then both."""
        sizes, ends, count = self.sizes, (1, *self.bonds, 1), len(self.inputs)
        before = sum(math.prod(sizes[: k + 1]) * ends[k] * ends[k + 1] for k in range(1, count - 1))
        kernel = ends[count - 1] * sizes[count - 1] * ends[count] * self.kernel
        return before + kernel + (math.prod(sizes) * ends[count - 1] if count > 1 else 0)


class Train(NamedTuple):
    """A decomposition.

    Attributes:
        cores: ``[D_{k-1}, p_k, D_k]``, float64; all but the last are orthonormal: ``U^T U = 1`` for ``U [D_{k-1} p_k, D_k]``.
        discarded: Squares of the singular values left out at each cut; their sum is the squared Frobenius error, exactly.
    """

    cores: list[Tensor]
    discarded: list[float]

    @property
    def bonds(self) -> tuple[int, ...]:
        """``D_1, D_2, ...``."""
        return tuple(core.shape[2] for core in self.cores[:-1])


def factors(size: int, count: int) -> tuple[int, ...]:
    """Split a size into factors that are as equal as possible, ascending.

    Args:
        size: At least 1.
        count: Number of factors, at least 1.

    Returns:
        Factors whose product is ``size`` if the largest is at most twice the ideal one, ``size ** (1 / count)``; else those of the next
        larger size of which that is true: primes are filled up, by few. Factors of 1 come where there is nothing to split.

    >>> factors(784, 2), factors(784, 4), factors(10, 2), factors(97, 2)
    ((28, 28), (4, 4, 7, 7), (2, 5), (7, 14))
    """
    found = _most_equal(size, count)
    while found[-1] > _OBLONG * size ** (1 / count):
        size += 1
        found = _most_equal(size, count)
    return found


def modes_for(outputs: int, inputs: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose the modes of a layer: output modes descending and input modes ascending, so that the sites are of like size."""
    return factors(outputs, count)[::-1], factors(inputs, count)


def useful_bonds(sizes: Sequence[int], bonds: Sequence[int] | int | None = None) -> tuple[int, ...]:
    """Lower bonds to what can be of use: no more than the sizes on either side allow.

    Args:
        sizes: Sizes of the sites.
        bonds: One per cut, or one for all; None for the largest useful ones, which hold any tensor.

    >>> useful_bonds((4, 4, 9)), useful_bonds((4, 4, 9), 6)
    ((4, 9), (4, 6))
    """
    cuts = len(sizes) - 1
    wanted = [math.prod(sizes)] * cuts if bonds is None else [bonds] * cuts if isinstance(bonds, int) else list(bonds)
    for k in range(cuts):
        wanted[k] = min(wanted[k], (wanted[k - 1] if k else 1) * sizes[k])
    for k in reversed(range(cuts)):
        wanted[k] = min(wanted[k], (wanted[k + 1] if k + 1 < cuts else 1) * sizes[k + 1])
    return tuple(wanted)


def fold(weight: Tensor, form: Form) -> Tensor:
    """Read a weight as a tensor with one axis per site.

    Args:
        weight: ``[N, C, *kernel]``, at most as large as the modes.
        form: Modes; its bonds do not matter.

    Returns:
        ``[J_1 I_1, ..., J_n I_n]``, of a convolution also ``K``; connected to ``weight`` for autograd.
    """
    rows, columns = weight.shape[:2]
    flat = weight.reshape(rows, columns, -1)
    flat = torch.nn.functional.pad(flat, (0, 0, 0, form.columns - columns, 0, form.rows - rows))
    count = len(form.inputs)
    order = [axis for k in range(count) for axis in (k, count + k)]
    return flat.reshape(*form.outputs, *form.inputs, -1).permute(*order, 2 * count).reshape(form.sizes)


def unfold(tensor: Tensor, form: Form, shape: Sequence[int]) -> Tensor:
    """Read a tensor with one axis per site as a weight again: the inverse of :func:`fold`; what was filled up is cut off.

    Args:
        tensor: ``[J_1 I_1, ...]``.
        form: Its modes.
        shape: Shape of the weight, ``[N, C, *kernel]``.
    """
    pairs = [size for pair in zip(form.outputs, form.inputs, strict=True) for size in pair]
    count = len(form.inputs)
    order = [*range(0, 2 * count, 2), *range(1, 2 * count, 2), 2 * count]
    flat = tensor.reshape(*pairs, -1).permute(order).reshape(form.rows, form.columns, -1)
    return flat[: shape[0], : shape[1]].reshape(tuple(shape))


def cut_values(tensor: Tensor) -> list[Tensor]:
    """Return the singular values of every unfolding ``[p_1 ... p_k, p_{k+1} ...]``, float64, descending.

    Raises:
        ModelError: If the tensor holds values that are not finite.
    """
    sizes = tensor.shape
    return [spectrum(tensor.reshape(1, math.prod(sizes[:k]), -1)).values[0] for k in range(1, len(sizes))]


def entropy(values: Tensor) -> float:
    """Return the entanglement entropy of a cut, ``-sum v ln v`` with ``v = s^2 / sum s^2``: 0 for one value, ``ln D`` for D equal ones."""
    squares = values.double().square()
    shares = squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(shares).sum())


@torch.no_grad()
def entropies(cores: Sequence[Tensor]) -> list[float]:
    """Return the entropy of every cut of the tensor that cores stand for, whatever their gauge.

    Args:
        cores: ``[D_{k-1}, p_k, D_k]``.
    """
    wide = [core.double() for core in cores]
    for k in range(len(wide) - 1, 0, -1):  # from the last on, rows of what lies right of a cut become orthonormal
        q, r = torch.linalg.qr(wide[k].flatten(1).mT)
        wide[k] = q.mT.reshape(-1, *wide[k].shape[1:])
        wide[k - 1] = wide[k - 1] @ r.mT
    found, rest = [], wide[0]
    for core in wide[1:]:
        _, values, right = torch.linalg.svd(rest.flatten(0, 1), full_matrices=False)
        found.append(entropy(values))
        rest = torch.einsum("ab,bpc->apc", values[:, None] * right, core)
    return found


@torch.no_grad()
def tt_svd(tensor: Tensor, bonds: Sequence[int] | None = None) -> Train:
    """Decompose a tensor at given bonds, by singular value decompositions from the first site to the last.

    With ``delta_k^2`` the squares discarded at step ``k`` and ``eps_k^2`` those beyond ``D_k`` in the ``k``-th unfolding of the tensor itself,
    ``max eps_k^2 <= error^2 = sum delta_k^2 <= sum eps_k^2``.

    Args:
        tensor: ``[p_1, ..., p_n]``, floating point.
        bonds: One per cut; None for those that lose nothing.

    Raises:
        ModelError: If a bond is larger than useful, or values are not finite.
    """
    largest = useful_bonds(tensor.shape)
    wanted = largest if bonds is None else tuple(bonds)
    if len(wanted) != len(largest) or useful_bonds(tensor.shape, wanted) != wanted:
        raise ModelError(
            f"A tensor of {list(tensor.shape)} has no train with bonds {list(wanted)}; at most {list(largest)} are of use."
        )
    return _sweep(tensor, lambda k, _values, _spent: wanted[k])


@torch.no_grad()
def tt_svd_within(tensor: Tensor, error: float) -> Train:
    """Decompose a tensor with bonds as small as an error allows; what one cut does not use of it goes to the next.

    Args:
        tensor: ``[p_1, ..., p_n]``, floating point.
        error: Relative Frobenius error that must not be exceeded, in [0, 1).

    Raises:
        OptionError: If ``error`` is out of range.
        ModelError: If values are not finite.
    """
    check_error(error)
    cuts = tensor.ndim - 1
    whole = float(tensor.detach().double().square().sum())

    def choose(k: int, values: Tensor, spent: float) -> int:
        left = max(0.0, error**2 * whole - spent) / (cuts - k)
        here = float(values.square().sum())
        return rank_for_energy(values, left / here) if here else 1

    return _sweep(tensor, choose, error**2 / max(cuts, 1))


def contract(cores: Sequence[Tensor]) -> Tensor:
    """Multiply cores ``[D_{k-1}, p_k, D_k]`` to the tensor ``[p_1, ..., p_n]`` that they stand for."""
    sizes = [core.shape[1] for core in cores]
    product = cores[0].reshape(sizes[0], -1)
    for core in cores[1:]:
        product = product.reshape(-1, core.shape[0]) @ core.reshape(core.shape[0], -1)
    return product.reshape(sizes)


def balance(cores: Sequence[Tensor]) -> list[Tensor]:
    """Scale cores to equal Frobenius norms; their product stays. After :func:`tt_svd` all of the norm is in the last one."""
    norms = [float(core.norm()) for core in cores]
    mean = math.prod(norm ** (1 / len(norms)) for norm in norms)
    return [core * (mean / norm if norm else 0.0) for core, norm in zip(cores, norms, strict=True)]


def draw(form: Form, variance: float, seed: int) -> list[Tensor]:
    """Draw cores from normal distributions, all of one deviation, such that the entries of their product have a variance.

    ``Var W = sigma^{2n} prod D``: a product over ``n`` cores sums ``prod D`` independent terms.

    Args:
        form: Sizes.
        variance: Of the entries of the weight, above 0.
        seed: Of the draw.

    Returns:
        ``[D_{k-1}, p_k, D_k]``, float64.
    """
    ends, generator = (1, *form.bonds, 1), torch.Generator().manual_seed(seed)
    sigma = (variance / math.prod(form.bonds)) ** (0.5 / len(form.sizes))
    shapes = [(ends[k], size, ends[k + 1]) for k, size in enumerate(form.sizes)]
    return [sigma * torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def check_error(error: object) -> None:
    """Check that a relative error is a number in [0, 1).

    Raises:
        OptionError: Otherwise.
    """
    if isinstance(error, bool) or not isinstance(error, int | float) or not 0 <= error < 1:
        raise OptionError(f"error={error!r}: give a number in [0, 1), the share of a weight's norm that may be lost.")


def _sweep(tensor: Tensor, choose: Callable[[int, Tensor, float], int], energy: float | None = None) -> Train:
    """Cut site after site off; ``choose`` returns the bond of a cut from its singular values and the squares discarded so far."""
    sizes = tensor.shape
    rest, cores = tensor.detach().reshape(1, -1), []
    discarded: list[float] = []
    for k, size in enumerate(sizes[:-1]):
        left = rest.shape[0]
        matrix = rest.reshape(1, left * size, -1)
        known = spectrum(matrix, energy)
        found = truncate(matrix, choose(k, known.values, sum(discarded)), known)
        discarded.append(float(found.discarded))
        cores.append(found.left[0].reshape(left, size, -1))
        rest = found.values[0, :, None] * found.right[0]
    cores.append(rest.double().reshape(-1, sizes[-1], 1))
    return Train(cores, discarded)


@functools.cache
def _most_equal(size: int, count: int) -> tuple[int, ...]:
    """Return the exact factors whose largest is least, and of the rest likewise; ascending."""
    if count == 1:
        return (size,)
    best: tuple[int, ...] | None = None
    for first in (d for d in range(1, math.isqrt(size) + 1) if size % d == 0):
        if first**count > size:
            break
        found = (first, *_most_equal(size // first, count - 1))
        if found == tuple(sorted(found)) and (best is None or found[::-1] < best[::-1]):
            best = found
    return best or (*(1,) * (count - 1), size)
