"""Train any record of the NanoGPT speedrun, or any change to one.

    python train_gpt.py tiny-v3                     # CPU, about two minutes
    python train_gpt.py short/11 --nproc 8          # FineWeb, to 3.28, on eight GPUs; torchrun will do too
    python train_gpt.py short/11 --scale tiny --without model.residual.unet_skips
    python train_gpt.py --resume last               # goes on where a run was interrupted

Read top to bottom: main; train (settings -> data -> model -> optimizer -> log -> untimed warm-up and reset ->
loop -> verdict); loop (the clock); train_step; validate. Everything around them is in system/.

Exit codes: 0 target reached (or none set), 1 a process lost or stalled, 2 bad input or a file that cannot be
written, 3 target missed, 4 diverged or stopped by a guard, 130 Ctrl-C, SIGTERM or SIGHUP.
"""

from common import environment  # first: refuses a Python that is too old

import os
import time

PROCESS_START = time.perf_counter()
# Threads that spin for long while they wait slow each other down on a shared machine: next to one busy
# process a tiny step took 1.85 s with long spinning and 0.84 s without. On an idle machine a step takes
# 0.55 s without spinning and 0.42 s with it; a short spin keeps the 0.42 s. (GNU OpenMP; the variable must be
# set before torch loads its thread pool.)
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from common import allocator, console, interrupt

if __name__ == "__main__":
    console.guard()
    interrupt.leave_at_once("interrupted before the run" if console.speaks() else "")

from common.errors import UserError
from system import command_line

# refuse a wrong setting, or print the plan, before torch is imported, which takes seconds
if __name__ == "__main__":
    options, resolved = command_line.command_line()
    environment.require(*environment.TRAINING)
    if options.plan:
        from system.dry_run import print_plan
        try:
            print_plan(resolved, options.plot, options.card, options.nproc or 1)
        except UserError as error:  # of --plot and --card
            console.fail(error)
        raise SystemExit(console.settle())

import contextlib
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

import runlog
import schedule
from common.interrupt import INTERRUPTED, Interrupt, hold
from data.batch import Documents, count_documents, loss_weights, to_rows
from data.stream import require_shards, stream_arguments, validation_rows
from model import GPT
from optim import Optimizer
from schedule import StepPlan
from settings import schema
from settings.data import LOGICAL_RANKS
from settings.deltas import Resolved
from system import checkpoint, compiler, load, memory, preflight, report, resume, rewind, sinks
from system.comm import communication
from system.guards import Tripped
from system.hooks import hooks_of, reading, validating
from system.microbatch import ranks_per_microbatch, validation_rows_at_once
from system.place import Place
from system.run import Clock, Profiler, Progress, Run
from system.world import World, lost_peer
from system.sync import no_host_reads
from system.warmup import warm_up

IMPORTED = time.perf_counter()
REACHED, MISSED, DIVERGED = 0, 3, 4


# ----- the program ------------------------------------------------------------------------------------------

def main(options: Namespace, resolved: Resolved) -> None:
    """Run the program and leave it with its exit code."""
    code = exit_code(options, resolved)
    interrupt.decided(code)
    if dist.is_initialized() and code in (REACHED, MISSED, DIVERGED):
        dist.destroy_process_group()
    sys.exit(code)


def exit_code(options: Namespace, resolved: Resolved) -> int:
    """Run the command line and return its exit code.

    Every error is one line, printed once if all processes meet the same one.
    """
    try:
        if (reached := resume.verdict_of_restart(options)) is not None:
            return MISSED if reached is False else REACHED
        if (options.nproc or 1) > 1 and not Place.read().launched:
            return preflight.start_processes(os.path.abspath(__file__), options, resolved)
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
            print(
                "error: another process of this run has ended, and this one cannot go on alone",
                file=sys.stderr,
            )
        return 1


# ----- one run ----------------------------------------------------------------------------------------------

