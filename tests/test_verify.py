"""Laws of `records verify`: one good claim, every way to bend it that logs can show, and what they cannot."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deltas
import runlog
import schedule
from claim_builder import MACHINE, Forgery, arm, build, declaration
from records.claims import claim_laws, provenance, run_laws, verify
from settings import UserError

ROOT = Path(__file__).parent.parent
TARGET = ["validation.target=5.2"]


def two_arms(new="short/11", parent="short/10", sets=TARGET):
    return {"new": arm(new, sets), "parent": arm(parent, sets)}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good ml claim of short/11: four runs of each arm."""
    with pytest.MonkeyPatch.context() as patch:
        return build(tmp_path_factory.mktemp("claim") / "good", patch, declaration(two_arms()))


@pytest.fixture
def claim(good, tmp_path):
    """The good claim, to be forged."""
    shutil.copytree(good, tmp_path / "claim")
    return Forgery(tmp_path / "claim")


def test_the_good_claim_is_consistent_and_shown(good):
    results = verify.verify(good)
    assert results["problems"] == [] and results["reasons"] == []
    assert (results["verdict"], results["grade"]) == ("shown", "consistent")
    assert results["statistics"]["target"]["p"] < 0.01 and results["statistics"]["time"]["p_less"] < 0.01


def test_sealing_again_without_an_edit_changes_nothing(claim):
    paths = [p for p in sorted(claim.folder.rglob("*")) if p.is_file() and p.suffix != ".json"]
    before = [p.read_bytes() for p in paths]
    claim.seal()
    assert before == [p.read_bytes() for p in paths]
    assert verify.verify(claim.folder)["verdict"] == "shown"


# ----- one artefact bent, everything else sealed again: refused, and for its own reason --------------------------------

MUTATIONS = []


def refused(reason):
    """Register a mutation of the claim; every problem that is found must match the reason."""
    def add(function):
        MUTATIONS.append(pytest.param(function, reason, id=function.__name__))
        return function
    return add


# times

@refused(r"time taken off the clock: 10\.\d s that are not training")
def time_lowered(c):
    for event in c.events(3)[-3:]:
        if "train_time_ms" in event:
            event["train_time_ms"] -= 10_000
    c.seal()


@refused(r"negative training time")
def negative_time(c):
    c.events(3, "validation")[0]["train_time_ms"] = -4.0
    c.seal()


@refused(r"training time goes back|\d+ ms of training in \d+ ms of wall time")
def time_goes_back(c):
    a, b = c.events(3, "validation")[3:5]
    b["train_time_ms"] = a["train_time_ms"] - 5
    c.seal()


@refused(r"arm new: time taken off the clock: 5\.\d s beside the training at each validation|"
         r"runs/\S+ validation of step \d+: time taken off the clock: 5\.\d s")
def time_taken_off_every_interval(c):
    """The theft is the usual rest of these runs: the shortest one, of step 0, and the other arm tell it."""
    for run in c.counted("new"):
        taken = {v["step"]: 0.3 * v["train_time_ms"] for v in c.events(run, "validation")}
        for event in c.events(run):
            if "train_time_ms" in event:
                event["train_time_ms"] -= taken[event.get("step", 72)]
    c.seal()


@refused(r"arm new: time taken off the clock: 5\.\d s beside the training at each validation, arm parent 0\.\d s "
         "for the same")
def validations_slower_in_one_arm_only(c):
    """Time is taken off every interval, and step 0 is made as slow, so that no interval of a run stands out."""
    for run in c.counted("new"):
        validations, last = c.events(run, "validation"), 0.0
        for v in validations[1:]:
            last = 5000.0 * validations.index(v)
            v["train_time_ms"] -= last
        c.events(run, "end")[0]["train_time_ms"] -= last
        c.stretch(run, "validation", 5000)
    c.seal()


def hours(c, runs, kind, field):
    """An hour on the clock of start or warm-up, and in the wall time of all that follows."""
    for run in runs:
        c.events(run, "reset")[0][field] += 3_600_000
        c.stretch(run, kind, 3_600_000)
    c.seal()


@refused(r"arm new: work before the clock: its start takes 3601 s, that of arm parent 1 s, and the manifest does "
         "not say why")
def an_hour_before_the_warm_up_of_one_arm(c):
    hours(c, [e["run"] for e in c.of("register") if e["arm"] == "new"], "probe", "start_ms")


@refused(r"arm new: work before the clock: its warm-up takes 3600 s, that of arm parent 0 s, and the manifest does "
         "not say why")
def an_hour_of_warm_up_in_one_arm(c):
    hours(c, [e["run"] for e in c.of("register") if e["arm"] == "new"], "reset", "warmup_ms")


@refused(r"runs/\S+: work before the clock: its warm-up took 3600 s, the shortest of arm new 0 s")
def an_hour_of_warm_up_in_one_run(c):
    hours(c, c.counted("new")[2:3], "reset", "warmup_ms")


@refused(r"ms of training in \d+ ms of wall time")
def more_training_than_wall_time(c):
    for event in c.events(3)[-3:]:
        if "train_time_ms" in event:
            event["train_time_ms"] += 30_000
    c.seal()


@refused(r"wall time goes back")
def wall_time_goes_back(c):
    c.events(3, "stream")[0]["wall_ms"] = 5.0
    c.seal()


@refused(r"validation of step 0: work before the clock: 60\.1 s")
def work_before_the_clock(c):
    c.stretch(3, "validation", 60_000)
    c.seal()


@refused(r"work before the clock: .* start \(0\.8 s\) and warm-up \(0\.4 s\) do not account")
def work_before_the_warm_up(c):
    c.stretch(3, "reset", 60_000)
    c.seal()


@refused(r"3000 ms on the clock before the first step|are not training|training in")
def a_clock_that_runs_before_the_first_step(c):
    for event in c.events(3):
        if "train_time_ms" in event:
            event["train_time_ms"] += 3000
    c.stretch(3, "validation", 3000)
    c.seal()


# losses

@refused(r"end: val_loss 5\.\d+, its last validation says")
def loss_of_the_end_lowered(c):
    c.events(3, "end")[0]["val_loss"] -= 0.01
    c.seal()


@refused(r"ends with hash \w+, the manifest says \w+: it was changed after the run")
def loss_lowered_after_the_run(c):
    c.events(3, "validation")[-1]["val_loss"] = c.events(3, "end")[0]["val_loss"] = 5.1
    c.events(3, "end")[0]["verdict"] = ["final validation loss 5.1000"]
    c.seal(hashes=False, announce=False)


@refused(r"validation of step 36: train_loss\[2\] is nan, in a run that says it did not diverge")
def hidden_nan(c):
    c.events(3, "validation")[4]["train_loss"][2] = math.nan
    c.seal()


@refused(r"probe of step 2: gradients\.blocks\.3\.mlp\.up\[0\] is inf")
def hidden_infinite_gradient(c):
    c.events(3, "probe")[0]["gradients"]["blocks.3.mlp.up"][0] = math.inf
    c.seal()


@refused(r"val_loss = -0\.5 is no loss")
def implausible_loss(c):
    c.events(3, "validation")[2]["val_loss"] = -0.5
    c.seal()


