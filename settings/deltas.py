"""Resolve a record: a list of `path = value` lines on its parent, and the same for every change to it.

    resolve("short/9", without=["model.attn.value_residual"], scale="tiny", sets=["schedule.steps=20"])

The order is: defaults, chain of records without the reverted ones, --with and --without, scale, --set, check.
There is no torch here, so that a wrong setting is refused before the seconds that torch takes.
"""

import dataclasses
import datetime
import difflib
import functools
import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import settings
from common import files, untrusted
from common.errors import UserError, did_you_mean, near
from settings import Settings, renames, scales
from settings.declare import BEFORE, REFUSE, holds, inert_settings, lookup, unmet_needs
from settings.scales import SCALES
from settings.schema import assign, find_field, ml_hash, parse_assignment, prefixes, replaced, show

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "records"
ATTEMPTS = ROOT / "attempts"  # ideas that are no record yet and never part of a lineage
ATTEMPT = "attempts/"  # how the ref of one begins
LINEAGES = ("short", "medium", "optimizer", "variants")
KINDS = ("ml", "systems", "both", "retiming", "baseline")
BADGES = ("spec", "math", "numerics", "trained")
STATUSES = ("record", "claimed")  # claimed: its author's figures, accepted by nobody yet, never a record
LINES = {  # that a record.toml may have, with their types
    "id": str, "title": str, "parent": str, "order": (int, float), "date": (str, datetime.date),
    "people": list, "kind": str, "source": str, "badge": str, "status": str, "notes": str, "subsumed": str,
    "delta": dict, "published": dict, "attempt": str}
SOURCES = ("log", "lineage", "reconstructed", "own")  # own: designed in this project, no upstream record


# ----- records on disk --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Record:
    """One record.toml. `ref` is lineage/id ("short/9") or attempts/name; `delta` maps paths to values.

    `attempt`: name of the attempt whose claim made it a record (`records promote`), '' for all others.
    """
    ref: str
    title: str
    parent: str | None
    date: str
    people: list
    kind: str
    source: str
    badge: str
    slug: str
    order: float
    delta: dict
    published: dict
    notes: str
    subsumed: str
    folder: Path
    attempt: str = ""
    status: str = "record"

    @property
    def claimed(self) -> bool:
        """Whether it is a claim of its author: it runs, and is no member of its lineage."""
        return self.status == "claimed"

    def answers(self, ref: object) -> bool:
        """True if `ref` means this record: by its own ref, or by that of the attempt that it was."""
        return ref == self.ref or (self.attempt != "" and ref == ATTEMPT + self.attempt)

    @functools.cached_property
    def settings(self) -> Settings:
        """Settings of the whole chain up to this record, cached so that a lineage is replayed only once."""
        parent = load_records()[self.parent].settings if self.parent else Settings()
        return apply(self, parent)


@functools.lru_cache
def load_records() -> dict[str, Record]:
    """Ref -> record of all records, in order of lineage and `order`. Errors name the file."""
    found = {}
    for lineage in LINEAGES:
        for path in files.listed(RECORDS / lineage, "*/record.toml"):
            record = read_record(path, lineage)
            if record.ref in found:
                raise UserError(f"{path}: id {record.ref} is already taken by {found[record.ref].folder}")
            found[record.ref] = record
    for record in found.values():
        if record.parent is not None and record.parent not in found:
            raise UserError(f"{record.folder}/record.toml: parent {record.parent!r} does not exist")
    in_order = sorted(found.values(), key=lambda r: (LINEAGES.index(r.ref.split("/")[0]), r.order))
    return {record.ref: record for record in in_order}


def read_record(path: Path, lineage: str) -> Record:
    """The Record of a record.toml (see parse_record). Errors name the file."""
    return parse_record(untrusted.toml_file(path)[1], path, lineage)


