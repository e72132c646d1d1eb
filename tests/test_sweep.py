"""Laws of sweeps: the queue, its workers, screening, what is concluded. A fake trainer writes the logs; one
test trains."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import deltas
import schema
import runlog
import sweep
from evidence import statistics
from page import facts
from sweeps import queue, worker, report as sweep_report
from sweeps.plan import grouped, make_plan, pairs_of, split
from common.errors import UserError

ROOT = Path(__file__).parent.parent
NORM, LAM, CAP = "model.embed.norm", "model.attn.value_residual", "model.head.softcap"
TWO = ["--features", NORM, CAP]

# Writes the run folder that the trainer would write. EFFECTS: loss by change; FAIL: changes of the arm that
# fails, or all;
# SECONDS: how long a run takes; STARTED: a file that gets a line per start. Noise depends on seed and
# settings only.
FAKE = """
import json, os, random, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import runlog, schema
from system import command_line
options, resolved = command_line.command_line()
plan = json.loads((Path(options.out).parent / "plan.json").read_text())
s, effects = resolved.settings, json.loads(os.environ.get("EFFECTS", "{{}}"))
ml_hash, changes = schema.ml_hash(s), list(resolved.changes)
with open(os.environ["STARTED"], "a") as file:
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES") or "none"
    print(f"{{ml_hash}}_s{{options.seed}}", os.getpid(), gpu, os.nice(0), file=file)
runlog.sources = lambda: ("fake", runlog.source_hash("fake"))
name = f"{{resolved.record.ref.replace('/', '-')}}_{{resolved.scale}}_{{ml_hash[:8]}}_s{{options.seed}}"
log = runlog.RunLog(options.out, name)
log.start(dict(record=resolved.record.ref, scale=resolved.scale, seed=options.seed, changes=changes, ml_hash=ml_hash,
               numerics_version=plan["numerics_version"], registered=options.registered, device="fake", cpu="", machine="m",
               torch="0", code="c" * 40, profiled=False, processes=1, **plan["digests"][ml_hash]), schema.plain(s))
time.sleep(float(os.environ.get("SECONDS", 0)))
if os.environ.get("FAIL") in ("all", " ".join(changes)):
    sys.exit("error: the disk of the fake is full")
loss = 5 + random.Random(f"{{ml_hash}} {{options.seed}}").gauss(0, 0.01) + sum(effects.get(c, 0) for c in changes)
diverged = "DIVERGE" in os.environ
loss, status = (float("nan"), "diverged") if diverged else (loss, "finished")
log.end(status=status, steps=3, scheduled_steps=3, val_loss=loss, train_time_ms=10.0, tokens=99, epoch=0, target=None,
        reached=None, verdict=[])
sys.exit(4 if diverged else 0)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Path of the file that lists all starts of the fake trainer."""
    (tmp_path / "fake.py").write_text(FAKE.format(root=str(ROOT)))
    monkeypatch.setenv("SPEEDRUN_SWEEP_TRAINER", str(tmp_path / "fake.py"))
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "started").touch()
    return tmp_path / "started"


def starts(path):
    return [line.split()[0] for line in path.read_text().splitlines()]


def command(*args):
    return [sys.executable, str(ROOT / "sweep.py"), *map(str, args)]


def call(*args):
    """Exit code of a sweep command in this process."""
    with pytest.raises(SystemExit) as stop:
        sweep.main(list(map(str, args)))
    return stop.value.code


def planned(*args):
    return make_plan(sweep.parser().parse_args(list(map(str, args))))


def made(root, *args):
    plan = planned(*args)
    queue.create(root, plan)
    return plan


def results(plan, loss, survivors=None, status="finished"):
    """Settled runs as the queue gives them, of all targets: loss(arm, seed)."""
    return {
        name: {
            "status": status, "val_loss": loss(arm, seed), "seed": seed, "arm": arm["label"],
            "train_time_ms": 1.0, "ml_hash": arm["ml_hash"], "last_hash": name, "device": "d", "cpu": "c",
            "machine": "m", "torch": "t", "code": "x"
        }
        for name, arm, seed in queue.targets(plan, survivors)
    }


def wait_for(condition, seconds=240):
    until = time.time() + seconds
    while not condition():
        assert time.time() < until, "waited in vain"
        time.sleep(0.02)


# ----- what is run ------------------------------------------------------------------------------------------

def test_targets_go_seed_by_seed_and_the_control_has_about_sqrt_arms_times_the_runs():
    plan = planned(
        "ablate", "short/11", "--seeds", 3, "--features", "model.attn", "model.head", "--no-screen"
    )
    arms = len(pairs_of(plan))
    todo = queue.targets(plan)
    assert plan["controls"] == round(3 * arms ** 0.5) and len(todo) == plan["controls"] + 3 * arms
    rounds = [seed for _, arm, seed in todo if arm["role"] != "control"]
    assert rounds == sorted(rounds)
    first = todo[:next(i for i, t in enumerate(todo) if t[1]["role"] != "control" and t[2] == 1)]
    assert {arm["label"] for _, arm, _ in first} == {a["label"] for a in plan["arms"]}
    assert sorted(seed for _, arm, seed in todo if arm["role"] == "control") == list(range(plan["controls"]))


def test_what_computes_the_same_shares_its_runs_and_inert_arms_share_the_control():
    plan = planned("ablate", "short/11", "--features", "numerics", "model.mlp", "--seeds", 2)
    control, inert = (
        plan["arms"][0],
        [a for a in plan["arms"][1:] if a["ml_hash"] == plan["arms"][0]["ml_hash"]],
    )
    assert len(inert) >= 5 and not [t for t in queue.targets(plan) if t[1] in inert]
    assert len(pairs_of(plan)) == len(plan["arms"]) - 1 - len(inert)
    found = sweep_report.evidence(plan, results(plan, lambda a, s: 5 + 0.01 * s), {}, None, "x")
    row = next(r for r in found["rows"] if r["arm"] == inert[0]["label"])
    assert "inert at scale micro" in row["note"] and row["effect"] is None and not row["runs"]
    plan = planned("chain", "short/5..short/8", "--seeds", 2)
    assert [a["label"] for a, _ in pairs_of(plan)] == ["short/6", "short/8"]  # 7 is another PyTorch
    assert len(queue.targets(plan)) == 2 * 3
    plan = planned(
        "axis", "short/11", "schedule.lr=trapezoid,cosine", "schedule.cooldown_steps=0", "--seeds", 2
    )
    assert control["ml_hash"] != plan["arms"][1]["ml_hash"] and len(pairs_of(plan)) == 2


def test_an_axis_is_every_combination_of_values_in_the_grammar_of_set():
    plan = planned("axis", "short/11", "optim.muon.lr=0.02,0.08", "model.mlp.activation=gelu,relu_sq")
    assert [a["label"] for a in plan["arms"][1:]] == [
        f"optim.muon.lr={lr} model.mlp.activation=\"{act}\"" for lr in (0.02, 0.08)
        for act in ("gelu", "relu_sq")
    ]
    assert split("a={x = [1, 2], y = 3},{x = 4},\"p,q\"") == ["{x = [1, 2], y = 3}", "{x = 4}", '"p,q"']


def parents_of(lineage):
    """{ref: parent} as the lineage's record.toml files say, in the order of their folders."""
    tomls = [
        tomllib.loads(path.read_text()) for path in sorted((ROOT / "records" / lineage).glob("*/record.toml"))
    ]
    return {f"{lineage}/{toml['id']}": toml.get("parent") for toml in tomls}


