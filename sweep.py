"""Ablations and sweeps: many runs of one record and its changes on any number of workers, with intervals that
hold at once.

    python sweep.py ablate short/11 --scale micro --seeds 4          # every feature off in turn
    python sweep.py axis short/11 optim.muon.lr=0.02,0.08 optim.scalar.lr=0.02,0.08      # every combination
    python sweep.py chain short/1..short/11 --seeds 4                # every record against its parent
    python sweep.py chain variants --scale tiny --seeds 4            # the same of a whole lineage
    python sweep.py optimizers --scale tiny --seeds 4                # update rules, each with a tuned rate
    python sweep.py work DIR       # one more worker on the same queue: another GPU or machine
    python sweep.py ablate short/11 --scale small --dry-run          # disk, memory, hours; no data, no GPU
    python sweep.py power --sd 0.0088 --effect 0.005                 # seeds that an effect needs
    python sweep.py status DIR     # the table so far
    python sweep.py report DIR --out evidence/results/ablate_11      # JSON, CSV, Markdown, PNG

The same command again goes on where it stopped: finished runs are never repeated, failures only with --retry.
Values of an axis are literal values of the scaled run, as with --set; for one axis at a time make a sweep
each and let --reuse share the runs. Exit codes: 0 done, 1 done or stopped with failures, 2 bad input, 130
interrupted. sweeps/plan.py says what is run, sweeps/queue.py how a queue works, sweeps/report.py what is
concluded.
"""

from common import environment  # first: refuses a Python that is too old

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from common import arguments, console, files, lines
from common.errors import UserError
from settings.scales import SCALES
from sweeps import forecast, queue
from sweeps.plan import is_inert, make_plan, pairs_of

if TYPE_CHECKING:
    from rich.table import Table


# ----- before the start -------------------------------------------------------------------------------------

@lines.fitted()
def print_plan(plan: dict, options: argparse.Namespace, root: Path, slots: list[dict[str, str]]) -> None:
    """What will be run, what it can show, how long it takes and what it costs."""
    print(
        f"{plan['kind']} {plan['base']} at scale {plan['scale']}{''.join(' ' + c for c in plan['common'])}: "
        f"{lines.plural(len(pairs_of(plan)), 'comparison')}, {lines.plural(plan['seeds'], 'seed')} an "
        f"arm, {lines.plural(plan['controls'], 'run')} of the control "
        f"{plan['arms'][0]['label']}{', paired by seed' if plan['paired'] else ''}"
    )
    if plan["kind"] == "ablate":
        print(f"screening: {plan['screening']}")
    inert = [a["label"] for a in plan["arms"][1:] if is_inert(plan, a)]
    if inert:
        print(f"inert at scale {plan['scale']} (computes the same as what it is compared with; not run): "
              f"{', '.join(inert)}")
    for skipped in plan["skipped"]:
        print(f"not switched off: {skipped['feature']}: {skipped['reason']}")
    print_power(plan, options.sd)
    if options.plan:
        for line in forecast.lines_before(plan):
            print(line)
    print_effort(plan, options, root, slots)


def print_power(plan: dict, stated: float | None) -> None:
    """Print the smallest effect that the plan can resolve."""
    from sweeps.report import detectable, earlier_sd
    known = None if stated else earlier_sd(plan)
    kind = "sd of differences within seeds" if plan["paired"] else "sd"
    if stated or known:
        sd, where = (stated, "as stated") if stated else (known[0], source_of(known, plan["paired"]))
        least = detectable(plan, sd)
        print(
            f"minimal detectable effect: {least:.4f} nats at 80 % power, from {kind} {sd:.4f} ({where})"
            if least
            else "minimal detectable effect: none, one run an arm shows no spread and gives no interval"
        )
    elif (least := detectable(plan, 1.0)) is not None:
        print(f"minimal detectable effect: {least:.2f} sd{' of differences within seeds' * plan['paired']} "
              "at 80 % power; no earlier sweep tells the sd (--sd states one)"
              + ("" if plan["paired"] else ", so the nats follow after the first controls"))
    else:
        print("minimal detectable effect: none, one run an arm shows no spread and gives no interval")


