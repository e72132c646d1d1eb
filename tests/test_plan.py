"""The step plans are the only source of per-step numbers, also where the batch changes from stage to
stage."""

import dataclasses
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import schedule
from common.errors import UserError
from data.batch import to_rows
from data.corpus import sample_corpus
from data.stream import Stream, stream_arguments
from evidence import run_laws
from model import GPT
from optim import Optimizer
from settings import deltas
from settings.data import tokens_per_step
from settings.scales import SCALES, scaled
from system.hooks import hooks_of
from system import command_line, compiler, dry_run, memory, plan_plot, warmup
from system.dry_run import print_plan
from train_gpt import train_step

STAGED = ("schedule.stages=[0.25,0.5,0.25]", "data.tokens_per_rank=[64,128,192]")
SMALL = (
    "model.num_layers=2", "schedule.steps=8", "data.seq_len=32", "validation.seq_len=32",
    "model.residual.unet_skips.learned=true"
)


def settings(*sets, ref="short/11"):
    return deltas.resolve(ref, scale="micro", sets=sets).settings


def small_run(s, compiled=lambda model: model):
    """What train_step and the warm-up look at, of one process on the CPU."""
    model = GPT(s)
    model.initialise(0)
    world = SimpleNamespace(total=lambda x: x, ranks=range(8), device=torch.device("cpu"))
    return SimpleNamespace(
        s=s, world=world, plans=schedule.plan(s), model=model, hooks=hooks_of(model),
        compiled=compiled(model), optimizer=Optimizer(model, s), workers=None, guards=None,
        ranks_per_microbatch=8,
        corpus=sample_corpus()
    )


def steps_of(run, batches, steps):
    for step, batch in zip(steps, batches):
        plan = run.plans[step]
        train_step(run, plan, *to_rows(batch, plan.shape.seq_len, run.world.device, run.corpus.bos))


def test_a_setting_with_one_value_per_stage_goes_through_them_in_order():
    s = settings(*STAGED, "schedule.steps=8")
    plans = schedule.plan(s)
    assert [plan.stage for plan in plans] == [0] * 2 + [1] * 4 + [2] * 2
    assert [plan.shape.tokens_per_rank for plan in plans] == [64] * 2 + [128] * 4 + [192] * 2
    assert [plan.step for plan in plans if "stage" in plan.events] == [2, 6]
    assert [plan.tokens_before for plan in plans] == [sum(p.tokens for p in plans[:i]) for i in range(8)]
    assert [schedule.tokens_before(s, i) for i in range(8)] == [plan.tokens_before for plan in plans]
    assert schedule.tokens_before(s, 8) == sum(plan.tokens for plan in plans) == 8 * tokens_per_step(s)
    assert (
        schedule.largest_shape(s) == plans[6].shape
        and schedule.by_step(s, s.data.tokens_per_rank) == [64] * 2 + [128] * 4 + [192] * 2
    )


def test_equal_stages_are_no_stages():
    s = settings("schedule.stages=[0.5,0.5]", "data.tokens_per_rank=[128,128]")
    plain = settings("data.tokens_per_rank=128")
    assert [p.shape for p in schedule.plan(s)] == [p.shape for p in schedule.plan(plain)]
    assert stream_arguments(s) == stream_arguments(plain)


