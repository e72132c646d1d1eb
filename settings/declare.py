"""How a setting is declared, and what its declaration says of a value: range, default, conditions.

`opt(...)` stands next to the field, in the file of its part. Nothing here knows a setting or imports torch.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

LARGEST = 1e38  # of any number in the settings: float32 overflows at 3.4e38

REFUSE = "refuse"  # --without has no sensible meaning: name --set and --revert instead
BEFORE = "before"  # --without restores the value before the record that last set the field
AS_IS = "as it is"  # system.precision leaves the field alone
PRECISION = "precision"  # the field becomes the dtype of system.precision
PRODUCTS = "products"  # the field becomes the dtype of products of system.precision


@dataclass(frozen=True)
class Bounds:
    """Range of a number, or of each number in a list; None: no own bound (LARGEST bounds every number)."""
    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None
    why: str = ""  # what follows from `most`, said after it

    def fault(self, value: float) -> str:
        """What the value must be and is not, like `must be at least 1`; empty if it is within the bounds."""
        if None not in (self.least, self.below) and not self.least <= value < self.below:
            return f"must lie in {self.least} <= x < {self.below}"
        if self.least is not None and not value >= self.least:
            return f"must be at least {self.least}"
        if self.above is not None and not value > self.above:
            return f"must be greater than {self.above}"
        if self.most is not None and not value <= self.most:
            return f"must be at most {self.most}{self.why}"
        if not -LARGEST <= value <= LARGEST:
            return f"must be at most {LARGEST:g} in size, because float32 overflows beyond"
        return ""

    def __str__(self) -> str:
        """The range for people: `at least 1`, `0 <= x < 1`, `1 to 1000`; empty without bounds."""
        if None not in (self.least, self.below):
            return f"{self.least} <= x < {self.below}"
        if None not in (self.least, self.most):
            return f"{self.least} to {self.most}"
        low = f"at least {self.least}" if self.least is not None else ""
        low = f"greater than {self.above}" if self.above is not None else low
        high = f"at most {self.most}" if self.most is not None else ""
        return ", ".join(part for part in (low, high) if part)


def opt(default: Any, doc: str, *, unit: str = "", off: Any = BEFORE, needs: str = "", idle: str = "",
        along: tuple[str, ...] = (), shrink: str = "", exact: Any = AS_IS, least: float | None = None,
        above: float | None = None, below: float | None = None, most: float | None = None,
        why: str = "") -> Any:
    """Declare one setting.

    Args:
        default: its value in record 1; a dataclass for a section that is always there.
        doc: what it means, with the paper or person whose idea it is. The words before the first `:`, `;`,
            `.` or `(` are its name on the page.
        unit: of a number (`step`, `token`, ...).
        off: what `--without` gives: a value, BEFORE or REFUSE. An optional section always goes to None.
        needs: path (or path=value|value) without which the field means nothing and must keep its default;
            several, joined by ` and `, must all hold.
        idle: path (or path=value|value) with which the field has no effect, whatever its value.
        along: fields of the same section that belong to this one: --without sets them to their defaults too.
        shrink: the rule that a scale applies (scales.rules).
        exact: its value where system.precision is not `record`: AS_IS, PRECISION, PRODUCTS or a fixed value.
        least, above, below, most: bounds of a number, or of each number in a list. why: what explains `most`.
    """
    metadata = {"doc": doc, "unit": unit, "off": off, "needs": needs, "idle": idle, "along": along,
                "shrink": shrink, "exact": exact, "bounds": Bounds(least, above, below, most, why)}
    if dataclasses.is_dataclass(default) and isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def with_default(section: type, name: str, default: Any) -> Any:
    """The setting `name` of a section, declared with another default in a class derived from it."""
    f = next(f for f in dataclasses.fields(section) if f.name == name)
    return field(default=default, metadata=f.metadata)


# ----- values by path --------------------------------------------------------------------------------------

def walk(node: object, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(path, field, value) of every field, a section before its fields; a section that is off has none."""
    for f in fields_of(type(node)):
        path, value = prefix + f.name, getattr(node, f.name)
        yield path, f, value
        if fields_of(type(value)):
            yield from walk(value, path + ".")


@functools.cache
def fields_of(cls: type) -> tuple[dataclasses.Field, ...]:
    """Fields of a dataclass, none of another class; looked up once, because every check walks all of them."""
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def default_of(f: dataclasses.Field) -> Any:
    """Default value of a field."""
    return f.default if f.default is not dataclasses.MISSING else f.default_factory()


def lookup(s: object, path: str) -> Any:
    """Value at a dotted path; None if a feature above it is off."""
    node = s
    for name in path.split("."):
        if node is None:
            return None
        node = getattr(node, name)
    return node


def holds(s: object, needs: str) -> bool:
    """True if a condition holds: a path (its value is true), path=value or path=value|value.

    Of several, all joined by ` and ` must hold, or one of those joined by ` or `.
    """
    if " or " in needs:
        return any(holds(s, part) for part in needs.split(" or "))
    if " and " in needs:
        return all(holds(s, part) for part in needs.split(" and "))
    path, _, values = needs.partition("=")
    found = lookup(s, path)
    return str(found) in values.split("|") if values else bool(found)


def unmet_needs(s: object) -> list[tuple[str, str, Any]]:
    """(path, needs, default) of every field that is not at its default although what it needs is missing."""
    return [(path, f.metadata["needs"], default_of(f)) for path, f, value in walk(s)
            if f.metadata["needs"] and value != default_of(f) and not holds(s, f.metadata["needs"])]


def inert_settings(s: object) -> Iterator[tuple[str, str]]:
    """(path, path of what makes it inert) of the settings that the sections' methods `inert` name."""
    for _, _, node in walk(s):
        if hasattr(node, "inert"):
            yield from node.inert()


def order_faults(path: str, section: object, first: str, last: str) -> Iterator[str]:
    """A message if the field `first` of a section is beyond its field `last`, so that they span nothing."""
    begin, end = getattr(section, first), getattr(section, last)
    if begin > end:
        yield f"{path}.{first} = {begin} is beyond {path}.{last} = {end}: lower the first or raise the second"


def bound_faults(path: str, bounds: Bounds, value: object) -> Iterator[str]:
    """A message for each number of a field, alone or in lists, that is out of bounds."""
    def numbers(part):
        if isinstance(part, tuple):
            for one in part:
                yield from numbers(one)
        elif isinstance(part, (int, float)) and not isinstance(part, bool):
            yield part

    for number in numbers(value):
        if fault := bounds.fault(number):
            yield f"{path} = {number}: {'each ' if isinstance(value, tuple) else ''}{fault}"
