"""Laws of table gradients as the rows that were looked up: the bits of dense gradients, on any number of
processes, and nothing of the table's size in a step."""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import process_group
import schedule
from common.errors import UserError
from kernels import shared_table
from model import GPT
from optim import Optimizer, RowBank, Tree
from settings import check_processes, deltas
from small_models import BOS, Toy, plan, step, tokens
from step_hooks import begin_step
from system import warmup
from system.comm import communication
from system.world import World
from system.place import local_ranks
from updates import adam
from updates.rows import Rows, total

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
AS_ROWS, DENSE = "system.table_gradients=rows", "system.table_gradients=dense"
SHARED, WHOLE = "system.table_parallel=true", "whole"
PLAIN = ("numerics.fp8_mlp=false", "numerics.fp8_head=false", "model.head.candidates=false")


def table(rows, width, dtype, seed=0):
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return drawn.to(dtype).requires_grad_()


def gradient(x, ids, seed, sparse):
    """Gradient of a sum over look-ups with random factors."""
    x.grad = None
    factors = table(len(ids), x.size(1), x.dtype, seed).detach()
    (F.embedding(ids, x, sparse=sparse) * factors).sum().backward()
    return x.grad


def drawn_ids(count, rows, seed):
    return torch.randint(rows, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("count, rows", [(40, 1000), (40, 12), (1, 3)])
def test_rows_have_the_bits_of_the_dense_gradient(dtype, count, rows):
    """Look-ups of a row more than once are added in the same order; many rows or nearly all are looked up."""
    x, ids = table(rows, 6, dtype), drawn_ids(count, rows, 1)
    dense = gradient(x, ids, 2, sparse=False)
    found = Rows.looked_up(gradient(x, ids, 2, sparse=True))
    real = found.ids < rows
    assert found.ids[real].tolist() == sorted(set(ids.tolist())) and not found.values[~real].any()
    assert len(found.ids) == min(count, rows + 1)  # whatever the ids are
    assert torch.equal(found.dense_(torch.full_like(x, 7.0)), dense)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_sums_of_rows_are_the_sums_of_dense_gradients(dtype):
    """In the order of the parts, of bfloat16 in float32; in a tree, in the parts' own dtype."""
    x, ids = table(50, 6, dtype), [drawn_ids(count, 50, 3 + count) for count in (30, 7, 30, 45)]
    dense = [gradient(x, own, i, sparse=False) for i, own in enumerate(ids)]
    parts = [Rows.looked_up(gradient(x, own, i, sparse=True)) for i, own in enumerate(ids)]
    wide = torch.promote_types(dtype, F32)
    expected = dense[0].to(wide)
    for part in dense[1:]:
        expected = expected + part.to(wide)
    assert torch.equal(total(parts).dense_(torch.empty(50, 6, dtype=wide)), expected)
    trees = Tree(), Tree()
    for tree, leaves in zip(trees, (dense, parts)):
        for leaf in leaves:
            tree.push(leaf)
    assert torch.equal(trees[1].total().dense_(torch.empty_like(x)), trees[0].total())


def settings(ref, *sets, precision="float64"):
    """short/71 or short/92 at micro, without FP8, and of 92 with all classes."""
    sets = *sets, *(["system.table_parallel=false"] if DENSE in sets else [])
    plain = PLAIN if ref == "short/92" and precision == "record" else PLAIN[2:] if ref == "short/92" else ()
    return deltas.resolve(
        ref, scale="micro", sets=[f"system.precision={precision}", *plain, *sets]
    ).settings


def build(s):
    model = GPT(s)
    model.initialise(0)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=F64)
        p.data += (0.3 * noise).to(p.dtype)
    return model


def trained(s, steps, microbatch, length=17):
    """(parameters and state, optimizer) of a small model after steps on eight rows."""
    model = build(s)
    optimizer = Optimizer(model, s)
    for i in steps:
        begin_step(model)
        step(optimizer, model, s, tokens(8, length, seed=i), i, microbatch)
    return {name: x.clone() for name, x in optimizer.full_tensors()}, optimizer


