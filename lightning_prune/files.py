"""Files that are whole or absent: written beside their final name, then renamed."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lightning_prune.errors import OptionError


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and rename it to ``path`` when the block ends well.

    A kill, an error or a full disk while the block runs leaves whatever stood at ``path`` before. The suffix of the temporary
    name is that of ``path``, for writers that look at it.

    Args:
        path: Final name; of a link, the file that it leads to. Its folder is made if it is missing.

    Yields:
        The path to write to; the block must leave a file there.

    Raises:
        OptionError: If the folder cannot be written, ``path`` is a folder or a device, or the disk is full.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "no regular file but a device, pipe or socket"
        raise OptionError(f"Cannot write {os.fspath(path)!r}: it is {kind}. Give the name of a file.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        raise OptionError(
            f"Cannot write {str(target)!r}: {error.strerror or error}. Choose a folder that can be written."
        ) from error
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        beside.chmod(0o666 & ~_umask())
        beside.replace(target)
    except OSError as error:
        raise OptionError(f"Cannot write {str(target)!r}: {error.strerror or error}. Nothing was changed.") from error
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``, whole or not at all.

    Args:
        path: Final name.
        text: What the file shall hold.

    Raises:
        OptionError: As :func:`whole_file`.
    """
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
