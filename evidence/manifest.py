"""The manifest of a claim folder: the plan, declared before its first run, and what became of every run.

manifest.jsonl is chained like run.jsonl, and each line is on the disk before the program goes on:

    declare   the whole plan: arms with their resolved settings, runs per arm or looks, pairing, order of
              execution
    register  {run, arm, seed, discard}: the next run, just before its process starts, which gets the hash of
              this line
    finish    {run, folder, last_hash, status, exit}: what became of it
    fault     {run, cause, note}: why a run without a final loss does not count; its place in the order is run
              again
    look      {runs, decision}: what was decided when every arm had that many runs
    withdraw  {why}: the last line of a claim that is given up; what was run stays

One run at a time, in the declared order. A register without a finish is a run that failed, until a fault
explains it. Reading and writing go through the same checks, so that nothing can be written that would be
refused later.
"""

import datetime
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runlog
from common import untrusted
from common.errors import UserError
from common.interrupt import held

VERSION = 1
NAME = "manifest.jsonl"
STATUSES = ("finished", "diverged", "interrupted", "failed")
WITH_LOSS = ("finished", "diverged")  # statuses of runs that told their loss: nothing can exclude them
CAUSES = ("killed", "machine", "out_of_memory", "disk_full", "interrupted")
DECISIONS = ("continue", "passed", "failed")
CLAIMS = ("ml", "systems", "comparison")
NUMBER = (int, float)
CLOCK_S = 2.0  # dates have whole seconds, and clocks are corrected
DECLARED = {
    "version": int, "claim": str, "record": (str, type(None)), "scale": (str, type(None)),
    "target": (*NUMBER, type(None)), "alpha": NUMBER, "arms": dict, "plan": dict, "pairing": str,
    "margin": NUMBER, "order": list, "order_seed": int, "processes": int, "machine": dict
}
# Of a declaration: what some have next to DECLARED, and what an arm may tell. All else is refused.
MAY_DECLARE = (
    "aa", "against", "code", "code_diff", "confidence", "corpus_prefixes", "data", "environment", "launcher",
    "ledger", "long_start"
)
ARM = ("text", "kind", "ref", "commit", "tree", "dirty", "argv", "record", "preset", "scale", "changes",
       "report", "ml_hash", "system_hash", "settings", "sha256", "path")
CHAIN = ("n", "kind", "utc")
FIELDS = {"register": {"run": int, "arm": str, "seed": int, "discard": bool},
          "finish": {"run": int, "folder": (str, type(None)), "last_hash": (str, type(None)), "status": str,
                     "exit": (int, type(None))},
          "fault": {"run": int, "cause": str, "note": str}, "look": {"runs": int, "decision": str},
          "withdraw": {"why": str}}
# What some events have next to FIELDS, of these types: processes that a run left behind, which were ended.
MORE = {"finish": {"leftover": int}}
# What the free fields of a declaration and of an arm hold, where they are there.
FREE = {"aa": bool, "against": (list, type(None)), "code": (str, type(None)), "code_diff": (str, type(None)),
        "corpus_prefixes": (list, type(None)), "data": (str, type(None)), "environment": (dict, type(None)),
        "launcher": str, "ledger": dict, "long_start": (str, type(None))}
FREE_OF_ARM = {"text": str, "ref": (str, type(None)), "commit": (str, type(None)), "tree": (str, type(None)),
               "dirty": (str, type(None)), "argv": list, "report": list, "sha256": str, "path": str,
               "record": (str, type(None)), "preset": (str, type(None)), "scale": (str, type(None)),
               "changes": (list, type(None)), "ml_hash": (str, type(None)), "system_hash": (str, type(None)),
               "settings": (dict, type(None))}
MACHINE = {"machine": str, "cpu": str, "cores": (int, type(None)), "gpus": list, "platform": str,
           "python": str, "torch": (str, type(None))}
LAUNCHERS = ("python", "system/launch.py")
Require = Callable[[object, str], None]  # raises UserError with the text unless the first argument holds


@dataclass
class Run:
    """A registered run. `hash` is that of its register line; `place` its index in the declared order."""
    run: int
    arm: str
    seed: int
    discard: bool
    hash: str
    place: int
    utc: str
    finish: dict | None = None
    fault: dict | None = None

    @property
    def counts(self) -> bool:
        """Does it enter the statistics, as a loss or as a failure?"""
        return not self.discard and self.fault is None

    @property
    def status(self) -> str:
        """What became of it; `failed` while nothing says otherwise."""
        return self.finish["status"] if self.finish else "failed"


