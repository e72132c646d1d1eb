"""What a model is: the sections of settings.model.Model, with the widths that follow from them.

Sections that refer to others stand behind them. In `check(self, s)`, s is the whole Settings.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from settings.declare import REFUSE, opt
from settings.init import Init
from settings.mixing import (
    XSA, Backout, Bigram, Compose, Lanes, LayerReuse, Mudd, Narrow, OutputSmear, SecondEmbed, SkipGate, Smear,
    Sublayers, TokenGates, ValueGate, acting_faults, attention_faults, channel_faults, layer_faults
)


# ----- parts of records 34 to 57 ----------------------------------------------------------------------------

@dataclass(frozen=True)
class SALambdas:
    """Factors of the weights of attention, one of each kind per layer (records 47 and 48).

    Queries, keys and values are projected with a0 W, the heads' outputs with a1 W_O. QK norm removes a0 from
    queries and keys.
    """
    qkv: float = opt(0.5, "initial a0; the constant if `learned` is off")
    o: float | None = opt(None, "factor of the output projection, and its initial value a1")
    learned: bool = opt(True, "learned a0 and a1, scalars per layer (off: the constants)", off=False)

    def check(self, s: Any) -> Iterator[str]:
        if s.model.attn.latent:
            yield ("model.attn.sa_lambdas multiplies the projections q, k, v and o, which model.attn.latent "
                   "replaces: switch one off")


@dataclass(frozen=True)
class MTP:
    """Multi-token prediction (record 53; after Gloeckle et al., arXiv 2404.19737, but with a single head).

    The loss of a token is the sum over n of w_n times the cross entropy of the n-th next token. In each stage
    the weights go linearly from those of `start` to those of `end`. Validation counts the next token only.
    """
    start: tuple[tuple[float, ...], ...] = opt(
        ((1.0, 0.5),), "weights of the next tokens at the start of each stage", off=REFUSE, least=0)
    end: tuple[tuple[float, ...], ...] = opt(
        ((1.0, 0.5),), "weights of the next tokens at the end of each stage", off=REFUSE, least=0)
    module: bool = opt(
        False, "MTP module: the second next token is predicted by a module of its own, which sees the next "
               "one (DeepSeek-V3, arXiv 2412.19437, section 2.2, at depth 1), within documents (off: by the "
               "same logits as the next one)", off=False)
    full_mass: bool = opt(
        False, "gradient of the kernels of records 79 to 92: the softmax counts the weights of all targets "
               "in the last tokens of a row too, where the loss has fewer (off: the gradient of the loss)",
        off=False)

    def check(self, s: Any) -> Iterator[str]:
        sizes = [[len(weights) for weights in side] for side in (self.start, self.end)]
        stages = max(1, len(s.schedule.stages))
        if len(self.start) != stages:
            yield (f"model.head.mtp.start has {len(self.start)} lists and schedule.stages has {stages} "
                   "(at least one): give one list of weights per stage")
        if sizes[0] and min(map(min, filter(None, sizes))) < 1:
            yield "model.head.mtp: a list of weights is empty: give each stage at least one weight"
        elif sizes[0] != sizes[1] or not sizes[0]:
            yield ("model.head.mtp: start and end must have the same stages, with as many weights in each, "
                   f"and they have {sizes[0]} and {sizes[1]}")
        elif min(weights[0] for side in (self.start, self.end) for weights in side) <= 0:
            yield (
                "model.head.mtp: the weight of the next token must be above 0 in every stage, in start and "
                "end"
            )
        elif self.module and max(sizes[0]) > 2:
            yield ("model.head.mtp.module predicts one token more than the model: give at most two weights "
                   "per stage")
        if self.full_mass and (self.module or max(sizes[0], default=0) < 2):
            yield ("model.head.mtp.full_mass is about the second and later weights of one softmax, and there "
                   "are none: switch it off")
        if self.module and s.model.embed.learned_positions:
            yield ("model.head.mtp.module embeds the next token, for which the position table has no row: "
                   "set model.embed.learned_positions=false")


# ----- parts of records 1 to 33, and the whole --------------------------------------------------------------

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
    bigram: Bigram | None = opt(None, "bigram embedding: a hashed table of token pairs, added to the stream")
    second: SecondEmbed | None = opt(None, "second input embedding: another token table, added at every "
                                           "block")

    def check(self, s: Any) -> Iterator[str]:
        if self.learned_positions and s.validation.seq_len > s.data.seq_len:
            yield (f"validation.seq_len = {s.validation.seq_len} is longer than the learned positions "
                   f"(data.seq_len = {s.data.seq_len}): set model.embed.learned_positions=false or "
                   "shorten it")


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al., arXiv 2309.00071; record 31), applied when the long window grows from a to b blocks.

    A channel pair that makes r turns within the old window keeps its frequency f if r >= beta, gets f a/b if
    r <= alpha, and a linear mix of the two in between. The attention scale is multiplied by 1 + gain ln(b/a).
    """
    alpha: float = opt(1.0, "lower threshold; pairs with at most this many turns get the frequency f a/b",
                       shrink="turns", least=0)
    beta: float = opt(32.0, "upper threshold; pairs with at least this many turns keep their frequency",
                      shrink="turns")
    gain: float = opt(0.2, "growth of the attention scale, per factor e by which the window grows", off=0.0)
    last: int | None = opt(None, "largest window to which YaRN adapts: larger ones leave the tables as they "
                                 "are (medium record 18; off: all)", unit="block", least=1)

    def check(self, s: Any) -> Iterator[str]:
        if self.beta <= self.alpha:
            yield (f"model.attn.rope.yarn.beta = {self.beta}: must be greater than "
                   f"model.attn.rope.yarn.alpha = {self.alpha}")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv 2104.09864) of the channel pairs (j, j + head_dim/2)."""

    adjacent: bool = opt(
        False,
        "rotary pairs of neighbours (2j, 2j + 1), as in the paper (record 58; off: (j, j + head_dim/2))",
        off=False
    )
    base: float = opt(10000.0, "base of the frequencies base^(-2j/head_dim)", above=0)
    half_truncated: bool = opt(False, "half-truncated rotary embedding (@YouJiacheng): the first half of the "
                                      "pairs rotates with frequencies base^(-j/(head_dim/4 - 1)), the other "
                                      "half does not rotate", off=False)
    yarn: Yarn | None = opt(None, "YaRN: adapt the rotary frequencies and the attention scale when the long "
                                  "window grows", needs="model.attn.window.growth=stages")

    def check(self, s: Any) -> Iterator[str]:
        if rotary_dim(s) % 2:
            yield (f"model.attn.rope turns pairs and gets {rotary_dim(s)} channels of a head: change "
                   f"{rotary_source(s)}")
        if self.half_truncated and rotary_dim(s) % 4:
            yield (f"model.attn.rope.half_truncated needs a head_dim that is a multiple of 4, got "
                   f"{rotary_dim(s)}: change {rotary_source(s)} or add --without "
                   "model.attn.rope.half_truncated")


@dataclass(frozen=True)
class QKNorm:
    """QK norm (Henry et al., arXiv 2010.04245): RMS norm of each head's queries and keys, without gain."""
    order: Literal["after_rope", "before_rope"] = opt(
        "after_rope", "position of the norm relative to the rotation; both are equal in exact arithmetic "
                      "and differ by rounding")


