"""The worth table: each technique with its worth when added, today and as published;
and every sweep in full."""

import math
from collections.abc import Sequence
from html import escape

from common.lines import plural
from page import facts
from page.tags import NOTHING, chip, folded, framed, interval, missing, number, table

SCALE_NAMES = {
    "tiny": "tiny (CPU)", "mini": "mini (CPU, narrower and longer)", "micro": "micro (CPU, a tenth of tiny)",
    "small": "small (one GPU)", "full": "full"
}
GROUPS = (("resolved", "Resolved: told apart from zero"),
          ("unresolved", "Unresolved: measured, but not told apart from zero, and therefore not ranked"),
          ("several", "Several features at once: not ranked next to their members"),
          ("none", "No figure: does nothing at this scale, not run apart, or failed"))
BADGES = ("<b>spec</b> written from the description; <b>math</b> equals the original in float64; "
          "<b>numerics</b> GPU precision checked; <b>trained</b> trained at full scale")
GRADES = {
    "hashes only": "the sweep's figures with the hash of every run's log; the logs are not committed",
    "consistent": "logs agree with themselves and with the settings",
    "audited": "the code passed the audit too", "reproduced": "rerun elsewhere"
}
CAUTION = ('<p class="caution">A small image of each record on another text: read these as a check of the '
           'harness, not as a '
           'forecast of full scale. Whether they predict it is <a href="#predict">measured below</a>.</p>')


def worth(site: dict) -> str:
    """The section: a panel per measured scale, and in it, folded, what is only published."""
    scales = facts.scales_measured(site)
    if not scales:
        return missing(
            "No sweep is committed yet, so nothing here was measured: the table shows what authors publish. "
            "<code>python sweep.py</code> makes the missing columns."
        ) + worth_table(site, facts.techniques(site, None), None)
    radios = "".join(f'<label><input type="radio" name="scale" value="{s}"{" checked" * (i == 0)}> '
                     f'{SCALE_NAMES[s]}</label>'
                     for i, s in enumerate(scales))
    panels = "".join(f'<div class="panel" data-scale="{s}"{" hidden" * (i > 0)}>{panel(site, s)}</div>'
                     for i, s in enumerate(scales))
    grades = "; ".join(f"<b>{grade}</b> {escape(meaning)}" for grade, meaning in GRADES.items())
    return ('<form class="controls" id="worth-controls" aria-label="Scale of the '
            'measurements"><span>Measured at</span>'
            f'{radios}</form>{panels}<p class="legend">Badges of records: {BADGES}. Grades of figures: '
            f'{grades}.</p>')


def panel(site: dict, scale: str) -> str:
    """Measured and published worths of all techniques at one scale, as HTML."""
    rows = facts.techniques(site, scale)
    rest = [r for r in rows if not (r["added"] or r["today"])]
    out = sources(site, scale) + worth_table(site, [r for r in rows if r not in rest], scale)
    if rest:
        out += folded(f"{plural(len(rest), 'technique')} with a published worth only",
                      worth_table(site, rest, None))
    return out


def sources(site: dict, scale: str) -> str:
    """Which sweeps a table rests on, what is missing, and that small scales are no forecast."""
    lines = [sweep_line(s) for kind in ("ablate", "chain") for s in facts.sweeps_of(site, kind, scale)]
    bases = [s["about"] for s in facts.sweeps_of(site, "ablate", scale)]
    if not bases:
        lines.append("no leave-one-out sweep at this scale yet, so the column <b>today</b> is empty")
    elif facts.head(site) not in bases:
        lines.append(f"the head of the lineage is {facts.head(site)}; <b>today</b> means {escape(bases[-1])} "
                     "until it is swept")
    if not facts.sweeps_of(site, "chain", scale):
        lines.append("no chain sweep at this scale yet, so the column <b>when added</b> is empty")
    caution = "" if scale == "full" else CAUTION
    return '<ul class="sources"><li>' + "</li><li>".join(lines) + "</li></ul>" + caution


def sweep_line(sweep: dict) -> str:
    """One sweep in a sentence, linked to its file."""
    what = {
        "ablate": "each feature of {} switched off in turn", "chain": "each record of {} against its parent",
        "axis": "values of settings of {}"
    }[sweep["kind"]].format(sweep["base"])
    common = f" with {' '.join(sweep['common'])}" if sweep.get("common") else ""
    mde = f", detects {number(sweep['mde'])} with 80 % power" if sweep.get("mde") else ""
    paired = ", paired by seed" if sweep.get("paired") else ""
    part = "" if sweep.get("complete", True) else "; incomplete: its intervals are interim"
    text = (f"{what}{common}, control {plural(sweep['control']['n'], 'run')}, "
            f"{sweep['method'].capitalize()} at {100 * sweep['confidence']:g} %{paired}{mde}; "
            f"{facts.hardware(sweep)}{part}")
    return f'<a href="../{escape(sweep["file"])}">{escape(sweep["name"])}</a>: {escape(text)}'


# ----- the table --------------------------------------------------------------------------------------------

