"""Attempts: claims on the way to a record, in attempts/NAME. What submit, promote and withdraw share:
names, files, commits.

An attempt's record.toml has no id and belongs to no lineage, so that it can become the head of none; it is
run by its name, `train_gpt.py attempts/NAME`. Its folder is a claim folder as evidence.claim_laws describes
it.
"""

import contextlib
import os
import re
from pathlib import Path

from common import errors, files, untrusted
from common.errors import UserError
from evidence import arms, compare, manifest
from settings import deltas


def check_name(name: str) -> None:
    """UserError if the name of an attempt could not be a folder of this checkout."""
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise UserError(f"name {name!r}: small letters, digits and _ only, like twice_the_lr")


def folder_of(name: str) -> Path:
    """The folder of an attempt, named as NAME, attempts/NAME or attempts/NAME/ (as a shell completes it)."""
    key = name.removeprefix(deltas.ATTEMPT).rstrip("/")
    known = sorted(p.name for p in files.listed(deltas.ATTEMPTS)
                   if p.is_dir()) if deltas.ATTEMPTS.is_dir() else []
    if key not in known:
        remedy = "" if known else "; there is none yet, `records submit` makes one"
        raise UserError(f"unknown attempt {name!r}{errors.near(key, known)}{remedy}")
    return deltas.ATTEMPTS / key


def record_of(text: str, path: Path) -> deltas.Record:
    """The Record that an attempt's record.toml would be; the file need not exist."""
    record = deltas.parse_record(untrusted.toml_value(text, str(path)), path, deltas.ATTEMPT[:-1])
    deltas.check_parent(record, path)
    return record


def status(folder: Path) -> str:
    """One word or two on where an attempt stands, for lists."""
    if not (folder / manifest.NAME).exists():
        return "not run"
    try:
        claim = manifest.read(folder)
    except UserError:
        return "manifest broken"
    if claim.withdrawn is not None:
        return "withdrawn"
    done, runs = claim.next_place - (claim.open_run is not None), len(claim.declaration["order"])
    if not claim.ended:
        return f"{done} of {runs} runs"
    from evidence import verify
    results = verify.read_results(folder) or {}
    verified = results.get("manifest") == claim.last_hash and "verdict" in results
    return results["verdict"] if verified else "not verified"


# ----- files and commits ------------------------------------------------------------------------------------

def identity() -> dict[str, str]:
    """The caller's GIT_AUTHOR_* and GIT_COMMITTER_*, which say who commits (arms.git drops
    all other GIT_ variables)."""
    return {k: v for k, v in os.environ.items() if k.startswith(("GIT_AUTHOR_", "GIT_COMMITTER_"))}


def require_git(commits: bool = True) -> None:
    """UserError unless commits can be made here: a checkout, no merge under way and,
    if this program commits, a known author."""
    if not arms.is_checkout():
        raise UserError(
            "this is no git checkout: a record needs a commit that others can fetch; clone the repository")
    state = Path(arms.line("rev-parse", "--path-format=absolute", "--git-dir"))
    for name in ("MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD", "rebase-merge", "rebase-apply"):
        if (state / name).exists():
            raise UserError(f"git is in the middle of a merge or rebase ({name}): finish it first")
    try:
        if commits:
            arms.line("var", "GIT_AUTHOR_IDENT", env=identity())
            arms.line("var", "GIT_COMMITTER_IDENT", env=identity())
    except UserError as error:
        raise UserError(
            f"git does not know who commits ({error}): git config user.name NAME; git config user.email "
            "ADDRESS") from None


def require_clean(own: Path) -> None:
    """UserError if a file other than `own` differs from HEAD: the runs are made from a commit."""
    top = Path(arms.line("rev-parse", "--show-toplevel"))
    changed = [x for x in arms.changed_files() if (top / x).resolve() != own.resolve()]
    if changed:
        raise UserError(f"uncommitted changes in {changed[0]}" +
                        (f" and {len(changed) - 1} more" if changed[1:] else "") +
                        ": commit or stash them first, the runs are made from a commit")


def commit(paths: list[Path], message: str) -> str:
    """Commit the paths as they are now, removed ones too, and nothing else. Returns the commit's hash.

    If git refuses, its index is as before for these paths.
    """
    known = [p for p in paths if p.exists() or arms.line("ls-files", "--", str(p))]
    try:
        # a file that was asked for, ignored or not
        force = ["--force"] if all(p.is_file() for p in known) else []
        arms.git("add", "--all", *force, "--", *map(str, known))
        arms.git("commit", "--quiet", "--message", message, "--", *map(str, known), env=identity())
    except UserError:
        with contextlib.suppress(UserError):
            arms.git("reset", "--quiet", "--", *map(str, known))
        raise
    return arms.line("rev-parse", "HEAD")


def make(path: Path, text: str) -> None:
    """Write the record.toml of a new attempt."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path.parent}: {error.strerror}") from None
    files.write(path, text)


def unmake(path: Path) -> None:
    """Remove a record.toml that `make` wrote, and its folders if nothing else is there."""
    path.unlink(missing_ok=True)
    for folder in (path.parent, deltas.ATTEMPTS):
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def withdraw(folder: Path, why: str) -> manifest.Claim:
    """Book the withdrawal in the claim's chain, after what became of a run that died. Returns the Claim."""
    book = manifest.resume(folder)
    try:
        compare.settle(book, folder)
        book.append("withdraw", why=why)
    finally:
        book.close()
    return book.claim
