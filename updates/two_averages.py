"""Momentum from a fast and a slow moving average of the gradient: Bi-Maxwell momentum (@jn2clark, pull
requests 339 and 341 of modded-nanogpt) and the two rails of record 92, which came from it."""

from dataclasses import dataclass

import torch

from schedule import StepPlan
from updates.slots import Slot, Step
from updates.views import Views


@dataclass(frozen=True)
class TwoAverages(Slot):
    """F <- a F + (1-a) g;  S <- b S + (1-b) g;  update (1-mu) g + mu ((1-share) F + share S).

    From step `first` on a = fast_beta and b = slow_beta. Before, the momentum is F alone with Muon's mu as a,
    as in Momentum with ema; S is then a copy of it (Bi-Maxwell), or if `always_slow` has its own decay from
    the first update on (record 92).
    """
    fast_beta: float
    slow_beta: float
    share: float
    first: int
    always_slow: bool = False

    each_matrix = False

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        return {"momentum_buffer": (unit, dtype), "slow_buffer": (unit, dtype)}

    def numbers(self, plan: StepPlan, t: int) -> dict:
        both = plan.step >= self.first
        return {"fast_beta": self.fast_beta if both else plan.momentum,
                "slow_beta": self.slow_beta if both or self.always_slow else plan.momentum,
                "share": self.share if both else 0.0}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        fast, slow, n = step.state["momentum_buffer"], step.state["slow_buffer"], step.numbers
        g = u.to(fast.dtype)
        fast.lerp_(g, 1 - n["fast_beta"])
        slow.lerp_(g, 1 - n["slow_beta"])
        return g.lerp(fast.lerp(slow, n["share"]), n["momentum"])
