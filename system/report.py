"""The reports of a run: description at the start of the log, expert loads, verdict, checkpoint."""

import io
import os
import platform
from argparse import Namespace
from collections.abc import Sequence

import torch

import runlog
import schedule
from common import files, repository
from common.errors import UserError
from data.shards import Corpus, corpus_digest, val_digest
from data.stream import stream_digest
from layers.moe import max_vio
from model import GPT
from optim import Optimizer
from schedule import StepPlan
from settings import Settings, schema
from settings.declare import lookup
from settings.deltas import Resolved
from settings.numerics import NUMERICS_VERSION
from system import compiler, load, memory, resume, workers
from system.command_line import REWIND, SKIP
from system.guards import Guards, Tripped
from system.hooks import reading
from system.preflight import attention_backend, fallbacks
from system.rescue import Skip
from system.run import Run
from system.spikes import Spikes
from system.stall import Watchdog
from system.world import World

WEIGHTS = "checkpoint.pt"


def describe(
    resolved: Resolved, options: Namespace, world: World, corpus: Corpus, model: GPT, optimizer: Optimizer,
    used: int, plans: Sequence[StepPlan], held: memory.Estimate | None
) -> dict:
    """The description of a run for the first event of its log.

    Args:
        used: number of train shards that the run reads.
        held: estimate of the GPU's memory, if one was made.
    """
    s = resolved.settings  # not model.settings, which may have been fitted to the GPU
    return {
        "record": resolved.record.ref, "preset": resolved.preset, "scale": resolved.scale,
        "seed": options.seed, "changes": list(resolved.changes), "registered": options.registered,
        "numerics_version": NUMERICS_VERSION, "ml_hash": schema.ml_hash(s),
        "system_hash": schema.system_hash(s), "corpus": corpus.name,
        "corpus_digest": corpus_digest(corpus, used), "val_digest": val_digest(corpus, s.validation.tokens),
        "parameters": model.num_parameters(), "active_parameters": model.num_active(),
        "flops_per_token": model.flops_per_token(), "processes": world.size, "device": world.describe(),
        "attention": attention_backend(model, world, plans), "fallbacks": fallbacks(model, world),
        "memory": memory.report(model.settings, held) if held else None,
        "comm": "workers apart" if schedule.apart(s) else optimizer.plan.name,
        "torch": torch.__version__, "code": repository.code_version(), "profiled": bool(options.profile),
        "sinks": sorted(set(options.log_to)), "load_start": load.load_average(),
        "environment": runlog.environment(), **runlog.machine(),
        **({"rescue": options.rescue} if options.rescue else {}),
        **({"launch": launched} if (launched := resume.launch(os.environ)) else {})
    }


def folder_name(resolved: Resolved, seed: int) -> str:
    """The name of a run's folder, without its time."""
    name = resolved.preset or resolved.record.ref.replace("/", "-")
    return f"{name}_{resolved.scale}_{schema.ml_hash(resolved.settings)[:8]}_s{seed}"


def no_record(events: list[dict]) -> list[str]:
    """Lines that say why a run is no record: it was resumed, or assisted."""
    lines, guards = interruptions(events), [e for e in events if e["kind"] == "guard"]
    rescue = events[0].get("rescue")
    if rescue == SKIP:
        skipped = sum(e["what"] == SKIP for e in guards)
        count = f"{skipped} update{'s were' if skipped != 1 else ' was'} skipped"
    elif rescue == REWIND:
        back = [e for e in guards if e["what"] == REWIND]
        count = (f"{len(back)} rewind{'s' if len(back) != 1 else ''}, with {sum(e['batches'] for e in back)} "
                 f"steps of {sum(e['tokens'] for e in back):,} tokens discarded, whose time is on the clock")
    return [*lines, f"assisted (--rescue {rescue}): {count}: no record"] if rescue else lines


def interruptions(events: list[dict]) -> list[str]:
    """A list with the line that says that a run was resumed; [] if it was not."""
    at = [event["step"] for event in events if event["kind"] == "resume"]
    if not at:
        return []
    steps = f"step{'s' if len(at) > 1 else ''} {', '.join(map(str, at))}"
    return [f"resumed at {steps} after an interruption, with the time of lost steps on the clock: no record"]


def stopped_by_guard(run: Run, tripped: Tripped) -> str:
    """Log what a guard has found. Returns the status of the run."""
    run.progress.clear()
    if run.clock.began is not None:
        run.clock.stop()
    event = run.log.event("guard", **{"step": run.steps_done, **tripped.fields})
    run.world.say(*runlog.render(event))
    run.tripped = tripped.fields["message"]
    return "diverged"


