"""The vocabulary of a record: nested frozen dataclasses whose defaults are record 1.

Three axes. `model`, `optim` (optim_settings.py), `schedule`, `data` and `validation` say what is computed
(axis ml). `numerics` says in which precision; it changes losses, so it belongs to a record's identity.
`system` (system_settings.py) says how a run is executed; it may change the order of sums and nothing else of
the mathematics.

Each field is declared once, with `declare.opt(...)`: its meaning, unit, range, what `--without` does to it,
what it needs and what a scale makes of it. A dataclass whose fields must agree with each other or with
another part has a method `check(self, s)` that yields one message per contradiction. `python -m records
features` prints these texts; no list of settings stands anywhere else. Nothing here imports torch, so that
bad settings are refused in a tenth of a second.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from common.errors import UserError
from declare import PRECISION, REFUSE, bound_faults, opt, unmet_needs, walk
from model_settings import (
    MTP, Backout, SALambdas, SkipGate, Smear, ValueGate, channel_faults, empty_layers, layer_faults
)
from optim_settings import Optim
from system_settings import System

LOGICAL_RANKS = 8  # the token buffers of a step, whatever the number of processes
NUMERICS_VERSION = 1  # raised by hand when a fix changes the results of existing settings


# ----- model ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Embed:
    """From token ids to the residual stream."""
    padded: bool = opt(True, "padded embedding tables: they have rows for the padded vocabulary (off: only "
                             "vocab_size rows)", off=REFUSE)
    learned_positions: bool = opt(True, "learned position embedding, added to the token embedding (GPT-2)",
                                  off=False)
    norm: bool = opt(False, "RMS norm of the embedding, before the first block", off=False)
    smear: Smear | None = opt(None, "smear: each token's embedding gets a gated part of the previous one, "
                                    "before the norm")

    def check(self, s: "Settings") -> Iterator[str]:
        if self.learned_positions and s.validation.seq_len > s.data.seq_len:
            yield (f"validation.seq_len = {s.validation.seq_len} is longer than the learned positions "
                   f"(data.seq_len = {s.data.seq_len}): set model.embed.learned_positions=false or "
                   "shorten it")


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al., arXiv 2309.00071), applied each time the long window changes, from a to b blocks
    (record 31).

    A channel pair that makes r turns within the old window keeps its frequency f if r >= beta, gets f a/b if
    r <= alpha, and a linear mix of the two in between. The attention scale is multiplied by 1 + gain ln(b/a).
    """
    alpha: float = opt(1.0, "lower threshold; pairs with at most this many turns get the frequency f a/b",
                       shrink="turns", least=0)
    beta: float = opt(32.0, "upper threshold; pairs with at least this many turns keep their frequency",
                      shrink="turns")
    gain: float = opt(0.2, "growth of the attention scale, per factor e by which the window grows", off=0.0)

    def check(self, s: "Settings") -> Iterator[str]:
        if self.beta <= self.alpha:
            yield (f"model.attn.rope.yarn.beta = {self.beta}: must be greater than "
                   f"model.attn.rope.yarn.alpha = {self.alpha}")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv 2104.09864) of the channel pairs (j, j + head_dim/2)."""
    base: float = opt(10000.0, "base of the frequencies base^(-2j/head_dim)", above=0)
    half: bool = opt(False, "half-truncated rotary embedding (@YouJiacheng): the first half of the pairs "
                            "rotates with frequencies base^(-j/(head_dim/4 - 1)), the other half does not "
                            "rotate", off=False)
    yarn: Yarn | None = opt(None, "YaRN: adapt the rotary frequencies and the attention scale when the long "
                                  "window grows", needs="model.attn.window.growth=stages")

    def check(self, s: "Settings") -> Iterator[str]:
        if rotary_dim(s) % 2:
            yield (f"model.attn.rope turns pairs and gets {rotary_dim(s)} channels of a head: change "
                   + ("model.attn.latent.turning" if s.model.attn.latent else "model.attn.num_heads"))
        if self.half and head_dim(s) % 4:
            yield (f"model.attn.rope.half needs a head_dim that is a multiple of 4, got {head_dim(s)}: "
                   "change model.attn.num_heads or add --without model.attn.rope.half")


@dataclass(frozen=True)
class QKNorm:
    """QK norm (Henry et al., arXiv 2010.04245): RMS norm of each head's queries and keys, without gain."""
    order: Literal["after_rope", "before_rope"] = opt(
        "after_rope", "position of the norm relative to the rotation; both are equal in exact arithmetic "
                      "and differ by rounding")


@dataclass(frozen=True)
class ValueResidual:
    """Value residual (Zhou et al., arXiv 2410.17897): v <- (1 - lambda) v + lambda v1, v1 the first block's
    values."""
    init: float = opt(0.5, "initial lambda; the constant lambda if `learned` is off")
    learned: bool = opt(True, "learned lambda, one scalar per block (off: the constant `init`)", off=False)

    def check(self, s: "Settings") -> Iterator[str]:
        if 0 in s.model.attn.drop_layers:
            yield "model.attn.value_residual takes the values of block 0: keep attention there"


@dataclass(frozen=True)
class ValueEmbed:
    """Value embeddings (record 14, @KoszarskyB): each value is mixed with a row, chosen by the token, of a
    table."""
    tables: tuple[int, ...] = opt((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11),
        "value table of each layer, by number; -1: the layer has none", off=REFUSE)
    mix: Literal["lerp", "pair", "scaled", "sum"] = opt(
        "lerp", "form of the mix of a value v and its embedding ve. lerp: (1 - b) v + b ve. pair: a v + b "
                "ve, and a v in layers without a table. scaled: v + b ve. sum: v + ve")
    init: float = opt(0.5, "initial a and b; the constants if `learned` is off",
                      idle="model.attn.value_embed.mix=sum")
    learned: bool = opt(True, "learned a and b, scalars per layer (off: the constant `init`)", off=False,
                        idle="model.attn.value_embed.mix=sum")
    table_init: Literal["normal", "zero"] = opt(
        "normal", "initial value tables. normal: N(0, 1). zero: zeros")
    gate: ValueGate | None = opt(None, "gate on each head's value embedding")

    def check(self, s: "Settings") -> Iterator[str]:
        path, layers = "model.attn.value_embed.tables", s.model.num_layers
        if len(self.tables) != layers:
            yield (f"{path} has {len(self.tables)} entries for {layers} layers: give one per layer, -1 for "
                   "none")
        used = sorted({t for t in self.tables if t >= 0})
        if min(self.tables) < -1 or used != list(range(len(used))):
            yield f"{path} = {list(self.tables)}: number the tables 0, 1, ... without gaps"


