"""Arms of a comparison: what is run against what, each in a place of its own.

    [GITREF:]RECORD [changes]     main:short/head, "short/11 --without model.residual.unet_skips"
    script:PATH [arguments]       any program that prints `step:N/M val_loss:L train_time:Tms step_avg:Sms`

A record is run from a git worktree of its commit (without GITREF: HEAD), so that editing goes on while runs
are under way, and its settings are resolved by the code of that commit, whose vocabulary may be another. A
script is run in its own folder; {seed} among its arguments becomes the run's seed. Compile caches are never
shared between arms. No torch here.
"""

import argparse
import contextlib
import csv
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import runlog
from common import errors, files, repository
from common.errors import UserError
from evidence import textlog
from system.launch import tie

ROOT = runlog.ROOT
LAUNCHER = ROOT / "system" / "launch.py"
CHANGES = ("--with", "--without", "--set", "--revert")
KEEP_DAYS = 7  # of a worktree since a run was last started from it
NOT_COMMITTED = ("*.py", "*.toml")  # untracked files that --allow-dirty takes along


def hash_of(data: bytes | str) -> str:
    """SHA-256 in hex of bytes or of text in UTF-8."""
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()


def cache() -> Path:
    """Folder for worktrees and compile caches: $SPEEDRUN_CACHE, otherwise data/cache in the checkout."""
    return Path(os.environ.get("SPEEDRUN_CACHE") or ROOT / "data" / "cache").absolute()


# ----- what is typed ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Typed:
    """An arm as typed. argv: record and changes for the trainer, or the arguments of a script."""
    text: str
    kind: str
    ref: str | None
    path: str | None
    argv: tuple[str, ...]


def parse(text: str) -> Typed:
    """The Typed arm of a text, or a UserError that names what is wrong with it."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"arm {text!r}: {error}") from None
    if not words:
        raise UserError("an arm is empty: write [GITREF:]RECORD [changes] or script:PATH [arguments]")
    if words[0].startswith("script:"):
        path = words[0].removeprefix("script:")
        if not path:
            raise UserError(f"arm {text!r}: script: names no file, write script:PATH")
        return Typed(text, "script", None, path, tuple(words[1:]))
    ref, colon, record = words[0].rpartition(":")
    if colon and not (ref and record):
        raise UserError(f"arm {text!r}: expected GITREF:RECORD, like main:short/head")
    if record.startswith("-"):
        raise UserError(f"arm {text!r} begins with a change: name its record first, all in quotes")
    return Typed(text, "record", ref or None, None, (record, *changes(text, words[1:])))


class Refusing(argparse.ArgumentParser):
    """A parser that raises UserError where argparse would exit."""
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def changes(text: str, words: list[str]) -> list[str]:
    """The words of an arm's changes, checked to be --with, --without,
    --set and --revert with a value each."""
    p = Refusing(add_help=False, allow_abbrev=False)
    for flag in CHANGES:
        p.add_argument(flag, action="append", default=[], help=argparse.SUPPRESS)
    try:
        unknown = p.parse_known_args(words)[1]
    except UserError as error:
        raise UserError(f"arm {text!r}: {error}") from None
    if unknown:
        name = unknown[0].partition("=")[0]
        why = {
            "--seed": "seeds belong to the comparison: --seed0", "--out": "--out belongs to the comparison",
            "--scale": "all arms have one scale: give --scale outside the quotes",
            "--data": "all arms read the same data: give --data outside the quotes"
        }.get(name, f"unknown change {name}{errors.near(name, CHANGES)}; an arm takes {', '.join(CHANGES)}")
        raise UserError(f"arm {text!r}: {why}")
    return words


# ----- git --------------------------------------------------------------------------------------------------

def git(*args: str, cwd: Path | str | None = None, **options: Any) -> bytes:
    """Output of a git command in this checkout or another folder (repository.git)."""
    return repository.git(*args, cwd=cwd or ROOT, **options)


def line(*args: str, cwd: Path | str | None = None, **options: Any) -> str:
    """First line of a git command's output in `cwd` (default: this checkout), as repository.line."""
    return repository.line(*args, cwd=cwd or ROOT, **options)