@memory.exhaustion_in_one_line()
def train(resolved: Resolved, options: Namespace) -> int:
    """One run, from settings to verdict. Returns the exit code. After a signal the log still gets its end."""
    with Interrupt(main=Place.read().rank == 0, patient=False) as asked:
        world, s, held, cache_file = prepare_machine(resolved, options, asked)
        corpus = preflight.find_corpus(options, resolved)
        plans = schedule.plan(s)
        preflight.check_profile(options, plans)
        used = require_shards(corpus, steps=len(plans), **stream_arguments(s))
        preflight.check_candidates(s, corpus, world.ranks, plans)
        rows = validation_rows(corpus, s.validation.tokens, s.validation.seq_len, world.ranks)

        model = GPT(s).to(world.device)
        model.initialise(options.seed)
        compiled = prepare_model(model, plans, compile_it=preflight.compiles(s, world))
        optimizer = Optimizer(
            model, s, communication(s, world.rank, world.size), compiled=compiled is not model
        )

        about = report.describe(resolved, options, world, corpus, model, optimizer, used, plans, held)
        preflight.check_strict(options, about["fallbacks"])
        run = None
        try:
            with hold():  # no signal in here: a log that has begun gets an end
                log = runlog.RunLog(
                    options.out, report.folder_name(resolved, options.seed), world.main,
                    began=PROCESS_START, folder=options.resume
                )
                if options.resume is None:
                    log.start(about, schema.plain(resolved.settings))
                run = Run(
                    s, world, log, plans, model, compiled, optimizer, hooks_of(model, optimizer), corpus,
                    rows, ranks_per_microbatch=ranks_per_microbatch(s, len(world.ranks), world.cuda),
                    interrupt=asked, cache_file=cache_file, check_sync=options.check_sync, clock=Clock(world),
                    profiler=Profiler(world, log.folder if world.main else None, options.profile),
                    progress=Progress(world, s)
                )
                if world.main:
                    run.sinks = sinks.Sinks(options.log_to, log.folder, log.events[0], world.say)
                report.introduce(run, resolved, about)
                found = None
                if options.resume is not None:
                    found = checkpoint.begin_again(run, options.resume, about)
            return finish(conduct(run, options, found), run, resolved, options)
        except KeyboardInterrupt:
            if run is None or run.log.events[-1]["kind"] == "end":
                raise
            with hold():
                run.close()
                return finish("interrupted", run, resolved, options)
        finally:
            if run is not None:
                run.log.close()


def prepare_machine(resolved: Resolved, options: Namespace, asked: Interrupt) -> tuple:
    """Check the settings, join the processes of the run and prepare the compiler.

    Returns (World, settings as fitted to the GPU, memory.Estimate or None, CacheFile or None).
    """
    s, held = resolved.settings, None
    sinks.require(options.log_to)
    preflight.check_devices(resolved, Place.read().local_size)
    world = World(s)
    asked.join(*world.neighbours())
    # nothing draws from the global generator yet; a feature that does is repeatable
    torch.manual_seed(options.seed)
    preflight.check_kernels(s, world.device)
    compile_it = preflight.compiles(s, world)
    if options.check_sync and not world.cuda:
        preflight.check_sync_here(s, compile_it)
    cache_file = preflight.prepare_compiler(options, world, compile_it)
    if not world.cuda:
        allocator.keep_freed_memory()
    else:
        capacity = torch.cuda.get_device_properties(world.device).total_memory
        s, held = memory.fit(s, len(world.ranks), capacity, world.size)
    return world, s, held, cache_file


def prepare_model(model: GPT, plans: Sequence[StepPlan], compile_it: bool) -> torch.nn.Module:
    """The module that the steps call: the model, compiled if `compile_it`.

    Compiled, it has one graph per Shape in training, and one per Shape in validation.
    """
    if not compile_it:
        return model
    torch._dynamo.config.recompile_limit = 16 + 2 * len(schedule.shapes(plans))
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # past the limit dynamo would go on uncompiled
    model.prepare_compile()
    return torch.compile(model, dynamic=False)


def conduct(run: Run, options: Namespace, found: checkpoint.Found | None = None) -> str:
    """Warm-up and loop of a run whose log has begun.

    found: the checkpoint from which it continues.
    Returns "finished" or "diverged"; raises KeyboardInterrupt if the run was asked to stop.
    """
    try:
        warm_up(run, options.seed, train_step, validation_loss, PROCESS_START, IMPORTED)
        if found is not None:
            checkpoint.restore(run, found)
        if options.checkpoint_every is not None:
            run.checkpoints = checkpoint.Checkpoints(run, options.checkpoint_every, options.keep_checkpoints)
        run.interrupt.patient = True
        run.interrupt.check()
        status = loop(run, found.about["digests"] if found else {}, options)
    except Tripped as tripped:
        status = report.stopped_by_guard(run, tripped)
    except torch.OutOfMemoryError as error:
        raise UserError(preflight.out_of_memory(run, error)) from None
    except UserError as error:  # a shard is gone, a disk is full
        raise UserError(f"{error}{report.remedy(run)}") from None
    except RuntimeError as error:
        said = compiler.failure(error, run.log.folder if run.world.main else None)
        if said:
            raise UserError(said) from None
        # a collective whose other processes have stopped already (gloo; NCCL would wait for them)
        if not (run.interrupt.asked and run.world.size > 1):
            raise
        raise KeyboardInterrupt from None
    finally:
        run.close()
    run.interrupt.says = "the run is over and being written down"
    return status