@dataclass(frozen=True)
class ValueResidual:
    """Value residual (Zhou et al., arXiv 2410.17897): v <- (1 - lambda) v + lambda v1.

    v1 are the values of the first block.
    """
    init: float = opt(0.5, "initial lambda; the constant lambda if `learned` is off")
    learned: bool = opt(True, "learned lambda, one scalar per block (off: the constant `init`)", off=False)

    def check(self, s: Any) -> Iterator[str]:
        if 0 in s.model.attn.drop_layers:
            yield "model.attn.value_residual takes the values of block 0: keep attention there"


@dataclass(frozen=True)
class ValueEmbed:
    """Value embeddings (record 14, @KoszarskyB): each value is mixed with the token's row of a table."""
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
        "normal", "initial value tables. normal: N(0, table_std^2). zero: zeros")
    table_std: float = opt(1.0, "standard deviation of the initial value tables (record 70: 0.01)",
                           idle="model.attn.value_embed.table_init=zero", above=0)
    gate: ValueGate | None = opt(None, "gate on each head's value embedding")

    def check(self, s: Any) -> Iterator[str]:
        path, layers = "model.attn.value_embed.tables", s.model.num_layers
        if len(self.tables) != layers:
            yield (f"{path} has {len(self.tables)} entries for {layers} layers: give one per layer, -1 for "
                   "none")
        used = sorted({t for t in self.tables if t >= 0})
        if min(self.tables) < -1 or used != list(range(len(used))):
            yield f"{path} = {list(self.tables)}: number the tables 0, 1, ... without gaps"
        read = {t for i, t in enumerate(self.tables) if i not in s.model.attn.drop_layers}
        for i, t in enumerate(self.tables):
            if t >= 0 and t not in read:
                yield (f"{path}: table {t} is of layer {i} alone, which has no attention: set -1 there, or "
                       "take the layer from model.attn.drop_layers")


