"""`python -m records replay RUN`: run again what a log describes, and compare loss by loss.

RUN is a run folder, its run.jsonl or its log.txt. The same commit (where it exists, else the present code if
it resolves to the same ml_hash), record, changes, scale, seed, processes and threads, and data of the same
digests. Exit code 0 when the losses agree: to the last bit where code, processor, torch and threads are the
same on a CPU, else within the printed tolerance; 3 when they do not.
"""

import ast
import math
import re
import sys
import time
from pathlib import Path

from common import arguments as numbers, environment, files, untrusted
import renames
import runlog
from evidence import arms, compare, textlog, verify
from common.errors import UserError
from common.interrupt import Interrupt

DIFFERS = 3
# The first training losses come before rounding grows: they tell seeds apart, for they are those of the
# initial weights (two seeds of record 11 at micro differ by 1e-3 and more). Held within the tolerance of
# verify.PARITY. Rounding that grows: record 11 at tiny, replayed on another maker's processor, stayed within
# 8e-6 nats over 176 steps. On a GPU sums come in any order, so that repeats may differ like seeds: four times
# the median sd of published runs (0.00124), which two seeds would keep as well:
# there the first training losses decide.
CPU_TOLERANCE, GPU_TOLERANCE = 0.001, 0.005
NEEDED = ("record", "preset", "scale", "seed", "changes", "ml_hash", "corpus_digest", "val_digest", "code",
          "processes", "device", "torch", "cpu", "sources")


def arguments(p):
    """Options of `records replay`."""
    p.add_argument("log", metavar="RUN", help="a run folder, or its run.jsonl or log.txt")
    p.add_argument("--out", metavar="DIR", help="where the new run folder goes (default runs/<date>_replay)")
    p.add_argument("--data", metavar="DIR",
                   help="folder of shards, where the run was not on the embedded corpus")
    p.add_argument(
        "--tolerance", type=numbers.number(0, 100, above=True), metavar="NATS",
        help="largest difference of a validation loss where bits need "
        f"not agree (default {CPU_TOLERANCE} on a CPU, {GPU_TOLERANCE} on GPUs)"
    )


def run(options):
    """`records replay`: run what a log describes once more and compare the losses. Returns the exit code."""
    log = read_log(options.log)
    start = log["start"]
    tolerance = options.tolerance or (CPU_TOLERANCE if threads_of(start["device"]) else GPU_TOLERANCE)
    environment.check_training()
    place, code = find_code(start, options.log)
    print(f"replaying {start['preset'] or start['record']} at scale {start['scale']}, seed {start['seed']}, "
          f"with {code}")
    out = Path(options.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}_replay")
    try:
        again = rerun(start, place, out, options.data, options.log)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return compare.INTERRUPTED
    if log["train_loss"] and runlog.covers_all(start) != runlog.covers_all(again["start"]):
        print("the training losses of the log are those of process 0 alone (log version 2): they are not "
              "compared")
        log = {**log, "train_loss": []}
    return report(log, again, same_bits(start, again["start"]), tolerance)


# ----- what the log says ------------------------------------------------------------------------------------

def read_log(path):
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


def read_chain(path):
    """What a replay compares, of a run.jsonl: start, loss curve, training losses and stream digest."""
    events = runlog.read_chain(path)
    validations = [e for e in events if e["kind"] == "validation"]
    stream = [e["digest"] for e in events if e["kind"] == "stream"]
    return {
        "start": events[0], "curve": [[e["step"], e["val_loss"]] for e in validations], "digits": None,
        "train_loss": [x for e in validations for x in e["train_loss"]],
        "stream": stream[0] if stream else None
    }


def read_text(path):
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

def arguments_of(start, place):
    """The trainer's arguments behind a start event: a frozen preset by name, otherwise record, changes and
    scale.

    place: the folder of the code that gets them. The present code knows settings by their present names.
    """
    if start["preset"]:
        return [plain_name(start, "preset")]
    check_changes(start["changes"])
    named = map(renames.present_change, start["changes"]) if place == arms.ROOT else start["changes"]
    changes = [word for change in named for word in change.split(" ", 1)]
    return [plain_name(start, "record"), *changes, "--scale", plain_name(start, "scale")]


