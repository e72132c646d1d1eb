"""Linear layer in 8-bit floats: operands are scaled, cast and multiplied (record 19's head, @YouJiacheng, @KoszarskyB).

forward   z = bf16(e4m3(x sx) e4m3(w sw)^T / (sx sw))
backward  g' = e5m2(g sg);  dx = bf16(g' e4m3(w sw) / (sg sw));  dw = g'^T e4m3(x sx) / (sx sg)

The reference quantises, and multiplies what it got in float32, on any device. On a GPU with FP8 units (compute capability
8.9 or higher) torch._scaled_mm multiplies the 8-bit operands themselves. Values beyond the range are clamped: what a cast
makes of them depends on torch's version and the device.
"""

import torch

from kernels.device import FP8_SINCE, capability

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def quantise(x, scale, dtype):
    """x * scale, clamped and cast to an 8-bit dtype."""
    return (x.float() * scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def has_fp8_units(x):
    return x.is_cuda and capability(x.device) >= FP8_SINCE


def product(a, b, unscale, dtype, fast):
    """(a @ b) * unscale for 8-bit a (M, K) and b (K, N), in dtype. fast: the GPU may accumulate less exactly."""
    if has_fp8_units(a):  # wants a row-major and b column-major
        one = torch.full((), unscale, dtype=torch.float32, device=a.device)  # made there: copied from here it would wait
        return torch._scaled_mm(a.contiguous(), b.t().contiguous().t(), scale_a=one, scale_b=torch.ones_like(one),
                                out_dtype=dtype, use_fast_accum=fast)
    return (a.float() @ b.float() * unscale).to(dtype)


class FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, sx, sw, sg):
        x8, w8 = quantise(x, sx, torch.float8_e4m3fn), quantise(w, sw, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, w8)
        ctx.scales, ctx.dtypes = (sx, sw, sg), (x.dtype, w.dtype)
        return product(x8, w8.t(), 1 / (sx * sw), x.dtype, fast=True)

    @staticmethod
    def backward(ctx, g):
        (x8, w8), (sx, sw, sg), (x_dtype, w_dtype) = ctx.saved_tensors, ctx.scales, ctx.dtypes
        g8 = quantise(g, sg, torch.float8_e5m2)
        dx = product(g8, w8, 1 / (sg * sw), x_dtype, fast=False)
        dw = product(g8.t(), x8, 1 / (sx * sg), torch.float32, fast=False).to(w_dtype)
        return dx, dw, None, None, None


def fp8_linear(x, w, sx, sw, sg):
    """x (..., in) times w (out, in) in FP8 with factors sx, sw and sg (of the gradient). Returns (..., out) in x's dtype."""
    return FP8Linear.apply(x.flatten(0, -2), w, sx, sw, sg).unflatten(0, x.shape[:-1])
