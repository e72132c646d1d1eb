"""GPT and every architectural feature of the lineage.

The constructors choose parts from the settings once; forward reads like the equations. A feature that is off is None
or a plain constant, and costs nothing. Shapes: R rows (sequences), T tokens, D model_dim, H heads, K head_dim,
F hidden width, V padded vocabulary, L layers. Every rule that looks back acts along T; nothing joins across R.

No dtype is written here: all come from the precision plan (settings.numerics).
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from kernels.attention import attend, attend_cached
from settings import head_dim, padded_vocab


def dtype(name):
    return getattr(torch, name)


# ----- parameters -------------------------------------------------------------------------------------------------

def normal(std):
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def uniform(bound):
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)


def constant(value):
    return lambda tensor, generator: tensor.fill_(value)


def parameter(shape, dtype_name, *, role, init, parts=None):
    """A parameter with its optimizer role (embed, lm_head, matrix, scalar) and its initialiser.

    parts: initialisers of the slices along dim 0, where several logical matrices share one tensor. The values are
    filled by GPT.initialise, not here.
    """
    p = nn.Parameter(torch.empty(shape, dtype=dtype(dtype_name)))
    p.role, p.parts = role, parts or [init]
    return p


def linear_init(s, fan_in, projection):
    """Initialiser of a linear weight; `projection`: one that writes into the residual stream."""
    if projection and s.model.init.zero_proj:
        return constant(0.0)
    if s.model.init.scheme == "gpt2":
        return normal(0.02 / math.sqrt(2 * s.model.num_layers) if projection else 0.02)
    return uniform(1 / math.sqrt(fan_in))


# ----- coefficients: values with a source -------------------------------------------------------------------------

class Learned(nn.Module):
    """One learned scalar per use, kept in one vector (n,). Called, it gives a list of n 0-d tensors."""

    def __init__(self, n, value, dtype_name):
        super().__init__()
        self.value = parameter((n,), dtype_name, role="scalar", init=constant(value))

    def forward(self):
        return self.value.unbind()


class Constant(nn.Module):
    """The same coefficient as a plain number: what a learned one becomes when its source is switched off."""

    def __init__(self, n, value):
        super().__init__()
        self.values = [value] * n

    def forward(self):
        return self.values


def coefficient(n, value, learned, dtype_name):
    return Learned(n, value, dtype_name) if learned else Constant(n, value)


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
    """Rotary positions (records 2 to 16): pairs (j, j + K/2) turned by -t base^(-2j/K), t = index in the row."""

    def __init__(self, s):
        super().__init__()
        self.base, self.width = s.model.attn.rope.base, head_dim(s)
        self.table_dtype = dtype(s.numerics.rope)
        self.length = max(s.data.seq_len, s.validation.seq_len)
        self.register_buffer("cos", torch.empty(self.length, self.width // 2, dtype=self.table_dtype), persistent=False)
        self.register_buffer("sin", torch.empty(self.length, self.width // 2, dtype=self.table_dtype), persistent=False)

    @torch.no_grad()
    def initialise(self):
        work = torch.float64 if self.table_dtype == torch.float64 else torch.float32  # as the original: float32 angles
        j = torch.arange(0, self.width, 2, dtype=work)
        angle = torch.outer(torch.arange(self.length, dtype=work), 1 / self.base ** (j / self.width))
        self.cos.copy_(angle.cos())
        self.sin.copy_(angle.sin())

    def forward(self, x, start=0):
        """x: (R, T, H, K) at positions start..start+T-1 of its row. Returned in x's dtype."""
        cos = self.cos[start:start + x.size(1), None]
        sin = self.sin[start:start + x.size(1), None]
        x1, x2 = x.chunk(2, dim=-1)
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
        self.table = parameter((padded_vocab(s), m.model_dim), n.table, role="lm_head" if tied else "embed", init=init)
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


