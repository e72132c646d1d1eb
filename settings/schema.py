"""Settings by path: types of values, strict assignment, plain values, differences and hashes.

`--set` and the deltas of records go through `assign`:

    assign(settings, "optim.muon.lr", 0.02, "--set")
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import operator
import re
import tomllib
import types
import typing
from dataclasses import dataclass
from typing import Any

from common import arguments
from common.errors import UserError, did_you_mean, near
from settings import Settings, renames
from settings.declare import default_of, lookup, walk
from settings.numerics import NUMERICS_VERSION

LIMIT = arguments.COUNT_LIMIT  # of any whole number in a setting


# ----- the schema: fields by path ---------------------------------------------------------------------------

@dataclass(frozen=True)
class Field:
    """One setting: its type without None, whether it may be off (optional), its metadata (declare.opt)."""
    path: str
    type: object
    optional: bool
    default: object
    metadata: dict

    @property
    def is_section(self) -> bool:
        """True for a dataclass, whose fields are settings too."""
        return dataclasses.is_dataclass(self.type)

    @property
    def is_feature(self) -> bool:
        """True for optional parts and for switches, which --with and --without turn on and off."""
        return self.optional or (self.type is bool and self.metadata["off"] is False)


@functools.lru_cache
def fields() -> dict[str, Field]:
    """Path -> field of the whole vocabulary, sections included, in the order of declaration."""
    found = {}

    def declared(cls, prefix):
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            hint, optional = hints[f.name], False
            if type(None) in typing.get_args(hint):
                hint, optional = without_none(hint), True
            path = prefix + f.name
            found[path] = Field(path, hint, optional, default_of(f), f.metadata)
            if dataclasses.is_dataclass(hint):
                declared(hint, path + ".")

    declared(Settings, "")
    return found


def above(path: str) -> str:
    """Path of the section that holds a setting; empty at the top."""
    return path.rpartition(".")[0]


def without_none(hint: types.UnionType) -> object:
    """T for the type `T | None`; for more members, the union without None."""
    return functools.reduce(operator.or_, (a for a in typing.get_args(hint) if a is not type(None)))


def find_field(path: str) -> Field:
    """The field at a path, or a UserError with the paths that may be meant."""
    known = fields()
    if path not in known:
        if (present := renames.present_path(path)) in known:
            raise UserError(f"{path} is now called {present}: write that")
        raise UserError(f"unknown setting {path!r}{did_you_mean(nearest_settings(path))}; "
                        "`python -m records features` shows all")
    return known[path]


def nearest_settings(path: str) -> list[str]:
    """At most three paths that a wrong one may mean.

    First the ends of paths (`muon.lr`), in any case and with any separator; otherwise similar spellings.
    """
    known = list(fields())
    words = re.split(r"[./_ -]+", path.casefold().strip("./ "))
    found = [p for p in known if re.split(r"[._]", p)[-len(words):] == words]
    last = path.casefold().split(".")[-1]
    found.sort(key=lambda p: p.split(".")[-1] != last)  # schedule.steps before optim.muon.ns_steps
    found = found or difflib.get_close_matches(path.casefold(), known, n=3, cutoff=0.55)
    if not found:
        nearest = difflib.get_close_matches(last, {p.split(".")[-1] for p in known}, n=1)
        found = [p for p in known if p.split(".")[-1] in nearest]
    return found[:3]


# ----- assigning values -------------------------------------------------------------------------------------

def replaced(node: Any, path: str, value: object) -> Any:
    """A copy of nested dataclasses with the value at a dotted path."""
    name, _, rest = path.partition(".")
    if rest:
        value = replaced(getattr(node, name), rest, value)
    return dataclasses.replace(node, **{name: value})


def assign(s: Settings, path: str, value: object, where: str) -> Settings:
    """The settings with another value at a path.

    Args:
        value: as TOML gives it. It must have the field's type; an integer stands for a float.
        where: the source of the value (`--set`, a file), named in errors.
    """
    f = find_field(path)
    for section_path in prefixes(path):
        if lookup(s, section_path) is None:
            raise UserError(f"{where}: {path} cannot be set because {section_path} is off: turn it on first "
                            f"(--with {section_path})")
    return replaced(s, path, typed(f, value, where))


def typed(f: Field, value: object, where: str) -> object:
    """The value converted to the field's type, or an error with the path, the type and near misses."""
    if f.optional and value is False:
        return None
    if f.is_section:
        return section(f, value, where)
    try:
        return converted(f.type, value)
    except TypeError:
        choices = typing.get_args(f.type) if typing.get_origin(f.type) is typing.Literal else ()
        raise UserError(f"{where}: {f.path} = {shortened(value)}: expected {expected(f.type)}"
                        f"{near(str(value), choices)}") from None


