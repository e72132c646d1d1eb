"""Small mixtures of experts, and texts for them, for the tests of experts."""

import math

import torch

import schedule
from layers.moe import MoE, Router
from model import GPT
from settings import deltas
from step_hooks import begin_step, end_step

REF = "variants/moe8k2s"
SMALL = "model.num_layers=3"  # two layers with experts behind a dense one
GROUPS = ("num_expert_groups=4", "num_limited_groups=2")
RULES = ("proportional", "sign", "quantile")


def moe(*changes):
    return tuple(f"model.mlp.moe.{change}" for change in changes)


ROUTINGS = {  # every way to choose and to weigh experts, and to balance them
    "sigmoid": (),
    "top1": moe("top_k=1"),
    "normalised": moe("route_norm=true", "route_scale=2.5"),
    "softmax": moe("score_func=softmax"),
    "softmax_normalised": moe("score_func=softmax", "route_norm=true"),
    "groups": moe(*GROUPS),
    "groups_of_softmax": moe(*GROUPS, "score_func=softmax"),
    "sign": moe("balance.rule=sign"),
    "quantile": moe("balance.rule=quantile"),
    "quantile_of_softmax": moe("balance.rule=quantile", "score_func=softmax"),
    "losses": moe("seq_aux_loss=0.3", "z_loss=0.2"),
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
        if name.split(".")[-1] in ("bias", "stats", "tokens_per_expert"):
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


def starve(m, expert):
    m.router.bias[expert] -= 100.0


def flood(m, expert):
    m.router.bias[expert] += 100.0


def balanced(router, steps):
    """MaxVio of each step of a router alone, on fresh Gaussian tokens whose last channel is 1: its weights
    are offsets."""
    n, k, seen = router.moe.num_experts, router.moe.top_k, []
    for i in range(steps):
        x = noise(16, 64, 48, seed=i, dtype=torch.float32)
        x[..., -1] = 1.0
        router.stats.zero_()
        with torch.no_grad():
            chosen, _, _ = router(x, 1024 // 8)
        load = torch.bincount(chosen.flatten(), minlength=n)
        router.stats[:n] += load
        router.end_step(router.stats.clone(), len(chosen))
        assert torch.equal(router.tokens_per_expert.long(), load) and load.sum() == 1024 * k
        seen.append((load.max() / load.double().mean() - 1).item())
    return seen


def skewed(*sets, **changes):
    router = Router(settings(*moe(*sets), precision="float32", **changes))
    n = router.moe.num_experts
    with torch.no_grad():
        router.weight.copy_(noise(n, 48, seed=3) / math.sqrt(48))
        router.weight[:, -1] = torch.linspace(-2.5, 2.5, n)
    return router


def train_step(optimizer, model, s, seed, plan_step=0):
    x = tokens(8, 65, seed)
    begin_step(model)
    optimizer.expect(last=True)
    model(x[:, :-1], x[:, 1:]).mean().backward()
    optimizer.accumulate()
    end_step(model, 512)
    optimizer.step(schedule.plan(s)[plan_step])
