"""Settings that this checkout has no words for: a record with new vocabulary is resolved by the code that
brought it, in a sandbox, never in the judge's process.

`projected` keeps what this checkout knows, on which the judge's own laws go on. `ask` runs the settings code
of an arm's commit (or of the claim's sources, where this repository lacks the commit) behind the walls of
common/sandbox.py and returns what it says as data. What new words mean stays unknown, and is said so.
"""

import dataclasses
import functools
import io
import json
import re
import sys
import tarfile
import tempfile
import typing
from collections.abc import Callable
from pathlib import Path

from common import files, sandbox, untrusted
from common.errors import UserError
from common.printable import printable
from evidence import arms
from settings import Settings, deltas, renames, schema

# sections on which the judge's own laws rest: how tokens, steps and validations are counted
COUNTED = ("schedule", "data", "validation")
SECONDS, MEMORY_MIB = 60.0, 1024
FILE = re.compile(r"^# ----- ((?:[a-z0-9_]+/)?[a-z0-9_]+\.py)$", re.M)
CHANGE = re.compile(r"(--(?:revert|with|without|set)) ([^\s\x00-\x1f\x7f-][^\x00-\x1f\x7f]*)")
ANSWER = ("record", "title", "preset", "scale", "changes", "report", "settings", "ml_hash", "system_hash",
          "registers")


# ----- what is known here -----------------------------------------------------------------------------------

def projected(values: dict) -> tuple[Settings, list[str]]:
    """(settings as far as this checkout has words for them, paths of the rest) of nested dicts from a log.

    A value that a known field cannot have here counts as unknown as well. Raises UserError where something
    of COUNTED is unknown: then no law could be held against the log.
    """
    s, paths = read_settings(files.json_text(values, sort_keys=True))
    return s, list(paths)


@functools.lru_cache(maxsize=64)
def read_settings(text: str) -> tuple[Settings, tuple[str, ...]]:
    """`projected` of JSON, kept because all runs of an arm log the same settings."""
    paths: list[str] = []
    s = schema.from_plain(known(renames.present_settings(json.loads(text)), Settings, "", paths))
    for path, value in schema.flat(s).items():
        field = schema.find_field(path)
        if value is None and not field.optional:
            raise UserError(f"{path} is missing")
        try:
            value is None or schema.typed(field, value, "logged")
        except UserError:
            if path.startswith(COUNTED):
                raise
            paths.append(path)
            s = schema.replaced(s, path, field.default)
    counted = [path for path in paths if path.startswith(COUNTED)]
    if counted:
        raise UserError(f"{', '.join(counted)[:200]}: unknown here, and steps and tokens are counted by it")
    return s, tuple(sorted(paths))


def known(values: object, cls: type, prefix: str, paths: list[str]) -> dict:
    """The values of known fields; paths of the others are added to `paths`."""
    if not isinstance(values, dict):
        raise UserError(f"{prefix or 'settings'} is not a table")
    hints, out = schema.hints_of(cls), {}
    for name, value in values.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        if name not in hints:
            paths.append(printable(path)[:100])
            continue
        hint = hints[name]
        if type(None) in typing.get_args(hint):
            hint = schema.without_none(hint)
        inside = dataclasses.is_dataclass(hint) and value is not None
        out[name] = known(value, hint, path, paths) if inside else value
    return out


# ----- what the code of the claim says ----------------------------------------------------------------------

def has_walls() -> bool:
    """Whether this machine can keep the code of others from the network and from writing."""
    held = sandbox.probe()
    return bool(held.get("network") and held.get("writes"))


