"""Text logs of the speedrun: validation lines in, curve and final loss out.

    step:1750/1770 val_loss:3.2801 train_time:170234ms step_avg:97.28ms

is printed by upstream's scripts since 2024-10, by this trainer and by whatever enters a comparison as
`script:`. Times in seconds (track 3 upstream) and the older `s:9536 tel:3.275959` of llm.c, without times,
are read too. Other lines (the program, the environment, training losses) are left alone. No torch here.
"""

import hashlib
import math
import re
from pathlib import Path

from common import untrusted
from common.errors import UserError

NUMBER = r"([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf))"
LINE = re.compile(rf"^step:(\d{{1,12}})/(\d{{1,12}}) val_loss:{NUMBER} (?:\S+ )*?train_time:{NUMBER}(ms|s)\b",
                  re.M | re.I)
CUT = re.compile(r"^step:\d+/\d+ val_loss:\S*[^\n]*\Z", re.M)  # a last line without its end
LLMC = re.compile(rf"^s:(\d{{1,12}}) tel:{NUMBER}\s*$", re.M | re.I)
SHAPE = "step:N/M val_loss:L train_time:Tms step_avg:Sms"


def parse(text: str, name: str = "log") -> dict:
    """The one run of a log: {curve, val_loss, train_time_ms, steps, scheduled_steps, complete, diverged}.

    curve: [[step, val_loss (nats per token), train_time_ms or None]]. steps: the last validated step, at
    which val_loss and train_time_ms were measured. scheduled_steps: M, None where the log does not say.
    complete: the last validation is that of step M, so val_loss is the run's result; if not, the log was cut
    short. diverged: a loss is not finite. UserError (`name` names the log) if it has no validation, more than
    one run, or numbers that no clock can give.
    """
    runs = parse_all(text, name)
    if len(runs) > 1:
        raise UserError(
            f"{name}: holds {len(runs)} runs, one after the other: split it, one file for each run")
    return runs[0]


def parse_all(text: str, name: str = "log") -> list[dict]:
    """Every run of a log in which several follow each other (a new one begins where the step goes back)."""
    points = [(int(step), int(scheduled), float(loss), float(time) * (1000 if unit.lower() == "s" else 1))
              for step, scheduled, loss, time, unit in LINE.findall(text)]
    if not points:
        points = [(int(step), None, float(loss), None) for step, loss in LLMC.findall(text)]
    if not points:
        cut = " (its only one is cut short)" if CUT.search(text) else ""
        raise UserError(f"{name}: no line like `{SHAPE}`{cut}")
    runs = [[points[0]]]
    for before, point in zip(points, points[1:]):
        if point == before:  # printed twice: on screen and to the log
            continue
        if point[0] < before[0] or (point[0] == 0 and before[0] == 0):
            runs.append([])
        runs[-1].append(point)
    return [summary(run, name) for run in runs]


def summary(points: list[tuple[int, int | None, float, float | None]], name: str) -> dict:
    """One run's dict from its (step, scheduled, loss, ms), checked."""
    step, scheduled, loss, ms = points[-1]
    for before, point in zip(points, points[1:]):
        if point[1] != scheduled or before[1] != scheduled:
            raise UserError(f"{name}: the number of steps changes from {before[1]} to {point[1]} at step "
                            f"{point[0]}: lines of different runs are mixed")
        if point[0] == before[0]:
            raise UserError(f"{name}: step {point[0]} has two validation losses, {before[2]} and {point[2]}")
        if ms is not None and point[3] < before[3]:
            raise UserError(
                f"{name}: train_time goes back from {before[3]:.0f} to {point[3]:.0f} ms at step {point[0]}")
    for at, _, _, time in points:
        if time is not None and not (0 <= time < math.inf):
            raise UserError(f"{name}: train_time is {time:g} ms at step {at}: a clock cannot show that")
    if scheduled is not None and step > scheduled:
        raise UserError(f"{name}: step {step} of {scheduled}: more steps than the run has")
    return {
        "curve": [[s, x, t] for s, _, x, t in points], "val_loss": loss, "train_time_ms": ms, "steps": step,
        "scheduled_steps": scheduled, "complete": scheduled is None or step == scheduled,
        "diverged": not all(math.isfinite(x) for _, _, x, _ in points)
    }


def read(path: Path) -> tuple[dict, str]:
    """(parse of a file, sha256 of its bytes)."""
    data = untrusted.bytes_of(path)
    return parse(data.decode("utf-8", errors="replace"), str(path)), hashlib.sha256(data).hexdigest()
