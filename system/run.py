"""What a run consists of while it goes on: its processes (World), timer (Clock), live line (Progress), state (Run)."""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import schedule
from common import console
from common.errors import UserError
from common.interrupt import Interrupt
from data.shards import Corpus
from data.stream import Prefetch, Stream
from optim import Optimizer, local_ranks
from model import GPT
from runlog import RunLog
from schedule import StepPlan
from settings import Settings, check_processes
from system import load
from system.compiler import CacheFile
from system.hooks import Stateful
from system.place import Place
from system.sinks import Sinks


# ----- processes ----------------------------------------------------------------------------------------------------

class World:
    """Processes and device of this run. One process serves 8 / size logical ranks."""

    def __init__(self, s: Settings) -> None:
        self.place = Place.read()
        self.rank, self.size = self.place.rank, self.place.size
        self.ranks = local_ranks(self.rank, self.size)
        check_processes(s, self.size)
        self.cuda = uses_gpus(s, self.place.local_size)
        self.device = torch.device("cuda", self.place.local_rank) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        elif s.system.reduction == "ordered":
            torch.set_num_threads(1)  # sums inside an operation depend on the number of threads; bits come first here
        if self.size > 1 and not dist.is_initialized():
            try:
                dist.init_process_group("nccl" if self.cuda else "gloo")
            except (RuntimeError, ValueError) as error:  # the port is taken, or not all processes came
                raise UserError(f"the {self.size} processes do not find each other at {os.environ['MASTER_ADDR']} port "
                                f"{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}") from None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def say(self, *lines: str) -> None:
        """Print lines, on process 0 only."""
        if self.main and lines:
            print(*lines, sep="\n", flush=True)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """One tensor per process -> their concatenation in rank order, on every process."""
        return torch.cat(self.parts(values))

    def parts(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all processes (equal shapes), in rank order, on every process."""
        if self.size == 1:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return parts

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of a float64 tensor over the processes, summed in rank order: the same bits on every process."""
        return sum(self.parts(values)) / self.size

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the processes, on every process."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather_objects(self, value: Any) -> list:
        """One picklable object per process -> their list in rank order, on every process."""
        if self.size == 1:
            return [value]
        parts = [None] * self.size
        dist.all_gather_object(parts, value)
        return parts

    def neighbours(self) -> tuple[list[int], int | None]:
        """(ids of the run's processes on this machine, id of process 0 or None if process 0 is on another one)."""
        here = socket.gethostname()
        found = self.gather_objects((here, os.getpid()))
        return [i for host, i in found if host == here], found[0][1] if found[0][0] == here else None

    def describe(self) -> str:
        if self.cuda:
            return f"{self.size} x {torch.cuda.get_device_name()}"
        return f"CPU, {self.size} process{'es' if self.size > 1 else ''}, {torch.get_num_threads()} threads"


def uses_gpus(s: Settings, processes: int) -> bool:
    """Does the run go to GPUs? UserError if it must and torch finds none, or fewer than `processes` of this machine."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if s.system.device == "cuda" and not found:
        raise UserError("system.device=cuda, but torch finds no GPU: set system.device=cpu or install a CUDA torch")
    if not found or s.system.device == "cpu":
        return False
    if processes > found:
        raise UserError(f"{processes} processes on this machine, and torch sees {found} GPU{'s' if found > 1 else ''}: start "
                        "fewer, or look at CUDA_VISIBLE_DEVICES")
    return True


def lost_peer(error: RuntimeError) -> bool:
    """Is the error what a collective raises when another process is gone?"""
    said = str(error)
    return dist.is_initialized() and any(x in said for x in ("closed by peer", "reset by peer", "Broken pipe", "Socket closed"))


# ----- clock and live line ------------------------------------------------------------------------------------------

class Clock:
    """Timed training milliseconds. Starts before the loader exists, stops for validation; the device is synchronised."""

    def __init__(self, world: World) -> None:
        self.world, self.total_ms, self.began = world, 0.0, None
        self.meter = load.Meter()  # CPU time of this process and of others while the clock goes

    def start(self) -> None:
        self.meter.start()
        if self.world.cuda:
            torch.cuda.synchronize()
        if self.world.size > 1:
            dist.barrier()
        self.began = time.perf_counter()

    def stop(self) -> None:
        if self.world.cuda:
            torch.cuda.synchronize()
        self.total_ms += 1000 * (time.perf_counter() - self.began)
        self.began = None
        self.meter.stop()

    def read_ms(self) -> float:
        return self.total_ms + (1000 * (time.perf_counter() - self.began) if self.began else 0.0)


class Progress:
    """One live line on a terminal; elsewhere a line at every validation only."""

    def __init__(self, world: World, s: Settings) -> None:
        self.line = console.LiveLine(world.main)
        self.s, self.steps, self.shown = s, s.schedule.steps, 0.0
        self.loss = self.arrived = None
        self.known = ""

    def show(self, step: int, loss: torch.Tensor, clock_ms: float) -> None:
        """A line with the newest loss that has arrived on the host: nothing has to wait for it."""
        if not self.line.active or time.perf_counter() - self.shown < 0.5:
            return
        self.shown = time.perf_counter()
        if self.arrived is None or self.arrived.query():
            if self.loss is not None:
                self.known = f"train loss {self.loss.numpy():.4f}  "
            self.loss = loss.float().to("cpu", non_blocking=True)
            self.arrived = torch.cuda.Event() if loss.is_cuda else None
            if loss.is_cuda:
                self.arrived.record()
        done, all_tokens = schedule.tokens_before(self.s, step), schedule.tokens_before(self.s, self.steps)
        rate = done / max(clock_ms, 1e-9) * 1000
        left = (all_tokens - done) / max(rate, 1e-9)
        self.line.show(f"  step {step}/{self.steps}  {self.known}{rate:,.0f} tokens/s  {left:.0f} s left")

    def clear(self) -> None:
        self.line.clear()


class Profiler:
    """`--profile A:B`: steps A..B-1 under torch.profiler, written as a trace into the run folder. steps None: nothing."""

    def __init__(self, world: World, folder: Path | None, steps: tuple[int, int] | None) -> None:
        self.world, self.folder, self.steps, self.active = world, folder, steps, None

    def before_step(self, step: int) -> None:
        if self.steps is None:
            return
        if step == self.steps[0]:
            self.active = torch.profiler.profile()
            self.active.start()
        elif step == self.steps[1]:
            self.close()

    def close(self) -> None:
        """End the trace, if one is being taken, and write it."""
        if self.active is None:
            return
        self.active.stop()
        if self.world.main:
            path = self.folder / "trace.json"
            try:
                self.active.export_chrome_trace(str(path))
                self.world.say(f"profile of steps {self.steps[0]}..{self.steps[1] - 1}: {path}")
            except (OSError, RuntimeError) as error:  # a picture of the run is not worth the run
                self.world.say(f"no profile: cannot write {path}: {error}")
        self.active = None


# ----- the run ------------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """All parts of one training, and what it has measured so far."""
    s: Settings  # as fitted to the GPU
    world: World
    log: RunLog
    plans: Sequence[StepPlan]
    model: GPT
    compiled: torch.nn.Module  # the model itself where nothing is compiled
    optimizer: Optimizer
    hooks: Sequence[Stateful]  # state next to parameters and optimizer
    corpus: Corpus
    rows: np.ndarray  # validation tokens of this process's ranks: (ranks, rows, T + 1) int32
    ranks_per_microbatch: int
    interrupt: Interrupt
    cache_file: CacheFile | None
    check_sync: bool
    profiler: Profiler
    clock: Clock
    progress: Progress
    sinks: Sinks = field(default_factory=Sinks)
    stream: Stream | None = None  # from the start of the clock on
    batches: Prefetch | None = None
    train_losses: list[torch.Tensor] = field(default_factory=list)  # since the last validation, of this process's ranks
    points: list[tuple[int, float]] = field(default_factory=list)  # (step, validation loss)
    steps_done: int = 0
    graphs: int = 0  # compiled before the clock
    epoch: int = 0  # the highest of all logical ranks at the last validation

    def mean_train_losses(self) -> list[float]:
        """Training loss of each step since the last validation, mean over all logical ranks, on every process; then forgets
        them. The processes' losses are brought together only here, while the clock stands still."""
        losses, self.train_losses = self.train_losses, []
        return [round(x, 6) for x in self.world.mean(torch.stack(losses)).tolist()] if losses else []

    def close(self) -> None:
        if self.batches is not None:
            self.batches.close()
        self.profiler.close()
