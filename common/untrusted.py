"""Files of somebody else: looked at before they are opened, read within bounds, copied without following
anything.

    with untrusted.copied(folder) as copy:      # refuses what is no plain tree of files; `copy` is private
        table = untrusted.json_file(copy / "results.json")
        untrusted.put(folder, "results.json", text)

A submission is data. `survey` walks a tree through file descriptors and follows no link; the readers bound
size, nesting and the length of numbers, and refuse what has two meanings or acts on a terminal: duplicate
keys, numbers that are not finite, lone surrogates, control characters, byte-order marks. Every refusal is a
UserError of one line that names the file and is safe to print. No torch here.
"""

import contextlib
import dataclasses
import errno
import json
import lzma
import math
import os
import re
import secrets
import stat
import tempfile
import tomllib
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.printable import printable

MIB = 2 ** 20
DEPTH = 40  # brackets inside brackets
DIGITS = 40  # characters of a number
STRING = 100_000  # characters of a string
LINE = 8 * MIB  # characters of a line
BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.S)
# what every system can store under the same name; ":" and "\" mean something on some
NAME = re.compile(r'[^/\\:*?"<>|]{1,200}')
# names that Windows keeps for devices, with any ending
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.I)
# folders by which git runs programs of whoever made them, also under their short name on Windows
GIT = re.compile(r"(\.git|git~\d)", re.I)
Leave = Callable[[str], bool]  # tells of a path relative to the top that it is left out
KINDS = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
         (stat.S_ISBLK, "a device"), (stat.S_ISCHR, "a device"))


