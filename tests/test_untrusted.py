"""Laws of reading what others wrote: trees without links, devices and odd names, bounded readers, outputs
that nothing redirects; and `records verify` on claims that were bent in these ways."""

import json
import lzma
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runlog
from claim_builder import claim, command, good
from common import untrusted
from common.errors import UserError
from evidence import verify, writeup
from fuzz_claims import fuzzed

ROOT = Path(__file__).parent.parent
FEW = untrusted.Limits(entries=50, depth=5, file=1000, total=3000)


@pytest.fixture
def tree(tmp_path):
    """A small good tree."""
    (tmp_path / "tree/runs/a").mkdir(parents=True)
    (tmp_path / "tree/runs/a/run.jsonl").write_text("{}\n")
    (tmp_path / "tree/record.toml").write_text("a = 1\n")
    return tmp_path / "tree"


# ----- trees ------------------------------------------------------------------------------------------------

def many_files(tree):
    for i in range(60):
        (tree / f"f{i}").touch()


def deep_folders(tree):
    (tree / "/".join("d" * 30)).mkdir(parents=True)


def hard_link(tree):
    (tree.parent / "private").write_text("secret")
    os.link(tree.parent / "private", tree / "log.txt")


def a_socket(tree):
    where = os.getcwd()
    os.chdir(tree)  # a socket's path may have 100 characters only
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("s")
    finally:
        os.chdir(where)


