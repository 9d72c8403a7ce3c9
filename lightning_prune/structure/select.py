"""Which modules a user means by ``include`` and ``exclude``: names, globs or module types."""

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lightning_prune.errors import OptionError

Pattern = str | type[nn.Module]


def select(
    modules: Mapping[str, nn.Module],
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
) -> dict[str, nn.Module]:
    """Return the modules that ``include`` names and ``exclude`` does not, in their order.

    A pattern is a module type; or text: a module's dotted name (which stands for everything below it, too), a glob over dotted names,
    or the name of a module type, such as ``"Linear"``.

    Args:
        modules: Modules by dotted name.
        include: Patterns of what to take; None takes all.
        exclude: Patterns of what to leave out; None leaves out nothing.

    Raises:
        OptionError: If a pattern matches nothing, the message suggests names that exist; or if nothing is left.
    """
    chosen = set(modules) if include is None else matching(modules, include, "include")
    dropped = set() if exclude is None else matching(modules, exclude, "exclude")
    if modules and not chosen - dropped:
        asked = f"exclude={exclude!r}" if include is None else f"include={include!r} and exclude={exclude!r}"
        raise OptionError(f"{asked}: of {len(modules)} layers that could be compressed, none is left. Exclude fewer.")
    return {name: module for name, module in modules.items() if name in chosen - dropped}


def matching(modules: Mapping[str, nn.Module], patterns: Pattern | Sequence[Pattern], option: str) -> set[str]:
    """Return the names of the modules that patterns match; ``option`` is the name of the argument that holds them.

    Raises:
        OptionError: If one matches nothing.
    """
    found: set[str] = set()
    if not isinstance(patterns, str | type | Sequence):
        raise OptionError(f"{option}={patterns!r}: give names, globs or module types, or a list of them.")
    for pattern in [patterns] if isinstance(patterns, str | type) else patterns:
        hits = {name for name, module in modules.items() if _matches_one(name, module, pattern)}
        if not hits:
            raise OptionError(
                f"{option}={pattern!r} matches no layer that could be compressed.{_suggest(pattern, modules)}"
            )
        found |= hits
    return found


def _matches_one(name: str, module: nn.Module, pattern: Pattern) -> bool:
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if not isinstance(pattern, str):
        raise OptionError(f"Patterns are names, globs or module types, got {pattern!r}.")
    kinds = {kind.__name__ for kind in type(module).__mro__} - {"Module", "object"}
    return name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern) or pattern in kinds


def _suggest(pattern: Pattern, modules: Mapping[str, nn.Module]) -> str:
    known: Iterable[str] = [*modules, *{type(module).__name__ for module in modules.values()}]
    close = difflib.get_close_matches(str(pattern), list(known), n=3, cutoff=0.5)
    if close:
        return f" Did you mean {' or '.join(map(repr, close))}?"
    first = list(modules)[:5]
    return f" Layers are {', '.join(map(repr, first))}{', ...' if len(modules) > len(first) else ''}." if first else ""
