"""The table of predictions: does an effect at a small scale have the sign and the rank of the published one?

    python sweep.py predictions                               # every committed chain and ablation
    python sweep.py predictions evidence/results/chain_1-33_micro.json --markdown
    python sweep.py predictions --json FILE                   # for programs

Published effects are stated in tokens (a record needs fewer than its parent), steps, seconds or nats. All are
turned into nats at equal tokens, negative is better, by the local slope of the final loss against log tokens:

    effect = (loss - parent's loss) - SLOPE ln(tokens / parent's tokens)          SLOPE = d loss / d ln tokens

All records end near one loss, 3.28, where the slope of a power law changes little from record to record. It
is the mean of four published pairs (SLOPES), its error their standard deviation; a published mean loss has
the usual sd of one run over sqrt(runs). Both errors are carried. A record of equal tokens that changes
systems or timing only predicts no loss: `speed only`, as do effects in seconds.

Measured effects are those of a sweep's report, with its simultaneous intervals; of an ablation with the sign
turned, so that both say what adding the feature does. The committed runs of the records at tiny are a chain
too, of one run each and so without intervals. Signs are compared over all rows that have both effects, also
the unresolved, over those whose published effect is told apart from 0, and over those where both are
(Wilson's interval, JASA 1927); ranks over all rows by Spearman's rho (Fisher's interval).
"""

import argparse
import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from common import files, lines
from common.errors import UserError
from evidence import statistics
from settings import deltas, renames

ROOT = Path(__file__).parent.parent
PUBLISHED, RESULTS = ROOT / "evidence/published", ROOT / "evidence/results"
USUAL_SD = 0.00124  # nats: of one published run's final loss, the median over 65 record folders
# (where, nats, steps, of a run of so many steps): two lengths of one run, or an author's "x nats or y steps"
SLOPES = (
    ("optimizer/12 at 3150 and 3350 steps", 0.0091, 200, 3350), ("short/20", 0.0014, 10, 1393),
    ("short/21", 0.0015, 10, 1770), ("short/33", 0.001, 10, 1660),
)
SPEED_ONLY = "speed only"
Z = 1.96  # of a 95 % interval


def slope() -> tuple[float, float]:
    """(d loss / d ln tokens, its standard error) of SLOPES."""
    about = statistics.describe([nats / math.log(1 - saved / steps) for _, nats, saved, steps in SLOPES])
    return about["mean"], about["sd"]


# ----- what is published ------------------------------------------------------------------------------------

