"""The ledger of an idea: every attempt at it, in one append-only chain that begins with the decision rule.

    attempts/NAME/ledger.jsonl
        open    the decision rule, before the first leg: claim, scale, target, alpha, how many legs share it
        leg     {leg, name, machine, plan, ...}: a plan on a machine, before its first run
        fate    {leg, verdict, runs, excluded, manifest, why}: what became of it

A leg is one claim folder with its manifest, which names the hash of its `leg` line; so a manifest cannot be
made for a leg that was not booked, and a leg that failed stays in the chain in front of the next one. The
legs of an idea share its alpha equally: however many are tried, the promise of the rule is kept. A leg after
the first has a folder of its own with a copy of the chain. `records verify` shows the legs next to the runs.

Like every chain here it shows what belongs together, not that nothing was left out: an idea that is tried
under another name, or outside, leaves no line.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import runlog
from common import files, untrusted
from common.errors import UserError
from common.interrupt import held
from evidence.claim_folder import Evidence
from evidence.manifest import CLOCK_S, Claim, Require, moment
from evidence.plausible import DAY_S, now
from settings import deltas

NAME = "ledger.jsonl"
VERSION, MOST_LEGS = 1, 100
FATES = ("shown", "not shown", "refused", "withdrawn")
SHAPES = {
    "open": {"version": int, "idea": str, "record": str, "rule": dict},
    "leg": {"leg": int, "name": str, "machine": dict, "plan": dict, "order_seed": int,
            "commit": (str, type(None)),
            "against": list},
    "fate": {"leg": int, "verdict": str, "runs": int, "excluded": int, "manifest": str, "why": str},
}
CHAIN = {"n": int, "kind": str, "utc": str}
MACHINE = {"machine": (str, type(None)), "cpu": (str, type(None)), "cores": (int, type(None)), "gpus": list}
ENTRY = {"idea": str, "leg": int, "hash": str}  # of a manifest, on its leg
RULE = {"claim": str, "scale": str, "target": (int, float, type(None)), "alpha": (int, float), "legs": int,
        "text": str}


@dataclass
class Leg:
    """A leg: its line, the hash of it, and its last fate or None."""
    line: dict
    hash: str
    fate: dict | None = None


@dataclass
class Ledger:
    """A ledger as read. `hashes`: of all lines, in order."""
    opened: dict | None = None
    legs: list = field(default_factory=list)
    hashes: list = field(default_factory=list)
    dates: list = field(default_factory=list)

    @property
    def share(self) -> float:
        """What one leg may use of the rule's alpha."""
        return self.opened["rule"]["alpha"] / self.opened["rule"]["legs"]

    @property
    def open_leg(self) -> Leg | None:
        """The last leg if nothing says what became of it, else None."""
        return self.legs[-1] if self.legs and self.legs[-1].fate is None else None

    def add(self, event: dict, digest: str) -> None:
        """Take in one line; UserError if it has no place here."""
        kind, n = event["kind"], len(self.hashes)

        def require(condition, message):
            if not condition:
                raise UserError(f"{NAME}: line {n + 1} ({kind}): {message}")

        require(kind in SHAPES, f"unknown kind; known are {', '.join(SHAPES)}")
        require((kind == "open") == (n == 0), "a ledger begins with its one decision rule")
        shaped(event, SHAPES[kind] | CHAIN, require)
        if kind == "open":
            rule = event["rule"]
            require(event["version"] == VERSION, f"version {event['version']}, this program reads {VERSION}")
            shaped(rule, RULE, require)
            require(untrusted.is_name(event["idea"]),
                    f"idea {event['idea']!r:.60} must be the name of a folder")
            require(0 < rule["alpha"] < 1 and 1 <= rule["legs"] <= MOST_LEGS,
                    f"alpha must lie between 0 and 1, legs between 1 and {MOST_LEGS}")
            require(rule["text"] == rule_text(rule),
                    f"the text of the rule is not that of its numbers: {rule_text(rule)}")
            self.opened = event
        elif kind == "leg":
            self.require_leg(event, require)
            self.legs.append(Leg(event, digest))
        else:
            require(self.legs and event["leg"] == len(self.legs), f"leg {event['leg']} is not the last one")
            require(event["verdict"] in FATES, f"verdict must be one of {', '.join(FATES)}")
            before = self.legs[-1].fate
            require(before is None or event["verdict"] == "withdrawn" != before["verdict"],
                    f"leg {event['leg']} has its fate already: it can only be withdrawn")
            self.legs[-1].fate = event
        self.hashes.append(digest)
        self.dates.append(event["utc"])

    def require_leg(self, event: dict, require: Require) -> None:
        """A next leg: numbered in order, none open, none shown before, not more than the rule says."""
        require(event["leg"] == len(self.legs) + 1,
                f"legs are numbered in order: expected {len(self.legs) + 1}")
        require(event["leg"] <= self.opened["rule"]["legs"],
                f"the rule, written before leg 1, allows {self.opened['rule']['legs']} legs")
        require(self.open_leg is None, f"nothing says what became of leg {len(self.legs)}")
        name, plan = event["name"], event["plan"]
        require(untrusted.is_name(name), f"name {name!r:.60} must be that of a folder")
        require(name not in [x.line["name"] for x in self.legs], f"{name} is the folder of an earlier leg")
        shaped(event["machine"], MACHINE, require)
        require(all(isinstance(x, str) for x in event["against"]), "against must be names of attempts")
        require(is_plan(plan), "plan must hold runs or looks")
        require(not any(x.fate["verdict"] == "shown" for x in self.legs),
                "a leg before it was shown: that decides")


