"""Surgery on published networks is exact or refuses: what is masked and what is removed compute the same, and what stays says why."""

import contextlib
import copy
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from lightning_prune.export import export_onnx
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree

from lightning_prune import Random, compress, count_flops, explain
from lightning_prune.callback import Task
from lightning_prune.errors import ExportError, ModelError
from lightning_prune.explanation import Explanation
from lightning_prune.structure.groups import Structure
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.removal import removed_units
from lightning_prune.structure.surgery import mask_
from tests.zoo.models import HEAD_LAYERS, MLP_LAYERS, ZOO, Entry, matching, randomize_
from tests.zoo.record import Refusals, Row, read_expected

pytestmark = pytest.mark.zoo

SECONDS = 60  # for one network's tracing, planning and surgery, which take a few; whatever needs more hangs or will with a larger network
EXACT = 1e-9  # of the largest value of the same output, in float64: rounding is at 1e-14
ONNX = 1e-5  # likewise, in float32
ALIVE = 1e-4  # outputs depend on the inputs by more than this share, or EXACT would hold for anything
_LINE = re.compile(r":\d+(?= `)")  # the number of a line of code


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail the test if the block has worked longer; what others do on the machine does not count."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not ready after {seconds} s of work")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except TimeoutError as error:
        pytest.fail(str(error), pytrace=False)  # stopped anywhere, it may have frames that no report can show
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Remembering(Random):
    """Removal at random that can say what a plan of its own saves."""

    structure: Structure

    def score_units(self, task: Task, structure: Structure, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        self.structure = structure
        return super().score_units(task, structure, kept)

    def saving(self, plan: Plan) -> int:
        """Return the multiply-adds that the units which leave take with them, as computed from the groups."""
        stays = ~removed_units(self.structure, plan.steps)
        return self.structure.flops(np.ones_like(stays)) - self.structure.flops(stays)


def outputs(model: nn.Module, example: Tensor) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(model(example)) if isinstance(leaf, Tensor)]


