"""The slots of the optimizer track in Muon's chain: on a short record by one flag, on several processes,
compiled, off again, and against references in numpy where no numbers of an original stand."""

import dataclasses
import functools
import math
import os

import numpy as np
import pytest
import torch

import process_group
import schedule
import small_models
from common.errors import UserError
from kernels.newton_schulz import newton_schulz
from optim import Optimizer
from settings import deltas
from small_models import Toy, plan, settings, update
from system.comm import communication
from updates import views
from updates.muon import Muon

F64 = torch.float64
SPLIT, TWELVE = "optim.muon.split_qkv=true", ("optim.muon.convergent=true", "optim.muon.ns_steps=12")
SLOTS = {  # slot -> (its flag, what must be set too); numbers of steps are small, so that few steps see them
    "squared": ("squared={}",),
    "soap": ("soap={every=2}",),
    "soap of all kinds": ("soap={every=1, attn_floor=0.5, v_share=0.9, trust={release_start=1}}", SPLIT),
    "soap of some": ('soap={matrices=["v", "c_fc"], eps_form="added"}', SPLIT),
    "pmuon": ("pmuon={}",),
    "aurora": ("aurora={}",),
    "wide aurora": ("aurora={iterations=3, wide_only=true}",),
    "dyn": ("dyn={steps=30}",),
    "sinksoap": ("sinksoap={}",),
    "contra": ("contra={}",),
    "contra that ends": ("contra={steps=9}", "optim.muon.norm=schatten4"),
    "tempered": ("tempered={most=0.5, start=0, end=2}",),
    "soft": ("soft={start=0, end=4}", *TWELVE),
    "circuit": ("circuit={}", SPLIT),
    "radial_brake": ("radial_brake=0.5",),
    "late_brake": ("late_brake={factor=0.1, start=0, end=1}", "optim.muon.radial_brake=0.9"),
    "floor": ("floor={ratio=2.0}",),
    "late floor": ("floor={ratio=2.0, late={ratio=3.0, start=0, end=2}}",),
    "floor of rows": ('floor={ratio=2.0, per="row"}',),
    "soda": ("soda={start=1, steps=4}",),
    "radius_pin": ("radius_pin=true",),
    "late_decay": ("late_decay=0.5",),
    "hyperball": ("hyperball=true", "model.init.zero_proj=false"),
    "bi_maxwell": ("bi_maxwell={start=0}",),
    "row_norm": ("row_norm={}",),
    "fading_decay": ("fading_decay={}", "optim.muon.weight_decay=0"),
    "annealing": ("annealing={}", "optim.muon.soap={every=1}", "schedule.warmup_steps=4"),
    "normuon": ("normuon={square=false}", "optim.muon.norm=schatten4"),
}


def sets(name):
    """(the flag, the settings that it needs)."""
    flag, *needs = SLOTS[name]
    return f"optim.muon.{flag}", needs


