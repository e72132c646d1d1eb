"""What a sweep says: effects with simultaneous intervals, as table, CSV, PNG,
Markdown and the JSON kept as evidence.

Effect = arm - control in nats per token: the mean of the differences within seeds, or (a plan that is not
paired) the difference of the means. In an ablation the arm lacks the feature, so a positive effect means that
the feature helps; in a chain the control is the parent record, so a negative one means that the record helps.
Every row has its own error. What is promised of all rows together: in at most 1 - confidence of sweeps is any
of them resolved wrongly, and in at least `confidence` of them all intervals hold. A row whose interval
holds 0 is `unresolved (+-half width)` and has no rank.
"""

import csv
import io
from pathlib import Path
from typing import Any

import runlog
from common import files, untrusted
from common.errors import UserError
from evidence import statistics
from sweeps import optimizers, queue
from sweeps.plan import compared_with, is_inert, pairs_of

# by plan["paired"]: how rows are compared. Reports of before say dunnett, holm or (paired) holm, all with one
# pooled variance; `sweep.py report FILE.json` states them anew.
METHODS = {True: "within seeds", False: "means"}
RESTATED = ("Compared within seeds: the runs were planned before this method was chosen, by simulation "
            "(bench/results/intervals.md), to be stated with one pooled variance")
COLUMNS = ("rank", "arm", "changes", "record", "n", "mean", "sd", "effect", "low", "high", "p", "resolved",
           "sd_effect", "note")


# ----- from runs to effects ---------------------------------------------------------------------------------

def runs_of(plan: dict, arm: dict, done: dict[str, dict]) -> list[dict]:
    """The settled runs of an arm, by seed."""
    return [done[name] for seed in queue.seeds_of(plan, arm) if (name := queue.name_of(arm, seed)) in done]


def losses(runs: list[dict]) -> list[float]:
    """Final losses of the runs that finished."""
    return [r["val_loss"] for r in runs if r["status"] == "finished"]


def effects(plan: dict, done: dict[str, dict]) -> dict[str, Any]:
    """Analysis of the runs so far: {"pooled_sd", "df", "rows": {ml_hash: row}} of the pairs that have losses.

    Within seeds (plan["paired"]) only arms with a loss at every seed take part: a seed at which an arm
    diverged is no accident that the others could do without.
    """
    need = plan["seeds"] if plan["paired"] else 1
    pairs = [(a, b) for a, b in pairs_of(plan)
             if all(len(losses(runs_of(plan, x, done))) >= need for x in (a, b))]
    if not pairs:
        return {"pooled_sd": None, "df": 0, "rows": {}}
    arms = {x["ml_hash"]: {r["seed"]: r["val_loss"] for r in runs_of(plan, x, done)
                           if r["status"] == "finished"}
            for pair in pairs for x in pair[::-1]}
    named = [(a["ml_hash"], b["ml_hash"]) for a, b in pairs]
    return statistics.successive(arms, named, plan["confidence"], plan["paired"])


