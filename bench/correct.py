"""Kernels of this machine's device against float64: `python bench/correct.py [--out JSON]`. Exit code 1 if one is wrong.

What only a GPU can run (FlexAttention, varlen and FlashAttention, grouped_mm in one kernel, FP8 units) is compared, forward and
gradients, with the plain reference in float64 on the same rounded inputs. The error is the largest one relative to the largest
value; the bound is a few roundings of the dtype. What a device cannot run is listed with its reason.
"""

import argparse
import functools
import sys

import measure
import torch
import torch._dynamo

import deltas
import schedule
from kernels import attention, experts, symmetric, transpose
from kernels.attention import Window
from kernels.cross_entropy import linear_cross_entropy
from kernels.device import FP8_SINCE, refusal
from kernels.fp8_linear import fp8_linear, has_fp8_units, quantise
from kernels.fp8_mlp import E4M3, fp8_mlp, narrowed_rows, narrowed_weight
from kernels.linear_relu_sq import mlp_relu_sq, mlp_relu_sq_reference
from kernels.newton_schulz import newton_schulz
from kernels.qk_rotary import qk_rotary, qk_rotary_reference, qkv_rotary
from model import GPT
from optim import Engine
from settings import Softcap

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDING = {torch.bfloat16: 2 ** -8, torch.float16: 2 ** -11, torch.float32: 2 ** -20, torch.float64: 2 ** -48}


def relative(a, b):
    return ((a.detach().double() - b.detach().double()).abs().max() / b.detach().double().abs().max()).item()


def gradients(function, inputs, upstream):
    """[output, gradients of the inputs]."""
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs, upstream.to(y.dtype))]


def compare(function, reference, inputs, dtype):
    """Largest relative error of output and gradients in dtype against the reference in float64."""
    low = [x.to(dtype).detach().requires_grad_() for x in inputs]
    high = [x.detach().double().requires_grad_() for x in low]
    expected = reference(*high)
    upstream = torch.randn_like(expected)
    theirs = [expected, *torch.autograd.grad(expected, high, upstream)]
    return max(relative(a, b) for a, b in zip(gradients(function, low, upstream), theirs))


def attention_checks():
    """(name, error or reason) of every backend with every kind of window, with and without documents."""
    rows, tokens, heads = 2, 1024, 6
    starts = torch.randint(0, tokens, (rows, 6), device=DEVICE)
    documents = torch.zeros(rows, tokens, dtype=torch.int32, device=DEVICE).scatter_(1, starts, 1).cumsum(1, dtype=torch.int32)
    windows = {"causal": Window(), "300 tokens": Window(tokens=300), "3 blocks of 128": Window(blocks=3, block=128)}
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    for backend in attention.BACKENDS[1:]:
        for name, window in windows.items():
            for ids in (None, documents):
                for width, value in ((128, 128), (96, 64)):
                    label = f"attention {backend}, {name}, {'documents' if ids is not None else 'rows'}, widths {width} {value}"
                    try:
                        attention.choose(backend, DEVICE, documents=ids is not None, window=window, tokens=tokens, dtype=dtype)
                    except ValueError as error:
                        yield label, str(error), dtype
                        continue
                    shape = rows, tokens, heads, width, value
                    yield label, compare_attention(backend, ids, window, *shape, dtype), dtype
                    if backend in attention.FLASH:
                        error = compare_attention(backend, ids, window, *shape, dtype, compiled=True)
                        yield label + ", compiled", error, dtype


def compare_attention(backend, documents, window, rows, tokens, heads, width, value, dtype, compiled=False):
    """compiled: windows and scale in tensors, as a compiled model has them (attention.traceable)."""
    shape = {"rows": rows, "tokens": tokens, "device": DEVICE}
    fast = attention.view(documents, window, backend, dtype=dtype, **shape)
    if compiled:
        (fast,), _ = attention.traceable([fast], None, width)
        torch._dynamo.reset()  # it gives up on a function after eight graphs
    plain = attention.view(documents, window, "dense", dtype=torch.float64, **shape)
    inputs = [torch.randn(rows, tokens, heads, w, device=DEVICE) for w in (width, width, value)]
    attend = torch.compile(attention.attend, dynamic=False) if compiled else attention.attend
    return compare(lambda q, k, v: attend(q, k, v, fast), lambda q, k, v: attention.attend(q, k, v, plain), inputs, dtype)


def expert_checks():
    """grouped and padded against the float64 padded path, one expert of eight idle."""
    tokens, k, count, dim, hidden = 2048, 2, 8, 256, 512
    chosen = torch.stack([torch.randperm(count - 1, device=DEVICE)[:k] for _ in range(tokens)])
    inputs = [torch.randn(tokens, dim), torch.randn(count, hidden, dim) / 16, torch.randn(count, dim, hidden) / 16, torch.rand(tokens, k)]
    inputs = [x.to(DEVICE) for x in inputs]

    def layer(backend):
        p = experts.plan(chosen, count, backend)

        def run(x, up, down, gates):
            rows = experts.grouped_linear(torch.relu(experts.grouped_linear(experts.gather(x, p), up, p)).square(), down, p)
            return experts.combine(rows, gates, p)

        return run

    for dtype in (torch.bfloat16, torch.float32):
        for backend in experts.BACKENDS:
            yield f"experts {backend}", compare(layer(backend), layer("padded"), inputs, dtype), dtype


