"""Rounding to a narrower dtype that stays in its own, and the sigmoid of a soft cap that is rounded so."""

import torch

# dtype -> (bits of float32 that it lacks, exponent of its smallest normal number)
FORMATS = {torch.bfloat16: (16, -126), torch.float16: (13, -14)}


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x rounded to the nearest (even) number of `dtype`, bfloat16 or float16, in x's own dtype."""
    if x.dtype == torch.float32 and torch.compiler.is_compiling():
        return rounded_bits(x, dtype)
    return x.to(dtype).to(x.dtype)


def rounded_bits(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`rounded` of float32 numbers within the range of `dtype`, on their bits.

    torch.compile drops a cast to 16 bits and back between operations that it fuses.
    """
    lacks, smallest = FORMATS[dtype]
    bits = x.view(torch.int32)
    bits = bits + ((1 << (lacks - 1)) - 1) + (bits >> lacks & 1) & -(1 << lacks)
    if dtype == torch.bfloat16:  # with the exponents of float32
        return bits.view(torch.float32)
    unit = 2.0 ** (smallest - 23 + lacks)  # distance of the numbers below the smallest normal one
    return torch.where(x.abs() < 2.0**smallest, (x / unit).round() * unit, bits.view(torch.float32))


class RoundedSigmoid(torch.autograd.Function):
    """(x, dtype) -> the sigmoid of x rounded to dtype; its derivative is s (1 - s) of the rounded s."""

    @staticmethod
    def forward(ctx, x, dtype):
        s = rounded(torch.sigmoid(x), dtype)
        ctx.save_for_backward(s.to(dtype))
        return s

    @staticmethod
    def backward(ctx, g):
        s = ctx.saved_tensors[0].to(g.dtype)
        return s.addcmul(s, s, value=-1).mul_(g), None
