"""Git, asked about the checkout that holds this code. No torch here.

Every git command of the project runs through `git`, so that a caller's GIT_DIR, GIT_WORK_TREE, GIT_INDEX_FILE
or GIT_CONFIG_*, which a hook or a shell may have set, never leads to another repository, and no hook of a
repository runs.
"""

import os
import subprocess
from pathlib import Path

from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("GIT_AUTHOR_", "GIT_COMMITTER_")  # who commits (`records submit --commit`); they lead nowhere
# safe.directory: git refuses a folder of another user (like that of a container), although that user's code
# is what runs here.
OPTIONS = ("-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", f"safe.directory={ROOT}")


def git(*args: str, cwd: Path | str | None = None, env: dict | None = None, data: bytes | None = None,
        timeout: float | None = None) -> bytes:
    """Output of a git command in a folder (default: the checkout);
    UserError with git's last line if it fails.

    Args:
        env: variables for this command only, GIT_* ones too
        data: its standard input
        timeout: seconds
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith(KEPT)}
    clean |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", **(env or {})}
    try:
        done = subprocess.run(["git", *OPTIONS, *args], cwd=cwd or ROOT, env=clean, input=data,
                              capture_output=True, timeout=timeout)
    except OSError as error:
        raise UserError(
            f"git cannot be run ({error.strerror}): install it, it is needed for code at a ref") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"git {args[0]}: no answer within {timeout:g} s") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit {done.returncode}"]
        raise UserError(f"git {args[0]}: {lines[-1]}")
    return done.stdout


def line(*args: str, **options) -> str:
    """Output of a git command as text without white space around it."""
    return os.fsdecode(git(*args, **options)).strip()


def is_project(root: Path = ROOT) -> bool:
    """Is this folder the top level of a git work tree with a commit? False for a copy inside
    another repository."""
    try:
        top = line("rev-parse", "--show-toplevel", cwd=root, timeout=10)
        return os.path.samefile(top, root) and bool(
            line("rev-parse", "--verify", "HEAD^{commit}", cwd=root, timeout=10))
    except (UserError, OSError):
        return False


def code_version(root: Path = ROOT) -> str:
    """Commit of the checkout, with `-dirty` if a tracked file differs; 'unknown' where git cannot tell."""
    if not is_project(root):
        return "unknown"
    try:
        commit = line("rev-parse", "HEAD", cwd=root, timeout=10)
        return commit + ("-dirty" if line("status", "--porcelain", "--untracked-files=no", cwd=root,
                                          timeout=10) else "")
    except UserError:
        return "unknown"
