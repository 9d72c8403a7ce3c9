"""Diagonals of the curvature of a loss with respect to weights.

For a loss ``L`` whose model gives the outputs ``z`` of sample n by the Jacobian ``J_n``, the diagonal of the generalized Gauss-Newton matrix is

    G_k = sum_n (J_n^T H_n J_n)_kk = sum_n sum_r (J_n^T u_nr)_k^2     with     H_n = d^2 L / dz_n^2 = sum_r u_nr u_nr^T.

:func:`exact_cotangents` gives the ``u`` of any loss from its own graph: softmax cross-entropy (where G is the Fisher information at labels
drawn from the model), sigmoids, squared error, weighted or smoothed. :func:`sampled_cotangents` draws labels instead, for many
classes. :class:`GaussNewton` squares the gradients of every sample: exactly for weights of linear, convolution and attention layers, however often
they are called. :func:`hutchinson_diagonal` needs nothing but the loss.

Cost of ``GaussNewton`` with R cotangents: R backward passes to the outputs of the layers, and two to tell samples apart per shape of the data. The
weights are then done for all cotangents at once. Of ``p`` positions in a layer (tokens, places of an image), ``(sum_i a_i b_i)^2`` is either formed
for every sample and cotangent (p products per weight) or, where p < 2 R, as a sum over pairs of positions, whose ``p (p + 1) / 2`` products are
shared by all cotangents. A single position is the familiar ``(delta^2)^T (x^2)``.

Samples must be independent of each other, so batch normalization has to be in evaluation mode.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.curvature.hvp import second_derivative
from lightning_prune.curvature.labels import along, check_apart, check_finite, likelihood_of, output_gradient
from lightning_prune.curvature.products import Product

log = logging.getLogger(__name__)
_ONCE = "Take curvature='ggn' or 'fisher' with logits_module=, or order='lm'."
_AT_ONCE = 2**22  # entries of what is squared or multiplied at a time
_STORED = 2**26  # entries of the gradients of outputs that are kept at a time


def exact_cotangents(loss: Tensor, outputs: Tensor) -> Tensor:
    """Return the vectors ``u`` that make up the curvature of a loss with respect to the outputs of every sample.

    Args:
        loss: A scalar with a graph from ``outputs``, differentiable twice, in which no two samples meet.
        outputs: ``[samples, ...]``, with a graph. The cost grows with the square of the number of outputs of a sample.

    Returns:
        ``[directions, *outputs.shape]``, float64; directions without curvature in any sample are left out, so softmax has one less than
        classes. Curvature of negative sign, which a loss that is not convex has, counts as none.

    Raises:
        ModelError: If the loss does not depend on the outputs, samples meet in it, or it is not finite.
    """
    gradient = output_gradient(loss, outputs)
    samples, width = len(outputs), outputs[0].numel()
    columns = []
    for index in range(width):
        direction = torch.zeros(samples, width, dtype=outputs.dtype, device=outputs.device)
        direction[:, index] = 1
        columns.append(along(gradient, outputs, direction.view_as(outputs)).reshape(samples, width))
    check_apart(gradient, outputs, "Take curvature='hutchinson'.")
    hessian = check_finite(torch.stack(columns, 2).double())
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    values = values.clamp_min(0)
    found: Tensor = (vectors * values.sqrt().unsqueeze(1)).permute(2, 0, 1)
    seen = values.amax(0) > values.max() * torch.finfo(outputs.dtype).eps
    return found[seen].reshape(-1, *outputs.shape)


def sampled_cotangents(loss: Tensor, outputs: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Draw labels from the model: an unbiased estimate of :func:`exact_cotangents` for a loss whose labels can be drawn.

    That is the Monte-Carlo Fisher information, for softmax ``u = sqrt(w / draws) (softmax(z) - onehot(label))``; see
    :mod:`lightning_prune.curvature.labels`. The weight ``w`` of a term, such as ``1 / samples``, class weights and terms that are ignored, is read
    off the loss.

    Args:
        loss: Softmax or sigmoid cross-entropy or squared error of ``outputs``, any labels or weights.
        outputs: Logits or predictions, ``[samples, ...]``; classes lie along axis 1 or the last.
        draws: Labels per term.
        generator: Source of randomness, on the device of ``outputs``.

    Returns:
        ``[draws, *outputs.shape]``, float64.

    Raises:
        ModelError: If the loss is none of these, or not finite.
    """
    remedy = "Check which module gives the logits, or take curvature='ggn' (any loss, a pass per output) or curvature='hutchinson' (the loss alone)."
    found = likelihood_of(loss, outputs, remedy=remedy)
    return found.draw(outputs, draws, generator) * (found.weight / draws).sqrt()


