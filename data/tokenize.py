"""Text or jsonl -> shards: `python -m data.tokenize FILE... --out DIR [--tokenizer gpt2|sample]`.

A .jsonl file holds one document per line in `--field`; any other file holds documents separated by a line with a form
feed between two line breaks, or is one document. The first documents become the validation shard.
"""

import environment  # first: refuses a Python that is too old

import argparse
import array
import json
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    environment.require("numpy", "tiktoken")

from data.shards import write_shard
from data.tokenizer import FILES, encode_documents, load
from settings import UserError


def documents(path, field):
    """Yield the texts of a file, one document at a time."""
    try:
        with open(path, encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    yield from json_document(line, field, f"{path}, line {number}")
            else:
                lines = []
                for line in file:
                    if line == "\f\n":
                        yield "".join(lines).strip("\n")
                        lines = []
                    else:
                        lines.append(line)
                yield "".join(lines).strip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def json_document(line, field, where):
    if not line.strip():
        return
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}): mend or remove the line") from None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        raise UserError(f"{where}: no text in field {field!r}: choose another with --field")
    yield record[field]


def batches(texts, characters=4_000_000):
    """Group texts so that tiktoken encodes several at once while memory stays bounded."""
    batch, size = [], 0
    for text in texts:
        if text:
            batch.append(text)
            size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def prepare(out, name, overwrite):
    """Make the output folder. UserError unless it is empty or, with overwrite, holds no other corpus.

    Shards left over from an earlier, longer run would be read as part of the new corpus, so they are removed.
    """
    if not name or "/" in name or "_train_" in name + "_" or "_val_" in name + "_":
        raise UserError(f"--name {name!r}: shards are found by _train_ and _val_ in their names, choose a plain one")
    try:
        if out.is_dir() and any(out.iterdir()) and not overwrite:
            raise UserError(f"{out} is not empty: choose another --out, or add --overwrite")
        out.mkdir(parents=True, exist_ok=True)
        for path in [p for part in ("train", "val") for p in out.glob(f"*_{part}_*.bin")]:
            if not re.fullmatch(re.escape(name) + r"_(train|val)_\d{6}\.bin", path.name):
                raise UserError(f"{out} holds another corpus ({path.name}): choose another --out")
        for path in [*out.glob("*_train_*.bin"), *out.glob("*_val_*.bin"), out / "corpus.json"]:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


def tokenize(paths, out, *, tokenizer="gpt2", name="text", field="text", val_tokens, shard_tokens):
    """Write shards and corpus.json into `out`; returns (validation tokens, train shards).

    The validation shard is written last: a folder that is not finished has none and is refused by open_corpus.
    """
    encoding = load(tokenizer)
    texts = (text for path in paths for text in documents(Path(path), field))
    pending, total, shards, val = array.array("H"), 0, 0, None  # two bytes a token: a shard in memory at most

    def flush():
        nonlocal pending, shards
        shards += 1
        write_shard(out / f"{name}_train_{shards:06d}.bin", pending[:shard_tokens])
        pending = pending[shard_tokens:]

    for batch in batches(texts):
        for ids in encode_documents(encoding, batch):
            pending.extend(ids)
            if val is None and len(pending) >= val_tokens:  # whole documents: none is in both parts
                val, pending = pending, array.array("H")
        total += len(batch)
        while val is not None and len(pending) >= shard_tokens:
            flush()
        print(f"\r{total} documents, {shards} full train shards", end="", file=sys.stderr)
    print(file=sys.stderr)
    if total == 0:
        raise UserError(f"no text in {', '.join(map(str, paths))}: give files that hold some")
    if val is None or (not pending and shards == 0):
        raise UserError(f"the text has too few tokens for {val_tokens} validation tokens and some training: "
                        "lower --val-tokens")
    if pending:
        flush()
    about = {"name": name, "tokenizer": tokenizer, "vocab_size": encoding.n_vocab, "bos": encoding.eot_token}
    try:
        (out / "corpus.json").write_text(json.dumps(about) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {out / 'corpus.json'}: {error.strerror}") from None
    write_shard(out / f"{name}_val_000000.bin", val)
    return len(val), shards


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m data.tokenize", description="Tokenise text or jsonl into shards.")
    p.add_argument("files", nargs="+", metavar="FILE")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--tokenizer", choices=list(FILES), default="gpt2")
    p.add_argument("--name", default="text", help="prefix of the shard files")
    p.add_argument("--field", default="text", help="field of jsonl documents")
    p.add_argument("--val-tokens", type=int, default=10_485_761, help="at least so many validation tokens")
    p.add_argument("--shard-tokens", type=int, default=100_000_000)
    p.add_argument("--overwrite", action="store_true", help="replace the shards of this --name in the folder")
    o = p.parse_args(argv)
    try:
        out = Path(o.out)
        if o.val_tokens < 2 or o.shard_tokens < 2:
            raise UserError("--val-tokens and --shard-tokens must be at least 2")
        prepare(out, o.name, o.overwrite)
        val, shards = tokenize(o.files, out, tokenizer=o.tokenizer, name=o.name, field=o.field, val_tokens=o.val_tokens,
                               shard_tokens=o.shard_tokens)
        print(f"{out}: {val} validation tokens, {shards} train shard{'s' if shards > 1 else ''}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again with --overwrite", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
