"""Pairs of tokens that a byte-level BPE tokenizer never writes one after the other (record 91, canonical
masking).

If text is encoded as ..., p, x, ..., then encoding that text again gives p and x again. So p and x are no
pair if the merges, done on the bytes of both together, would join something across the seam between them.
After Vieira et al., "Language Models over Canonical Byte-Pair Encodings" (arXiv 2506.07956).

A merge of rank r joins a piece `left` that ends p with a piece `right` that begins x if both exist when r is
due. The pieces at the edges of a token come and go with the merges inside it, so each has a life: the ranks
at which it exists. The last life of an edge has no end, because the token is complete then.
"""

import functools
import sys
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from data.tokenizer import load

FOREVER = 1 << 30  # above every rank

# What stands on one side of a seam.
SPACE, NUMBER, LETTER, OTHER, INSIDE = range(5)  # INSIDE: within a character of several bytes
# GPT-2's pre-tokenizer cuts text before BPE, so a merge across a seam needs both sides in one piece of it.
# Left out are seams whose cut depends on the text around: between spaces, within a character, and between a
# sign and a letter, where a contraction may begin.
JOINED = np.ones((5, 5), bool)
JOINED[:, INSIDE] = JOINED[SPACE, SPACE] = JOINED[OTHER, LETTER] = False

CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")  # pieces of their own for GPT-2's pre-tokenizer


class Life(NamedTuple):
    """A piece at an edge of a token, and the ranks born <= r < gone at which it exists there."""
    piece: bytes
    born: int
    gone: int


class Edges(NamedTuple):
    """Lives of the pieces that begin and end a token, and the pair of pieces that its last merge joins."""
    first: list[Life]
    last: list[Life]
    joined: tuple[bytes, bytes] | None


def merges(token: bytes, ranks: Mapping[bytes, int]) -> Iterator[tuple[int, int, list[bytes]]]:
    """(rank, place, pieces after it) of each merge that BPE does on the bytes of a token, in its order."""
    pieces = [token[i:i + 1] for i in range(len(token))]
    while len(pieces) > 1:
        pairs = [(ranks.get(a + b, FOREVER), i) for i, (a, b) in enumerate(zip(pieces, pieces[1:]))]
        rank, i = min(pairs)
        if rank == FOREVER:
            return
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2:]]
        yield rank, i, pieces


def edges(token: bytes, ranks: Mapping[bytes, int]) -> Edges:
    """The Edges of a token.

    A piece that begins x must exist before rank r to be joined by it, one that ends p at r itself: merges of
    equal rank are done from left to right.
    """
    before = [token[i:i + 1] for i in range(len(token))]
    first, last, joined = [(0, before[0])], [(0, before[-1])], None
    for rank, i, pieces in merges(token, ranks):
        joined = before[i], before[i + 1]
        if i == 0:
            first.append((rank + 1, pieces[0]))
        if i == len(pieces) - 1:
            last.append((rank, pieces[-1]))
        before = pieces
    return Edges(lives(first), lives(last), joined)


def lives(births: list[tuple[int, bytes]]) -> list[Life]:
    """Each piece lives until the next one is born."""
    ends = [born for born, _ in births[1:]] + [FOREVER]
    return [Life(piece, born, gone) for (born, piece), gone in zip(births, ends) if born < gone]


def kind(character: str) -> int:
    """SPACE, NUMBER, LETTER or OTHER, as GPT-2's pre-tokenizer tells characters apart."""
    if character.isspace() and not "\x1c" <= character <= "\x1f":
        return SPACE
    return {"L": LETTER, "N": NUMBER}.get(unicodedata.category(character)[0], OTHER)


def kind_at(token: bytes, first: bool) -> int:
    """What a token begins or ends with; INSIDE if that is no whole character."""
    for n in range(1, 5):
        try:
            text = (token[:n] if first else token[-n:]).decode()
        except UnicodeDecodeError:
            continue
        return kind(text[0 if first else -1])
    return INSIDE


def ends_in_contraction(token: bytes) -> bool:
    """Whether a token may end in a contraction, which nothing extends."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return False
    ending = next((c for c in CONTRACTIONS if text.endswith(c)), None)
    if ending is None:
        return False
    stem = text[:-len(ending)]
    return not stem or kind(stem[-1]) in (LETTER, NUMBER)


def impossible(ranks: Mapping[bytes, int], rows: int) -> np.ndarray:
    """Bits (rows, rows / 8) uint8, little end first: bit x of row p is set if token x never follows token p.

    ranks: {token bytes: number}; the number of a merged token is the rank of its merge.
    rows: a multiple of 8; rows and bits of numbers without a token are empty.
    """
    known = {number: edges(token, ranks) for token, number in ranks.items()}
    starts, ends = (np.full(rows, INSIDE) for _ in range(2))
    for token, number in ranks.items():
        starts[number], ends[number] = kind_at(token, first=True), kind_at(token, first=False)
    followers = following(known)
    by_left = {}  # piece -> ranks of the merges that have it on the left, growing
    for rank in sorted(followers):
        by_left.setdefault(known[rank].joined[0], []).append(rank)
    bits = np.zeros((rows, rows // 8), np.uint8)
    for token, number in ranks.items():
        if ends_in_contraction(token):
            continue
        row, allowed = np.zeros(rows, bool), JOINED[ends[number]]
        for life in known[number].last:
            due = by_left.get(life.piece, ())
            for rank in due[bisect_left(due, life.born):bisect_left(due, life.gone)]:
                row[followers[rank]] = True
        row &= allowed[starts]
        bits[number] = np.packbits(row, bitorder="little")
    return bits


def following(known: Mapping[int, Edges]) -> dict[int, np.ndarray]:
    """{rank: tokens that begin with the right piece of its merge while the rank is due}, where there are
    some."""
    by_piece = {}
    for number, of_token in known.items():
        for life in of_token.first:
            by_piece.setdefault(life.piece, []).append((life.born, life.gone, number))
    by_piece = {piece: np.array(found).T for piece, found in by_piece.items()}
    found = {}
    for rank, of_token in known.items():
        if of_token.joined is not None and of_token.joined[1] in by_piece:
            born, gone, numbers = by_piece[of_token.joined[1]]
            due = numbers[(born <= rank) & (rank < gone)]
            if len(due):
                found[rank] = due
    return found


@functools.lru_cache
def of_tokenizer(name: str, rows: int) -> np.ndarray:
    """`impossible` for a tokenizer of data/tokenizer.py; nothing is impossible after end of text."""
    encoding = load(name)
    ranks = {
        encoding.decode_single_token_bytes(i): i for i in range(encoding.n_vocab) if i != encoding.eot_token
    }
    return impossible(ranks, rows)


if __name__ == "__main__":  # python -m data.seams TOKENIZER ROWS FILE.npy, for system/seams.py
    name, rows, path = sys.argv[1:]
    np.save(path, of_tokenizer(name, int(rows)))
