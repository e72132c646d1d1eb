"""The update rules of records 34 to 57 against references of their own: Polar Express, NorMuon, cautious
decay, kept mantissa, frozen groups, a tied table that parts, and the ways in which all of it travels.

Golden numbers of the originals: records 5, 12 and 20 in bfloat16, record 53 in float64.
"""

import dataclasses
import os

import numpy as np
import pytest
import torch

import process_group
import schedule
from common.errors import UserError
from golden_records import load
from kernels import symmetric
from kernels.newton_schulz import POLAR_EXPRESS, newton_schulz
from optim import RULES, Optimizer
from settings import deltas
from settings.optim import LABELS, Label, MatrixLabel, Optim
from small_models import Toy, plan, settings, update
from system.comm import communication
from system.place import local_ranks
from updates import mantissa, views
from updates.adam import CHUNK, AdamW
from updates.muon import Muon
from updates.slots import CautiousDecay, NorMuon, Step
from updates.views import Views

F64 = torch.float64
MUON = ["optim.muon.polar_express=true", "optim.muon.normuon={}",
        "optim.muon.cautious_decay={weight_decay=1.2}"]
KEPT = ["numerics.matrix=bfloat16", "numerics.matrix_mantissa=true"]
ADAM = ["optim.adam.cautious_decay={weight_decay=0.005}"]


def noise(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ----- rounding of the originals

@pytest.mark.feature("numerics.newton_schulz_form", "numerics.newton_schulz")
@pytest.mark.parametrize("name, ref", [("record05_optim", "short/5"), ("record12_optim", "short/12"),
                                       ("record20_optim", "short/20")])
def test_newton_schulz_rounds_as_the_originals_do(name, ref):
    """(c A) B, not c (A B), with which 81 to 91 % of the entries differ. (Another processor may add in
    another order.)"""
    golden, _ = load(name)
    n = deltas.resolve(ref).settings.numerics
    for tensor in ("wide", "tall", "square"):
        g = torch.from_numpy(golden[f"grad/{tensor}"][0])
        x = newton_schulz(g, dtype=getattr(torch, n.newton_schulz), form=n.newton_schulz_form,
                          norm_dtype=getattr(torch, n.newton_schulz_norm))
        assert np.mean(x.float().numpy() != golden[f"ns/out_native_bf16/{tensor}"]) < 0.02


@pytest.mark.feature("optim.muon.momentum_ema")
@pytest.mark.parametrize("tensor", ["wide", "square"])
def test_momentum_and_parameters_of_record_20_round_as_the_originals_do(tensor):
    """In float32 M + (1-mu)(g - M) and mu M + (1-mu) g differ in half of the entries, from the second call
    on."""
    golden, _ = load("record20_optim")
    s = deltas.resolve("short/20").settings
    rule = Muon.of(s, s.optim.group("matrix", "c_proj"))
    p = torch.from_numpy(golden[f"init/{tensor}"])[None].clone()
    state = {"momentum_buffer": torch.zeros_like(p)}
    for call in range(4):
        of_step = plan(lr_factor=golden["step_lr_factor"][call].item(),
                       momentum=golden["step_muon_momentum"][call].item())
        g = torch.from_numpy(golden[f"grad/{tensor}"][call])[None]
        rule.update_(p, g, state, rule.numbers(of_step, call + 1), Views())
        for key, got in (("momentum_buffer", state["momentum_buffer"]), ("param", p)):
            assert np.mean(got[0].numpy() != golden[f"native/{key}/{tensor}"][call]) < 0.02, (key, call)


@pytest.mark.feature("optim.muon.momentum_ema")
@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (24, 24)], ids=["wide", "tall", "square"])
def test_six_updates_of_record_26_round_as_its_program_does(shape):
    """The source in its log takes both steps of the momentum by lerp on float32, then casts to bfloat16.

    mu M + (1-mu) g differs from it in a third of the entries or more from the second step on.
    """
    s = deltas.resolve("short/26").settings
    rule, n = Muon.of(s, s.optim.group("matrix", "c_proj")), s.numerics
    p = noise(1, *shape, seed=1, dtype=torch.float32)
    theirs, sums, buffer = p.clone(), torch.zeros_like(p), torch.zeros_like(p)
    state = {"momentum_buffer": torch.zeros_like(p)}
    for call in range(6):
        g = noise(1, *shape, seed=10 + call, dtype=torch.float32)
        of_step = plan(lr_factor=1 - call / 10, momentum=0.85 + call / 100)
        mu, lr = of_step.momentum, s.optim.muon.lr * of_step.lr_factor * max(1, shape[0] / shape[1]) ** 0.5
        rule.update_(p, g.clone(), state, rule.numbers(of_step, call + 1), Views())
        buffer.lerp_(g, 1 - mu)
        direction = newton_schulz(g.lerp(buffer, mu), dtype=torch.bfloat16, form=n.newton_schulz_form,
                                  norm_dtype=getattr(torch, n.newton_schulz_norm))
        theirs.add_(direction, alpha=-lr)
        sums = mu * sums + (1 - mu) * g
        assert torch.equal(state["momentum_buffer"], buffer), call
        # it multiplies the rate, not the direction, by sqrt(rows / cols): one more rounding
        # here if that is not 1
        ulps = 4 if shape[0] > shape[1] else 0
        assert (p - theirs).abs().max() <= ulps * torch.finfo(torch.float32).eps, call
        assert call == 0 or (sums != buffer).float().mean() > 0.3


