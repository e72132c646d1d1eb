"""Orthogonalisation of Muon: Newton-Schulz and the Polar Express.

Sources: Keller Jordan, kellerjordan.github.io/posts/muon; Amsel, Persson, Musco, Gower, arXiv 2505.16932.

Both iterate an odd polynomial of degree five that drives the singular values of X towards 1. Newton-Schulz
uses one polynomial, after which they lie in about [0.62, 1.13]; the Polar Express another one in each step.
"""

import torch

from kernels import symmetric

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # maximise the slope at zero; the origin of the residual spread

# Of the steps 1, 2, ...; the last one repeats. Minimax polynomials for singular values above a bound, with
# the safety factor of record 38, whose norm is enlarged by the same 2 %.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)
)

# The same polynomials with fewer digits and no safety factor, for up to 12 steps; the last one converges to 1
# (optimizer track, result 23).
POLAR_EXPRESS_LONG = (
    (8.2051, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853), (2.2779, -1.6198, 0.3985), (1.8726, -1.2307, 0.3585),
    (1.8564, -1.2132, 0.3568), (1.8750, -1.2500, 0.3750)
)

# Record 92 (ANVIL, @devenpzak): six maps that take [0.003, 1/1.05] to [0.995, 1.0004]. Beyond 1 they are not
# safe, which is why the norm is enlarged by 5 %.
ANVIL = (
    (3.923798038567, -6.095026865488, 3.905234618423),
    (3.278126713798, -3.328923386476, 0.989127286973),
    (3.505298394150, -5.137358782410, 1.968325560615),
    (2.815058591845, -3.685181239622, 1.417196497642),
    (2.245503932403, -2.443826979899, 0.963091710461),
    (2.256537145403, -2.166840097229, 0.929501253245)
)

# Results of the optimizer track: 12 steps drive every singular value above about 1e-3 to 1.
CONVERGENT = (2.0, -1.5, 0.5)


def schatten4(x: torch.Tensor) -> torch.Tensor:
    """The Schatten 4-norm of each matrix (..., rows, cols), (sum of sigma^4)^(1/4), as (..., 1, 1)."""
    x = x.mT if x.size(-2) > x.size(-1) else x
    return torch.linalg.vector_norm(x @ x.mT, dim=(-2, -1), keepdim=True).sqrt()


def newton_schulz(
    g: torch.Tensor, *, steps: int = 5, dtype: torch.dtype = torch.bfloat16,
    norm_dtype: torch.dtype = torch.bfloat16, form: str = "factored", polar_express: bool = False,
    fused: bool = False, anvil: bool = False, convergent: bool = False, by_schatten4: bool = False,
    long: bool = False, weights: tuple[float, ...] = (),
    coefficients: tuple[tuple[float, float, float], ...] = ()
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Orthogonalise each matrix of a batch.

    Args:
        g: (..., rows, cols). Returns the same shape in `dtype`.
        norm_dtype: of the Frobenius norm, taken per matrix (records 3 and 4: of the float32 tensor; later:
            after the cast).
        form: evaluation of the polynomial, A = X X^T; equal in exact arithmetic. expanded: aX + b(AX) +
            (cA)(AX). factored: aX + (bA + (cA)A)X. symmetric: the same, where bA + cAA is rounded once, and
            so is its product with X plus aX.
        polar_express: its coefficients and its norm, 1.02 |g| + 1e-6, in place of |g| + 1e-7.
        fused: the symmetric form by the kernels of kernels.symmetric.
        anvil: the maps of record 92 and their norm, 1.05 |g| + 1e-6, in place of both.
        convergent: the coefficients of the optimizer track.
        long: the coefficients POLAR_EXPRESS_LONG, with the norm |g| + 1e-7.
        by_schatten4: |g| is the Schatten 4-norm, at least 1e-7, in place of the Frobenius norm.
        weights: of X_0, X_1, ..., the iterates before each step; then the result is (orthogonalised, sum of
            the weighted iterates).
        coefficients: (a, b, c) of each step, the last ones repeat; (): the usual ones.
    """
    usual = ANVIL if anvil else POLAR_EXPRESS if polar_express else (COEFFICIENTS,)
    coefficients = coefficients or usual
    coefficients = (CONVERGENT,) if convergent else POLAR_EXPRESS_LONG if long else coefficients
    margin, least = (1.05, 1e-6) if anvil else (1.02, 1e-6) if polar_express else (1.0, 1e-7)
    x = g.to(norm_dtype)
    if by_schatten4:
        x = x / (schatten4(x).clamp_min(least) * margin)
    else:
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        x = x / (norm * margin + least if margin != 1 else norm + least)
    x = x.to(dtype)
    tall = x.size(-2) > x.size(-1) and not fused
    if tall:  # A = X X^T on the shorter side
        x = x.mT
    step = symmetric.step if fused else STEPS[form]
    total = torch.zeros_like(x) if weights else None
    for i in range(steps):
        if i < len(weights):
            total = total + weights[i] * x
        x = step(x, *coefficients[min(i, len(coefficients) - 1)])
    if weights:
        return (x.mT, total.mT) if tall else (x, total)
    return x.mT if tall else x


def expanded(x: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    """x (..., rows, cols), rows <= cols -> aX + b(AX) + (cA)(AX), A = X X^T."""
    gram = x @ x.mT
    gx = gram @ x
    return a * x + b * gx + (c * gram) @ gx


def factored(x: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    """x (..., rows, cols), rows <= cols -> aX + (bA + (cA)A)X, A = X X^T."""
    gram = x @ x.mT
    return a * x + (b * gram + (c * gram) @ gram) @ x


STEPS = {"expanded": expanded, "factored": factored, "symmetric": symmetric.step_reference}
