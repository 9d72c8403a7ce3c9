"""What a comparison found: one record per cell (a recipe under a seed), and mean and spread over the seeds.

The spread is the sample standard deviation (divided by n - 1); one seed has none. The change of the metric is taken seed by seed against the dense
model that the recipe started from. Latency is compared with the dense file of the same cell, timed in turn.
"""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Self

from rich.table import Table
from rich.text import Text

VERSION = 1
_NONE = "-"


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and spread over seeds.

    Attributes:
        mean: Their mean.
        std: Their sample standard deviation; None for a single value.
        count: How many values there are.
    """

    mean: float
    std: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self | None:
        """Describe the values that are there; None if there are none."""
        found = [float(value) for value in values if value is not None]
        if not found:
            return None
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))

    def text(self, form: str = ".4f", factor: float = 1.0, unit: str = "") -> str:
        """Return ``mean ± std unit``; a spread of zero or of a single value is left out."""
        spread = f" ± {factor * self.std:{form.lstrip('+')}}" if self.std else ""
        return f"{factor * self.mean:{form}}{spread}{unit}"


@dataclasses.dataclass
class Cell:
    """One recipe under one seed, in JSON types.

    Attributes:
        trial: Label of the recipe.
        seed: The seed.
        folder: Its run, relative to the folder of the comparison.
        failure: Why it has no figures; None if it has.
        metric: Of the compact ONNX file; of the dense one, if the trial is the dense model.
        before: Of the model between compression and fine-tuning, in torch; None if there was no such model.
        flops: Multiply-adds per example.
        params: Number of parameters.
        latency: Per batch size ``batch``, ``p50`` in ms and ``speedup`` over the dense file; of the dense model itself 1.
        metric_name: What the metric is called.
        higher_is_better: Its direction; None if it is not known.
        machine: Where it was measured.
    """

    trial: str
    seed: int
    folder: str
    failure: str | None = None
    metric: float | None = None
    before: float | None = None
    flops: float | None = None
    params: int | None = None
    latency: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    metric_name: str = "metric"
    higher_is_better: bool | None = None
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Summary:
    """One recipe over all seeds that have figures; each figure is None if no seed has it.

    Attributes:
        label: The recipe.
        kind: ``dense``, ``recipe`` or ``control``.
        seeds: How many seeds have figures.
        metric: After fine-tuning.
        change: Of the metric against the dense model of the same seed.
        before: The metric between compression and fine-tuning.
        flops: Multiply-adds per example.
        flops_share: Their share of the dense model's.
        params: Number of parameters.
        params_share: Their share of the dense model's.
        latency: Per batch size ``p50`` in ms, ``speedup``, and ``share``, the latency as a share of the dense one.
    """

    label: str
    kind: str
    seeds: int
    metric: Spread | None
    change: Spread | None
    before: Spread | None
    flops: Spread | None
    flops_share: Spread | None
    params: Spread | None
    params_share: Spread | None
    latency: dict[int, dict[str, Spread | None]]


@dataclasses.dataclass
class Comparison:
    """A comparison, in JSON types.

    Attributes:
        created: When it was written, UTC, ISO 8601.
        command: The command line that repeats it.
        seeds: The seeds.
        trials: ``label``, ``kind`` and ``recipe`` of every row; the dense model comes first.
        cells: The records so far.
        notes: What the reader should know.
        version: Version of this format.
    """

    created: str
    command: str
    seeds: list[int]
    trials: list[dict[str, Any]]
    cells: list[Cell] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    version: int = VERSION

    @property
    def metric(self) -> tuple[str, bool | None]:
        """Name of the metric, and whether more of it is better."""
        found = [(cell.metric_name, cell.higher_is_better) for cell in self.cells if cell.failure is None]
        return found[0] if found else ("metric", None)

    @property
    def failures(self) -> list[str]:
        """One sentence for every cell that has no figures."""
        return [
            f"{cell_name(cell.trial, cell.seed)}: {cell.failure}" for cell in self.cells if cell.failure is not None
        ]

    @property
    def remarks(self) -> list[str]:
        """What the reader should know, first how to read the figures."""
        several = len(self.machines) > 1
        return [
            "Mean ± sample standard deviation over seeds. change: against the dense model of the same seed, from which the recipes and controls "
            "train on. %: of the dense model's. x: speed-up over the dense file, timed in turn with it, at the median.",
            *self.notes,
            *(
                ["The cells ran on different machines or versions: compare speed-ups, not milliseconds."]
                if several
                else []
            ),
        ]

    @property
    def machines(self) -> list[dict[str, Any]]:
        """The machines that cells were measured on, each once."""
        found = [cell.machine for cell in self.cells if cell.machine]
        return [machine for number, machine in enumerate(found) if machine not in found[:number]]

    def summaries(self) -> list[Summary]:
        """Return the rows, with mean and spread over the seeds."""
        done = [cell for cell in self.cells if cell.failure is None]
        dense = {cell.seed: cell for cell in done if cell.trial == self.trials[0]["label"]}
        return [
            _summary(trial, [cell for cell in done if cell.trial == trial["label"]], dense) for trial in self.trials
        ]

    def to_json(self) -> str:
        """Return cells and rows as JSON."""
        rows = [dataclasses.asdict(row) for row in self.summaries()]
        return json.dumps({**dataclasses.asdict(self), "rows": rows}, indent=1)

    def table_rows(self, full: bool = True) -> tuple[Sequence[str], list[Sequence[str]]]:
        """Return head and rows of the table: one row per recipe, mean ± standard deviation.

        Args:
            full: Whether costs are given beside their shares of the dense model's, or only for the dense model.
        """
        rows = self.summaries()
        sizes = sorted({size for row in rows for size in row.latency})
        head = ["", self.metric[0], "change", "before fine-tuning", "FLOPs", "parameters"]
        head += [f"latency, batch {size}" for size in sizes] + ["seeds"]
        return head, [_cells_of(row, sizes, len(self.seeds), full) for row in rows]

    def table(self) -> Table:
        """Return the rows as a table for a rich console."""
        head, rows = self.table_rows(full=False)
        caption = "\n".join([*(f"FAILED {text}" for text in self.failures), *self.remarks])
        table = Table(title="Comparison", caption=Text(caption) if caption else None)
        for place, title in enumerate(head):
            table.add_column(Text(title), justify="right" if place else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        return table


def cell_name(trial: str, seed: int) -> str:
    """Return what a cell is called."""
    return f"{trial}, seed {seed}"


def _summary(trial: dict[str, Any], cells: Sequence[Cell], dense: dict[int, Cell]) -> Summary:
    def share(key: str) -> Spread | None:
        pairs = [(getattr(cell, key), getattr(dense[cell.seed], key)) for cell in cells if cell.seed in dense]
        return Spread.of(value / whole for value, whole in pairs if value is not None and whole)

    pairs = [(cell.metric, dense[cell.seed].metric) for cell in cells if cell.seed in dense]
    return Summary(
        label=trial["label"],
        kind=trial["kind"],
        seeds=len(cells),
        metric=Spread.of(cell.metric for cell in cells),
        change=Spread.of(after - before for after, before in pairs if after is not None and before is not None),
        before=Spread.of(cell.before for cell in cells),
        flops=Spread.of(cell.flops for cell in cells),
        flops_share=share("flops"),
        params=Spread.of(cell.params for cell in cells),
        params_share=share("params"),
        latency=_latency(cells),
    )


def _latency(cells: Sequence[Cell]) -> dict[int, dict[str, Spread | None]]:
    entries = [entry for cell in cells for entry in cell.latency]
    found = {}
    for size in sorted({entry["batch"] for entry in entries}):
        here = [entry for entry in entries if entry["batch"] == size]
        found[size] = {
            "p50": Spread.of(entry["p50"] for entry in here),
            "speedup": Spread.of(entry["speedup"] for entry in here),
            "share": Spread.of(1 / entry["speedup"] for entry in here),
        }
    return found


def _cells_of(row: Summary, sizes: Sequence[int], seeds: int, full: bool) -> Sequence[str]:
    dense = row.kind == "dense"
    paces = [row.latency.get(size, {}) for size in sizes]
    return [
        row.label,
        row.metric.text() if row.metric else "failed",
        row.change.text("+.4f") if row.change and not dense else _NONE,
        row.before.text() if row.before else _NONE,
        _cost(_count(row.flops), "" if dense else _share(row.flops_share), full),
        _cost(_count(row.params), "" if dense else _share(row.params_share), full),
        *(_cost(_time(pace.get("p50")), "" if dense else _ratio(pace.get("speedup")), full) for pace in paces),
        f"{row.seeds} of {seeds}" if row.seeds < seeds else str(seeds),
    ]


def _cost(value: str, relative: str, full: bool) -> str:
    if not value:
        return _NONE
    return f"{value} ({relative})" if relative and full else relative or value


def _count(value: Spread | None) -> str:
    return value.text(",.0f") if value else ""


def _share(value: Spread | None) -> str:
    return value.text(".1f", 100, " %") if value else ""


def _time(value: Spread | None) -> str:
    return f"{value.mean:.3f} ms" if value else ""


def _ratio(value: Spread | None) -> str:
    return value.text(".2f", 1, "x") if value else ""
