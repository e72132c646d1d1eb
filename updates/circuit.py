"""Circuit-Muon: the updates of v and o of one head, which act as a product, are balanced."""

from dataclasses import dataclass

import torch

from updates.slots import Slot, Step


def squares(x: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of each head (N, H, K, D), as (N, H, 1, 1)."""
    return x.square().sum((-2, -1), keepdim=True)


@dataclass(frozen=True)
class Circuit(Slot):
    """Balance the updates of v and o head by head (track 3, result 41).

    V, O: a head's rows of v and columns of o, K of them, with updates a, b. s_V = (|V|^2 / K + eps)^-1/2, s_O
    alike: a <- s_O a, b <- s_V b; then each of the updates of v and o gets its old Frobenius norm back. Last,
    what only moves length from one of the two to the other is taken out: x = (<V, a> - <O, b>) / (|V|^2 +
    |O|^2 + 2 K eps), a <- a - x V, b <- b + x O.
    """
    head_dim: int
    eps: float

    each_matrix = False

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        places = {name: start for name, start, _ in step.views.pieces}
        if "v" not in places:
            return u
        v, o = places["v"], places["o"]
        legs = [self.heads(x[:, v], x[:, o].mT) for x in (step.p.to(u.dtype), u)]
        (w_v, w_o), (d_v, d_o) = legs
        s_v, s_o = ((squares(w) / self.head_dim + self.eps).rsqrt() for w in (w_v, w_o))
        d_v, d_o = self.restored(s_o * d_v, d_v), self.restored(s_v * d_o, d_o)
        both = squares(w_v) + squares(w_o) + 2 * self.head_dim * self.eps
        x = ((w_v * d_v).sum((-2, -1), keepdim=True) - (w_o * d_o).sum((-2, -1), keepdim=True)) / both
        u = u.clone()
        u[:, v] = (d_v - x * w_v).flatten(1, 2)
        u[:, o] = (d_o + x * w_o).flatten(1, 2).mT
        return u

    def heads(self, *matrices: torch.Tensor) -> list[torch.Tensor]:
        """Matrices (N, H K, D) as (N, H, K, D)."""
        return [x.unflatten(1, (-1, self.head_dim)) for x in matrices]

    def restored(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """x (N, H, K, D) with the norm of `like`, over all heads."""
        norms = [torch.linalg.vector_norm(y, dim=(1, 2, 3), keepdim=True) for y in (like, x)]
        return x * (norms[0] / norms[1].clamp_min(1e-12))
