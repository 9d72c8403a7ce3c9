"""What a comparison consists of: the recipes, made comparable, the dense model that they share, and random controls of equal budget.

Recipes are comparable if they measure the same thing on the same ground: model, data, metric, way of measuring, and every stage up to the dense
model are equal. Their gates are left out, because a comparison shows what each recipe reaches and judges none.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_prune.errors import OptionError
from lightning_prune.recipe import checks, objects
from lightning_prune.recipe.controls import randomized, uncontrolled
from lightning_prune.recipe.schema import SCRATCH, ClassSpec, Recipe, Stage

Kind = Literal["dense", "recipe", "control"]

DENSE = "dense"
_GATES = ("max_drop", "min_speedup", "tolerance")
_MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Trial:
    """One row of a comparison, for any seed.

    Attributes:
        label: What it is called in the table and in the folder.
        kind: The dense model, a recipe of the user, or a random control.
        recipe: What runs; the seed of a cell takes the place of its own.
    """

    label: str
    kind: Kind
    recipe: Recipe

    def seeded(self, seed: int) -> Recipe:
        """Return the recipe of one cell; a control draws anew with every seed."""
        if self.kind != "control":
            return dataclasses.replace(self.recipe, seed=seed)
        stages = tuple(
            dataclasses.replace(stage, methods=tuple((name, {**given, "seed": seed}) for name, given in stage.methods))
            for stage in self.recipe.stages
        )
        return dataclasses.replace(self.recipe, seed=seed, stages=stages)


def read_seeds(text: str) -> tuple[int, ...]:
    """Read the option ``--seeds``.

    Args:
        text: A count, ``3`` for 0, 1 and 2; or the seeds with commas, ``0,5,7``. One seed alone is ``7,``.

    Raises:
        OptionError: If it is neither, or a seed comes twice or is out of range.
    """
    parts = [part.strip() for part in text.removesuffix(",").split(",")]
    numbers = [int(part) for part in parts if part.isdecimal() and part.isascii()]
    listed = "," in text
    if len(numbers) != len(parts) or (not listed and numbers[0] < 1):
        raise OptionError(
            f"--seeds is a count of at least 1, such as 3, or seeds with commas, such as 0,1,2; got {text!r}."
        )
    seeds = tuple(numbers) if listed else tuple(range(numbers[0]))
    if len(set(seeds)) != len(seeds) or max(seeds) > _MAX_SEED:
        raise OptionError(f"--seeds are different whole numbers from 0 to {_MAX_SEED}; got {text!r}.")
    return seeds


def trials(recipes: Sequence[tuple[str, Recipe]]) -> tuple[tuple[Trial, ...], tuple[str, ...]]:
    """Make the rows of a comparison.

    Args:
        recipes: The name that each was given by, and the recipe.

    Returns:
        The dense model, the recipes in their order, the controls; and notes for the reader.

    Raises:
        OptionError: If they cannot be compared; says what differs or what is missing.
    """
    named = list(zip(_labels([name for name, _ in recipes]), (recipe for _, recipe in recipes), strict=True))
    _check_different(named)
    first, *others = [(label, _common(label, recipe)) for label, recipe in named]
    for other in others:
        _check_alike(first, other)
    made = [Trial(label, "recipe", _without_gates(recipe)) for label, recipe in named]
    wanted, notes = uncontrolled([(row.label, row.recipe) for row in made])
    labels = _labels([*(row.label for row in made), *wanted])[len(made) :]
    controls = [
        Trial(label, "control", randomized(recipe)) for label, recipe in zip(labels, wanted.values(), strict=True)
    ]
    return (Trial(DENSE, "dense", _dense(made[0].recipe)), *made, *controls), tuple(notes)


def check(rows: Sequence[Trial], seed: int) -> None:
    """Ask everything of the recipes that can be known before anything is trained.

    Args:
        rows: The rows of a comparison.
        seed: Any of the seeds.

    Raises:
        OptionError: If a recipe cannot work, or would train in several processes; names it.
    """
    for row in rows:
        recipe = row.seeded(seed)
        try:
            checks.check(recipe)
        except OptionError as error:
            raise type(error)(f"{row.label}: {error}") from error
        for number, stage in enumerate(recipe.stages):
            arguments = checks.trainer_arguments(recipe, stage, number)
            model = objects.model_class(recipe.model.class_path)
            trainer = checks.trainer(model, arguments, "trainer", logger=False, enable_checkpointing=False)
            if trainer.world_size != 1:
                raise OptionError(
                    f"{row.label}: stage {stage.name!r} would train in {trainer.world_size} processes; a comparison trains in "
                    "one. Add --trainer.devices 1, or run the recipes one by one with lightning-prune run."
                )


def dense_stages(recipe: Recipe) -> tuple[Stage, ...]:
    """Return the stages that lead to the dense model, first to last; empty if the recipe has none."""
    return recipe.lineage_of(recipe.dense) if recipe.dense is not None else ()


def _labels(names: Sequence[str]) -> list[str]:
    labels: list[str] = []
    for name in names:
        stem = Path(name).name.removesuffix(".yaml").removesuffix(".yml")
        label, number = stem, 1
        while label in (DENSE, *labels):
            number += 1
            label = f"{stem}-{number}"
        labels.append(label)
    return labels


def _check_different(named: Sequence[tuple[str, Recipe]]) -> None:
    seen: list[tuple[str, Recipe]] = []
    for label, recipe in named:
        plain = dataclasses.replace(recipe, description="", seed=0)
        same = next((other for other, before in seen if before == plain), None)
        if same is not None:
            raise OptionError(f"The recipes {same} and {label} are the same. Give each one once.")
        seen.append((label, plain))


def _common(label: str, recipe: Recipe) -> dict[str, Any]:
    """Return what all recipes of a comparison share, as nested dicts.

    Raises:
        OptionError: If the recipe lacks a part of it.
    """
    if recipe.dense is None:
        raise OptionError(
            f"{label}: compare needs a dense stage and one with methods after it. Add a stage without methods before the others."
        )
    if recipe.validate is None or recipe.validate.get("metric") is None:
        raise OptionError(f"{label}: compare needs a metric. Add e.g. validate.metric: accuracy.")
    return {
        "model": recipe.model.class_path,
        "data": dataclasses.asdict(recipe.data),
        "export": dict(recipe.export or {}),
        "validate": {key: value for key, value in recipe.validate.items() if key not in _GATES},
        "dense stages": [
            {"trainer": {**recipe.trainer, **stage.fit}, "init_args": {**recipe.model.init_args, **stage.init_args}}
            for stage in dense_stages(recipe)
        ],
    }


def _check_alike(first: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]]) -> None:
    one, two = (dict(_leaves(common)) for _, common in (first, other))
    for key in [*one, *(key for key in two if key not in one)]:
        have = [repr(leaves[key]) if key in leaves else "not set" for leaves in (one, two)]
        if have[0] != have[1]:
            raise OptionError(
                f"The recipes {first[0]} and {other[0]} cannot be compared: {key} is {have[0]} in the first and {have[1]} in the second. "
                "Model, data, metric and the stages up to the dense model are the same in all recipes; an option --KEY VALUE sets one in all."
            )


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted path and value of everything in nested dicts and lists that is neither."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield where, value
        return
    for key, item in items:
        yield from _leaves(item, f"{where}.{key}" if where else str(key))


def _without_gates(recipe: Recipe) -> Recipe:
    kept = {key: value for key, value in (recipe.validate or {}).items() if key not in _GATES}
    return dataclasses.replace(recipe, validate=kept, trainer={"enable_progress_bar": False, **recipe.trainer})


def _dense(recipe: Recipe) -> Recipe:
    """Return the part of a recipe that ends with the dense model, in a form that depends on nothing else."""
    names = [f"{DENSE}-{number}" if number else DENSE for number in range(len(dense_stages(recipe)))]
    stages = tuple(
        Stage(name, start, {**recipe.trainer, **stage.fit}, {**recipe.model.init_args, **stage.init_args}, ())
        for name, start, stage in zip(names, [SCRATCH, *names], dense_stages(recipe), strict=False)
    )
    model = ClassSpec(recipe.model.class_path)
    return dataclasses.replace(recipe, description="", seed=0, variables={}, model=model, trainer={}, stages=stages)
