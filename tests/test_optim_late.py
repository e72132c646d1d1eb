"""Four updates of records 62, 77 and 85 through the Optimizer, against the original code in float64.

Matrices move in every call, AdamW's parameters in calls 2 and 4 with the sum of two gradients. Embedding and
head are one until call 2; then the embedding takes over the head's values and state. Pairs of heads (record
80) against a decomposition of their matrix.
"""

import numpy as np
import pytest
import torch

from golden_records import load
from kernels.newton_schulz import ANVIL, POLAR_EXPRESS
from optim import Optimizer
from settings import deltas
from small_models import Toy, build, plan, update
from updates import views
from updates.views import Views

def cut(name, x):
    """An array of the fixture as we store it."""
    if name in ("c_fc", "c_proj"):  # both in one bank, the second one transposed
        x = x.reshape(2, *x.shape[-2:])[0 if name == "c_fc" else 1]
        return x.T if name == "c_proj" else x
    if name == "lm_head":
        return x.T
    if name.startswith("attn") and name != "attn_gate":  # q, k, v, o of one layer below each other
        return x.reshape(2, 4, x.shape[-1], -1)[int(name[-1])]
    if name == "scale":
        return x.reshape(1)
    return x.reshape(x.shape[-2:]) if name in ("mudd", "token_gate") else x


def roles(number, s):
    """{our name: (name in the fixture, role, label, views)}."""
    matrix = {"c_fc": ("c_fc", views.c_fc(s)), "c_proj": ("c_proj", views.c_proj(s))}
    found = {
        name: (f"mlp{'' if number == 62 else '_bank'}", "matrix", *rest) for name, rest in matrix.items()
    }
    if number == 85:  # blocks of two heads, v and o in one bank
        found |= {"qk": ("qk_bank", "matrix", "qkvo", Views(variance_axis=views.qk(s).variance_axis)),
                  "vo": ("vo_bank", "matrix", "qkvo", views.v(s)),
                  "mudd": ("mudd_w1", "matrix", "mudd"), "mudd_bias": ("mudd_b2", "scalar", "mudd_bias"),
                  "token_gate": ("mudd_gate_w1", "matrix", "token_gate"),
                  "scale": ("_mudd_gate_scale", "scalar", "token_gate_scale")}
    else:
        attn = "attn" if number == 62 else "attn_bank"
        found |= {f"attn{i}": (attn, "matrix", "qkvo", views.qkvo(s)) for i in (0, 1)}
        found |= {
            "attn_gate": ("attn_gate_bank", "matrix", "gate"),
            "x0": ("x0_lambdas", "scalar", "x0_lambdas"),
        }
    if number > 62:
        found |= {
            f"{name}_lambdas": (f"{name}_lambdas", "scalar", f"{name}_lambdas") for name in ("post", "resid")
        }
    found |= {"bigram": ("bigram_embed", "embed", "bigram"), "smear": ("smear_gate", "matrix", "smear_gate"),
              "value": ("ve0" if number == 62 else "value_embeds", "embed", "value_embed"),
              "scalars": ("scalars", "scalar", "sa_lambdas"), "lm_head": ("lm_head", "lm_head", "lm_head"),
              "embed": ("embed", "embed", "embed")}
    return found


@pytest.mark.feature("optim.muon.head_pairs", "optim.bigram", "optim.post_lambdas", "optim.bigram_lambdas",
                     "optim.mudd", "optim.mudd_bias", "optim.token_gate", "optim.token_gate_bias",
                     "optim.token_gate_scale", "optim.xsa")
@pytest.mark.parametrize("number", [62, 77, 85])
def test_four_updates_through_the_optimizer(number):
    golden, config = load(f"r{number}_optim")
    s = deltas.resolve(f"short/{number}", sets=["system.precision=float64"]).settings
    of = roles(number, s)

    def ours(name, key):
        x = torch.from_numpy(np.array(cut(name, np.asarray(golden[key], np.float64))))
        return x.contiguous()

    def gradient(name, call):
        x = golden[f"grad/{of[name][0]}"][call]
        return torch.from_numpy(np.ascontiguousarray(cut(name, np.asarray(x, np.float64))))

    model = Toy(**{name: (ours(name, f"init/{theirs}"), *role) for name, (theirs, *role) in of.items()})
    optimizer, compared = Optimizer(model, s), 0
    for call, (lr_factor, momentum) in enumerate(zip(config["lr_factor"], config["muon_momentum"])):
        gradients = {name: gradient(name, call) for name in of}
        tied = call < 2
        if tied:
            gradients["lm_head"] = gradients["lm_head"] + gradients.pop("embed")
        due = frozenset(name for name, every in s.optim.cadences().items() if (call + 1) % every == 0)
        update(optimizer, model, gradients, plan(call, lr_factor=lr_factor, momentum=momentum, due=due))
        if call == 1:
            optimizer.copy_parameter("lm_head", "embed")
        if call not in (1, 3):
            continue
        for bank in optimizer.banks:
            for name in [name for name, _ in bank.members]:
                key = f"f64/step{call + 1}"
                expected = ours(name, f"{key}/param/{of[name][0]}")
                got = model.get_parameter(name).detach()
                assert (got - expected).abs().max() <= 1e-12 * expected.abs().max(), (name, call)
                compared += 1
    assert compared == 2 * len(of)


def orthogonalised(x, maps, margin):
    """Newton-Schulz of one matrix by its singular value decomposition: the maps act on singular values."""
    u, values, v = np.linalg.svd(x, full_matrices=False)
    values = values / (margin * np.linalg.norm(x) + 1e-6)
    for a, b, c in maps:
        values = a * values + b * values ** 3 + c * values ** 5
    return u * values @ v


@pytest.mark.feature("optim.muon.head_pairs")
@pytest.mark.parametrize("ref, maps, margin", [("short/80", POLAR_EXPRESS, 1.02), ("short/92", ANVIL, 1.05)])
def test_two_adjacent_heads_of_q_or_of_k_are_orthogonalised_as_one_matrix(ref, maps, margin):
    """Heads 0 and 1, 2 and 3, 4 and 5, of q and of k, each alone: a momentum of 0 leaves the gradient."""
    off = ["optim.muon.normuon", "optim.muon.cautious_decay"]
    model = build(ref, *(["optim.muon.slow=false"] if ref == "short/92" else []), without=off)
    attn, s = model.blocks[1].attn, model.settings
    heads, width = s.model.attn.num_heads, attn.qk.size(1) // s.model.attn.num_heads
    assert (heads, attn.qk.size(2)) == (6, s.model.model_dim) and attn.qk.views == views.qk(s)
    before = attn.qk.detach().clone()
    g = torch.randn(before.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    toy = Toy(qk=(before, "matrix", "qkvo", attn.qk.views))
    update(Optimizer(toy, s), toy, {"qk": g}, plan(momentum=0.0))
    found = (before - toy.qk.detach()) / s.optim.muon.lr
    for part in range(2):
        for first in (0, 2, 4):
            rows = slice(first * width, (first + 2) * width)
            expected = torch.from_numpy(orthogonalised(g[part, rows].numpy(), maps, margin))
            assert (found[part, rows] - expected).abs().max() < 1e-9, (part, first)