def section(f: Field, value: object, where: str) -> object:
    """The dataclass of a section from a table of values, or with its defaults from `true`."""
    if value is True:
        return f.type()
    if not isinstance(value, dict):
        raise UserError(f"{where}: {f.path} = {shortened(value)}: expected a table like {{field = value}}, "
                        + ("true or false" if f.optional else "or true (all defaults)"))
    names = [x.name for x in dataclasses.fields(f.type)]
    for name in value:
        if name not in names:
            if (present := renames.present_path(f"{f.path}.{name}")) in fields():
                raise UserError(f"{where}: {f.path}.{name} is now called {present}: write that")
            raise UserError(f"{where}: {f.path} has no field {name!r}{near(name, names)}: it has "
                            + ", ".join(names))
    return f.type(**{k: typed(find_field(f"{f.path}.{k}"), v, where) for k, v in value.items()})


# type: (one value, several values, an example), as messages say it
WORDS = {
    int: (f"a whole number of at most {LIMIT}", "whole numbers", "2"),
    float: ("a number that is finite", "finite numbers", "0.5"),
    bool: ("true or false", "truth values", "true"),
    str: ("a string", "strings", '"a"'),
}


def converted(hint: object, value: object) -> object:
    """A TOML value converted to a type; TypeError if it does not have that type.

    Args:
        hint: int, float, bool, str, a Literal, tuple[T, ...], tuple[T, T] (a fixed length), or a union of
            these (the first member that takes the value decides).
    """
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value in members:
            return value
    elif isinstance(hint, types.UnionType):
        for member in members:
            try:
                return converted(member, value)
            except TypeError:
                pass
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            each = members[:1] * len(value) if members[-1] is ... else members
            if len(each) == len(value):
                return tuple(map(converted, each, value))
    elif hint is float and type(value) in (int, float):
        if abs(value) <= LIMIT if type(value) is int else math.isfinite(value):
            return float(value)
    elif type(value) is hint and (hint is not int or abs(value) <= LIMIT):
        return value
    raise TypeError