class Malformed(UserError):
    """A text that is no JSON at all, torn or of another kind."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a tree: entries, folders inside folders, bytes of a file, bytes of all files."""

    entries: int = 20_000
    depth: int = 10
    file: int = 256 * MIB
    total: int = 2048 * MIB


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file or folder of a tree: its path relative to the top, and its size in bytes (None: a folder)."""

    path: str
    size: int | None


# ----- trees ------------------------------------------------------------------------------------------------

def nothing(path: str) -> bool:
    """Leaves nothing out."""
    return False


def survey(folder: Path | str, limits: Limits = Limits(), leave: Leave = nothing) -> list[Entry]:
    """Every file and folder below a folder, nothing opened and nothing followed.

    Raises UserError for a link, pipe, socket or device, for a file that has another name outside the folder,
    for a name that cannot be printed or stored everywhere, and at the first limit that is passed.
    """
    return [Entry(path, None if stat.S_ISDIR(about.st_mode) else about.st_size)
            for path, _, _, about in walked(folder, limits, leave)]


@contextlib.contextmanager
def copied(folder: Path | str, limits: Limits = Limits(), leave: Leave = nothing) -> Iterator[Path]:
    """A private copy of a folder that is a plain tree, under the same two last names, for the length of a
    block."""
    named = Path(os.path.abspath(folder))
    with tempfile.TemporaryDirectory(prefix="submission-") as place:
        target = Path(place, named.parent.name or "top", named.name or "folder")
        copy(folder, target, limits, leave)
        yield target


def copy(folder: Path | str, target: Path, limits: Limits = Limits(), leave: Leave = nothing) -> None:
    """Copy a plain tree to `target`, which must not exist: surveyed first, and each file checked again when
    it is open, in case it was exchanged."""
    survey(folder, limits, leave)
    target.mkdir(parents=True)
    for path, holder, name, about in walked(folder, limits, leave):
        if stat.S_ISDIR(about.st_mode):
            (target / path).mkdir()
        else:
            with opened(name, f"{folder}/{path}", holder) as handle, open(target / path, "xb") as file:
                for block in blocks(handle, about.st_size, f"{folder}/{path}"):
                    file.write(block)


def walked(folder: Path | str, limits: Limits,
           leave: Leave) -> Iterator[tuple[str, int, str, os.stat_result]]:
    """(relative path, file descriptor of its folder, name, lstat) of everything below a folder, checked."""
    top = open_folder(os.fspath(folder), None, str(folder))
    counts = Counts(limits, str(folder))
    stack = [("", top)]
    inodes: dict[tuple[int, int], list] = {}
    try:
        while stack:
            prefix, holder = stack.pop()
            try:
                for name, about in entries(holder, prefix, counts):
                    path = prefix + name
                    if leave(path):
                        continue
                    counts.add(path, about, inodes)
                    yield path, holder, name, about
                    if stat.S_ISDIR(about.st_mode):
                        stack.append((path + "/", open_folder(name, holder, f"{folder}/{path}")))
            finally:
                os.close(holder)
    finally:
        for _, holder in stack:
            os.close(holder)
    for path, seen, links in inodes.values():
        if seen < links:
            refuse(f"{folder}/{path}", "has another name outside the folder (a hard link)")


def entries(holder: int, prefix: str, counts: "Counts") -> Iterator[tuple[str, os.stat_result]]:
    """(name, lstat) of what an open folder holds, sorted; names that differ in case only are refused."""
    names = []
    with os.scandir(holder) as found:
        for entry in found:
            names.append(entry.name)
            counts.entry(prefix + entry.name)
    folded: dict[str, str] = {}
    for name in sorted(names):
        check_name(name, f"{counts.where}/{prefix}{name}")
        twin = folded.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if twin != name:
            refuse(f"{counts.where}/{prefix}{name}", f"has the name of {twin!r} on many systems")
        yield name, os.stat(name, dir_fd=holder, follow_symlinks=False)


class Counts:
    """What a walk has met so far, against its limits."""

    def __init__(self, limits: Limits, where: str) -> None:
        self.limits, self.where, self.entries, self.bytes = limits, where, 0, 0

    def entry(self, path: str) -> None:
        """One more name."""
        self.entries += 1
        if self.entries > self.limits.entries:
            refuse(self.where, f"holds more than {self.limits.entries} files and folders")
        if path.count("/") >= self.limits.depth:
            refuse(f"{self.where}/{path[:60]}", f"lies deeper than {self.limits.depth} folders")

    def add(self, path: str, about: os.stat_result, inodes: dict) -> None:
        """One more file or folder; inodes: [path, names met, names there are] of files with several."""
        where = f"{self.where}/{path}"
        if stat.S_ISDIR(about.st_mode):
            return
        check_regular(about, where)
        self.bytes += about.st_size
        if about.st_size > self.limits.file:
            refuse(where, f"has {about.st_size} bytes, allowed are {self.limits.file}")
        if self.bytes > self.limits.total:
            refuse(self.where, f"holds more than {self.limits.total} bytes")
        if about.st_nlink > 1:
            row = inodes.setdefault((about.st_dev, about.st_ino), [path, 0, about.st_nlink])
            row[1] += 1


def check_name(name: str, where: str) -> None:
    """UserError for a name that not every system stores, or that acts on whoever prints it."""
    if GIT.fullmatch(name):
        refuse(where, "is a repository of its own, whose settings git would follow: remove it")
    if name.startswith("-"):
        refuse(where, "has a name that a command would take for an option")
    if not NAME.fullmatch(name) or DEVICE.match(name) or (
            name.endswith((".", " ")) and name not in (".", "..")):
        refuse(where, "has a name that not every system can store")
    if not name.isprintable():
        refuse(where, "has a name with characters that cannot be printed")
    if len(os.fsencode(name)) > 255:
        refuse(where, "has a name that is too long")


def is_name(name: str) -> bool:
    """Whether a file or folder can have this name everywhere."""
    try:
        check_name(name, name)
    except UserError:
        return False
    return name not in (".", "..")


def check_regular(about: os.stat_result, where: str) -> None:
    """UserError unless it is a plain file."""
    if not stat.S_ISREG(about.st_mode):
        what = next((said for test, said in KINDS if test(about.st_mode)), "a folder")
        refuse(where, f"is {what}, where only plain files and folders may lie: put the file itself there")


def refuse(where: str, why: str) -> None:
    """Raise the UserError, fit to print."""
    raise UserError(f"{printable(str(where))[:400]}: {why}")


# ----- opening ----------------------------------------------------------------------------------------------

def open_folder(name: str, holder: int | None, where: str) -> int:
    """File descriptor of a folder. The top one (holder None) may be named by a link: the judge named it."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if holder is None else os.O_NOFOLLOW)
    try:
        return os.open(name, flags, dir_fd=holder)
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(where)}: cannot be opened as a folder "
                        f"({getattr(error, 'strerror', None) or error})") from None


