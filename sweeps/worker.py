"""A sweep's worker: takes targets from a queue (sweeps/queue.py) and trains them,
one process per GPU or share of the CPU.

A run dies with its worker, however that ends, so a kill loses the runs in progress and nothing else. No torch
here.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import runlog
from common import files
from common.errors import UserError
from common.interrupt import held, hold, is_due
from settings import schema
from sweeps import queue
from sweeps.plan import flags_of, resolve

if TYPE_CHECKING:
    import submitit

FAILURES_IN_A_ROW = 3  # then the machine is at fault rather than the arms: the worker stops
# exit codes of the trainer that leave a complete log: reached or no target, missed, diverged
COMPLETE = (0, 3, 4)
POLL_S = 0.1
GRACE_S = 60  # for a run to end its step and its log


# ----- where runs go ----------------------------------------------------------------------------------------

def ask_gpus(what: str) -> list[list[str]]:
    """Rows of cells that nvidia-smi answers; [] if it cannot."""
    try:
        out = subprocess.run(["nvidia-smi", what, "--format=csv,noheader"], capture_output=True, text=True,
                             timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")]
            for line in out.stdout.splitlines()] if out.returncode == 0 else []


def free_gpus(named: str | None) -> list[str]:
    """GPUs to use, as for CUDA_VISIBLE_DEVICES; [] without any.

    named: those to use; otherwise the visible ones on which nothing runs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named or visible == "":
        return [g.strip() for g in (named or "").split(",") if g.strip()]
    present = dict(row for row in ask_gpus("--query-gpu=index,uuid") if len(row) == 2)
    wanted = [g.strip() for g in visible.split(",")] if visible else list(present)
    busy = {row[0] for row in ask_gpus("--query-compute-apps=gpu_uuid") if row}
    free = [g for g in wanted if present.get(g, g) not in busy]
    if wanted and not free:
        raise UserError(
            f"no free GPU: something runs on each of {', '.join(wanted)}; wait, or share some with --gpus 0,1"
        )
    return free


