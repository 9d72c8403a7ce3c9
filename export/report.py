"""The report of a validation: data first, then the same as Markdown, as one HTML file and as a table on the screen."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Self

from lightning_prune.export.optional import need
from rich.table import Table

from lightning_prune.errors import ExportError
from lightning_prune.files import write_text

VERSION = 1
NAMES = ("report.json", "report.md", "report.html")


@dataclasses.dataclass
class Report:
    """What a validation found, in JSON types.

    Attributes:
        passed: Whether the compact file is right and every gate was met.
        failures: One sentence for everything that was not.
        notes: What the reader should know, such as the provider that ran.
        created: Time of the validation, UTC, ISO 8601.
        provider: ``requested``, ``ran``, ``require_gpu``, ``settings``, ``complaint``.
        machine: See :func:`lightning_prune.export.machine.describe_machine`.
        models: ``torch``, ``dense``, ``compact``: ``file bytes parameters unmasked flops opset metric`` as far as known.
        outputs: Outputs of the compact file against torch, one record each
            (:class:`lightning_prune.export.outputs.OutputDifference`); empty where no torch model was given.
        metric: ``name``, ``higher_is_better``, ``drop`` against the dense file; None without a metric.
        latency: Per batch size ``batch``, ``compact``, ``dense``, ``speedup`` (:mod:`lightning_prune.export.latency`).
        gates: ``name``, ``limit``, ``value``, ``passed``.
        layers: Rows of the plan: ``layer action before after kept reason``.
        forms: Which exact form each layer has in the compact file (:func:`lightning_prune.export.forms.rows`).
        data: ``examples``, ``batches``, ``agreement`` (equal argmax of dense and compact).
        exhibits: What methods have to show: ``title``, ``text``, ``rows``, ``picture`` (PNG in base64, or None).
        extra: Whatever was handed over: recipe, provenance.
        version: Version of this format.
    """

    passed: bool
    failures: list[str]
    notes: list[str]
    created: str
    provider: dict[str, Any]
    machine: dict[str, Any]
    models: dict[str, dict[str, Any]]
    outputs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    metric: dict[str, Any] | None = None
    latency: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    gates: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    layers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    exhibits: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    forms: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    version: int = VERSION

    def to_json(self) -> str:
        """Return the report as JSON; numbers that are not finite become texts."""
        return json.dumps(_plain(dataclasses.asdict(self)), indent=1, allow_nan=False)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``report.json``, ``report.md`` and ``report.html`` into ``folder``, each whole or not at all.

        Args:
            folder: Made if it is missing.

        Returns:
            The HTML file.

        Raises:
            OptionError: If the folder cannot be written.
            RuntimeMissingError: If matplotlib, which draws the pictures, is not installed; JSON and Markdown are there
                then.
        """
        from lightning_prune.export.page import html, markdown

        folder = Path(folder)
        write_text(folder / "report.json", self.to_json() + "\n")
        write_text(folder / "report.md", markdown(self))
        need("matplotlib", "Drawing the pictures of a report")
        write_text(folder / "report.html", html(self))
        return folder / "report.html"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a report.

        Args:
            path: ``report.json``, or the folder that holds it.

        Raises:
            ExportError: If there is none, or it is broken.
        """
        path = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ExportError(f"Cannot read the report {str(path)!r}: {error.strerror or error}.") from error
        except ValueError as error:
            raise ExportError(f"The report {str(path)!r} is not JSON: {error}.") from error
        if not isinstance(fields, dict) or fields.get("version") != VERSION:
            raise ExportError(f"{str(path)!r} is no report of version {VERSION}.")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ExportError(f"The report {str(path)!r} is broken: {error}.") from error

    def rows(self) -> list[tuple[str, ...]]:
        """Return the figures side by side: quantity, dense, compact, change."""
        dense, compact = self.models.get("dense", {}), self.models["compact"]
        masked = compact.get("unmasked") not in (None, compact.get("parameters"))
        rows = [
            _row(label, dense.get(key), compact.get(key), form)
            for label, key, form in (
                ("parameters", "parameters", _count),
                *([("of them not masked", "unmasked", _count)] if masked else []),
                *([("numbers in the file", "numbers", _count)] if "numbers" in compact else []),
                ("FLOPs per example", "flops", _count),
                ("file", "bytes", _size),
            )
        ]
        if self.metric:
            drop = self.metric["drop"]
            before, after = (_figure(model.get("metric")) for model in (dense, compact))
            rows.append((self.metric["name"], before, after, "" if drop is None else f"{-_number(drop):+.4f}"))
        for entry in self.latency:
            for key in ("p50", "p90", "p99"):
                pair = [f"{entry[name][key]:.3f} ms" if entry.get(name) else "" for name in ("dense", "compact")]
                change = entry["speedup"] if key == "p50" else None
                text = f"{change['median']:.2f}x ({change['low']:.2f} to {change['high']:.2f})" if change else ""
                rows.append((f"latency {key}, batch {entry['batch']}", *pair, text))
        return rows

    def table(self) -> Table:
        """Return the figures and the judgement as a table for a rich console."""
        table = Table(title="Validation", caption="\n".join([self.headline(), *self.failures, *self.notes]))
        for name in ("", "dense", "compact", "change"):
            table.add_column(name, justify="left" if not name else "right")
        for row in self.rows():
            table.add_row(*row)
        return table

    def headline(self) -> str:
        """Return the judgement in one sentence."""
        count = len(self.failures)
        verdict = "passed" if self.passed else f"failed ({count} reason{'s' if count != 1 else ''})"
        return f"Validation {verdict} on {self.provider['ran']}."


def _row(label: str, before: Any, after: Any, form: Any) -> tuple[str, ...]:
    change = f"{after / before:.1%}" if before and after is not None else ""
    return label, form(before), form(after), change


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _size(value: float | None) -> str:
    return "" if value is None else f"{value / 1024:,.1f} KiB"


def _figure(value: Any) -> str:
    return "" if value is None else f"{_number(value):.4f}"


def _number(value: Any) -> float:
    """Numbers that are not finite stand as texts in a loaded report."""
    return float(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return repr(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
