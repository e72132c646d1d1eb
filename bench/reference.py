"""The first losses of a short training, in float32 on the CPU, for a GPU to be compared with:
`python bench/reference.py [--out JSON]`.

Record 33 at scale small, with width, batch and rows cut so that a CPU makes ten steps in two minutes: all its
parts are there, with heads of 128. The tokens are made from a seed (measure.repeating_shards), so every
machine has the same. Two curves are made: all in float32, and in the record's own precision, with its FP8
head emulated. How far these two are apart is the noise of the precision; a GPU may be FACTOR times as far
from float32 as that at its worst step.

The committed table has the first curve only, so its bound is STATED, which was chosen and not measured: the
ten losses of that curve change by 0.03 to 0.64 nats from step to step, and at micro the first ten losses in
the two precisions were up to 0.062 nats apart (0.000 at the first step). A GPU within the bound learns the
same thing; that its kernels are exact is shown by bench/correct.py.
"""

import argparse
import hashlib
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure  # first: it finds the repository

from common import arguments, console, files

ROOT = Path(__file__).parent.parent
PATH = ROOT / "bench/results/reference/short-33-small.json"
RECORD, SCALE, STEPS, COMPARED = "short/33", "small", 200, 10
SIZES = {"model.model_dim": 384, "model.attn.num_heads": 3, "data.tokens_per_rank": 256, "data.seq_len": 256,
         "validation.tokens": 2048, "validation.seq_len": 256, "validation.every": COMPARED}
FACTOR = 4
STATED = 0.1  # nats, chosen: the bound of a table that has no curve in the record's own precision
LEAST_BOUND = 0.01  # nats: so close the loss of a step is not known, whatever the two curves say


def shards(folder: Path, steps: int = STEPS) -> Path:
    """A folder of the tokens that `steps` steps read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = 8 * SIZES["data.tokens_per_rank"]
    measure.repeating_shards(folder, (steps + 4) * tokens, 2 * SIZES["validation.tokens"])
    return folder


def digest(folder: Path) -> str:
    """SHA-256 of the tokens that the compared steps read."""
    read = 2 * 8 * SIZES["data.tokens_per_rank"] * COMPARED + 1024  # bytes of header and tokens
    with open(folder / "bench_train_000001.bin", "rb") as file:
        return hashlib.sha256(file.read(read)[1024:]).hexdigest()


def settings() -> list[str]:
    """What the trainings of a comparison have in common, as `--set` wants it."""
    return [f"{path}={value}" for path, value in SIZES.items()]


def first_losses(events: list[dict]) -> list[float] | None:
    """Training losses of the first COMPARED steps in a log, or None while they are not all there."""
    losses = [x for e in events if e["kind"] == "validation" for x in e["train_loss"]]
    return losses[:COMPARED] if len(losses) >= COMPARED else None


def bound(table: dict) -> float:
    """How far a GPU's loss may be from the float32 one, in nats: STATED where only float32 was made."""
    if "own_precision" not in table:
        return STATED
    apart = max(abs(a - b) for a, b in zip(table["float32"], table["own_precision"], strict=True))
    return max(LEAST_BOUND, FACTOR * apart)


def compared(events: list[dict], data: Path, path: Path = PATH) -> dict:
    """The row of a comparison: largest difference, its bound, and `failed` if it is exceeded or unknown."""
    table, losses = json.loads(path.read_text(encoding="utf-8")), first_losses(events)
    if digest(data) != table["tokens"]:
        return {"failed": "not compared: this numpy draws other tokens than the reference's"}
    if losses is None:
        return {"failed": f"not compared: fewer than {COMPARED} steps have a loss"}
    apart = [abs(a - b) for a, b in zip(losses, table["float32"], strict=True)]
    worst = max(apart, key=lambda x: math.inf if math.isnan(x) else x)
    row = {"first losses": [round(x, 4) for x in losses], "largest difference": round(worst, 5),
           "at step": apart.index(worst), "bound": round(bound(table), 5)}
    if not worst <= bound(table):
        row["failed"] = f"the losses leave the CPU's by {worst:.4f} nats, bound {bound(table):.4f}"
    return row


# ----- making it --------------------------------------------------------------------------------------------

def cpu_losses(precision: str, data: Path, out: Path) -> list[float]:
    """The losses of a training on this CPU, which is stopped when they are in its log."""
    command = [sys.executable, "train_gpt.py", RECORD, "--scale", SCALE]
    command += ["--data", str(data), "--out", str(out)]
    how = [f"schedule.steps={STEPS}", "system.device=cpu", f"system.precision={precision}"]
    how.append("system.ranks_per_microbatch=1")  # fits in 8 GiB
    for change in [*settings(), *how]:
        command += ["--set", change]
    training = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while training.poll() is None:
            for path in files.listed(out, "*/run.jsonl"):
                lines = path.read_text(encoding="utf-8").split("\n")[:-1]
                losses = first_losses([json.loads(line) for line in lines])
                if losses:
                    return losses
            time.sleep(1)
    finally:
        training.send_signal(signal.SIGTERM)
        training.wait()
    sys.exit(f"error: the training in {precision} ended with {training.returncode} before step {COMPARED}")


def main() -> None:
    """The program: trains twice on the CPU and writes the table."""
    p = arguments.Parser(prog="bench/reference.py", description=__doc__.partition("\n\n")[0],
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", metavar="JSON", default=str(PATH),
                   help=f"where the table goes (default {PATH.relative_to(ROOT)})")
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = shards(Path(scratch) / "shards")
        table = {"about": measure.about(), "record": RECORD, "scale": SCALE, "steps": STEPS,
                 "settings": settings(), "tokens": digest(data)}
        for name, precision in (("float32", "float32"), ("own_precision", "record")):
            began = time.perf_counter()
            table[name] = cpu_losses(precision, data, Path(scratch) / precision)
            print(f"{precision}: {' '.join(f'{x:.4f}' for x in table[name])} "
                  f"({time.perf_counter() - began:.0f} s)", flush=True)
    table["bound"] = bound(table)
    files.write(o.out, files.json_text(table, indent=1) + "\n", parents=True)
    print(f"written: {o.out}; a GPU may be {table['bound']:.4f} nats away")


if __name__ == "__main__":
    console.program(main)
