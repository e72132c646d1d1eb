"""Settings -> step plans: all that the schedules decide for one step, in pure Python, known before training
starts."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from settings import LOGICAL_RANKS, Settings, by_document, per_stage


class Span(NamedTuple):
    """What one window lets a query see, with documents and causality (kernels.attention.Window without its
    block size).

    tokens: q - k < tokens. blocks: q // block - k // block < blocks. None: not limited by this.
    """
    tokens: int | None
    blocks: int | None


@dataclass(frozen=True)
class Windows:
    """The windows of one forward. long_blocks: sizes of the long window so far, which YaRN follows."""
    long: Span
    short: Span
    last: Span  # of the last layer
    long_blocks: tuple


@dataclass(frozen=True)
class Shape:
    """All that decides the shapes of a step's tensors: steps of one Shape run the same compiled graphs.

    The key of warm-up, recompile limit, memory estimate and their verification.
    """
    tokens_per_rank: int
    seq_len: int  # tokens of a row: T
    max_document: int | None  # longest document, where the loader cuts them
    windows: Windows | None


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step uses. Every field is a plain value, so a whole run can be printed and
    compared."""
    step: int
    stage: int
    shape: Shape
    tokens: int  # over all logical ranks
    tokens_before: int  # of all steps before this one
    lr_factor: float  # multiplies every learning rate
    momentum: float  # Muon
    moves_bias: bool  # of the routers, after the step
    due: frozenset[str] | None = None  # groups of settings.Optim that the step updates; None: all
    # what happens once, at this step: "stage", the first step of a further stage
    events: tuple[str, ...] = ()
    frozen: frozenset[str] = frozenset()  # groups whose gradients of this step are dropped


def lr_factor(schedule, step):
    """Learning-rate multiplier at a step: the cosine of llm.c, or the trapezoid of record 2 on."""
    steps, warmup = schedule.steps, schedule.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if schedule.lr == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    if schedule.cooldown_frac:  # record 18 on
        left = 1 - step / steps
        w = min(left / schedule.cooldown_frac, 1.0)
    elif step < steps - schedule.cooldown_steps:
        w = 1.0
    else:
        w = (steps - step) / schedule.cooldown_steps
    return w * 1.0 + (1 - w) * schedule.lr_floor


def muon_momentum(muon, step, steps):
    """Muon momentum at a step (0.0 without Muon): a rise over momentum_warmup (record 9), a fall over
    momentum_cooldown (record 39), both linear.

    steps: all optimizer steps of the run.
    """
    if muon is None:
        return 0.0
    warmup, cooldown, momentum = muon.momentum_warmup, muon.momentum_cooldown, muon.momentum
    if cooldown is not None and step > steps - cooldown.steps:
        x = (step - (steps - cooldown.steps)) / cooldown.steps
        return (1 - x) * momentum + x * cooldown.end
    if warmup is None:
        return momentum
    last = warmup.steps if warmup.reaches_end else warmup.steps - 1  # the plateau of records 39 and 40
    x = min(step, last) / warmup.steps
    return (1 - x) * warmup.start + x * momentum


def moves_bias(s, step):
    """Does balancing move the biases of the routers after a step? Not over the last freeze_frac of a run."""
    moe = s.model.mlp.moe
    if moe is None or moe.balance is None:
        return False
    return step < s.schedule.steps - round(moe.balance.freeze_frac * s.schedule.steps)


def due(s, step):
    """The groups of settings.Optim that a step updates; None: all, as where no `every` is set."""
    cadences = s.optim.cadences()
    if max(cadences.values()) == 1:
        return None
    return frozenset(name for name, every in cadences.items() if (step + 1) % every == 0)


# ----- windows ----------------------------------------------------------------------------------------------

