"""Rotary positions, QK norm and key offset of queries and keys, fused: one launch forward, one backward.

    q, k    = qk_rotary(q, k, cos, sin, order=..., eps=..., offset=0)     q, k (R, T, H, K), cos, sin (T, K/2)
    q, k, v = qkv_rotary(qkv, cos, sin, order=..., eps=..., offset=0)     qkv (R, T, 3, H, K)

Rotation (Su et al., arXiv 2104.09864): for each token t and head, the pair (j, j + K/2) is rotated by -t f_j,
whose cosine and sine are in the tables:

    y_j = x_j cos_tj + x_{j+K/2} sin_tj,      y_{j+K/2} = x_{j+K/2} cos_tj - x_j sin_tj

QK norm (Henry et al., arXiv 2010.04245): queries and keys are divided by their root mean square,
sqrt(mean_j x_j^2 + eps), without gain, `before_rope`, `after_rope`, or not at all (order None). `after_rope`
uses the mean square of the rotated values, which differs where rounded tables do not lie on the circle.

Partial key offset (record 49), applied last: the last `offset` pairs of a key (there the K/4 pairs that do
not rotate) are replaced by those of the previous token in the row, k_t[j] <- k_{t-1}[j]; the first token of a
row keeps its own. As in the record, the previous token may belong to another document.

The backward pass keeps the original q and k (views of qkv, which v keeps alive where nothing is mixed in) and
computes everything else again:

    r = (mean x^2 + eps)^(-1/2),   y = r x:      dx = r (dy - r^2 mean(dy x) x)

The offset costs no extra pass: a program stores the channels of its keys, or loads their gradients, one token
further on. qkv_rotary differs only in its gradient, which is one tensor (R, T, 3, H, K) with dv copied into
it; separate dq, dk and dv would be copied once more to form the gradient of the product before.

Rounding: all arithmetic between load and store is in float32. The torch version also rounds to q's dtype
between rotation and norm, and rotates in bfloat16 in records 5 to 16, 32 and 33 (numerics.rope_math), so the
kernel is closer to exact arithmetic. float16, bfloat16 and float32 in any strides; results are contiguous.
Triton is imported when first used.
"""

from __future__ import annotations  # the kernels are annotated with tl.constexpr, and tl comes later

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from kernels import tiles
from kernels.device import DTYPES, operator, refusal

if TYPE_CHECKING:
    from triton.runtime import KernelInterface

ORDERS = (None, "before_rope", "after_rope")


class Tile(NamedTuple):
    """Launch sizes of the rotary kernels."""
    size: int  # bytes of half a head's tile
    warps: int


# one load of 16 bytes for each thread. Not tuned on a GPU yet: bench/tune.py (kernels/tiles.py)
DEFAULT = Tile(2048, 4)


# ----- reference --------------------------------------------------------------------------------------------

def qk_rotary_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, order: str | None, eps: float,
    offset: int = 0, norm_dtype: torch.dtype = torch.float32, math_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k (R, T, H, K), cos, sin (T, K/2) -> q, k in their dtype.

    norm_dtype: dtype of the norm. math_dtype: least dtype of the rotation, which uses the widest of this,
    the tables and q.
    """
    def norm(x):
        return F.rms_norm(x.to(norm_dtype), x.shape[-1:], eps=eps).to(x.dtype)

    def turn(x):
        x1, x2 = x.to(torch.promote_types(x.dtype, math_dtype)).chunk(2, dim=-1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat([x1 * c + x2 * s, x2 * c - x1 * s], dim=-1).to(x.dtype)

    steps = {None: (turn,), "before_rope": (norm, turn), "after_rope": (turn, norm)}[order]
    for step in steps:
        q, k = step(q), step(k)
    return q, offset_keys(k, offset)


def offset_keys(k: torch.Tensor, offset: int, adjacent: bool = False) -> torch.Tensor:
    """Keys (R, T, H, K) whose last `offset` channel pairs are those of the previous token in the row.

    The first token of a row keeps its own. adjacent: pairs (2j, 2j + 1) in place of (j, j + K/2).
    """
    if not offset:
        return k
    channel = torch.arange(k.size(-1), device=k.device)
    pair = channel // 2 if adjacent else channel % (k.size(-1) // 2)
    return torch.where(pair >= k.size(-1) // 2 - offset, torch.cat([k[:, :1], k[:, :-1]], 1), k)


# ----- Triton -----------------------------------------------------------------------------------------------

def qk_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, order: str | None, eps: float,
    offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k (R, T, H, K) in any strides, cos, sin (T, K/2) -> q, k, contiguous, in their dtype.

    order: None, before_rope or after_rope. offset: pairs of a key that come from the previous token. The
    tables get no gradient. ValueError for an unsupported dtype or device, and for shapes that do not fit.
    """
    check(q, k, cos, sin, order, offset)
    return QKRotary.apply(q, k, cos, sin, order, eps, offset)


