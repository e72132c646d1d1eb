"""SinkSOAP: the momentum in eigenbases of the gradients' covariances, balanced by Sinkhorn's iteration."""

import math
from dataclasses import dataclass

import torch

from updates.norms import eigenvectors, frobenius
from updates.slots import Slot, Step, kept_dtype
from updates.views import Views


@dataclass(frozen=True)
class SinkSoap(Slot):
    """SinkSOAP (track 3, result 26), in place of the orthogonalisation.

    L <- beta L + (1-beta) G G^T and R <- beta R + (1-beta) G^T G, before use; U, V are the eigenvectors of L
    + eps I and R + eps I, of every step. A = U^T M V is scaled by rows and columns until all rows of its
    squares have the same sum, and all columns: on B = A^2 + eps, from c = 1, `rounds` times r = (1/m) / (B c
    + eps), c = (1/n) / (B^T r + eps). The result is U diag(sqrt r) A diag(sqrt c) V^T at the Frobenius norm
    sqrt(min(m, n)).
    """
    beta: float
    rounds: int
    eps: float

    eager = True
    products = True

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        kept = kept_dtype(dtype)
        return self.of_each(unit, views, lambda rows, cols: {
            "sink_left_covariance": ((rows, rows), kept), "sink_right_covariance": ((cols, cols), kept)
        })

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        left, right = step.state["sink_left_covariance"], step.state["sink_right_covariance"]
        g, m = step.g.to(left.dtype), u.to(left.dtype)
        left.lerp_(g @ g.mT, 1 - self.beta)
        right.lerp_(g.mT @ g, 1 - self.beta)
        by_rows, by_cols = eigenvectors(left, self.eps), eigenvectors(right, self.eps)
        a = by_rows.mT @ m @ by_cols
        r, c = self.balance(a.square() + self.eps)
        x = by_rows @ (r.sqrt() * a * c.mT.sqrt()) @ by_cols.mT
        return x * (math.sqrt(min(x.shape[-2:])) / frobenius(x, 1e-12))

    def balance(self, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (N, rows, 1) of the rows and (N, cols, 1) of the columns of b (N, rows, cols)."""
        c = torch.ones_like(b[:, :1]).mT
        for _ in range(self.rounds):
            r = 1 / b.size(-2) / (b @ c + self.eps)
            c = 1 / b.size(-1) / (b.mT @ r + self.eps)
        return r, c
