"""Laws of system/memory.py and of recomputation: what is counted is what is held, and what fits computes the
same."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import schedule
from kernels import cross_entropy, linear_relu_sq, qk_rotary
from layers.head import Head
from model import GPT
from common.errors import UserError
from settings import deltas
from settings.model import padded_vocab
from system import memory
from system.microbatch import ranks_per_microbatch

GIB = 2**30


def settings(ref, *sets, scale="micro"):
    return deltas.resolve(ref, scale=scale, sets=sets).settings


def rows(s, microbatch=8):
    shape = (microbatch * s.data.tokens_per_rank // s.data.seq_len, s.data.seq_len)
    return torch.randint(s.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def losses(s, model, x):
    return model(x, x.roll(1, 1), model.context(x, 1256, schedule.windows(s, 0)))


@pytest.mark.parametrize(
    "ref, sets",
    [
        ("short/1", ()), ("short/5", ()), ("short/8", ()), ("short/11", ()),
        ("short/11", ("system.kernels.loss=chunks",)), ("short/9", ("system.activation_checkpoint=on",))
    ],
)
def test_a_forward_without_values_keeps_what_a_real_one_keeps(ref, sets):
    """To the byte, where attention is one call that keeps what FlashAttention keeps."""
    s = settings(ref, *sets)
    model = GPT(s)
    model.initialise(0)
    with memory.Kept(model.parameters()) as kept:
        loss = losses(s, model, rows(s)).mean()
    assert kept.bytes() == memory.kept_by_forward(s, 8) and loss.isfinite()


RECORD = ("system.precision=record",)
OWN = tuple(f"system.kernels.{name}=triton" for name in ("mlp", "qk", "loss"))


@pytest.fixture
def kernels_by_reference(monkeypatch):
    """Our kernels run on a CPU, each by its reference; what autograd keeps around them is theirs."""
    for module in (linear_relu_sq, qk_rotary):
        monkeypatch.setattr(module, "refusal", lambda *args: None)
    monkeypatch.setattr(linear_relu_sq, "forward", linear_relu_sq.linear_relu_sq_reference)
    monkeypatch.setattr(cross_entropy, "choose", lambda *args: "torch")

    def rotated(q, k, cos, sin, order, eps, offset):
        return qk_rotary.qk_rotary_reference(q, k, cos, sin, order=order, eps=eps, offset=offset)

    monkeypatch.setattr(qk_rotary, "forward", rotated)


@pytest.mark.parametrize("sets", [OWN, OWN[:1], OWN[1:2]], ids=["all", "mlp", "qk"])
def test_what_our_kernels_keep_is_counted(kernels_by_reference, sets):
    """To the byte, and less than the operations that a kernel replaces."""
    s, plain = settings("short/11", *sets), settings("short/11")
    model = GPT(s)
    model.initialise(0)
    with memory.Kept(model.parameters()) as kept:
        losses(s, model, rows(s)).mean()
    assert kept.bytes() == memory.kept_by_forward(s, 8) < memory.kept_by_forward(plain, 8)


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and that still live, and the most so far."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def gone(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata)
        self.most = max(self.most, self.now)
        return result


def test_a_table_of_zeros_is_initialised_without_a_copy():
    """Record 92's has 130 GB in bfloat16, and initial values are drawn in float32 on the host."""
    model = GPT(settings("short/62", "model.embed.bigram.rows=400000"))
    model.bigram.table.data.fill_(1)
    with Living() as living:
        model.initialise(0)
    # filling it in place counts the table once
    assert not model.bigram.table.any() and living.most < 1.5 * model.bigram.table.nbytes


ROUNDED = ("numerics.softcap_sigmoid=bfloat16", "numerics.fp8_head.logits=e4m3")  # records 79 and 92


