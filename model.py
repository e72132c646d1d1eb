"""GPT and every architectural feature of the lineage.

The constructors choose parts from the settings once; forward reads like the equations. A feature that is off is None
or a plain constant, and costs nothing. Shapes: R rows (sequences), T tokens, D model_dim, H heads, K head_dim,
F hidden width, V padded vocabulary, L layers, E experts. Every rule that looks back acts along T; nothing joins across R.

No dtype is written here: all come from the precision plan (settings.numerics).
"""

import functools
import hashlib
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import attention, experts
from kernels.cross_entropy import linear_cross_entropy
from kernels.fp8_linear import fp8_linear
from kernels.fp8_mlp import LEAST, fp8_mlp
from kernels.linear_relu_sq import mlp_relu_sq
from kernels.qk_rotary import qkv_rotary
from schedule import layer_spans, shape
from settings import (LOGICAL_RANKS, check_processes, head_dim, padded_vocab, query_dim, rotary_dim,
                      table_rows, value_dim)
from common.errors import UserError


def dtype(name):
    return getattr(torch, name)


# ----- parameters -------------------------------------------------------------------------------------------------

def normal(std):
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def uniform(bound):
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)


def constant(value):
    return lambda tensor, generator: tensor.fill_(value)


def parameter(shape, dtype_name, *, role, init, parts=None, first_part=0, label=""):
    """A parameter with its optimizer role (embed, lm_head, matrix, scalar, router), an optional label and its initialiser.

    parts: initialisers of the slices along dim 0, where several logical matrices share one tensor; first_part: number of
    the first one, where other processes hold those before it. The values are filled by GPT.initialise, not here.
    """
    p = nn.Parameter(torch.empty(shape, dtype=dtype(dtype_name)))
    p.role, p.label, p.parts, p.first_part = role, label, parts or [init], first_part
    return p


def linear_init(s, fan_in, projection):
    """Initialiser of a linear weight; `projection`: one that writes into the residual stream."""
    if projection and s.model.init.zero_proj:
        return constant(0.0)
    if s.model.init.scheme == "gpt2":
        return normal(0.02 / math.sqrt(2 * s.model.num_layers) if projection else 0.02)
    return uniform(s.model.init.bound / math.sqrt(fan_in))


# ----- coefficients: values with a source -------------------------------------------------------------------------

class Learned(nn.Module):
    """One learned scalar per use, kept in one vector (n,). Called, it gives a list of n 0-d tensors."""

    def __init__(self, n, value, dtype_name, sigmoid):
        super().__init__()
        self.value = parameter((n,), dtype_name, role="scalar", init=constant(value))
        self.sigmoid = sigmoid

    def forward(self):
        return (torch.sigmoid(self.value) if self.sigmoid else self.value).unbind()


class Constant(nn.Module):
    """The same coefficient as a plain number: what a learned one becomes when its source is switched off."""

    def __init__(self, n, value):
        super().__init__()
        self.values = [value] * n

    def forward(self):
        return self.values


def coefficient(n, value, learned, dtype_name, sigmoid=False):
    """n coefficients that start at `value` (before the sigmoid, if there is one)."""
    if learned:
        return Learned(n, value, dtype_name, sigmoid)
    return Constant(n, 1 / (1 + math.exp(-value)) if sigmoid else value)


def scale_add(a, x, b, y):
    """a x + b y, leaving out a term whose constant coefficient is 0 and a factor that is 1."""
    left = x if isinstance(a, float) and a == 1 else a * x
    if isinstance(b, float) and b == 0:
        return left
    return left + (y if isinstance(b, float) and b == 1 else b * y)


# ----- norm, linear, rotary ---------------------------------------------------------------------------------------

class Norm(nn.Module):
    """rmsnorm: x / sqrt(mean(x^2) + eps), no gain. layernorm: with gain and bias. Statistics in numerics.norm."""

    def __init__(self, s):
        super().__init__()
        n = s.numerics
        self.eps, self.dtype = n.norm_eps, dtype(n.norm)
        self.gain = self.bias = None
        if s.model.norm == "layernorm":
            self.gain = parameter((s.model.model_dim,), n.scalar, role="scalar", init=constant(1.0))
            self.bias = parameter((s.model.model_dim,), n.scalar, role="scalar", init=constant(0.0))

    def forward(self, x):
        if self.gain is None:
            return rms_norm(x, self.eps, self.dtype)
        y = F.layer_norm(x.to(self.dtype), x.shape[-1:], self.gain.to(self.dtype), self.bias.to(self.dtype), self.eps)
        return y.to(x.dtype)


def rms_norm(x, eps, stat_dtype):
    """x (..., n) divided by its root mean square; computed in stat_dtype, returned in x's dtype."""
    return F.rms_norm(x.to(stat_dtype), x.shape[-1:], eps=eps).to(x.dtype)


