"""Text -> shards: `python -m data.tokenize FILE... --out DIR [--tokenizer gpt2|sample]`.

Files are text, JSON lines, JSON arrays or parquet, also packed (data/text.py). A text file holds documents
separated by `--separator`, by default a line with nothing but a form feed, so a file without one is one
document. The first documents become the validation shard; of a text that is too short for that, like a single
document, its last tokens do.
"""

from common import environment  # first: refuses a Python that is too old

import contextlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":
    environment.require("numpy", "tiktoken")

import numpy as np

from common import arguments, console, files
from data.segments import segments
from data.shards import open_corpus, open_shard, write_shard, writing_shard
from data.text import FORMATS, Reader
from data.tokenizer import FILES, load, merges_only
from common.errors import UserError

BATCH = 1_000_000  # characters that are encoded at once
END_OF_TEXT = "<|endoftext|>"
SHARD_NAME = re.compile(r"(.+)_(?:train|val)_\d{6,}\.bin")
JUNK = (".DS_Store", *files.LEFTOVERS)  # what file managers leave in a folder


def token_ids(readers: Iterable[Reader], tokenizer: str) -> Iterator[tuple[bool, np.ndarray]]:
    """(whether a document begins, token ids) of parts of documents, in order;
    documents begin with <|endoftext|>."""
    encoding, merges = load(tokenizer), merges_only(tokenizer)
    batch, size, marked = [], 0, False

    def encoded():
        texts = iter(
            encoding.encode_ordinary_batch(
                [part for _, part in batch if isinstance(part, str)], num_threads=2
            )
        )
        for begins, part in batch:
            ids = next(texts) if isinstance(part, str) else part
            yield begins, np.array([encoding.eot_token, *ids] if begins else ids, np.uint16)

    for reader in readers:
        for pieces, where in reader.documents():
            begins = True
            try:
                for part in segments(merges, pieces):
                    if reader.format == "text" and not marked and END_OF_TEXT in part:
                        marked = True
                        print(f"note: {where} holds {END_OF_TEXT!r} as text: if it separates documents, add "
                              f"--separator '{END_OF_TEXT}'", file=sys.stderr)
                    batch.append((begins, part))
                    size += len(part)
                    begins = False
                    if size >= BATCH:
                        yield from encoded()
                        batch, size = [], 0
            except UserError as error:
                raise UserError(
                    str(error) if str(error).startswith(str(reader.path)) else f"{where}: {error}") from None
    yield from encoded()


class Writer:
    """Writes the validation shard, whole documents first, then train shards, into a folder."""

    def __init__(self, folder: Path, name: str, val_tokens: int, shard_tokens: int) -> None:
        self.folder, self.name, self.val_tokens, self.shard_tokens = folder, name, val_tokens, shard_tokens
        # validation tokens, documents and train shards so far
        self.val, self.documents, self.shards = 0, 0, 0
        self.open, self.held = contextlib.ExitStack(), None

    def path(self, part: str, number: int) -> Path:
        return self.folder / f"{self.name}_{part}_{number:06d}.bin"

    def begin(self, path: Path | None) -> None:
        """End the shard that is open and begin another one, or none."""
        self.open.close()
        self.held = None if path is None else self.open.enter_context(writing_shard(path))

    def add(self, begins: bool, ids: np.ndarray) -> None:
        """Add ids. Validation ends with a document, so that no document is in both parts."""
        self.documents += begins
        if self.held is None:
            self.begin(self.path("val", 0))
        if self.shards == 0:
            if not (begins and self.val >= self.val_tokens):
                self.held.append(ids)
                self.val += len(ids)
                return
            self.next_shard()
        while len(ids):
            if self.held.count == self.shard_tokens:
                self.next_shard()
            some = ids[:self.shard_tokens - self.held.count]
            self.held.append(some)
            ids = ids[len(some):]

    def next_shard(self) -> None:
        self.shards += 1
        self.begin(self.path("train", self.shards))