def watch_over(run: Run, options: Namespace) -> None:
    """Set up what watches the steps: guards, the watchdog and, if asked for, the rescue."""
    spikes = Spikes() if options.rescue == REWIND else None
    run.guards = Guards(run.world, run.optimizer, spikes, run.kept_norms)
    skip = Skip(run.world, run.optimizer, run.guards, run.log) if options.rescue == SKIP else None
    run.optimizer.judge, run.rescue = skip, spikes or skip
    if run.rescue is not None and run.kept_rescue is not None:
        run.rescue.load(run.kept_rescue)
    if options.stall_timeout is not None:
        run.watchdog = watchdog(run, options.stall_timeout[1])


def watchdog(run: Run, limit: float) -> Watchdog:
    """The watchdog of a run, which logs what it finds and how the run goes on."""
    def stop(steps: list[int], text: str) -> None:
        run.log.last_event("guard", what="stall", step=max(steps) + 1, tensors=[], last_steps=steps,
                           message=text + remedy(run))
    return Watchdog(run.world, limit, run.guards.last_step, stop)


def remedy(run: Run) -> str:
    """How a run goes on that an error stopped, the end of its message; "" if it keeps no checkpoints."""
    if run.checkpoints is None or not run.world.main:
        return ""
    return f"; then go on with --resume {run.log.folder}"


def introduce(run: Run, resolved: Resolved, about: dict) -> None:
    """Print the first lines of a run."""
    run.world.say(
        f"{resolved.preset or resolved.record.ref}  {resolved.record.title}", *resolved.report,
        f"scale {resolved.scale}: {run.model.num_parameters():,} parameters, {len(run.plans)} steps of "
        f"{tokens_text(run.plans)} tokens, {run.s.numerics.matmul}, {about['attention']}, {about['device']}",
        *cut_line(run.s, run.plans), *exchanged(run),
        *(f"slower than it could be: {line}" for line in about["fallbacks"])
    )


def cut_line(s: Settings, plans: Sequence[StepPlan]) -> list[str]:
    """The settings for which the run is too short, in one line; [] without any."""
    cut = [f"{path} = {schema.show(lookup(s, path))}" for path, _ in schedule.cuts(s, plans)]
    said = f"this run is too short for {', '.join(cut)} (--dry-run says what it does instead)"
    return [said] if cut else []


def exchanged(run: Run) -> list[str]:
    """A list with the line on what workers that train apart exchange; [] without them."""
    return [workers.saved(run.s, run.optimizer)] if run.workers is not None else []


def expert_loads(run: Run, last: bool) -> dict[str, list]:
    """The fields of the event `experts`, by layer: how tokens were distributed over the experts.

    Collective; called after a validation, while the clock is stopped. MaxVio is largest load / mean load - 1
    (layers.moe).

    max_vio: MaxVio of the last step.
    max_vio_steps: mean over the steps since the validation before.
    max_vio_val: MaxVio of the validation's tokens together.
    idle: experts without a token in the last step.
    dropped: rows of the last step that reached no expert.
    entropy: of the scores in the last step, relative to that of equal scores.
    load, val_load: tokens of each expert in the last step and in the validation, only if `last`.
    """
    names = ("layers", "max_vio", "max_vio_steps", "max_vio_val", "idle", "dropped", "entropy", "max_bias")
    out = {name: [] for name in names}
    rows = run.s.model.mlp.moe.top_k * run.plans[run.steps_done - 1].tokens
    routers = run.model.routers()
    validated = run.world.total(torch.stack([router.validation_counts for router in routers]))
    for layer, router, val_load in zip(dict(run.model.mixtures()), routers, validated):
        load, (total, steps) = router.tokens_per_expert.double(), router.max_vio_sum.tolist()
        router.max_vio_sum.zero_()
        values = {
            "layers": layer, "max_vio": round(float(max_vio(load)), 4),
            "max_vio_steps": round(total / max(steps, 1), 4),  # the null device counts no steps
            "max_vio_val": round(float(max_vio(val_load)), 4),
            "idle": int((load == 0).sum()), "dropped": rows - int(load.sum()),
            "entropy": round(float(router.entropy), 4),
            "max_bias": round(float(router.bias.abs().max()), 4)
        }
        for name, value in values.items():
            out[name].append(value)
    if last:
        out["load"] = [[int(x) for x in router.tokens_per_expert.tolist()] for router in routers]
        out["val_load"] = [[int(x) for x in row] for row in validated.tolist()]
    return out


