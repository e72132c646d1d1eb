"""Small pieces of HTML that several sections use."""

from html import escape

NOTHING = '<span class="quiet" aria-label="none">\N{EN DASH}</span>'


def number(x, digits=4, sign=False):
    """A number with a true minus sign; '' for None."""
    return "" if x is None else f"{x:{'+' if sign else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def interval(low, high):
    """"[low, high]", or nothing where it is unknown."""
    return "" if low is None else f"[{number(low, sign=True)}, {number(high, sign=True)}]"


def chip(text, kind, title=""):
    """A small label, as HTML."""
    hint = f' title="{escape(title)}"' if title else ""
    return f'<span class="chip {kind}"{hint}>{escape(text)}</span>'


def missing(text):
    """A plain sentence (HTML) where data is not there yet."""
    return f'<p class="missing">{text}</p>'


def folded(summary, content):
    """Content that a click unfolds, as HTML."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def framed(label, content, kind="scroll"):
    """A region that scrolls sideways, also by keyboard."""
    return f'<div class="{kind}" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>'


def table(columns, rows, caption, kind="dense"):
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
