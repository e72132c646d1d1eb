"""Muown (track 3, results 23 and 31): Muon on the directions of the rows, Adam on their gains."""

from dataclasses import dataclass
from typing import Any

import torch

from schedule import StepPlan
from updates.adam_direction import adam_direction
from updates.slots import Slot, Step, kept_dtype
from updates.views import Views

LEAST = 1e-12  # norm of a row
ZERO_ROWS = 0.33**0.5  # gain and norm at the start of rows of zeros


@dataclass(frozen=True)
class Muown(Slot):
    """Rows W = gain v / |v|: the slots that follow move v, and Adam moves the gain with the learning rate.

    While a step is made, step.p holds v = n W / gain, so W is along v; n goes from the norm of the row at the
    start to `norm` with the power `norm_power` of the share of `norm_steps` updates. The next slot gets the
    gradient of v.
    """
    settings: Any  # settings.muon.Muown

    def axis(self, views: Views) -> int:
        """The axis along which a row, the weights of one output, lies."""
        return -1 if views.orientation == "out_in" else -2

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        shape = list(unit)
        shape[self.axis(views)] = 1
        return {name: (tuple(shape), kept_dtype(dtype))
                for name in ("gain", "start_norm", "gain_avg", "gain_avg_sq")}

    def numbers(self, plan: StepPlan, t: int) -> dict[str, float]:
        s = self.settings
        # The norm changes after each update, and the first one leaves it.
        return {"norm_share": min(max(t - 2, 0) / (s.norm_steps - 1), 1.0) ** s.norm_power,
                "gain_correction1": 1 - s.beta1**t, "gain_correction2": 1 - s.beta2**t}

    def norm(self, name: str) -> float:
        """The norm of v at the end."""
        s = self.settings
        return s.norm * {"o": s.o_mul, "c_fc": s.c_fc_mul, "c_proj": s.c_proj_mul}.get(name, 1.0)

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        s, n, axis = step.state, step.numbers, self.axis(step.views)
        gain, start = s["gain"], s["start_norm"]
        g, w = u.to(gain.dtype), step.p.to(gain.dtype)
        norms = torch.linalg.vector_norm(w, dim=axis, keepdim=True)
        norms = torch.where(norms <= LEAST, ZERO_ROWS, norms)
        gain.copy_(torch.where(start == 0, norms, gain))  # zero before the first update only
        start.copy_(torch.where(start == 0, norms, start))
        direction = w / gain
        norm = start + n["norm_share"] * (self.norm(step.name) - start)
        along = (g * direction).sum(axis, keepdim=True)  # gradient of the gain
        across = (gain / norm) * (g - direction * along)
        step.p.copy_(direction * norm)
        moved = adam_direction(
            along, s["gain_avg"], s["gain_avg_sq"], self.settings.beta1, self.settings.beta2,
            self.settings.eps, n["gain_correction1"], n["gain_correction2"]
        )
        gain.sub_(n["lr"] * moved)
        return across

    def after(self, step: Step) -> None:
        v, gain = step.p.to(step.state["gain"].dtype), step.state["gain"]
        norms = torch.linalg.vector_norm(v, dim=self.axis(step.views), keepdim=True).clamp_min(LEAST)
        step.p.copy_(gain * (v / norms))
