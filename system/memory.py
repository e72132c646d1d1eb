"""An estimate of the memory of a training step, and the choices that make a step fit on a GPU.

Tensors without values (device meta) are counted.

    estimate(s, ranks=8, microbatch=1)      -> Estimate, in bytes: exact for parameters, gradients, state and
                                               what an eager forward pass keeps; a compiled one by a rule
    fit(s, ranks, capacity)                 -> the settings with whatever `system` left open chosen so that it
                                               fits
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import schedule
from common.errors import UserError
from schedule import Shape
from settings import Settings
from settings.model import padded_vocab, query_dim
from settings.system import recomputable
from system.microbatch import ranks_per_microbatch
from updates.adam import TABLE_CHUNK

if TYPE_CHECKING:
    from optim import RowBank

FEW_ROWS, LARGEST_TABLE = 1024, 2**31 - 2  # rows of a bigram table
SHARE = 0.9  # of a GPU's memory that an estimate may take: the allocator and the libraries need some


class Estimate(NamedTuple):
    """Bytes on one device."""
    parameters: int
    # bfloat16 ones also in float32, if there are several forwards; and what a process gets of their sum
    gradients: int
    state: int  # of the optimizer and of hooks, and the table of a canonical mask
    kept: int  # by a forward pass for the backward pass
    passing: int  # largest that comes and goes next to it: of the logits, a chunk of them, or a block

    @property
    def total(self) -> int:
        return sum(self)


def report(s: Settings, estimate: Estimate) -> dict[str, Any]:
    """What the log says: MiB of each part, and the choices that it was made for."""
    sizes = {
        name: round(value / 2**20) for name, value in {**estimate._asdict(), "total": estimate.total}.items()
    }
    return {"mib": sizes, "ranks_per_microbatch": s.system.ranks_per_microbatch,
            "loss": s.system.kernels.loss, "activation_checkpoint": s.system.activation_checkpoint}


class Kept:
    """Context that counts the bytes autograd keeps for the backward pass, apart from the `known` tensors."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        self.known, self.storages, self.shapes = {t.untyped_storage()._cdata for t in known}, {}, {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage  # held, so that no other one gets its place
            self.shapes[storage._cdata] = tensor.itemsize, tensor.numel()
        return tensor

    def __enter__(self) -> "Kept":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)

    def bytes(self, widest: int = 8, largest: float = math.inf) -> int:
        """Of the tensors that have fewer than `largest` numbers, of at most `widest` bytes each."""
        chosen = (key for key, (width, numel) in self.shapes.items() if width <= widest and numel < largest)
        return sum(self.storages[key].nbytes() for key in chosen)


def heaviest(s: Settings) -> list[Shape]:
    """The Shapes of steps of which one takes most memory: those with most tokens, and with a sampled softmax
    also those with more classes than any of as many tokens."""
    largest = schedule.largest_shape(s)
    if s.model.head.candidates is None:
        return [largest]
    shapes = schedule.shapes(schedule.plan(s))

    def worse(a, b):
        return a != b and a.tokens_per_rank >= b.tokens_per_rank and classes(s, a) >= classes(s, b)

    kinds = {(shape.tokens_per_rank, classes(s, shape)): shape for shape in shapes}
    return [b for b in kinds.values() if not any(worse(a, b) for a in kinds.values())]


def classes(s: Settings, shape: Shape) -> int:
    """Classes of the softmax in steps of this Shape."""
    return shape.candidates or padded_vocab(s)


