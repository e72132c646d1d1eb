"""The laws of a claim: its manifest, and its runs against the manifest and against each other.

    DIR/manifest.jsonl   the plan, declared before the first run, and every run (evidence.manifest)
    DIR/runs/            a folder per run (evidence.run_laws), and the sources they ran, once per content
    DIR/record.toml      the record that is claimed, where it is new

`examine` reads all of it and returns everything that is wrong, one line each. Nothing of a submission is
executed: logs, settings and sources are data. Where runs come from (settings, code, tokens) is the business
of evidence.provenance.
"""

import collections
import fnmatch
import itertools
import json
import re
import statistics as middle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import runlog
from common import files, untrusted
from common.errors import UserError
from evidence import (
    arms, compare, fact_laws, ledger, manifest, off_clock, plausible,
    provenance, run_laws, textlog
)
from evidence.claim_folder import Evidence
from evidence.manifest import CLOCK_S, moment
from evidence.run_laws import alike
from settings.scales import SCALES

# what start and warm-up of like runs may differ by beyond run_laws.LONGER: disks and compilers vary
START_MS = 60_000.0
# what two runs of one seed may differ by in a validation: the order of sums alone, which a GPU may change
RERUN_NATS = 0.05
UNACCOUNTED_S = 10.0  # what starting and ending a process may differ by between arms, beyond LONGER times
RUN = ("run.jsonl", "log.txt", "summary.json", "compile_error.txt")  # files of a run folder
# What a claim folder may hold next to its runs, and the files of its folders. A record has its published
# curve and its runs of other scales there too.
FILES = (manifest.NAME, ledger.NAME, "record.toml", "code.diff", "results.json", "README.md", "audit.json",
         "reference.csv")
FOLDERS = {"runs": (*RUN, "sources-*.txt", "sources-*.txt.xz"), "reproduction": (),
           "upstream": ("*.txt", "README.md", "statistics.md"), **dict.fromkeys(SCALES, RUN)}
MOST_ALPHA, MOST_MARGIN = 0.01, 0.002  # of a record: the speedrun's p < 0.01; nats


def examine(folder: Path | str) -> Evidence:
    """Evidence of a claim folder with all its problems. UserError if the folder is no claim at all."""
    folder = Path(folder)
    require_claim(folder)
    found, dates, whole = read_manifest(folder)
    logs = read_runs(found)
    for log in logs.values():
        if log is not None:
            found.problems += run_laws.check_run(log)
    if not whole:  # what is registered cannot be told
        return found
    found.problems += check_dates(dates)
    found.problems += match(found, logs)
    for run in found.claim.runs:
        script = found.declaration["arms"][run.arm]["kind"] == "script"
        found.problems += (check_script_run if script else check_registered)(found, run)
    for name, arm in found.declaration["arms"].items():
        found.problems += provenance.check_arm(found, name, arm)
    found.problems += check_plan(found)
    found.problems += check_alike(found)
    found.problems += fact_laws.check(found)
    found.problems += check_untimed(found)
    found.problems += check_unaccounted(found)
    found.problems += off_clock.check(found)
    found.problems += provenance.check_corpus(found)
    found.problems += check_copies(found)
    found.problems += check_reruns(found)
    found.problems += plausible.check(found)
    found.problems += plausible.check_calendar(found, told(dates))
    found.problems += check_artefacts(found)
    found.problems += provenance.check_diff(found)
    found.problems += ledger.check(found)
    check = check_comparison if found.declaration["claim"] == "comparison" else check_record_claim
    found.problems += check(found)
    return found


def require_claim(folder: Path) -> None:
    """UserError if a folder holds no claim, with what it seems to be instead."""
    if folder.is_file():
        raise UserError(f"{folder}: a single file: name the folder that holds it")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not files.listed(folder):
        raise UserError(f"{folder}: the folder is empty; a claim holds {manifest.NAME} and runs/")
    if not (folder / manifest.NAME).exists():
        why = f"it has no {manifest.NAME}; `records submit` and `records compare` write one"
        if (folder / "run.jsonl").exists():
            why = "a single run is evidence only as part of a claim"
        elif files.listed(folder, "*.log"):
            why = "its files end in .log, and text logs end in .txt: rename them"
        raise UserError(f"{folder}: not a claim folder: {why}")