def test_the_symmetric_form_rounds_each_quadratic_once():
    """b A + c A A in float32 and then in bfloat16; the other forms round c A, its product and the sum."""
    x = noise(3, 24, 40, dtype=torch.float32).bfloat16() / 20
    gram = (x @ x.mT).float()
    a, b, c = 3.4445, -4.7750, 2.0315
    inner = (b * gram + c * (gram @ gram)).bfloat16()
    expected = (a * x.float() + inner.float() @ x.float()).bfloat16()
    got = symmetric.step_reference(x, a, b, c)
    assert (got != expected).float().mean() < 0.02


# ----- Polar Express

SHAPES = {"tall": (40, 12), "wide": (12, 40), "square": (24, 24), "stacked": (3, 20, 12)}


@pytest.mark.feature("optim.muon.polar_express", "optim.muon.ns_steps")
@pytest.mark.parametrize("form", ["expanded", "factored", "symmetric"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("steps", [3, 5, 7])
def test_polar_express_is_its_polynomials_on_the_singular_values(shape, steps, form):
    g = noise(*shape).numpy()
    left, values, right = np.linalg.svd(g, full_matrices=False)
    values = values / (1.02 * np.sqrt((g ** 2).sum((-2, -1)))[..., None] + 1e-6)
    for i in range(steps):
        a, b, c = POLAR_EXPRESS[min(i, 4)]
        values = a * values + b * values ** 3 + c * values ** 5
    expected = (left * values[..., None, :]) @ right
    how = dict(dtype=F64, norm_dtype=F64, form=form, polar_express=True)
    got = newton_schulz(torch.from_numpy(g), steps=steps, **how)
    assert np.abs(got.numpy() - expected).max() < 1e-12


def test_five_polynomials_bring_singular_values_of_a_hundredth_close_to_one():
    values = torch.logspace(-2, 0, 16, dtype=F64)
    left, right = (torch.linalg.qr(noise(16, 16, seed=i))[0] for i in (1, 2))
    x = newton_schulz(left * values @ right.T, dtype=F64, norm_dtype=F64, polar_express=True)
    spread = torch.linalg.svdvals(x)
    assert 0.85 < spread.min() and spread.max() < 1.15


# ----- NorMuon

def normalised(x, moments, floor, axis):
    """NorMuon as published, on one matrix in numpy: x / sqrt(s), at its old Frobenius norm."""
    y = x / np.sqrt(np.maximum(moments, floor))
    return y * np.linalg.norm(x) / max(np.linalg.norm(y), 1e-10)


@pytest.mark.feature("optim.muon.normuon")
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (24, 24), (1, 12)],
                         ids=["tall", "wide", "square", "row"])
def test_normuon_of_each_matrix_is_the_published_one(shape, axis):
    slot, of = NorMuon(0.9, 1e-10, F64), Views(variance_axis=axis)
    state = {"second_moment": torch.zeros(2, *slot.state(shape, F64, of)["second_moment"][0], dtype=F64)}
    assert state["second_moment"].numel() == 2 * shape[0 if axis == -1 else 1]
    moments = np.zeros((2, *state["second_moment"].shape[1:]))
    for i in range(3):
        x = noise(2, *shape, seed=i)
        got = slot(x.clone(), Step(None, x, state, {}, of, "", {})).numpy()
        for k in range(2):
            moments[k] = 0.9 * moments[k] + 0.1 * (x[k].numpy() ** 2).mean(axis, keepdims=True)
            assert np.abs(got[k] - normalised(x[k].numpy(), moments[k], 1e-10, axis)).max() < 1e-13
    assert np.abs(state["second_moment"].numpy() - moments).max() < 1e-15


@pytest.mark.feature("optim.muon.normuon.attn")
@pytest.mark.parametrize("attn, axis", [("output", -1), ("input", -2)])
def test_normuon_of_joined_matrices_is_that_of_each(attn, axis):
    """q, k and v as one matrix (3D, D): per output channel, or one for each input channel of the three."""
    slot = NorMuon(0.9, 1e-10, F64)
    of = Views(pieces=(("qkv", 0, 3), ("o", 3, 4)), variance_axis=axis)
    state = {"second_moment": torch.zeros(2, *slot.state((4, 6, 6), F64, of)["second_moment"][0], dtype=F64)}
    x = noise(2, 4, 6, 6)
    got = slot(x.clone(), Step(None, x, state, {}, of, "", {}))
    for part in (slice(0, 3), slice(3, 4)):
        for k in range(2):
            matrix = x[k, part].flatten(0, 1).numpy()
            expected = normalised(matrix, 0.1 * (matrix ** 2).mean(axis, keepdims=True), 1e-10, axis)
            assert np.abs(got[k, part].flatten(0, 1).numpy() - expected).max() < 1e-13


