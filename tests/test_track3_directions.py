"""The directions that stand in for Muon's, against numbers of the original scripts of the optimizer track and
references of their own.

In float64, through the Optimizer; the tolerance is 1e-9 of a parameter's movement.
"""

import dataclasses
import os

import numpy as np
import process_group
import pytest
import torch
from golden_records import load
from golden_track3 import HIDDEN, QKVO, Replay, assert_equal
from small_models import Toy, plan, settings, update

from common.errors import UserError
from optim import RULES, Optimizer
from system.comm import communication
from system.place import local_ranks
from updates import views
from updates.muon import Muon
from updates.psgd import Psgd
from updates.shampoo import inverse_fourth_root
from updates.slots import Step
from updates.views import Views

F64 = torch.float64
BALL = ("optim.muon.hyperball=true", "model.init.zero_proj=false")
MUOWN = ("optim.muon.momentum_ema=false", "optim.muon.convergent=false",
         "optim.muon.polar_express_long=true", "optim.muon.scale=match_rms")
R31 = (*MUOWN, "optim.muon.muown={o_mul=1.5, c_fc_mul=1.5, norm_power=0.9, norm_steps=3005}",
       "optim.muon.contra={strength=0.325, steps=1925}", "optim.muon.normuon={beta2=0.8}")
R35 = ("optim.muon.shampoo={beta2=0.9, eps=0.0, graft_eps=1e-15, every=1, pseudo_inverse=true}",
       "optim.muon.scale=none", "optim.muon.weight_decay=0.1")
FIXTURES = {  # -> (peak learning rate, tolerance, settings)
    "t3_r04_adamh": (0.018, 1e-9, (*BALL, "optim.muon.adam={}")),
    "t3_r19_klsoaph": (0.018, 1e-9, (*BALL, "optim.muon.kl_soap={}")),
    "t3_r23_muown": (0.00325, 1e-9, (*MUOWN, "optim.muon.muown={}")),
    # its first step divides rounding noise by eps
    "t3_r27_soaph": (0.018, 1e-8, (*BALL, "optim.muon.soap_h={}")),
}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ----- the original scripts

@pytest.mark.feature("optim.muon.adam", "optim.muon.soap_h", "optim.muon.kl_soap", "optim.muon.muown",
                     "optim.muon.polar_express_long")
@pytest.mark.parametrize("name", FIXTURES)
def test_a_direction_matches_the_original_script(name):
    lr, tolerance, sets = FIXTURES[name]
    assert_equal(Replay(name, *sets, lr=lr).errors(), tolerance)


class InFloat32(Replay):
    """The learning rate passes through a float32 tensor."""

    def rate(self, call, *of):
        lr, momentum = super().rate(call, *of)
        return float(np.float32(lr)), momentum


@pytest.mark.feature("optim.muon.shampoo")
def test_shampoo_matches_the_original_script():
    sets = ("optim.muon.shampoo={}", "optim.muon.scale=none", "optim.muon.weight_decay=0.2")
    assert_equal(InFloat32("t3_r21_shampoo", *sets, lr=0.0015).errors())


class GivenNoise(Psgd):
    """The random numbers of a fixture with one layer."""
    of_fixture = None

    def draw(self, like, step):
        """V and nu of q, k, v and o, or of one matrix of the MLP."""
        names = QKVO if like.size(-2) == like.size(-1) else [HIDDEN[step.name]]
        call = step.numbers["update"] - 1
        return tuple(torch.from_numpy(np.stack([
            self.of_fixture[f"noise/blocks.0.{name}/{key}"][call] for name in names
        ]).astype(np.float64)) for key in ("V", "nu"))


@pytest.mark.feature("optim.muon.psgd")
def test_psgd_matches_the_original_script(monkeypatch):
    def rule(s, group):
        muon = Muon.of(s, group)
        slots = tuple(GivenNoise(x.beta1, x.rate) if isinstance(x, Psgd) else x for x in muon.slots)
        return dataclasses.replace(muon, slots=slots)

    monkeypatch.setattr(GivenNoise, "of_fixture", load("t3_r33_psgd")[0])
    sets = (*BALL, "optim.muon.psgd={}")
    assert_equal(Replay("t3_r33_psgd", *sets, lr=0.025, rules=RULES | {"muon": rule}).errors())


