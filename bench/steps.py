"""Milliseconds per step and memory of whole trainings:
`python bench/steps.py [RECORD ...] [--scale full] [--out JSON]`.

Each record is trained for some steps by train_gpt.py in a process of its own. From the log: milliseconds per
step over the second half, peak memory, graphs compiled. Compilation comes before the clock; with --caches
DIR, the caches that bench/start.py --caches wrote, it is short. With --check-sync a step that makes Python
wait for the GPU is a failure, and the record is timed once more without the check. Without --data, on random
tokens in documents of FineWeb's lengths.
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import measure
from report import Report, add_resume, stop_in_order

from common import arguments, console
from common import files
import runlog
from common.errors import UserError
from settings import deltas
from settings.data import LOGICAL_RANKS, per_stage

ROOT = Path(__file__).parent.parent
LANDMARKS = ("short/11", "short/21", "short/33")


def shards(o: Namespace, scratch: str) -> Path:
    """The folder of shards: --data, otherwise random ones where the scale has no corpus of its own."""
    if o.data is None and o.scale in ("full", "small"):
        sizes = (deltas.resolve(ref, scale=o.scale).settings.data.tokens_per_rank for ref in o.records)
        most = LOGICAL_RANKS * max(max(per_stage(size)) for size in sizes)  # of any stage
        measure.synthetic_shards(Path(scratch), 2 * most * (o.steps + 4), 2_200_000)
    return Path(o.data or scratch).absolute()


def place(caches: str | Path, ref: str) -> Path:
    """Where a record's compiled code is kept."""
    return Path(caches).absolute() / ref.replace("/", "-")


def validation_tokens(ref: str, scale: str) -> int:
    """As few as a record can: one chunk of the trainer's, or one row, for each logical rank."""
    return LOGICAL_RANKS * max(32768, deltas.resolve(ref, scale=scale).settings.validation.seq_len)


def train(
    ref: str, o: Namespace, data: Path, caches: Path | None, out: Path, more: Sequence[str] = (),
    validations: int = 2
) -> tuple[dict, list[dict]]:
    """(summary, events) of one training, or UserError with its last line on stderr.

    caches: folder of compiled code; None: the trainer's usual one. more: arguments of the trainer.
    o.steps: number of steps; 0: all of the record's.
    """
    launch = [sys.executable]
    if o.nproc > 1:
        launch += [str(ROOT / "system" / "launch.py"), str(o.nproc)]
    command = [*launch, "train_gpt.py", ref, "--scale", o.scale, "--out", str(out)]
    sets = {}
    if o.steps:
        sets |= {"schedule.steps": o.steps, "validation.every": max(1, o.steps // validations)}
    if o.scale in ("full", "small"):
        command += ["--data", str(data)]
        sets["validation.tokens"] = validation_tokens(ref, o.scale)
    sets |= dict(x.split("=", 1) for x in o.set)
    for path, value in sets.items():
        command += ["--set", f"{path}={value}"]
    command += more
    env = dict(os.environ)
    if caches is not None:
        env |= {
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")
        }
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    except SystemExit as stop:
        stop.said = so_far(out)
        raise
    found = files.listed(out, "*/summary.json")
    if not found:
        said = done.stderr.strip().splitlines() or ["?"]
        reason = next((line for line in reversed(said) if line.startswith("error:")), said[-1])
        raise UserError(f"the training ended with {done.returncode}: {reason}")
    events = runlog.read_chain(found[0].parent / "run.jsonl")
    summary = json.loads(found[0].read_text(encoding="utf-8"))
    if summary["status"] != "finished":
        raise UserError(f"the training {summary['status']} after {summary['steps']} steps")
    return summary, events


def so_far(out: Path) -> str:
    """What the log of a training that was stopped says of its last validation."""
    for path in files.listed(out, "*/run.jsonl"):
        # a last line that is not whole is not read
        events = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])
        points = [e for e in events if e["kind"] == "validation"]
        if points:
            text = (
                ", after step {step} of {scheduled_steps} with loss {val_loss:.4f} in {train_time_ms:.0f} ms"
            )
            return text.format(**points[-1])
    return ", before the clock started"


def figures(summary: dict, events: list[dict]) -> dict:
    """What one training says."""
    points = [(e["step"], e["train_time_ms"]) for e in events if e["kind"] == "validation"]
    (s0, t0), (s1, t1) = points[-2:]
    reset = summary["reset"]
    return {
        "ms_per_step": round((t1 - t0) / (s1 - s0), 3), "start_s": round(
            (reset["start_ms"] + reset["warmup_ms"]) / 1000, 2), "graphs": reset["graphs"],
        "graphs_in_clock": summary["graphs_in_clock"], "peak_memory_mib": summary.get("peak_memory_mib"),
        "attention": summary["attention"], "device": summary["device"]
    }