@dataclass(frozen=True)
class Window:
    """Sliding-window attention with a schedule for the window size w.

    A rule says which keys k <= q the query at position q sees. `tokens`: q - k < w. `blocks`: q//block -
    k//block < w/block (the tiles of FlexAttention, record 16). `tokens_blocks`: both (record 15).
    `tokens_back`: q - k <= w (the left window of FlashAttention, record 29).
    """
    rule: Literal["tokens", "tokens_blocks", "blocks", "tokens_back"] = opt(
        "tokens", "rule that says which keys are inside the window")
    block: int = opt(128, "size of a block of tokens", unit="token", off=REFUSE, shrink="length", least=1)
    growth: Literal["constant", "floor", "ceil", "stages"] = opt(
        "constant", "schedule of w over the run. constant: `start`. floor, ceil: linear from `start` to "
                    "`end`, rounded down or up to a multiple of `grain` (at least one grain). stages: each "
                    "entry of `stages` for one of schedule.stages, or for an equal share of the steps")
    start: int = opt(1024, "window size at the first step", unit="token",
                     idle="model.attn.window.growth=stages", shrink="length0")
    end: int = opt(1024, "window size towards which the window grows", unit="token",
                   idle="model.attn.window.growth=stages|constant", shrink="length0")
    grain: int = opt(64, "step of the growth: the window grows by multiples of this", unit="token",
                     idle="model.attn.window.growth=stages|constant", shrink="length", least=1)
    stages: tuple[int, ...] = opt((), "window sizes of the stages, in growing order", unit="block",
                                  needs="model.attn.window.growth=stages")
    long_layers: tuple[int, ...] | None = opt(
        None, "layers with the long window (as in Gemma 2, record 20); the other layers have a short window "
              "of half as many blocks, at least one (off: every layer has the long window)")
    extension: int | None = opt(None, "long window in the extension (record 42; off: the last stage's)",
                                unit="block", needs="schedule.extension_steps")
    final: int | None = opt(None, "long window in the final validation (record 31)", unit="block",
                            needs="model.attn.window.growth=stages")
    final_long: int | None = opt(None, "window of the layers with the long window in the final validation "
                                       "(record 35); short windows and YaRN do not follow it", unit="block",
                                 needs="model.attn.window.growth=stages", least=1)
    final_last_layer: int | None = opt(None, "window of the last layer in the final validation (record 33)",
                                       unit="block", needs="model.attn.window.final")

    def check(self, s: "Settings") -> Iterator[str]:
        path, last = "model.attn.window", s.model.num_layers - 1
        yield from layer_faults(f"{path}.long_layers", self.long_layers or (), s)
        yield from self.check_growth(path)
        for name in ("extension", "final") if self.stages else ():
            if (blocks := getattr(self, name)) is not None and blocks < self.stages[-1]:
                yield f"{path}.{name} = {blocks}: must be at least the last stage, {self.stages[-1]} blocks"
        if self.extension is not None and self.growth != "stages":
            yield f"{path}.extension needs {path}.growth=stages: set it, or add --without {path}.extension"
        if None not in (self.extension, self.final) and self.final < self.extension:
            yield f"{path}.final = {self.final}: must be at least {path}.extension = {self.extension}"
        if self.growth == "stages" and s.schedule.stages and len(self.stages) != len(s.schedule.stages):
            yield (f"{path}.stages has {len(self.stages)} windows and schedule.stages has "
                   f"{len(s.schedule.stages)}: give one window per stage, or leave schedule.stages empty")
        if None not in (self.final_last_layer, self.final_long):
            yield f"{path}.final_long is that of the last layer too: switch {path}.final_last_layer off"
        if self.final_last_layer is None:
            return
        if self.final_last_layer < 1:
            yield f"{path}.final_last_layer = {self.final_last_layer}: must be at least one block"
        if last in s.model.attn.drop_layers or not (self.long_layers is None or last in self.long_layers):
            yield (f"{path}.final_last_layer needs attention with the long window in layer {last}: add it to "
                   f"{path}.long_layers")

    def check_growth(self, path: str) -> Iterator[str]:
        if self.growth == "stages":
            if not self.stages or min(self.stages) < 1 or list(self.stages) != sorted(set(self.stages)):
                yield (f"{path}.stages = {list(self.stages)}: must list growing windows of at least one "
                       "block, like [3, 7, 11]")
            return
        if self.growth == "constant" and self.start < 1:
            yield f"{path}.start = {self.start}: must be at least 1 token"
        if self.growth != "constant" and not 0 <= self.start <= self.end:
            yield f"{path}.start = {self.start} is beyond {path}.end = {self.end}: lower it"
        name = "start" if self.growth == "constant" else "grain"
        if self.rule == "blocks" and getattr(self, name) % self.block:
            yield f"{path}.rule=blocks needs {path}.{name} in whole blocks of {self.block} tokens"