def loop(run: Run, digests: dict[str, str], options: Namespace) -> str:
    """The timed steps, and between them the validations, during which the clock is stopped.

    digests: of the tokens before the first step of a run that continues, by logical rank.
    Returns "finished" or "diverged". Tripped if a guard stops the run.
    """
    run.clock.start()  # before the loader exists: nothing the loader does is free
    if run.seams is not None:
        run.seams.start()
    run.open_stream(run.first_step, digests)
    report.watch_over(run, options)
    step = run.first_step
    while True:
        run.begins("between two steps")
        try:
            run.stop_or_save(step)
            if schedule.validates(run.s, step) and not validation(run, step):
                return "diverged"
        except Tripped as tripped:
            step = rewind.back(run, tripped, step)
            continue
        if step == len(run.plans):
            return "finished"
        run.profiler.before_step(step)
        run.begins(f"step {step}")
        with no_host_reads(run.world.cuda, f"step {step}") if run.check_sync else contextlib.nullcontext():
            step_plan = run.plans[step]
            inputs, targets, documents = to_rows(
                run.batches.next(), step_plan.shape.seq_len, run.world.device, run.corpus.bos,
                run.s.model.attn.segment
            )
            run.train_losses.append(train_step(run, step_plan, inputs, targets, documents))
            run.guards.after_step(step, run.train_losses[-1])
            run.progress.show(step + 1, run.train_losses[-1], run.clock.read_ms())
        step += 1
        run.steps_done = step


def train_step(
    run: Run, step_plan: StepPlan, inputs: torch.Tensor, targets: torch.Tensor,
    documents: Sequence[Documents],
    before_reduction: Callable[[], None] | None = None
) -> torch.Tensor:
    """One step of this process's logical ranks: one update, or one of each worker that trains apart.

    Returns the mean loss of these ranks, 0-d float64.

    Args:
        inputs, targets: (ranks, rows, T) int64, from to_rows.
        documents: Documents of each rank, from to_rows.
        before_reduction: called after the backward passes, before gradients are reduced (warm-up only).
    """
    if run.workers is None:
        return update(run, step_plan, inputs, targets, documents, before_reduction)
    losses = [
        update(run, step_plan, inputs[k:k + 1], targets[k:k + 1], documents[k:k + 1], before_reduction)
        for k in run.workers.each()
    ]
    run.workers.join()
    return torch.stack(losses).mean()


