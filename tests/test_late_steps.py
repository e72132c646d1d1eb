"""Training steps of records 89 and 92 where something changes, against an independent optimizer, in float64.

Model, Optimizer and hooks together: sums of gradients between updates, the parting of head and embedding, and
of record 92 the slower cadence of its tables from step 336 on.
"""

import pytest
import torch

import schedule
from golden_records import small
from optim import Optimizer
from reference_late import Replay
from schedule import Shape, Span, StepPlan, Windows
from settings import deltas
from system.hooks import hooks_of
from system.tail_average import TailAverages
from test_golden_92 import SETS

WINDOWS = Windows(*(Span(16 * blocks + 1, None) for blocks in (7, 3, 7)), (3, 7))
SIZES = {"dim": 48, "heads": 6, "vocab_rows": 128}
MORE = {
    89: {"model.attn.window.block": 16, "data.max_doc_len": 256, "numerics.norm_eps": 1.1920929e-07,
         "model.embed.bigram.rows": 320, "model.embed.bigram.signs": 64},
    92: SETS
}


def model_of(n):
    """A small model of the record with random weights."""
    _, model = small(f"short/{n}", SIZES, 256, **MORE[n])
    generator = torch.Generator().manual_seed(n)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.15 if p.dim() > 1 else 0.5, generator=generator)
        model.embed.weight.copy_(model.lm_head.weight)
    return model


def gradients_of(model, text, values):
    """(loss, {name: gradient}) of one row, with these values of the parameters and a table of its own."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[name])
    model.tied = False
    model.zero_grad()
    model.update_yarn(WINDOWS)
    x, y = text[:, :-1], text[:, 1:]
    loss = model(x, y, model.context(x, 99, WINDOWS), target_weights=(1.0, 0.3)).sum()
    loss.backward()
    return loss.item(), {name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                         for name, p in model.named_parameters()}


def train(model, optimizer, hooks, plan, text):
    """One step of ours; returns the loss."""
    for hook in hooks:
        hook.before_forwards(plan)
    optimizer.expect(last=True, due=plan.due)
    x, y = text[:, :-1], text[:, 1:]
    loss = model(x, y, model.context(x, 99, WINDOWS), target_weights=(1.0, 0.3)).sum()
    loss.backward()
    optimizer.accumulate()
    optimizer.step(plan)
    for hook in hooks:
        hook.after_update(plan)
    return loss.item()


@pytest.mark.feature("optim.bigram.slower", "optim.value_embed.slower", "model.head.untied.tied_until",
                     "optim.muon.slow")
@pytest.mark.parametrize("n, first, count", [(89, 845, 5), (92, 334, 6), (92, 1174, 4)])
def test_steps_equal_their_replay(n, first, count):
    plans, split = (f(deltas.resolve(f"short/{n}").settings) for f in (schedule.plan, schedule.untie_step))
    (model, other), heads = (model_of(n) for _ in range(2)), SIZES["heads"]
    optimizer = Optimizer(model, model.settings)
    hooks = [hook for hook in hooks_of(model, optimizer) if not isinstance(hook, TailAverages)]
    replay = Replay(n, {name: p.detach().clone() for name, p in model.named_parameters()},
                    {name: p.label for name, p in model.named_parameters()}, heads, split)
    generator = torch.Generator().manual_seed(first)
    for one in plans[first:first + count]:
        text = torch.randint(0, 99, (1, 257), generator=generator)
        text[0, 0] = text[0, 100] = 99
        plan = StepPlan(one.step, 0, Shape(256, 256, 256, WINDOWS, tied=one.step <= split), 256, 0,
                        one.lr_factor, one.momentum, False, one.due, one.events)
        expected, gradients = gradients_of(other, text, replay.values)
        assert abs(train(model, optimizer, hooks, plan, text) / expected - 1) < 1e-9, one.step
        replay.step(gradients, one.step, one.lr_factor, one.momentum)
        for name, p in model.named_parameters():
            if name == "embed.weight" and one.step < split:
                continue  # the head's weight is read in its place
            theirs = replay.values[name]
            apart = (p.detach() - theirs).abs().max().item() / theirs.abs().max().item()
            assert apart <= 1e-7, (name, one.step, apart)
            replay.values[name] = p.detach().clone()  # rounding does not grow from step to step