def is_checkout() -> bool:
    """Is this program a git checkout of its own? A UserError if it is one that git cannot read."""
    if repository.is_project(ROOT):
        return True
    if (ROOT / ".git").exists():
        line("rev-parse", "--verify", "HEAD^{commit}")  # raises git's own reason
    return False


def commit_of(ref: str) -> str:
    """Full commit hash of a git ref; a UserError names near refs."""
    if not is_checkout():
        raise UserError(
            f"{ref}: this is no git checkout and has no refs: name a record alone, or clone the repository")
    try:
        return line("rev-parse", "--verify", "--quiet", "--end-of-options", ref + "^{commit}")
    except UserError:
        refs = line("for-each-ref", "--format=%(refname:short)").split()
        raise UserError(
            f"unknown git ref {ref!r}{errors.near(ref, refs)}; fetch it first, or see `git branch -a`"
        ) from None


def changed_files() -> list[str]:
    """Tracked files that differ from HEAD, as git names them."""
    return [
        x[3:] for x in git("status", "--porcelain", "--untracked-files=no", "-z").decode().split("\0")
        if x[2:3] == " "
    ]


def work_tree(allow_dirty: bool) -> tuple[str, str, bytes | None]:
    """(commit, tree, patch or None) of the present work tree; refuses uncommitted changes unless allowed.

    The patch holds all changes of tracked files and the untracked *.py and *.toml, which would be missing
    otherwise.
    """
    head = commit_of("HEAD")
    changed = changed_files()
    if changed and not allow_dirty:
        raise UserError(f"uncommitted changes in {changed[0]}" +
                        (f" and {len(changed) - 1} more" if changed[1:] else "") +
                        ": commit them, name a git ref, or add --allow-dirty (the claim will say so)")
    if not allow_dirty:
        return head, line("rev-parse", "HEAD^{tree}"), None
    new = git("ls-files", "--others", "--exclude-standard", "-z", "--",
              *NOT_COMMITTED).decode().split("\0")[:-1]
    new = [name for name in new if not any(map(files.is_leftover, name.split("/")))]
    if not changed and not new:
        return head, line("rev-parse", "HEAD^{tree}"), None
    with tempfile.TemporaryDirectory() as scratch:  # an index of our own: the user's stays as it is
        env = {"GIT_INDEX_FILE": f"{scratch}/index"}
        git("read-tree", "HEAD", env=env)
        git("add", "--update", env=env)
        if new:
            git("add", "--", *new, env=env)
        tree = line("write-tree", env=env)
    return head, tree, git("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", head, tree)


def checkout(commit: str, tree: str, patch: bytes | None = None) -> Path:
    """Folder with this program's code at a commit (with a patch applied): a git worktree in the cache,
    made once.

    Kept for a week after its last use.
    """
    home = hash_of(line("rev-parse", "--path-format=absolute", "--git-common-dir"))[:8]
    base = cache() / "worktrees"
    path = base / (f"{home}-{commit[:16]}" + (f"-{hash_of(patch)[:12]}" if patch else ""))
    try:
        base.mkdir(parents=True, exist_ok=True)
        lock = open(base / "lock", "wb")
    except OSError as error:
        raise UserError(
            f"cannot write {base}: {error.strerror}; set SPEEDRUN_CACHE to a folder you may write") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two comparisons may want the same commit
        if not intact(path, commit, tree):
            shutil.rmtree(path, ignore_errors=True)
            git("worktree", "prune")
            git("worktree", "add", "--force", "--detach", str(path), commit)
            if patch:
                git("apply", "--index", "--whitespace=nowarn", "-", cwd=path, data=patch)
            if not intact(path, commit, tree):
                raise UserError(
                    f"{path} does not hold the code of {commit[:12]} after a checkout: delete it, try again")
        os.utime(path)
        forget(base, home)
    return path


