"""Base of the methods that remove single weights: masks of exact size, and the units that die of them."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_prune.budget.weights import Scope, count_to_remove, select_weights
from lightning_prune.callback.checks import check_choice, check_integer, nothing_to_change
from lightning_prune.callback.masking import Masking, Schedule
from lightning_prune.callback.task import Task
from lightning_prune.errors import BudgetError, ModelError, OptionError
from lightning_prune.structure.dead import bury, has_empty_slice
from lightning_prune.structure.masks import cut_masks, masked
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.preserve import preserved
from lightning_prune.structure.prunable import prunable_layers, prunable_weights
from lightning_prune.structure.select import Pattern, select
from lightning_prune.structure.steps import KeepChannels, MaskWeight, Step

log = logging.getLogger(__name__)

ChooseWeights = Callable[[Task, Mapping[str, nn.Parameter], Mapping[str, Tensor], int], Mapping[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Weights:
    """The prunable weights of a model.

    Attributes:
        tensors: The parameters by full name, tied ones once.
        kept: True where an entry has not been masked, by name, boolean.
        gone: Entries that earlier stages have cut off.
        alone: Layers that are selected and have no prunable weight, with the reason.
        dead: The steps that remove units which die of the masks; none before the last masks are chosen.
        gains: By what the entries that stay are multiplied when the masks are taken, by name, where it is not 1.
    """

    tensors: Mapping[str, nn.Parameter]
    kept: Mapping[str, Tensor]
    gone: int
    alone: Mapping[str, str]
    dead: tuple[Step, ...] = ()
    gains: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def entries(self) -> int:
        """Number of prunable weights of the dense model."""
        return self.gone + sum(weight.numel() for weight in self.tensors.values())

    @property
    def removed(self) -> int:
        """How many of them are cut off or masked."""
        return self.gone + sum(int((~mask).sum()) for mask in self.kept.values())


@dataclasses.dataclass(frozen=True)
class EntryRemoval:
    """Entries of weights leave: they are masked, and units whose weights are all masked go for good.

    Attributes:
        method: Name of the method, for messages.
        sparsity: Share of the weights that leaves, of the dense model's.
        remove_dead: Whether units that die are cut off.
        include: Layers to take.
        exclude: Layers to leave alone.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from.
    """

    method: str
    sparsity: float
    remove_dead: bool
    include: Pattern | Sequence[Pattern] | None
    exclude: Pattern | Sequence[Pattern] | None
    recalibrate_bn: int

    def claim(self, model: nn.Module) -> set[str]:
        """Return the names of the layers that hold prunable weights and are selected."""
        layers = prunable_layers(model)
        return set(select(layers, self.include, self.exclude)) if layers else set()

    def look(self, task: Task) -> Weights:
        """Return the prunable weights.

        Raises:
            OptionError: If a pattern matches no layer.
            ModelError: If there is none; says why for every layer.
        """
        tensors, alone = self.candidates(task)
        if not tensors:
            raise nothing_to_change(self.method, alone)
        masks = cut_masks(task.model, task.plan)
        kept = {key: masks.get(key, torch.ones(p.shape, dtype=torch.bool)).to(p.device) for key, p in tensors.items()}
        return Weights(tensors, kept, _cut_off(task.plan, set(tensors)), alone)

    def candidates(self, task: Task) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """Return the weights of which entries can leave, by name, and the layers that are left alone with their reasons."""
        return prunable_weights(task.model, self.claim(task.model))

    def fits(self, found: Weights, model: nn.Module) -> bool:
        """Tell whether the model still holds the weights, in their shapes."""
        parameters = dict(model.named_parameters())
        return all(parameters.get(key) is p and p.shape == found.kept[key].shape for key, p in found.tensors.items())

    def score(self, task: Task, found: Weights, pending: Sequence[Step], share: float | None) -> Weights:
        """Return what is masked, and the units that die of it: nothing more will leave."""
        return self._with_dead(task, _with(found, pending))

    def _with_dead(self, task: Task, weights: Weights) -> Weights:
        """Find the units that die, with batch normalization's statistics of the masked model, which their constants depend on.

        Every rank does, because synchronized batch normalization meets the others in every pass.
        """
        if not self.remove_dead or not has_empty_slice(weights.kept):
            return weights
        with masked(dict(weights.tensors), weights.kept), preserved(task.model, parameters=True):
            for key, gains in weights.gains.items():
                weights.tensors[key].data.mul_(gains.float().to(weights.tensors[key]))
            if task.probe.data is not None:
                task.probe.recalibrate(self.recalibrate_bn, task.calls)
            return dataclasses.replace(weights, dead=bury(task.model, task.calls, weights.kept))

    def steps(self, task: Task, scores: Weights, share: float | None) -> tuple[Step, ...]:
        """Return a mask for every tensor that has lost entries."""
        before = cut_masks(task.model, task.plan)
        steps = []
        for key, mask in scores.kept.items():
            if not bool(mask.all()) and not (key in before and torch.equal(before[key], mask.cpu())):
                module, _, parameter = key.rpartition(".")
                steps.append(MaskWeight.of(module, parameter, mask, scores.gains.get(key)))
        return tuple(steps)

    def plan(self, task: Task, scores: Weights, steps: tuple[Step, ...]) -> Plan:
        """Return the masks and the removal of units that died of them."""
        alone = dict(scores.alone)
        empty = [name for name, mask in scores.kept.items() if not bool(mask.any())]
        if empty:
            log.warning(
                "%s(sparsity=%s) leaves no weight of %s: what comes before is cut off. Lower sparsity, give min_kept=, or scope='erk'.",
                self.method,
                self.sparsity,
                ", ".join(map(repr, empty)),
            )
        whole = {key.rpartition(".")[0] for key in scores.tensors} - {step.module for step in steps}
        alone |= dict.fromkeys(sorted(whole - set(alone)), "all of its weights stay")
        steps += scores.dead if steps else ()
        changed = {step.module for step in steps}
        return Plan(steps, {name: reason for name, reason in alone.items() if name not in changed})

    def facts(self, task: Task, found: Weights, pending: Sequence[Step]) -> dict[str, float]:
        """Return the share of the dense model's weights that is masked or gone."""
        return {"masked/sparsity": _with(found, pending).removed / found.entries}


