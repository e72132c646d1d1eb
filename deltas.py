"""The engine of deltas: a record is a list of `path = value` lines on its parent, and so is every change to it.

    resolve("short/9", without=["model.attn.value_residual"], scale="tiny", sets=["schedule.steps=20"])

Order: defaults -> chain of records (without the reverted ones) -> --with / --without -> scale -> --set -> check.
The command line of the trainer lives here too, so that a wrong setting is refused before torch is imported.
"""

import argparse
import dataclasses
import datetime
import difflib
import functools
import hashlib
import json
import math
import sys
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import files
import settings
from settings import BEFORE, REFUSE, SCALES, Settings, UserError, lookup

RECORDS = Path(__file__).parent / "records"
ATTEMPTS = Path(__file__).parent / "attempts"  # ideas that are no record yet: named in full, never part of a lineage
ATTEMPT = "attempts/"  # how the ref of one begins
LINEAGES = ("short", "medium", "optimizer", "variants")
KINDS = ("ml", "systems", "both", "retiming", "baseline")
BADGES = ("spec", "math", "numerics", "trained")
LINES = {"id": str, "title": str, "parent": str, "order": (int, float), "date": (str, datetime.date), "people": list,
         "kind": str, "source": str, "badge": str, "notes": str, "subsumed": str, "delta": dict, "published": dict,
         "attempt": str}  # lines that a record.toml may have
SOURCES = ("log", "lineage", "reconstructed", "own")  # own: designed in this project, no upstream record


# ----- records on disk --------------------------------------------------------------------------------------------

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

    def answers(self, ref: object) -> bool:
        """Is this the record that `ref` means: its own ref, or that of the attempt that it was?"""
        return ref == self.ref or (self.attempt != "" and ref == ATTEMPT + self.attempt)


@functools.lru_cache
def load_records():
    """All records by ref, in order of lineage and `order`. Errors name the file."""
    found = {}
    for lineage in LINEAGES:
        for path in sorted((RECORDS / lineage).glob("*/record.toml")):
            record = read_record(path, lineage)
            if record.ref in found:
                raise UserError(f"{path}: id {record.ref} is already taken by {found[record.ref].folder}")
            found[record.ref] = record
    for record in found.values():
        if record.parent is not None and record.parent not in found:
            raise UserError(f"{record.folder}/record.toml: parent {record.parent!r} does not exist")
    return dict(sorted(found.items(), key=lambda item: (LINEAGES.index(item[0].split("/")[0]), item[1].order)))


def read_record(path, lineage):
    """The Record of a record.toml (see parse_record). Errors name the file."""
    try:
        with open(path, "rb") as file:
            toml = tomllib.load(file)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    return parse_record(toml, path, lineage)


def parse_record(toml: dict, path: Path, lineage: str) -> Record:
    """The Record of a parsed record.toml, which lies, or would lie, at `path`. lineage: "attempts" for one without an id."""
    for key, value in toml.items():
        if key not in LINES:
            raise UserError(f"{path}: unknown line {key!r}{near(key, sorted(LINES))}")
        if not isinstance(value, LINES[key]):
            expected = {str: "text in quotes", list: 'a list like ["@me"]', dict: f"a table [{key}]"}.get(
                LINES[key], "a number or a date")
            raise UserError(f"{path}: {key} = {value!r}: expected {expected}")
    slug = path.parent.name.partition("_")[2]
    if lineage == ATTEMPT[:-1]:
        if "id" in toml:
            raise UserError(f"{path}: an attempt has no id, it gets one when it becomes a record; record {toml['id']} is run "
                            "by its own name")
        slug = path.parent.name
        few = {"title": slug, "date": "", "people": [], "kind": "ml", "source": "own", "order": math.inf}
        toml = {**few, **toml, "id": slug}
    try:
        record = Record(
            ref=f"{lineage}/{toml['id']}", title=toml["title"], parent=toml.get("parent"), date=str(toml["date"]),
            people=toml["people"], kind=toml["kind"], source=toml["source"], badge=toml.get("badge", "spec"),
            slug=slug, order=float(toml.get("order", 0) or toml["id"]),
            delta=toml.get("delta", {}), published=toml.get("published", {}), notes=toml.get("notes", ""),
            subsumed=toml.get("subsumed", ""), folder=path.parent, attempt=toml.get("attempt", ""))
    except KeyError as error:
        raise UserError(f"{path}: the line {error} is missing") from None
    except ValueError:
        raise UserError(f"{path}: id {toml['id']!r} is not a number: add order = ... for sorting") from None
    for key, choices in (("kind", KINDS), ("badge", BADGES), ("source", SOURCES)):
        if getattr(record, key) not in choices:
            raise UserError(f"{path}: {key} = {getattr(record, key)!r}: must be one of {', '.join(choices)}")
    if not record.delta and not record.subsumed and record.kind not in ("retiming", "baseline"):
        raise UserError(f"{path}: an empty [delta] needs subsumed = \"why nothing changes here\" or kind = \"retiming\"")
    return record