def kept_by_forward(
    s: Settings, microbatch: int, compiled: bool = False, shape: Shape | None = None
) -> int:
    """Bytes that the forward pass of `microbatch` logical ranks keeps for the backward pass.

    shape: of the step; None: that with most tokens. compiled: whether torch.compile has made the graph; its
    bytes are counted by a rule.

    The rule: Inductor keeps what matrix products and attention read or made, in 16 bits, and computes the
    rest again: norms, rotations and float32 copies. Autograd keeps no block's output, which is only added to
    the stream; Inductor keeps it, in the stream's dtype, to get the stream back. It keeps queries and keys
    before and after a norm that follows their rotation, and those of latent attention, which are no view of
    what else is kept. The logits are not in it: estimate() counts them with their gradient.
    tests/nullcuda/table.md has estimates next to the allocator's peaks.
    """
    from layers.primitives import dtype
    from model import without_values
    model = without_values(with_system(s, expert_parallel=False))
    shape = shape or schedule.largest_shape(s)
    rows = microbatch * shape.tokens_per_rank // shape.seq_len
    tokens = torch.empty(rows, shape.seq_len, dtype=torch.long, device="meta")  # (R, T)
    model.update_yarn(shape.windows)
    context = model.context(tokens, 0, shape.windows, tokens_per_rank=shape.tokens_per_rank)
    weights = torch.empty(shape.targets, device="meta") if s.model.head.mtp else None
    with Kept(model.parameters()) as kept:
        prefix, prefix_weight = None, None
        if shape.prefix:
            prefix, prefix_weight = torch.empty_like(tokens), torch.empty(1, device="meta")
        candidates = None
        if shape.candidates:
            candidates = torch.empty(microbatch, shape.candidates, dtype=torch.long, device="meta")
        model(tokens, torch.empty_like(tokens), context, target_weights=weights, prefix=prefix,
              prefix_weight=prefix_weight, candidates=candidates).mean()
    if not compiled or dtype(s.numerics.matmul).itemsize > 2:
        return kept.bytes()
    stream = tokens.numel() * s.model.model_dim
    attending = sum(block.attn is not None for block in model.blocks)
    outputs = attending + sum(block.mlp is not None for block in model.blocks)
    rest = outputs * stream * dtype(s.numerics.residual).itemsize
    norm, latent = s.model.attn.qk_norm, s.model.attn.latent is not None
    if norm and (latent or norm.order == "after_rope") and s.system.kernels.qk != "triton":
        heads = attending * s.model.attn.num_heads
        rest += 2 * heads * query_dim(s) * tokens.numel() * dtype(s.numerics.matmul).itemsize
    together = 1 if shape.candidates else rows  # each rank has its own candidates
    return kept.bytes(widest=2, largest=together * shape.seq_len * classes(s, shape)) + rest


def passing_in_head(s: Settings, tokens: int, compiled: bool = False, number: int | None = None) -> int:
    """Bytes that come and go in the backward pass of the head and loss of `tokens` tokens, on a GPU.

    They are counted beyond what the forward pass keeps; what an operation has used by then makes room. Of
    each logit, m bytes are in the product's dtype, c in that of the soft cap and of_loss in that of the loss.
    number: of classes; None: all.
    """
    from layers.primitives import dtype
    n, head = s.numerics, s.model.head
    number = number or padded_vocab(s)
    logits, m, of_loss = tokens * number, logits_bytes(s, compiled), dtype(n.loss).itemsize
    if chunked(s):
        return passing_in_chunks(s, tokens, number)
    in_place = head.softcap is None or head.softcap.form == "rsqrt"
    if compiled and in_place and head.logit_scale == "one" and not n.fp8_head:
        return logits * m  # the gradient takes the place of the logits
    if compiled:  # one kernel, from the logits of the product to the gradient that it takes
        own = 2 if n.fp8_head else m + m * head.bias  # in FP8 its transpose too; a bias sums a copy of it
        return logits * (m + own)
    if head.mtp:  # gradients of the sum over classes and of the target, what joins them, and the sum
        return 4 * logits * max(of_loss, torch.float32.itemsize)
    # of the log-softmax, which keeps its result: the gradient it reads and writes
    moments, kept = [2 * of_loss], of_loss
    if head.softcap or head.logit_scale != "one":
        c = max(m, dtype(n.softcap).itemsize)
        rounded = n.softcap_sigmoid != "unrounded"  # its sigmoid is kept in 16 bits, and is read in c
        moments.append((3 if rounded else 2) * c - kept)
        kept += (2 if rounded else c) if head.softcap else 0  # its sigmoid or tanh
    if n.fp8_head:  # the gradient, that in float32, and that times its factor or clamped
        moments.append(m + 2 * torch.float32.itemsize - kept)
    return logits * max(moments)


def logits_bytes(s: Settings, compiled: bool = False) -> int:
    """Bytes of a logit as the head's product leaves it. compiled: what reads it is joined with its cast."""
    from layers.primitives import dtype, products_dtype
    if s.numerics.fp8_head and s.numerics.fp8_head.logits == "e4m3":
        return 1 if compiled else torch.float32.itemsize
    return (products_dtype(s) or dtype(s.numerics.matmul)).itemsize


def passing_in_chunks(s: Settings, tokens: int, number: int) -> int:
    """passing_in_head of a loss in chunks: of the largest chunk, and the gradients of stream and weight."""
    from kernels.cross_entropy import chunks
    from layers.primitives import dtype, products_dtype
    m, d = logits_bytes(s), s.model.model_dim
    first = chunks(tokens, number, torch.device("cuda"), 0)[0]
    logits, weight = (first.stop - first.start) * number, 4 * number * d  # the weight's gradient is float32
    if s.system.kernels.loss != "triton":
        passing = 3 * 4 * logits + weight  # three of a chunk, in float32
    elif s.numerics.fp8_head:  # logits and gradient in bytes; then this, its transpose, a chunk's term
        passing = max((m + 1) * logits + weight, 2 * logits + 2 * weight)
    else:
        passing = m * logits + 2 * weight  # the gradient takes the logits' place
    return passing + tokens * d * (products_dtype(s) or dtype(s.numerics.matmul)).itemsize