def typical_sd(found: dict, paired: bool) -> float | None:
    """The sd that the detectable effect is told for: median sd of the differences within seeds, or the sd
    within arms if arms are compared by their means. None without a spread."""
    if not paired:
        return found["pooled_sd"]
    spreads = sorted(row["sd"] for row in found["rows"].values() if row["sd"])
    return spreads[len(spreads) // 2] if spreads else None


def detectable(plan: dict, sd: float | None) -> float | None:
    """Minimal detectable effect at 80 % power of the planned runs by the plan's own procedure, or None
    without a spread. sd: as typical_sd."""
    n, n_control = plan["seeds"], plan["seeds"] if plan["paired"] else plan["controls"]
    try:
        return statistics.minimal_detectable_effect(
            sd, n, n_control, len(pairs_of(plan)), plan["confidence"], paired=plan["paired"]
        )
    except (UserError, TypeError):
        return None


def screen(plan: dict, done: dict[str, dict]) -> dict[str, Any]:
    """Which groups' members are worth runs of their own: {"kept": [group], "dropped": [group], "mde": ...}.

    A group is dropped if its interval holds 0 and lies within +-mde: all its members together are worth less
    than what the sweep could resolve for one of them. That takes for granted that members do not cancel, so
    the report names the groups. In simulations (3 to 8 groups of 4 to 8, 2 or 4 seeds, 8000 sweeps each) the
    final intervals, taken over groups and tested members together, missed anything in 3.4 to 4.8 % of sweeps
    at 95 %, and a group that held one effect of 0.8 mde was dropped in 2.3 %, one of 0.45 mde in 30 %.
    """
    found = effects(plan, done)
    mde = detectable(plan, typical_sd(found, plan["paired"]))
    out = {"kept": [], "dropped": [], "mde": mde}
    for arm in plan["arms"]:
        if arm["role"] == "group":
            row = found["rows"].get(arm["ml_hash"])
            complete = len(losses(runs_of(plan, arm, done))) == plan["seeds"]
            resolved = row and complete and mde and row["low"] is not None
            small = resolved and -mde < row["low"] <= 0 <= row["high"] < mde
            out["dropped" if small else "kept"].append(arm["group"])
    return out


# ----- rows -------------------------------------------------------------------------------------------------

def row_of(
    plan: dict, arm: dict, found: dict, done: dict[str, dict], failed: dict[str, dict],
    survivors: dict | None, first: dict[str, str]
) -> dict[str, Any]:
    """One row of the evidence; `first`: label of the first arm of each ml_hash."""
    other, same = compared_with(plan, arm), is_inert(plan, arm)
    parent, runs = other["label"], [] if same and plan["kind"] != "chain" else runs_of(plan, arm, done)
    values = losses(runs)
    about = statistics.describe(values) if values else {"n": 0, "mean": None, "sd": None}
    notes, effect = [], dict.fromkeys(("effect", "low", "high", "p", "sd_effect")) | {"resolved": False}
    if same:
        notes.append(f"inert at scale {plan['scale']}: computes the same as {parent}, not run")
    elif arm["role"] == "member" and survivors and arm["group"] in survivors["dropped"]:
        notes.append(
            f"not run apart: all of group {arm['group']} together is within +-{survivors['mde']:.4f}"
        )
    else:
        if first[arm["ml_hash"]] != arm["label"]:
            notes.append(f"computes the same as {first[arm['ml_hash']]}")
        if plan["kind"] != "chain" or first[arm["ml_hash"]] == arm["label"]:
            effect |= figures(found["rows"].get(arm["ml_hash"], {}))
    twin = {r["seed"]: r["val_loss"] for r in runs_of(plan, other, done)}
    if values and not same and all(r["val_loss"] == twin.get(r["seed"]) for r in runs):
        notes.append(f"to the last bit the losses of {parent} at the same seeds: no effect at all here")
    if arm["role"] == "group":
        dropped = survivors and arm["group"] in survivors["dropped"]
        notes.append("group" +
                     (", members not run apart" if dropped else ", members run apart" if survivors else ""))
    diverged = sum(r["status"] == "diverged" for r in runs)
    broken = [
        failed[name] for seed in queue.seeds_of(plan, arm) if (name := queue.name_of(arm, seed)) in failed
    ]
    if diverged:
        notes.append(f"{diverged} of {len(runs)} diverged and are not in the mean")
    if broken:
        notes.append(f"{len(broken)} failed ({broken[0]['reason']})")
    if effect["effect"] is not None and effect["low"] is None:
        notes.append("no interval: " + ("one run each" if about["n"] == 1 else "the runs show no spread"))
    if plan["paired"] and effect["effect"] is None and not same and (
            len(values) < plan["seeds"]) and (values or not notes):
        notes.append("paired effects need every seed")
    return {
        "arm": arm["label"], "changes": arm["changes"],
        "record": arm["record"] if plan["kind"] == "chain" else None,
        **({"parent": parent} if plan["kind"] == "chain" else {}), "n": about["n"], "mean": about["mean"],
        "sd": about["sd"], **effect, "note": "; ".join(notes), "runs": brief(runs)
    }


def figures(row: dict) -> dict[str, Any]:
    """What a row of the report takes from a row of the statistics. sd_effect: sd of the differences within
    seeds."""
    return {k: row[k] for k in ("effect", "low", "high", "p", "resolved") if k in row} | (
        {"sd_effect": row["sd"]} if row else {})


def brief(runs: list[dict]) -> list[dict[str, Any]]:
    """What the report's JSON keeps of each run."""
    return [{k: r[k] for k in ("seed", "val_loss", "train_time_ms", "ml_hash", "last_hash")} |
            ({} if r["status"] == "finished" else {"status": r["status"]}) for r in runs]


def collect(root: Path | str) -> tuple[dict, dict[str, dict], dict[str, dict], dict | None]:
    """(plan, done, failed, survivors). Every run folder is read again and must be the run that was
    recorded."""
    plan, (done, failed) = queue.load_plan(root), queue.settled(root)
    queue.verified(root, plan, done)
    if "method" not in plan:  # a queue of before
        plan |= {"paired": True, "restated": RESTATED}
    return plan, done, failed, queue.survivors(root)


def evidence(
    plan: dict, done: dict[str, dict], failed: dict[str, dict], survivors: dict | None, name: str
) -> dict[str, Any]:
    """The sweep as a dict (evidence/results/<name>.json)."""
    found, first = effects(plan, done), {}
    for arm in plan["arms"]:
        first.setdefault(arm["ml_hash"], arm["label"])
    control, runs = plan["arms"][0], list(done.values())
    rows = [row_of(plan, arm, found, done, failed, survivors, first) for arm in plan["arms"][1:]]
    todo = queue.targets(plan, survivors)
    settled = sum(t in done or t in failed for t, _, _ in todo)

    def distinct(key):
        return sorted({r[key] for r in runs})

    own = runs_of(plan, control, done)
    values = losses(own)
    about = statistics.describe(values) if values else {"n": 0, "mean": None, "sd": None}
    return {
        "version": 1, "kind": plan["kind"], "name": name, "base": plan["base"], "scale": plan["scale"],
        "common": plan["common"], "confidence": plan["confidence"], "paired": plan["paired"],
        "method": METHODS[plan["paired"]], "pooled_sd": found["pooled_sd"], "df": found["df"],
        "typical_sd": typical_sd(found, plan["paired"]),
        "mde": detectable(plan, typical_sd(found, plan["paired"])),
        "seeds": plan["seeds"], "complete": settled == len(todo)
        and not (plan["groups"] and survivors is None), "hardware": ", ".join(distinct("device")),
        "cpu": ", ".join(distinct("cpu")), "machines": len(distinct("machine")), "torch": ", ".join(
            distinct("torch")), "code": distinct("code"), "numerics_version": plan["numerics_version"],
        **plan["digests"][control["ml_hash"]], "runs": len(runs),
        "adopted": sum("adopted_from" in r for r in runs), "failed": len(failed), "control": {
            "arm": control["label"], "n": about["n"], "mean": about["mean"], "sd": about["sd"],
            "runs": brief(own)
        }, "screening": survivors, "skipped": plan["skipped"], "rows": rows,
        **({"restated": plan["restated"]} if "restated" in plan else {})
    }


def ranked(found: dict) -> list[tuple[int | None, dict]]:
    """[(rank or None, row)]: resolved rows from the most helpful down, then the others;
    all of a chain in its order."""
    rows, sign = found["rows"], -1 if found["kind"] == "ablate" else 1
    resolved = sorted((r for r in rows if r["resolved"]), key=lambda r: sign * r["effect"])
    out = [*enumerate(resolved, 1), *((None, r) for r in rows if not r["resolved"])]
    return sorted(out, key=lambda pair: rows.index(pair[1])) if found["kind"] == "chain" else out


def effect_text(row: dict) -> str:
    """'+0.0123 [+0.0040, +0.0206]', 'unresolved (+-0.0083)', or '-' where nothing was measured."""
    if row["effect"] is None:
        return "-"
    if row["low"] is None:
        return f"{row['effect']:+.4f} (no interval)"
    if row["low"] == row["high"] == 0:
        return "0 in every seed"
    if not row["resolved"]:
        return f"unresolved (+-{(row['high'] - row['low']) / 2:.4f})"
    return f"{row['effect']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"


# ----- output -----------------------------------------------------------------------------------------------

def number(value: float | None, digits: int = 4) -> str:
    """A number with some digits, or nothing for None."""
    return "" if value is None else f"{value:.{digits}f}"


def headline(found: dict) -> str:
    """Two sentences: what was run where, and how to read the numbers."""
    what = {
        "ablate": "each feature off in turn; a positive effect means that the feature helps",
        "axis": "settings against the record's own; a negative effect means a lower loss",
        "chain": "each record against its parent; a negative effect means that the record helps",
        "tune": "rules with each learning rate of the grid, on one seed; no evidence about a rule",
        "optimizers": "rules with the best of their learning rates, on seeds that did not choose it; a "
                      "negative effect means a lower loss than the baseline's"
    }[found["kind"]]
    level = 100 * found["confidence"]
    intervals = (
        ("differences within seeds" if found["paired"] else "differences of means")
        + f", each row with its own error; at least {level:.3g} % of such sweeps have no wrongly resolved "
        "row and no interval that misses (Bonferroni)"
    )
    spread = (f"sd within arms {found['pooled_sd']:.4f} ({found['df']} df)"
              if found["pooled_sd"] else "no spread known")
    if found["paired"] and found["typical_sd"]:
        spread += f", median sd of differences {found['typical_sd']:.4f}"
    mde = f", detectable effect at this sd {found['mde']:.4f} at 80 % power" if found["mde"] else ""
    common = f" ({' '.join(found['common'])})" if found["common"] else ""
    interim = "INCOMPLETE, intervals are interim and hold only for the complete sweep. "
    part = "" if found["complete"] else interim
    control = found["control"]
    mean = f", mean {number(control['mean'])}" if control["n"] else ""
    return (f"{part}{found['base']}{common} at scale {found['scale']}: {what}. {found['runs']} runs on "
            f"{found['hardware']}{' (' + found['cpu'] + ')' if found['cpu'] else ''}; control n = "
            f"{control['n']}{mean}; {intervals}; {spread}{mde}."
            + (f" {found['restated']}." if found.get("restated") else ""))


def table(found: dict) -> list[tuple[str, ...]]:
    """[(rank, arm, n, mean, effect, note)] as text."""
    return [("" if rank is None else str(rank), row["arm"], str(row["n"]), number(row["mean"]),
             effect_text(row), row["note"]) for rank, row in ranked(found)]


def print_table(found: dict, title: str | None = None) -> None:
    """The table on a terminal or a pipe."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    t = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name, justify in (("#", "right"), ("arm", "left"), ("n", "right"), ("mean", "right"),
                          ("effect", "left"), ("note", "left")):
        t.add_column(name, justify=justify, overflow="fold")
    for cells in table(found):
        t.add_row(*(c.replace("[", r"\[") for c in cells))
    console.print(headline(found), markup=False)
    console.print(t)


def markdown(found: dict) -> str:
    """The report as Markdown."""
    lines = [f"# {found['name']}", "", headline(found), "",
             "| # | arm | n | mean | effect | note |", "|--:|---|--:|--:|---|---|"]
    lines += ["| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |" for cells in table(found)]
    if "rules" in found:
        lines += ["", "| " + " | ".join(optimizers.HEAD) + " |", "|" + "---|" * len(optimizers.HEAD)]
        lines += ["| " + " | ".join(row) + " |" for row in optimizers.table(found, effect_text)]
    if found["skipped"]:
        lines += [
            "", "Not switched off:", "", *(f"- `{s['feature']}`: {s['reason']}" for s in found["skipped"])
        ]
    lines += [
        "",
        f"Code {', '.join(c[:12] + c[40:] for c in found['code'])}; torch {found['torch']}; numerics version "
        f"{found['numerics_version']}."
    ]
    return "\n".join(lines) + "\n"


def write(found: dict, base: Path | str) -> list[Path]:
    """base.json, .csv, .md and .png. Returns the paths."""
    base = Path(base)
    paths = {ext: base.with_name(f"{base.name}.{ext}") for ext in ("json", "csv", "md", "png")}
    rows = io.StringIO(newline="")
    out = csv.DictWriter(rows, COLUMNS, extrasaction="ignore", lineterminator="\n")
    out.writeheader()
    for rank, row in ranked(found):
        out.writerow(row | {"rank": rank, "changes": " ".join(row["changes"])})
    contents = {
        "json": files.json_text(found, indent=1) + "\n", "csv": rows.getvalue(), "md": markdown(found),
        "png": draw(found)
    }
    for ext, content in contents.items():
        files.write(paths[ext], content, remedy="free some space or choose another --out", parents=True)
    return list(paths.values())


def draw(found: dict) -> bytes:
    """Forest plot as PNG bytes: effect and interval of every measured row. Resolved ones are filled, and blue
    where they help."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [row for _, row in ranked(found) if row["effect"] is not None]
    helps = 1 if found["kind"] == "ablate" else -1  # the sign of an effect in favour of what was tried
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.26 * max(3, len(rows))), dpi=140, layout="constrained")
    for y, row in enumerate(reversed(rows)):
        colour = "0.6" if not row["resolved"] else ("C0" if helps * row["effect"] > 0 else "C3")
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(row["effect"], y, "o", color=colour, markersize=5,
                  markerfacecolor=colour if row["resolved"] else "white")
    axes.axvline(0, color="0.3", linewidth=1)
    if found["mde"]:
        axes.axvspan(-found["mde"], found["mde"], color="0.93", zorder=0, linewidth=0)
    axes.set_yticks(range(len(rows)), [row["arm"] for row in reversed(rows)], fontsize=8)
    axes.set_xlabel("effect on the validation loss, nats per token (blue: helps; red: hurts; grey band: too "
                    "small to detect reliably)", fontsize=8)
    axes.set_title(f"{found['kind']} {found['base']} at {found['scale']}, intervals that hold together at "
                   f"{100 * found['confidence']:.3g} %"
                   + ("" if found["complete"] else ", incomplete"), fontsize=9)
    axes.grid(axis="x", alpha=0.25)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    plt.close(figure)
    return image.getvalue()


