"""Checkpoints to resume from: everything that training changes, in one file in RUN/checkpoints.

A file is torch's own (`torch.load(..., weights_only=True)`): {"version", "digest", "about", "tensors"}, where
`about` is JSON and the digest covers all of the rest. Tensors are whole, named after parameters, and without
padding, so another number of processes can continue. torch.distributed.checkpoint would write in parallel,
but its files follow the shards of the processes that wrote them, have no digest over the whole, and are not
one rename; a state of 1.5 GB is gathered in a tenth of a second.

A file appears whole or not at all (common.files). The copy of the state is made between two steps, on a GPU
without waiting for it; digest and file are made by a thread next to the training. What is kept, in full:

    parameters and their optimizer state        Optimizer.full_tensors, update_counts
    buffers of the model, state of the hooks    hooks.beside_optimizer
    position and digests of the token stream    Stream.rank_digests; a resumed run reads the tokens again
    batches that were skipped, rescue           Run.rewinds; the history by which a rescue judges
    clock, CPU meter, validation losses, epoch, training losses and gradient norms since the last validation
    random generators
    hash of the run's log                       so that a checkpoint of another run is not used

Gradients are not kept: where a group is updated every other step, a checkpoint waits for a step after which
no gradient is left.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import runlog
from common import files
from common.errors import UserError
from settings import schema
from system import guards
from system.heartbeat import Heartbeat, beaten
from system.hooks import beside_optimizer
from system.resume import CHECKPOINTS as FOLDER
from system.run import Run
from system.world import World

VERSION = 1
PATTERN = "step*.pt"
ROOM = 1.05  # free space that a checkpoint needs, in its own bytes
AHEAD = 2  # steps
DIGESTS = "guard/digests"
# what may have changed since a run began; the event `resume` tells it again
CONTINUES = (
    "system_hash", "processes", "device", "torch", "code", "machine", "cpu", "cores", "comm", "attention"
)


# ----- the state of a run -----------------------------------------------------------------------------------

def state(run: Run) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole tensor) of everything that training changes. Collective.

    Tensors are on their device and may be those of the training.
    """
    for name, x in run.optimizer.full_tensors():
        yield f"optimizer/{name}", x
    for name, (x, per_rank) in beside_optimizer(run.model, run.hooks).items():
        yield f"hook/{name}", run.world.gather(x) if per_rank else x
    losses = torch.stack(run.train_losses) if run.train_losses else torch.zeros(
        0, dtype=torch.float64, device=run.world.device
    )
    yield "train_losses", torch.stack(run.world.parts(losses))  # (processes, steps) float64
    yield "gradient_norms", run.guards.norms_so_far()  # (steps,) float64
    yield "generator/cpu", torch.get_rng_state()
    if run.world.cuda:
        yield "generator/cuda", torch.cuda.get_rng_state()
    yield DIGESTS, run.guards.digests()  # (processes, banks) int64


def about(run: Run, step: int) -> dict[str, Any]:
    """What else a run needs to continue before this step, as plain JSON values. Collective."""
    run.batches.drain()
    parts = run.world.gather_objects(run.stream.rank_digests(run.position(step)))
    digests = {rank: digest for part in parts for rank, digest in part.items()}
    meter = run.clock.meter
    return {
        "step": step, "ml_hash": schema.ml_hash(run.s), "seed": run.log.events[0]["seed"],
        "processes": run.world.size, "updates": run.optimizer.update_counts(),
        "digests": {str(rank): digest for rank, digest in sorted(digests.items())},
        "clock_ms": run.clock.read_ms(), "meter": [meter.own_s, meter.wall_s, meter.machine_s],
        "points": run.points, "epoch": run.epoch, "rewinds": run.rewinds,
        "rescue": run.rescue.state() if run.rescue is not None else None,
        "log": [len(run.log.events), run.log.previous]
    }


