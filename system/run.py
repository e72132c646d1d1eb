"""The parts of a running training: timer (Clock), live line (Progress), Profiler and state (Run)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

import schedule
from common import console
from common.interrupt import Interrupt
from data import prefix
from data.shards import Corpus
from data.stream import Prefetch, Stream, after_rewinds, stream_arguments
from optim import Optimizer
from model import GPT
from runlog import RunLog
from schedule import StepPlan
from settings import Settings
from settings.model import padded_vocab
from system import load
from system.compiler import CacheFile
from system.guards import Guards
from system.hooks import Stateful
from system.sampler import Sampler
from system.seams import Seams
from system.sinks import Sinks
from system.stall import Watchdog
from system.workers import Workers
from system.world import World


# ----- clock and live line ----------------------------------------------------------------------------------

class Clock:
    """Training milliseconds, without validations. Starting and stopping synchronises the device."""

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
        """Show the newest loss that has already arrived on the host, so that nothing waits for the GPU."""
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
    """`--profile A:B`: a torch.profiler trace of steps A..B-1 in the run folder. steps None: no trace."""

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


class Rescue(Protocol):
    """What a run asks of its rescue: system.rescue.Skip or system.spikes.Spikes."""

    def state(self) -> dict:
        """What a checkpoint keeps, as plain JSON values."""

    def load(self, state: dict) -> None:
        """Go on from what a checkpoint has kept."""


class Saver(Protocol):
    """What a run asks of system.checkpoint.Checkpoints, which knows the run."""

    def before_step(self, step: int) -> None:
        """Save or stop, if it is time."""

    def close(self) -> None:
        """Wait for what is being written."""

    def remove(self) -> None:
        """Remove the checkpoints."""


# ----- the run ----------------------------------------------------------------------------------------------

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
    checkpoints: Saver | None = None  # from the start of the clock on, unless they are off
    guards: Guards | None = None  # from the start of the clock on
    watchdog: Watchdog | None = None  # from the start of the clock on, unless it is off
    rescue: Rescue | None = None  # from the start of the clock on, if asked for
    stream: Stream | None = None  # from the start of the clock on
    batches: Prefetch | None = None
    # since the last validation, of this process's ranks
    train_losses: list[torch.Tensor] = field(default_factory=list)
    points: list[tuple[int, float]] = field(default_factory=list)  # (step, validation loss)
    steps_done: int = 0
    first_step: int = 0  # of this process since it was resumed or went back
    # (batches read until then, step to which the run went back): system.rewind
    rewinds: list[tuple[int, int]] = field(default_factory=list)
    kept_norms: torch.Tensor | None = None  # of a checkpoint: gradient norms since the last validation
    kept_rescue: dict | None = None  # of a checkpoint: state of the rescue
    graphs: int = 0  # compiled before the clock
    epoch: int = 0  # the highest of all logical ranks at the last validation
    sampler: Sampler | None = None  # of a sampled softmax
    seams: Seams | None = None  # of canonical masking
    workers: Workers | None = None  # that train apart
    tripped: str | None = None  # what a guard has found, in one line
    prefix_table: torch.Tensor | None = None  # (V,) int64, once a step has asked for it

    def __post_init__(self) -> None:
        if self.s.model.head.candidates is not None:
            self.sampler = Sampler(self.s, self.world)
            self.hooks = [*self.hooks, self.sampler]
        if schedule.apart(self.s):
            self.workers = Workers(self.model, self.optimizer, self.world)
            self.hooks = [*self.hooks, self.workers]
        if self.s.validation.canonical_mask:
            self.seams = Seams(self.s, self.corpus, self.world)

    def prefixes(self, device: torch.device) -> torch.Tensor:
        """Prefix of each token (V,) int64 on the device (data/prefix.py)."""
        if self.prefix_table is None:
            table = prefix.of_tokenizer(self.corpus.tokenizer, padded_vocab(self.s))
            self.prefix_table = torch.from_numpy(table).to(device)
        return self.prefix_table

    def position(self, step: int) -> int:
        """Batches that the run has read before a step: one for each step, and those that rewinds skipped."""
        read, to = self.rewinds[-1] if self.rewinds else (0, 0)
        return step + read - to

    def open_stream(self, step: int, digests: dict[str, str]) -> None:
        """Begin to read batches at a step. digests: of the tokens before it, by logical rank."""
        if self.batches is not None:
            self.batches.close()
        about = after_rewinds(stream_arguments(self.s), self.rewinds)
        self.stream = Stream(self.corpus, ranks=self.world.ranks, **about)
        self.stream.skip(self.position(step), digests)
        self.batches = Prefetch(self.stream, len(self.plans) - step)

    def mean_train_losses(self) -> list[float]:
        """Return and forget the training loss of each step since the last validation, on every process.

        Means over all logical ranks. Processes exchange losses only here, while the clock is stopped.
        """
        losses, self.train_losses = self.train_losses, []
        return [round(x, 6) for x in self.world.mean(torch.stack(losses)).tolist()] if losses else []

    def stop_or_save(self, step: int) -> None:
        """Before a step: save a checkpoint if one is due.

        KeyboardInterrupt if a signal asked to stop, Tripped if a guard did.
        """
        self.guards.check()
        if self.checkpoints is None:
            self.interrupt.check()
        else:
            self.checkpoints.before_step(step)

    def begins(self, doing: str) -> None:
        """Tell the watchdog that the run goes on, and with what."""
        if self.watchdog is not None:
            self.watchdog.beat(doing)

    def between_chunks(self) -> None:
        """Between two chunks of a validation."""
        self.begins("validation")
        self.interrupt.check()

    def close(self) -> None:
        if self.watchdog is not None:
            self.watchdog.close()
        if self.batches is not None:
            self.batches.close()
        if self.checkpoints is not None:
            self.checkpoints.close()
        if self.seams is not None:
            self.seams.close()
        self.profiler.close()
