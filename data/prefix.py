"""The prefix of a token: the token whose bytes are the longest proper prefix of its own (record 88,
@jvarho)."""

import functools
from collections.abc import Sequence

import numpy as np

from data.tokenizer import load

NONE = -1  # the token has no prefix


def prefixes(tokens: Sequence[bytes | None]) -> np.ndarray:
    """Prefix of each token (V,) int64; NONE without one.

    tokens: the bytes of each token; None: a token without bytes, which neither has a prefix nor is one.

    In sorted order a string follows its prefixes. A stack holds those of the current one; what is left on it,
    once the strings that are no prefixes are taken off, ends with the longest.
    """
    found, stack = np.full(len(tokens), NONE, np.int64), []
    known = [(text, number) for number, text in enumerate(tokens) if text is not None]
    for text, number in sorted(known):
        while stack and not text.startswith(stack[-1][0]):
            stack.pop()
        if stack:
            found[number] = stack[-1][1]
        stack.append((text, number))
    return found


@functools.lru_cache
def of_tokenizer(name: str, rows: int) -> np.ndarray:
    """Prefixes of the tokens of a tokenizer (rows,) int64; NONE for end of text and for padding."""
    encoding = load(name)
    texts = [
        encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab) if i != encoding.eot_token
    ]
    texts.insert(encoding.eot_token, None)
    return prefixes([*texts, *[None] * (rows - len(texts))])
