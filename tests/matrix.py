"""Three `micro` steps of every record, eight of those with stages, on 1, 2 and 4 processes: equal streams,
losses equal up to the order of sums.

    tests/long.sh [RECORD ...]        writes tests/matrix.md, or the named rows in it; exits 1 if a row fails

Each number of processes is one launch that trains record after record, so that torch is loaded once.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests/matrix.md"
sys.path.insert(0, str(ROOT))

from settings import deltas
from system import command_line
from common import environment

environment.require(*environment.TRAINING)
PROCESSES = (1, 2, 4)
# nats after three steps in float64; the order of summation differs between numbers of processes
TOLERANCE = 1e-9
VARIANTS = {"variants/2": ("system.expert_parallel=true",)}  # what else a record is tried with
# SOAP with new bases in every update: the statistics of the first updates are rank deficient, so
# rounding decides their bases, and with them the losses. These have one order of sums on any number of
# processes.
ORDERED = ("optimizer/44", "optimizer/45", "optimizer/46", "optimizer/c2600", "optimizer/c2580",
           "optimizer/c2560", "optimizer/c2540")


def cases(refs):
    """[(name, ref, settings)] of the rows."""
    out = []
    for ref in refs:
        first = "system.reduction=ordered" if ref in ORDERED else ""
        out.append((f"{ref} {first}".strip(), ref, (first,) if first else ()))
        out += [(f"{ref} {x}", ref, (x,)) for x in VARIANTS.get(ref, ())]
    return out


def steps_of(ref):
    """Steps of a row: eight where they go through stages, so that every stage and the extension has some,
    and the table of record 53 parts before the end."""
    return 8 if deltas.find_record(ref).settings.schedule.stages else 3


def work(refs, out):
    """In each process of a launch: train every case; the first process writes summaries to out/N/."""
    import train_gpt
    for number, (_, ref, sets) in enumerate(cases(refs)):
        folder = Path(out) / str(number)
        argv = [ref, "--scale", "micro", "--out", str(folder)]
        for x in (f"schedule.steps={steps_of(ref)}", "system.precision=float64", *sets):
            argv += ["--set", x]
        options, resolved = command_line.command_line(argv)
        with contextlib.redirect_stdout(io.StringIO()):
            train_gpt.train(resolved, options)


def launch(refs, processes, out):
    """Summaries of all cases on so many processes, by number; and what the launch said on stderr."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*command, __file__, "--work", str(out), *refs], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = {
        int(path.parent.parent.name): json.loads(path.read_text())
        for path in Path(out).glob("*/*/summary.json")
    }
    return found, done.stderr


def row(name, results):
    """(Markdown line, passed) of a case. results: its summary on each number of processes, None where there
    is none."""
    if None in results:
        return f"| {name} | no result on {PROCESSES[results.index(None)]} processes FAILED | | | | |", False
    losses = [r["val_loss"] for r in results]
    spread, same = max(losses) - min(losses), len({r["stream_digest"] for r in results}) == 1
    passed = spread <= TOLERANCE and same
    cells = " | ".join(f"{loss:.6f}" for loss in losses)
    return (
        f"| {name} | {cells} | {spread:.1e} | {'equal' if same else 'DIFFER'}{'' if passed else ' FAILED'} |",
        passed,
    )


def head(seconds):
    """What stands above the rows of a table of all records."""
    return ("Three `micro` steps of every record, eight from 42 on, in float64, validation loss on "
            f"{', '.join(map(str, PROCESSES))} gloo processes of one thread (`tests/long.sh`, "
            f"{seconds:.0f} s). They differ by the order of sums only.\n\n| record | 1 "
            "process | 2 processes | 4 processes | spread | streams |\n|---|---|---|---|---|---|\n")


def merged(table, rows):
    """A table with the rows {name: line} in place of its own of these names, in the order of the records."""
    start = table.index("|---")
    start = table.index("\n", start) + 1
    found = {line.split("|")[1].strip(): line for line in table[start:].splitlines()} | rows
    names = [name for name, _, _ in cases(deltas.load_records())]
    return table[:start] + "".join(f"{found[name]}\n" for name in names if name in found)


def main():
    refs = [deltas.find_record(name).ref for name in sys.argv[1:]] or list(deltas.load_records())
    began, by_processes = time.time(), []
    with tempfile.TemporaryDirectory() as scratch:
        for processes in PROCESSES:
            found, said = launch(refs, processes, Path(scratch) / str(processes))
            by_processes.append(found)
            missing = [name for i, (name, _, _) in enumerate(cases(refs)) if i not in found]
            print(f"{processes} process{'es' if processes > 1 else ''}: {len(found)} trained, "
                  f"{time.time() - began:.0f} s", flush=True)
            if missing:
                print(
                    f"no result of {', '.join(missing)}; the launch ended with:\n{said[-2000:]}",
                    file=sys.stderr,
                )
    rows = [row(name, [found.get(i) for found in by_processes]) for i, (name, _, _) in enumerate(cases(refs))]
    print(*(line for line, _ in rows), sep="\n")
    lines = {name: line for (name, _, _), (line, _) in zip(cases(refs), rows)}
    table = TABLE.read_text(encoding="utf-8") if sys.argv[1:] else head(time.time() - began)
    TABLE.write_text(merged(table, lines), encoding="utf-8")
    sys.exit(not all(passed for _, passed in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[3:], sys.argv[2])
    else:
        main()
