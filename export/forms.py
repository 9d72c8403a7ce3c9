"""The choice among the exact forms of layers (:mod:`lightning_prune.export.variants`) at export.

Which is fastest depends on the sizes, the batch and the runtime, and fewer parameters are not fewer multiply-adds. So a layer is exported
in the form with the fewest multiply-adds (``"auto"``), the fewest numbers (``"smallest"``), or the least time, measured (``"fastest"``).
"""

import dataclasses
import functools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning_prune.export.graph import trace
from lightning_prune.export.inputs import Inputs, read_inputs, widened
from lightning_prune.export.latency import CLAIM, LatencySettings, speedup, time_round
from lightning_prune.export.optional import need
from lightning_prune.export.outputs import as_arrays
from lightning_prune.export.runtime import CUDA, Provider, load_onnxruntime, open_session
from lightning_prune.export.twin import cpu_twin, run
from lightning_prune.export.variants import Variant, dense_spec, forms_of
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lightning_prune.errors import OptionError, RuntimeMissingError
from lightning_prune.structure.mpo import MPOConv

Wish: TypeAlias = Literal["auto", "fastest", "smallest"]
Times: TypeAlias = Mapping[str, Any]  # milliseconds by name of the form, ``[runs]``

WISHES: tuple[Wish, ...] = get_args(Wish)
REASONS: dict[Wish, str] = {"auto": "fewest multiply-adds", "smallest": "fewest numbers", "fastest": "measured"}
DECIDES: dict[Wish, tuple[str, str]] = {"auto": ("flops", ""), "smallest": ("numbers", ""), "fastest": ("ms", " ms")}
_HOPELESS = 2.0  # a form that needs so many times the least time at first sight is not timed further
_SIGHT = (2, 3)  # calls before, and timed calls of, the first sight
_RUNS = (20, 200)  # least and most timed calls
_MILLISECONDS = 200.0  # to spend on the timed calls of one layer, if the least number allows


@dataclasses.dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        form: ``"auto"``, ``"fastest"`` or ``"smallest"``.
        provider: Where ``"fastest"`` measures; ``"cuda"`` nowhere else.
        batch_size: At which batch it does; None takes 1, or the example's where the batch is fixed.
        threads: Threads inside an operator; None takes the number of physical cores.

    Raises:
        OptionError: If a value is not allowed, or says how to measure where nothing is.
    """

    form: Wish = "auto"
    provider: Provider = "auto"
    batch_size: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.form not in WISHES:
            raise OptionError(f"form is one of {', '.join(map(repr, WISHES))}; got {self.form!r}.")
        if self.provider not in get_args(Provider):
            raise OptionError(f"provider is 'auto', 'cpu' or 'cuda'; got {self.provider!r}.")
        if type(self.batch_size) not in (int, type(None)) or (self.batch_size is not None and self.batch_size < 1):
            raise OptionError(f"batch_size is a whole number of at least 1, or None; got {self.batch_size!r}.")
        LatencySettings(threads=self.threads)
        if self.form != "fastest" and (self.provider, self.batch_size, self.threads) != ("auto", None, None):
            raise OptionError(
                f"provider, batch_size and threads say how form='fastest' measures; form={self.form!r} asks no clock. Leave them out."
            )


def choose(
    twin: nn.Module, call: Inputs, settings: Settings, opset: int | None = None, dynamic_batch: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """Give every layer that has several forms the one that was asked for.

    Layers that the call does not reach, and those with hooks, stay as they are.

    Args:
        twin: What :func:`lightning_prune.export.twin.cpu_twin` returned; left as it is.
        call: The example.
        settings: What was asked for.
        opset: Version of the operator set of files that are timed.
        dynamic_batch: Whether their batch is free.

    Returns:
        A copy of the model, and what was chosen in JSON types: ``asked``, ``why``, ``layers`` with ``form`` and, of every ``forms``, ``numbers``,
        ``flops`` and ``ms``; ``example``, the batch of the example that the ``flops`` are for; of ``"fastest"`` also ``provider``, ``batch`` (that
        of the ``ms``) and ``threads``. Empty if no layer has several forms.

    Raises:
        ExportError: If a form cannot be exported or run.
        OptionError: If ``batch_size`` is not the batch of an example whose batch is fixed.
        RuntimeMissingError: If ``"fastest"`` finds no onnxruntime, or no CUDA that ``provider`` names.
    """
    formed = cpu_twin(twin)
    layers = {name: layer for name, layer in formed.named_modules() if name and forms_of(layer)}
    if not layers:
        return formed, {}
    seen = _seen(formed, layers, call)
    record: dict[str, Any] = {"asked": settings.form, "why": REASONS[settings.form], "example": call.batch or 1}
    found = {name: _costs(layers[name], inputs) for name, inputs in seen.items()}
    if settings.form == "fastest":
        chosen = _measured(formed, layers, call, settings, opset, dynamic_batch, found, record)
    else:
        chosen = {name: _cheapest(forms, settings.form) for name, forms in found.items()}
    record["layers"] = {name: {"form": chosen[name], "forms": found[name]} for name in found}
    built = {id(layers[name]): _variant(layers[name], form).build() for name, form in chosen.items()}
    for name, layer in list(formed.named_modules(remove_duplicate=False)):
        if id(layer) in built:
            formed.set_submodule(name, built[id(layer)])
    return formed.eval().requires_grad_(False), record


def rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what :func:`choose` recorded as a table, a row per layer: what was chosen, and what decided against the others.

    ``flops_batch`` and ``ms_batch`` are the batches that its ``flops`` and ``ms`` hold for; None where unknown, or not measured.
    """
    table = []
    batches = {"flops_batch": record.get("example"), "ms_batch": record.get("batch")}
    for layer, entry in record.get("layers", {}).items():
        key, unit = DECIDES[record["asked"]]
        others = {form: cost[key] for form, cost in entry["forms"].items() if form != entry["form"]}
        told = "; ".join(f"{form} {value:,g}{unit}" for form, value in sorted(others.items(), key=lambda item: item[1]))
        table.append(
            {"layer": layer, "form": entry["form"], **entry["forms"][entry["form"]], "others": told, **batches}
        )
    return table


