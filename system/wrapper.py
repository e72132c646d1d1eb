"""What the hooks around the optimizer share (system/wrappers.py): buffers by name, numbers, readouts."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from model import GPT
from schedule import StepPlan
from settings.optim import BLOCK_MATRICES
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


def block_matrices(model: GPT) -> dict[str, torch.nn.Parameter]:
    """The matrices of the blocks by name."""
    return {name: p for name, p in of_model(model).items() if p.label in BLOCK_MATRICES}


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
