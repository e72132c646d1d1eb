"""State that a run carries next to parameters and optimizer, and the points of a step at which the state may
act.

A hook is an object with the methods of Stateful; `hooks_of(model)` makes those that the model's parts need.
What a hook lists in tensors() is covered by the proof of the reset (system.warmup) and by the memory estimate
(system.memory).
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from model import GPT
from optim import Optimizer
from schedule import StepPlan
from system.world import World


class Stateful:
    """A hook that does nothing: others replace the methods that they need."""

    def before_forwards(self, plan: StepPlan) -> None:
        """Before the first forward of a step."""

    def before_update(self, plan: StepPlan, world: World) -> None:
        """After the last backward of a step, before the parameters move. May be collective."""

    def after_update(self, plan: StepPlan) -> None:
        """After the parameters have moved."""

    def for_validation(self) -> Any:
        """A context manager around each validation."""
        return contextlib.nullcontext()

    def reset(self) -> None:
        """Bring the state back to what it was before the first step; model and optimizer are reset
        already."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the state, by a name."""
        return {}


class RankSizes(Stateful):
    """Tells the parts that count by logical rank how many tokens one has in this step."""

    def __init__(self, model: GPT) -> None:
        self.parts = [part for part in model.modules() if hasattr(part, "tokens_per_rank")]

    def before_forwards(self, plan: StepPlan) -> None:
        for part in self.parts:
            part.tokens_per_rank = plan.shape.tokens_per_rank


class RouterBalance(Stateful):
    """Tokens per expert of each step, over all processes, and the routers' biases that follow from them."""

    def __init__(self, model: GPT) -> None:
        self.routers = {layer: moe.router for layer, moe in model.mixtures()}

    def before_forwards(self, plan: StepPlan) -> None:
        for router in self.routers.values():
            router.tally.zero_()

    @torch.no_grad()
    def before_update(self, plan: StepPlan, world: World) -> None:
        if not self.routers:
            return
        # (layers, 2 E + 1)
        tallies = world.total(torch.stack([router.tally for router in self.routers.values()]))
        for router, tally in zip(self.routers.values(), tallies):
            router.settle(tally, plan.tokens, plan.moves_bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"router.{layer}.{name}": buffer for layer, router in self.routers.items()
                for name, buffer in router.named_buffers()}


class FP8Scales(Stateful):
    """Delayed scales of the MLPs that are in FP8: each step looks at the weights as the last update left
    them."""

    def __init__(self, model: GPT) -> None:
        self.mlps = model.fp8_mlps()

    def before_forwards(self, plan: StepPlan) -> None:
        for mlp in self.mlps:
            mlp.fp8.refresh(mlp.down)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"fp8_mlp.{i}.{name}": buffer for i, mlp in enumerate(self.mlps)
                for name, buffer in mlp.fp8.named_buffers()}


class Untie(Stateful):
    """Splits the embedding from the head that it was tied to, after the update of a step with the event
    `untie`: the embedding goes on from the head's values and optimizer state (record 53)."""

    def __init__(self, model: GPT, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def after_update(self, plan: StepPlan) -> None:
        if "untie" in plan.events:
            self.optimizer.copy_parameter("lm_head", "embed")
            self.model.tied = False


def hooks_of(model: GPT, optimizer: Optimizer | None = None) -> list[Stateful]:
    """The hooks that the model's parts need. optimizer: without it nothing is untied."""
    hooks = [RankSizes(model), RouterBalance(model), FP8Scales(model)]
    return hooks if optimizer is None else [*hooks, Untie(model, optimizer)]


@contextlib.contextmanager
def validating(hooks: Iterable[Stateful]) -> Iterator[None]:
    """The context managers of all hooks around a validation."""
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook.for_validation())
        yield


def all_tensors(model: GPT, optimizer: Optimizer, hooks: Iterable[Stateful]) -> dict[str, torch.Tensor]:
    """Every tensor that training can change: of the model, of the optimizer and of the hooks."""
    found = {f"model.{name}": t for name, t in [*model.named_parameters(), *model.named_buffers()]}
    found |= {f"optimizer.{name}": t for name, t in optimizer.tensors().items()}
    for hook in hooks:
        found |= {f"{type(hook).__name__}.{name}": t for name, t in hook.tensors().items()}
    return found
