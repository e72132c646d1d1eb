"""Files that matter are whole or absent, JSON is strict, leftovers are not data; and laws that hold for every
module's source."""

import ast
import functools
import hashlib
import json
import math
import os
import resource
import signal
import stat
from pathlib import Path

import pytest

import data.shards
from common import files
import runlog
from evidence import verify
from settings import deltas
from sweeps import queue
from common.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small_files(monkeypatch):
    """No file may grow beyond 1,000 bytes, as on a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


# ----- writing ----------------------------------------------------------------------------------------------

def test_a_file_keeps_its_old_content_where_the_disk_is_full(tmp_path, small_files):
    path = tmp_path / "summary.json"
    files.write(path, "old")
    with pytest.raises(UserError, match=f"cannot write {path}: File too large; free some space"):
        files.write(path, "x" * 2000)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["summary.json"]


def test_a_file_keeps_its_old_content_where_the_writer_fails(tmp_path):
    path = tmp_path / "curve.png"
    files.write(path, b"old")
    with pytest.raises(KeyboardInterrupt):
        with files.writing(path) as file:
            file.write(b"half of the new")
            raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["curve.png"]


def test_missing_folders_are_made_where_asked_for_and_links_are_replaced(tmp_path):
    target = tmp_path / "elsewhere.txt"
    target.write_text("untouched")
    (tmp_path / "link.txt").symlink_to(target)
    files.write(tmp_path / "link.txt", "new")
    files.write(tmp_path / "a/b/c.txt", "new", parents=True)
    with pytest.raises(UserError, match="cannot write .*: No such file or directory; its folder is missing"):
        files.write(tmp_path / "mistyped/x.json", "{}")
    assert target.read_text() == "untouched" and not (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "a/b/c.txt").read_text() == "new"


def test_a_file_has_the_rights_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        files.write(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_a_device_is_written_to_and_stays_one(tmp_path):
    if not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full here")
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        files.write("/dev/full", "x")
    files.write("/dev/null", "x")
    assert Path("/dev/full").is_char_device() and Path("/dev/null").is_char_device()


def test_long_names_and_what_is_no_text_can_be_written(tmp_path):
    files.write(tmp_path / ("\u6f22" * 80), "name of 240 bytes")
    files.write(tmp_path / "x", "an argument \udcff that was no UTF-8")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "an argument \\udcff that was no UTF-8"


def test_shards_and_queues_leave_nothing_torn(tmp_path, small_files):
    with pytest.raises(UserError, match="cannot write"):
        data.shards.write_shard(tmp_path / "x_train_1.bin", range(2000))
    with pytest.raises(UserError, match="cannot write"):
        queue.write_once(tmp_path / "plan.json", "x" * 2000)
    assert os.listdir(tmp_path) == []


# ----- JSON -------------------------------------------------------------------------------------------------

def test_json_has_null_where_a_number_is_not_finite():
    text = files.json_text({"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": math.nan}})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.5, None, [None, None]], "b": {"c": None}}


def chain(tmp_path, bodies, dumps):
    """A run.jsonl of these events, each line hashed over the text that `dumps` gives it."""
    previous, lines = runlog.GENESIS, []
    for n, body in enumerate(bodies):
        text = dumps({"n": n, "wall_ms": 0.0, **body}, sort_keys=True)
        previous = hashlib.sha256((previous + text).encode()).hexdigest()
        lines.append(text[:-1] + f', "hash": "{previous}"}}')
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("dumps", [json.dumps, files.json_text])
def test_old_logs_with_nan_and_new_ones_with_null_read_alike(tmp_path, dumps):
    path = chain(
        tmp_path,
        [
            {"kind": "validation", "step": 1, "val_loss": math.nan, "train_loss": [7.0, math.inf]},
            {"kind": "end", "status": "diverged", "val_loss": math.nan, "target": None},
            {"kind": "end", "status": "interrupted", "val_loss": None}
        ],
        dumps,
    )
    first, second, third = runlog.read_chain(path)
    assert (
        math.isnan(first["val_loss"]) and first["train_loss"][0] == 7.0
        and not math.isfinite(first["train_loss"][1])
    )
    assert math.isnan(second["val_loss"]) and second["target"] is None and third["val_loss"] is None


def test_a_chain_of_numbers_that_are_not_finite_is_strict_and_holds(tmp_path):
    log = runlog.RunLog(tmp_path, "x")
    event = log.event(
        "validation", step=1, scheduled_steps=1, val_loss=math.nan, train_loss=[math.inf], train_time_ms=1.0
    )
    text = (log.folder / "run.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["val_loss"] is None and math.isnan(event["val_loss"])
    found, = runlog.read_chain(log.folder / "run.jsonl")
    # as text nan equals nan
    assert {k: str(v) for k, v in found.items()} == {k: str(v) for k, v in event.items()}
    assert "val_loss:nan" in (log.folder / "log.txt").read_text()


def test_a_number_of_thousands_of_digits_in_a_log_is_one_line(tmp_path):
    (tmp_path / "run.jsonl").write_text('{"n": ' + "9" * 5000 + "}\n")
    with pytest.raises(UserError, match="line 1: holds the number 9+, which is too long"):
        runlog.read_chain(tmp_path / "run.jsonl")


# ----- leftovers --------------------------------------------------------------------------------------------

LEFT = [
    "._x_train_000001.bin",
    ".x_train_000001.bin.swp",
    "x_train_000001.bin~",
    "#x_train_000001.bin#",
    "Thumbs.db",
    ".DS_Store",
    "x_train_000001.bin.part",
    "desktop.ini",
    "Icon\r",
    "__pycache__",
    "__MACOSX",
]


@pytest.mark.parametrize("name", LEFT)
def test_leftovers_are_not_listed(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "run.jsonl").write_text("")
    (tmp_path / "x_train_000001.bin").write_text("")
    assert (
        files.listed(tmp_path) == [tmp_path / "x_train_000001.bin"]
        and files.listed(tmp_path, "**/run.jsonl") == []
    )


def test_leftovers_are_no_shards_records_presets_targets_or_logs(tmp_path, monkeypatch):
    # AppleDouble, as a Mac's archive brings them
    for name in ("._fineweb_train_000001.bin", "._fineweb_val_000000.bin"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    data.shards.write_shard(tmp_path / "fineweb_train_000001.bin", range(100))
    data.shards.write_shard(tmp_path / "fineweb_val_000000.bin", range(100))
    assert [p.name for p in data.shards.open_corpus(tmp_path).train] == ["fineweb_train_000001.bin"]
    (tmp_path / "done").mkdir()
    (tmp_path / "done/._x.json").write_bytes(b"\0\5\26\7")
    assert queue.settled(tmp_path) == ({}, {})
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "._1.txt").write_bytes(b"\0\5\26\7")
    (logs / "1.txt").write_text("step:8/8 val_loss:3.2 train_time:9ms step_avg:1ms\n")
    (logs / "2.txt").write_text("step:8/8 val_loss:3.1 train_time:8ms step_avg:1ms\n")
    assert verify.is_text_logs(logs) and verify.text_logs(logs, 3.28)["files"] == ["1.txt", "2.txt"]
    monkeypatch.setattr(deltas, "RECORDS", tmp_path)
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/._tiny-v3.toml").write_bytes(b"\0\5\26\7")
    (tmp_path / "short/._001_x").mkdir(parents=True)
    (tmp_path / "short/._001_x/record.toml").write_bytes(b"\0\5\26\7")
    assert deltas.preset_names() == [] and deltas.load_records.__wrapped__() == {}


# ----- laws of the source -----------------------------------------------------------------------------------

# Run in a checkout of another commit, which may lack files.py, or before there is anything to import; and
# what reads and writes by open handles, or in /dev and /proc, because nobody's folders are trusted.
ALONE = {"evidence/audit_model.py", "evidence/audit_probe.py", "common/jail.py", "common/sandbox.py",
         "common/untrusted.py"}
MODULES = [p for p in sorted(ROOT.glob("**/*.py"))
           if not {".venv", "tests", "data/cache"} & {*p.relative_to(ROOT).parts} and "cache" not in p.parts
           and not any(map(files.is_leftover, p.relative_to(ROOT).parts))]


@functools.cache
def calls(path):
    """[(name of the function or method, call)] of every call in a module."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    return [
        (n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, "id", ""), n) for n in nodes
    ]