@dataclass(frozen=True)
class ForcedShort:
    """A fixed short window in some steps (log of record 72, @dualverse-ai and the AI system Station).

    In the steps from `start` to the one before `stop`, and in the validations before them, the layers with
    the short window have `blocks`; the final validation is after all of them. The long window and YaRN, which
    follows it, stay.
    """
    blocks: int = opt(2, "short window in these steps", unit="block", off=REFUSE, least=1)
    start: int = opt(1010, "first of these steps", unit="step", off=REFUSE, shrink="steps", least=0)
    stop: int = opt(1515, "step after the last of them", unit="step", off=REFUSE, shrink="steps", least=1)

    def check(self, s: Any) -> Iterator[str]:
        path, long = "model.attn.window.forced_short", s.model.attn.window.long_layers
        if self.start >= self.stop:
            yield f"{path}.start = {self.start} is not before {path}.stop = {self.stop}: lower it"
        if long is None or not set(range(s.model.num_layers)) - set(long) - set(s.model.attn.drop_layers):
            yield (f"{path} is of layers with the short window, and there are none: leave layers out of "
                   "model.attn.window.long_layers")


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
    growth: Literal["constant", "floor", "ceil", "cubic", "stages"] = opt(
        "constant", "schedule of w over the run. constant: `start`. floor, ceil: linear from `start` to "
                    "`end`, rounded down or up to a multiple of `grain` (at least one grain). cubic: as ceil "
                    "along 4x^3 - 6x^2 + 3x, x the progress (medium record 8, @jadenj3o). stages: each entry "
                    "of `stages` for one of schedule.stages, or for an equal share of the steps")
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
    forced_short: ForcedShort | None = opt(None, "forced short window: a fixed size in some steps")
    extension: int | None = opt(None, "long window in the extension (record 42; off: the last stage's)",
                                unit="block", needs="schedule.extension_steps")
    final: int | None = opt(None, "long window in the final validation (record 31)", unit="block",
                            needs="model.attn.window.growth=stages")
    final_long: int | None = opt(None, "window of the layers with the long window in the final validation "
                                       "(record 35); short windows and YaRN do not follow it", unit="block",
                                 needs="model.attn.window.growth=stages", least=1)
    final_last_layer: int | None = opt(None, "window of the last layer in the final validation (record 33)",
                                       unit="block", needs="model.attn.window.final")

    @property
    def changes(self) -> bool:
        """Whether a training may have more than one window."""
        if self.forced_short is not None:
            return True
        if self.growth == "stages":
            return len({*self.stages, self.extension} - {None}) > 1
        return self.growth != "constant" and self.start != self.end

    def check(self, s: Any) -> Iterator[str]:
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
            if not self.stages or min(self.stages) < 1 or list(self.stages) != sorted(self.stages):
                yield (f"{path}.stages = {list(self.stages)}: must list windows of at least one block, none "
                       "smaller than the one before, like [3, 7, 11]")
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

    n is the first `channels` channels of the block's normalised input. With model.token_gates the gate is a
    coefficient per token and head instead, without a sigmoid.
    """

    channels: int = opt(
        12, "input channels of the gate", unit="channel", off=REFUSE, idle="model.token_gates"
    )
    layers: tuple[int, ...] | None = opt(None, "layers that have it (record 85; off: all)")

    def check(self, s: Any) -> Iterator[str]:
        yield from channel_faults("model.attn.gate.channels", self.channels, s)
        yield from acting_faults("model.attn.gate.layers", self.layers, s)


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    The keys and values of all heads are projected from one narrow latent per token, so generation needs to
    cache only this latent and the rotary part of the keys, which all heads share.
    """
    kv_lora_rank: int = opt(256, "width of the RMS-normed latent of keys and values", unit="channel",
                            off=REFUSE, shrink="width", least=1)
    q_lora_rank: int | None = opt(None, "width of the RMS-normed latent of the queries (off: queries are "
                                        "projected straight from the residual stream)", unit="channel",
                                  shrink="width", least=1)
    qk_nope_head_dim: int = opt(96, "channels of a head's query and key without rotation", unit="channel",
                                off=REFUSE, shrink="width", least=1)
    qk_rope_head_dim: int = opt(32, "channels of a head's query and key with rotation", unit="channel",
                                off=REFUSE, shrink="width", least=1)
    v_head_dim: int = opt(128, "width of a head's value", unit="channel", off=REFUSE, shrink="width", least=1)

    def check(self, s: Any) -> Iterator[str]:
        attn = s.model.attn
        if s.model.bias:
            yield "model.attn.latent has no bias vectors: set model.bias=false"
        if attn.rope is None:
            yield "model.attn.latent gives positions to its rotary part: it needs model.attn.rope"
        elif attn.rope.half_truncated:
            yield ("model.attn.latent says itself which channels rotate: add --without "
                   "model.attn.rope.half_truncated")
        if attn.value_embed is not None and attn.num_heads * self.v_head_dim != s.model.model_dim:
            yield (f"model.attn.value_embed has {s.model.model_dim} channels, the values of "
                   f"model.attn.latent have {attn.num_heads} x {self.v_head_dim}: change "
                   "model.attn.latent.v_head_dim")


