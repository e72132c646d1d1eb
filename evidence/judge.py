"""Every published record of modded-nanogpt judged again from its raw runs: `python -m records judge`.

    python -m records judge                    # all entries of the three tracks
    python -m records judge --track optimizer  # one track
    python -m records judge short/80           # one record: groups of its folder, runs, baselines
    python -m records judge --markdown         # the tables as Markdown
    python -m records judge --json FILE        # for programs; evidence/results/judge.json has all entries

Data (KellerJordan/modded-nanogpt, snapshot of 2026-08-01; logs by the people named there):

published/runs.csv, one line per run in a log:
    track (short, medium, optimizer), dir and log (where the log lies in the track's folder), run (number
    inside a log of several), step (last validated), val_loss (there, nats per token), time_ms (clock there;
    empty: not logged), group (which runs of the folder are one setting: the sub-folder, or a label where a
    folder mixes settings).
published/groups.csv, one line per group:
    track, record (id; empty: belongs to none), date, dir, group, runs (how many the other file must hold).
    role: `record` is the one group per record that counts; baseline, other, incomplete, duplicate do not.
    step: where the loss counts; empty if the runs of a group differ. On the optimizer track the published
    step; runs may go on beyond it, then step_loss is their mean there (to five digits; to four, as published,
    where a folder mixes settings). kind (upstream's work read from the source: ml, systems, both, retiming,
    baseline) and waived (`yes`: a change of systems only, for which the rules ask no statistics since
    2025-05-25). published_minutes and linked_log (of the table); claimed_runs and claimed_loss (what table or
    README says was run); previous (optimizer: the best result before it, for the pairwise rule); note.

Rules: short and medium ask for a mean below the target with p < 0.01 (one-sided t test; first written down on
2024-12-04), optimizer for (3.28 - mean) sqrt(n) >= 0.004. A verdict is `pass`, `miss` or `cannot tell`: the
last where no log, one or two logs, or fewer logs than claimed runs are there and do not pass by themselves
(unless their mean lies five usual sd above the target). Nothing is corrected for how often somebody tried,
and the logs cannot show it.
"""

import argparse
import csv
import hashlib
from collections.abc import Callable
from math import fsum
from pathlib import Path
from typing import Any

from common import errors, files, lines
from common.errors import UserError
from evidence.statistics import (
    bootstrap_t, describe, difference, ratio, standardised, target_test, z_pairwise, z_rule
)
from settings import deltas

