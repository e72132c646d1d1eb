"""`python -m records audit REF`: is the code at a git ref an honest trainer? Tested in a
checkout and processes of its own.

The files of the ref are written into a temporary folder, and evidence/audit_probe.py of *this* checkout runs
there, in a fresh process per training: no network, no writing outside its folder, limited time and memory,
nothing of our environment. What is tested stands in CHECKS, what no such test can know in LIMITS.

--json: {"version", "ref", "commit" (of a folder: its HEAD, with -dirty if the files differ), "tree" (git's
hash of the audited files), "record", "scale", "passed", "checks": [{"name", "passed", "detail"}], "torch",
"confined": {"network", "writes"}, "seconds"}.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from common import arguments as numbers, environment, files, repository
from runlog import ROOT, measured
from common.errors import UserError

PASSED, FAILED, INTERRUPTED = 0, 3, 130
VERSION = 1
VALIDATION_TOKENS = 10_485_760  # the task: the first ones of the validation shard, at full scale
# the first update moves a zero-initialised head, the second the projections behind it, the third all else
STEPS = 3
NEEDED = ("train_gpt.py", "model.py", "deltas.py", "settings.py", "data/stream.py", "records")
PROBE = Path(__file__).parent / "audit_probe.py"
TRAIN_SHARD, VAL_SHARD = "audit_train_000001.bin", "audit_val_000000.bin"

CHECKS = {
    "causality": "no loss depends on a later token, on another row, or on another position's target",
    "normalisation": "exp(-loss) over all targets sums to one at every position",
    "validation_targets": "validation is the plain mean over exactly the first targets of the shard, each "
                          "once",
    "no_trace": "validation changes no parameter, buffer, gradient, optimizer state, random generator or "
                "later loss",
    "warm_up": "losses do not depend on the untimed warm-up: none, random tokens, real tokens",
    "seed": "one seed gives the same losses twice, bit for bit; another seed gives others",
    "clock": "batches and steps are inside the clock, validation is outside",
    "target": "`reached` and the exit code say whether val_loss <= target, also within one rounding of it",
}
LIMITS = """\
What an audit cannot know: whether the code behaves only while it is audited (it runs in the same
process as the probe and could forge what that finds); what only runs on a GPU, compiled, at another scale or
on several processes; work before the clock other than reading batches; whether shards are what they are
called; whether a log was written by this code (`records verify` and `records replay` look at logs)."""


def arguments(p):
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
    p.add_argument("--timeout", type=numbers.integer(1, 10**6), default=600, metavar="SECONDS",
                   help="for each process (default 600)")
    p.add_argument("--keep", action="store_true", help="keep the temporary folder and say where it is")


def run(options):
    """The command. Returns the exit code: 0 passed, 3 a check failed, 130 interrupted."""
    if options.json and options.only:
        raise UserError("--json holds a whole audit: leave --only away, or --json")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: its folder does not exist")
    environment.check_training()
    try:
        result = audit(options.ref, options.record, options.scale, options.only, options.timeout,
                       options.keep, functools.partial(print, flush=True))
    except KeyboardInterrupt:
        print("interrupted: the audit was not finished", file=sys.stderr)
        return INTERRUPTED
    if options.json:
        files.write(options.json, files.json_text(result, indent=1) + "\n", remedy="choose another --json")
    return PASSED if result["passed"] else FAILED


def audit(ref, record="short/head", scale="micro", only=(), timeout=600, keep=False, say=print):
    """Audit a ref and say how it goes, a line per check. Returns what --json holds;
    `passed` is about the checks that ran.

    UserError: unknown ref, not a checkout of this project, a record that it does not know.
    """
    began = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="audit-")).resolve()
    names = [name for name in CHECKS if not only or name in only]
    try:
        commit, tree = check_out(ref, folder)
        trainings = Trainings(folder, ref, record, scale, timeout, names)
        about, checks = trainings.facts, []
        say(f"audit of {ref}: commit {commit}, tree {tree[:12]}, {about['record']} at scale {scale}")
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

def git(*args, cwd=ROOT, **env):
    """Output of a git command, None if it fails."""
    if shutil.which("git") is None:
        raise UserError("audit needs git: install it")
    try:
        return repository.line(*args, cwd=cwd, env=env)
    except UserError:
        return None


def check_out(ref, folder):
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
        written = git("read-tree", commit, **index), git("checkout-index", "--all", f"--prefix={checkout}/",
                                                         **index)
        if None in written:
            raise UserError(f"git cannot write the files of {ref} into {folder}: is there room on the disk?")
    missing = [name for name in NEEDED if not (checkout / name).exists()]
    if missing:
        raise UserError(f"{ref} is not a checkout of this project: it has no {missing[0]}")
    return commit, tree


def copy(source, checkout, git_folder):
    """Copy a working tree: tracked and new files where git knows them, else all but caches.
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