def expected(hint: object) -> str:
    """The values of a type, for people: `a whole number or a list of whole numbers like [2, 2]`."""
    if isinstance(hint, types.UnionType):
        return " or ".join(map(expected, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list of {plural(typing.get_args(hint)[0])} like {example(hint)}"
    return WORDS[hint][0]


def values_text(f: Field) -> str:
    """The values of a setting, for people: `whole number, at least 1`, `one of a, b`, `true or false`."""
    text = {int: "whole number", float: "number"}.get(f.type) or expected(f.type)
    bounds = str(f.metadata["bounds"])
    return text + (f", {bounds}" if bounds else "") + (", or off" if f.optional else "")


def plural(hint: object) -> str:
    """`whole numbers`, or for a nested list `lists of whole numbers`."""
    return WORDS[hint][1] if hint in WORDS else f"lists of {plural(typing.get_args(hint)[0])}"


def example(hint: object) -> str:
    """A value of this type as one would type it."""
    if hint in WORDS:
        return WORDS[hint][2]
    members = typing.get_args(hint)
    return "[" + ", ".join(map(example, members[:1] * 2 if members[-1] is ... else members)) + "]"


def shortened(value: object) -> str:
    """A value as Python shows it, cut to at most 60 characters for a message."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def parse_assignment(text: str, flag: str) -> tuple[str, Any]:
    """(path, value) of `path=value` with a TOML value; bare words are strings (`model.norm=rmsnorm`).

    Args:
        flag: the option that the text was given to, named in errors.
    """
    path, equals, raw = text.partition("=")
    if not equals or not path.strip() or not raw.strip():
        raise UserError(f"{flag} {text[:60]}: expected path=value, like {flag} schedule.steps=100")
    try:
        value = tomllib.loads(f"v = {raw.strip()}")["v"]
    except (ValueError, RecursionError):  # not TOML, a number of thousands of digits, thousands of brackets
        value = raw.strip()
    return path.strip(), value


def prefixes(path: str) -> list[str]:
    """Paths of the sections that hold a setting, the outermost first."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


# ----- views: plain values, hashes, differences -------------------------------------------------------------

def show(value: object) -> str:
    """A value as one would type it, in TOML; None is `off`."""
    if value is None:
        return "off"
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(show, value)) + "]"
    return json.dumps(value) if isinstance(value, (str, bool)) else repr(value)


def plain(node: Any) -> dict[str, Any]:
    """Nested dicts of all values; a feature that is off is None."""
    return dataclasses.asdict(node)


def from_plain(values: dict[str, Any]) -> Settings:
    """Settings from the nested dicts that `plain` made (checkpoints, logs), now or under former names
    (renames.py). An unknown name: UserError."""
    return _from_plain(renames.present_settings(values), Settings)


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Name -> type of the fields of a section; found once, because every log and checkpoint asks."""
    return typing.get_type_hints(cls)


def _from_plain(values: dict[str, Any], cls: type) -> Any:
    unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise UserError(f"settings hold unknown names {sorted(unknown)}: written by another version")
    hints, out = hints_of(cls), {}
    for name, value in values.items():
        hint = hints[name]
        if type(None) in typing.get_args(hint):
            hint = without_none(hint)
        section_is_on = dataclasses.is_dataclass(hint) and value is not None
        out[name] = _from_plain(value, hint) if section_is_on else tupled(value)
    return cls(**out)


def tupled(value: object) -> object:
    """A value of JSON with its lists, nested ones too, as the tuples that settings hold."""
    return tuple(map(tupled, value)) if isinstance(value, list) else value


def deviations(node: Any) -> dict[str, Any]:
    """Nested dicts of the values that differ from the defaults; an optional section that is on
    always appears.

    Hashes are taken over this, under first names (renames.py), so that neither a new field with a neutral
    default nor a new name changes an existing hash.
    """
    out = {}
    for f in dataclasses.fields(node):
        value, default = getattr(node, f.name), default_of(f)
        if dataclasses.is_dataclass(value):
            inner = deviations(value)
            if inner or default is None:
                out[f.name] = inner
        elif value != default:
            out[f.name] = value
    return out


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def ml_hash(s: Settings) -> str:
    """Identity of what a run computes (axes ml and numerics, without the target), 16 hex digits."""
    reached = dataclasses.replace(s, validation=dataclasses.replace(s.validation, target=3.28))
    tree = renames.first_settings(deviations(reached))
    tree.pop("system", None)
    return _hash([NUMERICS_VERSION, tree])


def system_hash(s: Settings) -> str:
    """Identity of how a run is executed (axis system), 16 hex digits."""
    return _hash(renames.first_settings(deviations(s)).get("system", {}))


def flat(s: Settings) -> dict[str, Any]:
    """Path -> value of every setting that is no section; a section that is off appears once, as None."""
    return {path: value for path, _, value in walk(s) if not dataclasses.is_dataclass(value)}


def difference(a: Settings, b: Settings) -> list[tuple[str, Any, Any]]:
    """(path, value in a, value in b) of every setting that differs; a path that one lacks is None there."""
    left, right = flat(a), flat(b)
    paths = [p for p in fields() if left.get(p) != right.get(p)]
    covered = [p for p in paths if fields()[p].is_section]
    return [(p, left.get(p), right.get(p)) for p in paths if p not in covered]
