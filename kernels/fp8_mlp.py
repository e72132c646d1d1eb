"""MLP with relu^2 whose products are in e4m3 in the forward pass (records 84, @sisovicm, and 89).

    a(v) = max(largest |v|, 1e-12) / 448
    pre = a(x) a(U) e4m3(x / a(x)) e4m3(U / a(U))^T,  P = relu(pre)^2, each rounded to x's dtype
    y = P D^T, or with delayed scales p and d:  y = p d e4m3(P / p) e4m3(D / d)^T
    backward, with x, U, D and P before the cast:  dpre = 2 (g D) sqrt(P),  dx = dpre U,  dU = dpre^T x,
                                                   dD = g^T P

Rows come in equal parts, each with its own a(x) and p. a(U) and U / a(U) are rounded to x's dtype, as in the
originals; everything else about scales is float32. Values beyond 448 are clamped.

Both passes (records 90 and 92; `fp8_mlp_both`), with given scales s of x, p of P, u of U, d of D, g of the
gradient G of y, h of dpre; gradients in e5m2 or e4m3:

    pre = s u x8 U8^T,  P = relu(pre)^2,  y = p d P8 D8^T,  each rounded to x's dtype
    dpre = 2 (g d G8 D8) sqrt(p P8),  dx = h u dpre8 U8,  dU = h s dpre8^T x8,  dD = g p G8^T P8

Reference (any device): quantises, then multiplies (kernels/fp8_linear.py); on a GPU with FP8 units
torch._scaled_mm multiplies the 8-bit operands, part by part. fused: first product, relu^2 and the cast of P
in one Triton kernel, and dpre at the end of g D (kernels/linear_relu_sq.py), from compute capability 8.9 on.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.device import operator
from kernels.fp8_linear import LARGEST, product, quantise
from kernels.linear_relu_sq import fp8_forward_op, fp8_linear_relu_sq, product_gradient, product_gradient_op

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LEAST = 1e-12  # that a largest value counts as


def fp8_mlp(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, parts: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None, fused: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The MLP y = relu(x U^T)^2 D^T with FP8 products.

    Args:
        x: (N, in), up: (hidden, in), down: (out, hidden), all of one dtype.
        parts: number of equal parts of x with their own scales.
        scales: (p (parts,), d ()) in float32, for the second product in e4m3 too; None: only the first.
        fused: use the Triton kernels. ValueError if the device cannot.

    Returns: y (N, out) in x's dtype, and the largest P of each part (parts,) in float32, from which the next
        scales are made; empty without scales.
    """
    p, d = (None, None) if scales is None else scales
    return FP8MLP.apply(x, up, down, parts, p, d, fused)


