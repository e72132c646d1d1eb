"""Seconds until the clock starts, and where they go: `python bench/start.py [RECORD ...] [--scale full] [--out JSON]`.

Each record is started three times by train_gpt.py, in processes of their own: cold (compiler caches empty), warm (the same
caches again) and file (caches empty, but --compile-cache FILE of the cold one). Wall seconds are the log's and add up to `start`;
other programs stretch them. CPU seconds are of the trainer with all its children, its few steps and validations included. On a
CPU the model is compiled too (system.compile=on), by Inductor's C++ backend. Without --data, on random tokens.
"""

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import measure
import steps
import torch

from settings import UserError

PARTS = ("imports", "data", "dynamo", "inductor", "kernels", "autotune", "first_runs")


def cpu_seconds():
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def figures(summary, cpu):
    """Where the start of one training went, in seconds (system.compiler.account says what each part is)."""
    reset = summary["reset"]
    start, cost = (reset["start_ms"] + reset["warmup_ms"]) / 1000, reset.get("compile") or {}
    parts = {"imports": reset["imports_ms"] / 1000, "data": (reset["start_ms"] - reset["imports_ms"]) / 1000}
    parts |= {name: cost.get(f"{name}_s", 0.0) for name in ("dynamo", "inductor", "kernels", "autotune")}
    parts["first_runs"] = start - sum(parts.values())  # with their validations, the hashes of the state and the reset
    return {"start": round(start, 2), **{name: round(parts[name], 2) for name in PARTS}, "cpu": round(cpu, 1),
            "graphs": reset["graphs"], "hits": cost.get("hits", 0), "misses": cost.get("misses", 0)}


def measured(ref, o, data, scratch):
    """{cold, warm, file: figures} of one record."""
    place = Path(scratch) / ref.replace("/", "-")
    place.mkdir()
    file, row = place / "compiled.zip", {}
    for kind, caches in (("cold", place / "caches"), ("warm", place / "caches"), ("file", place / "empty")):
        more, before = ["--compile-cache", str(file)] if kind != "warm" else [], cpu_seconds()
        summary, _ = steps.train(ref, o, data, caches, place / kind, more)
        row[kind] = figures(summary, cpu_seconds() - before)
        print(f"{ref:10}{kind:6}" + "".join(f"{row[kind][name]:>11.1f}" for name in ("start", *PARTS, "cpu"))
              + f"{row[kind]['graphs']:>8}{row[kind]['hits']:>6}", flush=True)
    return {**row, "file_mib": round(file.stat().st_size / 2 ** 20, 2)}


def main():
    p = argparse.ArgumentParser(prog="bench/start.py", description=__doc__.splitlines()[0])
    p.add_argument("records", nargs="*", default=steps.LANDMARKS, metavar="RECORD")
    p.add_argument("--scale", default="full")
    p.add_argument("--steps", type=int, default=12, help="of each training: how many of the windows its schedule meets")
    p.add_argument("--nproc", type=int, default=1)
    p.add_argument("--data", metavar="DIR", help="shards to read (default: random tokens)")
    p.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as in train_gpt.py, for every record")
    p.add_argument("--out", metavar="JSON", help="also write the figures here")
    o = p.parse_args()
    if not torch.cuda.is_available() and not any(x.startswith("system.compile=") for x in o.set):
        o.set.append("system.compile=on")
    rows, failed = [], []
    columns = "".join(f"{name:>11}" for name in ("start", *PARTS, "cpu"))
    print(f"{'seconds':16}{columns}{'graphs':>8}{'hits':>6}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        data = steps.shards(o, scratch)
        for ref in o.records:
            try:
                rows.append({"record": ref, **measured(ref, o, data, scratch)})
            except UserError as error:
                failed.append(str(error))
                print(f"failed: {error}", flush=True)
    measure.write(o.out, scale=o.scale, steps=o.steps, processes=o.nproc, settings=o.set, rows=rows, failed=failed)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
