"""Laws of what the logs of records 72 and 87 have and the merged records have not (a forced short window,
exploration noise, C-Optim), and of the roundings of the kernels of records 79 and 92.

References are written here in whole numbers and float64.
"""

import math
import os
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import process_group
import schedule
from common.errors import UserError
from kernels import fp8_linear as fp8_module
from kernels.cross_entropy import linear_cross_entropy
from kernels.fp8_linear import fp8_linear
from kernels.rounding import rounded, rounded_bits
from layers.head import Head, bounded
from optim import Alone, Local, Optimizer
from settings import deltas
from settings.model import Softcap
from small_models import Toy, build, plan, update
from system.comm import communication
from system.place import local_ranks
from updates import noise, views
from updates.noise import ExplorationNoise
from updates.slots import Step
from updates.views import Views

F32, F64 = torch.float32, torch.float64


def drawn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def settings(ref, *sets, scale="micro", with_=()):
    return deltas.resolve(ref, scale=scale, sets=sets, with_=with_).settings


# ----- record 72: a forced short window

@pytest.mark.feature("model.attn.window.forced_short")
def test_the_forced_short_window_of_the_log_of_record_72():
    """Its 1555 steps have short windows of 1, 3, 5 and 6 blocks, and two in the third stage; long windows,
    YaRN and the final validation are the same."""
    off, on = (settings("short/72", "schedule.steps=1555", scale="full", with_=with_)
               for with_ in ([], ["model.attn.window.forced_short"]))
    blocks = [[plan.shape.windows.short.tokens // 128 for plan in schedule.plan(s)] for s in (on, off)]
    assert blocks[1] == 505 * [1] + 505 * [3] + 505 * [5] + 40 * [6]
    assert blocks[0] == 505 * [1] + 505 * [3] + 505 * [2] + 40 * [6]
    for step in (0, 1009, 1010, 1514, 1515, 1555):
        mine, plain = (schedule.validation_windows(s, step) for s in (on, off))
        assert (mine.long, mine.last, mine.long_blocks) == (plain.long, plain.last, plain.long_blocks)
        assert (mine.short == plain.short) == (step not in (1010, 1514))


@pytest.mark.parametrize("ref, value, message", [
    ("short/72", "{start=9, stop=9}", "forced_short.start = 9 is not before"),
    ("short/19", "{blocks=1}", "there are none"),
])
def test_a_forced_short_window_that_cannot_be_is_refused(ref, value, message):
    with pytest.raises(UserError, match=message):
        settings(ref, f"model.attn.window.forced_short={value}", scale="full")


# ----- record 87: exploration noise

WORD = 2**32


def hashed(x):
    """The published function of 32 bits, in Python's whole numbers."""
    x = (x ^ x >> 16) * 0x21F0AAAD % WORD
    x = (x ^ x >> 15) * 0x735A2D97 % WORD
    return x ^ x >> 15


def number(key, step, place):
    """The normal number at a place of a matrix at a step."""
    a, b = (hashed(hashed((key[i] + step) % WORD) ^ key[1 - i]) for i in (0, 1))
    first = hashed(hashed(place ^ a) ^ b)
    second = hashed((first + 0x9E3779B9) % WORD)
    u, v = ((x // 256 + 0.5) / 2**24 for x in (first, second))
    return math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v)


def test_the_numbers_of_the_noise_are_a_hash_of_key_step_and_place():
    keys = noise.keys_of("0/blocks.0.attn.qkvo/2", 3)
    assert keys.shape == (3, 2) and len(set(keys.flatten().tolist())) == 6
    assert torch.equal(keys[:2], noise.keys_of("0/blocks.0.attn.qkvo/2", 2))
    for step in (0, 7, 4_000_000_000):
        got = noise.normal(keys.view(3, 1, 2), step, torch.empty(3, 5, 4, dtype=F64)).flatten(1)
        for key, row in zip(keys.tolist(), got.tolist()):
            assert row == pytest.approx([number(key, step, place) for place in range(20)], rel=0, abs=1e-12)
    single = noise.normal(keys.view(3, 1, 2), torch.tensor(7), torch.empty(3, 5, 4))
    assert single.dtype == F32
    assert torch.allclose(
        single.double(), noise.normal(keys.view(3, 1, 2), 7, torch.empty(3, 5, 4, dtype=F64)), atol=1e-5
    )


def test_the_noise_is_normal_and_independent_of_step_key_and_neighbour():
    keys, like = noise.keys_of("0/x/0", 2).view(2, 1, 2), torch.empty(2, 256, 256, dtype=F64)
    a, b = noise.normal(keys, 10, like), noise.normal(keys, 11, like)
    tolerance = 5 / 256  # five standard deviations of the mean of 65,536 numbers
    assert a.mean((1, 2)).abs().max() < tolerance
    assert (a.square().mean((1, 2)) - 1).abs().max() < 1.5 * tolerance
    assert (a.pow(4).mean((1, 2)) - 3).abs().max() < 10 * tolerance
    for other in (b, a.flip(0), a.roll(1, -1), a.roll(1, -2), a.mT):
        assert (a * other).mean((1, 2)).abs().max() < 1.5 * tolerance
    assert len(set(a.flatten().tolist()) & set(b.flatten().tolist())) < 50  # by chance, of 24 bits each


def test_every_matrix_of_a_model_has_a_key_of_its_own_by_seed_name_and_place():
    """Also where the initial values of a matrix are zeros, as those of c_proj."""
    found = []
    for seed in (0, 1):
        model = build("short/62", "optim.muon.normuon.noise={}", seed=seed)
        optimizer = Optimizer(model, model.settings)
        banks = {bank.label: bank for bank in optimizer.banks if noise.KEY in bank.state}
        found.append({label: bank.state[noise.KEY].clone() for label, bank in banks.items()})
        optimizer.reset()
        assert all(torch.equal(bank.state[noise.KEY], found[-1][label]) for label, bank in banks.items())
    keys = [tuple(key) for of_seed in found for x in of_seed.values() for key in x.view(-1, 2).tolist()]
    assert len(keys) == len(set(keys)) and {"qkvo", "c_fc", "c_proj"} <= {*found[0]}
    assert found[0]["qkvo"].numel() == 2 * 4 * sum(block.attn is not None for block in model.blocks)


def strength(step, sigma=0.1, ramp=50, end=30):
    """The log's schedule, as it is told."""
    return 0.0 if step >= end else sigma * min(step / ramp, 1) * (end - step) / end


@pytest.mark.feature("optim.muon.normuon.noise")
@pytest.mark.parametrize("of, shape, axis", [
    (Views(variance_axis=-1), (40, 12), 1), (Views(variance_axis=-2), (12, 40), 0),
    (Views(pieces=(("qkv", 0, 3), ("o", 3, 4)), variance_axis=-1), (4, 6, 6), 2),
    (Views(pieces=(("qkv", 0, 3), ("o", 3, 4)), variance_axis=-2), (4, 6, 6), None),
])
def test_noise_has_the_size_of_its_neuron_s_update_and_fades(of, shape, axis):
    slot = ExplorationNoise(0.1, 50, 30)
    (size, dtype), = slot.state(shape, F64, of).values()
    keys = noise.keys_of("3/x/0", 2 * math.prod(size) // 2).view(2, *size)
    assert dtype == torch.int64 and size[-2:] == (1, 2) and size[:-2] == shape[:-2]
    for step in (0, 1, 12, 29, 30, 70):
        u, numbers = drawn(2, *shape, seed=step), slot.numbers(plan(step), 1)
        assert numbers["noise"] == pytest.approx(strength(step), abs=1e-15)
        got = slot(u.clone(), Step(None, u, {noise.KEY: keys}, numbers, of, "", {})).numpy()
        x, n = u.numpy(), noise.normal(keys, step, u).numpy()
        if axis is None:  # q, k and v are one matrix, with statistics per input channel
            square = np.concatenate([
                np.broadcast_to((x[:, a:b] ** 2).mean((1, 2), keepdims=True), x[:, a:b].shape)
                for a, b in ((0, 3), (3, 4))
            ], 1)
        else:
            square = (x ** 2).mean(axis + 1, keepdims=True)
        assert np.abs(got - (x + strength(step) * np.sqrt(square) * n)).max() < 1e-14


def test_the_noise_of_a_record_ends_with_a_quarter_of_its_scheduled_steps():
    s = settings("short/83", "schedule.steps=1398", "schedule.extension_steps=11",
                 "optim.muon.normuon.noise={}", scale="full")
    assert s.optim.muon.normuon.noise.end(s) == 346  # int(0.25 * 1387)


# ----- record 87: C-Optim

TABLES = {"first": (6, 4), "second": (6, 4), "third": (9, 4)}
ADAM = {"beta1": 0.75, "beta2": 0.95, "eps": 1e-10}
EXPLORING = (
    "optim.muon.normuon={noise={sigma=0.3, ramp_steps=2, until=1.0}}", "optim.muon.head_pairs=false"
)
CAUTIOUS = (
    "system.precision=float64", "optim.grad_clip=false",
    "optim.value_embed={lr=0.6, c_optim=0.5, weight_decay=0.0, beta1=0.75, beta2=0.95, eps=1e-10, every=1}",
    "optim.adam.cautious_decay={weight_decay=0.005, strict=true}", "optim.adam.eps_after_correction=false",
    "optim.embed.weight_decay=0.0", "optim.lm_head.weight_decay=0.0", "optim.scalar.weight_decay=0.0",
)


def cautious_reference(w, gradients, s):
    """Float64 updates of one table as the log's are told: C-Optim on the update, then the cautious decay."""
    m, v, lr = np.zeros_like(w), np.zeros_like(w), 0.6
    for t, g in enumerate(gradients, 1):
        m, v = 0.75 * m + 0.25 * g, 0.95 * v + 0.05 * g * g
        u = lr * math.sqrt(1 - 0.95**t) / (1 - 0.75**t) * m / (np.sqrt(v) + 1e-10)
        keep = (u * g > 0).astype(float)
        u = (1 - s) * u + s * u * keep / max(keep.mean(), 1e-3)
        w = w - u - lr * lr * 0.005 * w * (u * w > 0)
    return w


def table_gradient(name, i, k=0):
    """Most rows have none, as in a table; those of `third` never agree after the first step."""
    n = sorted(TABLES).index(name)
    g = drawn(*TABLES[name], seed=100 * i + 10 * k + n)
    g[::3] = 0
    return (-1) ** i * g.abs() * 4.0**i if name == "third" else g


def test_cautious_updates_are_those_of_liang_et_al_with_the_mean_of_each_table():
    s = settings("short/33", *CAUTIOUS)
    model = Toy(**{name: (drawn(*shape), "embed", "value_embed") for name, shape in TABLES.items()})
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, s)
    assert len(optimizer.banks) == 1 and optimizer.banks[0].eager
    for i in range(3):
        update(optimizer, model, {name: table_gradient(name, i) for name in TABLES}, plan(i))
    for name, p in model.named_parameters():
        expected = cautious_reference(start[name], [table_gradient(name, i).numpy() for i in range(3)], 0.5)
        assert np.abs(p.detach().numpy() - expected).max() < 1e-13 * np.abs(expected).max(), name


def test_the_mean_of_a_table_is_the_same_if_its_gradient_comes_as_rows():
    ends = []
    for how in ("rows", "dense"):
        s = settings("short/62", *CAUTIOUS, f"system.table_gradients={how}")
        model = Toy(first=(drawn(9, 4), "embed", "value_embed"))
        model.first.row_lookups = 1
        optimizer = Optimizer(model, s)
        assert optimizer.banks[0].has_rows == (how == "rows")
        for i in range(3):
            ids = torch.randint(9, (5,), generator=torch.Generator().manual_seed(i))
            optimizer.expect(last=True)
            (F.embedding(ids, model.first, sparse=how == "rows") * drawn(5, 4, seed=i)).sum().backward()
            optimizer.accumulate()
            optimizer.step(plan(i))
        ends.append(model.first.detach().clone())
    assert torch.equal(*ends) and not torch.equal(ends[0], drawn(9, 4))


def test_without_a_share_the_update_is_adam_s_and_it_stays_compiled():
    s = settings("short/33", *(x.replace("c_optim=0.5, ", "") for x in CAUTIOUS))
    model = Toy(first=(drawn(6, 4), "embed", "value_embed"))
    start, optimizer = model.first.detach().numpy().copy(), Optimizer(model, s)
    update(optimizer, model, {"first": table_gradient("first", 0)}, plan())
    assert not optimizer.banks[0].eager
    expected = cautious_reference(start, [table_gradient("first", 0).numpy()], 0.0)
    assert np.abs(model.first.detach().numpy() - expected).max() < 1e-14


def test_c_optim_needs_a_first_moment():
    with pytest.raises(UserError, match="optim.bigram.c_optim compares the gradient with a first moment"):
        settings("short/92", "optim.bigram.c_optim=0.5")


# ----- both, on any number of processes and resumed

def tables_and_matrices(plan_of=lambda s: None):
    """(model, optimizer) with noise and C-Optim. plan_of: settings -> communication plan."""
    s = settings("short/62", *CAUTIOUS, *EXPLORING)
    kinds = {"qkvo": ("matrix", "qkvo", views.qkvo(s)), "down": ("matrix", "c_proj", views.c_proj(s))}
    shapes = {"qkvo": (4, 6, 6), "down": (4, 12)}
    model = Toy(**{name: (drawn(*shape), "embed", "value_embed") for name, shape in TABLES.items()},
                **{name: (drawn(*shapes[name]), *kind) for name, kind in kinds.items()})
    return model, Optimizer(model, s, plan_of(s))


class Shards(Alone):
    """The plan of one of several processes that are threads here: shards, and sums that wait for all."""

    def __init__(self, rank, world, sums, barrier):
        self.rank, self.world, self.sums, self.barrier = rank, world, sums, barrier

    def of(self, shared, experts, small=False):
        comm = Local()
        comm.shards, comm.shard = self.world, lambda x: x.chunk(self.world)[self.rank]
        return comm

    def total(self, x):
        self.sums[self.rank] = x
        self.barrier.wait(30)
        found = sum(self.sums)
        self.barrier.wait(30)
        return found


@pytest.mark.parametrize("world", [2, 4, 8])
def test_shards_put_together_are_the_update_of_one_process(world):
    """Some hold parts of two tables, some only padding; noise of the matrices and means of the tables are
    those of one process."""
    def run(optimizer):
        for i in range(3):
            for n, bank in enumerate(optimizer.banks):
                g = torch.zeros_like(bank.param)
                g[:bank.units] = drawn(bank.units, *bank.unit, seed=10 * i + n)
                optimizer.update(bank, bank.comm.shard(g), plan(i))

    _, whole = tables_and_matrices()
    sums, barrier = [None] * world, threading.Barrier(world)
    parts = [tables_and_matrices(lambda s, r=r: Shards(r, world, sums, barrier))[1] for r in range(world)]
    threads = [threading.Thread(target=torch.no_grad()(run), args=(one,)) for one in parts]
    for thread in threads:
        thread.start()
    torch.no_grad()(run)(whole)
    for thread in threads:
        thread.join()
    for n, bank in enumerate(whole.banks):
        together = torch.cat([one.banks[n].comm.shard(one.banks[n].param) for one in parts])
        assert torch.allclose(together[:bank.units], bank.param, rtol=0, atol=1e-13), bank.name()
        assert not together[bank.units:].any()


def test_a_table_of_which_each_process_holds_rows_has_the_mean_of_all_rows():
    """As with system.table_parallel, of a table that is no bank's shard but the process's own."""
    s, world = settings("short/62", *CAUTIOUS), 2
    sums, barrier = [None] * world, threading.Barrier(world)

    class Own(Shards):
        def of(self, shared, experts, small=False):
            comm = Local()
            comm.splits_members, comm.world, comm.rank = True, self.world, self.rank
            return comm

    w, gradient = drawn(8, 4), drawn(8, 4, seed=9) * (torch.arange(8) < 3)[:, None]
    whole = Toy(first=(w, "embed", "value_embed"))
    parts = [Toy(first=(part, "embed", "value_embed")) for part in w.chunk(world)]
    optimizers = [Optimizer(one, s, Own(r, world, sums, barrier)) for r, one in enumerate(parts)]
    threads = [threading.Thread(target=torch.no_grad()(one.update), args=(one.banks[0], g.flatten(), plan()))
               for one, g in zip(optimizers, gradient.chunk(world))]
    for thread in threads:
        thread.start()
    update(Optimizer(whole, s), whole, {"first": gradient}, plan())
    for thread in threads:
        thread.join()
    together = torch.cat([one.first.detach() for one in parts])
    assert torch.equal(together, whole.first.detach()) and not torch.equal(together, w)


def trained(rank, world, steps=4, until=None):
    """Parameters after some steps with noise and C-Optim, by one process's share of eight gradients; with
    `until` the optimizer is saved there and another one goes on."""
    torch.set_num_threads(1)

    def built():
        return tables_and_matrices(lambda s: communication(s, rank, world))

    model, optimizer = built()
    for i in range(steps):
        if i == until:
            full = {name: x.clone() for name, x in optimizer.full_tensors()}
            counts = optimizer.update_counts()
            model, optimizer = built()
            optimizer.load(full, counts)
        mine = local_ranks(rank, world)
        for k in mine:
            optimizer.expect(last=k == mine[-1])
            for name, p in model.named_parameters():
                # whole numbers of 1/8, whose sum is the same in any order
                p.grad += (drawn(*p.shape, seed=100 * i + 10 * k + len(name)) * 8).round() / 8
            optimizer.accumulate()
        optimizer.step(plan(i))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def member(folder):
    """One process of the next test."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    torch.save(trained(rank, world), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_noise_and_c_optim_are_the_same_on_two_processes(tmp_path):
    alone = trained(0, 1)
    process_group.call(2, member, tmp_path)
    for rank in range(2):
        for name, p in torch.load(tmp_path / f"{rank}.pt").items():
            assert torch.allclose(p, alone[name], rtol=0, atol=1e-12), (rank, name)


def test_noise_and_c_optim_go_on_in_a_resumed_run():
    alone = trained(0, 1)
    for name, p in trained(0, 1, until=2).items():
        assert torch.equal(p, alone[name]), name


# ----- record 79 and 92: the rounded sigmoid

def to_format(x, digits, least, largest=math.inf):
    """Float64 numbers rounded to the nearest (even) one with so many binary digits, in units of at least
    2^(least + 1 - digits)."""
    x = np.asarray(x, np.float64)
    exponent = np.maximum(np.frexp(x)[1] - 1, least)
    unit = np.exp2(exponent + 1.0 - digits)
    return np.clip(np.round(x / unit) * unit, -largest, largest)


FORMATS = {torch.bfloat16: (8, -126), torch.float16: (11, -14)}
CAP = Softcap("sigmoid", 23.0, 7.5, 5.0)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("wide", [F32, F64])
def test_rounding_is_to_the_nearest_even_number_of_the_format(dtype, wide):
    ties = 2.0 ** -torch.arange(30, dtype=F64) * (1 + (2 * torch.arange(30) + 1) * 2.0 ** -FORMATS[dtype][0])
    x = torch.cat([torch.rand(999, generator=torch.Generator().manual_seed(1), dtype=F64), ties,
                   2.0**-24 * torch.rand(50, dtype=F64) * 64, torch.tensor([0.0, 0.5, 1.0, 1 - 2.0**-20])])
    x = torch.cat([x, -x]).to(F32)  # numbers that float32 has
    got = rounded(x.to(wide), dtype)
    assert got.dtype == wide and np.array_equal(got.numpy(), to_format(x.numpy(), *FORMATS[dtype]))
    if wide == F32:
        assert torch.equal(rounded_bits(x, dtype), got)


def problem(rows=2, length=9, dim=16, classes=48, spread=4.0):
    x, w = drawn(rows, length, dim), drawn(classes, dim, seed=1) * spread / dim**0.5
    y = torch.randint(classes, (rows, length), generator=torch.Generator().manual_seed(2))
    return x.requires_grad_(), w.requires_grad_(), y, drawn(rows, length, seed=3)


def rounded_loss(z, y, g, kind):
    """(losses, gradient of the logits) of numpy logits z (N, V), targets and factors (N,), float64."""
    s = to_format(1 / (1 + np.exp(-(z + 5) / 7.5)), *FORMATS[kind])
    c = 23 * s
    lse = np.log(np.exp(c).sum(1, keepdims=True))
    at = np.arange(len(y)), y
    d = np.exp(c - lse)
    d[at] -= 1
    return lse[:, 0] - c[at], g[:, None] * d * 23 / 7.5 * s * (1 - s)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("way", ["chunks", "whole"])
def test_loss_and_gradient_are_those_of_the_rounded_sigmoid(way, kind):
    x, w, y, g = problem()
    if way == "chunks":
        losses = linear_cross_entropy(
            x, w, y, softcap=CAP, sigmoid=kind, chunk=4, cap_dtype=F64, loss_dtype=F64
        )
    else:
        z = bounded(F.linear(x, w), CAP, kind)
        losses = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    flat = x.detach().flatten(0, 1).numpy()
    expected, d = rounded_loss(flat @ w.detach().numpy().T, y.flatten().numpy(), g.flatten().numpy(), kind)
    assert np.abs(losses.detach().flatten().numpy() - expected).max() < 1e-12
    dx, dw = torch.autograd.grad(losses, (x, w), g)
    assert np.abs(dx.flatten(0, 1).numpy() - d @ w.detach().numpy()).max() < 1e-12
    assert np.abs(dw.numpy() - d.T @ flat).max() < 1e-12
    plain = linear_cross_entropy(x, w, y, softcap=CAP, cap_dtype=F64, loss_dtype=F64)
    assert (losses - plain).abs().max() > 1e-3  # the rounding is there


@pytest.mark.slow
def test_the_compiler_does_not_drop_the_rounding():
    """A cast to 16 bits and back is dropped between operations that it fuses."""
    torch._dynamo.reset()
    z = drawn(64, 100, seed=4, dtype=F32) * 9
    for kind in FORMATS:
        run = torch.compile(lambda z, kind=kind: bounded(z, CAP, kind).exp().sum(1), dynamic=False)
        mine, plain = z.clone().requires_grad_(), z.clone().requires_grad_()
        got, expected = run(mine), bounded(plain, CAP, kind).exp().sum(1)
        got.sum().backward(), expected.sum().backward()
        assert torch.allclose(got, expected, rtol=1e-5)
        assert torch.allclose(mine.grad, plain.grad, rtol=1e-3)


def head(*sets):
    """The head of record 78 in its own precision, small, in training."""
    s = settings("short/78", "system.precision=record", "model.model_dim=96", *sets)
    return Head(s)


def of_head(found, x, table, y):
    losses = found.losses(x, table, y, tokens_per_rank=y.numel())
    return losses, *torch.autograd.grad(losses.sum(), (x, table))


@pytest.mark.parametrize("backend", ["whole", "chunks"])
def test_only_training_has_the_roundings_of_the_head(backend):
    sets = ["numerics.fp8_head.logits=e4m3", "numerics.softcap_sigmoid=float16"]
    plain, mine = head(f"system.kernels.loss={backend}"), head(f"system.kernels.loss={backend}", *sets)
    classes = plain.classes
    x = drawn(1, 16, 96, dtype=torch.bfloat16).requires_grad_()
    y = torch.randint(1257, (1, 16), generator=torch.Generator().manual_seed(2))
    if plain.weight is not None:
        for one in (plain, mine):
            one.weight.data.copy_(drawn(classes, 96, seed=1) / 8)
    table = drawn(classes, 96, seed=1, dtype=plain.weight.dtype if plain.weight is not None else F32) / 8
    found = [one.train(training).losses(x, table, y, tokens_per_rank=16)
             for training in (True, False) for one in (plain, mine)]
    assert (found[0] - found[1]).abs().max() > 1e-3 and torch.equal(found[2], found[3])


def test_roundings_of_the_head_go_where_every_number_is_lifted():
    sets = ["numerics.softcap_sigmoid=bfloat16", "numerics.fp8_head.logits=e4m3"]
    record = deltas.find_record("short/78")
    assert record and not settings("short/78").numerics.fp8_head
    n = settings("short/78", scale="full").numerics
    assert (n.softcap_sigmoid, n.fp8_head.logits) == ("unrounded", "matmul")
    n = settings("short/78", *sets, scale="full").numerics
    assert (n.softcap_sigmoid, n.fp8_head.logits) == ("bfloat16", "e4m3")


# ----- record 92: logits in e4m3

E4M3, E5M2 = (4, -6, 448.0), (3, -14, 57344.0)
SCALES = (4.0, 16.0, 4096.0)


@pytest.mark.parametrize("way", ["chunks", "whole"])
def test_logits_are_rounded_once_to_e4m3_and_their_gradient_once_to_e5m2(way, monkeypatch):
    """Against float64 with formats written out; x is bfloat16, and so would be what is rounded twice."""
    x, w, y, g = problem(2, 16, 32, 96)
    x = x.detach().to(torch.bfloat16).requires_grad_()
    w, g, casts = w.detach().float().requires_grad_(), g.float(), []
    quantise = fp8_module.quantise
    monkeypatch.setattr(
        fp8_module, "quantise",
        lambda x, scale, dtype: casts.append((x.dtype, dtype)) or quantise(x, scale, dtype)
    )
    if way == "chunks":
        losses = linear_cross_entropy(x, w, y, softcap=CAP, fp8=SCALES, logits8=True, chunk=16)
    else:
        z = bounded(fp8_linear(x, w, *SCALES, rounds_result=True), CAP)
        losses = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    sx, sw, sg = SCALES
    a = to_format(sx * x.detach().double().flatten(0, 1).numpy(), *E4M3)
    b = to_format(sw * w.detach().double().numpy(), *E4M3)
    z = to_format(a @ b.T / (sx * sw), *E4M3)
    c = 23 / (1 + np.exp(-(z + 5) / 7.5))
    lse, at = np.log(np.exp(c).sum(1)), (np.arange(32), y.flatten().numpy())
    assert np.abs(losses.detach().flatten().numpy() - (lse - c[at])).max() < 1e-5
    dx, dw = torch.autograd.grad(losses, (x, w), g)
    assert (F32, torch.float8_e5m2) in casts and (torch.bfloat16, torch.float8_e5m2) not in casts
    d = np.exp(c - lse[:, None])
    d[at] -= 1
    d = g.flatten().double().numpy()[:, None] * d * c * (1 - c / 23) / 7.5
    d = to_format(sg * d, *E5M2)
    for got, expected in ((dx.flatten(0, 1), d @ b / (sg * sw)), (dw, d.T @ a / (sg * sx))):
        error = np.linalg.norm(got.double().numpy() - expected) / np.linalg.norm(expected)
        assert error < (3e-3 if got.dtype == torch.bfloat16 else 1e-3)  # next to a tie either way is right


def test_a_logit_beyond_the_format_is_its_largest_number():
    x, w = torch.full((1, 16), 8.0), torch.full((16, 16), 8.0)
    assert fp8_linear(x, w, 1.0, 1.0, 1.0, rounds_result=True).unique().tolist() == [448.0]
