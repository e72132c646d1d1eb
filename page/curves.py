"""Curves of runs, read from their chained logs: finished, diverged, interrupted, and in progress.
No torch here."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runlog
from common import files
from common.errors import UserError

NAN = float("nan")


@dataclass(frozen=True)
class Curve:
    """A run's curve. Numbers that the log has not, or that are not finite, are nan.

    validations: (step, tokens, time_ms, val_loss) of each validation.
    train: (step, tokens, train_loss) of each step; the loss is that of the weights before the step's update.
    status: as in the log, `running` where the log has no end.
    """
    folder: Path
    start: dict
    validations: list
    train: list
    status: str
    scheduled: int

    @property
    def name(self) -> str:
        return self.start.get("preset") or self.start["record"]

    @property
    def last_step(self) -> int:
        return self.validations[-1][0]

    @property
    def last_finite(self) -> int | None:
        """The step of the last validation loss that is a number."""
        return next((step for step, *_, loss in reversed(self.validations) if math.isfinite(loss)), None)

    @property
    def last_trained(self) -> int | None:
        """The last step whose training or validation loss is a number."""
        trained = [step for step, _, loss in self.train if math.isfinite(loss)]
        return max([*trained, *([] if self.last_finite is None else [self.last_finite])], default=None)

    def state(self) -> str:
        """'' of a finished run, otherwise what became of it, in a few words."""
        if self.status == "finished":
            return ""
        if self.status == "diverged":
            return "diverged" if self.last_trained is None else f"diverged after step {self.last_trained}"
        return f"{self.status}, step {self.last_step} of {self.scheduled}"


def number(value: Any) -> float:
    """A number of a log as a float; nan for null and for what is not finite."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else NAN


def read(path: str | Path) -> Curve:
    """The curve of a run folder, or of its run.jsonl. UserError if it is none, or has no validation yet."""
    path = Path(path)
    log = path / "run.jsonl" if path.is_dir() or not path.name.endswith(".jsonl") else path
    if not log.exists():
        # not the whole tree below, which may be a home folder
        near = [pattern for pattern in ("*/run.jsonl", "*/*/run.jsonl") if path.is_dir()]
        below = [found for pattern in near for found in files.listed(path, pattern)][:1]
        remedy = f"one below it, like {below[0].parent}" if below else "a run folder such as runs/<date>_..."
        raise UserError(f"{path}: no run.jsonl here; name {remedy}")
    events = runlog.standing(runlog.read_chain(log))
    try:
        found = [e for e in events if e["kind"] == "validation"]
        points = [(int(e["step"]), *(number(e[key]) for key in ("tokens", "train_time_ms", "val_loss")))
                  for e in found]
        status = next((e["status"] for e in events if e["kind"] == "end"), "running")
        scheduled = max((int(e["scheduled_steps"]) for e in found), default=0)
        curve = Curve(log.parent, dict(events[0]), points, train_losses(found), status, scheduled)
        if events[0]["kind"] != "start" or not isinstance(curve.start["settings"], dict):
            raise KeyError("start")
        curve.start["record"], curve.start["scale"], curve.start["seed"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{log}: not the log of a run of this program ({error!r})") from None
    if not curve.validations:
        raise UserError(f"{log}: no validation yet: the run has just started, or ended before its clock did")
    return curve


def train_losses(validations: list[dict]) -> list[tuple[int, float, float]]:
    """(step, tokens, train_loss) of every step that the validation events tell of."""
    out = []
    for e in validations:
        first, losses = int(e["step"]) - len(e["train_loss"]), e["train_loss"]
        each = e["tokens"] / e["step"] if e["step"] else 0  # tokens of a step
        out += [(first + i, (first + i) * each, number(loss)) for i, loss in enumerate(losses)]
    return out


def took_turns(curves: list[Curve]) -> bool:
    """Were the runs made by one declared plan (compare, submit), in random order and one at a time?"""
    folders = {curve.folder.resolve().parent for curve in curves}
    declared = all(curve.start.get("registered") for curve in curves)
    return declared and len(folders) == 1 and (folders.pop().parent / "manifest.jsonl").exists()


# ----- labels -----------------------------------------------------------------------------------------------

def flat(values: dict, prefix: str = "") -> dict:
    """Dotted path -> leaf of nested settings, of any version of the vocabulary."""
    out = {}
    for name, value in values.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def labels(curves: list[Curve]) -> tuple[str, list[str]]:
    """(what all runs have in common, a label of each run from what differs).

    Told are record, scale, changes, settings and seed; other facts only where these do not tell the runs
    apart.
    """
    parts = [[] for _ in curves]
    common = []

    def tell(values: list[str], what: str = "") -> None:
        if len(set(values)) == 1:
            common.extend(f"{what}{v}" for v in values[:1] if v)
            return
        for own, value in zip(parts, values):
            own.extend([f"{what}{value}"] if value else [])

    tell([curve.name for curve in curves])
    tell([curve.start["scale"] for curve in curves])
    for lines in changed(curves):
        tell(lines)
    tell([str(curve.start["seed"]) for curve in curves], "seed ")
    for key in ("processes", "device", "torch", "code", "utc"):
        if len({tuple(own) for own in parts}) == len(curves):
            break
        values = [str(curve.start.get(key, ""))[:24] for curve in curves]
        if len(set(values)) > 1:
            tell(values, "" if key in ("device", "utc") else f"{key} ")
    names = [", ".join(own) for own in parts]
    doubled = {name for name in names if names.count(name) > 1}
    if len(curves) > 1:
        names = [f"{name or curve.name} ({curve.folder.name})" if name in doubled else name or "as it is"
                 for name, curve in zip(names, curves)]
    else:
        names = [", ".join(common)]
    return ", ".join(common), names


def changed(curves: list[Curve]) -> list[list[str]]:
    """Columns of label parts, one for each change or setting in which the runs differ (''
    where a run has none).

    The changes that were typed; where these are the same, and the record too, at most three values that
    differ.
    """
    every = list(dict.fromkeys(change for curve in curves for change in curve.start.get("changes", [])))
    typed = [[change * (change in curve.start.get("changes", [])) for curve in curves] for change in every]
    typed = [column for column in typed if len(set(column)) > 1]
    if typed or len({(curve.start["record"], curve.start["scale"]) for curve in curves}) > 1:
        return [[part.removeprefix("--set ") for part in column] for column in typed]
    tables = [flat(curve.start["settings"]) for curve in curves]
    every = dict.fromkeys(path for table in tables for path in table)
    paths = [path for path in every if len({repr(table.get(path)) for table in tables}) > 1]
    return [[f"{path} = {table.get(path)}" for table in tables] for path in paths[:3]]
