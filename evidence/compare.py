"""`python -m records compare ARM ARM`: arms against each other on this machine, interleaved, declared before
the first run.

    python -m records compare main:short/head my-branch:short/head --runs 8
    python -m records compare short/11 "short/11 --without model.residual.unet_skips" --runs 4 --scale tiny
    python -m records compare short/11 script:../upstream/train_gpt.py --runs 8 --nproc 8

The first arm is the one that the others are compared with. Runs come in blocks that hold every arm once, in
random order, after one discarded run. The folder holds manifest.jsonl (evidence/manifest.py), runs/,
results.json and, where the arms differ in code, code.diff. A stopped comparison goes on with --resume DIR.
"""

import argparse
import contextlib
import os
import random
import secrets
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from common import arguments as numbers  # `arguments` is what every command declares its own with
from common import console, environment, files, repository
import runlog
from evidence import arms, fact_laws, manifest
from common.errors import UserError
from common.interrupt import INTERRUPTED, Interrupt
from settings.scales import SCALES

GOAL = 0.002  # nats: about 1.5 sd of a full-scale run, and what a record is kept below its target
POWER = 0.8
GRACE_S = 60  # what a run may take to end after Ctrl-C
FIXED = (  # options that a declared plan has settled
    "arms", "runs", "scale", "pairing", "out", "seed0", "order_seed", "nproc", "confidence", "aa",
    "allow_dirty")


def quoted(text: str) -> NoReturn:
    """Refuse an option that was typed outside the quotes of an arm."""
    raise UserError(
        f"{text!r} stands outside an arm: put each arm and its changes in quotes, like \"short/11 --set a=b\""
    )


