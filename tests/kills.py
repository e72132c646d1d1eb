"""SIGKILL at random moments: a run that is killed and resumed again and again ends with the bits of one that
was left alone.

    python tests/kills.py [--kills N] [--records 11 33 57 variants/2] [--processes 1 2] [--steps 60]

Sixty `micro` steps of each record, eager, on 1 and 2 processes, a checkpoint every five steps. A run is
killed after a random time, resumed, killed again, until it ends; then its parameters, its losses and the
digest of its tokens are compared with those of the uninterrupted run. Of two processes one or both are
killed. The time is CPU time, where the system tells it, so that the moments are spread over the run on a busy
machine too. Goes on where it stopped itself (the runs and the counts lie in data/cache/kills), until N kills
have been made (100). With all records, writes tests/kills.md. Exit code 1 if a run ended with other bits.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common import environment, files

environment.require(*environment.TRAINING)
import torch

import runlog
import train_gpt
from evidence import run_laws
from system import checkpoint, command_line

RECORDS, PROCESSES, KILLS = ("short/11", "short/33", "short/57", "variants/2"), (1, 2), 100
STEPS, EVERY = 60, 5
SMALL = ("validation.tokens=2048", "validation.seq_len=256", "validation.every=20")
MOMENTS = ("before the log", "warm-up", "steps", "writing", "the end")
ENDING_S = 600  # for the other process, when one was killed
STARVED_S = 1800  # of a process that does not get to work
REFUSED = "resumed at step"  # a word of the law on resumed runs


# ----- processes --------------------------------------------------------------------------------------------

def begin(argv, processes):
    """Start a training by forking this program, which has torch already. Returns the process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ids = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            work(argv, rank, processes, port)
        ids.append(child)
    return ids


