"""Hooks around the optimizer: they act on the weights between two updates, whatever rule made the updates.

Buffers lie next to the parameters, whole on every process: all processes have the same weights, and so
compute the same. A hook reads and writes the stored parameter; where the lower half of a bfloat16 matrix is
kept by Muon (numerics.matrix_mantissa), a hook sees and changes the upper half alone, as Snoo does in the
originals.
"""

from typing import Any

import torch

from model import GPT
from schedule import StepPlan, apart, pulsed
from settings.wrappers import RRE, EMANesterov, OuterStep, ReferenceReadout, TailEMA, TailVelocity
from system.pulses import Phase, Pulses
from system.wrapper import Number, ReadingWrapper, Tensors, Wrapper, block_matrices, of_model, plus, widened

# ----- during training --------------------------------------------------------------------------------------

class Lookahead(Wrapper):
    """EMA-Nesterov (settings.wrappers.EMANesterov): a look-ahead before the forwards along the mean of steps.

    Before the forwards, for start <= step < stop:  theta <- theta + beta rho m
    After the update:  m <- decay m + (1 - decay) (theta - before);  before <- theta

    rho: factor of the learning rate of the group embed in the step before, 1 before the first. m and before
    have the parameter's dtype. Source: track 3, result 39, whose buffers of the embedding are bfloat16.
    """

    def __init__(self, model: GPT, settings: EMANesterov) -> None:
        super().__init__(of_model(model))
        self.settings, self.rho = settings, Number(1.0)
        self.mean, self.before = self.zeros(), self.zeros()
        self.buffers = {"mean": self.mean, "before": self.before}
        self.numbers = {"rho": self.rho}
        self.reset()

    @torch.no_grad()
    def before_forwards(self, plan: StepPlan) -> None:
        if self.settings.start <= plan.step < self.settings.stop:
            for name, p in self.parameters.items():
                p.copy_(plus(p, self.mean[name], self.settings.beta * self.rho.value))

    def updated(self, plan: StepPlan) -> None:
        decay = self.settings.decay
        for name, p in self.parameters.items():
            mean, before = self.mean[name], self.before[name]
            wide = widened(p.dtype)
            mean.copy_(decay * mean.to(wide) + (1 - decay) * (p.to(wide) - before.to(wide)))
            before.copy_(p)
        self.rho.set(plan.lr_factor)

    @torch.no_grad()
    def reset(self) -> None:
        super().reset()
        for name, p in self.parameters.items():
            self.before[name].copy_(p)


class Outer(Wrapper):
    """The outer optimizer (settings.wrappers.OuterStep): MuLoCo or Snoo, with one worker.

    Every `period` updates, with slow the weights after the last outer step:

        delta = slow - theta;  b <- momentum b + delta
        slow <- slow - lr (delta + momentum b);  theta <- slow

    In result 13 of track 3, u = lr b is what is kept. The SGD of Snoo in medium record 12 rounds after each
    of these operations in the parameter's dtype, and so does this.
    """

    def __init__(self, model: GPT, settings: OuterStep) -> None:
        super().__init__(of_model(model))
        self.settings, self.count = settings, Number(0)  # updates so far
        self.slow, self.momentum = (self.zeros(wide=settings.dtype == "float32") for _ in range(2))
        self.buffers = {"slow": self.slow, "momentum": self.momentum}
        self.numbers = {"count": self.count}
        self.reset()

    def updated(self, plan: StepPlan) -> None:
        if self.due():
            self.step()

    def due(self) -> bool:
        """Count an update, and tell whether an outer step follows it."""
        self.count.set(self.count.value + 1)
        return (self.count.value - self.settings.first_step) % self.settings.period == 0

    def step(self) -> None:
        """One outer step."""
        for name, p in self.parameters.items():
            slow, b = self.slow[name], self.momentum[name]
            delta = slow - p.to(slow.dtype)
            b.copy_(self.settings.momentum * b.to(widened(b.dtype)))
            b.add_(delta)
            slow.copy_(plus(slow, plus(delta, b, self.settings.momentum), -self.settings.lr))
            p.copy_(slow)

    @torch.no_grad()
    def reset(self) -> None:
        super().reset()
        for name, p in self.parameters.items():
            self.slow[name].copy_(p)


