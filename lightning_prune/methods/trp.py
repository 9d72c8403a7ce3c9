"""Trained Rank Pruning: training that keeps returning to low rank, so that the final factorization costs nothing.

Xu, Li, Zhang, Wen, Wang, Qi, Chen, Lin and Xiong, "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", IJCAI 2020
(arXiv:2004.14566). Every ``m`` optimizer steps the weight matrix ``W`` of a layer is replaced by its truncated singular value decomposition
``T = D(W)``, and the step is taken from there (eq. 3, 4); ``D`` keeps the fewest singular values that lose at most a share ``e`` of the squared
ones (eq. 5). Optionally the nuclear norm is penalized by its sub-gradient ``U_k V_k^T`` at ``T`` (eq. 6).

Unlike the authors' code: ``e`` is an argument (theirs is 0.1); the sub-gradient acts in every step as eq. 6 says, not only in those that project
(``nuclear_every="projection"`` is theirs); it is coupled to the gradient for SGD and decoupled otherwise, because adaptive steps would
divide its strength away; the final cut is relative, not at an absolute singular value; strided layers are factorized, too. A budget can take the
place of ``e``: then one share of lost energy, common to all layers, is chosen at every projection so that the factorized model would meet it.
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prune.callback import Compression, Task
from lightning_prune.callback.checks import check_integer, nothing_to_change
from lightning_prune.errors import OptionError
from lightning_prune.methods.low_rank import (
    Candidate,
    Scheme,
    Target,
    check_scheme,
    choose_ranks,
    factorize_steps,
    find_candidates,
    spectra_of,
)
from lightning_prune.structure.factorized import weight_of
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.select import Pattern
from lightning_prune.structure.spectrum import Spectrum, polar, project, rank_for_energy

log = logging.getLogger(__name__)


@torch.no_grad()
def project_(candidate: Candidate, rank: int, known: Spectrum, penalized: bool = True) -> Tensor | None:
    """Replace the weight of a layer by the nearest one of that rank, in place.

    Args:
        candidate: The layer; its matrices are ``[groups, p, q]``.
        rank: Rank to project to, per group.
        known: The spectrum of its matrices.
        penalized: Whether the direction of the penalty is wanted.

    Returns:
        The sub-gradient of the nuclear norm there, ``U_k V_k^T``, in the shape and type of the weight; None if it is not wanted.
    """
    weight, matrix = candidate.layer.weight, candidate.matrix()
    direction = polar(matrix, rank, known) if penalized else None
    weight.copy_(weight_of(project(matrix, rank, known), candidate.kind, weight.shape))
    return None if direction is None else weight_of(direction, candidate.kind, weight.shape).to(weight)


class TRP(Compression):
    """Train with weights that keep returning to low rank, and factorize them when the fit has ended.

    Give at most one of ``energy``, ``flops``, ``params``; without any, ``energy`` is 0.02, the paper's value for CIFAR.

    Args:
        energy: Share of the squared singular values that a projection may lose, in [0, 1); 0.02 on CIFAR, 0.005 on ImageNet in the paper.
        flops: Bound on the multiply-adds of the factorized model: share of the dense one (float) or a count for the example inputs (int).
        params: Bound on its parameters, likewise.
        scheme: ``"channel"``: k x k convolution to ``rank`` channels, then 1 x 1. ``"spatial"``: k x 1, then 1 x k.
        every_n_steps: Optimizer steps from one projection to the next.
        nuclear: Strength of the nuclear norm's penalty, at least 0, per step and unit of learning rate; 3e-4 in the paper.
        nuclear_every: ``"step"`` as in the paper, or ``"projection"`` as in the authors' code.
        align: Ranks of the final factorization are rounded up to multiples of it; 1 switches that off.
        start_epoch: First epoch that projects.
        until_epoch: Epoch at whose start a budget is reached, the bound falling linearly until then; None demands it at once.
        include: Layers to factorize: names, globs or module types; None takes all that can be.
        exclude: Layers to leave alone, likewise.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from after the factorization; 0 leaves them.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    gradual = True

    def __init__(
        self,
        energy: float | None = None,
        flops: float | int | None = None,
        params: float | int | None = None,
        scheme: Scheme = "channel",
        every_n_steps: int = 20,
        nuclear: float = 0.0,
        nuclear_every: Literal["step", "projection"] = "step",
        align: int = 8,
        start_epoch: int = 0,
        until_epoch: int | None = None,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] | None = None,
        recalibrate_bn: int = 8,
    ) -> None:
        super().__init__(
            include=include,
            exclude=exclude,
            start_epoch=start_epoch,
            until_epoch=until_epoch,
            recalibrate_bn=recalibrate_bn,
        )
        self.energy = 0.02 if energy is None and flops is None and params is None else energy
        self.flops, self.params, self.align = flops, params, align
        self.scheme = check_scheme("TRP", scheme)
        self.every_n_steps, self.nuclear, self.nuclear_every = every_n_steps, nuclear, nuclear_every
        self.target.check("TRP")
        check_integer(self, "every_n_steps", 1)
        if isinstance(nuclear, bool) or not isinstance(nuclear, int | float) or not 0 <= nuclear < float("inf"):
            raise OptionError(f"TRP(nuclear={nuclear!r}): give a number of at least 0; the paper has 3e-4.")
        if nuclear_every not in ("step", "projection"):
            raise OptionError(f"TRP(nuclear_every={nuclear_every!r}): give 'step' or 'projection'.")
        self.reset()

    def reset(self) -> None:
        """Forget the fit before this one."""
        super().reset()
        self.ranks: dict[str, int] = {}
        self._task: Task | None = None
        self._candidates: dict[str, Candidate] = {}
        self._directions: dict[str, Tensor] = {}
        self._projected_at: int | None = None
        self._fresh = False

    def release(self) -> None:
        """Let go of the layers."""
        super().release()
        self._task, self._candidates, self._directions = None, {}, {}

    @property
    def target(self) -> Target:
        """The target as one value."""
        return Target(self.energy, None, self.flops, self.params, self.align)

    def claim(self, model: nn.Module) -> set[str]:
        """Return the names of the layers that can be factorized."""
        return set(find_candidates(model, self.scheme, self.include, self.exclude)[0])

    def met(self, task: Task) -> str | None:
        """Return why the target is already met, in words, or None."""
        return super().met(task) or self.target.met(task)

    def rehearse(self, task: Task) -> None:
        """Check patterns and budget on the model as it stands.

        Raises:
            OptionError: If a pattern matches no layer.
            ModelError: If there is no layer to factorize.
            BudgetError: If the budget cannot be met.
        """
        if self.met(task) is None:
            self.begin(task)
        self.release()

    def begin(self, task: Task) -> None:
        """Find the layers, and check before training that the target can be met.

        Raises:
            ModelError: If there is no layer to factorize.
            BudgetError: If the budget cannot be met.
        """
        self._task = task
        self._candidates, alone = find_candidates(task.model, self.scheme, self.include, self.exclude, task.cost.shapes)
        if not self._candidates:
            raise nothing_to_change("TRP", alone)
        kept = {name: direction for name, direction in self._directions.items() if name in self._candidates}
        self._directions = {name: d.to(self._candidates[name].layer.weight) for name, d in kept.items()}
        if self.energy is None:
            layers = self._trainable()
            choose_ranks(task, layers, {name: s.values for name, s in spectra_of(layers, None).items()}, self.target)

    def on_step_begin(self, trainer: Any, module: Any) -> None:
        """Project, if ``every_n_steps`` optimizer steps have passed since the last time."""
        due = self._projected_at is None or self.steps - self._projected_at >= self.every_n_steps
        self._fresh = due or self.steps == self._projected_at
        if not due:
            return
        self._projected_at = self.steps
        if trainer.is_global_zero:
            self._project(self.progress())
        if trainer.world_size > 1:
            self._share(trainer)

    def _project(self, progress: float) -> None:
        spectra = spectra_of(self._trainable(), self.energy)
        self.ranks = self._ranks({name: found.values for name, found in spectra.items()}, progress)
        self._directions = {}
        for name, rank in self.ranks.items():
            direction = project_(self._candidates[name], rank, spectra[name], penalized=self.nuclear > 0)
            if direction is not None:
                self._directions[name] = direction

    def _ranks(self, spectra: dict[str, Tensor], progress: float) -> dict[str, int]:
        """Return the rank that each layer is projected to; under a budget, layers that it leaves dense are not."""
        if self.energy is not None:
            return {name: rank_for_energy(values, self.energy) for name, values in spectra.items()}
        task = self._task
        assert task is not None, "begin() comes before the first step"
        now = Task(task.model, task.calls, task.cost, task.plan, task.origin, task.probe, progress)
        return choose_ranks(now, self._trainable(), spectra, self.target)[0]

    def _trainable(self) -> dict[str, Candidate]:
        """Return the candidates that are not frozen at the moment."""
        return {name: c for name, c in self._candidates.items() if c.layer.weight.requires_grad}

    def _share(self, trainer: Any) -> None:
        """Give the other ranks what rank 0 has projected; eigenvectors may differ in their last bits between machines."""
        self.ranks = trainer.strategy.broadcast(self.ranks, src=0)
        self._directions = {name: d for name, d in self._directions.items() if name in self.ranks}
        for name in self.ranks:
            weight = self._candidates[name].layer.weight
            torch.distributed.broadcast(weight.data, src=0)
            if self.nuclear:
                direction = self._directions.setdefault(name, torch.empty_like(weight.data))
                torch.distributed.broadcast(direction, src=0)

    def on_gradients(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Add the sub-gradient of the nuclear norm to the gradients of SGD."""
        if self._penalizes() and isinstance(optimizer, torch.optim.SGD):
            for weight, direction, _ in self._penalized(optimizer):
                if weight.grad is not None:
                    weight.grad.add_(direction, alpha=self.nuclear)

    def on_stepped(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Move weights against the sub-gradient after the step of any other optimizer."""
        if self._penalizes() and not isinstance(optimizer, torch.optim.SGD):
            with torch.no_grad():
                for weight, direction, lr in self._penalized(optimizer):
                    weight.sub_(direction, alpha=lr * self.nuclear)

    def _penalizes(self) -> bool:
        return self.nuclear > 0 and bool(self._directions) and (self.nuclear_every == "step" or self._fresh)

    def _penalized(self, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor, float]]:
        """Return weight, direction and learning rate of the layers that an optimizer holds."""
        rates = {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        weights = {name: self._candidates[name].layer.weight for name in self._directions}
        return [(w, self._directions[name], rates[w]) for name, w in weights.items() if w in rates and w.requires_grad]

    def facts(self, module: nn.Module) -> dict[str, float]:
        """Return the rank of every layer and their mean share of the full rank."""
        full = {name: min(c.matrix().shape[1:]) for name, c in self._candidates.items()}
        shares = [rank / full[name] for name, rank in self.ranks.items()]
        ranks = {f"rank/{name}": float(rank) for name, rank in self.ranks.items()}
        return ranks | ({"rank_share": sum(shares) / len(shares)} if shares else {})

    def decide(self, task: Task, scores: Any) -> Plan:
        """Choose the ranks of the factorization from the spectra of the weights as they are now.

        Raises:
            BudgetError: If the budget cannot be met.
        """
        found, alone = find_candidates(task.model, self.scheme, self.include, self.exclude, task.cost.shapes)
        candidates = {name: c for name, c in found.items() if c.layer.weight.requires_grad}
        alone |= {name: "it is frozen and does not train to low rank" for name in found if name not in candidates}
        spectra = {name: known.values for name, known in spectra_of(candidates, self.energy).items()}
        ranks, dense = choose_ranks(task, candidates, spectra, self.target)
        return Plan(factorize_steps(candidates, ranks), alone | dense)

    def state_dict(self) -> dict[str, Any]:
        """Return the shared state, the step of the last projection, and the directions of the penalty in force."""
        own = {"projected_at": self._projected_at, "ranks": dict(self.ranks), "directions": dict(self._directions)}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint.

        Raises:
            CheckpointError: If this callback was configured otherwise when the checkpoint was written.
        """
        super().load_state_dict(state)
        self._projected_at, self.ranks, self._directions = (
            state["projected_at"],
            dict(state["ranks"]),
            dict(state["directions"]),
        )
