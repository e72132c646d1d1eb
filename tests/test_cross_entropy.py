"""Laws of the chunked cross entropy: equal to the head and torch's cross entropy, in less memory; its Triton
kernels.

Run as a program it prints measurements as JSON: `memory` (peaks of both ways), `interpret` (errors of the
kernels in Triton's interpreter, which must be switched on before Triton is imported).
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from kernels import cross_entropy, device
from kernels import fp8_linear as fp8_module
from kernels.cross_entropy import label_matrix, linear_cross_entropy
from kernels.fp8_linear import fp8_linear
from layers.head import Head, bounded
from settings import deltas
from settings.model import Softcap
from system import preflight

ROOT = Path(__file__).parent.parent
EXACT = {"cap_dtype": torch.float64, "loss_dtype": torch.float64}
CAPS = {"none": None, "tanh": Softcap("tanh", 15.0), "sigmoid": Softcap("sigmoid", 30.0, 7.5),
        "shifted": Softcap("sigmoid", 23.0, 7.5, 5.0)}  # record 54
ROUNDED = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # the shifted form with a rounded sigmoid
SCALES = (2.0, 32.0, 8192.0)


def problem(rows=3, length=11, dim=6, classes=37, dtype=torch.float64, spread=2.0, seed=0):
    """x (R, T, D), weight (V, D), targets, prefix targets (a third of them none), gradients of the losses (R,
    T)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, dim, generator=g, dtype=torch.float64)
    w = spread / math.sqrt(dim) * torch.randn(classes, dim, generator=g, dtype=torch.float64)
    y, p = (torch.randint(classes, (rows, length), generator=g) for _ in range(2))
    p[torch.rand(rows, length, generator=g) < 1 / 3] = -1
    upstream = torch.randn(rows, length, generator=g, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), y, p, upstream


def by_loops(c, targets, weights, prefix=None, prefix_weight=0.0):
    """Losses (R, T) of capped logits (R, T, V), term by term as in the formula."""
    norm = torch.logsumexp(c, -1)
    rows = []
    for r in range(len(targets)):
        for t in range(targets.size(1)):
            loss = torch.zeros((), dtype=c.dtype)
            for j, w in enumerate(weights):
                if t + j < targets.size(1):
                    loss = loss + w * (norm[r, t] - c[r, t, targets[r, t + j]])
            if prefix is not None and prefix[r, t] >= 0:
                loss = loss + prefix_weight * (norm[r, t] - c[r, t, prefix[r, t]])
            rows.append(loss)
    return torch.stack(rows).view(targets.shape)


def head(ref, classes, dim, dtype=torch.float64):
    """The head of a record over `classes` classes, its settings, its weight random."""
    sets = ["system.precision=float64", f"model.model_dim={dim}", "model.attn.num_heads=2"]
    s = deltas.resolve(ref, scale="micro", sets=sets).settings
    out = Head(s)
    out.weight = torch.nn.Parameter(torch.empty(classes, dim, dtype=dtype))
    return out, s.model.head


def worst(a, b):
    """Largest difference of tensors, or of lists of them."""
    if isinstance(a, torch.Tensor):
        return (a.double() - b.double()).abs().max().item()
    return torch.tensor([worst(i, j) for i, j in zip(a, b, strict=True)]).max().item()  # NaN if one is


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ----- values and gradients

