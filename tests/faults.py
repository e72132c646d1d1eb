"""Faults in a training, and what the guards make of them, without and with --rescue skip.

    python tests/faults.py [--seeds N] [--record short/2] [--steps 40] [--out tests/faults.md]

`micro` runs of two layers on one process, each of which meets one fault from step 30 on. Told are the steps
until a guard speaks, what is done, and the difference of the final validation loss from the run of the same
seed without a fault. What a slow process meets is in test_guards.py.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common import environment

environment.require(*environment.TRAINING)
import torch

import runlog
import train_gpt
from system import command_line

SMALL = ("validation.tokens=4096", "validation.seq_len=256", "system.warmup_steps=1",
         "model.num_layers=2")
AT, BURST = 30, 5  # first step of a fault; steps of the burst
RESCUES = (None, "skip")
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


FAULTS = {"NaN in one gradient": (nan_gradient, 1), "one batch of random tokens": (corrupted_batch, 1),
          "one page of a repeated letter": (one_letter, 1),
          f"{BURST} steps of 10x learning rate": (burst, BURST)}


# ----- runs -------------------------------------------------------------------------------------------------

def outcome(ref, steps, seed, fault, rescue):
    """{status, loss or None, guards: [(what, step)]} of a run."""
    spoil, length = FAULTS.get(fault, (None, 0))

    def step(run, plan, *rest, **more):
        spoiled = run.guards is not None and AT <= plan.step < AT + length
        return spoil(run, plan, *rest) if spoiled else PLAIN(run, plan, *rest, **more)

    train_gpt.train_step = step
    sets = [part for x in (*SMALL, f"schedule.steps={steps}", f"validation.every={steps}")
            for part in ("--set", x)]
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        argv = [ref, "--scale", "micro", *sets, "--seed", str(seed), "--out", out]
        argv += ["--checkpoint-every", "never", *(["--rescue", rescue] if rescue else [])]
        options, resolved = command_line.command_line(argv)
        train_gpt.train(resolved, options)
        events = runlog.read_chain(next(Path(out).glob("*/run.jsonl")))
    finished = events[-1]["status"] == "finished"
    return {"status": events[-1]["status"], "loss": events[-1]["val_loss"] if finished else None,
            "guards": [(e["what"], e["step"]) for e in events if e["kind"] == "guard"]}


def row(fault, rescue, clean, found):
    """A line of the table. clean, found: the outcomes by seed."""
    told = [o["guards"][0] for o in found if o["guards"]]
    latency = ", ".join(map(str, sorted({step - AT for _, step in told}))) or "none"
    skips = [len(o["guards"]) for o in found if o["guards"] and o["guards"][0][0] == "skip"]
    actions = [f"{min(skips)} to {max(skips)} updates skipped"] if skips else []
    stopped = sum(o["status"] == "diverged" for o in found)
    actions += [f"{stopped} stopped"] if stopped else []
    more = [o["loss"] - c["loss"] for o, c in zip(found, clean) if o["loss"] is not None]
    lost = f"{statistics.fmean(more):+.4f} (sd {statistics.pstdev(more):.4f})" if more else "no loss"
    return (f"| {fault} | {rescue or 'none'} | {len(told)} of {len(found)} | {latency} | "
            f"{', '.join(actions) or 'nothing'} | {lost} |")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, default=5, metavar="N")
    p.add_argument("--record", default="short/2")
    p.add_argument("--steps", type=int, default=40, metavar="N")
    p.add_argument("--out", metavar="FILE", help="also write the table here")
    o = p.parse_args()
    torch.set_num_threads(1)
    lines = ["| fault at step 30 | --rescue | detected | steps until then | action | final loss, less that "
             "without the fault |", "|---|---|---|---|---|---|"]
    print(*lines, sep="\n")

    def all_seeds(fault, rescue):
        return [outcome(o.record, o.steps, seed, fault, rescue) for seed in range(o.seeds)]

    clean = all_seeds(None, None)
    for fault in (None, *FAULTS):
        for rescue in RESCUES if fault else RESCUES[1:]:
            lines.append(row(fault or "none", rescue, clean, all_seeds(fault, rescue)))
            print(lines[-1], flush=True)
    if o.out:
        head = (f"{o.record} at scale micro with two layers, {o.steps} steps, {o.seeds} seeds "
                "(`python tests/faults.py`).\nThe loss is that of the last validation, in nats per "
                "token.\n\n")
        Path(o.out).write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
