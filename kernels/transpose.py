"""Transposed copies in tiles: read along rows and written along rows (records 74 and 76, @ChrisJMcCormick).

    transpose_copy(x) = x^T, contiguous, bit by bit

torch's copy of x.t() jumps from row to row on one side. Elements of 1, 2 or 4 bytes, in any strides. No
gradients. The copies are operands of the FP8 head's products (kernels/fp8_linear.py). Triton is imported when
first used.
"""

from __future__ import annotations  # the kernel is annotated with tl.constexpr, and tl comes later

import functools
from typing import TYPE_CHECKING

import torch

from kernels.device import operator, refusal

if TYPE_CHECKING:
    from triton.runtime import KernelInterface

ROWS, COLUMNS, WARPS = 64, 128, 8  # of a tile of x: 32 elements a thread. Not tuned on a GPU yet

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # bytes are copied as integers, whatever they mean


# ----- reference --------------------------------------------------------------------------------------------

def transpose_copy_reference(x: torch.Tensor) -> torch.Tensor:
    """x (M, N) -> x^T (N, M), contiguous: a copy even where x's columns are contiguous."""
    return x.t().clone(memory_format=torch.contiguous_format)


# ----- Triton -----------------------------------------------------------------------------------------------

def transpose_copy(x: torch.Tensor) -> torch.Tensor:
    """x (M, N) with elements of 1, 2 or 4 bytes -> x^T (N, M), contiguous.

    ValueError for another shape, element size or device.
    """
    check(x)
    if x.element_size() not in BITS:
        raise ValueError(f"the Triton transpose_copy has no {str(x.dtype).removeprefix('torch.')}; use torch")
    return operator(copy, copy_op, x)(x)


def check(x: torch.Tensor) -> None:
    """ValueError if the Triton kernel cannot run on this tensor: device, shape or gradient."""
    why = refusal(x.device, torch.float32)
    if why:
        raise ValueError(f"the Triton transpose_copy {why}; use torch")
    if x.dim() != 2:
        raise ValueError(f"transpose_copy wants matrices, not {tuple(x.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("the Triton transpose_copy has no gradient; use torch")


tl = None  # triton.language, once kernel() has imported it


def copy_kernel(x, out, m, n, x_row, x_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of x (m, n), in any strides, to contiguous out (n, m)."""
    across = tl.cdiv(n, COLUMNS)
    rows = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tile = tl.load(x + rows[:, None] * x_row + columns[None, :] * x_column, mask=inside, other=0)
    tl.store(out + columns[:, None] * m + rows[None, :], tl.trans(tile), mask=tl.trans(inside))


@functools.cache
def kernel() -> KernelInterface:
    """copy_kernel for Triton."""
    global tl
    import triton
    import triton.language as tl
    return triton.jit(copy_kernel)


def copy(x: torch.Tensor) -> torch.Tensor:
    """The contiguous transpose (n, m) of x (m, n)."""
    (m, n), bits = x.shape, BITS[x.element_size()]
    out = torch.empty(n, m, dtype=x.dtype, device=x.device)
    if x.numel():
        kernel()[(-(-m // ROWS) * -(-n // COLUMNS),)](
            x.view(bits), out.view(bits), m, n, *x.stride(), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
        )
    return out


# torch.compile sees one call
copy_op = torch.library.custom_op(
    "speedrun::transpose_copy", copy, mutates_args=(), schema="(Tensor x) -> Tensor"
)


@copy_op.register_fake
def copy_shape(x: torch.Tensor) -> torch.Tensor:
    """Shape and dtype of `copy`, for torch.compile."""
    return x.new_empty(x.size(1), x.size(0))
