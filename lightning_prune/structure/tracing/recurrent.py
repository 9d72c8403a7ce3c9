"""Rules for LSTM, GRU and RNN: a hidden unit leaves with its gates, and every layer and direction loses equally many."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_prune.structure.tracing.products import take_up
from lightning_prune.structure.tracing.site import Site
from lightning_prune.structure.tracing.values import Field, Value, core, vector

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(
    site: Site,
    x: Value,
    state: Any,
    weights: Sequence[Value],
    biases: bool,
    layers: int,
    _dropout: float,
    _training: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> Any:
    """Tie every hidden unit's rows in all gates, its recurrent column and the next layer's input."""
    kind = site.target._schema.name.removeprefix("aten::")
    directions = 2 if bidirectional else 1
    per = len(weights) // (layers * directions)
    states = state if isinstance(state, tuple | list) else [state]
    if per != (4 if biases else 2) or site.target._overloadname != "input" or any(s.fill != 0 for s in states):
        for value in (x, *states, *weights):
            reason = "has projections, packed sequences or an initial state of its own"
            site.freeze_all(value, f"{site.name} {reason}")
        return site.outputs()
    rank = len(x.shape)
    for field in x.fields:
        if field.axes != (rank - 1,):
            site.freeze(field, f"it is a step or an example in {site.name}")
    inputs = x.along(-1)
    given: Tensor | None = core(inputs.labels).flatten() if inputs is not None and inputs.axes == (rank - 1,) else None
    at = inputs.at if inputs is not None else 0.0
    last: list[Tensor] = []
    every: list[Tensor] = []
    steps = x.shape[0] * (x.shape[1] if rank == 3 else 1)
    for layer in range(layers):
        last = []
        for direction in range(directions):
            first = (layer * directions + direction) * per
            last.append(_layer(site, weights[first : first + per], given, at, _GATES[kind], steps))
        every += last
        given, at = torch.cat(last), 0.0
    site.labels.tie(*every)
    for begun in states if not isinstance(site.module, nn.RNNBase) or _given(site) else ():
        site.sized(begun.shape[-1], every[0][:, None], 0)
    outputs = site.outputs()
    hidden = torch.stack(every)
    sizes = outputs[1].shape
    ragged = hidden.reshape(len(every), *(1,) * (len(sizes) - 2), -1).expand(sizes)
    whole = Value(outputs[0].shape, (Field(vector(torch.cat(last), rank - 1, outputs[0].shape), 0.0, False),))
    states_out = Field(ragged, 0.0, False)
    if any(not _picks_one_layer(user) for getitem in site.node.users if getitem.args[1] for user in getitem.users):
        site.labels.unite(hidden, hidden[:1])  # the same units of every layer and direction
    return (whole, *(Value(sizes, (states_out,)) for _ in outputs[1:]))


def _given(site: Site) -> bool:
    """Tell whether code outside of the layer made the initial state, with sizes that it writes down."""
    made = site.node.args[1]
    nodes = made if isinstance(made, list | tuple) else [made]
    inside = [list((n.meta.get("nn_module_stack") or {}).values())[-1:] for n in nodes if isinstance(n, fx.Node)]
    own = list((site.node.meta.get("nn_module_stack") or {}).values())[-1:]
    return any(stack != own for stack in inside)


def _picks_one_layer(user: fx.Node) -> bool:
    """Tell whether an operation on the final states takes one layer and direction, whose units need not match the others'."""
    return bool(user.target is torch.ops.aten.select.int and user.args[1] == 0)


def _layer(
    site: Site, weights: Sequence[Value], inputs: Tensor | None, at: float | None, gates: int, steps: int
) -> Tensor:
    """Tie one layer in one direction; return the labels of its units."""
    into, back, *biases = weights
    rows, columns = into.along(0), into.along(1)
    recurrent_rows, recurrent_columns = back.along(0), back.along(1)
    if rows is None or recurrent_rows is None or recurrent_columns is None:
        for value in weights:
            site.freeze_all(value, f"{site.name} has one hidden unit")
        return torch.zeros(back.shape[1], dtype=torch.int64)
    units = core(recurrent_columns.labels).flatten()
    for field in (rows, recurrent_rows, *(b.along(0) for b in biases)):
        if field is not None:
            site.labels.unite(core(field.labels).flatten().reshape(gates, -1), units.expand(gates, -1))
            site.labels.produce(field)
    if columns is not None:
        if inputs is None:
            site.freeze(columns, f"{site.name} reads an input whose size is fixed")
        else:
            site.labels.unite(inputs, core(columns.labels).flatten())
            take_up(site, Field(inputs, at, False), into, None)
    elif inputs is not None:
        site.labels.freeze(inputs, f"{site.name} reads an input whose size is fixed")
    across = [core(rows.labels).flatten()]
    if columns is not None and inputs is not None:
        site.cost(steps, [across[0], inputs])
    else:
        site.cost(steps * into.shape[1], across)
    site.cost(steps, [core(recurrent_rows.labels).flatten(), units])
    return units


RULES: dict[str, Any] = dict.fromkeys(_GATES, recurrent)