@pytest.mark.parametrize("ref, sets", [
    ("short/1", ()), ("short/11", ()), ("short/21", ()), ("short/33", ()), ("short/48", ()), ("short/57", ()),
    ("short/33", (*RECORD, "system.kernels.loss=chunks")),
    ("short/57", (*RECORD, "system.kernels.loss=chunks")),
    ("short/11", ("system.precision=bf16_matmul",)), ("short/21", ("system.precision=bf16_matmul",)),
    ("short/57", (*RECORD, *ROUNDED)), ("short/57", (*RECORD, *ROUNDED, "system.kernels.loss=chunks")),
    ("short/57", (*RECORD, *ROUNDED, "model.head.mtp=false"))
])
def test_what_comes_and_goes_in_the_loss_is_counted(ref, sets, monkeypatch):
    """By the tensors that live in a real backward pass, in the record's own dtypes."""
    monkeypatch.setattr(cross_entropy, "CHUNK", dict.fromkeys(("cpu", "cuda"), 2**18))
    s = settings(ref, *(sets or RECORD))
    head, tokens, (classes, d) = Head(s), 512, (padded_vocab(s), s.model.model_dim)
    table = torch.zeros(classes, d, dtype=torch.bfloat16, requires_grad=True)
    x = torch.zeros(1, tokens, d, dtype=getattr(torch, s.numerics.matmul), requires_grad=True)
    targets = torch.arange(tokens)[None]  # (R, T)
    weights = schedule.target_weights(s, 0, 0) if s.model.head.mtp else None
    if head.weight is not None:
        torch.nn.init.zeros_(head.weight)
    with Living() as living:
        with memory.Kept([table, x, *head.parameters()]) as kept:
            loss = head.losses(x, table, targets, weights, tokens_per_rank=tokens).mean()
        before = kept.bytes()
        kept.storages.clear()
        living.most = living.now
        loss.backward()
    assert living.most - before == pytest.approx(memory.passing_in_head(s, tokens), rel=0.1)


@pytest.mark.parametrize("ref", ["short/33", "variants/1", "variants/4", "variants/6"])
def test_every_kind_of_layer_is_counted_and_grows_with_the_tokens(ref):
    s = settings(ref, scale="tiny")
    one, two = (memory.kept_by_forward(s, n) for n in (1, 2))
    tables = 2**20  # rotary tables and the like, whatever the tokens
    assert 1.5 * (one - tables) < two <= 2 * one


def test_16_bit_gradients_of_several_forwards_are_counted_twice_over():
    s = settings("short/33", "system.precision=record")
    whole, halves = (memory.estimate(s, 8, microbatch) for microbatch in (8, 4))
    tables = sum(p.numel() for p in GPT(s).parameters() if p.dtype == torch.bfloat16)
    assert halves.gradients - whole.gradients == 4 * tables > 0 and halves.kept < whole.kept


MEASURED = json.loads((Path(__file__).parent / "nullcuda/table.json").read_text(encoding="utf-8"))["rows"]


LESS = {"rows=1.3M": "model.embed.bigram.rows=1321920"}  # of what a row's name has less than its record


@pytest.mark.parametrize("row", [
    "short/1 compiled", "short/5 compiled", "short/33 compiled", "short/57 eager",
    "short/92 rows=1.3M eager", "short/92 rows=1.3M compiled", "variants/2 compiled", "variants/5 compiled",
    "optimizer/36 compiled"
])
def test_an_estimate_is_what_the_allocator_gave_out_on_the_null_device(row):
    ref, *less, mode = row.split()
    sets = ("system.device=cuda", f"system.compile={'on' if mode == 'compiled' else 'off'}",
            "schedule.steps=4", *(LESS[word] for word in less))
    found = memory.estimate(settings(ref, *sets, scale="full"), 8, MEASURED[row]["ranks_per_microbatch"])
    within = 0.1 if mode == "compiled" else 0.02
    assert MEASURED[row]["step_peak_gib"] * GIB == pytest.approx(found.total, rel=within)


def test_the_memory_of_a_sampled_softmax_is_that_of_its_largest_step():
    """Record 92 has most candidates while a step has most tokens, and all classes in smaller steps."""
    shapes = memory.heaviest(settings("short/92", scale="full"))
    assert {(x.tokens_per_rank, x.candidates) for x in shapes} == {(49_152, 24_576), (40_960, None)}
    s = settings("short/92", "system.compile=off")
    moments = [memory.moment(s, shape, 8, False) for shape in memory.heaviest(s)]
    found = memory.estimate(s, 8, 8)
    assert len(moments) == 2 and (found.kept, found.passing) == max(moments, key=sum) != min(moments, key=sum)


