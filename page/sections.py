"""site/index.html: the template filled in. Tables are written here, so that the page says everything without
a script; charts are drawn by page.js from the JSON at the end of the page."""

import csv
import functools
from html import escape
from pathlib import Path
from typing import Any

import schedule
from common import files
from common.errors import UserError
from common.lines import plural
from page import facts
from page.tags import NOTHING, chip, folded, interval, missing, number, table
from page.worth import CAUTION, evidence, sweep_line, worth
from settings import deltas, schema
from settings.scales import SCALES

HERE = Path(__file__).parent
CARDS = [
    "8 x NVIDIA H100", "1 x NVIDIA H100", "1 x NVIDIA H200", "1 x NVIDIA B200", "8 x NVIDIA A100",
    "1 x NVIDIA A100", "1 x NVIDIA L40S", "1 x NVIDIA GeForce RTX 5090", "1 x NVIDIA GeForce RTX 4090",
    "1 x NVIDIA GeForce RTX 3090"
]
STATES = {"full": "rerun", "here": "delta", "absent": "no"}


def page(site: dict) -> str:
    """The whole page as text."""
    def source(name):
        return (HERE / name).read_text(encoding="utf-8")

    content = {
        "summary": summary(site), "worth": worth(site), "history_table": history_table(site),
        "variants": variants(site), "boards": boards(site), "predict": predict(site), "rules": rules(site),
        "judge": judge(site["judge"]) + claims(site), "frontier": source("frontier.html"),
        "evidence": evidence(site), "style": source("style.css"), "script": source("page.js"),
        "data": data(site)
    }
    pieces = source("template.html").split("{{")
    return pieces[0] + "".join(
        content[name] + rest for name, _, rest in (p.partition("}}") for p in pieces[1:])
    )


def summary(site: dict) -> str:
    """Four figures, and a sentence on what has and has not been measured here."""
    published = [
        h for h in site["history"] if h["lineage"] == "short" and h["status"] == "record" and h["minutes"]
    ]
    first, last = published[0], published[-1]
    full = {ref for ref, runs in site["runs"].items() if any(r["scale"] == "full" for r in runs)}
    own, claims = len(facts.variants_of(site)), len(facts.claims_of(site))
    sweeps = sum(s["control"]["n"] + sum(r["n"] for r in s["rows"]) for s in site["sweeps"])
    figures = [
        (
            f"{facts.duration(first['minutes'])} → {facts.duration(last['minutes'])}",
            f"published records {first['id']} to {last['id']}, {first['date'][:4]} to {last['date'][:4]}",
        ),
        (len(site["records"]) - own - claims, "records here as deltas that run, "
                                              f"{plural(own, 'variant')} and {claims} claimed results"),
        (len(full), "records rerun here at full scale"),
        (sweeps, f"runs in {plural(len(site['sweeps']), 'committed sweep')}"),
    ]
    items = "".join(f"<li><b>{value}</b> <span>{escape(what)}</span></li>" for value, what in figures)
    about = [r for runs in site["runs"].values() for r in runs] + site["sweeps"]
    machines = sorted({facts.hardware(a) for a in about})
    where = (
        f"Everything measured here ran on: {'; '.join(machines)}." if machines
        else "Nothing has been measured here yet."
    )
    where += "" if full else " No published time has been reproduced: no record has been run at full scale."
    return f'<ul class="facts">{items}</ul>\n<p class="status">{escape(where)}</p>'


def history_table(site: dict) -> str:
    """The table of all published records, as HTML."""
    columns = ["record", ">date", ">published", "what", "by", "kind", ">steps", ">loss (runs)", "here"]
    rows = []
    for h in site["history"]:
        runs = f" ({h['runs']:g})" if h["runs"] is not None else ""
        note = "; ".join(filter(None, ["" if h["status"] == "record" else h["status"], h["note"]]))
        what = escape(h["title"]) + (f"<small>{escape(note)}</small>" if note else "")
        rows.append(
            [
                escape(h["ref"]), escape(h["date"]), facts.duration(h["minutes"]), what,
                escape(", ".join(h["people"])), escape(h["kind"]), f"{h['steps']:,.0f}" if h["steps"] else "",
                "" if h["val_loss"] is None else f"{h['val_loss']:g}{runs}", STATES[facts.marker(site, h)]
            ]
        )
    note = ("<p>Steps are those of the code as merged, the loss is the mean of the runs its author "
            "published; from record 65 on these were often made with other step counts.</p>")
    return folded(
        f"All {len(rows)} rows as a table", note + table(columns, rows, "Published records and claims")
    )


