"""Spectral annealing: while the learning rate falls, directions of high curvature are cooled first.

Claimed with 2540 steps by jn2clark; read in the source of that trainer.
"""

import math
from dataclasses import dataclass

import torch

from schedule import StepPlan
from updates.norms import covariance_step, frobenius
from updates.slots import Slot, Step, kept_dtype
from updates.views import Views

SIDES = ("left", "right")


@dataclass(frozen=True)
class KeepBases(Slot):
    """Keeps the bases with which SOAP whitens in this update, and which it refreshes before Annealing."""
    only: tuple = ()

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        if step.numbers["annealing"] < 1:
            step.scratch["bases"] = [step.state[f"soap_{side}_basis"].clone() for side in SIDES]
        return u


@dataclass(frozen=True)
class Annealing(Slot):
    """Scale the update u in SOAP's bases Q, R by powers of the learning-rate factor r < 1.

        L <- beta L + (1-beta) g g^T;  C <- beta C + (1-beta) g^T g, both started as the first g g^T, g^T g
        v_ij = log max((Q^T L Q)_ii, 1e-30) + log max((R^T C R)_jj, 1e-30)
        s = clip((v - mean v) / max(std v, 1e-6), -clip, clip)
        u <- Q ((Q^T u R) r^(strength s)) R^T at the norm of u, with r = max(learning-rate factor, least)

    Nothing happens while r = 1, nor in the first update, when SOAP has no bases. std is that of a sample, as
    torch takes it.
    """
    strength: float
    least: float
    clip: float
    beta: float
    only: tuple = ()

    eager = True
    products = True

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        kept = kept_dtype(dtype)
        return self.of_each(unit, views, lambda rows, cols: {
            f"annealing_{side}_covariance": ((n, n), kept) for side, n in zip(SIDES, (rows, cols))
        })

    def numbers(self, plan: StepPlan, t: int) -> dict:
        return {"annealing": 1.0 if t == 1 else min(max(plan.lr_factor, self.least), 1.0)}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        r = step.numbers["annealing"]
        if r >= 1:
            return u
        logs, bases = [], step.scratch["bases"]
        g = step.g.to(bases[0].dtype)
        for side, basis, gram in zip(SIDES, bases, (g @ g.mT, g.mT @ g)):
            covariance = covariance_step(step.state[f"annealing_{side}_covariance"], gram, self.beta)
            logs.append((basis * (covariance @ basis)).sum(-2).clamp_min(1e-30).log())  # (N, n)
        v = logs[0][:, :, None] + logs[1][:, None, :]  # (N, rows, cols)
        mean, std = v.mean((-2, -1), keepdim=True), v.std((-2, -1), keepdim=True)
        s = ((v - mean) / std.clamp_min(1e-6)).clamp(-self.clip, self.clip)
        left, right = bases
        wide = u.to(left.dtype)
        cooled = left @ ((left.mT @ wide @ right) * (self.strength * math.log(r) * s).exp()) @ right.mT
        return (cooled * (frobenius(wide) / frobenius(cooled, 1e-30))).to(u.dtype)
