"""A short training with its curve: `python bench/train.py [RECORD ...] [--data DIR] [--out JSON]`.

Each record is trained by train_gpt.py at scale small, `--steps` of its 40 million tokens' steps (0: all). On
random tokens, without --data, losses fall to that of random tokens, log 50256 = 10.82, and the curve says
only that it runs. With --reference the training is that of bench/reference.py, and its first losses are
compared with those that a CPU had in float32.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import reference
import steps

from common import arguments, console


def curve(summary: dict, events: list[dict]) -> dict:
    """What the log has of a training, and every validation as `step: loss (seconds)`."""
    points = [e for e in events if e["kind"] == "validation"]
    return {
        "val_loss": round(summary["val_loss"], 4),
        "train_s": round(summary["train_time_ms"] / 1000, 2),
        "steps": summary["steps"],
        "corpus": summary["corpus"],
        "graphs_in_clock": summary["graphs_in_clock"],
        "peak_memory_mib": summary.get("peak_memory_mib"),
        "attention": summary["attention"],
        "device": summary["device"],
        "curve": {
            f"step {e['step']}": f"{e['val_loss']:.4f} ({e['train_time_ms'] / 1000:.1f} s)" for e in points
        },
    }


def measured(ref: str, o: Namespace, data: Path, scratch: str) -> dict:
    """Train one record and return its row: `curve`, with `--reference` also the comparison."""
    caches = steps.place(o.caches, ref) if o.caches else None  # None: those that every training uses
    if o.reference:
        data = reference.shards(Path(scratch) / "shards", o.steps)
    summary, events = steps.train(
        ref, o, data, caches, steps.place(Path(scratch) / "runs", ref), validations=8
    )
    row = curve(summary, events)
    if o.reference:
        row |= reference.compared(events, data)
        if o.rehearse:
            row["rehearsed"] = row.pop("failed", "")
    print(f"{ref}: {row['val_loss']:.4f} after {row['steps']} steps, {row['train_s']:.1f} s of training on "
          f"{row['corpus']}: " + ", ".join(f"{k} {v}" for k, v in row["curve"].items()), flush=True)
    return row


def cases(ref: str, *where) -> Iterator[tuple[dict, Callable]]:
    """The one row of a record."""
    yield {"record": ref}, lambda: measured(ref, *where)


def main() -> None:
    """Train the records one after the other and exit with the bench's code."""
    p = arguments.Parser(prog="bench/train.py", description=__doc__.partition("\n\n")[0])
    steps.add_arguments(p, 200, (reference.RECORD,), "small")
    p.add_argument("--reference", action="store_true", help="compare the first losses with those of the CPU")
    p.add_argument("--rehearse", action="store_true", help="a difference from the CPU is no failure")
    o = p.parse_args()
    if o.reference:
        if list(o.records) != [reference.RECORD] or o.scale != reference.SCALE or o.data:
            p.error(f"--reference is {reference.RECORD} at scale {reference.SCALE} on tokens of its own: "
                    "name no other")
        o.set = reference.settings() + o.set
    sys.exit(steps.run(o, "A short training", cases))


if __name__ == "__main__":
    console.program(main)