def restore(run: Run, found: "Found") -> None:
    """Put the state of a checkpoint into a run: after its warm-up, or later to go back. Collective.

    UserError if the program's tensors are others.
    """
    tensors, kept = dict(found.tensors), found.about
    own = {name.removeprefix("optimizer/"): x for name, x in tensors.items() if name.startswith("optimizer/")}
    for hook in run.hooks:
        hook.reset()
    try:
        run.optimizer.load(own, kept["updates"])
        for name, (x, per_rank) in beside_optimizer(run.model, run.hooks).items():
            given = tensors[f"hook/{name}"]
            given = given.chunk(run.world.size)[run.world.rank] if per_rank else given
            if given.shape != x.shape or given.dtype != x.dtype:
                raise ValueError(
                    f"{name}: {tuple(given.shape)} {given.dtype}, here {tuple(x.shape)} {x.dtype}"
                )
            with torch.no_grad():
                x.copy_(given)
    except (KeyError, ValueError) as error:
        raise UserError(f"{found.path}: does not fit this program ({error}): resume with the checkout that "
                        "wrote it") from None
    for hook in run.hooks:
        hook.restored()
    torch.set_rng_state(tensors["generator/cpu"])
    if run.world.cuda and "generator/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["generator/cuda"])
    losses = tensors["train_losses"]
    losses = losses[run.world.rank] if len(losses) == run.world.size else losses.mean(0)
    run.train_losses = list(losses.to(run.world.device))
    run.points = [tuple(point) for point in kept["points"]]
    run.epoch, run.steps_done, run.first_step = kept["epoch"], kept["step"], kept["step"]
    # checkpoints of earlier versions have none of these
    run.rewinds = [tuple(x) for x in kept.get("rewinds", ())]
    run.kept_norms, run.kept_rescue = tensors.get("gradient_norms"), kept.get("rescue")


# ----- files ------------------------------------------------------------------------------------------------

def digest_of(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of the text and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Through:
    """A file for torch.save, which hides what the system said behind an error of its own."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, kept: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Write a checkpoint, whole or not at all. Returns its digest. UserError if that fails (a full disk)."""
    text = files.json_text(kept, sort_keys=True)
    digest = digest_of(text, tensors)
    room(path.parent, sum(x.nbytes for x in tensors.values()))
    with files.writing(path, remedy="free some space") as file:
        through = Through(file)
        try:
            torch.save({"version": VERSION, "digest": digest, "about": text, "tensors": tensors}, through)
        except Exception:
            if through.error is None:
                raise
            raise through.error from None
    return digest


def room(folder: Path, needed: int) -> None:
    """UserError if the disk has no room for so many bytes."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return  # what is wrong with the folder is told when it is written
    if free < ROOM * needed:
        raise UserError(
            f"{folder}: a checkpoint takes {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free: free "
            "some space"
        )


@dataclasses.dataclass
class Found:
    """A checkpoint that can be used: its file, what it says, and its tensors (mapped from the file)."""
    path: Path
    about: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    digest: str


def read(path: Path, check: bool = True) -> Found:
    """A checkpoint file. UserError, with the reason alone, if it is not whole.

    check: hold the content to its digest.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        version, digest, text, tensors = (content[k] for k in ("version", "digest", "about", "tensors"))
        kept = json.loads(text)
        if check and (version != VERSION or digest_of(text, tensors) != digest):
            raise UserError("its content is not what was written")
    except UserError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"it is no whole checkpoint ({type(error).__name__})") from None
    return Found(path, kept, tensors, digest)


def choose(
    folder: Path, log: runlog.RunLog, ml_hash: str, until: float = math.inf
) -> tuple[Found | None, list[tuple[str, str]]]:
    """(newest good checkpoint of a run or None, [(file name, reason)] of newer ones that are not used).

    until: only checkpoints up to this step.
    """
    passed, seed = [], log.events[0]["seed"]
    for path in sorted(files.listed(folder / FOLDER, PATTERN), reverse=True):
        try:
            if step_of(path) > until:
                continue
            found = read(path)
            refuse_foreign(found.about, log, ml_hash, seed)
            return found, passed
        except UserError as error:
            passed.append((path.name, str(error)))
    return None, passed


def step_of(path: Path) -> int:
    """The step of a checkpoint file, 0 if its name has none."""
    digits = path.stem.removeprefix("step")
    return int(digits) if digits.isdigit() else 0


def read_together(world: World, found: Found | None) -> Found | None:
    """The checkpoint that process 0 has chosen, on every process. Collective. UserError if one cannot read
    it."""
    broken = ""
    path = world.gather_objects(found and found.path.absolute())[0]
    if path is not None and found is None:
        try:
            found = read(path, check=False)
        except UserError as error:
            broken = f"{path}: process {world.rank} cannot read it: {error}: all processes read this folder"
    if broken := next(filter(None, world.gather_objects(broken)), ""):
        raise UserError(broken)
    return found


def refuse_foreign(kept: dict[str, Any], log: runlog.RunLog, ml_hash: str, seed: int) -> None:
    """UserError if a checkpoint is not one of this run."""
    if kept["ml_hash"] != ml_hash:
        raise UserError(f"it is of other settings (ml_hash {kept['ml_hash']}, the run's is {ml_hash})")
    if kept["seed"] != seed:
        raise UserError(f"it is of seed {kept['seed']}, the run's is {seed}")
    count, digest = kept["log"]
    if not 0 < count <= len(log.links) or log.links[count - 1][1] != digest:
        raise UserError("it is of another run: its hash of the log is not in this one")


