"""What a method has to show of its run: a text, a table, a picture, for the report."""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """Something to show.

    Attributes:
        title: What it is.
        text: What it says, a sentence or a few.
        rows: A table, a mapping per row in JSON types, all with the same keys.
        picture: A PNG file; None for none.
    """

    title: str
    text: str
    rows: Sequence[Mapping[str, Any]] = ()
    picture: bytes | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the exhibit in JSON types; the picture in base64."""
        picture = None if self.picture is None else base64.b64encode(self.picture).decode()
        return {"title": self.title, "text": self.text, "rows": [dict(row) for row in self.rows], "picture": picture}
