"""Workers that train apart (optim.outer.workers): each logical rank has its own weights and optimizer state.

Every worker updates its weights with the gradients of its own rank, and nothing is exchanged until an outer
step, whose theta is the mean of all workers' weights (DiLoCo, Douillard et al., arXiv 2311.08105; MuLoCo,
Therien et al., arXiv 2505.23725). Model and optimizer hold one worker at a time: a process takes its workers
in turn, eight on one process and one on each of eight.
"""

from collections.abc import Iterator
from typing import Any

import torch

from model import GPT
from optim import Optimizer
from schedule import outer_steps
from settings import Settings
from settings.data import LOGICAL_RANKS
from system.stateful import Stateful
from system.world import World
from system.wrappers import Outer, widened


class Workers(Stateful):
    """The weights and optimizer states of this process's workers, and the outer step that joins all workers.

    Between two steps model and optimizer hold no worker in particular. A validation and the saved checkpoint
    read the mean of the workers' weights.
    """
    per_rank = ("worker",)

    def __init__(self, model: GPT, optimizer: Optimizer, world: World) -> None:
        self.model, self.optimizer, self.world = model, optimizer, world
        self.outer = Outer(model, model.settings.optim.outer)
        self.weights = {f"{i}.weights": bank.param for i, bank in enumerate(optimizer.banks)}
        self.live = self.weights | {
            f"{i}.{key}": x for i, bank in enumerate(optimizer.banks) for key, x in bank.state.items()
        }
        self.copies = {name: x.new_empty((len(world.ranks), *x.shape)) for name, x in self.live.items()}
        self.reset()

    @torch.no_grad()
    def each(self) -> Iterator[int]:
        """For each worker of this process its number, while model and optimizer hold it."""
        updates = [bank.updates for bank in self.optimizer.banks]
        for k in range(len(self.world.ranks)):
            for name, x in self.live.items():
                x.copy_(self.copies[name][k])
            for bank, count in zip(self.optimizer.banks, updates):
                bank.updates = count
            yield k
            for name, x in self.live.items():
                self.copies[name][k].copy_(x)

    @torch.no_grad()
    def join(self) -> None:
        """After a step of all workers: the outer step, if it is due, which gives all the same weights."""
        if not self.outer.due():
            return
        self.read_mean()
        self.outer.step()
        for name, x in self.weights.items():
            self.copies[name].copy_(x.expand_as(self.copies[name]))

    @torch.no_grad()
    def read_mean(self) -> None:
        """Give the model the mean of all workers' weights. Collective; the mean of equal weights is exact."""
        for name, x in self.weights.items():
            total = self.copies[name].sum(0, dtype=widened(x.dtype))
            x.copy_(self.world.total(total) / LOGICAL_RANKS)

    def reading(self, step: int) -> Any:
        self.read_mean()
        return super().reading(step)

    def restored(self) -> None:
        self.outer.restored()

    @torch.no_grad()
    def reset(self) -> None:
        self.outer.reset()
        for name, x in self.live.items():
            self.copies[name].copy_(x.expand_as(self.copies[name]))

    def tensors(self) -> dict[str, torch.Tensor]:
        copies = {f"{name}.worker": x for name, x in self.copies.items()}
        return copies | {f"outer.{name}": x for name, x in self.outer.tensors().items()}


def copies_bytes(optimizer: Optimizer, outer: Outer, ranks: int) -> int:
    """Bytes that the workers of a process with so many logical ranks keep, with those of the outer step."""
    weights = sum(bank.param.nbytes for bank in optimizer.banks)
    buffers = sum(x.nbytes for x in outer.tensors().values())
    return ranks * (weights + optimizer.state_bytes()) + buffers


def saved(s: Settings, optimizer: Optimizer) -> str:
    """What the workers exchange in a run, in place of gradients, in one line."""
    rounds, steps = len(outer_steps(s)), s.schedule.steps
    gradients = steps * sum(bank.grad_bytes() for bank in optimizer.banks)
    weights = rounds * sum(bank.units * bank.param[:1].numel() * widened(bank.param.dtype).itemsize
                           for bank in optimizer.banks)
    return (f"{LOGICAL_RANKS} workers train apart (optim.outer.workers): all-reduces of {weights / 1e6:,.1f} "
            f"MB of weights in {rounds} outer steps, in place of {gradients / 1e6:,.1f} MB of gradients in "
            f"{steps} steps: {100 * (1 - weights / gradients):.1f} % saved")
