"""The answer of :func:`lightning_prune.explain`: a table, JSON types, a picture."""

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_prune.explanation.rows import GroupRow, Row
from lightning_prune.files import whole_file
from lightning_prune.structure.plan import Plan

_NAMED = 3  # layers or groups that a cell of the table names
_LONGEST, _SHORT = 60, 24  # letters of a name of a layer, in its own row and in others
ITSELF = "(the model itself)"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What can be removed from a model with what, or why not.

    Attributes:
        rows: One per layer that holds parameters, in the order of the model.
        groups: Units that leave together, in the order of the model; rows name them by their numbers.
        flops: Multiply-adds of the model for ``inputs``, batch included.
        params: Number of its parameters, tied ones once.
        inputs: What was traced: modules, shapes and types of the inputs, in JSON types.
        method: The method of the dry run; None if there was none.
        plan: What the method would do, beyond what has been done already; empty if its target is already met.
        flops_after: Multiply-adds after that, counted on a compact copy.
        params_after: Parameters of that copy.
    """

    rows: tuple[Row, ...]
    groups: tuple[GroupRow, ...]
    flops: int
    params: int
    inputs: tuple[Any, ...]
    method: str | None = None
    plan: Plan | None = None
    flops_after: int | None = None
    params_after: int | None = None

    def __str__(self) -> str:
        stream = io.StringIO()
        width = 140 + min(_LONGEST, max((len(row.layer) for row in self.rows), default=0))
        Console(file=stream, width=width, color_system=None).print(self.table())
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    @property
    def title(self) -> str:
        """What the whole comes to, in one line."""
        units, candidates = sum(group.units for group in self.groups), sum(row.candidate for row in self.rows)
        text = f"{units:,} units in {len(self.groups)} groups can leave; {candidates} of {len(self.rows)} layers write such units"
        if self.flops_after is None or self.params_after is None:
            return f"{text}; {self.flops:,} FLOPs, {self.params:,} parameters"
        costs = [("FLOPs", self.flops, self.flops_after), ("parameters", self.params, self.params_after)]
        told = ", ".join(f"{what} {a:,} -> {b:,} ({b / max(1, a):.1%})" for what, a, b in costs)
        return f"{text}; {self.method}: {told}" + ("" if self.plan else "; the target is already met")

    def table(self) -> Table:
        """Return the rows as a table for a rich console; reasons stand below it, by their numbers."""
        notes = {reason: n for n, reason in enumerate(dict.fromkeys(r.reason for r in self.rows if r.reason), 1)}
        listed = "\n".join(f"({number}) {reason}" for reason, number in notes.items())
        table = Table(title=escape(self.title), caption=escape(listed), title_justify="left", caption_justify="left")
        rows = [self._cells(row, notes) for row in self.rows]
        for name in rows[0] if rows else ():
            numbers = name in ("leave", "FLOPs", "params")
            overflow: Literal["ellipsis", "fold"] = "ellipsis" if name == "type" else "fold"
            table.add_column(
                name,
                justify="right" if numbers else "left",
                overflow=overflow,
                no_wrap=numbers or name in ("layer", "type", "units"),
                max_width=20 if name == "type" else None,
            )
        for cells in rows:
            table.add_row(*map(escape, cells.values()))
        return table

    def _cells(self, row: Row, notes: Mapping[str, int]) -> dict[str, str]:
        """Return the text of a row by column; a dry run leaves out what is not asked then."""
        note = f"({notes[row.reason]})" if row.reason else ""
        cells = {"layer": row.layer or ITSELF, "type": row.type, "units": row.units, "leave": str(row.removable)}
        cells |= {
            "group": self._groups(row),
            "shrinks with": _some([_beside(name, row.layer) or ITSELF for name in row.shrinks_with]),
            "follows": ", ".join(row.follows),
        }
        cells |= {"why not": note, "FLOPs": f"{row.flops / max(1, self.flops):.1%}", "params": f"{row.params:,}"}
        if self.method is None:
            return cells
        cells["FLOPs"] += f" -> {(row.flops_after or 0) / max(1, self.flops):.1%}"
        cells["params"] += f" -> {row.params_after or 0:,}"
        kept = {key: cells[key] for key in ("layer", "units", "leave", "group", "why not", "FLOPs", "params")}
        return kept | {"what would change": row.change}

    def _groups(self, row: Row) -> str:
        """Return the groups that a row writes, those of which equally many units must leave, and those that it reads."""
        tied = sorted({other for group in row.groups for other in self.groups[group].tied} - set(row.groups))
        parts = [("", row.groups), ("as many of ", tied), ("reads ", row.inputs)]
        return "; ".join(word + _some(list(map(str, numbers))) for word, numbers in parts if numbers)

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types; of a plan its digest and table."""
        plan = None if self.plan is None else {"digest": self.plan.digest, "steps": self.plan.rows()}
        rows = [
            {**_plain(row), "candidate": row.candidate, "flops_share": row.flops / max(1, self.flops)}
            for row in self.rows
        ]
        return {
            "flops": self.flops,
            "params": self.params,
            "inputs": _lists(self.inputs),
            "method": self.method,
            "flops_after": self.flops_after,
            "params_after": self.params_after,
            "plan": plan,
            "rows": rows,
            "groups": [_plain(group) for group in self.groups],
        }

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Draw the groups: a bar per layer, a colour per group, grey for what stays; the same bytes for the same answer.

        Args:
            path: The PNG file.

        Raises:
            RuntimeMissingError: If matplotlib is not installed; names the extra that brings it.
            OptionError: If the file cannot be written.
        """
        from lightning_prune.explanation.picture import draw

        png = draw(self)
        with whole_file(path) as beside:
            beside.write_bytes(png)


def _some(names: Sequence[str]) -> str:
    shown = names if len(names) <= _NAMED else names[: _NAMED - 1]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more


def _beside(name: str, layer: str) -> str:
    """Shorten the name of a layer: of one in the module where ``layer`` stands, what is left of it with a dot in front; of others the end."""
    around = f"{layer.rpartition('.')[0]}."
    if len(around) > 1 and name.startswith(around):
        name = name[len(around) - 1 :]
    return name if len(name) <= _SHORT else f"...{name[3 - _SHORT :]}"


def _plain(row: Any) -> dict[str, Any]:
    return {field.name: _lists(getattr(row, field.name)) for field in dataclasses.fields(row)}


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value
