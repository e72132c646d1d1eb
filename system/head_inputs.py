"""The hook of output K-FAC: the covariance of the head's inputs goes to the rule of the head."""

import torch

from model import GPT
from optim import Optimizer
from schedule import StepPlan
from system.stateful import Stateful
from system.world import World
from updates.head import INPUTS


class HeadInputs(Stateful):
    """Gives the head's rule (updates.head.KfacAdam) X^T X / n over the inputs X (n, D) of a step, those of
    all processes."""

    def __init__(self, model: GPT, optimizer: Optimizer) -> None:
        self.head = model.lm_head
        self.states = [bank.state[INPUTS] for bank in optimizer.banks if INPUTS in bank.state]

    def before_forwards(self, plan: StepPlan) -> None:
        self.reset()

    @torch.no_grad()
    def before_update(self, plan: StepPlan, world: World) -> None:
        sums = torch.cat([self.head.input_gram.flatten(), self.head.input_count[None]])
        totals = world.total(sums)
        for state in self.states:
            state.copy_((totals[:-1] / totals[-1].clamp_min(1)).view(state.shape[1:]))

    @torch.no_grad()
    def reset(self) -> None:
        self.head.input_gram.zero_()
        self.head.input_count.zero_()