def parse_record(toml: dict, path: Path, lineage: str) -> Record:
    """The Record of a parsed record.toml.

    Args:
        path: where the file lies or would lie; its folder gives the slug.
        lineage: `short`, `variants`, ..., or `attempts` for a record without an id.
    """
    for key, value in toml.items():
        if key not in LINES:
            raise UserError(f"{path}: unknown line {key!r}{near(key, sorted(LINES))}")
        if not isinstance(value, LINES[key]):
            expected = {str: "text in quotes", list: 'a list like ["@me"]', dict: f"a table [{key}]"}.get(
                LINES[key], "a number or a date")
            raise UserError(f"{path}: {key} = {value!r:.200}: expected {expected}")
        if key != "notes" and has_lines(value):
            raise UserError(f"{path}: {key} has several lines: only notes may")
    slug = path.parent.name.partition("_")[2]
    if lineage == ATTEMPT[:-1]:
        if "id" in toml:
            raise UserError(f"{path}: an attempt has no id, it gets one when it becomes a record; record "
                            f"{toml['id']} is run by its own name")
        slug = path.parent.name
        few = {"title": slug, "date": "", "people": [], "kind": "ml", "source": "own", "order": math.inf}
        toml = {**few, **toml, "id": slug}
    try:
        record = Record(
            ref=f"{lineage}/{toml['id']}", title=toml["title"], parent=toml.get("parent"),
            date=str(toml["date"]), people=toml["people"], kind=toml["kind"], source=toml["source"],
            badge=toml.get("badge", "spec"), slug=slug, order=float(toml.get("order", 0) or toml["id"]),
            delta=present_delta(quoted(toml.get("delta", {}), path)), published=toml.get("published", {}),
            notes=toml.get("notes", ""), subsumed=toml.get("subsumed", ""), folder=path.parent,
            attempt=toml.get("attempt", ""), status=toml.get("status", "record"))
    except KeyError as error:
        raise UserError(f"{path}: the line {error} is missing") from None
    except ValueError:
        raise UserError(f"{path}: id {toml['id']!r} is not a number: add order = ... for sorting") from None
    for key, choices in (("kind", KINDS), ("badge", BADGES), ("source", SOURCES), ("status", STATUSES)):
        if getattr(record, key) not in choices:
            raise UserError(f"{path}: {key} = {getattr(record, key)!r}: must be one of {', '.join(choices)}")
    if record.attempt and not re.fullmatch("[a-z][a-z0-9_]*", record.attempt):
        raise UserError(f"{path}: attempt = {record.attempt!r:.60}: expected the name of a folder in "
                        "attempts/")
    if not record.delta and not record.subsumed and record.kind not in ("retiming", "baseline"):
        raise UserError(f'{path}: an empty [delta] needs subsumed = "why nothing changes here" or kind = '
                        '"retiming"')
    return record