def titles(table: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the titles of the columns of :func:`rows`, by key; what depends on a batch says at which it holds."""
    example, batch = (table[0].get(key) if table else None for key in ("flops_batch", "ms_batch"))
    flops = f"multiply-adds, example of batch {example}" if example else "multiply-adds"
    ms = f"ms, batch {batch}" if batch else "ms"
    plain = {name: name for name in ("layer", "form", "numbers")}
    return plain | {"flops": flops, "ms": ms, "others": "other forms"}


def grown(record: Mapping[str, Any]) -> list[str]:
    """Return the layers whose form stores more numbers than the smallest one does."""
    return [
        layer
        for layer, entry in record.get("layers", {}).items()
        if entry["forms"][entry["form"]]["numbers"] > min(cost["numbers"] for cost in entry["forms"].values())
    ]


def explain(record: Mapping[str, Any]) -> str:
    """Return in one sentence how the forms were chosen."""
    where = (
        f" on {record['provider']}, batch {record['batch']}, threads {record['threads']}" if "batch" in record else ""
    )
    return f"Forms of layers: {record['why']}{where}."


def _costs(layer: nn.Module, inputs: Sequence[Tensor]) -> dict[str, dict[str, Any]]:
    """Return what every form of a layer costs in all calls together."""
    return {
        form.name: {"numbers": form.numbers, "flops": sum(form.flops(x.shape) for x in inputs), "ms": None}
        for form in forms_of(layer)
    }


def _cheapest(forms: Mapping[str, Mapping[str, Any]], wish: Wish) -> str:
    keys = ("flops", "numbers") if wish == "auto" else ("numbers", "flops")
    return min(forms, key=lambda form: [forms[form][key] for key in keys])


def _variant(layer: nn.Module, name: str) -> Variant:
    return next(form for form in forms_of(layer) if form.name == name)


def _seen(model: nn.Module, layers: Mapping[str, nn.Module], call: Inputs) -> dict[str, list[Tensor]]:
    """Return the inputs of every call of the layers; of those that are called."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(name, []).append(next(iter((*args, *kwargs.values()))))

    hooks = [
        layer.register_forward_pre_hook(functools.partial(note, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        run(model, call)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: seen[name] for name in layers if name in seen}


def _measured(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    call: Inputs,
    settings: Settings,
    opset: int | None,
    dynamic_batch: bool,
    found: dict[str, dict[str, dict[str, Any]]],
    record: dict[str, Any],
) -> dict[str, str]:
    """Time every form of distinct layers, note the milliseconds in ``found`` and where they were measured in ``record``."""
    load_onnxruntime()
    batch = _batch(call, settings, dynamic_batch)
    inputs = _seen(model, layers, call.resized(batch))
    known: dict[Any, tuple[str, dict[str, float]]] = {}
    chosen = {}
    quiet = not sys.stderr.isatty()
    for name in track(inputs, "Timing forms", console=Console(stderr=True), transient=True, disable=quiet):
        x = max(inputs[name], key=torch.Tensor.numel)
        layer = layers[name]
        forms = sorted(forms_of(layer), key=lambda form: form.numbers)
        key = (repr(layer), isinstance(layer, MPOConv) and repr(dense_spec(layer)), x.shape, x.dtype)
        if key not in known:
            runs, ran = _sessions(forms, x, settings, opset, dynamic_batch)
            record |= {"provider": ran["provider"], "batch": batch, "threads": ran["threads"]}
            known[key] = _fastest(runs)
        chosen[name], times = known[key]
        for form, milliseconds in times.items():
            found[name][form]["ms"] = round(milliseconds, 6)
    return chosen


def _batch(call: Inputs, settings: Settings, dynamic_batch: bool) -> int:
    fixed = None if dynamic_batch and call.batch else call.batch or 1
    if fixed and settings.batch_size not in (None, fixed):
        raise OptionError(
            f"batch_size={settings.batch_size}: the batch of this file is fixed at {fixed}, that of the example. Leave it out or give dynamic_batch."
        )
    return fixed or settings.batch_size or 1


def _sessions(
    forms: Sequence[Variant], x: Tensor, settings: Settings, opset: int | None, dynamic_batch: bool
) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """Export every form as a file of one layer, all by one trace; return what runs it on ``x``, and where."""
    onnx = need("onnx", "Exporting to ONNX")
    together = _Together(forms).eval().requires_grad_(False)
    call, free = read_inputs(together, x), dynamic_batch and x.ndim > 1
    names = [f"form_{number}" for number in range(len(forms))]
    proto = trace(together, widened(call) if free else call, names, opset, free).proto
    runs, ran = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, form in zip(names, forms, strict=True):
            path = Path(folder) / f"{name}.onnx"
            onnx.save_model(_part(proto, name), path, save_as_external_data=True, location=f"{name}.data")
            session = open_session(path, settings.provider, threads=settings.threads)
            if settings.provider == "cuda" and session.provider != CUDA:
                raise RuntimeMissingError(
                    f"form='fastest' shall measure with provider='cuda', but {session.provider} is what ran: "
                    f"{session.complaint or 'this onnxruntime is built without CUDA'}. Run where CUDA loads, with "
                    "lightning-prune[onnxruntime-gpu] installed, or give provider='auto' or 'cpu'."
                )
            runs[form.name] = session.bind(as_arrays(call.tensors))
            ran = {"provider": session.provider, "threads": session.settings["intra_op_threads"]}
    return runs, ran


class _Together(nn.Module):
    """All forms of a layer side by side."""

    def __init__(self, forms: Sequence[Variant]) -> None:
        super().__init__()
        self.forms = nn.ModuleList(form.build() for form in forms)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(form(x) for form in self.forms)


def _part(proto: Any, output: str) -> Any:
    """Return the part of a model that computes one of its outputs."""
    helper = need("onnx", "Exporting to ONNX").helper
    nodes: list[Any] = []
    wanted = {output}
    for node in reversed(proto.graph.node):
        if wanted & set(node.output):
            nodes.insert(0, node)
            wanted |= set(node.input)
    outputs = [value for value in proto.graph.output if value.name == output]
    weights = [tensor for tensor in proto.graph.initializer if tensor.name in wanted]
    graph = helper.make_graph(nodes, output, proto.graph.input, outputs, weights)
    return helper.make_model(
        graph, opset_imports=proto.opset_import, ir_version=proto.ir_version, functions=proto.functions
    )


def _fastest(runs: Mapping[str, Callable[[], object]]) -> tuple[str, dict[str, float]]:
    """Time forms, smallest first, in turn; a later one must be claimed faster than an earlier one.

    Returns:
        The form, and the median milliseconds of all.
    """
    sight = time_round(runs, *_SIGHT)
    bound = _HOPELESS * min(times.min() for times in sight.values())
    race = {name: runs[name] for name, times in sight.items() if times.min() <= bound}
    spent = sum(float(statistics.median(sight[name])) for name in race)
    least, most = _RUNS
    times = time_round(race, 0, min(most, max(least, math.ceil(_MILLISECONDS / max(spent, 1e-6)))))
    best = next(iter(race))
    for name in race:
        if name != best and speedup([times[best]], [times[name]])["low"] > 1 + CLAIM:
            best = name
    return best, {name: float(statistics.median({**sight, **times}[name])) for name in runs}