@dataclasses.dataclass(frozen=True)
class _Weight:
    """The products of one range of rows of a weight, each with its layout."""

    name: str
    rows: tuple[int, int]
    products: tuple[tuple[int, int], ...]  # place in the list of products, layout

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return these rows of one of several tensors in the shapes of the weights."""
        return tensors[self.name][slice(*self.rows)]

    def sides(self, products: Sequence[Product], gradients: Sequence[Tensor], samples: int) -> tuple[Tensor, Tensor]:
        """Return the sides of all products, joined along their positions: the gradient is the sum over all."""
        places, layouts = zip(*self.products, strict=True)
        return joined_sides([products[p] for p in places], [gradients[p] for p in places], layouts, samples)


class GaussNewton:
    """Squares the gradients of every sample.

    Args:
        weights: Parameters by name.
        generator: Source of the random signs by which weights are estimated whose products cannot be seen, such as those of recurrent layers: the
            gradients of a batch with random signs per sample, squared, are right in expectation. A message names them.
    """

    def __init__(self, weights: Mapping[str, Tensor], generator: torch.Generator) -> None:
        self.weights = dict(weights)
        self.estimated: set[str] = set()
        self._generator = generator
        self._known: dict[object, tuple[list[_Weight], list[str]]] = {}

    def diagonal(self, products: Sequence[Product], outputs: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
        """Return ``sum_n sum_r (J_n^T u_nr)^2`` by name, in the shapes of the weights, float64.

        Args:
            products: What :func:`~lightning_prune.curvature.products.recorded` saw while the outputs were computed.
            outputs: ``[samples, ...]``, with the graph of that run, which is kept.
            cotangents: The vectors ``u``, ``[R, *outputs.shape]``.
        """
        found = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in self.weights.items()}
        if not len(cotangents):
            return found
        seen, unseen = self._layout(products, outputs)
        for gradients, others in self._backward(products, outputs, cotangents, unseen):
            for name, squares in zip(unseen, others, strict=True):
                found[name] += squares
            for weight in seen:
                part = weight.of(found)
                part += summed_squares(*weight.sides(products, gradients, len(outputs))).reshape(part.shape)
        return found

    def _backward(
        self, products: Sequence[Product], outputs: Tensor, cotangents: Tensor, unseen: Sequence[str]
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Yield, for some cotangents at a time, the gradients of all outputs of layers and the summed squares of ``unseen`` weights."""
        edges, others = [product.edge for product in products], [self.weights[name] for name in unseen]
        size = sum(product.shape.numel() for product in products)
        if not edges and not others:
            return
        for group in torch.split(cotangents, max(1, _STORED // max(1, size))):
            gradients: list[list[Tensor]] = [[] for _ in products]
            squares = [torch.zeros_like(weight, dtype=torch.float64) for weight in others]
            for cotangent in group:
                signs = torch.randint(0, 2, (len(outputs),), generator=self._generator, device=outputs.device) * 2 - 1
                signed = (cotangent * _along(signs, outputs)).to(outputs.dtype)
                found = _grad(outputs, [*edges, *others], signed)
                for place, product in enumerate(products):
                    gradients[place].append(_or_zero(found[place], product))
                for place, gradient in enumerate(found[len(edges) :]):
                    squares[place] += 0 if gradient is None else gradient.double().square()
            yield [torch.stack(parts) for parts in gradients], squares

    def _layout(self, products: Sequence[Product], outputs: Tensor) -> tuple[list[_Weight], list[str]]:
        """Return where the samples lie in every product, and the weights of which not all products were seen.

        Cotangents are multiplied by a factor per sample. The gradients of the outputs of a layer must then be multiplied by the factors of the
        samples that are thought to stand there, and the products must add up to the gradients of the weights.
        """
        signature = (len(outputs), tuple((p.name, p.rows, p.shape) for p in products))
        if signature not in self._known:
            self._known[signature] = self._find_layout(products, outputs)
            for name in self._known[signature][1]:
                if name not in self.estimated:
                    log.info("The gradients of single samples of %s cannot be seen; its curvature is estimated.", name)
                    self.estimated.add(name)
        return self._known[signature]

    def _find_layout(self, products: Sequence[Product], outputs: Tensor) -> tuple[list[_Weight], list[str]]:
        layouts, gradients, totals = _probed(products, outputs, list(self.weights.values()))
        seen, unseen = [], []
        for name, total in zip(self.weights, totals, strict=True):
            if total is None:
                continue  # no output depends on it: nothing to add
            own: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for place, product in enumerate(products):
                if product.name == name:
                    own.setdefault(product.rows, []).append((place, layouts[place]))
            parts = [_Weight(name, rows, tuple(places)) for rows, places in sorted(own.items())]
            if self._complete(parts, products, gradients, total, len(outputs)):
                seen += parts
            else:
                unseen.append(name)
        return seen, unseen

    @staticmethod
    def _complete(
        parts: Sequence[_Weight], products: Sequence[Product], gradients: Sequence[Tensor], total: Tensor, samples: int
    ) -> bool:
        """Tell whether the samples of every product are known and the products add up to the gradient of the weight."""
        overlap = any(one.rows[1] > two.rows[0] for one, two in itertools.pairwise(parts))
        if overlap or not all(layout for part in parts for _, layout in part.products):
            return False
        summed = torch.zeros_like(total, dtype=torch.float64)
        for part in parts:
            rows, columns = part.sides(products, [g.unsqueeze(0) for g in gradients], samples)
            rest = summed[slice(*part.rows)]
            rest += torch.einsum("rngal,rngbl->gab", rows.double(), columns.double()).view_as(rest)
        near = float(total.abs().max()) * torch.finfo(total.dtype).eps ** 0.5  # sums in another order
        return torch.allclose(summed, total.double(), rtol=0, atol=near)


def layouts_of(products: Sequence[Product], outputs: Tensor) -> list[int]:
    """Return where the samples lie in every product, as :meth:`~lightning_prune.curvature.products.Product.layouts` counts it; 0 where nowhere.

    Args:
        products: What was seen while the outputs were computed.
        outputs: ``[samples, ...]``, with the graph of that run, which is kept.
    """
    possible = [product.layouts(len(outputs)) for product in products]
    if all(len(places) < 2 for places in possible):
        return [places[0] if places else 0 for places in possible]
    return _probed(products, outputs, [])[0]


def _probed(
    products: Sequence[Product], outputs: Tensor, weights: Sequence[Tensor]
) -> tuple[list[int], list[Tensor], tuple[Tensor | None, ...]]:
    """Return the layouts of products, found by gradients, and such gradients: of the outputs of the products, and of weights."""
    samples, fixed = len(outputs), torch.Generator().manual_seed(0)
    edges = [product.edge for product in products]
    cotangent = torch.randn(outputs.shape, generator=fixed).to(outputs)
    factors = torch.pow(2.0, torch.randint(-4, 4, (samples,), generator=fixed)).to(outputs)  # round nothing
    found = _grad(outputs, [*edges, *weights], cotangent)
    scaled = _grad(outputs, edges, cotangent * _along(factors, outputs)) if edges else ()
    gradients = [_or_zero(g, product) for g, product in zip(found, products, strict=False)]
    layouts = [
        next((b for b in product.layouts(samples) if _fits(g, _or_zero(s, product), b, factors)), 0)
        for product, g, s in zip(products, gradients, scaled, strict=True)
    ]
    return layouts, gradients, found[len(edges) :]


def joined_sides(
    products: Sequence[Product], gradients: Sequence[Tensor], layouts: Sequence[int], samples: int
) -> tuple[Tensor, Tensor]:
    """Return the sides of several products with one weight, joined along their positions; see :meth:`Product.sides`."""
    pairs = [p.sides(g, b, samples) for p, g, b in zip(products, gradients, layouts, strict=True)]
    rows, columns = zip(*pairs, strict=True)
    return _joined(rows), _joined(columns)


def _grad(outputs: Tensor, inputs: Sequence[object], cotangent: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(outputs, inputs, cotangent, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]


def _along(values: Tensor, outputs: Tensor) -> Tensor:
    """Shape one value per sample so that it broadcasts over the outputs."""
    return values.view(-1, *[1] * (outputs.ndim - 1))


def _or_zero(gradient: Tensor | None, product: Product) -> Tensor:
    return product.x.new_zeros(product.shape) if gradient is None else gradient.reshape(product.shape)


def _fits(gradient: Tensor, scaled: Tensor, before: int, factors: Tensor) -> bool:
    """Tell whether ``scaled`` is ``gradient`` times the factor of every sample if the axis of samples lies behind ``before`` entries."""
    wanted = gradient.reshape(before, len(factors), -1) * factors.view(-1, 1)
    far = (scaled.reshape(wanted.shape) - wanted).abs() > wanted.abs() / 4 + 1e-5 * scaled.abs().max()
    return not bool(far.any())


def _joined(sides: Sequence[Tensor]) -> Tensor:
    cotangents = max(len(side) for side in sides)
    return torch.cat([s.expand(cotangents, *s.shape[1:]) for s in sides], -1) if len(sides) > 1 else sides[0]


def summed_squares(rows: Tensor, columns: Tensor) -> Tensor:
    """Return ``sum_rn (sum_l rows[r, n, g, a, l] columns[r, n, g, b, l])^2``, ``[groups, a, b]``.

    Args:
        rows: ``[cotangents, samples, groups, a, positions]``; 1 stands for the same with every cotangent.
        columns: ``[cotangents, samples, groups, b, positions]``, likewise.
    """
    if len(rows) < len(columns):
        return summed_squares(columns, rows).mT
    (cotangents, _, groups, width, positions), height = rows.shape, columns.shape[3]
    found = torch.zeros(groups, width, height, dtype=torch.float64, device=rows.device)
    if len(columns) == 1 and positions < 2 * cotangents:
        first, second = torch.triu_indices(positions, positions, device=rows.device)
        twice = 2.0 - (first == second).to(rows.dtype).unsqueeze(1)
        for a, b in _pieces(rows.mT, columns.mT, len(first) * groups * (width * cotangents + height)):
            pairs_a = (a.index_select(3, first) * a.index_select(3, second)).sum(0) * twice
            pairs_b = (b.index_select(3, first) * b.index_select(3, second)).squeeze(0)
            found += torch.einsum("ngta,ngtb->gab", pairs_a, pairs_b)
        return found.clamp_min_(0)  # what cancels leaves a rounding error
    if cotangents == 1 and rows.device.type == "cpu":  # sample by sample: what is squared stays in the cache
        squares = rows.new_zeros(groups, width, height)
        product = torch.empty_like(squares)
        for a, b in zip(rows.squeeze(0), columns.squeeze(0), strict=True):
            squares.addcmul_(torch.bmm(a, b.mT, out=product), product)
        return squares.double()
    for a, b in _pieces(rows, columns, cotangents * groups * width * height):
        if len(columns) == 1:  # all cotangents in one product, put together as they lie in memory
            lies = a.stride(3) == 1
            stacked = a.permute(1, 2, 4, 0, 3).flatten(3).mT if lies else a.permute(1, 2, 0, 3, 4).flatten(2, 3)
            products = torch.matmul(stacked, b.squeeze(0).mT)
            found += products.square_().view(-1, groups, cotangents, width, height).sum((0, 2))
        else:
            found += torch.matmul(a, b.mT).square_().sum((0, 1))
    return found


def _pieces(rows: Tensor, columns: Tensor, per_sample: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield so many samples of both sides that what is computed of them, ``per_sample`` entries of each, fits into memory."""
    step = max(1, _AT_ONCE // per_sample)
    yield from zip(torch.split(rows, step, 1), torch.split(columns, step, 1), strict=True)


def hutchinson_diagonal(
    loss: Tensor, weights: Mapping[str, Tensor], draws: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Estimate the diagonal of the Hessian of a loss by ``mean(v * H v)`` over random signs ``v``, which is right in expectation.

    Args:
        loss: A scalar with a graph, which is kept.
        weights: Parameters by name; the Hessian is taken with respect to these.
        draws: How many ``v``; two backward passes each. The variance of an entry is the sum of the squares of its row off the diagonal,
            divided by ``draws``.
        generator: Source of randomness, on the device of the weights.

    Returns:
        By name, in the shapes of the weights, float64.

    Raises:
        ModelError: If an operation has no second derivative.
    """
    tensors = list(weights.values())
    gradients = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    used = [g for g in gradients if g is not None and g.requires_grad]
    found = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    with second_derivative([g for g in gradients if g is not None], _ONCE):
        for _ in range(draws if used else 0):
            signs = [
                torch.randint(0, 2, w.shape, generator=generator, device=w.device).to(w.dtype) * 2 - 1 for w in tensors
            ]
            towards = [v for v, g in zip(signs, gradients, strict=True) if g is not None and g.requires_grad]
            curved = torch.autograd.grad(used, tensors, towards, retain_graph=True, allow_unused=True)
            for name, v, product in zip(found, signs, curved, strict=True):
                if product is not None:
                    found[name] += (v * product).double() / draws
    return found