def said(path, node):
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def mode_of(node):
    """The mode of an open(...) or path.open(...), 'r' if it says none."""
    place = 0 if isinstance(node.func, ast.Attribute) and node.func.attr == "open" and not is_os(node) else 1
    given = [k.value for k in node.keywords if k.arg == "mode"] or node.args[place:place + 1]
    return given[0].value if given and isinstance(given[0], ast.Constant) else "r"


def is_os(node):
    return isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") in (
        "os", "lzma", "gzip", "tarfile", "webbrowser"
    )


def test_every_text_file_is_read_and_written_as_utf_8():
    wrong = []
    for path in MODULES:
        for name, node in calls(path):
            method = isinstance(node.func, ast.Attribute)
            text = (method and name in ("read_text", "write_text")) or (name in ("open", "fdopen") and not (
                is_os(node) and name == "open") and "b" not in mode_of(node))
            if text and "encoding" not in [k.arg for k in node.keywords]:
                wrong.append(said(path, node))
    assert "\n".join(wrong) == ""


def test_results_are_written_by_files_alone():
    """`write_text` and its like tear a file when the disk is full; a temporary file of one's own forgets the
    fsync."""
    # the first two swap whole folders; a lock file must be written where it was created; the last two write
    # to a temporary folder and to /proc
    allowed = {"data/tokenize.py", "data/fineweb.py", "common/files.py", "installation/install.py",
               "bench/aot.py", "bench/optim.py", *ALONE}
    names = {"write_text", "write_bytes", "savefig", "tofile", "dump"}
    wrong = []
    for path in MODULES:
        place = str(path.relative_to(ROOT))
        for name, node in calls(path):
            to_buffer = name == "savefig" and getattr(node.args[0], "id", "") == "image"
            writes = name == "open" and not is_os(node) and set(mode_of(node)) & set("wax")
            if place not in allowed and (name in names and not to_buffer or writes and place not in GROWING):
                wrong.append(said(path, node))
    assert "\n".join(wrong) == ""


