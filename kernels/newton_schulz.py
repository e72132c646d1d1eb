"""Newton-Schulz orthogonalisation of Muon (Keller Jordan, kellerjordan.github.io/posts/muon).

A quintic iteration that drives the singular values of X towards 1 (they end in about [0.62, 1.13], not at 1).
"""

import torch

from kernels import symmetric

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # maximise the slope at zero; the origin of the residual spread


def newton_schulz(
    g, *, steps=5, dtype=torch.bfloat16, norm_dtype=torch.bfloat16, form="factored", fused=False
):
    """Orthogonalise each matrix of a batch.

    g: (..., rows, cols). Returns the same shape in `dtype`. The Frobenius norm is taken per matrix in
    norm_dtype (records 3 and 4: of the float32 tensor; later: after the cast). form: `expanded` aX + b(AX) +
    cA(AX) or `factored` aX + (bA + cAA)X, equal in exact arithmetic, A = X X^T. fused: the factored form by
    kernels.symmetric.
    """
    a, b, c = COEFFICIENTS
    x = g.to(norm_dtype)
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.to(dtype)
    if fused:
        for _ in range(steps):
            x = symmetric.step(x, a, b, c)
        return x
    tall = x.size(-2) > x.size(-1)
    if tall:  # A = X X^T on the shorter side
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        if form == "expanded":
            gx = gram @ x
            x = a * x + b * gx + c * (gram @ gx)
        else:
            x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
