"""Shards and folders of shards.

A shard is 256 little-endian int32 (20240520, version 1, number of tokens, zeros) followed by uint16 token
ids: the format of kjj0/fineweb10B-gpt2 and of llm.c. A corpus is a folder of shards NAME_train_NUMBER.bin and
NAME_val_NUMBER.bin of one NAME, in the order of their numbers, with a `corpus.json` {"name", "tokenizer",
"vocab_size", "bos"}. Only a folder of FineWeb's own names, fineweb_*, needs no corpus.json. `shards.json`, if
there, holds the SHA-256 of each file (data/fineweb.py).
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common import files
from common.errors import UserError

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SCAN = 4_000_000  # tokens that one look for document starts covers
LOOK = 2 ** 22  # tokens held at once by a look at all of a shard
BLOCK = 512  # tokens: so many zeros in a row are a hole, because text never has them
GPT2 = {"name": "fineweb", "tokenizer": "gpt2", "vocab_size": 50257, "bos": 50256}
# vocab_size and bos of the tokenizers of this project
TOKENIZERS = {"gpt2": (50257, 50256), "sample": (1257, 1256)}
SHARD_NAME = re.compile(r"(?P<name>.+)_(?P<part>train|val)_(?P<number>\d+)\.bin")
MANIFEST = "shards.json"


class ShardWriter:
    """A shard that is being written. count: tokens so far."""

    def __init__(self, path: Path | str, file: BinaryIO) -> None:
        self.path, self.file, self.count = path, file, 0

    def append(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Add token ids: any integer array, values < 65536."""
        tokens = np.asarray(tokens)
        if tokens.size and (tokens.min() < 0 or tokens.max() > 65535):
            raise UserError(f"{self.path}: token ids must lie in 0..65535 to fit a shard")
        self.file.write(tokens.astype("<u2").tobytes())
        self.count += tokens.size


@contextlib.contextmanager
def writing_shard(path: Path | str) -> Iterator[ShardWriter]:
    """A shard to append to. The file appears whole when the block ends, and not at all if it raises."""
    with files.writing(path) as file:
        file.write(bytes(HEADER_BYTES))
        shard = ShardWriter(path, file)
        yield shard
        header = np.zeros(256, "<i4")
        header[:3] = MAGIC, VERSION, shard.count
        file.seek(0)
        file.write(header.tobytes())


def write_shard(path: Path | str, tokens: Sequence[int] | np.ndarray) -> None:
    """Write token ids (any integer array, values < 65536) as a shard;
    the file appears whole or not at all."""
    with writing_shard(path) as shard:
        shard.append(tokens)


