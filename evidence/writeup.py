"""The pages of a claim: README.md, and the layout that KellerJordan/modded-nanogpt takes.
Every number is from results.json.

Who is credited: the people of record.toml, those of the parent, and for each line of the delta what the
vocabulary says about the setting (which names papers) and which record brought it in.
"""

import dataclasses
import re
import uuid
from pathlib import Path
from typing import Any

import runlog
from common import files, untrusted
from common.errors import UserError
from common.printable import printable
from evidence import provenance
from settings import deltas, schema


def read_results(folder: Path | str) -> dict:
    """The results.json of a claim folder."""
    try:
        return untrusted.json_file(Path(folder) / "results.json")
    except UserError:
        raise UserError(f"{folder}: no whole results.json: run `records verify {folder}` first") from None


def record_of(folder: Path | str, results: dict) -> deltas.Record:
    """The claimed Record, from the claim folder or this checkout."""
    return provenance.read_carried(Path(folder), results["record"]) or deltas.find_record(results["record"])


def show(value: float | None, form: str, missing: str = "-") -> str:
    """A number in a format, or `missing` for None."""
    return missing if value is None else format(value, form)


def seconds(row: dict, key: str) -> float | None:
    """A statistic of training times in seconds, or None."""
    return None if row["time_ms"] is None or row["time_ms"][key] is None else row["time_ms"][key] / 1000


# ----- README -----------------------------------------------------------------------------------------------

PAGE = "README.md"


def readme(folder: Path | str, results: dict | None = None, at: Path | str | None = None) -> str:
    """Text of DIR/README.md; results: those of `records verify`, if not yet in results.json. at: where the
    claim folder lies, if `folder` is a copy."""
    results = results or read_results(folder)
    record, results = tame_record(record_of(folder, results)), tame(results)
    return "\n".join([
        *heading(record, results), *table(results), *findings(results), *credits(record), *limits(results),
        "## Check", "", f"    python -m records verify {place(at or folder)}", ""
    ])


def tame(value: Any, lines: bool = False) -> Any:
    """A plain value whose texts begin no HTML and no link and end no cell or line of a page. lines: keep line
    ends."""
    if isinstance(value, str):
        text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", printable(value, lines)).replace("|", "\\|")
        return re.sub(r"\](?=[(\[:])", r"]\\", text)
    if isinstance(value, dict):
        return {key: tame(inner) for key, inner in value.items()}
    return [tame(inner) for inner in value] if isinstance(value, list) else value


def tame_record(record: deltas.Record) -> deltas.Record:
    """A Record whose texts are tame."""
    return dataclasses.replace(
        record, title=tame(record.title), people=tame(record.people), notes=tame(record.notes, lines=True),
        subsumed=tame(record.subsumed))


def place(folder: Path | str) -> Path | str:
    """How the claim folder is named from the top of the checkout."""
    folder = Path(folder).resolve()
    return folder.relative_to(runlog.ROOT.resolve()) if folder.is_relative_to(
        runlog.ROOT.resolve()) else folder.name


def heading(record: deltas.Record, results: dict) -> list[str]:
    """Lines of the README: title, people, claim, verdict."""
    words = {"shown": "SHOWN", "not shown": "NOT SHOWN"}[results["verdict"]]
    size = "" if results["scale"] == "full" else ", a small image of the record, not the record itself"
    out = [
        f"# {record.ref}: {record.title}",
        "",
        f"By {', '.join(record.people)}, {record.date}, on {record.parent}.",
        "",
    ]
    out += [f"Claim: {results['claim']} at scale `{results['scale']}`{size}. **{words}**; evidence: "
            f"{results['grade']}.", ""]
    out += [f"- {r}" for r in results["reasons"]] + [""] * bool(results["reasons"])
    out += [*(f"> {line}".rstrip() for line in record.notes.splitlines()), ""] if record.notes else []
    out += [f"No setting changes: {record.subsumed}", ""] if record.subsumed else []
    if record.delta:
        out += [
            "```toml", *(f'"{path}" = {schema.show(value)}' for path, value in record.delta.items()), "```",
            ""
        ]
    return out


