"""What the pages say: the committed data gathered as plain values, and the few answers that several pages
give.

Read: the record folders (record.toml, reference.csv, committed runs, results.json of claims),
evidence/published/history.csv (every published record and claim, also those that are not implemented here),
evidence/published/effects.csv (what authors state a technique is worth) and evidence/results/*.json (sweeps,
and judge.json). Nothing typed is believed: claims are verified again from their logs, and the figures of
sweeps computed again from the losses next to them.

evidence/published/history.csv: status record, retiming or claim; scope parametric or retrieval (text outside
the document is looked up); steps and tokens of the code as merged; val_loss: mean of the runs that its author
published (README lists or logs), which from record 65 on were often made with other step counts than those
merged; effect_steps and effect_loss: change by the whole record, where its authors or logs state one
(negative is better). evidence/published/effects.csv: path of the setting (empty if no one setting is the
technique), measure loss (nats), steps or seconds, effect of adding the technique (negative is better), n runs
(empty: not stated), who says so.
"""

import csv
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import files, untrusted
from common.errors import UserError
from evidence import statistics, verify
from settings import deltas, renames, schema
from settings.scales import SCALES
from sweeps import report as sweep_report
from runlog import read_chain

ROOT = deltas.RECORDS.parent
EVIDENCE = ROOT / "evidence/results"
PUBLISHED = ROOT / "evidence/published"
# the lineage of this project's own branches: nothing published, no place in history and worth table
VARIANTS = "variants"
SWEEPS = ("ablate", "chain", "axis")
SWEEP_KEYS = {
    "version", "kind", "name", "base", "scale", "confidence", "method", "hardware", "control", "rows"
}
# Trained on machines that do other work meanwhile.
CPU_SCALES = tuple(name for name, scale in SCALES.items() if scale.embedded)
FLAGS = {"--set": "sets", "--with": "with_", "--without": "without", "--revert": "revert"}


def gather(evidence: Path = EVIDENCE) -> dict[str, Any]:
    """Everything the pages say, as plain data."""
    records, judge = deltas.load_records(), evidence / "judge.json"
    claims = {ref: read_claims(record) for ref, record in records.items()}
    runs = {ref: read_runs(record, claims[ref]) for ref, record in records.items()}
    return {
        "records": records, "claims": claims, "runs": runs, "history": read_history(records),
        "effects": read_effects(), "sweeps": read_sweeps(evidence),
        "judge": read_json(judge) if judge.exists() else None
    }


# ----- reading ----------------------------------------------------------------------------------------------

