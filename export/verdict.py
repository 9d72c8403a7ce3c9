"""The judgement of a validation: from outputs, metrics, latency and gates to a report with its reasons."""

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_prune.export.forms import explain, rows
from lightning_prune.export.machine import describe_machine
from lightning_prune.export.metrics import TaskMetric
from lightning_prune.export.onnxfile import OnnxFile
from lightning_prune.export.passes import Seen
from lightning_prune.export.report import Report
from lightning_prune.export.runtime import CUDA, Session
from torch import nn


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the user asked for.

    Attributes:
        provider: The provider wanted.
        require_gpu: Whether anything but CUDA is an error.
        max_drop: Gate on the metric, or None.
        min_speedup: Gate on the latency, or None.
        exhibits: What methods have to show.
        extra: Recipe and provenance for the report.
    """

    provider: str
    require_gpu: bool
    max_drop: float | None
    min_speedup: float | None
    exhibits: Sequence[Mapping[str, Any]]
    extra: Mapping[str, Any]


def judge(
    files: Mapping[str, OnnxFile],
    session: Session,
    seen: Seen,
    measured: list[dict[str, Any]],
    model: nn.Module | None,
    asked: Asked,
) -> Report:
    """Judge what was seen and measured.

    Args:
        files: ``compact`` and, with a reference, ``dense``.
        session: The session that ran the compact file.
        seen: What the pass over the data gave.
        measured: Latency per batch size.
        model: The torch model; None if none was given.
        asked: Gates and provider.

    Returns:
        The report; it passed if there is no failure.

    Raises:
        OptionError: If the metric is not one number.
    """
    values = seen.metric.values() if seen.metric is not None else {}
    judged = _judge_metric(seen.metric, values)
    gap = abs(values["torch"] - values["compact"]) if "torch" in values else 0.0
    records = seen.comparison.records(gap)
    checked = _gates(asked, judged, measured)
    failures = [record.explain() for record in records if record.verdict != "rounding noise"]
    failures += _broken(seen, values, files["compact"], model is not None)
    failures += [
        f"gate {g['name']} {g['limit']} is missed: measured {g['value']:.4g}" for g in checked if not g["passed"]
    ]
    plan, forms = files["compact"].plan, files["compact"].metadata.get("forms") or {}
    return Report(
        passed=not failures,
        failures=failures,
        notes=_notes(session, asked, model is not None, measured)
        + _left_out(files)
        + ([explain(forms)] if forms else []),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        provider={
            "requested": asked.provider,
            "ran": session.provider,
            "require_gpu": asked.require_gpu,
            "settings": dict(session.settings),
            "complaint": session.complaint,
        },
        machine=describe_machine(),
        models=_models(files, values, model),
        outputs=[dataclasses.asdict(record) for record in records],
        metric=judged,
        latency=measured,
        gates=checked,
        layers=plan.rows() if plan is not None else [],
        forms=rows(forms),
        data={
            "examples": seen.examples,
            "batches": seen.batches,
            "agreement": seen.agreed / seen.decisions if seen.decisions else None,
        },
        exhibits=[dict(exhibit) for exhibit in asked.exhibits],
        extra={"export": files["compact"].metadata.get("provenance", {}), **asked.extra},
    )


def _models(
    files: Mapping[str, OnnxFile], values: Mapping[str, float], model: nn.Module | None
) -> dict[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = {}
    if model is not None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        models["torch"] = {"model": type(model).__name__, "parameters": parameters, "metric": values.get("torch")}
    for name, file in files.items():
        described = {
            "file": file.path.name,
            "bytes": file.bytes,
            "parameters": file.parameters,
            "unmasked": file.unmasked,
            "numbers": file.numbers,
        }
        models[name] = {**described, "flops": file.flops, "opset": file.opset, "metric": values.get(name)}
    plan = files["compact"].plan
    if "dense" not in models and plan is not None and plan.origin is not None:
        models["dense"] = {"parameters": plan.origin.params}
    return models


def _judge_metric(metric: TaskMetric | None, values: Mapping[str, float]) -> dict[str, Any] | None:
    if metric is None:
        return None
    drop = metric.drop(values["dense"], values["compact"]) if "dense" in values else None
    return {"name": metric.name, "higher_is_better": metric.higher_is_better, "drop": drop}


def _gates(asked: Asked, metric: dict[str, Any] | None, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    max_drop, min_speedup = asked.max_drop, asked.min_speedup
    gates: list[dict[str, Any]] = []
    if max_drop is not None and metric is not None:
        # One ulp of the metric's float32 is not a drop.
        met = metric["drop"] <= max_drop + 1e-7
        gates.append({"name": "max_drop", "limit": max_drop, "value": metric["drop"], "passed": met})
    if min_speedup is not None:
        worst = min(entry["speedup"]["median"] for entry in measured)
        gates.append({"name": "min_speedup", "limit": min_speedup, "value": worst, "passed": worst >= min_speedup})
    return gates


def _broken(seen: Seen, values: Mapping[str, float], file: OnnxFile, judged: bool) -> list[str]:
    failures = [
        f"the {name} model gave {count:,} values that are not finite"
        for name, count in seen.non_finite.items()
        if count and not (judged and name == "compact")
    ]
    failures += [
        f"the metric of the {name} model is {value}" for name, value in values.items() if not math.isfinite(value)
    ]
    if not judged and not file.unchanged:
        what = "was changed after its export" if file.unchanged is False else "does not say what was exported"
        failures.append(f"the file {what}, and no torch model was given to judge its outputs: give model")
    return failures


def _notes(session: Session, asked: Asked, judged: bool, measured: list[dict[str, Any]]) -> list[str]:
    notes = [f"{session.provider} ran the files; latency holds for it and for this machine only."]
    if session.provider != CUDA and asked.provider != "cpu":
        notes.append(f"CUDA did not run: {session.complaint or 'this onnxruntime is built without it'}.")
    if not judged:
        notes.append("No torch model was given: the outputs of the file were not compared with torch.")
    for entry in measured:
        if entry["speedup"]:
            notes.append(f"Batch {entry['batch']}: {entry['speedup']['verdict']}.")
    return notes


def _left_out(files: Mapping[str, OnnxFile]) -> list[str]:
    counted = {name: (file.metadata.get("flops") or {}).get("uncounted") for name, file in files.items()}
    return [f"FLOPs of the {name} model leave out {', '.join(names)}." for name, names in counted.items() if names]
