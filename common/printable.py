"""Text of somebody else, fit for a terminal, a log and a page."""

import unicodedata


def printable(text: str, lines: bool = False) -> str:
    """The text with everything spelled out that acts on a terminal or has no UTF-8: control characters, line
    ends, directions of writing, lone surrogates. lines: keep `\\n` and tabs.
    """
    return "".join(c if c.isprintable() or lines and c in "\n\t" else escaped(c) for c in text)


def escaped(character: str) -> str:
    """One character as Python's escape of it; spaces of other widths are shown as a space."""
    if unicodedata.category(character) == "Zs":
        return " "
    return character.encode("unicode_escape").decode("ascii")
