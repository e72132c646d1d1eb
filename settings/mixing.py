"""Sections of the model that mix streams and tokens, record 34 on: gates, smears, saved streams, hashed
bigrams, coefficients per token.

In `check(self, s)`, s is the whole Settings.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from settings.declare import REFUSE, opt


# ----- checks of several sections ---------------------------------------------------------------------------

def channel_faults(path: str, channels: int, s: Any) -> Iterator[str]:
    """Messages on a gate that reads more channels than there are."""
    if not 1 <= channels <= s.model.model_dim:
        yield f"{path} = {channels}: must lie between 1 and model.model_dim"


def layer_faults(path: str, layers: tuple[int, ...], s: Any) -> Iterator[str]:
    """Messages on layer numbers that do not exist or are given twice."""
    count = s.model.num_layers
    for i in layers:
        if not 0 <= i < count:
            yield f"{path} names layer {i}: the model has layers 0 to {count - 1}"
    if len(set(layers)) != len(layers):
        yield f"{path} = {list(layers)} names a layer twice"


def acting_faults(path: str, layers: tuple[int, ...] | None, s: Any) -> Iterator[str]:
    """Messages on the layers in which a feature acts, None for all: each exists, and there is one."""
    if layers is not None:
        yield from layer_faults(path, layers, s)
        if not layers:
            feature = path.rpartition(".")[0]
            yield f"{path} is empty: name at least one layer, or switch {feature} off"


def attention_faults(path: str, layers: tuple[int, ...], s: Any) -> Iterator[str]:
    """Messages on layers that do not exist, are given twice or have no attention."""
    yield from layer_faults(path, layers, s)
    for i in sorted(set(layers) & set(s.model.attn.drop_layers)):
        yield (
            f"{path} names layer {i}, which has no attention: leave it out, or take it from attn.drop_layers"
        )
    if s.model.attn.latent:
        yield f"{path} is for ordinary heads, which model.attn.latent replaces: switch one off"


def unpaired_faults(path: str, layers: tuple[int, ...], s: Any) -> Iterator[str]:
    """Messages on the layers in which a feature acts, that have no attention or whose heads are paired."""
    yield from acting_faults(path, layers, s)
    yield from attention_faults(path, layers, s)
    if both := sorted(set(layers) & set(s.model.attn.paired_layers)):
        yield (
            f"{path} names layer {both[0]}, whose heads are paired: leave it out, or take it from "
            "model.attn.paired_layers"
        )


# ----- gates, smears, saved streams -------------------------------------------------------------------------

@dataclass(frozen=True)
class Smear:
    """Smear (record 34, @classiclarryd): e_t <- e_t + lambda sigmoid(W e_t) e_(t-1).

    e are rows of the token table, of which W reads the first `channels` channels. The first token of a row
    keeps its embedding; the previous token may belong to another document.
    """
    channels: int = opt(12, "input channels of the gate", unit="channel", off=REFUSE)
    init: float = opt(0.0, "initial lambda; the constant if `learned` is off")
    learned: bool = opt(True, "learned lambda, one scalar (off: the constant `init`)", off=False)

    def check(self, s: Any) -> Iterator[str]:
        yield from channel_faults("model.embed.smear.channels", self.channels, s)


@dataclass(frozen=True)
class ValueGate:
    """Value-embedding gate (record 55, @classiclarryd): 2 sigmoid(W n) times each head's value embedding.

    n is the first `channels` channels of the block's normalised input, or half of them are the first ones of
    the value embedding itself.
    """
    channels: int = opt(12, "input channels of the gate", unit="channel", off=REFUSE)
    own_channels: Literal["none", "unpaired", "all"] = opt(
        "none", "layers in which the second half of the gate's inputs is the first channels of the value "
        "embedding. none. unpaired: those whose heads are not paired (record 70). all: all (record 81)"
    )

    def check(self, s: Any) -> Iterator[str]:
        path = "model.attn.value_embed.gate"
        yield from channel_faults(f"{path}.channels", self.channels, s)
        if self.own_channels != "none" and self.channels % 2:
            yield f"{path}.own_channels takes half of {path}.channels = {self.channels}: give an even number"


@dataclass(frozen=True)
class SkipGate:
    """Skip gate (record 55, @classiclarryd): 2 sigmoid(W x0), per token, times the weight of each skip.

    x0 is the embedding as the first block gets it, of which W reads the first `channels` channels.
    """
    channels: int = opt(12, "input channels of the gate", unit="channel", off=REFUSE)

    def check(self, s: Any) -> Iterator[str]:
        yield from channel_faults("model.residual.unet_skips.gate.channels", self.channels, s)


@dataclass(frozen=True)
class Backout:
    """Backout (record 40): after the last block x <- x - b y, y the stream after an earlier block."""
    layer: int = opt(8, "block after which y is taken", unit="layer", off=REFUSE, least=0)
    init: float = opt(0.5, "initial b; the constant if `learned` is off")
    learned: bool = opt(True, "learned b, one scalar (off: the constant `init`)", off=False)

    def check(self, s: Any) -> Iterator[str]:
        yield from layer_faults("model.residual.backout.layer", (self.layer,), s)
        if self.layer == s.model.num_layers - 1:
            yield (
                f"model.residual.backout.layer = {self.layer} is the last layer, whose output the stream is "
                "already: choose an earlier one"
            )


@dataclass(frozen=True)
class SecondEmbed:
    """Second input embedding (medium record 10, @snimu): another token table, x02 = norm(row).

    At the entry of every block the stream gets c x02, one c per layer. The stream begins without it.
    """
    init: float = opt(0.0, "initial c; the constant if `learned` is off")
    learned: bool = opt(True, "learned c, one scalar per block (off: the constant `init`)", off=False)

    def check(self, s: Any) -> Iterator[str]:
        if s.model.residual.sublayers:
            yield ("model.embed.second is added at the entry of a block, which model.residual.sublayers "
                   "replaces: switch one off")


@dataclass(frozen=True)
class LayerReuse:
    """Layer reuse (medium record 15, @snimu): the head reads a norm(x) + b norm(y) in place of norm(x).

    y is the stream after an earlier block. The sum is not normed again.
    """
    layer: int = opt(11, "block after which y is taken", unit="layer", off=REFUSE, least=0)
    x: float = opt(1.0, "initial a; the constant if `learned` is off")
    y: float = opt(0.0, "initial b; the constant if `learned` is off")
    learned: bool = opt(True, "learned a and b, two scalars (off: the constants)", off=False)

    def check(self, s: Any) -> Iterator[str]:
        yield from layer_faults("model.residual.layer_reuse.layer", (self.layer,), s)


@dataclass(frozen=True)
class OutputSmear:
    """Smear-MTP (medium record 16, @snimu): x_t <- x_t + c x_(t-1) for what the head reads.

    The first token of a row keeps its x; the previous token may belong to another document.
    """
    init: float = opt(0.0, "initial c; the constant if `learned` is off")
    learned: bool = opt(True, "learned c, one scalar (off: the constant `init`)", off=False)


# ----- attention --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class XSA:
    """Exclusive self-attention (record 82): y_h <- y_h - tanh(a_h) (y_h . v_h) / max(v_h . v_h, 1e-8) v_h.

    y is a head's output and v the value of the same token, as attention sees it. a is learned, one per layer
    and head, or a coefficient per token (model.token_gates).
    """
    layers: tuple[int, ...] = opt((1, 3, 4, 7, 8, 10), "layers that have it", off=REFUSE)
    init: float = opt(0.0, "initial a; the constant if `learned` is off")
    learned: bool = opt(True, "learned a (off: the constant `init`)", off=False)

    def check(self, s: Any) -> Iterator[str]:
        yield from unpaired_faults("model.attn.xsa.layers", self.layers, s)


@dataclass(frozen=True)
class Compose:
    """Dynamically composed heads (Xiao et al., arXiv 2405.08553), the light form of record 85.

    y_h <- y_h + w2_h sum_u A(u) v_h(u) with A(u) = sum_h w1_h P_h(u): P are attention's probabilities over
    the last `window` tokens of the document, w1 (normed over the heads) and w2 are coefficients per token.
    """
    layers: tuple[int, ...] = opt((10,), "layers that have it", off=REFUSE)
    window: int = opt(112, "tokens over which the probabilities are taken, the query's own among them",
                      unit="token", off=REFUSE, shrink="length", least=1)

    def check(self, s: Any) -> Iterator[str]:
        yield from unpaired_faults("model.attn.compose.layers", self.layers, s)


@dataclass(frozen=True)
class Narrow:
    """Narrower heads in some layers (record 92): they read the first channels of each head of full-width
    matrices.

    A narrow query and key rotates all its channels, with tables of its own that follow the short window, and
    has its own softmax scale. A narrow value is read by the same channels of the output projection.
    """
    qk_layers: tuple[int, ...] = opt((0, 1, 2, 5, 8), "layers with narrow queries and keys", off=REFUSE)
    qk_dim: int = opt(
        64, "width of a narrow query and key", unit="channel", off=REFUSE, shrink="width", least=2
    )
    v_layers: tuple[int, ...] = opt((1, 8), "layers with narrow values", off=())
    v_dim: int = opt(64, "width of a narrow value", unit="channel", off=REFUSE, shrink="width", least=1)
    scale: float = opt(0.13, "softmax scale of narrow queries and keys", shrink="rsqrt_width", above=0)

    def check(self, s: Any) -> Iterator[str]:
        path, attn = "model.attn.narrow", s.model.attn
        for name in ("qk_layers", "v_layers"):
            yield from attention_faults(f"{path}.{name}", getattr(self, name), s)
        if not self.qk_layers and not self.v_layers:
            yield f"{path}.qk_layers and {path}.v_layers are empty: name a layer, or switch {path} off"
        if s.model.bias:
            yield f"{path} is of ordinary heads without bias: set model.bias=false, or switch {path} off"
        width = s.model.model_dim // attn.num_heads
        for name, most in (("qk_dim", attn.qk_dim or width), ("v_dim", width)):
            if getattr(self, name) > most:
                yield f"{path}.{name} = {getattr(self, name)}: heads have {most} channels, choose fewer"
        if attn.rope is None or not attn.rope.half_truncated or attn.rope.yarn is None or self.qk_dim % 2:
            yield (f"{path} rotates pairs of all its channels, with tables that follow the short window: it "
                   "needs an even qk_dim, model.attn.rope.half_truncated and model.attn.rope.yarn")


# ----- embedding --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Bigram:
    """Hashed bigram embedding (record 62, @classiclarryd): a row of a table per pair of neighbouring tokens.

    Token t at position p of a row takes row (36313 t_p xor 27191 t_(p-1)) mod (rows - 1), in 32-bit integers;
    the first token takes the last row. Pairs run across documents. The row is added to the stream, times a
    coefficient: learned, one per layer, or one per token (model.token_gates).
    """
    rows: int = opt(251_520, "rows of the table, the last one for the first token of a row of the batch",
                    unit="row", off=REFUSE, shrink="hash_rows", least=2, most=2 ** 31 - 1)
    dim: int | None = opt(
        None, "width of the table, which fills the first channels of the stream (record 83; off: model_dim)",
        unit="channel", shrink="width", least=1
    )
    site: Literal["in", "attn"] = opt(
        "in", "where a layer adds it. in: before attention. attn: after attention (record 73)")
    init: float = opt(0.1, "initial coefficient; the constant if `learned` is off")
    learned: bool = opt(True, "learned coefficients, one per layer (off: the constant `init`)", off=False)
    second_token: Literal["reserved", "pair"] = opt(
        "reserved",
        "what the second token of a row is hashed with. reserved: the number of the last row, which "
        "the originals have written over the first token by then. pair: the first token (records 68 " "to 70)"
    )
    signs: int | None = opt(
        None, "rows of a fixed table of random signs; the row (t_(p-1) xor t_p) mod signs "
        "multiplies the bigram's, so that pairs that collide differ (record 83)", unit="row", least=2
    )
    layers: tuple[int, ...] | None = opt(None, "layers that add it (off: all that add the embedding)")
    trigrams: bool = opt(
        False, "trigrams (record 92): half of the rows are for pairs and half for triples of tokens, "
        "with other hashes of their signs; both are added", off=False, needs="model.embed.bigram.signs"
    )
    in_x0: bool = opt(
        False, "the embedding x0, as later layers add it, holds the bigram of the first layer too "
        "(records 83 and 84, where both were one tensor)", off=False
    )

    def check(self, s: Any) -> Iterator[str]:
        if self.dim is not None and self.dim > s.model.model_dim:
            yield (
                f"model.embed.bigram.dim = {self.dim}: must be at most model.model_dim = {s.model.model_dim}"
            )
        yield from acting_faults("model.embed.bigram.layers", self.layers, s)
        if self.trigrams and (self.rows % 2 or self.rows < 4):
            yield ("model.embed.bigram.trigrams takes half of the rows, and model.embed.bigram.rows = "
                   f"{self.rows}: give an even number of at least 4")
        if self.trigrams and self.second_token == "pair":
            yield "model.embed.bigram.trigrams has second_token=reserved only: set that"
        if self.in_x0 and self.site == "in":
            yield "model.embed.bigram.in_x0 needs model.embed.bigram.site=attn: set it, or leave in_x0 off"


# ----- residual stream --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sublayers:
    """Factors of each sublayer (record 73): x <- r x + p branch(x), r and p per attention and per MLP.

    The embedding shortcut and the bigram are then added after attention.
    """
    resid: float = opt(1.0488088481701516, "initial r (sqrt(1.1)); the constant if `learned` is off")
    post: float = opt(1.0, "initial p; the constant if `learned` is off")
    attn_post_from: int = opt(0, "first layer whose attention has a factor p (record 74: 7)", unit="layer",
                              off=0, least=0)
    keep_layers: tuple[int, ...] = opt(
        (), "layers that keep the factor r of a sublayer that they lack (record 92)", off=()
    )
    learned: bool = opt(True, "learned r and p, scalars (off: the constants)", off=False)

    def check(self, s: Any) -> Iterator[str]:
        yield from layer_faults("model.residual.sublayers.keep_layers", self.keep_layers, s)
        yield from layer_faults("model.residual.sublayers.attn_post_from", (self.attn_post_from,), s)


@dataclass(frozen=True)
class Lanes:
    """Two lanes (record 73, partitioned hyperconnections): from a layer on, two streams.

    Attention reads the first lane, the MLP the second; both are added to both, with factors of their own.
    After the last layer the stream is their mean.
    """
    start: int = opt(7, "first layer with two lanes", unit="layer", off=REFUSE, least=1)
    attn_post: float = opt(1.5, "initial factor of attention in the second lane")
    shortcuts: Literal["scaled", "first"] = opt(
        "scaled",
        "how the embedding and the bigram enter. scaled: with the factors p of attention, into both "
        "lanes (record 73). first: unscaled, into the first lane (record 74)"
    )

    def check(self, s: Any) -> Iterator[str]:
        yield from layer_faults("model.residual.lanes.start", (self.start,), s)
        if s.system.activation_checkpoint == "on":
            yield ("model.residual.lanes keeps a second stream next to a layer's, which "
                   "system.activation_checkpoint=on would compute twice: switch one off")


@dataclass(frozen=True)
class Mudd:
    """MUDD connections (Xiao et al., arXiv 2502.12170; record 81): the last layer mixes earlier streams.

    Two small networks give coefficients per token from the stream x, scale (W2 gelu(W1 x) + b), for every
    term of the layer (values, its input, both branches, embedding and bigram) and of the sum before the final
    norm.
    """
    layer: int = opt(10, "layer whose terms have coefficients per token", unit="layer", off=REFUSE, least=1)
    hidden: int = opt(64, "hidden width of the networks", unit="channel", off=REFUSE, least=1)
    scale: float = opt(0.1, "factor of the networks' outputs", above=0)
    cached: int = opt(7, "layer whose output the layer's values and input are mixed with", unit="layer",
                      off=REFUSE, least=0)
    snapshots: tuple[int, ...] = opt(
        (7, 9, 3),
        "layers whose outputs are mixed in before the final norm, next to the stream before the first layer",
    )
    tables: tuple[int, ...] = opt((1,), "layers whose value embeddings are mixed in before the final norm")
    mlp_input: bool = opt(
        False, "mixed in before the final norm too: the layer's normed MLP input (record 92)", off=False
    )
    attn_input: bool = opt(
        False, "mixed in before the final norm too: the layer's normed attention input (record 92)", off=False
    )
    groups: int | None = opt(
        None, "coefficients before the final norm per group of channels (record 92): this many "
        "groups, each with a second coefficient from the same network (off: one for all)", least=2
    )
    backout: float = opt(-0.5, "initial coefficient of the first snapshot before the final norm, in place of "
                               "model.residual.backout")

    def check(self, s: Any) -> Iterator[str]:
        path, embed = "model.residual.mudd", s.model.attn.value_embed
        yield from attention_faults(f"{path}.layer", (self.layer,), s)
        yield from layer_faults(f"{path}.snapshots", self.snapshots, s)
        yield from layer_faults(f"{path}.tables", self.tables, s)
        if not self.snapshots:
            yield f"{path}.snapshots is empty: name at least one layer"
        if s.model.attn.num_heads % 2:
            yield (f"{path} gates the value embedding of each half of the heads, and model.attn.num_heads = "
                   f"{s.model.attn.num_heads}: give an even number")
        yield from layer_faults(f"{path}.cached", (self.cached,), s)
        if self.cached >= self.layer:
            yield f"{path}.cached = {self.cached}: must be an earlier layer than {path}.layer = {self.layer}"
        held = embed.tables if embed else ()
        for i in (*self.tables, self.layer):
            if not 0 <= i < len(held) or held[i] < 0:
                yield (f"{path} needs the value embedding of layer {i}: give it a table in "
                       "model.attn.value_embed.tables")
        if self.groups is not None and s.model.model_dim % self.groups:
            yield (f"{path}.groups = {self.groups} does not divide model.model_dim = {s.model.model_dim}: "
                   "choose another number")
        if self.mlp_input and self.layer in s.model.mlp.drop_layers:
            yield f"{path}.mlp_input: layer {self.layer} has no MLP: switch it off"
        if s.model.residual.sublayers is None:
            yield f"{path} replaces the factors of its layer's sublayers: set model.residual.sublayers"


@dataclass(frozen=True)
class TokenGates:
    """Coefficients per token from two small networks (MUDD gates, record 85): scale (W2 gelu(W1 x) + b).

    They replace the learned scalars and gates of what is on: embedding shortcut, bigram, skips, attention
    gate, XSA, and they give composed heads their weights. The first network reads the embedding and serves
    the layers before `layer`; the second one reads the stream that enters `layer` and serves the others.
    """
    layer: int = opt(4, "first layer that the second network serves", unit="layer", off=REFUSE, least=1)
    hidden: int = opt(64, "hidden width of the networks", unit="channel", off=REFUSE, least=1)
    scale: float = opt(0.1, "initial factor of the outputs, a learned scalar", above=0)
    attn: float = opt(0.25, "initial attention gate")
    skip: float = opt(0.5, "initial gate of a skip")
    compose: float = opt(1.0, "initial w1 of composed heads; w2 starts at 0")

    def check(self, s: Any) -> Iterator[str]:
        yield from layer_faults("model.token_gates.layer", (self.layer,), s)
        m = s.model
        served = (m.residual.x0_mix, m.embed.bigram, m.residual.unet_skips, m.attn.gate, m.attn.xsa)
        if not any(served):
            yield ("model.token_gates has no coefficient to give: set model.residual.x0_mix, "
                   "model.embed.bigram, model.residual.unet_skips, model.attn.gate or model.attn.xsa, or "
                   "switch it off")
