"""An estimate of the memory of a training step, and the choices that make a step fit on a GPU.

Tensors without values (device meta) are counted.

    estimate(s, ranks=8, microbatch=1)      -> Estimate, in bytes: exact for parameters, gradients, state and
                                               what an eager forward pass keeps; a compiled one by a rule
    fit(s, ranks, capacity)                 -> the settings with whatever `system` left open chosen so that it
                                               fits
"""

import contextlib
import dataclasses
import math
import re
from typing import NamedTuple

import torch

import schedule
from system_settings import recomputable
from model_settings import padded_vocab
from common.errors import UserError
from system.microbatch import ranks_per_microbatch

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
    def total(self):
        return sum(self)


def report(s, estimate):
    """What the log says: MiB of each part, and the choices that it was made for."""
    sizes = {
        name: round(value / 2**20) for name, value in {**estimate._asdict(), "total": estimate.total}.items()
    }
    return {"mib": sizes, "ranks_per_microbatch": s.system.ranks_per_microbatch,
            "loss": s.system.kernels.loss, "activation_checkpoint": s.system.activation_checkpoint}


class Kept:
    """Context that counts the bytes autograd keeps for the backward pass, apart from the `known` tensors."""

    def __init__(self, known=()):
        self.known, self.storages, self.shapes = {t.untyped_storage()._cdata for t in known}, {}, {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage  # held, so that no other one gets its place
            self.shapes[storage._cdata] = tensor.itemsize, tensor.numel()
        return tensor

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def bytes(self, widest=8, largest=math.inf):
        """Of the tensors that have fewer than `largest` numbers, of at most `widest` bytes each."""
        chosen = (key for key, (width, numel) in self.shapes.items() if width <= widest and numel < largest)
        return sum(self.storages[key].nbytes() for key in chosen)


def heaviest(s):
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


def classes(s, shape):
    """Classes of the softmax in steps of this Shape."""
    return shape.candidates or padded_vocab(s)


def kept_by_forward(s, microbatch, compiled=False, shape=None):
    """Bytes that the forward pass of `microbatch` logical ranks keeps for the backward pass.

    shape: of the step; None: that with most tokens.

    compiled: by a rule. Inductor keeps what matrix products and attention read or made, in 16 bits, and
    computes the rest again: norms, rotations and float32 copies. Autograd keeps no block's output, which is
    only added to the stream; Inductor keeps it, in the stream's dtype, to get the stream back. It keeps
    queries and keys before and after a norm that follows their rotation. The logits are not in it: estimate()
    counts them with their gradient. tests/nullcuda/table.md has estimates next to the allocator's peaks.
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
    norm = s.model.attn.qk_norm
    if norm and norm.order == "after_rope" and s.system.kernels.qk != "triton":
        rest += attending * 2 * stream * dtype(s.numerics.matmul).itemsize
    together = 1 if shape.candidates else rows  # each rank has its own candidates
    return kept.bytes(widest=2, largest=together * shape.seq_len * classes(s, shape)) + rest


def passing_in_head(s, tokens, compiled=False, number=None):
    """Bytes that come and go in the backward pass of the head and loss of `tokens` tokens, on a GPU.

    They are counted beyond what the forward pass keeps; what an operation has used by then makes room. Of
    each logit, m bytes are in the product's dtype, c in that of the soft cap and l in that of the loss.
    number: of classes; None: all.
    """
    from layers.primitives import dtype
    n, head = s.numerics, s.model.head
    number = number or padded_vocab(s)
    logits, m, l = tokens * number, logits_bytes(s), dtype(n.loss).itemsize
    if chunked(s):
        return passing_in_chunks(s, tokens, number)
    if compiled and not (head.softcap or head.logit_scale != "one" or n.fp8_head):
        return logits * m  # the gradient takes the place of the logits
    if compiled:  # one kernel, from the logits of the product to the gradient that it takes
        return logits * (m + (2 if n.fp8_head else m))  # in FP8 the gradient and its transpose
    if head.mtp:  # gradients of the sum over classes and of the target, what joins them, and the sum
        return 4 * logits * max(l, torch.float32.itemsize)
    moments, kept = [2 * l], l  # of the log-softmax, which keeps its result: the gradient it reads and writes
    if head.softcap or head.logit_scale:
        c = max(m, dtype(n.softcap).itemsize)
        moments.append(2 * c - kept)
        kept += c if head.softcap else 0  # its sigmoid or tanh
    if n.fp8_head:  # the gradient, that in float32, and that times its factor or clamped
        moments.append(m + 2 * torch.float32.itemsize - kept)
    return logits * max(moments)


def logits_bytes(s):
    """Bytes of a logit as the head's product writes it."""
    from layers.primitives import dtype, products_dtype
    return (products_dtype(s) or dtype(s.numerics.matmul)).itemsize


def passing_in_chunks(s, tokens, number):
    """passing_in_head of a loss in chunks: of the largest chunk, and the gradients of stream and weight."""
    from kernels.cross_entropy import chunks
    m, d = logits_bytes(s), s.model.model_dim
    first = chunks(tokens, number, torch.device("cuda"), 0)[0]
    logits, weight = (first.stop - first.start) * number, 4 * number * d  # the weight's gradient is float32
    if s.system.kernels.loss != "triton":
        passing = 3 * 4 * logits + weight  # three of a chunk, in float32
    elif s.numerics.fp8_head:  # logits and gradient in bytes; then this, its transpose, a chunk's term
        passing = max((m + 1) * logits + weight, 2 * logits + 2 * weight)
    else:
        passing = m * logits + 2 * weight  # the gradient takes the logits' place
    return passing + tokens * d * m


def estimate(s, ranks, microbatch, world=1):
    """ranks: logical ranks of this process, of which `microbatch` go through a forward; world: processes."""
    from model import without_values
    from optim import Optimizer
    from system.comm import communication
    from system.hooks import hooks_of
    from system.seams import shape
    from system.workers import copies_bytes
    from system.wrappers import Outer
    model = without_values(s)
    optimizer = Optimizer(model, s, communication(s, 0, world))
    hooks = sum(t.nbytes for hook in hooks_of(model) for t in hook.tensors().values())
    parameters = sum(bank.param.nbytes for bank in optimizer.banks)
    held = {bank: 2 * bank.grad.nbytes if bank.grad.dtype == torch.bfloat16 and microbatch < ranks else 0
            for bank in optimizer.banks}
    sums = sum(held.values()) + sum((held[bank] or bank.grad.nbytes) // world for bank in optimizer.banks
                                    if bank.comm.name == "reduce-scatter")
    compiled = s.system.compile == "on" or (s.system.compile == "auto" and s.system.device != "cpu")
    kept, passing = max((moment(s, shape, microbatch, compiled) for shape in heaviest(s)), key=sum)
    state = optimizer.state_bytes() + hooks
    if s.validation.canonical_mask:
        state += math.prod(shape(s))
    if schedule.apart(s):
        state += copies_bytes(optimizer, Outer(model, s.optim.outer), ranks)
    return Estimate(parameters, parameters + sums, state, kept, passing)


def moment(s, shape, microbatch, compiled):
    """(kept, passing) of an Estimate in steps of this Shape."""
    passing = passing_in_head(s, microbatch * shape.tokens_per_rank, compiled, classes(s, shape))
    kept = kept_by_forward(s, microbatch, compiled, shape)
    if s.system.activation_checkpoint == "on":  # one block at a time is there in full
        whole = kept_by_forward(with_system(s, activation_checkpoint="off"), microbatch, compiled, shape)
        passing = max(passing, (whole - kept) // s.model.num_layers)
    return kept, passing


def chunked(s):
    """Whether the loss works in chunks, so that the logits never exist in full."""
    return s.system.kernels.loss in ("chunks", "triton")


def with_system(s, **changes):
    """Settings with some `system` fields replaced."""
    return dataclasses.replace(s, system=dataclasses.replace(s.system, **changes))


def fit(s, ranks, capacity, world=1):
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


@contextlib.contextmanager
def exhaustion_in_one_line():
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