def read_rows(path: Path, numbers: list[str]) -> list[dict[str, Any]]:
    """Rows of a CSV file as dicts; the named columns become numbers, or None where empty."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise UserError(f"{path}: line {line} has not as many columns as the first")
        for name in numbers:
            try:
                row[name] = None if row[name] == "" else float(row[name])
            except ValueError:
                raise UserError(f"{path}: line {line}: {name} is not a number: {row[name]!r}") from None
    return rows


def read_history(records: dict[str, deltas.Record]) -> list[dict[str, Any]]:
    """Rows of published/history.csv, joined with the records here: those overrule title, date, people and
    kind.

    A record here that published/history.csv does not know (a new one) is added, unless it is a variant.
    Minutes that differ are an error: one is wrong.
    """
    path = PUBLISHED / "history.csv"
    rows = read_rows(path, ["minutes", "steps", "tokens", "val_loss", "runs", "effect_steps", "effect_loss"])
    for row in rows:
        row["ref"] = f"{row['lineage']}/{row['id']}"
        row["people"] = row["people"].split("; ")
        record = records.get(row["ref"])
        row["here"] = record is not None
        if record:
            minutes = record.published.get("minutes", row["minutes"])
            if minutes != row["minutes"]:
                raise UserError(f"{path}: {row['ref']} took {row['minutes']:g} minutes, by "
                                f"{record.folder.name}/record.toml {minutes:g}: correct the wrong one")
            row |= {"title": record.title, "date": record.date, "people": record.people, "kind": record.kind}
    known = {row["ref"] for row in rows}
    return rows + [
        new_row(record) for ref, record in records.items() if ref not in known and not is_variant(ref)
    ]


def new_row(record: deltas.Record) -> dict[str, Any]:
    """The history row of a record that published/history.csv does not know."""
    lineage, _, name = record.ref.partition("/")
    empty = dict.fromkeys(("steps", "tokens", "effect_steps", "effect_loss"))
    empty["steps"] = record.published.get("steps") if record.claimed else None
    return {"ref": record.ref, "lineage": lineage, "id": name, "date": record.date,
            "status": "claim" if record.claimed else "record",
            "scope": "parametric", "kind": record.kind, "people": record.people, "title": record.title,
            "minutes": record.published.get("minutes"), "val_loss": record.published.get("val_loss"),
            "runs": record.published.get("runs"), **empty, "tokens_per_step": "", "note": "", "here": True}


def read_effects() -> list[dict[str, Any]]:
    """Rows of effects.csv: published worths of techniques, checked."""
    path = PUBLISHED / "effects.csv"
    rows = read_rows(path, ["effect", "n"])
    for line, row in enumerate(rows, 2):
        if row["measure"] not in ("loss", "steps", "seconds"):
            raise UserError(
                f"{path}: line {line}: measure must be loss, steps or seconds, not {row['measure']!r}"
            )
        if row["path"]:
            row["path"] = renames.present_path(row["path"])
            schema.find_field(row["path"])
    return rows


def read_json(path: Path) -> Any:
    """The value of a JSON file. UserError if it is damaged."""
    try:
        return untrusted.json_file(path)
    except UserError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}): write it again or remove it") from None


def read_sweeps(folder: Path) -> list[dict[str, Any]]:
    """The sweeps of an evidence folder, by name. Every arm says whether its settings are still those of the
    code.

    UserError if a mean, effect, interval or p is not what the losses in the same file give.
    """
    sweeps = []
    for path in files.listed(folder, "*.json"):
        sweep = read_json(path)
        if path.stem == "judge" or not isinstance(sweep, dict) or sweep.get("kind") not in SWEEPS:
            continue
        if lacking := SWEEP_KEYS - set(sweep):
            raise UserError(
                f"{path}: it lacks {', '.join(sorted(lacking))}: write it again with sweep.py or remove it"
            )
        try:
            about = base_of(sweep["base"])
            if wrong := misstated(sweep):
                raise UserError(f"{path}: {wrong}: not what its own losses give; write it again with "
                                "sweep.py or remove it")
            for row in sweep["rows"]:
                row["current"] = is_current(sweep, row)
            sweeps.append({**sweep, "file": f"evidence/results/{path.name}", "about": about})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: not a sweep's evidence ({error!r}): write it again with sweep.py or remove it"
            ) from None
    return sweeps


def misstated(sweep: dict) -> str:
    """The first figure of a sweep that its losses do not give, '' if there is none."""
    by_label = {row["arm"]: row for row in (sweep["control"], *sweep["rows"])}
    for label, row in by_label.items():
        about = statistics.describe(finished(row)) if finished(row) else {"n": 0, "mean": None, "sd": None}
        if wrong := [k for k in ("n", "mean", "sd") if apart(row[k], about[k])]:
            return f"{label}: {wrong[0]}"
    measured = [row for row in sweep["rows"] if row["effect"] is not None]
    if not measured:
        return ""
    if sweep["method"] != sweep_report.METHODS[bool(sweep.get("paired"))]:
        return f"method: {sweep['method']!r} is stated anew by `python sweep.py report FILE.json`"
    found = sweep_report.recomputed(sweep)
    for row in measured:
        wrong = [
            k for k in ("effect", "low", "high", "p", "resolved")
            if apart(row[k], found["rows"][sweep_report.key_of(row)][k])
        ]
        if wrong:
            return f"{row['arm']}: {wrong[0]}"
    return next((k for k in ("pooled_sd", "df") if apart(sweep[k], found[k])), "")


def finished(row: dict) -> list[float]:
    """The final losses of an arm by seed; a diverged run has none."""
    return [
        r["val_loss"] for r in sorted(row["runs"], key=lambda r: r["seed"])
        if r.get("status", "finished") == "finished"
    ]


def apart(a: float | None, b: float | None) -> bool:
    """Are two figures different beyond rounding (another scipy, another order of sums)?"""
    return (
        a != b if None in (a, b) or isinstance(b, bool)
        else not math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    )


def is_current(sweep: dict, row: dict) -> bool | None:
    """Do the arm's settings still resolve to the hash its runs logged? (None if no run logged one)"""
    hashes = {r["ml_hash"] for r in row["runs"]}
    changes = [*sweep.get("common", []), *row["changes"]]
    return (
        hashes == {expected_hash(row.get("record") or sweep["base"], sweep["scale"], changes)} if hashes
        else None
    )


