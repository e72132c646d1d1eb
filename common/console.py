"""What a person sees: prints that never end a run, a terminal's width and encoding, the line of a failure.
No torch here.

A program calls `guard()` first. From then on `print` to stdout or stderr cannot fail: a closed pipe, a full
disk or a terminal that went away loses the output, never the run; a character that the terminal's encoding
lacks is replaced. A command whose whole product is its output ends with `settle(code)`, which says that the
output was lost.
"""

import contextlib
import errno
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TextIO

from common.interrupt import INTERRUPTED, like_ctrl_c
from common.printable import printable

CLOSED_PIPE = 128 + 13  # as a shell has it for a program that SIGPIPE ends: `| head` took what it wanted


class Guarded:
    """A text stream whose writes do not raise. The first error silences it; `lost` then holds that error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, act: Callable[[], Any]) -> None:
        if self.lost is not None:
            return
        try:
            act()
        except (OSError, ValueError) as error:  # ValueError: the stream object is closed
            self.lost = error
            _point_at_null(self._stream)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def isatty(self) -> bool:
        try:
            return self.lost is None and self._stream.isatty()
        except (OSError, ValueError):
            return False


def guard() -> None:
    """Make sys.stdout and sys.stderr safe to print to. Called once, first, by every program;
    again it changes nothing.

    Descriptors 0 to 2 that the caller closed (`2>&-`) are opened on the null device, because otherwise the
    next file that is opened, a log say, would take their number and receive what is printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Guarded):
            continue
        missing = stream is None  # the caller closed it: the interpreter made none
        if missing:
            stream = open(os.devnull, "w", encoding="utf-8")
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if name == "stdout" else "backslashreplace")
        guarded = Guarded(stream)
        if missing:
            guarded.lost = OSError(errno.EBADF, os.strerror(errno.EBADF))
        setattr(sys, name, guarded)


def settle(code: int = 0) -> int:
    """Exit code of a command whose whole product is its output: `code`, unless that output was lost.

    A reader that closed the pipe, as `| head` does, ends the command quietly with the code that a shell gives
    for SIGPIPE; a full disk or a closed descriptor is a failure, with one line on stderr.
    """
    sys.stdout.flush()
    lost = getattr(sys.stdout, "lost", None)
    if lost is None or code:
        return code
    if getattr(lost, "errno", None) == errno.EPIPE:
        return CLOSED_PIPE
    print(f"error: the output could not be written: {getattr(lost, 'strerror', None) or lost}",
          file=sys.stderr)
    return 1


def program(main: Callable[[], Any], product: bool = False) -> NoReturn:
    """Run a command's main function and leave with the code that it returns or exits with.

    Prints cannot fail, SIGTERM and SIGHUP end like Ctrl-C. product: the command's output is all there is to
    it (see settle).
    """
    guard()
    code = 0
    try:
        with like_ctrl_c():
            code = main() or 0
    except SystemExit as end:
        if not isinstance(end.code, (int, type(None))):  # a message
            raise
        code = end.code or 0
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    sys.exit(settle(code) if product else code)


def speaks() -> bool:
    """Whether this process prints for its run: of several processes that meet the same error
    only the first one does."""
    rank = os.environ.get("RANK", "")
    launched = all(
        os.environ.get(name) for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    )
    return not launched or not re.fullmatch("[0-9]{1,9}", rank) or int(rank) == 0


def fail(error: Any, code: int = 2) -> NoReturn:
    """One line on stderr, from one process, and the exit code of a refusal."""
    complain(error)
    sys.exit(code)


def complain(error: Any) -> None:
    """One line on stderr: from one process, unless the error is this process's own."""
    if speaks() or getattr(error, "own", False):
        print(f"error: {printable(str(error))}", file=sys.stderr)


def width(default: int = 110) -> int:
    """Columns of the terminal that stdout shows on (COLUMNS overrules); `default` where it is no terminal."""
    if "COLUMNS" in os.environ or sys.stdout.isatty():
        return max(40, shutil.get_terminal_size((default, 24)).columns)
    return default


def cut(text: str, columns: int) -> tuple[str, int]:
    """(the longest beginning of a text that fits into so many columns, its columns).
    Control characters become spaces."""
    kept, used = "", 0
    for character in text:
        character = character if character.isprintable() else " "
        columns_taken = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used + columns_taken > columns:
            break
        kept += character
        used += columns_taken
    return kept, used


class LiveLine:
    """One line on stderr that is drawn over itself, where stderr is a terminal; elsewhere nothing.

    The terminal's width is asked at every print: a line that wraps could not be drawn over, and terminals
    change size.
    """

    def __init__(self, wanted: bool = True) -> None:
        self.active = wanted and sys.stderr.isatty()
        self.drawn = 0  # columns

    def show(self, text: str) -> None:
        if not self.active:
            return
        room = self._columns() - 1  # the last column stays free: some terminals wrap as soon as it is filled
        text, used = cut(text, room)
        print("\r" + text + " " * (min(self.drawn, room) - used), end="", file=sys.stderr, flush=True)
        self.drawn = used

    def clear(self) -> None:
        if self.active and self.drawn:
            self.show("")
            print("\r", end="", file=sys.stderr, flush=True)

    @staticmethod
    def _columns() -> int:
        try:
            return max(2, os.get_terminal_size(sys.stderr.fileno()).columns or 80)
        except (OSError, ValueError):  # the terminal went away
            return 80


def _point_at_null(stream: TextIO) -> None:
    """Point a broken stream's descriptor at the null device: the interpreter's last flush then succeeds."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
