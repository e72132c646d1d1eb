"""Small float64 models of a record, rows of tokens, and training steps on them, for laws of model and optimizer."""

import torch

import deltas
import schedule
from model import GPT

BOS = 1256


def settings(ref, *sets, without=(), precision="float64"):
    return deltas.resolve(ref, scale="micro", without=without, sets=[f"system.precision={precision}", *sets]).settings


def build(ref, *sets, seed=0, scramble=True, **kwargs):
    """A small float64 model; scramble: every parameter random and non-zero, so that no term hides behind a zero."""
    s = settings(ref, *sets, **kwargs)
    model = GPT(s)
    model.initialise(seed)
    if scramble:
        for name, p in sorted(model.named_parameters()):
            p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=p.dtype)
    return model


def tokens(rows=2, length=24, seed=1):
    return torch.randint(1257, (rows, length), generator=torch.Generator().manual_seed(seed))


def forward_all(optimizer, model, s, x, plan_step=0, at_once=None, launch=True):
    """All forward and backward passes of a step on rows x."""
    at_once, due = at_once or len(x), schedule.plan(s)[plan_step].due
    for i in range(0, len(x), at_once):
        optimizer.expect(last=i + at_once >= len(x), launch=launch, due=due)
        part = x[i:i + at_once]
        context = model.context(part[:, :-1], BOS, schedule.windows(s, plan_step))
        (model(part[:, :-1], part[:, 1:], context).mean() * at_once / len(x)).backward()
        optimizer.accumulate()


def step(optimizer, model, s, x, plan_step=0, at_once=None, launch=True):
    forward_all(optimizer, model, s, x, plan_step, at_once, launch)
    optimizer.step(schedule.plan(s)[plan_step])
