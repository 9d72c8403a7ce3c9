"""What layers see of the channels that they read, in calibration data: shares, ranges, and the error of reading fewer."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.errors import ModelError
from lightning_prune.measure.contributions import Contribution, Look, running, unit_shares
from lightning_prune.measure.evaluation import batch_size
from lightning_prune.probe import Probe
from lightning_prune.structure.calls import Call
from lightning_prune.structure.layers import DenseLayer
from lightning_prune.structure.readers import Reader


@dataclasses.dataclass
class Sight:
    """What one layer has seen.

    Attributes:
        shares: Largest share of every unit in any of its outputs, ``[units]``.
        low: Least value of each input, ``[inputs]``.
        high: Largest value, likewise.
        positions: Positions of outputs that were seen, those of all samples counted.
        patches: Positions per sample, the most there were.
    """

    shares: Tensor
    low: Tensor
    high: Tensor
    positions: int = 0
    patches: int = 0

    @classmethod
    def none(cls, layer: DenseLayer, count: int) -> "Sight":
        """Return the sight of a layer that has not been called, for ``count`` units."""
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        infinite = torch.full((inputs_of(layer),), math.inf, device=layer.weight.device, dtype=wide)
        return cls(infinite.new_zeros(count), infinite, -infinite)

    def add(self, layer: DenseLayer, inputs: Tensor, outputs: Tensor, shares: Tensor) -> None:
        """Take up one call."""
        if not inputs.numel():
            return
        places = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        samples = len(outputs) if outputs.ndim > places + 1 else 1
        by_input = inputs.detach().to(self.low.dtype).movedim(-1 - places, 0).reshape(len(self.low), -1)
        self.low, self.high = torch.minimum(self.low, by_input.amin(1)), torch.maximum(self.high, by_input.amax(1))
        self.shares = torch.maximum(self.shares, shares.to(self.shares.dtype))
        positions = outputs.numel() // len(layer.weight)
        self.positions += positions
        self.patches = max(self.patches, positions // samples)

    def shared(self, probe: Probe) -> "Sight":
        """Return what all ranks have seen together."""
        most = probe.maximum(torch.cat([self.shares, -self.low, self.high, self.shares.new_tensor([self.patches])]))
        shares, low, high, patches = torch.split(most, [len(self.shares), len(self.low), len(self.high), 1])
        positions = probe.total(torch.tensor([self.positions], device=most.device))
        return Sight(shares, -low, high, int(positions), int(patches))

    def triples(self, outputs: int) -> int:
        """Return the combinations of sample, output and position for ``outputs`` outputs, twice as many where inputs have both signs."""
        return self.positions * outputs * (2 if bool((self.low < 0).any()) else 1)


class Readings:
    """What layers see of units in calibration data, over all ranks.

    Args:
        model: The model.
        probe: Its data.
        calls: Example calls, for models that are optimized manually.
        readers: The layers to watch.
        count: Number of units.
        contribution: How a unit's part of an output is told (:func:`~lightning_prune.measure.contributions.unit_shares`).
        batches: Batches to look at; None: until there are enough samples.
        enough: Returns how many samples are enough, from the outputs per sample of each layer.

    Attributes:
        layers: The layers, by name.
        sights: What each has seen, by name.
        samples: Samples seen.
        needed: Samples that are enough.

    Raises:
        ModelError: If there is no data, the model cannot be run on it, values are not finite, or a layer was never called.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        calls: Sequence[Call],
        readers: Sequence[Reader],
        count: int,
        contribution: Contribution,
        batches: int | None,
        enough: Callable[[Sequence[int]], int],
    ) -> None:
        self.model, self.probe, self.calls, self.readers = model, probe, calls, tuple(readers)
        self.layers: dict[str, Any] = {reader.layer: model.get_submodule(reader.layer) for reader in readers}
        sights = {name: Sight.none(layer, count) for name, layer in self.layers.items()}

        def look(reader: Reader) -> Look:
            units = torch.from_numpy(reader.units)

            def see(layer: DenseLayer, inputs: Tensor, outputs: Tensor) -> None:
                shares = unit_shares(layer, inputs, units.to(inputs.device), count, contribution)
                sights[reader.layer].add(layer, inputs, outputs, shares)

            return see

        one = torch.ones(1, device=next(model.parameters()).device)
        ranks = int(probe.total(one.clone()))
        self._batches, self.samples, self.needed = 0, 0, 0
        looks = {reader.layer: look(reader) for reader in readers}
        with contextlib.closing(running(probe, looks, batches or sys.maxsize, calls, "Looking at inputs")) as run:
            for batch in run:
                self._batches, self.samples = self._batches + 1, self.samples + batch_size(batch)
                self.needed = enough([sights[name].patches * len(layer.weight) for name, layer in self.layers.items()])
                if batches is None and self.samples * ranks >= self.needed:
                    break
        never = [name for name, sight in sights.items() if not sight.positions]
        if never:
            raise ModelError(
                f"{never[0]!r} was called in none of {self._batches} batches, so that what it reads cannot be judged. Give more "
                "calibration_batches, or leave the channels that it reads out by exclude=."
            )
        self.sights = {name: sight.shared(probe) for name, sight in sights.items()}
        self.samples = int(probe.total(one * self.samples))

    @property
    def shares(self) -> NDArray[np.float64]:
        """Largest share of every unit in an output of any of the layers, ``[units]``."""
        found: NDArray[np.float64] = np.max(
            [sight.shares.double().cpu().numpy() for sight in self.sights.values()], axis=0
        )
        return found

    def triples(self, layer: str) -> int:
        """Return the combinations of sample, output and position that a layer was seen in (:meth:`Sight.triples`)."""
        return self.sights[layer].triples(len(self.layers[layer].weight))

    def constants(self) -> dict[int, dict[tuple[str, int], float]]:
        """Return the units that are the same numbers throughout and that the bias of every reader can take up, if there were enough samples.

        A layer takes up what is 0; other numbers if it has a bias, no groups, and no zero padding beside them.

        Returns:
            By unit the numbers other than 0, by layer and index of the input.
        """
        found: dict[int, dict[tuple[str, int], float]] = {}
        varying: set[int] = set()
        for reader in self.readers if self.samples >= self.needed else ():
            layer, sight = self.layers[reader.layer], self.sights[reader.layer]
            takes = layer.bias is not None and getattr(layer, "groups", 1) == 1 and not _pads_with_zeros(layer)
            for index, unit in enumerate(units_by_input(reader, layer)):
                value = float(sight.low[index])
                if value != float(sight.high[index]) or (value and not takes):
                    varying.add(unit)
                else:
                    found.setdefault(unit, {}).update({(reader.layer, index): value} if value else {})
        return {unit: values for unit, values in found.items() if unit >= 0 and unit not in varying}

    def errors(self, factors: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        """Return the largest relative error of layers of which the weights for some units change, on the same data, by name.

        Args:
            factors: By layer, of the weights that read a unit, ``[units]``: 0 where it is left out.
        """
        changed = [r for r in self.readers if (factors[r.layer][r.units[r.units >= 0]] != 1).any()]
        found = dict.fromkeys((reader.layer for reader in changed), 0.0)

        def look(reader: Reader) -> Look:
            def see(layer: DenseLayer, inputs: Tensor, _outputs: Tensor) -> None:
                spread = spread_over(reader.units, factors[reader.layer], layer)
                found[reader.layer] = max(found[reader.layer], relative_error(layer, inputs, spread))

            return see

        looks = {reader.layer: look(reader) for reader in changed}
        for _ in running(self.probe, looks, self._batches, self.calls, "Measuring errors") if changed else ():
            pass
        most = torch.tensor([*found.values(), 0.0], dtype=torch.float64, device=next(self.model.parameters()).device)
        return dict(zip(found, self.probe.maximum(most).tolist(), strict=False))


def relative_error(layer: DenseLayer, inputs: Tensor, factors: Tensor) -> float:
    """Return the largest ``|zhat - z| / (z+ + z-)`` over samples, outputs and positions, biases left out; sums that underflow do not count.

    Args:
        layer: The layer as it is, with outputs ``z``, of which ``z+ + z-`` is the sum of absolute contributions.
        inputs: Of one call.
        factors: By what its weights are multiplied for ``zhat``; broadcasts to their shape.
    """
    wide = inputs.detach().to(torch.promote_types(layer.weight.dtype, torch.float32))
    weight = layer.weight.detach().to(wide.dtype)
    off = _product(layer, wide, weight * (factors.to(weight) - 1)).abs()
    whole = _product(layer, wide.abs(), weight.abs())
    counts = whole > torch.finfo(whole.dtype).tiny
    return float(torch.where(counts, off / whole, 0.0).max()) if off.numel() else 0.0


def _product(layer: DenseLayer, inputs: Tensor, weight: Tensor) -> Tensor:
    return F.linear(inputs, weight) if isinstance(layer, nn.Linear) else layer._conv_forward(inputs, weight, None)


def spread_over(units: NDArray[np.int64], values: NDArray[np.float64], layer: DenseLayer) -> Tensor:
    """Spread values of units over the weight of a layer that reads them, 1 where none is read; broadcasts to the weight's shape."""
    spread = torch.from_numpy(np.append(values, 1.0)[units])
    rows = spread if spread.ndim == 2 else spread[None]
    return rows.reshape(*rows.shape, *[1] * (layer.weight.ndim - 2)).to(layer.weight.device)


def units_by_input(reader: Reader, layer: nn.Module) -> list[int]:
    """Return the unit of every input of a layer; -1 for none."""
    groups = getattr(layer, "groups", 1)
    rows = reader.units.reshape(groups, -1, reader.units.shape[-1])[:, 0]  # alike in all rows of a group
    return rows.reshape(-1).tolist()


def inputs_of(layer: DenseLayer) -> int:
    """Return the number of inputs of a layer, all groups counted."""
    return layer.weight.shape[1] * int(getattr(layer, "groups", 1))


def _pads_with_zeros(layer: DenseLayer) -> bool:
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and max(layer.kernel_size) > 1
    return any(layer.padding)