def has_lines(value: Any) -> bool:
    """Whether a plain value holds a text of several lines."""
    if isinstance(value, (dict, list)):
        return any(map(has_lines, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and "\n" in value


def quoted(delta: dict[str, Any], where: Path) -> dict[str, Any]:
    """The delta, with a UserError for a path without quotes.

    TOML reads `model.num_layers = 3` as a table of tables; it would set the whole part `model`, and all that
    the table leaves out would silently become record 1's.
    """
    for path, value in delta.items():
        if "." not in path:
            while isinstance(value, dict) and value:
                name, value = next(iter(value.items()))
                path = f"{path}.{name}"
            example = f'"{path}" = {show(value)}' if "." in path else '"optim.muon.lr" = 0.05'
            raise UserError(f"{where}: [delta] {path}: write the whole path in quotes, like {example}")
    return delta


def present_delta(delta: dict[str, Any]) -> dict[str, Any]:
    """A delta {path: value} under the present names of settings; attempts and claims may have former ones."""
    present = {}
    for path, value in delta.items():
        new = renames.present_path(path)
        if new in present:
            raise UserError(f"[delta] sets {new} twice, as {path} too, its former name: keep one")
        present[new] = renames.present_settings(value, path) if isinstance(value, dict) else value
    return present


def find_record(name: str) -> Record:
    """The record named `short/9`, `short/009`, `short/head`, `short/shortcuts_tweaks` or `attempts/NAME`."""
    if name.startswith(ATTEMPT):
        return find_attempt(name)
    records = load_records()
    lineage, _, key = name.partition("/")
    members = [r for r in records.values() if r.ref.startswith(lineage + "/")]
    if members and key:
        if key == "head":
            return [r for r in members if not r.claimed][-1]
        for record in members:
            if key in (record.slug, record.ref.split("/")[1]) or key.lstrip("0") == record.ref.split("/")[1]:
                return record
    if name in preset_names():
        fixed, _ = load_preset(name)
        raise UserError(f"{name} is a preset, {fixed['name']} at scale {fixed['scale']}: name that record "
                        "here")
    raise UserError(f"unknown record {name!r}{did_you_mean(nearest_records(name))}; `python -m records list` "
                    "shows them")


def nearest_records(name: str) -> list[str]:
    """At most three names of records or presets that a wrong one may mean, the likeliest first.

    First short forms: a number (`11`, `record 11`, `short-011`), another case, a part of a slug (`unet`), the
    name of a record's folder or the path to it, a lineage alone. Otherwise similar spellings.
    """
    records, presets = load_records(), preset_names()
    folded = " ".join(name.casefold().replace("\\", "/").strip("/# ").split())
    words = re.split(r"[/ _-]", folded)
    lineages = sorted({ref.split("/")[0] for ref in records}, key=LINEAGES.index)
    meant = [lineage for lineage in lineages if difflib.get_close_matches(lineage, words, cutoff=0.75)]
    members = [r for r in records.values() if not meant or r.ref.split("/")[0] in meant]
    by_slug = {r.slug: f"{r.ref.split('/')[0]}/{r.slug}" for r in members}
    word = folded.rpartition("/")[2]
    plain = re.sub(r"[ _.-]", "", word)
    number = re.fullmatch(rf"(?:record|{'|'.join(lineages)})?[ #_-]*0*([1-9][0-9]*[a-z]?)\.?(_.*)?", word)
    found = [p for p in presets if len(plain) > 2 and re.sub(r"[ _.-]", "", p).startswith(plain)]
    if word in ("head", *lineages):
        found.append(f"{(meant or lineages)[0]}/head")
    if number and not found:
        same = [r for r in members if r.ref.split("/")[1] == number[1]]
        found = [r.ref for r in same if f"_{r.slug}" == number[2]] or [r.ref for r in same]
    if len(plain) > 2 and not found:
        found = [full for slug, full in by_slug.items() if plain in slug.replace("_", "")]
    if not found:
        names = [*presets, *records, *by_slug.values(), *(ATTEMPT + x for x in attempt_names())]
        found = difflib.get_close_matches(folded, names, n=3, cutoff=0.55)
        found += [by_slug[slug] for slug in difflib.get_close_matches(word, list(by_slug), n=3, cutoff=0.6)]
    return list(dict.fromkeys(found))[:3]


def attempt_names() -> list[str]:
    """Names of the attempts in this checkout, sorted."""
    if not ATTEMPTS.is_dir():
        return []
    return [p.name for p in files.listed(ATTEMPTS) if (p / "record.toml").is_file()]


def find_attempt(name: str) -> Record:
    """The Record of attempts/NAME; if the attempt was promoted, the record that it became."""
    key = name.removeprefix(ATTEMPT).rstrip("/")  # a shell completes folders with a slash
    promoted = next((r for r in load_records().values() if r.attempt and r.attempt == key), None)
    if promoted is not None:
        return promoted
    if key not in attempt_names():
        remedy = (f'write {ATTEMPT}NAME/record.toml with parent = "short/33" and a [delta], or use `records '
                  'submit`')
        raise UserError(f"unknown attempt {name!r}{near(key, attempt_names())}: {remedy}")
    path = ATTEMPTS / key / "record.toml"
    record = read_record(path, ATTEMPT[:-1])
    check_parent(record, path)
    return record


def check_parent(record: Record, path: Path) -> None:
    """UserError unless an attempt's parent is a record, because an attempt builds on what was shown."""
    if record.parent is None:
        raise UserError(f"{path}: the line 'parent' is missing: name the record it builds on")
    if record.parent.startswith(ATTEMPT):
        raise UserError(f"{path}: parent {record.parent!r} is an attempt: promote that one first, or put its "
                        "lines into this delta")
    records = list(load_records())
    if record.parent not in records:
        raise UserError(f"{path}: parent {record.parent!r} does not exist{near(record.parent, records)}")


def chain(record: Record) -> list[Record]:
    """The records from the root of the lineage to this one."""
    links, records = {}, load_records()
    while record is not None:
        if record.ref in links:
            raise UserError(f"{record.folder}/record.toml: its parents form a circle")
        links[record.ref] = record
        record = records.get(record.parent) if record.parent else None
    return list(links.values())[::-1]


# ----- resolve ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Resolved:
    """A complete description of a run and how it came about."""
    settings: Settings
    record: Record | None
    scale: str
    changes: tuple  # normalised flags, for logs and run names
    report: tuple  # printed lines: what went along, what was kept or dropped
    preset: str = ""


def resolve(name: str | Record, *, scale: str = "full", sets: Sequence[str] = (), with_: Sequence[str] = (),
            without: Sequence[str] = (), revert: Sequence[str] = (), preset: str = "") -> Resolved:
    """The settings of a record with changes; a UserError of one line if anything is wrong.

    Args:
        sets: `path=value`, as --set takes them; with_, without and revert likewise.
        preset: name of the preset that these changes make up, if any.
    """
    if scale not in SCALES:
        choices = ", ".join(SCALES)
        raise UserError(f"unknown scale {scale!r}{near(scale, list(SCALES))}: choose one of {choices}")
    record = name if isinstance(name, Record) else find_record(name)
    s, report = compose(record, scale, sets, with_, without, revert)
    report += undone(s, record, scale, sets, with_, without, revert)
    changes = [f"--revert {r}" for r in revert]
    changes += [f"--with {w}" for w in with_]
    changes += [f"--without {w}" for w in without]
    changes += [f"--set {x}" for x in sets]
    return Resolved(s, record, scale, tuple(changes), tuple(report), preset)


def compose(record: Record, scale: str, sets: Sequence[str], with_: Sequence[str], without: Sequence[str],
            revert: Sequence[str]) -> tuple[Settings, list[str]]:
    """(checked settings, lines of the report) of a record with changes at a scale."""
    links = chain(record)
    reverted = {find_record(r).ref for r in revert}
    for ref in reverted:
        if ref not in [r.ref for r in links]:
            raise UserError(f"--revert {ref}: it is not an ancestor of {record.ref}")
    s, report = replay(links, reverted)
    s, lines = switch(s, links, with_, without)
    s = scales.scaled(s, scale)
    assigned, moved = {}, []
    for text in sets:
        path, value = parse_assignment(text, "--set")
        if path in assigned and assigned[path] != value:
            raise UserError(f"--set {path} is given twice with different values: keep one")
        assigned[path] = value
        if path in {w.partition("=")[0] for w in without}:
            raise UserError(f"{path} is both in --without and --set: keep one of the two")
        before, s = s, assign(s, path, value, "--set")
        lines += reset_line(before, s, path, value)
        if lookup(s, path) != lookup(before, path):
            moved.append(path)
    for path in moved:
        refuse_idle(s, path, f"--set {path}", "change that too, or leave this out")
    unlifted, s = s, scales.lifted(s, assigned)
    try:
        return settings.check(s), report + lines + scales.lift_lines(unlifted, s)
    except UserError as error:
        if without and not reverted and holds_with(record, scale, sets, with_):
            raise UserError(
                f"--without {', '.join(without)}: the rest of {record.ref} does not hold then: {error}"
            ) from None
        if not reverted:
            raise
        raise UserError(f"without {', '.join(sorted(reverted))} the rest of the chain does not hold: "
                        f"{error}; revert the later record that needs it as well, or switch the setting off "
                        "with --without") from None


def reset_line(before: Settings, s: Settings, path: str, value: Any) -> list[str]:
    """A line on what --set of a whole part that was on made a default, because the given table lacks it."""
    old, new = lookup(before, path), lookup(s, path)
    if not dataclasses.is_dataclass(old) or not isinstance(value, dict):
        return []
    lost = [name + ("" if dataclasses.is_dataclass(was) else f"={show(was)}")
            for name, was in vars(old).items() if name not in value and was != getattr(new, name)]
    return [f"--set {path} replaces the whole part, which loses {', '.join(lost)}: to keep them, set one "
            f"value at a time, like {path}.{next(iter(value), 'NAME')}=..."] if lost else []


def holds_with(record: Record, scale: str, sets: Sequence[str], with_: Sequence[str]) -> bool:
    """Whether the settings are good as long as nothing is switched off."""
    try:
        compose(record, scale, sets, with_, (), ())
    except UserError:
        return False
    return True


def undone(s: Settings, record: Record, scale: str, sets: Sequence[str], with_: Sequence[str],
           without: Sequence[str], revert: Sequence[str]) -> list[str]:
    """A line for each change that has an effect at full scale and none at this one, which overrules it."""
    lines, flags = [], {"--with": list(with_), "--without": list(without), "--revert": list(revert)}
    if scale == "full":
        return lines
    assigned = {parse_assignment(text, "--set")[0] for text in sets}
    for flag, given in flags.items():
        for change in given:
            if change.partition("=")[0].partition("@")[0] in assigned:  # --set says the same again
                continue
            rest = {f: [x for x in xs if (f, x) != (flag, change)] for f, xs in flags.items()}
            with_it, left = flags.values(), rest.values()
            try:
                here = compose(record, scale, sets, *left)[0] != s
                full = compose(record, "full", (), *left)[0] != compose(record, "full", (), *with_it)[0]
            except UserError:  # another change needs this one
                continue
            if full and not here:
                lines.append(f"{flag} {change} changes nothing at scale {scale}, which decides that itself: "
                             "only --set overrules it")
    return lines


def replay(links: list[Record], reverted: set[str]) -> tuple[Settings, list[str]]:
    """(settings, report) of a chain without the deltas of the reverted records, which are given by ref.

    A path that a later record sets again keeps the later value (`kept`). A later line below a feature that no
    longer exists is `dropped`. Step counts stay. A revert that would change the number of layers is refused.
    """
    report = []
    lost = {}  # paths of reverted deltas that nothing has set again yet -> ref
    intact = next((i for i, record in enumerate(links) if record.ref in reverted), len(links))
    s = standing(links[:intact])
    for record in links[intact:]:
        where = f"{record.folder.name}/record.toml"
        for path, value in record.delta.items():
            if record.ref in reverted and path != "schedule.steps":  # step counts are the business of --set
                find_field(path)
                if path == "model.num_layers":
                    raise UserError(f"--revert {record.ref}: it changes the number of layers, and later "
                                    "records count on it; use --set model.num_layers=...")
                lost[path] = record.ref
                continue
            line = f"{path} = {show(value)} ({record.ref})"
            gone = [above for above in prefixes(path) if above in lost and lookup(s, above) is None]
            if gone:
                report.append(f"dropped  {line}: {gone[0]} came with {lost[gone[0]]}")
                continue
            if path in lost:
                report.append(f"kept     {line} was also set by {lost.pop(path)}")
            s = assign(s, path, value, where)
    for path, ref in lost.items():
        report.append(f"reverted {path}: {show(lookup(s, path))} (set by {ref})")
    if reverted:
        report += [f"reverted (nothing): the delta of {record.ref} "
                   + ("sets schedule.steps only, which stays" if record.delta else "is empty")
                   for record in links if record.ref in reverted and {*record.delta} <= {"schedule.steps"}]
        report += [] if any(r.startswith("kept") for r in report) else ["kept     (nothing)"]
        report += [] if any(r.startswith("dropped") for r in report) else ["dropped  (nothing)"]
    return s, report


def standing(links: list[Record]) -> Settings:
    """Settings of a whole chain; the defaults if it is empty."""
    return links[-1].settings if links else Settings()


def apply(record: Record, s: Settings) -> Settings:
    """The settings with a record's delta applied."""
    for path, value in record.delta.items():
        s = assign(s, path, value, f"{record.folder.name}/record.toml")
    return s


def switch(s: Settings, links: list[Record], with_: Sequence[str],
           without: Sequence[str]) -> tuple[Settings, list[str]]:
    """(settings, report) after --with and --without; settings that need a switched-off one go off with it."""
    report = []
    both = {w.partition("=")[0].partition("@")[0] for w in with_} & set(without)
    if both:
        raise UserError(f"{both.pop()} is both in --with and --without: keep one of the two")
    for text in with_:
        s, line = turn_on(s, text, links[-1].ref)
        report.append(line)
    for path in without:
        s, line = turn_off(s, links, path)
        report.append(line)
        for other in find_field(path).metadata["along"]:
            other = f"{path.rpartition('.')[0]}.{other}"
            default = find_field(other).default
            if lookup(s, other) != default:
                report.append(f"without {other}: {show(lookup(s, other))} came with {path}")
                s = replaced(s, other, default)
        while unmet := unmet_needs(s):
            other, needs, default = unmet[0]
            s = replaced(s, other, default)
            report.append(f"without {other}: it needs {needs}")
    return s, report


def turn_on(s: Settings, text: str, record: str) -> tuple[Settings, str]:
    """(settings, line of the report) after one --with: path, path=value, or path@record.

    A path alone stands for the feature's own values, so it is refused where the record has the feature
    already, with values that these would silently replace.
    """
    path, at, ref = text.partition("@")
    if at:
        value = lookup(standing(chain(find_record(ref))), find_field(path).path)
        if value is None:
            raise UserError(f"--with {text}: {path} is off in {ref}")
        s = assign(s, path, True, "--with") if dataclasses.is_dataclass(value) else s
        return replaced(s, path, value), f"with {path}: {show(value)} (as in {find_record(ref).ref})"
    if "=" in text:
        path, value = parse_assignment(text, "--with")
    else:
        path, value = text, True
        f = find_field(path)
        if not (f.is_section and f.optional) and f.type is not bool:
            raise UserError(f"--with {path}: it is a value, not a switch: write --with {path}=... or --set "
                            f"{path}=...")
        if not any(lookup(s, above) is None for above in prefixes(path)) and lookup(s, path):
            own = f", or give {path}={{...}} for other values" if f.is_section else ""
            raise UserError(f"--with {path}: it is already on in {record}: leave this out{own}")
    s = assign(s, path, value, "--with")
    return s, f"with {path}: {show(lookup(s, path))}"


def turn_off(s: Settings, links: list[Record], path: str) -> tuple[Settings, str]:
    """(settings, line of the report) after one --without.

    A feature goes off. A number or choice goes back to its value before the record that last set it.
    """
    f = find_field(path)
    old, off = lookup(s, path), f.metadata["off"]
    hint = f"use --set {path}=... or --revert RECORD"
    if any(lookup(s, above) is None for above in prefixes(path)):
        above = next(a for a in prefixes(path) if lookup(s, a) is None)
        raise UserError(f"--without {path}: {above} is already off in {links[-1].ref}")
    if off == REFUSE or (f.is_section and not f.optional):
        if f.is_section and not f.optional:
            hint = f"`python -m records features {path}.` shows what can be switched off in it"
        raise UserError(f"--without {path}: it has no sensible off; {hint}")
    if off == BEFORE and not f.optional:
        setters = [r for r in links if path in r.delta or any(a in r.delta for a in prefixes(path))]
        if not setters:
            raise UserError(f"--without {path}: no record of the chain has set it; {hint}")
        before = lookup(standing(links[:links.index(setters[-1])]), path)
        if before is None:
            above = next(a for a in prefixes(path) if a in setters[-1].delta)
            raise UserError(f"--without {path}: it came with {above} in {setters[-1].ref}; "
                            f"use --without {above} or --set {path}=...")
        others = [p for p in setters[-1].delta if p != path and not p.startswith("schedule.")]
        with_it = f", which also set {', '.join(others)}" if others else ""
        new, why = before, f"value before {setters[-1].ref}{with_it}"
    else:
        new, why = (None if f.optional and off == BEFORE else off), "off"
    if old == new:
        raise UserError(f"--without {path}: it is already {show(new)} in {links[-1].ref}")
    refuse_idle(s, path, f"--without {path}", f"switch that off or {hint}")
    return replaced(s, path, new), f"without {path}: {show(old)} -> {show(new)} ({why})"


def refuse_idle(s: Settings, path: str, what: str, remedy: str) -> None:
    """UserError if another setting makes this one inert.

    By its `idle`, or that of a section above it, or as a section's method `inert` tells.

    Args:
        what: the change that would have no effect, like `--set optim.matrix.lr`.
        remedy: how to mend it, said after the reason.
    """
    parts = [*prefixes(path), path]
    declared = (find_field(p).metadata["idle"] for p in parts)
    found = [idle for idle in declared if idle and holds(s, idle)]
    found += [other for inert, other in inert_settings(s) if inert in parts]
    for idle in found:
        other = idle.partition("=")[0]
        value = f" = {lookup(s, other)}" if "=" in idle else ""
        raise UserError(f"{what}: it has no effect while {other}{value} is there; {remedy}")


# ----- presets ----------------------------------------------------------------------------------------------

def load_preset(name: str) -> tuple[dict[str, Any], str]:
    """(keyword arguments of resolve(), pinned ml_hash) of records/presets/NAME.toml."""
    toml = preset_file(name)
    sets = [f"{p}={show(v)}" for p, v in toml["set"].items()]
    return {"name": toml["record"], "scale": toml["scale"], "sets": sets}, toml["ml_hash"]


def preset_file(name: str) -> dict[str, Any]:
    """The content of records/presets/NAME.toml."""
    with open(RECORDS / "presets" / f"{name}.toml", "rb") as file:
        return tomllib.load(file)


def preset_names() -> list[str]:
    """Names of the presets that this code can train, sorted."""
    names = [p.stem for p in files.listed(RECORDS / "presets", "*.toml")]
    return [name for name in names if "successor" not in preset_file(name)]


def refuse_retired(name: str) -> None:
    """UserError for a preset whose hash is not that of any settings now."""
    if (RECORDS / "presets" / f"{name}.toml").exists() and name not in preset_names():
        toml = preset_file(name)
        raise UserError(
            f"preset {name} is retired, because {toml['why']}: train {toml['successor']}, or check "
            f"out {toml['code']}"
        )


def resolve_name(name: str, *, scale: str | None = None, sets: Sequence[str] = (),
                 **changes: Sequence[str]) -> Resolved:
    """resolve() for a record's or a preset's name. A preset is frozen: it must resolve to its pinned hash."""
    refuse_retired(name)
    if name not in preset_names():
        return resolve(name, scale=scale or "full", sets=sets, **changes)
    fixed, pinned = load_preset(name)
    if scale and scale != fixed["scale"]:
        raise UserError(f"{name} is frozen at --scale {fixed['scale']}: leave --scale out or name a record")
    frozen = resolve(fixed["name"], scale=fixed["scale"], sets=fixed["sets"], preset=name)
    if ml_hash(frozen.settings) != pinned:
        raise UserError(f"preset {name} resolves to {ml_hash(frozen.settings)}, pinned {pinned}: a frozen "
                        "preset must not change; make a new one")
    if not sets and not any(changes.values()):
        return frozen
    own = {text.partition("=")[0].strip() for text in sets}
    kept = [text for text in fixed["sets"] if text.partition("=")[0] not in own]
    return resolve(fixed["name"], scale=fixed["scale"], sets=[*kept, *sets], **changes)
