"""The residual stream as a sum of terms; each feature that wires the stream adds its terms.

At a site of a layer, every term of this site adds coefficient times source to the stream x. A term with the
source `x` scales x itself. A site without terms costs nothing.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from layers.primitives import coefficient, constant, linear, parameter
from layers.specs import LayerSpec
from settings import Settings
from updates import views


class Entry(NamedTuple):
    """A coefficient: entry `index` of what a submodule of Residual returns, times a factor."""
    module: str
    index: int
    factor: float = 1.0


@dataclass(frozen=True)
class Term:
    """One summand of the stream.

    site: in the order of a layer `skip` and `in` (before attention), `attn` and `mlp` (after these branches);
        `out` after the last block, with layer = L.
    source: `x` (the stream), `branch` (the output of attention or MLP), `x0` (the embedding) or `saved.i`
        (the stream after layer i).
    """
    site: Literal["skip", "in", "attn", "mlp", "out"]
    layer: int
    source: str
    coef: float | Entry


def branch_terms(specs: tuple[LayerSpec, ...]) -> list[Term]:
    """The plain residual: each branch is added to the stream."""
    attn = [Term("attn", i, "branch", 1.0) for i, spec in enumerate(specs) if spec.attn is not None]
    return attn + [
        Term("mlp", i, "branch", 1.0) for i, spec in enumerate(specs) if spec.mlp is not None or spec.moe
    ]


def skip_pairs(specs: tuple[LayerSpec, ...], pairs: tuple | None) -> list[tuple[int, int]]:
    """(from, to) of each skip: the pairs of the settings, or the U-net (record 11).

    In the U-net the outputs of the first half of the layers are added in the second half, last in, first out.
    Empty layers have no skips.
    """
    if pairs is not None:
        return list(pairs)
    half = len(specs) // 2
    unet = [(half - 1 - k, half + k) for k in range(half)]
    return [pair for pair in unet if not any(specs[layer].empty for layer in pair)]


def skip_terms(pairs: list[tuple[int, int]]) -> list[Term]:
    """The terms of the skips: the output of one layer is added before a later one."""
    return [
        Term("skip", to, f"saved.{source}", Entry("skip_weights", k)) for k, (source, to) in enumerate(pairs)
    ]


def x0_terms(specs: tuple[LayerSpec, ...]) -> list[Term]:
    """The x0 mix (record 9): x <- a x + b x0 before every layer that is not empty."""
    layers = [i for i, spec in enumerate(specs) if not spec.empty]
    return [Term("in", i, source, Entry(name, k)) for k, i in enumerate(layers)
            for source, name in (("x", "resid_lambdas"), ("x0", "x0_lambdas"))]


class Residual(nn.Module):
    """The terms of the stream and their learned or constant coefficients."""

    def __init__(self, s: Settings, specs: tuple[LayerSpec, ...]):
        super().__init__()
        r, n = s.model.residual, s.numerics
        self.terms: dict[tuple[str, int], list[Term]] = {}  # by site and layer
        self.sources: set[str] = set()  # sources of all terms
        self.add(*branch_terms(specs))
        self.skip_gate = None
        if r.unet_skips:
            self.add_skips(s, skip_pairs(specs, r.unet_skips.pairs))
        if r.x0_mix:
            layers = sum(not spec.empty for spec in specs)
            self.resid_lambdas = coefficient(layers, r.x0_mix.x, r.x0_mix.learned, n.scalar, "resid_lambdas")
            self.x0_lambdas = coefficient(layers, r.x0_mix.x0, r.x0_mix.learned, n.scalar, "x0_lambdas")
            self.add(*x0_terms(specs))
        if r.backout:
            self.backout = coefficient(1, r.backout.init, r.backout.learned, n.scalar, "backout_lambda")
            self.add(Term("out", len(specs), f"saved.{r.backout.layer}", Entry("backout", 0, -1.0)))

    def add_skips(self, s: Settings, pairs: list[tuple[int, int]]) -> None:
        """The skips with their weights, and with the gate 2 sigmoid(W x0) of record 55 if it is on."""
        u, n = s.model.residual.unet_skips, s.numerics
        self.skip_weights = coefficient(
            len(pairs), u.init if u.sigmoid is None else u.sigmoid, u.learned, n.scalar, "skip_weights",
            sigmoid=u.sigmoid is not None
        )
        if u.gate is not None:
            self.skip_gate = parameter((len(pairs), u.gate.channels), n.gate, role="matrix",
                                       label="skip_gate", views=views.gate(s), init=constant(0.0))
        self.add(*skip_terms(pairs))

    def add(self, *terms: Term) -> None:
        """Add terms after those that their sites already have."""
        for term in terms:
            self.terms.setdefault((term.site, term.layer), []).append(term)
            self.sources.add(term.source)

    def start(self, x0: torch.Tensor) -> "Stream":
        """The Stream of one forward pass, which begins with the embedding x0 (R, T, D)."""
        coefs = {name: module() for name, module in self.named_children()}
        if self.skip_gate is not None:
            channels = x0[..., :self.skip_gate.size(1)]
            gates = (2 * torch.sigmoid(linear(channels, self.skip_gate))).unbind(-1)  # (R, T) of each skip
            skips = zip(coefs["skip_weights"], gates)
            coefs["skip_weights"] = [weight * gate[..., None] for weight, gate in skips]
        return Stream(self.terms, coefs, self.sources, x0)


class Stream:
    """The coefficients and saved tensors of one forward pass."""

    def __init__(self, terms, coefs, wanted, x0):
        self.terms, self.coefs, self.wanted = terms, coefs, wanted
        self.sources = {"x0": x0}

    def mix(self, site: str, layer: int, x: torch.Tensor, branch: torch.Tensor | None = None) -> torch.Tensor:
        """The stream x (R, T, D) after a site of a layer; terms are added in their order."""
        terms = self.terms.get((site, layer), ())
        for term in terms:
            if term.source == "x":
                x = scaled(self.coef(term), x)
        for term in terms:
            coef = self.coef(term)
            if term.source != "x" and not is_number(coef, 0):
                x = x + scaled(coef, branch if term.source == "branch" else self.sources[term.source])
        return x

    def coef(self, term):
        if not isinstance(term.coef, Entry):
            return term.coef
        value, factor = self.coefs[term.coef.module][term.coef.index], term.coef.factor
        return value if factor == 1.0 else factor * value

    def save(self, layer: int, x: torch.Tensor) -> None:
        """Keep the stream after a layer for the terms that refer to it."""
        if f"saved.{layer}" in self.wanted:
            self.sources[f"saved.{layer}"] = x


def is_number(coef, value):
    """Whether a coefficient is this constant; a learned one (a tensor) never is."""
    return isinstance(coef, float) and coef == value


def scaled(coef, x):
    """coef * x, without a multiplication if coef is the number 1."""
    return x if is_number(coef, 1) else coef * x
