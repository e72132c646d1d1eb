"""Linear layer with relu^2, fused (record 59), and the MLP around it.

    linear_relu_sq(x, weight) = P = relu(x W^T)^2             dpre = 2 dP relu(x W^T) = 2 dP sqrt(P)
    mlp_relu_sq(x, up, down)  = relu(x U^T)^2 D^T             dpre = 2 (g D) sqrt(P)

The forward kernel applies relu^2 to its tile of the product before writing it. In the backward a kernel
computes dpre: for the layer alone, in one pass over dP; for the MLP, at the end of the product g D, so that
dP is never written. torch computes the other products, dx = dpre W and dW = dpre^T x. The backward needs only
P (record 87), which the next layer keeps anyway; its root is closer to relu(pre) than a rounded pre. In
float16 roots below 2e-4 are lost, because their squares are 0.

The pre-activation is squared in float32 (torch rounds it first). NaN stays NaN. float16, bfloat16 and float32
in any strides. Triton is imported when first used.

The same kernel computes the first product in FP8 for kernels/fp8_mlp.py (fp8_linear_relu_sq). Then it rounds
as torch does, and can also write P in e4m3 and the maxima for the next scale (records 84 and 89).
"""

from __future__ import annotations  # the kernels are annotated with tl.constexpr, and tl comes later

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from kernels import tiles
from kernels.device import FP8_SINCE, capability, operator, refusal

if TYPE_CHECKING:
    from triton.runtime import KernelInterface

GROUP = 8  # tiles of rows that are done together, so that their weights are still in the L2 cache
BLOCK, WARPS = 1024, 4  # of the elementwise kernel: 8 elements per thread, one load of 16 bytes in 16 bits


class Tile(NamedTuple):
    """Tile and launch sizes of linear_kernel."""
    rows: int  # of x
    columns: int  # of the output
    depth: int  # columns of x that are multiplied at a time
    warps: int
    stages: int  # loads in flight


# By compute capability, for shared memory of 163 KB a block on 80 (A100), 227 KB on 90 (H100), 99 KB on 89
# (4090) and in the default, which runs from 8.0 on. No registers are spilled if rows are multiples of 16
# bytes. Not tuned on a GPU yet: for a card and its shapes bench/tune.py does that (kernels/tiles.py).
TILES = {80: Tile(128, 128, 64, 8, 4), 89: Tile(128, 128, 64, 8, 3), 90: Tile(128, 256, 64, 8, 3),
         "default": Tile(128, 128, 64, 8, 3)}
FLOAT32 = Tile(64, 64, 32, 4, 3)  # everywhere: its products are three of TF32, which take more registers
FP8 = {90: Tile(128, 256, 128, 8, 3), "default": Tile(128, 128, 128, 8, 3)}  # from 8.9 on
NARROW = torch.float8_e4m3fn  # dtype of the second, 8-bit copy of P


# ----- reference --------------------------------------------------------------------------------------------

def linear_relu_sq_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., in), weight (out, in) -> relu(x W^T)^2 (..., out)."""
    return F.relu(F.linear(x, weight.to(x.dtype))).square()


def mlp_relu_sq_reference(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """x (..., in), up (hidden, in), down (out, hidden) -> relu(x U^T)^2 D^T (..., out)."""
    return F.linear(linear_relu_sq_reference(x, up), down.to(x.dtype))


# ----- Triton -----------------------------------------------------------------------------------------------

def linear_relu_sq(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., in), weight (out, in) -> relu(x W^T)^2 (..., out) in x's dtype.

    ValueError for another dtype or device.
    """
    check(x, weight)
    return LinearReluSq.apply(x.flatten(0, -2), weight.to(x.dtype)).unflatten(0, x.shape[:-1])


def mlp_relu_sq(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """x (..., in), up (hidden, in), down (out, hidden) -> relu(x U^T)^2 D^T (..., out) in x's dtype."""
    check(x, up)
    if down.size(1) != up.size(0):
        raise ValueError(
            f"up {tuple(up.shape)} and down {tuple(down.shape)} do not fit: want (hidden, in), (out, hidden)"
        )
    return MLPReluSq.apply(x.flatten(0, -2), up.to(x.dtype), down.to(x.dtype)).unflatten(0, x.shape[:-1])


def check(x: torch.Tensor, weight: torch.Tensor) -> None:
    """ValueError if the Triton kernel cannot run on x's device or dtype, or if the shapes do not fit."""
    why = refusal(x.device, x.dtype)
    if why:
        raise ValueError(f"the Triton linear_relu_sq {why}; use torch")
    if x.dim() < 2 or x.size(-1) != weight.size(1):
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: want (..., in), (out, in)"
        )


class LinearReluSq(torch.autograd.Function):
    """x (N, in), weight (out, in) -> P (N, out)."""

    @staticmethod
    def forward(ctx, x, weight):
        p = operator(forward, forward_op, x)(x, weight)
        ctx.save_for_backward(x, weight, p)
        return p

    @staticmethod
    def backward(ctx, g):
        x, weight, p = ctx.saved_tensors
        dpre = operator(gradient, gradient_op, g)(g, p)
        return (
            dpre @ weight if ctx.needs_input_grad[0] else None,
            dpre.t() @ x if ctx.needs_input_grad[1] else None,
        )