def test_a_lineage_is_every_record_of_it_against_its_parent():
    for lineage, seeds in (("short", 2), ("variants", 4)):
        plan, parents = planned("chain", lineage, "--seeds", seeds, "--scale", "tiny"), parents_of(lineage)
        assert plan["name"] == f"chain_{lineage}_tiny" and plan["base"] == lineage
        children = {ref: parent for ref, parent in parents.items() if parent}
        assert (
            plan["arms"][0]["label"] == next(iter(children.values())) and plan["arms"][0]["role"] == "control"
        )
        assert {a["label"]: a["parent"] for a in plan["arms"][1:]} == children
        assert all(b["label"] == children[a["label"]] for a, b in pairs_of(plan))


def test_branches_of_one_parent_get_more_runs_of_it_and_a_chain_of_several_parents_does_not():
    plan = planned("chain", "variants")
    assert plan["controls"] == round(4 * 7 ** 0.5) and len(queue.targets(plan)) == plan["controls"] + 7 * 4
    assert planned("chain", "variants", "--controls", 8)["controls"] == 8
    assert planned("chain", "variants", "--paired")["controls"] == 4
    assert planned("chain", "short")["controls"] == planned("chain", "short/5..short/9")["controls"] == 4


def test_a_parent_outside_the_lineage_runs_and_is_compared_with_its_nearest_ancestor_that_runs(monkeypatch):
    records = dict(deltas.load_records())
    new = dataclasses.replace(records["variants/5"], ref="variants/99", parent="short/11")
    monkeypatch.setattr(deltas, "load_records", lambda: records | {"variants/99": new})
    monkeypatch.setattr(deltas, "find_record", lambda name: deltas.load_records()[name])
    plan = planned("chain", "variants")
    assert [(a["label"], a["parent"]) for a in plan["arms"][-2:]] == [
        ("short/11", "short/8"),
        ("variants/99", "short/11"),
    ]
    assert plan["controls"] == plan["seeds"] and len(pairs_of(plan)) == 9


def test_features_that_cannot_be_switched_off_are_listed_with_the_reason():
    skipped = {s["feature"]: s["reason"] for s in planned("ablate", "short/11")["skipped"]}
    # which is off in record 11
    assert "no sensible off" in skipped["schedule.steps"] and "model.bias" not in skipped


def test_groups_are_the_sections_and_a_lonely_feature_joins_the_section_above():
    assert grouped(["a.b.x", "a.b.y", "a.c.z", "a.w", "d.e"]) == {
        "a.b": ["a.b.x", "a.b.y"],
        "a": ["a.w", "a.c.z"],
    }


def test_few_features_are_not_screened_and_the_plan_says_why():
    plan = planned("ablate", "short/11")
    assert not plan["groups"] and "pays from 4 features a group" in plan["screening"]
    assert planned("ablate", "short/11", "--screen")["groups"]
    assert planned("ablate", "short/11", "--features", "model.attn")["groups"] == ["model.attn"]
    assert not planned("ablate", "short/11", "--features", "model.attn", "--no-screen")["groups"]