def expected_hash(name: str, scale: str, changes: list[str]) -> str | None:
    """ml_hash that the code gives to a record with changes ("--without x"), None if it refuses them now."""
    found = {name: [] for name in FLAGS.values()}
    try:
        for change in changes:
            flag, _, value = renames.present_change(change).partition(" ")
            found[FLAGS[flag]].append(value.strip())
        return schema.ml_hash(deltas.resolve_name(name, scale=scale, **found).settings)
    except (UserError, KeyError):
        return None


def base_of(base: str) -> str:
    """Ref of the record a sweep is about: its base, the last of FIRST..LAST or of a lineage, or a preset's
    record."""
    name = f"{base}/head" if base in deltas.LINEAGES else base.split("..")[-1]
    return (
        deltas.resolve_name(name).record.ref if name in deltas.preset_names()
        else deltas.find_record(name).ref
    )


def read_claims(record: deltas.Record) -> list[dict[str, Any]]:
    """What `records verify` finds of the claims in a record's folder: results.json and `where` it lies,
    refused or not.

    UserError if a results.json says anything else than its logs do now.
    """
    found = []
    for path in files.listed(record.folder, "**/results.json"):
        # part of the claim that it reproduces
        if verify.REPRODUCTION in path.relative_to(record.folder).parts:
            continue
        results = read_json(path)
        if (
            isinstance(results, dict) and results.get("claim") in ("ml", "systems")
            and record.answers(results.get("record"))
        ):
            wrong = verify.differences(results, json.loads(files.json_text(verify.verify(path.parent))))
            if wrong:
                raise UserError(f"{path}: {wrong[0]} is not what its logs give: run `records verify` on its "
                                "folder, and see what it says")
            found.append({**results, "where": path.parent.relative_to(ROOT).as_posix()})
    return found


def read_runs(record: deltas.Record, claims: Sequence[dict] = ()) -> list[dict[str, Any]]:
    """The committed finished runs of a record as it is, without changes: summary, curve [step, tokens, ms,
    loss], `current`.

    Of a claim only the runs that count for the record (not its discarded ones, not its parent's). The chain
    must hold and the summary must end at its loss; whether it follows from the chain in every field is for
    `records verify` to say.
    """
    counted = {f"{c['where']}/runs/{r['folder']}" for c in claims if "statistics" in c
               for r in c["statistics"]["arms"]["new"]["runs"]}
    runs = []
    for path in files.listed(record.folder, "**/run.jsonl"):
        folder = path.parent.relative_to(ROOT).as_posix()
        claimed = (path.parents[2] / "manifest.jsonl").exists()
        if claimed and folder not in counted:
            continue
        summary, events = read_json(path.parent / "summary.json"), read_chain(path)
        if files.strict(summary.get("val_loss")) != files.strict(events[-1].get("val_loss")):
            raise UserError(
                f"{path.parent}/summary.json: its val_loss is not the last one of run.jsonl next to it"
            )
        if (summary["record"], summary["changes"], summary["status"]) != (record.ref, [], "finished"):
            continue
        curve = [
            [e["step"], e["tokens"], e["train_time_ms"], e["val_loss"]] for e in events
            if e["kind"] == "validation"
        ]
        runs.append({**summary, "curve": curve, "folder": folder, "claimed": claimed,
                     "current": expected_hash(record.ref, summary["scale"], []) == summary["ml_hash"]})
    return runs


# ----- small answers ----------------------------------------------------------------------------------------

def mean_and_sd(values: list[float]) -> tuple[float, float | None]:
    """(mean, sd with n - 1 or None)."""
    about = statistics.describe(values)
    return about["mean"], about["sd"]


def at_scale(runs: list[dict], scale: str) -> list[dict]:
    """The runs of one scale that the code would still give, or all of that scale if none is current."""
    found = [r for r in runs if r["scale"] == scale]
    return [r for r in found if r["current"]] or found