def a_device(tree):
    try:
        os.mknod(tree / "disk", 0o600 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root makes devices")


BENDS = {
    "link to a file": (lambda t: (t / "README.md").symlink_to("/etc/hosts"), "README.md: is a symbolic link"),
    "link to nothing": (lambda t: (t / "results.json.tmp").symlink_to(t.parent / "x"), "is a symbolic link"),
    "link to a folder": (lambda t: (t / "runs/b").symlink_to("/etc"), "runs/b: is a symbolic link"),
    "link to zeros": (lambda t: (t / "log.txt").symlink_to("/dev/zero"), "is a symbolic link"),
    "circle": (lambda t: (t / "runs/up").symlink_to(".."), "is a symbolic link"),
    "pipe": (lambda t: os.mkfifo(t / "runs/a/log.txt"), "runs/a/log.txt: is a pipe"),
    "socket": (a_socket, "s: is a socket"),
    "device": (a_device, "disk: is a device"),
    "hard link": (hard_link, "log.txt: has another name outside"),
    "many files": (many_files, "holds more than 50 files"),
    "deep": (deep_folders, "lies deeper than 5 folders"),
    "large": (lambda t: (t / "big").write_bytes(b"1" * 1001), "big: has 1001 bytes, allowed are 1000"),
    "large sum": (lambda t: [(t / f"{i}").write_bytes(b"1" * 900) for i in range(4)], "more than 3000 bytes"),
    "sparse": (lambda t: os.truncate((t / "big").open("wb").name, 2 ** 40), "big: has"),
    "line end": (lambda t: (t / "a\nb").touch(), r"a\nb: has a name with characters"),
    "escape code": (lambda t: (t / "\x1b[31mred").touch(), r"\x1b[31mred: has a name with characters"),
    "direction": (lambda t: (t / "a\u202etxt").touch(), r"a\u202etxt: has a name with characters"),
    "no UTF-8": (lambda t: open(os.fsencode(t) + b"/a\xff", "wb").close(), r"a\udcff: has a name with"),
    "backslash": (lambda t: (t / "..\\x").touch(), "has a name that not every system can store"),
    "colon": (lambda t: (t / "log.txt:x").touch(), "has a name that not every system can store"),
    "space": (lambda t: (t / "log.txt ").touch(), "has a name that not every system can store"),
    "case": (lambda t: (t / "RECORD.toml").touch(), "has the name of 'RECORD.toml' on many systems"),
}


@pytest.mark.parametrize("bend, why", BENDS.values(), ids=BENDS)
def test_what_is_no_plain_tree_is_refused_before_a_file_is_opened(bend, why, tree, monkeypatch):
    seen = {entry.path for entry in untrusted.survey(tree, FEW)}
    assert seen == {"record.toml", "runs", "runs/a", "runs/a/run.jsonl"}
    bend(tree)
    monkeypatch.setattr(untrusted, "blocks", pytest.fail)
    for looked in (lambda: untrusted.survey(tree, FEW), lambda: untrusted.copied(tree, FEW).__enter__()):
        with pytest.raises(UserError) as error:
            looked()
        assert why in str(error.value) and str(error.value).isprintable()


def test_a_hard_link_inside_the_tree_is_a_file(tree):
    os.link(tree / "record.toml", tree / "twin.toml")
    assert len(untrusted.survey(tree, FEW)) == 5


def test_very_many_files_are_given_up_early(tree, monkeypatch):
    """A folder with a million names costs no more than its limit."""
    class Endless:
        def __enter__(self):
            return (type("Entry", (), {"name": f"f{i}"}) for i in range(10 ** 6))

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", lambda handle: Endless())
    with pytest.raises(UserError, match="holds more than 20000 files"):
        untrusted.survey(tree)


def test_a_copy_is_private_and_equal(tree):
    with untrusted.copied(tree) as copy:
        assert copy.name == tree.name and copy.parent.name == tree.parent.name and copy != tree
        assert (copy / "runs/a/run.jsonl").read_text() == "{}\n"
        assert copy.parent.parent.stat().st_mode & 0o077 == 0
        kept = copy
    assert not kept.exists()


@pytest.mark.parametrize("swap, why", [
    (lambda path: path.symlink_to("/etc/passwd"), "is a symbolic link"),
    (os.mkfifo, "is a pipe"),
    (lambda path: path.write_bytes(b"1" * 10 ** 6), "has more than"),
    (lambda path: path.mkdir(), "is a folder"),
], ids=["link", "pipe", "larger file", "folder"])
def test_a_file_exchanged_after_the_look_is_refused(swap, why, tree, monkeypatch):
    """Between the look and the reading the submitter puts something else in the file's place."""
    def late(name, where, holder=None):
        if name == "record.toml":
            (tree / name).unlink()
            swap(tree / name)
        return opened(name, where, holder)

    opened = untrusted.opened
    monkeypatch.setattr(untrusted, "opened", late)
    with pytest.raises(UserError, match=why):
        untrusted.copied(tree).__enter__()


# ----- readers ----------------------------------------------------------------------------------------------

JSON = {
    "huge integer": ("[" + "9" * 100_000 + "]", "too long or not finite"),
    "long float": ("[0." + "1" * 100 + "]", "too long"),
    "infinite": ("[1e999]", "not finite"),
    "deep lists": ("[" * 100_000 + "]" * 100_000, "nests deeper"),
    "deep tables": ('{"a":' * 100 + "1" + "}" * 100, "nests deeper"),
    "unclosed": ("[" * 100_000, "nests deeper"),
    "twice": ('{"a": 1, "a": 2}', "the key 'a' twice"),
    "twice inside": ('[{"b": {"a": 1, "\\u0061": 2}}]', "the key 'a' twice"),
    "NaN": ("[NaN]", "holds NaN"),
    "Infinity": ("[-Infinity]", "holds -Infinity"),
    "lone surrogate": ('["\\ud800"]', r"the character \ud800"),
    "escape code": ('["\\u001b[31m"]', r"the character \x1b"),
    "line end": ('["a\\nb"]', r"the character \n"),
    "in a key": ('{"\\u0007": 1}', r"the character \x07"),
    "direction": ('["\u202e"]', r"the character \u202e"),
    "C1": ('["\\u009b31m"]', r"the character \x9b"),
    "long text": (json.dumps("x" * 200_000), "a text of 200000 characters"),
    "empty": ("", "is not JSON"),
    "cut": ('{"a": [1, 2', "is not JSON"),
    "raw control": ('["\x01"]', "the character|is not JSON"),
    "two values": ("1 2", "is not JSON"),
}


@pytest.mark.parametrize("text, why", JSON.values(), ids=JSON)
def test_json_that_is_refused(text, why, tmp_path):
    (tmp_path / "a.json").write_text(text)
    begun = time.process_time()
    with pytest.raises(UserError, match=why.replace("\\", "\\\\").replace("[", "\\[")) as error:
        untrusted.json_file(tmp_path / "a.json")
    assert str(error.value).isprintable() and len(str(error.value)) < 600
    assert time.process_time() - begun < 5


def test_json_that_is_read():
    value = {"a": [1, -2.5e-3, True, None, "é … 漢 \u00a0"], "b": {"c": {}}, "d": 2 ** 63}
    assert untrusted.json_value(json.dumps(value), "x") == value
    assert untrusted.json_value(json.dumps(value, ensure_ascii=False), "x") == value


BYTES = {
    "no UTF-8": (b'"\xff"', "is not UTF-8"),
    "mark": (b'\xef\xbb\xbf{}', "byte-order mark"),
    "CRLF": (b'{\r\n}', "CRLF"),
    "NUL": (b'\x00', r"the character \\x00"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
}


@pytest.mark.parametrize("data, why", BYTES.values(), ids=BYTES)
def test_bytes_that_are_no_text_are_refused(data, why, tmp_path):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(UserError, match=why):
        untrusted.text_of(tmp_path / "a")


TOML = {
    "huge integer": ("a = " + "9" * 5000, "digits"),
    "65 bits": ("a = 9223372036854775808", "more than 64 bits"),
    "NaN": ("a = nan", "holds nan"),
    "infinite": ("a = [1.0, -inf]", "holds -inf"),
    "deep": ("a = " + "[" * 5000 + "]" * 5000, "nest|recursion"),
    "deep names": (".".join("a" * 100) + " = 1", "nests deeper"),
    "twice": ("a = 1\na = 2", "overwrite"),
    "escape code": ('a = "\\u001b[2J"', r"the character \\x1b"),
    "long line": ("# " + "x" * 200_000, "a line of more than"),
    "no TOML": ("=", "Invalid"),
}


@pytest.mark.parametrize("text, why", TOML.values(), ids=TOML)
def test_toml_that_is_refused(text, why, tmp_path):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(UserError, match=why) as error:
        untrusted.toml_file(tmp_path / "a.toml")
    assert str(error.value).isprintable()


def test_archives_are_whole_and_bounded(tmp_path):
    path, text = tmp_path / "a.xz", b"sources\n" * 100
    packed = lzma.compress(text)
    path.write_bytes(packed)
    assert untrusted.xz_of(path) == text
    bomb = lzma.compress(bytes(2 ** 24))
    for data, why in [(packed[:-9], "cut short"), (packed + b"more", "something after"), (b"", "cut short"),
                      (packed[:8] + b"xxxx" + packed[12:], "no whole"), (packed + packed, "something after"),
                      (b"PK\3\4" * 9, "no whole"), (bomb, "unpacks to more than 1048576 bytes")]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=why):
            untrusted.xz_of(path, 2 ** 20)


def test_readers_take_plain_files_only(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "big").write_bytes(b"1" * 100)
    for name, why in [("pipe", "is a pipe"), ("zero", "is a symbolic link"), ("big", "more than 10 bytes"),
                      (".", "is a folder"), ("none", "no such file"), ("/dev/zero", "is a device"),
                      ("a\0b", "cannot be read")]:
        with pytest.raises(UserError, match=why):
            untrusted.bytes_of(tmp_path / name, 10)


def test_a_chained_log_is_bounded_too(tmp_path):
    line, _ = runlog.chain_line(runlog.GENESIS, {"n": 0, "kind": "start"})
    path = tmp_path / "run.jsonl"
    path.write_text(line + "\n")
    assert len(runlog.read_chain(path)) == 1
    for text, why in [(line[:-1] + ', "kind": "start"}\n', "line 1: holds the key 'kind' twice"),
                      (line.replace(" ", "\r\n", 1), "CRLF"), ("\n", "line 1 is not a complete"),
                      ("[" * 10 ** 5, "line 1: nests deeper"), ("\ufeff" + line, "byte-order mark"),
                      (line.replace('"n": 0', '"n": NaN'), "line 1: holds NaN"),
                      (line.replace('"n": 0', '"n": 0.0'), "breaks the hash chain")]:
        path.write_text(text)
        with pytest.raises(UserError, match=why):
            runlog.read_chain(path)


def test_fields_that_nothing_reads_are_refused():
    untrusted.closed({"a": 1}, ("a", "b"), "x")
    with pytest.raises(UserError, match=r"x: has a field 'c\\x1b' that nothing reads"):
        untrusted.closed({"c\x1b": 1}, ("a", "b"), "x")


# ----- writing ----------------------------------------------------------------------------------------------

def test_outputs_replace_what_lies_there_and_follow_nothing(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "claim"
    folder.mkdir()
    for name in ("link", ".link.tmp", "link.tmp"):
        (folder / name).symlink_to(victim)
    os.mkfifo(folder / "pipe")
    untrusted.put(folder, "link", "new")
    untrusted.put(folder, "pipe", b"new")
    assert victim.read_text() == "mine"
    assert [(folder / x).read_text() for x in ("link", "pipe")] == ["new", "new"]
    assert sorted(p.name for p in folder.iterdir()) == [".link.tmp", "link", "link.tmp", "pipe"]
    with pytest.raises(UserError, match="cannot be opened as a folder"):
        untrusted.put(tmp_path / "none", "x", "y")


# ----- claims -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["README.md", "results.json", "README.md.tmp", ".results.json.tmp",
                                  "audit.json", "reproduction", "runs/x", "record.toml", "code.diff"])
