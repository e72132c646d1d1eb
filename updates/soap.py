"""SOAP-Muon: Adam's second moment in slowly moving eigenbases, in front of the orthogonalisation.

Track 3, results 14 (MLPs), 16 (trust gate), 20 (values) and 44 (all matrices); after SOAP (Vyas et al., arXiv
2409.11321).
"""

from dataclasses import dataclass

import torch

from schedule import StepPlan
from settings import Settings
from settings.muon import SoapTrust
from updates.norms import eigenvectors, frobenius, inner, ramp, rescaled
from updates.slots import Slot, Step, kept_dtype
from updates.views import Views

ATTENTION = ("q", "k", "qk", "v", "o")  # qk: pairs of heads


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of the angle between the matrices of each pair (N, rows, cols), as (N, 1, 1)."""
    return inner(a, b) / (frobenius(a) * frobenius(b)).clamp_min(1e-30)


@dataclass(frozen=True)
class Soap(Slot):
    """Whiten the momentum M in the eigenbases Q, R of the gradients' covariances.

    P = Q^T M R, v <- beta v + (1-beta) P^2 (of the momentum), M' = Q (P / D) R^T at the norm of M, with D =
    sqrt(max(v, eps^2)), or sqrt(v) + eps (result 14). Afterwards the covariances take in the gradient, L <-
    lerp(L, G G^T, 1 - statistics_beta). The first update finds the bases and leaves M as it is; every
    `every`-th update after it sorts the columns by their share of L, v with them, and takes Q <- qr(L Q).
    floor: D is at least this times the root mean square of D, in q, k, v and o.
    v_share: of the whitened v, not rescaled, in a mixture with its momentum (result 20).
    trust: gate of o (`trusted`).
    """
    beta: float
    statistics_beta: float
    every: int
    eps: float
    adds_eps: bool
    floor: float
    v_share: float
    trust: SoapTrust | None
    norm: str
    only: tuple

    eager = True
    products = True

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        kept = kept_dtype(dtype)
        return self.of_each(unit, views, lambda rows, cols: {
            "soap_left_covariance": ((rows, rows), kept), "soap_right_covariance": ((cols, cols), kept),
            "soap_left_basis": ((rows, rows), kept), "soap_right_basis": ((cols, cols), kept),
            "soap_moment": ((rows, cols), kept)
        })

    def numbers(self, plan: StepPlan, t: int) -> dict:
        found = {"soap_updates": t - 1}
        if self.trust is not None:
            free = ramp(plan.step, self.trust.release_start, self.trust.release_end)
            found["least_trust"] = self.trust.least * (1 - free)
            found["most_trust"] = self.trust.most if plan.step < self.trust.release_end else 1.0
            if self.trust.until is not None and plan.step >= self.trust.until:
                found["least_trust"] = found["most_trust"] = 1.0
        return found

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        done = step.numbers["soap_updates"]
        g, m = (x.to(step.state["soap_moment"].dtype) for x in (step.g, u))
        out = m if done == 0 else self.whitened(m, g, step)
        for side, gram in (("left", g @ g.mT), ("right", g.mT @ g)):
            covariance, basis = step.state[f"soap_{side}_covariance"], step.state[f"soap_{side}_basis"]
            covariance.lerp_(gram, 1 - self.statistics_beta)
            if done == 0:
                basis.copy_(eigenvectors(covariance).flip(-1))  # falling eigenvalues
            elif done % self.every == 0:
                self.refresh(covariance, basis, step.state["soap_moment"], side)
        return out

    def whitened(self, m: torch.Tensor, g: torch.Tensor, step: Step) -> torch.Tensor:
        """M' (N, rows, cols); updates v."""
        left, right = step.state["soap_left_basis"], step.state["soap_right_basis"]
        rotated, v = left.mT @ m @ right, step.state["soap_moment"]
        v.lerp_(rotated.square(), 1 - self.beta)
        d = v.sqrt() + self.eps if self.adds_eps else v.clamp_min(self.eps ** 2).sqrt()
        if self.floor and step.name in ATTENTION:
            rms = d.square().mean((-2, -1), keepdim=True).sqrt()
            d = d.maximum(self.floor * rms.clamp_min(1e-8))
        white = left @ (rotated / d) @ right.mT
        if step.name == "v" and self.v_share < 1:
            white = self.v_share * white + (1 - self.v_share) * m
        white = rescaled(white, m, self.norm)
        return self.trusted(white, m, g, step) if self.trust and step.name == "o" else white

    def trusted(self, white: torch.Tensor, m: torch.Tensor, g: torch.Tensor, step: Step) -> torch.Tensor:
        """M + gate (M' - M) at the norm of M (result 16).

        gate = clip((cos(M', M) - agree) / (1 - agree), 0, 1) clip(cos(M', G) / cos(M, G), 0, 1), within two
        bounds that change during the run.
        """
        agree = ((cosine(white, m) - self.trust.agree) / (1 - self.trust.agree)).clamp(0, 1)
        align = (cosine(white, g) / cosine(m, g).clamp_min(1e-8)).clamp(0, 1)
        gate = (agree * align).clamp(step.numbers["least_trust"], step.numbers["most_trust"])
        return rescaled(m + gate * (white - m), m, self.norm)

    def refresh(self, covariance: torch.Tensor, basis: torch.Tensor, moment: torch.Tensor, side: str) -> None:
        """One subspace iteration, with the columns sorted first. side: left (rows) or right (columns)."""
        shares = (basis * (covariance @ basis)).sum(-2)  # (N, n)
        order = shares.argsort(-1, descending=True)
        columns = order[:, None, :]
        sorted_ = basis.gather(-1, columns.expand_as(basis))
        by = order[:, :, None] if side == "left" else columns
        moment.copy_(moment.gather(-2 if side == "left" else -1, by.expand_as(moment)))
        basis.copy_(torch.linalg.qr(covariance @ sorted_).Q)


def slot(s: Settings) -> Soap:
    """The slot that the settings ask for."""
    soap, muon = s.optim.muon.soap, s.optim.muon
    return Soap(
        soap.beta, soap.statistics_beta, soap.every, soap.eps, soap.eps_form == "added", soap.attn_floor,
        soap.v_share, soap.trust, muon.norm, soap.matrices
    )
