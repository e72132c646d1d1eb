"""Slots of the recipe without SOAP (claim of 2726 steps): rows of equal size, a decay that fades."""

from dataclasses import dataclass

import torch

from schedule import StepPlan
from updates.slots import Slot, Step, kept_dtype
from updates.soap import ATTENTION
from updates.views import Views


def attends(step: Step) -> bool:
    """Whether the matrices are of attention, whose parameter has pieces, or a name of its own for each."""
    return bool(step.views.pieces) or step.name in ATTENTION


@dataclass(frozen=True)
class RowNorm(Slot):
    """Divide each row of the momentum by its root mean square, a moving average with bias correction.

        v <- beta v + (1-beta) mean(u^2 over a row);  u <- u / (sqrt(v / (1 - beta^t)) + eps)

    beta = attn or mlp, plus rise times the share of the run that is over. A factor that all rows of a matrix
    share, as the correction is, is lost in the orthogonalisation. Source: PrimeIntellect-ai,
    frontier-automated-speedrun, records/2026-07-20_fable-5.
    """
    attn: float
    mlp: float
    rise: float
    eps: float
    steps: int

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        kept = kept_dtype(dtype)
        return self.of_each(unit, views, lambda rows, cols: {"row_square": ((rows, 1), kept)})

    def numbers(self, plan: StepPlan, t: int) -> dict:
        share = plan.step / self.steps
        betas = {"attn_beta": self.attn + self.rise * share, "mlp_beta": self.mlp + self.rise * share}
        return betas | {f"{name}_correction": 1 - beta ** t for name, beta in betas.items()}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        name = "attn_beta" if attends(step) else "mlp_beta"
        v = step.state["row_square"]
        v.lerp_(u.to(v.dtype).square().mean(-1, keepdim=True), 1 - step.numbers[name])
        return u / ((v / step.numbers[f"{name}_correction"]).sqrt() + self.eps).to(u.dtype)


@dataclass(frozen=True)
class FadingDecay(Slot):
    """Decoupled weight decay that fades: adds a (1 - p)^power W to the update, p the share of the run that is
    over.

    a = attn for attention; for an MLP the entry of `mlp` at the depth of its layer (views.Views.depth).
    """
    attn: float
    attn_power: float
    mlp: tuple[float, ...]
    mlp_power: float
    steps: int

    def numbers(self, plan: StepPlan, t: int) -> dict:
        left = 1 - plan.step / self.steps
        return {"attn_left": left ** self.attn_power, "mlp_left": left ** self.mlp_power}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        if attends(step):
            decay = self.attn * step.numbers["attn_left"]
        else:
            decay = self.mlp[int(step.views.depth * len(self.mlp))] * step.numbers["mlp_left"]
        return u + decay * step.p.to(u.dtype)
