"""Multi-head latent attention and its two decoding caches."""

import math

import torch
from torch import nn

from kernels import attention
from layers.attention import Attention
from layers.primitives import linear, linear_init, parameter, rms_norm
from settings import query_dim, value_dim


class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, eq. 9-19): c = norm(W_dkv x), keys and values W_uk c and W_uv c.

    A head's query and key: `still` channels and `turning` ones with rotary positions; the keys' turning part W_kr x is one for
    all heads. Two caches: [keys, values] of the ordinary form, or [c, turning key, 1 / root mean square of each head's key] of
    the absorbed form, where W_uk moves to the query and W_uv behind the softmax; equal in exact arithmetic.
    """

    def __init__(self, s):
        nn.Module.__init__(self)
        a, latent, d, n = s.model.attn, s.model.attn.latent, s.model.model_dim, s.numerics
        self.num_heads, self.still, self.turning = a.num_heads, latent.still, latent.turning

        def matrix(rows, cols, projection=False):
            return parameter((rows, cols), n.matrix, role="matrix", init=linear_init(s, cols, projection))

        heads, from_ = a.num_heads, latent.query or d
        self.q_down = matrix(latent.query, d) if latent.query else None
        self.q = matrix(heads * query_dim(s), from_)
        self.kv_down, self.k_turning = matrix(latent.kv, d), matrix(latent.turning, d)
        self.k_up, self.v_up = matrix(heads * latent.still, latent.kv), matrix(heads * value_dim(s), latent.kv)
        self.o = matrix(d, heads * value_dim(s), projection=True)
        self.common_parts(s)

    def latents(self, x):
        """x (R, T, D) -> (queries (R, T, H, K), c (R, T, kv), keys' turning part (R, T, 1, turning)), not yet placed."""
        q = x if self.q_down is None else rms_norm(linear(x, self.q_down), self.eps, self.norm_dtype)
        q = linear(q, self.q).unflatten(-1, (self.num_heads, -1))
        down = linear(x, torch.cat([self.kv_down, self.k_turning]))
        c, turning = down.split([len(self.kv_down), self.turning], dim=-1)
        return q, rms_norm(c, self.eps, self.norm_dtype), turning[:, :, None]

    def keys(self, c, turning):
        """(R, T, H, K), not yet placed."""
        still = linear(c, self.k_up).unflatten(-1, (self.num_heads, -1))
        return torch.cat([still, turning.expand(*still.shape[:3], -1)], dim=-1)

    def turn(self, x, rotary, start):
        still, turning = x.split([self.still, self.turning], dim=-1)
        return torch.cat([still, rotary(turning, start)], dim=-1)

    def place(self, x, rotary, start):
        return super().place(x, lambda y, at: self.turn(y, rotary, at), start)

    def forward(self, x, rotary, mix_values, view, scale, cache=None):
        """As Attention.forward. cache: None; [None, None] to begin an ordinary cache, [None, None, None] a latent one."""
        q, c, turning = self.latents(x)
        start = 0 if cache is None or cache[0] is None else cache[0].size(1)
        q = self.place(q, rotary, start)
        if cache is not None and len(cache) == 3:
            self.remember(cache, c, turning, rotary, start)
            if start:
                return self.output(x, self.attend_latent(q, *cache, view, scale), self.o)
        k, v = self.place(self.keys(c, turning), rotary, start), linear(c, self.v_up).unflatten(-1, (self.num_heads, -1))
        if mix_values is not None:
            v = mix_values(v)
        if start:
            k, v = torch.cat([cache[0], k], dim=1), torch.cat([cache[1], v], dim=1)
        if cache is not None and len(cache) == 2:
            cache[:] = [k, v]
        y = attention.attend_cached(q, k, v, *(view or ()), scale=scale) if start else attention.attend(q, k, v, view, scale)
        return self.output(x, y, self.o)

    def remember(self, cache, c, turning, rotary, start):
        """Append these tokens to a latent cache: kv + turning channels a token, and with QK norm one number per head."""
        turned = rotary(turning, start)[:, :, 0]
        inverse = None
        if self.qk_norm is not None:
            k = self.keys(c, turning)
            k = (self.turn(k, rotary, start) if self.qk_norm == "after_rope" else k).to(self.norm_dtype)
            inverse = (k.square().mean(-1) + self.eps).rsqrt()
        new = [c, turned, inverse]
        cache[:] = [b if a is None or b is None else torch.cat([a, b], dim=1) for a, b in zip(cache, new)]

    def attend_latent(self, q, c, turned, inverse, view, scale):
        """The newest token (R, 1, H, K) against the latents of all, of which it is the last. Returns (R, 1, H, value).

        Operands have q's dtype as everywhere, the arithmetic is in float32 at least, as inside attention kernels: logits of 16
        bits would be off by 1 in 256.
        """
        narrow, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        q, c, turned, k_up, v_up = (x.to(narrow).to(wide) for x in (q, c, turned, self.k_up, self.v_up))
        still, turning = q[:, 0].split([self.still, self.turning], dim=-1)  # (R, H, ...)
        absorbed = torch.einsum("rhs,hsc->rhc", still, k_up.unflatten(0, (self.num_heads, -1)))
        logits = absorbed @ c.mT + turning @ turned.mT  # (R, H, T)
        if inverse is not None:
            logits = logits * inverse.mT
        logits = logits * (scale if scale is not None else 1 / math.sqrt(q.size(-1)))
        seen = attention.visible_to_last(c.size(1), c.device, *(view or ()))
        if seen is not None:
            logits = logits.masked_fill(~seen[:, None], -math.inf)
        y = logits.softmax(-1) @ c  # (R, H, kv)
        return torch.einsum("rhc,hvc->rhv", y, v_up.unflatten(0, (self.num_heads, -1)))[:, None].to(narrow)
