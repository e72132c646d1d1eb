"""Small pieces of HTML that several sections use."""

from collections.abc import Sequence
from html import escape

NOTHING = '<span class="quiet" aria-label="none">\N{EN DASH}</span>'


def number(x: float | None, digits: int = 4, sign: bool = False) -> str:
    """A number with a true minus sign; '' for None."""
    return "" if x is None else f"{x:{'+' if sign else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def interval(low: float | None, high: float | None) -> str:
    """"[low, high]", or nothing where it is unknown."""
    return "" if low is None else f"[{number(low, sign=True)}, {number(high, sign=True)}]"


def chip(text: str, kind: str, title: str = "") -> str:
    """A small label, as HTML."""
    hint = f' title="{escape(title)}"' if title else ""
    return f'<span class="chip {kind}"{hint}>{escape(text)}</span>'


def missing(text: str) -> str:
    """A plain sentence (HTML) where data is not there yet."""
    return f'<p class="missing">{text}</p>'


def folded(summary: str, content: str) -> str:
    """Content that a click unfolds, as HTML."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def framed(label: str, content: str, kind: str = "scroll") -> str:
    """A region that scrolls sideways, also by keyboard."""
    return f'<div class="{kind}" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>'


def table(columns: Sequence[str], rows: list[list[str]], caption: str, kind: str = "dense") -> str:
    """A framed table. columns: headings, '>' in front where figures stand; rows:
    lists of cells that are HTML already."""
    right = [' class="num"' if c.startswith(">") else "" for c in columns]
    head = "".join(f'<th scope="col"{r}>{c.removeprefix(">")}</th>' for c, r in zip(columns, right))
    body = "\n".join(f'<tr><th scope="row">{cells[0]}</th>' +
                     "".join(f"<td{r}>{c}</td>" for c, r in zip(cells[1:], right[1:])) + "</tr>"
                     for cells in rows)
    return framed(
        caption, f'<table class="{kind}"><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table>"
    )