HERE = Path(__file__).parent / "published"
RUNS, GROUPS = "runs.csv", "groups.csv"
RESTORE = f"restore both tables with `git checkout -- evidence/published/{RUNS} evidence/published/{GROUPS}`"
TARGETS = {"short": 3.28, "medium": 2.92, "optimizer": 3.28}
USUAL_SD = {"short": 0.00124, "medium": 0.0008, "optimizer": 0.0013}  # of one run, to give a margin its size
RULE_SINCE = "2024-12-04"  # p < 0.01 appears in the rules
ALPHA = 0.01
DONORS = 8  # runs of a published group from which its residuals count for the bootstrap
ROLES = ("record", "baseline", "other", "incomplete", "duplicate")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `records judge`."""
    parser.add_argument("record", nargs="?", help="one record in detail, like short/80 or optimizer/46")
    parser.add_argument("--track", choices=list(TARGETS), help="one track only")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    parser.add_argument("--json", metavar="FILE", help="also write the result there, for programs")


def run(options: argparse.Namespace) -> None:
    """`records judge`: judge the published logs, print tables or one record in detail."""
    tables = load()
    ref = find(tables, options.record, options.track) if options.record else None
    result = judge(tables, options.track, ref)
    if options.json:
        write(result, options.json)
    if ref:
        detail(tables, result["records"][0], options.markdown)
    else:
        report(result, options.markdown)


# ----- the two tables ---------------------------------------------------------------------------------------

def load(folder: Path = HERE) -> dict:
    """{"groups": [row], "runs": {(track, dir, group): [row]}, "digest": of both files},
    checked against each other."""
    groups, runs = read(folder / GROUPS, group_row), read(folder / RUNS, run_row)
    seen, members = {}, {}
    for line, row in runs:
        key = (row["track"], row["dir"], row["log"], row["run"])
        if key in seen:
            raise damaged(folder / RUNS, line, f"repeats the run of line {seen[key]}")
        seen[key] = line
        members.setdefault((row["track"], row["dir"], row["group"]), []).append(row)
    records, logs = set(), {key[:3] for key in seen}
    for line, row in groups:
        key = (row["track"], row["dir"], row["group"])
        if row["runs"] != len(members.get(key, [])):
            raise damaged(
                folder / GROUPS, line,
                f"declares {row['runs']} runs of {'/'.join(key)}, {RUNS} holds {len(members.get(key, []))}"
            )
        if row["role"] == "record":
            if (row["track"], row["record"]) in records:
                raise damaged(folder / GROUPS, line,
                              f"{row['track']}/{row['record']} has a second counted group")
            records.add((row["track"], row["record"]))
            check_group(folder / GROUPS, line, row, members.get(key, []), logs)
    for line, row in groups:
        if row["previous"] and (row["track"], row["previous"]) not in records:
            raise damaged(folder / GROUPS, line, f"previous {row['previous']!r} is no record")
    unknown = set(members) - {(r["track"], r["dir"], r["group"]) for _, r in groups}
    if unknown:
        raise damaged(folder / RUNS, None,
                      f"holds runs of {'/'.join(min(unknown))}, which {GROUPS} does not declare")
    digest = hashlib.sha256(b"".join(
        (folder / name).read_bytes() for name in (RUNS, GROUPS))).hexdigest()[:16]
    return {"groups": [row for _, row in groups], "runs": members, "digest": digest}


def check_group(
    path: Path, line: int, row: dict, runs: list[dict], logs: set[tuple[str, str, str]]
) -> None:
    """The line of a counted group must be supported by its runs:
    none may stop before the step that counts."""
    timed = any(r["time_ms"] for r in runs) and row["track"] != "optimizer"
    needs = {"step": bool(runs), "published_minutes": timed, "claimed_loss": row["track"] == "optimizer",
             "claimed_runs": row["track"] == "optimizer"}
    for name, needed in needs.items():
        if needed and row[name] is None:
            raise damaged(path, line, f"a group that counts needs its {name}")
    for r in runs:
        if r["step"] < row["step"] or (r["step"] > row["step"] and row["step_loss"] is None):
            raise damaged(path, line,
                          f"{r['log']} ends at step {r['step']}, the loss counts at {row['step']}")
    if row["linked_log"] and (row["track"], row["dir"], row["linked_log"]) not in logs:
        raise damaged(path, line, f"linked_log {row['linked_log']!r} has no run in {RUNS}")


def damaged(path: Path, line: int | None, what: str) -> UserError:
    """The UserError for a published table that does not hold what it should."""
    return UserError(f"{path}{f' line {line}' if line else ''}: {what}; {RESTORE}")


def read(path: Path, convert: Callable[[Path, int, dict[str, str]], dict]) -> list[tuple[int, dict]]:
    """[(line number, converted row)] of a csv file, or a UserError that names the line."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise damaged(path, reader.line_num,
                                  "has another number of columns than the head of the file")
                rows.append((reader.line_num, convert(path, reader.line_num, row)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); {RESTORE}") from None
    if not rows:
        raise damaged(path, None, "the file is empty")
    return rows


def number(
    path: Path, line: int, row: dict[str, str], name: str, kind: type[int] | type[float], least: float,
    most: float, optional: bool = False
) -> int | float | None:
    """row[name] as a number within its bounds; None where empty and optional."""
    text = row.get(name)
    if text is None:
        raise damaged(path, line, f"column {name} is missing")
    if text == "" and optional:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        raise damaged(path, line, f"{name} {text!r} is not a number between {least} and {most}")
    return value


def texts(path: Path, line: int, row: dict[str, str], names: tuple[str, ...]) -> dict[str, str]:
    """The named text columns of a row. UserError if one is missing or the track is unknown."""
    for name in names:
        if name not in row:
            raise damaged(path, line, f"column {name} is missing")
    if row["track"] not in TARGETS:
        raise damaged(path, line, f"track {row['track']!r} is none of {', '.join(TARGETS)}")
    return {name: row[name] for name in names}


def run_row(path: Path, line: int, row: dict[str, str]) -> dict:
    """One row of runs.csv, typed and within its bounds."""
    return texts(path, line, row, ("track", "dir", "group", "log", "run")) | {
        "step": number(path, line, row, "step", int, 1, 10**6),
        "val_loss": number(path, line, row, "val_loss", float, 0.5, 20),
        "time_ms": number(path, line, row, "time_ms", float, 1, 10**9, optional=True)}


def group_row(path: Path, line: int, row: dict[str, str]) -> dict:
    """One row of groups.csv, typed and within its bounds."""
    out = texts(path, line, row, ("track", "record", "date", "dir", "group", "role", "kind", "waived",
                                  "linked_log", "previous", "note"))
    if out["role"] not in ROLES or out["waived"] not in ("", "yes"):
        raise damaged(path, line, f"role must be one of {', '.join(ROLES)} and waived yes or empty")
    return out | {
        "runs": number(path, line, row, "runs", int, 0, 10**4),
        "step": number(path, line, row, "step", int, 1, 10**6, optional=True),
        "published_minutes": number(path, line, row, "published_minutes", float, 0.01, 10**5, optional=True),
        "claimed_runs": number(path, line, row, "claimed_runs", int, 1, 10**5, optional=True),
        "claimed_loss": number(path, line, row, "claimed_loss", float, 0.5, 20, optional=True),
        "step_loss": number(path, line, row, "step_loss", float, 0.5, 20, optional=True)}


def counted(tables: dict, track: str | None = None) -> list[dict]:
    """The counted groups, in order."""
    return [g for g in tables["groups"] if g["role"] == "record" and track in (None, g["track"])]


def average(values: list[float]) -> float:
    """Mean of a list, summed without rounding."""
    return fsum(values) / len(values)


def runs_of(tables: dict, group: dict) -> list[dict]:
    """The published runs of a group of logs."""
    return tables["runs"].get((group["track"], group["dir"], group["group"]), [])


def find(tables: dict, name: str, track: str | None = None) -> str:
    """Ref of a published record for `short/80`, `short/080`, a slug this repository knows,
    or `80` with --track."""
    refs = [f"{g['track']}/{g['record']}" for g in counted(tables)]
    if "/" not in name:
        same = [
            ref for ref in refs
            if ref.split("/")[1] == name.lstrip("0") and track in (None, ref.split("/")[0])
        ]
        if len(same) > 1:
            raise UserError(f"record {name!r} exists on several tracks: say {' or '.join(same)}")
        name = same[0] if same else name
    lineage, _, key = name.partition("/")
    ref = f"{lineage}/{key.lstrip('0')}"
    if ref not in refs:
        try:
            ref = deltas.find_record(name).ref
        except UserError:
            pass
    if ref not in refs:
        raise UserError(
            f"no published record {name!r}{errors.near(name, refs)}: short/1 to short/89 (21r and 21t are "
            "re-timings), medium/1 to medium/18, optimizer/1 to optimizer/46")
    if track and not ref.startswith(track + "/"):
        raise UserError(f"{ref} is not on the {track} track: leave --track out")
    return ref


# ----- judging ----------------------------------------------------------------------------------------------

def judge(tables: dict, track: str | None = None, ref: str | None = None) -> dict:
    """{"version", "data" (digest of the tables), "tracks": counts, "records": [facts and verdict]}."""
    groups = counted(tables, track)
    if ref:
        groups = [g for g in groups if f"{g['track']}/{g['record']}" == ref]
    records = [judge_group(tables, g) for g in groups]
    return {"version": 1, "data": tables["digest"], "alpha": ALPHA, "targets": TARGETS,
            "tracks": {} if ref else {t: summary([r for r in records if r["track"] == t])
                                      for t in TARGETS if track in (None, t)},
            "records": records}


def judge_group(tables: dict, group: dict) -> dict:
    """Facts and verdict of one record: see the fields at the end. Losses in nats, times in minutes."""
    runs, target = runs_of(tables, group), TARGETS[group["track"]]
    at_step = bool(runs) and all(r["step"] == group["step"] for r in runs)
    losses = [r["val_loss"] for r in runs]
    facts = {
        "n": len(runs), "mean": None, "sd": None, "p": None, "p_robust": None,
        "score": None, "runs_for": None, "passed": None
    }
    if runs and group["track"] == "optimizer":
        mean = average(losses) if at_step else group["step_loss"]
        rule = z_rule(mean, len(runs), target)
        facts |= {
            "mean": mean, "sd": describe(losses)["sd"] if at_step else None, "p": rule["p"],
            "score": rule["score"], "passed": rule["passed"]
        }
    elif runs:
        test = target_test(losses, target, ALPHA)
        facts |= {k: v for k, v in test.items() if k in facts}
        facts["p_robust"] = robust_p(tables, len(runs), test)
    margin = None if facts["mean"] is None else target - facts["mean"]
    facts |= {"margin": margin, "margin_in_sd": None if margin is None else margin / USUAL_SD[group["track"]]}
    facts["verdict"], facts["why"] = verdict(group, facts)
    if facts["verdict"] == "cannot tell":
        facts["passed"] = None
    return {
        "record": f"{group['track']}/{group['record']}", "track": group["track"], "date": group["date"],
        "kind": group["kind"], "folder": "/".join(filter(None, (group["dir"], group["group"]))),
        "step": group["step"], **facts, "waived": group["waived"] == "yes",
        "before_rule": group["track"] == "short" and group["date"] < RULE_SINCE,
        "claimed_runs": group["claimed_runs"], "claimed_loss": group["claimed_loss"],
        **minutes(tables, group, runs), "pairwise": pairwise(tables, group, facts), "note": group["note"]
    }


def robust_p(tables: dict, n: int, test: dict) -> float | None:
    """The p of a t test below 0.05 by the bootstrap: how often n residuals of the published groups of
    DONORS and more runs give as low a t. None for other tests.

    The residuals are not normal: at p = 0.01 the t test passes 1.2 to 1.5 % of samples whose true mean lies
    at the target (n = 4 to 40)."""
    if test["p"] is None or test["p"] >= 0.05:
        return None
    cache = tables.setdefault("bootstrap", {})
    if n not in cache:
        groups = [[r["val_loss"] for r in rows] for (track, _, _), rows in tables["runs"].items()
                  if track != "optimizer" and len(rows) >= DONORS and len({r["step"] for r in rows}) == 1]
        cache[n] = bootstrap_t(n, standardised(groups))
    below = int(cache[n].searchsorted(test["t"], side="right"))
    return (below + 1) / (len(cache[n]) + 1)


def verdict(group: dict, facts: dict) -> tuple[str, str]:
    """('pass' | 'miss' | 'cannot tell', why)."""
    n, claimed = facts["n"], group["claimed_runs"]
    if facts["passed"]:
        return "pass", ""
    if n == 0:
        return "cannot tell", "no log"
    if facts["margin_in_sd"] < -5:
        return "miss", f"mean {-facts['margin_in_sd']:.0f} usual sd above the target"
    if claimed and claimed > n:
        why = f"{n} of {claimed} runs {'have' if n > 1 else 'has'} a log"
        if group["track"] == "optimizer" and z_rule(group["claimed_loss"], claimed)["passed"]:
            why += "; the published mean would pass"
        return "cannot tell", why
    if group["track"] != "optimizer" and n < 3:
        return "cannot tell", "one log" if n == 1 else "two logs"
    return "miss", f"score {facts['score']:.5f}" if group["track"] == "optimizer" else f"p = {facts['p']:.3g}"


def minutes(tables: dict, group: dict, runs: list[dict]) -> dict[str, float | None]:
    """Published minutes, those of the linked log, and the mean over the counted runs,
    with deviations in percent."""
    every = [
        r for (t, d, _), rows in tables["runs"].items() if (t, d) == (group["track"], group["dir"])
        for r in rows
    ]
    linked = [r for r in every if r["log"] == group["linked_log"] and r["time_ms"]]
    times = [r["time_ms"] for r in runs if r["time_ms"]]
    out = {"published_minutes": group["published_minutes"]}
    out |= dict.fromkeys(("linked_minutes", "linked_loss", "mean_minutes", "slower_percent"))
    if group["track"] == "optimizer":  # its wall clock is free, and runs go on beyond the step that counts
        return out
    if linked:
        out |= {"linked_minutes": linked[0]["time_ms"] / 60000, "linked_loss": linked[0]["val_loss"]}
    if times:
        out["mean_minutes"] = average(times) / 60000
        out["slower_percent"] = 100 * (out["mean_minutes"] / group["published_minutes"] - 1)
    return out


def pairwise(tables: dict, group: dict, facts: dict) -> dict | None:
    """The optimizer track's pairwise rule against the best result before, or None.

    Where the logs cannot tell, the published mean and number of runs stand in (`published` is True).
    """
    if not group["previous"]:
        return None
    old = next(g for g in counted(tables, group["track"]) if g["record"] == group["previous"])
    before, saved = judge_group(tables, old | {"previous": ""}), old["step"] - group["step"]
    published = "cannot tell" in (facts["verdict"], before["verdict"])
    sides = [(r["claimed_loss"], r["claimed_runs"]) if r["verdict"] == "cannot tell" else (r["mean"], r["n"])
             for r in ({**group, **facts}, before)]
    return {"against": before["record"], "steps_saved": saved, "published": published,
            **z_pairwise(*sides[0], *sides[1], saved)}


def summary(records: list[dict]) -> dict:
    """Counts of a track, and the records behind them."""
    def names(keep):
        return [r["record"].split("/")[1] for r in records if keep(r)]

    untold = {why: names(lambda r, why=why: r["verdict"] == "cannot tell" and r["why"] == why)
              for why in ("no log", "one log", "two logs")}
    timed = [r for r in records if r["slower_percent"] is not None]
    return {
        "entries": len(records), "runs": sum(r["n"] for r in records),
        "pass": names(lambda r: r["verdict"] == "pass"), "miss": names(lambda r: r["verdict"] == "miss"),
        **untold,
        "fewer logs than runs": names(lambda r: r["verdict"] == "cannot tell" and r["why"] not in untold),
        "waived": names(lambda r: r["waived"] and r["verdict"] != "pass"),
        "before_rule": names(lambda r: r["before_rule"] and r["verdict"] != "pass"),
        "pairwise_unproven": names(lambda r: r["pairwise"] and not r["pairwise"]["passed"]),
        "unsecured": names(lambda r: r["verdict"] == "pass" and (r["p_robust"] or 0) >= ALPHA),
        "timed": len(timed), "slower": sum(r["slower_percent"] > 1 for r in timed),
        "faster": sum(r["slower_percent"] < -1 for r in timed)
    }


# ----- output -----------------------------------------------------------------------------------------------

HEADS = {
    "short": (
        "record", "n", "mean", "sd", "p", "robust p", "verdict", "minutes", "linked", "logs", "slower", "note"
    ),
    "medium": (
        "record", "n", "mean", "sd", "p", "robust p", "verdict", "margin", "in sd", "minutes", "logs",
        "slower", "note"
    ),
    "optimizer": ("record", "n", "mean", "sd", "score", "verdict", "steps", "claimed", "pairwise p", "note"),
}
TITLES = {
    "short": "short: loss 3.28 in least minutes; one-sided t test, p < 0.01 "
             "(robust p: the same by bootstrap of published residuals; "
             "minutes: published, of the linked log, mean of the counted logs)",
    "medium": "medium: loss 2.92 in least minutes; one-sided t test, p < 0.01 "
              "(robust p: by bootstrap of published residuals; "
              "margin: 2.92 - mean, in nats and in the usual sd of 0.0008)",
    "optimizer": "optimizer: 3.28 in fewest steps; score = (3.28 - mean) sqrt(n) >= 0.004 "
                 "(pairwise: p against the best result before, whose number follows; * with published means)"}


# On a terminal: columns of a table that are left out, first to last, until NOTE columns remain for the
# beginning of a note.
LESS_WANTED = ("linked", "slower", "logs", "in sd", "robust p", "sd", "pairwise p", "margin", "n")
NOTE = 12


def digits(value: float | None, form: str) -> str:
    """A number in a format, or a dash for None."""
    return "-" if value is None else format(value, form)


def cells(r: dict) -> list[str]:
    """One line of a track's table."""
    state = r["verdict"]
    if state != "pass" and r["waived"]:
        state += " (waived)"
    elif state != "pass" and r["before_rule"]:
        state += " (before the rule)"
    head = [r["record"], str(r["n"]), digits(r["mean"], ".5f"), digits(r["sd"], ".5f")]
    says = "; ".join(filter(None, (r["why"] if r["verdict"] != "miss" or r["p"] is None else "", r["note"])))
    table, mean = digits(r["published_minutes"], ".3f"), digits(r["mean_minutes"], ".3f")
    ratio = digits(r["slower_percent"], "+.1f")
    if r["track"] == "optimizer":
        pair, claimed = r["pairwise"], f"{r['claimed_loss']:.4f} ({r['claimed_runs']})"
        pair = (
            f"{pair['p']:.2g} ({pair['against'].split('/')[1]}{'*' if pair['published'] else ''})" if pair
            else "-"
        )
        return head + [digits(r["score"], ".5f"), state, str(r["step"]), claimed, pair, says]
    ratio += "" if ratio == "-" else " %"
    if r["track"] == "medium":
        return head + [
            digits(r["p"], ".3g"), digits(r["p_robust"], ".3g"), state, digits(r["margin"], ".5f"),
            digits(r["margin_in_sd"], ".1f"), table, mean, ratio, says
        ]
    return head + [
        digits(r["p"], ".3g"), digits(r["p_robust"], ".3g"), state, table,
        digits(r["linked_minutes"], ".3f"), mean, ratio, says
    ]


def show_table(head: tuple[str, ...], rows: list[list[str]], markdown: bool) -> None:
    """A table for the terminal, or as Markdown. The last column is free text."""
    if markdown:
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for row in rows:
            print("| " + " | ".join(row) + " |")
        return
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head) - 1)]
    columns = lines.room() if len(rows) > 1 else None  # a single row is wrapped
    shown = list(range(len(widths)))
    for name in LESS_WANTED if columns is not None else ():
        if sum(widths[i] + 2 for i in shown) + NOTE > columns:
            shown = [i for i in shown if head[i] != name]
    for row in [head, *rows]:
        left = "".join((f"{row[i]:<{widths[i]}}" if head[i] in ("record", "verdict", "group", "role") else
                        f"{row[i]:>{widths[i]}}") + "  " for i in shown)
        print((left + (row[-1] if columns is None else lines.clipped(row[-1], columns - len(left)))).rstrip())
    if len(shown) < len(widths):
        print(f"(left out on {columns} columns: "
              f"{', '.join(head[i] for i in range(len(widths)) if i not in shown)})")


