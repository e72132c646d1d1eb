"""records/README.md, the index, and LINEAGE.md, every delta in one scroll."""

from collections.abc import Iterable
from pathlib import PurePath

from common.lines import plural
from page import facts
from settings import deltas, schema
from settings.scales import SCALES
from sweeps.report import effect_text

GENERATED = "<!-- Written by `python -m records leaderboard`. Edit the data, not this file. -->\n"
SOURCES = {
    "log": "reproduces the published log", "lineage": "reproduces the merged code",
    "reconstructed": "reconstructed", "own": "designed in this project"
}


def line(values: Iterable[object]) -> str:
    """One row of a table."""
    return "| " + " | ".join(str(v).replace("|", "\\|").replace("\n", " ") for v in values) + " |"


# What stands above the table of a track.
TRACKS = {"optimizer": ("""\
Fewest steps at a fixed model, stream and batch. The numbers are those of the public table, in the order in
which results were accepted; deltas form a tree. Its root is result 36, today's tuned baseline, whose delta
describes the whole program. Result 12 is the older baseline on it: its rates for embedding, head and vectors
are those of all results before. 6, 10, 18, 21 to 23, 28, 35 and 39 come from 12; 3 is 6 with the initial
weights that torch draws, and 1, 2, 7, 9 and MuonH (5) build on 3. From 9 the line of the step records goes
over 11, 14, 16, 20, 29, 30, 40, 41 and 44 to 46; 4, 8, 13, 19, 25, 27, 33 and 37 are in the hyperball, on 5.
`on` is the result that a delta changes. Loss is the mean of the published runs. 15 claims no delta.
""",)}


# ----- index ------------------------------------------------------------------------------------------------

def index(site: dict) -> str:
    """records/README.md: one line per record here, in a table for each track."""
    lines = [
        GENERATED,
        "# Records\n",
        "Minutes and loss are the published ones (8 x H100). *tiny* is the mean final loss of the runs "
        "committed here\nat that scale, at equal tokens, with their number: it checks the harness and says "
        "little about full scale.\nA record that only runs its parent in another way has no run of its own "
        "and shares its parent's loss.\nBadges: `spec` written from the record's description, `math` equal "
        "to the original in float64, `numerics`\nGPU precision checked, `trained` trained at full scale.\n",
    ]
    variants = facts.variants_of(site)
    for lineage in dict.fromkeys(ref.split("/")[0] for ref in site["records"] if ref not in variants):
        lines += ["", *track_index(site, lineage), *claims_index(site, lineage)]
    absent = [h for h in site["history"] if not h["here"] and h["status"] != "claim"]
    if absent:
        lines.append(
            f"\n{plural(len(absent), 'published record')} with no delta here yet: in "
            "[evidence/published/history.csv](../evidence/published/history.csv) with\ntheir people, and in "
            "[LINEAGE.md](../LINEAGE.md)."
        )
    lines.append(
        "\nWhat authors state that a technique is worth: "
        "[evidence/published/effects.csv](../evidence/published/effects.csv).\nSweeps made here: "
        "[evidence/results](../evidence/results/README.md). All of it in one page: "
        "[site/index.html](../site/index.html)."
    )
    return "\n".join(lines + variants_index(site, variants)) + "\n"


def track_index(site: dict, lineage: str) -> list[str]:
    """The table of one track's records, under a heading with the track's target."""
    records = {
        ref: r for ref, r in site["records"].items() if ref.startswith(lineage + "/") and not r.claimed
    }
    target = next(reversed(records.values())).settings.validation.target
    timed = any("minutes" in r.published for r in records.values())  # otherwise the measure is steps
    lines = [
        f"## The {lineage} track, target {target:g}\n",
        *TRACKS.get(lineage, ()),
        line(
            [
                "record", "title", "by", "date", "kind" if timed else "on", "badge",
                "minutes" if timed else "steps", "loss", "tiny", "full scale here", "files"
            ]
        ),
        "|" + "---|" * 11,
    ]
    for ref, r in records.items():
        runs = site["runs"][ref]
        measure = r.published.get("minutes" if timed else "steps")
        lines.append(
            line(
                [
                    ref, r.title, ", ".join(r.people), r.date, r.kind if timed else r.parent or "the root",
                    f"`{r.badge}`", "" if measure is None else f"{measure:g}",
                    r.published.get("val_loss", ""), loss_text(runs, "tiny"),
                    loss_text(runs, "full") or "not run", ", ".join(file_links(r, runs, site["claims"][ref]))
                ]
            )
        )
    return lines