def forget(base: Path, home: str) -> None:
    """Remove this repository's worktrees that no run has asked for in KEEP_DAYS;
    they are made again when needed."""
    for path in files.listed(base, f"{home}-*"):
        with contextlib.suppress(OSError, UserError):
            if time.time() - path.stat().st_mtime > 86_400 * KEEP_DAYS:
                git("worktree", "remove", "--force", str(path))


def intact(path: Path, commit: str, tree: str) -> bool:
    """Is the worktree at this commit, with exactly this tree, nothing edited and nothing added?"""
    if not (path / ".git").exists():
        return False
    try:
        git("update-index", "-q", "--refresh", cwd=path)
        git("diff", "--quiet", cwd=path)
        return (line("rev-parse", "HEAD", cwd=path) == commit and line("write-tree", cwd=path) == tree
                and not git("ls-files", "--others", "--exclude-standard", "--exclude=__pycache__/", cwd=path))
    except UserError:
        return False


def code_diff(a: dict, b: dict) -> str:
    """Text of the difference of two arms' code, '' if there is none (or one is a script)."""
    if "script" in (a["kind"], b["kind"]) or None in (a.get("tree"), b.get("tree")) or a["tree"] == b["tree"]:
        return ""
    found = git("diff", "--no-color", "--no-ext-diff", "--no-textconv", a["tree"], b["tree"])
    return found.decode(errors="replace")


# ----- resolving --------------------------------------------------------------------------------------------

PROBE = """
import json, sys
try:
    from settings import schema
    from system.command_line import command_line
except ImportError:
    try:  # a commit from before settings were a folder
        import schema
        from system.command_line import command_line
    except ImportError:  # one from before these were files of their own
        import deltas as schema
        from deltas import command_line
options, resolved = command_line(sys.argv[1:])
s = resolved.settings
print(json.dumps({"record": resolved.record.ref, "title": resolved.record.title, "preset": resolved.preset,
                  "scale": resolved.scale, "changes": list(resolved.changes), "report": list(resolved.report),
                  "settings": schema.plain(s), "ml_hash": schema.ml_hash(s),
                  "system_hash": schema.system_hash(s),
                  "registers": hasattr(options, "registered")}))
"""


def resolve(place: Path, argv: list[str], text: str) -> dict:
    """What the code in a checkout makes of a record and its changes: settings, hashes,
    the lines of its report."""
    if not any((place / name).exists() for name in ("settings/deltas.py", "deltas.py")):
        raise UserError(
            f"{text}: there is no trainer of this program at that ref; run its script with script:PATH")
    done = subprocess.run([sys.executable, "-c", PROBE, *argv], cwd=place, capture_output=True, text=True,
                          env={**os.environ, "SPEEDRUN_CACHE": str(cache())})
    said = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    if done.returncode == 2:
        raise UserError(f"arm {text!r}: {said.removeprefix('error: ')}")
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise UserError(f"arm {text!r}: its code cannot resolve settings ({said})") from None