def find_record(name):
    """Record for `short/9`, `short/009`, `short/head` or `short/shortcuts_tweaks` (its slug), or of `attempts/NAME`."""
    if name.startswith(ATTEMPT):
        return find_attempt(name)
    records = load_records()
    lineage, _, key = name.partition("/")
    members = [r for r in records.values() if r.ref.startswith(lineage + "/")]
    if members and key:
        if key == "head":
            return members[-1]
        for record in members:
            if key in (record.slug, record.ref.split("/")[1]) or key.lstrip("0") == record.ref.split("/")[1]:
                return record
    names = preset_names() + list(records) + [f"{r.ref.split('/')[0]}/{r.slug}" for r in records.values()]
    names += [ATTEMPT + x for x in attempt_names()]
    raise UserError(f"unknown record {name!r}{near(name, names)}; `python -m records list` shows them")


def attempt_names() -> list[str]:
    """Names of the attempts in this checkout, sorted."""
    return [p.name for p in files.listed(ATTEMPTS) if (p / "record.toml").is_file()] if ATTEMPTS.is_dir() else []


def find_attempt(name: str) -> Record:
    """The Record of attempts/NAME; of one that was promoted, the record that it became."""
    key = name.removeprefix(ATTEMPT).rstrip("/")  # a shell completes folders with a slash
    promoted = next((r for r in load_records().values() if r.attempt and r.attempt == key), None)
    if promoted is not None:
        return promoted
    if key not in attempt_names():
        remedy = f"write {ATTEMPT}NAME/record.toml with parent = \"short/33\" and a [delta], or use `records submit`"
        raise UserError(f"unknown attempt {name!r}{near(key, attempt_names())}: {remedy}")
    path = ATTEMPTS / key / "record.toml"
    record = read_record(path, ATTEMPT[:-1])
    check_parent(record, path)
    return record


def check_parent(record: Record, path: Path) -> None:
    """UserError unless an attempt's parent is a record: what is built on must have been shown."""
    if record.parent is None:
        raise UserError(f"{path}: the line 'parent' is missing: name the record it builds on")
    if record.parent.startswith(ATTEMPT):
        raise UserError(f"{path}: parent {record.parent!r} is an attempt: promote that one first, or put its lines into "
                        "this delta")
    if record.parent not in load_records():
        raise UserError(f"{path}: parent {record.parent!r} does not exist{near(record.parent, list(load_records()))}")


def chain(record):
    """The records from the root of the lineage to this one."""
    links, records = [], load_records()
    while record is not None:
        if record in links:
            raise UserError(f"{record.folder}/record.toml: its parents form a circle")
        links.append(record)
        record = records.get(record.parent) if record.parent else None
    return links[::-1]


def near(word, words):
    """' (did you mean ...?)' or ''."""
    close = difflib.get_close_matches(word, words, n=3, cutoff=0.55)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


# ----- the schema: fields by path ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Field:
    """One setting of the vocabulary: its path, type (None removed), whether it may be off, and its metadata."""
    path: str
    type: object
    optional: bool
    default: object
    metadata: dict

    @property
    def is_section(self):
        return dataclasses.is_dataclass(self.type)

    @property
    def is_feature(self):
        """Optional parts and switches: what can be turned off by nature."""
        return self.optional or (self.type is bool and self.metadata["off"] is False)


@functools.lru_cache
def schema():
    """Every field of the vocabulary by path, sections included, in the order of declaration."""
    fields = {}

    def walk(cls, prefix):
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            hint, optional = hints[f.name], False
            if isinstance(hint, types.UnionType):
                hint, optional = next(a for a in hint.__args__ if a is not type(None)), True
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            path = prefix + f.name
            fields[path] = Field(path, hint, optional, default, f.metadata)
            if dataclasses.is_dataclass(hint):
                walk(hint, path + ".")

    walk(Settings, "")
    return fields


