"""What a person sees: prints that never end a run, a terminal's width and encoding. No torch here.

A program calls `guard()` first. From then on `print` to stdout or stderr cannot fail: a closed pipe, a full disk or a
terminal that went away loses the output, never the run; a character that the terminal's encoding lacks is replaced.
"""

import os
import shutil
import sys
from typing import TextIO


class Guarded:
    """A text stream whose writes do not raise. The first error silences it; `lost` then holds that error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.lost = stream, None

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _attempt(self, act) -> None:
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

    def writelines(self, lines) -> None:
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
    """Make sys.stdout and sys.stderr safe to print to. Called once, first, by every program; again it changes nothing.

    Descriptors 0 to 2 that the caller closed (`2>&-`) are opened on the null device, because otherwise the next file that
    is opened, a log say, would take their number and receive what is printed.
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
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if name == "stdout" else "backslashreplace")
        setattr(sys, name, Guarded(stream))


def width(default: int = 110) -> int:
    """Columns of the terminal that stdout shows on (COLUMNS overrules); `default` where it is no terminal."""
    return max(40, shutil.get_terminal_size((default, 24)).columns) if "COLUMNS" in os.environ or sys.stdout.isatty() else default


def _point_at_null(stream: TextIO) -> None:
    """Point a broken stream's descriptor at the null device, so that the interpreter's last flush succeeds."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError, AttributeError):
        pass
