"""Tables heed a terminal's width and its encoding; what goes into a pipe is whole."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common import lines
from records.__main__ import main
from settings import deltas

ROOT = Path(__file__).parent.parent
COMMANDS = [["list"], ["features"], ["judge"], ["judge", "short/33"], ["diff", "short/1", "short/33"],
            ["show", "variants/4", "--scale", "tiny"]]


def printed(monkeypatch, capsys, words, columns):
    monkeypatch.delenv("LINES", raising=False)
    monkeypatch.setenv("COLUMNS", str(columns)) if columns else monkeypatch.delenv("COLUMNS", raising=False)
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(words, columns, monkeypatch, capsys):
    out = printed(monkeypatch, capsys, words, columns)
    assert max(lines.columns_of(line) for line in out.splitlines()) <= columns


@pytest.mark.parametrize("words", COMMANDS[:3], ids=" ".join)
def test_a_pipe_gets_every_line_whole(words, monkeypatch, capsys):
    out = printed(monkeypatch, capsys, words, None)
    assert lines.ellipsis() not in out and max(map(len, out.splitlines())) > 120
    if words == ["list"]:
        refs = re.findall(r"^(short/\S+) ", out, re.M)
        assert refs == [r for r in deltas.load_records() if r.startswith("short/")]


def test_wrapping_loses_no_word():
    text = (
        "a line of several words that is longer than the width, with "
        "a_very_long_word_that_fits_nowhere_at_all_in_it"
    )
    parts = lines.wrapped("  " + text, 30)
    assert "".join(parts).replace(" ", "") == text.replace(" ", "") and max(map(len, parts)) <= 30
    assert parts[0].startswith("  a") and all(p.startswith("      ") for p in parts[1:])
    wide = lines.wrapped("\u6f22" * 30, 20)
    assert all(lines.columns_of(p) <= 20 for p in wide) and "".join(wide).replace(" ", "") == "\u6f22" * 30


def test_columns_start_below_each_other_also_under_wide_characters():
    rows = [("record", "loss", ""), ("short/1", "4.1", "a note"), ("漢字", "12.25", "b")]
    shown = list(lines.aligned(rows))
    assert [row.split() for row in shown] == [" ".join(row).split() for row in rows]
    assert shown == [row.rstrip() for row in shown]
    starts = {lines.columns_of(row[:row.index(cell)]) for row, (_, cell, _) in zip(shown, rows)}
    assert starts == {2 + len("short/1") + 2}


@pytest.mark.parametrize("encoding, end", [("utf-8", "\u2026"), ("ascii", "..."), ("latin-1", "...")])
def test_cut_text_ends_in_an_ellipsis_that_the_encoding_has(encoding, end, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert lines.clipped("ten letters", 8) == ("ten lett"[:8 - len(end)].rstrip() + end)
    assert lines.clipped("short", 8) == "short" and lines.columns_of(lines.clipped("\u6f22" * 9, 8)) <= 8


def test_a_last_line_without_an_end_and_an_error_inside_are_passed_on(monkeypatch, capsys):
    monkeypatch.delenv("LINES", raising=False)
    monkeypatch.setenv("COLUMNS", "50")
    with pytest.raises(ValueError):
        with lines.fitted():
            print("no end", end="")
            raise ValueError
    assert capsys.readouterr().out == "no end"


def test_a_width_that_readline_put_into_the_environment_is_none(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("LINES", "24")
    assert lines.room() is None


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_plan_is_printed_on_any_encoding(encoding, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "LINES"}
    env |= {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py"), "short/33", "--scale", "micro", "--plan"], env=env,
        capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.decode(encoding).splitlines())) <= 80
