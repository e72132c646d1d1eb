"""A sweep's queue: a folder of targets (settings, seed) that any number of workers on any machines claim,
run and settle.

    plan.json             what to run, written once
    sealed.json           hash of plan.json and the program, written once when the first run starts
    survivors.json        what screening left over, written once
    claims/<target>.<k>   the k-th claim; its mtime is the heartbeat
    runs/<run folder>     what the trainer wrote
    done/<target>.json    the result, written once
    failed/<target>.json  why there is none
    output/<target>.<k>   what the run printed; kept on failure

A target is named `<ml_hash>_s<seed>`, so arms that compute the same share their runs. Claims are numbered and
never deleted: a stale one is taken over by creating the next number, which only one worker can, and whoever
finds a number above its own has lost the target. Files appear whole by hard link, atomic on a shared disk
too. Ages are differences of mtimes that the file server gave, so the clocks of the machines do not matter. No
torch here.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import runlog
from common import files, untrusted
from common.errors import UserError
from settings import schema
from settings.numerics import NUMERICS_VERSION
from sweeps.plan import resolve

FOLDERS = ("claims", "done", "failed", "output", "runs", "workers")
SEAL = "sealed.json"
PROGRAM = {"sources": "sources of the trainer", "torch": "torch", "cpu": "processors"}
ARM = {"label", "record", "changes", "role", "ml_hash"}
RESULT = ("status", "val_loss", "seed", "ml_hash", "last_hash", "folder", "arm")
# what makes two plans the same sweep
SAME_SWEEP = ("kind", "base", "scale", "common", "seeds", "controls", "paired", "confidence",
              "numerics_version", "data", "digests", "groups", "arms", "first_seed")
# a claim whose heartbeat is older is taken over; above the longest attribute cache of NFS (60 s)
STALE_S = 120


# ----- files ------------------------------------------------------------------------------------------------

def write_once(path: Path | str, text: str) -> bool:
    """Create a file whole with this text; False if it exists already."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(files.encoded(text))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
            return True
        except FileExistsError:
            # a repeated NFS request may report its own success as a failure
            return os.stat(temporary).st_nlink == 2
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; a queue needs free space and hard links") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_json(
    path: Path | str, remedy: str = "move it away to have its target run again", needs: Sequence[str] = ()
) -> dict | None:
    """The object in a JSON file, None if the file is absent. UserError if it is damaged, no object, or lacks
    one of the keys `needs`."""
    try:
        found = untrusted.json_file(path)
    except UserError:
        if not Path(path).exists():
            return None
        raise UserError(f"{path}: not readable as JSON; {remedy}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: {json.dumps(found)[:40]} instead of an object; {remedy}")
    if lacking := [key for key in needs if key not in found]:
        raise UserError(f"{path}: {', '.join(lacking)} missing; {remedy}")
    return found