def report(root: Path | str, out: str | None = None) -> tuple[dict[str, Any], list[Path]]:
    """Write the report of a queue folder, or state a written one anew; returns (evidence, paths)."""
    if Path(root).is_file():
        return restate(Path(root), out)
    plan, done, failed, survivors = collect(root)
    if not done:
        raise UserError(f"{root}: no run has finished yet; `python sweep.py work {root}` goes on")
    base = Path(out) if out else Path(plan["name"])
    base = base.with_suffix("") if base.suffix in (".json", ".csv", ".md", ".png") else base
    base = base if base.parent != Path(".") or (out and out.startswith("./")) else Path(root) / base
    found = evidence(plan, done, failed, survivors, base.name)
    if plan["kind"] == "optimizers":
        found["rules"] = optimizers.rows(root, plan, done)
    return found, write(found, base)


# ----- reports that are written already ---------------------------------------------------------------------

def finished(row: dict) -> dict[int, float]:
    """{seed: final loss} of a written row; a diverged run has none."""
    return {r["seed"]: r["val_loss"] for r in row["runs"] if r.get("status", "finished") == "finished"}


def key_of(row: dict) -> str:
    """What an arm's runs computed: arms of equal settings are one arm to the statistics."""
    return row["runs"][0]["ml_hash"] if row["runs"] else row["arm"]


