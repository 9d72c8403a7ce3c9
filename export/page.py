"""A report as Markdown and as one HTML file that loads nothing from elsewhere."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_prune.export.forms import titles
from lightning_prune.export.markup import STYLE, escaped, flat, listing, pipe, section, show
from lightning_prune.export.pictures import draw
from lightning_prune.export.report import Report


def markdown(report: Report) -> str:
    """Return the report as Markdown."""
    lines = ["# Validation report", "", f"**{report.headline()}** {_when(report)}", ""]
    lines += [f"- FAILED: {flat(text)}" for text in report.failures] + [f"- {flat(text)}" for text in report.notes]
    for title, head, rows in _tables(report):
        lines += ["", f"## {title}", "", pipe(head), pipe(["---"] * len(head)), *(pipe(row) for row in rows)]
    for exhibit in report.exhibits:
        lines += ["", f"## {flat(exhibit['title'])}", "", flat(exhibit["text"])]
        for head, rows in _exhibited(exhibit):
            lines += ["", pipe(head), pipe(["---"] * len(head)), *(pipe(row) for row in rows)]
    if report.extra:
        lines += ["", "## Provenance", "", "```json", json.dumps(report.extra, indent=1, default=str), "```"]
    return "\n".join(lines) + "\n"


def html(report: Report) -> str:
    """Return the report as one HTML document; every text from elsewhere is escaped."""
    state = "good" if report.passed else "bad"
    word = "PASSED" if report.passed else "FAILED"
    parts = [
        f'<h1>Validation <span class="badge {state}">{word}</span></h1>',
        f'<p class="soft">{escaped(report.headline())} {escaped(_when(report))}</p>',
        listing(report.failures, "bad"),
        listing(report.notes, "soft"),
        _cards(report),
        _figures(report),
        *(section(title, head, rows) for title, head, rows in _tables(report)),
        *map(_exhibit, report.exhibits),
    ]
    if report.extra:
        body = escaped(json.dumps(report.extra, indent=1, default=str))
        parts.append(f'<h2>Provenance</h2><div class="wide"><pre>{body}</pre></div>')
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Validation report</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _tables(report: Report) -> Iterable[tuple[str, Sequence[str], list[Sequence[str]]]]:
    """Every table of the report: title, head, rows; both documents show the same."""
    head: Sequence[str]
    yield "Dense and compact", ("", "dense", "compact", "change"), list(report.rows())
    if report.gates:
        gates = [{**gate, "passed": "met" if gate["passed"] else "NOT met"} for gate in report.gates]
        yield "Gates", ("gate", "limit", "measured", ""), _cells(gates, ("name", "limit", "value", "passed"))
    if report.outputs:
        head = ("output", "shape", "largest difference", "relative", "rounding explains", "equal argmax", "verdict")
        keys = ("name", "shape", "absolute", "relative", "allowed", "agreement", "verdict")
        yield "Compact file against torch", head, _cells(report.outputs, keys)
    if report.latency:
        head = ("batch", "model", "p50", "p90", "p99", "IQR", "p50 of rounds", "runs")
        pairs = [(entry, model) for entry in report.latency for model in ("dense", "compact") if entry.get(model)]
        yield "Latency, ms", head, [_latency_row(*pair) for pair in pairs]
    if report.layers:
        layers = [{**row, "kept": "" if row["kept"] is None else f"{row['kept']:.1%}"} for row in report.layers]
        head = ("layer", "action", "before", "after", "kept", "reason")
        yield "Layers", head, _cells(layers, head)
    if report.forms:
        columns = titles(report.forms)
        forms = [{**row, "ms": "" if row["ms"] is None else row["ms"]} for row in report.forms]
        yield "Forms of the layers", list(columns.values()), _cells(forms, list(columns))
    facts = {**report.data, **report.machine, **{f"provider {key}": value for key, value in report.provider.items()}}
    yield "Data, machine and runtime", ("", ""), [(key.replace("_", " "), show(value)) for key, value in facts.items()]


def _exhibited(exhibit: Mapping[str, Any]) -> Iterable[tuple[Sequence[str], list[Sequence[str]]]]:
    """Yield head and rows of the table of an exhibit, if it has one."""
    if exhibit["rows"]:
        head = list(exhibit["rows"][0])
        yield head, _cells(exhibit["rows"], head)


def _exhibit(exhibit: Mapping[str, Any]) -> str:
    parts = [section(exhibit["title"], head, rows) for head, rows in _exhibited(exhibit)] or [
        f"<h2>{escaped(exhibit['title'])}</h2>"
    ]
    parts.append(f"<p>{escaped(exhibit['text'])}</p>")
    if exhibit["picture"]:
        parts.append(_picture(exhibit["title"], exhibit["picture"]))
    return "".join(parts)


def _picture(title: str, png: str) -> str:
    """Return a figure with a PNG file in base64."""
    source = f"data:image/png;base64,{escaped(png)}"
    return f'<figure><figcaption>{escaped(title)}</figcaption><img alt="{escaped(title)}" src="{source}"></figure>'


def _cells(records: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> list[Sequence[str]]:
    return [[show(record[key]) for key in keys] for record in records]


def _latency_row(entry: dict[str, Any], model: str) -> Sequence[str]:
    values = entry[model]
    figures = [f"{values[key]:.3f}" for key in ("p50", "p90", "p99", "iqr")]
    return (str(entry["batch"]), model, *figures, ", ".join(f"{v:.3f}" for v in values["rounds"]), str(values["runs"]))


def _cards(report: Report) -> str:
    """The key figures: how each changed, or its value where there is nothing to compare with."""
    labels = {
        "parameters": "parameters kept",
        "numbers in the file": "numbers in the file, of dense",
        "FLOPs per example": "FLOPs kept",
        "file": "file size kept",
    }
    parts = []
    for name, _, value, change in report.rows():
        if not (change or value) or "p90" in name or "p99" in name:
            continue
        compared = labels.get(name, name.replace("latency p50", "speed-up"))
        compared = f"change of {name}" if report.metric and name == report.metric["name"] else compared
        text, label = (change.split(" (")[0], compared) if change else (value, name)
        parts.append(f'<div class="card"><b>{escaped(text)}</b><span class="soft">{escaped(label)}</span></div>')
    return f'<div class="cards">{"".join(parts)}</div>'


def _figures(report: Report) -> str:
    parts = [_picture(title, base64.b64encode(png).decode()) for title, png in draw(report).items()]
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def _when(report: Report) -> str:
    return f"{report.created} on {report.machine.get('cpu', 'an unknown processor')}."
