"""Cross entropy of a linear layer's soft-capped logits, which never exist in full.

    losses = linear_cross_entropy(x, weight, targets, softcap=..., weights=(1.0, 0.5))

    z      = factor x W^T
    c      = z, cap tanh(z / cap), cap sigmoid((z + shift) / scale) or cap z / sqrt(z^2 + cap^2)
    loss_t = sum_j w_j (logsumexp(c_t) - c_t[y_{t+j}]) + w_p (logsumexp(c_t) - c_t[prefix_t])
    dc_t   = g_t (m_t softmax(c_t) - sum_j w_j onehot(y_{t+j}) - w_p onehot(prefix_t))
    m_t    = sum of the weights in loss_t

One row of logits is scored against several targets (records 53 and 88). A term is left out if its target lies
past the end of the row or is negative.

Both passes go over chunks of tokens. The forward keeps x, W and the log-sum-exps, and the backward computes
the logits of a chunk again (Wijmans et al., arXiv 2411.09009). Memory beyond operands and gradients is
O(chunk V + V D): `torch` needs up to three buffers (chunk, V) of the soft cap's dtype; `triton` needs one of
x's dtype, in which the gradient overwrites the logits, and with FP8 two more of bytes for the gradient and
its transpose. The gradient of W is summed over chunks in float32; CUDA needs one more (V, D) for 16-bit
operands, and a copy of W (V, D) in x's dtype if W has another one.

Backends: `torch`, any device and dtype, the reference. `triton`, two kernels with float32 arithmetic on a
chunk of logits that torch multiplied (the fused soft cap of record 60; FP8 gradients are written as FP8, as
in record 67). Triton is imported when first used.
"""

from __future__ import annotations  # the kernels are annotated with tl.constexpr, and tl comes later

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from kernels import fp8_linear as fp8_module
from kernels import tiles
from kernels.device import missing, operator
from kernels.rounding import rounded

if TYPE_CHECKING:
    from triton.runtime import KernelInterface

BACKENDS = ("torch", "triton")
# elements of one (chunk, V) if the caller does not say: 8 MiB; 512 MiB in 16 bits
CHUNK = {"cpu": 2**21, "cuda": 2**28}
GRADIENT8 = torch.float8_e5m2  # what the gradient kernel writes for an FP8 head
LARGEST_CAP = 80.0  # range of the capped logits in Triton: exp(-80) is still a normal float32


class Block(NamedTuple):
    """Launch sizes of the loss and gradient kernels."""
    size: int  # logits that a program has at a time
    warps: int


# 8 logits per thread: one load of 16 bytes. Not tuned on a GPU yet: bench/tune.py (kernels/tiles.py)
DEFAULT = Block(2048, 8)