@contextlib.contextmanager
def opened(name: str, where: str, holder: int | None = None) -> Iterator[int]:
    """File descriptor of a plain file, opened for reading: never a link, and never one that makes wait."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(name, flags, dir_fd=holder)
    except FileNotFoundError:
        raise UserError(f"{printable(where)}: no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENXIO):
            check_regular(os.stat(name, dir_fd=holder, follow_symlinks=False), where)
        raise UserError(f"{printable(where)}: cannot be read "
                        f"({getattr(error, 'strerror', None) or error})") from None
    try:
        check_regular(os.fstat(handle), where)
        yield handle
    finally:
        os.close(handle)


def blocks(handle: int, limit: int, where: str) -> Iterator[bytes]:
    """The content of an open file, of at most `limit` bytes."""
    left = limit
    while block := os.read(handle, MIB):
        left -= len(block)
        if left < 0:
            refuse(where, f"has more than {limit} bytes")
        yield block


# ----- reading ----------------------------------------------------------------------------------------------

def bytes_of(path: Path | str, limit: int = 64 * MIB) -> bytes:
    """The bytes of a plain file."""
    with opened(os.fspath(path), str(path)) as handle:
        return b"".join(blocks(handle, limit, str(path)))


def text_of(path: Path | str, limit: int = 64 * MIB, torn: bool = False) -> str:
    """The text of a plain UTF-8 file with `\\n` line ends, as it is; torn: without a last line that lacks its
    end."""
    data = bytes_of(path, limit)
    return decoded(data[:data.rfind(b"\n") + 1] if torn else data, str(path))


def decoded(data: bytes, where: str) -> str:
    """UTF-8 bytes as text. Byte-order marks, CR line ends and other control characters are refused."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(where)}: is not UTF-8 (byte {error.start})") from None
    if text.startswith("\ufeff"):
        refuse(where, "begins with a byte-order mark: write it without one")
    if "\r" in text:
        refuse(where, "has CR line ends (CRLF): something rewrote its lines, like git's autocrlf or a "
                      "transfer in text mode; fetch the file as it was written")
    check_text(text, where)
    return text


def check_text(text: str, where: str, spared: str = "\n\t") -> None:
    """UserError for characters that act on a terminal: control characters, directions of writing, lone
    surrogates."""
    rest = text
    for one in spared:
        rest = rest.replace(one, "")
    if rest.isprintable():
        return
    odd = {c for c in set(rest) if not c.isprintable() and unicodedata.category(c) != "Zs"}
    if odd:
        first = next(c for c in text if c in odd)
        refuse(where, f"holds the character {printable(first)}, which is not text")


def xz_of(path: Path | str, limit: int = 64 * MIB, memory: int = 256 * MIB) -> bytes:
    """What a plain .xz file unpacks to: one whole stream, of at most `limit` bytes."""
    packed = bytes_of(path, limit)
    unpacker = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=memory)
    out = []
    left = limit + 1
    try:
        while left and not unpacker.eof:
            block = unpacker.decompress(packed, max_length=min(left, MIB))
            packed = b""
            if not block and unpacker.needs_input:
                refuse(path, "is cut short: its archive has no end")
            left -= len(block)
            out.append(block)
    except lzma.LZMAError as error:
        raise UserError(f"{printable(str(path))}: is no whole .xz archive ({error})") from None
    if not left:
        refuse(path, f"unpacks to more than {limit} bytes")
    if unpacker.unused_data:
        refuse(path, "holds something after its archive")
    return b"".join(out)


def json_file(path: Path | str, limit: int = 64 * MIB) -> Any:
    """The value of a plain JSON file."""
    return json_value(text_of(path, limit), str(path))


