"""Laws of --rescue rewind: back to the last good checkpoint, on with other batches, all said, and no record."""

import json
import math
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import process_group
import runlog
import train_gpt
from data.stream import Prefetch, Stream, after_rewinds, stream_arguments
from evidence import run_laws
from system import checkpoint, command_line, guards, rewind, spikes
from system.run import Run
from test_resume import Killed, go_on, outcome

ROOT = Path(__file__).parent.parent
STEPS = 9
SMALL = (f"schedule.steps={STEPS}", "validation.tokens=1024", "validation.seq_len=128", "validation.every=4",
         "system.warmup_steps=1")
PLAIN = train_gpt.train_step


def options_of(ref, out, *more):
    shallow = ["model.num_layers=2"] if ref == "short/2" else []
    sets = [part for x in (*SMALL, *shallow) for part in ("--set", x)]
    return command_line.command_line([ref, "--scale", "micro", *sets, "--out", str(out), "--checkpoint-every",
                                      "2", "--keep-checkpoints", "9", "--save-checkpoint", *more])


def train(options, resolved):
    """(exit code, folder) of a run."""
    code = train_gpt.train(resolved, options)
    return code, next(Path(options.out).glob("*/run.jsonl")).parent


def spoil(at, value=math.nan):
    """A train_step with which the gradient of one parameter holds a value in the at-th step that is made."""
    made = []

    def step(run, plan, *rest, **more):
        if run.guards is None:
            return PLAIN(run, plan, *rest, **more)
        made.append(plan.step)
        if len(made) - 1 != at:
            return PLAIN(run, plan, *rest, **more)
        p = next(p for name, p in run.model.named_parameters() if name.endswith("mlp.c_fc"))
        hook = p.register_hook(lambda g: g.index_fill(0, torch.tensor([0]), value))
        try:
            return PLAIN(run, plan, *rest, **more)
        finally:
            hook.remove()
    return step


def without(to, read):
    """An open_stream that leaves out the batches from the to-th up to the read-th, for a run that never goes
    back."""
    class Gap(Stream):
        def next(self):
            while to <= self.step < read:
                super().next()
            return super().next()

    def open_stream(run, step, digests):
        about = stream_arguments(run.s)
        if isinstance(sizes := about["tokens_per_rank"], list):
            about["tokens_per_rank"] = sizes[:read] + sizes[to:]
        run.stream = Gap(run.corpus, ranks=run.world.ranks, **about)
        run.batches = Prefetch(run.stream, len(run.plans))
    return open_stream


@pytest.mark.parametrize("ref", ["short/2", "short/57"])  # record 57: the batch grows, the table unties
def test_a_run_that_went_back_ends_with_the_bits_of_one_that_never_read_the_skipped_batches(
        ref, tmp_path, monkeypatch, capsys):
    """Also if it is killed and resumed after that."""
    with monkeypatch.context() as patched:
        patched.setattr(train_gpt, "train_step", spoil(5))
        code, folder = train(*options_of(ref, tmp_path / "back", "--rescue", "rewind"))
    assert code == 0
    event, = (e for e in runlog.read_chain(folder / "run.jsonl") if e["kind"] == "guard")
    assert (event["what"], event["step"], event["to"], event["batches"]) == ("rewind", 5, 4, 2)
    with monkeypatch.context() as patched:
        patched.setattr(Run, "open_stream", without(4, 6))
        _, other = train(*options_of(ref, tmp_path / "gap", "--checkpoint-every", "never"))
    same_bits(folder, other)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        dies_in_step_7(patched)
        train(*options_of(ref, tmp_path / "killed", "--rescue", "rewind"))
    killed = next((tmp_path / "killed").glob("*/run.jsonl")).parent
    assert go_on(killed) == 0
    same_bits(killed, other)
    assert runlog.read_chain(killed / "run.jsonl")[-1]["verdict"][-1].startswith("assisted (--rescue rewind)")


def same_bits(folder, other):
    (ours, losses, tokens), (theirs, expected, same) = outcome(folder), outcome(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses == expected and tokens == same


def dies_in_step_7(patched):
    """The fault in step 5, and a kill in step 7, which is made after it."""
    spoiled = spoil(5)

    def step(run, plan, *rest, **more):
        if run.guards is not None and plan.step == 7:
            run.checkpoints.report(wait=True)
            raise Killed
        return spoiled(run, plan, *rest, **more)
    patched.setattr(train_gpt, "train_step", step)