# ----- AdamW of the other parameters

def ours(name):
    """(role, label) of a parameter of the original that no hidden matrix is."""
    role = {"embed.weight": "embed", "proj.weight": "lm_head"}.get(name, "scalar")
    return role, "norm" if role == "scalar" else role


def aux_errors(name, sets, members, lr, look_ahead=False):
    """{parameter: largest error / largest movement} of a group of a fixture, after its last call.

    look_ahead: the fixture was made under EMA-Nesterov, as golden_track3.LookAhead says.
    """
    replay = Replay(name)
    numbers, steps = replay.numbers, replay.config["step_index"]
    start = {x: torch.from_numpy(numbers[f"init/{x}"].astype(np.float64)) for x in members}
    model = Toy(**{x.replace(".", "_"): (value, *ours(x)) for x, value in start.items()})
    optimizer = Optimizer(model, settings("short/11", "optim.adam.beta1=0.8", "optim.adam.eps=1e-10",
                                          "optim.grad_clip=false", *sets))
    last = {name: p.detach().clone() for name, p in model.named_parameters()}
    ema = {name: torch.zeros_like(p) for name, p in last.items()}
    for i, step in enumerate(steps):
        if look_ahead and 300 <= step < 1950:
            share = replay.rate(i - 1, "embed.weight")[0] / 0.3
            for name, p in model.named_parameters():
                p.data += 0.3 * share * ema[name]
        gradients = {
            x.replace(".", "_"): torch.from_numpy((numbers[f"grad/{x}"][i].astype(np.uint32) << 16).view(
                np.float32).astype(np.float64)) for x in members
        }
        update(optimizer, model, gradients, plan(step, lr_factor=replay.rate(i, members[0])[0] / lr))
        for name, p in model.named_parameters():
            ema[name].lerp_(p.detach() - last[name], 0.01)
            last[name].copy_(p.detach())
    assert replay.config["kept_calls"][-1] == len(steps)
    return {x: ((last[x.replace(".", "_")] - (end := torch.from_numpy(numbers[f"param/{x}"][-1]))).abs().max()
                / (end - start[x]).abs().max()).item() for x in members}


AUX = {  # role -> (peak rate, settings) of the older baseline
    "embed": (0.3, ("optim.embed.lr=0.3", "optim.embed.weight_decay=0")),
    "lm_head": (0.003125, ("optim.lm_head.lr=0.003125", "optim.lm_head.weight_decay=0")),
    "scalar": (0.01, ("optim.scalar.lr=0.01",))
}


@pytest.mark.parametrize("name", ["t3_r04_adamh", "t3_r21_shampoo", "t3_r33_psgd"])
@pytest.mark.parametrize("role", AUX)
def test_the_other_parameters_match_the_original_script(name, role):
    groups = Replay(name).config["groups"][0]
    members = next(group for group in groups if ours(group[0])[0] == role)
    lr, sets = AUX[role]
    assert_equal(aux_errors(name, (*sets, "optim.adam.beta2=0.95"), members, lr))


@pytest.mark.feature("optim.scalar.bias_correction")
@pytest.mark.parametrize("name", ["t3_r44_soapall", "t3_r46"])
def test_adam_without_bias_correction_matches_the_original_script(name):
    """Gains, biases of attn.proj and other biases, each with a second moment of their own."""
    tables, uncorrected = (Replay(name).config["groups"][i] for i in (1, 3))
    for role, members in zip(("embed", "lm_head"), tables):
        lr, sets = AUX[role]
        sets = (*sets, "optim.adam.beta2=0.99")
        assert_equal(aux_errors(name, sets, members, lr, look_ahead=True))
    for members in uncorrected:
        beta2 = 0.99 if "gains" in members[0] else 0.9965 if "attn.proj" in members[0] else 0.997
        sets = ("optim.scalar.lr=0.01", f"optim.scalar.beta2={beta2}", "optim.scalar.bias_correction=false")
        assert_equal(aux_errors(name, sets, members, 0.01, look_ahead=True))


# ----- references of their own, for what no open fixture has

CHANGED = ("optim.muon.momentum=0.946", "optim.muon.split_qkv=true", "optim.muon.c_fc_orientation=out_in",
           "optim.muon.momentum_warmup=false", "optim.muon.ns_steps=12", "optim.grad_clip=false")
