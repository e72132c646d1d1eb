"""Value residual and value embeddings: terms that are mixed into the values of attention."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from layers.primitives import coefficient, constant, dtype, linear, normal, parameter
from layers.residual import Stream
from layers.specs import LayerSpec, num_value_tables
from settings import Settings
from settings.model import table_rows
from updates import views


class ValueResidual(nn.Module):
    """v <- (1 - lam) v + lam v1, v1 the values of block 0 (record 9)."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        v = s.model.attn.value_residual
        self.lam = coefficient(s.model.num_layers, v.init, v.learned, s.numerics.scalar, "value_lambda")

    def begin(self, tokens: torch.Tensor, stream: Stream | None = None) -> Callable:
        """Function (layer, v, n) -> v for one forward pass, n (R, T, D) the normed input of the block."""
        lam, first = self.lam(), []

        def mix(i, v, n):
            if i == 0:  # (1 - lam) v1 + lam v1 = v1, and lam gets no gradient
                first.append(v)
                return v
            v1 = first[0] if first[0].shape == v.shape else first[0].view(v.shape)  # if head counts differ
            return ((1 - lam[i]) * v + lam[i] * v1).to(v.dtype)

        return mix


class ValueEmbed(nn.Module):
    """v <- a v + b ve, where ve is the token's row in the table of the layer (record 14 on).

    mix: `lerp`: a = 1 - b. `pair`: both are learned. `scaled` (record 47): a = 1. `sum` (record 48):
    a = b = 1. With a gate (record 55) each head's ve is multiplied by 2 sigmoid(W n), where n is the normed
    input of the block, or (record 70) half of n and half of ve. In the layer of MUDD its network gives the
    gate.
    """

    def __init__(self, s: Settings, specs: Sequence[LayerSpec]) -> None:
        super().__init__()
        e, n = s.model.attn.value_embed, s.numerics
        # layers without attention have no coefficients
        layers = [i for i, spec in enumerate(specs) if spec.attn is not None]
        self.table_of = [spec.attn and spec.attn.value_table for spec in specs]
        self.number = {layer: k for k, layer in enumerate(layers)}
        self.mix = e.mix
        self.mudd_layer = s.model.residual.mudd.layer if s.model.residual.mudd else None
        self.dtype = dtype(n.residual)
        init = constant(0.0) if e.table_init == "zero" else normal(e.table_std)
        self.tables = nn.ParameterList(
            parameter((table_rows(s), s.model.model_dim), n.table, role="embed", label="value_embed",
                      init=init)
            for _ in range(num_value_tables(s)))

        def sa_lambdas():
            return coefficient(len(layers), e.init, e.learned, n.scalar, "sa_lambdas")

        self.v_lambdas = sa_lambdas() if e.mix == "pair" else None
        self.ve_lambdas = sa_lambdas() if e.mix != "sum" else None
        self.gates = nn.ParameterDict({
            str(i): parameter((spec.attn.heads, spec.attn.value_gate), n.gate, role="matrix", label="ve_gate",
                              views=views.gate(s), init=constant(0.0))
            for i, spec in enumerate(specs)
            if spec.attn is not None and spec.attn.value_gate is not None and i != self.mudd_layer
        })
        self.own = {i for i, spec in enumerate(specs) if spec.attn is not None and spec.attn.value_gate_own}

    def begin(self, tokens: torch.Tensor, stream: Stream | None = None) -> Callable:
        """Function (layer, v, n) -> v for one forward pass, n (R, T, D) the normed input of the block.

        stream: the residual stream, whose MUDD connections may read value embeddings and add to the values.
        """
        a, b = (None if c is None else c() for c in (self.v_lambdas, self.ve_lambdas))
        rows = [F.embedding(tokens, table).to(self.dtype) for table in self.tables]
        for i, table in enumerate(self.table_of) if stream is not None else ():
            if table is not None:
                stream.keep(f"table.{i}", rows[table])

        def mix(i, v, n):
            k, table = self.number[i], self.table_of[i]
            if table is None:
                return v if a is None else (a[k] * v).to(v.dtype)
            ve = by_head(rows[table], v)
            if i == self.mudd_layer:
                ve = stream.gated_table(i, ve) + by_head(stream.values(i), v)
            else:
                ve = self.gated(i, ve, rows[table], n)
            if self.mix == "sum":
                return (v + ve).to(v.dtype)
            if self.mix == "scaled":
                return (v + b[k] * ve).to(v.dtype)
            keep = 1 - b[k] if self.mix == "lerp" else a[k]
            return (keep * v + b[k] * ve).to(v.dtype)

        return mix

    def gated(self, i: int, ve: torch.Tensor, row: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        """Multiply the value embeddings ve (R, T, H, V) of layer i by a gate per token and head.

        row: (R, T, D) the whole rows, whose first channels the gate may read.
        """
        if str(i) not in self.gates:
            return ve
        gate = self.gates[str(i)]
        channels = n[..., :gate.size(1)]
        if i in self.own:
            half = gate.size(1) // 2
            channels = torch.cat([n[..., :half], row[..., :half].to(n.dtype)], dim=-1)
        return 2 * torch.sigmoid(linear(channels, gate))[..., None] * ve  # (R, T, H, V)


def by_head(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """x (R, T, D) cut into heads like the values v (R, T, H, V); narrow heads take the first channels of
    theirs."""
    return x.unflatten(-1, (v.size(2), -1))[..., :v.size(3)]
