"""Faults in a training, and what the guards make of them: without --rescue, with skip and with rewind.

    python tests/faults.py [--seeds 5] [--record short/2] [--steps 120] [--out tests/faults.md]
    python tests/faults.py --alarms [--seeds 5]     # undisturbed runs: what is taken for a fault

`micro` runs, each of which meets one fault in the middle, once: a run that goes back does not meet it again.
Told are the steps until a guard speaks, what is done, and the difference of the final validation loss from
the run of the same seed without a fault. A slow process is one of two that sleeps. Goes on where it stopped
(the outcomes lie in data/cache/faults).
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common import environment, files

environment.require(*environment.TRAINING)
import torch

import runlog
import train_gpt
from system import command_line, rescue, spikes

SMALL = ("validation.tokens=4096", "validation.seq_len=256", "system.warmup_steps=1")
STEPS, BURST = 120, 5  # of a run; of the burst
RESCUES = (None, "skip", "rewind")
RECORDS = ("short/2", "short/11", "short/33", "short/57", "variants/2")
SLOW_S = 0.5  # that a slow process sleeps in each of BURST steps
PLAIN = train_gpt.train_step


# ----- faults: functions (run, plan, inputs, targets, documents) -> loss ------------------------------------

def nan_gradient(run, plan, *rest):
    """One number of one gradient is NaN."""
    p = next(p for name, p in run.model.named_parameters() if name.endswith("mlp.c_fc"))
    hook = p.register_hook(lambda g: g.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(math.nan)))
    try:
        return PLAIN(run, plan, *rest)
    finally:
        hook.remove()


def corrupted_batch(run, plan, inputs, targets, documents):
    """Inputs and targets are random tokens."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = (torch.randint(run.corpus.vocab_size, x.shape, generator=generator)
                       for x in (inputs, targets))
    return PLAIN(run, plan, inputs, targets, documents)


def one_letter(run, plan, inputs, targets, documents):
    """A page of one repeated token."""
    return PLAIN(run, plan, torch.full_like(inputs, 65), torch.full_like(targets, 65), documents)


def burst(run, plan, *rest):
    """Ten times the learning rate."""
    return PLAIN(run, dataclasses.replace(plan, lr_factor=10 * plan.lr_factor), *rest)


def slow(run, plan, *rest):
    """The last process sleeps."""
    if run.world.rank == run.world.size - 1:
        time.sleep(SLOW_S)
    return PLAIN(run, plan, *rest)


FAULTS = {
    "NaN in one gradient": (nan_gradient, 1), "one batch of random tokens": (corrupted_batch, 1),
    "one page of a repeated letter": (one_letter, 1), f"{BURST} steps of 10x learning rate": (burst, BURST)
}
SLOW = f"one of two processes {SLOW_S:g} s late in {BURST} steps"


# ----- runs -------------------------------------------------------------------------------------------------

def outcome(ref, steps, seed, fault, rescue):
    """{status, loss or None, guards: [(what, step, steps discarded)]} of a run."""
    at, made = steps // 2, []  # made: steps that were begun; a run that goes back has met the fault
    spoil, length = (slow, BURST) if fault == SLOW else FAULTS.get(fault, (None, 0))

    def step(run, plan, *rest, **more):
        if run.guards is None:
            return PLAIN(run, plan, *rest, **more)
        made.append(plan.step)
        spoiled = at < len(made) <= at + length and len(made) - 1 == plan.step
        return spoil(run, plan, *rest) if spoiled else PLAIN(run, plan, *rest, **more)

    train_gpt.train_step = step
    lines = [*SMALL, f"schedule.steps={steps}", f"validation.every={steps}"]
    lines += ["model.num_layers=2"] if ref == "short/2" else []
    sets = [part for x in lines for part in ("--set", x)]
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        argv = [ref, "--scale", "micro", *sets, "--seed", str(seed), "--out", out]
        argv += ["--rescue", rescue] if rescue else ["--checkpoint-every", "never"]
        options, resolved = command_line.command_line(argv)
        train_gpt.train(resolved, options)
        if not (logs := [*Path(out).glob("*/run.jsonl")]):
            return {}  # this is not process 0, which has the log
        events = runlog.read_chain(logs[0])
    finished = events[-1]["status"] == "finished"
    last = [e for e in events if e["kind"] == "validation"][-1]
    return {"status": events[-1]["status"], "loss": events[-1]["val_loss"] if finished else None,
            "guards": [(e["what"], e["step"], e.get("batches", 0)) for e in events if e["kind"] == "guard"],
            "losses": last["train_loss"], "norms": last.get("grad_norm", [])}


def of_two(ref, steps, seed, fault):
    """The outcome on two processes, in processes of their own."""
    import process_group
    with tempfile.TemporaryDirectory() as out:
        result = Path(out, "outcome.json")
        done = process_group.run(
            [sys.executable, __file__, "--one", json.dumps([ref, steps, seed, fault]), "--out", str(result)],
            2, timeout=3600, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        )
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(result.read_text())


def kept(home, *case, on_two=False):
    """The outcome of a case, which is made once."""
    path = home / ("-".join(str(part).replace("/", "_").replace(" ", "_") for part in case) + ".json")
    if not path.exists():
        made = of_two(*case[:4]) if on_two else outcome(*case)
        files.write(path, json.dumps(made), parents=True)
    return json.loads(path.read_text())


# ----- tables -----------------------------------------------------------------------------------------------