def update(
    run: Run, step_plan: StepPlan, inputs: torch.Tensor, targets: torch.Tensor,
    documents: Sequence[Documents], before_reduction: Callable[[], None] | None
) -> torch.Tensor:
    """Forward and backward of some logical ranks, then the update. Arguments and result: as of train_step."""
    model, optimizer, microbatch = run.model, run.optimizer, run.ranks_per_microbatch
    # Gradients of all forwards and processes add up to that of the mean over the logical ranks of the update,
    # all eight or a worker's one. The loss of a rank is the mean or, with loss_reduction `sum`, the sum over
    # its tokens; with `step_sum` the mean over the ranks is multiplied by eight.
    together = LOGICAL_RANKS if run.workers is None else 1
    share = microbatch / together
    if run.s.model.head.loss_reduction != "mean":
        share *= step_plan.shape.tokens_per_rank
    if run.s.model.head.loss_reduction == "step_sum":
        share *= LOGICAL_RANKS
    losses, starts = [], range(0, len(inputs), microbatch)
    weights = loss_weights(step_plan.target_weights, inputs.device)
    table, prefix_weight = prefix_targets(run, step_plan, inputs.device)
    candidates = corrections = None
    if step_plan.shape.candidates is not None:
        candidates, corrections = run.sampler.draw(step_plan.shape.candidates, documents)
    for hook in run.hooks:
        hook.before_forwards(step_plan)
    for first in starts:
        optimizer.expect(last=first == starts[-1], launch=before_reduction is None, due=step_plan.due)
        ranks = slice(first, first + microbatch)
        x, y = inputs[ranks].flatten(0, 1), targets[ranks].flatten(0, 1)  # (R, T)
        numbers, lengths, _ = zip(*documents[ranks])
        context = model.context(
            x, run.corpus.bos, step_plan.shape.windows, max_docs=sum(numbers), max_seqlen=max(lengths),
            tokens_per_rank=step_plan.shape.tokens_per_rank
        )
        loss = run.compiled(
            x, y, context, target_weights=weights, prefix=None if table is None else table[y],
            prefix_weight=prefix_weight, candidates=None if candidates is None else candidates[ranks],
            corrections=None if corrections is None else corrections[ranks]
        ).mean()
        (loss * share).backward()
        optimizer.accumulate()
        losses.append(loss.detach())
    if before_reduction is not None:
        before_reduction()
    for hook in run.hooks:
        hook.before_update(step_plan, run.world)
    if optimizer.judge is not None:
        optimizer.judge.before_update(step_plan.step, torch.stack(losses).mean(dtype=torch.float64))
    with run.guards.updating() if run.guards is not None else contextlib.nullcontext():
        optimizer.step(step_plan, run.guards.watch if run.guards is not None else None)
    for hook in run.hooks:
        hook.after_update(step_plan)
    # float64 holds sums of float32 losses exactly, so their order does not matter
    return torch.stack(losses).mean(dtype=torch.float64)


def prefix_targets(run: Run, step_plan: StepPlan, device: torch.device) -> tuple:
    """(prefix of each token (V,), its loss weight (1,)) of a step on the device, or (None, None)."""
    if not step_plan.shape.prefix:
        return None, None
    return run.prefixes(device), loss_weights((step_plan.prefix_weight,), device)


# ----- validation -------------------------------------------------------------------------------------------

def validation(run: Run, step: int) -> bool:
    """Stop the clock, validate, log, start the clock again. Returns False if a loss is not finite.

    Tripped if a guard stops the run.
    """
    run.progress.clear()
    run.batches.drain()  # no prefetch while the clock is stopped
    if run.s.validation.canonical_mask and step == len(run.plans):
        run.seams.collect()  # made during the run, and waited for on the clock
    run.clock.stop()
    run.guards.agree()
    losses, norms = run.mean_train_losses(), run.guards.gradient_norms()
    run.epoch = max(run.world.gather_objects(run.stream.epoch))
    loss, assisted = read_loss(run, step)
    run.points.append((step, loss))
    event = run.log.event(
        "validation", step=step, scheduled_steps=len(run.plans), val_loss=loss, train_loss=losses,
        train_time_ms=round(run.clock.total_ms, 3), tokens=schedule.tokens_before(run.s, step),
        epoch=run.epoch, **({"grad_norm": norms} if norms else {}), **assisted
    )
    run.world.say(*runlog.render(event))
    if run.model.mixtures() and step:
        loads = run.log.event("experts", step=step, **report.expert_loads(run, last=step == len(run.plans)))
        run.world.say(*runlog.render(loads))
    run.sinks.validation(event)
    told = [loss, assisted.get("raw_val_loss", 0.0)]
    if run.optimizer.judge is None:  # a skipped step may have any loss
        told += losses
    if not all(map(math.isfinite, told)):
        return False
    if step < len(run.plans):
        run.clock.start()
    return True


def read_loss(run: Run, step: int) -> tuple[float, dict]:
    """(validation loss, what the event says about the weights that were read).

    Averaged or extrapolated weights are named, as `readout`: the settings that make them. Where training goes
    on without them, the loss of the training's own weights stands next to theirs, as `raw_val_loss`.
    """
    found, assisted = schedule.readouts(run.s, step), {}
    if found:
        assisted["readout"] = [one.setting for one in found]
    if any(one.undone for one in found):
        assisted["raw_val_loss"] = validation_loss(run, step)
    with reading(run.hooks, step):
        return validation_loss(run, step), assisted


