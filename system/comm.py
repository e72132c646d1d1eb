"""Communication of a bank's gradients, updates and parameters between processes, apart from update rules.

    communication(s, rank, world)      -> the plan of a run, for optim.Optimizer

A plan gives each bank an object with the methods of optim.Local: shard, reduce, wait, gather.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from kernels import shared_table
from kernels.shared_table import as_bytes, owners
from optim import Alone, Local, Tree, together
from schedule import apart
from settings import Settings
from updates.rows import Rows

# torch 2.13 renamed the single-tensor collectives; 2.11 knows only the old names
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

BUCKET_BYTES = 64 * 2 ** 20  # record 22's flat buffers; here slices of the banks, so nothing is copied


class Own(Local):
    """A bank of this process's experts (expert parallelism): no communication in a step."""
    name = "own"
    partial = splits_members = True

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world

    def whole(self, x: torch.Tensor, units: int) -> torch.Tensor:
        return gathered(x, self.world)


def gathered(x: torch.Tensor, world: int) -> torch.Tensor:
    """(world N, ...) from the processes' parts x (N, ...), as bytes: every dtype, every bit."""
    whole = x.new_empty((world * len(x), *x.shape[1:]))
    all_gather(whole.view(-1).view(torch.uint8), x.contiguous().view(-1).view(torch.uint8))
    return whole


