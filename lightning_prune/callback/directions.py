"""What leaves when directions of the inputs and outputs of layers leave: which layers, how many under a budget, and the steps."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_prune.budget import allocate, resolve_bound
from lightning_prune.budget.directions import Kept, direction_choices
from lightning_prune.budget.ranks import Choice
from lightning_prune.callback.channel_target import ChannelTarget
from lightning_prune.callback.checks import nothing_to_change
from lightning_prune.callback.task import Task
from lightning_prune.errors import ModelError
from lightning_prune.structure.factorized import Cost, Shapes
from lightning_prune.structure.layers import DenseLayer, is_plain
from lightning_prune.structure.obstacles import obstacle
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.replaceable import replaceable
from lightning_prune.structure.rotated import Directions, Form, Rotated, Side, calls_of, cost, factors_of, forms_of
from lightning_prune.structure.select import Pattern
from lightning_prune.structure.steps import Rotate, Step

ScoreDirections = Callable[[Task, Mapping[str, "Site"]], Mapping[str, "RankedDirections"]]
Separable = Literal[False, "frobenius", "curvature"]
_WHOLE = Kept(None, None)
_AS_IT_IS = "the budget is met with it as it is"
_UNSEEN = "no gradient of the loss reaches it in the training step"


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer whose directions may leave.

    Attributes:
        module: What the plan changes: a dense layer, or one that has been rotated before.
        layer: The layer whose inputs and outputs the directions are of: the module itself, or its core.
        shapes: Shapes of input and output of every call of the module.
        inputs: Directions of the inputs that stay as far as it is decided, orthonormal columns, ``[c_i, directions]``; None: all.
        outputs: Of the outputs, ``[c_o, directions]``, likewise.
    """

    module: nn.Module
    layer: DenseLayer
    shapes: Shapes
    inputs: Tensor | None = None
    outputs: Tensor | None = None

    @property
    def now(self) -> Kept:
        """How many directions stay as far as it is decided."""
        return Kept(*(None if basis is None else basis.shape[1] for basis in (self.inputs, self.outputs)))


@dataclasses.dataclass(frozen=True)
class RankedDirections:
    """Directions of a layer, those to keep first, with their scores.

    Attributes:
        inputs: Of its inputs, orthonormal columns, float64, ``[c_i, n_in]``; with the homogeneous coordinate ``[c_i + 1, n_in]``.
        outputs: Of its outputs, ``[c_o, n_out]``.
        input_scores: Higher = keep, at least 0, descending, ``[n_in]``.
        output_scores: ``[n_out]``.
        input_curvature: Curvature along them, at least 0, ``[n_in]``; weighs the fit of a separable core.
        output_curvature: ``[n_out]``.
    """

    inputs: Tensor
    outputs: Tensor
    input_scores: Tensor
    output_scores: Tensor
    input_curvature: Tensor
    output_curvature: Tensor


@dataclasses.dataclass(frozen=True)
class DirectionScores:
    """What a decision rests on.

    Attributes:
        sites: Layers by name.
        directions: Their directions; none if nothing more will leave. Layers that no gradient reaches are missing.
        pending: What leaves already.
    """

    sites: Mapping[str, Site]
    directions: Mapping[str, RankedDirections]
    pending: tuple[Step, ...] = ()


