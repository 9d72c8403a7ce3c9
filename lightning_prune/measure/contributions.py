"""Contributions: what share of each output of a layer comes from each of its input channels, or from each single weight.

The largest share over data is the empirical sensitivity of Baykal, Liebenwein, Gilitschenski, Feldman and Rus, "Data-Dependent Coresets for
Compressing Neural Networks with Applications to Generalization Bounds", ICLR 2019 (arXiv:1804.05345). A weight is split into ``W+ - W-``, and an
input ``a`` with negative entries into two samples, ``relu(a)`` and ``relu(-a)``; shares are those of the addends of ``W+ * a`` and of ``W- * a``,
and biases have none. Layers are linear ones, of whose inputs all axes but the first and the last are positions, and convolutions.

Results do not depend on how samples are batched: every matrix product is over the same number of positions, missing ones being zeros. It holds the
unfolded inputs of these positions, the weights once for either sign, and ``CHUNK`` contributions at a time.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.errors import LightningPruneError, ModelError
from lightning_prune.probe import FOREIGN, Probe
from lightning_prune.structure.calls import Call
from lightning_prune.structure.layers import DenseLayer

Contribution = Literal["channel_sum", "max_tap"]
Measure = Callable[[str, DenseLayer, Tensor], Tensor]
Look = Callable[[Any, Tensor, Tensor], None]

CHUNK = 2**18  # contributions at a time: a megabyte of float32, which stays in the second cache
POSITIONS = 64  # at a time, of several samples where one has fewer
NEGLIGIBLE = 1.19e-7  # up to here the authors take an output for zero


def unit_shares(
    layer: DenseLayer, inputs: Tensor, units: Tensor, count: int, contribution: Contribution = "channel_sum"
) -> Tensor:
    """Return the largest share that each unit has in any output, ``[count]``, in [0, 1]: over samples, outputs, positions and both signs.

    Args:
        layer: The layer.
        inputs: What it is called with, samples first.
        units: Unit of each input channel, ``[in_channels]``, or of each entry of the first two axes of a weight, ``[out_channels, in_channels /
            groups]``, alike in all rows of a group of the convolution; integer. Channels of one unit count together; -1 is part of the
            outputs and of no unit.
        count: Number of units; those that are not read here have share 0.
        contribution: ``"channel_sum"``: a unit contributes the sum over its channels and taps. ``"max_tap"``: it contributes the largest product
            of one tap and one channel, and outputs up to ``NEGLIGIBLE`` do not count, as in the authors' code.

    Raises:
        ModelError: If the inputs are not finite, or the outputs overflow.
    """
    weights, groups = _by_sign(layer), getattr(layer, "groups", 1)
    taps, outputs, columns = layer.weight[0, 0].numel(), *weights.shape[1:]
    own = units.to(weights.device).view(groups, -1, columns // taps)[:, 0].flatten()
    kinds = [
        (owner, cells // columns, cells, _taken(weights, cells))
        for owner, cells in _cells(own, groups, taps, contribution == "max_tap")
    ]
    found = weights.new_zeros(count)
    least = NEGLIGIBLE if contribution == "max_tap" else 0.0
    for patches in _patches(layer, inputs, POSITIONS, max(POSITIONS, CHUNK // outputs)):
        scales = _reciprocals(weights, patches, least)
        step = max(1, CHUNK // scales[0].numel())
        for owner, group, cells, own_weights in kinds:
            values = _in_order(patches, cells)
            for start in range(0, len(cells), step):
                part = slice(start, start + step)
                here = values[part] if values is not None else patches[cells[part]]
                parts = torch.bmm(own_weights[part], here)
                parts *= scales if groups == 1 else scales[group[part, 0]]
                found.scatter_reduce_(0, owner[part], parts.flatten(1).amax(1), "amax")
    return found.clamp_(max=1)


def weight_shares(
    layer: DenseLayer, inputs: Tensor, over_positions: Literal["max", "mean"] = "max", least: float = 0.0
) -> Tensor:
    """Return the largest share that each single weight has in the output of its row, of the shape of the weight, in [0, 1].

    Samples come one by one; for the mean, six times the memory of the weight is taken beside their inputs.

    Args:
        layer: The layer.
        inputs: What it is called with, samples first.
        over_positions: What is taken over the positions of a sample, whose maximum over samples is returned.
        least: Outputs up to it do not count.

    Raises:
        ModelError: If the inputs are not finite, or the outputs overflow.
    """
    weights = _by_sign(layer)
    largest = torch.zeros_like(weights)
    for patches in _patches(layer, inputs, 1):
        scales = _reciprocals(weights, patches, least)
        values = patches.view(len(weights), -1, patches.shape[1])
        if over_positions == "mean":
            torch.maximum(largest, torch.bmm(scales / values.shape[2], values.transpose(1, 2)), out=largest)
            continue
        step = max(1, CHUNK // scales.numel())
        for start in range(0, values.shape[1], step):
            products = scales[:, :, None] * values[:, None, start : start + step]
            part = largest[:, :, start : start + step]
            part.copy_(torch.maximum(part, products.amax(3)))
    shares = (weights * largest).view(len(weights), 2, -1, weights.shape[2]).sum(1)
    return shares.reshape(layer.weight.shape).clamp_(max=1)


@dataclasses.dataclass
class Seen:
    """What a layer was called with.

    Attributes:
        samples: Over all calls.
        positions: Per sample, the most there were.
        outputs: Outputs at a position.
        triples: Of sample, output and position.
    """

    samples: int = 0
    positions: int = 0
    outputs: int = 0
    triples: int = 0


class Collector:
    """Looks at layers while a model runs: takes what ``measure`` says of every call of some layers together, by its maximum.

    Args:
        model: The model; not changed.
        start: Zeros in the shape of what is measured, on the device of the layer, by its name.
        measure: ``measure(name, layer, inputs)`` of one call, such as :func:`unit_shares`; not negative.

    Attributes:
        largest: What was measured, by name of the layer.
        seen: What the layer was called with; no samples: never.
    """

    def __init__(self, model: nn.Module, start: Mapping[str, Tensor], measure: Measure) -> None:
        self.largest = dict(start)
        self.seen = {name: Seen() for name in start}
        self._model = model
        self._measure = measure

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Measure every call inside.

        Raises:
            ModelError: If inputs of a layer are not finite; names the layer.
        """
        with watching(self._model, {name: functools.partial(self._look, name) for name in self.largest}):
            yield

    def collect(self, probe: Probe, batches: int, calls: Sequence[Call] = ()) -> None:
        """Measure what the model sees in the first batches, in eval mode and without gradients, and take the maximum over ranks, in one collective.

        Args:
            probe: Of the model; it is left as it was.
            batches: How many.
            calls: Calls that stand for the model, for manual optimization.

        Raises:
            ModelError: If the model cannot be run, there is no batch, or inputs of a layer are not finite.
        """
        looks = {name: functools.partial(self._look, name) for name in self.largest}
        for _ in running(probe, looks, batches, calls, "Measuring contributions"):
            pass
        positions = torch.tensor([float(seen.positions) for seen in self.seen.values()])
        own = [*self.largest.values(), positions.to(next(iter(self.largest.values())))]
        parts = torch.split(
            probe.maximum(torch.cat([values.flatten() for values in own])), [values.numel() for values in own]
        )
        for name, values, most in zip(self.largest, parts, parts[-1].tolist(), strict=False):
            self.largest[name] = values.view(self.largest[name].shape).to(self.largest[name].dtype)
            self.seen[name].positions = int(most)

    def _look(self, name: str, layer: DenseLayer, inputs: Tensor, output: Tensor) -> None:
        found = self._measure(name, layer, inputs)
        self.largest[name] = torch.maximum(self.largest[name].to(found), found)
        seen, outputs = self.seen[name], len(layer.weight)
        axes = 1 if isinstance(layer, nn.Linear) else 1 + len(layer.kernel_size)
        samples = len(inputs) if inputs.ndim > axes else 1
        seen.samples, seen.outputs = seen.samples + samples, outputs
        seen.positions = max(seen.positions, output.numel() // max(1, samples * outputs))
        seen.triples += output.numel()


@contextlib.contextmanager
def watching(model: nn.Module, looks: Mapping[str, Look]) -> Iterator[None]:
    """Call ``looks[name](layer, inputs, output)`` at every call of the layers named, without gradients and autocast.

    Raises:
        ModelError: What a look raised; names the layer.
    """

    def hooked(name: str, look: Look) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            inputs = (args or tuple(kwargs.values()))[0]
            try:
                with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
                    look(layer, inputs, output)
            except ModelError as error:
                raise ModelError(
                    f"Layer {name!r} cannot be measured: {error}. Look for a diverged training or broken data."
                ) from error

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(hooked(name, look), with_kwargs=True)
        for name, look in looks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def running(probe: Probe, looks: Mapping[str, Look], batches: int, calls: Sequence[Call], title: str) -> Generator[Any]:
    """Run a model on data for what its layers see, in eval mode and without gradients, and yield every batch that was run.

    Args:
        probe: Of the model; it is left as it was.
        looks: What is called at every call of a layer (:func:`watching`), by its name.
        batches: How many batches at most.
        calls: Calls that stand for the model, for manual optimization.
        title: Of the progress bar.

    Raises:
        ModelError: If the model cannot be run, there is no batch, or a look raised one.
    """
    index = -1
    with probe.quiet(mode="eval"), torch.no_grad(), watching(probe.model, looks):
        for index, batch in enumerate(probe.batches(batches, title)):
            try:
                probe.run(batch, index, calls)
            except FOREIGN as error:
                if isinstance(error, LightningPruneError | torch.OutOfMemoryError):
                    raise
                raise ModelError(
                    f"{type(probe.model).__name__} cannot be run on its data outside of a fit ({type(error).__name__}: {error}). The training step "
                    "is run in eval mode; before the fit no optimizers or schedulers exist. With manual optimization forward is run, on the "
                    "first entries of a batch."
                ) from error
            yield batch
    if index < 0:
        raise ModelError(
            "There is no batch to measure with: the data is empty. Give a training dataloader with batches."
        )


def _by_sign(layer: DenseLayer) -> Tensor:
    """Return ``W+`` above ``W-``, ``[groups, 2 * outputs of a group, channels and taps of a group]``."""
    weight = layer.weight.detach().to(torch.promote_types(layer.weight.dtype, torch.float32))
    weight = weight.reshape(getattr(layer, "groups", 1), -1, weight[0].numel())
    parts = weight.new_empty(len(weight), 2, *weight.shape[1:])
    torch.clamp(weight, min=0, out=parts[:, 0])
    torch.sub(parts[:, 0], weight, out=parts[:, 1])
    return parts.flatten(1, 2)


def _cells(units: Tensor, groups: int, taps: int, single: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield units and their cells, ``[units]`` and ``[units, cells]``, for all that have equally many; a cell is one tap of one channel.

    Args:
        units: Unit of each input channel.
        groups: Groups of the convolution; a unit with channels in several comes once for each.
        taps: Taps of the kernel.
        single: Whether every cell comes alone.
    """
    channels = torch.arange(len(units), device=units.device)
    key = units if single else units + channels // (len(units) // groups) * (units.max() + 1)
    order = key.argsort(stable=True)
    order = order[units[order] >= 0]
    if not len(order):
        return
    _, sizes = torch.unique_consecutive(key[order], return_counts=True)
    steps = torch.arange(taps, device=units.device)
    if single:
        yield units[order].repeat_interleave(taps), (order[:, None] * taps + steps).view(-1, 1)
        return
    ends = sizes.cumsum(0)
    for size in sizes.unique().tolist():
        last = ends[sizes == size]
        own = order[last[:, None] - size + torch.arange(size, device=units.device)]
        yield units[own[:, 0]], (own[:, :, None] * taps + steps).flatten(1)


def _patches(layer: DenseLayer, inputs: Tensor, positions: int, most: int | None = None) -> Iterator[Tensor]:
    """Yield what each output position sees, not negative, ``[channels and taps, positions]``.

    Args:
        layer: The layer.
        inputs: Samples first.
        positions: Samples are taken together up to so many.
        most: One sample comes in parts of so many at most; None: whole.
    """
    if not inputs.numel():
        return
    x = inputs.detach().to(torch.promote_types(layer.weight.dtype, torch.float32))
    if isinstance(layer, nn.Linear):
        x = x.reshape(len(x) if x.ndim > 1 else 1, -1, x.shape[-1]).transpose(1, 2)
        axes = 1
    else:
        axes = len(layer.kernel_size)
        x = x if x.ndim == axes + 2 else x[None]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    negative = (x < 0).flatten(1).any(1)
    x = torch.cat([x.relu(), (-x[negative]).relu()]) if bool(negative.any()) else x
    if not isinstance(layer, nn.Linear):
        for axis, (size, stride, dilation) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
        ):
            x = x.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    x = x.permute(1, *range(2 + axes, x.ndim), 0, *range(2, 2 + axes))  # channel, taps, sample, positions
    each = x.shape[-axes:].numel()
    together = max(1, positions // each)
    rows = x.shape[-axes] if most is None else max(1, most * x.shape[-axes] // each)
    for samples in torch.split(x, together, -1 - axes):
        for part in torch.split(samples, rows, -axes):
            patches = part.reshape(x.shape[: -1 - axes].numel(), -1)
            missing = max(0, together * each - patches.shape[1]) if rows >= x.shape[-axes] else 0
            patches = F.pad(patches, (0, missing)) if missing else patches
            yield from (piece.contiguous() for piece in torch.split(patches, most or patches.shape[1], 1))


def _reciprocals(weights: Tensor, patches: Tensor, least: float) -> Tensor:
    """Return ``1 / (W * a)`` for the parts of both signs, 0 where they are not above ``least``; ``[groups, 2 * outputs, positions]``."""
    sums = torch.bmm(weights, patches.view(len(weights), -1, patches.shape[1]))
    if not bool(sums.isfinite().all()):
        raise ModelError("its inputs are not finite, or its outputs overflow")
    return torch.where(sums > max(least, torch.finfo(sums.dtype).tiny), sums.reciprocal(), 0)


def _taken(weights: Tensor, cells: Tensor) -> Tensor:
    """Return the weights of cells, ``[units, 2 * outputs of a group, cells]``; a view where all follow each other."""
    groups, outputs, columns = weights.shape
    whole = _in_order(weights.transpose(1, 2).reshape(-1, outputs) if groups > 1 else weights[0].T, cells)
    if whole is None:
        whole = weights[cells // columns, :, cells % columns]
    return whole.transpose(1, 2)


def _in_order(rows: Tensor, cells: Tensor) -> Tensor | None:
    """Return the rows in ``cells``, ``[units, cells, ...]``, as a view, or None where they do not follow each other."""
    flat = cells.flatten()
    first = int(flat[0])
    if torch.equal(flat, torch.arange(first, first + len(flat), device=flat.device)):
        return torch.unflatten(rows[first : first + len(flat)], 0, cells.shape)
    return None
