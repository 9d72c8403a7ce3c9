"""Weights as matrix product operators (MPO), also called tensor-train matrices.

Gao, Cheng, He, Xie, Zhao, Lu and Xiang, "Compressing deep neural networks by matrix product operators", Physical Review Research 2, 023300
(2020, arXiv:1904.06194). Bonds that shrink while training, and training of the small ("auxiliary") cores alone: Liu, Gao, Zhao, Xie, Lu and Wen,
"Enabling Lightweight Fine-tuning for Pre-trained Language Model Compression based on Matrix Product Operators", ACL 2021 (arXiv:2106.02205).

A layer is replaced where that makes it cheaper in what is asked for: parameters, or multiply-adds under ``flops``. The two part ways: 784 to
256 outputs in four cores with bonds of 16 take 7.7 % of the parameters and 6.6 times the multiply-adds. Plans tell both.

Unlike the paper: two cores by default, for which the multiply-adds fall as well; trained weights are decomposed (``mode="scratch"`` draws them
anew, as the paper does, with the variance that a product of cores needs); bonds come from a budget or an error. A convolution keeps its kernel as
a core of its own (Garipov et al. 2016, arXiv:1611.03214); only those of ``unroll`` become one linear map over all pixels of a flattened map of the
size of the example, as the paper has it for tiny maps, channels first.

Weight decay on ``n`` factors shrinks their product ``n`` times as fast: while this callback is in the Trainer, it counts one ``n``-th on the cores
(:mod:`lightning_prune.callback.core_decay`), but for what gradient clipping takes of that. Products of several cores have steep places: with plain
SGD a learning rate that suits the dense layer may be too large for four of them; clip gradients (``gradient_clip_val``), as the benchmark on MNIST
does, or train with Adam.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import logging
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.budget import allocate, resolve_bound
from lightning_prune.budget.bonds import forms_within, ladder, price, squeeze
from lightning_prune.callback import Compression, Task
from lightning_prune.callback.checks import check_choice, check_integer, nothing_to_change
from lightning_prune.callback.core_decay import CoreDecay
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.methods.low_rank import Target
from lightning_prune.structure.carrier import plan_of
from lightning_prune.structure.factorized import Shapes
from lightning_prune.structure.layers import DenseLayer, describe, is_plain, layer_from
from lightning_prune.structure.mpo import WAYS, Training, positions_of, tensor_of, weight_from
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.replaceable import ZERO, replaceable
from lightning_prune.structure.select import Pattern, matching
from lightning_prune.structure.steps import Step, Tensorize, Unroll
from lightning_prune.structure.tensor_train import (
    Form,
    check_error,
    cut_values,
    modes_for,
    tt_svd,
    tt_svd_within,
    useful_bonds,
)
from lightning_prune.structure.unrolled import extents_of, unroll, why_not_unrolled

T = TypeVar("T")

log = logging.getLogger(__name__)

_FILLED = 4  # times as many rows or columns as a layer has may be filled up with zeros


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer that can be factorized.

    Attributes:
        dense: The layer.
        calls: Shapes of input and output of every call, batch included.
        extent: Of a convolution that is unrolled, the size of its input without batch and channels; else None.
    """

    dense: DenseLayer
    calls: Shapes
    extent: tuple[int, ...] | None = None

    @functools.cached_property
    def layer(self) -> DenseLayer:
        """The layer whose weight is decomposed: the dense one, or the linear map that it is unrolled to."""
        return self.dense if self.extent is None else unroll(self.dense, self.extent).linear  # type: ignore[arg-type,return-value]

    def price(self, form: Form | None, what: str) -> int:
        """Return what the layer costs as it is, or in a form (:func:`price`)."""
        if form is None or self.extent is None:
            return price(self.dense, form, self.calls, what)
        rows, columns = self.layer.weight.shape
        flat = [
            ((math.prod(inputs) // columns, columns), (math.prod(inputs) // columns, rows)) for inputs, _ in self.calls
        ]
        return price(self.layer, form, flat, what)

    def steps(self, name: str, form: Form, **settings: Any) -> list[Step]:
        """Return the steps that give the layer, of that name, a form; settings as for :class:`Tensorize`."""
        if self.extent is None:
            return [Tensorize.of(name, self.dense, form, **settings)]
        unrolled = Unroll.of(name, self.dense, self.extent)  # type: ignore[arg-type]
        return [unrolled, Tensorize.of(f"{name}.linear", self.layer, form, **settings)]


def of_layer(option: str, given: Mapping[str, T], layers: Sequence[str]) -> dict[str, T]:
    """Return what an option says for each layer: under its name, else under the first glob that matches.

    Raises:
        OptionError: If an entry matches no layer.
    """
    for pattern in given:
        if not fnmatch.filter(layers, pattern):
            raise OptionError(
                f"MPO({option}=...): {pattern!r} matches no layer that can be factorized. There are {', '.join(layers)}."
            )
    found = {}
    for name in layers:
        key = name if name in given else next((p for p in given if fnmatch.fnmatchcase(name, p)), None)
        if key is not None:
            found[name] = given[key]
    return found


class MPO(Compression):
    """Give layers weights that are products of small cores, at the start of a fit or step by step while training.

    Give exactly one of ``params``, ``flops``, ``error``, ``bond``.

    Args:
        params: Bound on the parameters of the model: share of the dense one (float) or a count (int).
        flops: Bound on its multiply-adds for the example inputs, likewise. Bonds from which on a layer is faster by its dense weight are not taken,
            so that less than the bound may be left.
        error: Share of its norm that each weight may lose, in [0, 1).
        bond: Bond between all cores, or bonds by name or glob of a layer; those larger than useful are lowered.
        cores: Cores of a linear layer, and of a convolution beside its kernel; at least 2.
        mode: ``"pretrained"`` decomposes the weights, ``"scratch"`` draws the cores with the variance that the weights have and zeroes the bias.
        train: How to contract while training: ``"auto"`` by the rule of the layer, ``"factorized"`` or ``"reconstruct"`` (the dense weight first).
        modes: Output and input modes by name or glob of a layer, ``{"fc1": [[4, 4, 4, 4], [4, 7, 7, 4]]}``; others are chosen.
        unroll: Convolutions to take as one linear map over their flattened input, for inputs of the example's size: names, globs or types. What comes
            out shares no weights between pixels, so pretrained it is a convolution only as far as the bonds allow. None: none.
        auxiliary_only: Whether the largest core of every decomposed layer is frozen and only the others train.
        dimension_squeezing: Whether bonds shrink step by step while training, where least is lost; needs ``params`` or ``flops`` and ``until_epoch``.
            Less than the bound may be left: the first form of a layer that pays can save much at once, and bonds never grow again.
        every_n_steps: Optimizer steps from one squeezing to the next.
        seed: Of the cores drawn from scratch.
        start_epoch: First epoch that squeezes.
        until_epoch: Epoch at whose start squeezing has reached the budget, the bound falling linearly until then.
        include: Layers to factorize: names, globs or module types; None takes all that can be.
        exclude: Layers to leave alone, likewise.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        params: float | int | None = None,
        flops: float | int | None = None,
        error: float | None = None,
        bond: int | dict[str, int] | None = None,
        cores: int = 2,
        mode: Literal["pretrained", "scratch"] = "pretrained",
        train: Training = "auto",
        modes: dict[str, list[list[int]]] | None = None,
        unroll: Pattern | Sequence[Pattern] | None = None,
        auxiliary_only: bool = False,
        dimension_squeezing: bool = False,
        every_n_steps: int = 20,
        seed: int = 0,
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
        self.params, self.flops, self.error, self.bond = params, flops, error, bond
        self.cores, self.mode, self.train, self.modes, self.seed = cores, mode, train, modes, seed
        self.unroll = unroll
        self.auxiliary_only, self.dimension_squeezing, self.every_n_steps = (
            auxiliary_only,
            dimension_squeezing,
            every_n_steps,
        )
        self.gradual = dimension_squeezing is True
        self._check()
        self.reset()

    def _check(self) -> None:
        given = {name: v for name in ("params", "flops", "error", "bond") if (v := getattr(self, name)) is not None}
        if len(given) != 1:
            raise OptionError(f"MPO needs exactly one of params, flops, error, bond; got {given or 'none'}.")
        if self.bounded:
            self.target.check("MPO")
        if self.error is not None:
            check_error(self.error)
        if self.bond is not None and not _are_bonds(self.bond):
            raise OptionError(
                f"MPO(bond={self.bond!r}): give an integer of at least 1, or such by name or glob of a layer."
            )
        for name, least in (("cores", 2), ("every_n_steps", 1), ("seed", 0)):
            check_integer(self, name, least)
        check_choice(self, "mode", ("pretrained", "scratch"))
        check_choice(self, "train", tuple(WAYS))
        for name in ("auxiliary_only", "dimension_squeezing"):
            check_choice(self, name, (False, True))
        if self.modes is not None and not _are_modes(self.modes):
            raise OptionError(
                f"MPO(modes={self.modes!r}): give output and input modes by name or glob of a layer, as many of each, "
                "such as {'fc1': [[4, 4], [7, 7]]}."
            )
        if self.gradual and (not self.bounded or self.until_epoch is None or self.mode == "scratch"):
            raise OptionError(
                "MPO(dimension_squeezing=True) shrinks bonds of trained weights towards a budget: give params= or flops=, and until_epoch=; "
                "mode stays 'pretrained'."
            )
        if self.gradual and self.unroll is not None:
            raise OptionError(
                "MPO(unroll=...) goes without dimension_squeezing=True, under which layers stay convolutions until the end."
            )
        if self.error is not None and self.mode == "scratch":
            raise OptionError(
                "MPO(error=...) asks what trained weights lose; with mode='scratch' give bond=, params= or flops=."
            )
        if self.auxiliary_only is True and self.mode == "scratch":
            raise OptionError(
                "MPO(auxiliary_only=True) freezes the largest core of decomposed weights; with mode='scratch' it would freeze one drawn at random."
            )
        if not self.gradual and (self.start_epoch or self.until_epoch is not None):
            raise OptionError(
                "MPO(start_epoch=..., until_epoch=...) are for dimension_squeezing=True; without it layers change at once."
            )

    def reset(self) -> None:
        """Forget the fit before this one."""
        super().reset()
        self._task: Task | None = None
        self._sites: dict[str, Site] = {}
        self._bonds: dict[str, list[int]] = {}
        self._squeezed_at: int | None = None
        self._decay: CoreDecay | None = None

    def release(self) -> None:
        """Let go of the layers."""
        super().release()
        self._task, self._sites, self._decay = None, {}, None

    @property
    def bounded(self) -> Literal["flops", "params"] | None:
        """What is bounded over all layers, if anything."""
        return self.target.bounded

    @property
    def target(self) -> Target:
        """The bound as one value."""
        return Target(flops=self.flops, params=self.params)

    def claim(self, model: nn.Module) -> set[str]:
        """Return the names of the layers that can be factorized."""
        return set(self._find(model)[0])

    def met(self, task: Task) -> str | None:
        """Return why the target is already met, in words, or None."""
        return super().met(task) or self.target.met(task)

    def rehearse(self, task: Task) -> None:
        """Check patterns, modes and budget on the model as it stands.

        Raises:
            OptionError: If a pattern matches no layer, or modes do not fit.
            BudgetError: If the budget cannot be met.
        """
        if self.met(task) is None:
            self._choose(task, self._find(task.model, task.cost.shapes)[0])

    def decide(self, task: Task, scores: Any) -> Plan:
        """Choose the bonds from the spectra of the weights.

        Raises:
            OptionError: If modes do not fit.
            BudgetError: If the budget cannot be met.
        """
        sites, alone = self._find(task.model, task.cost.shapes)
        squeezed = None if not self.gradual else self._bonds if self._task else {}  # outside of a fit, from dense
        forms, dense = self._choose(task, sites, squeezed)
        steps = [step for name, form in forms.items() for step in self._steps(name, sites[name], form)]
        return Plan(tuple(steps), alone | dense)

    def _steps(self, name: str, site: Site, form: Form) -> list[Step]:
        seed = zlib.crc32(f"{self.seed} {name}".encode()) if self.mode == "scratch" else None
        return site.steps(name, form, train=self.train, auxiliary=self.auxiliary_only, seed=seed)

    def _find(
        self, model: nn.Module, shapes: Mapping[str, Shapes] | None = None
    ) -> tuple[dict[str, Site], dict[str, str]]:
        """Return the layers that can be factorized, and the reasons why others that were chosen cannot."""
        unrolled = self._unrolled(model)

        def obstacle(name: str, layer: nn.Module) -> str | None:
            if getattr(layer, "groups", 1) > 1 and name not in unrolled:
                return "it is a convolution in groups"
            if self.mode == "pretrained" and not self.gradual and not bool(layer.get_parameter("weight").any()):
                return ZERO
            if shapes is None:
                return None
            if not shapes.get(name):
                return "it is not called with the example inputs"
            return why_not_unrolled(layer, shapes[name]) if name in unrolled else None

        layers, alone = replaceable(model, self.include, self.exclude, obstacle)
        if missed := sorted(unrolled - set(layers) - set(alone)):
            raise OptionError(
                f"MPO(unroll=...) names {', '.join(map(repr, missed))}, which include= or exclude= leaves out."
            )
        sites = {}
        for name, layer in layers.items():
            assert is_plain(layer), "kinds that may be replaced again were not asked for"
            calls = () if shapes is None else shapes[name]
            extent = extents_of(layer, calls)[0] if calls and name in unrolled else None
            sites[name] = Site(layer, calls, extent)
        return sites, alone

    def _unrolled(self, model: nn.Module) -> set[str]:
        """Return the names of the convolutions to unroll."""
        if self.unroll is None:
            return set()
        modules = dict(model.named_modules())
        unrolled = {
            s.module: layer_from(s.before, device="meta") for s in plan_of(model).steps if isinstance(s, Unroll)
        }
        convolutions = {name: m for name, m in modules.items() if is_plain(m) and not isinstance(m, nn.Linear)}
        try:
            return matching({**unrolled, **convolutions}, self.unroll, "unroll") - set(unrolled)
        except OptionError as error:
            raise OptionError(f"MPO: {error} Only plain convolutions are unrolled.") from error

    def _forms(self, sites: Mapping[str, Site]) -> dict[str, Form]:
        """Return modes for every layer, the bonds still 1."""
        given = of_layer("modes", self.modes or {}, list(sites)) if sites else {}
        found = {}
        for name, site in sites.items():
            layer = site.layer
            rows, columns = layer.weight.shape[:2]
            outputs, inputs = given.get(name) or modes_for(rows, columns, self.cores)
            kernel = positions_of(describe(layer))
            form = Form(tuple(outputs), tuple(inputs), (1,) * (len(outputs) - (kernel == 0)), kernel)
            if not (rows <= form.rows <= _FILLED * rows and columns <= form.columns <= _FILLED * columns):
                raise OptionError(
                    f"MPO(modes=...): those of {name!r} multiply to {form.rows:,} outputs and {form.columns:,} inputs; the layer has {rows:,} and "
                    f"{columns:,}. Give as much, or up to {_FILLED} times as much; the rest is filled up with zeros."
                )
            found[name] = form
        return found

    def _choose(
        self, task: Task, sites: Mapping[str, Site], squeezed: Mapping[str, Sequence[int]] | None = None
    ) -> tuple[dict[str, Form], dict[str, str]]:
        """Return the forms of layers that change, and why others stay dense."""
        forms = self._forms(sites)
        if self.bounded is not None:
            values = {name: self._values(name, site, forms[name]) for name, site in sites.items()}
            chosen = self._within_budget(task, sites, forms, values, squeezed)
            cheaper = {name: "the budget is met with it dense" for name in forms if name not in chosen}
            return chosen, cheaper
        chosen, dense = {}, {}
        for name, form in self._at_target(sites, forms).items():
            have, would = (sites[name].price(f, "params") for f in (None, form))
            if would < have:
                chosen[name] = form
            else:
                dense[name] = (
                    f"bonds {'/'.join(map(str, form.bonds)) or 'none'} would take {would:,} parameters, dense it has {have:,}"
                )
        unasked = set(forms) - set(chosen) - set(dense)
        return chosen, dense | dict.fromkeys(sorted(unasked), "bond= does not name it")

    def _values(self, name: str, site: Site, form: Form) -> list[Tensor]:
        """Return the singular values at the cuts of a weight; from scratch all directions count alike."""
        if self.mode == "scratch":
            return [torch.ones(bond) for bond in useful_bonds(form.sizes)]
        with _of_layer(name):
            return cut_values(tensor_of(site.layer, form))

    def _at_target(self, sites: Mapping[str, Site], forms: Mapping[str, Form]) -> dict[str, Form]:
        """Return forms with the bonds that ``error`` or ``bond`` asks for."""
        if self.error is not None:
            found = {}
            for name, form in forms.items():
                with _of_layer(name):
                    found[name] = form.with_bonds(tt_svd_within(tensor_of(sites[name].layer, form), self.error).bonds)
            return found
        given = self.bond if isinstance(self.bond, Mapping) else {"*": self.bond or 1}
        wanted = of_layer("bond", given, list(forms)) if forms else {}
        chosen = {}
        for name, bond in wanted.items():
            chosen[name] = forms[name].with_bonds(useful_bonds(forms[name].sizes, bond))
            if set(chosen[name].bonds) - {bond}:
                told = "/".join(map(str, chosen[name].bonds))
                log.warning(
                    "MPO: bonds of %d between all cores of layer %r are larger than useful; lowered to %s.",
                    bond,
                    name,
                    told,
                )
        return chosen

    def _within_budget(
        self,
        task: Task,
        sites: Mapping[str, Site],
        forms: Mapping[str, Form],
        values: Mapping[str, Sequence[Tensor]],
        squeezed: Mapping[str, Sequence[int]] | None,
    ) -> dict[str, Form]:
        """Return the forms under a bound: at once, or from bonds that were squeezed.

        The bound of squeezing falls from the dense cost by ``task.progress``. It enters only layers that an allocation at once, below the bound of
        the end, would change: one whose first form saves much and loses much would else come last, when others have lost all they have for nothing.
        """
        what = self.bounded or "params"
        have = {"flops": task.cost.total, "params": task.params}[what]
        origin = {"flops": task.origin.flops, "params": task.origin.params}[what]
        bound = resolve_bound(getattr(self, what), origin, what)
        ladders, fixed = {}, have
        for name, site in sites.items():
            offered = forms_within(forms[name], values[name])
            dense = site.price(None, what)
            fixed -= dense
            ladders[name] = ladder(offered, [site.price(form, what) for form, _ in offered], dense)
        sizes = allocate(ladders, bound, fixed=fixed, name=what)
        found = {name: form for name, form in sizes.items() if form is not None}
        if squeezed is None:
            return found
        entered = [name for name in forms if name in found or name in squeezed]
        costs = {name: functools.partial(sites[name].price, what=what) for name in entered}
        rest = have - sum(cost(None) for cost in costs.values())
        bound += round((1 - task.progress) * max(0, have - bound))
        return squeeze({name: forms[name] for name in entered}, values, costs, squeezed, bound, fixed=rest, name=what)

    # Squeezing ------------------------------------------------------------------------------------------------------------------

    def begin(self, task: Task) -> None:
        """Find the layers, and check before training that the budget can be met.

        Raises:
            ModelError: If there is no layer to factorize.
            BudgetError: If the budget cannot be met.
        """
        self._task = task
        self._sites, alone = self._find(task.model, task.cost.shapes)
        if not self._sites:
            raise nothing_to_change("MPO", alone)
        self._choose(task, self._sites)

    def on_step_begin(self, trainer: Any, module: Any) -> None:
        """Squeeze, if ``every_n_steps`` optimizer steps have passed since the last time."""
        if self._squeezed_at is not None and self.steps - self._squeezed_at < self.every_n_steps:
            return
        self._squeezed_at = self.steps
        if trainer.is_global_zero:
            self._squeeze(self.progress())
        if trainer.world_size > 1:
            self._bonds = trainer.strategy.broadcast(self._bonds, src=0)
            for name in self._bonds:
                torch.distributed.broadcast(self._sites[name].layer.weight.data, src=0)

    @torch.no_grad()
    def _squeeze(self, progress: float) -> None:
        """Lower one bond after the other as the bound asks for by now, where least is lost, and project the weights, in place."""
        task = self._task
        assert task is not None, "begin() comes before the first step"
        now = Task(task.model, task.calls, task.cost, task.plan, task.origin, task.probe, progress)
        forms = self._choose(now, self._sites, self._bonds)[0]
        self._bonds = {name: list(form.bonds) for name, form in forms.items()}
        for name, form in forms.items():
            layer = self._sites[name].layer
            cores = tt_svd(tensor_of(layer, form), form.bonds).cores
            layer.weight.copy_(weight_from(cores, form, layer.weight.shape))

    def facts(self, module: nn.Module) -> dict[str, float]:
        """Return how many layers are squeezed so far, and the largest bond of each."""
        bonds = {f"bond/{name}": float(max(bonds)) for name, bonds in self._bonds.items()}
        return {"squeezed_layers": float(len(bonds))} | bonds

    def state_dict(self) -> dict[str, Any]:
        """Return the shared state, the step of the last squeezing and its bonds."""
        return super().state_dict() | {"squeezed_at": self._squeezed_at, "bonds": dict(self._bonds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint.

        Raises:
            CheckpointError: If this callback was configured otherwise when the checkpoint was written.
        """
        super().load_state_dict(state)
        self._squeezed_at, self._bonds = state["squeezed_at"], dict(state["bonds"])

    # Weight decay ---------------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check and log as every method does, and balance the decay of cores from now on; of several of us the first does, for all layers."""
        super().on_fit_start(trainer, pl_module)
        if next(callback for callback in trainer.callbacks if isinstance(callback, MPO)) is not self:
            return
        self._decay = decay = CoreDecay(pl_module)
        if trainer.gradient_clip_val and any(map(decay.is_clipped, trainer.optimizers)):
            log.warning(
                "MPO: gradient_clip_val clips what is taken back of the weight decay on cores as well, so that they may decay faster than one dense "
                "weight would. AdamW decays apart from the gradient."
            )
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(lambda stepped, *_: decay.give_back(stepped)))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Let squeezing act on the gradients, and lessen the decay that an optimizer will add to them."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._decay is not None:
            self._decay.lessen(optimizer)


@contextlib.contextmanager
def _of_layer(name: str) -> Iterator[None]:
    """Say in an error which layer it is about."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"Layer {name!r}: {error}") from error


def _are_bonds(bond: object) -> bool:
    if not isinstance(bond, Mapping):
        return type(bond) is int and bond >= 1
    return bool(bond) and all(isinstance(name, str) and type(b) is int and b >= 1 for name, b in bond.items())


def _are_modes(modes: object) -> bool:
    if not isinstance(modes, Mapping):
        return False
    return all(isinstance(name, str) and _are_pairs(pair) for name, pair in modes.items())


def _are_pairs(pair: object) -> bool:
    return (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(isinstance(side, Sequence) and not isinstance(side, str) and len(side) for side in pair)
        and len(pair[0]) == len(pair[1])
        and all(type(size) is int and size >= 1 for side in pair for size in side)
    )
