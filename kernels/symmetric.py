"""Symmetric matrix products of Muon: only half of the tiles is computed, and then mirrored (record 27).

    gram(x) = X X^T        gram_t(x) = X^T X        quadratic(a, b, c) = b A + c A A, A symmetric
    step(x, a, b, c) = a X + (b A + c A A) X, A = X X^T on the shorter side of X

`step` is one step of kernels.newton_schulz. One Triton kernel computes the first three, since A A = A A^T: a
program computes one tile on or below the diagonal and writes it twice. float16, bfloat16 and float32 in any
strides. Sums are in float32; quadratic rounds once, at the end, as its reference does. No gradients. Triton
is imported when first used.
"""

from __future__ import annotations  # the kernel is annotated with tl.constexpr, and tl comes later

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from kernels import tiles
from kernels.device import capability, operator, refusal

if TYPE_CHECKING:
    from triton.runtime import KernelInterface


class Tile(NamedTuple):
    """Tile and launch sizes of symmetric_kernel."""
    side: int  # rows and columns of a tile
    depth: int  # columns of X that are multiplied at a time
    warps: int
    stages: int  # loads in flight


# By compute capability, for shared memory of 163 KB a block on 80 (A100), 227 KB on 90 (H100), 99 KB on 89
# (4090) and in the default, which runs from 8.0 on. No registers are spilled if rows are multiples of 16
# bytes. Not tuned on a GPU yet: for a card and its shapes bench/tune.py does that (kernels/tiles.py).
TILES = {
    80: Tile(128, 64, 8, 4), 89: Tile(128, 64, 8, 3), 90: Tile(128, 64, 8, 3), "default": Tile(128, 64, 8, 3)
}
# for small matrices, and float32: its products are three of TF32, which take more registers
SMALL = Tile(64, 32, 4, 3)
TINY = Tile(32, 32, 4, 3)  # the gates' 6 x 12: their rows are read element by element, which takes registers


# ----- reference --------------------------------------------------------------------------------------------

def gram_reference(x: torch.Tensor) -> torch.Tensor:
    """x (..., m, k) -> X X^T (..., m, m)."""
    return x @ x.mT


def gram_t_reference(x: torch.Tensor) -> torch.Tensor:
    """x (..., m, k) -> X^T X (..., k, k)."""
    return x.mT @ x


def quadratic_reference(a: torch.Tensor, b: float, c: float) -> torch.Tensor:
    """a (..., m, m) -> b A + c A A, rounded once."""
    flat = batch(a)
    return torch.baddbmm(flat, flat, flat, beta=b, alpha=c).view(a.shape)