# ----- attention, MLP ---------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """q, k, v and output projection in one tensor (4, D, D): how it is cut for Muon is the optimizer's business."""

    def __init__(self, s):
        super().__init__()
        a, d, n = s.model.attn, s.model.model_dim, s.numerics
        self.num_heads, self.head_dim = a.num_heads, head_dim(s)
        inner, out = linear_init(s, d, projection=False), linear_init(s, d, projection=True)
        self.qkvo = parameter((4, d, d), n.matrix, role="matrix", init=None, parts=[inner, inner, inner, out])
        self.bias = None
        if s.model.bias:
            self.bias = parameter((4, d), n.scalar, role="scalar", init=constant(0.0))
        self.qk_norm = a.qk_norm.order if a.qk_norm else None
        self.eps, self.norm_dtype = n.norm_eps, dtype(n.norm)
        self.branch_scale = 1 / math.sqrt(2 * s.model.num_layers) if a.depth_scale else None

    def forward(self, x, rotary, value_mix, cache=None):
        """x: (R, T, D) normed, in the matmul dtype. value_mix: function of v (value residual) or None.

        cache: None, or this layer's (keys, values) list for generation, extended here. Returns (R, T, D).
        """
        rows, tokens, d = x.shape
        w_qkv, w_o = self.qkvo.split([3, 1])
        b_qkv, b_o = (None, None) if self.bias is None else self.bias.split([3, 1])
        qkv = linear(x, w_qkv.reshape(3 * d, d), None if b_qkv is None else b_qkv.reshape(3 * d))
        q, k, v = qkv.view(rows, tokens, 3, self.num_heads, self.head_dim).unbind(2)
        start = 0 if cache is None or cache[0] is None else cache[0].size(1)
        q, k = self.place(q, rotary, start), self.place(k, rotary, start)
        if value_mix is not None:
            v = value_mix(v)
        if cache is None:
            y = attend(q, k, v)
        else:
            if start:
                k, v = torch.cat([cache[0], k], dim=1), torch.cat([cache[1], v], dim=1)
            cache[:] = [k, v]
            y = attend_cached(q, k, v) if start else attend(q, k, v)
        y = linear(y.reshape(rows, tokens, d), w_o[0], None if b_o is None else b_o[0])
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


class MLP(nn.Module):
    """W_down phi(W_up x), hidden width F = expansion * D."""

    ACTIVATIONS = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "relu_sq": lambda x: F.relu(x).square()}

    def __init__(self, s):
        super().__init__()
        d, n = s.model.model_dim, s.numerics
        f = s.model.mlp.expansion * d
        self.up = parameter((f, d), n.matrix, role="matrix", init=linear_init(s, d, projection=False))
        self.down = parameter((d, f), n.matrix, role="matrix", init=linear_init(s, f, projection=True))
        self.up_bias = self.down_bias = None
        if s.model.bias:
            self.up_bias = parameter((f,), n.scalar, role="scalar", init=constant(0.0))
            self.down_bias = parameter((d,), n.scalar, role="scalar", init=constant(0.0))
        self.activation = self.ACTIVATIONS[s.model.mlp.activation]

    def forward(self, x):
        return linear(self.activation(linear(x, self.up, self.up_bias)), self.down, self.down_bias)


