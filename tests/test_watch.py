"""Laws of `records watch`: it shows several runs from their logs alone, under way, torn or ended."""

import json
import os
import time
from pathlib import Path

import pytest

import runlog
from page import watch
from records import __main__ as records
from settings import schema
from settings.deltas import resolve
from system.heartbeat import Heartbeat, beaten


def write(out, seed, losses, end=None, close=True, **start):
    """The folder of a run of 20 steps with these validation losses, every five steps; not closed, its log."""
    log = runlog.RunLog(out, f"s{seed}")
    s = resolve("short/11", scale="micro", sets=["schedule.steps=20", "validation.every=5"]).settings
    log.event("start", record="short/11", preset="", scale="micro", seed=seed, changes=[], utc="",
              sources="x", settings=schema.plain(s), memory={"mib": {"total": 321}}, **start)
    for i, loss in enumerate(losses):
        log.event("validation", step=5 * i, scheduled_steps=20, val_loss=loss, tokens=5 * i * 1024, epoch=0,
                  train_loss=[loss + 0.1] * (5 if i else 0), train_time_ms=1000.0 * i)
    if end:
        said = "step 7: the gradient of x is not finite"
        log.event("guard", what="finite", step=7, tensors=["x"], message=said)
        log.event("end", status=end, steps=8, train_time_ms=2000.0, tokens=8192, verdict=[])
    if not close:
        return log
    log.close()
    return log.folder


def shown(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        records.main(["watch", *map(str, argv)])
    return stop.value.code, capsys.readouterr()


@pytest.mark.parametrize("width", [80, 100])
def test_on_a_narrow_terminal_states_and_numbers_are_whole_and_no_line_is_broken(
        width, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    runs = [write(tmp_path, 1, [7.0, 6.0, 5.25], "interrupted"), write(tmp_path, 2, [7.0, 6.5], "finished")]
    code, said = shown(capsys, *runs, "--once")
    assert code == 0 and max(map(len, said.out.splitlines())) <= width
    for cell in ("interrupted", "finished", "5.2500", "tokens/s", "learning"):
        assert cell in said.out
    axis = [line for line in said.out.splitlines() if "+---" in line]
    assert len(axis) == 1 and axis[0].strip().strip("+-") == ""


def test_how_often_to_look_is_a_number_of_seconds(tmp_path, capsys):
    for every in ("nan", "-1", "0", "inf", "x"):
        code, said = shown(capsys, "--every", every)
        assert code == 2 and "--every: expected a number from 0.1 to 86400" in said.err


def test_two_runs_are_shown_over_each_other_one_torn_and_under_way_one_stopped_by_a_guard(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    going = write(tmp_path, 1, [7.0, 6.0, 5.25])
    with open(going / "run.jsonl", "ab") as file:
        file.write(b'{"kind": "validation", "step": 15, "val_lo')  # a line that is being written
    Heartbeat(beaten(going)).beat(12, 2400.0)
    over = write(tmp_path, 2, [7.0, 6.5], end="diverged")
    before = {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()}
    code, said = shown(capsys, going, over, "--once")
    assert code == 0
    row = next(line for line in said.out.splitlines() if " 1 seed 1" in line)
    # later than the last validation: 12 steps of 1024 tokens in 2.4 s
    for cell in ("12/20", "5.2500", "5.7250", f"{12 * 1024 / 2.4:,.0f}", "about 321 MiB", "running"):
        assert cell in row, (cell, row)
    assert "diverged: step 7: the gradient of x" in " ".join(said.out.split())
    drawing = [line.partition("|")[2] for line in said.out.splitlines() if "|" in line]
    assert any("1" in line for line in drawing) and any("2" in line for line in drawing)
    assert {path: path.read_bytes() for path in before} == before
    assert watch.unfinished(str(tmp_path)) == [going]


def test_the_view_follows_the_logs_until_the_runs_have_ended(tmp_path):
    folder = write(tmp_path, 1, [7.0])
    assert watch.look(folder).step == 0
    path = folder / "run.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    line, _ = runlog.chain_line(last["hash"], {"kind": "end", "n": 2, "wall_ms": 1.0, "status": "finished",
                                               "steps": 20, "train_time_ms": 5.0})
    path.write_text(path.read_text() + line + "\n")
    assert (watch.look(folder).status, watch.look(folder).step) == ("finished", 20)


def age(folder, seconds):
    """Make the last sign of a run this old."""
    then = time.time() - seconds
    os.utime(folder / "run.jsonl", (then, then))
    if beaten(folder).exists():
        beats = Heartbeat(beaten(folder))
        Heartbeat.FORM.pack_into(beats.map, 0, 7, 500.0, then)


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the system does not tell who holds a file")
def test_a_killed_run_is_told_from_one_that_goes_on_and_from_a_silent_one(tmp_path):
    """On its own machine by the lock on its log, which a kill takes away; elsewhere by its last sign."""
    log = write(tmp_path, 1, [7.0, 6.0], close=False, machine=watch.this_machine())
    Heartbeat(beaten(log.folder)).beat(7, 500.0)
    age(log.folder, 60)
    assert watch.look(log.folder).status == "running"
    age(log.folder, 200)
    assert watch.look(log.folder).status == "silent"  # hangs, or stopped with Ctrl-Z
    log.close()  # as the kernel does for a process that is gone
    killed = watch.look(log.folder)
    assert killed.status == "killed" and watch.cells(killed, "x")[-1].startswith("killed after 20")
    assert watch.unfinished(str(tmp_path)) == [log.folder]
    age(log.folder, 1)
    assert watch.look(log.folder).status == "running"
    other = write(tmp_path, 2, [7.0, 6.0], machine="another")
    for seconds, status in ((60, "running"), (800, "running"), (1000, "silent")):  # in a long first compile
        age(other, seconds)
        assert watch.look(other).status == status


def test_the_gradient_norm_is_shown_and_old_logs_have_none(tmp_path):
    log = write(tmp_path, 1, [7.0], close=False)
    assert watch.cells(watch.look(log.folder), "x")[4] == ""
    log.event("validation", step=5, scheduled_steps=20, val_loss=6.0, tokens=5, epoch=0, train_loss=[6.0] * 2,
              train_time_ms=1.0, grad_norm=[0.5, 0.123456])
    log.close()
    assert watch.cells(watch.look(log.folder), "x")[4] == "0.1235"


def test_what_cannot_be_watched_is_one_line(tmp_path, capsys):
    for argv in ((tmp_path / "nowhere",), ("--out", tmp_path)):
        code, said = shown(capsys, *argv)
        assert code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.jsonl").write_text("")
    assert watch.look(Path(tmp_path / "new")).status == "starting"
    assert watch.chart([(), ((0, 7.0),)]) == []
