"""Low-rank factorization of a trained network by truncated singular value decomposition.

Convolutions: Zhang, Zou, He and Sun, "Accelerating Very Deep Convolutional Networks for Classification and Detection", TPAMI 2016
(arXiv:1505.06798), the ``channel`` form without its data term; Jaderberg, Vedaldi and Zisserman, "Speeding up Convolutional Neural Networks with
Low Rank Expansions", BMVC 2014 (arXiv:1405.3866), the ``spatial`` form. Linear layers become two.

The weights are truncated as they are; nothing is known of the data. A layer is replaced only where that is cheaper in parameters *and* in
multiply-adds. Ranks come from one of: the share of energy that each layer may lose, a common rank, or a budget over all layers, met by one
threshold on the lost energy that is common to them (:mod:`lightning_prune.budget`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from lightning_prune.budget import allocate, rank_choices, resolve_bound
from lightning_prune.callback import Compression, Task
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.structure.factorized import (
    Kind,
    Shapes,
    break_even_rank,
    cost,
    dense_cost,
    groups_of,
    kind_for,
    matrix_of,
)
from lightning_prune.structure.layers import DenseLayer, is_plain
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.replaceable import ZERO, replaceable
from lightning_prune.structure.select import Pattern
from lightning_prune.structure.spectrum import Spectrum, rank_for_energy, round_rank, spectrum
from lightning_prune.structure.steps import Factorize

Scheme = Literal["channel", "spatial"]


@dataclasses.dataclass(frozen=True)
class Target:
    """How far to go; exactly one of the first four is given.

    Attributes:
        energy: Share of the squared singular values that each layer may lose, in [0, 1).
        rank: The same rank for every layer.
        flops: Bound on the multiply-adds of the model: share of the dense one, or a count.
        params: Bound on its parameters, likewise.
        align: Ranks are rounded up to multiples of it (:func:`lightning_prune.structure.spectrum.round_rank`).
    """

    energy: float | None = None
    rank: int | None = None
    flops: float | None = None
    params: float | None = None
    align: int = 8

    @property
    def bounded(self) -> Literal["flops", "params"] | None:
        """What is bounded over all layers, if anything."""
        return "flops" if self.flops is not None else "params" if self.params is not None else None

    def check(self, method: str) -> None:
        """Check that exactly one target is given and in range.

        Raises:
            OptionError: Otherwise.
        """
        given = {f.name: value for f in dataclasses.fields(self)[:4] if (value := getattr(self, f.name)) is not None}
        if len(given) != 1:
            raise OptionError(f"{method} needs exactly one of energy, rank, flops, params; got {given or 'none'}.")
        if self.energy is not None:
            rank_for_energy(_ONE, self.energy)
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise OptionError(f"{method}(rank={self.rank!r}): give an integer of at least 1.")
        for name in ("flops", "params"):
            value = getattr(self, name)
            share = isinstance(value, float) and 0 < value <= 1
            count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if value is not None and not share and not count:
                raise OptionError(
                    f"{method}({name}={value!r}): give a float in (0, 1], a share of the dense model, or an int of at least 1, a count."
                )
        round_rank(1, self.align, 1)

    def met(self, task: Task) -> str | None:
        """Return in words why a bound is already met, or None."""
        have = {"flops": task.cost.total, "params": task.params}
        dense = {"flops": task.origin.flops, "params": task.origin.params}
        if self.bounded is None or not task.plan:
            return None
        bound = resolve_bound(getattr(self, self.bounded), dense[self.bounded], self.bounded)
        if have[self.bounded] > bound:
            return None
        return f"the model has {have[self.bounded]:,} {self.bounded}, at most {bound:,} are asked for"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layer that may be factorized.

    Attributes:
        layer: The dense layer.
        kind: The form that it would take.
        shapes: Shapes of its input and output in every call; empty if it is never called.
    """

    layer: DenseLayer
    kind: Kind
    shapes: Shapes = ()

    def matrix(self) -> Tensor:
        """Return the weight as the matrices that are truncated, ``[groups, p, q]``."""
        return matrix_of(self.layer.weight.detach(), self.kind, groups_of(self.layer))


