"""`python -m records referee TASK CANDIDATE`: one JSON verdict on a program's candidate for a task.

The candidate is data until it runs: its tree is read file by file, what the task lets it change is laid over
the task's own sources in a private folder, and only that is audited and trained, in the sandbox
(common/sandbox.py). Seeds are drawn by the referee and kept from the candidate's author; the references
(parent and goal) are trained on the same seeds, once, and kept with them. Time is what passes here, between
the arrival of the log's line `reset` and of its line `end`.

Exit codes: 0 a valid candidate, 1 an invalid one (the verdict says why), 2 bad input, 130 interrupted.
The verdict's fields are in docs/referee.md. No torch here.
"""

import argparse
import contextlib
import datetime
import fnmatch
import functools
import json
import os
import re
import resource
import secrets
import shutil
import statistics as plain
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import runlog
from common import arguments as numbers, environment, files, sandbox, untrusted
from common.errors import UserError
from data.corpus import sample_corpus
from evidence import arms, audit, compare, task
from evidence.statistics import difference
from runlog import ROOT
from settings import deltas, schema

VERSION = 1
DONE, INVALID, INTERRUPTED = 0, 1, 130
LIMITS = untrusted.Limits(entries=2_000, depth=8, file=16 * 2 ** 20, total=64 * 2 ** 20)  # of a candidate
MEMORY_MIB = {"micro": 4096, "mini": 8192, "tiny": 8192, "small": 65_536, "full": 131_072}
MARGIN = 0.002  # nats by which a loss may be worse where time is measured and the scale has no target
SLOWEST = 3.0  # times the parent's wall time that a run may take, and a minute
WATCH_S = 0.02  # how often the log is looked at from outside
CLAIMED_SLACK_S = 1.0  # by which the claimed time may pass the outside one: a log line arrives a little late
CHECKS = ()  # of the audit; none named: all
CONFIDENCE = 0.95


def arguments(p: argparse.ArgumentParser) -> None:
    """Options of `records referee`."""
    p.add_argument("task", metavar="TASK", help="a folder that `records task` wrote")
    p.add_argument("candidate", metavar="CANDIDATE", help="a folder like TASK/candidate, edited")
    p.add_argument("--fresh", action="store_true",
                   help="draw new seeds, and train the references on them again")
    p.add_argument("--timeout", type=numbers.integer(1, 10**6), metavar="SECONDS",
                   help=f"for each run (default: {SLOWEST:g} times the parent's and a minute; a day for the "
                   "references)")


def run(options: argparse.Namespace) -> int:
    """The command: the verdict goes to stdout, what happens meanwhile to stderr. Returns the exit code."""
    about = read_task(Path(options.task))
    environment.check_training()
    say = functools.partial(print, file=sys.stderr, flush=True)
    try:
        verdict = judge(about, Path(options.candidate), options.fresh, options.timeout, say)
    except KeyboardInterrupt:
        print("interrupted: there is no verdict", file=sys.stderr)
        return INTERRUPTED
    print(files.json_text(verdict, indent=1))
    return DONE if verdict["valid"] else INVALID


class Invalid(Exception):
    """Why a candidate is invalid, in one line."""