@refused(r"8 training losses for 9 steps")
def a_training_loss_left_out(c):
    c.events(3, "validation")[4]["train_loss"].pop()
    c.seal()


@refused(r"reached is False, loss 5\.\d+ against target 5\.2 is True")
def verdict_turned(c):
    c.events(3, "end")[0]["reached"] = False
    c.seal()


@refused(r"its verdict tells another loss")
def verdict_of_another_loss(c):
    c.events(3, "end")[0]["verdict"] = ["target 5.2 REACHED: 5.0001 after 72 steps"]
    c.seal()


# steps

@refused(r"stopped at step 63 of 72: the settings fix the number of steps|end: scheduled")
def stopped_when_the_loss_was_good(c):
    events = c.logs[c.name(3)]
    events.remove(c.events(3, "validation")[-1])
    last, end = c.events(3, "validation")[-1], c.events(3, "end")[0]
    end |= {k: last[k] for k in ("val_loss", "train_time_ms", "tokens")} | {"steps": 63, "reached": last["val_loss"] <= 5.2}
    end["verdict"] = [f"final validation loss {last['val_loss']:.4f}"]
    for i, event in enumerate(events[-2:]):
        event["wall_ms"] = last["wall_ms"] + 1 + i
    c.seal()


@refused(r"validation: not at the steps of the settings \(every 9 of 72\), the first other one is 40")
def an_extra_look_at_the_loss(c):
    events, after = c.logs[c.name(3)], c.events(3, "validation")[5]
    extra = {**after, "step": 40, "train_loss": after["train_loss"][:4], "tokens": 40 * 1024,
             "train_time_ms": after["train_time_ms"] - 10_000, "wall_ms": after["wall_ms"] - 10_000}
    after["train_loss"] = after["train_loss"][4:]
    after["wall_ms"] += 110
    for event in events[events.index(after) + 1:]:
        event["wall_ms"] += 110
    events.insert(events.index(after), extra)
    c.seal()


@refused(r"(validation of step 72|end): (tokens )?73729")
def tokens_miscounted(c):
    c.events(3, "validation")[-1]["tokens"] = c.events(3, "end")[0]["tokens"] = 73_729
    c.seal()


@refused(r"epoch goes back from 1 to 0")
def epoch_goes_back(c):
    c.events(3, "validation")[2]["epoch"] = 1
    c.seal()


# warm-up

@refused(r"the warm-up leaked: state \w+ before it")
def leaking_warm_up(c):
    c.events(3, "reset")[0]["state_after"] = "f" * 64
    c.seal()


@refused(r"40 warm-up steps, the settings say 3")
def a_longer_warm_up(c):
    c.events(3, "reset")[0]["warmup_steps"] = 40
    c.seal()


@refused(r"probe missing")
def probe_left_out(c):
    c.logs[c.name(3)].remove(c.events(3, "probe")[0])
    c.seal()


@refused(r"probe of step 2 on real tokens, the settings say step 2 on random tokens")
def probe_of_other_tokens(c):
    c.events(3, "probe")[0]["tokens"] = "real"
    c.seal()


@refused(r"seed \d starts from the very state of seed \d")
def two_seeds_one_state(c):
    a, b = c.counted()[:2]
    state = c.events(a, "reset")[0]["state_after"]
    c.events(b, "reset")[0] |= {"state_before": state, "state_after": state}
    c.seal()


# data

@refused(r"val_digest .* differs from that of the other runs|val_digest bbbb.* other tokens")
def other_validation_tokens(c):
    c.events(3, "start")[0]["val_digest"] = "b" * 64
    c.seal()


@refused(r"val_digest bbbbbbbbbbbb, that of the corpus 'sample' is \w+: other tokens")
def other_validation_tokens_in_all_runs(c):
    for events in c.logs.values():
        events[0]["val_digest"] = "b" * 64
    c.seal()


@refused(r"corpus_digest cccc.* (differs from that of the other runs|other tokens)")
def other_corpus_in_one_run(c):
    c.events(3, "start")[0]["corpus_digest"] = "c" * 64
    c.seal()


@refused(r"corpus_digest cccccccccccc, that of the corpus 'sample' is \w+: other tokens")
def other_corpus_in_all_runs(c):
    for events in c.logs.values():
        events[0]["corpus_digest"] = "c" * 64
    c.seal()


@refused(r"stream_digest .* differs from that of the other runs")
def other_order_of_tokens(c):
    c.events(3, "stream")[0]["digest"] = "d" * 64
    c.seal()


# settings and code

@refused(r"settings hash to ml_hash \w+, logged \w+: they were edited|settings differ from those declared .*: optim.muon.lr")
def settings_edited_in_a_log(c):
    run = c.counted()[0]
    c.events(run, "start")[0]["settings"]["optim"]["muon"]["lr"] = 0.05
    c.seal()


@refused(r"arm new: short/11 .* resolves to other settings here: optim.muon.lr")
def settings_edited_everywhere(c):
    new = c.lines[0]["arms"]["new"]
    new["settings"]["optim"]["muon"]["lr"] = 0.05
    new["ml_hash"] = deltas.ml_hash(deltas.from_plain(new["settings"]))
    for run in [e["run"] for e in c.of("register") if e["arm"] == "new"]:
        c.events(run, "start")[0] |= {"settings": new["settings"], "ml_hash": new["ml_hash"]}
    c.seal()


@refused(r"settings hash to system_hash \w+, logged \w+: they were edited")
def system_settings_edited(c):
    for a in c.lines[0]["arms"].values():
        a["settings"]["system"]["compile"] = "on"
        a["changes"].append("--set system.compile=on")
    for register in c.of("register"):
        a = c.lines[0]["arms"][register["arm"]]
        c.events(register["run"], "start")[0] |= {"settings": a["settings"], "changes": a["changes"]}
    c.seal()


@refused(r"settings hold unknown names \['colour'\]")
def settings_of_another_vocabulary(c):
    c.lines[0]["arms"]["new"]["settings"]["colour"] = "red"
    for register in c.of("register"):
        c.events(register["run"], "start")[0]["settings"] = c.lines[0]["arms"][register["arm"]]["settings"]
    c.seal()


@refused(r"sources-\w+\.txt: its text hashes to \w+: the sources were swapped")
def sources_swapped(c):
    path = next(c.folder.glob("runs/sources-*.txt"))
    path.write_text(path.read_text().replace("def train_step", "def train_step_"))


@refused(r"sources-\w+\.txt: missing")
def sources_missing(c):
    next(c.folder.glob("runs/sources-*.txt")).unlink()


@refused(r"sources \(arm \w+\) \w+ differs from that of the other runs")
def sources_of_another_program_in_one_run(c):
    text = "# ----- train_gpt.py\nprint('step:72/72 val_loss:3.0')\n"
    (c.folder / f"runs/sources-{runlog.source_hash(text)}.txt").write_text(text)
    c.events(3, "start")[0]["sources"] = runlog.source_hash(text)
    c.seal()


@refused(r"ran uncommitted changes \(code 111111111111-dirty\)")
def dirty_code(c):
    c.events(3, "start")[0]["code"] += "-dirty"
    c.seal()