class Claim:
    """What a manifest says so far: declaration, runs, looks, withdrawal.
    `add` checks each event against all before it."""

    def __init__(self, path: Path | str) -> None:
        self.path, self.declaration, self.runs, self.looks = Path(path), None, [], []
        self.withdrawn = None  # the event, once the claim is given up
        self.last_hash, self.events, self.last_utc = runlog.GENESIS, 0, None

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def open_run(self) -> Run | None:
        """The registered run of which nothing more is known, or None."""
        last = self.runs[-1] if self.runs else None
        return last if last and last.finish is None and last.fault is None else None

    @property
    def next_place(self) -> int:
        """Index in the declared order of the run that comes next: the places of faulty runs are run again."""
        return sum(r.fault is None for r in self.runs)

    @property
    def complete(self) -> bool:
        """Has every place of the declared order been run? (Looks may end a claim before.)"""
        return self.open_run is None and self.next_place == len(self.declaration["order"])

    @property
    def ended(self) -> bool:
        """Has everything been run that the plan asks for: the whole order,
        or as much as a look needed to decide?"""
        if "looks" in self.declaration["plan"]:
            return self.open_run is None and bool(self.looks) and self.looks[-1]["decision"] != "continue"
        return self.complete

    def counted(self, arm: str) -> list[Run]:
        """The runs of an arm that count, in order of execution."""
        return [r for r in self.runs if r.arm == arm and r.counts]

    def add(self, event: dict, digest: str) -> None:
        """Take in one event (a dict with n, kind, utc) and its hash; UserError if it has no place here."""
        kind = event["kind"]

        def require(condition, message):
            if not condition:
                raise UserError(f"{self.path}: line {self.events + 1} ({kind}): {message}")

        require((kind == "declare") == (self.events == 0), "a manifest begins with its one declaration")
        if kind == "declare":
            check_declaration(event, require)
            self.declaration = event
        else:
            require(kind in FIELDS, f"unknown kind of event; known are {', '.join(FIELDS)}")
            require(self.withdrawn is None, "the claim was withdrawn: nothing follows")
            more = MORE.get(kind, {})
            check_fields(event, FIELDS[kind] | {k: more[k] for k in more if k in event}, require)
            check_known(event, (*FIELDS[kind], *more, *CHAIN), kind, require)
            {"register": self.register, "finish": self.finish, "fault": self.fault, "look": self.look,
             "withdraw": self.withdraw}[kind](event, digest, require)
        self.last_hash, self.events, self.last_utc = digest, self.events + 1, event.get("utc")

    def register(self, event: dict, digest: str, require: Require) -> None:
        require(self.open_run is None,
                f"run {len(self.runs) - 1} is still open: finish it or explain it first")
        require(not self.looks or self.looks[-1]["decision"] == "continue",
                "the last look has ended the claim")
        require(event["run"] == len(self.runs), f"runs are numbered in order: expected {len(self.runs)}")
        place, order = self.next_place, self.declaration["order"]
        require(place < len(order), "all declared runs are done")
        require({k: event[k] for k in ("arm", "seed", "discard")} == order[place],
                f"the declared order has {order[place]} here")
        self.runs.append(
            Run(event["run"], event["arm"], event["seed"], event["discard"], digest, place, event["utc"]))

    def finish(self, event: dict, digest: str, require: Require) -> None:
        require(self.open_run is not None and event["run"] == self.open_run.run,
                f"run {event['run']} is not under way")
        require(event["status"] in STATUSES, f"status must be one of {', '.join(STATUSES)}")
        require(event.get("leftover", 1) > 0, "leftover counts processes that were ended")
        folder = event["folder"]
        require(folder is None or untrusted.is_name(folder),
                f"folder {folder!r:.60} must be a name under runs/")
        require(folder is None or folder not in [r.finish["folder"] for r in self.runs if r.finish],
                f"folder {folder} already belongs to another run")
        require((folder is None) == (event["last_hash"] is None), "folder and last_hash go together")
        require(folder is not None or event["status"] not in WITH_LOSS,
                f"a {event['status']} run has a folder")
        self.runs[-1].finish = event

    def fault(self, event: dict, digest: str, require: Require) -> None:
        require(0 <= event["run"] == len(self.runs) - 1,
                f"only the last run can be excluded, not run {event['run']}")
        run = self.runs[-1]
        require(run.fault is None, f"run {run.run} already has a fault")
        require(run.status not in WITH_LOSS,
                f"run {run.run} {run.status}: a run that told its loss always counts")
        require(event["cause"] in CAUSES, f"cause must be one of {', '.join(CAUSES)}")
        run.fault = event

    def look(self, event: dict, digest: str, require: Require) -> None:
        looks = self.declaration["plan"].get("looks", [])
        require(len(self.looks) < len(looks) and looks[len(self.looks)]["runs"] == event["runs"],
                f"a look at {event['runs']} runs was not declared" + (" as the next" if looks else ""))
        require(event["decision"] in DECISIONS, f"decision must be one of {', '.join(DECISIONS)}")
        require(
            self.open_run is None
            and all(len(self.counted(a)) >= event["runs"] for a in self.declaration["arms"]),
            f"not every arm has {event['runs']} runs yet"
        )
        self.looks.append(event)

    def withdraw(self, event: dict, digest: str, require: Require) -> None:
        require(self.open_run is None, f"run {len(self.runs) - 1} is still open: say first what became of it")
        require(event["why"].strip() != "", "why must not be empty")
        self.withdrawn = event


