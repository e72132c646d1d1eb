"""Kernels of this device against float64: `python bench/correct.py [--only GROUP ...] [--out JSON]`.

Exit code 1 if one is wrong or fails.

What only a GPU can run (FlexAttention, varlen and FlashAttention, grouped_mm in one kernel, FP8 units, our
kernels as operators of torch.compile, tensors of more than 2^31 elements) is compared, forward and gradients,
with the plain reference in float64 on the same rounded inputs. The error is the largest one relative to the
largest value; the bound is a few roundings of the dtype. What a device cannot run is listed with its reason.
"""

import functools
import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import measure  # first: it finds the repository
import report
import torch

import schedule
from common import arguments, console, null_device
from kernels import attention, experts, symmetric, transpose
from kernels import linear_relu_sq as relu_sq
from kernels.attention import Window
from kernels.cross_entropy import linear_cross_entropy
from kernels.device import FP8_SINCE, refusal
from kernels.fp8_linear import fp8_linear, has_fp8_units, quantise
from kernels.fp8_mlp import E4M3, fp8_mlp, narrowed_rows, narrowed_weight
from kernels.linear_relu_sq import (
    linear_relu_sq, linear_relu_sq_reference, mlp_relu_sq, mlp_relu_sq_reference
)
from kernels.newton_schulz import newton_schulz
from kernels.qk_rotary import qk_rotary, qk_rotary_reference, qkv_rotary
from model import GPT
from optim import Optimizer
from settings import deltas
from settings.model import Softcap

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20, torch.float64: 2**-48}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference of two tensors, divided by the largest |b|."""
    return ((a.detach().double() - b.detach().double()).abs().max() / b.detach().double().abs().max()).item()


def worst(errors: Iterable[float]) -> float:
    """The largest of some errors; NaN if one is, which max() may pass over."""
    found = list(errors)
    return next((error for error in found if math.isnan(error)), max(found))


def worst_of(
    found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor],
    measure: Callable[[torch.Tensor, torch.Tensor], float] = relative
) -> float:
    """The largest error of some tensors against those expected. measure: relative or spread."""
    return worst(measure(a, b) for a, b in zip(found, expected, strict=True))


def gradients(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], upstream: torch.Tensor
) -> list[torch.Tensor]:
    """[output, gradients of the inputs]."""
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs, upstream.to(y.dtype))]


def compare(
    function: Callable[..., torch.Tensor], reference: Callable[..., torch.Tensor], inputs: list[torch.Tensor],
    dtype: torch.dtype
) -> float:
    """Largest relative error of output and gradients in dtype against the reference in float64."""
    low = [x.to(dtype).detach().requires_grad_() for x in inputs]
    high = [x.detach().double().requires_grad_() for x in low]
    expected = reference(*high)
    upstream = torch.randn_like(expected)
    theirs = [expected, *torch.autograd.grad(expected, high, upstream)]
    return worst_of(gradients(function, low, upstream), theirs)


# Each group yields (name, dtype, check): a function that gives the error, or a text: why it is not run here.
# Fourth, where it is not a few roundings of the dtype, the bound.

def unless(why: str | bool | None, measure: Callable[..., float], *args) -> Callable[[], float | str]:
    """A check: the function that gives `why`, a reason not to run it, or without a reason measure(*args)."""
    return lambda: why or measure(*args)


def attention_checks() -> Iterator[tuple]:
    """Every backend with every kind of window, with and without documents, and once with unequal widths."""
    rows, tokens, heads = 2, 1024, 6
    starts = torch.randint(0, tokens, (rows, 6))
    documents = torch.zeros(rows, tokens, dtype=torch.int32).scatter_(1, starts, 1)
    documents = documents.cumsum(1, dtype=torch.int32)
    number = int(attention.begins_document(documents).sum())  # counted on the host, as a training does
    documents = documents.to(DEVICE)
    windows = {
        "causal": Window(), "300 tokens": Window(tokens=300), "3 blocks of 128": Window(blocks=3, block=128)
    }
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    kinds = [(name, ids, (128, 128)) for name in windows for ids in (None, documents)]
    kinds.append(("300 tokens", documents, (96, 64)))
    for compiled in (False, True):
        for backend in attention.FLASH if compiled else attention.BACKENDS[1:]:
            for name, ids, widths in kinds:
                what = f"{name}, {'documents' if ids is not None else 'rows'}, widths {widths[0]} {widths[1]}"
                yield (
                    f"attention {backend}, {what}{', compiled' if compiled else ''}", dtype,
                    functools.partial(
                        compare_attention, backend, ids, windows[name], rows, tokens, heads, *widths, dtype,
                        compiled, None if ids is None else number
                    )
                )


def compare_attention(
    backend: str, documents: torch.Tensor | None, window: Window, rows: int, tokens: int, heads: int,
    width: int, value: int, dtype: torch.dtype, compiled: bool = False, max_docs: int | None = None
) -> float | str:
    """compiled: windows and scale in tensors, as a compiled model has them (attention.traceable)."""
    if backend == "documents" and not null_device.computes():
        return "reads the documents' sizes from the device, and this one computes nothing"
    try:
        attention.choose(
            backend, DEVICE, documents=documents is not None, window=window, tokens=tokens, dtype=dtype
        )
    except ValueError as error:
        return str(error)
    shape = {"rows": rows, "tokens": tokens, "device": DEVICE}
    fast = attention.view(documents, window, backend, dtype=dtype, max_docs=max_docs, **shape)
    if compiled:
        ((fast, _),) = attention.traceable([fast], None, width)  # the scale is in the plan
    plain = attention.view(documents, window, "dense", dtype=torch.float64, **shape)
    inputs = [torch.randn(rows, tokens, heads, w, device=DEVICE) for w in (width, width, value)]
    attend = torch.compile(attention.attend, dynamic=False) if compiled else attention.attend
    return compare(
        lambda q, k, v: attend(q, k, v, fast), lambda q, k, v: attention.attend(q, k, v, plain), inputs, dtype
    )


def expert_checks() -> Iterator[tuple]:
    """grouped and padded against the float64 padded path, one expert of eight idle."""
    tokens, k, count, dim, hidden = 2048, 2, 8, 256, 512
    chosen = torch.stack([torch.randperm(count - 1, device=DEVICE)[:k] for _ in range(tokens)])
    inputs = [
        torch.randn(tokens, dim), torch.randn(count, hidden, dim) / 16, torch.randn(count, dim, hidden) / 16,
        torch.rand(tokens, k)
    ]
    inputs = [x.to(DEVICE) for x in inputs]

    def layer(backend):
        p = experts.plan(chosen, count, backend)

        def run(x, up, down, gates):
            rows = experts.grouped_linear(
                torch.relu(experts.grouped_linear(experts.gather(x, p), up, p)).square(), down, p
            )
            return experts.combine(rows, gates, p)

        return run

    def error(backend, dtype):
        return compare(layer(backend), layer("padded"), inputs, dtype)

    for dtype in (torch.bfloat16, torch.float32):
        for backend in experts.BACKENDS:
            yield f"experts {backend}", dtype, functools.partial(error, backend, dtype)


def mlp_checks() -> Iterator[tuple]:
    """The layer and the MLP with relu^2 at shapes that no tile divides."""
    why = refusal(DEVICE, torch.bfloat16)
    x, up, down = (torch.randn(1000, 328, device=DEVICE), torch.randn(1304, 328, device=DEVICE) / 18,
                   torch.randn(328, 1304, device=DEVICE) / 36)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield (
            "mlp_relu_sq", dtype,
            unless(why, compare, mlp_relu_sq, mlp_relu_sq_reference, [x, up, down], dtype)
        )
        yield (
            "linear_relu_sq", dtype,
            unless(why, compare, linear_relu_sq, linear_relu_sq_reference, [x, up], dtype)
        )


def muon_checks() -> Iterator[tuple]:
    """A fused step; and Newton-Schulz in bfloat16: five steps of a growing iteration, so a looser bound."""
    why = refusal(DEVICE, torch.bfloat16)
    g = torch.randn(4, 256, 1024, device=DEVICE)
    exact = newton_schulz(g, dtype=torch.float64, norm_dtype=torch.float64)

    def step_error(a):
        coefficients = 3.4, -4.8, 2.0
        return relative(symmetric.step(a, *coefficients), symmetric.step_reference(a.double(), *coefficients))

    def error(fused):
        return relative(newton_schulz(g, fused=fused), exact)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a = torch.randn(3, 328, 1304, device=DEVICE).to(dtype) / 36
        yield "newton_schulz step", dtype, unless(why, step_error, a)
    for fused in (False, True):
        yield (
            f"newton_schulz{', fused' if fused else ''}", torch.bfloat16,
            unless(fused and why, error, fused), 128 * ROUNDING[torch.bfloat16]
        )


def loss_pair(targets: torch.Tensor, **how) -> list[Callable[..., torch.Tensor]]:
    """(the Triton loss of x and weight, the reference in float64)."""
    return [
        functools.partial(
            linear_cross_entropy, targets=targets, loss_dtype=exact, cap_dtype=exact, backend=backend, **how
        )
        for exact, backend in ((torch.float32, "triton"), (torch.float64, "torch"))
    ]


def loss_checks() -> Iterator[tuple]:
    """Soft caps; several targets, a prefix target, and places without one."""
    why = refusal(DEVICE, torch.bfloat16)
    targets = torch.randint(0, 5003, (1000,), device=DEVICE)
    x, head = torch.randn(1000, 328, device=DEVICE), torch.randn(5003, 328, device=DEVICE) / 18
    rows = targets.view(4, 250).masked_fill(torch.rand(4, 250, device=DEVICE) < 0.1, -1)
    more = {"weights": (1.0, 0.5, 0.25), "prefix": targets.flip(0).view(4, 250), "prefix_weight": 0.3}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for softcap in (None, Softcap(), Softcap(form="sigmoid"), Softcap("sigmoid", 23.0, 7.5, 5.0)):
            shifted = " with a shift" if softcap and softcap.shift else ""
            name = f"linear_cross_entropy, soft cap {softcap.form if softcap else 'none'}{shifted}"
            yield name, dtype, unless(why, compare, *loss_pair(targets, softcap=softcap), [x, head], dtype)
        for full_mass in (False, True):
            name = f"linear_cross_entropy, 3 targets and a prefix{', full mass' if full_mass else ''}"
            pair = loss_pair(
                rows, softcap=Softcap(form="sigmoid"), full_mass=full_mass, logit_scale=0.5, **more
            )
            yield name, dtype, unless(why, compare, *pair, [x.view(4, 250, 328), head], dtype)


def joined(rotate: Callable, qkv: torch.Tensor, **how) -> torch.Tensor:
    """q, k and v in one tensor (R, T, 3, H, K), of which `rotate` turns q and k, again in one."""
    q, k, v = qkv.unbind(2)
    return torch.stack([*rotate(q, k, **how), v], 2)


def joined_fused(qkv: torch.Tensor, **how) -> torch.Tensor:
    """The same by qkv_rotary."""
    return torch.stack(qkv_rotary(qkv, **how), 2)


def stacked(rotate: Callable, q: torch.Tensor, k: torch.Tensor, **how) -> torch.Tensor:
    """q and k (R, T, H, K) turned by `rotate`, along R in one tensor."""
    return torch.cat(rotate(q, k, **how))


def rotary_checks() -> Iterator[tuple]:
    """QK norm, rotary and key offset, with q, k and v in one tensor (qkv) or with q and k apart."""
    why = refusal(DEVICE, torch.bfloat16)
    for width, order, offset in (
        (128, "after_rope", 32), (128, "before_rope", 0), (64, None, 16), (96, "after_rope", 0)
    ):
        angles = torch.rand(999, width // 2, device=DEVICE) * 6.3
        plan = {"order": order, "eps": 2 ** -7, "offset": offset}
        ours = {"cos": angles.cos(), "sin": angles.sin(), **plan}
        exact = {
            "cos": ours["cos"].double(), "sin": ours["sin"].double(), "norm_dtype": torch.float64, **plan
        }
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            qkv = torch.randn(3, 999, 3, 6, width, device=DEVICE)
            name = f"widths {width}, {order or 'no norm'}, offset {offset}"
            apart = [qkv[:, :, 0], qkv[:, :, 1].transpose(1, 2).contiguous().transpose(1, 2)]
            yield f"qkv_rotary, {name}", dtype, unless(
                why, compare, functools.partial(joined_fused, **ours),
                functools.partial(joined, qk_rotary_reference, **exact), [qkv], dtype
            )
            yield f"qk_rotary, {name}", dtype, unless(
                why, compare, functools.partial(stacked, qk_rotary, **ours),
                functools.partial(stacked, qk_rotary_reference, **exact), apart, dtype
            )


def scaled8(x: torch.Tensor, scale: float, dtype: torch.dtype = E4M3) -> torch.Tensor:
    """x as 8 bits have it, in float64, times scale."""
    return quantise(x.detach(), scale, dtype).double()


def fp8_linear_checks() -> Iterator[tuple]:
    """The three FP8 products (forward, dx, dw) against float64 products of equal quantised operands."""
    x, w = (
        torch.randn(256, 128, device=DEVICE).bfloat16(),
        torch.randn(512, 128, device=DEVICE).bfloat16() / 8,
    )
    g, scales = torch.randn(256, 512, device=DEVICE).bfloat16(), (2.0, 32.0, 8192.0)
    x8, w8, g8 = scaled8(x, 2.0), scaled8(w, 32.0), scaled8(g, 8192.0, torch.float8_e5m2)
    exact = x8 @ w8.T / 64, g8 @ w8 / (8192 * 32), g8.T @ x8 / (8192 * 2)
    units = "FP8 units" if has_fp8_units(x) else "reference"
    inputs = [x.requires_grad_(), w.requires_grad_()]

    def layer(by):
        def product(a, b):
            return fp8_linear(a, b, *scales, by)

        return product

    def error(by, i):
        return relative(gradients(layer(by), inputs, g)[i], exact[i])

    def compiled_error(by):
        return worst_of(gradients(torch.compile(layer(by), dynamic=False), inputs, g), exact)

    for by in ("torch", "triton"):
        why = by == "triton" and refusal(DEVICE, torch.bfloat16, FP8_SINCE)
        for i, part in enumerate(("y", "dx", "dw")):
            yield (
                f"fp8_linear {part} ({units}), transposes by {by}", torch.bfloat16, unless(why, error, by, i)
            )
        yield (
            f"fp8_linear, transposes by {by}, compiled", torch.bfloat16,
            unless(why or uncompiled(), compiled_error, by)
        )


def uncompiled() -> str | None:
    """Why nothing is compiled on this device, or None.

    It takes minutes on a CPU, whose compiler tests/test_compiler.py tests.
    """
    return None if DEVICE.type == "cuda" else "compiled kernels are checked on CUDA"


def spread(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative error of a whole tensor (norms).

    An element that is rounded to the neighbouring 8-bit value would dominate a largest error.
    """
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm()).item()