@pytest.mark.parametrize("ref", ["short/8", "short/9", "short/18", "short/20", "short/21t"])
def test_losses_and_gradients_are_those_of_the_head_and_torch_s_cross_entropy(ref):
    x, w, y, _, g = problem(dim=16)
    theirs, h = head(ref, 37, 16)
    theirs.weight.data = w.data
    expected = F.cross_entropy(theirs(x, None).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    losses = linear_cross_entropy(x, w, y, softcap=h.softcap, logit_scale=theirs.scale, chunk=7, **EXACT)
    assert losses.shape == y.shape and worst(losses, expected) < 1e-12
    assert (
        worst(torch.autograd.grad(losses, (x, w), g), torch.autograd.grad(expected, (x, theirs.weight), g))
        < 1e-12
    )


@pytest.mark.parametrize("form", CAPS)
@pytest.mark.parametrize(
    "weights, prefix_weight",
    [((1.0, 0.5, 0.25), None), ((0.7,), 0.25), ((1.0, 0.5), 0.3), ((1.0,) * 13, 1.0)],
)
def test_several_targets_are_the_sum_of_their_terms(form, weights, prefix_weight):
    """13 targets are more than a row of 11 tokens has; some prefixes equal the target, some are missing."""
    x, w, y, p, g = problem()
    p[:, ::4] = y[:, ::4]
    z, prefix = x @ w.T, None if prefix_weight is None else p
    expected = by_loops(
        z if CAPS[form] is None else bounded(z, CAPS[form]), y, weights, prefix, prefix_weight
    )
    losses = linear_cross_entropy(
        x, w, y, softcap=CAPS[form], weights=weights, prefix=prefix, prefix_weight=prefix_weight, chunk=8,
        **EXACT
    )
    assert worst(losses, expected) < 1e-12
    assert worst(torch.autograd.grad(losses, (x, w), g), torch.autograd.grad(expected, (x, w), g)) < 1e-12


def test_weights_may_be_a_tensor():
    x, w, y, p, _ = problem()
    a = linear_cross_entropy(x, w, y, weights=(1.0, 0.5), prefix=p, prefix_weight=0.25, **EXACT)
    b = linear_cross_entropy(
        x, w, y, weights=torch.tensor([1.0, 0.5]), prefix=p, prefix_weight=torch.tensor(0.25), **EXACT
    )
    assert torch.equal(a, b)


def test_later_targets_stay_in_their_row():
    x, w, y, _, _ = problem()
    together = linear_cross_entropy(x, w, y, weights=(1.0, 0.5, 0.25), **EXACT)
    apart = [linear_cross_entropy(x[r], w, y[r], weights=(1.0, 0.5, 0.25), **EXACT) for r in range(len(y))]
    assert worst(together, torch.stack(apart)) < 1e-12
    assert label_matrix(y, 3, None).view(3, 11, 3)[:, -1, 1:].eq(-1).all()


@pytest.mark.parametrize("full", [False, True])
def test_the_softmax_s_weight_in_the_gradient_is_the_sum_of_the_weights(full):
    """Of those in the loss; as record 79 has it of all later targets, but of the prefix only where there is
    one."""
    x, w, y, p, g = problem()
    weights, z = (1.0, 0.5, 0.25), (x @ w.T).detach()
    losses = linear_cross_entropy(
        x, w, y, weights=weights, prefix=p, prefix_weight=0.3, full_mass=full, **EXACT
    )
    assert worst(losses, by_loops(z, y, weights, p, 0.3)) < 1e-12
    d = torch.zeros_like(z)
    for r in range(3):
        for t in range(11):
            for j, share in enumerate(weights):
                if t + j < 11:
                    d[r, t, y[r, t + j]] -= share
                if full or t + j < 11:
                    d[r, t] += share * z[r, t].softmax(0)
            if p[r, t] >= 0:
                d[r, t, p[r, t]] -= 0.3
                d[r, t] += 0.3 * z[r, t].softmax(0)
    d *= g[..., None]
    dx, dw = torch.autograd.grad(losses, (x, w), g)
    assert worst(dx, d @ w) < 1e-12 and worst(dw, torch.einsum("rtv,rtd->vd", d, x)) < 1e-12


def test_negative_targets_have_neither_loss_nor_gradient():
    x, w, y, _, _ = problem()
    y[1] = -1
    losses = linear_cross_entropy(x, w, y, softcap=CAPS["tanh"], **EXACT)
    dx, = torch.autograd.grad(losses.sum(), x)
    assert (
        losses[1].eq(0).all() and dx[1].eq(0).all() and losses[0].gt(0).all()
        and dx[0].abs().sum(-1).gt(0).all()
    )


@pytest.mark.parametrize("form", CAPS)
def test_the_chunk_does_not_matter(form):
    x, w, y, p, g = problem(rows=2, length=40)
    found = []
    for chunk in (None, 1, 7, 16, 80, 1000):
        losses = linear_cross_entropy(
            x, w, y, softcap=CAPS[form], weights=(1.0, 0.5), prefix=p, prefix_weight=0.3, chunk=chunk, **EXACT
        )
        found.append([losses, *torch.autograd.grad(losses, (x, w), g)])
    assert all(worst(a, found[0]) < 1e-12 for a in found[1:])


def test_default_chunks_cover_all_tokens_within_the_bound():
    for tokens, classes, kind, most in (
        (4096, 8192, "cpu", 256), (49152, 50304, "cuda", 5120), (100, 50304, "cuda", 112), (0, 8, "cpu", 16)
    ):
        slices = cross_entropy.chunks(tokens, classes, torch.device(kind), 0)
        assert [i for s in slices for i in range(s.start, s.stop)] == list(range(tokens))
        assert all(s.stop - s.start <= most for s in slices) and all(s.start % 16 == 0 for s in slices)


def test_a_second_backward_pass_gives_the_same_gradient():
    x, w, y, _, g = problem()
    losses = linear_cross_entropy(x, w, y, softcap=CAPS["sigmoid"], **EXACT)
    assert (
        worst(
            torch.autograd.grad(losses, (x, w), g, retain_graph=True), torch.autograd.grad(losses, (x, w), g)
        )
        == 0
    )


# ----- precision

@pytest.mark.parametrize("ref, cap_dtype", [("short/8", torch.float32), ("short/9", torch.bfloat16),
                                            ("short/18", torch.float32), ("short/20", torch.float32)])
def test_in_bfloat16_it_rounds_where_the_head_does(ref, cap_dtype):
    x, w, y, _, g = problem(rows=2, length=64, dim=32, classes=96)
    x, w = x.detach().bfloat16().requires_grad_(), w.detach().float().requires_grad_()
    theirs, h = head(ref, 96, 32)
    theirs.cap_dtype, theirs.loss_dtype, theirs.weight = (
        cap_dtype, torch.float32, torch.nn.Parameter(w.detach())
    )
    expected = F.cross_entropy(theirs(x, None).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    losses = linear_cross_entropy(x, w, y, softcap=h.softcap, cap_dtype=cap_dtype)
    assert losses.dtype == torch.float32 and worst(losses, expected) < 4e-6
    mine = torch.autograd.grad(losses, (x, w), g.float())
    other = torch.autograd.grad(expected, (x, theirs.weight), g.float())
    assert mine[0].dtype == torch.bfloat16 and mine[1].dtype == torch.float32
    # one rounding in bfloat16
    assert relative(mine[0], other[0]) < 4e-3 and relative(mine[1], other[1]) < 4e-3


def test_the_weight_s_gradient_is_summed_over_chunks_in_float32():
    """512 chunks of a token: sums in bfloat16 would be off by percents."""
    x, w, y, _, _ = problem(rows=1, length=512, dim=8, classes=16)
    x, w = x.detach().bfloat16(), w.detach().float().requires_grad_()
    grads = [
        torch.autograd.grad(linear_cross_entropy(x, w, y, chunk=chunk).sum(), w)[0] for chunk in (1, 512)
    ]
    assert relative(*grads) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk", [None, 16])
def test_the_fp8_head_is_fp8_linear_and_the_cross_entropy(dtype, chunk):
    x, w, y, _, g = problem(rows=2, length=64, dim=32, classes=96)
    x, w, g = x.detach().to(dtype).requires_grad_(), w.detach().float().requires_grad_(), g.float()
    z = bounded(fp8_linear(x, w, *SCALES).float(), CAPS["sigmoid"])
    expected = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    losses = linear_cross_entropy(x, w, y, softcap=CAPS["sigmoid"], fp8=SCALES, chunk=chunk)
    assert worst(losses, expected) < 4e-6
    # it is not the exact product
    assert relative(losses, linear_cross_entropy(x, w, y, softcap=CAPS["sigmoid"])) > 1e-4
    for mine, other in zip(torch.autograd.grad(losses, (x, w), g), torch.autograd.grad(expected, (x, w), g)):
        # next to a tie e5m2 may round either way
        assert mine.dtype == other.dtype and relative(mine, other) < 1e-3


# ----- compiled, refused

@pytest.mark.parametrize("fp8", [None, SCALES])
def test_compiled_it_is_one_graph_and_new_weights_do_not_compile_again(fp8):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    x, w, y, p, g = problem(dtype=torch.float32)

    def losses(x, w, weights, prefix_weight):
        return linear_cross_entropy(2 * x, w, y, softcap=CAPS["tanh"], weights=weights, prefix=p,
                                    prefix_weight=prefix_weight, chunk=5, fp8=fp8)

    compiled = torch.compile(losses, backend=backend, fullgraph=True, dynamic=False)
    for share in (0.5, 0.4):
        weights = (torch.tensor([1.0, share]), torch.tensor(share / 2))
        pairs = [
            [out := f(x, w, *weights), *torch.autograd.grad(out, (x, w), g.float())]
            for f in (compiled, losses)
        ]
        assert worst(*pairs) < 1e-6
    assert len(graphs) == 1
    code = graphs[0].print_readable(print_output=False)
    # the loop over chunks is hidden
    assert "speedrun.linear_cross_entropy.default" in code and "logsumexp" not in code
    torch._dynamo.reset()


@pytest.mark.parametrize("changes, match", [
    ({"targets": torch.zeros(3, 10, dtype=torch.int64)}, "do not fit"), ({"weights": ()}, "at least one"),
    ({"chunk": 0}, "at least one"), ({"prefix_weight": 0.25}, "comes with"),
    ({"prefix": torch.zeros(33, dtype=torch.int64), "prefix_weight": 0.25}, "in the shape"),
    ({"backend": "cuda"}, "no cross entropy backend 'cuda'"),
    ({"backend": "triton"}, "needs CUDA, and this is cpu")])
def test_bad_arguments_are_refused(changes, match):
    x, w, y, _, _ = problem()
    with pytest.raises(ValueError, match=match):
        linear_cross_entropy(x, w, **({"targets": y} | changes))


def plan(form="none", cap=15.0, cap_dtype=torch.float32, loss_dtype=torch.float32):
    return cross_entropy.Plan(form, cap, cap, 1.0, [], torch.bfloat16, cap_dtype, loss_dtype, 0, "auto")


def test_triton_is_taken_on_cuda_and_only_where_its_arithmetic_is_enough(monkeypatch):
    monkeypatch.setattr(device, "HAS_TRITON", True)
    cuda = torch.device("cuda")
    assert (
        cross_entropy.choose("auto", cuda, plan()) == cross_entropy.choose("auto", cuda, plan("tanh", 30.0))
        == "triton"
    )
    assert cross_entropy.choose("auto", cuda, plan("sigmoid", 80.0, cap_dtype=torch.bfloat16)) == "triton"
    for bad, match in (
        (plan(loss_dtype=torch.float64), "float64"), (plan(cap_dtype=torch.float64), "float64"),
        (plan(loss_dtype=torch.bfloat16), "bfloat16"), (plan("tanh", 50.0), "range over more than 80")
    ):
        assert cross_entropy.choose("auto", cuda, bad) == "torch"
        with pytest.raises(ValueError, match=match):
            cross_entropy.choose("triton", cuda, bad)
    monkeypatch.setattr(device, "HAS_TRITON", False)
    assert cross_entropy.choose("auto", cuda, plan()) == "torch"


# ----- memory

def program(what, **environment):
    done = subprocess.run(
        [sys.executable, __file__, what], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def peak_of(way, *arguments):
    """Megabytes by which a call raises the process's resident memory, at most. Linux keeps the peak, and 5
    resets it."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    way(*arguments)
    return resident("VmHWM") - before


def resident(name):
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measure_memory():
    """Peaks of forward and backward: 4096 tokens, 8192 classes, width 16, float32."""
    def chunked(x, w, y):
        linear_cross_entropy(x, w, y, softcap=CAPS["tanh"]).mean().backward()

    def full(x, w, y):
        F.cross_entropy(bounded(F.linear(x, w), CAPS["tanh"]).flatten(0, 1), y.flatten()).backward()

    found = {"logits": 4096 * 8192 * 4 / 2**20}
    for way in (chunked, full):
        way(*problem(1, 512, 16, 64, torch.float32)[:3])  # libraries load with the first use
        # the first call of this size also maps pages of libraries, how many depends on the machine
        found[way.__name__] = min(
            peak_of(way, *problem(1, 4096, 16, 8192, torch.float32)[:3]) for _ in range(2))
    return found | {"imported": [name for name in ("triton", "torch._dynamo") if name in sys.modules]}


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of resident memory that can be reset"
)
def test_it_needs_less_than_a_tenth_of_the_memory_of_full_logits():
    found = program("memory")
    print("\nmegabytes above the operands, and of the logits:", found)
    assert found["full"] > 3 * found["logits"]  # the measurement sees the buffers
    assert found["chunked"] < found["full"] / 10
    assert found["imported"] == []  # on a CPU neither Triton nor the compiler is loaded


# ----- Triton kernels

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# rows, length, classes, dtype, form, weights, prefix weight, FP8's factors, spread of the logits
INTERPRETED = [
    (1, 5, 37, F32, "none", (1.0,), None, None, 2), (2, 7, 1264, F32, "tanh", (1.0, 0.5, 0.25), 0.3, None, 4),
    (1, 9, 4099, F32, "sigmoid", (1.0, 0.5), None, None, 4), (1, 6, 4099, F32, "none", (0.7,), 0.25, None, 4),
    (1, 1, 1, F32, "tanh", (1.0,), None, None, 2), (1, 5, 130, F32, "none", (1.0,), None, None, 1e4),
    (1, 5, 130, F32, "sigmoid", (1.0, 0.5), None, None, 1e4),
    (1, 5, 130, F32, "tanh", (1.0,), 0.25, None, 1e4), (1, 9, 333, F16, "tanh", (1.0, 0.5), 0.25, None, 4),
    (1, 5, 333, F16, "none", (1.0, 0.5, 0.25), None, None, 2),
    (1, 5, 512, F16, "sigmoid", (1.0,), None, None, 4),
    (1, 8, 257, BF16, "sigmoid", (1.0, 0.5), 0.25, None, 4),
    (1, 9, 4099, F32, "shifted", (1.0, 0.5, 0.25), None, None, 4),
    (1, 5, 130, F32, "bfloat16", (1.0, 0.5), None, None, 4),
    (1, 5, 130, F32, "float16", (1.0,), None, None, 4),
    (1, 16, 96, F32, "shifted", (1.0,), None, SCALES, 4),
    (1, 16, 96, F32, "sigmoid", (1.0, 0.5), 0.25, SCALES, 4),
    (1, 16, 96, BF16, "tanh", (1.0,), None, SCALES, 4),
    (1, 16, 96, BF16, "none", (1.0,), None, (2.0, 32.0, 3e5), 2)
]  # the last one's gradients are clamped


def interpret():
    """Errors of losses, dx and dW against float64 arithmetic on the same logits (FP8: torch's, before the
    last cast)."""
    # without the cast: Triton 3.9's interpreter casts 7.9 to 4 (it loses the carry)
    cross_entropy.GRADIENT8 = torch.float32
    fp8_module.quantise = lambda x, scale, kind, real=fp8_module.quantise: (
        real(x, scale, kind) if kind == torch.float8_e4m3fn else (x.float() * scale).clamp(-57344, 57344))
    found = []
    for rows, length, classes, dtype, form, weights, prefix_weight, fp8, spread in INTERPRETED:
        x, w, y, p, g = problem(rows, length, 32, classes, dtype, spread)
        cap = CAPS["shifted" if form in ROUNDED else form]
        options = {"softcap": cap, "weights": weights, "prefix_weight": prefix_weight, "chunk": 4,
                   "prefix": None if prefix_weight is None else p, "fp8": fp8, "logit_scale": 0.8,
                   "sigmoid": ROUNDED.get(form)}
        losses = linear_cross_entropy(x, w, y, backend="triton", **options)
        mine = torch.autograd.grad(losses, (x, w), g.float())
        if fp8:
            expected = linear_cross_entropy(x, w, y, backend="torch", **options)
            theirs = torch.autograd.grad(expected, (x, w), g.float())
        else:
            z = (x @ w.t()).detach().double().requires_grad_()
            c = 0.8 * z if cap is None else bounded(0.8 * z, cap, ROUNDED.get(form))
            expected = by_loops(c, y, weights, options["prefix"], prefix_weight)
            d = torch.autograd.grad(expected, z, g)[0]
            theirs = (d @ w.double(), torch.einsum("rtv,rtd->vd", d, x.double()))
        found.append([worst(losses, expected) / max(1.0, expected.abs().max().item()),
                      *[relative(a, b) if b.any() else worst(a, b) for a, b in zip(mine, theirs)]])
    labels = torch.full((1, 2), 40)
    out_of_range = linear_cross_entropy(torch.ones(1, 2, 4), torch.ones(40, 4), labels, backend="triton")
    z, one = torch.randn(2, 8), torch.ones(2)
    d = cross_entropy.launch_gradient(z, torch.ones(2, 1, dtype=torch.int64), one[:1], one, one, one, plan())
    return {
        "errors": found, "out_of_range": out_of_range.isnan().all().item(),
        "in_place": d.data_ptr() == z.data_ptr()
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_triton_kernels_equal_the_formula_in_the_interpreter():
    pytest.importorskip("triton")
    found = program("interpret", TRITON_INTERPRET="1")
    assert found["out_of_range"] and found["in_place"] and len(found["errors"]) == len(INTERPRETED)
    for case, (loss, dx, dw) in zip(INTERPRETED, found["errors"], strict=True):
        rounding = {F32: 3e-6, F16: 2e-3, BF16: 1e-2}[case[3]]  # of the stored gradient
        if case[-1] == 1e4:  # exp(x) has the rounding of x, times x: up to 87
            rounding *= 10
        assert loss < 2e-6 and dx < rounding and dw < rounding, (case, loss, dx, dw)


def ahead_of_time(kernel, signature, constants, arch, folder, monkeypatch):
    """(shared memory in bytes, registers, bytes of stack per thread) of a kernel compiled for compute
    capability arch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "fp32"}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    built = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": cross_entropy.DEFAULT.warps}
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return built.metadata.shared, registers, stack + local


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_triton_kernels_compile_ahead_of_time_without_spills(arch, tmp_path, monkeypatch):
    """For a V like 50304, bfloat16 and three targets; FP8 from capability 8.9. With 64 registers half of all
    warps fit."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    loss, gradient = cross_entropy.kernels()
    scalars = {"V": "i32", "cap": "fp32", "slope": "fp32", "bias": "fp32"}
    targets = {"labels": "*i64", "shares": "*fp32"}
    for capped, rounds in ((False, 0), (True, 0), (True, 1), (True, 2))[:4 if arch == 90 else 2]:
        constants = {"K": 3, "CAPPED": capped, "ROUND": rounds, "BLOCK": cross_entropy.DEFAULT.size}
        signature = {"z": "*bf16"} | targets | {"losses": "*fp32", "lse": "*fp32"} | scalars
        built = [ahead_of_time(loss, signature, constants, arch, tmp_path, monkeypatch)]
        for fp8 in (False, True)[:1 + (arch >= 89)]:
            signature = {"z": "*bf16", "out": "*fp8e5" if fp8 else "*bf16"} | targets | {
                "mass": "*fp32", "g": "*fp32", "lse": "*fp32"} | scalars | {"scale": "fp32"}
            built.append(
                ahead_of_time(gradient, signature, constants | {"FP8": fp8}, arch, tmp_path, monkeypatch)
            )
        print(f"\nsm_{arch} capped={capped} rounds={rounds} (shared bytes, registers, stack):", built)
        for shared, registers, stack in built:
            assert shared <= 1024 and registers <= 64 and stack == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"memory": measure_memory, "interpret": interpret}[sys.argv[1]]()))


def test_a_triton_loss_without_the_soft_cap_of_the_record_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr(preflight, "refusal", lambda *about: None)  # a GPU that can
    s, other = (
        deltas.resolve(ref, sets=["system.kernels.loss=triton"]).settings
        for ref in ("optimizer/36", "short/59")
    )
    with pytest.raises(UserError, match="loss=triton has no soft cap of the form rsqrt: leave it at auto"):
        preflight.check_kernels(s, torch.device("cuda"))
    preflight.check_kernels(other, torch.device("cuda"))
