"""Shards and folders of shards.

A shard is 256 little-endian int32 (20240520, version 1, number of tokens, zeros) followed by uint16 token ids: the
format of kjj0/fineweb10B-gpt2 and of llm.c. A corpus is a folder with `*_train_*.bin`, `*_val_*.bin` and, unless its
tokens are GPT-2's, a `corpus.json` {"name", "tokenizer", "vocab_size", "bos"}.
"""

import functools
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import files
from settings import UserError

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SCAN = 4_000_000  # tokens that one look for document starts covers
GPT2 = {"name": "fineweb", "tokenizer": "gpt2", "vocab_size": 50257, "bos": 50256}


def write_shard(path, tokens):
    """Write token ids (any integer array, values < 65536) as a shard; the file appears whole or not at all."""
    tokens = np.asarray(tokens)
    if tokens.size and (tokens.min() < 0 or tokens.max() > 65535):
        raise UserError(f"{path}: token ids must lie in 0..65535 to fit a shard")
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with files.writing(path) as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2").tobytes())


def read_header(path):
    """Number of tokens of a shard. UserError for anything that is not a whole shard."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), "<i4") if size >= HEADER_BYTES else None
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from None
    again = "download or tokenise it again"
    if header is None:
        raise UserError(f"{path}: {size} bytes is too short for a shard header ({HEADER_BYTES} bytes): {again}")
    if header[0] != MAGIC:
        raise UserError(f"{path}: wrong magic number {header[0]} (a shard begins with {MAGIC}): not a token shard, "
                        f"{again}")
    if header[1] != VERSION:
        raise UserError(f"{path}: shard version {header[1]}, this program reads version {VERSION}: {again}")
    count, held = int(header[2]), (size - HEADER_BYTES) / 2
    if count != held:
        kind = "truncated" if held < count else "the header's count is wrong"
        raise UserError(f"{path}: its header says {count} tokens, the file holds {held:g} ({kind}): {again}")
    if count == 0:
        raise UserError(f"{path}: the shard is empty: {again}")
    return count


def open_shard(path):
    """Token ids of a shard as a read-only memory map, uint16 (n,)."""
    count = read_header(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


class Shard:
    """The tokens of a shard and where its documents begin, found piece by piece: no step waits for more than it needs.

    starts: positions of `bos` in tokens[:scanned]. ends: of those documents whose end is known, cut at `longest` tokens.
    kept: tokens of the first i documents so cut, i = 0 .. len(ends). All int64. Tokens before the first start belong to
    the last document of the shard before and are not counted.
    """

    def __init__(self, path, bos, longest):
        self.path, self.bos, self.longest = path, bos, longest
        self.tokens = np.asarray(open_shard(path))
        self.scanned, self.kept = 0, np.zeros(1, np.int64)
        self.starts = self.ends = np.empty(0, np.int64)

    @property
    def complete(self):
        return self.scanned == len(self.tokens)

    def scan(self):
        """Find the document starts of the next SCAN tokens."""
        part = self.tokens[self.scanned:self.scanned + SCAN]
        self.starts = np.concatenate([self.starts, np.flatnonzero(part == self.bos) + self.scanned])
        self.scanned += len(part)
        ends = np.append(self.starts[1:], len(self.tokens)) if self.complete else self.starts[1:]
        self.ends = np.minimum(ends, self.starts[:len(ends)] + self.longest)
        self.kept = np.append(0, np.cumsum(self.ends - self.starts[:len(ends)]))

    def more(self):
        """Scan on; False at the end of the shard. UserError if it has no document start at all."""
        if not self.complete:
            self.scan()
            return True
        if not len(self.starts):
            raise UserError(f"{self.path}: no document begins here (token {self.bos}), but the loader goes by documents: "
                            "choose data.loader=synced, mend bos in corpus.json, or tokenise the text again")
        return False

    def first(self, position):
        """The first document start at or after a position, or None."""
        while True:
            i = int(np.searchsorted(self.starts, position))
            if i < len(self.starts):
                return int(self.starts[i])
            if not self.more():
                return None

    def fill(self, first, count):
        """(starts, ends, next document) of the cut documents from number `first` on that together hold count tokens.

        The last one is cut to fit. None if the shard has too few.
        """
        while len(self.kept) <= first or self.kept[-1] - self.kept[first] < count:
            if not self.more():
                return None
        last = int(np.searchsorted(self.kept, self.kept[first] + count))
        starts, ends = self.starts[first:last], self.ends[first:last].copy()
        ends[-1] -= self.kept[last] - self.kept[first] - count
        return starts, ends, last


@dataclass(frozen=True)
class Corpus:
    """A folder of shards: train shards in name order and the validation shard, with their token counts."""
    folder: Path
    name: str
    tokenizer: str
    vocab_size: int
    bos: int
    train: tuple
    train_tokens: tuple
    val: Path
    val_tokens: int


def open_corpus(folder):
    """The Corpus in a folder; every header is checked. UserError says what to type when something is missing."""
    folder = Path(folder)
    get = ("`python -m data.fineweb 9` downloads FineWeb, `python -m data.tokenize FILE --out DIR` makes shards of any "
           "text")
    if not folder.is_dir():
        raise UserError(f"no data folder {folder}: {get}")
    train, val = files.listed(folder, "*_train_*.bin"), files.listed(folder, "*_val_*.bin")
    if not train:
        raise UserError(f"no train shards (*_train_*.bin) in {folder}: {get}")
    if not val:
        raise UserError(f"no validation shard (*_val_*.bin) in {folder}: {get}")
    about = dict(GPT2)
    if (folder / "corpus.json").exists():
        try:
            about.update(json.loads((folder / "corpus.json").read_text(encoding="utf-8")))
            about = {k: type(v)(about[k]) for k, v in GPT2.items()}
            if not 0 <= about["bos"] < about["vocab_size"] <= 65536:
                raise ValueError("0 <= bos < vocab_size <= 65536 does not hold")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder / 'corpus.json'}: {error}: it must hold name, tokenizer, vocab_size and bos; "
                            "mend it, or make the folder again with `python -m data.tokenize`") from None
    return Corpus(folder, **about, train=tuple(train), train_tokens=tuple(map(read_header, train)), val=val[0],
                  val_tokens=read_header(val[0]))


def check_vocabulary(tokens, vocab_size, where):
    """UserError if any id is outside the vocabulary."""
    highest = int(tokens.max())
    if highest >= vocab_size:
        raise UserError(f"{where}: token id {highest} is outside the vocabulary of {vocab_size}: the shard was made "
                        "with another tokenizer; correct corpus.json beside it or choose another --data")


# ----- digests ------------------------------------------------------------------------------------------------------

def corpus_digest(corpus, shards_used):
    """sha256 over (token count, sha256 of the tokens) of the first shards, in order: content and order, not names."""
    digest = hashlib.sha256()
    for path, count in zip(corpus.train[:shards_used], corpus.train_tokens):
        digest.update(f"{count} {shard_digest(path)}\n".encode())
    return digest.hexdigest()


def val_digest(corpus, tokens):
    """sha256 of the first tokens + 1 ids of the validation shard: the targets that every run is measured on."""
    return hashlib.sha256(open_shard(corpus.val)[:tokens + 1].tobytes()).hexdigest()


def shard_digest(path):
    """sha256 of a shard's tokens; remembered by path, size and time, because 200 MB take a second."""
    from data.corpus import default_cache
    stat, memory = Path(path).stat(), default_cache() / "digests.json"
    key = f"{Path(path).resolve()} {stat.st_size} {stat.st_mtime_ns}"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict):  # only a memory: junk in it is forgotten
        known = {}
    if key not in known:
        known[key] = hashlib.sha256(open_shard(path)).hexdigest()
        try:
            files.write(memory, files.json_text(known, indent=0), parents=True,
                        remedy="set SPEEDRUN_CACHE to a folder you may write")
        except UserError as error:
            note_once(f"note: digests are not remembered: {error}")
    return known[key]


@functools.lru_cache
def note_once(message):
    print(message, file=sys.stderr)