TOY = {"qkvo": (4, 6, 6), "c_fc": (10, 6), "c_proj": (6, 10)}


def toy(s, zero=()):
    """Hidden matrices of a layer; zero: labels of those that start at 0."""
    of = {"qkvo": views.qkvo(s), "c_fc": views.c_fc(s), "c_proj": views.c_proj(s)}
    return Toy(**{
        name: (noise(*shape, seed=i) * (0.0 if name in zero else 0.4), "matrix", name, of[name])
        for i, (name, shape) in enumerate(TOY.items())
    })


def compare(sets, reference, calls=7, zero=(), lr=0.01, tolerance=1e-10):
    """Updates of the Optimizer against reference(W, name, [(step, rate, gradient), ...]) -> W.

    name: q, k, v, o, c_fc or c_proj.
    """
    s = settings("short/11", *CHANGED, f"optim.muon.lr={lr}", *sets)
    model = toy(s, zero)
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    optimizer, given = Optimizer(model, s), {name: [] for name in TOY}
    for i in range(calls):
        gradients = {
            name: noise(*shape, seed=100 * i + n + 10) for n, (name, shape) in enumerate(TOY.items())
        }
        step, factor = 400 * i, 1 - 0.1 * i
        update(optimizer, model, gradients, plan(step, momentum=0.946, lr_factor=factor))
        for name, g in gradients.items():
            given[name].append((step, lr * factor, g.numpy()))
    for name, w in start.items():
        after = model.get_parameter(name).detach().numpy()
        parts = zip("qkvo", w, after, range(4)) if name == "qkvo" else [(name, w, after, None)]
        for piece, from_, to, i in parts:
            seen = [(step, rate, g if i is None else g[i]) for step, rate, g in given[name]]
            expected = reference(from_, piece, seen)
            moved = np.abs(expected - from_).max()
            assert moved > 1e-3 and np.abs(to - expected).max() < tolerance * moved, piece


def root(statistics):
    """A^(-1/4) without the eigenvalues at or below 0."""
    values, vectors = np.linalg.eigh(statistics)
    return vectors @ np.diag([x**-0.25 if x > 0 else 0.0 for x in values]) @ vectors.T


def shampoo(w, name, given):
    """Result 35."""
    m = v = left = right = 0.0
    for t, (_, rate, g) in enumerate(given, 1):
        left, right = (0.9 * x + 0.1 * y for x, y in ((left, g @ g.T), (right, g.T @ g)))
        m, v = 0.9 * m + 0.1 * g, 0.9 * v + 0.1 * g**2
        average, corrected = m / (1 - 0.9**t), 1 - 0.9**t
        adam = average / (np.sqrt(v / corrected) + 1e-15)
        u = root(left / corrected) @ average @ root(right / corrected)
        w = w - rate * (u * np.linalg.norm(adam) / np.linalg.norm(u) + 0.1 * w)
    return w


def test_shampoo_with_pseudo_inverses_is_its_formula():
    """1e-6: of a matrix that is not square the first statistics have eigenvalues of rounding noise."""
    compare(R35, shampoo, tolerance=1e-6)


@pytest.mark.feature("optim.muon.shampoo.pseudo_inverse")
def test_the_root_of_shampoo_leaves_out_or_shifts_what_is_not_positive():
    """Without the pseudo-inverse the least eigenvalue becomes eps, where it is smaller after adding eps."""
    x = torch.diag(torch.tensor([15.0, -1.0, 0.0], dtype=F64))
    roots = inverse_fourth_root(x + torch.diag(torch.tensor([1.0, 0.0, 0.0])), 0.0, True)
    assert torch.allclose(roots, torch.diag(torch.tensor([0.5, 0.0, 0.0], dtype=F64)))
    shifted = torch.tensor([16.0625, 0.0625, 1.0625], dtype=F64).pow(-0.25)
    assert torch.allclose(inverse_fourth_root(x, 0.0625, False), torch.diag(shifted))


