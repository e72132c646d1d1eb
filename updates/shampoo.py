"""Shampoo (Gupta et al., arXiv 1802.09568) with Adam grafting, as in distributed Shampoo (Shi et al., arXiv
2309.06497); track 3, results 21 and 35."""

from dataclasses import dataclass

import torch

from schedule import StepPlan
from updates.adam_direction import adam_direction
from updates.norms import frobenius
from updates.slots import Slot, Step, kept_dtype
from updates.views import Views


def inverse_fourth_root(statistics: torch.Tensor, eps: float, pseudo_inverse: bool) -> torch.Tensor:
    """A^(-1/4) of symmetric matrices (N, n, n).

    Without pseudo_inverse of A + eps I, shifted so that its least eigenvalue is at least eps; with it
    eigenvalues at or below 0 count as zeros, and eps is not used.
    """
    n = statistics.size(-1)
    if not pseudo_inverse:
        statistics = statistics + eps * torch.eye(n, dtype=statistics.dtype, device=statistics.device)
    values, vectors = torch.linalg.eigh(statistics)
    if pseudo_inverse:
        roots = torch.where(values <= 0, 0.0, values.clamp_min(0).pow(-0.25))
    else:
        least = values[..., :1]  # ascending
        roots = torch.where(least < eps, values - least + eps, values).pow(-0.25)
    return vectors * roots.unsqueeze(-2) @ vectors.mT


@dataclass(frozen=True)
class Shampoo(Slot):
    """L^(-1/4) M R^(-1/4) with the Frobenius norm of Adam's direction.

    L and R are moving averages of g g^T and g^T g, the gradient of the step included, M that of g; all three
    bias-corrected. The roots are computed in every `every`-th update; before the first time the update is
    Adam's direction.
    """
    beta1: float
    beta2: float
    eps: float
    graft_eps: float
    every: int
    pseudo_inverse: bool

    eager = True
    products = True

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        dtype, names = kept_dtype(dtype), ["statistics", "root"] if self.every > 1 else ["statistics"]
        sides = self.of_each(unit, views, lambda rows, cols: {
            f"{name}_{side}": ((n, n), dtype) for side, n in (("left", rows), ("right", cols))
            for name in names
        })
        return {name: (unit, dtype) for name in ("exp_avg", "exp_avg_sq")} | sides

    def numbers(self, plan: StepPlan, t: int) -> dict[str, float]:
        return {"update": t, "correction1": 1 - self.beta1**t, "correction2": 1 - self.beta2**t}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        s, n = step.state, step.numbers
        g = u.to(s["exp_avg"].dtype)
        for side, x in (("left", g @ g.mT), ("right", g.mT @ g)):
            s[f"statistics_{side}"].mul_(self.beta2).add_(x, alpha=1 - self.beta2)
        adam = adam_direction(
            g, s["exp_avg"], s["exp_avg_sq"], self.beta1, self.beta2, self.graft_eps, n["correction1"],
            n["correction2"]
        )
        if n["update"] < self.every:
            return adam
        left, right = (self.root(s, side, n) for side in ("left", "right"))
        u = left @ (s["exp_avg"] / n["correction1"]) @ right
        return u * (frobenius(adam) / (frobenius(u) + 1e-16))

    def root(self, s: dict[str, torch.Tensor], side: str, n: dict) -> torch.Tensor:
        """The inverse fourth root of one side, new or the last one."""
        if n["update"] % self.every:
            return s[f"root_{side}"]
        of = s[f"statistics_{side}"] / n["correction2"]
        found = inverse_fourth_root(of, self.eps, self.pseudo_inverse)
        return s[f"root_{side}"].copy_(found) if self.every > 1 else found