class MLPReluSq(torch.autograd.Function):
    """x (N, in), up (hidden, in), down (out, hidden) -> (N, out)."""

    @staticmethod
    def forward(ctx, x, up, down):
        p = operator(forward, forward_op, x)(x, up)
        ctx.save_for_backward(x, up, down, p)
        return F.linear(p, down)

    @staticmethod
    def backward(ctx, g):
        x, up, down, p = ctx.saved_tensors
        need_x, need_up, need_down = ctx.needs_input_grad
        run = operator(product_gradient, product_gradient_op, g)
        dpre = run(g, down.t(), p) if need_x or need_up else None
        return (
            dpre @ up if need_x else None, dpre.t() @ x if need_up else None, g.t() @ p if need_down else None
        )


tl = None  # triton.language, once kernels() has imported it


def linear_kernel(
    x, weight, p, out, unscale, factor, narrow, largest, part, n, f, d, x_row, x_column, w_row, w_column,
    BACKWARD: tl.constexpr, FP8: tl.constexpr, WRITE_NARROW: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr
):
    """A tile of relu(x W^T)^2, or of 2 (x W^T) sqrt(p) if BACKWARD.

    x (n, d), weight (f, d); contiguous p and out (n, f).
    FP8: the product is multiplied by unscale (n / part,), one for every `part` rows.
    WRITE_NARROW: also writes min(out factor, 448) to narrow (n, f), with factor (n / part,), and the largest
        element of each row of the tile to largest (column tiles, n).
    """
    program = tl.program_id(0)
    group = GROUP * tl.cdiv(f, COLUMNS)  # programs of a group, which go down its rows first
    first = program // group * GROUP
    height = tl.minimum(tl.cdiv(n, ROWS) - first, GROUP)
    row, column = (first + program % group % height) * ROWS, program % group // height * COLUMNS
    rows, columns, depth = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    left = x + rows.to(tl.int64)[:, None] * x_row + depth.to(tl.int64)[None, :] * x_column
    right = weight + columns.to(tl.int64)[None, :] * w_row + depth.to(tl.int64)[:, None] * w_column
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, d, DEPTH):
        inside = depth < d - start
        a = tl.load(left, mask=(rows < n)[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=inside[:, None] & (columns < f)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += DEPTH * x_column
        right += DEPTH * w_column
    inside = (rows < n)[:, None] & (columns < f)[None, :]
    corner = row.to(tl.int64) * f + column
    # 32 bits are enough, and take fewer registers
    places = tl.arange(0, ROWS)[:, None] * f + tl.arange(0, COLUMNS)[None, :]
    if FP8:
        total *= tl.load(unscale + rows // part, mask=rows < n, other=0.0)[:, None]
        # as torch, so that P is the same where the sums are
        total = total.to(out.dtype.element_ty).to(tl.float32)
    if BACKWARD:
        total = 2.0 * total * tl.sqrt(tl.load(p + corner + places, mask=inside, other=0.0).to(tl.float32))
    else:
        total = tl.where(total < 0.0, 0.0, total * total)  # tl.maximum would make NaN 0
    total = total.to(out.dtype.element_ty)
    tl.store(out + corner + places, total, mask=inside)
    if WRITE_NARROW:
        wide = total.to(tl.float32)
        tl.store(largest + (column // COLUMNS).to(tl.int64) * n + rows, tl.max(wide, 1), mask=rows < n)
        wide *= tl.load(factor + rows // part, mask=rows < n, other=0.0)[:, None]
        wide = tl.where(wide > 448.0, 448.0, wide)  # tl.minimum would make NaN 448
        tl.store(narrow + corner + places, wide.to(narrow.dtype.element_ty), mask=inside)


def gradient_kernel(g, p, out, count, BLOCK: tl.constexpr):
    """2 g sqrt(p) of `count` elements."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    root = tl.sqrt(tl.load(p + places, mask=inside, other=0.0).to(tl.float32))
    d = 2.0 * tl.load(g + places, mask=inside, other=0.0).to(tl.float32) * root
    tl.store(out + places, d.to(out.dtype.element_ty), mask=inside)


@functools.cache
def kernels() -> tuple[KernelInterface, KernelInterface]:
    """(linear_kernel, gradient_kernel) for Triton."""
    global tl
    import triton
    import triton.language as tl
    return triton.jit(linear_kernel), triton.jit(gradient_kernel)


def default_tile(x: torch.Tensor) -> Tile:
    """The tile without tuning, by dtype and compute capability."""
    return FLOAT32 if x.dtype == torch.float32 else TILES.get(capability(x.device), TILES["default"])


def launch(
    x: torch.Tensor, weight: torch.Tensor, p: torch.Tensor, out: torch.Tensor, backward: bool
) -> torch.Tensor:
    """Run linear_kernel with the tuned tile and return `out`."""
    n, tile = x.size(0), tiles.best("linear_relu_sq", x.device, x.dtype, tuple(weight.shape), default_tile(x))
    start(tile, x, weight, p, out, out, out, out, out, n, BACKWARD=backward, FP8=False, WRITE_NARROW=False)
    return out


def start(tile: Tile, x: torch.Tensor, weight: torch.Tensor, *rest, **modes) -> None:
    """Launch linear_kernel on all tiles. rest: its arguments from p to part."""
    (n, d), f = x.shape, weight.size(0)
    kernels()[0][(-(-n // tile.rows) * -(-f // tile.columns),)](
        x,
        weight,
        *rest,
        n,
        f,
        d,
        *x.stride(),
        *weight.stride(),
        **modes,
        PRECISION="tf32x3",  # of float32 only: to about 1e-6
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        GROUP=GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (N, in), weight (out, in) -> relu(x W^T)^2 (N, out)."""
    p = torch.empty(x.size(0), weight.size(0), dtype=x.dtype, device=x.device)
    return launch(x, weight, p, p, False)


def fp8_linear_relu_sq(
    x: torch.Tensor, weight: torch.Tensor, unscale: torch.Tensor, factor: torch.Tensor | None,
    dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 product with relu^2. The rows come in G equal parts.

    Args:
        x: (N, in) and weight: (out, in), both e4m3.
        unscale: (G,) float32, factor of the product of each part.
        factor: (G,) float32, factor of the second, 8-bit copy of P; None: no copy.
        dtype: dtype of P.

    Returns: P = relu(unscale x W^T)^2 (N, out); P times factor in e4m3, clamped; the largest P of each part
        (G,) float32. The last two are empty without factor.
    ValueError for another dtype or device.
    """
    why = refusal(x.device, dtype, FP8_SINCE)
    if why:
        raise ValueError(f"the Triton fp8_linear_relu_sq {why}; use torch")
    (n, f), groups = (x.size(0), weight.size(0)), len(unscale)
    p = torch.empty(n, f, dtype=dtype, device=x.device)
    default = FP8.get(capability(x.device), FP8["default"])
    tile = tiles.best("fp8_linear_relu_sq", x.device, x.dtype, tuple(weight.shape), default)
    many = (-(-f // tile.columns), n) if factor is not None else (0, n)
    narrow = torch.empty(n if many[0] else 0, f, dtype=NARROW, device=x.device)
    largest = torch.empty(many, dtype=torch.float32, device=x.device)
    start(tile, x, weight, p, p, unscale, unscale if factor is None else factor, narrow, largest, n // groups,
          BACKWARD=False, FP8=True, WRITE_NARROW=factor is not None)
    return p, narrow, largest.unflatten(1, (groups, -1)).amax((0, 2)) if many[0] else largest.new_empty(0)


def product_gradient(g: torch.Tensor, weight: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """g (N, out), weight (hidden, out), p (N, hidden) -> 2 (g W^T) sqrt(p) (N, hidden)."""
    return launch(g, weight, p, torch.empty_like(p), True)


def gradient(g: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """g and p (N, out) -> 2 g sqrt(p)."""
    g, out = g.contiguous(), torch.empty_like(p)
    kernels()[1][(-(-p.numel() // BLOCK),)](g, p, out, p.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return out


# ----- as operators: torch.compile sees one call each -------------------------------------------------------

forward_op = torch.library.custom_op("speedrun::linear_relu_sq", forward, mutates_args=(),
                                     schema="(Tensor x, Tensor weight) -> Tensor")
fp8_forward_op = torch.library.custom_op(
    "speedrun::fp8_linear_relu_sq", fp8_linear_relu_sq, mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor unscale, Tensor? factor, ScalarType dtype) -> (Tensor, Tensor, "
           "Tensor)")
product_gradient_op = torch.library.custom_op(
    "speedrun::mlp_relu_sq_gradient", product_gradient, mutates_args=(),
    schema="(Tensor g, Tensor weight, Tensor p) -> Tensor"
)
gradient_op = torch.library.custom_op("speedrun::relu_sq_gradient", gradient, mutates_args=(),
                                      schema="(Tensor g, Tensor p) -> Tensor")


@forward_op.register_fake
def forward_shape(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Shape and dtype of `forward`, for torch.compile."""
    return x.new_empty(x.size(0), weight.size(0))


@fp8_forward_op.register_fake
def fp8_forward_shapes(
    x: torch.Tensor, weight: torch.Tensor, unscale: torch.Tensor, factor: torch.Tensor | None,
    dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes and dtypes of `fp8_linear_relu_sq`, for torch.compile."""
    (n, f), groups = (x.size(0), weight.size(0)), len(unscale)
    p = x.new_empty(n, f, dtype=dtype)
    if factor is None:
        n = groups = 0
    return p, x.new_empty(n, f, dtype=NARROW), x.new_empty(groups, dtype=torch.float32)


@product_gradient_op.register_fake
def product_gradient_shape(g: torch.Tensor, weight: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Shape and dtype of `product_gradient`, for torch.compile."""
    return torch.empty_like(p)


@gradient_op.register_fake
def gradient_shape(g: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Shape and dtype of `gradient`, for torch.compile."""
    return torch.empty_like(p)
