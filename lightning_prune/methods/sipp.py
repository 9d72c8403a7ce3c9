"""SiPP: remove the weights that contribute least to the outputs of their layers on calibration data, or sample those that stay.

Baykal, Liebenwein, Gilitschenski, Feldman and Rus, "SiPPing Neural Networks: Sensitivity-informed Provable Pruning of Neural Networks", 2019
(arXiv:1910.05422). The sensitivity of a weight is its largest share in an output (:mod:`lightning_prune.measure.contributions`). Weights of one row
and one sign are sampled ``m`` times by their sensitivities ``s``, ``p = s / S``, and come back as ``W n / (m p)``, which leaves every output what
it was on average; or the highest sensitivities are kept as they are.

- ``deterministic``, the authors' main variant: the mean over positions, its maximum over samples, and one ranking over all layers.
- ``random``: maxima over positions and samples. Of all ways to spread the budget over rows, the one with the least sum of error bounds
  :func:`error_bound`, each layer's counting as much as another's. Authors: CVXPY; here: bisection on the multiplier of the budget, for the convex
  problem is separable. Then so many draws that as many weights as budgeted are expected to be met.
- ``hybrid``: as ``random``, but rows whose ``C`` times the sum of what is left out is below their bound keep their highest sensitivities.

Where we differ from the authors' code: outputs of any size count, not only those above 1.19e-7, so that scaling changes nothing; and exactly the
share asked for leaves. For the latter all rows' draws go on together until one weight more than stay would be met (:meth:`Lottery.factors`), which
leaves no bias but in rows of which all weights happen to be met, or none. Weights without a share on the calibration data leave first.
``official=True`` (deterministic) has the authors' threshold, and what has no gradient on the calibration data once the others are gone counts as
removed, as after their propagation: so many are ranked out that the share is met with it.

A row that loses nothing is not re-weighted. Re-weighting happens once, when masks are chosen, to the weights as they are then.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_prune.budget.weights import Scope, select_weights
from lightning_prune.callback.batches import losses_of, plain_chunks
from lightning_prune.callback.checks import check_choice, check_integer, check_probability
from lightning_prune.callback.masking import Schedule
from lightning_prune.callback.task import Task
from lightning_prune.callback.weights import WeightPruning, WeightRemoval, check_scores
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.measure.contributions import NEGLIGIBLE, Collector, weight_shares
from lightning_prune.structure.layers import is_plain
from lightning_prune.structure.masks import masked
from lightning_prune.structure.select import Pattern

Mode = Literal["deterministic", "random", "hybrid"]

C = K = 3  # the constants of the paper's theorems, as in the authors' code


def by_sign(values: Tensor, weight: Tensor) -> Tensor:
    """Return values of weights, positive weights apart from negative ones, 0 for the others; ``[2, rows, columns]``.

    Args:
        values: Of the shape of the weight.
        weight: The weight, outputs first.
    """
    return torch.stack([values * (weight > 0), values * (weight < 0)]).flatten(2)


def difficulty(sums: Tensor, positions: int, taps: int, delta: float) -> Tensor:
    """Return ``S * 2 C ln(8 (positions + 1) taps / delta)``: how many draws a row takes, up to what error they may leave.

    Args:
        sums: Sums ``S`` of the sensitivities of a row.
        positions: Output positions per sample.
        taps: Taps of the kernel; 1 for a linear layer.
        delta: Probability of failure.
    """
    return sums * (2 * C * math.log(8 * (positions + 1) * taps / delta))


def error_bound(draws: Tensor, difficulties: Tensor) -> Tensor:
    """Return the relative error that ``draws`` leave with high probability, ``(b + sqrt(b^2 + 6 b)) / 2`` with ``b = difficulty / (K draws)``."""
    b = difficulties / (K * draws)
    return (b + (b * b + 6 * b).sqrt()) / 2


def allocate(difficulties: Tensor, most: Tensor, importances: Tensor, budget: float) -> Tensor:
    """Return the draws per row with the least ``sum(importances * error_bound)``, float64.

    Args:
        difficulties: Of the rows, not negative; rows of 0 get none.
        most: Draws that a row gets at most.
        importances: Positive.
        budget: Sum of all draws, which are fewer only if all have their most.
    """
    most, hard = most.double(), difficulties > 0
    draws = torch.zeros_like(most)
    a, w, top = difficulties[hard].double() / K, importances[hard].double(), most[hard]
    if budget >= float(top.sum()):
        return draws.masked_scatter(hard, top)

    def spent(price: float) -> Tensor:
        """Return the draws at which one more lowers the error of each row by ``price``."""
        slope = price * a / w
        b = slope.sqrt()
        for _ in range(
            20
        ):  # _slope(b) grows as b^1.5 to b^2, so each pass leaves at most a seventh of the error of log b
            b = b * (slope / _slope(b)) ** (1 / 1.75)
        return torch.minimum(a / b, top)

    low, high = -300.0, 300.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(spent(math.exp(middle)).sum()) > budget else (low, middle)
    return draws.masked_scatter(hard, spent(math.exp(high)))


def _slope(b: Tensor) -> Tensor:
    """Return ``b^2`` times the derivative of ``(b + sqrt(b^2 + 6 b)) / 2``."""
    return b * b * ((b + 3) / (b * b + 6 * b).sqrt() + 1) / 2


def expected_distinct(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Return how many different entries of each row are met on average, ``sum(1 - (1 - p)^m)``.

    Args:
        probabilities: ``[rows, entries]``, float64.
        draws: ``[rows]``.
    """
    exponents = draws[:, None] * (-probabilities).log1p()
    return -torch.where(draws[:, None] > 0, exponents, 0).expm1().sum(1)