@dataclass(frozen=True)
class HeadGate:
    """Attention gate (record 28, @classiclarryd): each head's output is multiplied by sigmoid(W n).

    n is the first `channels` channels of the block's normalised input.
    """
    channels: int = opt(12, "input channels of the gate", unit="channel", off=REFUSE)

    def check(self, s: "Settings") -> Iterator[str]:
        yield from channel_faults("model.attn.gate.channels", self.channels, s)


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    The keys and values of all heads are projected from one narrow latent per token, so generation needs to
    cache only this latent and the rotary part of the keys, which all heads share.
    """
    kv: int = opt(256, "width of the RMS-normed latent of keys and values (kv_lora_rank)", unit="channel",
                  off=REFUSE, shrink="width", least=1)
    query: int | None = opt(None, "width of the RMS-normed latent of the queries (q_lora_rank; off: queries "
                                  "are projected straight from the residual stream)", unit="channel",
                            shrink="width", least=1)
    still: int = opt(96, "channels of a head's query and key without rotation (qk_nope_head_dim)",
                     unit="channel", off=REFUSE, shrink="width", least=1)
    turning: int = opt(32, "channels of a head's query and key with rotation (qk_rope_head_dim)",
                       unit="channel", off=REFUSE, shrink="width", least=1)
    value: int = opt(128, "width of a head's value (v_head_dim)", unit="channel", off=REFUSE, shrink="width",
                     least=1)

    def check(self, s: "Settings") -> Iterator[str]:
        attn = s.model.attn
        if s.model.bias:
            yield "model.attn.latent has no bias vectors: set model.bias=false"
        if attn.rope is None:
            yield "model.attn.latent gives positions to its turning part: it needs model.attn.rope"
        elif attn.rope.half:
            yield "model.attn.latent says itself which channels turn: add --without model.attn.rope.half"
        if attn.value_embed is not None and attn.num_heads * self.value != s.model.model_dim:
            yield (f"model.attn.value_embed has {s.model.model_dim} channels, the values of "
                   f"model.attn.latent have {attn.num_heads} x {self.value}: change model.attn.latent.value")


@dataclass(frozen=True)
class Attention:
    """Causal self-attention."""
    num_heads: int = opt(12, "attention heads; head_dim = model_dim / num_heads, unless model.attn.latent "
                             "sets the widths", unit="head", least=1)
    rope: Rope | None = opt(None, "rotary position embedding: queries and keys are rotated by their position")
    qk_norm: QKNorm | None = opt(None, "QK norm: RMS norm of queries and keys per head")
    depth_scale: bool = opt(False, "attention branch scaled by 1/sqrt(2 num_layers) before it is added to "
                                   "the stream", off=False)
    value_residual: ValueResidual | None = opt(
        None, "value residual: mix the values with those of the first block")
    value_embed: ValueEmbed | None = opt(None, "value embeddings: mix the values with rows of token tables")
    documents: bool = opt(False, "document masking: a query sees only keys of its own document, which "
                                 "begins with an end-of-text token", off=False)
    window: Window | None = opt(None, "sliding window: a query sees only the most recent keys")
    scale: float | None = opt(None, "softmax scale, which multiplies q.k (off: 1/sqrt of the width of a "
                                    "query)", shrink="rsqrt_width", above=0)
    gate: HeadGate | None = opt(None, "attention gate: a sigmoid gate on each head's output")
    sa_lambdas: SALambdas | None = opt(None, "factors of the projections of attention, scalars per layer")
    key_offset: bool = opt(
        False, "partial key offset (record 49, @classiclarryd): in layers with the long window, the channels "
               "of a key that do not rotate are those of the previous token in the row", off=False,
        needs="model.attn.rope.half"
    )
    latent: Latent | None = opt(None, "multi-head latent attention: keys and values from one narrow latent "
                                      "per token")
    drop_layers: tuple[int, ...] = opt((), "layers without attention", off=())

    def check(self, s: "Settings") -> Iterator[str]:
        if s.model.model_dim % self.num_heads:
            yield (f"model.model_dim = {s.model.model_dim} is not divisible by model.attn.num_heads = "
                   f"{self.num_heads}: change one of them")
        yield from layer_faults("model.attn.drop_layers", self.drop_layers, s)
        if len(self.drop_layers) == s.model.num_layers:
            yield "model.attn.drop_layers leaves no attention: leave one layer"
        if self.value_residual and self.value_embed:
            yield "model.attn.value_residual and model.attn.value_embed exclude each other: switch one off"


@dataclass(frozen=True)
class Balance:
    """Load balancing without an auxiliary loss (Wang et al., arXiv 2408.15664; DeepSeek-V3, arXiv
    2412.19437).

    A bias per expert is added to its score when experts are chosen, not to its gate. Once per step the biases
    b are updated from the tokens per expert c of the whole batch.
    """
    rule: Literal["sign", "proportional", "quantile"] = opt(
        "proportional", "update of the biases. sign: b += rate sign(mean c - c). proportional: b += rate "
                        "(mean c - c) / mean c. quantile (J. Su, as in Marin): the bias on the logits with "
                        "which each expert would have had an equal share of this batch")
    rate: float = opt(1e-2, "step size of the bias for sigmoid scores. Softmax scores, whose mean is "
                            "1/experts, get rate x 4/experts, because at equal logits a sigmoid rises by "
                            "1/4 and a softmax by about 1/experts per unit of the logit",
                      idle="model.mlp.moe.balance.rule=quantile", above=0, most=1, why=", the largest score")
    freeze_frac: float = opt(0.0, "last fraction of the steps in which the biases do not change "
                                  "(DeepSeek-V3: 0.5 of 14.8 T tokens, 0.034)", off=0.0, least=0, below=1)

    def check(self, s: "Settings") -> Iterator[str]:
        moe, path = s.model.mlp.moe, "model.mlp.moe"
        if self.rule == "quantile" and moe.groups_kept != moe.groups:
            yield (f"{path}.balance.rule=quantile counts on every expert being open to every token, and "
                   f"{path}.groups_kept = {moe.groups_kept} of {moe.groups} groups: choose rule proportional "
                   "or sign, or set groups=1")


@dataclass(frozen=True)
class MoE:
    """Mixture of experts (DeepSeekMoE: Dai et al., arXiv 2401.06066; DeepSeek-V3, arXiv 2412.19437, section
    2.1.2).

    Every token goes through a shared MLP and through the top_k routed experts e with the best scores; no
    token is dropped: y = shared(x) + sum_e g_e expert_e(x), g_e the gate.
    """
    experts: int = opt(8, "routed experts per layer", unit="expert", off=REFUSE, most=65536)
    top_k: int = opt(1, "routed experts per token", unit="expert", off=REFUSE)
    hidden: int = opt(1536, "hidden width of a routed expert", unit="channel", off=REFUSE, shrink="width")
    shared: int = opt(1536, "hidden width of the shared expert; 0: none", unit="channel", off=REFUSE,
                      shrink="width")
    score: Literal["sigmoid", "softmax"] = opt("sigmoid",
        "scoring function of the router's logits. sigmoid: of each logit. softmax: over the experts")
    normalise: bool = opt(False, "normalised gates: a token's gates are divided by their sum (not with "
                                 "top_k 1, where the router would get no gradient)", off=False)
    gate_scale: float = opt(1.0, "factor of the gates", above=0, most=1_000_000)
    groups: int = opt(1, "groups of experts; a token may choose only from its best `groups_kept` groups (a "
                         "group's score is the sum of its two best experts')", off=1)
    groups_kept: int = opt(1, "groups from which a token may choose", off=REFUSE)
    balance: Balance | None = opt(None, "load balancing by a bias on the choice of experts")
    sequence_loss: float = opt(0.0, "factor of the balance loss within each row (DeepSeek-V3, eq. 17)",
                               off=0.0, least=0, most=1_000_000)
    z_loss: float = opt(0.0, "factor of the router z-loss, the squared logsumexp of the router's logits "
                             "(ST-MoE, arXiv 2202.08906)", off=0.0, least=0, most=1_000_000)
    router_init: float = opt(1.0, "initial spread of the router: standard deviation of its weights times "
                                  "sqrt(model_dim), which is that of its logits for a normed input", least=0)
    dense_layers: tuple[int, ...] = opt((0,), "layers that keep a dense MLP", off=())

    def check(self, s: "Settings") -> Iterator[str]:
        path = "model.mlp.moe"
        if s.model.bias:
            yield f"{path} has no bias vectors: set model.bias=false"
        if self.experts < 2 or not 1 <= self.top_k < self.experts:
            yield (f"{path}.top_k = {self.top_k} of {path}.experts = {self.experts}: at least one must be "
                   "chosen and one left")
        if self.hidden < 1 or self.shared < 0:
            yield (f"{path}.hidden = {self.hidden} and {path}.shared = {self.shared}: must be at least 1 and "
                   "0")
        if self.normalise and self.top_k == 1:
            yield (f"{path}.normalise with top_k = 1 makes every gate the same number, and the router gets "
                   "no gradient: switch it off")
        yield from self.check_groups(path)
        yield from layer_faults(f"{path}.dense_layers", self.dense_layers, s)
        if not set(range(s.model.num_layers)) - set(self.dense_layers) - set(s.model.mlp.drop_layers):
            yield f"{path}.dense_layers leaves no layer with experts: leave one"

    def check_groups(self, path: str) -> Iterator[str]:
        if self.groups < 1 or self.experts % self.groups:
            yield f"{path}.groups = {self.groups} does not divide {self.experts} experts"
        each = self.experts // self.groups
        if not 1 <= self.groups_kept <= self.groups:
            yield f"{path}.groups_kept = {self.groups_kept}: must lie between 1 and groups = {self.groups}"
        if self.top_k > self.groups_kept * each:
            yield (f"{path}.groups_kept = {self.groups_kept} groups of {each} hold fewer than top_k = "
                   f"{self.top_k} experts")
        if self.groups > 1 and each < 2:
            yield f"{path}.groups = {self.groups}: a group needs two experts"


@dataclass(frozen=True)
class MLP:
    """The feed-forward network of a block (MLP)."""
    activation: Literal["gelu_tanh", "gelu", "relu_sq", "swiglu"] = opt(
        "gelu_tanh", "activation function; relu_sq is relu(x)^2 (So et al., Primer, arXiv 2109.08668). "
                     "swiglu: silu(V x) times W x, with a second matrix V and two thirds of the hidden "
                     "width, so that the parameters stay as many (Shazeer, arXiv 2002.05202)")
    expansion: int = opt(4, "hidden width divided by model_dim", off=REFUSE, least=1, most=1024)
    drop_layers: tuple[int, ...] = opt((), "layers without MLP", off=())
    moe: MoE | None = opt(None, "mixture of experts in place of the dense MLP")

    def check(self, s: "Settings") -> Iterator[str]:
        yield from layer_faults("model.mlp.drop_layers", self.drop_layers, s)
        if self.activation == "swiglu" and s.model.bias:
            yield "model.mlp.activation=swiglu has no bias vectors: set model.bias=false"
        if self.activation == "swiglu" and self.moe:
            yield ("model.mlp.activation=swiglu is for dense MLPs: choose another or add --without "
                   "model.mlp.moe")


@dataclass(frozen=True)
class X0Mix:
    """Embedding shortcut: at the entry of every block x <- a x + b x0, x0 the embedding, a and b per
    block."""
    x: float = opt(1.0, "initial a; the constant if `learned` is off")
    x0: float = opt(0.0, "initial b; the constant if `learned` is off")
    learned: bool = opt(True, "learned a and b, scalars per block (off: the constants)", off=False)


@dataclass(frozen=True)
class UnetSkips:
    """U-net skips: the outputs of the first half of the blocks are added, last first, before those of the
    second half."""
    init: float = opt(1.0, "initial skip weight; the constant if `learned` is off",
                      idle="model.residual.unet_skips.sigmoid")
    sigmoid: float | None = opt(None, "sigmoid skip weights (record 32): the weight is sigmoid(w), and this "
                                      "value is the initial w")
    learned: bool = opt(True, "learned weights, one scalar per skip (off: the constant `init`)", off=False)
    pairs: tuple[tuple[int, int], ...] | None = opt(
        None, "skips as pairs (layer whose output is added, layer before which it is added), record 45 (off: "
              "all of the U-net)"
    )
    gate: SkipGate | None = opt(None, "gate on the weights of the skips")

    def check(self, s: "Settings") -> Iterator[str]:
        path = "model.residual.unet_skips"
        if self.pairs is None:
            if s.model.num_layers % 2:
                yield (f"{path} needs an even model.num_layers, got {s.model.num_layers}: change it, give "
                       f"{path}.pairs or add --without {path}")
            return
        if not self.pairs:
            yield f"{path}.pairs is empty: give a skip like [[4, 7]] or add --without {path}"
        for pair in self.pairs:
            yield from layer_faults(f"{path}.pairs", pair, s)
            if pair[0] >= pair[1]:
                yield f"{path}.pairs: the skip {list(pair)} must lead to a later layer"
            for layer in set(pair) & empty_layers(s):
                yield (f"{path}.pairs: layer {layer} has neither attention nor MLP: choose another layer, or "
                       "remove it from model.attn.drop_layers")


@dataclass(frozen=True)
class Residual:
    """Wiring of the residual stream beyond the usual x + branch(x)."""
    x0_mix: X0Mix | None = opt(None, "embedding shortcut: learned mix of the stream and the embedding at "
                                     "every block entry")
    unet_skips: UnetSkips | None = opt(None, "U-net skips from the first to the second half of the blocks")
    backout: Backout | None = opt(None, "backout: the stream after an earlier block is subtracted before the "
                                        "final norm")


@dataclass(frozen=True)
class Untied:
    """Untied head: the output head has a weight of its own in place of the token table's."""
    init: Literal["linear", "zero"] = opt(
        "linear", "initial head weight. linear: as any other linear layer. zero: zeros",
        idle="model.init.head_std")
    tied_until: float | None = opt(
        None, "tied at first: fraction of the scheduled steps in which the embedding is the head's weight. "
              "Then the table of the embedding takes over this weight and its optimizer state (record 53)",
        above=0, most=1)

    def check(self, s: "Settings") -> Iterator[str]:
        if self.tied_until is not None and s.numerics.head != s.numerics.table:
            yield (f"model.head.untied.tied_until needs one dtype for both tables, and numerics.head is "
                   f"{s.numerics.head}, numerics.table {s.numerics.table}: set one to the other")
        if self.tied_until is not None and padded_vocab(s) != table_rows(s):
            yield ("model.head.untied.tied_until needs tables of one size: set model.embed.padded=true")