def test_adams_direction_with_decay_is_adamw():
    """Result 2: torch's AdamW, by Muon's chain and by the group of matrices."""
    chained = ("optim.muon.lr=0.0015", "optim.muon.weight_decay=0.1", "optim.muon.scale=none",
               "optim.muon.adam={eps=1e-10}")
    group = ("optim.muon=false", "optim.matrix={lr=0.0015, beta1=0.9, beta2=0.95, weight_decay=0.1}",
             "optim.adam.eps=1e-10")
    w = torch.nn.Parameter(noise(6, 4))
    adam = torch.optim.AdamW([w], lr=0.0015, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    models = [Toy(w=(noise(6, 4), "matrix", "c_fc", Views())) for _ in range(2)]
    optimizers = [Optimizer(model, settings("short/11", "optim.grad_clip=false", *sets))
                  for model, sets in zip(models, (chained, group))]
    for i in range(5):
        w.grad = noise(6, 4, seed=i + 1)
        adam.step()
        for optimizer, model in zip(optimizers, models):
            update(optimizer, model, {"w": w.grad}, plan())
    assert all((model.w - w).abs().max() < 1e-13 for model in models)


LONG = [(8.2051, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853), (2.2779, -1.6198, 0.3985), (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568), *5 * [(1.875, -1.25, 0.375)]]


def orthogonal(x):
    """Polar Express of result 23 by its effect on singular values."""
    left, values, right = np.linalg.svd(x, full_matrices=False)
    values = values / (np.linalg.norm(x) + 1e-7)
    for a, b, c in LONG:
        values = a * values + b * values**3 + c * values**5
    return left @ np.diag(values) @ right


def operator_norm(x):
    """By five power iterations from ones."""
    v = np.ones(x.shape[1]) / np.sqrt(x.shape[1])
    for _ in range(5):
        u = x @ v / np.linalg.norm(x @ v)
        v = x.T @ u / np.linalg.norm(x.T @ u)
    return np.linalg.norm(x @ v)


def muown(w, name, given):
    """Result 31."""
    start = np.linalg.norm(w, axis=1, keepdims=True)
    start = np.where(start <= 1e-12, 0.33**0.5, start)
    end = 2.496 * {"o": 1.5, "c_fc": 1.5, "c_proj": 3.33333333333}.get(name, 1.0)
    gain, norm, m, first, second, moment = start, start, 0.0, 0.0, 0.0, 0.0
    for t, (step, rate, g) in enumerate(given, 1):
        unit = w / gain
        along = (g * unit).sum(1, keepdims=True)
        across = gain / norm * (g - unit * along)
        m = 0.946 * m + across
        x = across + 0.946 * m
        u = orthogonal(x)
        size, strength = np.linalg.norm(u), 0.325 * (1 - min(step / 1925, 1))
        u = u - strength * x / operator_norm(x)
        u *= size / np.linalg.norm(u)
        moment = 0.8 * moment + 0.2 * (u**2).mean(1 if w.shape[0] >= w.shape[1] else 0, keepdims=True)
        u = u / np.sqrt(np.maximum(moment, 1e-10))
        u *= size / np.linalg.norm(u)
        v = norm * unit - rate * 0.2 * np.sqrt(max(w.shape)) * u
        first, second = 0.9 * first + 0.1 * along, 0.95 * second + 0.05 * along**2
        gain = gain - rate * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.95**t)) + 1e-8)
        w = gain * v / np.linalg.norm(v, axis=1, keepdims=True)
        norm = start + min((t - 1) / 3004, 1)**0.9 * (end - start)
    return w


@pytest.mark.feature("optim.muon.muown", "optim.muon.muown.o_mul", "optim.muon.muown.c_fc_mul",
                     "optim.muon.muown.c_proj_mul", "optim.muon.scale")
@pytest.mark.parametrize("zero", [(), ("c_proj",)])
def test_muown_with_contra_and_normuon_is_its_formula(zero):
    compare(R31, muown, zero=zero)


# ----- processes, resuming, settings

DIRECTIONS = {
    "adam": (*BALL, "optim.muon.adam={}"),
    "soap_h": (*BALL, "optim.muon.soap_h={}"),
    "kl_soap": (*BALL, "optim.muon.kl_soap={}"),
    "shampoo": ("optim.muon.shampoo={every=2}",),
    "psgd": (*BALL, "optim.muon.psgd={}"),
    "muown": R31,
    "muown_23": (*MUOWN, "optim.muon.muown={}"),
}