def linear(x, weight, bias=None):
    """x (..., in) times weight (out, in), the weight cast to x's dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Rotary(nn.Module):
    """Rotary positions: pairs (j, j + K/2) turned by -t f_j, t = index in the row (never reset at documents).

    full (records 2 to 16): f_j = base^(-2j/K). half (record 17 on): f_j = base^(-j/(K/4-1)) for the first K/4 pairs,
    the others stand still. With yarn the tables follow the long window; `follow` must be told its sizes.
    """

    def __init__(self, s):
        super().__init__()
        n, self.rope, self.width = s.numerics, s.model.attn.rope, rotary_dim(s)
        self.table_dtype, self.frequency_dtype, self.math_dtype = dtype(n.rope), dtype(n.rope_frequency), dtype(n.rope_math)
        self.block = s.model.attn.window.block if s.model.attn.window else None
        self.length = max(s.data.seq_len, s.validation.seq_len)
        self.register_buffer("cos", torch.empty(self.length, self.width // 2, dtype=self.table_dtype), persistent=False)
        self.register_buffer("sin", torch.empty(self.length, self.width // 2, dtype=self.table_dtype), persistent=False)

    def frequencies(self, long_blocks):
        """(f (K/2,), factor of the attention scale) after the long window went through these sizes."""
        work = torch.float64 if self.table_dtype == torch.float64 else torch.float32  # as the originals: float32 angles
        if self.rope.half:
            turning = self.width // 4
            f = (1 / self.rope.base) ** torch.linspace(0, 1, turning, dtype=work)
            f = torch.cat([f, f.new_zeros(self.width // 2 - turning)])
        else:
            f = 1 / self.rope.base ** (torch.arange(0, self.width, 2, dtype=work) / self.width)
        yarn, factor = self.rope.yarn, 1.0
        for a, b in zip(long_blocks, long_blocks[1:]) if yarn else ():
            turns = self.block * a * f / (2 * math.pi)
            keep = ((turns - yarn.alpha) / (yarn.beta - yarn.alpha)).clamp(0, 1)
            f = f * (a / b + keep * (1 - a / b))
            factor *= 1 + yarn.gain * math.log(b / a)
        return f.to(self.frequency_dtype).to(work), factor

    @torch.no_grad()
    def follow(self, long_blocks=()):
        """Fill the tables for the long window's sizes so far. Returns the factor of the attention scale."""
        f, factor = self.frequencies(long_blocks)
        if self.cos.is_cuda:  # a quarter of a million positions: made where they are used, this is on the clock
            f = f.pin_memory().to(self.cos.device, non_blocking=True)
        angle = torch.outer(torch.arange(self.length, dtype=f.dtype, device=f.device), f)
        self.cos.copy_(angle.cos())
        self.sin.copy_(angle.sin())
        return factor

    def forward(self, x, start=0):
        """x: (R, T, H, K) at positions start..start+T-1 of its row. Returned in x's dtype."""
        cos = self.cos[start:start + x.size(1), None]
        sin = self.sin[start:start + x.size(1), None]
        x1, x2 = x.to(torch.promote_types(x.dtype, self.math_dtype)).chunk(2, dim=-1)
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)


# ----- embedding --------------------------------------------------------------------------------------------------

class Embedding(nn.Module):
    """Token ids (R, T) -> stream (R, T, D). When tied, the table is the head's weight and belongs to its group."""

    def __init__(self, s):
        super().__init__()
        m, n = s.model, s.numerics
        tied = m.head.untied is None
        if m.init.scheme == "gpt2":
            init = normal(0.02)
        else:  # records 2-7: what both share is the head's default linear initialisation
            init = uniform(1 / math.sqrt(m.model_dim)) if tied else normal(1.0)
        rows = padded_vocab(s) if tied else table_rows(s)
        self.table = parameter((rows, m.model_dim), n.table, role="lm_head" if tied else "embed", init=init)
        self.positions = None
        if m.embed.learned_positions:
            self.positions = parameter((s.data.seq_len, m.model_dim), n.table, role="embed", init=normal(0.02))
        self.norm = Norm(s) if m.embed.norm else None
        self.residual_dtype = dtype(n.residual)

    def forward(self, tokens, start=0):
        x = F.embedding(tokens, self.table).to(self.residual_dtype)
        if self.positions is not None:
            x = x + self.positions[start:start + tokens.size(1)].to(self.residual_dtype)
        return x if self.norm is None else self.norm(x)


# ----- values -----------------------------------------------------------------------------------------------------

class ValueResidual(nn.Module):
    """v <- (1 - lam) v + lam v1, v1 the values of block 0 (record 9)."""

    def __init__(self, s):
        super().__init__()
        v = s.model.attn.value_residual
        self.lam = coefficient(s.model.num_layers, v.init, v.learned, s.numerics.scalar)

    def begin(self, tokens):
        """Function (layer, v) -> v for one forward pass."""
        lam, first = self.lam(), []

        def mix(i, v):
            if i == 0:  # (1 - lam) v1 + lam v1 = v1, and lam gets no gradient
                first.append(v)
                return v
            return ((1 - lam[i]) * v + lam[i] * first[0]).to(v.dtype)

        return mix


