"""What the tests of the zoo share: the expected refusals, compared with or written on request, and the table of results at the end."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest

from tests.zoo.models import ZOO
from tests.zoo.record import Refusals, Row, read_expected, write_expected
from tests.zoo.schemas import define_schemas

define_schemas()  # before anything imports torchvision, as torchmetrics does where it is installed

_ROWS: list[Row] = []  # of the process that prints; tests may run in others


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-expected", action="store_true", help="write the refusals found to tests/zoo/expected.json"
    )


@pytest.fixture(scope="session")
def expected(request: pytest.FixtureRequest) -> Iterator[Callable[[str, Refusals], Refusals]]:
    """Return a function that gives the expected refusals of a network; with ``--write-expected`` they are what is found."""
    write = request.config.getoption("--write-expected", default=False)
    if write and hasattr(request.config, "workerinput"):
        raise pytest.UsageError("--write-expected writes one file: run it without -n")
    known = read_expected()

    def of(name: str, found: Refusals) -> Refusals:
        if write:
            known[name] = found
        return known.get(name, {})

    yield of
    if write:
        write_expected({name: known[name] for name in ZOO if name in known})


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """Return the line of the table for the network under test, to be filled."""
    line = Row(request.node.callspec.params["name"])
    yield line
    request.node.user_properties.append(("row", dataclasses.astuple(line)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        _ROWS.extend(Row(*values) for key, values in report.user_properties if key == "row")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = sorted(_ROWS, key=lambda row: list(ZOO).index(row.name))
    if not rows:
        return
    titles = [field.name for field in dataclasses.fields(Row)]
    lines = [titles, *([getattr(row, title) for title in titles] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    terminalreporter.section("the zoo")
    for line in lines:
        terminalreporter.write_line("  ".join(map(str.ljust, line, widths)).rstrip())