def recomputed(sweep: dict) -> dict[str, Any] | None:
    """statistics.successive of a written report, from the losses in it; None if it compares nothing.

    Rows are those that it has an effect for, by key_of."""
    by_label = {row["arm"]: row for row in (sweep["control"], *sweep["rows"])}
    measured = [row for row in sweep["rows"] if row["effect"] is not None]
    pairs = {key_of(row): key_of(by_label[row.get("parent") or sweep["control"]["arm"]]) for row in measured}
    losses = {key: finished(row) for row in reversed(by_label.values())
              if (key := key_of(row)) in {*pairs, *pairs.values()} and finished(row)}
    return statistics.successive(losses, pairs.items(), sweep["confidence"],
                                  bool(sweep.get("paired"))) if pairs else None


def restate(path: Path, out: Path | str | None = None) -> tuple[dict[str, Any], list[Path]]:
    """A written report with its effects computed anew from the losses in it; (evidence, paths).

    A report of before is compared within seeds, as every sweep shares them; it then says that this was chosen
    after its runs."""
    found = queue.read_json(path, "name the .json of a report")
    kinds = ("ablate", "chain", "axis", "optimizers")
    if not isinstance(found, dict) or found.get("kind") not in kinds or not isinstance(
            found.get("rows"), list):
        raise UserError(f"{path}: not the report of a sweep; name the .json that `sweep.py report` wrote")
    if found.get("method") not in METHODS.values():
        found |= {"paired": True, "restated": RESTATED}
    new = recomputed(found)
    if new is None:
        raise UserError(f"{path}: it compares nothing")
    spread, paired = typical_sd(new, found["paired"]), found["paired"]
    if found["complete"] and spread:
        n_control = found["seeds"] if paired else found["control"]["n"]
        mde = statistics.minimal_detectable_effect(
            spread, found["seeds"], n_control, len(new["rows"]), found["confidence"], paired=paired)
    found |= {"method": METHODS[paired], "pooled_sd": new["pooled_sd"], "df": new["df"],
              "typical_sd": spread, "mde": mde if found["complete"] and spread else None}
    for row in found["rows"]:
        if row["effect"] is not None:
            row |= figures(new["rows"][key_of(row)])
            notes = [x for x in row["note"].split("; ") if "times the pooled one" not in x]
            row["note"] = "; ".join(x for x in notes if x != "its own interval is wider")
        else:
            row["sd_effect"] = None
    base = Path(out) if out else path
    return found, write(found, base.with_suffix("") if base.suffix == ".json" else base)


