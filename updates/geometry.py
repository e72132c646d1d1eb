"""Slots that hold the norm of a matrix or of its step: hyperball, floors, radial brake and radius pin."""

from dataclasses import dataclass

import torch

from updates.slots import Slot


def frobenius(x: torch.Tensor, least: float = 0.0) -> torch.Tensor:
    """The Frobenius norm, at least `least`, of each matrix (N, rows, cols), as (N, 1, 1)."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(least)


@dataclass(frozen=True)
class Hyperball(Slot):
    """Keep the Frobenius norm R of each matrix (track 3, result 5).

    W' = W - lr R u / |u|, then W = R W' / |W'|; both norms at least 1e-10. It replaces weight decay.
    """

    def __call__(self, u, step):
        step.scratch["radius"] = frobenius(step.p)
        return u * (step.scratch["radius"] / frobenius(u, 1e-10)).to(u.dtype)

    def after(self, step) -> None:
        step.p.mul_(step.scratch["radius"] / frobenius(step.p, 1e-10))
