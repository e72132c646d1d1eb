"""Self-attention of one layer as named steps, and what one forward pass lets it see.

Shapes: R rows, T tokens, D model_dim, H heads, K width of a head's query and key, V width of a head's value.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from kernels import attention, eager
from kernels.qk_rotary import offset_keys, qkv_rotary
from layers.primitives import coefficient, constant, dtype, linear, linear_init, parameter, products_dtype
from layers.primitives import rms_norm
from layers.rotary import Rotary
from layers.specs import AttnSpec, LayerSpec
from settings import Settings
from updates import views


class AttnMeta(NamedTuple):
    """Attention metadata of one layer in one forward pass."""
    # kernels.attention.View; for one token after a cache (documents, Window); None: plain causal attention
    view: Any
    # of the softmax's logits; None: 1 / sqrt(K), or part of the view (attention.traceable)
    scale: float | None


@dataclass
class Context:
    """Attention metadata of one forward pass, and what else the layers are told of the step's Shape."""
    layers: list[AttnMeta | None]  # None: a layer without attention
    tokens_per_rank: int | None = None  # of a logical rank in this step; None: as in the first step
    # (R, T) number of each token's document, for the MTP module; None: not needed, or a row is one document
    documents: torch.Tensor | None = None

    def backends(self) -> list[str]:
        views = [meta.view for meta in self.layers if meta is not None]
        return sorted({"dense" if view is None else view.backend for view in views})


class Cache(list):
    """What generation keeps of past tokens: a list of tensors per layer, and the last token's embedding."""
    previous: torch.Tensor | None = None  # (R, 1, D), before smear and norm; None: no token yet


def cached_tokens(cache: list | None) -> int:
    """How many tokens a layer's cache holds (the position of the next one)."""
    return 0 if cache is None or cache[0] is None else cache[0].size(1)


class SALambdas(nn.Module):
    """Factors of the projections of attention, one of each kind per layer that has attention (records 47 and
    48)."""

    def __init__(self, s: Settings, specs: tuple[LayerSpec, ...]):
        super().__init__()
        a, n = s.model.attn.sa_lambdas, s.numerics
        layers = [i for i, spec in enumerate(specs) if spec.attn is not None]
        self.number = {layer: k for k, layer in enumerate(layers)}
        self.qkv = coefficient(len(layers), a.qkv, a.learned, n.scalar, "sa_lambdas")
        self.o = None if a.o is None else coefficient(len(layers), a.o, a.learned, n.scalar, "sa_lambdas")

    def begin(self) -> Callable:
        """Function layer -> factors of W_qkv and of W_O (None: 1) for one forward pass."""
        qkv, o = self.qkv(), None if self.o is None else self.o()
        return lambda i: (qkv[self.number[i]], None if o is None else o[self.number[i]])


