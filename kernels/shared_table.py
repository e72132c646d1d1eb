"""A table whose rows are shared out over processes: rows are looked up by all-to-all, and their gradients go
back the same way.

Process r of W holds rows r n to (r + 1) n - 1 of a table of W n rows. This is how the original of record 92
holds its 84.6 million rows on eight GPUs, and how recommender models hold embeddings (Naumov et al., arXiv
1906.00091).
"""

from collections.abc import Callable

import torch
import torch.distributed as dist


def owners(ids: torch.Tensor, rows: int, table: int, world: int) -> tuple[list[int], list[int]]:
    """How many of these rows each process holds, and how many of its own each process wants of this one.

    ids: (K,) int64, growing; numbers of `table` and more are nobody's. rows: of each process. The host waits.
    """
    borders = torch.arange(world + 1, device=ids.device) * rows
    counts = torch.searchsorted(ids, borders.clamp(max=table)).diff()
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts)
    return counts.tolist(), theirs.tolist()


def exchanged(x: torch.Tensor, sent: list[int], got: list[int]) -> torch.Tensor:
    """All-to-all of rows (K, D) of any dtype: sends sent[i] of them, in order, to process i, gets got[i]."""
    out = x.new_empty(sum(got), *x.shape[1:])
    dist.all_to_all_single(as_bytes(out), as_bytes(x.contiguous()), got, sent)
    return out


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as bytes, along its last dimension: every dtype, every bit."""
    return x.view(torch.uint8)


class LookUp(torch.autograd.Function):
    """See look_up."""

    @staticmethod
    def forward(ctx, table, ids, rank, world, take):
        ctx.take = take
        rows, ctx.slots = torch.unique(ids, return_inverse=True)  # each row travels once
        sent, got = owners(rows, len(table), world * len(table), world)
        asked = exchanged(rows[:, None], sent, got)[:, 0] - rank * len(table)
        ctx.asked, ctx.sent, ctx.got = asked, sent, got
        return exchanged(table.index_select(0, asked), got, sent)[ctx.slots]

    @staticmethod
    def backward(ctx, g):
        summed = torch.ops.aten.embedding_dense_backward(g, ctx.slots, sum(ctx.sent), -1, False)
        ctx.take(ctx.asked, exchanged(summed, ctx.sent, ctx.got), ctx.got)
        return None, None, None, None, None


def look_up(
    table: torch.Tensor, ids: torch.Tensor, rank: int, world: int,
    take: Callable[[torch.Tensor, torch.Tensor, list[int]], None]
) -> torch.Tensor:
    """Rows (..., D) of a table, of which this process holds `table` (n, D), for ids (...) int64. Collective.

    take: called by the backward pass, which is collective too, with the gradients of this process's rows:
        their numbers (K,) from 0, values (K, D) in the table's dtype, and how many of them come from each
        process, in rank order. A row occurs once for each process that has looked it up. The table itself
        gets no gradient.
    """
    return LookUp.apply(table, ids, rank, world, take)


PIECE_BYTES = 64 * 2 ** 20  # of a process's share that are gathered at once


def gathered(share: torch.Tensor, world: int) -> torch.Tensor:
    """(world n, ...) in the host's memory, from the processes' parts (n, ...). Collective.

    In pieces, because the whole of record 92's table is larger than the memory of a GPU.
    """
    out = share.new_empty(world, *share.shape, device="cpu")
    many = max(1, PIECE_BYTES // max(1, share[:1].nbytes))
    for start, piece in zip(range(0, len(share), many), share.split(many)):
        parts = [torch.empty_like(piece) for _ in range(world)]
        dist.all_gather(parts, piece.contiguous())
        for whole, part in zip(out, parts):
            whole[start:start + many].copy_(part)
    return out.flatten(0, 1)
