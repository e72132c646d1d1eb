"""Byte-level BPE tokenizers that need no network: `load("gpt2")`, `load("sample")`, as tiktoken encodings.

Both come from a merges file in the form of GPT-2's vocab.bpe (README.md says whose it is): ranks 0..255 are
single bytes, printable ones first; each line is two symbols whose bytes joined are the next rank; last comes
<|endoftext|>.
"""

import functools
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from common import environment
from common.errors import UserError

if TYPE_CHECKING:
    import tiktoken

HERE = Path(__file__).parent
FILES = {"gpt2": (HERE / "gpt2_vocab.bpe.xz", 50_000), "sample": (HERE / "sample" / "vocab.bpe", 1_000)}


def byte_symbols() -> dict[str, int]:
    """GPT-2's symbol for each of the 256 bytes, in rank order: {symbol: byte}."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}


def read_ranks(text: str, merges: int) -> dict[bytes, int]:
    """{token bytes: rank} from a merges text. UserError if it holds another number of merges."""
    symbols = byte_symbols()
    ranks = {bytes([b]): i for i, b in enumerate(symbols.values())}
    for line in text.splitlines():
        if line.startswith("#version") or not line:
            continue
        pair = line.split(" ")
        ranks[b"".join(bytes(symbols[c] for c in symbol) for symbol in pair)] = len(ranks)
    if len(ranks) != 256 + merges:
        raise UserError(
            f"the merges file gives {len(ranks)} tokens instead of {256 + merges}: restore it from git")
    return ranks


def load(name: str) -> "tiktoken.Encoding":
    """The tiktoken.Encoding called `gpt2` (50,257 ids) or `sample` (1,257 ids)."""
    try:
        from tiktoken_ext.openai_public import r50k_pat_str
    except ImportError as error:
        raise UserError(environment.without(error)) from None
    return _load(name, r50k_pat_str)


def merges_only(name: str) -> "tiktoken.Encoding":
    """The same without a pre-tokenizer: the merges go over the whole text as one piece."""
    return _load(name, "(?s:.+)")


@functools.lru_cache
def _load(name: str, pattern: str) -> "tiktoken.Encoding":
    import tiktoken
    if name not in FILES:
        raise UserError(f"unknown tokenizer {name!r}: choose one of {', '.join(FILES)}")
    path, merges = FILES[name]
    try:
        raw = path.read_bytes()
        ranks = read_ranks((lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8"), merges)
    except (OSError, lzma.LZMAError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): restore it from git") from None
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 256 + merges})


def encode_documents(encoding: "tiktoken.Encoding", texts: Iterable[str]) -> list[list[int]]:
    """Token ids of documents, each preceded by <|endoftext|>."""
    return [[encoding.eot_token, *ids] for ids in encoding.encode_ordinary_batch(list(texts), num_threads=2)]
