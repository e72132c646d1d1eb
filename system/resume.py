"""Which run `--resume` continues, and with which settings. No torch here.

Under `torchrun --max-restarts` the same command line is started again: then the run of that launch is
continued without being asked for.
"""

import hashlib
import os
import shutil
import socket
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import runlog
import settings
from common import files
from common.errors import UserError
from settings import deltas, schema
from settings.deltas import Resolved
from settings.numerics import NUMERICS_VERSION
from system.place import Place

LAST = "last"
CHECKPOINTS = "checkpoints"  # folder in the run's folder


def choose(options: Namespace) -> None:
    """Set options.resume to the folder of the run that is continued, or to None.

    UserError if there is no such run.
    """
    options.restarted = options.resume is None
    if options.restarted:
        options.resume = restarted(options.out, os.environ)
        return
    if options.plan:
        raise UserError("--resume trains: leave --dry-run out")
    if options.registered:
        raise UserError("--resume: a registered run is trained in one piece: leave --registered out")
    options.resume = find(options.resume, options.out)


def find(name: str, out: str) -> Path:
    """The folder of a run by path, by its name under `out`, or the newest unfinished one (`last`)."""
    if name != LAST:
        for folder in (Path(name), Path(out) / name):
            if (folder / "run.jsonl").is_file():
                return folder
        raise UserError(f"--resume {name}: no folder with a run.jsonl, here or under {out}")
    for folder in folders(out):
        if (last := last_event(folder)) and (last["kind"] != "end" or last["status"] == "interrupted"):
            return folder
    raise UserError(f"--resume last: no unfinished run under {out}: name its folder, or give --out")


def folders(out: str) -> list[Path]:
    """Run folders, the newest first."""
    found = [path.parent for path in files.listed(Path(out), "*/run.jsonl")]
    found.sort(key=lambda folder: ((folder / "run.jsonl").stat().st_mtime, folder.name))
    return found[::-1]


def last_event(folder: Path) -> dict | None:
    """The last whole event of a run, or None if the log cannot be read."""
    events = runlog.readable(folder / "run.jsonl")
    return events[-1] if events else None


# ----- torchrun ---------------------------------------------------------------------------------------------

def launch(environment: Mapping[str, str]) -> str:
    """An id of this launch by torchrun, the same in every restart of its processes; "" without torchrun."""
    identity = environment.get("TORCHELASTIC_RUN_ID")
    if identity is None:
        return ""
    if identity == "none":  # torchrun without --rdzv-id: told apart by the process that started this one
        identity = f"{socket.gethostname()} {os.getppid()}"
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def restarted(out: str, environment: Mapping[str, str]) -> Path | None:
    """The folder of the run that torchrun has started again, or None."""
    if environment.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    mine = launch(environment)
    return next((folder for folder in folders(out)
                 if any(e.get("launch") == mine for e in runlog.readable(folder / "run.jsonl")[:1])), None)


def verdict_of_restart(options: Namespace) -> bool | None:
    """Whether a run that torchrun has started again had reached its target; None: it is not over.

    A target that is missed is an exit code, which torchrun takes for a failure.
    """
    if not options.restarted or options.resume is None:
        return None
    end = last_event(options.resume)
    if end["kind"] != "end" or end["status"] == "interrupted":
        return None
    return end["status"] == "finished" and end["reached"] is not False


def tidy(folder: Path) -> None:
    """Do what a kill after the last event of a run has left undone: log.txt, summary.json, no checkpoints."""
    if Place.read().rank == 0:
        runlog.complete(folder)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


# ----- settings ---------------------------------------------------------------------------------------------

def settings_of(options: Namespace, given: Resolved | None) -> Resolved:
    """The run's settings, with its seed put into the options.

    given: what the rest of the command line resolves to, if it names a record: the same ml settings, and
    perhaps others of the axis system, which then count. UserError if they differ, or if the log was written
    by a program whose results are others.
    """
    folder = options.resume
    try:
        events = [event for event, _ in runlog.read_links(folder / "run.jsonl", torn=True)]
    except runlog.Empty as error:
        raise UserError(f"{error}; its settings are lost: name the record and start again") from None
    start = events[0]
    if start.get("kind") != "start" or start.get("log_version") not in runlog.READABLE:
        raise UserError(f"{folder}/run.jsonl: is not the log of a run that this program can read")
    if runlog.ended(events):
        tidy(folder)
    if not options.restarted:
        runlog.refuse_ended(folder, events)
    if start["numerics_version"] != NUMERICS_VERSION:
        raise UserError(f"{folder}: was begun under numerics version {start['numerics_version']}, here it is "
                        f"{NUMERICS_VERSION}: resume it with a checkout of {start['code']}")
    s = settings.check(schema.from_plain(start["settings"]))
    if schema.ml_hash(s) != start["ml_hash"]:
        raise UserError(
            f"{folder}: its settings do not hash to {start['ml_hash']}: resume it with a checkout of "
            f"{start['code']}"
        )
    if options.seed not in (0, start["seed"]):
        raise UserError(f"--resume {folder}: its seed is {start['seed']}: leave --seed out")
    options.seed = start["seed"]
    began = start.get("rescue")
    if options.rescue not in (None, began):
        how = f"with --rescue {began}" if began else "without --rescue"
        raise UserError(f"--resume {folder}: its run began {how}: leave --rescue out")
    options.rescue = began
    if given is None:
        if options.scale or options.sets or options.with_ or options.without or options.revert:
            raise UserError(
                f"--resume {folder}: a run continues with its own settings: leave --scale, --set, --with, "
                "--without and --revert out, or name the record with them"
            )
        return Resolved(s, deltas.find_record(start["record"]), start["scale"], tuple(start["changes"]), (),
                        start["preset"])
    if (found := schema.ml_hash(given.settings)) != start["ml_hash"]:
        path, ours, theirs = next(
            x for x in schema.difference(given.settings, s) if not x[0].startswith("system")
        )
        raise UserError(
            f"--resume {folder}: {path} is {theirs} there and {ours} here (ml_hash {found}): a run continues "
            "with its own settings"
        )
    return given
