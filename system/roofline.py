"""A roofline of a training step on a card: its least time, by counting, and the time to expect.

    for line in lines(resolved, "h200", gpus=1): print(line)

A step has four kinds of work: matrix products (of the model and of Muon), attention's own products, bytes
that elementwise operations and updates move through memory, and communication. Each is counted from the
settings, and divided by the card's published peak it gives a bound. The expected range divides by the share
of the peak that such work usually reaches, a low and a high one (SHARES). It is an estimate: no share here
was measured by this program.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import schedule
from common import files
from common.errors import UserError
from layers.specs import LayerSpec, layer_specs
from settings import Settings
from settings.data import LOGICAL_RANKS
from settings.deltas import Resolved
from settings.model import padded_vocab
from system.cards import CARDS, Card
from system.microbatch import ranks_per_microbatch

RESULTS = Path(__file__).parent.parent / "bench/results"
# (low, high) share of its peak that a kind of work is assumed to reach
SHARES = {"products": (0.62, 0.76), "FP8 products": (0.5, 0.7), "FP32 products": (0.62, 0.76),
          "attention": (0.3, 0.55), "bytes": (0.6, 0.8), "communication": (0.5, 0.8)}
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
NEWTON_SCHULZ_STEPS = 5


class Work(NamedTuple):
    """The work of one GPU in one step, averaged over the run."""
    products: float  # FLOPs of 16-bit operands
    fp8: float  # FLOPs of FP8 operands
    fp32: float  # FLOPs of float32 operands
    attention: float  # FLOPs
    bytes: float  # read and written
    communication: float  # bytes sent


def card(name: str) -> Card:
    """The peaks of a card. UserError for a name that is not in CARDS."""
    if name not in CARDS:
        raise UserError(f"--card {name}: choose from {', '.join(CARDS)}")
    return CARDS[name]


# ----- counting ---------------------------------------------------------------------------------------------

def work(s: Settings, gpus: int = 1) -> Work:
    """The work of one of `gpus` GPUs in a step. milliseconds() decides whether the card has FP8."""
    from model import without_values
    from optim import Optimizer
    from system.comm import communication
    model = without_values(s)
    banks = Optimizer(model, s, communication(s, 0, gpus)).banks
    steps = s.schedule.steps
    tokens = schedule.tokens_before(s, steps) / steps / gpus
    windows = Counter(schedule.windows(s, i) for i in range(steps))
    attended = sum(n * model.attention_flops_per_token(w) for w, n in windows.items()) / steps
    fp8 = fp8_flops(s)
    flops = Counter({products_dtype(s): tokens * (model.flops_per_token() - fp8)})
    flops[s.numerics.newton_schulz] += muon_flops(banks)
    return Work(
        products=flops["bfloat16"] + flops["float16"],
        fp8=tokens * fp8,
        fp32=flops["float32"],
        attention=tokens * attended * 7 / 6,  # the backward pass multiplies queries and keys once more
        bytes=tokens * bytes_per_token(s) + update_bytes(s, banks, gpus),
        communication=sent(banks, gpus),
    )


def products_dtype(s: Settings) -> str:
    """The dtype of the operands of products with weights (numerics.products)."""
    return s.numerics.matmul if s.numerics.products == "matmul" else s.numerics.products


def fp8_flops(s: Settings) -> float:
    """FLOPs of a token whose operands are 8-bit: of the head, of MLPs and of q, k and v."""
    total, n, d = 0.0, s.numerics, s.model.model_dim
    if n.fp8_head:
        total += 6 * d * padded_vocab(s)
    if n.fp8_mlp:
        products = 6 if n.fp8_mlp.backward else 2 if n.fp8_mlp.c_proj else 1
        total += products * sum(2 * d * spec.mlp for spec in layer_specs(s) if spec.mlp)
    if n.fp8_qkv:
        attns = [spec.attn for spec in layer_specs(s) if spec.attn is not None]
        total += sum(6 * d * attn.heads * (2 * attn.qk + attn.v) for attn in attns)
    return total


def muon_flops(banks: Sequence) -> float:
    """FLOPs of the Newton-Schulz iterations of this process's share of the matrices."""
    total = 0.0
    for bank in banks:
        for piece in bank.views.split(bank.param) if bank.rule.name == "muon" else ():
            m, k = sorted(piece.shape[-2:])
            each = NEWTON_SCHULZ_STEPS * (4 * m * m * k + 2 * m**3)
            total += piece.numel() // (m * k) * each / bank.comm.shards
    return total