def check_fields(event: dict, types: dict, require: Require) -> None:
    """Require that an event has these fields with these types."""
    for name, kind in types.items():
        require(name in event, f"{name} is missing")
        require(isinstance(event[name], kind) and (kind is bool or not isinstance(event[name], bool)),
                f"{name} = {event[name]!r} has the wrong type")


def check_there(table: dict, types: dict, require: Require) -> None:
    """Require that those of these fields that a table has are of these types."""
    check_fields(table, {name: types[name] for name in types if name in table}, require)


def check_known(table: dict, known: Iterable[str], where: str, require: Require) -> None:
    """Require that a table has no other field than the known ones."""
    odd = sorted(table.keys() - set(known))
    require(not odd, f"{where} has a field {', '.join(odd)[:60]!r} that nothing reads")


def check_declaration(event: dict, require: Require) -> None:
    """Whole and consistent: known version, arms, a plan whose counts the order has, alphas that add up."""
    require(
        event.get("version") == VERSION,
        f"manifest version {event.get('version')!r}, this program reads {VERSION}",
    )
    check_fields(event, DECLARED, require)
    require(event["claim"] in CLAIMS, f"claim must be one of {', '.join(CLAIMS)}")
    require(event["pairing"] in ("seed", "none"), "pairing must be seed or none")
    arms, plan, order = event["arms"], event["plan"], event["order"]
    require(
        len(arms) >= 1
        and all(isinstance(a, dict) and a.get("kind") in ("record", "script") for a in arms.values()),
        "arms must be tables of kind record or script"
    )
    check_free(event, require)
    check_known(plan, ("runs", "looks"), "plan", require)
    require(len(plan) == 1, "plan must hold runs or looks, not both")
    require(0 < event["alpha"] < 1, "alpha must lie between 0 and 1")
    confidence = event.get("confidence", 0.95)
    require(isinstance(confidence, NUMBER) and 0 < confidence < 1, "confidence must lie between 0 and 1")
    require(event["claim"] != "comparison" or abs(1 - event["alpha"] - confidence) < 1e-9,
            f"confidence {confidence} and alpha {event['alpha']} of a comparison must add up to 1")
    if "looks" in plan:
        looks = plan["looks"]
        require(
            isinstance(looks, list)
            and looks
            and all(
                isinstance(x, dict) and set(x) == {"runs", "alpha"} and type(x["runs"]) is int
                and isinstance(x["alpha"], NUMBER)
                for x in looks
            ),
            "plan.looks must be a list of {runs, alpha}",
        )
        counts = [x["runs"] for x in looks]
        require(0 < counts[0] and all(a < b for a, b in zip(counts, counts[1:])),
                "the runs of looks must rise")
        require(
            all(x["alpha"] > 0 for x in looks)
            and abs(sum(x["alpha"] for x in looks) - event["alpha"]) < 1e-9,
            "the alphas of all looks must add up to alpha"
        )
        total = counts[-1]
    else:
        total = plan.get("runs")
        require(type(total) is int and total >= 1, "plan must hold runs or looks")
    for x in order:
        require(
            isinstance(x, dict) and set(x) == {"arm", "seed", "discard"} and x["arm"] in arms
            and type(x["seed"]) is int and x["seed"] >= 0 and type(x["discard"]) is bool,
            f"order: {x!r} is no {{arm, seed, discard}}"
        )
    seeds = {arm: [x["seed"] for x in order if x["arm"] == arm and not x["discard"]] for arm in arms}
    for arm, mine in seeds.items():
        require(len(mine) == total, f"order: {len(mine)} runs of {arm}, the plan says {total}")
        require(len(set(mine)) == total, f"order: a seed of {arm} occurs twice")
        require(event["pairing"] == "none" or set(mine) == set(next(iter(seeds.values()))),
                "order: paired arms must have the same seeds")


