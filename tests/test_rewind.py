"""Laws of --rescue rewind: back to the last good checkpoint, on with other batches, and no record."""

import dataclasses
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
from system import command_line, guards, rewind, spikes
from system.run import Run
from test_resume import Killed, go_on, outcome

ROOT = Path(__file__).parent.parent
STEPS = 9
SMALL = (f"schedule.steps={STEPS}", "validation.tokens=1024", "validation.seq_len=128", "validation.every=4",
         "system.warmup_steps=1")
PLAIN = train_gpt.train_step
SETTINGS = command_line.command_line(["short/2", "--scale", "micro"])[1].settings


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


@pytest.mark.parametrize(  # record 57: the batch grows, the table unties
    "ref", ["short/2", pytest.param("short/57", marks=pytest.mark.slow)]
)
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
    if ref == "short/2":
        it_says_so(folder, capsys.readouterr().out)
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


def it_says_so(folder, printed):
    """On the terminal, in the verdict and to verify; what was discarded is counted, and its time."""
    assert "back from step 6 to step 4, and on without the 2 batches in between; 9 rewinds are" in printed
    events = runlog.read_chain(folder / "run.jsonl")
    assert events[-1]["verdict"][-1] == (
        "assisted (--rescue rewind): 1 rewind, with 2 steps of 2,048 tokens discarded, whose time is on the "
        "clock: no record")
    validations = [e for e in events if e["kind"] == "validation"]
    assert [e["step"] for e in validations] == [0, 4, 4, 8, 9]  # that of step 4 again
    times = [e["train_time_ms"] for e in validations]
    assert times == sorted(times) and len(set(times[1:])) == 4
    norms = [e.get("grad_norm", []) for e in runlog.standing(events) if e["kind"] == "validation"]
    assert [*map(len, norms)] == [0, 4, 4, 1]
    assert [step for step, _ in json.loads((folder / "summary.json").read_text())["curve"]] == [0, 4, 8, 9]
    log, problems = run_laws.read_log(folder, "run")
    assert problems == [] and list(run_laws.check_run(log)) == [
        "run/run.jsonl: assisted (--rescue rewind): went back from step 5 to 4: no record"]


def test_an_update_that_is_far_too_large_is_seen_at_once_and_a_fault_that_stays_ends_the_run(
        tmp_path, monkeypatch, capsys):
    """Rewinds are bounded: a spike is survived without them, a number that is not finite is not."""
    monkeypatch.setattr(spikes, "LEAST", 3)
    monkeypatch.setattr(rewind, "MOST", 1)
    made = []

    def step(run, plan, *rest, **more):
        if run.guards is not None:
            made.append(plan.step)
            if len(made) in (6, 9):
                plan = dataclasses.replace(plan, lr_factor=100 * plan.lr_factor)
        return PLAIN(run, plan, *rest, **more)

    monkeypatch.setattr(train_gpt, "train_step", step)
    code, folder = train(*options_of("short/2", tmp_path / "a", "--rescue", "rewind"))
    found = [e for e in runlog.read_chain(folder / "run.jsonl") if e["kind"] == "guard"]
    assert code == 0 and made == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert [(e["what"], e["step"], e.get("to")) for e in found] == [("rewind", 5, 4), ("spike", 6, None)]
    assert "after 1 rewinds the run goes on" in found[1]["message"]

    def always(run, plan, *rest, **more):
        loss = PLAIN(run, plan, *rest, **more)
        return loss * math.nan if run.guards is not None and plan.step == 5 else loss

    monkeypatch.setattr(train_gpt, "train_step", always)
    code, folder = train(*options_of("short/2", tmp_path / "b", "--rescue", "rewind"))
    found = [e["what"] for e in runlog.read_chain(folder / "run.jsonl") if e["kind"] == "guard"]
    assert code == train_gpt.DIVERGED and found == ["rewind", "finite"]


@pytest.mark.parametrize("words, said", [
    (("short/2", "--rescue", "rewind", "--checkpoint-every", "never"), "goes back to checkpoints"),
    (("short/2", "--rescue", "rewind", "--registered", "x"), "a registered run is not assisted")])
def test_what_cannot_be_rescued_is_refused_in_one_line(words, said, capsys):
    with pytest.raises(SystemExit):
        command_line.command_line([*words])
    assert said in (told := capsys.readouterr().err) and told.count("\n") == 1


def test_a_run_that_may_go_back_keeps_checkpoints_that_fit_its_length():
    def kept(*words):
        options, _ = command_line.command_line(["short/2", "--scale", "micro", *words])
        return options.checkpoint_every, options.keep_checkpoints

    assert kept() == (("seconds", 600.0), 2)
    assert kept("--rescue", "rewind", "--set", "schedule.steps=80") == (("steps", 4), 6)
    assert kept("--rescue", "rewind", "--set", "schedule.steps=9000") == (("steps", 100), 6)
    asked = kept("--rescue", "rewind", "--checkpoint-every", "7", "--keep-checkpoints", "3")
    assert asked == (("steps", 7), 3)


# ----- two processes

