"""Slots that change the spectrum of the momentum in another way than Newton-Schulz: Muon^2, PMuon, DynMuon.

SinkSOAP and SOAP are in files of their own.
"""

import math
from dataclasses import dataclass

import torch

from schedule import StepPlan
from updates.norms import frobenius, wide
from updates.slots import Orthogonalise, Slot, Step, kept_dtype
from updates.views import Views


@dataclass(frozen=True)
class MuonSquared(Slot):
    """Muon^2 (track 3, result 7): a second moment for each entry, before the orthogonalisation.

    v <- beta2 v + (1-beta2) g^2, of the gradient as it came; u / (sqrt(v) + eps).
    """
    beta2: float
    eps: float

    each_matrix = False

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        return {"entry_moment": (unit, kept_dtype(dtype))}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        v = step.state["entry_moment"]
        v.lerp_(step.g.to(v.dtype).square(), 1 - self.beta2)
        return u / (v.sqrt() + self.eps)


def start_of_basis(like: torch.Tensor) -> torch.Tensor:
    """A random matrix (n, n) in which a subspace iteration starts, the same for every unit (N, n, n)."""
    n = like.size(-1)
    return torch.randn((n, n), generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(like)


@dataclass(frozen=True)
class PMuon(Slot):
    """PMuon (track 3, result 18): powers of the momentum's covariances on both of its sides.

    U (m x n) is the momentum. C <- beta C + U^T U, C' = U^T U + beta C + eps I with the new C; one subspace
    iteration Q <- qr(C' Q), l_j = max(q_j^T C' q_j, eps); P = Q diag(l^-power) Q^T sqrt(n) / (|l^-power| +
    eps). The same of U U^T gives P' (m x m); the result is P' U P. Q starts in a random basis.
    """
    beta: float
    power: float
    eps: float

    eager = True
    products = True

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        kept = kept_dtype(dtype)
        return self.of_each(unit, views, lambda rows, cols: {
            "pmuon_left_covariance": ((rows, rows), kept), "pmuon_right_covariance": ((cols, cols), kept),
            "pmuon_left_basis": ((rows, rows), kept), "pmuon_right_basis": ((cols, cols), kept)
        })

    def numbers(self, plan: StepPlan, t: int) -> dict:
        return {"pmuon_starts": t == 1}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        x = u.to(step.state["pmuon_left_basis"].dtype)
        return self.power_of(x @ x.mT, "left", step) @ x @ self.power_of(x.mT @ x, "right", step)

    def power_of(self, gram: torch.Tensor, side: str, step: Step) -> torch.Tensor:
        """P (N, n, n) of one side, from U^T U or U U^T. Updates the covariance and its basis in place."""
        covariance, basis = step.state[f"pmuon_{side}_covariance"], step.state[f"pmuon_{side}_basis"]
        if step.numbers["pmuon_starts"]:
            empty = basis.abs().amax((-2, -1), keepdim=True) == 0
            start = torch.where(empty, start_of_basis(basis), basis)
            basis.copy_(torch.linalg.qr(start).Q)
        covariance.mul_(self.beta).add_(gram)
        n = gram.size(-1)
        c = gram + self.beta * covariance + self.eps * torch.eye(n, dtype=gram.dtype, device=gram.device)
        basis.copy_(torch.linalg.qr(c @ basis).Q)
        values = (basis * (c @ basis)).sum(-2, keepdim=True).clamp_min(self.eps)  # (N, 1, n)
        powers = values ** -self.power
        size = torch.linalg.vector_norm(powers, dim=-1, keepdim=True) + self.eps
        return (basis * (powers * math.sqrt(n) / size)) @ basis.mT


@dataclass(frozen=True)
class DynMuon(Slot):
    """DynMuon (track 3, result 28): U S^p V^T with a power p that falls during the run.

    s = |U| + 1e-7, X = U / s, E = X X^T - I on the shorter side, d = p / 2: (I + d E + d (d-1) / 2 E^2) times
    the orthogonalised X times s^p. p = end + (start - end) / (1 + exp((x - center) / width)), x = step /
    steps. The result depends on the scale of the gradient, which `divisor` divides.
    """
    orthogonalise: Orthogonalise
    start: float
    end: float
    center: float
    width: float
    steps: int
    divisor: float

    products = True

    def numbers(self, plan: StepPlan, t: int) -> dict:
        z = (plan.step / self.steps - self.center) / self.width
        return {"power": self.end + (self.start - self.end) / (1 + math.exp(min(z, 700.0)))}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        p, u = step.numbers["power"], wide(u) / self.divisor
        size = frobenius(u) + 1e-7
        x = u / size
        o = wide(self.orthogonalise(x, step))
        step.scratch["direction"] = u
        tall = x.size(-2) > x.size(-1)
        x, o = (x.mT, o.mT) if tall else (x, o)
        e = x @ x.mT - torch.eye(x.size(-2), dtype=x.dtype, device=x.device)
        d = p / 2
        eo = e @ o
        o = (o + d * eo + d * (d - 1) / 2 * (e @ eo)) * size ** p
        return o.mT if tall else o
