"""Linear layer in 8-bit floats, as in the head of record 19 (@YouJiacheng, @KoszarskyB).

    forward    z = bf16(e4m3(x sx) e4m3(w sw)^T / (sx sw))
    backward   g' = e5m2(g sg),  dx = bf16(g' e4m3(w sw) / (sg sw)),  dw = g'^T e4m3(x sx) / (sx sg)

The reference quantises and then multiplies in float32, on any device. On a GPU with FP8 units (compute
capability 8.9 or higher) torch._scaled_mm multiplies the 8-bit operands; on another GPU the quantised values
are kept and multiplied in bfloat16, which represents all of them exactly. Values beyond the range are
clamped, because the result of casting them depends on torch's version and the device.
"""

import torch

from kernels.device import FP8_SINCE, capability, missing, operator
from kernels.transpose import transpose_copy

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def quantise(x: torch.Tensor, scale: float | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x * scale, clamped and cast to an 8-bit dtype, in which it stays unless `kept_in_bfloat16`."""
    x = (x.float() * scale).clamp(-LARGEST[dtype], LARGEST[dtype])
    if not kept_in_bfloat16(x):
        return x.to(dtype)
    return operator(round8, round8_op, x)(x, dtype)


def has_fp8_units(x: torch.Tensor) -> bool:
    """Whether x is on a GPU whose tensor cores multiply FP8 (compute capability 8.9 or higher)."""
    return x.is_cuda and capability(x.device) >= FP8_SINCE


def kept_in_bfloat16(x: torch.Tensor) -> bool:
    """Whether x is on a GPU without FP8 units.

    There Triton, and so the compiler of torch 2.11, cannot even cast to e4m3.
    """
    return x.is_cuda and not has_fp8_units(x)


def round8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x rounded to what an 8-bit dtype can hold, in bfloat16."""
    return x.to(dtype).to(torch.bfloat16)


round8_op = torch.library.custom_op(
    "speedrun::round8", round8, mutates_args=(), schema="(Tensor x, ScalarType dtype) -> Tensor"
)


@round8_op.register_fake
def round8_shape(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Shape and dtype of `round8`, for torch.compile."""
    return torch.empty_like(x, dtype=torch.bfloat16)


def row_major(x: torch.Tensor, transpose: str) -> torch.Tensor:
    """x (M, N) itself if it is contiguous, otherwise a copy by torch or by the Triton kernel (`in_tiles`)."""
    if x.is_contiguous():
        return x
    return transpose_copy(x.t()) if in_tiles(transpose, x.device) else x.contiguous()


def in_tiles(transpose: str, device: torch.device) -> bool:
    """Whether the Triton kernel makes transposed copies on this device.

    transpose: torch, triton, or auto (triton on a GPU that has it). Inductor would fuse the copy of 8-bit
    numbers into their quantisation and store single bytes, each in another row: 2.5 GB for the gradient of
    the head in record 33.
    """
    return transpose == "triton" or (
        transpose == "auto" and device.type == "cuda" and missing(device) is None
    )


def product(
    a: torch.Tensor, b: torch.Tensor, unscale: float | torch.Tensor, dtype: torch.dtype, fast: bool,
    transpose: str = "torch"
) -> torch.Tensor:
    """(a @ b) * unscale for 8-bit a (M, K) and b (K, N), in dtype; e4m3 is rounded once, and clamped.

    unscale: a number, or float32 (G,): one for each of G equal parts of a's rows. fast: the GPU may
    accumulate less exactly. transpose: how a GPU gets the layout that it wants (row_major).
    """
    many = isinstance(unscale, torch.Tensor)
    if not has_fp8_units(a):
        y = widened(a, b)
        y = (
            (y.unflatten(0, (len(unscale), -1)) * unscale[:, None, None]).flatten(0, 1) if many
            else y * unscale
        )
        return quantise(y, 1.0, dtype) if dtype in LARGEST else y.to(dtype)
    a, b = row_major(a, transpose), row_major(b.t(), transpose).t()  # it wants a row-major and b column-major
    # A number is made on the device: copied from the host it would wait. Scales are (1,), not 0-d, which
    # Inductor's lowering of _scaled_mm refuses where they are elements of a tensor.
    scales = unscale.split(1) if many else [torch.full((1,), unscale, dtype=torch.float32, device=a.device)]
    parts = [
        torch._scaled_mm(
            part, b, scale_a=scale, scale_b=torch.ones_like(scale), out_dtype=dtype, use_fast_accum=fast
        )
        for part, scale in zip(a.chunk(len(scales)), scales)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def widened(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32, for operands of 8-bit values."""
    if not kept_in_bfloat16(a):
        return a.float() @ b.float()
    return torch.mm(a.to(torch.bfloat16), b.to(torch.bfloat16), out_dtype=torch.float32)


class FP8Linear(torch.autograd.Function):
    """x (N, in), w (out, in) -> (N, out) in x's dtype, or rounded to e4m3 in float32; the factors get no
    gradient."""

    @staticmethod
    def forward(ctx, x, w, sx, sw, sg, transpose, gradient8, rounds_result):
        x8, w8 = quantise(x, sx, torch.float8_e4m3fn), quantise(w, sw, torch.float8_e4m3fn)
        measured = isinstance(sw, torch.Tensor)
        ctx.save_for_backward(x8, w8, *([sw] if measured else []))
        ctx.scales, ctx.dtypes = (sx, sw, sg), (x.dtype, w.dtype)
        ctx.transpose, ctx.gradient8 = transpose, gradient8
        if measured:
            ctx.scales = sx, None, sg
        dtype = torch.float8_e4m3fn if rounds_result else x.dtype
        y = product(x8, w8.t(), 1 / (sx * sw), dtype, fast=True)
        return y.float() if rounds_result else y

    @staticmethod
    def backward(ctx, g):
        (x8, w8, *measured), (sx, sw, sg), (x_dtype, w_dtype) = ctx.saved_tensors, ctx.scales, ctx.dtypes
        sw = measured[0] if measured else sw
        g8 = quantise(g, sg, ctx.gradient8)
        dx = product(g8, w8, 1 / (sg * sw), x_dtype, fast=False, transpose=ctx.transpose)
        dw = product(
            g8.t(), x8, 1 / (sx * sg), torch.float32, fast=False, transpose=ctx.transpose
        ).to(w_dtype)
        return dx, dw, *[None] * 6


def fp8_linear(
    x: torch.Tensor, w: torch.Tensor, sx: float, sw: float | torch.Tensor, sg: float,
    transpose: str = "torch", gradient8: torch.dtype = torch.float8_e5m2, rounds_result: bool = False
) -> torch.Tensor:
    """x (..., in), w (out, in) -> x W^T (..., out) in x's dtype, with FP8 products.

    sx, sw, sg: factors of x, w and the gradient before the cast; sw may be a tensor (1,), float32.
    gradient8: 8-bit format of the gradient; attention's has e4m3 (record 90).
    rounds_result: x W^T is rounded from the product's sum to e4m3, and stands in float32, so that its
        gradient is rounded only by its own cast (the logits of record 92).
    """
    y = FP8Linear.apply(x.flatten(0, -2), w, sx, sw, sg, transpose, gradient8, rounds_result)
    return y.unflatten(0, x.shape[:-1])
