"""Smears: a part of the previous token's embedding, or of what the head reads of it."""

import torch
import torch.nn.functional as F
from torch import nn

from layers.attention import Cache
from layers.primitives import coefficient, constant, linear, parameter
from settings import Settings
from updates import views


def one_before(x: torch.Tensor, first: torch.Tensor | None) -> torch.Tensor:
    """x_(t-1) for every t of x (R, T, D). first: (R, 1, D), the one before x_0; None: zeros."""
    return F.pad(x[:, :-1], (0, 0, 1, 0)) if first is None else torch.cat([first, x[:, :-1]], dim=1)


class Smear(nn.Module):
    """e_t <- e_t + lambda sigmoid(W e_t[:channels]) e_(t-1) along the row (record 34, @classiclarryd).

    The first token of a row keeps its embedding. Document boundaries are ignored: the first token of a
    document gets a part of the last token of the previous document.
    """

    def __init__(self, s: Settings) -> None:
        super().__init__()
        smear, n = s.model.embed.smear, s.numerics
        self.lam = coefficient(1, smear.init, smear.learned, n.scalar, "smear_lambda")
        self.gate = parameter((1, smear.channels), n.gate, role="matrix", label="smear_gate",
                              views=views.gate(s), init=constant(0.0))

    def forward(self, e: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """e (R, T, D), rows of the token table -> (R, T, D).

        cache: in generation. Its last embedding precedes e, and is then replaced by the last one of e.
        """
        before = one_before(e, None if cache is None else cache.previous)
        if cache is not None:
            cache.previous = e[:, -1:]
        share = self.lam()[0] * torch.sigmoid(linear(e[..., :self.gate.size(1)], self.gate))  # (R, T, 1)
        return e + share * before


class OutputSmear(nn.Module):
    """x_t <- x_t + c x_(t-1) along the row, for what the head reads (Smear-MTP, medium record 16, @snimu).

    The first token of a row keeps its x. Document boundaries are ignored.
    """

    def __init__(self, s: Settings) -> None:
        super().__init__()
        smear = s.model.head.smear
        self.lam = coefficient(1, smear.init, smear.learned, s.numerics.scalar, "smear_lambda")

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """x (R, T, D), the normed stream after the last block -> (R, T, D).

        cache: in generation. Its last x precedes these, and is then replaced by the last one of these.
        """
        before = one_before(x, None if cache is None else cache.output)
        if cache is not None:
            cache.output = x[:, -1:]
        return x + self.lam()[0] * before