class Block(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.attn_norm, self.attn = Norm(s), Attention(s)
        self.mlp_norm, self.mlp = Norm(s), MLP(s)


# ----- residual wiring --------------------------------------------------------------------------------------------

class Residual(nn.Module):
    """Owns what is added to the stream besides the branches: U-net skips (record 11) and the x0 mix (record 9)."""

    def __init__(self, s):
        super().__init__()
        r, layers, n = s.model.residual, s.model.num_layers, s.numerics
        self.half = layers // 2
        self.skip = self.x = self.x0 = None
        if r.unet_skips:
            self.skip = coefficient(self.half, r.unet_skips.init, r.unet_skips.learned, n.scalar)
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

class Head(nn.Module):
    """Stream (R, T, D) -> logits (R, T, V), soft-capped; cross entropy over all V classes."""

    def __init__(self, s):
        super().__init__()
        m, n = s.model, s.numerics
        self.weight = None
        if m.head.untied:
            init = constant(0.0) if m.head.untied.init == "zero" else linear_init(s, m.model_dim, projection=False)
            self.weight = parameter((padded_vocab(s), m.model_dim), n.matrix, role="lm_head", init=init)
        self.cap = m.head.softcap.cap if m.head.softcap else None
        self.loss_dtype = dtype(n.loss)

    def forward(self, x, table):
        z = linear(x, table if self.weight is None else self.weight)
        if self.cap is not None:
            z = self.cap * torch.tanh(z / self.cap)
        return z.to(self.loss_dtype)


# ----- GPT --------------------------------------------------------------------------------------------------------

class GPT(nn.Module):
    """The whole computation: embedding, L blocks on the residual stream, head.

    Built without values; `initialise(seed)` fills them. Each tensor draws from a generator keyed by (seed, name), so
    switching a feature changes no other weight: that is what "paired by seed" means.
    """

    def __init__(self, s):
        super().__init__()
        self.embed = Embedding(s)
        self.rotary = Rotary(s) if s.model.attn.rope else None
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.model.num_layers))
        self.residual = Residual(s)
        self.value_mix = None
        if s.model.attn.value_residual:
            v = s.model.attn.value_residual
            self.value_mix = coefficient(s.model.num_layers, v.init, v.learned, s.numerics.scalar)
        self.norm = Norm(s)
        self.head = Head(s)
        self.train_dtype, self.eval_dtype = dtype(s.numerics.matmul), dtype(s.numerics.eval_matmul)
        self.init_grid = dtype(s.numerics.init_grid)

    def forward(self, tokens, targets=None, cache=None):
        """tokens: (R, T) int64. With targets (R, T): per-token losses (R, T); without: logits (R, T, V).

        cache: None, or a list of [keys, values] per layer (start with [None, None]) for generation.
        """
        matmul_dtype = self.train_dtype if self.training else self.eval_dtype
        start = 0 if cache is None or cache[0][0] is None else cache[0][0].size(1)
        x = self.embed(tokens, start)
        enter, leave = self.residual.begin(x)
        mix = self.value_mixers()
        for i, block in enumerate(self.blocks):
            x = enter(i, x)
            layer_cache = None if cache is None else cache[i]
            x = x + block.attn(block.attn_norm(x).to(matmul_dtype), self.rotary, mix(i), layer_cache)
            x = x + block.mlp(block.mlp_norm(x).to(matmul_dtype))
            x = leave(i, x)
        logits = self.head(self.norm(x).to(matmul_dtype), self.embed.table)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

    def value_mixers(self):
        """Per layer the function v -> (1 - lam) v + lam v1, v1 the values of block 0 (record 9), or None."""
        if self.value_mix is None:
            return lambda i: None
        lam, first = self.value_mix(), []

        def mixer(i):
            def mix(v):
                if i == 0:  # (1 - lam) v1 + lam v1 = v1, and lam gets no gradient
                    first.append(v)
                    return v
                return ((1 - lam[i]) * v + lam[i] * first[0]).to(v.dtype)
            return mix

        return mixer

    @torch.no_grad()
    def initialise(self, seed):
        """Fill every parameter and table. Values are drawn on the CPU in float32, so they are equal on all devices."""
        for name, p in self.named_parameters():
            for i, init in enumerate(p.parts):
                target = p[i] if len(p.parts) > 1 else p
                key = hashlib.sha256(f"{seed}/{name}/{i}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
                values = init(torch.empty(target.shape, dtype=torch.float32), generator)
                if p.role in ("matrix", "lm_head") and p.dim() > 1:
                    values = values.to(self.init_grid)  # record 10 rounded the linear weights once
                target.copy_(values)
        if self.rotary is not None:
            self.rotary.initialise()

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())


def count_parameters(s):
    """Number of parameters without allocating them."""
    with torch.device("meta"):
        return GPT(s).num_parameters()