@pytest.mark.feature("optim.muon.normuon.attn", "optim.muon.normuon.floor")
def test_record_41_mixes_q_k_v_and_o_in_the_columns_of_their_storage():
    """Four (d, d) matrices in the memory of one (d, 4d): a second moment for each (row mod 4, column), and
    one norm."""
    slot, of = NorMuon(0.9, 1e-20, F64), Views(variance_axis=None)
    assert of.unit((4, 8, 8)) == (4, 8, 8)
    state = {"second_moment": torch.zeros(1, *slot.state((4, 8, 8), F64, of)["second_moment"][0], dtype=F64)}
    x = noise(1, 4, 8, 8)
    got = slot(x.clone(), Step(None, x, state, {}, of, "", {}))[0].numpy()
    rows = x[0].reshape(32, 8).numpy()  # of q, then k, v and o
    moments = np.stack([0.1 * (rows[r::4] ** 2).mean(0) for r in range(4)])  # (4, 8)
    expected = normalised(rows, moments[np.arange(32) % 4], 1e-20, None)
    assert np.abs(got.reshape(32, 8) - expected).max() < 1e-13


def axes(*sets):
    """{kind of matrix: its variance axis} in a record of the first form of NorMuon with these changes."""
    s = settings("short/33", "optim.muon.normuon={}", *sets)
    return {"qkvo": views.qkvo(s).variance_axis, "up": views.c_fc(s).variance_axis,
            "down": views.c_proj(s).variance_axis, "gate": views.gate(s).variance_axis}


@pytest.mark.feature("optim.muon.normuon.attn", "optim.muon.normuon.gates")
def test_the_axis_of_the_variance_changes_with_its_record_and_that_of_the_mlp_stays():
    """-1: per output channel, -2: per input channel. An MLP's neuron is a hidden unit: an output of the first
    matrix, an input of the second."""
    mlp = {"up": -1, "down": -2}
    mixed, inputs = "optim.muon.normuon.attn=mixed", "optim.muon.normuon.attn=input"
    assert axes(mixed, "optim.muon.normuon.gates=input") == {"qkvo": None, "gate": -2, **mlp}  # record 41
    assert axes(inputs, "optim.muon.normuon.gates=input") == {"qkvo": -2, "gate": -2, **mlp}  # 42
    assert axes() == {"qkvo": -1, "gate": -1, **mlp}  # 48


def test_normuon_is_told_by_its_floor_how_small_a_moment_may_be():
    """Record 41 bounds the root by 1e-10, later ones the moment: 1e-20 and 1e-10 here."""
    x = torch.full((1, 2, 2), 1e-7, dtype=F64)
    x[0, 0] = 1.0
    for floor in (1e-20, 1e-10):
        state = {"second_moment": torch.zeros(1, 2, 1, dtype=F64)}
        got = NorMuon(0.9, floor, F64)(x.clone(), Step(None, x, state, {}, Views(), "", {}))[0].numpy()
        moments = 0.1 * (x[0].numpy() ** 2).mean(-1, keepdims=True)
        assert np.allclose(got, normalised(x[0].numpy(), moments, floor, -1), rtol=1e-12, atol=0)


# ----- cautious decay

def decayed(p, u, lr, mul, decay, masked):
    """p - lr mul (u + lr decay p), the second term where masked(u p), in numpy."""
    return p - lr * mul * (u + lr * decay * p * masked(u * p))


@pytest.mark.feature("optim.muon.cautious_decay")
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (24, 24)], ids=["tall", "wide", "square"])
def test_cautious_decay_of_muon_takes_the_base_rate_and_the_factors_of_the_update_once(shape):
    s = settings("short/33", *MUON[:1], MUON[2], "optim.muon.scale=sqrt_ratio", "optim.qkvo={lr_mul=2.0}")
    start, g = noise(*shape), noise(*shape, seed=1)
    start[0, 0] = 0.0
    model = Toy(x=(start, "matrix", "qkvo"))
    update(Optimizer(model, s), model, {"x": g}, plan(lr_factor=0.5))
    u = newton_schulz((1 - 0.9 * 0.9) * g, dtype=F64, norm_dtype=F64, polar_express=True)
    mul = 2 * max(1, shape[0] / shape[1]) ** 0.5
    expected = decayed(start.numpy(), u.numpy(), 0.5 * s.optim.muon.lr, mul, 1.2, lambda x: x >= 0)
    assert np.abs(model.x.detach().numpy() - expected).max() < 1e-13