class ValueEmbed(nn.Module):
    """v <- a v + b ve, ve the token's row of the layer's table (record 14 on); a = 1 - b with mix `lerp`."""

    def __init__(self, s):
        super().__init__()
        e, n = s.model.attn.value_embed, s.numerics
        self.index, self.lerp, self.dtype = e.tables, e.mix == "lerp", dtype(n.residual)
        self.tables = nn.ParameterList(parameter((table_rows(s), s.model.model_dim), n.table, role="embed", init=normal(1.0))
                                       for _ in range(max(e.tables) + 1))
        self.place = {i: k for k, i in enumerate(attention_layers(s))}  # layers without attention have no coefficients
        self.v = None if self.lerp else coefficient(len(self.place), e.init, e.learned, n.scalar)
        self.ve = coefficient(len(self.place), e.init, e.learned, n.scalar)

    def begin(self, tokens):
        a, b = self.v() if self.v is not None else None, self.ve()
        rows = [F.embedding(tokens, table).to(self.dtype) for table in self.tables]

        def mix(i, v):
            k, table = self.place[i], self.index[i]
            keep = 1 - b[k] if self.lerp else a[k]
            if table < 0:
                return v if self.lerp else (keep * v).to(v.dtype)
            return (keep * v + b[k] * rows[table].view(v.shape)).to(v.dtype)

        return mix


def attention_layers(s):
    return [i for i in range(s.model.num_layers) if i not in s.model.attn.drop_layers]


# ----- attention, MLP ---------------------------------------------------------------------------------------------

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


class EightBit(nn.Module):
    """The products of one MLP in FP8 (settings.FP8MLP), and the delayed scales of the second one, which are state.

    activation (logical ranks of this process,): a queue. A forward takes the scales of its ranks from the front and puts
    their next ones at the back, so that after the forwards of a step each is in its place again, however many ranks a
    forward has: one scale for each logical rank, as on eight processes. weight: refreshed before the forwards of a step;
    following: what it will be at the next refresh. The first product has no state: its weight's scale is made in each
    forward, which is the same as after each update, because no weight moves in between.
    """

    def __init__(self, s):
        super().__init__()
        self.delayed, self.tokens_per_rank = s.numerics.fp8_mlp.down, shape(s, 0).tokens_per_rank
        self.dtype, self.fused = dtype(s.numerics.matmul), s.system.kernels.mlp == "triton"
        if self.delayed is not None:
            ranks = LOGICAL_RANKS // (dist.get_world_size() if dist.is_initialized() else 1)
            self.register_buffer("activation", torch.ones(ranks), persistent=False)
            self.register_buffer("weight", torch.ones(()), persistent=False)
            self.register_buffer("following", torch.ones(()), persistent=False)
            self.register_buffer("refreshes", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x, up, down):
        """x (R, T, D) of whole logical ranks, or of a part of one -> (R, T, D)."""
        rows = x.flatten(0, 1)
        parts = max(1, len(rows) // self.tokens_per_rank)
        scales = None if self.delayed is None else (self.activation[:parts], self.weight)
        y, largest = fp8_mlp(rows, up.to(x.dtype), down.to(x.dtype), parts, scales, self.fused)
        if self.delayed is not None:
            new = largest.clamp(min=LEAST) * (self.delayed.activation / 448)
            self.activation.copy_(torch.cat([self.activation[parts:], new]))
        return y.view(x.shape)

    @torch.no_grad()
    def refresh(self, down):
        """Before the forwards of a step: the weight's scale, by its largest entry a step ago or, at first, now."""
        if self.delayed is None:
            return
        largest = torch.linalg.vector_norm(down, math.inf).to(self.dtype).clamp(min=LEAST)
        exact = (largest / 448).float()
        self.weight.copy_(torch.where(self.refreshes <= self.delayed.exact_steps, exact, self.following))
        self.following.copy_(largest.float() * (self.delayed.weight / 448))
        self.refreshes += 1

    def reset(self):
        if self.delayed is not None:
            for buffer in (self.activation, self.weight, self.following):
                buffer.fill_(1.0)
            self.refreshes.zero_()


class MLP(nn.Module):
    """W_down phi(W_up x), hidden width F: expansion * D, or given."""

    ACTIVATIONS = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "relu_sq": lambda x: F.relu(x).square()}

    def __init__(self, s, hidden=None):
        super().__init__()
        d, n = s.model.model_dim, s.numerics
        f = hidden or s.model.mlp.expansion * d
        self.up = parameter((f, d), n.matrix, role="matrix", label="mlp_up", init=linear_init(s, d, projection=False))
        self.down = parameter((d, f), n.matrix, role="matrix", init=linear_init(s, f, projection=True))
        self.up_bias = self.down_bias = None
        if s.model.bias:
            self.up_bias = parameter((f,), n.scalar, role="scalar", init=constant(0.0))
            self.down_bias = parameter((d,), n.scalar, role="scalar", init=constant(0.0))
        self.activation, self.fused = self.ACTIVATIONS[s.model.mlp.activation], s.system.kernels.mlp == "triton"
        self.eight_bit = EightBit(s) if n.fp8_mlp else None

    def forward(self, x):
        if self.eight_bit is not None and self.training:
            return self.eight_bit(x, self.up, self.down)
        if self.fused:
            return mlp_relu_sq(x, self.up, self.down)
        return linear(self.activation(linear(x, self.up, self.up_bias)), self.down, self.down_bias)


