"""What is mixed into the values of attention: the values of block 0, or rows of token tables."""

import torch.nn.functional as F
from torch import nn

from layers.primitives import coefficient, dtype, normal, parameter
from layers.specs import num_value_tables
from settings import table_rows


class ValueResidual(nn.Module):
    """v <- (1 - lam) v + lam v1, v1 the values of block 0 (record 9)."""

    def __init__(self, s):
        super().__init__()
        v = s.model.attn.value_residual
        self.lam = coefficient(s.model.num_layers, v.init, v.learned, s.numerics.scalar, "value_lambda")

    def begin(self, tokens):
        """Function (layer, v) -> v for one forward pass."""
        lam, first = self.lam(), []

        def mix(i, v):
            if i == 0:  # (1 - lam) v1 + lam v1 = v1, and lam gets no gradient
                first.append(v)
                return v
            v1 = first[0] if first[0].shape == v.shape else first[0].view(v.shape)  # another number of heads
            return ((1 - lam[i]) * v + lam[i] * v1).to(v.dtype)

        return mix


class ValueEmbed(nn.Module):
    """v <- a v + b ve, ve the token's row of the layer's table (record 14 on); a = 1 - b with mix `lerp`."""

    def __init__(self, s, specs):
        super().__init__()
        e, n = s.model.attn.value_embed, s.numerics
        # the others have no coefficients
        layers = [i for i, spec in enumerate(specs) if spec.attn is not None]
        self.table_of = [spec.attn and spec.attn.value_table for spec in specs]
        self.number = {layer: k for k, layer in enumerate(layers)}
        self.lerp = e.mix == "lerp"
        self.dtype = dtype(n.residual)
        self.tables = nn.ParameterList(
            parameter((table_rows(s), s.model.model_dim), n.table, role="embed", label="value_embed",
                      init=normal(1.0))
            for _ in range(num_value_tables(s)))

        def sa_lambdas():
            return coefficient(len(layers), e.init, e.learned, n.scalar, "sa_lambdas")

        self.v_lambdas = None if self.lerp else sa_lambdas()
        self.ve_lambdas = sa_lambdas()

    def begin(self, tokens):
        """Function (layer, v) -> v for one forward pass."""
        a, b = self.v_lambdas() if self.v_lambdas is not None else None, self.ve_lambdas()
        rows = [F.embedding(tokens, table).to(self.dtype) for table in self.tables]

        def mix(i, v):
            k, table = self.number[i], self.table_of[i]
            keep = 1 - b[k] if self.lerp else a[k]
            if table is None:
                return v if self.lerp else (keep * v).to(v.dtype)
            return (keep * v + b[k] * rows[table].view(v.shape)).to(v.dtype)

        return mix
