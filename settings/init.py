"""The section `model.init` of the settings: the initial weights.

In `check(self, s)`, s is the whole Settings.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from settings.declare import opt


@dataclass(frozen=True)
class SignedGains:
    """Signed initial gains (optimizer track, result 30): 1 - alpha s of attention's norm, 1 + alpha s of the
    MLP's.

    s is a random sign per layer and channel. From layer `pairs_from` on two layers share their signs per head
    (result 46): the number of +1 in a head of the first layer goes halfway to the half, the second layer has
    as many -1, and both are in random order.
    """
    alpha: float = opt(0.14, "size of the deviation from 1", above=0, below=1)
    pairs_from: int | None = opt(None, "first layer of the pairs (off: every sign is independent)",
                                 unit="layer", least=0)

    def check(self, s: Any) -> Iterator[str]:
        if self.pairs_from is not None and (s.model.num_layers - self.pairs_from) % 2:
            yield (f"model.init.signed_gains.pairs_from = {self.pairs_from} leaves an odd number of the "
                   f"{s.model.num_layers} layers: choose another layer")


@dataclass(frozen=True)
class Mimetic:
    """Mimetic initial values of v and o (log of record 64, whose merged code has a uniform o in their place).

    v = scale I + noise N(0, 1), o = -scale I + noise N(0, 1), with I the identity of the stream.
    """
    scale: float = opt(0.22360679774997896, "factor of the identity, sqrt(0.05)", above=0)
    noise: float = opt(0.01, "standard deviation of the noise", least=0)

    def check(self, s: Any) -> Iterator[str]:
        if s.model.attn.latent:
            yield "model.init.mimetic is of v and o, which model.attn.latent replaces: switch one off"


@dataclass(frozen=True)
class Init:
    """Initial weights."""
    scheme: Literal["gpt2", "uniform", "normal"] = opt(
        "gpt2", "distribution of the initial weights. gpt2: N(0, 0.02), and N(0, 0.02/sqrt(2 num_layers)) "
                "for the output projections. uniform: U(-bound/sqrt(fan_in), bound/sqrt(fan_in)), and N(0, "
                "1) for embedding tables. normal: with the standard deviation of uniform, bound/sqrt(3 "
                "fan_in), and the same tables")
    bound: float = opt(1.0, "half-width of the uniform scheme times sqrt(fan_in); the standard deviation is "
                            "bound/sqrt(3 fan_in)", least=0)
    zero_proj: bool = opt(False, "zero-initialised output projections of attention and MLP (as in muP)",
                          off=False)
    qkv_bound: float | None = opt(None, "bound of the uniform scheme for the projections q, k and v (record "
                                        "53; off: that of `bound`)",
                                  needs="model.init.scheme=uniform", least=0)
    o_bound: float | None = opt(
        None, "bound of the uniform or normal scheme for attention's output projection (record 64; "
        "off: as zero_proj and `bound` say)", needs="model.init.scheme=uniform|normal", least=0
    )
    c_fc_bound: float | None = opt(None, "the same for the MLP's first matrix (optimizer track, result 4; "
                                         "off: that of `bound`)",
                                   needs="model.init.scheme=uniform|normal", least=0)
    c_proj_bound: float | None = opt(None, "the same for the MLP's output projection (off: as zero_proj and "
                                           "`bound` say)",
                                     needs="model.init.scheme=uniform|normal", least=0)
    c_fc_fall: float = opt(
        0.0, "fall of the MLP's first matrix over the layers: in layer i its initial values are multiplied "
        "by 1 - fall i/(num_layers - 1) (optimizer track, result 30)", off=0.0,
        needs="model.init.scheme=uniform|normal", least=0, most=1
    )
    bias: Literal["zero", "inner", "all"] = opt(
        "zero", "initial biases. zero: zeros. all: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default. "
                "inner: the same, with zeros in the output projections and in the head")
    signed_gains: SignedGains | None = opt(None, "signed initial gains of the norms before attention and MLP",
                                           needs="model.norm_gain")
    mimetic: Mimetic | None = opt(None, "mimetic initial values of v and o, whatever the bounds say")
    head_std: float | None = opt(None, "standard deviation of the head's initial weight, normally "
                                       "distributed, which is also the token table if they are tied (record "
                                       "51; off: by `scheme`)", least=0)

    def check(self, s: Any) -> Iterator[str]:
        if self.qkv_bound is not None and s.model.attn.latent:
            yield ("model.init.qkv_bound is of the projections q, k and v, which model.attn.latent replaces: "
                   "switch one off")
        if self.o_bound is not None and s.model.attn.latent:
            yield (
                "model.init.o_bound is of the projection o, which model.attn.latent replaces: switch one off"
            )
