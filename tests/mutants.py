"""Mutants: each changes one formula or constant of the program, and the test named with it must fail.

    python tests/mutants.py [NAME ...] [--range RANGE] [--again]

tests/mutants.toml lists them. They are made in a copy of the files in git. First each named test must pass on
the unchanged copy; then each mutant is applied alone, and its test must fail inside a test: with an error
while files are imported or collected the mutant has not run, which is no kill. Goes on where it stopped (the
results lie in data/cache/mutants, by the digest of the sources and tests); --again begins anew. Writes the
rows of what was run into tests/mutants.md. Exit code 1 if a mutant survives or does not run.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest

from common import files

LIST, TABLE = ROOT / "tests/mutants.toml", ROOT / "tests/mutants.md"
RANGES = ("34-57", "58-92", "tracks")  # of the short track; the optimizer and the medium track
LIMIT_S = 300  # of one test; a mutant that takes longer has not run
# No other plugin is needed, and one thread is enough.
ENVIRONMENT = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
# What a mutant that cannot even be imported raises, also where a test imports it late.
NO_CODE = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError")
WIDTH = 44  # characters of a text in the table


class Mutant(NamedTuple):
    """One change of a program that must fail a test. file: relative to the checkout."""
    name: str
    range: str
    file: str
    text: str  # occurs once in the file
    change: str  # what stands there in the mutant
    breaks: str
    test: str  # node id, or a file with further arguments of pytest (-k)


class Outcome(NamedTuple):
    """How a test ended. kind: passed, failed, or never ran. how: the first line of the reason."""
    kind: str
    how: str


# ----- the list ---------------------------------------------------------------------------------------------

def mutants() -> list[Mutant]:
    """The mutants of tests/mutants.toml, in the order of the ranges."""
    listed = tomllib.loads(LIST.read_text(encoding="utf-8"))
    found = [Mutant(name, **fields) for name, fields in listed.items()]
    return sorted(found, key=lambda mutant: RANGES.index(mutant.range))


@functools.lru_cache
def source(path: Path) -> str:
    """The text of a file; empty if there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def faults(mutant: Mutant) -> Iterator[str]:
    """Why a mutant cannot be made of this checkout: its text or its test is not there."""
    count = source(ROOT / mutant.file).count(mutant.text)
    if count != 1:
        yield f"{mutant.name}: its text occurs {count} times in {mutant.file}, and must occur once"
    if mutant.text == mutant.change:
        yield f"{mutant.name}: it changes nothing"
    file, _, function = shlex.split(mutant.test)[0].partition("::")
    function = function.partition("[")[0]
    if not re.search(rf"^def {function}\b", source(ROOT / file), re.MULTILINE):
        yield f"{mutant.name}: there is no test {mutant.test}"


# ----- one run ----------------------------------------------------------------------------------------------

def git(*arguments: str) -> str:
    """What git says in this checkout."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def copy(folder: Path) -> None:
    """Copy what git has or does not ignore into a folder."""
    listed = git("ls-files", "-coz", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


@contextlib.contextmanager
def applied(mutant: Mutant, folder: Path, number: int) -> Iterator[None]:
    """A context in which the copy is the mutant. number: of the mutant, from 1.

    Python compares only the time of a source, in seconds, and its size with those of the compiled file: each
    mutant has a time of its own.
    """
    path = folder / mutant.file
    whole, at = path.read_text(encoding="utf-8"), int(path.stat().st_mtime)
    path.write_text(whole.replace(mutant.text, mutant.change), encoding="utf-8")
    os.utime(path, (at + number, at + number))
    try:
        yield
    finally:
        path.write_text(whole, encoding="utf-8")
        os.utime(path, (at, at))


def run(test: str, folder: Path) -> Outcome:
    """Run a test in the copy, in a fork of this process, which has torch already."""
    report, said = folder / "mutants.xml", folder / "mutants.txt"
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        begin(test, folder, report, said)
    until = time.monotonic() + LIMIT_S
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome("never ran", f"no end in {LIMIT_S} s")
        time.sleep(0.02)
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    return outcome(os.waitstatus_to_exitcode(ended[1]), cases, said.read_text(errors="replace"))


def begin(test: str, folder: Path, report: Path, said: Path) -> None:
    """Run a test in this process, a fork that knows the copy alone. Does not return."""
    code = 99
    try:
        os.setpgid(0, 0)  # so that it can be ended with the programs that it starts
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        sys.path[:] = [path for path in sys.path if Path(path) not in (ROOT, ROOT / "tests")]
        for name in [name for name in sys.modules if name.partition(".")[0] == "common"]:
            del sys.modules[name]
        sys.modules["__main__"] = types.ModuleType("__main__")  # processes of the test would import this file
        options = ["-q", "-x", "-p", "no:cacheprovider", f"--rootdir={folder}", f"--junitxml={report}"]
        code = pytest.main([*options, *shlex.split(test)])
    finally:
        sys.stdout.flush()
        os._exit(code)


def outcome(code: int, cases: list[ElementTree.Element], said: str) -> Outcome:
    """The outcome of a run of pytest. code: its exit code. cases: of its report. said: what it printed."""
    failures = [case.find("failure") for case in cases if case.find("failure") is not None]
    if code == 1 and failures:
        message = failures[0].get("message", "").strip().partition("\n")[0]
        kind = "never ran" if message.partition(":")[0] in NO_CODE else "failed"
        return Outcome(kind, message)
    if code == 0 and any(not len(case) for case in cases):  # a case without a child passed
        return Outcome("passed", "")
    lines = [line for line in said.splitlines() if line.strip()]
    return Outcome("never ran", lines[-1] if lines else f"exit code {code}")


# ----- results ----------------------------------------------------------------------------------------------

def digest() -> str:
    """16 hex digits over what a result depends on: all Python files and records."""
    found = hashlib.sha256()
    listed = git("ls-files", "-co", "--exclude-standard", "*.py", "records", "tests/golden")
    for name in sorted(set(listed.split("\n"))):
        path = ROOT / name
        if path.is_file() and path != Path(__file__):
            found.update(name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def commit() -> str:
    """The commit of this checkout; with a + if other files than those of the mutants have been changed."""
    changed = [line for line in git("status", "--porcelain").splitlines() if "tests/mutants." not in line]
    return git("rev-parse", "--short=10", "HEAD").strip() + "+" * bool(changed)


class Results:
    """Results that outlive an interrupt. again: forget those that are there."""

    def __init__(self, again: bool) -> None:
        self.path = files.default_cache() / "mutants" / f"{digest()}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if again:
            self.path.unlink(missing_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.kept = {tuple(key): Outcome(*value) for key, value in map(json.loads, lines)}

    def of(self, key: tuple, make) -> Outcome:
        """The result of this key, from the last time or from make()."""
        if key not in self.kept:
            self.kept[key] = make()
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps([key, self.kept[key]]) + "\n")
        return self.kept[key]


def judged(mutant: Mutant, number: int, folder: Path, results: Results) -> Outcome:
    """The outcome of the mutant's test on the mutant, once the test has passed on the unchanged copy."""
    before = results.of((mutant.test,), lambda: run(mutant.test, folder))
    if before.kind != "passed":
        return Outcome("never ran", f"the test fails on the unchanged tree: {before.how}")

    def changed():
        with applied(mutant, folder, number):
            return run(mutant.test, folder)

    return results.of(tuple(mutant), changed)