def source_of(known: tuple[float, int, list[str]], paired: bool) -> str:
    """Where earlier_sd has its sd from, in words."""
    _, count, names = known
    return (f"median of {count} comparisons in " if paired else "of ") + ", ".join(names) + (
        "" if paired else f", {count} df")


def print_effort(plan: dict, options: argparse.Namespace, root: Path, slots: list[dict[str, str]]) -> None:
    """Print how many runs are left and how long they take."""
    workers = len(slots)
    done, failed = queue.settled(root)
    survivors = queue.survivors(root)
    todo = queue.targets(plan, survivors)
    later = (
        sum(a["role"] == "member" for a in plan["arms"]) * plan["seeds"]
        if plan["groups"] and survivors is None else 0
    )
    left = [t for t in todo if t[0] not in done and t[0] not in failed]
    ready = [t for t in left if queue.find_run(queue.reuse_folders(root, options.reuse), plan, *t[1:])]
    left = len(left) - len(ready)
    print(f"runs: {len(todo)}{f' and at most {later} of group members' if later else ''}; {len(done)} done, "
          f"{len(failed)} failed, {f'{len(ready)} to adopt, ' if ready else ''}{left} to do, {workers} at a "
          "time")
    places = [root / "runs", *options.reuse, options.runs, *files.listed(options.runs, "*/runs")]
    seconds, source = forecast.expected(plan, places, options.plan and left + later > 0, slots[0])
    if seconds is None:
        print(
            f"expected time{' and cost' if options.cost_per_hour else ''}: told after the first run, {source}"
        )
        return
    hours, price = (left + later) * seconds / 3600, options.cost_per_hour
    print(f"expected time: {hours / workers:.2f} h ({seconds:.1f} s a run, {source})"
          + (f"; cost {hours * price:.2f} at {price:g} a worker's hour" if price else ""))


# ----- while it runs ----------------------------------------------------------------------------------------

