"""Smear: a gated part of the previous token's embedding."""

import torch
import torch.nn.functional as F
from torch import nn

from layers.attention import Cache
from layers.primitives import coefficient, constant, linear, parameter
from settings import Settings
from updates import views


class Smear(nn.Module):
    """e_t <- e_t + lambda sigmoid(W e_t[:channels]) e_(t-1) along the row (record 34, @classiclarryd).

    The first token of a row keeps its embedding. Document boundaries are ignored: the first token of a
    document gets a part of the last token of the previous document.
    """

    def __init__(self, s: Settings):
        super().__init__()
        smear, n = s.model.embed.smear, s.numerics
        self.lam = coefficient(1, smear.init, smear.learned, n.scalar, "smear_lambda")
        self.gate = parameter((1, smear.channels), n.gate, role="matrix", label="smear_gate",
                              views=views.gate(s), init=constant(0.0))

    def forward(self, e: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """e (R, T, D), rows of the token table -> (R, T, D).

        cache: in generation. Its last embedding precedes e, and is then replaced by the last one of e.
        """
        first = None if cache is None else cache.previous
        before = F.pad(e[:, :-1], (0, 0, 1, 0)) if first is None else torch.cat([first, e[:, :-1]], dim=1)
        if cache is not None:
            cache.previous = e[:, -1:]
        share = self.lam()[0] * torch.sigmoid(linear(e[..., :self.gate.size(1)], self.gate))  # (R, T, 1)
        return e + share * before