def is_plan(plan: dict) -> bool:
    """Is it {"runs": n}, or {"looks": [{"runs": n, "alpha": a}, ...]}?"""
    if set(plan) == {"runs"}:
        return type(plan["runs"]) is int
    return set(plan) == {"looks"} and isinstance(plan["looks"], list) and all(
        isinstance(x, dict) and set(x) == {"runs", "alpha"} and type(x["runs"]) is int for x in plan["looks"])


def shaped(event: dict, shape: dict, require: Require) -> None:
    """Require that an event has these fields with these types, and no others."""
    for name, kind in shape.items():
        value = event.get(name, ...)
        require(value is not ... and isinstance(value, kind) and not isinstance(value, bool),
                f"{name} is missing or has the wrong type")
    odd = sorted(event.keys() - shape.keys())
    require(not odd, f"has a field {odd[:1]!r:.60} that nothing reads")


# ----- reading and writing ----------------------------------------------------------------------------------

def read(path: Path) -> Ledger:
    """The Ledger in a file, every line checked. UserError on anything broken."""
    ledger = Ledger()
    try:
        for event, digest in runlog.read_links(path):
            ledger.add(event, digest)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"{NAME}: line {len(ledger.hashes) + 1} is malformed ({error!r:.60})") from None
    return ledger


@held
def append(path: Path, kind: str, **fields) -> str:
    """Check and write one line, which is on the disk when this returns its hash. Other writers wait."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        ledger = read(path) if size else Ledger()
        event = runlog.plain_event(n=len(ledger.hashes), kind=kind,
                                   utc=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **fields)
        line, digest = runlog.chain_line(ledger.hashes[-1] if ledger.hashes else runlog.GENESIS, event)
        ledger.add(event, digest)
        data = line.encode() + b"\n"
        try:
            if os.write(descriptor, data) != len(data):
                raise OSError(0, "no space left")
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, size)  # a line is there whole or not at all
            raise UserError(f"cannot write {path}: {error.strerror}; free some space and try again") from None
    finally:
        os.close(descriptor)
        if path.stat().st_size == 0:  # the first line was refused
            path.unlink()
    return digest


# ----- of a submission --------------------------------------------------------------------------------------

def rule_of(declaration: dict, legs: int) -> dict:
    """The decision rule of an idea whose first leg is declared so; its alpha is that of all legs together."""
    rule = {"alpha": declaration["alpha"] * legs, "legs": legs,
            **{key: declaration[key] for key in ("claim", "scale", "target")}}
    return {**rule, "text": rule_text(rule)}


def rule_text(rule: dict) -> str:
    """A decision rule in words."""
    goal = "parity with the parent" if rule["claim"] == "systems" else f"target {rule['target']}"
    legs = rule["legs"]
    return (f"the first leg that is shown decides; each of {legs} may use alpha / {legs} = "
            f"{rule['alpha'] / legs:.4g}: {goal} and a shorter training than the parent's, charged for its "
            "rests")


def begin(home: Path, folder: Path, declaration: dict, idea: str, legs: int | None) -> dict:
    """Book a leg, and the rule before the first one. Returns the manifest's entry {idea, leg, hash}.

    home: the folder that holds the idea's ledger. folder: that of the leg. legs: how many the rule allows,
    of a first leg; None for a later one.
    """
    path = home / NAME
    if not path.exists():
        append(path, "open", version=VERSION, idea=idea, record=declaration["record"],
               rule=rule_of(declaration, legs or 1))
    leg = len(read(path).legs) + 1
    digest = append(path, "leg", **line_of(declaration, leg, folder.name))
    return {"idea": idea, "leg": leg, "hash": digest}


def line_of(declaration: dict, leg: int, name: str) -> dict:
    """The fields of a leg's line: what its manifest will declare of machine, plan and stack."""
    machine = {k: declaration["machine"].get(k) for k in ("machine", "cpu", "cores", "gpus")}
    stack = declaration.get("against")
    return {"leg": leg, "name": name, "machine": machine, "plan": declaration["plan"],
            "order_seed": declaration["order_seed"],
            "commit": declaration["arms"].get("new", {}).get("commit"),
            "against": [x.get("attempt") for x in stack if isinstance(x, dict)]
            if isinstance(stack, list) else []}


