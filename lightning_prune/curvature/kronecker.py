"""Kronecker factors of the Fisher information of linear and convolution layers, and its exact diagonal in their eigenbasis.

The gradient of a weight for sample n is a sum over positions t (tokens, places of an image), ``dW_n[o, r, i] = sum_t g[n, t, o] a[n, t, r, i]``, with
the gradients ``g`` of the loss of the sample at the outputs and what the taps r of the kernel read, ``a``. Padding that is read counts.

- :class:`Factors` (Martens and Grosse, ICML 2015, arXiv:1503.05671; for convolutions with taps as further positions, as Wang, Grosse, Fidler and
  Zhang do in EigenDamage, ICML 2019, arXiv:1905.05934): ``F = S (x) I_K (x) A`` with

      A = 1 / (N T K) sum_ntr a[n, t, r] a[n, t, r]^T     and     S = 1 / N sum_nt g[n, t] g[n, t]^T.

- :class:`SecondMoments` (George et al., NeurIPS 2018, arXiv:1806.03884): of all diagonals in a given basis the one nearest to F,
  ``D[p, r, q] = 1 / N sum_n (sum_t g~[n, t, p] a~[n, t, r, q])^2`` with ``a~ = Q_A^T a`` and ``g~ = Q_S^T g``. It takes a second pass over the data.

Either is used so, as often as there are batches::

    with factors.watching():
        outputs = model(x)
    factors.backward(outputs, gradients)  # of the loss of every sample at the outputs

``gradients`` are those of :mod:`lightning_prune.curvature.labels`; parameters get none. Samples must be independent of each other, so batch
normalization has to be in evaluation mode. The factor of the inputs needs no unfolded input: each place of the input counts as often as taps
read it. Sums are float64; products over a chunk are in the type of the model, float32 at least.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_prune.curvature.diagonal import joined_sides, layouts_of, summed_squares
from lightning_prune.curvature.eigenbasis import Eigenbasis
from lightning_prune.curvature.products import Geometry, Product, convolution, patches
from lightning_prune.errors import ModelError

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_Use = tuple[Product, Tensor, int]  # a call, the gradient of its output, where the samples lie
CHUNK = 2**22  # entries of inputs or gradients that are multiplied at a time


@dataclasses.dataclass(frozen=True)
class Kronecker:
    """The factors of one layer, float64; ``groups`` is 1 but for grouped convolutions, whose groups have factors of their own.

    Attributes:
        inputs: ``A``, ``[groups, in, in]`` with the inputs of a group; symmetric, not negative.
        outputs: ``S``, ``[groups, out, out]``, likewise.
    """

    inputs: Tensor
    outputs: Tensor


class _Pass:
    """Sees the calls of layers while a model runs, and the gradients of their outputs."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = dict(layers)
        self.samples = 0
        self._seen: list[Product] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at all calls inside that a gradient can reach; also of frozen layers, but not where gradients are switched off."""
        self._seen = []
        handles = [
            layer.register_forward_hook(functools.partial(self._hook, name), prepend=True, with_kwargs=True)
            for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(
        self, name: str, layer: Layer, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if torch.is_grad_enabled():
            if not output.requires_grad:  # nothing before it is trained
                output = output.detach().requires_grad_().clone()  # no leaf, since those cannot be changed in place
            x = args[0] if args else kwargs["input"]
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                self._seen.append(self._look(_product(name, layer, _wide(x), output)))
        return output

    def _gradients(self, outputs: Tensor, gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients at the outputs of all calls seen; those of the parameters are not computed."""
        self.samples += len(outputs)
        edges = [product.edge for product in self._seen]
        if not edges:
            return ()
        return torch.autograd.grad(outputs, edges, gradients.to(outputs), allow_unused=True)

    def _look(self, product: Product) -> Product:
        """Take from a call what its inputs tell, and return what is needed once its gradient is known."""
        raise NotImplementedError


