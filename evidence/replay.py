"""`python -m records replay RUN`: run again what a log describes, and compare loss by loss.

RUN is a run folder, its run.jsonl or its log.txt, or a claim folder: then every counted run is replayed, and
the signed mean of the differences is judged as well. The same commit (where it exists, otherwise the present
code if it resolves to the same ml_hash), record, changes, scale, seed, processes and threads, and data of the
same digests. Exit code 0 when the losses agree: to the last bit where code, processor, torch and threads are
the same on a CPU, otherwise within the printed tolerance; 3 when they do not.
"""

import argparse
import ast
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import runlog
from common import arguments as numbers, environment, files, sandbox, untrusted
from common.errors import UserError
from common.interrupt import Interrupt
from common.printable import printable
from evidence import arms, compare, foreign, manifest, textlog, verify
from settings import renames
from settings.scales import SCALES

DIFFERS = 3
# The first training losses come before rounding grows: they tell seeds apart, for they are those of the
# initial weights (two seeds of record 11 at micro differ by 1e-3 and more). Held within the tolerance of
# verify.PARITY. Rounding that grows: record 11 at tiny, replayed on another maker's processor, stayed within
# 8e-6 nats over 176 steps. On a GPU sums come in any order, so that repeats may differ like seeds: four times
# the median sd of published runs (0.00124), which two seeds would keep as well:
# there the first training losses decide.
CPU_TOLERANCE, GPU_TOLERANCE = 0.001, 0.005
WEEK_S = 7 * 24 * 3600.0  # no replay on a CPU takes longer
# Step 0 is the loss of the initial weights, which the seed gives: no training, so no rounding that grows.
# Relative.
STEP_0_TOLERANCE = 1e-6
NEEDED = ("record", "preset", "scale", "seed", "changes", "ml_hash", "corpus_digest", "val_digest", "code",
          "processes", "device", "torch", "cpu", "sources")


def arguments(p: argparse.ArgumentParser) -> None:
    """Options of `records replay`."""
    p.add_argument("log", metavar="RUN", help="a run folder, or its run.jsonl or log.txt; or a claim "
                                              "folder, of which "
                   "every counted run is replayed and the signed mean of the differences is judged")
    p.add_argument("--out", metavar="DIR", help="where the new run folder goes (default runs/<date>_replay)")
    p.add_argument("--data", metavar="DIR",
                   help="folder of shards, where the run was not on the embedded corpus")
    p.add_argument(
        "--tolerance", type=numbers.number(0, 100, above=True), metavar="NATS",
        help="largest difference of a validation loss where bits need "
        f"not agree (default {CPU_TOLERANCE} on a CPU, {GPU_TOLERANCE} on GPUs)"
    )


def run(options: argparse.Namespace) -> int:
    """`records replay`: run what a log, or every run of a claim, describes once more. Returns the exit
    code."""
    folder = Path(options.log)
    if not (folder / manifest.NAME).exists():
        return replay_one(options, options.log, [])
    claim, gaps, codes = manifest.read(folder), [], []
    runs = [r for name in sorted(claim.declaration["arms"]) for r in claim.counted(name)
            if r.status == "finished"]
    for number, done in enumerate(runs):
        print(f"run {done.run} ({done.arm}, seed {done.seed})")
        codes.append(replay_one(options, folder / "runs" / done.finish["folder"], gaps, number))
        if codes[-1] not in (0, DIFFERS):
            return codes[-1]
    if not codes:
        raise UserError(f"{folder}: no run of this claim finished: there is nothing to replay")
    device = read_log(folder / "runs" / runs[0].finish["folder"])["start"]["device"]
    tolerance = options.tolerance or (CPU_TOLERANCE if threads_of(device) else GPU_TOLERANCE)
    return max([*codes, *([judge_claim(gaps, tolerance)] if gaps else [])])


def replay_one(
    options: argparse.Namespace, name: Path | str, gaps: list[float], number: int | None = None
) -> int:
    """Replay one run and report. Adds log minus replay of the final loss to `gaps`. Returns the exit code.

    number: of a run among those of a claim, for its folder.
    """
    log = read_log(name)
    start = log["start"]
    tolerance = options.tolerance or (CPU_TOLERANCE if threads_of(start["device"]) else GPU_TOLERANCE)
    environment.check_training()
    place, code = find_code(start, name)
    print(f"replaying {start['preset'] or start['record']} at scale {start['scale']}, seed {start['seed']}, "
          f"with {code}")
    out = Path(options.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}_replay")
    out = out if number is None else out / f"{number:03d}"
    try:
        again = rerun(start, place, out, options.data, name)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return compare.INTERRUPTED
    if log["train_loss"] and runlog.covers_all(start) != runlog.covers_all(again["start"]):
        print("the training losses of the log are those of process 0 alone (log version 2): they are not "
              "compared")
        log = {**log, "train_loss": []}
    if log["curve"][-1][0] in dict(map(tuple, again["curve"])):
        gaps.append(log["curve"][-1][1] - dict(map(tuple, again["curve"]))[log["curve"][-1][0]])
    return report(log, again, same_bits(start, again["start"]), tolerance)


