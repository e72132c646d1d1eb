"""Bi-Maxwell momentum: a fast and a slow moving average of the gradient, which begin as the momentum."""

from dataclasses import dataclass

from updates.slots import Slot


@dataclass(frozen=True)
class BiMaxwell(Slot):
    """Momentum from two moving averages from a step on (jn2clark, pull requests 339 and 341 of
    modded-nanogpt).

        F <- a F + (1-a) g;  S <- b S + (1-b) g;  M = share S + (1-share) F;  update (1-mu) g + mu M

    a = fast_beta and b = slow_beta after step `start`; up to it, that step included, both are Muon's mu, so
    that F = S is the momentum and the update is Momentum's with ema.
    """
    fast_beta: float
    slow_beta: float
    share: float
    start: int

    each_matrix = False

    def state(self, unit, dtype, views) -> dict:
        return {"momentum_buffer": (unit, dtype), "slow_buffer": (unit, dtype)}

    def numbers(self, plan, t) -> dict:
        own = plan.step > self.start
        return {"fast_beta": self.fast_beta if own else plan.momentum,
                "slow_beta": self.slow_beta if own else plan.momentum}

    def __call__(self, u, step):
        fast, slow, n = step.state["momentum_buffer"], step.state["slow_buffer"], step.numbers
        g = u.to(fast.dtype)
        fast.lerp_(g, 1 - n["fast_beta"])
        slow.lerp_(g, 1 - n["slow_beta"])
        return g.lerp(fast.lerp(slow, self.share), n["momentum"])