def row(fault, rescue, at, clean, found):
    """A line of the table. clean, found: the outcomes by seed."""
    told = [o["guards"][0] for o in found if o["guards"]]
    latency = ", ".join(map(str, sorted({step - at for _, step, _ in told}))) or "none"
    actions = []
    for what, said in (("skip", "skipped updates"), ("rewind", "rewinds")):
        counts = [sum(g[0] == what for g in o["guards"]) for o in found]
        if any(counts):
            actions.append(f"{said}: {' to '.join(map(str, sorted({min(counts), max(counts)})))}")
    if any(steps := [sum(g[2] for g in o["guards"]) for o in found]):
        actions.append(f"{statistics.fmean(steps):.1f} steps discarded")
    stopped = sum(o["status"] == "diverged" for o in found)
    actions += [f"{stopped} stopped"] if stopped else []
    more = [o["loss"] - c["loss"] for o, c in zip(found, clean) if o["loss"] is not None]
    lost = f"{statistics.fmean(more):+.4f} (sd {statistics.pstdev(more):.4f})" if more else "no loss"
    return (f"| {fault} | {rescue or 'none'} | {len(told)} of {len(found)} | {latency} | "
            f"{', '.join(actions) or 'nothing'} | {lost} |")


def faults(o, home):
    """Lines of the table of faults."""
    at = o.steps // 2
    lines = [f"| fault at step {at} | --rescue | detected | steps until then | action | final loss, less "
             "that without the fault |", "|---|---|---|---|---|---|"]
    print(*lines, sep="\n")

    def all_seeds(fault, rescue, on_two=False):
        return [kept(home, o.record, o.steps, seed, fault, rescue, on_two=on_two) for seed in range(o.seeds)]

    clean = all_seeds(None, None)
    for fault in (None, *FAULTS):
        for rescue_ in RESCUES if fault else RESCUES[1:]:
            lines.append(row(fault or "none", rescue_, at, clean, all_seeds(fault, rescue_)))
            print(lines[-1], flush=True)
    alone = all_seeds(None, "two", on_two=True)
    lines.append(row(SLOW, None, at, alone, all_seeds(SLOW, "two", on_two=True)))
    print(lines[-1], flush=True)
    return lines


def scores(losses, norms):
    """(largest z of spikes.Spikes, largest of rescue.Skip) in the steps of an undisturbed run."""
    slow_, detector = [0.0], spikes.Spikes()
    histories, fast = ([], []), [0.0]
    for loss, norm in zip(losses, norms):
        detector.add(loss, 1.0)
        slow_.append(detector.score())
        for x, history in zip((loss, norm), histories):
            fast.append(rescue.score(x, history))
            history[:] = [*history, x][-rescue.WINDOW:]
    return max(slow_), max(fast)


def alarms(o, home):
    """Lines of the table of undisturbed runs, with the largest ratio of an update to those before it."""
    lines = ["| record | runs | steps | updates skipped | rewinds | largest z of skip (6 is a spike) "
             "| largest z of the loss (10) | largest update (4) |", "|---|---|---|---|---|---|---|---|"]
    print(*lines, sep="\n")
    for ref in RECORDS:
        found = [measured(home, ref, o.steps, seed) for seed in range(o.seeds)]
        slow_, fast = zip(*(scores(x["losses"], x["norms"]) for x in found))
        lines.append(
            f"| {ref} | {len(found)} | {len(found) * o.steps} | {sum(z > rescue.LIMIT for z in fast)} | "
            f"{sum(len(x['guards']) for x in found)} | {max(fast):.1f} | {max(slow_):.1f} | "
            f"{max(x['largest'] for x in found):.2f} |")
        print(lines[-1], flush=True)
    return lines


def measured(home, ref, steps, seed):
    """The outcome of an undisturbed run with --rescue rewind, and its largest ratio of updates."""
    ratios, plain = [0.0], spikes.Spikes.see

    def see(detector, step, loss, update):
        if len(detector.updates) >= spikes.LEAST:
            ratios.append(update / max(detector.updates))
        return plain(detector, step, loss, update)

    path = home / f"alarm-{ref.replace('/', '_')}-{steps}-{seed}.json"
    if not path.exists():
        spikes.Spikes.see = see
        made = outcome(ref, steps, seed, None, "rewind")
        spikes.Spikes.see = plain
        files.write(path, json.dumps({**made, "largest": max(ratios)}), parents=True)
    return json.loads(path.read_text())


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, default=5, metavar="N")
    p.add_argument("--record", default="short/2")
    p.add_argument("--steps", type=int, default=STEPS, metavar="N")
    p.add_argument("--alarms", action="store_true", help="undisturbed runs of five records")
    p.add_argument("--out", metavar="FILE", help="also write the tables here")
    p.add_argument("--one", help=argparse.SUPPRESS)
    o = p.parse_args()
    torch.set_num_threads(1)
    if o.one:
        made = outcome(*json.loads(o.one), None)
        if os.environ["RANK"] == "0":
            files.write(Path(o.out), json.dumps(made))
        return
    # what was measured with other code says nothing
    home = files.default_cache() / "faults" / runlog.sources()[1]
    lines = alarms(o, home) if o.alarms else faults(o, home)
    if o.out:
        head = "" if o.alarms else (
            f"{o.record} at scale micro with two layers, {o.steps} steps, {o.seeds} seeds (`python "
            "tests/faults.py`).\nThe loss is that of the last validation, in nats per token.\n\n")
        files.write(Path(o.out), head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
