"""Laws of the guards: what is not finite stops a run at once, with step and tensor, and nothing waits."""

import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import process_group
import runlog
import train_gpt
from evidence import run_laws
from optim import Optimizer
from system import command_line, guards, rescue, stall
from system.comm import communication
from system.guards import Guards, Tripped

ROOT = Path(__file__).parent.parent
SMALL = ("schedule.steps=8", "validation.tokens=1024", "validation.seq_len=128", "validation.every=4",
         "system.warmup_steps=1")


def train(tmp_path, *more, ref="short/2"):
    """(exit code, folder) of a short run."""
    sets = [part for x in SMALL for part in ("--set", x)]
    argv = [ref, "--scale", "micro", *sets, "--out", str(tmp_path), *more]
    options, resolved = command_line.command_line(argv)
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
    ("short/2", ("--check-sync", "--set", "optim.grad_clip=1.0"), math.inf),
    ("short/11", ("--set", "system.reduction=ordered"), math.nan),
])
def test_a_gradient_that_is_not_finite_stops_the_run_in_its_step_and_is_named(
        ref, more, value, tmp_path, spoil, monkeypatch, capsys):
    """Of one parameter, before the loss knows of it; with clipping and without a host sync, with ordered
    sums."""
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
    monkeypatch.setattr(run_laws, "check_clock", lambda log: ())  # of a busy machine
    log, problems = run_laws.read_log(folder, "run")
    assert problems == [] and log.whole and list(run_laws.check_run(log)) == []
    # the last good checkpoint is of a state before the step
    assert max(e["step"] for e in events if e["kind"] == "checkpoint") == 4


def test_a_loss_that_is_not_finite_is_told_and_not_the_gradients_that_it_spoils():
    watch = guard_of(toy())
    spoiled = {bank: (bank.grad, bank.grad.fill_(math.nan)) for bank in watch.optimizer.banks}
    watch.watch(spoiled)
    watch.after_step(7, torch.tensor(math.nan, dtype=torch.float64))
    with pytest.raises(Tripped, match="^step 7: the training loss is not finite$") as tripped:
        watch.check()
    assert tripped.value.fields["tensors"] == [guards.LOSS]


# ----- --rescue skip

def test_a_skipped_step_leaves_parameters_momentum_and_counts_and_the_run_says_so(
        tmp_path, spoil, monkeypatch, capsys):
    """The bits of a run whose step was left out; no record, by the run itself and by verify."""
    seen = {}
    plain = Optimizer.step

    def keep(optimizer, plan, watch=None):
        before = {name: x.clone() for name, x in optimizer.full_tensors()}, optimizer.update_counts()
        plain(optimizer, plan, watch)
        if plan.step == 5 and optimizer.judge is not None:
            after = {name: x.clone() for name, x in optimizer.full_tensors()}, optimizer.update_counts()
            same = all(torch.equal(before[0][name], x) for name, x in after[0].items())
            seen["same"] = same and before[1] == after[1]
            seen["gradients"] = max(float(bank.grad.abs().max()) for bank in optimizer.banks)

    monkeypatch.setattr(Optimizer, "step", keep)
    spoil("blocks.1.mlp.c_fc", 5)
    code, folder = train(tmp_path, "--rescue", "skip", "--set", "optim.grad_clip=1.0")
    assert code in (0, train_gpt.MISSED) and seen == {"same": True, "gradients": 0.0}
    events = runlog.read_chain(folder / "run.jsonl")
    event, = (e for e in events if e["kind"] == "guard")
    assert (event["what"], event["step"], events[-1]["steps"]) == ("skip", 5, 8)
    assert "assisted (--rescue skip): 1 update was skipped: no record" in capsys.readouterr().out
    monkeypatch.setattr(run_laws, "check_clock", lambda log: ())
    log, problems = run_laws.read_log(folder, "run")
    assert problems == []
    assert [p.partition("jsonl: ")[2] for p in run_laws.check_run(log)] == [
        "assisted (--rescue): updates skipped at steps 5: no record"]


