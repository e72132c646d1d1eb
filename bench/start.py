"""Seconds until the clock starts, and where they go:
`python bench/start.py [RECORD ...] [--scale full] [--out JSON]`.

Each record is started three times by train_gpt.py, in processes of their own: cold (compiler caches empty),
warm (the same caches again) and file (caches empty, but --compile-cache FILE of the cold one). --caches DIR
keeps the cold one's caches for bench/steps.py. Wall seconds are the log's and add up to `start`; other
programs stretch them. CPU seconds are of the trainer with all its children, its few steps and validations
included. On a CPU the model is compiled too (system.compile=on), by Inductor's C++ backend. Without --data,
on random tokens.
"""

import resource
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import steps
import torch

from common import arguments, console
from common.errors import UserError

PARTS = ("imports", "data", "dynamo", "inductor", "kernels", "autotune", "first_runs")


def cpu_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def figures(summary: dict, cpu: float) -> dict:
    """Where the start of one training went, in seconds (system.compiler.account says what each part is)."""
    reset = summary["reset"]
    start, cost = (reset["start_ms"] + reset["warmup_ms"]) / 1000, reset.get("compile") or {}
    parts = {"imports": reset["imports_ms"] / 1000, "data": (reset["start_ms"] - reset["imports_ms"]) / 1000}
    parts |= {name: cost.get(f"{name}_s", 0.0) for name in ("dynamo", "inductor", "kernels", "autotune")}
    # with their validations, the hashes of the state and the reset
    parts["first_runs"] = start - sum(parts.values())
    return {"start": round(start, 2), **{name: round(parts[name], 2) for name in PARTS}, "cpu": round(cpu, 1),
            "graphs": reset["graphs"], "hits": cost.get("hits", 0), "misses": cost.get("misses", 0)}


def measured(ref: str, kind: str, o: Namespace, data: Path, caches: Path, scratch: str) -> dict:
    """Print and return the row of one start."""
    file, before = Path(scratch) / f"{ref.replace('/', '-')}.zip", cpu_seconds()
    if kind == "file" and not file.exists():
        raise UserError("the cold training saved no compiled code")
    more = ["--compile-cache", str(file)] if kind != "warm" else []
    summary, _ = steps.train(ref, o, data, caches, steps.place(Path(scratch) / kind, ref), more)
    row = figures(summary, cpu_seconds() - before)
    print(f"{ref:10}{kind:6}" + "".join(f"{row[name]:>11.1f}" for name in ("start", *PARTS, "cpu"))
          + f"{row['graphs']:>8}{row['hits']:>6}", flush=True)
    return row | {"file_mib": round(file.stat().st_size / 2 ** 20, 2)} if kind == "file" else row


def cases(ref: str, o: Namespace, data: Path, scratch: str) -> Iterator[tuple[dict, Callable]]:
    """Cold, warm and file of one record."""
    caches = steps.place(o.caches or Path(scratch) / "caches", ref)
    shutil.rmtree(caches, ignore_errors=True)  # of an earlier bench
    empty = steps.place(Path(scratch) / "empty", ref)
    for kind, folder in (("cold", caches), ("warm", caches), ("file", empty)):
        yield {"record": ref, "kind": kind}, lambda: measured(ref, kind, o, data, folder, scratch)


def main() -> None:
    """Print, for each record, the seconds of each part of a start."""
    p = arguments.Parser(prog="bench/start.py", description=__doc__.partition("\n\n")[0])
    steps.add_arguments(p, 4)
    o = p.parse_args()
    if not torch.cuda.is_available() and not any(x.startswith("system.compile=") for x in o.set):
        o.set.append("system.compile=on")
    columns = "".join(f"{name:>11}" for name in ("start", *PARTS, "cpu"))
    print(f"{'seconds':16}{columns}{'graphs':>8}{'hits':>6}", flush=True)
    sys.exit(steps.run(o, "Seconds until the clock starts", cases))


if __name__ == "__main__":
    console.program(main)
