"""Sizes that hardware likes: the steps between the ranks or channel counts that a layer is offered."""

from lightning_prune.errors import OptionError


def alignment_unit(multiple: int, limit: int) -> int:
    """Choose the step between the sizes that are offered.

    Args:
        multiple: What sizes should be a multiple of, at least 1; 1 switches alignment off.
        limit: Largest useful size, 0 if there is none.

    Returns:
        ``multiple``, or in narrow layers, those with ``limit < 2 * multiple``, the largest power of two up to
        ``limit / 2``, so that there are at least two sizes to choose from; at least 1.

    Raises:
        OptionError: If ``multiple`` is no integer of at least 1.

    >>> [alignment_unit(8, limit) for limit in (64, 15, 7, 1)]
    [8, 4, 2, 1]
    """
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise OptionError(f"align: must be an integer of at least 1, got {multiple!r}. 1 switches rounding off.")
    if limit >= 2 * multiple:
        return multiple
    return 1 << max((limit // 2).bit_length() - 1, 0)
