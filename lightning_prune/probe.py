"""The only window on data: batches, losses and example calls of a model, without leaving a trace in it.

A probe runs the user's own ``training_step`` with ``self.log`` muted. Weights, buffers, gradients, random state, modes, hooks and the
states of metrics are bit for bit what they were when the question has been answered; only :meth:`Probe.recalibrate` changes the model, and only
the running statistics of its batch normalization.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Self

import torch
import torchmetrics
from rich.progress import track
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.errors import ModelError
from lightning_prune.structure.calls import Call, as_calls
from lightning_prune.structure.preserve import preserved

log = logging.getLogger(__name__)
FOREIGN = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
)  # what running a user's code outside of a fit may raise


class Probe:
    """Answers questions about a model that need data.

    Args:
        model: The model, on the device where it shall run.
        data: The batches, as often as asked for; None where there are none.
        step: ``step(batch, index)`` runs the model on a batch and returns a scalar loss, or None where only the forward pass is known.
        prepare: Brings a batch to the device of the model.
        reduce: Takes a tensor of every rank together, by ``"mean"``, ``"sum"`` or ``"max"``, or returns that of rank 0, by ``"first"``.
        progress: Whether to show a progress bar.
        knows_loss: Whether ``step`` returns losses.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any] | None,
        step: Callable[[Any, int], Tensor | None],
        *,
        prepare: Callable[[Any], Any] = lambda batch: batch,
        reduce: Callable[[Tensor, str], Tensor] = lambda tensor, _how: tensor,
        progress: bool = False,
        knows_loss: bool = True,
    ) -> None:
        self.knows_loss = knows_loss
        self.model = model
        self.data = data
        self._step = step
        self._prepare = prepare
        self._reduce = reduce
        self._progress = progress

    @classmethod
    def of_trainer(cls, trainer: Any, module: Any) -> Self:
        """Ask with the training data and the ``training_step`` of a fit, while no optimizer lives."""

        def prepare(batch: Any) -> Any:
            dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
            if dtype != torch.float32:  # half and double models: the plugin converts the model only after the window
                batch = trainer.precision_plugin.convert_input(batch)
            batch = module.on_before_batch_transfer(batch, 0)
            batch = module.transfer_batch_to_device(batch, trainer.strategy.root_device, 0)
            return module.on_after_batch_transfer(batch, 0)

        bar = trainer.progress_bar_callback
        shown = bar is not None and getattr(bar, "is_enabled", True) and trainer.is_global_zero

        def reduce(tensor: Tensor, how: str) -> Tensor:
            strategy: Any = trainer.strategy
            found: Tensor = (
                strategy.broadcast(tensor, src=0) if how == "first" else strategy.reduce(tensor, reduce_op=how)
            )
            return found.to(tensor.device)

        step = functools.partial(training_loss, module)
        return cls(module, trainer.train_dataloader, step, prepare=prepare, reduce=reduce, progress=bool(shown))

    @classmethod
    def of_data(
        cls,
        model: nn.Module,
        data: Iterable[Any] | None,
        loss: Callable[[nn.Module, Any], Tensor | None] | None,
        progress: bool = False,
    ) -> Self:
        """Ask with given batches and ``loss(model, batch)``, a scalar; without a loss the first entry of a batch is the input."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))

        def step(batch: Any, _index: int) -> Tensor | None:
            if loss is not None:
                return loss(model, batch)
            as_calls(batch[0] if isinstance(batch, tuple | list) else batch)[0].run(model)
            return None

        prepare = lambda batch: _to(batch, device)  # noqa: E731
        return cls(model, data, step, prepare=prepare, progress=progress, knows_loss=loss is not None)

    def on(self, data: Iterable[Any]) -> "Probe":
        """Return a probe of the same model with other data."""
        own = copy.copy(self)
        own.data = data
        return own

    def batches(self, count: int, title: str = "Calibrating") -> Iterator[Any]:
        """Yield the first ``count`` batches, on the device of the model, with a progress bar.

        Loaders are read in this process and their generators put back, so that training sees the order of data that it would have seen.

        Raises:
            ModelError: If there is no data.
        """
        if self.data is None:
            raise ModelError("This needs data: give `data=` an iterable of batches, or fit with a training dataloader.")
        with _untouched(self.data) as loader:
            chosen = itertools.islice(loader, count)
            for batch in track(chosen, title, count, disable=not self._progress, transient=True):
                yield self._prepare(batch)

    def loss(self, batch: Any, index: int = 0) -> Tensor:
        """Return the scalar loss of a prepared batch, with its graph. Call it inside :meth:`quiet`.

        Raises:
            ModelError: If no loss is known or the step returned none.
        """
        value = self.loss_if_any(batch, index)
        if value is None:
            raise ModelError("This needs a scalar loss; the training step returned NoneType.")
        return value

    def loss_if_any(self, batch: Any, index: int = 0) -> Tensor | None:
        """Return :meth:`loss`, or None for a batch that the step skips by returning None.

        Raises:
            ModelError: If the step returned something else.
        """
        value = self._step(batch, index)
        if value is not None and (not isinstance(value, Tensor) or value.numel() != 1):
            raise ModelError(f"This needs a scalar loss; the training step returned {type(value).__name__}.")
        return value

    def run(self, batch: Any, index: int, calls: Sequence[Call]) -> None:
        """Run the model on a prepared batch for what its layers see: through the training step, or, with manual optimization, ``forward``.

        Args:
            batch: The batch; with manual optimization its first entries are the arguments.
            index: Its number.
            calls: Example calls, for manual optimization.
        """
        if getattr(self.model, "automatic_optimization", True):
            self._step(batch, index)
        else:
            _matching(batch, calls).run(self.model)

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor over the ranks, in one collective; in a single process it is returned as it is."""
        return self._reduce(tensor, "mean")

    def maximum(self, tensor: Tensor) -> Tensor:
        """Take the largest of every entry of a tensor over the ranks, in one collective; in a single process it is returned as it is."""
        return self._reduce(tensor, "max")

    def total(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in one collective; in a single process it is returned as it is."""
        return self._reduce(tensor, "sum")

    def first(self, tensor: Tensor) -> Tensor:
        """Return what rank 0 has; in a single process it is returned as it is."""
        return self._reduce(tensor, "first")

    @contextlib.contextmanager
    def quiet(self, mode: Literal["eval", "train"] | None = None) -> Iterator[None]:
        """Leave the model as it was, whatever is run inside: ``self.log`` muted, metrics, buffers, gradients, random state put back.

        Args:
            mode: ``"eval"`` or ``"train"`` for the whole model inside; None keeps the modes as they are.
        """
        metrics = [(m, copy.deepcopy(_plain(m))) for m in self.model.modules() if isinstance(m, torchmetrics.Metric)]
        muted = [name for name in ("log", "log_dict") if hasattr(self.model, name)]
        kept = {name: self.model.__dict__[name] for name in muted if name in self.model.__dict__}
        try:
            with preserved(self.model, mode=mode):
                for name in muted:
                    self.model.__dict__[name] = _say_nothing
                yield
        finally:
            for name in muted:
                self.model.__dict__.pop(name, None)
            self.model.__dict__.update(kept)
            for metric, state in metrics:
                metric.__dict__.update(state)

    def example_calls(self) -> tuple[Call, ...]:
        """Return what stands for the model when it is traced and counted.

        That is ``forward`` with ``example_input_array``; without one, the outermost submodules with parameters that one ``training_step``
        calls, with the inputs seen there.

        Raises:
            ModelError: If there is neither an example nor a way to see one.
        """
        example = getattr(self.model, "example_input_array", None)
        if example is not None:
            like = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
            return tuple(Call(c.module, _like(c.args, like), _like(dict(c.kwargs), like)) for c in as_calls(example))
        remedy = "Set `self.example_input_array` in the module to a tensor, a tuple of arguments or a dict of keyword arguments."
        if not getattr(self.model, "automatic_optimization", True):
            raise ModelError(
                f"With manual optimization the inputs of the model cannot be seen without a step. {remedy}"
            )
        if self.data is None:
            raise ModelError(f"No example inputs and no data to take them from. {remedy}")
        calls = self._observe()
        if not calls:
            raise ModelError(f"training_step called no submodule that holds parameters. {remedy}")
        return calls

    def recalibrate(self, count: int, calls: Sequence[Call] = ()) -> int:
        """Estimate the running statistics of batch normalization anew, as the mean over ``count`` batches and all ranks.

        Layers that the user froze (in eval mode while the model is in train mode) keep theirs. Batches go through the training step; with manual
        optimization, where that would need optimizers, through ``forward``, whose arguments are then the first entries of a batch.

        Args:
            count: Batches to look at; 0 does nothing.
            calls: Example calls, for manual optimization.

        Returns:
            How many layers changed. If the user's code cannot be run here, none does, and a warning says why.
        """
        frozen = {id(m) for m in self.model.modules() if not m.training} if self.model.training else set()
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        norms = [norm for norm in norms if id(norm) not in frozen]
        if not norms or count < 1:
            return 0
        try:
            found = self._statistics(norms, count, calls)
        except FOREIGN as error:
            log.warning(
                "The statistics of batch normalization are left as they are: %s cannot be run here (%s: %s). Recalibrate by a validation-free "
                "epoch of training, or pass recalibrate_bn=0 to say that this is wanted.",
                type(self.model).__name__,
                type(error).__name__,
                error,
            )
            return 0
        for norm, buffers in zip(norms, found, strict=True):
            for name, value in buffers.items():
                if buffers["num_batches_tracked"] > 0:  # a layer that this data never reaches keeps what it had
                    norm.get_buffer(name).copy_(value)
        return len(norms)

    def _statistics(self, norms: Sequence[_BatchNorm], count: int, calls: Sequence[Call]) -> list[dict[str, Tensor]]:
        """Return the buffers that each layer has after ``count`` batches, averaged over ranks; put everything back."""
        momenta = [norm.momentum for norm in norms]
        with self.quiet(mode="eval"), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.train()
            try:
                for index, batch in enumerate(self.batches(count, "Recalibrating batch normalization")):
                    self.run(batch, index, calls)
                return [{name: self._averaged(b) for name, b in norm.named_buffers()} for norm in norms]
            finally:
                for norm, momentum in zip(norms, momenta, strict=True):
                    norm.momentum = momentum

    def _averaged(self, buffer: Tensor) -> Tensor:
        return self.mean(buffer.clone()) if buffer.is_floating_point() else buffer.clone()

    def _observe(self) -> tuple[Call, ...]:
        calls: list[Call] = []
        depth = 0

        def enter(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                nonlocal depth
                if depth == 0:
                    calls.append(Call(name, _detached(args), _detached(kwargs)))
                depth += 1

            return hook

        def leave(*_: Any) -> None:
            nonlocal depth
            depth -= 1

        with self.quiet():
            for name, module in self.model.named_modules():
                if next(module.parameters(), None) is not None:
                    module.register_forward_pre_hook(enter(name), with_kwargs=True)
                    module.register_forward_hook(leave)
            for batch in self.batches(1, "Looking at one batch"):
                self._step(batch, 0)
        return tuple(calls)


def training_loss(module: Any, batch: Any, index: int = 0) -> Tensor | None:
    """Return what the ``training_step`` of a LightningModule returns for a batch, a scalar; None if it skips the batch."""
    positional = [p for p in inspect.signature(module.training_step).parameters.values() if p.kind <= p.VAR_POSITIONAL]
    numbered = len(positional) > 1 or any(p.kind == p.VAR_POSITIONAL for p in positional)
    output = module.training_step(batch, index) if numbered else module.training_step(batch)
    return output.get("loss") if isinstance(output, dict) else output


@contextlib.contextmanager
def _untouched(data: Any) -> Iterator[Iterable[Any]]:
    """Yield an iterable over ``data`` that starts no workers and leaves the generators of its loaders as they were."""
    loaders = [item for item in _leaves(data) if isinstance(item, DataLoader)]
    owners = [
        o for dl in loaders for o in (dl, dl.sampler, dl.batch_sampler, getattr(dl.batch_sampler, "sampler", None))
    ]
    generators = {id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)}
    states = {key: generator.get_state() for key, generator in generators.items()}
    try:
        yield _iterable(data)
    finally:
        for key, state in states.items():
            generators[key].set_state(state)


def _iterable(data: Any) -> Iterable[Any]:
    """Read nested loaders the way Lightning's default mode does: one batch of each, shorter ones starting over."""
    if isinstance(data, dict | list | tuple) and any(isinstance(item, DataLoader) for item in _leaves(data)):
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        parts = [itertools.cycle(_iterable(data[key])) for key in keys]
        kind = (lambda values: dict(zip(keys, values, strict=True))) if isinstance(data, dict) else type(data)
        return (kind(values) for values in zip(*parts, strict=False))
    if type(data) is not DataLoader:
        return data  # type: ignore[no-any-return]
    shared = {"collate_fn": data.collate_fn, "generator": data.generator}
    if isinstance(data.dataset, IterableDataset):
        return DataLoader(data.dataset, batch_size=data.batch_size, drop_last=data.drop_last, **shared)
    if data.batch_sampler is not None:
        return DataLoader(data.dataset, batch_sampler=data.batch_sampler, **shared)
    return DataLoader(data.dataset, batch_size=None, sampler=data.sampler, **shared)


def _leaves(data: Any) -> Iterator[Any]:
    if isinstance(data, dict | list | tuple):
        for item in data.values() if isinstance(data, dict) else data:
            yield from _leaves(item)
    else:
        yield data


def _plain(module: nn.Module) -> dict[str, Any]:
    """Return what a metric holds beside its submodules, parameters and hooks."""
    held = ("_modules", "_parameters", "_buffers")
    return {
        key: value
        for key, value in module.__dict__.items()
        if key not in held and not key.endswith("_hooks") and not callable(value)
    }


def _matching(batch: Any, calls: Sequence[Call]) -> Call:
    """Return the call of ``forward`` with the entries of a batch in the place of the example inputs.

    Raises:
        TypeError: If the batch does not have them.
    """
    if len(calls) != 1 or calls[0].module:
        raise TypeError("with manual optimization, batches can only go through the model's own forward")
    example = calls[0]
    if example.kwargs:
        return Call("", kwargs={name: batch[name] for name in example.kwargs})
    entries = batch if isinstance(batch, tuple | list) else (batch,)
    return Call("", tuple(entries[: len(example.args)]))


def _to(value: Any, device: torch.device) -> Any:
    """Move nested tensors to ``device``."""
    if isinstance(value, Tensor | nn.Module) or hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    return value


def _like(value: Any, like: Tensor) -> Any:
    """Move nested tensors to the device of ``like``, floating ones also to its type: the model may be of half or double precision."""
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {key: _like(item, like) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_like(item, like) for item in value)
    return _to(value, like.device)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_detached(item) for item in value)
    return value


def _say_nothing(*_: Any, **__: Any) -> None:
    """Stand in for ``self.log`` while a probe runs."""
