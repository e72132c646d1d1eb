"""Heads that exchange what they attend to: XSA (record 82) and composed heads (record 85).

Shapes: R rows, T tokens, H heads, K width of a query and key, V width of a value.
"""

import math

import torch
import torch.nn.functional as F

LEAST_SQUARE = 1e-8  # below this, the squared length of a value counts as this (record 86)
NORM_EPS = 1e-6  # of the norm of w1 over the heads


def excluded(y: torch.Tensor, v: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Exclusive self-attention: y (R, T, H, V) less its part along each token's own value v (R, T, H, V).

    strength: (..., H), 1 removes all of that part.
    """
    along = (y * v).sum(-1) / (v * v).sum(-1).clamp_min(LEAST_SQUARE)
    return y - (strength * along)[..., None].to(y.dtype) * v


def composed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, window: int,
    documents: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """What composition adds to the heads' outputs: w2_h(t) sum_u A(t, u) v_h(u), A(t, u) = sum_h w1_h P_h(t,
    u).

    P_h(t, .) is the softmax of head h over the last `window` tokens of t's document, t among them.

    Args:
        q, k: (R, T, H, K) and (R, U, H, K) as attention gets them; the queries are those of the last T of U
            tokens. v: (R, U, H, V).
        w1, w2: (R, T, H) coefficients per token. w1 is divided by its root mean square over the heads.
        documents: (R, U) document number of each token; None: each row is one.
        scale: softmax scale.

    Returns: (R, T, H, V) in q's dtype. The arithmetic is at least float32.
    """
    rows, tokens, heads, _ = q.shape
    total, narrow = k.size(1), q.dtype
    window = min(window, total)  # what lies before the row is never seen, and costs memory
    wide = torch.promote_types(narrow, torch.float32)
    w1, w2 = w1.to(wide), w2.to(wide)
    w1 = w1 * torch.rsqrt(w1.square().mean(-1, keepdim=True) + NORM_EPS)
    # Blocks of queries, each against the keys that it may see: itself and window - 1 tokens before.
    size = min(max(window, 16), tokens)
    blocks = math.ceil(tokens / size)
    before, after = window - 1, blocks * size - tokens
    first = total - tokens  # position of the first query

    def banded(x):
        """(R, U, ...) -> (R, blocks, size + before, ...): the keys of each block of queries."""
        x = x.movedim(1, -1)
        lacking = max(0, before - first)
        x = F.pad(x[..., max(0, first - before):], (lacking, after))
        return x.unfold(-1, size + before, size).movedim((-2, -1), (1, 2))

    def blocked(x):
        """(R, T, ...) -> (R, blocks, size, ...)."""
        return F.pad(x.movedim(1, -1), (0, after)).movedim(-1, 1).unflatten(1, (blocks, size))

    at = torch.arange(size + before, device=q.device)
    gap = torch.arange(size, device=q.device)[:, None] + before - at  # query - key, the same in every block
    seen = (gap >= 0) & (gap < window)
    # no padding in front
    real = (torch.arange(blocks, device=q.device)[:, None] * size + at) >= before - first
    seen = seen & real[:, None]  # (blocks, size, size + before)
    if documents is not None:
        numbers = documents + 1  # padding is 0
        seen = seen & (blocked(numbers[:, first:])[..., None] == banded(numbers)[:, :, None])
    logits = torch.einsum("rbqhk,rbshk->rbhqs", blocked(q.to(wide)), banded(k.to(wide))) * scale
    mask = seen.unsqueeze(-3)  # over the heads
    # A query beyond the last token sees nothing; its row is dropped below and must stay finite.
    p = logits.masked_fill(~mask, torch.finfo(wide).min).softmax(-1)
    a = torch.einsum("rbhqs,rbqh->rbqs", p, blocked(w1))
    out = torch.einsum("rbqs,rbshv->rbqhv", a.masked_fill(~seen, 0.0), banded(v.to(wide)))
    out = out.flatten(1, 2)[:, :tokens]
    return (w2[..., None] * out).to(narrow)
