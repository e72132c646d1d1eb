"""Transposed copies in tiles: read along rows and written along rows (records 74 and 76, @ChrisJMcCormick).

    transpose_copy(x) = x^T, contiguous, bit by bit        transpose_add(a, b): a += b^T, in place

torch's copy of x.t() jumps from row to row on one side. Elements of 1, 2 or 4 bytes (transpose_add: float16,
bfloat16 or float32, added in float32 and rounded once), in any strides. No gradients. transpose_copy makes
operands of the FP8 head's products (kernels/fp8_linear.py). transpose_add is for a head that is stored
transposed (records 61 and 74: the gradient of the token table is added to the head's); none is so far, so
nothing uses it yet. Triton is imported when first used.
"""

from __future__ import annotations  # the kernels are annotated with tl.constexpr, and tl comes later

import functools

import torch

from kernels.device import DTYPES, operator, refusal

ROWS, COLUMNS, WARPS = 64, 128, 8  # of a tile of x: 32 elements a thread. Not tuned on a GPU yet
ADD_SIDE, ADD_WARPS = 64, 8  # of a tile in transpose_add, which has two of them
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # bytes are copied as integers, whatever they mean


# ----- reference --------------------------------------------------------------------------------------------

def transpose_copy_reference(x):
    """x (M, N) -> x^T (N, M), contiguous: a copy even where x's columns are contiguous."""
    return x.t().clone(memory_format=torch.contiguous_format)


def transpose_add_reference(a, b):
    """a (M, N) += b^T, b (N, M). Returns a."""
    return a.add_(b.t())


# ----- Triton -----------------------------------------------------------------------------------------------

def transpose_copy(x):
    """x (M, N) with elements of 1, 2 or 4 bytes -> x^T (N, M), contiguous.

    ValueError for another shape, element size or device.
    """
    check("copy", x)
    if x.element_size() not in BITS:
        raise ValueError(f"the Triton transpose_copy has no {str(x.dtype).removeprefix('torch.')}; use torch")
    return operator(copy, copy_op, x)(x)


def transpose_add(a, b):
    """a (M, N) += b^T in place, b (N, M). Returns a.

    Each is float16, bfloat16 or float32; they must not overlap.
    """
    check("add", a, b)
    if a.shape != b.t().shape or not {a.dtype, b.dtype} <= set(DTYPES):
        raise ValueError(f"a {tuple(a.shape)} {a.dtype} and b {tuple(b.shape)} {b.dtype} do not fit: want "
                         "(M, N) and (N, M) in float16, bfloat16 or float32")
    m, n = a.shape
    if a.numel():
        kernels()[1][(-(-m // ADD_SIDE) * -(-n // ADD_SIDE),)](
            a, b, m, n, *a.stride(), *b.stride(), SIDE=ADD_SIDE, num_warps=ADD_WARPS
        )
    return a


def check(name, *tensors):
    """ValueError if the Triton kernels cannot run on these tensors: device, shape or gradient."""
    why = refusal(tensors[0].device, torch.float32)
    if why:
        raise ValueError(f"the Triton transpose_{name} {why}; use torch")
    for x in tensors:
        if x.dim() != 2:
            raise ValueError(f"transpose_{name} wants matrices, not {tuple(x.shape)}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"the Triton transpose_{name} has no gradient; use torch")


tl = None  # triton.language, once kernels() has imported it


def copy_kernel(x, out, m, n, x_row, x_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of x (m, n), in any strides, to contiguous out (n, m)."""
    across = tl.cdiv(n, COLUMNS)
    rows = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tile = tl.load(x + rows[:, None] * x_row + columns[None, :] * x_column, mask=inside, other=0)
    tl.store(out + columns[:, None] * m + rows[None, :], tl.trans(tile), mask=tl.trans(inside))


def add_kernel(a, b, m, n, a_row, a_column, b_row, b_column, SIDE: tl.constexpr):
    """A tile of a (m, n) += b^T, both in any strides."""
    across = tl.cdiv(n, SIDE)
    rows = (tl.program_id(0) // across).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    columns = (tl.program_id(0) % across).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    places = a + rows[:, None] * a_row + columns[None, :] * a_column
    old = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    new = tl.load(
        b + columns[:, None] * b_row + rows[None, :] * b_column, mask=tl.trans(inside), other=0.0
    ).to(tl.float32)
    tl.store(places, (old + tl.trans(new)).to(a.dtype.element_ty), mask=inside)


@functools.cache
def kernels():
    """(copy_kernel, add_kernel) for Triton."""
    global tl
    import triton
    import triton.language as tl
    return triton.jit(copy_kernel), triton.jit(add_kernel)


def copy(x):
    """The contiguous transpose (n, m) of x (m, n)."""
    (m, n), bits = x.shape, BITS[x.element_size()]
    out = torch.empty(n, m, dtype=x.dtype, device=x.device)
    if x.numel():
        kernels()[0][(-(-m // ROWS) * -(-n // COLUMNS),)](
            x.view(bits), out.view(bits), m, n, *x.stride(), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
        )
    return out


# torch.compile sees one call
copy_op = torch.library.custom_op(
    "speedrun::transpose_copy", copy, mutates_args=(), schema="(Tensor x) -> Tensor"
)


@copy_op.register_fake
def copy_shape(x):
    """Shape and dtype of `copy`, for torch.compile."""
    return x.new_empty(x.size(1), x.size(0))
