"""Laws of `records verify`: one artefact of a good claim bent and everything else sealed again is refused,
and for its own reason."""

import hashlib
import json
import lzma
import math
import re
import shutil

import pytest

import runlog
from claim_builder import Forgery, claim, good
from evidence import verify
from settings import deltas, schema

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


@refused(r"arm new: time taken off the clock: 5\.\d s next to the training at each validation|"
         r"runs/\S+ validation of step \d+: time taken off the clock: 5\.\d s")
def time_taken_off_every_interval(c):
    """The theft is the usual rest of these runs: the shortest one, of step 0, and the other arm tell it."""
    for run in c.counted("new"):
        taken = {v["step"]: 0.3 * v["train_time_ms"] for v in c.events(run, "validation")}
        for event in c.events(run):
            if "train_time_ms" in event:
                event["train_time_ms"] -= taken[event.get("step", 72)]
    c.seal()


@refused(
    r"arm new: time taken off the clock: 5\.\d s next to the training at each validation, arm parent 0\.\d s "
    "for the same"
)
def validations_slower_in_one_arm_only(c):
    """Time is taken off every interval, and step 0 is made as slow, so that no interval of a run stands
    out."""
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


@refused(
    r"arm new: work before the clock: its start takes 3601 s, that of arm parent 1 s, and the manifest does "
    "not say why"
)
def an_hour_before_the_warm_up_of_one_arm(c):
    hours(c, [e["run"] for e in c.of("register") if e["arm"] == "new"], "probe", "start_ms")


@refused(r"arm new: work before the clock: its warm-up takes 3600 s, that of arm parent 0 s, and the "
         "manifest does not say why")
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


@refused(r"ends with hash \w+, the manifest says \w+: it was changed after the run|step 72 jumps")
def loss_lowered_after_the_run(c):
    c.events(3, "validation")[-1]["val_loss"] = c.events(3, "end")[0]["val_loss"] = 5.10000003
    c.events(3, "end")[0]["verdict"] = ["final validation loss 5.1000"]
    c.seal(hashes=False, announce=False)


@refused(r"validation of step 36: train_loss\[2\] is nan, in a run that says it did not diverge")
def hidden_nan(c):
    c.events(3, "validation")[4]["train_loss"][2] = math.nan
    c.seal()


@refused(r"probe of step 2: gradients\.blocks\.3\.mlp\.c_fc\[0\] is nan")  # strict JSON has null for both
def hidden_infinite_gradient(c):
    c.events(3, "probe")[0]["gradients"]["blocks.3.mlp.c_fc"][0] = math.inf
    c.seal()


@refused(r"val_loss = -0\.5 is no loss")
def implausible_loss(c):
    c.events(3, "validation")[2]["val_loss"] = -0.50000003
    c.seal()


@refused(r"train_loss\[2\] = 1e\+308 is no loss")
def a_training_loss_whose_square_is_too_large(c):
    c.events(3, "validation")[4]["train_loss"][2] = 1e308
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
    end |= {k: last[k] for k in ("val_loss", "train_time_ms", "tokens")} | {
        "steps": 63,
        "reached": last["val_loss"] <= 5.2,
    }
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


@refused(
    r"stream_digest .* differs from that of the other runs|stream digest dddddddddddd, the settings read \w+"
)
def other_order_of_tokens(c):
    c.events(3, "stream")[0]["digest"] = "d" * 64
    c.seal()


# settings and code

@refused(r"settings hash to ml_hash \w+, logged \w+: they were edited|"
         r"settings differ from those declared .*: optim.muon.lr")
def settings_edited_in_a_log(c):
    run = c.counted()[0]
    c.events(run, "start")[0]["settings"]["optim"]["muon"]["lr"] = 0.05
    c.seal()


@refused(r"arm new: short/11 .* resolves to other settings here: optim.muon.lr")
def settings_edited_everywhere(c):
    new = c.lines[0]["arms"]["new"]
    new["settings"]["optim"]["muon"]["lr"] = 0.05
    new["ml_hash"] = schema.ml_hash(schema.from_plain(new["settings"]))
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


@refused(r"arm new: \S+ at scale micro .* resolves to other settings by the claim's own sources: colour|"
         r"settings are not valid here|cannot be resolved here: .* NOT HELD")
def settings_of_another_vocabulary(c):
    c.lines[0]["arms"]["new"]["settings"]["colour"] = "red"
    for register in c.of("register"):
        c.events(register["run"], "start")[0]["settings"] = c.lines[0]["arms"][register["arm"]]["settings"]
    c.seal()


@refused(r"sources-\w+\.txt: its text hashes to \w+: the sources were swapped")
def sources_swapped(c):
    path = next(c.folder.glob("runs/sources-*.txt"))
    path.write_text(path.read_text().replace("def train_step", "def train_step_"))


@refused(r"runs/sources-\w+\.txt: has CR line ends \(CRLF\): something rewrote its lines")
def sources_with_line_ends_of_another_system(c):
    path = next(c.folder.glob("runs/sources-*.txt"))
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