def qkv_rotary(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, order: str | None, eps: float, offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As qk_rotary, for qkv (R, T, 3, H, K) -> q, k, v. v is a view of qkv and must not be written to."""
    if qkv.dim() != 5 or qkv.size(2) != 3:
        raise ValueError(f"qkv {tuple(qkv.shape)} does not fit: want (rows, tokens, 3, heads, width)")
    q, k, _ = qkv.unbind(2)
    check(q, k, cos, sin, order, offset)
    return QKVRotary.apply(qkv, cos, sin, order, eps, offset)


def check(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, order: str | None, offset: int
) -> None:
    """ValueError if the Triton kernel cannot run on q's device or dtype, or if the arguments do not fit."""
    why = refusal(q.device, q.dtype)
    if why:
        raise ValueError(f"the Triton qk_rotary {why}; use torch")
    if q.dim() != 4 or q.size(-1) % 2 or q.shape != k.shape or q.dtype != k.dtype:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit: want (rows, tokens, heads, even width) "
            "in one dtype"
        )
    for table in (cos, sin):
        if table.shape != (q.size(1), q.size(-1) // 2) or table.dtype not in DTYPES:
            raise ValueError(f"table {tuple(table.shape)} in {table.dtype} does not fit q {tuple(q.shape)}: "
                             "want (tokens, width / 2), float32 at most")
    if order not in ORDERS or not 0 <= offset <= q.size(-1) // 2:
        raise ValueError(
            f"order {order} and offset {offset}: want one of {ORDERS}, and 0 to {q.size(-1) // 2} pairs"
        )


class QKRotary(torch.autograd.Function):
    """q, k (R, T, H, K) -> q, k."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, order, eps, offset):
        ctx.save_for_backward(q, k, cos, sin)
        ctx.plan = order, eps, offset
        return operator(forward, forward_op, q)(q, k, cos, sin, order, eps, offset)

    @staticmethod
    def backward(ctx, gq, gk):
        dq, dk = operator(gradient, gradient_op, gq)(*ctx.saved_tensors, gq, gk, *ctx.plan)
        return dq, dk, None, None, None, None, None


class QKVRotary(torch.autograd.Function):
    """qkv (R, T, 3, H, K) -> q, k, v."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, order, eps, offset):
        ctx.save_for_backward(qkv, cos, sin)
        ctx.plan = order, eps, offset
        q, k, v = qkv.unbind(2)
        return *operator(forward, forward_op, q)(q, k, cos, sin, order, eps, offset), v

    @staticmethod
    def backward(ctx, gq, gk, gv):
        d = operator(joint_gradient, joint_gradient_op, gq)(*ctx.saved_tensors, gq, gk, gv, *ctx.plan)
        return d, None, None, None, None, None


tl = None  # triton.language, once kernels() has imported it


def load(x, places, inside):
    """Values at these places in float32; 0 outside."""
    return tl.load(x + places, mask=inside, other=0.0).to(tl.float32)


def store(x, places, inside, value):
    """Write values at these places in x's dtype; nothing outside."""
    tl.store(x + places, value.to(x.dtype.element_ty), mask=inside)


def scale_of(x1, x2, eps, WIDTH: tl.constexpr):
    """One over the root mean square of each row's 2 WIDTH channels."""
    return tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * WIDTH) + eps)[:, None]


def placed(x1, x2, c, s, eps, ORDER: tl.constexpr, WIDTH: tl.constexpr):
    """Both halves (TOKENS, COLUMNS) of a head, normed and turned. ORDER: index in ORDERS."""
    if ORDER == 1:
        r = scale_of(x1, x2, eps, WIDTH)
        x1, x2 = x1 * r, x2 * r
    y1, y2 = x1 * c + x2 * s, x2 * c - x1 * s
    if ORDER == 2:
        r = scale_of(y1, y2, eps, WIDTH)
        y1, y2 = y1 * r, y2 * r
    return y1, y2


def unplaced(g1, g2, x1, x2, c, s, eps, ORDER: tl.constexpr, WIDTH: tl.constexpr):
    """Gradient of x from the gradient g of placed(x)."""
    if ORDER == 2:
        y1, y2 = x1 * c + x2 * s, x2 * c - x1 * s
        r = scale_of(y1, y2, eps, WIDTH)
        along = r * r * (tl.sum(g1 * y1 + g2 * y2, 1) / (2 * WIDTH))[:, None]
        g1, g2 = r * (g1 - along * y1), r * (g2 - along * y2)
    d1, d2 = g1 * c - g2 * s, g1 * s + g2 * c
    if ORDER == 1:
        r = scale_of(x1, x2, eps, WIDTH)
        along = r * r * (tl.sum(d1 * x1 + d2 * x2, 1) / (2 * WIDTH))[:, None]
        d1, d2 = r * (d1 - along * x1), r * (d2 - along * x2)
    return d1, d2


