"""How messages name what is allowed: the nearest name first."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return a sentence that proposes the nearest of the allowed names, or lists them all.

    Args:
        word: What came.
        allowed: The names that could have come.
    """
    names = sorted(set(allowed))
    folded = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {folded[close[0]]!r}?"
    return f"Allowed: {', '.join(names)}." if names else "Nothing is allowed here."


def one_line(error: BaseException) -> str:
    """Return the message of an exception on one line, its type in front where it is not ours."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