class AllReduce(Local):
    """All-reduce: every process gets the whole gradient.

    shared: each process updates a shard, followed by an all-gather; otherwise each updates the whole bank.
    """
    name = "all-reduce"
    reduces = eager = True

    def __init__(self, rank: int, world: int, shared: bool) -> None:
        super().__init__()
        self.rank, self.world, self.shared = rank, world, shared
        self.shards = world if shared else 1
        if shared:
            self.name = f"{self.name}, update shared"

    def shard(self, x: torch.Tensor) -> torch.Tensor:
        return x.chunk(self.world)[self.rank] if self.shared else x

    def pieces(self, grad: torch.Tensor) -> Sequence[torch.Tensor]:
        return [grad.view(-1)]

    def reduce(self, grad: torch.Tensor) -> None:
        self.reduced = grad
        self.work = [
            dist.all_reduce(x, op=dist.ReduceOp.SUM, async_op=True) for x in self.pieces(grad) if x.numel()
        ]

    def wait(self, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for work in self.work:
            work.wait()
        return self.shard(self.reduced), self.reduced

    def whole(self, x: torch.Tensor, units: int) -> torch.Tensor:
        return gathered(x, self.world) if self.shared else x

    def gather(self, param: torch.Tensor) -> dist.Work | None:
        if not self.shared:
            return None
        mine = self.shard(param)  # NCCL gathers in place
        return all_gather(param, mine if mine.is_cuda else mine.clone(), async_op=True)


class Bucketed(AllReduce):
    """All-reduce after the backward pass in buckets of BUCKET_BYTES (record 22)."""
    name = "bucketed all-reduce"
    eager = False

    def pieces(self, grad: torch.Tensor) -> Sequence[torch.Tensor]:
        return grad.view(-1).split(BUCKET_BYTES // grad.element_size())


class ReduceScatter(AllReduce):
    """Reduce-scatter, update of this process's shard, all-gather: ZeRO (record 24)."""
    name = "reduce-scatter"
    partial = True

    def __init__(self, rank: int, world: int, start: str = "ready") -> None:
        """start: when the reduction starts.

        ready: when the gradient is ready. after: after the backward pass. late: after the updates of the
        banks that are not late.
        """
        super().__init__(rank, world, shared=True)
        self.name = "reduce-scatter" if start == "ready" else f"reduce-scatter, {start}"
        self.eager, self.late = start == "ready", start == "late"
        self.reduced = None

    def reduce(self, grad: torch.Tensor) -> None:
        if self.reduced is None:
            self.reduced = grad.new_empty((len(grad) // self.world, *grad.shape[1:]))
        self.work = [reduce_scatter(self.reduced, grad, op=dist.ReduceOp.SUM, async_op=True)]

    def wait(self, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for work in self.work:
            work.wait()
        return self.reduced, self.reduced


class UpdatesAllReduced(AllReduce):
    """Record 6: each process computes the updates of every world-th unit, and updates are all-reduced."""
    name = "updates all-reduced"
    sends_updates = True

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(rank, world, shared=False)

    def shard(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.rank::self.world]

    def whole(self, x: torch.Tensor, units: int) -> torch.Tensor:
        # shards may differ by one unit; bytes, because no other process adds to one
        whole = x.new_zeros((units, *x.shape[1:]))
        self.shard(whole).copy_(x)
        dist.all_reduce(whole.view(-1).view(torch.uint8))
        return whole

    def spread(self, update: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Updates of this process's units -> updates of all units. like: a bank-shaped tensor."""
        whole = torch.zeros_like(like, dtype=update.dtype)
        self.shard(whole).copy_(update)
        dist.all_reduce(whole)
        return whole


class Ordered(AllReduce):
    """Sums the processes' local trees in one tree by rank: equal bits on 1, 2, 4 and 8 processes."""
    name = "ordered tree"
    reduces = eager = False

    def wait(self, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tree = Tree()
        parts = [torch.empty_like(grad) for _ in range(self.world)]
        dist.all_gather(parts, grad.contiguous())
        for part in parts:
            tree.push(part)
        return self.shard(tree.total()), tree.total()


# ----- tables whose gradient is the rows that were looked up

class EveryRow(Local):
    """All-gather of the processes' rows: every process gets all of them and updates its whole table."""
    name = "touched rows"
    reduces = True

    def __init__(self, rank: int, world: int, ordered: bool) -> None:
        super().__init__()
        self.rank, self.world, self.ordered = rank, world, ordered
        self.eager = not ordered

    def reduce(self, grad: Rows) -> None:
        """Start the all-gather. Every process looks up as many rows, so nothing has to be counted."""
        many, self.table = self.world * len(grad.ids), grad.table
        self.ids, self.values = grad.ids.new_empty(many), grad.values.new_empty(many, grad.values.size(1))
        pairs = ((self.ids, grad.ids), (self.values, grad.values)) if many else ()
        self.work = [all_gather(as_bytes(out), as_bytes(mine), async_op=True) for out, mine in pairs]

    def wait(self, grad: Rows) -> tuple[Rows, Rows]:
        for work in self.work:
            work.wait()
        parts = zip(self.ids.chunk(self.world), self.values.chunk(self.world))
        rows = together([Rows(ids, values, self.table) for ids, values in parts], self.ordered)
        return rows, rows


class OwnRows(ReduceScatter):
    """Each process updates an equal part of the table's rows and gets the gradients of these alone (record
    71). The sum is made in rank order, that of a reduce-scatter in an order of its own."""
    name = "touched rows to their owners"

    def __init__(self, rank: int, world: int, start: str, ordered: bool) -> None:
        super().__init__(rank, world, start)
        self.name, self.ordered = OwnRows.name, ordered
        self.eager = self.eager and not ordered

    def reduce(self, grad: Rows) -> None:
        """Start the exchange. The host waits for the numbers of rows, as in the original."""
        self.shard_rows = -(-grad.table // self.world)
        sent, self.got = owners(grad.ids, self.shard_rows, grad.table, self.world)
        many = sum(self.got)
        self.ids, self.values = grad.ids.new_empty(many), grad.values.new_empty(many, grad.values.size(1))
        self.work = [
            dist.all_to_all_single(
                as_bytes(out), as_bytes(mine[:sum(sent)]), self.got, sent, async_op=True
            ) for out, mine in ((self.ids[:, None], grad.ids[:, None]), (self.values, grad.values))
        ]

    def wait(self, grad: Rows) -> tuple[Rows, Rows]:
        for work in self.work:
            work.wait()
        first, parts = self.rank * self.shard_rows, zip(self.ids.split(self.got), self.values.split(self.got))
        rows = together([Rows(ids - first, values, self.shard_rows) for ids, values in parts], self.ordered)
        return rows, rows


class SharedTable(Own):
    """A table of which each process holds a share of the rows (kernels/shared_table.py): their gradients come
    in the backward pass already."""
    name = "rows of this process"

    def whole(self, x: torch.Tensor, units: int) -> torch.Tensor:
        return shared_table.gathered(x, self.world)


# Plans with sharded updates -> when the reductions of Muon start; those of AdamW when a gradient is ready.
MUON_STARTS = {"sharded": "ready", "adam_hooks": "late", "interleaved": "after"}


class Communication:
    """The plan of a run on several processes. name: system.comm, with `auto` decided."""

    def __init__(self, s: Settings, rank: int, world: int) -> None:
        self.name = "sharded" if s.system.comm == "auto" else s.system.comm
        self.ordered = s.system.reduction == "ordered"
        self.rank, self.world = rank, world
        self.keeps_experts, self.shares_tables = s.system.expert_parallel, s.system.table_parallel
        self.gathers_last = self.name == "interleaved"

    def of(self, shared: bool, experts: bool, small: bool = False) -> Local:
        """The communication of one bank.

        shared: the rule is expensive, so each process updates a share. experts: the bank holds experts.
        small: the bank is too small to shard (record 52).
        """
        here = (self.rank, self.world)
        if experts and self.keeps_experts:
            return Own(*here)
        sharded = self.name in MUON_STARTS and not small
        if self.ordered:
            return Ordered(*here, shared or sharded)
        if sharded:
            return ReduceScatter(*here, MUON_STARTS[self.name] if shared else "ready")
        if small:
            return AllReduce(*here, shared=False)
        if self.name == "allreduce_updates":
            return UpdatesAllReduced(*here) if shared else AllReduce(*here, shared=False)
        return (Bucketed if self.name == "bucketed" else AllReduce)(*here, shared)

    def of_rows(self, by_rows: bool) -> Local:
        """The communication of a table whose gradient is the rows that were looked up.

        by_rows: its rule moves no other rows, so that every process can make the whole update.
        """
        if self.shares_tables:
            return SharedTable(self.rank, self.world)
        if by_rows or self.name not in MUON_STARTS:
            return EveryRow(self.rank, self.world, self.ordered)
        return OwnRows(self.rank, self.world, "ready", self.ordered)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the processes, in place."""
        dist.all_reduce(x)
        return x


def communication(s: Settings, rank: int = 0, world: int = 1) -> Communication | Alone:
    """The communication plan of a run: Alone on one process, otherwise by system.comm.

    Workers that train apart (system/workers.py) exchange no gradients.
    """
    return Communication(s, rank, world) if world > 1 and not apart(s) else Alone()
