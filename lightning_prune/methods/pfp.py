"""Provable filter pruning: channels are ranked, or drawn, by the largest share that they ever have in an output of a layer that reads them.

Liebenwein, Baykal, Lang, Feldman and Rus, "Provable Filter Pruning for Efficient Neural Networks", ICLR 2020 (arXiv:1911.07412). The empirical
sensitivity ``s_j`` of channel ``j`` is its largest share of what a layer sums over its inputs, over calibration samples, outputs, positions and
signs (:mod:`lightning_prune.measure.contributions`). Draw ``m`` times with ``p_j = s_j / S``, ``S = sum_j s_j``, and multiply the weights that
read a channel hit ``n_j`` times by ``n_j / (m p_j)``: there is no bias, and with probability ``1 - delta`` none of the ``M`` outputs that were
covered is off by more than ``eps (z+ + z-)`` if ``m >= (6 + 2 eps) S ln(2 M / delta) / (3 eps^2)`` (:func:`sample_size`). One ``eps`` for
all layers decides how many channels each keeps: as many as ``m(eps)`` draws are expected to hit (:func:`leaving_knobs`). Then the most
sensitive stay (``deterministic``), or the draw decides (``random``), or both do (``hybrid``).

Where we differ from the authors' code (torchprune):

- the contribution of a channel is the sum over its taps, as in the theorem. The authors take the largest tap, with which ``S`` can fall below 1
  and the bound does not hold: ``contribution="max_tap"``. ``official=True`` takes that and the sample sizes of their code;
- channels leave for good. One that several layers read leaves when all can do without it; layers on one stream may leave out different ones
  (:mod:`lightning_prune.structure.gathering`). Where neither is possible a channel stays: a mask would cost accuracy and save nothing;
- every channel has an ``eps`` at which it leaves, and the lowest go first, so that plans for all budgets are nested;
- draws end before one more channel than the budget leaves would be hit, which keeps them unbiased (:func:`draw_distinct`); the network's inputs
  stay;
- a channel that is one number in all of the data moves into the biases of its readers, where these have one and no zero padding stands beside.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lightning_prune.callback.channel_target import ChannelTarget
from lightning_prune.callback.channels import ChannelRemoval, UnitScores
from lightning_prune.callback.checks import check_choice, check_integer, check_probability
from lightning_prune.callback.exhibit import Exhibit
from lightning_prune.callback.masking import Masking, Schedule
from lightning_prune.callback.streams import Columns, choose_columns, columns_in, stream_readers
from lightning_prune.callback.task import Task
from lightning_prune.errors import ModelError
from lightning_prune.measure.certificate import Certificate, Guarantee
from lightning_prune.measure.contributions import Contribution
from lightning_prune.measure.readings import Readings, units_by_input
from lightning_prune.structure.gathering import gather_pays, gather_steps
from lightning_prune.structure.groups import Structure
from lightning_prune.structure.readers import Reader, called_modules, find_readers
from lightning_prune.structure.removal import removal_steps, removed_units
from lightning_prune.structure.select import Pattern
from lightning_prune.structure.steps import AbsorbConstants, ScaleInputs, Step

Floats = NDArray[np.float64]
Mode = Literal["deterministic", "random", "hybrid"]

log = logging.getLogger(__name__)

C, K = (
    3.0,
    3.0,
)  # the authors' constants of the distribution of shares: samples needed, and how far unseen ones may exceed the seen
_RARE = 1e-15  # the least probability that a draw hits something new, so that the number of draws remains a number


# The theorem ----------------------------------------------------------------------------------------------------------------------


def weight_of(mass: float, triples: float, delta: float) -> float:
    """Return ``a`` in ``m = (6 + 2 eps) a / eps^2``: ``S ln(2 M / delta) / 3`` (Bernstein's inequality).

    Args:
        mass: ``S``, the sum of the sensitivities.
        triples: ``M``, outputs that shall all be close, both signs counted.
        delta: Probability with which one may be farther off, in (0, 1).
    """
    return mass * (math.log(2 * triples) - math.log(delta)) / 3


def official_weight(mass: float, patches: int, taps: int, delta: float) -> float:
    """Return ``a`` as the authors' code has it: ``3 S~``, with ``S~`` of :func:`official_mass`."""
    return K * official_mass(mass, patches, taps, delta)


def official_mass(mass: float, patches: int, taps: int, delta: float) -> float:
    """Return ``S~ = 2 C S ln(8 (P + 1) K / delta)`` of the authors' code.

    Args:
        mass: ``S``.
        patches: ``P``, positions of an output per sample.
        taps: ``K``, taps of the kernel.
        delta: In (0, 1).
    """
    return 2 * C * mass * (math.log(8 * (patches + 1) * taps) - math.log(delta))


def sample_size(knob: float, weight: float) -> int:
    """Return how many draws make the relative error at most ``knob``: the next integer above ``(6 + 2 eps) a / eps^2``, at least 1."""
    return max(1, math.ceil((6 + 2 * knob) * weight / knob**2))


def knob_of(draws: Floats | float, weight: float) -> Floats:
    """Return the ``eps`` that ``draws`` draws reach, the inverse of :func:`sample_size`; infinite for none."""
    m = np.asarray(draws, np.float64)
    with np.errstate(divide="ignore"):
        return np.asarray((weight + np.sqrt(weight**2 + 6 * weight * m)) / m)


def samples_needed(outputs: int, largest: int, delta: float) -> int:
    """Return how many samples must be seen for the shares to bound those of unseen ones: ``C ln(8 eta* eta / delta)``.

    Args:
        outputs: ``eta``, outputs of all layers for a sample.
        largest: ``eta*``, those of the largest layer.
        delta: In (0, 1).
    """
    return math.ceil(C * (math.log(8 * max(1, largest) * max(1, outputs)) - math.log(delta)))


def expected_distinct(probabilities: Floats, draws: Floats | float) -> Floats:
    """Return how many different units ``draws`` draws are expected to hit, ``sum_j 1 - (1 - p_j)^m``.

    Args:
        probabilities: ``[units]``, of sum 1.
        draws: ``m``, also fractional, any shape.

    Returns:
        Of the shape of ``draws``.
    """
    m = np.asarray(draws, np.float64)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        missed = np.where(m > 0, m * np.log1p(-probabilities), 0.0)
    return np.asarray(-np.expm1(missed).sum(-1))


def draws_for(probabilities: Floats, distinct: float) -> float:
    """Return the least number of draws expected to hit ``distinct`` different units; infinite if no number is."""
    if distinct <= 0:
        return 0.0
    if distinct >= np.count_nonzero(probabilities > 0):
        return math.inf
    high = 1
    while expected_distinct(probabilities, high) < distinct:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if expected_distinct(probabilities, middle) >= distinct else (middle, high)
    return float(high)


def leaving_knobs(sensitivities: Floats, weight: float) -> Floats:
    """Return for every unit the ``eps`` above which it is not kept, when as many are as ``m(eps)`` draws are expected to hit.

    The unit of rank ``k``, the most sensitive first, stays while the expected number of different units exceeds ``k - 1``.

    Args:
        sensitivities: ``[units]``, at least 0.
        weight: ``a`` of :func:`weight_of`.

    Returns:
        ``[units]``, in [0, inf]: infinite for the most sensitive, 0 for those of sensitivity 0.
    """
    order = np.argsort(-sensitivities, kind="stable")
    some = int(np.count_nonzero(sensitivities > 0))
    knobs = np.zeros(sensitivities.size)
    if some:
        shares = sensitivities[order[:some]] / sensitivities.sum()
        target = np.arange(some, dtype=np.float64)
        low, high = np.zeros(some), np.ones(some)
        while (short := expected_distinct(shares, high) < target).any():
            high[short] *= 2
        for _ in range(60):
            middle = (low + high) / 2
            below = expected_distinct(shares, middle) < target
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        knobs[order[:some]] = knob_of(
            np.floor(np.where(target > 0, high, 0.0) + 1e-6), weight
        )  # draws that are too few
    return knobs


def common_knob(fits: Callable[[float], bool], low: float = 1e-300, high: float = 1e150) -> float:
    """Return the least ``eps`` that ``fits``, which is monotone, by bisection on its logarithm.

    Args:
        fits: Tells whether a network allocated by ``eps`` is small enough.
        low: An ``eps`` that need not fit.
        high: One that does.
    """
    a, b = math.log(low), math.log(high)
    for _ in range(200):
        middle = (a + b) / 2
        a, b = (a, middle) if fits(math.exp(middle)) else (middle, b)
    return math.exp(b)


# The draw -------------------------------------------------------------------------------------------------------------------------


def draw_distinct(probabilities: Floats, count: int, generator: np.random.Generator) -> tuple[NDArray[np.int64], int]:
    """Draw units independently until the next draw would hit a unit more than ``count`` different ones.

    With ``n_j`` hits in ``m`` draws, ``n_j / (m p_j)`` has expectation 1 although ``m`` is not fixed: that the draws end there depends on their
    set and on the unit that comes next, not on their order, so given both the first of them is as likely any other; and the first alone, ``1 / p_j``
    if it hits ``j``, has expectation 1. New units are drawn one by one, and between them how often old ones are hit again, which is the same.

    Args:
        probabilities: ``[units]``, of sum 1; more than ``count`` are not 0.
        count: How many different units, at least 1.
        generator: Of random numbers.

    Returns:
        Hits of every unit, ``[units]``, ``count`` of them not 0, and the number of draws.
    """
    hits = np.zeros(probabilities.size, np.int64)
    fresh = probabilities.copy()
    for _ in range(count):
        unit = generator.choice(fresh.size, p=fresh / fresh.sum())
        hits[unit], fresh[unit] = 1, 0.0
        again = generator.geometric(max(fresh.sum(), _RARE)) - 1
        old = np.where(hits > 0, probabilities, 0.0)
        hits += generator.multinomial(again, old / old.sum())
    return hits, int(hits.sum())


class Chosen(NamedTuple):
    """Units that stay.

    Attributes:
        units: Ascending, ``[count]``.
        gains: Factors of the weights that read them, ``[count]``.
        draws: ``m``; where nothing was drawn, the number of draws expected to hit as many.
        mass: Sum of the sensitivities of the units that were drawn from; 0 where nothing was drawn.
    """

    units: NDArray[np.int64]
    gains: Floats
    draws: float
    mass: float


def choose(sensitivities: Floats, count: int, mode: Mode, generator: np.random.Generator) -> "Chosen":
    """Choose ``count`` units.

    Args:
        sensitivities: ``[units]``, at least 0.
        count: How many stay, at least 1.
        mode: ``"deterministic"``: the most sensitive. ``"random"``: by draws. ``"hybrid"``: those with ``p_j >= 1 / m`` as they are, by draws
            the others.
        generator: Of random numbers; deterministic choices take none.
    """
    order = np.argsort(-sensitivities, kind="stable")
    total = float(sensitivities.sum())
    shares = sensitivities / total if total > 0 else np.zeros_like(sensitivities)
    expected = draws_for(shares, count - 0.5)
    likely = int(np.count_nonzero(shares * expected >= 1)) if math.isfinite(expected) else count
    surely = {"deterministic": count, "random": 0, "hybrid": min(likely, count)}[mode]
    if count >= np.count_nonzero(shares > 0):  # all that ever contribute stay
        surely = count
    gains, draws, mass = np.ones(sensitivities.size), expected, 0.0
    kept = order[:surely]
    if surely < count:
        rest = shares.copy()
        rest[kept] = 0.0
        rest /= rest.sum()
        hits, drawn = draw_distinct(rest, count - surely, generator)
        sampled = np.flatnonzero(hits)
        gains[sampled] = hits[sampled] / (drawn * rest[sampled])
        mass, draws = total - float(sensitivities[kept].sum()), float(drawn)
        kept = np.concatenate([kept, sampled])
    kept = np.sort(kept)
    return Chosen(kept, gains[kept], draws, mass)


# The method -----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Population:
    """Units that are drawn together: those of a group that lie in the same blocks of count ties.

    Attributes:
        units: Their numbers.
        sensitivities: ``s``, the largest over the readers, ``[units]``.
    """

    units: NDArray[np.int64]
    sensitivities: Floats


@dataclasses.dataclass(frozen=True)
class _Choice(UnitScores):
    """Scores and what was chosen by them.

    Attributes:
        stays: Whether a unit stays, ``[units]``, boolean.
        columns: Whether a layer that gathers goes on to read a unit, likewise, by layer.
        changes: Steps to take before anything leaves.
    """

    stays: NDArray[np.bool_]
    columns: Columns
    changes: tuple[Step, ...] = ()


@dataclasses.dataclass(frozen=True)
class ProvableRemoval(ChannelRemoval):
    """Channels leave by the error that their leaving makes in the layers that read them.

    Attributes:
        pfp: The method.
    """

    pfp: "PFP"

    def look(self, task: Task) -> Structure:
        """Return the units of the model; those stay that something reads whose inputs cannot be seen."""
        structure = super().look(task)
        self.pfp.called = called_modules(task.model, task.calls)
        while structure.count:
            unseen = find_readers(task.model, structure, self.pfp.called)[1]
            if not unseen:
                break
            reason, units = next(iter(unseen.items()))
            structure = structure.without(units, reason)
        return structure

    def score(self, task: Task, found: Structure, pending: Sequence[Step], share: float | None) -> UnitScores:
        """Score the units by the ``eps`` at which they leave, and choose; every rank comes to the same."""
        scores = super().score(task, found, pending, share)
        masked = columns_in(found, pending)
        if not pending:
            self.pfp.forget()
        if share is None or not found.count:
            return _Choice(found, scores.values, scores.gone, ~scores.gone, masked)
        stays, columns = self._select(task, scores, share)
        for layer, flags in masked.items():
            columns[layer] = columns.get(layer, flags) & flags
        return self.pfp.choice(task, scores, stays, columns, masked)

    def _select(
        self, task: Task, scores: UnitScores, share: float
    ) -> tuple[NDArray[np.bool_], dict[str, NDArray[np.bool_]]]:
        """Return which units stay, and which of them layers read that gather; ``[units]``, boolean."""
        readers = stream_readers(task, scores.structure, self.target.name) if self.pfp.gathers else []
        if not readers:
            return self._choose(task, scores, share), {}
        budget = self.target.budget(task, scores.structure)
        stays, columns = choose_columns(
            scores.structure,
            readers,
            scores.values,
            self.pfp.column_scores,
            budget,
            budget.on_the_way(share),
            lambda layer, read, there: gather_pays(task.model.get_submodule(layer), read, there),
            align=self.align,
            min_channels=self.min_channels,
            name=self.target.name,
        )
        return stays & ~scores.gone, columns

    def facts(self, task: Task, found: Structure, pending: Sequence[Step]) -> dict[str, float]:
        """Return what is masked, columns included."""
        told, stays = super().facts(task, found, pending), ~removed_units(found, pending)
        columns, key = columns_in(found, pending), f"masked/{self.target.name}_share"
        if told:
            readers = (r for r in stream_readers(task, found, self.target.name) if r.layer in columns)
            saved = sum(reader.saving(stays, columns[reader.layer]) for reader in readers)
            told[key] -= saved / max(1, self.target.budget(task, found).dense)
        return told

    def steps(self, task: Task, scores: UnitScores, share: float | None) -> tuple[Step, ...]:
        """Return the steps that weigh readers anew, and those that remove channels and columns."""
        if not isinstance(scores, _Choice):
            return super().steps(task, scores, share)
        structure, reads = scores.structure, {}
        for layer, flags in scores.columns.items():
            slot = next(s for s in structure.by_tensor[f"{layer}.weight"] if s.axis == 1)
            reads[layer] = torch.from_numpy(np.append(flags | ~scores.stays, True)[slot.units])
        removal = removal_steps(task.model, structure, scores.stays)
        return (*scores.changes, *gather_steps(task.model, reads, removal))


class PFP(Masking):
    """Remove the channels whose largest share in the outputs of the layers that read them is smallest, and tell the error that this makes.

    Give exactly one of ``flops`` and ``params``. Takes data, but no gradients: one pass over the calibration batches in eval mode, and
    another one that measures the error. :meth:`certificate` tells what is guaranteed, layer by layer.

    Args:
        flops: Bound on the multiply-adds of the model: share of the dense one (float) or a count for the example inputs (int).
        params: Bound on its parameters, likewise.
        mode: ``"deterministic"``: the most sensitive channels stay. ``"random"``: channels are drawn by their sensitivity, and the weights that
            read them are multiplied so that the expected output is the dense one. ``"hybrid"``: the likeliest stay as they are, the others are drawn.
        calibration_batches: Batches to look at; None looks at as many as the bound for unseen data needs samples, some 200.
        delta: Probability with which a bound may fail, in (0, 1).
        contribution: ``"channel_sum"``: a channel contributes the sum over its taps. ``"max_tap"``: the largest tap, as in the authors' code, where
            the bound does not hold.
        official: Takes contributions and sample sizes as in the authors' code.
        gather: Where several layers read one stream, each may leave out channels that others need, by an index in front of it, if that pays
            (:func:`~lightning_prune.structure.gathering.gather_pays`); only where nothing is drawn.
        seed: Of the draw.
        align: Channels kept are multiples of it; 1 switches that off.
        min_channels: At least so many channels of a group stay.
        include: Layers whose channels may leave: names, globs or module types; None takes all.
        exclude: Layers whose channels stay, likewise.
        start_epoch: First epoch in which a gradual run masks.
        until_epoch: Epoch at whose start a gradual run has reached its target; None shrinks at the start of the fit.
        every_n_epochs: Epochs between the steps of a gradual run, the paper's cascade of pruning and training.
        schedule: How the target is approached: ``"cubic"`` or ``"linear"``.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        flops: float | int | None = None,
        params: float | int | None = None,
        mode: Mode = "deterministic",
        calibration_batches: int | None = None,
        delta: float = 1e-16,
        contribution: Contribution = "channel_sum",
        official: bool = False,
        gather: bool = True,
        seed: int = 0,
        align: int = 16,
        min_channels: int = 1,
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
        self.flops, self.params, self.align, self.min_channels = flops, params, align, min_channels
        self.mode, self.calibration_batches, self.delta = mode, calibration_batches, delta
        self.contribution, self.official, self.gather, self.seed = contribution, official, gather, seed
        check_choice(self, "mode", ("deterministic", "random", "hybrid"))
        check_choice(self, "contribution", ("channel_sum", "max_tap"))
        check_choice(self, "official", (False, True))
        check_choice(self, "gather", (False, True))
        check_integer(self, "seed", 0)
        if calibration_batches is not None:
            check_integer(self, "calibration_batches", 1)
        check_probability(self, "delta")
        for option in ("align", "min_channels"):
            check_integer(self, option, 1)
        self.removal = ProvableRemoval(
            method="PFP",
            score_units=self.score_units,
            target=ChannelTarget.of("PFP", flops, params),
            align=align,
            min_channels=min_channels,
            scope="global",
            include=include,
            exclude=exclude,
            pfp=self,
        )
        self.reset()

    def reset(self) -> None:
        """Forget the fit before this one."""
        super().reset()
        self._certificates: list[Certificate] = []
        self._seen: Readings | None = None
        self._populations: list[_Population] = []
        self.column_scores: dict[str, Floats] = {}
        self.called: Collection[str] = ()
        self._free: dict[int, dict[tuple[str, int], float]] = {}

    def certificate(self) -> Certificate:
        """Return the guarantee of what was removed last; see :meth:`certificates` for all steps of a gradual run.

        Raises:
            ModelError: If nothing was removed yet.
        """
        if not self._certificates:
            raise ModelError("PFP has removed nothing yet. Ask for the certificate after fit, or after compress.")
        return self._certificates[-1]

    def certificates(self) -> tuple[Certificate, ...]:
        """Return the guarantees of the steps of a gradual run that removed something, each for the layers as they were before that step."""
        return tuple(self._certificates)

    def score_units(self, task: Task, structure: Structure, kept: NDArray[np.bool_]) -> Floats:
        """Return the logarithm of the ``eps`` above which every unit leaves.

        Raises:
            ModelError: If there is no data, the model cannot be run on it, or values are not finite.
        """
        readers, _ = find_readers(task.model, structure, self.called)
        self._seen = seen = Readings(
            task.model,
            task.probe,
            task.calls,
            readers,
            structure.count,
            "max_tap" if self.official else self.contribution,
            self.calibration_batches,
            lambda outputs: samples_needed(sum(outputs), max(outputs), self.delta),
        )
        if seen.samples < seen.needed:
            log.warning(
                "PFP saw %d samples, and its bound for unseen ones needs %d at delta=%g. Give more data or calibration_batches.",
                seen.samples,
                seen.needed,
                self.delta,
            )
        self._free = seen.constants()
        shares = seen.shares
        shares[list(self._free)] = 0.0
        self._populations = []
        knobs = {reader.layer: np.zeros(structure.count) for reader in readers}
        knobs[""] = np.zeros(structure.count)  # of units
        for units in drawn_together(structure, kept):
            reading = [r.layer for r in readers if np.isin(units, r.units).any()]
            own = shares[units]
            weight = max(self._weight(seen, layer, float(own.sum())) for layer in reading)
            self._populations.append(_Population(units, own))
            knobs[""][units] = leaving_knobs(own, weight)
            for layer in reading if self.gathers and len(reading) > 1 else ():
                here = np.where(own > 0, seen.sights[layer].shares.double().cpu().numpy()[units], 0.0)
                knobs[layer][units] = leaving_knobs(here, self._weight(seen, layer, float(here.sum())))
            if self.gathers and len(reading) > 1:  # a unit is needed as long as some layer needs it
                knobs[""][units] = np.max([knobs[layer][units] for layer in reading], axis=0)
        logarithms = finite_logarithms(np.concatenate(list(knobs.values())))
        self.column_scores = dict(zip(knobs, np.split(logarithms, len(knobs)), strict=True))
        return self.column_scores[""]

    def _weight(self, seen: Readings, layer: str, mass: float) -> float:
        if self.official:
            taps = seen.layers[layer].weight[0, 0].numel()
            return official_weight(mass, seen.sights[layer].patches, taps, self.delta)
        return weight_of(mass, 2 * seen.triples(layer), self.delta)

    def forget(self) -> None:
        """Forget the guarantees so far: a new run begins."""
        self._certificates = []

    @property
    def gathers(self) -> bool:
        """Whether layers on one stream may read different channels of it."""
        return self.gather and self.mode == "deterministic"

    def choice(
        self, task: Task, scores: UnitScores, stays: NDArray[np.bool_], columns: Columns, masked: Columns
    ) -> _Choice:
        """Choose as many units of every population as the budget leaves of it, and measure the error; on every rank the same.

        Args:
            task: The model and its data.
            scores: What :meth:`score_units` returned.
            stays: How many stay, ``[units]``, boolean.
            columns: Which units layers that gather go on to read, likewise, by layer.
            masked: Which they have read so far.
        """
        seen, gone = self._seen, scores.gone
        assert seen is not None  # score_units() comes first
        stays, gains, chosen = stays.copy(), np.ones(stays.size), []
        for number, population in enumerate(self._populations):
            units, count = population.units, int(stays[population.units].sum())
            mode = self.mode if 0 < count < units.size else "deterministic"
            own = choose(population.sensitivities, count, mode, np.random.default_rng([self.seed, number]))
            if mode != "deterministic":
                stays[units] = False
                stays[units[own.units]], gains[units[own.units]] = True, own.gains
            chosen.append(own)
        taken = {unit: values for unit, values in self._free.items() if not stays[unit] and not gone[unit]}
        unread = {r.layer: gone | ~masked.get(r.layer, ~gone) for r in seen.readers}
        dropped = {r.layer: ~(stays & columns.get(r.layer, stays)) & ~unread[r.layer] for r in seen.readers}
        factors = {layer: np.where(out, 0.0, gains) for layer, out in dropped.items()}
        for own_factors in factors.values():
            own_factors[list(taken)] = 1.0  # what they contribute stays, in biases
        errors = seen.errors(factors)
        rows = [
            self._guarantee(
                seen, reader, chosen, dropped[reader.layer], unread[reader.layer], taken, errors.get(reader.layer, 0.0)
            )
            for reader in seen.readers
            if dropped[reader.layer][reader.units[reader.units >= 0]].any()
        ]
        if rows:
            self._certificates.append(Certificate(self.mode, seen.samples, seen.needed, tuple(rows)))
        self._seen = None
        changes = (*absorptions(taken.values()), *scalings(task.model, seen.readers, gains))
        return _Choice(scores.structure, scores.values, gone, stays, columns, changes)

    def _guarantee(
        self,
        seen: Readings,
        reader: Reader,
        chosen: Sequence[Chosen],
        dropped: NDArray[np.bool_],
        unread: NDArray[np.bool_],
        taken: Collection[int],
        error: float,
    ) -> Guarantee:
        """Return what holds for a layer: what was left out for certain, and what a draw did to the rest; what is masked is not read."""
        units, layer = np.unique(reader.units[reader.units >= 0]), reader.layer
        units = units[~unread[units]]
        shares = seen.sights[layer].shares.double().cpu().numpy()
        shares[list(taken)] = 0.0
        own = [(p, c) for p, c in zip(self._populations, chosen, strict=True) if np.isin(p.units, units).any()]
        drawn = [c for _, c in own if c.mass]
        left_out = [np.intersect1d(p.units[dropped[p.units]], units) for p, c in own if not c.mass]
        certain = float(shares[np.concatenate(left_out)].sum()) if left_out else 0.0

        def bound(times: float) -> float:
            if self.official or self.contribution == "max_tap":  # the theorem is about sums over taps
                return math.inf
            triples = 2 * len(drawn) * seen.triples(layer)
            knobs = [
                # for all numbers of draws at once, since the draws themselves decide when they end: the sum of 1 / (m (m + 1)) is 1
                float(knob_of(c.draws, weight_of(times * c.mass, triples * c.draws * (c.draws + 1), self.delta)))
                for c in drawn
            ]
            return times * certain + max(knobs, default=0.0)

        return Guarantee(
            layer=layer,
            kept=int((~dropped[units]).sum()),
            read=units.size,
            mass=sum(c.mass for c in drawn) if drawn else float(shares[units].sum()),
            draws=sum(c.draws for c in drawn) if drawn else sum(c.draws for _, c in own),
            eps=bound(1.0),
            delta=self.delta if drawn else 0.0,
            triples=seen.triples(layer),
            vacuous=bound(1.0) >= 1,
            measured=error,
            unseen=bound(K),
        )

    def exhibits(self) -> Sequence[Exhibit]:
        """Return the guarantees."""
        found = []
        for number, certificate in enumerate(self._certificates, 1):
            step = f", step {number} of {len(self._certificates)}" if len(self._certificates) > 1 else ""
            text = (
                "Every layer that reads fewer channels than before, for the inputs it had: no output on the calibration data is off by more than "
                "eps times the sum of the absolute contributions to it, for certain, or with probability 1 - delta where delta is not 0; from "
                "eps = 1 on that says nothing (vacuous). measured: the largest error found there. triples: samples times outputs times positions. "
                "mass, draws: sum of the sensitivities, and number of draws (expected to hit as many channels, where nothing was drawn). unseen: "
                "the bound for other data, if "
                f"{certificate.assumption}."
            )
            rows = [dataclasses.asdict(row) for row in certificate.rows]
            found.append(Exhibit(f"PFP, {certificate.mode}{step}: what is guaranteed", text, rows))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, and the guarantees."""
        told = json.dumps([certificate.to_dict() for certificate in self._certificates])
        return super().state_dict() | {"certificates": told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint.

        Raises:
            CheckpointError: If this callback was configured otherwise when the checkpoint was written.
        """
        super().load_state_dict(state)
        self._certificates = [Certificate.from_dict(told) for told in json.loads(state["certificates"])]


def drawn_together(structure: Structure, kept: NDArray[np.bool_]) -> Iterable[NDArray[np.int64]]:
    """Yield the units of each group that lie in the same blocks of count ties, of those that are kept."""
    block = np.zeros(structure.count, np.int64)
    for tie in structure.ties:
        for number, units in enumerate(tie, 1):
            inside = np.zeros(structure.count, np.int64)
            inside[units[units >= 0]] = number
            block = np.unique(np.stack([block, inside]), axis=1, return_inverse=True)[1].reshape(-1)
    for group in structure.groups:
        for number in np.unique(block[group.units]):
            units = group.units[(block[group.units] == number) & kept[group.units]]
            if units.size:
                yield units


def finite_logarithms(knobs: Floats) -> Floats:
    """Return logarithms, with numbers in the places of infinities that keep the order."""
    with np.errstate(divide="ignore"):
        found = np.log10(knobs)
    inside = found[np.isfinite(found)]
    return np.nan_to_num(found, posinf=inside.max(initial=0.0) + 1, neginf=inside.min(initial=0.0) - 1)


def absorptions(constants: Iterable[Mapping[tuple[str, int], float]]) -> list[AbsorbConstants]:
    """Return the steps that move constants, by layer and index of the input, into biases."""
    by_layer: dict[str, dict[int, float]] = {}
    for own in constants:
        for (layer, index), value in own.items():
            by_layer.setdefault(layer, {})[index] = value
    return [AbsorbConstants(layer, values) for layer, values in by_layer.items()]


def scalings(model: nn.Module, readers: Sequence[Reader], gains: Floats) -> list[ScaleInputs]:
    """Return the steps that multiply the weights with which layers read units."""
    steps = []
    for reader in readers:
        units = units_by_input(reader, model.get_submodule(reader.layer))
        own = {index: float(gains[unit]) for index, unit in enumerate(units) if unit >= 0 and gains[unit] != 1}
        if own:
            steps.append(ScaleInputs(reader.layer, own))
    return steps