def plain_name(start, key):
    """A name of a start event that goes into a command line; UserError for one that could be an option."""
    if not isinstance(start[key], str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_./-]*", start[key]):
        raise UserError(f"the log's {key} {start[key]!a:.80} is no name")
    return start[key]


def check_changes(changes):
    """UserError unless each is one of the trainer's four changes with a value: a log is a stranger's text,
    and no other option of the trainer comes from it."""
    for change in changes if isinstance(changes, list) else [changes]:
        flag, _, value = change.partition(" ") if isinstance(change, str) else ("", "", "")
        if flag not in arms.CHANGES or not value or value.startswith("-"):
            known = ", ".join(arms.CHANGES)
            raise UserError(f"the log's change {change!a:.80} is none of {known} with a value")


def find_code(start, name):
    """(folder, words): the commit of the log in a worktree; else the present code,
    if it means the same by the settings."""
    commit, _, dirty = start["code"].partition("-")
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
    found = arms.resolve(place, arguments_of(start, place), str(name))
    if found["ml_hash"] != start["ml_hash"]:
        raise UserError(
            f"{name}: {words} resolves {start['record']} to ml_hash {found['ml_hash']}, the log says "
            f"{start['ml_hash']}" + (f"; {why}" if why else ""))
    return place, words + (f" ({why}, but ml_hash is the same)" if why else "")


def threads_of(device):
    """Number of threads in a CPU's device line, or None."""
    found = re.fullmatch(r"CPU, \d+ process(?:es)?, (\d+) threads", device)
    return found and found[1]


def rerun(start, place, out, data, name):
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

    with Interrupt(main=False) as asked:
        began = arms.start(arm, place, out, seed=int(start["seed"]),
                           processes=processes if processes > 1 else None, data=data, variables=variables)
        stopped = compare.wait(began, "replay", asked, check_data)
    if stopped:
        raise KeyboardInterrupt
    found = files.listed(out, "*/run.jsonl")
    if not found:
        raise UserError(f"the replay did not start: {began.complaint()}")
    check_data()
    return read_chain(found[-1])


# ----- comparing --------------------------------------------------------------------------------------------

def same_bits(start, again):
    """Must the two runs agree to the last bit? On a CPU with the same sources, processor, torch,
    processes and threads."""
    return bool(threads_of(start["device"])) and all(str(start[k]) == str(again[k]) for k in (
        "sources", "cpu", "torch", "processes", "device"))


def equal(a, b, digits):
    """Equal floats (NaN equals NaN); rounded to what the log shows, if it shows rounded values."""
    return a == b or (a != a and b != b) or (digits is not None and abs(a - b) <= 0.5001 * 10.0 ** -digits)


def first_limit(start):
    """Relative tolerance of the first training losses: that of the coarsest dtype of the settings."""
    settings = start.get("settings")  # a text log's are not read; it holds no training losses either
    return verify.PARITY[verify.precision_of(settings)]["first"] if isinstance(settings, dict) else math.inf


def report(log, again, exact, tolerance):
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
    pairs = list(zip(log["train_loss"], again["train_loss"]))
    first = next((i for i, (a, b) in enumerate(pairs) if not equal(a, b, None)), None)
    if first is not None:
        print(f"training losses differ from step {first} on")
    early = [abs(a - b) / abs(b) for a, b in pairs[:verify.FIRST_STEPS] if not equal(a, b, None)]
    early, limit = max((x if math.isfinite(x) else math.inf for x in early),
                       default=0.0), first_limit(log["start"])
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
        print("replayed: every validation loss is equal " + ("to the last bit" if log["digits"] is None else
                                                             f"to the {log['digits']} decimals of the log"))
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