# ----- variants ---------------------------------------------------------------------------------------------

def variants(site: dict) -> str:
    """The variants: parent, delta and, at every scale where a sweep has measured it, the loss against the
    parent's."""
    measured = facts.variants_measured(site)
    columns = ["record", "parent", "what", "delta", *(f"loss minus parent's, {scale}" for scale in measured)]
    rows = []
    for ref, r in facts.variants_of(site).items():
        delta = "<br>".join(
            f"<code>{escape(f'{path} = {schema.show(value)}')}</code>" for path, value in r.delta.items()
        )
        notes = escape(r.notes.replace("`", ""))
        rows.append([escape(ref), escape(r.parent or ""), escape(r.title) + f"<small>{notes}</small>", delta,
                     *(difference_cell(found.get(ref)) for found in measured.values())])
    shown = table(columns, rows, "Variants, each against its parent")
    if not measured:
        return (
            missing(
                "No sweep of the variants is committed yet, so none was compared with its parent: "
                f"<code>python sweep.py chain {facts.VARIANTS}</code> runs them and their parents."
            )
            + shown
        )
    sources = [
        sweep_line(s) for scale in measured for s in facts.sweeps_of(site, "chain", scale, variants=True)
    ]
    return (
        '<ul class="sources"><li>' + "</li><li>".join(sources) + "</li></ul>"
        + (set(measured) != {"full"}) * CAUTION + shown
    )


def difference_cell(m: dict | None) -> str:
    """A variant's loss less its parent's, the interval, and the numbers of runs."""
    if not m or m["worth"] is None:
        return f"<small>{escape(m['note'])}</small>" if m and m["note"] else NOTHING
    found = facts.difference(m)
    value, bounds = number(found["effect"], sign=True), interval(found["low"], found["high"])
    text = (
        f"<b>{value}</b> {bounds}" if m["resolved"]
        else f'{value} {bounds} <span class="verdict">unresolved</span>'
    )
    text += (
        " " + chip("stale", "stale", "the code resolves these settings differently now")
        if m["current"] is False else ""
    )
    about = [
        f"n {m['n']} against {m['n_control']}", "" if m["complete"] else "interim, the sweep is incomplete",
        m["note"]
    ]
    return text + f"<small>{escape('; '.join(filter(None, about)))}</small>"


# ----- boards -----------------------------------------------------------------------------------------------

def board_entries(site: dict) -> dict[str, list[dict]]:
    """Machine -> rows {record, scale, n, loss, sd, seconds, rate, reached, current, what} of unchanged
    records.

    seconds and rate are None where times are no data (facts.has_times).
    """
    boards = {}
    for ref, runs in site["runs"].items():
        runs = [r for r in runs if not r["claimed"]]
        for machine, scale in sorted({(facts.hardware(r), r["scale"]) for r in runs}):
            members = [r for r in runs if (facts.hardware(r), r["scale"]) == (machine, scale)]
            loss, sd = facts.mean_and_sd([r["val_loss"] for r in members])
            timed = facts.has_times(scale, interleaved=False)
            boards.setdefault(machine, []).append(
                {
                    "record": ref, "scale": scale, "n": len(members), "loss": loss, "sd": sd,
                    "what": "committed runs",
                    "seconds": facts.mean_and_sd([r["train_time_ms"] / 1000 for r in members])[0] if timed
                    else None, "rate": facts.mean_and_sd([r["tokens_per_second"] for r in members])[0]
                    if timed else None,
                    "reached": all(r["reached"] for r in members) if members[0].get("target") else None,
                    "current": all(r["current"] for r in members)
                }
            )
        for claim in site["claims"][ref]:
            if entry := claim_entry(claim):
                boards.setdefault(facts.hardware(claim), []).append(entry)
    for sweep in site["sweeps"]:
        if sweep["kind"] == "axis" or sweep.get("common"):
            continue
        base = sweep["control"]["arm"] if sweep["kind"] == "chain" else sweep["base"]
        arms = [{**sweep["control"], "record": facts.base_of(base)}]
        for arm in arms + (sweep["rows"] if sweep["kind"] == "chain" else []):
            times = [r["train_time_ms"] / 1000 for r in arm["runs"]]
            timed = facts.has_times(sweep["scale"], interleaved=False)
            if arm["n"] and times:
                boards.setdefault(facts.hardware(sweep), []).append(
                    {
                        "record": arm["record"], "scale": sweep["scale"], "n": arm["n"], "loss": arm["mean"],
                        "sd": arm["sd"], "seconds": facts.mean_and_sd(times)[0] if timed else None,
                        "rate": None, "reached": None, "current": arm.get("current"),
                        "what": f"sweep {sweep['name']}"
                    }
                )
    return boards


