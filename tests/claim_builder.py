"""Claim folders without training: run logs written by runlog.RunLog itself, with invented losses and a clock
of our own.

`build` writes a good claim. `Forgery` reads one back and seals it again after an edit: every hash, text log,
summary and announcement is made to agree, so that only the law in question can still refuse it.
"""

import copy
import datetime
import hashlib
import json
import math
import random
import shutil
import time

import pytest

import runlog
import schedule
from evidence import compare, ledger, manifest, model_facts, provenance, verify
from settings import deltas, schema
from settings.model import padded_vocab
from settings.numerics import NUMERICS_VERSION

MACHINE = {
    "cpu": "test processor", "cores": 2, "platform": "test", "python": "3.11.7", "machine": "0123456789ab"
}
COMMIT, TREE = "1" * 40, "2" * 40  # in no repository
START_S = 1_790_000_000  # after the records that these tests build on, before this checkout's newest one
UTC = "%Y-%m-%dT%H:%M:%SZ"


class FakeTime:
    """Seconds since the epoch that move only when told; put in the place of time.gmtime."""

    def __init__(self):
        self.now, self.real = START_S, time.gmtime

    def __call__(self, seconds=None):
        return self.real(self.now if seconds is None else seconds)


def words_of(record, changes, scale):
    """The trainer's arguments of an arm."""
    return [record, *(word for x in changes for word in x.split(" ", 1)), "--scale", scale]


def arm(record, sets, scale="micro", s=None, **fields):
    """An arm as evidence.arms prepares it; s: settings of a record that this checkout does not have."""
    s = s or deltas.resolve(record, scale=scale, sets=sets).settings
    return {
        "text": record, "kind": "record", "ref": None, "commit": COMMIT, "tree": TREE, "dirty": None,
        "argv": words_of(record, [f"--set {x}" for x in sets], scale), "record": record, "preset": "",
        "scale": scale,
        "changes": [f"--set {x}" for x in sets], "report": [], "ml_hash": schema.ml_hash(s),
        "system_hash": schema.system_hash(s), "settings": schema.plain(s), **fields
    }


def declaration(arms, claim="ml", plan=None, target=5.2, record="short/11", **fields):
    plan = plan or {"runs": 4}
    runs = plan.get("runs") or plan["looks"][-1]["runs"]
    return {
        "version": 1, "claim": claim, "record": record, "scale": "micro", "target": target, "alpha": 0.01,
        "confidence": 0.95, "arms": arms, "plan": plan, "pairing": "seed", "margin": 0.002,
        "order": compare.make_order(sorted(arms), runs, "seed", 0, 7), "order_seed": 7, "processes": 1,
        "launcher": "python", "data": None, "machine": {**MACHINE, "gpus": []}, "environment": {},
        "aa": False, "code": COMMIT, "code_diff": None, **fields
    }


def build(folder, monkeypatch, declared, loss=None, step_ms=None, machine=MACHINE, status=None, look=None):
    """Write a claim folder. loss, step_ms: arm -> final mean loss, milliseconds a step. status: run number ->
    its end.

    look: runs of the look that is booked as passed and ends the claim.
    """
    clock = FakeTime()
    monkeypatch.setattr(time, "gmtime", clock)
    if declared["claim"] != "comparison":
        entry = ledger.begin(folder, folder, declared, folder.name, 1)
        declared = {**declared, "ledger": entry}
    book = manifest.create(folder, declared)
    for runs in [x["runs"] for x in declared["plan"].get("looks", [])] or [declared["plan"]["runs"]]:
        advance(book, clock, runs, loss, step_ms, machine, status)
        if look is not None:
            book.append("look", runs=runs, decision="passed" if runs == look else "continue")
        if runs == look:
            break
    book.close()
    monkeypatch.undo()
    return folder