@refused(r"runs/sources-\w+\.txt\.xz: has CR line ends \(CRLF\): something rewrote its lines")
def packed_sources_with_line_ends_of_another_system(c):
    path = next(c.folder.glob("runs/sources-*.txt"))
    path.with_name(path.name + ".xz").write_bytes(lzma.compress(path.read_bytes().replace(b"\n", b"\r\n")))
    path.unlink()


@refused(r"code\.diff: has CRLF line ends: something rewrote its lines")
def a_difference_with_line_ends_of_another_system(c):
    c.lines[0]["code_diff"] = hashlib.sha256(b"# a -> b\n+x\n").hexdigest()
    (c.folder / "code.diff").write_bytes(b"# a -> b\r\n+x\r\n")
    c.seal()


@refused(r"runs/sources-\w+\.txt\.xz: unpacks to more than 20000000 bytes")
def sources_that_are_a_bomb(c):
    path = next(c.folder.glob("runs/sources-*.txt"))
    path.with_name(path.name + ".xz").write_bytes(lzma.compress(bytes(2 ** 25)))
    path.unlink()


@refused(r"runs/sources-\w+\.txt\.xz: is cut short")
def packed_sources_that_are_cut(c):
    path = next(c.folder.glob("runs/sources-*.txt"))
    path.with_name(path.name + ".xz").write_bytes(lzma.compress(path.read_bytes())[:-20])
    path.unlink()


@refused(r"run\.jsonl: line \d+ \(validation\) has a field 'extra' that nothing reads")
def a_field_that_nothing_reads(c):
    c.events(3, "validation")[2]["extra"] = 1
    c.seal()


@refused(r"manifest\.jsonl: line 1 \(declare\): arm new has a field 'extra' that nothing reads")
def a_field_of_an_arm_that_nothing_reads(c):
    c.lines[0]["arms"]["new"]["extra"] = 1
    c.seal()


@refused(r"manifest\.jsonl: line 2 \(register\): register has a field 'extra' that nothing reads")
def a_field_of_the_manifest_that_nothing_reads(c):
    c.of("register")[0]["extra"] = 1
    c.seal()


@refused(r"runs/\S+/run\.jsonl: missing: the manifest has it as run 0")
def a_discarded_run_without_its_log(c):
    (c.folder / "runs" / c.name(0) / "run.jsonl").unlink()


@refused(r"sources-\w+\.txt: missing")
def sources_missing(c):
    next(c.folder.glob("runs/sources-*.txt")).unlink()


@refused(r"sources \(arm \w+\) \w+ differs from that of the other runs|leaves out runlog\.py|"
         r"the arms declare one tree, and their runs have different sources")
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


@refused(r"numerics version 7, here 2|numerics_version 7 differs")
def another_numerics_version(c):
    c.events(3, "start")[0]["numerics_version"] = 7
    c.seal()


@refused(r"log version 1, this program reads versions 2 and 3")
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


@refused(r"was not announced by the manifest|target 5\.3, the settings of arm parent say 5\.2")
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


@refused(r"has the very (losses|probe) of seed \d|starts from the very state of seed \d")
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

@refused(r"alpha 0\.05: a record needs 0\.01 or less")  # the claim's, and its ledger's
def a_generous_alpha(c):
    c.lines[0]["alpha"] = 0.05
    c.seal()


@refused(r"margin 0\.1: a record may lose 0\.002 nats at most")
def a_generous_margin(c):
    c.lines[0]["margin"] = 0.1
    c.seal()


@refused(
    r"claims short/10, arm new runs short/11|arm parent runs short/10, the parent of short/10 is short/9|"
    "leg 1 is about 'short/11', the manifest claims short/10"
)
def another_record_claimed(c):
    c.lines[0]["record"] = "short/10"
    c.seal()


@refused(r"claims systems, but new and parent differ in model\.residual\.unet_skips")
def an_ml_change_called_systems(c):
    c.lines[0]["claim"] = "systems"
    c.seal()


@refused(
    r"arm parent runs with --set validation\.target=5\.2 --set optim\.muon\.lr=\S+: a record runs as it is"
)
def a_parent_with_changes_of_its_own(c):
    """Record 10 has this rate already, so that nothing but the rule is against it."""
    parent = c.lines[0]["arms"]["parent"]
    parent["changes"] = [
        *parent["changes"],
        f"--set optim.muon.lr={parent['settings']['optim']['muon']['lr']}",
    ]
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


@refused(r"scale 'micro', declared 'full'|arm \w+: short/1\d at scale full|arm \w+ runs with --set|"
         "a record is measured on")
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


@refused(r"code\.diff: missing|code\.diff: the arms run one tree, and a difference is declared")
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


# ----- bent, and rightly so ---------------------------------------------------------------------------------

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
    assert results["verdict"] == "shown" and any(
        "what the script of arm parent computed" in u for u in results["unknown"]
    )
    log = claim.folder / "runs" / claim.name(claim.counted("parent")[0]) / "log.txt"
    log.write_text(log.read_text().replace("5.27", "5.07"))
    assert ["it was changed after the run" in p for p in verify.verify(claim.folder)["problems"]] == [True]
