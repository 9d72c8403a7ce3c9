"""A call of a model as a graph of torch operations, exported with fake tensors: nothing is computed, no memory is taken."""

import contextlib
import dataclasses
import inspect
import io
import linecache
import logging
import traceback
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from lightning_prune.errors import ModelError
from lightning_prune.structure.calls import Call, signature
from lightning_prune.structure.preserve import preserved

_FOREIGN = ("/torch/", "/pytorch_lightning/", "/lightning/", "/lightning_fabric/", "/lightning_prune/structure/")


@dataclasses.dataclass(frozen=True)
class Program:
    """One call as a graph.

    Attributes:
        graph: The graph; placeholders first, the outputs last.
        module: Holds the graphs of nested regions, by name.
        tensors: Name in the model of every placeholder that is a parameter or buffer.
        call: What was traced.
        training: Whether it was traced in train mode.
    """

    graph: fx.Graph
    module: nn.Module
    tensors: Mapping[str, str]
    call: Call
    training: bool


def export(model: nn.Module, call: Call, training: bool = False) -> Program:
    """Export one call; the model is left as it is.

    Args:
        model: The model, any device.
        call: What to run; its inputs may be on any device.
        training: Whether to trace in train mode.

    Raises:
        ModelError: If ``torch.export`` refuses; with its reason and the line of the user's code.
    """
    prefix = f"{call.module}." if call.module else ""
    names = {id(t): name for name, t in [*reversed(list(_tensors(model)))]}
    target = model.get_submodule(call.module)
    with preserved(model, mode="train" if training else "eval"), _undisturbed():
        try:
            exported = torch.export.export(target, call.args, dict(call.kwargs), strict=False)
        except Exception as error:
            raise _refusal(model, call, error) from error
    known = dict(_tensors(model))
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    tensors = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind in kinds and spec.target is not None:
            name = f"{prefix}{spec.target}"
            tensors[spec.arg.name] = names.get(id(known.get(name)), name)
    exported.graph_module.graph.eliminate_dead_code(_acts)  # attention weights that nobody reads would hold the heads
    return Program(exported.graph_module.graph, exported.graph_module, tensors, call, training)


def _acts(node: fx.Node) -> bool:
    """Tell whether a node does more than to return something: a region may write in place."""
    return node.is_impure() or isinstance(node.target, torch._ops.HigherOrderOperator)


def bias_uses(program: Program) -> dict[str, set[tuple[str, ...]]]:
    """Return what every bias of a graph is a bias of, by its name: the name of the weight; nothing for any other use."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for node in program.graph.nodes:
        name = program.tensors.get(node.name)
        for user in node.users if name is not None else ():
            args = user.args
            weight = args[1] if len(args) > 2 and args[2] is node and args[1] is not node else None
            known = program.tensors.get(weight.name) if isinstance(weight, fx.Node) else None
            found.setdefault(str(name), set()).add(() if known is None else (known,))
    return found


def reads_training(model: nn.Module) -> bool:
    """Tell whether code of the model's own looks at ``self.training``, so that train mode may run other operations than eval mode."""
    return any("training" in _names_in(kind) for kind in {type(module) for module in model.modules()})


def _names_in(kind: type) -> set[str]:
    found: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.split(".")[0] in ("torch", "builtins", "pytorch_lightning", "lightning", "lightning_fabric"):
            continue
        for member in vars(base).values():
            function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
            stack = [getattr(function, "__code__", None)]
            while stack:
                code = stack.pop()
                if inspect.iscode(code):
                    found.update(code.co_names)
                    stack += [c for c in code.co_consts if inspect.iscode(c)]
    return found


def location(node: fx.Node) -> tuple[str, str]:
    """Return file and line of the user's code that made a node, and the code itself; empty where there is none: modules of torch in a row."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    frames = [(i, line.strip()) for i, line in enumerate(lines) if line.strip().startswith("File ")]
    own = [item for item in frames if not any(part in item[1] for part in _FOREIGN)]
    if not own:
        return "", ""
    index, frame = own[-1]
    path, number = frame.split('"')[1], frame.split("line ")[1].split(",")[0]
    code = lines[index + 1].strip() if index + 1 < len(lines) else ""
    return f"{path.replace(chr(92), '/').rsplit('/', 1)[-1]}:{number}", code


def owner(node: fx.Node, prefix: str, known: Container[str]) -> str:
    """Return the name of the innermost module of the model, one of ``known``, whose code made a node."""
    for path, _ in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        inner = path.removeprefix("L['self']").removeprefix(".")
        name = f"{prefix}.{inner}".strip(".")
        if name in known:
            return name
    return prefix


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the exporter's chatter away, and torch's fused attention, which hides the heads."""
    fast = torch.backends.mha.get_fastpath_enabled()
    logger = logging.getLogger("torch")
    level = logger.level
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        logger.setLevel(logging.CRITICAL)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield  # what the user's forward prints, it prints when it runs; a refusal prints graphs
    finally:
        logger.setLevel(level)
        torch.backends.mha.set_fastpath_enabled(fast)


def _refusal(model: nn.Module, call: Call, error: Exception) -> ModelError:
    name = type(model).__name__ + (f".{call.module}" if call.module else "")
    where = line_of(error)
    at = f" at {where}" if where else ""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ModelError(
        f"{name} cannot be traced{at}: {type(error).__name__}: {reason.rstrip('.')}. torch.export must be able to follow its forward "
        f"with the example inputs {signature([call])}: no branch on values of tensors, no .item(); or give the submodules that can be "
        "traced as a list of Call(name, args)."
    )


def line_of(error: BaseException) -> str:
    """Return file and line of the user's code where ``error`` came up, and the code itself; empty if none of it is the user's."""
    return lines_of(error)[1]


def lines_of(error: BaseException) -> tuple[str, str]:
    """Return two lines of the user's code on the way to ``error``: of the innermost ``forward``, and where it came up; empty if there is none.

    A graph knows the former alone (:func:`location`): functions that ``forward`` calls leave no trace in it.
    """
    own = [f for f in traceback.extract_tb(error.__traceback__) if not any(part in f.filename for part in _FOREIGN)]
    forwards = [frame for frame in own if frame.name == "forward"]
    return _written(forwards), _written(own)


def _written(frames: Sequence[traceback.FrameSummary]) -> str:
    if not frames:
        return ""
    last = frames[-1]
    return f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno} `{linecache.getline(last.filename, last.lineno or 0).strip()}`"