def fp8_loss_checks() -> Iterator[tuple]:
    """The FP8 head against float64 with logits rounded to bfloat16 and the gradient to e5m2 (record 19).

    Sums in another order round one logit in twenty, and so one gradient in about a hundred, to the
    neighbouring value, which is an eighth to a quarter off; so the bound is 2^-5 of the whole tensor's norm.
    Triton's interpreter is not checked, because its cast to e5m2 rounds differently.
    """
    dtype, scales, softcap = torch.bfloat16, (2.0, 32.0, 2.0 ** 15), Softcap(form="sigmoid")
    x, w = (
        torch.randn(1024, 320, device=DEVICE).to(dtype),
        torch.randn(5008, 320, device=DEVICE).to(dtype) / 18,
    )
    targets = torch.randint(0, 5008, (1024,), device=DEVICE)
    x8, w8, g = scaled8(x, scales[0]), scaled8(w, scales[1]), torch.rand(1024, device=DEVICE) + 0.5
    z = (x8 @ w8.T / (scales[0] * scales[1])).to(dtype).double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(
        softcap.cap * torch.sigmoid(z / softcap.scale), targets, reduction="none"
    )
    d8 = scaled8(torch.autograd.grad(losses, z, g.double())[0].to(dtype), scales[2], torch.float8_e5m2)
    exact = losses, d8 @ w8 / (scales[2] * scales[1]), d8.T @ x8 / (scales[2] * scales[0])
    inputs = [x.requires_grad_(), w.requires_grad_()]

    def error(backend, i):
        loss = functools.partial(
            linear_cross_entropy, targets=targets, softcap=softcap, fp8=scales, backend=backend,
            transpose=backend
        )
        return spread(gradients(loss, inputs, g)[i], exact[i])

    for backend in ("torch", "triton"):
        why = backend == "triton" and refusal(DEVICE, dtype, FP8_SINCE)
        for i, part in enumerate(("losses", "dx", "dw")):
            name = f"linear_cross_entropy in FP8, {part}, {backend}"
            yield name, dtype, unless(why, error, backend, i), 2 ** -5