def read_header(path: Path | str) -> int:
    """Number of tokens of a shard. UserError for anything that is not a whole shard."""
    path = Path(path)
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{path}: not a file: remove it")
        size = about.st_size
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), "<i4") if size >= HEADER_BYTES else None
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from None
    again = "download or tokenise it again"
    if header is None:
        raise UserError(
            f"{path}: {size} bytes is too short for a shard header ({HEADER_BYTES} bytes): {again}")
    if header[0] != MAGIC:
        raise UserError(
            f"{path}: wrong magic number {header[0]} (a shard begins with {MAGIC}): not a token shard, "
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


def open_shard(path: Path | str) -> np.memmap:
    """Token ids of a shard as a read-only memory map, uint16 (n,)."""
    count = read_header(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


class Shard:
    """The tokens of a shard and where its documents begin, found piece by piece:
    no step waits for more than it needs.

    starts: positions of `bos` in tokens[:scanned]. ends: of those documents whose end is known, cut at
    `longest` tokens.
    kept: tokens of the first i documents so cut, i = 0 .. len(ends). All int64. Tokens before the first start
    belong to the last document of the shard before and are not counted.
    """

    def __init__(self, path: Path, bos: int, longest: int) -> None:
        self.path, self.bos, self.longest = path, bos, longest
        self.tokens = np.asarray(open_shard(path))
        self.scanned, self.kept = 0, np.zeros(1, np.int64)
        self.starts = self.ends = np.empty(0, np.int64)

    @property
    def complete(self) -> bool:
        return self.scanned == len(self.tokens)

    def check_length(self) -> None:
        """UserError if the file was cut since it was opened: the system ends a process that reads there.

        A file that was removed is no harm, because the memory map keeps it.
        """
        try:
            size = os.stat(self.path).st_size
        except OSError:
            return
        if size < HEADER_BYTES + 2 * len(self.tokens):
            raise UserError(f"{self.path}: was cut to {size} bytes while it is being read: bring it back")

    def scan(self) -> None:
        """Find the document starts of the next SCAN tokens."""
        part = self.tokens[self.scanned:self.scanned + SCAN]
        self.starts = np.concatenate([self.starts, np.flatnonzero(part == self.bos) + self.scanned])
        self.scanned += len(part)
        self.count()

    def count(self) -> None:
        """Ends and tokens of the known documents, cut at `longest`."""
        ends = np.append(self.starts[1:], len(self.tokens)) if self.complete else self.starts[1:]
        self.ends = np.minimum(ends, self.starts[:len(ends)] + self.longest)
        self.kept = np.append(0, np.cumsum(self.ends - self.starts[:len(ends)]))

    def cut(self, longest: int) -> None:
        """Cut the documents at another length from now on."""
        if longest != self.longest:
            self.longest = longest
            self.count()

    def more(self) -> bool:
        """Scan on; False at the end of the shard. UserError if it has no document start at all."""
        if not self.complete:
            self.scan()
            return True
        if not len(self.starts):
            raise UserError(
                f"{self.path}: no document begins here (token {self.bos}), but the loader goes by "
                "documents: tokenise the text again, mend bos in corpus.json, or choose data.loader=synced "
                "if no shard has documents")
        return False

    def first(self, position: int) -> int | None:
        """The first document start at or after a position, or None."""
        while True:
            i = int(np.searchsorted(self.starts, position))
            if i < len(self.starts):
                return int(self.starts[i])
            if not self.more():
                return None

    def fill(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, int] | None:
        """(starts, ends, next document) of the cut documents from number `first` on that
        together hold count tokens.

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


GET = ("`python -m data.fineweb RECORD --scale SCALE` downloads what a record reads of FineWeb, `python -m "
       "data.tokenize FILE --out DIR` makes shards of any text")


def open_corpus(folder: Path | str, get: str = GET) -> Corpus:
    """The Corpus in a folder; every header is checked. UserError says what to type when
    something is missing (`get`)."""
    folder = Path(folder)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        raise UserError(f"no data folder {folder}: {get}") from None
    except NotADirectoryError:
        raise UserError(f"{folder} is a file, not a folder of shards: {get}") from None
    except OSError as error:
        raise UserError(
            f"cannot read the data folder {folder}: {error.strerror}: mend it or choose another") from None
    found = numbered(folder, [n for n in names if n.endswith(".bin") and not files.is_leftover(n)])
    for part, called in (("train", "train shards"), ("val", "validation shard")):
        if not found[part]:
            raise UserError(f"no {called} (*_{part}_*.bin) in {folder}: {get}")
    train, val = list(found["train"].values()), next(iter(found["val"].values()))
    about = read_about(folder, train[0].name)
    return Corpus(folder, **about, train=tuple(train), train_tokens=tuple(map(read_header, train)), val=val,
                  val_tokens=read_header(val))


def numbered(folder: Path, names: list[str]) -> dict[str, dict[int, Path]]:
    """{"train" and "val": {number: path}} in the order of numbers.

    UserError for gaps, for two shards of one number, and for shards of several corpora.
    """
    found: dict[str, dict[int, Path]] = {"train": {}, "val": {}}
    corpora: dict[str, str] = {}
    for name in sorted(names):
        match = SHARD_NAME.fullmatch(name)
        if match is None:
            if "_train_" in name or "_val_" in name:
                raise UserError(f"{folder / name}: shards are called NAME_train_NUMBER.bin or "
                                "NAME_val_NUMBER.bin: rename or remove it")
            continue
        part, number = found[match["part"]], int(match["number"])
        if number in part:
            raise UserError(f"{folder} has two {match['part']} shards of number {number}, "
                            f"{part[number].name} and {name}: remove one")
        part[number] = folder / name
        corpora.setdefault(match["name"], name)
    if len(corpora) > 1:
        raise UserError(f"{folder} mixes corpora ({' and '.join(list(corpora.values())[:2])}): give each a "
                        "folder of its own")
    for called, part in found.items():
        numbers = sorted(part)
        missing = [n for n in range(min(1, *numbers), max(numbers)) if n not in part] if numbers else []
        if missing:
            raise UserError(f"{folder}: {called} shard {missing[0]:06d} is missing, the last one is "
                            f"{part[numbers[-1]].name}: get it, or renumber the files")
        found[called] = {n: part[n] for n in numbers}
    return found


def read_about(folder: Path, first: str) -> dict:
    """What corpus.json says, all four keys of the right type;
    FineWeb's for shards of FineWeb's names without one."""
    path = folder / "corpus.json"
    if not os.path.lexists(path):
        if first.startswith("fineweb_"):
            return dict(GPT2)
        raise UserError(f"{path} is missing, so nothing says which tokens {first} holds: write "
                        f"{files.json_text({**GPT2, 'name': 'NAME'})} there if they are GPT-2's")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(about, dict):
            raise ValueError("not an object")
        for key, like in GPT2.items():
            if key not in about:
                raise ValueError(f"{key} is missing")
            if type(about[key]) is not type(like) or about[key] == "":
                wanted = "text" if isinstance(like, str) else "a whole number"
                raise ValueError(f"{key} is {files.json_text(about[key])}, not {wanted}")
        if not 0 <= about["bos"] < about["vocab_size"] <= 65536:
            raise ValueError("0 <= bos < vocab_size <= 65536 does not hold")
        known = TOKENIZERS.get(about["tokenizer"])
        if known not in (None, (about["vocab_size"], about["bos"])):
            raise ValueError(f"tokenizer {about['tokenizer']} has vocab_size {known[0]} and bos {known[1]}")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {reason}: it must hold name, tokenizer, vocab_size and bos; mend it, or "
                        "make the folder again with `python -m data.tokenize`") from None
    return {key: about[key] for key in GPT2}


def check_vocabulary(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """UserError if any id is outside the vocabulary."""
    highest = int(tokens.max())
    if highest >= vocab_size:
        raise UserError(outside(where, highest, vocab_size))


def outside(where: Path | str, highest: int, vocab_size: int) -> str:
    """The message for a token id that the vocabulary does not hold."""
    return (f"{where}: token id {highest} is outside the vocabulary of {vocab_size}: the shard was made with "
            "another tokenizer; correct corpus.json next to it or choose another --data")


# ----- digests and what only a look at every token finds ----------------------------------------------------

def corpus_digest(corpus: Corpus, shards_used: int) -> str:
    """sha256 over (token count, sha256 of the tokens) of the first shards, in order: content and order,
    not names.

    Every token of these shards and of the validation shard is looked at once: see check_tokens.
    """
    check_tokens(corpus, shards_used)
    digest = hashlib.sha256()
    for path, count in zip(corpus.train[:shards_used], corpus.train_tokens):
        digest.update(f"{count} {shard_facts(path, corpus.bos)['sha256']}\n".encode())
    return digest.hexdigest()


def val_digest(corpus: Corpus, tokens: int) -> str:
    """sha256 of the first tokens + 1 ids of the validation shard:
    the targets that every run is measured on."""
    return hashlib.sha256(open_shard(corpus.val)[:tokens + 1].tobytes()).hexdigest()


def check_tokens(corpus: Corpus, shards_used: int) -> None:
    """UserError for ids outside the vocabulary, holes, files that changed since the download,
    and parts that do not match."""
    manifest = read_manifest(corpus.folder)
    for path in (*corpus.train[:shards_used], corpus.val):
        facts = shard_facts(path, corpus.bos)
        if facts["highest"] >= corpus.vocab_size:
            raise UserError(outside(path, facts["highest"], corpus.vocab_size))
        check_hole(path, facts)
        if 2 * facts["documents"] > read_header(path):
            raise UserError(
                f"{path}: {facts['documents']} of {read_header(path)} tokens are document starts (token "
                f"{corpus.bos}): mend bos in corpus.json, or tokenise the text again")
        expected = manifest.get(path.name, {}).get("tokens_sha256")
        if expected not in (None, facts["sha256"]):
            raise UserError(
                f"{path} is not what was downloaded: run `python -m data.fineweb` again with --verify")
    begun = {
        path: shard_facts(path, corpus.bos)["documents"] for path in (*corpus.train[:shards_used], corpus.val)
    }
    val, train = begun[corpus.val], sum(n for path, n in begun.items() if path != corpus.val)
    if (val == 0) != (train == 0):
        without, other = corpus.train[0], "the validation shard"
        if val == 0:
            without, other = corpus.val, "train shards"
        raise UserError(f"{without}: no document begins here (token {corpus.bos}) but some do in {other}: "
                        "the two were made with different tokenizers; tokenise the text again")
    if not val:
        note_once(f"note: no document begins in {corpus.folder} (token {corpus.bos}): attention sees no "
                  "borders of documents")


def check_hole(path: Path, facts: dict) -> None:
    """UserError for a shard with a stretch of zeros, as a torn download or copy leaves it."""
    if facts["hole"] is not None:
        raise UserError(f"{path}: a hole of zeros at token {facts['hole']}, as a broken download or copy "
                        "leaves it: download or tokenise the shard again")


def read_manifest(folder: Path) -> dict:
    """{file name: facts of a download} of a folder; {} without one or with one that cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in manifest.items() if isinstance(v, dict)} if isinstance(manifest, dict) else {}


def shard_facts(path: Path | str, bos: int) -> dict:
    """sha256 of the tokens, highest id, number of documents (tokens `bos`) and place of the first hole,
    or None.

    Remembered by path, size and time, because a look at 200 MB takes a second.
    """
    about, memory = Path(path).stat(), files.default_cache() / "shard_facts.json"
    key = f"{Path(path).resolve()} {about.st_size} {about.st_mtime_ns} {bos}"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict):  # only a memory: junk in it is forgotten
        known = {}
    facts = known.get(key)
    if not isinstance(facts, dict) or set(facts) != {"sha256", "highest", "documents", "hole"}:
        facts = known[key] = look(path, bos)
        try:
            files.write(memory, files.json_text(known, indent=0), parents=True,
                        remedy="set SPEEDRUN_CACHE to a folder you may write")
        except UserError as error:
            note_once(f"note: what was found in shards is not remembered: {error}")
    return facts


def look(path: Path | str, bos: int) -> dict:
    """The facts of shard_facts, from every token."""
    tokens, digest = open_shard(path), hashlib.sha256()
    facts = {"highest": 0, "documents": 0, "hole": None}
    for start in range(0, len(tokens), LOOK):
        part = np.asarray(tokens[start:start + LOOK])
        digest.update(part)
        facts["highest"] = max(facts["highest"], int(part.max()))
        facts["documents"] += int(np.count_nonzero(part == bos))
        blocks = part[:len(part) // BLOCK * BLOCK].reshape(-1, BLOCK).any(1)
        if facts["hole"] is None and not blocks.all():
            facts["hole"] = start + int(blocks.argmin()) * BLOCK
    return {"sha256": digest.hexdigest(), **facts}


@functools.lru_cache
def note_once(message: str) -> None:
    """Print a note to stderr, once for each text."""
    print(message, file=sys.stderr)