def test_verify_writes_through_no_link(name, claim, tmp_path, capsys):
    """The attack: a link where verify writes or reads leads to a start-up file."""
    profile = tmp_path / "profile"
    profile.write_text("# mine\n")
    (claim.folder / name).symlink_to(profile)
    with pytest.raises(UserError, match="is a symbolic link"):
        command(claim.folder)
    assert profile.read_text() == "# mine\n"
    assert name == "results.json" or not (claim.folder / "results.json").exists()


def test_a_reproduction_is_looked_at_like_a_claim(claim, good, tmp_path):
    other = tmp_path / "other"
    with untrusted.copied(good) as copy:
        os.rename(copy, other)
    (other / "runs/private").symlink_to("/etc")
    with pytest.raises(UserError, match="other/runs/private: is a symbolic link"):
        command(claim.folder, reproduction=str(other))
    assert not (claim.folder / "reproduction").exists()


def test_results_go_where_the_judge_says(claim, tmp_path):
    before = {p: p.read_bytes() for p in claim.folder.rglob("*") if p.is_file()}
    assert command(claim.folder, out=str(tmp_path / "verdicts/one")) == 0
    assert {p: p.read_bytes() for p in claim.folder.rglob("*") if p.is_file()} == before
    assert json.loads((tmp_path / "verdicts/one/results.json").read_text())["verdict"] == "shown"


