"""Laws of the MLP and of q, k and v in FP8 in both passes (records 90 and 92), and of their scales."""

import dataclasses

import pytest
import torch

import schedule
from common.errors import UserError
from kernels.fp8_mlp import Scales, fp8_mlp_both
from layers.attention import FP8Projection
from model import GPT
from optim import Optimizer
from settings import deltas
from small_models import BOS
from step_hooks import begin_step
from system import warmup

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def random(*shape, seed=0, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def rounded(x, mantissa, least, largest):
    """float64 x rounded to a grid of so many mantissa bits, ties to even, clamped. least: exponent of the
    smallest normal number."""
    exponent = (torch.frexp(x).exponent - 1).clamp(min=least)
    grid = torch.exp2(exponent.double() - mantissa)
    return (torch.round(x / grid) * grid).clamp(-largest, largest)


def e4m3(x):
    return rounded(x, 3, -6, 448)


def e5m2(x):
    return rounded(x, 2, -14, 57344)


def test_e5m2_of_the_tests_is_the_format_of_torch():
    x = torch.cat([random(999).double() * scale for scale in (1e-6, 1e-3, 1.0, 1e4, 1e5)])
    assert torch.equal(e5m2(x), x.clamp(-57344, 57344).float().to(torch.float8_e5m2).double())


def problem(dtype, rows=24, dim=32, hidden=48, out=16):
    x, up, down = (random(*shape, seed=i, dtype=dtype)
                   for i, shape in enumerate(((rows, dim), (hidden, dim), (out, hidden))))
    x[rows // 2:] *= 3  # parts of other sizes
    return [t.requires_grad_() for t in (x, up / dim ** 0.5, down / hidden ** 0.5)]


def scales(factor=1.0, gradients=torch.float8_e5m2):
    """Of two parts; factor: of all, so that some entries are clamped. Gradients in e4m3, as in record 90:
    that of y has the scale of its largest entry."""
    vectors = {"x": [0.01, 0.03], "p": [0.02, 0.3], "h": [0.0003, 0.002], "up": 0.002, "down": 0.001}
    exact = gradients == torch.float8_e4m3fn
    if exact:
        vectors["h"] = [0.03, 0.2]
    return Scales(g=None if exact else factor * 0.001, format=gradients,
                  **{name: factor * torch.tensor(x) for name, x in vectors.items()})


def emulated(x, up, down, g, s, dtype):
    """(y, dx, dU, dD, largest P, largest |x|, largest |dpre|) by the formulas, in float64 between the
    roundings."""
    def kept(t):
        return t.to(dtype).double()

    x, up, down, g = (t.detach().double() for t in (x, up, down, g))
    sx, sp, su, sd, sh = (torch.as_tensor(t).double() for t in (s.x, s.p, s.up, s.down, s.h))
    narrowed, largest8 = (e5m2, 57344) if s.format == torch.float8_e5m2 else (e4m3, 448)
    up8, down8 = e4m3(up / su), e4m3(down / sd)
    found, dup, ddown = [], torch.zeros_like(up), torch.zeros_like(down)
    for i, (part, gradient) in enumerate(zip(x.chunk(2), g.chunk(2))):
        sg = gradient.abs().max().float().double() / largest8 if s.g is None else s.g
        gradient = narrowed(gradient / sg)
        x8 = e4m3(part / sx[i])
        p = kept(kept(sx[i] * su * x8 @ up8.T).clamp(min=0) ** 2)
        p8 = e4m3(p / sp[i])
        dpre = kept(2 * kept(sg * sd * gradient @ down8) * (sp[i] * p8).sqrt())
        h8 = narrowed(dpre / sh[i])
        dup += sh[i] * sx[i] * h8.T @ x8
        ddown += sg * sp[i] * gradient.T @ p8
        found.append((sp[i] * sd * p8 @ down8.T, sh[i] * su * h8 @ up8, p.max(), part.abs().max(),
                      dpre.abs().max()))
    y, dx, *largest = zip(*found)
    return torch.cat(y), torch.cat(dx), dup, ddown, *(torch.stack(most) for most in largest)


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.mark.feature("numerics.fp8_mlp.backward", "numerics.fp8_mlp.backward.grad")
@pytest.mark.parametrize("gradients", [torch.float8_e5m2, torch.float8_e4m3fn])
@pytest.mark.parametrize("factor", [1.0, 0.01])
@pytest.mark.parametrize("dtype, limit", [(F32, 1e-6), (BF16, 2 ** -7)])
def test_both_passes_are_the_quantised_products(dtype, limit, factor, gradients):
    """factor 0.01: operands of every kind are clamped. At bfloat16 sums in float32 and float64 may fall on
    two sides of a rounding, and an 8-bit operand behind it too."""
    inputs, s = problem(dtype), scales(factor, gradients)
    probe = torch.zeros(2, requires_grad=True)
    y, largest, most = fp8_mlp_both(*inputs, s, 3 * probe)
    g = random(*y.shape, seed=3, dtype=dtype)
    *gradients, measured = torch.autograd.grad(y, [*inputs, probe], g)
    expected = emulated(*inputs, g, s, dtype)
    found = (y, *gradients, largest, most, measured / 3)
    assert [t.dtype for t in found[:4]] == [dtype] * 4 and most.dtype == F32
    if dtype == BF16:  # an entry of dpre that falls to another 8-bit value
        limit = 0.02
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < limit
    exact = torch.relu(inputs[0].double() @ inputs[1].double().T) ** 2 @ inputs[2].double().T
    error = (y.double() - exact).norm() / exact.norm()
    assert 0.005 < error < 0.1 if factor == 1.0 else error > 0.5


def test_a_part_does_not_see_the_others():
    inputs, s, g = problem(F32), scales(), random(24, 16, seed=3)
    whole = fp8_mlp_both(*inputs, s, torch.zeros(2))[0]
    dx = torch.autograd.grad(whole, inputs[0], g)[0]
    for i, rows in enumerate((slice(0, 12), slice(12, 24))):
        alone = s._replace(x=s.x[i:i + 1], p=s.p[i:i + 1], h=s.h[i:i + 1])
        x = inputs[0][rows].detach().requires_grad_()
        y = fp8_mlp_both(x, *inputs[1:], alone, torch.zeros(1))[0]
        assert torch.equal(y, whole[rows]) and torch.equal(torch.autograd.grad(y, x, g[rows])[0], dx[rows])


@pytest.mark.slow
def test_compiled_both_passes_are_one_graph_with_the_same_bits():
    inputs, results = problem(F32), []
    probe = torch.zeros(2, requires_grad=True)

    def both(*t):
        return fp8_mlp_both(*t, scales(), 2 * probe)

    for run in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
        outputs = run(*inputs)
        results.append([*outputs, *torch.autograd.grad(outputs[0].square().sum(), [*inputs, probe])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch._dynamo.reset()


# ----- q, k and v

@pytest.mark.feature("numerics.fp8_qkv")
@pytest.mark.parametrize("out", [48, 40])
@pytest.mark.parametrize("dtype, limit", [(F32, 1e-6), (BF16, 2 ** -8)])
def test_q_k_and_v_are_one_quantised_product_in_both_passes(dtype, limit, out):
    """Clamped at 8 times the scale's 448, the weight by its largest entry; the gradient is that of a rank's
    sum of losses, eight times the trainer's."""
    s = deltas.resolve("short/90").settings
    x, w = random(2, 16, 32, dtype=dtype), random(out, 32, seed=1, dtype=dtype)
    x[0, 0] *= 10
    x, w = x.requires_grad_(), w.requires_grad_()
    y = FP8Projection(s)(x, w)
    g = random(*y.shape, seed=2, dtype=dtype) / 100
    dx, dw = torch.autograd.grad(y, (x, w), g)
    sx, sw, sg = 8 / 448, w.detach().double().abs().max() / 448, 1 / 448 / 8
    x8, w8 = e4m3(x.detach().double().flatten(0, 1) / sx), e4m3(w.detach().double() / sw)
    g8 = e4m3(g.double().flatten(0, 1) / sg)
    assert (x8.abs() == 448).any() and (w8.abs() == 448).any()
    for found, expected in ((y, sx * sw * x8 @ w8.T), (dx, sg * sw * g8 @ w8), (dw, sg * sx * g8.T @ x8)):
        assert relative(found.flatten(0, -2), expected) < limit


# ----- the model

LIFT = [f"numerics.{name}=float32" for name in ("matmul", "eval_matmul", "residual", "newton_schulz")]
BOTH = "numerics.fp8_mlp.backward={hidden_margin=1.25, c_fc_delayed=true}"


def settings(*sets, with_=("numerics.fp8_mlp", "numerics.fp8_mlp.c_proj"), ref="short/11"):
    return deltas.resolve(
        ref, scale="micro", with_=with_, sets=["system.precision=record", *LIFT, *sets]
    ).settings


def build(*sets, seed=0, **kwargs):
    s = settings(*sets, **kwargs)
    model = GPT(s)
    model.initialise(seed)
    return s, model


def rows(s, seed=0):
    shape = (8 * s.data.tokens_per_rank // s.data.seq_len, s.data.seq_len)
    return torch.randint(1256, shape, generator=torch.Generator().manual_seed(seed))


def step(optimizer, model, s, x, i, microbatch=8):
    begin_step(model)
    for part in x.chunk(8 // microbatch):
        optimizer.expect(last=True)
        context = model.context(part, BOS, schedule.windows(s, 0))
        (model(part, part, context).mean() * microbatch / 8).backward()
        optimizer.accumulate()
    optimizer.step(schedule.plan(s)[i])


@pytest.mark.feature("numerics.fp8_mlp.backward", "numerics.fp8_mlp.backward.input_margin",
                     "numerics.fp8_mlp.backward.hidden_margin", "numerics.fp8_mlp.backward.c_fc_delayed",
                     "numerics.fp8_mlp.c_proj.weight")
@pytest.mark.parametrize("delayed", [True, False])
def test_delayed_scales_follow_the_pass_before(delayed):
    """Input and hidden gradient by the maxima of the rank's previous pass, weights by the step before's after
    the exact ones, or always by their own."""
    weights = [BOTH] if delayed else [BOTH.replace("true", "false"), "numerics.fp8_mlp.c_proj.weight=false"]
    s, model = build(
        *weights, "numerics.fp8_mlp.c_proj.exact_steps=1", "numerics.fp8_mlp.c_proj.first=0.25")
    optimizer, mlp = Optimizer(model, s), model.blocks[4].mlp
    state, seen, weights = mlp.fp8, [], []
    mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach().flatten(0, 1)))
    first = {name: getattr(state, name).clone() for name in ("input", "hidden")}
    assert torch.equal(first["input"], torch.full((8,), 8 / 448))
    assert torch.equal(first["hidden"], torch.full((8,), 1 / 448))
    assert torch.equal(state.activation, torch.full((8,), 0.25))
    for i in range(4):  # in the first step zeros hide the gradient, and its scale stays
        weights.append([w.detach().abs().max() for w in (mlp.c_fc, mlp.c_proj)])
        step(optimizer, model, s, rows(s, i), i)
        assert not (state.activation == 0.25).any()
        most = torch.stack([part.abs().max() for part in seen[-1].chunk(8)])
        assert relative(state.input, 1.25 * most / 448) < 1e-6
        for k, scale in enumerate((state.c_fc_weight, state.weight)):
            exact = i <= 1 or not delayed
            expected = weights[i][k] / 448 if exact else 1.12 * weights[i - 1][k] / 448
            if expected > 0:
                assert torch.allclose(scale, expected, rtol=1e-6, atol=0), (i, k)
        assert i > 0 or torch.equal(state.hidden, first["hidden"])
    assert len(state.hidden.unique()) == 8 and not torch.equal(state.hidden, first["hidden"])
    assert state.probe.grad is None


def test_hidden_scales_are_of_the_gradient_of_a_rank_s_own_loss():
    """Whatever the number of ranks in a forward; undone: mean over tokens and ranks."""
    found = []
    for microbatch in (8, 2):
        s, model = build(BOTH)
        optimizer = Optimizer(model, s)
        for i in range(4):  # a zero head and zero projections hide the hidden gradients of two steps
            step(optimizer, model, s, rows(s, i), i, microbatch)
        found.append(torch.cat([mlp.fp8.hidden for mlp in model.fp8_mlps()]))
    assert len(found[0].unique()) > 60
    assert relative(found[1], found[0]) < 0.02
    # the gradient of a rank's sum at the hidden layer, without FP8
    mlp = model.blocks[5].mlp
    x, g = random(2, 16, 48), random(2, 16, 48, seed=1) / 16 / 8
    mlp.fp8.forward(x, mlp.c_fc, mlp.c_proj, 16).backward(g)
    with torch.enable_grad():
        pre = (x @ mlp.c_fc.detach().T).requires_grad_()
        noted = torch.autograd.grad(torch.relu(pre).square() @ mlp.c_proj.detach().T, pre, g * 16 * 8)[0]
    expected = noted.abs().amax((1, 2)) * 1.25 / 57344
    assert relative(mlp.fp8.hidden[-2:], expected) < 0.2


def test_validation_does_not_round_and_the_reset_brings_all_back():
    both = dict(with_=("numerics.fp8_mlp", "numerics.fp8_mlp.c_proj", "numerics.fp8_qkv"))
    s, model = build(BOTH, "model.head.loss_reduction=sum", **both)
    _, plain = build("model.head.loss_reduction=sum", with_=())
    optimizer, x = Optimizer(model, s), rows(s)
    before = warmup.state_hash(model, optimizer)
    for i in range(3):
        step(optimizer, model, s, x, i)
    assert warmup.state_hash(model, optimizer) != before
    plain.load_state_dict(model.state_dict())
    context = model.context(x, BOS, schedule.windows(s, 0))
    with torch.no_grad():
        assert torch.equal(model.eval()(x, x, context), plain.eval()(x, x, context))
        trained, exact = model.train()(x, x, context), plain.train()(x, x, context)
    assert not torch.equal(trained, exact) and (trained - exact).abs().mean() < 0.1
    model.initialise(0)
    optimizer.reset()
    assert warmup.state_hash(model, optimizer) == before


@pytest.mark.slow
def test_a_compiled_mlp_moves_its_scales():
    from torch._dynamo.testing import CompileCounterWithBackend
    s, model = build(BOTH)
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
        found.append([b.clone() for b in mlp.buffers()] + [p.grad.clone() for p in mlp.parameters()])
        mlp.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("ref, expected", [
    ("short/90", dict(first=16 / 448, activation=1.25, weight=None, input=8 / 448, input_margin=1.25,
                      grad=None, hidden=1 / 448, hidden_margin=1.25, format="e4m3", c_fc_delayed=False)),
    ("short/92", dict(first=1.0, activation=1.03, weight=1.12, input=2 ** -4, input_margin=None, grad=2 ** -6,
                      hidden=2 ** -6, hidden_margin=1.25, format="e5m2", c_fc_delayed=True, exact_steps=16))
])
def test_the_scales_of_the_records(ref, expected):
    n = deltas.resolve(ref).settings.numerics
    found = dataclasses.asdict(n.fp8_mlp.c_proj) | dataclasses.asdict(n.fp8_mlp.backward)
    assert {key: found[key] for key in expected} == expected
    assert (n.fp8_qkv.x, n.fp8_qkv.grad) == (8 / 448, 1 / 448)


@pytest.mark.feature("numerics.fp8_qkv", "numerics.fp8_mlp.backward")
@pytest.mark.parametrize("ref, sets, message", [
    ("short/1", (), "numerics.fp8_qkv has no bias vectors"),
    ("variants/5", ("model.head.loss_reduction=sum",), "numerics.fp8_qkv is for whole heads"),
    ("short/11", (), "numerics.fp8_qkv needs model.head.loss_reduction=sum or step_sum"),
    ("short/89", ("model.model_dim=744", "model.attn.num_heads=6"), "numerics.fp8"),
])
def test_what_it_cannot_do_is_refused_in_one_line(ref, sets, message):
    with pytest.raises(UserError) as caught:
        deltas.resolve(ref, with_=["numerics.fp8_qkv"], sets=sets)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="numerics.fp8_mlp.backward needs numerics.fp8_mlp.c_proj"):
        deltas.resolve("short/84", sets=["numerics.fp8_mlp.backward={}"])