@pytest.mark.feature("system.table_gradients", "optim.bigram.row_moment")
@pytest.mark.parametrize("ref, precision, microbatch, sets", [
    ("short/71", "record", 2, ()), ("short/92", "float32", 4, ("optim.grad_clip=0.01",))
])
def test_a_training_with_rows_has_the_bits_of_one_with_dense_gradients(
    ref, precision, microbatch, sets, monkeypatch
):
    """Tables by AdamW (record 71) and by rows (record 92), which take the gradients of two steps or four."""
    monkeypatch.setattr(adam, "TABLE_CHUNK", 48 * 100)  # some pieces
    found = []
    for how in (DENSE, AS_ROWS):
        s = settings(ref, how, *sets, precision=precision)
        plans = schedule.plan(s)
        late = next(p.step for p in plans[::-1] if "bigram" in p.due)
        found.append(trained(s, [0, 1, late - 1, late], microbatch))
    (dense, plain), (rows, sparse) = found
    assert not any(isinstance(bank, RowBank) for bank in plain.banks)
    banks = [bank for bank in sparse.banks if isinstance(bank, RowBank)]
    assert [[name for name, _ in bank.members] for bank in banks] == [["bigram.table"]]
    mine = {name: x for name, x in rows.items() if name.startswith("bigram.table")}
    assert len(mine) == (2 if ref == "short/92" else 3)
    for name, x in mine.items():
        assert torch.equal(x.flatten(), dense[name].flatten()), name
    assert {name: x.numel() for name, x in rows.items()} == {name: x.numel() for name, x in dense.items()}


def test_auto_takes_rows_where_the_rule_moves_no_others():
    for ref, expected in (("short/62", []), ("short/92", ["bigram.table"])):
        s = settings(ref, "system.table_gradients=auto")
        banks = Optimizer(build(s), s).banks
        assert [bank.members[0][0] for bank in banks if isinstance(bank, RowBank)] == expected
    with pytest.raises(UserError, match="system.table_gradients needs model.embed.bigram"):
        deltas.resolve("short/61", sets=[AS_ROWS])


class Largest(TorchDispatchMode):
    """Notes the largest tensor, in elements, that an operation makes."""
    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_dense(x)}
        for x in tree_leaves(result):
            if is_dense(x) and x.untyped_storage()._cdata not in given:
                self.most = max(self.most, x.numel())
        return result


def is_dense(x):
    return isinstance(x, torch.Tensor) and x.layout == torch.strided


def test_no_tensor_of_a_step_has_the_size_of_the_table():
    """The largest are the logits and a number for each row."""
    s = settings("short/92", "model.embed.bigram.rows=200000", precision="float32")
    model = GPT(s)
    model.initialise(0)
    optimizer = Optimizer(model, s)
    with Largest() as largest:
        for i in range(2):
            step(optimizer, model, s, tokens(8, 33, seed=i), i)
    touched = (model.bigram.table != 0).any(1).sum().item()
    assert 200 < touched <= 2 * 2 * 8 * 32 and 20 * largest.most < model.bigram.table.numel()


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_forward_is_one_graph_with_the_rows_outside(whole):
    """torch.compile has no sparse gradients; the same bits as without it. whole: of the model, not only of
    the bigram."""
    from torch._dynamo.testing import CompileCounterWithBackend
    s, counter, found = settings("short/92"), CompileCounterWithBackend("aot_eager"), []
    x, y = tokens(4, 33)[:, :-1], tokens(4, 33)[:, 1:]
    for compiled in (False, True):
        model = build(s)
        optimizer, run = Optimizer(model, s), model if whole else model.bigram
        if compiled:
            model.prepare_compile()
            run = torch.compile(run, backend=counter, dynamic=False, fullgraph=True)
        context = model.context(x, BOS, schedule.windows(s, 0))
        assert (context.bigrams is not None) == compiled
        optimizer.expect(last=True)
        result = run(x, y, context) if whole else run(x, rows=context.bigrams)
        result.square().mean().backward()
        bank = next(bank for bank in optimizer.banks if isinstance(bank, RowBank))
        found.append(bank.local_gradient())
    assert counter.frame_count == 1 and torch.equal(found[0].ids, found[1].ids)
    assert torch.equal(found[0].values, found[1].values) and found[0].values.any()
    assert model.eval().context(x, BOS, schedule.windows(s, 0)).bigrams is None
    torch._dynamo.reset()