def evaluated(model: nn.Module, example: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return outputs(model.eval(), example)


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the largest difference as a share of the largest value of the same output; not a number where there is one."""
    assert [f.shape for f in found] == [w.shape for w in wanted]
    shares = [((f - w).abs().max() / w.abs().max()).item() for f, w in zip(found, wanted, strict=True)]
    return max(shares, key=lambda share: float("inf") if share != share else share)


def without_gradient(model: nn.Module, example: Tensor) -> set[str]:
    """Train one step backwards; return the parameters that got no gradient. Those that got one are finite."""
    model.train()
    torch.stack([output.square().mean() for output in outputs(model, example)]).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert all(bool(grad.isfinite().all()) for grad in grads.values() if grad is not None)
    return {name for name, grad in grads.items() if grad is None}


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with parameters of their own, by name."""
    return {name: m for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}


def shapes(model: nn.Module, layer: str) -> list[torch.Size]:
    return [parameter.shape for parameter in model.get_submodule(layer).parameters()]


def refusals(explanation: Explanation) -> Refusals:
    """Return the layers of which some channels stay, without numbers of lines, which change with any edit above them."""
    found: Refusals = {}
    for row in explanation.rows:
        if row.reason:
            found.setdefault(_LINE.sub("", row.reason), []).append(row.layer)
    return found


def own_flops(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Return the multiply-adds of the modules with parameters of their own, without those of modules inside them."""
    counted = count_flops(model, example).by_module
    children = {
        name: [f"{name}.{child}".lstrip(".") for child, _ in m.named_children()] for name, m in layers(model).items()
    }
    return {name: counted[name] - sum(counted[child] for child in inside) for name, inside in children.items()}


def removable_share(dense: nn.Module, small: nn.Module, explanation: Explanation, example: Tensor) -> float:
    """Return the share of multiply-adds in layers that have lost units or can, among layers that touch no norm over channels."""
    rows = {row.layer: row for row in explanation.rows}
    flops = {name: f for name, f in own_flops(dense, example).items() if "normalizes over it" not in rows[name].reason}
    can = [n for n in flops if rows[n].candidate or rows[n].inputs or shapes(small, n) != shapes(dense, n)]
    return sum(flops[name] for name in can) / sum(flops.values())


@pytest.mark.parametrize("name", ZOO)
def test_surgery_is_exact_or_refuses(
    name: str,
    subtests: pytest.Subtests,
    expected: Callable[[str, Refusals], Refusals],
    row: Row,
    tmp_path: Path,
) -> None:
    entry = ZOO[name]
    dense = entry.make().double()
    randomize_(dense, [entry.example() for _ in range(3)])
    example, other = entry.example(), entry.example()
    start = time.process_time()
    with at_most(SECONDS):
        explanation = explain(dense, example)
        method = Remembering(structured=True, flops=entry.flops or 0.5, align=1, seed=1)
        with pytest.raises(ModelError, match="nothing") if entry.flops is None else contextlib.nullcontext():
            small, plan = compress(dense, method, example)
    row.seconds = f"{time.process_time() - start:.1f}"

    with subtests.test("refusals are those that are expected"):
        found = refusals(explanation)
        row.candidates = str(sum(layer.candidate for layer in explanation.rows))
        row.refused = str(sum(not layer.candidate for layer in explanation.rows))
        assert found == expected(name, found)

    if entry.flops is None:
        return
    masked = copy.deepcopy(dense)
    mask_(masked, plan)

    with subtests.test("compact equals masked in eval mode"):
        wanted, changed = evaluated(masked, other), evaluated(small, other)
        gap = difference(changed, wanted)
        row.difference = f"{gap:.0e}"
        assert gap <= EXACT
        assert difference(changed, evaluated(dense, other)) > ALIVE, "nothing that matters was removed"
        assert difference(changed, evaluated(small, example)) > ALIVE, "the outputs hardly depend on the input"

    with subtests.test("compact runs and learns in train mode"):
        assert without_gradient(small, other) == without_gradient(copy.deepcopy(dense), other)

    with subtests.test("FLOPs are as planned"):
        before, after = count_flops(dense, example).total, count_flops(small, example).total
        row.flops = f"{after / before:.3f}"
        assert before - method.saving(plan) == after
        assert after <= entry.flops * before

    with subtests.test("units can leave where they should"):
        assert_losses(entry, dense, small, explanation, example)

    with subtests.test("compact exports to ONNX if the dense network does"):
        given = example.float() if example.is_floating_point() else example
        if entry.exports:
            written = export_onnx(small.float(), tmp_path / "small.onnx", given)
            row.onnx = f"{written.difference:.0e}"
            assert written.difference is not None
            assert written.difference <= ONNX
        else:
            with pytest.raises(ExportError):
                export_onnx(dense.float(), tmp_path / "dense.onnx", given)


def assert_losses(entry: Entry, dense: nn.Module, small: nn.Module, explanation: Explanation, example: Tensor) -> None:
    """Check what the kind of network promises to lose."""
    if entry.kind == "cnn":
        assert removable_share(dense, small, explanation, example) >= entry.share
        return
    if entry.kind == "rnn":
        recurrent = [n for n, m in dense.named_modules() if isinstance(m, nn.RNNBase)]
        assert recurrent
        assert [n for n in recurrent if small.get_submodule(n).hidden_size == dense.get_submodule(n).hidden_size] == []
        return
    hidden = matching(dense, MLP_LAYERS)
    assert hidden
    assert [n for n in hidden if len(small.get_submodule(n).weight) == len(dense.get_submodule(n).weight)] == []
    if entry.kind == "transformer":
        heads = matching(dense, HEAD_LAYERS)
        can = {layer.layer for layer in explanation.rows if layer.candidate}
        assert heads
        assert [n for n in heads if (n in can) != entry.heads] == []


def test_expected_refusals_are_of_networks_of_the_zoo() -> None:
    assert set(read_expected()) <= set(ZOO)