def made(name, rank=0, world=1):
    """(model, optimizer) of a direction, sharded, with sums in one order."""
    s = settings("short/33", *CHANGED, "system.comm=sharded", "system.reduction=ordered",
                 "optim.muon.lr=0.02", *DIRECTIONS[name])
    model = toy(s)
    return model, Optimizer(model, s, communication(s, rank, world))


def advance(model, optimizer, first, last, rank=0, world=1):
    """Updates by one process's share of eight logical gradients."""
    mine = local_ranks(rank, world)
    for i in range(first, last):
        for k in mine:
            optimizer.expect(last=k == mine[-1])
            for n, (name, shape) in enumerate(TOY.items()):
                model.get_parameter(name).grad += noise(*shape, seed=1000 * i + 10 * k + n + 100)
            optimizer.accumulate()
        optimizer.step(plan(i, lr_factor=0.9**i))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def member(folder):
    """One of two processes."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    found = {name: advance(*made(name, rank, world), 0, 4, rank, world) for name in DIRECTIONS}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_end_with_the_parameters_of_one_bit_for_bit(tmp_path):
    process_group.call(2, member, tmp_path)
    for direction in DIRECTIONS:
        alone = advance(*made(direction), 0, 4)
        for rank in range(2):
            for name, p in torch.load(tmp_path / f"{rank}.pt")[direction].items():
                assert torch.equal(p, alone[name]), (direction, name)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_resumed_run_goes_on_bit_for_bit(direction):
    model, optimizer = made(direction)
    advance(model, optimizer, 0, 3)
    kept = {name: x.clone() for name, x in optimizer.full_tensors()}
    counts = optimizer.update_counts()
    other, resumed = made(direction)
    resumed.load(kept, counts)
    expected, got = advance(model, optimizer, 3, 5), advance(other, resumed, 3, 5)
    assert all(torch.equal(p, got[name]) for name, p in expected.items())


def test_the_noise_of_psgd_depends_on_matrix_and_update():
    """Not on the other matrices of a process: a bank of two matrices, and one of the second alone."""
    slot, w = Psgd(0.95, 1.0), noise(2, 6, 4)

    def draw(p, t):
        s = settings("short/11", *CHANGED, *DIRECTIONS["psgd"])
        model = Toy(w=(p, "matrix", "c_fc", Views()))
        optimizer = Optimizer(model, s)
        update(optimizer, model, {"w": torch.ones_like(p)}, plan())
        keys = next(x for name, x in optimizer.tensors().items() if name.endswith("noise_key"))
        return slot.draw(p, Step(p, p, {"noise_key": keys}, {"update": t}, Views(), "", {}))

    both, alone, later = draw(w, 3), draw(w[1:], 3), draw(w[1:], 4)
    for x, y, z in zip(both, alone, later):
        assert torch.equal(x[1:], y) and not torch.equal(y, z) and not torch.equal(x[0], x[1])
    assert not torch.equal(*both)


@pytest.mark.parametrize("sets, said", [
    (("optim.muon.adam={}", "optim.muon.psgd={}"), "each are the direction"),
    (("optim.muon.shampoo={}", "optim.muon.contra={}"), "stands in its place"),
    (("optim.muon.shampoo={eps=0.0}",), "divides by the eigenvalue 0"),
    (("optim.muon.muown={}", "optim.muon.hyperball=true"), "keep one")])
def test_settings_that_exclude_each_other_are_refused(sets, said):
    with pytest.raises(UserError, match=said):
        settings("short/11", *sets)

# ----- a maintained package

def test_soap_agrees_with_the_package_pytorch_optimizer():
    """Its SOAP, whose first call only finds the bases: it gets a gradient of almost nothing.

    It sorts the columns of the bases, which are in order here, and takes QR in float32. The first step is not
    compared: in the bases of its own gradient it is noise over eps.
    """
    package = pytest.importorskip("pytorch_optimizer", reason="pip install pytorch-optimizer==4.1.0")
    s = settings("short/11", *CHANGED, "optim.muon.lr=0.01", "optim.muon.scale=none", "optim.muon.soap_h={}",
                 "optim.muon.soap_h.eps=0.001")
    left, right = (torch.linalg.qr(noise(8, 8, seed=i))[0] for i in (1, 2))
    model = Toy(w=(noise(8, 8), "matrix", "c_fc", Views()))
    w = torch.nn.Parameter(model.w.detach().clone())
    ours, theirs = Optimizer(model, s), package.SOAP(
        [w], lr=0.01, betas=(0.946, 0.9), shampoo_beta=0.9, eps=0.001, weight_decay=0,
        precondition_frequency=1, correct_bias=False
    )
    start = w.detach().clone()
    for i in range(6):
        g = left @ torch.diag(3.0 ** -torch.arange(8)).to(F64) @ right + 1e-4 * noise(8, 8, seed=10 + i)
        for part in ((1e-6 * g, g) if i == 0 else (g,)):
            w.grad = part.clone()
            theirs.step()
        update(ours, model, {"w": g}, plan(momentum=0.946))
    assert (w - model.w).abs().max() < 1e-4 * (w - start).abs().max()


def trajectories(package_s_rule, sets, scales, steps=6, before=None):
    """Two trajectories (6, 6) by the same gradients, with the largest distance of their steps at norm 1.

    package_s_rule: a parameter -> its optimizer. scales: learning-rate factor of ours in each step. before:
    called with the step's number.
    """
    s = settings("short/11", *CHANGED, "optim.muon.lr=0.01", "optim.muon.scale=none", *sets)
    model = Toy(w=(noise(6, 6), "matrix", "c_fc", Views()))
    w = torch.nn.Parameter(model.w.detach().clone())
    ours, theirs, apart = Optimizer(model, s), package_s_rule(w), 0.0
    for i in range(steps):
        if before is not None:
            before(i)
        start = model.w.detach().clone(), w.detach().clone()
        w.grad = noise(6, 6, seed=10 + i)
        update(ours, model, {"w": w.grad.clone()}, plan(i, lr_factor=scales[i]))
        theirs.step()
        mine, other = model.w.detach() - start[0], w.detach() - start[1]
        apart = max(apart, (mine / mine.norm() - other / other.norm()).norm().item())
    return model.w.detach(), w.detach(), apart


def test_shampoo_agrees_with_the_package_pytorch_optimizer():
    """Its ScalableShampoo, without momentum: it takes the momentum of preconditioned gradients, and ours
    preconditions the momentum. Its RMSProp does not correct the bias of the norm that both take over, so our
    learning rate does."""
    package = pytest.importorskip("pytorch_optimizer", reason="pip install pytorch-optimizer==4.1.0")

    def rule(w):
        return package.ScalableShampoo(
            [w], lr=0.01, betas=(0.0, 0.95), start_preconditioning_step=1, preconditioning_compute_steps=1,
            shape_interpretation=False, graft_type=3, nesterov=False, matrix_eps=1e-15, use_svd=True
        )

    sets = ("optim.muon.shampoo={beta1=0.0, every=1, eps=1e-15}",)
    mine, theirs, apart = trajectories(rule, sets, [(1 - 0.95 ** t) ** -0.5 for t in range(1, 7)])
    assert apart < 1e-9 and (mine - theirs).abs().max() < 1e-9


def test_psgd_agrees_with_the_package_pytorch_optimizer(monkeypatch):
    """Its Kron, given our random probe, first factors, step size of the factors and balancing, with no noise
    on the momentum. It solves triangular systems in float32. Its limit on the root mean square is a
    factor."""
    package = pytest.importorskip("pytorch_optimizer", reason="pip install pytorch-optimizer==4.1.0")
    probes = [noise(6, 6, seed=100 + i) for i in range(6)]
    now = {}
    monkeypatch.setattr(Psgd, "draw", lambda self, like, step: (now["v"][None], torch.zeros_like(like)))
    monkeypatch.setattr(torch, "randn_like", lambda like, **how: now["v"])

    def rule(w):
        kron = package.Kron([w], lr=0.01, momentum=0.95, pre_conditioner_update_probability=1.0,
                            precondition_dtype=F64, balance_prob=1.0)
        first = noise(6, 6, seed=10).pow(4).mean().item() ** (-1 / 32)
        kron.param_groups[0] |= {"precondition_lr": 1.0, "precondition_init_scale": first ** 2}
        return kron

    *_, apart = trajectories(rule, ("optim.muon.psgd={}",), [1.0] * 6, before=lambda i: now.update(v=probes[i]))
    assert apart < 1e-5
