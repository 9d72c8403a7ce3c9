"""Follow the labels through the graph of a call, operation by operation.

Every operation has a rule in a table; rooms of rules are :mod:`.shapes`, :mod:`.pieces`, :mod:`.elementwise`, :mod:`.products`,
:mod:`.convolutions`, :mod:`.norms` and :mod:`.recurrent`. What no rule knows, and what a rule loses sight of, freezes the labels concerned.
"""

import dataclasses
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from lightning_prune.structure.calls import Call
from lightning_prune.structure.gathered import index_called
from lightning_prune.structure.tracing import convolutions, elementwise, norms, pieces, products, recurrent, shapes
from lightning_prune.structure.tracing.labels import Labels
from lightning_prune.structure.tracing.program import Program, bias_uses, export, location, owner, reads_training
from lightning_prune.structure.tracing.site import Site
from lightning_prune.structure.tracing.values import Field, Value, core

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **shapes.RULES,
    **pieces.RULES,
    **products.RULES,
    **convolutions.RULES,
    **norms.RULES,
    **recurrent.RULES,
}


def export_all(model: nn.Module, calls: Sequence[Call]) -> list[Program]:
    """Export every call in eval mode, and in train mode too where the model's own code asks for the mode.

    Args:
        model: The model; left as it is.
        calls: The calls to follow.

    Raises:
        ModelError: If ``torch.export`` refuses the model.
    """
    programs = [export(model, call) for call in calls]
    if reads_training(model):
        programs += [export(model, call, training=True) for call in calls]
    return programs


def follow(model: nn.Module, programs: Sequence[Program], thinned: frozenset[str] = frozenset()) -> Labels:
    """Label every axis of every parameter of ``model`` and tie what belongs together.

    Args:
        model: The model that the graphs are of.
        programs: The graphs of its calls.
        thinned: Weights of grouped convolutions whose groups become thinner, instead of fewer.

    Returns:
        The labels, grids not yet settled.
    """
    labels = Labels()
    labels.thinned = set(thinned)
    for program in programs:
        for bias, weights in bias_uses(program).items():
            labels.biases.setdefault(bias, set()).update(weights)
    for program in programs:
        Interpreter(model, program, labels).run()
    return labels


