"""Count multiply-adds: one traced run of the model, read by fvcore with handles for what it misses.

Convention, everywhere in this package: one multiply-add is one FLOP. Convolutions and matrix products (linear layers, attention, recurrent
layers, einsum) count their multiply-adds; norms and a few resampling operations count what fvcore's rough figures say; other element-wise
operations, reductions and moves of data are free. A causal or masked attention counts all its products. What the outputs do not depend on
is not counted. Counts are for the inputs as given, batch included.

https://github.com/facebookresearch/fvcore/blob/main/docs/flop_count.md. Our handles differ from fvcore's where those are wrong or absent:
products that broadcast, have an ``out`` argument or a vector operand; einsum (rounded there to four digits, outer sums priced as products);
convolutions with ``padding="same"``; attention; LSTM, GRU and RNN; RMS norm. An operation that none of them knows and that holds parameters
or matrix products is reported, never taken for free.
"""

import contextlib
import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
    from fvcore.nn import FlopCountAnalysis

from lightning_prune.errors import ModelError, OptionError
from lightning_prune.structure.calls import Call, as_calls, signature
from lightning_prune.structure.operators import HANDLES, FreeOperators, all_shapes_known
from lightning_prune.structure.preserve import preserved

Shape = tuple[int, ...]
_REFUSALS = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
)  # what running or tracing a foreign model raises
_SHAPED_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Multiply-adds of a model for given inputs, batch included; one multiply-add is one FLOP.

    Attributes:
        total: Multiply-adds of all calls together.
        by_module: The same per module, children included; ``""`` is the model. Names are relative to the model, a module that several
            parents share stands under its first name, one that was never called has 0.
        by_operator: The same per operation, under its name in torch: ``conv``, ``linear``, ``scaled_dot_product_attention``, ...
        uncounted: Operations that may hold parameters or matrix products and that no handle knows, with how often they occur.
        shapes: Per convolution and linear layer that was called: input and output shape of each call, in order.
        inputs: Modules, shapes and types of the inputs counted for, in JSON types.
    """

    total: int
    by_module: dict[str, int]
    by_operator: dict[str, int]
    uncounted: dict[str, int]
    shapes: dict[str, tuple[tuple[Shape, Shape], ...]]
    inputs: list[dict[str, Any]]

    def __str__(self) -> str:
        """Return a table of the modules that cost something, in the order of the model."""
        rows = [(name or "(model)", flops) for name, flops in self.by_module.items() if flops or not name]
        width = max(len(name) for name, _ in rows)
        lines = [f"{'module':<{width}} {'multiply-adds':>18} {'share':>7}"]
        lines += [f"{name:<{width}} {flops:>18,} {flops / max(self.total, 1):>7.1%}" for name, flops in rows]
        lines += [f"not counted: {name} ({times}x)" for name, times in self.uncounted.items()]
        return "\n".join([*lines, "One multiply-add is one FLOP, norms as fvcore counts them; the whole batch."])


def count_flops(model: nn.Module, example: Any) -> FlopCount:
    """Count the multiply-adds of a model in evaluation mode; the model is left bit-identical.

    The model is run twice without gradients: once as it is, for the shapes, once traced by ``torch.jit``.

    Args:
        model: Any module whose ``forward`` runs on ``example``; a LightningModule with or without a trainer.
        example: A tensor, a tuple of arguments, a dict of keyword arguments, or one or several :class:`Call` of submodules, whose counts
            are added. On the device of the model.

    Returns:
        The count.

    Raises:
        OptionError: If ``example`` is None or names a submodule that the model does not have.
        ModelError: If the model cannot be run on ``example``, or not be traced.

    Warns:
        UserWarning: Names operations that were not counted and may matter.
    """
    if example is None:
        raise OptionError(
            "count_flops: example is None. Give a tensor, a tuple of arguments or a dict of keyword arguments."
        )
    calls = as_calls(example)
    by_module = Counter({name: 0 for name, _ in model.named_modules()})
    by_operator: Counter[str] = Counter()
    uncounted: Counter[str] = Counter()
    with _counting(model):
        shapes = _run(model, calls)
        for call in calls:
            analysis = _trace(model, call)
            for name, flops in analysis.by_module().items():
                by_module[name] += int(flops)
            by_operator.update(analysis.by_operator())
            uncounted.update(analysis.uncounted)
    if uncounted:
        named = ", ".join(f"{name} ({times}x)" for name, times in sorted(uncounted.items()))
        warnings.warn(
            f"FLOPs of {type(model).__name__} leave out operations that may hold matrix products: {named}.",
            stacklevel=2,
        )
    operators = {name: int(flops) for name, flops in sorted(by_operator.items()) if flops}
    return FlopCount(by_module[""], dict(by_module), operators, dict(uncounted), shapes, signature(calls))


@contextlib.contextmanager
def _counting(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no fused attention, no compiled code; everything is put back."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with preserved(model, mode="eval"), torch.no_grad():
        torch.set_autocast_cache_enabled(False)  # torch.jit cannot trace cached casts
        for module in model.modules():
            vars(module).pop("_compiled_call_impl", None)
            if "dynamo_ctx" in vars(module):  # what torch.compile(module) returns
                vars(module)["forward"] = module.get_submodule("_orig_mod").__call__
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def _run(model: nn.Module, calls: Sequence[Call]) -> dict[str, tuple[tuple[Shape, Shape], ...]]:
    """Run the calls as they are; return the shapes that every convolution and linear layer saw."""
    shapes: dict[str, list[tuple[Shape, Shape]]] = {}

    def watch(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next((leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
            if given is not None and isinstance(output, Tensor):  # a subclass may take and return anything
                shapes.setdefault(name, []).append((tuple(given.shape), tuple(output.shape)))

        return note

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, _SHAPED_LAYERS)
    ]
    for call in calls:
        _submodule(model, call)
        leaves = _pytree.tree_leaves((call.args, dict(call.kwargs)))
        if any(isinstance(leaf, Tensor) and leaf.ndim and not len(leaf) for leaf in leaves):
            raise ModelError(
                f"{type(model).__name__}: the example inputs {signature([call])} are a batch of no sample. Give one sample at least."
            )
    try:
        for call in calls:
            dataclasses.replace(call, args=_copied(call.args), kwargs=_copied(dict(call.kwargs))).run(model)
    except _REFUSALS as error:
        raise ModelError(
            f"{type(model).__name__} cannot be run on the example inputs {signature(calls)}: {type(error).__name__}: {_said(error)}. "
            "Give inputs of the shapes, types and device that its forward takes."
        ) from error
    for handle in handles:
        handle.remove()
    return {name: tuple(seen) for name, seen in shapes.items()}


def _said(error: Exception) -> str:
    """Return the first line of a foreign message, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _submodule(model: nn.Module, call: Call) -> nn.Module:
    try:
        return model.get_submodule(call.module)
    except AttributeError:
        raise OptionError(
            f"count_flops: {type(model).__name__} has no submodule {call.module!r}; see named_modules()."
        ) from None