def has_times(scale: str, interleaved: bool) -> bool:
    """Are the training times of runs at a scale data?

    At a CPU scale only those of a declared plan, which runs its arms in turns, in random order and one at a
    time (`interleaved`: compare, submit). A single run measures what else the machine did: record 28 took 453
    s, its parent 136 s. A sweep goes on with any number of workers at once, in a fixed order: times of one
    arm differ by factors of up to 92.
    """
    return interleaved or scale not in CPU_SCALES


def hardware(about: dict) -> str:
    """The machine a run or a sweep names: its GPUs, or its CPU with the device line; later logs add an
    anonymous id."""
    device, cpu = about.get("hardware") or about.get("device") or "machine not named", about.get("cpu")
    name = f"{cpu}; {device}" if cpu and device.startswith("CPU") else device
    return name + (f"; machine {about['machine']}" if about.get("machine") else "")


def order_of(site: dict, ref: str) -> int:
    """Sorting key of a record of any lineage: its place in the history, after which the variants come."""
    refs = [row["ref"] for row in site["history"]] + list(variants_of(site))
    return refs.index(ref) if ref in refs else len(refs)


def is_variant(ref: str) -> bool:
    """True for records of the lineage of variants."""
    return ref.startswith(VARIANTS + "/")


def variants_of(site: dict) -> dict[str, deltas.Record]:
    """Ref -> record of the variants."""
    return {ref: r for ref, r in site["records"].items() if is_variant(ref)}


def claims_of(site: dict) -> dict[str, deltas.Record]:
    """Ref -> record of the claimed results: deltas with their authors' figures, which are no records."""
    return {ref: r for ref, r in site["records"].items() if r.claimed}


def claim_rows(site: dict) -> list[tuple[str, deltas.Record, dict, dict | None]]:
    """[(ref, record, z rule, pairwise rule against its parent or None)] of the claims with figures.

    Both rules are the optimizer track's (evidence.statistics), on published means.
    """
    rows = []
    for ref, r in claims_of(site).items():
        mine, theirs = r.published, site["records"][r.parent].published
        if {"mean", "runs"} <= mine.keys():
            pair = statistics.z_pairwise(
                mine["mean"], mine["runs"], theirs["mean"], theirs["runs"], theirs["steps"] - mine["steps"]
            ) if {"mean", "runs", "steps"} <= theirs.keys() else None
            target = r.settings.validation.target
            rows.append((ref, r, statistics.z_rule(mine["mean"], mine["runs"], target), pair))
    return rows


def head(site: dict, lineage: str = "short") -> str:
    """The latest record of a lineage."""
    return [ref for ref, r in site["records"].items() if ref.startswith(lineage + "/") and not r.claimed][-1]


def marker(site: dict, h: dict) -> str:
    """full, here or absent: how much of a published record exists here."""
    if any(r["scale"] == "full" for r in site["runs"].get(h["ref"], [])):
        return "full"
    return "here" if h["here"] else "absent"


def duration(minutes: float | None) -> str:
    """'45 min', '1.23 min', or '39.9 s' below one minute."""
    if minutes is None:
        return "no time"
    return f"{minutes:g} min" if minutes >= 1 else f"{60 * minutes:.3g} s"


# ----- measured worth ---------------------------------------------------------------------------------------

def measure(sweep: dict, row: dict, sign: int) -> dict[str, Any]:
    """A sweep's row as worth: loss saved by the technique (sign -1 for effects of adding it), with interval
    and facts."""
    runs = {a["arm"]: a["n"] for a in (sweep["control"], *sweep["rows"])}
    out = {
        "n": row["n"], "n_control": runs.get(row.get("parent") or sweep["control"]["arm"]),
        "name": sweep["name"], "scale": sweep["scale"], "base": sweep["base"], "about": sweep["about"],
        "hardware": hardware(sweep), "grade": row.get("grade") or sweep.get("grade") or "hashes only",
        "current": row["current"], "complete": sweep.get("complete", True), "note": row.get("note", ""),
        "resolved": bool(row["resolved"]), "worth": None, "low": None, "high": None
    }
    if row["effect"] is None:
        return out | {"resolved": False}
    if row["low"] is not None:
        out["low"], out["high"] = sorted(sign * x for x in (row["low"], row["high"]))
    return out | {"worth": sign * row["effect"]}