@dataclass(frozen=True)
class Softcap:
    """Logit soft cap (Gemma 2, arXiv 2408.00118): cap tanh(z / cap), or cap sigmoid((z + shift) / scale).

    cap sigmoid(z / scale) equals (cap/2) tanh(z / (2 scale)) plus a constant, which the softmax ignores.
    """
    form: Literal["tanh", "sigmoid"] = opt("tanh", "bounding function", off=REFUSE)
    cap: float = opt(30.0, "bound of the logits", off=REFUSE, above=0)
    scale: float = opt(7.5, "divisor inside the sigmoid", needs="model.head.softcap.form=sigmoid", above=0)
    shift: float = opt(0.0, "added to the logits inside the sigmoid, which makes the cap asymmetric (record "
                            "54)", off=0.0, needs="model.head.softcap.form=sigmoid")


@dataclass(frozen=True)
class Head:
    """From the residual stream to logits and the loss."""
    untied: Untied | None = opt(None, "untied head: a weight of its own")
    softcap: Softcap | None = opt(None, "logit soft cap")
    logit_scale: Literal["one", "rsqrt_dim"] = opt(
        "one", "factor of the logits before the soft cap. one: 1. rsqrt_dim: 1/sqrt(model_dim)")
    train_loss: Literal["mean", "sum"] = opt(
        "mean", "reduction of the training loss over the tokens of a logical rank. A sum makes Adam's eps "
                "relatively smaller and is otherwise equivalent, because Adam and Muon are scale-invariant "
                "up to eps")
    mtp: MTP | None = opt(None, "multi-token prediction: the loss counts further next tokens")