def fp8_mlp_of(scales: tuple[torch.Tensor, torch.Tensor] | None, fused: bool) -> Callable[..., torch.Tensor]:
    """The FP8 MLP of two logical ranks as a function of (x, up, down)."""
    def layer(*inputs):
        return fp8_mlp(*inputs, 2, scales, fused)[0]

    return layer


def fp8_mlp_error(
    scales: tuple[torch.Tensor, torch.Tensor] | None, fused: bool, inputs: list[torch.Tensor],
    upstream: torch.Tensor, expected: list[torch.Tensor]
) -> float:
    """Largest relative error of y and the gradients. expected: y and the gradients by `upstream`."""
    return worst_of(gradients(fp8_mlp_of(scales, fused), inputs, upstream), expected)


def fp8_mlp_checks() -> Iterator[tuple]:
    """y, maxima of P and all gradients of the FP8 MLP against float64.

    Both have the same 8-bit operands and roundings of P. Sums in another order may round pre, P and its 8-bit
    copy to neighbouring values. A step of e4m3 is 1/16, but only in one of the many terms of y.
    """
    x, up, down = (torch.randn(1024, 320, device=DEVICE), torch.randn(1296, 320, device=DEVICE) / 18,
                   torch.randn(336, 1296, device=DEVICE) / 36)
    x[512:] *= 5  # two logical ranks
    # their fast sums are coarser than float32
    for dtype in (torch.bfloat16, torch.float32)[:1 + (not has_fp8_units(x))]:
        inputs = [t.to(dtype).requires_grad_() for t in (x, up, down)]
        wide = [t.detach().double() for t in inputs]
        (x8, sx), (u8, su) = narrowed_rows(inputs[0].detach(), 2), narrowed_weight(inputs[1].detach())
        pre = (x8.double() @ u8.double().T) * (sx * su).double().repeat_interleave(512)[:, None]
        p = (pre.to(dtype).double().clamp(min=0) ** 2).to(dtype)
        scales = (
            1.8 * p.unflatten(0, (2, -1)).amax((1, 2)).float() / 448,
            narrowed_weight(inputs[2].detach())[1],
        )
        p8 = quantise(p.unflatten(0, (2, -1)), 1 / scales[0][:, None, None], E4M3).flatten(0, 1).double()
        d8 = quantise(inputs[2].detach(), 1 / scales[1], E4M3).double()
        both = (p8 @ d8.T) * (scales[0] * scales[1]).double().repeat_interleave(512)[:, None]
        g = torch.randn_like(both)
        dpre, p = 2 * (g.to(dtype).double() @ wide[2]) * p.double().sqrt(), p.double()
        slopes = [dpre @ wide[1], dpre.T @ wide[0], g.to(dtype).double().T @ p]
        for name, given, y in (("up", None, p @ wide[2].T), ("up and down", scales, both)):
            for fused in (False, True):
                why = fused and refusal(DEVICE, dtype, FP8_SINCE)
                how = "fused" if fused else "FP8 units" if has_fp8_units(x) else "reference"
                yield (
                    f"fp8_mlp {name}, {how}", dtype,
                    unless(why, fp8_mlp_error, given, fused, inputs, g, [y, *slopes])
                )