def triton_checks():
    """The Triton kernels against their references in float64, at shapes that no tile divides."""
    why = refusal(DEVICE, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, up, down = torch.randn(1000, 328, device=DEVICE), torch.randn(1304, 328) / 18, torch.randn(328, 1304) / 36
        up, down = up.to(DEVICE), down.to(DEVICE)
        yield "mlp_relu_sq", why or compare(mlp_relu_sq, mlp_relu_sq_reference, [x, up, down], dtype), dtype
        a = torch.randn(3, 328, 1304, device=DEVICE).to(dtype) / 36
        yield "newton_schulz step", why or relative(symmetric.step(a, 3.4, -4.8, 2.0),
                                                    symmetric.step_reference(a.double(), 3.4, -4.8, 2.0)), dtype
        targets = torch.randint(0, 5003, (1000,), device=DEVICE)
        head = torch.randn(5003, 328, device=DEVICE) / 18
        for softcap in (None, Softcap(), Softcap(form="sigmoid")):
            losses = [functools.partial(linear_cross_entropy, targets=targets, softcap=softcap, loss_dtype=exact, cap_dtype=exact,
                                        backend=backend) for exact, backend in ((torch.float32, "triton"), (torch.float64, "torch"))]
            name = f"linear_cross_entropy, soft cap {softcap.form if softcap else 'none'}"
            yield name, why or compare(*losses, [x, head], dtype), dtype


def rotary_checks():
    """QK norm, rotary and key offset; results and their gradients lie in one tensor, as qkv does, or q and k apart."""
    why = refusal(DEVICE, torch.bfloat16)
    for width, order, offset in ((128, "after_rope", 32), (128, "before_rope", 0), (64, None, 16), (96, "after_rope", 0)):
        angles = torch.rand(999, width // 2, device=DEVICE) * 6.3
        plan = {"order": order, "eps": 2 ** -7, "offset": offset}
        ours = {"cos": angles.cos(), "sin": angles.sin(), **plan}
        exact = {"cos": ours["cos"].double(), "sin": ours["sin"].double(), "norm_dtype": torch.float64, **plan}

        def joint(qkv):
            q, k, v = qkv.unbind(2)
            return torch.stack([*qk_rotary_reference(q, k, **exact), v], 2)

        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            qkv = torch.randn(3, 999, 3, 6, width, device=DEVICE)
            name = f"widths {width}, {order or 'no norm'}, offset {offset}"
            yield f"qkv_rotary, {name}", why or compare(
                lambda x: torch.stack(qkv_rotary(x, **ours), 2), joint, [qkv], dtype), dtype
            yield f"qk_rotary, {name}", why or compare(
                lambda q, k: torch.cat(qk_rotary(q, k, **ours)), lambda q, k: torch.cat(qk_rotary_reference(q, k, **exact)),
                [qkv[:, :, 0], qkv[:, :, 1].transpose(1, 2).contiguous().transpose(1, 2)], dtype), dtype


def fp8_check():
    """The 8-bit product of this device against the same quantised operands multiplied in float64."""
    x, w = torch.randn(256, 128, device=DEVICE).bfloat16(), torch.randn(512, 128, device=DEVICE).bfloat16() / 8
    y = fp8_linear(x, w, 2.0, 32.0, 8192.0)
    x8, w8 = (quantise(a, scale, torch.float8_e4m3fn).double() for a, scale in ((x, 2.0), (w, 32.0)))
    units = "FP8 units" if has_fp8_units(x) else "reference"
    return f"fp8_linear forward ({units})", relative(y, x8 @ w8.T / 64), torch.bfloat16


def fp8_mlp_checks():
    """y, P's maxima and all gradients of the MLP in FP8 against float64 on the same 8-bit operands and roundings of P.

    Sums that differ may round pre, P and its 8-bit copy to neighbours; a step of e4m3 is 1/16, in y one term of many."""
    x, up, down = (torch.randn(1024, 320, device=DEVICE), torch.randn(1296, 320, device=DEVICE) / 18,
                   torch.randn(336, 1296, device=DEVICE) / 36)
    x[512:] *= 5  # two logical ranks
    for dtype in (torch.bfloat16, torch.float32)[:1 + (not has_fp8_units(x))]:  # their fast sums are coarser than float32
        inputs = [t.to(dtype).requires_grad_() for t in (x, up, down)]
        wide = [t.detach().double() for t in inputs]
        (x8, sx), (u8, su) = narrowed_rows(inputs[0].detach(), 2), narrowed_weight(inputs[1].detach())
        pre = (x8.double() @ u8.double().T) * (sx * su).double().repeat_interleave(512)[:, None]
        p = (pre.to(dtype).double().clamp(min=0) ** 2).to(dtype)
        scales = 1.8 * p.unflatten(0, (2, -1)).amax((1, 2)).float() / 448, narrowed_weight(inputs[2].detach())[1]
        p8 = quantise(p.unflatten(0, (2, -1)), 1 / scales[0][:, None, None], E4M3).flatten(0, 1).double()
        d8 = quantise(inputs[2].detach(), 1 / scales[1], E4M3).double()
        both = (p8 @ d8.T) * (scales[0] * scales[1]).double().repeat_interleave(512)[:, None]
        g = torch.randn_like(both)
        dpre, p = 2 * (g.to(dtype).double() @ wide[2]) * p.double().sqrt(), p.double()
        slopes = [dpre @ wide[1], dpre.T @ wide[0], g.to(dtype).double().T @ p]
        for name, given, y in (("up", None, p @ wide[2].T), ("up and down", scales, both)):
            for fused in (False, True):
                why = fused and refusal(DEVICE, dtype, FP8_SINCE)
                label = f"fp8_mlp {name}, {'fused' if fused else 'FP8 units' if has_fp8_units(x) else 'reference'}"
                found = None if why else gradients(lambda *t: fp8_mlp(*t, 2, given, fused)[0], inputs, g)
                yield label, why or max(relative(a, b) for a, b in zip(found, [y, *slopes])), dtype


def transpose_checks():
    """Bit by bit (errors 0 or 1), and the sum within a rounding."""
    why = refusal(DEVICE, torch.float32)
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.float32):
        x = torch.randint(0, 256, (1000, 1304 * dtype.itemsize), dtype=torch.uint8, device=DEVICE).view(dtype)
        for name, y in (("rows", x), ("a transpose", x[:, :333].t())):
            same = why or float(not torch.equal(*(t.view(torch.uint8) for t in (
                transpose.transpose_copy(y), transpose.transpose_copy_reference(y)))))
            yield f"transpose_copy of {name}", same, dtype
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(1000, 328, device=DEVICE).to(dtype), torch.randn(328, 1000, device=DEVICE)
        expected = a.double() + b.double().t()
        yield "transpose_add", why or relative(transpose.transpose_add(a, b), expected), dtype


def muon_check():
    """Newton-Schulz in bfloat16 against float64: five steps of a growing iteration, so a looser bound."""
    g = torch.randn(4, 256, 1024, device=DEVICE)
    exact = newton_schulz(g, dtype=torch.float64, norm_dtype=torch.float64)
    return "newton_schulz", relative(newton_schulz(g), exact) / 16, torch.bfloat16


def graph_check(ref, precision):
    """Six updates of the optimizer replayed from CUDA graphs against the same done one by one, on equal gradients."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    if DEVICE.type != "cuda":
        return f"optimizer of {ref} as CUDA graphs", "needs CUDA, and this is cpu", dtype
    ends = []
    for graphs in ("false", "true"):
        s = deltas.resolve(ref, scale="micro", sets=[f"system.precision={precision}", f"system.cuda_graphs={graphs}"]).settings
        model = GPT(s).to(DEVICE)
        model.initialise(0)
        engine = Engine(model, s, compiled=True)
        for i, plan in enumerate(schedule.plan(s)[:6]):
            generator = torch.Generator(DEVICE).manual_seed(i)
            for bank in engine.banks:
                bank.grad.normal_(0.0, 0.01, generator=generator)
            engine.step(plan)
        ends.append(torch.cat([p.detach().flatten().double() for p in model.parameters()]))
    return f"optimizer of {ref} as CUDA graphs", relative(*ends), dtype


def main():
    p = argparse.ArgumentParser(prog="bench/correct.py", description=__doc__.splitlines()[0])
    p.add_argument("--out", metavar="JSON", help="also write the figures here")
    o = p.parse_args()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # FlexAttention: beyond it an eager one would run, and say nothing
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    rows, wrong = [], 0
    for name, found, dtype in [*attention_checks(), *expert_checks(), *triton_checks(), *rotary_checks(), fp8_check(),
                               *fp8_mlp_checks(), *transpose_checks(), muon_check(),
                               *(graph_check(ref, p) for ref in ("short/11", "short/33") for p in ("float32", "record"))]:
        kind = str(dtype).removeprefix("torch.")
        if isinstance(found, str):
            rows.append({"check": name, "dtype": kind, "not_run": found})
            continue
        bound = 8 * ROUNDING.get(dtype, 0.0)  # 8 bits are only copied
        wrong += not found <= bound
        rows.append({"check": name, "dtype": kind, "error": found, "bound": bound})
        print(f"{'ok   ' if found <= bound else 'WRONG'} {name}, {kind}: {found:.1e} (bound {bound:.1e})", flush=True)
    skipped = sorted({r["not_run"] for r in rows if "not_run" in r})
    print(*(f"not run here: {reason}" for reason in skipped), sep="\n")
    print(f"{len(rows) - sum('not_run' in r for r in rows)} checks, {wrong} wrong")
    measure.write(o.out, rows=rows)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