def prepare(
    text: str, scale: str | None = None, allow_dirty: bool = False
) -> tuple[dict, bytes | None]:
    """(arm for a declaration, patch or None): everything checked and resolved, in the arm's own checkout."""
    typed = parse(text)
    if typed.kind == "script":
        return prepare_script(typed), None
    patch = None
    if typed.ref is not None:
        commit = commit_of(typed.ref)
        tree = line("rev-parse", commit + "^{tree}")
    elif is_checkout():
        commit, tree, patch = work_tree(allow_dirty)
    else:
        commit = tree = None
    argv = [*typed.argv, *(["--scale", scale] if scale else [])]
    try:
        found = resolve(checkout(commit, tree, patch) if commit else ROOT, argv, text)
    except UserError as error:
        new = []
        if commit is not None and not typed.ref and not patch:
            own = "records/*/*/record.toml" if "unknown record" in str(error) else f"{argv[0]}/record.toml"
            new = line("ls-files", "--others", "--exclude-standard", "--", own).splitlines()
        if new and "unknown attempt" in str(error):
            raise UserError(f"arm {text!r}: {new[0]} is not committed: commit it, or add --allow-dirty"
                            ) from None
        hint = f"; {new[0]} is not committed: commit it, or add --allow-dirty" if new else ""
        raise UserError(f"{error}{hint}") from None
    if not found["registers"]:
        raise UserError(
            f"arm {text!r}: that code is too old to announce runs (it has no --registered): name a later ref")
    arm = {"text": text, "kind": "record", "ref": typed.ref, "commit": commit, "tree": tree,
           "dirty": hash_of(patch) if patch else None, "argv": argv}
    return arm | {
        k: found[k]
        for k in ("record", "preset", "scale", "changes", "ml_hash", "system_hash", "settings", "report")
    }, patch


def prepare_script(typed: Typed) -> dict:
    """The declaration of an arm `script:PATH [arguments]`: its file's hash and the commit that it lies in."""
    path = Path(typed.path)
    try:
        digest = hash_of(path.read_bytes())
    except OSError as error:
        raise UserError(f"arm {typed.text!r}: {path} cannot be read ({error.strerror})") from None
    if path.suffix != ".py" and not os.access(path, os.X_OK):
        raise UserError(f"arm {typed.text!r}: {path} is neither a Python file (.py) nor executable")
    commit = None
    with contextlib.suppress(UserError):  # a script need not lie in a repository
        folder = path.absolute().parent
        dirty = "-dirty" if git("status", "--porcelain", "--untracked-files=no", cwd=folder) else ""
        commit = line("rev-parse", "--verify", "--quiet", "HEAD", cwd=folder) + dirty
    return {
        "text": typed.text, "kind": "script", "ref": None, "commit": commit, "tree": None, "dirty": None,
        "path": os.path.relpath(path, ROOT), "sha256": digest, "argv": list(typed.argv), "record": None,
        "changes": [], "ml_hash": None, "system_hash": None, "settings": None
    }


def same(a: dict, b: dict) -> bool:
    """Do two arms run the same program with the same settings? (The target of validation
    makes no difference.)"""
    if a["kind"] != b["kind"]:
        return False
    if a["kind"] == "script":
        return all(a.get(k) == b.get(k) for k in ("sha256", "argv"))
    return all(a.get(k) == b.get(k) for k in ("ml_hash", "system_hash", "tree"))


def takes_seed(arm: dict) -> bool:
    """True if runs of the arm can differ in their seed."""
    return arm["kind"] == "record" or any("{seed}" in word for word in arm["argv"])


def patch_path(folder: Path | str, arm: dict) -> Path:
    """Where the claim folder keeps the uncommitted changes of an arm."""
    return Path(folder) / f"dirty-{arm['dirty'][:16]}.diff"


def place_of(arm: dict, folder: Path | str) -> Path:
    """Where a declared arm is run. The code must still be the declared one: checked before every run."""
    if arm["kind"] == "script":
        path = (ROOT / arm["path"]).resolve()
        if not path.exists() or hash_of(path.read_bytes()) != arm["sha256"]:
            raise UserError(
                f"{path} is not the file that was declared for {arm['text']!r}: put it back, or start anew")
        return path.parent
    if arm["commit"] is None:
        return ROOT
    patch = None
    if arm["dirty"]:
        with contextlib.suppress(OSError):
            patch = patch_path(folder, arm).read_bytes()
        if patch is None or hash_of(patch) != arm["dirty"]:
            raise UserError(
                f"{patch_path(folder, arm)}, the uncommitted code of {arm['text']!r}, is missing or changed")
    commit_of(arm["commit"])
    return checkout(arm["commit"], arm["tree"], patch)