def transpose_error(x: torch.Tensor) -> float:
    """0.0 if transpose_copy has the reference's bits, otherwise 1.0."""
    found, expected = transpose.transpose_copy(x), transpose.transpose_copy_reference(x)
    return float(not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)))


def transpose_checks() -> Iterator[tuple]:
    """Bit by bit: errors are 0 or 1."""
    why = refusal(DEVICE, torch.float32)
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.float32):
        x = torch.randint(0, 256, (1000, 1304 * dtype.itemsize), dtype=torch.uint8, device=DEVICE).view(dtype)
        for name, y in (("rows", x), ("a transpose", x[:, :333].t())):
            yield f"transpose_copy of {name}", dtype, unless(why, transpose_error, y), 0.0


def compiled_checks() -> Iterator[tuple]:
    """Our operators inside torch.compile, as the trainer compiles the model around them, in bfloat16."""
    dtype, targets = torch.bfloat16, torch.randint(0, 5008, (1024,), device=DEVICE)
    why = refusal(DEVICE, dtype) or uncompiled()
    x, up, down, head = (torch.randn(*shape, device=DEVICE) / shape[-1] ** power for *shape, power in (
        (1024, 320, 0), (1296, 320, 0.5), (320, 1296, 0.5), (5008, 320, 0.5)))
    angles, qkv = torch.rand(1024, 64, device=DEVICE) * 6.3, torch.randn(2, 1024, 3, 2, 128, device=DEVICE)
    plan = {"order": "before_rope", "eps": 2 ** -7, "offset": 32}

    def rotated(qkv):
        return joined_fused(qkv, cos=angles.cos(), sin=angles.sin(), **plan)

    def rotated_exactly(qkv):
        tables = {"cos": angles.cos().double(), "sin": angles.sin().double()}
        return joined(qk_rotary_reference, qkv, **tables, norm_dtype=torch.float64, **plan)

    def around(layer):
        """The layer with something for the compiler before and behind it."""
        def surrounded(x, *rest):
            return layer(2 * x, *rest) + 1

        return surrounded

    def error(ours, exact, inputs):
        return compare(torch.compile(around(ours), dynamic=False), around(exact), inputs, dtype)

    for name, ours, exact, inputs in (
        ("mlp_relu_sq", mlp_relu_sq, mlp_relu_sq_reference, [x, up, down]),
        ("linear_relu_sq", linear_relu_sq, linear_relu_sq_reference, [x, up]),
        ("linear_cross_entropy", *loss_pair(targets, softcap=Softcap(form="sigmoid")), [x, head]),
        ("qkv_rotary", rotated, rotated_exactly, [qkv])
    ):
        yield f"{name}, compiled", dtype, unless(why, error, ours, exact, inputs)
    g = torch.randn(4, 256, 1024, device=DEVICE)
    orthogonal = newton_schulz(g, dtype=torch.float64, norm_dtype=torch.float64)

    def newton_schulz_error():
        return relative(torch.compile(newton_schulz, dynamic=False)(g, fused=True), orthogonal)

    yield "newton_schulz, fused, compiled", dtype, unless(why, newton_schulz_error), 128 * ROUNDING[dtype]
    w = torch.randn(1024, 320, device=DEVICE).to(dtype)
    scale = torch.full((2,), 0.1, device=DEVICE), torch.full((), 1e-3, device=DEVICE)
    inputs = [t.to(dtype).requires_grad_() for t in (w, up, down)]
    why = refusal(DEVICE, dtype, FP8_SINCE) or uncompiled()

    def fp8_error(scales):
        """Against the same one not compiled, which fp8_mlp_checks compare with float64."""
        layer, upstream = fp8_mlp_of(scales, True), torch.ones_like(w)
        found = gradients(torch.compile(layer, dynamic=False), inputs, upstream)
        return worst_of(found, gradients(layer, inputs, upstream), spread)

    for name, scales in (("up", None), ("up and down", scale)):
        yield f"fp8_mlp {name}, fused, compiled", dtype, unless(why, fp8_error, scales), 2 ** -5


