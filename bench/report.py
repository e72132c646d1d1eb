"""The results of a bench as JSON and Markdown, and how a bench goes on after a failure.

A bench is groups of cases, each of which gives a row. One that raises is a row with `failed`, and the others
run; one that takes the process with it (an illegal memory access leaves a CUDA context in which nothing runs
any more) costs its own row, and a new process goes on behind it. JSON, and the same as a Markdown table
next to it, are whole after every row.
"""

import json
import signal
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import measure  # first: it finds the repository
import torch

from common import files
from common.errors import UserError
from common.null_device import computes

DEAD = 70  # exit code of a process that cannot use its GPU any more
PROCESSES = 8  # after so many deaths the rest is given up


class Report:
    """Rows of one bench. path: of the JSON, or None: nothing is written; an older file is removed, unless its
    rows are continued (`resume`; `checked`: only if the same code on the same device made them). brief: what
    of the rows the Markdown shows. tables: what else the JSON says."""

    def __init__(
        self, path: str | Path | None, title: str, *, resume: bool = False, checked: bool = False,
        brief: Callable[[list[dict]], list[dict]] | None = None, **tables
    ) -> None:
        self.path, self.title, self.brief = path and Path(path), title, brief or (lambda rows: rows)
        self.rows, self.failed, self.tables, self.about = [], [], tables, None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume and (not checked or self.continues()):
                self.read()
            else:
                for old in (self.path, self.markdown_path()):
                    old.unlink(missing_ok=True)

    def continues(self) -> bool:
        """Are the rows of the file of this code, device, torch and arguments? Others are made anew."""
        if not self.path.exists():
            return False
        found, here = json.loads(self.path.read_text(encoding="utf-8")), measure.about()
        return all(found["about"].get(name) == here[name] for name in ("device", "torch", "code")) and all(
            found.get(name) == value for name, value in self.tables.items() if name != "done")

    def read(self) -> None:
        """The rows that are in the file."""
        if self.path.exists():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            self.rows, self.failed, self.about = found["rows"], found["failed"], found["about"]
            self.tables |= {
                k: v for k, v in found.items() if k not in ("about", "complete", "rows", "failed")
            }

    def markdown_path(self) -> Path:
        return self.path.with_suffix(".md")

    def add(self, row: dict) -> None:
        """A row, to be told from others by its fields; with `failed`, why it has no result or a wrong one."""
        (self.failed if "failed" in row else self.rows).append(row)
        if "failed" in row:
            print(f"FAILED {label(row)}: {row['failed']}", flush=True)
        self.write()

    def attempt(self, fields: dict, case: Callable[[], dict]) -> dict:
        """Add {**fields, **case()}, or what it raised; returns the row."""
        try:
            row = {**fields, **case()}
        except Exception as error:  # whatever it is: the other cases are worth running
            row = {**fields, "failed": first_line(error)}
        except SystemExit as stop:  # stop_in_order
            self.add({**fields, "failed": f"stopped: no time is left{getattr(stop, 'said', '')}"})
            raise
        self.add(row)
        return row

    def write(self, complete: bool = False) -> None:
        if not self.path:
            return
        self.about = self.about or measure.about()
        table = {
            "about": self.about, "complete": complete, **self.tables, "rows": self.rows, "failed": self.failed
        }
        files.write(self.path, files.json_text(table, indent=1) + "\n")
        files.write(self.markdown_path(),
                    markdown(self.title, self.about, self.brief(self.rows), self.failed, complete))

    def finish(self) -> int:
        """Write that nothing is missing, say how much failed; returns the exit code."""
        self.write(complete=True)
        print(f"{len(self.rows) + len(self.failed)} rows, {len(self.failed)} failed", flush=True)
        return int(bool(self.failed))


def stop_in_order() -> None:
    """Make SIGTERM end the bench with a row for the running case, and without temporary files.

    bench/gpu.sh sends it to a part whose time is over.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def first_line(error: Exception) -> str:
    """One line: what it is and the first one that it says, with the next where that only
    announces one (the compiler)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:1 + (bool(lines) and lines[0].endswith(":"))])[:300]
    return said if isinstance(
        error, UserError) else f"{type(error).__name__}: {said}" if said else type(error).__name__


def label(row: dict) -> str:
    """What a row is about: its texts."""
    return ", ".join(v for k, v in row.items() if isinstance(v, str) and k not in ("failed", "group"))


# ----- Markdown ---------------------------------------------------------------------------------------------

def markdown(title: str, about: dict, rows: list[dict], failed: list[dict], complete: bool) -> str:
    """A page: what was measured on what, the rows, what failed."""
    lines = [
        f"# {title}",
        "",
        f"{about['device']}, torch {about['torch']}, commit {about['code'][:12]}"
        + ("" if complete else "; **not complete: the bench was stopped or is running**"),
        "",
        *table(rows),
    ]
    if failed:
        lines += ["", "Failed:", "", *table(failed)]
    return "\n".join(lines) + "\n"