def settle(folder: Path, claim: Claim, results: dict) -> None:
    """Book what became of the leg in a claim folder, once: in its idea's ledger and in the copy next to
    it."""
    entry = claim.declaration.get("ledger")
    if not isinstance(entry, dict):
        return
    home = home_of(folder, entry)
    ledger = read(home / NAME)
    leg = ledger.legs[-1] if ledger.legs else None
    verdict = "withdrawn" if claim.withdrawn is not None else results["verdict"]
    if leg is None or leg.hash != entry.get("hash") or verdict not in FATES:
        return
    if leg.fate is None or (verdict == "withdrawn" != leg.fate["verdict"]):
        why = (results.get("problems") or results.get("reasons") or [""])[0]
        append(home / NAME, "fate", leg=entry["leg"], verdict=verdict, runs=len(claim.runs),
               excluded=sum(r.fault is not None for r in claim.runs), manifest=claim.last_hash,
               why=str(why)[:300])
    if home.resolve() != folder.resolve():
        files.write(folder / NAME, (home / NAME).read_bytes())


def home_of(folder: Path, entry: dict) -> Path:
    """Folder of the ledger that a manifest's entry names: the idea's in this checkout, otherwise its own."""
    idea = str(entry.get("idea"))
    if "/" not in idea and (deltas.ATTEMPTS / idea / NAME).exists():
        return deltas.ATTEMPTS / idea
    return folder


def same_idea(record: deltas.Record) -> str | None:
    """Name of another attempt that was declared with the same delta on the same parent, or None."""
    for name in deltas.attempt_names():
        if deltas.ATTEMPT + name == record.ref or not (deltas.ATTEMPTS / name / NAME).exists():
            continue
        try:
            other = deltas.find_attempt(name)
        except UserError:
            continue
        if (other.parent, other.delta, other.subsumed) == (record.parent, record.delta, record.subsumed):
            return name
    return None


# ----- of a claim that is verified --------------------------------------------------------------------------

def check(found: Evidence) -> Iterator[str]:
    """Problems of a claim's ledger: the chain is whole, this leg is in it as declared, and the rule covers
    it."""
    d, path = found.declaration, found.folder / NAME
    entry = d.get("ledger")
    if entry is None:
        if path.exists():
            yield f"{NAME}: the manifest names no leg of it"
        elif d["claim"] != "comparison":
            found.unknown.append("how often this idea was tried before: the manifest names no ledger")
        return
    if not isinstance(entry, dict) or set(entry) != set(ENTRY) or not all(
            isinstance(entry[k], t) and not isinstance(entry[k], bool) for k, t in ENTRY.items()):
        yield f"manifest.jsonl: ledger {entry!r:.60} is no {{idea, leg, hash}}"
        return
    if not path.exists():
        yield (f"{NAME}: missing: the manifest names leg "
               f"{entry.get('leg') if isinstance(entry, dict) else '?'!r:.20}")
        return
    try:
        ledger = read(path)
    except UserError as error:
        yield str(error).replace(f"{found.folder}/", "")
        return
    leg = next((x for x in ledger.legs if x.hash == entry.get("hash")), None)
    if leg is None or leg.line["leg"] != entry.get("leg"):
        yield f"{NAME}: no leg of it has the hash that the manifest names"
        return
    found.ledger = ledger
    yield from check_leg(found, ledger, leg)
    yield from check_order(found, ledger, leg)
    yield from check_original(found, ledger, entry)


def check_leg(found: Evidence, ledger: Ledger, leg: Leg) -> Iterator[str]:
    """Machine, plan and stack of a leg are those of its manifest, and its rule covers what is claimed."""
    d, rule = found.declaration, ledger.opened["rule"]
    if ledger.opened["idea"] != d["ledger"]["idea"]:
        yield f"{NAME}: is about {ledger.opened['idea']}, the manifest declares {d['ledger']['idea']!r:.60}"
    if d["claim"] != "comparison" and leg.line["leg"] == 1 and ledger.opened["record"] != d["record"]:
        yield f"{NAME}: leg 1 is about {ledger.opened['record']!r:.60}, the manifest claims {d['record']}"
    for key, value in line_of(d, leg.line["leg"], leg.line["name"]).items():
        if leg.line[key] != value:
            yield f"{NAME}: leg {leg.line['leg']} was booked with another {key} than the manifest declares"
    for key in ("claim", "scale", "target"):
        if rule[key] != d[key]:
            yield f"{NAME}: the decision rule is about {key} {rule[key]!r}, the manifest declares {d[key]!r}"
    if d["alpha"] > ledger.share * (1 + 1e-9):
        yield (f"{NAME}: leg {leg.line['leg']} uses alpha {d['alpha']:g}, its share of the rule's "
               f"{rule['alpha']:g} "
               f"over {rule['legs']} legs is {ledger.share:g}")
    if d["claim"] != "comparison" and rule["alpha"] > 0.01 * (1 + 1e-9):
        yield (f"{NAME}: the decision rule uses alpha {rule['alpha']:g}: a record needs 0.01 or less for "
               "all its legs")