# ----- manifest and folders ---------------------------------------------------------------------------------

def read_manifest(folder: Path) -> tuple[Evidence, list[tuple[int, str, Any]], bool]:
    """(Evidence with the claim so far and its first problem, [(line, kind, utc)],
    whether all of it was readable)."""
    path, dates = folder / manifest.NAME, []
    found = Evidence(folder, manifest.Claim(path))
    try:
        for event, digest in runlog.read_links(path):
            try:
                found.claim.add(event, digest)
                dates.append((event["n"] + 1, event["kind"], event["utc"]))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise UserError(
                    f"{path}: line {event['n'] + 1} ({event['kind']}) is malformed ({error!r})") from None
    except (UserError, RecursionError) as error:
        found.problems.append(str(error).replace(f"{folder}/", "") or f"{manifest.NAME}: cannot be read")
        return found, dates, False
    return found, dates, True


def told(dates: list[tuple[int, str, Any]]) -> list[tuple[int, str, float, str]]:
    """[(line, kind, seconds since the epoch, text)] of those dates of a manifest that are dates."""
    moments = [(line, kind, moment(utc), utc) for line, kind, utc in dates]
    return [row for row in moments if row[2] is not None]


def check_dates(dates: list[tuple[int, str, Any]]) -> Iterator[str]:
    """The manifest was written in the order in which it reads."""
    before = None
    for line, kind, utc in dates:
        at = moment(utc)
        if at is None:
            yield f"{manifest.NAME}: line {line} ({kind}): {utc!r:.40} is no date"
            continue
        if before is not None and at < before[2] - CLOCK_S:
            yield (
                f"{manifest.NAME}: line {line} ({kind}, {utc}) is dated before line {before[0]} "
                f"({before[1]}, {before[3]})"
            )
        before = (line, kind, at, utc)


def read_runs(found: Evidence) -> dict[str, run_laws.Log | None]:
    """{name of a folder under runs/: Log, or None if it is a script's or unreadable}; adds problems."""
    logs, runs = {}, found.folder / "runs"
    for path in files.listed(runs):
        if path.is_dir():
            where = f"runs/{path.name}"
            log, problems = run_laws.read_log(path, where) if (path / "run.jsonl").exists() else (None, [])
            logs[path.name] = log
            found.problems += problems
    return logs


def match(found: Evidence, logs: dict[str, run_laws.Log | None]) -> Iterator[str]:
    """Which run of the manifest each folder is: none missing, none too many."""
    by_name = {r.finish["folder"]: r for r in found.claim.runs if r.finish and r.finish["folder"] is not None}
    by_hash = {r.hash: r for r in found.claim.runs if not (r.finish and r.finish["folder"])}
    for name, log in logs.items():
        run = by_name.get(name) or (by_hash.get(log.start["registered"]) if log else None)
        if run is None:
            yield f"runs/{name}: no registered run of the manifest: a run outside the plan may not lie here"
        elif run.run in found.logs:
            yield f"runs/{name}: a second folder of run {run.run}"
        elif log is not None:
            found.logs[run.run] = log
    for name, run in by_name.items():
        if name not in logs:
            yield f"runs/{name}: missing: the manifest has it as run {run.run} ({run.arm}, seed {run.seed})"


def check_registered(found: Evidence, run: manifest.Run) -> Iterator[str]:
    """A run's log against the run's lines in the manifest."""
    log = found.logs.get(run.run)
    if log is None:
        name = run.finish["folder"] if run.finish else None
        if name is not None and not (found.folder / "runs" / name / "run.jsonl").exists():
            yield f"runs/{name}/run.jsonl: missing: the manifest has it as run {run.run}"
        return
    start, end = log.start, log.one("end")
    if start["registered"] != run.hash:
        yield (f"{log.where}: was not announced by the manifest: it names entry "
               f"{start['registered'][:12]!r}, run {run.run} is {run.hash[:12]!r}")
    if start["seed"] != run.seed:
        yield f"{log.where}: seed {start['seed']}, the plan has seed {run.seed} for run {run.run}"
    if run.fault is not None and log.told_its_loss:
        yield (f"{log.where}: excluded by a fault ({run.fault['cause']}), but it "
               f"{end['status'] if end else 'finished'}: a run that told its loss always counts")
    if run.finish is not None:
        told = run.finish["last_hash"]
        if told is not None and log.last_hash != told:
            yield (f"{log.where}/run.jsonl: ends with hash {log.last_hash[:12]}, the manifest says "
                   f"{told[:12]}: it was changed after the run")
        if run.status in manifest.WITH_LOSS and not log.whole:
            last = log.events[-1]["kind"]
            yield f"{log.where}/run.jsonl: truncated: it ends with the event {last!r}, the run {run.status}"
        elif end is not None and end["status"] != run.status:
            yield f"{log.where}/run.jsonl: says {end['status']}, the manifest says {run.status}"
    yield from check_moment(run, log)