# What grows while a program runs, locks, null devices, the queue's own creation of files that must not exist
# yet, and checkpoints, which are too large for the memory.
GROWING = {"runlog.py", "evidence/arms.py", "evidence/audit.py", "sweeps/worker.py", "sweeps/queue.py",
           "common/console.py", "system/checkpoint.py"}


def test_folders_are_listed_by_files_alone():
    """But data/tokenize.py, which asks whether a folder that it would write to holds anything at all,
    data/shards.py, which tells why a folder cannot be listed, and system/checkpoint.py, which removes
    leftovers of its own."""
    wrong = [
        said(path, node) for path in MODULES for name, node in calls(path)
        if name in ("glob", "rglob", "iterdir", "listdir", "scandir", "walk") and path.name != "files.py"
        and str(path.relative_to(ROOT)) not in {
            "data/tokenize.py", "data/shards.py", "system/checkpoint.py", *ALONE}
        and not (name == "walk" and not is_os(node))
    ]
    assert "\n".join(wrong) == ""


def test_json_that_is_kept_is_strict():
    """`json.dumps` is for hashes and quoted words; what is written or printed for programs is
    files.json_text's."""
    hashed = {"settings/schema.py", "common/files.py", "runlog.py", "evidence/arms.py", "evidence/claim_laws.py",
              "evidence/run_laws.py", "evidence/submit.py", "evidence/verify.py", "evidence/model_facts.py",
              "evidence/signing.py", "sweeps/queue.py", "system/checkpoint.py", *ALONE}
    wrong = [said(path, node) for path in MODULES for name, node in calls(path)
             if name in ("dumps", "dump") and getattr(getattr(node.func, "value", None), "id", "") == "json"
             and str(path.relative_to(ROOT)) not in hashed]
    assert "\n".join(wrong) == ""


def test_git_is_run_by_repository_alone():
    wrong = [said(path, node) for path in MODULES for _, node in calls(path) if path.name != "repository.py"
             for arg in node.args[:1] if isinstance(arg, ast.List) and arg.elts
             and getattr(arg.elts[0], "value", "") == "git"]
    assert "\n".join(wrong) == ""


def test_a_training_s_sources_hold_every_module_it_imports():
    """Of the project's own modules, found by following the imports of train_gpt.py."""
    found, todo = set(), ["train_gpt.py"]
    while todo:
        name = todo.pop()
        # system/dry_run.py is what --plan imports, and trains nothing
        if name in found or name.startswith("records/"):
            continue
        found.add(name)
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            todo += [
                m.replace(".", "/") + ".py" for m in modules
                if (ROOT / (m.replace(".", "/") + ".py")).exists()
            ]
    assert sorted(found - set(runlog.source_files())) == []
