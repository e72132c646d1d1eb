"""How an update rule may look at a parameter. How the numbers are stored never enters the mathematics."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Views:
    """What a parameter declares about its matrices, for rules like Muon.

    pieces: (name, start, stop) of each matrix along dim 0 of a parameter (P, rows, cols); (): the parameter
    is one matrix
        (rows, cols), or a stack of independent ones. A piece of several slices is one matrix of (stop -
        start) rows rows.
    orientation: whether (rows, cols) of a stored matrix are (outputs, inputs), for factors that depend on the
    shape.
    variance_axis: axis of a matrix that statistics per neuron average over.
    """
    pieces: tuple[tuple[str, int, int], ...] = ()
    orientation: Literal["out_in", "in_out"] = "out_in"
    variance_axis: int = -1

    @property
    def joined(self) -> bool:
        """Whether some matrix consists of several slices of the parameter."""
        return any(stop - start > 1 for _, start, stop in self.pieces)

    def unit(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what is updated as a whole: the parameter if its slices are joined, otherwise one
        matrix."""
        return tuple(shape) if self.joined else tuple(shape[-2:])

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

    def shape(self, matrix: torch.Tensor) -> tuple[int, int]:
        """(outputs, inputs) of a stored matrix (..., rows, cols)."""
        rows, cols = matrix.shape[-2:]
        return (rows, cols) if self.orientation == "out_in" else (cols, rows)


def qkvo(s) -> Views:
    """Of q, k, v, o in one parameter (4, D, D): for Muon q, k, v are one matrix (3D, D), unless
    optim.muon.split_qkv."""
    if s.optim.muon is None or s.optim.muon.split_qkv:
        return Views(pieces=(("q", 0, 1), ("k", 1, 2), ("v", 2, 3), ("o", 3, 4)))
    return Views(pieces=(("qkv", 0, 3), ("o", 3, 4)))


def c_fc(s) -> Views:
    """Of the first matrix of an MLP (F, D), which record 27 stores as (D, F)."""
    return Views(orientation="out_in" if s.optim.muon is None else s.optim.muon.c_fc_orientation)
