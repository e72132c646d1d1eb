"""The residual stream as a sum of terms; each feature that wires the stream adds its terms.

At a site of a layer, every term of this site adds coefficient times source to the stream x. A term with the
source `x` scales x itself. A site without terms costs nothing. A coefficient is a number, a learned scalar,
or a column of a network that reads the stream (layers/token_nets.py).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from layers.primitives import coefficient, constant, linear, parameter
from layers.specs import LayerSpec, gated_layers
from layers.token_nets import Column, TokenNet
from settings import Settings
from updates import views


class Entry(NamedTuple):
    """A coefficient: entry `index` of what `module` of Residual returns, times a factor and another entry."""
    module: str
    index: int | str
    factor: float = 1.0
    times: "Entry | None" = None


@dataclass(frozen=True)
class Term:
    """One summand of the stream.

    site: in the order of a layer `skip` and `in` (before attention), `value` (of attention's values), `attn`
        and `mlp` (after these branches); `start` before block 0; `out` after the last block, with layer = L.
    source: `x` (the stream), `branch` (the output of attention or MLP), `x0` (the embedding), `x02` (the
        second embedding), `bigram`, `start` (the stream before block 0), `saved.i` (the stream after layer
        i), `attn.i` (after its attention), `attn_in.i` and `mlp_in.i` (the normed inputs of its branches),
        `table.i` (the value embedding of layer i) or `lane` (the second lane).
    lane: 1: a term of the second lane (record 73).
    """
    site: Literal["start", "skip", "in", "value", "attn", "mlp", "out"]
    layer: int
    source: str
    coef: float | Entry
    lane: int = 0


def sublayers(specs: tuple[LayerSpec, ...], keep: Collection[int] = ()) -> Iterator[tuple[str, int]]:
    """(site, layer) of every sublayer, in their order; those that a layer lacks too if it is one of
    `keep`."""
    for i, spec in enumerate(specs):
        if spec.attn is not None or i in keep:
            yield "attn", i
        if spec.mlp is not None or spec.moe or i in keep:
            yield "mlp", i


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


# ----- the columns of the networks --------------------------------------------------------------------------

def shortcut_layers(s: Settings, specs: tuple[LayerSpec, ...], named: tuple[int, ...] | None) -> list[int]:
    """Layers that add the embedding, or the bigram, by coefficients of their own.

    named: those that the settings name; None: all. With sublayers these are the layers with attention; MUDD
        has the last one's coefficients.
    """
    r = s.model.residual
    if named is not None:
        return list(named)
    if r.sublayers is None:
        return [i for i, spec in enumerate(specs) if not spec.empty]
    return [i for i, spec in enumerate(specs) if spec.attn is not None and not (r.mudd and i == r.mudd.layer)]


def gate_columns(
    s: Settings, specs: tuple[LayerSpec, ...], pairs: list[tuple[int, int]]
) -> list[tuple[int, Column]]:
    """(layer, column) of every coefficient that the token gates give, for what is switched on."""
    m, g = s.model, s.model.token_gates
    heads = m.attn.num_heads
    found = [(i, Column(f"xsa.{i}", heads, m.attn.xsa.init)) for i, spec in enumerate(specs)
             if spec.attn is not None and spec.attn.xsa]
    found += [(i, Column(f"attn.{i}", heads, g.attn)) for i in gated_layers(s)]
    x0, bigram = m.residual.x0_mix, m.embed.bigram
    if x0:
        found += [(i, Column(f"x0.{i}", 1, x0.x0)) for i in shortcut_layers(s, specs, x0.layers)]
    if bigram:
        found += [
            (i, Column(f"bigram.{i}", 1, bigram.init)) for i in shortcut_layers(s, specs, bigram.layers)
        ]
    found += [(to, Column(f"skip.{k}", 1, g.skip)) for k, (_, to) in enumerate(pairs)]
    for i, spec in enumerate(specs):
        if spec.attn is not None and spec.attn.compose is not None:
            found += [(i, Column(f"w1.{i}", heads, g.compose)), (i, Column(f"w2.{i}", heads))]
    return found


def mudd_columns(s: Settings) -> tuple[list[Column], list[Column]]:
    """The columns of MUDD's two networks: for its layer, and for the sum before the final norm."""
    r, bigram = s.model.residual, s.model.embed.bigram
    mudd, resid, post = r.mudd, r.sublayers.resid, r.sublayers.post
    inside = [Column("value.start"), Column("value.cached"), Column("value.x"), Column("in.start"),
              Column("in.cached"), Column("in.x"), Column("table", 2, 2.0), Column("attn.x", 1, resid),
              Column("attn.branch", 1, post), Column("attn.start")]
    if bigram:
        inside.append(Column("attn.bigram", 1, bigram.init))
    inside += [Column("mlp.x", 1, resid), Column("mlp.branch", 1, post)]
    first = mudd.snapshots[0]
    out = [
        Column("start"),
        *(Column(f"saved.{i}", 1, mudd.backout if i == first else 0.0) for i in mudd.snapshots),
        *(Column(f"table.{i}") for i in mudd.tables)
    ]
    out += [
        Column(f"{name}.{mudd.layer}")
        for name, on in (("mlp_in", mudd.mlp_input), ("attn_in", mudd.attn_input)) if on
    ]
    return inside, out


# ----- the module -------------------------------------------------------------------------------------------

class Residual(nn.Module):
    """The terms of the stream and their coefficients: numbers, learned scalars or networks."""

    def __init__(self, s: Settings, specs: tuple[LayerSpec, ...]) -> None:
        super().__init__()
        m, r, n = s.model, s.model.residual, s.numerics
        self.settings, self.specs = s, specs
        self.terms: dict[tuple[str, int], list[Term]] = {}  # by site and layer
        self.lane_terms: dict[tuple[str, int], list[Term]] = {}  # likewise, of the second lane
        self.sources: set[str] = set()  # of all terms, and of attention in later layers
        if m.attn.saved_input is not None:
            self.sources.add(f"saved.{m.attn.saved_input}")
        self.nets: dict[int, list[str]] = {}  # networks by the layer whose incoming stream they read; -1: x0
        self.pairs = skip_pairs(specs, r.unet_skips.pairs) if r.unet_skips else []
        self.skip_gate = self.token_scale = None
        self.mudd_layer = r.mudd.layer if r.mudd else None
        self.lane_start = r.lanes.start if r.lanes else None
        self.x0_with_bigram = bool(m.embed.bigram and m.embed.bigram.in_x0)
        if m.token_gates:
            self.add_token_gates()
        if r.sublayers:
            self.add_sublayers()
        else:
            self.add(*(Term(site, i, "branch", 1.0) for site, i in sublayers(specs)))
        if r.unet_skips:
            self.add_skips(s)
        self.add_shortcuts()
        if r.mudd:
            self.add_mudd()
        if r.lanes:
            self.add(Term("out", len(specs), "x", 0.5), Term("out", len(specs), "lane", 0.5))
        if r.backout:
            self.backout = coefficient(1, r.backout.init, r.backout.learned, n.scalar, "backout_lambda")
            self.add(Term("out", len(specs), f"saved.{r.backout.layer}", Entry("backout", 0, -1.0)))
        if r.layer_reuse:
            reuse = r.layer_reuse
            self.layer_reuse = coefficient(2, (reuse.x, reuse.y), reuse.learned, n.scalar, "backout_lambda")
            self.sources.add(f"saved.{reuse.layer}")

    def add(self, *terms: Term) -> None:
        """Add terms after those that their sites already have."""
        for term in terms:
            found = self.lane_terms if term.lane else self.terms
            found.setdefault((term.site, term.layer), []).append(term)
            self.sources.add(term.source)

    def add_net(self, name: str, layer: int, net: TokenNet) -> None:
        """A network that reads the stream which enters a layer (-1: the embedding x0, L: after the last
        layer)."""
        setattr(self, name, net)
        self.nets.setdefault(layer, []).append(name)

    def add_token_gates(self) -> None:
        """The two networks of record 85: one serves the layers before `layer`, one the others."""
        s, g = self.settings, self.settings.model.token_gates
        self.token_scale = parameter((1,), s.numerics.scalar, role="scalar", label="token_gate_scale",
                                     init=constant(g.scale))
        columns = gate_columns(s, self.specs, self.pairs)
        for name, layer, mine in (("early_gates", -1, [c for i, c in columns if i < g.layer]),
                                  ("late_gates", g.layer, [c for i, c in columns if i >= g.layer])):
            if mine:
                self.add_net(
                    name, layer,
                    TokenNet(mine, s.model.model_dim, g.hidden, g.scale, s.numerics.gate, "token_gate")
                )

    def token_gate(self, name: str, layer: int) -> Entry:
        """The coefficient of this name and layer that a token gate gives."""
        return Entry("early_gates" if layer < self.settings.model.token_gates.layer else "late_gates", name)

    def add_sublayers(self) -> None:
        """r x + p branch(x) for every sublayer, in two lanes from record 73's layer on."""
        s, r = self.settings, self.settings.model.residual
        f, lanes = r.sublayers, r.lanes
        whole = set(sublayers(self.specs))
        mine = [(site, i) for site, i in sublayers(self.specs, f.keep_layers) if i != self.mudd_layer]
        posted = [(site, i) for site, i in mine
                  if (site, i) in whole and (site == "mlp" or i >= f.attn_post_from)]
        doubled = [(site, i) for site, i in mine if lanes and i >= lanes.start]
        self.resid_lambdas = coefficient(len(mine), f.resid, f.learned, s.numerics.scalar, "resid_lambdas")
        self.post_lambdas = coefficient(len(posted), f.post, f.learned, s.numerics.scalar, "post_lambdas")
        if lanes:
            first = [lanes.attn_post if site == "attn" else f.post for site, _ in doubled]
            self.lane_lambdas = coefficient(len(doubled), first, f.learned, s.numerics.scalar, "post_lambdas")
        for k, (site, i) in enumerate(mine):
            post = Entry("post_lambdas", posted.index((site, i))) if (site, i) in posted else 1.0
            self.add(Term(site, i, "x", Entry("resid_lambdas", k)))
            if (site, i) in whole:
                self.add(Term(site, i, "branch", post))
            if (site, i) in doubled:
                self.add(Term(site, i, "x", Entry("resid_lambdas", k), lane=1),
                         Term(site, i, "branch", Entry("lane_lambdas", doubled.index((site, i))), lane=1))

    def add_skips(self, s: Settings) -> None:
        """The skips with their weights, and with a gate per token if there is one.

        It is 2 sigmoid(W x0) (record 55), or a token gate.
        """
        u, n, pairs = s.model.residual.unet_skips, s.numerics, self.pairs
        self.skip_weights = coefficient(
            len(pairs), u.init if u.sigmoid is None else u.sigmoid, u.learned, n.scalar, "skip_weights",
            sigmoid=u.sigmoid is not None
        )
        by_token = s.model.token_gates is not None
        if u.gate is not None and not by_token:
            self.skip_gate = parameter((len(pairs), u.gate.channels), n.gate, role="matrix",
                                       label="skip_gate", views=views.gate(s), init=constant(0.0))
        source = "attn" if u.after_attention else "saved"
        for k, (start, to) in enumerate(pairs):
            gate = self.token_gate(f"skip.{k}", to) if by_token else None
            self.add(Term("skip", to, f"{source}.{start}", Entry("skip_weights", k, times=gate)))

    def add_shortcuts(self) -> None:
        """The embedding (x0 mix, record 9) and the bigram (record 62) in the layers that add them."""
        s, m, r = self.settings, self.settings.model, self.settings.model.residual
        n, x0, bigram = s.numerics, r.x0_mix, m.embed.bigram
        site = "in" if r.sublayers is None else "attn"
        if x0 and r.sublayers is None:
            layers = shortcut_layers(s, self.specs, None)
            self.resid_lambdas = coefficient(len(layers), x0.x, x0.learned, n.scalar, "resid_lambdas")
            self.add(*(Term(site, i, "x", Entry("resid_lambdas", k)) for k, i in enumerate(layers)))
        if x0:
            self.add_shortcut(
                "x0", shortcut_layers(s, self.specs, x0.layers), site, x0.x0, x0.learned, "x0_lambdas"
            )
        if m.embed.second:
            layers, second = shortcut_layers(s, self.specs, None), m.embed.second
            self.x02_lambdas = coefficient(len(layers), second.init, second.learned, n.scalar, "x0_lambdas")
            self.add(*(Term(site, i, "x02", Entry("x02_lambdas", k)) for k, i in enumerate(layers)))
        if bigram:
            self.add_shortcut(
                "bigram", shortcut_layers(s, self.specs, bigram.layers),
                site if bigram.site == "in" else "attn", bigram.init, bigram.learned, "bigram_lambdas"
            )

    def add_shortcut(self, source: str, layers: list[int], site: str, init: float, learned: bool,
                     module: str) -> None:
        """Terms of x0 or the bigram: one coefficient per layer, learned or from the token gates.

        After attention, layer 0 adds the bigram at the start already, before the first layer.
        """
        by_token = self.settings.model.token_gates is not None
        if not by_token:
            setattr(
                self, module, coefficient(len(layers), init, learned, self.settings.numerics.scalar, module)
            )
        lanes = self.settings.model.residual.lanes
        for k, i in enumerate(layers):
            coef = self.token_gate(f"{source}.{i}", i) if by_token else Entry(module, k)
            if source == "bigram" and site == "attn" and i == 0:
                self.add(Term("start", 0, source, coef))
                continue
            if lanes and lanes.shortcuts == "scaled":
                here = self.terms.get((site, i), []) + self.lane_terms.get((site, i), [])
                for term in [term for term in here if term.source == "branch"]:
                    self.add(Term(site, i, source, coef._replace(times=term.coef), lane=term.lane))
            else:
                self.add(Term(site, i, source, coef))

    def add_mudd(self) -> None:
        """The networks of MUDD and the terms of its layer and of the sum before the final norm."""
        s, mudd, last = self.settings, self.settings.model.residual.mudd, len(self.specs)
        inside, out = mudd_columns(s)
        for name, layer, columns in (("mudd_layer_net", mudd.layer, inside), ("mudd_out_net", last, out)):
            self.add_net(
                name,
                layer,
                TokenNet(
                    columns, s.model.model_dim, mudd.hidden, mudd.scale, s.numerics.gate, "mudd",
                    mudd.groups if layer == last else None
                ),
            )
        sources = {"start": "start", "cached": f"saved.{mudd.cached}", "x": f"saved.{mudd.layer - 1}",
                   "branch": "branch", "bigram": "bigram"}
        for column in inside:
            site, _, source = column.name.partition(".")
            if source:
                own = site in ("attn", "mlp") and source == "x"  # these scale the stream
                self.add(Term(site, mudd.layer, "x" if own else sources[source],
                              Entry("mudd_layer_net", column.name)))
        self.add(*(Term("out", last, column.name, Entry("mudd_out_net", column.name)) for column in out))

    def start(self, x0: torch.Tensor, bigram: torch.Tensor | None = None,
              x02: torch.Tensor | None = None) -> "Stream":
        """The Stream of one forward pass: x0 (R, T, D) the embedding, bigram (R, T, D) rows of its table, x02
        (R, T, D) the second embedding."""
        coefs = {name: module() for name, module in self.named_children() if not isinstance(module, TokenNet)}
        return Stream(self, coefs, {"x0": x0, "bigram": bigram, "x02": x02})

    def gate_skips(self, coefs: dict, x0: torch.Tensor) -> None:
        """Multiply the weights of the skips by their gates 2 sigmoid(W x0), where there are gates."""
        if self.skip_gate is not None:
            channels = x0[..., :self.skip_gate.size(1)]
            gates = (2 * torch.sigmoid(linear(channels, self.skip_gate))).unbind(-1)  # (R, T) of each skip
            skips = zip(coefs["skip_weights"], gates)
            coefs["skip_weights"] = [weight * gate[..., None] for weight, gate in skips]


class Stream:
    """The coefficients and saved tensors of one forward pass."""

    def __init__(self, residual: Residual, coefs: dict, sources: dict[str, torch.Tensor | None]) -> None:
        self.residual, self.coefs, self.sources, self.second = residual, coefs, sources, None

    def begin(self) -> torch.Tensor:
        """The stream (R, T, D) before block 0: the embedding, and the first bigram term if it stands here."""
        self.read(-1, self.sources["x0"])
        x = self.mix("start", 0, self.sources["x0"])
        if self.residual.x0_with_bigram:
            self.sources["x0"] = x
        self.residual.gate_skips(self.coefs, self.sources["x0"])
        self.keep("start", x)
        return x

    def enter(self, layer: int, x: torch.Tensor) -> None:
        """What happens with the stream x that enters a layer: networks read it, the second lane begins."""
        self.read(layer, x)
        if layer == self.residual.lane_start:
            self.second = x

    def read(self, layer: int, x: torch.Tensor) -> None:
        """Compute the coefficients of the networks that read the stream here."""
        for name in self.residual.nets.get(layer, ()):
            net, scale = getattr(self.residual, name), self.residual.token_scale
            shared = name in ("early_gates", "late_gates")
            self.coefs[name] = net(x, scale if shared else self.residual.settings.model.residual.mudd.scale)

    def mix(self, site: str, layer: int, x: torch.Tensor, branch: torch.Tensor | None = None) -> torch.Tensor:
        """The stream x (R, T, D) after a site of a layer; terms are added in their order."""
        if site == "out":
            self.sources["lane"] = self.second
        elif self.second is not None:
            self.second = self.added(self.residual.lane_terms.get((site, layer), ()), self.second, branch)
        return self.added(self.residual.terms.get((site, layer), ()), x, branch)

    def added(self, terms: Collection[Term], x: torch.Tensor, branch: torch.Tensor | None) -> torch.Tensor:
        """x with the terms of one site and lane."""
        for term in terms:
            if term.source == "x":
                x = scaled(self.coef(term.coef), x)
        for term in terms:
            coef = self.coef(term.coef)
            if term.source != "x" and not is_number(coef, 0):
                x = x + scaled(coef, branch if term.source == "branch" else self.sources[term.source])
        return x

    def reuse(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """What the head reads (R, T, D): x, the normed stream, or a x + b norm(y), y an earlier stream."""
        reuse = self.residual.settings.model.residual.layer_reuse
        if reuse is None:
            return x
        a, b = self.coefs["layer_reuse"]
        return a * x + b * norm(self.sources[f"saved.{reuse.layer}"])

    def values(self, layer: int) -> torch.Tensor | None:
        """What MUDD adds to the values of a layer (R, T, D), or None."""
        total = None
        for term in self.residual.terms.get(("value", layer), ()):
            part = self.coef(term.coef) * self.sources[term.source]
            total = part if total is None else total + part
        return total

    def gated_table(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """The value embedding (R, T, H, V) of MUDD's layer times its gate, one for each half of the heads."""
        gate = self.coefs["mudd_layer_net"]["table"].repeat_interleave(rows.size(2) // 2, dim=-1)
        return gate[..., None] * rows

    def by_head(self, name: str, layer: int) -> torch.Tensor | None:
        """Coefficients (R, T, H) that a token gate gives the heads of a layer, or None. name: xsa, attn, w1,
        w2."""
        for net in ("early_gates", "late_gates"):
            if (found := self.coefs.get(net, {}).get(f"{name}.{layer}")) is not None:
                return found
        return None

    def attn_input(self, saved: int | None, x: torch.Tensor) -> torch.Tensor:
        """The stream that attention reads: x, or the stream after layer `saved` (record 77)."""
        return x if saved is None else self.sources[f"saved.{saved}"]

    def mlp_input(self, x: torch.Tensor) -> torch.Tensor:
        """The stream that the MLP reads: x, or the second lane (record 73)."""
        return x if self.second is None else self.second

    def coef(self, coef: float | Entry) -> float | torch.Tensor:
        """The value of a coefficient: a number, a 0-d tensor or (R, T, 1)."""
        if not isinstance(coef, Entry):
            return coef
        value = self.coefs[coef.module][coef.index]
        if coef.factor != 1.0:
            value = coef.factor * value
        return value if coef.times is None else value * self.coef(coef.times)

    def keep(self, name: str, x: torch.Tensor) -> None:
        """Keep the stream x under a name, if a term or a layer's attention refers to it."""
        if name in self.residual.sources:
            self.sources[name] = x


def is_number(coef: float | torch.Tensor, value: float) -> bool:
    """Whether a coefficient is this constant; a learned one (a tensor) never is."""
    return isinstance(coef, float) and coef == value


def scaled(coef: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """coef * x, without a multiplication if coef is the number 1. (R, T, G) is of G groups of channels."""
    if is_number(coef, 1):
        return x
    if isinstance(coef, torch.Tensor) and coef.dim() == x.dim() and 1 < coef.size(-1) < x.size(-1):
        return (coef[..., None] * x.unflatten(-1, (coef.size(-1), -1))).flatten(-2)
    return coef * x
