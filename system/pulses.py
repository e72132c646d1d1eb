"""Pulses and a readout of the last steps of a run (track 3, result 43)."""

import torch

import schedule
from model import GPT
from schedule import StepPlan
from settings.wrappers import PhaseReadout, TrailDelta
from system.wrapper import Number, ReadingWrapper, Tensors, Wrapper, block_matrices, of_model, widened


def other_matrices(model: GPT) -> dict[str, torch.nn.Parameter]:
    """The parameters that hold block matrices other than v and o, by name."""
    return {name: p for name, p in block_matrices(model).items() if len(without_vo(p, p))}


def without_vo(p: torch.nn.Parameter, x: torch.Tensor) -> torch.Tensor:
    """Of a tensor x like p, the slices that are neither v nor o, as a view."""
    if p.label in ("v", "o"):
        return x[:0]
    return x[:2] if p.label == "qkvo" else x  # q, k, v and o


class Pulses(Wrapper):
    """Pulses back along the way that the weights have come (settings.wrappers.TrailDelta).

    d <- theta - last + momentum d;  theta <- theta + push d;  last <- theta
    """

    def __init__(self, model: GPT, settings: TrailDelta) -> None:
        if settings.scope == "all":
            super().__init__({name: p for name, p in of_model(model).items() if p.label != "embed"})
        else:
            super().__init__(other_matrices(model))
        self.settings, self.done = settings, Number(0)  # pulses so far
        self.at = frozenset(schedule.pulses(settings, model.settings.schedule.steps))
        self.last, self.way = self.zeros(), self.zeros()
        self.buffers = {"last": self.last, "way": self.way}
        self.numbers = {"done": self.done}

    def updated(self, plan: StepPlan) -> None:
        settings, number = self.settings, plan.step + 1
        if number in self.at:
            push = settings.push if self.done.value else settings.first
            for name, p in self.parameters.items():
                whole = settings.scope == "all"
                theta, way, last = (x if whole else without_vo(p, x)
                                    for x in (p, self.way[name], self.last[name]))
                wide = widened(theta.dtype)
                d = theta.to(wide) - last.to(wide) + settings.momentum * way.to(wide)
                way.copy_(d)
                theta.copy_(theta.to(wide) + push * d)
            self.done.set(self.done.value + 1)
        if number == settings.start or number in self.at:
            for name, p in self.parameters.items():
                self.last[name].copy_(p)


class Phase(ReadingWrapper):
    """Phase readout (settings.wrappers.PhaseReadout), after the last update.

    v = theta - theta_1;  a = v - (theta_1 - theta_0);  b = a - <a, v> / |v|^2 v;  theta + push |v| b / |b|
    """

    def __init__(self, model: GPT, settings: PhaseReadout, steps: int) -> None:
        super().__init__(other_matrices(model), "end", steps)
        self.settings, self.taken = settings, Number(0)
        self.first, self.second = self.zeros(), self.zeros()
        self.buffers = {"first": self.first, "second": self.second}
        self.numbers = {"taken": self.taken}

    def follow(self, done: int) -> None:
        for number, buffer in ((self.settings.first, self.first), (self.settings.second, self.second)):
            if done == number:
                self.taken.set(self.taken.value + 1)
                self.keep(buffer)

    def keep(self, buffer: Tensors) -> None:
        """Fill a buffer with the weights."""
        for name, p in self.parameters.items():
            buffer[name].copy_(p)

    def known(self, step: int) -> bool:
        return self.taken.value == 2 and step > self.settings.second

    def value(self, name: str, p: torch.Tensor) -> torch.Tensor:
        of = self.parameters[name]
        theta = p.to(widened(p.dtype), copy=True)
        part, zero, one = (
            without_vo(of, x).to(theta.dtype) for x in (theta, self.first[name], self.second[name])
        )
        v = part - one
        a = v - (one - zero)
        b = a - (a * v).sum((-2, -1), keepdim=True) / square(v).clamp_min(1e-20) * v
        turned = part + self.settings.push * b * (square(v).sqrt() / (square(b).sqrt() + 1e-12))
        without_vo(of, theta).copy_(turned)
        return theta


def square(x: torch.Tensor) -> torch.Tensor:
    """The squared norm of each matrix (..., 1, 1)."""
    return x.square().sum((-2, -1), keepdim=True)
