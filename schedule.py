"""Settings -> step plans: everything the schedules decide for one step, in pure Python.

All step plans of a run are known before training starts.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from settings import Settings
from settings.data import LOGICAL_RANKS, by_document, per_stage
from settings.declare import walk
from settings.model import Window
from settings.muon import Muon
from settings.optim import Optim
from settings.schedule import Schedule
from settings.wrappers import RRE, TrailDelta


class Span(NamedTuple):
    """The limits of one window: kernels.attention.Window without its block size.

    A query q sees a key k if q - k < tokens and q // block - k // block < blocks; None: no such limit.
    Causality and documents limit it further.
    """
    tokens: int | None
    blocks: int | None


@dataclass(frozen=True)
class Windows:
    """The windows of one forward pass. long_blocks: sizes of the long window so far, for YaRN."""
    long: Span
    short: Span
    last: Span  # of the last layer
    long_blocks: tuple


@dataclass(frozen=True)
class Shape:
    """Everything that determines the shapes of a step's tensors: steps of one Shape run the same graphs.

    Warm-up, recompile limit and memory estimate go by Shapes.
    """
    tokens_per_rank: int
    seq_len: int  # tokens of a row: T
    max_doc_len: int | None  # longest document, where the loader cuts them
    windows: Windows | None
    targets: int = 1  # next tokens that the loss counts
    tied: bool = False  # the embedding is the head's weight, until the event "untie"
    prefix: bool = False  # the loss counts the next token's prefix too
    candidates: int | None = None  # classes of the softmax for each logical rank; None: all


@dataclass(frozen=True)
class StepPlan:
    """The numbers of one optimizer step, as plain values, so that a whole run can be printed and compared."""
    step: int
    stage: int
    shape: Shape
    tokens: int  # over all logical ranks
    tokens_before: int  # of all steps before this one
    lr_factor: float  # multiplies every learning rate
    momentum: float  # Muon
    update_bias: bool  # of the routers, after the step
    due: frozenset[str] | None = None  # groups of settings.optim.Optim that the step updates; None: all
    # One-time events. "stage": first step of a new stage. "untie": after the update the embedding gets its
    # own table, a copy of the head's weight with its optimizer state.
    events: tuple[str, ...] = ()
    target_weights: tuple[float, ...] = ()  # of the losses of the next tokens; (): only the next
    frozen: frozenset[str] = frozenset()  # groups that are not updated; their gradients are dropped
    prefix_weight: float = 0.0  # of the loss of the next token's prefix
    matrix_lr_factor: float | None = None  # in place of lr_factor for the role `matrix`; None: the same

    def of_role(self, role: str) -> "StepPlan":
        """The plan as the parameters of a role see it: with their own learning-rate factor."""
        if role != "matrix" or self.matrix_lr_factor is None:
            return self
        return dataclasses.replace(self, lr_factor=self.matrix_lr_factor)


class Readout(NamedTuple):
    """Averaged or extrapolated weights that a validation reads.

    setting: the path of the setting that makes them. undone: training goes on without them.
    """
    setting: str
    undone: bool


def scheduled_steps(schedule: Schedule) -> int:
    """Steps before the extension."""
    return schedule.steps - schedule.extension


def lr_factor(schedule: Schedule, step: int) -> float:
    """Learning-rate multiplier at a step: the cosine of llm.c, or the trapezoid of record 2 on."""
    warmup, steps = schedule.warmup_steps, lr_steps(schedule, step)
    if step < warmup:
        return (step + 1) / warmup
    progress = step / steps
    if step >= steps:  # the extension
        progress = schedule.extension_at
        step = progress * steps
    if schedule.lr == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    if schedule.whole_steps and schedule.cooldown_frac:
        start = math.floor((1 - schedule.cooldown_frac) * steps + 1e-6)
        w = min((steps - step) / max(1, steps - start), 1.0)
    elif schedule.cooldown_frac:  # record 18 on
        left = 1 - progress
        w = min(left / schedule.cooldown_frac, 1.0)
    elif step < steps - schedule.cooldown_steps:
        w = 1.0
    else:
        w = (steps - step) / schedule.cooldown_steps if schedule.cooldown_steps else 0.0
    w **= schedule.cooldown_power
    return w * lr_peak(schedule, progress, step) + (1 - w) * schedule.lr_floor


def lr_steps(schedule: Schedule, step: int = 0) -> int:
    """Steps over which the learning rate is laid out, as a step sees it."""
    if schedule.late_horizon is not None and step >= schedule.late_horizon.start:
        return schedule.late_horizon.steps
    if schedule.horizon is not None:
        return schedule.horizon
    return schedule.steps if schedule.lr_spans_extension else scheduled_steps(schedule)


def matrix_lr_factor(schedule: Schedule, step: int) -> float | None:
    """Learning-rate multiplier of the block matrices at a step; None: that of the run."""
    own = schedule.matrix
    if own is None:
        return None
    steps = own.horizon or lr_steps(schedule, step)
    if step < own.warmup_steps:
        return (step if own.warmup_from_zero else step + 1) / own.warmup_steps
    w = 1.0
    if own.cooldown_steps:
        w = min((steps - step) / own.cooldown_steps, 1.0)
    elif own.cooldown_frac:
        w = min((1 - step / steps) / own.cooldown_frac, 1.0)
    w = max(w, 0.0) ** own.cooldown_power
    return w + (1 - w) * own.floor


def lr_peak(schedule: Schedule, progress: float, step: float) -> float:
    """Factor from which the cooldown starts: that of the stage, or after the jumps before `progress`."""
    if schedule.stage_peaks:
        passed = sum(end <= step for end in stage_ends(schedule)[:-1])
        return schedule.stage_peaks[min(passed, len(schedule.stage_peaks) - 1)]
    return next((factor for start, factor in reversed(schedule.lr_peaks) if progress > start), 1.0)


def muon_momentum(muon: Muon | None, step: int, steps: int) -> float:
    """Muon momentum at a step, 0.0 without Muon.

    It rises linearly over momentum_warmup (record 9) and falls linearly over momentum_cooldown (record 39).
    steps: all optimizer steps of the run.
    """
    if muon is None:
        return 0.0
    warmup, cooldown, momentum = muon.momentum_warmup, muon.momentum_cooldown, muon.momentum
    if cooldown is not None and cooldown.until is not None:
        steps = cooldown.until
    if cooldown is not None and step > steps - cooldown.steps:
        x = (step - (steps - cooldown.steps)) / cooldown.steps
        return (1 - x) * momentum + x * cooldown.end
    if warmup is None:
        return momentum
    last = warmup.steps if warmup.reaches_end else warmup.steps - 1  # the plateau of records 39 and 40
    x = min(step, last) / warmup.steps
    return (1 - x) * warmup.start + x * momentum


def update_bias(s: Settings, step: int) -> bool:
    """Whether load balancing updates the routers' biases after a step (not in the last freeze_frac)."""
    moe = s.model.mlp.moe
    if moe is None or moe.balance is None:
        return False
    return step < s.schedule.steps - round(moe.balance.freeze_frac * s.schedule.steps)