class Trainings:
    """The processes of an audit: what the checkout resolves, and trainings,
    each started when it is first asked for."""

    def __init__(self, folder, ref, record, scale, timeout, checks):
        self.folder, self.record, self.scale, self.timeout, self.checks = (
            folder, record, scale, timeout, checks
        )
        self.done, self.torch = {}, None
        try:
            self.facts = self.start("facts", "facts")
        except Failed as failure:
            raise UserError(f"{ref}: its settings cannot be resolved: {failure}") from None
        if "refused" in self.facts:
            raise UserError(f"{ref}: {self.facts['refused']}")
        self.data = folder / "data"
        full = max(VALIDATION_TOKENS,
                   self.facts["full_validation_tokens"]) if "validation_targets" in checks else 0
        write_corpus(self.data, self.facts, max(full, self.facts["validation_tokens"]) + 4097)

    def start(self, name, job, **spec):
        """Run a job of the probe in its own process, confined to its own folder. Returns its result;
        raises Failed."""
        folder = self.folder / name
        folder.mkdir()
        files.write(
            folder / "spec.json",
            files.json_text(
                {
                    "job": job, "checkout": str(self.folder / "checkout"), "auditor": str(ROOT),
                    "record": self.record, "scale": self.scale, "seconds": self.timeout, **spec
                }
            ),
        )
        environment = {"PATH": os.defpath, "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8",
                       "SPEEDRUN_CACHE": str(folder), "CUDA_VISIBLE_DEVICES": "",
                       "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with open(folder / "output.txt", "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B",
                 str(PROBE), str(folder / "spec.json")], cwd=folder, env=environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                raise Failed(f"the {name} process did not end in {self.timeout} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):  # what it started goes too
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        try:
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            result = {"exit": process.returncode}
        if result.get("exit", 0) not in (0, 3):  # 3: a target was missed
            lines = (folder / "output.txt").read_text(
                encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
            raise Failed(f"the {name} process exits with {result['exit']}: {lines[-1][-300:]}")
        return result

    def __getitem__(self, name):
        """What a training logged and returned (see read_run and train)."""
        if name not in self.done:
            try:
                self.done[name] = self.train(name)
            except Failed as failure:
                self.done[name] = failure
        if isinstance(self.done[name], Failed):
            raise self.done[name]
        return self.done[name]

    def train(self, name):
        """One of the short trainings that are compared: equal but for what must not matter;
        `model` has another seed."""
        f, seed, sets, job, spec = self.facts, 0, [], "script", {}
        rows = 8 * f["validation_seq_len"]
        tokens = math.ceil(1024 / rows) * rows  # few: most of them look at training
        if name == "again":  # the loss is the target: reached
            sets = [f"validation.target={self['plain']['final']!r}"]
        elif name == "cold":  # the next number below it: missed
            below = math.nextafter(self["plain"]["final"], -math.inf)
            sets = ["system.warmup_steps=0", f"validation.target={below!r}"]
        elif name == "often":
            sets = ["validation.every=1"]
        elif name == "real":
            sets, job = ["system.warmup_tokens=real"], "clock"
        elif name == "model":
            seed, tokens, job = 1, f["validation_tokens"], "model"
            counted = self.argv("model/counted", 0, 1, f["full_validation_tokens"], ["system.warmup_steps=0"])
            spec = {
                **f, "bos": f["vocab_size"] - 1, "checks": self.checks,
                "val_shard": str(self.data / VAL_SHARD), "counted_argv": counted
            }
        done = self.start(name, job, argv=self.argv(f"{name}/runs", seed, STEPS, tokens, sets), **spec)
        if "refused" in done:
            raise Failed(f"the {name} training: {done['refused']}")
        self.torch = done["torch"]
        return {**done, **read_run(self.folder / name / "runs")}

    def argv(self, out, seed, steps, tokens, sets):
        """Command line of a training by train_gpt.py."""
        sets = [
            "system.device=cpu", "system.compile=off", f"schedule.steps={steps}",
            f"validation.tokens={tokens}", *self.facts["sets"], *sets
        ]
        return [self.record, "--scale", self.scale, "--seed", str(seed), "--data", str(self.data),
                "--out", str(self.folder / out), *(x for path in sets for x in ("--set", path))]


def read_run(out):
    """Curve, stream digest and summary of the one run under a folder."""
    try:
        folder, = (p.parent for p in files.listed(out, "*/run.jsonl"))
        events = [
            measured(json.loads(line))
            for line in (folder / "run.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        curve = [e for e in events if e["kind"] == "validation"]
        streams = [e["digest"] for e in events if e["kind"] == "stream"]
        return {"curve": curve, "stream": streams, "final": curve[-1]["val_loss"],
                "summary": json.loads((folder / "summary.json").read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise Failed(
            f"the log of the {out.parent.name} training cannot be read: {type(error).__name__}: {error}"
        ) from None


def write_corpus(folder, facts, validation_tokens):
    """Shards of random text for the trainings: documents of about 60 tokens,
    frequencies falling like the inverse rank.

    They are the auditor's, so that it knows every token.
    """
    import numpy as np

    from data.shards import write_shard
    folder.mkdir()
    generator, vocab_size = np.random.default_rng(20240520), facts["vocab_size"]
    # as long as validation, so that one that reads training tokens is told so, not that they are too few
    trained = max(8 * facts["tokens_per_rank"] * 64, validation_tokens)
    for name, count in (TRAIN_SHARD, trained), (VAL_SHARD, validation_tokens):
        tokens = (vocab_size ** generator.random(count, dtype=np.float32)).astype(np.uint16) - 1
        tokens[generator.random(count, dtype=np.float32) < 1 / 60] = vocab_size - 1
        tokens[0] = vocab_size - 1
        write_shard(folder / name, tokens)
    about = {"name": "audit", "tokenizer": "none", "vocab_size": vocab_size, "bos": vocab_size - 1}
    files.write(folder / "corpus.json", files.json_text(about))


# ----- judgement --------------------------------------------------------------------------------------------

def judge(name, trainings):
    """(passed, detail) of a check. A process that fails, fails the checks that need it."""
    full = trainings.facts["full_validation_tokens"]
    if name == "validation_targets" and full != VALIDATION_TOKENS:
        return False, f"validation.tokens is {full:,} at full scale, the task has {VALIDATION_TOKENS:,}"
    try:
        of_logs = {"no_trace": no_trace, "warm_up": warm_up, "seed": seed, "clock": clock, "target": target}
        return of_logs[name](trainings) if name in of_logs else tuple(trainings["model"]["checks"][name])
    except Failed as failure:
        return False, str(failure)


def train_losses(run):
    """All training losses of a run, step by step."""
    return [x for e in run["curve"] for x in e["train_loss"]]


def first_difference(a, b):
    """Words for where two trainings part that should be the same, or ''.
    They may validate at different steps."""
    ours, theirs = ({e["step"]: e["val_loss"] for e in run["curve"]} for run in (a, b))
    for step, (x, y) in enumerate(zip([*train_losses(a), None], [*train_losses(b), None])):
        if ours.get(step, 0) != theirs.get(step, 0) and step in ours and step in theirs:
            return f"validation losses at step {step}: {ours[step]!r} and {theirs[step]!r}"
        if x != y:
            return f"training losses of step {step + 1}: {x!r} and {y!r}"
    return "" if a["stream"] == b["stream"] else f"stream digests: {a['stream']} and {b['stream']}"


def no_trace(trainings):
    """Law: a validation changes no parameter, no state and no later loss."""
    passed, detail = trainings["model"]["checks"]["no_trace"]
    if not passed:
        return passed, detail
    difference = first_difference(trainings["plain"], trainings["often"])
    if difference:
        return False, f"trainings with a validation at every step and at the ends only differ in {difference}"
    return True, f"{detail}; a validation at every step changes no loss"


def warm_up(trainings):
    """Law: the warm-up leaves nothing behind, whatever tokens it saw."""
    plain = trainings["plain"]
    for way, name in (("none", "cold"), ("one with real tokens", "real")):
        difference = first_difference(plain, trainings[name])
        if difference:
            return False, f"a warm-up with random tokens and {way} differ in {difference}"
    return True, (f"{STEPS} steps after none, a random and a real warm-up: all the same losses, at the end "
                  f"{plain['final']!r}")


def seed(trainings):
    """Law: one seed gives the same losses twice, another seed other losses."""
    plain = trainings["plain"]
    difference = first_difference(plain, trainings["again"])
    if difference:
        return False, f"two trainings with seed 0 differ in {difference}"
    zero, one = train_losses(plain), train_losses(trainings["model"])
    return zero != one, f"training losses with seed 0, twice: {zero}; with seed 1: {one}"


def clock(trainings):
    """On the probe's clock batches take 10^3 s, steps 10^6 s and validations 10^9 s:
    the logged time tells what it holds."""
    total = trainings["real"]["curve"][-1]["train_time_ms"] / 1000
    validations, steps, batches = total // 1e9, total % 1e9 // 1e6, total % 1e6 // 1e3
    return batches >= STEPS and steps == STEPS and validations == 0, (
        f"inside the clock: {batches:.0f} batches and {steps:.0f} steps of {STEPS}, and {validations:.0f} "
        "validations")


def target(trainings):
    """Law: `reached` and the exit code say whether the final loss is at most the target."""
    details, passed = [], True
    for name, where in (("again", "at the final loss"), ("cold", "one rounding below it")):
        run = trainings[name]
        s, reached = run["summary"], run["final"] <= run["summary"]["target"]
        passed &= s["val_loss"] == run["final"] and s["reached"] is reached and run["exit"] == (0 if reached
                                                                                                else 3)
        details.append(f"target {where} ({s['val_loss']!r} against {s['target']!r}): reached {s['reached']}, "
                       f"exit code {run['exit']}")
    return passed, "; ".join(details)
