"""Laws of `data.tokenize`: formats of text, long texts in pieces, the split for validation, what --overwrite
may replace."""

import bz2
import gzip
import importlib.util
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import segments as segments_module
from data.segments import run, segments
from data.shards import open_corpus, open_shard
from data.text import Reader
from data.tokenize import main
from data.tokenizer import encode_documents, load, merges_only
from common.errors import UserError

ROOT = Path(__file__).parent.parent
LINES = "".join(json.dumps({"text": f"document {i} of words"}) + "\n" for i in range(9))
TEXTS = [f"document {i} of words" for i in range(9)]


def tokenize(capsys, *args):
    """(exit code, stdout and stderr) of the command."""
    code = 0
    try:
        main([str(a) for a in args])
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and printed.err.count("\n") <= 3
    return code, printed.out + printed.err


def read(path, **about):
    return ["".join(pieces) for pieces, _ in Reader(path, **about).documents()]


def ids(folder):
    corpus = open_corpus(folder)
    return np.concatenate([open_shard(p) for p in (corpus.val, *corpus.train)]).tolist()


# ----- formats

ARRAY = json.dumps([{"text": t} for t in TEXTS])


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.ndjson", LINES), ("a.json", LINES), ("a.JSONL", LINES), ("a", LINES), ("a.txt", LINES),
        ("blank.jsonl", "\n\n" + LINES.replace("\n", "\n  \n")), ("crlf.jsonl", LINES.replace("\n", "\r\n")),
        ("noend", LINES[:-1]), ("array.json", ARRAY),
        ("array", json.dumps([{"text": t} for t in TEXTS], indent=1)), ("strings.json", json.dumps(TEXTS)),
        ("other_key", LINES.replace('{"', '{"id": 1, "')), ("a.txt", "\n\f\n".join(TEXTS)),
        ("crlf.txt", "\r\n\f\r\n".join(TEXTS)), ("cr.txt", "\r\f\r".join(TEXTS)),
        ("edges.txt", "\f\n" + "\n\f\n\f\n".join(TEXTS) + "\n\f")
    ],
)
def test_the_format_is_found_in_the_content(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("content", [LINES, ARRAY, "\n\f\n".join(TEXTS)])
def test_a_byte_order_mark_is_dropped_and_tells_the_encoding(tmp_path, encoding, content):
    (tmp_path / "a").write_bytes(content.encode(encoding))
    assert read(tmp_path / "a") == TEXTS


@pytest.mark.parametrize(
    "pack",
    [
        gzip.compress, bz2.compress, lzma.compress, lambda b: gzip.compress(bz2.compress(b)),
        lambda b: gzip.compress(b[:50]) + gzip.compress(b[50:])
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a"])
def test_packed_files_are_unpacked_whatever_their_name(tmp_path, pack, name):
    (tmp_path / name).write_bytes(pack(LINES.encode()))
    assert read(tmp_path / name) == TEXTS


ZSTD = next((n for n in ("compression.zstd", "backports.zstd")
             if importlib.util.find_spec(n.split(".")[0]) and importlib.util.find_spec(n)), None)


def test_zst_is_read_or_says_what_to_install(tmp_path):
    if ZSTD is None:
        (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd rest")
        with pytest.raises(UserError, match="reading zst needs backports.zstd"):
            read(tmp_path / "a.zst")
        return
    zstd = importlib.import_module(ZSTD)
    (tmp_path / "a").write_bytes(zstd.compress(LINES[:60].encode()) + zstd.compress(LINES[60:].encode()))
    assert read(tmp_path / "a") == TEXTS
    (tmp_path / "a").write_bytes(zstd.compress(LINES.encode())[:-7])
    with pytest.raises(UserError, match="broken zst data"):
        read(tmp_path / "a")


def test_parquet_is_read_or_says_what_to_install(tmp_path):
    if importlib.util.find_spec("pyarrow") is None:
        (tmp_path / "a").write_bytes(b"PAR1 and more")
        with pytest.raises(UserError, match="reading parquet needs pyarrow"):
            read(tmp_path / "a")
        return
    import pyarrow
    from pyarrow import parquet
    table = pyarrow.table({"text": TEXTS, "n": list(range(9)), "holes": [None, *TEXTS[1:]]})
    parquet.write_table(table, tmp_path / "a", row_group_size=4)
    assert read(tmp_path / "a") == TEXTS
    for field, message in (
        ("body", "no column 'body', the file has text, n, holes"), ("n", "holds int64 instead of text"),
        ("holes", "row 1: no text in column 'holes'")
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "a", field=field)
    (tmp_path / "torn").write_bytes((tmp_path / "a").read_bytes()[:-20])
    with pytest.raises(UserError, match="torn: cannot be read as parquet"):
        read(tmp_path / "torn")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.pdf", b"%PDF-1.7\n", "is a PDF document"),
        ("a.docx", b"PK\x03\x04rest", "is a zip archive"),
        ("a.txt", b"\x89PNG\r\n\x1a\n", "is a PNG image"),
        ("a.db", b"SQLite format 3\0rest", "is an SQLite database"),
        (
            "a", "some text in two bytes each\n".encode("utf-16-le"),
            "UTF-16 text without a byte-order mark.*UTF-16LE"
        ),
        (
            "a", "some text in two bytes each\n".encode("utf-16-be"),
            "UTF-16 text without a byte-order mark.*UTF-16BE"
        ),
        ("a.bin", (20240520).to_bytes(4, "little") + bytes(1020), "is a token shard already"),
        ("a", b"text and\0 zeros", r"is binary data \(a zero byte at byte 8\)"),
        ("a", b"text " * 20_000 + b"\0", "is binary data behind its beginning"),
        ("a.html", b"<!DOCTYPE html><p>no such page", "is HTML or XML"),
        ("a.csv", b"id,text\n1,a\n", "is a table"),
        ("a.parquet", b"not at all", "is named .parquet and is none"),
        ("a.json", b'{\n  "text": "a"\n}\n', "over several lines"),
        ("a", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        ("a.tar", b"name".ljust(257, b"\0") + b"ustar", "is a tar archive"),
        ("a.tar.gz", gzip.compress(b"name".ljust(257, b"\0") + b"ustar"), "is a tar archive"),
        ("a", gzip.compress(LINES.encode() * 50)[:-30], "broken gz data"),
        ("a", lzma.compress(LINES.encode())[:-9], "broken xz data"),
        ("a", b"good " * 100_000 + b"\xff bad", "not UTF-8 text .* at byte 500000"),
        ("a", "ä".encode() * 200_000 + b"\xc3(", "not UTF-8 text .* at byte 400000"),
        ("a", gzip.compress(b"good \xff"), "at byte 5 of the unpacked gz"),
        ("a", b"\xff\xfea\0b", "not UTF-16-LE text .* at byte 4"),
        ("a.jsonl", b"plain text\n", "line 1: not valid JSON .*add --format text"),
        ("a", LINES.encode() + b"{broken\n", "line 10: not valid JSON"),
        ("a", b'{"text": 1' + b"0" * 5000 + b"}", "line 1: not valid"),
        ("a", LINES.encode() + b'{"text": null}\n', "line 10: no text in field 'text' but null"),
        ("a", LINES.encode() + b'{"text": ["a"]}\n', "line 10: no text in field 'text' but a list"),
        ("a", LINES.encode() + b'[1]\n', "line 10: a list instead of an object"),
        (
            "a", b'{"body": "a", "id": 3}\n',
            "line 1: no text in field 'text', the record has body, id: choose one with --field"
        ),
        ("a", b'{"text": "\\ud800"}\n', "line 1: half a surrogate pair"),
        ("a", ARRAY[:-1].encode(), "element 9: not valid JSON .the array does not end"),
        ("a", ARRAY[:-3].encode(), "element 9: not valid JSON"),
        ("a", ARRAY.encode() + b"x", "something follows the array"),
        ("a", ARRAY.replace("}, {", "} {").encode(), "element 1: not valid JSON .no comma"),
        ("a.JSON", b'[{"text": "a"}, 7]', "element 2: a number instead of an object"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "{{Infobox}}\nwiki", "[Illustration]\n\nCHAPTER I", "ORCS are many", "MZ", "BZh is no packer",
        "RIFF raff", '"Yes," he said', "PK", "a {\n b", "[1] a footnote"
    ],
)
def test_text_that_begins_like_something_else_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt") == [text]


def test_a_flag_overrules_the_content(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    assert read(tmp_path / "a.jsonl", format="text") == [LINES.strip()]
    (tmp_path / "b.csv").write_text("a,b\0")
    assert read(tmp_path / "b.csv", format="text") == ["a,b\0"]
    with pytest.raises(UserError, match="not a parquet file"):
        read(tmp_path / "a.jsonl", format="parquet")


@pytest.mark.parametrize(
    "separator, joined, expected",
    [
        ("<|endoftext|>", "one\n<|endoftext|>\ntwo<|endoftext|>", ["one", "two"]),
        ("\n", "one\ntwo\n\nthree", ["one", "two", "three"]),
        ("\n\n", "one\ntwo\n\n\n\nthree\n", ["one\ntwo", "three"]), ("", "one\n\f\ntwo\n", ["one\n\f\ntwo"])
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 2 ** 18])
def test_separators_make_documents(tmp_path, monkeypatch, separator, joined, expected, chunk):
    monkeypatch.setattr("data.text.CHUNK", chunk)
    (tmp_path / "a").write_text(joined)
    assert read(tmp_path / "a", separator=separator) == expected


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("content", [LINES, ARRAY, "\r\n\f\r\n".join(TEXTS), json.dumps(TEXTS, indent=4)])
def test_small_reads_change_nothing(tmp_path, monkeypatch, chunk, content):
    monkeypatch.setattr("data.text.CHUNK", chunk)
    (tmp_path / "a").write_bytes(content.encode("utf-16"))
    assert read(tmp_path / "a") == TEXTS


# ----- long texts in pieces

FRAGMENTS = [
    "word ", "it's", "we'll ", "'''''", "'s", " " * 7, "\n" * 5, " \n ", "\t", "  a", "123", "4567", "!?",
    "—", "日本語の文章", "。", "é", "ñandú", "\u3000", "\x85", "\x1c", "٣٤", "Ⅷ", "👍🏽", "ไทย", "้", "\u0378",
    "^" * 40, "a" * 60, "ab" * 40, "qzx" * 30, "9" * 50, " " * 90, "\n" * 90, "\r\n", "'" * 50, "\u200b", "'",
    "s", "ll"
]


def in_pieces(name, text, step):
    encoding, out = load(name), []
    for part in segments(merges_only(name), (text[i:i + step] for i in range(0, len(text), step))):
        out += part if isinstance(part, list) else encoding.encode_ordinary(part)
    return out


@pytest.mark.parametrize("segment, shortest_run", [(10, 2), (32, 4), (200, 20)])
def test_tokens_of_a_text_in_pieces_are_those_of_the_whole(monkeypatch, segment, shortest_run):
    monkeypatch.setattr(segments_module, "SEGMENT", segment)
    monkeypatch.setattr(segments_module, "RUN", shortest_run)
    monkeypatch.setattr(segments_module, "NEAR", 16)
    generator = random.Random(segment)
    for _ in range(200):
        text = "".join(
            generator.choice(FRAGMENTS) * generator.randint(1, 4) for _ in range(generator.randint(1, 60))
        )
        for name in ("gpt2", "sample"):
            assert in_pieces(name, text, generator.randint(1, 200)) == load(name).encode_ordinary(text), text


@pytest.mark.parametrize("run_of", ["a", "^", "7", "日本", " ", "\n", "\r\n", "zq"])
def test_runs_as_long_as_tiktoken_can_do_give_its_tokens(run_of):
    text = "before" + run_of * (450_000 // len(run_of)) + "after it"
    assert in_pieces("gpt2", text, 50_000) == load("gpt2").encode_ordinary(text)


@pytest.mark.parametrize("run_of", [" ", "\n", "\u3000"])
def test_runs_of_a_million_on_which_tiktoken_panics_give_tokens(run_of):
    parts = in_pieces("gpt2", "before" + run_of * 1_200_000 + "after", 100_000)
    assert load("gpt2").decode(parts) == "before" + run_of * 1_200_000 + "after"
    short = in_pieces("gpt2", "before" + run_of * 12_000 + "after", 100_000)
    assert parts[:100] == short[:100] and parts[-100:] == short[-100:]


def test_a_joint_that_changes_tokens_is_refused_not_written(monkeypatch):
    """Merges whose first choice depends on what comes long after: de, cd, bc, ab in this order."""
    import tiktoken
    monkeypatch.setattr(segments_module, "SEGMENT", 2)
    ranks = {bytes([i]): i for i in range(256)} | {
        pair: 256 + i for i, pair in enumerate((b"de", b"cd", b"bc", b"ab"))
    }
    merges = tiktoken.Encoding("chain", pat_str="(?s:.+)", mergeable_ranks=ranks, special_tokens={})
    assert merges.encode_ordinary("abcd") == [259, 257] and merges.encode_ordinary("abcde") == [97, 258, 256]
    with pytest.raises(UserError, match="cannot be cut into tokens"):
        list(run(merges, segments_module.Source(["abcd", "eeee", "eeeeee"])))


def test_memory_does_not_grow_with_a_document(tmp_path):
    """A document of 14 MB needs at most 40 MiB more than one of 2 MB (at 50 MB it was 689 MiB in all before
    documents were cut)."""
    code = ("import resource, sys; from data.tokenize import main; main(sys.argv[1:]); "
            "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    peaks = []
    for size in (2, 14):
        (tmp_path / "a.txt").write_text(
            "All happy families resemble one another. \n" * (size * 1_000_000 // 43)
        )
        done = subprocess.run(
            [
                sys.executable, "-c", code, str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"),
                "--tokenizer", "sample", "--val-tokens", "1000", "--overwrite"
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) // (1024 * (1024 if sys.platform == "darwin" else 1)))
    assert peaks[1] < peaks[0] + 40


# ----- the command

def test_text_to_shards_and_back(tmp_path, capsys):
    texts = [f"Document {i} says: {'word ' * (i + 3)}" for i in range(60)]
    (tmp_path / "a.txt").write_text("\n\f\n".join(texts))
    code, printed = tokenize(
        capsys, tmp_path / "a.txt", "--out", tmp_path / "out", "--val-tokens", 200, "--shard-tokens", 900
    )
    assert code == 0, printed
    corpus = open_corpus(tmp_path / "out")
    assert ids(tmp_path / "out") == [i for d in encode_documents(load("gpt2"), texts) for i in d]
    assert len(corpus.train) > 1 and corpus.tokenizer == "gpt2" and corpus.name == "text"
    assert set(corpus.train_tokens[:-1]) == {900} and corpus.val_tokens >= 200
    assert open_shard(corpus.train[0])[0] == corpus.bos  # validation ended with a document


def test_a_single_text_is_split_at_the_beginning_of_a_line(tmp_path, capsys):
    text = "".join(f"line {i} of a play\n" for i in range(400))
    (tmp_path / "play.txt").write_text(text)
    about = (tmp_path / "play.txt", "--out", tmp_path / "out", "--val-tokens", 300, "--shard-tokens", 500)
    code, printed = tokenize(capsys, *about)
    assert code == 0 and "1 document: the last 300 tokens, from the beginning of a line on" in printed
    corpus, encoding = open_corpus(tmp_path / "out"), load("gpt2")
    train = np.concatenate([open_shard(p) for p in corpus.train]).tolist()
    val = open_shard(corpus.val).tolist()
    assert train[0] == val[0] == corpus.bos and val.count(corpus.bos) == 1 and len(corpus.train) > 2
    assert encoding.decode(train[1:] + val[1:]) == text.strip() and encoding.decode(val[1:]).startswith(
        "line "
    )
    code, printed = tokenize(capsys, *about[:2], tmp_path / "other", "--val-tokens", 10 ** 6)
    assert code == 2 and "too few for 1000000 validation tokens" in printed
    advised = int(printed.split("--val-tokens ")[1].split()[0])
    # the remedy helps
    assert tokenize(capsys, *about[:2], tmp_path / "other", "--val-tokens", advised)[0] == 0


@pytest.mark.parametrize(
    "content, message", [("\n", "no text"), ("{\"text\": \"short\"}\n", "too few for"), ("", "no text")]
)
def test_too_little_text_is_one_clear_line(tmp_path, capsys, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    code, printed = tokenize(capsys, tmp_path / "a.jsonl", "--out", tmp_path / "out")
    assert code == 2 and message in printed and not (tmp_path / "out").exists()


def test_leftovers_are_left_out_and_a_file_named_twice_is_refused(tmp_path, capsys):
    for name in ("a.jsonl", "a.jsonl~", "._a.jsonl", "Thumbs.db"):
        (tmp_path / name).write_text(LINES)
    args = ("--out", tmp_path / "out", "--val-tokens", 2)
    code, printed = tokenize(capsys, *(tmp_path / n for n in ("a.jsonl", "a.jsonl~", "Thumbs.db")), *args)
    assert code == 0 and printed.count("is left out") == 2
    assert ids(tmp_path / "out").count(50256) == 9
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    code, printed = tokenize(capsys, tmp_path / "a.jsonl", tmp_path / "link.jsonl", *args, "--overwrite")
    assert code == 2 and "are one file" in printed
    code, printed = tokenize(capsys, tmp_path / "._a.jsonl", *args, "--overwrite")
    assert code == 2 and "no files are left" in printed


def test_a_marker_of_documents_left_in_the_text_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one thing\n<|endoftext|>\nanother thing\n" * 9)
    about = (tmp_path / "a.txt", "--val-tokens", 4, "--out")
    code, printed = tokenize(capsys, *about, tmp_path / "out")
    assert code == 0 and "add --separator '<|endoftext|>'" in printed
    code, printed = tokenize(capsys, *about, tmp_path / "split", "--separator", "<|endoftext|>")
    assert code == 0 and "note:" not in printed and ids(tmp_path / "split").count(50256) == 10


# ----- --overwrite: stage, then swap

@pytest.fixture
def made(tmp_path, capsys):
    """A corpus in tmp_path/out, and its bytes."""
    (tmp_path / "a.jsonl").write_text(LINES)
    assert tokenize(capsys, tmp_path / "a.jsonl", "--out", tmp_path / "out", "--val-tokens", 2)[0] == 0
    return contents(tmp_path / "out")


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_overwriting_leaves_nothing_of_the_longer_run_before(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n\f\n".join("word " * 40 + str(i) for i in range(60)))
    args = (tmp_path / "a.txt", "--out", tmp_path / "out", "--val-tokens", 200, "--overwrite")
    assert (
        tokenize(capsys, *args, "--shard-tokens", 300)[0] == 0
        and len(open_corpus(tmp_path / "out").train) > 2
    )
    (tmp_path / "out" / ".DS_Store").write_text("x")
    assert (
        tokenize(capsys, *args, "--shard-tokens", 5000)[0] == 0
        and len(open_corpus(tmp_path / "out").train) == 1
    )
    code, printed = tokenize(capsys, *args, "--name", "other")
    assert code == 2 and "holds another corpus" in printed and len(open_corpus(tmp_path / "out").train) == 1
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    "new, message",
    [
        ("missing.jsonl", "there is no such file"), ("bad.jsonl", "line 10: not valid JSON"),
        ("short.txt", "too few for"), ("scan.pdf", "is a PDF document")
    ],
)
def test_the_old_corpus_stays_when_the_new_one_fails(tmp_path, capsys, made, new, message):
    (tmp_path / "bad.jsonl").write_text(LINES + "{broken")
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "scan.pdf").write_bytes(b"%PDF-1.7")
    code, printed = tokenize(
        capsys, tmp_path / new, "--out", tmp_path / "out", "--val-tokens", 2, "--overwrite"
    )
    assert code == 2 and message in printed
    assert contents(tmp_path / "out") == made and not leftovers(tmp_path)


def test_a_full_disk_and_an_interrupted_swap_leave_the_old_corpus(tmp_path, capsys, monkeypatch, made):
    args = (tmp_path / "a.jsonl", "--out", tmp_path / "out", "--val-tokens", 2, "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(
            "os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        code, printed = tokenize(capsys, *args)
    assert code == 2 and "No space left on device" in printed and contents(tmp_path / "out") == made
    rename, calls = os.rename, []

    def interrupted(a, b):
        calls.append(b)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", interrupted)
        code, printed = tokenize(capsys, *args)
    assert code == 130 and contents(tmp_path / "out") == made and not leftovers(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_old_corpus_and_no_half_made_one(tmp_path, made, number):
    (tmp_path / "long.txt").write_text("All happy families resemble one another. \n" * 500_000)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "data.tokenize", str(tmp_path / "long.txt"), "--out", str(tmp_path / "out"),
            "--overwrite"
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not leftovers(tmp_path) and process.poll() is None:  # until it is in the middle of its work
        time.sleep(0.01)
    process.send_signal(number)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "nothing was changed" in printed and "Traceback" not in printed
    assert contents(tmp_path / "out") == made and not leftovers(tmp_path)


def test_pipes_devices_and_folders_are_refused_without_waiting(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "is a pipe or a device"), ("/dev/null", "is a pipe or a device"),
        (tmp_path, "is a folder: name the files in it"), (tmp_path / "none", "there is no such file")
    ):
        code, printed = tokenize(capsys, path, "--out", tmp_path / "out")
        assert code == 2 and message in printed


@pytest.mark.parametrize("foreign", ["notes.txt", "thesis.docx", ".git", "text_train_1.bin", "folder"])
def test_a_folder_with_foreign_files_is_refused(tmp_path, capsys, made, foreign):
    path = tmp_path / "out" / foreign
    path.mkdir() if foreign in (".git", "folder") else path.write_text("mine")
    code, printed = tokenize(
        capsys, tmp_path / "a.jsonl", "--out", tmp_path / "out", "--val-tokens", 2, "--overwrite"
    )
    assert code == 2 and f"holds what is not of a corpus ({foreign})" in printed and path.exists()


def test_without_overwrite_nothing_is_replaced(tmp_path, capsys, made):
    code, printed = tokenize(capsys, tmp_path / "a.jsonl", "--out", tmp_path / "out", "--val-tokens", 2)
    assert code == 2 and "add --overwrite" in printed and contents(tmp_path / "out") == made
    code, printed = tokenize(capsys, tmp_path / "a.jsonl", "--out", tmp_path / "a.jsonl", "--val-tokens", 2)
    assert code == 2 and "is a file" in printed


def test_a_mount_point_is_refused_before_the_work(tmp_path, capsys, monkeypatch, made):
    monkeypatch.setattr("os.path.ismount", lambda path: path == str(tmp_path / "out"))
    code, printed = tokenize(
        capsys, tmp_path / "a.jsonl", "--out", tmp_path / "out", "--val-tokens", 2, "--overwrite"
    )
    assert code == 2 and f"is a mount point: choose a folder in it, like {tmp_path}/out/text" in printed


def test_a_link_to_the_folder_stays_a_link(tmp_path, capsys, made):
    (tmp_path / "link").symlink_to("out")
    args = ("--out", tmp_path / "link", "--val-tokens", 20, "--overwrite")
    assert tokenize(capsys, tmp_path / "a.jsonl", *args)[0] == 0
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "out") != made


def test_a_name_that_would_mix_up_the_parts_is_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    for name in ("my_val_set", "a_train", "a/b", "", "-x", "a b"):
        code, printed = tokenize(capsys, tmp_path / "a.txt", "--out", tmp_path / "out", f"--name={name}")
        assert code == 2 and "choose a plain one" in printed