def read(name: str) -> list[dict]:
    """Rows of a file of evidence/published."""
    with open(PUBLISHED / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def of_tokens(tokens: float, before: float, slope_: tuple[float, float]) -> tuple[float, float]:
    """(effect, standard error) in nats of needing `tokens` instead of `before` for one loss."""
    log = math.log(tokens / before)
    return -slope_[0] * log, slope_[1] * abs(log)


def of_record(child: dict, parent: dict | None, slope_: tuple[float, float]) -> dict:
    """Published effect of a record against its parent: {effect, se, why}; effect None where there is none.

    child, parent: rows of history.csv, None if that does not know it."""
    none, needs = {"effect": None, "se": None}, ("tokens", "val_loss")
    if parent is None or not all(row[k] for row in (child, parent) for k in needs):
        return none | {"why": "nothing published to compare"}
    tokens = [float(row["tokens"]) for row in (child, parent)]
    if tokens[0] == tokens[1] and child["kind"] in ("systems", "retiming"):
        return none | {"why": SPEED_ONLY}
    effect, se = of_tokens(*tokens, slope_)
    # a record without a log has one unseen run
    noise = sum(USUAL_SD ** 2 / max(1, float(row["runs"] or 1)) for row in (child, parent))
    return {"effect": effect + float(child["val_loss"]) - float(parent["val_loss"]),
            "se": math.hypot(se, math.sqrt(noise)), "why": ""}


def of_feature(row: dict, steps: float, slope_: tuple[float, float]) -> dict:
    """{effect, se, why} of a feature: a row of effects.csv, in a record of so many steps."""
    size = float(row["effect"])
    if row["measure"] == "seconds":
        return {"effect": None, "se": None, "why": SPEED_ONLY}
    if row["measure"] == "steps":
        effect, se = of_tokens(steps, steps - size, slope_)
        return {"effect": effect, "se": se, "why": ""}
    runs = max(1, float(row["n"] or 1))
    return {"effect": size, "se": USUAL_SD * math.sqrt(2 / runs), "why": ""}


# ----- the table --------------------------------------------------------------------------------------------

def table(sweep: dict) -> dict:
    """{name, kind, scale, slope, rows, signs, signs_published, signs_resolved, ranks} of a sweep's report.

    A row: {what, published: {effect, se, why}, measured: {effect, low, high, resolved, note}, agrees}; agrees
    is None unless both effects have a sign."""
    if sweep.get("kind") not in ("chain", "ablate"):
        raise UserError(f"{sweep.get('name')}: a {sweep.get('kind')} predicts nothing; name the report of a "
                        "chain or an ablation")
    slope_, history = slope(), {f"{r['lineage']}/{r['id']}": r for r in read("history.csv")}
    pairs = chain_rows(sweep, history, slope_) if sweep["kind"] == "chain" else feature_rows(
        sweep, history, slope_)
    rows = []
    for what, published, measured in pairs:
        effects = (published["effect"], measured["effect"])
        agrees = None if None in effects or 0 in effects else (effects[0] < 0) == (effects[1] < 0)
        rows.append({"what": what, "published": published, "measured": measured, "agrees": agrees})
    both = [r for r in rows if None not in (r["published"]["effect"], r["measured"]["effect"])]
    known = [r for r in both if r["agrees"] is not None
             and abs(r["published"]["effect"]) > Z * r["published"]["se"]]
    return {
        "name": sweep["name"], "kind": sweep["kind"], "scale": sweep["scale"], "base": sweep["base"],
        "slope": slope_[0], "slope_se": slope_[1], "rows": rows,
        "signs": share([r["agrees"] for r in rows if r["agrees"] is not None]),
        "signs_published": share([r["agrees"] for r in known]),
        "signs_resolved": share([r["agrees"] for r in known if r["measured"]["resolved"]]),
        "ranks": ranks([r["published"]["effect"] for r in both], [r["measured"]["effect"] for r in both]),
    }


def share(agreements: list[bool]) -> dict:
    """{k, n, share, low, high}: how many agree, with Wilson's 95 % interval; None without a row."""
    n, k = len(agreements), sum(agreements)
    low, high = statistics.wilson(k, n) if n else (None, None)
    return {"k": k, "n": n, "share": k / n if n else None, "low": low, "high": high}


def ranks(published: list[float], measured: list[float]) -> dict:
    """Spearman's rho of both, with its interval; rho None below three rows."""
    if len(published) < 3:
        return {"rho": None, "low": None, "high": None, "n": len(published)}
    return statistics.rank_correlation(published, measured)


def of_runs(lineage: str = "short", scale: str = "tiny") -> dict:
    """The committed runs of a lineage's records at a scale (seed 0), as the report of a chain with one run
    an arm: no row has an interval.

    A record without a run computes at that scale what its parent does (tests/test_evidence.py) and shares its
    loss. Runs of two numerics versions are not compared.
    """
    records, runs, rows = deltas.load_records(), {}, []
    for row in read("history.csv"):
        ref = f"{row['lineage']}/{row['id']}"
        if row["lineage"] != lineage or ref not in records:
            continue
        path, parent = records[ref].folder / scale / "summary.json", records[ref].parent
        own = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        before, runs[ref] = runs.get(parent), own or runs.get(parent)
        if before is None:
            continue
        effect, note = None, f"inert at scale {scale}: computes the same as {parent}, not run"
        if own and own["numerics_version"] != before["numerics_version"]:
            note = "not compared: its run and its parent's are of two numerics versions"
        elif own:
            effect, note = own["val_loss"] - before["val_loss"], ""
        rows.append({"record": ref, "parent": parent, "effect": effect, "low": None, "high": None,
                     "resolved": False, "note": note})
    return {"name": f"runs_{scale}", "kind": "chain", "base": f"{lineage}, one run a record", "scale": scale,
            "rows": rows}


def measured_of(row: dict, sign: int) -> dict:
    """Effect of adding what a report's row is about: sign -1 where the row leaves it out."""
    bounds = [None if row[k] is None else sign * row[k] for k in ("low", "high")]
    return {"effect": None if row["effect"] is None else sign * row["effect"],
            "low": bounds[0] if sign > 0 else bounds[1], "high": bounds[1] if sign > 0 else bounds[0],
            "resolved": row["resolved"], "note": row["note"]}


def chain_rows(
    sweep: dict, history: dict[str, dict], slope_: tuple[float, float]
) -> Iterator[tuple[str, dict, dict]]:
    """(ref, published, measured) of the records of a chain that somebody published."""
    for row in sweep["rows"]:
        child, parent = history.get(row["record"]), history.get(row.get("parent"))
        if child:
            yield row["record"], of_record(child, parent, slope_), measured_of(row, 1)


def feature_rows(
    sweep: dict, history: dict[str, dict], slope_: tuple[float, float]
) -> Iterator[tuple[str, dict, dict]]:
    """(path, published, measured) of the features that are left out alone and have a published effect."""
    effects = stated_effects(deltas.resolve_name(sweep["base"]).record)
    for row in sweep["rows"]:
        flag, _, path = row["changes"][0].partition(" ") if len(row["changes"]) == 1 else ("", "", "")
        found = effects.get(renames.present_path(path)) if flag == "--without" else None
        if found:
            steps = float(history[found["record"]]["steps"])
            yield path, of_feature(found, steps, slope_), measured_of(row, -1)


def stated_effects(record: deltas.Record) -> dict[str, dict]:
    """{path: row of effects.csv} of the features that a record has: what the record says that is nearest to
    it in its chain; of one record the first row. Effects on the loss come before those on speed."""
    place = {link.ref: i for i, link in enumerate(deltas.chain(record))}
    rows = [row for row in read("effects.csv") if row["path"] and row["record"] in place]
    nearest_last = sorted(rows[::-1], key=lambda row: (row["measure"] != "seconds", place[row["record"]]))
    return {renames.present_path(row["path"]): row for row in nearest_last}


# ----- output -----------------------------------------------------------------------------------------------

HEAD = ("record or feature", "published, nats", "measured, nats", "sign")


def cells(row: dict) -> list[str]:
    """A row in words."""
    p, m = row["published"], row["measured"]
    published = p["why"] if p["effect"] is None else f"{p['effect']:+.4f} +-{Z * p['se']:.4f}"
    if m["effect"] is None:
        measured = m["note"].split(":")[0] or "not measured"
    elif m["low"] is None:
        measured = f"{m['effect']:+.4f} (no interval)"
    else:
        measured = f"{m['effect']:+.4f} [{m['low']:+.4f}, {m['high']:+.4f}]" + (
            "" if m["resolved"] else " unresolved")
    return [row["what"], published, measured, {True: "agrees", False: "differs", None: ""}[row["agrees"]]]


def agreement(x: dict) -> str:
    """A share of signs in words: "41 of 64 agree, 64 % [52, 75]"."""
    if not x["n"]:
        return "none to compare"
    share_, low, high = (f"{100 * x[k]:.0f}" for k in ("share", "low", "high"))
    return f"{x['k']} of {x['n']} agree, {share_} % [{low}, {high}]"


def correlation(r: dict) -> str:
    """A rank correlation in words: "+0.49 over 64 rows, [+0.26, +0.66]"."""
    if r["rho"] is None:
        return f"too few rows ({r['n']})"
    bounds = "no interval" if r["low"] is None else f"[{r['low']:+.2f}, {r['high']:+.2f}]"
    return f"{r['rho']:+.2f} over {r['n']} rows, {bounds}"


def sentences(found: dict) -> list[str]:
    """What a table shows, in four sentences."""
    r = found["ranks"]
    doubt = r["rho"] is not None and (r["low"] is None or r["low"] <= 0 <= r["high"])
    return [f"Signs of all rows with both effects: {agreement(found['signs'])}.",
            "Signs of the rows whose published effect is told apart from 0: "
            f"{agreement(found['signs_published'])}.",
            f"Signs of the rows where both are told apart from 0: {agreement(found['signs_resolved'])}.",
            f"Rank correlation: {correlation(r)}{', not told apart from none' if doubt else ''}."]


OVERVIEW = ("sweep", "signs", "published told apart from 0", "both told apart from 0", "rank correlation")


def overview(found: dict) -> list[str]:
    """A table in one line, under OVERVIEW."""
    return [found["name"], *(agreement(found[k]) for k in ("signs", "signs_published", "signs_resolved")),
            correlation(found["ranks"])]


def markdown(tables: list[dict]) -> str:
    """All tables as Markdown."""
    value, error = slope()
    out = ["# Predictions: published effects against those measured at small scales", "",
           f"`python sweep.py predictions --markdown`. Nats at equal tokens, negative is better. Tokens and "
           f"steps count by d loss / d ln tokens = {value:.3f} +-{Z * error:.3f}, from "
           + ", ".join(where for where, *_ in SLOPES)
           + ". Published with a 95 % interval, measured with the sweep's simultaneous intervals; "
           "`runs_tiny` is the committed run of each record, seed 0."]
    out += ["", *grid(OVERVIEW, map(overview, tables))]
    for found in tables:
        out += ["", f"## {found['name']}", "", *sentences(found), "", *grid(HEAD, map(cells, found["rows"]))]
    return "\n".join(out) + "\n"


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def reports(paths: list[str]) -> list[dict]:
    """The named reports, or every committed chain of records and ablation."""
    out = []
    for path in map(Path, paths or files.listed(RESULTS, "*.json")):
        try:
            sweep = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not the report of a sweep ({error})") from None
        if isinstance(sweep, dict) and isinstance(sweep.get("rows"), list) and (
                paths or (sweep.get("kind") in ("chain", "ablate") and sweep["base"] not in ("variants",))):
            out.append(sweep)
        elif paths:
            raise UserError(f"{path}: not the report of a sweep")
    return out


def command(options: argparse.Namespace) -> None:
    """`sweep.py predictions`: print the tables, write them as JSON."""
    try:
        more = [] if options.reports else [of_runs()]
        tables = [table(sweep) for sweep in reports(options.reports) + more]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{', '.join(options.reports)}: not the report of a sweep ({error!r})") from None
    if options.json:
        files.write(Path(options.json), files.json_text(tables, indent=1) + "\n")
    if options.markdown:
        print(markdown(tables), end="")
        return
    for found in tables:
        print(f"{found['name']}: {found['base']} at scale {found['scale']}; nats, negative is better")
        print(*lines.aligned([HEAD, *map(cells, found["rows"])]), *sentences(found), "", sep="\n")
    if len(tables) > 1:
        print("all of them:", *lines.aligned([OVERVIEW, *map(overview, tables)]), sep="\n")
