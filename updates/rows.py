"""The gradient of a table as the rows that were looked up, in place of a tensor of the table's size.

A step looks up one or two rows per token, some hundred thousand in all; record 92's table has 84.6 million.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Rows:
    """A gradient of a table (N, D) that is zero in all rows but these.

    Which rows are looked up depends on the data, their room K does not: the tensors have the same shape in
    every step, and nothing waits for the device.

    ids: (K,) int64, numbers of different rows, growing. Slots without a row are the last ones; they hold N.
    values: (K, D); zeros in slots without a row.
    table: N.
    """
    ids: torch.Tensor
    values: torch.Tensor
    table: int

    @classmethod
    def looked_up(cls, gradient: torch.Tensor) -> Rows:
        """From autograd's sparse gradient (N, D), which has each row as often as it was looked up.

        The sum over a row's look-ups has the bits that the dense gradient would have.
        """
        ids, values = gradient._indices()[0], gradient._values()
        slots, ids = slots_of(ids, gradient.size(0))
        summed = torch.ops.aten.embedding_dense_backward(values, slots, len(ids), -1, False)
        return cls(ids, summed, gradient.size(0))

    @classmethod
    def none(cls, like: torch.Tensor) -> Rows:
        """The gradient of a table (N, D) of which no row was looked up."""
        return cls(torch.empty(0, dtype=torch.int64, device=like.device), like[:0].detach(), len(like))

    def __add__(self, other: Rows) -> Rows:
        """In the dtype of both, as tensors are added."""
        return total((self, other), self.dtype)

    def __truediv__(self, number: float) -> Rows:
        return Rows(self.ids, self.values / number, self.table)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.values.nbytes

    def mul_(self, factor: torch.Tensor) -> None:
        """Multiply by a number."""
        self.values.mul_(factor)

    def dense_(self, out: torch.Tensor) -> torch.Tensor:
        """Fill out (at least N, D) with this gradient and return it."""
        out.zero_()
        if len(self.ids):  # slots without a row add their zeros to the last one
            out.index_add_(0, self.ids.clamp(max=self.table - 1), self.values)
        return out

    def pieces(self, size: int) -> list[Rows]:
        """These rows in pieces of at most `size` slots, as views."""
        return [Rows(ids, values, self.table)
                for ids, values in zip(self.ids.split(size), self.values.split(size))]

    def repeated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, values) with a row of the table in every slot, for an update that writes all of them.

        Slots without a row repeat the last row, so that all that write it write the same. If there is none,
        they take the table's last row with a gradient of zero.
        """
        rows = (self.ids < self.table).sum()
        slots = torch.arange(len(self.ids), device=self.ids.device).clamp(max=(rows - 1).clamp(min=0))
        return self.ids[slots].clamp(max=self.table - 1), self.values[slots]


def slots_of(ids: torch.Tensor, table: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(slot of each entry, row of each slot) of entries with these rows, in any order and more than once."""
    rows, order = ids.sort(stable=True)
    starts = torch.ones_like(rows)  # 1 where a new row begins
    starts[1:] = rows[1:] != rows[:-1]
    slot = starts.cumsum(0) - 1
    found = rows.new_full((min(len(ids), table + 1),), table).scatter_(0, slot, rows)
    return torch.empty_like(order).scatter_(0, order, slot), found


def total(parts: Sequence[Rows], dtype: torch.dtype | None = None) -> Rows:
    """The sum of gradients of one table, each row's in the order of the parts.

    dtype: of the sum; None: float32, or that of the parts if it is wider. A single part is returned as it is.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    wide = dtype or torch.promote_types(first.dtype, torch.float32)
    slots, ids = slots_of(torch.cat([part.ids for part in parts]), first.table)
    values = first.values.new_zeros((len(ids), first.values.size(1)), dtype=wide)
    for part, own in zip(parts, slots.split([len(part.ids) for part in parts])):
        values.index_add_(0, own, part.values.to(wide))
    return Rows(ids, values, first.table)