def due(cadences: dict[str, int], step: int, frozen: frozenset[str] = frozenset()) -> frozenset[str] | None:
    """The groups of settings.optim.Optim that a step updates, without the frozen ones; None: all.

    Args:
        cadences: {group: steps from one update to the next}.
    """
    if max(cadences.values()) == 1 and not frozen:
        return None
    return frozenset(name for name, every in cadences.items() if (step + 1) % every == 0) - frozen


def resting(freezes: dict[str, int], since_change: int | None) -> frozenset[str]:
    """The groups that rest after a change of window or batch (record 52).

    Args:
        freezes: {group: frozen steps}.
        since_change: steps since the last change, 0 at the step that has it; None before the first one.
    """
    if since_change is None:
        return frozenset()
    return frozenset(name for name, steps in freezes.items() if since_change < steps)


def target_weights(s: Settings, step: int, stage: int) -> tuple[float, ...]:
    """Loss weights of the next tokens at a step of a stage, with multi-token prediction; () without."""
    mtp = s.model.head.mtp
    if mtp is None:
        return ()
    if stage >= len(mtp.start):  # the extension
        return mtp.end[-1]
    x = within_stage(s, step, stage)
    return tuple(a + (b - a) * x for a, b in zip(mtp.start[stage], mtp.end[stage]))