def measured(ref: str, o: Namespace, data: Path, caches: Path, out: Path, more: Sequence[str]) -> dict:
    """Print and return the row of a record."""
    # `warm` is what --plan reads: figures of steps, for which everything has been compiled
    summary, events = train(ref, o, data, caches, out, more)
    compiled = summary["reset"].get("compile") or {}
    row = {"warm": figures(summary, events), "compiled": compiled.get("misses", 0)}
    # those of the timed steps: the batch of records from 46 on grows
    a, b = [e for e in events if e["kind"] == "validation"][-2:]
    row["tokens_per_second"] = round(
        1000 * (b["tokens"] - a["tokens"]) / (b["train_time_ms"] - a["train_time_ms"])
    )
    memory = row["warm"]["peak_memory_mib"]
    print(
        f"{ref}: {row['warm']['ms_per_step']:.1f} ms a step, {row['tokens_per_second']:,} tokens/s"
        + (f", {memory:,} MiB" if memory else "")
        + f"; the clock starts after {row['warm']['start_s']:.0f} s, "
        f"{row['warm']['graphs']} graphs before it, {row['compiled']} pieces of code compiled anew, and "
        f"{row['warm']['graphs_in_clock']} graphs in it", flush=True
    )
    return row


def cases(ref: str, o: Namespace, data: Path, scratch: str) -> Iterator[tuple[dict, Callable]]:
    """The row of a record; with --check-sync one more, without the check, if a step waits for the GPU."""
    caches, waits = place(o.caches or Path(scratch) / "caches", ref), []

    def checked():
        try:
            return measured(ref, o, data, caches, place(Path(scratch) / "checked", ref), ["--check-sync"])
        except UserError as error:
            waits.append("waits for the device" in str(error))
            raise

    if o.check_sync:
        yield {"record": ref}, checked
        if not any(waits):
            return
    yield {"record": ref}, lambda: measured(ref, o, data, caches, place(Path(scratch) / "runs", ref), [])


def add_arguments(
    p: ArgumentParser, steps: int, records: tuple[str, ...] = LANDMARKS, scale: str = "full"
) -> None:
    """What the benches of trainings share."""
    p.add_argument("records", nargs="*", default=records, metavar="RECORD",
                   help=f"default: {' '.join(records)}")
    p.add_argument("--scale", default=scale, help=f"size of the records (default {scale})")
    p.add_argument("--steps", type=arguments.integer(0, 10 ** 6), default=steps,
                   help=f"steps of each training (default {steps})")
    p.add_argument("--nproc", type=arguments.integer(1, 8), default=1,
                   help="processes of a training (default 1)")
    p.add_argument("--data", metavar="DIR", help="shards to read (default: random tokens)")
    p.add_argument("--caches", metavar="DIR",
                   help="folder of compiled code, kept (default: empty, and removed at the end)")
    p.add_argument("--set", action="append", default=[], metavar="PATH=VALUE",
                   help="as in train_gpt.py, for every record")
    p.add_argument("--out", metavar="JSON", help="also write the figures here, and as Markdown next to it")
    add_resume(p)


def run(o: Namespace, title: str, cases: Callable[..., Iterator[tuple[dict, Callable]]]) -> int:
    """Exit code. cases: function of (record, o, data, scratch) that yields (fields, case) of each row."""
    stop_in_order()
    report = Report(o.out, title, resume=o.resume, checked=True, scale=o.scale, steps=o.steps,
                    processes=o.nproc, settings=o.set, data=Path(o.data or "random-tokens").name)
    report.failed = []  # these are tried again
    report.write()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            data = shards(o, scratch)
        except UserError as error:  # an unknown record
            sys.exit(f"error: {error}")
        for ref in o.records:
            for fields, case in cases(ref, o, data, scratch):
                if not any(fields.items() <= row.items() for row in report.rows):
                    report.attempt(fields, case)
    return report.finish()


def main() -> None:
    """Print the milliseconds per step of each record."""
    p = arguments.Parser(prog="bench/steps.py", description=__doc__.partition("\n\n")[0])
    add_arguments(p, 16)
    p.add_argument("--check-sync", action="store_true", help="a step that waits for the GPU is a failure")
    o = p.parse_args()
    sys.exit(run(o, "Milliseconds per step", cases))


if __name__ == "__main__":
    console.program(main)
