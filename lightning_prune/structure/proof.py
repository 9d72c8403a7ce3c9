"""The proof that a smaller model computes what its plan stands for: both are run on the same inputs and compared.

The outputs of the model are compared in full, and from every layer whose output keeps its shape some entries, which bounds the memory.
An error names the first layer, in the order of the calls, where the two differ. In train mode

- dropout modules and ``dropout`` attributes drop nothing: what is dropped is drawn by shape, so it would be something else once channels are
  gone. Where other code draws random numbers, the smaller model must run and return the same shapes;
- nothing is compared if the model in its old shapes cannot be run: batch normalization of a single value, a model that then wants targets.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prune.errors import ModelError
from lightning_prune.structure.calls import Call
from lightning_prune.structure.preserve import preserved

Mode = Literal["eval", "train"]

log = logging.getLogger(__name__)

# Largest difference that rounding explains, as a share of the largest value of the same tensor. Two factors reorder the sums of one
# layer; normalization in train mode divides by a deviation that carries the error of the layers before it.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 5e-2}

_ENTRIES = (
    4096  # taken from the output of a layer: of 1024 channels, a single wrong one is among them in 98 of 100 cases
)
_SAMPLES = 4  # of a batch are run; of two, batch normalization in train mode would leave little but the sign
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
# In eval mode these run fused code, unless anything inside has a hook; what users will run is what is to be checked.
_FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
_DROPS = re.compile("drop|stochastic|rrelu", re.IGNORECASE)  # names of modules that draw random numbers in train mode


@dataclasses.dataclass(frozen=True)
class _Entries:
    """Entries of one output: its shape, some or all of its values, and its largest finite magnitude."""

    shape: torch.Size
    values: Tensor
    scale: float

    @classmethod
    def of(cls, tensor: Tensor, most: int | None = None) -> "_Entries":
        """Take all values, or ``most`` of them, always the same for the same shape."""
        flat = tensor.detach().reshape(-1)
        scale = float(torch.linalg.vector_norm(flat, torch.inf)) if flat.numel() else 0.0
        if not math.isfinite(scale):
            scale = float(flat.abs().nan_to_num_(0, 0, 0).max())
        if most is not None and flat.numel() > most:
            places = torch.randint(flat.numel(), (most,), generator=torch.Generator().manual_seed(flat.numel()))
            flat = flat[places.to(flat.device)]
        return cls(tensor.shape, flat.clone(), scale)

    def gap(self, other: "_Entries") -> float:
        """Largest difference, as a share of the largest value here; equal infinities and NaN in the same places do not differ."""
        old, new = self.values, other.values
        if not old.numel():
            return 0.0
        same = (old == new) | (old.isnan() & new.isnan())
        difference = (old.double() - new.double()).abs().masked_fill_(same, 0)
        return float(difference.max()) / max(self.scale, torch.finfo(old.dtype).tiny)

    def agrees(self, other: "_Entries") -> bool:
        """Tell whether the difference is rounding."""
        return self.gap(other) <= tolerance(self.values.dtype)


@dataclasses.dataclass
class _Run:
    """What a model did in one mode.

    Attributes:
        outputs: The floating tensors that it returned.
        layers: Some of what its layers returned, by name and number of the call, in the order in which they returned.
        running: Layers that have been called and have not returned.
        random: Whether random numbers were drawn.
        error: What stopped it.
    """

    outputs: list[_Entries] = dataclasses.field(default_factory=list)
    layers: dict[tuple[str, int], _Entries] = dataclasses.field(default_factory=dict)
    running: list[str] = dataclasses.field(default_factory=list)
    random: bool = False
    error: Exception | None = None


class Proof:
    """Compares a model before and after its shapes change.

    Args:
        calls: What is run; without any, nothing is proven. Of batches only the first samples are, where the model can be run on them.
        changed: Names of the modules that change. Where the output of one keeps its shape, it must keep its values.
        widths: Whether activations change their shapes, too.
    """

    def __init__(self, calls: Sequence[Call], changed: Sequence[str], widths: bool) -> None:
        self.calls = tuple(calls)
        self.changed = frozenset(changed)
        self.widths = widths
        self._expected: dict[Mode, _Run] = {}

    def expect(self, model: nn.Module) -> None:
        """Run ``model`` in its old shapes, with the values that the plan stands for."""
        whole, self.calls = self.calls, tuple(map(_first_samples, self.calls))
        run = self._run(model, "eval")
        if run.error is not None:
            log.debug("The self-check takes whole batches; on %d samples the model fails: %s", _SAMPLES, run.error)
            self.calls = whole
            run = self._run(model, "eval")
        if run.error is not None:
            raise run.error
        if any(entries.values.numel() and not entries.values.isfinite().any() for entries in run.outputs):
            broken = [name for name, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
            where = (
                f"values of {', '.join(map(repr, broken[:5]))} are not finite" if broken else "its weights are finite"
            )
            raise ModelError(
                f"{type(model).__name__} returns no finite number, so that no self-check can say whether a change is exact: {where}. "
                "Look for a diverged training, or give other example inputs."
            )
        self._expected["eval"] = run
        run = self._run(model, "train")
        if run.error is None:
            self._expected["train"] = run
        else:
            log.debug("The self-check skips train mode, in which the masked model fails: %s", run.error)

    def check(self, model: nn.Module) -> None:
        """Run ``model`` in its new shapes.

        Raises:
            ModelError: If it does not run, or differs.
        """
        for mode, expected in self._expected.items():
            found = self._run(model, mode)
            if found.error is not None:
                name = found.running[-1] if found.running else type(model).__name__
                raise ModelError(
                    f"The self-check failed at {name!r}: in {mode} mode the compact model does not run, {type(found.error).__name__}: "
                    f"{found.error}. Exclude this layer and report it; some code depends on a size that has changed."
                ) from found.error
            self._compare(expected, found)

    def _run(self, model: nn.Module, mode: Mode) -> _Run:
        run = _Run()
        with preserved(model, mode=mode), torch.no_grad():
            if mode == "train":
                drop_nothing(model)
            for name, module in _watched(model, self.changed, mode):
                _watch(module, name, run)
            torch.manual_seed(0)
            calls = [Call(c.module, _map(_perturb, c.args), _map(_perturb, dict(c.kwargs))) for c in self.calls]
            state = _random_state()
            try:
                run.outputs = [_Entries.of(t) for call in calls for t in _tensors(call.run(model))]
            except FAILURES as error:
                run.error = error
            run.random = state != _random_state()
        return run

    def _compare(self, expected: _Run, found: _Run) -> None:
        shapes = [[list(entries.shape) for entries in run.outputs] for run in (expected, found)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"The self-check failed: the model returns shapes {shapes[0]} with channels masked, {shapes[1]} without them. "
                "Exclude the last layers and report it; the change was not exact."
            )
        if self.widths and (expected.random or found.random):
            return
        both = [(name, old, found.layers.get((name, i))) for (name, i), old in expected.layers.items()]
        pairs = [(name, old, new) for name, old, new in both if new is not None and old.shape == new.shape]
        layers = [(name, old, new) for name, old, new in pairs if not old.agrees(new)]
        outputs = [
            ("the output of the model", old, new)
            for old, new in zip(expected.outputs, found.outputs, strict=True)
            if not old.agrees(new)
        ]
        if outputs or any(name in self.changed for name, _, _ in layers):
            name, old, new = [*layers, *outputs][0]
            raise ModelError(
                f"The self-check failed at {name!r}: compact and masked model differ by {old.gap(new):.1e} of the largest value, allowed "
                f"{tolerance(old.values.dtype):.0e}. Exclude this layer and report it; the change was not exact."
            )


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest difference that rounding explains, as a share of the largest value."""
    return TOLERANCE.get(dtype, 1e-3)