def check_moment(run: manifest.Run, log: run_laws.Log) -> Iterator[str]:
    """The process lived between the lines that announced and finished it."""
    logged = moment(log.start["utc"])
    if logged is None:
        yield f"{log.where}/run.jsonl: {log.start['utc']!r:.40} is no date"
        return
    began = logged - log.start["wall_ms"] / 1000
    ended = began + log.events[-1]["wall_ms"] / 1000
    announced, finished = moment(run.utc), moment(run.finish["utc"]) if run.finish else None
    if announced is not None and began < announced - CLOCK_S:
        yield (
            f"{log.where}: began before it was registered: its log is of {log.start['utc']}, the entry of "
            f"{run.utc}"
        )
    if finished is not None and ended > finished + CLOCK_S:
        yield (f"{log.where}: ran for {ended - began:.0f} s from {log.start['utc']}, but the manifest has it "
               f"finished at {run.finish['utc']}")


def check_unaccounted(found: Evidence) -> Iterator[str]:
    """The manifest's dates leave the new arm's processes no more time than the parent's that their logs do
    not tell: a log whose times were all shortened lacks what passed here."""
    spent = {"new": [], "parent": []}
    for run in found.claim.runs:
        log = found.logs.get(run.run)
        dates = (moment(run.utc), moment(run.finish["utc"])) if run.finish else (None, None)
        if run.arm in spent and log is not None and log.whole and None not in dates:
            spent[run.arm].append(dates[1] - dates[0] - log.events[-1]["wall_ms"] / 1000)
    if not all(spent.values()):
        return
    new, parent = (middle.median(spent[name]) for name in ("new", "parent"))
    if new > run_laws.LONGER * max(0.0, parent) + UNACCOUNTED_S:
        yield (f"arm new: {new:.0f} s of a run from its registration to its end are not in its log, of arm "
               f"parent {parent:.0f} s: times that were shortened leave such a gap")


def check_script_run(found: Evidence, run: manifest.Run) -> Iterator[str]:
    """A script's log: its bytes are those of the manifest, and they hold one whole run."""
    if run.finish is None or run.finish["folder"] is None:
        return
    where = f"runs/{run.finish['folder']}"
    try:
        result, digest = textlog.read(found.folder / where / "log.txt")
    except UserError as error:
        yield str(error).replace(f"{found.folder}/", "")
        return
    if digest != run.finish["last_hash"]:
        yield (f"{where}/log.txt: hash {digest[:12]}, the manifest says {run.finish['last_hash'][:12]}: it "
               "was changed after the run")
    if run.status == "finished" and (result["diverged"] or not result["complete"]):
        yield f"{where}/log.txt: not a finished run: step {result['steps']} of {result['scheduled_steps']}"
    found.scripts[run.run] = result


# ----- runs against each other ------------------------------------------------------------------------------