def find_field(path):
    fields = schema()
    if path not in fields:
        last = path.split(".")[-1]
        words = list(fields) + [p for p in fields if p.split(".")[-1] == last]
        close = near(path, words) or near(last, [p.split(".")[-1] for p in fields])
        raise UserError(f"unknown setting {path!r}{close}; `python -m records features` shows all")
    return fields[path]


# ----- assigning values --------------------------------------------------------------------------------------------

def replaced(node, path, value):
    """A copy of nested dataclasses with the value at a dotted path."""
    name, _, rest = path.partition(".")
    if rest:
        value = replaced(getattr(node, name), rest, value)
    return dataclasses.replace(node, **{name: value})


def assign(s, path, value, where):
    """Settings with `path = value` (a TOML value), strictly typed. `where` names the source in errors."""
    f = find_field(path)
    parts = path.split(".")
    for i in range(1, len(parts)):
        if lookup(s, ".".join(parts[:i])) is None:
            above = ".".join(parts[:i])
            raise UserError(f"{where}: {path} cannot be set because {above} is off: turn it on first (--with {above})")
    return replaced(s, path, typed(f, value, where))


def typed(f, value, where):
    """The value converted to the field's type, or an error with the path, the type and near misses."""
    def refuse(expected):
        raise UserError(f"{where}: {f.path} = {value!r}: expected {expected}")

    if f.optional and value is False:
        return None
    if f.is_section:
        if value is True:
            return f.type()
        if not isinstance(value, dict):
            refuse("a table like {field = value}, true" + (" or false" if f.optional else ""))
        names = [x.name for x in dataclasses.fields(f.type)]
        for name in value:
            if name not in names:
                raise UserError(f"{where}: {f.path} has no field {name!r}{near(name, names)}: it has {', '.join(names)}")
        return f.type(**{k: typed(find_field(f"{f.path}.{k}"), v, where) for k, v in value.items()})
    if typing.get_origin(f.type) is tuple:
        if not isinstance(value, (list, tuple)) or any(type(x) is not int for x in value):
            refuse("a list of whole numbers like [0, 4, 11]")
        return tuple(value)
    if typing.get_origin(f.type) is typing.Literal:
        choices = typing.get_args(f.type)
        if value not in choices:
            refuse(f"one of {', '.join(choices)}{near(str(value), choices)}")
        return value
    if f.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not f.type or value != value:
        refuse({int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[f.type])
    return value


def parse_assignment(text, flag):
    """`path=value` with a TOML value; bare words are strings (`model.norm=rmsnorm`)."""
    path, equals, raw = text.partition("=")
    if not equals or not path.strip() or not raw.strip():
        raise UserError(f"{flag} {text}: expected path=value, like {flag} schedule.steps=100")
    try:
        value = tomllib.loads(f"v = {raw.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    return path.strip(), value


# ----- resolve -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Resolved:
    """A complete description of a run and how it came about."""
    settings: Settings
    record: Record | None
    scale: str
    changes: tuple  # normalised flags, for logs and run names
    report: tuple  # printed lines: what went along, what was kept or dropped
    preset: str = ""


def resolve(name, *, scale="full", sets=(), with_=(), without=(), revert=(), preset=""):
    """Resolved settings of a record (its name, or a Record) with changes; UserError, one clear line, if anything is wrong."""
    if scale not in SCALES:
        raise UserError(f"unknown scale {scale!r}{near(scale, list(SCALES))}: choose one of {', '.join(SCALES)}")
    record = name if isinstance(name, Record) else find_record(name)
    links = chain(record)
    reverted = {find_record(r).ref for r in revert}
    for ref in reverted:
        if ref not in [r.ref for r in links]:
            raise UserError(f"--revert {ref}: it is not an ancestor of {record.ref}")
    s, report = replay(links, reverted)
    s, lines = switch(s, links, with_, without)
    s = settings.scaled(s, scale)
    assigned, moved = {}, []
    for text in sets:
        path, value = parse_assignment(text, "--set")
        if path in assigned and assigned[path] != value:
            raise UserError(f"--set {path} is given twice with different values: keep one")
        assigned[path] = value
        if path in {w.partition("=")[0] for w in without}:
            raise UserError(f"{path} is both in --without and --set: keep one of the two")
        before, s = s, assign(s, path, value, "--set")
        if lookup(s, path) != lookup(before, path):
            moved.append(path)
    for path in moved:
        refuse_idle(s, path, f"--set {path}", "change that too, or leave this away")
    changes = [f"--revert {r}" for r in revert] + [f"--with {w}" for w in with_] + [f"--without {w}" for w in without]
    changes += [f"--set {x}" for x in sets]
    try:
        checked = settings.check(settings.lifted(s))
    except UserError as error:
        if not reverted:
            raise
        raise UserError(f"without {', '.join(sorted(reverted))} the rest of the chain does not hold: {error}; revert the "
                        "later record that needs it as well, or switch the setting off with --without") from None
    return Resolved(checked, record, scale, tuple(changes), tuple(report + lines), preset)


def replay(links, reverted):
    """(settings, report) of a chain without the deltas of the reverted records.

    A path that is set again later keeps the later value (`kept`); a later line below a feature that no longer exists
    is `dropped`. Step counts stay. Refused if the number of layers would change.
    """
    s, report = Settings(), []
    lost = {}  # paths of reverted deltas that nothing has set again yet -> ref
    for record in links:
        for path, value in record.delta.items():
            where = f"{record.folder.name}/record.toml"
            if record.ref in reverted:
                find_field(path)
                if path == "model.num_layers":
                    raise UserError(f"--revert {record.ref}: it changes the number of layers, and later records count "
                                    f"on it; use --set model.num_layers=...")
                if path != "schedule.steps":  # step counts stay: changing them is --set's business
                    lost[path] = record.ref
                    continue
            else:
                for above in prefixes(path):
                    if reverted and lookup(s, above) is None and above in lost:
                        report.append(f"dropped  {path} = {show(value)} ({record.ref}): {above} came with {lost[above]}")
                        break
                else:
                    if path in lost:
                        report.append(f"kept     {path} = {show(value)} ({record.ref}) was also set by {lost.pop(path)}")
                    s = assign(s, path, value, where)
                continue
            s = assign(s, path, value, where)
    for path, ref in lost.items():
        report.append(f"reverted {path}: {show(lookup(s, path))} (set by {ref})")
    if reverted:
        report += [] if any(r.startswith("kept") for r in report) else ["kept     (nothing)"]
        report += [] if any(r.startswith("dropped") for r in report) else ["dropped  (nothing)"]
    return s, report


def prefixes(path):
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def switch(s, links, with_, without):
    """(settings, report) after --with and --without; what needs a switched-off setting goes along and is printed."""
    report = []
    both = {w.partition("=")[0].partition("@")[0] for w in with_} & set(without)
    if both:
        raise UserError(f"{both.pop()} is both in --with and --without: keep one of the two")
    for text in with_:
        s, line = turn_on(s, text)
        report.append(line)
    for path in without:
        s, line = turn_off(s, links, path)
        report.append(line)
        while unmet := settings.unmet_needs(s):
            other, needs, default = unmet[0]
            s = replaced(s, other, default)
            report.append(f"without {other}: it needs {needs}")
    return s, report


def turn_on(s, text):
    """--with path, path=value, or path@record (the values it has in that record)."""
    path, at, ref = text.partition("@")
    if at:
        value = lookup(replay(chain(find_record(ref)), set())[0], find_field(path).path)
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
            raise UserError(f"--with {path}: it is a value, not a switch: write --with {path}=... or --set {path}=...")
    s = assign(s, path, value, "--with")
    return s, f"with {path}: {show(lookup(s, path))}"


def turn_off(s, links, path):
    """--without path: a feature goes off; a number or choice goes back to the value before the record that set it."""
    f = find_field(path)
    old, off = lookup(s, path), f.metadata["off"]
    hint = f"use --set {path}=... or --revert RECORD"
    if any(lookup(s, above) is None for above in prefixes(path)):
        above = next(a for a in prefixes(path) if lookup(s, a) is None)
        raise UserError(f"--without {path}: {above} is already off in {links[-1].ref}")
    if off == REFUSE or (f.is_section and not f.optional):
        raise UserError(f"--without {path}: it has no sensible off; {hint}")
    if off == BEFORE and not f.optional:
        setters = [r for r in links if path in r.delta or any(a in r.delta for a in prefixes(path))]
        if not setters:
            raise UserError(f"--without {path}: no record of the chain has set it; {hint}")
        before = lookup(replay(links[:links.index(setters[-1])], set())[0], path)
        if before is None:
            above = next(a for a in prefixes(path) if a in setters[-1].delta)
            raise UserError(f"--without {path}: it came with {above} in {setters[-1].ref}; "
                            f"use --without {above} or --set {path}=...")
        others = [p for p in setters[-1].delta if p != path and not p.startswith("schedule.")]
        with_it = f", which also set {', '.join(others)}" if others else ""
        new, why = before, f"value before {setters[-1].ref}{with_it}"
    else:
        new, why = (None if f.optional and off == BEFORE else off), "off"
    refuse_idle(s, path, f"--without {path}", f"switch that off or {hint}")
    if old == new:
        raise UserError(f"--without {path}: it is already {show(new)} in {links[-1].ref}")
    return replaced(s, path, new), f"without {path}: {show(old)} -> {show(new)} ({why})"


def refuse_idle(s, path, what, remedy):
    """UserError if a setting has no effect beside others: by its own condition; for the AdamW group of the matrices Muon."""
    idle = find_field(path).metadata["idle"] or ("optim.muon" if path.startswith("optim.matrix.") else "")
    if idle and settings.holds(s, idle):
        other = idle.partition("=")[0]
        value = f" = {lookup(s, other)}" if "=" in idle else ""
        raise UserError(f"{what}: it has no effect while {other}{value} is there; {remedy}")


# ----- views: plain values, hashes, differences --------------------------------------------------------------------

def show(value):
    """A value as one would type it: TOML."""
    if value is None:
        return "off"
    if dataclasses.is_dataclass(value):
        return "{" + ", ".join(f"{k} = {show(v)}" for k, v in vars(value).items()) + "}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(show, value)) + "]"
    return json.dumps(value) if isinstance(value, (str, bool)) else repr(value)


def plain(node):
    """Nested dicts of all values (off features are None)."""
    return dataclasses.asdict(node)


def from_plain(values, cls=Settings):
    """Settings back from `plain` (checkpoints, logs). Unknown or missing names: UserError."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if set(values) - set(fields):
        raise UserError(f"settings hold unknown names {sorted(set(values) - set(fields))}: written by another version")
    hints, out = typing.get_type_hints(cls), {}
    for name, value in values.items():
        hint = hints[name]
        if isinstance(hint, types.UnionType):
            hint = next(a for a in hint.__args__ if a is not type(None))
        if dataclasses.is_dataclass(hint) and value is not None:
            value = from_plain(value, hint)
        out[name] = tuple(value) if isinstance(value, list) else value
    return cls(**out)


def deviations(node):
    """Nested dict of the values that differ from the defaults; an optional part that is on is always present.

    Hashes are taken over this, so that a new field with a neutral default changes no existing hash.
    """
    out = {}
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        if dataclasses.is_dataclass(value):
            inner = deviations(value)
            if inner or default is None:
                out[f.name] = inner
        elif value != default:
            out[f.name] = value
    return out


def _hash(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def ml_hash(s):
    """Identity of what is computed (axes ml and numerics), 16 hex digits. The target is not part of it."""
    tree = deviations(dataclasses.replace(s, validation=dataclasses.replace(s.validation, target=3.28)))
    tree.pop("system", None)
    return _hash([settings.NUMERICS_VERSION, tree])


def system_hash(s):
    return _hash(deviations(s).get("system", {}))


def flat(s):
    """Path -> leaf value; off features appear once, as None."""
    out = {}

    def walk(node, prefix):
        for f in dataclasses.fields(node):
            value = getattr(node, f.name)
            if dataclasses.is_dataclass(value):
                walk(value, prefix + f.name + ".")
            else:
                out[prefix + f.name] = value

    walk(s, "")
    return out


def difference(a, b):
    """List of (path, value in a, value in b) where two settings differ; a missing path shows as None."""
    left, right = flat(a), flat(b)
    paths = [p for p in schema() if left.get(p) != right.get(p)]
    covered = [p for p in paths if schema()[p].is_section]
    return [(p, left.get(p), right.get(p)) for p in paths if p not in covered]


# ----- presets -----------------------------------------------------------------------------------------------------

def load_preset(name):
    """Keyword arguments of resolve() for records/presets/NAME.toml, and its pinned hash."""
    path = RECORDS / "presets" / f"{name}.toml"
    with open(path, "rb") as file:
        toml = tomllib.load(file)
    sets = [f"{p}={show(v)}" for p, v in toml["set"].items()]
    return {"name": toml["record"], "scale": toml["scale"], "sets": sets}, toml["ml_hash"]


def preset_names():
    return sorted(p.stem for p in (RECORDS / "presets").glob("*.toml"))


def resolve_name(name, *, scale=None, sets=(), **changes):
    """resolve() for a record or a preset. A preset is frozen: it must resolve to its pinned hash."""
    if name not in preset_names():
        return resolve(name, scale=scale or "full", sets=sets, **changes)
    fixed, pinned = load_preset(name)
    if scale and scale != fixed["scale"]:
        raise UserError(f"{name} is frozen at --scale {fixed['scale']}: leave --scale away or name a record")
    frozen = resolve(fixed["name"], scale=fixed["scale"], sets=fixed["sets"], preset=name)
    if ml_hash(frozen.settings) != pinned:
        raise UserError(f"preset {name} resolves to {ml_hash(frozen.settings)}, pinned {pinned}: a frozen preset must not "
                        "change; make a new one")
    if not sets and not any(changes.values()):
        return frozen
    return resolve(fixed["name"], scale=fixed["scale"], sets=[*fixed["sets"], *sets], **changes)


# ----- command line of the trainer ---------------------------------------------------------------------------------

def parser():
    p = argparse.ArgumentParser(
        prog="train_gpt.py", description="Train a record of the NanoGPT speedrun, or any change to one.",
        epilog="Records: `python -m records list`. Settings: `python -m records features`.")
    p.add_argument("record", nargs="?", help="short/9, short/head, short/unet_double_lr, attempts/my_idea or a preset "
                                             "(tiny-v1)")
    p.add_argument("--scale", choices=list(SCALES), help="full (as published), small (one GPU), tiny (CPU), micro (tests)")
    p.add_argument("--set", dest="sets", action="append", default=[], metavar="PATH=VALUE", help="literal value")
    p.add_argument("--with", dest="with_", action="append", default=[], metavar="PATH[=VALUE|@RECORD]",
                   help="turn a feature on")
    p.add_argument("--without", action="append", default=[], metavar="PATH", help="turn a feature off (ablation)")
    p.add_argument("--revert", action="append", default=[], metavar="RECORD", help="replay the chain without its delta")
    p.add_argument("--seed", type=int, default=0, help="seed of the initial weights")
    p.add_argument("--data", metavar="DIR", help="folder of shards (default: embedded corpus at tiny and micro, "
                                                 "data/fineweb10B else)")
    p.add_argument("--out", default="runs", metavar="DIR", help="where run folders go (default runs)")
    p.add_argument("--save", action="store_true", help="write checkpoint.pt at the end")
    p.add_argument("--compile-cache", metavar="FILE", help="compiled code in one file, for machines that start bare: read if it "
                                                           "exists, written after the warm-up if something new was compiled")
    p.add_argument("--registered", default="", metavar="HASH", help="entry of a manifest that announced this run (set by "
                                                                    "`records compare` and `records submit`)")
    p.add_argument("--plan", action="store_true", help="print settings, schedule, shapes and parameters; train nothing")
    p.add_argument("--strict", action="store_true", help="refuse to run in a slower way than the record and the device allow, "
                                                         "and fail if anything was compiled after the warm-up")
    p.add_argument("--check-sync", action="store_true", help="stop at the first operation of a timed step that makes the program "
                                                            "wait for the device")
    p.add_argument("--profile", metavar="A:B", help="torch.profiler trace of steps A..B-1 into the run folder")
    return p


def command_line(argv=None):
    """(options, Resolved), or a one-line error on stderr and exit code 2. Imports no torch."""
    options = parser().parse_args(argv)
    try:
        if options.record is None:
            raise UserError("no record named. On a CPU type `./run.sh` (two minutes) or `train_gpt.py short/head "
                            "--scale tiny`; on GPUs `torchrun --standalone --nproc_per_node=8 train_gpt.py short/head` "
                            "after `python -m data.fineweb short/head`")
        if options.seed < 0:
            raise UserError(f"--seed {options.seed}: must not be negative")
        if options.profile:
            start, _, end = options.profile.partition(":")
            if not (start.isdigit() and end.isdigit() and int(start) < int(end)):
                raise UserError(f"--profile {options.profile}: expected A:B with A < B, like --profile 10:14")
        resolved = resolve_name(options.record, scale=options.scale, sets=options.sets, with_=options.with_,
                                without=options.without, revert=options.revert)
    except UserError as error:
        fail(error)
    return options, resolved


def fail(error, code=2):
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)
