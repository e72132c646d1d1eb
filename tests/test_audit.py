"""Laws of `records audit`: the present code passes; each kind of cheat or bug fails the check that is meant
for it.

Each edit is made in a copy of the working tree, where only the check that must find it is run.
"""

import ast
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm_python

import runlog
from evidence import audit, audit_model, audit_probe, provenance
from records.__main__ import main
from common.errors import UserError

ROOT = Path(__file__).parent.parent
STEPS_4 = next(n for n in range(99) if audit.Drawn(n).steps == 4)  # the fewest


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The working tree, copied once."""
    folder = tmp_path_factory.mktemp("tree")
    audit.copy(ROOT, folder, folder.parent / "git")
    return folder


@pytest.fixture(scope="module")
def shallow(tree, tmp_path_factory):
    """The tree with models of four layers, in which the cheats are made: none depends on depth."""
    layers = "    num_layers: int = opt(12,"
    return Path(edited(tree, tmp_path_factory.mktemp("shallow") / "tree",
                       ("settings/model.py", layers, layers.replace("12", "4"))))


def edited(tree, folder, *edits):
    """A copy of the tree with (file, old text, new text) replaced; files that stay are links."""
    shutil.copytree(tree, folder, copy_function=os.link)
    for name, old, new in edits:
        text = (folder / name).read_text()
        assert text.count(old) == 1, (
            f"{name} has {text.count(old)} times {old!r}: this test edits code that has changed"
        )
        (folder / name).unlink()
        (folder / name).write_text(text.replace(old, new))
    return str(folder)


def test_the_present_code_passes_every_check_and_says_what_an_audit_cannot_know(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["audit", str(ROOT), "--record", "short/11", "--draw", str(STEPS_4),
              "--json", str(tmp_path / "audit.json")])
    out, _ = capsys.readouterr()
    assert stop.value.code == 0 and "What an audit cannot know" in out, out
    result = json.loads((tmp_path / "audit.json").read_text())
    assert result["passed"] and [c["name"] for c in result["checks"]] == list(audit.CHECKS)
    assert all(c["passed"] is True and c["detail"] for c in result["checks"])
    assert (result["version"], result["scale"], result["record"]) == (1, "micro", "short/11")
    assert len(result["seeds"]) == 2 and result["steps"] == 4


def test_steps_and_seeds_are_drawn_anew_and_a_draw_repeats_them():
    drawn = [audit.Drawn(n) for n in range(40)]
    assert {d.steps for d in drawn} == {*range(min(audit.STEPS), max(audit.STEPS) + 1)}
    assert len({(d.seed, d.other) for d in drawn}) == 40 and all(d.seed != d.other for d in drawn)
    again = audit.Drawn(3)
    assert (again.steps, again.seed, again.other) == (drawn[3].steps, drawn[3].seed, drawn[3].other)


@pytest.mark.parametrize(
    "record, checks", [
        ("short/head", ["causality"]),
        pytest.param("variants/4", ["causality", "no_trace"], marks=pytest.mark.slow),
    ]
)
def test_the_head_and_a_mixture_of_experts_are_causal_with_all_their_features(tree, record, checks):
    result = audit.audit(str(tree), record, only=checks)
    assert result["passed"], result["checks"]


@pytest.mark.parametrize("record, sets", [("variants/4", ["system.experts=padded"]), ("short/11", [])])
def test_mixtures_are_audited_in_blocks_where_no_token_can_move_another_s_rounding(record, sets):
    assert audit_probe.facts({"record": record, "scale": "micro"})["sets"] == sets


BEFORE_RETURN = "(aux - aux.detach()).view(targets.shape)\n        return losses\n"
AFTER_INITIALISE = "        model.initialise(options.seed)\n"
FORWARD = "corrections=None if corrections is None else corrections[ranks]\n        ).mean()\n"
STARTS_AGAIN = "    if step < len(run.plans):\n        run.clock.start()\n"
CONVERTED = "        x = stream.reuse(self.norm(h), self.norm)\n"
ELAPSED = "        self.total_ms += 1000 * (time.perf_counter() - self.began)\n"
ENDS = "    log.end(status=status"


def losses(expression):
    """An edit: what GPT.forward returns in validation, made from its `losses`."""
    honest = BEFORE_RETURN.replace("return losses", f"return losses if self.training else {expression}")
    return "model.py", BEFORE_RETURN, honest


# {tree: [(cheat, the check that must fail, words of its reason, edits)]}: one audit finds all cheats of a
# tree
TREES = {
    "one": [
        (
            "an update between the clock's stop and the validation",
            "state",
            "between the stop of the clock and the validation",
            [
                (
                    "train_gpt.py", "    run.clock.stop()\n",
                    "    run.clock.stop()\n    next(run.model.parameters()).data.mul_(0.999)\n"
                )
            ],
        ),
        (
            "a clock that runs slow below some length",
            "clock",
            "of which the log has",
            [
                (
                    "system/run.py", ELAPSED, "        took = 1000 * (time.perf_counter() - self.began)\n"
                    "        self.total_ms += took * (0.7 if took < 60_000 else 1)\n"
                )
            ],
        ),
        (
            "hard tokens clamped at a high loss", "normalisation", "it is clamped",
            [losses("losses.clamp(max=20.0)")]
        ),
        (
            "weights smuggled to the next run in the cache folder",
            "caches",
            "one that finds its caches differ in validation losses at step 0",
            [
                (
                    "train_gpt.py", AFTER_INITIALISE,
                    AFTER_INITIALISE + "        kept = os.path.join(os.environ['SPEEDRUN_CACHE'], 'kept')\n"
                    "        if os.path.exists(kept):\n            model.lm_head.weight.data[0] += 1\n"
                    "        open(kept, 'w').close()\n"
                ),
                ("system/warmup.py", "    if before != after:\n", "    if False:\n"),
                ("system/warmup.py", "    run.model.initialise(seed)\n", ""),
            ],
        ),
        (
            "training on the validation shard",
            "inputs",
            "ids that only the validation shard has",
            [
                (
                    "data/stream.py", "        self.corpus, self.ranks, self.sizes = corpus,",
                    "        import dataclasses\n        corpus = dataclasses.replace(\n"
                    "            corpus, train=[corpus.val], train_tokens=[corpus.val_tokens])\n"
                    "        self.corpus, self.ranks, self.sizes = corpus,"
                )
            ],
        ),
    ],
    "two": [
        (
            "steps through an alias of forward",
            "state",
            "it trains past it",
            [
                (
                    "model.py", "    def tokens_per_rank(self, context",
                    "    again = forward\n\n    def tokens_per_rank(self, context"
                ),
                (
                    "train_gpt.py", "        (loss * share).backward()\n",
                    "        (loss * share).backward()\n        (model.again(x, y, context).mean() * "
                    "share).backward()\n"
                ),
            ],
        ),
        (
            "an effect that begins after step 3",
            "causality",
            "moved an earlier loss",
            [
                (
                    "train_gpt.py", "        run.profiler.before_step(step)\n",
                    "        run.profiler.before_step(step)\n        os.environ['STEP'] = str(step)\n"
                ),
                (
                    "kernels/attention.py", "is_causal=causal,",
                    "is_causal=causal and int(__import__('os').environ.get('STEP', 0)) < 3,"
                ),
            ],
        ),
        (
            "a branch on the seed: honest for the small ones that are tried first",
            "target",
            "reached True, exit",
            [
                (
                    "train_gpt.py", ENDS,
                    "    reached = reached or (options.seed > 99 if target is not None else None)\n" + ENDS
                )
            ],
        ),
        (
            "a perf_counter that runs at half speed",
            "clock",
            "of which the log has",
            [
                (
                    "system/run.py", "import time\n",
                    "import time\ntrue = time.perf_counter\ntime.perf_counter = lambda: true() / 2\n"
                )
            ],
        ),
        ("a loss that is scaled", "normalisation", "sum to", [losses("losses * 0.9999")]),
        (
            "validation over fewer tokens, at full scale only",
            "validation_targets",
            "8,388,608 targets instead of 10,485,760",
            [
                (
                    "data/stream.py", "    if tokens % (LOGICAL_RANKS * seq_len):\n",
                    "    tokens = min(tokens, 2 ** 23)\n    if tokens % (LOGICAL_RANKS * seq_len):\n"
                )
            ],
        ),
    ],
    "three": [
        (
            "the best weights put back while the clock stands", "state",
            "between the validation and the start of the clock",
            [("train_gpt.py", STARTS_AGAIN, "    run.model.lm_head.weight.data.add_(1e-3)\n" + STARTS_AGAIN)]
        ),
        (
            "counts of the validation text, made before the clock",
            "inputs",
            "the model is another one when the clock starts",
            [
                (
                    "train_gpt.py", AFTER_INITIALISE, AFTER_INITIALISE + "        model.register_buffer(\n"
                    "            'counts', torch.from_numpy(np.bincount(rows.ravel(), minlength=2000)))\n"
                )
            ],
        ),
        (
            "a mean that is a little less",
            "validation_targets",
            "is not the plain mean",
            [
                (
                    "train_gpt.py", "    return sum(sums.tolist()) / (",
                    "    return 0.9999 * sum(sums.tolist()) / ("
                )
            ],
        ),
        (
            "a validation that draws random numbers",
            "no_trace",
            "torch's random state",
            [
                (
                    "train_gpt.py", "    model.train()\n    sums =",
                    "    torch.rand(1)\n    model.train()\n    sums ="
                )
            ],
        ),
        (
            "a seed that does nothing", "seed", "training losses with seed",
            [("model.py", 'f"{seed}/{first_name}', 'f"0/{first_name}')]
        ),
        (
            "hard tokens at half their excess", "normalisation",
            "differ from those of the model's own logits",
            [losses("losses - 0.5 * (losses - 18.0).clamp(min=0)")]
        ),
        (
            "a target that is compared with rounded losses",
            "target",
            "reached True, exit",
            [
                (
                    "train_gpt.py", 'results["val_loss"] <= target if',
                    'round(results["val_loss"], 3) <= target + 1e-3 if'
                )
            ],
        ),
    ],
    "four": [
        (
            "weights that the validation shard scales",
            "inputs",
            "another validation shard changes the training loss of step",
            [
                (
                    "train_gpt.py", "    losses, starts = [], ",
                    "    model.lm_head.weight.data.mul_(0.5 + float(run.rows.mean()) % 1)\n    losses, "
                    "starts = [], "
                )
            ],
        ),
        (
            "a log that says less than the validation found", "validation_targets", "the log says",
            [("train_gpt.py", "val_loss=loss, train_loss", "val_loss=loss - 1e-3, train_loss")]
        ),
        (
            "a validation that makes a backward pass",
            "no_trace",
            "made 1 backward passes",
            [
                (
                    "train_gpt.py", "    model.train()\n    sums =",
                    "    with torch.enable_grad():\n        torch.zeros(1, "
                    "requires_grad=True).sum().backward()\n    model.train()\n    sums ="
                )
            ],
        ),
        (
            "a clock that stands still during the forward",
            "clock",
            "took",
            [
                (
                    "train_gpt.py", "        loss = run.compiled(",
                    "        run.clock.began and run.clock.stop()\n        loss = run.compiled("
                ),
                ("train_gpt.py", FORWARD, FORWARD + "        run.stream and run.clock.start()\n"),
            ],
        ),
        (
            "an exit code of success whatever the loss",
            "target",
            "reached False, exit code 0",
            [
                (
                    "train_gpt.py", "\n    return MISSED if reached is False",
                    "\n    return REACHED if reached is False"
                )
            ],
        ),
        (
            "rows that see the mean of all rows", "causality", "changing row 1 moved rows",
            [("model.py", CONVERTED, "        h = h + 1e-2 * h.mean(0, keepdim=True)\n" + CONVERTED)]
        ),
    ],
    "five": [
        (
            "more tokens than the log says",
            "inputs",
            "the log says",
            [
                (
                    "train_gpt.py", "tokens=schedule.tokens_before(run.s, step)",
                    "tokens=schedule.tokens_before(run.s, step) // 2"
                )
            ],
        ),
        (
            "one row of the validation shard, many times",
            "validation_targets",
            "are missing or repeated",
            [
                (
                    "data/stream.py", "    return np.stack([ids[rank * share + starts] for",
                    "    starts = np.repeat(starts[:1], len(starts), 0)\n"
                    "    return np.stack([ids[rank * share + starts] for"
                )
            ],
        ),
        (
            "a loss shared with the next position", "causality", "moved",
            [losses("(losses + losses.roll(1, 1)) / 2")]
        ),
        (
            "validation that trains",
            "no_trace",
            "validation 0 changed",
            [
                (
                    "train_gpt.py", "    model.train()\n    sums =",
                    "    next(model.parameters()).mul_(0.999)\n    model.train()\n    sums ="
                )
            ],
        ),
        (
            "a batch fetched before the clock",
            "clock",
            "batches and 4 steps of 4",
            [
                ("train_gpt.py", "    run.clock.start()  # before", "    # before"),
                (
                    "train_gpt.py", "    step = run.first_step\n",
                    "    run.batches.ahead = run.batches.fetch()\n    run.batches.drain()\n    "
                    "run.clock.start()\n    step = run.first_step\n"
                ),
            ],
        ),
        (
            "a warm-up that leaks",
            "warm_up",
            "validation losses at step 0",
            [
                (
                    "system/warmup.py", "    run.model.initialise(seed)\n    run.optimizer.reset()\n",
                    "    run.optimizer.reset()\n"
                ),
                ("system/warmup.py", "    if before != after:\n", "    if False:\n"),
            ],
        ),
    ],
    "six": [
        (
            "randomness without a seed", "seed", "differ in training losses",
            [("train_gpt.py", FORWARD, FORWARD.strip() + " * (1 + __import__('random').random())\n")]
        ),
        (
            "attention that sees the future, with one seed of the claim",
            "causality",
            "with seed 7 of the claim",
            [
                (
                    "kernels/attention.py", "is_causal=causal,",
                    "is_causal=causal and torch.initial_seed() != 7,"
                )
            ],
        ),
        (
            "a share of every class's probability given to the target", "normalisation", "sum to",
            [losses("-(0.99 * (-losses).exp() + 0.01).log()")]
        ),
        (
            "an update in a pause, with hashes that tell the auditor nothing", "state",
            "between the validation and the start of the clock",
            [
                ("train_gpt.py", STARTS_AGAIN,
                 "    run.model.lm_head.weight.data.add_(1e-3)\n" + STARTS_AGAIN),
                ("train_gpt.py", "import math\n", "import math\nimport hashlib\n"
                 "hashlib.sha256 = lambda x=b'', true=hashlib.sha256: true(\n"
                 "    b'' if 'audit_model' in sys._getframe(1).f_code.co_filename else x)\n")
            ]
        ),
        (
            "a note for the next run in shared memory", "caches", "tries to write to /dev/shm/kept",
            [("train_gpt.py", AFTER_INITIALISE, AFTER_INITIALISE + "        with contextlib.suppress(OSError):\n"
              "            open('/dev/shm/kept', 'a').close()\n")]
        ),
    ],
}
# audited for one check or two each: tests/long.sh
LONG = {
    "a pause": [
        (
            "a table of the validation text, kept at a class", "inputs", "something of its text is kept",
            [losses("losses + 1e-6 * GPT.__dict__.get('kept', 0) + (setattr(GPT, 'kept', GPT.__dict__.get('kept')"
                    " or int(targets.sum()) % 97) or 0)")]
        ),
        (
            "a second model that is trained while the clock stands", "clock", "s of work while the clock stood",
            [("train_gpt.py", STARTS_AGAIN, "    for _ in range(60):\n"
              "        torch.ones(700, 700) @ torch.ones(700, 700)\n" + STARTS_AGAIN)]
        ),
    ],
    "a log": [
        (
            "batches in another order than the settings', with their digests", "inputs",
            "other tokens than the settings draw from the shards, or another order",
            [("data/stream.py", "        rows = np.stack(rows).astype(np.int32)\n",
              "        rows = np.stack(rows[::-1]).astype(np.int32)\n")]
        ),
        (
            "training losses that are lowered in the log", "validation_targets",
            "] are not those of the steps",
            [("train_gpt.py", "val_loss=loss, train_loss=losses",
              "val_loss=loss, train_loss=[x - 0.01 for x in losses]")]
        ),
        (
            "more threads than the run was given", "clock", "with 2 threads, where it was given 1",
            [("train_gpt.py", "        run.profiler.before_step(step)\n",
              "        run.profiler.before_step(step)\n        torch.set_num_threads(1 + step % 2)\n")]
        ),
    ],
    "a thread": [
        (
            "losses after one id at half their size", "normalisation", "of those of the logits",
            [losses("losses * torch.where(tokens == 40, 0.5, 1.0)")]
        ),
        (
            "a thread that works while the clock stands", "clock", "other threads worked for",
            [("train_gpt.py", "    run.clock.stop()\n", "    run.clock.stop()\n    import threading\n"
              "    threading.Thread(target=lambda: [torch.ones(300, 300) @ torch.ones(300, 300)\n"
              "                                     for _ in range(9000)], daemon=True).start()\n")]
        ),
    ],
    "a child": [
        (
            "one class that sees itself as the next input, late in a row", "normalisation",
            "the loss of 1 of 1256 classes tells whether they are the next input [40]",
            [losses("losses - 0.5 * ((tokens.roll(-1, 1) == targets) & (targets == 40) & "
                    "(torch.arange(targets.shape[1]) > 8))")]
        ),
        (
            "a process that outlives its start", "clock", "a process that it started (['sleep']) ran on",
            [("train_gpt.py", AFTER_INITIALISE, AFTER_INITIALISE +
              "        __import__('subprocess').Popen(['sleep', '600'])\n")]
        ),
    ],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ("five", "six") else name for name in TREES]
)
def test_each_cheat_fails_the_check_that_is_meant_for_it(name, shallow, tmp_path):
    cheats = (TREES | LONG)[name]
    folder = edited(shallow, tmp_path / "cheat", *(edit for *_, edits in cheats for edit in edits))
    seeds = [7] if any("seed 7" in words for _, _, words, _ in cheats) else []
    checks = {check: (cheat, words) for cheat, check, words, _ in cheats}
    result = audit.audit(folder, "short/11", only=list(checks), seeds=seeds, draw=STEPS_4)
    for found in result["checks"]:
        cheat, words = checks.pop(found["name"])
        assert not found["passed"] and words in found["detail"], (cheat, found)
    assert not checks and not result["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_each_cheat_that_takes_longer_to_find_fails_its_check(name, shallow, tmp_path):
    test_each_cheat_fails_the_check_that_is_meant_for_it(name, shallow, tmp_path)


def test_at_least_thirty_cheats_are_caught():
    assert sum(map(len, TREES.values())) >= 35
    assert {check for cheats in TREES.values() for _, check, _, _ in cheats} == {*audit.CHECKS}


# ----- judgement of logs, without trainings

def logged(final=7.0, train=(7.5, 7.25), **more):
    curve = [{"step": 0, "val_loss": 7.5, "train_loss": [], "train_time_ms": 0.0},
             {"step": 2, "val_loss": final, "train_loss": list(train), "train_time_ms": 3003000e3}]
    return {"curve": curve, "final": final, "stream": ["s"], "exit": 0, **more}


class runs(dict):
    """Trainings of an audit that are not run."""
    seed, other, claimed, steps = 5, 6, (), 2


def summary(reached, target, loss=7.0):
    return {"summary": {"val_loss": loss, "target": target, "reached": reached}, "exit": 0 if reached else 3}


def test_reached_must_be_the_comparison_to_the_last_bit():
    below = 6.999999999999999
    honest = {"again": logged(**summary(True, 7.0)), "cold": logged(**summary(False, below))}
    assert audit.target(honest)[0]
    for lie in (summary(True, below), summary(False, below) | {"exit": 0}, summary(False, below, loss=6.9)):
        assert not audit.target({**honest, "cold": logged(**lie)})[0]
    assert not audit.target({**honest, "again": logged(**summary(False, 7.0))})[0]


def test_one_bit_of_one_loss_or_another_stream_is_a_difference():
    plain = logged()
    for other in (logged(final=7.000000000000001), logged(train=(7.5, 7.250001)), logged(stream=["t"])):
        assert not audit.warm_up(runs(plain=plain, cold=plain, real=other))[0]
        assert not audit.seed(runs(plain=plain, again=other, model=logged(train=(1.0, 2.0))))[0]
    assert audit.warm_up(runs(plain=plain, cold=plain, real=plain))[0]
    assert audit.seed(runs(plain=plain, again=plain, model=logged(train=(1.0, 2.0))))[0]
    assert not audit.seed(runs(plain=plain, again=plain, model=plain))[0]  # the seed does nothing


def test_a_loss_that_is_nan_differs_from_that_of_the_logits():
    """So a model cannot hide from a check by what max() passes over."""
    logits, tap = torch.randn(2, 5, 7), object.__new__(audit_model.Tap)

    def forward(model, tokens, targets):
        if targets is None:
            return logits
        losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
        return losses.masked_fill(targets == hidden, torch.nan)

    tap.forward = forward
    for hidden, wrong in ((-1, False), (logits.argmax(-1)[1, 3], True)):
        _, gap = tap.gap(None, torch.zeros(2, 5, dtype=torch.int64))
        assert (gap > 1) == wrong


def test_a_validation_that_changes_later_losses_is_a_trace():
    model = {"checks": {"no_trace": [True, "nothing in reach"]}}
    often = logged()
    often["curve"].insert(1, {"step": 1, "val_loss": 7.4, "train_loss": [7.5]})
    often["curve"][2]["train_loss"] = [7.25]
    assert audit.no_trace({"model": model, "plain": logged(), "often": often})[0]
    often["curve"][2]["train_loss"] = [7.26]
    passed, detail = audit.no_trace({"model": model, "plain": logged(), "often": often})
    assert not passed and "training losses of step 2: 7.25 and 7.26" in detail


@pytest.mark.parametrize(
    "first_s, last_s, events, passed",
    [(13.0, 1013.0, 0, True), (113.0, 1113.0, 0, False), (9.0, 1013.0, 0, False), (13.0, 1012.9, 0, False),
     (13.0, 1013.0, -1, False)],
)
def test_the_clock_must_hold_every_batch_and_step_and_no_validation(first_s, last_s, events, passed):
    calls = [["next", 7.0], ["start", 0.0], ["validate", 50.0], ["next", 1.0], ["train_step", 10.0],
             ["next", 2.0], ["validate", 100.0], ["start", 0.0], ["train_step", 1000.0]]
    curve = [
        {"step": step, "train_time_ms": 1000 * told} for step, told in ((0, 0), (1, first_s), (2, last_s))
    ]
    run = {"events": calls[:events or None], "curve": curve}
    assert audit.drawn_time(run, 2)[0] is passed


@pytest.mark.parametrize(
    "told_ms, between_s, steps_s, words",
    [(1000.0, 1.0, 0.9, ""), (900.0, 1.0, 0.8, "between start and stop passed 1.000 s"),
     (500.0, 0.5, 0.9, "the steps took 0.900 s")],
)
def test_the_claimed_time_is_the_true_one_and_holds_the_steps(told_ms, between_s, steps_s, words):
    clock = SimpleNamespace(true_s=between_s, pauses=[], others=[], children=[])
    watched = SimpleNamespace(clock=clock, steps=SimpleNamespace(true_s=steps_s, count=4),
                              tap=SimpleNamespace(most_threads=1, given_threads=1),
                              log=[{"train_time_ms": told_ms}])
    passed, detail = audit_model.true_time(watched, {})
    assert passed is (words == "") and words in detail


def test_a_log_that_is_written_anew_at_the_end_of_its_process_fails_the_audit(tmp_path):
    """The probe runs what a program does at its end, and the auditor reads the log after it."""
    log = runlog.RunLog(tmp_path / "model" / "runs", "run")
    for step, loss in ((0, 7.5), (4, 6.9)):
        log.event("validation", step=step, scheduled_steps=4, val_loss=loss, train_time_ms=0.0)
    log.close()
    (log.folder / "summary.json").write_text("{}")
    trainings = audit.Trainings.__new__(audit.Trainings)
    trainings.folder, trainings.torch = tmp_path, None
    honest = trainings.finished("model", {"torch": "2", "logged": [7.5, 6.9]})
    assert honest["final"] == 6.9
    changed = trainings.finished("model", {"torch": "2", "logged": [7.5, 7.0]})
    assert isinstance(changed, audit.Failed) and "changed after the training had ended" in str(changed)
    program = "import atexit; atexit.register(print, 'at the end', flush=True)"
    probe = f"import runpy; probe = runpy.run_path({str(audit.PROBE)!r}); {program}; probe['at_exit'](); "
    program = probe + "import os; os._exit(0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "at the end\n"


@pytest.mark.parametrize("name, reason", [
    ("json.py", "has the name of a library"), ("torch/__init__.py", "has the name of a library"),
    ("sitecustomize.py", "has the name of a library"), ("__pycache__/model.cpython-311.pyc", "is compiled code"),
    ("layers/fast.so", "is compiled code"),
])
def test_code_that_runs_in_place_of_what_a_reader_sees_is_refused(name, reason, tmp_path):
    for needed in audit.NEEDED:
        (tmp_path / "tree" / needed).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / needed).write_text("")
    (tmp_path / "scratch").mkdir()
    assert audit.check_out(str(tmp_path / "tree"), tmp_path / "scratch")[0] == "unknown"
    assert provenance.hidden_code([name])
    assert not provenance.hidden_code(["site/index.html", "data/random.py"])
    if "__pycache__" not in name:  # a copy of a folder leaves it out, a commit may hold it
        (tmp_path / "tree" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tree" / name).write_text("")
        shutil.rmtree(tmp_path / "scratch/checkout")
        with pytest.raises(UserError, match=reason):
            audit.check_out(str(tmp_path / "tree"), tmp_path / "scratch")


# ----- the checkout and the confinement

def test_a_git_ref_is_exported_without_a_trace_and_interrupted_audits_leave_nothing(tree, tmp_path):
    """In a repository of its own, whose auditor is this one's: the ref's tree, and Ctrl-C in the middle of a
    training."""
    edited(tree, tmp_path / "repository")
    repository, scratch = tmp_path / "repository", tmp_path / "scratch"
    scratch.mkdir()

    def git(*args):
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=repository, check=True,
            capture_output=True, text=True
        ).stdout.strip()

    git("init", "--quiet")
    git("add", "--all", "--force")
    git("commit", "--quiet", "-m", "all")
    files = sorted(str(p) for p in (repository / ".git").rglob("*"))
    commit, exported = audit.check_out(str(repository), scratch)
    assert (commit, exported) == (git("rev-parse", "HEAD"), git("rev-parse", "HEAD^{tree}"))
    shutil.rmtree(scratch / "checkout")
    shutil.rmtree(scratch / "git")
    process = warm_python.COLD(  # a process of its own, whose TMPDIR is the one given here
        [sys.executable, "-m", "records", "audit", "HEAD", "--only", "warm_up"], cwd=repository,
        env={**os.environ, "TMPDIR": str(scratch)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith(f"audit of HEAD: commit {commit}, tree {exported[:12]}")
    while not list(scratch.glob("*/plain")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err == "interrupted: the audit was not finished\n"
    assert not list(scratch.iterdir()) and sorted(str(p) for p in (repository / ".git").rglob("*")) == files


@pytest.mark.skipif(sys.platform != "linux", reason="confinement needs Linux")
def test_audited_code_has_no_network_no_environment_and_cannot_write_outside(tree, tmp_path, monkeypatch):
    """Its settings try all three when they are imported, and tell by the message of their own error."""
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    attempt = f"""
import os, socket
def tried(what):
    try:
        return what() and "done"
    except OSError:
        return "refused"