def test_the_log_has_the_checksums_of_the_dense_gradient():
    sums = []
    for how in (DENSE, AS_ROWS):
        s = settings("short/92", how)
        model = build(s)
        optimizer, x = Optimizer(model, s), tokens(8, 33)
        optimizer.expect(last=True)
        model(x[:, :-1], x[:, 1:], model.context(x[:, :-1], BOS, schedule.windows(s, 0))).mean().backward()
        sums.append(warmup.gradient_checksums(optimizer, World(s)))
    assert sums[0] == sums[1] and len(sums[0]["bigram.table"]) == 2


def test_the_reset_leaves_no_rows():
    s = settings("short/92")
    model = GPT(s)
    model.initialise(0)
    optimizer = Optimizer(model, s)
    before = warmup.state_hash(model, optimizer)
    step(optimizer, model, s, tokens(8, 33), 0)  # the table waits for the next step
    assert optimizer.keeps_gradients(schedule.plan(s)[0]) and warmup.state_hash(model, optimizer) != before
    model.initialise(0)
    optimizer.reset()
    assert warmup.state_hash(model, optimizer) == before


# ----- several processes

ORDERED = ["system.reduction=ordered"] + [
    f"optim.{group}.every=1" for group in ("embed", "lm_head", "scalar", "gate", "smear_gate", "ve_gate",
                                           "skip_gate")
]
PLANS = {
    "sharded": [], "replicated": ["system.comm=replicated"], "interleaved": ["system.comm=interleaved"],
    "clipped": ["optim.grad_clip=0.5"], "ordered": ORDERED
}
RULES = {"adamw": "optim.bigram.row_moment=false", "row_adam": "optim.bigram.row_moment=true"}


def toy(s, rank=0, world=1, rows=29):
    """A table after three steps with look-ups of eight logical ranks, of which this process has a share; in
    the second one the table waits, and only a gate moves. Returns (parameters and state, name of the
    communication)."""
    torch.set_num_threads(1)
    shared = s.system.table_parallel and world > 1
    first = table(rows, 6, F64, 5).detach().to(getattr(torch, s.numerics.table))
    first = first.chunk(world)[rank] if shared else first
    model = Toy(table=(first, "embed", "bigram"), gate=(table(2, 3, F32, 6).detach(), "matrix", "gate"))
    model.table.row_lookups, model.table.takes_rows = 1, False
    optimizer = Optimizer(model, s, communication(s, rank, world))
    waits = s.system.reduction != "ordered"
    for i in range(3):
        due = frozenset({"gate"}) if waits and i == 1 else None
        mine = [*local_ranks(rank, world)]
        for k in mine:
            optimizer.expect(last=k == mine[-1], due=due)
            ids, factors = drawn_ids(9, rows, 10 * i + k), table(9, 6, first.dtype, 10 * i + k).detach()
            looked_up = look_up(model.table, ids, rank, world) if shared else F.embedding(
                ids, model.table, sparse=model.table.takes_rows)
            ((looked_up * factors).sum() + k * model.gate.sum()).backward()
            optimizer.accumulate()
        optimizer.step(plan(i, due=due, lr_factor=0.1))
    bank = next(bank for bank in optimizer.banks if bank.label == "bigram")
    return {name: x.clone() for name, x in optimizer.full_tensors()}, bank.comm.name


