"""SOAP (Vyas et al., arXiv 2409.11321) and KL-SOAP (Lin et al., arXiv 2509.03378) as directions.

Adam in the eigenbases of the statistics of rows and columns; track 3, results 27, 19 and 25.
"""

from dataclasses import dataclass

import torch

from schedule import StepPlan
from updates.norms import eigenvectors
from updates.slots import Slot, Step, kept_dtype
from updates.views import Views


def eigenbasis(statistics: torch.Tensor) -> torch.Tensor:
    """Eigenvectors (N, n, n) of symmetric matrices as columns, those of the largest eigenvalue first."""
    return eigenvectors(symmetric(statistics)).flip(-1)


def refreshed(basis: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
    """One subspace iteration: the basis moves towards the eigenvectors of the statistics."""
    return torch.linalg.qr(statistics @ basis)[0]


def symmetric(x: torch.Tensor) -> torch.Tensor:
    """The symmetric part of each matrix."""
    return (x + x.mT) / 2


class Bases(Slot):
    """State of a preconditioner with one eigenbasis for the rows and one for the columns."""
    eager = True  # QR and eigh
    products = True

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        dtype = kept_dtype(dtype)
        sides = self.of_each(unit, views, lambda rows, cols: {
            f"{name}_{side}": ((n, n), dtype)
            for side, n in (("left", rows), ("right", cols)) for name in ("statistics", "basis")
        })
        return {name: (unit, dtype) for name in ("exp_avg", "exp_avg_sq")} | sides

    def numbers(self, plan: StepPlan, t: int) -> dict[str, float]:
        return {"update": t}


@dataclass(frozen=True)
class SoapH(Bases):
    """Q_L (P / (sqrt(V) + eps)) Q_R^T, P = Q_L^T M Q_R.

    M is the moving average of g with Muon's momentum, V that of (Q_L^T g Q_R)^2 with beta, L and R those of
    g g^T and g^T g. The bases start from the first gradient and take one subspace iteration after each use.
    """
    beta: float
    eps: float

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        s, beta = step.state, self.beta
        g = u.to(s["exp_avg"].dtype)
        outer = {"left": g @ g.mT, "right": g.mT @ g}
        if step.numbers["update"] == 1:
            for side, x in outer.items():
                s[f"basis_{side}"].copy_(eigenbasis(x))
        s["exp_avg"].lerp_(g, 1 - step.numbers["momentum"])
        for side, x in outer.items():
            s[f"statistics_{side}"].mul_(beta).add_(x, alpha=1 - beta)
        left, right = s["basis_left"].mT, s["basis_right"]
        projected = left @ g @ right
        s["exp_avg_sq"].mul_(beta).addcmul_(projected, projected, value=1 - beta)
        u = left.mT @ ((left @ s["exp_avg"] @ right) / (s["exp_avg_sq"].sqrt() + self.eps)) @ right.mT
        for side in outer:
            s[f"basis_{side}"].copy_(refreshed(s[f"basis_{side}"], s[f"statistics_{side}"]))
        return u


@dataclass(frozen=True)
class KlSoap(Bases):
    """Q_L (M / (sqrt(V) + eps)) Q_R^T, with M and V in the bases.

    M and V are moving averages of P = Q_L^T g Q_R (Muon's momentum) and P^2 (beta2). The statistics of the
    rows are those of g Q_R diag(e_R), divided by its columns, and the other way round; e are inverse roots
    of eigenvalues, whose moving average is that of the mean square of the whitened P.
    """
    beta2: float
    beta: float
    eps: float
    start: float
    largest: float

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        roots = self.of_each(unit, views, lambda rows, cols: {
            "root_left": ((rows, 1), kept_dtype(dtype)), "root_right": ((1, cols), kept_dtype(dtype))
        })
        return super().state(unit, dtype, views) | roots

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        s = step.state
        g = u.to(s["exp_avg"].dtype)
        if step.numbers["update"] == 1:  # no step
            self.begin(g, s)
            return torch.zeros_like(g)
        left, right = s["basis_left"].mT, s["basis_right"]
        projected = left @ g @ right
        momentum = step.numbers["momentum"]
        s["exp_avg"].mul_(momentum).add_(projected, alpha=1 - momentum)
        s["exp_avg_sq"].mul_(self.beta2).addcmul_(projected, projected, value=1 - self.beta2)
        u = left.mT @ (s["exp_avg"] / (s["exp_avg_sq"].sqrt() + self.eps)) @ right.mT
        self.observe(g, projected, s)
        average = left.mT @ s["exp_avg"] @ right.mT
        for side in ("left", "right"):
            s[f"basis_{side}"].copy_(refreshed(s[f"basis_{side}"], s[f"statistics_{side}"]))
        s["exp_avg"].copy_(s["basis_left"].mT @ average @ s["basis_right"])
        return u

    def begin(self, g: torch.Tensor, s: dict[str, torch.Tensor]) -> None:
        """Statistics and bases of the first gradient."""
        rows, cols = g.shape[-2:]
        for side, x in (("left", g @ g.mT / cols), ("right", g.mT @ g / rows)):
            s[f"statistics_{side}"].copy_(x)
            s[f"basis_{side}"].copy_(eigenbasis(x))
            s[f"root_{side}"].fill_(self.start**-0.5)

    def observe(self, g: torch.Tensor, projected: torch.Tensor, s: dict[str, torch.Tensor]) -> None:
        """Add a gradient to the statistics and to the eigenvalues, each side whitened by the other."""
        rows, cols = g.shape[-2:]
        root_left, root_right = s["root_left"].clone(), s["root_right"].clone()
        of_rows = (g @ s["basis_right"]) * root_right
        of_cols = root_left * (s["basis_left"].mT @ g)
        for side, x in (("left", of_rows @ of_rows.mT / cols), ("right", of_cols.mT @ of_cols / rows)):
            statistics = s[f"statistics_{side}"]
            statistics.copy_(symmetric(statistics.mul_(self.beta).add_(x, alpha=1 - self.beta)))
        means = {"left": (projected * root_right).square().mean(-1, keepdim=True),
                 "right": (projected * root_left).square().mean(-2, keepdim=True)}
        for side, mean in means.items():
            eigenvalue = self.beta * s[f"root_{side}"].square().reciprocal() + (1 - self.beta) * mean
            s[f"root_{side}"].copy_(eigenvalue.clamp_min(1e-30).rsqrt().clamp_max(self.largest))