def check_free(event: dict, require: Require) -> None:
    """No unknown field, and each one that only some declarations and arms have is of its type."""
    check_known(event, (*DECLARED, *MAY_DECLARE, *CHAIN), "the declaration", require)
    check_there(event, FREE, require)
    check_known(event["machine"], MACHINE, "machine", require)
    check_there(event["machine"], MACHINE, require)
    require(event.get("launcher", LAUNCHERS[0]) in LAUNCHERS,
            f"launcher must be one of {', '.join(LAUNCHERS)}")
    for name, arm in event["arms"].items():
        check_known(arm, ARM, f"arm {name}", require)
        check_there(arm, FREE_OF_ARM, require)
        require(arm["kind"] == "script" or not {"path", "sha256"} & arm.keys(),
                f"arm {name} of a record has a script's fields")
    require(all(isinstance(x, str) for x in event.get("corpus_prefixes") or []),
            "corpus_prefixes must be digests")


def moment(utc: Any) -> float | None:
    """Seconds since the epoch of a date as logs have it, or None."""
    try:
        date = datetime.datetime.strptime(utc, "%Y-%m-%dT%H:%M:%SZ")
        if not re.fullmatch("[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}Z", utc):  # one spelling each
            return None
    except (TypeError, ValueError):
        return None
    return date.replace(tzinfo=datetime.timezone.utc).timestamp()


# ----- files ------------------------------------------------------------------------------------------------

def manifest_path(where: Path | str) -> Path:
    """DIR/manifest.jsonl for a claim folder, or the path of the file itself."""
    return Path(where) / NAME if Path(where).is_dir() else Path(where)


def read(where: Path | str) -> Claim:
    """The Claim in a folder (or manifest file), every line checked. UserError on anything broken."""
    path = manifest_path(where)
    claim = Claim(path)
    for event, digest in runlog.read_links(path):
        claim.add(event, digest)
    return claim


class Manifest:
    """A manifest open for appending, by one process at a time. `claim` is what it says so far.

    The lock lies on the open file (`descriptor`), which a started run inherits: as long as that run lives
    nobody else continues the plan, even if the process that started it was killed.
    """

    def __init__(self, path: Path, new: bool = False) -> None:
        self.claim = Claim(path)
        try:
            if new:
                path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | ((os.O_CREAT | os.O_EXCL) if new else 0)
            self.descriptor = os.open(path, flags, 0o644)
        except FileExistsError:
            raise UserError(
                f"{path.parent} already holds a plan: continue it with --resume {path.parent}, or choose "
                "another --out") from None
        except FileNotFoundError as error:
            if new:
                raise UserError(f"cannot write {path}: {error.strerror}; choose another folder") from None
            raise UserError(f"{path.parent}: no {NAME} here, so there is nothing to continue") from None
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another folder") from None
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.descriptor)
            raise UserError(f"{path.parent} is in use: its plan, or a run that outlived it, is still "
                            "running; wait for it or end it") from None

    @held
    def append(self, kind: str, **fields) -> str:
        """Check and write one event; it is on the disk when this returns its hash."""
        utc = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        event = runlog.plain_event(n=self.claim.events, kind=kind, utc=utc, **fields)
        line, digest = runlog.chain_line(self.claim.last_hash, event)
        untrusted.json_value(line, f"{self.claim.path}: the new line ({kind})")  # what cannot be read again
        size = os.fstat(self.descriptor).st_size
        self.claim.add(event, digest)
        data = line.encode() + b"\n"
        try:
            if os.write(self.descriptor, data) != len(data):
                raise OSError(0, "no space left")
            os.fsync(self.descriptor)
        except OSError as error:
            os.ftruncate(self.descriptor, size)  # a line is there whole or not at all
            self.claim = read(self.claim.path) if size else Claim(self.claim.path)
            raise UserError(
                f"cannot write {self.claim.path}: {error.strerror}; it is complete up to here, free some "
                "space and continue") from None
        return digest

    def close(self) -> None:
        os.close(self.descriptor)


def create(folder: Path | str, declaration: dict) -> Manifest:
    """A new Manifest in a folder that has none, with its declaration written."""
    # refuse before a file exists
    Claim(Path(folder) / NAME).add({"n": 0, "kind": "declare", **declaration}, "")
    manifest = Manifest(Path(folder) / NAME, new=True)
    manifest.append("declare", **declaration)
    return manifest


def resume(folder: Path | str) -> Manifest:
    """The Manifest of a folder, open for appending. A last line that a kill cut short is removed."""
    path = Path(folder) / NAME
    manifest = Manifest(path)
    data = untrusted.bytes_of(path, runlog.LOG_LIMIT)
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        os.ftruncate(manifest.descriptor, whole)
    try:
        manifest.claim = read(path)
    except UserError:
        manifest.close()
        raise
    return manifest