def test_two_processes_go_back_together_and_end_with_the_bits_of_those_that_never_did(tmp_path):
    """The second one finds the fault, in its shard of a gradient."""
    folders = {}
    for what in ("back", "gap"):
        done = process_group.run(
            [sys.executable, __file__, what, str(tmp_path / what)], 2, timeout=280, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 0, done.stderr
        folders[what] = next((tmp_path / what).glob("*/run.jsonl")).parent
    event, = (e for e in runlog.read_chain(folders["back"] / "run.jsonl") if e["kind"] == "guard")
    assert (event["what"], event["step"], event["to"], event["batches"]) == ("rewind", 5, 4, 4)
    same_bits(folders["back"], folders["gap"])


def of_two(what, out):
    """A run on two processes that goes back, or one that leaves out the same batches."""
    if what == "back":
        spoiled, rank = spoil(5), int(os.environ["RANK"])
        train_gpt.train_step = spoiled if rank == 1 else PLAIN
        more = ("--rescue", "rewind")
    else:
        Run.open_stream, more = without(4, 8), ("--checkpoint-every", "never")
    train_gpt.main(*options_of("short/2", out, *more))


# ----- the detector

def seen(numbers):
    """[(step, since)] of the spikes in a sequence of (loss, update)."""
    detector = spikes.Spikes()
    found = [detector.see(step, *pair) for step, pair in enumerate(numbers)]
    return [(spike.step, spike.since) for spike in found if spike]


def test_a_rise_that_stays_is_a_spike_and_a_fall_a_single_batch_and_noise_are_none():
    generator = random.Random(0)
    curve = [4 + 3 * math.exp(-step / 40) + generator.gauss(0, 0.03) for step in range(2000)]
    still = [(loss, 1.0) for loss in curve]
    assert seen(still) == []
    assert seen([*still[:300], (11.0, 1.0), *still[301:]]) == []
    (first, since), *_ = seen((loss + 0.6 * (step >= 300), 1.0) for step, loss in enumerate(curve))
    assert 302 <= first <= 308 and 285 <= since < 300
    assert seen([(loss, 1.0 if step % 2 else 9.0) for step, loss in enumerate(curve)]) == []  # a cadence
    assert seen([(loss, 41.0 if step == 500 else 9.0) for step, loss in enumerate(curve)])[0] == (500, 500)
    broken = seen((loss, math.nan if step == 500 else 9.0) for step, loss in enumerate(curve))
    assert broken[0] == (500, 500)
    assert seen((loss, float(step > 50)) for step, loss in enumerate(curve)) == []  # a rate that begins at 0
    assert seen([(0.0, 0.0)] * 100) == []


def test_no_run_that_the_repository_keeps_has_a_spike():
    """15,000 steps of undisturbed runs at tiny, whose small corpus changes its topics."""
    logs = [*(ROOT / "records").glob("*/*/tiny/run.jsonl")]
    for path in logs:
        losses = [x for e in runlog.readable(path) if e["kind"] == "validation" for x in e["train_loss"]]
        assert seen((loss, 1.0) for loss in losses) == [], path
    assert len(logs) > 50


def test_a_detector_that_goes_on_from_a_checkpoint_sees_what_it_would_have_seen():
    generator = random.Random(1)
    numbers = [(5 + generator.gauss(0, 0.1), generator.uniform(1, 2)) for _ in range(150)]
    one, other = spikes.Spikes(), spikes.Spikes()
    for step, pair in enumerate(numbers):
        if step == 70:
            other.load(json.loads(json.dumps(one.state())))
        for detector in (one, other) if step >= 70 else (one,):
            detector.see(step, *pair)
        assert step < 70 or one.score() == other.score() and one.updates == other.updates


# ----- parts

def test_batches_after_a_rewind_have_the_sizes_of_the_steps_that_train_on_them():
    about = {"tokens_per_rank": [10, 11, 12, 13, 14], "max_doc_len": 7, "loader": "synced"}
    found = after_rewinds(about, [(3, 1), (4, 1)])  # steps 0 1 2, then 1, then 1 2 3 4
    assert found == {**about, "tokens_per_rank": [10, 11, 12, 11, 11, 12, 13, 14]}
    assert after_rewinds(about, []) == about
    run = SimpleNamespace(rewinds=[(3, 1), (4, 1)])
    assert [Run.position(run, step) for step in (1, 4)] == [4, 7]


def test_the_gradient_norm_of_shards_is_that_of_the_whole():
    """Each process has the norms of its shards, and of what all hold."""
    whole, shards = torch.tensor([3.0]), (torch.tensor([4.0]), torch.tensor([12.0]))
    optimizer = SimpleNamespace(banks=[SimpleNamespace(param=whole)], s=SETTINGS)
    squares = sum(float(x.square().sum()) for x in shards)
    for shard in shards:
        def total(x, other=squares - float(shard.square().sum())):
            return x + torch.tensor([other, 0.0, math.nan][:len(x)], dtype=torch.float64)
        guard = guards.Guards(SimpleNamespace(rank=0, size=2, total=total), optimizer)
        guard.measured = [(torch.cat([shard, whole]), 1), (whole, 0), None]
        *found, skipped = guard.gradient_norms()
        assert found == [13.0, 3.0] and math.isnan(skipped) and guard.gradient_norms() == []


if __name__ == "__main__":
    of_two(*sys.argv[1:])