def report(result: dict, markdown: bool) -> None:
    """Print one table per track and one sentence of counts for each."""
    for track in result["tracks"]:
        print(f"### {TITLES[track]}\n" if markdown else TITLES[track])
        show_table(HEADS[track], [cells(r) for r in result["records"] if r["track"] == track], markdown)
        print()
    for track, counts in result["tracks"].items():
        print(("- " if markdown else "") + sentence(track, counts))
    print(("\n" if markdown else "") +
          "No log shows the runs that were not committed, nor how often a set was tried.")


def sentence(track: str, counts: dict) -> str:
    """The counts of a track in one line."""
    def listed(names):
        return f"{len(names)} ({', '.join(names)})"

    untold = [(why, counts[why]) for why in ("no log", "one log", "two logs", "fewer logs than runs")
              if counts[why]]
    line = (
        f"{track}: {counts['entries']} entries, {counts['runs']} counted runs; {len(counts['pass'])} pass "
        "from their logs"
    )
    if counts["miss"]:
        line += f"; miss: {listed(counts['miss'])}"
    if untold:
        line += "; cannot be told: " + ", ".join(f"{why} {listed(names)}" for why, names in untold)
    for key, text in (("waived", "Waived as systems changes, of those that do not pass"),
                      ("before_rule", f"Older than the rule of {RULE_SINCE}, of those"),
                      ("unsecured", "Pass by the t test, not by the bootstrap of published residuals"),
                      ("pairwise_unproven", "Pairwise rule not met against the best result before")):
        if counts[key]:
            line += f". {text}: {listed(counts[key])}"
    if counts["timed"]:
        line += (f". Clock: logs slower than published by more than 1 % in {counts['slower']} of "
                 f"{counts['timed']} entries with times, faster in {counts['faster']}")
    return line + "."