@dataclass(frozen=True)
class Attention:
    """Causal self-attention."""
    num_heads: int = opt(12, "attention heads; head_dim = model_dim / num_heads, unless model.attn.latent "
                             "sets the widths", unit="head", least=1)
    rope: Rope | None = opt(None, "rotary position embedding: queries and keys are rotated by their position")
    qk_norm: QKNorm | None = opt(None, "QK norm: RMS norm of queries and keys per head")
    v_norm: bool = opt(False, "value norm (medium record 6): RMS norm of each head's values, before value "
                              "embeddings are mixed in", off=False)
    raw_input: bool = opt(False, "raw input (medium record 6): attention reads the stream without a norm",
                          off=False, needs="model.attn.qk_norm and model.attn.v_norm")
    depth_scale: bool = opt(False, "attention branch scaled by 1/sqrt(2 num_layers) before it is added to "
                                   "the stream", off=False)
    value_residual: ValueResidual | None = opt(
        None, "value residual: mix the values with those of the first block")
    value_embed: ValueEmbed | None = opt(None, "value embeddings: mix the values with rows of token tables")
    document_mask: bool = opt(False, "document masking: a query sees only keys of its own document, which "
                                 "begins with an end-of-text token", off=False)
    window: Window | None = opt(None, "sliding window: a query sees only the most recent keys")
    scale: float | None = opt(None, "softmax scale, which multiplies q.k (off: 1/sqrt of the width of a "
                                    "query)", shrink="rsqrt_width", above=0)
    gate: HeadGate | None = opt(None, "attention gate: a sigmoid gate on each head's output")
    sa_lambdas: SALambdas | None = opt(None, "factors of the projections of attention, scalars per layer")
    key_offset: bool = opt(
        False, "partial key offset (record 49, @classiclarryd): in layers with the long window, the channels "
               "of a key that do not rotate are those of the previous token in the row", off=False,
        needs="model.attn.rope.half_truncated"
    )
    key_offset_halves: bool = opt(
        False, "key offset of halved pairs: the channels that would not rotate if the pairs were (j, j + "
               "head_dim/2), although the pairs are neighbours (records 58 to 61, by oversight)", off=False,
        needs="model.attn.rope.adjacent"
    )
    paired_layers: tuple[int, ...] = opt(
        (),
        "paired heads (record 58): in these layers heads h and h + num_heads/2 share one causal sequence of "
        "twice as many positions, in which each token's two heads follow each other; the window counts these "
        "positions", off=(), needs="model.attn.window"
    )
    segment: int | None = opt(
        None, "segments (record 92): in training, attention cuts documents at every multiple of this length",
        unit="token", shrink="length", needs="model.attn.document_mask", least=1
    )
    qk_dim: int | None = opt(None, "width of a head's query and key (record 90; off: model_dim / num_heads)",
                             unit="channel", shrink="width_quads", least=4)
    narrow: Narrow | None = opt(None, "narrow heads in some layers",
                                needs="model.attn.rope.half_truncated and model.attn.rope.yarn")
    xsa: XSA | None = opt(
        None, "exclusive self-attention: a head's output loses its part along the token's own value"
    )
    compose: Compose | None = opt(
        None, "composed heads: heads exchange what they attend to, with weights per token",
        needs="model.token_gates"
    )
    saved_input: int | None = opt(
        None,
        "saved input (record 77): in layers after this one, attention reads the stream after this layer",
        unit="layer", least=0
    )
    latent: Latent | None = opt(None, "multi-head latent attention: keys and values from one narrow latent "
                                      "per token")
    drop_layers: tuple[int, ...] = opt((), "layers without attention", off=())

    def check(self, s: Any) -> Iterator[str]:
        if s.model.model_dim % self.num_heads:
            yield (f"model.model_dim = {s.model.model_dim} is not divisible by model.attn.num_heads = "
                   f"{self.num_heads}: change one of them")
        yield from layer_faults("model.attn.drop_layers", self.drop_layers, s)
        yield from self.check_late(s)
        if len(self.drop_layers) == s.model.num_layers:
            yield "model.attn.drop_layers leaves no attention: keep one layer"
        if self.value_residual and self.value_embed:
            yield "model.attn.value_residual and model.attn.value_embed exclude each other: switch one off"

    def check_late(self, s: Any) -> Iterator[str]:
        """Paired heads and the saved input."""
        if self.paired_layers:
            yield from attention_faults("model.attn.paired_layers", self.paired_layers, s)
            if self.num_heads % 2:
                yield (f"model.attn.paired_layers pairs heads, and model.attn.num_heads = {self.num_heads}: "
                       "give an even number")
            if self.window is None or self.window.rule not in ("tokens", "tokens_back"):
                yield (
                    "model.attn.paired_layers counts the window in positions: set model.attn.window.rule to "
                    "tokens or tokens_back"
                )
        if self.qk_dim is not None and (self.latent or s.model.bias):
            yield (
                "model.attn.qk_dim is of ordinary heads without bias: switch model.attn.latent and "
                "model.bias off"
            )
        if self.saved_input is not None:
            yield from layer_faults("model.attn.saved_input", (self.saved_input,), s)
            if not set(range(self.saved_input + 1, s.model.num_layers)) - set(self.drop_layers):
                yield (f"model.attn.saved_input = {self.saved_input} has no attention after it, which would "
                       "read it: choose an earlier layer, or switch it off")
        if self.v_norm and self.latent:
            yield "model.attn.v_norm is of ordinary heads, which model.attn.latent replaces: switch one off"