def claim_entry(claim: dict) -> dict[str, Any] | None:
    """The board's row of a claim, from its results.json; None if it was refused or no run has a loss."""
    arm = claim.get("statistics", {}).get("arms", {}).get("new")
    if not arm or not arm["loss"]:
        return None
    changes = claim["arms"]["new"]["changes"]
    target = claim["statistics"].get("target")
    return {"record": claim["record"], "scale": claim["scale"], "n": arm["n"], "loss": arm["loss"]["mean"],
            "sd": arm["loss"]["sd"], "seconds": arm["time_ms"]["mean"] / 1000, "rate": None,
            "reached": target["passed"] if target and not changes else None, "current": None,
            "what": f"claim {claim['verdict']}, {claim['grade']}{''.join(' ' + c for c in changes)}"}


def boards(site: dict) -> str:
    """A table per machine, records in order; places only among records that reached the target of one scale
    there."""
    found = board_entries(site)
    out = ("<p>A place is given only among records that reached the target of one scale on one machine. The "
           "CPU scales compare losses at equal tokens. They have no times here, because a run there measures "
           "whatever else the machine was doing, unless the runs of a declared plan took turns "
           "(<code>records submit</code>).</p>")
    out += "" if found else missing("No run is committed yet.")
    for machine in sorted(found):
        out += f"<h3>{escape(machine)}</h3>" + board(site, machine, found[machine])
    free = [c for c in CARDS if not any(c.lower() in machine.lower() for machine in found)]
    rows = [[escape(c), "unclaimed", f"<code>python train_gpt.py short/head --nproc {c[0]}"
             f"{'' if c.startswith('8') else ' --scale small'}</code>"] for c in free]
    return out + "<h3>Unclaimed</h3>" + table(["machine", "state", "a run that opens its board"], rows,
                                              "Machines without a board", "dense unclaimed")


def board(site: dict, machine: str, entries: list[dict]) -> str:
    """The table of runs of one machine, fastest first, as HTML."""
    entries = sorted(
        entries, key=lambda e: (list(SCALES).index(e["scale"]), facts.order_of(site, e["record"]), e["what"])
    )
    placed = sorted(
        (e for e in entries if e["reached"] and e["seconds"] is not None), key=lambda e: e["seconds"]
    )
    timed = any(e["seconds"] is not None for e in entries)
    columns = [
        "record", "scale", ">runs", ">loss", ">sd", *([">train time, s", ">tokens/s"] if timed else []),
        "from"
    ]
    rows = [[escape(e["record"]), escape(e["scale"]), str(e["n"]), number(e["loss"]), number(e["sd"]),
             *([number(e["seconds"], 1), f"{e['rate']:,.0f}" if e["rate"] else ""] if timed else []),
             escape(e["what"]) + (" " + chip("stale", "stale")) * (e["current"] is False)] for e in entries]
    if placed:
        columns.append(">place")
        for e, row in zip(entries, rows):
            rivals = [x for x in placed if x["scale"] == e["scale"]]
            row.append(str(rivals.index(e) + 1) if e in rivals else "")
    return table(columns, rows, f"Runs on {machine}")


# ----- prediction, judge ------------------------------------------------------------------------------------

def predict(site: dict) -> str:
    """What the scatter can and cannot say; the charts themselves are drawn by the script."""
    scales = [s for s in facts.scales_measured(site) if s != "full"]
    if not scales:
        return missing("No sweep at a small scale is committed yet, so there is nothing to compare with "
                       "published effects. Until there is, small-scale figures check the harness and nothing "
                       "more.")
    figures = ""
    for p in (facts.predictions(site, s) for s in scales):
        for key, what in (
            ("features", "features, loss against loss"),
            ("records", "records, tokens against loss saved"),
        ):
            figures += (
                f'<figure class="half"><div class="chart scatter" data-scale="{p["scale"]}" '
                f'data-key="{key}"></div>'
                f"<figcaption><b>{p['scale']}: {what}.</b> {correlation_text(p[key])}</figcaption></figure>"
            )
    return ("<p>Each point is a technique: to the right what its authors publish at full scale, upwards what "
            "was measured here at the small scale. If small scale predicted full scale, the points would "
            "rise. rho is Spearman's rank "
            f'correlation.</p><div class="two">{figures}</div><p class="caution">The published effects of '
            'single features '
            "are one run each, from one record folder. Unresolved points are hollow and count. Neither sign "
            "nor size should be carried over from here to full scale.</p>" + prediction_tables(site))