@refused(r"arm new: declared with uncommitted changes|ran uncommitted changes")
def dirty_code_declared(c):
    c.lines[0]["arms"]["new"]["dirty"] = "e" * 64
    for run in [e["run"] for e in c.of("register") if e["arm"] == "new"]:
        c.events(run, "start")[0]["code"] += "-dirty"
    c.seal()


@refused(r"code 333333333333, arm \w+ was declared at 111111111111")
def code_of_another_commit(c):
    c.events(3, "start")[0]["code"] = "3" * 40
    c.seal()


@refused(r"profiled run")
def profiled_run(c):
    c.events(3, "start")[0]["profiled"] = True
    c.seal()


@refused(r"numerics version 7, here 1|numerics_version 7 differs")
def another_numerics_version(c):
    c.events(3, "start")[0]["numerics_version"] = 7
    c.seal()


@refused(r"log version 1, this program reads version 2")
def another_log_version(c):
    c.events(3, "start")[0]["log_version"] = 1
    c.seal()


@refused(r"(changes|settings).*--set optim.muon.lr=0.03|arm new runs with")
def an_assisted_run(c):
    run = c.counted()[0]
    c.events(run, "start")[0]["changes"] = [*c.events(run, "start")[0]["changes"], "--set optim.muon.lr=0.03"]
    c.seal()


@refused(r"attention \(arm \w+\) dense differs from that of the other runs")
def a_kernel_that_fell_back_in_one_run(c):
    c.events(3, "start")[0]["attention"] = "dense"
    c.seal()


@refused(r"machine 'ffff.*|machine ffffffffffff differs")
def a_run_from_another_machine(c):
    c.events(3, "start")[0]["machine"] = "ffffffffffff"
    c.seal()


@refused(r"torch 2\.14.* differs from that of the other runs")
def a_run_with_another_torch(c):
    c.events(3, "start")[0]["torch"] = "2.14.0"
    c.seal()


# files

@refused(r"log\.txt: line \d+ is not what run\.jsonl renders to: the text was edited")
def text_log_edited_only(c):
    path = c.folder / "runs" / c.name(3) / "log.txt"
    path.write_text(path.read_text().replace("step:72/72 val_loss:5", "step:72/72 val_loss:4"))


@refused(r"summary\.json: val_loss not as in run\.jsonl: the summary was edited")
def summary_edited_only(c):
    path = c.folder / "runs" / c.name(3) / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "val_loss": 4.9}))


@refused(r"summary\.json: missing or not whole JSON")
def half_written_summary(c):
    path = c.folder / "runs" / c.name(3) / "summary.json"
    path.write_bytes(path.read_bytes()[:400])


@refused(r"run\.jsonl: truncated: it ends with the event 'validation', the run finished")
def truncated_log(c):
    c.logs[c.name(3)] = c.logs[c.name(3)][:-3]
    c.seal()


@refused(r"run\.jsonl: line 12 is not a complete log line")
def half_a_line_at_the_end(c):
    path = c.folder / "runs" / c.name(3) / "run.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:12])[:-50])


@refused(r"run\.jsonl: holds 2 start events: 2 logs in one file")
def two_logs_in_one_file(c):
    c.logs[c.name(3)] = [*c.logs[c.name(3)], *(dict(e) for e in c.logs[c.name(4)])]
    c.seal()


@refused(r"run\.jsonl: its events are out of order: start reset probe")
def events_out_of_order(c):
    events = c.logs[c.name(3)]
    events[1], events[2] = events[2], events[1]
    c.seal()


@refused(r"run\.jsonl: line 6 \(validation\) breaks the hash chain")
def one_line_edited(c):
    path = c.folder / "runs" / c.name(3) / "run.jsonl"
    lines = path.read_text().splitlines(True)
    path.write_text("".join(lines[:5]) + lines[5].replace('"epoch": 0', '"epoch": 1') + "".join(lines[6:]))


# the plan

@refused(r"runs/\S+: missing: the manifest has it as run 3")
def a_run_is_missing(c):
    shutil.rmtree(c.folder / "runs" / c.name(3))


@refused(r"runs are missing: 8 of 9 declared runs are made")
def the_last_run_was_never_made(c):
    shutil.rmtree(c.folder / "runs" / c.name(8))
    del c.logs[c.name(8)]
    c.lines = c.lines[:-2]
    c.seal()


@refused(r"a run is missing: run 8 is registered and nothing says what became of it")
def the_last_run_was_never_booked(c):
    shutil.rmtree(c.folder / "runs" / c.name(8))
    del c.logs[c.name(8)]
    c.lines = c.lines[:-1]
    c.seal()


@refused(r"runs/extra: no registered run of the manifest")
def a_run_too_many(c):
    shutil.copytree(c.folder / "runs" / c.name(3), c.folder / "runs" / "extra")


@refused(r"was not announced by the manifest: it names entry 'aaaaaaaaaaaa', run 3 is")
def a_run_outside_the_manifest(c):
    c.events(3, "start")[0]["registered"] = "a" * 64
    c.seal(announce=3)


@refused(r"manifest\.jsonl: line 1 \(declare\) breaks the hash chain")
def manifest_edited(c):
    path = c.folder / "manifest.jsonl"
    path.write_text(path.read_text().replace('"target": 5.2', '"target": 5.3', 1))


@refused(r"was not announced by the manifest|target 5\.3, the settings of arm new say 5\.2")
def manifest_written_anew_after_the_runs(c):
    c.lines[0]["target"] = 5.3
    c.seal(announce=False)


@refused(r"manifest\.jsonl: line 1 \(declare\): order: 4 runs of \w+, the plan says 3")
def fewer_runs_planned_afterwards(c):
    c.lines[0]["plan"] = {"runs": 3}
    c.seal()


@refused(r"line 2 \(register, .*\) is dated before line 1 \(declare, ")
def declared_after_the_first_run(c):
    c.later(0, 600, manifest_only=True)
    c.later(1, -600, manifest_only=True)
    c.seal()


@refused(r"began before it was registered")
def the_whole_manifest_written_later(c):
    c.later(0, 86_400, manifest_only=True)
    c.seal()


@refused(r"ran for \d+ s from .*, but the manifest has it finished at")
def a_run_longer_than_its_place_in_the_plan(c):
    c.events(3, "end")[0]["wall_ms"] += 50_000
    c.seal()


@refused(r"line 2 \(register\): the declared order has")
def runs_registered_in_another_order(c):
    a, b = c.of("register")[0], c.of("register")[3]
    for key in ("arm", "seed", "discard"):
        a[key], b[key] = b[key], a[key]
    c.seal()


@refused(r"the order of runs and their seeds are not what order_seed 8 draws")
def order_picked_by_hand(c):
    c.lines[0]["order_seed"] = 8
    c.seal()


@refused(r"seed 77, the plan has seed \d for run 3")
def seed_outside_the_plan(c):
    c.events(3, "start")[0]["seed"] = 77
    c.seal()


@refused(r"a copy")
def a_run_copied_under_another_seed(c):
    a, b = c.counted()[:2]
    start = dict(c.events(b, "start")[0])
    c.logs[c.name(b)] = [start, *(dict(e) for e in c.events(a)[1:])]
    c.seal()