def look_up(x, ids, rank, world):
    """Rows of a shared table, which takes their gradients."""
    return shared_table.look_up(x, ids, rank, world, lambda *rows: x.arrived.append(rows))


def toys(precision, rank=0, world=1):
    """{(plan, rule, how the table is held): result of `toy`}. WHOLE is what SHARED is compared with: as many
    rows as the processes can share."""
    found = {}
    for name, sets in PLANS.items():
        for rule, how in itertools.product(RULES, (DENSE, AS_ROWS, WHOLE, SHARED)):
            changes = [how] if how in (DENSE, AS_ROWS) else [AS_ROWS, *([SHARED] if how == SHARED else [])]
            s = deltas.resolve("short/71", scale="micro", sets=[
                f"system.precision={precision}", *sets, RULES[rule], *changes]).settings
            found[name, rule, how] = toy(s, rank, world, 29 if how in (DENSE, AS_ROWS) else 32)
    return found


def member(folder, precision):
    """One process of the next tests."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    torch.save(toys(precision, rank, world), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.feature("system.table_gradients")
@pytest.mark.parametrize("world, precision", [
    (2, "float32"), pytest.param(2, "record", marks=pytest.mark.slow),
    pytest.param(4, "float32", marks=pytest.mark.slow), pytest.param(4, "float64", marks=pytest.mark.slow)
])
def test_processes_that_exchange_rows_end_as_those_that_exchange_tables(tmp_path, world, precision):
    """Bit by bit where two parts are added or the sum is ordered; four parts are added in another order."""
    process_group.call(world, member, tmp_path, precision)
    alone = toys(precision)
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt")
        for (name, rule, how), (rows, comm) in found.items():
            if how != AS_ROWS:
                continue
            owners = rule == "adamw" and name != "replicated"
            assert comm == ("touched rows to their owners" if owners else "touched rows")
            dense, _ = found[name, rule, DENSE]
            exact = name == "ordered" or (world == 2 and name != "clipped")
            for key, x in rows.items():
                assert not exact or torch.equal(x.flatten(), dense[key].flatten()), (name, rule, key)
                assert torch.allclose(x.flatten(), dense[key].flatten(), rtol=1e-5, atol=1e-6), (name, key)
                if name == "ordered":  # on any number of processes
                    assert torch.equal(x, alone[name, rule, how][0][key])


@pytest.mark.feature("system.table_parallel")
@pytest.mark.parametrize("world, precision", [
    (2, "float32"), pytest.param(4, "record", marks=pytest.mark.slow),
    pytest.param(4, "float64", marks=pytest.mark.slow)
])
def test_a_shared_table_ends_as_one_that_every_process_holds(tmp_path, world, precision):
    """With the same bits, its second moments too; the norm that clips sums the processes' parts."""
    process_group.call(world, member, tmp_path, precision)
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt")
        for (name, rule, how), (whole, _) in found.items():
            if how != WHOLE:
                continue
            shared, comm = found[name, rule, SHARED]
            assert comm == "rows of this process" and shared.keys() == whole.keys()
            for key, x in whole.items():
                mine = shared[key].to(x.device).view(x.shape)
                assert torch.allclose(mine, x, rtol=1e-6, atol=1e-7), (name, rule, key)
                assert name == "clipped" or torch.equal(mine, x), (name, rule, key)


def test_a_table_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match="set system.table_gradients=rows, or system.table_parallel=false"):
        deltas.resolve("short/92", sets=[DENSE])
    with pytest.raises(UserError, match="system.table_parallel needs model.embed.bigram"):
        deltas.resolve("short/33", sets=[SHARED])
    with pytest.raises(UserError, match="4 processes do not divide 20110 rows of model.embed.bigram"):
        check_processes(settings("short/92", "model.embed.bigram.rows=20110"), 4)