def test_muon_decays_a_matrix_without_a_gradient_whole():
    """Its mask is u p >= 0, also where AdamW's is strict: lr^2 weight_decay p in a step."""
    s = settings("short/33", *MUON, "optim.adam.cautious_decay={strict=true}")
    start = noise(12, 12)
    model = Toy(x=(start, "matrix", "qkvo"))
    update(Optimizer(model, s), model, {}, plan(lr_factor=0.5))
    assert torch.allclose(model.x, start * (1 - (0.5 * s.optim.muon.lr) ** 2 * 1.2), rtol=1e-14, atol=0)


@pytest.mark.feature("optim.adam.cautious_decay", "optim.adam.cautious_decay.strict",
                     "optim.scalar.decay_mul")
@pytest.mark.parametrize("strict", [False, True])
def test_cautious_decay_of_adam_is_quadratic_in_the_rate_and_strict_where_nothing_moves(strict):
    """An entry without a gradient has the update 0: from record 53 on it does not decay."""
    s = settings("short/33", ADAM[0], f"optim.adam.cautious_decay.strict={str(strict).lower()}",
                 "optim.scalar.decay_mul=3.0", "optim.scalar.lr=0.6")
    start, gradients = noise(50), [noise(50, seed=i) for i in (1, 2)]
    for g in gradients:
        g[:5] = 0.0
    model = Toy(x=(start, "scalar", "sa_lambdas"))
    optimizer, expected, m, v = Optimizer(model, s), start.numpy().copy(), np.zeros(50), np.zeros(50)
    adam = s.optim.adam
    for t, g in enumerate(gradients, 1):
        update(optimizer, model, {"x": g}, plan(t, lr_factor=1 / t))
        m = adam.beta1 * m + (1 - adam.beta1) * g.numpy()
        v = adam.beta2 * v + (1 - adam.beta2) * g.numpy() ** 2
        u = (1 - adam.beta2 ** t) ** 0.5 / (1 - adam.beta1 ** t) * m / (np.sqrt(v) + adam.eps)
        masked = (lambda x: x > 0) if strict else (lambda x: x >= 0)
        expected = decayed(expected, u, 0.6 / t, 1, 3 * 0.005, masked)
    assert np.abs(model.x.detach().numpy() - expected).max() < 1e-13
    still = torch.equal(model.x.detach()[:5], start[:5])
    assert still == strict


def test_the_decay_of_records_43_to_47_joins_the_update_in_bfloat16():
    p, u = noise(1, 8, 8, dtype=torch.float32), noise(1, 8, 8, seed=1, dtype=torch.float32).bfloat16().float()
    step = Step(p, u, {}, {"lr": 0.03}, Views(), "", {})
    exact = CautiousDecay(1.2, torch.float32)(u, step)
    rounded = CautiousDecay(1.2, torch.bfloat16)(u, step)
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, exact.bfloat16())
    assert not torch.equal(rounded.float(), exact)


@pytest.mark.parametrize("sets, message", [
    ([*ADAM, "optim.embed.weight_decay=0.1"], "optim.embed.weight_decay = 0.1 is the decoupled decay"),
    ([MUON[2], "optim.qkvo={weight_decay=0.1}"], "optim.qkvo.weight_decay = 0.1 is the decoupled decay"),
    (["optim.scalar.decay_mul=0.0"], "optim.scalar.decay_mul needs optim.adam.cautious_decay"),
    ([*ADAM, "optim.qkvo={decay_mul=2.0}"], "optim.qkvo.decay_mul is AdamW's"),
    (["optim.qkvo={adamw=true, lr_mul=2.0}"], "optim.qkvo.lr_mul is Muon's"),
    (["optim.muon.normuon={attn=\"mixed\"}", "optim.muon.split_qkv=false"], "is for separate q, k and v"),
    ([*KEPT, "optim.muon=false"], "needs numerics.matrix=bfloat16 and optim.muon"),
    (["numerics.matrix_mantissa=true"], "numerics.matrix_mantissa needs numerics.matrix=bfloat16"),
    (["numerics.matrix=bfloat16", "numerics.matrix_mantissa=true", "system.comm=allreduce_updates"],
     "has no place for the lower bits")])
def test_settings_of_the_rules_that_mean_nothing_are_refused(sets, message):
    with pytest.raises(UserError, match=message):
        deltas.resolve("short/33", sets=sets)


@pytest.mark.feature("optim.embed.beta1", "optim.embed.beta2", "optim.lm_head.beta1", "optim.lm_head.beta2",
                     "optim.matrix.beta1", "optim.matrix.beta2", "optim.scalar.beta1", "optim.scalar.beta2",
                     "optim.router.beta1", "optim.router.beta2")
