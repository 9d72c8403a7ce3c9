"""Run ONNX files with onnxruntime, and know which execution provider really ran.

What onnxruntime reports as available are facts of its build; a CUDA provider that cannot load only writes to the error
stream and the CPU runs instead. So the provider is read back from the session. Settings are fixed: all optimizations,
``intra_op`` threads = physical cores, one ``inter_op`` thread, TF32 off on CUDA. Single nodes that a CUDA session
leaves on the CPU (shape arithmetic) are not told.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from lightning_prune.export.machine import physical_cores
from lightning_prune.export.onnxfile import Port, existing
from lightning_prune.export.optional import EXTRAS
from lightning_prune.export.quiet import native_errors, quiet

from lightning_prune.errors import ExportError, OptionError, RuntimeMissingError

Provider = Literal["auto", "cpu", "cuda"]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_DTYPES = {"float": "float32", "double": "float64"}
_CUDA_OPTIONS = {"use_tf32": "0"}


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime.

    Returns:
        The module.

    Raises:
        RuntimeMissingError: If it is missing or broken, or if both of its distributions are installed.
    """
    names = {(dist.metadata["Name"] or "").lower() for dist in importlib.metadata.distributions()}
    both = sorted(names & {"onnxruntime", "onnxruntime-gpu"})
    if len(both) == 2:
        raise RuntimeMissingError(
            "onnxruntime and onnxruntime-gpu are both installed; they write the same files, and one silently replaces "
            f"the other. Run: pip uninstall -y onnxruntime onnxruntime-gpu, then {EXTRAS}."
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissingError(f"Running an ONNX file needs onnxruntime ({error}). Run: {EXTRAS}.") from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise RuntimeMissingError(
            "onnxruntime is installed but empty, as after removing one of its two distributions. "
            f"Run: pip uninstall -y {' '.join(both) or 'onnxruntime'}, then {EXTRAS}."
        )
    return onnxruntime  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Session:
    """An ONNX file ready to run.

    Attributes:
        path: The file.
        provider: The execution provider that runs it, read back from onnxruntime.
        inputs: What must be fed.
        outputs: Names of the outputs, in the file's order.
        settings: What was set: threads, spinning, optimization, denormals, provider options.
        complaint: What onnxruntime wrote while a provider failed to load; empty if none did.
        inner: The ``onnxruntime.InferenceSession``.
    """

    path: Path
    provider: str
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    settings: Mapping[str, Any]
    complaint: str
    inner: Any = dataclasses.field(repr=False)

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Run the file once.

        Args:
            feeds: An array per input.

        Returns:
            The outputs by name.

        Raises:
            ExportError: If the inputs do not fit, or running fails.
        """
        self.check(feeds)
        with _refusals(self.path):
            results = self.inner.run(list(self.outputs), dict(feeds))
        return dict(zip(self.outputs, results, strict=True))

    def bind(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> Callable[[], object]:
        """Return a function that runs the file once on fixed inputs, for timing.

        On CUDA inputs and outputs stay on the device (IOBinding) and the function waits until the device has finished.

        Args:
            feeds: An array per input.

        Raises:
            ExportError: If the inputs do not fit.
        """
        self.check(feeds)
        fixed = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        if self.provider != CUDA:
            names, run = list(self.outputs), self.inner.run
            return lambda: run(names, fixed)
        runtime = load_onnxruntime()
        binding = self.inner.io_binding()
        for name, array in fixed.items():
            binding.bind_ortvalue_input(name, runtime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
        for name in self.outputs:
            binding.bind_output(name, "cuda", 0)
        binding.synchronize_inputs()

        def on_device() -> None:
            self.inner.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return on_device

    def check(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Check names, element types and sizes of inputs.

        Raises:
            ExportError: If they are not what the file asks for.
        """
        wanted = ", ".join(map(str, self.inputs))
        if set(feeds) != {port.name for port in self.inputs}:
            raise ExportError(
                f"{str(self.path)!r} has the inputs {wanted}; the data gives {', '.join(feeds) or 'none'}."
            )
        for port in self.inputs:
            array = feeds[port.name]
            fits = len(port.shape) == array.ndim and all(
                not isinstance(size, int) or size == given for size, given in zip(port.shape, array.shape, strict=True)
            )
            if not fits or port.dtype != str(array.dtype):
                raise ExportError(
                    f"{str(self.path)!r} has the input {port}; the data gives {array.dtype} {list(array.shape)}. "
                    "Change the dataset, or export with inputs like its own."
                )


def open_session(
    path: str | os.PathLike[str], provider: Provider = "auto", *, require_gpu: bool = False, threads: int | None = None
) -> Session:
    """Load an ONNX file.

    Args:
        path: The file.
        provider: ``"cuda"`` and ``"auto"`` try CUDA first and take the CPU where it cannot load, ``"cpu"`` never tries.
        require_gpu: Whether anything but CUDA is an error.
        threads: Threads inside an operator; None takes the number of physical cores.

    Returns:
        The session. Its ``provider`` is the one that really runs.

    Raises:
        ExportError: If the file is missing, truncated, or cannot be run.
        OptionError: If ``provider`` is unknown or rules out ``require_gpu``.
        RuntimeMissingError: If there is no usable onnxruntime, or no CUDA where it is required.
    """
    if provider not in ("auto", "cpu", "cuda"):
        raise OptionError(f"provider is 'auto', 'cpu' or 'cuda'; got {provider!r}.")
    if require_gpu and provider == "cpu":
        raise OptionError("require_gpu and provider 'cpu' contradict each other. Drop one of them.")
    path = existing(path)
    runtime = load_onnxruntime()
    wanted: list[Any] = [CPU]
    if provider != "cpu" and CUDA in runtime.get_available_providers():
        wanted = [(CUDA, _CUDA_OPTIONS), CPU]
    options = _options(runtime, threads or physical_cores())
    with native_errors() as complaints, quiet(), _refusals(path):
        if len(wanted) > 1 and hasattr(runtime, "preload_dlls"):
            runtime.preload_dlls()
        inner = runtime.InferenceSession(str(path), sess_options=options, providers=wanted)
    ran = str(inner.get_providers()[0])
    complaint = _first_complaint(complaints) if ran == CPU and len(wanted) > 1 else ""
    if require_gpu and ran != CUDA:
        raise RuntimeMissingError(
            f"A GPU is required, but {ran} is what ran {str(path)!r}: "
            f"{complaint or 'this onnxruntime is built without CUDA'}. Run on a machine with an NVIDIA GPU, its driver "
            "and CUDA, with lightning-prune[onnxruntime-gpu] installed, or drop require_gpu."
        )
    return Session(
        path=path,
        provider=ran,
        inputs=tuple(Port(value.name, _dtype(value.type), tuple(value.shape)) for value in inner.get_inputs()),
        outputs=tuple(value.name for value in inner.get_outputs()),
        settings=_settings(options, ran),
        complaint=complaint,
        inner=inner,
    )


def _options(runtime: ModuleType, threads: int) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    # Without it the threads of one session spin on while the next one is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.set_denormal_as_zero", "0")
    return options


def _settings(options: Any, provider: str) -> dict[str, Any]:
    return {
        "intra_op_threads": options.intra_op_num_threads,
        "inter_op_threads": options.inter_op_num_threads,
        "spinning": "while a run lasts",
        "optimization": "all",
        "denormals": "computed, not flushed to zero",
        **({"io_binding": True, **_CUDA_OPTIONS} if provider == CUDA else {"io_binding": False}),
    }


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turn onnxruntime's errors, which share no base class, into one line."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    kinds: tuple[type[Exception], ...] = (RuntimeError, ValueError, *found)
    try:
        yield
    except kinds as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"onnxruntime cannot run {str(path)!r}: {reason.strip()} Export it again.") from error


def _first_complaint(lines: list[str]) -> str:
    """Return the message of onnxruntime's first error line, without time, source position and library path."""
    line = next((line for line in lines if "rror" in line), "the CUDA provider did not load")
    return line.rpartition("] ")[2].rpartition("with error: ")[2].strip(" .")


def _dtype(text: str) -> str:
    """Turn ``tensor(float)`` into NumPy's ``float32``."""
    inside = text.removeprefix("tensor(").removesuffix(")")
    return _DTYPES.get(inside, inside)
