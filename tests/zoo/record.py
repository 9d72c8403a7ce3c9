"""What the tests of the zoo write down: the refusals that are expected, and a line of the table of results per network."""

import dataclasses
import json
from pathlib import Path

Refusals = dict[str, list[str]]
"""Layers of which some channels stay, by the reason why."""

_EXPECTED = Path(__file__).with_name("expected.json")


@dataclasses.dataclass
class Row:
    """One network in the table of results, in words.

    Attributes:
        name: Its name.
        candidates: How many of its layers write channels that can leave.
        refused: How many of its layers write none.
        flops: Share of its multiply-adds that is left.
        difference: Largest difference between compact and masked, as a share of the largest value.
        onnx: The same between the ONNX file and torch, in float32.
        seconds: What explaining and compressing took.
    """

    name: str
    candidates: str = "-"
    refused: str = "-"
    flops: str = "-"
    difference: str = "-"
    onnx: str = "-"
    seconds: str = "-"


def read_expected() -> dict[str, Refusals]:
    """Return the expected refusals by network."""
    found: dict[str, Refusals] = json.loads(_EXPECTED.read_text())
    return found


def write_expected(found: dict[str, Refusals]) -> None:
    """Write them."""
    _EXPECTED.write_text(json.dumps(found, indent=1) + "\n")