def layer_elements(s: Settings, spec: LayerSpec) -> tuple[int, int, int]:
    """Elements that one layer's elementwise operations read and write per token in the forward pass.

    Returns (those of the residual stream's dtype, those of attention in the matmul dtype, those that a
    product reads or wrote). The compiler is assumed to fuse neighbouring operations, so a cast is part of the
    operation before or after the product.
    """
    d, stream, inner, operands = s.model.model_dim, 0, 0, 0
    if spec.attn is not None:
        stream += d + 3 * d  # the norm reads it; it and the layer's result are read, their sum is written
        operands += d  # the norm's result
        if spec.attn.rotary:  # queries and keys, read, normed and turned
            operands += 2 * spec.attn.heads * spec.attn.qk
            inner += 2 * spec.attn.heads * spec.attn.qk
        if spec.attn.value_table is not None:  # values are read, and so is what is mixed into them
            operands += spec.attn.heads * spec.attn.v
            inner += 2 * spec.attn.heads * spec.attn.v
    if spec.mlp or spec.moe:
        moe = s.model.mlp.moe
        hidden = moe.top_k * moe.hidden + moe.shared if spec.moe else spec.mlp
        stream += d + 3 * d
        operands += d + 2 * hidden  # the norm's result; the activation
    return stream, inner, operands


def bytes_per_token(s: Settings) -> float:
    """Bytes that elementwise operations move per token in a step, the operands of products included.

    The backward pass is assumed to move twice the bytes of the forward pass.
    """
    n, total, product = s.numerics, 0.0, BYTES[products_dtype(s)]
    for spec in layer_specs(s):
        stream, inner, operands = layer_elements(s, spec)
        total += 3 * (stream * BYTES[n.residual] + inner * BYTES[n.matmul] + operands * product)
    # logits: written, read for the loss, read for their gradient, which is written, and with FP8 copied to
    # bytes and transposed
    logits = padded_vocab(s) * (4 * product + (5 if n.fp8_head else 0))
    return total + logits


def update_bytes(s: Settings, banks: Sequence, gpus: int) -> float:
    """Bytes that the updates and gradient sums of a process move in memory."""
    ranks = LOGICAL_RANKS // gpus
    forwards = ranks / ranks_per_microbatch(s, ranks, cuda=True)
    total, product = 0.0, BYTES[products_dtype(s)]
    for bank in banks:
        state = sum(x.nbytes for x in bank.state.values())  # of this process's shard
        moved = bank.grad_bytes() if bank.by_rows else bank.param.nbytes
        total += 2 * state + (2 * moved + bank.grad_bytes()) / bank.comm.shards
        total += 2 * bank.grad_bytes() * forwards  # written or added to by each forward's backward pass
        if bank.role in ("matrix", "lm_head", "router") and bank.param.itemsize != product:
            # cast for the products of each forward, and its gradient cast back
            total += 2 * bank.param.numel() * (bank.param.itemsize + product) * forwards
    return total


def sent(banks: Sequence, gpus: int) -> float:
    """Bytes that a GPU sends, by rings: gradients are reduced, and updated shards gathered."""
    part = (gpus - 1) / gpus
    total = 0.0
    for bank in banks if gpus > 1 else ():
        if bank.has_rows:  # to one owner, or to all others
            total += bank.grad_bytes() * (part if bank.comm.partial else gpus - 1)
        else:
            total += part * bank.grad_bytes() * (1 if bank.comm.partial else 2)
        total += part * bank.param.nbytes * (bank.comm.shards > 1)
    return total