@refused(r"has the very losses of seed \d|starts from the very state of seed \d")
def a_run_copied_with_new_times(c):
    a, b = c.counted()[:2]
    for mine, theirs in zip(c.events(b), c.events(a)):
        if mine["kind"] != "start":
            times = {k: v for k, v in mine.items() if k.endswith("_ms")}
            mine.clear()
            mine.update({**theirs, **times})
    c.seal()


@refused(r"excluded by a fault \(killed\), but it diverged|: says diverged, the manifest says failed")
def a_diverged_run_dropped_by_a_fault(c):
    run = c.counted()[1]
    c.again(run)
    c.events(run, "end")[0] |= {"status": "diverged", "reached": None, "verdict": []}
    c.of("finish", run)[0]["status"] = "failed"
    c.seal()


@refused(r"excluded by a fault \(killed\), but it finished")
def a_poor_run_killed_after_its_last_validation(c):
    run = c.counted()[1]
    c.again(run)
    c.logs[c.name(run)] = c.events(run)[:-2]
    c.of("finish", run)[0]["status"] = "failed"
    c.seal()


@refused(r"line \d+ \(fault\): run \d finished: a run that told its loss always counts")
def a_finished_run_dropped_by_a_fault(c):
    c.again(c.counted()[1])
    c.seal()


@refused(r"line 1 \(declare\): the alphas of all looks must add up to alpha")
def alphas_that_sum_to_more(c):
    c.lines[0]["plan"] = {"looks": [{"runs": 2, "alpha": 0.01}, {"runs": 4, "alpha": 0.01}]}
    c.seal()


@refused(r"the last declared look \(4 runs\) was not taken")
def a_look_that_was_not_booked(c):
    c.lines[0]["plan"] = {"looks": [{"runs": 2, "alpha": 0.005}, {"runs": 4, "alpha": 0.005}]}
    c.seal()


# the rules of a record

@refused(r"alpha 0\.05: a record needs 0\.01 or less")
def a_generous_alpha(c):
    c.lines[0]["alpha"] = 0.05
    c.seal()


@refused(r"margin 0\.1: a record may lose 0\.002 nats at most")
def a_generous_margin(c):
    c.lines[0]["margin"] = 0.1
    c.seal()


@refused(r"claims short/10, arm new runs short/11|arm parent runs short/10, the parent of short/10 is short/9")
def another_record_claimed(c):
    c.lines[0]["record"] = "short/10"
    c.seal()


@refused(r"claims systems, but new and parent differ in model\.residual\.unet_skips")
def an_ml_change_called_systems(c):
    c.lines[0]["claim"] = "systems"
    c.seal()


@refused(r"arm parent runs with --set validation\.target=5\.2 --set optim\.muon\.lr=\S+: a record runs as it is")
def a_parent_with_changes_of_its_own(c):
    """Record 10 has this rate already, so that nothing but the rule is against it."""
    parent = c.lines[0]["arms"]["parent"]
    parent["changes"] = [*parent["changes"], f"--set optim.muon.lr={parent['settings']['optim']['muon']['lr']}"]
    for register in c.of("register"):
        if register["arm"] == "parent":
            c.events(register["run"], "start")[0]["changes"] = parent["changes"]
    c.seal()


@refused(r"arm parent is a script: nothing shows its data and settings")
def a_script_as_parent(c):
    c.lines[0]["arms"]["parent"] |= {"kind": "script"}
    for register in c.of("register"):
        if register["arm"] == "parent":
            shutil.rmtree(c.folder / "runs" / c.name(register["run"]))
            log = c.folder / "runs" / c.name(register["run"]) / "log.txt"
            log.parent.mkdir()
            log.write_text("step:0/72 val_loss:7.15 train_time:0ms step_avg:0ms\nstep:72/72 val_loss:5.27 "
                           f"train_time:{170000 + register['run']}ms step_avg:1ms\n")
            del c.logs[c.name(register["run"])]
            c.of("finish", register["run"])[0]["last_hash"] = hashlib.sha256(log.read_bytes()).hexdigest()
    c.seal()


@refused(r"scale 'micro', declared 'full'|arm \w+ has scale micro, declared full|arm \w+ runs with --set|"
         r"at scale full a record is measured|arm \w+: short/1\d at scale full")
def a_scale_the_runs_do_not_have(c):
    c.lines[0]["scale"] = "full"
    c.seal()


@refused(r"scale 'micro', declared 'full'|arm \w+: short/1\d at scale full|arm \w+ runs with --set|a record is measured on")
def a_scale_that_every_arm_declares_and_no_run_has(c):
    c.lines[0]["scale"] = "full"
    for a in c.lines[0]["arms"].values():
        a["scale"] = "full"
    c.seal()


@refused(r"preset 'easy', arm \w+ was declared with ''")
def a_preset_that_was_not_declared(c):
    c.events(3, "start")[0]["preset"] = "easy"
    c.seal()


@refused(r"(cpu 'test processor', declared 'another processor'|cores 2, declared 64)")
def another_processor_declared(c):
    c.lines[0]["machine"] |= {"cpu": "another processor", "cores": 64}
    c.seal()


@refused(r"ran on 'CPU, 1 process, 1 threads', declared the GPUs \['NVIDIA H100', 'NVIDIA H100'\]")
def gpus_declared_over_runs_of_a_cpu(c):
    c.lines[0]["machine"]["gpus"] = ["NVIDIA H100"] * 2
    c.seal()


@refused(r"record\.toml.* of the claim and of 011_unet_double_lr differ in people")
def people_of_a_known_record_changed(c):
    text = (deltas.find_record("short/11").folder / "record.toml").read_text()
    (c.folder / "record.toml").write_text(re.sub("(?m)^people = .*", 'people = ["@thief"]', text))


@refused(r"code\.diff: is not the one that was declared")
def a_code_diff_that_was_not_declared(c):
    (c.folder / "code.diff").write_text("lies")


@refused(r"code\.diff: missing")
def a_declared_code_diff_left_out(c):
    c.lines[0]["code_diff"] = "0" * 64
    c.seal()


@refused(r"runs/notes\.txt: neither a run nor the sources of one: remove it")
def a_file_lying_loose_in_runs(c):
    (c.folder / "runs/notes.txt").write_text("these runs were the best of twenty")


@refused(r"runs/sources-ffffffffffffffff\.txt: neither a run nor the sources of one")
def sources_that_no_run_names(c):
    (c.folder / "runs/sources-ffffffffffffffff.txt").write_text("x")


@refused(r"README\.md: is not the page of these results")
def a_page_edited_by_hand(c):
    verify.store(c.folder, verify.verify(c.folder), page=True)
    path = c.folder / "README.md"
    path.write_text(path.read_text().replace("0.8", "0.5"))


@refused(r"line 1 \(declare\): confidence 1\.5|confidence must lie between 0 and 1")
def a_confidence_that_is_none(c):
    c.lines[0]["confidence"] = 1.5
    c.seal()


@refused(r"processes 1, declared 8")
def more_processes_declared(c):
    c.lines[0]["processes"] = 8
    c.seal()


