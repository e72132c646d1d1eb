"""Hooks around the optimizer: they act on the weights between two updates, whatever rule made the updates.

Buffers lie next to the parameters, whole on every process: all processes have the same weights, and so
compute the same. A hook reads and writes the stored parameter; where the lower half of a bfloat16 matrix is
kept by Muon (numerics.matrix_mantissa), a hook sees and changes the upper half alone, as Snoo does in the
originals.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from model import GPT
from schedule import StepPlan, apart
from settings.optim import BLOCK_MATRICES
from settings.wrappers import RRE, EMANesterov, OuterStep, ReferenceReadout, TailEMA
from system.stateful import Stateful

Tensors = dict[str, torch.Tensor]  # by parameter name


class Number:
    """A number of a hook's state: read on the host without a wait, and kept by checkpoints as a tensor."""

    def __init__(self, first: float) -> None:
        self.first, self.value = first, first
        self.tensor = torch.tensor([first], dtype=torch.float64)

    def set(self, value: float) -> None:
        self.value = value
        self.tensor.fill_(value)

    def restored(self) -> None:
        self.value = self.tensor.tolist()[0]


class Wrapper(Stateful):
    """What the wrappers share: buffers by parameter name, numbers, and the copy at the untying of the head.

    parameters: those that the wrapper acts on. buffers: {kind: tensors}. numbers: {name: Number}.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.buffers: dict[str, Tensors] = {}
        self.numbers: dict[str, Number] = {}

    def zeros(self, wide: bool = False) -> Tensors:
        """Zeros like the parameters; wide: in at least float32."""
        return {name: torch.zeros_like(p, dtype=widened(p.dtype) if wide else None, requires_grad=False)
                for name, p in self.parameters.items()}

    def after_update(self, plan: StepPlan) -> None:
        with torch.no_grad():
            self.updated(plan)
            if "untie" in plan.events:
                self.untie()

    def updated(self, plan: StepPlan) -> None:
        """What the wrapper does after an update."""

    def untie(self) -> None:
        """The embedding takes over the head's buffers, like its values and its optimizer state."""
        names = {p.label: name for name, p in self.parameters.items()}
        if "embed" in names and "lm_head" in names:
            for tensors in self.buffers.values():
                tensors[names["embed"]].copy_(tensors[names["lm_head"]])

    def restored(self) -> None:
        for number in self.numbers.values():
            number.restored()

    def reset(self) -> None:
        for number in self.numbers.values():
            number.set(number.first)
        for tensors in self.buffers.values():
            for x in tensors.values():
                x.zero_()

    def tensors(self) -> Tensors:
        found = {f"{kind}.{name}": x for kind, tensors in self.buffers.items() for name, x in tensors.items()}
        return found | {name: number.tensor for name, number in self.numbers.items()}


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype, or float32 if that is wider."""
    return torch.promote_types(dtype, torch.float32)


def plus(x: torch.Tensor, y: torch.Tensor, factor: float) -> torch.Tensor:
    """x + factor y in at least float32, rounded once to the dtype of x.

    With `alpha` torch rounds the factor itself to bfloat16 on a CPU, and not on a GPU.
    """
    wide = widened(x.dtype)
    return x.to(wide).add(y.to(wide), alpha=factor).to(x.dtype)


def of_model(model: GPT) -> dict[str, torch.nn.Parameter]:
    """All parameters by name."""
    return dict(model.named_parameters())


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
        super().__init__({name: p for name, p in of_model(model).items() if p.label in BLOCK_MATRICES})
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

class ReadingWrapper(Wrapper):
    """What the readouts share: other weights, either within `reading` or from the last update on.

    at: `validation` or `end`. steps: updates of the run.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], at: str, steps: int) -> None:
        super().__init__(parameters)
        self.at, self.steps = at, steps

    def updated(self, plan: StepPlan) -> None:
        self.follow(plan.step + 1)
        if self.at == "end" and self.reads(plan.step + 1):
            for name, p in self.parameters.items():
                p.copy_(self.value(name, p))

    def follow(self, done: int) -> None:
        """Keep what the readout needs of the weights after update number `done`."""

    def known(self, step: int) -> bool:
        """Whether there are weights to read before a step."""
        raise NotImplementedError

    def value(self, name: str, p: torch.Tensor) -> torch.Tensor:
        """The weights to read in place of p."""
        raise NotImplementedError

    def reads(self, step: int) -> bool:
        """Whether a validation before this step reads them."""
        return self.known(step) and (self.at == "validation" or step == self.steps)

    def reading(self, step: int) -> Any:
        if self.at == "end" or not self.reads(step):
            return contextlib.nullcontext()
        return swapped(self.parameters, self.value)


@contextlib.contextmanager
def swapped(
    parameters: dict[str, torch.nn.Parameter], value: Callable[[str, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """A context in which each parameter is value(name, parameter); afterwards it has its own bits again."""
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(value(name, p))
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(kept[name])


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


class Reference(ReadingWrapper):
    """Reference readout (settings.wrappers.ReferenceReadout; track 3, results 38 and 42).

    theta + push (theta - reference), reference: the weights after update number `reference`
    """

    def __init__(self, model: GPT, settings: ReferenceReadout, steps: int) -> None:
        super().__init__(of_model(model), settings.at, steps)
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
    made = []
    if optim.ema_nesterov is not None:
        made.append(Lookahead(model, optim.ema_nesterov))
    if optim.outer is not None and not apart(model.settings):
        made.append(Outer(model, optim.outer))
    if optim.rre is not None:
        made.append(Extrapolation(model, optim.rre))
    if optim.tail_ema is not None:
        made.append(Tail(model, optim.tail_ema, steps))
    if optim.reference_readout is not None:
        made.append(Reference(model, optim.reference_readout, steps))
    return made