def ablated(changes: list[str]) -> tuple[str, str] | None:
    """What one leave-one-out arm leaves out: ('path', P), ('record', R), or None for an arm with several
    changes."""
    flag, _, what = changes[0].partition(" ") if len(changes) == 1 else ("", "", "")
    what = what.strip()
    if flag == "--revert":
        return "record", deltas.find_record(what).ref
    return ("path", renames.present_path(what)) if flag == "--without" else None


def difference(m: dict) -> dict[str, Any]:
    """The row of what was added as the change of the loss: effect, low, high (negative is better) and
    resolved."""
    effect, low, high = (None if x is None else -x for x in (m["worth"], m["high"], m["low"]))
    return {"effect": effect, "low": low, "high": high, "resolved": m["resolved"]}


def sweeps_of(site: dict, kind: str, scale: str | None, variants: bool = False) -> list[dict]:
    """The sweeps of a kind at a scale, of records or of variants, the best last.

    Better is: a newer base, nothing else changed, complete, more runs of the control.
    """
    found = [
        s for s in site["sweeps"]
        if (s["kind"], s["scale"], is_variant(s["about"])) == (kind, scale, variants)
    ]
    return sorted(
        found,
        key=lambda s: (
            order_of(site, s["about"]), not s.get("common"), s.get("complete", True), s["control"]["n"]
        ),
    )


def added_at(site: dict, scale: str | None, variants: bool = False) -> dict[str, dict]:
    """Record, or variant -> measure of it against its parent, by the sweep that has most runs of it as it is
    today."""
    best = {}
    for sweep in sweeps_of(site, "chain", scale, variants):
        for row in sweep["rows"]:
            found = (row["current"], not sweep.get("common"), sweep.get("complete", True), row["n"])
            if (
                is_variant(row["record"]) == variants and is_child(site, row)
                and found >= best.get(row["record"], (found,))[0]
            ):
                best[row["record"]] = found, measure(sweep, row, -1)
    return {record: m for record, (_, m) in best.items()}


def variants_measured(site: dict) -> dict[str, dict[str, dict]]:
    """{scale: {variant: measure of it against its parent}} of the scales that a sweep of variants was made
    at."""
    return {scale: found for scale in SCALES if (found := added_at(site, scale, variants=True))}


def is_child(site: dict, row: dict) -> bool:
    """Is a row of a chain a record against its parent? A lineage's sweep also compares parents with earlier
    ones."""
    record = site["records"].get(row["record"])
    return not (record and "parent" in row) or row["parent"] == record.parent


def today_at(site: dict, scale: str | None) -> dict[tuple[str, str], dict]:
    """('path', P), ('record', R) or ('arm', label) -> measure of leaving it out, from the newest base that
    was swept."""
    return {ablated(row["changes"]) or ("arm", row["arm"]): measure(sweep, row, +1)
            for sweep in sweeps_of(site, "ablate", scale) for row in sweep["rows"]}


def setter(ref: str, path: str) -> str:
    """The record of a chain that set a path last."""
    links = deltas.chain(deltas.find_record(ref))
    found = [r.ref for r in links if path in r.delta or any(p in r.delta for p in schema.prefixes(path))]
    return found[-1] if found else ref


def has_link(ref: str, link: str) -> bool:
    """Is a record one of those that another one is built on, or itself?"""
    return any(r.ref == link for r in deltas.chain(deltas.find_record(ref)))


def short_doc(path: str) -> str:
    """The meaning of a setting in a few words: its line up to the first remark."""
    if path not in schema.fields():
        return path
    text = re.split(r"; |: |\. | \((?=\w{3})", schema.fields()[path].metadata["doc"].replace("`", ""))[0]
    return text if text[1:2].isupper() else text[:1].upper() + text[1:]


