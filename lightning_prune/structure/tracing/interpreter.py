"""Follow the labels through the graph of a call, operation by operation.

Every operation has a rule in a table; rooms of rules are :mod:`.shapes`, :mod:`.elementwise`, :mod:`.products`, :mod:`.convolutions`, :mod:`.norms`
and :mod:`.recurrent`. What no rule knows freezes the labels of its operands.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_prune.structure.calls import Call
from lightning_prune.structure.tracing import convolutions, elementwise, norms, products, recurrent, shapes
from lightning_prune.structure.tracing.labels import Labels
from lightning_prune.structure.tracing.program import Program, export, location, owner, reads_training
from lightning_prune.structure.tracing.site import Site
from lightning_prune.structure.tracing.values import Value

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **shapes.RULES,
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
        self.aliases: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        """Follow the whole graph; what reaches an output keeps its size."""
        given = [self._placeholder(node) for node in self.program.graph.nodes if node.op == "placeholder"]
        for value in _leaves(self._graph(self.program.graph, self.program.module, given)):
            for field in value.fields:
                self.labels.freeze(field.labels, "it is an output of the model")

    def _placeholder(self, node: fx.Node) -> Any:
        example = node.meta.get("val")
        if not isinstance(example, Tensor):
            return example
        name = self.program.tensors.get(node.name)
        if name is None:
            return Value(tuple(example.shape))
        return self.labels.tensor(name, tuple(example.shape), name in self.parameters)

    def _graph(self, graph: fx.Graph, module: nn.Module, given: Sequence[Any]) -> Any:
        env: dict[fx.Node, Any] = {}
        inputs = iter(given)
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = next(inputs)
            elif node.op == "get_attr":
                env[node] = self._attribute(module, str(node.target))
            elif node.op == "output":
                return fx.map_arg(node.args[0], lambda n: env[n])
            else:
                args = fx.map_arg(node.args, lambda n: env[n])
                kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
                env[node] = self._call(node, args, dict(kwargs), env)
        return ()

    def _attribute(self, module: nn.Module, name: str) -> Any:
        for part in name.split("."):
            module = getattr(module, part)
        if isinstance(module, Tensor):
            fill = float(module) if module.numel() == 1 and not module.is_meta and module.dtype != torch.bool else None
            return Value(tuple(module.shape), fill=fill, weights=True)
        return module

    def _call(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], env: dict[fx.Node, Any]) -> Any:
        target = node.target
        if target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], tuple | list) else args[0]
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._region(node, args)
        if not isinstance(target, torch._ops.OpOverload):
            return None  # Python scalars: sym_size and the like
        where, code = location(node)
        site = Site(
            self.labels,
            node,
            target,
            owner(node, self.program.call.module, self.modules),
            where,
            code,
            self.model,
            self.program.training,
        )
        name = target._schema.name.removeprefix("aten::")
        in_place = name.endswith("_") and not name.endswith("__")
        rule = RULES.get(name) or (RULES.get(name[:-1]) if in_place else None)
        if rule is None:
            rule = elementwise.pointwise if torch.Tag.pointwise in target.tags else unknown
        result = rule(site, *args, **kwargs)
        if in_place and isinstance(result, Value):
            self._write(site, node, result, env)
        if self._is_view(target) and node.args and isinstance(node.args[0], fx.Node):
            self.aliases[node] = self.aliases.get(node.args[0], node.args[0])
        return result

    def _is_view(self, target: torch._ops.OpOverload) -> bool:
        return any(a.alias_info is not None and not a.alias_info.is_write for a in target._schema.arguments)

    def _write(self, site: Site, node: fx.Node, result: Value, env: dict[fx.Node, Any]) -> None:
        """Let the tensor that was written to, and what it is a view of, hold what was written."""
        written = node.args[0]
        if not isinstance(written, fx.Node):
            return
        before = env[written]
        base = self.aliases.get(written, written)
        views = [n for n, b in self.aliases.items() if b is base and n is not written] + (
            [base] if base is not written else []
        )
        same = [f.at for f in before.fields] == [f.at for f in result.fields] and len(before.fields) == len(
            result.fields
        )
        for node_ in views:
            other = env.get(node_)
            if isinstance(other, Value) and not same:
                for field in (*other.fields, *result.fields):
                    site.freeze(field, "it is written to in place through a view")
        env[written] = result

    def _region(self, node: fx.Node, args: Sequence[Any]) -> Any:
        """Follow a region of the graph that runs under its own gradient or autocast mode; other higher operations are unknown."""
        bodies = [arg for arg in args if isinstance(arg, fx.GraphModule)]
        name = str(node.target)
        if len(bodies) == 1 and ("set_grad_enabled" in name or "autocast" in name):
            index = next(i for i, arg in enumerate(args) if arg is bodies[0])
            return self._graph(bodies[0].graph, bodies[0], args[index + 1 :])
        for value in _leaves(args):
            for field in value.fields:
                self.labels.freeze(field.labels, f"it goes through the operation {name}, which is not known")
        example = node.meta.get("val")
        return tuple(Value(tuple(t.shape)) for t in example) if isinstance(example, tuple | list) else None


def unknown(site: Site, *args: Any, **kwargs: Any) -> Any:
    """Freeze everything that goes into an operation without a rule."""
    for value in (*_leaves(args), *_leaves(kwargs)):
        for field in value.fields:
            site.freeze(field, f"it goes through {site.name}, an operation that is not known")
    return site.outputs()


def _leaves(value: Any) -> list[Value]:
    if isinstance(value, Value):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _leaves(item)]
    return []