# ----- what the log says ------------------------------------------------------------------------------------

def read_log(path: Path | str) -> dict:
    """{start, curve [[step, val_loss]], train_loss, stream, digits}: of run.jsonl, or of log.txt,
    which has six decimals."""
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in ("run.jsonl", "log.txt") if (path / name).exists()),
                    path / "run.jsonl")
    log = read_chain(path) if path.suffix == ".jsonl" else read_text(path)
    missing = [k for k in NEEDED if k not in log["start"]]
    if missing:
        raise UserError(
            f"{path}: it does not say its {', '.join(missing)}: another version wrote it, or another program")
    if not log["curve"]:
        raise UserError(f"{path}: it holds no validation to compare with")
    return log


def read_chain(path: Path) -> dict:
    """What a replay compares, of a run.jsonl: start, loss curve, training losses and stream digest."""
    events = runlog.read_chain(path)
    validations = [e for e in events if e["kind"] == "validation"]
    stream = [e["digest"] for e in events if e["kind"] == "stream"]
    return {
        "start": events[0], "curve": [[e["step"], e["val_loss"]] for e in validations], "digits": None,
        "train_loss": [x for e in validations for x in e["train_loss"]],
        "stream": stream[0] if stream else None
    }


def read_text(path: Path) -> dict:
    """What a replay compares, of a log.txt, whose losses have six digits."""
    log, _ = textlog.read(path)
    parts = untrusted.bytes_of(path).decode("utf-8", "replace").split(runlog.RULER + "\n")
    if len(parts) < 3 or not parts[0].startswith("sources: "):
        raise UserError(f"{path}: a log of another program, which says no settings: run its script with "
                        "compare script:PATH")
    facts = dict(row.split(": ", 1) for row in parts[1].splitlines() if ": " in row)
    facts = {
        **facts, "preset": facts.get("preset", ""),
        "sources": parts[0].strip()[len("sources: sources-"):-len(".txt")]
    }
    try:
        facts |= {k: ast.literal_eval(facts[k]) for k in ("seed", "processes", "changes") if k in facts}
    except (ValueError, SyntaxError):
        raise UserError(f"{path}: its seed, processes or changes cannot be read") from None
    return {
        "start": facts, "curve": [[step, loss] for step, loss, _ in log["curve"]], "train_loss": [],
        "stream": None, "digits": 6
    }


# ----- running it again -------------------------------------------------------------------------------------

def arguments_of(start: dict, place: Path) -> list[str]:
    """The trainer's arguments behind a start event: a frozen preset by name, otherwise record, changes and
    scale.

    place: the folder of the code that gets them. The present code knows settings by their present names.
    """
    if start["preset"]:
        return [foreign.record_name(start["preset"])]
    if not isinstance(start["changes"], list):
        raise UserError("its changes are no list")
    changes = list(map(foreign.option, start["changes"]))  # nothing else passes
    if place == arms.ROOT:
        changes = [foreign.option(renames.present_change(change)) for change in start["changes"]]
    if not isinstance(start["scale"], str) or start["scale"] not in SCALES:
        raise UserError(f"{printable(str(start['scale']))[:60]!r} is no scale")
    return [foreign.record_name(start["record"]), *changes, "--scale", start["scale"]]


def find_code(start: dict, name: Path | str) -> tuple[Path, str]:
    """(folder, words): the commit of the log in a worktree, or the present code if that does not exist.

    UserError if the present code means something else by the settings.
    """
    commit, _, dirty = str(start["code"]).partition("-")
    place, words = arms.ROOT, "the present code"
    if dirty:
        why = f"the run had uncommitted changes on {commit[:12]}"
    else:
        try:
            commit = arms.commit_of(commit)
            place, why = arms.checkout(commit, arms.line("rev-parse", commit + "^{tree}")), ""
            words = f"the code of {commit[:12]}"
        except UserError:
            why = f"its commit {commit[:12]} is not in this repository"
    argv = arguments_of(start, place)
    found = foreign.ask(place, argv) if guarded(start, place) else arms.resolve(place, argv, str(name))
    if found["ml_hash"] != start["ml_hash"]:
        raise UserError(
            f"{name}: {words} resolves {start['record']} to ml_hash {found['ml_hash']}, the log says "
            f"{start['ml_hash']}" + (f"; {why}" if why else ""))
    return place, words + (f" ({why}, but ml_hash is the same)" if why else "")


