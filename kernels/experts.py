"""Linear layers of many experts on the rows routed to them, none dropped (MegaBlocks, arXiv 2211.15841).

    p = plan(index, experts, backend)              index (N, k): the experts of each token
    rows = gather(x, p)                            (P, D), rows sorted by expert
    rows = grouped_linear(rows, weight, p)         weight (E, out, in)
    y = combine(rows, gates, p)                    gates (N, k) -> (N, out), sum over the k rows of a token

Each row is read and written at a known place, forward and backward. Only the gradients of a weight's copies,
in `padded` on CUDA, are added atomically.

Backends: `grouped`, torch.nn.functional.grouped_mm (one kernel on Hopper and Blackwell in bfloat16, a loop
over experts elsewhere). `padded`, blocks of rows of one expert, each against a copy of its weight: static
shapes, any dtype, compiles everywhere. In exact arithmetic a row's result depends on no other row. In
`padded` it keeps every bit whatever the other rows are; in `grouped` its rounding may depend on its place and
on how many rows its expert has, later tokens' among them: the loop on a CPU sums products of other sizes in
another order, and an earlier loss moves by up to 1e-6 in float32. What must not move by a bit, as `records
audit` demands, runs with `padded`.

With expert parallelism `exchange` carries rows to the process that has their expert, and back (GShard, arXiv
2006.16668).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from kernels.fp8_linear import LARGEST, quantise

E4M3 = torch.float8_e4m3fn
BACKENDS = ("grouped", "padded")
BLOCK = 64  # rows of a block of `padded`: fewer than this are wasted for each expert


class Plan(NamedTuple):
    """Where the rows of N tokens times k choices lie among the P places."""
    counts: torch.Tensor  # (E,) int64, rows of each expert
    source: torch.Tensor  # (P,) the token at each place; in padding, any
    places: torch.Tensor  # (N, k) the place of each choice
    choices: torch.Tensor  # (P,) the choice, of N k, at each place; in padding, any
    real: torch.Tensor | None  # (P,) 1 where there is a row, 0 in padding; None: no padding
    ends: torch.Tensor | None  # (E,) int32, where each expert's rows end (grouped)
    owner: torch.Tensor | None  # (P / BLOCK,) the expert of each block (padded)


def choose(
    requested: str, device: torch.device | str, dtype: torch.dtype, widths: tuple[int, int], compiled: bool
) -> str:
    """Name of the backend that runs. ValueError, one line, if the requested one cannot.

    widths: sizes of the weights' two dimensions.
    """
    why = refusal(torch.device(device), dtype, widths, compiled)
    if requested == "grouped" and why:
        raise ValueError(f"grouped_mm {why}; use padded")
    return "padded" if requested == "padded" or why else "grouped"


def refusal(device: torch.device, dtype: torch.dtype, widths: tuple[int, int], compiled: bool) -> str | None:
    """Why torch's grouped_mm cannot do it (the rest of a sentence), or None."""
    if dtype == torch.float64:
        return "has no float64"
    if any(w * dtype.itemsize % 16 for w in widths):
        return (
            f"needs rows of a multiple of 16 bytes, not {min(w for w in widths if w * dtype.itemsize % 16)} "
            f"x {dtype.itemsize}"
        )
    if compiled and dtype != torch.bfloat16:  # torch's shape function for it knows no other, on any device
        return f"cannot be compiled in {str(dtype).removeprefix('torch.')}"
    return None