def check_alike(found: Evidence) -> Iterator[str]:
    """One scale and program version, the declared machine; equal streams where the data settings are
    equal."""
    logs, d = list(found.logs.values()), found.declaration
    for key in ("scale", "processes", "numerics_version"):
        yield from alike([(log.where, log.start[key]) for log in logs], key)
    declared = {k: d["machine"].get(k)
                for k in ("machine", "cpu", "cores")} | {k: d[k] for k in ("scale", "processes")}
    gpus = d["machine"].get("gpus")
    for log in logs:
        for key, value in declared.items():
            if log.start[key] != value:
                yield f"{log.where}: {key} {log.start[key]!r}, declared {value!r}"
        device, cpu = log.start["device"], log.start["device"].startswith("CPU")
        count = log.start["processes"]
        if cpu and not re.fullmatch(rf"CPU, {count} process(es)?, [1-9][0-9]* threads?", device):
            yield f"{log.where}: device {device!r:.60} is none of {count} processes on a CPU"
        if not isinstance(gpus, list) or (gpus and not cpu
                                          and device != f"{len(gpus)} x {gpus[0]}") or cpu == bool(gpus):
            yield f"{log.where}: ran on {device!r}, declared the GPUs {gpus!r:.60}"
    streams = collections.defaultdict(list)
    for log in logs:
        if log.whole and log.settings is not None and log.one("end")["status"] == "finished":
            key = [log.start["corpus_digest"], log.start["settings"].get("data"), log.settings.schedule.steps]
            streams[json.dumps(key, sort_keys=True)].append((log.where, log.one("stream")["digest"]))
    for same in streams.values():
        yield from alike(same, "stream_digest")


def check_untimed(found: Evidence) -> Iterator[str]:
    """What is off the clock is no place for work: start, warm-up and validations last as long
    as those of like runs.

    Within an arm from its second run on (its first fills the compile caches), between new and parent by their
    medians.
    """
    times = {
        name: [untimed(found.logs[r.run]) for r in found.claim.runs if r.arm == name and r.run in found.logs]
        for name in found.declaration["arms"]
    }
    times = {name: [x for x in rows if x is not None] for name, rows in times.items()}
    for name, rows in times.items():
        for what in ("start", "warm-up"):
            least = min((x[what] for x in rows), default=0.0)
            for x in rows[1:]:
                if x[what] > run_laws.LONGER * least + START_MS:
                    yield (f"{x['where']}: work before the clock: its {what} took {x[what] / 1000:.0f} s, "
                           f"the shortest of arm {name} {least / 1000:.0f} s")
    if not (times.get("new") and times.get("parent")):
        return
    why = found.declaration.get("long_start")
    for what, slack in (("start", START_MS), ("warm-up", START_MS), ("validation", run_laws.UNTIMED_MS)):
        new, parent = (middle.median(x[what] for x in times[name]) for name in ("new", "parent"))
        if new <= run_laws.LONGER * parent + slack:
            continue
        if what == "validation":
            yield (f"arm new: time taken off the clock: {new / 1000:.1f} s next to the training at each "
                   f"validation, arm parent {parent / 1000:.1f} s for the same")
        elif isinstance(why, str) and why:
            found.unknown.append(f"what arm new did in the {new / 1000:.0f} s of its {what} (arm parent: "
                                 f"{parent / 1000:.0f} s), of which its manifest says: {why}")
        else:
            yield (f"arm new: work before the clock: its {what} takes {new / 1000:.0f} s, that of arm parent "
                   f"{parent / 1000:.0f} s, and the manifest does not say why (submit --long-start)")


def untimed(log: run_laws.Log) -> dict | None:
    """{where, start, warm-up, validation (median)} in ms of a log that got past its warm-up, else None."""
    reset, rests = log.one("reset"), [rest for _, _, rest in log.intervals]
    return {"where": log.where, "start": reset["start_ms"], "warm-up": reset["warmup_ms"],
            "validation": middle.median(rests)} if rests else None


def check_artefacts(found: Evidence) -> Iterator[str]:
    """Nothing lies in the folder that no law reads: the code's difference is the declared one,
    runs/ holds runs only."""
    told, path = found.declaration.get("code_diff"), found.folder / "code.diff"
    try:
        held = arms.hash_of(untrusted.bytes_of(path)) if path.exists() else None
    except UserError:
        held = "unreadable"
    if held != told:
        text = untrusted.bytes_of(path) if held not in (None, "unreadable") else b""
        rewritten = "has CRLF line ends: something rewrote its lines; fetch it as it was written"
        same = b"\r\n" in text and arms.hash_of(text.replace(b"\r\n", b"\n")) == told
        why = "missing" if held is None else rewritten if same else "is not the one that was declared"
        yield f"code.diff: {why}"
    sources = {log.start["sources"] for log in found.logs.values()}
    known = {f"sources-{digest}.txt{packed}" for digest in sources for packed in ("", ".xz")}
    runs = found.folder / "runs"
    for path in files.listed(runs):
        if not path.is_dir() and path.name not in known:
            yield f"runs/{path.name}: neither a run nor the sources of one: remove it"
        elif path.name.endswith(".xz") and path.with_suffix("").exists():
            yield f"runs/{path.name}: the sources lie here twice, packed and not: remove one"
    yield from check_known_files(found)


