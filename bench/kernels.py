"""Operations of a full-width step, each way it can be done: `python bench/kernels.py [--out JSON]`. Needs a GPU.

bfloat16, shapes of records 11 to 33 on 65,536 tokens: milliseconds (least of the repeats, forward and backward where there is
one) of torch, torch.compile and our kernel; FLOPs, bytes that must move at least, and their share of the card's peak.
"""

import argparse
import functools
import sys

import measure
import torch
import torch.nn.functional as F

from kernels import experts, symmetric, transpose
from kernels.cross_entropy import linear_cross_entropy
from kernels.device import capability
from kernels.fp8_mlp import fp8_mlp
from kernels.linear_relu_sq import mlp_relu_sq, mlp_relu_sq_reference
from kernels.newton_schulz import newton_schulz
from kernels.qk_rotary import qk_rotary_reference, qkv_rotary
from model import bounded
from settings import Softcap

TOKENS, DIM, HIDDEN, VOCAB, HEADS = 65536, 768, 3072, 50304, 6
# dense bfloat16 TFLOP/s and TB/s of a card, by name; H200 as read on one, the others by their makers
PEAKS = {"H200": (790, 4.3), "H100": (989, 3.35), "A100": (312, 2.0), "4090": (165, 1.0)}


def tensor(*shape, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).bfloat16().requires_grad_()


def trained(function, inputs, upstream=None):
    """Forward and backward as one step. upstream: gradients of the results; None: ones, of one result."""
    def step():
        y = function(*inputs)
        torch.autograd.grad(y, inputs, torch.ones_like(y) if upstream is None else upstream)
    return step


def plain_rotary(qkv, cos, sin, **plan):
    q, k, v = qkv.unbind(2)
    return *qk_rotary_reference(q, k, cos, sin, **plan), v


def whole_loss(x, w, targets, softcap):
    return F.cross_entropy(bounded(F.linear(x, w).float(), softcap), targets, reduction="none")


def plain_experts(x, up, down, gates, chosen):
    """The routed part of a mixture as a loop over the experts."""
    y = torch.zeros_like(x)
    for e in range(len(up)):
        token, choice = (chosen == e).nonzero(as_tuple=True)
        y = y.index_add(0, token, (F.relu(x[token] @ up[e].mT).square() @ down[e].mT) * gates[token, choice, None])
    return y


def our_experts(x, up, down, gates, chosen):
    p = experts.plan(chosen, len(up), "grouped")
    hidden = F.relu(experts.grouped_linear(experts.gather(x, p), up, p)).square()
    return experts.combine(experts.grouped_linear(hidden, down, p), gates, p)


def fp8_mlps(x, up, down, flops, size):
    """The MLP of a logical rank with its first product in FP8, and with both; way `ours`: the fused kernels."""
    scales = torch.full((1,), 0.1, device="cuda"), torch.full((), 1e-3, device="cuda")
    for name, given in (("up", None), ("up and down", scales)):
        def mlp(*t, given=given, fused=False):
            return fp8_mlp(*t, 1, given, fused)[0]
        yield f"mlp, relu^2, FP8 {name}", flops, size, {
            "torch": trained(mlp, [x, up, down]), "compile": trained(torch.compile(mlp, dynamic=False), [x, up, down]),
            "ours": trained(functools.partial(mlp, fused=True), [x, up, down])}


def transposes():
    """What a backward pass of the FP8 head copies (bytes), and the two uses of records 61 and 74. GB/s count."""
    for rows, columns, dtype in ((TOKENS, VOCAB, torch.uint8), (TOKENS, DIM, torch.uint8), (VOCAB, DIM, torch.uint8),
                                 (DIM, VOCAB, torch.bfloat16)):
        x = torch.randint(0, 256, (rows, columns * dtype.itemsize), dtype=torch.uint8, device="cuda").view(dtype)
        plain = transpose.transpose_copy_reference
        yield f"transpose {rows} x {columns}, {8 * dtype.itemsize} bits", 0, 2 * x.numel() * dtype.itemsize, {
            "torch": functools.partial(plain, x), "compile": functools.partial(torch.compile(plain, dynamic=False), x),
            "ours": functools.partial(transpose.transpose_copy, x)}
    a, b = torch.zeros(DIM, VOCAB, device="cuda"), torch.zeros(VOCAB, DIM, device="cuda")
    plain = transpose.transpose_add_reference
    yield f"transpose-add {DIM} x {VOCAB}, float32", a.numel(), 12 * a.numel(), {
        "torch": functools.partial(plain, a, b), "compile": functools.partial(torch.compile(plain, dynamic=False), a, b),
        "ours": functools.partial(transpose.transpose_add, a, b)}


