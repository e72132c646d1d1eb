"""Three `micro` steps of every record on 1, 2 and 4 processes: equal streams, losses equal up to the order of sums.

    tests/long.sh [RECORD ...]        writes tests/matrix.md and exits 1 if a row fails
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import deltas

PROCESSES = (1, 2, 4)
TOLERANCE = 1e-9  # nats after three steps in float64; the order of summation differs between numbers of processes


def run(ref, processes, out):
    """Summary of one short training, or the last line that it printed on stderr."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*launch, "train_gpt.py", ref, "--scale", "micro", "--set", "schedule.steps=3", "--set",
                           "system.precision=float64", "--out", str(out)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = list(Path(out).glob("*/summary.json"))
    return json.loads(found[0].read_text()) if done.returncode == 0 and found else (done.stderr.strip() or "?").splitlines()[-1]


def row(ref):
    """(Markdown line, passed) of a record."""
    results = []
    for processes in PROCESSES:
        with tempfile.TemporaryDirectory() as out:
            results.append(run(ref, processes, out))
    failed = [r for r in results if isinstance(r, str)]
    if failed:
        return f"| {ref} | failed: {failed[0]} | | | | |", False
    losses = [r["val_loss"] for r in results]
    spread, same = max(losses) - min(losses), len({r["stream_digest"] for r in results}) == 1
    passed = spread <= TOLERANCE and same
    cells = " | ".join(f"{loss:.6f}" for loss in losses)
    return f"| {ref} | {cells} | {spread:.1e} | {'equal' if same else 'DIFFER'}{'' if passed else ' FAILED'} |", passed


def main():
    refs = sys.argv[1:] or list(deltas.load_records())
    began, lines, good = time.time(), [], True
    for ref in refs:
        line, passed = row(deltas.find_record(ref).ref)
        print(line, flush=True)
        lines.append(line)
        good &= passed
    if not sys.argv[1:]:
        head = (f"Three `micro` steps of every record in float64, validation loss on {', '.join(map(str, PROCESSES))} gloo processes of one "
                f"thread (`tests/long.sh`, {time.time() - began:.0f} s). They differ by the order of sums only.\n\n"
                "| record | 1 process | 2 processes | 4 processes | spread | streams |\n|---|---|---|---|---|---|\n")
        (ROOT / "tests/matrix.md").write_text(head + "\n".join(lines) + "\n")
    sys.exit(not good)


if __name__ == "__main__":
    main()