def find_candidates(
    model: nn.Module, scheme: Scheme, include: Any, exclude: Any, shapes: Mapping[str, Shapes] | None = None
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Find the layers that can be factorized and the reasons why others cannot.

    Args:
        model: The model, possibly with factorized layers from earlier stages, which do not count.
        scheme: Form of convolutions.
        include: Patterns of layers to take, None for all.
        exclude: Patterns of layers to leave out without a word.
        shapes: Shapes of input and output per layer, as counted; None does not ask whether a layer is called.

    Returns:
        Candidates by name, and the reason by name of every layer that was chosen but cannot be factorized.

    Raises:
        OptionError: If a pattern matches no layer.
    """

    def obstacle(name: str, _layer: nn.Module) -> str | None:
        return None if shapes is None or shapes.get(name) else "it is not called with the example inputs"

    layers, alone = replaceable(model, include, exclude, obstacle)
    found = {
        name: Candidate(layer, kind_for(layer, scheme), (shapes or {}).get(name, ()))
        for name, layer in layers.items()
        if is_plain(layer)
    }
    return found, alone


def spectra_of(candidates: Mapping[str, Candidate], energy: float | None) -> dict[str, Spectrum]:
    """Decompose the weights of several layers.

    Args:
        candidates: Layers by name.
        energy: The share of lost energy that will be judged, if that is the target.

    Raises:
        ModelError: If the weights of a layer are not finite; names the layer.
    """
    found = {}
    for name, candidate in candidates.items():
        try:
            found[name] = spectrum(candidate.matrix(), energy)
        except ModelError as error:
            raise ModelError(f"Layer {name!r}: {error}") from error
    return found


def choose_ranks(
    task: Task, candidates: Mapping[str, Candidate], spectra: Mapping[str, Tensor], target: Target
) -> tuple[dict[str, int], dict[str, str]]:
    """Choose the rank of every layer.

    Args:
        task: The model and what it costs.
        candidates: Layers by name.
        spectra: Their singular values, descending, ``[groups, n]``.
        target: How far to go. A bound is interpolated from the dense cost by ``task.progress``.

    Returns:
        Ranks by name, and by name the reason why a layer stays dense.

    Raises:
        BudgetError: If a bound cannot be met; names the layers that bind.
        OptionError: If a bound is not a share or a count.
    """
    limits = {name: break_even_rank(c.layer, c.kind, c.shapes) for name, c in candidates.items()}
    if target.bounded is not None:
        return _within_budget(task, candidates, spectra, limits, target)
    ranks, dense = {}, {}
    for name, limit in limits.items():
        full = spectra[name].shape[-1]
        wanted = target.rank if target.rank is not None else rank_for_energy(spectra[name], target.energy or 0.0)
        rank = round_rank(min(wanted, full), target.align, full)
        if rank <= limit:
            ranks[name] = rank
        else:
            dense[name] = (
                f"rank {rank} is not cheaper than dense; up to {limit} would be"
                if limit
                else "no rank is cheaper than dense"
            )
    return ranks, dense


def _within_budget(
    task: Task,
    candidates: Mapping[str, Candidate],
    spectra: Mapping[str, Tensor],
    limits: Mapping[str, int],
    target: Target,
) -> tuple[dict[str, int], dict[str, str]]:
    what = target.bounded or "flops"
    have = {"flops": task.cost.total, "params": task.params}[what]
    origin = {"flops": task.origin.flops, "params": task.origin.params}[what]
    bound = resolve_bound(getattr(target, what), origin, what)
    bound += round((1 - task.progress) * max(0, have - bound))
    ladders, fixed = {}, have
    for name, c in candidates.items():
        dense = getattr(dense_cost(c.layer, c.shapes), what)
        fixed -= dense
        price = lambda rank, c=c: getattr(cost(c.layer, c.kind, rank, c.shapes), what)  # noqa: E731
        ladders[name] = rank_choices(spectra[name], price, dense, limits[name], target.align)
    sizes = allocate(ladders, bound, fixed=fixed, name=what)
    ranks = {name: size for name, size in sizes.items() if size is not None}
    alone = {
        name: "the budget is met with it dense" if limits[name] else "no rank is cheaper than dense"
        for name in sizes
        if name not in ranks
    }
    return ranks, alone


def factorize_steps(candidates: Mapping[str, Candidate], ranks: Mapping[str, int]) -> tuple[Factorize, ...]:
    """Return the steps that factorize each layer at its rank."""
    return tuple(
        Factorize.of(name, candidates[name].layer, candidates[name].kind, rank) for name, rank in ranks.items()
    )


class LowRank(Compression):
    """Factorize a trained network at the start of a fit, then fine-tune the small one.

    Give exactly one of ``energy``, ``rank``, ``flops``, ``params``.

    Args:
        energy: Share of the squared singular values that each layer may lose, in [0, 1); 0.05 is a careful start.
        rank: The same rank for every layer.
        flops: Bound on the multiply-adds of the model: share of the dense one (float) or a count for the example inputs (int).
        params: Bound on its parameters, likewise.
        scheme: ``"channel"``: k x k convolution to ``rank`` channels, then 1 x 1. ``"spatial"``: k x 1, then 1 x k.
        align: Ranks are rounded up to multiples of it; 1 switches that off.
        include: Layers to factorize: names, globs or module types; None takes all that can be.
        exclude: Layers to leave alone, likewise.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        energy: float | None = None,
        rank: int | None = None,
        flops: float | int | None = None,
        params: float | int | None = None,
        scheme: Scheme = "channel",
        align: int = 8,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] | None = None,
        recalibrate_bn: int = 8,
    ) -> None:
        super().__init__(include=include, exclude=exclude, recalibrate_bn=recalibrate_bn)
        self.energy, self.rank, self.flops, self.params = energy, rank, flops, params
        self.scheme, self.align = check_scheme("LowRank", scheme), align
        self.target.check("LowRank")

    @property
    def target(self) -> Target:
        """The target as one value."""
        return Target(self.energy, self.rank, self.flops, self.params, self.align)

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
            BudgetError: If the budget cannot be met.
        """
        if self.met(task) is None and self.target.bounded is not None:
            self.decide(task, None)

    def decide(self, task: Task, scores: Any) -> Plan:
        """Choose the ranks from the spectra of the weights.

        Raises:
            BudgetError: If the budget cannot be met.
        """
        every, alone = find_candidates(task.model, self.scheme, self.include, self.exclude, task.cost.shapes)
        candidates = {name: found for name, found in every.items() if bool(found.layer.weight.any())}
        alone |= dict.fromkeys(set(every) - set(candidates), ZERO)
        spectra = {name: found.values for name, found in spectra_of(candidates, self.energy).items()}
        ranks, dense = choose_ranks(task, candidates, spectra, self.target)
        return Plan(factorize_steps(candidates, ranks), alone | dense)


def check_scheme(method: str, scheme: str) -> Scheme:
    """Check that a form of convolutions exists.

    Raises:
        OptionError: Otherwise.
    """
    if scheme not in ("channel", "spatial"):
        raise OptionError(f"{method}(scheme={scheme!r}): give 'channel' or 'spatial'.")
    return scheme  # type: ignore[return-value]


_ONE = Tensor([[1.0]])
