"""Lines for people: on a terminal they heed its width, in a pipe or a file each stays whole,
so that programs can read it.

COLUMNS alone states a width where there is no terminal. Characters that the terminal's encoding lacks are
console.guard's business.
"""

import contextlib
import io
import os
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from common import console

INDENT = 4  # of what continues a line, more than its beginning


def room() -> int | None:
    """Columns that a line may take on stdout; None where lines stay whole."""
    if sys.stdout.isatty():
        return console.width()
    stated = os.environ.get("COLUMNS", "")
    # readline sets LINES and COLUMNS in a Python that loads it, and all its children inherit them: nobody
    # stated these
    if stated.isdecimal() and stated.strip("0") and "LINES" not in os.environ:
        return console.width()
    return None


def columns_of(text: str) -> int:
    """Columns of a terminal that a text takes: two for a wide character, none for a combining one."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
               for c in text)


def ellipsis() -> str:
    """What stands for text that was cut, in an encoding that may lack the one character for it."""
    try:
        "\u2026".encode(sys.stdout.encoding or "ascii")
        return "\u2026"
    except (UnicodeEncodeError, LookupError):
        return "..."


def clipped(text: str, columns: int) -> str:
    """The text, or its beginning and an ellipsis where it takes more columns."""
    if columns_of(text) <= columns:
        return text
    end = ellipsis()
    while text and columns_of(text + end) > columns:
        text = text[:-1]
    return text.rstrip() + end


def plural(n: int, word: str) -> str:
    """"1 run", "2 runs"."""
    return f"{n} {word}{'' if n == 1 else 's'}"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table: its columns flush left, two spaces apart and from the left edge."""
    widths = [max(map(columns_of, column)) for column in zip(*rows)]
    for row in rows:
        cells = (cell + " " * (width - columns_of(cell)) for cell, width in zip(row, widths))
        yield ("  " + "  ".join(cells)).rstrip()


def wrapped(line: str, columns: int) -> list[str]:
    """A line as lines of at most so many columns; the later ones are indented further than the first."""
    if columns_of(line) <= columns:
        return [line]
    lead = len(line) - len(line.lstrip())
    # textwrap counts characters
    padded = "".join(c + "\0" if unicodedata.east_asian_width(c) in "WF" else c for c in line)
    parts = textwrap.wrap(padded, columns, subsequent_indent=" " * min(lead + INDENT, columns // 2),
                          break_on_hyphens=False)
    return [part.replace("\0", "") for part in parts]


class Fitted(io.TextIOBase):
    """A stream that wraps whole lines and passes them on."""

    def __init__(self, stream: TextIO, columns: int) -> None:
        self.stream, self.columns, self.begun = stream, columns, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @property
    def encoding(self) -> str:
        return self.stream.encoding

    def isatty(self) -> bool:
        return self.stream.isatty()

    def write(self, text: str) -> int:
        *whole, self.begun = (self.begun + text).split("\n")
        for line in whole:
            self.stream.write("\n".join(wrapped(line, self.columns)) + "\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def finish(self) -> None:
        """Pass on a last line that has no end."""
        self.stream.write(self.begun)
        self.stream.flush()


@contextlib.contextmanager
def fitted() -> Iterator[None]:
    """Inside, or in a function that it decorates, what is printed is wrapped to the terminal's width."""
    columns = room()
    if columns is None:
        yield
        return
    stream = Fitted(sys.stdout, columns)
    with contextlib.redirect_stdout(stream):
        try:
            yield
        finally:
            stream.finish()