@dataclass(frozen=True)
class Balance:
    """Load balancing without auxiliary loss (Wang et al., arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437).

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

    def check(self, s: Any) -> Iterator[str]:
        moe, path = s.model.mlp.moe, "model.mlp.moe"
        if self.rule == "quantile" and moe.num_limited_groups != moe.num_expert_groups:
            yield (f"{path}.balance.rule=quantile counts on every expert being open to every token, and "
                   f"{path}.num_limited_groups = {moe.num_limited_groups} of {moe.num_expert_groups} groups: "
                   "choose rule proportional or sign, or set num_expert_groups=1")


@dataclass(frozen=True)
class MoE:
    """Mixture of experts (DeepSeekMoE: Dai et al., arXiv 2401.06066; DeepSeek-V3, 2412.19437, section 2.1.2).

    Every token goes through a shared MLP and through the top_k routed experts e with the best scores; no
    token is dropped: y = shared(x) + sum_e g_e expert_e(x), g_e the gate.
    """
    num_experts: int = opt(8, "routed experts per layer", unit="expert", off=REFUSE, most=65536)
    top_k: int = opt(1, "routed experts per token", unit="expert", off=REFUSE)
    hidden: int = opt(1536, "hidden width of a routed expert", unit="channel", off=REFUSE, shrink="width")
    shared: int = opt(1536, "hidden width of the shared expert; 0: none", unit="channel", off=REFUSE,
                      shrink="width")
    score_func: Literal["sigmoid", "softmax"] = opt(
        "sigmoid", "scoring function of the router's logits. sigmoid: of each logit. softmax: over the "
                   "experts")
    route_norm: bool = opt(False, "normalised gates: a token's gates are divided by their sum (not with "
                                  "top_k 1, where the router would get no gradient)", off=False)
    route_scale: float = opt(1.0, "factor of the gates", above=0, most=1_000_000)
    num_expert_groups: int = opt(1, "groups of experts; a token may choose only from its best "
                                    "`num_limited_groups` groups (a group's score is the sum of its two best "
                                    "experts')", off=1)
    num_limited_groups: int = opt(1, "groups from which a token may choose", off=REFUSE)
    balance: Balance | None = opt(None, "load balancing by a bias on the choice of experts")
    seq_aux_loss: float = opt(0.0, "factor of the balance loss within each row (DeepSeek-V3, eq. 17)",
                              off=0.0, least=0, most=1_000_000)
    z_loss: float = opt(0.0, "factor of the router z-loss, the squared logsumexp of the router's logits "
                             "(ST-MoE, arXiv 2202.08906)", off=0.0, least=0, most=1_000_000)
    router_init: float = opt(1.0, "initial spread of the router: standard deviation of its weights times "
                                  "sqrt(model_dim), which is that of its logits for a normed input", least=0)
    dense_layers: tuple[int, ...] = opt((0,), "layers that keep a dense MLP", off=())

    def check(self, s: Any) -> Iterator[str]:
        path = "model.mlp.moe"
        if s.model.bias:
            yield f"{path} has no bias vectors: set model.bias=false"
        if self.num_experts < 2 or not 1 <= self.top_k < self.num_experts:
            yield (f"{path}.top_k = {self.top_k} of {path}.num_experts = {self.num_experts}: at least one "
                   "must be chosen and one left")
        if self.hidden < 1 or self.shared < 0:
            yield (f"{path}.hidden = {self.hidden} and {path}.shared = {self.shared}: must be at least 1 and "
                   "0")
        if self.route_norm and self.top_k == 1:
            yield (f"{path}.route_norm with top_k = 1 makes every gate the same number, and the router gets "
                   "no gradient: switch it off")
        yield from self.check_groups(path)
        yield from layer_faults(f"{path}.dense_layers", self.dense_layers, s)
        if not set(range(s.model.num_layers)) - set(self.dense_layers) - set(s.model.mlp.drop_layers):
            yield f"{path}.dense_layers leaves no layer with experts: keep one"

    def check_groups(self, path: str) -> Iterator[str]:
        if self.num_expert_groups < 1 or self.num_experts % self.num_expert_groups:
            yield (f"{path}.num_expert_groups = {self.num_expert_groups} does not divide {self.num_experts} "
                   "experts")
        each = self.num_experts // self.num_expert_groups
        if not 1 <= self.num_limited_groups <= self.num_expert_groups:
            yield (f"{path}.num_limited_groups = {self.num_limited_groups}: must lie between 1 and "
                   f"num_expert_groups = {self.num_expert_groups}")
        if self.top_k > self.num_limited_groups * each:
            yield (f"{path}.num_limited_groups = {self.num_limited_groups} groups of {each} hold fewer than "
                   f"top_k = {self.top_k} experts")
        if self.num_expert_groups > 1 and each < 2:
            yield f"{path}.num_expert_groups = {self.num_expert_groups}: a group needs two experts"


@dataclass(frozen=True)
class MLP:
    """The feed-forward network of a block (MLP)."""
    activation: Literal["gelu_tanh", "gelu", "relu_sq", "swiglu"] = opt(
        "gelu_tanh", "activation function; relu_sq is relu(x)^2 (So et al., Primer, arXiv 2109.08668). "
                     "swiglu: silu(V x) times W x, with a second matrix V and two thirds of the hidden "
                     "width, so that the parameters stay as many (Shazeer, arXiv 2002.05202)")
    expansion: int = opt(4, "hidden width divided by model_dim", off=REFUSE, least=1, most=1024)
    hidden: int | None = opt(
        None, "hidden width, in place of expansion times model_dim (record 92)", unit="channel",
        shrink="width", least=1
    )
    parallel_layers: tuple[int, ...] = opt(
        (), "parallel MLP: layers with a second MLP of the same input, whose output "
        "is added to the first's (record 92)", off=()
    )
    drop_layers: tuple[int, ...] = opt((), "layers without MLP", off=())
    moe: MoE | None = opt(None, "mixture of experts in place of the dense MLP")

    def check(self, s: Any) -> Iterator[str]:
        yield from layer_faults("model.mlp.drop_layers", self.drop_layers, s)
        yield from layer_faults("model.mlp.parallel_layers", self.parallel_layers, s)
        for i in sorted(set(self.parallel_layers) & set(self.drop_layers)):
            yield f"model.mlp.parallel_layers names layer {i}, which has no MLP: leave it out"
        if self.parallel_layers and self.moe:
            yield (
                "model.mlp.parallel_layers is for dense MLPs: leave it empty, or add --without model.mlp.moe"
            )
        if self.activation == "swiglu" and s.model.bias:
            yield "model.mlp.activation=swiglu has no bias vectors: set model.bias=false"
        if self.activation == "swiglu" and self.moe:
            yield ("model.mlp.activation=swiglu is for dense MLPs: choose another or add --without "
                   "model.mlp.moe")


@dataclass(frozen=True)
class X0Mix:
    """Embedding shortcut: at the entry of every block x <- a x + b x0, where x0 is the embedding.

    With model.residual.sublayers b x0 is added after attention, and there is no a.
    """
    x: float = opt(1.0, "initial a; the constant if `learned` is off", idle="model.residual.sublayers")
    x0: float = opt(0.0, "initial b; the constant if `learned` is off")
    layers: tuple[int, ...] | None = opt(None, "layers that add x0 (record 92; off: all)")
    learned: bool = opt(True, "learned a and b, scalars per block (off: the constants)", off=False)

    def check(self, s: Any) -> Iterator[str]:
        yield from acting_faults("model.residual.x0_mix.layers", self.layers, s)


@dataclass(frozen=True)
class UnetSkips:
    """U-net skips: outputs of the first half of the blocks are added before the second half, last first."""
    init: float = opt(1.0, "initial skip weight; the constant if `learned` is off",
                      idle="model.residual.unet_skips.sigmoid")
    sigmoid: float | None = opt(None, "sigmoid skip weights (record 32): the weight is sigmoid(w), and this "
                                      "value is the initial w")
    learned: bool = opt(True, "learned weights, one scalar per skip (off: the constant `init`)", off=False)
    pairs: tuple[tuple[int, int], ...] | None = opt(
        None, "skips as pairs (layer whose output is added, layer before which it is added), record 45 (off: "
              "all of the U-net)"
    )
    after_attention: bool = opt(
        False, "skips from between the sublayers: the stream after a layer's attention, "
        "before its MLP (records 73 to 76)", off=False
    )
    gate: SkipGate | None = opt(None, "gate on the weights of the skips", idle="model.token_gates")

    def check(self, s: Any) -> Iterator[str]:
        path = "model.residual.unet_skips"
        if self.pairs is None:
            if s.model.num_layers % 2:
                yield (f"{path} needs an even model.num_layers, got {s.model.num_layers}: change it, give "
                       f"{path}.pairs or add --without {path}")
            return
        if not self.pairs:
            yield f"{path}.pairs is empty: give a skip like [[4, 7]] or add --without {path}"
        for pair in {pair for pair in self.pairs if self.pairs.count(pair) > 1}:
            yield f"{path}.pairs has the skip {list(pair)} twice: keep one"
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
    layer_reuse: LayerReuse | None = opt(None, "layer reuse: the head reads the last and an earlier stream, "
                                               "both normed")
    sublayers: Sublayers | None = opt(None, "factors of the stream and of each branch, per sublayer")
    lanes: Lanes | None = opt(None, "two lanes: from a layer on, attention and MLP read streams of their own",
                              needs="model.residual.sublayers")
    mudd: Mudd | None = opt(
        None, "MUDD connections: the last layer mixes earlier streams, with coefficients per token",
        needs="model.residual.sublayers and model.attn.value_embed"
    )

    def check(self, s: Any) -> Iterator[str]:
        if self.lanes and self.mudd:
            yield "model.residual.lanes and model.residual.mudd wire the last layers both: switch one off"


@dataclass(frozen=True)
class Untied:
    """Untied head: the output head has a weight of its own in place of the token table's."""
    init: Literal["linear", "zero", "uniform"] = opt(
        "linear", "initial head weight. linear: as any other linear layer. zero: zeros. uniform: "
                  "U(-1/sqrt(model_dim), 1/sqrt(model_dim)), torch's default",
        idle="model.init.head_std")
    tied_until: float | None = opt(
        None, "tied at first: fraction of the scheduled steps in which the embedding is the head's weight. "
              "Then the table of the embedding takes over this weight and its optimizer state (record 53)",
        above=0, most=1)

    def check(self, s: Any) -> Iterator[str]:
        if self.tied_until is not None and s.numerics.head != s.numerics.table:
            yield (f"model.head.untied.tied_until needs one dtype for both tables, and numerics.head is "
                   f"{s.numerics.head}, numerics.table {s.numerics.table}: set one to the other")
        if self.tied_until is not None and padded_vocab(s) != table_rows(s):
            yield ("model.head.untied.tied_until needs tables of one size: set model.embed.padded=true")


