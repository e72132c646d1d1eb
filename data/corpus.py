"""The embedded corpus for CPUs: English text (sample/README.md says whose), a vocabulary of 1,257 tokens.

Its documents are short on purpose: lengths, in units of the scaled maximum document length (2048 / 16 = 128
tokens), are drawn like FineWeb's, so that loaders which pack or cut documents waste little.
"""

import functools
import hashlib
import lzma
import os
import random
import re
import shutil
import tempfile
from pathlib import Path

from common import files
from common.errors import UserError
from common.files import default_cache
from data import fineweb
from data.shards import Corpus, open_corpus, open_shard, write_shard
from data.tokenizer import encode_documents, load
from settings import Settings
from settings.scales import SCALES

HERE = Path(__file__).parent
SALT = "speedrun sample v1"  # order and split depend on this and the text only
VALIDATION_CHARACTERS = 250_000
# FineWeb sample-10BT: about 14.9 M documents in 10.26 B tokens, so 690 tokens on average; the median of about
# 400 is an estimate. A log-normal with these two in units of 2048 tokens, here of 128.
MEDIAN_TOKENS, SIGMA = 400 / 16, 1.04
DIGESTS = {"train": "a117429a85abd6decb842f6cfb2975db55250324daf9265f9cc5fb0658f8eeeb",
           "val": "1e24ce4ea45767dd70d05a1050dda387aee62b8c87a92fdb5c91577ef4666fe3"}


def source_documents() -> tuple[list[str], list[str]]:
    """(validation, train): lists of source texts in the order of their salted hashes.

    A paragraph of 40 or more characters is kept only where it comes first.
    """
    text = lzma.decompress((HERE / "sample" / "corpus.txt.xz").read_bytes()).decode("utf-8")
    documents = sorted(text.split("\n\f\n"), key=lambda t: hashlib.sha256((SALT + t).encode()).digest())
    seen, cleaned = set(), []
    for document in documents:
        paragraphs = []
        for paragraph in document.strip().split("\n\n"):
            if len(paragraph) >= 40 and paragraph in seen:
                continue
            seen.add(paragraph)
            paragraphs.append(paragraph)
        if paragraphs:
            cleaned.append("\n\n".join(paragraphs))
    validation = []
    while sum(map(len, validation)) < VALIDATION_CHARACTERS:
        validation.append(cleaned.pop(0))
    return validation, cleaned


def cut(document: str, generator: random.Random, characters_per_token: float) -> list[str]:
    """Pieces of a source document, cut at a paragraph's end near the drawn length, or at a sentence's end.

    generator: draws the lengths.
    """
    pieces, current = [], ""
    target = generator.lognormvariate(0, SIGMA) * MEDIAN_TOKENS * characters_per_token
    for paragraph in document.split("\n\n"):
        sentences = re.split(r"(?<=[.!?;:]) +", paragraph)
        for i, sentence in enumerate(sentences):
            current += (" " if current and i else "") + sentence
            ends_paragraph = i == len(sentences) - 1
            if len(current) >= target or (ends_paragraph and len(current) >= target / 2):
                pieces.append(current)
                current = ""
                target = generator.lognormvariate(0, SIGMA) * MEDIAN_TOKENS * characters_per_token
        if current:
            current += "\n\n"
    if current.strip():
        pieces.append(current.strip())
    return pieces


def documents() -> tuple[list[str], ...]:
    """(validation, train): the documents of the corpus, in order."""
    generator = random.Random(SALT)
    return tuple([piece for text in part for piece in cut(text, generator, 2.9)]
                 for part in source_documents())


def sample_corpus(cache: Path | str | None = None) -> Corpus:
    """The embedded corpus as shards in `cache`/sample-v1, made on first use (seconds;
    several processes may race)."""
    return _sample_corpus(Path(cache or default_cache()))


@functools.lru_cache
def _sample_corpus(cache: Path) -> Corpus:
    folder = cache / "sample-v1"
    if not (folder / "corpus.json").exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=cache))
        except OSError as error:
            raise UserError(
                f"cannot write the cache folder {cache}: {error.strerror}; set SPEEDRUN_CACHE to a folder "
                "you may write") from None
        try:
            build(temporary)
            temporary.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
            os.rename(temporary, folder)
        except OSError as error:
            # otherwise another process was first, with the same bytes
            if not (folder / "corpus.json").exists():
                raise UserError(f"cannot write {folder}: {error.strerror}; set SPEEDRUN_CACHE to another "
                                "folder") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    corpus = open_corpus(folder)
    for part, path in (("train", corpus.train[0]), ("val", corpus.val)):
        if hashlib.sha256(open_shard(path)).hexdigest() != DIGESTS[part]:
            raise UserError(
                f"{path} does not hold the tokens it should: delete {folder} and start again; if this "
                "comes back, tiktoken is not the pinned version")
    return corpus


def corpus_for(scale: str, data: Path | str | None = None, settings: Settings | None = None) -> Corpus:
    """The shards that a run reads: the folder `data` if given, the embedded corpus at the scales for a
    CPU, FineWeb's otherwise.

    settings: those of the run, for a message that says how many shards to download.
    """
    if data:
        return open_corpus(data)
    if SCALES[scale].embedded:
        return sample_corpus()
    return open_corpus(HERE / "fineweb10B", **({} if settings is None else {"get": fineweb.get(settings)}))


def build(folder: Path) -> None:
    """Write the shards and corpus.json into an existing folder."""
    encoding = load("sample")
    for part, name, texts in zip(("val", "train"), ("sample_val_000000.bin", "sample_train_000001.bin"),
                                 documents()):
        write_shard(folder / name, [i for ids in encode_documents(encoding, texts) for i in ids])
    about = {
        "name": "sample", "tokenizer": "sample", "vocab_size": encoding.n_vocab, "bos": encoding.eot_token
    }
    files.write(folder / "corpus.json", files.json_text(about) + "\n")