def within_stage(s: Settings, step: int, stage: int) -> float:
    """How far a step is in its stage, 0 at the stage's start and 1 at its end."""
    if s.schedule.whole_steps:
        steps = stages(s)[stage]
        return (step - steps.start) / max(1, len(steps))
    shares = s.schedule.stages or (1.0,)
    progress = step / scheduled_steps(s.schedule)
    return min(max((progress - sum(shares[:stage])) / shares[stage], 0.0), 1.0)


def prefix_weight(s: Settings, step: int, stage: int) -> float:
    """Loss weight of the next token's prefix at a step of a stage; 0 without the prefix token loss."""
    prefix = s.model.head.prefix
    if prefix is None:
        return 0.0
    if stage >= len(prefix.start):  # the extension
        return prefix.end[-1]
    a, b, x = prefix.start[stage], prefix.end[stage], within_stage(s, step, stage)
    if prefix.levels is not None:
        x = math.floor(x * prefix.levels + 1e-9) / prefix.levels
    return a + (b - a) * x


def candidates(s: Settings, step: int, stage: int) -> int | None:
    """Classes of the training softmax at a step of a stage; None: all."""
    found = s.model.head.candidates
    if found is None or stage >= len(found.sizes) or not found.sizes[stage]:
        return None
    sizes = found.sizes[stage]
    return sizes[min(math.floor(within_stage(s, step, stage) * len(sizes) + 1e-9), len(sizes) - 1)]


