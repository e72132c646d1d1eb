"""Pairs of tokens that a tokenizer never writes one after the other, and prefixes of tokens."""

import hashlib

import numpy as np
import pytest

from data import prefix, seams
from data.corpus import sample_corpus
from data.shards import open_shard
from data.tokenizer import load

V, ROWS = 1257, 1280
# From the original's code on data/sample/vocab.bpe and on GPT-2's merges: (pairs, bytes that are not 0,
# sha256)
SAMPLE = 32_907, 25_763, "8b37815ebc28eac5a51e0e4e46c3b3c9715c36375878cd5e689e8d984ed6e75c"
GPT2 = 70_889_701, 58_810_565, "3bc096d452b0497e12da82158856669bc3bb3735281f3d676d0bf2ac20d95998"


@pytest.fixture(scope="module")
def bits():
    return seams.of_tokenizer("sample", ROWS)


def figures(bits):
    return (
        int(np.bitwise_count(bits).sum()), np.count_nonzero(bits), hashlib.sha256(bits.tobytes()).hexdigest()
    )


def test_the_table_is_that_of_the_original(bits):
    assert figures(bits) == SAMPLE


@pytest.mark.slow
def test_the_table_of_gpt2_is_that_of_the_original():
    assert figures(seams.of_tokenizer("gpt2", 50_304)) == GPT2


def masked(bits, p, x):
    """Whether token x is impossible after token p."""
    return bits[p, x >> 3] >> (x & 7) & 1


def test_no_pair_that_the_tokenizer_writes_is_impossible(bits):
    """All neighbours in the tokenised corpus, training and validation."""
    corpus = sample_corpus()
    for path in (*corpus.train, corpus.val):
        tokens = np.asarray(open_shard(path)).astype(np.int64)
        assert not masked(bits, tokens[:-1], tokens[1:]).any()


def test_every_impossible_pair_is_encoded_in_another_way(bits):
    encoding = load("sample")
    table = np.unpackbits(bits, axis=1, bitorder="little")
    tried = 0
    for p, x in np.argwhere(table).tolist():
        both = encoding.decode_single_token_bytes(p) + encoding.decode_single_token_bytes(x)
        try:
            text = both.decode()
        except UnicodeDecodeError:
            continue
        assert encoding.encode_ordinary(text) != [p, x], (p, x)
        tried += 1
    assert tried > 30_000


def test_nothing_is_impossible_after_the_end_of_text_and_no_padding_is(bits):
    assert not bits[V - 1:].any() and not np.unpackbits(bits, axis=1, bitorder="little")[:, V - 1:].any()


@pytest.mark.parametrize("p, x, why", [
    ("in", "g", "`ing` is a token"), (" t", "he", "` the` is a token")])
def test_a_seam_that_a_merge_crosses_is_impossible(bits, p, x, why):
    encoding = load("sample")
    assert masked(bits, *(encoding.encode_single_token(text) for text in (p, x))), why


@pytest.mark.parametrize("p, x", [("'", "s"), (" ", " "), ("\n", "he")])
def test_a_seam_that_the_pre_tokenizer_cuts_or_may_cut_is_possible(bits, p, x):
    encoding = load("sample")
    assert not masked(bits, *(encoding.encode_single_token(text) for text in (p, x)))


# ----- prefixes

@pytest.mark.parametrize("name, rows, with_one", [("sample", 1280, 1000), ("gpt2", 50_304, 50_000)])
def test_the_prefix_is_the_longest_token_that_begins_another(name, rows, with_one):
    """Every merged token has one; single bytes, end of text and padding have none."""
    encoding, table = load(name), prefix.of_tokenizer(name, rows)
    assert (table >= 0).sum() == with_one and len(table) == rows
    tokens = {
        encoding.decode_single_token_bytes(i): i for i in range(encoding.n_vocab) if i != encoding.eot_token
    }
    for text, number in list(tokens.items())[::97]:
        longest = next(
            (tokens[text[:n]] for n in range(len(text) - 1, 0, -1) if text[:n] in tokens), prefix.NONE
        )
        assert table[number] == longest