def estimate(s: Settings, ranks: int, microbatch: int, world: int = 1) -> Estimate:
    """The Estimate of a training step on one device.

    ranks: logical ranks of this process, of which `microbatch` go through a forward. world: processes.
    """
    from model import without_values
    from optim import Optimizer
    from system.comm import communication
    from system.hooks import hooks_of
    from system.seams import shape
    from system.workers import copies_bytes
    from system.wrappers import Outer
    model = without_values(with_own_rows(s, world))
    optimizer = Optimizer(model, s, communication(s, 0, world))
    hooks = sum(t.nbytes for hook in hooks_of(model) for t in hook.tensors().values())
    parameters = sum(bank.param.nbytes for bank in optimizer.banks)
    tables = [bank for bank in optimizer.banks if bank.has_rows]
    dense = [bank for bank in optimizer.banks if not bank.has_rows]
    held = {bank: 2 * bank.grad.nbytes if bank.grad.dtype == torch.bfloat16 and microbatch < ranks else 0
            for bank in dense}
    gradients = sum(bank.grad.nbytes for bank in dense) + sum(held.values()) + sum(
        (held[bank] or bank.grad.nbytes) // world for bank in dense if bank.comm.name == "reduce-scatter")
    gradients += sum(rows_held(bank, ranks, microbatch, bank.units) for bank in tables)
    compiled = s.system.compile == "on" or (s.system.compile == "auto" and s.system.device != "cpu")
    # a forward pass keeps no table
    alike = s if s.model.embed.bigram is None else with_own_rows(with_rows(s, FEW_ROWS), 1)
    kept, passing = max((moment(alike, shape, microbatch, compiled) for shape in heaviest(s)), key=sum)
    # an update needs room when a forward pass keeps nothing any more
    rows = sum(rows_passing(bank, ranks, microbatch, bank.units) for bank in tables)
    passing = max(passing, rows - kept)
    state = optimizer.state_bytes() + hooks
    if s.validation.canonical_mask:
        state += math.prod(shape(s))
    if schedule.apart(s):
        state += copies_bytes(optimizer, Outer(model, s.optim.outer), ranks)
    return Estimate(parameters, gradients, state, kept, passing)


def rows_held(bank: "RowBank", ranks: int, microbatch: int, table: int) -> int:
    """Bytes that an optim.RowBank holds of the gradient of a table of so many rows between two updates.

    They are the rows of each forward pass, or their sum if that is less and, for a rule that moves every row,
    a dense gradient of the shard.
    """
    forwards, rows = bank.steps * ranks // microbatch, min(microbatch * bank.rows_per_rank, table + 1)
    held = bank.row_bytes(forwards * rows)
    if forwards * rows > 2 * table:
        held = min(held, bank.row_bytes(table + 1, summed=True) + bank.row_bytes(rows))
    if bank.by_rows:
        return held
    width = max(4 if forwards > 1 else 0, bank.param.itemsize)
    return held + math.ceil(table / bank.comm.shards) * bank.param.size(-1) * width


def rows_passing(bank: "RowBank", ranks: int, microbatch: int, table: int) -> int:
    """Bytes that come and go when an optim.RowBank sums its rows and updates them."""
    forwards, world = bank.steps * ranks // microbatch, bank.comm.world
    mine = min(bank.steps * ranks * bank.rows_per_rank, table + 1)
    alike = bank.comm.splits_members  # rows come from all processes, as many as this one looks up
    every = min(mine if alike else world * mine, table + 1)
    passing = bank.row_bytes(mine, summed=True) if forwards > 1 else 0
    if world > 1:  # what others send, and the sum of all
        received = world * mine if bank.by_rows and not alike else mine
        passing += bank.row_bytes(received, forwards > 1)
        passing += bank.row_bytes(every, summed=True) // bank.comm.shards
    if bank.by_rows:  # mean squares of the table, and of a piece what the rule makes
        piece = min(every, TABLE_CHUNK // bank.param.size(-1)) * bank.param.size(-1)
        passing += 4 * table + 4 * 4 * piece
    return passing


@functools.lru_cache(maxsize=64)
def moment(s: Settings, shape: Shape, microbatch: int, compiled: bool) -> tuple[int, int]:
    """(kept, passing) of an Estimate in steps of this Shape."""
    passing = passing_in_head(s, microbatch * shape.tokens_per_rank, compiled, classes(s, shape))
    kept = kept_by_forward(s, microbatch, compiled, shape)
    if s.system.activation_checkpoint == "on":  # one block at a time is there in full
        whole = kept_by_forward(with_system(s, activation_checkpoint="off"), microbatch, compiled, shape)
        passing = max(passing, (whole - kept) // s.model.num_layers)
    return kept, passing


def chunked(s: Settings) -> bool:
    """Whether the loss works in chunks, so that the logits never exist in full."""
    return s.system.kernels.loss in ("chunks", "triton")


def with_system(s: Settings, **changes: Any) -> Settings:
    """Settings with some `system` fields replaced."""
    return dataclasses.replace(s, system=dataclasses.replace(s.system, **changes))


def fit(s: Settings, ranks: int, capacity: int, world: int = 1) -> tuple[Settings, Estimate]:
    """(settings, Estimate): the open choices of `system`, made so that SHARE of `capacity` bytes suffices.

    In the order of their cost in time: fewer logical ranks per forward, loss in chunks, activation
    checkpointing. If nothing suffices, all of them.
    """
    system, microbatch = s.system, ranks_per_microbatch(s, ranks, cuda=True)
    sizes = [microbatch]
    while not system.ranks_per_microbatch and sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    options = [dict(ranks_per_microbatch=n) for n in sizes]
    if system.kernels.loss == "auto":
        options.append({**options[-1], "kernels": dataclasses.replace(system.kernels, loss="chunks")})
    if system.activation_checkpoint == "auto" and recomputable(s):
        options.append({**options[-1], "activation_checkpoint": "on"})
    for changes in options:
        fitted = with_system(s, **changes)
        found = estimate(fitted, ranks, changes["ranks_per_microbatch"], world)
        if found.total <= SHARE * capacity:
            break
    return fitted, found


def with_rows(s: Settings, rows: int) -> Settings:
    """Settings with a bigram table of so many rows."""
    bigram = dataclasses.replace(s.model.embed.bigram, rows=rows)
    embed = dataclasses.replace(s.model.embed, bigram=bigram)
    return dataclasses.replace(s, model=dataclasses.replace(s.model, embed=embed))


def with_own_rows(s: Settings, world: int) -> Settings:
    """Settings of a model whose whole table is the rows that each of `world` processes holds."""
    if not s.system.table_parallel:
        return s
    return with_rows(with_system(s, table_parallel=False), s.model.embed.bigram.rows // world)


def largest_table(
    s: Settings, ranks: int, capacity: int, world: int = 1
) -> tuple[int, Estimate] | None:
    """(rows, Estimate) of the largest bigram table with which a step fits; an even number of rows, 0: none.

    None if the settings have no table whose gradient is kept as rows.
    """
    from model import without_values
    from optim import Optimizer
    from system.comm import communication
    if s.model.embed.bigram is None:
        return None
    fitted, found = fit(with_rows(s, FEW_ROWS), ranks, capacity, world)
    microbatch = fitted.system.ranks_per_microbatch
    model = without_values(with_own_rows(fitted, world))
    optimizer = Optimizer(model, fitted, communication(fitted, 0, world))
    banks = [bank for bank in optimizer.banks if bank.has_rows]
    if not banks:
        return None
    bank, = banks
    processes = world if bank.comm.splits_members else 1

    def total(rows):
        """Bytes of the table's part of a step, and of what passes by, with so many rows on a process."""
        shard = math.ceil(rows / bank.comm.shards)
        own = rows * bank.param[0].nbytes + shard * sum(x[0].nbytes for x in bank.state.values())
        own += rows_held(bank, ranks, microbatch, rows)
        return own + max(found.passing, rows_passing(bank, ranks, microbatch, rows) - found.kept)

    room = SHARE * capacity - (found.total - total(FEW_ROWS // processes))
    low, high = 0, LARGEST_TABLE // 2 // processes  # pairs of rows
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if total(2 * middle) <= room else (low, middle - 1)
    rows = 2 * low * processes
    return rows, estimate(with_rows(fitted, max(rows, 2 * processes)), ranks, microbatch, world)


@contextlib.contextmanager
def exhaustion_in_one_line() -> Iterator[None]:
    """Decorator that turns out-of-memory exceptions of torch and numpy into a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError is a RuntimeError; the CPU's allocator has no own
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(
            error
        ):
            raise
        found = re.search("tried to allocate [0-9.]+ ?[A-Za-z]+", str(error))
        raise UserError(f"out of memory{f' ({found[0]})' if found else ''}: lower the sizes of the model or "
                        "the batch, choose a smaller --scale, or take a machine with more memory") from None