def long_window(window, steps, step):
    """Tokens of the long window at a step, 0 <= step <= steps (step == steps: after training)."""
    if window.growth == "constant":
        return window.start
    if window.growth == "stages":
        return window.stages[len(window.stages) * step // (1 + steps)] * window.block
    value = window.start + (window.end - window.start) * (step / steps)
    grains = math.floor(value / window.grain) if window.growth == "floor" else math.ceil(value / window.grain)
    return max(1, grains) * window.grain


def span(window, tokens):
    """The Span of a window of so many tokens under the window's rule."""
    if window.rule == "tokens":
        return Span(tokens, None)
    if window.rule == "tokens_blocks":
        return Span(tokens, -(-tokens // window.block))
    if window.rule == "blocks":
        return Span(None, max(1, tokens // window.block))
    return Span(tokens + 1, None)  # tokens_back: FlashAttention's left window shows one key more


def half(window, tokens):
    """Tokens of the short window: half the blocks, rounded down, at least one block; half the tokens if less
    than two."""
    blocks = tokens // window.block
    return max(1, blocks // 2) * window.block if blocks else max(1, tokens // 2)


def windows(s, step, final=False):
    """Windows at a step. final: in the last validation, where record 31 on looks further back than in
    training."""
    w = s.model.attn.window
    if w is None:
        return None
    steps = s.schedule.steps
    long = long_window(w, steps, step)
    blocks = ()
    if w.growth == "stages":
        blocks = w.stages[:w.stages.index(long // w.block) + 1]
    if final and w.final is not None:
        long = w.final * w.block
        blocks += (w.final,) if w.final != blocks[-1] else ()
    last = long if not final or w.final_last_layer is None else w.final_last_layer * w.block
    return Windows(span(w, long), span(w, half(w, long)), span(w, last), blocks)


def layer_spans(specs, windows):
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
    """The steps of each stage: one stage of all steps where schedule.stages is empty."""
    ends, total = [], 0.0
    for share in s.schedule.stages[:-1]:
        total += share
        ends.append(round(total * s.schedule.steps))
    return [range(a, b) for a, b in zip([0, *ends], [*ends, s.schedule.steps])]


def stage_of(s: Settings, step: int) -> int:
    """The stage that a step belongs to; that of the last step after training."""
    return next(i for i, steps in reversed([*enumerate(stages(s))]) if steps.start <= step or i == 0)


def in_stage(value: int | tuple[int, ...], stage: int) -> int:
    """The value that a setting with one value, or one per stage, has in a stage."""
    values = per_stage(value)
    return values[min(stage, len(values) - 1)]


def shape(s: Settings, step: int, stage: int | None = None) -> Shape:
    """The Shape of a step. stage: that of the step, if known."""
    tokens = in_stage(s.data.tokens_per_rank, stage_of(s, step) if stage is None else stage)
    return Shape(tokens, tokens if by_document(s) else s.data.seq_len, s.data.max_document, windows(s, step))


def largest_shape(s: Settings) -> Shape:
    """The Shape of the first step that has the most tokens: what memory must hold."""
    starts = [steps.start for steps in stages(s) if steps]
    return shape(s, max(starts, key=lambda step: shape(s, step).tokens_per_rank))


def tokens_before(s: Settings, step: int) -> int:
    """Tokens of all steps before a step, over all logical ranks."""
    return LOGICAL_RANKS * sum(
        in_stage(s.data.tokens_per_rank, i) * len(range(steps.start, min(step, steps.stop)))
        for i, steps in enumerate(stages(s))
    )


def rank_tokens(s: Settings) -> int | list[int]:
    """Tokens per rank of all steps: one number, or a list with one for each step (data.stream)."""
    sizes = per_stage(s.data.tokens_per_rank)
    if len(set(sizes)) == 1:
        return sizes[0]
    return [in_stage(sizes, i) for i, steps in enumerate(stages(s)) for _ in steps]


# ----- the run ----------------------------------------------------------------------------------------------

def plan(s: Settings) -> list[StepPlan]:
    """The step plans of a run, one per optimizer step."""
    plans, before = [], 0
    for stage, steps in enumerate(stages(s)):
        for i in steps:
            of_step = shape(s, i, stage)
            tokens = LOGICAL_RANKS * of_step.tokens_per_rank
            events = ("stage",) if stage and i == steps.start else ()
            plans.append(StepPlan(i, stage, of_step, tokens, before, lr_factor(s.schedule, i),
                                  muon_momentum(s.optim.muon, i, s.schedule.steps), moves_bias(s, i), due(s, i), events))
            before += tokens
    return plans


def validates(s, step):
    """Is there a validation before this step? (step == steps: the last one, after training)"""
    return step == s.schedule.steps or step % s.validation.every == 0


def validation_windows(s, step):
    """Windows of the validation before this step: those of the step, and at the end the final ones."""
    return windows(s, step, final=step == s.schedule.steps)
