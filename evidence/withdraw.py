"""`python -m records withdraw WHAT --why TEXT`: give a claim up.

    python -m records withdraw my_idea --why "the gain came from a longer warm-up"
    python -m records withdraw short/34 --why "not reproduced on a second machine"

Of an attempt the last line of its manifest says so; its folder, with every run, stays. One that was never run
is removed. A record that was promoted and that nothing is built on goes back to attempts/NAME, withdrawn, in
one commit.
"""

import argparse
from pathlib import Path

from common import files, untrusted
from common.errors import UserError
from evidence import arms, attempts, ledger, manifest, promote, verify
from settings import deltas


def arguments(p: argparse.ArgumentParser) -> None:
    """Options of `records withdraw`."""
    p.add_argument("what", help="NAME or attempts/NAME of an attempt, or a promoted record like short/34")
    p.add_argument("--why", required=True, metavar="TEXT", help="the reason, which is kept with the claim")


def run(options: argparse.Namespace) -> None:
    """`records withdraw`: take back an attempt or a promoted record, with its reason."""
    why = " ".join(options.why.split())
    if not why:
        raise UserError("--why says nothing: give the reason in a few words")
    lineage = options.what.partition("/")[0]
    if "/" in options.what and lineage in deltas.LINEAGES:
        return withdraw_record(deltas.find_record(options.what), why)
    return withdraw_attempt(options.what, why)


def withdraw_attempt(name: str, why: str) -> None:
    """Mark an attempt; remove one of which no run was declared."""
    folder = attempts.folder_of(name)
    if not (folder / manifest.NAME).exists():
        return remove(folder, why)
    claim = attempts.withdraw(folder, why)
    renew(folder)
    print(f"withdrawn after {len(claim.runs)} runs: {why}\nits evidence stays in {folder}")


def renew(folder: Path) -> None:
    """results.json, and the page where all runs were made, say that the claim was withdrawn."""
    results = verify.verify(folder, page=False)
    ledger.settle(folder, manifest.read(folder), results)
    verify.store(folder, verify.verify(folder, page=False), page=True)


def remove(folder: Path, why: str) -> None:
    """An attempt without a plan: nothing was run, so only its record.toml goes."""
    path = folder / "record.toml"
    tracked = bool(arms.is_checkout() and arms.line("ls-files", "--", str(path)))
    if tracked:
        attempts.require_git()
    text = untrusted.text_of(path) if path.exists() else None
    attempts.unmake(path)
    if tracked:
        try:
            done = attempts.commit([path], f"Withdraw {deltas.ATTEMPT}{folder.name}: {why}")
        except UserError:
            attempts.make(path, text)
            raise
    print(f"removed {path}: nothing of it was run" + (f"; commit {done[:12]}" if tracked else ""))


def withdraw_record(record: deltas.Record, why: str) -> None:
    """Move a promoted record back to its attempt and mark it, in one commit."""
    if not record.attempt:
        raise UserError(
            f"{record.ref} was not made by `records promote`: a record of the lineage is not withdrawn here")
    built = [r.ref for r in deltas.load_records().values() if r.parent == record.ref]
    built += [deltas.ATTEMPT + name for name in deltas.attempt_names() if promote.read(
        deltas.ATTEMPTS / name / "record.toml")[1].get("parent") == record.ref]
    built += [name for name in deltas.preset_names() if deltas.load_preset(name)[0]["name"] == record.ref]
    if built:
        raise UserError(f"{record.ref} is built on by {', '.join(built)}: withdraw that first, last first")
    folder = deltas.ATTEMPTS / record.attempt
    if folder.exists():
        raise UserError(f"{folder} is there already: move it away, the record goes back to it")
    attempts.require_git()
    text, _ = promote.read(record.folder / "record.toml")
    books = {name: untrusted.bytes_of(record.folder / name) for name in (manifest.NAME, ledger.NAME)
             if (record.folder / name).exists()}
    attempts.withdraw(record.folder, why)
    promote.move(record.folder, folder)  # first: a record.toml without an id would break the lineage
    files.write(folder / "record.toml", promote.MARKS.sub("", text))
    deltas.load_records.cache_clear()
    renew(folder)
    try:
        done = attempts.commit([record.folder, folder], f"Withdraw {record.ref} ({record.title}): {why}")
    except UserError:
        files.write(folder / "record.toml", text)
        for name, book in books.items():
            files.write(folder / name, book)
        promote.move(folder, record.folder)
        deltas.load_records.cache_clear()
        renew(record.folder)
        raise
    print(f"withdrawn {record.ref}: {why}\ncommit {done[:12]}; its evidence stays in {folder}")
