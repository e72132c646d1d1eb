"""Facts that move time or loss must agree: between the arms of a claim, and within each arm.

One python, torch, platform, environment and number of threads for all runs; no graph that is compiled while
the clock runs in one run and not in another; nothing that makes the parent slower than this device allows.
And before a plan goes on, the same is asked of the machine that goes on with it (`require_same`), so that a
run that the claim could not hold is never registered.
"""

import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from evidence import arms
from evidence.claim_folder import Evidence
from evidence.manifest import Claim
from evidence.run_laws import Log, alike

EVERYWHERE = ("machine", "cpu", "cores", "torch", "python", "platform")
WITHIN_AN_ARM = ("fallbacks", "active_parameters", "flops_per_token")
LATE = "graphs compiled while the clock ran"


def check(found: Evidence) -> Iterator[str]:
    """Problems of facts that differ between the runs of a claim."""
    logs = list(found.logs.values())
    for key in EVERYWHERE:
        yield from alike([(log.where, log.start[key]) for log in logs], key)
    # version 2 of the log has no environment: None then, and None must be that of all runs
    yield from alike([(log.where, log.start.get("environment")) for log in logs], "environment")
    ended = [log for log in logs if log.one("end") is not None]
    yield from alike([(log.where, log.one("end").get("graphs_in_clock")) for log in ended], LATE)
    for name in found.declaration["arms"]:
        rows = found.of(name)
        for key in WITHIN_AN_ARM:
            yield from alike([(log.where, log.start.get(key)) for log in rows], f"{key} (arm {name})")
    yield from check_devices(found)
    yield from check_fallbacks(found)
    yield from check_declared(found)


def check_devices(found: Evidence) -> Iterator[str]:
    """One device line for all runs, its threads included; only system.reduction=ordered fixes threads itself,
    so that arms which differ in it are held to be alike each by itself."""
    by_arm = {name: found.of(name) for name in found.declaration["arms"]}
    fixes = {name: any(ordered(log) for log in logs) for name, logs in by_arm.items()}
    groups = [[log for name, logs in by_arm.items() if fixes[name] is fixed for log in logs]
              for fixed in (False, True)]
    for logs in groups:
        yield from alike([(log.where, log.start["device"]) for log in logs], "device")
    # without threads, all of them are alike
    yield from alike([(log.where, log.start["device"].rpartition(",")[0]) for log in sum(groups, [])
                      if all(groups)], "device")


def ordered(log: Log) -> bool:
    """Do the settings of a log fix the number of threads?"""
    system = log.start["settings"].get("system")
    return isinstance(system, dict) and system.get("reduction") == "ordered"


def check_fallbacks(found: Evidence) -> Iterator[str]:
    """The parent may not be slower than its device allows in a way that the new arm is not."""
    if found.declaration["claim"] == "comparison" or not {"new", "parent"} <= set(found.declaration["arms"]):
        return
    mine = {x for log in found.of("new") for x in fallbacks(log)}
    for name in sorted(set(found.declaration["arms"]) - {"new"}):
        for log in found.of(name)[:1]:
            for line in sorted(set(fallbacks(log)) - mine):
                yield (f"{log.where}: arm {name} runs slower than it could be, and arm new does not: "
                       f"{line:.100}")


def fallbacks(log: Log) -> list[str]:
    """The lines of a log on what runs slower than it could; older logs have none."""
    told = log.start.get("fallbacks")
    return [x for x in told if isinstance(x, str)] if isinstance(told, list) else []


def check_declared(found: Evidence) -> Iterator[str]:
    """Python, torch and platform are those that were declared before the first run, and so are the variables
    that the runs found."""
    d = found.declaration
    for log in found.logs.values():
        for key in ("torch", "python", "platform"):
            declared = d["machine"].get(key)
            if declared is not None and log.start[key] != declared:
                yield f"{log.where}: {key} {log.start[key]!r:.60}, declared {declared!r:.60}"
        told, declared = log.start.get("environment"), d.get("environment")
        if isinstance(told, dict) and isinstance(declared, dict):
            wrong = sorted(k for k in declared if told.get(k) != declared[k])
            if wrong:
                yield (f"{log.where}: environment: {wrong[0]} is {told.get(wrong[0])!r:.40}, declared "
                       f"{declared[wrong[0]]!r:.40}")


# ----- before a plan goes on --------------------------------------------------------------------------------

def programs() -> dict[str, str | None]:
    """{python, platform, torch} of this process, as the runs that it starts will log them; torch is not
    imported."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = None
    return {"python": platform.python_version(), "platform": platform.platform(), "torch": torch}


def require_same(claim: Claim, starts: list[dict], shards: Path | None) -> None:
    """UserError if a run from here could not stand next to those of the claim. Nothing has been registered.

    starts: start events of the claim's runs so far. shards: folder of the shards that the next run would
    read, or None for the embedded corpus.
    """
    d = claim.declaration
    for key, here in programs().items():
        before = [s[key] for s in starts if isinstance(s.get(key), str)][:1] or [d["machine"].get(key)]
        if before[0] is not None and here is not None and before[0] != here:
            raise UserError(f"the runs of this plan have {key} {before[0]!r}, here it is {here!r}: no run "
                            "was "
                            "registered; go on with the same one, or start a new plan")
    if shards is not None and d.get("corpus_prefixes") is None:
        raise UserError(f"the plan was declared with the embedded corpus: no run was registered; leave "
                        f"--data {shards} out")
    if shards is not None:
        require_same_shards(d, starts, shards)


def require_same_shards(d: dict, starts: list[dict], shards: Path) -> None:
    """UserError if a folder of shards holds other tokens than those that were declared."""
    from data.shards import open_corpus, val_digest
    remedy = "no run was registered; name the folder of the first runs with --data"
    here = arms.corpus_prefixes(shards)
    shared = min(len(here), len(d["corpus_prefixes"]))
    if here[:shared] != d["corpus_prefixes"][:shared]:
        raise UserError(f"{shards}: other training tokens than the plan was declared with: {remedy}")
    tokens = {a["settings"]["validation"]["tokens"] for a in d["arms"].values() if a.get("settings")}
    known = {s.get("val_digest") for s in starts} - {None}
    if not known or len(tokens) != 1:
        return
    if val_digest(open_corpus(shards), tokens.pop()) not in known:
        raise UserError(f"{shards}: other validation tokens than those of the runs so far: {remedy}")