def guarded(start: dict, place: Path) -> bool:
    """Whether the code in `place` runs in a sandbox: that of another commit, on a CPU, where there are
    walls."""
    return place != arms.ROOT and bool(threads_of(start["device"])) and foreign.has_walls()


def rerun_guarded(start: dict, place: Path, out: Path, data: Path | None) -> str:
    """Train again in a sandbox: no network, `out` the only folder that is written."""
    files.make_folder(out)
    processes = int(start["processes"])
    launcher = [str(arms.LAUNCHER), str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(place / "train_gpt.py"), *arguments_of(start, place),
               "--seed", str(int(start["seed"])), "--out", str(out.absolute())]
    command += ["--data", str(data)] if data else []
    with tempfile.TemporaryDirectory(prefix="replay-") as cache:
        done = sandbox.run(
            command, cwd=place, readable=[place, arms.LAUNCHER.parent.parent, *([data] if data else [])],
            writable=[out, Path(cache)], seconds=WEEK_S, memory_mib=memory_mib(),
            env={"SPEEDRUN_CACHE": cache, "OMP_NUM_THREADS": threads_of(start["device"]),
                 "CUDA_VISIBLE_DEVICES": ""})
    return (done.stderr.strip().splitlines() or ["it said nothing"])[-1].removeprefix("error: ")


def memory_mib() -> int:
    """Nine tenths of this machine's memory, in MiB."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 9 // 10 // 2 ** 20


def threads_of(device: str) -> str | None:
    """Number of threads in a CPU's device line, or None."""
    found = re.fullmatch(r"CPU, \d+ process(?:es)?, (\d+) threads", str(device))
    return found and found[1]


