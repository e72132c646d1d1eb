"""Files that matter: written whole or not at all, strict JSON, and no operating system's leftovers read as data.

No torch here. Every program of the project writes its results through `write` or `writing`.
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from settings import UserError

LEFTOVERS = ("Thumbs.db", "desktop.ini", "Icon\r")  # what file managers write; dotfiles and editors' copies by form


def is_leftover(path: Path | str) -> bool:
    """True for dotfiles (`._x`, `.DS_Store`), editors' copies (`x~`, `#x#`), unfinished `.tmp` files and the like."""
    name = Path(path).name
    return name.startswith(".") or name.endswith(("~", ".tmp", "#")) or name in LEFTOVERS


def listed(folder: Path | str, pattern: str = "*") -> list[Path]:
    """Entries of a folder that match a glob pattern, sorted by name, without leftovers."""
    return sorted(p for p in Path(folder).glob(pattern) if not is_leftover(p))


@contextlib.contextmanager
def writing(path: Path | str, remedy: str = "free some space or choose another place") -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends: a temporary file next to it, fsynced, then renamed.

    If the block raises, or the process dies, `path` keeps its old content. The temporary file's name is new and private,
    so nothing that already exists is written through. Follows no link: a link at `path` is replaced by the file.

    Raises UserError (path, reason, remedy) for what the operating system refuses.
    """
    path = Path(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {remedy}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def write(path: Path | str, content: str | bytes, **options: Any) -> None:
    """Replace a file's content in one step (see `writing`). Text is UTF-8 with `\\n` line ends on every system."""
    with writing(path, **options) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def strict(value: Any) -> Any:
    """The value with every number that is not finite replaced by None, as JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return value


def json_text(value: Any, **options: Any) -> str:
    """JSON of plain values that every parser reads: numbers that are not finite become null."""
    return json.dumps(strict(value), allow_nan=False, **options)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure, where the system can sync a folder (Windows cannot)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
