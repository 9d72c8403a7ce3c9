"""Keep the noise of third parties away: prints, warnings, log records, and what native code writes to stderr."""

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

_NOISY = ("torch", "onnxscript", "onnx_ir", "onnx")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Python-level prints, warnings and the loggers of torch and ONNX while the block runs.

    Levels, streams and warning filters stand afterwards as before. Errors pass through.
    """
    names = [*_NOISY, *(name for name in logging.root.manager.loggerDict if name.split(".")[0] in _NOISY)]
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    swallowed = io.StringIO()
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL + 1)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(swallowed),
            contextlib.redirect_stderr(swallowed),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextlib.contextmanager
def native_errors() -> Iterator[list[str]]:
    """Catch what native code writes to file descriptor 2 while the block runs.

    Yields:
        A list that holds the lines once the block has ended; empty where the process has no error stream.
    """
    lines: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:
        yield lines
        return
    with tempfile.TemporaryFile() as catcher:
        os.dup2(catcher.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            catcher.seek(0)
            lines += catcher.read().decode(errors="replace").splitlines()
