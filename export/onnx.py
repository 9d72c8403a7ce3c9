"""Write a model as one ONNX file that is shown to be right before it gets its name.

``export_onnx`` traces a copy of the model, writes the plan and the provenance into the file's metadata, and checks:
the opset that was asked for, the ONNX checker, factorized layers still factorized, and with onnxruntime installed the
outputs against torch, on the example inputs and at another batch size. Only then the file appears under its name. The
same model and versions give the same
bytes: no times, no paths.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_prune.export.entanglement import entropies_of
from lightning_prune.export.forms import Settings, Wish, choose, grown
from lightning_prune.export.graph import Graph, trace
from lightning_prune.export.inputs import Inputs, read_inputs, read_outputs, widened
from lightning_prune.export.numbers import check_numbers
from lightning_prune.export.onnxfile import KEY, VERSION, OnnxFile, graph_digest, initializer_protos, read_onnx
from lightning_prune.export.optional import need, version_of
from lightning_prune.export.outputs import Arrays, Comparison, as_arrays, non_finite, rounding
from lightning_prune.export.quiet import quiet
from lightning_prune.export.runtime import Provider, open_session
from lightning_prune.export.twin import cpu_twin, run, untouched_rng
from torch import nn

import lightning_prune
from lightning_prune.errors import ExportError, ModelError, OptionError
from lightning_prune.files import whole_file
from lightning_prune.flops import count_flops
from lightning_prune.structure.calls import Call
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.masks import cut_masks
from lightning_prune.structure.plan import Plan

logger = logging.getLogger(__name__)

ONE_FILE_BYTES = 2**31 - 2**20  # protobuf's bound of 2 GiB, less what the graph itself takes
OLDEST_OPSET = 17  # the exporter writes 18 and converts; some models come down to 17
_MIN_EXTERNAL_BYTES = 1024
_ALIGNMENT = 64
_OTHER_BATCH = 5
_RUNTIMES = ("onnxruntime-gpu", "onnxruntime")


@dataclasses.dataclass(frozen=True)
class ExportedFile:
    """What was written.

    Attributes:
        path: The ONNX file.
        bytes: Its size, external data included.
        opset: Version of the operator set.
        inputs: Names of the inputs, in order.
        outputs: Names of the outputs, in order.
        dynamic_batch: Whether the batch dimension is free.
        parameters: Number of the model's parameters.
        numbers: Floating-point numbers stored in the file.
        flops: Multiply-adds per example; None if they could not be counted.
        difference: Largest difference to torch, relative to the output's largest value; None if onnxruntime is not
            installed.
        forms: The form of every layer that has several.
    """

    path: Path
    bytes: int
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_batch: bool
    parameters: int
    numbers: int
    flops: float | None
    difference: float | None
    forms: dict[str, str]


def check_opset(opset: object) -> None:
    """Check that there is such a version of the operator set.

    Args:
        opset: The version, or None for the exporter's default.

    Raises:
        OptionError: If it is no integer, older than any that the exporter writes, or newer than the installed onnx knows.
    """
    newest = need("onnx", "Exporting to ONNX").defs.onnx_opset_version()
    if opset is not None and (type(opset) is not int or not OLDEST_OPSET <= opset <= newest):
        raise OptionError(
            f"opset is a whole number from {OLDEST_OPSET} to {newest}, such as 18, or None; got {opset!r}."
        )


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    provenance: Mapping[str, Any] | None = None,
    tolerance: float = 1e-5,
    form: Wish = "auto",
    provider: Provider = "auto",
    batch_size: int | None = None,
    threads: int | None = None,
) -> ExportedFile:
    """Write ``model`` as an ONNX file.

    The model is left bit-identical. It is exported in eval mode through its ``forward``, on the CPU, from any device.
    The batch dimension, dimension 0 of every input that has the batch's size there, is named ``batch``. Up to 2 GiB
    the weights are inside the file; beyond that they stand in ``<stem>-<digest>.data`` beside it, and the two belong
    together.

    Args:
        model: Any module; a LightningModule as it is.
        path: The file to write; a file that is there is replaced only by a whole and checked one.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments; None takes the
            model's ``example_input_array``. One example is enough.
        opset: Version of the ONNX operator set; None takes the exporter's default.
        dynamic_batch: Whether any number of examples can be fed; False fixes the example's.
        provenance: Whatever shall be known about the model later, in JSON types; versions are added.
        tolerance: Largest difference to torch, relative to the output's largest value, beyond what rounding explains.
        form: Which of its exact forms (:mod:`lightning_prune.export.forms`) every factorized, rotated or tensorized layer takes in the file:
            ``"auto"`` the one with the fewest multiply-adds for the example, ``"smallest"`` with the fewest numbers, ``"fastest"`` the one
            that a clock finds fastest; a larger one only where it is faster by more than 5 %. Only of ``"fastest"`` the bytes may differ.
        provider: Where ``"fastest"`` measures: ``"auto"`` takes CUDA where it loads, ``"cuda"`` insists on it, ``"cpu"`` never tries.
        batch_size: At which batch it does; None takes 1, or the example's with ``dynamic_batch=False``.
        threads: With how many threads; None takes the number of physical cores.

    Returns:
        What was written.

    Raises:
        ExportError: If the model cannot be exported, its outputs are not finite, or the file would not be right.
        OptionError: If an argument is of the wrong type, or ``path`` cannot be written.
        RuntimeMissingError: If onnx or onnxscript is not installed, or ``"fastest"`` lacks onnxruntime or the CUDA that ``provider`` names.
    """
    check_opset(opset)
    settings = Settings(form, provider, batch_size, threads)
    call = read_inputs(model, example_inputs)
    twin = cpu_twin(model)
    call = call.map(lambda tensor: tensor.detach().cpu().clone())
    traced = widened(call) if dynamic_batch else call
    names = list(_expected(twin, traced, "the example inputs"))
    formed, forms = choose(twin, call, settings, opset, dynamic_batch)
    graph = trace(cpu_twin(formed), traced, names, opset, dynamic_batch)
    plan = plan_of(model)
    thin = [step.module for step in plan.steps if step.replaces]
    check_numbers(graph.stored, formed, {*thin, *forms.get("layers", ())})
    metadata = _metadata(twin, plan, provenance) | {"flops": _flops(formed, call), "forms": forms}
    with _written(graph, metadata, Path(path)) as beside:
        _check(beside)
        batches = [traced, *([_perturbed(traced)] if dynamic_batch and traced.batch else [])]
        difference = _compare(beside, twin, batches, tolerance)
    written = read_onnx(path)
    _warn_of_growth(written)
    return ExportedFile(
        path=written.path,
        bytes=written.bytes,
        opset=written.opset,
        inputs=tuple(port.name for port in written.inputs),
        outputs=tuple(port.name for port in written.outputs),
        dynamic_batch=dynamic_batch and traced.batch is not None,
        parameters=written.parameters,
        numbers=written.numbers,
        flops=written.flops,
        difference=difference,
        forms={name: layer["form"] for name, layer in forms.get("layers", {}).items()},
    )


def _metadata(twin: nn.Module, plan: Plan, provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    versions = {name: version_of(name) for name in ("torch", "onnx", "onnxscript")}
    given = {"lightning_prune": lightning_prune.__version__, **versions, **(provenance or {})}
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OptionError(f"provenance holds JSON types only: {error}.") from error
    parameters = sum(parameter.numel() for parameter in twin.parameters())
    entropies = entropies_of(twin.named_modules())
    masked = sum(int((~mask).sum()) for mask in cut_masks(twin, plan).values()) if plan else 0
    return {
        "version": VERSION,
        "plan": json.loads(plan.to_json()) if plan else None,
        "provenance": given,
        "model": type(twin).__name__,
        "parameters": parameters,
        "unmasked": parameters - masked,
        "buffers": sum(buffer.numel() for buffer in twin.buffers()),
        **({"entropies": entropies} if entropies else {}),
    }


def _warn_of_growth(written: OnnxFile) -> None:
    """Log a line where the forms of layers are why a file stores more numbers than its model has parameters."""
    forms = written.metadata["forms"]
    larger = grown(forms)
    if larger and written.numbers > written.parameters:
        logger.warning(
            "%s stores %s numbers for the %s parameters of its model: form=%r (%s) exports %d of %d layers in a larger form, "
            "%d of them dense. For the fewest numbers give form='smallest'.",
            written.path,
            f"{written.numbers:,}",
            f"{written.parameters:,}",
            forms["asked"],
            forms["why"],
            len(larger),
            len(forms["layers"]),
            sum(forms["layers"][name]["form"] == "dense" for name in larger),
        )


def _flops(twin: nn.Module, call: Inputs) -> dict[str, Any] | None:
    """Count multiply-adds; a model that the counter cannot trace is exported all the same."""
    try:
        with quiet(), untouched_rng():
            counted = count_flops(twin, Call("", call.args, call.kwargs))
    except ModelError as error:
        logger.warning("FLOPs are missing in the file: %s", error)
        return None
    return {"total": counted.total, "batch": call.batch or 1, "uncounted": sorted(counted.uncounted)}


@contextlib.contextmanager
def _written(graph: Graph, metadata: dict[str, Any], path: Path) -> Iterator[Path]:
    """Write beside ``path``, yield that file for checking, and rename it to ``path`` when the block ends well."""
    onnx = need("onnx", "Exporting to ONNX")
    proto = graph.proto
    size = sum(len(tensor.raw_data) for tensor in initializer_protos(proto.graph))
    outside = size > ONE_FILE_BYTES
    with contextlib.ExitStack() as files:
        beside = files.enter_context(whole_file(path))
        if outside:
            digest = hashlib.sha256(b"".join(_digest(t) for t in initializer_protos(proto.graph))).hexdigest()[:16]
            data = path.with_name(f"{path.stem}-{digest}.data")
            with whole_file(data) as beside_data:
                _move_weights(proto, beside_data, data.name)
        metadata = metadata | {"graph": graph_digest(proto)}
        onnx.helper.set_model_props(proto, {KEY: json.dumps(metadata, sort_keys=True, allow_nan=False)})
        beside.write_bytes(proto.SerializeToString(deterministic=True))
        yield beside


def _digest(tensor: Any) -> bytes:
    return hashlib.sha256(tensor.raw_data).digest()


def _move_weights(proto: Any, file: Path, location: str) -> None:
    """Write the raw bytes of every stored tensor to ``file`` and leave a reference to ``location`` in the graph."""
    onnx = need("onnx", "Exporting to ONNX")
    with file.open("wb") as stream:
        for tensor in initializer_protos(proto.graph):
            if len(tensor.raw_data) < _MIN_EXTERNAL_BYTES:
                continue
            stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
            entries = {"location": location, "offset": stream.tell(), "length": len(tensor.raw_data)}
            stream.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))


def _check(path: Path) -> None:
    onnx = need("onnx", "Exporting to ONNX")
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"The ONNX checker refuses the exported graph: {str(error).splitlines()[0]}") from error


def _compare(path: Path, twin: nn.Module, batches: list[Inputs], tolerance: float) -> float | None:
    """Run the file on the CPU beside torch; return the largest relative difference, None without onnxruntime."""
    if not any(version_of(name) for name in _RUNTIMES):
        logger.warning("onnxruntime is not installed: the outputs of the ONNX file were not compared with torch.")
        return None
    try:
        session = open_session(path, "cpu")
    except ExportError as error:
        if not _is_half(twin):
            raise
        logger.warning("The outputs of the ONNX file were not compared with torch: %s", error)
        return None
    worst = 0.0
    for number, inputs in enumerate(batches):
        where = "the example inputs" if number == 0 else f"{inputs.batch} examples instead of {batches[0].batch}"
        comparison, expected = Comparison(tolerance), _expected(twin, inputs, where)
        comparison.add(expected, session.run(as_arrays(inputs.tensors)))
        comparison.allow(rounding(twin, inputs, expected))
        records = comparison.records()
        worst = max([worst, *(record.relative for record in records)])
        wrong = [record.explain() for record in records if record.verdict != "rounding noise"]
        if wrong:
            raise ExportError(
                f"The ONNX file differs from torch on {where}: {'; '.join(wrong)}. "
                "Look in forward for random numbers, and for Python numbers, which are frozen at export; nothing was written."
            )
    return worst


def _expected(twin: nn.Module, inputs: Inputs, where: str) -> Arrays:
    """Return the outputs of torch.

    Raises:
        ExportError: If they are not finite: no file could be judged by them.
    """
    outputs = as_arrays(read_outputs(run(twin, inputs), inputs.tensors, type(twin).__name__))
    broken = {name: count for name, array in outputs.items() if (count := non_finite(array))}
    if broken:
        told = ", ".join(f"{count:,} of {outputs[name].size:,} in output {name!r}" for name, count in broken.items())
        raise ExportError(
            f"{type(twin).__name__} returns values that are not finite for {where}: {told}. "
            "Its training may have diverged: look at its loss and weights, and export a model from before; nothing was written."
        )
    return outputs


def _is_half(twin: nn.Module) -> bool:
    """Whether the model holds a type for which onnxruntime lacks operators on the CPU."""
    return any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in twin.parameters())


def _perturbed(inputs: Inputs) -> Inputs:
    """Return other values at another batch size: rows in reverse order, floats a tenth smaller: ranges still hold."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        turned = tensor.flip(0) if inputs.is_batched(tensor) else tensor
        return turned * 0.9 if tensor.is_floating_point() else turned

    return inputs.map(change).resized(_OTHER_BATCH if inputs.batch != _OTHER_BATCH else _OTHER_BATCH + 1)
