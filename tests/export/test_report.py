import base64
import copy
import dataclasses
import errno
import io
import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from lightning_prune.export import Report
from lightning_prune.export.latency import speedup, summarize
from rich.console import Console

from lightning_prune.errors import ExportError, OptionError, RuntimeMissingError

DENSE, COMPACT = [np.full(20, 2.0), np.full(20, 3.0)], [np.full(20, 1.0), np.full(20, 1.0)]
PNG = base64.b64encode(b"no picture, but what a method hands over").decode()
EVIL = "<script>alert('|')</script>"


@pytest.fixture
def report():
    model = {"file": "net.onnx", "bytes": 2048, "parameters": 1000, "flops": 5000.0, "opset": 20, "metric": 0.9}
    entry = {"batch": 1, "dense": summarize(DENSE), "compact": summarize(COMPACT), "speedup": speedup(DENSE, COMPACT)}
    row = {
        "layer": EVIL,
        "action": "linear, rank 2",
        "before": "Linear 6x6",
        "after": "2x6 + 6x2",
        "kept": 0.5,
        "reason": "",
    }
    return Report(
        passed=False,
        failures=[f"output {EVIL} is wrong"],
        notes=["CPUExecutionProvider ran the files"],
        created="2026-01-01T00:00:00+00:00",
        provider={"requested": "auto", "ran": "CPUExecutionProvider", "require_gpu": False, "settings": {"threads": 1}},
        machine={"cpu": "Test 9000", "physical_cores": 2},
        models={"dense": {**model, "bytes": 8192, "parameters": 4000}, "compact": {**model, "metric": 0.875}},
        outputs=[
            {
                "name": EVIL,
                "shape": [2, 4],
                "absolute": 1e-3,
                "relative": 0.5,
                "allowed": 1e-5,
                "agreement": None,
                "verdict": "wrong",
            }
        ],
        metric={"name": "accuracy", "higher_is_better": True, "drop": 0.025},
        latency=[entry],
        gates=[{"name": "max_drop", "limit": 0.01, "value": 0.025, "passed": False}],
        layers=[row, {**row, "layer": "head", "kept": None, "reason": "output layer"}],
        data={"examples": 10, "batches": 2, "agreement": 0.9},
        exhibits=[
            {"title": EVIL, "text": "What is guaranteed.", "rows": [{"layer": EVIL, "eps": 0.25}], "picture": None},
            {"title": "Norms", "text": EVIL, "rows": [], "picture": PNG},
        ],
        extra={"recipe": EVIL},
    )


class Loads(HTMLParser):
    """Collects what a browser would load or run, and whether the tags are balanced."""

    void = frozenset({"meta", "img"})

    def __init__(self):
        super().__init__()
        self.sources, self.tags, self.open = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_loads_nothing_and_runs_nothing(report, tmp_path):
    text = report.save(tmp_path).read_text()
    page = Loads()
    page.feed(text)
    assert page.open == []
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert len(page.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert "url(" not in text
    assert EVIL not in text
    assert "&lt;script&gt;" in text


def test_pictures_are_png_of_what_was_measured(report, tmp_path):
    text = report.save(tmp_path).read_text()
    for encoded in sorted({*re.findall(r'base64,([^"]*)"', text)} - {PNG}):
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(encoded)), format="png")
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.01  # not an empty canvas
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert titles == [
        "accuracy against latency",
        "Latency distribution, batch 1",
        "Share of parameters kept per layer",
        "Norms",
    ]


def test_what_methods_have_to_show_stands_in_every_document(report, tmp_path):
    report.save(tmp_path)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert f'src="data:image/png;base64,{PNG}"' in page
    assert "<td>0.25</td>" in page
    assert page.index("<h2>Norms</h2>") < page.index("&lt;script&gt;", page.index("<h2>Norms</h2>"))
    assert "| layer | eps |" in text
    assert "What is guaranteed." in text
    assert "What is guaranteed." in page
    assert Report.load(tmp_path).exhibits == report.exhibits


def test_figures_and_judgement_stand_in_every_document(report, tmp_path):
    report.save(tmp_path)
    console = Console(file=io.StringIO(), width=160)
    console.print(report.table())
    for text in (
        (tmp_path / "report.md").read_text(),
        (tmp_path / "report.html").read_text(),
        console.file.getvalue(),
    ):
        for figure in (
            "4,000",
            "1,000",
            "25.0%",
            "0.9000",
            "0.8750",
            "-0.0250",
            "2.500 ms",
            "1.000 ms",
            "2.50x",
            "failed",
        ):
            assert figure in text, figure
    table = [line for line in (tmp_path / "report.md").read_text().splitlines() if "rank 2" in line]
    assert len(re.findall(r"(?<!\\)\|", table[0])) == 7  # the bar in a foreign name is escaped


def test_report_comes_back_and_broken_ones_are_refused(report, tmp_path):
    report.models["compact"]["metric"] = float("nan")
    report.save(tmp_path)
    fields = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert fields["models"]["compact"]["metric"] == "nan"
    loaded = Report.load(tmp_path)
    assert loaded.to_json() == report.to_json()
    loaded.save(tmp_path / "again")
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ExportError, match="no report of version 1"):
        Report.load(tmp_path)
    (tmp_path / "report.json").write_text('{"version": 1}')
    with pytest.raises(ExportError, match="is broken"):
        Report.load(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ExportError, match="is not JSON"):
        Report.load(tmp_path)
    with pytest.raises(ExportError, match="Cannot read the report"):
        Report.load(tmp_path / "none.json")


def test_report_without_reference_or_metric_is_written(report, tmp_path):
    bare = copy.deepcopy(report)
    del bare.models["dense"]
    bare.models["compact"]["metric"] = bare.metric = None
    bare.latency = [{"batch": 1, "compact": summarize(COMPACT), "speedup": None}]
    bare.layers, bare.gates, bare.outputs, bare.exhibits, bare.extra = [], [], [], [], {}
    text = bare.save(tmp_path).read_text()
    assert re.findall(r"<figcaption>(.*?)</figcaption>", text) == ["Latency distribution, batch 1"]


def test_missing_matplotlib_names_the_extra_and_keeps_the_figures(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeMissingError, match=r"Drawing the pictures of a report needs matplotlib.*pip install"):
        report.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_a_full_disk_leaves_the_report_of_before(report, tmp_path, monkeypatch):
    report.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    report.passed = True
    with pytest.raises(OptionError, match="No space left on device"):
        report.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_importing_the_package_needs_no_runtime():
    import subprocess

    code = (
        "import sys, lightning_prune.export as e; e.Report; e.LatencySettings;"
        "print([n for n in ('onnx', 'onnxruntime', 'onnxscript', 'matplotlib') if n in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_with_masks_says_how_many_parameters_no_mask_holds_at_zero(report):
    compact = report.models["compact"]
    masked = dataclasses.replace(report, models={**report.models, "compact": {**compact, "unmasked": 250}})
    assert "of them not masked" not in [row[0] for row in report.rows()]
    assert ("of them not masked", "", "250", "") in masked.rows()