# ----- what earlier runs tell about the next ones -----------------------------------------------------------

def earlier_sd(plan: dict, folder: Path | str | None = None) -> tuple[float, int, list[str]] | None:
    """(sd, number behind it, names) of the committed sweeps at the plan's scale, with the same changes to all
    arms; None without any.

    The sd is typical_sd's. Of a paired plan it is the median over their comparisons, and the number is that
    of the comparisons; otherwise the pooled one with its degrees of freedom.
    """
    folder, spreads, squares, df, names = folder or runlog.ROOT / "evidence/results", [], 0.0, 0, []
    for path in files.listed(folder, "*.json"):
        try:
            sweep = untrusted.json_file(path)
            # of any numerics version: roundings do not change the spread
            same = all(sweep[key] == plan[key] for key in ("version", "scale", "common"))
            if same and sweep["kind"] in ("ablate", "axis", "chain") and sweep["pooled_sd"] and sweep["df"]:
                spreads += [row["sd_effect"] for row in sweep["rows"] if row.get("sd_effect")]
                squares, df = squares + sweep["pooled_sd"] ** 2 * sweep["df"], df + sweep["df"]
                names.append(path.name)
        except (UserError, KeyError, TypeError):
            continue  # other evidence
    if plan["paired"]:
        return (sorted(spreads)[len(spreads) // 2], len(spreads), names) if spreads else None
    return ((squares / df) ** 0.5, df, names) if df else None