def forward_reference(
    x8: torch.Tensor, up8: torch.Tensor, unscale: torch.Tensor, factor: torch.Tensor | None,
    dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What linear_relu_sq.fp8_linear_relu_sq computes, in torch."""
    p = F.relu(product(x8, up8.t(), unscale, dtype, fast=True)).square()
    if factor is None:
        return p, p.new_empty(0, p.size(1), dtype=E4M3), unscale.new_empty(0)
    split = p.unflatten(0, (len(factor), -1))
    return p, quantise(split, factor[:, None, None], E4M3).flatten(0, 1), split.amax((1, 2)).float()


def gradient_reference(g: torch.Tensor, weight: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """g (N, out), weight (hidden, out), p (N, hidden) -> 2 (g W^T) sqrt(p) (N, hidden) in g's dtype."""
    d = F.linear(g, weight)
    wide = torch.promote_types(d.dtype, torch.float32)
    return (2.0 * d.to(wide) * p.to(wide).sqrt()).to(d.dtype)


def narrowed_rows(x: torch.Tensor, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, in) -> (x in e4m3, scale of each part (parts,) float32)."""
    split = x.unflatten(0, (parts, -1))
    scale = split.abs().amax((1, 2)).float().clamp(min=LEAST) / LARGEST[E4M3]
    return quantise(split, 1 / scale[:, None, None], E4M3).flatten(0, 1), scale


def narrowed_weight(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w -> (w in e4m3, scale () float32); scale and quotient are rounded to w's dtype before the cast."""
    scale = w.abs().amax().clamp(min=LEAST) / LARGEST[E4M3]
    return quantise(w / scale, 1.0, E4M3), scale.float()


class FP8MLP(torch.autograd.Function):
    """The MLP of fp8_mlp; the gradients are those of the products in x's dtype."""

    @staticmethod
    def forward(ctx, x, up, down, parts, p_scale, d_scale, fused):
        (x8, sx), (up8, su) = narrowed_rows(x, parts), narrowed_weight(up)
        first = operator(fp8_linear_relu_sq, fp8_forward_op, x) if fused else forward_reference
        p, p8, largest = first(x8, up8, sx * su, None if p_scale is None else 1 / p_scale, x.dtype)
        if p_scale is None:
            y = F.linear(p, down)
        else:
            y = product(p8, quantise(down, 1 / d_scale, E4M3).t(), p_scale * d_scale, x.dtype, fast=True)
        ctx.save_for_backward(x, up, down, p)
        ctx.fused = fused
        ctx.mark_non_differentiable(largest)
        return y, largest

    @staticmethod
    def backward(ctx, g, _):
        x, up, down, p = ctx.saved_tensors
        need_x, need_up, need_down = ctx.needs_input_grad[:3]
        gradient = gradient_reference
        if ctx.fused:
            gradient = operator(product_gradient, product_gradient_op, g)
        dpre = gradient(g, down.t(), p) if need_x or need_up else None
        dx, dup = dpre @ up if need_x else None, dpre.t() @ x if need_up else None
        return dx, dup, g.t() @ p if need_down else None, None, None, None, None


# ----- both passes

class Scales(NamedTuple):
    """Scales of the operands of an MLP whose forward and backward products are in FP8, in float32."""
    x: torch.Tensor  # (parts,), of the input
    p: torch.Tensor  # (parts,), of relu^2
    up: torch.Tensor  # (), of the weights
    down: torch.Tensor  # ()
    g: float | None  # of the incoming gradient; None: by the largest entry of each part
    h: torch.Tensor  # (parts,), of the gradient before relu^2
    format: torch.dtype = E5M2  # of both gradients


def copied(x: torch.Tensor) -> torch.Tensor:
    """A copy of x."""
    return x.clone()


copied_op = torch.library.custom_op(
    "speedrun::copied", copied, mutates_args=(), schema="(Tensor x) -> Tensor"
)


@copied_op.register_fake
def copied_shape(x: torch.Tensor) -> torch.Tensor:
    """Shape and dtype of `copied`, for torch.compile."""
    return torch.empty_like(x)


def front(ring: torch.Tensor, parts: int) -> torch.Tensor:
    """The first scales of a ring, as they are now.

    The backward pass needs them after the ring has moved. An operation of its own, because torch.compile
    drops a plain copy and then reads the moved ring.
    """
    return operator(copied, copied_op, ring)(ring[:parts])


def fp8_mlp_both(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, scales: Scales, probe: torch.Tensor,
    fused: bool = False, transpose: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The MLP y = relu(x U^T)^2 D^T with FP8 products in both passes.

    Args:
        x: (N, in), up: (hidden, in), down: (out, hidden), all of one dtype.
        scales: Scales; x has as many equal parts as they say.
        probe: (parts,) float32, zeros that need a gradient: it becomes the largest |dpre| of each part, from
            which the next `h` is made.
        fused: use the Triton kernel of the forward pass. ValueError if the device cannot.
        transpose: as in kernels.fp8_linear.product.

    Returns: y (N, out) in x's dtype; the largest P and the largest |x| of each part, (parts,) float32.
    """
    return FP8MLPBoth.apply(x, up, down, *scales, probe, fused, transpose)


def scaled_rows(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (N, in), divided by the scale (parts,) of its part, in an 8-bit dtype."""
    return quantise(x.unflatten(0, (len(scale), -1)), 1 / scale[:, None, None], dtype).flatten(0, 1)


def largest_of_parts(x: torch.Tensor, parts: int) -> torch.Tensor:
    """Largest |x| of each part of x (N, in), (parts,) float32."""
    return x.unflatten(0, (parts, -1)).abs().amax((1, 2)).float()


def product_over_rows(a: torch.Tensor, b: torch.Tensor, scales: torch.Tensor, transpose: str) -> torch.Tensor:
    """sum over parts of scale a_i^T b_i, of 8-bit a (N, m) and b (N, n), in float32. scales: (parts,)."""
    parts = zip(a.chunk(len(scales)), b.chunk(len(scales)), scales.split(1))
    return sum(
        product(one.t(), other, scale, torch.float32, fast=False, transpose=transpose)
        for one, other, scale in parts
    )


class FP8MLPBoth(torch.autograd.Function):
    """The MLP of fp8_mlp_both."""

    @staticmethod
    def forward(ctx, x, up, down, sx, sp, su, sd, sg, sh, gradient8, probe, fused, transpose):
        x8, up8, down8 = scaled_rows(x, sx, E4M3), quantise(up, 1 / su, E4M3), quantise(down, 1 / sd, E4M3)
        first = operator(fp8_linear_relu_sq, fp8_forward_op, x) if fused else forward_reference
        _, p8, largest = first(x8, up8, sx * su, 1 / sp, x.dtype)
        y = product(p8, down8.t(), sp * sd, x.dtype, fast=True)
        ctx.save_for_backward(x8, up8, down8, p8, sx, sp, su, sd, sh)
        ctx.others = sg, gradient8, x.dtype, transpose
        most = largest_of_parts(x, len(sx))
        ctx.mark_non_differentiable(largest, most)
        return y, largest, most

    @staticmethod
    def backward(ctx, g, *_):
        x8, up8, down8, p8, sx, sp, su, sd, sh = ctx.saved_tensors
        sg, gradient8, dtype, transpose = ctx.others
        if sg is None:
            sg = largest_of_parts(g, len(sp)).clamp(min=LEAST) / LARGEST[gradient8]
            g8 = scaled_rows(g, sg, gradient8)
        else:
            g8 = quantise(g, 1 / sg, gradient8)
        d = product(g8, down8, (sg * sd).reshape(-1), dtype, fast=False, transpose=transpose)
        p = p8.float().unflatten(0, (len(sp), -1)) * sp[:, None, None]
        dpre = (2.0 * d.float() * p.flatten(0, 1).sqrt()).to(dtype)
        h8 = scaled_rows(dpre, sh, gradient8)
        dx = product(h8, up8, sh * su, dtype, fast=False, transpose=transpose)
        dup = product_over_rows(h8, x8, sh * sx, transpose).to(dtype)
        ddown = product_over_rows(g8, p8, sg * sp, transpose).to(dtype)
        return dx, dup, ddown, *[None] * 7, largest_of_parts(dpre, len(sh)), None, None