def arguments(p: argparse.ArgumentParser) -> None:
    """Options of `records compare`."""
    p.add_argument(
        "arms", nargs="*", metavar="ARM",
        help="[GITREF:]RECORD [changes] in quotes, or script:PATH [arguments]; "
        "the first one is what the others are compared with"
    )
    p.add_argument("--runs", type=numbers.runs, metavar="N",
                   help="counted runs of each arm, at least 2 (to be given)")
    p.add_argument("--scale", choices=list(SCALES),
                   help="of every arm that is a record (default: full, or that of a preset)")
    p.add_argument(
        "--pairing", choices=("seed", "none"),
        help="seed: the arms share seeds, and so all weights that both "
        "have (default where every arm takes a seed); none: every run has a seed of its own"
    )
    p.add_argument(
        "--out", metavar="DIR", help="a new folder for plan, runs and results (default runs/<date>_compare)"
    )
    p.add_argument("--seed0", type=numbers.first_seed, metavar="K", help="first seed (default 0)")
    p.add_argument(
        "--order-seed", type=numbers.seed, metavar="K", help="seed of the order of execution (default: drawn)"
    )
    p.add_argument(
        "--nproc", type=numbers.integer(1, 8), metavar="P", help="start each run as so many processes"
    )
    p.add_argument("--data", metavar="DIR", help="folder of shards, as for train_gpt.py")
    p.add_argument(
        "--confidence", type=numbers.confidence, metavar="C",
        help="of all intervals, of losses and times together (default 0.95)"
    )
    p.add_argument("--aa", action="store_true", help="the arms are the same on purpose: measure the noise")
    p.add_argument(
        "--allow-dirty", action="store_true", help="run uncommitted changes; the claim says so and holds them"
    )
    p.add_argument("--resume", metavar="DIR", help="go on with the plan in this folder")
    p.add_argument(
        "--fault", metavar="CAUSE=NOTE", help="with --resume: why the last run, which failed without a loss, "
        f"does not count ({', '.join(manifest.CAUSES)}); it is run again"
    )
    for flag in arms.CHANGES:
        # belongs inside the quotes of an arm
        p.add_argument(flag, dest="outside", type=quoted, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int | None:
    """`records compare`: declare a plan or go on with one, run it, report. Returns the exit code."""
    if options.resume:
        given = [name for name in FIXED if getattr(options, name) not in (None, [], False)]
        if given:
            raise UserError("--resume goes on with a declared plan, which fixes "
                            f"{given[0].replace('_', '-')}: leave it out")
        folder = Path(options.resume)
    else:
        folder = Path(options.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}_compare")
        if folder.is_dir() and files.listed(folder) and not (folder / manifest.NAME).exists():
            raise UserError(f"--out {folder} is not empty: choose a new folder")
        declare(folder, *plan(options))
    try:
        claim = run_plan(folder, data=options.data, fault=options.fault)
    except KeyboardInterrupt:
        print(
            f"interrupted: nothing that was finished is lost; go on with --resume {folder}", file=sys.stderr
        )
        return INTERRUPTED
    results = analyse(claim)
    files.write(folder / "results.json", files.json_text(results, indent=1) + "\n")
    report(results)
    print(f"results: {folder / 'results.json'}")


# ----- the plan ---------------------------------------------------------------------------------------------

def make_order(
    names: Iterable[str], runs: int, pairing: str, seed0: int = 0, order_seed: int = 0
) -> list[dict]:
    """[{arm, seed, discard}]: blocks that hold every arm once in random order, after one discarded run.

    pairing seed: block b has seed seed0 + b for all arms. none: every run has its own seed. The discarded
    run, which takes the cold caches and clocks, has the seed after the last.
    """
    draw, names = random.Random(order_seed), list(names)
    last = seed0 + runs * (1 if pairing == "seed" else len(names))
    order = [{"arm": draw.choice(names), "seed": last, "discard": True}]
    for block in range(runs):
        seeds = {
            name: seed0 + (block if pairing == "seed" else block * len(names) + i)
            for i, name in enumerate(names)
        }
        order += [
            {"arm": name, "seed": seeds[name], "discard": False} for name in draw.sample(names, len(names))
        ]
    return order


def plan(options: argparse.Namespace) -> tuple[dict, dict[str, bytes], str]:
    """(declaration, patches of uncommitted code, code diff) of a command line, with all arms checked and
    resolved."""
    confidence = 0.95 if options.confidence is None else options.confidence
    check_options(options)
    prepared = [arms.prepare(text, options.scale, options.allow_dirty) for text in options.arms]
    found = {name: arm for name, (arm, _) in zip(string.ascii_uppercase, prepared)}
    patches = {arm["dirty"]: patch for arm, patch in prepared if patch}
    check_arms(found, options)
    pairing = options.pairing or ("seed" if all(arms.takes_seed(a) for a in found.values()) else "none")
    diff = code_diff(found)
    declaration = declaration_of(
        found, {"runs": options.runs}, pairing=pairing, seed0=options.seed0 or 0,
        order_seed=options.order_seed, processes=options.nproc, data=options.data, diff=diff,
        alpha=round(1 - confidence, 12), confidence=confidence, aa=options.aa
    )
    return declaration, patches, diff


def declaration_of(
    found: dict[str, dict], runs: dict, *, claim: str = "comparison", record: str | None = None,
    target: float | None = None, alpha: float = 0.01, pairing: str = "seed", seed0: int = 0,
    order_seed: int | None = None, processes: int | None = None, data: str | None = None, diff: str = "",
    **more: Any
) -> dict:
    """The declaration of a plan on this machine. UserError where its arms cannot run here (no GPU, or none is
    free).

    found: arms by name, from arms.prepare; the first is what others are compared with.
    runs: {"runs": n} or {"looks": [...]}.
    processes: with system/launch.py; None: plain python.
    diff: text of code_diff. more: further entries.
    """
    records = [a for a in found.values() if a["kind"] == "record"]
    if records:
        environment.check_training()
    # what judges the runs at the end must be there before the first
    from evidence import statistics  # noqa: F401
    gpus = [] if on_cpu(found) else arms.free_gpus(processes or 1)
    for a in records:
        device = a["settings"]["system"]["device"]
        if (a["scale"] in ("full", "small") or device == "cuda") and device != "cpu" and not gpus:
            remedy = "leave out system.device=cuda" if device == "cuda" else "add --scale tiny"
            raise UserError(
                f"{a['text']} at scale {a['scale']} needs a GPU, and torch sees none here: {remedy}"
            )
    scale = records[0]["scale"] if records else None
    shards = locate({"data": data, "scale": scale}, None)
    order_seed = secrets.randbelow(2 ** 31) if order_seed is None else order_seed
    total = runs["looks"][-1]["runs"] if "looks" in runs else runs["runs"]
    return {
        "version": manifest.VERSION, "claim": claim, "record": record, "target": target, "alpha": alpha,
        "scale": scale, "arms": found, "plan": runs, "pairing": pairing, "margin": GOAL,
        "order": make_order(found, total, pairing, seed0, order_seed), "order_seed": order_seed,
        "processes": processes or 1, "launcher": "system/launch.py" if processes else "python", "data": data,
        "corpus_prefixes": arms.corpus_prefixes(shards) if shards else None,
        "machine": {**runlog.machine(), **fact_laws.programs(), "gpus": [g["name"] for g in gpus]},
        "environment": arms.environment(),
        "code": repository.code_version(), "code_diff": arms.hash_of(diff) if diff else None, **more
    }


def on_cpu(found: dict[str, dict]) -> bool:
    """Do all arms say themselves that they run on the CPU?"""
    return all(a["settings"] and a["settings"]["system"]["device"] == "cpu" for a in found.values())


def code_diff(found: dict[str, dict]) -> str:
    """Text of the differences of each arm's code to the first one's, '' where all run the same code."""
    base, *others = found
    texts = {name: arms.code_diff(found[base], found[name]) for name in others}
    return "".join(f"# {base} -> {name}\n{text}" for name, text in texts.items() if text)


def check_options(options: argparse.Namespace) -> None:
    """UserError for options of a new comparison that contradict each other."""
    if len(options.arms) < 2:
        raise UserError(
            f"{len(options.arms)} arms named, a comparison needs two: compare short/10 short/11 --runs 4"
        )
    if len(options.arms) > len(string.ascii_uppercase):
        raise UserError(
            f"{len(options.arms)} arms: a comparison takes {len(string.ascii_uppercase)}; sweep.py takes more"
        )
    if options.runs is None or options.runs < 2:
        raise UserError(
            "name the number of runs of each arm with --runs N, at least 2: one run has no spread"
        )
    if options.nproc is not None and options.nproc not in (1, 2, 4, 8):
        raise UserError(f"--nproc {options.nproc}: must be 1, 2, 4 or 8, to share the 8 logical ranks")
    if options.fault:
        raise UserError("--fault explains a run of a plan that is under way: it goes with --resume DIR")


def check_arms(found: dict[str, dict], options: argparse.Namespace) -> None:
    """Refuse arms that cannot be told apart, and pairs that would not be pairs."""
    names = list(found)
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            same = arms.same(found[a], found[b])
            if same and not options.aa:
                raise UserError(f"{found[a]['text']!r} and {found[b]['text']!r} are the same program with "
                                "the same settings: there is nothing to compare; add --aa to measure the "
                                "noise")
            if options.aa and not same:
                raise UserError(f"--aa compares an arm with itself; {found[a]['text']!r} and "
                                f"{found[b]['text']!r} differ: leave it out")
    for arm in found.values():
        if options.pairing == "seed" and not arms.takes_seed(arm):
            raise UserError(
                f"--pairing seed: {arm['text']!r} takes no seed; put {{seed}} among its arguments, or use "
                "--pairing none"
            )
    if not any(a["settings"] for a in found.values()) and (options.scale or options.data):
        raise UserError(
            "--scale and --data are for records, and all arms are scripts: put these among their arguments"
        )
    scales = {a["scale"] for a in found.values() if a["kind"] == "record"}
    if len(scales) > 1:
        raise UserError(
            f"the arms have different scales, {' and '.join(sorted(scales))}: give --scale for all of them"
        )
    records = {a["text"]: a["settings"]["validation"]["tokens"] for a in found.values() if a["settings"]}
    if len(set(records.values())) > 1:
        raise UserError("the arms are validated on different tokens: " + ", ".join(
            f"validation.tokens = {v} in {n!r}" for n, v in records.items()))


def declare(
    folder: Path | str, declaration: dict, patches: dict[str, bytes] | None = None, diff: str = "",
    say: Callable[..., None] = print
) -> None:
    """Write a plan into a new folder: manifest.jsonl with its declaration, uncommitted code, code.diff."""
    folder = Path(folder)
    # else create() refuses; the manifest comes last, when all it names is there
    if not (folder / manifest.NAME).exists():
        for arm in declaration["arms"].values():
            if arm["dirty"]:
                files.write(arms.patch_path(folder, arm), patches[arm["dirty"]], parents=True)
        if diff:
            files.write(folder / "code.diff", diff, parents=True)
    manifest.create(folder, declaration).close()
    for name, arm in declaration["arms"].items():
        if arm["commit"]:
            code = f"code {arm['commit'][:12]}"
        elif arm["kind"] == "record":
            code = "code of this folder"
        else:
            code = f"sha256 {arm['sha256'][:12]}"
        say(f"{name}  {arm['text']}  [{code}{', uncommitted changes' if arm['dirty'] else ''}]",
            *(f"     {x}" for x in arm.get("report", [])), sep="\n")
    runs = declaration["plan"].get("runs") or declaration["plan"]["looks"][-1]["runs"]
    say(f"declared {runs} runs of each arm, "
        f"{'paired by seed' if declaration['pairing'] == 'seed' else 'not paired'}, in random order "
        f"{declaration['order_seed']}: {folder / manifest.NAME}")
    if diff:
        say(f"files that differ in code: {diff.count('diff --git')}, see {folder / 'code.diff'}")


# ----- running it -------------------------------------------------------------------------------------------

def run_plan(
    folder: Path | str, until: int | None = None, data: Path | str | None = None, fault: str | None = None,
    say: Callable[..., None] = print
) -> manifest.Claim:
    """Execute the declared order of a claim folder from where it stands. Returns the manifest.Claim.

    until: stop when every arm has so many counted runs (a look); None: the whole order. data: where the
    shards lie now, if not where the declaration says. fault: "cause=note" for the last run. UserError when a
    run is lost (nothing else is: call again), KeyboardInterrupt after a clean stop by Ctrl-C, SIGTERM or
    SIGHUP.
    """
    book = manifest.resume(folder)
    try:
        declaration = book.claim.declaration
        if any(a["kind"] == "record" for a in declaration["arms"].values()):
            environment.check_training()  # a run that cannot start would count as lost
        data = locate(declaration, data)
        variables = {**declaration.get("environment", {}), **same_machine(declaration)}
        settle(book, folder)
        fact_laws.require_same(book.claim, starts(book.claim, folder), data)
        if fault:
            explain(book, fault)
        firsts = {}  # arm -> result of its first run
        for done in book.claim.runs:
            name = done.finish["folder"] if done.finish else None
            result = arms.collect(declaration["arms"][done.arm], Path(folder) / "runs", name)
            check_run(book.claim, done, result, firsts)
        began, first = time.monotonic(), book.claim.next_place
        while book.claim.next_place < len(declaration["order"]):
            if until is not None and all(len(book.claim.counted(a)) >= until for a in declaration["arms"]):
                break
            done, result = one_run(book, folder, data, variables, say)
            check_run(book.claim, done, result, firsts)
            left = len(declaration["order"]) - book.claim.next_place
            left_s = left * (time.monotonic() - began) / (book.claim.next_place - first)
            loss = f"{result['val_loss']:.4f}" if result["val_loss"] is not None else result["status"]
            ms, at = result["train_time_ms"], f"run {book.claim.next_place}/{len(declaration['order'])}"
            say(f"{at}  {done.arm}  seed {done.seed}: {loss}"
                + ("" if ms is None else f", {ms / 1000:.1f} s") + (" (discarded)" if done.discard else "")
                + (f"; about {left_s / 60:.0f} min left" if left_s > 60 else ""))
        return book.claim
    finally:
        book.close()


def starts(claim: manifest.Claim, folder: Path | str) -> list[dict]:
    """Start events of the runs of a claim so far, as far as they can be read."""
    found = [arms.collect(claim.declaration["arms"][r.arm], Path(folder) / "runs", r.finish["folder"])
             for r in claim.runs if r.finish and r.finish["folder"]]
    return [x["start"] for x in found if x["start"]]


def locate(declaration: dict, data: Path | str | None) -> Path | None:
    """Absolute folder of the shards, or None for the embedded corpus."""
    data = data or declaration["data"]
    if data is None and declaration["scale"] in ("full", "small"):
        data = arms.ROOT / "data" / "fineweb10B"  # a worktree has none of its own
    if data is not None and not Path(data).is_dir():
        raise UserError(f"no data folder {data}: get FineWeb with `python -m data.fineweb RECORD --scale "
                        f"{declaration['scale']}`, or name a folder with --data")
    return None if data is None else Path(data).absolute()


def same_machine(declaration: dict) -> dict[str, str]:
    """Variables that choose the GPUs; refuses another machine than the declared one, or one whose GPUs are
    busy."""
    declared, here = declaration["machine"], runlog.machine()
    for key in ("machine", "cpu", "cores"):
        if declared[key] != here[key]:
            raise UserError(
                f"declared on another machine: {key} {declared[key]!r}, here {here[key]!r}; times of two "
                "machines do not compare: start a new comparison"
            )
    if not declared["gpus"]:
        return {}
    free = arms.free_gpus(declaration["processes"])
    if [g["name"] for g in free] != declared["gpus"]:
        here = ", ".join(g["name"] for g in free) or "none"
        raise UserError(
            f"declared with {', '.join(declared['gpus'])}; free here: {here}: start a new comparison"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(g["uuid"] for g in free)}


def settle(book: manifest.Manifest, folder: Path | str) -> None:
    """Write down what became of a run that outlived the program that started it, or died with it."""
    lost = book.claim.open_run
    if lost is None:
        return
    arm, runs = book.claim.declaration["arms"][lost.arm], Path(folder) / "runs"
    name = arms.find_run(runs, lost.hash)
    if arm["kind"] == "script":
        name = arms.script_folder(arm, lost.run, lost.seed, lost.hash)
    result = arms.collect(arm, runs, name)
    book.append(
        "finish", run=lost.run, exit=None, **{k: result[k] for k in ("folder", "last_hash", "status")}
    )
    if result["status"] not in manifest.WITH_LOSS:
        note = f"killed with the program that ran it; {result['note']}".strip("; ")
        book.append("fault", run=lost.run, cause="killed", note=note)


def explain(book: manifest.Manifest, fault: str) -> None:
    """Book why the last run failed, from `--fault CAUSE=NOTE`."""
    cause, equals, note = fault.partition("=")
    if not equals or cause not in manifest.CAUSES or not note.strip() or not book.claim.runs:
        raise UserError(f"--fault {fault}: expected CAUSE=NOTE for the last run, CAUSE one of "
                        f"{', '.join(manifest.CAUSES)}")
    book.append("fault", run=book.claim.runs[-1].run, cause=cause, note=note.strip())


def end_group(started: arms.Started) -> int:
    """Kill what a run has left running in its session; returns how many processes that were."""
    left = processes_of(started.process.pid)
    for pid in left:  # one by one, as some may have made a group of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(left)


def processes_of(session: int) -> list[int]:
    """Process ids of a session that still run (Linux; [] where /proc does not tell)."""
    found = []
    for stat in files.listed("/proc", "[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
            state, _, _, of = text.split()[:4]
            if int(of) == session and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def one_run(
    book: manifest.Manifest, folder: Path | str, data: Path | None, variables: dict[str, str],
    say: Callable[..., None] = print
) -> tuple[manifest.Run, dict]:
    """Register, run and book the next run. (manifest.Run, result); UserError or KeyboardInterrupt if it told
    no loss."""
    claim, declaration = book.claim, book.claim.declaration
    entry, number = declaration["order"][claim.next_place], len(claim.runs)
    arm, runs = declaration["arms"][entry["arm"]], Path(folder) / "runs"
    place = arms.place_of(arm, folder)
    # from here until the run is booked a signal is noted, and `wait` obeys
    with Interrupt(main=False) as asked:
        registered = book.append("register", run=number, **entry)
        started = arms.start(
            arm, place, runs, seed=entry["seed"], registered=registered, run=number, data=data,
            processes=declaration["processes"] if declaration["launcher"] != "python" else None,
            variables=variables, keep_open=(book.descriptor,)
        )
        stopped = wait(
            started,
            f"run {claim.next_place}/{len(declaration['order'])}  {entry['arm']}  seed {entry['seed']}", asked
        )
        left = end_group(started)
        if left:
            say(f"run {number} ({entry['arm']}) left {left} process{'es' * (left > 1)} running, which would "
                "have slowed the next run: killed")
        name = started.folder.name if started.folder else arms.find_run(runs, registered)
        result = arms.collect(arm, runs, name)
        code = started.process.returncode
        book.append(
            "finish", run=number, folder=result["folder"], last_hash=result["last_hash"],
            status=result["status"], exit=code, **({"leftover": left} if left else {})
        )
        if result["status"] not in manifest.WITH_LOSS:
            lost(book, number, entry, started, result, stopped)
    if stopped:
        raise KeyboardInterrupt
    return claim.runs[-1], result


def lost(
    book: manifest.Manifest, number: int, entry: dict, started: arms.Started, result: dict, stopped: bool
) -> NoReturn:
    """Book why a run told no loss, as far as that is known, and stop."""
    said = f"{result['note']}; {started.complaint()}".strip("; ")
    cause = arms.cause_of(started.process.returncode, arms.tail(started.errors), stopped)
    if cause:
        book.append("fault", run=number, cause=cause, note=said[:500])
    if stopped:
        raise KeyboardInterrupt
    again = f"its place is run again with --resume {book.claim.folder}" if cause else (
        f"it counts as failed; if the machine is to blame say so with --resume {book.claim.folder} --fault "
        "CAUSE=NOTE")
    raise UserError(f"run {number} ({entry['arm']}, seed {entry['seed']}) told no loss"
                    + (f", {cause.replace('_', ' ')}" if cause else "") + f": {said}; {again}")


def wait(
    started: arms.Started, label: str, asked: Interrupt, watch: Callable[[], None] | None = None
) -> bool:
    """Wait for a run, with one progress line on a terminal. True if it was stopped.

    asked: the Interrupt in whose context this is called: a first signal ends the run in order, a second one
    at once.
    watch: called now and then; what it raises ends the run.
    """
    began, live, stopped_at = time.monotonic(), console.LiveLine(), None

    def send(number):  # to its whole session: a script may have children
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.process.pid, number)

    while True:
        try:
            if asked.asked and not stopped_at:
                stopped_at = time.monotonic()
                send(signal.SIGINT)
            started.process.wait(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            live.show(f"  {label}  {time.monotonic() - began:.0f} s  {started.last_line()}")
            if stopped_at and time.monotonic() - stopped_at > GRACE_S:
                send(signal.SIGKILL)
            if watch is not None:
                try:
                    watch()
                except UserError:
                    send(signal.SIGKILL)
                    raise
        except KeyboardInterrupt:
            send(signal.SIGKILL)
        except BaseException:  # nothing goes on without this program
            send(signal.SIGKILL)
            raise
    live.clear()
    return stopped_at is not None


def check_run(claim: manifest.Claim, done: manifest.Run, result: dict, firsts: dict[str, dict]) -> None:
    """Refuse to go on if a run is not the declared one, or cannot be compared with those before it."""
    if result["folder"] is None:
        return
    arm, start, wrong = claim.declaration["arms"][done.arm], result["start"], ""
    first = firsts.setdefault(done.arm, result)
    if start:
        wrong = arms.contradiction(arm, done.seed, done.hash, start)
        if not wrong and start["sources"] != first["start"]["sources"]:
            wrong = "its sources are not those of the first run of this arm: they were edited meanwhile"
    elif result["scheduled_steps"] != first["scheduled_steps"]:
        wrong = (
            f"it has {result['scheduled_steps']} steps, the first run of this arm {first['scheduled_steps']}"
        )
    where = f"run {done.run} ({done.arm}, seed {done.seed})"
    if wrong:
        raise UserError(f"{where} is not what was declared: {wrong}")
    for name, other in firsts.items():
        if not start or not other["start"]:
            continue
        why = arms.incomparable(other["start"], start, claim.declaration.get("corpus_prefixes"))
        if why:
            raise UserError(f"{where} cannot be compared with {name}: {why}")


# ----- what it says -----------------------------------------------------------------------------------------

OUTCOME = ("status", "val_loss", "train_time_ms", "folder", "last_hash", "curve")  # of arms.collect


def outcomes(claim: manifest.Claim) -> dict[str, list[dict]]:
    """{arm: [{run, seed, status, val_loss, train_time_ms, folder, last_hash, curve, device, torch}]} of the
    counted runs."""
    out = {name: [] for name in claim.declaration["arms"]}
    for name in out:
        for done in claim.counted(name):
            finish = done.finish or {"folder": None, "status": "failed", "last_hash": None}
            result = arms.collect(claim.declaration["arms"][name], claim.folder / "runs", finish["folder"])
            if result["last_hash"] != finish["last_hash"] or result["status"] != finish["status"]:
                raise UserError(f"{claim.folder / 'runs' / str(finish['folder'])}: not the log of which the "
                                "manifest tells; it was changed after the run")
            start = result["start"] or {}
            out[name].append(
                {"run": done.run, "seed": done.seed} | {key: result[key] for key in OUTCOME}
                | {"device": start.get("device"), "torch": start.get("torch")})
    return out


def mean_curve(runs: list[dict]) -> list[tuple[int, float, float]]:
    """[(step, mean val_loss, mean train_time_ms)] over the validations that all runs have."""
    tables = [{step: (loss, ms) for step, loss, ms in r["curve"]} for r in runs]
    found = []
    for step in sorted(set(tables[0]).intersection(*tables[1:])):
        losses, times = zip(*(table[step] for table in tables))
        found.append((step, sum(losses) / len(tables), sum(times) / len(tables)))
    return found


def compare_arms(
    name: str, base: str, found: dict[str, list[dict]], paired: bool, confidence: float, goal: float = GOAL
) -> dict:
    """What the runs say about `name` against `base`: loss difference, time ratio, worth, runs to resolve
    `goal`."""
    from evidence import statistics
    new, old = found[name], found[base]
    out = {
        "arm": name, "baseline": base, "confidence": confidence, "loss": None, "time": None,
        "equivalent": None, "runs_to_resolve": None,
        "without_loss": {n: [r["run"] for r in found[n] if r["status"] != "finished"] for n in (name, base)}
    }
    if any(out["without_loss"].values()):
        return out
    if paired:
        new, old = (sorted(x, key=lambda r: r["seed"]) for x in (new, old))
    a, b = ([r["val_loss"] for r in x] for x in (new, old))
    loss = out["loss"] = statistics.difference(a, b, paired, confidence)
    times = [[r["train_time_ms"] for r in x] for x in (new, old)]
    if all(t is not None and t > 0 for x in times for t in x):
        out["time"] = statistics.ratio(*times, paired, confidence)
    curve = mean_curve(old)
    out["equivalent"] = statistics.equivalent(loss["estimate"], [p if p[2] else p[:2] for p in curve[1:]])
    if loss["p"] is not None and loss["df"] is not None and loss["high"] > loss["low"]:
        from scipy import stats
        se = (loss["high"] - loss["low"]) / 2 / stats.t.isf((1 - confidence) / 2, loss["df"])
        out["runs_to_resolve"] = statistics.runs_for(
            goal, float(se) * len(a) ** 0.5, (1 - confidence) / 2, POWER
        )
    return out


def analyse(claim: manifest.Claim) -> dict:
    """results.json of a comparison, from the manifest and the logs alone."""
    from evidence import statistics
    d, found = claim.declaration, outcomes(claim)
    base, *others = d["arms"]
    confidence = d.get("confidence", 0.95)
    # Bonferroni: the intervals of losses and of times, of all arms, hold together
    each = 1 - (1 - confidence) / (2 * len(others))
    rows = {}
    for name, runs in found.items():
        done = [r for r in runs if r["status"] == "finished"]
        about = {
            k: d["arms"][name].get(k) for k in ("text", "commit", "dirty", "ml_hash", "system_hash", "sha256")
        }
        rows[name] = {
            **about, "n": len(done),
            "loss": statistics.describe([r["val_loss"] for r in done]) if done else None,
            "time_ms": statistics.describe([r["train_time_ms"] for r in done]) if done else None,
            "runs": [{k: v for k, v in r.items() if k not in ("curve", "device", "torch")} for r in runs]
        }
    devices = sorted({r["device"] for runs in found.values() for r in runs if r["device"]})
    results = {
        "version": 1,
        "claim": d["claim"],
        "manifest": claim.last_hash,
        "scale": d["scale"],
        "pairing": d["pairing"],
        "confidence": confidence,
        "aa": d.get("aa", False),
        "baseline": base,
        "machine": d["machine"],
        "devices": devices,
        "torch": sorted({r["torch"] for runs in found.values() for r in runs if r["torch"]}),
        "goal": d["margin"],
        "complete": claim.complete,
        "arms": rows,
        "excluded": [
            {"run": r.run, "arm": r.arm, "cause": r.fault["cause"], "note": r.fault["note"]}
            for r in claim.runs if r.fault
        ],
        "comparisons": [
            compare_arms(n, base, found, d["pairing"] == "seed", each, d["margin"]) for n in others
        ],
    }
    for c in results["comparisons"]:
        c["verdict"] = verdict(c, results)
    results["notes"] = notes(d)
    return results


def verdict(c: dict, results: dict) -> str:
    """One sentence that says no more than the runs do."""
    name, base, n = c["arm"], c["baseline"], results["arms"][c["baseline"]]["n"]
    bad = {arm: runs for arm, runs in c["without_loss"].items() if runs}
    if bad:
        rows = results["arms"]
        return "no difference is claimed: " + " and ".join(
            f"{len(runs)} of {len(rows[arm]['runs'])} runs of {arm} have no final loss"
            for arm, runs in bad.items()
        )
    noise = "A/A test, so what follows is noise: " if results["aa"] else ""
    return f"{noise}{loss_words(c, name, base, n, results)}; {time_words(c, results)}"


def loss_words(c: dict, name: str, base: str, n: int, results: dict) -> str:
    """One sentence on the difference of final losses between two arms."""
    loss, level = c["loss"], f"{100 * c['confidence']:.4g} %"
    side = f"{abs(loss['estimate']):.4f} {'below' if loss['estimate'] < 0 else 'above'} {base}"
    kind = "pairs" if results["pairing"] == "seed" else "runs each"
    if loss["low"] is None:
        return f"{name} ends {side}, with no spread over {n} {kind} to judge it by"
    if loss["low"] == loss["high"] == 0:
        return f"the losses of {name} and {base} are equal in all {n} {kind}"
    interval = f"{level} interval {loss['low']:+.4f} to {loss['high']:+.4f}, {n} {kind}"
    if loss["low"] <= 0 <= loss["high"]:
        more = f"about {c['runs_to_resolve']}" if c["runs_to_resolve"] else "more than 10,000"
        return (f"unresolved: the loss of {name} minus that of {base} is {loss['estimate']:+.4f}, and its "
                f"interval includes 0 ({interval}); with this sd {more} runs per arm would resolve "
                f"{results['goal']:g}")
    low, high = sorted((abs(loss["low"]), abs(loss["high"])))
    words = f"{name} ends {side} ({level} interval {low:.4f} to {high:.4f}, {n} {kind})"
    worth = c["equivalent"]
    if worth["steps"] is not None:
        words += f", worth {digits(worth['steps'])} (+-{digits(worth['steps_se'])} from the slope) steps"
        if worth["seconds"] is not None:
            words += f" or {digits(worth['seconds'])} (+-{digits(worth['seconds_se'])}) s"
        return words + f" at the end of {base}'s curve"
    return words + f", its worth in steps unknown ({worth['reason']})"


def digits(value: float) -> str:
    """A positive size with about two digits."""
    return f"{abs(value):.0f}" if abs(value) >= 10 else f"{abs(value):.2g}"


def time_words(c: dict, results: dict) -> str:
    """One sentence on the ratio of training times between two arms."""
    time_, machine = c["time"], results["machine"]
    gpus = machine["gpus"]
    where = f"on {len(gpus)} x {gpus[0]}" if gpus else f"on {machine['cores']} cores of {machine['cpu']}"
    if time_ is None:
        return "its times are not compared: the logs hold none above zero"
    if time_["low"] is None:
        return (
            f"its training takes {time_['estimate']:.3f} times as long {where}, with no spread to judge it by"
        )
    interval = f"{time_['low']:.3f} to {time_['high']:.3f}"
    if time_["low"] <= 1 <= time_["high"]:
        return f"training times {where} are not told apart (ratio {time_['estimate']:.3f}, {interval})"
    return f"its training takes {time_['estimate']:.3f} times as long ({interval}) {where}"


def notes(declaration: dict) -> list[str]:
    """What the reader must know next to the numbers."""
    out, found = [], declaration["arms"]
    if not declaration["machine"]["gpus"]:
        out.append("times are of this machine's processor, which other programs may have used meanwhile")
    if any(a["dirty"] for a in found.values()):
        out.append("uncommitted code was run: the folder holds it as dirty-*.diff")
    if any(a["kind"] == "script" for a in found.values()):
        out.append("a script's data, seed and hardware are not in its log and were taken on trust")
    if any(a["kind"] == "record" and a["commit"] is None for a in found.values()):
        out.append("no git checkout: the code is known by the sources of the runs only")
    if declaration["claim"] == "comparison":
        level = 100 * declaration.get("confidence", 0.95)
        out.append(f"{2 * (len(found) - 1)} intervals, of losses and of times: each is wide enough "
                   f"(Bonferroni) for all to hold together at {level:.4g} %")
    return out


def report(results: dict) -> None:
    """The table, the verdicts, the notes."""
    def cell(value, scale, width, decimals):
        return format("-" if value is None else format(value * scale, f".{decimals}f"), f">{width}")

    print(f"\n   {'n':>3}  {'loss':>8}  {'sd':>7}  {'time s':>8}  {'sd':>7}  arm")
    for name, row in results["arms"].items():
        loss, ms = (row[k] or {"mean": None, "sd": None} for k in ("loss", "time_ms"))
        print(f"{name}  {row['n']:>3}  {cell(loss['mean'], 1, 8, 4)}  {cell(loss['sd'], 1, 7, 5)}  "
              f"{cell(ms['mean'], 1e-3, 8, 2)}  {cell(ms['sd'], 1e-3, 7, 3)}  {row['text']}")
    print()
    for c in results["comparisons"]:
        if c["loss"] and c["loss"]["correlation"] is not None:
            print(f"correlation of {c['arm']}'s losses with {c['baseline']}'s over seeds: "
                  f"{c['loss']['correlation']:.2f}")
        print(c["verdict"])
    for r in results["excluded"]:
        print(f"excluded: run {r['run']} ({r['arm']}), {r['cause']}: {r['note']}")
    for note in results["notes"]:
        print(f"note: {note}")