def ask(place: Path, argv: list[str]) -> dict:
    """What the settings code in `place`, a private folder, makes of a trainer's arguments: a table of ANSWER.

    Raises UserError for a refusal of that code, for one that does not answer, and where this machine has no
    sandbox.
    """
    if not has_walls():
        raise UserError(f"{sandbox.walls()}: code of others is not run here; verify with a checkout of the "
                        "code that wrote the claim")
    code = "import sys\nsys.path.insert(0, '.')\n" + arms.PROBE
    done = sandbox.run([sys.executable, "-I", "-B", "-c", code, *argv], cwd=place, seconds=SECONDS,
                       memory_mib=MEMORY_MIB, env={"SPEEDRUN_CACHE": "/tmp"})
    said = printable((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])[:300]
    if done.returncode:
        said = "it took too much memory" if done.out_of_memory else said.removeprefix("error: ")
        raise UserError(f"its own code cannot resolve it ({'it took too long' if done.timed_out else said})")
    answer = untrusted.json_value(done.stdout, "the answer of its own code")
    untrusted.closed(answer, ANSWER, "the answer of its own code")
    if not isinstance(answer.get("settings"), dict):
        raise UserError("its own code gives no settings")
    return answer


def record_name(name: str) -> str:
    """A record's or preset's name as a command line takes it."""
    if not isinstance(name, str) or not re.fullmatch(r"(?:[a-z0-9_]+/)?[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UserError(f"{printable(str(name))[:60]!r} is no record")
    return name


def option(change: str) -> str:
    """One word of a command line for a change as logs have it, like `--set a=1`; no other option passes."""
    found = CHANGE.fullmatch(change) if isinstance(change, str) else None
    if not found:
        raise UserError(f"unknown change {printable(str(change))[:60]!r}: changes are --set, --with, "
                        "--without and --revert")
    return f"{found[1]}={found[2]}"


def answer_of(folder: Path, arm: dict, read_sources: Callable[[], str]) -> tuple[dict, str]:
    """(what the code of an arm resolves it to, where that code comes from).

    folder: the claim's. read_sources: () -> text of the claim's archive of sources, for an arm whose commit
    is not in this repository.
    """
    argv = [record_name(arm["record"])]
    for change in arm["changes"]:
        argv.append(option(change))
    with tempfile.TemporaryDirectory(prefix="foreign-") as place:
        tree = Path(place, "code")
        tree.mkdir()
        where = write_commit(arm["commit"], tree) or write_sources(read_sources(), tree)
        add_record(folder, arm["record"], tree)
        return ask(tree, [*argv, "--scale", arm["scale"]]), where


def write_commit(commit: str | None, tree: Path) -> str:
    """Write code and records of a commit, plain files only; "" where this repository lacks it."""
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", str(commit)):
        return ""
    try:
        packed = arms.git("archive", "--format=tar", commit)
    except UserError:
        return ""
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive:
            name = member.name
            wanted = name.endswith(".py") or re.fullmatch(r"(records|attempts)/.*\.toml", name)
            if member.isreg() and wanted and ".." not in name.split("/") and not name.startswith("/"):
                files.write(tree / name, archive.extractfile(member).read(), parents=True)
    return f"commit {commit[:12]}"


def write_sources(text: str, tree: Path) -> str:
    """Write the files of an archive of sources, and the records of this checkout."""
    starts = list(FILE.finditer(text))
    for found, after in zip(starts, [*starts[1:], None]):
        end = after.start() if after else len(text)
        files.write(tree / found[1], text[found.end() + 1:end], parents=True)
    for pattern in ("*/*/record.toml", "presets/*.toml"):
        for path in files.listed(deltas.RECORDS, pattern):
            target = tree / "records" / path.relative_to(deltas.RECORDS)
            files.write(target, untrusted.bytes_of(path), parents=True)
    return "the claim's own sources"


def add_record(folder: Path, ref: str, tree: Path) -> None:
    """Put the claim's record.toml where its code looks for that record, unless it is there."""
    path = folder / "record.toml"
    lineage, _, name = ref.partition("/")
    if not path.exists():
        return
    attempt = lineage + "/" == deltas.ATTEMPT
    padded = name.zfill(3)
    if attempt:
        target = tree / "attempts" / name
    elif files.listed(tree, f"records/{lineage}/{padded}_*"):
        return
    else:
        target = tree / "records" / lineage / f"{padded}_claimed"
    files.write(target / "record.toml", untrusted.bytes_of(path, untrusted.MIB), parents=True)