def test_what_a_submitter_wrote_cannot_act_on_a_page(claim):
    results = verify.verify(claim.folder)
    results["device"] = "<script>alert(1)</script> | x"
    results["reasons"] = ["a\n# SHOWN"]
    text = writeup.readme(claim.folder, results)
    assert "<script" not in text and "\\| x" in text and "\n# SHOWN" not in text
    assert verify.fit_to_print({"a\n": ["\x1b[2J", 1]}) == {"a\\n": ["\\x1b[2J", 1]}


def test_a_claim_is_judged_from_the_command_line(claim):
    """Two of the attacks as a user meets them: one line, exit code 2, in bounded time."""
    path = claim.folder / "runs" / claim.name(3) / "log.txt"
    path.unlink()
    os.mkfifo(path)
    done = subprocess.run([sys.executable, "-m", "records", "verify", str(claim.folder)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "log.txt: is a pipe" in done.stderr


def test_random_structures_are_refused_in_one_line_and_never_accepted(good, tmp_path):
    """Edits of a good claim, of all kinds (tests/long.sh runs 2,000): no traceback, no acceptance."""
    cases = int(os.environ.get("FUZZ_CASES", "40"))
    odd = [said for said in fuzzed(good, tmp_path, cases, seed=int(os.environ.get("FUZZ_SEED", "0"))) if said]
    assert not odd, odd[:5]