@dataclass(frozen=True)
class Softcap:
    """Logit soft cap (Gemma 2, arXiv 2408.00118), which bounds the logits z.

    tanh: cap tanh(z / cap). sigmoid: cap sigmoid((z + shift) / scale), which for shift 0 equals (cap/2)
    tanh(z / (2 scale)) plus a constant, which the softmax ignores. rsqrt: cap z / sqrt(z^2 + cap^2).
    """
    form: Literal["tanh", "sigmoid", "rsqrt"] = opt("tanh", "bounding function", off=REFUSE)
    cap: float = opt(30.0, "bound of the logits", off=REFUSE, above=0)
    scale: float = opt(7.5, "divisor inside the sigmoid", needs="model.head.softcap.form=sigmoid", above=0)
    shift: float = opt(0.0, "added to the logits inside the sigmoid, which makes the cap asymmetric (record "
                            "54)", off=0.0, needs="model.head.softcap.form=sigmoid")


@dataclass(frozen=True)
class Prefix:
    """Prefix token loss (record 88, @jvarho): a second target, the longest proper prefix of the next token.

    It is the token whose bytes are the longest proper prefix of the next token's; a token without one (a
    single byte, end of text) adds nothing. Its cross entropy is added to that of the next token, times a
    weight that goes linearly from `start` to `end` in each stage. Validation counts the next token only.
    """
    start: tuple[float, ...] = opt((0.25,), "weight at the start of each stage", off=REFUSE, least=0)
    end: tuple[float, ...] = opt((0.0,), "weight at the end of each stage", off=REFUSE, least=0)
    levels: int | None = opt(
        None, "levels: the weight falls in this many equal steps within a stage, and does not "
        "reach its end (record 92; off: linearly)", least=1
    )

    def check(self, s: Any) -> Iterator[str]:
        stages = max(1, len(s.schedule.stages))
        for name in ("start", "end"):
            if (given := len(getattr(self, name))) != stages:
                yield (f"model.head.prefix.{name} has {given} weights and schedule.stages has {stages} (at "
                       "least one): give one weight per stage")
        if not any((*self.start, *self.end)):
            yield "model.head.prefix has only weights of 0, which have no effect: give one, or switch it off"


