"""Records between those of the golden numbers against an independent model and optimizer, in float64.

Losses and all gradients of 40, 45, 49 and 55, four updates of 40, 43, 55 and 57.
"""

import numpy as np
import pytest
import torch

import reference_34_to_57 as reference
from golden_records import load, small, token_windows
from optim import Optimizer
from reference_34_to_57 import Adam, Muon
from settings import deltas
from small_models import Toy, plan, update
from updates import views

CASES = ((3, (3,), (1.0,)), (7, (3, 7), (1.0, 0.5, 0.2)))  # long window, its history, weights of the targets


@pytest.mark.feature("model.residual.backout", "model.residual.unet_skips.pairs", "model.attn.key_offset",
                     "model.attn.value_embed.gate", "model.residual.unet_skips.gate", "model.head.mtp")
@pytest.mark.parametrize("n", [40, 45, 49, 55])
def test_losses_and_gradients(n):
    golden, _ = load("r53")
    x, y = (torch.from_numpy(golden[f"in/{name}"].astype(np.int64)) for name in ("tokens", "targets"))
    sizes = {"dim": reference.D, "heads": reference.HEADS, "vocab_rows": 128}
    more = {"model.attn.window.block": reference.BLOCK, "data.max_doc_len": 256,
            "numerics.norm_eps": 1.1920929e-07}
    _, model = small(f"short/{n}", sizes, 256, **more)
    generator = torch.Generator().manual_seed(n)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.15 if p.dim() > 1 else 0.5, generator=generator)
    for long, history, weights in CASES:
        model.tied = n >= 53 and long == 3
        weights = weights if n >= 53 else (1.0,)
        windows = token_windows(long, long, history)
        model.zero_grad()
        model.update_yarn(windows)
        found = model(x[None], y[None], model.context(x[None], 99, windows), target_weights=weights).sum()
        found.backward()
        ours = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        documents = (x == 99).cumsum(0)
        expected = reference.loss(ours, n, x, y, documents, long, history, weights, model.tied)
        expected.backward()
        assert abs(found.item() / expected.item() - 1) < 1e-13
        for name, p in model.named_parameters():
            theirs = ours[name].grad
            assert (p.grad is None) == (theirs is None), name
            if theirs is not None:
                assert (p.grad - theirs).abs().max() <= 1e-11 * theirs.abs().max(), name


def stored(shape, turn=False):
    """(to the original's matrix, back) of a parameter of ours."""
    if turn:
        return (lambda x: x.T), (lambda x: x.T)
    return (lambda x: x.reshape(-1, x.shape[-1]) if x.ndim == 3 else x), (lambda x: x.reshape(shape))


def matrices(n, s):
    """{label: (our shape, views, the original's matrix is the transpose of ours, rule)}."""
    axis, c_fc = (-1, 2) if n >= 48 else (-2 if n >= 43 else None, 2 if n >= 42 else 1)
    lr = 0.023 if n >= 46 else 0.03 if n >= 42 else 0.06
    decay = 1.2 if n >= 43 else 0.0
    rule = lambda factor, split=1: Muon(lr, factor, decay, axis, split)
    found = {
        "qkvo": ((4, 24, 24), views.qkvo(s), False, rule(2 if n >= 48 else 1, 4)),
        "c_fc": ((96, 24), views.c_fc(s), n < 48, rule(c_fc)),
        "c_proj": ((24, 96), views.c_proj(s), n >= 48, rule(4 if n >= 48 else 1))
    }
    if n < 56:
        found["gate"] = ((6, 12), views.gate(s), False, rule(1))
    if n == 55:
        found["ve_gate"] = ((6, 12), views.gate(s), False, rule(1))
    if n < 52:
        found["smear_gate"] = ((1, 12), views.gate(s), False, rule(1))
    return found


def others(n):
    """{label: (role, rule)} of what AdamW updates."""
    eps, late = 1e-10 if n == 57 else 1e-8, n >= 55
    gates, head, table, scalar = ((0.9, 0.99), (0.5, 0.95), (0.75, 0.95), (0.9, 0.99)) if n == 57 else (
        (0.65, 0.95), (0.65, 0.95), (0.65, 0.95), (0.9, 0.99) if late else (0.65, 0.95))
    found = {
        "lm_head": ("lm_head", Adam(0.008, *head, eps, 150 * late)),
        "embed": ("embed", Adam(0.008 if late else 0.6, *head, eps, 150 * late)),
        "value_embed": ("embed", Adam(0.6, *table, eps, 5 * late)),
        "resid_lambdas": ("scalar", Adam(0.04, *scalar, eps)),
        "x0_lambdas": ("scalar", Adam(0.04, 0.65, 0.95, eps))
    }
    if late:
        rates = {"smear_gate": 8e-5, "skip_gate": 4e-4}
        found |= {name: ("matrix", Adam(rate, *gates, eps)) for name, rate in rates.items()}
    if n == 57:
        found |= {name: ("matrix", Adam(0.008, *gates, eps, 1)) for name in ("gate", "ve_gate")}
    return found


@pytest.mark.feature("optim.muon.polar_express", "optim.muon.normuon", "optim.muon.cautious_decay",
                     "optim.adam.cautious_decay", "optim.ve_gate", "optim.skip_gate")
@pytest.mark.parametrize("n", [40, 43, 55, 57])
def test_four_updates(n):
    s = deltas.resolve(f"short/{n}", sets=["system.precision=float64"]).settings
    generator = np.random.default_rng(n)
    of, parameters, values = {}, {}, {}
    for label, (shape, view, turn, rule) in matrices(n, s).items():
        of[label], values[label] = (rule, *stored(shape, turn)), generator.normal(0, 0.3, shape)
        parameters[label] = (torch.from_numpy(values[label]), "matrix", label, view)
    for label, (role, rule) in others(n).items():
        shape = (7,) if role == "scalar" else (1, 12)
        of[label], values[label] = (rule, *stored(shape)), generator.normal(0, 0.3, shape)
        parameters[label] = (torch.from_numpy(values[label]), role, label)
    model = Toy(**parameters)
    optimizer = Optimizer(model, s)
    for lr_factor, momentum in ((1.0, 0.85), (0.9, 0.87), (0.7, 0.9), (0.4, 0.95)):
        gradients = {label: generator.normal(0, 0.1, x.shape) for label, x in values.items()}
        update(optimizer, model, {label: torch.from_numpy(g) for label, g in gradients.items()},
               plan(lr_factor=lr_factor, momentum=momentum))
        for label, (rule, to, back) in of.items():
            moved = rule.update(to(values[label]), to(gradients[label]), momentum, lr_factor)
            values[label] = np.ascontiguousarray(back(moved))
    for label, expected in values.items():
        found = model.get_parameter(label).detach().numpy()
        assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max(), label