def room(gib: int) -> str | None:
    """Why a check of this size is not run here, or None."""
    if DEVICE.type != "cuda":
        return f"needs {gib} GiB of a GPU"
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(DEVICE)[0] / 2 ** 30
    return None if free >= gib else f"needs {gib} GiB of a GPU, and {free:.0f} are free"


def large_checks() -> Iterator[tuple]:
    """Offsets of more than 2^31 elements, against torch in pieces of which none is that large. Bit by bit:
    errors 0 or 1."""
    tokens, classes = 49152, 50304
    for dtype, gib in ((torch.uint8, 8), (torch.bfloat16, 14)):
        check = functools.partial(within, gib, large_transpose, tokens, classes, dtype)
        yield f"transpose_copy of {tokens} x {classes}", dtype, check, 0.0
    for name, gib, measure, *size in (
        (f"linear_cross_entropy of {tokens} x {classes} at once", 24, large_loss, tokens, classes),
        ("linear_relu_sq of 720000 x 3072", 24, large_relu_sq, 720_000, 64, 3072),
        ("qkv_rotary of 960000 tokens", 30, large_rotary, 960_000, 6, 128)
    ):
        yield name, torch.bfloat16, functools.partial(within, gib, measure, *size)


def within(gib: int, measure: Callable[..., float], *size) -> float | str:
    """measure(*size), or why so much memory is not here."""
    return room(gib) or measure(*size)