BAD = [
    (["axis", "short/11", "optim.muon.lrr=1,2"], "did you mean"),
    (["axis", "short/11", "optim.muon.lr=0.1,many"], "expected a number"),
    (["axis", "short/11", "optim.muon.lr=0.1,,0.2"], "empty value"),
    (["axis", "short/11", "optim.muon.lr"], "expected path=value"),
    (["axis", "short/11", "optim.muon.lr=0.1,0.1"], "given twice"),
    (["axis", "short/11", "optim.muon.lr=0.1", "optim.muon.lr=0.2"], "given twice"),
    (["axis", "short/11", "optim.muon.lr=0.1", "--set", "optim.muon.lr=0.2"], "given twice"),
    (["axis", "short/2", "optim.muon.lr=0.1"], "optim.muon is off"),
    (["axis", "short/11", "model.attn.num_heads=6,7"], "not divisible"),
    (["axis", "short/11", "system.comm=sharded"], "nothing to run"),
    (["ablate", "short/99"], "unknown record"),
    (["ablate", "short/11", "--features", "model.embed.nrom"], "did you mean"),
    (["ablate", "short/11", "--features", "model.bias"], "already"),
    (["ablate", "short/11", "--features", "system"], "has no feature below it"),
    (["ablate", "short/11", "--set", "schedule.stepz=3"], "did you mean schedule.steps"),
    (["ablate", "short/11", "--controls", "2"], "at least as many controls"),
    (["ablate", "short/11", "--confidence", "95"], "above 0 and below 1"),
    (["ablate", "short/11", "--paired", "--controls", "9"], "leave it away"),
    (["ablate", "short/11", "--data", "/no/such/place"], "no data folder"),
    (["ablate", "short/11", "--reuse", "/no/such/place"], "no such folder"),
    (["ablate", "short/11", "--scale", "small", "--data", "DATA"], "needs one"),
    (["ablate", "short/11", "--dir", "/dev/null/x"], "choose another with --dir"),
    (["chain", "short/1"], "FIRST..LAST"),
    (["chain", "variant"], "did you mean variants?"),
    (["chain", "medium"], "no record of this lineage has a parent"),
    (["chain", "short", "--controls", "9"], "leave it away"),
    (["chain", "short/9..short/4"], "not an ancestor"),
    (["chain", "short/6..short/7"], "nothing to run"),
    (["work", "/no/such/place"], "no sweep here"),
    (["status", "/"], "no sweep here"),
    (["ablate", "short/11", "--launcher", "slurm"], "no Slurm here"),
]


@pytest.mark.parametrize("args, message", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_clear_line_before_anything_starts(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PATH", "")
    if "DATA" in args:
        from common.files import default_cache
        from data.corpus import sample_corpus
        args = [str(sample_corpus(default_cache()).folder) if a == "DATA" else a for a in args]
        args += ["--set", "model.vocab_size=1257"]
    if args[0] in ("axis", "ablate", "chain"):
        args = [*args, "--runs", str(tmp_path / "runs")]
    assert call(*args) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "runs").exists()


def test_another_sweep_in_the_same_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made(tmp_path / "q", "ablate", "short/11", *TWO)
    assert call("ablate", "short/11", *TWO, "--seeds", 3, "--dir", tmp_path / "q") == 2
    assert "holds another sweep (seeds: 4 there, 3 here)" in capsys.readouterr().err


def test_a_plan_in_other_words_is_the_same_sweep(tmp_path):
    plan = made(tmp_path, "ablate", "short/11", *TWO)
    assert not queue.create(
        tmp_path, plan | {"code": "later", "skipped": [{"feature": "new", "reason": "off"}]}
    )


def test_a_checkout_that_computes_something_else_does_not_join(tmp_path):
    plan = made(tmp_path, "ablate", "short/11", *TWO)
    plan["arms"][1]["ml_hash"] = "0" * 16
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="the sweep was planned with 0000"):
        worker.Worker(tmp_path, [{}])


# ----- claims -----------------------------------------------------------------------------------------------

def foreign_claim(root, target, age_s):
    """A claim of a machine elsewhere, its last heartbeat so long ago."""
    number = queue.last_claim(root, target) + 1
    path = queue.claim_path(root, target, number)
    path.write_text(json.dumps({"host": "elsewhere", "place": "another boot", "pid": 1, "born": 1}))
    os.utime(path, (queue.server_time(root) - age_s,) * 2)
    return number


def test_a_claim_excludes_others_until_it_is_given_back(tmp_path):
    made(tmp_path, "ablate", "short/11", *TWO)
    number, _ = queue.claim(tmp_path, "t")
    assert queue.claim(tmp_path, "t") is None and queue.beat(tmp_path, "t", number)
    queue.release(tmp_path, "t", number)
    assert queue.claim(tmp_path, "t")[0] == number + 1


def test_a_stale_claim_is_taken_over_and_its_owner_learns_it(tmp_path, monkeypatch):
    made(tmp_path, "ablate", "short/11", *TWO)
    number = foreign_claim(tmp_path, "t", queue.STALE_S - 20)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # a clock that is wrong: only the disk's counts
    assert queue.claim(tmp_path, "t") is None
    os.utime(queue.claim_path(tmp_path, "t", number), (queue.server_time(tmp_path) - queue.STALE_S - 1,) * 2)
    assert queue.claim(tmp_path, "t")[0] == number + 1
    assert not queue.beat(tmp_path, "t", number) and queue.beat(tmp_path, "t", number + 1)


def test_a_claim_of_a_dead_process_of_this_machine_is_stale_at_once(tmp_path):
    made(tmp_path, "ablate", "short/11", *TWO)
    child = subprocess.Popen(["sleep", "30"])
    text = json.dumps(queue.identity() | {"pid": child.pid, "born": queue.born(child.pid)})
    queue.write_once(queue.claim_path(tmp_path, "t", 1), text)
    assert queue.claim(tmp_path, "t") is None
    child.kill()
    child.wait()
    assert queue.claim(tmp_path, "t")[0] == 2