@dataclass(frozen=True)
class Candidates:
    """Sampled softmax (record 92; after Jean et al., arXiv 1412.2007): training's softmax over some of the
    classes.

    Each logical rank has its own candidates in each step: all tokens that are its targets, filled up with
    others from a sweep of a fixed permutation of the vocabulary, which goes on from step to step. Without
    `log_q` no class is weighted, so that the normaliser misses the other classes. A prefix target that is no
    candidate adds nothing. Validation uses all classes.
    """
    sizes: tuple[tuple[int, ...], ...] = opt(
        ((10240,),),
        "candidates of each stage; several numbers hold for equal parts of it, none means all classes",
        off=REFUSE, shrink="vocab_share", least=1
    )
    log_q: float = opt(
        0.0, "share of the log-Q correction: log of a class's chance to be a candidate, subtracted from "
        "its logit (0: none; an author found half of it best)", off=0.0, least=0, most=1
    )

    def check(self, s: Any) -> Iterator[str]:
        stages = max(1, len(s.schedule.stages))
        if len(self.sizes) != stages:
            yield (f"model.head.candidates.sizes has {len(self.sizes)} lists and schedule.stages has "
                   f"{stages} (at least one): give one list per stage, [] for all classes")
        if not any(self.sizes):
            yield "model.head.candidates.sizes has no number, which leaves all classes: switch it off"
        if max((n for sizes in self.sizes for n in sizes), default=0) > padded_vocab(s):
            yield f"model.head.candidates.sizes: there are {padded_vocab(s)} classes, give fewer"
        if s.model.head.mtp and s.model.head.mtp.module:
            yield "model.head.candidates is without an MTP module: switch model.head.mtp.module off"