def table(rows: list[dict]) -> list[str]:
    """Lines of a Markdown table; dicts inside a row become columns of their own."""
    rows = [flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(name)) for name in columns] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines] if rows else ["nothing"]


def flat(row: dict, before: str = "") -> dict:
    """The row with nested dicts merged into it; their keys get the outer name in front."""
    out = {}
    for name, value in row.items():
        out |= flat(value, f"{before}{name} ") if isinstance(value, dict) else {before + name: value}
    return out


def cell(value: Any) -> str:
    """A value as the text of a Markdown table's cell."""
    if value is None:
        return ""
    text = str(value)
    if isinstance(value, float):
        text = f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("|", "\\|").replace("\n", " ")


# ----- groups of cases in processes of their own ------------------------------------------------------------

def add_resume(p: ArgumentParser) -> None:
    """The option of the benches that can be stopped and go on."""
    p.add_argument("--resume", action="store_true",
                   help="keep the rows of a bench that was stopped, if the same code on the same device made "
                   "them")


def add_arguments(p: ArgumentParser, groups: Collection[str]) -> None:
    """The options of a bench whose groups run in processes of their own (`run`)."""
    p.add_argument("--only", nargs="+", choices=groups, metavar="GROUP", help=f"of {', '.join(groups)}")
    p.add_argument("--out", metavar="JSON", help="also write the figures here, and as Markdown next to it")
    add_resume(p)
    p.add_argument("--child", nargs="+", choices=groups,
                   help="used by the bench itself: run these groups in this process")


def run(
    o: Namespace, groups: Mapping[str, Callable], title: str, *, show: Callable[[dict], str],
    brief: Callable[[list[dict]], list[dict]] | None = None, **tables
) -> int:
    """Run the groups of a bench, in processes of their own, and return the exit code.

    o: the options, those of add_arguments among them.
    groups: {name: function that yields (fields, case)}. A case returns a dict and runs before the next one
        is made.
    show: function (row) -> line to print.
    """
    stop_in_order()
    if o.child:
        return child(Report(o.out, title, resume=True, brief=brief), groups, o.child, show)
    with tempfile.TemporaryDirectory() as scratch:
        path = o.out or str(Path(scratch) / "rows.json")
        report = Report(path, title, resume=o.resume, checked=True, brief=brief, done=[], **tables)
        whole = report.tables["done"]  # a group that was cut begins again: its cases are told by their number
        report.rows = [row for row in report.rows if row["group"] in whole]
        report.failed = [row for row in report.failed if row["group"] in whole]
        report.write()
        supervise(report, [name for name in o.only or groups if name not in whole])
        return report.finish()


def supervise(report: Report, left: list[str]) -> None:
    """Start processes until every group was run to its end, or enough of them died."""
    stuck = None
    for _ in range(PROCESSES if left else 0):
        before = counts(report)
        code = call([sys.executable, *sys.argv, "--out", str(report.path), "--child", *left])
        report.read()
        left = [name for name in left if name not in report.tables["done"]]
        if not left:
            return
        moved = counts(report).get(left[0], 0) > before.get(left[0], 0)
        if code != DEAD:  # it told nothing of its end
            report.add({"group": left[0], "case": f"number {counts(report).get(left[0], 0) + 1} of {left[0]}",
                        "failed": f"the process ended with {code}"})
        # twice: it is not a case that kills it, but what comes before all of them
        if not moved and stuck == left[0]:
            left = left[1:]
        stuck = left[0] if left and not moved else None
        if not left:
            return
    if not left:  # all of them were there already
        return
    report.add({"group": left[0], "case": f"the rest of {', '.join(left)}",
                "failed": f"not run: {PROCESSES} processes died"})


def call(command: list[str]) -> int:
    """Exit code of a program, which is given time to write its last row when this one is
    stopped (`timeout` signals both)."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except BaseException:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def counts(report: Report) -> dict[str, int]:
    """How many cases of each group have a row."""
    found = {}
    for row in report.rows + report.failed:
        found[row["group"]] = found.get(row["group"], 0) + 1
    return found


def child(
    report: Report, groups: Mapping[str, Callable], names: list[str], show: Callable[[dict], str]
) -> int:
    """Run these groups, without the cases that have a row already. Returns the exit code."""
    had = counts(report)
    for name in names:
        try:
            for i, (fields, case) in enumerate(groups[name]()):
                if i < had.get(name, 0):
                    continue
                row = report.attempt({"group": name, **fields}, case)
                if "failed" not in row:
                    print(show(row), flush=True)
                elif not alive():
                    print("the GPU's context is dead: going on in a new process", flush=True)
                    return DEAD
        except Exception as error:  # what comes before the cases
            report.add({"group": name, "case": "preparing the next case", "failed": first_line(error)})
            if not alive():
                report.tables["done"].append(name)
                report.write()
                return DEAD
        report.tables["done"].append(name)
        report.write()
    return 0


def alive() -> bool:
    """Can this process still use its GPU? After an illegal access every call raises, and after a failed
    capture of a CUDA graph every draw of a random number."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return 0.0 <= torch.rand(1, device="cuda").item() < 1.0 or not computes()
    except Exception:
        return False
