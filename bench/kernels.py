"""Operations of a full-width step: `python bench/kernels.py [--only GROUP ...] [--out JSON]`.

Each operation in bfloat16 by torch, torch.compile and our kernel, at the shapes of records 11 to 33 on 65,536
tokens, attention on a logical rank of each. A row has the milliseconds (bench/measure.py) of the forward and,
if there is one, the backward; FLOPs and least bytes to move, with their share of the card's peak; and the
additional memory. Needs a GPU; --rehearse runs each way once, untimed, on a CPU at small sizes.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import measure  # first: it finds the repository
import numpy as np
import report
import torch
import torch.nn.functional as F

from common import arguments, console
import schedule
from kernels import attention, experts, symmetric, transpose
from kernels.cross_entropy import linear_cross_entropy
from kernels.device import FP8_SINCE, capability
from kernels.fp8_mlp import fp8_mlp
from kernels.linear_relu_sq import mlp_relu_sq, mlp_relu_sq_reference
from kernels.newton_schulz import newton_schulz
from kernels.qk_rotary import qk_rotary_reference, qkv_rotary
from layers.head import bounded
from settings import Settings, deltas
from settings.data import longest_document
from settings.model import Softcap, head_dim
from updates.adam import adamw_
from system import dry_run as plan
from steps import LANDMARKS

DEVICE = torch.device("cuda")
TOKENS, DIM, HIDDEN, VOCAB, HEADS, SCALE = 65536, 768, 3072, 50304, 6, "full"
REHEARSED = 256, 64, 256, 512, 2, "micro"  # the same on a CPU
# dense bfloat16 TFLOP/s and TB/s of a card, by name; H200 as read on one, the others by their makers
PEAKS = {"H200": (790, 4.3), "H100": (989, 3.35), "A100": (312, 2.0), "4090": (165, 1.0)}


def tensor(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Normal bfloat16 tensor times `scale`, with a gradient."""
    return (torch.randn(*shape, device=DEVICE) * scale).bfloat16().requires_grad_()


def trained(
    function: Callable, inputs: list[torch.Tensor], upstream: list[torch.Tensor] | None = None
) -> Callable[[], None]:
    """Forward and backward as one step. upstream: gradients of the results; None: ones, of one result."""
    def step():
        y = function(*inputs)
        torch.autograd.grad(y, inputs, torch.ones_like(y) if upstream is None else upstream)
    return step


