"""Norms, covariances and eigenvectors of batches of matrices (N, rows, cols), and ramps over steps."""

import torch

from kernels.newton_schulz import schatten4


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def frobenius(x: torch.Tensor, least: float = 0.0) -> torch.Tensor:
    """The Frobenius norm, at least `least`, of each matrix (N, rows, cols), as (N, 1, 1)."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(least)


NORMS = {"frobenius": frobenius, "schatten4": schatten4}  # by optim.muon.norm


def rescaled(x: torch.Tensor, like: torch.Tensor, kind: str) -> torch.Tensor:
    """x (N, rows, cols) with the norm of `like`, matrix by matrix; a zero matrix stays. kind: of NORMS."""
    norm = NORMS[kind]
    return x * (norm(like) / norm(x).clamp_min(1e-12))


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner product of each pair of matrices (N, rows, cols), as (N, 1, 1)."""
    return (a * b).sum((-2, -1), keepdim=True)


def covariance_step(covariance: torch.Tensor, gram: torch.Tensor, beta: float) -> torch.Tensor:
    """C <- beta C + (1-beta) gram in place, (N, n, n); a covariance of zeros begins as the gram itself."""
    begun = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] > 0
    return covariance.lerp_(gram, torch.where(begun, 1 - beta, 1.0).to(gram.dtype))


def eigenvectors(x: torch.Tensor, eps: float = 1e-30) -> torch.Tensor:
    """Eigenvectors of symmetric matrices x + eps I (N, n, n), as columns by rising eigenvalues.

    eps: as in the originals, whose float32 matrices may be zero.
    """
    return torch.linalg.eigh(x + eps * torch.eye(x.size(-1), dtype=x.dtype, device=x.device))[1]


def ramp(step: int, start: int, end: int) -> float:
    """Share of the way from `start` to `end` that a step has gone, 0 to 1."""
    return min(max((step - start) / max(end - start, 1), 0.0), 1.0)


def ramped(first: float, last: float, step: int, start: int, end: int) -> float:
    """A number that goes linearly from `first` at `start` to `last` at `end`."""
    share = ramp(step, start, end)
    return (1 - share) * first + share * last
