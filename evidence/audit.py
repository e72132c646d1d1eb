"""`python -m records audit REF`: is the code at a git ref an honest trainer? Tested in a
checkout and processes of its own.

The files of the ref are written into a temporary folder, and evidence/audit_probe.py of *this* checkout runs
there, in a fresh process per training: no network, no writing outside its folder, limited time and memory,
nothing of our environment, empty caches. Seeds and the number of steps are drawn anew for each audit. What is
tested stands in CHECKS, what no such test can know in LIMITS.

--json: {"version", "ref", "commit" (of a folder: its HEAD, with -dirty if the files differ), "tree" (git's
hash of the audited files), "record", "scale", "passed", "checks": [{"name", "passed", "detail"}], "draw"
(--draw repeats it), "steps", "seeds" (drawn and claimed), "torch", "confined": {"network", "writes"},
"seconds"}.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import random
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from common import arguments as numbers, environment, files, repository
from common.errors import UserError
from evidence import provenance
from runlog import ROOT, measured

PASSED, FAILED, INTERRUPTED = 0, 3, 130
VERSION = 1
VALIDATION_TOKENS = 10_485_760  # the task: the first ones of the validation shard, at full scale
# Drawn in this range. The first update moves a zero-initialised head, the second the projections behind it,
# the third all else; a fixed number would tell code when it is safe to begin.
STEPS = (4, 7)
RESULT_BYTES = 2 ** 26  # largest file that is read back from an audited process
MARKERS = 16  # ids that only the validation shard has
NEEDED = ("train_gpt.py", "model.py", "settings/deltas.py", "data/stream.py", "records")
PROBE = Path(__file__).parent / "audit_probe.py"
TRAIN_SHARD, VAL_SHARD = "audit_train_000001.bin", "audit_val_000000.bin"

CHECKS = {
    "causality": "no loss depends on a later token, on another row, or on another position's target",
    "normalisation": "exp(-loss) over all targets sums to one at every position, over the whole range of the "
                     "logits' cap, and losses are those of the logits",
    "validation_targets": "validation is the plain mean over exactly the first targets of the shard, each "
                          "once",
    "no_trace": "validation changes no parameter, buffer, gradient, optimizer state, random generator or "
                "later loss",
    "state": "parameters and optimizer change in timed training steps and nowhere else",
    "inputs": "steps read training shards only; another validation shard changes no training loss; before "
              "the clock nothing depends on the data",
    "warm_up": "losses do not depend on the untimed warm-up: none, random tokens, real tokens",
    "caches": "what a run leaves in its caches changes no loss of the next run",
    "seed": "one seed gives the same losses twice, bit for bit; others give others; seeds of the claim pass "
            "these tests as well",
    "clock": "batches and steps are inside the clock, validation is outside, for times from milliseconds to "
             "days; the claimed time is the true one",
    "target": "`reached` and the exit code say whether val_loss <= target, also within one rounding of it",
}
# the trainings whose logs a check reads; `model` is the one that is looked into
NEEDS = {
    "causality": ["model"], "normalisation": ["model"], "validation_targets": ["model"], "state": ["model"],
    "inputs": ["model", "other_validation", "other_data"], "no_trace": ["model", "plain", "often"],
    "warm_up": ["plain", "cold", "real"], "caches": ["plain", "second"], "seed": ["plain", "again", "model"],
    "clock": ["real", "model"], "target": ["again", "cold"],
}
INSIDE = ("validation_targets", "no_trace", "causality", "normalisation", "state", "inputs")
LIMITS = """\
What an audit cannot know: whether the code behaves only while it is audited (it runs in the same
process as the probe and could forge what that finds); what begins after more steps than it trains (4 to 7,
drawn), or with a seed that is neither drawn nor named by --seed; what only runs on a GPU, compiled, at
another scale or on several processes; work before the clock that depends on no data; what is off here: the
mask of pairs that a tokenizer cannot write (none wrote this text), and a sampled softmax, whose candidates
depend on the whole batch; whether shards are what they are called; whether a log was written by this code
(`records verify` and `records replay` look at logs)."""


def arguments(p: argparse.ArgumentParser) -> None:
    """Options of `records audit`."""
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.epilog = "checks:\n" + "".join(f"  {name:18}  {what}\n"
                                     for name, what in CHECKS.items()) + f"\n{LIMITS}"
    p.add_argument(
        "ref", help="git ref of this repository (branch, tag, commit), or a folder: `.`, ./fork, /path/to/it"
    )
    p.add_argument("--record", default="short/head",
                   help="record or preset (default: the ref's head of the short track)")
    p.add_argument("--scale", choices=("micro", "tiny"), default="micro",
                   help="size of the models that are trained")
    p.add_argument("--only", choices=list(CHECKS), action="append", default=[], metavar="CHECK",
                   help="one check instead of all; may be repeated")
    p.add_argument("--json", metavar="FILE", help="write the result; only of a whole audit")
    p.add_argument("--seed", type=numbers.integer(0, 2**31), action="append", default=[], metavar="SEED",
                   help="a seed of the claim, audited next to the drawn ones; may be repeated")
    p.add_argument("--draw", type=numbers.integer(0, 2**32), metavar="N",
                   help="draw seeds, steps and times as the audit that said `draw N`")
    p.add_argument("--timeout", type=numbers.integer(1, 10**6), default=600, metavar="SECONDS",
                   help="for each process (default 600)")
    p.add_argument("--keep", action="store_true", help="keep the temporary folder and say where it is")


def run(options: argparse.Namespace) -> int:
    """The command. Returns the exit code: 0 passed, 3 a check failed, 130 interrupted."""
    if options.json and options.only:
        raise UserError("--json holds a whole audit: leave --only out, or --json")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: its folder does not exist")
    environment.check_training()
    try:
        result = audit(options.ref, options.record, options.scale, options.only, options.timeout,
                       options.keep, functools.partial(print, flush=True), options.seed, options.draw)
    except KeyboardInterrupt:
        print("interrupted: the audit was not finished", file=sys.stderr)
        return INTERRUPTED
    if options.json:
        files.write(options.json, files.json_text(result, indent=1) + "\n", remedy="choose another --json")
    return PASSED if result["passed"] else FAILED


def audit(
    ref: str, record: str = "short/head", scale: str = "micro", only: Collection[str] = (),
    timeout: int = 600, keep: bool = False, say: Callable[[str], None] = print, seeds: Sequence[int] = (),
    draw: int | None = None
) -> dict:
    """Audit a ref and say how it goes, a line per check. Returns what --json holds;
    `passed` is about the checks that ran.

    seeds: of the claim. draw: number that all random choices follow from; None: one that nobody can know.
    UserError: unknown ref, not a checkout of this project, a record that it does not know.
    """
    began = time.perf_counter()
    folder = Path(tempfile.mkdtemp()).resolve()  # a name that says nothing about an audit
    draw = secrets.randbits(32) if draw is None else draw
    names = [name for name in CHECKS if not only or name in only]
    try:
        commit, tree = check_out(ref, folder)
        trainings = Trainings(folder, ref, record, scale, timeout, names, seeds, draw)
        about, checks = trainings.facts, []
        say(f"audit of {ref}: commit {commit}, tree {tree[:12]}, {about['record']} at scale {scale}, "
            f"draw {draw}")
        trainings.run_all()
        for name in names:
            passed, detail = judge(name, trainings)
            checks.append({"name": name, "passed": passed, "detail": detail})
            say(
                textwrap.fill(
                    f"  {'passed' if passed else 'FAILED'}  {name:18}  {detail}", 120,
                    subsequent_indent=" " * 30
                )
            )
        seconds = round(time.perf_counter() - began, 1)
        result = {
            "version": VERSION, "ref": ref, "commit": commit, "tree": tree, "record": about["record"],
            "scale": scale, "passed": all(c["passed"] for c in checks), "checks": checks,
            "draw": draw, "steps": trainings.steps, "seeds": [trainings.seed, trainings.other, *seeds],
            "torch": trainings.torch, "confined": about["confined"], "seconds": seconds
        }
        say(f"{'PASSED' if result['passed'] else 'FAILED'}: {sum(c['passed'] for c in checks)} of "
            f"{len(checks)} checks in {seconds:.0f} s; network {about['confined']['network']}, writes "
            f"{about['confined']['writes']}\n{LIMITS}")
        return result
    except OSError as error:
        raise UserError(f"the audit cannot work in {folder}: {error}; TMPDIR chooses another place") from None
    finally:
        if keep:
            say(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


# ----- the checkout -----------------------------------------------------------------------------------------

def git(*args: str, cwd: Path = ROOT, **env: str) -> str | None:
    """Output of a git command, None if it fails."""
    if shutil.which("git") is None:
        raise UserError("audit needs git: install it")
    try:
        return repository.line(*args, cwd=cwd, env=env)
    except UserError:
        return None


def check_out(ref: str, folder: Path) -> tuple[str, str | None]:
    """Write the files of a ref, or of a folder, into folder/checkout. Returns (commit, tree), hex;
    commit may be unknown.

    An export through an index of its own, not `git worktree`: it leaves nothing in the repository, whatever
    happens to this process, and the audited files hold no way back to it.
    """
    checkout = folder / "checkout"
    checkout.mkdir()
    if ref.startswith((".", "/", "~")):
        commit, tree = copy(Path(ref).expanduser(), checkout, folder / "git")
    else:
        if not repository.is_project(ROOT):
            raise UserError(
                f"{ROOT} is no git checkout of its own and has no refs: name a folder like ./{ref}")
        commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", ref + "^{commit}")
        if commit is None:
            raise UserError(
                f"unknown git ref {ref!r} in {ROOT}: fetch it first, or name a folder like ./{ref}")
        tree, index = git("rev-parse", commit + "^{tree}"), {"GIT_INDEX_FILE": str(folder / "index")}
        listed = git("read-tree", commit, **index)
        written = git("checkout-index", "--all", f"--prefix={checkout}/", **index)
        if None in (listed, written):
            raise UserError(f"git cannot write the files of {ref} into {folder}: is there room on the disk?")
    missing = [name for name in NEEDED if not (checkout / name).exists()]
    if missing:
        raise UserError(f"{ref} is not a checkout of this project: it has no {missing[0]}")
    names = [str(path.relative_to(checkout)) for path in files.listed(checkout, "**/*")]
    if odd := provenance.hidden_code(names):
        raise UserError(f"{ref}: {odd}")
    return commit, tree


def copy(source: Path, checkout: Path, git_folder: Path) -> tuple[str, str | None]:
    """Copy a working tree: tracked and new files where git knows them, otherwise all but caches.
    Returns (commit, tree)."""
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    names = None
    if (source / ".git").exists() and repository.is_project(source):
        names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=source)
    if names is None:
        caches = shutil.ignore_patterns(
            ".git", ".venv", "__pycache__", ".pytest_cache", "runs", "cache", "fineweb10*"
        )
        shutil.copytree(source, checkout, symlinks=True, ignore=caches, dirs_exist_ok=True)
    else:
        for name in filter(None, names.split("\0")):
            if (source / name).is_symlink() or (source / name).is_file():  # neither deleted nor a submodule
                (checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / name, checkout / name, follow_symlinks=False)
    # the tree's hash, without touching their repository
    own = {"GIT_DIR": str(git_folder), "GIT_WORK_TREE": str(checkout)}
    git("init", "--quiet", **own)
    git("-c", "core.looseCompression=0", "add", "--all", "--force", ".", cwd=checkout, **own)
    tree = git("write-tree", **own)
    head = git("rev-parse", "HEAD", cwd=source) if names is not None else None
    if head is None:
        return "unknown", tree
    return head if git("rev-parse", "HEAD^{tree}", cwd=source) == tree else head + "-dirty", tree


# ----- trainings in processes of their own ------------------------------------------------------------------

class Failed(Exception):
    """A process of the audited code that did not do its work, in one line."""


class Drawn:
    """What is drawn for an audit: the number of steps, two seeds, and a generator for all else."""

    def __init__(self, draw: int) -> None:
        self.random = random.Random(draw)
        self.steps = self.random.randint(*STEPS)
        self.seed, self.other = self.random.sample(range(2 ** 31), 2)


class Trainings:
    """The processes of an audit: what the checkout resolves, and the trainings that the checks need."""

    def __init__(
        self, folder: Path, ref: str, record: str, scale: str, timeout: int, checks: list[str],
        seeds: Sequence[int] = (), draw: int = 0
    ) -> None:
        self.folder, self.record, self.scale = folder, record, scale
        self.timeout, self.checks = timeout, checks
        self.done, self.torch, self.claimed = {}, None, list(seeds)
        drawn = Drawn(draw)
        self.random, self.steps, self.seed, self.other = drawn.random, drawn.steps, drawn.seed, drawn.other
        try:
            self.facts, = self.start({"facts": ("facts", {})}).values()
            if isinstance(self.facts, Failed):
                raise self.facts
        except Failed as failure:
            raise UserError(f"{ref}: its settings cannot be resolved: {failure}") from None
        if "refused" in self.facts:
            raise UserError(f"{ref}: {self.facts['refused']}")
        self.drawn = self.random.getrandbits(31)
        self.data = folder / "data"
        full = 0
        if "validation_targets" in checks:
            full = max(VALIDATION_TOKENS, self.facts["full_validation_tokens"])
        tokens = max(full, self.facts["validation_tokens"]) + 4097
        self.markers = write_corpus(self.data, self.facts, tokens, (1, 2))
        if "inputs" in checks:
            # as long as the first one: a shard of another length has its documents elsewhere
            write_corpus(folder / "data-other_validation", self.facts, tokens, (1, 3))
            write_corpus(folder / "data-other_data", self.facts, tokens, (4, 3))

    def names(self) -> list[str]:
        """Names of all trainings that the checks need; `model` also for each seed of the claim."""
        names = list(dict.fromkeys(name for check in self.checks for name in NEEDS[check]))
        claimed = [f"model-{s}" for s in self.claimed] if {*self.checks} & {*INSIDE, "seed", "clock"} else []
        before = ["plain"] if {"again", "cold", "second"} & {*names} and "plain" not in names else []
        return [*before, *names, *claimed]

    def run_all(self) -> None:
        """Run them: first those that stand alone, then, in processes with another hash seed, those that
        repeat the plain one or take up what it left."""
        later = ("again", "cold", "second")
        for names in ([n for n in self.names() if n not in later], [n for n in self.names() if n in later]):
            if not names:
                continue
            jobs = {}
            for name in names:
                try:
                    jobs[name] = self.job(name)
                except Failed as failure:  # of the plain training
                    self.done[name] = failure
            for name, result in self.start(jobs).items() if jobs else ():
                self.done[name] = self.finished(name, result)

    def finished(self, name: str, result: dict | Failed) -> dict | Failed:
        """What a training logged and returned, or the Failed of what went wrong."""
        try:
            if isinstance(result, Failed):
                raise result
            if "refused" in result:
                raise Failed(f"the {name} training: {result['refused']}")
            self.torch = result["torch"]
            if name == "other_data":
                return result
            run = read_run(self.folder / name / "runs")
            told = [e["val_loss"] for e in run["curve"]]
            if result.get("logged", told) != told:
                raise Failed(f"the log of the {name} training was changed after the training had ended")
            return {**result, **run}
        except Failed as failure:
            return failure

    def start(self, jobs: dict[str, tuple[str, dict]]) -> dict[str, dict | Failed]:
        """Run jobs {name: (job of the probe, its spec)}, each in its own process, confined to its own folder.

        Returns {name: result, or the Failed that says why there is none}.
        """
        specs = []
        for name, (job, spec) in jobs.items():
            folder = self.folder / name
            folder.mkdir(exist_ok=True)  # the second run finds what the plain one left
            (folder / "result.json").unlink(missing_ok=True)
            about = {
                "job": job, "checkout": str(self.folder / "checkout"), "auditor": str(ROOT),
                "record": self.record, "scale": self.scale, "seconds": self.timeout, "cache": str(folder)
            }
            files.write(folder / "spec.json", files.json_text(about | spec))
            specs.append(str(folder / "spec.json"))
        codes = run_probe(specs, self.folder, self.timeout * len(specs) + 60)
        return {name: self.result(name, codes.get(str(self.folder / name / "spec.json"), "none"))
                for name in jobs}

    def result(self, name: str, code: int | str | None) -> dict | Failed:
        """The result that a job wrote, or the Failed that says why it has none."""
        folder = self.folder / name
        if code is None:
            return Failed(f"the {name} process did not end in {self.timeout} s")
        try:
            result = json.loads(read_back(folder / "result.json"))
            if not isinstance(result, dict):
                raise ValueError
        except (OSError, ValueError, RecursionError):
            result = {"exit": code}
        if result.get("exit", 0) not in (0, 3):  # 3: a target was missed
            lines = said(folder / "output.txt")
            return Failed(f"the {name} process exits with {result['exit']}: {lines[-1][-300:]}")
        return result

    def __getitem__(self, name: str) -> dict:
        """What a training logged and returned; raises the Failed of one that went wrong."""
        if isinstance(self.done[name], Failed):
            raise self.done[name]
        return self.done[name]

    def job(self, name: str) -> tuple[str, dict]:
        """(job, spec) of one of the short trainings that are compared: equal but for what must not matter;
        `model` has another seed."""
        f, seed, sets, job, spec = self.facts, self.seed, [], "script", {}
        rows = 8 * f["validation_seq_len"]
        tokens, data = math.ceil(1024 / rows) * rows, self.data  # few: most of them look at training
        if name == "again":  # the loss is the target: reached
            sets = [f"validation.target={self['plain']['final']!r}"]
        elif name == "cold":  # the next number below it: missed
            below = math.nextafter(self["plain"]["final"], -math.inf)
            sets = ["system.warmup_steps=0", f"validation.target={below!r}"]
        elif name == "second":  # finds all that the plain run wrote
            shutil.copytree(self.folder / "plain", self.folder / name, symlinks=True)
            (self.folder / name / "runs").rename(self.folder / name / "runs-before")
            sets = ["system.warmup_steps=0"]
        elif name == "often":
            sets = ["system.warmup_steps=0", "validation.every=1"]
        elif name == "real":
            sets, job = ["system.warmup_tokens=real", "validation.every=1"], "clock"
            spec = {"draw": self.random.getrandbits(32)}
        elif name.startswith(("model", "other")):
            job, sets = "model", ["system.warmup_steps=1"]  # which shows where parameters and optimizer are
            seed = int(name.partition("-")[2] or self.other)
            tokens = f["validation_tokens"]
            data = self.folder / f"data-{name}" if name.startswith("other") else data
            spec = self.look_into(name)
        return job, {"argv": self.argv(f"{name}/runs", seed, self.steps, tokens, sets, data), **spec}

    def due(self, run: dict) -> str:
        """Hash of the batches that the settings of a training draw from its shards, read by this checkout's
        own code; "" where it has no words for these settings."""
        from data.shards import open_corpus
        from data.stream import Stream, stream_arguments
        from evidence import foreign
        try:
            s = foreign.projected(run["start"]["settings"])[0]
            stream = Stream(open_corpus(self.data), ranks=range(8), **stream_arguments(s))
            digest = hashlib.sha256()
            for _ in range(self.steps):
                digest.update(stream.next().tobytes())
        except (UserError, KeyError, TypeError, AttributeError):
            return ""
        return digest.hexdigest()

    def look_into(self, name: str) -> dict:
        """The spec of a training that audit_model.py looks into, with the checks that it makes."""
        f = self.facts
        counted = self.argv(f"{name}/counted", 0, 1, f["full_validation_tokens"], ["system.warmup_steps=0"],
                            self.data)
        checks = [check for check in self.checks if check in INSIDE]
        if name != "model":  # the number of targets does not depend on the seed
            checks = [c for c in checks if c != "validation_targets"] if "-" in name else []
        if "clock" in self.checks and name.startswith("model"):
            checks = [*checks, "true_time"]
        watch = bool({"no_trace", "state", "inputs"} & {*checks}) or name.startswith("other")
        return {
            **f, "bos": f["vocab_size"] - 1, "checks": checks, "watch": watch, "markers": self.markers,
            "until_start": name == "other_data", "val_shard": str(self.data / VAL_SHARD), "draw": self.drawn,
            "counted_argv": counted
        }

    def argv(self, out: str, seed: int, steps: int, tokens: int, sets: list[str], data: Path) -> list[str]:
        """Command line of a training by train_gpt.py."""
        sets = [
            "system.device=cpu", "system.compile=off", f"schedule.steps={steps}",
            f"validation.tokens={tokens}", *self.facts["sets"], *sets
        ]
        return [self.record, "--scale", self.scale, "--seed", str(seed), "--data", str(data),
                "--out", str(self.folder / out), *(x for path in sets for x in ("--set", path)),
                *(x for path in self.facts["without"] for x in ("--without", path))]


def run_probe(specs: list[str], folder: Path, seconds: float) -> dict[str, int | None]:
    """Run the probe on spec files. Returns {spec file: exit code of its process, or None after a timeout}."""
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                   "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", str(PROBE), *specs], cwd=folder, env=environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Failed(f"the audited processes did not end in {seconds} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):  # its children end with it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return dict(json.loads(line) for line in out.decode().splitlines())


def read_back(path: Path) -> bytes:
    """Bytes of a file that an audited process wrote: a regular file of bounded size, or an OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_size > RESULT_BYTES:
            raise OSError(f"{path} is no file of at most {RESULT_BYTES} bytes")
        return file.read(RESULT_BYTES)