def _copied(value: Any) -> Any:
    return _pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), value)


def _trace(model: nn.Module, call: Call) -> "_Analysis":
    traced = _Traced(_submodule(model, call), call)
    analysis = _Analysis(traced, call.module)
    try:
        analysis.total()
    except _REFUSALS as error:
        raise ModelError(
            f"{type(model).__name__} runs on the example inputs but torch.jit cannot trace it, so its FLOPs cannot be counted: {_said(error)}. "
            "Count it before it is scripted and on a real device, not meta, or give the submodules that can be traced as a list of Call(name, args)."
        ) from error
    return analysis


class _Traced(nn.Module):
    """One call as a module that takes a flat list of tensors and returns one, which is all that ``torch.jit`` traces."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.module = module
        self.leaves, self.spec = _pytree.tree_flatten((call.args, dict(call.kwargs)))
        self.tensors = tuple(leaf.detach().clone() for leaf in self.leaves if isinstance(leaf, Tensor))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = _pytree.tree_unflatten(leaves, self.spec)
        found = tuple(_tensors(self.module(*args, **kwargs)))
        if not found:
            raise ValueError("it returns no tensor")
        return found

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the graph takes as weights: no extra state, and none of the model's own hooks run."""
        state, prefix = kwargs.get("destination"), kwargs.get("prefix", "")
        state = {} if state is None else state
        tensors = [*self.module.named_parameters(), *self.module.named_buffers()]
        state.update({f"{prefix}{name}": tensor for name, tensor in tensors})
        return state


class _Analysis(FlopCountAnalysis):  # type: ignore[misc]
    """fvcore's analysis of one call with our handles; names are relative to the model.

    Attributes:
        uncounted: Operations without a handle that may matter, with how often they occur.
    """

    def __init__(self, traced: _Traced, prefix: str) -> None:
        super().__init__(traced, traced.tensors)
        self.uncounted: Counter[str] = Counter()
        self.set_op_handle(**HANDLES)
        self.set_op_handle(**{kind: self._careful(kind, handle) for kind, handle in self._op_handles.items()})
        self.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        self.tracer_warnings("none")  # the model's own warnings came in the run before
        self._prefix = prefix
        self._free = FreeOperators(len(traced.tensors), self._op_handles)

    def by_module(self) -> Counter[str]:
        """Return multiply-adds by the names of the model, and those of the whole call in every parent of the module called."""
        named = {name: flops for name, flops in super().by_module().items() if name}
        counts = Counter({f"{self._prefix}{name.removeprefix('module')}".strip("."): n for name, n in named.items()})
        parents = self._prefix.split(".")[:-1] if self._prefix else []
        for depth in range(len(parents) + 1 if self._prefix else 0):
            counts[".".join(parents[:depth])] += named["module"]
        return counts

    def _careful(self, kind: str, handle: Callable[..., Any]) -> Callable[..., Any]:
        def counted(inputs: list[Any], outputs: list[Any]) -> Any:
            if all_shapes_known([*inputs, *outputs]):
                return handle(inputs, outputs)
            self.uncounted[kind.removeprefix("aten::")] += 1
            return 0

        return counted

    def _should_ignore_node(self, node: Any) -> bool:  # asked by fvcore for every node without a handle
        priced_free = super()._should_ignore_node(node) and not node.kind().startswith("prim::")
        if not priced_free and not self._free.is_free(node):
            name = node.pyname() if node.kind() == "prim::PythonOp" else node.kind()
            self.uncounted[name.removeprefix("aten::")] += 1
        return True


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in whatever a model returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (t for item in value.values() for t in _tensors(item))
    elif isinstance(value, tuple | list | set):
        yield from (t for item in value for t in _tensors(item))
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        yield from (t for item in vars(value).values() for t in _tensors(item))