def detail(tables: dict, r: dict, markdown: bool = False) -> None:
    """One record: its line, the groups of its folder, its runs, the difference from each baseline there."""
    show_table(HEADS[r["track"]], [cells(r)], markdown)
    print()
    if r["linked_minutes"]:
        print(f"linked log: loss {r['linked_loss']:.5f}, {r['linked_minutes']:.3f} minutes; "
              f"published {r['published_minutes']:.3f}")
    if r["verdict"] == "miss" and r["runs_for"]:
        print(f"a fresh set of {r['runs_for']} runs with this mean and sd would pass with 90 % power; more "
              "runs on top of these would be a second look")
    if r["pairwise"]:
        p = r["pairwise"]
        print(f"against {p['against']}: {p['steps_saved']} steps fewer, score {p['score']:.5f}, p = "
              f"{p['p']:.2g}, {'proven' if p['passed'] else 'not proven'} pairwise")
    group = next(g for g in counted(tables) if f"{g['track']}/{g['record']}" == r["record"])
    folder = [
        g for g in tables["groups"] if g["dir"] and (g["track"], g["dir"]) == (group["track"], group["dir"])
    ]
    rows = []
    for g in folder:
        runs = runs_of(tables, g)
        losses, times = [x["val_loss"] for x in runs], [x["time_ms"] for x in runs if x["time_ms"]]
        d, steps = describe(losses), sorted({x["step"] for x in runs})
        p = target_test(losses, TARGETS[g["track"]])["p"]
        rows.append(
            [
                g["group"] or "(folder)", g["role"], str(d["n"]), f"{d['mean']:.5f}", digits(d["sd"], ".5f"),
                digits(p, ".3g"), str(steps[0]) if len(steps) == 1 else f"{steps[0]}-{steps[-1]}",
                f"{average(times) / 60000:.3f}" if times else "-", g["note"]
            ]
        )
    if rows:
        print(f"\ngroups of {group['dir']} (losses at each run's last step)" + ("\n" if markdown else ""))
        show_table(("group", "role", "n", "mean", "sd", "p", "step", "minutes", "note"), rows, markdown)
        print()
    baselines(tables, group, folder)
    for x in runs_of(tables, group):
        clock = "" if x["time_ms"] is None else f" {x['time_ms'] / 1000:9.3f} s"
        name = x["log"] + (f" run {x['run']}" if x["run"] else "")
        print(f"{'- ' if markdown else '  '}{x['val_loss']:.5f} at step {x['step']}{clock}  {name}")


