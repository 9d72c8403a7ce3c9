"""Units that are dead: all weights that write them, or all that read them, are masked. They can leave for good.

What nobody reads leaves as it is. What nobody writes is a constant, made of biases and normalizations alone: it is observed where it is read, and
moves into the bias of the reader (:class:`~lightning_prune.structure.steps.AbsorbConstants`). Where that would not be exact, beside zero padding or
without a bias, the unit stays unless its constant is zero; also where it is another constant in train mode than in eval mode, which batch
normalization makes of it until its statistics are those of the masked model. Units that an operation without a weight reads, such as a norm over all
channels, never die. That no output changes is seen to by running the model before and after, in both modes.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.errors import ModelError
from lightning_prune.structure.calls import Call
from lightning_prune.structure.groups import Slot, Structure, find_units
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.preserve import preserved
from lightning_prune.structure.proof import FAILURES, Mode, Proof, drop_nothing
from lightning_prune.structure.removal import removal_steps
from lightning_prune.structure.steps import AbsorbConstants, Step
from lightning_prune.structure.surgery import mask_
from lightning_prune.structure.trials import try_sizes

log = logging.getLogger(__name__)

Flags = NDArray[np.bool_]
_MODES: tuple[Mode, ...] = ("eval", "train")
_ALIKE = 1e-5  # share of the largest input by which a constant may vary: batch normalization divides rounding by a spread of zero


def bury(model: nn.Module, calls: Sequence[Call], masks: Mapping[str, Tensor]) -> tuple[Step, ...]:
    """Return the steps that remove dead units.

    Args:
        model: The model, masked entries zero, the statistics of its batch normalization those of the masked model; left as it is.
        calls: The calls that stand for it.
        masks: False where an entry is masked, by name of the parameter, boolean; parameters that are missing are whole.
    """
    arrays = {name: mask.cpu().numpy() for name, mask in masks.items()}
    if not has_empty_slice(masks):
        return ()
    try:
        structure = try_sizes(model, calls, find_units(model, calls))
    except ModelError as error:
        log.warning("Units that died of masks stay in the model: %s", error)
        return ()
    written, read = dead_units(structure, arrays)
    constants = _Constants.observe(model, calls, structure, arrays, written & ~read)
    dead = _leaving(structure, read | constants.absorbable)
    if not dead.any():
        return ()
    steps = _steps(model, structure, dead, constants)
    if _changes_nothing(model, calls, structure, dead & read, steps):
        return steps
    groups = [dead & np.isin(np.arange(structure.count), group.units) for group in structure.groups]
    alone = (_leaving(structure, part) for part in groups if part.any())
    safe = [
        d for d in alone if _changes_nothing(model, calls, structure, d & read, _steps(model, structure, d, constants))
    ]
    dead = _leaving(structure, np.any(safe, axis=0)) if safe else np.zeros(structure.count, bool)
    steps = _steps(model, structure, dead, constants)
    return steps if dead.any() and _changes_nothing(model, calls, structure, dead & read, steps) else ()


def dead_units(structure: Structure, masks: Mapping[str, Flags]) -> tuple[Flags, Flags]:
    """Return which units no weight writes, and which no weight reads, each ``[units]``, boolean.

    An entry is alive if it is not masked and neither the unit that it writes nor the one that it reads is dead; so death spreads.

    Args:
        structure: The units.
        masks: False where an entry is masked, by name of the parameter.
    """
    unwritten, unread = np.zeros(structure.count, bool), np.zeros(structure.count, bool)
    tensors = {name: slots for name, slots in structure.by_tensor.items() if len(structure.shapes[name]) >= 2}
    mixed = np.zeros(structure.count, bool)
    mixed[structure.mixed] = True
    while True:
        alive = {"written": mixed.copy(), "read": mixed.copy()}
        has = {"written": np.zeros(structure.count, bool), "read": np.zeros(structure.count, bool)}
        stays = np.append(~(unwritten | unread), True)
        for name, slots in tensors.items():
            entries = masks.get(name, np.ones(structure.shapes[name], bool))
            for slot in slots:
                entries = entries & slot.along(stays[slot.units], entries.ndim)
            for slot in slots:
                side = "written" if slot.zeroed else "read"
                flat = entries.any(axis=slot.others(entries.ndim)).reshape(-1)
                units = slot.units.reshape(-1)
                alive[side][units[flat & (units >= 0)]] = True
                has[side][units[units >= 0]] = True
        now = (
            unwritten | (has["written"] & ~alive["written"] & ~unread),
            unread | (has["read"] & ~alive["read"] & ~unwritten),
        )
        if (now[0] == unwritten).all() and (now[1] == unread).all():
            return unwritten, unread
        unwritten, unread = now


def has_empty_slice(masks: Mapping[str, Tensor]) -> bool:
    """Tell whether a row or column of a weight is masked altogether; without one, no unit can be dead."""
    return any(not bool(mask.transpose(0, axis).flatten(1).any(1).all()) for mask in masks.values() for axis in (0, 1))


@dataclasses.dataclass(frozen=True)
class _Constants:
    """What units that nobody writes contribute where they are read.

    Attributes:
        absorbable: Units that can leave, ``[units]``, boolean.
        values: By name of the reading layer, the constant by input, where it is not the one that the removal of units sees to.
        inputs: By name of the reading layer, the unit of every input, ``[inputs]``.
    """

    absorbable: Flags
    values: dict[str, dict[int, float]]
    inputs: dict[str, np.ndarray]

    @classmethod
    def observe(
        cls, model: nn.Module, calls: Sequence[Call], structure: Structure, masks: Mapping[str, Flags], units: Flags
    ) -> "_Constants":
        """Run the model and look at the inputs of the layers that read ``units``."""
        absorbable, inputs = units.copy(), {}
        values: dict[str, dict[int, float]] = {}
        readers = list(_readers(structure, masks, units))
        seen = _inputs_seen(model, calls, {name.rpartition(".")[0] for name, *_ in readers})
        for tensor, slot, read in readers:
            name = tensor.rpartition(".")[0]
            module = model.get_submodule(name)
            found = seen.get(name)
            if found is None or slot.units.ndim != 1 or not _is_simple(module, slot, tensor):
                absorbable[read] = False
                continue
            rest = structure.absorbed[tensor].value if tensor in structure.absorbed else 0.0
            low, high = found
            same = (high - low <= _ALIKE * torch.maximum(low.abs(), high.abs()).max()).tolist()
            inputs[name] = slot.units
            for index in np.flatnonzero(np.isin(slot.units, read)).tolist():
                unit = int(slot.units[index])
                constant = float(low[index] + high[index]) / 2
                if not same[index] or (constant != rest and not _has_free_bias(module)):
                    absorbable[unit] = False
                elif constant != rest:
                    values.setdefault(name, {})[index] = constant
        return cls(absorbable, values, inputs)

    def steps(self, dead: Flags) -> list[Step]:
        """Return the steps that take up the constants of the units that leave."""
        found = []
        for name, values in self.values.items():
            mine = {index: value for index, value in values.items() if dead[self.inputs[name][index]]}
            if mine:
                found.append(AbsorbConstants(name, mine))
        return list(found)


def _readers(structure: Structure, masks: Mapping[str, Flags], units: Flags) -> Iterator[tuple[str, Slot, np.ndarray]]:
    """Yield the slots of weights that read some of ``units`` with entries that are not masked, and which they read."""
    for name, slots in structure.by_tensor.items():
        if len(structure.shapes[name]) < 2:
            continue
        entries = masks.get(name, np.ones(structure.shapes[name], bool))
        for slot in slots:
            if slot.zeroed:
                continue
            used = entries.any(axis=slot.others(entries.ndim)) & (slot.units >= 0)
            read = np.unique(slot.units[used])
            read = read[units[read]]
            if read.size:
                yield name, slot, read


def _is_simple(module: nn.Module, slot: Slot, tensor: str) -> bool:
    """Tell whether the inputs of a layer are the columns of its weight."""
    plain = isinstance(module, nn.Linear) or (isinstance(module, _CONVOLUTIONS) and module.groups == 1)
    return plain and slot.axis == 1 and tensor.endswith("weight")


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _has_free_bias(module: nn.Module) -> bool:
    """Tell whether the bias of a layer can take up constants: there is one, and no zeros are padded beside them."""
    if not isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or module.bias is None:
        return False
    if isinstance(module, nn.Linear) or module.padding_mode != "zeros":
        return True
    padding = module.padding if isinstance(module.padding, tuple) else (module.padding,)
    return all(size in (0, "valid") for size in padding)


def _inputs_seen(model: nn.Module, calls: Sequence[Call], names: set[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the least and the largest value of every input channel of layers, over calls, batch, positions and modes."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, module: nn.Module, taps: int) -> None:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            value = args[0].detach()
            axis = value.ndim - 1 - taps
            flat = value.movedim(axis, 0).flatten(1)
            low, high = flat.amin(1), flat.amax(1)
            if name in seen:
                low, high = torch.minimum(low, seen[name][0]), torch.maximum(high, seen[name][1])
            seen[name] = low, high

        module.register_forward_pre_hook(hook)

    for mode in _MODES:
        with preserved(model, mode=mode), torch.no_grad():
            drop_nothing(model)
            for name in names:
                module = model.get_submodule(name)
                if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
                    watch(name, module, module.weight.ndim - 2)
            try:
                for call in calls:
                    call.run(model)
            except FAILURES as error:
                if mode == "eval":
                    raise
                log.debug("Constants are observed in eval mode alone; in train mode the masked model fails: %s", error)
    return seen


def _leaving(structure: Structure, dead: Flags) -> Flags:
    """Return which of the dead units leave: equally many where counts are tied, and never all of a group."""
    dead = dead.copy()
    while True:
        before = int(dead.sum())
        for group in structure.groups:
            if dead[group.units].all():
                dead[group.units[0]] = False
        for tie in structure.ties:
            most = min(int(dead[block[block >= 0]].sum()) for block in tie)
            for block in tie:
                own = block[block >= 0]
                dead[own[dead[own]][most:]] = False
        if int(dead.sum()) == before:
            return dead


def _steps(model: nn.Module, structure: Structure, dead: Flags, constants: _Constants) -> tuple[Step, ...]:
    return (*constants.steps(dead), *removal_steps(model, structure, ~dead)) if dead.any() else ()


def _changes_nothing(
    model: nn.Module, calls: Sequence[Call], structure: Structure, unread: Flags, steps: Sequence[Step]
) -> bool:
    """Tell whether the model computes the same with units gone, whatever is written to those that nobody reads."""
    proof = Proof(calls, [], widths=False)
    with preserved(model, parameters=True), torch.no_grad():
        before = {name: p.data for name, p in model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        for name, slots in structure.by_tensor.items():
            if name not in before or not any(
                slot.zeroed and unread[slot.units[slot.units >= 0]].any() for slot in slots
            ):
                continue
            values = before[name].clone()
            for slot in slots:
                if slot.zeroed and slot.units.ndim == 1:
                    rows = torch.from_numpy(np.append(unread, False)[slot.units])
                    noise = torch.randn(values.shape, generator=generator).to(values)
                    where = slot.along(rows, values.ndim).to(values.device)
                    values = torch.where(where, values + noise * values.std().nan_to_num(1.0), values)
            model.get_parameter(name).data = values
        proof.expect(model)
        for name, data in before.items():
            model.get_parameter(name).data = data
        mask_(model, Plan(tuple(steps)))
        try:
            proof.check(model)
        except ModelError as error:
            log.debug("Dead units do not leave together: %s", error)
            return False
    return True