def validation_loss(run: Run, step: int, limit: int | None = None) -> float:
    """Validation loss at a step, with the windows of the step and the embedding tied if it still is.

    limit: as in `validate`.
    """
    windows = schedule.validation_windows(run.s, step)
    run.model.tied = schedule.tied(run.s, step)  # the warm-up validates out of order

    def context(tokens, read):
        max_docs, max_seqlen, _ = count_documents(read, run.corpus.bos)
        found = run.model.context(tokens, run.corpus.bos, windows, max_docs=max_docs, max_seqlen=max_seqlen)
        if run.s.validation.canonical_mask and step == len(run.plans):
            found.impossible = run.seams.table
        return found

    with validating(run.hooks, windows):
        return validate(run.compiled, run.rows, run.world, context, limit, run.between_chunks)


@torch.no_grad()
def validate(
    model: torch.nn.Module, rows: np.ndarray, world: World, context: Callable, limit: int | None = None,
    check: Callable[[], None] = lambda: None
) -> float:
    """Mean cross entropy over all validation targets, nats per token.

    Losses are summed in float64, per logical rank and then in rank order: the value does not depend on the
    number of processes.

    Args:
        rows: (local ranks, rows, T + 1) int32.
        context: function (tokens (R, T) on the device, the same on the host) -> attention metadata.
        limit: validate only this many chunks of this many ranks (warm-up; the value means nothing).
        check: called before each chunk; may raise.
    """
    model.eval()
    chunk = validation_rows_at_once(rows.shape[1], rows.shape[-1] - 1, world.cuda)
    sums = []
    for rank_rows in rows[:limit]:
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        for first in list(range(0, len(rank_rows), chunk))[:limit]:
            check()
            read = rank_rows[first:first + chunk]  # (R, T + 1)
            part = torch.from_numpy(read).to(world.device).long()
            total += model(
                part[:, :-1], part[:, 1:], context(part[:, :-1], read[:, :-1])
            ).sum(dtype=torch.float64)
        sums.append(total)
    model.train()
    sums = world.gather(torch.stack(sums))
    return sum(sums.tolist()) / (LOGICAL_RANKS * rows.shape[1] * (rows.shape[2] - 1))


# ----- the end ----------------------------------------------------------------------------------------------

def finish(status: str, run: Run, resolved: Resolved, options: Namespace) -> int:
    """Verdict, the last event, summary and checkpoint. Returns the exit code."""
    try:
        return write_down(status, run, resolved, options)
    finally:
        run.sinks.close(run.log.events[-1])


def write_down(status: str, run: Run, resolved: Resolved, options: Namespace) -> int:
    """Finish the log, print how the run ended, and return the exit code."""
    world, log, target, lines, reached = run.world, run.log, run.s.validation.target, [], None
    results = report.results(run) if status == "interrupted" else report.gathered_results(run)
    if run.tripped is not None:
        results["val_loss"], lines = math.nan, [run.tripped]
    if status == "finished":
        reached = results["val_loss"] <= target if target is not None else None
        lines = report.verdict(run.s, resolved, run.points, results["train_time_ms"])
        lines += report.exchanged(run) + load.remark(results, os.cpu_count() or 1)
        lines += report.no_record(log.events)
        # say it before any write that a full disk could stop
        world.say(runlog.terminal_curve(run.points, target), *lines)
    # before the end: a log that calls the run finished stands next to everything that was asked for
    weights = None
    if status == "finished" and options.save_checkpoint:
        weights = report.save_checkpoint(run, resolved, results["val_loss"])
    log.end(status=status, target=target, reached=reached, verdict=lines, **results)
    if status != "finished":
        where = f"; the log is in {log.folder}" if world.main else ""
        world.say(f"{status} after {results['steps']} of {results['scheduled_steps']} steps{where}")
        if status == "interrupted" and run.checkpoints is not None and world.main:
            world.say(f"go on with: train_gpt.py --resume {log.folder}")
        return INTERRUPTED if status == "interrupted" else DIVERGED
    if world.main:
        world.say(f"log: {log.folder}")
    if run.checkpoints is not None:  # of a run that is over
        run.checkpoints.remove()
    if weights is not None:  # there was no room for them; now there may be
        report.write_checkpoint(run, weights)
    if options.save_checkpoint and world.main:
        world.say(report.checkpoint_line(run))
    if options.strict and results["graphs_in_clock"]:
        graphs = results["graphs_in_clock"]
        raise UserError(f"{graphs} graphs were compiled after the warm-up, which --strict forbids: with "
                        "TORCH_LOGS=recompiles torch says which and why")
    return MISSED if reached is False else REACHED


if __name__ == "__main__":
    main(options, resolved)
