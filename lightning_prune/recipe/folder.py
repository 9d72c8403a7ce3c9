"""What lets a run go on where it was stopped: its folder, whole checkpoint files, and the state of the random generators.

Layout of the folder: ``recipe.yaml`` (resolved), ``state.json`` (recipe and finished stages), ``stages/NAME.ckpt`` and ``.txt`` per finished
stage, and ``.exhibits.json`` where its methods have something to show, ``checkpoints/NAME/last.ckpt`` while a stage runs, ``logs/NAME/``, and at
the end the ONNX files and ``report/``.
"""

import dataclasses
import itertools
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch

from lightning_prune._lightning import Callback
from lightning_prune.callback.exhibit import Exhibit
from lightning_prune.errors import OptionError, RecipeError
from lightning_prune.files import whole_file, write_text
from lightning_prune.recipe.schema import Recipe, parse

CHECKPOINT_KEY = "lightning_prune_recipe"


@dataclasses.dataclass
class Folder:
    """The output folder of a run.

    Attributes:
        path: The folder.
        recipe: What runs there.
        done: Names of the finished stages.
    """

    path: Path
    recipe: Recipe
    done: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> Self:
        """Make a folder for a new run.

        Raises:
            OptionError: If it holds something already, is a file, or cannot be written.
        """
        if path.exists() and not path.is_dir():
            raise OptionError(f"Output folder {str(path)!r} is a file. Give the name of a folder.")
        if path.is_dir() and any(path.iterdir()):
            raise OptionError(
                f"Output folder {str(path)!r} is not empty. Go on with that run by --resume {path}, or choose another --output."
            )
        folder = cls(path, recipe)
        folder.save()
        write_text(path / "recipe.yaml", recipe.to_yaml())
        return folder

    @classmethod
    def reopen(cls, path: Path, recipe: Recipe | None = None) -> Self:
        """Open the folder of a run that was stopped.

        Args:
            path: The folder.
            recipe: What is expected to run there; None takes the recipe that the run was started with.

        Raises:
            RecipeError: If it belongs to another recipe; names the first key that differs.
            OptionError: If it is no such folder.
        """
        state = path / "state.json"
        try:
            content = json.loads(state.read_text(encoding="utf-8"))
            before, done = content["recipe"], [str(name) for name in content["done"]]
            started = parse(before)
        except OSError as error:
            raise OptionError(
                f"{str(path)!r} is no folder of a run: it has no readable state.json. Start a run without --resume."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise OptionError(f"{str(state)!r} is broken: {error}. Start the run again in another folder.") from error
        if recipe is not None and (found := _difference(before, json.loads(json.dumps(recipe.to_dict())))):
            raise RecipeError(
                f"{str(path)!r} was started with another recipe: {found}. Resume with the same one, or choose another --output."
            )
        return cls(path, started, done)

    def finish(self, stage: str) -> None:
        """Note that the result of a stage is there, and drop the checkpoints on the way to it."""
        self.done.append(stage)
        self.save()
        shutil.rmtree(self.unfinished(stage).parent.parent, ignore_errors=True)

    def save(self) -> None:
        """Write the state, whole or not at all."""
        write_text(
            self.path / "state.json", json.dumps({"recipe": self.recipe.to_dict(), "done": self.done}, indent=1) + "\n"
        )

    def result(self, stage: str) -> Path:
        """Return where the result of a finished stage stands."""
        return self.path / "stages" / f"{stage}.ckpt"

    def exhibit(self, stage: str, exhibits: Sequence[Exhibit]) -> None:
        """Keep what the methods of a stage have to show."""
        if exhibits:
            text = json.dumps([exhibit.to_dict() for exhibit in exhibits], indent=1)
            write_text(self.path / "stages" / f"{stage}.exhibits.json", text + "\n")

    def exhibits(self) -> list[dict[str, Any]]:
        """Return what the methods of all stages have to show, in their order."""
        files = [self.path / "stages" / f"{stage.name}.exhibits.json" for stage in self.recipe.stages]
        return [item for file in files if file.is_file() for item in json.loads(file.read_text(encoding="utf-8"))]

    def log_name(self, stage: str) -> str:
        """Return a name below ``logs/`` that is free: a logger begins its file anew, and a resumed stage shall keep the earlier part."""
        names = itertools.chain([stage], (f"{stage}-{number}" for number in itertools.count(2)))
        return next(name for name in names if not (self.path / "logs" / name).exists())

    def unfinished(self, stage: str) -> Path:
        """Return the checkpoint of the last finished epoch of a stage that runs."""
        return self.path / "checkpoints" / stage / "last.ckpt"


def checkpoint_io(package: ModuleType) -> Any:
    """Return a Trainer plugin that writes checkpoints whole or not at all.

    Lightning writes beside the temporary folder of the system and moves the file, which is a copy where that is another disk.

    Args:
        package: The Lightning package of the Trainer.
    """

    class WholeFileIO(package.plugins.TorchCheckpointIO):  # type: ignore[misc, name-defined]
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            with whole_file(path) as beside:
                try:
                    torch.save(checkpoint, beside)
                except RuntimeError as error:  # torch's writer reports a full disk so
                    raise OptionError(
                        f"Cannot write {str(path)!r}: {str(error).splitlines()[0]}. Is the disk full?"
                    ) from error

    return WholeFileIO()


class Provenance(Callback):
    """Writes the recipe into every checkpoint, in JSON types.

    Args:
        recipe: The resolved recipe.
        stage: Name of the stage that runs.
    """

    def __init__(self, recipe: Recipe, stage: str) -> None:
        super().__init__()
        self.entry = {"stage": stage, "recipe": recipe.to_dict()}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the entry."""
        checkpoint[CHECKPOINT_KEY] = self.entry


class RandomState(Callback):
    """Keeps the random generators in every checkpoint and puts them back before the first batch after a resume.

    They are put back in ``on_fit_start``: after it Lightning makes the iterator of the training data, which draws from them, as the
    uninterrupted fit does after the epoch's end where the checkpoint was written. (Its sanity check draws too but restores them.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the states, in types that ``weights_only=True`` loads."""
        kind, keys, *rest = np.random.get_state()
        version, internal, following = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [kind, np.asarray(keys).tolist(), *rest],
            "python": [version, list(internal), following],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the states of a checkpoint."""
        self._loaded = state_dict

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the generators back."""
        if self._loaded is None:
            return
        state, self._loaded = self._loaded, None
        torch.set_rng_state(state["torch"].cpu())
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([tensor.cpu() for tensor in state["cuda"]])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        version, internal, following = state["python"]
        random.setstate((version, tuple(internal), following))


def _difference(before: Any, now: Any, where: str = "") -> str:
    """Return the first place where two documents differ and both values, or nothing."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*before, *(key for key in now if key not in before)]:
            if found := _difference(before.get(key), now.get(key), f"{where}.{key}" if where else str(key)):
                return found
        return ""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return next(
            (f for k, pair in enumerate(zip(before, now, strict=True)) if (f := _difference(*pair, f"{where}.{k}"))), ""
        )
    return "" if before == now else f"{where} was {before!r} and is now {now!r}"