def claims_index(site: dict, lineage: str) -> list[str]:
    """The lines on the claimed results of a track, with the rules of the optimizer track on their figures."""
    rows = [row for row in facts.claim_rows(site) if row[0].startswith(lineage + "/")]
    if not rows:
        return []
    lines = [
        f"\n### Claimed on the {lineage} track\n\nDeltas with their authors' figures, accepted by nobody yet "
        "and never counted as records. Score: (3.28 - mean)\nsqrt(n), which must be at least 0.004. "
        "Pairwise: the same for the difference from the result that it is built on, with\n0.0045 for 100 "
        "steps.\n",
        line(["claim", "title", "by", "date", "on", "badge", "steps", "mean (runs)", "score", "pairwise",
              "files"]),
        "|" + "---|" * 11
    ]
    for ref, r, rule, pair in rows:
        mean = f"{r.published['mean']:.5f} ({r.published['runs']})"
        lines.append(line([
            ref, r.title, ", ".join(r.people), r.date, r.parent, f"`{r.badge}`", r.published["steps"], mean,
            met(rule), "" if pair is None else met(pair),
            ", ".join(file_links(r, site["runs"][ref], site["claims"][ref]))
        ]))
    return lines


def met(rule: dict) -> str:
    """'0.00454', or '0.00278, not met'."""
    return f"{rule['score']:.5f}{'' if rule['passed'] else ', not met'}"


def variants_index(site: dict, variants: dict[str, deltas.Record]) -> list[str]:
    """The lines on the variants: parent, and the loss against it at each scale where a sweep has measured
    it."""
    if not variants:
        return []
    measured = facts.variants_measured(site)
    about = ("The difference is the variant's final loss\nless its parent's at equal tokens, negative is "
             "better; n are the runs of both; intervals hold for all rows of a sweep.\n" if measured else
             f"No sweep has compared\nthem with it yet: `python sweep.py chain {facts.VARIANTS}` does.\n")
    heads = ["variant", "parent", "title", "date", "badge", "tiny"]
    heads += [*(f"loss minus parent's, {scale}" for scale in measured), "files"]
    lines = ["\n## Variants\n\nBranches of this project, each on its parent; nothing is published about "
             f"them. {about}",
             line(heads), "|" + "---|" * len(heads)]
    for ref, r in variants.items():
        runs = site["runs"][ref]
        lines.append(line([ref, r.parent, r.title, r.date, f"`{r.badge}`", loss_text(runs, "tiny"),
                           *(difference_text(found.get(ref)) for found in measured.values()),
                           ", ".join(file_links(r, runs, site["claims"][ref]))]))
    return lines


def difference_text(m: dict | None) -> str:
    """'+0.0123 [+0.0040, +0.0206], n 4 and 11', 'unresolved (+-0.0083), n 4 and 11', or 'not measured'."""
    if m is None or m["worth"] is None:
        return "not measured"
    state = ("" if m["complete"] else ", interim") + (", stale" if m["current"] is False else "")
    return f"{effect_text(facts.difference(m))}, n {m['n']} and {m['n_control']}{state}"


def file_links(record: deltas.Record, runs: list[dict], claims: list[dict]) -> list[str]:
    """Markdown links to what lies in a record's folder."""
    folder = record.folder.relative_to(deltas.RECORDS).as_posix()
    links = [f"[delta]({folder}/record.toml)"]
    if (record.folder / "reference.csv").exists():
        links.append(f"[published curve]({folder}/reference.csv)")
    links += [f"[{r['scale']} run]({below(r['folder'])})" for r in runs if not r["claimed"]]
    return links + [
        f"[claim at {c['scale']}: {c['verdict']}, {c['grade']}]({below(c['where'])})" for c in claims
    ]


def below(folder: str) -> str:
    """A path of the repository as a link from records/."""
    return PurePath(folder).relative_to("records").as_posix()


def loss_text(runs: list[dict], scale: str) -> str:
    """'4.0598 (1)': mean final loss and number of runs, '' if there is none; 'stale' if the settings changed
    since."""
    found = facts.at_scale(runs, scale)
    if not found:
        return ""
    mean, _ = facts.mean_and_sd([r["val_loss"] for r in found])
    return f"{mean:.4f} ({len(found)})" + ("" if found[0]["current"] else " stale")


# ----- lineage ----------------------------------------------------------------------------------------------

