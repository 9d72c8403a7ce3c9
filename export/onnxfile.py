"""Read what an ONNX file says about itself, without running it: ports, opset, numbers stored, plan, provenance.

Our metadata is one entry, ``lightning_prune``, of the model's ``metadata_props``: JSON with ``version``, ``plan`` (the
plan's JSON), ``provenance``, ``parameters``, ``buffers``, ``flops`` (total, batch of the example), ``forms``
(:func:`lightning_prune.export.forms.choose`), ``entropies`` (:mod:`lightning_prune.export.entanglement`; only with such layers) and
``graph`` (SHA-256 of everything but the metadata).
"""

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from lightning_prune.export.optional import need

from lightning_prune.errors import ExportError, PlanError
from lightning_prune.structure.plan import Plan

KEY = "lightning_prune"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output of a file.

    Attributes:
        name: Its name.
        dtype: NumPy's name of the element type, e.g. ``"float32"``.
        shape: Sizes; a text is the name of a free dimension, None one without name.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join('?' if d is None else str(d) for d in self.shape)}]"


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """What an ONNX file says about itself.

    Attributes:
        path: The file.
        bytes: Its size, external data included.
        opset: Version of the standard operator set.
        inputs: What must be fed.
        outputs: What comes back, in order.
        numbers: Floating-point numbers stored in the graph.
        metadata: Our metadata; empty if another tool wrote the file.
        unchanged: Whether the graph is the one that was exported; None without our metadata.
    """

    path: Path
    bytes: int
    opset: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    numbers: int
    metadata: dict[str, Any]
    unchanged: bool | None

    @property
    def plan(self) -> Plan | None:
        """The plan that the model was built by; None if it carried none.

        Raises:
            ExportError: If the plan in the file is broken.
        """
        if not self.metadata.get("plan"):
            return None
        try:
            return Plan.from_json(json.dumps(self.metadata["plan"]))
        except PlanError as error:
            raise ExportError(f"The plan in {str(self.path)!r} is broken: {error}") from error

    @property
    def parameters(self) -> int:
        """Number of the model's parameters; where another tool wrote the file, of the numbers stored."""
        return int(self.metadata.get("parameters", self.numbers))

    @property
    def unmasked(self) -> int:
        """Number of the model's parameters that no mask of its plan holds at zero."""
        return int(self.metadata.get("unmasked", self.parameters))

    @property
    def flops(self) -> float | None:
        """Multiply-adds per example as counted at export; None if unknown."""
        counted = self.metadata.get("flops")
        return counted["total"] / counted["batch"] if counted else None


def read_onnx(path: str | os.PathLike[str]) -> OnnxFile:
    """Read an ONNX file.

    Args:
        path: The file.

    Returns:
        What it says about itself.

    Raises:
        ExportError: If it is missing, a folder, truncated or no ONNX model.
        RuntimeMissingError: If onnx is not installed.
    """
    path = existing(path)
    proto = _parse(path)
    initializers = {tensor.name for tensor in proto.graph.initializer}
    floats = (tensor for tensor in initializer_protos(proto.graph) if is_float(tensor.data_type))
    metadata = _read_metadata(path, proto)
    return OnnxFile(
        path=path,
        bytes=path.stat().st_size + sum(file.stat().st_size for file in external_files(path, proto)),
        opset=opset_of(proto),
        inputs=tuple(_port(value) for value in proto.graph.input if value.name not in initializers),
        outputs=tuple(_port(value) for value in proto.graph.output),
        numbers=sum(math.prod(tensor.dims) for tensor in floats),
        metadata=metadata,
        unchanged=graph_digest(proto) == metadata["graph"] if "graph" in metadata else None,
    )


def existing(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` if a file is there.

    Raises:
        ExportError: If not.
    """
    path = Path(path)
    if path.is_dir():
        raise ExportError(f"{str(path)!r} is a folder. Give the name of an ONNX file.")
    if not path.is_file():
        raise ExportError(
            f"There is no ONNX file {str(path)!r}. Write one with export_onnx or `lightning-prune export`."
        )
    return path


def opset_of(proto: Any) -> int:
    """Return the version of the standard operator set that a model asks for."""
    return next((int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)


def graph_digest(proto: Any) -> str:
    """Return the SHA-256 of a model without its metadata, hexadecimal; of external data, the location counts."""
    bare = type(proto)()
    bare.CopyFrom(proto)
    del bare.metadata_props[:]
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def initializer_protos(graph: Any) -> list[Any]:
    """Return every tensor stored in a graph: initializers and constants of nodes, those of subgraphs included."""
    found = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                found.append(attribute.t)
            for subgraph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                found += initializer_protos(subgraph)
    return found


def is_float(data_type: int) -> bool:
    """Whether an ONNX element type is a floating-point one."""
    onnx = need("onnx", "Reading an ONNX file")
    return data_type in (
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
    )


def external_files(path: Path, proto: Any) -> list[Path]:
    """Return the files beside ``path`` that hold its weights.

    Raises:
        ExportError: If one is missing.
    """
    stored = (tensor for tensor in initializer_protos(proto.graph) if tensor.external_data)
    names = {entry.value for tensor in stored for entry in tensor.external_data if entry.key == "location"}
    files = [path.parent / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise ExportError(
                f"{str(path)!r} keeps its weights in {str(file)!r}, which is missing. Keep both together."
            )
    return files


def _parse(path: Path) -> Any:
    onnx = need("onnx", "Reading an ONNX file")
    decode_error = need("google.protobuf.message", "Reading an ONNX file").DecodeError
    try:
        proto = onnx.load_model(path, load_external_data=False)
    except decode_error as error:
        raise ExportError(
            f"{str(path)!r} is no whole ONNX file ({path.stat().st_size:,} bytes). Export it again."
        ) from error
    except OSError as error:
        raise ExportError(f"Cannot read {str(path)!r}: {error.strerror or error}.") from error
    if not proto.graph.node or not opset_of(proto):
        raise ExportError(f"{str(path)!r} holds no ONNX graph ({path.stat().st_size:,} bytes). Export it again.")
    return proto


def _read_metadata(path: Path, proto: Any) -> dict[str, Any]:
    text = next((entry.value for entry in proto.metadata_props if entry.key == KEY), "{}")
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError as error:
        raise ExportError(f"The metadata {KEY!r} in {str(path)!r} is not JSON: {error}.") from error
    if not isinstance(metadata, dict) or metadata.get("version", VERSION) != VERSION:
        found = metadata.get("version") if isinstance(metadata, dict) else type(metadata).__name__
        raise ExportError(f"The metadata {KEY!r} in {str(path)!r} has version {found!r}; this release reads {VERSION}.")
    return metadata


def _port(value: Any) -> Port:
    onnx = need("onnx", "Reading an ONNX file")
    tensor = value.type.tensor_type
    sizes = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim]
    kind = "?" if tensor.elem_type == 0 else str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return Port(value.name, kind, tuple(sizes))