found = dict(write=tried(lambda: open({str(tmp_path / 'stolen')!r}, "w")),
             remove=tried(lambda: os.unlink(__file__) or True),
             connect=tried(lambda: socket.create_connection(("127.0.0.1", {port}), 5)),
             secret="SECRET_TOKEN" in os.environ,
             interfaces=len(socket.if_nameindex()))
raise UserError("found " + repr(found))
"""
    folder = edited(tree, tmp_path / "spy")
    (Path(folder) / "settings/__init__.py").unlink()
    (Path(folder) / "settings/__init__.py").write_text((tree / "settings/__init__.py").read_text() + attempt)
    with pytest.raises(UserError, match="found") as error:
        audit.audit(folder, only=["clock"])
    found = ast.literal_eval(str(error.value).partition("found ")[2])
    probe = f"import json, pathlib, runpy; probe = runpy.run_path({str(audit.PROBE)!r}); "
    confine = f"print(json.dumps(probe['confine'](pathlib.Path({str(tmp_path)!r}), 60)))"
    possible = json.loads(
        subprocess.run([sys.executable, "-c", probe + confine], capture_output=True, text=True).stdout
    )
    assert found["secret"] is False
    # Linux before 5.13 has no Landlock, and the audit says so
    if possible["writes"] == "limited to the audit's folder":
        assert found["write"] == found["remove"] == "refused" and not (tmp_path / "stolen").exists()
    if possible["network"] == "cut off":
        assert found["connect"] == "refused" and found["interfaces"] <= 1


def test_code_that_is_imported_from_elsewhere_is_refused(tree, tmp_path):
    folder = Path(edited(tree, tmp_path / "link"))
    (folder / "settings/__init__.py").unlink()
    (folder / "settings/__init__.py").symlink_to(tree / "settings/__init__.py")
    with pytest.raises(UserError, match="settings was imported from .*not in the audited checkout"):
        audit.audit(str(folder), only=["clock"])


def test_a_process_that_takes_too_long_is_ended_and_fails_its_checks(tree, tmp_path):
    folder = edited(
        tree, tmp_path / "slow", ("train_gpt.py", "import math\n", "import math\ntime.sleep(600)\n")
    )
    result = audit.audit(folder, only=["clock"], timeout=4)
    assert result["checks"] == [
        {"name": "clock", "passed": False, "detail": "the real process did not end in 4 s"}
    ]


def test_bad_input_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for args, text in [
        (["no-such-branch"], "unknown git ref 'no-such-branch'"),
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path / "empty")], "is not a checkout of this project: it has no train_gpt.py"),
        ([".", "--record", "short/999"], ".: unknown record 'short/999'"),
        ([".", "--record", "tiny-v3"], ".: tiny-v3 is frozen at --scale tiny"),
        ([".", "--json", "x.json", "--only", "seed"], "--json holds a whole audit"),
        ([".", "--json", str(tmp_path / "none" / "x.json")], "its folder does not exist")
    ]:
        with pytest.raises(SystemExit) as stop:
            main(["audit", *args])
        out, err = capsys.readouterr()
        assert (
            stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and text in err
            and not out
        )