def said(path: Path) -> list[str]:
    """The printable lines that a process wrote, at least one."""
    try:
        text = read_back(path).decode(errors="replace")
    except OSError:
        text = ""
    lines = ["".join(c if c.isprintable() else " " for c in line) for line in text.strip().splitlines()]
    return lines or ["it said nothing"]


def read_run(out: Path) -> dict:
    """Curve, stream digest and summary of the one run under a folder."""
    try:
        folder, = (p.parent for p in files.listed(out, "*/run.jsonl"))
        events = [
            measured(json.loads(line))
            for line in read_back(folder / "run.jsonl").decode().splitlines()
        ]
        curve = [e for e in events if e["kind"] == "validation"]
        streams = [e["digest"] for e in events if e["kind"] == "stream"]
        return {"curve": curve, "stream": streams, "final": curve[-1]["val_loss"], "start": events[0],
                "summary": json.loads(read_back(folder / "summary.json"))}
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise Failed(
            f"the log of the {out.parent.name} training cannot be read: {type(error).__name__}: {error}"
        ) from None


def write_corpus(folder: Path, facts: dict, validation_tokens: int, seeds: tuple[int, int]) -> list[int]:
    """Shards of random text for the trainings: documents of about 60 tokens,
    frequencies falling like the inverse rank.

    They are the auditor's, so that it knows every token. seeds: of the train and of the validation shard.
    Returns the ids that only the validation shard has.
    """
    import numpy as np

    from data.shards import write_shard
    from data.tokenizer import FILES
    folder.mkdir()
    vocab_size = facts["vocab_size"]
    # as long as validation, so that one that reads training tokens is told so, not that they are too few
    trained = max(8 * facts["tokens_per_rank"] * 64, validation_tokens)
    markers = vocab_size - 1 - MARKERS
    shards = (TRAIN_SHARD, trained), (VAL_SHARD, validation_tokens)
    for (name, count), seed in zip(shards, seeds):
        generator = np.random.default_rng(20240520 + seed)
        tokens = (markers ** generator.random(count, dtype=np.float32)).astype(np.uint16) - 1
        if name == VAL_SHARD:
            tokens[generator.random(count, dtype=np.float32) < 1 / 50] = markers + seed % MARKERS
        tokens[generator.random(count, dtype=np.float32) < 1 / 60] = vocab_size - 1
        tokens[0] = vocab_size - 1
        write_shard(folder / name, tokens)
    # the bytes of tokens, which some losses ask for: 256 bytes, the merges and end of text
    tokenizers = {257 + merges: name for name, (_, merges) in FILES.items()}
    about = {"name": "audit", "tokenizer": tokenizers.get(vocab_size, "none"), "vocab_size": vocab_size,
             "bos": vocab_size - 1}
    files.write(folder / "corpus.json", files.json_text(about))
    return list(range(markers, vocab_size - 1))


