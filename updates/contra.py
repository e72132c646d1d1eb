"""The orthogonalised update mixed with the momentum: Contra-Muon, Soft-Muon and the tempered polar factor
(track 3, results 11, 20 and 38)."""

from dataclasses import dataclass

import torch

from schedule import StepPlan
from updates.norms import NORMS, ramp, rescaled, wide
from updates.slots import Slot, Step


def spectral_norm(x: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Estimate of the largest singular value of each matrix (N, rows, cols), as (N, 1, 1).

    Power iterations from a vector of ones.
    """
    v = torch.nn.functional.normalize(torch.ones_like(x[:, :1]).mT, dim=-2, eps=1e-12)  # (N, cols, 1)
    for _ in range(iterations):
        left = torch.nn.functional.normalize(x @ v, dim=-2, eps=1e-12)
        v = torch.nn.functional.normalize(x.mT @ left, dim=-2, eps=1e-12)
    return torch.linalg.vector_norm(x @ v, dim=-2, keepdim=True)


def unit_norm(m: torch.Tensor, norm: str) -> torch.Tensor:
    """Matrices (N, rows, cols) at norm 1: the Schatten 4-norm (result 20), or else the spectral norm."""
    return m / (NORMS[norm](m) if norm == "schatten4" else spectral_norm(m)).clamp_min(1e-12)


@dataclass(frozen=True)
class Tempered(Slot):
    """Tempered polar factor (track 3, result 38): u + rho min(1, cap |u| / |d|) d at the norm of u.

    d = M / |M| - u, M what was orthogonalised, at the unit norm of Contra. rho rises linearly from 0 at
    `start` to `most` at `end`.
    """
    most: float
    cap: float
    start: int
    end: int
    norm: str

    products = True

    def numbers(self, plan: StepPlan, t: int) -> dict:
        return {"tempered": self.most * ramp(plan.step, self.start, self.end)}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        u, norm = wide(u), NORMS[self.norm]
        d = unit_norm(wide(step.scratch["direction"]), self.norm) - u
        d = d * (self.cap * norm(u) / norm(d).clamp_min(1e-10)).clamp_max(1)
        return rescaled(u + step.numbers["tempered"] * d, u, self.norm)


@dataclass(frozen=True)
class Contra(Slot):
    """u - strength M / |M|, rescaled to the norm of u, where M is what was orthogonalised.

    With the Schatten 4-norm, |M| and the rescaling are that norm (result 20). Otherwise |M| is the spectral
    norm, and the rescaling is by the Frobenius norm (result 11). The strength falls to 0 over `steps`.
    """
    strength: float
    steps: int | None
    norm: str

    products = True

    def numbers(self, plan: StepPlan, t: int) -> dict:
        return {"contra": self.strength * (1 - ramp(plan.step, 0, self.steps) if self.steps else 1)}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        m, u = unit_norm(wide(step.scratch["direction"]), self.norm), wide(u)
        return rescaled(u - step.numbers["contra"] * m, u, self.norm)


@dataclass(frozen=True)
class SoftBlend(Slot):
    """Soft-Muon (track 3, result 20): turn towards a softer power of the momentum near the end of a run.

    (1-b) u + b S, rescaled to the norm of u. S is a weighted sum of the iterates of Newton-Schulz, about the
    momentum with its singular values to the power 0.1, at the norm of u. b rises linearly from 0 at `start`
    to 1 at `end`, and is at most `most`.
    """
    most: float
    start: int
    end: int
    norm: str

    products = True

    def numbers(self, plan: StepPlan, t: int) -> dict:
        return {"soft": min(self.most, ramp(plan.step, self.start, self.end))}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        u, soft = wide(u), wide(step.scratch["soft"])
        return rescaled(u.lerp(rescaled(soft, u, self.norm), step.numbers["soft"]), u, self.norm)