@dataclass(frozen=True)
class Init:
    """Initial weights."""
    scheme: Literal["gpt2", "uniform"] = opt(
        "gpt2", "distribution of the initial weights. gpt2: N(0, 0.02), and N(0, 0.02/sqrt(2 num_layers)) "
                "for the output projections. uniform: U(-bound/sqrt(fan_in), bound/sqrt(fan_in)), and N(0, "
                "1) for embedding tables")
    bound: float = opt(1.0, "half-width of the uniform scheme times sqrt(fan_in); the standard deviation is "
                            "bound/sqrt(3 fan_in)", least=0)
    zero_proj: bool = opt(False, "zero-initialised output projections of attention and MLP (as in muP)",
                          off=False)
    qkv_bound: float | None = opt(None, "bound of the uniform scheme for the projections q, k and v (record "
                                        "53; off: that of `bound`)",
                                  needs="model.init.scheme=uniform", least=0)
    head_std: float | None = opt(None, "standard deviation of the head's initial weight, normally "
                                       "distributed, which is also the token table if they are tied (record "
                                       "51; off: by `scheme`)", least=0)

    def check(self, s: "Settings") -> Iterator[str]:
        if self.qkv_bound is not None and s.model.attn.latent:
            yield ("model.init.qkv_bound is of the projections q, k and v, which model.attn.latent replaces: "
                   "switch one off")


@dataclass(frozen=True)
class Model:
    """The model, a transformer (axis ml: what is computed)."""
    num_layers: int = opt(12, "blocks of attention and MLP", unit="layer", off=REFUSE, least=1, most=1000)
    model_dim: int = opt(768, "width of the residual stream", unit="channel", off=REFUSE, shrink="width",
                         least=1, most=2 ** 17)
    vocab_size: int = opt(50257, "token ids of the tokenizer", unit="token id", off=REFUSE, shrink="vocab",
                          least=1, most=65536, why=", as shards hold 16-bit token ids")
    pad_vocab_to: int = opt(1, "padding of the vocabulary to a multiple of this; the padding takes part in "
                               "the softmax", off=1, least=1, most=65536)
    norm: Literal["layernorm", "rmsnorm"] = opt(
        "layernorm", "normalisation. layernorm: with gain and bias. rmsnorm: with neither (Zhang & "
                     "Sennrich, arXiv 1910.07467)")
    bias: bool = opt(True, "bias vectors in the linear layers", off=False)
    embed: Embed = opt(Embed, "from token ids to the residual stream")
    attn: Attention = opt(Attention, "self-attention")
    mlp: MLP = opt(MLP, "feed-forward network of a block")
    residual: Residual = opt(Residual, "wiring of the residual stream")
    head: Head = opt(Head, "from the residual stream to logits and the loss")
    init: Init = opt(Init, "initial weights")