@refused(r"arms new, old: a record is claimed with new and parent")
def no_parent(c):
    c.lines[0]["arms"]["old"] = c.lines[0]["arms"].pop("parent")
    for event in [*c.lines[0]["order"], *c.of("register")]:
        event["arm"] = event["arm"].replace("parent", "old")
    c.seal()


@pytest.mark.parametrize("bend, reason", MUTATIONS)
def test_a_bent_claim_is_refused_for_its_own_reason(bend, reason, claim):
    bend(claim)
    results = verify.verify(claim.folder)
    assert results["verdict"] == "refused" and results["problems"]
    assert [p for p in results["problems"] if not re.search(reason, p)] == [], results["problems"]
    assert all("\n" not in p for p in results["problems"])


# ----- consistent, but does it carry the claim? -------------------------------------------------------------------------

def built(folder, arms=None, loss=None, step_ms=None, status=None, look=None, machine=MACHINE, **fields):
    """Results of verifying a claim that was built so."""
    with pytest.MonkeyPatch.context() as patch:
        declared = declaration(arms or two_arms(), **{"machine": {**machine, "gpus": []}, **fields})
        build(folder, patch, declared, loss, step_ms, machine, status, look)
    return verify.verify(folder)


RECORD = ('id = "901"\ntitle = "t"\nparent = "short/5"\ndate = 2026-01-01\npeople = ["@x"]\nkind = "systems"\n'
          'source = "log"\n[delta]\n"system.ranks_per_forward" = 1\n')


def systems(folder, arms=None, loss=None, sets=(), **fields):
    """A systems claim: a new record that differs from record 5 in system.ranks_per_forward."""
    folder.mkdir(parents=True)
    if arms is None:
        s = deltas.resolve("short/5", scale="micro", sets=["system.ranks_per_forward=1", *sets]).settings
        arms = {"new": arm("short/901", sets, s=s), "parent": arm("short/5", sets)}
        (folder / "record.toml").write_text(RECORD)
    times = {"new": 1900.0, "parent": 2000.0, "base": 2000.0}
    return built(folder, arms, loss or {"new": 5.3, "parent": 5.3, "base": 5.33}, times,
                 **{"claim": "systems", "record": arms["new"]["record"], "target": None, **fields})


def test_a_diverged_run_fails_the_claim(tmp_path):
    results = built(tmp_path / "c", status={3: "diverged"})
    assert results["problems"] == [] and results["verdict"] == "not shown"
    assert "no final loss of seed" in results["reasons"][0] and "every registered run counts" in results["reasons"][0]


def test_a_record_must_be_faster_than_its_parent(tmp_path):
    results = built(tmp_path / "c", step_ms={"new": 2000.0, "parent": 2000.0})
    assert results["verdict"] == "not shown" and "not shown to be faster" in results["reasons"][0]


def test_a_record_must_reach_the_target_with_few_enough_doubts(tmp_path, capsys):
    results = built(tmp_path / "c", loss={"new": 5.197, "parent": 5.27})
    assert results["verdict"] == "not shown" and results["reasons"][0].startswith("target 5.2: mean 5.19")
    assert results["statistics"]["target"]["runs_for"] > 4
    verify.report(results, "")
    assert "a FRESH set with this mean and sd would need" in capsys.readouterr().out


def test_an_ml_claim_needs_a_target(tmp_path):
    results = built(tmp_path / "c", two_arms(sets=[]), target=None)
    assert results["verdict"] == "not shown" and "scale micro has no target to reach" in results["reasons"][0]


def test_looks_use_their_share_of_alpha_and_are_taken_again(tmp_path):
    plan = {"looks": [{"runs": 3, "alpha": 0.005}, {"runs": 6, "alpha": 0.005}]}
    results = built(tmp_path / "a", plan=plan, look=3)
    assert results["verdict"] == "shown" and results["statistics"]["alpha"] == 0.005
    assert results["statistics"]["arms"]["new"]["n"] == 3
    late = built(tmp_path / "b", plan=plan, look=6)
    assert late["verdict"] == "not shown"
    assert late["reasons"] == ["the look at 3 runs was booked as 'continue', its runs pass at 0.005"]
    early = built(tmp_path / "c", plan=plan, look=3, loss={"new": 5.199, "parent": 5.27})
    assert "the look at 3 runs was booked as 'passed', its runs do not pass at 0.005" in early["reasons"]


def test_a_killed_run_is_made_again_and_told(claim):
    run = claim.counted()[1]
    claim.again(run, note="the power went")
    claim.logs[claim.name(run)] = claim.events(run)[:6]
    claim.of("finish", run)[0]["status"] = "failed"
    claim.seal()
    results = verify.verify(claim.folder)
    assert results["verdict"] == "shown" and results["excluded"][0]["note"] == "the power went"


def test_a_systems_claim_keeps_loss_and_gradients_seed_by_seed(tmp_path):
    results = systems(tmp_path / "systems")
    assert results["verdict"] == "shown", results
    parity = results["statistics"]["parity"]
    assert parity["precision"] == "float32" and [r["seed"] for r in parity["rows"]] == [0, 1, 2, 3]
    assert 0 < max(r["worst"] for r in parity["rows"]) < parity["gradient"] == 1e-4
    assert results["statistics"]["noninferior"]["against"] == "short/5"


@pytest.mark.parametrize("edit, reason", [
    (lambda probe: probe["gradients"]["blocks.3.mlp.up"].__setitem__(1, 0.5), r"gradients differ by .*blocks\.3\.mlp\.up"),
    (lambda probe: [m.__setitem__(0, 1.001 * m[0]) for m in probe["gradients"].values()], "gradients differ by 1.0e-03"),
    (lambda probe: probe.update(loss=probe["loss"] + 0.001), "loss differs by 1.4e-04"),
    (lambda probe: probe["gradients"].pop("embed.table"), r"gradients differ by inf \(embed\.table"),
    (lambda _, validation: validation["train_loss"].__setitem__(3, validation["train_loss"][3] + 0.001),
     "the first 5 timed training losses differ by 1.4e-04"),
])
def test_another_loss_or_gradient_of_the_same_seed_is_no_systems_change(edit, reason, tmp_path):
    """A change that acts from the fourth step on shows in the training losses."""
    systems(tmp_path / "systems")
    claim = Forgery(tmp_path / "systems")
    run = claim.counted()[0]
    given = (claim.events(run, "probe")[0], claim.events(run, "validation")[1])
    edit(*given[:edit.__code__.co_argcount])
    claim.seal()
    results = verify.verify(claim.folder)
    assert results["verdict"] == "not shown" and len(results["reasons"]) == 1
    assert re.match(r"parity: seed \d: " + reason, results["reasons"][0]), results["reasons"]


def test_a_systems_claim_may_not_lose_more_than_the_margin(tmp_path):
    results = systems(tmp_path / "systems", loss={"new": 5.31, "parent": 5.3})
    assert results["verdict"] == "not shown" and "upper bound" in results["reasons"][0]


