"""Text of any length -> token ids in bounded memory: cut where GPT-2's pre-tokenizer splits
whatever stands around.

The pre-tokenizer (r50k) splits a text into letters, numbers, other characters, each with one blank before
them, and whitespace. A text cut at such a border gives the same tokens. A run of one kind without a border, a
million blanks say, is one piece of the pre-tokenizer: tiktoken's regular expression panics on long ones, so
they go to the byte-pair merges directly, in parts whose tokens at the joints are checked.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator

import tiktoken

from common.errors import UserError

SEGMENT = 131_072  # characters in one call of tiktoken; it panics on a million blanks or line breaks
RUN = 1_024  # a run of one kind that is at least so long may be treated as a piece
# White_Space of Unicode, as \s of tiktoken's regular expressions; str.isspace has four control characters
# more
SPACES_OF_WIDTHS = "".join(map(chr, range(0x2000, 0x200b)))
BLANKS = "\t\n\v\f\r \x85\xa0\u1680" + SPACES_OF_WIDTHS + "\u2028\u2029\u202f\u205f\u3000"
# a blank after something else; and the last of several blanks, which belongs to what follows
CUT = re.compile(f"(?<=[^{BLANKS}])(?=[{BLANKS}])|(?<=[{BLANKS}])(?=[{BLANKS}][^{BLANKS}])")
NEAR = 4_096  # characters searched at once, from the end of a segment backwards


@functools.cache
def kind(character: str) -> str:
    """The pre-tokenizer's kind: W whitespace, L letter, N number, O other;
    "" for what this Python's Unicode lacks."""
    if character in BLANKS:
        return "W"
    category = unicodedata.category(character)
    if category == "Cn":
        return ""
    return category[0] if category[0] in "LN" else "O"


def last_cut(text: str, limit: int) -> int:
    """The last place up to `limit` where a cut of the text changes no tokens; 0 if there is none.

    A border between two kinds that are not whitespace serves where there is no whitespace. An apostrophe
    before a letter is no border, because 's and 'll are pieces.
    """
    for end in range(limit, 0, -NEAR):
        found = [m.start() for m in CUT.finditer(text, max(0, end - NEAR), end + 2) if 0 < m.start() <= limit]
        if found:
            return found[-1]
    for at in range(limit, 0, -1):
        left, right = kind(text[at - 1]), kind(text[at]) if at < len(text) else ""
        if left and right and left != right and left != "W" and not (text[at - 1] == "'" and right == "L"):
            return at
    if kind(text[0]) == "W" and text[0] != " " and kind(text[1]) not in ("", "W"):
        return 1  # a line break before a run of something else is a piece
    return 0


def run_length(text: str) -> int:
    """Characters of one kind at the beginning, with the blank that goes before letters, numbers and others;
    0 if unknown."""
    first = 1 if text[:1] == " " and kind(text[1:2] or " ") != "W" else 0
    of = kind(text[first])
    if not of:
        return 0
    if of == "W":
        return re.match(f"[{BLANKS}]*", text).end()
    at = first
    while at < len(text) and kind(text[at]) == of:
        at += 1
    return at if at == len(text) or kind(text[at]) else 0


class Source:
    """Pieces of a text, joined as far as asked for."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self.pieces, self.text, self.ended = iter(pieces), "", False

    def fill(self, count: int) -> None:
        """Hold at least `count` characters, or all that are left."""
        parts, held = [self.text], len(self.text)
        while held < count and not self.ended:
            part = next(self.pieces, None)
            if part is None:
                self.ended = True
            else:
                parts.append(part)
                held += len(part)
        self.text = "".join(parts)

    def take(self, count: int) -> str:
        taken, self.text = self.text[:count], self.text[count:]
        return taken


def segments(merges: tiktoken.Encoding, pieces: Iterable[str]) -> Iterator[str | list[int]]:
    """Parts of a text whose tokens, one after the other, are the tokens of the whole: a str to encode,
    or ids of a long run.

    merges: the encoding without a pre-tokenizer (tokenizer.merges_only). pieces: the text, in parts of any
    length. No str is longer than SEGMENT as long as there are places to cut.
    """
    source, size = Source(pieces), SEGMENT
    while True:
        source.fill(2 * size)
        if source.ended and len(source.text) <= size:
            if source.text:
                yield source.text
            return
        at = last_cut(source.text, size)
        if at:
            yield source.take(at)
            size = SEGMENT
        elif run_length(source.text) >= RUN:
            yield from run(merges, source)
        else:
            size *= 2  # characters that this Python's Unicode lacks


def run(merges: tiktoken.Encoding, source: Source) -> Iterator[list[int]]:
    """Token ids of the one piece of the pre-tokenizer that the source begins with, part by part.

    A list of tokens is what byte-pair merging gives if and only if merging gives every two neighbours back,
    so only the two at each joint have to be looked at. UserError if they are not: merges would then have to
    be followed back further.
    """
    before: list[int] = []
    while True:
        source.fill(2 * SEGMENT + 2)
        text, length = source.text, run_length(source.text)
        ends = length < len(text) or source.ended
        if kind(text[1]) == "W" and length < len(text):
            length -= 1  # the last blank belongs to what follows
        ids = merges.encode_ordinary(text[:min(length, 2 * SEGMENT)])
        if before and not joins(merges, before, ids):
            raise UserError(
                "a run of characters of one kind, without a blank, cannot be cut into tokens: break it up")
        if ends and length <= 2 * SEGMENT:
            source.take(length)
            yield ids
            return
        first = whole_characters(merges, ids, len(ids) // 2)
        source.take(len(merges.decode(ids[:first])))
        before = ids[:first]
        yield before


def whole_characters(merges: tiktoken.Encoding, ids: list[int], at: int) -> int:
    """The first place from `at` on where no character is cut in two; tokens may be parts of characters."""
    while at < len(ids) and merges.decode_single_token_bytes(ids[at])[0] & 0xC0 == 0x80:
        at += 1
    return at


def joins(merges: tiktoken.Encoding, left: list[int], right: list[int]) -> bool:
    """Whether merging the last token of `left` and the first of `right` gives both back.

    Where a character is cut in two, the tokens with its other parts are merged with them.
    """
    start = len(left) - 1
    while merges.decode_single_token_bytes(left[start])[0] & 0xC0 == 0x80:
        start -= 1
    both = left[start:] + right[:whole_characters(merges, right, 1)]
    return merges.encode_ordinary(merges.decode(both)) == both
