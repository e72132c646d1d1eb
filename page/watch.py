"""`python -m records watch [RUN ...]`: runs in the terminal while they train, several over each other.

Reads run.jsonl and the heartbeat of each run, nothing else, so it cannot disturb a run. No torch here.
"""

import dataclasses
import functools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import runlog
import schedule
import schema
import settings
from common import files
from common.errors import UserError
from page import curves
from system.heartbeat import Heartbeat, beaten
from system.resume import folders

EVERY_S = 2.0
MOST = 8  # runs that are watched if none is named
UNFINISHED = ("starting", "running", "interrupted", "stalled")
MARKS = "1234567890"  # of the curves in the chart
COLOURS = ("cyan", "yellow", "green", "magenta", "red", "blue", "white")
HEADS = ("run", "step", "val loss", "train loss", "tokens/s", "learning rate", "memory", "state")
RECENT = 20  # training losses of which the mean is shown


def arguments(p: Any) -> None:
    """Options of `records watch`."""
    p.add_argument("runs", nargs="*", metavar="RUN",
                   help="run folders (default: the unfinished ones under --out)")
    p.add_argument("--out", default="runs", metavar="DIR", help="where run folders are (default runs)")
    p.add_argument("--every", type=float, default=EVERY_S, metavar="S",
                   help="seconds between two looks (default 2)")
    p.add_argument("--once", action="store_true",
                   help="print one view and end, as where stdout is no terminal")


def run(options: Any) -> None:
    """`records watch`: show runs until they have ended, or Ctrl-C."""
    from rich.console import Console
    from rich.live import Live
    named = [Path(name) for name in options.runs]
    for folder in named:
        if not (folder / "run.jsonl").is_file():
            raise UserError(f"{folder}: no run.jsonl here; name a run folder such as runs/<date>_...")
    chosen = named or unfinished(options.out)
    if not chosen:
        raise UserError(f"no unfinished run under {options.out}: name run folders, or give --out")
    if options.once or not sys.stdout.isatty():
        Console().print(view(chosen))
        return
    with Live(view(chosen), auto_refresh=False, vertical_overflow="crop") as live:
        while any(look(folder).status in ("running", "starting") for folder in chosen):
            time.sleep(max(0.1, options.every))
            live.update(view(chosen, live.console.width), refresh=True)


def unfinished(out: str) -> list[Path]:
    """The newest runs without an end, the oldest first."""
    found = [folder for folder in folders(out) if look(folder).status in UNFINISHED]
    return found[:MOST][::-1]


# ----- one run ----------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Watched:
    """What is known of a run now. nan or "" for what is not known yet.

    points: (step, validation loss). train: training losses, the last ones.
    """
    folder: Path
    start: dict
    status: str
    step: int = 0
    scheduled: int = 0
    clock_ms: float = 0.0
    points: tuple = ()
    train: tuple = ()
    memory_mib: int = 0
    guards: tuple = ()


def look(folder: Path) -> Watched:
    """Read a run's log, which may be under way or torn."""
    path = folder / "run.jsonl"
    try:
        state = path.stat()
    except OSError:
        return Watched(folder, {}, "gone")
    seen = parsed(folder, state.st_mtime_ns, state.st_size)
    steps, clock_ms = Heartbeat.read(beaten(folder))
    if seen.status == "running" and steps > seen.step:  # later than the last validation
        seen = dataclasses.replace(seen, step=steps, clock_ms=max(clock_ms, seen.clock_ms))
    return seen


@functools.lru_cache(maxsize=64)
def parsed(folder: Path, changed_ns: int, size: int) -> Watched:
    """What the log of a run says, as long as its file does not change."""
    whole = runlog.readable(folder / "run.jsonl")
    if not whole or whole[0]["kind"] != "start":
        return Watched(folder, {}, "starting")
    events = runlog.standing(whole)
    found = [e for e in events if e["kind"] == "validation"]
    last = found[-1] if found else {}
    end = events[-1] if events[-1]["kind"] == "end" else {}
    stalled = events[-1]["kind"] == "guard" and events[-1]["what"] == "stall"
    return Watched(
        folder, events[0], end.get("status", "stalled" if stalled else "running" if found else "starting"),
        end.get("steps", last.get("step", 0)), last.get("scheduled_steps", 0),
        end.get("train_time_ms", last.get("train_time_ms", 0.0)),
        tuple((e["step"], curves.number(e["val_loss"])) for e in found),
        tuple(curves.number(x) for e in found for x in e["train_loss"])[-RECENT:],
        end.get("peak_memory_mib", 0), tuple(e["message"] for e in whole if e["kind"] == "guard")
    )