def tokens_text(plans: Sequence[StepPlan]) -> str:
    """Tokens of a step; where the batch changes, all sizes in their order."""
    return ", ".join(f"{tokens:,}" for tokens in dict.fromkeys(plan.tokens for plan in plans))


def verdict(
    s: Settings, resolved: Resolved, points: Sequence[tuple[int, float]], train_ms: float
) -> list[str]:
    """Lines on whether and when the target was reached, and on the published curve of the record, if any."""
    lines, target, final = [], s.validation.target, points[-1][1]
    if target is None:
        lines.append(f"no target at scale {resolved.scale}: final validation loss {final:.4f}")
    elif final <= target:
        lines.append(f"target {target:g} REACHED: {final:.4f} after {s.schedule.steps} steps, "
                     f"{train_ms / 1000:.1f} s of training; the curve crossed it at about step "
                     f"{runlog.crossing(points, target):.0f}")
    else:
        lines.append(
            f"target {target:g} MISSED: {final:.4f} after {s.schedule.steps} steps, {train_ms / 1000:.1f} s"
        )
    if assisted := schedule.readouts(s, s.schedule.steps):
        lines.append(f"read at the weights of {', '.join(one.setting for one in assisted)}, not at those of "
                     "the last update")
    reference = resolved.record.folder / "reference.csv"
    if resolved.scale == "full" and reference.exists() and not resolved.changes:
        published = {int(float(a)): float(b) for a, b, *_ in
                     (line.split(",") for line in reference.read_text(encoding="utf-8").splitlines()[1:])}
        common = [(step, loss) for step, loss in points if step in published]
        if common:
            step, loss = common[-1]
            lines.append(f"published curve at step {step} ({schedule.tokens_before(s, step):,} tokens): "
                         f"{published[step]:.4f}, here {loss:.4f} ({loss - published[step]:+.4f})")
    return lines


def save_checkpoint(run: Run, resolved: Resolved, val_loss: float) -> io.BytesIO | None:
    """Write checkpoint.pt in the run folder, whole or not at all. Collective.

    It holds the weights that the last validation read.
    Returns None, or its bytes if the disk did not take them: they can be written once the log has its end.
    """
    with reading(run.hooks, len(run.plans)):
        state = run.model.full_state_dict()  # every process takes part
    if not run.world.main:
        return None
    image = io.BytesIO()
    torch.save(
        {
            "model": state,
            "settings": schema.plain(resolved.settings),
            "tokenizer": run.corpus.tokenizer,
            # in memory: torch's own writer turns a full disk into an internal error
            "val_loss": val_loss,
        },
        image,
    )
    try:
        write_checkpoint(run, image)
    except UserError:
        return image
    return None


def checkpoint_line(run: Run) -> str:
    """Where checkpoint.pt is, and whose weights it has if they are not those of training."""
    read = [one.setting for one in schedule.readouts(run.s, len(run.plans))]
    return f"checkpoint: {run.log.folder / WEIGHTS}" + (
        f", the weights of {', '.join(read)}" if read else "")


def write_checkpoint(run: Run, image: io.BytesIO) -> None:
    """Write the bytes of checkpoint.pt. UserError if that fails: then no partial file is left."""
    files.write(
        run.log.folder / WEIGHTS, image.getbuffer(),
        remedy="the log is complete, only the checkpoint is missing; free some space"
    )


def results(run: Run) -> dict:
    """The results of a run, for the last event of its log."""
    memory_used = {"peak_memory_mib": torch.cuda.max_memory_allocated() // 2 ** 20} if run.world.cuda else {}
    return {
        "graphs_in_clock": compiler.graph_count() - run.graphs, "steps": run.steps_done,
        "scheduled_steps": len(run.plans), "val_loss": run.points[-1][1] if run.points else None,
        "train_time_ms": round(run.clock.read_ms(), 3),
        "tokens": schedule.tokens_before(run.s, run.steps_done),
        "epoch": max(run.epoch, run.stream.epoch if run.stream else 0), **memory_used
    }


def gathered_results(run: Run) -> dict:
    """results() of all processes together, with their maxima and CPU time. Collective.

    Logs the digest of the token stream.
    """
    out, world = results(run), run.world
    for name in [name for name in ("graphs_in_clock", "peak_memory_mib") if name in out]:
        out[name] = max(world.gather_objects(out[name]))
    digests = {r: d for part in world.gather_objects(run.stream.rank_digests()) for r, d in part.items()}
    run.log.event("stream", digest=stream_digest(digests))
    used = [seconds for node, seconds in world.gather_objects((platform.node(), run.clock.meter.own_s))
            if node == platform.node()]
    return out | load.account(run.clock.meter, sum(used), os.cpu_count() or 1)