# ----- judgement --------------------------------------------------------------------------------------------

def judge(name: str, trainings: Trainings) -> tuple[bool, str]:
    """(passed, detail) of a check. A process that fails, fails the checks that need it."""
    full = trainings.facts["full_validation_tokens"]
    if name == "validation_targets" and full != VALIDATION_TOKENS:
        return False, f"validation.tokens is {full:,} at full scale, the task has {VALIDATION_TOKENS:,}"
    of_logs = {"no_trace": no_trace, "inputs": inputs, "warm_up": warm_up, "caches": caches, "seed": seed,
               "clock": clock, "target": target}
    try:
        passed, detail = of_logs[name](trainings) if name in of_logs else trainings["model"]["checks"][name]
        for own in trainings.claimed:
            found = trainings[f"model-{own}"]["checks"] if passed and name in (*INSIDE, "seed") else {}
            wrong = [text for check, (ok, text) in found.items() if not ok and check == name]
            if wrong:
                return False, f"with seed {own} of the claim: {wrong[0]}"
        return passed, detail
    except Failed as failure:
        return False, str(failure)


def train_losses(run: dict) -> list[float]:
    """All training losses of a run, step by step."""
    return [x for e in run["curve"] for x in e["train_loss"]]


def first_difference(a: dict, b: dict) -> str:
    """Words for where two trainings part that should be the same, or ''.
    They may validate at different steps."""
    ours, theirs = ({e["step"]: e["val_loss"] for e in run["curve"]} for run in (a, b))
    for step, (x, y) in enumerate(zip([*train_losses(a), None], [*train_losses(b), None])):
        if ours.get(step, 0) != theirs.get(step, 0) and step in ours and step in theirs:
            return f"validation losses at step {step}: {ours[step]!r} and {theirs[step]!r}"
        if x != y:
            return f"training losses of step {step + 1}: {x!r} and {y!r}"
    return "" if a["stream"] == b["stream"] else f"stream digests: {a['stream']} and {b['stream']}"