@functools.lru_cache(maxsize=64)
def plan_of(settings_text: str) -> tuple:
    """(settings, plan of every step) of a run; (None, ()) if this program cannot read its settings."""
    try:
        s = settings.check(schema.from_plain(json.loads(settings_text)))
        return s, schedule.plan(s)
    except (UserError, KeyError, TypeError, ValueError):
        return None, ()


def cells(seen: Watched, name: str) -> list[str]:
    """The row of a run, a text for each of HEADS."""
    s, plans = plan_of(files.json_text(seen.start.get("settings", {}), sort_keys=True))
    rate = factor = ""
    if s is not None and seen.clock_ms > 0:
        rate = f"{1000 * schedule.tokens_before(s, min(seen.step, len(plans))) / seen.clock_ms:,.0f}"
    if plans:
        factor = f"x {plans[min(seen.step, len(plans) - 1)].lr_factor:.3f}"
    train = [x for x in seen.train if math.isfinite(x)]
    state = seen.status + (f": {seen.guards[-1]}" if seen.guards else "")
    return [
        name, f"{seen.step}/{seen.scheduled or '?'}", f"{seen.points[-1][1]:.4f}" if seen.points else "",
        f"{sum(train) / len(train):.4f}" if train else "", rate, factor,
        f"{seen.memory_mib:,} MiB" if seen.memory_mib else planned_memory(seen.start), state
    ]


def planned_memory(start: dict) -> str:
    """The estimate of a run's memory that its first event holds, or ''."""
    told = start.get("memory")
    return f"about {told['mib']['total']:,} MiB" if told else ""


# ----- all runs ---------------------------------------------------------------------------------------------

def view(chosen: list[Path], width: int = 100) -> Any:
    """Table and chart of the runs, for rich."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text
    seen = [look(folder) for folder in chosen]
    table = Table(box=box.SIMPLE_HEAD)
    for head in HEADS:
        table.add_column(head, justify="left" if head in ("run", "state") else "right")
    for i, (one, name) in enumerate(zip(seen, names(seen))):
        row = cells(one, f"{MARKS[i % len(MARKS)]} {name}")
        table.add_row(*(Text(cell) for cell in row), style=colour(i))
    drawn = Text()
    for line in chart([one.points for one in seen], width=max(20, min(width, 120) - 12)):
        axis, bar, drawing = line.partition("|")
        drawn.append(axis + bar)
        for letter in drawing:
            drawn.append(letter, style=colour(MARKS.index(letter)) if letter in MARKS else "")
        drawn.append("\n")
    return Group(table, drawn)


def colour(i: int) -> str:
    """The colour of the i-th run."""
    return COLOURS[i % len(COLOURS)]


def names(seen: list[Watched]) -> list[str]:
    """A label of each run: what differs between them, as in pictures of curves."""
    whole = [one for one in seen if one.start]
    made = curves.labels([
        curves.Curve(one.folder, one.start, [*one.points], [], one.status, one.scheduled) for one in whole
    ])[1] if whole else []
    labels = dict(zip((one.folder for one in whole), made))
    return [labels.get(one.folder, one.folder.name) for one in seen]


def chart(runs: list[tuple], width: int = 80, height: int = 14) -> list[str]:
    """Lines of text: validation losses over steps, each run with its digit, the lower losses resolved best.

    runs: ((step, loss), ...) of each run.
    """
    points = [(i, step, loss) for i, run in enumerate(runs) for step, loss in run if math.isfinite(loss)]
    later = [loss for _, step, loss in points if step]
    if not later:
        return []
    low, high, last = min(later), max(later), max(step for _, step, _ in points)
    span, grid = max(high - low, 1e-9), [[" "] * width for _ in range(height)]
    for i, run in enumerate(runs):
        for column, loss in straight(run, last, width):
            if math.isfinite(loss) and loss <= high + 0.5 * span / height:
                row = max(0, min(height - 1, round((high - loss) / span * (height - 1))))
                grid[row][column] = MARKS[i % len(MARKS)]
    lines = [f"{high - i / (height - 1) * span:8.3f} |{''.join(row)}".rstrip() for i, row in enumerate(grid)]
    return [*lines, " " * 9 + "+" + "-" * width, " " * 10 + f"0{'step ' + str(last):>{width - 1}}"]


def straight(run: tuple, last: int, width: int) -> list[tuple[int, float]]:
    """(column, loss) of a run on straight lines between its validations, up to its last one."""
    found, points = [], [p for p in run if math.isfinite(p[1])]
    for (s0, l0), (s1, l1) in zip(points, points[1:]):
        first, stop = (round(s / max(last, 1) * (width - 1)) for s in (s0, s1))
        found += [(c, l0 + (l1 - l0) * (c - first) / max(stop - first, 1)) for c in range(first, stop + 1)]
    return found or [(round(s / max(last, 1) * (width - 1)), loss) for s, loss in points]