@pytest.mark.parametrize("gib, world", [(24, 1), (80, 1), (141, 1), (80, 8)])
def test_the_largest_table_of_record_92_fills_a_card(gib, world):
    """Two rows more on each are too much. Dense gradients of the whole table would take 500 GiB. Eight cards
    share its rows, and hold all of them."""
    s = settings("short/92", scale="full")
    rows, found = memory.largest_table(s, 8 // world, gib * GIB, world)
    assert rows % (2 * world) == 0 and rows > 300_000 and (rows > s.model.embed.bigram.rows) == (world == 8)
    microbatch = 1
    fitted = memory.fit(memory.with_rows(s, rows), 8 // world, gib * GIB, world)[0]
    more = memory.estimate(memory.with_rows(fitted, rows + 2 * world), 8 // world, microbatch, world)
    assert found.total <= memory.SHARE * gib * GIB < more.total
    assert found.gradients < 8 * GIB and memory.estimate(s, 8, 1).total < 155 * GIB


def test_there_is_no_largest_table_where_gradients_are_dense_or_no_table_is():
    for ref in ("short/33", "short/62"):
        assert memory.largest_table(settings(ref), 8, 24 * GIB) is None


def test_a_compiled_forward_keeps_less_and_so_more_ranks_fit():
    eager, compiled = (
        memory.estimate(settings("short/11", f"system.compile={on}", scale="small"), 8, 8)
        for on in ("off", "on")
    )
    assert compiled.kept < 0.7 * eager.kept and compiled.passing < eager.passing
    assert compiled._replace(kept=0, passing=0) == eager._replace(kept=0, passing=0)


def test_a_share_of_the_optimizer_is_less_than_all_of_it():
    s = settings("short/33")
    assert memory.estimate(s, 2, 1, world=4).state < memory.estimate(s, 8, 1).state / 3


def test_what_is_chosen_fits_and_gives_up_speed_in_order():
    s = settings("short/11", "system.compile=off", scale="small")
    chosen = []
    for gib in (90, 24, 10, 7):
        fitted, estimate = memory.fit(s, 8, gib * GIB)
        assert estimate.total <= memory.SHARE * gib * GIB
        assert estimate == memory.estimate(fitted, 8, fitted.system.ranks_per_microbatch)
        system = fitted.system
        chosen.append((system.ranks_per_microbatch, system.kernels.loss, system.activation_checkpoint))
    assert chosen == [(8, "auto", "auto"), (2, "auto", "auto"), (1, "chunks", "auto"), (1, "chunks", "on")]
    fitted, estimate = memory.fit(s, 8, GIB)
    # as small as it can: the run will tell
    assert estimate.total > GIB and fitted.system.activation_checkpoint == "on"


def test_what_the_user_has_set_stays():
    sets = ("system.ranks_per_microbatch=4", "system.kernels.loss=whole", "system.activation_checkpoint=off")
    s = settings("short/11", *sets, scale="small")
    assert memory.fit(s, 8, GIB)[0] == s


@pytest.mark.parametrize("ref", ["short/1", "short/9", "short/14", "short/33", "variants/7"])
def test_recomputed_blocks_give_the_same_losses_and_gradients_and_keep_less(ref):
    results, held = [], []
    for recompute in ("off", "on"):
        s = settings(ref, f"system.activation_checkpoint={recompute}")
        model = GPT(s)
        model.initialise(0)
        with torch.no_grad():  # away from the zeros of the start, which would hide most gradients
            for name, p in sorted(model.named_parameters()):
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
        with memory.Kept(model.parameters()) as kept:
            loss = losses(s, model, rows(s, 2)).mean()
        loss.backward()
        held.append(kept.bytes())
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *results)) and held[1] < held[0] / 2


def test_recomputation_of_experts_is_refused():
    with pytest.raises(UserError, match="system.activation_checkpoint=on would count the tokens per expert"):
        settings("variants/1", "system.activation_checkpoint=on")


@pytest.mark.parametrize("tokens", [1024, 16384, 20480, 30720, 65536, 131072])
def test_forwards_of_a_step_are_of_equal_size(tokens):
    """Each forward's loss has the same share of the step's."""
    s = settings("short/11", f"data.tokens_per_rank={tokens}", f"data.seq_len={tokens}", scale="full")
    for ranks in (1, 2, 4, 8):
        microbatch = ranks_per_microbatch(s, ranks, cuda=True)
        assert ranks % microbatch == 0 and microbatch * tokens <= max(65536, tokens)
