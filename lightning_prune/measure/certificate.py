"""A guarantee as data: how far the outputs of layers that read fewer inputs can be off, layer by layer, beside what was measured."""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.table import Table

EXCESS = 3.0  # by how much a share may exceed the largest one seen, in the assumption on unseen data; the K of the authors' code


@dataclasses.dataclass(frozen=True)
class Guarantee:
    """What is promised of one layer that reads fewer inputs, and what was measured.

    Attributes:
        layer: Its name.
        kept: Units that it still reads.
        read: Units that it read.
        mass: ``S``, the sum of the sensitivities of the units, of those that were drawn where some were.
        draws: ``m``; where nothing was drawn, the number of draws expected to hit as many units.
        eps: No output of the calibration data is off by more than ``eps`` times ``z+ + z-``: with probability ``1 - delta`` where units were
            drawn, for certain where not.
        delta: Probability that the bound fails; 0 where nothing was drawn.
        triples: ``M``, the combinations of sample, output and position that the bound covers.
        vacuous: Whether the bound says nothing: leaving out everything would keep it, ``eps >= 1``.
        measured: The largest relative error, ``|zhat - z| / (z+ + z-)``, found on the calibration data.
        unseen: The same bound for a sample that was not seen, by the assumption that :attr:`Certificate.assumption` states.
    """

    layer: str
    kept: int
    read: int
    mass: float
    draws: float
    eps: float
    delta: float
    triples: int
    vacuous: bool
    measured: float
    unseen: float


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The guarantee of a pruning, layer by layer: pre-activations of each layer for the inputs that it had before the pruning.

    Attributes:
        mode: How units were chosen.
        samples: Calibration samples that were seen, over all ranks.
        needed: Samples that the bound for unseen data takes.
        rows: A guarantee per layer that lost inputs.
    """

    mode: str
    samples: int
    needed: int
    rows: tuple[Guarantee, ...]

    @property
    def assumption(self) -> str:
        """What the bound for unseen data rests on."""
        enough = "" if self.samples >= self.needed else f", which are too few here ({self.samples})"
        return (
            f"unseen samples come from the distribution of the calibration data, and the largest share of a channel among {self.needed} "
            f"samples{enough} is, but for a factor of {EXCESS:g}, the largest that it ever has (assumption 1 of the paper, with the constants of "
            "the authors' code)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate in JSON types; infinite numbers are ``Infinity``, as Python's :mod:`json` writes them."""
        return {**dataclasses.asdict(self), "rows": [dataclasses.asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build the certificate from what :meth:`to_dict` returned."""
        return cls(**{**data, "rows": tuple(Guarantee(**row) for row in data["rows"])})

    def table(self) -> Table:
        """Return the rows for a rich console."""
        table = Table(*(field.name for field in dataclasses.fields(Guarantee)), title=f"PFP, {self.mode}")
        for row in self.rows:
            table.add_row(
                *(f"{value:.3g}" if isinstance(value, float) else str(value) for value in dataclasses.astuple(row))
            )
        return table

    def __str__(self) -> str:
        stream = io.StringIO()
        Console(file=stream, width=140, color_system=None).print(self.table())
        return f"{stream.getvalue()}Unseen: {self.assumption}."
