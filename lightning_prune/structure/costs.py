"""What a model costs as a function of the units that stay."""

import math
from collections.abc import Sequence

import numpy as np

Term = tuple[int, tuple[np.ndarray, ...], int]  # factor, units along every axis (-1 always stays), divisor


class Polynomial:
    """A sum of products of kept counts: ``sum(factor * prod(kept indices of axis) // divisor)``; an axis keeps one index at least.

    Args:
        terms: Factor, the units along each axis, divisor, of every product.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        known: dict[bytes, int] = {}
        axes: list[np.ndarray] = []
        products: dict[tuple[tuple[int, ...], int], int] = {}
        for factor, vectors, divisor in terms:
            places = []
            for vector in vectors:
                key = vector.tobytes()
                if key not in known:
                    known[key] = len(axes)
                    axes.append(vector)
                places.append(known[key])
            where = (tuple(sorted(places)), divisor)
            products[where] = products.get(where, 0) + factor
        self._units = np.concatenate(axes) if axes else np.zeros(0, np.int64)
        self._starts = np.cumsum([0, *(len(axis) for axis in axes[:-1])]) if axes else np.zeros(0, np.int64)
        self._products = [(factor, places, divisor) for (places, divisor), factor in products.items()]

    def __call__(self, kept: np.ndarray) -> int:
        """Return the sum when only units with ``kept`` true stay.

        Args:
            kept: ``[units]``, boolean.
        """
        if not len(self._units):
            return 0
        stays = np.append(kept, True)[self._units]
        counts = np.add.reduceat(stays.astype(np.int64), self._starts).clip(min=1).tolist()
        total = 0
        for factor, places, divisor in self._products:
            total += factor * math.prod(counts[place] for place in places) // divisor
        return total