def advance(book, clock, runs, loss=None, step_ms=None, machine=MACHINE, status=None):
    """Make the declared runs until every arm has so many that count."""
    declared = book.claim.declaration
    while not all(len(book.claim.counted(name)) >= runs for name in declared["arms"]):
        entry, number = declared["order"][book.claim.next_place], len(book.claim.runs)
        clock.now += 3
        registered = book.append("register", run=number, **entry)
        clock.now += 1
        log = write_run(
            book.claim.folder / "runs", declared["arms"][entry["arm"]], entry["seed"], registered, number,
            clock, machine, (loss or {"new": 5.14, "parent": 5.27, "base": 5.27})[entry["arm"]],
            (step_ms or {"new": 2000.0, "parent": 2400.0, "base": 2400.0})[entry["arm"]],
            (status or {}).get(number, "finished")
        )
        clock.now += 1
        book.append(
            "finish", run=number, folder=log.folder.name, last_hash=log.previous,
            status=log.events[-1]["status"], exit=0
        )


def write_run(runs, a, seed, registered, number, clock, machine, loss, step_ms, status):
    """One run folder with realistic events; the clock moves on by its wall time."""
    s, draw = schema.from_plain(a["settings"]), random.Random(f"{a['ml_hash']} {seed}")
    noise = random.Random(f"{a['text']} {number} times {machine['machine']}")
    log = runlog.RunLog(runs, f"{number:02d}_{a['record'].replace('/', '-')}_s{seed}")
    wall = 0.0
    log.elapsed_ms = lambda: wall  # on the run's clock, so that a busy machine changes nothing

    def event(kind, after_ms, **fields):
        nonlocal wall
        wall += after_ms
        clock.now = began + int(wall / 1000)
        log.event(kind, **fields)

    began, known = clock.now, provenance.known_digests("sample", s.validation.tokens)
    about = {
        "record": a["record"], "preset": "", "scale": a["scale"], "seed": seed, "changes": a["changes"],
        "registered": registered, "numerics_version": NUMERICS_VERSION, "ml_hash": a["ml_hash"],
        "system_hash": a["system_hash"], "corpus": "sample", **known, **counted(s), "processes": 1,
        "device": "CPU, 1 process, 1 threads", "attention": "sdpa", "comm": "replicated",
        "torch": "2.13.0+cpu", "code": a["commit"], "profiled": False, "environment": {}, "fallbacks": [],
        **machine
    }
    wall = 800.0
    log.start(about, a["settings"])
    state = hashlib.sha256(f"{a['ml_hash']} {seed}".encode()).hexdigest()
    names = sorted(model_facts.counts(s).names)
    weights = random.Random(f"probe {a['ml_hash']} {seed}")
    marks = {
        n: [m := weights.uniform(1e-4, 0.2), m * weights.uniform(-0.7, 0.7) * (1 + 1e-6 * noise.random())]
        for n in names
    }
    event("probe", 440, step=2, tokens="random", loss=7.1363, gradients=marks)
    event(
        "reset", 20, warmup_steps=3, state_before=state, state_after=state, start_ms=850.0,
        warmup_ms=wall + 20 - 850.0
    )
    steps, ms, before, begin = s.schedule.steps, 0.063, 0, math.log(padded_vocab(s))
    final = loss + draw.gauss(0, 0.004)
    for step in [i for i in range(steps + 1) if schedule.validates(s, i)]:
        spent = (step - before) * step_ms * (1 + 0.002 * noise.gauss(0, 1))
        ms += spent
        share = step / steps
        value = (
            begin * (1 - share) + final * share if status == "finished" or step < steps else float("nan")
        )
        # the first losses are those of the initial weights
        begun = begin * (1 - before / steps) + final * before / steps
        train = [round(begun + 0.05 * draw.gauss(0, 1), 6) for _ in range(step - before)]
        event(
            "validation", spent + 110 + 5 * noise.random(), step=step, scheduled_steps=steps, val_loss=value,
            train_loss=train, train_time_ms=round(ms, 3), tokens=schedule.tokens_before(s, step), epoch=0
        )
        before = step
    event("stream", 0.3, digest=model_facts.stream_digest("sample", s))
    target = s.validation.target
    clock.now = began + int(wall / 1000) + 1
    log.end(
        status=status, target=target,
        reached=None if target is None or status != "finished" else value <= target,
        verdict=[f"final validation loss {value:.4f}"] if status == "finished" else [], steps=steps,
        scheduled_steps=steps, val_loss=value, train_time_ms=round(ms, 3),
        tokens=schedule.tokens_before(s, steps), epoch=0, graphs_in_clock=0
    )
    for file in log.files.values():
        file.close()
    return log