def no_trace(trainings: Trainings) -> tuple[bool, str]:
    """Law: a validation changes no parameter, no state and no later loss."""
    passed, detail = trainings["model"]["checks"]["no_trace"]
    if not passed:
        return passed, detail
    difference = first_difference(trainings["plain"], trainings["often"])
    if difference:
        return False, f"trainings with a validation at every step and at the ends only differ in {difference}"
    return True, f"{detail}; a validation at every step changes no loss"


def inputs(trainings: Trainings) -> tuple[bool, str]:
    """Law: training depends on the training shards alone, and before the clock nothing depends on any."""
    model = trainings["model"]
    passed, detail = model["checks"]["inputs"]
    if not passed:
        return passed, detail
    for name, what in (("other_validation", "another validation shard"), ("other_data", "other shards")):
        if trainings[name]["first"] != model["first"]:
            return False, f"with {what} the model is another one when the clock starts"
    other = trainings["other_validation"]
    ours, theirs = (train_losses(run) for run in (model, other))
    if ours != theirs:
        step = next((i for i, (x, y) in enumerate(zip(ours, theirs), 1) if x != y),
                    min(len(ours), len(theirs)))
        return False, f"another validation shard changes the training loss of step {step}"
    if model["fixed"] != other["fixed"]:
        return False, ("the same weights give the same rows other losses where another validation shard was "
                       "validated: something of its text is kept")
    if (due := trainings.due(model)) not in ("", model["read"]):
        return False, "the steps read other tokens than the settings draw from the shards, or another order"
    detail += "; the tokens and their order are those of the settings" if due else (
        "; whether they are those of the settings is unknown: this checkout cannot read these settings")
    return True, f"{detail}; neither another validation shard nor, before the clock, other data change a bit"