def baselines(tables: dict, group: dict, folder: list[dict]) -> None:
    """Loss difference and time ratio against each baseline group of the folder (Welch;
    different steps are named)."""
    new = runs_of(tables, group)
    for g in folder:
        old = runs_of(tables, g)
        if g["role"] != "baseline" or min(len(new), len(old)) < 2:
            continue
        loss = difference([x["val_loss"] for x in new], [x["val_loss"] for x in old], paired=False)
        line = f"against {g['group']}: loss {loss['estimate']:+.5f}"
        if loss["low"] is not None:
            line += f" [{loss['low']:+.5f}, {loss['high']:+.5f}]"
        if all(x["time_ms"] for x in [*new, *old]):
            time = ratio([x["time_ms"] for x in new], [x["time_ms"] for x in old], paired=False)
            line += f", time x {time['estimate']:.4f}"
            if time["low"] is not None:
                line += f" [{time['low']:.4f}, {time['high']:.4f}]"
        print(line + (f", {new[0]['step']} against {old[0]['step']} steps" if new[0]["step"] !=
                      old[0]["step"] else ", equal steps") + " (95 % intervals)")


# ----- for programs -----------------------------------------------------------------------------------------

def rounded(value: Any) -> Any:
    """Six significant digits below the loss's size are more than the logs hold;
    the file then survives a new scipy."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def as_text(result: dict) -> str:
    """The result as JSON, one record a line, so that a changed verdict is one changed line."""
    head = {k: rounded(v) for k, v in result.items() if k != "records"}
    lines = ",\n".join(files.json_text(rounded(r), ensure_ascii=False) for r in result["records"])
    return files.json_text(head, ensure_ascii=False)[:-1] + f', "records": [\n{lines}\n]}}\n'


def write(result: dict, path: Path | str) -> None:
    """Write a result as JSON."""
    files.write(path, as_text(result))