def slots(plan: dict, workers: int | None = None, gpus: str | None = None) -> list[dict[str, str]]:
    """Environment variables of each run at a time: a GPU each, or a share of the CPU's threads."""
    s = resolve(plan, plan["arms"][0]).settings
    found = [] if s.system.device == "cpu" else free_gpus(gpus)
    if found:
        if workers and workers > len(found):
            raise UserError(f"--workers {workers}: {len(found)} GPU{'s are' if len(found) > 1 else ' is'} "
                            "free; name GPUs twice in --gpus to share them")
        return [{"CUDA_VISIBLE_DEVICES": g} for g in found[:workers]]
    if plan["scale"] in ("full", "small") and s.system.device != "cpu":
        raise UserError(
            f"no GPU here, and scale {plan['scale']} needs one: choose --scale tiny, mini or micro, "
            "use --launcher slurm, or insist with --set system.device=cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(
        1, min(int(asked) if asked.isdecimal() and len(asked) < 10 else cores, cores // (workers or 1))
    )
    return [{"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}] * (workers or 1)


def trainer() -> str:
    """Path of the program that trains; tests have their own."""
    return os.environ.get("SPEEDRUN_SWEEP_TRAINER") or str(runlog.ROOT / "train_gpt.py")


def run_environment(slot: dict) -> dict:
    """Environment variables of a run on a slot."""
    return {**os.environ, **slot}


# ----- one run ----------------------------------------------------------------------------------------------

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def tie(parent: int, niceness: int) -> None:
    """In the child, before the trainer starts: low priority, and death with the worker (on Linux)."""
    if niceness > os.nice(0):
        os.nice(niceness - os.nice(0))
    if LIBC is not None:
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died in between
            os._exit(1)


class Run:
    """One claimed target and the process that trains it."""

    def __init__(
        self, root: Path, plan: dict, target: str, arm: dict, seed: int, claimed: tuple[int, str],
        slot: dict[str, str], niceness: int
    ) -> None:
        self.root, self.plan, self.slot = root, plan, slot
        self.target, self.arm, self.seed = target, arm, seed
        self.number, self.registered = claimed
        self.output = root / "output" / f"{target}.{self.number}"
        changes = [part for pair in flags_of(plan, arm) for part in pair]
        data = ["--data", plan["data"]] if plan["data"] else []
        command = [
            sys.executable, trainer(), arm["record"], "--scale", plan["scale"], *changes, *data, "--seed",
            str(seed), "--out", str((root / "runs").resolve()), "--registered", self.registered
        ]
        parent, self.asked = os.getpid(), False
        self.began = self.beaten = time.monotonic()
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                command, cwd=runlog.ROOT, env=run_environment(slot), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, process_group=0, preexec_fn=lambda: tie(parent, niceness))

    def stop(self) -> None:
        """End the process and all it started: politely, so that its log says `interrupted`, then not."""
        self.ask()
        deadline = time.monotonic() + GRACE_S
        while self.process.poll() is None:
            if time.monotonic() > deadline or is_due():
                self.send(signal.SIGKILL)
                self.process.wait()
            time.sleep(POLL_S)

    def ask(self) -> None:
        """Ask it once: a trainer that is asked twice stops at once."""
        if not self.asked:
            self.asked = True
            self.send(signal.SIGINT)

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def result(self) -> tuple[dict | None, str]:
        """(facts of the complete run folder with this claim's hash, '') or (None, why there is none)."""
        why = "it left no complete log"
        for path in reversed(files.listed(self.root / "runs", f"*_{self.arm['ml_hash'][:8]}_s{self.seed}*")):
            try:
                run = queue.read_run(path)
            except UserError as error:
                why = str(error)
                continue
            if run["registered"] == self.registered:
                others = list(queue.settled(self.root)[0].values())[:1]
                return run, queue.foreign(run, self.plan, self.arm, self.seed) or queue.unlike(run, others)
        return None, why

    def settle(self) -> tuple[str, dict]:
        """Record what the ended process left: a result, or the reason why there is none. Returns (kind,
        value)."""
        code = self.process.returncode
        run, why = self.result() if code in COMPLETE else (None, self.reason(code))
        about = {"target": self.target, "arm": self.arm["label"], "seed": self.seed, "utc": queue.utc()}
        kind, value = "done", run
        if why:
            kind, value = "failed", {"exit": code, "reason": why, "output": self.output.name}
        queue.write_once(self.root / kind / f"{self.target}.json",
                         files.json_text(about | value, indent=1) + "\n")
        if kind == "done":
            for output in files.listed(self.output.parent, f"{self.target}.*"):  # of earlier claims too
                output.unlink(missing_ok=True)
        return kind, value

    def reason(self, code: int) -> str:
        if code < 0:
            hint = "; out of memory, or somebody killed it" if code == -signal.SIGKILL else ""
            return f"killed by {signal.Signals(-code).name}{hint}"
        lines = [
            x for x in self.output.read_text(encoding="utf-8", errors="replace").splitlines() if x.strip()
        ]
        return f"exit {code}: {lines[-1][:300] if lines else 'it printed nothing'}"


# ----- all runs ---------------------------------------------------------------------------------------------

class Worker:
    """Runs targets of a queue, one at a time per slot, until all are settled.

    slots: see `slots`. say(line): told of every settled target. tick(done, failed, running): called ten times
    a second with the results so far and [(arm, seed, seconds)].
    """

    def __init__(
        self, root: Path | str, slots: list[dict[str, str]], *, niceness: int = 10,
        reuse: Sequence[Path | str] = (), stale_s: float = queue.STALE_S, say: Callable[[str], None] = print,
        tick: Callable[[dict, dict, list], None] = lambda *a: None
    ) -> None:
        self.root, self.plan = Path(root), queue.load_plan(root)
        queue.check_code(self.plan)
        if (self.root / queue.SEAL).exists():
            queue.seal(self.root)
        self.niceness, self.stale_s, self.say, self.tick = niceness, stale_s, say, tick
        self.folders = queue.reuse_folders(root, reuse)
        self.free, self.running, self.failures, self.pause_until = list(slots), [], 0, 0.0
        self.done, self.failed, self.todo, self.sources = {}, {}, [], runlog.sources()[1]

    def work(self) -> bool:
        """True when all targets are settled, False if it stopped early.

        KeyboardInterrupt (of SIGINT, SIGTERM or SIGHUP) stops the runs and gives the claims back.
        """
        try:
            while True:
                open_, trouble = self.look(), self.trouble() if self.free else ""
                if not self.running and not open_ and not self.screened():
                    return True
                if not self.running and trouble:
                    self.say(f"stopped: {trouble}")
                    return False
                if self.free and open_ and not trouble and time.monotonic() >= self.pause_until:
                    if self.begin(open_):
                        continue
                    # all are being run elsewhere
                    self.pause_until = time.monotonic() + min(2.0, self.stale_s / 4)
                self.tick(self.done, self.failed,
                          [(r.arm, r.seed, time.monotonic() - r.began) for r in self.running])
                time.sleep(POLL_S)
                for run in list(self.running):
                    self.attend(run)
        finally:
            with hold():
                self.stop()

    def stop(self) -> None:
        """End all runs, in order and at the same time, and give their claims back;
        at once if a signal comes meanwhile."""
        for run in self.running:
            run.ask()
        for run in self.running:
            run.stop()
            queue.release(self.root, run.target, run.number)

    def trouble(self) -> str:
        """Why no further run should start here; '' if all is well."""
        if self.failures >= FAILURES_IN_A_ROW:
            return (
                f"{self.failures} runs in a row failed here, so the machine may be at fault. Reasons are in "
                f"{self.root}/failed, outputs in {self.root}/output; then start again with --retry"
            )
        if runlog.sources()[1] != self.sources:
            return ("the trainer's code changed since this worker started, and a sweep mixes no programs. "
                    "Put the old code back, or plan the sweep anew in another --dir. A checkout of its own "
                    "(git worktree) keeps a long sweep apart from edits")
        return ""

    def look(self) -> list[tuple[str, dict, int]]:
        """Read what is settled; the targets that are not, and not run here."""
        self.done, self.failed = queue.settled(self.root, (self.done, self.failed))
        self.todo = queue.targets(self.plan, queue.survivors(self.root))
        mine = {r.target for r in self.running}
        return [
            t for t in self.todo if t[0] not in self.done and t[0] not in self.failed and t[0] not in mine
        ]

    def screened(self) -> bool:
        """Once the groups are settled, write down whose members are run.
        True if there was anything to decide."""
        if not self.plan["groups"] or (self.root / "survivors.json").exists():
            return False
        from sweeps.report import screen
        queue.verified(self.root, self.plan, self.done)
        queue.write_once(self.root / "survivors.json",
                         files.json_text(screen(self.plan, self.done), indent=1) + "\n")
        return True

    @held
    def begin(self, open_: list[tuple[str, dict, int]]) -> bool:
        """Claim the first target that nobody has, and run it, or settle it by a finished run.
        False if all are taken."""
        if open_:
            queue.seal(self.root)
        for target, arm, seed in open_:
            claimed = queue.claim(self.root, target, self.stale_s)
            if claimed is None:
                continue
            settled = any((self.root / folder / f"{target}.json").exists() for folder in ("done", "failed"))
            run = None if settled else queue.adopt(self.root, self.plan, target, arm, seed, self.folders)
            if run:
                self.say(f"{self.head(arm, seed)}  {run['val_loss']:.4f}  adopted {run['folder']}")
            if settled or run:
                queue.release(self.root, target, claimed[0])
            else:
                slot = self.free.pop()
                self.running.append(Run(self.root, self.plan, target, arm, seed, claimed, slot,
                                        self.niceness))
            return True
        return False

    def attend(self, run: Run) -> None:
        """Look after one process: a heartbeat while it runs, its result when it has ended."""
        if run.process.poll() is None:
            if time.monotonic() - run.beaten > self.stale_s / 6:
                run.beaten = time.monotonic()
                if not queue.beat(self.root, run.target, run.number):
                    run.stop()
                    self.drop(run)
                    self.say(f"{run.arm['label']}  seed {run.seed}  given up: while this worker slept "
                             "another one took it")
            return
        kind, value = run.settle()
        self.drop(run)
        queue.release(self.root, run.target, run.number)
        head = self.head(run.arm, run.seed)
        if kind == "failed":
            self.failures += 1
            self.say(f"{head}  FAILED: {value['reason']} (output: {run.output})")
        else:
            self.failures = 0
            loss = f"{value['val_loss']:.4f}" if value["status"] == "finished" else value["status"]
            self.say(f"{head}  {loss}  ({time.monotonic() - run.began:.1f} s)")
        self.look()

    def drop(self, run: Run) -> None:
        self.running.remove(run)
        self.free.append(run.slot)

    def head(self, arm: dict, seed: int) -> str:
        """The beginning of the line on a target that has just been settled: its number, arm and seed."""
        before = sum(t in self.done or t in self.failed for t, _, _ in self.todo)
        return f"[{before + 1}/{len(self.todo)}] {arm['label']}  seed {seed}"


# ----- other machines ---------------------------------------------------------------------------------------

def executor(launcher: str, folder: Path) -> "submitit.Executor":
    """submitit's executor for Slurm, or for processes on this machine."""
    import submitit
    if launcher == "slurm" and submitit.SlurmExecutor.affinity() < 0:
        raise UserError("--launcher slurm: there is no Slurm here (no srun); start it on a login node, or "
                        "leave it out to run on this machine")
    return (submitit.SlurmExecutor if launcher == "slurm" else submitit.LocalExecutor)(folder=folder)


def submit(
    launcher: str, root: Path, plan: dict, workers: int, parameters: list[str], arguments: list[str]
) -> "list[submitit.Job]":
    """Submit `sweep.py work` jobs; returns submitit's jobs. parameters: "name=value" texts of the executor.

    arguments: flags of `sweep.py work`. Each job of a GPU scale gets one GPU unless the parameters say
    otherwise.
    """
    from submitit.helpers import CommandFunction
    jobs = executor(launcher, root / "jobs")
    wanted = {"gpus_per_node": 1} if plan["scale"] in ("full", "small") else {}
    wanted |= {"job_name": plan["name"]} if launcher == "slurm" else {"timeout_min": 30 * 24 * 60}
    wanted |= dict(schema.parse_assignment(text, "--slurm") for text in parameters)
    try:
        jobs.update_parameters(**wanted)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"--slurm: {' '.join(str(error).split())}") from None
    command = [sys.executable, str(runlog.ROOT / "sweep.py"), "work", str(Path(root).resolve()), *arguments]
    return [jobs.submit(CommandFunction(command, verbose=False)) for _ in range(workers)]
