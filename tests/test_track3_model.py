"""The fixed model of the optimizer track, its initial weights, stream, schedules and baseline (result 36)
against numbers of the original scripts."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import schedule
from data.batch import Documents
from data.stream import positions, stream_arguments
from golden_records import load
from layers.primitives import Norm
from layers.signed_gains import fill_gains, paired_signs
from layers.head import Head, with_bias
from model import GPT, without_values
from optim import Optimizer
from settings import deltas
from small_models import settings
from track3_models import fill, ours, small, theirs
from train_gpt import train_step


# ----- model

@pytest.mark.feature("model.norm_gain", "model.head.bias")
def test_losses_logits_and_gradients_of_the_fixed_model():
    golden, config = load("t3_model_a")
    s, model = small("optimizer/36", config, rows=1, length=64)
    fill(model, ours(lambda name: golden[f"param/{name}"], 4))
    x, y = (torch.from_numpy(golden[f"in/{k}"]).long() for k in ("tokens", "targets"))
    losses = model(x, y)
    losses.sum().backward()
    assert abs(losses.sum().item() / golden["out/loss_sum"] - 1) < 1e-12
    assert np.abs(losses.detach().numpy().ravel() - golden["out/token_loss"]).max() < 1e-11
    logits = model(x).detach().flatten(0, 1).numpy()[golden["out/logits_row_index"]]
    assert np.abs(logits - golden["out/logits_rows"]).max() < 1e-11
    compared = 0
    for name, names in theirs(4).items():
        if f"grad/{names if isinstance(names, str) else names[0]}" in golden:
            value = ours(lambda key: golden[f"grad/{key}"], 4, only=name)[name]
            got = model.get_parameter(name).grad.numpy()
            assert np.abs(got - value).max() <= 1e-7 * np.abs(value).max(), name
            compared += 1
    assert compared == 2 * 8 + 5


def test_parameters_of_the_fixed_model():
    s = deltas.resolve("optimizer/36").settings
    sizes = {}
    for p in without_values(s).parameters():
        sizes[p.role, p.label] = sizes.get((p.role, p.label), 0) + p.numel()
    assert without_values(s).num_parameters() == sum(sizes.values()) == 162_354_816
    assert sum(n for (role, _), n in sizes.items() if role == "matrix") == 84_934_656
    assert sizes["embed", "embed"] == sizes["lm_head", "lm_head"] == 50304 * 768
    assert sizes["scalar", "norm"] == 26 * 768 and sizes["scalar", "bias"] == 12 * 9 * 768 + 50304


@pytest.mark.feature("optim.o_bias")
def test_the_bias_of_attention_s_output_may_be_apart_with_the_same_values():
    models = {}
    for apart in (False, True):
        sets = ["model.init.bias=all"] + ["optim.o_bias={beta2 = 0.9965}"] * apart
        s = settings("optimizer/36", *sets)
        models[apart] = GPT(s)
        models[apart].initialise(3)
    whole, qkv, o = (models[a].blocks[1].attn for a in (False, True, True))
    assert torch.equal(whole.bias, torch.cat([qkv.bias, o.o_bias])) and whole.bias.ne(0).all()
    x = torch.arange(24)[None]
    assert torch.equal(models[False](x), models[True](x))
    group = s.optim.group("scalar", "o_bias")
    assert (group.beta2, s.optim.group("scalar", "bias").beta2) == (0.9965, 0.95)


def test_the_bias_of_the_head_acts_in_every_form_of_the_loss():
    """As further channels, in chunks, with candidates, and with the soft cap of this track."""
    losses = {}
    for form in ("whole", "chunks"):
        s = settings("optimizer/36", f"system.kernels.loss={form}")
        head = Head(s)
        g = torch.Generator().manual_seed(0)
        for p in head.parameters():
            p.data.normal_(generator=g)
        x = torch.randn(2, 24, s.model.model_dim, generator=g, dtype=torch.float64)
        y = torch.randint(0, 40, (2, 24), generator=g)
        z = x @ head.weight.T + head.bias
        capped = 15 * z / (z.square() + 225).sqrt()
        some = torch.arange(64)
        for chosen, logits in ((None, capped), (some, capped[..., :64])):
            found = head.losses(x, None, y, candidates=chosen)
            want = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(2, 24)
            assert torch.allclose(found, want, atol=1e-12, rtol=0), (form, chosen is None)
            losses.setdefault(chosen is None, []).append(
                torch.autograd.grad(found.sum(), [head.weight, head.bias])
            )
    for a, b in losses.values():
        assert all(torch.allclose(p, q, atol=1e-12, rtol=0) for p, q in zip(a, b))
    wide, weight = with_bias(x, head.weight, head.bias)
    assert wide.size(-1) % 8 == 0 and torch.allclose(wide @ weight.T, z, atol=1e-13, rtol=0)


@pytest.mark.parametrize("microbatch", [1, 8])
def test_the_gradient_is_that_of_the_sum_over_all_tokens_of_a_step(microbatch):
    s = settings("optimizer/36", f"system.ranks_per_microbatch={microbatch}", "model.num_layers=2")
    model = GPT(s)
    model.initialise(0)
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    batch = torch.randint(0, 1257, (8, s.data.tokens_per_rank // s.data.seq_len, s.data.seq_len + 1),
                          generator=g)
    inputs, targets, found = batch[..., :-1], batch[..., 1:], []
    run = SimpleNamespace(
        s=s, model=model, hooks=(), compiled=model, optimizer=Optimizer(model, s),
        ranks_per_microbatch=microbatch, corpus=SimpleNamespace(bos=0), world=None, workers=None, guards=None
    )
    train_step(run, schedule.plan(s)[0], inputs, targets, [Documents(1, s.data.seq_len)] * 8,
               before_reduction=lambda: found.extend(p.grad.clone() for p in model.parameters()))
    model.initialise(0)
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    loss = model(inputs.flatten(0, 1), targets.flatten(0, 1)).sum()
    for got, want in zip(found, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert (got - want).abs().max() <= 1e-11 * want.abs().max()


# ----- initial weights

TRACK = "optimizer/36"
FAMILIES = {"r36": 36, "r01like_r07": 7, "r04": 4, "r05": 5, "r19": 19, "r30": 30, "r33": 33, "r37": 37,
            "r44": 44, "r46": 46}  # fixture -> result
SAMPLE = 2 ** 14


@pytest.mark.feature("model.init.c_fc_bound", "model.init.c_proj_bound", "model.init.o_bound")
@pytest.mark.parametrize("result", FAMILIES)
def test_statistics_of_the_initial_weights(result):
    """Of 2^14 numbers of each initialiser at full size, against those of the whole tensors."""
    golden, config = load("t3_init_stats")
    s = deltas.resolve(f"optimizer/{FAMILIES[result]}").settings
    model, generator = without_values(s), torch.Generator().manual_seed(0)
    named, compared = dict(model.named_parameters()), 0
    for name, names in theirs(12, apart=s.optim.o_bias is not None).items():
        p = named[name]
        for init, original in zip(p.parts, names if isinstance(names, list) else [names], strict=True):
            if original not in config["names"] or original.endswith("gains"):
                continue
            _, std, largest, zeros, numel = golden[f"{result}/stats"][config["names"].index(original)]
            x = init(torch.empty(SAMPLE), generator)
            assert abs((x == 0).double().mean() - zeros) < 1e-4, original
            assert abs(x.std().item() - std) <= (0.03 + 3 / math.sqrt(numel)) * std, original
            bounded = largest < 2.5 * std
            assert not bounded or abs(x.abs().max().item() / largest - 1) < 0.01, original
            assert bounded or not std or x.abs().max() > 3 * std, original
            compared += 1
    assert compared == 3 + 3 * 12


@pytest.mark.feature("model.init.signed_gains", "model.init.signed_gains.pairs_from")
@pytest.mark.parametrize("result", ["r30", "r44"])
def test_signs_of_the_initial_gains(result):
    golden, _ = load("t3_init_stats")
    s = deltas.resolve(f"optimizer/{FAMILIES[result]}").settings
    blocks = [SimpleNamespace(attn_norm=Norm(s), mlp_norm=Norm(s)) for _ in range(12)]
    fill_gains(blocks, s, lambda layer: torch.Generator().manual_seed(layer))
    alpha = s.model.init.signed_gains.alpha
    signs = np.stack([
        torch.stack([block.attn_norm.gain, block.mlp_norm.gain]).detach().sub(1).div(alpha).round().numpy()
        for block in blocks
    ])
    for gains in (signs, golden[f"{result}/block_gains"]):  # (layers, 2, D)
        assert (np.abs(gains) == 1).all() and (gains[:, 0] == -gains[:, 1]).all()
        plus = (gains[:, 1] > 0).reshape(6, 2, 6, 128).sum(-1)  # (pairs, layers of a pair, heads)
        opposite = (plus.sum(1) == 128).all(1)
        assert opposite.tolist() == [False] * 3 + [result == "r44"] * 3
        if result == "r44":  # half of the way to 64: a quarter of the variance, which is 32
            assert ((plus[3:] - 64) ** 2).mean() < 20 and (plus[3:] != 64).any()
        assert abs(gains[:, 1].mean()) < 0.04


@pytest.mark.feature("model.init.signed_gains.pairs_from")
def test_the_count_of_a_head_goes_halfway_to_its_half():
    """Of 128 signs about 64 +- sqrt(32) are +1 before that; the second layer has as many -1."""
    pair = paired_signs(1000, 128, torch.Generator().manual_seed(0))
    first, second = (signs.reshape(1000, 128) > 0 for signs in pair)
    assert torch.equal(first.sum(1), 128 - second.sum(1)) and not torch.equal(first, ~second)
    # a quarter of the variance, and the rounding
    assert 7 < (first.sum(1) - 64).double().square().mean() < 10


@pytest.mark.parametrize("result, loss", [("r36", math.log(50304)), ("r37", 10.955), ("r33", 11.004)])
def test_loss_before_the_first_step(result, loss):
    """At full width. Above the logarithm of the classes, here fewer, lies half the variance of the logits,
    which depends on the draw of the head by some 0.03 in the published runs."""
    sets = ("model.num_layers=1", "model.vocab_size=4096", "system.precision=float32")
    model = GPT(deltas.resolve(f"optimizer/{FAMILIES[result]}", sets=sets).settings)
    model.initialise(0)
    x = torch.randint(4096, (8, 65), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(x[:, :-1], x[:, 1:]).mean().item() - math.log(4096)
    assert found == pytest.approx(loss - math.log(50304), abs=1e-5 if result == "r36" else 0.06)


# ----- stream and validations

@pytest.mark.parametrize("case", "ABCD")
def test_positions_of_the_stream_at_shard_ends(case):
    golden, config = load("t3_loader")
    s = deltas.resolve(TRACK).settings
    lengths, arguments = config["cases"][case]["shard_lengths"], stream_arguments(s)
    del arguments["max_doc_len"]
    for rank in range(4):  # of the originals' four, of which each has two of our eight
        want = golden[f"{case}/world4/rank{rank}"]
        walk = positions(lengths, 2 * rank, **arguments | {"tokens_per_rank": 8, "wrap": True})
        found = [(shard, start) for epoch, shard, start in itertools.islice(walk, len(want) + 1)
                 if epoch == 0]
        assert found == [tuple(row) for row in want.tolist()]
    assert s.data.tokens_per_rank * 8 == 524_288 and not s.data.wrap


@pytest.mark.feature("validation.late")
def test_steps_of_the_validations():
    """As in the published log: every 125 steps, every 25 in the last tenth."""
    s = deltas.resolve(TRACK).settings
    steps = [i for i in range(s.schedule.steps + 1) if schedule.validates(s, i)]
    assert steps[:3] == [0, 125, 250] and steps[-15:] == [2875, *range(2925, 3251, 25)]
    off = deltas.resolve(TRACK, without=["validation.late"]).settings
    assert [i for i in range(2800, 3251) if schedule.validates(off, i)] == [2875, 3000, 3125, 3250]
    assert s.validation.tokens == 10_485_760 and s.validation.seq_len == 1024


# ----- schedules

@pytest.mark.feature("schedule.horizon", "schedule.matrix", "schedule.matrix.horizon",
                     "schedule.matrix.warmup_from_zero", "optim.muon.momentum_cooldown.until")
@pytest.mark.parametrize("result", [4, 10, 13, 20, 25, 36, 39, 46])
def test_learning_rates_and_momentum_at_every_step(result):
    """To the end of the schedules, before which the run may stop."""
    golden, key = load("t3_schedules_a")[0], f"r{result:02d}"
    steps = len(golden[f"{key}/lr/embed"])
    s = deltas.resolve(f"optimizer/{result}", sets=[f"schedule.steps={steps}"]).settings
    plans = schedule.plan(s)
    for kind, role, lr in (("embed", "embed", s.optim.embed.lr), ("hidden", "matrix", s.optim.muon.lr)):
        found = [lr * plan.of_role(role).lr_factor for plan in plans]
        assert np.allclose(found, golden[f"{key}/lr/{kind}"], rtol=1e-12, atol=0), kind
    for kind, lr in (("head", s.optim.lm_head.lr), ("vector", s.optim.scalar.lr)):
        assert lr == golden[f"{key}/lr/{kind}_at_0"]
    if f"{key}/mu" in golden:
        assert np.allclose([plan.momentum for plan in plans], golden[f"{key}/mu"], rtol=1e-12, atol=0)


def test_a_run_that_stops_before_its_horizon_has_the_learning_rates_of_the_whole():
    whole = deltas.resolve(TRACK, sets=["schedule.steps=3300"]).settings
    part = deltas.resolve(TRACK, sets=["schedule.steps=3250", "schedule.horizon=3300"]).settings
    rates = [[plan.lr_factor for plan in schedule.plan(s)] for s in (whole, part)]
    assert rates[0][:3250] == rates[1] and rates[1][-1] > 50 * rates[0][-1]
    for scale in ("tiny", "micro"):
        s = deltas.resolve(TRACK, sets=[], scale=scale).settings
        assert s.schedule.horizon is None
    with pytest.raises(deltas.UserError, match="schedule.horizon = 3000 is shorter than the run"):
        deltas.resolve(TRACK, sets=["schedule.horizon=3000"])


# ----- training

def test_eight_training_steps_of_the_baseline():
    golden, config = load("t3_traj_r36")
    s, model = small(TRACK, config, rows=1, length=32)
    fill(model, ours(lambda name: golden[f"init/{name}"], 2))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, plans = Optimizer(model, s), schedule.plan(deltas.resolve(TRACK).settings)
    for call, step in enumerate(config["step_index"]):
        x, y = (torch.from_numpy(golden[f"in/{k}"][call].astype(np.int64)) for k in ("tokens", "targets"))
        optimizer.expect(last=True)
        loss = model(x, y).sum()
        loss.backward()
        assert abs(loss.item() / golden["loss"][call] - 1) < 1e-9
        optimizer.accumulate()
        optimizer.step(plans[step])
        if call in (0, 7):
            for name, want in ours(lambda name: golden[f"param/{name}"][call // 7], 2).items():
                moved = np.abs(want - start[name].numpy()).max()
                got = model.get_parameter(name).detach().numpy()
                assert np.abs(got - want).max() <= 1e-7 * moved, (name, call)
