"""The matrices of a parameter as an update rule sees them, independent of how the parameter is stored."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from settings import Settings
from settings.model import query_dim


@dataclass(frozen=True)
class Views:
    """The matrices in a parameter, for rules like Muon.

    pieces: (name, start, stop) of each matrix along dim 0 of a parameter (P, rows, cols). A piece of several
        slices is one matrix with (stop - start) * rows rows. (): the parameter is one matrix (rows, cols) or
        a stack of independent matrices.
    orientation: whether a stored matrix is (outputs, inputs) or (inputs, outputs), for factors of the shape.
    variance_axis: axis of a matrix over which statistics per neuron average. None: statistics per column of
        the parameter reshaped to one matrix (rows, P cols), with the numbers in stored order (record 41).
    rows: rows of one matrix, where a stored slice holds several below each other (record 80); None: its own.
    name: of the matrix, where the parameter has no pieces.
    whole: the parameter is one unit although no piece joins slices: a slot treats its pieces differently.
    depth: share of the layers below this one's, where a slot treats layers differently; otherwise 0.
    """
    pieces: tuple[tuple[str, int, int], ...] = ()
    orientation: Literal["out_in", "in_out"] = "out_in"
    variance_axis: int | None = -1
    rows: int | None = None
    name: str = ""
    whole: bool = False
    depth: float = 0.0

    @property
    def joined(self) -> bool:
        """Whether a unit is the whole parameter, with all its pieces."""
        return self.whole or any(stop - start > 1 for _, start, stop in self.pieces)

    @property
    def names(self) -> list[str]:
        """The names of the matrices that `split` returns."""
        return [name for name, _, _ in self.pieces] if self.joined else [self.name]

    def shapes(self, unit: tuple[int, ...]) -> list[tuple[int, int]]:
        """(rows, cols) of each matrix that `split` returns. unit: shape of one unit."""
        rows, cols = unit[-2:]
        if not self.joined:
            return [(rows, cols)]
        return [((stop - start) * rows, cols) for _, start, stop in self.pieces]

    def unit(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the unit that a rule updates as a whole.

        The whole parameter if its slices are joined or share statistics, otherwise one matrix.
        """
        if self.joined or self.variance_axis is None:
            return tuple(shape)
        return self.rows or shape[-2], shape[-1]

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Units (N, *unit) -> the batches (N, rows, cols) of their matrices, without a copy."""
        if not self.joined:
            return [x]
        return [x[:, start:stop].flatten(1, 2) for _, start, stop in self.pieces]

    def join(self, matrices: list[torch.Tensor]) -> torch.Tensor:
        """The inverse of `split`."""
        if not self.joined:
            return matrices[0]
        slices = [x.unflatten(1, (stop - start, -1)) for x, (_, start, stop) in zip(matrices, self.pieces)]
        return torch.cat(slices, dim=1)  # (N, P, rows, cols)

    def statistics_shape(self, unit: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one number per neuron of a unit, for `neurons`."""
        rows, cols = unit[-2:]
        if self.variance_axis is None:
            return (1, math.prod(unit[:-2]) * cols)
        if self.variance_axis == -1:
            return (*unit[:-1], 1)
        return (len(self.pieces), 1, cols) if self.joined else (*unit[:-2], 1, cols)

    def neurons(
        self, x: torch.Tensor, statistics: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        """[(batch of matrices, their statistics, axis over which the statistics average)], as views.

        x: units (N, *unit). statistics: (N, *statistics_shape(unit)).
        """
        if self.variance_axis is None:
            return [(x.view(len(x), x.size(-2), -1), statistics, -2)]
        if not self.joined:
            return [(x, statistics, self.variance_axis)]
        parts = self.split(statistics) if self.variance_axis == -1 else statistics.unbind(1)
        return [(matrices, part, self.variance_axis) for matrices, part in zip(self.split(x), parts)]

    def shape(self, matrix: torch.Tensor) -> tuple[int, int]:
        """(outputs, inputs) of a stored matrix (..., rows, cols)."""
        rows, cols = matrix.shape[-2:]
        return (rows, cols) if self.orientation == "out_in" else (cols, rows)


def mark_depth(s: Settings, blocks: Iterable[torch.nn.Module]) -> None:
    """Give the parameters of each block their depth, if a slot of the settings treats layers differently."""
    blocks = list(blocks) if s.optim.muon and s.optim.muon.fading_decay else []
    for i, block in enumerate(blocks):
        for p in block.parameters():
            p.views = replace(p.views, depth=i / len(blocks))


# settings.optim.NorMuon -> variance_axis of a matrix (outputs, inputs)
PER_CHANNEL = {"output": -1, "input": -2, "mixed": None}


def qkvo(s: Settings) -> Views:
    """Views of q, k, v, o in one parameter (4, D, D).

    For Muon q, k, v are one matrix (3D, D), unless optim.muon.split_qkv.
    """
    muon = s.optim.muon
    pieces = (("qkv", 0, 3), ("o", 3, 4))
    if muon is None or muon.split_qkv:
        pieces = (("q", 0, 1), ("k", 1, 2), ("v", 2, 3), ("o", 3, 4))
    return Views(
        pieces, variance_axis=PER_CHANNEL[muon.normuon.attn] if muon and muon.normuon else -1,
        whole=bool(muon and muon.tells_apart())
    )


def qk(s: Settings) -> Views:
    """Views of q and k in one parameter (2, H K, D), apart from v and o.

    With optim.muon.head_pairs each pair of adjacent heads is one matrix (2K, D). Its statistics per neuron
    are those of the wider side.
    """
    muon = s.optim.muon
    if muon is None or not muon.head_pairs:
        return replace(qkvo(s), pieces=(("q", 0, 1), ("k", 1, 2)))
    rows = 2 * query_dim(s)
    return Views(variance_axis=-1 if rows >= s.model.model_dim else -2, rows=rows, name="qk")


def v(s: Settings) -> Views:
    """Views of v (D, D), apart from q and k."""
    return Views(variance_axis=qkvo(s).variance_axis, name="v")


def o(s: Settings) -> Views:
    """Views of o (D, D), apart from q and k. Record 90 stores it as (inputs, outputs)."""
    normuon = s.optim.muon and s.optim.muon.normuon
    return Views(variance_axis=-2 if normuon and normuon.o_input else qkvo(s).variance_axis, name="o")


def c_fc(s: Settings) -> Views:
    """Views of the first matrix of an MLP (F, D), which record 27 stores as (D, F)."""
    return Views(orientation="out_in" if s.optim.muon is None else s.optim.muon.c_fc_orientation, name="c_fc")


def c_proj(s: Settings) -> Views:
    """Views of the second matrix of an MLP (D, F); its neurons are its columns, the hidden units."""
    return Views(variance_axis=-2, name="c_proj")


def gate(s: Settings) -> Views:
    """Views of a gate (outputs, channels)."""
    normuon = s.optim.muon and s.optim.muon.normuon
    return Views(variance_axis=PER_CHANNEL[normuon.gates] if normuon else -1)