@dataclasses.dataclass(frozen=True)
class DirectionRemoval:
    """Directions leave, those with the lowest scores first, until a budget is met.

    Attributes:
        method: Name of the method, for messages.
        score_directions: Scores the directions of all layers; called on every rank.
        target: What the removal shall reach.
        align: Directions kept are multiples of it.
        limit: Share of the directions of one side that may leave at most.
        separable: Whether what stays of a convolution becomes depthwise, and what the fit minimizes.
        official: Whether layers take three factors or none, as soon as that takes no more parameters.
        include: Layers to take.
        exclude: Layers to leave alone.
    """

    method: str
    score_directions: ScoreDirections
    target: ChannelTarget
    align: int
    limit: float
    separable: Separable
    official: bool
    include: Pattern | Sequence[Pattern] | None
    exclude: Pattern | Sequence[Pattern] | None

    def claim(self, model: nn.Module) -> set[str]:
        """Return the names of the layers whose directions may leave."""
        return set(self._sites(model, None)[0])

    def met(self, task: Task) -> str | None:
        """Return why the target is already met, in words, or None."""
        return self.target.met(task)

    def look(self, task: Task) -> dict[str, Site]:
        """Return the layers whose directions may leave."""
        return self._sites(task.model, task)[0]

    def fits(self, found: Mapping[str, Site], model: nn.Module) -> bool:
        """Tell whether the model still has the layers."""
        here = dict(model.named_modules())
        return all(here.get(name) is site.module for name, site in found.items())

    def check(self, task: Task, found: Mapping[str, Site]) -> None:
        """Raise if the budget cannot be met, or nothing can leave.

        Raises:
            BudgetError: Names the layers that bind.
            ModelError: Says why for every layer.
        """
        if not found:
            raise nothing_to_change(self.method, self._sites(task.model, task)[1])
        alike = {name: _alike(site) for name, site in found.items()}
        self._choose(task, DirectionScores(found, alike), 1.0)

    def score(
        self, task: Task, found: Mapping[str, Site], pending: Sequence[Step], share: float | None
    ) -> DirectionScores:
        """Score the directions that are left."""
        sites = dict(found)
        for step in pending:
            if isinstance(step, Rotate) and step.module in sites:
                own = step.directions
                sites[step.module] = dataclasses.replace(sites[step.module], inputs=own.inputs, outputs=own.outputs)
        directions = {} if share is None or not sites else self.score_directions(task, sites)
        return DirectionScores(sites, directions, tuple(pending))

    def steps(self, task: Task, scores: DirectionScores, share: float | None) -> tuple[Step, ...]:
        """Return the steps that remove what has to leave, and what leaves already.

        Raises:
            BudgetError: If the budget cannot be met; names the layers that bind.
        """
        chosen = {} if share is None else self._choose(task, scores, share)
        pending = {step.module: step for step in scores.pending}
        new = {
            name: self._rotate(name, scores.sites[name], scores.directions[name], kept)
            for name, kept in chosen.items()
            if kept
        }
        return tuple((pending | new).values())

    def plan(self, task: Task, scores: DirectionScores, steps: tuple[Step, ...]) -> Plan:
        """Return the steps, and the layers of which no direction leaves with the reason."""
        unseen = dict.fromkeys(set(scores.sites) - set(scores.directions), _UNSEEN) if scores.directions else {}
        alone = self._sites(task.model, task)[1] | dict.fromkeys(scores.sites, _AS_IT_IS) | unseen
        changed = {step.module for step in steps}
        return Plan(steps, {name: reason for name, reason in alone.items() if name not in changed})

    def facts(self, task: Task, found: Mapping[str, Site], pending: Sequence[Step]) -> dict[str, float]:
        """Return the share of directions that have left, and what the model would cost with the rest, as a share of the dense one."""
        scores = self.score(task, found, pending, None)
        sizes = [(site.now, site.layer.weight.shape) for site in scores.sites.values()]
        kept = sum((n.inputs or shape[1]) + (n.outputs or shape[0]) for n, shape in sizes)
        have, dense = self.target.counts(task)
        saved = [(self._cost(site, _WHOLE), self._cost(site, site.now)) for site in scores.sites.values()]
        left = have - sum(getattr(whole, self.target.name) - getattr(now, self.target.name) for whole, now in saved)
        return {
            "removed/directions": 1 - kept / max(1, sum(shape[0] + shape[1] for _, shape in sizes)),
            f"removed/{self.target.name}_share": left / max(1, dense),
        }

    def _sites(self, model: nn.Module, task: Task | None) -> tuple[dict[str, Site], dict[str, str]]:
        """Return layers by name, and by name the reason why others are left alone; without a task no shapes are known."""
        modules = dict(model.named_modules())
        last = next((name for name in reversed(modules) if is_plain(modules[name])), None)

        def calls(name: str) -> Shapes:
            return () if task is None else calls_of(name, modules[name], task.cost.shapes)

        def reason(name: str, module: nn.Module) -> str | None:
            if self.official and name == last:
                return "it is the last layer, the classifier"
            return _obstacle(module) or (
                "it is not called with the example inputs" if task is not None and not calls(name) else None
            )

        layers, alone = replaceable(model, self.include, self.exclude, reason, (Rotated,))
        found = {}
        for name, module in layers.items():
            found[name] = Site(module, factors_of(module)["core"], calls(name))
        return found, alone

    def _choose(self, task: Task, scores: DirectionScores, share: float) -> dict[str, Kept | None]:
        """Return how many directions of every layer stay; None: no more leave than have left."""
        have, dense = self.target.counts(task)
        bound = resolve_bound(self.target.value, dense, self.target.name)
        bound += math.floor((1 - share) * max(0, have - bound))
        fixed, ladders = have, {}
        for name, site in scores.sites.items():
            whole, now = self._cost(site, _WHOLE), getattr(self._cost(site, site.now), self.target.name)
            fixed -= getattr(whole, self.target.name)
            own = scores.directions.get(name)
            ladders[name] = (Choice(None, 0.0, now),) if own is None else self._ladder(site, own, whole, now)
        return allocate(ladders, bound, fixed=fixed, name=self.target.name)

    def _ladder(self, site: Site, own: RankedDirections, whole: Cost, now: int) -> tuple[Choice, ...]:
        def price(kept: Kept) -> int | None:
            would = self._cost(site, kept)
            cheaper = would.params < whole.params and would.flops < whole.flops
            pays = would.params <= whole.params if self.official else cheaper
            return int(getattr(would, self.target.name)) if pays else None

        offered = forms_of(site.module)
        sides: tuple[Side, ...] = ("both",) if self.official or (self.separable and "both" in offered) else offered
        return direction_choices(own.input_scores, own.output_scores, price, now, sides, self.limit, self.align)

    def _cost(self, site: Site, kept: Kept) -> Cost:
        return cost(site.module, self._form(site, kept), site.shapes)

    def _form(self, site: Site, kept: Kept) -> Form:
        """Return the form that a layer takes with so many directions."""
        if kept == _WHOLE:
            return Form()
        widths = [kept.inputs or site.layer.weight.shape[1], kept.outputs or site.layer.weight.shape[0]]
        separable = min(widths) if self.separable and "both" in forms_of(site.module) else None
        augmented = self.official and isinstance(site.layer, nn.Linear) and site.layer.bias is not None
        return Form(*kept, separable, augmented)

    def _rotate(self, name: str, site: Site, own: RankedDirections, kept: Kept) -> Rotate:
        form = self._form(site, kept)
        weighted = form.separable is not None and self.separable == "curvature"
        weights = (own.input_curvature, own.output_curvature) if weighted else (None, None)
        inputs, outputs = (
            None if n is None else basis[:, :n] for basis, n in ((own.inputs, kept.inputs), (own.outputs, kept.outputs))
        )
        weights_in, weights_out = (None if w is None else w[:n] for w, n in zip(weights, kept, strict=True))
        directions = Directions(inputs, outputs, form.separable, form.augmented, weights_in, weights_out)
        return Rotate.of(name, site.module, directions)


def _obstacle(module: nn.Module) -> str | None:
    """Say why directions of a layer cannot leave, or None."""
    try:
        factors = factors_of(module)
    except ModelError:
        return "one of its factors has been replaced"
    if isinstance(module, Rotated):
        changed = next(filter(None, map(obstacle, factors.values())), None)
        if changed is not None:
            return f"of one of its factors: {changed}"
    if getattr(factors["core"], "groups", 1) > 1:
        return "its groups have inputs and outputs of their own, which a rotation would mix"
    return None


def _alike(site: Site) -> RankedDirections:
    """Return directions that all score the same, for what can be known of a budget before there is any data."""
    rows, columns = site.layer.weight.shape[:2]
    one, other = torch.ones(columns, dtype=torch.float64), torch.ones(rows, dtype=torch.float64)
    return RankedDirections(one.expand(columns, -1), other.expand(rows, -1), one, other, one, other)
