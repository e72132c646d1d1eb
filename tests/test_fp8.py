"""Laws of the MLP in FP8, its scales, and of the transposes that FP8 products need.

Run as a program it prints JSON: `interpret` (the Triton kernels in the interpreter, which must be switched on
before Triton is imported), `compile 90` (their resources on sm_90). In programs of their own, so that no
other test sees Triton.
"""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

import process_group
import schedule
from kernels import fp8_linear as fp8_module
from kernels import device, experts, linear_relu_sq, transpose
from kernels.device import refusal
from kernels.fp8_mlp import fp8_mlp
from model import GPT
from optim import Optimizer
from settings import deltas, schema
from step_hooks import begin_step
from system import preflight, warmup
from program import program_of
from common.errors import UserError

ROOT = Path(__file__).parent.parent
BOS = 1256
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


program = program_of(__file__)


def random(*shape, seed=0, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ----- e4m3 by its definition: 1 sign, 4 exponent, 3 mantissa bits, largest value 448, smallest normal 2^-6

def e4m3(x):
    """float64 x rounded to the nearest value of e4m3, ties to even, clamped."""
    exponent = torch.frexp(x).exponent.clamp(min=-5) - 1  # of the leading bit; below 2^-6 the grid stays
    grid = torch.exp2(exponent.double() - 3)
    return (torch.round(x / grid) * grid).clamp(-448, 448)


def emulated(x, up, down, parts, scales, dtype):
    """(y, P, largest P of each part) by the formulas, in float64 between the rounding points."""
    def rounded(t):
        return t.to(dtype).double()

    x, up, down = (t.double() for t in (x, up, down))
    su = rounded(up.abs().max().clamp(min=1e-12) / 448)
    u8, ys, ps, largest = e4m3(rounded(up / su)), [], [], []
    for i, rows in enumerate(x.chunk(parts)):
        sx = rows.abs().max().clamp(min=1e-12) / 448
        p = rounded(rounded(sx * su * (e4m3(rows / sx) @ u8.T)).clamp(min=0) ** 2)
        if scales is None:
            ys.append(p @ down.T)
        else:
            sp, sd = scales[0][i].double(), scales[1].double()
            ys.append(sp * sd * (e4m3(p / sp) @ e4m3(down / sd).T))
        ps.append(p)
        largest.append(p.max())
    return torch.cat(ys), torch.cat(ps), torch.stack(largest)


def problem(dtype, rows=24, dim=32, hidden=48, out=16):
    shapes = (rows, dim), (hidden, dim), (out, hidden)
    x, up, down = (random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    x[rows // 2:] *= 7  # parts with different scales
    return [t.requires_grad_() for t in (x, up / dim ** 0.5, down / hidden ** 0.5)]


# a few P of both parts and a few weights are clamped
SCALES = torch.tensor([0.005, 0.3]), torch.tensor(0.0007)


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def test_e4m3_of_the_tests_is_the_format_of_torch():
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    values = values[values.isfinite()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat(
        [
            values, middles, middles * (1 + 1e-6), random(999).double() * 100,
            random(999, seed=1).double() / 100
        ]
    )
    assert torch.equal(e4m3(x), x.clamp(-448, 448).float().to(torch.float8_e4m3fn).double())


@pytest.mark.feature("numerics.fp8_mlp")
@pytest.mark.parametrize("scales", [None, SCALES])
@pytest.mark.parametrize("dtype, limit", [(F32, 1e-6), (BF16, 2 ** -8)])
def test_the_forward_is_the_quantised_product_with_scales_of_each_part(dtype, limit, scales):
    """At bfloat16 sums in float32 and float64 may fall on two sides of a rounding: one of y's own, and a few
    steps of P."""
    x, up, down = problem(dtype)
    y, largest = fp8_mlp(x, up, down, 2, scales)
    expected, p, most = emulated(x.detach(), up.detach(), down.detach(), 2, scales, dtype)
    assert y.dtype == dtype and relative(y, expected) < limit
    if scales is None:
        assert len(largest) == 0
        exact = torch.relu(x.double() @ up.double().T) ** 2 @ down.double().T
        # there is a rounding to be seen, and no more
        assert 0.002 < (expected - exact).norm() / exact.norm() < 0.05
    else:
        assert (p[:12] / scales[0][0] > 448).any() and (p[12:] / scales[0][1] > 448).any()  # some are clamped
        assert (down.double() / scales[1] > 448).any()
        assert largest.dtype == F32 and relative(largest, most) < limit
    one = torch.cat([fp8_mlp(rows, up, down, 1, scales and (scales[0][i:i + 1], scales[1]))[0]
                     for i, rows in enumerate(x.chunk(2))])
    assert torch.equal(one, y)  # a part does not see the others


@pytest.mark.parametrize("scales", [None, SCALES])
@pytest.mark.parametrize("dtype, limit", [(F32, 1e-6), (BF16, 2 ** -7)])
def test_gradients_are_those_of_the_unquantised_mlp_at_the_hidden_values_of_the_forward(dtype, limit, scales):
    inputs = problem(dtype)
    y, _ = fp8_mlp(*inputs, 2, scales)
    g = random(*y.shape, seed=3, dtype=dtype)
    found = torch.autograd.grad(y, inputs, g)
    x, up, down = (t.detach().double() for t in inputs)
    _, p, _ = emulated(*(t.detach() for t in inputs), 2, scales, dtype)
    dpre = 2 * (g.double() @ down) * p.sqrt()
    for a, b in zip(found, (dpre @ up, dpre.T @ x, g.double().T @ p), strict=True):
        assert a.dtype == dtype and relative(a, b) < limit


def test_zeros_have_a_scale_and_nan_stays_nan():
    x, up, down = (t.detach() for t in problem(F32))
    ones = torch.ones(2), torch.ones(())
    for zero in (x * 0, up, down), (x, up * 0, down):
        y, largest = fp8_mlp(*zero, 2, ones)
        assert not y.any() and not largest.any()
    x[3, 4] = math.nan
    y, largest = fp8_mlp(x, up, down, 2, ones)
    assert y[:12].isnan().all() and y[12:].isfinite().all() and largest.isnan().tolist() == [True, False]


def test_compiled_it_is_one_graph_with_the_same_bits():
    inputs, results = problem(F32), []

    def both(*t):
        return *fp8_mlp(*t, 2), *fp8_mlp(*t, 2, SCALES)

    for run in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
        outputs = run(*inputs)
        results.append([*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[2].square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ----- the model and its delayed scales

def settings(*sets, with_=("numerics.fp8_mlp", "numerics.fp8_mlp.c_proj")):
    """short/11 at micro; every dtype that rounds between MLPs lifted, so that only FP8 is left to differ."""
    lift = [f"numerics.{name}=float32" for name in ("matmul", "eval_matmul", "residual", "newton_schulz")]
    return deltas.resolve(
        "short/11", scale="micro", with_=with_, sets=["system.precision=record", *lift, *sets]
    ).settings


def build(*sets, seed=0, **kwargs):
    s = settings(*sets, **kwargs)
    model = GPT(s)
    model.initialise(seed)
    return s, model


def rows(s, seed=0, ranks=8):
    shape = (ranks * s.data.tokens_per_rank // s.data.seq_len, s.data.seq_len)
    return torch.randint(1256, shape, generator=torch.Generator().manual_seed(seed))


def losses(model, s, x):
    return model(x, x, model.context(x, BOS, schedule.windows(s, 0)))


def step(optimizer, model, s, x, i, microbatch=8):
    begin_step(model)
    for part in x.chunk(8 // microbatch):
        optimizer.expect(last=True)
        (losses(model, s, part).mean() * microbatch / 8).backward()
        optimizer.accumulate()
    optimizer.step(schedule.plan(s)[i])


@pytest.mark.feature("numerics.fp8_mlp", "numerics.fp8_mlp.c_proj")
def test_the_scales_are_the_recurrence_over_steps():
    """Activations: 1.8 max P / 448 of the rank's last forward, at first 1. Weight: the first and the next
    three refreshes by its own maximum, then by 1.12 times the maximum of the refresh before."""
    s, model = build("numerics.fp8_mlp.c_proj.exact_steps=3")
    optimizer, seen, weights = Optimizer(model, s), [], []
    mlp, given = model.blocks[4].mlp, []
    state = mlp.fp8
    assert torch.equal(state.activation, torch.ones(8))
    mlp.register_forward_pre_hook(lambda m, a: given.append((a[0].detach(), m.c_fc.detach().clone())))
    for i in range(7):
        weights.append(mlp.c_proj.detach().abs().max())
        step(optimizer, model, s, rows(s, i), i)
        x, up = given[i]
        _, _, most = emulated(x.flatten(0, 1), up, torch.zeros(1, len(up)), 8, None, F32)
        seen.append((state.weight.clone(), state.activation.clone(), most))
    assert all(weights[i] != weights[i + 1] for i in range(1, 6))
    for i, (weight, activation, most) in enumerate(seen):
        expected = weights[i] / 448 if i <= 3 else 1.12 * weights[i - 1] / 448
        assert torch.allclose(weight, expected.clamp(min=1e-12 / 448), rtol=1e-6, atol=0), i
        assert relative(activation, 1.8 * most / 448) < 1e-5 and len(activation) == 8, i


def test_the_original_s_steps_and_factors_are_the_defaults():
    full = deltas.resolve(
        "short/33", with_=["numerics.fp8_mlp", "numerics.fp8_mlp.c_proj"]
    ).settings.numerics.fp8_mlp.c_proj
    assert (full.activation, full.weight, full.exact_steps) == (1.8, 1.12, 16)


def test_a_compiled_mlp_moves_its_scales_and_compiles_once():
    s, model = build()
    from torch._dynamo.testing import CompileCounterWithBackend
    found, counter = [], CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        model.initialise(1)
        mlp = model.blocks[0].mlp
        torch.nn.init.normal_(mlp.c_proj, generator=torch.Generator().manual_seed(0))
        run = torch.compile(mlp, backend=counter, fullgraph=True) if compiled else mlp
        for i in range(4):  # two forwards a step
            if i % 2 == 0:
                begin_step(model)
            x = random(4, s.data.tokens_per_rank, s.model.model_dim, seed=i)
            run(x, s.data.tokens_per_rank).square().sum().backward()
        found.append([b.clone() for b in mlp.buffers()] + [p.grad for p in mlp.parameters()])
        mlp.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(found[0][0].unique()) == 8
    assert counter.frame_count == 1


@pytest.mark.parametrize("microbatch", [1, 2])
def test_scales_belong_to_logical_ranks_however_many_a_forward_has(microbatch):
    results = []
    for n in (8, microbatch):
        s, model = build()
        optimizer = Optimizer(model, s)
        for i in range(3):
            step(optimizer, model, s, rows(s, i), i, n)
        scales = torch.cat([mlp.fp8.activation for mlp in model.fp8_mlps()])
        results.append((scales, losses(model.eval(), s, rows(s, 3)).detach()))
    (a, p), (b, q) = results
    assert len(a.unique()) > 90 and relative(a, b) < 1e-4 and (p - q).abs().max() < 1e-3


def test_validation_neither_rounds_nor_moves_a_scale_and_the_reset_brings_all_back():
    s, model = build()
    _, plain = build(with_=())
    x = rows(s)
    at_start = {name: b.clone() for name, b in model.named_buffers()}
    assert {"activation", "weight", "following", "refreshes"} == {
        n.split(".")[-1] for n in at_start if ".fp8." in n
    }
    assert not any(".fp8." in name for name in model.state_dict())  # a checkpoint does not depend on them
    optimizer = Optimizer(model, s)
    before = warmup.state_hash(model, optimizer)
    for i in range(3):  # zero projections and a zero head hide the hidden activations in two steps
        step(optimizer, model, s, x, i)
    moved = {name: b.clone() for name, b in model.named_buffers()}
    assert all(not torch.equal(b, at_start[name]) for name, b in moved.items() if ".fp8." in name)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(losses(model.eval(), s, x), losses(plain.eval(), s, x))
        assert not torch.equal(losses(model.train(), s, x), losses(plain.train(), s, x))
    for name, b in model.eval().named_buffers():
        assert name.endswith("activation") or torch.equal(b, moved[name])
    model.initialise(0)
    optimizer.reset()
    assert warmup.state_hash(model, optimizer) == before


@pytest.mark.feature("numerics.fp8_mlp")
def test_switched_off_it_is_not_there():
    """Lifted precision switches it off; a model without it has no buffer more and the bits that it had."""
    lifted = deltas.resolve("short/11", scale="micro", with_=["numerics.fp8_mlp"]).settings
    bare = deltas.resolve("short/11", scale="micro").settings
    assert lifted == bare and schema.ml_hash(lifted) == schema.ml_hash(bare)
    _, model = build(with_=())
    assert not any(".fp8." in name for name, _ in model.named_buffers())
    mlp, x = model.blocks[0].mlp, random(2, 5, 48)
    assert torch.equal(mlp(x), torch.relu(x @ mlp.c_fc.T).square() @ mlp.c_proj.T)


@pytest.mark.feature("numerics.fp8_mlp", "numerics.fp8_mlp.c_proj")
@pytest.mark.parametrize(
    "ref, sets, message",
    [
        ("short/1", (), "numerics.fp8_mlp has no bias vectors: set model.bias=false"),
        ("short/11", ("model.mlp.activation=gelu",), "numerics.fp8_mlp needs model.mlp.activation=relu_sq"),
        (
            "short/11", ("model.model_dim=744", "model.attn.num_heads=6"),
            "numerics.fp8_mlp needs multiples of 16"
        ),
        ("variants/2", (), "numerics.fp8_mlp is for dense MLPs"),
        ("short/11", ("system.activation_checkpoint=on",),
         "system.activation_checkpoint=on would move delayed scales twice"),
        (
            "short/11", ("numerics.fp8_mlp.c_proj.weight=0",),
            "numerics.fp8_mlp.c_proj.weight = 0.0: must be greater than 0"
        ),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(ref, sets, message):
    with pytest.raises(UserError) as caught:
        deltas.resolve(ref, with_=["numerics.fp8_mlp", "numerics.fp8_mlp.c_proj"], sets=sets)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_fp8_kernels_ask_for_compute_capability_8_9(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(device, "capability", lambda _: 80)
    monkeypatch.setattr(device, "HAS_TRITON", True)
    assert (
        refusal(gpu, BF16) is None
        and refusal(gpu, BF16, 89) == "needs compute capability 8.9, and this is 8.0"
    )
    s = settings("system.kernels.mlp=triton")
    with pytest.raises(
        UserError, match="mlp=triton needs compute capability 8.9, and this is 8.0: leave it at auto"
    ):
        preflight.check_kernels(s, gpu)
    off = dataclasses.replace(s, numerics=dataclasses.replace(s.numerics, fp8_mlp=None))
    preflight.check_kernels(off, gpu)


# ----- trainings, as a user runs them

def training(out, *args, processes=1):
    command = [
        sys.executable, "train_gpt.py", "short/11", "--scale", "micro", "--set", "schedule.steps=3", "--set",
        "system.precision=record", "--set", "system.warmup_steps=1", "--set", "validation.tokens=1024",
        "--with", "numerics.fp8_mlp", *args, "--out", str(out)
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = process_group.run(command, processes, cwd=ROOT, env=env, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(next(Path(out).glob("*/summary.json")).read_text())["curve"]


def test_one_and_two_processes_have_the_same_bits_with_ordered_sums(tmp_path):
    """So scales are those of logical ranks and of weights that all processes share. It trains, from warm-up
    and reset on."""
    args = ["--with", "numerics.fp8_mlp.c_proj", "--set", "system.reduction=ordered"]
    one = training(tmp_path / "1", *args)
    assert training(tmp_path / "2", *args, processes=2) == one and one[-1][1] < one[0][1]


# ----- transposes and FP8 products on a GPU, by stand-ins

SHAPES = [(1, 1), (3, 5), (64, 128), (65, 129), (130, 200), (1, 300), (257, 2)]


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_transpose_references_are_transposes(shape):
    x = random(*shape)
    y = transpose.transpose_copy_reference(x)
    assert y.is_contiguous() and y.data_ptr() != x.data_ptr()
    assert all(y[j, i] == x[i, j] for i in range(shape[0]) for j in range(shape[1]))


def test_what_the_transposes_cannot_do_is_one_line(monkeypatch):
    monkeypatch.setattr(device, "INTERPRETED", False)
    with pytest.raises(
        ValueError, match="^the Triton transpose_copy needs CUDA, and this is cpu; use torch$"
    ):
        transpose.transpose_copy(torch.ones(2, 2))
    monkeypatch.setattr(transpose, "refusal", lambda *a: None)
    x = torch.ones(2, 3)
    for call, message in ((lambda: transpose.transpose_copy(x.double()), "has no float64; use torch"),
                          (lambda: transpose.transpose_copy(x[0]), "wants matrices"),
                          (lambda: transpose.transpose_copy(x.clone().requires_grad_()), "has no gradient")):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("kind, ranks", [("torch", 1), ("triton", 2), ("torch", 8)])
def test_the_fp8_unit_gets_the_layout_it_wants(kind, ranks, monkeypatch):
    """Row-major times column-major, multiples of 16, float32 scales of shape (1,), which the CPU does not ask
    for. All products of the FP8 head and MLP, forward and backward, with so many ranks in a forward."""
    calls, tiled, real = [], [], torch._scaled_mm

    def scaled_mm(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.is_contiguous() and b.t().is_contiguous() and a.size(1) % 16 == b.size(1) % 16 == 0
        assert scale_a.dtype == scale_b.dtype == F32 and scale_a.shape == scale_b.shape == (1,)
        calls.append((a.dtype, b.dtype))
        return real(
            a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype, use_fast_accum=use_fast_accum
        )

    def tiles(x):
        tiled.append(x.shape)
        return transpose.transpose_copy_reference(x)

    x, up, down = problem(F32, rows=16 * ranks)
    scales = torch.full((ranks,), 0.01), SCALES[1]
    loss = lambda: (fp8_module.fp8_linear(x, up, 2.0, 32.0, 8.0, kind).square().sum()  # noqa: E731
                    + fp8_mlp(x, up, down, ranks, scales)[0].square().sum())
    plain = torch.autograd.grad(loss(), (x, up, down))
    monkeypatch.setattr(fp8_module, "has_fp8_units", lambda x: True)
    monkeypatch.setattr(fp8_module, "transpose_copy", tiles)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    for a, b in zip(torch.autograd.grad(loss(), (x, up, down)), plain, strict=True):
        assert relative(a, b) < 1e-5
    assert len(calls) == 3 + 2 * ranks  # the head's three; two products of each rank
    # w, g and x of the head's backward
    assert tiled == ([(48, 32), (32, 48), (32, 32)] if kind == "triton" else [])


def test_transposes_are_tiled_where_triton_is_unless_torch_is_asked_for(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(device, "INTERPRETED", False)
    monkeypatch.setattr(device, "HAS_C_COMPILER", True)
    for installed in (True, False):
        monkeypatch.setattr(device, "HAS_TRITON", installed)
        assert fp8_module.in_tiles("auto", cuda) == installed and not fp8_module.in_tiles("auto", cpu)
        assert fp8_module.in_tiles("triton", cuda) and not fp8_module.in_tiles("torch", cuda)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_bfloat16_holds_every_8_bit_value(dtype):
    x = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    assert torch.equal(fp8_module.round8(x, dtype).float().nan_to_num(7.0), x.nan_to_num(7.0))


def test_a_gpu_without_fp8_units_multiplies_the_same_values_and_its_compiler_sees_no_8_bit_number(
    monkeypatch,
):
    """There 8-bit values are kept in bfloat16: compiling a cast to e4m3 fails on an A100."""
    x, up, down = problem(F32, rows=32)
    loss = lambda: (fp8_module.fp8_linear(x, up, 2.0, 32.0, 8.0).square().sum()  # noqa: E731
                    + fp8_mlp(x, up, down, 2, SCALES)[0].square().sum()
                    + experts.fake_fp8(x).square().sum())
    plain = [loss().detach(), *torch.autograd.grad(loss(), (x, up, down))]

    real = torch.mm

    def units(a, b, *, out_dtype=None):
        assert out_dtype is None or (a.dtype == b.dtype == BF16 and out_dtype == F32)
        return real(a.float(), b.float())  # a CPU has no other out_dtype

    monkeypatch.setattr(fp8_module, "kept_in_bfloat16", lambda x: True)
    monkeypatch.setattr(torch, "mm", units)
    # here, because it loads the compiler: 2 s of every collection
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    graphs = []

    def shown(graph, inputs):
        graphs.append(
            {
                node.meta["val"].dtype for node in graph.graph.nodes
                if isinstance(node.meta.get("val"), torch.Tensor)
            }
        )
        return make_boxed_func(graph.forward)

    compiled = torch.compile(loss, fullgraph=True, backend=aot_autograd(fw_compiler=shown, bw_compiler=shown))
    for run in (loss, compiled):
        found = [run().detach(), *torch.autograd.grad(run(), (x, up, down))]
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert graphs == [{F32, BF16}] * 2
    torch._dynamo.reset()


# ----- Triton: in the interpreter

LAYOUTS = [lambda x: x, lambda x: x.t().contiguous().t(), lambda x: torch.cat([x, x], 1)[:, ::2]]
FUSED = [(8, 32, 16, 1), (130, 48, 272, 2), (129, 160, 40, 3), (24, 16, 129, 4)]  # rows, width, hidden, parts


def bits(x):
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def interpret():
    """Errors of P and its 8-bit copy against float64 on the same 8-bit operands; whether maxima and
    transposes are equal."""
    # without the cast: Triton 3.9's interpreter casts 7.9 to 4 (it loses the carry)
    linear_relu_sq.NARROW = F32
    found = {"fused": [], "copy": [], "mlp": []}
    for n, d, f, parts in FUSED:
        for dtype in (F32, F16):
            x8, w8 = random(n, d, dtype=torch.float8_e4m3fn), random(f, d, seed=1, dtype=torch.float8_e4m3fn)
            unscale = torch.rand(parts, generator=torch.Generator().manual_seed(2)) / d ** 0.5
            factor = torch.linspace(20, 200, parts)
            p, narrow, largest = linear_relu_sq.fp8_linear_relu_sq(x8, w8, unscale, factor, dtype)
            alone = linear_relu_sq.fp8_linear_relu_sq(x8, w8, unscale, None, dtype)
            wide = unscale.double().repeat_interleave(n // parts)[:, None]
            expected = ((x8.double() @ w8.double().T) * wide).clamp(min=0) ** 2
            scaled = (p.double() * factor.double().repeat_interleave(n // parts)[:, None]).clamp(max=448)
            found["fused"].append(
                {
                    "P": relative(p, expected), "narrow": relative(narrow, scaled),
                    "clamped": (scaled == 448).any().item(),
                    "largest": torch.equal(largest, p.float().unflatten(0, (parts, -1)).amax((1, 2))),
                    "alone": torch.equal(alone[0], p) and alone[1].numel() == alone[2].numel() == 0
                }
            )
    x8, w8 = random(8, 32, dtype=torch.float8_e4m3fn), random(16, 32, seed=1, dtype=torch.float8_e4m3fn)
    # as it is where x has a NaN; the interpreter reads one in e4m3 as 480
    factor = torch.tensor([1.0, math.nan, 1.0, 1.0])
    found["nan"] = [
        t.isnan().all(1).nonzero().flatten().tolist()
        for t in linear_relu_sq.fp8_linear_relu_sq(x8, w8, factor, factor.nan_to_num(1.0), F32)[:2]
    ]
    for scales in (None, SCALES):
        inputs = problem(F32)
        results = []
        for fused in (True, False):
            y, largest = (
                fp8_mlp(*inputs, 2, scales, fused) if scales is None
                else interpreted_mlp(inputs, scales, fused)
            )
            results.append([y, largest, *torch.autograd.grad(y.square().sum(), inputs)])
        found["mlp"].append([relative(a, b) if b.numel() else 0.0 for a, b in zip(*results, strict=True)])
    for shape in SHAPES:
        for dtype in (torch.float8_e5m2, torch.float8_e4m3fn, BF16, F16, F32):
            for layout in LAYOUTS:
                x = random(shape[0], shape[1]).view(torch.uint8).view(dtype)[:, :shape[1]]  # any bits
                x = layout(x.contiguous())
                y = transpose.transpose_copy(x)
                found["copy"].append(
                    y.is_contiguous() and y.dtype == dtype and torch.equal(bits(y), bits(x.t()))
                )

    x = random(40, 30)
    found["compiled"] = torch.equal(
        torch.compile(transpose.transpose_copy, backend="aot_eager", fullgraph=True)(x), x.t()
    )
    found["empty"] = list(transpose.transpose_copy(x[:0]).shape)
    # of which only the elements looked at come into being
    far = torch.empty(2 ** 31 + 1024, dtype=torch.int8)
    for x in (far.as_strided((3, 70), (2 ** 30 + 50, 1)), far.as_strided((70, 3), (1, 2 ** 30 + 50))):
        x.copy_(torch.arange(210).view(x.shape) % 100)
        found["copy"].append(torch.equal(transpose.transpose_copy(x), x.t()))
    return found


def interpreted_mlp(inputs, scales, fused):
    """fp8_mlp, with P written in float32 cast to e4m3 by torch."""
    from kernels import fp8_mlp as module
    original = module.fp8_linear_relu_sq

    def cast(*args):
        p, narrow, largest = original(*args)
        return p, narrow.to(torch.float8_e4m3fn), largest

    module.fp8_linear_relu_sq = cast
    try:
        return fp8_mlp(*inputs, 2, scales, fused)
    finally:
        module.fp8_linear_relu_sq = original


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_triton_kernels_equal_float64_in_the_interpreter():
    pytest.importorskip("triton")
    found = program("interpret", TRITON_INTERPRET="1")
    assert len(found["fused"]) == 2 * len(FUSED) and any(case["clamped"] for case in found["fused"])
    # float16: a rounding of pre and one of P
    for case, limit in zip(found["fused"], [1e-6, 1.5e-3] * len(FUSED)):
        assert case["P"] < limit and case["narrow"] < 1e-6 and case["largest"] and case["alone"], case
    assert found["nan"] == [[2, 3], [2, 3]]
    assert all(error < 1e-5 for errors in found["mlp"] for error in errors), found["mlp"]
    assert len(found["copy"]) == 15 * len(SHAPES) + 2 and all(found["copy"])

    assert found["compiled"] and found["empty"] == [30, 0]


# ----- Triton: ahead of time

def resources(arch, folder):
    import aot
    for module in (linear_relu_sq, transpose):
        module.refusal = lambda *a: None
    linear_relu_sq.capability = lambda device: arch
    found = {}

    def empty(*shape, dtype=torch.float8_e4m3fn):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def note(label, module, call):
        (kernel, _, args, kwargs), = aot.launches({module: aot.KERNELS[module]}, call)
        built = aot.build(kernel, *args, arch=arch, folder=folder, **kwargs)
        found[label] = {
            **built._asdict(),
            "ptx": [i for i in ("wgmma", "mma.sync", "cp.async", "e4m3") if i in built.ptx],
        }

    if arch >= 89:
        x, up, s = empty(4096, 768), empty(3072, 768), empty(2, dtype=F32)
        for label, factor in (("product up", None), ("product both", s)):
            note(label, linear_relu_sq, lambda: linear_relu_sq.fp8_linear_relu_sq(x, up, s, factor, BF16))
    for dtype in (torch.float8_e5m2, F32):
        note(f"copy {dtype}", transpose, lambda: transpose.transpose_copy(empty(65536, 50304, dtype=dtype)))

    return found


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_kernels_compile_ahead_of_time_within_the_shared_memory_and_without_spills(arch, tmp_path):
    pytest.importorskip("triton")
    import aot
    found = program("compile", str(arch), str(tmp_path))
    assert len(found) == (2 if arch == 80 else 4)
    for label, built in found.items():
        assert built["shared"] <= aot.SHARED[arch] and built["registers"] <= 255 and built["spilled"] == 0, (
            label,
            built,
        )
        if label.startswith("product"):  # multiplied as 8-bit operands, while the next ones are loaded
            assert {"wgmma" if arch == 90 else "mma.sync", "cp.async", "e4m3"} <= set(built["ptx"]), (
                label,
                built,
            )
        else:
            assert built["registers"] <= 64, (label, built)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(interpret() if sys.argv[1] == "interpret" else resources(int(sys.argv[2]), sys.argv[3])))