# ----- schedule ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Schedule:
    """The schedules over the steps of a run (axis ml).

    The scheduled steps are those before the extension. Fractions of a run are fractions of them.
    """
    steps: int = opt(19560, "optimizer steps, those of the extension included", unit="step", off=REFUSE,
                     shrink="steps", least=1, most=1_000_000)
    extension_steps: int = opt(0, "extension (record 35): the last steps, after the end of all schedules; at "
                                  "most an eighth of the steps, so that a short trial has its schedules too",
                               unit="step", off=0, shrink="steps", least=0)
    extension_at: float = opt(1.0, "point at which the schedules stand during the extension, as a fraction "
                                   "of the scheduled steps (records 35 to 45 stop just before the end)",
                              off=1.0, needs="schedule.extension_steps", above=0, most=1)
    lr_spans_extension: bool = opt(False, "learning rate that falls during the extension too: its "
                                          "fractions are of all steps (record 41)", off=False,
                                   needs="schedule.extension_steps")
    lr: Literal["cosine", "trapezoid"] = opt(
        "cosine", "shape of the learning rate after its warm-up. cosine: a half cosine to zero. trapezoid: "
                  "constant, then linear over the cooldown")
    warmup_steps: int = opt(700, "learning-rate warm-up, linear", unit="step", off=0, shrink="steps", least=0)
    cooldown_frac: float = opt(0.0, "cooldown as a fraction of the steps, in place of cooldown_steps",
                               off=0.0, needs="schedule.lr=trapezoid", least=0, most=1)
    lr_floor: float = opt(0.0, "learning-rate factor at the end of the cooldown", off=0.0,
                          needs="schedule.lr=trapezoid", least=0, most=1)
    lr_peaks: tuple[tuple[float, float], ...] = opt(
        (), "learning-rate jumps (record 46), for batches that grow: pairs of a fraction of the scheduled "
        "steps and a factor. Beyond that fraction, the cooldown starts from this factor in place of 1",
        off=(), needs="schedule.lr=trapezoid", least=0
    )
    cooldown_steps: int = opt(0, "cooldown, the linear decay at the end", unit="step", off=0,
                              needs="schedule.lr=trapezoid", shrink="steps", least=0)
    stages: tuple[float, ...] = opt(
        (), "stages of the run: fractions of the scheduled steps, which add up to 1. A setting that has one "
        "value per stage goes through its values in this order and keeps the last one in the extension",
        off=(), above=0
    )

    @property
    def extension(self) -> int:
        """Steps of the extension."""
        return min(self.extension_steps, self.steps // 8)

    def check(self, s: "Settings") -> Iterator[str]:
        if self.stages and abs(sum(self.stages) - 1) > 1e-6:
            yield f"schedule.stages = {list(self.stages)}: must add up to 1, the whole run"
        if self.cooldown_frac and self.cooldown_steps:
            yield ("schedule.cooldown_frac and schedule.cooldown_steps exclude each other: set one of them "
                   "to 0")
        ends = [end for end, _ in self.lr_peaks]
        if ends != sorted(set(ends)) or ends and ends[-1] >= 1:
            yield (f"schedule.lr_peaks = {[list(pair) for pair in self.lr_peaks]}: must list growing "
                   "fractions below 1, each with a factor")


# ----- data, validation -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Data:
    """The stream of training tokens (axis ml)."""
    loader: Literal["shuffled", "per_rank", "synced", "bos_aligned", "packed"] = opt(
        "shuffled", "order of the tokens. shuffled: llm.c's shuffled slots. per_rank: in order, a position "
                    "per logical rank (the positions drift apart at shard ends). synced: in order, one "
                    "position for all ranks. bos_aligned: each rank starts at a document start. packed: "
                    "whole documents, truncated to max_document")
    switch_at_equal: bool = opt(False, "earlier shard switch: a shard ends one token earlier (records "
                                       "15-17)", off=False, needs="data.loader=per_rank")
    max_document: int | None = opt(None, "maximum document length: longer documents are truncated",
                                   unit="token", shrink="length", needs="data.loader=packed", least=1)
    tokens_per_rank: int | tuple[int, ...] = opt(
        65536, "tokens of one logical rank per step, or one number per stage; a step has eight logical ranks",
        unit="token", off=REFUSE, shrink="batch", least=1, most=2 ** 24)
    seq_len: int = opt(1024, "context length in training: the tokens of a rank are cut into rows of this "
                             "length", unit="token", off=REFUSE, shrink="length", least=1)
    first_batch_twice: bool = opt(False, "repeated first batch: steps 0 and 1 use the same batch (the "
                                         "original reset its loader)", off=False,
                                  needs="data.loader=per_rank")
    wrap: bool = opt(True, "restart at the first shard after the last one (off: running out of shards is an "
                           "error)", off=False, shrink="reread")

    def check(self, s: "Settings") -> Iterator[str]:
        sizes, stages, documents = per_stage(self.tokens_per_rank), s.schedule.stages, by_document(s)
        if isinstance(self.tokens_per_rank, tuple) and len(sizes) != len(stages):
            yield (f"data.tokens_per_rank has {len(sizes)} values and schedule.stages has {len(stages)}: give one "
                   "value per stage, or one number for all")
        if len(set(sizes)) > 1 and self.loader == "shuffled":
            yield ("data.loader=shuffled needs steps of one size: choose another loader, or one "
                   "data.tokens_per_rank for all stages")
        for size in sizes if not (documents and stages) else ():
            if size % self.seq_len:
                yield (f"data.tokens_per_rank = {size} is not a multiple of data.seq_len = {self.seq_len}: "
                       "change one of them")
        if documents and self.seq_len != max(sizes):
            yield (f"data.loader={self.loader} needs one row per logical rank: set data.seq_len = "
                   f"data.tokens_per_rank = {max(sizes)}")
        if self.loader == "packed" and self.max_document is None:
            yield ("data.loader=packed needs data.max_document: set it to the longest piece of a document, "
                   "like 2048")


@dataclass(frozen=True)
class Validation:
    """The measurement of the validation loss (axis ml)."""
    tokens: int = opt(10_485_760, "validation targets: the first ones of the validation shard", unit="token",
                      off=REFUSE, shrink="validation", least=1, most=10 ** 9)
    seq_len: int = opt(1024, "context length in validation", unit="token", off=REFUSE, shrink="length",
                       least=1)
    every: int = opt(250, "steps between validations; there is always one after the last step", unit="step",
                     off=REFUSE, shrink="eighth", least=1)
    target: float | None = opt(3.28, "validation loss to reach, in nats per token", off=None, shrink="target")

    def check(self, s: "Settings") -> Iterator[str]:
        if self.tokens % (LOGICAL_RANKS * self.seq_len):
            yield (f"validation.tokens = {self.tokens} is not a multiple of 8 x validation.seq_len = "
                   f"{LOGICAL_RANKS * self.seq_len}: change one of them")


# ----- numerics ---------------------------------------------------------------------------------------------

Dtype = Literal["bfloat16", "float32", "float64"]


def precision(default: str, doc: str) -> Any:
    """Declare a dtype of the precision plan, which system.precision replaces."""
    return opt(default, doc, exact=PRECISION)


@dataclass(frozen=True)
class FP8Head:
    """FP8 head (record 19): the head's matrix products in training use 8-bit floats.

    Each operand is multiplied by its factor and cast. The forward pass uses e4m3 (largest value 448),
    gradients use e5m2 (57344); larger values are clamped. Validation does not use FP8. `grad` refers to the
    gradient of a rank's mean or sum of losses, as in the originals; the trainer undoes its own loss averaging
    before the cast.
    """
    x: float = opt(2.0, "factor of the activations", shrink="rsqrt_width", above=0)
    w: float = opt(32.0, "factor of the weight", above=0)
    grad: float = opt(8192.0, "factor of the gradient of a token's own loss with respect to its logits "
                              "(softmax - target)", above=0)

    def check(self, s: "Settings") -> Iterator[str]:
        sizes = {"classes (model.pad_vocab_to)": padded_vocab(s), "model.model_dim": s.model.model_dim,
                 "data.tokens_per_rank": math.gcd(*per_stage(s.data.tokens_per_rank))}
        for name, size in sizes.items():
            if size % 16:
                yield (f"numerics.fp8_head needs multiples of 16 and {name} are {size}: change it or "
                       "add --without numerics.fp8_head")


@dataclass(frozen=True)
class FP8Down:
    """FP8 for the second product of the MLPs (c_proj) too, with delayed scales (record 89).

    A delayed scale is computed from an earlier maximum, so that an operand is read only once. Activations:
    one scale per layer and logical rank, from its previous forward pass (1 in the first). Weight: from the
    previous step.
    """
    activation: float = opt(1.8, "margin of the activation scale: the scale is margin x (maximum in the "
                                 "previous forward pass) / 448", above=0)
    weight: float = opt(1.12, "margin of the weight scale: the scale is margin x (largest entry in the "
                              "previous step) / 448", above=0)
    exact_steps: int = opt(
        16,
        "first steps with an exact weight scale: before the first step and after each of this many steps, "
        "the scale is (current largest entry) / 448", unit="step", off=REFUSE, shrink="steps", least=0
    )


@dataclass(frozen=True)
class FP8MLP:
    """FP8 MLPs (record 84): the first product (c_fc) uses e4m3 in the forward pass of training.

    Each operand is divided by its scale and cast. A scale is the largest entry / 448: of the weight, in the
    dtype `matmul`, and of the activations of one logical rank, so that the rounding of a token depends on all
    tokens of its rank. The backward pass uses the operands before the cast. Validation does not use FP8.
    """
    down: FP8Down | None = opt(None, "FP8 for the second product too, with delayed scales")

    def check(self, s: "Settings") -> Iterator[str]:
        if s.model.bias:
            yield "numerics.fp8_mlp has no bias vectors: set model.bias=false"
        if s.model.mlp.moe:
            yield ("numerics.fp8_mlp is for dense MLPs: add --without model.mlp.moe; experts have "
                   "numerics.fp8_experts")
        if s.model.model_dim % 16:
            yield (f"numerics.fp8_mlp needs multiples of 16 and model.model_dim is {s.model.model_dim}: "
                   "change it or add --without numerics.fp8_mlp")


@dataclass(frozen=True)
class Numerics:
    """The precision plan: dtypes of stored tensors and of computations (axis numerics)."""
    matmul: Dtype = precision("bfloat16", "linear layers and attention: dtype of their operands and results")
    eval_matmul: Dtype = precision("bfloat16", "linear layers and attention in validation")
    residual: Dtype = precision("bfloat16", "dtype of the residual stream")
    matrix: Dtype = precision("float32", "stored weights of linear layers and their optimizer state")
    head: Dtype = precision("float32", "stored weight of an untied head")
    gate: Dtype = precision("float32", "stored weights of gates")
    table: Dtype = precision("float32", "stored embedding tables and their optimizer state")
    scalar: Dtype = precision("float32", "stored gains, biases, learned scalars and their optimizer state")
    router: Dtype = precision("float32", "stored weights and arithmetic of the routers, where close scores "
                                         "decide which experts are chosen")
    fp8_experts: bool = opt(False, "simulated FP8 of the experts: their operands are rounded to e4m3 in "
                                   "training, with a scale per row. The products stay in `matmul`, and the "
                                   "backward pass uses the rounded operands", off=False,
                            needs="model.mlp.moe", exact=False)
    init_grid: Dtype = precision("float32", "grid of the initial weights: linear weights are rounded to it "
                                            "once")
    norm: Dtype = precision("float32", "statistics of the norms")
    norm_eps: float = opt(1e-5, "constant added to the mean square (rmsnorm) or to the variance (layernorm)",
                          least=0)
    qk_norm_eps: float | None = opt(None, "the same constant for QK norm alone (off: norm_eps)",
                                    needs="model.attn.qk_norm", least=0)
    rope: Dtype = precision("float32", "stored cos and sin tables of the rotary embedding")
    rope_frequency: Dtype = precision("float32", "frequencies from which the rotary tables are made")
    rope_math: Dtype = precision("float32", "arithmetic of the rotation: the widest of this, the tables and "
                                            "q, k")
    softcap: Dtype = precision("float32", "arithmetic of the logit soft cap: this or a wider dtype")
    fp8_head: FP8Head | None = opt(None, "FP8 head in training", exact=None)
    fp8_mlp: FP8MLP | None = opt(None, "FP8 MLPs in the forward pass of training",
                                 needs="model.mlp.activation=relu_sq", exact=None)
    loss: Dtype = precision("float32", "arithmetic of the cross entropy, and dtype of the logits it gets")
    eval_loss: Dtype = precision("float32", "the same in validation")
    newton_schulz: Dtype = precision("bfloat16", "dtype of the Newton-Schulz iteration")
    newton_schulz_norm: Dtype = precision(
        "float32", "Frobenius norm before the iteration, and the tensor whose norm it is")
    newton_schulz_form: Literal["expanded", "factored", "symmetric"] = opt(
        "expanded", "form of the Newton-Schulz polynomial. expanded: aX + b(AX) + (cA)(AX). factored: aX + "
                    "(bA + (cA)A)X. symmetric: bA + cAA is rounded once, and so is aX plus its product with "
                    "X (record 27). They differ by rounding")
    muon_update: Dtype = precision("float32", "dtype of the scaled Muon update, before it is subtracted")
    muon_decay: Dtype = precision("float32", "dtype to which Muon's update is rounded when its cautious "
                                             "decay has been added")
    adam: Dtype = precision("float32", "arithmetic of AdamW")
    adam_state: Literal["parameter", "bfloat16", "float32"] = opt(
        "parameter", "stored moments of AdamW. parameter: the dtype of the parameter", exact="parameter")
    matrix_mantissa: bool = opt(
        False, "kept mantissa: Muon updates bfloat16 matrices exactly as float32 ones, whose lower 16 bits "
               "are optimizer state; the weight in use is the truncated one (record 57)", off=False,
        needs="numerics.matrix=bfloat16", exact=False)


# ----- all --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Settings:
    """A complete description of what a run computes and how."""
    model: Model = opt(Model, "the model, a transformer")
    optim: Optim = opt(Optim, "the optimizer")
    schedule: Schedule = opt(Schedule, "the schedules over the steps of a run")
    data: Data = opt(Data, "the stream of training tokens")
    validation: Validation = opt(Validation, "the measurement of the validation loss")
    numerics: Numerics = opt(Numerics, "the precision plan")
    system: System = opt(System, "the execution of a run")


# ----- derived numbers --------------------------------------------------------------------------------------

def head_dim(s: Settings) -> int:
    """Channels of a head, without multi-head latent attention."""
    return s.model.model_dim // s.model.attn.num_heads


def query_dim(s: Settings) -> int:
    """Width of a head's query and key."""
    latent = s.model.attn.latent
    return latent.still + latent.turning if latent else head_dim(s)


def value_dim(s: Settings) -> int:
    """Width of a head's value."""
    return s.model.attn.latent.value if s.model.attn.latent else head_dim(s)


def rotary_dim(s: Settings) -> int:
    """Channels of a head's query and key to which rotary positions apply."""
    return s.model.attn.latent.turning if s.model.attn.latent else head_dim(s)


def padded_vocab(s: Settings) -> int:
    """Rows of the token table and classes of the softmax."""
    return math.ceil(s.model.vocab_size / s.model.pad_vocab_to) * s.model.pad_vocab_to


def table_rows(s: Settings) -> int:
    """Rows of the embedding tables."""
    return padded_vocab(s) if s.model.embed.padded else s.model.vocab_size


def per_stage(value: object) -> tuple:
    """The values of a setting that may have one per stage; of length 1 where one value holds for all
    stages."""
    return value if isinstance(value, tuple) else (value,)


def by_document(s: Settings) -> bool:
    """Whether the loader goes by documents. A logical rank then has one row, whatever its tokens."""
    return s.data.loader in ("bos_aligned", "packed")


def row_limit(s: Settings) -> int:
    """The longest row that the tokens of a logical rank allow in every stage."""
    sizes = per_stage(s.data.tokens_per_rank)
    return max(sizes) if by_document(s) else min(sizes)


def tokens_per_step(s: Settings) -> int | float:
    """Tokens of one step over all logical ranks, the mean over the steps. Single steps: schedule.plan."""
    sizes = per_stage(s.data.tokens_per_rank)
    if len(sizes) == 1:
        return LOGICAL_RANKS * sizes[0]
    scheduled = sum(size * share for size, share in zip(sizes, s.schedule.stages))
    extension = s.schedule.extension / s.schedule.steps
    return LOGICAL_RANKS * ((1 - extension) * scheduled + extension * sizes[-1])


# ----- check ------------------------------------------------------------------------------------------------

def check(s: Settings) -> Settings:
    """The same settings, or a UserError for the first contradiction, which names the paths and the remedy."""
    for message in faults(s):
        raise UserError(message)
    return s


def faults(s: Settings) -> Iterator[str]:
    """Messages on numbers out of bounds, then on parts that contradict each other, then on unmet needs.

    A check may rely on what was checked before it, so only the first message is certain to be right.
    """
    for path, f, value in walk(s):
        yield from bound_faults(path, f.metadata["bounds"], value)
    for _, _, node in walk(s):
        if hasattr(node, "check"):
            yield from node.check(s)
    for path, needs, default in unmet_needs(s):
        remedy = f"leave {path} at its default" if default is not None else f"switch it off: --without {path}"
        yield f"{path} needs {needs}: set it too, or {remedy}"


def check_processes(s: Settings, processes: int) -> None:
    """UserError if the experts cannot be shared out among so many processes.

    Every process calls this before init_process_group, so that the error is printed once.
    """
    moe = s.model.mlp.moe
    if s.system.expert_parallel and moe.experts % processes:
        raise UserError(f"system.expert_parallel: {processes} processes do not divide {moe.experts} experts: "
                        "change one of them")