def untie_step(s: Settings) -> int | None:
    """The step after whose update head and embedding are untied; None if they are not tied at first.

    It is the first step from tied_until on that updates the head, and may lie after the last step.
    """
    untied = s.model.head.untied
    if untied is None or untied.tied_until is None:
        return None
    at = untied.tied_until * scheduled_steps(s.schedule)
    first = round(at) if s.schedule.whole_steps else math.ceil(at - 1e-6)
    every = s.optim.group("lm_head", "lm_head").every
    return -(-(first + 1) // every) * every - 1


def tied(s: Settings, step: int) -> bool:
    """Whether the embedding is still the head's weight in a step, or in the validation before the step."""
    last = untie_step(s)
    return last is not None and step <= last


# ----- windows ----------------------------------------------------------------------------------------------

def long_window(window: Window, steps: int, step: int) -> int:
    """Tokens of the long window at a step, 0 <= step <= steps (step == steps: after training)."""
    if window.growth == "constant":
        return window.start
    x = step / steps
    if window.growth == "cubic":
        x = 4 * x ** 3 - 6 * x ** 2 + 3 * x
    value = window.start + (window.end - window.start) * x
    grains = math.floor(value / window.grain) if window.growth == "floor" else math.ceil(value / window.grain)
    return max(1, grains) * window.grain


def span(window: Window, tokens: int) -> Span:
    """The Span of a window of `tokens` tokens under the window's rule."""
    if window.rule == "tokens":
        return Span(tokens, None)
    if window.rule == "tokens_blocks":
        return Span(tokens, -(-tokens // window.block))
    if window.rule == "blocks":
        return Span(None, max(1, tokens // window.block))
    return Span(tokens + 1, None)  # tokens_back: FlashAttention's left window shows one key more


def half(window: Window, tokens: int) -> int:
    """Tokens of the short window, from the tokens of the long one.

    Half the blocks, rounded down, but at least one block; half the tokens if the long window has no block.
    """
    blocks = tokens // window.block
    return max(1, blocks // 2) * window.block if blocks else max(1, tokens // 2)


def windows(s: Settings, step: int, final: bool = False) -> Windows | None:
    """Windows at a step, or None without windows.

    final: in the last validation, which from record 31 on has wider windows than training.
    """
    w = s.model.attn.window
    if w is None:
        return None
    blocks = ()
    if w.growth == "stages":
        blocks = window_blocks(s, step)
        if final and w.final not in (None, blocks[-1]):
            blocks += (w.final,)
        long = blocks[-1] * w.block
    else:
        long = long_window(w, s.schedule.steps, step)
    forced = w.forced_short
    short = half(w, long)
    if forced is not None and forced.start <= step < forced.stop:
        short = forced.blocks * w.block
    if final and w.final_long is not None:
        long = w.final_long * w.block
    last = long if not final or w.final_last_layer is None else w.final_last_layer * w.block
    return Windows(span(w, long), span(w, short), span(w, last), blocks)


def window_blocks(s: Settings, step: int) -> tuple[int, ...]:
    """Sizes of the long window in blocks, of all stages up to a step (growth `stages`)."""
    w, steps = s.model.attn.window, scheduled_steps(s.schedule)
    if s.schedule.stages:
        stage = min(stage_of(s, step), len(w.stages) - 1)
    else:  # records 29 to 41 divide by the number of steps plus one
        stage = min(len(w.stages) * step // (1 + steps), len(w.stages) - 1)
    extended = s.schedule.extension and step >= steps and w.extension not in (None, w.stages[-1])
    found = w.stages[:stage + 1] + ((w.extension,) if extended else ())
    return tuple(dict.fromkeys(found))  # two stages may have one window


def layer_spans(specs: Sequence, windows: Windows | None) -> list[Span | None]:
    """The Span of every layer; None without attention or window.

    specs: layers.specs.LayerSpec of each layer. windows: Windows of the step, or None.
    """
    kinds = [spec.attn and spec.attn.window for spec in specs]
    spans = [kind and (windows.long if kind == "long" else windows.short) for kind in kinds]
    if kinds[-1] == "long":
        spans[-1] = windows.last
    return spans


# ----- stages and shapes ------------------------------------------------------------------------------------

def stages(s: Settings) -> list[range]:
    """The steps of each stage of schedule.stages (if empty, one stage), then those of the extension."""
    ends = stage_ends(s.schedule) + ([s.schedule.steps] if s.schedule.extension else [])
    return [range(a, b) for a, b in zip([0, *ends], ends)]


def stage_ends(schedule: Schedule) -> list[int]:
    """The step after each stage's last one, without the extension.

    A stage begins at the first step that is not before the sum of the earlier stages' fractions, or with
    whole_steps at the step nearest to it.
    """
    scheduled, total, ends = scheduled_steps(schedule), 0.0, []
    for share in schedule.stages[:-1]:
        total += share
        at = total * scheduled
        ends.append(round(at) if schedule.whole_steps else math.ceil(at - 1e-6))  # 0.3333 x 2 is below 2/3
    return [*ends, scheduled]


def stage_of(s: Settings, step: int) -> int:
    """The stage of a step; after training, the stage of the last step."""
    return next(i for i, steps in reversed([*enumerate(stages(s))]) if steps.start <= step or i == 0)


def in_stage(value: int | tuple[int, ...] | None, stage: int) -> int | None:
    """The value in a stage of a setting with one value or one per stage; in the extension the last one."""
    values = per_stage(value)
    return values[min(stage, len(values) - 1)]


def shape(s: Settings, step: int, stage: int | None = None) -> Shape:
    """The Shape of a step. stage: that of the step, if known."""
    stage = stage_of(s, step) if stage is None else stage
    tokens = in_stage(s.data.tokens_per_rank, stage)
    longest = in_stage(s.data.max_doc_len, stage)
    return Shape(tokens, tokens if by_document(s) else s.data.seq_len, longest, windows(s, step),
                 len(target_weights(s, step, stage)) or 1, tied(s, step), prefix_weight(s, step, stage) > 0,
                 candidates(s, step, stage))


def largest_shape(s: Settings) -> Shape:
    """The Shape of the first step with the most tokens, for the memory estimate."""
    starts = [steps.start for steps in stages(s) if steps]
    return shape(s, max(starts, key=lambda step: shape(s, step).tokens_per_rank))


def tokens_before(s: Settings, step: int) -> int:
    """Tokens of all steps before a step, over all logical ranks."""
    return LOGICAL_RANKS * sum(
        in_stage(s.data.tokens_per_rank, i) * len(range(steps.start, min(step, steps.stop)))
        for i, steps in enumerate(stages(s))
    )


def by_step(s: Settings, value: int | tuple[int, ...] | None) -> int | list[int] | None:
    """A setting with one value or one per stage as data.stream takes it: one number, or one for each step."""
    values = per_stage(value)
    if len(set(values)) == 1:
        return values[0]
    return [in_stage(values, i) for i, steps in enumerate(stages(s)) for _ in steps]


# ----- readouts ---------------------------------------------------------------------------------------------

def readouts(s: Settings, step: int) -> list[Readout]:
    """What the validation before a step reads in place of the weights that an update has given."""
    optim, last, found = s.optim, step == s.schedule.steps, []
    if optim.tail is not None and last:
        found.append(Readout("optim.tail", undone=False))
    if apart(s) and step and step not in outer_steps(s):
        found.append(Readout("optim.outer.workers", undone=False))  # the mean of the workers' weights
    if step in extrapolations(optim.rre, step):
        found.append(Readout("optim.rre", undone=False))
    found += [Readout(path, undone=False) for path, told in pulsed(optim) if step in pulses(told, step)]
    if (tail := optim.tail_ema) is not None and step >= tail.start and (last or tail.at == "validation"):
        found.append(Readout("optim.tail_ema", undone=tail.at == "validation"))
    back = optim.tail_velocity
    if back is not None and step > back.start and (last or back.at == "validation"):
        found.append(Readout("optim.tail_velocity", undone=back.at == "validation"))
    if optim.phase_readout is not None and last and step > optim.phase_readout.second:
        found.append(Readout("optim.phase_readout", undone=False))
    away = optim.reference_readout
    begun = away is not None and step >= max(away.start, away.reference)
    if begun and (last or away.at == "validation"):
        found.append(Readout("optim.reference_readout", undone=away.at == "validation"))
    if optim.anchor is not None and step >= optim.anchor.start:
        found.append(Readout("optim.anchor", undone=True))
    return found


def apart(s: Settings) -> bool:
    """Whether every logical rank is a worker of its own (optim.outer.workers)."""
    return s.optim.outer is not None and s.optim.outer.workers > 1


def outer_steps(s: Settings) -> range:
    """Numbers of the updates that an outer step follows; empty without optim.outer."""
    outer = s.optim.outer
    if outer is None:
        return range(0)
    return range(1 if outer.first_step else outer.period, s.schedule.steps + 1, outer.period)


def extrapolations(rre: RRE | None, steps: int) -> list[int]:
    """Numbers of the updates up to `steps` that an extrapolation follows (optim.rre)."""
    found, kept = [], 0
    for done in range(rre.start, steps + 1) if rre is not None else ():
        kept = min(kept + 1, rre.points)
        if done % rre.every == 0 and kept == rre.points:
            found.append(done)
            kept = 1
    return found


def pulsed(optim: Optim) -> list[tuple[str, TrailDelta]]:
    """[(path, section)] of the pulses that are on, in the order in which they act."""
    both = ("optim.broad_delta", optim.broad_delta), ("optim.trail_delta", optim.trail_delta)
    return [(path, told) for path, told in both if told is not None]


def pulses(told: TrailDelta, steps: int) -> list[int]:
    """Numbers of the updates up to `steps` that a pulse follows (optim.trail_delta, optim.broad_delta)."""
    return [*range(told.start + told.every, min(told.stop, steps) + 1, told.every)]


# ----- the run ----------------------------------------------------------------------------------------------

def plan(s: Settings) -> list[StepPlan]:
    """The step plans of a run, one per optimizer step."""
    plans, before, changed = [], 0, None
    groups, freezes, untied = s.optim.groups(), s.optim.freezes(), untie_step(s)
    for stage, steps in enumerate(stages(s)):
        for i in steps:
            of_step = shape(s, i, stage)
            if i and visible(of_step) != visible(plans[-1].shape):
                changed = i
            frozen = resting(freezes, None if changed is None else i - changed)
            events = ("stage",) if stage and i == steps.start else ()
            events += ("untie",) if i == untied else ()
            tokens = LOGICAL_RANKS * of_step.tokens_per_rank
            plans.append(
                StepPlan(
                    i, stage, of_step, tokens, before, lr_factor(s.schedule, i),
                    muon_momentum(s.optim.muon, i, s.schedule.steps), update_bias(s, i),
                    due({name: group.cadence(i) for name, group in groups.items()}, i, frozen), events,
                    target_weights(s, i, stage), frozen, prefix_weight(s, i, stage),
                    matrix_lr_factor(s.schedule, i)
                )
            )
            before += tokens
    return plans


TOO_LONG = {  # end of the path of a count of steps -> what a shorter run does
    "schedule.warmup_steps": "the learning rate does not reach its peak",
    "schedule.late_horizon.start": "the horizon does not change",
    "schedule.matrix.warmup_steps": "the learning rate of the matrices does not reach its peak",
    "schedule.matrix.cooldown_steps": "the learning rate of the matrices begins below its peak",
    "schedule.cooldown_steps": "the learning rate begins below its peak",
    "optim.muon.momentum_warmup.steps": "the momentum does not reach optim.muon.momentum",
    "optim.muon.momentum_cooldown.steps": "the momentum begins below optim.muon.momentum",
    "numerics.fp8_mlp.c_proj.exact_steps": "every step has an exact scale",
    ".slower.start": "the cadence does not change",
    ".slower.every": "the group is not updated after the change of cadence",
    "model.attn.window.forced_short.start": "the short window is never forced",
    "model.attn.window.forced_short.stop": "the short window stays forced to the end",
    "optim.muon.normuon.noise.ramp_steps": "the noise does not reach its standard deviation",
    "optim.muon.slow.start": "the momentum has one buffer throughout",
    "optim.muon.bi_maxwell.start": "the momentum is one average throughout",
    "optim.muon.soap.trust.until": "the trust gate acts throughout",
    "optim.muon.soap.trust.release_start": "the trust gate keeps its bounds",
    "optim.muon.soap.trust.release_end": "the trust gate keeps its largest value",
    "optim.muon.contra.steps": "the strength does not reach 0",
    "optim.muon.soft.start": "the share stays 0",
    "optim.muon.tempered.start": "the polar factor is not tempered",
    "optim.muon.tempered.end": "the tempering does not reach its most",
    "optim.muon.floor.late.start": "the floor keeps its ratio",
    "optim.muon.floor.late.end": "the floor does not reach its late ratio",
    "optim.muon.late_brake.start": "the brake keeps its factor",
    "optim.muon.late_brake.end": "the brake does not reach its late factor",
    "optim.muon.smoothing.ramp_steps": "the coefficient does not reach its end",
    "optim.muon.soda.start": "the pull does not fade",
    "optim.muon.soda.steps": "the pull does not fade to 0",
    "optim.tail.long": "the averages begin with the first step",
    "optim.tail.short": "the averages begin with the first step",
    "validation.late.every": "there are no more validations towards the end",
    "optim.ema_nesterov.start": "there is no look-ahead",
    "optim.ema_nesterov.stop": "the look-ahead goes on to the end",
    "optim.outer.period": "there is at most the outer step after the first update",
    "optim.rre.start": "there is no extrapolation",
    "optim.rre.every": "there is no extrapolation",
    "optim.tail_ema.start": "there is no average, and the weights are read as they are",
    "optim.tail_ema.tau": "the average stays near the weights with which it begins",
    "optim.tail_velocity.start": "there is no mean of steps, and the weights are read as they are",
    "optim.trail_delta.start": "there is no pulse",
    "optim.trail_delta.every": "there is no pulse",
    "optim.broad_delta.start": "there is no pulse",
    "optim.broad_delta.every": "there is no pulse",
    "optim.phase_readout.first": "the weights are read as they are",
    "optim.phase_readout.second": "the weights are read as they are",
    "optim.anchor.start": "there is no average, and gradients are taken at the weights",
    "optim.anchor.tau": "the average stays near the weights with which it begins",
    "optim.anchor.ramp_start": "gradients are taken at the weights",
    "optim.anchor.ramp_end": "the extrapolation does not reach its length",
    "optim.embed.master": "the tables have no master",
    "optim.lm_head.eigenbasis.start": "the head has AdamW throughout",
    "optim.lm_head.eigenbasis.every": "the head keeps its first basis",
    "optim.lm_head.kfac.start": "the head's gradient stays as it is",
    "optim.lm_head.kfac.apply": "the head's gradient stays as it is",
    "optim.lm_head.kfac.full": "strength and damping do not reach their ends",
    "optim.lm_head.kfac.every": "the head keeps its first preconditioner",
    "optim.reference_readout.reference": "there is no reference, and the weights are read as they are",
    "optim.reference_readout.start": "the weights are read as they are",
    "validation.every": "there is no validation between the first step and the last",
    ".every": "the group is never updated",
    ".freeze_steps": "one freeze would last for the whole run",
}


def cuts(s: Settings, plans: Sequence[StepPlan]) -> Iterator[tuple[str, str]]:
    """(path, what the run does in place of it) of each setting for which the run is too short.

    Counts of steps shrink with a scale, but not with `--set schedule.steps`, so a short trial has less of
    them than its settings say.
    """
    steps = s.schedule.steps
    asked, taken = s.schedule.extension_steps, s.schedule.extension
    if taken < asked:
        yield (
            "schedule.extension_steps",
            f"the extension has {taken} of the {asked} steps asked for: at most an eighth of the run"
        )
    for path, f, value in walk(s):
        effect = next((text for end, text in TOO_LONG.items() if path.endswith(end)), None)
        if f.metadata["unit"] == "step" and effect and value and value > steps:
            yield path, f"{value} steps are more than the run's {steps}: {effect}"
    yield from overlaps(s)
    if s.schedule.horizon is not None and s.schedule.horizon > 2 * steps:
        yield "schedule.horizon", (
            f"the run ends after {steps} of the {s.schedule.horizon} steps of its learning-rate schedule"
        )
    for group, frozen in s.optim.freezes().items():
        last = max((plan.step for plan in plans if group not in plan.frozen), default=-1)
        rest = [visible(plan.shape) for plan in plans[max(last, 0):]]
        if frozen <= steps and sum(a != b for a, b in zip(rest, rest[1:])) > 1:
            yield f"optim.{group}.freeze_steps", (
                f"{frozen} steps are more than lie between two changes of window or batch: the group is not "
                f"updated after step {last}"
            )
    if s.schedule.stages and (empty := [i for i, part in enumerate(stages(s)) if not part]):
        yield "schedule.stages", f"no step is left for stage {' and '.join(map(str, empty))}"
    if (untied := untie_step(s)) is not None and untied >= steps:
        yield "model.head.untied.tied_until", "the run ends before head and embedding are untied"


def overlaps(s: Settings) -> Iterator[tuple[str, str]]:
    """As `cuts`: a warm-up that fits the run and reaches into a cooldown that fits it too, which cuts it."""
    schedule, muon = s.schedule, s.optim.muon
    scheduled = lr_steps(schedule)
    cooldown = schedule.cooldown_steps or round(schedule.cooldown_frac * scheduled)
    if schedule.lr == "trapezoid" and cooldown <= scheduled:
        if scheduled - cooldown < schedule.warmup_steps <= schedule.steps:
            yield "schedule.warmup_steps", (
                f"{schedule.warmup_steps} steps reach into the cooldown, the last {cooldown} of {scheduled}: "
                "the learning rate does not reach its peak"
            )
    if muon is not None and muon.momentum_warmup is not None and muon.momentum_cooldown is not None:
        rise, fall = muon.momentum_warmup.steps, muon.momentum_cooldown.steps
        end = muon.momentum_cooldown.until or schedule.steps
        if end - fall < rise <= schedule.steps and fall <= schedule.steps:
            yield "optim.muon.momentum_warmup.steps", (
                f"{rise} steps reach into the cooldown, the last {fall} of {end}: the momentum "
                "jumps there"
            )


def shapes(plans: Iterable[StepPlan]) -> dict[Shape, int]:
    """{Shape: first step that has it}, in the order of the steps: the Shapes that a run warms up."""
    found = {}
    for one in plans:
        found.setdefault(one.shape, one.step)
    return found


def visible(shape: Shape) -> tuple:
    """Tokens per rank and windows of a step: a change of either starts a freeze."""
    return shape.tokens_per_rank, shape.windows


def validates(s: Settings, step: int) -> bool:
    """Whether there is a validation before this step (step == steps: the last one, after training)."""
    late, steps = s.validation.late, s.schedule.steps
    if late is not None and step % late.every == 0 and step >= (1 - late.frac) * steps - 1e-6:
        return True
    return step == steps or step % s.validation.every == 0


def validation_windows(s: Settings, step: int) -> Windows | None:
    """Windows of the validation before this step: those of the step, and at the end the final ones."""
    return windows(s, step, final=step == s.schedule.steps)