# ----- one run ----------------------------------------------------------------------------------------------

def environment() -> dict[str, str]:
    """The variables of this process that change numbers or times (runlog.environment)."""
    return runlog.environment()


@dataclass
class Started:
    """A run under way: its process, where it writes, and its standard error."""
    process: subprocess.Popen
    folder: Path | None  # of a script; the trainer makes its own
    output: IO[bytes]
    errors: IO[bytes]

    def last_line(self) -> str:
        """The last whole line on its standard output, '' before there is one."""
        return (tail(self.output).rpartition("\n")[0].splitlines() or [""])[-1]

    def complaint(self) -> str:
        """The last line of standard error that says something."""
        lines = [x.strip() for x in tail(self.errors).splitlines() if x.strip()]
        said = (
            [x for x in lines if x.startswith("error: ")]
            or [x for x in lines if "Error" in x or "error" in x] or lines
        )
        return (said or ["it said nothing"])[-1].removeprefix("error: ")


def tail(file: IO[bytes], size: int = 65536) -> str:
    """The last `size` bytes of an open file as text."""
    end = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, max(0, end - size)).decode(errors="replace")


def script_folder(arm: dict, run: int, seed: int, registered: str) -> str:
    """Name of a script's run folder: known before it starts, so that it is found again after a kill."""
    return f"run{run:03d}_{Path(arm['path']).stem}_s{seed}_{registered[:12]}"


