"""PSGD with a Kronecker factored preconditioner (Li, arXiv 1512.04202 and 2402.04553; track 3, result 33)."""

import hashlib
from dataclasses import dataclass

import torch

from schedule import StepPlan
from updates.slots import Slot, Step, kept_dtype
from updates.views import Views

DAMPING = 2.0**-23  # of float32, whatever the precision of the run


def norm_bound(a: torch.Tensor) -> torch.Tensor:
    """About the spectral norm (N, 1, 1) of symmetric positive matrices (N, n, n), from below.

    One and a half power iterations from the largest column.
    """
    scale = a.abs().amax((-2, -1), keepdim=True)
    a = a / torch.where(scale == 0, 1.0, scale)
    largest = a.square().sum(-2).argmax(-1)
    x = a @ a[torch.arange(len(a), device=a.device), :, largest].unsqueeze(-1)
    x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    return scale * torch.linalg.vector_norm(a @ x, dim=-2, keepdim=True)


def key_of(x: torch.Tensor) -> int:
    """A number that depends on all values of a tensor."""
    digest = hashlib.sha256(x.detach().cpu().contiguous().view(torch.uint8).numpy()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class Psgd(Slot):
    """Q0^T Q0 M Q1^T Q1, M the bias-corrected momentum, Q0 and Q1 upper triangular.

    A = Q0 (M + eps |M| nu) Q1^T, B = Q0^(-T) V Q1^(-1), nu and V Gaussian; Q0 <- Q0 - rate / l triu(A A^T -
    B B^T) Q0, l about |A A^T + B B^T|, and Q1 with A^T A and B^T B.
    """
    beta1: float
    rate: float

    eager = True
    products = True

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        dtype = kept_dtype(dtype)
        own = self.of_each(unit, views, lambda rows, cols: {
            "factor_left": ((rows, rows), dtype), "factor_right": ((cols, cols), dtype),
            "noise_key": ((1,), torch.int64)
        })
        return {"exp_avg": (unit, dtype)} | own

    def numbers(self, plan: StepPlan, t: int) -> dict[str, float]:
        return {"update": t, "correction1": 1 - self.beta1**t}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        s = step.state
        g, left, right = u.to(s["exp_avg"].dtype), s["factor_left"], s["factor_right"]
        if step.numbers["update"] == 1:
            self.begin(g, step)
        m = s["exp_avg"].lerp_(g, 1 - self.beta1) / step.numbers["correction1"]
        v, nu = self.draw(m, step)
        balance = (right.abs().amax((-2, -1), keepdim=True) / left.abs().amax((-2, -1), keepdim=True)).sqrt()
        left.mul_(balance)
        right.div_(balance)
        a = left @ (m + DAMPING * m.abs() * nu) @ right.mT
        b = torch.linalg.solve_triangular(left.mT, v, upper=False)
        b = torch.linalg.solve_triangular(right, b, upper=True, left=False)
        # the products of both sides before either factor changes
        products = (left, a @ a.mT, b @ b.mT), (right, a.mT @ a, b.mT @ b)
        for factor, of_a, of_b in products:
            factor.sub_(self.rate / norm_bound(of_a + of_b) * torch.triu(of_a - of_b) @ factor)
        return left.mT @ left @ m @ right.mT @ right

    def begin(self, g: torch.Tensor, step: Step) -> None:
        """Both factors s I, s = (mean g^4)^(-1/32); the key of each matrix's random numbers."""
        scale = g.pow(4).mean((-2, -1), keepdim=True).clamp_min(1e-24).pow(-1 / 32)
        for name in ("factor_left", "factor_right"):
            factor = step.state[name]
            factor.copy_(scale * torch.eye(factor.size(-1), dtype=factor.dtype, device=factor.device))
        # Initial values are drawn by the seed and the parameter's name, so they stand for both.
        keys = torch.tensor([[key_of(matrix)] for matrix in step.p])
        step.state["noise_key"].copy_(keys)

    def draw(self, like: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Two Gaussian tensors V and nu like a batch of matrices.

        They depend on the matrix and the update alone, not on how many matrices a process has.
        """
        drawn, t = [], step.numbers["update"]
        for key in step.state["noise_key"].flatten().tolist():
            digest = hashlib.sha256(f"{key}/{t}".encode()).digest()
            generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            drawn.append(torch.randn(
                (2, *like.shape[1:]), generator=generator, dtype=like.dtype, device=like.device
            ))
        if not drawn:  # a process without a matrix
            return torch.zeros_like(like), torch.zeros_like(like)
        return tuple(torch.stack(drawn, dim=1))