def large_transpose(m: int, n: int, dtype: torch.dtype) -> float:
    """0.0 if transpose_copy of an (m, n) matrix is exact, otherwise 1.0."""
    x = torch.randint(0, 256, (m, n * dtype.itemsize), dtype=torch.uint8, device=DEVICE).view(dtype)
    y, whole = transpose.transpose_copy(x).view(torch.int8 if dtype.itemsize == 1 else torch.int16), True
    for first in range(0, m, 4096):
        part = slice(first, first + 4096)
        whole &= torch.equal(y[:, part], x[part].view(y.dtype).t())
    return float(not whole)


def large_loss(tokens: int, classes: int, dim: int = 768) -> float:
    """All logits in one chunk of the kernels, against float32 products of the same operands."""
    inputs = [(torch.randn(n, dim, device=DEVICE) / scale).bfloat16().requires_grad_()
              for n, scale in ((tokens, 1), (classes, dim ** 0.5))]
    wide = [t.detach().float().requires_grad_() for t in inputs]
    how = {"targets": torch.randint(0, classes, (tokens,), device=DEVICE), "softcap": Softcap(form="sigmoid")}
    g = torch.rand(tokens, device=DEVICE)
    loss = functools.partial(linear_cross_entropy, **how)
    ours = gradients(functools.partial(loss, backend="triton", chunk=tokens), inputs, g)
    exact = gradients(functools.partial(loss, backend="torch", chunk=1024), wide, g)
    return worst_of(ours, exact)


