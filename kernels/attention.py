"""Causal softmax attention. The reference is torch's scaled_dot_product_attention, on any device and dtype.

Shapes: R rows, T tokens, H heads, K head width.
"""

import torch.nn.functional as F


def attend(q, k, v):
    """Causal attention within each row, logits scaled by 1/sqrt(K).

    q, k, v: (R, T, H, K), one dtype. Returns (R, T, H, K). A query sees the keys at its own and earlier positions.
    """
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return y.transpose(1, 2)


def attend_cached(q, k, v):
    """One new query per row against all cached keys. q: (R, 1, H, K); k, v: (R, T, H, K). Returns (R, 1, H, K)."""
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return y.transpose(1, 2)
