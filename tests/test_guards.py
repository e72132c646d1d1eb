"""Laws of the guards: what is not finite stops a run at once, with the step and the tensor, and nothing waits."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import runlog
import train_gpt
from evidence import run_laws
from optim import Optimizer
from settings import LOGICAL_RANKS
from system import checkpoint, command_line, guards
from system.guards import Guards, Tripped

SMALL = ("schedule.steps=8", "validation.tokens=1024", "validation.seq_len=128", "validation.every=4",
         "system.warmup_steps=1")


def train(tmp_path, *more, ref="short/2"):
    """(exit code, folder) of a short run."""
    sets = [part for x in SMALL for part in ("--set", x)]
    options, resolved = command_line.command_line([ref, "--scale", "micro", *sets, "--out", str(tmp_path), *more])
    code = train_gpt.train(resolved, options)
    return code, next(Path(tmp_path).glob("*/run.jsonl")).parent


@pytest.fixture
def spoil(monkeypatch):
    """A function: from now on the gradient of a parameter holds this value in a step of the loop."""
    def spoiled(name, at, value=math.nan):
        plain = train_gpt.train_step

        def step(run, plan, *rest, **more):
            if run.guards is None or plan.step != at:
                return plain(run, plan, *rest, **more)
            p = dict(run.model.named_parameters())[name]
            hook = p.register_hook(lambda g: g.index_fill(0, torch.tensor([g.shape[0] // 2]), value))
            try:
                return plain(run, plan, *rest, **more)
            finally:
                hook.remove()

        monkeypatch.setattr(train_gpt, "train_step", step)
    return spoiled


@pytest.mark.parametrize("ref, more, value", [
    ("short/2", (), math.nan), ("short/2", ("--set", "optim.grad_clip=1.0"), math.inf),
    ("short/11", ("--check-sync", "--set", "system.attention=banded"), math.nan), ("short/57", ("--set", "system.reduction=ordered"), -math.inf)])
def test_a_gradient_that_is_not_finite_stops_the_run_in_its_step_and_is_named(
        ref, more, value, tmp_path, spoil, capsys):
    """Of one parameter, before the loss knows of it; with clipping, Muon, ordered sums; no host sync."""
    name = "blocks.1.mlp.c_fc"
    spoil(name, 5, value)
    code, folder = train(tmp_path, "--checkpoint-every", "2", *more, ref=ref)
    events = runlog.read_chain(folder / "run.jsonl")
    event = next(e for e in events if e["kind"] == "guard")
    assert code == train_gpt.DIVERGED
    assert (event["step"], event["tensors"]) == (5, [name])
    assert f"guard: step 5: the gradient of {name} is not finite" in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["val_loss"], summary["steps"]) == ("diverged", None, 6)
    assert summary["guards"] == [event["message"]]
    log, problems = run_laws.read_log(folder, "run")
    assert problems == [] and log.whole and list(run_laws.check_run(log)) == []
    # the last good checkpoint is of a state before the step
    assert max(e["step"] for e in events if e["kind"] == "checkpoint") == 4