def check_known_files(found: Evidence) -> Iterator[str]:
    """Every file and folder of a claim is one that a law here, or the page, reads."""
    patches = [arms.patch_path(found.folder, a).name for a in found.declaration["arms"].values()
               if isinstance(a.get("dirty"), str)]
    for entry in untrusted.survey(found.folder):
        top, *_, name = entry.path.split("/") if "/" in entry.path else (entry.path, entry.path)
        if entry.path == top:
            known = top in (FOLDERS if entry.size is None else (*FILES, *patches))
        else:  # a reproduction is judged as a claim itself, and what lies loose in runs/ is named above
            loose = entry.size is None or top == "reproduction" or entry.path.count("/") < 2 and top == "runs"
            known = loose or any(fnmatch.fnmatchcase(name, x) for x in FOLDERS.get(top, name))
        if not known:
            yield f"{entry.path}: no part of a claim folder: remove it"


def check_copies(found: Evidence) -> Iterator[str]:
    """No run is another one under a new name: not by its times, its losses,
    or the initial state of its seed."""
    times, losses, states, seeds, probes = {}, {}, {}, {}, {}
    for run in found.claim.runs:
        log = found.logs.get(run.run)
        if log is None or not log.whole:
            continue
        clock = tuple(v["train_time_ms"] for v in log.validations)
        if times.setdefault(clock, log.where) != log.where:
            yield f"{log.where}: has the very times of {times[clock]}: a copy"
        curve = (run.arm, json.dumps([[v["val_loss"], v["train_loss"]] for v in log.validations]))
        seed, where = losses.setdefault(curve, (run.seed, log.where))
        if seed != run.seed:
            yield f"{log.where}: seed {run.seed} has the very losses of seed {seed} in {where}: a copy"
        probe = log.one("probe")
        if probe is not None:
            seed, where = probes.setdefault((run.arm, json.dumps([probe["loss"], probe["gradients"]])),
                                            (run.seed, log.where))
            if seed != run.seed:
                yield f"{log.where}: seed {run.seed} has the very probe of seed {seed} in {where}: a copy"
        state = log.one("reset")["state_after"]
        seed, where = states.setdefault((run.arm, state), (run.seed, log.where))
        if seed != run.seed:
            yield f"{log.where}: seed {run.seed} starts from the very state of seed {seed} in {where}: a copy"
        other, where = seeds.setdefault((run.arm, run.seed), (state, log.where))
        if other != state:
            yield (
                f"{log.where}: seed {run.seed} starts from another state than in {where}: the warm-up leaked"
            )


def check_reruns(found: Evidence) -> Iterator[str]:
    """Two runs of one arm and seed, one of which a fault excluded, have the same losses while both go."""
    first = {}
    for run in found.claim.runs:
        log = found.logs.get(run.run)
        if log is None:
            continue
        other = first.setdefault((run.arm, run.seed), log)
        theirs = {v["step"]: v["val_loss"] for v in other.validations}
        for v in log.validations:
            if abs(v["val_loss"] - theirs.get(v["step"], v["val_loss"])) > RERUN_NATS:
                yield (f"{log.where}: seed {run.seed} has loss {v['val_loss']:.4f} at step {v['step']}, in "
                       f"{other.where} it had {theirs[v['step']]:.4f}: one seed has one curve")
                break


# ----- the plan, and what a record must show ----------------------------------------------------------------

