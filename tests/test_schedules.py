"""Schedules of records 34 to 57: at every step those of the originals; token totals of records 22 to 92:
those that are published."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import matrix
import schedule
from settings import deltas, schema
from settings.declare import lookup
from system.dry_run import print_plan
from system.report import cut_line
from common.errors import UserError
from golden_records import load

# Training tokens: to 57 of the logs, from 58 on of the merged code
PUBLISHED_TOKENS = {
    22: 695_992_320, 26: 688_128_000, 28: 666_501_120, 29: 656_670_720, 30: 670_433_280, 31: 656_670_720,
    33: 652_738_560, 34: 646_840_320, 35: 660_602_880, 36: 660_602_880, 37: 660_602_880, 38: 656_670_720,
    39: 634_388_480, 40: 610_795_520, 41: 606_863_360, 42: 598_999_040, 43: 588_513_280, 44: 588_513_280,
    45: 583_270_400, 46: 571_342_848, 47: 571_342_848, 48: 571_342_848, 49: 558_366_720, 50: 552_992_768,
    51: 538_705_920, 52: 529_399_808, 53: 508_428_288, 54: 497_942_528, 55: 488_767_488, 56: 483_655_680,
    57: 487_587_840, 58: 470_417_408, 59: 470_417_408, 60: 470_417_408, 61: 467_927_040, 62: 424_673_280,
    63: 417_988_608, 64: 412_876_800, 65: 412_876_800, 66: 412_876_800, 67: 412_876_800, 68: 412_876_800,
    69: 412_876_800, 70: 410_779_648, 71: 410_779_648, 72: 406_323_200, 73: 395_837_440, 74: 395_837_440,
    75: 395_837_440, 76: 395_837_440, 77: 395_837_440, 78: 395_837_440, 79: 395_837_440, 80: 393_216_000,
    81: 372_244_480, 82: 364_380_160, 83: 364_380_160, 84: 365_690_880, 85: 342_753_280, 86: 342_753_280,
    87: 342_753_280, 88: 338_821_120, 89: 338_821_120}
# Of 90 and 91 the lengths in steps are published, of 92 those of the parts and their batches: steps, tokens a
# step
PARTS = {
    90: ((423, 131_072), (424, 262_144), (423 + 45, 393_216)),
    91: ((415, 131_072), (415, 262_144), (415 + 45, 393_216)),
    92: ((320, 131_072), (361, 262_144), (426, 393_216), (67, 327_680), (20, 131_072)),
}
SWITCHES = {46: (707, 1414), 49: (690, 1380), 52: (654, 1307), 53: (627, 1254), 54: (614, 1227),
            55: (602, 1204), 56: (595, 1190), 57: (600, 1200)}  # first steps of the second and third batch


def settings(n, *sets, scale="full", without=()):
    return deltas.resolve(f"short/{n}", scale=scale, sets=sets, without=without).settings


def moments(plans, what):
    """{step: value} of the first step and of every step at which a value changes."""
    values = [what(plan) for plan in plans]
    return {i: v for i, v in enumerate(values) if i == 0 or values[i - 1] != v}


# ----- golden numbers

@pytest.mark.feature("schedule.extension_steps", "schedule.extension_at", "schedule.lr_peaks",
                     "schedule.stages", "model.attn.window.extension",
                     "model.attn.window.final_long",
                     "model.head.mtp",
                     "optim.muon.momentum_cooldown", "optim.muon.momentum_warmup.reaches_end")
@pytest.mark.parametrize("n", [34, 40, 43, 53, 55])
def test_learning_rate_momentum_windows_batch_and_target_weights_at_every_step(n):
    golden, _ = load("schedules")
    s = settings(n)
    plans, got = schedule.plan(s), {}
    got["lr"] = [p.lr_factor for p in plans]
    assert np.array_equal(got["lr"], golden[f"r{n}/lr"])
    if f"r{n}/momentum" in golden:
        assert np.allclose([p.momentum for p in plans], golden[f"r{n}/momentum"], rtol=1e-15, atol=0)
    if n > 34:
        windows = [schedule.validation_windows(s, i) for i in range(len(plans) + 1)]
        assert [w.long_blocks[-1] for w in windows] == golden[f"r{n}/ws_long"].tolist()
        assert [(w.short.tokens - 1) // 128 for w in windows] == golden[f"r{n}/ws_short"].tolist()
        assert [w.long.tokens for w in windows[:-1]] == [128 * w.long_blocks[-1] + 1 for w in windows[:-1]]
        assert windows[-1].long.tokens == windows[-1].last.tokens == 20 * 128 + 1
    if f"r{n}/batch_tokens" in golden:
        assert [p.tokens for p in plans] == golden[f"r{n}/batch_tokens"].tolist()
    if f"r{n}/mtp" in golden:
        for plan, weights in zip(plans, golden[f"r{n}/mtp"]):
            expected = weights[~np.isnan(weights)]
            assert len(plan.target_weights) == plan.shape.targets == len(expected)
            assert np.allclose(plan.target_weights, expected, rtol=0, atol=1e-12)


# ----- tokens

@pytest.mark.parametrize("n", PUBLISHED_TOKENS)
def test_the_schedules_give_the_published_number_of_training_tokens(n):
    s = settings(n)
    assert sum(plan.tokens for plan in schedule.plan(s)) == PUBLISHED_TOKENS[n]
    assert schedule.tokens_before(s, s.schedule.steps) == PUBLISHED_TOKENS[n]


@pytest.mark.feature("schedule.stages", "schedule.extension_steps")
@pytest.mark.parametrize("n", PARTS)
def test_the_batches_of_records_90_to_92_follow_each_other_as_published(n):
    s = settings(n)
    found = [plan.tokens for plan in schedule.plan(s)]
    assert found == [tokens for steps, tokens in PARTS[n] for _ in range(steps)]
    assert schedule.tokens_before(s, s.schedule.steps) == sum(steps * tokens for steps, tokens in PARTS[n])


class Stages(NamedTuple):
    """What the notes say of a schedule. A row of `rows`: first step, tokens a step, longest document, windows
    in blocks (short, long)."""
    rows: tuple[tuple, ...]
    steps: int
    cooldown: int  # first step of the fall of the learning rate
    floor: float
    untied: int  # last step in which embedding and head are one
    peaks: tuple[float, ...] = (1.0, 1.52, 1.73)
    momentum: tuple[float, int] = (0.95, 300)  # highest, steps of the rise from 0.85
    prefix: tuple[tuple, ...] = ()  # (weight at the start, at the end) of the stages
    candidates: tuple[tuple[int, int | None], ...] = ((0, None),)  # (from step, classes)


def staged(*starts, documents=(2048, 2048, 2048), tokens=(131_072, 262_144, 393_216, 393_216),
           windows=((1, 3), (3, 7), (5, 11), (6, 13))):
    """The rows of Stages from the steps at which stages start."""
    return tuple(zip(starts, tokens, (*documents, documents[-1]), windows))


SHORTER = (896, 2048, 2048)  # documents from record 72 on
PREFIX = ((0.25, 0.25), (0.25, 0.0), (0.0, 0.0))
RECORDS_58_TO_92 = {
    58: Stages(staged(0, 579, 1157, 1735), 1775, 868, 0.1, 1157),
    62: Stages(staged(0, 520, 1040, 1560), 1600, 702, 0.1, 1041),
    72: Stages(staged(0, 497, 993, 1490, documents=SHORTER), 1530, 670, 0.15, 993),
    81: Stages(staged(0, 468, 937, 1405, documents=SHORTER), 1415, 562, 0.15, 937),
    85: Stages(staged(0, 428, 857, 1285, documents=SHORTER), 1300, 514, 0.15, 857),
    89: Stages(staged(0, 423, 847, 1270, documents=SHORTER), 1285, 508, 0.15, 847, prefix=PREFIX),
    90: Stages(staged(0, 423, 847, 1270, documents=SHORTER), 1315, 508, 0.15, 847, prefix=PREFIX),
    92: Stages(
        (*zip((0, 320, 681, 1107, 1174), (131_072, 262_144, 393_216, 327_680, 131_072),
              (896, 2048, 3072, 3072, 3072), ((1, 3), (3, 7), (5, 11), (5, 11), (6, 13))),),
        1194, 234, 0.3, 1175, (1.0, 1.52, 1.73, 1.73 * math.sqrt(20 / 24)), (0.93, 240),
        candidates=((0, 10_240), (681, 14_336), (965, 24_576), (1107, None))
    ),
}
QUARTERS = ((320, 0.2), (411, 0.15), (501, 0.1), (591, 0.05), (681, 0.0))  # prefix weights of record 92


def said(n, step):
    """What the notes say of a step: stage, tokens, longest document, windows, learning rate, momentum,
    weights of the next tokens, weight of the prefix, candidates."""
    told = RECORDS_58_TO_92[n]
    stage = sum(start <= step for start, *_ in told.rows) - 1
    scheduled, (highest, rise) = told.rows[-1][0], told.momentum
    # to record 64 fractions are of the whole schedule, from 65 on stages are of whole steps
    x = 3 * step / scheduled - stage if n < 65 else None
    if x is None and stage < len(told.rows) - 1:
        x = (step - told.rows[stage][0]) / (told.rows[stage + 1][0] - told.rows[stage][0])
    peak = told.peaks[min(stage, len(told.peaks) - 1)]
    if n < 65:
        peak = told.peaks[sum(3 * step > k * scheduled for k in (1, 2))]  # x > 1/3, x > 2/3
    first = 0.5 * scheduled if n == 58 else 0.45 * scheduled if n == 62 else told.cooldown
    fall = min(max((step - first) / (scheduled - first), 0.0), 1.0)
    back = max(step - (told.steps - 50), 0) / 50
    momentum = 0.85 + (highest - 0.85) * (min(step / rise, 1.0) if not back else 1 - back)
    weights = ((1.0, 0.5, 0.25 * (1 - (x or 0))), (1.0, 0.5 * (1 - (x or 0))), (1.0,))[min(stage, 2)]
    prefix = 0.0
    if told.prefix and stage < 3:
        a, b = told.prefix[stage]
        prefix = a + (b - a) * x
    elif n == 92:
        prefix = next((weight for start, weight in reversed(QUARTERS) if start <= step), 0.25)
    classes = next(size for start, size in reversed(told.candidates) if start <= step)
    return (stage, *told.rows[stage][1:], peak * (1 - fall) + told.floor * fall, momentum, weights, prefix,
            classes)


@pytest.mark.feature("schedule.stages", "schedule.stage_peaks", "schedule.whole_steps",
                     "data.max_doc_len", "model.head.prefix", "model.head.candidates", "model.head.mtp")
@pytest.mark.parametrize("n", RECORDS_58_TO_92)
def test_stages_of_records_58_to_92_around_each_step_at_which_something_changes(n):
    s, told = settings(n), RECORDS_58_TO_92[n]
    plans = schedule.plan(s)
    changes = {start for start, *_ in told.rows} | {start for start, _ in (*told.candidates, *QUARTERS)}
    changes |= {told.cooldown, told.momentum[1], told.steps - 50, told.untied, told.steps - 1}
    assert len(plans) == told.steps
    assert [plan.step for plan in plans if "untie" in plan.events] == [told.untied]
    for step in sorted({i + d for i in changes for d in (-1, 0, 1)} & set(range(told.steps))):
        plan, (*exact, lr, momentum, weights, prefix, classes) = plans[step], said(n, step)
        windows = plan.shape.windows
        short, long = ((span.tokens - 1) // 128 for span in (windows.short, windows.long))
        assert [plan.stage, plan.tokens, plan.shape.max_doc_len, (short, long)] == exact, step
        assert plan.shape.candidates == classes and plan.tokens == 8 * plan.shape.tokens_per_rank
        assert (plan.lr_factor, plan.momentum) == pytest.approx((lr, momentum), rel=1e-12), step
        assert plan.target_weights == pytest.approx(weights, abs=1e-12), step
        assert plan.prefix_weight == pytest.approx(prefix, abs=1e-12), step
    final = schedule.validation_windows(s, told.steps)
    assert (final.short.tokens - 1, final.long.tokens - 1) == (6 * 128, 20 * 128)


@pytest.mark.feature("schedule.stages")
@pytest.mark.parametrize("n", SWITCHES)
def test_the_batch_grows_at_the_step_of_the_log_and_the_windows_with_it(n):
    plans = schedule.plan(settings(n))
    scheduled = len(plans) - 40
    first, second = SWITCHES[n]
    assert moments(plans, lambda p: p.tokens) == {0: 131_072, first: 262_144, second: 393_216}
    blocks = moments(plans, lambda p: p.shape.windows.long_blocks[-1])
    assert blocks == {0: 3, first: 7, second: 11, scheduled: 13}
    assert [p.step for p in plans if "stage" in p.events] == [first, second, scheduled]


# ----- parts of a schedule

@pytest.mark.feature("schedule.extension_steps")
def test_without_the_extension_all_steps_are_scheduled():
    on, off = settings(45), settings(45, without=["schedule.extension_steps"])
    assert schedule.scheduled_steps(on.schedule) == 2185 and schedule.scheduled_steps(off.schedule) == 2225
    assert len(schedule.plan(on)) == len(schedule.plan(off)) == 2225
    tail = [p.lr_factor for p in schedule.plan(on)][-40:]
    assert len(set(tail)) == 1 and len({p.lr_factor for p in schedule.plan(off)[-40:]}) == 40


@pytest.mark.feature("schedule.extension_steps")
@pytest.mark.parametrize("steps, extension", [(3, 0), (8, 1), (100, 12), (319, 39), (320, 40), (1840, 40)])
def test_the_extension_of_a_short_trial_is_an_eighth_of_it(steps, extension):
    s = settings(57, f"schedule.steps={steps}")
    ranges = schedule.stages(s)
    assert ranges[-1].stop == steps and len(ranges) == 3 + (extension > 0)
    assert schedule.scheduled_steps(s.schedule) == steps - extension


@pytest.mark.feature("schedule.extension_at")
def test_records_35_to_45_hold_the_learning_rate_just_above_its_floor():
    for n, tail in ((35, 0.10018), (39, 0.100225), (45, 0.10018), (46, 0.1), (57, 0.1)):
        assert schedule.plan(settings(n))[-1].lr_factor == pytest.approx(tail, rel=1e-12)
    assert schedule.plan(settings(45, without=["schedule.extension_at"]))[-1].lr_factor == 0.1


@pytest.mark.feature("schedule.lr_peaks")
def test_the_learning_rate_jumps_before_the_batch_in_46_and_with_it_from_49_on():
    """x > 0.33 of 2120 steps in 46; x > 1/3 of 2070 in 49, which step 690 does not exceed."""
    jumps = {n: [p.step for p, q in zip(schedule.plan(settings(n))[1:], schedule.plan(settings(n)))
                 if p.lr_factor > q.lr_factor] for n in (46, 49, 53, 57)}
    assert jumps == {46: [700, 1400], 49: [691, 1381], 53: [627, 1254], 57: [601, 1201]}
    off = schedule.plan(settings(46, without=["schedule.lr_peaks"]))
    assert max(p.lr_factor for p in off) == 1 == off[900].lr_factor
    assert schedule.plan(settings(46))[900].lr_factor == 1.51


@pytest.mark.feature("model.attn.window.extension")
def test_the_window_of_the_extension_can_be_that_of_the_last_stage():
    on, off = settings(42), settings(42, without=["model.attn.window.extension"])
    blocks = [[p.shape.windows.long_blocks for p in schedule.plan(s)] for s in (on, off)]
    assert blocks[0][2245:] == [(3, 7, 11, 13)] * 40 and blocks[1][2245:] == [(3, 7, 11)] * 40
    assert blocks[0][:2245] == blocks[1][:2245]


@pytest.mark.feature("model.attn.window.final_long")
def test_the_final_long_window_leaves_short_windows_and_yarn_alone():
    for n in (35, 57):
        on, off = (schedule.validation_windows(s, s.schedule.steps) for s in
                   (settings(n), settings(n, without=["model.attn.window.final_long"])))
        assert on.long.tokens == on.last.tokens == 2561 and off.long.tokens == off.last.tokens == 1665
        assert (on.short, on.long_blocks) == (off.short, off.long_blocks) and on.short.tokens == 6 * 128 + 1


@pytest.mark.feature("optim.muon.momentum_cooldown")
def test_the_momentum_falls_over_the_last_fifty_of_all_steps():
    plans = schedule.plan(settings(57))
    assert [round(p.momentum, 12) for p in plans[1789:1793]] == [0.95, 0.95, 0.948, 0.946]
    assert plans[-1].momentum == pytest.approx(0.852, rel=1e-12)
    assert schedule.plan(settings(57, without=["optim.muon.momentum_cooldown"]))[-1].momentum == 0.95


# ----- at small scales

@pytest.mark.parametrize("n", [35, 46, 53, 57])
def test_scales_keep_the_proportions_of_stages_and_extension(n):
    full, small = settings(n), settings(n, scale="micro")
    ratio = small.schedule.steps / full.schedule.steps
    assert small.schedule.extension_steps == max(1, round(40 * ratio))
    for a, b in zip(schedule.stages(full), schedule.stages(small)):
        assert abs(len(b) - len(a) * ratio) <= 1
    total = schedule.tokens_before(small, small.schedule.steps)
    share = schedule.tokens_before(full, full.schedule.steps) * ratio / 512
    assert abs(total / share - 1) < 0.02


# ----- refusals

@pytest.mark.parametrize("n, sets, message", [
    (57, ["schedule.lr_peaks=[[0.6,1.5],[0.3,1.7]]"], "must list growing fractions below 1"),
    (57, ["schedule.lr_peaks=[[0.6]]"], "schedule.lr_peaks"),
    (57, ["data.tokens_per_rank=[16384,49152]"], "has 2 values and schedule.stages has 3"),
    (57, ["model.attn.window.stages=[3,11]"], "has 2 windows and schedule.stages has 3"),
    (57, ["model.attn.window.extension=10"], "must be at least the last stage, 11 blocks"),
    (34, ["model.attn.window.final_long=20"], "switch model.attn.window.final_last_layer off"),
    (34, ["model.attn.window.extension=13"], "needs schedule.extension_steps: set it too"),
    (57, ["model.attn.window.growth=constant", "model.attn.window.start=128", "model.attn.window.stages=[]",
          "model.attn.window.final_long=false", "model.attn.rope.yarn=false"],
     "model.attn.window.extension needs model.attn.window.growth=stages"),
    (34, ["schedule.lr_spans_extension=true"], "needs schedule.extension_steps: set it too"),
])
def test_schedules_that_do_not_fit_are_refused_with_the_culprit(n, sets, message):
    with pytest.raises(UserError) as caught:
        settings(n, *sets)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.feature("schedule.extension_steps")
def test_the_plan_says_that_an_extension_was_cut_to_an_eighth_of_the_run(capsys):
    for asked, told in ((8, False), (9, True)):
        sets = ["schedule.steps=64", f"schedule.extension_steps={asked}"]
        print_plan(deltas.resolve("short/57", scale="micro", sets=sets))
        assert ("the extension has 8 of the 9 steps asked for" in capsys.readouterr().out) == told


def test_the_matrix_takes_record_53_through_a_batch_switch_a_freeze_and_the_untie():
    """On 1, 2 and 4 processes: tests/matrix.md."""
    plans = schedule.plan(settings(53, f"schedule.steps={matrix.steps_of('short/53')}", scale="micro"))
    assert [p.shape.tokens_per_rank for p in plans] == [32, 32, 32, 64, 64, 96, 96, 96]
    assert [p.step for p in plans if p.frozen] == [3, 4, 5, 6, 7]
    assert [p.step for p in plans if "untie" in p.events] == [5]  # the table moves by itself in step 7
    assert "embed" in plans[7].due and not plans[7].shape.tied
    assert "| short/53 |" in (Path(matrix.__file__).parent / "matrix.md").read_text(encoding="utf-8")


# ----- runs that are too short for a setting

# of every setting counted in steps a record that has it; None: the count does not depend on the run's length
COUNTED = {
    "schedule.steps": None,
    "system.warmup_steps": None,  # untimed steps; from the run's last step on they repeat it
    "schedule.horizon": None, "schedule.matrix.horizon": None,
    "optim.muon.momentum_cooldown.until": None,  # a run may stop before them
    "schedule.late_horizon.steps": None, "optim.lm_head.kfac.stop": None,
    "optim.broad_delta.stop": None, "optim.trail_delta.stop": None,
    "optim.phase_readout.second": None,  # refused: it must not come before `first`
    # refused: `start` must come before `stop`
    "model.attn.window.forced_short.start": None, "model.attn.window.forced_short.stop": None,
    "optim.muon.late_brake": "optimizer/30",
    "optim.lm_head.kfac.start": None, "optim.lm_head.kfac.apply": None,  # refused: they must not pass `stop`
    "optim.lm_head.kfac": "short/11", "optim.lm_head.eigenbasis": "short/11",
    "optim.embed.master": "short/11", "schedule.late_horizon": "optimizer/46",
    "optim.muon.soft.end": None, "optim.muon.dyn.steps": None, "optim.muon.muown.norm_steps": None,
    "optim.muon.soft": "optimizer/20", "optim.o_bias": "short/1", "optim.embed2": "medium/16",
    "optim.embed2.slower": "medium/16", "optim.muon.smoothing": "medium/13",
    "schedule.warmup_steps": "short/2", "schedule.cooldown_steps": "short/2",
    "numerics.fp8_mlp.c_proj.exact_steps": "short/57", "optim.positions": "short/1", "optim.norm": "short/1",
    "optim.bias": "short/1", "optim.router": "variants/4", "optim.expert_c_fc": "variants/4",
    "optim.expert_c_proj": "variants/4", "optim.latent": "variants/5", "optim.value_lambda": "short/9",
    "optim.sa_lambdas": "short/33", "optim.matrix": "short/1", "optim.post_lambdas": "short/77",
    "optim.bigram": "short/62", "optim.bigram_lambdas": "short/62", "optim.xsa": "short/82",
    "optim.mudd": "short/81", "optim.mudd_bias": "short/81", "optim.token_gate": "short/85",
    "optim.token_gate_bias": "short/85", "optim.token_gate_scale": "short/85", "optim.muon.slow": "short/92",
    "optim.tail": "short/92", "optim.bigram.slower": "short/92", "optim.value_embed.slower": "short/92"
}
SWITCHES_ON = {
    "numerics.fp8_mlp.c_proj.exact_steps": ["numerics.fp8_mlp", "numerics.fp8_mlp.c_proj"]
}


def too_long(path, count=73):
    """(settings, None) or (None, message) of a micro run of 72 steps with this count of steps."""
    ref = COUNTED.get(path, COUNTED.get(path.rpartition(".")[0], "short/57"))
    base = deltas.resolve(ref, scale="micro").settings
    with_ = SWITCHES_ON.get(path, [p for p in schema.prefixes(path) if lookup(base, p) is None])
    sets = ["schedule.steps=72", f"{path}={count}", "system.precision=record"]
    try:
        return deltas.resolve(ref, scale="micro", with_=with_, sets=sets).settings, None
    except UserError as error:
        return None, str(error)


COUNTS = [path for path, f in schema.fields().items() if f.metadata["unit"] == "step"]


@pytest.mark.parametrize("path", [path for path in COUNTS if COUNTED.get(path, "") is not None])
def test_a_count_of_steps_that_is_longer_than_the_run_is_told_or_refused(path):
    s, message = too_long(path)
    if s is None:
        orders = f"{path} = 73" in message and " is beyond " in message  # the end of a span before its start
        assert orders or message.startswith(f"{path} = 73 follows a change of the window or of the batch")
    else:
        plans = schedule.plan(s)
        assert path in dict(schedule.cuts(s, plans)) and cut_line(s, plans)[0].count(path) == 1


def test_the_list_of_counts_is_not_empty_and_a_run_says_all_of_it_in_one_line():
    sections = {path.rpartition(".")[0] for path in COUNTS}
    assert len(COUNTS) > 40 and {path for path in COUNTED if path.count(".") > 1} <= {*COUNTS} | sections
    s = settings(57, "schedule.steps=20")
    line, = cut_line(s, schedule.plan(s))
    assert line == (
        "this run is too short for schedule.extension_steps = 40, optim.muon.momentum_warmup.steps = 300, "
        "optim.muon.momentum_cooldown.steps = 50, validation.every = 250 (--dry-run says what it does "
        "instead)"
    )


def test_no_record_is_too_short_for_itself_at_any_scale():
    for ref in deltas.load_records():
        for scale in ("tiny", "micro"):  # full and small differ from tiny by one factor of all counts
            s = deltas.resolve(ref, scale=scale).settings
            assert cut_line(s, schedule.plan(s)) == [], (ref, scale)


@pytest.mark.parametrize("ref, sets, path, effect", [
    ("short/2", ["schedule.steps=600", "schedule.warmup_steps=256", "schedule.cooldown_steps=400"],
     "schedule.warmup_steps", "256 steps reach into the cooldown, the last 400 of 600"),
    ("short/57", ["schedule.steps=340"], "optim.muon.momentum_warmup.steps",
     "300 steps reach into the cooldown, the last 50 of 340"),
    ("short/52", ["optim.scalar.freeze_steps=700"], "optim.scalar.freeze_steps",
     "700 steps are more than lie between two changes of window or batch: the group is not updated after "
     "step 653"),
    ("optimizer/46", ["optim.rre={}"], "optim.rre.start",
     "2820 steps are more than the run's 2690: there is no extrapolation"),
    ("short/72", ["schedule.steps=600", "model.attn.window.forced_short={}"],
     "model.attn.window.forced_short.start",
     "1010 steps are more than the run's 600: the short window is never forced"),
    ("short/57", ["schedule.steps=2"], "schedule.stages", "no step is left for stage 2"),
    ("short/57", ["schedule.steps=2"], "model.head.untied.tied_until",
     "the run ends before head and embedding are untied"),
])
def test_what_a_run_cuts_is_said(ref, sets, path, effect):
    s = deltas.resolve(ref, sets=sets).settings
    assert dict(schedule.cuts(s, schedule.plan(s)))[path].startswith(effect)


@pytest.mark.feature("optim.scalar.freeze_steps")
def test_a_freeze_without_a_change_to_follow_is_refused():
    for n in (11, 12):
        with pytest.raises(UserError, match="neither changes in this run: set optim.scalar.freeze_steps=0"):
            settings(n, "optim.scalar.freeze_steps=4")
    assert settings(13, "optim.scalar.freeze_steps=4") and settings(52).optim.scalar.freeze_steps == 40
