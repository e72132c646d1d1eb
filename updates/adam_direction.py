"""Adam's direction as a slot, to be followed by decay or hyperball (AdamH: track 3, result 4)."""

from dataclasses import dataclass

import torch

from schedule import StepPlan
from updates.slots import Slot, Step, kept_dtype
from updates.views import Views


def adam_direction(
    g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, beta1: float, beta2: float, eps: float,
    correction1: float | torch.Tensor, correction2: float | torch.Tensor
) -> torch.Tensor:
    """The update of Adam without a learning rate; m and v, its moments, change in place.

    correction: 1 - beta^t.
    """
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    return (m / correction1) / ((v / correction2).sqrt() + eps)


@dataclass(frozen=True)
class AdamDirection(Slot):
    """M / (1 - beta1^t) / (sqrt(V / (1 - beta2^t)) + eps), M and V the moving averages of g and g^2."""
    beta1: float
    beta2: float
    eps: float

    each_matrix = False

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        return {name: (unit, kept_dtype(dtype)) for name in ("exp_avg", "exp_avg_sq")}

    def numbers(self, plan: StepPlan, t: int) -> dict[str, float]:
        return {"correction1": 1 - self.beta1**t, "correction2": 1 - self.beta2**t}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        m, v, n = step.state["exp_avg"], step.state["exp_avg_sq"], step.numbers
        g = u.to(m.dtype)
        return adam_direction(
            g, m, v, self.beta1, self.beta2, self.eps, n["correction1"], n["correction2"]
        )
