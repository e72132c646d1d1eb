"""`python -m records promote ATTEMPT`: make a record of an attempt whose claim is shown.

    python -m records promote my_idea  # -> records/short/034_my_idea, committed
    python -m records promote six_layers --lineage variants --accept-scale micro

The claim is verified again first. The folder moves to records/<lineage>/<id>_<name>: record.toml gets its id
and the line `attempt`, by which the claim, declared as attempts/NAME, stays its evidence. In a lineage only
what was shown against the head comes next; a claim on an older record becomes a branch, with --lineage
variants. A claim on a record that exists (submit --record) moves into that record's folder. One commit, of
these files alone; `records withdraw` undoes it.
"""

import argparse
import os
import re
from pathlib import Path

from common import files, untrusted
from common.errors import UserError
from evidence import attempts, manifest, verify
from settings import deltas
from settings.scales import SCALES

MARKS = re.compile(r'\A(?:(?:id|attempt) = .*\n)+')  # the lines that a promotion adds at the top


def arguments(p: argparse.ArgumentParser) -> None:
    """Options of `records promote`."""
    p.add_argument("attempt", help="NAME, or attempts/NAME")
    p.add_argument("--lineage", choices=deltas.LINEAGES, help="default: the parent's")
    p.add_argument("--accept-scale", choices=[x for x in SCALES if x != "full"], metavar="SCALE",
                   help="take a claim that was shown at this scale only: it says nothing about full scale")


def run(options: argparse.Namespace) -> None:
    """`records promote`: make a shown attempt the next record of its lineage and commit it."""
    folder = attempts.folder_of(options.attempt)
    text, toml = read(folder / "record.toml")
    attempts.require_git()
    results = shown(folder, options.accept_scale)
    target = place_of(folder, toml, options.lineage, results["record"])
    if not results["record"].startswith(deltas.ATTEMPT):
        moved, ref = onto_record(folder, target), results["record"]
    else:
        ref = f"{target.parent.name}/{int(target.name.partition('_')[0])}"
        moved = as_record(folder, target, text, ref)
    page(target)
    try:
        done = attempts.commit(
            [folder, target], f"{ref}: {toml['title']} (claim shown at scale {results['scale']})"
        )
    except UserError:
        undo(folder, target, moved, text)
        raise
    print(f"{ref}: {target}\ncommit {done[:12]}; `python -m records withdraw {ref}` undoes it while nothing "
          "is built on it")


def read(path: Path) -> tuple[str, dict]:
    """(text, table) of an attempt's record.toml."""
    return untrusted.toml_file(path)


def shown(folder: Path, accepted: str | None) -> dict:
    """Results of verifying the claim now; UserError unless it is shown, at a scale that counts."""
    if not (folder / manifest.NAME).exists():
        raise UserError(f"{folder} holds no claim: `records submit {folder.name}` declares and runs one")
    manifest.resume(folder).close()  # refuses while a run is under way
    results = verify.verify(folder)
    if results["verdict"] != "shown":
        why = (results["problems"] or results["reasons"])[0]
        raise UserError(f"{folder}: {results['verdict']} ({why}): only a claim that is shown becomes a "
                        "record; it stays an attempt")
    if results["claim"] not in ("ml", "systems"):
        raise UserError(f"{folder}: a comparison claims no record")
    if results.get("against"):
        names = ", ".join(x["attempt"] for x in results["against"])
        raise UserError(f"{folder}: shown as an increment on {names}: promote these first, then claim it "
                        "on them")
    if results["scale"] not in ("full", accepted):
        raise UserError(
            f"{folder}: shown at scale {results['scale']} only, a small image of the record that says "
            "nothing about full scale: claim it at --scale full, or insist with --accept-scale "
            f"{results['scale']}"
        )
    return results


def place_of(folder: Path, toml: dict, lineage: str | None, ref: str) -> Path:
    """Where the record goes; UserError if it cannot come next there. ref: what the manifest claims."""
    if not ref.startswith(deltas.ATTEMPT):  # submit --record: a claim on a record that exists
        claimed = deltas.find_record(ref)
        if (claimed.folder / manifest.NAME).exists():
            raise UserError(
                f"{claimed.ref} has a claim already ({claimed.folder}): this one stays in {folder}"
            )
        return claimed.folder
    parent = deltas.find_record(toml["parent"])
    lineage = lineage or parent.ref.partition("/")[0]
    head = deltas.find_record(f"{lineage}/head")
    if lineage != "variants" and head.ref != parent.ref:
        raise UserError(
            f"{folder.name} is built on {parent.ref}, and {lineage} has come to {head.ref}: claim it against "
            "that one, or keep it as a branch with --lineage variants"
        )
    members = [
        r.ref.partition("/")[2] for r in deltas.load_records().values() if r.ref.startswith(lineage + "/")
    ]
    number = max((int(m.group()) for x in members if (m := re.match(r"\d+", x))), default=0) + 1
    return deltas.RECORDS / lineage / f"{number:03d}_{folder.name}"


def as_record(folder: Path, target: Path, text: str, ref: str) -> list:
    """Move the attempt's folder to that of a new record. The file is whole before and after each step."""
    files.write(
        folder / "record.toml",
        f'id = "{ref.partition("/")[2]}"\nattempt = "{folder.name}"\n' + MARKS.sub("", text),
    )
    move(folder, target)
    deltas.load_records.cache_clear()
    deltas.find_record(ref)
    return []


def onto_record(folder: Path, target: Path) -> list[str]:
    """Move the claim's files into the folder of the record that it claims. Returns their names; the manifest
    comes last."""
    names = sorted(
        (p.name for p in files.listed(folder) if p.name != "record.toml"), key=lambda n: n == manifest.NAME
    )
    taken = [n for n in names if (target / n).exists()]
    if taken:
        raise UserError(f"{target / taken[0]} is there already: move it away first")
    for name in names:
        move(folder / name, target / name)
    (folder / "record.toml").unlink()
    folder.rmdir()
    return names


def move(source: Path, target: Path) -> None:
    """Rename a folder, which keeps it whole. UserError if the file system refuses."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)
    except OSError as error:
        raise UserError(f"cannot move {source} to {target}: {error.strerror}") from None


def page(folder: Path) -> None:
    """Results and page anew: they name the folder."""
    verify.store(folder, verify.verify(folder, page=False), page=True)


def undo(folder: Path, target: Path, moved: list[str], text: str) -> None:
    """Everything back where it was, after git refused the commit."""
    if moved:
        folder.mkdir(parents=True)
        for name in moved:
            move(target / name, folder / name)
    else:
        move(target, folder)
    files.write(folder / "record.toml", text)
    deltas.load_records.cache_clear()
    page(folder)