@dataclass(frozen=True)
class Head:
    """From the residual stream to logits and the loss."""
    untied: Untied | None = opt(None, "untied head: a weight of its own")
    softcap: Softcap | None = opt(None, "logit soft cap")
    smear: OutputSmear | None = opt(None, "Smear-MTP: the head reads a part of the previous token's stream "
                                          "too")
    logit_scale: Literal["one", "rsqrt_dim"] = opt(
        "one", "factor of the logits before the soft cap. one: 1. rsqrt_dim: 1/sqrt(model_dim)")
    bias: bool = opt(False, "bias of the head: a vector that is added to the logits, before the soft cap",
                     off=False, needs="model.head.untied")
    loss_reduction: Literal["mean", "sum", "step_sum"] = opt(
        "mean", "reduction of the training loss. mean: over all tokens of the step. sum: over the tokens of "
                "a logical rank, and the mean of the eight ranks. step_sum: sum over all tokens of the step. "
                "A sum makes Adam's eps relatively smaller and is otherwise equivalent, because Adam and "
                "Muon are scale-invariant up to eps"
    )
    mtp: MTP | None = opt(None, "multi-token prediction: the loss counts further next tokens")
    candidates: Candidates | None = opt(
        None, "sampled softmax: the training loss goes over some of the classes"
    )
    prefix: Prefix | None = opt(
        None, "prefix token loss: the loss counts the longest prefix of the next token too"
    )


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
    norm_gain: bool = opt(False, "learned gain of the RMS norms of the stream, a vector that starts at 1",
                          off=False, needs="model.norm=rmsnorm")
    bias: bool = opt(True, "bias vectors in the linear layers", off=False)
    embed: Embed = opt(Embed, "from token ids to the residual stream")
    attn: Attention = opt(Attention, "self-attention")
    mlp: MLP = opt(MLP, "feed-forward network of a block")
    residual: Residual = opt(Residual, "wiring of the residual stream")
    token_gates: TokenGates | None = opt(
        None, "coefficients per token, in place of learned scalars and gates"
    )
    head: Head = opt(Head, "from the residual stream to logits and the loss")
    init: Init = opt(Init, "initial weights")


# ----- widths -----------------------------------------------------------------------------------------------

def head_dim(s: Any) -> int:
    """Channels of a head, without multi-head latent attention."""
    return s.model.model_dim // s.model.attn.num_heads


def query_dim(s: Any) -> int:
    """Width of a head's query and key."""
    latent = s.model.attn.latent
    return latent.qk_nope_head_dim + latent.qk_rope_head_dim if latent else s.model.attn.qk_dim or head_dim(s)


def value_dim(s: Any) -> int:
    """Width of a head's value."""
    return s.model.attn.latent.v_head_dim if s.model.attn.latent else head_dim(s)


def rotary_dim(s: Any) -> int:
    """Channels of a head's query and key to which rotary positions apply."""
    return s.model.attn.latent.qk_rope_head_dim if s.model.attn.latent else query_dim(s)


def rotary_source(s: Any) -> str:
    """Path of the setting from which rotary_dim follows."""
    attn = s.model.attn
    if attn.latent:
        return "model.attn.latent.qk_rope_head_dim"
    return "model.attn.num_heads" if attn.qk_dim is None else "model.attn.qk_dim"


def padded_vocab(s: Any) -> int:
    """Rows of the token table and classes of the softmax."""
    return math.ceil(s.model.vocab_size / s.model.pad_vocab_to) * s.model.pad_vocab_to


def table_rows(s: Any) -> int:
    """Rows of the embedding tables."""
    return padded_vocab(s) if s.model.embed.padded else s.model.vocab_size


# ----- checks of several sections ---------------------------------------------------------------------------

def empty_layers(s: Any) -> set[int]:
    """Layers with neither attention nor MLP, of which nothing is left in the model."""
    return set(s.model.attn.drop_layers) & set(s.model.mlp.drop_layers)