def judge(
    about: dict, candidate: Path, fresh: bool = False, timeout: int | None = None,
    say: Callable[[str], None] = lambda line: None
) -> dict:
    """The verdict on a candidate folder for a task (the dict of task.json)."""
    if not candidate.is_dir():
        raise UserError(f"{candidate}: no such folder")
    began, used = time.monotonic(), Cost()
    memory = Memory(about, fresh)
    told = ("parent", "goal", "next", "head", "open", "scale", "steps", "measure", "seeds", "hints")
    verdict = {
        "version": VERSION, "task": {key: about[key] for key in told},
        "valid": False, "why": [], "score": None, "resolved": None, "interval": None, "way": None,
        "loss": None, "time": None, "candidate": None, "audit": "not needed: no code was changed",
        "attempt": memory.count(), "contamination": None, "sandbox": sandbox.walls(),
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            place, changed, declared = admit(about, candidate, Path(folder))
            verdict["candidate"] = {"changed": changed, "tree": tree_of(place)}
            verdict["contamination"] = contamination(about, declared)
            verdict["candidate"] |= settings_of(about, place)
            if set(changed) - {task.RECORD_TOML, task.ABOUT}:
                verdict["audit"] = audited(about, place, memory.seeds, say)
            arms_of = references(about, memory, Path(folder), timeout, say)
            limit = timeout or SLOWEST * max(r["wall_s"] for r in arms_of["parent"]) + 60
            arms_of["candidate"] = [
                train(about, "candidate", place, task.CANDIDATE, seed, Path(folder), limit, say)
                for seed in memory.seeds
            ]
            check_runs(about, arms_of, verdict["candidate"]["ml_hash"])
            verdict |= {"valid": True, **scored(about, arms_of)}
        except Invalid as reason:
            verdict["why"].append(str(reason))
    wall_s = round(time.monotonic() - began, 1)
    on_gpu = about["scale"] in ("small", "full") and arms.cuda_works()
    verdict["cost"] = {"cpu_s": used.cpu_s(), "gpu_s": wall_s if on_gpu else 0.0, "wall_s": wall_s}
    memory.keep_verdict(verdict)
    return verdict


# ----- the task and what the referee remembers --------------------------------------------------------------

def read_task(folder: Path) -> dict:
    """task.json of a folder, checked against the present sources."""
    path = folder / "task.json"
    about = untrusted.json_file(path)
    if not isinstance(about, dict) or set(task.FIELDS) ^ set(about) or about["version"] != task.VERSION:
        raise UserError(f"{path}: not a task of this version; write one with `records task`")
    own, told = task.sources(deltas.find_record(about["parent"])), about["files"]
    now = {name: task.digest(data) for name, data in own.items()}
    if now != told:
        other = sorted(name for name in {**now, **told} if now.get(name) != told.get(name))
        raise UserError(f"{path}: written from other sources ({other[0]}): check out {about['code'][:12]}, "
                        "or write the task again")
    return about


class Memory:
    """What the referee keeps about a task: its hidden seeds, the references' runs and the verdicts so far."""

    def __init__(self, about: dict, fresh: bool) -> None:
        where = [about, runlog.machine(), os.environ.get("OMP_NUM_THREADS")]
        key = task.digest(files.json_text(where).encode())
        self.path = arms.cache() / "referee" / f"{key[:16]}.json"
        self.content = {"seeds": [], "runs": {}, "verdicts": []}
        with contextlib.suppress(OSError, ValueError):
            self.content = json.loads(audit.read_back(self.path))
        if fresh or not self.content["seeds"]:
            # never one that a person would try
            drawn = [secrets.randbelow(2 ** 31 - 10_000) + 10_000 for _ in range(about["seeds"])]
            self.content |= {"seeds": drawn, "runs": {}}
        self.write()

    @property
    def seeds(self) -> list[int]:
        return self.content["seeds"]

    def runs(self, name: str) -> list[dict] | None:
        """Runs of a reference, one for each seed, or None."""
        return self.content["runs"].get(name)

    def keep_runs(self, name: str, runs: list[dict]) -> None:
        self.content["runs"][name] = runs
        self.write()

    def count(self) -> int:
        """Number of the present attempt on this task: a choice among many is a search on the same seeds."""
        return len(self.content["verdicts"]) + 1

    def keep_verdict(self, verdict: dict) -> None:
        self.content["verdicts"].append({k: verdict[k] for k in ("valid", "score", "why")})
        self.write()

    def write(self) -> None:
        """Only this user may read the seeds."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.parent.chmod(0o700)
        files.write(self.path, files.json_text(self.content, indent=1) + "\n", remedy="set SPEEDRUN_CACHE")


class Cost:
    """CPU time of all processes that a verdict needed."""

    def __init__(self):
        self.began = self.now()

    @staticmethod
    def now() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(x.ru_utime + x.ru_stime for x in both)

    def cpu_s(self) -> float:
        return round(self.now() - self.began, 2)


# ----- admission: the candidate is data ---------------------------------------------------------------------

def admit(about: dict, candidate: Path, folder: Path) -> tuple[Path, list[str], dict]:
    """(private folder of the code to run, changed paths, candidate.json) of a candidate, or Invalid."""
    place, changed = folder / "code", []
    given = read_tree(candidate, folder / "given")
    own = task.sources(deltas.find_record(about["parent"]))
    for name in sorted({**given, **own}):
        if given.get(name) == own.get(name):
            continue
        if not any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
                   for pattern in task.EDITABLE):
            raise Invalid(f"{name} is not among the files that may change")
        changed.append(name)
    for name, data in {**own, **given}.items():
        if name in given:
            files.write(place / name, data, parents=True)
    return place, changed, declaration(given, about)


def read_tree(root: Path, place: Path) -> dict[str, bytes]:
    """{path: bytes} of a folder, read through a private copy; Invalid unless it holds plain files and folders
    within LIMITS, and nothing is followed."""
    try:
        untrusted.copy(root, place, LIMITS, leave=lambda path: "__pycache__" in path.split("/"))
    except UserError as error:
        raise Invalid(str(error).replace(str(root), "candidate")) from None
    return {str(path.relative_to(place)): path.read_bytes() for path in files.listed(place, "**/*")
            if path.is_file()}


def declaration(given: dict[str, bytes], about: dict) -> dict:
    """candidate.json: {"knowledge": date or ""}; checks record.toml's parent as well."""
    try:
        declared = untrusted.json_value(given.get(task.ABOUT, b"{}").decode(), task.ABOUT)
        knowledge = declared.get("knowledge", "")
        if set(declared) - {"knowledge", "name"}:
            raise ValueError
        if knowledge:
            datetime.date.fromisoformat(knowledge)
    except (UserError, ValueError, TypeError, AttributeError):
        expected = '{"knowledge": "YYYY-MM-DD"}, and a "name" if wanted'
        raise Invalid(f"{task.ABOUT}: expected {expected}") from None
    try:
        text = given.get(task.RECORD_TOML, b"").decode()
        parent = untrusted.toml_value(text, task.RECORD_TOML).get("parent")
    except (UserError, ValueError) as error:
        raise Invalid(f"{task.RECORD_TOML} cannot be read: {error}") from None
    if parent != about["parent"]:
        raise Invalid(f"{task.RECORD_TOML} has the parent {parent!a}, the task starts at {about['parent']}")
    return declared


def tree_of(place: Path) -> str:
    """One hash over all files that run."""
    parts = [f"{p.relative_to(place)} {task.digest(p.read_bytes())}" for p in files.listed(place, "**/*")
             if p.is_file()]
    return task.digest("\n".join(parts).encode())


def contamination(about: dict, declared: dict) -> dict:
    """Dates of the transitions against the declared knowledge. The vocabulary of settings is open to all."""
    knowledge = declared.get("knowledge", "")
    known = [ref for ref, date in about["dates"].items() if knowledge and date <= knowledge]
    return {"knowledge": knowledge or None, "dates": about["dates"],
            "published_before": known if knowledge else None, "vocabulary": True}


def settings_of(about: dict, place: Path) -> dict:
    """{ml_hash} of what the candidate's own code resolves, in the sandbox; Invalid against the rules."""
    words = [task.CANDIDATE, "--scale", about["scale"], *set_words(about)]
    done = sandbox.run([sys.executable, "-B", "-c", arms.PROBE, *words], cwd=place, seconds=120,
                       memory_mib=2048)
    try:
        found = json.loads(done.stdout)
        theirs, ml_hash = found["settings"], found["ml_hash"]
        ours = schema.plain(deltas.resolve(about["parent"], scale=about["scale"],
                                           sets=task.budget(about["steps"])).settings)
        moved = [key for key, value in ours["validation"].items() if theirs["validation"].get(key) != value]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit {done.returncode}"]
        raise Invalid(f"its settings cannot be resolved: {lines[-1].removeprefix('error: ')[:300]}") from None
    if moved:
        raise Invalid(f"it changes validation.{moved[0]}, which belongs to the task")
    return {"ml_hash": ml_hash}


def set_words(about: dict) -> list[str]:
    """The trainer's --set words of a task's budget."""
    return [word for line in task.budget(about["steps"]) for word in ("--set", line)]


def audited(about: dict, place: Path, seeds: list[int], say: Callable[[str], None]) -> str:
    """Words for a passed audit of changed code; Invalid with the first failed test."""
    scale = about["scale"] if about["scale"] in ("micro", "tiny") else "micro"
    result = audit.audit(str(place), task.CANDIDATE, scale, only=CHECKS, say=say, seeds=seeds)
    failed = [c for c in result["checks"] if not c["passed"]]
    if failed:
        raise Invalid(f"the audit of its code fails ({failed[0]['name']}): "
                      f"{without_seeds(failed[0]['detail'], seeds)}")
    return f"passed: {', '.join(c['name'] for c in result['checks'])}"


def without_seeds(text: str, seeds: list[int]) -> str:
    """A text in which the hidden seeds cannot be read."""
    for seed in seeds:
        text = text.replace(str(seed), "(hidden)")
    return text


# ----- runs -------------------------------------------------------------------------------------------------

def references(
    about: dict, memory: Memory, folder: Path, timeout: int | None, say: Callable[[str], None]
) -> dict[str, list[dict]]:
    """{parent, goal: runs} on the task's seeds, trained if they are not known yet."""
    for name in ("parent", "goal"):
        if memory.runs(name) is None:
            runs = []
            for seed in memory.seeds:
                try:
                    runs.append(train(about, name, ROOT, about[name], seed, folder, timeout or 86_400, say))
                except Invalid as error:
                    raise UserError(f"the reference {about[name]} cannot be trained: {error}") from None
            memory.keep_runs(name, runs)
    return {name: memory.runs(name) for name in ("parent", "goal")}


def train(
    about: dict, name: str, place: Path, record: str, seed: int, folder: Path, limit: float,
    say: Callable[[str], None]
) -> dict:
    """One run in the sandbox, timed from outside. Returns {loss, curve, tokens, outside_s, claimed_s, wall_s,
    cpu_s, ml_hash, val_digest, steps}."""
    out = folder / f"{name}-{secrets.token_hex(4)}"
    (out / "cache").mkdir(parents=True)
    data = compare.locate({"data": about["data"], "scale": about["scale"]}, None)
    data = data or sample_corpus(arms.cache()).folder  # made once: a cache that a run cannot write to
    threads = os.environ.get("OMP_NUM_THREADS", "")
    words = [sys.executable, "-B", str(place / "train_gpt.py"), record, "--scale", about["scale"], "--seed",
             str(seed), "--out", str(out / "runs"), *set_words(about), "--data", str(data)]
    cost, watch = Cost(), Watch(out / "runs")
    try:
        done = sandbox.run(
            words, cwd=place, readable=[data], writable=[out], seconds=limit,
            memory_mib=MEMORY_MIB[about["scale"]],
            env={"SPEEDRUN_CACHE": str(out / "cache")} | ({"OMP_NUM_THREADS": threads} if threads else {}))
    finally:
        watch.end()
    if done.timed_out:
        raise Invalid(f"a run did not end in {limit:.0f} s")
    if done.returncode not in (0, 3):  # 3: a target was missed
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit {done.returncode}"]
        raise Invalid(f"a run ends with {done.returncode}: {without_seeds(lines[-1][:300], [seed])}")
    result = {**read_run(watch.log), **watch.times(), "cpu_s": cost.cpu_s()}
    if result.pop("seed") != seed:
        raise Invalid("a run was made with another seed than it was given")
    shutil.rmtree(out, ignore_errors=True)
    say(f"{name}: loss {result['loss']:.4f}, {result['outside_s']:.1f} s outside, "
        f"{result['cpu_s']:.1f} s of CPU")
    return result


class Watch:
    """Looks at a run's log from outside and notes when its lines `reset` and `end` arrive."""

    def __init__(self, runs: Path) -> None:
        self.runs, self.log, self.seen, self.began = runs, None, {}, time.monotonic()
        self.ended, self.stop, self.read = None, threading.Event(), 0
        self.thread = threading.Thread(target=self.follow, daemon=True)
        self.thread.start()

    def follow(self) -> None:
        """Look until told to stop, and once more."""
        while not self.stop.wait(WATCH_S):
            self.look()
        self.look()

    def look(self) -> None:
        """Note the kinds of complete new lines. A log is a regular file of bounded size, or none."""
        try:
            if self.log is None:
                logs = files.listed(self.runs, "*/run.jsonl")
                self.log = logs[0] if len(logs) == 1 else None
            size = os.lstat(self.log).st_size if self.log else 0
            if size == self.read:
                return
            data = audit.read_back(self.log)
        except OSError:
            return
        for line in data[:data.rfind(b"\n") + 1].splitlines():
            found = re.search(rb'"kind": ?"(reset|end)"', line)
            if found:
                self.seen.setdefault(found[1].decode(), time.monotonic())
        self.read = size

    def end(self) -> None:
        """The run's processes have ended."""
        self.ended = time.monotonic()
        self.stop.set()
        self.thread.join()

    def times(self) -> dict[str, float]:
        """{outside_s: from reset to end, wall_s: of the whole run}, or Invalid."""
        if "reset" not in self.seen or self.log is None:
            raise Invalid("a run wrote no complete log")
        return {"outside_s": round(self.seen.get("end", self.ended) - self.seen["reset"], 3),
                "wall_s": round(self.ended - self.began, 3)}


def read_run(path: Path | None) -> dict:
    """Loss, curve, tokens and identity of a run's log, whose chain holds; Invalid otherwise."""
    if path is None:
        raise Invalid("a run wrote no log, or more than one")
    try:
        audit.read_back(path)  # a regular file of bounded size
        events = runlog.read_chain(path)
        start, end = events[0], events[-1]
        curve = [[e["step"], float(e["val_loss"])] for e in events if e["kind"] == "validation"]
        if end["kind"] != "end" or end["status"] != "finished" or not all(0 < loss < 20 for _, loss in curve):
            raise Invalid("a run did not finish with losses between 0 and 20")
        if end["val_loss"] != curve[-1][1]:
            raise Invalid("the end of a log repeats another loss than its last validation")
        return {
            "loss": curve[-1][1], "curve": curve, "tokens": int(end["tokens"]), "steps": int(end["steps"]),
            "claimed_s": round(float(end["train_time_ms"]) / 1000, 3), "seed": start["seed"],
            "ml_hash": start["ml_hash"], "val_digest": start["val_digest"], "scale": start["scale"],
            "corpus_digest": start["corpus_digest"], "numerics": start["numerics_version"],
        }
    except (OSError, UserError) as error:
        raise Invalid(f"the log of a run cannot be read: {str(error).rpartition('/')[2]}") from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise Invalid("the log of a run lacks what a log must have") from None


def check_runs(about: dict, found: dict[str, list[dict]], ml_hash: str) -> None:
    """Invalid if the candidate's runs do not compare with the parent's."""
    for run, parent in zip(found["candidate"], found["parent"]):
        for key, words in (("val_digest", "another validation shard"), ("scale", "another scale"),
                           ("corpus_digest", "another corpus"), ("numerics", "another numerics version")):
            if run[key] != parent[key]:
                raise Invalid(f"a run has {words} than the parent's")
        if run["ml_hash"] != ml_hash:
            raise Invalid("a run logged other settings than its record resolves to")
        if about["measure"] == "loss" and run["tokens"] > parent["tokens"]:
            raise Invalid(f"a run trained on {run['tokens']:,} tokens, the budget is {parent['tokens']:,}")
        if run["claimed_s"] > run["outside_s"] + CLAIMED_SLACK_S:
            raise Invalid(f"a run claims {run['claimed_s']:.1f} s of training, outside passed "
                          f"{run['outside_s']:.1f} s")
        if run["curve"][0][0] != 0 or [s for s, _ in run["curve"]][-1] != run["steps"]:
            raise Invalid("a run did not validate at its first and last step")


# ----- the score --------------------------------------------------------------------------------------------

def scored(about: dict, found: dict[str, list[dict]]) -> dict:
    """Score, interval, way, loss and time of valid runs."""
    key = {"loss": "loss", "time": "outside_s"}[about["measure"]]
    parent, goal, mine = ([r[key] for r in found[name]] for name in ("parent", "goal", "candidate"))
    score, interval, resolved = recovered(parent, goal, mine)
    if about["measure"] == "time" and (worse := too_high(found)):
        score, interval, resolved = 0.0, None, worse
    runs = found["candidate"]
    reached = [steps_to(r["curve"], p["loss"]) for r, p in zip(runs, found["parent"])]

    def against(key):
        """The candidate's summary of a value against the parent's, and the goal's mean."""
        theirs = [r[key] for r in found["parent"]]
        return {**summary([r[key] for r in runs], theirs), "goal": plain.fmean(r[key] for r in found["goal"])}

    loss, seconds = against("loss"), against("outside_s")
    return {
        "score": score, "interval": interval, "resolved": resolved, "way": way(about, score),
        "loss": loss | {"steps_to_parent_loss": plain.fmean(reached), "steps": runs[0]["steps"]},
        "time": seconds | {"claimed": plain.fmean(r["claimed_s"] for r in runs)},
    }


def recovered(
    parent: list[float], goal: list[float], mine: list[float], confidence: float = CONFIDENCE
) -> tuple[float | None, list[float] | None, str]:
    """(share of the goal's improvement on the parent, its interval or None, whether it is resolved) of values
    by seed, the smaller the better.

    Fieller's interval of a ratio of paired means. Without a positive improvement of the goal that is resolved
    there is no score, unless the candidate's runs are those of the parent (0) or of the goal (1), bit for
    bit.
    """
    if mine == parent:
        return 0.0, [0.0, 0.0], "the candidate's runs are those of the parent, bit for bit"
    if mine == goal:
        return 1.0, [1.0, 1.0], "the candidate's runs are those of the goal, bit for bit"
    from scipy import stats
    n = len(parent)
    gains, full = [p - m for p, m in zip(parent, mine)], [p - g for p, g in zip(parent, goal)]
    g, f = plain.fmean(gains), plain.fmean(full)
    t2 = float(stats.t.ppf((1 + confidence) / 2, n - 1)) ** 2 / n
    cov = sum((a - g) * (b - f) for a, b in zip(gains, full)) / (n - 1)
    a, b, c = f * f - t2 * plain.variance(full), g * f - t2 * cov, g * g - t2 * plain.variance(gains)
    if a <= 0 or f <= 0:
        return None, None, (f"no: on these {n} seeds the goal improves on the parent by {f:.4g} +- "
                            f"{(t2 * plain.variance(full)) ** 0.5:.2g}, which is not above zero")
    root = max(0.0, b * b - a * c) ** 0.5
    return g / f, [(b - root) / a, (b + root) / a], "yes"


def too_high(found: dict[str, list[dict]]) -> str:
    """Words if the candidate's loss is not shown to be within the margin of the parent's, otherwise ''."""
    mine, parents = ([r["loss"] for r in found[name]] for name in ("candidate", "parent"))
    if mine == parents:
        return ""
    high = difference(mine, parents, paired=True)["high"]
    if high is not None and high <= MARGIN:
        return ""
    most = "by any amount" if high is None else f"by {high:.4f}"
    return f"no: its loss may be above the parent's {most} (95 % interval), {MARGIN} is allowed"


def way(about: dict, score: float | None) -> dict[str, float] | None:
    """{next, head}: shares of the way to the next record and to the head, in published minutes.

    The share of the goal's way that was recovered, taken as a share of the published minutes between the
    parent and the goal.
    """
    minutes = about["minutes"]
    parent, goal = minutes[about["parent"]], minutes[about["goal"]]
    if score is None or not parent or not goal or parent <= goal:
        return None
    return {name: score * (parent - goal) / (parent - minutes[about[name]])
            for name in ("next", "head") if minutes[about[name]] and minutes[about[name]] < parent}


def summary(values: list[float], parents: list[float]) -> dict:
    """Mean, values' spread, and the difference from the parent's with its paired interval."""
    found = {"mean": plain.fmean(values), "sd": plain.stdev(values), "parent": plain.fmean(parents)}
    if values == parents:
        return found | {"difference": 0.0, "interval": [0.0, 0.0]}
    gap = difference(values, parents, paired=True)
    return found | {"difference": gap["estimate"], "interval": [gap["low"], gap["high"]]}


def steps_to(curve: list[list[float]], loss: float) -> float:
    """Step at which a curve first reaches a loss, linear between validations; its last step if never."""
    step = runlog.crossing(curve, loss)
    return float(curve[-1][0]) if step is None else step