class Plan(NamedTuple):
    """Everything but the tensors; what linear_cross_entropy's arguments mean."""
    form: str  # none, tanh, sigmoid, rsqrt (settings.model.Softcap)
    cap: float
    divisor: float  # inside the tanh or sigmoid
    factor: float  # of the logits, before the soft cap
    scales: list  # FP8: factors of x, weight and gradient; empty: no FP8
    dtype: torch.dtype  # of x, logits and their gradient
    cap_dtype: torch.dtype
    loss_dtype: torch.dtype
    chunk: int  # 0: by device and V
    backend: str  # auto, torch, triton
    transpose: str = "torch"  # FP8 on a GPU: kernels.fp8_linear.row_major
    shift: float = 0.0  # added inside the sigmoid, before the divisor
    sigmoid: str = ""  # name of the dtype to which the sigmoid is rounded; "": it is not
    logits8: bool = False  # FP8: the logits are rounded to e4m3; they and their gradient are then in float32


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, softcap: Any = None,
    weights: torch.Tensor | tuple[float, ...] | list[float] = (1.0,), prefix: torch.Tensor | None = None,
    prefix_weight: torch.Tensor | float | None = None, full_mass: bool = False,
    logit_scale: float | None = None, fp8: tuple[float, float, float] | None = None, logits8: bool = False,
    cap_dtype: torch.dtype = torch.float32, sigmoid: torch.dtype | None = None,
    loss_dtype: torch.dtype = torch.float32, chunk: int | None = None, backend: str = "auto",
    transpose: str = "torch"
) -> torch.Tensor:
    """Cross entropies of the soft-capped logits of x W^T, in the shape of targets and in loss_dtype.

    Args:
        x: (R, T, D) or (N, D). weight: (V, D). targets: (R, T) or (N,) int64; negative ones are ignored.
        softcap: has .form, .cap, .scale, .shift, as settings.model.Softcap; None: no soft cap.
        weights: loss weights of targets t, t+1, ... in the same row, floats or a tensor (n,). New values in a
            tensor do not recompile a torch.compile graph.
        prefix, prefix_weight: a second target per token, shaped like targets, and its weight.
        full_mass: m_t sums all of `weights` even where targets lie past the end of the row, as in records 79
            on; there the gradient is not the derivative of the loss.
        logit_scale: factor of the logits.
        fp8: (sx, sw, sg) of kernels.fp8_linear, sg for the gradient of these losses; None: no FP8.
        logits8: with fp8, the logits are rounded to e4m3 (numerics.fp8_head.logits).
        cap_dtype: least dtype of the factor and the soft cap.
        sigmoid: dtype to which the soft cap's sigmoid is rounded (numerics.softcap_sigmoid); None: it is not.
        chunk: tokens per chunk; None: by device and V.
        transpose: how FP8 operands are transposed on a GPU, `triton` or torch's way.

    Every token may have its own gradient; dx is in x's dtype, dW in weight's. ValueError for shapes that do
    not fit. Targets of V or more raise in `torch` on the CPU, assert on CUDA, and give NaN in `triton`.
    """
    if targets.dim() not in (1, 2) or x.shape != (*targets.shape, weight.size(1)):
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and targets "
                         f"{tuple(targets.shape)} do not fit: want (R, T, D), (V, D), (R, T) or (N, D), (V, "
                         "D), (N,)")
    if (prefix is None) != (prefix_weight is None) or (prefix is not None and prefix.shape != targets.shape):
        raise ValueError("prefix comes with prefix_weight, and in the shape of targets")
    if len(weights) < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"{len(weights)} weights and chunk = {chunk}: at least one of each")
    labels = label_matrix(targets, len(weights), prefix)
    shares = torch.cat([column(w, x.device, loss_dtype) for w in (weights, prefix_weight) if w is not None])
    counted = labels >= 0
    if full_mass:
        counted = torch.cat([torch.ones_like(counted[:, :len(weights)]), counted[:, len(weights):]], 1)
    form, cap, divisor, shift = "none", 1.0, 1.0, 0.0
    if softcap is not None:
        form, cap, divisor = softcap.form, float(softcap.cap), float(softcap.cap)
        if form == "sigmoid":
            divisor, shift = float(softcap.scale), float(softcap.shift)
    factor = 1.0 if logit_scale is None else float(logit_scale)
    scales = [] if fp8 is None else [float(f) for f in fp8]
    plan = Plan(
        form, cap, divisor, factor, scales, x.dtype, torch.promote_types(x.dtype, cap_dtype), loss_dtype,
        chunk or 0, backend, transpose, shift, str(sigmoid or "").removeprefix("torch."), logits8
    )
    mass = (counted * shares).sum(1)
    losses = LinearCrossEntropy.apply(x.reshape(-1, x.size(-1)), weight, labels, shares, mass, plan)
    return losses.view(targets.shape)


def label_matrix(targets: torch.Tensor, n: int, prefix: torch.Tensor | None) -> torch.Tensor:
    """Targets t, t+1, ... of each token and its prefix target, -1 where there is none.

    targets: (N,) or (R, T). Returns (N, n), with prefix (N, n + 1).
    """
    rows = torch.atleast_2d(targets)
    length = rows.size(1)
    columns = [F.pad(rows[:, j:], (0, min(j, length)), value=-1) if j else rows for j in range(n)]
    if prefix is not None:
        columns.append(torch.atleast_2d(prefix))
    return torch.stack(columns, -1).flatten(0, 1)