class Extrapolation(Wrapper):
    """Reduced-rank extrapolation of the block matrices together (settings.wrappers.RRE; track 3, result 34).

    kept: the weights after the last updates, oldest first; d_a = kept[a + 1] - kept[a]. With n = points - 1:

        G_ab = <d_a, d_b> + (1e-6 trace / n + 1e-10) [a = b];  c = G^-1 1 / (sum of G^-1 1)
        Delta = -damping sum_a (sum of c_b, b >= a) d_a, shortened to cap ||theta||
        theta <- theta + Delta, and kept begins anew with it
    """

    def __init__(self, model: GPT, settings: RRE) -> None:
        super().__init__(block_matrices(model))
        self.settings, self.held = settings, Number(0)
        self.kept = {name: p.detach().new_zeros((settings.points, *p.shape))
                     for name, p in self.parameters.items()}
        self.buffers = {"kept": self.kept}
        self.numbers = {"held": self.held}

    def updated(self, plan: StepPlan) -> None:
        done = plan.step + 1
        if done < self.settings.start:
            return
        self.keep()
        if done % self.settings.every == 0 and self.held.value == self.settings.points:
            self.extrapolate()

    def keep(self) -> None:
        """Keep the weights, in place of the oldest if there is no room."""
        full = self.held.value == self.settings.points
        place = int(self.held.value) - full
        for name, p in self.parameters.items():
            if full:
                self.kept[name].copy_(self.kept[name].roll(-1, 0))
            self.kept[name][place].copy_(p)
        self.held.set(place + 1)

    def extrapolate(self) -> None:
        """Move the weights, and begin anew with them."""
        settings, n = self.settings, self.settings.points - 1
        steps = {name: x.to(widened(x.dtype)).diff(dim=0).flatten(1) for name, x in self.kept.items()}
        gram = sum(d.double() @ d.double().T for d in steps.values())  # (n, n)
        gram = gram + (1e-6 * gram.trace() / n + 1e-10) * torch.eye(n, dtype=gram.dtype, device=gram.device)
        ones = gram.new_ones(n)
        c, _ = torch.linalg.solve_ex(gram, ones)  # solve() would wait for the device to tell whether it could
        factors = -settings.damping * (c / c.sum()).flip(0).cumsum(0).flip(0)
        moves = {name: (factors.to(d.dtype) @ d).view(self.parameters[name].shape)
                 for name, d in steps.items()}
        longest = settings.cap * norm(self.parameters)
        shorter = (longest / norm(moves)).clamp(max=1.0)
        for name, p in self.parameters.items():
            p.copy_(p.to(moves[name].dtype) + shorter.to(moves[name].dtype) * moves[name])
            self.kept[name][0].copy_(p)
        self.held.set(1)


def norm(tensors: Tensors) -> torch.Tensor:
    """Norm of several tensors together, 0-d float64."""
    return torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in tensors.values()]).norm()


# ----- readouts ---------------------------------------------------------------------------------------------