@pytest.mark.parametrize("role", ["embed", "lm_head", "matrix", "scalar", "router"])
def test_the_betas_of_a_group_replace_adam_s_and_a_label_s_replace_the_group_s(role):
    """beta1 of the group with beta2 of optim.adam; a label keeps the one that it does not set."""
    plain = Optim()
    section = dataclasses.replace(getattr(plain, role), beta1=0.5)
    changed = dataclasses.replace(plain, **{role: section})
    for other in ("embed", "lm_head", "matrix", "scalar", "router"):
        found, beta1 = changed.group(other, other), 0.5 if other == role else plain.adam.beta1
        assert (found.beta1, found.beta2) == (beta1, plain.adam.beta2)
    for label in LABELS.get(role, ()):
        own = (MatrixLabel if role == "matrix" else Label)(beta2=0.75)
        found = dataclasses.replace(changed, **{label: own}).group(role, label)
        assert (found.beta1, found.beta2) == (0.5, 0.75)
    second = dataclasses.replace(plain, **{role: dataclasses.replace(section, beta2=0.25)}).group(role, role)
    assert (second.beta1, second.beta2) == (0.5, 0.25)


# ----- kept mantissa

def test_a_number_is_its_truncated_weight_and_its_lower_bits():
    whole = torch.cat([noise(1000, dtype=torch.float32) * 10.0 ** k for k in range(-6, 7, 3)])
    weight, low = torch.empty_like(whole, dtype=torch.bfloat16), torch.empty_like(whole, dtype=torch.int16)
    mantissa.split_(whole, weight, low)
    bits = whole.numpy().view(np.uint32)
    assert np.array_equal(low.numpy().view(np.uint16), (bits & 0xFFFF).astype(np.uint16))
    assert np.array_equal(weight.float().numpy().view(np.uint32), bits & np.uint32(0xFFFF0000))
    assert bool((weight.float().abs() <= whole.abs()).all())  # towards zero, of both signs
    assert not torch.equal(weight, whole.bfloat16())  # which rounds to the nearest
    assert torch.equal(mantissa.join(weight, low), whole)


@pytest.mark.feature("numerics.matrix_mantissa", "numerics.matrix")
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (24, 24), (4, 24, 24)],
                         ids=["tall", "wide", "square", "stacked"])
def test_bfloat16_matrices_with_their_mantissa_train_as_float32_ones(shape):
    sets = [*MUON, "system.precision=record", "optim.qkvo={lr_mul=2.0}"]
    exact = deltas.resolve("short/33", sets=sets).settings
    kept = deltas.resolve("short/33", sets=[*sets, *KEPT]).settings
    start = noise(*shape, dtype=torch.bfloat16)
    narrow, wide = Toy(x=(start, "matrix", "qkvo")), Toy(x=(start.float(), "matrix", "qkvo"))
    optimizers = Optimizer(narrow, kept), Optimizer(wide, exact)
    for i in range(8):
        g = noise(*shape, seed=i, dtype=torch.bfloat16)
        for model, optimizer in zip((narrow, wide), optimizers):
            update(optimizer, model, {"x": g.to(model.x.dtype)}, plan(i, lr_factor=0.01))
    bits = wide.x.detach().view(torch.int32)
    assert torch.equal(narrow.x.detach().view(torch.int16), (bits >> 16).to(torch.int16))
    state = {name.split("/")[-1]: x for name, x in optimizers[0].tensors().items()}
    assert torch.equal(state["mantissa"].view(shape), bits.bitwise_and(0xFFFF).to(torch.int16))
    assert state["momentum_buffer"].dtype == state["second_moment"].dtype == torch.float32


def test_updates_below_half_a_unit_of_the_last_place_add_up():
    """64 steps of 2^-12 from 1, where bfloat16 has steps of 2^-8: a rounded weight would stay."""
    weight, low = torch.ones(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int16)
    for _ in range(64):
        mantissa.split_(mantissa.join(weight, low) - 2.0 ** -12, weight, low)
    assert weight.tolist() == [1 - 2.0 ** -6] * 3
    assert torch.equal(torch.ones(3).bfloat16() - 2.0 ** -12, torch.ones(3).bfloat16())


def test_the_mantissa_is_off_where_every_number_is_lifted():
    s = deltas.resolve("short/33", scale="micro", sets=["system.precision=float32"]).settings
    assert not s.numerics.matrix_mantissa
    assert deltas.resolve("short/33", sets=KEPT).settings.numerics.matrix_mantissa


# ----- AdamW in chunks, and with its own dtypes

def test_adamw_in_chunks_gives_the_bits_of_one_pass():
    s = settings("short/33", *ADAM, precision="float32")
    rule, n = AdamW.of(s, s.optim.group("embed", "embed")), 2 * CHUNK + 77
    start, g = noise(n, dtype=torch.float32), noise(n, seed=1, dtype=torch.float32)
    ends = []
    for pieces in (1, 3, 200):
        ends.append([])
        for p, part in zip(start.clone().chunk(pieces), g.chunk(pieces)):
            state = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            for t in (1, 2):
                rule.update_(p, part, state, rule.numbers(plan(), t), Views())
            ends[-1].append(torch.stack([p, *state.values()]))
    assert all(torch.equal(torch.cat(end, 1), torch.cat(ends[0], 1)) for end in ends)


