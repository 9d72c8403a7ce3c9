"""Ask a model something and leave it bit-identical: the context manager :func:`preserved`.

What is put back, whatever was run inside and also when it raised:

- of every module reachable from the model: its class and all that stands in its ``__dict__``, hence parameters, buffers (the same tensor
  objects), submodules, hooks, the ``training`` flag, cached attributes, lists, dicts and sets, however nested;
- values of buffers and of tensors kept as plain attributes; gradients (object and value), ``requires_grad`` flags and tensor hooks;
- generators: torch (CPU, and CUDA and MPS where they are in use), ``random``, NumPy's global one, every ``torch.Generator`` of a module;
- whether gradients are recorded, and autocast (enabled, dtype and caching per device; cached casts are dropped).

Out of reach: objects that are neither modules, tensors nor built-in containers (an optimizer, a logger), and hooks registered for all
modules at once.

Memory: one copy of the buffers, of plain tensor attributes and of the gradients there are. Values of parameters are copied only if asked
for. Without a copy a write to a parameter cannot be undone: torch's version counters tell, and that is an error. A parameter moved or cast
(``model.to(...)``, ``p.data = ...``) is put back at no cost, its old storage is kept.
"""

import collections
import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.errors import ModelError

_CONTAINERS = (dict, collections.OrderedDict, collections.defaultdict, list, set, collections.deque)
_NAMED = 3  # changed parameters that an error names


@contextlib.contextmanager
def preserved(
    model: nn.Module, *, mode: Literal["eval", "train"] | None = None, parameters: bool = False
) -> Iterator[None]:
    """Run the block and put the model and all randomness back as they were.

    Inside, all gradients start as None, so that a backward pass gives the gradients of the block alone.

    Args:
        model: The model, any device and dtype; its gradients and buffers may be in any state.
        mode: Sets the whole model to evaluation or training inside; None leaves the modes as they are.
        parameters: Copy the values of the parameters too and put them back; for blocks that write to weights. Without it such a write is
            an error after the block.

    Raises:
        ModelError: If the model has parameters without a shape (lazy modules), or if ``parameters`` is false and the block wrote to one.
    """
    snapshot = _Snapshot(model, parameters)
    with _global_state():
        try:
            snapshot.hide_gradients()
            if mode is not None:
                model.train(mode == "train")
            yield
        finally:
            changed = snapshot.restore()
    if changed:
        raise ModelError(_complaint(model, changed))


def _complaint(model: nn.Module, changed: list[Tensor]) -> str:
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    shown = [names.get(id(p), "one that named_parameters() does not list") for p in changed[:_NAMED]]
    more = ", ..." if len(changed) > _NAMED else ""
    return (
        f"{type(model).__name__}: {len(changed)} parameter(s) were written to where the model was only asked a question: "
        f"{', '.join(shown)}{more}. A step that runs an optimizer itself or writes to weights cannot be used here: with manual "
        "optimization, give the method data and a loss of its own."
    )


class _Snapshot:
    """The state of everything reachable from a model. References are kept, and copies where values may change in place."""

    def __init__(self, model: nn.Module, parameters: bool) -> None:
        self._copy_parameters = parameters
        self._seen: dict[int, Any] = {}  # by id; keeps what was seen alive, so ids stay unique
        self._undo: list[Callable[[], None]] = []
        self._tensors: list[_SavedTensor] = []
        self._visit(model)

    def _visit(self, root: object) -> None:
        stack: list[Any] = [root]
        while stack:
            item = stack.pop()
            if not isinstance(item, nn.Module | Tensor | torch.Generator | tuple) and type(item) not in _CONTAINERS:
                continue
            if id(item) in self._seen:
                continue
            self._seen[id(item)] = item
            if isinstance(item, Tensor):
                copied = self._copy_parameters or not isinstance(item, nn.Parameter)
                self._tensors.append(_SavedTensor(item, copied))
            elif isinstance(item, torch.Generator):
                self._undo.append(_generator_undo(item))
            elif isinstance(item, nn.Module):
                self._undo.append(_module_undo(item))
                stack.extend([*vars(item).values(), *item.parameters(recurse=False), *item.buffers(recurse=False)])
            elif isinstance(item, tuple):
                stack.extend(item)
            else:
                self._undo.append(_container_undo(item))
                stack.extend(item.values() if isinstance(item, dict) else item)

    def hide_gradients(self) -> None:
        for saved in self._tensors:
            if saved.grad is not None:
                saved.tensor.grad = None

    def restore(self) -> list[Tensor]:
        """Put everything back; return the parameters that were written to and of which there is no copy."""
        for undo in self._undo:
            undo()
        return [saved.tensor for saved in self._tensors if not saved.restore()]


