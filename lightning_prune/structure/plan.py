"""The plan: what was done to which module, as data.

A plan is a frozen, ordered list of steps. Each step names a module of the model *as the steps before it left it* and holds what it
takes to explain the change and to build its shapes again; weights are never part of it. :meth:`Plan.build` makes those shapes in a
freshly constructed model, without data, tracing or pickle, and is followed by a strict load of the weights. Plans of several stages
compose by :meth:`Plan.then`.

One representation everywhere: canonical JSON text, in checkpoints, in the metadata of ONNX files and as the basis of equality and
hash. Nothing in it can run code.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_prune.errors import PlanError
from lightning_prune.structure.steps import MaskWeight, Step, read_step

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Origin:
    """The dense model that a plan starts from; shares and targets of every later stage refer to it.

    Attributes:
        parameters: Name and shape of every parameter, in the model's order, tied ones under each name.
        params: Number of parameters, tied ones once.
        flops: Multiply-adds for ``inputs``, counted as :func:`lightning_prune.count_flops` does, batch included.
        inputs: Description of the example inputs (:func:`lightning_prune.structure.calls.signature`).
    """

    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    params: int
    flops: int
    inputs: tuple[Any, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, flops: int, inputs: Iterable[Any] = ()) -> Self:
        """Describe ``model`` as it stands.

        Args:
            model: The dense model.
            flops: Its multiply-adds for the example inputs.
            inputs: Description of those inputs, JSON types.
        """
        shapes = tuple((name, tuple(p.shape)) for name, p in _initialized(model, duplicates=True))
        return cls(shapes, sum(p.numel() for _, p in _initialized(model)), flops, tuple(inputs))

    def first_difference(self, model: nn.Module) -> str | None:
        """Return a sentence naming the first parameter of ``model`` that is not as in the dense model, or None."""
        here = [(name, tuple(p.shape)) for name, p in _initialized(model, duplicates=True)]
        for (name, shape), (found, found_shape) in zip(self.parameters, here, strict=False):
            module = name.rpartition(".")[0] or "the model itself"
            if name != found:
                return f"module {module!r}: the plan's model has parameter {name!r} where this one has {found!r}"
            if shape != found_shape:
                return f"module {module!r}: parameter {name!r} has shape {list(found_shape)}, expected {list(shape)}"
        if len(here) != len(self.parameters):
            longer = here if len(here) > len(self.parameters) else self.parameters
            name = longer[min(len(here), len(self.parameters))][0]
            owner = "this model" if longer is here else "the plan's model"
            return f"module {name.rpartition('.')[0]!r}: only {owner} has parameter {name!r}"
        return None


@dataclasses.dataclass(frozen=True)
class Stage:
    """Who made steps of a plan.

    Attributes:
        method: Name of the method.
        options: Its options, JSON types.
    """

    method: str
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What was done to which module, in order.

    Attributes:
        steps: The changes. Each names a module of the model as the steps before left it.
        left_alone: Modules that a method would have changed but could not, with the reason, by name.
        origin: The dense model; None only in an empty plan.
        stages: Who made the steps, in order.

    Two plans are equal, and hash alike, when their JSON is the same.
    """

    steps: tuple[Step, ...] = ()
    left_alone: Mapping[str, str] = dataclasses.field(default_factory=dict)
    origin: Origin | None = None
    stages: tuple[Stage, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __str__(self) -> str:
        stream = io.StringIO()
        Console(file=stream, width=140, color_system=None).print(self.table())
        return stream.getvalue().rstrip("\n")

    @property
    def digest(self) -> str:
        """SHA-256 of the JSON, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def then(self, later: "Plan") -> "Plan":
        """Return the plan of this stage followed by ``later``; a newer mask of a parameter replaces the older one."""
        masked = {step.key for step in later.steps if isinstance(step, MaskWeight)}
        kept = tuple(s for s in self.steps if not (isinstance(s, MaskWeight) and s.key in masked))
        steps = kept + later.steps
        changed = {step.module for step in steps}
        reasons = {**self.left_alone, **later.left_alone}
        alone = {name: reason for name, reason in reasons.items() if name not in changed}
        return Plan(steps, alone, self.origin or later.origin, self.stages + later.stages)

    def settled(self) -> "Plan":
        """Return the plan that a model carries once its values are what this one makes of them."""
        return dataclasses.replace(self, steps=tuple(step.settled() for step in self.steps))

    def build(self, model: nn.Module) -> None:
        """Give ``model``, dense and freshly constructed, the shapes of this plan, in place.

        Args:
            model: A model of the class that the plan was made for. Values of new parameters are undefined until weights are loaded.

        Raises:
            PlanError: If ``model`` is another one; the message names the first module that differs.
        """
        difference = self.origin.first_difference(model) if self.origin else None
        if difference is not None:
            raise PlanError(f"The plan was made for another model than this {type(model).__name__}: {difference}.")
        for step in self.steps:
            step.build(model)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per change and per layer left alone: ``layer action before after kept reason``."""
        changed = [{"layer": step.module, **step.summary(), "reason": ""} for step in self.steps]
        empty = {"action": "left alone", "before": "", "after": "", "kept": None}
        return changed + [{"layer": name, **empty, "reason": reason} for name, reason in self.left_alone.items()]

    def table(self, title: str | None = None) -> Table:
        """Return :meth:`rows` as a table for a rich console."""
        table = Table("layer", "action", "before", "after", "kept", "reason if left alone", title=title)
        for row in self.rows():
            kept = "" if row["kept"] is None else f"{row['kept']:.1%}"
            cells = (row["layer"], row["action"], row["before"], row["after"], kept, row["reason"])
            table.add_row(*map(escape, cells))  # a reason quotes code, whose brackets are no markup
        return table

    def to_json(self) -> str:
        """Return the plan as canonical JSON."""
        return json.dumps(
            {
                "version": VERSION,
                "origin": dataclasses.asdict(self.origin) if self.origin else None,
                "steps": [step.to_dict() for step in self.steps],
                "left_alone": dict(self.left_alone),
                "stages": [dataclasses.asdict(stage) for stage in self.stages],
            },
            sort_keys=True,
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a plan; the text may come from a file that nobody vouches for.

        Args:
            text: What :meth:`to_json` returned.

        Raises:
            PlanError: If it is not a plan, is broken, or was written by a later version of this package.
        """
        try:
            data = json.loads(text)
            if data["version"] != VERSION:
                raise PlanError(
                    f"The plan has version {data['version']!r}; this package reads {VERSION}. Upgrade lightning-prune."
                )
            steps = tuple(read_step(item) for item in data["steps"])
            alone = {str(name): str(reason) for name, reason in data["left_alone"].items()}
            stages = tuple(Stage(str(item["method"]), dict(item["options"])) for item in data["stages"])
            return cls(steps, alone, _origin(data["origin"]), stages)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"The plan is broken: {type(error).__name__}: {error}.") from error


def _origin(data: Mapping[str, Any] | None) -> Origin | None:
    if data is None:
        return None
    shapes = tuple((str(name), tuple(int(size) for size in shape)) for name, shape in data["parameters"])
    return Origin(shapes, int(data["params"]), int(data["flops"]), tuple(data["inputs"]))


def _initialized(model: nn.Module, duplicates: bool = False) -> list[tuple[str, nn.Parameter]]:
    named = model.named_parameters(remove_duplicate=not duplicates)
    return [(name, p) for name, p in named if not is_lazy(p)]