def worth_table(site: dict, rows: list[dict], scale: str | None) -> str:
    """The table of these techniques; scale None: only the published column."""
    columns = ("added", "today") if scale else ()
    ranks = {column: facts.ranked(rows, column) for column in columns}
    heads = [("record", "Technique"), *((c, {"added": "When added", "today": "Today"}[c]) for c in columns)]
    head = "".join(f'<th scope="col"><button type="button" data-sort="{key}">{text}</button></th>'
                   for key, text in heads)
    head += '<th scope="col">Published</th>' + ('<th scope="col">Measured on</th>' if scale else "")
    unit, body = forest_unit(rows), ""
    for group, title in GROUPS if scale else (("published", ""),):
        members = [row for row in rows if group_of(row) == group]
        if group == "resolved":
            members.sort(key=resolved_first)
        if members:
            lines = "\n".join(worth_row(site, row, columns, ranks, unit) for row in members)
            top = (f'<tr class="group"><th colspan="{len(heads) + 2}" scope="rowgroup">{title} '
                   f'({len(members)})</th></tr>\n'
                   if title else "")
            body += f'<tbody data-group="{group}">{top}{lines}\n</tbody>'
    caption, widths = "What authors publish, at full scale", '<col class="first"><col>'
    if scale:
        caption = f"Loss saved at equal tokens, nats per token, measured at {scale}"
        widths = '<col class="first"><col class="measured"><col class="measured"><col class="said"><col>'
    return framed(caption, f'<table class="worth"><caption>{caption}</caption><colgroup>{widths}</colgroup>'
                           f"<thead><tr>{head}</tr></thead>{body}</table>", "scroll wide")


def group_of(row: dict) -> str:
    """The group of the table that a technique's row belongs to."""
    measured = [row[c] for c in ("added", "today") if row[c]]
    if not measured:
        return "published"
    if row["key"][0] == "arm":
        return "several"
    if any(m["resolved"] for m in measured):
        return "resolved"
    return "unresolved" if any(m["worth"] is not None for m in measured) else "none"


def resolved_first(row: dict) -> tuple[int, float]:
    """Sorting key: by worth today, then (not resolved today) by worth when added."""
    for place, column in enumerate(("today", "added")):
        if row[column] and row[column]["resolved"]:
            return place, -row[column]["worth"]


def worth_row(
    site: dict, row: dict, columns: Sequence[str], ranks: dict[str, dict[tuple[str, str], int]],
    unit: tuple[float, float]
) -> str:
    """One technique's row of the table, as HTML."""
    kind, what = row["key"]
    path = (
        f" <code>{escape(what)}</code>" if kind == "path" else " the whole record" if kind == "record" else ""
    )
    record = site["records"].get(row["record"])
    badge = chip(record.badge, "badge", "evidence badge of the record") if record else chip(
        "not here yet", "absent")
    title = f"<code>{escape(row['title'])}</code>" if kind == "arm" else escape(row["title"])
    first = f'<b>{title}</b><small><span class="where">{escape(row["record"])}</span>{path} {badge}</small>'
    cells = {"Published": "".join(published_effect(e) for e in row["published"])}
    if columns:
        added, today = (worth_cell(row[c], ranks[c].get(row["key"]), unit) for c in columns)
        part = f'<span class="quiet">part of {escape(row["record"])}</span>' if kind == "path" else ""
        cells = {"When added": added or part, "Today": today, **cells, "Measured on": measured_on(row)}
    tds = "".join(
        f'<td data-label="{label}">{content}</td>' if content else f'<td class="empty">{NOTHING}</td>'
        for label, content in cells.items()
    )
    data = "".join(f' data-{c}="{row[c]["worth"]:.6f}"' for c in columns if row[c] and row[c]["resolved"])
    return (
        f'<tr data-order="{facts.order_of(site, row["record"])}"{data}><th scope="row">{first}</th>{tds}</tr>'
    )


def worth_cell(m: dict | None, rank: int | None, unit: tuple[float, float]) -> str:
    """Rank, worth and interval if resolved; 'unresolved (±x)' if not; nothing if not measured."""
    if not m:
        return ""
    note = f'<small class="note">{escape(m["note"])}</small>' if m["note"] else ""
    if m["worth"] is None:
        return f'<span class="verdict">no figure</span>{note or "<small>no comparison yet</small>"}'
    if m["low"] is None:
        return f'<span class="verdict">unresolved ({number(m["worth"], sign=True)}, no interval)</span>{note}'
    if m["resolved"]:
        place = f'<span class="rank" title="rank among the resolved">{rank}</span> ' if rank else ""
        hurts = "" if m["worth"] >= 0 else ' <span class="verdict hurts">hurts</span>'
        text = f'{place}<b class="value">{number(m["worth"], sign=True)}</b>{hurts}'
    else:
        text = f'<span class="verdict">unresolved (±{number((m["high"] - m["low"]) / 2)})</span>'
    stale = chip("stale", "stale",
                 "the code resolves these settings differently now") if m["current"] is False else ""
    return (f'{forest(m, unit)}<div class="figures">{text} <small '
            f'class="bounds">{interval(m["low"], m["high"])}</small> '
            f"{stale}</div>{note}")