class _SavedTensor:
    """One tensor: its storage by reference, and if ``copied`` its values."""

    def __init__(self, tensor: Tensor, copied: bool) -> None:
        if nn.parameter.is_lazy(tensor):
            raise ModelError(
                "The model has lazy parameters or buffers that have no shape yet. Run it once on example inputs before it is analysed or compressed."
            )
        self.tensor = tensor
        self.alias = _alias(tensor)
        self.value = self.alias.clone() if copied else None
        self.version = _version(tensor)
        self.requires_grad = tensor.requires_grad
        self.was_leaf = tensor.is_leaf
        self.grad = tensor.grad if tensor.is_leaf else None
        self.grad_value = None if self.grad is None else self.grad.detach().clone()
        self.hooks = [(name, _copy_hooks(tensor, name)) for name in ("_backward_hooks", "_post_accumulate_grad_hooks")]

    def restore(self) -> bool:
        """Put the tensor back; return whether that was possible."""
        tensor = self.tensor
        if not tensor.is_inference() and not _same_storage(tensor, self.alias):
            tensor.data = self.alias
        if self.value is not None:
            _write(self.alias, self.value)
        if self.was_leaf:
            if not tensor.is_leaf:  # a buffer into which something with a graph was written
                tensor.detach_()
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            tensor.grad = self.grad
        if self.grad is not None and self.grad_value is not None:
            _write(_alias(self.grad), self.grad_value)
        for name, hooks in self.hooks:
            _restore_hooks(tensor, name, hooks)
        return self.value is not None or _version(tensor) == self.version


def _alias(tensor: Tensor) -> Tensor:
    """Return the same storage without a share in autograd's version counter, so that writing to it disturbs no recorded graph."""
    return tensor.detach() if tensor.is_inference() else tensor.data


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _same_storage(tensor: Tensor, alias: Tensor) -> bool:
    if tensor.layout != torch.strided or alias.layout != torch.strided:
        return tensor.layout == alias.layout
    return (
        (tensor.dtype, tensor.device, tensor.shape) == (alias.dtype, alias.device, alias.shape)
        and tensor.stride() == alias.stride()
        and tensor.untyped_storage()._cdata == alias.untyped_storage()._cdata
        and tensor.storage_offset() == alias.storage_offset()
    )


def _write(target: Tensor, value: Tensor) -> None:
    """Copy ``value`` into ``target``, an alias; expanded dimensions are one element in memory."""
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        if target.layout == torch.strided:
            for dim, stride in enumerate(target.stride()):
                if stride == 0 and target.shape[dim] > 1:
                    target, value = target.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
        target.copy_(value)


def _copy_hooks(tensor: Tensor, name: str) -> dict[int, Any] | None:
    hooks = getattr(tensor, name, None)
    return None if hooks is None else dict(hooks)


def _restore_hooks(tensor: Tensor, name: str, saved: dict[int, Any] | None) -> None:
    hooks = getattr(tensor, name, None)
    if hooks is not None and dict(hooks) != (saved or {}):
        hooks.clear()
        hooks.update(saved or {})


def _module_undo(module: nn.Module) -> Callable[[], None]:
    kind, attributes, training = type(module), dict(vars(module)), module.training

    def undo() -> None:
        if type(module) is not kind:
            module.__class__ = kind
        vars(module).clear()
        vars(module).update(attributes)
        if module.training != training:  # scripted modules keep it outside their __dict__
            module.training = training

    return undo


def _container_undo(container: Any) -> Callable[[], None]:
    saved = container.copy()

    def undo() -> None:
        container.clear()
        container.extend(saved) if isinstance(container, list | collections.deque) else container.update(saved)

    return undo


def _generator_undo(generator: torch.Generator) -> Callable[[], None]:
    state = generator.get_state()
    return lambda: (generator.set_state(state), None)[1]


@contextlib.contextmanager
def _global_state() -> Iterator[None]:
    """Put random generators, gradient mode and autocast back."""
    grad = torch.is_grad_enabled()
    accelerator = torch.accelerator.current_accelerator()
    devices = {"cpu", "cuda"} | ({accelerator.type} if accelerator is not None else set())
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    cached = torch.is_autocast_cache_enabled()
    with _generators():
        try:
            yield
        finally:
            torch.set_grad_enabled(grad)
            for device, enabled, dtype in autocast:
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)
            torch.set_autocast_cache_enabled(cached)
            torch.clear_autocast_cache()  # casts made without gradients would cut later training off the weights


@contextlib.contextmanager
def _generators() -> Iterator[None]:
    """Put the random generators of torch, Python and NumPy back."""
    python, numpy, cpu = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]  # asking would initialize it
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # first used inside: back to the start of the seed it was given
            for generator in torch.cuda.default_generators:
                generator.manual_seed(generator.initial_seed())
        if mps is not None:
            torch.mps.set_rng_state(mps)