def techniques(site: dict, scale: str | None) -> list[dict[str, Any]]:
    """Every technique once: [{key, title, record, added, today, published}], measured at one scale where it
    was.

    A record stands for its whole delta (added: against its parent; today: the chain without it); a path for
    one feature (today: switched off). Published effects join by path; those without a path stand alone.
    """
    titles, rows = {h["ref"]: h["title"] for h in site["history"]}, {}

    def row(key, title, record):
        new = {"key": key, "title": title, "record": record, "added": None, "today": None, "published": []}
        return rows.setdefault(key, new)

    for ref, m in added_at(site, scale).items():
        row(("record", ref), titles.get(ref, ref), ref)["added"] = m
    for (kind, what), m in today_at(site, scale).items():
        title = {"record": titles.get(what, what), "path": short_doc(what), "arm": what}[kind]
        record = {"record": what, "path": setter(m["about"], what), "arm": m["about"]}[kind]
        row((kind, what), title, record)["today"] = m
    for effect in site["effects"]:
        key = ("path", effect["path"])
        today = rows.get(key, {}).get("today")
        # a path that is swept in an earlier record is another technique there: 33's skips are not 45's
        if not effect["path"] or today and not has_link(today["about"], effect["record"]):
            key = ("effect", effect["record"] + " " + effect["technique"])
        found = row(key, effect["technique"], effect["record"])
        found["title"] = effect["technique"]
        found["published"].append(effect)
    for h in site["history"]:
        if ("record", h["ref"]) in rows and (h["effect_loss"] is not None or h["effect_steps"]):
            rows["record", h["ref"]]["published"].append(whole_record(h))
    return sorted(rows.values(), key=lambda r: (order_of(site, r["record"]), r["key"][0] != "record"))


def whole_record(h: dict) -> dict[str, Any]:
    """The published effect of a whole record, from published/history.csv: loss at equal steps if stated, else
    steps."""
    loss = h["effect_loss"] is not None
    return {"measure": "loss" if loss else "steps", "effect": h["effect_loss"] if loss else h["effect_steps"],
            "n": h["runs"], "source": "the whole record", "note": h["note"]}


def ranked(rows: list[dict], column: str) -> dict[tuple[str, str], int]:
    """key -> rank by worth in a column; only what is resolved takes part, and no arm with several features
    off."""
    best = sorted((r for r in rows if r[column] and r[column]["resolved"] and r["key"][0] != "arm"),
                  key=lambda r: -r[column]["worth"])
    return {r["key"]: i for i, r in enumerate(best, 1)}


def scales_measured(site: dict) -> list[str]:
    """Scales with a sweep of records or features, largest first."""
    return [s for s in SCALES if any(sweeps_of(site, kind, s) for kind in ("ablate", "chain"))]


# ----- small scale against published ------------------------------------------------------------------------

def predictions(site: dict, scale: str) -> dict[str, Any]:
    """Pairs of (published, measured at a small scale), for features and for whole records, with the rank
    correlation.

    features: loss saved on both sides. records: tokens to the target saved, per cent of the parent's, against
    the loss saved at equal tokens; systems and retimed records change no result and are left out.
    """
    features = [
        {
            "label": r["title"], "tag": r["key"][1].split(".")[-1], "record": r["record"],
            "x": -effect["effect"], "y": r["today"]["worth"], "resolved": r["today"]["resolved"]
        }
        for r in techniques(site, scale)
        if r["key"][0] == "path" and r["today"] and r["today"]["worth"] is not None
        for effect in r["published"]
        if effect["measure"] == "loss"
    ]
    by_ref, records = {h["ref"]: h for h in site["history"]}, []
    for ref, m in added_at(site, scale).items():
        child, parent = by_ref[ref], by_ref.get(site["records"][ref].parent)
        if (
            parent and child["tokens"] and parent["tokens"] and m["worth"] is not None
            and child["kind"] in ("ml", "both")
        ):
            records.append({"label": child["title"], "tag": child["id"], "record": ref, "y": m["worth"],
                            "x": 100 * (1 - child["tokens"] / parent["tokens"]), "resolved": m["resolved"]})
    return {"scale": scale, "features": with_correlation(features), "records": with_correlation(records)}


def with_correlation(points: list[dict]) -> dict[str, Any]:
    """Points with Spearman's rank correlation of x and y, to three digits (None below three points)."""
    found = {"rho": None, "low": None, "high": None}
    if len(points) >= 3:
        found = statistics.rank_correlation([p["x"] for p in points], [p["y"] for p in points])
    return {
        "points": points,
        **{k: None if found[k] is None else round(found[k], 3) for k in ("rho", "low", "high")},
    }
