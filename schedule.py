"""Settings -> step plans: all that the schedules decide for one step, in pure Python, known before training starts."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step uses. Every field is a plain number, so a whole run can be printed and compared."""
    step: int
    lr_factor: float  # multiplies every learning rate
    momentum: float  # Muon
    tokens: int  # over all logical ranks


def lr_factor(schedule, step):
    """Learning-rate multiplier at a step: the cosine of llm.c, or the trapezoid of records 2 to 17."""
    steps, warmup = schedule.steps, schedule.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if schedule.lr == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    if step < steps - schedule.cooldown_steps:
        return 1.0
    return (steps - step) / schedule.cooldown_steps


def muon_momentum(muon, step):
    """Muon momentum at a step (0.0 without Muon); rises linearly over momentum_warmup (record 9)."""
    if muon is None:
        return 0.0
    if muon.momentum_warmup is None:
        return muon.momentum
    x = min(step / muon.momentum_warmup.steps, 1)
    return (1 - x) * muon.momentum_warmup.start + x * muon.momentum


def plan(s):
    """The step plans of a run, one per optimizer step."""
    tokens = 8 * s.data.tokens_per_rank
    return [StepPlan(i, lr_factor(s.schedule, i), muon_momentum(s.optim.muon, i), tokens)
            for i in range(s.schedule.steps)]


def validates(s, step):
    """Is there a validation before this step? (step == steps: the last one, after training)"""
    return step == s.schedule.steps or step % s.validation.every == 0
