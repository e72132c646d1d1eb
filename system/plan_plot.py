"""`train_gpt.py RECORD --dry-run --plot FILE`: the schedules of a run as a picture.

torch and matplotlib are imported only when a picture is drawn.
"""

import io
from pathlib import Path
from typing import Any, NamedTuple

import schedule
from common import environment, files
from common.errors import UserError
from layers.specs import has_short_window
from schedule import Span, StepPlan
from settings import Settings
from settings.deltas import Resolved

FORMATS = (".png", ".svg")


class Panel(NamedTuple):
    """One axis of the picture: curves over the steps, by their labels. None: no value at this step."""
    title: str
    curves: dict[str, list[float | None]]
    logarithmic: bool = False


def panels(s: Settings, plans: list[StepPlan]) -> list[Panel]:
    """The panels of the picture, one for each kind of number in the step plans."""
    found = [Panel("learning rate", rates(s, plans), logarithmic=True)]
    if s.optim.muon is not None:
        found.append(Panel("Muon momentum", {"momentum": [plan.momentum for plan in plans]}))
    if plans[0].shape.windows is not None:
        found.append(Panel("attention window, tokens", windows(s, plans)))
    lengths = {"tokens a step": [plan.tokens for plan in plans],
               "tokens per row": [plan.shape.seq_len for plan in plans]}
    if s.data.max_doc_len is not None:
        lengths["longest document"] = [plan.shape.max_doc_len for plan in plans]
    found.append(Panel("tokens", lengths, logarithmic=True))
    return found


def rates(s: Settings, plans: list[StepPlan]) -> dict[str, list[float | None]]:
    """The learning rate of every parameter group of the run, at the steps that update it.

    Groups with equal rates share a curve.
    """
    from model import without_values
    from optim import Optimizer
    groups = {}
    for bank in Optimizer(without_values(s), s).banks:
        groups[bank.group] = s.optim.group(bank.role, bank.label).lr, bank.role
    curves = {}
    for name, (lr, role) in groups.items():
        curve = tuple(
            lr * plan.of_role(role).lr_factor if plan.due is None or name in plan.due else None
            for plan in plans
        )
        curves.setdefault(curve, []).append(name)
    return {", ".join(names): list(curve) for curve, names in curves.items()}


def windows(s: Settings, plans: list[StepPlan]) -> dict[str, list[float | None]]:
    """How many tokens the long and the short window show at most."""
    block = s.model.attn.window.block

    def size(span: Span) -> int:
        blocks = None if span.blocks is None else span.blocks * block
        return min(tokens for tokens in (span.tokens, blocks) if tokens is not None)

    found = {name: [size(getattr(plan.shape.windows, name)) for plan in plans] for name in ("long", "short")}
    return found if has_short_window(s) else {"all layers": found["long"]}


def check(picture: str) -> None:
    """UserError unless the picture can be drawn: its ending is a format, and matplotlib is there."""
    if Path(picture).suffix.lower() not in FORMATS:
        raise UserError(f"--plot {picture}: the ending says the format: {' or '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401  told before anything is printed
    except ImportError as error:
        raise UserError(environment.without(error)) from None


def draw(resolved: Resolved, picture: str) -> None:
    """Write the picture of a run's schedules."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    s, path = resolved.settings, Path(picture)
    plans = schedule.plan(s)
    drawn = panels(s, plans)
    figure, axes = plt.subplots(
        len(drawn), figsize=(7, 0.6 + 1.9 * len(drawn)), dpi=140, layout="constrained", sharex=True,
        squeeze=False
    )
    try:
        for ax, panel in zip(axes[:, 0], drawn):
            fill(ax, panel)
            for plan in plans:
                if "stage" in plan.events:
                    ax.axvline(plan.step, color="0.8", linewidth=1, zorder=0)
        axes[-1, 0].set_xlabel("step")
        figure.suptitle(f"{resolved.preset or resolved.record.ref} at scale {resolved.scale}", fontsize=9)
        image = io.BytesIO()
        figure.savefig(image, format=path.suffix[1:].lower())
    finally:
        plt.close(figure)
    files.write(path, image.getvalue(), remedy="free some space or choose another --plot")


def fill(ax: Any, panel: Panel) -> None:
    """Draw the curves of one panel, each value for the length of its step."""
    for label, values in panel.curves.items():
        points = [(step, value) for step, value in enumerate(values) if value is not None]
        ax.plot(*zip(*points), drawstyle="steps-post", linewidth=1.2, label=label)
    # a rate of zero, as at the end of most runs, has no logarithm: there the curve ends
    if panel.logarithmic and any(value for values in panel.curves.values() for value in values):
        ax.set_yscale("log")
    ax.set_title(panel.title, fontsize=8, loc="left")
    ax.tick_params(labelsize=7)
    if len(panel.curves) > 1:
        ax.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