def test_a_systems_record_on_a_systems_record_is_held_against_the_last_ml_record(tmp_path):
    """By the fields: record 21t is a re-timing by its kind, and changes what is computed."""
    arms = {"new": arm("short/23", []), "parent": arm("short/22", [])}
    results = systems(tmp_path / "a", arms)
    assert any("run the last ml record, short/21t, as arm base" in r for r in results["reasons"]), results
    results = systems(tmp_path / "b", {**arms, "base": arm("short/21t", [])}, {"new": 5.3, "parent": 5.3, "base": 5.3})
    assert results["verdict"] == "shown" and results["statistics"]["noninferior"]["against"] == "short/21t"
    results = systems(tmp_path / "c", {**arms, "base": arm("short/21", [])})
    assert any("arm base runs short/21, the last ml record is short/21t" in p for p in results["problems"])
    assert provenance.last_ml(deltas.find_record("short/7")).ref == "short/6"  # called systems; its Muon rounds elsewhere


def test_a_new_record_is_resolved_from_the_delta_it_carries(tmp_path):
    line = 'id = "901"\ntitle = "t"\nparent = "short/11"\ndate = 2026-01-01\npeople = ["@x"]\nkind = "ml"\nsource = "log"\n'
    parent = deltas.resolve("short/11", scale="micro", sets=TARGET).settings
    s = deltas.assign(parent, "optim.muon.lr", 0.05, "test")
    arms = {"new": arm("short/901", TARGET, s=s), "parent": arm("short/11", TARGET)}
    folder = tmp_path / "c"
    results = built(folder, arms, record="short/901")
    assert any("neither in this checkout nor in record.toml of the claim" in p for p in results["problems"])
    (folder / "record.toml").write_text(line + '[delta]\n"optim.muon.lr" = 0.05\n')
    assert verify.verify(folder)["problems"] == []
    assert verify.verify(folder)["verdict"] == "shown"
    (folder / "record.toml").write_text(line + '[delta]\n"optim.muon.lr" = 0.06\n')
    assert verify.verify(folder)["problems"] == [
        "arm new: short/901 at scale micro --set validation.target=5.2 resolves to other settings here: optim.muon.lr"]
    (folder / "record.toml").write_text(line.replace("short/11", "short/10") + '[delta]\n"optim.muon.lr" = 0.05\n')
    assert any("the parent of short/901 is short/10" in p for p in verify.verify(folder)["problems"])


# ----- grades -----------------------------------------------------------------------------------------------------------

def audit_file(tmp_path, **fields):
    from records.audit import CHECKS
    result = {"version": 1, "ref": "x", "commit": "1" * 40, "tree": "2" * 40, "record": "short/11", "passed": True,
              "checks": [{"name": name, "passed": True, "detail": ""} for name in CHECKS],
              "confined": {"network": "cut off", "writes": "limited to the audit's folder"}, **fields}
    (tmp_path / "audit.json").write_text(json.dumps(result))
    return tmp_path / "audit.json"


def test_an_audit_of_the_same_code_and_record_raises_the_grade(good, tmp_path):
    assert verify.verify(good, audit_file(tmp_path))["grade"] == "audited"
    for fields, why in (({"commit": "3" * 40}, "the audit is of commit 333333333333"), ({"record": "short/5"}, "short/5"),
                        ({"record": None}, "the audit is of None"),
                        ({"confined": {"network": "cut off", "writes": "not limited (needs Linux with Landlock)"}},
                         "the audit ran without a sandbox"),
                        ({"checks": [{"name": "causality", "passed": True, "detail": ""}]}, "the audit lacks")):
        results = verify.verify(good, audit_file(tmp_path, **fields))
        assert results["grade"] == "consistent" and any(why in u for u in results["unknown"]), why


def test_a_failed_audit_speaks_against_the_claim(good, tmp_path):
    failed = audit_file(tmp_path, passed=False, checks=[{"name": "causality", "passed": False, "detail": ""}])
    results = verify.verify(good, failed)
    assert results["verdict"] == "not shown" and results["reasons"] == ["the audit of its code failed: causality"]


def test_a_reproduction_is_another_claim_on_another_machine(good, tmp_path):
    other = {**MACHINE, "machine": "ba9876543210"}
    built(tmp_path / "again", machine=other)
    results = verify.verify(good, reproduction=tmp_path / "again")
    assert results["grade"] == "reproduced" and results["reproduction"]["machine"] == "ba9876543210"
    for how, why in (({}, "it ran on the same machine"),
                     ({"machine": other, "arms": two_arms("short/9", "short/8"), "record": "short/9"},
                          "its record is short/9, here short/11"),
                     ({"machine": other, "step_ms": {"new": 3000.0, "parent": 2400.0}}, "not shown to be faster"),
                     ({"machine": other, "loss": {"new": 5.25, "parent": 5.27}},
                      "its own runs do not show the claim (target")):
        folder = tmp_path / re.sub(r"\W", "_", why)
        built(folder, **how)
        results = verify.verify(good, reproduction=folder)
        assert results["grade"] == "consistent" and any(why in u for u in results["unknown"]), why


def test_the_parent_s_own_claim_does_not_reproduce_a_systems_record(tmp_path):
    """It has the same ml_hash and target: a systems record is reproduced by its own code and settings only."""
    target, other = ["validation.target=5.5"], {**MACHINE, "machine": "ba9876543210"}
    assert systems(tmp_path / "systems", sets=target, target=5.5)["verdict"] == "shown"
    parent = built(tmp_path / "parent", two_arms("short/5", "short/4", target), {"new": 5.3, "parent": 5.4},
                   record="short/5", target=5.5, machine=other)
    assert parent["verdict"] == "shown"
    results = verify.verify(tmp_path / "systems", reproduction=tmp_path / "parent")
    assert results["grade"] == "consistent" and any("its claim is ml, here systems" in u for u in results["unknown"])
    systems(tmp_path / "again", sets=target, target=5.5, machine=other)
    assert verify.verify(tmp_path / "systems", reproduction=tmp_path / "again")["grade"] == "reproduced"


def test_a_systems_record_may_not_eat_the_buffer_below_the_target(tmp_path):
    """The target is reached with ease, and the loss is worse than the last ml record's by more than the margin."""
    results = systems(tmp_path / "c", sets=["validation.target=5.5"], target=5.5, loss={"new": 5.31, "parent": 5.3})
    assert results["statistics"]["target"]["passed"] and results["verdict"] == "not shown"
    assert any("loss against short/5" in r and "must be below 0.002" in r for r in results["reasons"])


def test_what_raised_the_grade_is_kept_and_a_lower_one_is_told(claim, tmp_path, capsys):
    built(tmp_path / "again", machine={**MACHINE, "machine": "ba9876543210"})
    assert command(claim.folder, audit=str(audit_file(tmp_path)), reproduction=str(tmp_path / "again")) == 0
    capsys.readouterr()
    assert command(claim.folder, json=True) == 0
    assert json.loads(capsys.readouterr().out)["grade"] == "reproduced"
    shutil.rmtree(claim.folder / "reproduction")
    command(claim.folder)
    assert "note: it was reproduced, now it is audited" in capsys.readouterr().out
    (claim.folder / "audit.json").unlink()
    command(claim.folder)
    assert "note: it was audited, now it is consistent" in capsys.readouterr().out