def rules(site: dict) -> str:
    """The tables of `sweep.py optimizers`: update rules at equal budget, each with a tuned learning rate."""
    from sweeps import optimizers, report
    found = [sweep for sweep in site["sweeps"] if sweep["kind"] == "optimizers"]
    if not found:
        return missing("No comparison of update rules is committed yet: `python sweep.py optimizers --scale "
                       "tiny` makes one.")
    columns = [("" if i < 3 or i in (4, 8) else ">") + name for i, name in enumerate(optimizers.HEAD)]
    out = ""
    for sweep in found:
        rows = [[escape(cell) for cell in row] for row in optimizers.table(sweep, report.effect_text)]
        out += f"<p>{escape(report.headline(sweep))}</p>"
        out += table(columns, rows, f"Update rules at {sweep['scale']}")
    return out


def prediction_tables(site: dict) -> str:
    """What all sweeps show, in one table; under it, folded, each sweep's published and measured effects."""
    from evidence import predictions  # scipy comes along
    overviews, out, (value, error) = [], "", predictions.slope()
    swept = [sweep for sweep in site["sweeps"]
             if sweep["kind"] in ("chain", "ablate") and not facts.is_variant(sweep["about"])]
    for sweep in [*swept, predictions.of_runs()]:
        found = predictions.table(sweep)
        rows = [[escape(c) for c in predictions.cells(r)] for r in found["rows"]]
        if rows:
            overviews.append([escape(c) for c in predictions.overview(found)])
            out += folded(f"{escape(found['name'])}: {plural(len(rows), 'row')}",
                          table(predictions.HEAD, rows, f"Predictions of {found['name']}"))
    if not out:
        return ""
    return ("<p>In nats at equal tokens, negative is better. Saved tokens and steps count by the slope of "
            f"the final loss against log tokens, {value:.3f} ± {error:.3f} (standard error) from four "
            "published pairs. Shares of signs have Wilson's 95 % interval, rank correlations Fisher's.</p>"
            + table(predictions.OVERVIEW, overviews, "Signs and ranks, by sweep") + out)


def correlation_text(found: dict) -> str:
    """One sentence on a rank correlation and its interval."""
    n = len(found["points"])
    if found["rho"] is None:
        return f"{plural(n, 'point')}: too few for a rank correlation."
    rho = f"rho {number(found['rho'], 2, True)}"
    if found["low"] is None:
        return f"{rho} over {n} points, too few for an interval: it shows nothing."
    text = (
        f"{rho}, 95 % interval {number(found['low'], 2, True)} to {number(found['high'], 2, True)}, {n} "
        "points"
    )
    if found["low"] <= 0 <= found["high"]:
        return text + ": not told apart from no relation."
    return text + (": the orders agree." if found["rho"] > 0 else ": the orders are opposed.")