@dataclasses.dataclass(frozen=True)
class WeightRemoval(EntryRemoval):
    """Single weights leave.

    Attributes:
        choose: Chooses what stays; see :meth:`WeightPruning.choose_weights`.
        min_kept: At least so many weights of every tensor stay.
    """

    choose: ChooseWeights
    min_kept: int

    def met(self, task: Task) -> str | None:
        """Return why the target is already met, in words, or None."""
        if self.sparsity == 0:
            return "sparsity=0 removes nothing"
        if not task.plan:
            return None
        weights = self.look(task)
        count = count_to_remove(self.sparsity, weights.entries)
        if weights.removed < count:
            return None
        return f"{weights.removed:,} of {weights.entries:,} weights have left, sparsity={self.sparsity} are asked for"

    def check(self, task: Task, found: Weights) -> None:
        """Raise if the target cannot be met.

        Raises:
            BudgetError: If ``min_kept`` leaves too few that could go.
        """
        free = sum(max(0, weight.numel() - self.min_kept) for weight in found.tensors.values())
        count = count_to_remove(self.sparsity, found.entries) - found.gone
        if count > free:
            raise BudgetError(
                f"{self.method}(sparsity={self.sparsity}, min_kept={self.min_kept}) would remove {count:,} weights of "
                f"{len(found.tensors)} tensors, of which at most {free:,} may go. Lower sparsity or min_kept."
            )

    def score(self, task: Task, found: Weights, pending: Sequence[Step], share: float | None) -> Weights:
        """Choose which weights stay; every rank comes to the same."""
        if share is None:
            return super().score(task, found, pending, share)
        self.check(task, found)
        now = _with(found, pending)
        target = count_to_remove(self.sparsity, found.entries)
        start = found.removed  # before this fit
        count = start + round((target - start) * share) - found.gone if share < 1 else target - found.gone
        with masked(dict(now.tensors), now.kept):
            stays = self.choose(task, now.tensors, now.kept, max(count, now.removed - now.gone))
        kept = {key: (stays[key] != 0).to(mask.device) & mask for key, mask in now.kept.items()}
        gains = {key: factors for key, factors in stays.items() if factors.is_floating_point()}
        chosen = dataclasses.replace(now, kept=kept, gains=gains)
        return self._with_dead(task, chosen) if share == 1 and not pending else chosen


def _with(found: Weights, pending: Sequence[Step]) -> Weights:
    """Return the weights with further entries masked."""
    masks = {step.key: step.mask for step in pending if isinstance(step, MaskWeight)}
    kept = {key: mask & masks[key].to(mask.device) if key in masks else mask for key, mask in found.kept.items()}
    return dataclasses.replace(found, kept=kept)


def _cut_off(plan: Plan, names: set[str]) -> int:
    """Return how many entries of the dense model's weights earlier stages have cut off or factorized away, of those that became ``names``."""
    gone = 0
    for step in plan.steps:
        if isinstance(step, KeepChannels):
            cuts = (cut for name, cut in step.tensors.items() if step.key(name) in names)
            gone += sum(_size(cut.shape) - _size(cut.after) for cut in cuts)
        elif step.replaces and any(name.startswith(f"{step.module}.") for name in names):
            gone += step.removed()
    return gone