def test_a_claim_does_not_reproduce_itself(good, claim):
    for events in claim.logs.values():
        events[0]["machine"] = "ba9876543210"
    claim.lines[0]["machine"]["machine"] = "ba9876543210"
    claim.seal()
    results = verify.verify(good, reproduction=claim.folder)
    assert results["grade"] == "consistent" and any("it holds runs of this claim" in u for u in results["unknown"])


def test_a_consistent_forgery_passes_and_the_documentation_says_so(claim):
    """Whoever rewrites everything together is not found out by logs; the page for users must not pretend otherwise."""
    for run in claim.counted():
        for event in claim.events(run):
            if event["kind"] in ("validation", "end"):
                event["val_loss"] -= 0.1
        claim.events(run, "end")[0]["verdict"] = [f"final validation loss {claim.events(run, 'end')[0]['val_loss']:.4f}"]
    claim.seal()
    results = verify.verify(claim.folder)
    text = "rewrites manifest, logs and summaries together"
    assert results["verdict"] == "shown" and any(text in u for u in results["unknown"])
    assert text in (ROOT / "records/EVIDENCE.md").read_text()


def test_the_documentation_names_every_grade_and_tolerance():
    page = (ROOT / "records/EVIDENCE.md").read_text()
    for text in ("`consistent`", "`audited`", "`reproduced`", "1e-4", "5e-2", f"{run_laws.LOSS_LIMIT:g}"):
        assert text in page, text


# ----- warm-up of compiled models ---------------------------------------------------------------------------------------

def test_a_compiled_model_warms_up_each_of_its_windows():
    s = deltas.resolve("short/13", scale="micro").settings
    log = run_laws.Log("x", None, [({"kind": "start", "device": "1 x NVIDIA H100"}, "")], s)
    assert run_laws.warmup_steps(log) == 2 + len({p.windows for p in schedule.plan(s)})
    log.links[0][0]["device"] = "CPU, 1 process, 2 threads"
    assert run_laws.warmup_steps(log) == 3
    log.settings = deltas.resolve("short/13", scale="micro", sets=["system.warmup_steps=0"]).settings
    assert run_laws.warmup_steps(log) == 0


# ----- code at a commit -------------------------------------------------------------------------------------------------

def test_sources_are_compared_with_the_files_of_their_commit_without_running_them():
    from records.claims import arms
    if not arms.is_checkout():
        pytest.skip("no git checkout")
    commit = arms.line("rev-parse", "HEAD")
    declared = {"commit": commit, "tree": arms.line("rev-parse", "HEAD^{tree}")}
    names = ["train_gpt.py", "model.py", "data/stream.py"]
    text = "".join(f"# ----- {n}\n{arms.git('show', f'{commit}:{n}').decode()}\n" for n in names)
    found = claim_laws.Evidence(Path("x"), None)

    def problems(text, arm):
        return list(provenance.check_commit(found, "new", arm, "0" * 16, text))

    assert problems(text, declared) == []
    assert "is not the code of commit" in problems(text.replace("import", "imp0rt", 1), declared)[0]
    assert "which commit" not in problems(text, declared) and "tree 000" in problems(text, {**declared, "tree": "000"})[0]
    assert "holds a file that commit" in problems(text + "# ----- extra.py\n\n", declared)[0]
    assert "is no commit" in problems(text, {**declared, "commit": "--output=/etc/x"})[0]


# ----- other folders ----------------------------------------------------------------------------------------------------

def command(folder, **options):
    """Exit code of the command."""
    given = {"audit": None, "reproduction": None, "target": None, "json": False, **options}
    return verify.run(type("Options", (), {"folder": str(folder), **given}))


def test_exit_codes_and_results_file(claim, capsys):
    assert command(claim.folder) == 0
    written = json.loads((claim.folder / "results.json").read_text())
    assert written["verdict"] == "shown" and "SHOWN\ngrade: consistent\nwhat this cannot know:" in capsys.readouterr().out
    assert command(claim.folder, json=True) == 0 and json.loads(capsys.readouterr().out) == written
    claim.events(3, "reset")[0]["state_after"] = "f" * 64
    claim.seal()
    assert command(claim.folder) == 2
    assert json.loads((claim.folder / "results.json").read_text())["verdict"] == "refused"
    assert "REFUSED: 1 problem\n  runs/" in capsys.readouterr().out


def test_a_comparison_is_checked_but_claims_nothing(tmp_path, capsys):
    results = built(tmp_path / "c", claim="comparison", record=None, alpha=0.05)
    assert results["verdict"] == "shown" and results["grade"] == "consistent" and results["comparisons"]
    assert command(tmp_path / "c") == 0
    out = capsys.readouterr().out
    assert results["comparisons"][0]["verdict"] in out and "grade: consistent" in out and "SHOWN" not in out
    claim = Forgery(tmp_path / "c")
    claim.events(3, "stream")[0]["digest"] = "d" * 64
    claim.seal()
    assert verify.verify(claim.folder)["verdict"] == "refused"


@pytest.mark.parametrize("fields, why", [
    ({"order": [{"arm": "new", "seed": 9, "discard": True}, *({"arm": a, "seed": i, "discard": False}
                                                             for a in ("new", "parent") for i in range(4))]},
     "the order of runs and their seeds are not what order_seed 7 draws"),
    ({"aa": True}, "aa is True, but its arms differ"),
    ({"arms": two_arms("short/11", "short/11")}, "aa is False, but its arms are the same")])
def test_a_comparison_keeps_the_laws_of_its_plan(fields, why, tmp_path):
    results = built(tmp_path / "c", claim="comparison", record=None, alpha=0.05, **fields)
    assert [why in p for p in results["problems"]] == [True], results["problems"]


def test_why_a_record_warms_up_for_long_can_be_said_and_is_told(claim):
    claim.lines[0]["long_start"] = "kernels are tuned"
    an_hour_of_warm_up_in_one_arm(claim)
    results = verify.verify(claim.folder)
    assert results["verdict"] == "shown" and any("says: kernels are tuned" in u for u in results["unknown"])
    untimed = results["statistics"]["arms"]["new"]["untimed_s"]
    assert 3600 < untimed["warmup"] < 3601 and untimed["start"] < 1


def test_a_script_s_log_is_held_against_the_manifest(good, tmp_path):
    shutil.copytree(good, tmp_path / "claim")
    claim = Forgery(tmp_path / "claim")
    claim.lines[0] |= {"claim": "comparison", "record": None, "alpha": 0.05}
    a_script_as_parent(claim)
    results = verify.verify(claim.folder)
    assert results["verdict"] == "shown" and any("what the script of arm parent computed" in u for u in results["unknown"])
    log = claim.folder / "runs" / claim.name(claim.counted("parent")[0]) / "log.txt"
    log.write_text(log.read_text().replace("5.27", "5.07"))
    assert ["it was changed after the run" in p for p in verify.verify(claim.folder)["problems"]] == [True]


def test_arms_that_read_different_numbers_of_shards_agree_if_the_declared_corpus_has_both(claim):
    for register in claim.of("register"):
        claim.events(register["run"], "start")[0] |= {"corpus": "own", "corpus_digest": "cd"[register["arm"] == "new"] * 64}
    claim.seal()
    assert any("corpus_digest" in p for p in verify.verify(claim.folder)["problems"])
    claim.lines[0]["corpus_prefixes"] = ["c" * 64, "d" * 64]
    claim.seal()
    results = verify.verify(claim.folder)
    assert results["verdict"] == "shown"
    assert any("the corpus own: its digests are not pinned here" in u for u in results["unknown"])