class View:
    """A live table when stdout is a terminal, otherwise a line per run; and what the first runs tell about
    the rest."""

    def __init__(
        self, plan: dict, root: Path, workers: int, cost_per_hour: float | None = None,
        sd: float | tuple[float, int, list[str]] | None = None
    ) -> None:
        self.plan, self.root, self.workers = plan, root, workers
        self.cost, self.sd_known = cost_per_hour, bool(sd)
        self.live, self.drawn, self.walls = None, 0.0, []
        if sys.stdout.isatty():
            from rich.live import Live
            # no thread: the worker forks
            self.live = Live(auto_refresh=False, transient=True, vertical_overflow="crop")
            self.live.start()

    def say(self, line: str) -> None:
        if self.live:
            self.live.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def tick(
        self, done: dict[str, dict], failed: dict[str, dict], running: list[tuple[dict, int, float]]
    ) -> None:
        """Called often; draws about once a second."""
        first = not self.walls
        self.walls = [r["wall_ms"] / 1000 for r in done.values() if "adopted_from" not in r]
        if first and self.walls:
            self.say(self.remaining(done, failed))
        if not self.sd_known:
            self.tell_mde(done)
        if self.live and time.monotonic() - self.drawn > 1:
            self.drawn = time.monotonic()
            self.live.update(self.table(done, failed, running), refresh=True)

    def remaining(self, done: dict[str, dict], failed: dict[str, dict]) -> str:
        todo = queue.targets(self.plan, queue.survivors(self.root))
        left = sum(t not in done and t not in failed for t, _, _ in todo)
        hours = left * sorted(self.walls)[len(self.walls) // 2] / 3600
        return (f"about {hours / self.workers:.2f} h left if nobody else works on it"
                + (f", cost {hours * self.cost:.2f}" if self.cost else ""))

    def tell_mde(self, done: dict[str, dict]) -> None:
        from evidence import statistics
        from sweeps.report import detectable, losses, runs_of
        values = losses(runs_of(self.plan, self.plan["arms"][0], done))
        if len(values) >= max(2, min(4, self.plan["controls"])):
            self.sd_known = True
            sd = statistics.describe(values)["sd"]
            least = detectable(self.plan, sd) if sd else None
            if least is not None:  # None: one run an arm shows no spread
                self.say(f"minimal detectable effect: about {least:.4f} nats at 80 % "
                         f"power, from the sd {sd:.4f} of the first {len(values)} controls")

    def table(
        self, done: dict[str, dict], failed: dict[str, dict], running: list[tuple[dict, int, float]]
    ) -> "Table":
        from rich import box
        from rich.table import Table
        from sweeps.report import losses, runs_of
        todo = queue.targets(self.plan, queue.survivors(self.root))
        settled = sum(t in done or t in failed for t, _, _ in todo)
        t = Table(
            box=box.SIMPLE_HEAD, title_justify="left",
            title=f"{self.plan['name']}  {settled}/{len(todo)} runs, {len(failed)} failed, "
            + (self.remaining(done, failed) if self.walls else "timing the first run")
        )
        for name in ("arm", "n", "mean", "minus control", "now"):
            t.add_column(name, justify="left" if name in ("arm", "now") else "right")
        control = losses(runs_of(self.plan, self.plan["arms"][0], done))
        for a in self.plan["arms"]:
            values = losses(runs_of(self.plan, a, done))
            mean = sum(values) / len(values) if values else None
            effect = f"{mean - sum(control) / len(control):+.4f}" if values and control else ""
            now = ", ".join(
                f"seed {seed}, {seconds:.0f} s" for b, seed, seconds in running if b["label"] == a["label"]
            )
            if values or now:
                t.add_row(a["label"], str(len(values)), "" if mean is None else f"{mean:.4f}", effect, now)
        return t

    def close(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None


# ----- commands ---------------------------------------------------------------------------------------------

def start(options: argparse.Namespace) -> int:
    """ablate, axis, chain: plan, tell, and run or go on."""
    from sweeps import worker
    plan = make_plan(options)
    root = Path(options.dir or Path(options.runs) / plan["name"])
    queue.reuse_folders(root, options.reuse)
    here = options.launcher == "here"
    if options.plan:
        print_plan(plan, options, root, planned_slots(plan, options))
        return console.settle()
    slots = worker.slots(plan, options.workers, options.gpus) if here else [{}] * (options.workers or 1)
    if not here:
        worker.executor(options.launcher, root / "jobs")  # refuses before there is a queue
    environment.check_training()
    new = queue.create(root, plan)
    plan = queue.load_plan(root)
    prepare(plan, root, options)
    print_plan(plan, options, root, slots)
    print(f"{'queue' if new else 'going on with the queue'}: {root}", flush=True)
    return run_queue(options, root, plan, slots) if here else submit(options, root, plan)


# what the tuning is, whatever is asked
TUNE = {"kind": "tune", "seeds": 1, "controls": None, "paired": True}


def optimizers(options: argparse.Namespace) -> int:
    """`sweep.py optimizers`: tune the learning rate of every rule, then compare the rules."""
    from sweeps.optimizers import chosen, comparison, read_rules, tuning
    options.base = read_rules(options.rules)[1][0].record
    root = Path(options.dir or Path(options.runs) / f"optimizers_{options.scale or 'micro'}")
    tune = vars(options) | TUNE | {"dir": str(root / "tune"), "fill": tuning}
    if code := start(argparse.Namespace(**tune)):
        return code
    if options.plan:
        print(f"then the comparison: every rule with its best learning rate, {options.seeds} seeds each")
        return 0
    plan = queue.load_plan(root / "tune")
    options.chosen = chosen(plan, queue.settled(root / "tune")[0])
    for rule, (factor, note) in options.chosen.items():
        print(f"{rule}: learning rate x{factor:g}{f' ({note})' if note else ''}")
    options.dir, options.fill = str(root / "comparison"), comparison
    return start(options)


def planned_slots(plan: dict, options: argparse.Namespace) -> list[dict[str, str]]:
    """Slots of a dry run: those of this machine, or as many as were asked for where it cannot run the
    plan."""
    from sweeps import worker
    try:
        return worker.slots(plan, options.workers, options.gpus)
    except UserError:
        return [{}] * (options.workers or 1)


def prepare(plan: dict, root: Path, options: argparse.Namespace) -> None:
    """--retry, and --reuse of what is finished already."""
    if options.retry:
        print(f"{queue.retry(root)} failed targets will run again")
    if options.reuse:
        done, failed = queue.settled(root)
        folders = queue.reuse_folders(root, options.reuse)
        found = [
            queue.adopt(root, plan, *t, folders)
            for t in queue.targets(plan, queue.survivors(root))
            if t[0] not in done and t[0] not in failed
        ]
        print(f"adopted {sum(x is not None for x in found)} finished runs from {', '.join(options.reuse)}")


def run_queue(options: argparse.Namespace, root: Path, plan: dict, slots: list[dict[str, str]]) -> int:
    """Work until the queue is empty; then the report."""
    from sweeps import worker
    from sweeps.report import earlier_sd
    niceness = options.nice if options.nice is not None else (0 if slots[0]["CUDA_VISIBLE_DEVICES"] else 10)
    sd = getattr(options, "sd", None) or plan["paired"] or earlier_sd(plan)
    view = View(plan, root, len(slots), getattr(options, "cost_per_hour", None), sd)
    try:
        whole = worker.Worker(
            root, slots, niceness=niceness, reuse=options.reuse, stale_s=options.stale, say=view.say,
            tick=view.tick
        ).work()
    except KeyboardInterrupt:
        view.close()
        print(f"interrupted; the same command, or `python sweep.py work {root}`, goes on", file=sys.stderr)
        return 130
    finally:
        view.close()
    return conclude(root) if whole else 1


def submit(options: argparse.Namespace, root: Path, plan: dict) -> int:
    """The queue worked on by submitit's jobs; those on this machine are waited for."""
    from sweeps import worker

    arguments = ["--stale", str(options.stale)] + (
        ["--nice", str(options.nice)] if options.nice is not None else []
    )
    arguments += [part for folder in options.reuse for part in ("--reuse", str(Path(folder).resolve()))]
    jobs = worker.submit(options.launcher, root, plan, options.workers or 1, options.slurm, arguments)
    print(f"{len(jobs)} job{'s' if len(jobs) > 1 else ''} submitted: {', '.join(j.job_id for j in jobs)}; "
          f"their output is in {root / 'jobs'}, the table in `python sweep.py status {root}`", flush=True)
    if options.launcher == "slurm":
        return 0
    try:
        for job in jobs:
            job.wait()
    except KeyboardInterrupt:
        for job in jobs:  # each is a worker, which stops its runs and gives its claims back
            job.cancel(check=False)
        print(f"interrupted; the same command, or `python sweep.py work {root}`, goes on", file=sys.stderr)
        return 130
    failed = [
        f"{j.job_id}: {str(j.exception()).strip().splitlines()[-1]}" for j in jobs
        if j.exception() is not None
    ]
    if failed:
        raise UserError(f"jobs failed ({'; '.join(failed)}); see {root / 'jobs'}")
    return conclude(root)


def conclude(root: Path) -> int:
    """Report files and table of a queue that has come to its end. Exit code 1 if anything failed."""
    from sweeps.report import print_table, report
    _, failed = queue.settled(root)
    print_failures(root, failed, sys.stderr)
    try:
        found, paths = report(root)
    except UserError as error:
        if not failed:
            raise
        print(f"no report: {error}", file=sys.stderr)
        return 1
    print_table(found)
    print("report: " + ", ".join(map(str, paths)))
    return 1 if failed or not found["complete"] else 0


def print_failures(root: Path, failed: dict[str, dict], file: TextIO) -> None:
    """Print one line for each failed run."""
    for f in failed.values():
        print(
            f"failed: {f['arm']}  seed {f['seed']}: {f['reason']} ({root / 'output' / f['output']})",
            file=file,
        )


def work(options: argparse.Namespace) -> int:
    """`sweep.py work`: one more worker on a queue."""
    from sweeps import worker
    root = Path(options.dir)
    plan = queue.load_plan(root)
    environment.check_training()
    slots = worker.slots(plan, options.workers, options.gpus)
    prepare(plan, root, options)
    return run_queue(options, root, plan, slots)


def status(options: argparse.Namespace) -> int:
    """The table so far, who works on what, and what failed."""
    from sweeps.report import collect, evidence, print_table
    root = Path(options.dir)
    plan, done, failed, survivors = collect(root)
    todo = queue.targets(plan, survivors)
    print_table(evidence(plan, done, failed, survivors, plan["name"]))
    for target, a, seed in todo:
        number = queue.last_claim(root, target)
        settled = target in done or target in failed
        if number and not settled and not queue.is_stale(root, target, number, options.stale):
            owner = queue.read_json(queue.claim_path(root, target, number),
                                    "move it away, its target runs again", ["host", "pid", "utc"])
            print(f"running: {a['label']}  seed {seed} on {owner['host']} (process {owner['pid']}) since "
                  f"{owner['utc']}")
    print_failures(root, failed, sys.stdout)
    print(f"{sum(t in done for t, _, _ in todo)} of {len(todo)} runs done, {len(failed)} failed")
    return console.settle()


def report(options: argparse.Namespace) -> None:
    """`sweep.py report`: write a sweep's report files and print its table."""
    from sweeps.report import print_table, report as write_report
    found, paths = write_report(Path(options.dir), options.out)
    print_table(found)
    print("report: " + ", ".join(map(str, paths)))


def power(options: argparse.Namespace) -> None:
    """How many seeds an effect needs, and what a few seeds can show."""
    from evidence import statistics
    from sweeps.report import earlier_sd

    about = {"version": 1, "scale": options.scale, "common": [], "paired": options.paired}
    known = None if options.sd else earlier_sd(about)
    if options.sd is None and known is None:
        raise UserError(f"no sd of final losses was measured at scale {options.scale}: state one with --sd, "
                        "from `records compare RECORD RECORD --aa --pairing none --runs 4 --scale "
                        f"{options.scale}`")
    sd, where = (options.sd, "as stated") if options.sd else (known[0], source_of(known, options.paired))
    print(f"sd {sd:.5f} nats{' of differences within seeds' * options.paired} ({where}), {options.arms} "
          f"arm{'s' if options.arms > 1 else ''} against one control of the same number of runs, "
          f"{'' if options.paired else 'not '}paired, any row wrongly resolved in at most "
          f"{100 * (1 - options.confidence):.3g} % of sweeps, 80 % power")
    need = statistics.seeds_for(options.effect, sd, options.arms, options.confidence, paired=options.paired)
    print(
        f"an effect of {options.effect:g} nats needs "
        + (f"{need} seeds an arm" if need else f"more than {statistics.MOST_RUNS:,} seeds an arm")
    )
    for n in (2, 4, 8, 16, 32):
        least = statistics.minimal_detectable_effect(
            sd, n, n, options.arms, options.confidence, paired=options.paired)
        print(f"  {n:>2} seeds show {least:.4f} nats")


def predictions(options: argparse.Namespace) -> None:
    """`sweep.py predictions`: published effects against measured ones."""
    from evidence import predictions as table
    table.command(options)


# ----- command line -----------------------------------------------------------------------------------------

positive = arguments.number(1e-9)


def working(p: arguments.Parser) -> None:
    """Flags of everything that trains."""
    p.add_argument(
        "--workers", type=arguments.integer(1, 1024), metavar="N",
        help="runs at a time (default one per free GPU; on a CPU 1, threads are divided)"
    )
    p.add_argument(
        "--gpus", metavar="0,1", help="GPUs to use, one run each (default those on which nothing runs)"
    )
    p.add_argument(
        "--nice", type=arguments.integer(0, 19), metavar="N",
        help="priority of the runs (default 10 on a CPU, 0 on GPUs)"
    )
    p.add_argument(
        "--reuse", action="append", default=[], metavar="DIR",
        help="adopt finished runs found here (repeatable)"
    )
    p.add_argument("--retry", action="store_true", help="run failed targets again")
    p.add_argument(
        "--stale", type=positive, default=queue.STALE_S, metavar="S",
        help="take over claims that gave no sign "
        f"for so many seconds (default {queue.STALE_S}; keep it above the attribute cache of a network disk)"
    )


def planning(p: arguments.Parser) -> None:
    """Flags of everything that plans."""
    p.add_argument("--scale", choices=list(SCALES), help="default micro, or the preset's")
    p.add_argument(
        "--seeds", type=arguments.runs, default=4, metavar="N", help="runs of every arm (default 4)"
    )
    p.add_argument(
        "--controls", type=arguments.runs, metavar="N",
        help="runs of the control (default as many as --seeds; more of them compare arms by their means, as "
        "--no-paired does with sqrt(arms) x seeds of them)"
    )
    p.add_argument(
        "--paired", action=argparse.BooleanOptionalAction,
        help="effects are differences within seeds (default), or differences of means, which need no "
        "correlation of the seeds; written into the plan before the first run"
    )
    p.add_argument(
        "--confidence", type=arguments.confidence, default=0.95,
        help="of all rows together (default 0.95)"
    )
    for flag in ("set", "with", "without", "revert"):
        p.add_argument(f"--{flag}", dest=f"all_{flag}", action="append", default=[], metavar="CHANGE",
                       help="in every arm, as in train_gpt.py")
    p.add_argument("--data", metavar="DIR", help="folder of shards, as in train_gpt.py")
    p.add_argument("--dir", metavar="DIR", help="the queue's folder (default RUNS/<name of the sweep>)")
    p.add_argument(
        "--runs", default="runs", metavar="RUNS", help="where queues and earlier runs lie (default runs)"
    )
    p.add_argument(
        "--sd", type=positive,
        help="sd of the differences within seeds (--no-paired: of final losses), for the detectable effect "
        "(default: earlier sweeps')"
    )
    p.add_argument(
        "--cost-per-hour", type=positive, metavar="X", help="price of a worker's hour, in any currency"
    )
    p.add_argument(
        "--dry-run", "--plan", dest="plan", action="store_true",
        help="print the plan, with data, memory and hours, and "
        "start nothing (where no run was timed yet a trial of ten steps)"
    )
    p.add_argument(
        "--launcher", choices=("here", "slurm", "local-submitit"), default="here",
        help="slurm: --workers jobs through submitit; local-submitit: the same as processes on this machine"
    )
    p.add_argument(
        "--slurm", action="append", default=[], metavar="NAME=VALUE",
        help="parameter of submitit's executor, like partition=gpu, time=600, gpus_per_node=1 (repeatable)"
    )
    working(p)


def powering(c: arguments.Parser) -> None:
    """Options of `sweep.py power`."""
    c.add_argument(
        "--effect", type=positive, default=0.005, metavar="NATS",
        help="the difference to resolve (default 0.005)"
    )
    c.add_argument(
        "--sd", type=positive,
        help="sd of the differences within seeds, or with --no-paired of final losses (default: of the "
        "committed sweeps at this scale)"
    )
    c.add_argument(
        "--paired", action=argparse.BooleanOptionalAction, default=True,
        help="differences within seeds (default), or differences of means"
    )
    c.add_argument(
        "--scale", choices=list(SCALES), default="tiny", help="of the sweeps that give the sd (default tiny)"
    )
    c.add_argument(
        "--arms", type=arguments.runs, default=1, metavar="N",
        help="arms that are compared with the control (default 1)"
    )
    c.add_argument(
        "--confidence", type=arguments.confidence, default=0.95,
        help="of all rows together (default 0.95)"
    )


def parser() -> arguments.Parser:
    """The commands of sweep.py."""
    p = arguments.Parser(
        prog="sweep.py", description="Ablations and sweeps, with intervals that hold for all rows.",
        epilog="Exit codes: 0 done, 1 done or stopped with failures, 2 bad input, 130 interrupted."
    )
    commands = p.add_subparsers(dest="kind", required=True, metavar="COMMAND")

    def add(name, run, help):
        c = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        c.set_defaults(run=run)
        return c

    c = add("ablate", start, "every feature of a record off in turn")
    c.add_argument("base", metavar="RECORD", help="record or preset")
    c.add_argument(
        "--features", nargs="+", default=[], metavar="PATH", help="only these, or all below these sections"
    )
    c.add_argument(
        "--screen", action=argparse.BooleanOptionalAction,
        help="all features of a section off at once first, "
        "and apart only where that has an effect (default: where it saves runs)"
    )
    planning(c)
    c = add("axis", start, "every combination of values of some settings")
    c.add_argument("base", metavar="RECORD", help="record or preset")
    c.add_argument("axes", nargs="+", metavar="PATH=A,B,...", help="literal values of the scaled run")
    planning(c)
    c = add("chain", start, "every record of a chain or of a lineage against its parent")
    c.add_argument(
        "base", metavar="FIRST..LAST", help="like short/1..short/11; or a whole lineage, like variants"
    )
    planning(c)
    c = add("optimizers", optimizers, "update rules with tuned learning rates: steps to the baseline's loss")
    c.add_argument("--rules", metavar="FILE", help="table of rules (default sweeps/optimizers.toml)")
    planning(c)
    powering(add("power", power, "how many seeds an effect needs"))
    c = add("work", work, "one more worker on a queue")
    c.add_argument("dir", metavar="DIR", help="folder of a sweep")
    working(c)
    c = add("status", status, "the table of a sweep so far, who works on what, and what failed")
    c.add_argument("dir", metavar="DIR", help="folder of a sweep")
    c.add_argument(
        "--stale", type=positive, default=queue.STALE_S, metavar="S",
        help=f"seconds without a sign after which a run counts as dead (default {queue.STALE_S})"
    )
    c = add("report", report, "write a sweep's JSON, CSV, Markdown and PNG")
    c.add_argument("dir", metavar="DIR", help="a sweep's folder, or a report's .json to be stated anew")
    c.add_argument("--out", metavar="NAME", help="path without ending (default DIR/<name of the sweep>)")
    c = add("predictions", predictions, "published effects against those of chains and ablations")
    c.add_argument("reports", nargs="*", metavar="REPORT", help="a report's .json (default: all committed)")
    c.add_argument("--markdown", action="store_true", help="tables as Markdown")
    c.add_argument("--json", metavar="FILE", help="also write the tables there, for programs")
    return p


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command line; exits with the codes that its help names."""
    options = parser().parse_args(argv)
    try:
        sys.exit(options.run(options) or 0)
    except UserError as error:
        console.fail(error)
    except ImportError as error:
        console.fail(environment.without(error))
    except OSError as error:
        console.fail(f"{error.filename or 'the queue'}: {error.strerror or error}; what is finished is kept, "
                    "mend it and give the same command again")
    except KeyboardInterrupt:
        console.fail("interrupted before the first run", 130)


if __name__ == "__main__":
    console.program(main)