def forward_kernel(
    q, k, cos, sin, q_out, k_out, tokens, heads, eps, q_row, q_token, q_head, q_channel, k_row, k_token,
    k_head, k_channel, ORDER: tl.constexpr, OFFSET: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr
):
    """Rotate TOKENS tokens of a row, all heads.

    q, k (R, tokens, heads, 2 WIDTH); contiguous tables (tokens, WIDTH) and outputs.
    """
    blocks = tl.cdiv(tokens, TOKENS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (token < tokens) & (column < WIDTH)
    c, s = load(cos, token * WIDTH + column, inside), load(sin, token * WIDTH + column, inside)
    stays = inside & ((column < WIDTH - OFFSET) | (token == 0))  # the others go to the next token
    moves = (token < tokens - 1) & (column < WIDTH) & (column >= WIDTH - OFFSET)
    q_places = row * q_row + token * q_token + column * q_channel
    k_places = row * k_row + token * k_token + column * k_channel
    places = (row * tokens + token) * heads * (2 * WIDTH) + column
    for head in range(heads):
        q1, q2 = load(q, q_places, inside), load(q, q_places + WIDTH * q_channel, inside)
        k1, k2 = load(k, k_places, inside), load(k, k_places + WIDTH * k_channel, inside)
        q1, q2 = placed(q1, q2, c, s, eps, ORDER, WIDTH)
        k1, k2 = placed(k1, k2, c, s, eps, ORDER, WIDTH)
        store(q_out, places, inside, q1)
        store(q_out, places + WIDTH, inside, q2)
        store(k_out, places, stays, k1)
        store(k_out, places + WIDTH, stays, k2)
        if OFFSET > 0:
            store(k_out, places + heads * (2 * WIDTH), moves, k1)
            store(k_out, places + heads * (2 * WIDTH) + WIDTH, moves, k2)
        q, q_out = q + q_head, q_out + 2 * WIDTH
        k, k_out = k + k_head, k_out + 2 * WIDTH


def gradient_kernel(
    q, k, v, cos, sin, gq, gk, dq, dk, dv, tokens, heads, eps, q_row, q_token, q_head, q_channel, k_row,
    k_token, k_head, k_channel, v_row, v_token, v_head, v_channel, gq_row, gq_token, gq_head, gq_channel,
    gk_row, gk_token, gk_head, gk_channel, d_row, d_token, ORDER: tl.constexpr, OFFSET: tl.constexpr,
    VALUES: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr
):
    """dq and dk from q, k and the gradients gq, gk of forward_kernel's outputs; VALUES: v is copied to dv.

    dq, dk and dv have strides (d_row, d_token, 2 WIDTH, 1)."""
    blocks = tl.cdiv(tokens, TOKENS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (token < tokens) & (column < WIDTH)
    c, s = load(cos, token * WIDTH + column, inside), load(sin, token * WIDTH + column, inside)
    stays = inside & ((column < WIDTH - OFFSET) | (token == 0))
    moves = (token < tokens - 1) & (column < WIDTH) & (column >= WIDTH - OFFSET)
    q_places = row * q_row + token * q_token + column * q_channel
    k_places = row * k_row + token * k_token + column * k_channel
    v_places = row * v_row + token * v_token + column * v_channel
    gq_places = row * gq_row + token * gq_token + column * gq_channel
    gk_places = row * gk_row + token * gk_token + column * gk_channel
    places = row * d_row + token * d_token + column
    for head in range(heads):
        x1, x2 = load(q, q_places, inside), load(q, q_places + WIDTH * q_channel, inside)
        g1, g2 = load(gq, gq_places, inside), load(gq, gq_places + WIDTH * gq_channel, inside)
        d1, d2 = unplaced(g1, g2, x1, x2, c, s, eps, ORDER, WIDTH)
        store(dq, places, inside, d1)
        store(dq, places + WIDTH, inside, d2)
        x1, x2 = load(k, k_places, inside), load(k, k_places + WIDTH * k_channel, inside)
        g1, g2 = load(gk, gk_places, stays), load(gk, gk_places + WIDTH * gk_channel, stays)
        if OFFSET > 0:
            g1 += load(gk, gk_places + gk_token, moves)
            g2 += load(gk, gk_places + gk_token + WIDTH * gk_channel, moves)
        d1, d2 = unplaced(g1, g2, x1, x2, c, s, eps, ORDER, WIDTH)
        store(dk, places, inside, d1)
        store(dk, places + WIDTH, inside, d2)
        if VALUES:
            store(dv, places, inside, load(v, v_places, inside))
            store(dv, places + WIDTH, inside, load(v, v_places + WIDTH * v_channel, inside))
            v, dv = v + v_head, dv + 2 * WIDTH
        q, gq, dq = q + q_head, gq + gq_head, dq + 2 * WIDTH
        k, gk, dk = k + k_head, gk + gk_head, dk + 2 * WIDTH


@functools.cache
def kernels() -> tuple[KernelInterface, KernelInterface]:
    """(forward_kernel, gradient_kernel) for Triton; what they call becomes Triton's, too."""
    global tl, load, store, scale_of, placed, unplaced
    import triton
    import triton.language as tl
    load, store, scale_of, placed, unplaced = map(triton.jit, (load, store, scale_of, placed, unplaced))
    return triton.jit(forward_kernel), triton.jit(gradient_kernel)


def launch_options(q: torch.Tensor, order: str | None, offset: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and constants for q (R, T, H, K)."""
    width = q.size(-1) // 2
    columns = 1 << (width - 1).bit_length()
    tile = tiles.best("qk_rotary", q.device, q.dtype, (q.size(2), q.size(3)), DEFAULT)
    tokens = max(1, tile.size // q.element_size() // columns)
    return (q.size(0) * -(-q.size(1) // tokens),), {
        "ORDER": ORDERS.index(order), "OFFSET": offset, "WIDTH": width, "COLUMNS": columns, "TOKENS": tokens,
        "num_warps": tile.warps
    }


def forward(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, order: str | None, eps: float,
    offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k (R, T, H, K) -> the same placed, contiguous."""
    out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    grid, constants = launch_options(q, order, offset)
    kernels()[0][grid](
        q, k, cos.contiguous(), sin.contiguous(), *out, q.size(1), q.size(2), eps, *q.stride(), *k.stride(),
        **constants
    )
    return tuple(out)


def launch_gradient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor,
    gq: torch.Tensor, gk: torch.Tensor, out: tuple[torch.Tensor, ...], order: str | None, eps: float,
    offset: int
) -> None:
    """Run the gradient kernel.

    v: gradient of the values, to be copied, or None. out: dq, dk and dv, which have equal strides.
    """
    grid, constants = launch_options(q, order, offset)
    v, values = (gq, False) if v is None else (v, True)
    strides = [stride for x in (q, k, v, gq, gk) for stride in x.stride()]
    kernels()[1][grid](
        q, k, v, cos.contiguous(), sin.contiguous(), gq, gk, *out, q.size(1), q.size(2), eps, *strides,
        *out[0].stride()[:2], VALUES=values, **constants
    )


def gradient(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, gq: torch.Tensor,
    gk: torch.Tensor, order: str | None, eps: float, offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients gq, gk of the results -> dq, dk (R, T, H, K)."""
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    launch_gradient(q, k, None, cos, sin, gq, gk, (dq, dk, dq), order, eps, offset)
    return dq, dk


def joint_gradient(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, gq: torch.Tensor, gk: torch.Tensor,
    gv: torch.Tensor, order: str | None, eps: float, offset: int
) -> torch.Tensor:
    """Gradients of the three results -> dqkv (R, T, 3, H, K)."""
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    q, k, _ = qkv.unbind(2)
    launch_gradient(q, k, gv, cos, sin, gq, gk, out.unbind(2), order, eps, offset)
    return out


# ----- as operators: torch.compile sees one call each -------------------------------------------------------

PLAN = "str? order, float eps, int offset"

forward_op = torch.library.custom_op(
    "speedrun::qk_rotary", forward, mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor cos, Tensor sin, {PLAN}) -> (Tensor, Tensor)"
)
gradient_op = torch.library.custom_op(
    "speedrun::qk_rotary_gradient", gradient, mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor gq, Tensor gk, {PLAN}) -> (Tensor, Tensor)")
joint_gradient_op = torch.library.custom_op(
    "speedrun::qkv_rotary_gradient", joint_gradient, mutates_args=(),
    schema=f"(Tensor qkv, Tensor cos, Tensor sin, Tensor gq, Tensor gk, Tensor gv, {PLAN}) -> Tensor")


@forward_op.register_fake
def forward_shapes(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, order: str | None, eps: float,
    offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and dtypes of `forward`, for torch.compile."""
    return q.new_empty(q.shape), k.new_empty(k.shape)


@gradient_op.register_fake
def gradient_shapes(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, gq: torch.Tensor,
    gk: torch.Tensor, order: str | None, eps: float, offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and dtypes of `gradient`, for torch.compile."""
    return q.new_empty(q.shape), k.new_empty(k.shape)


@joint_gradient_op.register_fake
def joint_gradient_shape(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, gq: torch.Tensor, gk: torch.Tensor,
    gv: torch.Tensor, order: str | None, eps: float, offset: int
) -> torch.Tensor:
    """Shape and dtype of `joint_gradient`, for torch.compile."""
    return qkv.new_empty(qkv.shape)