class AveragedReadout(ReadingWrapper):
    """An average of the weights in float32, and its share in what is read out.

    E <- theta after update number `start`, then E <- E + (theta - E) / tau;  (1 - share) theta + share E
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], settings: Any, at: str, steps: int) -> None:
        """settings: a section with start and tau."""
        super().__init__(parameters, at, steps)
        self.settings, self.begun = settings, Number(0)
        self.average = self.zeros(wide=True)
        self.buffers, self.numbers = {"average": self.average}, {"begun": self.begun}

    def share(self, name: str) -> float:
        """The share of E in what is read out of a parameter."""
        raise NotImplementedError

    def follow(self, done: int) -> None:
        if done < self.settings.start:
            return
        rate = 1 / self.settings.tau if self.begun.value else 1.0
        self.begun.set(1)
        for name, x in self.average.items():
            x.lerp_(self.parameters[name].to(x.dtype), rate)

    def known(self, step: int) -> bool:
        return bool(self.begun.value)

    def value(self, name: str, p: torch.Tensor) -> torch.Tensor:
        return p.to(self.average[name].dtype).lerp(self.average[name], self.share(name))


class Tail(AveragedReadout):
    """Tail-EMA (settings.wrappers.TailEMA; track 3, results 45 and 46)."""

    def __init__(self, model: GPT, settings: TailEMA, steps: int) -> None:
        averaged = {name: p for name, p in of_model(model).items() if settings.embed or p.label != "embed"}
        super().__init__(averaged, settings, settings.at, steps)

    def share(self, name: str) -> float:
        return self.settings.share


class Velocity(ReadingWrapper):
    """Tail velocity (settings.wrappers.TailVelocity; track 3, result 38).

    v <- decay v + (1 - decay) (theta - before);  before <- theta;  theta + push min(1, cap |theta| / |v|) v
    """

    def __init__(self, model: GPT, settings: TailVelocity, steps: int) -> None:
        super().__init__(block_matrices(model), settings.at, steps)
        self.settings, self.held = settings, Number(0)  # updates since `start`, that one included
        self.mean, self.before = self.zeros(wide=True), self.zeros(wide=True)
        self.buffers = {"mean": self.mean, "before": self.before}
        self.numbers = {"held": self.held}

    def follow(self, done: int) -> None:
        if done < self.settings.start:
            return
        for name, p in self.parameters.items():
            if self.held.value:
                step = p.to(self.mean[name].dtype) - self.before[name]
                self.mean[name].lerp_(step, 1 - self.settings.decay)
            self.before[name].copy_(p)
        self.held.set(self.held.value + 1)

    def known(self, step: int) -> bool:
        return self.held.value > 1

    def value(self, name: str, p: torch.Tensor) -> torch.Tensor:
        v, settings = self.mean[name], self.settings
        wide = p.to(v.dtype)
        longest, length = (
            torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(1e-12) for x in (wide, v)
        )
        return wide + settings.push * (settings.cap * longest / length).clamp_max(1) * v


class Reference(ReadingWrapper):
    """Reference readout (settings.wrappers.ReferenceReadout; track 3, results 38 and 42).

    theta + push (theta - reference), reference: the weights after update number `reference`
    """

    def __init__(self, model: GPT, settings: ReferenceReadout, steps: int) -> None:
        read = {name: p for name, p in of_model(model).items() if settings.embed or p.label != "embed"}
        super().__init__(read, settings.at, steps)
        self.settings, self.taken = settings, Number(0)
        self.reference = self.zeros()
        self.buffers = {"reference": self.reference}
        self.numbers = {"taken": self.taken}

    def follow(self, done: int) -> None:
        if done == self.settings.reference:
            self.taken.set(1)
            for name, x in self.reference.items():
                x.copy_(self.parameters[name])

    def known(self, step: int) -> bool:
        return bool(self.taken.value) and step >= self.settings.start

    def value(self, name: str, p: torch.Tensor) -> torch.Tensor:
        wide = p.to(widened(p.dtype))
        return wide + self.settings.push * (wide - self.reference[name].to(wide.dtype))


def wrappers_of(model: GPT) -> list[Wrapper]:
    """The wrappers of a run, in the order in which they act: on training first, then the readouts.

    Workers that train apart need the run's processes, and stand in system/workers.py.
    """
    optim, steps = model.settings.optim, model.settings.schedule.steps
    made: list[Wrapper] = []
    if optim.ema_nesterov is not None:
        made.append(Lookahead(model, optim.ema_nesterov))
    if optim.outer is not None and not apart(model.settings):
        made.append(Outer(model, optim.outer))
    if optim.rre is not None:
        made.append(Extrapolation(model, optim.rre))
    made += [Pulses(model, settings) for _, settings in pulsed(optim)]
    if optim.tail_ema is not None:
        made.append(Tail(model, optim.tail_ema, steps))
    if optim.tail_velocity is not None:
        made.append(Velocity(model, optim.tail_velocity, steps))
    if optim.phase_readout is not None:
        made.append(Phase(model, optim.phase_readout, steps))
    if optim.reference_readout is not None:
        made.append(Reference(model, optim.reference_readout, steps))
    return made