@pytest.mark.feature("numerics.adam_state")
@pytest.mark.parametrize("stored, dtype", [("parameter", torch.bfloat16), ("bfloat16", torch.bfloat16),
                                           ("float32", torch.float32)])
def test_the_moments_of_adamw_have_the_dtype_that_is_asked_for(stored, dtype):
    s = deltas.resolve("short/33", sets=[f"numerics.adam_state={stored}"]).settings
    model = Toy(x=(noise(8, dtype=torch.bfloat16), "embed", "embed"))
    moments = [x for name, x in Optimizer(model, s).tensors().items() if "exp_avg" in name]
    assert [x.dtype for x in moments] == [dtype] * 2


def test_no_rule_copies_its_state():
    """Its tensors stay where they are, and are those that the formulas need."""
    s = deltas.resolve("short/33", sets=[*MUON, *ADAM, *KEPT, "numerics.adam_state=float32"]).settings
    model = Toy(up=(noise(40, 12, dtype=torch.bfloat16), "matrix", "c_fc", views.c_fc(s)),
                down=(noise(12, 40, dtype=torch.bfloat16), "matrix", "c_proj", views.c_proj(s)),
                table=(noise(30, 4, dtype=torch.bfloat16), "embed", "embed"))
    optimizer = Optimizer(model, s)
    places = {name: x.data_ptr() for name, x in optimizer.tensors().items() if "updates" not in name}
    for i in range(3):
        gradients = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        update(optimizer, model, gradients, plan(i))
    assert places == {name: x.data_ptr() for name, x in optimizer.tensors().items() if "updates" not in name}
    matrices, neurons = 2 * 480 * (4 + 2), 2 * 40 * 4  # momentum and lower bits; a moment per hidden unit
    assert optimizer.state_bytes() == matrices + neurons + 120 * 2 * 4


# ----- frozen groups, a table that parts, and how all of it travels

@pytest.mark.feature("optim.scalar.freeze_steps")
def test_a_frozen_group_drops_the_gradients_of_its_steps_and_keeps_its_moments():
    """Steps 2 and 3 are frozen: step 5 takes the gradients of 4 and 5, and of nothing before."""
    s = settings("short/33", "optim.scalar.every=2", "optim.scalar.freeze_steps=2")
    assert s.optim.freezes() == {"scalar": 2}
    start, gradients = noise(5), [noise(5, seed=i) for i in range(6)]
    model, alone = Toy(x=(start, "scalar", "sa_lambdas")), Toy(x=(start, "scalar", "sa_lambdas"))
    optimizer, other = Optimizer(model, s), Optimizer(alone, s)
    for i, g in enumerate(gradients):
        rests = i in (2, 3)
        due = frozenset({"scalar"} if i % 2 and not rests else ())
        update(optimizer, model, {"x": g}, plan(i, due=due, frozen=frozenset({"scalar"} if rests else ())))
    for pair in (gradients[:2], gradients[4:]):
        update(other, alone, {"x": pair[0] + pair[1]}, plan())
    assert torch.allclose(model.x, alone.x, rtol=1e-13, atol=0)
    assert [x.item() for name, x in optimizer.tensors().items() if name.endswith("updates")] == [2]


def test_a_frozen_half_gradient_does_not_survive():
    """A freeze that begins on an odd step drops the gradient of the even step before it too."""
    s = settings("short/33", "optim.scalar.every=2")
    model = Toy(x=(noise(5), "scalar", "sa_lambdas"))
    optimizer = Optimizer(model, s)
    for i, frozen in enumerate((frozenset(), frozenset({"scalar"}))):
        assert bool(model.x.grad.any()) == bool(i)
        update(optimizer, model, {"x": torch.ones(5, dtype=F64)}, plan(i, due=frozenset(), frozen=frozen))
    assert not model.x.grad.any()


def test_a_table_in_a_group_with_others_cannot_take_over_a_state():
    s = settings("short/33")
    model = Toy(head=(noise(6, 4), "lm_head", "lm_head"), table=(noise(6, 4), "embed", "embed"),
                value=(noise(6, 4), "embed", "value_embed"))
    with pytest.raises(UserError, match="value_embed shares its group: add --with optim.value_embed"):
        Optimizer(model, s).copy_parameter("lm_head", "embed")


COMMS = ["sharded", "adam_hooks", "interleaved", "replicated", "bucketed"]
SHAPES_OF = {"head": (16, 4), "table": (16, 4), "value": (24, 4), "lambdas": (9,), "down": (3, 12),
             "up": (12, 3), "qkvo": (4, 6, 6), "gate": (2, 4)}


