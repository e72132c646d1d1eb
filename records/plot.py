"""`python -m records plot RUN...`: validation curves of runs as a PNG, with the published curve where it is comparable."""

import csv
import json
from pathlib import Path

import deltas
import environment
from settings import UserError


def read_summary(folder):
    path = Path(folder) / "summary.json"
    try:
        summary = json.loads(path.read_text())
        return summary, [(int(step), float(loss)) for step, loss in summary["curve"]]
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
    except ImportError as error:
        raise UserError(environment.without(error)) from None
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=140, layout="constrained")
    floor, ceiling = [], []
    for folder, summary, curve in runs:
        name = summary["preset"] or summary["record"]
        axes.plot(*zip(*curve), marker="o", markersize=3, label=f"{name} {summary['scale']} seed {summary['seed']}")
        floor.append(min(loss for _, loss in curve))
        ceiling.append(sorted(loss for _, loss in curve)[-2 if len(curve) > 3 else -1])
        if summary.get("target"):
            axes.axhline(summary["target"], color="0.5", linewidth=1, linestyle="--", label=f"target {summary['target']:g}")
        reference = deltas.find_record(summary["record"]).folder / "reference.csv"
        if summary["scale"] == "full" and reference.exists():
            with open(reference) as file:
                rows = [(float(r["step"]), float(r["val_loss"])) for r in csv.DictReader(file)]
            axes.plot(*zip(*rows), color="0.6", linewidth=1, label=f"{summary['record']} published")
    low, high = min(floor), max(ceiling)
    axes.set_ylim(low - 0.06 * (high - low + 0.1), high + 0.06 * (high - low + 0.1))
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    path = Path(out) if out else Path(folders[0]) / "curve.png"
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}") from None
    return path
