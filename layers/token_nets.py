"""Coefficients per token from small networks: MUDD connections (record 81) and token gates (record 85)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from layers.primitives import constant, linear, parameter, uniform, values


class Column(NamedTuple):
    """One named coefficient of a network. width: 1, or one per head or group of heads. init: its first
    value."""
    name: str
    width: int = 1
    init: float = 0.0


class TokenNet(nn.Module):
    """scale (W2 gelu(W1 x) + b) for every token, x (R, T, D) the stream without a norm.

    MUDD (Xiao et al., arXiv 2502.12170). W2 starts at zero, so that every coefficient starts at its column's
    init. The exact GELU, with the error function.
    """

    def __init__(
        self, columns: Sequence[Column], dim: int, hidden: int, scale: float, dtype_name: str, label: str,
        groups: int | None = None
    ) -> None:
        """scale: constant factor of the outputs; the biases are stored without it. label: of the parameters.
        groups: each column gets a second coefficient per group of channels, from the same hidden values,
            which is added to the first (record 92); None: none.
        """
        super().__init__()
        self.columns = tuple(columns)
        n, starts = sum(c.width for c in columns), [c.init / scale for c in columns for _ in range(c.width)]
        self.w1 = parameter((hidden, dim), dtype_name, role="matrix", label=label, init=uniform(dim ** -0.5))
        self.w2 = parameter((n, hidden), dtype_name, role="matrix", label=label, init=constant(0.0))
        self.bias = parameter((n,), dtype_name, role="scalar", label=f"{label}_bias", init=values(starts))
        self.by_group = None
        if groups is not None:
            self.by_group = parameter(
                (len(columns), groups, hidden), dtype_name, role="matrix", label=label, init=constant(0.0)
            )

    def forward(self, x: torch.Tensor, scale: torch.Tensor | float) -> dict[str, torch.Tensor]:
        """{column: its coefficients (R, T, width), or (R, T, groups)} for the stream x (R, T, D), in x's
        dtype."""
        hidden = F.gelu(linear(x, self.w1))
        found = linear(hidden, self.w2, self.bias)
        if isinstance(scale, torch.Tensor):
            scale = scale.to(found.dtype)
        parts = (scale * found).split([c.width for c in self.columns], dim=-1)
        if self.by_group is not None:
            groups = scale * linear(hidden, self.by_group.flatten(0, 1)).unflatten(
                -1, self.by_group.shape[:2]
            )
            parts = [part + of_groups for part, of_groups in zip(parts, groups.unbind(-2))]
        return {column.name: part for column, part in zip(self.columns, parts)}
