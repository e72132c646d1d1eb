"""What the hooks of a model do around one step of one process, for tests that run a step by hand."""

from types import SimpleNamespace

import schedule
from system.hooks import hooks_of


def begin_step(model):
    """Before the forwards of the first step."""
    for hook in hooks_of(model):
        hook.before_forwards(SimpleNamespace(shape=schedule.shape(model.settings, 0)))


def end_step(model, tokens):
    """Between the backwards and the update of a step of so many tokens, after which the routers' biases
    move."""
    for hook in hooks_of(model):
        hook.before_update(
            SimpleNamespace(tokens=tokens, update_bias=True), SimpleNamespace(total=lambda tally: tally)
        )
