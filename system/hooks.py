"""Hooks: state besides parameters and optimizer, and the points of a step at which it may act.

A hook has the methods of Stateful; `hooks_of(model)` returns the hooks that the model's parts need. The
tensors that a hook lists in tensors() are covered by the proof of the reset (system.warmup), by checkpoints
(system.checkpoint) and by the memory estimate (system.memory).
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from model import GPT
from optim import Optimizer
from schedule import StepPlan, Windows
from system.anchor import Anchor
from system.head_inputs import HeadInputs
from system.stateful import Stateful
from system.tail_average import TailAverages
from system.world import World
from system.wrappers import wrappers_of


class RouterBalance(Stateful):
    """Sums each step's tokens per expert over all processes and updates the routers' biases.

    Each validation begins to count from zero.
    """

    def __init__(self, model: GPT) -> None:
        self.routers = {layer: moe.router for layer, moe in model.mixtures()}

    def before_forwards(self, plan: StepPlan) -> None:
        for router in self.routers.values():
            router.stats.zero_()

    @torch.no_grad()
    def before_update(self, plan: StepPlan, world: World) -> None:
        if not self.routers:
            return
        # (layers, 2 E + 1)
        totals = world.total(torch.stack([router.stats for router in self.routers.values()]))
        for router, stats in zip(self.routers.values(), totals):
            router.end_step(stats, plan.tokens, plan.update_bias)

    def for_validation(self, windows: Windows | None) -> Any:
        for router in self.routers.values():
            router.validation_counts.zero_()
        return contextlib.nullcontext()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"router.{layer}.{name}": buffer for layer, router in self.routers.items()
                for name, buffer in router.named_buffers()}


class FP8Scales(Stateful):
    """Delayed scales of the FP8 MLPs, refreshed before each step from the current weights."""
    per_rank = ("activation", "input", "hidden")

    def __init__(self, model: GPT) -> None:
        self.mlps = model.fp8_mlps()

    def before_forwards(self, plan: StepPlan) -> None:
        for mlp in self.mlps:
            mlp.fp8.refresh(mlp.c_fc, mlp.c_proj)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"fp8_mlp.{i}.{name}": buffer for i, mlp in enumerate(self.mlps)
                for name, buffer in mlp.fp8.named_buffers()}


class YaRN(Stateful):
    """Recomputes rotary tables and softmax scales when the long window of a step or validation changes."""

    def __init__(self, model: GPT) -> None:
        self.tables = model.rotary_tables

    def before_forwards(self, plan: StepPlan) -> None:
        self.tables.update(plan.shape.windows)

    def for_validation(self, windows: Windows | None) -> Any:
        self.tables.update(windows)
        return contextlib.nullcontext()

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.tables.tensors()


class Untie(Stateful):
    """Unties embedding and head after the update of the step with the event `untie` (record 53).

    The embedding starts from the head's values and optimizer state.
    """

    def __init__(self, model: GPT, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        if model.tied:
            optimizer.copied("lm_head", "embed")  # what cannot be done is refused before the first step

    def before_forwards(self, plan: StepPlan) -> None:
        self.model.tied = plan.shape.tied  # the warm-up goes through steps out of order

    def after_update(self, plan: StepPlan) -> None:
        if "untie" in plan.events:
            self.optimizer.copy_parameter("lm_head", "embed")
            self.model.tied = False


def hooks_of(model: GPT, optimizer: Optimizer | None = None) -> list[Stateful]:
    """The hooks of a run, in the order in which they act.

    The wrappers come first: a look-ahead moves the weights before FP8 scales are made of them, and the head's
    buffers go to the embedding before its values do. optimizer: needed to untie the head; None: no such hook.
    """
    optim = model.settings.optim
    hooks = wrappers_of(model)
    if optim.anchor is not None:
        hooks.append(Anchor(model, optim.anchor))
    hooks += [RouterBalance(model), FP8Scales(model), YaRN(model)]
    if optimizer is not None:
        hooks.append(Untie(model, optimizer))
        if optim.lm_head.kfac is not None:
            hooks.append(HeadInputs(model, optimizer))
    if optim.tail is not None:
        hooks.append(TailAverages(model, optim.tail, model.settings.schedule.steps))
    return hooks


@contextlib.contextmanager
def validating(hooks: Iterable[Stateful], windows: Windows | None) -> Iterator[None]:
    """The context managers of all hooks around a validation with these windows."""
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook.for_validation(windows))
        yield


@contextlib.contextmanager
def reading(hooks: Iterable[Stateful], step: int) -> Iterator[None]:
    """A context in which the model holds the weights that the validation before a step reads."""
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook.reading(step))
        yield


def all_tensors(model: GPT, optimizer: Optimizer, hooks: Iterable[Stateful]) -> dict[str, torch.Tensor]:
    """Every tensor that training can change: of the model, of the optimizer and of the hooks."""
    found = {f"model.{name}": t for name, t in [*model.named_parameters(), *model.named_buffers()]}
    found |= {f"optimizer.{name}": t for name, t in optimizer.tensors().items()}
    known = {id(t) for t in found.values()}  # buffers of the model that a hook moves are listed once
    for hook in hooks:
        found |= {
            f"{type(hook).__name__}.{name}": t for name, t in hook.tensors().items() if id(t) not in known
        }
    return found


def beside_optimizer(model: GPT, hooks: Iterable[Stateful]) -> dict[str, tuple[torch.Tensor, bool]]:
    """{name: (tensor, whether its first axis is the logical ranks)} of what changes besides parameters.

    The tensors of the hooks, and the buffers of the model's state_dict that no hook lists. Other buffers are
    derived from the settings.
    """
    found = {}
    for hook in hooks:
        found |= {f"{type(hook).__name__}.{name}": (t, name.rpartition(".")[2] in hook.per_rank)
                  for name, t in hook.tensors().items()}
    known = {id(t) for t, _ in found.values()}
    parameters = dict(model.named_parameters())
    return found | {f"model.{name}": (t, False) for name, t in model.state_dict(keep_vars=True).items()
                    if name not in parameters and id(t) not in known}