def check_plan(found: Evidence) -> Iterator[str]:
    """Every declared run was made, or a declared look ended the claim;
    in the order that the declared seed draws."""
    claim, d = found.claim, found.declaration
    yield from check_order(d)
    faults = sum(run.fault is not None for run in claim.runs)
    if faults > len(d["order"]):
        yield f"{manifest.NAME}: {faults} runs are excluded by faults, {len(d['order'])} were declared"
    if claim.withdrawn is not None:  # given up: nothing more is to come
        return
    ended = bool(claim.looks) and claim.looks[-1]["decision"] != "continue"
    if claim.open_run is not None:
        yield (
            f"{manifest.NAME}: a run is missing: run {claim.open_run.run} is registered and nothing says "
            "what became of it"
        )
    elif not ended and not claim.complete:
        yield (f"{manifest.NAME}: runs are missing: {claim.next_place} of {len(d['order'])} declared runs "
               "are made; finish the plan with --resume")
    elif not ended and "looks" in d["plan"]:
        yield f"{manifest.NAME}: the last declared look ({d['plan']['looks'][-1]['runs']} runs) was not taken"
    if ended and any(len(claim.counted(arm)) != claim.looks[-1]["runs"] for arm in d["arms"]):
        yield (f"{manifest.NAME}: the look at {claim.looks[-1]['runs']} runs ended the claim, but an arm has "
               "another number of runs")


def check_comparison(found: Evidence) -> Iterator[str]:
    """An A/A test has the same arms, and no other comparison has two that are."""
    d = found.declaration
    twins = [arms.same(a, b) for a, b in itertools.combinations(d["arms"].values(), 2)]
    if (not all(twins)) if d.get("aa") else any(twins):
        yield (
            f"{manifest.NAME}: aa is {d.get('aa')!r}, but its arms "
            f"{'differ' if d.get('aa') else 'are the same'}"
        )


def check_record_claim(found: Evidence) -> Iterator[str]:
    """A record runs against its parent, unchanged, under the speedrun's rules."""
    d, where = found.declaration, manifest.NAME
    if d["alpha"] > MOST_ALPHA:
        yield f"{where}: alpha {d['alpha']}: a record needs {MOST_ALPHA} or less"
    if d["margin"] > MOST_MARGIN:
        yield f"{where}: margin {d['margin']}: a record may lose {MOST_MARGIN} nats at most"
    if not {"new", "parent"} <= set(d["arms"]) <= {"new", "parent", "base"}:
        yield (
            f"{where}: arms {', '.join(d['arms'])}: a record is claimed with new and parent (base: the last "
            "ml record)"
        )
        return
    scripts = [name for name, arm in d["arms"].items() if arm["kind"] == "script"]
    if scripts:
        yield (
            f"{where}: arm {scripts[0]} is a script: nothing shows its data and settings, so no record can "
            "rest on it"
        )
        return
    code, commit = d.get("code"), d["arms"]["new"].get("commit")
    if code is not None and commit is not None and code != commit:
        yield f"{where}: declared by code {code[:12]}, arm new runs {commit[:12]}"
    if d.get("aa"):
        yield f"{where}: aa is true: a record is claimed against its parent, not against itself"
    yield from provenance.check_lineage(found)
    new, parent = d["arms"]["new"], d["arms"]["parent"]
    if d["claim"] == "systems" and new.get("ml_hash") != parent.get("ml_hash"):
        paths = provenance.differing(new.get("settings"), parent.get("settings"))
        paths = [p for p in paths if not p.startswith("system.")]
        yield (
            f"{where}: claims systems, but new and parent differ in {', '.join(paths) or 'ml_hash'}: that is "
            "an ml claim"
        )
    yield from off_clock.check_track(d)
    for log in found.of("new")[:1]:
        if d["scale"] in ("full", "small") and log.start["corpus"] != "fineweb":
            yield (
                f"{log.where}: corpus {log.start['corpus']!r}: at scale {d['scale']} a record is measured on "
                "FineWeb"
            )


def check_order(d: dict) -> Iterator[str]:
    """The order of execution and the seeds are what order_seed draws, not what somebody picked."""
    runs = d["plan"].get("runs") or d["plan"]["looks"][-1]["runs"]
    first = min(x["seed"] for x in d["order"] if not x["discard"])
    if d["order"] != compare.make_order(sorted(d["arms"]), runs, d["pairing"], first, d["order_seed"]):
        yield (
            f"{manifest.NAME}: the order of runs and their seeds are not what order_seed {d['order_seed']} "
            "draws"
        )