def table(results: dict) -> list[str]:
    """One row an arm; what was declared; where it ran."""
    rows = [
        "| arm | record | runs | steps | loss | sd | seconds | sd | before the clock: start, warm-up (s) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["statistics"]["arms"].items():
        arm, loss = results["arms"][name], row["loss"] or {"mean": None, "sd": None}
        untimed = "{start:.1f}, {warmup:.1f}".format(**row["untimed_s"]) if row["untimed_s"] else "-"
        rows.append(
            f"| {name} | {arm['record']} | {row['n']} | {arm['steps']} | {show(loss['mean'], '.5f')} | "
            f"{show(loss['sd'], '.5f')} | {show(seconds(row, 'mean'), '.3f')} | "
            f"{show(seconds(row, 'sd'), '.3f')} | {untimed} |"
        )
    looks = results["plan"].get("looks")
    plan = f"{results['plan']['runs']} runs of each arm" if looks is None else "looks at " + ", ".join(
        f"{x['runs']} (alpha {x['alpha']:.4g})" for x in looks)
    excluded = [f"- excluded: run {x['run']} ({x['arm']}, seed {x['seed']}), {x['cause']}: {x['note']}"
                for x in results["excluded"]]
    changes = results["arms"]["new"]["changes"]
    return ["## Runs", "", *rows, "", f"Declared {results['declared']}: {plan}, alpha {results['alpha']}, "
            f"{'paired by seed' if results['pairing'] == 'seed' else 'not paired'}, in random order on one "
            f"machine after one discarded run. {results['device']}, {results['cpu']}, torch "
            f"{results['torch']}"
            + (f"; all arms with {' '.join(changes)}" if changes else "") + ".", *excluded, ""]


def findings(results: dict) -> list[str]:
    """Lines of the README: what the statistics say."""
    s, out = results["statistics"], []
    if s.get("target"):
        t = s["target"]
        out.append(f"- target {t['target']:g}: mean {t['mean']:.5f} over {t['n']} runs, one-sided t test p = "
                   f"{show(t['p'], '.4g')}, needed p < {s['alpha']:.4g}")
    if s.get("time"):
        t = s["time"]
        out.append(f"- time: {t['estimate']:.4f} of the parent's (95 % interval {show(t['low'], '.4f')} to "
                   f"{show(t['high'], '.4f')}), one-sided p = {show(t['p_less'], '.4g')}")
    if s.get("loss"):
        x = s["loss"]
        out.append(
            f"- loss: {x['estimate']:+.5f} against the parent (95 % interval {show(x['low'], '+.5f')} to "
            f"{show(x['high'], '+.5f')})"
        )
    if s.get("noninferior"):
        x = s["noninferior"]
        out.append(f"- loss against {x['against']}: {x['estimate']:+.5f}, upper bound "
                   f"{show(x['upper'], '+.5f')}, margin {x['margin']}")
    if s.get("parity") and s["parity"]["rows"]:
        rows = s["parity"]["rows"]
        out.append(f"- parity with the parent, seed by seed ({s['parity']['precision']}): loss within "
                   f"{max(r['loss'] for r in rows):.1e}, first training losses within "
                   f"{max(r['train_loss'] for r in rows):.1e}, gradients within "
                   f"{max(r['worst'] for r in rows):.1e} (relative)")
    return ["## What they show", "", *out, ""]


def credits(record: deltas.Record) -> list[str]:
    """Whose ideas these are."""
    out, records = [], deltas.load_records()
    if record.parent in records:
        parent = records[record.parent]
        out.append(f"- built on {parent.ref} ({parent.title}) by {', '.join(parent.people)}, and on every "
                   "record before it")
    for path in record.delta:
        try:
            doc = schema.find_field(path).metadata["doc"]
        except UserError:
            doc = "a setting that this checkout does not know"
        first = next((r for r in deltas.chain(record) if any(
            p == path or p in schema.prefixes(path) or path in schema.prefixes(p) for p in r.delta)), record)
        since = "new here" if first.ref == record.ref else f"since {first.ref} by {', '.join(first.people)}"
        out.append(f"- `{path}`: {doc} ({since})")
    return ["## Credits", "", *out, ""]


def limits(results: dict) -> list[str]:
    """Lines of the README: what these runs cannot show."""
    scale = results["scale"]
    out = [] if scale == "full" else [
        f"- what the change does at full scale: these runs are of scale `{scale}`"
    ]
    grades = {
        "consistent": [
            "- whether the code is causal, normalised and resets its state: it was not audited",
            "- whether anybody else gets these numbers: it was not reproduced",
        ],
        "audited": ["- whether anybody else gets these numbers: it was not reproduced"],
    }.get(results["grade"], [])
    return ["## What was not measured", "", *out, *grades, *(f"- {u}" for u in results["unknown"]), ""]


# ----- upstream's layout ------------------------------------------------------------------------------------

GROUPS = {"new": "this_pr", "parent": "baseline", "base": "last_ml_record"}


def upstream(folder: Path | str) -> Path:
    """Write DIR/upstream/<date>_<Name>/: README.md, statistics.md, a log per run in this_pr/ and baseline/.

    A log is source, a ruler, environment and settings, a ruler, and the lines `step:S/T val_loss:X
    train_time:Yms step_avg:Zms`; its name is a uuid, made from the hash of its run. Returns the folder.
    """
    folder, results = Path(folder), read_results(folder)
    record = record_of(folder, results)
    name = "".join(word.capitalize()
                   for word in record.slug.split("_")) or f"Record{record.ref.partition('/')[2]}"
    out = folder / "upstream" / f"{results['declared'][:10]}_{name}"
    for arm, row in results["statistics"]["arms"].items():
        for run in row["runs"]:
            path = (
                out / GROUPS[arm]
                / f"{uuid.uuid5(uuid.NAMESPACE_URL, run['last_hash'] or str(run['run']))}.txt"
            )
            files.write(path, upstream_log(folder / "runs", run), parents=True)
    files.write(out / "README.md", upstream_readme(record, results), parents=True)
    files.write(out / "statistics.md", statistics_page(results))
    return out


def upstream_log(runs: Path, run: dict) -> str:
    """Text of one run in upstream's form; of a run without a log only that."""
    if run["folder"] is None:
        return f"run {run['run']}, seed {run['seed']}: {run['status']}, it left no log\n"
    events = runlog.read_chain(runs / run["folder"] / "run.jsonl")
    source, problem = provenance.read_sources(runs, events[0]["sources"])
    if problem:
        raise UserError(problem)
    start, *rest = runlog.render(events[0])
    lines = [
        line for event in events if event["kind"] in ("validation", "end") for line in runlog.render(event)
    ]
    return "\n".join([source.rstrip("\n"), *rest, *lines]) + "\n"


def upstream_readme(record: deltas.Record, results: dict) -> str:
    """The README of a submission in the form of the modded-nanogpt repository."""
    record, results = tame_record(record), tame(results)
    s = results["statistics"]
    new, parent = (s["arms"][k] for k in ("new", "parent"))
    out = [
        f"# {record.title}",
        "",
        f"By {', '.join(record.people)}. On {record.parent} (`baseline/`), both run in turns on "
        f"one machine: {results['device']}, torch {results['torch']}.",
        "",
        "```",
        *(f"{p} = {schema.show(v)}" for p, v in record.delta.items()),
        "```",
        "",
        f"- steps: {results['arms']['parent']['steps']} -> {results['arms']['new']['steps']}",
        f"- time: {show(seconds(parent, 'mean'), '.3f')} s -> {show(seconds(new, 'mean'), '.3f')} s (mean of "
        f"{parent['n']} and {new['n']} runs)",
    ]
    if new["loss"] and parent["loss"]:
        out.append(f"- validation loss: {parent['loss']['mean']:.5f} -> {new['loss']['mean']:.5f}")
    if s.get("target"):
        t = s["target"]
        out.append(f"- one-sided t test against {t['target']:g}: p = {show(t['p'], '.4g')} (statistics.md)")
    if results["scale"] != "full":
        out.append(f"- these runs are of scale {results['scale']}: no claim at full size")
    return (
        "\n".join(
            [
                *out, "",
                "The runs were declared before the first one; manifest, hash-chained logs and settings: the "
                f"claim folder of {record.ref}.", "", *credits(record)
            ]
        )
        + "\n"
    )


def statistics_page(results: dict) -> str:
    """The losses, and the test as upstream types it."""
    s, out = results["statistics"], ["# Statistics", ""]
    for name, row in s["arms"].items():
        losses = [show(r["val_loss"], ".6f", r["status"]) for r in row["runs"]]
        times = [show(r["train_time_ms"], ".0f") for r in row["runs"]]
        seeds = ", ".join(str(r["seed"]) for r in row["runs"])
        out += [f"`{GROUPS[name]}/` ({results['arms'][name]['record']}), seeds {seeds}", "", "```python",
                f"losses = [{', '.join(losses)}]", f"times_ms = [{', '.join(times)}]", "```", ""]
    if s.get("target"):
        t = s["target"]
        out += ["```python", "import scipy.stats", f"print(scipy.stats.ttest_1samp(losses, {t['target']:g}, "
                f"alternative=\"less\").pvalue)  # losses of this_pr: {show(t['p'], '.6g')}", "```", ""]
    looks = results["plan"].get("looks")
    if looks:
        out += [
            "The number of runs was decided by looks declared before: "
            + ", ".join(f"{x['runs']} runs at alpha {x['alpha']:.4g}" for x in looks)
            + f"; {len(results['looks'])} were taken.", ""
        ]
    if s.get("time"):
        t = s["time"]
        out += [f"time: {t['estimate']:.4f} of the baseline's, 95 % interval {show(t['low'], '.4f')} to "
                f"{show(t['high'], '.4f')}, one-sided p = {show(t['p_less'], '.4g')}", ""]
    return re.sub(r"\n+\Z", "\n", "\n".join(out))
