"""Which tests guard a setting: what `--feature PATH` of ./test.sh and pytest selects, read from the tests
themselves.

    @pytest.mark.feature("model.attn.gate")  the test guards these settings
    @pytest.mark.feature(path="feature")     each case guards the setting that its parameter `feature` names
    @pytest.mark.feature(record="ref")       each case guards the features that its record switches on or off
"""

import functools
import re
from pathlib import Path

from common.errors import UserError
from settings import deltas, schema
from settings.declare import lookup

TESTS = Path(__file__).parent
MARK = re.compile(r"\bmark\.feature\(([^()]*)\)")
NAME = re.compile(r'(?<!=)"([\w.]+)"')


@functools.lru_cache
def texts() -> dict[str, str]:
    """Source of each test file that has a mark, by file name."""
    sources = {file.name: file.read_text(encoding="utf-8") for file in TESTS.glob("test_*.py")}
    return {name: text for name, text in sources.items() if MARK.search(text)}


@functools.lru_cache
def marked() -> frozenset[str]:
    """Every setting that a mark names in words."""
    return frozenset(
        path for text in texts().values() for mark in MARK.findall(text) for path in NAME.findall(mark)
    )


def guards(path: str, wanted: str) -> bool:
    """Whether a law on `path` is one on `wanted`: the same setting, or one inside that section."""
    return path == wanted or path.startswith(wanted + ".")


def guarded(path: str) -> str:
    """The setting whose tests `--feature path` runs: path itself, or the nearest section above it that has a
    mark.

    Raises UserError for an unknown path (with near misses) and for one that no test names.
    """
    schema.find_field(path)
    if any(guards(name, path) for name in marked()):
        return path
    for above in schema.prefixes(path)[::-1]:
        if above in marked():
            return above
    raise UserError(f"--feature {path}: no test is marked with it; marked are {', '.join(sorted(marked()))}")


def may_guard(file: str, wanted: str) -> bool:
    """Whether a test file can hold a law on this setting, by its text: so that the other files are not
    imported."""
    text = texts().get(file, "")
    names_it = any(guards(path, wanted) for mark in MARK.findall(text) for path in NAME.findall(mark))
    return names_it or bool(re.search(r"\bmark\.feature\([^()]*(path|record)=", text))


def case_guards(marks: list, parameters: dict, wanted: str) -> bool:
    """Whether one case of a test guards a setting.

    A mark in words on a setting guards the section around it too; a parameter guards its own setting alone,
    so that a section with many settings does not run a training for each.

    marks: its `feature` marks, anything with `args` and `kwargs`. parameters: values of its parameters by
    name.
    """
    named = [path for mark in marks for path in mark.args]
    if any(guards(path, wanted) for path in named):
        return True
    for mark in marks:
        if "path" in mark.kwargs and parameters[mark.kwargs["path"]] == wanted:
            return True
        if "record" in mark.kwargs and wanted in switched(record_of(parameters[mark.kwargs["record"]])):
            return True
    return False


def record_of(parameter: object) -> str:
    """Reference of the record that a parameter names: `short/21r`, `21r` or 21."""
    name = str(parameter)
    return name if "/" in name else f"short/{name}"


@functools.lru_cache
def switched(ref: str) -> tuple[str, ...]:
    """Features that a record switches on or off: what --without would bring back."""
    record = deltas.load_records()[ref]
    before = deltas.load_records()[record.parent].settings if record.parent else deltas.standing([])
    return tuple(f.path for f in schema.fields().values()
                 if f.is_feature and is_on(record.settings, f.path) != is_on(before, f.path))


def is_on(s: object, path: str) -> bool:
    """Whether a feature is there; one inside a section that is off is not."""
    for above in schema.prefixes(path):
        if lookup(s, above) is None:
            return False
    return lookup(s, path) not in (None, False)