def pieces(tokens: int) -> list[slice]:
    """The first, those around element 2^31 and the last: slices of 4,096 tokens."""
    return [slice(first, first + 4096) for first in (0, tokens * 97 // 100, tokens - 4096)]


def large_relu_sq(tokens: int, dim: int, hidden: int) -> float:
    """P, and 2 dP sqrt(P) of the elementwise gradient."""
    x, w = (
        torch.randn(tokens, dim, device=DEVICE).bfloat16(),
        torch.randn(hidden, dim, device=DEVICE).bfloat16() / 8,
    )
    p = relu_sq.forward(x, w)
    d = relu_sq.gradient(p, p)
    errors = [
        relative(p[part], linear_relu_sq_reference(x[part].double(), w.double())) for part in pieces(tokens)
    ]
    errors += [relative(d[part], 2 * p[part].double() ** 1.5) for part in pieces(tokens)]
    return worst(errors)


def large_rotary(tokens: int, heads: int, width: int) -> float:
    """Largest relative error of q and k against float64, in the slices of `pieces`."""
    qkv = torch.randn(1, tokens, 3, heads, width, device=DEVICE, dtype=torch.bfloat16)
    angles = torch.rand(tokens, width // 2, device=DEVICE)
    q, k, _ = qkv_rotary(qkv, angles.cos(), angles.sin(), order="before_rope", eps=1e-6)
    errors = []
    for part in pieces(tokens):
        tables = angles[part].cos().double(), angles[part].sin().double()
        exact = qk_rotary_reference(
            *qkv[:, part].double().unbind(2)[:2], *tables, order="before_rope", eps=1e-6,
            norm_dtype=torch.float64
        )
        errors += [relative(a[:, part], b) for a, b in zip((q, k), exact)]
    return worst(errors)


def graph_checks() -> Iterator[tuple]:
    """Six optimizer updates with CUDA graphs against six without, on equal gradients."""
    for ref in ("short/11", "short/33"):
        for precision, dtype in (("float32", torch.float32), ("record", torch.bfloat16)):
            yield (
                f"optimizer of {ref} as CUDA graphs", dtype, functools.partial(graph_error, ref, precision)
            )


def graph_error(ref: str, precision: str) -> float | str:
    """Relative difference of the parameters after six updates with and without CUDA graphs.

    Without CUDA: the reason why it was not run (str).
    """
    if DEVICE.type != "cuda":
        return "needs CUDA, and this is cpu"
    ends = []
    for graphs in ("false", "true"):
        s = deltas.resolve(
            ref, scale="micro", sets=[f"system.precision={precision}", f"system.cuda_graphs={graphs}"]
        ).settings
        model = GPT(s).to(DEVICE)
        model.initialise(0)
        optimizer = Optimizer(model, s, compiled=True)
        for i, plan in enumerate(schedule.plan(s)[:6]):
            generator = torch.Generator(DEVICE).manual_seed(i)
            for bank in optimizer.banks:
                bank.grad.normal_(0.0, 0.01, generator=generator)
            optimizer.step(plan)
        ends.append(torch.cat([p.detach().flatten().double() for p in model.parameters()]))
    return relative(*ends)


# in the order in which they are worth having; the last ones wait longest for the compiler
GROUPS = {
    "mlp": mlp_checks, "muon": muon_checks, "loss": loss_checks, "rotary": rotary_checks,
    "fp8_mlp": fp8_mlp_checks, "fp8_loss": fp8_loss_checks, "transpose": transpose_checks,
    "large": large_checks, "experts": expert_checks, "attention": attention_checks,
    "fp8_linear": fp8_linear_checks, "compiled": compiled_checks, "graphs": graph_checks
}


def judged(
    checks: Callable[[], Iterable[tuple]], wanted: Callable[[str, torch.dtype], bool] | None = None,
    rehearse: bool = False
) -> Iterator[tuple[dict, Callable]]:
    """Cases of bench/report.py from those of a group; an error above the bound, or NaN, is a failure.
    wanted: function of (name, dtype) that says which checks are made; None: all. rehearse: errors mean
    nothing, as on a device that computes nothing."""
    for name, dtype, check, *bound in checks():
        if wanted is not None and not wanted(name, dtype):
            continue
        bound = bound[0] if bound else 8 * ROUNDING[dtype]

        def case():
            torch._dynamo.reset()  # it gives up on a function after some graphs
            found = check()
            if isinstance(found, str):
                return {"not_run": found}
            if rehearse:
                return {"ran": True}
            row = {"error": found, "bound": bound}
            return (
                row if found <= bound else {**row, "failed": f"wrong: error {found:.1e}, bound {bound:.1e}"}
            )

        yield {"check": name, "dtype": str(dtype).removeprefix("torch.")}, case


def show(row: dict) -> str:
    """The printed line of a row."""
    if "not_run" in row:
        return f"-     {row['check']}, {row['dtype']}: not run here: {row['not_run']}"
    if "ran" in row:
        return f"ran   {row['check']}, {row['dtype']}"
    return f"ok    {row['check']}, {row['dtype']}: {row['error']:.1e} (bound {row['bound']:.1e})"


def brief(rows: list[dict]) -> list[dict]:
    """A row for each group: how many checks hold, the largest share of a bound, what was not run and why."""
    lines = []
    for name in dict.fromkeys(r["group"] for r in rows):
        mine = [r for r in rows if r["group"] == name]
        shares = [r["error"] / r["bound"] for r in mine if r.get("bound")]
        lines.append(
            {
                "group": name, "hold": sum("error" in r for r in mine),
                "largest error, of its bound": max(shares, default=None),
                "not run": sum("not_run" in r for r in mine),
                "because": "; ".join(sorted({r["not_run"] for r in mine if "not_run" in r}))
            }
        )
    return lines


def backends_of(path: str) -> set[str]:
    """The attention backends that the trainings in a result of bench/steps.py or train.py ran on."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError):
        return set()
    said = ", ".join((row.get("warm") or row)["attention"] for row in rows)
    return {name for name in attention.BACKENDS if name in said.split(", ")}


def selection(o: Namespace) -> Callable[[str, torch.dtype], bool]:
    """Function of (name, dtype): is this check wanted by --dtype and --as-in?"""
    used = backends_of(o.as_in) if o.as_in else set()

    def wanted(name, dtype):
        if o.dtype and str(dtype) != f"torch.{o.dtype}":
            return False
        return not (used and name.startswith("attention ")) or name.split()[1].rstrip(",") in used

    return wanted


def main() -> None:
    """Run the checks that the options select; the exit code is 1 if one fails."""
    p = arguments.Parser(prog="bench/correct.py", description=__doc__.splitlines()[0])
    p.add_argument("--dtype", choices=[str(d).removeprefix("torch.") for d in ROUNDING],
                   help="only the checks in this one")
    p.add_argument("--as-in", metavar="JSON", help="of the attention backends only those that the trainings "
                                                   "of this result ran on; all if there is none")
    p.add_argument("--rehearse", action="store_true", help="run each check and judge no error")
    report.add_arguments(p, GROUPS)
    o = p.parse_args()
    torch.manual_seed(0)
    # FlexAttention: beyond it an eager one would run, and say nothing
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    groups = {
        name: functools.partial(judged, checks, selection(o), o.rehearse) for name, checks in GROUPS.items()
    }
    sys.exit(report.run(o, groups, "Kernels against float64", show=show, brief=brief))


if __name__ == "__main__":
    console.program(main)
