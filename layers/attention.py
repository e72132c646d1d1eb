"""Self-attention of one layer as named steps, and the attention metadata of a forward pass.

Shapes: R rows, T tokens, D model_dim, H heads, K width of a head's query and key, V width of a head's value.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from kernels import attention, eager
from kernels.fp8_linear import LARGEST, fp8_linear
from kernels.fp8_mlp import E4M3, LEAST
from kernels.qk_rotary import offset_keys, qkv_rotary
from layers.compose import composed, excluded
from layers.primitives import bias_init, coefficient, constant, dtype, gradient_unit, linear, linear_init
from layers.primitives import mimetic, parameter, products_dtype, rms_norm
from layers.rotary import Rotary
from layers.specs import AttnSpec, LayerSpec
from settings import Settings
from updates import views


class AttnMeta(NamedTuple):
    """Attention metadata of one layer in one forward pass."""
    # kernels.attention.View; for one token after a cache (documents, Window); None: plain causal attention
    view: Any
    # softmax scale; None: 1 / sqrt(K), or already in the view (attention.traceable)
    scale: float | None
    # (R, T) document number of each token and the softmax scale, where heads are composed
    compose: tuple[torch.Tensor | None, float] | None = None


class AttnCoefs(NamedTuple):
    """Coefficients of one layer's attention in one forward pass; None: the layer does not have it."""
    qkv: Any = None  # factor of W_qkv: a 0-d tensor or number
    o: Any = None  # factor of W_O, likewise
    # factor of each head's output per token (R, T, H), in place of a gate of x
    gate: torch.Tensor | None = None
    xsa: torch.Tensor | None = None  # strength of exclusive self-attention, (H,) or (R, T, H)
    compose: tuple[torch.Tensor, torch.Tensor] | None = None  # w1 and w2 of composed heads, (R, T, H) each


@dataclass
class Context:
    """Attention metadata of one forward pass, and the step's numbers that layers need."""
    layers: list[AttnMeta | None]  # None: a layer without attention
    tokens_per_rank: int | None = None  # of a logical rank in this step; None: as in the first step
    # (R, T) document number of each token, for the MTP module; None: not needed, or one document per row
    documents: torch.Tensor | None = None
    # bits (V, V / 8) uint8 of the tokens that cannot follow a token (data/seams.py), in the final validation
    # of canonical masking; None: any can
    impossible: torch.Tensor | None = None
    # (1 or 2, R, T, width) rows of the bigram table, looked up outside a compiled forward, which has no
    # sparse gradients; None: the forward looks them up
    bigrams: torch.Tensor | None = None

    def backends(self) -> list[str]:
        views = [meta.view for meta in self.layers if meta is not None]
        return sorted({"dense" if view is None else view.backend for view in views})


class Cache(list):
    """The cache of a generation: a list of tensors per layer, and what is kept of the last token."""
    previous: torch.Tensor | None = None  # (R, 1, D), before smear and norm; None: no token yet
    tokens: torch.Tensor | None = None  # (R, T) int64, all tokens so far, for the bigram; None: no token yet
    output: torch.Tensor | None = None  # (R, 1, D), what the head read, before its smear; None: no token yet


def cached_tokens(cache: list | None) -> int:
    """Number of tokens in a layer's cache, which is the position of the next token."""
    return 0 if cache is None or cache[0] is None else cache[0].size(1)


class SALambdas(nn.Module):
    """Factors of W_qkv and of W_O, one of each per layer that has attention (records 47 and 48)."""

    def __init__(self, s: Settings, specs: tuple[LayerSpec, ...]) -> None:
        super().__init__()
        a, n = s.model.attn.sa_lambdas, s.numerics
        layers = [i for i, spec in enumerate(specs) if spec.attn is not None]
        self.number = {layer: k for k, layer in enumerate(layers)}
        self.qkv = coefficient(len(layers), a.qkv, a.learned, n.scalar, "sa_lambdas")
        self.o = None if a.o is None else coefficient(len(layers), a.o, a.learned, n.scalar, "sa_lambdas")

    def begin(self) -> Callable:
        """Function (layer) -> (factor of W_qkv, factor of W_O or None) for one forward pass."""
        qkv, o = self.qkv(), None if self.o is None else self.o()
        return lambda i: (qkv[self.number[i]], None if o is None else o[self.number[i]])


