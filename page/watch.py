"""`python -m records watch [RUN ...]`: runs in the terminal while they train, several over each other.

Reads run.jsonl and the heartbeat of each run, and which logs are locked, so it cannot disturb a run. A run
whose log no process holds any more was killed. That is known on its own machine; from another one, a run is
silent if its heartbeat and its log are old. No torch here.
"""

import dataclasses
import functools
import json
import math
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import runlog
import schedule
import settings
from common import files
from common.arguments import Parser, number
from common.errors import UserError
from page import curves
from settings import schema
from system.heartbeat import Heartbeat, beaten
from system.resume import folders

if TYPE_CHECKING:
    from rich.console import Group

EVERY_S = 2.0
MOST = 8  # runs that are watched if none is named
GOING = ("starting", "running", "silent")  # may still change
UNFINISHED = (*GOING, "interrupted", "stalled", "killed")
MARKS = "1234567890"  # of the curves in the chart
COLOURS = ("cyan", "yellow", "green", "magenta", "red", "blue", "white")
HEADS = ("run", "step", "val loss", "train loss", "grad norm", "tokens/s", "learning rate", "memory", "state")
RECENT = 20  # training losses of which the mean is shown
# Seconds without a sign after which a run is silent: with a heartbeat, which beats at each step, and without
# one, in the warm-up, which may compile for minutes.
SILENT_S, SILENT_WITHOUT_S = 120.0, 900.0
SILENT_STEPS = 20  # of the run's own length
KILLED_S = 5.0  # without a sign, from a run whose log no process holds: some file systems have no locks


def arguments(p: Parser) -> None:
    """Options of `records watch`."""
    p.add_argument("runs", nargs="*", metavar="RUN",
                   help="run folders (default: the unfinished ones under --out)")
    p.add_argument("--out", default="runs", metavar="DIR", help="where run folders are (default runs)")
    p.add_argument("--every", type=number(0.1, 86400), default=EVERY_S, metavar="S",
                   help="seconds between two looks (default 2)")
    p.add_argument("--once", action="store_true",
                   help="print one view and end, as where stdout is no terminal")


def run(options: Namespace) -> None:
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
        console = Console()
        console.print(view(chosen, console.width))
        return
    with Live(view(chosen, Console().width), auto_refresh=False, vertical_overflow="crop") as live:
        while any(look(folder).status in GOING for folder in chosen):
            time.sleep(options.every)
            live.update(view(chosen, live.console.width), refresh=True)


def unfinished(out: str) -> list[Path]:
    """The newest runs without an end, the oldest first."""
    found = [folder for folder in folders(out) if look(folder).status in UNFINISHED]
    return found[:MOST][::-1]


# ----- one run ----------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Watched:
    """What is known of a run now. nan or "" for what is not known yet.

    points: (step, validation loss). train: training losses, the last ones. norm: of the gradient at the last
    step before a validation. since: seconds since 1970 of the last sign of a run that is silent. machine:
    where it runs or ran last.
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
    norm: float = math.nan
    since: float = 0.0
    machine: str = ""


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
    return alive(seen, state.st_mtime) if seen.status in GOING else seen


def alive(seen: Watched, changed: float) -> Watched:
    """A run without an end as it is now: as it was, killed, or silent. changed: when its log did."""
    beat = Heartbeat.time(beaten(seen.folder))
    last = max(changed, beat)
    silent_s = time.time() - last
    here = seen.machine == this_machine()
    if here and silent_s > KILLED_S and runlog.held_by_process(seen.folder) is False:
        return dataclasses.replace(seen, status="killed", since=last)
    step_s = seen.clock_ms / 1000 / max(1, seen.step)
    if silent_s > (max(SILENT_S, SILENT_STEPS * step_s) if beat else SILENT_WITHOUT_S):
        return dataclasses.replace(seen, status="silent", since=last)
    return seen


@functools.cache
def this_machine() -> str:
    """The anonymous id of this machine, as logs have it."""
    return runlog.machine()["machine"]


@functools.lru_cache(maxsize=64)
def parsed(folder: Path, changed_ns: int, size: int) -> Watched:
    """What the log of a run says, as long as its file does not change."""
    whole = runlog.readable(folder / "run.jsonl")
    if not whole or whole[0]["kind"] != "start":
        return Watched(folder, {}, "starting")
    machines = [e["machine"] for e in whole if e["kind"] in ("start", "resume") and "machine" in e]
    norms = [x for e in whole if e["kind"] == "validation" for x in e.get("grad_norm", ())]
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
        end.get("peak_memory_mib", 0), tuple(e["message"] for e in whole if e["kind"] == "guard"),
        curves.number(norms[-1]) if norms else math.nan, machine=machines[-1] if machines else ""
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
    state = seen.status
    if seen.since:
        word = "after" if seen.status == "killed" else "since"
        state += time.strftime(f" {word} %Y-%m-%d %H:%M:%S", time.localtime(seen.since))
    state += f": {seen.guards[-1]}" if seen.guards else ""
    return [
        name, f"{seen.step}/{seen.scheduled or '?'}", f"{seen.points[-1][1]:.4f}" if seen.points else "",
        f"{sum(train) / len(train):.4f}" if train else "",
        f"{seen.norm:.4g}" if math.isfinite(seen.norm) else "", rate, factor,
        f"{seen.memory_mib:,} MiB" if seen.memory_mib else planned_memory(seen.start), state
    ]


def planned_memory(start: dict) -> str:
    """The estimate of a run's memory that its first event holds, or ''."""
    told = start.get("memory")
    return f"about {told['mib']['total']:,} MiB" if told else ""


# ----- all runs ---------------------------------------------------------------------------------------------

def view(chosen: list[Path], width: int) -> "Group":
    """Table and chart of the runs, for rich, in so many columns.

    Where the terminal is narrow the labels of the runs are broken, and numbers and states are not. A column
    that is empty for all runs, like the memory on a CPU, is left out.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text
    seen = [look(folder) for folder in chosen]
    rows = [cells(one, f"{MARKS[i % len(MARKS)]} {name}")
            for i, (one, name) in enumerate(zip(seen, names(seen)))]
    shown = [i for i, head in enumerate(HEADS) if head == "run" or any(row[i] for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    wide = {HEADS[i]: max(map(len, [*HEADS[i].split(), *(row[i] for row in rows)])) for i in shown}
    room = width - sum(wide[head] for head in wide if head not in ("run", "state")) - 2 * len(wide)
    first = max(len(row[-1].split()[0]) for row in rows)  # word of a state, which a reason may follow
    if wide["run"] + wide["state"] > room:
        wide["run"] = max(len("run"), min(wide["run"], room // 2, room - first))
        wide["state"] = max(first, room - wide["run"])
    for head in wide:
        table.add_column(head.replace(" ", "\n"), width=wide[head], overflow="fold",
                         justify="left" if head in ("run", "state") else "right")
    for i, row in enumerate(rows):
        table.add_row(*(Text(row[column]) for column in shown), style=colour(i))
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