class Interpreter:
    """Runs one graph on labels.

    Args:
        model: The model that the graph is of.
        program: The graph.
        labels: Collects the ties.
    """

    def __init__(self, model: nn.Module, program: Program, labels: Labels) -> None:
        self.model, self.program, self.labels = model, program, labels
        self.parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
        self.env: dict[fx.Node, Any] = {}
        self.results: dict[fx.Node, Any] = {}  # of nested regions: the nodes inside that they return
        self.bases: dict[fx.Node, fx.Node] = {}  # of tensors that share memory: the one that the others are views of
        self.layouts: dict[fx.Node, fx.Node] = {}  # of those that share all of it: one of them

    def run(self) -> None:
        """Follow the whole graph; what reaches an output keeps its size."""
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self._placeholder(node)
        for value in _leaves(self._values(self._graph(self.program.graph, self.program.module))):
            for field in value.fields:
                self.labels.freeze(field.labels, "it is an output of the model")

    def _placeholder(self, node: fx.Node) -> Any:
        example = node.meta.get("val")
        if not isinstance(example, Tensor):
            return example
        name = self.program.tensors.get(node.name)
        if name is None or not node.users:
            return Value(tuple(example.shape))
        if index_called(self.model, name) is not None:
            return Value(tuple(example.shape), source=name)
        return self.labels.tensor(name, tuple(example.shape), name in self.parameters)

    def _graph(self, graph: fx.Graph, module: nn.Module) -> Any:
        """Follow a graph whose placeholders have values; return the nodes that it returns."""
        for node in graph.nodes:
            if node.op == "get_attr":
                self.env[node] = self._attribute(module, str(node.target))
            elif node.op == "output":
                return node.args[0]
            elif node.op != "placeholder":
                self.env[node] = self._call(node, self._values(node.args), dict(self._values(node.kwargs)))
        return ()

    def _values(self, nodes: Any) -> Any:
        return fx.map_arg(nodes, lambda node: self.env[node])

    def _attribute(self, module: nn.Module, name: str) -> Any:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part)
        if isinstance(found, Tensor):
            fill = float(found) if found.numel() == 1 and not found.is_meta and found.dtype != torch.bool else None
            return Value(tuple(found.shape), fill=fill, weights=True)
        return found

    def _call(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        target = node.target
        if target is operator.getitem:
            self._share_item(node)
            return args[0][args[1]] if isinstance(args[0], tuple | list) else args[0]
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._region(node, args)
        if not isinstance(target, torch._ops.OpOverload):
            return self._not_followed(node, args)  # Python scalars: sym_size and the like; the steps of vmap
        where, code = location(node)
        prefix = self.program.call.module
        computing = tuple(
            owner(n, prefix, self.modules) for n in (node, *node.all_input_nodes) if n.op != "placeholder"
        )
        site = Site(
            self.labels,
            node,
            target,
            computing[0],
            where,
            code,
            self.model,
            self.program.training,
            computing,
        )
        name = target._schema.name.removeprefix("aten::")
        in_place = name.endswith("_") and not name.endswith("__")
        rule = RULES.get(name) or (RULES.get(name[:-1]) if in_place else None)
        if rule is None:
            rule = elementwise.pointwise if torch.Tag.pointwise in target.tags else unknown
        self.labels.touched = []
        result = rule(site, *args, **kwargs) if _takes(rule, site, args, kwargs) else unknown(site, *args, **kwargs)
        self._see_to_all(site, (args, kwargs), result)
        self._share(node, name, in_place)
        if in_place and isinstance(result, Value):
            self._write(site, node, result)
        return result

    def _see_to_all(self, site: Site, operands: Any, result: Any) -> None:
        """Freeze what a rule has lost: labels of an operand that it neither passes on nor ties."""
        fields = [field for value in _leaves(operands) for field in value.fields]
        if fields:
            kept = [core(field.labels).flatten().numpy() for value in _leaves(result) for field in value.fields]
            seen = np.concatenate([*self.labels.touched, *kept, np.zeros(0, np.int64)])
            for field in fields:
                if not np.isin(core(field.labels).flatten().numpy(), seen).any():
                    site.freeze(field, f"it goes through {site.name}, which is not followed there")

    def _share(self, node: fx.Node, name: str, in_place: bool) -> None:
        """Note whose memory the result of an operation may be."""
        first = node.args[0] if node.args else None
        views = name == "dropout" or any(
            a.alias_info is not None
            for a in node.target._schema.arguments  # type: ignore[union-attr]
        )
        if views and isinstance(first, fx.Node):
            self.bases[node] = self.bases.get(first, first)
            if in_place or name in ("detach", "alias"):
                self.layouts[node] = self.layouts.get(first, first)

    def _share_item(self, node: fx.Node) -> None:
        """Note whose memory an item of a tuple is: of parts of a tensor that of the whole, of a region's results what it is inside."""
        whole: Any = node.args[0]
        place = node.args[1]
        if whole in self.results and isinstance(place, int):
            inner = self.results[whole][place]
            self.bases[node], self.layouts[node] = self.bases.get(inner, inner), self.layouts.get(inner, inner)
        elif whole in self.bases:
            self.bases[node] = self.bases[whole]

    def _write(self, site: Site, node: fx.Node, result: Value) -> None:
        """Let the tensor that was written to, and all that share its memory, hold what was written."""
        written = node.args[0]
        if not isinstance(written, fx.Node):
            return
        before, base = self.env[written], self.bases.get(written, written)
        layout = self.layouts.get(written, written)
        for other, value in list(self.env.items()):
            if not isinstance(value, Value) or self.bases.get(other, other) is not base:
                continue
            if self.layouts.get(other, other) is layout:
                self.env[other] = result
                continue
            if [_nature(f) for f in before.fields] != [_nature(f) for f in result.fields]:
                for field in (*value.fields, *result.fields):
                    site.freeze(field, f"{site.name} writes to it in place through a view")
            self.env[other] = dataclasses.replace(value, fill=None, source=None)

    def _region(self, node: fx.Node, args: Sequence[Any]) -> Any:
        """Follow a region of the graph that runs under its own gradient or autocast mode; other higher operations are unknown."""
        bodies = [arg for arg in args if isinstance(arg, fx.GraphModule)]
        name = str(node.target)
        if len(bodies) == 1 and ("set_grad_enabled" in name or "autocast" in name):
            index = next(i for i, arg in enumerate(args) if arg is bodies[0])
            inputs = [inner for inner in bodies[0].graph.nodes if inner.op == "placeholder"]
            for inner, outer in zip(inputs, node.args[index + 1 :], strict=True):
                self.env[inner] = self._values(outer)
                if isinstance(outer, fx.Node):
                    self.bases[inner], self.layouts[inner] = (
                        self.bases.get(outer, outer),
                        self.layouts.get(outer, outer),
                    )
            self.results[node] = self._graph(bodies[0].graph, bodies[0])
            return self._values(self.results[node])
        return self._not_followed(node, args)

    def _not_followed(self, node: fx.Node, args: Sequence[Any]) -> Any:
        """Freeze what goes into something that is no operation of torch's own; return values for the tensors that come out."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        for value in _leaves(args):
            for field in value.fields:
                self.labels.freeze(field.labels, f"it goes through the operation {name}, which is not known")
        example = node.meta.get("val")
        if isinstance(example, tuple | list):
            return tuple(Value(tuple(t.shape)) for t in example)
        return Value(tuple(example.shape)) if isinstance(example, Tensor) else None


def unknown(site: Site, *args: Any, **kwargs: Any) -> Any:
    """Freeze everything that goes into an operation without a rule."""
    for value in (*_leaves(args), *_leaves(kwargs)):
        for field in value.fields:
            site.freeze(field, f"it goes through {site.name}, an operation that is not known")
    return site.outputs()


def _takes(rule: Rule, site: Site, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a rule is written for these operands."""
    try:
        inspect.signature(rule).bind(site, *args, **kwargs)
    except TypeError:
        return False
    return True


def _nature(field: Field) -> tuple[Any, ...]:
    return field.axes, field.at, field.weights


def _leaves(value: Any) -> list[Value]:
    if isinstance(value, Value):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _leaves(item)]
    return []