class FP8Projection:
    """The projections q, k and v in FP8 in both passes of training (settings.numerics.FP8QKV)."""

    def __init__(self, s: Settings) -> None:
        f, self.transpose = s.numerics.fp8_qkv, s.system.kernels.transpose
        unit = gradient_unit(s.model.head.loss_reduction, 0)  # tokens do not count: no mean is taken
        self.x, self.grad = 1 / f.x, unit / f.grad

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x (R, T, D), weight (out, D) -> (R, T, out)."""
        weight = weight.to(x.dtype)
        largest = weight.detach().abs().amax().clamp(min=LEAST).float().reshape(1)
        rows = len(weight)
        if rows % 16:  # the products of a GPU need multiples of it; narrow heads of a small model have others
            weight = F.pad(weight, (0, 0, 0, -rows % 16))
        y = fp8_linear(x, weight, self.x, LARGEST[E4M3] / largest, self.grad, self.transpose, E4M3)
        return y[..., :rows]


class Attention(nn.Module):
    """Self-attention with q, k, v and output projection in one tensor (4, D, D).

    Its views (updates/views.py) say how the optimizer cuts that tensor into matrices. Where q and k are cut
    in another way than v and o, or are narrower, there are three: qk (2, H K, D), v (D, D) and o (D, D).
    """

    def __init__(self, s: Settings, spec: AttnSpec) -> None:
        super().__init__()
        d, n = s.model.model_dim, s.numerics
        qk, v = spec.qk_stored or spec.qk, spec.v_stored or spec.v
        if spec.heads * v != d:
            raise ValueError(f"{spec.heads} heads of {v} channels do not make up model_dim = {d}")
        inner = linear_init(s, d, projection=False, bound=s.model.init.qkv_bound)
        o_bound = s.model.init.o_bound
        out = linear_init(s, d, projection=True, bound=o_bound)
        first_v = inner
        if alike := s.model.init.mimetic:
            first_v, out = mimetic(alike.scale, alike.noise), mimetic(-alike.scale, alike.noise)
        rows, muon = spec.heads * qk, s.optim.muon
        self.apart = rows != d or (muon is not None and muon.head_pairs) or s.model.attn.narrow is not None
        common = dict(dtype_name=n.matrix, role="matrix", label="qkvo", init=None)
        if self.apart:
            self.qk = parameter(
                (2, rows, d), parts=[inner, inner], views=views.qk(s), drawn_as="qkvo", **common
            )
            self.v = parameter(
                (d, d), parts=[first_v], first_part=2, views=views.v(s), drawn_as="qkvo", **common
            )
            self.o = parameter((d, d), parts=[out], first_part=3, views=views.o(s), drawn_as="qkvo", **common)
        else:
            parts = [inner, inner, first_v, out]
            self.qkvo = parameter((4, d, d), parts=parts, views=views.qkvo(s), **common)
        self.bias = self.o_bias = None
        if s.model.bias:
            self.bias_parameters(s)
        self.fused = s.system.kernels.qk == "triton" and spec.qk == spec.v == d // spec.heads
        self.fp8 = FP8Projection(s) if n.fp8_qkv else None
        self.common_parts(s, spec)

    def bias_parameters(self, s: Settings) -> None:
        """The biases of q, k, v and o (4, D), or with optim.o_bias of q, k, v (3, D) and of o (1, D)."""
        d, n = s.model.model_dim, s.numerics
        inner, out = (bias_init(s, d, projection) for projection in (False, True))
        common = dict(dtype_name=n.scalar, role="scalar", init=None, drawn_as="bias")
        if s.optim.o_bias is None:
            self.bias = parameter((4, d), label="bias", parts=[inner, inner, inner, out], **common)
        else:
            self.bias = parameter((3, d), label="bias", parts=[inner, inner, inner], **common)
            self.o_bias = parameter((1, d), label="o_bias", parts=[out], first_part=3, **common)

    def biases(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(biases of q, k and v in a row (3 D,), bias of o (D,)), or None and None."""
        if self.bias is None:
            return None, None
        return self.bias[:3].flatten(), (self.bias[3] if self.o_bias is None else self.o_bias[0])

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(W_q, W_k and W_v below each other (2 H K + H V, D), W_O (D, H V)).

        Narrow heads take the first channels of each stored head.
        """
        if self.apart:
            heads, qk, v = self.spec.heads, self.qk.flatten(0, 1), self.v
            if self.spec.qk_stored is not None:
                qk = qk.unflatten(0, (2 * heads, -1))[:, :self.spec.qk].flatten(0, 1)
            if self.spec.v_stored is None:
                return torch.cat([qk, v]), self.o
            v = v.unflatten(0, (heads, -1))[:, :self.spec.v].flatten(0, 1)
            return torch.cat([qk, v]), self.o.unflatten(1, (heads, -1))[:, :, :self.spec.v].flatten(1)
        w_qkv, w_o = self.qkvo.split([3, 1])
        return w_qkv.flatten(0, 1), w_o[0]

    def common_parts(self, s: Settings, spec: AttnSpec) -> None:
        """Set up the parts that LatentAttention has too: gate, QK norm, scale of the branch."""
        a, n = s.model.attn, s.numerics
        self.spec = spec
        self.gate = None
        if spec.gate is not None:
            self.gate = parameter((spec.heads, spec.gate), n.gate, role="matrix", label="gate",
                                  views=views.gate(s), init=constant(0.0))
        self.qk_norm = a.qk_norm.order if a.qk_norm else None
        self.v_norm = a.v_norm
        self.eps = n.norm_eps
        self.qk_eps = n.norm_eps if n.qk_norm_eps is None else n.qk_norm_eps
        self.norm_dtype = dtype(n.norm)
        self.products = products_dtype(s)
        self.branch_scale = 1 / math.sqrt(2 * s.model.num_layers) if a.depth_scale else None
        self.adjacent = a.rope is not None and a.rope.adjacent
        self.offset_adjacent = self.adjacent and not a.key_offset_halves
        self.xsa = None
        if spec.xsa and s.model.token_gates is None:
            self.xsa = coefficient(spec.heads, a.xsa.init, a.xsa.learned, n.scalar, "xsa")

    def forward(self, x: torch.Tensor, rotary: Rotary | None, mix_values: Callable | None, meta: AttnMeta,
                cache: list | None = None, coefs: AttnCoefs = AttnCoefs()) -> torch.Tensor:
        """The attention branch.

        Args:
            x: (R, T, D), normed unless model.attn.raw_input, in the matmul dtype.
            rotary: the rotary positions of this layer, or None.
            mix_values: function (v, x) -> v (value residual or value embedding), or None.
            meta: attention metadata of this layer.
            cache: this layer's [keys, values] in generation, extended here, or None.
            coefs: coefficients from outside the layer.

        Returns: (R, T, D).
        """
        start = cached_tokens(cache)
        w_qkv, w_o = self.weights()
        b_qkv, b_o = self.biases()
        w_qkv, w_o = (w if a is None else a * w.to(x.dtype) for a, w in zip(coefs, (w_qkv, w_o)))
        if self.fp8 is not None and self.training:
            qkv = self.fp8(x, w_qkv)
        else:
            qkv = linear(x, w_qkv, b_qkv, self.products)
        heads, width = self.spec.heads, self.spec.qk
        qk, v = qkv.split([2 * heads * width, heads * self.spec.v], dim=-1)
        # (R, T, 2H, K), (R, T, H, V)
        qk, v = qk.unflatten(-1, (2 * heads, width)), v.unflatten(-1, (heads, -1))
        fused = self.fused and cache is None
        if fused:
            q, k, v = self.apply_rotary_fused(qkv.unflatten(-1, (3, heads, width)), rotary)
        elif eager.applies(qkv):  # queries and keys at once: half the operations
            q, k = self.apply_rotary(qk, rotary, start).chunk(2, dim=2)
        else:
            q, k = (self.apply_rotary(part, rotary, start) for part in qk.chunk(2, dim=2))
        if self.v_norm:
            v = self.norm(v)
        if mix_values is not None:
            v = mix_values(v, x)
        offset = 0 if fused else self.spec.key_offset
        y = self.attend(q, k, v, meta, start, cache, offset, coefs.compose)  # (R, T, H, V)
        y = self.exclude(y, v, coefs.xsa)
        y = self.apply_gate(x, y, coefs.gate)
        return self.out(y, w_o, b_o)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """RMS norm of queries, keys or values (R, T, H, K) per head."""
        if x.dtype == self.norm_dtype and eager.applies(x):
            return eager.RMSNorm.apply(x, self.qk_eps)
        return rms_norm(x, self.qk_eps, self.norm_dtype)

    def rotate(self, x: torch.Tensor, rotary: Rotary, start: int) -> torch.Tensor:
        """Apply rotary positions start, start + 1, ... to queries or keys (R, T, H, K)."""
        return rotary.paired(x, start) if self.spec.paired else rotary(x, start)

    def apply_rotary(self, x: torch.Tensor, rotary: Rotary | None, start: int) -> torch.Tensor:
        """QK norm and rotation of queries or keys (R, T, H, K), in the record's order."""
        if self.qk_norm == "before_rope":
            x = self.norm(x)
        if rotary is not None:
            x = self.rotate(x, rotary, start)
        if self.qk_norm == "after_rope":
            x = self.norm(x)
        return x

    def apply_rotary_fused(
        self, qkv: torch.Tensor, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """QK norm, rotation and key offset in one kernel: qkv (R, T, 3, H, K) -> q, k, v (R, T, H, K)."""
        tokens = qkv.size(1)
        return qkv_rotary(qkv, rotary.cos[:tokens], rotary.sin[:tokens], order=self.qk_norm, eps=self.qk_eps,
                          offset=self.spec.key_offset)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttnMeta, start: int,
        cache: list | None, offset: int = 0, compose: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Softmax attention of q, k (R, T, H, K) and v (R, T, H, V). Returns (R, T, H, V).

        In generation k and v are appended to the cache, and q attends to all of it.

        offset: channel pairs of each key that are replaced by those of the previous token's key. The cache
            holds keys without this replacement, because the next token needs the unmodified last key.
        compose: w1 and w2 of composed heads (layers/compose.py), or None.
        """
        if start:
            k, v = torch.cat([cache[0], k], dim=1), torch.cat([cache[1], v], dim=1)
        if cache is not None:
            cache[:] = [k, v]
        k = offset_keys(k, offset, self.offset_adjacent)
        if self.spec.paired:
            return self.attend_paired(q, k, v, meta, start)
        if start:
            y = attention.attend_cached(q, k, v, *(meta.view or ()), scale=meta.scale)
        else:
            y = attention.attend(q, k, v, meta.view, meta.scale)
        if compose is None:
            return y
        return y + composed(q, k, v, *compose, self.spec.compose, *meta.compose)

    def attend_paired(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttnMeta, start: int
    ) -> torch.Tensor:
        """Attention of paired heads (record 58): heads h and h + H/2 share a sequence of 2T positions.

        Position 2t of sequence h is head h of token t, and 2t + 1 its head h + H/2. Of a new token after a
        cache, the first head does not see the second one.
        """
        shape = q.shape[:3]
        q, k, v = (x.unflatten(2, (2, -1)).flatten(1, 2) for x in (q, k, v))  # (R, 2T, H/2, ...)
        if not start:
            y = attention.attend(q, k, v, meta.view, meta.scale)
        else:
            documents, window = meta.view or (None, attention.CAUSAL)
            known = None if documents is None else documents[:, :-1]
            y = torch.cat([
                attention.attend_cached(q[:, :1], k[:, :-1], v[:, :-1], known, window, meta.scale),
                attention.attend_cached(q[:, 1:], k, v, documents, window, meta.scale)
            ], dim=1)
        return y.reshape(*shape, -1)

    def exclude(self, y: torch.Tensor, v: torch.Tensor, strength: torch.Tensor | None) -> torch.Tensor:
        """XSA of the heads' outputs y (R, T, H, V) along the values v of the same tokens.

        strength: of this layer's heads per token (R, T, H), or None: the learned one, if there is one.
        """
        if strength is None and self.xsa is not None:
            alphas = self.xsa()
            strength = torch.stack(alphas) if isinstance(alphas[0], torch.Tensor) else y.new_tensor(alphas)
        return y if strength is None else excluded(y, v, strength.tanh())

    def apply_gate(self, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply the heads' outputs y (R, T, H, V) by a gate per token and head.

        The gate (R, T, H) is given, or sigmoid(W n), n the first channels of x (R, T, D).
        """
        if gate is not None:
            return y * gate[..., None]
        if self.gate is None:
            return y
        return y * torch.sigmoid(linear(x[..., :self.gate.size(1)], self.gate))[..., None]  # (R, T, H, 1)

    def out(self, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Output projection: heads' outputs y (R, T, H, V) -> (R, T, D)."""
        y = linear(y.flatten(2), weight, bias, self.products)
        return y if self.branch_scale is None else self.branch_scale * y