def lineage(site: dict) -> str:
    """LINEAGE.md: every delta, then the published records that have none here, then the variants."""
    lines = [GENERATED, "# Lineage\n",
             "Every record as the lines it changes on its parent. Paths are those of `settings/` (`python "
             "-m records\nfeatures`). Published figures are on 8 x H100; measured ones say their scale.\n"]
    variants, before = facts.variants_of(site), None
    added = {
        scale: facts.added_at(site, scale) | facts.added_at(site, scale, variants=True) for scale in SCALES
    }
    for ref, r in site["records"].items():
        if ref not in variants:
            lines += section(r, before, {scale: added[scale].get(ref) for scale in SCALES})
            before = ref
    for name, title in (("short", "short track, target 3.28"), ("medium", "medium track, target 2.92")):
        rows = [
            h for h in site["history"] if h["lineage"] == name and not h["here"] and h["status"] != "claim"
        ]
        if rows:
            lines += [
                f"## No delta here yet: {title}\n",
                line(["record", "date", "minutes", "kind", "by", "what", "note"]),
                "|" + "---|" * 7,
            ]
            lines += [
                line(
                    [
                        h["ref"], h["date"], f"{h['minutes']:g}", h["kind"], ", ".join(h["people"]),
                        h["title"], h["note"]
                    ]
                )
                for h in rows
            ]
            lines.append("")
    if variants:
        lines.append(
            "## Variants\n\nBranches of this project, each on its parent; nothing is published about them.\n"
        )
    for ref, r in variants.items():
        lines += section(r, None, {scale: added[scale].get(ref) for scale in SCALES}, "###")
    return "\n".join(lines).rstrip() + "\n"


def section(
    r: deltas.Record, before: str | None, measured: dict[str, dict | None], level: str = "##"
) -> list[str]:
    """The lines on one record. before: the record above it, which is its parent if nothing else is said."""
    folder = r.folder.relative_to(facts.ROOT).as_posix()
    parent = f", parent {r.parent}" if r.parent and r.parent != before else ""
    lines = [
        f"{level} {r.ref}: {r.title}\n",
        f"{r.date}, {', '.join(r.people)}. Kind {r.kind}{parent}, {SOURCES.get(r.source, r.source)}, badge "
        f"`{r.badge}`, [record.toml]({folder}/record.toml)."
        f"{' Claimed by its author, and no record.' if r.claimed else ''}\n"
    ]
    lines += ["```toml", *delta_lines(r), "```\n"] if r.delta else []
    lines += [f"No setting changes: {r.subsumed}.\n"] if r.subsumed else []
    lines += [r.notes.strip() + "\n"] if r.notes else []
    if r.published or not facts.is_variant(r.ref):
        lines.append(f"Published: {published_text(r.published)}.\n")
    elif not any(m and m["worth"] is not None for m in measured.values()):
        lines.append("Not compared with its parent yet.\n")
    for scale, m in measured.items():
        if m and m["worth"] is not None:
            bounds = f"interval {m['low']:.4f} to {m['high']:.4f}" if m["low"] is not None else "no interval"
            verb, state = "saves" if m["worth"] >= 0 else "costs", "" if m["resolved"] else ", unresolved"
            state += "" if m["complete"] else ", interim: the sweep is incomplete"
            lines.append(
                f"Measured at {scale}: {verb} {abs(m['worth']):.4f} nats against its parent at equal tokens "
                f"(worth: {bounds}, n {m['n']}{state}).\n"
            )
    return lines


def delta_lines(record: deltas.Record) -> list[str]:
    """The [delta] lines as typed, each with the value before."""
    parent = deltas.resolve(record.parent).settings if record.parent else None
    return [
        f"{path} = {schema.show(value)}"
        + (f"  # was {schema.show(deltas.lookup(parent, path))}" if parent else "")
        for path, value in record.delta.items()
    ]


def published_text(published: dict) -> str:
    """'45 minutes on 8xH100, loss 3.2722 (1 run), timing: untimed log', of what is there."""
    out = []
    if "minutes" in published:
        out.append(
            f"{published['minutes']:g} minutes"
            + (f" on {published['hardware']}" if "hardware" in published else "")
        )
    if "steps" in published:
        out.append(f"{published['steps']} steps")
    if "val_loss" in published:
        out.append(
            f"loss {published['val_loss']:g}"
            + (f" ({plural(published['runs'], 'run')})" if "runs" in published else "")
        )
    if "timing" in published:
        out.append(f"timing: {published['timing']}")
    return ", ".join(out) or "nothing"