def split_last(writer: Writer, tokenizer: str) -> None:
    """Train shards from the beginning of the validation shard, which holds all there is;
    its last tokens stay validation.

    The border lies val_tokens before the end, or at the beginning of that line if it begins within an eighth
    more.
    """
    encoding, path, total = load(tokenizer), writer.path("val", 0), writer.val
    least = writer.val_tokens
    if total < least + 2:
        advice = (f"add --val-tokens {total // 10} (a tenth), or more text"
                  if total >= 40 else "give more text")
        raise UserError(
            f"the text has {total} tokens, too few for {least} validation tokens and some training: {advice}")
    tokens, eot = open_shard(path), encoding.eot_token
    at = total - least
    breaks = [
        i for i in range(at, max(2, at - least // 8) - 1, -1)
        if tokens[i] == eot or encoding.decode_single_token_bytes(int(tokens[i - 1])).endswith(b"\n")
    ][:1]
    border = breaks[0] if breaks else at
    for start in range(0, border, writer.shard_tokens):
        end = min(border, start + writer.shard_tokens)
        writer.shards += 1
        with writing_shard(writer.path("train", writer.shards)) as shard:
            for part in range(start, end, BATCH):
                shard.append(tokens[part:min(end, part + BATCH)])
    last = np.array(tokens[border:])
    write_shard(path, last if last[0] == eot else [eot, *last])
    writer.val = total - border + int(last[0] != eot)
    print(
        f"note: {writer.documents} document{'s' if writer.documents > 1 else ''}: the last {len(last)} "
        f"tokens, from {'the beginning' if breaks else 'the middle'} of a line on, are the validation shard",
        file=sys.stderr
    )


def tokenize(readers: list[Reader], folder: Path, *, tokenizer: str = "gpt2", name: str = "text",
             val_tokens: int, shard_tokens: int) -> tuple[int, int]:
    """Write shards and corpus.json into an empty folder; returns (validation tokens, train shards)."""
    writer, progress = Writer(folder, name, val_tokens, shard_tokens), sys.stderr.isatty()
    with writer.open:
        for begins, ids in token_ids(readers, tokenizer):
            writer.add(begins, ids)
            if progress and begins and writer.documents % 1000 == 1:
                print(f"\r{writer.documents} documents, {max(0, writer.shards - 1)} full train shards",
                      end="", file=sys.stderr)
    if progress:
        print(f"\r{writer.documents} documents" + " " * 30, file=sys.stderr)
    if writer.documents == 0:
        raise UserError(
            f"no text in {', '.join(str(r.path) for r in readers[:5])}: give files that hold some")
    if writer.shards == 0:
        split_last(writer, tokenizer)
    encoding = load(tokenizer)
    about = {"name": name, "tokenizer": tokenizer, "vocab_size": encoding.n_vocab, "bos": encoding.eot_token}
    files.write(folder / "corpus.json", files.json_text(about) + "\n")
    return writer.val, writer.shards


# ----- the output folder ------------------------------------------------------------------------------------

def check_output(out: Path, name: str, overwrite: bool) -> None:
    """UserError unless the output folder may be made: it is missing or empty,
    or holds what `overwrite` may replace."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*",
                        name) or "_train_" in name + "_" or "_val_" in name + "_":
        raise UserError(
            f"--name {name!r}: shards are found by _train_ and _val_ in their names, choose a plain one of "
            "letters and digits")
    try:
        if not out.exists():
            return
        if not out.is_dir():
            raise UserError(f"{out} is a file: choose another --out")
        if os.path.ismount(os.path.realpath(out)):  # it could not be renamed when the new corpus is whole
            raise UserError(f"{out} is a mount point: choose a folder in it, like {out / name}")
        held = [p for p in out.iterdir() if not (p.name in JUNK or p.name.startswith("._"))]
        foreign = [
            p for p in held if p.is_dir() or not (p.name == "corpus.json" or SHARD_NAME.fullmatch(p.name))
        ]
        others = [p for p in held if (m := SHARD_NAME.fullmatch(p.name)) and m[1] != name]
    except OSError as error:
        raise UserError(f"cannot read {out}: {error.strerror}; choose another --out") from None
    if foreign:
        raise UserError(f"{out} holds what is not of a corpus ({min(foreign).name}): choose another --out")
    if others:
        raise UserError(f"{out} holds another corpus ({min(others).name}): choose another --out, or --name "
                        f"{SHARD_NAME.fullmatch(min(others).name)[1]} to replace it")
    if held and not overwrite:
        raise UserError(f"{out} is not empty: choose another --out, or add --overwrite")


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder next to `out` that takes its place when the block ends; what was there stays until then.

    If the block raises, `out` is as before. The swap is two renames; if the second fails the first is undone.
    """
    out = Path(os.path.realpath(out))  # a link stays a link
    # named before it is made, so that it is removed
    stage = out.with_name(f".{out.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
        yield stage
        if out.exists():
            stage.chmod(out.stat().st_mode & 0o7777)
            old = stage.with_suffix(".old")
            os.rename(out, old)
            try:
                os.rename(stage, out)
            except BaseException:
                os.rename(old, out)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(stage, out)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror or error}; free some space or choose another --out"
        ) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def inputs(paths: list[str], format: str, field: str, separator: str) -> list[Reader]:
    """A Reader for each file; every file is opened and its format known before anything is tokenised."""
    found, seen = [], {}
    for path in map(Path, paths):
        if files.is_leftover(path):
            print(f"note: {path} is left out: its name is that of a system's or an editor's leftover",
                  file=sys.stderr)
            continue
        found.append(Reader(path, format, field, separator))
        about = path.stat()
        first = seen.setdefault((about.st_dev, about.st_ino), path)
        if first is not path:
            raise UserError(f"{path} and {first} are one file: its text would be in the corpus twice")
    if not found:
        raise UserError("no files are left: name others, or rename them")
    return found


def unescaped(separator: str) -> str:
    """A separator as typed, with \\n, \\r, \\t, \\f and \\\\ for the characters they stand for."""
    stands = {"n": "\n", "r": "\n", "t": "\t", "f": "\f", "\\": "\\"}  # CR line ends are LF here
    return re.sub(r"\\(.)", lambda m: stands.get(m[1], m[0]), separator).replace("\r\n", "\n")


def parser() -> arguments.Parser:
    """Options of `python -m data.tokenize`."""
    p = arguments.Parser(prog="python -m data.tokenize", description="Tokenise text into shards.")
    p.add_argument("files", nargs="+", metavar="FILE",
                   help="text, JSON lines, a JSON array or parquet; gz, zst, xz, bz2 too")
    p.add_argument("--out", required=True, metavar="DIR",
                   help="folder of the shards, a new or empty one; then train with --data DIR")
    p.add_argument("--tokenizer", choices=list(FILES), default="gpt2",
                   help="gpt2 (default): as FineWeb's shards, for the scales full and small; sample: the "
                   "embedded corpus's small vocabulary, for tiny, mini and micro")
    p.add_argument("--name", default="text", help="prefix of the shard files (default text)")
    p.add_argument("--format", choices=FORMATS, default="auto",
                   help="of the files (default: found in their content)")
    p.add_argument("--field", default="text",
                   help="field or column of the text in JSON and parquet (default text)")
    p.add_argument(
        "--separator", default=r"\n\f\n", metavar="STRING",
        help=r"between the documents of a text file, default '\n\f\n' (a line with a form feed); '\n' makes "
        r"a document of each line, '\n\n' ends documents at blank lines, '' makes one of each file"
    )
    p.add_argument("--val-tokens", type=arguments.integer(2, 10 ** 12), default=10_485_761,
                   help="at least so many validation tokens (default 10485761)")
    p.add_argument("--shard-tokens", type=arguments.integer(2, 2 ** 31 - 1), default=100_000_000,
                   help="tokens of a train shard (default 100000000)")
    p.add_argument("--overwrite", action="store_true",
                   help="replace the corpus of this --name in the folder, when the new one "
                   "is whole")
    return p


def main(argv: list[str] | None = None) -> None:
    """The command line of the tokenizer."""
    o = parser().parse_args(argv)
    try:
        out = Path(o.out)
        check_output(out, o.name, o.overwrite)
        readers = inputs(o.files, o.format, o.field, unescaped(o.separator))
        with staged(out) as folder:
            val, shards = tokenize(readers, folder, tokenizer=o.tokenizer, name=o.name,
                                   val_tokens=o.val_tokens, shard_tokens=o.shard_tokens)
            open_corpus(folder)
        print(f"{out}: {val} validation tokens, {shards} train shard{'s' if shards > 1 else ''}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was changed; run the same command again", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    console.program(main)
