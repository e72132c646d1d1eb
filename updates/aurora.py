"""Aurora: an orthogonal factor whose rows all have the same norm (track 3, results 17 and 30)."""

from dataclasses import dataclass

import torch

from updates.norms import wide
from updates.slots import Orthogonalise, Slot, Step


@dataclass(frozen=True)
class Aurora(Slot):
    """Orthogonalise D M, and adapt the diagonal D until all rows of the result are equally long.

    For a tall M (m x n; a wide one is transposed): D = 1 / (norms of the rows of M); `iterations` times Q =
    orthogonalised D M, and between two of them D <- D ((n / m) / (squared norms of the rows of Q))^beta.
    A square matrix is orthogonalised as it is, and so is a tall one with `wide_only`.
    """
    orthogonalise: Orthogonalise
    iterations: int
    beta: float
    wide_only: bool

    products = True

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        rows, cols = u.shape[-2:]
        if rows == cols or (self.wide_only and rows > cols):
            return self.orthogonalise(u, step)
        m = wide(u.mT if cols > rows else u)
        share = m.size(-1) / m.size(-2)
        d = torch.linalg.vector_norm(m, dim=-1, keepdim=True).clamp_min(1e-7).reciprocal()
        for i in range(self.iterations):
            q = wide(self.orthogonalise(d * m, step))
            if i + 1 < self.iterations:
                d = d * (share / q.square().sum(-1, keepdim=True).clamp_min(1e-14)) ** self.beta
        step.scratch["direction"] = u
        return q.mT if cols > rows else q
