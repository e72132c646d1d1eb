"""SODA: a pull towards the initial weights that fades."""

import math
from dataclasses import dataclass

import torch

from schedule import StepPlan
from updates.slots import Slot, Step
from updates.views import Views


@dataclass(frozen=True)
class Soda(Slot):
    """Pull each matrix towards its start W0 (track 3, result 32).

    W <- (1-l) W + l W0 together with the step, whose update is made from the W before the pull; l = min(f /
    (step + 2), 1). f = 1 until `start`, falls to 0 along half a cosine over `steps`, and stays there.
    """
    start: int
    steps: int

    each_matrix = False

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        return {"initial": (unit, dtype)}

    def numbers(self, plan: StepPlan, t: int) -> dict:
        x = min(max((plan.step - self.start) / self.steps, 0.0), 1.0)
        fade = 0.5 * (1 + math.cos(math.pi * x)) if x < 1 else 0.0
        return {"soda_pull": min(fade / (plan.step + 2), 1.0), "soda_first": float(t == 1)}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        initial, p = step.state["initial"], step.p
        initial.add_((p - initial) * step.numbers["soda_first"])
        step.scratch["pull"] = step.numbers["soda_pull"] * (p - initial)
        return u

    def after(self, step: Step) -> None:
        step.p.sub_(step.scratch["pull"].to(step.p.dtype))
