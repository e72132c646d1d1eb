"""Laws of the mixture of experts: the layer against a loop over tokens, causality, the bias on the choice,
Muon on stacks, FP8, accounting, settings."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import schedule
from kernels import experts
from kernels.newton_schulz import newton_schulz
from layers.moe import MoE, Router
from model import GPT
from optim import Optimizer
from settings import deltas
from step_hooks import end_step
from system.world import World
from common.errors import UserError
from small_experts import (
    ROUTINGS, SMALL, build, close, fill, flood, layer, moe, noise, settings, starve, tokens, train_step
)


# ----- the layer, token by token

def mlp(x, up, down):
    return down @ F.relu(up @ x).square()


def token_choice(how, biased):
    """Experts of one token, written as the papers say it: sums of the two best of a group, best groups, best
    experts."""
    pool = list(range(how.num_experts))
    if how.num_expert_groups > 1:
        size = how.num_experts // how.num_expert_groups
        worth = [sum(sorted(biased[g * size:(g + 1) * size].tolist())[-2:])
                 for g in range(how.num_expert_groups)]
        kept = sorted(range(how.num_expert_groups), key=lambda g: -worth[g])[:how.num_limited_groups]
        pool = [e for e in pool if e // size in kept]
    return sorted(pool, key=lambda e: -biased[e].item())[:how.top_k]


def by_tokens(m, x):
    """(output (R, T, D), rows of each expert) of an MoE `m` by a loop over tokens; autograd gives the
    gradients."""
    how, out, counts = m.router.moe, [], [0] * m.num_experts
    for token in x.flatten(0, 1):
        logits = m.router.weight @ token
        scores = torch.sigmoid(logits) if how.score_func == "sigmoid" else logits.exp() / logits.exp().sum()
        on_logits = how.balance.rule == "quantile"
        chosen = token_choice(how, ((logits if on_logits else scores) + m.router.bias).detach())
        total = sum(scores[e] for e in chosen) if how.route_norm else 1.0
        y = mlp(token, m.shared.c_fc, m.shared.c_proj) if m.shared is not None else 0.0
        for e in chosen:
            counts[e] += 1
            y = y + how.route_scale * scores[e] / total * mlp(token, m.c_fc[e], m.c_proj[e])
        out.append(y)
    return torch.stack(out).view(x.shape), counts


def outputs_and_gradients(m, x, forward):
    """{name: value} of one forward and backward; the loss is a fixed random sum of the outputs."""
    x = x.clone().requires_grad_()
    m.zero_grad()
    y = forward(x)
    (y * noise(*y.shape, seed=5, dtype=y.dtype)).sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in m.named_parameters()}}


SKEWS = {
    "spread": lambda m: None, "an_empty_expert": lambda m: starve(m, 3), "all_on_one": lambda m: flood(m, 5)
}


@pytest.mark.feature("model.mlp.moe")
@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_the_layer_equals_a_loop_over_tokens(name, skew):
    """Outputs, loads and all gradients; padded, in float64; 88 tokens, so that an expert with all of them has
    two blocks."""
    m, x = layer(*ROUTINGS[name]), noise(2, 44, 48)
    SKEWS[skew](m)
    expected = outputs_and_gradients(m, x, lambda x: by_tokens(m, x)[0])
    found = outputs_and_gradients(m, x, lambda x: m(x, [], False))
    assert all(close(found[key], expected[key], 1e-12) for key in expected)
    counts = by_tokens(m, x)[1]
    assert m.router.stats[:8].tolist() == counts
    assert skew != "an_empty_expert" or (
        counts[3] == 0 and not found["c_fc"][3].any() and not found["c_proj"][3].any()
    )
    assert skew != "all_on_one" or (counts[5] == 88 and found["c_fc"][5].any())


@pytest.mark.parametrize("skew", SKEWS)
def test_grouped_equals_padded_and_the_loop_in_float32(skew):
    m, x = layer("system.experts=grouped", precision="float32"), noise(2, 44, 48, dtype=torch.float32)
    other = layer("system.experts=padded", precision="float32")
    for each in (m, other):
        SKEWS[skew](each)
    expected = outputs_and_gradients(m, x, lambda x: by_tokens(m, x)[0])
    for each in (m, other):
        found = outputs_and_gradients(each, x, lambda x: each(x, [], False))
        assert all(close(found[key], expected[key], 3e-6) for key in expected)


@pytest.mark.parametrize("backend", experts.BACKENDS)
def test_no_tokens_give_no_rows_and_zero_gradients(backend):
    """A process may get no row for its experts."""
    p = experts.plan(torch.zeros(0, 2, dtype=torch.int64), 4, backend)
    weight = torch.randn(4, 8, 16, requires_grad=True)
    x = torch.zeros(0, 16, requires_grad=True)
    y = experts.combine(experts.grouped_linear(experts.gather(x, p), weight, p), torch.zeros(0, 2), p)
    y.sum().backward()
    assert (
        y.shape == (0, 8) and x.grad.shape == (0, 16) and torch.equal(weight.grad, torch.zeros_like(weight))
    )


@pytest.mark.parametrize("backend", experts.BACKENDS)
def test_every_choice_has_its_own_place_in_the_order_of_tokens(backend):
    """Also where an expert's rows end with a block, exceed it by one, or are none."""
    rows = [experts.BLOCK, experts.BLOCK + 1, 0, 3, 2 * experts.BLOCK]
    index = torch.cat([torch.full((n,), e) for e, n in enumerate(rows)])
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))].view(-1, 2)
    p = experts.plan(index, len(rows), backend)
    places = p.places.flatten()
    assert p.counts.tolist() == rows and len(places.unique()) == index.numel()
    assert torch.equal(p.source[p.places], torch.arange(len(index))[:, None].expand_as(index))
    for e in range(len(rows)):
        mine = places[index.flatten() == e]
        assert torch.equal(mine, mine.sort().values)
        assert p.owner is None or (p.owner[mine // experts.BLOCK] == e).all()
        assert p.owner is not None or (mine < p.ends[e]).all() and (mine >= p.ends[e] - rows[e]).all()


@pytest.mark.feature("model.mlp.moe", "model.mlp.moe.route_norm")
def test_identical_experts_with_gates_of_sum_one_are_the_dense_mlp():
    m, x = layer(*ROUTINGS["normalised"]), noise(2, 24, 48)
    with torch.no_grad():
        m.c_fc.copy_(m.c_fc[0].clone().expand_as(m.c_fc))
        m.c_proj.copy_(m.c_proj[0].clone().expand_as(m.c_proj))
    dense = F.relu(x @ m.c_fc[0].T).square() @ m.c_proj[0].T
    shared = F.relu(x @ m.shared.c_fc.T).square() @ m.shared.c_proj.T
    assert close(m(x, [], False), shared + 2.5 * dense, 1e-13)


@pytest.mark.parametrize("name", ["sigmoid", "softmax_normalised", "groups", "quantile"])
def test_renumbering_the_experts_changes_nothing(name):
    m, x = layer(*ROUTINGS[name]), noise(2, 24, 48)
    turned = layer(*ROUTINGS[name])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    if name == "groups":  # groups as a whole, and experts within them
        order = torch.tensor([5, 4, 0, 1, 7, 6, 3, 2])
    with torch.no_grad():
        for p in (turned.c_fc, turned.c_proj, turned.router.weight, turned.router.bias):
            p.copy_(p[order].clone())
    assert close(turned(x, [], False), m(x, [], False), 1e-13)
    assert (
        torch.equal(turned.router.stats[:8], m.router.stats[:8][order])
        and len(m.router.stats[:8].unique()) > 3
    )


# ----- what may look where

@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("backend, tolerance", [("padded", 0.0), ("grouped", 1e-6)])
def test_causality_nothing_before_a_changed_token_moves(name, backend, tolerance):
    """Bit for bit where rows have fixed blocks; in training and evaluation, with the bias as it is within a
    step."""
    model = build(*ROUTINGS[name], f"system.experts={backend}", precision="float32")
    x = tokens()
    one, all_later = x.clone(), x.clone()
    one[0, 13] = (one[0, 13] + 1) % 1256
    all_later[0, 13:] = tokens(seed=2)[0, 13:]
    for train in (True, False):
        model.train(train)
        a = model(x)
        for changed in (one, all_later):
            for router in model.routers():
                router.stats.zero_()
            b = model(changed)
            before = torch.cat([a[0, :13], a[1]]), torch.cat([b[0, :13], b[1]])  # nothing joins across rows
            assert torch.equal(*before) if tolerance == 0 else close(*before, tolerance)
            assert not torch.allclose(a[0, 13:], b[0, 13:])


def test_the_causality_law_has_teeth_later_tokens_change_loads_and_places():
    model, x = build(precision="float32"), tokens()
    model(x)
    first = [router.stats[:8].clone() for router in model.routers()]
    x[0, 13:] = tokens(seed=2)[0, 13:]
    for router in model.routers():
        router.stats.zero_()
    model(x)
    assert all(not torch.equal(a, router.stats[:8]) for a, router in zip(first, model.routers()))


# ----- the bias

@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_bias_changes_who_is_chosen_but_not_the_gates_and_gets_no_gradient(score):
    router, x = fill(Router(settings(f"model.mlp.moe.score_func={score}"))), noise(4, 64, 48)
    scores = x.flatten(0, 1) @ router.weight.T
    scores = torch.sigmoid(scores) if score == "sigmoid" else scores.softmax(-1)
    router.bias.requires_grad_()
    chosen, gates, _ = router(x)
    assert torch.allclose(gates, scores.gather(1, chosen), rtol=1e-12, atol=0)
    gates.sum().backward()
    assert (
        router.bias.grad is None and router.weight.grad.any()
        and "bias" not in dict(router.named_parameters())
    )
    router.bias = torch.zeros_like(router.bias)
    plain, _, _ = router(x)
    moved = (plain.sort().values != chosen.sort().values).any(-1)
    assert 0.1 < moved.double().mean() < 0.9


def test_a_checkpoint_keeps_the_bias():
    model, x = build(), tokens()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert {name.split(".")[-1] for name in state if "router" in name} == {"weight", "bias"}
    other = GPT(model.settings)
    other.initialise(1)
    other.load_state_dict(state)
    assert torch.equal(other.eval()(x), model.eval()(x)) and other.routers()[0].bias.any()
    whole = model.full_state_dict()
    assert set(whole) == set(state) and all(torch.equal(whole[name], state[name]) for name in state)
    for router in other.routers():
        router.bias.zero_()
    assert not torch.allclose(other(x), model(x))


def test_initialise_forgets_biases_and_loads():
    model = build()
    model(tokens())
    end_step(model, 48)
    assert all(router.tokens_per_expert.any() and router.bias.any() for router in model.routers())
    model.initialise(0)
    assert not any(b.any() for router in model.routers() for b in router.buffers())


# ----- Muon on stacks

@pytest.mark.feature("optim.muon.update_idle_experts")
@pytest.mark.parametrize("update_idle_experts, slots", [
    (False, ()), (True, ()),
    # these move a matrix once more after its step
    (False, ("optim.muon.hyperball=true", "model.init.zero_proj=false", "optim.muon.weight_decay=0"))
])
def test_an_expert_without_rows_moves_only_if_asked_although_its_momentum_is_there(
    update_idle_experts, slots
):
    model = build(f"optim.muon.update_idle_experts={str(update_idle_experts).lower()}", *slots)
    s = model.settings
    for router in model.routers():
        router.bias.zero_()
    optimizer = Optimizer(model, s)
    train_step(optimizer, model, s, 0)
    starve(model.blocks[2].mlp, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step(optimizer, model, s, 1)
    first, second = (router.tokens_per_expert for router in model.routers())
    assert second[3] == 0 and (first > 0).all()
    for kind in ("c_fc", "c_proj"):
        stacks = [f"blocks.{i}.mlp.{kind}" for i in (1, 2)]
        moved = torch.cat([(model.get_parameter(name) != before[name]).flatten(1).any(1) for name in stacks])
        assert moved.tolist() == [True] * 11 + [update_idle_experts] + [True] * 4
        bank = next(b for b in optimizer.banks if b.members[0][0] == stacks[0])
        assert bank.state["momentum_buffer"][:16].flatten(1).any(1).all()


def test_the_experts_of_a_stack_are_orthogonalised_one_by_one():
    model = build()
    s = model.settings
    optimizer = Optimizer(model, s)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = tokens(8, 65)
    optimizer.expect(last=True)
    model(x[:, :-1], x[:, 1:]).mean().backward()
    optimizer.accumulate()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    end_step(model, 512)
    plan = schedule.plan(s)[0]
    optimizer.step(plan)
    for name in ("blocks.1.mlp.c_fc", "blocks.2.mlp.c_proj"):
        for e in range(8):
            g = gradients[name][e]
            ahead = g + plan.momentum * g  # of the first step: the buffer is the gradient
            step = newton_schulz(
                ahead, dtype=torch.float64, norm_dtype=torch.float64, form=s.numerics.newton_schulz_form
            )
            factor = s.optim.muon.lr * plan.lr_factor * math.sqrt(max(1, g.size(0) / g.size(1)))
            expected = before[name][e] - factor * step
            assert torch.allclose(model.get_parameter(name)[e], expected, rtol=0, atol=1e-12)


@pytest.mark.feature("optim.router")
def test_the_router_is_trained_by_adamw_in_its_own_group():
    s = settings(SMALL)
    optimizer = Optimizer(GPT(s), s)
    bank = next(b for b in optimizer.banks if b.role == "router")
    assert bank.rule.name == "adamw" and {name for name, _ in bank.members} == {
        f"blocks.{i}.mlp.router.weight" for i in (1, 2)
    }


# ----- FP8

@pytest.mark.feature("numerics.fp8_experts")
def test_fake_fp8_gives_values_of_e4m3_with_one_scale_per_row():
    x = noise(6, 200, dtype=torch.float32) ** 7 * torch.tensor([1e-6, 1e-2, 1.0, 30.0, 1e4, 0.0])[:, None]
    y = experts.fake_fp8(x)
    scale = 448 / x[:5].abs().amax(-1, keepdim=True)
    eight = y[:5] * scale
    assert torch.allclose(eight.to(torch.float8_e4m3fn).float(), eight, rtol=1e-6, atol=0)
    error, normal = (y[:5] - x[:5]).abs(), (x[:5] * scale).abs() >= 2.0 ** -6
    assert (error[normal] <= 2.0 ** -4 * 1.000001 * x[:5].abs()[normal]).all() and error.max() > 0
    assert (error * scale)[~normal].max() <= 2.0 ** -10 * 1.000001  # half of the smallest step
    assert torch.equal(y[5], x[5]) and torch.allclose(y.abs().amax(-1), x.abs().amax(-1), rtol=1e-6, atol=0)


def test_the_gradient_passes_fake_fp8_as_it_is():
    x, g = noise(4, 16, dtype=torch.float32).requires_grad_(), noise(4, 16, seed=1, dtype=torch.float32)
    experts.fake_fp8(x).backward(g)
    assert torch.equal(x.grad, g)


@pytest.mark.feature("numerics.fp8_experts")
def test_fp8_experts_round_in_training_only():
    """e4m3 keeps 3 bits of mantissa: products are off by a few per cent."""
    def outputs(*sets):
        m, x = layer(*sets, precision="record"), noise(2, 24, 48, dtype=torch.bfloat16)
        return m(x, [], False).float(), m.eval()(x, [], False).float()

    exact, exact_eval = outputs()
    rounded, rounded_eval = outputs("numerics.fp8_experts=true")
    error = (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0.002 < error < 0.1 and torch.equal(rounded_eval, exact_eval)


def test_fp8_experts_asked_for_at_a_cpu_scale_round_there_too():
    exact, rounded = (layer(*sets, precision="float32") for sets in ((), ("numerics.fp8_experts=true",)))
    x = noise(2, 24, 48, dtype=torch.float32)
    a, b = exact(x, [], False), rounded(x, [], False)
    assert 0.002 < (a - b).square().mean().sqrt() / a.square().mean().sqrt() < 0.1


# ----- accounting

SHAPES = {"variants/moe8k1s": (8, 1, 1536, 1536), "variants/moe8k2s": (8, 2, 1024, 1024),
          "variants/moe32k4half": (32, 4, 256, 512), "variants/moe32k4v3": (32, 4, 512, 1024)}


@pytest.mark.parametrize("ref, shape", SHAPES.items())
def test_counts_of_all_and_of_active_parameters_and_flops_at_full_scale(ref, shape):
    """As many active ones as the dense parent up to the routers where k hidden + shared is its width,
    3072."""
    count, k, hidden, shared = shape
    with torch.device("meta"):
        model, dense = (GPT(deltas.resolve(r).settings) for r in (ref, "short/8"))
    routers, layers = 11 * count * 768, 11  # the first of twelve layers is dense
    less = layers * 2 * 768 * (3072 - k * hidden - shared)
    assert model.num_active() == dense.num_parameters() + routers - less
    assert less == 0 or ref == "variants/moe32k4half"
    assert model.num_parameters() == model.num_active() + layers * (count - k) * 2 * 768 * hidden
    assert model.flops_per_token() == dense.flops_per_token() + 6 * (routers - less)
    assert sum(p.numel() for p in model.parameters()) == model.num_parameters()


# ----- settings

BAD = [
    (["top_k=8"], "top_k = 8 of model.mlp.moe.num_experts = 8"),
    (["top_k=0"], "at least one must be chosen"),
    (["num_experts=1", "top_k=1"], "one left"),
    (["hidden=0"], "hidden = 0"),
    (["shared=-1"], "at least 1 and 0"),
    (["route_norm=true", "top_k=1"], "the router gets no gradient: switch it off"),
    (["num_expert_groups=3"], "groups = 3 does not divide 8 experts"),
    (["num_expert_groups=0"], "groups = 0"),
    (["num_expert_groups=4", "num_limited_groups=5"], "must lie between 1 and num_expert_groups = 4"),
    (["num_expert_groups=4", "num_limited_groups=1", "top_k=3"], "hold fewer than top_k = 3"),
    (["num_expert_groups=8", "num_limited_groups=2"], "a group needs two experts"),
    (["dense_layers=[0,1,2,3,4,5,6,7,8,9,10,11]"], "leaves no layer with experts"),
    (["dense_layers=[12]"], "names layer 12: the model has layers 0 to 11"),
    (["dense_layers=[1,1]"], "names a layer twice"),
    (
        ["num_expert_groups=4", "num_limited_groups=2", "balance.rule=quantile"],
        "choose rule proportional or sign, or set num_expert_groups=1",
    ),
    (["balance.freeze_frac=1"], "freeze_frac = 1.0: must lie in 0 <= x < 1"),
    (["balance.freeze_frac=-0.1"], "must lie in 0 <= x < 1"),
    (["route_scale=0"], "route_scale = 0"),
    (["balance.rate=0"], "balance.rate = 0"),
    (["balance.rate=1.5"], "balance.rate = 1.5: must be at most 1, the largest score"),
    (["balance.rate=inf"], "expected a number that is finite"),
    (["seq_aux_loss=-1"], "seq_aux_loss = -1"),
    (["z_loss=-1"], "z_loss = -1"),
    (["model.bias=true"], "has no bias vectors: set model.bias=false"),
    (["system.expert_parallel=true", "system.reduction=ordered"], "leave system.expert_parallel off"),
    (["system.expert_parallel=true", "system.comm=allreduce_updates"], "choose another system.comm"),
]


@pytest.mark.parametrize("sets, message", BAD, ids=[" ".join(sets) for sets, _ in BAD])
def test_each_contradiction_is_one_clear_line(sets, message):
    with pytest.raises(UserError) as error:
        settings(*(change if change.startswith(("model.", "system.")) else moe(change)[0] for change in sets))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        "system.expert_parallel=true", "system.experts=padded", "optim.router.lr=0.1",
        "optim.muon.update_idle_experts=true"
    ],
)
def test_settings_of_experts_need_experts(change):
    with pytest.raises(UserError, match="needs model.mlp.moe"):
        settings(change, ref="short/8")


def test_quantile_goes_with_all_groups_open():
    for groups, kept in ((1, 1), (4, 4)):
        s = settings(*moe(
            "balance.rule=quantile", f"num_expert_groups={groups}", f"num_limited_groups={kept}"))
        assert s.model.mlp.moe.balance.rule == "quantile"


def test_processes_that_do_not_divide_the_experts_are_refused_before_they_know_each_other(monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", lambda *_: pytest.fail("started"))
    for name, value in dict(
        RANK=0, LOCAL_RANK=0, WORLD_SIZE=8, MASTER_ADDR="127.0.0.1", MASTER_PORT=29500
    ).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="8 processes do not divide 12 experts: change one of them"):
        World(settings("system.expert_parallel=true", "system.device=cpu", "model.mlp.moe.num_experts=12"))


@pytest.mark.feature("system.expert_parallel")
def test_processes_that_do_not_divide_the_experts_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    assert len(MoE(settings("system.expert_parallel=true")).c_fc) == 1
    with pytest.raises(UserError, match="8 processes do not divide 12 experts: change one of them"):
        MoE(settings("system.expert_parallel=true", "model.mlp.moe.num_experts=12"))


@pytest.mark.parametrize("sets, precision, compiled, message", [
    ((), "float64", False, "has no float64"), ((), "float32", True, "cannot be compiled in float32"),
    (moe("hidden=66"), "float32", False, "needs rows of a multiple of 16 bytes, not 66 x 4")])
def test_grouped_where_it_cannot_is_refused_and_auto_takes_padded(sets, precision, compiled, message):
    x = noise(2, 4, 48, dtype=getattr(torch, precision))
    with pytest.raises(UserError, match=f"system.experts=grouped: grouped_mm {message}; use padded"):
        layer(*sets, "system.experts=grouped", precision=precision)(x, [], compiled)
    padded, auto = (
        layer(*sets, f"system.experts={name}", precision=precision) for name in ("padded", "auto")
    )
    assert torch.equal(padded(x, [], compiled), auto(x, [], compiled))
