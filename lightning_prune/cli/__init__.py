"""The command line: ``run``, ``export``, ``validate``, ``inspect``, ``compare``, ``prunability``, ``sensitivity``.

Exit codes: 0 done, 1 a gate of the validation was missed or a cell of a comparison failed (the report is there), 2 a mistake that the user can
correct, told in one line on the error stream, 130 stopped by Ctrl-C. Anything else is a mistake of ours or an error in the user's training code
and keeps its traceback.

Torch, Lightning and ONNX are imported by the commands that need them: ``--help`` needs none.
"""

import contextlib
import errno
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning_prune.cli import commands
from lightning_prune.cli.commands import INTERRUPTED, USER_ERROR
from lightning_prune.cli.parser import PROGRAM, build_parser, split_overrides
from lightning_prune.errors import LightningPruneError, OptionError
from lightning_prune.recipe.words import did_you_mean

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_COMMANDS: dict[str, Callable[[Any, commands.Overrides], int]] = {
    "run": commands.run,
    "export": commands.export,
    "validate": commands.validate,
    "inspect": commands.inspect,
    "compare": commands.compare,
    "prunability": commands.prunability,
    "sensitivity": commands.sensitivity,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Its words; None takes those of the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _log_lines():
            return _dispatch(words)
    except LightningPruneError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        return INTERRUPTED
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        return _complain(
            f"Cannot write {str(error.filename or 'a file')!r}: {error.strerror}. Make room or choose another folder."
        )


def _dispatch(words: list[str]) -> int:
    if words and not words[0].startswith("-") and words[0] not in _COMMANDS:
        raise OptionError(f"There is no command {words[0]!r}. {did_you_mean(words[0], _COMMANDS)}")
    overrides: list[tuple[str, str]] = []
    if words and words[0] != "inspect" and words[0] in _COMMANDS:
        kept, overrides = split_overrides(words[1:], words[0])
        words = [words[0], *kept]
    try:
        options = build_parser().parse_args(words)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    command: str = options.command
    return _COMMANDS[command](options[command], overrides)


def _complain(message: str) -> int:
    sys.stderr.write(f"{PROGRAM}: {' '.join(message.split())}\n")
    return USER_ERROR


@contextlib.contextmanager
def _log_lines() -> Iterator[None]:
    """Show what our own loggers say, one line each, on the error stream."""
    logger = logging.getLogger("lightning_prune")
    handler, level = logging.StreamHandler(sys.stderr), logger.level
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