LOSSES = [3.2783, 3.2772, 3.2791, 3.2778]


def text_folder(folder, losses=LOSSES, steps=1770):
    folder.mkdir(parents=True)
    for i, loss in enumerate(losses):
        (folder / f"{i}.txt").write_text(f"import torch\n{'=' * 100}\nstep:0/{steps} val_loss:10.8258 train_time:0ms "
                                         f"step_avg:nanms\nstep:{steps}/{steps} val_loss:{loss} train_time:{170000 + i}ms "
                                         "step_avg:96.05ms\n")
    return folder


def test_text_logs_give_statistics_and_no_grade(tmp_path, capsys):
    folder = text_folder(tmp_path / "logs")
    assert command(folder, target=3.28) == 0 and not (folder / "results.json").exists()
    out = capsys.readouterr().out
    assert "4 text logs of 1770 steps" in out and "mean 3.27810" in out and "grade: none (text logs)" in out
    assert command(folder, target=3.279, json=True) == 3
    assert json.loads(capsys.readouterr().out)["target"]["p"] > 0.01


def test_a_cut_text_log_counts_as_failed(tmp_path):
    folder = text_folder(tmp_path / "logs")
    path = folder / "2.txt"
    path.write_text(path.read_text().replace("step:1770/1770", "step:1500/1770"))
    assert "2.txt: no final loss: it counts as failed" in verify.text_logs(folder, 3.28)["reasons"]


def test_bad_input_is_one_clear_line(good, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/photo.jpg").write_bytes(b"x")
    text_folder(tmp_path / "nested/baseline")
    mixed = text_folder(tmp_path / "mixed")
    (mixed / "9.txt").write_text("step:1750/1750 val_loss:3.27 train_time:1ms step_avg:1ms\n")
    twice = text_folder(tmp_path / "twice")
    shutil.copy(twice / "0.txt", twice / "9.txt")
    (tmp_path / "half.json").write_text('{"version": 1, "comm')
    run = next((good / "runs").glob("*/"))
    for folder, options, message in [
            (tmp_path / "none", {}, "no such folder"), (tmp_path / "empty", {}, "the folder is empty"),
            (tmp_path / "foreign", {}, "not a claim folder: it has no manifest.jsonl"),
            (run, {}, "a single run is evidence only as part of a claim"),
            (good / "runs", {}, "not a claim folder"), (tmp_path / "nested", {"target": 3.28}, "its logs lie in baseline"),
            (mixed, {"target": 3.28}, "runs of 1750, 1770 steps are different experiments"),
            (twice, {"target": 3.28}, "the same run as 0.txt: a copy"), (mixed, {}, "name the loss to reach"),
            (mixed, {"audit": "a.json"}, "text logs name neither code nor machine"),
            (good, {"target": 3.0}, "a claim declares its target before the first run"),
            (good, {"audit": str(tmp_path / "half.json")}, "not the result of an audit"),
            (good, {"reproduction": str(tmp_path / "empty")}, "the folder is empty")]:
        with pytest.raises(UserError) as error:
            command(folder, **options)
        assert message in str(error.value) and "\n" not in str(error.value), folder


def test_half_written_manifests_are_refused_and_their_runs_still_checked(claim):
    path = claim.folder / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-60])
    (claim.folder / "runs" / claim.name(3) / "summary.json").write_text("{")
    problems = verify.verify(claim.folder)["problems"]
    assert any("is not a complete log line" in p for p in problems) and any("summary.json: missing" in p for p in problems)


JUNK = [None, -1, 10 ** 400, "x", [], {}, [None], True, math.nan]


def test_no_value_in_any_field_of_a_log_can_crash_it(claim):
    """Every field of every event replaced by junk: refused or harmless, never an exception."""
    name, kinds = claim.name(3), set()
    original = json.dumps(claim.logs[name])
    for i, event in enumerate(json.loads(original)):
        if event["kind"] in kinds:
            continue
        kinds.add(event["kind"])
        for field in [f for f in event if f != "n"]:
            for junk in JUNK:
                claim.logs[name] = json.loads(original)
                claim.logs[name][i][field] = junk
                folder = rewritten(claim, name)
                log, problems = run_laws.read_log(folder, name)
                problems += run_laws.check_run(log) if log else []
                assert all(isinstance(p, str) for p in problems)


def test_what_a_mixture_tells_of_its_experts_is_read_and_checked(tmp_path):
    command = [sys.executable, "train_gpt.py", "variants/1", "--scale", "micro", "--set", "schedule.steps=3", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    folder = next(tmp_path.glob("2*"))
    original = json.dumps(runlog.read_chain(folder / "run.jsonl"))
    at = next(i for i, e in enumerate(json.loads(original)) if e["kind"] == "experts")

    def problems(change):
        events = json.loads(original)
        change(events)
        for n, event in enumerate(events):
            event["n"] = n
        chained(folder, events)
        log, found = run_laws.read_log(folder, "run")
        return found + [p for p in (run_laws.check_run(log) if log else []) if "experts" in p]

    assert problems(lambda events: None) == []
    assert "told at steps [], due at [3]" in problems(lambda events: events.pop(at))[0]
    assert "told at steps [3, 3]" in problems(lambda events: events.insert(at - 1, events[at].copy()))[0]
    assert "loads and dropped rows are not" in problems(lambda events: events[at]["load"][0].__setitem__(0, 7))[0]
    assert "of layers [0]" in problems(lambda events: events[at].update({n: events[at][n][:1] for n in run_laws.LOADS}, layers=[0]))[0]
    for field in [*run_laws.LOADS, "load", "step"]:
        for junk in JUNK:
            found = problems(lambda events: events[at].__setitem__(field, junk))
            assert found and all(isinstance(p, str) for p in found), (field, junk)


def rewritten(claim, name):
    """The run's chain alone, hashed again (render and summarise may not survive the junk, and need not)."""
    return chained(claim.folder / "runs" / name, claim.logs[name])


def chained(folder, events):
    previous, lines = runlog.GENESIS, []
    for event in events:
        line, previous = runlog.chain_line(previous, event)
        lines.append(line)
    (folder / "run.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_no_value_in_any_field_of_a_manifest_can_crash_it(claim):
    draw, original = random.Random(3), json.dumps(claim.lines)
    places = [(i, f) for i in (0, 1, 2) for f in claim.lines[i] if f not in ("n", "kind")]
    places += [(0, f"arms.new.{f}") for f in claim.lines[0]["arms"]["new"]]
    for i, field in places:
        claim.lines = json.loads(original)
        *path, last = field.split(".")
        node = claim.lines[i]
        for key in path:
            node = node[key]
        node[last] = draw.choice(JUNK)
        previous, lines = runlog.GENESIS, []
        for event in claim.lines:
            line, previous = runlog.chain_line(previous, event)
            lines.append(line)
        (claim.folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
        assert verify.verify(claim.folder)["verdict"] in ("refused", "shown", "not shown")