class Factors(_Pass):
    """Sums up the Kronecker factors of layers.

    Args:
        layers: Layers by name. All positions of a linear layer count alike, and so do all calls of a layer that is called several times.
        patches: Take all that the kernel covers as one input: ``A`` is then ``[groups, in * K, in * K]``, in the order of ``weight.flatten(1)``,
            and not the mean of its K diagonal blocks of single taps.
        homogeneous: Give layers with a bias an input more, the last one, that is always 1; convolutions only with ``patches``.
    """

    def __init__(self, layers: Mapping[str, Layer], *, patches: bool = False, homogeneous: bool = False) -> None:
        super().__init__(layers)
        self._patches, self._homogeneous = patches, homogeneous
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            outputs, inputs = layer.weight.shape[:2]
            groups = getattr(layer, "groups", 1)
            width = (layer.weight[0].numel() if patches else inputs) + self._constant(layer)
            zeros = functools.partial(torch.zeros, dtype=torch.float64, device=_home(layer.weight.device))
            self._inputs[name] = zeros((groups, width, width))
            self._outputs[name] = zeros((groups, outputs // groups, outputs // groups))
        self._positions = dict.fromkeys(self.layers, 0)

    def backward(self, outputs: Tensor, gradients: Tensor) -> None:
        """Add the samples of a batch; its graph is freed.

        Args:
            outputs: What the model gave inside :meth:`watching`, samples first.
            gradients: Of the loss of every sample, in the shape of the outputs.
        """
        for product, gradient in zip(self._seen, self._gradients(outputs, gradients), strict=True):
            if gradient is not None:
                total = self._outputs[product.name]
                flat = _wide(gradient).reshape(product.shape)
                pieces = _rows(flat) if product.geometry is None else torch.split(flat.flatten(2), _step(flat))
                for piece in pieces:
                    _add_gram(total, _columns(piece, len(total)))
        self._seen = []

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Take the sums of all processes together.

        Args:
            total: Returns the sum over all processes of a flat vector, float64; called once.
        """
        counts = [self.samples, *self._positions.values()]
        sums = [*self._inputs.values(), *self._outputs.values()]
        found = _reduced(sums, counts, total)
        self.samples, self._positions = found[0], dict(zip(self._positions, found[1:], strict=True))

    def factors(self) -> dict[str, Kronecker]:
        """Return the factors of every layer that was called.

        Raises:
            ModelError: If those of a layer are not finite.
        """
        found = {}
        for name, positions in self._positions.items():
            if positions and self.samples:
                sums = self._inputs[name] / positions, self._outputs[name] / self.samples
                _check_finite(name, *sums)
                found[name] = Kronecker(*((total + total.mT) / 2 for total in sums))
        return found

    def _look(self, product: Product) -> Product:
        layer, total, x = self.layers[product.name], self._inputs[product.name], product.x
        taps = 1 if self._patches else math.prod(product.kernel)
        self._positions[product.name] += product.shape.numel() // layer.weight.shape[0] * taps
        for piece in self._read(product):
            _add_gram(total, F.pad(piece, (0, 0, 0, 1), value=1.0) if self._constant(layer) else piece)
        return dataclasses.replace(product, x=x.new_empty(0))

    def _read(self, product: Product) -> Iterator[Tensor]:
        """Yield what a call reads, chunk by chunk: ``[groups, inputs of a group, positions]``."""
        x, places, moves = product.x, product.shape[2:], product.geometry
        if moves is None:
            yield from (_columns(piece, 1) for piece in _rows(x))
        elif self._patches:
            for piece in torch.split(x, _step(x, math.prod(product.kernel))):
                covered = patches(piece.unsqueeze(0), product.kernel, moves, places).squeeze(0)
                yield covered.permute(1, 2, 0, 3).flatten(2)
        else:
            counts = _reads(x.shape[2:], places, product.kernel, moves)
            weights = None if counts.eq(1).all() else counts.sqrt().flatten().to(x)
            for piece in torch.split(x.flatten(2), _step(x)):
                yield _columns(piece if weights is None else piece * weights, moves.groups)

    def _constant(self, layer: Layer) -> bool:
        return self._homogeneous and layer.bias is not None and (self._patches or isinstance(layer, nn.Linear))


class SecondMoments(_Pass):
    """Sums up the squares of the gradients of every sample in given bases.

    Args:
        layers: Layers by name.
        bases: Bases by name; None for the weights as they are, whose second moments are the diagonal of the Fisher information.
    """

    def __init__(self, layers: Mapping[str, Layer], bases: Mapping[str, Eigenbasis | None]) -> None:
        super().__init__(layers)
        self._bases = {name: bases[name] for name in self.layers}
        self._sums: dict[str, Tensor] = {}
        self._layouts: dict[object, list[int]] = {}
        for name, layer in self.layers.items():
            basis, (rows, columns) = self._bases[name], layer.weight.shape[:2]
            if basis is not None:
                rows, columns = basis.output_values.numel(), basis.inputs.shape[2]
            shape = rows, columns, layer.weight[0, 0].numel()
            self._sums[name] = torch.zeros(shape, dtype=torch.float64, device=_home(layer.weight.device))

    def backward(self, outputs: Tensor, gradients: Tensor) -> None:
        """Add the samples of a batch; its graph is freed.

        Args:
            outputs: What the model gave inside :meth:`watching`, samples first.
            gradients: Of the loss of every sample, in the shape of the outputs.

        Raises:
            ModelError: If it cannot be told which inputs of a layer belong to which sample.
        """
        signature = len(outputs), tuple((product.name, product.shape) for product in self._seen)
        if signature not in self._layouts:
            self._layouts[signature] = layouts_of(self._seen, outputs)
        calls: dict[str, list[_Use]] = {}
        found = zip(self._seen, self._gradients(outputs, gradients), self._layouts[signature], strict=True)
        for product, gradient, layout in found:
            if gradient is not None:
                if not layout:
                    raise ModelError(
                        f"Layer {product.name!r} is called with a tensor in which the {len(outputs)} samples of the batch do not lie along one "
                        "axis, so its gradients cannot be told apart by sample. Exclude it, or take the factors alone."
                    )
                calls.setdefault(product.name, []).append((product, gradient, layout))
        self._seen = []
        for name, uses in calls.items():
            for products, rotated, places, samples in self._chunks(uses, len(outputs)):
                squares = summed_squares(*joined_sides(products, rotated, places, samples))
                self._sums[name] += squares.view(self._sums[name].shape).to(self._sums[name])

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Take the sums of all processes together; see :meth:`Factors.reduce`."""
        (self.samples,) = _reduced(list(self._sums.values()), [self.samples], total)

    def moments(self) -> dict[str, Tensor]:
        """Return ``D`` of every layer, ``[out, K, in]`` with the inputs of a group, float64; zeros before the first batch.

        Raises:
            ModelError: If those of a layer are not finite.
        """
        found = {name: sums.mT.contiguous() / max(1, self.samples) for name, sums in self._sums.items()}
        for name, moments in found.items():
            _check_finite(name, moments)
        return found

    def _look(self, product: Product) -> Product:
        basis, x = self._bases[product.name], product.x
        if basis is None:
            return dataclasses.replace(product, x=x.clone())  # what is changed in place later has been seen as it was
        if basis.inputs.shape[1] > x.shape[-1] and not product.kernel:  # of a homogeneous factor
            x = F.pad(x, (0, 1), value=1.0)
        return dataclasses.replace(product, x=_rotated(x, basis.inputs, product.kernel))

    def _chunks(
        self, uses: Sequence[_Use], samples: int
    ) -> Iterator[tuple[list[Product], list[Tensor], list[int], int]]:
        """Yield the calls of a layer for some samples at a time, with rotated gradients, where samples come first; else for all."""
        unfolded = sum(product.x.numel() * math.prod(product.kernel) for product, _, _ in uses)
        first = all(place == 1 and len(product.x) % samples == 0 for product, _, place in uses)
        step = max(1, CHUNK * samples // max(1, unfolded)) if first else samples
        for start in range(0, samples, step):
            products, gradients = [], []
            for product, gradient, _ in uses:
                lead = len(product.x) // samples
                part = slice(start * lead, (start + step) * lead) if step < samples else slice(None)
                x, own = product.x[part], _wide(gradient).reshape(product.shape)[part]
                products.append(dataclasses.replace(product, x=x, shape=own.shape))
                basis = self._bases[product.name]
                rotated = own if basis is None else _rotated(own, basis.outputs, product.kernel)
                gradients.append(rotated.unsqueeze(0))
            yield products, gradients, [place for *_, place in uses], min(step, samples - start)


def _product(name: str, layer: Layer, x: Tensor, output: Tensor) -> Product:
    """Describe the call of a layer; padding other than zeros is made part of the input."""
    kernel, rows, edge = tuple(layer.weight.shape[2:]), (0, len(layer.weight)), get_gradient_edge(output)
    if isinstance(layer, nn.Linear):
        return Product(name, rows, x, output.shape, edge, kernel, None)
    single = x.ndim == 1 + len(kernel)  # without an axis of samples
    x, shape = (x.unsqueeze(0), torch.Size((1, *output.shape))) if single else (x, output.shape)
    moves = convolution(kernel, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    if layer.padding_mode != "zeros":
        x = F.pad(x, moves.pads, layer.padding_mode)
        moves = dataclasses.replace(moves, padding=((0, 0),) * len(kernel))
    return Product(name, rows, x, shape, edge, kernel, moves)


@functools.lru_cache(1024)
def _reads(space: Sequence[int], places: Sequence[int], kernel: Sequence[int], moves: Geometry) -> Tensor:
    """Return how many pairs of a tap and a position of the output read each place of the input, ``[*space]``, float64."""
    counts = torch.ones((), dtype=torch.float64)
    for axis, size in enumerate(space):
        taps = torch.arange(kernel[axis]) * moves.dilation[axis] - moves.padding[axis][0]
        read = torch.arange(places[axis]).unsqueeze(1) * moves.stride[axis] + taps
        counts = counts.unsqueeze(-1) * torch.bincount(read[(read >= 0) & (read < size)], minlength=size)
    return counts


def _rotated(tensor: Tensor, directions: Tensor, kernel: Sequence[int]) -> Tensor:
    """Express the features of ``[..., features]``, or with a kernel the channels of ``[batch, channels, *space]``, in some directions."""
    columns = directions.to(tensor)
    if not kernel:
        return tensor @ columns[0]
    found = F.conv1d(tensor.flatten(2), columns.mT.flatten(0, 1).unsqueeze(2), groups=len(columns))
    return found.view(*found.shape[:2], *tensor.shape[2:])


def _rows(x: Tensor) -> tuple[Tensor, ...]:
    """Split ``[..., features]`` into chunks ``[positions, features]``."""
    flat = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    return torch.split(flat, _step(flat))


def _columns(piece: Tensor, groups: int) -> Tensor:
    """Bring ``[positions, features]`` or ``[batch, channels, positions]`` to ``[groups, features of a group, all positions]``."""
    if piece.ndim == 2:
        return piece.mT.unsqueeze(0)
    return piece.view(len(piece), groups, -1, piece.shape[2]).permute(1, 2, 0, 3).flatten(2)


def _step(x: Tensor, copies: int = 1) -> int:
    return max(1, CHUNK // max(1, math.prod(x.shape[1:]) * copies))


def _add_gram(total: Tensor, columns: Tensor) -> None:
    total += (columns @ columns.mT).to(total)


def _reduced(sums: Sequence[Tensor], counts: Sequence[int], total: Callable[[Tensor], Tensor]) -> list[int]:
    """Replace the sums by their totals, in one call; return those of the counts."""
    numbers = torch.tensor(counts, dtype=torch.float64).to(sums[0] if sums else "cpu")
    flat = total(torch.cat([numbers, *(s.flatten() for s in sums)]))
    for own, part in zip(sums, torch.split(flat[len(counts) :], [s.numel() for s in sums]), strict=True):
        own.copy_(part.view_as(own))
    return [round(count) for count in flat[: len(counts)].tolist()]


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.float() if tensor.element_size() < 4 else tensor


def _home(device: torch.device) -> torch.device:
    """Return where sums in double precision are kept."""
    return torch.device("cpu") if device.type == "mps" else device


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise ModelError(
            f"The curvature of layer {name!r} is not finite: its inputs or the gradients of its outputs overflow. Look for a diverged training, "
            "or leave the layer out with exclude=."
        )
