"""`python -m records plot RUN...`: validation curves of runs as a PNG, with the published curve where it is comparable."""

import csv
import io
import json
import math
from pathlib import Path

import deltas
import files
from settings import UserError


def read_summary(folder):
    path = Path(folder) / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return summary, [(int(step), math.nan if loss is None else float(loss)) for step, loss in summary["curve"]]
    except FileNotFoundError:
        raise UserError(f"{folder}: no summary.json here; name a run folder such as runs/<date>_...") from None
    except (OSError, KeyError, ValueError, TypeError):
        raise UserError(f"{path}: not a complete run summary") from None


def arguments(p):
    p.add_argument("runs", nargs="+", help="run folders")
    p.add_argument("--out", help="PNG to write (default curve.png in the first folder)")


def run(options):
    print(f"plot: {plot(options.runs, options.out)}")


def plot(folders, out=None):
    """Draw the curves and return the path of the PNG (default: curve.png in the first folder)."""
    runs = [(folder, *read_summary(folder)) for folder in folders]
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("plots need matplotlib: `pip install matplotlib` (run.sh and test.sh install it)") from None
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=140, layout="constrained")
    floor, ceiling = [], []
    for folder, summary, curve in runs:
        name, end = summary["preset"] or summary["record"], ""
        finite = [(step, loss) for step, loss in curve if math.isfinite(loss)]
        if summary.get("status") == "diverged" or len(finite) < len(curve):
            end = f", diverged after {summary.get('steps', curve[-1][0])} steps"
            print(f"{folder}: this run diverged; its curve ends at the last loss that is a number")
        axes.plot([step for step, _ in finite], [loss for _, loss in finite], marker="o", markersize=3,
                  label=f"{name} {summary['scale']} seed {summary['seed']}{end}")
        losses = sorted(loss for _, loss in finite)
        floor += losses[:1]
        ceiling += losses[-2:-1] if len(losses) > 3 else losses[-1:]
        if summary.get("target"):
            axes.axhline(summary["target"], color="0.5", linewidth=1, linestyle="--", label=f"target {summary['target']:g}")
        reference = deltas.find_record(summary["record"]).folder / "reference.csv"
        if summary["scale"] == "full" and reference.exists():
            with open(reference, encoding="utf-8") as file:
                rows = [(float(r["step"]), float(r["val_loss"])) for r in csv.DictReader(file)]
            axes.plot(*zip(*rows), color="0.6", linewidth=1, label=f"{summary['record']} published")
    low, high = min(floor, default=0.0), max(ceiling, default=0.0)  # nothing but NaN: empty axes, and the labels say why
    axes.set_ylim(low - 0.06 * (high - low + 0.1), high + 0.06 * (high - low + 0.1))
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    path, image = Path(out) if out else Path(folders[0]) / "curve.png", io.BytesIO()
    try:
        figure.savefig(image, format=path.suffix[1:] or "png")
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    plt.close(figure)
    files.write(path, image.getbuffer())
    return path