# ----- what the clock has counted ---------------------------------------------------------------------------

def lost(folder: Path, events: list[dict], found: Found | None) -> tuple[int, float]:
    """(steps, milliseconds on the clock) that a run did after the checkpoint from which it continues."""
    steps, clock_ms = Heartbeat.read(beaten(folder))
    clock_ms = max([clock_ms, *(e["train_time_ms"] for e in events if e["kind"] in ("validation", "resume"))])
    steps = max([steps, *(e["step"] for e in runlog.standing(events) if e["kind"] == "validation")])
    at, before = (found.about["step"], found.about["clock_ms"]) if found else (0, 0.0)
    return max(0, steps - at), max(0.0, clock_ms - before)


# ----- while a run is under way -----------------------------------------------------------------------------

class Ahead:
    """What process 0 wishes at a step is what all processes do AHEAD steps later.

    Over the store with which the processes found each other: nothing waits for a GPU, and a process waits
    only if it is more than AHEAD steps ahead of process 0.
    """
    runs = 0  # in this program: each has keys of its own

    def __init__(self, world: World, first: int) -> None:
        self.world, self.first, self.mine = world, first, {}
        self.store = None
        if world.size > 1:
            Ahead.runs += 1
            store = dist.distributed_c10d._get_default_store()
            self.store = dist.PrefixStore(f"ahead{Ahead.runs}", store)

    def decide(self, step: int, wish: str) -> str:
        """What all processes do at this step. wish: process 0's at this step."""
        if self.store is None:
            return wish
        if self.world.main:
            self.store.set(str(step + AHEAD), wish)
            self.mine[step + AHEAD] = wish
            return self.mine.pop(step, "")
        return self.store.get(str(step)).decode() if step >= self.first + AHEAD else ""


