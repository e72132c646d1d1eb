"""`python -m records plot RUN...`: curves of runs as a picture,
with the published curve where it compares."""

import io
import math
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from common import environment, files
from common.arguments import Parser
from common.errors import UserError
from page import curves
from runlog import covers_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = ("steps", "tokens", "time")
UNITS = {"steps": (1, "step"), "tokens": (1, "tokens"), "time": (1000, "training time, s")}
SMOOTHED = 40  # the running mean of the training loss takes a 40th of the run's steps,
SHORTEST = 5  # and at least five
BUSY = "The runs did not take turns (records compare): their times also measure what else the machine did."
FORMATS = (".png", ".svg", ".pdf")


def arguments(p: Parser) -> None:
    """Options of `records plot`."""
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders, finished or not")
    p.add_argument("--x", choices=AXES, default="steps", help="axis (default steps)")
    p.add_argument("--train", action="store_true",
                   help="training loss too: each step faint, and its running mean")
    p.add_argument(
        "--out", metavar="FILE",
        help="picture to write, by its ending .png, .svg or .pdf (default curve.png in the first folder)"
    )


def run(options: Namespace) -> None:
    """`records plot`: draw the loss curves of runs."""
    print(f"plot: {plot(options.runs, options.out, options.x, options.train)}")


def plot(folders: list, out: str | Path | None = None, x: str = "steps",
         train: bool = False) -> Path:
    """Draw the curves, and print what the picture does not show whole. Returns its path (see --out)."""
    found = [curves.read(folder) for folder in folders]
    path = Path(out) if out else found[0].folder / "curve.png"
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--out {path}: the ending says the format: {', '.join(FORMATS)}")
    common, names = curves.labels(found)
    lines = [Line(curve, name, x) for curve, name in zip(found, names)]
    notes = [f"{line.name}: {line.note()}" for line in lines if line.state]
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError(environment.without(error)) from None
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=140, layout="constrained")
    try:
        draw(axes, lines, x, train)
        caption = [BUSY] if x == "time" and len(found) > 1 and not curves.took_turns(found) else []
        if train and any(not covers_all(curve.start) for curve in found):
            caption.append(
                "Training losses of several processes are those of process 0 in logs of version 2."
            )
        axes.set_title(common if len(found) > 1 else "", fontsize=9)
        if caption:
            figure.supxlabel("\n".join(caption), fontsize=7)
        image = io.BytesIO()
        figure.savefig(image, format=path.suffix[1:].lower())
    finally:
        plt.close(figure)
    files.write(path, image.getvalue())
    print("".join(f"{line}\n" for line in [*notes, *caption]), end="")
    return path


class Line:
    """What is drawn of one run, as far as it is finite, in the unit of the axis.

    points: (x, val_loss) of each validation. train: (x, train_loss) of each step.
    """

    def __init__(self, curve: curves.Curve, name: str, x: str) -> None:
        self.curve, self.name, self.state = curve, name, curve.state()
        self.label = name + (f" ({self.state})" if self.state else "")
        scale, column = UNITS[x][0], AXES.index(x)
        self.points = [(v[column] / scale, v[3]) for v in curve.validations
                       if math.isfinite(v[3]) and math.isfinite(v[column])]
        # training losses have no times of their own: they are spread evenly between two validations
        at = [v[0] for v in curve.validations]
        there = [v[column] / scale for v in curve.validations]
        self.train = [(interpolated(step, at, there), loss) for step, _, loss in curve.train
                      if math.isfinite(loss)]

    def note(self) -> str:
        """What became of a run that did not finish, and how far it is drawn."""
        if self.curve.status != "diverged":
            return self.state
        return "this run diverged; " + (
            f"its curve ends at step {self.curve.last_finite}, the last loss that is a number"
            if self.points else "none of its losses is a number, and it has no curve")

    def smooth(self) -> list[tuple[float, float]]:
        """The running mean of the training loss over the last steps."""
        span = max(SHORTEST, len(self.train) // SMOOTHED)
        losses = [loss for _, loss in self.train]
        return [(x, sum(losses[max(0, i + 1 - span):i + 1]) / min(span, i + 1))
                for i, (x, _) in enumerate(self.train)]


def interpolated(step: int, steps: list[int], values: list[float]) -> float:
    """The value at a step, on the straight line between the two validations around it."""
    for (s0, v0), (s1, v1) in zip(zip(steps, values), zip(steps[1:], values[1:])):
        if s0 <= step <= s1:
            return v0 + (v1 - v0) * (step - s0) / (s1 - s0)
    return values[-1]


def draw(axes: "Axes", lines: list[Line], x: str, train: bool) -> None:
    """All lines, targets and published curves, and limits that leave the first, highest points out."""
    low, high = [], []
    for line in lines:
        at, losses = [x for x, _ in line.points], [loss for _, loss in line.points]
        colour = axes.plot(at, losses, marker="o", markersize=3, label=line.label)[0].get_color()
        if not losses:  # only its name is there
            continue
        if line.curve.status == "diverged":
            axes.plot(at[-1], losses[-1], marker="x", markersize=9, color=colour)
        low.append(min(losses))
        high.append(sorted(losses)[-2 if len(losses) > 3 else -1])
        if train and line.train:
            axes.plot(*zip(*line.train), color=colour, alpha=0.25, linewidth=0.7)
            smooth = line.smooth()
            axes.plot(*zip(*smooth), color=colour, linewidth=1, linestyle=":",
                      label="training" if len(lines) == 1 else None)
            low.append(min(loss for _, loss in smooth))
    for target in sorted({t for line in lines if (t := target_of(line.curve))}):
        axes.axhline(target, color="0.5", linewidth=1, linestyle="--", label=f"target {target:g}")
    full = [line.curve.start["record"] for line in lines if line.curve.start["scale"] == "full"]
    for ref in dict.fromkeys(full):
        if points := published(ref, x):
            axes.plot(*zip(*points), color="0.6", linewidth=1, label=f"{ref} published")
    if low:
        margin = 0.06 * (max(high) - min(low) + 0.1)
        axes.set_ylim(min(low) - margin, max(high) + margin)
    axes.set_xlabel(UNITS[x][1])
    axes.set_ylabel("loss, nats per token" if train else "validation loss, nats per token")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8 if len(lines) < 8 else 6)


def target_of(curve: curves.Curve) -> float | None:
    """The loss that a run is to reach."""
    return curves.flat(curve.start["settings"]).get("validation.target")


def published(ref: str, x: str) -> list[tuple[float, float]]:
    """The published curve of a record on an axis, as far as its log has the values.

    Empty for time, which is that of the authors' machine.
    """
    from page.sections import reference_curve
    from settings import deltas
    record = deltas.load_records().get(ref)
    found = reference_curve(record) if record and x != "time" else None
    column = AXES.index(x)
    return [(p[column], p[3]) for p in found["points"] if p[column] is not None] if found else []
