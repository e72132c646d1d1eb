"""The preset scaleup-1.5b: record 7 at 1.5 B parameters, against the log it reproduces."""

import math

import pytest
import torch

import schedule
from model import GPT, without_values
from optim import Optimizer
from settings import deltas

CURVE = deltas.RECORDS / "presets/scaleup-1.5b.csv"
SMALL = ["model.model_dim=48", "model.vocab_size=1257", "data.tokens_per_rank=64", "data.seq_len=64",
         "validation.seq_len=64", "validation.tokens=512", "schedule.steps=3", "schedule.cooldown_steps=1",
         "system.precision=float64"]


def points():
    rows = [line.split(",") for line in CURVE.read_text().split()[1:]]
    return [(int(step), float(loss), int(ms)) for step, loss, ms in rows]


def test_the_plan_has_the_size_the_tokens_and_the_validations_of_the_log():
    s = deltas.resolve_name("scaleup-1.5b").settings
    plans, curve = schedule.plan(s), points()
    assert without_values(s).num_parameters() == 50304 * 1536 + 52 * 12 * 1536 ** 2
    assert sum(plan.tokens for plan in plans) == 20344 * 480 * 1024
    assert [step for step, *_ in curve] == [i for i in range(len(plans) + 1) if schedule.validates(s, i)]
    assert curve[-1] == (20344, 2.7297, 34957570)
    # constant until 14532, then linear to zero
    assert plans[14532].lr_factor == 1 > plans[14533].lr_factor
    assert plans[-1].lr_factor == pytest.approx(1 / 5812)


def test_the_first_loss_is_that_of_the_log():
    """Tied, with projections of zero: a token's own logit is norm(e) e, sqrt(1536) times |e| = sqrt(1/3)."""
    few = [
        "model.num_layers=1", "model.vocab_size=1257", "data.tokens_per_rank=1024", "system.precision=float32"
    ]
    s = deltas.resolve_name("scaleup-1.5b", sets=few).settings
    model = GPT(s)
    model.initialise(0)
    x = torch.randint(1257, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model.eval()(x, torch.roll(x, 1, 1)).mean().item()
    assert loss == pytest.approx(math.sqrt(1536 / 3), rel=0.01)
    assert loss == pytest.approx(points()[0][1], rel=0.01)


def test_its_52_layers_train_three_steps_at_the_width_of_micro():
    s = deltas.resolve_name("scaleup-1.5b", sets=SMALL).settings
    assert (s.model.num_layers, s.model.attn.num_heads) == (52, 12)
    model, losses = GPT(s), []
    model.initialise(0)
    optimizer = Optimizer(model, s)
    x = torch.randint(1257, (8, 65), generator=torch.Generator().manual_seed(0))
    for plan in schedule.plan(s):
        optimizer.expect(last=True)
        loss = model(x[:, :-1], x[:, 1:]).mean()
        loss.backward()
        optimizer.accumulate()
        losses.append(loss.item())
        optimizer.step(plan)
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