def counted(s):
    """What a log tells of the size of the model of these settings."""
    counts = model_facts.counts(s)
    return {k: getattr(counts, k) for k in ("parameters", "active_parameters", "flops_per_token")}


class Forgery:
    """A claim folder in memory. lines: manifest events; logs: run folder -> events; book: lines of the
    ledger. `seal` makes everything agree again."""

    def __init__(self, folder):
        self.folder = folder
        self.lines = [dict(e) for e, _ in runlog.read_links(folder / manifest.NAME)]
        self.logs = {p.parent.name: runlog.read_chain(p) for p in sorted(folder.glob("runs/*/run.jsonl"))}
        path = folder / ledger.NAME
        self.book = [dict(e) for e, _ in runlog.read_links(path)] if path.exists() else []

    def of(self, kind, run=None):
        """Manifest lines of a kind (and run)."""
        return [e for e in self.lines if e["kind"] == kind and (run is None or e["run"] == run)]

    def name(self, run):
        return self.of("finish", run)[0]["folder"]

    def events(self, run, kind=None):
        return [e for e in self.logs[self.name(run)] if kind in (None, e["kind"])]

    def counted(self, arm="new"):
        """Numbers of the counted runs of an arm."""
        return [e["run"] for e in self.of("register") if e["arm"] == arm and not e["discard"]]

    def later(self, line, seconds, manifest_only=False):
        """Move manifest lines from an index on, and the runs that begin there, to a later time."""
        runs = {e["run"] for e in self.lines[line:] if e["kind"] == "register"}
        events = self.lines[line:] + ([] if manifest_only else [self.logs[self.name(r)][0] for r in runs])
        for event in events:
            moved = datetime.datetime.strptime(event["utc"], UTC) + datetime.timedelta(seconds=seconds)
            event["utc"] = moved.strftime(UTC)

    def stretch(self, run, kind, milliseconds):
        """Let wall time pass before the first event of a kind in a run."""
        events = self.logs[self.name(run)]
        first = next(i for i, e in enumerate(events) if e["kind"] == kind)
        for event in events[first:]:
            event["wall_ms"] += milliseconds
        self.later(self.lines.index(self.of("finish", run)[0]), milliseconds / 1000)

    def again(self, run, **fault):
        """Exclude a run by a fault and give its place to a second run, a copy of it; later runs are
        renumbered."""
        at = self.lines.index(self.of("finish", run)[0]) + 1
        register, finish = (copy.deepcopy(self.of(kind, run)[0]) for kind in ("register", "finish"))
        for event in self.lines[at:]:
            if "run" in event:
                event["run"] += 1
        register["run"], finish["run"], finish["folder"] = run + 1, run + 1, finish["folder"] + "_again"
        self.logs[finish["folder"]] = copy.deepcopy(self.logs[self.name(run)])
        for event in self.logs[finish["folder"]]:
            if "train_time_ms" in event:  # the same seed gives the same losses, never the same times
                factor = 1 - 3e-4 * random.Random(event["train_time_ms"]).random()
                event["train_time_ms"] = round(event["train_time_ms"] * factor, 3)
        line = {"kind": "fault", "utc": finish["utc"], "run": run, "cause": "killed", "note": "", **fault}
        self.lines[at:at] = [line, register, finish]
        self.later(at + 1, 400)

    def seal(self, announce=True, hashes=True, agree=True, spell=True):
        """Write everything back, consistently.

        agree: rule and leg of the ledger are made to say what the manifest declares.
        spell: so are the rule's text and the arguments of the arms.
        announce: False, or the number of a run, whose start keeps the registration it has. hashes: False:
        finish lines keep theirs.
        """
        for a in self.lines[0]["arms"].values() if spell else ():
            if a["kind"] == "record":
                a["argv"] = words_of(a["record"], a["changes"], a["scale"])
        if self.book and self.lines[0].get("ledger"):
            self.write_ledger(agree, spell)
        previous, out = runlog.GENESIS, []
        by_run = {e["run"]: e["folder"] for e in self.of("finish")}
        for n, event in enumerate(self.lines):
            event["n"] = n
            if event["kind"] == "finish" and event["folder"] in self.logs:
                last = self.write(event["folder"])
                event["last_hash"] = last if hashes else event["last_hash"]
            line, previous = runlog.chain_line(previous, event)
            out.append(line)
            if (
                event["kind"] == "register" and announce is not False
                and by_run.get(event["run"]) in self.logs
            ):
                if announce is True or event["run"] != announce:
                    self.logs[by_run[event["run"]]][0]["registered"] = previous
        (self.folder / manifest.NAME).write_text("\n".join(out) + "\n")

    def write_ledger(self, agree=True, spell=True):
        """The ledger's chain, and the manifest's mark of its leg."""
        declared, previous, out = self.lines[0], runlog.GENESIS, []
        for n, event in enumerate(self.book):
            event["n"] = n
            if agree and event["kind"] == "open":
                event["rule"] |= {k: declared[k] for k in ("claim", "scale", "target")}
                event["rule"]["alpha"] = declared["alpha"] * event["rule"]["legs"]
            if spell and event["kind"] == "open":
                event["rule"]["text"] = ledger.rule_text(event["rule"])
            if agree and event["kind"] == "leg" and event["leg"] == declared["ledger"]["leg"]:
                event |= ledger.line_of(declared, event["leg"], event["name"])
            line, previous = runlog.chain_line(previous, event)
            out.append(line)
            if event["kind"] == "leg" and event["leg"] == declared["ledger"]["leg"]:
                declared["ledger"]["hash"] = previous
        (self.folder / ledger.NAME).write_text("\n".join(out) + "\n")

    def write(self, name):
        """A run folder from its events. Returns the last hash of its chain."""
        folder, previous, lines = self.folder / "runs" / name, runlog.GENESIS, []
        for n, event in enumerate(self.logs[name]):
            event["n"] = n
            line, previous = runlog.chain_line(previous, event)
            lines.append(line)
        folder.mkdir(exist_ok=True)
        (folder / "run.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "log.txt").write_text("".join(x + "\n" for e in self.logs[name] for x in runlog.render(e)))
        (folder / "summary.json").write_text(
            json.dumps(runlog.summarise(self.logs[name], previous), indent=1) + "\n"
        )
        return previous


def rewall(claim, run):
    """The wall time of a run follows its training times, with validations of 110 ms."""
    draw = random.Random(f"{run} rests")
    wall, clock = claim.events(run, "reset")[0]["wall_ms"], 0.0
    for event in claim.events(run):
        if event["kind"] == "validation":
            wall += event["train_time_ms"] - clock + 110 + 5 * draw.random()
            clock = event["train_time_ms"]
        elif event["kind"] in ("stream", "end"):
            wall += 0.3
        else:
            continue
        event["wall_ms"] = round(wall, 3)


# ----- the good claim, and those a test asks for ------------------------------------------------------------

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


def built(folder, arms=None, loss=None, step_ms=None, status=None, look=None, machine=MACHINE, **fields):
    """Results of verifying a claim that was built so."""
    with pytest.MonkeyPatch.context() as patch:
        declared = declaration(arms or two_arms(), **{"machine": {**machine, "gpus": []}, **fields})
        build(folder, patch, declared, loss, step_ms, machine, status, look)
    return verify.verify(folder)


RECORD = (
    'id = "901"\ntitle = "t"\nparent = "short/5"\ndate = 2026-01-01\npeople = ["@x"]\nkind = "systems"\n'
    'source = "log"\n[delta]\n"system.ranks_per_microbatch" = 1\n'
)


def systems(folder, arms=None, loss=None, sets=(), **fields):
    """A systems claim: a new record that differs from record 5 in system.ranks_per_microbatch."""
    folder.mkdir(parents=True)
    if arms is None:
        s = deltas.resolve("short/5", scale="micro", sets=["system.ranks_per_microbatch=1", *sets]).settings
        arms = {"new": arm("short/901", sets, s=s), "parent": arm("short/5", sets)}
        (folder / "record.toml").write_text(RECORD)
    times = {"new": 1900.0, "parent": 2000.0, "base": 2000.0}
    return built(folder, arms, loss or {"new": 5.3, "parent": 5.3, "base": 5.33}, times,
                 **{"claim": "systems", "record": arms["new"]["record"], "target": None, **fields})


def command(folder, **options):
    """Exit code of `records verify`."""
    given = {
        "audit": None, "judge_key": None, "reproduction": None, "target": None, "json": False, "out": None
    }
    given |= options
    return verify.run(type("Options", (), {"folder": str(folder), **given}))