def create(root: Path | str, plan: dict) -> bool:
    """Make the queue folder; if it holds the same sweep already, go on with that.
    Returns True if it is new."""
    root = Path(root)
    try:
        for name in FOLDERS:
            (root / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the sweep folder {root}: {error.strerror}; choose another with --dir") from None
    if write_once(root / "plan.json", files.json_text(plan, indent=1) + "\n"):
        return True
    old = load_plan(root)
    for key in SAME_SWEEP:
        if essence(plan, key) != essence(old, key):
            hint = (
                f"{old.get(key)} there, {plan[key]} here" if not isinstance(plan[key], (dict, list))
                else "they differ"
            )
            raise UserError(f"{root} holds another sweep ({key}: {hint}): choose another --dir, or go on "
                            f"with that one by `python sweep.py work {root}`")
    return False


def essence(plan: dict, key: str) -> Any:
    """What a plan says about a key, without the words for people."""
    if key == "arms":
        return [{k: v for k, v in arm.items() if k != "report"} for arm in plan[key]]
    return plan.get(key)


def load_plan(root: Path | str) -> dict:
    """The plan of a queue folder, checked against what this checkout computes."""
    lost = "a sweep whose plan is lost must be planned anew in another --dir"
    plan = read_json(Path(root) / "plan.json", lost)
    if not isinstance(plan, dict) or plan.get("version") != 1 or not plan.get("arms"):
        raise UserError(
            f"{root}: no sweep here (plan.json of version 1); `python sweep.py ablate short/11` makes one")
    missing = {
        "kind", "name", "base", "scale", "common", "seeds", "controls", "paired", "confidence", "groups",
        "data", "numerics_version", "code"
    } - set(plan)
    if missing:
        raise UserError(f"{Path(root) / 'plan.json'}: {', '.join(sorted(missing))} missing: not written by "
                        "this program, or cut; plan the sweep anew in another --dir")
    if not isinstance(plan["arms"], list) or not all(
            isinstance(arm, dict) and ARM <= set(arm) for arm in plan["arms"]):
        raise UserError(f"{Path(root) / 'plan.json'}: its arms are not arms; {lost}")
    sealed = read_json(Path(root) / SEAL, "put it back as it was", ["plan", *PROGRAM])
    if sealed and sealed["plan"] != plan_hash(root):
        raise UserError(f"{root}/plan.json was changed after the first run had started: put it back "
                        "as it was, or plan the sweep anew in another --dir")
    return plan


def plan_hash(root: Path | str) -> str:
    """SHA-256 of plan.json."""
    return hashlib.sha256((Path(root) / "plan.json").read_bytes()).hexdigest()


def program() -> dict[str, str]:
    """The facts of this checkout and machine that all runs of a sweep share: PROGRAM."""
    here = runlog.machine()
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = ""
    return {"sources": runlog.sources()[1], "torch": torch, "cpu": here["cpu"]}


def seal(root: Path | str) -> dict:
    """Before a run starts: write down the plan's hash and the program, or refuse if another one has started.

    The first run of a sweep decides; UserError names what differs from it."""
    here = program()
    write_once(Path(root) / SEAL, files.json_text({"plan": plan_hash(root), **here, "utc": utc()}) + "\n")
    sealed = read_json(Path(root) / SEAL, "put it back as it was", ["plan", *PROGRAM])
    for key, what in PROGRAM.items():
        if sealed[key] != here[key]:
            raise UserError(f"{root} was started with other {what} ({key} {sealed[key]!r}, here "
                            f"{here[key]!r}): go on with those, or plan the sweep anew in another --dir")
    return sealed


def check_code(plan: dict) -> None:
    """Refuse to add runs with code that computes something else than the plan says."""
    if plan["numerics_version"] != NUMERICS_VERSION:
        raise UserError(
            f"the sweep was planned at numerics version {plan['numerics_version']}, this checkout has "
            f"{NUMERICS_VERSION}: check out {plan['code'][:12]}, or plan it anew in another --dir")
    for arm in plan["arms"]:
        found = schema.ml_hash(resolve(plan, arm).settings)
        if found != arm["ml_hash"]:
            raise UserError(
                f"{arm['label']} resolves to {found} in this checkout, the sweep was planned with "
                f"{arm['ml_hash']}: check out {plan['code'][:12]}, or plan it anew in another --dir")


# ----- targets ----------------------------------------------------------------------------------------------

def name_of(arm: dict, seed: int) -> str:
    """The file name of an arm with a seed."""
    return f"{arm['ml_hash']}_s{seed}"


def seeds_of(plan: dict, arm: dict) -> range:
    """The seeds that an arm runs with."""
    first = plan.get("first_seed", 0)
    return range(first, first + (plan["controls"] if arm["role"] == "control" else plan["seeds"]))


def targets(plan: dict, survivors: dict | None = None) -> list[tuple[str, dict, int]]:
    """[(target, arm, seed)] in the order of execution: seed by seed, the control first,
    what shares a run once.

    Control seeds beyond the arms' are spread over the rounds. Members of a group come after screening, if it
    survived.
    """
    n, out = plan["seeds"], {}
    for members in (False, True):
        for seed in range(n):
            for arm in plan["arms"]:
                is_member = arm["role"] == "member"
                if is_member != members or (is_member
                                            and arm["group"] not in (survivors or {}).get("kept", ())):
                    continue
                for s in seeds_of(plan, arm)[seed::n]:
                    out.setdefault(name_of(arm, s), (arm, s))
    return [(name, arm, seed) for name, (arm, seed) in out.items()]


def settled(
    root: Path | str, known: tuple[dict[str, dict], dict[str, dict]] = ({}, {})
) -> tuple[dict[str, dict], dict[str, dict]]:
    """({target: result}, {target: failure}) so far. known: an earlier answer, whose files are not read."""
    out = []
    for folder, old, needs in zip(("done", "failed"), known, (RESULT, ("reason", "output", "arm", "seed"))):
        names = [p.stem for p in files.listed(Path(root) / folder, "*.json")]
        found = {
            name: old[name] if name in old else read_json(Path(root) / folder / f"{name}.json", needs=needs)
            for name in names
        }
        out.append({name: value for name, value in found.items() if value is not None})
    return tuple(out)


def survivors(root: Path | str) -> dict | None:
    """What screening left over, None before it has."""
    found = read_json(Path(root) / "survivors.json", "move it away to have the groups screened again",
                      ["kept", "dropped", "mde"])
    if found and not all(isinstance(found[key], list) for key in ("kept", "dropped")):
        raise UserError(f"{root}/survivors.json: kept and dropped are lists of groups; move it away to have "
                        "the groups screened again")
    return found


# ----- claims -----------------------------------------------------------------------------------------------

def place() -> str:
    """Where a process id means something: this boot and this process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return boot + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"{os.uname().nodename} since {os.uname().version}"


def born(pid: int) -> int | None:
    """Start of a process in clock ticks, or None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        status = stat.rpartition(")")[2].split()
        return None if status[0] in "ZX" else int(status[19])
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
        return 0
    except OSError:
        return None


def identity() -> dict[str, str | int | None]:
    """Who this process is, so that another worker can tell whether it still lives."""
    pid = os.getpid()
    return {"host": os.uname().nodename, "place": place(), "pid": pid, "born": born(pid)}


def server_time(root: Path | str) -> float:
    """Now by the clock of the disk's server, which is the one that stamps the heartbeats."""
    path = Path(root) / "workers" / f"{os.uname().nodename}.{os.getpid()}"
    path.touch()
    os.utime(path)
    return path.stat().st_mtime


def claim_path(root: Path | str, target: str, number: int) -> Path:
    """The file that holds a target for one worker."""
    return Path(root) / "claims" / f"{target}.{number}"


def last_claim(root: Path | str, target: str) -> int:
    """Number of the newest claim on a target; 0 if there is none."""
    number = 0
    while claim_path(root, target, number + 1).exists():
        number += 1
    return number


def is_stale(root: Path | str, target: str, number: int, stale_s: float = STALE_S) -> bool:
    """Whether a claim's heartbeat is too old, or its process is known to be gone."""
    # opening fetches fresh attributes on NFS
    with open(claim_path(root, target, number), encoding="utf-8") as file:
        age = server_time(root) - os.fstat(file.fileno()).st_mtime
        try:
            owner = json.loads(file.read())
        except (ValueError, RecursionError):
            owner = None
    # a heartbeat of the future never ages: it is no sign of life either
    if abs(age) > stale_s:
        return True
    if not isinstance(owner, dict) or owner.get("place") != place() or type(owner.get("pid")) is not int:
        return False  # nothing tells that it is gone: its heartbeat must age
    return born(owner["pid"]) != owner.get("born")


def claim(root: Path | str, target: str, stale_s: float = STALE_S) -> tuple[int, str] | None:
    """(number, hash of the claim) if the target is now ours, else None."""
    number = last_claim(root, target)
    if number and not is_stale(root, target, number, stale_s):
        return None
    text = files.json_text({"target": target, "claim": number + 1, "utc": utc(), **identity()}) + "\n"
    if not write_once(claim_path(root, target, number + 1), text):
        return None
    return number + 1, hashlib.sha256(text.encode()).hexdigest()


def beat(root: Path | str, target: str, number: int) -> bool:
    """Renew a claim; False if somebody has taken the target over."""
    os.utime(claim_path(root, target, number))
    return not claim_path(root, target, number + 1).exists()


def release(root: Path | str, target: str, number: int) -> None:
    """Give a claim back: a heartbeat of 1970 is stale for everybody."""
    os.utime(claim_path(root, target, number), (0, 0))


def utc() -> str:
    """The present time in ISO form."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# ----- finished runs ----------------------------------------------------------------------------------------

FACTS = ("record", "seed", "scale", "changes", "ml_hash", "numerics_version", "corpus_digest", "val_digest",
         "registered", "device", "cpu", "machine", "torch", "code", "profiled", "processes", "sources")
# what all runs of a sweep share; machines may be several, of one kind
ALIKE = ("sources", "torch", "device", "cpu", "processes")


def read_run(folder: Path | str) -> dict[str, Any]:
    """Facts of a complete run from its checked chain; UserError if it is not one."""
    links = runlog.read_links(Path(folder) / "run.jsonl")
    start, end = links[0][0], links[-1][0]
    try:
        if start["kind"] != "start" or end["kind"] != "end" or start["log_version"] not in runlog.READABLE:
            raise UserError(
                f"{folder}: not a complete run of log version {' or '.join(map(str, runlog.READABLE))}")
        if schema.ml_hash(schema.from_plain(start["settings"])) != start["ml_hash"]:
            raise UserError(f"{folder}: its settings are not those of its ml_hash {start['ml_hash']}")
        loss = end["val_loss"]
        return {"folder": Path(folder).name, "status": end["status"], "last_hash": links[-1][1],
                "val_loss": loss if loss is not None and abs(loss) < float("inf") else None,
                "train_time_ms": end["train_time_ms"], "wall_ms": end["wall_ms"], "tokens": end["tokens"],
                **{key: start[key] for key in FACTS}}
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}: its log lacks {error}") from None


def foreign(run: dict, plan: dict, arm: dict, seed: int) -> str:
    """Why a run is not one of this arm and seed; '' if it is."""
    digests = plan["digests"][arm["ml_hash"]]
    wanted = {
        "ml_hash": arm["ml_hash"], "seed": seed, "scale": plan["scale"],
        "numerics_version": plan["numerics_version"], "profiled": False, **digests
    }
    return next((f"{key} is {run[key]}, not {value}" for key, value in wanted.items() if run[key] != value),
                "")


def unlike(run: dict, others: Sequence[dict]) -> str:
    """Why a run is of another program or kind of machine than the other results; '' if it is not."""
    for other in others:
        for key in ALIKE:
            if key in other and run[key] != other[key]:
                return (f"{key} is {run[key]!r}, that of {other['arm']}, seed {other['seed']}, is "
                        f"{other[key]!r}: a sweep mixes no programs and no kinds of machine")
    return ""


def verified(root: Path | str, plan: dict, done: dict[str, dict]) -> None:
    """Refuse results that are not what the chained log of their run says, or that are of several programs.

    done: {target: result} of settled()."""
    arms, first, seeds = {arm["ml_hash"]: arm for arm in plan["arms"]}, [], {}
    for target, result in done.items():
        run = read_run(Path(root) / "runs" / str(result["folder"]))
        where = f"{root}/done/{target}.json"
        wrong = [key for key, value in run.items()
                 if files.strict(result.get(key, value)) != files.strict(value)]
        if wrong:
            raise UserError(
                f"{where}: {wrong[0]} is not that of the run in {root}/runs/{result['folder']}: put the old "
                "file back, or delete it to run the target again"
            )
        arm = arms.get(run["ml_hash"])
        why = ("no arm of the plan" if arm is None or name_of(arm, run["seed"]) != target
               else foreign(run, plan, arm, run["seed"]) or unlike(run, first))
        # seeds begin with other weights: equal losses are those of one run, of which the other is a copy
        same = seeds.setdefault((run["ml_hash"], run["val_loss"]), run["seed"])
        if not why and run["val_loss"] is not None and same != run["seed"]:
            why = f"the loss of seed {run['seed']} is that of seed {same} to the last bit"
        if why:
            raise UserError(f"{where}: {why}; move it away, and run the target again")
        first = first or [run | {"arm": result["arm"]}]


def find_run(
    folders: list[Path], plan: dict, arm: dict, seed: int, others: Sequence[dict] = ()
) -> tuple[Path, dict] | None:
    """(path, facts) of a finished run of this arm and seed in any of the folders, or None. others: results
    whose program it must have."""
    for folder in folders:
        for path in files.listed(folder, f"*_{arm['ml_hash'][:8]}_s{seed}*"):
            try:
                run = read_run(path)
            except UserError:
                continue
            if run["status"] == "finished" and not (foreign(run, plan, arm, seed) or unlike(run, others)):
                return path, run
    return None


def reuse_folders(root: Path | str, reuse: Sequence[Path | str]) -> list[Path]:
    """Where finished runs may lie: the queue's own runs (a worker may die before it records one),
    then --reuse."""
    out = [Path(root) / "runs"]
    for folder in map(Path, reuse):
        if not folder.is_dir():
            raise UserError(f"--reuse {folder}: no such folder")
        out += [folder] + ([folder / "runs"] if (folder / "runs").is_dir() else [])
    return out


def adopt(
    root: Path | str, plan: dict, target: str, arm: dict, seed: int, folders: list[Path]
) -> dict | None:
    """Settle a target with a finished run that exists already; its folder and sources are copied.
    Returns it or None."""
    others = list(settled(root)[0].values())[:1] or [
        {"sources": runlog.sources()[1], "arm": "this checkout", "seed": seed}]
    found = find_run(folders, plan, arm, seed, others)
    if found is None:
        return None
    path, run = found
    home = Path(root) / "runs"
    if path.parent.resolve() != home.resolve():
        run["adopted_from"] = str(path.resolve())
        sources = runlog.read_chain(path / "run.jsonl")[0]["sources"]
        try:
            temporary = home / f".{path.name}.{secrets.token_hex(4)}.tmp"
            if not (home / path.name).exists():
                untrusted.copy(path, temporary, leave=lambda name: name in ("checkpoint.pt", "trace.json"))
                os.rename(temporary, home / path.name)
            for source in files.listed(path.parent, f"sources-{sources}.txt*"):
                if not (home / source.name).exists():
                    files.write(home / source.name, untrusted.bytes_of(source))
        except OSError as error:
            if not (home / path.name).exists():
                raise UserError(f"cannot copy {path} to {home}: {error.strerror}") from None
            shutil.rmtree(temporary, ignore_errors=True)  # another worker was faster
    result = {"target": target, "arm": arm["label"], "utc": utc(), **run}
    return result if write_once(
        Path(root) / "done" / f"{target}.json",
        files.json_text(result, indent=1) + "\n") else None


def retry(root: Path | str) -> int:
    """Move failures aside so that their targets run again. Returns how many."""
    moved = 0
    for path in files.listed(Path(root) / "failed", "*.json"):
        (path.parent / "old").mkdir(exist_ok=True)
        path.rename(path.parent / "old" / f"{path.stem}.{last_claim(root, path.stem)}.json")
        moved += 1
    return moved