def json_value(text: str, where: str, constants: set[str] | None = None) -> Any:
    """The value of a JSON text: bounded numbers, strings and nesting, no key twice, only finite numbers.

    constants: where NaN and Infinity may stand, as in old logs: the words that were found are added to it.
    """
    if text.count("[") + text.count("{") > DEPTH:
        check_nesting(text, where)

    def number(convert):
        def converted(word):
            value = convert(word) if len(word) <= DIGITS else math.inf
            if not math.isfinite(value):
                refuse(where, f"holds the number {printable(word[:40])}, which is too long or not finite")
            return value
        return converted

    def table(pairs):
        out = dict(pairs)
        if len(out) != len(pairs):
            keys = [key for key, _ in pairs]
            refuse(where, f"holds the key {next(key for key in keys if keys.count(key) > 1)[:60]!r} twice")
        return out

    def constant(word):
        if constants is None:
            refuse(where, f"holds {word}, which is no number")
        constants.add(word)
        return float(word)

    try:
        value = json.loads(text, parse_int=number(int), parse_float=number(float), object_pairs_hook=table,
                           parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{printable(where)}: is not JSON ({printable(str(error))[:100]})") from None
    if "\\" in text or not text.isascii() or len(text) > STRING:
        check_strings(value, where)
    return value


def check_nesting(text: str, where: str) -> None:
    """UserError for brackets inside brackets beyond DEPTH."""
    depth = 0
    for found in BRACKET.finditer(text):
        depth += (found[0] in "[{") - (found[0] in "]}")
        if depth > DEPTH:
            refuse(where, f"nests deeper than {DEPTH} brackets")


def check_strings(value: Any, where: str, spared: str = "") -> None:
    """UserError for a string or key of a value (nesting at most DEPTH) that is too long or acts on a
    terminal."""
    if isinstance(value, str):
        if len(value) > STRING:
            refuse(where, f"holds a text of {len(value)} characters, allowed are {STRING}")
        check_text(value, where, spared)
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_strings(key, where)
            check_strings(inner, where, spared)
    elif isinstance(value, list):
        for inner in value:
            check_strings(inner, where, spared)


def toml_file(path: Path | str, limit: int = MIB) -> tuple[str, dict]:
    """(text, table) of a plain TOML file. Its strings may hold line ends."""
    text = decoded(bytes_of(path, limit).replace(b"\r\n", b"\n"), str(path))  # an editor's own line ends
    return text, toml_value(text, str(path))


def toml_value(text: str, where: str) -> dict:
    """The table of a TOML text: bounded numbers and nesting, only finite numbers."""
    if any(len(line) > STRING for line in text.split("\n")):
        refuse(where, f"has a line of more than {STRING} characters")
    try:
        table = tomllib.loads(text)
        check_values(table, where)
    except (ValueError, RecursionError) as error:  # too many digits, too many brackets, not TOML
        raise UserError(f"{printable(where)}: {printable(str(error))[:200] or 'is not TOML'}") from None
    return table


def check_values(value: Any, where: str, depth: int = 0) -> None:
    """UserError for numbers that are too long or not finite, strings that act on a terminal, deep nesting."""
    if depth > DEPTH:
        refuse(where, f"nests deeper than {DEPTH} brackets")
    if isinstance(value, float) and not math.isfinite(value):
        refuse(where, f"holds {value}, which is no number")
    if isinstance(value, int) and abs(value) >= 2 ** 63:
        refuse(where, "holds a number of more than 64 bits")
    if isinstance(value, str):
        check_strings(value, where, "\n\t")
    for key, inner in value.items() if isinstance(value, dict) else enumerate(
            value if isinstance(value, list) else ()):
        check_values(key, where, depth)
        check_values(inner, where, depth + 1)


def closed(table: Any, known: Any, where: str) -> None:
    """UserError unless `table` is a dict whose keys are all in `known`."""
    if not isinstance(table, dict):
        refuse(where, "is not a table")
    for key in table:
        if key not in known:
            refuse(where, f"has a field '{printable(str(key))[:60]}' that nothing reads: remove it")


# ----- writing ----------------------------------------------------------------------------------------------

def put(folder: Path | str, name: str, content: str | bytes) -> None:
    """Make folder/name this content, in one step, whatever lies there: a link or pipe of that name is
    replaced, not written through. The temporary file's name is new.

    Raises UserError for what the operating system refuses.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    temporary = f".{name[:40]}.{secrets.token_hex(8)}.tmp"
    holder = open_folder(os.fspath(folder), None, str(folder))
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(temporary, flags, 0o666, dir_fd=holder)
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                with contextlib.suppress(OSError):  # a file system without it
                    os.fsync(file.fileno())
            os.rename(temporary, name, src_dir_fd=holder, dst_dir_fd=holder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=holder)
            raise
    except OSError as error:
        raise UserError(f"cannot write {folder}/{name}: {error.strerror or error}; free some space or choose "
                        "another place") from None
    finally:
        os.close(holder)