def rerun(start: dict, place: Path, out: Path, data: str | None, name: Path | str) -> dict:
    """Train again into `out`, and read the log. Ends at once if the data are other ones."""
    if out.exists() and files.listed(out, "*/run.jsonl"):
        raise UserError(f"{out} already holds runs: choose another --out")
    processes, threads = int(start["processes"]), threads_of(start["device"])
    variables = arms.environment()
    if threads:
        variables |= {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
    elif not arms.cuda_works():
        raise UserError(f"{name}: the run was on {start['device']}, and torch sees no GPU here")
    else:
        variables |= {"CUDA_VISIBLE_DEVICES": ",".join(g["uuid"] for g in arms.free_gpus(processes))}
    data = compare.locate({"data": None, "scale": start["scale"]}, data)
    arm = {"kind": "record", "text": str(name), "argv": arguments_of(start, place),
           "ml_hash": start["ml_hash"]}

    def check_data():
        for path in files.listed(out, "*/run.jsonl"):
            first = runlog.read_chain(path)[0]
            for key in ("corpus_digest", "val_digest"):
                if first[key] != start[key]:
                    raise UserError(f"the data are not those of the log: {key} {first[key][:12]}, there "
                                    f"{start[key][:12]}; name the right folder with --data")

    if guarded(start, place):
        complaint = rerun_guarded(start, place, out, data)
    else:
        complaint = rerun_here(arm, start, place, out, data, variables, check_data)
    found = files.listed(out, "*/run.jsonl")
    if not found:
        raise UserError(f"the replay did not start: {complaint}")
    check_data()
    return read_chain(found[-1])


def rerun_here(
    arm: dict, start: dict, place: Path, out: Path, data: Path | None, variables: dict[str, str],
    check_data: Callable[[], None]
) -> str:
    """Train again as a comparison does, without a sandbox. Returns the last line of what it complained."""
    if place != arms.ROOT:
        print(f"the code of the log runs with your rights: {sandbox.walls()}")
    processes = int(start["processes"])
    with Interrupt(main=False) as asked:
        began = arms.start(arm, place, out, seed=int(start["seed"]),
                           processes=processes if processes > 1 else None, data=data, variables=variables)
        stopped = compare.wait(began, "replay", asked, check_data)
    if stopped:
        raise KeyboardInterrupt
    return began.complaint()


# ----- several runs of a claim
# -------------------------------------------------------------------------------

def signed_mean(gaps: list[float], tolerance: float) -> tuple[float, float]:
    """(mean, limit): log minus replay of the final losses of several runs, and how far a mean may lie from
    zero.

    A difference that rounding makes has either sign. Logs that lie below their replays, each by less than the
    tolerance of one, give themselves away in the mean, whose limit falls with the root of their number.
    """
    return math.fsum(gaps) / len(gaps), tolerance / math.sqrt(len(gaps))


def judge_claim(gaps: list[float], tolerance: float) -> int:
    """Print what the replayed runs of a claim say together; 0, or DIFFERS if their losses lie to one side.

    gaps: [log minus replay of the final validation loss], one for each run.
    """
    mean, limit = signed_mean(gaps, tolerance)
    good = abs(mean) <= limit
    print(f"{'replayed' if good else 'NOT replayed'}: final losses of {len(gaps)} runs lie {mean:+.2e} from "
          f"their replays on average (limit {limit:.1e})"
          + ("" if good else ": the logs lie to one side of what the program gives"))
    return 0 if good else DIFFERS


# ----- comparing --------------------------------------------------------------------------------------------

def same_bits(start: dict, again: dict) -> bool:
    """Must the two runs agree to the last bit? On a CPU with the same sources, processor, torch,
    processes and threads."""
    return bool(threads_of(start["device"])) and all(str(start[k]) == str(again[k]) for k in (
        "sources", "cpu", "torch", "processes", "device"))


def equal(a: float, b: float, digits: int | None) -> bool:
    """Equal floats (NaN equals NaN); rounded to what the log shows, if it shows rounded values."""
    return a == b or (a != a and b != b) or (digits is not None and abs(a - b) <= 0.5001 * 10.0 ** -digits)


def first_limit(start: dict) -> float:
    """Relative tolerance of the first training losses: that of the coarsest dtype of the settings."""
    settings = start.get("settings")  # a text log's are not read; it holds no training losses either
    return verify.PARITY[verify.precision_of(settings)]["first"] if isinstance(settings, dict) else math.inf


def report(log: dict, again: dict, exact: bool, tolerance: float) -> int:
    """Print validation by validation; 0 if they agree as far as they must, else DIFFERS."""
    found, worst, lacking, identical = dict(map(tuple, again["curve"])), 0.0, [], True
    print(f"{'step':>7}  {'log':>10}  {'here':>10}  difference")
    for step, loss in log["curve"]:
        if step not in found:
            lacking.append(step)
            continue
        same = equal(loss, found[step], log["digits"])
        identical &= same
        gap = 0.0 if same else abs(found[step] - loss)
        worst = max(worst, gap if math.isfinite(gap) else math.inf)
        print(f"{step:>7}  {loss:>10.6f}  {found[step]:>10.6f}  "
              f"{'equal' if same else f'{found[step] - loss:+.2e}'}")
    if 0 in dict(map(tuple, log["curve"])) and 0 in found:
        start = dict(map(tuple, log["curve"]))[0]
        apart = 0.0 if equal(start, found[0], log["digits"]) else abs(found[0] - start) / abs(found[0])
        if not apart <= STEP_0_TOLERANCE:
            print(f"NOT replayed: the loss of step 0, before any training, differs by {apart:.1e} "
                  "(relative, tolerance "
                  f"{STEP_0_TOLERANCE:g}): other initial weights, tokens or another loss")
            return DIFFERS
    pairs = list(zip(log["train_loss"], again["train_loss"]))
    first = next((i for i, (a, b) in enumerate(pairs) if not equal(a, b, None)), None)
    if first is not None:
        print(f"training losses differ from step {first} on")
    early = [abs(a - b) / abs(b) for a, b in pairs[:verify.FIRST_STEPS] if not equal(a, b, None)]
    early = max((x if math.isfinite(x) else math.inf for x in early), default=0.0)
    limit = first_limit(log["start"])
    if log["stream"] and again["stream"] and log["stream"] != again["stream"]:
        print("the two runs read different tokens (stream digest)")
        return DIFFERS
    if lacking:
        print(f"NOT replayed: no validation at step {lacking[0]} here")
        return DIFFERS
    if early > limit:
        print(f"NOT replayed: the first training losses differ by up to {early:.1e} (relative, tolerance "
              f"{limit:g}): another seed, or another program")
        return DIFFERS
    if identical and exact and first is not None:
        print("NOT replayed: same sources, processor, torch and threads, yet the training losses differ")
        return DIFFERS
    if identical:
        how = "to the last bit" if log["digits"] is None else f"to the {log['digits']} decimals of the log"
        print(f"replayed: every validation loss is equal {how}")
        return 0
    if exact:
        print("NOT replayed: same sources, processor, torch and threads, yet the losses differ by up to "
              f"{worst:.2e}")
        return DIFFERS
    if not pairs:
        print("the log holds no training losses, and validation losses within the tolerance do not tell "
              "seeds apart")
    print(f"{'replayed' if worst <= tolerance else 'NOT replayed'}: validation losses differ by up to "
          f"{worst:.2e}, tolerance {tolerance:g} (sources, processor, torch, devices or threads are not the "
          "same, so bits need not be)")
    return 0 if worst <= tolerance else DIFFERS
