"""Laws of the mixture of experts: the layer against a loop over tokens, routing, balancing, Muon on stacks,
processes."""

import json
import math
import multiprocessing
import os
import socket
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import deltas
from system import command_line
import schedule
import train_gpt
from kernels import experts
from kernels.newton_schulz import newton_schulz
from layers.moe import MoE, Router
from model import GPT
from optim import Optimizer
from step_hooks import begin_step, end_step
from system.comm import communication
from system.hooks import hooks_of
from system.dry_run import print_plan
from system.world import World
from runlog import read_chain
from common.errors import UserError

REF = "variants/moe8k2s"
SMALL = "model.num_layers=3"  # two layers with experts behind a dense one
GROUPS = ("groups=4", "groups_kept=2")
RULES = ("proportional", "sign", "quantile")


def moe(*changes):
    return tuple(f"model.mlp.moe.{change}" for change in changes)


ROUTINGS = {  # every way to choose and to weigh experts, and to balance them
    "sigmoid": (),
    "top1": moe("top_k=1"),
    "normalised": moe("normalise=true", "gate_scale=2.5"),
    "softmax": moe("score=softmax"),
    "softmax_normalised": moe("score=softmax", "normalise=true"),
    "groups": moe(*GROUPS),
    "groups_of_softmax": moe(*GROUPS, "score=softmax"),
    "sign": moe("balance.rule=sign"),
    "quantile": moe("balance.rule=quantile"),
    "quantile_of_softmax": moe("balance.rule=quantile", "score=softmax"),
    "losses": moe("sequence_loss=0.3", "z_loss=0.2"),
    "four_without_shared": moe("top_k=4", "shared=0"),
}


def settings(*sets, ref=REF, precision="float64", scale="micro", **changes):
    return deltas.resolve(ref, scale=scale, sets=[f"system.precision={precision}", *sets], **changes).settings


def fill(module, std=0.3):
    """Every parameter random; every bias on the choice random and far from zero, as balancing may have left
    it."""
    for name, p in sorted(module.named_parameters()):
        p.data.copy_(
            std
            * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
        )
    for name, b in module.named_buffers():
        if name.split(".")[-1] in ("bias", "tally", "load"):
            b.zero_()
        if name.split(".")[-1] == "bias":
            b += 0.3 * torch.randn(
                b.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64
            ).to(b.dtype)
    return module


def layer(*sets, **changes):
    return fill(MoE(settings(*sets, **changes)))


def build(*sets, **changes):
    """A model of three layers whose parameters are all random and non-zero."""
    model = GPT(settings(SMALL, *sets, **changes))
    model.initialise(0)
    return fill(model)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tokens(rows=2, length=24, seed=1):
    return torch.randint(1256, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance):
    """Equal up to `tolerance` of b's largest element."""
    return (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-30)


# ----- the layer, token by token

def mlp(x, up, down):
    return down @ F.relu(up @ x).square()


def token_choice(how, biased):
    """Experts of one token, written as the papers say it: sums of the two best of a group, best groups, best
    experts."""
    pool = list(range(how.experts))
    if how.groups > 1:
        size = how.experts // how.groups
        worth = [sum(sorted(biased[g * size:(g + 1) * size].tolist())[-2:]) for g in range(how.groups)]
        kept = sorted(range(how.groups), key=lambda g: -worth[g])[:how.groups_kept]
        pool = [e for e in pool if e // size in kept]
    return sorted(pool, key=lambda e: -biased[e].item())[:how.top_k]


def by_tokens(m, x):
    """(output (R, T, D), rows of each expert) of an MoE `m` by a loop over tokens; autograd gives the
    gradients."""
    how, out, counts = m.router.moe, [], [0] * m.experts
    for token in x.flatten(0, 1):
        logits = m.router.weight @ token
        scores = torch.sigmoid(logits) if how.score == "sigmoid" else logits.exp() / logits.exp().sum()
        on_logits = how.balance.rule == "quantile"
        chosen = token_choice(how, ((logits if on_logits else scores) + m.router.bias).detach())
        total = sum(scores[e] for e in chosen) if how.normalise else 1.0
        y = mlp(token, m.shared.up, m.shared.down) if m.shared is not None else 0.0
        for e in chosen:
            counts[e] += 1
            y = y + how.gate_scale * scores[e] / total * mlp(token, m.up[e], m.down[e])
        out.append(y)
    return torch.stack(out).view(x.shape), counts


def outputs_and_gradients(m, x, forward):
    """{name: value} of one forward and backward; the loss is a fixed random sum of the outputs."""
    x = x.clone().requires_grad_()
    m.zero_grad()
    y = forward(x)
    (y * noise(*y.shape, seed=5, dtype=y.dtype)).sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in m.named_parameters()}}


