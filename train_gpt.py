"""Train any record of the NanoGPT speedrun, or any change to one.

    python train_gpt.py tiny-v1                     # CPU, about two minutes
    python train_gpt.py short/11 --nproc 8          # FineWeb, to 3.28, on eight GPUs; torchrun will do too
    python train_gpt.py short/11 --scale tiny --without model.residual.unet_skips

Read top to bottom: settings -> data -> model -> optimizer -> untimed warm-up and reset -> the clock -> loop ->
validation -> log. Exit codes: 0 target reached (or none set), 2 bad input or a file that cannot be written, 3 target missed,
4 diverged, 130 Ctrl-C, SIGTERM or SIGHUP.
"""

from common import environment  # first: refuses a Python that is too old

import os
import time

PROCESS_START = time.perf_counter()
# Threads that spin long while they wait ruin each other on a shared machine: a tiny step beside one busy process took
# 1.85 s so, 0.84 s without spinning, which alone costs 0.55 instead of 0.42 s. A short spin keeps the 0.42 s (GNU OpenMP;
# it must be set before torch loads its thread pool).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from common import console, interrupt

if __name__ == "__main__":
    console.guard()
    interrupt.leave_at_once("interrupted before the run" if console.speaks() else "")

import schema
from system import command_line
from common import files, repository
import runlog
import schedule
from settings import (LOGICAL_RANKS, NUMERICS_VERSION, check_processes, padded_vocab, ranks_per_forward,
                      recomputable, tokens_per_step, validation_rows_at_once)
from common.errors import UserError

if __name__ == "__main__":  # a wrong setting is refused, and a plan printed, before the seconds that torch takes
    options, resolved = command_line.command_line()
    environment.require(*environment.TRAINING)
    if options.plan:
        from system.dry_run import print_plan
        print_plan(resolved)
        raise SystemExit(0)

import contextlib
import dataclasses
import hashlib
import io
import math
import platform
import socket
import sys

import numpy as np
import torch
import torch.distributed as dist

from data.corpus import corpus_for, default_cache
from data.shards import corpus_digest, val_digest
from data.stream import Prefetch, Stream, require_shards, stream_arguments, stream_digest, validation_rows
from kernels.device import FP8_SINCE, capability, refusal
from model import GPT
from optim import Engine, local_ranks
from system import compiler, load, memory, sinks
from common.interrupt import INTERRUPTED, Interrupt, hold
from system.launch import launch
from system.place import Place
from system.sync import no_host_reads

IMPORTED = time.perf_counter()
REACHED, MISSED, DIVERGED = 0, 3, 4


# ----- the process's place ------------------------------------------------------------------------------------------