def test_only_what_is_far_above_its_history_is_skipped_and_not_for_ever():
    class World:
        def mean(self, x):
            return x

    told = []
    optimizer = SimpleNamespace(global_norm=lambda banks, seen: norm)
    skip = rescue.Skip(World(), optimizer, SimpleNamespace(excuse=lambda: None),
                       SimpleNamespace(event=lambda kind, **fields: told.append(fields["step"])))

    def judged(step, loss):
        skip.before_update(step, torch.tensor(loss, dtype=torch.float64))
        return skip({})

    norm = 2.0
    assert not judged(0, math.nan) and judged(1, 50.0)  # without a history only what is not finite
    skip.history["loss"].clear()
    for step in range(40):
        assert judged(step, 5 + 0.05 * (step % 3))
    assert judged(40, 1.0) and judged(41, 5.3)  # lower is no spike, and a little higher neither
    norm = 200.0
    assert [judged(step, 5.0) for step in range(42, 42 + 11)] == [False] * 10 + [True]
    assert told == [0, *range(42, 52)]


# ----- parts

def toy(ref="short/33", comm=None):
    """The optimizer of a small model."""
    s = command_line.command_line([ref, "--scale", "micro"])[1].settings
    model = train_gpt.GPT(s)
    return Optimizer(model, s, comm)


def guard_of(optimizer, rank=0, size=1):
    return Guards(SimpleNamespace(rank=rank, size=size), optimizer)


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("ref", ["short/6", "short/33"])
def test_shards_of_all_processes_name_each_number_of_each_parameter_once(ref, size):
    counted = {}
    for rank in range(size):
        s = command_line.command_line([ref, "--scale", "micro"])[1].settings
        optimizer = toy(ref, communication(s, rank, size))
        watch = guard_of(optimizer, rank, size)
        for bank in optimizer.banks:
            seen = bank.grad
            if bank.comm.partial and size > 1:
                seen = bank.grad.chunk(size)[rank]
            names, sizes = watch.cut(bank, seen)
            assert sum(sizes) == seen.numel() and len(sizes) == len(names) + 1
            for name, n in zip(names, sizes):
                counted[name] = counted.get(name, 0) + (n if bank.comm.partial or rank == 0 else 0)
    assert counted == {name: p.numel() for bank in optimizer.banks for name, p in bank.members}


def test_numbers_that_have_not_arrived_are_not_waited_for():
    """As on a GPU: a step is looked at once its copy is on the host, and at a validation in any case."""
    class Event:
        ready = False

        def query(self):
            return self.ready

        def synchronize(self):
            assert not self.ready
            self.ready = True

    watch = guard_of(toy())
    on_the_way = [Event() for _ in range(3)]
    for step, event in enumerate(on_the_way):
        watch.under_way.append((step, ("a", "b"), torch.tensor([1.0, math.inf if step == 1 else 2.0]), event))
    watch.check()
    assert watch.last_step() == -1 and watch.finding is None
    on_the_way[0].ready = True
    watch.check()
    assert watch.last_step() == 0 and watch.finding is None
    watch.look(wait=True)
    assert watch.finding == guards.Finding(1, ("b",))


def test_processes_with_other_parameters_are_named_and_a_single_bit_counts():
    banks = toy().banks
    sums = torch.stack([torch.stack([guards.bits(bank.param) for bank in banks])] * 4)
    assert guards.differing(banks, sums.numpy()) is None
    last = banks[-1].param.view(-1)
    before = guards.bits(last)
    last.view(torch.int32)[5] ^= 1
    sums[2, -1] += guards.bits(last) - before
    fields = guards.differing(banks, sums.numpy())
    assert "process 2 and process 0 hold different parameters" in fields["message"]
    assert fields["tensors"] == [name for name, _ in banks[-1].members]


def test_a_state_that_is_not_finite_is_not_kept():
    good = {"optimizer/a": torch.ones(3), "optimizer/n": torch.ones(2, dtype=torch.int16)}
    large = {"optimizer/b": torch.full((4,), 3e38)}  # finite, and its sum in float32 is not
    assert guards.not_finite(good | large) == []
    assert guards.not_finite(good | {"optimizer/c": torch.tensor([0.0, -math.inf])}) == ["optimizer/c"]


def test_a_log_whose_guard_stopped_it_cannot_say_that_it_finished():
    event = {"kind": "guard", "what": "finite", "step": 3, "message": "m"}
    log = SimpleNamespace(where="x", start={}, events=[event], one=lambda kind: {"status": "finished"})
    assert "though a guard stopped it at step 3 (m)" in next(run_laws.check_guards(log))