def starve(m, expert):
    m.router.bias[expert] -= 100.0


def flood(m, expert):
    m.router.bias[expert] += 100.0


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
    assert m.router.tally[:8].tolist() == counts
    assert skew != "an_empty_expert" or (
        counts[3] == 0 and not found["up"][3].any() and not found["down"][3].any()
    )
    assert skew != "all_on_one" or (counts[5] == 88 and found["up"][5].any())


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


@pytest.mark.feature("model.mlp.moe", "model.mlp.moe.normalise")
def test_identical_experts_with_gates_of_sum_one_are_the_dense_mlp():
    m, x = layer(*ROUTINGS["normalised"]), noise(2, 24, 48)
    with torch.no_grad():
        m.up.copy_(m.up[0].clone().expand_as(m.up))
        m.down.copy_(m.down[0].clone().expand_as(m.down))
    dense = F.relu(x @ m.up[0].T).square() @ m.down[0].T
    shared = F.relu(x @ m.shared.up.T).square() @ m.shared.down.T
    assert close(m(x, [], False), shared + 2.5 * dense, 1e-13)


@pytest.mark.parametrize("name", ["sigmoid", "softmax_normalised", "groups", "quantile"])
def test_renumbering_the_experts_changes_nothing(name):
    m, x = layer(*ROUTINGS[name]), noise(2, 24, 48)
    turned = layer(*ROUTINGS[name])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    if name == "groups":  # groups as a whole, and experts within them
        order = torch.tensor([5, 4, 0, 1, 7, 6, 3, 2])
    with torch.no_grad():
        for p in (turned.up, turned.down, turned.router.weight, turned.router.bias):
            p.copy_(p[order].clone())
    assert close(turned(x, [], False), m(x, [], False), 1e-13)
    assert (
        torch.equal(turned.router.tally[:8], m.router.tally[:8][order])
        and len(m.router.tally[:8].unique()) > 3
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
                router.tally.zero_()
            b = model(changed)
            before = torch.cat([a[0, :13], a[1]]), torch.cat([b[0, :13], b[1]])  # nothing joins across rows
            assert torch.equal(*before) if tolerance == 0 else close(*before, tolerance)
            assert not torch.allclose(a[0, 13:], b[0, 13:])


def test_the_causality_law_has_teeth_later_tokens_change_loads_and_places():
    model, x = build(precision="float32"), tokens()
    model(x)
    first = [router.tally[:8].clone() for router in model.routers()]
    x[0, 13:] = tokens(seed=2)[0, 13:]
    for router in model.routers():
        router.tally.zero_()
    model(x)
    assert all(not torch.equal(a, router.tally[:8]) for a, router in zip(first, model.routers()))


# ----- the bias

@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_bias_changes_who_is_chosen_but_not_the_gates_and_gets_no_gradient(score):
    router, x = fill(Router(settings(f"model.mlp.moe.score={score}"))), noise(4, 64, 48)
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
    whole = model.whole_state()
    assert set(whole) == set(state) and all(torch.equal(whole[name], state[name]) for name in state)
    for router in other.routers():
        router.bias.zero_()
    assert not torch.allclose(other(x), model(x))


def test_initialise_forgets_biases_and_loads():
    model = build()
    model(tokens())
    end_step(model, 48)
    assert all(router.load.any() and router.bias.any() for router in model.routers())
    model.initialise(0)
    assert not any(b.any() for router in model.routers() for b in router.buffers())


# ----- balancing

def balanced(router, steps):
    """MaxVio of each step of a router alone, on fresh Gaussian tokens whose last channel is 1: its weights
    are offsets."""
    n, k, seen = router.moe.experts, router.moe.top_k, []
    for i in range(steps):
        x = noise(16, 64, 48, seed=i, dtype=torch.float32)
        x[..., -1] = 1.0
        router.tally.zero_()
        with torch.no_grad():
            chosen, _, _ = router(x, 1024 // 8)
        load = torch.bincount(chosen.flatten(), minlength=n)
        router.tally[:n] += load
        router.settle(router.tally.clone(), len(chosen))
        assert torch.equal(router.load.long(), load) and load.sum() == 1024 * k
        seen.append((load.max() / load.double().mean() - 1).item())
    return seen


def skewed(*sets, **changes):
    router = Router(settings(*moe(*sets), precision="float32", **changes))
    n = router.moe.experts
    with torch.no_grad():
        router.weight.copy_(noise(n, 48, seed=3) / math.sqrt(48))
        router.weight[:, -1] = torch.linspace(-2.5, 2.5, n)
    return router


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("ref", ["variants/moe8k2s", "variants/moe32k4half"])
def test_each_rule_balances_a_skewed_router_within_150_steps(ref, name):
    seen = balanced(skewed(f"balance.rule={name}", "balance.rate=0.01", ref=ref), 150)
    assert seen[0] > 1.5 and max(seen[-5:]) < 0.5


SIZES = {8: 2, 32: 4, 64: 8}  # experts: top_k
UNBALANCED = {8: 1.3, 32: 2.0, 64: 2.0}  # the first step's MaxVio is above this


def offset(n, k, spread, *sets):
    """A router of n experts whose logits have unit variance and offsets from -spread to spread."""
    router = Router(settings(*moe(f"experts={n}", f"top_k={k}", *sets), precision="float32"))
    with torch.no_grad():
        router.weight.copy_(noise(n, 48, seed=3) / math.sqrt(48))
        router.weight[:, -1] = torch.linspace(-spread, spread, n)
    return router


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("n, k", SIZES.items())
def test_the_default_rate_balances_either_score_at_any_number_of_experts(n, k, name, score):
    seen = balanced(offset(n, k, 1.0, f"score={score}", f"balance.rule={name}"), 150)
    assert seen[0] > UNBALANCED[n] and max(seen[-5:]) < 0.5


@pytest.mark.parametrize("n, k", SIZES.items())
def test_the_default_rule_balances_softmax_scores_far_apart(n, k):
    seen = balanced(offset(n, k, 2.5, "score=softmax"), 150)
    assert seen[0] > 2.4 and max(seen[-5:]) < 0.6


@pytest.mark.feature("model.mlp.moe.balance")
def test_without_a_rule_a_skewed_router_stays_skewed():
    router = skewed(without=["model.mlp.moe.balance"])
    assert min(balanced(router, 20)) > 1.5 and not router.bias.any()


@pytest.mark.feature("model.mlp.moe.balance")
def test_sign_and_proportional_rules_move_the_bias_by_their_formulas():
    load = torch.tensor([10.0, 0, 20, 6, 7, 5, 8, 8], dtype=torch.float64)  # mean 8
    formulas = {
        "sign": [-1, 1, -1, 1, 1, 1, 0, 0],
        "proportional": [-0.25, 1, -1.5, 0.25, 0.125, 0.375, 0, 0],
    }
    for name, expected in formulas.items():
        for score, unit in (("sigmoid", 1), ("softmax", 4 / 8)):
            router = Router(settings(*moe(f"balance.rule={name}", "balance.rate=0.03", f"score={score}")))
            for _ in range(2):
                router.settle(torch.cat([load, torch.zeros(9, dtype=torch.float64)]), 32)
            bias = 2 * 0.03 * unit * torch.tensor(expected, dtype=torch.float64)
            assert torch.allclose(router.bias, bias, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["sign", "proportional"])
def test_a_router_of_16_bits_keeps_a_bias_of_32(name):
    """Steps of 0.001 on a bias of 1, which bfloat16 would lose; and the choice sees it: two equal scores,
    bias 0.001 apart."""
    router = Router(settings(*moe(f"balance.rule={name}", "balance.rate=0.001"), "numerics.router=bfloat16",
                             precision="record"))
    assert router.weight.dtype == torch.bfloat16 and router.bias.dtype == torch.float32
    router.bias.fill_(1.0)
    load = torch.tensor([16.0] + 7 * [0], dtype=torch.float64)  # 7 and -1 times the mean away from it
    for _ in range(10):
        router.settle(torch.cat([load, torch.zeros(9, dtype=torch.float64)]), 8)
    down, up = (0.07, 0.01) if name == "proportional" else (0.01, 0.01)
    assert torch.allclose(router.bias - 1, torch.tensor([-down] + 7 * [up]), rtol=1e-3)
    router.weight.data.zero_()
    router.bias.copy_(1 + 0.001 * torch.tensor([0.0, 0, 1, 0, 0, 2, 0, 0]))
    assert set(router(noise(1, 4, 48, dtype=torch.bfloat16))[0].flatten().tolist()) == {2, 5}


def test_a_router_of_16_bits_counts_long_sequences_for_its_loss():
    """512 tokens on the same two experts, which bfloat16 cannot count."""
    router = Router(
        settings("model.mlp.moe.sequence_loss=1.0", "numerics.router=bfloat16", precision="record")
    )
    router.weight.data.zero_()
    router.weight.data[:2, -1] = 8.0
    x = torch.zeros(1, 512, 48, dtype=torch.bfloat16)
    x[..., -1] = 1.0
    expected = sequence_loss(torch.sigmoid(x[0].double() @ router.weight.T.double()), 2, 1.0)
    assert torch.allclose(router(x)[2].double(), expected.double(), rtol=0.01)


@pytest.mark.feature("model.mlp.moe.balance.freeze_frac")
@pytest.mark.parametrize("name", RULES)
def test_the_bias_stands_still_over_the_last_part_of_a_run(name):
    s = settings(SMALL, *moe(f"balance.rule={name}", "balance.freeze_frac=0.3"), "schedule.steps=10")
    plans = schedule.plan(s)
    assert [plan.moves_bias for plan in plans] == [True] * 7 + [False] * 3
    model = GPT(s)
    model.initialise(0)
    run = SimpleNamespace(
        s=s, model=model, hooks=hooks_of(model), compiled=model, optimizer=Optimizer(model, s),
        ranks_per_microbatch=8, corpus=SimpleNamespace(bos=0),
        world=SimpleNamespace(total=lambda tally: tally)
    )
    for step, moves in ((6, True), (7, False), (9, False)):
        bias = torch.stack([router.bias.clone() for router in model.routers()])
        inputs = tokens(16, 64, seed=step).view(8, 2, 64)
        train_gpt.train_step(run, plans[step], inputs, inputs.roll(1, -1), [2] * 8)
        assert torch.equal(bias, torch.stack([router.bias for router in model.routers()])) != moves
        assert all(router.load.sum() == 2 * 1024 for router in model.routers())


def test_the_plan_says_from_which_step_on_the_biases_stand_still(capsys):
    for sets, line in ((["model.mlp.moe.balance.freeze_frac=0.034"], True), ([], False)):
        s = deltas.resolve("variants/4", scale="tiny", sets=sets)
        print_plan(s)
        assert ("the routers' biases stand still from step 170 on" in capsys.readouterr().out) == line
    assert s.settings.schedule.steps == 176


def test_without_freeze_frac_the_bias_moves_to_the_end_and_without_balance_never():
    assert all(plan.moves_bias for plan in schedule.plan(settings()))
    assert not any(plan.moves_bias for plan in schedule.plan(settings(without=["model.mlp.moe.balance"])))
    assert not any(plan.moves_bias for plan in schedule.plan(settings(ref="short/8")))


def test_scores_that_underflow_give_no_nan():
    """sigmoid(-104) is 0 in float32: gates, entropy, losses and their gradients stay finite."""
    router = Router(settings(*moe("normalise=true", "sequence_loss=0.1", "z_loss=0.1"), precision="float32"))
    router.weight.data.fill_(-1000.0)
    x = torch.ones(2, 24, 48, requires_grad=True)
    chosen, gates, penalty = router(x)
    (gates.sum() + penalty.sum()).backward()
    router.tally[:8] += torch.bincount(chosen.flatten(), minlength=8)
    router.settle(router.tally.clone(), 48)
    found = (penalty, x.grad, router.weight.grad, router.bias, router.entropy)
    assert not gates.any() and all(t.isfinite().all() for t in found)


@pytest.mark.feature("model.mlp.moe.balance")
def test_the_quantile_rule_sets_the_bias_at_which_each_expert_would_have_had_its_share():
    """By logical rank: beta_e = the n-th largest of l_te - alpha_t, alpha_t the (k+1)-th largest l + b, n = T
    k / E."""
    # eight logical ranks of 128 tokens
    router, x = fill(Router(settings(*ROUTINGS["quantile"]))), noise(16, 64, 48)
    logits, old = (x @ router.weight.T).view(8, 128, 8), router.bias.clone()
    betas = []
    for rank in logits.detach():
        alpha = [sorted((row + old).tolist())[-3] for row in rank]
        over = [[rank[t, e].item() - alpha[t] for t in range(128)] for e in range(8)]
        betas.append([sorted(row, reverse=True)[128 * 2 // 8 - 1] for row in over])
    router(x, 128)
    router.settle(router.tally.clone(), 1024)
    assert torch.allclose(router.bias, -torch.tensor(betas, dtype=torch.float64).mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_loads_and_biases_do_not_depend_on_the_ranks_in_a_forward(name):
    """Eight logical ranks at once or one by one, over two steps."""
    results = []
    for at_once in (8, 1):
        model = build(*moe(f"balance.rule={name}"))
        for i in range(2):
            ranks = tokens(16, 64, seed=i).view(8, 2, 64)
            begin_step(model)
            for first in range(0, 8, at_once):
                with torch.no_grad():
                    model(ranks[first:first + at_once].flatten(0, 1))
            end_step(model, 1024)
        results.append(
            (
                torch.stack([r.load for r in model.routers()]),
                torch.stack([r.bias for r in model.routers()]),
                torch.stack([r.entropy for r in model.routers()])
            )
        )
    (load, bias, entropy), (other_load, other_bias, other_entropy) = results
    assert torch.equal(load, other_load) and (load.sum(1) == 2048).all()
    assert torch.allclose(bias, other_bias, rtol=0, atol=1e-14) and torch.allclose(
        entropy, other_entropy, rtol=1e-12
    )


def test_evaluation_counts_nothing():
    model = build().eval()
    model(tokens())
    assert not any(router.tally.any() for router in model.routers())


def test_the_entropy_of_equal_scores_is_one_and_of_a_certain_router_near_zero():
    router = Router(settings("model.mlp.moe.score=softmax"))
    for weight, low, high in ((0.0, 1 - 1e-12, 1 + 1e-12), (100.0, 0.0, 0.1)):
        router.weight.data.copy_(weight * noise(8, 48))
        router.tally.zero_()
        router(noise(2, 64, 48, seed=1))
        router.settle(router.tally.clone(), 128)
        assert low <= router.entropy <= high


# ----- losses

def sequence_loss(scores, k, alpha):
    """DeepSeek-V3, eq. 17-20, of one sequence: scores (T, E), without the bias; f counts, P is
    differentiated."""
    length, n = scores.shape
    f, p = [0.0] * n, [0.0] * n
    for row in scores:
        for e in sorted(range(n), key=lambda e: -row[e].item())[:k]:
            f[e] += n / (k * length)
        for e in range(n):
            p[e] = p[e] + row[e] / row.sum() / length
    return alpha * sum(a * b for a, b in zip(f, p))


@pytest.mark.feature("model.mlp.moe.sequence_loss")
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_sequence_loss_is_deepseek_v3_s_for_each_sequence(score):
    router = fill(Router(settings(*moe(f"score={score}", "sequence_loss=0.3"))))
    x = noise(3, 32, 48)
    logits = x @ router.weight.T
    scores = torch.sigmoid(logits) if score == "sigmoid" else logits.softmax(-1)
    expected = torch.stack([sequence_loss(rows, 2, 0.3) for rows in scores])
    theirs, = torch.autograd.grad(expected.mean(), router.weight)
    found = router(x)[2]
    ours, = torch.autograd.grad(found.mean(), router.weight)
    assert close(found.view(3, 32), expected[:, None].expand(3, 32), 1e-12) and close(ours, theirs, 1e-12)
    assert len(expected.unique()) == 3


def test_the_sequence_loss_is_alpha_at_equal_scores_and_more_where_loads_follow_scores():
    router = Router(settings("model.mlp.moe.sequence_loss=0.3"))
    x = noise(2, 64, 48)
    router.weight.data.zero_()
    assert torch.allclose(router(x)[2], torch.tensor(0.3, dtype=torch.float64), rtol=1e-12)
    x[..., -1] = 1.0
    last = 0.3
    for offset in (0.3, 1.0, 3.0):  # the further apart the experts, the larger
        router.weight.data[:, -1] = torch.linspace(-offset, offset, 8)
        value = router(x)[2].mean().item()
        assert value > last
        last = value


@pytest.mark.feature("model.mlp.moe.z_loss")
def test_the_z_loss_is_the_squared_logsumexp_of_the_logits():
    router, x = fill(Router(settings("model.mlp.moe.z_loss=0.2"))), noise(2, 24, 48)
    expected = 0.2 * (x @ router.weight.T).exp().sum(-1).log().square()
    assert close(router(x)[2].view(2, 24), expected, 1e-12)


def test_sequence_loss_and_z_loss_add_up():
    x = noise(2, 24, 48)
    both, one, other = (fill(Router(settings(*moe(*sets))))(x)[2] for sets in (
        ("sequence_loss=0.3", "z_loss=0.2"), ("sequence_loss=0.3",), ("z_loss=0.2",)))
    assert close(both, one + other, 1e-12)


def test_penalties_add_their_gradient_in_training_and_nothing_to_the_loss():
    on, off = build(*ROUTINGS["losses"]), build()
    x, y, seen, upstream = tokens(), tokens(seed=2), [], noise(2, 24)
    for router in on.routers():
        router.register_forward_hook(lambda module, inputs, out: seen.append(out[2]))
    losses, plain = on(x, y), off(x, y)
    assert torch.equal(losses, plain) and len(seen) == 2 and seen[0].all()

    def gradients(value, model):
        return torch.autograd.grad(
            (value * upstream).sum(), list(model.parameters()), retain_graph=True, allow_unused=True
        )

    found, without, added = gradients(losses, on), gradients(plain, off), gradients(sum(seen).view(2, 24), on)
    assert sum(a is not None and bool(a.any()) for a in added) > 10
    for whole, loss, penalty in zip(found, without, added):
        assert close(whole, loss if penalty is None else loss + penalty, 1e-9)
    seen.clear()
    assert torch.equal(on.eval()(x, y), off.eval()(x, y)) and seen == [None, None]


# ----- gradients of routers

def test_no_router_is_dead_at_top_1():
    """Raw gates: every expert with a token teaches its row of the router. Seen from the loss, through the
    whole model."""
    model = build(ref="variants/moe8k1s")
    model(tokens(8, 64), tokens(8, 64, seed=2)).mean().backward()
    for router in model.routers():
        used = router.tally[:8] > 0
        assert used.sum() > 3 and torch.equal(router.weight.grad.any(1), used)


# ----- Muon on stacks

def train_step(optimizer, model, s, seed, plan_step=0):
    x = tokens(8, 65, seed)
    begin_step(model)
    optimizer.expect(last=True)
    model(x[:, :-1], x[:, 1:]).mean().backward()
    optimizer.accumulate()
    end_step(model, 512)
    optimizer.step(schedule.plan(s)[plan_step])


@pytest.mark.feature("optim.muon.move_idle")
@pytest.mark.parametrize("move_idle", [False, True])
def test_an_expert_without_rows_moves_only_if_asked_although_its_momentum_is_there(move_idle):
    model = build(f"optim.muon.move_idle={str(move_idle).lower()}")
    s = model.settings
    for router in model.routers():
        router.bias.zero_()
    optimizer = Optimizer(model, s)
    train_step(optimizer, model, s, 0)
    starve(model.blocks[2].mlp, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step(optimizer, model, s, 1)
    first, second = (router.load for router in model.routers())
    assert second[3] == 0 and (first > 0).all()
    for kind in ("up", "down"):
        stacks = [f"blocks.{i}.mlp.{kind}" for i in (1, 2)]
        moved = torch.cat([(model.get_parameter(name) != before[name]).flatten(1).any(1) for name in stacks])
        assert moved.tolist() == [True] * 11 + [move_idle] + [True] * 4
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
    for name in ("blocks.1.mlp.up", "blocks.2.mlp.down"):
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
    (["top_k=8"], "top_k = 8 of model.mlp.moe.experts = 8"),
    (["top_k=0"], "at least one must be chosen"),
    (["experts=1", "top_k=1"], "one left"),
    (["hidden=0"], "hidden = 0"),
    (["shared=-1"], "at least 1 and 0"),
    (["normalise=true", "top_k=1"], "the router gets no gradient: switch it off"),
    (["groups=3"], "groups = 3 does not divide 8 experts"),
    (["groups=0"], "groups = 0"),
    (["groups=4", "groups_kept=5"], "must lie between 1 and groups = 4"),
    (["groups=4", "groups_kept=1", "top_k=3"], "hold fewer than top_k = 3"),
    (["groups=8", "groups_kept=2"], "a group needs two experts"),
    (["dense_layers=[0,1,2,3,4,5,6,7,8,9,10,11]"], "leaves no layer with experts"),
    (["dense_layers=[12]"], "names layer 12: the model has layers 0 to 11"),
    (["dense_layers=[1,1]"], "names a layer twice"),
    (
        ["groups=4", "groups_kept=2", "balance.rule=quantile"],
        "choose rule proportional or sign, or set groups=1",
    ),
    (["balance.freeze_frac=1"], "freeze_frac = 1.0: must lie in 0 <= x < 1"),
    (["balance.freeze_frac=-0.1"], "must lie in 0 <= x < 1"),
    (["gate_scale=0"], "gate_scale = 0"),
    (["balance.rate=0"], "balance.rate = 0"),
    (["balance.rate=1.5"], "balance.rate = 1.5: must be at most 1, the largest score"),
    (["balance.rate=inf"], "expected a number that is finite"),
    (["sequence_loss=-1"], "sequence_loss = -1"),
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
        "optim.muon.move_idle=true"
    ],
)
def test_settings_of_experts_need_experts(change):
    with pytest.raises(UserError, match="needs model.mlp.moe"):
        settings(change, ref="short/8")


def test_quantile_goes_with_all_groups_open():
    for groups, kept in ((1, 1), (4, 4)):
        s = settings(*moe("balance.rule=quantile", f"groups={groups}", f"groups_kept={kept}"))
        assert s.model.mlp.moe.balance.rule == "quantile"


def test_processes_that_do_not_divide_the_experts_are_refused_before_they_know_each_other(monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", lambda *_: pytest.fail("started"))
    for name, value in dict(
        RANK=0, LOCAL_RANK=0, WORLD_SIZE=8, MASTER_ADDR="127.0.0.1", MASTER_PORT=29500
    ).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="8 processes do not divide 12 experts: change one of them"):
        World(settings("system.expert_parallel=true", "system.device=cpu", "model.mlp.moe.experts=12"))


@pytest.mark.feature("system.expert_parallel")
def test_processes_that_do_not_divide_the_experts_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    assert len(MoE(settings("system.expert_parallel=true")).up) == 1
    with pytest.raises(UserError, match="8 processes do not divide 12 experts: change one of them"):
        MoE(settings("system.expert_parallel=true", "model.mlp.moe.experts=12"))


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


# ----- processes

PARALLEL = "system.expert_parallel=true"
WILD = "model.mlp.moe.balance.rate=1"  # so fast that experts lie idle in some steps


@cache
def forkserver():
    """Context of a process that has loaded torch and nothing else, and of which the processes of a run are
    copies."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


def together(world, target, *args):
    """Run target(*args) in `world` processes that find each other as under torchrun."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    members = [
        forkserver().Process(target=member, args=(rank, world, port, target, args)) for rank in range(world)
    ]
    for process in members:
        process.start()
    for process in members:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in members] == [0] * world


def member(rank, world, port, target, args):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port)
    }
    torch.set_num_threads(1)
    target(*args)


def share_of_gradients(path, sets, precision, flooded):
    """Write losses, gradients and clip factor of one batch; a target of `together`, for one process called by
    the test."""
    s = settings(SMALL, "optim.grad_clip=0.01", "system.device=cpu", *sets, precision=precision)
    world = World(s)
    model, whole = GPT(s), build(precision=precision)
    model.initialise(0)
    parts = whole.state_dict()
    for i, m in model.mixtures():
        for kind in ("up", "down"):
            parts[f"blocks.{i}.mlp.{kind}"] = parts[f"blocks.{i}.mlp.{kind}"].chunk(m.world)[m.rank]
    model.load_state_dict(parts)
    for router in model.routers():
        router.bias[list(flooded)] += 100.0
    mine = slice(8 // world.size * world.rank, 8 // world.size * (world.rank + 1))
    optimizer = Optimizer(model, s, communication(s, world.rank, world.size))
    optimizer.expect(last=False)
    losses = model(tokens(8)[mine], tokens(8, seed=2)[mine])
    (losses.sum() / (8 * 24)).backward()
    local = {name: p.grad.clone() for name, p in model.named_parameters()}
    for bank in optimizer.banks:
        if bank.comm.reduces:
            optimizer.launch(bank)
    factor = optimizer.clip_factor(optimizer.banks, [optimizer.reduced(bank)[1] for bank in optimizer.banks])
    stacks = model.expert_loads() if model.mixtures()[0][1].world > 1 else {}
    gradients = {name: world.gather(g) if name in stacks else world.total(g) for name, g in local.items()}
    if world.main:
        torch.save({"losses": world.gather(losses.detach()), "factor": factor, "gradients": gradients}, path)
    else:
        world.gather(losses.detach())


@pytest.mark.parametrize(
    "precision, backend, flooded, tolerance",
    [("float64", "padded", (), 1e-12), ("float32", "grouped", (0, 1), 1e-5)],
    ids=["padded", "grouped_flooded"]
)
@pytest.mark.parametrize("world, comm", [(2, "sharded"), (4, "replicated")])
def test_shared_out_experts_give_the_gradients_of_one_process(
    world, comm, precision, backend, flooded, tolerance, tmp_path
):
    """Losses, all gradients, and the norm that clips; also where all rows go to the first process and none to
    others."""
    sets = [f"system.experts={backend}"]
    share_of_gradients(tmp_path / "1.pt", sets, precision, flooded)
    together(
        world, share_of_gradients, tmp_path / "n.pt", [*sets, PARALLEL, f"system.comm={comm}"], precision,
        flooded
    )
    one, several = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "n.pt")
    assert close(several["losses"], one["losses"], tolerance) and close(
        several["factor"], one["factor"], tolerance
    )
    for name, g in one["gradients"].items():
        assert g.any() and close(several["gradients"][name], g, tolerance), name
    norm = torch.stack([g.double().norm() for g in one["gradients"].values()]).norm()
    assert close(one["factor"], 0.01 / norm, 1e-6)


def training(args):
    train_gpt.main(*command_line.command_line(args))


def trained(folder, world, *args):
    """(curve, parameters and biases, loads of the experts, checksums of gradients) of a training by `world`
    processes."""
    sets = [
        "system.device=cpu", "system.precision=float64", "schedule.steps=3", "validation.tokens=4096", SMALL,
        WILD
    ]
    changes = [word for change in (*sets, *args) for word in ("--set", change)]
    together(world, training, [REF, "--scale", "micro", *changes, "--save", "--out", str(folder)])
    run = next(folder.glob("*/summary.json")).parent
    events = read_chain(run / "run.jsonl")
    load = [e["load"] for e in events if e["kind"] == "experts" and "load" in e][-1]
    gradients = next(e["gradients"] for e in events if e["kind"] == "probe")
    return (
        json.loads((run / "summary.json").read_text())["curve"], torch.load(run / "checkpoint.pt")["model"],
        load, gradients
    )


@pytest.mark.parametrize("clip, runs", [
    ((), [(4, (PARALLEL,))]),
    (("optim.grad_clip=0.01",), [(2, (PARALLEL,)), (2, ()), (2, (PARALLEL, "system.comm=replicated"))])],
                         ids=["unclipped", "clipped"])
def test_trainings_by_2_and_4_processes_equal_those_by_one(clip, runs, tmp_path):
    """Losses, parameters, biases and loads after three steps of the trainer; experts shared out, or all on
    each process."""
    one = trained(tmp_path / "one", 1, *clip)
    assert any(0 in loads for loads in one[2])
    for i, (world, sets) in enumerate(runs):
        curve, state, load, gradients = trained(tmp_path / str(i), world, *clip, *sets)
        assert load == one[2] and max(abs(a - b) for (_, a), (_, b) in zip(curve, one[0])) < 1e-9
        assert set(state) == set(one[1]) and all(
            (state[name] - one[1][name]).abs().max() < 1e-9 for name in state
        )
        assert gradients.keys() == one[3].keys()
        assert all(
            gradients[name] == pytest.approx(marks, rel=1e-6, abs=1e-9) for name, marks in one[3].items()
        )