class Router(nn.Module):
    """Which experts a token goes to, and with what gates; DeepSeek-V3, arXiv 2412.19437, section 2.1.2.

    Scores s = sigmoid or softmax of W x. The top_k largest of s + bias are chosen (bias: see settings.Balance), within the best
    groups if there are some; the gates are the chosen s, so that the bias never gets a gradient. All in numerics.router, the
    bias in float32 at least.
    What the whole batch of a step did is added up in `tally`, for balancing and the log, from the first forward of a step to `settle` (system.hooks.RouterBalance).
    """

    def __init__(self, s):
        super().__init__()
        self.moe = moe = s.model.mlp.moe
        self.dtype = dtype(s.numerics.router)
        self.tokens_per_rank = shape(s, 0).tokens_per_rank
        self.weight = parameter((moe.experts, s.model.model_dim), s.numerics.router, role="router",
                                init=normal(1 / math.sqrt(s.model.model_dim)))
        # belongs to a checkpoint; steps of 0.01 or less would be lost in 16 bits
        self.register_buffer("bias", torch.zeros(moe.experts, dtype=torch.promote_types(self.dtype, torch.float32)))
        # of the current step, on this process; float64 holds the sums exactly, in whatever order they are added
        self.register_buffer("tally", torch.zeros(2 * moe.experts + 1, dtype=torch.float64), persistent=False)
        self.register_buffer("load", torch.zeros(moe.experts), persistent=False)  # rows of each expert in the last whole step
        # of its tokens' scores in the last whole step, mean, relative to equal ones
        self.register_buffer("entropy", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(self, x):
        """x (R, T, D). Returns experts (N, k) int64, gates (N, k) and penalty (N,) or None of the N = R T tokens."""
        moe = self.moe
        logits = F.linear(x.flatten(0, 1).to(self.dtype), self.weight)
        scores = torch.sigmoid(logits) if moe.score == "sigmoid" else logits.softmax(-1)
        with torch.no_grad():
            quantile = moe.balance is not None and moe.balance.rule == "quantile"
            choice = (logits if quantile else scores) + self.bias
            chosen = best(self.in_best_groups(choice), moe.top_k)
            if self.training:
                self.count(logits, scores, choice, quantile)
        gates = scores.gather(1, chosen)
        if moe.normalise:
            gates = shares(gates)
        return chosen, gates * moe.gate_scale, self.penalty(logits, scores, x.size(1)) if self.training else None

    def in_best_groups(self, choice):
        """choice (N, E) with -inf outside each token's best groups (node-limited routing, DeepSeek-V3)."""
        moe = self.moe
        if moe.groups == 1:
            return choice
        grouped = choice.unflatten(1, (moe.groups, -1))
        kept = best(grouped.topk(2).values.sum(-1), moe.groups_kept)
        out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, kept, False)
        return grouped.masked_fill(out[..., None], -math.inf).flatten(1)

    def count(self, logits, scores, choice, quantile):
        """Add to the tally what the scores say: their entropy, and by logical rank the bound of the quantile rule. The rows of
        each expert come from who sorts them (MoE)."""
        n = self.moe.experts
        p = shares(scores)
        self.tally[2 * n] -= (p * p.clamp(min=1e-20).log()).sum(dtype=torch.float64)
        if quantile:  # by how much each token's logit beats the best one not chosen: the share-th largest becomes 0
            over = logits - choice.topk(self.moe.top_k + 1).values[:, -1:]
            tokens = min(len(over), self.tokens_per_rank)
            share = max(1, tokens * self.moe.top_k // n)
            self.tally[n:2 * n] += over.unflatten(0, (-1, tokens)).kthvalue(tokens - share + 1, dim=1).values.double().sum(0)

    def penalty(self, logits, scores, length):
        """What the gradient of each token's loss gets on top, (N,), or None: balance in its row of `length`, and z-loss."""
        moe, out = self.moe, None
        if moe.sequence_loss:
            p = shares(scores).unflatten(0, (-1, length)).mean(1)
            with torch.no_grad():
                chosen = best(scores, moe.top_k).view(-1, length * moe.top_k)
                counted = torch.promote_types(p.dtype, torch.float32)  # bfloat16 cannot count beyond 256
                f = torch.zeros_like(p, dtype=counted).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=counted))
                f *= moe.experts / (moe.top_k * length)
            out = (moe.sequence_loss * (f * p).sum(-1)).repeat_interleave(length)
        if moe.z_loss:
            z = moe.z_loss * logits.logsumexp(-1).square()
            out = z if out is None else out + z
        return out

    @torch.no_grad()
    def settle(self, tally, tokens, moves_bias=True):
        """Close a step of so many tokens: tally summed over all processes. Moves the bias, unless it is to stand still."""
        n, balance = self.moe.experts, self.moe.balance
        load, bound, entropy = tally.split([n, n, 1])
        self.load.copy_(load)
        self.entropy.copy_(entropy[0] / (tokens * math.log(n)))
        if balance is None or not moves_bias:
            return
        if balance.rule == "quantile":
            self.bias.copy_(-bound / (tokens // self.tokens_per_rank))
            return
        lack = load.mean() - load
        rate = balance.rate * (4 / n if self.moe.score == "softmax" else 1)  # settings.Balance says why
        self.bias += (rate * (lack.sign() if balance.rule == "sign" else lack / load.mean())).to(self.bias.dtype)

    def reset(self):
        for buffer in self.buffers():
            buffer.zero_()


def shares(x):
    """x (N, n) divided by the sum of each row; zeros where all have underflowed (sigmoid(-104) is 0 in float32)."""
    return x / (x.sum(-1, keepdim=True) + 1e-20)


def best(x, k):
    """Indices (N, k) of the k largest of each row of x (N, n)."""
    return x.topk(k, sorted=False).indices


class MoE(nn.Module):
    """Mixture of experts: shared(x) + sum over the chosen experts of gate * W_down phi(W_up x) (settings.MoE).

    With system.expert_parallel a process holds its share of the experts, and rows travel to their expert and back.
    """

    def __init__(self, s):
        super().__init__()
        moe, d, n = s.model.mlp.moe, s.model.model_dim, s.numerics
        self.router, self.experts = Router(s), moe.experts
        parallel = s.system.expert_parallel and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
        check_processes(s, self.world)
        mine = moe.experts // self.world

        def stack(label, rows, cols, projection):
            return parameter((mine, rows, cols), n.matrix, role="matrix", label=label, init=None,
                             parts=[linear_init(s, cols, projection)] * mine, first_part=self.rank * mine)

        self.up, self.down = stack("expert_up", moe.hidden, d, False), stack("expert_down", d, moe.hidden, True)
        self.shared = MLP(s, moe.shared) if moe.shared else None
        self.activation = MLP.ACTIVATIONS[s.model.mlp.activation]
        self.backend, self.fp8 = s.system.experts, n.fp8_experts

    def forward(self, x, penalties, compiled):
        """x (R, T, D) -> (R, T, D). penalties: list that gets this layer's (R T,) penalty, if it has one."""
        chosen, gates, penalty = self.router(x)
        if penalty is not None:
            penalties.append(penalty)
        backend = self.serving(x.device, x.dtype, compiled)
        p = experts.plan(chosen, self.experts, backend if self.world == 1 else "grouped")
        if self.training:
            self.router.tally[:self.experts] += p.counts
        rows = experts.gather(x.flatten(0, 1), p)
        rows = self.feed(rows, p) if self.world == 1 else self.feed_elsewhere(rows, p.counts, backend)
        y = experts.combine(rows, gates.to(rows.dtype), p).view(x.shape)
        return y if self.shared is None else self.shared(x) + y

    def serving(self, device, matmul_dtype, compiled):
        """Name of the backend of kernels.experts that runs there."""
        try:
            return experts.choose(self.backend, device, matmul_dtype, (self.up.size(1), self.up.size(2)), compiled)
        except ValueError as error:
            raise UserError(f"system.experts={self.backend}: {error}") from None

    def feed(self, rows, p):
        """Rows sorted by expert (P, D) through their experts."""
        eight = experts.fake_fp8 if self.fp8 and self.training else lambda t: t
        up, down = self.up.to(rows.dtype), self.down.to(rows.dtype)
        hidden = self.activation(experts.grouped_linear(eight(rows), eight(up), p))
        return experts.grouped_linear(eight(hidden), eight(down), p)

    def feed_elsewhere(self, rows, counts, backend):
        """The same by the processes that hold the experts. One wait for the host: it must know how many rows travel."""
        coming = experts.exchange_counts(counts, self.world)
        sent, received = torch.stack([counts.view(self.world, -1).sum(1), coming.sum(1)]).tolist()
        mine = experts.exchange(rows, received, sent)
        owner = torch.arange(len(self.up), device=rows.device).repeat(self.world)
        owner = owner.repeat_interleave(coming.flatten(), output_size=len(mine))
        p = experts.plan(owner[:, None], len(self.up), backend)
        done = self.feed(experts.gather(mine, p), p)
        back = experts.combine(done, done.new_ones(len(mine), 1), p)
        return experts.exchange(back, sent, received)


class Block(nn.Module):
    """Attention and MLP, each with its norm; either may be dropped in a layer (records 17 and 30)."""

    def __init__(self, s, layer):
        super().__init__()
        self.attn = self.mlp = None
        if layer not in s.model.attn.drop_layers:
            self.attn_norm, self.attn = Norm(s), LatentAttention(s) if s.model.attn.latent else Attention(s)
        if layer not in s.model.mlp.drop_layers:
            dense = s.model.mlp.moe is None or layer in s.model.mlp.moe.dense_layers
            self.mlp_norm, self.mlp = Norm(s), MLP(s) if dense else MoE(s)


# ----- residual wiring --------------------------------------------------------------------------------------------

class Residual(nn.Module):
    """Owns what is added to the stream besides the branches: U-net skips (record 11) and the x0 mix (record 9)."""

    def __init__(self, s):
        super().__init__()
        r, layers, n = s.model.residual, s.model.num_layers, s.numerics
        self.half = layers // 2
        self.skip = self.x = self.x0 = None
        if r.unet_skips:
            u = r.unet_skips
            self.skip = coefficient(self.half, u.init if u.sigmoid is None else u.sigmoid, u.learned, n.scalar,
                                    sigmoid=u.sigmoid is not None)
        if r.x0_mix:
            self.x = coefficient(layers, r.x0_mix.x, r.x0_mix.learned, n.scalar)
            self.x0 = coefficient(layers, r.x0_mix.x0, r.x0_mix.learned, n.scalar)

    def begin(self, x0):
        """A pair of functions (enter, leave) for one forward pass: stream before and after block i."""
        skip = self.skip() if self.skip is not None else None
        a, b = (self.x(), self.x0()) if self.x is not None else (None, None)
        saved = []

        def enter(i, x):
            if skip is not None and i >= self.half:  # last in, first out: block `half` gets its neighbour's output
                x = scale_add(1.0, x, skip[i - self.half], saved.pop())
            if a is not None:
                x = scale_add(a[i], x, b[i], x0)
            return x.to(x0.dtype)

        def leave(i, x):
            if skip is not None and i < self.half:
                saved.append(x)
            return x

        return enter, leave


# ----- head -------------------------------------------------------------------------------------------------------

LARGEST_LOGITS = 2 ** 31  # that validation on a GPU makes at once: 4 GiB in bfloat16


class Head(nn.Module):
    """Stream (R, T, D) -> logits (R, T, V), soft-capped; cross entropy over all V classes."""

    def __init__(self, s):
        super().__init__()
        m, n = s.model, s.numerics
        self.weight = None
        if m.head.untied:
            init = constant(0.0) if m.head.untied.init == "zero" else linear_init(s, m.model_dim, projection=False)
            self.weight = parameter((padded_vocab(s), m.model_dim), n.head, role="lm_head", init=init)
        self.softcap, self.cap_dtype = m.head.softcap, dtype(n.softcap)
        self.scale = 1 / math.sqrt(m.model_dim) if m.head.logit_scale == "rsqrt_dim" else None
        self.fp8, self.transpose = n.fp8_head, s.system.kernels.transpose
        self.sums, self.tokens_per_rank = m.head.train_loss == "sum", shape(s, 0).tokens_per_rank
        self.loss_dtype = dtype(n.loss)
        self.auto, self.classes = s.system.kernels.loss == "auto", padded_vocab(s)
        self.backend = {"auto": None, "whole": None, "chunks": "torch", "triton": "triton"}[s.system.kernels.loss]

    def operands(self, table):
        """(weight, FP8 factors or None) of the matrix product as it is now, in training or validation."""
        weight = table if self.weight is None else self.weight
        if not (self.fp8 and self.training):
            return weight, None
        # The trainer averages over the eight ranks and, with a mean, their tokens: undo that before the FP8 cast.
        divided_by = LOGICAL_RANKS * (1 if self.sums else self.tokens_per_rank)
        return weight, (self.fp8.x, self.fp8.w, self.fp8.grad * divided_by)

    def losses(self, x, table, targets):
        """Cross entropies (R, T) of the targets (R, T)."""
        backend = self.backend
        if self.auto and x.is_cuda and not self.training and targets.numel() * self.classes > LARGEST_LOGITS:
            backend = "torch"  # records 21 to 33: a row of 262,144 tokens, 26 GB of logits
        if backend is None:
            logits = self(x, table)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        weight, fp8 = self.operands(table)
        try:
            return linear_cross_entropy(x, weight, targets, softcap=self.softcap, logit_scale=self.scale, fp8=fp8,
                                        cap_dtype=self.cap_dtype, loss_dtype=self.loss_dtype, backend=backend,
                                        transpose=self.transpose)
        except ValueError as error:
            raise UserError(f"system.kernels.loss: {error}: set it to chunks or whole") from None

    def forward(self, x, table):
        weight, fp8 = self.operands(table)
        z = linear(x, weight) if fp8 is None else fp8_linear(x, weight, *fp8, self.transpose)
        if self.scale is not None or self.softcap is not None:
            z = z.to(torch.promote_types(z.dtype, self.cap_dtype))
        if self.scale is not None:
            z = z * self.scale
        if self.softcap is not None:
            z = bounded(z, self.softcap)
        return z.to(self.loss_dtype)


def bounded(z, softcap):
    """Logits z under a soft cap (settings.Softcap), elementwise."""
    if softcap.form == "tanh":
        return softcap.cap * torch.tanh(z / softcap.cap)
    return softcap.cap * torch.sigmoid(z / softcap.scale)


# ----- GPT --------------------------------------------------------------------------------------------------------

class GPT(nn.Module):
    """The whole computation: embedding, L blocks on the residual stream, head.

    Built without values; `initialise(seed)` fills them. Each tensor draws from a generator keyed by (seed, name), so
    switching a feature changes no other weight: that is what "paired by seed" means.
    """

    def __init__(self, s):
        super().__init__()
        self.settings = s
        self.embed = Embedding(s)
        self.rotary = Rotary(s) if s.model.attn.rope else None
        self.blocks = nn.ModuleList(Block(s, i) for i in range(s.model.num_layers))
        self.residual = Residual(s)
        self.values = None
        if s.model.attn.value_residual:
            self.values = ValueResidual(s)
        elif s.model.attn.value_embed:
            self.values = ValueEmbed(s)
        self.norm = Norm(s)
        self.head = Head(s)
        self.train_dtype, self.eval_dtype = dtype(s.numerics.matmul), dtype(s.numerics.eval_matmul)
        self.init_grid = dtype(s.numerics.init_grid)
        self.sees_all = not s.model.attn.documents and s.model.attn.window is None
        self.followed, self.scale = (), s.model.attn.scale
        self.compiled = False
        self.recompute = s.system.recompute == "on"
        self.passed = set()  # why faster attention backends were passed over

    def forward(self, tokens, targets=None, context=None, cache=None):
        """tokens: (R, T) int64. With targets (R, T): per-token losses (R, T); without: logits (R, T, V).

        context: what attention sees (GPT.context); None only without documents and window, as in records 1-11. cache: None, or
        `new_cache()` for generation, extended here.
        """
        if context is None and not self.sees_all:
            raise ValueError("this model has documents or a window: call it with context=model.context(...)")
        matmul_dtype = self.train_dtype if self.training else self.eval_dtype
        start = 0 if cache is None else max((c[0].size(1) for c in cache if c[0] is not None), default=0)
        if start and tokens.size(1) != 1:
            raise ValueError("after a cache comes one token at a time")
        x = self.embed(tokens, start)
        enter, leave = self.residual.begin(x)
        mix = self.values.begin(tokens) if self.values is not None else None
        penalties = []
        for i in range(len(self.blocks)):
            through = self.block
            if self.recompute and self.training and not (i == 0 and isinstance(self.values, ValueResidual)):
                through = functools.partial(checkpoint, self.block, use_reentrant=False, preserve_rng_state=False)
            x = leave(i, through(i, enter(i, x), mix, context, cache, penalties))
        x = self.norm(x).to(matmul_dtype)
        if targets is None:
            return self.head(x, self.embed.table)
        losses = self.head.losses(x, self.embed.table, targets)
        for penalty in penalties:  # adds its gradient and exactly nothing to the value: a loss stays a cross entropy
            losses = losses + (penalty - penalty.detach()).view(targets.shape)
        return losses

    def block(self, i, x, mix, context, cache, penalties):
        """Block i on the stream x (R, T, D); the arguments are those of forward, in it. With system.recompute the backward pass
        goes through it again: it must change nothing but `cache` and, without recomputation, `penalties` and layer 0's values."""
        block, matmul_dtype = self.blocks[i], self.train_dtype if self.training else self.eval_dtype
        if block.attn is not None:
            mix_values = None if mix is None else functools.partial(mix, i)
            view, scale = (None, self.scale) if context is None else (context.views[i], context.scale)
            x = x + block.attn(block.attn_norm(x).to(matmul_dtype), self.rotary, mix_values, view, scale,
                               None if cache is None else cache[i])
        if block.mlp is not None:
            y = block.mlp_norm(x).to(matmul_dtype)
            x = x + (block.mlp(y, penalties, self.compiled) if isinstance(block.mlp, MoE) else block.mlp(y))
        return x

    def new_cache(self, absorbed=None):
        """An empty cache for generation, one list per layer. absorbed: latents instead of keys and values (LatentAttention); None:
        where the model can. ValueError if it cannot: without latents, or with values that are mixed behind them."""
        able = self.settings.model.attn.latent is not None and self.values is None
        if absorbed and not able:
            raise ValueError("a latent cache needs model.attn.latent, and neither value_residual nor value_embed beside it")
        return [[None] * (3 if able and absorbed is not False else 2) for _ in self.blocks]

    def context(self, tokens, bos, windows, cached=False, most=None, longest=None):
        """What attention sees of these tokens (R, T): documents (each begins with token `bos`) and windows.

        windows: schedule.Windows of the step, or None. Also brings the rotary tables to the window (record 31). One view
        serves all layers with the same span. cached: only the last token is new, the others lie in a cache. Made outside
        the compiled forward. None if every row is one document without a window. most, longest: no more documents than this,
        and none of more tokens, if known without waiting for a GPU.
        """
        s, a = self.settings, self.settings.model.attn
        changes = windows.long_blocks[1:] if windows is not None and a.rope and a.rope.yarn else ()
        if self.followed != changes:
            self.followed = changes
            factor = self.rotary.follow(windows.long_blocks)
            self.scale = factor * (a.scale if a.scale is not None else 1 / math.sqrt(query_dim(s)))
        if self.sees_all:
            return None
        documents = (tokens == bos).cumsum(1, dtype=torch.int32) if a.documents else None
        by_span = {}
        for span in {span for i, span in enumerate(layer_spans(s, windows)) if i not in a.drop_layers}:
            window = attention.CAUSAL if span is None else attention.Window(*span, a.window.block)
            by_span[span] = (documents, window) if cached else self.view(tokens, documents, window, most, longest)
        views = [by_span.get(span) for span in layer_spans(s, windows)]
        if self.compiled and not cached:
            return Context(*attention.traceable(views, self.scale, query_dim(s)))
        return Context(views, self.scale)

    def view(self, tokens, documents, window, most, longest):
        """The prepared view of one window by the backend that system.attention asks for."""
        if tokens.is_meta:  # shapes only: attend does not look at it
            return attention.View("dense", None)
        s, length = self.settings, tokens.size(1)
        matmul_dtype = self.train_dtype if self.training else self.eval_dtype
        try:
            backend = attention.choose(s.system.attention, tokens.device, documents=documents is not None, window=window,
                                       tokens=length, requires_grad=torch.is_grad_enabled(), dtype=matmul_dtype,
                                       compiled=self.compiled, passed=self.passed)
            if self.training and s.data.loader == "packed":
                longest = s.data.max_document
            elif backend not in attention.FLASH:  # the blocks of banded would depend on the text
                longest = None
            return attention.view(documents, window, backend, rows=len(tokens), tokens=length, device=tokens.device,
                                  dtype=matmul_dtype, longest=longest, most=most)
        except ValueError as error:
            raise UserError(f"system.attention={s.system.attention}: {error}") from None

    @torch.no_grad()
    def initialise(self, seed):
        """Fill every parameter and table. Values are drawn on the CPU in float32, so they are equal on all devices."""
        for name, p in self.named_parameters():
            for i, init in enumerate(p.parts):
                target = p[i] if len(p.parts) > 1 else p
                key = hashlib.sha256(f"{seed}/{name}/{p.first_part + i}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
                values = init(torch.empty(target.shape, dtype=torch.float32), generator)
                if p.role in ("matrix", "lm_head") and p.dim() > 1:
                    values = values.to(self.init_grid)  # record 10 rounded the linear weights once
                target.copy_(values)
        self.followed, self.scale = (), self.settings.model.attn.scale
        if self.rotary is not None:
            self.rotary.follow()
        for router in self.routers():
            router.reset()
        for mlp in self.narrow_mlps():
            mlp.eight_bit.reset()

    def narrow_mlps(self):
        """The MLPs that are in FP8 while training."""
        return [block.mlp for block in self.blocks if isinstance(block.mlp, MLP) and block.mlp.eight_bit is not None]

    def prepare_compile(self):
        """To be called before torch.compile: shapes in the graph must not depend on the data."""
        self.compiled = True
        for _, moe in self.mixtures():  # how many rows travel does; here and not as a decorator, which would load the compiler
            moe.feed_elsewhere = torch.compiler.disable(moe.feed_elsewhere)

    # ----- experts

    def mixtures(self):
        """[(layer, MoE)] of the layers that have experts."""
        return [(i, block.mlp) for i, block in enumerate(self.blocks) if isinstance(block.mlp, MoE)]

    def routers(self):
        return [moe.router for _, moe in self.mixtures()]

    def expert_loads(self):
        """{parameter name: (E,) rows of each of its experts in the step that was settled last}; views, so that they stay right."""
        out = {}
        for i, moe in self.mixtures():
            mine = moe.router.load.view(moe.world, -1)[moe.rank]
            out |= {f"blocks.{i}.mlp.up": mine, f"blocks.{i}.mlp.down": mine}
        return out

    def whole_state(self):
        """state_dict with all experts, on every process (collective with expert parallelism)."""
        state = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        for i, moe in self.mixtures():
            for name, p in (("up", moe.up), ("down", moe.down)) if moe.world > 1 else ():
                parts = [torch.empty_like(p) for _ in range(moe.world)]
                dist.all_gather(parts, p.detach().contiguous())
                state[f"blocks.{i}.mlp.{name}"] = torch.cat(parts).cpu()
        return {name: value.clone() for name, value in state.items()}

    # ----- accounting

    def sizes(self):
        """[(parameter, its elements on all processes together, those that one token meets)]."""
        stacks = {id(p): moe for _, moe in self.mixtures() for p in (moe.up, moe.down)}
        out = []
        for p in self.parameters():
            moe = stacks.get(id(p))
            out.append((p, p.numel(), p.numel()) if moe is None else
                       (p, p[0].numel() * moe.experts, p[0].numel() * moe.router.moe.top_k))
        return out

    def num_parameters(self):
        return sum(whole for _, whole, _ in self.sizes())

    def num_active(self):
        """Parameters that one token meets: all but the experts that it does not go to."""
        return sum(active for _, _, active in self.sizes())

    def flops_per_token(self):
        """Of the matrix products in training: 6 for each active matrix parameter, the head's among them. Tables are read, not
        multiplied. Attention's own products: attention_flops_per_token."""
        return 6 * sum(active for p, _, active in self.sizes() if p.role in ("matrix", "lm_head", "router") and p.dim() > 1)

    def attention_flops_per_token(self, windows=None):
        """Of queries times keys and weights times values in training, forward and backward: 6 for each channel of a visible key
        and value. Rows of data.seq_len, in these windows (schedule.Windows or None); documents, which hide more, depend on the
        text and are not counted."""
        s, seen = self.settings, 0.0
        for i, span in enumerate(layer_spans(s, windows)):
            if i not in s.model.attn.drop_layers:
                window = attention.CAUSAL if span is None else attention.Window(*span, s.model.attn.window.block)
                seen += attention.keys_seen(window, s.data.seq_len)
        return 6 * s.model.attn.num_heads * (query_dim(s) + value_dim(s)) * seen


def without_values(s):
    """The model without storage, to count what it has."""
    with torch.device("meta"):
        return GPT(s)


def count_parameters(s):
    return without_values(s).num_parameters()
