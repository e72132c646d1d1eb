"""Milliseconds per step, memory and start of whole trainings: `python bench/steps.py [RECORD ...] [--scale full] [--out JSON]`.

Each record is trained twice for some steps by train_gpt.py in a process of its own: cold (compiler caches empty) and warm (the
same caches again). From the logs: milliseconds per step over the second half, peak memory, seconds from the start of the
process to the clock's start, graphs compiled. Without --data, on random tokens in documents of FineWeb's lengths.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import measure

import deltas
from settings import UserError, tokens_per_step

ROOT = Path(__file__).parent.parent
LANDMARKS = ("short/11", "short/21", "short/33")


def shards(o, scratch):
    """The folder of shards: --data, else random ones where the scale has no corpus of its own."""
    if o.data is None and o.scale in ("full", "small"):
        most = max(tokens_per_step(deltas.resolve(ref, scale=o.scale).settings) for ref in o.records)
        measure.synthetic_shards(Path(scratch), 2 * most * (o.steps + 4), 2_200_000)
    return Path(o.data or scratch)


def train(ref, o, data, caches, out, more=()):
    """(summary, events) of one training, or UserError with its last line on stderr. more: arguments of the trainer."""
    launch = [sys.executable]
    if o.nproc > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={o.nproc}"]
    command = [*launch, "train_gpt.py", ref, "--scale", o.scale, "--out", str(out), "--set", f"schedule.steps={o.steps}"]
    command += ["--set", f"validation.every={max(1, o.steps // 2)}"]
    if o.scale in ("full", "small"):
        command += ["--data", str(data), "--set", "validation.tokens=2097152"]
    for x in o.set:
        command += ["--set", x]
    command += more
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    found = list(Path(out).glob("*/summary.json"))
    if not found:
        said = done.stderr.strip().splitlines() or ["?"]
        reason = next((line for line in reversed(said) if line.startswith("error:")), said[-1])  # torchrun has the last word
        raise UserError(f"{ref}: the training ended with {done.returncode}: {reason}")
    events = [json.loads(line) for line in (found[0].parent / "run.jsonl").open()]
    return json.loads(found[0].read_text()), events


def figures(summary, events):
    """What one training says."""
    points = [(e["step"], e["train_time_ms"]) for e in events if e["kind"] == "validation"]
    if summary["status"] != "finished":
        raise UserError(f"{summary['record']}: the training {summary['status']} after {summary['steps']} steps")
    (s0, t0), (s1, t1) = points[-2:]
    reset = summary["reset"]
    return {"ms_per_step": round((t1 - t0) / (s1 - s0), 3), "start_s": round((reset["start_ms"] + reset["warmup_ms"]) / 1000, 2),
            "graphs": reset["graphs"], "graphs_in_clock": summary["graphs_in_clock"],
            "peak_memory_mib": summary.get("peak_memory_mib"), "attention": summary["attention"], "device": summary["device"]}


def main():
    p = argparse.ArgumentParser(prog="bench/steps.py", description=__doc__.splitlines()[0])
    p.add_argument("records", nargs="*", default=LANDMARKS, metavar="RECORD")
    p.add_argument("--scale", default="full")
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--nproc", type=int, default=1)
    p.add_argument("--data", metavar="DIR", help="shards to read (default: random tokens)")
    p.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as in train_gpt.py, for every record")
    p.add_argument("--out", metavar="JSON", help="also write the figures here")
    o = p.parse_args()
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as scratch:
        data = shards(o, scratch)
        for ref in o.records:
            caches = Path(scratch) / "caches" / ref.replace("/", "-")
            row = {"record": ref}
            try:
                for start in ("cold", "warm"):
                    row[start] = figures(*train(ref, o, data, caches, Path(scratch) / f"{start}-{ref.replace('/', '-')}"))
            except UserError as error:
                failed.append(str(error))
                print(f"failed: {error}", flush=True)
                continue
            tokens = tokens_per_step(deltas.resolve(ref, scale=o.scale).settings)
            row["tokens_per_second"] = round(1000 * tokens / row["warm"]["ms_per_step"])
            memory = row["warm"]["peak_memory_mib"]
            print(f"{ref}: {row['warm']['ms_per_step']:.1f} ms a step, {row['tokens_per_second']:,} tokens/s"
                  + (f", {memory:,} MiB" if memory else "") + f"; the clock starts {row['warm']['start_s']:.0f} s after the process "
                  f"(cold {row['cold']['start_s']:.0f} s), {row['warm']['graphs']} graphs before it and "
                  f"{row['warm']['graphs_in_clock']} in it", flush=True)
            rows.append(row)
    measure.write(o.out, scale=o.scale, steps=o.steps, processes=o.nproc, settings=o.set, rows=rows, failed=failed)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
