"""Pieces of the pages: tables and text in Markdown and HTML."""

import html
from collections.abc import Sequence
from typing import Any

STYLE = """
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


def section(title: str, head: Sequence[str], rows: list[Sequence[str]]) -> str:
    """Return a titled HTML table; an empty ``head`` has no heading row."""
    top = "".join(f"<th>{escaped(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>" for row in rows)
    heading = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<h2>{escaped(title)}</h2><div class="wide"><table>{heading}<tbody>{body}</tbody></table></div>'


def listing(texts: list[str], state: str) -> str:
    """Return an HTML list of class ``state``; nothing for no texts."""
    items = "".join(f"<li>{escaped(text)}</li>" for text in texts)
    return f'<ul class="{state}">{items}</ul>' if texts else ""


def show(value: Any) -> str:
    """Write a JSON value as a reader wants it: four digits, yes and no, sizes with ``x``."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {show(item)}" for key, item in value.items())
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def flat(text: str) -> str:
    """Return text for one line of Markdown, inside a table too."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def pipe(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(flat(cell) for cell in cells)} |"


def escaped(text: str) -> str:
    """Return text as HTML shows it."""
    return html.escape(text)