def check_order(found: Evidence, ledger: Ledger, leg: Leg) -> Iterator[str]:
    """The rule was written before the first leg, the leg before its manifest, and its fate after the last
    run."""
    before = None
    for n, utc in enumerate(ledger.dates, 1):
        at = moment(utc)
        if at is None or (before is not None and at < before - CLOCK_S):
            why = "no date" if at is None else "before the line above"
            yield f"{NAME}: line {n} is dated {utc!r:.40}, {why}"
            return
        if at > now() + DAY_S:
            yield f"{NAME}: line {n} is dated {utc}, in the future"
            return
        before = at
    declared = moment(found.declaration["utc"])
    if declared is not None and moment(leg.line["utc"]) > declared + CLOCK_S:
        yield (f"{NAME}: leg {leg.line['leg']} was booked at {leg.line['utc']}, after its manifest was "
               "declared")
    if leg.fate is None:
        return
    if leg.fate["manifest"] != found.claim.last_hash:
        yield (f"{NAME}: the fate of leg {leg.line['leg']} is of a manifest that ends with "
               f"{leg.fate['manifest'][:12]}, "
               f"this one ends with {found.claim.last_hash[:12]}")
        return
    last = moment(found.claim.last_utc)
    if last is not None and moment(leg.fate["utc"]) < last - CLOCK_S:
        yield (f"{NAME}: the fate of leg {leg.line['leg']} was booked at {leg.fate['utc']}, before the last "
               f"line of its manifest, {found.claim.last_utc}")
    made = {"runs": len(found.claim.runs), "excluded": sum(r.fault is not None for r in found.claim.runs)}
    if wrong := [key for key in made if leg.fate[key] != made[key]]:
        yield (f"{NAME}: the fate of leg {leg.line['leg']} tells {wrong[0]} {leg.fate[wrong[0]]}, its "
               f"manifest has {made[wrong[0]]}")


def check_original(found: Evidence, ledger: Ledger, entry: dict) -> Iterator[str]:
    """The chain next to a leg is that of its idea in this checkout, as far as it goes."""
    home = home_of(found.folder, entry)
    if home.resolve() == found.folder.resolve():
        return
    try:
        whole = read(home / NAME)
    except UserError as error:
        yield f"{home.name}/{error}"
        return
    shared = min(len(whole.hashes), len(ledger.hashes))
    if whole.hashes[:shared] != ledger.hashes[:shared]:
        yield f"{NAME}: is not the ledger of {home.name} in this checkout"
    elif len(whole.hashes) > shared:
        found.ledger = whole


def told(found: Evidence) -> dict | None:
    """results.json's `attempts`: the rule and every leg with its fate, or None without a ledger."""
    ledger = found.ledger
    if ledger is None:
        return None
    legs = [{"leg": x.line["leg"], "name": x.line["name"], "machine": x.line["machine"]["machine"],
             "plan": x.line["plan"], "against": x.line["against"], "booked": x.line["utc"],
             "fate": x.fate["verdict"] if x.fate else "open", "runs": x.fate["runs"] if x.fate else None,
             "why": x.fate["why"] if x.fate else ""} for x in ledger.legs]
    return {"idea": ledger.opened["idea"], "rule": ledger.opened["rule"], "ruled": ledger.opened["utc"],
            "this": found.declaration["ledger"]["leg"], "legs": legs}


def lines(attempts: dict) -> Iterator[str]:
    """What a person reads of results.json's `attempts`."""
    rule = attempts["rule"]
    yield f"attempts at {attempts['idea']}: rule of {attempts['ruled']}: {rule['text']}"
    for x in attempts["legs"]:
        plan = x["plan"].get("runs") or "/".join(str(look["runs"]) for look in x["plan"]["looks"])
        here = " (this one)" if x["leg"] == attempts["this"] else ""
        runs = "" if x["runs"] is None else f", {x['runs']} runs made"
        yield (f"  leg {x['leg']} of {rule['legs']}{here}: {x['name']}, machine {x['machine']}, {plan} "
               f"runs an arm{runs}: "
               f"{x['fate']}" + (f" ({x['why']})" if x["why"] else ""))