@pytest.fixture
def dog(monkeypatch):
    """A Watchdog of one process with a limit of 1 s, on a clock that moves only while it waits.

    `dog.look(oversleeps)` is one look of its thread, which sleeps so many seconds longer than it wants;
    `dog.logged` is what it told, then its exit code.
    """
    clock, logged = SimpleNamespace(now=100.0), []
    monkeypatch.setattr(stall, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(stall.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(stall.os, "_exit", logged.append)
    alone = SimpleNamespace(rank=0, size=1, main=True)
    dog = stall.Watchdog(alone, 1.0, lambda: 6, lambda steps, text: logged.append((steps, text)))

    def look(oversleeps=0.0):
        ends = iter([False, True])

        def wait(seconds):
            end = next(ends)
            clock.now += 0 if end else seconds + oversleeps
            return end

        dog.closed = SimpleNamespace(wait=wait)
        dog.run()

    dog.look, dog.logged = look, logged
    return dog


def test_a_process_that_goes_on_is_left_alone(dog):
    for _ in range(30):
        dog.beat("step 7")
        for _ in range(stall.LOOKS - 1):
            dog.look()
    assert not dog.logged


def test_a_process_without_progress_ends(dog, capfd):
    dog.beat("step 7")
    for _ in range(stall.LOOKS + 1):
        assert not dog.logged
        dog.look()
    (steps, text), code = dog.logged
    assert (steps, code) == ([6], stall.STALLED)
    assert text.startswith("no progress for 1 s: process 0 has done 7 steps (step 7)")
    assert capfd.readouterr().err == f"error: {text}\n"


def test_a_process_that_stood_still_as_a_whole_has_not_stalled(dog):
    """Ctrl-Z, or a machine that slept: the watching thread was late, too."""
    dog.beat("step 7")
    dog.look(oversleeps=5000.0)
    assert not dog.logged


# ----- two processes

PAIRS = {
    "gradient": (train_gpt.DIVERGED, ["blocks.1.mlp.c_fc"], "step 5: the gradient of blocks.1.mlp.c_fc is"),
    "digest": (train_gpt.DIVERGED, ..., "process 1 and process 0 hold different parameters"),
    "stall": (stall.STALLED, [], "no progress for"),
}


@pytest.mark.parametrize("what", ["gradient", "stall", pytest.param("digest", marks=pytest.mark.slow)])
def test_two_processes_end_together_and_say_which_and_where(what, tmp_path):
    done = process_group.run([sys.executable, __file__, what, str(tmp_path)], 2, timeout=280,
                             cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    code, tensors, said = PAIRS[what]
    events = runlog.read_chain(next(tmp_path.glob("*/run.jsonl")))
    event = next(e for e in events if e["kind"] == "guard")
    assert done.returncode == code and said in event["message"], done.stderr
    assert tensors in (..., event["tensors"])
    if what == "stall":
        assert event["last_steps"] == [4, 4] and "process 1 has done 5 steps (step 5" in event["message"]
        assert "go on with --resume" in event["message"]
        assert "error: no progress" in done.stderr
    assert event["step"] == {"digest": 4}.get(what, 5)


def spoil_one(what, out):
    """A run on two processes, of which the second one has a fault."""
    plain, rank = train_gpt.train_step, int(os.environ["RANK"])

    def step(run, plan, *rest, **more):
        if run.guards is None or rank == 0:
            return plain(run, plan, *rest, **more)
        parameters = dict(run.model.named_parameters())
        if what == "stall" and plan.step == 5:
            time.sleep(250)
        hooks = []
        if what == "gradient" and plan.step == 5:
            hooks.append(parameters["blocks.1.mlp.c_fc"].register_hook(lambda g: g * math.nan))
        loss = plain(run, plan, *rest, **more)
        for hook in hooks:
            hook.remove()
        if what == "digest" and plan.step == 3:
            parameters["embed.weight"].data[0, 0] += 1e-3
        return loss

    train_gpt.train_step = step
    sets = [part for x in SMALL for part in ("--set", x)]
    argv = ["short/11", "--scale", "micro", *sets, "--out", out, "--checkpoint-every", "2"]
    argv += ["--stall-timeout", "6s"] if what == "stall" else []
    train_gpt.main(*command_line.command_line(argv))


if __name__ == "__main__":
    spoil_one(*sys.argv[1:])