def noise(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ----- by one flag

@pytest.mark.feature("optim.muon.squared", "optim.muon.soap", "optim.muon.soap.trust", "optim.muon.pmuon",
                     "optim.muon.aurora", "optim.muon.dyn", "optim.muon.sinksoap", "optim.muon.contra",
                     "optim.muon.contra.steps", "optim.muon.soft", "optim.muon.circuit", "optim.muon.floor",
                     "optim.muon.radial_brake", "optim.muon.soda", "optim.muon.radius_pin",
                     "optim.muon.late_decay", "optim.muon.hyperball", "optim.muon.convergent")
@pytest.mark.parametrize("name", SLOTS)
def test_a_flag_puts_a_slot_on_record_33(name):
    """Two steps end with a finite loss, and another one than without the flag."""
    flag, needs = sets(name)
    loss = loss_of_33(*needs, flag)
    assert math.isfinite(loss) and loss != loss_of_33(*needs)


@functools.cache
def loss_of_33(*changes):
    """Loss of record 33, micro, after two steps on one batch of 24 tokens."""
    s, x = settings("short/33", *changes), small_models.tokens(rows=1)
    model = small_models.build("short/33", *changes)
    optimizer = Optimizer(model, s)
    for i in range(2):
        small_models.step(optimizer, model, s, x, i)
    with torch.no_grad():
        context = model.context(x[:, :-1], small_models.BOS, schedule.windows(s, 2))
        return model(x[:, :-1], x[:, 1:], context).mean().item()


@pytest.mark.parametrize("name", SLOTS)
def test_without_takes_a_slot_of_a_record_off_again(name):
    flag, needs = sets(name)
    path, value = deltas.parse_assignment(flag, "")
    child = dataclasses.replace(deltas.find_record("short/33"), ref="test/1", parent="short/33",
                                delta={path: value})
    on = deltas.resolve(child, sets=needs).settings
    off = deltas.resolve(child, sets=needs, without=[path]).settings
    assert on != off == deltas.resolve("short/33", sets=needs).settings


@pytest.mark.parametrize("scale, divisor", [("full", 524288), ("small", 65536), ("micro", 1024)])
def test_the_divisor_of_dynmuon_follows_the_batch(scale, divisor):
    child = dataclasses.replace(deltas.find_record("short/33"), ref="test/1", parent="short/33",
                                delta={"optim.muon.dyn": {"divisor": 524288.0}})
    assert deltas.resolve(child, scale=scale).settings.optim.muon.dyn.divisor == divisor
    plain = deltas.resolve("short/33", scale=scale, with_=["optim.muon.dyn"]).settings
    assert plain.optim.muon.dyn.divisor == 1


@pytest.mark.parametrize("flags, message", [
    (["aurora={}", "dyn={}"], "are two ways to orthogonalise"),
    (["soft={}", "ns_steps=12"], "optim.muon.soft needs optim.muon.convergent"),
    (["soft={}", "convergent=true"], "has 12 weights"),
    (["soft={}", "convergent=true", "ns_steps=12", "polar_express=true"],
     "exclude each other: switch one off"),
    (["radius_pin=true", "hyperball=true"], "set the same norm"),
    (["hyperball=true"], "set model.init.zero_proj=false"),
    (["circuit={}", "split_qkv=false"], "set optim.muon.split_qkv=true"),
    (["circuit={}", "split_qkv=true", "head_pairs=true"], "in one tensor"),
    (["soap={trust={}}", "split_qkv=false"], "set optim.muon.split_qkv=true"),
    (['soap={matrices=["c_fx"]}'], "has c_fx, and the matrices are"),
    (['soap={matrices=["q"]}', "split_qkv=true", "head_pairs=true"], "they are pairs of heads"),
    (['soap={matrices=["v"], trust={}}', "split_qkv=true"], "acts on o, which"),
    (['soap={matrices=["o"], v_share=0.5}', "split_qkv=true"], "acts on v, which")])
def test_slots_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        deltas.resolve("short/33", sets=[f"optim.muon.{flag}" for flag in flags])


@pytest.mark.parametrize("name", ["soda", "radius_pin", "late_decay", "hyperball"])
def test_what_moves_parameters_after_the_step_is_refused_where_updates_travel(name):
    flag, needs = sets(name)
    with pytest.raises(UserError, match=f"optim.muon.{name} moves the parameters after them"):
        deltas.resolve("short/33", sets=[flag, *needs, "system.comm=allreduce_updates"])


def test_a_slot_has_state_only_for_the_matrices_it_acts_on():
    s = settings("short/33", "model.model_dim=12", "model.attn.num_heads=3", SPLIT,
                 'optim.muon.soap={matrices=["v", "c_fc"]}')
    found = {bank.label: {name: tuple(x.shape) for name, x in bank.state.items() if "soap" in name}
             for bank in Optimizer(toy(s), s).banks}
    one = {"soap_left_covariance": (3, 18, 18), "soap_right_covariance": (3, 12, 12),
           "soap_left_basis": (3, 18, 18), "soap_right_basis": (3, 12, 12), "soap_moment": (3, 18, 12)}
    assert found == {"c_fc": one, "c_proj": {}, "qkvo": {f"{name}@v": (3, 12, 12) for name in one}}


# ----- processes

def toy(s, layers=(0, 1, 2), dtype=F64):
    """Matrices of three layers, a number that two processes do not divide."""
    d = s.model.model_dim
    of = {"qkvo": views.qkvo(s), "c_fc": views.c_fc(s), "c_proj": views.c_proj(s)}
    shapes = {"qkvo": (4, d, d), "c_fc": (3 * d // 2, d), "c_proj": (d, 3 * d // 2)}
    return Toy(**{f"{label}_{i}": (noise(*shape, seed=i, dtype=dtype), "matrix", label, of[label])
                  for label, shape in shapes.items() for i in layers})


def four_steps(name, rank, world):
    """The parameters after four steps with given gradients, of which each process has its share."""
    flag, needs = sets(name)
    s = settings("short/33", "model.model_dim=12", "model.attn.num_heads=3", flag, *needs)
    model = toy(s)
    optimizer = Optimizer(model, s, communication(s, rank, world))
    for i in range(4):
        gradients = {n: noise(*p.shape, seed=100 + i) / world for n, p in model.named_parameters()}
        update(optimizer, model, gradients, plan(i))
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def member(folder):
    """One process of the next test."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    torch.save({name: four_steps(name, rank, world) for name in SLOTS}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_end_with_the_parameters_of_one(tmp_path):
    process_group.call(2, member, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in SLOTS:
        for parameter, p in four_steps(name, 0, 1).items():
            for of_rank in found:
                assert torch.allclose(of_rank[name][parameter], p, rtol=0, atol=1e-9), (name, parameter)


@pytest.mark.feature("system.reduction")
@pytest.mark.parametrize("name", ["pmuon", "sinksoap", "contra"])
def test_with_an_ordered_reduction_a_unit_has_the_same_bits_in_any_bank(name):
    """Three layers in one bank, and each alone: batched products would round differently."""
    flag, needs = sets(name)
    s = settings("short/33", "model.model_dim=48", "model.attn.num_heads=3", "system.reduction=ordered", flag,
                 *needs, precision="float32")

    def trained(layers):
        model = toy(s, layers, torch.float32)
        optimizer = Optimizer(model, s)
        for i in range(2):
            update(optimizer, model, {
                n: noise(*p.shape, seed=10 * i + int(n[-1]), dtype=torch.float32)
                for n, p in model.named_parameters()
            }, plan(i))
        return dict(model.named_parameters())

    alone = {n: p for i in range(3) for n, p in trained((i,)).items()}
    assert all(torch.equal(p, alone[n]) for n, p in trained((0, 1, 2)).items())


# ----- compiled

NOT_EAGER = ("bi_maxwell", "squared", "row_norm", "tempered", "contra", "soft", "circuit", "radial_brake",
             "floor", "soda", "fading_decay", "radius_pin", "late_decay")


@pytest.mark.slow
@pytest.mark.parametrize("kind, flags", [
    ("qkvo", (*TWELVE, SPLIT, *(sets(name)[0] for name in NOT_EAGER))), ("c_proj", ("optim.muon.dyn={}",)),
    ("c_proj", ("optim.muon.aurora={}", "optim.muon.norm=schatten4"))], ids=["chain", "dyn", "aurora"])
def test_slots_without_decompositions_compile_to_one_graph(kind, flags):
    s = settings("short/33", "model.model_dim=12", "model.attn.num_heads=3", *flags, precision="float32")
    p, g = (noise(*toy(s).get_parameter(f"{kind}_0").shape, seed=i, dtype=torch.float32) for i in (0, 1))
    of = getattr(views, kind)(s)
    rule, ends = Muon.of(s, s.optim.group("matrix", kind)), []
    unit = rule.unit(p.shape, of)
    assert not rule.eager
    for function in (rule.update_, torch.compile(rule.update_, backend="aot_eager", fullgraph=True)):
        x = p.clone().view(-1, *unit)
        state = {name: torch.zeros((len(x), *of_unit), dtype=dtype)
                 for name, (of_unit, dtype) in rule.state(unit, x.dtype, of).items()}
        for t in (1, 2):
            numbers = {name: torch.tensor(x, dtype=F64) for name, x in rule.numbers(plan(t), t).items()}
            with torch.no_grad():
                function(x, g.view(-1, *unit), state, numbers, of)
        ends.append([x, *state.values()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*ends))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hyperball", "radius_pin", "late_decay", "floor", "radial_brake", "soda",
                                  "squared", "contra", "bi_maxwell"])
def test_a_slot_compiles_on_this_cpu_and_takes_the_eager_steps(name):
    """By inductor, where it has a backend for this machine."""
    torch._dynamo.reset()  # past its limit of graphs for one function it would go on uncompiled
    flag, needs = sets(name)
    s = settings("short/33", "model.model_dim=12", "model.attn.num_heads=3", flag, *needs,
                 precision="float32")
    ends = []
    for compiled in (False, True):
        model = toy(s, (0, 1), torch.float32)
        optimizer = Optimizer(model, s, compiled=compiled)
        for i in range(2):
            given = {n: noise(*p.shape, seed=i, dtype=torch.float32) for n, p in model.named_parameters()}
            update(optimizer, model, given, plan(i))
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*ends))


# ----- references in numpy

def replayed(start, gradients, label, *flags):
    """The matrices (rows, cols) of one parameter after updates with these gradients, at half the rate."""
    s = settings(
        "short/33", "optim.muon.momentum_ema=true", "optim.muon.c_fc_orientation=out_in", *TWELVE, *flags
    )
    model = Toy(x=(torch.from_numpy(start), "matrix", label, getattr(views, label)(s)))
    optimizer = Optimizer(model, s)
    for i, g in enumerate(gradients):
        update(optimizer, model, {"x": torch.from_numpy(g)}, plan(i, momentum=0.95, lr_factor=0.5))
    return model.x.detach().numpy(), 0.5 * s.optim.muon.lr


def nesterov(gradients):
    """Momentum with a look ahead, for each gradient of a matrix."""
    m, found = np.zeros_like(gradients[0]), []
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        found.append(0.05 * g + 0.95 * m)
    return found


def polar(x):
    return newton_schulz(torch.from_numpy(x), steps=12, convergent=True, dtype=F64, norm_dtype=F64).numpy()


def gradients_of(*shape, calls=4):
    return [noise(*shape, seed=50 + i).numpy() for i in range(calls)]


@pytest.mark.feature("optim.muon.sinksoap", "optim.muon.normuon.square")
@pytest.mark.parametrize("label, shape", [("c_fc", (10, 6)), ("c_proj", (6, 10)), ("c_fc", (8, 8))])
def test_sinksoap_is_result_26(label, shape):
    """Balanced in the eigenbases of all gradients so far; then NorMuon, unless the matrix is square."""
    w, gradients = noise(*shape).numpy(), gradients_of(*shape)
    got, lr = replayed(w, gradients, label, "optim.muon.sinksoap={}", "optim.muon.normuon={square=false}",
                       "optim.muon.scale=sqrt_ratio", "optim.muon.weight_decay=0.025")
    (m, n), axis, left, right, s = shape, -1 if label == "c_fc" else -2, 0, 0, 0
    for g, direction in zip(gradients, nesterov(gradients)):
        left, right = 0.95 * left + 0.05 * g @ g.T, 0.95 * right + 0.05 * g.T @ g
        u, v = (np.linalg.eigh(x + 1e-8 * np.eye(len(x)))[1] for x in (left, right))
        a = u.T @ direction @ v
        b, c = a ** 2 + 1e-8, np.ones(n)
        for _ in range(10):
            r = 1 / m / (b @ c + 1e-8)
            c = 1 / n / (b.T @ r + 1e-8)
        x = u @ np.diag(np.sqrt(r)) @ a @ np.diag(np.sqrt(c)) @ v.T
        x *= np.sqrt(min(m, n)) * np.sqrt(max(1, m / n)) / np.linalg.norm(x)
        if m != n:
            s = 0.95 * s + 0.05 * (x ** 2).mean(axis, keepdims=True)
            y = x / np.sqrt(s)
            x = y * np.linalg.norm(x) / np.linalg.norm(y)
        w = w - lr * 0.025 * w - lr * x
    assert np.abs(got - w).max() < 1e-9


@pytest.mark.feature("optim.muon.soda")
def test_soda_is_result_32():
    """W <- (1-l) W + l W0 before the step, whose update is made from the W before the pull (its floor)."""
    start, gradients = noise(8, 6).numpy(), gradients_of(8, 6, calls=8)
    got, lr = replayed(start, gradients, "c_fc", "optim.muon.soda={start=2, steps=4}",
                       "optim.muon.scale=none", "optim.muon.floor={ratio=2.0}")
    w = start
    for i, direction in enumerate(nesterov(gradients)):
        u = polar(direction)
        u = u * max(1, 2 * np.linalg.norm(w) / np.linalg.norm(u))
        f = 1 if i <= 2 else 0.5 * (1 + np.cos(np.pi * (i - 2) / 4)) if i < 6 else 0
        pull = np.clip(f / (i + 2), 0, 1)
        w = (1 - pull) * w + pull * start - lr * u
    assert np.abs(got - w).max() < 1e-12


def s4(x):
    """The Schatten 4-norm."""
    return (np.linalg.svd(x, compute_uv=False) ** 4).sum() ** 0.25


@pytest.mark.feature("optim.muon.tempered", "optim.muon.late_brake", "optim.muon.floor.late")
@pytest.mark.parametrize("label, shape", [("c_fc", (10, 6)), ("c_proj", (6, 10))])
@pytest.mark.parametrize("cap", [0.25, 9.0])
def test_the_tail_of_result_38_is_its_formulas(label, shape, cap):
    """Tempered from step 3 on, fully from 4 on; a brake of 0.9 to 0.1, a floor of 1 to 3 in steps 1 to 5."""
    w, gradients = noise(*shape).numpy(), gradients_of(*shape, calls=7)
    got, lr = replayed(
        w, gradients, label, "optim.muon.norm=schatten4", "optim.muon.scale=sqrt_ratio",
        f"optim.muon.tempered={{most=0.3, cap={cap}, start=2, end=4}}", "optim.muon.radial_brake=0.9",
        "optim.muon.late_brake={factor=0.1, start=1, end=5}",
        "optim.muon.floor={ratio=1.0, late={ratio=3.0, start=1, end=5}}"
    )
    for i, m in enumerate(nesterov(gradients)):
        left, values, right = np.linalg.svd(m, full_matrices=False)
        values = values / s4(m)
        for _ in range(12):
            values = 2 * values - 1.5 * values ** 3 + 0.5 * values ** 5
        u = left @ np.diag(values) @ right
        d = m / s4(m) - u
        mixed = u + 0.3 * np.clip((i - 2) / 2, 0, 1) * min(1, cap * s4(u) / s4(d)) * d
        u = mixed * s4(u) / s4(mixed) * np.sqrt(max(1, shape[0] / shape[1]))
        late = np.clip((i - 1) / 4, 0, 1)
        c = (u * w).sum() / (w ** 2).sum()
        u = u + (0.9 - 0.8 * late - 1) * min(c, 0) * w
        w = w - lr * u * max(1, (1 + 2 * late) * np.linalg.norm(w) / np.linalg.norm(u))
    assert np.abs(got - w).max() < 1e-9


@pytest.mark.feature("optim.muon.soap.trust")
@pytest.mark.parametrize("release", [(0, 2), (3, 5), (90, 99)], ids=["over", "during", "before"])
def test_soap_on_o_with_its_gate_is_result_16(release):
    """Frobenius norms, denominators of at least 0.2 of their root mean square, a refresh every second
    update."""
    start, gradients = noise(4, 8, 8).numpy(), gradients_of(4, 8, 8, calls=6)
    got, lr = replayed(
        start, gradients, "qkvo", SPLIT, "optim.muon.scale=none",
        'optim.muon.soap={every=2, matrices=["o"], attn_floor=0.2, trust={release_start=%d, release_end=%d}}'
        % release)
    plain = start[0] - lr * sum(polar(m) for m in nesterov([g[0] for g in gradients]))
    assert np.abs(got[0] - plain).max() < 1e-12  # q is Muon's alone
    o = [g[3] for g in gradients]
    w, left, right, v = start[3], np.zeros((8, 8)), np.zeros((8, 8)), np.zeros((8, 8))
    cos = lambda a, b: (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    for i, (g, m) in enumerate(zip(o, nesterov(o))):
        direction = m
        if i:
            p = ql.T @ m @ qr
            v = 0.9 * v + 0.1 * p ** 2
            d = np.maximum(v, 1e-16) ** 0.5
            d = np.maximum(d, 0.2 * np.sqrt((d ** 2).mean()))
            white = ql @ (p / d) @ qr.T
            white *= np.linalg.norm(m) / np.linalg.norm(white)
            agree = np.clip((cos(white, m) - 0.2) / 0.8, 0, 1)
            align = np.clip(cos(white, g) / max(cos(m, g), 1e-8), 0, 1)
            free = np.clip((i - release[0]) / (release[1] - release[0]), 0, 1)
            gate = np.clip(agree * align, 0.45 * (1 - free), 0.85 if i < release[1] else 1)
            direction = m + gate * (white - m)
        w = w - lr * polar(direction)
        left, right = 0.9 * left + 0.1 * g @ g.T, 0.9 * right + 0.1 * g.T @ g
        if i == 0:
            ql, qr = (np.linalg.eigh(x)[1][:, ::-1] for x in (left, right))
        elif i % 2 == 0:
            by_rows, by_cols = (np.argsort(-np.diag(q.T @ x @ q)) for q, x in ((ql, left), (qr, right)))
            v = v[by_rows][:, by_cols]
            ql = np.linalg.qr(left @ ql[:, by_rows])[0]
            qr = np.linalg.qr(right @ qr[:, by_cols])[0]
    assert np.abs(got[3] - w).max() < 1e-10
