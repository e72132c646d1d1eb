"""Anchor extrapolation (settings.wrappers.Anchor): gradients taken away from an average of the weights."""

import torch

from model import GPT
from schedule import StepPlan
from settings.wrappers import Anchor as AnchorSettings
from system.world import World
from system.wrapper import Tensors, of_model, plus
from system.wrappers import AveragedReadout
from updates.norms import ramp


class Anchor(AveragedReadout):
    """The weights that forwards and validations see, around an average E of the last weights, in float32.

        forwards at theta + g (theta - E), rounded to the parameter's dtype; the update at theta, bit for bit

    g: `gain` times the share of the way from ramp_start to ramp_end. Source: jn2clark's trainers of 2560 and
    2540 steps, where the average of the bfloat16 token table is that of its float32 master, here of the table
    itself.
    """

    def __init__(self, model: GPT, settings: AnchorSettings) -> None:
        super().__init__(of_model(model), settings, "validation", model.settings.schedule.steps)
        self.kept: Tensors = {}  # between the forwards and the update of a step

    @torch.no_grad()
    def before_forwards(self, plan: StepPlan) -> None:
        g = self.settings.gain * ramp(plan.step, self.settings.ramp_start, self.settings.ramp_end)
        if not self.begun.value or not g:
            return
        self.kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            average = self.average[name]
            p.copy_(plus(p, p.to(average.dtype) - average, g))

    @torch.no_grad()
    def before_update(self, plan: StepPlan, world: World) -> None:
        for name, x in self.kept.items():
            self.parameters[name].copy_(x)
        self.kept = {}

    def share(self, name: str) -> float:
        settings, p = self.settings, self.parameters[name]
        if p.ndim < 2:
            return settings.vectors
        if p.role in ("lm_head", "embed"):
            return settings.head if p.role == "lm_head" else settings.tables
        return settings.first if name.startswith("blocks.0.") else settings.blocks

    def reset(self) -> None:
        super().reset()
        self.kept = {}