def six_steps(comm, rank, world):
    """Parameters after six steps as in record 53, by one process's share of eight logical gradients: AdamW on
    odd steps; the batch grows at step 2, where the scalars freeze for two steps; the table parts after step
    3."""
    torch.set_num_threads(1)
    s = deltas.resolve("short/33", scale="micro", sets=[
        "system.precision=float64", f"system.comm={comm}", "system.small_allreduce=20", *MUON,
        "optim.adam.cautious_decay={strict=true}", "optim.value_embed={lr=0.6}", "optim.c_proj={lr_mul=4.0}"
    ]).settings
    kinds = {"head": ("lm_head", "lm_head"), "table": ("embed", "embed"), "value": ("embed", "value_embed"),
             "lambdas": ("scalar", "sa_lambdas"), "down": ("matrix", "c_proj", views.c_proj(s)),
             "up": ("matrix", "c_fc", views.c_fc(s)), "qkvo": ("matrix", "qkvo", views.qkvo(s)),
             "gate": ("matrix", "gate", views.gate(s))}
    model = Toy(**{name: (noise(*SHAPES_OF[name], seed=n), *kinds[name]) for n, name in enumerate(SHAPES_OF)})
    model.table.data.copy_(model.head.data)
    optimizer = Optimizer(model, s, communication(s, rank, world))
    for i in range(6):
        frozen = frozenset({"scalar"} if i in (2, 3) else ())
        slow = {"lm_head", "embed", "value_embed", "scalar"} if i % 2 else set()
        due, mine = frozenset({"matrix", "c_proj"} | slow - frozen), local_ranks(rank, world)
        for k in mine:
            optimizer.expect(last=k == mine[-1], due=due)
            for n, name in enumerate(SHAPES_OF):
                if name != "table" or i > 3:
                    size = 1 if i < 2 else 2  # more tokens, larger sums
                    g = noise(*SHAPES_OF[name], seed=100 * i + 10 * k + n)
                    model.get_parameter(name).grad += size * g
            optimizer.accumulate()
        optimizer.step(plan(i, due=due, lr_factor=0.9 ** i, frozen=frozen))
        if i == 3:
            optimizer.copy_parameter("lm_head", "embed")
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def member(folder):
    """One process of the next test."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    torch.save({comm: six_steps(comm, rank, world) for comm in COMMS}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.feature("system.comm", "system.small_allreduce")
@pytest.mark.parametrize("world", [2, 4])
def test_processes_end_with_the_parameters_of_one(world, tmp_path):
    process_group.call(world, member, tmp_path)
    alone = {comm: six_steps(comm, 0, 1) for comm in COMMS}
    for rank in range(world):
        for comm, parameters in torch.load(tmp_path / f"{rank}.pt").items():
            for name, p in parameters.items():
                assert torch.allclose(p, alone[comm][name], rtol=0, atol=1e-12), (comm, name)
    split, tied = alone["sharded"]["table"], alone["sharded"]["head"]
    assert not torch.equal(split, tied)  # both went on, from one state


@pytest.mark.feature("system.comm")
@pytest.mark.parametrize("comm, in_backward, in_step", [
    ("sharded", "head table matrix", "gather head, gather table, gather matrix"),
    ("adam_hooks", "head table", "gather head, gather table, reduce matrix, gather matrix"),
    ("interleaved", "head table", "reduce matrix, gather head, gather matrix, gather table")])
def test_the_plans_order_what_travels(comm, in_backward, in_step, monkeypatch):
    """Muon's reductions start in the backward pass, after AdamW's updates (record 44), or before them, when
    AdamW's last gather waits for Muon's updates (record 57)."""
    import system.comm
    sizes, said = {24: "head", 16: "table", 18: "matrix"}, []

    class Done:
        def wait(self):
            return self

    def travel(what, whole, result):
        said.append(f"{what} {sizes[whole.numel()]}")
        result()
        return Done()

    monkeypatch.setattr(system.comm, "reduce_scatter", lambda out, grad, **_: travel(
        "reduce", grad, lambda: out.copy_(grad[:len(out)])))
    monkeypatch.setattr(system.comm, "all_gather", lambda whole, part, **_: travel(
        "gather", whole, lambda: None))
    s = settings("short/33", f"system.comm={comm}")
    model = Toy(head=(noise(6, 4), "lm_head", "lm_head"), table=(noise(4, 4), "embed", "embed"),
                matrix=(noise(2, 3, 3), "matrix", "c_fc"))
    optimizer = Optimizer(model, s, communication(s, 0, 2))
    optimizer.expect(last=True)
    for name in ("head", "table", "matrix"):  # the order in which their gradients are ready
        model.get_parameter(name).sum().backward()
    optimizer.accumulate()
    assert said == [f"reduce {name}" for name in in_backward.split()]
    said.clear()
    optimizer.step(plan())
    assert said == in_step.split(", ")


# ----- record 53 through the Optimizer

def ours(name, x):
    """An array of the fixture as we store it: q, k, v and o apart, the MLP's second matrix (outputs,
    inputs)."""
    x = torch.from_numpy(np.array(x)).double()
    if name == "attn":
        return x.view(4, -1, x.size(-1))
    return x.T.contiguous() if name == "mlp_proj" and x.dim() == 2 else x


@pytest.mark.feature("optim.muon.normuon", "optim.muon.cautious_decay", "optim.adam.cautious_decay",
                     "optim.c_proj.lr_mul", "optim.scalar.beta1", "optim.scalar.beta2")
def test_four_updates_of_record_53_through_the_optimizer():
    golden, config = load("r53_optim")
    s = deltas.resolve("short/53", sets=["system.precision=float64"]).settings
    roles = {"attn": ("matrix", "qkvo", views.qkvo(s)), "mlp_fc": ("matrix", "c_fc", views.c_fc(s)),
             "mlp_proj": ("matrix", "c_proj", views.c_proj(s)),
             "wide": ("matrix", "latent", Views(variance_axis=-2)), "square": ("matrix", "latent"),
             "attn_gate": ("matrix", "gate", views.gate(s)),
             "lm_head": ("lm_head", "lm_head"), "embed": ("embed", "embed"),
             "value_embed": ("embed", "value_embed"), "smear_gate": ("matrix", "smear_gate"),
             "x0_lambdas": ("scalar", "x0_lambdas"),
             "scalars": ("scalar", "sa_lambdas")}
    model = Toy(**{name: (ours(name, golden[f"init/{name}"]), *role) for name, role in roles.items()})
    optimizer, compared = Optimizer(model, s), 0
    states = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum_buffer": "momentum_buffer",
              "second_moment": "second_momentum_buffer"}
    for call, (lr_factor, momentum) in enumerate(zip(config["lr_factor"], config["muon_momentum"])):
        gradients = {name: ours(name, golden[f"grad/{name}"][call]) for name in roles}
        update(optimizer, model, gradients, plan(call, lr_factor=lr_factor, momentum=momentum))
        for bank in optimizer.banks:
            (name, _), = bank.members
            key = f"f64/step{call + 1}"
            if f"{key}/param/{name}" not in golden:
                continue
            found = {f"{key}/param/{name}": bank.param}
            found |= {f"{key}/state/{name}/{states[n]}": x for n, x in bank.state.items()}
            for path, got in found.items():
                expected = ours(name, golden[path]).flatten()
                assert (got.flatten() - expected).abs().max() <= 1e-12 * expected.abs().max(), path
                compared += 1
    assert compared == 2 * 12 * 3


# ----- momentum

@pytest.mark.feature("optim.muon.momentum_cooldown", "optim.muon.momentum_warmup.reaches_end")
@pytest.mark.parametrize("reaches, plateau", [("true", 0.95), ("false", 0.85 + 0.1 * 299 / 300)])
def test_the_momentum_rises_rests_and_falls_over_the_last_steps_of_all(reaches, plateau):
    """Records 39 and 40 set it while the step is below 300 only, so it rests at 0.949667, and then falls from
    0.95 over the steps after total - 50."""
    s = deltas.resolve("short/33", sets=[
        "optim.muon.momentum_cooldown={end=0.85, steps=50}", "schedule.steps=700",
        f"optim.muon.momentum_warmup.reaches_end={reaches}"
    ]).settings
    found = [p.momentum for p in schedule.plan(s)]
    expected = [0.85 + 0.1 * i / 300 for i in range(300)] + [plateau] * 351
    expected += [0.95 - 0.1 * (i - 650) / 50 for i in range(651, 700)]
    assert np.allclose(found, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("kind, shape", [("qkvo", (4, 8, 8)), ("c_proj", (8, 32)), ("embed", (40,))])
def test_the_rules_compile_to_one_graph_each(kind, shape):
    """Through aot_eager, with numbers that are tensors: the same parameters and states."""
    s = deltas.resolve("short/33", sets=["system.precision=record", *MUON, *ADAM, *KEPT]).settings
    of = {"qkvo": views.qkvo(s), "c_proj": views.c_proj(s), "embed": Views()}[kind]
    group, ends = s.optim.group("embed" if kind == "embed" else "matrix", kind), []
    rule = RULES[group.rule](s, group)
    unit = rule.unit(shape, of)
    compiled = torch.compile(rule.update_, backend="aot_eager", fullgraph=True, dynamic=False)
    for function in (rule.update_, compiled):
        p, g = (noise(*shape, seed=i, dtype=torch.bfloat16).view(-1, *unit) for i in (0, 1))
        state = {name: torch.zeros((len(p), *of_unit), dtype=dtype)
                 for name, (of_unit, dtype) in rule.state(unit, p.dtype, of).items()}
        for t in (1, 2):
            numbers = {name: torch.tensor(x, dtype=F64) for name, x in rule.numbers(plan(), t).items()}
            with torch.no_grad():
                function(p, g, state, numbers, of)
        ends.append([p, *state.values()])
    assert all(torch.allclose(a.float(), b.float(), rtol=1e-6, atol=1e-6) for a, b in zip(*ends))