def _size(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


class WeightPruning(Masking):
    """Remove single weights by a score.

    Without ``until_epoch`` they are masked at the start of the fit; with it, step by step from ``start_epoch`` on. Masked weights stay exactly
    zero while the model trains. Units of which all incoming or all outgoing weights are masked leave for good, at the start or after the fit.

    Args:
        sparsity: Share of the weights that leaves, in [0, 1), of the dense model's prunable ones: weights of linear layers, convolutions,
            attention and recurrent layers; not biases, norms, embeddings and what is frozen.
        scope: ``"global"``: one ranking over all tensors. ``"uniform"``: the same share of every tensor. ``"erk"``: Erdos-Renyi-kernel densities.
        min_kept: At least so many weights of every tensor stay.
        remove_dead: Whether units that die are cut off.
        include: Layers to take: names, globs or module types; None takes all.
        exclude: Layers to leave alone, likewise.
        start_epoch: First epoch in which a gradual run masks.
        until_epoch: Epoch at whose start a gradual run has reached its target; None masks at the start of the fit.
        every_n_epochs: Epochs between the steps of a gradual run.
        schedule: How the target is approached: ``"cubic"`` (fast first; Zhu and Gupta 2017, arXiv:1710.01878) or ``"linear"``.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        *,
        sparsity: float,
        scope: Scope = "global",
        min_kept: int = 0,
        remove_dead: bool = True,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] | None = None,
        start_epoch: int = 0,
        until_epoch: int | None = None,
        every_n_epochs: int = 1,
        schedule: Schedule = "cubic",
        recalibrate_bn: int = 8,
    ) -> None:
        super().__init__(
            include=include,
            exclude=exclude,
            start_epoch=start_epoch,
            until_epoch=until_epoch,
            every_n_epochs=every_n_epochs,
            schedule=schedule,
            recalibrate_bn=recalibrate_bn,
        )
        self.sparsity, self.scope, self.min_kept, self.remove_dead = sparsity, scope, min_kept, remove_dead
        check_choice(self, "scope", ("global", "uniform", "erk"))
        self.removal = weight_removal(self, self.choose_weights, sparsity)

    def score_weights(
        self, task: Task, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Score every weight; called on every rank, and every rank returns the same.

        Args:
            task: The model and its data.
            weights: The prunable parameters by full name, tied ones once.
            kept: False where an entry is masked already, same shapes, boolean. Those are zero in the model, and their scores are not read.

        Returns:
            Scores by name, same shapes, finite; higher = keep.
        """
        raise NotImplementedError

    def choose_weights(
        self, task: Task, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor], count: int
    ) -> Mapping[str, Tensor]:
        """Choose which entries stay; called on every rank, and every rank comes to the same.

        Scores once. Methods that score anew while weights leave override this.

        Args:
            task: The model and its data.
            weights: The prunable parameters by full name.
            kept: False where an entry is masked already.
            count: How many entries are False in the result, those that are masked already among them.

        Returns:
            Which entries stay, boolean, by name; or by what each is multiplied once, floating, 0 for those that leave.
        """
        scores = check_scores(type(self).__name__, self.score_weights(task, weights, kept), kept)
        return select_weights(scores, kept, count, self.scope, self.min_kept)


class _Options(Protocol):
    """The options of a method that removes weights."""

    min_kept: int
    remove_dead: bool
    include: Pattern | Sequence[Pattern] | None
    exclude: Pattern | Sequence[Pattern] | None
    recalibrate_bn: int


def weight_removal(method: _Options, choose: ChooseWeights, sparsity: object) -> WeightRemoval:
    """Check the options of a method and return the removal that they describe.

    Args:
        method: The method.
        choose: Chooses what stays.
        sparsity: Share of the weights that leaves.

    Raises:
        OptionError: If one is of the wrong type or out of range.
    """
    name = type(method).__name__
    for bound in ("flops", "params"):
        if getattr(method, bound, None) is not None:
            raise OptionError(
                f"{name}({bound}={getattr(method, bound)!r}): single weights leave by sparsity. Give sparsity=; or structured=True for channels."
            )
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise OptionError(f"{name}(sparsity={sparsity!r}): give a number in [0, 1), the share of weights that leave.")
    check_integer(method, "min_kept", 0)
    check_choice(method, "remove_dead", (True, False))
    return WeightRemoval(
        method=name,
        choose=choose,
        sparsity=float(sparsity),
        min_kept=method.min_kept,
        remove_dead=method.remove_dead,
        include=method.include,
        exclude=method.exclude,
        recalibrate_bn=method.recalibrate_bn,
    )


def check_scores(method: str, scores: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Check that every weight that is still there has a finite score.

    Raises:
        ModelError: If one has not; names the tensor.
    """
    for name, mask in kept.items():
        if not bool((scores[name].isfinite() | ~mask.to(scores[name].device)).all()):
            raise ModelError(
                f"{method}: scores of {name!r} are not finite. Look for a diverged training, or for a loss that overflows."
            )
    return scores