class Checkpoints:
    """Writes the checkpoints of a run, and ends it with one when it is told to stop.

    every: ("steps", n), ("seconds", t). keep: files that stay. A checkpoint that cannot be written is told
    and logged; the run goes on.
    """

    def __init__(self, run: Run, every: tuple[str, float], keep: int) -> None:
        self.run, self.every, self.keep = run, every, keep
        run.interrupt.between_steps = True  # where all processes save together
        self.folder = run.log.folder / FOLDER if run.world.main else None
        self.ahead = Ahead(run.world, run.first_step)
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.under_way: tuple[dict[str, Any], Future] | None = None
        self.buffers: dict[str, torch.Tensor] = {}
        self.due = ""  # "save" or "stop", until a step after which no gradient is kept
        self.saved_at = time.monotonic()
        self.heartbeat = Heartbeat(beaten(run.log.folder)) if run.world.main else None
        if run.world.main:
            files.remove_unfinished(self.folder, "step")

    def before_step(self, step: int) -> None:
        """Save, if that is due.

        On all processes: KeyboardInterrupt after the checkpoint of a stop, Tripped if process 0 has found
        something.
        """
        run, asked = self.run, self.run.interrupt
        if asked.asked and not run.world.main and not asked.follows:
            raise KeyboardInterrupt  # process 0, on another machine, cannot be told
        if self.heartbeat is not None:
            self.heartbeat.beat(step, run.clock.read_ms())
        self.report()
        wish = "stop" if asked.asked else "save" if self.is_time() else ""
        wish = self.ahead.decide(step, "guard" if run.guards.finding else wish)
        if wish == "guard":
            run.guards.agree_on_findings()
        if self.every[0] == "steps" and run.first_step < step < len(run.plans) and step % self.every[1] == 0:
            wish = wish or "save"
        self.due = "stop" if "stop" in (wish, self.due) else wish or self.due
        left = 0 < step < len(run.plans) and run.optimizer.keeps_gradients(run.plans[step - 1])
        if self.due and not left:
            stop, self.due = self.due == "stop", ""
            self.save(step)
            if stop:
                self.report(wait=True)
                raise KeyboardInterrupt

    def begin_at(self, step: int) -> None:
        """Decide together from this step on, which may have been decided about before."""
        self.ahead, self.due = Ahead(self.run.world, step), ""

    def before(self, step: int) -> Found | None:
        """The newest good checkpoint up to a step, on all processes; None without one. Collective."""
        found = None
        if self.folder is not None:
            found, _ = choose(self.folder.parent, self.run.log, schema.ml_hash(self.run.s), until=step)
        return read_together(self.run.world, found)

    def went_back(self, step: int) -> None:
        """The run goes on before this step: drop the checkpoints of later ones, and keep one of this step.

        The new file says which batches were skipped; until it is there a kill costs no more than going back
        once more. Collective.
        """
        self.begin_at(step)
        if self.folder is not None:
            for path in files.listed(self.folder, PATTERN):
                if step_of(path) > step:
                    path.unlink()
        self.save(step)

    def is_time(self) -> bool:
        return self.every[0] == "seconds" and time.monotonic() - self.saved_at >= self.every[1]

    def save(self, step: int) -> None:
        """Copy the state on all processes; process 0 writes it in the background."""
        self.report(wait=True)  # the buffers are in use until then
        began = time.perf_counter()
        kept = about(self.run, step)
        for name, x in state(self.run):
            if self.run.world.main:
                self.copy(name, x)
        self.saved_at = time.monotonic()
        if not self.run.world.main:
            return
        arrived = torch.cuda.Event() if self.run.world.cuda else None
        if arrived is not None:
            arrived.record()
        told = {"step": step, "copy_ms": round(1000 * (time.perf_counter() - began), 3)}
        self.under_way = told, self.thread.submit(self.write, kept, arrived)

    def copy(self, name: str, x: torch.Tensor) -> None:
        """Copy a tensor into the buffer of its name: from a GPU in the order of its stream, pinned."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape != x.shape:
            pinned = self.run.world.cuda
            buffer = self.buffers[name] = torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned)
        with torch.no_grad():
            buffer.copy_(x, non_blocking=True)

    def write(self, kept: dict[str, Any], arrived: torch.cuda.Event | None) -> dict[str, Any]:
        """In the thread: the file. Returns what the log tells of it."""
        if arrived is not None:
            arrived.synchronize()
        began, path = time.perf_counter(), self.folder / f"step{kept['step']:07d}.pt"
        self.folder.mkdir(exist_ok=True)
        refuse_unsound(self.run, self.buffers)
        digest = write(path, kept, self.buffers)
        for old in sorted(files.listed(self.folder, PATTERN))[:-self.keep]:
            old.unlink()
        spent = round(1000 * (time.perf_counter() - began), 3)
        return {"file": path.name, "digest": digest, "bytes": path.stat().st_size, "write_ms": spent}

    def report(self, wait: bool = False) -> None:
        """Log the checkpoint that has been written. wait: until it is."""
        if self.under_way is None or not (wait or self.under_way[1].done()):
            return
        (told, future), self.under_way = self.under_way, None
        try:
            event = self.run.log.event("checkpoint", **told, **future.result())
        except (UserError, OSError, RuntimeError) as error:
            event = self.run.log.event("checkpoint", **told, error=str(error))
            self.run.world.say(*runlog.render(event))

    def close(self) -> None:
        """Wait for the checkpoint that is being written."""
        self.report(wait=True)
        self.thread.shutdown()

    def remove(self) -> None:
        """Remove the checkpoints: the run has finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def refuse_unsound(run: Run, tensors: dict[str, torch.Tensor]) -> None:
    """UserError if the state of a run is not worth keeping: the last good checkpoints stay."""
    own = {name: x for name, x in tensors.items() if name.startswith("optimizer/")}
    if names := guards.not_finite(own):
        raise UserError(f"{names[0].partition('/')[2]} is not finite, with {len(names) - 1} other tensors")
    if fields := guards.differing(run.optimizer.banks, tensors[DIGESTS].numpy()):
        raise UserError(fields["message"])


def begin_again(run: Run, folder: Path, here: dict[str, Any]) -> Found | None:
    """The checkpoint to continue from, or None to begin with the first step; the log's event `resume`.

    Process 0 chooses, and the others read the same file. Collective. UserError if the texts are others than
    those with which the run began.
    here: description of this part of the run, as for the log's first event.
    """
    start = run.log.events[0]
    for name in ("corpus_digest", "val_digest"):
        if start[name] != here[name]:
            raise UserError(f"{folder}: was begun with other tokens ({name} {start[name][:12]}, of "
                            f"{run.corpus.folder} {here[name][:12]}): give --data as it was")
    found, passed = None, []
    if run.world.main:
        found, passed = choose(folder, run.log, schema.ml_hash(run.s))
    found = read_together(run.world, found)
    path = found and found.path.name
    steps, milliseconds = lost(folder, run.log.events, found)
    before = found.about["clock_ms"] if found else 0.0
    run.clock.total_ms = before + milliseconds
    if found is not None:
        meter = run.clock.meter
        meter.own_s, meter.wall_s, meter.machine_s = found.about["meter"]
    event = run.log.event(
        "resume", step=found.about["step"] if found else 0, checkpoint=path, digest=found and found.digest,
        passed=passed, lost_steps=steps, lost_ms=round(milliseconds, 3), utc=runlog.utc(),
        train_time_ms=round(run.clock.total_ms, 3), sources=run.log.keep_sources(),
        **{name: here[name] for name in CONTINUES}
    )
    run.world.say(*runlog.render(event))
    return found