def caches(trainings: Trainings) -> tuple[bool, str]:
    """Law: a run that finds what an earlier one left in its folders gives the same losses."""
    if outside := trainings["plain"].get("outside"):
        return False, (f"a run tries to write to {outside[0]}, outside of its folders, where the next one "
                       "finds it")
    difference = first_difference(trainings["plain"], trainings["second"])
    if difference:
        return False, f"a run with empty caches and one that finds its caches differ in {difference}"
    return True, "a second run that finds all that the first one wrote gives the same losses"


def warm_up(trainings: Trainings) -> tuple[bool, str]:
    """Law: the warm-up leaves nothing behind, whatever tokens it saw."""
    plain = trainings["plain"]
    for way, name in (("none", "cold"), ("one with real tokens", "real")):
        difference = first_difference(plain, trainings[name])
        if difference:
            return False, f"a warm-up with random tokens and {way} differ in {difference}"
    return True, (f"{trainings.steps} steps after none, a random and a real warm-up: all the same losses, at "
                  f"the end {plain['final']!r}")


def seed(trainings: Trainings) -> tuple[bool, str]:
    """Law: one seed gives the same losses twice, another seed (and each of the claim) other losses."""
    plain = trainings["plain"]
    difference = first_difference(plain, trainings["again"])
    if difference:
        return False, f"two trainings with seed {trainings.seed} differ in {difference}"
    runs = {trainings.seed: plain, trainings.other: trainings["model"]}
    runs |= {own: trainings[f"model-{own}"] for own in trainings.claimed}
    losses = {key: train_losses(run) for key, run in runs.items()}
    passed = len({tuple(found) for found in losses.values()}) == len(losses)
    said = "; ".join(f"with seed {key}: {found}" for key, found in losses.items())
    return passed, f"training losses {said}"


