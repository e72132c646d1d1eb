"""What a run writes: log.txt in the speedrun's form, run.jsonl with hash-chained lines, summary.json; and its curve.

A line is written whole or not at all: if the disk is full the file is cut back to its last complete line, and the
run ends with one message. No torch here.
"""

import errno
import hashlib
import json
import os
import platform
import subprocess
import time
from pathlib import Path

from settings import UserError

ROOT = Path(__file__).parent
RULER = "=" * 100
SOURCES = ["train_gpt.py", "model.py", "optim.py", "schedule.py", "settings.py", "deltas.py", "runlog.py",
           "kernels/attention.py", "kernels/newton_schulz.py", "data/shards.py", "data/stream.py"]


def sources():
    """(text, hash) of every file that a training runs through."""
    text = "".join(f"# ----- {name}\n{(ROOT / name).read_text()}\n" for name in SOURCES)
    return text, hashlib.sha256(text.encode()).hexdigest()[:16]


def code_version():
    """Git commit and whether the tree was clean, or 'unknown' outside a checkout."""
    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip()
    try:
        commit = git("rev-parse", "HEAD")
        return (commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")) or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine():
    """CPU name, cores and platform."""
    name = platform.processor() or platform.machine()
    try:
        for line in open("/proc/cpuinfo"):
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {"cpu": name, "cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}


class RunLog:
    """The run's folder. `active` is False on all processes but the first: then nothing is written."""

    def __init__(self, out, name, active=True):
        self.active, self.lines, self.previous = active, 0, "0" * 64
        if not active:
            return
        try:
            Path(out).mkdir(parents=True, exist_ok=True)
            stamp, n = time.strftime("%Y%m%d-%H%M%S"), 0
            while True:
                self.folder = Path(out) / (f"{stamp}_{name}" + (f"_{n}" if n else ""))
                try:
                    self.folder.mkdir()
                    break
                except FileExistsError:
                    n += 1
            self.files = {f: open(self.folder / f, "ab", buffering=0) for f in ("log.txt", "run.jsonl")}
        except OSError as error:
            raise UserError(f"cannot write run folder under {out}: {error.strerror}; choose another with --out") from None

    def write(self, name, line):
        """Append one line, or cut the file back to its last complete line and raise."""
        file, data = self.files[name], line.encode() + b"\n"
        start = os.fstat(file.fileno()).st_size
        try:
            if file.write(data) != len(data):  # unbuffered: a full disk may take a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            try:
                os.ftruncate(file.fileno(), start)
            except OSError:
                pass
            raise UserError(f"cannot write {self.folder / name}: {error.strerror}; the log is complete up to here, "
                            f"free some space and start again") from None

    def text(self, line):
        if self.active:
            self.write("log.txt", line)

    def event(self, kind, **fields):
        """One hash-chained line: `hash` is sha256 of the previous hash and this line's canonical JSON."""
        if not self.active:
            return
        body = json.dumps({"n": self.lines, "kind": kind, **fields}, sort_keys=True)
        self.previous = hashlib.sha256((self.previous + body).encode()).hexdigest()
        self.write("run.jsonl", body[:-1] + f', "hash": "{self.previous}"}}')
        self.lines += 1

    def header(self, about, settings):
        """Sources (once per content, beside the run folders), environment and settings (nested plain values)."""
        if not self.active:
            return
        text, digest = sources()
        path = self.folder.parent / f"sources-{digest}.txt"
        try:
            if not path.exists():
                path.write_text(text)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another folder with --out") from None
        self.text(f"sources: ../{path.name}")
        self.text(RULER)
        for key, value in about.items():
            self.text(f"{key}: {value}")
        self.text(f"settings: {json.dumps(settings)}")
        self.text(RULER)
        self.event("start", sources=digest, settings=settings, **about)

    def summary(self, values):
        """summary.json, written at once; the chain's last hash ties it to run.jsonl."""
        if not self.active:
            return
        self.event("end", status=values["status"], val_loss=values["val_loss"], train_time_ms=values["train_time_ms"])
        path = self.folder / "summary.json"
        try:
            path.with_suffix(".tmp").write_text(json.dumps({**values, "last_hash": self.previous}, indent=1) + "\n")
            os.replace(path.with_suffix(".tmp"), path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; run.jsonl beside it is complete") from None


def read_chain(path):
    """Events of a run.jsonl, checked. Raises UserError at the first line that breaks the chain."""
    previous, events = "0" * 64, []
    with open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                event = json.loads(line)
                claimed = event.pop("hash")
            except (json.JSONDecodeError, KeyError, AttributeError):
                raise UserError(f"{path}: line {number} is not a complete log line") from None
            previous = hashlib.sha256((previous + json.dumps(event, sort_keys=True)).encode()).hexdigest()
            if claimed != previous:
                raise UserError(f"{path}: line {number} breaks the hash chain: it or a line before it was changed")
            events.append(event)
    return events


# ----- what a person sees -------------------------------------------------------------------------------------------

def terminal_curve(points, target=None, width=64, height=10):
    """Text chart of (step, val_loss) points, lowest values resolved best: the first point may lie off the top."""
    points = [p for p in points if p[1] == p[1]]
    if len(points) < 2:
        return ""
    losses = [loss for _, loss in points]
    low, high = min(losses + ([target] if target else [])), sorted(losses)[-2] if len(losses) > 3 else max(losses)
    span = max(high - low, 1e-9)
    grid = [[" "] * width for _ in range(height)]
    last = points[-1][0] or 1

    def row(loss):
        return max(0, min(height - 1, round((high - loss) / span * (height - 1))))

    if target:
        grid[row(target)] = ["-"] * width
    for column in range(width):  # straight lines between validations
        step = column / (width - 1) * last
        right = next(i for i, p in enumerate(points) if p[0] >= step - 1e-9)
        (s0, l0), (s1, l1) = points[max(0, right - 1)], points[right]
        loss = l1 if s1 == s0 else l0 + (l1 - l0) * (step - s0) / (s1 - s0)
        if loss <= high + 0.5 * span / height:
            grid[row(loss)][column] = "*"
    lines = [f"{high - i / (height - 1) * span:8.3f} |{''.join(cells)}" for i, cells in enumerate(grid)]
    if target:
        lines[row(target)] += f" target {target:g}"
    return "\n".join(lines + [" " * 9 + "+" + "-" * width, " " * 10 + f"0{'step ' + str(last):>{width - 1}}"])
