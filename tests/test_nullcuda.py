"""Laws of the null device's table (tests/nullcuda): what a row compares, and what a table keeps."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "nullcuda"


def loaded(path):
    """A module of the null device, which is no package."""
    spec = importlib.util.spec_from_file_location(f"null_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def device():
    """The Python half, after one step of two logical ranks of 1,024 tokens."""
    found = loaded(HERE / "python/nullcuda.py")
    found.documents.append([[600, 300, 124], [1000, 24]])
    return found


@pytest.mark.parametrize("call, started, needed, least", [
    ((1024, 3, 600, 6), 15, 9, 15),  # tokens, documents, longest, heads: 5, 3 and 1 blocks of 128
    ((1024, 2, 1000, 6), 16, 9, 16),
    ((2048, 5, 1000, 6), 40, 18, 40),  # both ranks in one forward pass
    ((2048, 3, 1200, 3), 30, 17, 30),  # paired heads: two positions a token
    ((1024, 4, 600, 6), 20, 9, 16),  # room for a document too many
    ((1024, 3, 1024, 6), 24, 9, 16),  # the longest is not known
])
def test_a_call_of_flash_attention_is_compared_with_the_documents_of_its_own_pass(
    device, call, started, needed, least
):
    device.attention.add(call)
    found, = device.flash_calls()
    assert (found.started, found.needed, found.least) == (started, needed, least)
    about = device.about_flash([found])
    assert about["blocks"] == started * call[3] and about["waste"] == round(started / needed, 2)
    assert (about["blocks"] > about["least_blocks"]) is (started > least)


GOOD = {"exit": 0, "breaks": 0, "late_graphs": 0, "syncs": 0, "reads": 0, "sends": 1, "mallocs": 0,
        "refused": 0, "step_peak_gib": 10.1, "estimate_gib": 10.0, "grid": 12.0, "blocks": 1200,
        "least_blocks": 1200}


@pytest.mark.parametrize("change, said", [
    ({}, []), ({"syncs": 1}, ["1 host syncs"]), ({"step_peak_gib": 10.3}, ["memory 1.03 of the estimate"]),
    ({"blocks": 1206}, ["FlashAttention starts 1,206 blocks, and 1,200 would do"]), ({"exit": None}, None)
])
def test_a_row_says_which_bounds_it_does_not_keep(change, said):
    rows = loaded(HERE / "rows.py")
    found = rows.faults("short/12 eager", GOOD | change)
    assert found == said if said is not None else found[0].startswith("exit code None")
    assert not rows.faults("short/12 compiled", GOOD | {"step_peak_gib": 10.9})


def test_a_row_joins_those_of_other_commits(tmp_path, monkeypatch, capsys):
    rows = loaded(HERE / "rows.py")
    old = GOOD | {"code": "of before", "commit": "a" * 40}
    (tmp_path / "table.json").write_text(json.dumps({"rows": {"short/1 compiled": old}}))
    monkeypatch.setattr(rows, "HERE", tmp_path)
    monkeypatch.setattr(rows, "shards", lambda: tmp_path)
    monkeypatch.setattr(rows, "measured", lambda args, data: dict(GOOD))
    monkeypatch.setattr(rows, "code", lambda: "of now")
    monkeypatch.setattr(rows, "commit", lambda: "b" * 40 + "-dirty")
    monkeypatch.setattr(sys, "argv", ["rows.py", "short/12 eager"])
    assert rows.main() == 0 and capsys.readouterr().out == "short/12 eager: ok\n"
    table = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert list(table) == ["short/12 eager", "short/1 compiled"] and table["short/1 compiled"] == old
    lines = (tmp_path / "table.md").read_text().splitlines()[-2:]
    assert lines[0].endswith("| bbbbbbbbb+ |") and lines[1].endswith("| aaaaaaaaa |")
