"""Asking: the structure of a model as rows, and a method on trial."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_prune.callback import Compression
from lightning_prune.callback.checks import check_model
from lightning_prune.callback.one_shot import end_of
from lightning_prune.errors import OptionError
from lightning_prune.explanation.answer import Explanation
from lightning_prune.explanation.members import layers_of, own_flops, own_params
from lightning_prune.explanation.rows import Row, Rows
from lightning_prune.flops import count_flops
from lightning_prune.probe import Probe
from lightning_prune.structure.calls import Call, as_calls
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.groups import find_units
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.trials import try_sizes


def explain(
    model: nn.Module,
    example: Any = None,
    method: Compression | None = None,
    *,
    data: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Explanation:
    """Say for every layer what can be removed with what, or why not; with a method, also what it would do.

    The model is left bit-identical. It is traced; copies of it are run where its code writes sizes down, and for the dry run.

    Args:
        model: Any module, dense or carrying a plan.
        example: A tensor, a tuple of arguments, a dict of keyword arguments, or one or several :class:`Call` of submodules; on the device
            of the model. None takes its ``example_input_array``.
        method: A method with its budget, such as ``LowRank(flops=0.5)``: the dry run, what :func:`lightning_prune.compress` would do. Of a
            method that acts while a model trains, the end of its schedule, judged by the weights as they are.
        data: Batches, for methods that need data.
        loss: ``loss(model, batch)``, a scalar, for methods that need one.

    Returns:
        The explanation: print it, or see its ``table()``, ``to_dict()`` and ``picture(path)``.

    Raises:
        ModelError: If the model cannot be run or traced, has no example, or the method could change nothing.
        OptionError: If ``method`` is none, lives from training and has no bound, or a pattern of it matches no layer.
        BudgetError: If its budget cannot be met.
    """
    check_model(model)
    if method is not None and not isinstance(method, Compression):
        raise OptionError(
            f"explain: method={method!r}. Give a method with its budget, such as LowRank(flops=0.5), or None."
        )
    bounds = [getattr(method, name, None) for name in ("flops", "params", "sparsity")]
    if method is not None and method.gradual and bounds == [None] * 3:
        raise OptionError(
            f"explain: {type(method).__name__} acts while a model trains, and without flops, params or sparsity nothing but the training says "
            "how far. Give one of them, or explain the model after the fit."
        )
    probe = Probe.of_data(model, data, loss)
    calls = probe.example_calls() if example is None else as_calls(example)
    with probe.quiet():
        count = count_flops(model, calls)
        layers = layers_of(model)
        flops = own_flops(count.by_module, [layer.name for layer in layers])
        read = Rows(model, try_sizes(model, calls, find_units(model, calls)), layers)
        rows = tuple(read.row(layer, flops[layer.name]) for layer in layers)
        params = sum(layer.params for layer in layers)
        found = Explanation(rows, read.groups(), count.total, params, tuple(count.inputs))
        return found if method is None else _dry_run(found, model, calls, method, data, loss)


def _dry_run(
    found: Explanation,
    model: nn.Module,
    calls: Sequence[Call],
    method: Compression,
    data: Iterable[Any] | None,
    loss: Callable[[nn.Module, Any], Tensor] | None,
) -> Explanation:
    """Compress a copy, count it, and enter what became of every layer."""
    small, whole = end_of(model, method, calls, data, loss)
    before = plan_of(model)
    done = whole == before
    steps = () if done else tuple(step for step in whole.steps if step not in before.steps)
    plan = Plan(steps, {} if done else whole.left_alone, whole.origin, whole.stages[len(before.stages) :])
    names = [row.layer for row in found.rows]
    count = count_flops(small, calls)
    flops, params = own_flops(count.by_module, names), own_params(small, names)
    words = _changes(plan)
    rows = (_after(row, flops, params, words) for row in found.rows)
    return dataclasses.replace(
        found,
        rows=tuple(rows),
        method=method.stage().method,
        plan=plan,
        flops_after=count.total,
        params_after=sum(p.numel() for p in small.parameters()),
    )


def _after(row: Row, flops: Mapping[str, int], params: Mapping[str, int], words: Mapping[str, str]) -> Row:
    return dataclasses.replace(
        row, flops_after=flops[row.layer], params_after=params[row.layer], change=words.get(row.layer, "")
    )


def _changes(plan: Plan) -> dict[str, str]:
    """Return in words what a plan does to a module, or why it leaves it alone, by name."""
    words: dict[str, str] = {}
    for row in plan.rows():
        if row["before"] == row["after"] and not row["reason"]:
            continue  # an attention whose heads are opened computes what it did
        text = (
            f"left alone: {row['reason']}" if row["reason"] else f"{row['action']}: {row['before']} -> {row['after']}"
        )
        words[row["layer"]] = "; ".join(filter(None, [words.get(row["layer"]), text]))
    return words