def plain_rotary(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **plan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """QK norm and rotary in plain torch: qkv (R, T, 3, H, K) -> q, k, v, each (R, T, H, K)."""
    q, k, v = qkv.unbind(2)
    return *qk_rotary_reference(q, k, cos, sin, **plan), v


def whole_loss(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, softcap: Softcap) -> torch.Tensor:
    """Soft-capped cross entropies (N,) with all logits (N, V) in memory."""
    return F.cross_entropy(bounded(F.linear(x, w).float(), softcap), targets, reduction="none")


def plain_experts(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, gates: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """The routed part of a mixture as a loop over the experts."""
    y = torch.zeros_like(x)
    for e in range(len(up)):
        token, choice = (chosen == e).nonzero(as_tuple=True)
        y = y.index_add(
            0, token, (F.relu(x[token] @ up[e].mT).square() @ down[e].mT) * gates[token, choice, None]
        )
    return y


def our_experts(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, gates: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """The same as plain_experts, with rows sorted by expert and grouped products."""
    p = experts.plan(chosen, len(up), "grouped")
    hidden = F.relu(experts.grouped_linear(experts.gather(x, p), up, p)).square()
    return experts.combine(experts.grouped_linear(hidden, down, p), gates, p)


def fp8_mlps(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, flops: int, size: int
) -> Iterator[tuple[str, int, int, dict]]:
    """The MLP of a logical rank with its first product in FP8, and with both; `ours`: the fused kernels."""
    scales = torch.full((1,), 0.1, device=DEVICE), torch.full((), 1e-3, device=DEVICE)
    for name, given in (("up", None), ("up and down", scales)):
        def mlp(*t, given=given, fused=False):
            return fp8_mlp(*t, 1, given, fused)[0]
        yield (
            f"mlp, relu^2, FP8 {name}",
            flops,
            size,
            {
                "torch": trained(mlp, [x, up, down]),
                "compile": trained(torch.compile(mlp, dynamic=False), [x, up, down]),
                "ours": trained(functools.partial(mlp, fused=True), [x, up, down])
            },
        )


def transposes() -> Iterator[tuple[str, int, int, dict]]:
    """The transposed copies in the FP8 head's backward, and those of records 61 and 74, by GB/s."""
    for rows, columns, dtype in (
        (TOKENS, VOCAB, torch.uint8), (TOKENS, DIM, torch.uint8), (VOCAB, DIM, torch.uint8),
        (DIM, VOCAB, torch.bfloat16)
    ):
        x = torch.randint(
            0, 256, (rows, columns * dtype.itemsize), dtype=torch.uint8, device=DEVICE
        ).view(dtype)
        plain = transpose.transpose_copy_reference
        yield (
            f"transpose {rows} x {columns}, {8 * dtype.itemsize} bits",
            0,
            2 * x.numel() * dtype.itemsize,
            {
                "torch": functools.partial(plain, x),
                "compile": functools.partial(torch.compile(plain, dynamic=False), x),
                "ours": functools.partial(transpose.transpose_copy, x)
            },
        )


def mlps() -> Iterator[tuple[str, int, int, dict]]:
    """The ReLU^2 MLP, forward and backward, and where the GPU has FP8 units its FP8 forms."""
    x, up, down = (
        tensor(TOKENS, DIM), tensor(HIDDEN, DIM, scale=DIM**-0.5), tensor(DIM, HIDDEN, scale=HIDDEN**-0.5)
    )
    flops, size = 6 * 2 * TOKENS * DIM * HIDDEN, 2 * (4 * TOKENS * DIM + 4 * TOKENS * HIDDEN)
    yield "mlp, relu^2", flops, size, {
        "torch": trained(mlp_relu_sq_reference, [x, up, down]),
        "compile": trained(torch.compile(mlp_relu_sq_reference, dynamic=False), [x, up, down]),
        "ours": trained(mlp_relu_sq, [x, up, down])}
    # forward and backward, of which the backward stays in bfloat16
    if (capability(x.device) or 0) >= FP8_SINCE:
        yield from fp8_mlps(x, up, down, flops, size)


def losses() -> Iterator[tuple[str, int, int, dict]]:
    """The head with soft cap and cross entropy, forward and backward."""
    x, head, cap = tensor(TOKENS, DIM), tensor(VOCAB, DIM, scale=DIM ** -0.5), Softcap(form="sigmoid")
    targets = torch.randint(0, VOCAB, (TOKENS,), device=DEVICE)
    yield (
        "head and cross entropy",
        6 * TOKENS * DIM * VOCAB,
        2 * (4 * TOKENS * VOCAB),
        {
            "torch": trained(lambda x, w: whole_loss(x, w, targets, cap), [x, head]),
            "compile": trained(
                torch.compile(lambda x, w: whole_loss(x, w, targets, cap), dynamic=False), [x, head]
            ),
            "chunks": trained(
                lambda x, w: linear_cross_entropy(x, w, targets, softcap=cap, backend="torch"), [x, head]
            ),
            "ours": trained(
                lambda x, w: linear_cross_entropy(x, w, targets, softcap=cap, backend="triton"), [x, head]
            ),
        },
    )


def muons() -> Iterator[tuple[str, int, int, dict]]:
    """Newton-Schulz of the banks of a 12-layer model, and the Gram matrix alone."""
    for n, rows, columns in ((24, DIM, HIDDEN), (44, DIM, DIM)):
        g = tensor(n, rows, columns).detach()
        yield (
            f"newton_schulz {n} x {rows} x {columns}",
            5 * n * (4 * rows**2 * columns + 2 * rows**3),
            2 * 5 * n * (4 * rows * columns + 4 * rows**2),
            {
                "torch": functools.partial(newton_schulz, g),
                "ours": functools.partial(newton_schulz, g, fused=True),
                "compile": functools.partial(torch.compile(newton_schulz, dynamic=False), g)
            },
        )
    a = tensor(24, DIM, HIDDEN).detach()
    yield "gram 24 x 768 x 3072", 24 * 2 * DIM ** 2 * HIDDEN, 2 * 24 * (DIM * HIDDEN + DIM ** 2), {
        "torch": lambda: symmetric.gram_reference(a), "ours": lambda: symmetric.gram(a)}


def rotary() -> Iterator[tuple[str, int, int, dict]]:
    """QK norm and rotary of all tokens, forward and backward."""
    qkv, width = tensor(1, TOKENS, 3, HEADS, DIM // HEADS), DIM // HEADS
    upstream = [tensor(1, TOKENS, HEADS, width).detach() for _ in range(3)]
    angles = torch.rand(TOKENS, width // 2, device=DEVICE) * 2 * torch.pi
    plan = {"cos": angles.cos(), "sin": angles.sin(), "order": "before_rope", "eps": 1e-6}
    # q and k read and written; then they and three gradients read, three written; the float32 tables twice
    yield (
        "QK norm and rotary",
        16 * 2 * TOKENS * DIM,
        2 * 12 * TOKENS * DIM + 4 * 4 * angles.numel(),
        {
            "torch": trained(functools.partial(plain_rotary, **plan), [qkv], upstream),
            "compile": trained(
                torch.compile(functools.partial(plain_rotary, **plan), dynamic=False), [qkv], upstream
            ),
            "ours": trained(functools.partial(qkv_rotary, **plan), [qkv], upstream),
        },
    )


def mixtures() -> Iterator[tuple[str, int, int, dict]]:
    """The routed experts of a mixture, forward and backward."""
    count, k, width = 8, 2, 1024
    stack_up, stack_down = (
        tensor(count, width, DIM, scale=DIM**-0.5),
        tensor(count, DIM, width, scale=width**-0.5),
    )
    chosen = torch.rand(TOKENS, count, device=DEVICE).topk(k).indices
    inputs = [tensor(TOKENS, DIM), stack_up, stack_down, tensor(TOKENS, k)]
    yield (
        "experts, 8 of 1024, 2 a token",
        12 * TOKENS * k * DIM * width,
        2 * 4 * k * TOKENS * (DIM + width),
        {
            "torch": trained(lambda *t: plain_experts(*t, chosen), inputs),
            "ours": trained(lambda *t: our_experts(*t, chosen), inputs),
        },
    )


def adams() -> Iterator[tuple[str, int, int, dict]]:
    """AdamW of a token table and of all small tensors' size, float32: four tensors read, three written."""
    for n in (VOCAB * DIM, 12 * DIM * DIM):
        p, g, m, v = (torch.rand(n, device=DEVICE) for _ in range(4))
        own = torch.nn.Parameter(p.clone())
        own.grad = g
        hyper = {"decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "eps_after_correction": True,
                 "math_dtype": torch.float32}
        # as optim.Optimizer gives them to a compiled rule
        numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in (
            ("lr", 1e-4), ("correction1", 0.5), ("correction2", 0.5))}

        def ours(rule):
            return torch.no_grad()(functools.partial(rule, p, g, m, v, **hyper, **numbers))

        yield f"AdamW, {n} float32", 15 * n, 7 * 4 * n, {
            "torch": torch.optim.AdamW([own], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True).step,
            "eager": ours(adamw_), "compile": ours(torch.compile(adamw_, dynamic=False))}


# ----- attention --------------------------------------------------------------------------------------------

def pairs(documents: np.ndarray | None, window: attention.Window, rows: int, tokens: int) -> int:
    """How many (query, key) pairs are visible. documents: (rows, tokens) ids, an array, or None."""
    q = np.arange(tokens)
    first = np.zeros((rows, tokens), np.int64)
    if documents is not None:
        new = np.diff(documents, axis=1, prepend=documents[:, :1] - 1) != 0
        first = np.maximum.accumulate(np.where(new, q, 0), axis=1)
    if window.tokens is not None:
        first = np.maximum(first, q - window.tokens + 1)
    if window.blocks is not None:
        first = np.maximum(first, (q // window.block - window.blocks + 1) * window.block)
    return int((q - first + 1).sum())


def some_documents(rows: int, tokens: int, longest: int | None) -> np.ndarray:
    """(rows, tokens) int32 ids of documents as long as FineWeb's."""
    ends = np.cumsum(measure.lengths(np.random.default_rng(0), rows * tokens // 8, longest))
    return (
        np.searchsorted(ends, np.arange(rows * tokens), side="right").reshape(rows, tokens).astype(np.int32)
    )


def windows_of(s: Settings) -> dict[str, attention.Window]:
    """{name: Window} that layers of the record see in the last training step."""
    w = schedule.windows(s, s.schedule.steps)
    if w is None:
        return {"causal": attention.CAUSAL}
    block = s.model.attn.window.block
    return {plan.span_text(span): attention.Window(*span, block) for span in (w.long, w.short)}


def attentions() -> Iterator[tuple[str, int, int, dict]]:
    """Forward and backward of a layer's attention on a logical rank, every backend that can."""
    for ref in LANDMARKS:
        s = deltas.resolve(ref, scale=SCALE).settings
        tokens, heads, width = s.data.seq_len, s.model.attn.num_heads, head_dim(s)
        rows = schedule.shape(s, 0).tokens_per_rank // tokens
        longest = longest_document(s) if s.data.loader == "packed" else None
        ids = some_documents(rows, tokens, longest) if s.model.attn.document_mask else None
        # counted on the host, as a training does
        number = None if ids is None else int(attention.begins_document(torch.from_numpy(ids)).sum())
        q, k, v = (tensor(rows, tokens, heads, width) for _ in range(3))
        upstream = [tensor(rows, tokens, heads, width).detach()]
        for name, window in windows_of(s).items():
            # q k v y; again, with g, and three gradients
            seen, size = pairs(ids, window, rows, tokens), 2 * 12 * q.numel()

            def way(backend):
                def prepared():
                    documents = None if ids is None else torch.from_numpy(ids).to(DEVICE)
                    attention.choose(
                        backend, q.device, documents=ids is not None, window=window, tokens=tokens,
                        dtype=q.dtype
                    )
                    view = attention.view(
                        documents, window, backend, rows=rows, tokens=tokens, device=q.device, dtype=q.dtype,
                        max_seqlen=longest, max_docs=number
                    )
                    return trained(lambda *t: attention.attend(*t, view), [q, k, v], upstream)
                return Prepared(prepared)

            # T x T masks
            ways = [b for b in attention.BACKENDS if b != "documents" and (b != "dense" or tokens <= 4096)]
            yield (
                f"attention of {ref}, {name}", 14 * seen * heads * width, size,
                {backend: way(backend) for backend in ways}
            )


class Prepared(NamedTuple):
    """A step that has to be made first, and cannot everywhere: ValueError says why."""
    make: Callable


GROUPS = {
    "attention": attentions, "mlp": mlps, "loss": losses, "muon": muons, "adam": adams, "rotary": rotary,
    "transpose": transposes, "experts": mixtures
}


def timed(
    step: Callable | Prepared, flops: int, size: int, peak: tuple[float, float] | None, repeats: int
) -> dict:
    """The row of one way."""
    if isinstance(step, Prepared):
        try:
            step = step.make()
        except ValueError as error:
            return {"not_run": str(error)}
    try:
        step()  # which compiles
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        memory = torch.cuda.max_memory_allocated() - held  # before measure.queued has its buffer
        seconds = measure.best(step, repeats)[1]
    except torch.OutOfMemoryError as error:
        return {"not_run": "out of memory: " + report.first_line(error)}
    row = {"ms": round(1000 * seconds, 4), "tflop": flops / 1e12, "gb": size / 1e9,
           "tflops": round(flops / seconds / 1e12, 1), "peak_mib": round(memory / 2 ** 20)}
    if peak:
        row["share_of_flops"] = round(flops / seconds / 1e12 / peak[0], 3)
        row["share_of_bytes"] = round(size / seconds / 1e12 / peak[1], 3)
    return row


def rehearsed(way: str, step: Callable | Prepared) -> dict:
    """The row of one way that is run once. What a CPU cannot do is said."""
    if DEVICE.type == "cpu" and way in ("ours", "compile"):
        return {"not_run": "is rehearsed on CUDA"}
    if isinstance(step, Prepared):
        try:
            step = step.make()
        except ValueError as error:
            return {"not_run": str(error)}
    step()
    return {"ran": True}


def cases(
    operations: Callable[[], Iterator[tuple[str, int, int, dict]]], peak: tuple[float, float] | None,
    repeats: int, rehearse: bool
) -> Iterator[tuple[dict, Callable]]:
    """Of bench/report.py: every way of every operation."""
    for operation, flops, size, ways in operations():
        for way, step in ways.items():
            yield {"operation": operation, "way": way}, lambda: (
                rehearsed(way, step) if rehearse else timed(step, flops, size, peak, repeats)
            )


def show(row: dict) -> str:
    """The printed line of a row."""
    head = f"{row['operation']:44} {row['way']:8}"
    if "not_run" in row:
        return f"{head} not run: {row['not_run']}"
    if "ran" in row:
        return f"{head} ran"
    return (
        f"{head} {row['ms']:9.3f} ms {row['tflops']:7.1f} TFLOP/s {1e3 * row['gb'] / row['ms']:7.0f} GB/s "
        f"{row['peak_mib']:7} MiB"
    )


def brief(rows: list[dict]) -> list[dict]:
    """A row for each operation: milliseconds of every way, and the fastest one's largest share of a peak."""
    lines = []
    for operation in dict.fromkeys(r["operation"] for r in rows):
        mine = {r["way"]: r for r in rows if r["operation"] == operation and "ms" in r}
        fastest = min(mine.values(), key=lambda r: r["ms"], default={})
        lines.append(
            {
                "operation": operation, "fastest": fastest.get("way"),
                "its share of FLOPs": fastest.get("share_of_flops"),
                "of bytes": fastest.get("share_of_bytes"),
                **{f"{way}, ms": r["ms"] for way, r in mine.items()}
            }
        )
    return lines


def main() -> None:
    """Time the selected groups of operations; without a GPU only `--rehearse` runs anything."""
    p = arguments.Parser(prog="bench/kernels.py", description=__doc__.splitlines()[0])
    p.add_argument("--repeats", type=arguments.integer(1, 10 ** 6), default=20,
                   help="timings of each (default 20)")
    p.add_argument("--rehearse", action="store_true", help="run each way once and time nothing")
    report.add_arguments(p, GROUPS)
    o = p.parse_args()
    if not torch.cuda.is_available() and o.rehearse:
        global DEVICE, TOKENS, DIM, HIDDEN, VOCAB, HEADS, SCALE
        DEVICE, (TOKENS, DIM, HIDDEN, VOCAB, HEADS, SCALE) = torch.device("cpu"), REHEARSED
    elif not torch.cuda.is_available():
        print(f"no GPU here; on one this would time: {', '.join(o.only or GROUPS)}")
        sys.exit(0)
    torch.manual_seed(0)
    # of FlexAttention, which every window and every row compiles anew
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((v for k, v in PEAKS.items() if k in card), None)
    groups = {
        name: functools.partial(cases, operations, peak, o.repeats, o.rehearse)
        for name, operations in GROUPS.items()
    }
    sys.exit(report.run(o, groups, "Operations of a full-width step", show=show, brief=brief))


if __name__ == "__main__":
    console.program(main)
