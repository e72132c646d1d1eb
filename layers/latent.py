"""Multi-head latent attention and its two decoding caches.

Shapes: R rows, T tokens, D model_dim, H heads, K width of a head's query and key = qk_nope + qk_rope, V width
of a head's value, C width of the latent of keys and values.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from kernels import attention
from layers.attention import Attention, AttnCoefs, AttnMeta, cached_tokens
from layers.primitives import linear, linear_init, parameter, rms_norm
from layers.rotary import Rotary
from layers.specs import AttnSpec
from settings import Settings


class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, eq. 9-19).

    From the latent c = norm(W_dkv x) come the keys W_uk c and the values W_uv c. A head's query and key have
    qk_nope channels without and qk_rope channels with rotary positions; all heads share the rotary part
    W_kr x of the key.

    Two caches, equal in exact arithmetic: the ordinary one holds [keys, values]. The latent one holds [c,
    rotated qk_rope part of the key, 1 / root mean square of each head's key]; it uses the absorbed form, in
    which W_uk is applied to the query and W_uv after the softmax.
    """

    def __init__(self, s: Settings, spec: AttnSpec) -> None:
        nn.Module.__init__(self)
        latent, d, n = s.model.attn.latent, s.model.model_dim, s.numerics
        self.qk_rope = spec.rotary.width
        self.qk_nope = spec.qk - spec.rotary.width

        def matrix(rows, cols, projection=False):
            return parameter((rows, cols), n.matrix, role="matrix", label="latent",
                             init=linear_init(s, cols, projection))

        # W_dq, W_uq, W_dkv, W_kr, W_uk, W_uv, W_o. These names seed the initial values and appear in logs.
        self.q_down = matrix(latent.q_lora_rank, d) if latent.q_lora_rank else None
        self.q = matrix(spec.heads * spec.qk, latent.q_lora_rank or d)
        self.kv_down = matrix(latent.kv_lora_rank, d)
        self.k_rope = matrix(self.qk_rope, d)
        self.k_up = matrix(spec.heads * self.qk_nope, latent.kv_lora_rank)
        self.v_up = matrix(spec.heads * spec.v, latent.kv_lora_rank)
        self.o = matrix(d, spec.heads * spec.v, projection=True)
        self.common_parts(s, spec)

    def forward(
        self, x: torch.Tensor, rotary: Rotary, mix_values: Callable | None, meta: AttnMeta,
        cache: list | None = None, coefs: AttnCoefs = AttnCoefs()
    ) -> torch.Tensor:
        """As Attention.forward.

        cache: [None, None] begins an ordinary cache, [None, None, None] a latent one; None: no cache.
        coefs: only the gate, because factors of the projections, XSA and composed heads exclude latents.
        """
        start = cached_tokens(cache)
        latent_cache = cache is not None and len(cache) == 3
        q, c, k_rope = self.project(x)
        q = self.apply_rotary(q, rotary, start)  # (R, T, H, K)
        if latent_cache:
            self.extend(cache, c, k_rope, rotary, start)
        if latent_cache and start:
            y = self.attend_latent(q, *cache, meta)
        else:
            k = self.apply_rotary(self.keys(c, k_rope), rotary, start)
            v = self.linear(c, self.v_up).unflatten(-1, (self.spec.heads, -1))  # (R, T, H, V)
            if mix_values is not None:
                v = mix_values(v, x)
            y = self.attend(q, k, v, meta, start, None if latent_cache else cache)
        return self.out(self.apply_gate(x, y, coefs.gate), self.o)

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x (R, T, in) times weight (out, in), by numerics.products."""
        return linear(x, weight, None, self.products)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (R, T, D) -> queries (R, T, H, K), c (R, T, C), qk_rope part of the keys (R, T, 1, qk_rope).

        Queries and keys are not yet normed or rotated.
        """
        q = x if self.q_down is None else rms_norm(self.linear(x, self.q_down), self.eps, self.norm_dtype)
        q = self.linear(q, self.q).unflatten(-1, (self.spec.heads, -1))
        down = self.linear(x, torch.cat([self.kv_down, self.k_rope]))
        c, k_rope = down.split([len(self.kv_down), self.qk_rope], dim=-1)
        return q, rms_norm(c, self.eps, self.norm_dtype), k_rope[:, :, None]

    def keys(self, c: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
        """Keys (R, T, H, K) before norm and rotation."""
        k_nope = self.linear(c, self.k_up).unflatten(-1, (self.spec.heads, -1))
        return torch.cat([k_nope, k_rope.expand(*k_nope.shape[:3], -1)], dim=-1)

    def rotate(self, x: torch.Tensor, rotary: Rotary, start: int) -> torch.Tensor:
        """Rotary positions of the last qk_rope channels of x (R, T, H, K)."""
        nope, rope = x.split([self.qk_nope, self.qk_rope], dim=-1)
        return torch.cat([nope, rotary(rope, start)], dim=-1)

    def extend(self, cache: list, c: torch.Tensor, k_rope: torch.Tensor, rotary: Rotary, start: int) -> None:
        """Append these tokens to a latent cache.

        A token takes C + qk_rope numbers, and with QK norm one more per head.
        """
        rotated = rotary(k_rope, start)[:, :, 0]
        inverse = None
        if self.qk_norm is not None:
            k = self.keys(c, k_rope)
            k = (self.rotate(k, rotary, start) if self.qk_norm == "after_rope" else k).to(self.norm_dtype)
            inverse = (k.square().mean(-1) + self.qk_eps).rsqrt()
        new = [c, rotated, inverse]
        cache[:] = [b if a is None or b is None else torch.cat([a, b], dim=1) for a, b in zip(cache, new)]

    def attend_latent(
        self, q: torch.Tensor, c: torch.Tensor, k_rope: torch.Tensor, inverse: torch.Tensor | None,
        meta: AttnMeta
    ) -> torch.Tensor:
        """Attention of the newest token q (R, 1, H, K) over the cached latents. Returns (R, 1, H, V).

        Operands have q's dtype, and the arithmetic is at least float32, as inside attention kernels: logits
        in bfloat16 would be off by 1 in 256.
        """
        narrow, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        q, c, k_rope, k_up, v_up = (x.to(narrow).to(wide) for x in (q, c, k_rope, self.k_up, self.v_up))
        q_nope, q_rope = q[:, 0].split([self.qk_nope, self.qk_rope], dim=-1)  # (R, H, ...)
        absorbed = torch.einsum("rhs,hsc->rhc", q_nope, k_up.unflatten(0, (self.spec.heads, -1)))
        logits = absorbed @ c.mT + q_rope @ k_rope.mT  # (R, H, T)
        if inverse is not None:
            logits = logits * inverse.mT
        logits = logits * (meta.scale if meta.scale is not None else 1 / math.sqrt(q.size(-1)))
        seen = attention.visible_to_last(c.size(1), c.device, *(meta.view or ()))
        if seen is not None:
            logits = logits.masked_fill(~seen[:, None], -math.inf)
        y = logits.softmax(-1) @ c  # (R, H, C)
        return torch.einsum("rhc,hvc->rhv", y, v_up.unflatten(0, (self.spec.heads, -1)))[:, None].to(narrow)
