"""How the shares of groups that leave relate to each other."""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune.errors import OptionError

Ratios = Literal["uniform", "pca"] | dict[str, float]


class Named(Protocol):
    """Units that compete."""

    @property
    def name(self) -> str:
        """What globs match."""

    @property
    def units(self) -> NDArray[np.int64]:
        """Their numbers."""


def ratio_of(ratios: Mapping[str, float], name: str) -> float:
    """Return the ratio of a group: that of the last pattern that matches, 0 if none does."""
    return next((ratio for glob, ratio in reversed([*ratios.items()]) if fnmatch.fnmatchcase(name, glob)), 0.0)


def check_names(method: str, ratios: Mapping[str, float], names: Sequence[str]) -> None:
    """Check that every pattern matches a group.

    Raises:
        OptionError: If one does not.
    """
    for pattern in ratios:
        if not fnmatch.filter(names, pattern):
            raise OptionError(f"{method}(ratios): {pattern!r} matches no group that can shrink. These are: {[*names]}.")


def energy_lost(matrix: Tensor) -> NDArray[np.float64]:
    """Return what share of its energy a matrix loses when its rank is cut by 1, 2, ...: the squares of its smallest singular values.

    Args:
        matrix: ``[units, features]``, a row for what each unit reads.

    Returns:
        ``[units]``, float64, ascending, the last one 1.
    """
    wide = matrix.detach().double().cpu()
    energy = torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).numpy()
    lost: NDArray[np.float64] = np.cumsum(energy) / max(float(energy.sum()), 1e-300)
    return lost


def scores_by_ratio(
    sizes: NDArray[np.float64], groups: Sequence[Named], ratios: Ratios, read: Callable[[int], Tensor]
) -> NDArray[np.float64]:
    """Return scores with which one ranking over all groups takes of each what ``ratios`` says, its smallest units first.

    Args:
        sizes: Of every unit, ``[units]``.
        groups: The groups.
        ratios: How the shares that they give relate.
        read: Returns the matrix of a group, given by its place, ``[m, n]``; the share of the units that leaves is that of its ``m`` components.

    Returns:
        ``[units]``.
    """
    scores = sizes.copy()
    for index, group in enumerate(groups if ratios != "uniform" else ()):
        given = np.arange(1, group.units.size + 1) / group.units.size
        if isinstance(ratios, Mapping):
            lost = given / ratio_of(ratios, group.name)
        else:
            energy = energy_lost(read(index))
            lost = np.interp(given, np.arange(energy.size + 1) / energy.size, [0.0, *energy])
        scores[group.units[np.argsort(sizes[group.units], kind="stable")]] = lost
    return scores


def check_ratios(method: str, ratios: object, sparsity: object) -> None:
    """Check the option.

    Raises:
        OptionError: If it is none of what is offered, or stands beside shares by group.
    """
    if isinstance(ratios, Mapping):
        wrong = {k: v for k, v in ratios.items() if not _is_positive(v)}
        if wrong or not ratios:
            raise OptionError(
                f"{method}(ratios={ratios!r}): give numbers above 0 by name or glob of a group, at least one."
            )
    elif ratios not in ("uniform", "pca"):
        raise OptionError(f"{method}(ratios={ratios!r}): give 'uniform', 'pca' or numbers by name of a group.")
    if isinstance(sparsity, Mapping) and ratios != "uniform":
        raise OptionError(
            f"{method}(ratios={ratios!r}): sparsity by group says itself what each group gives; drop one of them."
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
