"""The Fisher information of a model over its training data, through the user's own training step: Kronecker factors, and diagonals in given bases."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from lightning_prune.callback.batches import function_of, loss_alone, no_loss
from lightning_prune.callback.checks import check_choice, check_integer, named_module
from lightning_prune.callback.task import Task
from lightning_prune.curvature.eigenbasis import Eigenbasis
from lightning_prune.curvature.kronecker import Factors, Kronecker, SecondMoments
from lightning_prune.curvature.labels import Distribution, Sample, empirical_gradients, sampled_gradients
from lightning_prune.errors import ModelError, OptionError
from lightning_prune.probe import Probe
from lightning_prune.structure.layers import DenseLayer

log = logging.getLogger(__name__)
Labels = Literal["sampled", "empirical"]
_NAME_LABELS = "Name it by distribution=, which may be a function that draws, or take the labels of the data by fisher='empirical'."
_NAME_IT = "Name the module whose output the loss is computed from by logits_module=."


class FisherOptions(Protocol):
    """The options of a method that goes by the Fisher information; they are described in its constructor."""

    fisher: Labels
    distribution: str | Sample
    logits_module: str | None
    loss_fn: str | Callable[[Any, Any], Tensor] | None
    calibration_batches: int
    seed: int


def check_fisher(method: FisherOptions) -> None:
    """Check the options of a method.

    Raises:
        OptionError: If one is of the wrong type or out of range.
    """
    name = type(method).__name__
    check_choice(method, "fisher", ("sampled", "empirical"))
    check_integer(method, "calibration_batches", 1)
    check_integer(method, "seed", 0)
    if not isinstance(method.logits_module, str | None):
        raise OptionError(f"{name}(logits_module={method.logits_module!r}): give the name of a submodule.")
    if not isinstance(method.loss_fn, str | None) and not callable(method.loss_fn):
        raise OptionError(f"{name}(loss_fn={method.loss_fn!r}): give a function or its dotted name.")
    if not _draws(method.distribution):
        check_choice(method, "distribution", ("auto", "categorical", "bernoulli", "gaussian"))


def _draws(distribution: object) -> bool:
    """Tell whether a distribution is a function that draws, or the dotted name of one."""
    return callable(distribution) or (isinstance(distribution, str) and "." in distribution)


@dataclasses.dataclass(frozen=True)
class Fisher:
    """How the Fisher information is taken.

    Attributes:
        method: Name of the method, for messages.
        labels: ``"sampled"``: drawn from what the model predicts. ``"empirical"``: those of the data.
        distribution: What labels are drawn from, ``"auto"`` reads it off the loss; or a function ``sample(outputs, generator)``.
        batches: Batches to look at.
        seed: Of the labels drawn; the same ones in every pass.
        outputs: The module whose output the loss is computed from, called once per step; None: the outermost that the step calls.
        loss: ``loss(module, batch)``, a scalar, in place of that of ``training_step``.
    """

    method: str
    labels: Labels
    distribution: Distribution | Sample
    batches: int
    seed: int
    outputs: nn.Module | None = None
    loss: Callable[[nn.Module, Any], Tensor | None] | None = None

    @classmethod
    def of(cls, method: FisherOptions, model: nn.Module) -> Self:
        """Return what the options of a method say for a model.

        Raises:
            OptionError: If there is no module or function of a name.
        """
        draw: Any = function_of(method, "distribution") if _draws(method.distribution) else method.distribution
        outputs = None if method.logits_module is None else named_module(method, "logits_module", model)
        loss = None if method.loss_fn is None else function_of(method, "loss_fn")
        return cls(type(method).__name__, method.fisher, draw, method.calibration_batches, method.seed, outputs, loss)

    def factors(
        self, task: Task, layers: Mapping[str, DenseLayer], *, patches: bool = False, homogeneous: bool = False
    ) -> dict[str, Kronecker]:
        """Return the Kronecker factors of layers, over all ranks; those that no gradient reaches are missing.

        Args:
            task: The model and its data.
            layers: Layers by name.
            patches: Take all that a kernel covers as one input.
            homogeneous: Give layers with a bias an input more that is always 1.

        Raises:
            ModelError: If the model cannot be run for a loss, its outputs are not known, or something is not finite.
        """
        found = Factors(layers, patches=patches, homogeneous=homogeneous)
        self._run(task.probe, found, f"{self.method}: curvature")
        found.reduce(task.probe.total)
        return found.factors()

    def moments(
        self, task: Task, layers: Mapping[str, DenseLayer], bases: Mapping[str, Eigenbasis | None]
    ) -> dict[str, Tensor]:
        """Return the second moments of the gradients of single samples in given bases, ``[out, taps, in]``, over all ranks.

        Args:
            task: The model and its data.
            layers: Layers by name.
            bases: Of each, alike on all ranks; None for the weights as they are.

        Raises:
            ModelError: As :meth:`factors`, or if samples cannot be told apart in a layer.
        """
        found = SecondMoments(layers, bases)
        self._run(task.probe, found, f"{self.method}: curvature in the eigenbasis")
        found.reduce(task.probe.total)
        return found.moments()

    def _run(self, probe: Probe, statistics: Factors | SecondMoments, title: str) -> None:
        """Show some batches to what collects."""
        own, generator, index, seen = self.loss, None, -1, 0

        def step(batch: Any, index: int) -> Tensor | None:
            value = probe.loss_if_any(batch, index) if own is None else own(probe.model, batch)
            if own is not None and (not isinstance(value, Tensor) or value.numel() != 1):
                got = (
                    f"a tensor of shape {list(value.shape)}"
                    if isinstance(value, Tensor)
                    else f"a {type(value).__name__}"
                )
                raise ModelError(f"{self.method}: loss_fn= must return the scalar loss of a batch; it returned {got}.")
            return value

        with probe.quiet(mode="eval"), torch.enable_grad():
            for index, batch in enumerate(probe.batches(self.batches, title)):
                with self._watched(probe.model) as outputs, statistics.watching():
                    loss = loss_alone(probe, step, batch, index)
                if loss is None:
                    continue
                z = self._only(outputs, loss)
                generator = generator or torch.Generator(z.device).manual_seed(self.seed + _rank())
                statistics.backward(z, self._gradients(loss, z, generator))
                seen += 1
        if index < 0:
            raise ModelError(
                f"{self.method}: there is no batch to take the Fisher information from: the data is empty."
            )
        if not seen:
            raise no_loss(probe)

    def _gradients(self, loss: Tensor, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return the gradients of the loss of every sample at the outputs."""
        if self.labels == "sampled":
            try:
                return sampled_gradients(loss, outputs, generator, self.distribution, _NAME_LABELS)
            except ModelError as error:
                raise ModelError(f"{self.method}: {error}") from error
        try:
            return empirical_gradients(loss, outputs)
        except ModelError as error:
            found = empirical_gradients(loss, outputs, "mean")  # raises where no reduction would help
            log.info("%s: the loss is taken to be the mean over its samples, all of one weight. %s", self.method, error)
            return found

    @contextlib.contextmanager
    def _watched(self, model: nn.Module) -> Iterator[list[Any]]:
        """Collect what the module of the outputs returns, or what the outermost modules that hold parameters do; copies go on from there."""
        found: list[Any] = []
        depth = 0

        def enter(*_: Any) -> None:
            nonlocal depth
            depth += 1

        def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
            nonlocal depth
            depth -= 1
            if depth:
                return None
            found.append(output)
            return output.clone() if isinstance(output, Tensor) else None

        watched = [self.outputs] if self.outputs is not None else model.modules()
        handles: list[Any] = []
        for module in watched:
            if self.outputs is not None or next(module.parameters(), None) is not None:
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def _only(self, outputs: list[Any], loss: Tensor) -> Tensor:
        """Return the one output that the loss was computed from, which has a sample axis and a gradient.

        Raises:
            ModelError: Otherwise.
        """
        *before, z = outputs or [None]
        if self.outputs is not None and len(outputs) != 1:
            raise ModelError(
                f"{self.method}: the module of the outputs is called {len(outputs)} times in a training step, where once is needed. {_NAME_IT}"
            )
        if not isinstance(z, Tensor) or not z.ndim or not z.requires_grad:
            got = f"a tensor of shape {list(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
            raise ModelError(
                f"{self.method}: what the loss is computed from must be one tensor, samples first, that depends on weights; got {got}. {_NAME_IT}"
            )
        others = [tensor for tensor in before if isinstance(tensor, Tensor) and tensor.requires_grad]
        if others and not _passes_through(loss, z, others):
            raise ModelError(
                f"{self.method}: the training step calls {len(outputs)} modules, and the loss depends on more than the output of the last. "
                f"{_NAME_IT} With several outputs, give the loss of one by loss_fn=."
            )
        return z


def _passes_through(loss: Tensor, z: Tensor, others: list[Tensor]) -> bool:
    """Tell whether the loss depends on other outputs only by way of ``z``, by their gradients."""
    (slope,) = torch.autograd.grad(loss, z, retain_graph=True, allow_unused=True)
    every = torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True)
    through = (
        [None] * len(others)
        if slope is None
        else torch.autograd.grad(z, others, slope, retain_graph=True, allow_unused=True)
    )
    return all(
        one is None or (other is not None and torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max())))
        for one, other in zip(every, through, strict=True)
    )


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