def work(argv, rank, processes, port):
    """The training, in a process of its own. Does not return."""
    if processes > 1:
        os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank),
                           "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port)})
    code = 99
    try:
        for number in (1, 2):
            os.dup2(os.open(os.environ["KILLS_OUTPUT"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        torch.set_num_threads(1)
        options, resolved = command_line.command_line(argv)
        code = train_gpt.exit_code(options, resolved)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def waited(ids, seconds):
    """{process id: exit code} of those that end within this time."""
    codes, until = {}, time.monotonic() + seconds
    while len(codes) < len(ids) and time.monotonic() < until:
        for i in ids:
            if i not in codes and (found := os.waitpid(i, os.WNOHANG))[0]:
                codes[i] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.02)
    return codes


def cpu_seconds(ids):
    """CPU time of the process that has worked most; None where the system does not tell."""
    found = []
    for i in ids:
        try:
            words = Path(f"/proc/{i}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found.append((int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK"))
    return max(found, default=None)


def worked(ids, seconds):
    """{process id: exit code} of those that end before one has worked for so many seconds."""
    began = time.monotonic()
    codes = waited(ids, 0.02)
    while len(codes) < len(ids):
        spent = cpu_seconds(ids)
        if (time.monotonic() - began if spent is None else spent) > seconds:
            break
        codes |= waited([i for i in ids if i not in codes], 0.02)
        if time.monotonic() - began > STARVED_S:
            break
    return codes


def kill(ids, generator, met):
    """SIGKILL to one or all; what is left must end by itself. Raises SystemExit if it does not.

    met: whether the processes have found each other. Before that it takes a launcher to end the others.
    """
    chosen = ids if generator.random() < 0.5 else [generator.choice(ids)]
    for i in chosen if met else ids:
        os.kill(i, signal.SIGKILL)
    codes = waited(ids, ENDING_S)
    if len(codes) < len(ids):
        for i in set(ids) - codes.keys():
            os.kill(i, signal.SIGKILL)
        sys.exit(f"process {min(set(ids) - codes.keys())} waits for a dead one")


# ----- runs -------------------------------------------------------------------------------------------------

def arguments(ref, out, steps):
    """The command line of a run from its beginning."""
    sets = [part for x in (*SMALL, f"schedule.steps={steps}") for part in ("--set", x)]
    return [ref, "--scale", "micro", *sets, "--out", str(out), "--save-checkpoint", "--checkpoint-every",
            str(EVERY)]


def resumed(folder, out):
    """The command line that continues it."""
    return ["--resume", str(folder), "--out", str(out), "--save-checkpoint", "--checkpoint-every", str(EVERY)]


def begun(out):
    """The folder of the run, if its log has begun."""
    found = [path.parent for path in Path(out).glob("*/run.jsonl") if b"\n" in path.read_bytes()]
    return found[0] if found else None


def outcome(folder):
    """What two runs must have in common: digests of parameters and tokens, and every loss."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    digest = hashlib.sha256()
    for name, x in sorted(saved["model"].items()):
        digest.update(name.encode() + x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    events = runlog.standing(runlog.read_chain(folder / "run.jsonl"))
    points = [[e["step"], e["val_loss"], e["train_loss"]] for e in events if e["kind"] == "validation"]
    stream = next(e["digest"] for e in events if e["kind"] == "stream")
    return {"parameters": digest.hexdigest(), "points": points, "stream": stream}


def used():
    """CPU seconds of the processes that have ended; where the system does not tell those of one, the time."""
    if cpu_seconds([os.getpid()]) is None:
        return time.monotonic()
    times = os.times()
    return times.children_user + times.children_system


def reference(ref, processes, home, steps):
    """(outcome, CPU seconds of a process) of the uninterrupted run, which is made once."""
    kept = home / f"{ref.replace('/', '-')}-{processes}.json"
    if not kept.exists():
        out = home / "reference"
        shutil.rmtree(out, ignore_errors=True)
        began = used()
        codes = waited(begin(arguments(ref, out, steps), processes), 3600)
        if [*codes.values()] != [0] * processes:
            sys.exit(f"{ref} on {processes}: the uninterrupted run ended with {codes}")
        files.write(kept, json.dumps([outcome(begun(out)), (used() - began) / processes]), parents=True)
        shutil.rmtree(out)
    return json.loads(kept.read_text())


def moment(folder):
    """In which part of a run it was killed."""
    if folder is None:
        return "before the log"
    kinds = [e["kind"] for e in runlog.readable(folder / "run.jsonl")]
    last = len(kinds) - 1 - kinds[::-1].index("resume") if "resume" in kinds else 0
    if kinds[-1:] == ["end"]:
        return "the end"
    if "reset" not in kinds[last:]:
        return "warm-up"
    return "writing" if any((folder / checkpoint.FOLDER).glob(".step*.tmp")) else "steps"


def length(folder):
    """Bytes of a run's log."""
    return 0 if folder is None else (folder / "run.jsonl").stat().st_size


def over(folder):
    """Has a run written its last event?"""
    return folder is not None and runlog.ended(runlog.readable(folder / "run.jsonl"))


def trial(ref, processes, home, steps, generator):
    """Kill and resume one run until it ends. Returns its row of the results."""
    expected, seconds = reference(ref, processes, home, steps)
    out = home / "trial"
    shutil.rmtree(out, ignore_errors=True)
    moments = []
    while True:
        folder = begun(out)
        if folder is None:
            shutil.rmtree(out, ignore_errors=True)
        before = length(folder)
        ids = begin(arguments(ref, out, steps) if folder is None else resumed(folder, out), processes)
        # the time grows: a machine that became busy would otherwise kill every start before its first step
        limit = seconds / (3 if steps == STEPS else 1) * 1.1 ** len(moments)
        codes = worked(ids, generator.uniform(0, limit))
        if len(codes) == len(ids):
            break
        kill([i for i in ids if i not in codes], generator, met=length(begun(out)) > before)
        moments.append(moment(begun(out)))
        if over(begun(out)):  # killed after the last event: there is nothing to resume, and nothing is lost
            codes = {}
            break
    if set(codes.values()) - {0}:
        sys.exit(f"{ref} on {processes}: a resumed run ended with {codes}: {os.environ['KILLS_OUTPUT']}")
    folder = begun(out)
    found, events = outcome(folder), runlog.read_chain(folder / "run.jsonl")
    lost = [e["lost_steps"] for e in events if e["kind"] == "resume"]
    problems = list(run_laws.check_run(run_laws.read_log(folder, "run")[0])) if lost else [REFUSED]
    return {"ref": ref, "processes": processes, "moments": moments, "lost": lost,
            "equal": [name for name in expected if found[name] == expected[name]],
            "refused": len(problems) == 1 and REFUSED in problems[0]}


# ----- the table --------------------------------------------------------------------------------------------

def row(ref, processes, rows):
    """(Markdown line, passed) of a record on a number of processes."""
    moments = [m for r in rows for m in r["moments"]]
    lost = [n for r in rows for n in r["lost"]]
    passed = all(len(r["equal"]) == 3 and r["refused"] for r in rows)
    counts = " | ".join(str(moments.count(m)) for m in MOMENTS)
    return (f"| {ref} | {processes} | {len(rows)} | {len(moments)} | {counts} | {max(lost, default=0)} | "
            f"{'equal' if passed else 'DIFFER'} |"), passed


def table(rows, cases):
    """([Markdown lines], passed)."""
    head = [
        "| record | processes | runs | SIGKILLs | before the log | warm-up | steps | writing a checkpoint "
        "| after the end | most steps lost | bits |", "|---|---|---|---|---|---|---|---|---|---|---|"
    ]
    made = [row(*case, [r for r in rows if (r["ref"], r["processes"]) == case]) for case in cases]
    return head + [line for line, _ in made], all(passed for _, passed in made)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=int, default=KILLS, metavar="N")
    p.add_argument("--records", nargs="+", default=list(RECORDS), metavar="RECORD")
    p.add_argument("--processes", nargs="+", type=int, default=list(PROCESSES), metavar="P")
    p.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of a run; for the table 60")
    options = p.parse_args()
    # what was measured with other code says nothing
    home = files.default_cache() / "kills" / f"{runlog.sources()[1]}-{options.steps}"
    home.mkdir(parents=True, exist_ok=True)
    os.environ["KILLS_OUTPUT"] = str(home / "output.txt")
    cases = [(ref if "/" in ref else f"short/{ref}", n) for ref in options.records for n in options.processes]
    kept = home / "trials.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []

    def of(case):
        return [r for r in rows if (r["ref"], r["processes"]) == case]

    while sum(len(r["moments"]) for case in cases for r in of(case)) < options.kills:
        case = min(cases, key=lambda case: sum(len(r["moments"]) for r in of(case)))
        rows.append(trial(*case, home, options.steps, random.Random(f"{case} {len(of(case))}")))
        with open(kept, "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(row(*case, rows[-1:])[0], flush=True)
    lines, passed = table(rows, cases)
    print(*lines, sep="\n")
    if options.steps == STEPS and set(cases) == {(ref, n) for ref in RECORDS for n in PROCESSES}:
        (ROOT / "tests/kills.md").write_text(report(lines))
    sys.exit(not passed)


def report(lines):
    """tests/kills.md."""
    return (
        f"{STEPS} `micro` steps, eager, a checkpoint every {EVERY}, SIGKILL after random times, resumed "
        "until done (`python tests/kills.py`). Compared with the uninterrupted run: every parameter and "
        "loss, and the digest of the tokens. `before the log`: the run begins anew.\n\n"
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    main()
