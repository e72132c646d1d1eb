"""Self-attention of one layer, and what one forward pass lets it see."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from kernels import attention
from kernels.qk_rotary import qkv_rotary
from layers.primitives import constant, dtype, linear, linear_init, parameter, rms_norm
from settings import head_dim


@dataclass
class Context:
    """What the attention of one forward sees, by layer, and the softmax scale.

    views: kernels.attention.View, or for one token after a cache (documents, Window); None in layers without attention.
    """
    views: list
    scale: float | None

    def backends(self):
        return sorted({view.backend for view in self.views if view is not None})


class Attention(nn.Module):
    """q, k, v and output projection in one tensor (4, D, D): how it is cut for Muon is the optimizer's business."""

    def __init__(self, s):
        super().__init__()
        a, d, n = s.model.attn, s.model.model_dim, s.numerics
        self.num_heads, self.head_dim = a.num_heads, head_dim(s)
        inner, out = linear_init(s, d, projection=False), linear_init(s, d, projection=True)
        self.qkvo = parameter((4, d, d), n.matrix, role="matrix", label="qkvo", init=None, parts=[inner, inner, inner, out])
        self.bias = None
        if s.model.bias:
            self.bias = parameter((4, d), n.scalar, role="scalar", init=constant(0.0))
        self.fused = s.system.kernels.qk == "triton"
        self.common_parts(s)

    def common_parts(self, s):
        """What every kind of attention has: head gate, QK norm, scale of the branch."""
        a, n = s.model.attn, s.numerics
        self.gate = None
        if a.gate:
            self.gate = parameter((a.num_heads, a.gate.channels), n.gate, role="matrix", init=constant(0.0))
        self.qk_norm = a.qk_norm.order if a.qk_norm else None
        self.eps, self.norm_dtype = n.norm_eps, dtype(n.norm)
        self.branch_scale = 1 / math.sqrt(2 * s.model.num_layers) if a.depth_scale else None

    def forward(self, x, rotary, mix_values, view, scale, cache=None):
        """x: (R, T, D) normed, in the matmul dtype. mix_values: function of v (residual or embedding) or None.

        view, scale: what is visible and the softmax scale (Context). cache: None, or this layer's (keys, values) list for
        generation, extended here. Returns (R, T, D).
        """
        rows, tokens, d = x.shape
        w_qkv, w_o = self.qkvo.split([3, 1])
        b_qkv, b_o = (None, None) if self.bias is None else self.bias.split([3, 1])
        qkv = linear(x, w_qkv.reshape(3 * d, d), None if b_qkv is None else b_qkv.reshape(3 * d))
        qkv = qkv.view(rows, tokens, 3, self.num_heads, self.head_dim)
        start = 0 if cache is None or cache[0] is None else cache[0].size(1)
        if self.fused and cache is None:
            q, k, v = qkv_rotary(qkv, rotary.cos[:tokens], rotary.sin[:tokens], order=self.qk_norm, eps=self.eps)
        else:
            q, k, v = qkv.unbind(2)
            q, k = self.place(q, rotary, start), self.place(k, rotary, start)
        if mix_values is not None:
            v = mix_values(v)
        if start:
            k, v = torch.cat([cache[0], k], dim=1), torch.cat([cache[1], v], dim=1)
        if cache is not None:
            cache[:] = [k, v]
        if start:
            y = attention.attend_cached(q, k, v, *(view or ()), scale=scale)
        else:
            y = attention.attend(q, k, v, view, scale)
        return self.output(x, y, w_o[0], None if b_o is None else b_o[0])

    def output(self, x, y, weight, bias=None):
        """The heads' outputs y (R, T, H, value width), gated by x, through the output projection."""
        if self.gate is not None:  # (R, T, H): one factor per head
            y = y * torch.sigmoid(linear(x[..., :self.gate.size(1)], self.gate))[..., None]
        y = linear(y.flatten(2), weight, bias)
        return y if self.branch_scale is None else self.branch_scale * y

    def place(self, x, rotary, start):
        """QK norm and rotation of (R, T, H, K), in the record's order."""
        if self.qk_norm == "before_rope":
            x = rms_norm(x, self.eps, self.norm_dtype)
        if rotary is not None:
            x = rotary(x, start)
        if self.qk_norm == "after_rope":
            x = rms_norm(x, self.eps, self.norm_dtype)
        return x
