"""Units that have to leave in equal numbers, made into composite units that leave together.

A tie lists blocks of units, all of one length, of which equally many must leave: the halves of a chunk, the layers of an LSTM, the groups
of a thinned grouped convolution. Which ones is free, so the lowest score of every block makes one column, the second lowest of every
block the next. A composite unit is what the columns of all ties connect. It holds whole columns only, so whatever the columns are, it
takes equally many places of every block: ties stay balanced when composite units leave.

How the columns are chosen decides only how fine the composite units are. Where several ties share units, columns by score can chain
many units of one block together; such ties take their columns by position, in which nested ties agree.

Layout: a tie is an array of unit ids, int64 ``[blocks, length]``, its columns are ``[:, r]``.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Tie = Sequence[NDArray[np.int64]]  # blocks of unit ids, all of one length


def composite_units(ties: Sequence[Tie], scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Find the units that leave together.

    Args:
        ties: Blocks of equal length, by tie. A unit may stand in several ties, and in one tie several times: it then
            counts as often as it stands there.
        scores: Score of every unit, float64 ``[units]``, no NaN; infinite for units that cannot leave, so that the
            highest scored are their partners.

    Returns:
        For every unit the smallest id of its composite unit, int64 ``[units]``; its own id if it leaves alone.

    Raises:
        ValueError: If the blocks of a tie differ in length.
    """
    tables = [np.stack([np.asarray(block, dtype=np.int64) for block in tie]) for tie in ties]
    by_score = [np.unique(table).size == table.size for table in tables]
    while True:
        columns = [_sorted(table, scores) if free else table for table, free in zip(tables, by_score, strict=True)]
        labels = _connected(columns, scores.size)
        chained = [free and _chains(table, labels) for table, free in zip(tables, by_score, strict=True)]
        if not any(chained):
            return labels
        by_score = [free and not chain for free, chain in zip(by_score, chained, strict=True)]


def _sorted(table: NDArray[np.int64], scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Sort every block by score, equal ones by id."""
    return np.take_along_axis(table, np.lexsort((table, scores[table]), axis=-1), axis=1)


def _chains(table: NDArray[np.int64], labels: NDArray[np.int64]) -> bool:
    """Tell whether a composite unit holds two units of one block."""
    inside = np.sort(labels[table], axis=1)
    return bool((inside[:, 1:] == inside[:, :-1]).any())


def _connected(columns: Sequence[NDArray[np.int64]], count: int) -> NDArray[np.int64]:
    """Label every unit with the smallest id that columns connect it to, int64 ``[count]``."""
    labels = np.arange(count)
    if not columns:
        return labels
    ones = np.concatenate([np.broadcast_to(table[0], table[1:].shape).ravel() for table in columns])
    others = np.concatenate([table[1:].ravel() for table in columns])
    while True:
        left, right = labels[ones], labels[others]
        if np.array_equal(left, right):
            return labels
        np.minimum.at(labels, np.maximum(left, right), np.minimum(left, right))
        labels = labels[labels]