def operations():
    """(name, FLOPs, bytes that must move, {way: step})."""
    x, up, down = tensor(TOKENS, DIM), tensor(HIDDEN, DIM, scale=DIM ** -0.5), tensor(DIM, HIDDEN, scale=HIDDEN ** -0.5)
    flops = 6 * 2 * TOKENS * DIM * HIDDEN
    yield "mlp, relu^2", flops, 2 * (4 * TOKENS * DIM + 4 * TOKENS * HIDDEN), {
        "torch": trained(mlp_relu_sq_reference, [x, up, down]),
        "compile": trained(torch.compile(mlp_relu_sq_reference, dynamic=False), [x, up, down]),
        "ours": trained(mlp_relu_sq, [x, up, down])}
    if capability(x.device) >= 89:  # forward and backward, of which the backward stays in bfloat16
        yield from fp8_mlps(x, up, down, flops, 2 * (4 * TOKENS * DIM + 4 * TOKENS * HIDDEN))
    yield from transposes()
    head, targets, cap = tensor(VOCAB, DIM, scale=DIM ** -0.5), torch.randint(0, VOCAB, (TOKENS,), device="cuda"), Softcap(form="sigmoid")
    yield "head and cross entropy", 6 * TOKENS * DIM * VOCAB, 2 * (4 * TOKENS * VOCAB), {
        "torch": trained(lambda x, w: whole_loss(x, w, targets, cap), [x, head]),
        "compile": trained(torch.compile(lambda x, w: whole_loss(x, w, targets, cap), dynamic=False), [x, head]),
        "chunks": trained(lambda x, w: linear_cross_entropy(x, w, targets, softcap=cap, backend="torch"), [x, head]),
        "ours": trained(lambda x, w: linear_cross_entropy(x, w, targets, softcap=cap, backend="triton"), [x, head])}
    for n, rows, columns in ((24, DIM, HIDDEN), (44, DIM, DIM)):
        g = tensor(n, rows, columns).detach()
        yield (f"newton_schulz {n} x {rows} x {columns}", 5 * n * (4 * rows ** 2 * columns + 2 * rows ** 3),
               2 * 5 * n * (4 * rows * columns + 4 * rows ** 2), {
            "torch": functools.partial(newton_schulz, g), "ours": functools.partial(newton_schulz, g, fused=True),
            "compile": functools.partial(torch.compile(newton_schulz, dynamic=False), g)})
    a = tensor(24, DIM, HIDDEN).detach()
    yield "gram 24 x 768 x 3072", 24 * 2 * DIM ** 2 * HIDDEN, 2 * 24 * (DIM * HIDDEN + DIM ** 2), {
        "torch": lambda: symmetric.gram_reference(a), "ours": lambda: symmetric.gram(a)}
    qkv, width = tensor(1, TOKENS, 3, HEADS, DIM // HEADS), DIM // HEADS
    upstream = [tensor(1, TOKENS, HEADS, width).detach() for _ in range(3)]
    angles = torch.rand(TOKENS, width // 2, device="cuda") * 2 * torch.pi
    plan = {"cos": angles.cos(), "sin": angles.sin(), "order": "before_rope", "eps": 1e-6}
    # q and k read and written; then they and three gradients read, three written; the float32 tables twice
    yield "QK norm and rotary", 16 * 2 * TOKENS * DIM, 2 * 12 * TOKENS * DIM + 4 * 4 * angles.numel(), {
        "torch": trained(functools.partial(plain_rotary, **plan), [qkv], upstream),
        "compile": trained(torch.compile(functools.partial(plain_rotary, **plan), dynamic=False), [qkv], upstream),
        "ours": trained(functools.partial(qkv_rotary, **plan), [qkv], upstream)}
    count, k, width = 8, 2, 1024
    stack_up, stack_down = tensor(count, width, DIM, scale=DIM ** -0.5), tensor(count, DIM, width, scale=width ** -0.5)
    chosen = torch.rand(TOKENS, count, device="cuda").topk(k).indices
    inputs = [x, stack_up, stack_down, tensor(TOKENS, k)]
    yield "experts, 8 of 1024, 2 a token", 12 * TOKENS * k * DIM * width, 2 * 4 * k * TOKENS * (DIM + width), {
        "torch": trained(lambda *t: plain_experts(*t, chosen), inputs),
        "ours": trained(lambda *t: our_experts(*t, chosen), inputs)}


def main():
    p = argparse.ArgumentParser(prog="bench/kernels.py", description=__doc__.splitlines()[0])
    p.add_argument("--repeats", type=int, default=20)
    p.add_argument("--out", metavar="JSON", help="also write the figures here")
    o = p.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here; on one this would time: mlp (FP8 too), transposes, head and cross entropy, newton_schulz, gram, "
              "QK norm and rotary, experts")
        sys.exit(0)
    torch.manual_seed(0)
    name, rows = torch.cuda.get_device_name(), []
    peak = next((v for k, v in PEAKS.items() if k in name), None)
    for operation, flops, size, ways in operations():
        for way, step in ways.items():
            torch.cuda.reset_peak_memory_stats()
            try:
                seconds = measure.best(step, o.repeats)[1]
            except torch.OutOfMemoryError as error:
                rows.append({"operation": operation, "way": way, "failed": str(error).splitlines()[0]})
                print(f"{operation:36} {way:8} failed: {rows[-1]['failed']}", flush=True)
                torch.cuda.empty_cache()
                continue
            memory = torch.cuda.max_memory_allocated() / 2 ** 20
            row = {"operation": operation, "way": way, "ms": round(1000 * seconds, 4), "tflop": flops / 1e12,
                   "gb": size / 1e9, "tflops": round(flops / seconds / 1e12, 1), "peak_mib": round(memory)}
            if peak:
                row["share_of_flops"] = round(flops / seconds / 1e12 / peak[0], 3)
                row["share_of_bytes"] = round(size / seconds / 1e12 / peak[1], 3)
            rows.append(row)
            print(f"{operation:36} {way:8} {row['ms']:9.3f} ms {row['tflops']:7.1f} TFLOP/s "
                  f"{size / seconds / 1e9:7.0f} GB/s {row['peak_mib']:7} MiB", flush=True)
    measure.write(o.out, rows=rows)


if __name__ == "__main__":
    main()
