"""Settings by path: types of values, strict assignment, plain values, differences and hashes. What `--set` and deltas stand on.

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

import settings
from common import arguments
from common.errors import UserError, did_you_mean, near
from declare import lookup
from settings import Settings

LIMIT = arguments.COUNT_LIMIT  # of any whole number in a setting


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
def fields():
    """Every field of the vocabulary by path, sections included, in the order of declaration."""
    found = {}

    def walk(cls, prefix):
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            hint, optional = hints[f.name], False
            if type(None) in typing.get_args(hint):
                hint, optional = without_none(hint), True
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            path = prefix + f.name
            found[path] = Field(path, hint, optional, default, f.metadata)
            if dataclasses.is_dataclass(hint):
                walk(hint, path + ".")

    walk(Settings, "")
    return found


def above(path: str) -> str:
    """Path of the section that holds a setting; empty at the top."""
    return path.rpartition(".")[0]


def without_none(hint: types.UnionType) -> object:
    """`T` of `T | None`; a union of the rest if there are several."""
    return functools.reduce(operator.or_, (a for a in typing.get_args(hint) if a is not type(None)))


def find_field(path):
    known = fields()
    if path not in known:
        raise UserError(f"unknown setting {path!r}{did_you_mean(nearest_settings(path))}; `python -m records features` "
                        "shows all")
    return known[path]


def nearest_settings(path: str) -> list[str]:
    """At most three paths of settings that a wrong one may mean: the end of a path (`muon.lr`), another case or
    separator, then what is spelt nearly so."""
    known = list(fields())
    words = re.split(r"[./_ -]+", path.casefold().strip("./ "))
    found = [p for p in known if re.split(r"[._]", p)[-len(words):] == words]
    found.sort(key=lambda p: p.split(".")[-1] != path.casefold().split(".")[-1])  # schedule.steps before optim.muon.ns_steps
    found = found or difflib.get_close_matches(path.casefold(), known, n=3, cutoff=0.55)
    if not found:
        last = difflib.get_close_matches(path.casefold().split(".")[-1], {p.split(".")[-1] for p in known}, n=1)
        found = [p for p in known if p.split(".")[-1] in last]
    return found[:3]


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
        raise UserError(f"{where}: {f.path} = {shortened(value)}: expected a table like {{field = value}}, true"
                        + (" or false" if f.optional else ""))
    names = [x.name for x in dataclasses.fields(f.type)]
    for name in value:
        if name not in names:
            raise UserError(f"{where}: {f.path} has no field {name!r}{near(name, names)}: it has {', '.join(names)}")
    return f.type(**{k: typed(find_field(f"{f.path}.{k}"), v, where) for k, v in value.items()})


WORDS = {int: (f"a whole number of at most {LIMIT}", "whole numbers", "2"), float: ("a number that is finite", "finite numbers", "0.5"),
         bool: ("true or false", "truth values", "true"), str: ("a string", "strings", '"a"')}


def converted(hint: object, value: object) -> object:
    """A TOML value as the type `hint` has it; TypeError if it is none.

    hint: int, float, bool, str, a Literal, tuple[T, ...], tuple[T, T] (a fixed length), or a union of these, whose first
    member that takes the value decides.
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
    """What `converted` takes, for people: `a whole number or a list of whole numbers like [2, 2]`."""
    if isinstance(hint, types.UnionType):
        return " or ".join(map(expected, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list of {plural(typing.get_args(hint)[0])} like {example(hint)}"
    return WORDS[hint][0]


def values_text(f: Field) -> str:
    """The values that a setting takes, for people: `whole number, at least 1`, `one of a, b`, `true or false`."""
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


def shortened(value):
    """A value as Python shows it, cut to a length that leaves a message readable."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def parse_assignment(text, flag):
    """`path=value` with a TOML value; bare words are strings (`model.norm=rmsnorm`)."""
    path, equals, raw = text.partition("=")
    if not equals or not path.strip() or not raw.strip():
        raise UserError(f"{flag} {text[:60]}: expected path=value, like {flag} schedule.steps=100")
    try:
        value = tomllib.loads(f"v = {raw.strip()}")["v"]
    except (ValueError, RecursionError):  # not TOML; or a number of thousands of digits, or thousands of brackets
        value = raw.strip()
    return path.strip(), value


def prefixes(path):
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


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
        if type(None) in typing.get_args(hint):
            hint = without_none(hint)
        out[name] = from_plain(value, hint) if dataclasses.is_dataclass(hint) and value is not None else tupled(value)
    return cls(**out)


def tupled(value: object) -> object:
    """Lists of JSON, nested ones too, as the tuples that settings hold."""
    return tuple(map(tupled, value)) if isinstance(value, list) else value


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
    paths = [p for p in fields() if left.get(p) != right.get(p)]
    covered = [p for p in paths if fields()[p].is_section]
    return [(p, left.get(p), right.get(p)) for p in paths if p not in covered]