class World:
    """Processes and device of this run. One process serves 8 / size logical ranks."""

    def __init__(self, s):
        self.place = Place.read()
        self.rank, self.size = self.place.rank, self.place.size
        self.ranks = local_ranks(self.rank, self.size)
        check_processes(s, self.size)
        self.cuda = finds_gpus(s, self.place.local_size)
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
    def main(self):
        return self.rank == 0

    def say(self, *lines):
        if self.main and lines:
            print(*lines, sep="\n", flush=True)

    def gather(self, values):
        """One tensor per process -> their concatenation in rank order, on every process."""
        return torch.cat(self.parts(values))

    def parts(self, values):
        """The tensors of all processes (equal shapes), in rank order, on every process."""
        if self.size == 1:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return parts

    def mean(self, values):
        """The mean of a float64 tensor over the processes, summed in rank order: the same bits on every process."""
        return sum(self.parts(values)) / self.size

    def total(self, values):
        """The sum of a tensor over the processes, on every process."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather_objects(self, value):
        if self.size == 1:
            return [value]
        parts = [None] * self.size
        dist.all_gather_object(parts, value)
        return parts

    def neighbours(self):
        """(ids of the run's processes on this machine, id of process 0 or None if it is on another one)."""
        here = socket.gethostname()
        found = self.gather_objects((here, os.getpid()))
        return [i for host, i in found if host == here], found[0][1] if found[0][0] == here else None

    def describe(self):
        if self.cuda:
            return f"{self.size} x {torch.cuda.get_device_name()}"
        return f"CPU, {self.size} process{'es' if self.size > 1 else ''}, {torch.get_num_threads()} threads"


def finds_gpus(s, processes):
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


def check_devices(resolved, processes):
    """UserError if this machine cannot do the run as so many processes of its own."""
    s = resolved.settings
    cuda = finds_gpus(s, processes)
    if resolved.scale in ("full", "small") and not cuda and s.system.device == "auto":
        raise UserError(f"{resolved.record.ref} at scale {resolved.scale} needs a GPU: add --scale tiny (CPU, about two "
                        "minutes), or --set system.device=cpu to insist")
    if s.system.reduction == "ordered" and cuda:
        raise UserError("system.reduction=ordered promises equal bits on CPU only: leave it away on a GPU")


# ----- the clock ----------------------------------------------------------------------------------------------------

class Clock:
    """Timed training milliseconds. Starts before the loader exists, stops for validation; the device is synchronised."""

    def __init__(self, world):
        self.world, self.total_ms, self.began = world, 0.0, None
        self.meter = load.Meter()  # CPU time of this process and of others while the clock goes

    def start(self):
        self.meter.start()
        if self.world.cuda:
            torch.cuda.synchronize()
        if self.world.size > 1:
            dist.barrier()
        self.began = time.perf_counter()

    def stop(self):
        if self.world.cuda:
            torch.cuda.synchronize()
        self.total_ms += 1000 * (time.perf_counter() - self.began)
        self.began = None
        self.meter.stop()

    def read_ms(self):
        return self.total_ms + (1000 * (time.perf_counter() - self.began) if self.began else 0.0)


# ----- data ---------------------------------------------------------------------------------------------------------

def find_corpus(options, resolved):
    """The shards of this run (data.corpus.corpus_for), if the model has a row for every token id."""
    found, rows = corpus_for(resolved.scale, options.data, resolved.settings), padded_vocab(resolved.settings)
    if found.vocab_size > rows:
        raise UserError(f"{found.folder} holds token ids up to {found.vocab_size - 1}, the model has {rows} rows: "
                        f"--set model.vocab_size={found.vocab_size}, or choose another --data")
    return found


def to_rows(batch, seq_len, device, bos):
    """int32 (ranks, B + 1) -> inputs and targets (ranks, B / seq_len, seq_len), int64, on the device; and for each rank how many
    documents its rows hold at most (each begins with token `bos` or a row), counted here where nothing has to wait."""
    documents = [int(n) + (batch.shape[1] - 1) // seq_len for n in (batch[:, :-1] == bos).sum(1)]
    batch = torch.from_numpy(batch)
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    batch = batch.long()
    return batch[:, :-1].reshape(len(batch), -1, seq_len), batch[:, 1:].reshape(len(batch), -1, seq_len), documents


def longest_document(rows, bos):
    """Tokens of the longest document in rows (R, T) of ids on the host, each of which begins with `bos` or a row."""
    first = rows == bos
    first[:, 0] = True
    return int(np.diff(np.flatnonzero(first), append=first.size).max())


# ----- steps --------------------------------------------------------------------------------------------------------

def train_step(run, step_plan, inputs, targets, documents, before_step=None):
    """Forward and backward of this process's logical ranks, then the update. Returns the mean loss of these ranks, float64.

    inputs, targets (ranks, rows, T) and documents as to_rows gives them. Each forward's loss is its mean over tokens times
    its share of the eight ranks, so that the gradients of all forwards and processes add up to the mean over logical ranks;
    with train_loss `sum`, to the mean over logical ranks of their sums. before_step: called when the gradients are there and
    before they are reduced (warm-up only).
    """
    losses, at_once, engine = [], run.at_once, run.engine
    forwards = range(0, len(inputs), at_once)
    share = at_once / LOGICAL_RANKS
    if run.s.model.head.train_loss == "sum":
        share *= run.s.data.tokens_per_rank
    run.model.begin_step()
    for first in forwards:
        engine.expect(last=first == forwards[-1], launch=before_step is None)
        x, y = inputs[first:first + at_once].flatten(0, 1), targets[first:first + at_once].flatten(0, 1)
        context = run.model.context(x, run.corpus.bos, step_plan.windows, most=sum(documents[first:first + at_once]))
        loss = run.compiled(x, y, context).mean()
        (loss * share).backward()
        engine.collect()
        losses.append(loss.detach())
    if before_step is not None:
        before_step()  # nothing was launched, so this process's share is whole
    run.model.settle(run.world.total, step_plan.tokens, step_plan.moves_bias)
    engine.step(step_plan)
    return torch.stack(losses).mean(dtype=torch.float64)  # sums of float32 are exact in float64: their order is free


@torch.no_grad()
def validate(model, rows, world, context, limit=None, check=lambda: None):
    """Mean cross entropy over all validation targets, nats per token.

    rows: int32 (local ranks, rows, T + 1). context: function of tokens (R, T), on the device and as they were read; what
    attention sees of them. Summed per logical rank in float64 and then in rank order, so that the value does not depend on
    the number of processes. check: called before each chunk; may raise. limit: only so many chunks of so many ranks: a
    warm-up, whose value means nothing.
    """
    model.eval()
    chunk = validation_rows_at_once(rows.shape[1], rows.shape[-1] - 1, world.cuda)
    sums = []
    for rank_rows in rows[:limit]:
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        for first in list(range(0, len(rank_rows), chunk))[:limit]:
            check()
            read = rank_rows[first:first + chunk]
            part = torch.from_numpy(read).to(world.device).long()
            total += model(part[:, :-1], part[:, 1:], context(part[:, :-1], read[:, :-1])).sum(dtype=torch.float64)
        sums.append(total)
    model.train()
    sums = world.gather(torch.stack(sums))
    return sum(sums.tolist()) / (LOGICAL_RANKS * rows.shape[1] * (rows.shape[2] - 1))


# ----- warm-up and its proof ----------------------------------------------------------------------------------------

def state_hash(model, engine):
    """sha256 over all that training can change: parameters, buffers, optimizer state, counters, random generator."""
    digest = hashlib.sha256()
    tensors = [t for _, t in [*model.named_parameters(), *model.named_buffers()]]
    tensors += [t for bank in engine.banks for t in (bank.grad, *bank.state.values())]
    for t in [*tensors, torch.get_rng_state()]:
        digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    digest.update(str(engine.steps_taken).encode())
    return digest.hexdigest()


MARK_PIECE = 2 ** 22  # elements that are taken from all processes at a time: 32 MiB for each in float64


def gradient_marks(engine, world):
    """{parameter: [norm, sum_i g_i cos(i)]} of the gradient summed over all processes: what a systems record must keep.

    Two numbers a tensor, so that logs of two programs can be compared input by input, on any number of processes: equal
    seeds give equal weights and equal warm-up tokens. The second one changes with order and signs, which a norm does not
    see. Taken in the last untimed step, because at the very first one a zero head hides every gradient behind it. The shares
    of the processes are added in rank order in float64, whatever system.comm does later; collective.
    """
    out = {}
    for bank in engine.banks:
        share, start = engine.local(bank).detach().view(-1), 0  # sum of all forwards, as p.grad is not in bfloat16
        for name, p in bank.members:
            out[name] = [float(f"{x:.8g}") for x in marks_of(share[start:start + p.numel()], bank.own, world)]
            start += p.numel()
    return dict(sorted(out.items()))


def marks_of(share, own, world):
    """[norm, sum_i g_i cos(i)] of a gradient g, of which each process has a share: a summand, or (own) a stretch."""
    squares = turned = 0.0
    for start in range(0, len(share), MARK_PIECE):
        parts = [part.double() for part in world.parts(share[start:start + MARK_PIECE])]
        for rank, g in enumerate(parts if own else [sum(parts)]):
            at = start + rank * len(share)
            squares += g.square().sum().item()
            turned += (g * torch.arange(at, at + len(g), device=g.device).cos()).sum().item()
    return [math.sqrt(squares), turned]


def warmup_steps(run):
    """Indices of the steps that the warm-up goes through: three, and on a compiled model one of each window, so that no
    shape is met for the first time while the clock runs."""
    asked = run.s.system.warmup_steps
    if asked >= 0:
        return [min(i, len(run.plans) - 1) for i in range(asked)]
    steps = [min(i, len(run.plans) - 1) for i in range(3)]
    if run.compiled is not run.model:
        seen = {run.plans[i].windows for i in steps}
        for plan in run.plans:
            if plan.windows not in seen:
                seen.add(plan.windows)
                steps.append(plan.step)
    return steps


def warmup_validations(run):
    """Steps of one validation for each window that a validation will have; not compiled, of the first and the last."""
    n = len(run.plans)
    first = {}
    for step in (i for i in range(n + 1) if schedule.validates(run.s, i)):
        first.setdefault(schedule.validation_windows(run.s, step), step)
    steps = list(first.values())
    return steps if run.compiled is not run.model else sorted({steps[0], n})


def warm_up(run, seed):
    """Untimed steps and validation chunks that compile and touch everything; then a reset, proven by hashes.

    Logs loss and gradients of the last untimed step (event `probe`) and the account of the reset (`reset`).
    """
    s, world, began = run.s, run.world, time.perf_counter()
    before, generator = state_hash(run.model, run.engine), torch.get_rng_state()
    steps = warmup_steps(run)
    stream = Stream(run.corpus, ranks=world.ranks, **stream_arguments(s)) if s.system.warmup_tokens == "real" else None
    random = torch.Generator().manual_seed(seed + 1)
    shape = (LOGICAL_RANKS, s.data.tokens_per_rank + 1)  # of all ranks: the same tokens on any number of processes
    for n, step in enumerate(steps):
        if stream is not None:
            batch = stream.next()
        else:
            batch = torch.randint(run.corpus.vocab_size, shape, generator=random, dtype=torch.int32).numpy()
            batch = batch[list(world.ranks)]
            if s.data.max_document:  # no document may be longer, random ones neither
                batch[:, ::s.data.max_document] = run.corpus.bos
        marks, last = {}, n == len(steps) - 1
        loss = train_step(run, run.plans[step], *to_rows(batch, s.data.seq_len, world.device, run.corpus.bos),
                          before_step=(lambda: marks.update(gradient_marks(run.engine, world))) if last else None)
        if last:
            loss = round(float(world.mean(loss)), 8)
            run.log.event("probe", step=n, tokens=s.system.warmup_tokens, loss=loss, gradients=marks)
    if steps:
        for step in warmup_validations(run):
            run.validate(step, limit=1)
    run.model.initialise(seed)
    run.engine.reset()
    torch.set_rng_state(generator)
    after = state_hash(run.model, run.engine)
    if before != after:
        raise RuntimeError(f"the reset after warm-up is incomplete: state {before[:16]} became {after[:16]}")
    run.graphs, cost = compiled_graphs(), compiler.account()
    if run.cache_file is not None:
        world.say(*run.cache_file.save(world.gather_objects, world.main))
    event = run.log.event("reset", warmup_steps=len(steps), state_before=before, state_after=after, graphs=run.graphs,
                          imports_ms=round(1000 * (IMPORTED - PROCESS_START), 3),
                          start_ms=round(1000 * (began - PROCESS_START), 3),
                          warmup_ms=round(1000 * (time.perf_counter() - began), 3), **({"compile": cost} if cost else {}))
    world.say(*runlog.render(event))


def compiled_graphs():
    """Number of graphs that torch.compile has made in this process so far."""
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes a second, and who does not compile has none
    return dynamo.utils.counters["stats"]["unique_graphs"] if dynamo else 0


# ----- reporting ----------------------------------------------------------------------------------------------------

class Progress:
    """One live line on a terminal; elsewhere a line at every validation only."""

    def __init__(self, world, s):
        self.line = console.LiveLine(world.main)
        self.steps, self.tokens, self.shown = s.schedule.steps, tokens_per_step(s), 0.0
        self.loss = self.arrived = None
        self.known = ""

    def show(self, step, loss, clock_ms):
        """A line with the newest loss that has arrived on the host: nothing need wait for it."""
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
        rate = step * self.tokens / max(clock_ms, 1e-9) * 1000
        left = (self.steps - step) * self.tokens / max(rate, 1e-9)
        self.line.show(f"  step {step}/{self.steps}  {self.known}{rate:,.0f} tokens/s  {left:.0f} s left")

    def clear(self):
        self.line.clear()


def first_below(points, target):
    """Step at which the straight line between validations first meets the target, or None."""
    for (s0, l0), (s1, l1) in zip(points, points[1:]):
        if l1 <= target:
            return s1 if l0 <= target or l0 == l1 else s0 + (s1 - s0) * (l0 - target) / (l0 - l1)
    return None


def verdict(s, resolved, points, train_ms):
    """Lines for people: reached or not, when, and the published curve beside it where it is the same experiment."""
    lines, target, final = [], s.validation.target, points[-1][1]
    if target is None:
        lines.append(f"no target at scale {resolved.scale}: final validation loss {final:.4f}")
    elif final <= target:
        lines.append(f"target {target:g} REACHED: {final:.4f} after {s.schedule.steps} steps, {train_ms / 1000:.1f} s of "
                     f"training; the curve crossed it at about step {first_below(points, target):.0f}")
    else:
        lines.append(f"target {target:g} MISSED: {final:.4f} after {s.schedule.steps} steps, {train_ms / 1000:.1f} s")
    reference = resolved.record.folder / "reference.csv"
    if resolved.scale == "full" and reference.exists() and not resolved.changes:
        published = {int(float(a)): float(b) for a, b, *_ in
                     (line.split(",") for line in reference.read_text(encoding="utf-8").splitlines()[1:])}
        common = [(step, loss) for step, loss in points if step in published]
        if common:
            step, loss = common[-1]
            lines.append(f"published curve at step {step} ({step * tokens_per_step(s):,} tokens): {published[step]:.4f}, "
                         f"here {loss:.4f} ({loss - published[step]:+.4f})")
    return lines


# ----- the run ------------------------------------------------------------------------------------------------------

@memory.exhaustion_in_one_line()
def train(resolved, options):
    """One run, from settings to verdict, which a signal ends in order. Returns the exit code."""
    with Interrupt(main=Place.read().rank == 0, patient=False) as asked:
        return one_run(resolved, options, asked)


def one_run(resolved, options, asked):
    s = resolved.settings
    sinks.require(options.log_to)
    check_devices(resolved, Place.read().local_size)
    world = World(s)
    asked.join(*world.neighbours())
    torch.manual_seed(options.seed)  # nothing here draws from the global generator; a feature that does is repeatable
    check_kernels(s, world.device)
    compile_it = compiles(s, world)
    if options.check_sync and not world.cuda:
        check_sync_here(s, compile_it)
    cache_file, held = prepare_compiler(options, world, compile_it), None
    if world.cuda:
        s, held = memory.fit(s, len(world.ranks), torch.cuda.get_device_properties(world.device).total_memory, world.size)
    corpus = find_corpus(options, resolved)
    plans = schedule.plan(s)
    if options.profile and options.profile[1] > len(plans):
        raise UserError(f"--profile {options.profile[0]}:{options.profile[1]}: the run has {len(plans)} steps")
    used = require_shards(corpus, steps=len(plans), **stream_arguments(s))
    rows = validation_rows(corpus, s.validation.tokens, s.validation.seq_len, world.ranks)

    model = GPT(s).to(world.device)
    model.initialise(options.seed)
    if compile_it:  # one graph for each window, in training and validation; past the limit dynamo would go on uncompiled
        torch._dynamo.config.recompile_limit = 16 + 2 * len({p.windows for p in plans})
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        model.prepare_compile()
    compiled = torch.compile(model, dynamic=False) if compile_it else model
    engine = Engine(model, s, world.rank, world.size, compiled=compile_it)

    name = (resolved.preset or resolved.record.ref.replace("/", "-")) + f"_{resolved.scale}_{schema.ml_hash(s)[:8]}"
    about = describe(resolved, options, world, corpus, model, engine, used, plans, held)
    if options.strict and about["fallbacks"]:
        raise UserError(f"{about['fallbacks'][0]} (--strict)")
    run = None
    try:
        with hold():  # a log that has begun gets an end
            log = runlog.RunLog(options.out, f"{name}_s{options.seed}", world.main, began=PROCESS_START)
            log.start(about, schema.plain(resolved.settings))
            run = Run(s, world, log, plans, model, compiled, engine, corpus, rows, options, asked, cache_file)
            if world.main:
                run.sinks = sinks.Sinks(options.log_to, log.folder, log.events[0], world.say)
            introduce(run, resolved, about)
        return conduct(run, resolved, options)
    except KeyboardInterrupt:
        if run is None:
            raise
        return interrupted(run, resolved, options)


def introduce(run, resolved, about):
    """The first lines that a person reads."""
    run.world.say(f"{resolved.preset or resolved.record.ref}  {resolved.record.title}", *resolved.report,
                  f"scale {resolved.scale}: {run.model.num_parameters():,} parameters, {len(run.plans)} steps of "
                  f"{tokens_per_step(run.s):,} tokens, {run.s.numerics.matmul}, {about['attention']}, {about['device']}",
                  *(f"slower than it could be: {line}" for line in about["fallbacks"]))


def conduct(run, resolved, options):
    """Warm-up, loop and end of a run whose log has begun. Returns the exit code; KeyboardInterrupt if it was asked to stop."""
    try:
        warm_up(run, options.seed)
        run.interrupt.patient = True
        run.interrupt.check()
        status = run.loop()
    except torch.OutOfMemoryError as error:
        raise UserError(out_of_memory(run, error)) from None
    except RuntimeError as error:  # of a collective whose other processes have stopped already (gloo; NCCL would wait for them)
        said = compiler.failure(error, run.log.folder if run.world.main else None)
        if said:
            raise UserError(said) from None
        if not (run.interrupt.asked and run.world.size > 1):
            raise
        raise KeyboardInterrupt from None
    finally:
        run.close()
    run.interrupt.says = "the run is over and being written down"
    return ended(status, run, resolved, options)


def interrupted(run, resolved, options):
    """The end of a run that was asked to stop. Returns the exit code."""
    with hold():
        run.close()
        return ended("interrupted", run, resolved, options)


def ended(status, run, resolved, options):
    """finish(), after which the sinks are told of the last event. Returns the exit code."""
    try:
        return finish(status, run, resolved, options)
    finally:
        run.sinks.close(run.log.events[-1])


def check_sync_here(s, compile_it):
    """UserError if --check-sync would mean something else on a CPU."""
    if compile_it:
        raise UserError("--check-sync looks at the operations of a CPU one by one: add --set system.compile=off")
    if s.system.attention == "auto" and s.model.attn.documents:
        raise UserError("--check-sync: attention by documents, which only a CPU has, reads their lengths: add --set "
                        "system.attention=banded")


def compiles(s, world):
    return s.system.compile == "on" or (s.system.compile == "auto" and world.cuda)


def out_of_memory(run, error):
    """One line: how much was asked for, and the setting that lowers it most without changing the record."""
    said = str(error).split(". ")[0]
    if run.s.system.kernels.loss in ("auto", "whole"):
        remedy = "--set system.kernels.loss=chunks, so that the head's logits never exist in full"
    elif run.at_once > 1:
        remedy = f"--set system.ranks_per_forward={run.at_once // 2} (now {run.at_once})"
    elif run.s.system.recompute != "on" and recomputable(run.s):
        remedy = "--set system.recompute=on, so that the blocks keep nothing for the backward pass"
    elif run.world.size == 1 or (run.world.size < LOGICAL_RANKS and run.engine.comm == "sharded"):
        remedy = f"use more than {run.world.size} GPU{'s' if run.world.size > 1 else ''}, which share the optimizer's state"
    else:
        remedy = "one logical rank a forward is the least; take a GPU with more memory, or --scale small"
    return f"out of memory with {run.at_once} logical ranks a forward ({said}): {remedy}"


def prepare_compiler(options, world, compile_it):
    """Caches, workers and --compile-cache, before the data are read. Returns its CacheFile or None."""
    if not compile_it:
        if options.compile_cache:
            raise UserError("--compile-cache: nothing is compiled here: leave it away, or --set system.compile=on")
        return None
    compiler.prepare(default_cache(), world.cuda, world.place.local_size)
    if not options.compile_cache:
        return None
    cache_file = compiler.CacheFile(options.compile_cache, world.rank, world.device)
    world.say(*cache_file.load())
    return cache_file


def check_kernels(s, device):
    """UserError if a kernel is asked for that cannot run on the device."""
    if s.system.cuda_graphs and device.type != "cuda":
        raise UserError(f"system.cuda_graphs needs CUDA, and this is {device.type}: leave it off")
    for field in dataclasses.fields(s.system.kernels):
        used = s.numerics.newton_schulz if field.name == "muon" else s.numerics.matmul
        fp8 = field.name == "transpose" or (field.name == "mlp" and s.numerics.fp8_mlp)
        if getattr(s.system.kernels, field.name) == "triton":
            why = refusal(device, getattr(torch, used), FP8_SINCE if fp8 else 80)
            why = why or (wider_rotation(s) if field.name == "qk" else None)
            if why:
                raise UserError(f"system.kernels.{field.name}=triton {why}: leave it at auto")


def wider_rotation(s):
    """Why the fused rotation, which computes in float32, is less than the precision plan asks (the rest of a sentence), or None.
    Where the plan asks less, as in records 5 to 16, the fused one is closer to exact arithmetic."""
    wide = next((name for name in ("eval_matmul", "norm", "rope", "rope_math") if getattr(s.numerics, name) == "float64"), None)
    return f"computes in float32, and numerics.{wide} is float64" if wide else None


def fallbacks(model, world):
    """What runs in a slower way than the record and this device allow, a line each. To be asked after all windows were seen."""
    s, found = model.settings, sorted(model.passed)
    for name in ("fp8_head", "fp8_mlp"):
        if getattr(s.numerics, name) and not (world.cuda and capability(world.device) >= FP8_SINCE):
            found.append(f"numerics.{name} is computed in its reference form: 8-bit products need compute capability 8.9")
    if world.cuda and not compiles(s, world):
        found.append("nothing is compiled: system.compile is off")
    layers = [moe for _, moe in model.mixtures()] if world.cuda else []
    if any(moe.select_backend(world.device, model.train_dtype, model.compiled) == "padded" for moe in layers):
        why = "system.experts is padded" if s.system.experts == "padded" else "torch's grouped_mm cannot do these"
        found.append(f"experts are multiplied in padded blocks: {why}")
    return found


def describe(resolved, options, world, corpus, model, engine, used, plans, held):
    """What the log says about a run before it starts. held: memory.Estimate, or None."""
    s = resolved.settings  # those of the model may have been fitted to the GPU
    return {"record": resolved.record.ref, "preset": resolved.preset, "scale": resolved.scale, "seed": options.seed,
            "changes": list(resolved.changes), "registered": options.registered, "numerics_version": NUMERICS_VERSION,
            "ml_hash": schema.ml_hash(s), "system_hash": schema.system_hash(s),
            "corpus": corpus.name, "corpus_digest": corpus_digest(corpus, used),
            "val_digest": val_digest(corpus, s.validation.tokens), "parameters": model.num_parameters(),
            "active_parameters": model.num_active(), "flops_per_token": model.flops_per_token(),
            "processes": world.size, "device": world.describe(), "attention": attention_backend(model, world, plans),
            "fallbacks": fallbacks(model, world), "memory": memory.report(model.settings, held) if held else None,
            "comm": engine.comm,
            "torch": torch.__version__, "code": repository.code_version(), "profiled": bool(options.profile),
            "sinks": sorted(set(options.log_to)), "load_start": load.load_average(), **runlog.machine()}


def attention_backend(model, world, plans):
    """Names of the attention backends that training steps use, over all their windows."""
    s, names = model.settings, set()
    rows = torch.zeros((1, s.data.seq_len), dtype=torch.long, device=world.device)  # every token a document of its own
    for windows in reversed(dict.fromkeys(p.windows for p in plans)):  # the first one last: the rotary tables follow them
        context = model.context(rows, 0, windows)
        names |= {"dense"} if context is None else set(context.backends())
    return ", ".join(sorted(names))


class Run:
    """The timed loop and what it has measured so far."""

    def __init__(self, s, world, log, plans, model, compiled, engine, corpus, rows, options, interrupt, cache_file=None):
        self.s, self.world, self.log, self.plans = s, world, log, plans
        self.model, self.compiled, self.engine, self.corpus, self.rows = model, compiled, engine, corpus, rows
        self.clock, self.points, self.train_losses, self.stream = Clock(world), [], [], None
        self.batches, self.steps_done, self.graphs, self.cache_file = None, 0, 0, cache_file
        self.epoch = 0  # the highest of all logical ranks at the last validation
        self.at_once = ranks_per_forward(s, len(world.ranks), world.cuda)
        self.profile = options.profile
        self.profiler, self.check_sync = None, options.check_sync
        self.interrupt = interrupt
        self.progress, self.sinks = Progress(world, s), sinks.Sinks()

    def loop(self):
        s, progress = self.s, self.progress
        self.clock.start()  # before the loader exists: nothing it does is free
        self.stream = Stream(self.corpus, ranks=self.world.ranks, **stream_arguments(s))
        self.batches = Prefetch(self.stream, len(self.plans))
        for step in range(len(self.plans) + 1):
            self.interrupt.check()
            if schedule.validates(s, step):
                progress.clear()
                if not self.validation(step):
                    return "diverged"
            if step == len(self.plans):
                return "finished"
            self.trace(step)
            with no_host_reads(self.world.cuda, f"step {step}") if self.check_sync else contextlib.nullcontext():
                rows = to_rows(self.batches.next(), s.data.seq_len, self.world.device, self.corpus.bos)
                self.train_losses.append(train_step(self, self.plans[step], *rows))
                progress.show(step + 1, self.train_losses[-1], self.clock.read_ms())
            self.steps_done = step + 1

    def validate(self, step, limit=None):
        """Validation loss with the windows that belong to this step."""
        windows = schedule.validation_windows(self.s, step)
        return validate(self.compiled, self.rows, self.world,
                        lambda tokens, read: self.model.context(tokens, self.corpus.bos, windows,
                                                                longest=longest_document(read, self.corpus.bos)),
                        limit, self.interrupt.check)

    def validation(self, step):
        """Stop the clock, measure, log, start it again. False if the loss is not finite."""
        self.batches.settle()  # no prefetch while the clock stands still
        self.clock.stop()
        losses, self.epoch = self.mean_train_losses(), max(self.world.gather_objects(self.stream.epoch))
        loss = self.validate(step)
        self.points.append((step, loss))
        ms = self.clock.total_ms
        event = self.log.event("validation", step=step, scheduled_steps=len(self.plans), val_loss=loss, train_loss=losses,
                               train_time_ms=round(ms, 3), tokens=step * tokens_per_step(self.s), epoch=self.epoch)
        self.world.say(*runlog.render(event))
        if self.model.mixtures() and step:
            self.world.say(*runlog.render(self.log.event("experts", step=step, **self.loads(last=step == len(self.plans)))))
        self.sinks.validation(event)
        if not all(map(math.isfinite, [loss, *losses])):
            return False
        if step < len(self.plans):
            self.clock.start()
        return True

    def mean_train_losses(self):
        """Training loss of each step since the last validation, mean over all logical ranks, on every process; then forgets
        them. The processes' losses are brought together only here, while the clock stands still."""
        losses, self.train_losses = self.train_losses, []
        return [round(x, 6) for x in self.world.mean(torch.stack(losses)).tolist()] if losses else []

    def loads(self, last):
        """How the last step's tokens were shared out, by layer (names as in arXiv 2408.15664): largest load over the mean one,
        less 1; experts without a token; rows that went nowhere; entropy of the scores over that of equal ones. last: every load."""
        out = {"layers": [], "max_vio": [], "idle": [], "dropped": [], "entropy": [], "max_bias": []}
        rows = self.s.model.mlp.moe.top_k * tokens_per_step(self.s)
        for layer, moe in self.model.mixtures():
            load = moe.router.load.double()
            values = {"layers": layer, "max_vio": round(float(load.max() / load.mean()) - 1, 4), "idle": int((load == 0).sum()),
                      "dropped": rows - int(load.sum()), "entropy": round(float(moe.router.entropy), 4),
                      "max_bias": round(float(moe.router.bias.abs().max()), 4)}
            for name, value in values.items():
                out[name].append(value)
        if last:
            out["load"] = [[int(x) for x in moe.router.load.tolist()] for _, moe in self.model.mixtures()]
        return out

    def trace(self, step):
        """--profile A:B: record steps A..B-1 with torch.profiler."""
        if self.profile is None:
            return
        if step == self.profile[0]:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        elif self.profiler is not None and step == self.profile[1]:
            self.end_trace()

    def end_trace(self):
        self.profiler.stop()
        if self.world.main:
            path = self.log.folder / "trace.json"
            try:
                self.profiler.export_chrome_trace(str(path))
                self.world.say(f"profile of steps {self.profile[0]}..{self.profile[1] - 1}: {path}")
            except (OSError, RuntimeError) as error:  # a picture of the run is not worth the run
                self.world.say(f"no profile: cannot write {path}: {error}")
        self.profiler = None

    def close(self):
        if self.batches is not None:
            self.batches.close()
        if self.profiler is not None:
            self.end_trace()

    def results(self):
        """What the run came to, for its last event."""
        return {"graphs_in_clock": compiled_graphs() - self.graphs, "steps": self.steps_done, "scheduled_steps": len(self.plans),
                "val_loss": self.points[-1][1] if self.points else None, "train_time_ms": round(self.clock.read_ms(), 3),
                "tokens": self.steps_done * tokens_per_step(self.s),
                "epoch": max(self.epoch, self.stream.epoch if self.stream else 0)}


def finish(status, run, resolved, options):
    """Digests, verdict, the last event, summary and checkpoint. Returns the exit code."""
    s, world, log, results = run.s, run.world, run.log, run.results()
    if world.cuda:
        results["peak_memory_mib"] = torch.cuda.max_memory_allocated() // 2 ** 20
    if status != "interrupted":  # an interrupted process may be alone: no collectives
        for name in [name for name in ("graphs_in_clock", "peak_memory_mib") if name in results]:
            results[name] = max(world.gather_objects(results[name]))
        digests = {r: d for part in world.gather_objects(run.stream.rank_digests()) for r, d in part.items()}
        log.event("stream", digest=stream_digest(digests))
        used = [seconds for node, seconds in world.gather_objects((platform.node(), run.clock.meter.own_s))
                if node == platform.node()]
        results |= load.account(run.clock.meter, sum(used), os.cpu_count() or 1)
    target = s.validation.target
    reached = results["val_loss"] <= target if status == "finished" and target is not None else None
    lines = verdict(s, resolved, run.points, results["train_time_ms"]) if status == "finished" else []
    lines += load.remark(results, os.cpu_count() or 1) if status == "finished" else []
    if status == "finished":  # before anything that a full disk could stop
        world.say(runlog.terminal_curve(run.points, target), *lines)
    log.end(status=status, target=target, reached=reached, verdict=lines, **results)
    if status != "finished":
        where = f"; the log is in {log.folder}" if world.main else ""
        world.say(f"{status} after {results['steps']} of {results['scheduled_steps']} steps{where}")
        return INTERRUPTED if status == "interrupted" else DIVERGED
    if world.main:
        world.say(f"log: {log.folder}")
    if options.save:
        save_checkpoint(run, resolved, results["val_loss"])
    if options.strict and results["graphs_in_clock"]:
        raise UserError(f"{results['graphs_in_clock']} graphs were compiled after the warm-up (--strict)")
    return MISSED if reached is False else REACHED


def save_checkpoint(run, resolved, val_loss):
    """checkpoint.pt in the run folder: whole, or UserError and none. The verdict stands already, in the log and on screen."""
    state = run.model.whole_state()  # every process takes part
    if not run.world.main:
        return
    path, image = run.log.folder / "checkpoint.pt", io.BytesIO()
    torch.save({"model": state, "settings": schema.plain(resolved.settings), "tokenizer": run.corpus.tokenizer,
                "val_loss": val_loss}, image)  # in memory: torch's own writer turns a full disk into an internal error
    files.write(path, image.getbuffer(), remedy="the log is complete, only the checkpoint is missing; free some space")
    run.world.say(f"checkpoint: {path}")


def start_processes(options, resolved):
    """--nproc: check settings, devices and data, then run this program as so many processes. Returns the exit code."""
    s = resolved.settings
    check_devices(resolved, options.nproc)
    require_shards(find_corpus(options, resolved), steps=len(schedule.plan(s)), **stream_arguments(s))
    return launch([sys.executable, os.path.abspath(__file__), *sys.argv[1:]], options.nproc)


def outcome(options, resolved):
    """The exit code of a command line; whatever goes wrong is one line, from one process where all meet the same."""
    try:
        if (options.nproc or 1) > 1 and not Place.read().launched:
            return start_processes(options, resolved)
        return train(resolved, options)
    except UserError as error:
        if dist.is_initialized() and not console.speaks():  # perhaps only this process met it
            print(f"error: {error} (process {Place.read().rank})", file=sys.stderr)
        else:
            console.complain(error)
        return 2
    except KeyboardInterrupt:
        if console.speaks():
            print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        if console.speaks():
            print("error: another process of this run has ended, and this one cannot go on alone", file=sys.stderr)
        return 1


def lost_peer(error):
    """Is it what a collective says when another process is gone?"""
    said = str(error)
    return dist.is_initialized() and any(x in said for x in ("closed by peer", "reset by peer", "Broken pipe", "Socket closed"))


def main(options, resolved):
    code = outcome(options, resolved)
    interrupt.decided(code)
    if dist.is_initialized() and code in (REACHED, MISSED, DIVERGED):
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main(options, resolved)