def judge(found: dict | None) -> str:
    """The verdicts of `records judge`, a table per track, folded."""
    if found is None:
        return missing(
            "No verdicts are committed yet: <code>python -m records judge --json evidence/results/judge.json"
            "</code> writes them from the raw published runs."
        )
    from evidence import judge as referee  # scipy comes along
    out = ("<p>Each published record judged by the rule of its track from the logs in its folder. A verdict "
           "says what the committed logs show; no log shows the runs that were not committed, nor how often "
           "a set was tried.</p>")
    try:
        for track, counts in found["tracks"].items():
            rows = [[escape(c) for c in referee.cells(r)] for r in found["records"] if r["track"] == track]
            columns = [
                name if name in ("record", "verdict", "note") else ">" + name for name in referee.HEADS[track]
            ]
            out += folded(f"{escape(track)}: {len(rows)} entries, {len(counts['pass'])} pass, "
                          f"{len(counts['miss'])} miss, the others cannot be told",
                          f"<p>{escape(referee.sentence(track, counts))}</p>"
                          + table(columns, rows, referee.TITLES[track]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{facts.EVIDENCE / 'judge.json'}: not what `python -m records judge` writes now "
                        f"({error!r}): write it again with --json") from None
    return out


def claims(site: dict) -> str:
    """The claimed results by the rules of the optimizer track, on their authors' figures."""
    columns = ["claim", ">date", "what", "by", ">steps", ">mean", ">n", ">score", ">pairwise p", "rule"]
    rows = [
        [
            escape(ref), escape(r.date), escape(r.title) + f"<small>{escape(r.notes)}</small>",
            escape(", ".join(r.people)), f"{r.published['steps']:,}", f"{r.published['mean']:.5f}",
            str(r.published["runs"]), f"{rule['score']:.5f}",
            "" if pair is None else f"{pair['p']:.2g} ({escape(r.parent.split('/')[1])})",
            "met" if rule["passed"] else "not met"
        ] for ref, r, rule, pair in facts.claim_rows(site)
    ]
    if not rows:
        return ""
    about = ("<p>Beyond the official table, by their authors' figures: accepted by nobody yet, and never "
             "counted as records. Score: (3.28 - mean) sqrt(n), at least 0.004. Pairwise p: against the "
             "result that a claim is built on, whose name follows.</p>")
    return folded(f"Claimed results: {len(rows)}", about + table(columns, rows, "Claimed results"))


# ----- data for the script ----------------------------------------------------------------------------------

def data(site: dict) -> str:
    """The JSON at the end of the page. '<' is escaped, so that no text can end the script element."""
    runs = [
        {
            "ref": ref, "scale": r["scale"], "seed": r["seed"], "where": facts.hardware(r),
            "points": run_points(r)
        }
        for ref, members in site["runs"].items()
        for r in members
    ]
    content = {
        "history": [
            [
                h["ref"], h["date"], h["minutes"], h["title"], ", ".join(h["people"]), h["status"],
                h["scope"], facts.marker(site, h), h["kind"], h["note"]
            ]
            for h in site["history"]
            if h["minutes"]
        ],
        "published": [c for c in map(reference_curve, site["records"].values()) if c],
        "runs": runs,
        "settings": settings_data(site["records"]),
        "predictions": [facts.predictions(site, s) for s in facts.scales_measured(site) if s != "full"],
    }
    return files.json_text(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def run_points(r: dict) -> list[list]:
    """The curve of a committed run as points [step, tokens, ms, loss]; ms is None where times are no data."""
    timed = facts.has_times(r["scale"], interleaved=r["claimed"])
    return [
        [step, tokens, round(ms) if timed else None, round(loss, 4)] for step, tokens, ms, loss in r["curve"]
    ]


def reference_curve(record: deltas.Record) -> dict[str, Any] | None:
    """Published curve as points [step, tokens, ms, loss], None without one.

    tokens is None where the log ran another number of steps than the record here, ms where the log has no
    times.
    """
    path = record.folder / "reference.csv"
    if not path.exists():
        return None
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [
                (int(float(r["step"])), float(r["val_loss"]), r.get("train_time_ms"))
                for r in csv.DictReader(file)
            ]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a curve of step, val_loss, train_time_ms ({error})") from None
    s = deltas.resolve(record.ref).settings
    same = rows[-1][0] == s.schedule.steps
    return {
        "ref": record.ref,
        "points": [
            [
                step, schedule.tokens_before(s, step) if same else None, round(float(ms)) if ms else None,
                round(loss, 4)
            ]
            for step, loss, ms in rows
        ],
    }


def settings_data(records: dict[str, deltas.Record]) -> dict[str, Any]:
    """Paths with their meaning; of each record its parent, what differs from it (as one would type it), what
    it sets."""
    shown = {ref: shown_settings(ref) for ref in records}
    paths = [p for p in schema.fields() if any(p in values for values in shown.values())]
    out = []
    for ref, r in records.items():
        before = shown[r.parent] if r.parent else {}
        changes = {p: shown[ref].get(p) for p in paths if shown[ref].get(p) != before.get(p)}
        out.append(
            {"ref": ref, "title": r.title, "parent": r.parent, "changes": changes, "sets": list(r.delta)}
        )
    return {"paths": {p: schema.fields()[p].metadata["doc"].replace("`", "") for p in paths}, "records": out}


def shown_settings(ref: str) -> dict[str, str]:
    """Path -> value as one would type it, of the leaves that exist; a feature without fields of its own is
    `on`."""
    s = deltas.resolve(ref).settings
    # what is off is left out, as in diff
    values = {p: schema.show(v) for p, v in schema.flat(s).items() if v is not None}
    for path in bare_sections():
        if all(deltas.lookup(s, p) is not None for p in [*schema.prefixes(path), path]):
            values[path] = "on"
    return values


@functools.cache
def bare_sections() -> list[str]:
    """Paths of the features without fields of their own."""
    parents = {p.rpartition(".")[0] for p in schema.fields()}
    return [p for p, f in schema.fields().items() if f.is_section and f.optional and p not in parents]