def plan(index: torch.Tensor, experts: int, backend: str) -> Plan:
    """index: (N, k) int64, values below `experts`. Rows of one expert keep the order of their tokens."""
    flat, k = index.flatten(), index.size(1)
    order = flat.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    ends = counts.cumsum(0)
    rank = torch.empty_like(order)  # of each choice among the sorted rows
    rank[order] = torch.arange(len(flat), device=flat.device)
    if backend == "grouped":
        return Plan(counts, order // k, rank.view(index.shape), order, None, ends.to(torch.int32), None)
    blocks = -(-counts // BLOCK)
    last = blocks.cumsum(0)
    shift = (last - blocks) * BLOCK - (ends - counts)  # from the sorted to the padded place
    places = rank + shift[flat]
    # enough for every split: no shape depends on the data
    total = (len(flat) // BLOCK + experts) * BLOCK if len(flat) else 0
    choices = torch.zeros(total, dtype=torch.int64, device=flat.device)
    choices[places] = torch.arange(len(flat), device=flat.device)
    real = torch.zeros(total, device=flat.device)
    real[places] = 1.0
    owner = torch.searchsorted(
        last, torch.arange(total // BLOCK, device=flat.device), right=True
    ).clamp(max=experts - 1)
    return Plan(counts, choices // k, places.view(index.shape), choices, real, None, owner)


class Gather(torch.autograd.Function):
    """x[source]; the gradient of a token is the sum over its k places, read, not scattered."""

    @staticmethod
    def forward(ctx, x, source, places):
        ctx.save_for_backward(places)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, g):
        places, = ctx.saved_tensors
        return g.index_select(0, places.flatten()).unflatten(0, places.shape).sum(1), None, None


def gather(x: torch.Tensor, p: Plan) -> torch.Tensor:
    """x (N, D) -> (P, D)."""
    return Gather.apply(x, p.source, p.places)


class Combine(torch.autograd.Function):
    """Sum of the rows of each token's k experts, weighted by its gates; the gradient reads, not scatters."""

    @staticmethod
    def forward(ctx, rows, gates, source, places, choices, real):
        ctx.save_for_backward(rows, gates, source, places, choices, real)
        mine = rows.index_select(0, places.flatten()).unflatten(0, places.shape)
        return (mine * gates[..., None]).sum(1)

    @staticmethod
    def backward(ctx, g):
        rows, gates, source, places, choices, real = ctx.saved_tensors
        gate = gates.flatten().index_select(0, choices)
        if real is not None:  # padding gets no gradient
            gate = gate * real.to(gate.dtype)
        mine = rows.index_select(0, places.flatten()).unflatten(0, places.shape)
        return g.index_select(0, source) * gate[:, None], (mine * g[:, None]).sum(-1), None, None, None, None


def combine(rows: torch.Tensor, gates: torch.Tensor, p: Plan) -> torch.Tensor:
    """rows (P, D), gates (N, k) in one dtype -> (N, D)."""
    return Combine.apply(rows, gates, p.source, p.places, p.choices, p.real)


def grouped_linear(rows: torch.Tensor, weight: torch.Tensor, p: Plan) -> torch.Tensor:
    """rows (P, in) times the weight of each row's expert: weight (E, out, in) -> (P, out)."""
    weight = weight.to(rows.dtype)
    if p.owner is None:
        # without rows the result is still part of the graph: in the backward pass the other processes wait
        # for this one's exchange
        if rows.is_meta or not len(rows):
            return rows @ weight[0].mT
        return F.grouped_mm(rows, weight.mT, offs=p.ends)
    return torch.bmm(rows.unflatten(0, (-1, BLOCK)), weight.index_select(0, p.owner).mT).flatten(0, 1)


# ----- FP8 --------------------------------------------------------------------------------------------------

class Fake8(torch.autograd.Function):
    """x rounded to e4m3, each row scaled to a largest value of 448; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, x):
        scale = LARGEST[E4M3] / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12)
        return (quantise(x, scale, E4M3).float() / scale).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        return g


def fake_fp8(x: torch.Tensor) -> torch.Tensor:
    """x (..., n) rounded as in an FP8 product with row-wise scales, which _scaled_grouped_mm of torch has."""
    return Fake8.apply(x)


# ----- expert parallelism -----------------------------------------------------------------------------------

class Exchange(torch.autograd.Function):
    """dist.all_to_all_single with unequal counts; the backward pass sends the gradients back."""

    @staticmethod
    def forward(ctx, x, received, sent):
        ctx.received, ctx.sent = received, sent
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent)
        return out

    @staticmethod
    def backward(ctx, g):
        out = g.new_empty(sum(ctx.sent), *g.shape[1:])
        dist.all_to_all_single(out, g.contiguous(), ctx.sent, ctx.received)
        return out, None, None


def exchange(x: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
    """All-to-all of rows: sends sent[i] rows of x, in order, to process i and gets received[i] from it."""
    return Exchange.apply(x, received, sent)


def exchange_counts(counts: torch.Tensor, world: int) -> torch.Tensor:
    """Exchange the numbers of rows before the rows.

    counts: (E,), this process's rows for each expert. Returns (world, E / world): for each process, its rows
    for this process's experts.
    """
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts)
    return out.view(world, -1)
