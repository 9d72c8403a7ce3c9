"""Trace a torch model into an ONNX graph: the one place that drives torch's exporter.

torch.onnx.export (dynamo), step by step: trace without optimization, note which parameters every value comes from,
optimize, unify equal weights, strip whatever depends on the machine.
"""

import dataclasses
import re
from typing import Any

import torch
from lightning_prune.export.inputs import Inputs
from lightning_prune.export.numbers import Sources, Stored, trace_sources
from lightning_prune.export.onnxfile import opset_of
from lightning_prune.export.optional import need
from lightning_prune.export.quiet import quiet
from lightning_prune.export.twin import untouched_rng
from torch import nn

from lightning_prune.errors import ExportError

# What the exporter raises on a model that it cannot export, beside its own OnnxExporterError (a RuntimeError).
_REFUSALS = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    NotImplementedError,
    KeyError,
    IndexError,
    AssertionError,
)
_USER_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \w+\n\s*(?P<code>[^\n]+)')
_SUMMARY = re.compile(r"<class '[\w.]*?(?P<kind>\w+)'>: (?P<text>[^\n]+)")


@dataclasses.dataclass(frozen=True)
class Graph:
    """An exported model in memory.

    Attributes:
        proto: ``onnx.ModelProto`` without metadata.
        stored: Its tensors of floats with the parameters they come from.
    """

    proto: Any
    stored: tuple[Stored, ...]


def trace(twin: nn.Module, inputs: Inputs, outputs: list[str], opset: int | None, dynamic_batch: bool) -> Graph:
    """Export a model to an ONNX graph in memory.

    Args:
        twin: The model on the CPU in eval mode; it may be changed.
        inputs: The call to trace.
        outputs: Names for its outputs.
        opset: Version of the operator set; None takes the exporter's default.
        dynamic_batch: Whether the batch dimension is free.

    Returns:
        The graph, optimized and stripped.

    Raises:
        ExportError: If the exporter refuses the model or the opset.
        RuntimeMissingError: If onnx or onnxscript is not installed.
    """
    for name in ("onnx", "onnxscript", "onnx_ir"):
        need(name, "Exporting to ONNX")
    from onnx_ir import serde
    from onnx_ir.passes.common import DeduplicateInitializersPass

    names = [name for name, _ in (*twin.named_parameters(remove_duplicate=False), *twin.named_buffers())]
    try:
        with quiet(), untouched_rng(), torch.no_grad():
            program = torch.onnx.export(
                twin,
                inputs.args,
                kwargs=inputs.kwargs,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=inputs.dynamic_shapes() if dynamic_batch and inputs.batch else None,
                input_names=list(inputs.tensors),
                output_names=outputs,
                optimize=False,
                verbose=False,
            )
            if program is None:
                raise RuntimeError("the exporter returned nothing")
            sources = trace_sources(program.model.graph, names)
            program.optimize()
            DeduplicateInitializersPass()(program.model)
            proto = serde.serialize_model(program.model)
    except _REFUSALS as error:
        raise ExportError(f"{type(twin).__name__} cannot be exported to ONNX: {_explain(error)}") from error
    if opset is not None and opset_of(proto) != opset:
        raise ExportError(
            f"Opset {opset} was asked for, but the exporter could only write opset {opset_of(proto)}. "
            "Ask for 18 or later, or leave it out."
        )
    if [value.name for value in proto.graph.input] != list(inputs.tensors):
        raise ExportError(
            f"{type(twin).__name__}.forward returns one of its inputs unchanged, which the exporter renames. "
            "Leave it out of what forward returns."
        )
    strip(proto)
    return Graph(proto, _stored(program.model.graph, sources))


def strip(proto: Any) -> None:
    """Remove what the exporter notes beside the graph: source paths, stack traces, class names. In place."""
    proto.doc_string = ""
    del proto.metadata_props[:]
    for function in proto.functions:
        _strip_nodes(function)
    _strip_graph(proto.graph)


def _strip_graph(graph: Any) -> None:
    for part in (*graph.initializer, *graph.value_info, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    _strip_nodes(graph)


def _strip_nodes(owner: Any) -> None:
    owner.doc_string = ""
    del owner.metadata_props[:]
    for node in owner.node:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            attribute.doc_string = ""
            for subgraph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _strip_graph(subgraph)


def _stored(graph: Any, sources: Sources) -> tuple[Stored, ...]:
    """List the tensors of floats in the optimized graph.

    A value that the optimizer renamed has unknown sources; a single number is a constant of its rewriting.
    """
    found = []
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point() or (name not in sources and tensor.size == 1):
            continue
        found.append(Stored(name, tuple(tensor.shape.numpy()), tensor.size, sources.get(name)))
    return tuple(found)


def _explain(error: BaseException) -> str:
    """One line from what the exporter says: the first cause, and the line of the user's code where it is known."""
    text = str(error)
    summary = _SUMMARY.search(text)
    reason = (
        summary["text"] if summary else next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    )
    reason = re.sub(r"\x1b\[\d*m", "", reason).strip().rstrip(".")
    lines = [match for match in _USER_LINE.finditer(text) if "/torch/" not in match["file"].replace("\\", "/")]
    if not lines:
        return f"{reason}. The model's forward must be traceable by torch.export."
    last = lines[-1]
    return f"{reason}. It comes from {last['file']}, line {last['line']}: {last['code'].strip()}"