@pytest.mark.parametrize(
    "sets, message",
    [
        (("data.tokens_per_rank=[64,128]",), "has 2 values and schedule.stages has 0"),
        (("schedule.stages=[0.5,0.4]",), "add up to 1"),
        (
            ("schedule.stages=[0.5,0.5]", "data.tokens_per_rank=[64,100]"),
            "tokens_per_rank = 100 is not a multiple",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused(sets, message):
    with pytest.raises(UserError, match=message):
        settings(*sets)


def test_scales_shrink_the_batch_of_each_stage():
    full = deltas.resolve("short/11").settings
    staged = dataclasses.replace(full, schedule=dataclasses.replace(full.schedule, stages=(0.5, 0.5)),
                                 data=dataclasses.replace(full.data, tokens_per_rank=(65536, 131072)))
    s = scaled(staged, "micro")
    assert s.data.tokens_per_rank == (128, 256) and s.schedule.stages == (0.5, 0.5) and s.data.seq_len == 64
    assert abs(
        schedule.tokens_before(s, s.schedule.steps) - SCALES["micro"].budget_tokens
    ) <= tokens_per_step(s)


@pytest.mark.feature("model.attn.rope.yarn", "model.embed.bigram.rows", "model.head.candidates.sizes",
                     "validation.late.every")
@pytest.mark.parametrize("scale", ["tiny", "micro"])
def test_scales_keep_turns_rows_and_classes_in_proportion(scale):
    """Turns of a rotary pair go with the window, hashed rows (in two halves, 16 a token at most) and
    candidates with the vocabulary, late validations with the steps."""
    full, s = (deltas.resolve("short/62", scale=name).settings for name in ("full", scale))
    for bound in ("alpha", "beta"):
        turns = [getattr(x.model.attn.rope.yarn, bound) / x.model.attn.window.block for x in (s, full)]
        assert turns[0] == turns[1]
    share = s.model.vocab_size / full.model.vocab_size
    rows = s.model.embed.bigram.rows
    assert rows % 2 == 0 and 0 <= full.model.embed.bigram.rows * share - rows < 2
    head = deltas.resolve("short/92", scale=scale).settings
    assert head.model.embed.bigram.rows == 16 * head.model.vocab_size
    assert head.model.head.candidates.sizes == tuple(
        tuple(int(n * share) for n in sizes) for sizes in ((10240,), (10240,), (14336, 14336, 24576), ())
    )
    track = deltas.resolve("optimizer/36", scale=scale).settings
    assert track.validation.late.every == round(track.schedule.steps / 32)
    assert track.validation.every == round(track.schedule.steps / 8)


def test_a_batch_that_changes_per_stage_has_one_graph_per_shape_and_none_in_the_clock():
    torch._dynamo.reset()
    s = settings(*SMALL, *STAGED)

    def compiled(model):
        model.prepare_compile()
        return torch.compile(model, backend="eager", dynamic=False)

    run = small_run(s, compiled)
    steps = warmup.warmup_steps(run)
    assert {run.plans[i].shape for i in steps} == {plan.shape for plan in run.plans} and len(steps) == 4
    before = compiler.graph_count()
    sizes = [run.plans[i].shape.tokens_per_rank for i in steps]
    steps_of(run, warmup.warmup_batches(run, 0, sizes), steps)
    warm = compiler.graph_count()
    stream = Stream(run.corpus, ranks=range(8), **stream_arguments(s))
    steps_of(run, (stream.next() for _ in range(8)), range(8))
    assert compiler.graph_count() == warm and warm - before == 3
    log = SimpleNamespace(
        settings=deltas.resolve(
            "short/11", scale="micro", sets=[*SMALL, *STAGED, "system.compile=on"]
        ).settings,
        start={"device": "CPU"},
    )
    assert run_laws.warmup_steps(log) == len(steps)


def test_what_counts_by_logical_rank_follows_the_shape():
    """The FP8 head's gradient scale undoes the mean over the tokens that the step has, not over those of the
    first one."""
    s = deltas.resolve("short/11", scale="micro", with_=["numerics.fp8_head"], sets=[
        *SMALL, "system.precision=record", "schedule.stages=[0.5,0.5]", "data.tokens_per_rank=[128,256]"
    ]).settings
    run, seen = small_run(s), []
    operands = run.model.lm_head.operands
    run.model.lm_head.operands = lambda *args: seen.append(operands(*args)) or seen[-1]
    stream, last = Stream(run.corpus, ranks=range(8), **stream_arguments(s)), s.schedule.steps - 1
    steps_of(run, [stream.next()], [0])
    steps_of(run, [np.tile(stream.next(), 2)[:, :257]], [last])
    assert [grad for _, (_, _, grad) in seen] == [s.numerics.fp8_head.grad * 8 * n for n in (128, 256)]


@pytest.mark.parametrize("sets, with_, ref", [
    (("model.mlp.moe.balance.rule=quantile",), (), "variants/moe8k2s"),
    (SMALL, ("numerics.fp8_mlp", "numerics.fp8_mlp.c_proj"), "short/11"),
    (SMALL, ("numerics.fp8_head",), "short/11")
], ids=["quantile", "fp8_mlp", "fp8_head"])
def test_a_later_stage_steps_as_a_run_of_that_batch_alone(sets, with_, ref):
    """Nothing that counts by logical rank remembers the batch of the first step, with one rank in a forward
    or eight."""
    fixed = ("system.precision=record", "schedule.steps=8", "model.num_layers=2", *sets)
    found = []
    for sizes in (("schedule.stages=[0.5,0.5]", "data.tokens_per_rank=[128,256]"),
                  ("data.tokens_per_rank=256",)):
        for microbatch in (1, 8):
            s = deltas.resolve(ref, scale="micro", sets=[*fixed, *sizes], with_=with_).settings
            run = small_run(s)
            run.ranks_per_microbatch = microbatch
            plan = run.plans[5]
            batch = torch.randint(1, 1200, (8, 257), generator=torch.Generator().manual_seed(0))
            rows = to_rows(batch.int().numpy(), plan.shape.seq_len, run.world.device, run.corpus.bos)
            train_step(run, plan, *rows)
            found.append([*run.model.parameters(), *run.model.buffers()])
    staged, plain = found[:2], found[2:]
    for one, other in zip(staged, plain):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_memory_is_estimated_for_the_largest_shape():
    small, large, staged = (
        settings(*SMALL, *sets)
        for sets in (("data.tokens_per_rank=64",), ("data.tokens_per_rank=192",), STAGED)
    )
    assert memory.estimate(staged, 8, 8) == memory.estimate(large, 8, 8) != memory.estimate(small, 8, 8)


# ----- the picture of --dry-run

def test_the_picture_of_a_plan_shows_what_the_step_plans_say(tmp_path):
    """Each curve has the number that the step's plan has; a group without an update in a step has none."""
    resolved = deltas.resolve(
        "short/33", scale="micro", sets=["schedule.steps=12", "optim.lm_head.every=3"]
    )
    s, plans = resolved.settings, schedule.plan(resolved.settings)
    rates, momentum, windows, tokens = plan_plot.panels(s, plans)
    assert momentum.curves == {"momentum": [plan.momentum for plan in plans]}
    assert rates.curves["lm_head"] == [
        s.optim.lm_head.lr * plan.lr_factor if plan.step % 3 == 2 else None for plan in plans
    ]
    assert rates.curves["matrix"] == [s.optim.muon.lr * plan.lr_factor for plan in plans]
    assert windows.curves["long"] == [8 * plan.shape.windows.long.blocks if plan.shape.windows.long.blocks
                                      else plan.shape.windows.long.tokens for plan in plans]
    assert windows.curves["long"][0] < windows.curves["long"][-1]
    assert tokens.curves["tokens a step"] == [plan.tokens for plan in plans]
    for picture, begins in (("plan.png", b"\x89PNG"), ("plan.svg", b"<?xml")):
        plan_plot.draw(resolved, str(tmp_path / picture))
        assert (tmp_path / picture).read_bytes().startswith(begins)


def test_a_picture_shows_stages_and_leaves_out_what_a_run_has_not():
    staged = settings(*STAGED, "schedule.steps=8")
    tokens = plan_plot.panels(staged, schedule.plan(staged))[-1].curves["tokens a step"]
    assert tokens == [8 * 64] * 2 + [8 * 128] * 4 + [8 * 192] * 2
    first = settings(ref="short/1")
    assert [panel.title for panel in plan_plot.panels(first, schedule.plan(first))] == [
        "learning rate", "tokens"
    ]


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_printed(tmp_path, capsys, monkeypatch):
    resolved = deltas.resolve("short/1", scale="micro")
    for picture, message in (("plan.jpeg", "the ending says the format"), ("plan", "ending")):
        with pytest.raises(UserError, match=message):
            print_plan(resolved, str(tmp_path / picture))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(UserError, match="matplotlib"):
        print_plan(resolved, str(tmp_path / "plan.png"))
    assert capsys.readouterr().out == "" and not [*tmp_path.iterdir()]
    with pytest.raises(SystemExit):
        command_line.command_line(["short/1", "--plot", "plan.png"])
    assert "--dry-run" in capsys.readouterr().err


# ----- learning rates at the scales for a CPU

def rates(ref, scale, *sets):
    """{group: peak learning rate} at a scale; without --set, which is literal."""
    s = (
        deltas.resolve(ref, scale=scale).settings if not sets
        else scaled(deltas.resolve(ref, sets=sets).settings, scale)
    )
    return {name: group.lr for name, group in s.optim.groups().items()} | (
        {"muon": s.optim.muon.lr} if s.optim.muon else {})


@pytest.mark.parametrize("scale, width, batch", [("tiny", 8, 128), ("mini", 16, 256), ("micro", 16, 512)])
def test_learning_rates_follow_batch_and_width_at_the_scales_for_a_cpu(scale, width, batch):
    """Scalars by 1/sqrt(batch), head and AdamW's matrices by sqrt(width); tables and Muon stay."""
    for ref in ("short/2", "short/11", "short/57"):
        full, small = rates(ref, "full"), rates(ref, scale)
        adamw = ref == "short/2"  # Muon's matrices stay
        expected = {"scalar": 1 / math.sqrt(batch), "lm_head": math.sqrt(width), "embed": 1.0,
                    "x0_lambdas": 1 / math.sqrt(batch), "value_embed": 1.0, "smear_gate": 1.0, "gate": 1.0,
                    "matrix": math.sqrt(width) if adamw else 1.0, "qkvo": 1.0, "muon": 1.0, "router": 1.0}
        for name in expected.keys() & full.keys():
            assert math.isclose(small[name] / full[name], expected[name]), (ref, name)


def test_muon_scaled_by_the_larger_side_follows_the_width():
    """sqrt(max(rows, cols)) of record 5 shrinks with the width; the factors of records 3 and 8 do not."""
    ratios = {
        ref: rates(ref, "mini")["muon"] / rates(ref, "full")["muon"]
        for ref in ("short/3", "short/5", "short/8")
    }
    assert ratios == {"short/3": 1.0, "short/5": 4.0, "short/8": 1.0}


def test_a_head_that_divides_by_the_root_of_the_width_keeps_its_learning_rate():
    plain, divided = (rates("short/11", "mini", f"model.head.logit_scale={how}")["lm_head"]
                      for how in ("one", "rsqrt_dim"))
    full = rates("short/11", "full")["lm_head"]
    assert math.isclose(plain, 4 * full) and divided == full


def test_without_muon_adamws_matrices_follow_the_width():
    off = deltas.resolve("short/11", scale="mini", without=["optim.muon"]).settings.optim
    assert math.isclose(
        off.group("matrix", "qkvo").lr, 4 * deltas.resolve("short/11").settings.optim.matrix.lr
    )


def test_learning_rates_stay_on_a_gpu():
    assert rates("short/57", "small") == rates("short/57", "full")


@pytest.mark.feature("model.head.candidates")
def test_the_plan_shows_the_classes_of_a_sampled_softmax():
    s = deltas.resolve("short/92").settings
    table = [re.split(r"  +", line.strip()) for line in dry_run.schedule_table(s, schedule.plan(s))]
    head, *rows = (row for row in table if row[0] == "step" or row[0].isdigit())
    at = head.index("classes of the softmax") - len(head)
    classes = {int(row[0]): row[at] for row in rows}
    assert [classes[step] for step in (0, 681, 965, 1107)] == ["10,240", "14,336", "24,576", "50,304"]
