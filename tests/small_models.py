"""Small float64 models of a record, rows of tokens, and training steps on them, for laws of model and
optimizer."""

from types import SimpleNamespace

import pytest
import torch

import schedule
from model import GPT
from settings import deltas, schema
from updates.views import Views

BOS = 1256


def each_record(refs=None):
    """Test parameters: refs of records, of all if None. Slow: one that computes at scale micro what an
    earlier one does, as records of systems and of precision do; tests/long.sh runs it."""
    computed, parameters = set(), []
    for ref in refs or deltas.load_records():
        digest = schema.ml_hash(deltas.resolve(ref, scale="micro").settings)
        parameters.append(pytest.param(ref, marks=[pytest.mark.slow] if digest in computed else []))
        computed.add(digest)
    return parameters


def settings(ref, *sets, without=(), precision="float64"):
    return deltas.resolve(
        ref, scale="micro", without=without, sets=[f"system.precision={precision}", *sets]
    ).settings


def build(ref, *sets, seed=0, scramble=True, **kwargs):
    """A small float64 model; scramble: every parameter random and non-zero, so that no term hides behind a
    zero."""
    s = settings(ref, *sets, **kwargs)
    model = GPT(s)
    model.initialise(seed)
    if scramble:
        for name, p in sorted(model.named_parameters()):
            p.data += 0.3 * torch.randn(
                p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=p.dtype
            )
    return model


def tokens(rows=2, length=24, seed=1):
    return torch.randint(1257, (rows, length), generator=torch.Generator().manual_seed(seed))


def forward_all(optimizer, model, s, x, plan_step=0, microbatch=None, launch=True):
    """All forward and backward passes of a step on rows x."""
    microbatch, due = microbatch or len(x), schedule.plan(s)[plan_step].due
    model.update_yarn(schedule.windows(s, plan_step))
    for i in range(0, len(x), microbatch):
        optimizer.expect(last=i + microbatch >= len(x), launch=launch, due=due)
        part = x[i:i + microbatch]
        context = model.context(part[:, :-1], BOS, schedule.windows(s, plan_step))
        (model(part[:, :-1], part[:, 1:], context).mean() * microbatch / len(x)).backward()
        optimizer.accumulate()


def step(optimizer, model, s, x, plan_step=0, microbatch=None, launch=True):
    forward_all(optimizer, model, s, x, plan_step, microbatch, launch)
    optimizer.step(schedule.plan(s)[plan_step])


class Toy(torch.nn.Module):
    """Parameters without a forward pass: the test gives the gradients."""

    def __init__(self, **parameters):
        super().__init__()
        for name, (value, role, label, *views) in parameters.items():
            p = torch.nn.Parameter(value.clone())
            p.role, p.label, p.views = role, label, views[0] if views else Views()
            self.register_parameter(name, p)

    def tokens_per_expert(self):
        return {}


def update(optimizer, model, gradients, plan):
    """One step with these gradients, {name: tensor}."""
    optimizer.expect(last=True, due=plan.due)
    for name, g in gradients.items():
        model.get_parameter(name).grad += g
    optimizer.accumulate()
    optimizer.step(plan)


def plan(i=0, due=None, momentum=0.9, lr_factor=1.0, frozen=frozenset(), events=()):
    """What optimizer and wrappers read of a step plan."""
    of_step = SimpleNamespace(
        step=i, lr_factor=lr_factor, momentum=momentum, due=due, frozen=frozen, events=events
    )
    of_step.of_role = lambda role: of_step
    return of_step