def step_reference(x: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    """x (..., m, k) -> a X + (b A + c A A) X with A = X X^T.

    For m > k it is computed as a X + X (b A + c A A) with A = X^T X. The last product and its sum with a X
    are rounded once.
    """
    tall = x.size(-2) > x.size(-1)
    inner = batch(quadratic_reference(gram_t_reference(x) if tall else gram_reference(x), b, c))
    flat = batch(x)
    return torch.baddbmm(flat, flat if tall else inner, inner if tall else flat, beta=a).view(x.shape)


# ----- Triton -----------------------------------------------------------------------------------------------

def gram(x: torch.Tensor) -> torch.Tensor:
    """x (..., m, k) -> X X^T (..., m, m), contiguous, in x's dtype.

    ValueError for an unsupported dtype or device.
    """
    return operator(product, product_op, x)(x, 0.0, 1.0, False)


def gram_t(x: torch.Tensor) -> torch.Tensor:
    """x (..., m, k) -> X^T X (..., k, k), contiguous, in x's dtype."""
    return gram(x.mT)


def quadratic(a: torch.Tensor, b: float, c: float) -> torch.Tensor:
    """a (..., m, m) -> b A + c A A, for floats b and c.

    A must be symmetric. This is not checked: otherwise the result is the mirrored b A + c A A^T.
    """
    if a.size(-2) != a.size(-1):
        raise ValueError(f"quadratic wants symmetric matrices, not {tuple(a.shape)}")
    return operator(product, product_op, a)(a, float(b), float(c), True)


def step(x: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    """x (..., m, k), floats a, b and c -> a X + (b A + c A A) X, as step_reference.

    torch computes the last product.
    """
    tall = x.size(-2) > x.size(-1)
    inner = batch(quadratic(gram_t(x) if tall else gram(x), b, c))
    flat = batch(x)
    return torch.baddbmm(flat, flat if tall else inner, inner if tall else flat, beta=a).view(x.shape)


def batch(x: torch.Tensor) -> torch.Tensor:
    """(..., m, k) -> (N, m, k), without a copy where there is at most one dimension before these two."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


tl = None  # triton.language, once kernel() has imported it


def symmetric_kernel(
    x, out, m, k, x_matrix, x_row, x_column, b, c, ADD: tl.constexpr, PRECISION: tl.constexpr,
    SIDE: tl.constexpr, DEPTH: tl.constexpr
):
    """A tile of c X X^T, plus b X if ADD (then X is square), and its mirror image.

    x (N, m, k) in any strides, out (N, m, m).
    """
    p = tl.program_id(0)  # of the tiles on or below the diagonal, row by row: p = i (i + 1) / 2 + j, j <= i
    i = ((tl.sqrt(8.0 * p + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)  # the root may be rounded to either side
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    j = p - i * (i + 1) // 2
    x += tl.program_id(1).to(tl.int64) * x_matrix
    out += tl.program_id(1).to(tl.int64) * m * m
    lanes, depth = tl.arange(0, SIDE), tl.arange(0, DEPTH)
    rows, columns = i * SIDE + lanes, j * SIDE + lanes
    left = x + rows.to(tl.int64)[:, None] * x_row + depth.to(tl.int64)[None, :] * x_column
    right = x + columns.to(tl.int64)[None, :] * x_row + depth.to(tl.int64)[:, None] * x_column
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for start in range(0, k, DEPTH):
        inside = depth < k - start
        a = tl.load(left, mask=(rows < m)[:, None] & inside[None, :], other=0.0)
        t = tl.load(right, mask=inside[:, None] & (columns < m)[None, :], other=0.0)
        total = tl.dot(a, t, total, input_precision=PRECISION)
        left += DEPTH * x_column
        right += DEPTH * x_column
    inside = (rows < m)[:, None] & (columns < m)[None, :]
    if ADD:
        tile = x + rows.to(tl.int64)[:, None] * x_row + columns.to(tl.int64)[None, :] * x_column
        total = c * total + b * tl.load(tile, mask=inside, other=0.0).to(tl.float32)
    total = total.to(out.dtype.element_ty)
    # from there on 32 bits are enough, and take fewer registers
    corner = out + i.to(tl.int64) * SIDE * m + j * SIDE
    tl.store(corner + lanes[:, None] * m + lanes[None, :], total, mask=inside)
    if i != j:
        corner = out + j.to(tl.int64) * SIDE * m + i * SIDE
        tl.store(corner + lanes[:, None] * m + lanes[None, :], tl.trans(total), mask=tl.trans(inside))


@functools.cache
def kernel() -> KernelInterface:
    """symmetric_kernel for Triton."""
    global tl
    import triton
    import triton.language as tl
    return triton.jit(symmetric_kernel)


def default_tile(x: torch.Tensor) -> Tile:
    """The tile without tuning, by matrix size, dtype and compute capability."""
    if x.size(-2) <= TINY.side:
        return TINY
    small = x.size(-2) <= SMALL.side or x.dtype == torch.float32
    return SMALL if small else TILES.get(capability(x.device), TILES["default"])


def product(x: torch.Tensor, b: float, c: float, add: bool) -> torch.Tensor:
    """x (..., m, k) -> c X X^T (+ b X) in (..., m, m)."""
    why = refusal(x.device, x.dtype)
    if why:
        raise ValueError(f"the Triton symmetric product {why}; use torch")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("the Triton symmetric product has no gradient; use torch")
    flat = batch(x)
    n, m, k = flat.shape
    out = torch.empty(n, m, m, dtype=x.dtype, device=x.device)
    tile = tiles.best("symmetric", x.device, x.dtype, (m, k), default_tile(x))
    side = -(-m // tile.side)
    kernel()[(side * (side + 1) // 2, n)](
        flat, out, m, k, *flat.stride(), b, c, ADD=add, PRECISION="tf32x3",  # of float32 only: to about 1e-6
        SIDE=tile.side, DEPTH=tile.depth, num_warps=tile.warps, num_stages=tile.stages)
    return out.view(*x.shape[:-1], m)


# torch.compile sees one call
product_op = torch.library.custom_op("speedrun::symmetric_product", product, mutates_args=(),
                                     schema="(Tensor x, float b, float c, bool add) -> Tensor")


@product_op.register_fake
def product_shape(x: torch.Tensor, b: float, c: float, add: bool) -> torch.Tensor:
    """Shape and dtype of `product`, for torch.compile."""
    return x.new_empty(*x.shape[:-1], x.size(-2))