def forest_unit(rows: list[dict]) -> tuple[float, float]:
    """(unit, largest): interval plots are linear within ±unit, the median half width,
    and logarithmic up to largest."""
    measured = [r[c] for r in rows for c in ("added", "today") if r[c] and r[c]["low"] is not None]
    if not measured:
        return 1.0, 1.0
    halves = sorted((m["high"] - m["low"]) / 2 for m in measured)
    return max(halves[len(halves) // 2], 1e-9), max(max(abs(m["low"]), abs(m["high"])) for m in measured)


def forest(m: dict, span: tuple[float, float], width: int = 132, height: int = 18) -> str:
    """A small plot of worth and interval around zero."""
    unit, largest = span

    def x(value):
        return round(
            width / 2 + (width / 2 - 5) * math.asinh(value / unit) / math.asinh(max(largest, unit) / unit), 1
        )

    kind = "unresolved" if not m["resolved"] else "helps" if m["worth"] >= 0 else "hurts"
    y = height / 2
    return (f'<svg class="forest {kind}" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'aria-hidden="true"><line class="zero" x1="{width / 2}" x2="{width / 2}" y1="0" y2="{height}"/>'
            f'<line class="interval" x1="{x(m["low"])}" x2="{x(m["high"])}" y1="{y}" y2="{y}"/>'
            f'<circle cx="{x(m["worth"])}" cy="{y}" r="3.6"/></svg>')


def published_effect(e: dict) -> str:
    """'+0.0128 nats', '20 steps saved' or '5.1 s saved', and who says so."""
    if e["measure"] == "loss":
        text = f"{number(-e['effect'], sign=True)} nats"
    else:
        unit = "s" if e["measure"] == "seconds" else "step" if abs(e["effect"]) == 1 else "steps"
        text = f"{abs(e['effect']):g} {unit} " + ("saved" if e["effect"] < 0 else "more")
    who = e["source"] + (f", n {e['n']:g}" if e["n"] else "") + (f"; {e['note']}" if e["note"] else "")
    return f'<div class="published"><b>{text}</b><small>{escape(who)}</small></div>'


def measured_on(row: dict) -> str:
    """n, scale, base, machine and grade of each measured column.
    The machine's full name is in the list of sweeps."""
    out = ""
    for column, name in (("added", "when added"), ("today", "today")):
        if m := row[column]:
            base = f" at {m['base']}" if column == "today" else ""
            machine = "CPU" if "CPU," in m["hardware"] else m["hardware"]
            runs = f"n {m['n']} against {m['n_control']}" if m["n"] else "not run"
            text = f"{name}{base}: {runs}, {m['scale']}, {machine}"
            out += (f'<small title="{escape(m["name"] + ": " + m["hardware"])}">{escape(text)} '
                    f'{chip(m["grade"], "grade", GRADES.get(m["grade"], "")) if m["n"] else ""}</small>')
    return out


# ----- every sweep in full ----------------------------------------------------------------------------------

def evidence(site: dict) -> str:
    """Every sweep with every arm, nothing left out."""
    if not site["sweeps"]:
        return missing("No sweep is committed yet.")
    return (
        "<p>Effect on loss is the arm's mean less its control's: in an ablation positive means that the "
        "feature helps, in a chain negative means that the record helped.</p>"
        + "".join(map(sweep_details, site["sweeps"]))
    )


def sweep_details(s: dict) -> str:
    """All arms of a sweep, as HTML."""
    columns = [
        "arm", "changes", ">n", ">mean", ">sd", ">effect on loss", ">interval", ">p", "resolved", "current",
        "note"
    ]
    rows = [
        [
            escape(r["arm"]), escape(" ".join(r["changes"])), str(r["n"]), number(r["mean"]), number(r["sd"]),
            number(r["effect"], sign=True), interval(r["low"], r["high"]),
            "" if r["p"] is None else f"{r['p']:.2g}", "yes" if r["resolved"] else "no",
            {True: "yes", False: "no", None: ""}[r["current"]], escape(r.get("note", ""))
        ]
        for r in s["rows"]
    ]
    control = s["control"]
    about = [f"control {control['arm']}: n {control['n']}, mean {number(control['mean'])}, sd "
             f"{number(control['sd'])}",
             f"sd within arms {number(s['pooled_sd'], 5)}" if s.get("pooled_sd") else "",
             f"torch {s['torch']}" if s.get("torch") else "",
             f"code {', '.join(c[:12] + c[40:] for c in s['code'])}" if s.get("code") else "",
             plural(s["failed"], "failed run") if s.get("failed") else ""]
    skipped = "".join(f"<li><code>{escape(x['feature'])}</code>: {escape(x['reason'])}</li>"
                      for x in s.get("skipped", []))
    skipped = f"<p>Not switched off:</p><ul>{skipped}</ul>" if skipped else ""
    return folded(f"{escape(s['name'])}: {plural(len(rows), 'arm')} at {escape(s['scale'])}",
                  f"<p>{sweep_line(s)}; {escape('; '.join(a for a in about if a))}.</p>"
                  + table(columns, rows, f"Sweep {s['name']}") + skipped)