def clock(trainings: Trainings) -> tuple[bool, str]:
    """On the probe's clock each batch, step and validation takes a drawn time, from milliseconds to days: the
    logged time is exactly that of the batches and steps. Then the true clock."""
    passed, detail = drawn_time(trainings["real"], trainings.steps)
    for name in ("model", *(f"model-{own}" for own in trainings.claimed)):
        if passed:
            passed, true_time = trainings[name]["checks"]["true_time"]
            detail = f"{detail}; {true_time}" if passed else true_time
    return passed, detail


def drawn_time(run: dict, count: int) -> tuple[bool, str]:
    """(passed, detail): the logged times of a training of `count` steps on the probe's clock."""
    names = [name for name, _ in run["events"]]
    if "start" not in names:
        return False, "the trainer's clock was never started"
    timed = run["events"][names.index("start"):]
    steps = [seconds for name, seconds in timed if name == "train_step"]
    batches = [seconds for name, seconds in timed if name == "next"]
    inside = f"inside the clock: {len(batches)} batches and {len(steps)} steps of {count}"
    if (len(batches), len(steps)) != (count, count):
        return False, inside
    for event in run["curve"]:
        done, told = event["step"], event["train_time_ms"] / 1000
        least, most = sum(steps[:done]) + sum(batches[:done]), sum(steps[:done]) + sum(batches)
        if not least * (1 - 1e-9) - 2e-6 <= told <= most * (1 + 1e-9) + 2e-6:
            return False, (f"{inside}, which took {least:.6f} s up to step {done}, of which the log has "
                           f"{told:.6f} s")
    if abs(told - most) > most * 1e-9 + 2e-6:
        return False, f"{inside}, which took {most:.6f} s, of which the log has {told:.6f} s"
    return True, (f"{inside}, from {min(batches):.1g} to {max(steps):.1g} s, to the microsecond, and no "
                  "validation")


def target(trainings: Trainings) -> tuple[bool, str]:
    """Law: `reached` and the exit code say whether the final loss is at most the target."""
    details, passed = [], True
    for name, where in (("again", "at the final loss"), ("cold", "one rounding below it")):
        run = trainings[name]
        s, reached = run["summary"], run["final"] <= run["summary"]["target"]
        code = 0 if reached else 3
        passed &= s["val_loss"] == run["final"] and s["reached"] is reached and run["exit"] == code
        details.append(f"target {where} ({s['val_loss']!r} against {s['target']!r}): reached {s['reached']}, "
                       f"exit code {run['exit']}")
    return passed, "; ".join(details)
