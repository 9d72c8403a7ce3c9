"""Random controls: beside every budget of a comparison, what chance reaches under it.

A control is the first recipe with that budget, in which the method :data:`CONTROL` takes the place of every method, so it trains on the same data for
as long. It is looked up by its name in the export list of :mod:`lightning_prune.methods`.
"""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_prune.callback.masking import Masking
from lightning_prune.callback.weights import EntryRemoval
from lightning_prune.errors import OptionError
from lightning_prune.recipe import checks
from lightning_prune.recipe.schema import Recipe, Stage

CONTROL = "Random"
Budget = tuple[str, float | int]

_BUDGETS = ("flops", "params", "sparsity")
_LAYERS = ("include", "exclude", "recalibrate_bn")


def methods_of(recipe: Recipe) -> Iterator[tuple[Stage, str, Any]]:
    """Yield stage, name and constructed callback of every method that leads to the result, in order."""
    for stage in recipe.lineage:
        made = checks.methods(stage, recipe.stages.index(stage))
        for (name, _), method in zip(stage.methods, made, strict=True):
            yield stage, name, method


def budget_of(method: Any) -> Budget | None:
    """Return the budget that a method was given, ``("flops", 0.5)``; None where it has none."""
    return next(((key, value) for key in _BUDGETS if (value := getattr(method, key, None)) is not None), None)


def uncontrolled(recipes: Sequence[tuple[str, Recipe]]) -> tuple[dict[str, Recipe], list[str]]:
    """Find the budgets that no recipe reaches by chance.

    Args:
        recipes: Labels and recipes of a comparison.

    Returns:
        By the name of a control the recipe to make it of; and notes on recipes that get none.
    """
    wanted: dict[tuple[Budget, bool], Recipe] = {}
    present: set[tuple[Budget, bool]] = set()
    notes = []
    for label, recipe in recipes:
        name, budget, single = _final_budget(recipe)
        if budget is None:
            notes.append(f"{label} has no budget (flops, params or sparsity): it has no {CONTROL} control.")
        elif name == CONTROL:
            present.add((budget, single))
        else:
            wanted.setdefault((budget, single), recipe)
    left = {key: recipe for key, recipe in wanted.items() if key not in present}
    kinds = {budget: [single for other, single in left if other == budget] for budget, _ in left}
    names = {
        (budget, single): "-".join(
            [
                CONTROL.lower(),
                *(["weights" if single else "channels"] if len(kinds[budget]) > 1 else []),
                *map(str, budget),
            ]
        )
        for budget, single in left
    }
    return {names[key]: recipe for key, recipe in left.items()}, notes


def randomized(recipe: Recipe) -> Recipe:
    """Return the recipe with every method replaced by the control at that method's budget; methods without one are left out.

    Raises:
        OptionError: If the control is not among the methods.
    """
    from lightning_prune import methods

    if CONTROL not in methods.__all__:
        raise OptionError(
            f"A comparison always has the control {CONTROL!r}, which is not among the methods ({', '.join(methods.__all__)}). "
            "Install a version of lightning-prune that has it."
        )
    stages = []
    for number, stage in enumerate(recipe.stages):
        pairs = zip(stage.methods, checks.methods(stage, number), strict=True)
        replaced = [(CONTROL, found) for (_, given), method in pairs if (found := _arguments(given, method))]
        stages.append(dataclasses.replace(stage, methods=tuple(replaced)))
    return dataclasses.replace(recipe, description="", stages=tuple(stages))


def _final_budget(recipe: Recipe) -> tuple[str, Budget | None, bool]:
    """Return the name of the last method that has a budget, the budget, and whether single weights leave under it."""
    found = [(name, budget_of(method), method) for _, name, method in methods_of(recipe)]
    name, budget, method = next((entry for entry in reversed(found) if entry[1] is not None), ("", None, None))
    return name, budget, removes_weights(method)


def removes_weights(method: Any) -> bool:
    """Tell whether a method removes single weights."""
    return isinstance(getattr(method, "removal", None), EntryRemoval)


def _arguments(given: Mapping[str, Any], method: Any) -> dict[str, Any]:
    """Return the arguments of the control that stands for a method, none if that has no budget.

    They are the budget, the layers and, if the method masks as the control does, whatever else both take, such as its schedule.
    """
    from lightning_prune import methods

    budget = budget_of(method)
    if budget is None:
        return {}
    alike = inspect.signature(getattr(methods, CONTROL)).parameters if isinstance(method, Masking) else _LAYERS
    own = {key: value for key, value in given.items() if key in alike and key not in ("seed", "structured", *_BUDGETS)}
    if own.get("scope") == "lamp":  # an order of magnitudes; by chance, any order over all tensors
        del own["scope"]
    return {**own, budget[0]: budget[1], "structured": not removes_weights(method)}
