"""What a checkpoint and the guards cost: `python bench/checkpoint.py [--records short/11 ...] [--out JSON]`.

For each record on one process the CPU time of a training step, of the copy of the state between two steps,
and of the thread that makes digest and file; and both together in percent of the steps between two
checkpoints (--every 100). The guards (system/guards.py) are measured in each step, which contains them;
`rewind` is what --rescue rewind adds to a step, next to the guards and without its checkpoints. CPU time,
least of the repeats, so that other programs do not count. On a GPU the times of the step and of the copy are
those of the wall, and the thread works next to the training.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import measure
import torch

import schedule
from common import arguments, console
from common.interrupt import Interrupt
from data.batch import to_rows
from data.corpus import corpus_for
from data.stream import Prefetch, Stream, stream_arguments, validation_rows
from model import GPT
from optim import Optimizer
from report import Report, stop_in_order
from runlog import RunLog
from settings import deltas, schema
from settings.scales import SCALES
from system.checkpoint import Checkpoints
from system.guards import Guards
from system.hooks import hooks_of
from system.microbatch import ranks_per_microbatch
from system.movement import Movement
from system.run import Clock, Profiler, Progress, Run
from system.spikes import Spikes
from system.world import World
from train_gpt import train_step

RECORDS = ("short/11", "short/57", "variants/2")


def begin(ref: str, scale: str, data: str | None, out: str) -> Run:
    """A Run before its first step, its clock started."""
    s = deltas.resolve(ref, scale=scale).settings
    world, corpus, plans = World(s), corpus_for(scale, data, s), schedule.plan(s)
    model = GPT(s).to(world.device)
    model.initialise(0)
    optimizer = Optimizer(model, s)
    log = RunLog(out, "bench")
    log.start({"seed": 0}, schema.plain(s))
    run = Run(
        s, world, log, plans, model, model, optimizer, hooks_of(model, optimizer), corpus,
        validation_rows(corpus, s.validation.tokens, s.validation.seq_len, world.ranks),
        ranks_per_microbatch=ranks_per_microbatch(s, len(world.ranks), world.cuda),
        interrupt=Interrupt(main=True), cache_file=None, check_sync=False, clock=Clock(world),
        profiler=Profiler(world, None, None), progress=Progress(world, s)
    )
    run.stream = Stream(corpus, ranks=world.ranks, **stream_arguments(s))
    run.batches = Prefetch(run.stream, len(plans))
    run.guards = Guards(world, optimizer)
    run.clock.start()
    return run


def spent(call: Callable[[], Any], cuda: bool) -> float:
    """Seconds of a call: CPU time of all threads, on a GPU of the wall until the device has done it."""
    if cuda:
        return measure.seconds(call)
    began = time.process_time()
    call()
    return time.process_time() - began


def rewind_seconds(run: Run, steps: int = 100) -> float:
    """Seconds that --rescue rewind adds to a step: the size of the update, and the detector on the host."""
    movement, detector = Movement(run.optimizer), Spikes()

    def work():
        for step in range(steps):
            movement.begin()
            movement.end()
            detector.see(step, 5.0, 1.0)

    work()
    return min(spent(work, run.world.cuda) for _ in range(3)) / steps


def measured(ref: str, scale: str, data: str | None, every: int, repeats: int) -> dict:
    """Row of a record."""
    with tempfile.TemporaryDirectory() as out:
        run = begin(ref, scale, data, out)
        saver = Checkpoints(run, ("steps", every), keep=2)
        steps, copies, writes, norms, looks = [], [], [], [], []
        watch, cuda = run.guards.watch, run.world.cuda
        run.guards.watch = lambda gradients: norms.append(spent(lambda: watch(gradients), cuda))

        def step():
            plan = run.plans[run.steps_done]
            rows = to_rows(
                run.batches.next(), plan.shape.seq_len, run.world.device, run.corpus.bos,
                run.s.model.attn.segment
            )
            loss = train_step(run, plan, *rows)
            looks.append(spent(lambda: run.guards.after_step(plan.step, loss), cuda))
            run.steps_done += 1

        # the first repeat makes buffers, state and caches
        for _ in range(repeats + 1):
            steps += [spent(step, run.world.cuda) for _ in range(2)]
            run.batches.drain()
            # what the thread does meanwhile counts as copy too
            copies.append(spent(lambda: saver.save(run.steps_done), run.world.cuda))
            writes.append(spent(lambda: saver.report(wait=True), run.world.cuda))
        rewind_ms = 1000 * rewind_seconds(run)
        written = next(e for e in reversed(run.log.events) if e["kind"] == "checkpoint")
        run.close()
        run.log.close()
    step_ms, copy_ms, write_ms = (1000 * min(x[1:]) for x in (steps[1:], copies, writes))
    both, guard_ms = copy_ms + write_ms, 1000 * (min(norms[2:]) + min(looks[2:]))
    return {"parameters": run.model.num_parameters(), "mb": round(written["bytes"] / 1e6, 1),
            "step_ms": round(step_ms, 1), "copy_ms": round(copy_ms, 2), "write_ms": round(write_ms, 1),
            "percent": round(100 * both / (every * step_ms), 3),
            "percent_of_one_step": round(100 * both / step_ms, 1),
            "guard_ms": round(guard_ms, 3), "guard_percent": round(100 * guard_ms / step_ms, 3),
            "rewind_ms": round(rewind_ms, 3), "rewind_percent": round(100 * rewind_ms / step_ms, 3)}


def main() -> None:
    """Measure and print a line for each record."""
    p = arguments.Parser(prog="bench/checkpoint.py", description=__doc__.splitlines()[0])
    p.add_argument("--records", nargs="+", default=list(RECORDS), metavar="RECORD",
                   help=f"default: {' '.join(RECORDS)}")
    p.add_argument("--scale", choices=list(SCALES), default="tiny",
                   help="size of the records (default tiny)")
    p.add_argument("--data", metavar="DIR", help="folder of shards, for the scales full and small")
    p.add_argument("--every", type=arguments.integer(1), default=100, metavar="N",
                   help="steps between checkpoints, for their share of a run (default 100)")
    p.add_argument("--repeats", type=arguments.integer(1, 1000), default=5,
                   help="timings of each (default 5)")
    p.add_argument("--out", metavar="JSON", help="also write the figures here")
    o = p.parse_args()
    stop_in_order()
    torch.set_num_threads(1)
    report = Report(o.out, f"Checkpoints every {o.every} steps at scale {o.scale}", every=o.every,
                    scale=o.scale)
    for ref in o.records:
        row = report.attempt(
            {"record": ref}, lambda ref=ref: measured(ref, o.scale, o.data, o.every, o.repeats)
        )
        if "failed" not in row:
            print(f"{ref}: a step {row['step_ms']} ms, a checkpoint of {row['mb']} MB {row['copy_ms']} ms of "
                  f"copy and {row['write_ms']} ms of thread: {row['percent']} % of {o.every} steps; "
                  f"guards {row['guard_ms']} ms, {row['guard_percent']} % of a step; --rescue rewind "
                  f"{row['rewind_ms']} ms", flush=True)
    sys.exit(report.finish())


if __name__ == "__main__":
    console.program(main)
