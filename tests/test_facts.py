"""Facts about each record's tensors as its log's source has them: dtypes, optimizers, initial values, tables,
roundings.

A table reads "from this record on"; 21.1 and 21.2 are 21r and 21t. Sizes are those of scale micro (width 48,
1257 token ids, 1280 with padding), dtypes the record's own.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import schedule
from data.batch import Documents
from kernels.newton_schulz import newton_schulz
from layers import head as head_module
from model import GPT, without_values
from optim import Optimizer
from settings import deltas
from small_models import plan as step_plan
from system.hooks import hooks_of
from train_gpt import train_step

F32, BF16 = torch.float32, torch.bfloat16
RECORDS = {
    ref: r.order for ref, r in deltas.load_records().items() if ref.startswith("short/") and r.order <= 33
}


def from_on(first):
    """Parametrise a test over the records from this one on."""
    return pytest.mark.parametrize("ref, n", [(ref, n) for ref, n in RECORDS.items() if n >= first])


def at(n, changes):
    """What a table of (first record, value) says of record n; None before its first line."""
    return next((value for first, value in reversed(changes) if first <= n), None)


def built(ref, *sets, precision="record"):
    s = deltas.resolve(ref, scale="micro", sets=[f"system.precision={precision}", *sets]).settings
    model = GPT(s)
    model.initialise(0)
    return s, model


def kind(name):
    last = name.split(".")[-1]
    if name == "lm_head.weight":
        return "head"
    if name.startswith(("embed.weight", "values.tables", "embed.positions")):
        return "table"
    return "matrix" if last in ("qkvo", "c_fc", "c_proj") else "gate" if last == "gate" else "scalar"


# ----- what the logs of records 34 to 57 print or their sources set

STEPS = {  # scheduled, extension
    34: (1645, 0), 35: (1640, 40), 36: (1640, 40), 37: (1640, 40), 38: (1630, 40), 39: (2380, 40),
    40: (2290, 40), 41: (2275, 40), 42: (2245, 40), 43: (2205, 40), 44: (2205, 40), 45: (2185, 40),
    46: (2120, 40), 47: (2120, 40), 48: (2120, 40), 49: (2070, 40), 50: (2050, 40), 51: (1995, 40),
    52: (1960, 40), 53: (1880, 40), 54: (1840, 40), 55: (1805, 40), 56: (1785, 40), 57: (1800, 40)
}
TOKENS = {  # of the whole training, where the log or its record names them
    34: 646_840_320, 35: 660_602_880, 38: 656_670_720, 39: 634_388_480, 40: 610_795_520, 41: 606_863_360,
    42: 598_999_040, 43: 588_513_280, 45: 583_270_400, 46: 571_342_848, 49: 558_366_720, 50: 552_992_768,
    51: 538_705_920, 52: 529_399_808, 53: 508_428_288, 54: 497_942_528, 55: 488_767_488, 56: 483_655_680,
    57: 487_587_840
}
GROWING = (131_072, 262_144, 393_216)
BATCHES = [(34, (393_216,)), (39, (262_144,)), (46, GROWING)]  # tokens of a step, in their order
PEAKS = [(34, ()), (46, (1.51, 1.93)), (53, (1.52, 1.73))]
COOLDOWN = [(34, 0.5), (39, 0.4), (40, 0.45), (42, 0.5), (46, 0.55), (54, 0.5)]
MUON_RATE = [(34, 0.05), (38, 0.06), (42, 0.03), (46, 0.023)]
BETA1 = [(34, 0.8), (39, 0.7), (40, 0.65)]
EPS = [(34, 1e-8), (57, 1e-10)]
RATES = {"embed": [(34, 0.6), (51, 0.008)], "lm_head": [(34, 0.008)], "scalar": [(34, 0.04)]}
LAST_WINDOW = [(34, 11), (42, 13)]  # long window at the end of training, in blocks of 128
FINAL = [(34, (13, 6, 20)), (35, (20, 6, 20))]  # of the last validation: long, short, last layer
BLOCKS = [(34, 12), (49, 11)]
NO_ATTENTION = [(34, (7,)), (35, (0, 7)), (49, (6,))]


@pytest.mark.parametrize("n", STEPS)
def test_published_facts_of_records_34_to_57(n):
    s = deltas.resolve(f"short/{n}").settings
    steps, extension = STEPS[n]
    plans = schedule.plan(s)
    assert (len(plans), s.schedule.extension) == (steps + extension, extension)
    total = plans[-1].tokens_before + plans[-1].tokens
    assert total == TOKENS.get(n, total) and schedule.tokens_before(s, len(plans)) == total
    assert tuple(dict.fromkeys(p.tokens for p in plans)) == at(n, BATCHES)
    assert tuple(factor for _, factor in s.schedule.lr_peaks) == at(n, PEAKS)
    assert (s.schedule.cooldown_frac, s.schedule.lr_floor) == (at(n, COOLDOWN), 0.1)
    assert (s.optim.muon.lr, s.optim.adam.beta2) == (at(n, MUON_RATE), 0.95)
    assert (s.optim.adam.beta1, s.optim.adam.eps) == (at(n, BETA1), at(n, EPS))
    for group, rates in RATES.items():
        assert n >= 51 and group == "embed" or s.optim.group(group, group).lr == at(n, rates), group
    if n >= 51:  # the tied table is the head; value tables keep the rate of the embedding
        assert s.optim.group("embed", "value_embed").lr == 0.6
    long = [p.shape.windows.long_blocks[-1] for p in plans]
    assert tuple(dict.fromkeys(long)) == (3, 7, 11, 13)[:3 if at(n, LAST_WINDOW) == 11 else 4]
    assert long[-1] == at(n, LAST_WINDOW)
    final = schedule.validation_windows(s, len(plans))
    assert tuple((w.tokens - 1) // 128 for w in (final.long, final.short, final.last)) == at(n, FINAL)
    assert s.data.max_doc_len == 2048 and s.validation.tokens == 10_485_760
    assert s.model.num_layers == at(n, BLOCKS)
    assert tuple(sorted(s.model.attn.drop_layers)) == at(n, NO_ATTENTION)


# ----- storage and optimizer

KINDS = [(1, {"table", "matrix", "scalar"}), (2, {"table", "matrix"}), (8, {"table", "matrix", "head"}),
         (9, {"table", "matrix", "head", "scalar"}), (28, {"table", "matrix", "head", "scalar", "gate"})]
STORED = {"table": [(1, F32), (10, BF16)],  # record 10 casts the module to bfloat16 and its linears back
          "matrix": [(1, F32)],
          "scalar": [(1, F32), (10, BF16), (18, F32)],  # from 18 on the tables alone are cast
          "head": [(8, F32), (32, BF16)],
          "gate": [(28, F32), (32, BF16)]}
RULE = {"table": [(1, "adamw")], "scalar": [(1, "adamw")], "head": [(8, "adamw")],
        "matrix": [(1, "adamw"), (3, "muon")], "gate": [(28, "muon")]}
GROUP = {
    "table": [(1, "lm_head"), (8, "embed")],  # until 7 the head is the token table
    "matrix": [(1, "matrix")],
    "gate": [(28, "matrix")],
    "scalar": [(1, "scalar")],
    "head": [(8, "lm_head")],
}
MOMENTS = {**STORED,  # AdamW's follow the parameter, from 32 on all are bfloat16
           "scalar": [(1, F32), (10, BF16), (18, F32), (32, BF16)]}
TABLES = [(1, 1), (14, 13), (15, 7), (17, 4)]  # of tokens and of values
TABLE_ROWS = [(1, 1257), (5, 1280), (17, 1257), (18, 1280), (19, 1257), (24, 1280)]


@pytest.mark.feature(record="ref")
@from_on(1)
def test_dtype_group_rule_and_optimizer_state_of_every_parameter(ref, n):
    s, model = built(ref)
    seen = set()
    for bank in Optimizer(model, s).banks:
        for name, p in bank.members:
            what = kind(name)
            seen.add(what)
            assert p.dtype == bank.param.dtype == at(n, STORED[what]), name
            assert bank.rule.name == at(n, RULE[what]), name
            assert bank.role == ("embed" if name == "embed.positions" else at(n, GROUP[what])), name
            if bank.rule.name == "adamw":
                assert {x.dtype for x in bank.state.values()} == {at(n, MOMENTS[what])} and len(
                    bank.state
                ) == 2, name
            elif what == "matrix":
                assert {x.dtype for x in bank.state.values()} == {F32} and len(bank.state) == 1, name
    assert seen == at(n, KINDS)
    tables = [
        p for name, p in model.named_parameters() if kind(name) == "table" and name != "embed.positions"
    ]
    assert [len(p) for p in tables] == [at(n, TABLE_ROWS)] * at(n, TABLES)
    assert n < 8 or len(model.lm_head.weight) == 1280


# ----- initial values

def check_uniform(x, bound):
    x = x.double()
    assert 0.99 * bound < x.abs().max() < bound * (1 + 2 ** -8)  # record 10 rounds it
    assert abs(x.std() * math.sqrt(3) / bound - 1) < 0.05 and abs(x.mean()) < 0.06 * bound


def check_normal(x, std):
    x = x.double()
    assert 3 < x.abs().max() / std < 7 and abs(x.std() / std - 1) < 0.05 and abs(x.mean()) < 0.1 * std


def matrices(model):
    """[(weight, whether it writes into the residual stream)]: q, k, v, o, up, down of all layers."""
    for name, p in model.named_parameters():
        if name.endswith("qkvo"):
            yield from zip(p, (False, False, False, True))
        elif kind(name) == "matrix":
            yield p, name.endswith("c_proj")


@pytest.mark.feature(record="ref")
@from_on(1)
def test_initial_matrices(ref, n):
    """1: normal, 0.02, projections / sqrt(2 layers). Then uniform with bound 1 / sqrt(in), from 19 on with
    standard deviation 0.5 / sqrt(in); projections start at 0 from 5 on, and 10 to 17 round to bfloat16."""
    for weight, projection in matrices(built(ref)[1]):
        if projection and n >= 5:
            assert weight.count_nonzero() == 0
            continue
        if n == 1:
            check_normal(weight, 0.02 / math.sqrt(24) if projection else 0.02)
        else:
            check_uniform(weight, at(n, [(2, 1.0), (19, math.sqrt(3) * 0.5)]) / math.sqrt(weight.size(1)))
        assert torch.equal(weight, weight.bfloat16().float()) == (10 <= n < 18)


@from_on(1)
def test_initial_tables_head_and_gates(ref, n):
    """Tied until 7: first normal, 0.02, then a linear's. Then all tables, values' too: N(0, 1). Head and
    gates: 0."""
    for name, p in built(ref)[1].named_parameters():
        if kind(name) == "table":
            if 2 <= n < 8:
                check_uniform(p, 1 / math.sqrt(48))
            else:
                check_normal(p, at(n, [(1, 0.02), (8, 1.0)]))
        elif kind(name) in ("head", "gate"):
            assert p.count_nonzero() == 0, name


SCALARS = {"residual.resid_lambdas": [(9, (12, 1.0))], "residual.x0_lambdas": [(9, (12, 0.0))],
           "values.lam": [(9, (12, 0.5)), (14, None)],
           "values.ve_lambdas": [(14, (12, 0.5)), (17, (11, 0.5))],  # layer 7 has no attention
           "values.v_lambdas": [(15, (12, 0.5)), (17, (11, 0.5))],
           "residual.skip_weights": [(11, (6, 1.0)), (32, (6, -1.5))]}  # before the sigmoid


@from_on(1)
def test_initial_scalars(ref, n):
    model = built(ref)[1]
    found = {name.removesuffix(".value"): p for name, p in model.named_parameters() if kind(name) == "scalar"}
    if n == 1:  # biases 0, gains 1
        assert all(torch.equal(p, torch.full_like(p, "gain" in name)) for name, p in found.items())
        return
    assert set(found) == {name for name, changes in SCALARS.items() if at(n, changes)}
    for name, p in found.items():
        length, value = at(n, SCALARS[name])
        assert p.tolist() == [value] * length, name
    if n >= 11:
        weights = [round(x.item(), 4) for x in model.residual.skip_weights()]
        assert weights == [at(n, [(11, 1.0), (32, 0.1824)])] * 6


# ----- rotary positions

ROPE = [(2, F32), (5, BF16), (18, F32), (32, BF16)]


@from_on(2)
def test_rotary_tables(ref, n):
    """10000^(-2j/K), from 17 on 1024^(-j/(K/4 - 1)) for half of the pairs; 14 to 16 round the frequencies to
    bfloat16."""
    rotary, width = built(ref)[1].rotaries[0], 48 // at(n, [(2, 12), (5, 6)])
    f = torch.tensor([10000 ** (-2 * j / width) for j in range(width // 2)] if n < 17 else
                     [1024 ** -(j / (width // 4 - 1)) if j < width // 4 else 0.0 for j in range(width // 2)],
                     dtype=torch.float64)
    f = f.bfloat16().double() if 14 <= n < 17 else f
    angle = torch.arange(len(rotary.cos), dtype=torch.float64)[:, None] * f
    error = 2e-4 + (2 ** -9 if at(n, ROPE) == BF16 else 0)  # of float32 angles up to 1023; of the table
    for table, exact in ((rotary.cos, angle.cos()), (rotary.sin, angle.sin())):
        assert table.dtype == at(n, ROPE) and table.shape == exact.shape
        assert (table.double() - exact).abs().max() < error


@from_on(17)
def test_rotation_is_in_float32_until_record_32_makes_it_bfloat16(ref, n):
    rotary = built(ref)[1].rotaries[0]
    x = torch.randn(1, 64, 6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rotary.cos[:64, None], rotary.sin[:64, None]

    def turned(dtype):
        (x1, x2), c, s = x.to(dtype).chunk(2, -1), cos.to(dtype), sin.to(dtype)
        return torch.cat([x1 * c + x2 * s, x2 * c - x1 * s], -1).to(BF16)

    assert torch.equal(rotary(x), turned(at(n, [(17, F32), (32, BF16)]))) and not torch.equal(
        turned(F32), turned(BF16)
    )


# ----- Muon's rounding

@from_on(3)
def test_muon_scales_its_bfloat16_direction_in_float32_except_records_6_to_14(ref, n):
    """6 ships the scaled update in bfloat16; 15 scales at the addition. With MLPs three times as wide as the
    stream, because at four times sqrt(rows / cols) = 2 rounds nothing."""
    s, model = built(ref, "model.mlp.expansion=3", "optim.muon.lr=1.0")
    optimizer = Optimizer(model, s)
    bank = next(b for b in optimizer.banks if b.label == "c_fc")
    bank.param.zero_()
    bank.grad.normal_(generator=torch.Generator().manual_seed(0))
    direction = newton_schulz(bank.grad.clone(), dtype=BF16, norm_dtype=at(n, [(3, F32), (5, BF16)]),
                              form=at(n, [(3, "expanded"), (11, "factored"), (27, "symmetric")])).float()
    # from the first gradient, so that it is the direction's input
    optimizer.step(step_plan(momentum=0.0))
    scaled = at(n, [(3, 1.0), (4, math.sqrt(144)), (8, math.sqrt(144 / 48)), (27, 1.0)]) * direction
    assert torch.equal(-bank.param, scaled.bfloat16().float() if 6 <= n < 15 else scaled)
    # elsewhere the rounding shows
    assert torch.equal(scaled, scaled.bfloat16().float()) == (n == 3 or n >= 27)


# ----- forward pass

def forward(s, model):
    """Losses of one row."""
    tokens = torch.randint(1, 1257, (1, s.data.seq_len), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens, tokens, model.context(tokens, 0, schedule.windows(s, 0)))


@from_on(1)
def test_dtypes_on_the_way_through_the_model(ref, n):
    """Matrix products in bfloat16, only 2 to 4 validate in float32; the stream; the soft cap; losses in
    float32."""
    s, model = built(ref)
    stream, normed, logits = [], [], []
    block = model.blocks[1]
    block.mlp_norm.register_forward_hook(lambda module, args, out: stream.append(args[0].dtype))
    block.attn.register_forward_hook(lambda module, args, out: normed.append((args[0].dtype, out.dtype)))
    with torch.no_grad():
        if n >= 8:  # zeros until then
            model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
        for training in (True, False):
            assert forward(s, model.train(training)).dtype == F32
            x = torch.randn(40, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
            logits.append(model.lm_head(x, model.embed.weight, 40))
    assert normed == [(BF16, BF16), 2 * (at(n, [(1, BF16), (2, F32), (5, BF16)]),)]
    assert stream == 2 * [at(n, [(1, BF16), (2, F32), (10, BF16)])]
    for z in logits:  # on bfloat16's grid, but that 19 on cap them in float32
        assert z.dtype == F32 and torch.equal(z, z.bfloat16().float()) == (n < 19)


@pytest.mark.parametrize("loss", ["whole", "chunks"])
@from_on(1)
def test_the_head_is_in_fp8_from_record_19_on_in_training_and_never_in_validation(ref, n, loss, monkeypatch):
    products, real, fused = [], head_module.fp8_linear, head_module.linear_cross_entropy
    monkeypatch.setattr(head_module, "fp8_linear",
                        lambda *args, **how: products.append("fp8") or real(*args, **how))
    monkeypatch.setattr(head_module, "linear_cross_entropy",
                        lambda *args, **how: products.append(how["fp8"] and "fp8") or fused(*args, **how))
    s, model = built(ref, f"system.kernels.loss={loss}")
    forward(s, model.train())
    assert products.count("fp8") == (n >= 19) and (loss == "whole" or len(products) == 1)
    products.clear()
    forward(s, model.eval())
    assert "fp8" not in products and len(products) == (loss == "chunks")


@from_on(19)
def test_factors_of_the_fp8_head(ref, n):
    """What x, the weight and the gradient of the rank's own loss are multiplied by before they are rounded,
    at full size."""
    s = deltas.resolve(ref).settings
    x, w, g = without_values(s).train().lm_head.operands(None, schedule.shape(s, 0).tokens_per_rank)[1]
    expected = at(
        n,
        [
            (19, (2, 32, 2**29)), (21, (2, 512, 2**19)), (21.2, (448 / 768**0.5, 448 / 24, 448)),
            (28, (448 / 768**0.5, 2**9, 448))
        ],
    )
    assert (x, w, g / 8) == pytest.approx(expected, rel=1e-12)  # the trainer has divided by the eight ranks


# ----- the trainer's loss

@pytest.mark.parametrize("microbatch", [2, 8])
@pytest.mark.parametrize("ref, n", [(ref, RECORDS[ref]) for ref in ("short/21r", "short/21t", "short/33")])
def test_gradients_are_the_mean_over_ranks_of_their_mean_losses_and_from_21t_on_of_their_sums(
    ref, n, microbatch
):
    s, model = built(ref, precision="float64")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            # no zeros that hide what is behind them
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    batch = torch.randint(0, 1257, (8, s.data.tokens_per_rank + 1), generator=g)
    batch[:, ::40] = 0
    inputs, targets, windows = (
        batch[:, None, :-1], batch[:, None, 1:], schedule.windows(s, s.schedule.steps // 2)
    )
    expected = 0
    model.update_yarn(windows)
    for x, y in zip(inputs, targets):
        logits = model(x, context=model.context(x, 0, windows))
        loss = F.cross_entropy(logits[0], y[0], reduction="mean" if n < 21.2 else "sum") / 8
        grads = torch.autograd.grad(loss, list(model.parameters()))
        expected = [a + b for a, b in zip(expected, grads)] if expected else grads
    found, optimizer = [], Optimizer(model, s)
    run = SimpleNamespace(
        s=s, model=model, hooks=hooks_of(model), compiled=model, optimizer=optimizer,
        workers=None, guards=None, ranks_per_microbatch=microbatch, corpus=SimpleNamespace(bos=0),
        world=SimpleNamespace(total=lambda x: x)
    )
    plan = schedule.plan(s)[s.schedule.steps // 2]
    train_step(run, plan, inputs, targets, [Documents(10, inputs.size(-1))] * 8,
               before_reduction=lambda: found.extend(p.grad.clone() for p in model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), expected, found, strict=True):
        assert a.abs().max() > 0 and (a - b).abs().max() < 1e-10 * a.abs().max(), name