def draws_for(probabilities: Tensor, distinct: Tensor, most: Tensor) -> Tensor:
    """Return the fewest draws per row with which ``distinct`` entries are met on average, at most ``most``; float64, whole numbers.

    Args:
        probabilities: ``[rows, entries]``, float64.
        distinct: ``[rows]``.
        most: ``[rows]``, whole numbers.
    """
    low, high = torch.full_like(distinct, -1), most.double()
    while bool((high - low > 1).any()):
        middle = ((low + high) / 2).floor()
        enough = expected_distinct(probabilities, middle) >= distinct
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high


def reweighting(draws: Tensor, probabilities: Tensor) -> Tensor:
    """Return ``n / (m p)``, by which the weights of a row are multiplied; 0 where none was drawn.

    Args:
        draws: The ``m`` entries that were drawn, ``[m]``, integer.
        probabilities: ``[entries]``, float64.
    """
    return torch.bincount(draws, minlength=len(probabilities)) / (len(draws) * probabilities.clamp_min(1e-300))


def kept_of_rows(mask: Tensor, weight: Tensor) -> Tensor:
    """Return how many weights of each sign and row stay, ``[2, rows]``: the authors' allocation."""
    return by_sign(mask, weight).sum(2)


@dataclasses.dataclass(frozen=True)
class Lottery:
    """Which weights of a layer stay, the longer the draws go on: an order in time, 1 being when as many draws were made as expected.

    Attributes:
        shares: Sensitivities, the rows of positive weights before those of negative ones, ``[rows, entries]``, float64.
        expected: Draws per row, whole numbers.
        phase: What each row is ahead of whole draws, in [0, 1), so that no two rows draw at once, ``[rows]``.
        drawn: The draws of the rows that are sampled, more than twice as many as expected.
        times: When an entry is met first, ``[rows, entries]``. Rows of which all shall stay are met at once; rows that keep their highest
            shares in that order; what is not drawn comes late, and what has no share last.
    """

    shares: Tensor
    expected: Tensor
    phase: Tensor
    drawn: Mapping[int, Tensor]
    times: Tensor

    @classmethod
    def draw(cls, shares: Tensor, distinct: Tensor, ranked: Tensor, generator: torch.Generator) -> "Lottery":
        """Draw.

        Args:
            shares: Sensitivities.
            distinct: How many different entries of each row are to be met, ``[rows]``.
            ranked: Rows that keep their highest shares instead, ``[rows]``, boolean.
            generator: For the draws.
        """
        most = (shares > 0).sum(1)
        probabilities = shares / shares.sum(1, keepdim=True).clamp_min(1e-300)
        expected = draws_for(probabilities, distinct, _PATIENCE * most)
        phase = torch.rand(len(shares), generator=generator, dtype=torch.float64)
        times, drawn = torch.where(shares > 0, _LATE - shares, 2 * _LATE), {}
        for row in range(len(shares)):
            if distinct[row] >= most[row] - 1e-6:
                times[row, shares[row] > 0] = 0
            elif ranked[row]:
                best = shares[row].argsort(descending=True, stable=True)[: most[row]]
                times[row, best] = torch.arange(1, len(best) + 1) / distinct[row]
            else:
                many = int(2 * expected[row]) + 8
                drawn[row] = torch.multinomial(probabilities[row], many, replacement=True, generator=generator)
                first = torch.full_like(times[row], torch.inf)
                first.scatter_reduce_(0, drawn[row], torch.arange(1, many + 1, dtype=first.dtype), "amin")
                times[row] = torch.where(first < torch.inf, (first - phase[row]) / expected[row], times[row])
        return cls(shares, expected, phase, drawn, times)

    def next_met(self, stays: Tensor) -> float:
        """Return when the first entry is met that does not stay; infinite if none is.

        Args:
            stays: Which entries stay, boolean.
        """
        later = self.times[(self.times < _LATE - 1) & ~stays]
        return float(later.min()) if len(later) else math.inf

    def factors(self, stays: Tensor, end: float) -> Tensor:
        """Return by what entries are multiplied, ``[rows, entries]``: 0 for those that leave, 1 where nothing leaves or nothing was drawn.

        Args:
            stays: Which entries stay, boolean.
            end: When the next entry of all that compete is met. The draws before that moment count: that they end there does not depend on
                their order, so that each is as likely any of those met, and the factors have no bias.
        """
        found = stays.double()
        for row, draws in self.drawn.items():
            if bool((stays[row] | (self.shares[row] == 0)).all()):
                continue
            before = end * float(self.expected[row]) + float(self.phase[row])
            many = len(draws) if before >= len(draws) else max(1, math.ceil(before) - 1)
            factors = reweighting(draws[:many], self.shares[row] / self.shares[row].sum())
            found[row] = torch.where(stays[row] & (factors > 0), factors, found[row])
        return found