def column(
    weights: torch.Tensor | tuple[float, ...] | list[float] | float, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Floats or a tensor -> (n,) on the device. Filled there: a copy from the host would wait for the GPU."""
    if isinstance(weights, torch.Tensor):
        return weights.to(device, dtype).reshape(-1)
    values = weights if isinstance(weights, (tuple, list)) else [weights]
    return torch.cat([torch.full((1,), float(w), dtype=dtype, device=device) for w in values])


class LinearCrossEntropy(torch.autograd.Function):
    """x (N, D), weight (V, D), labels (N, K), shares (K,) and mass (N,) -> losses (N,)."""

    @staticmethod
    def forward(ctx, x, weight, labels, shares, mass, plan):
        if plan.scales:
            a = fp8_module.quantise(x, plan.scales[0], torch.float8_e4m3fn)
            b = fp8_module.quantise(weight, plan.scales[1], torch.float8_e4m3fn)
        else:
            a, b = x, weight.to(x.dtype)
        losses, lse = operator(forward, forward_op, a)(a, b, labels, shares, *plan)
        ctx.save_for_backward(a, b, labels, shares, mass, lse)
        ctx.plan, ctx.weight_dtype = plan, weight.dtype
        return losses

    @staticmethod
    def backward(ctx, g):
        a, b, labels, shares, mass, lse = ctx.saved_tensors
        run = operator(backward, backward_op, a)
        dx, dw = run(a, b, labels, shares, mass, lse, g, *ctx.plan)
        return dx, dw.to(ctx.weight_dtype), None, None, None, None


# ----- chunks of tokens -------------------------------------------------------------------------------------

def forward(
    a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor, *plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Operands a (N, D) and b (V, D) of the product -> losses (N,), log-sum-exps (N,).

    `triton` returns log-sum-exps less the upper bound of the logits.
    """
    plan = Plan(*plan)
    triton = choose(plan.backend, a.device, plan) == "triton"
    a, b = operands(a, b, plan)
    losses = torch.empty(len(a), dtype=plan.loss_dtype, device=a.device)
    lse = torch.empty_like(losses)

    def step(rows):  # a function of its own: its buffers are gone before those of the next chunk are made
        z = logits(a[rows], b, plan)
        if triton:
            launch_loss(z, labels[rows], shares, losses[rows], lse[rows], plan)
        else:
            losses[rows], lse[rows] = chunk_losses(z, labels[rows], shares, plan)

    for rows in chunks(len(a), len(b), a.device, plan.chunk):
        step(rows)
    return losses, lse


def backward(
    a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor, mass: torch.Tensor,
    lse: torch.Tensor, g: torch.Tensor, *plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments of `forward` and the gradient g (N,) of the losses -> dx (N, D), dW (V, D).

    dx is in x's dtype, dW in float32 or float64.
    """
    plan = Plan(*plan)
    triton = choose(plan.backend, a.device, plan) == "triton"
    a, b = operands(a, b, plan)
    dx = torch.empty(a.shape, dtype=plan.dtype, device=a.device)
    dw = torch.zeros(b.shape, dtype=torch.promote_types(plan.dtype, torch.float32), device=a.device)
    wide = b
    # the layout that torch._scaled_mm wants, once for all chunks
    if plan.scales and fp8_module.has_fp8_units(b):
        wide = fp8_module.row_major(b.t(), plan.transpose).t()
    g = g.contiguous()

    def step(rows):
        z = logits(a[rows], b, plan)
        if triton:
            d = launch_gradient(z, labels[rows], shares, mass[rows], g[rows], lse[rows], plan)
        else:
            d = chunk_gradient(z, labels[rows], shares, mass[rows], g[rows], lse[rows], plan)
        del z
        if plan.scales and not triton:
            d = fp8_module.quantise(d, plan.scales[2], torch.float8_e5m2)
        add_products(dx[rows], dw, d, a[rows], wide, plan)

    for rows in chunks(len(a), len(b), a.device, plan.chunk):
        step(rows)
    return dx, dw


def chunks(tokens: int, classes: int, device: torch.device, size: int) -> list[slice]:
    """Slices of `tokens` tokens with `size` tokens each.

    size 0: about equal multiples of 16, so that the logits of a slice have at most CHUNK elements.
    """
    if size == 0:
        most = max(256, CHUNK["cuda" if device.type == "cuda" else "cpu"] // classes)
        parts = max(1, -(-tokens // most))
        size = max(16, -(-tokens // parts // 16) * 16)
    return [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]


def operands(a: torch.Tensor, b: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit operands in float32 on a CPU: the product would widen the weight for every chunk."""
    if plan.scales and not a.is_cuda:
        return a.float(), b.float()
    return a, b


def logits(a: torch.Tensor, b: torch.Tensor, plan: Plan) -> torch.Tensor:
    """(n, D) and (V, D) -> (n, V) in x's dtype, or with logits8 in float32."""
    if plan.logits8:
        unscale = 1 / (plan.scales[0] * plan.scales[1])
        return fp8_module.product(a, b.t(), unscale, torch.float8_e4m3fn, fast=True).float()
    if plan.scales:
        return fp8_module.product(a, b.t(), 1 / (plan.scales[0] * plan.scales[1]), plan.dtype, fast=True)
    return a @ b.t()


def add_products(
    dx: torch.Tensor, dw: torch.Tensor, d: torch.Tensor, a: torch.Tensor, b: torch.Tensor, plan: Plan
) -> None:
    """dx = d b, dw += d^T a; d (n, V) the logits' gradient, with FP8 in e5m2."""
    if plan.scales:
        sx, sw, sg = plan.scales
        dx.copy_(fp8_module.product(d, b, 1 / (sg * sw), plan.dtype, fast=False, transpose=plan.transpose))
        dw.add_(
            fp8_module.product(d.t(), a, 1 / (sx * sg), torch.float32, fast=False, transpose=plan.transpose)
        )
        return
    torch.mm(d, b, out=dx)
    if d.dtype == dw.dtype:
        dw.addmm_(d.t(), a)
    elif d.is_cuda:
        dw.add_(torch.mm(d.t(), a, out_dtype=dw.dtype))
    else:
        dw.addmm_(d.t().to(dw.dtype), a.to(dw.dtype))


# ----- a chunk in torch -------------------------------------------------------------------------------------

def capped(z: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Logits times factor under the soft cap, in cap_dtype; in place if z has it."""
    if plan.form == "none" and plan.factor == 1.0:
        return z
    c = z.to(plan.cap_dtype)
    if plan.factor != 1.0:
        c.mul_(plan.factor)
    if plan.form == "tanh":
        c.div_(plan.divisor).tanh_().mul_(plan.cap)
    elif plan.form == "sigmoid":
        if plan.shift:
            c.add_(plan.shift)
        c.div_(plan.divisor).sigmoid_()
        if plan.sigmoid:
            c.copy_(rounded(c, getattr(torch, plan.sigmoid)))
        c.mul_(plan.cap)
    elif plan.form == "rsqrt":
        c.mul_(c.square().add_(plan.cap ** 2).rsqrt_()).mul_(plan.cap)
    return c


def chunk_losses(
    z: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, V), which it overwrites, labels (n, K) -> losses and log-sum-exps (n,)."""
    c = capped(z, plan).to(plan.loss_dtype)
    lse = torch.logsumexp(c, 1)
    terms = (lse[:, None] - c.gather(1, labels.clamp(min=0))) * shares
    return terms.masked_fill(labels < 0, 0.0).sum(1), lse


def chunk_gradient(
    z: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor, mass: torch.Tensor, g: torch.Tensor,
    lse: torch.Tensor, plan: Plan
) -> torch.Tensor:
    """Logits (n, V), which it overwrites -> their gradient (n, V) in the same dtype."""
    c = capped(z, plan)
    d = (c.to(plan.loss_dtype) - lse[:, None]).exp_().mul_(mass[:, None])
    # one by one: the sum of equal labels has a fixed order
    for label, share in zip(labels.unbind(1), shares.unbind()):
        d.scatter_add_(1, label.clamp(min=0)[:, None], (-share * (label >= 0))[:, None])
    d = d.mul_(g[:, None]).to(c.dtype)
    if plan.form == "tanh":  # the slope takes the place of c
        d.mul_(c.div_(plan.cap).square_().neg_().add_(1.0))
    elif plan.form == "sigmoid":
        c.div_(plan.cap)
        d.mul_(c.addcmul_(c, c, value=-1.0).mul_(plan.cap / plan.divisor))
    elif plan.form == "rsqrt":  # (cap^2 / (z^2 + cap^2))^(3/2)
        d.mul_(c.div_(plan.cap).square_().neg_().add_(1.0).pow_(1.5))
    if plan.factor != 1.0:
        d.mul_(plan.factor)
    return d.to(z.dtype)


# ----- a chunk in Triton ------------------------------------------------------------------------------------

tl = None  # triton.language, once kernels() has imported it


def distance(x, cap, ROUND: tl.constexpr):
    """cap less a soft-capped logit; ROUND: 1, its sigmoid is rounded to bfloat16, 2, to float16."""
    if ROUND == 0:
        found = cap / (1.0 + tl.exp(x))
    elif ROUND == 1:  # on the bits: Triton 3.9's interpreter truncates
        bits = (1.0 / (1.0 + tl.exp(-x))).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        found = cap * (1.0 - bits.to(tl.float32, bitcast=True))
    else:
        found = cap * (1.0 - (1.0 / (1.0 + tl.exp(-x))).to(tl.float16).to(tl.float32))
    return found


def loss_kernel(
    z, labels, shares, losses, lse, V, cap, slope, bias, K: tl.constexpr, CAPPED: tl.constexpr,
    ROUND: tl.constexpr, BLOCK: tl.constexpr
):
    """Losses and log-sum-exp of one row of logits z (n, V). K labels a row (int64), K shares.

    Capped logits are a constant less cap / (1 + exp(slope z + bias)), which lies between 0 and cap: that is
    what is summed, and no maximum is needed. Uncapped ones are slope z, with a running maximum for each lane.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * V
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    top = tl.full([BLOCK], -1e30, tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + lanes < V
        x = slope * tl.load(z + start + lanes, mask=inside, other=0.0).to(tl.float32) + bias
        if CAPPED:
            total += tl.where(inside, tl.exp(-distance(x, cap, ROUND)), 0.0)
        else:
            x = tl.where(inside, x, -1e30)
            higher = tl.maximum(top, x)
            total = total * tl.exp(top - higher) + tl.exp(x - higher)
            top = higher
    if CAPPED:
        norm = tl.log(tl.sum(total, 0))
    else:
        most = tl.max(top, 0)
        norm = most + tl.log(tl.sum(total * tl.exp(top - most), 0))
    loss = 0.0
    for j in tl.static_range(K):
        label = tl.load(labels + row * K + j)
        x = tl.load(z + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
        x = slope * x + bias
        if CAPPED:
            x = -distance(x, cap, ROUND)
        loss += tl.where(label >= 0, tl.load(shares + j) * (norm - x), 0.0)
    tl.store(losses + row, loss)
    tl.store(lse + row, norm)


def gradient_kernel(
    z, out, labels, shares, mass, g, lse, V, cap, slope, bias, scale, K: tl.constexpr, CAPPED: tl.constexpr,
    ROUND: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradient of one row of logits z (n, V), written to out, which may be z.

    FP8: the gradient is rounded to z's dtype, multiplied by scale and cast to e5m2.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * V
    out += row * V
    lanes = tl.arange(0, BLOCK)
    norm, upstream, weight = tl.load(lse + row), tl.load(g + row), tl.load(mass + row)
    for start in range(0, V, BLOCK):
        places = start + lanes
        inside = places < V
        x = slope * tl.load(z + places, mask=inside, other=0.0).to(tl.float32) + bias
        if CAPPED:
            below = distance(x, 1.0, ROUND)
            x = -cap * below
            turn = slope * cap * below * (1.0 - below)
        else:
            turn = slope
        d = weight * tl.exp(x - norm)
        for j in tl.static_range(K):
            d -= tl.where(places == tl.load(labels + row * K + j), tl.load(shares + j), 0.0)
        d = upstream * d * turn
        if FP8:
            d = tl.clamp(d.to(z.dtype.element_ty).to(tl.float32) * scale, -57344.0, 57344.0)
        tl.store(out + places, d.to(out.dtype.element_ty), mask=inside)


@functools.cache
def kernels() -> tuple[KernelInterface, KernelInterface]:
    """(loss_kernel, gradient_kernel) for Triton; what they call becomes Triton's, too."""
    global tl, distance
    import triton
    import triton.language as tl
    distance = triton.jit(distance)
    return triton.jit(loss_kernel), triton.jit(gradient_kernel)


def launch_options(
    z: torch.Tensor, labels: torch.Tensor, plan: Plan
) -> tuple[tuple[float, float, float], dict[str, int]]:
    """((cap, slope, bias) of the kernels, their constants)."""
    classes = z.size(1)
    block = tiles.best("cross_entropy", z.device, z.dtype, (classes,), DEFAULT)
    cap, slope = {"none": (0.0, plan.factor), "tanh": (2 * plan.cap, 2 * plan.factor / plan.divisor),
                  "sigmoid": (plan.cap, plan.factor / plan.divisor)}[plan.form]
    constants = {"K": labels.size(1), "CAPPED": plan.form != "none",
                 "ROUND": ("", "bfloat16", "float16").index(plan.sigmoid),
                 "BLOCK": min(block.size, 1 << (classes - 1).bit_length()), "num_warps": block.warps}
    return (cap, slope, plan.shift / plan.divisor), constants


def launch_loss(
    z: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor, losses: torch.Tensor, lse: torch.Tensor,
    plan: Plan
) -> None:
    """Write losses and log-sum-exps (n,) of the logits z (n, V); labels (n, K), -1: no target."""
    numbers, constants = launch_options(z, labels, plan)
    kernels()[0][(len(z),)](z, labels, shares, losses, lse, z.size(1), *numbers, **constants)


def launch_gradient(
    z: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor, mass: torch.Tensor, g: torch.Tensor,
    lse: torch.Tensor, plan: Plan
) -> torch.Tensor:
    """The logits' gradient: in z itself, or with FP8 in a buffer of bytes."""
    numbers, constants = launch_options(z, labels, plan)
    out = torch.empty(z.shape, dtype=GRADIENT8, device=z.device) if plan.scales else z
    scale = plan.scales[2] if plan.scales else 1.0
    kernels()[1][(len(z),)](z, out, labels, shares, mass, g, lse, z.size(1), *numbers, scale, **constants,
                            FP8=bool(plan.scales))
    return out


# ----- choosing a backend -----------------------------------------------------------------------------------

def choose(requested: str, device: torch.device, plan: Plan) -> str:
    """Name of the backend that runs. ValueError, one line, if the requested one cannot."""
    if requested not in ("auto", *BACKENDS):
        raise ValueError(f"no cross entropy backend {requested!r}: auto, {', '.join(BACKENDS)}")
    why = refusal(device, plan)
    if requested == "triton" and why:
        raise ValueError(f"the Triton cross entropy {why}")
    return "torch" if requested == "torch" or why else "triton"


def refusal(device: torch.device, plan: Plan) -> str | None:
    """Why the Triton kernels cannot do it (the rest of a sentence), or None."""
    why = missing(device)
    if why is not None:
        return why
    if plan.loss_dtype != torch.float32 or plan.cap_dtype == torch.float64:
        return "computes in float32, and this asks for " + str(
            torch.float64 if plan.cap_dtype == torch.float64 else plan.loss_dtype).removeprefix("torch.")
    if plan.form == "rsqrt":
        return "has no soft cap of the form rsqrt"
    if plan.form != "none" and (2 if plan.form == "tanh" else 1) * plan.cap > LARGEST_CAP:
        return (
            f"loses digits when logits range over more than {LARGEST_CAP:g}: this is {plan.form} with cap = "
            f"{plan.cap:g}"
        )
    return None


# ----- as operators: torch.compile sees two calls and not the loops over chunks -----------------------------

ARGUMENTS = ("str form, float cap, float divisor, float factor, float[] scales, ScalarType dtype, "
             "ScalarType cap_dtype, ScalarType loss_dtype, int chunk, str backend, str transpose, "
             "float shift, str sigmoid, bool logits8")
TENSORS = "Tensor a, Tensor b, Tensor labels, Tensor shares"

forward_op = torch.library.custom_op("speedrun::linear_cross_entropy", forward, mutates_args=(),
                                     schema=f"({TENSORS}, {ARGUMENTS}) -> (Tensor, Tensor)")
backward_op = torch.library.custom_op(
    "speedrun::linear_cross_entropy_backward", backward, mutates_args=(),
    schema=f"({TENSORS}, Tensor mass, Tensor lse, Tensor g, {ARGUMENTS}) -> (Tensor, Tensor)")


@forward_op.register_fake
def forward_shapes(
    a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor, *plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and dtypes of `forward`, for torch.compile."""
    losses = a.new_empty(len(a), dtype=Plan(*plan).loss_dtype)
    return losses, torch.empty_like(losses)


@backward_op.register_fake
def backward_shapes(
    a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor, mass: torch.Tensor,
    lse: torch.Tensor, g: torch.Tensor, *plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and dtypes of `backward`, for torch.compile."""
    dtype = Plan(*plan).dtype
    return a.new_empty(a.shape, dtype=dtype), b.new_empty(
        b.shape, dtype=torch.promote_types(dtype, torch.float32)
    )