class Attention(nn.Module):
    """q, k, v and output projection in one tensor (4, D, D): how it is cut for Muon is the optimizer's
    business."""

    def __init__(self, s: Settings, spec: AttnSpec):
        super().__init__()
        d, n = s.model.model_dim, s.numerics
        if spec.heads * spec.qk != d or spec.heads * spec.v != d:
            raise ValueError(
                f"{spec.heads} heads of {spec.qk} and {spec.v} channels do not make up model_dim = {d}"
            )
        inner = linear_init(s, d, projection=False, bound=s.model.init.qkv_bound)
        out = linear_init(s, d, projection=True)
        self.qkvo = parameter(
            (4, d, d), n.matrix, role="matrix", label="qkvo", init=None, parts=[inner, inner, inner, out],
            views=views.qkvo(s)
        )
        self.bias = None
        if s.model.bias:
            self.bias = parameter((4, d), n.scalar, role="scalar", label="bias", init=constant(0.0))
        self.fused = s.system.kernels.qk == "triton"
        self.common_parts(s, spec)

    def common_parts(self, s: Settings, spec: AttnSpec) -> None:
        """What every kind of attention has: gate, QK norm, scale of the branch."""
        a, n = s.model.attn, s.numerics
        self.spec = spec
        self.gate = None
        if spec.gate is not None:
            self.gate = parameter((spec.heads, spec.gate), n.gate, role="matrix", label="gate",
                                  views=views.gate(s), init=constant(0.0))
        self.qk_norm = a.qk_norm.order if a.qk_norm else None
        self.eps = n.norm_eps
        self.qk_eps = n.norm_eps if n.qk_norm_eps is None else n.qk_norm_eps
        self.norm_dtype = dtype(n.norm)
        self.products = products_dtype(s)
        self.branch_scale = 1 / math.sqrt(2 * s.model.num_layers) if a.depth_scale else None

    def forward(self, x: torch.Tensor, rotary: Rotary | None, mix_values: Callable | None, meta: AttnMeta,
                cache: list | None = None, lambdas: tuple = (None, None)) -> torch.Tensor:
        """The attention branch.

        Args:
            x: (R, T, D), normed, in the matmul dtype.
            rotary: function (x, start) of this layer's rotary positions.
            mix_values: function of v and x (value residual or embedding), or None.
            meta: what is visible, and the softmax scale.
            cache: this layer's [keys, values] in generation, extended here, or None.
            lambdas: factors of W_qkv and W_O (SALambdas), each a 0-d tensor or number, or None.

        Returns: (R, T, D).
        """
        start = cached_tokens(cache)
        w_qkv, w_o = self.qkvo.split([3, 1])
        b_qkv, b_o = (None, None) if self.bias is None else self.bias.split([3, 1])
        w_qkv, w_o = (w if a is None else a * w.to(x.dtype) for a, w in zip(lambdas, (w_qkv, w_o)))
        qkv = self.project(x, w_qkv, b_qkv)  # (R, T, 3, H, K)
        fused = self.fused and cache is None
        if fused:
            q, k, v = self.apply_rotary_fused(qkv, rotary)
        elif eager.applies(qkv):  # queries and keys at once: half the operations
            qk, v = qkv.split([2, 1], dim=2)
            q, k = self.apply_rotary(qk.flatten(2, 3), rotary, start).chunk(2, dim=2)
            v = v.squeeze(2)
        else:
            q, k, v = qkv.unbind(2)
            q, k = self.apply_rotary(q, rotary, start), self.apply_rotary(k, rotary, start)
        if mix_values is not None:
            v = mix_values(v, x)
        y = self.attend(q, k, v, meta, start, cache, 0 if fused else self.spec.key_offset)  # (R, T, H, V)
        y = self.apply_gate(x, y)
        return self.out(y, w_o[0], None if b_o is None else b_o[0])

    def project(self, x, weight, bias):
        """x (R, T, D) -> queries, keys and values in one tensor (R, T, 3, H, K)."""
        d = x.size(-1)
        bias = None if bias is None else bias.reshape(3 * d)
        qkv = linear(x, weight.reshape(3 * d, d), bias, self.products)
        return qkv.view(*x.shape[:2], 3, self.spec.heads, self.spec.qk)

    def norm(self, x):
        """QK norm of queries or keys (R, T, H, K)."""
        if x.dtype == self.norm_dtype and eager.applies(x):
            return eager.RMSNorm.apply(x, self.qk_eps)
        return rms_norm(x, self.qk_eps, self.norm_dtype)

    def rotate(self, x, rotary, start):
        """Rotary positions of queries or keys (R, T, H, K), the first of which stands at `start`."""
        return rotary(x, start)

    def apply_rotary(self, x, rotary, start):
        """QK norm and rotation of queries or keys (R, T, H, K), in the record's order."""
        if self.qk_norm == "before_rope":
            x = self.norm(x)
        if rotary is not None:
            x = self.rotate(x, rotary, start)
        if self.qk_norm == "after_rope":
            x = self.norm(x)
        return x

    def apply_rotary_fused(self, qkv, rotary):
        """The same of queries and keys and the key offset in one kernel. Returns q, k, v (R, T, H, K)."""
        tokens = qkv.size(1)
        return qkv_rotary(qkv, rotary.cos[:tokens], rotary.sin[:tokens], order=self.qk_norm, eps=self.qk_eps,
                          offset=self.spec.key_offset)

    def attend(self, q, k, v, meta, start, cache, offset=0):
        """Softmax attention, in generation over the cache and these tokens, which are appended to it. Returns
        (R, T, H, V).

        offset: channel pairs of the keys that are still to be replaced by those of the previous token. The
        cache holds the keys before that, because the next token needs this one's own.
        """
        if start:
            k, v = torch.cat([cache[0], k], dim=1), torch.cat([cache[1], v], dim=1)
        if cache is not None:
            cache[:] = [k, v]
        k = offset_keys(k, offset)
        if start:
            return attention.attend_cached(q, k, v, *(meta.view or ()), scale=meta.scale)
        return attention.attend(q, k, v, meta.view, meta.scale)

    def apply_gate(self, x, y):
        """The heads' outputs y (R, T, H, V) times one factor per token and head, from the first channels of x
        (R, T, D)."""
        if self.gate is None:
            return y
        return y * torch.sigmoid(linear(x[..., :self.gate.size(1)], self.gate))[..., None]  # (R, T, H, 1)

    def out(self, y, weight, bias=None):
        """The heads' outputs y (R, T, H, V) through the output projection: (R, T, D)."""
        y = linear(y.flatten(2), weight, bias, self.products)
        return y if self.branch_scale is None else self.branch_scale * y