_LATE = 1e3  # after all draws
_PATIENCE = 32  # draws per entry of a row at most


@dataclasses.dataclass(frozen=True)
class _Observed(WeightRemoval):
    """Weights leave only from layers that are seen when they are called."""

    def candidates(self, task: Task) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """Return the weights of linear layers and convolutions that the model calls, each by its own."""
        found, alone = super().candidates(task)
        owners = Counter(id(p) for module in task.model.modules() for p in module.parameters(recurse=False))
        for key, weight in list(found.items()):
            name = key.rpartition(".")[0]
            reason = None
            if not is_plain(module := task.model.get_submodule(name)):
                reason = f"what its weights are multiplied by inside of {type(module).__name__} cannot be seen"
            elif owners[id(weight)] > 1:
                reason = "its weight is tied to another module's, which may see other inputs"
            elif name not in task.cost.shapes:
                reason = "it is not called by the model (torch reads its weight directly, or nothing does): its inputs cannot be seen"
            if reason:
                del found[key]
                alone[name] = reason
        return found, alone


class SiPP(WeightPruning):
    """Remove the weights that contribute least to the outputs of their layers on calibration data, or sample those that stay.

    Args:
        sparsity: Share of the weights that leave, in [0, 1), of the dense model's in linear layers and convolutions.
        mode: ``"deterministic"``: the highest sensitivities stay as they are. ``"random"``: weights are sampled by sensitivity and re-weighted.
            ``"hybrid"``: row by row what promises the lower error.
        calibration_batches: Batches on which contributions are measured, without gradients and in eval mode.
        delta: Probability with which the error bounds of sampling may fail, in (0, 1).
        official: Do as the authors' code does, in deterministic mode only.
        seed: Of the draws.
        scope: ``"global"``: one ranking over all layers. ``"uniform"``: the same share of every layer leaves. ``"erk"``: shares by its shape.
        min_kept: At least so many weights of every layer stay.
        remove_dead: Whether channels that no weight reaches or leaves are cut off.
        include: Layers whose weights may leave: names, globs or module types; None takes all.
        exclude: Layers whose weights stay, likewise.
        start_epoch: First epoch in which a gradual run prunes.
        until_epoch: Epoch at whose start a gradual run has reached its target; None prunes at the start of the fit.
        every_n_epochs: Epochs between the steps of a gradual run.
        schedule: How the target is approached: ``"cubic"`` or ``"linear"``.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        *,
        sparsity: float,
        mode: Mode = "deterministic",
        calibration_batches: int = 8,
        delta: float = 1e-16,
        official: bool = False,
        seed: int = 0,
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
            sparsity=sparsity,
            scope=scope,
            min_kept=min_kept,
            remove_dead=remove_dead,
            include=include,
            exclude=exclude,
            start_epoch=start_epoch,
            until_epoch=until_epoch,
            every_n_epochs=every_n_epochs,
            schedule=schedule,
            recalibrate_bn=recalibrate_bn,
        )
        self.mode, self.delta, self.official = mode, delta, official
        self.calibration_batches, self.seed = calibration_batches, seed
        check_choice(self, "mode", ("deterministic", "random", "hybrid"))
        check_integer(self, "calibration_batches", 1)
        check_integer(self, "seed", 0)
        check_choice(self, "official", (True, False))
        check_probability(self, "delta")
        if official and mode != "deterministic":
            raise OptionError(
                f"SiPP(official=True, mode={mode!r}): the authors' code is followed in deterministic mode."
            )
        self.removal = _Observed(**vars(self.removal))

    def choose_weights(
        self, task: Task, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor], count: int
    ) -> Mapping[str, Tensor]:
        """Choose by sensitivities, or by draws.

        Raises:
            ModelError: If a layer was never called, or what it was given is not finite.
        """
        shares, positions = self.sensitivities(task, weights)
        shares = dict(check_scores("SiPP", shares, kept))
        if self.mode != "deterministic":
            return self._sampled(shares, positions, weights, kept, count)
        if self.official:
            alive = self._with_gradient(task, shares, weights, kept, count)
            shares = {name: share + 2 * alive[name] for name, share in shares.items()}  # shares are at most 1
        return select_weights(shares, kept, count, self.scope, self.min_kept)

    def _sampled(
        self,
        shares: Mapping[str, Tensor],
        positions: Mapping[str, int],
        weights: Mapping[str, nn.Parameter],
        kept: Mapping[str, Tensor],
        count: int,
    ) -> dict[str, Tensor]:
        """Return by what each weight is multiplied, 0 for those that leave."""
        rows = {
            name: by_sign(shares[name].cpu().double(), weight.detach().cpu()).flatten(0, 1)
            for name, weight in weights.items()
        }
        hard = {
            name: difficulty(own.sum(1), positions[name], weights[name][0, 0].numel(), self.delta)
            for name, own in rows.items()
        }
        budget = sum(weight.numel() for weight in weights.values()) - count
        distinct = allocate(
            torch.cat(list(hard.values())),
            torch.cat([(own > 0).sum(1) for own in rows.values()]),
            torch.cat([torch.full((len(own),), 2 / len(own)) for own in rows.values()]),
            budget,
        )
        generator, lotteries = torch.Generator().manual_seed(self.seed), {}
        parts = torch.split(distinct, [len(own) for own in rows.values()])
        for (name, own), budgeted in zip(rows.items(), parts, strict=True):
            left_out = own.sort(1, descending=True).values
            left_out = left_out * (torch.arange(own.shape[1]) >= budgeted.round()[:, None])
            ranked = C * left_out.sum(1) < error_bound(budgeted, hard[name])
            lotteries[name] = Lottery.draw(own, budgeted, ranked & (self.mode == "hybrid"), generator)
        scores = {
            name: -lottery.times.view(2, -1, lottery.times.shape[1]).amin(0).view(weights[name].shape)
            for name, lottery in lotteries.items()
        }
        stays = select_weights(scores, kept, count, self.scope, self.min_kept)
        factors, stay_by_sign = {}, {name: mask.flatten(1).repeat(2, 1) for name, mask in stays.items()}
        ends = {name: lottery.next_met(stay_by_sign[name]) for name, lottery in lotteries.items()}
        for name, lottery in lotteries.items():
            stay, end = stay_by_sign[name], min(ends.values()) if self.scope == "global" else ends[name]
            own = torch.where(rows[name] > 0, lottery.factors(stay, end), 0).view(2, *stays[name].shape).sum(0)
            factors[name] = torch.where(own > 0, own, stays[name].double())
        return factors

    def sensitivities(
        self, task: Task, weights: Mapping[str, nn.Parameter]
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return the largest share of every weight on the calibration data, and the positions per sample that each layer has there.

        Raises:
            ModelError: If a layer was never called, or what it was given is not finite.
        """
        over: Literal["max", "mean"] = "mean" if self.mode == "deterministic" else "max"
        least = NEGLIGIBLE if self.official else 0.0
        layers = {key: key.rpartition(".")[0] for key in weights}
        start = {layers[key]: torch.zeros_like(weight) for key, weight in weights.items()}
        collector = Collector(task.model, start, lambda _, layer, inputs: weight_shares(layer, inputs, over, least))
        collector.collect(task.probe, self.calibration_batches, task.calls)
        positions = {key: collector.seen[name].positions for key, name in layers.items()}
        unseen = [layers[key] for key, count in positions.items() if not count]
        if unseen:
            raise ModelError(
                f"SiPP: {unseen[0]!r} is called on the example inputs, but not on the calibration data, so what its weights contribute is not known. "
                f"Leave it out by exclude=, or give more calibration_batches= than {self.calibration_batches}."
            )
        return {key: collector.largest[name] for key, name in layers.items()}, positions

    def _with_gradient(
        self,
        task: Task,
        shares: Mapping[str, Tensor],
        weights: Mapping[str, nn.Parameter],
        kept: Mapping[str, Tensor],
        count: int,
    ) -> dict[str, Tensor]:
        """Return which weights would stay and have a gradient, of the fewest highest-ranked ones of which enough have one."""
        own, total = list(weights.values()), sum(weight.numel() for weight in weights.values())

        def alive(left: int) -> dict[str, Tensor]:
            stay = select_weights(shares, kept, total - left)
            slopes = [torch.zeros_like(weight) for weight in own]
            with masked(dict(weights), stay):
                for loss in losses():
                    found = torch.autograd.grad(loss, own, allow_unused=True)
                    slopes = [s if f is None else s + f for s, f in zip(slopes, found, strict=True)]
            flat = task.probe.mean(torch.cat([slope.flatten() for slope in slopes])) != 0
            parts = torch.split(flat.cpu(), [slope.numel() for slope in slopes])
            return {name: mask & part.view(mask.shape) for (name, mask), part in zip(stay.items(), parts, strict=True)}

        with task.probe.quiet(mode="eval"):
            losses = losses_of(task.probe, plain_chunks(task.probe, self.calibration_batches), task.probe.loss_if_any)
            few, many = total - count - 1, sum(int(mask.sum()) for mask in kept.values())
            while many - few > 1:
                middle = (few + many) // 2
                enough = sum(int(mask.sum()) for mask in alive(middle).values()) >= total - count
                few, many = (few, middle) if enough else (middle, many)
            return alive(many)