def _watched(model: nn.Module, changed: frozenset[str], mode: Mode) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers to look at: those that call no other, and those that change."""
    fused = tuple(f"{name}." for name, m in model.named_modules() if mode == "eval" and isinstance(m, _FUSED))
    for name, module in model.named_modules():
        if not name or f"{name}.".startswith(fused) or isinstance(module, torch.jit.ScriptModule):
            continue
        if name in changed or next(module.children(), None) is None:
            yield name, module


def _watch(module: nn.Module, name: str, run: _Run) -> None:
    """Enter what ``module`` returns; of several tensors the first, others may be by-products that nobody uses."""
    calls = iter(range(2**62))

    def enter(_module: nn.Module, _args: Any) -> None:
        run.running.append(name)

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        run.running.pop()
        number = next(calls)
        for tensor in _tensors(output):
            run.layers[name, number] = _Entries.of(tensor, _ENTRIES)
            break

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def drop_nothing(model: nn.Module) -> None:
    """Switch dropout off, also in train mode."""
    for module in model.modules():
        if _DROPS.search(type(module).__name__) and next(module.parameters(), None) is None:
            module.eval()
        if isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0  # type: ignore[assignment]


def _random_state() -> list[bytes]:
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # asking for its state would initialize it
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda else [])]
    return [state.numpy().tobytes() for state in states]


def _first_samples(call: Call) -> Call:
    """Narrow what looks like a batch, the common first axis of all tensors, to its first samples."""
    sizes: set[int] = set()
    _map(lambda tensor: sizes.add(len(tensor) if tensor.ndim else 0), (call.args, dict(call.kwargs)))
    if len(sizes) != 1 or min(sizes) <= _SAMPLES:
        return call
    args, kwargs = _map(lambda tensor: tensor[:_SAMPLES], (call.args, dict(call.kwargs)))
    return Call(call.module, args, kwargs)


def _perturb(tensor: Tensor) -> Tensor:
    """Move a floating tensor by a tenth of its spread, within its range; others stay."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    noise = 0.1 * tensor.std(correction=0) * torch.randn_like(tensor)
    return (tensor + noise).clamp(tensor.min(), tensor.max())


def _map(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply ``function`` to the tensors in nested arguments."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_map(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the dense floating tensors in nested outputs."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.layout == torch.strided and not value.is_nested:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        yield from _tensors(vars(value))
