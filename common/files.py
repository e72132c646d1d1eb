"""Files that are written whole or not at all, strict JSON, and lists of files without a system's leftovers.

No torch here. Every program of the project writes its results through `write` or `writing`; run.jsonl and the
manifest of a claim, which grow line by line, have an appending method of their own.
"""

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError

# What file managers, archivers, interpreters and disks leave; dotfiles, editors' copies and unfinished files
# are told by the form of their names.
LEFTOVERS = ("Thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r", "__MACOSX", "__pycache__", "$RECYCLE.BIN",
             "System Volume Information", "lost+found")
UNFINISHED = ("~", ".tmp", ".swp", ".swo", ".part", ".partial", ".crdownload", ".incomplete")


def default_cache() -> Path:
    """Folder for derived data: $SPEEDRUN_CACHE, otherwise data/cache in the checkout."""
    return Path(os.environ.get("SPEEDRUN_CACHE") or Path(__file__).parent.parent / "data" / "cache")


def is_leftover(path: Path | str) -> bool:
    """True for dotfiles (`._x`, `.DS_Store`), editors' copies (`x~`, `#x#`, `.x.swp`), unfinished files,
    `Thumbs.db`."""
    name = Path(path).name.lower()
    if name.startswith(".") or name in map(str.lower, LEFTOVERS):
        return True
    return name.endswith(UNFINISHED) or (name.startswith("#") and name.endswith("#"))


def listed(folder: Path | str, pattern: str = "*") -> list[Path]:
    """Entries below a folder that match a glob pattern, sorted by name;
    no leftovers and nothing inside of them."""
    folder = Path(folder)
    return sorted(p for p in folder.glob(pattern) if not any(map(is_leftover, p.relative_to(folder).parts)))


@contextlib.contextmanager
def writing(path: Path | str, remedy: str = "free some space or choose another place",
            parents: bool = False) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends: a temporary file next to it, fsynced, then
    renamed.

    If the block raises, or the process dies, `path` keeps its old content. The temporary file's name is new
    and private, so nothing that already exists is written through. Follows no link: a link at `path` is
    replaced by the file. Devices and pipes (/dev/stdout) are written to as they are.

    Args:
        remedy: what to do about a failure, the end of the message
        parents: make the folders that are missing

    Raises UserError (path, reason, remedy) for what the operating system refuses.
    """
    path = Path(path)
    temporary = None
    try:
        if path.exists() and not path.is_file():
            with open(path, "wb") as file:
                yield file
            return
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            _sync(file.fileno())
        with contextlib.suppress(OSError):  # a file system without rights, a memory card's
            os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except FileNotFoundError as error:  # no disk is full
        raise UserError(f"cannot write {path}: {error.strerror}; its folder is missing: make it, or choose "
                        "another place") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {remedy}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def make_folder(path: Path | str) -> None:
    """Make a folder and those above it. UserError if the operating system refuses."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror or error}") from None


def remove_unfinished(folder: Path | str, name: str) -> None:
    """Remove what a killed `writing` has left of files in this folder whose names begin with `name`."""
    for path in Path(folder).glob(f".{name}*.tmp"):
        with contextlib.suppress(OSError):
            os.unlink(path)


def write(path: Path | str, content: str | bytes | memoryview, **options: Any) -> None:
    """Replace a file's content in one step (see `writing`). Text is UTF-8 with `\\n` line
    ends on every system."""
    with writing(path, **options) as file:
        file.write(encoded(content) if isinstance(content, str) else content)


def encoded(text: str) -> bytes:
    """UTF-8; what has none, undecodable bytes of an argument or a file name, is spelled out as `\\udcff`."""
    return text.encode("utf-8", "backslashreplace")


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


def _sync(handle: int) -> None:
    """fsync, where the file system has one."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


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
