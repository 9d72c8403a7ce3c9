"""How many numbers an ONNX graph stores, and whether constant folding multiplied small factors into one large weight.

The exporter's optimizer computes whatever does not depend on the inputs. For a layer written as ``linear(x, a @ b)``
that turns ``2 n r`` numbers into ``n * n``: the compression is lost in the file while torch still shows it. Each
stored tensor is traced back to the parameters it was computed from; it may not hold more numbers than they do.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_prune.errors import ExportError

_ALLOWED_SHARE = 0.05  # growth by tables that are gathered or expanded, e.g. relative positions
_ALLOWED_NUMBERS = 64
_SHAPE_ONLY = frozenset({"Shape", "Size"})

Sources = Mapping[str, frozenset[str]]


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of floats in the file.

    Attributes:
        name: Its name in the graph.
        shape: Its shape.
        numbers: Number of elements.
        sources: Names of the parameters and buffers it was computed from; None if unknown.
    """

    name: str
    shape: tuple[int, ...]
    numbers: int
    sources: frozenset[str] | None


def trace_sources(graph: Any, names: Iterable[str]) -> Sources:
    """Find for every value of an unoptimized graph the parameters it depends on.

    Args:
        graph: ``onnx_ir.Graph``, its initializers named as in the model.
        names: Names of the model's parameters and buffers.

    Returns:
        Parameter names by value name. A value computed from shapes alone depends on none.
    """
    known = set(names)
    sources = {name: frozenset({name} & known) for name in graph.initializers}
    for node in graph:
        inputs = () if node.op_type in _SHAPE_ONLY else (value for value in node.inputs if value is not None)
        together = frozenset().union(*(sources.get(value.name, frozenset()) for value in inputs))
        sources |= {value.name: together for value in node.outputs}
    return sources


def check_numbers(stored: Iterable[Stored], model: nn.Module, factorized: Iterable[str] = ()) -> None:
    """Check that factorized weights are still factorized in the file.

    Args:
        stored: The tensors of floats in the optimized graph.
        model: The model they come from.
        factorized: Names of the modules that a plan factorized; nothing made from their weights may grow at all.

    Raises:
        ExportError: If the file holds more numbers than the model's parameters and buffers, copies of one weight for
            several uses and constants of ``forward`` aside, by more than 5 % and 64 numbers.
    """
    sizes = model_sizes(model)
    prefixes = tuple(f"{name}." for name in factorized)
    held, copies, grown = 0, dict.fromkeys(sizes, 0), []
    for tensor in stored:
        if tensor.sources is not None and not tensor.sources:
            continue  # a constant of forward
        held += tensor.numbers
        sources = tensor.sources or frozenset()
        if len(sources) == 1 and tensor.numbers == sizes.get(next(iter(sources))):
            copies[next(iter(sources))] += 1
        if tensor.numbers > sum(sizes.get(name, 0) for name in sources):
            grown.append(tensor)
    total = sum(sizes.values())
    allowed = total + sum(sizes[name] * (count - 1) for name, count in copies.items() if count > 1)
    inside_plan = [tensor for tensor in grown if any(name.startswith(prefixes) for name in tensor.sources or ())]
    if inside_plan or (grown and held > allowed + max(_ALLOWED_NUMBERS, int(_ALLOWED_SHARE * total))):
        culprits = sorted(inside_plan or grown, key=lambda tensor: -tensor.numbers)[:3]
        raise ExportError(
            f"The file would hold {held:,} numbers for the model's {total:,}: the exporter multiplied weights. "
            + "; ".join(_explain(tensor) for tensor in culprits)
            + ". Apply the factors to the activations one after the other (two layers), instead of to each other."
        )


def model_sizes(model: nn.Module) -> dict[str, int]:
    """Return the number of elements of every parameter and floating-point buffer, each tensor once."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.numel() for name, tensor in tensors.items() if tensor.is_floating_point()}


def _explain(tensor: Stored) -> str:
    origin = " x ".join(sorted(tensor.sources)) if tensor.sources else "unknown weights"
    return f"{tensor.name!r} {list(tensor.shape)} comes from {origin}"