# ----- the table --------------------------------------------------------------------------------------------

HEAD = ["| mutant | range | file | change | breaks | killed by | commit |", "|---|---|---|---|---|---|---|"]


def difference(text: str, change: str) -> tuple[str, str]:
    """The parts in which two texts differ, extended to whole words."""
    start = len(os.path.commonprefix([text, change]))
    end = len(os.path.commonprefix([text[start:][::-1], change[start:][::-1]]))
    while start and re.match(r"[\w.]", text[start - 1]):
        start -= 1
    while end and re.match(r"[\w.]", text[len(text) - end]):
        end -= 1
    return text[start:len(text) - end], change[start:len(change) - end]


def cell(text: str) -> str:
    """A text as code in a cell of a Markdown table, on one line and not too long."""
    text = " ".join(text.split())
    text = text if len(text) <= WIDTH else text[:WIDTH - 3] + "..."
    return "`" + text.replace("|", "\\|") + "`" if text else "nothing"


def row(mutant: Mutant) -> str:
    """The row of a mutant up to the commit."""
    before, after = map(cell, difference(mutant.text, mutant.change))
    test = mutant.test.removeprefix("tests/").replace("|", "\\|")
    cells = [mutant.name, mutant.range, mutant.file, f"{before} becomes {after}", mutant.breaks, test]
    return "| " + " | ".join(cells) + " | "


def known_rows() -> dict[str, str]:
    """{row of a mutant up to the commit: its commit} of tests/mutants.md."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else []
    found = (line.rpartition(" | ") for line in lines if line.startswith("| "))
    return {start + " | ": end.removesuffix(" |") for start, _, end in found}


def write_table(killed: dict[Mutant, str]) -> None:
    """Write tests/mutants.md. killed: {mutant: commit} of this run; the others keep their rows."""
    known = known_rows() | {row(mutant): at for mutant, at in killed.items()}
    rows = [f"{row(mutant)}{known[row(mutant)]} |" for mutant in mutants() if row(mutant) in known]
    text = (f"{len(rows)} changes of formulas and constants, each of which fails the test named with it "
            "(`python tests/mutants.py`; the whole texts are in mutants.toml).\n\n")
    TABLE.write_text(text + "\n".join(HEAD + rows) + "\n", encoding="utf-8")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("names", nargs="*", metavar="NAME", help="of mutants; without any, all")
    p.add_argument("--range", choices=RANGES, help="only the mutants of this range")
    p.add_argument("--again", action="store_true", help="begin anew")
    options = p.parse_args()
    listed = mutants()
    if unknown := set(options.names) - {mutant.name for mutant in listed}:
        sys.exit(f"no mutant {', '.join(sorted(unknown))} in {LIST}")
    chosen = [mutant for mutant in listed if options.range in (None, mutant.range)
              and (not options.names or mutant.name in options.names)]
    if found := [fault for mutant in chosen for fault in faults(mutant)]:
        sys.exit("\n".join(found))
    os.environ.update(ENVIRONMENT)
    import torch  # noqa: F401  once: the tests are forked from this process

    results, at, killed = Results(options.again), commit(), {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as home:
        copy(Path(home))
        for number, mutant in enumerate(chosen, 1):
            result = judged(mutant, number, Path(home), results)
            verdict = {"failed": "killed", "passed": "SURVIVED"}.get(result.kind, "NEVER RAN")
            print(f"{number}/{len(chosen)} {mutant.name}: {verdict} {result.how[:160]}", flush=True)
            if result.kind == "failed":
                killed[mutant] = at
    write_table(killed)
    sys.exit(len(killed) < len(chosen))


if __name__ == "__main__":
    main()
