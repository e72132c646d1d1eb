"""Laws of `--log-to`: copies of a curve elsewhere never touch the clock, the log, or the run."""

import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import pytest

import process_group
from evidence import run_laws
from runlog import read_chain
from common.errors import UserError
from system import sinks

ROOT = Path(__file__).parent.parent
# A package with the calls of wandb and trackio. Every call is written down with its process and whether any
# clock of the trainer runs; the fifth `log` fails where BROKEN names the package.
STUB = """
import gc, json, os

class Run:
    summary = {}
    def __init__(self): self.logged = 0
    def log(self, values, step):
        self.logged += 1
        told("log", [step, values])
        if __name__ == os.environ.get("BROKEN") and self.logged == 5:
            raise ConnectionError("no route\\nto the host")
    def finish(self): told("finish", Run.summary)

def told(call, what):
    timed = any(type(x).__name__ == "Clock" and x.began is not None for x in gc.get_objects())
    with open(os.environ["CALLS"], "a") as file:
        print(json.dumps([__name__, call, what, timed, os.environ.get("RANK", "0")]), file=file)

def init(project, name, config, **more):
    told("init", [project, name, config["seed"], config["settings"]["schedule"]["steps"]])
    return Run()
"""


def train(tmp_path, *names, processes=1, **env):
    """(completed process, calls of the stubs, events of the log) of a training of six steps with two
    validations."""
    for name in ("wandb", "trackio"):
        (tmp_path / f"{name}.py").write_text(STUB)
    args = [word for name in names for word in ("--log-to", name)]
    for word in ("schedule.steps=6", "validation.every=3", "validation.tokens=2048"):
        args += ["--set", word]
    done = process_group.run(
        [sys.executable, str(ROOT / "train_gpt.py"), "short/11", "--scale", "micro", "--out",
         str(tmp_path / "runs"), *args],
        processes,
        cwd=ROOT,
        timeout=280,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path),
            "CALLS": str(tmp_path / "calls"), **env
        },
    )
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    return done, calls, read_chain(next((tmp_path / "runs").glob("*/run.jsonl")))


def test_sinks_are_written_only_while_the_clock_stands_and_by_one_process_and_a_failing_one_is_given_up(
    tmp_path,
):
    done, calls, events = train(tmp_path, "wandb", "trackio", "wandb", processes=2, BROKEN="trackio")
    assert done.returncode == 0, done.stderr
    assert {(timed, rank) for *_, timed, rank in calls} == {(False, "0")}
    whole, broken = ([call[1:3] for call in calls if call[0] == name] for name in ("wandb", "trackio"))
    folder = next((tmp_path / "runs").glob("*/run.jsonl")).parent.name
    assert whole[0] == ["init", ["speedrun", folder, 0, 6]] and [call for call, _ in whole].count("init") == 1
    validations = [e for e in events if e["kind"] == "validation"]
    train_losses = [loss for e in validations for loss in e["train_loss"]]
    logged = [what for call, what in whole if call == "log"]
    assert [[step, v["train_loss"]] for step, v in logged if "train_loss" in v] == [
        list(p) for p in enumerate(train_losses)
    ]
    assert [
        [step, v["val_loss"], v["tokens"], v["train_time_ms"]] for step, v in logged if "val_loss" in v
    ] == [[e["step"], e["val_loss"], e["tokens"], e["train_time_ms"]] for e in validations]
    assert whole[-1][0] == "finish" and whole[-1][1]["status"] == "finished"
    assert [call for call, _ in broken] == ["init", *["log"] * 5]  # no call after the one that failed
    assert (
        "--log-to trackio: given up (ConnectionError: no route to the host); the run's own log goes on\n"
        in done.stdout
    )
    assert events[-1]["status"] == "finished" and events[0]["sinks"] == ["trackio", "wandb"]


def test_a_timed_claim_may_not_have_had_sinks():
    """Their packages may still send when the clock runs again."""
    log = run_laws.Log(
        "runs/0", ROOT, [({"kind": "start", "sinks": ["wandb"], "profiled": False, "settings": {}}, "")]
    )
    with_sinks = [p for p in run_laws.check_untouched(log)]
    assert with_sinks == ["runs/0/run.jsonl: run with --log-to wandb: not what is timed"]
    log.links[0][0]["sinks"] = []
    assert list(run_laws.check_untouched(log)) == []
    del log.links[0][0]["sinks"]  # version 2
    assert list(run_laws.check_untouched(log)) == []
    for odd in (5, "wandb", [5]):
        assert any(said.startswith("line 1 (start): sinks") for said in run_laws.misshapen(
            {"kind": "start", "n": 0, "sinks": odd}
        ))


def test_a_missing_or_broken_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="--log-to trackio: the package trackio is not installed: `pip install trackio`"
    ):
        sinks.require(["trackio"])
    monkeypatch.undo()
    (tmp_path / "wandb.py").write_text("raise RuntimeError('of another\\nversion')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError) as refused:
        sinks.require(["wandb"])
    assert "cannot be imported (RuntimeError: of another version)" in str(refused.value) and "\n" not in str(
        refused.value
    )
    sinks.require([])


def test_a_sink_that_cannot_be_opened_costs_a_line(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("def init(**more): raise SystemExit(1)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    said = []
    opened = sinks.Sinks(["wandb"], tmp_path, {}, said.append)
    assert said == ["--log-to wandb: given up (SystemExit: 1); the run's own log goes on"] and not opened.open
    opened.validation({"step": 0, "train_loss": [], "val_loss": 7.0, "tokens": 0, "train_time_ms": 0.0})
    opened.close({"status": "finished"})
    assert len(said) == 1
    monkeypatch.delitem(sys.modules, "wandb")


def test_tensorboard_gets_the_curve(tmp_path):
    pytest.importorskip("tensorboard", reason="an optional extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    said = []
    opened = sinks.Sinks(["tensorboard"], tmp_path, {"seed": 3}, said.append)
    opened.validation({"step": 0, "train_loss": [], "val_loss": 7.0, "tokens": 0, "train_time_ms": 0.0})
    written = sum(path.stat().st_size for path in (tmp_path / "tensorboard").iterdir())
    opened.validation(
        {"step": 2, "train_loss": [7.0, math.nan], "val_loss": 6.5, "tokens": 9, "train_time_ms": 4.0}
    )
    after = sum(path.stat().st_size for path in (tmp_path / "tensorboard").iterdir())
    assert after > written > 0  # nothing is left to a timer that could run out while the clock runs
    opened.close({"status": "diverged"})
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("val_loss")] == [(0, 7.0), (2, 6.5)]
    assert [e.step for e in found.Scalars("train_loss")] == [0, 1] and not said
