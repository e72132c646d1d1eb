"""Laws of balancing a mixture of experts: rules of the bias, losses of the router, its gradients."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import schedule
import train_gpt
from data.batch import Documents
from layers.moe import Router
from model import GPT
from optim import Optimizer
from runlog import read_chain
from settings import deltas
from step_hooks import begin_step, end_step
from system import command_line
from system.hooks import hooks_of, validating
from system.dry_run import print_plan
from small_experts import (
    REF, ROUTINGS, RULES, SMALL, balanced, build, close, fill, moe, noise, settings, skewed, tokens
)


# ----- balancing

@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("ref", ["variants/moe8k2s", "variants/moe32k4half"])
def test_each_rule_balances_a_skewed_router_within_150_steps(ref, name):
    seen = balanced(skewed(f"balance.rule={name}", "balance.rate=0.01", ref=ref), 150)
    assert seen[0] > 1.5 and max(seen[-5:]) < 0.5


SIZES = {8: 2, 32: 4, 64: 8}  # experts: top_k
UNBALANCED = {8: 1.3, 32: 2.0, 64: 2.0}  # the first step's MaxVio is above this


def offset(n, k, spread, *sets):
    """A router of n experts whose logits have unit variance and offsets from -spread to spread."""
    router = Router(settings(*moe(f"num_experts={n}", f"top_k={k}", *sets), precision="float32"))
    with torch.no_grad():
        router.weight.copy_(noise(n, 48, seed=3) / math.sqrt(48))
        router.weight[:, -1] = torch.linspace(-spread, spread, n)
    return router


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("n, k", SIZES.items())
def test_the_default_rate_balances_either_score_at_any_number_of_experts(n, k, name, score):
    seen = balanced(offset(n, k, 1.0, f"score_func={score}", f"balance.rule={name}"), 150)
    assert seen[0] > UNBALANCED[n] and max(seen[-5:]) < 0.5


@pytest.mark.parametrize("n, k", SIZES.items())
def test_the_default_rule_balances_softmax_scores_far_apart(n, k):
    seen = balanced(offset(n, k, 2.5, "score_func=softmax"), 150)
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
            router = Router(
                settings(*moe(f"balance.rule={name}", "balance.rate=0.03", f"score_func={score}"))
            )
            for _ in range(2):
                router.end_step(torch.cat([load, torch.zeros(9, dtype=torch.float64)]), 32)
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
        router.end_step(torch.cat([load, torch.zeros(9, dtype=torch.float64)]), 8)
    down, up = (0.07, 0.01) if name == "proportional" else (0.01, 0.01)
    assert torch.allclose(router.bias - 1, torch.tensor([-down] + 7 * [up]), rtol=1e-3)
    router.weight.data.zero_()
    router.bias.copy_(1 + 0.001 * torch.tensor([0.0, 0, 1, 0, 0, 2, 0, 0]))
    assert set(router(noise(1, 4, 48, dtype=torch.bfloat16))[0].flatten().tolist()) == {2, 5}


def test_a_router_of_16_bits_counts_long_sequences_for_its_loss():
    """512 tokens on the same two experts, which bfloat16 cannot count."""
    router = Router(
        settings("model.mlp.moe.seq_aux_loss=1.0", "numerics.router=bfloat16", precision="record")
    )
    router.weight.data.zero_()
    router.weight.data[:2, -1] = 8.0
    x = torch.zeros(1, 512, 48, dtype=torch.bfloat16)
    x[..., -1] = 1.0
    expected = seq_aux_loss(torch.sigmoid(x[0].double() @ router.weight.T.double()), 2, 1.0)
    assert torch.allclose(router(x)[2].double(), expected.double(), rtol=0.01)


@pytest.mark.feature("model.mlp.moe.balance.freeze_frac")
@pytest.mark.parametrize("name", RULES)
def test_the_bias_stands_still_over_the_last_part_of_a_run(name):
    s = settings(SMALL, *moe(f"balance.rule={name}", "balance.freeze_frac=0.3"), "schedule.steps=10")
    plans = schedule.plan(s)
    assert [plan.update_bias for plan in plans] == [True] * 7 + [False] * 3
    model = GPT(s)
    model.initialise(0)
    run = SimpleNamespace(
        s=s, model=model, hooks=hooks_of(model), compiled=model, optimizer=Optimizer(model, s),
        workers=None, guards=None, ranks_per_microbatch=8, corpus=SimpleNamespace(bos=0),
        world=SimpleNamespace(total=lambda tally: tally)
    )
    for step, moves in ((6, True), (7, False), (9, False)):
        bias = torch.stack([router.bias.clone() for router in model.routers()])
        inputs = tokens(16, 64, seed=step).view(8, 2, 64)
        train_gpt.train_step(run, plans[step], inputs, inputs.roll(1, -1), [Documents(2, 64)] * 8)
        assert torch.equal(bias, torch.stack([router.bias for router in model.routers()])) != moves
        assert all(router.tokens_per_expert.sum() == 2 * 1024 for router in model.routers())


def test_the_plan_says_from_which_step_on_the_biases_stand_still(capsys):
    for sets, line in ((["model.mlp.moe.balance.freeze_frac=0.034"], True), ([], False)):
        s = deltas.resolve("variants/4", scale="tiny", sets=sets)
        print_plan(s)
        assert ("the routers' biases stand still from step 170 on" in capsys.readouterr().out) == line
    assert s.settings.schedule.steps == 176


def test_without_freeze_frac_the_bias_moves_to_the_end_and_without_balance_never():
    assert all(plan.update_bias for plan in schedule.plan(settings()))
    assert not any(plan.update_bias for plan in schedule.plan(settings(without=["model.mlp.moe.balance"])))
    assert not any(plan.update_bias for plan in schedule.plan(settings(ref="short/8")))


def test_scores_that_underflow_give_no_nan():
    """sigmoid(-104) is 0 in float32: gates, entropy, losses and their gradients stay finite."""
    router = Router(settings(*moe("route_norm=true", "seq_aux_loss=0.1", "z_loss=0.1"), precision="float32"))
    router.weight.data.fill_(-1000.0)
    x = torch.ones(2, 24, 48, requires_grad=True)
    chosen, gates, penalty = router(x)
    (gates.sum() + penalty.sum()).backward()
    router.stats[:8] += torch.bincount(chosen.flatten(), minlength=8)
    router.end_step(router.stats.clone(), 48)
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
    router.end_step(router.stats.clone(), 1024)
    assert torch.allclose(router.bias, -torch.tensor(betas, dtype=torch.float64).mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_loads_and_biases_do_not_depend_on_the_ranks_in_a_forward(name):
    """Eight logical ranks at once or one by one, over two steps."""
    results = []
    for microbatch in (8, 1):
        model = build(*moe(f"balance.rule={name}"))
        for i in range(2):
            ranks = tokens(16, 64, seed=i).view(8, 2, 64)
            begin_step(model)
            for first in range(0, 8, microbatch):
                with torch.no_grad():
                    model(ranks[first:first + microbatch].flatten(0, 1))
            end_step(model, 1024)
        results.append(
            (
                torch.stack([r.tokens_per_expert for r in model.routers()]),
                torch.stack([r.bias for r in model.routers()]),
                torch.stack([r.entropy for r in model.routers()])
            )
        )
    (load, bias, entropy), (other_load, other_bias, other_entropy) = results
    assert torch.equal(load, other_load) and (load.sum(1) == 2048).all()
    assert torch.allclose(bias, other_bias, rtol=0, atol=1e-14) and torch.allclose(
        entropy, other_entropy, rtol=1e-12
    )


def test_evaluation_counts_apart_from_training_and_each_validation_from_zero():
    model = build()
    for train, counts, other in ((False, "validation_counts", "stats"), (True, "stats", None)):
        model.train(train)(tokens())
        assert all(getattr(r, counts)[:8].sum() == 2 * 48 for r in model.routers())
        assert other is None or not any(getattr(r, other).any() for r in model.routers())
    with validating(hooks_of(model), None):
        assert not any(r.validation_counts.any() for r in model.routers())
        model.eval()(tokens())
    assert all(r.validation_counts.sum() == r.stats[:8].sum() == 2 * 48 for r in model.routers())


def test_the_log_tells_max_vio_over_the_steps_and_of_the_validation_as_counted_from_every_choice(
    tmp_path, monkeypatch, capsys
):
    """All choices of a training are written down, and MaxVio follows from them by counting."""
    seen, forward = [], Router.forward

    def watched(router, *args):
        out = forward(router, *args)
        seen.append((router, router.training, out[0].flatten().tolist()))
        return out

    monkeypatch.setattr(Router, "forward", watched)
    sets = [
        SMALL, "schedule.steps=5", "validation.every=2", "validation.tokens=4096", "system.warmup_steps=0",
        "system.device=cpu"
    ]
    argv = [REF, "--scale", "micro", "--out", str(tmp_path), *(x for one in sets for x in ("--set", one))]
    options, resolved = command_line.command_line([*argv, "--check-sync"])  # no step reads a number back
    assert train_gpt.train(resolved, options) == 0

    def max_vio_of(chosen):
        loads = [chosen.count(e) for e in range(8)]
        return 8 * max(loads) / sum(loads) - 1

    rows, expected = 2 * schedule.tokens_before(resolved.settings, 1), []
    for router in dict.fromkeys(router for router, _, _ in seen):
        steps, validations, due = [[]], [], []
        for _, training, chosen in (one for one in seen if one[0] is router):
            if training:
                steps[-1] += chosen
                steps += [[]] if len(steps[-1]) == rows else []
                due = []
            else:  # the chunks of a validation follow each other
                validations += [] if due else [due]
                due += chosen
        steps = [max_vio_of(step) for step in steps[:-1]]
        assert len(steps) == 5 and [len(v) for v in validations] == [2 * 4096] * 4  # at 0, 2, 4, 5
        means = [sum(part) / len(part) for part in (steps[:2], steps[2:4], steps[4:], steps)]
        expected.append((means, [max_vio_of(v) for v in validations[1:]], steps[-1]))

    log = next(tmp_path.glob("*/run.jsonl"))
    events = [event for event in read_chain(log) if event["kind"] == "experts"]
    for layer, (means, validated, last) in enumerate(expected):
        told = [[e[name][layer] for e in events] for name in ("max_vio_steps", "max_vio_val")]
        assert told == [pytest.approx(means[:3], abs=1e-4), pytest.approx(validated, abs=1e-4)]
        assert events[-1]["max_vio"][layer] == pytest.approx(last, abs=1e-4)
    said = json.loads((log.parent / "summary.json").read_text())["max_vio"]
    assert said["layers"] == [1, 2] and said["steps"] == pytest.approx([x[0][3] for x in expected], abs=2e-4)
    assert said["validation"] == events[-1]["max_vio_val"]
    for name in ("steps", "validation"):
        assert said[f"{name}_mean"] == pytest.approx(sum(said[name]) / 2, abs=1e-4)
    over, val = (sum(events[-1][name]) / 2 for name in ("max_vio_steps", "max_vio_val"))
    assert f"; {over:.2f} over the steps, {val:.2f} in validation; " in capsys.readouterr().out


def test_the_entropy_of_equal_scores_is_one_and_of_a_certain_router_near_zero():
    router = Router(settings("model.mlp.moe.score_func=softmax"))
    for weight, low, high in ((0.0, 1 - 1e-12, 1 + 1e-12), (100.0, 0.0, 0.1)):
        router.weight.data.copy_(weight * noise(8, 48))
        router.stats.zero_()
        router(noise(2, 64, 48, seed=1))
        router.end_step(router.stats.clone(), 128)
        assert low <= router.entropy <= high


# ----- losses

def seq_aux_loss(scores, k, alpha):
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


@pytest.mark.feature("model.mlp.moe.seq_aux_loss")
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_sequence_loss_is_deepseek_v3_s_for_each_sequence(score):
    router = fill(Router(settings(*moe(f"score_func={score}", "seq_aux_loss=0.3"))))
    x = noise(3, 32, 48)
    logits = x @ router.weight.T
    scores = torch.sigmoid(logits) if score == "sigmoid" else logits.softmax(-1)
    expected = torch.stack([seq_aux_loss(rows, 2, 0.3) for rows in scores])
    theirs, = torch.autograd.grad(expected.mean(), router.weight)
    found = router(x)[2]
    ours, = torch.autograd.grad(found.mean(), router.weight)
    assert close(found.view(3, 32), expected[:, None].expand(3, 32), 1e-12) and close(ours, theirs, 1e-12)
    assert len(expected.unique()) == 3


def test_the_sequence_loss_is_alpha_at_equal_scores_and_more_where_loads_follow_scores():
    router = Router(settings("model.mlp.moe.seq_aux_loss=0.3"))
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
        ("seq_aux_loss=0.3", "z_loss=0.2"), ("seq_aux_loss=0.3",), ("z_loss=0.2",)))
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
        used = router.stats[:8] > 0
        assert used.sum() > 3 and torch.equal(router.weight.grad.any(1), used)
