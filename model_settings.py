"""Sections of settings.Model that records 34 to 57 add, and checks that several sections of the model share.

In `check(self, s)`, s is the whole Settings.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from declare import REFUSE, opt


@dataclass(frozen=True)
class Smear:
    """Smear (record 34, @classiclarryd): e_t <- e_t + lambda sigmoid(W e_t) e_(t-1), e the rows of the token
    table.

    W reads the first `channels` channels. The first token of a row keeps its embedding; the token before may
    belong to another document.
    """
    channels: int = opt(12, "input channels of the gate", unit="channel", off=REFUSE)
    init: float = opt(0.0, "initial lambda; the constant if `learned` is off")
    learned: bool = opt(True, "learned lambda, one scalar (off: the constant `init`)", off=False)

    def check(self, s: Any) -> Iterator[str]:
        yield from channel_faults("model.embed.smear.channels", self.channels, s)


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
class ValueGate:
    """Value-embedding gate (record 55, @classiclarryd): each head's value embedding is multiplied by
    2 sigmoid(W n).

    n is the first `channels` channels of the block's normalised input.
    """
    channels: int = opt(12, "input channels of the gate", unit="channel", off=REFUSE)

    def check(self, s: Any) -> Iterator[str]:
        yield from channel_faults("model.attn.value_embed.gate.channels", self.channels, s)


@dataclass(frozen=True)
class SkipGate:
    """Skip gate (record 55, @classiclarryd): the weight of each skip is multiplied by 2 sigmoid(W x0) per
    token.

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


@dataclass(frozen=True)
class MTP:
    """Multi-token prediction (record 53; after Gloeckle et al., arXiv 2404.19737, with the one head of the
    model).

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

    def check(self, s: Any) -> Iterator[str]:
        sizes = [[len(weights) for weights in side] for side in (self.start, self.end)]
        stages = max(1, len(s.schedule.stages))
        if len(self.start) != stages:
            yield (f"model.head.mtp.start has {len(self.start)} lists and schedule.stages has {stages} "
                   "(at least one): give one list of weights per stage")
        if sizes[0] != sizes[1] or not sizes[0] or min(sizes[0]) < 1:
            yield ("model.head.mtp: start and end must have the same stages, with as many weights in each, "
                   f"and they have {sizes[0]} and {sizes[1]}")
        elif self.module and max(sizes[0]) > 2:
            yield ("model.head.mtp.module predicts one token more than the model: give at most two weights "
                   "per stage")
        if self.module and s.model.embed.learned_positions:
            yield ("model.head.mtp.module embeds the next token, for which the position table has no row: "
                   "set model.embed.learned_positions=false")


def empty_layers(s: Any) -> set[int]:
    """Layers with neither attention nor MLP, of which nothing is left in the model."""
    return set(s.model.attn.drop_layers) & set(s.model.mlp.drop_layers)


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