def start(
    arm: dict, place: Path, runs: Path | str, *, seed: int, registered: str = "", run: int = 0,
    processes: int | None = None, data: Path | str | None = None, variables: dict[str, str] | None = None,
    keep_open: Sequence[int] = ()
) -> Started:
    """Start one run of an arm, its output in files, in a session of its own (Ctrl-C reaches
    this program only).

    runs: folder for run folders. processes: with system/launch.py; None: plain python.
    variables: the declared environment. keep_open: descriptors the process inherits (the manifest's lock).
    """
    python = [sys.executable, *([str(LAUNCHER), str(processes)] if processes else [])]
    runs, folder = Path(runs).absolute(), None
    if arm["kind"] == "script":
        path = (ROOT / arm["path"]).resolve()
        command = [*(python if path.suffix == ".py" else []), str(path)]
        command += [word.replace("{seed}", str(seed)) for word in arm["argv"]]
        folder = runs / script_folder(arm, run, seed, registered)
    else:
        command = [
            *python, str(place / "train_gpt.py"), *arm["argv"], "--seed", str(seed), "--out", str(runs)
        ]
        command += ["--registered", registered] if registered else []
        command += ["--data", str(data)] if data else []
    env = {k: v for k, v in os.environ.items() if variables is None or k not in environment()} | (
        variables or {}
    )
    caches = cache() / "compiled" / hash_of(json.dumps([arm.get(k) for k in (
        "tree", "sha256", "ml_hash", "system_hash", "argv")]))[:16]
    env |= {"SPEEDRUN_CACHE": str(cache()), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TRITON_CACHE_DIR": str(caches / "triton")}
    parent = os.getpid()

    # what a script starts with `&` ignores Ctrl-C; the run must not inherit that, nor outlive this program
    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        tie(parent)

    try:
        (folder or runs).mkdir(parents=True, exist_ok=True)
        output = open(folder / "log.txt", "w+b") if folder else tempfile.TemporaryFile()
        errors = tempfile.TemporaryFile()
        process = subprocess.Popen(command, cwd=place, env=env, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=errors, pass_fds=keep_open, start_new_session=True,
                                   preexec_fn=prepare)
    except OSError as error:
        raise UserError(
            f"cannot start a run of {arm['text']!r}: {error.strerror} ({error.filename})") from None
    return Started(process, folder, output, errors)


# ----- what a run came to -----------------------------------------------------------------------------------

LOST = {
    "status": "failed", "folder": None, "last_hash": None, "val_loss": None, "train_time_ms": None,
    "curve": [], "scheduled_steps": None, "start": None, "note": ""
}


def find_run(runs: Path | str, registered: str) -> str | None:
    """Name of the run folder whose start event carries this registration, or None."""
    for path in reversed(files.listed(runs, "*/run.jsonl")):
        try:
            with open(path, encoding="utf-8") as file:
                if json.loads(file.readline())["registered"] == registered:
                    return path.parent.name
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def collect(arm: dict, runs: Path | str, folder: str | None) -> dict:
    """Result of a run from its folder (a name under runs, or None): LOST with what is known filled in.

    status: finished or diverged, which have told their loss; interrupted; failed with a note that says how.
    """
    if folder is None:
        return {**LOST, "note": "it left no log"}
    if arm["kind"] == "script":
        return collect_script(Path(runs) / folder)
    try:
        links = runlog.read_links(Path(runs) / folder / "run.jsonl")
    except UserError as error:
        return {**LOST, "note": str(error)}
    events = [event for event, _ in links]
    first, last = events[0], events[-1]
    validations = [e for e in events if e["kind"] == "validation"]
    out = {**LOST, "folder": folder, "last_hash": links[-1][1], "start": first,
           "curve": [[e["step"], e["val_loss"], e["train_time_ms"]] for e in validations],
           "scheduled_steps": validations[-1]["scheduled_steps"] if validations else None}
    if last["kind"] != "end":
        return {**out, "note": f"its log ends with the event {last['kind']}"}
    loss = last["val_loss"] if last["status"] == "finished" else None
    return {**out, "status": last["status"], "val_loss": loss, "train_time_ms": last["train_time_ms"]}


def collect_script(folder: Path) -> dict:
    """The result of a script's run: its loss curve, read from the text that it printed (log.txt)."""
    try:
        log, digest = textlog.read(folder / "log.txt")
    except UserError as error:
        return {**LOST, "note": str(error).replace(f"{folder}/", "its ")}
    out = {
        **LOST, "folder": folder.name, "last_hash": digest,
        **{k: log[k] for k in ("curve", "scheduled_steps")}
    }
    if log["diverged"]:
        return {**out, "status": "diverged", "train_time_ms": log["train_time_ms"]}
    if not log["complete"]:
        return {**out, "note": f"its log ends at step {log['steps']} of {log['scheduled_steps']}"}
    return {**out, "status": "finished", "val_loss": log["val_loss"], "train_time_ms": log["train_time_ms"]}


def contradiction(arm: dict, seed: int, registered: str, start: dict) -> str:
    """How a run's start event differs from what was declared for it, or ''."""
    expected = {
        "ml_hash": arm["ml_hash"], "system_hash": arm["system_hash"], "seed": seed, "registered": registered
    }
    if arm["commit"]:
        expected["code"] = arm["commit"] + ("-dirty" if arm["dirty"] else "")
    return "; ".join(f"{k} is {start.get(k)!r}, declared {v!r}" for k, v in expected.items()
                     if start.get(k) != v)


def cause_of(code: int, said: str, stopped: bool) -> str | None:
    """Cause of a run's end without a loss, if it lies outside the run: one of manifest.CAUSES, or None."""
    if stopped:
        return "interrupted"
    text = said.lower()
    if (
        "out of memory" in text or "outofmemory" in text or "can't allocate memory" in text
        or "memoryerror" in text
    ):
        return "out_of_memory"
    if "no space left" in text or "free some space" in text:
        return "disk_full"
    if "uncorrectable ecc" in text or "fallen off the bus" in text:
        return "machine"
    return "killed" if code in (-9, -15, 137, 143) or "sigkill" in text else None


# ----- hardware ---------------------------------------------------------------------------------------------

def hardware(start: dict) -> dict:
    """What two runs must share to be compared: machine, processor, devices, torch.
    Threads are the settings' business."""
    device = start["device"]
    return {
        "machine": start["machine"], "cpu": start["cpu"], "cores": start["cores"], "torch": start["torch"],
        "device": device.rpartition(",")[0] if device.startswith("CPU") else device
    }


def corpus_prefixes(folder: Path | str) -> list[str]:
    """Digests of the first 1, 2, ... shards of a corpus: runs of different length read
    different shares of it."""
    from data.shards import corpus_digest, open_corpus
    corpus = open_corpus(folder)
    return [corpus_digest(corpus, used) for used in range(1, len(corpus.train) + 1)]


def incomparable(a: dict, b: dict, prefixes: list[str] | None = None) -> str:
    """Why the runs of two start events cannot be compared, or ''. prefixes:
    corpus_prefixes of the declared corpus."""
    for name, left in hardware(a).items():
        if left != hardware(b)[name]:
            return f"they ran on different hardware: {name} {left!r} and {hardware(b)[name]!r}"
    if a["val_digest"] != b["val_digest"]:
        return "they were validated on different tokens (val_digest)"
    if a["corpus_digest"] != b["corpus_digest"] and not {a["corpus_digest"], b["corpus_digest"]} <= set(
        prefixes or ()
    ):
        return "they were trained on different corpora (corpus_digest)"
    return ""


def gpus() -> list[dict]:
    """[{index, uuid, name, used_mib, total_mib, busy_percent}] of this machine;
    [] where there is no nvidia-smi."""
    fields = "index,uuid,name,memory.used,memory.total,utilization.gpu"
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []

    def number(text):  # "[N/A]" where a card does not tell
        try:
            return float(text)
        except ValueError:
            return 0.0
    rows = [r for r in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if len(r) == 6]
    found = [{"index": r[0], "uuid": r[1], "name": r[2], "used_mib": number(r[3]), "total_mib": number(r[4]),
              "busy_percent": number(r[5])} for r in rows]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return found
    wanted = [x.strip() for x in chosen.split(",") if x.strip()]
    return [g for w in wanted for g in found if g["index"] == w or g["uuid"].startswith(w)]


def free_gpus(processes: int) -> list[dict]:
    """`processes` GPUs on which nothing runs, or [] on a machine without CUDA;
    one line if they are too few or busy."""
    found = gpus()
    if not found or not cuda_works():
        return []
    if len(found) < processes:
        raise UserError(
            f"{processes} processes need as many GPUs, this machine shows {len(found)}: lower --nproc")
    free = [g for g in found if g["busy_percent"] < 10 and g["used_mib"] <= max(1024, 0.02 * g["total_mib"])]
    if len(free) < processes:
        g = next(g for g in found if g not in free)
        raise UserError(
            f"no free GPU: {len(free)} of {len(found)} are free and {processes} needed; GPU {g['index']} "
            f"({g['name']}) holds {g['used_mib'] / 1024:.1f} GiB and is {g['busy_percent']:.0f} % busy: "
            "wait, or end what runs there"
        )
    return free[:processes]


def require_tools() -> None:
    """UserError unless this Python can train and judge: imports torch, numpy and scipy,
    in a process of its own."""
    done = subprocess.run([sys.executable, "-c", "import torch, numpy, scipy.stats"], cwd=ROOT,
                          capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise UserError(f"{sys.executable} cannot run this ({said}): use the environment that ./run.sh makes "
                        "(.venv/bin/python)")


def cuda_works() -> bool:
    """Does torch see a GPU? Asked in a process of its own, because importing torch takes
    seconds and GPU memory."""
    done = subprocess.run(
        [sys.executable, "-c", "import torch; raise SystemExit(0 if torch.cuda.is_available() else 1)"],
        capture_output=True)
    return done.returncode == 0