# ----- seconds ----------------------------------------------------------------------------------------------

def milliseconds(s: Settings, of: Card, gpus: int = 1) -> dict[str, float]:
    """Milliseconds of each kind of work at the card's peaks. UserError for a precision without one."""
    n = s.numerics
    if not {n.matmul, n.residual, n.newton_schulz, products_dtype(s)} <= BYTES.keys():
        raise UserError(f"no card has a published peak for {s.numerics.matmul} here: leave --card out")
    done = work(s, gpus)
    peak = of.fp32 if s.numerics.matmul == "float32" else of.bf16
    products, fp8 = done.products, done.fp8
    if of.fp8 is None:  # bfloat16 can hold every 8-bit value
        products, fp8 = products + fp8, 0.0
    return {
        "products": products / of.bf16 / 1e9, "FP8 products": fp8 / (of.fp8 or 1) / 1e9,
        "FP32 products": done.fp32 / of.fp32 / 1e9, "attention": done.attention / peak / 1e9,
        "bytes": done.bytes / of.memory / 1e9,
        "communication": done.communication / of.link / 1e6
    }


def expected(at_peak: dict[str, float]) -> tuple[float, float]:
    """(least, most) milliseconds of a step. Least: communication hides behind the backward pass."""
    least = sum(ms / SHARES[kind][1] for kind, ms in at_peak.items() if kind != "communication")
    return least, sum(ms / SHARES[kind][0] for kind, ms in at_peak.items())


def lines(resolved: Resolved, name: str, gpus: int = 1) -> Iterator[str]:
    """Lines of the estimate of a step on `gpus` cards, its assumptions, and measurements on such cards."""
    s = resolved.settings
    at_peak = milliseconds(s, card(name), gpus)
    least, most = expected(at_peak)
    many = f"{gpus} x {name.upper()}" if gpus > 1 else f"one {name.upper()}"
    yield (f"estimate (not measured) of a step on {many}, {LOGICAL_RANKS // gpus} of {LOGICAL_RANKS} logical "
           "ranks each:")
    for kind, ms in at_peak.items():
        if ms:
            low, high = SHARES[kind]
            yield (f"  {kind:14} {ms:9.1f} ms at the published peak; assumed to reach {low:.0%} to "
                   f"{high:.0%} of it")
    yield f"  roofline {sum(at_peak.values()):,.0f} ms; expected {least:,.0f} to {most:,.0f} ms a step"
    yield ("  assumes: compiled, nothing waits for the host, borders of documents hide no work, one kind of "
           "work after the other" + (", communication hidden or not" if gpus > 1 else ""))
    yield from measured(resolved, name, gpus)


def measured(resolved: Resolved, name: str, gpus: int, results: Path = RESULTS) -> Iterator[str]:
    """Lines on what bench/steps.py measured of this record on such a card."""
    for table, warm, where in measurements(resolved, results):
        if table["processes"] == gpus and name in warm["device"].lower():
            yield f"  measured: {warm['ms_per_step']:.1f} ms a step on {warm['device']} ({where})"


def measurements(resolved: Resolved, results: Path = RESULTS) -> Iterator[tuple[dict, dict, str]]:
    """(table, warm figures, file) of each measurement by bench/steps.py of this record at this scale.

    None where the command changes the record, and none of tables with settings of their own.
    """
    if resolved.changes:
        return
    for path in files.listed(results, "**/steps*.json"):
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["scale"] == resolved.scale and not table["settings"]:
            for row in table["rows"]:
                if row["record"] == resolved.record.ref:
                    yield table, row["warm"], f"bench/results/{path.relative_to(results)}"
