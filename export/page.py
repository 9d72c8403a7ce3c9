"""A report as Markdown and as one HTML file that loads nothing from elsewhere."""

import base64
import html as markup
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_prune.export.pictures import draw
from lightning_prune.export.report import Report

_STYLE = """
:root{color-scheme:light dark;--ink:#1f2733;--soft:#5d6878;--line:#dfe4ec;
 --card:#fff;--back:#f5f7fa;--good:#0f7b6c;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa5b5;--line:#333c49;
 --card:#1b212a;--back:#12161c;--good:#3fbfa9;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1040px;margin:0 auto;padding:2rem 1rem 4rem}
h1{font-size:1.5rem;margin:0 0 .25rem}h2{font-size:1.05rem;margin:2.2rem 0 .6rem}
p{margin:.3rem 0}.soft{color:var(--soft)}
.badge{display:inline-block;padding:.1rem .7rem;border-radius:1rem;border:1.5px solid;font-weight:600}
.good{color:var(--good)}.bad{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:.8rem;margin:1.4rem 0}
.card,figure,.wide{background:var(--card);border:1px solid var(--line);border-radius:.6rem}
.card{padding:.8rem 1rem}.card b{display:block;font-size:1.45rem;font-variant-numeric:tabular-nums}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:.8rem;align-items:start}
figure{margin:0;padding:.8rem}figcaption{font-weight:600;margin-bottom:.4rem}
img{width:100%;height:auto;border-radius:.3rem;background:#fff}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .8rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600}tr:last-child td{border-bottom:0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;padding:1rem;margin:0;font-size:.85rem}
ul{margin:.4rem 0;padding-left:1.2rem}
"""


def markdown(report: Report) -> str:
    """Return the report as Markdown."""
    lines = ["# Validation report", "", f"**{report.headline()}** {_when(report)}", ""]
    lines += [f"- FAILED: {_flat(text)}" for text in report.failures] + [f"- {_flat(text)}" for text in report.notes]
    for title, head, rows in _tables(report):
        lines += ["", f"## {title}", "", _pipe(head), _pipe(["---"] * len(head)), *(_pipe(row) for row in rows)]
    if report.extra:
        lines += ["", "## Provenance", "", "```json", json.dumps(report.extra, indent=1, default=str), "```"]
    return "\n".join(lines) + "\n"


def html(report: Report) -> str:
    """Return the report as one HTML document; every text from elsewhere is escaped."""
    state = "good" if report.passed else "bad"
    word = "PASSED" if report.passed else "FAILED"
    parts = [
        f'<h1>Validation <span class="badge {state}">{word}</span></h1>',
        f'<p class="soft">{_text(report.headline())} {_text(_when(report))}</p>',
        _listing(report.failures, "bad"),
        _listing(report.notes, "soft"),
        _cards(report),
        _figures(report),
        *(_section(title, head, rows) for title, head, rows in _tables(report)),
    ]
    if report.extra:
        body = _text(json.dumps(report.extra, indent=1, default=str))
        parts.append(f'<h2>Provenance</h2><div class="wide"><pre>{body}</pre></div>')
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Validation report</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
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
    facts = {**report.data, **report.machine, **{f"provider {key}": value for key, value in report.provider.items()}}
    yield "Data, machine and runtime", ("", ""), [(key.replace("_", " "), _show(value)) for key, value in facts.items()]


def _cells(records: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> list[Sequence[str]]:
    return [[_show(record[key]) for key in keys] for record in records]


def _latency_row(entry: dict[str, Any], model: str) -> Sequence[str]:
    values = entry[model]
    figures = [f"{values[key]:.3f}" for key in ("p50", "p90", "p99", "iqr")]
    return (str(entry["batch"]), model, *figures, ", ".join(f"{v:.3f}" for v in values["rounds"]), str(values["runs"]))


def _cards(report: Report) -> str:
    """The key figures: how each changed, or its value where there is nothing to compare with."""
    labels = {"parameters": "parameters kept", "FLOPs per example": "FLOPs kept", "file": "file size kept"}
    parts = []
    for name, _, value, change in report.rows():
        if not (change or value) or "p90" in name or "p99" in name:
            continue
        compared = labels.get(name, name.replace("latency p50", "speed-up"))
        compared = f"change of {name}" if report.metric and name == report.metric["name"] else compared
        text, label = (change.split(" (")[0], compared) if change else (value, name)
        parts.append(f'<div class="card"><b>{_text(text)}</b><span class="soft">{_text(label)}</span></div>')
    return f'<div class="cards">{"".join(parts)}</div>'


def _figures(report: Report) -> str:
    parts = [
        f"<figure><figcaption>{_text(title)}</figcaption>"
        f'<img alt="{_text(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
        for title, png in draw(report).items()
    ]
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def _section(title: str, head: Sequence[str], rows: list[Sequence[str]]) -> str:
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    heading = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<h2>{_text(title)}</h2><div class="wide"><table>{heading}<tbody>{body}</tbody></table></div>'


def _listing(texts: list[str], state: str) -> str:
    items = "".join(f"<li>{_text(text)}</li>" for text in texts)
    return f'<ul class="{state}">{items}</ul>' if texts else ""


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_show(item)}" for key, item in value.items())
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _when(report: Report) -> str:
    return f"{report.created} on {report.machine.get('cpu', 'an unknown processor')}."


def _flat(text: str) -> str:
    return markup.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _pipe(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_flat(cell) for cell in cells)} |"


def _text(text: str) -> str:
    return markup.escape(text)
