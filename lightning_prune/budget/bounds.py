"""Bounds as users write them: a share of the dense model or a count."""

import math
from fractions import Fraction

from lightning_prune.errors import OptionError


def resolve_bound(value: object, dense: int, name: str) -> int:
    """Read a bound as users write it.

    Args:
        value: A float in (0, 1]: share of the dense model; an int in 1..``dense``: absolute.
        dense: Cost of the dense model, in the unit of the bound.
        name: Name of the option, ``"flops"`` or ``"params"``.

    Returns:
        The bound as a count, shares rounded down.

    Raises:
        OptionError: If ``value`` is anything else.

    >>> resolve_bound(0.29, 100, "flops"), resolve_bound(40, 100, "flops")
    (29, 40)
    """
    if isinstance(value, float) and 0 < value <= 1:
        return math.floor(Fraction(repr(float(value))) * dense)  # as written: 0.29 of 100 is 29, not 28.99...
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= dense:
        return value
    raise OptionError(
        f"{name}: must be a float in (0, 1], a share of the dense model, or an int from 1 to {dense:,}, "
        f"the dense model's own count, got {value!r}. For half of it write 0.5."
    )