def test_of_many_that_take_over_a_stale_claim_one_succeeds(tmp_path):
    made(tmp_path, "ablate", "short/11", *TWO)
    for k in range(20):
        foreign_claim(tmp_path, f"t{k}", 1e6)
    won, gate = [], threading.Barrier(8)

    def contend():
        gate.wait()
        won.extend(k for k in range(20) if queue.claim(tmp_path, f"t{k}"))

    threads = [threading.Thread(target=contend) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sorted(won) == list(range(20))


def test_a_result_is_written_once(tmp_path):
    assert queue.write_once(tmp_path / "a.json", "1") and not queue.write_once(tmp_path / "a.json", "2")
    assert (tmp_path / "a.json").read_text() == "1" and len(list(tmp_path.iterdir())) == 1


def test_a_worker_that_slept_gives_up_what_another_took(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("SECONDS", "30")
    made(tmp_path / "q", "ablate", "short/11", *TWO)
    said = []
    w = worker.Worker(tmp_path / "q", [{}], say=said.append)
    assert w.begin(w.look())
    run = w.running[0]
    wait_for(lambda: starts(fake))
    foreign_claim(tmp_path / "q", run.target, 0)
    run.beaten = 0
    w.attend(run)
    assert (
        not w.running and w.free == [{}] and run.process.poll() is not None
        and "another one took it" in said[0]
    )


# ----- running ----------------------------------------------------------------------------------------------

def test_a_killed_sweep_resumes_without_repeating_finished_runs(tmp_path, fake, monkeypatch):
    """SIGKILL of the whole sweep in the middle of its third run: the run dies with it, and only that one is
    lost."""
    monkeypatch.setenv("SECONDS", "0.4")
    args = command("ablate", "short/11", *TWO, "--seeds", 1, "--controls", 3, "--dir", tmp_path / "q")
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, cwd=tmp_path)
    wait_for(lambda: len(starts(fake)) == 3)
    process.kill()
    process.wait()
    child = int(fake.read_text().splitlines()[2].split()[1])
    wait_for(lambda: queue.born(child) is None, 2)
    assert len(list((tmp_path / "q/done").glob("*.json"))) == 2
    monkeypatch.setenv("SECONDS", "0")
    done = subprocess.run(args, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "going on with the queue" in done.stdout and "2 done" in done.stdout
    todo = [name for name, _, _ in queue.targets(queue.load_plan(tmp_path / "q"))]
    assert sorted(starts(fake)) == sorted([*todo, starts(fake)[2]]) and len(todo) == 5
    assert "[5/5]" in done.stdout and done.stdout.count("  seed ") == 3
    again = subprocess.run(args, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and len(starts(fake)) == 6


def test_two_workers_never_run_the_same_target(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("SECONDS", "0.05")
    plan = made(tmp_path / "q", "ablate", "short/11", *TWO, "--seeds", 2, "--controls", 4)
    both = [
        subprocess.Popen(command("work", tmp_path / "q"), stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    out = [p.communicate(timeout=60)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert (
        sorted(starts(fake)) == sorted(name for name, _, _ in queue.targets(plan)) and len(starts(fake)) == 8
    )
    assert all(text.count("  seed ") > 1 for text in out)  # both took part


def test_a_target_that_another_worker_settled_a_moment_ago_is_not_run(tmp_path, fake):
    made(tmp_path / "q", "ablate", "short/11", *TWO)
    w = worker.Worker(tmp_path / "q", [{}], say=lambda line: None)
    open_ = w.look()
    queue.write_once(tmp_path / "q/done" / f"{open_[0][0]}.json", "{}")
    assert w.begin(open_) and not w.running and queue.is_stale(tmp_path / "q", open_[0][0], 1)


def test_interrupting_gives_the_claims_back_and_stops_the_runs(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("SECONDS", "30")
    process = subprocess.Popen(command("ablate", "short/11", *TWO, "--workers", 2, "--dir", tmp_path / "q"),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(starts(fake)) == 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "goes on" in err and "Traceback" not in err
    children = [int(line.split()[1]) for line in fake.read_text().splitlines()]
    assert not any(queue.born(pid) for pid in children)
    for target in starts(fake):
        assert queue.is_stale(tmp_path / "q", target, 1)


def test_failures_are_kept_with_their_reason_and_run_again_only_with_retry(
    tmp_path, fake, monkeypatch, capsys
):
    monkeypatch.setenv("FAIL", f"--without {CAP}")
    args = ["ablate", "short/11", *TWO, "--seeds", 2, "--controls", 2, "--dir", tmp_path / "q"]
    assert call(*args) == 1
    _, failed = queue.settled(tmp_path / "q")
    assert len(failed) == 2 and {f["reason"] for f in failed.values()} == {
        "exit 1: error: the disk of the fake is full"
    }
    assert all("is full" in (tmp_path / "q/output" / f["output"]).read_text() for f in failed.values())
    out, err = capsys.readouterr()
    assert "FAILED: exit 1" in out and err.count("failed: ") == 2
    row = next(r for r in sweep_report.report(tmp_path / "q")[0]["rows"] if CAP in r["arm"])
    assert row["n"] == 0 and "2 failed (exit 1: error: the disk" in row["note"] and not row["resolved"]
    monkeypatch.delenv("FAIL")
    assert call(*args) == 1 and len(starts(fake)) == 6  # kept
    assert call(*args, "--retry") == 0 and len(starts(fake)) == 8
    assert len(list((tmp_path / "q/failed/old").iterdir())) == 2 and not list(
        (tmp_path / "q/output").iterdir()
    )


def test_a_killed_run_is_a_failure_that_says_so(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("SECONDS", "30")
    made(tmp_path / "q", "ablate", "short/11", *TWO)
    w = worker.Worker(tmp_path / "q", [{}], say=lambda line: None)
    assert w.begin(w.look())
    run = w.running[0]
    run.process.kill()
    run.process.wait()
    w.attend(run)
    assert (
        "killed by SIGKILL; out of memory, or somebody"
        in queue.settled(tmp_path / "q")[1][run.target]["reason"]
    )


def test_a_machine_on_which_everything_fails_stops(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "all")
    made(tmp_path / "q", "ablate", "short/11", *TWO, LAM, "--seeds", 3)
    assert call("work", tmp_path / "q") == 1
    assert "3 runs in a row failed" in capsys.readouterr().out and len(starts(fake)) == 3


def test_a_worker_stops_when_the_code_changes_under_it(tmp_path, fake, monkeypatch, capsys):
    made(tmp_path / "q", "ablate", "short/11", *TWO, "--seeds", 1, "--controls", 1)
    answers = iter([("", "old")] * 2)
    monkeypatch.setattr(runlog, "sources", lambda: next(answers, ("", "new")))
    assert call("work", tmp_path / "q") == 1
    assert "the trainer's code changed" in capsys.readouterr().out and len(starts(fake)) == 1
    assert call("work", tmp_path / "q") == 0 and len(starts(fake)) == 3


def test_a_diverged_run_is_a_result_that_is_not_averaged(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("DIVERGE", "1")
    assert call("ablate", "short/11", "--features", NORM, "--seeds", 1, "--dir", tmp_path / "q") == 0
    found, _ = sweep_report.report(tmp_path / "q")
    assert (
        found["rows"][0]["note"] == "1 of 1 diverged and are not in the mean"
        and found["rows"][0]["mean"] is None
    )
    assert "diverged" in capsys.readouterr().out and len(starts(fake)) == 2


def test_one_run_per_gpu_and_none_on_a_busy_one(tmp_path, fake, monkeypatch, capsys):
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\ncase $1 in *query-gpu*) printf '0, GPU-a\\n1, GPU-b\\n2, GPU-c\\n';; *) echo $BUSY;; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("BUSY", "GPU-b")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("SECONDS", "0.3")
    assert call("ablate", "short/11", *TWO, "--seeds", 1, "--controls", 2, "--dir", tmp_path / "q") == 0
    assert {line.split()[2] for line in fake.read_text().splitlines()} == {"0", "2"}
    assert call("ablate", "short/11", "--workers", 3, "--runs", tmp_path) == 2
    monkeypatch.setenv("BUSY", "GPU-a\nGPU-b\nGPU-c")
    tool.write_text(tool.read_text().replace("echo $BUSY", 'echo "$BUSY"'))
    assert call("ablate", "short/11", "--runs", tmp_path) == 2
    err = capsys.readouterr().err
    assert "2 GPUs are free" in err and "no free GPU: something runs on each of 0, 1, 2" in err


def test_threads_are_divided_and_runs_have_low_priority(tmp_path, fake, monkeypatch):
    plan = planned("ablate", "short/11", *TWO)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [s["OMP_NUM_THREADS"] for s in worker.slots(plan, 3)] == ["2"] * 3
    made(tmp_path / "q", "ablate", "short/11", *TWO)
    w = worker.Worker(tmp_path / "q", worker.slots(plan), niceness=max(15, os.nice(0)), say=lambda line: None)
    assert w.begin(w.look())
    assert w.running[0].process.wait() == 0, w.running[0].output.read_text()
    assert fake.read_text().split()[3] == str(max(15, os.nice(0)))


def test_jobs_of_submitit_work_on_the_queue(tmp_path, fake):
    done = subprocess.run(
        command(
            "ablate", "short/11", *TWO, "--seeds", 1, "--controls", 2, "--dir", tmp_path / "q", "--launcher",
            "local-submitit", "--workers", 2
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 jobs submitted" in done.stdout and "report: " in done.stdout
    assert sorted(starts(fake)) == sorted(
        name for name, _, _ in queue.targets(queue.load_plan(tmp_path / "q"))
    )


# ----- runs that exist already ------------------------------------------------------------------------------

def test_finished_runs_of_the_same_experiment_are_adopted_once(tmp_path, fake, capsys):
    assert call("ablate", "short/11", *TWO, "--seeds", 1, "--controls", 3, "--dir", tmp_path / "a") == 0
    folders = sorted((tmp_path / "a/runs").glob("2*_s0"))
    broken = folders[0] / "run.jsonl"  # the control's, first in time
    broken.write_text(broken.read_text().replace('"seed": 0', '"seed": 7'))
    args = ["ablate", "short/11", "--features", NORM, LAM, "--seeds", 1, "--controls", 3]
    assert (
        call(*args, "--dir", tmp_path / "b", "--reuse", tmp_path / "a", "--reuse", tmp_path / "a/runs") == 0
    )
    assert "adopted 3 finished runs" in capsys.readouterr().out  # controls 1 and 2, and NORM
    assert len(starts(fake)) == 5 + 2
    done, _ = queue.settled(tmp_path / "b")
    adopted = [r for r in done.values() if "adopted_from" in r]
    assert len(adopted) == 3 and all(
        (tmp_path / "b/runs" / r["folder"] / "run.jsonl").exists() for r in adopted
    )
    assert list((tmp_path / "b/runs").glob("sources-*.txt"))
    assert sweep_report.report(tmp_path / "b")[0]["adopted"] == 3
    assert call(*args, "--dir", tmp_path / "c", "--set", "schedule.steps=9", "--reuse", tmp_path / "b") == 0
    assert len(starts(fake)) == 5 + 2 + 5  # another experiment


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", 5), ("scale", "tiny"), ("numerics_version", 0), ("profiled", True), ("val_digest", "0"),
        ("corpus_digest", "0"), ("ml_hash", "0" * 16)
    ],
)
def test_a_run_that_differs_in_anything_that_counts_is_foreign(key, value):
    plan = planned("ablate", "short/11", *TWO)
    arm = plan["arms"][1]
    run = {
        "ml_hash": arm["ml_hash"], "seed": 0, "scale": "micro", "numerics_version": plan["numerics_version"],
        "profiled": False, **plan["digests"][arm["ml_hash"]]
    }
    assert not queue.foreign(run, plan, arm, 0) and f"{key} is {value}" in queue.foreign(
        run | {key: value}, plan, arm, 0
    )


def test_a_finished_run_that_its_dying_worker_did_not_record_is_not_repeated(tmp_path, fake):
    args = ["ablate", "short/11", *TWO, "--seeds", 1, "--controls", 2, "--dir", tmp_path / "q"]
    assert call(*args) == 0
    record = sorted((tmp_path / "q/done").glob("*.json"))[0]
    before = json.loads(record.read_text())
    record.unlink()
    assert call(*args) == 0 and len(starts(fake)) == 4
    assert json.loads(record.read_text())["last_hash"] == before["last_hash"]


def test_a_report_refuses_runs_that_are_not_those_recorded(tmp_path, fake):
    assert call("ablate", "short/11", *TWO, "--seeds", 1, "--controls", 2, "--dir", tmp_path / "q") == 0
    log = sorted((tmp_path / "q/runs").glob("2*/run.jsonl"))[0]
    log.write_text(
        log.read_text() .replace('"val_loss": 5', '"val_loss": 4')
        .replace('"val_loss": 4.9', '"val_loss": 4.8')
    )
    with pytest.raises(UserError, match="breaks the hash chain"):
        sweep_report.report(tmp_path / "q")


# ----- screening --------------------------------------------------------------------------------------------

def test_screening_finds_the_guilty_member_and_spares_the_innocent_group(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("EFFECTS", json.dumps({f"--without {CAP}": 0.3}))
    assert (
        call(
            "ablate", "short/11", "--features", "model.head", "model.init", "--screen", "--seeds", 2, "--dir",
            tmp_path / "q"
        )
        == 0
    )
    survivors = json.loads((tmp_path / "q/survivors.json").read_text())
    assert survivors["kept"] == ["model.head"] and survivors["dropped"] == ["model.init"]
    found, _ = sweep_report.report(tmp_path / "q")
    rows = {r["arm"]: r for r in found["rows"]}
    assert [r["arm"] for r in found["rows"] if r["resolved"]] == [
        "--without model.head (2 features)",
        f"--without {CAP}",
    ]
    spared = rows["--without model.init.zero_proj"]
    assert "not run apart" in spared["note"] and spared["n"] == 0
    assert rows["--without model.init (2 features)"]["n"] == 2 and found["complete"]
    last_group = max(
        i
        for i, t in enumerate(starts(fake))
        if t
        in [
            queue.name_of(a, s) for a in queue.load_plan(tmp_path / "q")["arms"] if a["role"] == "group"
            for s in range(2)
        ]
    )
    assert len(starts(fake)) - 1 - last_group == 2 * 2  # the members came after all groups


def quick_dunnett(cache):
    """statistics.against_control with remembered critical values: the same intervals, a thousand times
    faster."""
    def against_control(control, arms, confidence):
        groups = [np.array(control), *map(np.array, arms.values())]
        (sd, df), n, m = statistics.pooled(groups), len(groups[1]), len(control)
        key = (len(arms), n, m)
        if key not in cache:
            cache[key] = statistics.dunnett_critical(*key, confidence)
        half, rows = cache[key] * sd * (1 / n + 1 / m) ** 0.5, {}
        for name, x in zip(arms, groups[1:]):
            effect = float(x.mean() - groups[0].mean())
            rows[name] = {"effect": effect, "low": effect - half, "high": effect + half, "p": None,
                          "resolved": abs(effect) > half}
        return {"pooled_sd": sd, "df": df, "rows": rows}
    return against_control


def test_after_screening_the_intervals_still_cover_all_effects_together(monkeypatch):
    """Groups and tested members, one guilty member: any interval misses in at most 5 % of sweeps (400; 3
    sigma = 3.3 %)."""
    plan = planned(
        "ablate", "short/11", "--features", "model.attn", "model.head", "model.init", "--screen", "--seeds", 4
    )
    mde = statistics.minimal_detectable_effect(1.0, plan["seeds"], plan["controls"], len(pairs_of(plan)))
    monkeypatch.setattr(statistics, "minimal_detectable_effect", lambda sd, *a: sd * mde)
    monkeypatch.setattr(statistics, "against_control", quick_dunnett({}))
    rng, missed, kept = np.random.default_rng(0), 0, 0
    truth = {f"--without {LAM}": 1.5, "--without model.attn (6 features)": 1.5}
    for _ in range(400):
        done = results(plan, lambda a, s: truth.get(a["label"], 0) + rng.normal(), {"kept": plan["groups"]})
        survivors = sweep_report.screen(plan, done)
        done = {name: done[name] for name, _, _ in queue.targets(plan, survivors)}
        found = sweep_report.effects(plan, done)["rows"]
        missed += any(not row["low"] <= truth.get(arm["label"], 0) <= row["high"] for arm in plan["arms"]
                      if (row := found.get(arm["ml_hash"])))
        kept += "model.attn" in survivors["kept"]
    assert missed / 400 < 0.05 + 0.033 and kept / 400 > 0.8


# ----- what is concluded ------------------------------------------------------------------------------------

def noisy(plan, effects, sd=0.01, seed=0):
    """Results with normal noise and the given effects by label."""
    rng = np.random.default_rng(seed)
    return results(plan, lambda a, s: 5 + effects.get(a["label"], 0) + sd * rng.normal())


def test_effects_and_intervals_are_those_of_the_statistics_module():
    plan = planned("ablate", "short/11", "--features", NORM, LAM, CAP)
    done = noisy(plan, {f"--without {CAP}": 0.2})
    arms = {
        a["label"]: [done[queue.name_of(a, s)]["val_loss"] for s in queue.seeds_of(plan, a)]
        for a in plan["arms"]
    }
    control = arms.pop("short/11")
    expected = statistics.against_control(control, arms)
    found = sweep_report.evidence(plan, done, {}, None, "x")
    assert found["method"] == "dunnett" and len(control) == 7 and found["control"]["n"] == 7
    assert (found["pooled_sd"], found["df"]) == (expected["pooled_sd"], expected["df"])
    for row in found["rows"]:
        assert {k: row[k] for k in ("effect", "low", "high", "p")} == {
            k: expected["rows"][row["arm"]][k] for k in ("effect", "low", "high", "p")}
    assert found["mde"] == statistics.minimal_detectable_effect(expected["pooled_sd"], 4, 7, 3)
    chain = planned("chain", "short/3..short/8", "--seeds", 3)
    done = noisy(chain, {"short/4": -0.3})
    groups = {a["label"]: [done[queue.name_of(a, s)]["val_loss"] for s in range(3)] for a in chain["arms"]}
    groups.pop("short/7")
    expected = statistics.successive(
        groups,
        [("short/4", "short/3"), ("short/5", "short/4"), ("short/6", "short/5"), ("short/8", "short/6")],
    )
    found = {r["arm"]: r for r in sweep_report.evidence(chain, done, {}, None, "x")["rows"]}
    assert (
        found["short/7"]["effect"] is None and found["short/7"]["n"] == 3
        and "inert" in found["short/7"]["note"]
    )
    for name, row in expected["rows"].items():
        assert (found[name]["effect"], found[name]["p"]) == pytest.approx((row["effect"], row["p"]), rel=1e-9)
    assert found["short/4"]["parent"] == "short/3" and found["short/4"]["record"] == "short/4"


def test_branches_of_one_parent_are_compared_by_dunnett():
    """Also the effect that the plan says it can detect; the pages accept what is written."""
    plan = planned("chain", "variants")
    done = noisy(plan, {"variants/2": -0.3})
    arms = {
        a["label"]: [
            done[queue.name_of(a, s)]["val_loss"] for s in range(11 if a["label"] == "short/8" else 4)
        ]
        for a in plan["arms"]
    }
    expected = statistics.against_control(arms.pop("short/8"), arms)
    found = sweep_report.evidence(plan, done, {}, None, "x")
    assert (found["method"], found["control"]["n"], found["df"]) == ("dunnett", 11, 7 * 3 + 10)
    assert found["mde"] == statistics.minimal_detectable_effect(expected["pooled_sd"], 4, 11, 7)
    for row in found["rows"]:
        assert {k: row[k] for k in ("effect", "low", "high", "p")} == {
            k: expected["rows"][row["arm"]][k] for k in ("effect", "low", "high", "p")
        } and row["parent"] == "short/8"
    assert [r["arm"] for r in found["rows"] if r["resolved"]] == ["variants/2"]
    assert not facts.misstated(json.loads(json.dumps(found)))


def test_paired_seeds_give_the_paired_t_test_for_one_arm_and_cancel_common_shifts():
    rng = np.random.default_rng(1)
    shift = rng.normal(size=6)
    y = {
        "a": (shift + 0.1 * rng.normal(size=6)).tolist(),
        "b": (shift + 0.5 + 0.1 * rng.normal(size=6)).tolist(),
    }
    found, expected = (
        sweep_report.blocked(y, [("b", "a")], 0.95)["rows"]["b"],
        stats.ttest_rel(y["b"], y["a"]),
    )
    assert found["p"] == pytest.approx(expected.pvalue) and found["resolved"]
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    plan = planned("ablate", "short/11", *TWO, "--paired")
    assert plan["controls"] == plan["seeds"]
    done = results(plan, lambda a, s: 5 + 3 * s + 0.01 * rng.normal() + 0.1 * (CAP in a["label"]))
    rows = sweep_report.evidence(plan, done, {}, None, "x")["rows"]
    assert [r["resolved"] for r in rows] == [False, True]
    done.pop(queue.name_of(plan["arms"][1], 2))
    row = sweep_report.evidence(plan, done, {}, None, "x")["rows"][0]
    assert row["effect"] is None and "need every seed" in row["note"]


def test_paired_intervals_hold_together():
    """1000 sweeps of 5 arms and a control over 4 seeds: any of five effects is wrongly resolved in at most 5
    %."""
    rng, wrong = np.random.default_rng(2), 0
    for _ in range(1000):
        y = rng.normal(size=(6, 4)) + 5 * rng.normal(size=4)
        rows = sweep_report.blocked(
            {str(i): v for i, v in enumerate(y)}, [(str(i), "0") for i in range(1, 6)], 0.95
        )["rows"]
        wrong += any(r["resolved"] for r in rows.values())
    assert 0.02 < wrong / 1000 < 0.05 + 3 * (0.05 * 0.95 / 1000) ** 0.5


def test_unresolved_rows_say_so_and_have_no_rank():
    plan = planned("ablate", "short/11", "--features", NORM, LAM, CAP)
    found = sweep_report.evidence(
        plan, noisy(plan, {f"--without {LAM}": 0.1, f"--without {CAP}": 0.3}), {}, None, "x"
    )
    ranks = sweep_report.ranked(found)
    assert [(rank, row["arm"]) for rank, row in ranks] == [(1, f"--without {CAP}"), (2, f"--without {LAM}"),
                                                           (None, f"--without {NORM}")]
    texts = [sweep_report.effect_text(row) for _, row in ranks]
    half = (ranks[2][1]["high"] - ranks[2][1]["low"]) / 2
    assert texts[2] == f"unresolved (+-{half:.4f})" and texts[0].startswith("+0.29")


def test_ranks_go_from_the_most_helpful_down_and_a_chain_keeps_its_order():
    plan = planned("axis", "short/11", "optim.muon.lr=0.01,0.02,0.03", "--seeds", 4)
    found = sweep_report.evidence(
        plan, noisy(plan, {"optim.muon.lr=0.01": 0.2, "optim.muon.lr=0.03": -0.2}), {}, None, "x"
    )
    ranks = [(rank, row["arm"][-4:]) for rank, row in sweep_report.ranked(found)]
    assert ranks == [(1, "0.03"), (2, "0.01"), (None, "0.02")]
    plan = planned("chain", "short/3..short/6", "--seeds", 4)
    found = sweep_report.evidence(plan, noisy(plan, {"short/5": -0.2, "short/6": -0.5}), {}, None, "x")
    ranks = [(rank, row["arm"]) for rank, row in sweep_report.ranked(found)]
    assert ranks == [(None, "short/4"), (2, "short/5"), (1, "short/6")]


def test_an_arm_that_changes_no_bit_is_told_apart_from_one_with_a_small_effect():
    plan = planned("ablate", "short/11", *TWO)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=9)
    done = results(plan, lambda a, s: 5 + noise[s] + (1e-9 if CAP in a["label"] else 0))
    notes = {r["arm"]: r["note"] for r in sweep_report.evidence(plan, done, {}, None, "x")["rows"]}
    assert "to the last bit" in notes[f"--without {NORM}"] and not notes[f"--without {CAP}"]


def test_an_arm_much_noisier_than_the_pool_is_marked():
    plan = planned("ablate", "short/11", "--features", NORM, LAM, CAP)
    rng = np.random.default_rng(0)
    done = results(plan, lambda a, s: 5 + (0.3 if LAM in a["label"] else 0.01) * rng.normal())
    notes = {r["arm"]: r["note"] for r in sweep_report.evidence(plan, done, {}, None, "x")["rows"]}
    assert "times the pooled one" in notes[f"--without {LAM}"] and not notes[f"--without {NORM}"]


def test_one_run_an_arm_gives_effects_without_intervals():
    plan = planned("ablate", "short/11", "--features", NORM, "--seeds", 1)
    row = sweep_report.evidence(plan, results(plan, lambda a, s: 5.0), {}, None, "x")["rows"][0]
    assert row["effect"] == 0 and row["low"] is None and not row["resolved"] and "one run each" in row["note"]


def test_the_report_is_complete_in_all_its_forms(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("EFFECTS", json.dumps({f"--without {CAP}": 0.3}))
    monkeypatch.setattr(sweep_report, "earlier_sd", lambda plan: None)
    assert call("ablate", "short/11", *TWO, "--seeds", 2, "--dir", tmp_path / "q", "--cost-per-hour", 36) == 0
    said = capsys.readouterr().out
    assert "minimal detectable effect: 4.02 sd" in said and "from the sd" in said and ", cost 0.00" in said
    assert call("report", tmp_path / "q", "--out", tmp_path / "evidence/abl") == 0
    found = json.loads((tmp_path / "evidence/abl.json").read_text())
    assert (
        found["name"] == "abl" and found["kind"] == "ablate" and found["complete"] and found["version"] == 1
    )
    run = found["rows"][0]["runs"][0]
    assert (
        set(run) == {"seed", "val_loss", "train_time_ms", "ml_hash", "last_hash"}
        and len(found["rows"][0]["runs"]) == 2
    )
    links = runlog.read_links(next((tmp_path / "q/runs").glob(f"*_{run['ml_hash'][:8]}_s0")) / "run.jsonl")
    assert links[-1][1] == run["last_hash"] and found["code"] == ["c" * 40] and found["hardware"] == "fake"
    lines = (tmp_path / "evidence/abl.csv").read_text().splitlines()
    assert lines[0].startswith("rank,arm,") and lines[1].startswith(f"1,--without {CAP}") and len(lines) == 3
    assert "unresolved (+-" in (tmp_path / "evidence/abl.md").read_text()
    assert (tmp_path / "evidence/abl.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    assert call("status", tmp_path / "q") == 0
    assert "7 of 7 runs done, 0 failed" in capsys.readouterr().out


def test_an_unfinished_sweep_is_called_incomplete(tmp_path, capsys):
    plan = made(tmp_path / "q", "ablate", "short/11", *TWO)
    done = dict(list(noisy(plan, {}).items())[:9])
    found = sweep_report.evidence(plan, done, {}, None, "x")
    assert not found["complete"] and sweep_report.headline(found).startswith("INCOMPLETE")
    assert call("report", tmp_path / "q") == 2 and "no run has finished yet" in capsys.readouterr().err


def test_the_sd_of_earlier_sweeps_of_the_same_kind_of_run_is_pooled(tmp_path):
    plan = planned("ablate", "short/11", *TWO)
    for name, sd, more in (
        ("a", 0.01, {}), ("b", 0.03, {}), ("c", 1.0, {"scale": "tiny"}), ("d", 1.0, {"common": ["x"]})
    ):
        found = sweep_report.evidence(plan, noisy(plan, {}, sd=sd), {}, None, name) | more
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    (tmp_path / "other.json").write_text("[1]")
    sd, df, names = sweep_report.earlier_sd(plan, tmp_path)
    a, b = (json.loads((tmp_path / f"{n}.json").read_text()) for n in "ab")
    assert names == ["a.json", "b.json"] and df == a["df"] + b["df"]
    assert sd ** 2 * df == pytest.approx(a["pooled_sd"] ** 2 * a["df"] + b["pooled_sd"] ** 2 * b["df"])
    assert sweep_report.earlier_sd(plan, tmp_path / "none") is None


# ----- in earnest -------------------------------------------------------------------------------------------

def test_a_real_sweep_killed_once_is_resumed_and_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args = command(
        "ablate", "short/11", "--features", NORM, "--seeds", 1, "--controls", 1, "--dir", tmp_path / "q",
        "--set", "schedule.steps=3", "--set", "validation.tokens=4096"
    )
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL)
    runs = tmp_path / "q/runs"
    wait_for(lambda: len(list(runs.glob("2*"))) == 2, 60)
    process.kill()
    process.wait()
    finished = [p for p in runs.glob("2*") if (p / "summary.json").exists()]
    done = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "report: " in done.stdout and len(list(runs.glob("2*"))) == 3 and len(finished) == 1
    found = json.loads(next((tmp_path / "q").glob("ablate*.json")).read_text())
    assert found["complete"] and found["rows"][0]["effect"] is not None and found["failed"] == 0
    assert schema.ml_hash(deltas.resolve("short/11", scale="micro", without=["model.embed.norm"], sets=[
        "schedule.steps=3", "validation.tokens=4096"]).settings) == found["rows"][0]["runs"][0]["ml_hash"]
